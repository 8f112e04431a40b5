"""How much sooner a second process reaches its first replay of a compiled step than the first one does.

Both processes capture one decode step of a Llama with ``compiler="inductor"``. They share the directories of Inductor's
and Triton's caches, which are empty for the first; each pair has its own. Prints seconds from the first call to the first
replay, and from the start of the process, with the median of the pairs' ratios, and what the seconds went to. ::

    PYTHONPATH=. python3 benchmarks/compile_cache.py [--pairs N] [--layers N] [--width N] [--device auto|cpu|cuda]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

LIMIT = 3.0
CALLS = ("from the first call to the first replay", "from the start of the process")
PARTS = ("importing and building", "tracing by Dynamo", "compiling by AOTAutograd and Inductor", "watching, recording, verifying")


def first_replay(layers: int, width: int, device_name: str, started: float) -> dict[str, float]:
    """Capture a step and replay it once; seconds by what they are counted from."""
    import torch

    import graphs
    from graphs.bench.decode.llama import WIDE, Decoding, build_llama
    from graphs.bench.settings import BenchSettings

    device = BenchSettings.resolve(device_name).device
    size = dataclasses.replace(
        WIDE, layers=layers, hidden=width, intermediate=4 * width, heads=width // 64, kv_heads=width // 128
    )
    if device.type == "cpu":
        torch.set_num_threads(1)  # as in all experiments on a CPU: threads that wait for each other scatter on a busy machine
        size = dataclasses.replace(size, dtype=torch.float32)
    model = build_llama(size, device)
    decoding = Decoding(model, size, 4, device)
    step = graphs.capture(model, compiler="inductor")
    called = time.time()
    decoding.same_step(step, 1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ended = time.time()
    dynamo = sum(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", [])) or 0.0
    (key,) = step.report().keys
    if key.compiler != "inductor" or step.report().refusals:
        raise SystemExit(f"the step was not recorded as compiled:\n{step.report()}")
    parts = (called - started, dynamo - key.compile_seconds, key.compile_seconds, ended - called - dynamo)
    return {CALLS[0]: ended - called, CALLS[1]: ended - started, **dict(zip(PARTS, parts, strict=True))}


def main() -> None:
    """Run pairs of processes one after the other and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048, help="a multiple of 128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.started is not None:
        print(json.dumps(first_replay(options.layers, options.width, options.device, options.started)))
        return
    pairs = []
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory() as directory:
            pairs.append((_process(directory), _process(directory)))
            print(_compared(pairs[-1:]), flush=True)
    print(f"medians of {len(pairs)} pair(s)\n{_compared(pairs)}")
    met = _ratio(pairs, CALLS[0]) >= LIMIT
    print(f"at least {LIMIT:g}x sooner {CALLS[0]}: {'met' if met else 'missed'}")


def _ratio(pairs: list[tuple[dict[str, float], dict[str, float]]], name: str) -> float:
    return statistics.median(cold[name] / warm[name] for cold, warm in pairs)


def _compared(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    lines = []
    for name in (*CALLS, *PARTS):
        cold, warm = (statistics.median(pair[index][name] for pair in pairs) for index in (0, 1))
        ratio = f": {_ratio(pairs, name):.2f}x sooner" if name in CALLS else ""
        lines.append(f"  {name}: {cold:.1f} s, then {warm:.1f} s with the caches{ratio}")
    return "\n".join(lines)


def _process(directory: str) -> dict[str, float]:
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{directory}/inductor", "TRITON_CACHE_DIR": f"{directory}/triton"}
    command = [sys.executable, *sys.argv, "--started", str(time.time())]
    done = subprocess.run(command, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
