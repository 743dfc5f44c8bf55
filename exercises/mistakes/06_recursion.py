"""Plausible mistakes in the exercises to chapter 6; each must be refused by the right hint."""

from __future__ import annotations

import torch

import gradinv_edu as gi
from gradinv_edu.coursework.mistakes import planted


def _slopes(z, slope=0.2):
    return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, slope))


def _known(name, a):
    """The slope, z, and where z is known."""
    everywhere = torch.ones_like(a, dtype=torch.bool)
    if name == "leaky_relu":
        return _slopes(a), a / _slopes(a), everywhere
    if name == "tanh":
        return 1 - a**2, torch.atanh(a), everywhere
    if name == "sigmoid":
        return a * (1 - a), torch.logit(a), everywhere
    return (a > 0).to(a), a, a > 0


@planted("06-step", says="Which index is summed")
def transposed_weight(weight, output_gradient, outputs, name):
    slope, z, known = _known(name, outputs)
    return (weight @ output_gradient) * slope, z, known


@planted("06-step", says="not through the activation")
def slope_forgotten(weight, output_gradient, outputs, name):
    return weight.T @ output_gradient, *_known(name, outputs)[1:]


@planted("06-step", says="activation itself")
def activation_for_slope(weight, output_gradient, outputs, name):
    return (weight.T @ output_gradient) * outputs, *_known(name, outputs)[1:]


@planted("06-step", says="divided by the slope")
def divided_by_the_slope(weight, output_gradient, outputs, name):
    slope, z, known = _known(name, outputs)
    return (weight.T @ output_gradient) / slope, z, known


@planted("06-step", says="another layer")
def slopes_of_the_wrong_layer(weight, output_gradient, outputs, name):
    _, z, known = _known(name, outputs)
    if len(weight) != len(outputs):
        return weight.T @ output_gradient, z, known
    return (weight.T @ output_gradient) * _slopes(weight @ outputs), z, known


@planted("06-step", says="you have σ(z)")
def outputs_taken_for_z(weight, output_gradient, outputs, name):
    slope, z, known = _known(name, outputs)
    slope = _known(name, outputs.tanh())[0] if name == "tanh" else slope
    return (weight.T @ output_gradient) * slope, z, known


@planted("06-step", says="nothing of k passes")
def relu_taken_for_leaky(weight, output_gradient, outputs, name):
    slope, z, known = _known(name, outputs)
    slope = _slopes(outputs) if name == "relu" else slope
    return (weight.T @ output_gradient) * slope, z, known


@planted("06-step", says="could be anything")
def zeros_of_a_relu_believed(weight, output_gradient, outputs, name):
    slope, z, _ = _known(name, outputs)
    return (weight.T @ output_gradient) * slope, z, torch.ones_like(outputs)


@planted("06-step", says="turned round")
def mask_turned_round(weight, output_gradient, outputs, name):
    slope, z, known = _known(name, outputs)
    return (weight.T @ output_gradient) * slope, z, ~known if name == "relu" else known


@planted("06-step", says="once more")
def leaky_slope_applied_again(weight, output_gradient, outputs, name):
    slope, z, known = _known(name, outputs)
    z = outputs * slope if name == "leaky_relu" else z
    return (weight.T @ output_gradient) * slope, z, known


@planted("06-step", says="everywhere")
def slope_divided_out_everywhere(weight, output_gradient, outputs, name):
    slope, z, known = _known(name, outputs)
    z = outputs / 0.2 if name == "leaky_relu" else z
    return (weight.T @ output_gradient) * slope, z, known


@planted("06-step", says="other way round")
def logit_for_tanh(weight, output_gradient, outputs, name):
    slope, z, known = _known(name, outputs)
    z = _known("sigmoid", outputs)[1] if name == "tanh" else z
    return (weight.T @ output_gradient) * slope, z, known


@planted("06-step", says="one-to-one")
def negative_outputs_left_out(weight, output_gradient, outputs, name):
    slope, z, _ = _known(name, outputs)
    return (weight.T @ output_gradient) * slope, z, outputs > 0


