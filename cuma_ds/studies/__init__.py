"""A study: recipes x methods x seeds x budgets, run, tuned and compared over the same people."""
