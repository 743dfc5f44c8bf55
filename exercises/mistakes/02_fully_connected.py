"""Plausible mistakes in the exercises to chapter 2; each must be refused by the right hint."""

from __future__ import annotations

import torch

from gradinv_edu.coursework.mistakes import planted


def _slopes(z, label):
    k = torch.softmax(z, dim=0)
    k[label] -= 1
    return k


@planted("02-gradients", says="transposed")
def transposed_weight_gradient(weight, bias, inputs, label):
    k = _slopes(weight @ inputs + bias, label)
    return torch.outer(inputs, k), k


@planted("02-gradients", says="softmax alone")
def label_forgotten(weight, bias, inputs, label):
    k = torch.softmax(weight @ inputs + bias, dim=0)
    return torch.outer(k, inputs), k


@planted("02-gradients", says="turned round")
def label_minus_softmax(weight, bias, inputs, label):
    k = -_slopes(weight @ inputs + bias, label)
    return torch.outer(k, inputs), k


@planted("02-gradients", says="without a bias")
def forgotten_bias(weight, bias, inputs, label):
    k = _slopes(weight @ inputs, label)
    return torch.outer(k, inputs), k


@planted("02-gradients", says="each output by itself")
def sigmoid_for_softmax(weight, bias, inputs, label):
    k = torch.sigmoid(weight @ inputs + bias)
    k[label] -= 1
    return torch.outer(k, inputs), k


@planted("02-combine", says="plain mean")
def mean_of_living_rows(weight_gradient, bias_gradient):
    living = bias_gradient != 0
    return (weight_gradient[living] / bias_gradient[living, None]).mean(0)


@planted("02-combine", says="0 / 0")
def mean_of_all_rows(weight_gradient, bias_gradient):
    return (weight_gradient / bias_gradient[:, None]).mean(0)


@planted("02-combine", says="added all rows")
def sum_for_mean(weight_gradient, bias_gradient):
    return weight_gradient.sum(0) / bias_gradient.sum()


@planted("02-combine", says="smallest bias gradient")
def division_by_the_smallest_bias_gradient(weight_gradient, bias_gradient):
    size = torch.where(bias_gradient == 0, torch.inf, bias_gradient.abs())
    row = size.argmin()
    return weight_gradient[row] / bias_gradient[row]


@planted("02-combine", says="one row alone")
def loudest_row_alone(weight_gradient, bias_gradient):
    row = bias_gradient.abs().argmax()
    return weight_gradient[row] / bias_gradient[row]


@planted("02-combine", says="takes k for exact")
def least_squares(weight_gradient, bias_gradient):
    return weight_gradient.T @ bias_gradient / (bias_gradient @ bias_gradient)


def _direction(G):
    v = torch.linalg.svd(G, full_matrices=False)[2][0]
    return v, G @ v


def _label(c):
    negative = c < 0
    return int((negative if negative.sum() == 1 else ~negative).nonzero()[0])


@planted("02-softmax", says="logarithm of a negative")
def label_row_in_the_ratio(weight, weight_gradient):
    v, c = _direction(weight_gradient)
    label = _label(c)
    other = (label + 1) % len(c)
    s = torch.log(c[label] / c[other]) / ((weight[label] - weight[other]) @ v)
    return s * v, label


@planted("02-softmax", says="negative")
def rows_in_another_order(weight, weight_gradient):
    v, c = _direction(weight_gradient)
    label = _label(c)
    i, j = [row for row in range(len(c)) if row != label][:2]
    return torch.log(c[i] / c[j]) / ((weight[j] - weight[i]) @ v) * v, label


@planted("02-softmax", says="direction without its length")
def direction_for_input(weight, weight_gradient):
    v, c = _direction(weight_gradient)
    return v, _label(c)


@planted("02-softmax", says="network predicts")
def prediction_for_label(weight, weight_gradient):
    v, c = _direction(weight_gradient)
    label = _label(c)
    i, j = [row for row in range(len(c)) if row != label][:2]
    x = torch.log(c[i] / c[j]) / ((weight[i] - weight[j]) @ v) * v
    return x, int((weight @ x).argmax())


@planted("02-softmax", says="other sign")
def sign_of_the_singular_vector_forgotten(weight, weight_gradient):
    v, c = _direction(weight_gradient)
    label = int(c.argmin())
    i, j = [row for row in range(len(c)) if row != _label(c)][:2]
    return torch.log(c[i] / c[j]) / ((weight[i] - weight[j]) @ v) * v, label


@planted("02-softmax", says="upside down")
def length_upside_down(weight, weight_gradient):
    v, c = _direction(weight_gradient)
    label = _label(c)
    i, j = [row for row in range(len(c)) if row != label][:2]
    return ((weight[i] - weight[j]) @ v) / torch.log(c[i] / c[j]) * v, label


@planted("02-twin", says="same picture again")
def the_picture_itself(weight, inputs):
    return inputs.clone()


@planted("02-twin", says="mirrored picture")
def mirrored_picture(weight, inputs):
    return -inputs


@planted("02-twin", says="same margin")
def moved_sideways(weight, inputs):
    step = torch.linspace(0, 1, len(inputs), dtype=inputs.dtype)
    return inputs + step - (step @ weight) / (weight @ weight) * weight


@planted("02-twin", says="times the client's")
def twice_as_bright(weight, inputs):
    return 2 * inputs


@planted("02-twin", says="shape")
def margin_for_picture(weight, inputs):
    return weight @ inputs / 2


@planted("02-leaks", says="one layer with a bias enough")
def first_bias_only(biases, outputs, loss):
    if biases[0]:
        return "input"
    if loss == "squared":
        return "direction"
    return "input" if outputs > 2 else "several"


@planted("02-leaks", says="layers protect")
def depth_protects(biases, outputs, loss):
    if any(biases):
        return "input"
    if loss == "squared" or len(biases) > 4:
        return "direction"
    return "input" if outputs > 2 else "several"


@planted("02-leaks", says="target that the server does not know")
def every_loss_fixes_the_length(biases, outputs, loss):
    return "input" if any(biases) or outputs > 2 else "several"


@planted("02-leaks", says="in disguise")
def two_classes_are_many(biases, outputs, loss):
    if any(biases):
        return "input"
    if loss == "squared":
        return "direction"
    return "several" if loss == "logistic" else "input"


@planted("02-leaks", says="ratio of two probabilities")
def no_bias_no_length(biases, outputs, loss):
    return "input" if any(biases) else "direction"


@planted("02-leaks", says="how many margins")
def one_logit_is_enough(biases, outputs, loss):
    if any(biases) or loss != "squared":
        return "input"
    return "direction"
