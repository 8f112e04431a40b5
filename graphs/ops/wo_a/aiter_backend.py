"""The grouped output projection through AMD's ``amd-aiter`` package: a peer to compare with, and a back end on ROCm.

Importing this module defines ``graphs::wo_a_aiter_bmm`` and ``graphs::wo_a_aiter_gloop``, with the operands of ``wo_a_bmm`` and
``wo_a_gloop``; the package itself is looked for at the first call, or when a
``GroupedProjection(backend="aiter")`` is built. On ROCm it is imported as usual and picks its own tuned tiles.
Elsewhere its ``__init__`` cannot run (it asks for a HIP toolchain), but the operators below ``aiter/ops/triton`` are plain
Triton: they are imported alone (:func:`bare_package`) and get a tile from :func:`default_config`, as the tuned ones are AMD's.

Odd values are the package's business: its ``bmm`` kernel clamps, so a NaN in ``o`` may come out finite.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphs.errors import MissingDependency, WeightError
from graphs.ops.wo_a import operators
from graphs.ops.wo_a.reference import BLOCK
from passes.forked_process import put_back_by

AMD_ONLY = frozenset({"waves_per_eu", "matrix_instr_nonkdim", "kpack"})  # launch options that only Triton's AMD compiler knows
INSTALL = "pip install amd-aiter" if torch.version.hip else "pip install --no-deps amd-aiter"
TRITON = Path("ops", "triton")  # where the package keeps its Triton operators
Tiling = tuple[int, int, int, int]  # rows, columns, warps, stages
TILINGS: dict[str, tuple[tuple[int, Tiling], ...]] = {  # up to this many tokens: the best of a sweep on an H200 at G = 2
    "bmm": ((1, (16, 32, 4, 4)), (16, (16, 16, 4, 4)), (64, (16, 64, 4, 4)), (512, (64, 64, 4, 4)), (2**31, (128, 128, 8, 3))),
    "gloop": ((4, (16, 32, 4, 6)), (64, (64, 16, 4, 6)), (512, (64, 32, 4, 4)), (2**31, (64, 64, 4, 4))),
}


class Function(NamedTuple):
    """A function of the package, in a module of its own name: the folders it has lived in, newest first, and what it takes."""

    name: str
    folders: tuple[str, str]
    parameters: str


_BATCHED = "batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant"
FUNCTIONS = {
    "bmm": Function(_BATCHED, ("gemm/batched", ""), "X WQ w_scale group_size dtype YQ transpose_bm transpose_bm_in config"),
    "gloop": Function("gemm_a8w8_blockscale", ("gemm/basic", ""), "x w x_scale w_scale dtype y config"),
}


class UnusableAiter(MissingDependency):
    """What is importable as ``aiter`` is another package, or an ``amd-aiter`` without the functions needed."""

    def __init__(self, detail: str) -> None:
        ImportError.__init__(self, detail)
        self.package = "amd-aiter"


class LaunchOptions(dict[str, Any]):
    """Keyword arguments of a launch off AMD; ignores :data:`AMD_ONLY` whoever sets them (0.1.7 sets ``kpack`` by itself)."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__((name, value) for name, value in options.items() if name not in AMD_ONLY)

    def __setitem__(self, name: str, value: object) -> None:
        if name not in AMD_ONLY:
            super().__setitem__(name, value)


