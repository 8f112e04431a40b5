"""``generate()`` of transformers on recordings."""
