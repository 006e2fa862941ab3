"""What a study says: typed, as Markdown, and as pictures."""
