r"""How near a recovered picture is to the truth, and how often a recovery succeeds.

Pictures are compared in float64, whatever their precision. What cannot be compared (shapes that
differ, NaN or infinite entries) raises InvalidTensorError, a number that cannot be
InvalidArgumentError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .. import checks
from ..errors import InvalidArgumentError, InvalidTensorError

__all__ = [
    "Rate",
    "clustered_rate",
    "psnr",
    "relative_error",
    "ssim",
    "success_rate",
    "wilson_interval",
]

# Wang et al. (2004): a Gaussian window of 11 pixels with standard deviation 1.5
_WINDOW, _SIGMA = 11, 1.5


def psnr(a: Tensor, b: Tensor, data_range: float = 1.0) -> float:
    r""":math:`10 \log_{10}(r^2 / \mathrm{MSE})`: peak signal-to-noise ratio in decibels.

    About 30 where differences can be seen, 50 where they cannot, over 250 where float64 is
    exhausted; infinite if ``a`` and ``b`` are equal.

    Parameters
    ----------
    a, b : Tensor
        The two pictures, in any order, of equal shape.
    data_range : float
        :math:`r`, the largest difference that two pixels can have: 1 for pictures in [0, 1].
    """
    a, b = _pair(a, b)
    checks.number(data_range, "data_range", "positive: 1 for [0, 1]", lambda r: r > 0)
    mse = float((a - b).square().mean())
    return math.inf if mse == 0 else 20 * math.log10(data_range) - 10 * math.log10(mse)


def ssim(a: Tensor, b: Tensor, data_range: float = 1.0) -> float:
    r""":math:`\frac{(2\mu_a\mu_b + c_1)(2\sigma_{ab} + c_2)}{(\mu_a^2 + \mu_b^2 + c_1)(\sigma_a^2 + \sigma_b^2 + c_2)}`.

    Structural similarity, averaged over Gaussian windows and channels by scikit-image, the
    border mirrored: 1 for equal pictures, about 0 for unrelated ones. Pictures with a side under
    11 pixels get a smaller window of the same form.

    Parameters
    ----------
    a, b : Tensor, (H, W), (C, H, W) or (N, C, H, W)
        The two pictures, in any order, of equal shape, 3 pixels a side or more.
    data_range : float
        The largest difference that two pixels can have: 1 for pictures in [0, 1].

    Notes
    -----
    Source: Wang, Bovik, Sheikh and Simoncelli (2004).
    """  # noqa: E501
    from skimage.metrics import structural_similarity

    a, b = _pair(a, b)
    checks.number(data_range, "data_range", "positive: 1 for [0, 1]", lambda r: r > 0)
    if not 2 <= a.dim() <= 4 or min(a.shape[-2:]) < 3:
        raise InvalidTensorError(
            f"SSIM compares pictures (…, H, W) of 3 pixels a side or more, got {tuple(a.shape)}."
        )
    side = min(*a.shape[-2:], _WINDOW)
    sigma = _SIGMA * (side - 1 + side % 2) / _WINDOW
    reach = int(3.5 * sigma + 0.5)  # of scikit-image's window; it leaves as wide a border out
    widths = ((0, 0), (reach, reach), (reach, reach))
    stacks = (p.reshape(-1, *p.shape[-2:]).numpy(force=True) for p in (a, b))
    mirrored = (np.pad(stack, widths, mode="reflect") for stack in stacks)
    found = structural_similarity(  # type: ignore[no-untyped-call]
        *mirrored, channel_axis=0, data_range=float(data_range), gaussian_weights=True,
        sigma=sigma, use_sample_covariance=False,
    )  # fmt: skip
    return float(found)


def relative_error(a: Tensor, b: Tensor) -> float:
    r""":math:`\lVert a - b \rVert / \lVert b \rVert`, the error of ``a`` against the truth ``b``.

    Of tensors of equal shape; 0 if they are equal, infinite if only the truth is zero.
    """
    a, b = _pair(a, b)
    error, size = float((a - b).norm()), float(b.norm())
    if size == 0:
        return math.inf if error else 0.0
    return error / size


@dataclass(frozen=True)
class Rate:
    """A share of trials that succeeded, with the interval that the number of trials allows.

    ``low`` and ``high`` are the ends of Wilson's interval, between 0 and 1.
    """

    successes: int
    trials: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Share of successes."""
        return self.successes / self.trials

    def __str__(self) -> str:
        share = f"{self.rate:.0%} ({self.low:.0%} to {self.high:.0%})"
        return f"{self.successes}/{self.trials} = {share}"


def success_rate(outcomes: Iterable[bool], confidence: float = 0.95) -> Rate:
    """Count successes of independent trials and say how far the count may be trusted."""
    counted = [bool(outcome) for outcome in outcomes]
    successes = sum(counted)
    return Rate(successes, len(counted), *wilson_interval(successes, len(counted), confidence))


def clustered_rate(groups: Iterable[Iterable[bool]], confidence: float = 0.95) -> Rate:
    """Count successes of trials that share a network, at the interval of so many networks.

    What is easy in one network may be easy for all its pictures, so that Wilson's interval takes
    the share of all trials and the number of *groups*: wide, and never too narrow.
    """
    counted = [[bool(outcome) for outcome in group] for group in groups]
    successes, trials = sum(map(sum, counted)), sum(map(len, counted))
    ends = wilson_interval(successes, trials, confidence, len(counted))
    return Rate(successes, trials, *ends)


def wilson_interval(
    successes: int, trials: int, confidence: float = 0.95, independent: int | None = None
) -> tuple[float, float]:
    r""":math:`\frac{1}{1 + c^2/n}\bigl(\hat p + \tfrac{c^2}{2n} \pm c\sqrt{\tfrac{\hat p(1-\hat p)}{n} + \tfrac{c^2}{4n^2}}\bigr)`.

    All rates that would not make this count improbable, with the normal quantile :math:`c` at
    :math:`(1 + \text{confidence})/2`: unlike the usual plus or minus, it stays within [0, 1] and
    does not shrink to nothing where every trial succeeds. Implements :eq:`wilson-interval`.

    Parameters
    ----------
    successes, trials : int
        :math:`\hat p n` and :math:`n`.
    confidence : float
        Between 0 and 1.
    independent : int, optional
        Of the trials, in place of :math:`n`; ``None``: all.

    Notes
    -----
    Source: Wilson (1927).
    """  # noqa: E501
    from scipy.stats import norm

    if trials < 1 or not 0 <= successes <= trials:
        raise InvalidArgumentError(
            f"{successes} successes of {trials} trials cannot be: give 0 to trials, of 1 or more."
        )
    checks.number(confidence, "confidence", "between 0 and 1", lambda share: 0 < share < 1)
    p, n = successes / trials, trials if independent is None else independent
    c = float(norm.ppf((1 + confidence) / 2))
    middle, reach = p + c * c / (2 * n), c * math.sqrt(p * (1 - p) / n + (c / (2 * n)) ** 2)
    low, high = ((middle + side * reach) / (1 + c * c / n) for side in (-1, 1))
    return max(min(low, p), 0.0), min(max(high, p), 1.0)  # rounding apart


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = checks.finite(a, "a"), checks.finite(b, "b")
    if a.shape != b.shape:
        raise InvalidTensorError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; compare like with like."
        )
    return a, b.to(a.device)
