"""The output of a step, from template to tensors."""
