"""What a graph assumes of host values: checked, and undone where it did not hold."""
