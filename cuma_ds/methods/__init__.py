"""What is trained: one interface, and the methods behind it."""
