"""Calls of a model for its prompts: run eagerly, and recorded where a shape comes again and the host is what takes the time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from graphs.compiler_options import CompilerOptions
from graphs.config import CaptureConfig
from graphs.dispatch.captured_module import CapturedModule, CapturedStep
from graphs.generation.caches.fixed_caches import autocast_of
from graphs.generation.decode_step import DecodeStep
from graphs.report import CaptureReport

Tensor = torch.Tensor
SHAPES = 4
"""Shapes of prompts that are recorded: a recording takes as long as hundreds of prompts, so it is for those that come again."""
TOKENS = 2048
"""Tokens of the largest prompt that is recorded. Above it the device has more to do than the host."""


class Prompts:
    """The prompts of one model.

    Args:
        model: of transformers.
        config: of the captured step; a prompt is not compiled.
    """

    def __init__(self, model: torch.nn.Module, config: CaptureConfig) -> None:
        self._model = model
        options = CompilerOptions(hyper_connections=config.compiler_options.hyper_connections)
        self._config = dataclasses.replace(config, compiler="none", compiler_options=options, buckets=None)
        self._seen: set[Any] = set()
        self._recorded: set[Any] = set()
        self._unfit: set[Any] = set()
        self._replays = 0

    @functools.cached_property
    def step(self) -> CapturedStep[Any, Any]:
        """The captured call."""
        return CapturedModule(DecodeStep(self._model), self._config)

    def reports(self) -> list[CaptureReport]:
        """What was recorded, or why not."""
        return [self.step.report()] if self._recorded or self._unfit else []

    def wanted(self, tokens: Tensor, cache: Any) -> bool:
        """Whether a prompt ``[rows, tokens, ..]`` is to be replayed, on a cache that is lent for the second time at least."""
        if not tokens.is_cuda or tokens.shape[0] * tokens.shape[1] > TOKENS:
            return False
        shape = _shape(tokens, cache)
        if shape in self._unfit or shape in self._recorded:
            return shape in self._recorded
        if shape in self._seen:
            return len(self._recorded) < SHAPES
        self._seen.add(shape)
        return False

    def replayed(self, tokens: Tensor, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the call returns; one that cannot be recorded, as where it sets what later ones find, is not tried again."""
        shape = _shape(tokens, cache)
        output = self.step(*args, **kwargs)
        if shape not in self._recorded:
            (self._recorded if self.step.report().replays > self._replays else self._unfit).add(shape)
            self._replays = self.step.report().replays
        return output


def _shape(tokens: Tensor, cache: Any) -> Any:
    return (*tokens.shape, tokens.dtype, type(cache).__name__, torch.is_inference_mode_enabled(), autocast_of(tokens.device))
