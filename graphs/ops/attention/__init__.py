"""Attention of one query for each sequence over a cache that is partly filled."""
