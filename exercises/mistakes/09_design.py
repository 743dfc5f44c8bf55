"""Plausible mistakes in the exercises to chapter 9; each must be refused by the right hint."""

from __future__ import annotations

import torch
from torch import nn

from gradinv_edu.coursework.mistakes import planted
from gradinv_edu.defenses import filter_bound


def _most(pixels, positions, places, overlap=1, slack=0):
    counts = [F * (positions + places - overlap * F) for F in range(1, places + 1)]
    enough = [F for F, count in enumerate(counts, start=1) if count >= pixels + slack]
    return min(enough, default=places + 1) - 1


def _side(size, kernel, stride, padding):
    return (size + 2 * padding - kernel) // stride + 1


@planted("09-most", says="every equation as news")
def repeated_equations_counted(channels, size, kernel, stride, padding):
    positions = _side(size, kernel, stride, padding) ** 2
    return _most(channels * size**2, positions, channels * kernel**2, overlap=0)


@planted("09-most", says="As many equations as pixels")
def at_most_for_fewer_than(channels, size, kernel, stride, padding):
    positions = _side(size, kernel, stride, padding) ** 2
    return _most(channels * size**2, positions, channels * kernel**2, slack=1)


@planted("09-most", says="two sides")
def positions_of_one_side(channels, size, kernel, stride, padding):
    return _most(channels * size**2, _side(size, kernel, stride, padding), channels * kernel**2)


@planted("09-most", says="without padding")
def padding_forgotten(channels, size, kernel, stride, padding):
    return _most(channels * size**2, _side(size, kernel, stride, 0) ** 2, channels * kernel**2)


@planted("09-most", says="stride 1")
def stride_forgotten(channels, size, kernel, stride, padding):
    return _most(channels * size**2, _side(size, kernel, 1, padding) ** 2, channels * kernel**2)


@planted("09-most", says="One too many")
def first_number_that_suffices(channels, size, kernel, stride, padding):
    return filter_bound(channels, size, kernel, stride, padding) + 1


def _open(matrix):
    return torch.linalg.svd(matrix)[2][-1]


@planted("09-another", says="itself, or nearly")
def the_same_picture(weight, gradient, picture):
    return picture.clone()


@planted("09-another", says="everything above it notices")
def open_for_the_gradient_constraints_only(weight, gradient, picture):
    return picture + _open(gradient)


@planted("09-another", says="a second time")
def open_for_the_weight_constraints_only(weight, gradient, picture):
    return picture + _open(weight)


@planted("09-another", says="everything above it notices")
def brighter(weight, gradient, picture):
    return picture + 0.5


@planted("09-another", says="everything above it notices")
def column_for_row_of_the_svd(weight, gradient, picture):
    return picture + torch.linalg.svd(torch.cat([weight, gradient]))[2][:, -1]


def _gain(matrix, covariance):
    return covariance @ matrix.T @ torch.linalg.inv(matrix @ covariance @ matrix.T)


@planted("09-likely", says="beyond what the mean picture")
def mean_not_taken_off_the_equations(matrix, known, mean, covariance):
    return mean + _gain(matrix, covariance) @ known


@planted("09-likely", says="to be added to the mean picture")
def mean_not_added(matrix, known, mean, covariance):
    return _gain(matrix, covariance) @ (known - matrix @ mean)


@planted("09-likely", says="wrong sign")
def correction_subtracted(matrix, known, mean, covariance):
    return mean - _gain(matrix, covariance) @ (known - matrix @ mean)


@planted("09-likely", says="nearest to the mean")
def covariance_not_used(matrix, known, mean, covariance):
    return mean + torch.linalg.pinv(matrix) @ (known - matrix @ mean)


@planted("09-likely", says="least norm")
def least_norm(matrix, known, mean, covariance):
    return torch.linalg.pinv(matrix) @ known


def _unbeaten(scores):
    return {
        name
        for name, (a, p) in scores.items()
        if not any((b, q) != (a, p) and b >= a and q <= p for b, q in scores.values())
    }


def _middle(values):
    return sorted(values)[len(values) // 2]


@planted("09-front", says="best seed")
def best_seed_for_mean(designs):
    return _unbeaten({n: (max(acc), _middle(db)) for n, acc, db in designs})


@planted("09-front", says="moves your average")
def mean_for_median(designs):
    return _unbeaten({n: (sum(acc), sum(db)) for n, acc, db in designs})


@planted("09-front", says="*low* PSNR")
def high_psnr_for_good(designs):
    return _unbeaten({n: (sum(acc), -_middle(db)) for n, acc, db in designs})


@planted("09-front", says="leak much")
def leaking_designs_left_out(designs):
    kept = _unbeaten({n: (sum(acc), _middle(db)) for n, acc, db in designs})
    return {n for n, _, db in designs if n in kept and _middle(db) < 100}


@planted("09-front", says="nothing speaks for it")
def beaten_only_if_worse_in_both(designs):
    scores = {n: (sum(acc), _middle(db)) for n, acc, db in designs}
    return {
        n for n, (a, p) in scores.items() if not any(b > a and q < p for b, q in scores.values())
    }


def _convolutions(model):
    return [layer for layer in model if isinstance(layer, nn.Conv2d)]


@planted("09-hide", says="not the first")
def narrowest_layer_anywhere(model, input_shape):
    widths = [conv.out_channels for conv in _convolutions(model)]
    return bool(widths) and min(widths) <= filter_bound(*input_shape[:2], 3, 2, 1)


@planted("09-hide", says="rich in parameters")
def parameters_counted(model, input_shape):
    return sum(p.numel() for p in model.parameters()) < 1000


@planted("09-hide", says="one unit's ratio")
def dense_rows_counted_like_filters(model, input_shape):
    first = next(layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear))
    return first.weight.shape[0] <= filter_bound(*input_shape[:2], 3, 2, 1)


@planted("09-hide", says="as many equations")
def one_filter_too_many(model, input_shape):
    first = _convolutions(model)[:1]
    return bool(first) and first[0].out_channels <= 1 + filter_bound(*input_shape[:2], 3, 2, 1)


@planted("09-hide", says="Depth is no count")
def deep_networks_trusted(model, input_shape):
    first = _convolutions(model)[:1]
    narrow = bool(first) and first[0].out_channels <= filter_bound(*input_shape[:2], 3, 2, 1)
    return narrow or len(_convolutions(model)) > 5
