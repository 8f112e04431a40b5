"""Rewrites of FX graphs that make a step recordable, and their lowering to MLIR. Imports torch and nothing of `graphs`."""

from passes.aliases import lasting_writes
from passes.attention import one_query_attention
from passes.branches import Undo, undo
from passes.constants import hoist_constants
from passes.errors import Unremovable
from passes.example_tracer import trace_with_inputs
from passes.forced_run import Forced, OutOfRange, refuse_on_device
from passes.forcing import Forcing, with_tensor
from passes.fusion import fuse_exact
from passes.host_values import remove_host_values
from passes.launches import fewer_launches
from passes.mlir import compile_mlir, register_decompositions, run_mlir, to_mlir
from passes.on_host import refuse_host_results
from passes.pipeline import DEFAULT, Change, Pass, run
from passes.reads import Read
from passes.rounds import trace_step
from passes.routing import Routes, Target, routing
from passes.sites import Place, user_place
from passes.skinny import skinny_products
from passes.stopping import Stopping, inside
from passes.tracing import Number

__all__ = [
    "DEFAULT",
    "Change",
    "Forced",
    "Forcing",
    "Number",
    "OutOfRange",
    "Pass",
    "Place",
    "Read",
    "Routes",
    "Stopping",
    "Target",
    "Undo",
    "Unremovable",
    "compile_mlir",
    "fewer_launches",
    "fuse_exact",
    "hoist_constants",
    "inside",
    "lasting_writes",
    "one_query_attention",
    "refuse_host_results",
    "refuse_on_device",
    "register_decompositions",
    "remove_host_values",
    "routing",
    "run",
    "run_mlir",
    "skinny_products",
    "to_mlir",
    "trace_step",
    "trace_with_inputs",
    "undo",
    "user_place",
    "with_tensor",
]
