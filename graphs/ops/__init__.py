"""The grouped output projection ``wo_a``: weights, paths, operators, one module. Importing it touches no device."""

from graphs.ops.attention import operator as _attention  # noqa: F401  (defines torch.ops.graphs.one_query_attention)
from graphs.ops.decompositions import DECOMPOSITIONS
from graphs.ops.experts import operator as _experts  # noqa: F401  (defines torch.ops.graphs.expert_linear)
from graphs.ops.mhc import operator as _mhc  # noqa: F401  (defines torch.ops.graphs.mhc_*)
from graphs.ops.skinny import operator as _skinny  # noqa: F401  (defines torch.ops.graphs.skinny_linear)
from graphs.ops.wo_a import operators as _register  # noqa: F401  (defines torch.ops.graphs.wo_a_*)
from graphs.ops.wo_a.module import LEGAL_PATHS, GroupedProjection
from graphs.ops.wo_a.weights import (
    PATHS,
    GroupedWeight,
    PreparedWeight,
    fp8_dtype,
    from_safetensors,
    from_state_dict,
    load,
    path_bytes,
    prepare,
)
from passes import register_decompositions

__all__ = [
    "LEGAL_PATHS",
    "PATHS",
    "GroupedProjection",
    "GroupedWeight",
    "PreparedWeight",
    "fp8_dtype",
    "from_safetensors",
    "from_state_dict",
    "load",
    "path_bytes",
    "prepare",
]

register_decompositions(DECOMPOSITIONS)  # so that passes.to_mlir lowers these operators
