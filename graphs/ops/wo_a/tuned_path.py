"""What was measured on this machine: the rules of ``auto``, kept in one small file per device and versions.

The file lies in the user's cache directory and is replaced as a whole, so that a reader meets the old one or the new one. Its
name carries a digest of everything the measurement depends on; a file that cannot be used is named in a warning and ignored.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphs.ops.wo_a import auto_path
from graphs.ops.wo_a.auto_path import Rules
from graphs.ops.wo_a.weights import PATHS

SCHEMA = 1
SOURCES = (
    "graphs.ops.wo_a.kernels.portable",
    "graphs.ops.wo_a.kernels.split_k",
    "graphs.ops.wo_a.kernels.hopper",
    "graphs.ops.wo_a.kernels.warpgroup",
    "graphs.ops.wo_a.kernels.clusters",
    "graphs.ops.wo_a.tiles",
    "graphs.ops.wo_a.operators",
)  # a change in one of them outdates a measurement


def rules_for(device: torch.device) -> Rules:
    """The rules ``auto`` follows on ``device``: measured here, else packaged."""
    return read(device) or auto_path.packaged(auto_path.device_key(device))


def identity(device: torch.device) -> dict[str, str]:
    """What a measurement depends on: the device by name, the versions, and a digest of the kernels."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "toolkit": torch.version.hip or torch.version.cuda or "none",
        "triton": _triton_version(),
        "kernels": _kernel_digest(),
    }


def file_of(device: torch.device) -> Path:
    """Where the rules of ``device`` are kept; the file need not exist."""
    from graphs.environment import cache_directory

    known = identity(device)
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^a-z0-9]+", "-", known["device"].lower()).strip("-")
    return cache_directory() / f"wo_a-{name}-{digest}.json"


def read(device: torch.device) -> Rules | None:
    """The rules kept for ``device``; ``None`` without a file, and with a warning where there is one of no use."""
    path = file_of(device)
    try:
        content = json.loads(path.read_text())
        if content["identity"] != identity(device):
            raise ValueError("it was written for another device or other versions")
        return _rules(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{path} is ignored ({reason}); write it again with: python -m graphs tune wo_a", stacklevel=2)
        return None


def write(device: torch.device, rules: Rules, measured: list[dict[str, Any]]) -> Path:
    """Keep ``rules`` for ``device``, with the figures they follow from. Returns the file. Raises OSError if it cannot write."""
    path = file_of(device)
    content = {
        "schema": SCHEMA,
        "identity": identity(device),
        "rules": {str(groups): [list(rule) for rule in limits] for groups, limits in rules.items()},
        "measured": measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def rules_from(times: Mapping[tuple[int, int], Mapping[str, float]]) -> Rules:
    """``(groups, tokens) -> path -> time`` as rules: the fastest path of each, einsum where it is as fast."""
    rules: dict[int, tuple[tuple[int, str], ...]] = {}
    for groups, tokens in sorted(times):
        found = times[groups, tokens]
        best = min(found, key=lambda path: (found[path], path != auto_path.FALLBACK))
        before = rules.get(groups, ())
        if before and before[-1][1] == best:
            before = before[:-1]
        rules[groups] = (*before, (tokens, best))
    return rules


def _rules(content: Mapping[str, Any]) -> Rules:
    """The rules in a file. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
    if content["schema"] != SCHEMA:
        raise ValueError(f"its schema is {content['schema']!r}, not {SCHEMA}")
    rules = {int(groups): tuple((limit, path) for limit, path in limits) for groups, limits in content["rules"].items()}
    for groups, limits in rules.items():
        bounds = [limit for limit, _ in limits]
        whole = all(type(limit) is int and limit > 0 for limit in bounds) and bounds == sorted(set(bounds))
        if groups < 1 or not limits or not whole or not {path for _, path in limits} <= set(PATHS):
            raise ValueError(f"its rules for G = {groups} are {limits}")
    if not rules:
        raise ValueError("it holds no rules")
    return rules


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _kernel_digest() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()[:16]
