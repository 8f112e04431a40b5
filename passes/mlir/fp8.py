"""FP8 in plain integer arithmetic, for back ends that have FP8 as a storage format only.

Before::

    %w = arith.extf %q : f8E4M3FN to f32

After::

    %b = arith.bitcast %q : f8E4M3FN to i8
    %w = func.call @decode_f8E4M3FN(%b) : (i8) -> f32

Both directions are exact: a decoded byte is the value of the format, an encoded number is rounded to the nearest, ties to even.
Beyond the largest value it becomes what the installed torch makes of it, which is NaN or the largest value, depending on format
and release. Formats: 4 exponent bits, 3 mantissa bits, no infinities.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from passes.mlir.bindings import bindings


class Format(NamedTuple):
    """What tells two FP8 formats apart: exponent bias, codes of the largest number and of NaN, whether there is a minus zero."""

    dtype: torch.dtype
    bias: int
    largest: int
    nan: int
    negative_zero: bool


FORMATS = {
    "f8E4M3FN": Format(torch.float8_e4m3fn, 7, 0x7E, 0x7F, True),
    "f8E4M3FNUZ": Format(torch.float8_e4m3fnuz, 8, 0x7F, 0x80, False),
}

_DECODE = """
func.func private @decode_{name}(%byte: i8) -> f32 {{
  %bits = arith.extui %byte : i8 to i32
  %c127 = arith.constant 127 : i32
  %c8 = arith.constant 8 : i32
  %c20 = arith.constant 20 : i32
  %c24 = arith.constant 24 : i32
  %c128 = arith.constant 128 : i32
  %rebias = arith.constant {rebias} : i32
  %unit = arith.constant {unit:e} : f32
  %nan = arith.constant 0x7FC00000 : f32
  %nan_code = arith.constant {nan} : i32
  %magnitude = arith.andi %bits, %c127 : i32
  %placed = arith.shli %magnitude, %c20 : i32
  %rebiased = arith.addi %placed, %rebias : i32
  %normal = arith.bitcast %rebiased : i32 to f32
  %mantissa = arith.uitofp %magnitude : i32 to f32
  %subnormal = arith.mulf %mantissa, %unit : f32
  %small = arith.cmpi ult, %magnitude, %c8 : i32
  %absolute = arith.select %small, %subnormal, %normal : f32
  %sign = arith.andi %bits, %c128 : i32
  %sign_bit = arith.shli %sign, %c24 : i32
  %pattern = arith.bitcast %absolute : f32 to i32
  %signed = arith.ori %pattern, %sign_bit : i32
  %number = arith.bitcast %signed : i32 to f32
  %is_nan = arith.cmpi eq, {compared}, %nan_code : i32
  %value = arith.select %is_nan, %nan, %number : f32
  return %value : f32
}}
"""

_ENCODE = """
func.func private @encode_{name}(%number: f32) -> i8 {{
  %pattern = arith.bitcast %number : f32 to i32
  %c0 = arith.constant 0 : i32
  %c1 = arith.constant 1 : i32
  %c20 = arith.constant 20 : i32
  %c24 = arith.constant 24 : i32
  %c128 = arith.constant 128 : i32
  %c_magnitude = arith.constant 0x7FFFFFFF : i32
  %c_half = arith.constant 0x7FFFF : i32
  %rebias = arith.constant {rebias} : i32
  %smallest_normal = arith.constant {smallest_normal} : i32
  %largest = arith.constant {largest} : i32
  %overflow_code = arith.constant {overflow} : i32
  %infinity = arith.constant 0x7F800000 : i32
  %nan_code = arith.constant {nan} : i32
  %shift = arith.constant {shift:e} : f32
  %shift_bits = arith.bitcast %shift : f32 to i32
  %magnitude = arith.andi %pattern, %c_magnitude : i32
  %sign_bit = arith.shrui %pattern, %c24 : i32
  %sign = arith.andi %sign_bit, %c128 : i32
  %last_kept = arith.shrui %magnitude, %c20 : i32
  %odd = arith.andi %last_kept, %c1 : i32
  %rebiased = arith.subi %magnitude, %rebias : i32
  %half = arith.addi %rebiased, %c_half : i32
  %rounded = arith.addi %half, %odd : i32
  %normal = arith.shrui %rounded, %c20 : i32
  %absolute = arith.bitcast %magnitude : i32 to f32
  %shifted = arith.addf %absolute, %shift : f32
  %shifted_bits = arith.bitcast %shifted : f32 to i32
  %subnormal = arith.subi %shifted_bits, %shift_bits : i32
  %small = arith.cmpi ult, %magnitude, %smallest_normal : i32
  %code = arith.select %small, %subnormal, %normal : i32
  %is_beyond = arith.cmpi ugt, %code, %largest : i32
  %limited = arith.select %is_beyond, %overflow_code, %code : i32
  %is_nan = arith.cmpi ugt, %magnitude, %infinity : i32
  %number_or_nan = arith.select %is_nan, %nan_code, %limited : i32
  %is_zero = arith.cmpi eq, %number_or_nan, %c0 : i32
  %sign_of_zero = arith.select %is_zero, {zero_sign}, %sign : i32
  %signed = arith.ori %number_or_nan, %sign_of_zero : i32
  %byte = arith.trunci %signed : i32 to i8
  return %byte : i8
}}
"""


def functions(name: str) -> str:
    """The text of ``@decode_{name}`` and ``@encode_{name}``."""
    dtype, bias, largest, nan, negative_zero = FORMATS[name]
    rebias = (127 - bias) << 23
    decode = _DECODE.format(
        name=name, rebias=rebias, unit=2.0 ** (-2 - bias), nan=nan, compared="%magnitude" if negative_zero else "%bits"
    )
    return decode + _ENCODE.format(
        name=name,
        rebias=rebias,
        smallest_normal=(128 - bias) << 23,
        largest=largest,
        overflow=int(torch.tensor(torch.inf).to(dtype).view(torch.uint8)),
        nan=nan,
        shift=2.0 ** (21 - bias),  # its last mantissa bit is worth the smallest subnormal
        zero_sign="%sign" if negative_zero else "%c0",
    )


def expand_fp8(module: Any) -> None:
    """Replace conversions from and to FP8 in ``module``, in place; FP8 is then moved around only, never computed with."""
    ir = bindings().ir
    found: list[Any] = []

    def collect(operation: Any) -> Any:
        if operation.name in ("arith.extf", "arith.truncf"):
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    used = {name for operation in found if (name := _expand(ir, operation))}
    for name in sorted(used):
        for function in ir.Module.parse(functions(name)).body.operations:
            module.body.append(function.operation.clone(ir.InsertionPoint(module.body)))


def _expand(ir: Any, operation: Any) -> str:
    """Rewrite one conversion. Returns the FP8 format it had, or nothing."""
    source, target = operation.operands[0], operation.results[0]
    byte, single = ir.IntegerType.get_signless(8), ir.F32Type.get()

    def build(name: str, value: Any, result: Any, **attributes: Any) -> Any:
        if name != "func.call" and value.type == result:
            return value
        return ir.Operation.create(name, [result], [value], attributes, ip=ir.InsertionPoint(operation)).result

    with operation.location:
        if (name := str(source.type)) in FORMATS:
            bits = build("arith.bitcast", source, byte)
            number = build("func.call", bits, single, callee=ir.FlatSymbolRefAttr.get(f"decode_{name}"))
            value = build("arith.truncf" if target.type.width < 32 else "arith.extf", number, target.type)
        elif (name := str(target.type)) in FORMATS:
            number = build("arith.extf" if source.type.width < 32 else "arith.truncf", source, single)
            bits = build("func.call", number, byte, callee=ir.FlatSymbolRefAttr.get(f"encode_{name}"))
            value = build("arith.bitcast", bits, target.type)
        else:
            return ""
    target.replace_all_uses_with(value)
    operation.erase()
    return name
