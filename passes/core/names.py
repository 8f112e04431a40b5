"""Names of what a graph holds: each prefix says who put a tensor or a module there.

Nothing else in this package knows the prefixes; whoever has to tell one kind from another asks here.
"""

from __future__ import annotations

import itertools

import torch

STATE = "state_"
"""Tensors of the step's own, which nobody passed to it."""
NUMBER = "number_"
"""Tensors that hold numbers of Python."""
PASS_CONSTANT = "_pass_constant_"
"""Tensors that removing host values made."""
HOISTED = "_hoisted_constant_"
"""Results of operators on host constants, computed once."""
LAUNCH_CONSTANT = "_launch_constant_"
"""Small tensors in the place of numbers."""
ROUTED_WEIGHT = "_routed_weight_"
"""Weights as a routed operator takes them."""
REGION = "exact_"
"""Modules of operators that are compiled together."""
_OF_MAKE_FX = "_tensor_constant"
_OF_EXPORT = "lifted_tensor_"


def fresh_name(module: torch.nn.Module, prefix: str) -> str:
    """``prefix`` with the first number that the module has no attribute for."""
    return next(name for index in itertools.count() if not hasattr(module, name := f"{prefix}{index}"))


def is_state(target: object) -> bool:
    """Whether a ``get_attr`` node of this target reads a tensor of the step's own."""
    return str(target).startswith(STATE)


def is_traced_constant(target: object) -> bool:
    """Whether `make_fx` gave a tensor its name, as it does for the step's own and for host data alike."""
    return str(target).startswith(_OF_MAKE_FX)


def is_pass_constant(target: object) -> bool:
    """Whether removing host values made a tensor, which nothing writes."""
    return str(target).startswith(PASS_CONSTANT)


def is_host_constant(target: object) -> bool:
    """Whether a tensor was made of host data: by a tracer, or by `passes.hoist_constants` of such."""
    return str(target).rpartition(".")[2].startswith((_OF_MAKE_FX, _OF_EXPORT, HOISTED))
