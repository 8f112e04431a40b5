"""Hyper-connections on a GPU: errors, microseconds of kernels in a CUDA graph, the step of a model with and without them.

    PYTHONPATH=. python3 benchmarks/mhc.py [check] [kernels] [tiles] [model] [compiled]    # without a word: the first three

check: largest error of each operator over the largest value, against float64 on the bf16 inputs (post, comb: about 1e-6; mixed
and streams: at most 2**-8 = 3.9e-3, one rounding, two for streams behind a block).
kernels: median us of one call, 64 calls in a graph, each with weights of its own (100 MB: not in L2). "eager": in torch.
tiles: us of post_pre for T = 1, 4, 8 by (columns, rows of a program, columns of the mixing one, warps), fastest first.
model: 8 layers of `graphs.bench.deepseek_v4`, batch 4, ms per recorded step and kernels per layer, without and with the pass.
compiled: the same under graphs.capture(compiler="inductor") on one call of model(ids, use_cache=False) of 1 token.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch

import graphs
from graphs.ops.mhc import kernel, operator, reference, tiles

Tensor = torch.Tensor
HC, D, ITER, EPS = 4, 4096, 20, 1e-6
SETS = 64
DEV = torch.device("cuda")


def layer(n: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, HC * D, device=DEV) / 128, torch.randn(n, device=DEV), torch.randn(s, device=DEV)


def data(t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, x = torch.randn(t, D, device=DEV).bfloat16(), torch.randn(t, HC, D, device=DEV).bfloat16()
    return out, x, torch.rand(t, HC, device=DEV) * 2, torch.rand(t, HC, HC, device=DEV)


def exact_pre(x: Tensor, w: tuple[Tensor, ...], head: bool = False) -> list[Tensor]:
    fn, base, scale = (one.double() for one in w)
    x = x.double()
    flat = x.flatten(1)
    mixes = (flat * (flat.square().mean(1, keepdim=True) + EPS).rsqrt()) @ fn.t()
    pre = torch.sigmoid(mixes[:, :HC] * scale[0] + base[:HC]) + EPS
    mixed = torch.einsum("th,thd->td", pre, x)
    if head:
        return [mixed]
    post = 2 * torch.sigmoid(mixes[:, HC : 2 * HC] * scale[1] + base[HC : 2 * HC])
    logits = (mixes[:, 2 * HC :] * scale[2] + base[2 * HC :]).view(-1, HC, HC)
    return [mixed, post, reference.sinkhorn(torch.softmax(logits, -1) + EPS, EPS, ITER)]


def exact_post(out: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    post, comb = post.bfloat16().double(), comb.bfloat16().double()
    return post.unsqueeze(-1) * out.double().unsqueeze(1) + comb.mT @ x.double()


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().max() / b.abs().max())


def check() -> None:
    ops = torch.ops.graphs
    for t in (1, 2, 3, 5, 8, 17, 64):
        assert tiles.few(t, HC, D) is not None
        out, x, post, comb = data(t)
        w, h = layer(24, 3), layer(4, 1)
        made = ops.mhc_pre(x, *w, EPS, EPS, ITER)
        line = {"pre": [error(a, b) for a, b in zip(made, exact_pre(x, w), strict=True)]}
        streams = ops.mhc_post(out, x, post, comb)
        line["post"] = [error(streams, exact_post(out, x, post, comb))]
        line["head"] = [error(ops.mhc_head(x, *h, EPS, EPS), exact_pre(x, h, True)[0])]
        both = ops.mhc_post_pre(out, x, post, comb, *w, EPS, EPS, ITER)
        assert torch.equal(both[0], streams), "streams of post_pre and post differ"
        line["post_pre"] = [error(a, b) for a, b in zip(both[1:], exact_pre(streams, w), strict=True)]
        again = ops.mhc_post_pre(out, x, post, comb, *w, EPS, EPS, ITER)
        assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True)), "not the same twice"
        eager = reference.post(out, x, post, comb)
        same = (eager == streams).float().mean().item()
        print(
            f"T={t:3}", {k: [f"{e:.1e}" for e in v] for k, v in line.items()}, f"streams equal to eager: {same:.5f}", flush=True
        )
    half = tuple(one.bfloat16() for one in layer(24, 3))
    made = ops.mhc_pre(x, *half, EPS, EPS, ITER)
    print("bf16 weights:", [f"{error(a, b):.1e}" for a, b in zip(made, exact_pre(x, half), strict=True)])


def us(calls: list[Callable[[], object]], repeats: int = 30) -> float:
    """Median over replays of a graph of all calls, per call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.replay()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / len(calls))
    del kept
    return statistics.median(times)


def kernels() -> None:
    ops = torch.ops.graphs
    ws, hs = [layer(24, 3) for _ in range(SETS)], [layer(4, 1) for _ in range(SETS)]
    print(f"{'T':>3} {'eager pre':>9} {'eager post':>10} {'pre':>6} {'post':>6} {'post_pre':>8} {'head':>6}   us, float32; bf16")
    for dtype in (torch.float32, torch.bfloat16):
        some = [tuple(one.to(dtype) for one in w) for w in ws]
        for t in (1, 2, 4, 8, 16, 32, 64) if dtype == torch.float32 else (1, 4, 8):
            sets = [data(t) for _ in range(8)]
            pairs = [(sets[i % 8], some[i]) for i in range(SETS)]
            few = pairs[:16]
            row = [
                us([lambda d=d, w=w: reference.pre(d[1], *w, EPS, EPS, ITER) for d, w in few], 10),
                us([lambda d=d: reference.post(*d) for d, _ in few], 10),
                us([lambda d=d, w=w: ops.mhc_pre(d[1], *w, EPS, EPS, ITER) for d, w in pairs]),
                us([lambda d=d: ops.mhc_post(*d) for d, _ in pairs]),
                us([lambda d=d, w=w: ops.mhc_post_pre(*d, *w, EPS, EPS, ITER) for d, w in pairs]),
                us([lambda d=d, w=w: ops.mhc_head(d[1], *w, EPS, EPS) for (d, _), w in zip(pairs, hs, strict=True)]),
            ]
            print(f"{t:3} {row[0]:9.1f} {row[1]:10.1f} {row[2]:6.2f} {row[3]:6.2f} {row[4]:8.2f} {row[5]:6.2f}", flush=True)
    parts(ws, data(4))


