"""Triton kernels of the grouped projection."""
