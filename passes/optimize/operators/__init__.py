"""Passes that put an operator of few launches in the place of what a decode step is written as. They round otherwise."""
