"""Checks of the exercises on defense by noise and compression."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import (
    Mistakes,
    Student,
    expect,
    normal,
    right,
)


def _clipped(g: Tensor, C: float) -> Tensor:
    return g * (C / g.norm(dim=1, keepdim=True)).clamp(max=1)


def _private(g: Tensor, C: float, sigma: float, noise: Tensor) -> Tensor:
    return (_clipped(g, C).sum(0) + sigma * C * noise) / len(g)


class Private(Mistakes, of="noise-private"):
    def noise_added_after_averaging(g, C, sigma, noise):
        """Your standard deviation is that of the summed, not of the averaged gradient: did you
        divide by the batch?"""
        return _clipped(g, C).mean(0) + sigma * C * noise

    def noise_of_each_sample(g, C, sigma, noise):
        """You divided the noise by the root of the batch, as if each sample had noise of its own.
        It is added once, to the sum."""
        return _clipped(g, C).mean(0) + sigma * C * noise / len(g) ** 0.5

    def noise_without_the_norm(g, C, sigma, noise):
        """Your noise does not know the clipping norm: it must hide one sample, whatever its
        length."""
        return (_clipped(g, C).sum(0) + sigma * noise) / len(g)

    def mean_clipped(g, C, sigma, noise):
        """You clipped the mean. A single sample may still be as long as it likes there, so nothing
        is promised to it."""
        return _clipped(g.mean(0, keepdim=True), C)[0] + sigma * C * noise / len(g)

    def short_gradients_stretched(g, C, sigma, noise):
        """You bring short gradients up to the clipping norm as well; clipping only shortens."""
        return (C * nn.functional.normalize(g).sum(0) + sigma * C * noise) / len(g)

    def clipping_forgotten(g, C, sigma, noise):
        """You clipped nothing: one sample may then count for any amount."""
        return (g.sum(0) + sigma * C * noise) / len(g)

    def sum_for_mean(g, C, sigma, noise):
        """That is the sum over the batch; the client sends its mean."""
        return len(g) * _private(g, C, sigma, noise)


def check_private(private: Student, seed: int = 1, samples: int = 6) -> None:
    """Check: clipped, averaged, and noise by what one sample can change."""
    lengths = torch.linspace(0.2, 4, samples, dtype=torch.float64)[:, None]
    alike = normal(seed, samples, 9) + 1.5 * normal(seed + 2, 9)
    g = nn.functional.normalize(alike, dim=1) * lengths
    given = (g, 1.2, 0.8, normal(seed + 1, 9))
    expect("noise-private", private, given, _private(*given), "the private gradient")
    same = nn.functional.cosine_similarity(_clipped(g[3:4], 1.2)[0], g[3], dim=0)
    right(
        f"Clipping alone leaves a gradient's direction, cosine {float(same):.3f}: only the noise "
        "hides, and its size is what one sample can change."
    )


def _spent(s: float, log: float) -> float:
    """Smallest over the orders α of s α + log / (α - 1)."""
    return s + 2 * math.sqrt(s * log)


class Epsilon(Mistakes, of="noise-epsilon", own=("gradinv_edu.privacy.privacy_spent",)):
    def rounds_multiplied(sigma, rounds, delta):
        """You multiplied the ε of one round by the rounds. Rényi divergences add up over the
        rounds; convert to ε after that, and it grows more slowly."""
        return rounds * _spent(1 / (2 * sigma**2), math.log(1 / delta))

    def one_order_for_all(sigma, rounds, delta):
        """You took one order α for all; the best one depends on σ and the rounds."""
        return rounds / sigma**2 + math.log(1 / delta)

    def delta_forgotten(sigma, rounds, delta):
        """You left out the price of δ, the second term."""
        return rounds / (2 * sigma**2)

    def first_term_forgotten(sigma, rounds, delta):
        """You left out the first term: T rounds have a divergence of their own."""
        return math.sqrt(2 * rounds * math.log(1 / delta)) / sigma

    def logarithm_of_base_ten(sigma, rounds, delta):
        """Your logarithm is that of base ten."""
        return _spent(rounds / (2 * sigma**2), math.log10(1 / delta))

    def two_lost(sigma, rounds, delta):
        """You lost the 2 in α / (2 σ²)."""
        return _spent(rounds / sigma**2, math.log(1 / delta))

    def one_round_for_all(sigma, rounds, delta):
        """The rounds do not show in your answer."""
        return _spent(1 / (2 * sigma**2), math.log(1 / delta))


BUDGETS = ((1.0, 1, 1e-5), (4.0, 100, 1e-5), (2.0, 20, 1e-6))


def check_epsilon(epsilon: Student, cases: tuple[tuple[float, int, float], ...] = BUDGETS) -> None:
    """Check: ε of several rounds, against Opacus's accountant."""
    for sigma, rounds, delta in cases:
        given, true = (sigma, rounds, delta), _spent(rounds / (2 * sigma**2), math.log(1 / delta))
        case = f"for σ = {sigma}, {rounds} rounds and δ = {delta}"
        expect("noise-epsilon", epsilon, given, true, "ε", case, tolerance=1e-3)
    reference = gi.privacy.privacy_spent(sigma, 1.0, rounds, delta)
    right(f"ε = {true:.2f}; Opacus, which converts a little more sharply, says {reference:.2f}.")
