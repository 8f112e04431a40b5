"""Run both operators of the aiter back end in Triton's interpreter and print one JSON line of results.

A script, not a test module: the interpreter is chosen by an environment variable before triton is imported, so this runs in a
process of its own (see test_aiter_backend.py). The interpreter differs from a device, and each difference is accounted for here:
newer ones assert what the package's kernels only promise a compiler (that strides of absent operands are positive), their
conversion to FP8 loses the carry into an odd exponent (so activations are FP8 values, and no powers of two), and the one to
bfloat16 cuts off (so a result may be half a percent small).
"""

from __future__ import annotations

import json
import sys

import torch
from triton.runtime.interpreter import InterpreterBuilder

from graphs.ops import GroupedProjection
from graphs.ops.wo_a import aiter_backend, reference

InterpreterBuilder.create_assume = lambda self, condition: None
CASES = {"1": (1, 1, 128, 128), "5": (5, 2, 128, 256), "17": (17, 2, 256, 384)}  # name -> M, G, N, K


def operands(path: str, m: int, g: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A strided ``o [M, G, K]`` (transposed, sliced) that quantises without loss, and a quantised weight with its scale."""
    generator = torch.Generator().manual_seed(m)

    def draw(low: int, high: int, width: int = 128) -> torch.Tensor:
        return torch.randint(low, high, (g, m, k // 128 + 1, width), generator=generator).float()

    values = draw(9, 16) * torch.exp2(draw(-6, 5)) * (1 - 2 * draw(0, 2))
    values[..., 0] = 448.0
    o = (values * torch.exp2(draw(-9, 3, width=1))).flatten(-2).bfloat16().transpose(0, 1)[..., :k]
    w = torch.randn(g, n, k, generator=generator)
    return o, *(reference.quantise_single(w) if path == "bmm" else reference.quantise_blocks(w))


def compare(path: str, m: int, g: int, n: int, k: int, config: dict[str, object] | None = None) -> dict[str, object]:
    o, weight, scale = operands(path, m, g, n, k)
    y = getattr(aiter_backend, path)(o, weight, scale, config=config)
    expected = reference.project_quantised(o.float(), weight, scale)
    shaped = list(y.shape) == [m, g, n] and y.is_contiguous() and y.dtype == torch.bfloat16
    return {"error": reference.relative_error(y, expected), "shaped": shaped}


def module(path: str) -> dict[str, bool]:
    """Whether the module calls the operator, and undoes a rotary embedding in front of it."""
    o, *_ = operands(path, 3, 2, 128, 512)
    data, scale = reference.quantise_blocks(torch.randn(2, 128, 512, generator=torch.Generator().manual_seed(1)))
    projection = GroupedProjection(data, scale, path=path, backend="aiter")
    expected = getattr(aiter_backend, path)(o, *projection.buffers())
    still = torch.cat((torch.ones(4, 32), torch.zeros(4, 32)), -1)  # every angle is zero
    turned = projection(o, torch.tensor([3, 0, 1]), still)
    return {"same": torch.equal(projection(o), expected), "turned": torch.equal(turned, expected)}


def main() -> None:
    before = set(sys.modules)
    out: dict[str, object] = {"available": aiter_backend.available()}
    out["left"] = sorted(name for name in set(sys.modules) - before if name.split(".")[0] == "aiter")
    for path in ("bmm", "gloop"):
        for name, shape in CASES.items():
            out[f"{path}-{name}"] = compare(path, *shape)
        config = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 32, "waves_per_eu": 2, "kpack": 2}
        out[f"{path}-config"] = compare(path, 5, 2, 128, 256, config)
        out[f"{path}-module"] = module(path)
        empty = getattr(aiter_backend, path)(*(t[:0] if i == 0 else t for i, t in enumerate(operands(path, 1, 2, 128, 128))))
        out[f"{path}-empty"] = list(empty.shape)
    out["gloop-ksplit"] = compare("gloop", 5, 2, 128, 256, {"NUM_KSPLIT": 2})
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
