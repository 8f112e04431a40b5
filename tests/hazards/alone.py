"""One hazard in a process of its own: ``python -m tests.hazards.alone NAME CONTEXT DEVICE``."""

from __future__ import annotations

import sys

import torch

from tests.hazards.case import HAZARDS
from tests.hazards.collection import SECTIONS
from tests.hazards.running import check_here

if __name__ == "__main__":
    assert SECTIONS
    torch.set_num_threads(1)
    name, context, device = sys.argv[1:]
    check_here(HAZARDS[name], context, torch.device(device))
