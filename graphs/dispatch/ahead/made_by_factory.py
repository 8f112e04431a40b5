"""``python -m graphs record``: what a factory made, recorded at batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphs.dispatch.captured_module import CapturedStep, capture
from graphs.errors import ConfigError
from graphs.report import SizesReport


def record_made(
    model: Callable[..., Any],
    example: tuple[tuple[Any, ...], dict[str, Any]],
    sizes: Sequence[int],
    batch_dims: Mapping[str, int],
    memory_budget: str,
    *,
    progress: bool,
) -> SizesReport:
    """Record a step without gradients; one that is captured already keeps its settings.

    Raises:
        ConfigError: batch dimensions were given for such a step, or what `CapturedStep.record` raises.
        Refusal: it cannot be recorded.
    """
    if isinstance(model, CapturedStep):
        if batch_dims:
            raise ConfigError("--batch-dims", dict(batch_dims), "left out: the factory returns a step that is captured")
        step: CapturedStep[Any, Any] = model
    else:
        step = capture(model, buckets=sizes or None, batch_dims=batch_dims or None)
    with torch.no_grad():
        return step.record(example, sizes=sizes or None, memory_budget=memory_budget or None, progress=progress)
