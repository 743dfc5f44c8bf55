"""How well an answer explains an update: its whole gradient, or what can be computed of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..convolution import Conv, patches
from .graph import Step
from .layers import rule_of

__all__ = ["draws", "mismatch", "unexplained"]

CHUNK = 2**20  # entries of a gradient that are compared at a time


def unexplained(
    steps: Sequence[Step], gradients: Mapping[str, Tensor], x: Tensor, kept: Mapping[str, Tensor]
) -> float | None:
    r"""Largest relative part of :math:`G = \sum_\ell k(\ell) \otimes a_\ell` that no k explains.

    For want of a label or a mask the whole gradient cannot be computed again; but below the
    first draw the layers' inputs ``a`` can, and each weight gradient must lie in their span.
    """
    worst = None
    for step in steps:
        if step.rule.random and not step.rule.normalises and step.name not in kept:
            break
        G = gradients.get(step.full_name("weight"))
        seen = None if G is None else _seen_by(step.module, x)
        if G is not None and seen is not None and bool(G.any()):
            rows = G.reshape(len(G), -1)
            own = torch.linalg.svd(seen, full_matrices=False)
            basis = own.Vh[torch.finfo(torch.float64).eps * len(seen) * own.S[0] < own.S]
            rest = float((rows - rows @ basis.T @ basis).norm() / rows.norm())
            worst = rest if worst is None else max(worst, rest)
        x = x * kept[step.name] if step.name in kept else step.rule.forward(x)
    return worst


def _seen_by(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a filter sees of ``x``, a row a place, where these rows are fewer than its weights."""
    if isinstance(module, nn.Linear):
        seen = x.reshape(-1, x.shape[-1])
    elif isinstance(module, Conv) and module.groups == 1:
        seen = patches(module, x).flatten(0, 1)
    else:
        return None
    return seen if len(seen) < seen.shape[1] else None


def draws(model: nn.Module) -> bool:
    """Whether its gradient depends on random numbers, and cannot be computed again."""
    attending = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    dropped = any(m.training and m.dropout > 0 for m in attending)
    return dropped or any(rule_of(m).random for m in model.modules())


def mismatch(found: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> float:
    """Largest relative difference, over the parameters, between two gradients."""
    top = max(float(g.norm()) for g in sent.values())
    return max(
        _distance(found[n], g) / max(float(g.norm()), 1e-3 * top)
        for n, g in sent.items()
        if n in found
    )


def _distance(a: Tensor, b: Tensor) -> float:
    """``‖a − b‖``, some entries at a time: a difference as large as a layer is dear to allocate."""
    parts = zip(torch.split(a.flatten(), CHUNK), torch.split(b.flatten(), CHUNK), strict=True)
    return math.hypot(*(float((one - other).norm()) for one, other in parts))
