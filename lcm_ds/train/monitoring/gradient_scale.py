"""Gradient norms, and whether Adam's eps and the clipping norm, which depend on the scale of the loss, fit them.

An eps far above the gradients reduces every update, which no other metric shows.
"""

from __future__ import annotations

import math

PAPER_EPS = 1e-5  # arXiv 2412.08821, section 2.4.1; for a loss summed over dimensions (see loss.py)
MAX_EPS_SHARE = 0.5  # share of eps in Adam's denominator above which a warning is printed


class GradientMeter:
    """Gradient norms, before clipping, of the steps since the last report.

    Args:
        parameters: Number of trained parameters.
        eps: Of the optimizer; None if it has none.
        clip: The maximum norm; 0 does not clip.
    """

    def __init__(self, parameters: int, eps: float | None, clip: float) -> None:
        self._parameters, self._eps, self._clip = parameters, eps, clip
        self._norms: list[float | None] = []
        self._warned = False

    def add(self, norm: float | None) -> None:
        """One step's norm; None if DeepSpeed does not compute it."""
        self._norms.append(norm)

    def reset(self) -> None:
        """Start over after a report."""
        self._norms.clear()

    def read(self) -> dict[str, float | None]:
        """grad_norm and adam_eps_share of the last step, and the share of clipped steps; None: unknown."""
        norm, known = (self._norms or [None])[-1], [norm for norm in self._norms if norm is not None]
        clipped = sum(math.isfinite(norm) and norm > self._clip for norm in known) if self._clip else 0
        return {
            "grad_norm": norm,
            "clipped": clipped / len(known) if known else None,
            "adam_eps_share": self._eps_share(norm),
        }

    def eps_warning(self, embed_dim: int) -> str | None:
        """A warning about eps, once; embed_dim: number of dimensions that the loss is a mean of."""
        norm = (self._norms or [None])[-1]
        share = self._eps_share(norm)
        if self._warned or norm is None or share is None or share <= MAX_EPS_SHARE:
            return None
        self._warned = True
        return (
            f"optim.eps: {self._eps:g} is {share:.0%} of Adam's denominator (gradient per weight: "
            f"{self._scale(norm):.2g}), which scales all updates by {1 - share:.2g}; the LCM paper's eps corresponds "
            f"to {PAPER_EPS / embed_dim:.3g} here: {PAPER_EPS:g} / {embed_dim}, as this loss is a mean over dimensions"
        )

    def _scale(self, norm: float) -> float:
        """Root mean square over the parameters of the gradient after clipping."""
        return (min(norm, self._clip) if self._clip else norm) / math.sqrt(self._parameters)

    def _eps_share(self, norm: float | None) -> float | None:
        """An estimate, with the root mean square of the gradient as Adam's sqrt(v) for all parameters."""
        if self._eps is None or norm is None or not math.isfinite(norm) or norm <= 0:
            return None
        return self._eps / (self._eps + self._scale(norm))
