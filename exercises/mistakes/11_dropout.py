"""Plausible mistakes in the exercises to chapter 11; each must be refused by the right hint."""

from __future__ import annotations

import math

import torch
from torch import nn

from gradinv_edu.coursework.mistakes import planted


def _met(weight_gradient, bias_gradient):
    return weight_gradient[0] / bias_gradient[0]


@planted("11-features", says="as the classifier met them")
def scale_left_in(weight_gradient, bias_gradient, rate):
    a = _met(weight_gradient, bias_gradient)
    return a, a != 0


@planted("11-features", says="once more")
def scaled_up_for_down(weight_gradient, bias_gradient, rate):
    a = _met(weight_gradient, bias_gradient)
    return a / (1 - rate), a != 0


@planted("11-features", says="share that stays")
def rate_for_what_is_kept(weight_gradient, bias_gradient, rate):
    a = _met(weight_gradient, bias_gradient)
    return a * rate, a != 0


@planted("11-features", says="which were *kept*")
def dropped_for_kept(weight_gradient, bias_gradient, rate):
    a = _met(weight_gradient, bias_gradient)
    return a * (1 - rate), a == 0


@planted("11-features", says="each of the classifier's outputs")
def rows_for_columns(weight_gradient, bias_gradient, rate):
    a = _met(weight_gradient, bias_gradient)
    return a * (1 - rate), (weight_gradient != 0).any(dim=1)


@planted("11-features", says="small and were kept")
def small_taken_for_dropped(weight_gradient, bias_gradient, rate):
    a = _met(weight_gradient, bias_gradient)
    return a * (1 - rate), a.abs() > 1e-2


def _distances(model, picture, label, observed, mask, create_graph=True):
    value = nn.functional.cross_entropy(model[-1](model[:-1](picture) * mask), label)
    found = torch.autograd.grad(value, list(model.parameters()), create_graph=create_graph)
    return [(g - seen).square().sum() for g, seen in zip(found, observed, strict=True)]


@planted("11-mismatch", says="left the mask out")
def mask_ignored(model, picture, label, observed, mask):
    return sum(_distances(model, picture, label, observed, torch.ones_like(mask)))


@planted("11-mismatch", says="holds dropout's scale")
def mask_made_of_zeros_and_ones(model, picture, label, observed, mask):
    return sum(_distances(model, picture, label, observed, (mask > 0).double()))


@planted("11-mismatch", says="its square was asked")
def distance_for_its_square(model, picture, label, observed, mask):
    return sum(_distances(model, picture, label, observed, mask)) ** 0.5


@planted("11-mismatch", says="classifier's gradients alone")
def classifier_only(model, picture, label, observed, mask):
    return sum(_distances(model, picture, label, observed, mask)[-2:])


@planted("11-mismatch", says="create_graph")
def graph_not_kept(model, picture, label, observed, mask):
    return sum(_distances(model, picture, label, observed, mask, create_graph=False))


def _solve(matrix, values):
    return torch.linalg.pinv(matrix) @ values


@planted("11-leave-out", says="zeros for numbers")
def zeros_as_numbers(weight, outputs, kept, gradient_rows, gradient):
    return _solve(torch.cat([weight, gradient_rows]), torch.cat([outputs, gradient]))


@planted("11-leave-out", says="gradient equations out")
def gradient_equations_left_out(weight, outputs, kept, gradient_rows, gradient):
    return _solve(weight[kept], outputs[kept])


@planted("11-leave-out", says="dropped those that were kept")
def mask_the_wrong_way_round(weight, outputs, kept, gradient_rows, gradient):
    matrix = torch.cat([weight[~kept], gradient_rows])
    return _solve(matrix, torch.cat([outputs[~kept], gradient]))


@planted("11-leave-out", says="zeros for numbers")
def values_masked_rows_not(weight, outputs, kept, gradient_rows, gradient):
    values = torch.where(kept, outputs, 0.0)
    return _solve(torch.cat([weight, gradient_rows]), torch.cat([values, gradient]))


@planted("11-leave-out", says="all weight equations out")
def every_weight_equation_left_out(weight, outputs, kept, gradient_rows, gradient):
    return _solve(gradient_rows, gradient)


@planted("11-protecting", says="without any dropout")
def narrow_in_any_case():
    return 2, 0.5


@planted("11-protecting", says="can spare")
def rate_too_low():
    return 3, 0.2


@planted("11-protecting", says="can spare")
def one_filter_too_many():
    return 4, 0.5


@planted("11-protecting", says="one half at most")
def rate_too_high():
    return 4, 0.8


@planted("11-protecting", says="a whole number")
def exchanged():
    return 0.5, 3


def _power(p, hidden):
    return math.floor(math.log(hidden) / math.log(p) + 1e-9)


def _settled(place, rate, hidden, redrawn):
    """What is to be said before any counting; None if it must be counted."""
    if place == "above" or rate < hidden:
        return 0
    return None if redrawn else math.inf


@planted("11-rounds", says="share that is kept")
def kept_for_dropped(place, rate, hidden, redrawn):
    known = _settled(place, rate, hidden, redrawn)
    return _power(1 - rate, hidden) if known is None else known


@planted("11-rounds", says="multiply")
def shares_added(place, rate, hidden, redrawn):
    known = _settled(place, rate, hidden, redrawn)
    return math.floor((1 - hidden) / (1 - rate) + 1e-9) if known is None else known


@planted("11-rounds", says="which way do you round")
def rounded_up(place, rate, hidden, redrawn):
    known = _settled(place, rate, hidden, redrawn)
    return 1 + _power(rate, hidden) if known is None else known


@planted("11-rounds", says="drawn once and kept")
def fresh_masks_assumed(place, rate, hidden, redrawn):
    known = _settled(place, rate, hidden, True)
    return _power(rate, hidden) if known is None else known


@planted("11-rounds", says="divides k away")
def place_not_looked_at(place, rate, hidden, redrawn):
    known = _settled("input", rate, hidden, redrawn)
    return _power(rate, hidden) if known is None else known


@planted("11-rounds", says="smaller share")
def one_kept_mask_always_enough(place, rate, hidden, redrawn):
    if place == "input" and not redrawn:
        return math.inf
    known = _settled(place, rate, hidden, redrawn)
    return _power(rate, hidden) if known is None else known
