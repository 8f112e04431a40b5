"""Caches of fixed storage, and their keeping between calls of ``generate()``."""
