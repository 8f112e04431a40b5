"""Hazards that are not met yet, by name: what fails, and under which contexts where it is not all of them.

An entry is removed when its hazard is met; one that is met and still here passes as ``XPASS``.
"""

from __future__ import annotations

FAILING: dict[str, str] = {}
