"""What a step may change: tensors, Python objects, random generators, numbers that it advances."""
