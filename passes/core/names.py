"""Names for what passes add to a module."""

from __future__ import annotations

import itertools

import torch


def fresh_name(module: torch.nn.Module, prefix: str) -> str:
    """``prefix`` with the first number that the module has no attribute for."""
    return next(name for index in itertools.count() if not hasattr(module, name := f"{prefix}{index}"))
