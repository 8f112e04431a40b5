"""Run a failed pipeline again: ``python -m passes.mlir.reproduce FILE``, with the file that the error named.

Prints the diagnostics of MLIR, or the lowered module where it does not fail.
"""

from __future__ import annotations

import sys
from pathlib import Path

from passes.errors import LoweringError, OptionError
from passes.mlir.bindings import bindings
from passes.mlir.lower import PIPELINE, run_pipeline


def reproduce(path: Path) -> str:
    """Run the pipeline in the first line of ``path`` on the module in the rest of it. Returns the text of the result.

    Raises:
        OptionError: the file does not begin with a pipeline.
        LoweringError: the pipeline failed.
    """
    first, _, text = path.read_text().partition("\n")
    if not first.startswith(PIPELINE):
        raise OptionError("file", str(path), f"one that a LoweringError named: its first line begins with {PIPELINE!r}")
    mlir = bindings()
    context = mlir.ir.Context()
    mlir.register_torch_dialect(context)
    with context:
        module = mlir.ir.Module.parse(text)
    run_pipeline(module, first.removeprefix(PIPELINE), "reproducing")
    return str(module)


def main(arguments: list[str]) -> int:
    """Exit status: 0 where the pipeline went through, 1 where it failed, 2 for a wrong call."""
    if len(arguments) != 1:
        print("usage: python -m passes.mlir.reproduce FILE", file=sys.stderr)
        return 2
    try:
        print(reproduce(Path(arguments[0])))
    except LoweringError as error:
        print(error.__cause__, file=sys.stderr)
        return 1
    except (OptionError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
