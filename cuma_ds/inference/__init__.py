"""Asking a model: opened from any place, run on batches, and continued token by token, on one process or on all ranks in step."""
