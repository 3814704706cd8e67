"""The interpreter of SASS (bench/sass) against real results: the binary's kernels, executed instruction by instruction
on real tensors, give the bits of the CPU backend; and with a wrong semantics of any instruction they do not."""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.sass import binary, calls, figures, floats, layout, machine, timeline, walk
from bench.sass.machine import Block, Memory
from bench.sass.program import Control, Program, UnknownInstruction, parse
from bench.sass.walk import Deadlock, Walk
from fsam_ext.backends import resolve

from . import cuda_emulation
from .cuda_problem import Problem, bits, same_bits
from .sass_problem import ARCHITECTURES, execute

# A warp's rows and a block's (two of them, so that a block has to look for its row), ends inside of groups and pieces,
# two chunks.
SIZES = [7, 33, 2048, 0, 2500, 4097]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RUNS = {
    "perturb": Problem.perturb,
    "restore": Problem.restore,
    "restore_sgd": Problem.sgd,
    "count_steps": Problem.count_steps,
    "restore_adam": Problem.adam,
    "perturb_keeping": Problem.perturb_keeping,
    "project": Problem.project,
    "restore_sgd_reusing": Problem.reusing_sgd,
    "restore_adam_reusing": Problem.reusing_adam,
}
# Sums over a chunk have the order of these kernels, and the emulation's bits.
SUMS = {
    "noise_norm": Problem.noise_norm, "dots": Problem.dots, "project": Problem.project,
    "update_ema_measuring": Problem.update_ema_measuring,
}  # fmt: skip

needs_binary = pytest.mark.skipif(
    not binary.LIBRARY.exists() or binary.missing_tools() is not None,
    reason="needs the CUDA library and " + (binary.missing_tools() or "cuobjdump and nvdisasm"),
)


