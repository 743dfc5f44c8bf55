r"""Pruning: only some entries are sent, and what a server makes of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import checks
from .checks import checked
from .dropout import classifier
from .errors import InvalidArgumentError, UnsupportedLayerError, UnsupportedLossError
from .noise import each_gradient
from .sharing import Update

__all__ = [
    "complete_pruned",
    "entries_kept",
    "gradients_above",
    "keep_largest",
    "keep_random",
    "recover_pruned",
]


@checked
def keep_largest(update: Update, fraction: float) -> Update:
    r""":math:`g \leftarrow M \odot g`, :math:`M = 1` at the entries of largest size (top-k).

    Parameters
    ----------
    update : Update
        What the client would send.
    fraction : float
        Share that is kept of each tensor, in (0, 1]; rounded up to whole entries.

    Raises
    ------
    InvalidArgumentError, InvalidTensorError
        If ``fraction`` is not in (0, 1]; if the update holds NaN or infinite entries.
    """
    return each_gradient(
        update,
        lambda g: _masked(g, g.abs().flatten().topk(entries_kept(fraction, g.numel())).indices),
    )


@checked
def keep_random(
    update: Update,
    fraction: float,
    generator: torch.Generator | None = None,
    *,
    unbiased: bool = False,
) -> Update:
    r""":math:`g \leftarrow M \odot g`, :math:`M = 1` at randomly drawn entries.

    Parameters
    ----------
    update : Update
        What the client would send.
    fraction : float
        Share that is kept of each tensor, in (0, 1]; rounded up to whole entries.
    generator : torch.Generator, optional
        Of the draws; ``None``: a fixed seed.
    unbiased : bool
        Divide what is kept by the share kept, so that the expectation is the gradient.

    Raises
    ------
    InvalidArgumentError, InvalidTensorError
        If ``fraction`` is not in (0, 1]; if the update holds NaN or infinite entries.
    """
    source = torch.Generator().manual_seed(0) if generator is None else generator

    def prune(g: Tensor) -> Tensor:
        order = torch.randperm(g.numel(), generator=source, device=source.device)
        kept = entries_kept(fraction, g.numel())
        pruned = _masked(g, order[:kept].to(g.device))
        return pruned * (g.numel() / kept) if unbiased else pruned

    return each_gradient(update, prune)


@checked
def recover_pruned(
    weight_gradient: Float[Tensor, " m n"], bias_gradient: Float[Tensor, " m"]
) -> Float[Tensor, " n"]:
    r""":math:`x_i = \sum_j M_{ji} k_j G_{ji} \,/\, \sum_j M_{ji} k_j^2`.

    The input of a pruned dense layer. Zeros are taken for pruned entries and left out. Rows whose
    bias gradient was pruned get their :math:`k_j` from the entries of the input that are known
    already, and serve in turn. Implements :eq:`pruned-rank-one`.

    Parameters
    ----------
    weight_gradient, bias_gradient : Tensor, (m, n) and (m,)
        ``∂L/∂W`` and ``∂L/∂b``, zero where pruned.

    Returns
    -------
    Tensor, (n,)
        float64; NaN where the whole column is empty: the input there is zero, or too small for
        an entry to have been kept, or no entry happened to be drawn.

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        If shapes do not fit or an entry is not finite; if the bias gradient is zero everywhere.
    """
    return _rank_one(weight_gradient, bias_gradient)[0]


def _rank_one(G: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Input ``x`` and output gradient ``k`` of a pruned ``k xᵀ``, NaN where nothing tells them."""
    k = torch.where(checks.not_all_zero(b, "bias_gradient") == 0, math.nan, b)
    x = torch.full_like(G[0], math.nan)

    def multiple(G: Tensor, k: Tensor) -> Tensor:
        """Least-squares multiple of k that each column is, over its known entries."""
        known, mask = torch.nan_to_num(k), (G != 0).to(G.dtype)
        weight = mask.T @ known.square()
        return torch.where(weight > 0, G.T @ known, math.nan) / weight

    before = -1
    while before < (before := int(x.isfinite().sum() + k.isfinite().sum())):
        x = multiple(G, k)
        k = torch.where(k.isnan(), multiple(G.T, x), k)
    return x, k


