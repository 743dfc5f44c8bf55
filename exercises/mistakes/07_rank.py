"""Plausible mistakes in the exercises to chapter 7; each must be refused by the right hint."""

from __future__ import annotations

import torch
from torch import nn

from gradinv_edu.coursework.mistakes import planted


def _placed(like, at, values):
    placed = torch.zeros_like(like)
    placed[at] = values
    return placed


@planted("07-twice", says="wrong filter")
def each_at_its_own_filter(weight, output_gradient, first, second):
    outputs = _placed(output_gradient, first, output_gradient[first])
    return outputs, _placed(weight, second, weight[second])


@planted("07-twice", says="exchanged the two filters")
def filters_exchanged(weight, output_gradient, first, second):
    outputs = _placed(output_gradient, first, output_gradient[second])
    return outputs, _placed(weight, second, weight[first])


@planted("07-twice", says="with itself only")
def one_filter_alone(weight, output_gradient, first, second):
    outputs = _placed(output_gradient, first, output_gradient[first])
    return outputs, _placed(weight, first, weight[first])


@planted("07-twice", says="kernel turned")
def kernel_turned(weight, output_gradient, first, second):
    outputs = _placed(output_gradient, second, output_gradient[first])
    return outputs, _placed(weight, first, weight[second].flip(1, 2))


@planted("07-twice", says="up to their sign")
def one_side_moved_over(weight, output_gradient, first, second):
    outputs = _placed(output_gradient, second, output_gradient[first])
    return outputs, -_placed(weight, first, weight[second])


@planted("07-twice", says="Both of yours are zero")
def nothing_equals_nothing(weight, output_gradient, first, second):
    return torch.zeros_like(output_gradient), torch.zeros_like(weight)


def _law(channels, size, filters, kernel, stride, shared=1, saturate=True, joined=False, cap=True):
    positions = ((size - kernel) // stride + 1) ** 2
    rank_k = 0
    for i in range(stride):
        for j in range(stride):
            rows = filters * len(range(i, kernel, stride)) * len(range(j, kernel, stride))
            pixels = len(range(i, size, stride)) * len(range(j, size, stride))
            if joined:
                rank_k += min(channels * rows, pixels)
            else:
                rank_k += channels * (min(rows, pixels) if saturate else rows)
    total = filters * positions + rank_k - shared * filters**2
    return min(channels * size**2, total) if cap else total


@planted("07-law", says="in both sets")
def pairs_of_filters_forgotten(channels, size, filters, kernel, stride):
    return _law(channels, size, filters, kernel, stride, shared=0)


@planted("07-law", says="more rows than pixels")
def gradient_rows_counted(channels, size, filters, kernel, stride):
    return _law(channels, size, filters, kernel, stride, saturate=False)


@planted("07-law", says="stays within one channel")
def channels_share_their_pixels(channels, size, filters, kernel, stride):
    return _law(channels, size, filters, kernel, stride, joined=True)


@planted("07-law", says="only")
def more_rank_than_unknowns(channels, size, filters, kernel, stride):
    return _law(channels, size, filters, kernel, stride, cap=False)


@planted("07-law", says="second set")
def weight_constraints_alone(channels, size, filters, kernel, stride):
    positions = ((size - kernel) // stride + 1) ** 2
    return min(channels * size**2, filters * positions)


@planted("07-law", says="is a float")
def division_that_makes_a_float(channels, size, filters, kernel, stride):
    return 1.0 * _law(channels, size, filters, kernel, stride)


@planted("07-share", says="one for each equation")
def pseudoinverse_on_the_right(equations):
    return (equations @ torch.linalg.pinv(equations)).diag()


@planted("07-share", says="does not mean that it is known")
def pixels_that_are_met(equations):
    return (equations != 0).any(dim=0).double()


@planted("07-share", says="multiplied by ten")
def sum_of_squares(equations):
    return equations.square().sum(dim=0)


@planted("07-share", says="which power")
def length_for_share(equations):
    return (torch.linalg.pinv(equations, rtol=1e-10) @ equations).diag().square()


@planted("07-share", says="cut the singular values off")
def rounding_for_rank(equations):
    return torch.linalg.svd(equations, full_matrices=False)[2].square().sum(dim=0)


_ONE = [nn.Flatten(), nn.Linear(64, 1), nn.Tanh(), nn.Linear(1, 10)]
_POOLED = [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 200), nn.Tanh(), nn.Linear(200, 10)]


@planted("07-misjudged", says="in this order")
def the_other_order():
    return nn.Sequential(*_POOLED), nn.Sequential(*_ONE)


@planted("07-misjudged", says="has 650 parameters")
def as_small_as_a_dense_layer():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Sequential(*_POOLED)


@planted("07-misjudged", says="its numbers")
def dead_by_its_biases():
    dead = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    nn.init.constant_(dead[1].bias, -100.0)
    return nn.Sequential(*_ONE), dead


@planted("07-misjudged", says="before it is looked at")
def small_and_pooled():
    small = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 10))
    return small, nn.Sequential(*_POOLED)


@planted("07-misjudged", says="5000 at least")
def silent_because_it_is_small():
    small = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 10))
    return nn.Sequential(*_ONE), small


def _full(report):
    return all(r == n for r, n in zip(report.ranks, report.layer_unknowns, strict=True))


@planted("07-verdict", says="counted equations")
def equations_counted(report):
    enough = all(e >= n for e, n in zip(report.equations, report.layer_unknowns, strict=True))
    return enough and not report.stops, report.jacobian_rank / report.unknowns


@planted("07-verdict", says="something cannot be undone")
def stops_overlooked(report):
    return _full(report), report.jacobian_rank / report.unknowns


@planted("07-verdict", says="in the middle")
def first_and_last_layer_only(report):
    ends = all(report.ranks[i] == report.layer_unknowns[i] for i in (0, -1))
    return ends and not report.stops, report.jacobian_rank / report.unknowns


@planted("07-verdict", says="need not walk")
def weakest_layer_for_the_whole(report):
    weakest = min(r / n for r, n in zip(report.ranks, report.layer_unknowns, strict=True))
    return _full(report) and not report.stops, weakest


@planted("07-verdict", says="number of parameters")
def parameters_counted(report):
    return _full(report) and not report.stops, min(1.0, report.parameters / report.unknowns)


@planted("07-verdict", says="does not arrive")
def more_rank_than_unknowns_asked_for(report):
    more = all(r > n for r, n in zip(report.ranks, report.layer_unknowns, strict=True))
    return more and not report.stops, report.jacobian_rank / report.unknowns
