"""FX graphs compiled so that they can be recorded."""
