"""Everything that a GPU is needed for, in one run with a budget: ``python bench/gpu_check.py --minutes 9 --out DIR``.

Stages in the order of their worth, each in a process of its own; what a stage has found is in DIR before the next one
begins, and the end is a table of a screen. It needs an installed torch with Triton, the libraries built in the source
tree, pytest, and no network. ``--dry-run`` walks the same stages without a GPU; ``--merge DIR`` puts the rows of a run
where readers look for them. docs/gpu-day.md says in ten lines what to do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu_run import runner, stages  # noqa: E402


def chosen(names: list[str] | None) -> list[stages.Stage]:
    """The stages that were asked for, in their own order: a name is the whole of a stage's, or its first word.

    Raises:
        SystemExit: there is no such stage.
    """
    known = [stage.name for stage in stages.STAGES]
    for name in names or ():
        if not any(name in (full, full.split()[0]) for full in known):
            sys.exit(f"--only {name}: there is no such stage; there are {', '.join(known)}")
    return [s for s in stages.STAGES if not names or s.name in names or s.name.split()[0] in names]


def __getattr__(name: str) -> object:
    """``Passes``, which needs torch; nothing else here does, so that a table can be made where torch fails."""
    if name == "Passes":
        from bench.gpu_run.passes import Passes

        return Passes
    raise AttributeError(name)


def main(argv: list[str] | None = None) -> int:
    """Runs, or merges; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (9)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-check", help="the folder of the run")
    parser.add_argument("--dry-run", action="store_true", help="walk every stage without a GPU, on CPU tensors")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages, such as bandwidth or 'ncu cuda'")
    parser.add_argument("--list", action="store_true", help="print the stages and their limits, and stop")
    parser.add_argument("--commit", default="", help="what is measured, for the rows, where there is no .git")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="put the rows of a run into the repository")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository that --merge writes to")
    args = parser.parse_args(argv)
    if args.merge:
        from bench.gpu_run import merge

        return merge.main(args.merge, args.root)
    todo = chosen(args.only)
    if args.list:
        print("\n".join(f"{stage.name:20} {stage.limit:4.0f} s" for stage in todo))
        return 0
    setting = stages.Setting(args.out.resolve(), args.dry_run)
    runner.begin(setting, args.commit)
    return runner.Run(setting, todo, 60 * args.minutes).all()


if __name__ == "__main__":
    sys.exit(main())
