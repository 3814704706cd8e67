"""Which elements a program owns: one chunk of 4096 elements of one row."""

import triton.language as tl

from ... import ops
from .arithmetic import helper
from .memory import VECTOR_BYTES

CHUNK = tl.constexpr(ops.CHUNK)
TABLE_COLUMNS = tl.constexpr(5)  # address, gradient's address, numel, offset, first chunk


@helper
def chunk_of_program(weights, grads, numel, offset, table, rows_of_chunks, T: tl.constexpr):
    """The chunk of this program: (row, address of its part of the parameter, of the gradient, index
    of its part of the flat buffers, number of elements).

    Without a table there is one row, at `weights` and `grads`; NOTE [one row needs no table] in
    tables.py.
    """
    SIZE: tl.constexpr = T.primitive_bitwidth // 8
    chunk = tl.program_id(0).to(tl.int64)
    if table is None:
        row = tl.full((), 0, tl.int64)
        weight = weights.to(tl.int64)
        gradient = weight
        if grads is not None:
            gradient = grads.to(tl.int64)
        length = numel.to(tl.int64)
        at = offset.to(tl.int64)
        begin = chunk * CHUNK
    else:
        row = tl.load(rows_of_chunks + chunk).to(tl.int64)
        entry = table + row * TABLE_COLUMNS
        weight = tl.load(entry)
        gradient = tl.load(entry + 1)
        length = tl.load(entry + 2)
        at = tl.load(entry + 3)
        begin = (chunk - tl.load(entry + 4)) * CHUNK
    count = tl.minimum(length - begin, CHUNK).to(tl.int32)
    return row, weight + begin * SIZE, gradient + begin * SIZE, at + begin, count


@helper
def address_in(buffer, at, otherwise):
    """The address of element `at` of a flat buffer; `otherwise` where there is no buffer."""
    if buffer is None:
        return otherwise
    else:
        return buffer.to(tl.int64) + at * (buffer.dtype.element_ty.primitive_bitwidth // 8)


@helper
def is_whole(addresses, count):
    """`addresses`: all that the pass accesses, or-ed."""
    return (addresses % VECTOR_BYTES == 0) & (count == CHUNK)
