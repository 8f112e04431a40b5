"""Scripts that run kernels in Triton's interpreter, in processes of their own: it is chosen before triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def interpreted(script: Path) -> dict[str, float]:
    """What a script of this folder prints: errors by case."""
    pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot be interpreted")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found
