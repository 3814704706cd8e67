"""SAM: FriendlySAM without an average."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from .optimizer import FriendlySAM


class SAM(FriendlySAM):
    """Sharpness-Aware Minimization (Foret et al., ICLR 2021), and ASAM (Kwon et al., ICML 2021) where ``adaptive``.

    :class:`FriendlySAM` with sigma = 0: the perturbation follows the gradient itself, and no average is kept. Takes the
    same options but for ``sigma`` and those of the average, which raise TypeError.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] = SGD,
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in ("sigma", "lmbda", "ema", "ema_dtype", "ema_source"):
            if name in kwargs:
                raise TypeError(f"SAM has no average, which {name} is an option of; leave it out, or use FriendlySAM")
        super().__init__(params, base_optimizer, rho, sigma=0.0, adaptive=adaptive, **kwargs)
