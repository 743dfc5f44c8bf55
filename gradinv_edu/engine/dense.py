"""Inputs of a dense layer in closed form; each with ``k``, the residual, and the input's error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..fully_connected import recover_input
from .low_rank import rank_one

__all__ = ["Found", "closed_form", "known_gradients"]

Found = tuple[Tensor, Tensor, float, float]
FAINT = 1e-9  # of the largest singular value of K: below, samples do not tell apart


def closed_form(G: Tensor, b: Tensor, eps: float) -> Found:
    """``∂L/∂W`` over ``∂L/∂b``: input and ``k``, ``(1, …)``, of a layer with a bias."""
    x = recover_input(G, b)
    residual = rank_one(G, b).residual
    k = (G @ x + b) / (1 + x.square().sum())
    spread = max(residual, eps) * math.hypot(float(G.norm()), float(b.norm()))
    error = spread / float(k.norm() * x.norm() + 1e-300)
    return x.unsqueeze(0), k.unsqueeze(0), residual, error


def known_gradients(G: Tensor, k: Tensor, unsure: Tensor | None, error: float) -> Found | None:
    """``Kᵀ X = ∂L/∂W``, where the samples' rows of ``K`` are independent; None where they are not.

    Parameters
    ----------
    G : Tensor, (m, n)
        ``∂L/∂W``.
    k : Tensor, (N, m)
        ``∂L/∂z`` of each sample.
    unsure : Tensor of bool, (N, m), optional
        Where ``k`` may be wrong: of one sample, the other rows of ``G`` are enough.
    error : float
        Of ``k``, relative.
    """
    if unsure is None:
        values = torch.linalg.svdvals(k)
        if len(values) < len(k) or not float(values[-1]) > FAINT * float(values[0]):
            return None
        x, spread = torch.linalg.pinv(k.T) @ G, float(values[0] / values[-1])
    else:
        sure = torch.where(unsure, 0.0, k)
        if len(sure) > 1 or not bool(sure.any()):
            return None
        x, spread = sure @ G / sure.square().sum(), 1.0
        if bool(x.any()):  # an input of zeros tells nothing of k
            k = x @ G.T / x.square().sum()
            spread = float(G.norm() / (sure.norm() * x.norm()))
    residual = float((G - k.T @ x).norm()) / max(float(G.norm()), 1e-300)
    return x, k, residual, max(residual, error) * spread
