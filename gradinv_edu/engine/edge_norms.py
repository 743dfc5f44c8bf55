"""A norm of its own statistics inside a block: its layer's input, and what tells the factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import normalised
from .hidden import Hidden, fitted
from .layers import Rule
from .layers.norms import Norm
from .norm_system import NormSystem, entries, nonzero
from .normalised import Normalised

__all__ = ["Below", "by_bias", "by_entries", "risen", "solve"]

LARGE = 5e5  # entries of a gradient up to which its rows are iterated where no channel tells
FITS = 1e-3  # relative misfit above which a factor explains nothing


def solve(
    module: nn.Module,
    norm: Norm,
    k: Tensor,
    part: tuple[Tensor, Tensor] | None,
    input_shape: tuple[int, ...],
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    noise: float,
    iterate: bool = True,
) -> Normalised | None:
    """Input of the layer below a norm up to a factor, by its outputs or by ``∂L/∂γ``, ``∂L/∂β``.

    Parameters
    ----------
    module, norm, input_shape
        As for :class:`~gradinv_edu.engine.norm_system.NormSystem`.
    k : Tensor
        ``∂L/∂y`` at the norm's output.
    part : tuple of Tensor or None
        Outputs, and bool: which of them are known.
    gradients : tuple of Tensor
        ``∂L/∂W``; of the norm's scale and shift where it has them.
    noise : float
        Relative noise of the gradients.
    iterate : bool
        Whether to iterate where no channel tells.

    Returns
    -------
    Normalised or None
        None where neither tells enough.
    """
    (G, scale, shift), means = gradients, None
    if entries(norm, tuple(k.shape)) < 2:  # a norm of one number gives its shift, whatever it is
        return None
    if part is not None and bool((part[1] | (k == 0)).all()):
        value, known = torch.where(part[1], part[0], 0.0), part[1].to(k)
    elif scale is not None and shift is not None:
        value, known = torch.zeros_like(k), torch.zeros_like(k)
        means = normalised.means(norm, k, scale, shift)
    else:
        return None
    system = NormSystem(module, norm, value, k, input_shape, G, known, means=means)
    if iterate and G.numel() <= LARGE:
        rounds = 1 if means is None else normalised.MORE
        found = normalised.solve(system, noise=noise, rounds=rounds)
    elif (by_channel := normalised.by_channel(system, noise)) is not None:
        found = by_channel
    else:
        return None
    fits = found.solution.residual <= max(FITS, 1e3 * noise)
    return found if found.solution.full_rank and fits else None


def by_entries(x: Tensor, part: tuple[Tensor, Tensor], unseen: Tensor | None) -> Tensor | None:
    r""":math:`s x + c` through the entries that are known; None where they do not fit."""
    value, known = part
    a, b = x[known], value[known]
    if unseen is not None:
        number = unseen[known]
        count = int(unseen.max()) + 1
        own = number >= 0
        zero = a.new_zeros(count)
        often = zero.index_add(0, number[own], torch.ones_like(a[own]))
        if bool((often == 0).any()):
            return None
        means = [zero.index_add(0, number[own], t[own]) / often for t in (a, b)]
        a, b = (
            t - torch.where(own, m[number.clamp_min(0)], 0.0)
            for t, m in zip((a, b), means, strict=True)
        )
    size = float(a.square().sum())
    if size == 0:
        return None
    s = float((a * b).sum()) / size
    if not s > 0 or float((s * a - b).norm()) > FITS * float(b.norm()):
        return None
    if unseen is None:
        return s * x
    shift = means[1] - s * means[0]
    return s * x + torch.where(unseen >= 0, shift[unseen.clamp_min(0)], 0.0)


@dataclass(frozen=True)
class Below:
    """An activation, and the layer below it whose bias's gradient is known.

    Attributes
    ----------
    activation : rule, or None
        Between that layer and ``x``, if there is one.
    total : callable
        From ``∂L/∂`` of that layer's output to its bias's gradient.
    sent : Tensor
        That gradient, flat.
    beside : Tensor
        What other ways add to ``∂L/∂x``.
    """

    activation: Rule | None
    total: Callable[[Tensor], Tensor]
    sent: Tensor
    beside: Tensor


def by_bias(x: Tensor, q: Tensor, factor: Tensor, below: Below, noise: float) -> Tensor | None:
    """``x`` with the factor that the gradient of the next bias tells; ``q`` is its ``∂L/∂x``."""
    rule = below.activation
    curved = rule is not None and not rule.homogeneous

    def down(s: Tensor, k: Tensor) -> Tensor:
        if rule is None:
            return below.total(k)
        undone = rule.undo(hidden.times(x, s), "", noise)
        return below.total(k * undone.slope)

    hidden = Hidden("", factor)
    if len(hidden.guess) > 1 or (curved and bool(below.beside.any())):
        return None
    sent = below.sent - down(torch.ones_like(factor), below.beside)
    s, spread = fitted(lambda s: down(s, q / s)[None], sent, hidden, curved)
    return hidden.times(x, s) if spread <= FITS and bool((s > 0).all()) else None


def risen(
    norm: Norm, z: Tensor, k: Tensor, scale_gradient: Tensor, shift_gradient: Tensor
) -> Tensor:
    r""":math:`\gamma\,\partial L/\partial y = \sigma k + \mathrm{mean}\,\kappa + \hat x\,m_1`.

    The chain rule through a norm the other way, from ``k = ∂L/∂z``: what it took away, ``∂L/∂γ``
    and ``∂L/∂β`` tell.
    """
    groups, (gain, _) = norm.groups(z.shape, z.device), norm.coefficients(z)
    m0, m1 = normalised.means(norm, z, scale_gradient, shift_gradient)
    _, centre, variance = groups.moments(z, norm.centred)
    sigma = (variance + norm.eps).sqrt()
    m0, m1, sigma = (groups.spread(t) for t in (m0 * norm.centred, m1, sigma))
    return (sigma * k + m0 + m1 * centre / sigma) / nonzero(gain)
