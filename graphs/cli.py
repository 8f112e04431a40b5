"""The command line: arguments to functions, no logic. What measures and records is imported once the options are legal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

from graphs import __version__
from graphs.bench.choices import (
    FORMS,
    MIN_RUNS,
    MODELS,
    PATHS,
    STEP_FORMS,
    Device,
    Experiment,
    Operator,
    as_forms,
    as_models,
    as_paths,
    as_sizes,
)
from graphs.environment import as_bytes
from graphs.errors import ConfigError, MissingDependency
from graphs.factory import as_batch_dims

try:
    import typer
except ImportError as error:
    raise MissingDependency("typer", "the command line", "pip install stepgraphs") from error

app = typer.Typer(
    name="graphs",
    help="Record decode steps once and replay them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Dialect(str, Enum):
    """Of MLIR; `passes.mlir.DIALECTS` names the same ones."""

    TORCH = "torch"
    LINALG = "linalg"
    STABLEHLO = "stablehlo"
    TOSA = "tosa"


def _checked(check: Callable[[str, str], object]) -> Callable[[typer.CallbackParam, str], str]:
    """A callback that holds the text of an option against ``check(name, text)`` and hands it on."""

    def callback(option: typer.CallbackParam, text: str) -> str:
        try:
            check(option.opts[0], text)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from error
        return text

    return callback


def _check_bytes(name: str, text: str) -> None:
    if text:
        as_bytes(name, text)


def _check_contexts(_: str, text: str) -> None:
    if text:
        from graphs.parity.twins import context_parts

        for context in text.split(","):
            context_parts(context)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"stepgraphs {__version__}")
        raise typer.Exit


def _require_forms(experiment: Experiment, text: str) -> None:
    """Which forms there are depends on what is measured."""
    try:
        as_forms("--forms", text, experiment.value)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint="'--forms'") from error


def _require_writable(directory: Path) -> None:
    """Make ``directory`` and a file in it, since permissions alone do not tell whether that works."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = f"{directory} is no directory that can be written to: {error.strerror}"
        raise typer.BadParameter(reason, param_hint="'--out'") from error


