"""Kernels of a decode step beside a library's: products of few rows, attention of one query, products with chosen experts.

Products with a norm before them and something behind are beside the same product and what Inductor makes of the rest.

``PYTHONPATH=. python3 benchmarks/decode_kernels.py`` compares each result with float64 first. Then it tells microseconds of one
call in a CUDA graph of 24, whose weights, keys and values are rotated so that they come from memory; medians of 9 replays. The
floor is what has to be read at 4.2 TB/s.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch

import graphs.ops  # noqa: F401  (defines the operators)
from graphs.ops.skinny import operator
from graphs.ops.skinny.around import Around

Tensor = torch.Tensor
ops, linear, attend = torch.ops.graphs, torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention
RATE, CALLS, REPLAYS, AWAY = 4.2e12, 24, 9, 3e8
PRODUCTS = ((1, 768, 2304), (1, 768, 768), (1, 768, 3072), (1, 3072, 768), (1, 768, 50257), (4, 2048, 2048), (4, 2048, 16384))
ATTENTION = ((1, 12, 12, 192, 64, 160), (4, 32, 8, 192, 64, 160), (1, 32, 8, 1024, 64, 64), (4, 32, 8, 4096, 128, 4096))
EXPERTS = ((24, 32, 1024, 4096), (24, 32, 4096, 512), (6, 32, 1024, 4096), (48, 32, 1024, 4096))


def made(*size: int) -> Tensor:
    """Random numbers in bfloat16 on the device."""
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def microseconds(call: Callable[[int], object]) -> float:
    """Median time of one of many calls in a graph; each is given its number."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            call(number)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def require(found: Tensor, exact: Tensor, rounded: int = 1) -> None:
    """Raise unless a result is float64's but for so many roundings."""
    error = float((found.double() - exact).abs().max() / exact.abs().max())
    if not error <= rounded * 2**-8:
        raise AssertionError(f"relative error {error:.3g}")


def tell(what: str, floor: float, library: float, ours: float) -> None:
    """One line."""
    print(
        f"{what:58} floor {floor / RATE * 1e6:6.2f}  library {library:7.2f}  here {ours:7.2f}  {ours / library:.2f}x", flush=True
    )


def products() -> None:
    """With a bias where the weight is turned, as GPT-2 has them, and without."""
    for (rows, k, n), turned in itertools.product(PRODUCTS, (False, True)):
        count = max(2, min(CALLS, int(AWAY / (2 * k * n))))
        weights = [made(k, n).t() if turned else made(n, k) for _ in range(count)]
        x, bias = made(rows, k), made(n) if turned else None
        exact = x.double() @ weights[0].double().t() + (bias.double() if bias is not None else 0)
        require(ops.skinny_linear(x, [weights[0]], [bias])[0], exact)
        library = microseconds(lambda i: linear(x, weights[i % count], bias))  # noqa: B023
        ours = microseconds(lambda i: ops.skinny_linear(x, [weights[i % count]], [bias]))  # noqa: B023
        tell(f"product {rows} x {k} x {n}{', turned, bias' if turned else ''}", 2 * k * n, library, ours)


AROUND = (  # rows, K, N, whether there is a gate, the norm, what is behind
    (4, 2048, 3072, False, "rms", "none"),
    (4, 2048, 8192, True, "rms", "silu"),
    (4, 8192, 2048, False, "none", "residual"),
    (1, 768, 2304, False, "layer", "none"),
    (1, 768, 3072, False, "layer", "gelu_tanh"),
    (1, 3072, 768, False, "none", "residual"),
)


def around() -> None:
    """The product alone with a kernel before or behind it, as Inductor makes them, against one launch."""
    for rows, k, n, gated, norm, behind in AROUND:
        count = max(2, min(CALLS, int(AWAY / (2 * k * n * (1 + gated)))))
        weights = [[made(n, k) / k**0.5 for _ in range(1 + gated)] for _ in range(count)]
        x, gain, shift, residual = made(rows, k), made(k), made(k), made(rows, n)
        activation = behind if behind in operator.ACTIVATIONS else "none"
        parts: dict[str, Any] = {
            "norm": norm,
            "gain": None if norm == "none" else gain,
            "shift": shift if norm == "layer" else None,
            "eps": 1e-5,
            "activation": activation,
            "residual": residual if behind == "residual" else None,
        }
        exact = operator.products(
            x.double(),
            [one.double() for one in weights[0]],
            None,
            **{name: one.double() if isinstance(one, Tensor) else one for name, one in parts.items()},
        )[0]
        require(ops.skinny_linear(x, weights[0], **parts)[0], exact, rounded=3)

        def apart(x: Tensor, weights: list[Tensor], parts: dict[str, Any] = parts, activation: str = activation) -> Tensor:
            products = ops.skinny_linear(operator.normed(x, Around(**parts)), weights)
            if parts["residual"] is not None:
                return products[0] + parts["residual"]
            active = products[0] if activation == "none" else operator.ACTIVATIONS[activation](products[0])
            return active * products[1] if len(products) > 1 else active

        compiled = torch.compile(apart)
        library = microseconds(lambda i: compiled(x, weights[i % count]))  # noqa: B023
        ours = microseconds(lambda i: ops.skinny_linear(x, weights[i % count], **parts))  # noqa: B023
        tell(f"{rows} x {k} x {n}{' twice' if gated else ''}, {norm}, {behind}", 2 * k * n * (1 + gated), library, ours)


def attention() -> None:
    """Over a cache that is filled in part."""
    for batch, heads, groups, length, width, filled in ATTENTION:
        count = max(2, min(CALLS, int(AWAY / (4 * batch * groups * length * width))))
        query, caches = made(batch, heads, 1, width), [made(2, batch, groups, length, width) for _ in range(count)]
        mask = torch.where(torch.arange(length, device="cuda") < filled, 0.0, -torch.inf).bfloat16().expand(batch, 1, 1, length)
        scale, several = width**-0.5, heads != groups
        exact = attend(query.double(), *caches[0].double(), mask.double(), enable_gqa=several)
        require(ops.one_query_attention(query, *caches[0], mask, scale), exact)
        library = microseconds(lambda i: attend(query, *caches[i % count], mask, enable_gqa=several))  # noqa: B023
        ours = microseconds(lambda i: ops.one_query_attention(query, *caches[i % count], mask, scale))  # noqa: B023
        what = f"attention, {batch} x {heads} heads on {groups}, {filled} of {length} x {width}"
        tell(what, 4 * batch * groups * filled * width, library, ours)


def experts() -> None:
    """Against a copy of the chosen weights and a batched product."""
    for rows, number, n, k in EXPERTS:
        weights, x = [made(number, n, k) for _ in range(4)], made(rows, k)
        chosen = [torch.randint(0, number, (rows,), device="cuda") for _ in range(CALLS)]
        require(
            ops.expert_linear(x, weights[0], chosen[0]), torch.bmm(weights[0][chosen[0]].double(), x.double()[..., None])[..., 0]
        )
        library = microseconds(lambda i: torch.bmm(weights[i % 4][chosen[i]], x.unsqueeze(-1)))  # noqa: B023
        ours = microseconds(lambda i: ops.expert_linear(x, weights[i % 4], chosen[i]))  # noqa: B023
        read = statistics.mean(len(set(some.tolist())) for some in chosen) * n * k * 2
        tell(f"experts, {rows} rows, {number} of {n} x {k}", read, library, ours)


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        products()
        around()
        attention()
        experts()
