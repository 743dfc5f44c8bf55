"""Plausible mistakes in the exercises to chapter 4; each must be refused by the right hint."""

from __future__ import annotations

import torch

from gradinv_edu.coursework.mistakes import planted


def _patches(inputs, k, kernel_size, stride):
    side = len(k)
    return inputs.unfold(0, kernel_size, stride).unfold(1, kernel_size, stride)[:side, :side]


def _sum(k, patches):
    return torch.einsum("ij,ijuv->uv", k, patches)


@planted("04-gradient", says="mean over the positions")
def mean_for_sum(inputs, output_gradient, kernel_size, stride):
    k = output_gradient
    return _sum(k, _patches(inputs, k, kernel_size, stride)) / k.numel(), k.mean()


@planted("04-gradient", says="forgot the stride")
def forgotten_stride(inputs, output_gradient, kernel_size, stride):
    k = output_gradient
    return _sum(k, _patches(inputs, k, kernel_size, 1)), k.sum()


@planted("04-gradient", says="180 degrees")
def kernel_flipped(inputs, output_gradient, kernel_size, stride):
    k = output_gradient
    return _sum(k, _patches(inputs, k, kernel_size, stride)).flip(0, 1), k.sum()


@planted("04-gradient", says="loudest position")
def one_position_only(inputs, output_gradient, kernel_size, stride):
    k = output_gradient * (output_gradient.abs() == output_gradient.abs().max())
    return _sum(k, _patches(inputs, k, kernel_size, stride)), k.sum()


@planted("04-gradient", says="exchanged")
def rows_and_columns_exchanged(inputs, output_gradient, kernel_size, stride):
    k = output_gradient
    return _sum(k, _patches(inputs, k, kernel_size, stride)).T, k.sum()


def _rows(kernel, size, stride, padding, width=None):
    places, wide = len(kernel), size + 2 * padding
    side = (wide - places) // stride + 1
    rows = torch.zeros(side * side, wide * wide, dtype=kernel.dtype)
    for i in range(side):
        for j in range(side):
            for u in range(places):
                for v in range(places):
                    at = (i * stride + u) * (width or wide) + j * stride + v
                    rows[i * side + j, at] = kernel[u, v]
    return rows


def _inside(rows, size, padding):
    wide = size + 2 * padding
    inside = slice(padding, padding + size)
    return rows.reshape(-1, wide, wide)[:, inside, inside].reshape(len(rows), -1)


@planted("04-matrix", says="forgot the stride")
def stride_of_one(kernel, size, stride, padding):
    return _inside(_rows(kernel, size, 1, padding), size, padding)


@planted("04-matrix", says="forgot the padding")
def padding_of_none(kernel, size, stride, padding):
    return _rows(kernel, size, stride, 0)


@planted("04-matrix", says="zeros of the padding as pixels")
def padding_as_pixels(kernel, size, stride, padding):
    return _rows(kernel, size, stride, padding)


@planted("04-matrix", says="transposed")
def transposed_matrix(kernel, size, stride, padding):
    return _inside(_rows(kernel, size, stride, padding), size, padding).T


@planted("04-matrix", says="180 degrees")
def matrix_of_the_flipped_kernel(kernel, size, stride, padding):
    return _inside(_rows(kernel.flip(0, 1), size, stride, padding), size, padding)


@planted("04-matrix", says="picture's width")
def gap_of_the_output_width(kernel, size, stride, padding):
    side = (size + 2 * padding - len(kernel)) // stride + 1
    return _inside(_rows(kernel, size, stride, padding, width=side), size, padding)


@planted("04-glaring", says="one sign")
def the_same_everywhere(inputs, kernel_size):
    positions = len(inputs) - kernel_size + 1
    return torch.ones(positions, positions, dtype=inputs.dtype)


@planted("04-glaring", says="sums to zero")
def exactly_cancelled(inputs, kernel_size):
    k = the_same_everywhere.answer(inputs, kernel_size) * 0
    k[0, 0], k[-1, -1] = 1.0, -1.0
    return k


@planted("04-glaring", says="too tame")
def tame_shares(inputs, kernel_size):
    k = the_same_everywhere.answer(inputs, kernel_size)
    k[0, 0] = -0.1
    return k


@planted("04-glaring", says="between −1 and 1")
def only_louder(inputs, kernel_size):
    return 100 * the_same_everywhere.answer(inputs, kernel_size)


@planted("04-glaring", says="each position")
def one_number_for_each_pixel(inputs, kernel_size):
    return 2 * inputs - 1


@planted("04-count", says="forgot the positions")
def positions_forgotten(channels, filters, kernel_size, stride, padding, size):
    places = channels * kernel_size**2
    return filters * places, min(filters, places)


@planted("04-count", says="forgot the stride")
def stride_forgotten(channels, filters, kernel_size, stride, padding, size):
    places = channels * kernel_size**2
    return filters * places, min(filters, (size + 2 * padding - kernel_size + 1) ** 2, places)


@planted("04-count", says="forgot the padding")
def padding_forgotten(channels, filters, kernel_size, stride, padding, size):
    places = channels * kernel_size**2
    return filters * places, min(filters, ((size - kernel_size) // stride + 1) ** 2, places)


@planted("04-count", says="forgot the channels")
def channels_forgotten(channels, filters, kernel_size, stride, padding, size):
    side = (size + 2 * padding - kernel_size) // stride + 1
    return filters * kernel_size**2, min(filters, side**2, kernel_size**2)


@planted("04-count", says="ratio's divisor")
def one_equation_a_filter(channels, filters, kernel_size, stride, padding, size):
    return filters, filters


@planted("04-true", says="patches that must agree")
def one_position_or_one_colour(inputs, output_gradient, kernel_size):
    patches = inputs.unfold(0, kernel_size, 1).unfold(1, kernel_size, 1)
    active = patches[output_gradient != 0]
    if output_gradient.sum() == 0:
        return False
    return len(active) == 1 or bool((active == active[0, 0, 0]).all())


@planted("04-true", says="alike")
def one_active_position(inputs, output_gradient, kernel_size):
    return int((output_gradient != 0).sum()) == 1


@planted("04-true", says="carry no gradient")
def all_patches_compared(inputs, output_gradient, kernel_size):
    patches = inputs.unfold(0, kernel_size, 1).unfold(1, kernel_size, 1).flatten(0, 1)
    alike = bool((patches == patches[0]).all())
    return output_gradient.sum() != 0 and (alike or int((output_gradient != 0).sum()) == 1)


@planted("04-true", says="negative k")
def positive_entries_only(inputs, output_gradient, kernel_size):
    sign = 1 if (output_gradient > 0).any() else -1
    patches = inputs.unfold(0, kernel_size, 1).unfold(1, kernel_size, 1)
    active = patches[sign * output_gradient > 0]
    return len(active) > 0 and bool((active == active[0]).all())


@planted("04-true", says="sum to zero")
def zero_sum_forgotten(inputs, output_gradient, kernel_size):
    patches = inputs.unfold(0, kernel_size, 1).unfold(1, kernel_size, 1)
    active = patches[output_gradient != 0]
    return len(active) == 0 or bool((active == active[0]).all())
