"""Host values as tensors: the rewriter and what it needs."""
