"""Branches of which both sides become part of a graph."""
