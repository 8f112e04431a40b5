"""``generate()`` of transformers: eager, with its own compilation, and on recordings."""
