"""Steps named on the command line: ``package.module:factory`` to what is called and what with."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from graphs.errors import ConfigError, FactoryError


def load_factory(spec: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Import ``package.module``, call ``factory()`` and return ``(model, args, kwargs)``.

    The factory returns ``(model, args)`` or ``(model, args, kwargs)``, so that ``model(*args, **kwargs)`` is one step.
    Modules are looked for in the current directory first, as ``python -m`` does; dots after the colon reach into classes.

    Raises:
        FactoryError: the spec is malformed, nothing of that name can be imported or called, or the result has another form.
            An exception that the module or the factory raises by itself passes through.
    """
    return checked(find_factory(spec)(), spec)


def find_factory(spec: str) -> Callable[[], Any]:
    """Import ``package.module`` and return ``factory``, which may be called more than once.

    Raises:
        FactoryError: the spec is malformed, or nothing of that name can be imported or called.
    """
    factory = _resolve(spec)
    if not callable(factory):
        raise FactoryError(spec, f"it is a {type(factory).__name__}, which cannot be called", "name a function without arguments")
    return factory


def checked(made: Any, spec: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What a factory returned as ``(model, args, kwargs)``.

    Raises:
        FactoryError: it has another form.
    """
    remedy = "return (model, args) or (model, args, kwargs), with args a tuple or list and kwargs a dict"
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        size = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise FactoryError(spec, f"it returned a {type(made).__name__}{size}", remedy)
    model, args, kwargs = (*made, {})[:3]
    if not callable(model):
        raise FactoryError(spec, f"the model it returned is a {type(model).__name__}, which cannot be called", remedy)
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise FactoryError(spec, f"it returned args of type {type(args).__name__} and kwargs of {type(kwargs).__name__}", remedy)
    return model, tuple(args), kwargs


def as_batch_dims(name: str, text: str) -> dict[str, int]:
    """Batch dimensions of arguments from ``argument=dimension`` pairs separated by commas; none for an empty text.

    Raises:
        ConfigError: ``text`` is something else; ``name`` is the option that it was given to.
    """
    pairs = [pair.partition("=") for pair in text.split(",")] if text.strip() else []
    if not all(argument.strip() and sign and dim.strip().isdecimal() for argument, sign, dim in pairs):
        raise ConfigError(name, text, "arguments with their batch dimension, for example input_ids=0,positions=1")
    return {argument.strip(): int(dim) for argument, _, dim in pairs}


def _well_formed(module_name: str, path: str) -> str:
    """What to write instead of a spec that is malformed; for the path of a file, the module that it holds."""
    file = PurePath(module_name)
    if file.suffix != ".py":
        return "write, for example, mymodels.llama:decode_step"
    factory = path or "factory"
    inside = [part for part in file.with_suffix("").parts if part not in (".", file.anchor)]
    if not file.is_absolute() and all(part.isidentifier() for part in inside):
        return f"{module_name!r} names a file; write {'.'.join(inside)}:{factory}"
    return f"{module_name!r} names a file; write {file.stem}:{factory}, and run in {str(file.parent)!r}"


def _resolve(spec: str) -> object:
    module_name, colon, path = spec.partition(":")
    formed = colon and path and module_name and all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")])
    if not formed or (module_name.endswith(".py") and os.path.isfile(module_name)):
        raise FactoryError(spec, "it is not of the form package.module:factory", _well_formed(module_name, path))
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module_name and not module_name.startswith(missing + "."):
            raise  # the module is there; what it imports is not
        remedy = f"run from the directory that holds it (now {here}), or install it"
        remedy = _well_formed(module_name, path) if module_name.endswith(".py") else remedy
        raise FactoryError(spec, f"there is no module {missing!r}", remedy) from error
    for name in path.split("."):
        if not hasattr(found, name):
            public = sorted(key for key in dir(found) if not key.startswith("_") and callable(getattr(found, key)))
            raise FactoryError(spec, f"{name!r} is not in it", f"name one of: {', '.join(public[:12])}")
        found = getattr(found, name)
    return found
