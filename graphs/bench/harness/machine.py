"""What the results depend on besides the code: device, driver, versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from graphs.bench.harness.rows import Machine


def describe_machine(device: torch.device) -> Machine:
    """The machine as it is now."""
    on_gpu = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        driver=_driver() if on_gpu else "none",
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        threads=torch.get_num_threads(),
        toolkit=_toolkit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _toolkit() -> str:
    """What torch was built with; nothing for a build without a GPU."""
    if torch.version.hip is not None:
        return f"HIP {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda is not None else "none"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    """Version of the kernel driver; torch knows only which API it supports."""
    if torch.version.hip is not None:
        path = Path("/sys/module/amdgpu/version")
        return path.read_text().strip() if path.exists() else f"HIP {torch.version.hip}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"CUDA {torch.version.cuda}"
