"""Draw the picture of the README from stored results, with the code that ``python -m graphs bench decode`` draws with.

``PYTHONPATH=. python3 benchmarks/draw_amortisation.py`` writes ``docs/amortisation.png`` from
``benchmarks/results/h200_bench.json``; another file of results and another picture may be named.
"""

from __future__ import annotations

import sys
from pathlib import Path

from graphs.bench.decode.amortise import Amortisation
from graphs.bench.decode.plot import draw_amortisation
from graphs.bench.harness.rows import read_results

ROOT = Path(__file__).resolve().parents[1]


def main(results: Path = ROOT / "benchmarks/results/h200_bench.json", picture: Path = ROOT / "docs/amortisation.png") -> None:
    """Draw, and print the sentence that stands above the picture."""
    stored = read_results(results)
    found = Amortisation.of(stored)
    if found is None:
        raise SystemExit(f"{results} holds no decode steps")
    draw_amortisation(found, stored.machine, picture)
    print(found.sentence())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
