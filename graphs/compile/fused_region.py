"""Regions of small exact operators (`passes.fuse_exact`), compiled by Inductor when they first run."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from graphs.compile.torch_dynamo import private
from graphs.events.listeners import logger

Tensor = torch.Tensor
Compiled = Callable[..., Sequence[Tensor]]
_compiled: weakref.WeakValueDictionary[Any, Compiled] = weakref.WeakValueDictionary()
"""Compiled functions in use, by what they compute and from what: layers of a model, and ways through it, have many alike."""


class CompiledRegion(torch.nn.Module):
    """A region as a module. It is compiled for the tensors of its first call, which is before a step is recorded.

    One that Inductor cannot compile runs operator by operator, with a warning: it is right, and slower.

    Args:
        body: the graph of the region.
    """

    def __init__(self, body: GraphModule) -> None:
        super().__init__()
        self.body = body
        self._function: Compiled | None = None

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The results of the region."""
        with torch.no_grad():
            if self._function is None:
                self._function = self._compile(inputs)
            return self._function(*inputs)

    def _compile(self, inputs: Sequence[Tensor]) -> Compiled:
        key = (self.body.code, *((x.dtype, x.device, x.shape, x.stride()) for x in inputs))
        function: Any = _compiled.get(key)
        if function is None:
            try:
                with _disable_current_modes():
                    function = private("compile_fx")(self.body, list(inputs), config_patches={"triton.cudagraphs": False})
            except Exception as error:  # whatever a compiler fails with, the region can run without it
                reason = str(error).strip().partition("\n")[0]
                text = f"{len(self.body.graph.nodes)} small operators run unfused: {reason}"
                logger.warning("%s", text)
                with contextlib.suppress(RuntimeWarning):  # made an error, it would look like an error of the step
                    warnings.warn(text, RuntimeWarning, stacklevel=2)
                return self.body
            _compiled[key] = function
        return function
