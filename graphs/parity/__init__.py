"""A tool: a captured step against the step itself, under everything that a call may meet."""

from graphs.parity.lockstep import parity
from graphs.parity.report import ParityReport
from graphs.parity.rows import ParityDifference, ParityRow

__all__ = ["ParityDifference", "ParityReport", "ParityRow", "parity"]
