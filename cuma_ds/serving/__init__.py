"""An OpenAI-compatible server: requests of different people are answered in one batch."""