@functools.cache
def programs_of(arch: str) -> dict:
    """The programs of one of the library's architectures by dtype and op."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        binary.extract(binary.LIBRARY, Path(folder))
        for cubin, dtype in figures.cubins(Path(folder), [arch]):
            for kernel, entry, program in figures.programs(cubin, dtype):
                found[dtype, kernel.call] = kernel, entry, program
    if not found:
        pytest.skip(f"the library holds no sm_{arch}")
    return found


@pytest.fixture(params=ARCHITECTURES)
def programs(request):
    return programs_of(request.param)


def problem_for(dtype: str, shift: int = 0, sizes=SIZES) -> Problem:
    problem = Problem(DTYPES[dtype], sizes, shift)
    problem.stats.copy_(torch.tensor([7.0, 0, 0, 0, 0], dtype=torch.float64))
    return problem


def differs(programs, dtype: str, op: str, shift: int = 0, sizes=SIZES, span: int = 1) -> bool:
    """Whether the interpreter and the CPU backend give different bits."""
    interpreted, expected, before = (problem_for(dtype, shift, sizes) for _ in range(3))
    if op.startswith("restore_adam"):
        execute(interpreted, *programs["fp32", "count_steps"])
    execute(interpreted, *programs["fp32" if op == "count_steps" else dtype, op], span)
    RUNS[op](expected, resolve("cpu", torch.device("cpu")))
    expected.one_sum.zero_()  # a launch of its own
    assert not same_bits(expected, before), "the op changed nothing"
    return not same_bits(interpreted, expected)


@needs_binary
class TestAgainstCpu:
    @pytest.mark.parametrize("op", RUNS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits(self, programs, dtype, op):
        assert not differs(programs, dtype, op)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits_of_misaligned_rows(self, programs, dtype):
        assert not differs(programs, dtype, "perturb", shift=1, sizes=[33, 2051])

    @pytest.mark.parametrize("op", ["perturb", "restore"])
    def test_same_bits_of_blocks_of_several_chunks(self, programs, op):
        assert not differs(programs, "fp32", op, sizes=[9000, 33], span=2)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("span", [1, 2])
    @pytest.mark.parametrize("op", SUMS)
    def test_slots_of_sums(self, programs, dtype, op, span):
        """Shuffles and barriers included: the kernel itself, compiled for the CPU, sums in the same order."""
        interpreted, expected = problem_for(dtype), problem_for(dtype)
        execute(interpreted, *programs[dtype, op], span)
        SUMS[op](expected, cuda_emulation.load())
        assert torch.isfinite(expected.partials).any()
        assert torch.equal(bits(interpreted.partials), bits(expected.partials))

    @pytest.mark.parametrize("off", [-1, 1])
    def test_no_bit_depends_on_what_approximations_leave_open(self, programs, monkeypatch, off):
        """See NOTE [approximations] in bench/sass/floats.py."""
        monkeypatch.setattr(floats, "APPROXIMATION_ERROR", off)
        assert not differs(programs, "fp32", "restore_adam")


# Instructions whose results no result depends on.
WITHOUT_CONSEQUENCE = {
    "BRA", "BSSY", "BSYNC", "BREAK", "BAR", "EXIT", "CALL", "RET", "NOP", "WARPSYNC",  # they have none
    "MUFU", "FCHK",  # NOTE [approximations]: FCHK chooses between two ways to the same quotient
}  # fmt: skip


def spoilt(right):
    """A semantics that gives what `right` does with some bits flipped, and that stores nothing."""

    def wrong(x):
        if x.ins.opcode in ("STG", "STS"):
            return
        x.write = lambda i, *words: machine.Execution.write(
            x, i, *(word.view(np.uint32) ^ np.uint32(0x40C140C0) for word in words)
        )
        x.write_predicate = lambda i, value: machine.Execution.write_predicate(x, i, ~value)
        right(x)

    return wrong


def results(programs, dtype: str, op: str) -> list[torch.Tensor]:
    """The bits that the interpreter gives."""
    problem = problem_for(dtype, sizes=[33, 2048, 4097])
    problem.corrections.fill_(0.5)
    execute(problem, *programs[dtype, op])
    return [bits(tensor) for tensor in (*problem.tensors(), problem.partials)]


@needs_binary
def test_a_wrong_semantics_of_any_instruction_is_noticed(monkeypatch):
    programs = programs_of("90")
    noticed, executed = set(), set()
    for dtype, op in (("bf16", "perturb"), ("fp32", "restore_adam"), ("fp32", "noise_norm"), ("fp32", "restore")):
        right_results = results(programs, dtype, op)
        opcodes = {ins.opcode for ins in programs[dtype, op][2].executed()}
        executed |= opcodes
        for opcode in sorted(opcodes - WITHOUT_CONSEQUENCE - noticed):
            modifiers, right = machine.SEMANTICS[opcode]
            with monkeypatch.context() as patch:
                patch.setitem(machine.SEMANTICS, opcode, (modifiers, spoilt(right)))
                patch.setattr(walk, "LIMIT", 5000)
                try:
                    same = all(map(torch.equal, results(programs, dtype, op), right_results))
                except (machine.BadAccess, UnknownInstruction, Deadlock, IndexError):
                    same = False
            if not same:
                noticed.add(opcode)
    assert len(noticed) > 30
    assert executed - noticed - WITHOUT_CONSEQUENCE == set()


# ---- Arithmetic that is rounded once


def exact_fused(a, b, c, mode: str) -> np.float32:
    """a * b + c from fractions."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(a) * float(b) + float(c))
    around = [near, *(np.nextafter(near, np.float32(towards)) for towards in (-np.inf, np.inf))]
    below = max((x for x in around if Fraction(float(x)) <= exact), default=None)
    above = min((x for x in around if Fraction(float(x)) >= exact), default=None)
    if mode == "RM" or (mode == "RZ" and exact > 0):
        return below
    if mode == "RP" or (mode == "RZ" and exact < 0):
        return above
    distances = [(abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1, x) for x in (below, above)]
    return min(distances)[2]


