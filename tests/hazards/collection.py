"""Every hazard, by section."""

from __future__ import annotations

from tests.hazards import composite, crashes, needless, removed, silent, stale

SECTIONS = {"A": composite, "B": crashes, "C": silent, "D": stale, "E": needless, "F": removed}
