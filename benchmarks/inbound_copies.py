"""What it costs to bring inputs into a recording: by number, by size, and by who reads the row of addresses.

``PYTHONPATH=. python3 benchmarks/inbound_copies.py`` prints device and host microseconds per captured call of a step that does
nothing else but to return the last element of each input. A GPU is needed; about a minute.

- ``each``: every program of the copying kernel reads the row from host memory itself
- ``fetched``: a kernel of one warp reads the row, the programs read it from the device
- ``ahead``: the inputs are copied by launches of their own, ahead of the graph

``*`` marks what a recording does by itself.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import graphs
from graphs.observation.timing import time_call
from graphs.recording import copy_kernels, cuda_graph

MODES = {"each": (1 << 30, 1 << 40), "fetched": (0, 1 << 40), "ahead": (1 << 30, -1)}  # copies.FEW, cuda.LARGE
DEFAULT = copy_kernels.FEW, cuda_graph.LARGE
CASES = [(count, 512) for count in (1, 2, 3, 4, 8, 16)] + [(1, 1 << power) for power in (3, 12, 13, 14, 16, 18, 20, 22, 24, 26)]
CALLS = 40  # issued behind one pause of the device


def last_elements(*inputs: torch.Tensor) -> torch.Tensor:
    """One small kernel, whatever the size of the inputs."""
    return torch.cat([tensor[-1:] for tensor in inputs])


def captured(count: int, size: int, mode: str) -> tuple[graphs.CapturedModule, list[torch.Tensor]]:
    """A step recorded in this mode, and arguments for it; its outputs are checked."""
    copy_kernels.FEW, cuda_graph.LARGE = MODES[mode]
    try:
        step = graphs.capture(last_elements)
        for turn in range(3):
            inputs = [torch.full((size // 8,), 10 * turn + index, dtype=torch.int64, device="cuda") for index in range(count)]
            expected = torch.arange(10 * turn, 10 * turn + count, device="cuda")
            assert torch.equal(step(*inputs), expected), f"{count} x {size} bytes, {mode}, call {turn}"
    finally:
        copy_kernels.FEW, cuda_graph.LARGE = DEFAULT
    assert step.report().replays == 3, str(step.report())
    return step, inputs


def by_itself(count: int, size: int) -> str:
    """The mode that a recording chooses."""
    if size > cuda_graph.LARGE:
        return "ahead"
    programs = count * min(-(-size // (8 * copy_kernels._BLOCK)), 264)
    return "each" if programs <= copy_kernels.FEW else "fetched"


def main() -> None:
    """Measure every case in every mode, the modes taking turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    device = torch.device("cuda", torch.cuda.current_device())
    machine = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    print(f"{machine}, medians of {runs} runs of {CALLS} calls, us per call")
    print(f"{'inputs x bytes':>18}" + "".join(f"{mode + ' device':>18}{'host':>8}" for mode in MODES))
    for count, size in CASES:
        steps = {mode: captured(count, size, mode) for mode in MODES}
        times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
        for _ in range(runs):
            for mode, (step, inputs) in steps.items():
                took = time_call(lambda step=step, inputs=inputs: [step(*inputs) for _ in range(CALLS)], device, runs=1)
                times[mode].append(((took.device_us or 0.0) / CALLS, took.host_us / CALLS))
        line = f"{count:>6} x {size:>9,}"
        for mode, found in times.items():
            on_device, on_host = (statistics.median(part) for part in zip(*found, strict=True))
            line += f"{'*' if mode == by_itself(count, size) else ' '}{on_device:>17.2f}{on_host:>8.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