def default_config(path: str, m: int, g: int, n: int, k: int) -> dict[str, Any]:
    """Launch options off AMD for ``m`` tokens of ``g`` groups: narrow columns while reading the weight is what takes the time."""
    tile_m, tile_n, warps, stages = next(tiling for tokens, tiling in TILINGS[path] if m <= tokens)
    if path == "bmm" and m <= 16 and g * n > 4096:  # one launch for all groups: there are blocks enough
        tile_n = 64
    tile = {"BLOCK_SIZE_M": tile_m, "BLOCK_SIZE_N": tile_n, "BLOCK_SIZE_K": BLOCK, "GROUP_SIZE_M": 1, "cache_modifier": ""}
    return tile | {"num_warps": warps, "num_stages": min(stages, max(k // BLOCK, 1)), "enable_fp_fusion": True}


def version() -> str | None:
    """The release of ``amd-aiter`` installed; ``None`` where there is none, or one without metadata."""
    try:
        return importlib.metadata.version("amd-aiter")
    except importlib.metadata.PackageNotFoundError:
        return None


def available() -> str | None:
    """``None`` if both functions can be called on this machine, otherwise the reason why not."""
    try:
        for path in FUNCTIONS:
            function(path)
    except MissingDependency as e:
        return str(e)
    return None


def package_root() -> Path:
    """The folder of AMD's package; runs none of it. Raises MissingDependency if absent, UnusableAiter if it is another one."""
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        raise MissingDependency("amd-aiter", "the aiter back end of the grouped projection", INSTALL)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    root = next((folder for folder in folders if (folder / TRITON).is_dir()), None)
    if root is None:
        raise UnusableAiter(
            f"the package imported as 'aiter' ({spec.origin or folders}) is not AMD's: it has no {TRITON}. PyPI's package of "
            f"that name is an unrelated library of asynchronous iterators. Replace it with: pip uninstall aiter; {INSTALL}"
        )
    if (root / "join_aiters.py").exists():
        both = f"{root} holds amd-aiter and PyPI's unrelated package 'aiter', which overwrite each other"
        raise UnusableAiter(f"{both}. Start again with: pip uninstall aiter amd-aiter; {INSTALL}")
    return root


@functools.cache
def function(path: str) -> Callable[..., Tensor]:
    """The package's function for ``bmm`` or ``gloop``. Raises MissingDependency, or UnusableAiter naming the version found."""
    root, wanted = package_root(), FUNCTIONS[path]
    folder = next((f for f in wanted.folders if (root / TRITON / f / f"{wanted.name}.py").is_file()), None)
    if folder is None:
        raise _lacks(wanted, root, "is not where a known release has it")
    module = ".".join(("aiter", *TRITON.parts, *Path(folder).parts, wanted.name))
    try:
        with nullcontext() if torch.version.hip else bare_package(root):
            found = getattr(importlib.import_module(module), wanted.name, None)
    except Exception as e:  # the package's own code runs here, and it raises what it likes
        raise UnusableAiter(f"amd-aiter {version() or '(unknown version)'} cannot be imported: {type(e).__name__}: {e}") from e
    if found is None:
        raise _lacks(wanted, root, f"is not in {module}")
    absent = set(wanted.parameters.split()) - inspect.signature(found).parameters.keys()
    if absent:
        raise _lacks(wanted, root, f"does not take {', '.join(sorted(absent))}")
    return found


def _lacks(wanted: Function, root: Path, what: str) -> UnusableAiter:
    """The error for a function that is missing, moved or changed. Names every file of the package that could be its new place."""
    newer, older = (TRITON / folder / f"{wanted.name}.py" for folder in wanted.folders)
    files = [file.relative_to(root) for file in (root / TRITON).rglob(older.name) if "_triton_kernels" not in file.parts]
    moved = ", ".join(sorted(str(file) for file in files if file not in (newer, older)))
    found = f"amd-aiter {version() or '(unknown version)'}" + (f" (there is a {moved})" if moved else "")
    return UnusableAiter(
        f"{wanted.name} {what} in {found}. Release 0.1.7 has it in aiter/{older}, later ones in aiter/{newer}. Get one of them "
        f"with: {INSTALL} --upgrade"
    )


@contextmanager
def bare_package(root: Path) -> Iterator[None]:
    """Make submodules of ``aiter.ops.triton`` importable without running any ``__init__`` of the packages above them.

    Inside, ``aiter``, ``aiter.ops`` and ``aiter.ops.triton`` are empty modules that know their folder. Afterwards ``sys.modules``
    holds exactly the ``aiter`` modules that it held before, so for everybody else ``import aiter`` does what it always did; what
    was imported lives on through the references the caller took.
    """
    before = _modules()

    def put_back() -> None:
        _take_modules_out()
        sys.modules.update(before)

    with put_back_by(put_back):
        _take_modules_out()
        for name, folder in (("aiter", root), ("aiter.ops", root / "ops"), ("aiter.ops.triton", root / TRITON)):
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            if name != "aiter":
                setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
        yield


def _modules() -> dict[str, ModuleType]:
    return {name: module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "aiter"}


def _take_modules_out() -> None:
    for name in _modules():
        del sys.modules[name]


def bmm(o: Tensor, weight: Tensor, scale: Tensor, *, config: Mapping[str, Any] | None = None) -> Tensor:
    """``o [M, G, K]`` bfloat16, ``weight [G, N, K]`` FP8, ``scale [1]`` float32 give ``[M, G, N]`` bfloat16. One launch.

    ``config`` holds launch options in the package's names. Off AMD they replace single entries of :func:`default_config`, on ROCm
    the tuned set as a whole. Raises WeightError for operands that do not fit, MissingDependency without the package.
    """
    return torch.ops.graphs.wo_a_aiter_bmm(o, weight, scale, json.dumps(dict(config)) if config else "")


def gloop(o: Tensor, weight: Tensor, scale: Tensor, *, config: Mapping[str, Any] | None = None) -> Tensor:
    """As :func:`bmm` with ``scale [G, N/128, K/128]``: one launch that quantises ``o``, then one GEMM per group.

    ``config`` may set ``NUM_KSPLIT``, which adds a float32 buffer and a second launch to every GEMM.
    """
    return torch.ops.graphs.wo_a_aiter_gloop(o, weight, scale, json.dumps(dict(config)) if config else "")


def _options(path: str, m: int, weight: Tensor, config: str, **extra: int) -> dict[str, Any] | None:
    """Launch options, new for every call because the package writes into them. ``None`` lets it choose (ROCm)."""
    given: dict[str, Any] = json.loads(config) if config else {}
    if torch.version.hip:
        return given or None
    return LaunchOptions({**default_config(path, m, *weight.shape), **extra, **given})


def _run(path: str, o: Tensor, weight: Tensor, scale: Tensor, config: str = "") -> Tensor:
    y = _fake(path, o, weight, scale)
    if o.is_cuda:
        operators.arch_of(o.device.index, path, weight.dtype)
    elif not operators.kernels().INTERPRETED.value:
        raise WeightError(f"wo_a_aiter_{path}: o is on {o.device}; it must be on a GPU (or set TRITON_INTERPRET=1 at the start)")
    if o.shape[0]:
        with torch._C._AutoDispatchBelowAutograd():
            o = o if min(o.stride()) > 0 else o.contiguous()  # the kernels promise the compiler positive strides
            (_launch_bmm if path == "bmm" else _launch_gloop)(o, weight, scale, y, config)
    return y


def _launch_bmm(o: Tensor, weight: Tensor, scale: Tensor, y: Tensor, config: str) -> None:
    options = _options("bmm", o.shape[0], weight, config)
    function("bmm")(o, weight, scale, BLOCK, dtype=o.dtype, YQ=y, transpose_bm=True, transpose_bm_in=True, config=options)


def _launch_gloop(o: Tensor, weight: Tensor, scale: Tensor, y: Tensor, config: str) -> None:
    q, q_scale = operators.kernels().quantise(o, weight.dtype)
    for g in range(weight.shape[0]):
        options = _options("gloop", o.shape[0], weight, config, NUM_KSPLIT=1)
        function("gloop")(q[g], weight[g], q_scale[g], scale[g], dtype=o.dtype, y=y[:, g], config=options)


def _fake(path: str, o: Tensor, weight: Tensor, scale: Tensor, config: str = "") -> Tensor:
    operators.check(path, o, weight, scale)
    return o.new_empty((o.shape[0], o.shape[1], weight.shape[1]))


library = torch.library.Library("graphs", "FRAGMENT")
for _path in FUNCTIONS:
    _name = f"wo_a_aiter_{_path}"
    _schema = f'{_name}(Tensor o, Tensor weight, Tensor scale, str config="") -> Tensor'
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        library.impl(_name, functools.partial(_run, _path), _key)
    torch.library.register_fake(f"graphs::{_name}", functools.partial(_fake, _path), lib=library)
