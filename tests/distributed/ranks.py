"""Real processes for tests: `run(2, case, *args)` runs a function on 2 ranks over gloo and returns what each returned.

The processes stay for the next test, because a start costs seconds; one that fails or hangs takes its whole group
along, and the next test gets a new one.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60  # seconds for one case; a machine with 2 busy cores needs some
_groups: dict[int, Group] = {}


class Group:
    """`world` processes that wait for work."""

    def __init__(self, world: int) -> None:
        # A server that has torch imported and forks: one import for all processes.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "fsam_ext"])
        handle, self.store = tempfile.mkstemp()
        os.close(handle)
        self.processes, self.pipes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, world, self.store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(mine)

    def run(self, case: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send_bytes(_packed((case, args)))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + PATIENCE
        while len(results) + len(errors) < len(self.pipes):
            ready = wait(
                [pipe for rank, pipe in enumerate(self.pipes) if rank not in {**results, **errors}],
                timeout=max(0.0, deadline - time.monotonic()),
            )
            if not ready:
                silent = sorted(set(range(len(self.pipes))) - set(results) - set(errors))
                errors.update(dict.fromkeys(silent, "no answer: it hangs, or waits for another rank"))
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    good, answer = _unpacked(pipe.recv_bytes())
                except EOFError:
                    good, answer = False, "the process ended"
                (results if good else errors)[rank] = answer
                if not good:  # the others may wait for this one for ever
                    deadline = min(deadline, time.monotonic() + 3)
        if errors:
            self.stop()
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
        return [results[rank] for rank in range(len(self.pipes))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        os.unlink(self.store)
        for world in [world for world, group in _groups.items() if group is self]:
            del _groups[world]


def run(world: int, case: Callable[..., Any], *args: Any) -> list[Any]:
    """What `case(*args)`, a function of a module, returns on each of `world` ranks; numbers and CPU tensors travel."""
    if world not in _groups:
        _groups[world] = Group(world)
    return _groups[world].run(case, args)


@atexit.register
def stop_all() -> None:
    for group in list(_groups.values()):
        group.stop()


def _work(rank: int, world: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )
    while True:
        try:
            case, args = _unpacked(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = (True, case(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(_packed(answer))


# Not what pipes do with tensors by themselves: that is shared memory, gone with the process that made it.
def _packed(thing: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(thing, stream)
    return stream.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
