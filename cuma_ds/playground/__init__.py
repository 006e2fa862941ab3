"""A page on which people compare what a model answers for different groups."""
