"""Where answers come from: each module turns one source into prepared data."""
