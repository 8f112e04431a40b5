"""What recording costs beside recording by hand: seconds, device memory, and runs of the step.

``sizes``: a step of the shape of Qwen3-0.6B at 19 batch sizes with a static cache each, by `torch.cuda.CUDAGraph` in one pool
and by `graphs.capture`. ``paged``: a step of 16 layers that writes one row per layer into a paged cache of 60 GB, at 8 sizes.
``host``: 32 layers over a cache of 1 GiB on the CPU. ``moved``: a new cache object for a recorded Llama. ``deepseek``: the decode
step of ``generate()`` for 8 layers of DeepSeek-V4 of transformers, its first call and the later ones, eager and recorded; at toy
width where there is no GPU. ::

    PYTHONPATH=. python3 benchmarks/recording_cost.py sizes paged moved deepseek --out results/recording_cost.json
    PYTHONPATH=. python3 benchmarks/recording_cost.py host
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphs
from graphs.bench.deepseek_v4.model import build_deepseek

Tensor = torch.Tensor
SIZES = [1, 2, 4, *range(8, 129, 8)]
MIB = 1 << 20


def qwen(device: torch.device) -> nn.Module:
    """A decoder of the shape of Qwen3-0.6B with random weights in bfloat16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


class Logits(nn.Module):
    """A decoder's step that returns the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, position: Tensor, cache: Any) -> Tensor:
        """Logits of the next token: ``[batch, 1, vocabulary]``."""
        out: Tensor = self.model(ids, position_ids=position, past_key_values=cache, use_cache=True).logits
        return out


def static_cache(model: nn.Module, batch: int, length: int, device: torch.device) -> Any:
    """A static cache that has its storage already."""
    from transformers import StaticCache

    config: Any = model.config
    cache = StaticCache(config=config, max_batch_size=batch, max_cache_len=length)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, torch.bfloat16, device)
    return cache


def used(device: torch.device) -> int:
    """Bytes of the device in use, after what can be freed was freed."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def by_hand(step: nn.Module, calls: list[tuple[Any, ...]]) -> list[Any]:
    """The calls recorded as an engine does it: largest first, one warm-up each, one pool."""
    pool, kept = torch.cuda.graph_pool_handle(), []
    stream = torch.cuda.Stream()
    for call in reversed(calls):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(*call)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = step(*call)
        kept.append((graph, out))
    for graph, _ in kept:
        graph.replay()
    return kept


def measure_sizes(device: torch.device) -> dict[str, Any]:
    """19 sizes by hand and by `graphs.capture`."""
    step = Logits(qwen(device))
    calls = []
    for batch in SIZES:
        ids = torch.randint(0, 1000, (batch, 1), device=device)
        calls.append((ids, torch.full((batch, 1), 5, device=device), static_cache(step.model, batch, 256, device)))
    for call in calls[:: len(calls) - 1]:
        step(*call)
    before, started = used(device), time.perf_counter()
    kept = by_hand(step, calls)
    torch.cuda.synchronize(device)
    hand = {"seconds": time.perf_counter() - started, "MiB": (used(device) - before) / MIB}
    expected = [step(*call) for call in calls]
    del kept
    before, started, each = used(device), time.perf_counter(), []
    captured = graphs.capture(step)
    for call in reversed(calls):
        begun = time.perf_counter()
        captured(*call)
        each.append(round(time.perf_counter() - begun, 3))
    torch.cuda.synchronize(device)
    ours = {"seconds": time.perf_counter() - started, "MiB": (used(device) - before) / MIB, "each": each}
    for call, wanted in zip(calls, expected, strict=True):
        torch.testing.assert_close(captured(*call), wanted, atol=0.1, rtol=0.05)
    report = captured.report()
    ours["recordings"], ours["eager_calls"] = report.recordings, report.eager_calls
    times = {f"x {what}": ours[what] / hand[what] for what in ("seconds", "MiB")}
    return {"by hand": hand, "graphs": ours, **times}


