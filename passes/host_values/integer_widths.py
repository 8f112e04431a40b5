"""How large whole numbers can become: Python's have no end, those of a graph have 64 bits.

Products and powers of numbers that the host reads are bounded by interval arithmetic. What a number is taken to be by itself,
unless more is known of it, is `USUAL`: a length, a token, a position, a seed. A graph whose numbers stay within 64 bits then
assumes nothing; one of a hash or a large power assumes that its numbers are small enough, and eager has the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy
from torch.utils._sympy import functions as sympy_functions

USUAL = 2**40
"""No number that a step reads is taken to be larger."""
_LARGEST = 2**62
_LIMITS = (USUAL, 2**31, 2**24, 2**20, 2**15, 2**12, 2**10, 2**8, 100, 61, 40, 20, 10, 5, 2, 1)
_HIGHEST = 4096  # of an exponent: a power above it is too large whatever its base
_REMAINDERS = (sympy_functions.Mod, sympy_functions.PythonMod, sympy.Mod)
_POWERS = (sympy.Pow, sympy_functions.PowByNatural)


def limit_of(expression: sympy.Basic, bounds: Mapping[sympy.Symbol, int | None]) -> int | None:
    """How large the symbols of ``expression`` may be so that it stays within 64 bits; None where they need no limit.

    Args:
        bounds: the largest values of its symbols that are zero or more, as far as they are known.

    Raises:
        OverflowError: not even for numbers of zero and one.
    """
    for limit in _LIMITS:
        of = {symbol: limit if bound is None else min(bound, limit) for symbol, bound in bounds.items()}
        if _largest(expression, of) <= _LARGEST:
            return limit if limit != USUAL else None
    raise OverflowError(f"{expression} may leave 64 bits")


def _largest(expression: sympy.Basic, of: dict[sympy.Basic, int]) -> int:
    """The largest absolute value, one beyond `_LARGEST` where a part is."""
    if expression in of:
        return of[expression]
    if expression.is_number:
        return math.ceil(abs(expression)) if expression.is_finite else 0  # a limit that is never met
    parts = [_largest(part, of) for part in expression.args]
    if max(parts, default=0) > _LARGEST:
        return _LARGEST + 1
    if isinstance(expression, sympy.Mul):
        return min(math.prod(parts), _LARGEST + 1)
    if isinstance(expression, sympy.Add):
        return sum(parts)
    if isinstance(expression, _POWERS):
        base, exponent = parts
        return int(min(max(base, 1) ** min(exponent, _HIGHEST), _LARGEST + 1))
    if isinstance(expression, _REMAINDERS):
        return parts[1]
    return max(parts, default=1)
