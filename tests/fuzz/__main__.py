"""Many random programs: ``python -m tests.fuzz --programs 20000 --seed 0 --workers 2 --device cpu``.

Each worker is a process of its own, which may die of a program: that counts as a crash, and another takes over behind it.
Exit status 1 where a program was wrong or crashed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.grammar import generate
from tests.fuzz.lockstep import Outcome, run
from tests.fuzz.program import Program
from tests.fuzz.shrink import shrink

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 120
"""Seconds that a program may take; a worker ends itself after that."""
_TOLD = 500  # programs after which a line says how far it is
_SHOWN = 2  # programs of each kind that are made smaller and printed


def main() -> None:
    """Run as many programs as asked for; or be one of the workers."""
    options = _options()
    if options.replay is not None:
        _replay(options.replay, options.device)
    elif options.worker:
        _work(options.seed, options.programs, options.workers, options.device)
    else:
        sys.exit(_supervise(options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the others follow")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shrink", type=int, default=200, help="runs to make a failing program smaller; 0: print it as it is")
    parser.add_argument("--replay", type=int, help="print the program of one seed, and what comes of it")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _replay(seed: int, device: str) -> None:
    program = generate(seed)
    print(program.script())
    print("#", run(program, device))


def _work(first: int, last: int, stride: int, device: str) -> None:
    """Programs ``first``, ``first + stride``, ... below ``last``; a line of JSON before and after each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a program prints
    for seed in range(first, last, stride):
        if hasattr(signal, "alarm"):
            signal.alarm(LONGEST)
        print(json.dumps({"seed": seed}), file=out, flush=True)
        try:
            outcome = run(generate(seed), device)
        except Exception as error:  # twins of other lengths, or a fault of this harness: never silently
            outcome = Outcome("crashed", f"harness: {error!r}")
        print(json.dumps({"seed": seed, **outcome.__dict__}), file=out, flush=True)
        if device == "cuda" and not _is_alive():
            return  # another process goes on with the next one


def _is_alive() -> bool:
    """Whether the device still answers: an operator that refuses a value there ends it for the process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _supervise(options: argparse.Namespace) -> int:
    began = time.monotonic()
    results: list[dict[str, Any]] = []
    lock = threading.Lock()
    workers = max(1, min(options.workers, options.programs))
    threads = [threading.Thread(target=_worker, args=(options, index, workers, results, lock)) for index in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [one for one in results if one["kind"] in ("wrong", "crashed")]
    _print_failures(failed, options)
    kinds = Counter(one["kind"] for one in results)
    calls, replays = sum(one["calls"] for one in results), sum(one["replays"] for one in results)
    print(
        f"{len(results)} programs, {calls} calls, {replays / max(calls, 1):.0%} replayed, {kinds['wrong']} wrong, "
        f"{kinds['crashed']} crashed; {kinds['form']} with equal data in another form, {kinds['rounded']} with other last "
        f"bits, {kinds['invalid']} invalid; {time.monotonic() - began:.0f} s"
    )
    return 1 if failed else 0


def _worker(options: argparse.Namespace, index: int, workers: int, results: list[dict[str, Any]], lock: threading.Lock) -> None:
    """Keep one worker process going until its share is done."""
    last = options.seed + options.programs
    following = options.seed + index
    while following < last:
        command = [sys.executable, "-m", "tests.fuzz", "--worker", "--device", options.device, "--workers", str(workers)]
        command += ["--seed", str(following), "--programs", str(last)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        begun = None
        for line in process.stdout:
            told = json.loads(line)
            if "kind" in told:
                begun, following = None, told["seed"] + workers
                with lock:
                    results.append(told)
                    _progress(told, len(results))
            else:
                begun = told["seed"]
        status = process.wait()
        if begun is not None:
            with lock:
                results.append({"seed": begun, **Outcome("crashed", f"the process ended with status {status}").__dict__})
                _progress(results[-1], len(results))
            following = begun + workers
        elif status:
            raise RuntimeError(f"a worker ended with status {status}; run {' '.join(command)} to see why")


def _progress(told: dict[str, Any], done: int) -> None:
    if told["kind"] in ("wrong", "crashed"):
        print(f"[{done}] seed {told['seed']} {told['kind']}: {told['detail']}", flush=True)
    elif done % _TOLD == 0:
        print(f"[{done}] up to about seed {told['seed']}", flush=True)


def _print_failures(failed: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Failing programs of each kind, made smaller, as scripts."""
    seen: Counter[str] = Counter()
    for one in sorted(failed, key=lambda one: one["seed"]):
        kind = kind_of(one["kind"], one["detail"])
        seen[kind] += 1
        if seen[kind] > _SHOWN:
            continue
        program = generate(one["seed"])
        if options.shrink and "the process ended" not in one["detail"]:
            program = shrink(program, lambda smaller, kind=kind: _fails(smaller, options.device, kind), options.shrink)
        print(f"# seed {one['seed']}, {one['kind']}: {one['detail']}\n{program.script()}", flush=True)
    for kind, count in seen.most_common():
        print(f"{count:5d}  {kind}")


def _fails(program: Program, device: str, kind: str) -> bool:
    outcome = run(program, device)
    return outcome.failed and kind_of(outcome.kind, outcome.detail) == kind


def kind_of(kind: str, detail: str) -> str:
    """What two failures have in common that are probably the same: where it is seen, without numbers."""
    place = detail.partition(": ")[2]
    place = place.split(" is ")[0] if kind == "wrong" else place
    return f"{kind} {''.join('#' if letter.isdigit() else letter for letter in place)[:70]}"


if __name__ == "__main__":
    main()
