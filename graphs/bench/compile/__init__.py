"""The comparisons that involve ``torch.compile``."""