@checked
def complete_pruned(model: nn.Sequential, update: Update, loss: nn.CrossEntropyLoss) -> Update:
    r""":math:`\partial L/\partial W = k\,x^\top` where it was pruned; what stays unknown, left out.

    The lowest dense layer gives its input by :func:`recover_pruned`. From there the server runs
    the layers above itself, and so knows their gradients whole. Of the layers below, a gradient
    with zeros is taken out of the update, since a zero may be a pruned entry. What comes out
    goes into :func:`~gradinv_edu.recursion.recover`, whose ``exact`` then speaks of this update:
    an input of the dense layer whose column is empty is taken for zero.

    Parameters
    ----------
    model : torch.nn.Sequential
        The network that the server sent.
    update : Update
        One client's, for one sample.
    loss : torch.nn.CrossEntropyLoss
        The client's; the label is at the most negative entry of its last output gradient.

    Raises
    ------
    InvalidTensorError, InvalidArgumentError, VanishingGradientError
        If update and model do not fit; if it is of several samples or local steps; if the dense
        layer's bias gradient is zero everywhere.
    UnsupportedLossError, UnsupportedLayerError
        If the loss is not cross-entropy; if the model is not sequential, no dense layer has sent
        a bias gradient, or dropout is at work above it.
    """
    update.check(model)
    if update.samples != 1 or update.local_steps != 1:
        raise InvalidArgumentError(
            f"The update is of {update.samples} samples and {update.local_steps} local steps; what "
            "was pruned can be completed for one sample and one step."
        )
    if not isinstance(loss, nn.CrossEntropyLoss):
        raise UnsupportedLossError(
            f"The label is read for CrossEntropyLoss, not for {type(loss).__name__}."
        )
    head = classifier(model)
    names = [name for name, _ in model.named_children()]
    sent = {
        place: [update.gradients[f"{names[place]}.{part}"].double() for part in ("weight", "bias")]
        for place, layer in enumerate(model)
        if isinstance(layer, nn.Linear)
        and {f"{names[place]}.weight", f"{names[place]}.bias"} <= set(update.gradients)
    }
    if head not in sent:
        raise UnsupportedLayerError("No dense layer sent a weight and a bias gradient to begin at.")
    place = min(sent)
    x = torch.nan_to_num(_rank_one(*sent[place])[0])
    label = torch.nan_to_num(_rank_one(*sent[head])[1]).argmin()
    known = gradients_above(model, place, x[None], label[None], loss)
    below = {n: g for n, g in update.gradients.items() if n not in known and bool((g != 0).all())}
    like = {n: known[n].to(g.dtype) for n, g in update.gradients.items() if n in known}
    return replace(update, gradients={**below, **like})


def gradients_above(
    model: nn.Sequential, place: int, x: Tensor, target: Tensor, loss: nn.Module
) -> dict[str, Tensor]:
    """Gradients of ``model[place:]`` by their names in the model, for its input ``x``."""
    above = copy.deepcopy(model[place:]).double().requires_grad_()
    for name, layer in above.named_children():
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training and layer.p:
            raise UnsupportedLayerError(f"{name} drops units at random, above the layer to begin.")
    with torch.inference_mode(False), torch.enable_grad():
        value = loss(above(x.clone()), target.clone())
        found = torch.autograd.grad(value, list(above.parameters()))
    return dict(zip([n for n, _ in above.named_parameters()], found, strict=True))


def entries_kept(fraction: float, entries: int) -> int:
    r""":math:`\lceil f n \rceil`: how many of ``entries`` a share keeps.

    Parameters
    ----------
    fraction : float
        Share that is kept, in (0, 1].
    entries : int
        How many there are.

    Raises
    ------
    InvalidArgumentError
        If ``fraction`` is not in (0, 1].
    """
    checks.number(fraction, "fraction", "the share that is kept, in (0, 1]", lambda v: 0 < v <= 1)
    checks.whole(entries, "entries", 0)
    return min(entries, math.ceil(fraction * entries - 1e-9))  # 0.07 · 100 is a little over 7


def _masked(g: Tensor, kept: Tensor) -> Tensor:
    mask = torch.zeros(g.numel(), dtype=torch.bool, device=g.device)
    mask[kept] = True
    return g * mask.reshape(g.shape)
