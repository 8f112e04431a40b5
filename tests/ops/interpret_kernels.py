"""Run the Triton kernels in Triton's interpreter and print one JSON line of results.

A script, not a test module: the interpreter is chosen by an environment variable before triton is imported, so this runs in a
process of its own (see test_kernels.py).
"""

from __future__ import annotations

import json
import sys

import torch

from graphs.ops.wo_a import reference
from graphs.ops.wo_a.kernels import portable, split_k
from graphs.ops.wo_a.tiles import Tile

GROUPS, N = 2, 128
FEATURES = {"split": 1024}  # of a group: two steps of this kernel, four of the others (512)
OPTIONS = ("", " fp8", " rotary", " fp8 rotary")
PATHS = ("bmm", "gloop", "split bmm", *(kernel + options for kernel in ("fused", "split") for options in OPTIONS))
TILE = {"split": Tile(32, 128, 4, 2)}  # all tokens in one block, four warps share K
POSITIONS = torch.arange(100, 0, -3)
ANGLES = torch.arange(101)[:, None] * 0.7 ** torch.arange(32)
TABLE = torch.cat((ANGLES.cos(), ANGLES.sin()), -1)


def operands(path: str, m: int, fp8: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A strided ``o [M, G, K]`` (a transposed, sliced view) and a quantised weight with its scale."""
    generator = torch.Generator().manual_seed(m)
    k = FEATURES.get(path, 512)
    o = torch.randn(GROUPS, m, k + 128, generator=generator).bfloat16().transpose(0, 1)[..., :k]
    w = torch.randn(GROUPS, N, k, generator=generator)
    return o, *(reference.quantise_single(w, fp8) if "bmm" in path else reference.quantise_blocks(w, fp8))


def run(path: str, o: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The result in float32 (the interpreter truncates to bfloat16), in a buffer of NaN one row longer than is written."""
    m = o.shape[0]
    y = torch.full((m + 1, GROUPS, N), float("nan"), dtype=torch.float32)
    kernel, *options = path.split()
    extra = {"fp8": True} if {"fp8", "bmm"} & set(options) else {}
    extra |= {"positions": POSITIONS[:m], "table": TABLE} if "rotary" in options else {}
    module = split_k if kernel == "split" else portable
    getattr(module, f"launch_{kernel}")(o, weight, scale, y[:m], TILE.get(kernel, Tile(16, 128, 4, 2)), **extra)
    assert y[m].isnan().all(), "the kernel wrote beyond its rows"
    return y[:m]


def compare(path: str, m: int, fp8: torch.dtype) -> dict[str, float]:
    """Relative error against the float32 reference of the same path and against float64 on the dequantised weight."""
    o, weight, scale = operands(path, m, fp8)
    y = run(path, o, weight, scale)
    o = reference.inverse_rotary(o.float(), POSITIONS[:m], TABLE) if "rotary" in path else o
    if "bmm" not in path and "gloop" not in path and "fp8" not in path:
        expected = reference.project_blocks(o.float(), weight, scale)
    else:
        expected = reference.project_quantised(o.float(), weight, scale)
    exact = reference.project_fp64(o, weight.double() * (scale if "bmm" in path else reference.expand_blocks(scale)).double())
    return {"reference": reference.relative_error(y, expected), "exact": reference.relative_error(y, exact)}


def special(path: str, value: float) -> dict[str, bool]:
    """One odd value in row 1, group 0: every result of that row and group must be non-finite, every other finite."""
    o, weight, scale = operands(path, 3, torch.float8_e4m3fn)
    o = o.clone()
    o[1, 0, 5] = value
    finite = run(path, o, weight, scale).isfinite()
    touched = finite[1, 0].clone()
    finite[1, 0] = True
    return {"propagates": not touched.any(), "elsewhere_finite": bool(finite.all())}


def zeros(path: str) -> float:
    """The largest result for activations that are all zero."""
    o, weight, scale = operands(path, 2, torch.float8_e4m3fn)
    return float(run(path, torch.zeros_like(o), weight, scale).abs().max())


def main() -> None:
    out: dict[str, object] = {}
    for path in PATHS:
        for m in (1, 5, 17):
            out[f"{path}-{m}"] = compare(path, m, torch.float8_e4m3fn)
        out[f"{path}-fnuz"] = compare(path, 3, torch.float8_e4m3fnuz)
        out[f"{path}-nan"], out[f"{path}-inf"] = special(path, float("nan")), special(path, float("inf"))
        out[f"{path}-zeros"] = zeros(path)
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
