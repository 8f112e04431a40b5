"""Regions of small exact operators (`passes.fuse_exact`), compiled by Inductor when they first run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

Tensor = torch.Tensor
Compiled = Callable[..., Sequence[Tensor]]


class CompiledRegion(torch.nn.Module):
    """A region as a module. It is compiled for the tensors of its first call, which is before a step is recorded.

    Args:
        body: the graph of the region.
        known: compiled regions by what they compute and from what, to which this one is added: many are the same.
    """

    def __init__(self, body: GraphModule, known: dict[Any, Compiled]) -> None:
        super().__init__()
        self.body, self._known = body, known
        self._function: Compiled | None = None

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The results of the region."""
        with torch.no_grad():
            if self._function is None:
                self._function = self._compiled(inputs)
            return self._function(*inputs)

    def _compiled(self, inputs: Sequence[Tensor]) -> Compiled:
        from torch._inductor.compile_fx import compile_fx

        key = (self.body.code, *((x.dtype, x.device, x.shape, x.stride()) for x in inputs))
        if key not in self._known:
            with _disable_current_modes():
                self._known[key] = compile_fx(self.body, list(inputs), config_patches={"triton.cudagraphs": False})  # type: ignore[assignment]
        return self._known[key]
