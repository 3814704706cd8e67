"""Which of the processes that share the tests runs what: NOTE [who runs what].

NOTE [who runs what]
Each process makes a fixture for itself. What takes long to make is made in one of them: the tests that share it are a
group. So are those with ranks, which wait for each other by asking again and again. The groups and the tests that take
longest come first, so that all processes end together.

Groups are told by their names, and not by pytest-xdist's own mark: from pytest 9.2 on that one does nothing
(pytest-xdist's issue 1386).
"""

from __future__ import annotations

from typing import Any

# Tests whose names begin alike are a group.
GROUPS = (
    "tests/test_cuda_binary.py",
    "tests/distributed/",
    "tests/test_gpu_check.py",
    "tests/test_triton_launch.py::test_compiled_code",
    "tests/test_cuda_executed.py",
    "tests/test_triton_launch.py::test_whatever_the_conformance_suite_launches",
    "tests/test_demo.py::test_sigint_then_resume",
    "tests/test_cpu.py::test_same_bits",
    "tests/test_sass.py",
    "tests/test_triton_launch.py::test_a_prepared_cache",
    "tests/test_triton_launch.py::test_the_compiled_code",
    "tests/test_build.py",
    "tests/test_cuda_emulator.py::test_planted",
)


def place(nodeid: str) -> int:
    """The place in GROUPS of a test."""
    return next((place for place, beginning in enumerate(GROUPS) if nodeid.startswith(beginning)), len(GROUPS))


def scheduler(config: Any, log: Any) -> Any:
    """pytest-xdist's scheduler of groups, for ours."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return (*GROUPS, nodeid)[place(nodeid)]

    config.option.loadscopereorder = False  # the processes have put the tests in order
    return Groups(config, log)
