"""Products of few rows with one activation."""