_Factory = Annotated[
    str, typer.Argument(metavar="package.module:factory", help="What returns (model, args) or (model, args, kwargs).")
]
_Runs = Annotated[int, typer.Option(min=MIN_RUNS, help="Measured repetitions of everything.")]
_Device = Annotated[Device, typer.Option(help="Where to run.")]
_Groups = Annotated[str, typer.Option(callback=_checked(as_sizes), help="wo_a: numbers of groups, separated by commas.")]
_Tokens = Annotated[str, typer.Option(callback=_checked(as_sizes), help="wo_a: numbers of tokens, separated by commas.")]
_FORMS_HELP = f"generate: some of {', '.join(FORMS)}; deepseek_v4: some of {', '.join(STEP_FORMS)}."
_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback()
def graphs_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Record decode steps once and replay them."""


@app.command()
def bench(
    experiment: Annotated[Experiment, typer.Argument(help="What to measure.")] = Experiment.ALL,
    out: Annotated[Path, typer.Option(help="Directory for the JSON file and the figure.")] = Path("results"),
    runs: _Runs = MIN_RUNS,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer batch sizes and shorter sequences.")] = False,
    device: _Device = Device.AUTO,
    search: Annotated[bool, typer.Option(help="compile: measure mode='max-autotune' too, which compiles for minutes.")] = True,
    groups: _Groups = "",
    tokens: _Tokens = "",
    paths: Annotated[str, typer.Option(callback=_checked(as_paths), help=f"wo_a: some of {', '.join(PATHS)}.")] = "",
    model: Annotated[str, typer.Option(callback=_checked(as_models), help=f"generate: some of {', '.join(MODELS)}.")] = "",
    forms: Annotated[str, typer.Option(callback=_checked(as_forms), help=_FORMS_HELP)] = "",
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="Measure nothing; compare two results.")
    ] = None,
) -> None:
    """Measure decode steps, projections, generate() and the overhead of a captured call, eager against graph."""
    if compare is not None:
        from graphs.bench.harness.compare import print_comparison

        return print_comparison(*compare)
    _require_forms(experiment, forms)
    _require_writable(out)
    from graphs.bench import BenchSettings, run_bench

    lists = {"groups": groups, "tokens": tokens, "paths": paths, "models": model, "forms": forms}
    settings = BenchSettings.resolve(device.value, runs, quick, search=search, **lists)
    run_bench(experiment.value, settings, out)
    return None


@app.command()
def tune(
    operator: Annotated[Operator, typer.Argument(help="What to measure again.")],
    runs: _Runs = MIN_RUNS,
    device: _Device = Device.AUTO,
    groups: _Groups = "",
    tokens: _Tokens = "",
) -> None:
    """Measure on this machine which path `auto` should take, and keep the answer for its device and versions."""
    from graphs.bench import BenchSettings
    from graphs.bench import tune as run_tune

    run_tune(operator.value, BenchSettings.resolve(device.value, runs, groups=groups, tokens=tokens))


@app.command()
def audit(factory: _Factory, json: _Json = False) -> None:
    """List what keeps a step from being recorded, line by line, and what the passes do about it."""
    from graphs.factory import load_factory

    model, args, kwargs = load_factory(factory)
    from graphs.auditing.audit import audit as audit_step

    found = audit_step(model, *args, **kwargs)
    typer.echo(found.to_json() if json else str(found))


@app.command()
def lower(factory: _Factory, dialect: Annotated[Dialect, typer.Option(help="The dialect of MLIR.")] = Dialect.LINALG) -> None:
    """Print a step in a dialect of MLIR, the operators of this project included."""
    from graphs.factory import load_factory

    model, args, kwargs = load_factory(factory)
    from passes import to_mlir

    typer.echo(str(to_mlir(model, *args, dialect=dialect.value, kwargs=kwargs)))


@app.command()
def explain(
    factory: _Factory,
    fuse: Annotated[bool, typer.Option(help="Compile with Inductor as well, to count its kernels.")] = True,
    json: _Json = False,
) -> None:
    """Show what becomes of a step: whether it is recorded and why not, its graph before and after each pass, and launches."""
    from graphs.factory import load_factory

    model, args, kwargs = load_factory(factory)
    from graphs.explain import explain as explain_step

    found = explain_step(model, args, kwargs, fuse=fuse)
    typer.echo(found.to_json() if json else str(found))


@app.command()
def parity(
    factory: _Factory,
    calls: Annotated[int, typer.Option(min=8, help="Calls with new data in each context.")] = 64,
    contexts: Annotated[
        str, typer.Option(callback=_checked(_check_contexts), help="Contexts, separated by commas; default: all that make sense.")
    ] = "",
    changes: Annotated[int, typer.Option(min=0, help="Most values of one kind that are changed between calls.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the factory and the data.")] = 0,
    json: _Json = False,
) -> None:
    """Compare a captured step with the step itself, call by call; exit status 1 where they differ."""
    from graphs.factory import find_factory

    found_factory = find_factory(factory)
    from graphs.parity.lockstep import DEFAULT_CONTEXTS
    from graphs.parity.lockstep import parity as compare

    named = tuple(contexts.split(",")) if contexts else DEFAULT_CONTEXTS
    found = compare(found_factory, calls, named, changes=changes, seed=seed, name=factory)
    typer.echo(found.to_json() if json else str(found))
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def record(
    factory: _Factory,
    sizes: Annotated[
        str, typer.Option(callback=_checked(as_sizes), help="Batch sizes, separated by commas; default: the buckets of the step.")
    ] = "",
    batch_dims: Annotated[
        str,
        typer.Option(
            callback=_checked(as_batch_dims), metavar="NAME=DIM,...", help="The batch dimension of each argument that has rows."
        ),
    ] = "",
    memory_budget: Annotated[
        str, typer.Option(callback=_checked(_check_bytes), help="What recordings may take, for example 2GiB.")
    ] = "",
    progress: Annotated[bool, typer.Option(help="Show a bar on a terminal.")] = True,
    json: _Json = False,
) -> None:
    """Record a step at batch sizes: seconds, memory and time of a replay of each; exit status 1 where one does not fit."""
    from graphs.factory import load_factory

    model, args, kwargs = load_factory(factory)
    from graphs.dispatch.ahead.made_by_factory import record_made

    dims = as_batch_dims("--batch-dims", batch_dims)
    found = record_made(model, (args, kwargs), as_sizes("--sizes", sizes), dims, memory_budget, progress=progress)
    typer.echo(found.to_json() if json else str(found))
    raise typer.Exit(0 if all(size.recorded for size in found.sizes) else 1)
