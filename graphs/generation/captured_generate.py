"""``graphs.capture(model).generate(...)``: as of the accelerated model, which the model itself does not become."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from graphs.dispatch.captured_module import ATTRIBUTES, CapturedStep
from graphs.generation.accelerate import put_in_front
from graphs.generation.decode_step import STATE
from graphs.report import CaptureReport


class CapturedGenerate:
    """The ``generate()`` of a captured model.

    A second object with the model's parameters, submodules and settings is accelerated, so that calls of the model itself stay
    what they are.
    """

    def __init__(self, step: CapturedStep[Any, Any], model: torch.nn.Module) -> None:
        self._step, self._model = step, model
        self._twin: Any = put_in_front(copy.copy(model), step._graphs_recordings.config)
        self._front = vars(self._twin).keys() - vars(model).keys()
        functools.update_wrapper(self, getattr(model, "generate"))  # noqa: B009  # not declared for modules

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        vars(self._twin).update({name: value for name, value in vars(self._model).items() if name not in self._front})
        vars(self._twin)[STATE].step.mode = self._step.mode
        return self._twin.generate(*args, **kwargs)

    def report(self) -> CaptureReport:
        """What was recorded for it."""
        report: CaptureReport = vars(self._twin)[STATE].report()
        return report


def _generate_of(step: CapturedStep[Any, Any]) -> CapturedGenerate | None:
    """That of a model of transformers; None where the model is another one, or accelerated itself."""
    model = step._graphs_model
    generates = isinstance(model, torch.nn.Module) and hasattr(type(model), "_prepare_cache_for_generation")
    if not generates or STATE in vars(model):
        return None
    known: CapturedGenerate | None = step.__dict__.get("_graphs_generate")
    if known is None:
        object.__setattr__(step, "_graphs_generate", known := CapturedGenerate(step, model))
    return known


ATTRIBUTES["generate"] = _generate_of
