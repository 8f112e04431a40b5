"""The command line: arguments to functions, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from graphs.errors import MissingDependency

try:
    import typer
except ImportError as error:
    raise MissingDependency("typer", "the command line", "pip install stepgraphs") from error

from graphs.bench.settings import DEVICES, EXPERIMENTS, MIN_RUNS, BenchSettings
from graphs.bench.wo_a.paths import PATHS
from passes.mlir import DIALECTS

app = typer.Typer(
    name="graphs",
    help="Record decode steps once and replay them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def graphs_command() -> None:
    """Record decode steps once and replay them."""


@app.command()
def bench(
    experiment: Annotated[str, typer.Argument(metavar=f"[{'|'.join(EXPERIMENTS)}]", help="What to measure.")] = "all",
    out: Annotated[Path, typer.Option(help="Directory for the JSON file and the figure.")] = Path("results"),
    runs: Annotated[int, typer.Option(help=f"Measured repetitions of everything, at least {MIN_RUNS}.")] = MIN_RUNS,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer batch sizes and shorter sequences.")] = False,
    device: Annotated[str, typer.Option(metavar=f"[{'|'.join(DEVICES)}]", help="Where to run.")] = "auto",
    search: Annotated[bool, typer.Option(help="compile: measure mode='max-autotune' too, which compiles for minutes.")] = True,
    groups: Annotated[str, typer.Option(help="wo_a: numbers of groups, separated by commas.")] = "",
    tokens: Annotated[str, typer.Option(help="wo_a: numbers of tokens, separated by commas.")] = "",
    paths: Annotated[str, typer.Option(help=f"wo_a: some of {', '.join(PATHS)}.")] = "",
) -> None:
    """Measure decode steps, the grouped projection and the overhead of a captured call, eager against graph."""
    from graphs.bench import run_bench

    settings = BenchSettings.resolve(device, runs, quick, search=search, groups=groups, tokens=tokens, paths=paths)
    run_bench(experiment, settings, out)


@app.command()
def tune(
    operator: Annotated[str, typer.Argument(metavar="[wo_a]", help="What to measure again.")],
    runs: Annotated[int, typer.Option(help=f"Measured repetitions, at least {MIN_RUNS}.")] = MIN_RUNS,
    device: Annotated[str, typer.Option(metavar=f"[{'|'.join(DEVICES)}]", help="Where to run.")] = "auto",
    groups: Annotated[str, typer.Option(help="Numbers of groups, separated by commas.")] = "",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "",
) -> None:
    """Measure on this machine which path `auto` should take, and keep the answer for its device and versions."""
    from graphs.bench import tune as run_tune

    run_tune(operator, BenchSettings.resolve(device, runs, groups=groups, tokens=tokens))


@app.command()
def audit(
    factory: Annotated[
        str, typer.Argument(metavar="package.module:factory", help="What returns (model, args) or (model, args, kwargs).")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List what keeps a step from being recorded, line by line, and what the passes do about it."""
    from graphs.audit import audit as audit_step
    from graphs.factory import load_factory

    model, args, kwargs = load_factory(factory)
    found = audit_step(model, *args, **kwargs)
    typer.echo(found.to_json() if json else str(found))


@app.command()
def lower(
    factory: Annotated[
        str, typer.Argument(metavar="package.module:factory", help="What returns (model, args) or (model, args, kwargs).")
    ],
    dialect: Annotated[str, typer.Option(metavar=f"[{'|'.join(DIALECTS)}]", help="The dialect of MLIR.")] = "linalg",
) -> None:
    """Print a step in a dialect of MLIR, the operators of this project included."""
    from graphs.factory import load_factory
    from passes import to_mlir

    model, args, kwargs = load_factory(factory)
    typer.echo(str(to_mlir(model, *args, dialect=dialect, kwargs=kwargs)))


@app.command()
def explain(
    factory: Annotated[
        str, typer.Argument(metavar="package.module:factory", help="What returns (model, args) or (model, args, kwargs).")
    ],
    fuse: Annotated[bool, typer.Option(help="Compile with Inductor as well, to count its kernels.")] = True,
) -> None:
    """Show what becomes of a step: its graph before and after each pass, fused kernels, launches, and why it is not recorded."""
    from graphs.explain import explain as explain_step
    from graphs.factory import load_factory

    model, args, kwargs = load_factory(factory)
    typer.echo(str(explain_step(model, args, kwargs, fuse=fuse)))


@app.command()
def parity(
    factory: Annotated[
        str, typer.Argument(metavar="package.module:factory", help="What returns (model, args) or (model, args, kwargs).")
    ],
    calls: Annotated[int, typer.Option(help="Calls with new data in each context, at least 8.")] = 64,
    contexts: Annotated[str, typer.Option(help="Contexts, separated by commas; default: all that make sense.")] = "",
    changes: Annotated[int, typer.Option(help="Most values of one kind that are changed between calls.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the factory and the data.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare a captured step with the step itself, call by call; exit status 1 where they differ."""
    from graphs.factory import find_factory
    from graphs.parity.lockstep import DEFAULT_CONTEXTS
    from graphs.parity.lockstep import parity as compare

    named = tuple(contexts.split(",")) if contexts else DEFAULT_CONTEXTS
    found = compare(find_factory(factory), calls, named, changes=changes, seed=seed, name=factory)
    typer.echo(found.to_json() if json else str(found))
    raise typer.Exit(0 if found.ok else 1)
