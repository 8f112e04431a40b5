"""What the benchmark of the grouped projection compares: our paths, and the peers that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

import torch

from graphs.bench.choices import OURS, PATHS
from graphs.environment import WoAPath
from graphs.errors import MissingDependency
from graphs.ops import GroupedProjection, GroupedWeight
from graphs.ops.wo_a import aiter_backend, operators, weights

Tensor = torch.Tensor
QUANTISED = ("bmm", "gloop", "aiter bmm", "aiter gloop", "deepgemm")  # their activations are FP8
TOLERANCE = {path: 0.05 if path in QUANTISED else 0.004 for path in PATHS}  # relative, Frobenius; measured 0.026 and 0.0017


def build(path: str, weight: GroupedWeight) -> torch.nn.Module:
    """``weight`` prepared for ``path``: a module that takes ``o [M, G, K]``, gives ``[M, G, N]`` and knows its ``weight_bytes``.

    Raises:
        MissingDependency: the package of a peer is absent or of no use.
    """
    if path == "deepgemm":
        return DeepGemmProjection(weight)
    backend, _, name = path.rpartition(" ")
    return GroupedProjection(weight, path=cast(WoAPath, name), backend="aiter" if backend else "native")


def absent(path: str, device: torch.device) -> str | None:
    """Why ``path`` cannot be measured on ``device``, or None."""
    if path in OURS:
        return None
    if device.type != "cuda":
        return "it needs a GPU"
    try:
        if path == "deepgemm":
            _fp8_einsum()
        else:
            aiter_backend.function(path.split()[1])
    except MissingDependency as error:
        return str(error)
    return None


def _fp8_einsum() -> Callable[..., None]:
    """DeepGEMM's function. Raises MissingDependency where the package, or a release that has it, is missing."""
    try:
        return importlib.import_module("deep_gemm").fp8_einsum
    except (
        ImportError,
        AttributeError,
        RuntimeError,
        AssertionError,
        OSError,
    ) as error:  # it looks for a toolkit as it is imported
        needed = f"timing DeepGEMM's fp8_einsum ({type(error).__name__}: {error})"
        raise MissingDependency("deep_gemm", needed, "pip install git+https://github.com/deepseek-ai/DeepGEMM") from error


class DeepGemmProjection(torch.nn.Module):
    """One kernel of ours that quantises, then DeepGEMM's, as serving engines call it."""

    def __init__(self, weight: GroupedWeight) -> None:
        super().__init__()
        self._einsum = _fp8_einsum()
        prepared = weights.prepare(weight, "gloop")
        assert prepared.scale is not None
        self.data, self.scale, self.weight_bytes = prepared.data, prepared.scale, prepared.nbytes

    def forward(self, o: Tensor) -> Tensor:
        """``o [M, G, K]`` gives ``[M, G, N]``."""
        q, scale = operators.kernels().quantise(o.transpose(0, 1), self.data.dtype)  # group by token, as theirs wants it
        y = o.new_empty((o.shape[0], o.shape[1], self.data.shape[1]))
        self._einsum("bhr,hdr->bhd", (q, scale), (self.data, self.scale), y, recipe=(1, 128, 128))
        return y
