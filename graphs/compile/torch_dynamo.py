"""The private interfaces of Dynamo, AOTAutograd and Inductor that compiling stands on: the one file that names them.

They are imported when they are first used, since Inductor takes seconds. A release of torch that renames one breaks this file
alone; a test says which.
"""

from __future__ import annotations

import importlib
from typing import Any

INTERFACES = {
    "aot_autograd": "torch._dynamo.backends.common",
    "compile_fx": "torch._inductor.compile_fx",
    "compute_overlapping_tensors": "torch._C._dynamo.guards",
    "config": "torch._inductor",
    "ConstantSource": "torch._dynamo.source",
    "CustomGraphPass": "torch._inductor.custom_graph_pass",
    "make_boxed_func": "torch._functorch._aot_autograd.utils",
    "metrics": "torch._inductor",
    "TorchDynamoException": "torch._dynamo.exc",
    "unset_fake_temporarily": "torch._subclasses.fake_tensor",
}
"""The module of each interface."""
DYNAMO_SETTINGS = ("recompile_limit", "accumulated_recompile_limit")
"""Settings of ``torch._dynamo.config`` that are patched."""


def private(name: str) -> Any:
    """One of `INTERFACES`.

    Raises:
        AttributeError, ImportError: this torch does not have it.
    """
    module = importlib.import_module(INTERFACES[name])
    return getattr(module, name, None) or importlib.import_module(f"{INTERFACES[name]}.{name}")


def without_recompile_limit() -> Any:
    """A context in which any number of variants of one code is compiled."""
    return importlib.import_module("torch._dynamo").config.patch(dict.fromkeys(DYNAMO_SETTINGS, 1 << 20))
