r"""Clipping and noise; beside them, noise that promises something: :mod:`~gradinv_edu.privacy`.

A defense on what is sent maps an :class:`~gradinv_edu.sharing.Update` to another. A server knows
the protocol, the defense and its parameters, never its random draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import checks
from .checks import checked
from .sharing import Update

__all__ = ["add_noise", "clip", "each_gradient"]


@checked
def clip(update: Update, norm: float) -> Update:
    r""":math:`g \leftarrow g \cdot \min(1,\, g_{\max} / \lVert g \rVert)`, all parameters together.

    A rescaling by one number; a ratio of two entries does not see it. Implements :eq:`clipping`.

    Parameters
    ----------
    update : Update
        What the client would send.
    norm : float
        :math:`g_{\max}`, the largest norm that leaves the client.

    Raises
    ------
    InvalidArgumentError, InvalidTensorError
        If ``norm`` is not a positive number; if the update holds NaN or infinite entries.

    Notes
    -----
    Source: Abadi et al. (2016).
    """
    checks.number(norm, "norm", "a positive number", lambda v: v > 0)
    whole = each_gradient(update, lambda g: g).gradients.values()
    size = math.sqrt(sum(float(g.double().square().sum()) for g in whole))
    return each_gradient(update, lambda g: g * (norm / max(size, norm)))


@checked
def add_noise(update: Update, sigma: float, generator: torch.Generator | None = None) -> Update:
    r""":math:`g \leftarrow g + \mathcal N(0, \sigma^2)`, to every entry on its own.

    Noise without clipping promises nothing, since no bound is known on what one sample can
    change: for a promise take :func:`~gradinv_edu.privacy.dp_sgd`. Implements :eq:`noise`.

    Parameters
    ----------
    update : Update
        What the client would send.
    sigma : float
        Standard deviation, in units of the gradient.
    generator : torch.Generator, optional
        Of the noise; ``None``: a fixed seed.

    Raises
    ------
    InvalidArgumentError, InvalidTensorError
        If ``sigma`` is no number or negative; if the update holds NaN or infinite entries.
    """
    checks.number(sigma, "sigma", "zero or more", lambda v: v >= 0)
    source = torch.Generator().manual_seed(0) if generator is None else generator

    def noisy(g: Tensor) -> Tensor:
        drawn = torch.randn(g.shape, generator=source, device=source.device, dtype=g.dtype)
        return g + sigma * drawn.to(g.device)

    return each_gradient(update, noisy)


@checked
def each_gradient(update: Update, change: Callable[[Tensor], Tensor]) -> Update:
    r""":math:`g_j \leftarrow f(g_j)`: change every tensor in float64, and keep names and dtypes.

    Parameters
    ----------
    update : Update
        What the client would send.
    change : callable
        From a float64 tensor to one of its shape.

    Raises
    ------
    InvalidTensorError
        If it is no update, or holds NaN or infinite entries.
    """
    changed = {
        name: change(checks.finite(g, f"The gradient of {name}")).to(g.dtype)
        for name, g in update.gradients.items()
    }
    return replace(update, gradients=changed)
