"""A step as an ATen graph, host values as hinted symbols."""
