"""The grouped output projection: weights, paths, operators, one module."""
