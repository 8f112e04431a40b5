"""Manifold-constrained hyper-connections: several residual streams, mixed before and behind each block."""
