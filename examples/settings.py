"""What each method of the demo trains with: what examples/search.py found for a net and a noise."""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    lr: float
    weight_decay: float
    rho: float | None = None


# The start from which nothing is searched: what "SGD" has, and every method around another base.
PLAIN = {"sgd": Setting(0.05, 5e-4), "adam": Setting(1e-3, 5e-4), "adamw": Setting(1e-3, 5e-2)}

# By net and fraction of wrong labels. "tuned" is SGD. For mlp only SGD was searched for, and at 0.4 its pair is a known
# one; docs/demo.md says more.
FOUND = {
    ("mlp", 0.0): {"tuned": PLAIN["sgd"], "sam": Setting(0.05, 5e-4, 0.1), "fsam": Setting(0.05, 5e-4, 0.1)},
    ("mlp", 0.2): {"tuned": Setting(0.05, 5e-3), "sam": Setting(0.05, 5e-4, 0.2), "fsam": Setting(0.05, 5e-4, 0.2)},
    ("mlp", 0.4): {"tuned": Setting(0.01, 5e-3), "sam": Setting(0.05, 5e-4, 0.2), "fsam": Setting(0.05, 5e-4, 0.2)},
    ("cnn", 0.0): {"tuned": Setting(0.05, 2e-2), "sam": Setting(0.05, 5e-3, 0.1), "fsam": Setting(0.05, 5e-3, 0.1)},
    ("cnn", 0.2): {"tuned": Setting(0.05, 2e-2), "sam": Setting(0.05, 5e-4, 0.2), "fsam": Setting(0.05, 5e-4, 0.2)},
    ("cnn", 0.4): {"tuned": Setting(0.05, 2e-2), "sam": Setting(0.05, 5e-4, 0.2), "fsam": Setting(0.05, 5e-3, 0.1)},
}


def settings(base: str, arch: str, noise: float) -> dict[str, Setting]:
    """By method. A noise that was not searched has the settings of the nearest one; other bases than SGD its rhos."""
    plain = PLAIN[base]
    _, nearest = min((abs(noise - searched), searched) for net, searched in FOUND if net == arch)
    found = FOUND[arch, nearest]
    if base != "sgd":
        found = {method: plain._replace(rho=setting.rho) for method, setting in found.items()}
    return {"base": plain, **found}
