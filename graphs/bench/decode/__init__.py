"""Decode steps of a Llama, eager and replayed."""