@pytest.mark.parametrize("mode", ["RN", "RZ", "RP", "RM"])
def test_fused_multiplication_and_addition_is_rounded_once(mode):
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 2000)).astype(np.float32)
    # Sums near a tie: what the product leaves beyond a float, or just off the middle between two.
    product = (a.astype(np.float64) * b.astype(np.float64)).astype(np.float32)
    c = np.where(generator.random(2000) < 0.5, -product, product * np.float32(2.0**24)).astype(np.float32)
    found = floats.rounded(floats.exact_as_odd(a, b, c), mode)
    expected = np.array([exact_fused(*values, mode) for values in zip(a, b, c, strict=True)], np.float32)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_rounding_twice_is_something_else():
    """A sum that is 2^-70 below the middle between two floats: as a double it is the middle itself."""
    a, b, c = (np.array([x], np.float32) for x in (2.0**-24 * (1 + 2.0**-23), 1 - 2.0**-23, 1 + 2.0**-23))
    twice = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    assert twice == np.float32(1 + 2.0**-22)
    assert floats.rounded(floats.exact_as_odd(a, b, c), "RN") == np.float32(1 + 2.0**-23)


# ---- Programs of a few lines


def program_of(*lines: str) -> Program:
    """A program of instructions that stall for one cycle, set no scoreboard and wait for none."""
    text = []
    for number, line in enumerate(lines):
        if line.endswith(":"):
            text.append(line)
            continue
        address = 16 * sum(not before.endswith(":") for before in lines[:number])
        text += [f"/*{address:04x}*/ {line} ; /* 0x{0:016x} */", f"/* 0x{1 << 41 | 7 << 46 | 7 << 49:016x} */"]
    return parse("written by hand", "90", text, lambda line: False)


def run(*lines: str, threads: int = 32) -> Walk:
    """A walk through a program of these instructions."""
    return Walk(program_of(*lines), Block(threads, 0, {0: bytes(64)}, Memory())).run()


@pytest.mark.parametrize(
    "line",
    ["FROB R1, R2", "FADD.SAT R1, R2, R3", "FADD R1, R2.H0_H0, R3", "IMAD.HI R1, R2, R3, R4", "S2R R1, SR_CLOCKLO",
     "MOV R1, c[0x7][0x0]", "LOP3.LUT P0, R1, R2, R3, R4, 0xc0, P1", "BAR.ARV 0x0, 0x20",
     "SHFL.BFLY PT, R1, R2, 0x1, 0xf1f"],
)  # fmt: skip
def test_unknown_instructions_are_named(line):
    with pytest.raises(UnknownInstruction, match="unknown instruction at 0x10: " + re.escape(line)):
        run("MOV R2, 0x1", line, "EXIT")


def test_branches_are_issued_once_for_each_part_of_a_warp():
    found = run(
        "S2R R0, SR_TID.X",
        "BSSY B0, `(.L_2)",
        "ISETP.GE.U32.AND P0, PT, R0, 0x8, PT",
        "@P0 BRA `(.L_1)",
        "MOV R1, 0x1",
        "BRA `(.L_2a)",
        ".L_1:",
        "MOV R1, 0x2",
        ".L_2a:",
        "BSYNC B0",
        ".L_2:",
        "VIADD R1, R1, 0x10",
        "EXIT",
        threads=64,
    )
    assert found.block.R[1].tolist() == [0x11] * 8 + [0x12] * 56
    assert [len(issued) for issued in found.issued] == [10, 8]
    assert [issue.ins.opcode for issue in found.issued[0]].count("VIADD") == 1


