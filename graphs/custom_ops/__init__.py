"""Operators of the user's, registered and checked."""
