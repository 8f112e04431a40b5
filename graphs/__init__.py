"""Record decode steps once and replay them: CUDA graphs, HIP graphs, and an operator tape on the CPU."""

from graphs._version import __version__
from graphs.auditing.audit import Audit, Finding, audit
from graphs.contract.padding import Padding, sentinel
from graphs.custom_ops.capture_check import capture_check
from graphs.custom_ops.register import register_op
from graphs.dispatch.captured_module import CapturedModule, capture
from graphs.dynamo.backend import backend_report
from graphs.eager_mode import eager
from graphs.errors import GraphsError, Refusal
from graphs.ops import GroupedProjection
from graphs.ops.decompositions import DECOMPOSITIONS
from graphs.ops.route import route
from graphs.parity import ParityReport, parity
from graphs.report import BackendReport, CaptureReport
from passes import register_decompositions

__all__ = [
    "Audit",
    "BackendReport",
    "CaptureReport",
    "CapturedModule",
    "Finding",
    "GraphsError",
    "GroupedProjection",
    "Padding",
    "ParityReport",
    "Refusal",
    "__version__",
    "audit",
    "backend_report",
    "capture",
    "capture_check",
    "eager",
    "parity",
    "register_op",
    "route",
    "sentinel",
]
register_decompositions(DECOMPOSITIONS)  # so that passes.to_mlir lowers the operators of graphs
