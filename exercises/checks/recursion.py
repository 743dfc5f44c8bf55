"""Checks of the exercises on recursion."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import (
    AUTOGRAD,
    Mistakes,
    Student,
    ask,
    compare,
    demand,
    each,
    known,
    normal,
    pair,
    right,
    tensor,
)


def _slopes(z: Tensor, slope: float = 0.2) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, slope))


def _layer(name: str, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope of an activation at its output, z, and where z is known."""
    everywhere = torch.ones_like(a, dtype=torch.bool)
    return {
        "leaky_relu": (_slopes(a), a / _slopes(a), everywhere),
        "tanh": (1 - a**2, a.atanh(), everywhere),
        "sigmoid": (a * (1 - a), a.logit(), everywhere),
        "relu": (_slopes(a, 0.0), a, a > 0),
    }[name]


def _step(W: Tensor, k: Tensor, a: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    slope, z, mask = _layer(name, a)
    return (W.T @ k) * slope, z, mask


class StepDown(Mistakes, of="recursion-step", own=AUTOGRAD):
    def transposed_weight(W, k, a, name):
        """You multiplied by W where k must go the other way: from the outputs back to the inputs.
        Which index is summed?"""
        return (W @ k) * _layer(name, a)[0], *_step(W, k, a, name)[1:]

    def transposed_weight_without_slope(W, k, a, name):
        """Like transposed_weight."""
        return W @ k, *_step(W, k, a, name)[1:]

    def relu_taken_for_leaky(W, k, a, name):
        """The slope of a dead ReLU is zero: nothing of k passes there."""
        slope = _slopes(a) if name == "relu" else _layer(name, a)[0]
        return (W.T @ k) * slope, *_step(W, k, a, name)[1:]

    def relu_passed_by(W, k, a, name):
        """Like relu_taken_for_leaky."""
        back = W.T @ k if name == "relu" else _step(W, k, a, name)[0]
        return back, *_step(W, k, a, name)[1:]

    def slope_forgotten(W, k, a, name):
        """You handed k through the layer, but not through the activation below it."""
        return W.T @ k, *_step(W, k, a, name)[1:]

    def activation_for_slope(W, k, a, name):
        """You multiplied by the activation itself. The chain rule asks how fast it changes: its
        slope."""
        return (W.T @ k) * a, *_step(W, k, a, name)[1:]

    def divided_by_the_slope(W, k, a, name):
        """You divided by the slope. The chain rule multiplies; what is undone by dividing is z."""
        return (W.T @ k) / _layer(name, a)[0], *_step(W, k, a, name)[1:]

    def slopes_of_the_wrong_layer(W, k, a, name):
        """The slopes are those of another layer: they belong to the z below, which went into the
        activation, and not to this layer's own output."""
        slope = _slopes(W @ a) if len(W) == len(a) else 1
        return (W.T @ k) * slope, *_step(W, k, a, name)[1:]

    def slope_before_the_layer(W, k, a, name):
        """Like slopes_of_the_wrong_layer."""
        return W.T @ (k * _layer(name, a)[0]), *_step(W, k, a, name)[1:]

    def outputs_taken_for_z(W, k, a, name):
        """You took the outputs for z in the slope: there σ′ is asked at z, and you have σ(z)."""
        squashed = {"tanh": a.tanh(), "sigmoid": a.sigmoid()}.get(name, a)
        return (W.T @ k) * _layer(name, squashed)[0], *_step(W, k, a, name)[1:]

    def leaky_slope_applied_again(W, k, a, name):
        """You applied the leaky slope once more. To undo it, divide where the output is
        negative."""
        back, z, mask = _step(W, k, a, name)
        return back, a * _slopes(a) if name == "leaky_relu" else z, mask

    def leaky_slope_left_in(W, k, a, name):
        """Like leaky_slope_applied_again."""
        back, z, mask = _step(W, k, a, name)
        return back, a if name == "leaky_relu" else z, mask

    def slope_divided_out_everywhere(W, k, a, name):
        """You divided by the slope everywhere; positive outputs went through unchanged."""
        back, z, mask = _step(W, k, a, name)
        return back, a / 0.2 if name == "leaky_relu" else z, mask

    def logit_for_tanh(W, k, a, name):
        """You undid tanh with the sigmoid's inverse, or the other way round."""
        back, z, mask = _step(W, k, a, name)
        return back, a.logit() if name == "tanh" else z, mask

    def atanh_for_sigmoid(W, k, a, name):
        """Like logit_for_tanh."""
        back, z, mask = _step(W, k, a, name)
        return back, a.atanh() if name == "sigmoid" else z, mask

    def twice_atanh(W, k, a, name):
        """Like logit_for_tanh."""
        back, z, mask = _step(W, k, a, name)
        return back, 2 * a.atanh() if name in ("tanh", "sigmoid") else z, mask

    def mask_turned_round(W, k, a, name):
        """Your mask is turned round: the dead units of a ReLU are the unknown ones."""
        back, z, mask = _step(W, k, a, name)
        return back, z, ~mask if name == "relu" else mask

    def zeros_of_a_relu_believed(W, k, a, name):
        """You say that every z of a ReLU is known. Where its output is zero, all one knows is that
        z is not positive: it could be anything there."""
        return *_step(W, k, a, name)[:2], torch.ones_like(a)

    def negative_outputs_left_out(W, k, a, name):
        """{name} is one-to-one: nothing is unknown there, and you left entries out."""
        return *_step(W, k, a, name)[:2], a > 0


def check_step_down(step_down: Student, seed: int = 1, units: int = 7) -> None:
    """Check: the output gradient, handed one layer down, and an activation undone."""
    z = normal(seed + 2, units)
    activations = {"leaky_relu": z * _slopes(z), "tanh": z.tanh(), "sigmoid": z.sigmoid()}
    three = "Return three things: the output gradient below, z below, and the mask."
    for outputs in (units, units - 2):
        W, k = normal(seed, outputs, units), normal(seed + 1, outputs)
        for name, a in {**activations, "relu": z.relu()}.items():
            given = (W, k, a, name)
            answer = ask(step_down, *given, case=f"for {name}")
            demand(isinstance(answer, tuple | list) and len(answer) == 3, three)
            wrong = [*known("recursion-step", given)]
            below = f"the output gradient below {name}"
            compare(answer[0], _step(*given)[0], below, ((hint, w[0]) for hint, w in wrong))
            mask = tensor(answer[2], "the mask") != 0
            demand(mask.shape == z.shape, f"The mask of {name} needs one entry for each unit.")
            if name == "relu":
                demand(not torch.equal(mask, z <= 0), StepDown.mask_turned_round)
                demand(not mask[z <= 0].any(), StepDown.zeros_of_a_relu_believed)
                found = torch.where(mask, tensor(answer[1], "z"), 0.0)
                compare(found, a, "the known part of relu's z")
            else:
                said = ((hint, w[1]) for hint, w in wrong)
                compare(answer[1], z, f"z below {name}", said, tolerance=1e-7)
            careful = mask[z > 0].all() and (name == "relu" or mask.all())
            demand(careful, StepDown.negative_outputs_left_out, name=name)
    right("One transpose, one slope, one inverse: what is known goes down, the rest is left open.")


def _walk(weights, gradients, slope=0.2, shift=0, power=2, bottom=0):
    """The walk down, right by default and wrong in one respect by choice."""
    top = gi.fully_connected.recover_from_cross_entropy(weights[-1], gradients[-1])[0]
    x, k = top.inputs[0], top.k[0]
    for layer in range(len(weights) - 2, bottom - 1, -1):
        k = (weights[layer + 1].T @ k) * _slopes(x, slope)
        x = gradients[min(layer + shift, len(weights) - 2)].T @ k / k.norm() ** power
    return x, top.targets[0]


class Walk(Mistakes, of="recursion-walk"):
    def slopes_left_out(weights, gradients):
        """You handed k through the layer, but not through the activation below it."""
        return _walk(weights, gradients, slope=1.0)

    def gradient_of_the_wrong_layer(weights, gradients):
        """You used the gradient of the layer above. Each layer's own gradient is its k times its
        own input."""
        return _walk(weights, gradients, shift=1)

    def divided_by_the_norm(weights, gradients):
        """You divided by |k| where least squares divides by |k|²: the picture's length is wrong."""
        return _walk(weights, gradients, power=1)

    def one_layer_short(weights, gradients):
        """That is the input of an inner layer: you stopped before the bottom."""
        return _walk(weights, gradients, bottom=1)

    def two_layers_short(weights, gradients):
        """Like one_layer_short."""
        return _walk(weights, gradients, bottom=2)

    def input_of_the_last_layer(weights, gradients):
        """Like one_layer_short."""
        return _walk(weights, gradients, bottom=len(weights) - 1)

    def label_guessed(weights, gradients):
        """The label comes from the last layer, which `recover_from_cross_entropy` solves for
        you."""
        return _walk(weights, gradients)[0], 2


def check_walk(walk: Student, seed: int = 3, units: int = 12, depth: int = 3) -> None:
    """Check: picture and label through a bias-free network."""
    for label in (2, 0):
        sizes = [units] * (depth + 1) + [6]
        weights = [normal(seed + i, m, n) / n**0.5 for i, (n, m) in enumerate(pairwise(sizes))]
        x = normal(seed + 99, units).abs()
        given = (weights, _gradients(weights, x, label))
        picture, found = pair(ask(walk, *given), "walk(...)")
        wrong = ((hint, both[0]) for hint, both in known("recursion-walk", given))
        compare(picture, x, "the picture", wrong, tolerance=1e-6)
        demand(int(tensor(found, "the label")) == label, Walk.label_guessed)
    right(f"Through {depth + 1} layers without a bias, and nobody told you the label.")


def _gradients(weights: list[Tensor], x: Tensor, label: int) -> list[Tensor]:
    """What the client sends: leaky ReLU of slope 0.2 between layers, softmax cross-entropy."""
    leaves = [w.clone().requires_grad_() for w in weights]
    for layer, w in enumerate(leaves):
        x = w @ (x if layer == 0 else nn.functional.leaky_relu(x, 0.2))
    loss = nn.functional.cross_entropy(x[None], torch.tensor([label]))
    return list(torch.autograd.grad(loss, leaves))


@dataclass(frozen=True)
class Account:
    """What a recovery says of itself, without its verdict.

    Attributes
    ----------
    full_rank : tuple of bool
        For each layer, from the last to the first.
    residuals : tuple of float
        Likewise: what the layer's answer leaves unexplained, relative.
    mismatch : float
        How far the gradient at the answer is from the one that was sent, relative.
    answers : int
        How many pictures explain the gradient.
    precision : float
        Rounding of the gradients that were sent: about 1e-16 for float64, 1e-7 for float32.
    """

    full_rank: tuple[bool, ...]
    residuals: tuple[float, ...]
    mismatch: float
    answers: int
    precision: float


def account(recovery: gi.Recovery, precision: float) -> Account:
    """Make the :class:`Account` of a recovery."""
    return Account(
        tuple(layer.full_rank for layer in recovery.layers),
        tuple(layer.residual for layer in recovery.layers),
        float("inf") if recovery.mismatch is None else recovery.mismatch,
        len(recovery.candidates),
        precision,
    )


def _small(a: Account, rounding: float | None = None) -> bool:
    rounding = rounding or 1000 * a.precision
    return max(a.residuals) <= rounding and a.mismatch <= rounding


class MayTrust(Mistakes, of="recursion-trust"):
    def float64_equality_for_float32(a):
        """These gradients were float32, so 1e-7 is rounding, and you take it for an error. Measure
        what is left by the precision that was sent."""
        return _small(a, 1e-12) and all(a.full_rank) and a.answers == 1

    def first_answer_taken(a):
        """Two pictures explain this gradient, and you trust the first: which was the client's?"""
        return _small(a) and all(a.full_rank)

    def residual_and_mismatch_only(a):
        """A layer lacks rank, and you trust the picture: its residual is small because there are
        many answers, of which it is one."""
        return _small(a) and a.answers == 1

    def last_layer_of_the_table_only(a):
        """The layer that lacks rank is not the last in the table: look at all of them."""
        return _small(a) and a.full_rank[-1] and a.answers == 1

    def mismatch_forgotten(a):
        """The gradient at the answer is not the one that was sent: they differ by 30%. All layers
        had their say, and the whole does not fit."""
        return max(a.residuals) <= 1000 * a.precision and all(a.full_rank) and a.answers == 1

    def residuals_forgotten(a):
        """A layer in the middle leaves 2% of its equations unexplained, and you trust it."""
        return a.mismatch <= 1000 * a.precision and all(a.full_rank) and a.answers == 1


def check_may_trust(may_trust: Student, seed: int = 5) -> None:
    """Check: from the account of a recovery to a verdict."""
    double, single = (torch.finfo(t).eps for t in (torch.float64, torch.float32))
    full, tiny = (True,) * 3, (1e-15, 1e-14, 3e-14)
    middle, coarse = (1e-15, 0.02, 1e-14), (1e-8, 2e-7, 3e-7)
    accept = "Everything is in order in this account, down to rounding, and you do not trust it."
    lacking, inner = MayTrust.residual_and_mismatch_only, MayTrust.last_layer_of_the_table_only
    rounded = MayTrust.float64_equality_for_float32
    cases = [
        (_recovered(torch.float64, 10, seed), True, accept),
        (_recovered(torch.float32, 10, seed), True, rounded),
        (Account(full, coarse, 4e-7, 1, single), True, rounded),
        (_recovered(torch.float64, 1, seed), False, MayTrust.first_answer_taken),
        (Account((True, True, False), tiny, 1e-14, 1, double), False, lacking),
        (Account((True, False, True), tiny, 1e-14, 1, double), False, inner),
        (Account(full, tiny, 0.3, 1, double), False, MayTrust.mismatch_forgotten),
        (Account(full, middle, 1e-14, 1, double), False, MayTrust.residuals_forgotten),
    ]
    each(may_trust, cases)
    right("Rank and residual of every layer, one answer, and the gradient itself once more.")


def _recovered(dtype: torch.dtype, outputs: int, seed: int) -> Account:
    """The account of a real recovery: twins where one logit is all there is."""
    model = gi.models.mlp([16, 24, outputs], activation="leaky_relu", bias=False, dtype=dtype)
    x = normal(seed, 1, 16).abs().to(dtype)
    with torch.no_grad():
        sure = (model(x) > 0).to(dtype)
    loss: nn.Module = nn.BCEWithLogitsLoss() if outputs == 1 else nn.CrossEntropyLoss()
    update = gi.observe(model, loss, x, sure if outputs == 1 else torch.tensor([3]))
    return account(gi.recover(model, update, (16,), loss), torch.finfo(dtype).eps)