def parts(ws: list[tuple[Tensor, ...]], d: tuple[Tensor, ...]) -> None:
    """Kernel by kernel of post_pre at T = 4, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    call = lambda w: torch.ops.graphs.mhc_post_pre(*d, *w, EPS, EPS, ITER)  # noqa: E731
    call(ws[0])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for w in ws:
            call(w)
        torch.cuda.synchronize()
    for event in found.key_averages():
        print(f"    T=4 {event.key[:60]:60} {event.count:4} x {event.device_time_total / event.count:.2f} us")


def by_tile() -> None:
    ws = [layer(24, 3) for _ in range(SETS)]
    for t in (1, 4, 8):
        sets = [data(t) for _ in range(8)]
        found = []
        for columns, rows, mixed, warps in itertools.product((16, 32, 64), (1, 2, 4), (512, 1024, 2048), (1, 4)):
            if rows > t:
                continue
            tile = tiles.Tile(columns, rows, mixed, 256, warps)

            def call(d: tuple[Tensor, ...], w: tuple[Tensor, ...], tile: tiles.Tile = tile) -> object:
                y = torch.empty_like(d[1])
                results = operator._results(d[1])
                kernel.launch_mix(d, y, w, (EPS, EPS, ITER), results, tile)
                return y, results

            # columns by rows matter for sums, mixed and warps for both
            if (rows, columns) != (min(t, 4), 32) and (mixed, warps) not in ((1024, 1), (1024, 4)):
                continue
            found.append((us([lambda d=sets[i % 8], w=ws[i]: call(d, w) for i in range(SETS)], 10), tile))
        found.sort(key=lambda one: one[0])
        print(
            f"T={t}",
            *(f"{time_:.2f} {tuple(tile)}" for time_, tile in found[:8]),
            f"... {found[-1][0]:.2f} {tuple(found[-1][1])}",
            sep="\n   ",
            flush=True,
        )


def counted(call: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if event.device_time_total and "Mem" not in event.key[:3])


def model_step(option: bool) -> None:
    sys.path.insert(0, "benchmarks")
    from graphs.bench.deepseek_v4.model import build_deepseek

    model = build_deepseek(DEV)
    for module in model.modules():  # as a checkpoint is loaded: these stay float32
        if hasattr(module, "hc_fn") or (hasattr(module, "fn") and hasattr(module, "base")):
            module.float()
    ids = torch.randint(3, 500, (4, 128), device=DEV, generator=torch.Generator(DEV).manual_seed(0))
    new = lambda n: model.generate(ids, min_new_tokens=n, max_new_tokens=n)  # noqa: E731
    expected = new(9)
    graphs.accelerate(model, compiler_options={"hyper_connections": option})
    started = time.perf_counter()
    new(2)
    torch.cuda.synchronize()
    first = time.perf_counter() - started

    def seconds(n: int) -> float:
        begun = time.perf_counter()
        new(n)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    seconds(17)
    ms = statistics.median((seconds(17) - seconds(1)) / 16 for _ in range(5)) * 1e3
    per_step = (counted(lambda: new(9)) - counted(lambda: new(1))) / 8
    same = (new(9) == expected)[:, 128:].float().mean().item()
    report = graphs.accelerated_report(model)
    keys = [key for key in report.keys if key.replays]
    print(
        f"hyper_connections={option}: {ms:.2f} ms per step, {per_step:.0f} kernels per step = {per_step / 8:.0f} per layer, "
        f"first two tokens {first:.1f} s, tokens equal to eager {same:.3f}, replay device us "
        f"{[key.replay_device_us for key in keys]}, {[key.rewrites for key in keys]}, "
        f"refusals {[str(one)[:200] for one in report.refusals]}",
        flush=True,
    )


def compiled_step(option: bool) -> None:
    sys.path.insert(0, "benchmarks")
    from graphs.bench.deepseek_v4.model import build_deepseek

    model = build_deepseek(DEV)
    ids = torch.randint(3, 500, (4, 1), device=DEV)
    options = {"hyper_connections": option, "force_disable_caches": True}
    step = graphs.capture(model, compiler="inductor", compiler_options=options)
    for _ in range(3):
        step(ids, use_cache=False)
    for _ in range(2):
        step(ids, use_cache=False)
    print(
        f"compiled, hyper_connections={option}: kernels {counted(lambda: step(ids, use_cache=False)) / 8:.0f} per layer;",
        step.report(),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    words = sys.argv[1:] or ["check", "kernels", "tiles"]
    with torch.no_grad():
        for word in words:
            begun = time.perf_counter()
            if word == "model":
                model_step(False)
                model_step(True)
            elif word == "compiled":
                compiled_step(False)
                compiled_step(True)
            else:
                {"check": check, "kernels": kernels, "tiles": by_tile}[word]()
            print(f"[{word}: {time.perf_counter() - begun:.0f} s]", flush=True)