class PagedLayer(nn.Module):
    """One layer over a paged cache: writes a row per sequence, attends to the rows of a table."""

    def __init__(self, width: int, heads: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.heads = heads
        with torch.device(device):
            self.norm = nn.RMSNorm(width, dtype=dtype)
            self.qkv = nn.Linear(width, 3 * width, bias=False, dtype=dtype)
            self.out = nn.Linear(width, width, bias=False, dtype=dtype)
            self.up = nn.Linear(width, 2 * width, bias=False, dtype=dtype)
            self.down = nn.Linear(2 * width, width, bias=False, dtype=dtype)
            self.register_buffer("keys", torch.zeros(rows, width, dtype=dtype))
            self.register_buffer("values", torch.zeros(rows, width, dtype=dtype))

    def forward(self, x: Tensor, slot: Tensor, table: Tensor, length: Tensor) -> Tensor:
        """``x``: ``[batch, width]``; ``slot``: ``[batch]``; ``table``: ``[batch, context]``; ``length``: ``[batch]``."""
        batch, width = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        self.keys[slot], self.values[slot] = k, v
        keys, values = (cache[table].view(batch, -1, self.heads, width // self.heads) for cache in (self.keys, self.values))
        mask = (torch.arange(table.shape[1], device=x.device) < length[:, None])[:, None, None]
        q = q.view(batch, 1, self.heads, -1).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
        x = x + self.out(attended.reshape(batch, width))
        return x + self.down(nn.functional.silu(self.up(x)))


class Paged(nn.Module):
    """A step of several such layers."""

    def __init__(self, layers: int, *arguments: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PagedLayer(*arguments) for _ in range(layers))

    def forward(self, x: Tensor, slot: Tensor, table: Tensor, length: Tensor) -> Tensor:
        """As of a layer."""
        for layer in self.layers:
            x = layer(x, slot, table, length)
        return x


def paged_call(model: Paged, batch: int, turn: int) -> tuple[Tensor, ...]:
    """A decode step of ``batch`` sequences, each 100 rows apart."""
    weight: Any = model.layers[0].down.weight
    begin = torch.arange(batch, device=weight.device) * 100
    table = begin[:, None] + torch.arange(64, device=weight.device)
    x = torch.randn(batch, weight.shape[0], device=weight.device).to(weight.dtype)
    return x, begin + turn, table, torch.full((batch,), turn + 1, device=weight.device)


def measure_paged(device: torch.device, gigabytes: float) -> dict[str, Any]:
    """8 sizes over a cache that fills most of the device."""
    width, layers = 2048, 16
    rows = int(gigabytes * 1e9) // (layers * 2 * width * 2)
    model = Paged(layers, width, 16, rows, torch.bfloat16, device).eval()
    sizes = [1, 2, 4, 8, 16, 32, 48, 64]
    model(*paged_call(model, 64, 0))
    before, started = used(device), time.perf_counter()
    torch.cuda.reset_peak_memory_stats(device)
    allocated = torch.cuda.memory_allocated(device)
    captured = graphs.capture(model)
    for batch in reversed(sizes):
        captured(*paged_call(model, batch, 1))
    seconds = time.perf_counter() - started
    peak = (torch.cuda.max_memory_allocated(device) - allocated) / MIB
    left = (used(device) - before) / MIB
    for batch in sizes:
        call = paged_call(model, batch, 2)
        with graphs.eager():
            expected = captured(*call)
        torch.testing.assert_close(captured(*call), expected, atol=0.05, rtol=0.05)
    report = captured.report()
    return {
        "cache GB": sum(buffer.nbytes for buffer in model.buffers()) / 1e9,
        "seconds": seconds,
        "peak MiB": peak,
        "left MiB": left,
        "recordings": report.recordings,
        "eager_calls": report.eager_calls,
    }


def measure_host() -> dict[str, Any]:
    """A cache of 1 GiB on the CPU: peak memory of the first two calls, and their time in eager steps."""
    model = Paged(32, 512, 8, 8192, torch.float32, torch.device("cpu")).eval()
    cache = sum(buffer.nbytes for buffer in model.buffers())
    calls = [paged_call(model, 4, turn) for turn in range(6)]
    eager = statistics.median(_seconds(lambda call=call: model(*call)) for call in calls * 2)  # type: ignore[misc]
    captured = graphs.capture(model)
    with _peak() as peak:
        first = _seconds(lambda: [captured(*call) for call in calls[:2]])
    for call in calls:
        with graphs.eager():
            expected = captured(*call)
        assert torch.equal(captured(*call), expected)
    report = captured.report()
    return {
        "eager ms": eager * 1e3,
        "first two calls, eager steps": first / eager,
        "peak over cache": peak[0] / cache,
        "recordings": report.recordings,
        "eager_calls": report.eager_calls,
    }


def _seconds(fn: Callable[[], object]) -> float:
    started = time.perf_counter()
    fn()
    return time.perf_counter() - started


@contextmanager
def _peak() -> Iterator[list[int]]:
    """How far the resident memory of this process rises above what it is now, in bytes."""
    status, ended, found = Path("/proc/self/status"), threading.Event(), [0]

    def resident() -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))

    start = resident()

    def watch() -> None:
        while not ended.wait(0.002):
            found[0] = max(found[0], resident() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def measure_moved(device: torch.device) -> dict[str, Any]:
    """A Llama of 16 x 2048: from the call with a new `StaticCache` to its replay, beyond a normal replay."""
    from graphs.bench.decode.llama import WIDE, build_llama

    model = build_llama(WIDE, device)
    step = Logits(model)
    captured = graphs.capture(step)
    ids, position = torch.ones(4, 1, dtype=torch.int64, device=device), torch.full((4, 1), 3, device=device)
    captured(ids, position, static_cache(model, 4, 256, device))
    waits, normal = [], []
    for _ in range(8):
        cache = static_cache(model, 4, 256, device)
        torch.cuda.synchronize(device)
        waits.append(_seconds(lambda: (captured(ids, position, cache), torch.cuda.synchronize(device))))  # noqa: B023
        normal += [_seconds(lambda: (captured(ids, position, cache), torch.cuda.synchronize(device))) for _ in range(5)]  # noqa: B023
    report = captured.report()
    return {
        "ms beyond a replay": [round((wait - statistics.median(normal)) * 1e3, 2) for wait in waits],
        "replay ms": statistics.median(normal) * 1e3,
        "recordings": report.recordings,
    }


def measure_deepseek(device: torch.device) -> dict[str, Any]:
    """From a prompt of 128 tokens, batch 4: the first decode step that is recorded, and a step of ``generate()``.

    A step's time is that of a longer ``generate()`` less that of one token, over the tokens between them.
    """
    model, tokens, repeats = build_deepseek(device), 16, 5
    ids = torch.randint(3, 500, (4, 128), device=device, generator=torch.Generator(device).manual_seed(0))

    def seconds(new: int) -> float:
        def call() -> None:
            found.append(model.generate(ids, min_new_tokens=new, max_new_tokens=new))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        found: list[Tensor] = []
        return _seconds(call)

    def step_ms() -> float:
        seconds(tokens + 1)
        return statistics.median((seconds(tokens + 1) - seconds(1)) / tokens for _ in range(repeats)) * 1e3

    eager = step_ms()
    expected = model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens)
    graphs.accelerate(model)
    prompt = seconds(1)
    first = seconds(2) - prompt
    recorded = step_ms()
    same = (model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens) == expected)[:, ids.shape[1] :]
    report = graphs.accelerated_report(model)
    return {
        "first recorded step, seconds": first,
        "eager step ms": eager,
        "recorded step ms": recorded,
        "recordings": report.recordings,
        "replays": report.replays,
        "eager_calls": report.eager_calls,
        "refusals": [str(refusal) for refusal in report.refusals],
        "equal tokens": same.float().mean().item(),
    }


def main() -> None:
    """Measure what was asked for and print it, or write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("sizes", "paged", "host", "moved", "deepseek"))
    parser.add_argument("--gigabytes", type=float, default=60.0, help="of the paged cache")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    measures = {
        "sizes": lambda: measure_sizes(device),
        "paged": lambda: measure_paged(device, args.gigabytes),
        "host": measure_host,
        "moved": lambda: measure_moved(device),
        "deepseek": lambda: measure_deepseek(device),
    }
    found = {}
    with torch.no_grad():
        for what in args.what:
            found[what] = measures[what]()
            print(what, json.dumps(found[what], indent=2), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
