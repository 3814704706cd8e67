"""Which instructions a GPU would really issue: a call of a kernel, executed from its disassembly.

No GPU needed. `program` reads nvdisasm's text, `layout` the structs of csrc/cuda, `machine` holds what a block of
threads holds, the semantics of instructions are in `integers`, `floats`, `doubles` and `memory`, `walk` executes a
block, `timeline` models its cycles, `calls` lays out the default call of each op and `figures` counts.
"""
