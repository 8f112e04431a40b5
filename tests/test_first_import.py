"""What a first call imports: a step that compiles nothing needs no compiler."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, torch, graphs

step = graphs.capture(torch.nn.Linear(4, 4))
with torch.no_grad():
    for _ in range(3):
        step(torch.ones(2, 4))
assert step.report().replays == 3
print(*(name for name in ("torch._dynamo", "torch._inductor", "transformers") if name in sys.modules))
"""


def test_a_step_is_recorded_without_importing_a_compiler() -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
