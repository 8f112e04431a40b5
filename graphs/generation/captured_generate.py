"""``graphs.capture(model).generate(...)``: as of the accelerated model, which the model itself does not become."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from graphs.dispatch.captured_module import ATTRIBUTES, CapturedStep
from graphs.generation.accelerate import Accelerated, methods_in_front, put_in_front
from graphs.generation.decode_step import STATE
from graphs.report import CaptureReport


class CapturedGenerate:
    """The ``generate()`` of a captured model.

    A second object with the model's parameters, submodules and settings is accelerated, so that calls of the model itself stay
    what they are.
    """

    def __init__(self, step: CapturedStep[Any, Any], model: torch.nn.Module) -> None:
        self._step, self._model = step, model
        self._begin()
        functools.update_wrapper(self, getattr(model, "generate"))  # noqa: B009  # not declared for modules

    def _begin(self) -> None:
        """Accelerate a second object of the model as it is now."""
        self._twin: Any = put_in_front(copy.copy(self._model), self._step._graphs_recordings.config)
        self._state: Accelerated = vars(self._twin)[STATE]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        if methods_in_front(self._model) != self._state.own or type(self._model) is not type(self._twin):
            self._begin()
        front = {STATE, *self._state.replacements()}
        vars(self._twin).update({name: value for name, value in vars(self._model).items() if name not in front})
        self._state.step.mode = self._step.mode
        return self._twin.generate(*args, **kwargs)

    def report(self) -> CaptureReport:
        """What was recorded for it."""
        return self._state.report()


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
