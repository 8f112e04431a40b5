"""What values the tensors of a graph can have, and which ones operators refuse."""
