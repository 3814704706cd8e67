"""Commands and environments for the programs that check what is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Ten steps with each backend that serves a CPU: the loss falls, and they agree.
TEN_STEPS = """
import torch, fsam_ext
from fsam_ext import _library

def train(backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3))
    optimizer = fsam_ext.FriendlySAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.01, backend=backend)
    x, y = torch.randn(64, 20), torch.randint(3, (64,))
    def closure():
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss
    return [float(optimizer.step(closure).detach()) for _ in range(10)]

losses = {backend: train(backend) for backend in BACKENDS}
for backend, loss in losses.items():
    assert loss[-1] < loss[0] / 1.5, (backend, loss)
    assert torch.allclose(torch.tensor(loss), torch.tensor(losses["reference"]), rtol=1e-4), losses
print("torch", torch.__version__, "fsam_ext", fsam_ext.__version__, "from", fsam_ext.__path__[0])
print("ten steps with", *losses, "-", round(loss[0], 3), "to", round(loss[-1], 3))
print("CUDA library:", _library.CUDA_REASON or "loads")
"""


def ten_steps(*backends: str) -> str:
    """The program that trains with the backends and compares them with the reference."""
    return f"BACKENDS = {(*backends, 'reference')!r}\n" + TEN_STEPS


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a command outside the source tree; its output, both streams, is text."""
    return subprocess.run(
        [str(part) for part in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd or Path.home(),
        env={**os.environ, **(env or {})},
    )


def checked(*command: object, **options: object) -> str:
    """Run a command that has to succeed; return what it printed, or end with it."""
    done = run(*command, **options)
    if done.returncode:
        sys.exit(f"{done.stdout}\nfsam_ext: this failed with status {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def find_python(version: str) -> Path | None:
    """A Python of that version ("3.12"), on PATH or of pyenv."""
    places = [shutil.which(f"python{version}")]
    places += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in filter(None, places):  # pyenv puts names on PATH that do not run
        said = run(python, "-c", "import sys; print(*sys.version_info[:2], sep='.')")
        if said.returncode == 0 and said.stdout.strip() == version:
            return Path(python)
    return None


def fresh_environment(folder: Path, python: Path, *packages: str) -> Path:
    """A new environment with pip and the packages; return its interpreter.

    uv installs them: it unpacks a package once and links its files into every environment, and torch is gigabytes.
    """
    checked(python, "-m", "venv", "--clear", folder)
    interpreter = folder / "bin/python"
    if packages:
        uv = Path(sys.executable).with_name("uv")
        checked(uv, "pip", "install", "--quiet", "--python", interpreter, *packages)
    return interpreter
