"""Models opened from any place, run on batches and continued token by token, by one process or by all ranks in step."""