def test_a_barrier_that_some_threads_miss_is_noticed():
    skipped = ("S2R R0, SR_TID.X", "ISETP.EQ.U32.AND P0, PT, R0, RZ, PT", "@P0 BRA `(.L_1)", "BAR.SYNC 0x0", "EXIT")
    assert len(run(*skipped, ".L_1:", "EXIT").issued[0]) == 6  # those that are done need not come
    with pytest.raises(Deadlock):
        run(*skipped, ".L_1:", "BSSY B0, `(.L_2)", "BAR.SYNC 0x0", "WARPSYNC.ALL", "EXIT", ".L_2:", "EXIT")


def test_memory_that_was_not_given_is_no_memory():
    for address in ("0x1000", "0x7f0000000002"):
        low, high = int(address, 16) & 0xFFFFFFFF, int(address, 16) >> 32
        lines = (f"MOV R2, 0x{low:x}", f"MOV R3, 0x{high:x}", "LDG.E R4, desc[UR4][R2.64]", "EXIT")
        memory = Memory()
        memory.place(np.ones(4, np.float32))
        with pytest.raises(machine.BadAccess):
            Walk(program_of(*lines), Block(32, 0, {0: b""}, memory)).run()


def test_the_smaller_and_the_larger_number():
    walked = run(
        "MOV R0, 0xffffffff",
        "VIMNMX R1, R0, 0x4, PT",
        "VIMNMX R2, R0, 0x4, !PT",
        "VIMNMX.U32 R3, R0, 0x4, PT",
        "VIMNMX.U32 R4, PT, PT, R0, 0x4, !PT",
        "VIADDMNMX R5, R0, 0x7, 0x4, !PT",
        "EXIT",
    )
    assert walked.block.R[1:6, 0].tolist() == [0xFFFFFFFF, 4, 4, 0xFFFFFFFF, 6]


def test_shuffles_take_from_lanes_that_take_part():
    assert run("S2R R0, SR_TID.X", "SHFL.BFLY PT, R1, R0, 0x4, 0x1f", "EXIT").block.R[1].tolist() == [
        lane ^ 4 for lane in range(32)
    ]
    with pytest.raises(machine.BadAccess, match="takes no part"):
        run(
            "S2R R0, SR_TID.X",
            "ISETP.GE.U32.AND P0, PT, R0, 0x8, PT",
            "@P0 EXIT",
            "SHFL.BFLY PT, R1, R0, 0x8, 0x1f",
            "EXIT",
        )


def test_cycles_follow_the_stalls_and_scoreboards_of_the_encoding():
    program = program_of("LDC R1, c[0x0][0x0]", "MOV R2, R1", "BAR.SYNC 0x0", "EXIT")
    for index, control in enumerate([Control(2, 3, 7, 0), Control(4, 7, 7, 1 << 3), Control(1, 7, 7, 0)]):
        program.instruction(index)
        program._parsed[index] = replace(program.instruction(index), control=control)
    issued = Walk(program, Block(64, 0, {0: bytes(64)}, Memory())).run().issued
    found = timeline.timeline([issued[0], issued[1][1:]])  # the second warp does not load
    assert found.barrier == timeline.LATENCY["LDC"] + 4 + 1  # the first one waits for its load, and is the last to come
    assert found.end == found.barrier + timeline.BARRIER + 1


# ---- Parameters


@needs_binary
def test_changed_structs_are_noticed(monkeypatch):
    kernel, entry, _ = programs_of("90")["fp32", "restore_adam"]
    calls.default_block(kernel, "fp32", entry, calls.MODELS[0])
    with pytest.raises(calls.ChangedParameters, match="restore_adam: .* bytes of parameters from the headers"):
        calls.default_block(kernel, "fp32", replace(entry, parameter_bytes=entry.parameter_bytes + 8), calls.MODELS[0])
    fields = layout.fields_of
    warmth = {"AdamArguments": [layout.Field("double", "warmth", None)]}
    monkeypatch.setattr(layout, "fields_of", lambda name: fields(name) + warmth.get(name, []))
    with pytest.raises(layout.MissingValue, match="AdamArguments has a field warmth without a value"):
        calls.default_block(kernel, "fp32", entry, calls.MODELS[0])
