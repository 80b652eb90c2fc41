"""The gradient beside the two numbers of a recipe that depend on the loss's scale: Adam's eps, and where it is clipped.

An eps far above the gradients makes weights move less than the learning rate says, and nothing else shows it.
"""

from __future__ import annotations

import math
from typing import Any

PAPER_EPS = 1e-5  # arXiv 2412.08821, section 2.4.1; of a loss that is the sum over dimensions (see loss.py)
MAX_EPS_SHARE = 0.5  # of Adam's denominator that eps may be without a word


class GradientMeter:
    """Norms of the gradient, before clipping, over the steps since the last line.

    parameters: that are trained; eps: of the optimizer, None for one without; clip: the largest norm, 0 does not clip.
    """

    def __init__(self, parameters: int, eps: float | None, clip: float) -> None:
        self._parameters, self._eps, self._clip = parameters, eps, clip
        self._norms: list[float | None] = []
        self._warned = False

    def add(self, norm: Any) -> None:
        """One step's norm: a number or a scalar tensor; None where DeepSpeed does not tell it."""
        self._norms.append(None if norm is None else float(norm))

    def reset(self) -> None:
        """Begin a new line."""
        self._norms.clear()

    def read(self) -> dict[str, float | None]:
        """grad_norm and adam_eps_share of the last step, and clipped, the share of steps that were; None: not known."""
        norm, known = (self._norms or [None])[-1], [norm for norm in self._norms if norm is not None]
        clipped = sum(math.isfinite(norm) and norm > self._clip for norm in known) if self._clip else 0
        return {
            "grad_norm": norm,
            "clipped": clipped / len(known) if known else None,
            "adam_eps_share": self._eps_share(norm),
        }

    def eps_warning(self, embed_dim: int) -> str | None:
        """What is wrong with eps, at the first line that shows it; embed_dim: dimensions that the loss is a mean of."""
        norm = (self._norms or [None])[-1]
        share = self._eps_share(norm)
        if self._warned or norm is None or share is None or share <= MAX_EPS_SHARE:
            return None
        self._warned = True
        return (
            f"optim.eps: {self._eps:g} is {share:.0%} of Adam's denominator (the gradient is {self._scale(norm):.2g} a "
            f"weight), so weights move {1 - share:.2g} times as far as optim.lr says; the LCM paper's eps would be "
            f"{PAPER_EPS / embed_dim:.3g} here: {PAPER_EPS:g} / {embed_dim} dimensions, of which the loss is the mean"
        )

    def _scale(self, norm: float) -> float:
        """Root mean square over the parameters, of what the optimizer gets."""
        return (min(norm, self._clip) if self._clip else norm) / math.sqrt(self._parameters)

    def _eps_share(self, norm: float | None) -> float | None:
        """An estimate: sqrt(v) of Adam is taken for the root mean square of the gradient, of all parameters alike."""
        if self._eps is None or norm is None or not math.isfinite(norm) or norm <= 0:
            return None
        return self._eps / (self._eps + self._scale(norm))
