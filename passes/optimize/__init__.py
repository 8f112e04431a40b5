"""Fewer operators and fewer kernels, bit for bit the same."""
