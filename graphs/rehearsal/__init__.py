"""A run of a step from one state, undone afterwards, and what is learned from it."""
