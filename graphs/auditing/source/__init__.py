"""What the source text of a step tells."""
