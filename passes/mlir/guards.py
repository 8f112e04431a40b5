"""Indices read from tensors are checked while a compiled step runs, and nothing outside a buffer is touched.

Before::

    %i = arith.index_cast %token : i64 to index
    %x = memref.load %table[%i] : memref<17xf32>

After::

    %safe = func.call @checked(%i, %c17, %c1) : (index, index, i64) -> index    # place 1
    %x = memref.load %table[%safe] : memref<17xf32>

Out of range, index 0 is used instead and the place is noted, to be asked for when the step is over. Assertions in the module,
which would end the process, are noted in the same way. Indices made of loop counters and constants need no check.
"""

from __future__ import annotations

from typing import Any

from passes.mlir.bindings import bindings

_FUNCTIONS = """
memref.global "private" @fault : memref<i64> = dense<0>
func.func private @note(%fine: i1, %place: i64) {
  %fault = memref.get_global @fault : memref<i64>
  %before = memref.load %fault[] : memref<i64>
  %after = arith.select %fine, %before, %place : i64
  memref.store %after, %fault[] : memref<i64>
  return
}
func.func private @checked(%index: index, %size: index, %place: i64) -> index {
  %zero = arith.constant 0 : index
  %fine = arith.cmpi ult, %index, %size : index
  func.call @note(%fine, %place) : (i1, i64) -> ()
  %safe = arith.select %fine, %index, %zero : index
  return %safe : index
}
func.func @take_fault(%out: memref<i64>) attributes {llvm.emit_c_interface} {
  %fault = memref.get_global @fault : memref<i64>
  %place = memref.load %fault[] : memref<i64>
  memref.store %place, %out[] : memref<i64>
  %none = arith.constant 0 : i64
  memref.store %none, %fault[] : memref<i64>
  return
}
"""


def guard(module: Any) -> list[str]:
    """Guard every access of a bufferised ``module``, in place.

    Returns the MLIR locations of what is checked. ``@take_fault`` stores one plus the position of the place that failed last,
    or 0, and forgets it.
    """
    ir = bindings().ir
    found: list[Any] = []

    def collect(operation: Any) -> Any:
        if operation.name in ("memref.load", "memref.store", "cf.assert"):
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    places: list[str] = []
    for operation in found:
        if operation.name == "cf.assert":
            places.append(str(operation.location))
            with operation.location:
                _call(ir, operation, "note", [operation.operands[0], _constant(ir, operation, len(places))])
            operation.erase()
        else:
            _guard_access(ir, operation, places)
    for function in ir.Module.parse(_FUNCTIONS).body.operations:
        module.body.append(function.operation.clone(ir.InsertionPoint(module.body)))
    return places


def _guard_access(ir: Any, operation: Any, places: list[str]) -> None:
    first = 1 if operation.name == "memref.load" else 2
    sizes = operation.operands[first - 1].type.shape
    for position, size in enumerate(sizes, start=first):
        index = operation.operands[position]
        if not _from_data(index):
            continue
        places.append(str(operation.location))
        with operation.location:
            limit = _constant(ir, operation, size, index.type)
            place = _constant(ir, operation, len(places))
            operation.operands[position] = _call(ir, operation, "checked", [index, limit, place], [index.type]).result


def _from_data(index: Any) -> bool:
    """Whether an index is computed from a value in memory: from an integer that was cast to an index."""
    operation = index.owner
    if not hasattr(operation, "operands"):  # a loop counter: its owner is a block
        return False
    return operation.name == "arith.index_cast" or any(_from_data(operand) for operand in operation.operands)


def _constant(ir: Any, operation: Any, value: int, of: Any = None) -> Any:
    of = of or ir.IntegerType.get_signless(64)
    attributes = {"value": ir.IntegerAttr.get(of, value)}
    return ir.Operation.create("arith.constant", [of], attributes=attributes, ip=ir.InsertionPoint(operation)).result


def _call(ir: Any, operation: Any, name: str, operands: list[Any], results: list[Any] | None = None) -> Any:
    attributes = {"callee": ir.FlatSymbolRefAttr.get(name)}
    return ir.Operation.create("func.call", results or [], operands, attributes, ip=ir.InsertionPoint(operation))
