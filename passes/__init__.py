"""Rewrites of FX graphs that make a step recordable, and their lowering to MLIR. Imports torch and nothing of `graphs`."""

from passes.control_flow.stopping import Stopping, inside
from passes.core.aliasing import lasting_writes
from passes.core.source_location import Place, user_place
from passes.core.traced_step import TracedStep
from passes.core.values.host_reads import Read
from passes.errors import Unremovable
from passes.host_values.forced.forced_run import Forced, OutOfRange, refuse_on_device
from passes.host_values.forced.forcing import Forcing, with_tensor
from passes.host_values.lengths import NoBound
from passes.host_values.on_host import refuse_host_results
from passes.host_values.uses import HostValue
from passes.mlir import compile_mlir, register_decompositions, run_mlir, to_mlir
from passes.optimize.fuse_exact import fuse_exact
from passes.optimize.hoist_constants import hoist_constants
from passes.optimize.operators.expert_products import expert_products
from passes.optimize.operators.hyper_connections import HyperConnections, hyper_connections, may_be_connection
from passes.optimize.operators.norm_prologues import norm_prologues
from passes.optimize.operators.one_query_attention import one_query_attention
from passes.optimize.operators.product_epilogues import product_epilogues
from passes.optimize.operators.repeated_heads import repeated_heads
from passes.optimize.operators.skinny_linear import skinny_products
from passes.optimize.single_kernel import fewer_launches
from passes.pipeline import DEFAULT, Pass, is_early, run
from passes.projections.example_tracer import trace_with_inputs
from passes.projections.route import Routes, Target, routing
from passes.remove_host_values import remove_host_values
from passes.rewrite import rewrite
from passes.rewritten_graph import Change, ForcedGraph, RewrittenGraph
from passes.speculation.speculate import Undo, undo
from passes.trace_step import trace_step
from passes.tracing.torch_symbols import inductor_decompositions
from passes.tracing.trace import Number

__all__ = [
    "DEFAULT",
    "Change",
    "Forced",
    "ForcedGraph",
    "Forcing",
    "HostValue",
    "HyperConnections",
    "NoBound",
    "Number",
    "OutOfRange",
    "Pass",
    "Place",
    "Read",
    "RewrittenGraph",
    "Routes",
    "Stopping",
    "Target",
    "TracedStep",
    "Undo",
    "Unremovable",
    "compile_mlir",
    "expert_products",
    "fewer_launches",
    "fuse_exact",
    "hoist_constants",
    "hyper_connections",
    "inductor_decompositions",
    "inside",
    "is_early",
    "lasting_writes",
    "may_be_connection",
    "norm_prologues",
    "one_query_attention",
    "product_epilogues",
    "refuse_host_results",
    "refuse_on_device",
    "register_decompositions",
    "remove_host_values",
    "repeated_heads",
    "rewrite",
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
