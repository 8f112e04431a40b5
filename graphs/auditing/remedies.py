"""The classes of findings, and the pass that takes each away: the one table of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ADDRESSING = "addressing"
ARITHMETIC = "arithmetic"
BOUND = "bound"
CONTROL_FLOW = "control flow"
HOST_CONSTANT = "host constant"
CHANGING_VALUE = "changing value"
UNSUPPORTED = "unsupported"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Remedy:
    """What a pass does about a class of findings."""

    by: str
    does: str


REMEDIES = {
    ADDRESSING: Remedy("addressing", "the index stays on the device"),
    ARITHMETIC: Remedy("arithmetic", "the number stays on the device as a 0-d tensor"),
    BOUND: Remedy("bounded", "a static upper bound and a mask"),
    CONTROL_FLOW: Remedy("branches", "both sides, or the side taken with its condition checked in every replay"),
    HOST_CONSTANT: Remedy("constants", "uploaded once"),
    CHANGING_VALUE: Remedy("counters", "an integer that advances evenly becomes a counter on the device"),
}
"""Class to the pass that takes it away; a class that is not here has none."""

CLASS_OF = {REMEDIES[name].by: name for name in (ADDRESSING, ARITHMETIC, BOUND, CONTROL_FLOW)}
"""The class of a use that a pass took."""

CLASSES = (*REMEDIES, UNSUPPORTED, UNKNOWN)
"""Every class, in the order in which a finding lists them."""

NO_PASS = {
    "conversion": "the value leaves the step: keep it on the device, or convert what the step returns",
    "check": "call the variant that does not check (torch.linalg.*_ex)",
    "shape": "give the tensor a fixed capacity and fill it in place",
    "address": "keep one tensor and update it in place (copy_)",
    "constant": "its data changes: pass it as an argument",
    "operators": "Python state picks the operators: use torch.where on a tensor, or pass the state as an argument",
    "attribute": "keep the value in a tensor that the step updates in place, or pass it as an argument",
    "irreversible": "an iterator that moves on cannot be put back: draw from it outside and pass the value",
    "output": "return the tensor itself, not a Python value made from it",
    "follows": "none of its own: it goes away with what it follows from",
    "once": "none needed: only the first step differs",
}
"""Why no pass applies, and what to change instead."""


def remedy_of(classes: Iterable[str]) -> tuple[tuple[str, ...], str]:
    """The passes that take away a finding of these classes, and what they do; no passes where a class has none."""
    if UNKNOWN in classes:
        tried = [REMEDIES[name].by for name in (ADDRESSING, ARITHMETIC, BOUND, CONTROL_FLOW)]
        return tuple(tried), "the one that its use turns out to need: how the value is used cannot be told from here"
    found = [REMEDIES[name] for name in classes if name in REMEDIES]
    return tuple(remedy.by for remedy in found), "; ".join(remedy.does for remedy in found)