def _walk(weights, gradients, slope=0.2, shift=0, power=2, bottom=0):
    top = gi.fully_connected.recover_from_cross_entropy(weights[-1], gradients[-1])[0]
    x, k = top.x, top.k
    for layer in range(len(weights) - 2, bottom - 1, -1):
        k = (weights[layer + 1].T @ k) * _slopes(x, slope)
        x = gradients[min(layer + shift, len(weights) - 2)].T @ k / k.norm() ** power
    return x, top.target


@planted("06-walk", says="not through the activation")
def slopes_left_out(weights, gradients):
    return _walk(weights, gradients, slope=1.0)


@planted("06-walk", says="layer above")
def gradient_of_the_wrong_layer(weights, gradients):
    return _walk(weights, gradients, shift=1)


@planted("06-walk", says="length is wrong")
def divided_by_the_norm(weights, gradients):
    return _walk(weights, gradients, power=1)


@planted("06-walk", says="before the bottom")
def one_layer_short(weights, gradients):
    return _walk(weights, gradients, bottom=1)


@planted("06-walk", says="label comes from")
def label_guessed(weights, gradients):
    return _walk(weights, gradients)[0], 2


@planted("06-design", says="full rank")
def plenty_of_filters():
    return 2, 8


@planted("06-design", says="safe from one gradient")
def hardly_any_filters():
    return 2, 1


@planted("06-design", says="count already says")
def too_few_to_count():
    return 2, 2


@planted("06-design", says="from 1 to 8")
def a_real_network():
    return 12, 36


@planted("06-trust", says="many answers")
def residual_and_mismatch_only(account):
    rounding = 1000 * account.precision
    small = max(account.residuals) <= rounding and account.mismatch <= rounding
    return small and account.answers == 1


@planted("06-trust", says="all of them")
def last_layer_of_the_table_only(account):
    rounding = 1000 * account.precision
    small = max(account.residuals) <= rounding and account.mismatch <= rounding
    return small and account.full_rank[-1] and account.answers == 1


@planted("06-trust", says="which was the client's")
def first_answer_taken(account):
    rounding = 1000 * account.precision
    small = max(account.residuals) <= rounding and account.mismatch <= rounding
    return small and all(account.full_rank)


@planted("06-trust", says="whole does not fit")
def mismatch_forgotten(account):
    small = max(account.residuals) <= 1000 * account.precision
    return small and all(account.full_rank) and account.answers == 1


@planted("06-trust", says="rounding, and you take it")
def float64_equality_for_float32(account):
    small = max(account.residuals) <= 1e-12 and account.mismatch <= 1e-12
    return small and all(account.full_rank) and account.answers == 1


@planted("06-trust", says="in the middle")
def residuals_forgotten(account):
    small = account.mismatch <= 1000 * account.precision
    return small and all(account.full_rank) and account.answers == 1


def _largest(layers, classes, shared=True, own=False, strict=False, last=1):
    limits = {"softmax": classes - last}
    for layer in layers:
        missing = layer.unknowns - layer.outputs - (layer.weights if own else 0)
        spare = (0 if own else layer.weights) - (layer.filters**2 if shared else 0)
        if missing > 0:
            limits[layer.name] = max(0, (spare - strict) // missing)
    name = min(limits, key=limits.get)
    return limits[name], name


@planted("06-batch", says="in both sets")
def shared_equations_overlooked(layers, classes):
    return _largest(layers, classes, shared=False)


@planted("06-batch", says="its own gradient constraints")
def gradient_constraints_for_each(layers, classes):
    return _largest(layers, classes, own=True)


@planted("06-batch", says="sums to zero")
def as_many_as_classes(layers, classes):
    return _largest(layers, classes, last=0)


@planted("06-batch", says="exactly as many equations")
def more_equations_than_unknowns(layers, classes):
    return _largest(layers, classes, strict=True)


@planted("06-batch", says="let it limit")
def wide_layers_divided_by_a_negative(layers, classes):
    limits = {
        each.name: (each.weights - each.filters**2) // (each.unknowns - each.outputs)
        for each in layers
    }
    limits["softmax"] = classes - 1
    return min(limits.values()), min(limits, key=limits.get)


@planted("06-batch", says="a limit of its own")
def softmax_forgotten(layers, classes):
    return _largest(layers, 10**6)


@planted("06-batch", says="gives out first")
def first_layer_blamed(layers, classes):
    return _largest(layers, classes)[0], layers[0].name
