"""What ``compiler_options=`` says: which passes make a compiled step faster, and settings of Inductor.

A recording is compiled once and replayed thousands of times with static shapes, so rewrites are on that Inductor would have no
use for in general, where they were measured to pay: see `graphs.ops.wo_a.tiles.skinny` and `LONGEST`. Inductor's own
search (``max_autotune``) is not: on an H100 it took 56 s for two layers of a Llama and made their step slower, 294 us for 262.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import passes
from graphs.errors import ConfigError
from graphs.ops.attention import operator as attention
from graphs.ops.experts import operator as _experts  # noqa: F401  (defines torch.ops.graphs.expert_linear)
from graphs.ops.mhc import operator as mhc
from graphs.ops.mhc.family import FAMILY
from graphs.ops.skinny import operator as skinny
from graphs.ops.wo_a import tiles

REWRITES = (
    *("skinny_products", "one_query_attention", "expert_products", "repeated_heads"),
    *("norm_prologues", "product_epilogues", "hyper_connections"),
)
LONGEST = 4096  # keys: 32 heads of 128 on 8 of keys, batch 4, on an H100: 30 us for 60 at 1024 keys, 112 for 215 at 4096
_RECORDED_HERE = ("triton.cudagraphs", "triton.cudagraph_trees")


@dataclass(frozen=True)
class CompilerOptions:
    """One value of ``compiler_options=``.

    Attributes:
        skinny_products: run products of up to 16 rows in one launch for each activation; None: where it was measured to pay.
        one_query_attention: run attention of one query by an operator that reads keys and values once for all heads that share
            them, and no part of a cache that the mask hides; where its kernel was not measured, by sums that Inductor fuses.
            None: where it was measured to pay.
        expert_products: read the weights of chosen experts where they are; None: where it was measured to pay.
        repeated_heads: read keys and values once that several query heads share; None: where it was measured to pay.
        norm_prologues: norm the rows of such products as they are read, where nothing else reads the normed rows; None: where it
            was measured to pay, which is nowhere yet.
        product_epilogues: apply an activation, multiply by a gate or add a residual where such products are written, if nothing
            else reads them; None: where it was measured to pay, which is nowhere yet.
        hyper_connections: run hyper-connections of up to 64 rows as one operator each, in steps that are recorded uncompiled as
            well; None: where its kernels were measured to pay, which is nowhere yet.
        inductor: settings of Inductor, as ``torch.compile(options=...)`` takes them.
    """

    skinny_products: bool | None = None
    one_query_attention: bool | None = None
    expert_products: bool | None = None
    repeated_heads: bool | None = None
    norm_prologues: bool | None = None
    product_epilogues: bool | None = None
    hyper_connections: bool | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def resolve(cls, given: Mapping[str, Any] | None) -> CompilerOptions:
        """Validate what a user gave.

        Raises:
            ConfigError: no mapping, an unknown name, or a value that is not legal.
        """
        if given is None or isinstance(given, cls):
            return given or cls()
        if not isinstance(given, Mapping):
            raise ConfigError("compiler_options", given, "a mapping from names of options to values")
        given = {str(name).replace("-", "_"): value for name, value in given.items()}
        own = {name: given[name] for name in REWRITES if name in given}
        for name, value in own.items():
            if value is not None and not isinstance(value, bool):
                raise ConfigError(name, value, "True, False, or None for where it was measured to pay")
        return cls(**own, inductor=_settings({name: value for name, value in given.items() if name not in REWRITES}))

    def pipeline(self, device: torch.device) -> tuple[passes.Pass, ...]:
        """The passes that run on the ATen graph of a step before Inductor sees it."""
        pays = skinny.pays_on(device)
        made: list[passes.Pass] = [*self.operators(device)]
        if pays if self.repeated_heads is None else self.repeated_heads:
            made.append(passes.repeated_heads)
        if pays if self.expert_products is None else self.expert_products:
            made.append(functools.partial(passes.expert_products, operator=torch.ops.graphs.expert_linear.default))
        if pays if self.one_query_attention is None else self.one_query_attention:
            grouped = self.one_query_attention is None
            operator = torch.ops.graphs.one_query_attention.default if pays else None
            made.append(
                functools.partial(
                    passes.one_query_attention, longest=LONGEST, grouped=grouped, operator=operator, fits=attention.fits
                )
            )
        if pays if self.skinny_products is None else self.skinny_products:
            made += self._products()
        return tuple(made)

    def _products(self) -> list[passes.Pass]:
        """Products of few rows, with what is around them."""
        operator = torch.ops.graphs.skinny_linear.default
        made: list[passes.Pass] = [functools.partial(passes.skinny_products, operator=operator, fits=tiles.skinny)]
        if self.norm_prologues:
            made.append(functools.partial(passes.norm_prologues, operator=operator))
        if self.product_epilogues:
            table = passes.inductor_decompositions
            made.append(functools.partial(passes.product_epilogues, operator=operator, decompositions=table))
        return made

    def operators(self, device: torch.device) -> tuple[passes.Pass, ...]:
        """Of those, the passes that put an operator of this project in the place of many, whatever runs the others."""
        wanted = mhc.pays_on(device) if self.hyper_connections is None else self.hyper_connections
        return (functools.partial(passes.hyper_connections, family=FAMILY),) if wanted else ()


def _settings(given: dict[Any, Any]) -> dict[str, Any]:
    """Settings of Inductor by their full names."""
    if not given:
        return {}
    from torch._inductor import config

    known = config.get_config_copy()  # type: ignore[attr-defined]  # but for names that stand for another one
    for name, value in given.items():
        if name in _RECORDED_HERE:
            raise ConfigError(name, value, "left out: the step is recorded here, not by Inductor")
        if name not in known and (name.startswith("_") or type(getattr(config, name, None)) not in (bool, int, float, str)):
            alike = difflib.get_close_matches(name, known, 3)
            meant = ", ".join([*map(repr, REWRITES), *map(repr, alike)])
            raise ConfigError("option of compiler_options", name, f"one of {meant}, or another setting of torch._inductor.config")
    return given
