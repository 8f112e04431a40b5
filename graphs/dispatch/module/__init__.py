"""What makes a captured module an ``nn.Module``: members of the model's, and forward hooks of its own."""
