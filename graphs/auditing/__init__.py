"""The parts of `graphs.audit`: observing a step, comparing steps, and saying what was found."""
