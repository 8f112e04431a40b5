"""A tool: a captured step against the step itself, under everything that a call may meet."""

from graphs.parity.lockstep import parity
from graphs.parity.report import ParityDifference, ParityReport, ParityRow

__all__ = ["ParityDifference", "ParityReport", "ParityRow", "parity"]
