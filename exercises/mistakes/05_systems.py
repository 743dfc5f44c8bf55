"""Plausible mistakes in the exercises to chapter 5; each must be refused by the right hint."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import conv_transpose2d

from gradinv_edu.coursework.mistakes import planted


def _rows(k, kernel_size, size, stride):
    rows = torch.zeros(kernel_size, kernel_size, size, size, dtype=k.dtype)
    for u in range(kernel_size):
        for v in range(kernel_size):
            for i in range(len(k)):
                for j in range(len(k)):
                    rows[u, v, i * stride + u, j * stride + v] = k[i, j]
    return rows.reshape(kernel_size**2, size**2)


@planted("05-rows", says="transposed")
def transposed_rows(output_gradient, kernel_size, size, stride):
    return _rows(output_gradient, kernel_size, size, stride).T


@planted("05-rows", says="forgot the stride")
def forgotten_stride(output_gradient, kernel_size, size, stride):
    return _rows(output_gradient, kernel_size, size, 1)


@planted("05-rows", says="opposite order")
def places_counted_backwards(output_gradient, kernel_size, size, stride):
    return _rows(output_gradient, kernel_size, size, stride).flip(0)


@planted("05-rows", says="number of positions")
def mean_for_sum(output_gradient, kernel_size, size, stride):
    return _rows(output_gradient, kernel_size, size, stride) / output_gradient.numel()


@planted("05-rows", says="coefficients are all alike")
def ones_for_k(output_gradient, kernel_size, size, stride):
    return _rows(torch.ones_like(output_gradient), kernel_size, size, stride)


def _solve(outputs, w0, w1, w2):
    found = [0.0, 0.0]
    for z in outputs:
        found.append((z - w1 * found[-1] - w2 * found[-2]) / w0)
    return torch.stack(found[2:])


@planted("05-substitute", says="opposite order")
def taps_reversed(outputs, weights):
    return _solve(outputs, weights[2], weights[1], weights[0])


@planted("05-substitute", says="you added it")
def added_for_subtracted(outputs, weights):
    return _solve(outputs, weights[0], -weights[1], -weights[2])


@planted("05-substitute", says="still multiplied")
def division_forgotten(outputs, weights):
    return _solve(outputs, 1.0, weights[1], weights[2])


@planted("05-substitute", says="two pixels back")
def one_earlier_pixel(outputs, weights):
    return _solve(outputs, weights[0], weights[1], 0.0)


@planted("05-substitute", says="earlier outputs")
def outputs_for_pixels(outputs, weights):
    padded = torch.cat([torch.zeros(2, dtype=outputs.dtype), outputs])
    return (outputs - weights[1] * padded[1:-1] - weights[2] * padded[:-2]) / weights[0]


@planted("05-count", says="already says that it is lost")
def too_few_filters():
    return nn.Conv2d(1, 1, 2, stride=2), (1, 4, 4)


@planted("05-count", says="rank is full")
def too_many_filters():
    return nn.Conv2d(1, 4, 2, stride=2), (1, 4, 4)


@planted("05-count", says="share no pixel")
def overlapping_patches():
    return nn.Conv2d(1, 3, 2), (1, 4, 4)


@planted("05-count", says="weights the picture is determined")
def weights_set_to_zero():
    conv = nn.Conv2d(1, 4, 2, stride=2)
    conv.weight.data.zero_()
    return conv, (1, 4, 4)


@planted("05-count", says="without the number of samples")
def shape_with_samples():
    return nn.Conv2d(1, 3, 2, stride=2), (1, 1, 4, 4)


@planted("05-adjoint", says="alone: the gradient equations")
def weight_equations_alone(weight, output_gradient, rows, gradient_rows, size, stride):
    shape = (1, weight.shape[1], size, size)
    return torch.nn.grad.conv2d_input(shape, weight, rows[None], stride)[0]


@planted("05-adjoint", says="alone: the weight equations")
def gradient_equations_alone(weight, output_gradient, rows, gradient_rows, size, stride):
    shape = (1, weight.shape[1], size, size)
    return torch.nn.grad.conv2d_input(shape, gradient_rows, output_gradient[None], stride)[0]


@planted("05-adjoint", says="exchanged")
def partners_exchanged(weight, output_gradient, rows, gradient_rows, size, stride):
    shape = (1, weight.shape[1], size, size)
    one = torch.nn.grad.conv2d_input(shape, weight, output_gradient[None], stride)
    other = torch.nn.grad.conv2d_input(shape, gradient_rows, rows[None], stride)
    return (one + other)[0]


@planted("05-adjoint", says="without the stride")
def stride_left_out(weight, output_gradient, rows, gradient_rows, size, stride):
    one = conv_transpose2d(rows[None], weight)
    return (one + conv_transpose2d(output_gradient[None], gradient_rows))[0]


@planted("05-adjoint", says="kernel is turned")
def kernel_turned(weight, output_gradient, rows, gradient_rows, size, stride):
    one = conv_transpose2d(rows[None], weight.flip(2, 3), stride=stride)
    return (one + conv_transpose2d(output_gradient[None], gradient_rows, stride=stride))[0]


@planted("05-adjoint", says="added")
def difference_for_sum(weight, output_gradient, rows, gradient_rows, size, stride):
    one = conv_transpose2d(rows[None], weight, stride=stride)
    return (one - conv_transpose2d(output_gradient[None], gradient_rows, stride=stride))[0]


@planted("05-trust", says="small residual not see")
def residual_alone(matrix, right_hand_side, answer):
    return (matrix @ answer - right_hand_side).norm() < 1e-6 * right_hand_side.norm()


@planted("05-trust", says="contradict")
def rank_alone(matrix, right_hand_side, answer):
    return int(torch.linalg.matrix_rank(matrix)) == len(answer)


@planted("05-trust", says="of rank")
def count_for_rank(matrix, right_hand_side, answer):
    unexplained = (matrix @ answer - right_hand_side).norm()
    return len(matrix) >= len(answer) and bool(unexplained < 1e-6 * right_hand_side.norm())


@planted("05-trust", says="smallest singular value")
def conditioning_forgotten(matrix, right_hand_side, answer):
    unexplained = (matrix @ answer - right_hand_side).norm()
    full = int(torch.linalg.matrix_rank(matrix)) == len(answer)
    return full and bool(unexplained < 1e-6 * right_hand_side.norm())


@planted("05-trust", says="may trust it")
def float64_equality(matrix, right_hand_side, answer):
    unexplained = (matrix @ answer - right_hand_side).abs().max()
    full = int(torch.linalg.matrix_rank(matrix)) == len(answer)
    return full and bool(unexplained < 1e-12)
