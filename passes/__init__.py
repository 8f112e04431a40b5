"""Rewrites of FX graphs that make a step recordable. Imports torch and nothing of `graphs`."""

from passes.constants import hoist_constants
from passes.pipeline import DEFAULT, Change, Pass, run

__all__ = ["DEFAULT", "Change", "Pass", "hoist_constants", "run"]
