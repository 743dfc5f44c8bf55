"""Plausible mistakes in the exercises to chapter 1; each must be refused by the right hint."""

from __future__ import annotations

import torch

from gradinv_edu.coursework.mistakes import planted


@planted("01-gradients", says="squared error")
def slope_of_the_squared_error(weight, bias, inputs, label):
    k = weight @ inputs + bias - label
    return k * inputs, k


@planted("01-gradients", says="sign is turned round")
def label_minus_prediction(weight, bias, inputs, label):
    k = label - torch.sigmoid(weight @ inputs + bias)
    return k * inputs, k


@planted("01-gradients", says="without a bias")
def forgotten_bias(weight, bias, inputs, label):
    k = torch.sigmoid(weight @ inputs) - label
    return k * inputs, k


@planted("01-gradients", says="times the bias")
def bias_as_its_own_input(weight, bias, inputs, label):
    k = torch.sigmoid(weight @ inputs + bias) - label
    return k * inputs, k * bias


@planted("01-gradients", says="changes with a pixel")
def gradient_of_the_input(weight, bias, inputs, label):
    k = torch.sigmoid(weight @ inputs + bias) - label
    return k * weight, k


@planted("01-gradients", says="float32")
def computed_in_float32(weight, bias, inputs, label):
    k = torch.sigmoid(weight.float() @ inputs.float() + bias.float()) - label
    return k * inputs.float(), k


@planted("01-recover", says="upside down")
def fraction_upside_down(weight, bias, weight_gradient, bias_gradient):
    return bias_gradient / weight_gradient, 1.0


@planted("01-recover", says="predicts")
def prediction_for_label(weight, bias, weight_gradient, bias_gradient):
    inputs = weight_gradient / bias_gradient
    return inputs, (weight @ inputs + bias > 0).double()


@planted("01-recover", says="without the bias")
def label_without_bias(weight, bias, weight_gradient, bias_gradient):
    inputs = weight_gradient / bias_gradient
    return inputs, torch.sigmoid(weight @ inputs) - bias_gradient


@planted("01-recover", says="stretched")
def stretched_to_white(weight, bias, weight_gradient, bias_gradient):
    inputs = weight_gradient / bias_gradient
    label = torch.sigmoid(weight @ inputs + bias) - bias_gradient
    return inputs / inputs.max(), label


@planted("01-recover", says="σ(z) + k")
def label_added(weight, bias, weight_gradient, bias_gradient):
    inputs = weight_gradient / bias_gradient
    return inputs, torch.sigmoid(weight @ inputs + bias) + bias_gradient


@planted("01-labels", says="shares themselves")
def shares_for_labels(outputs, shares):
    return shares


@planted("01-labels", says="exchanged")
def shares_exchanged(outputs, shares):
    return outputs - shares.flip(0)


@planted("01-labels", says="perfect")
def perfect_answers(outputs, shares):
    return outputs


@planted("01-labels", says="scaled the outputs")
def outputs_scaled(outputs, shares):
    return outputs * shares


@planted("01-labels", says="Both labels are the same")
def one_label_for_both(outputs, shares):
    return torch.ones_like(outputs)


@planted("01-training", says="divided the weights themselves")
def weights_for_differences(start_weight, start_bias, end_weight, end_bias):
    return end_weight / end_bias


@planted("01-training", says="added start and end")
def sum_for_difference(start_weight, start_bias, end_weight, end_bias):
    return (end_weight + start_weight) / (end_bias + start_bias)


@planted("01-training", says="negative")
def orders_mixed(start_weight, start_bias, end_weight, end_bias):
    return (end_weight - start_weight) / (start_bias - end_bias)


@planted("01-training", says="learning rate")
def rate_divided_out_once(start_weight, start_bias, end_weight, end_bias):
    return (start_weight - end_weight) / 0.05 / (start_bias - end_bias)


@planted("01-training", says="not the bias's")
def no_division(start_weight, start_bias, end_weight, end_bias):
    return end_weight - start_weight


@planted("01-leaks", says="leading digits")
def small_means_safe(weight_gradient, bias_gradient, sigma):
    return bool(bias_gradient.abs() > 1e-8) and bool(sigma < 0.1 * bias_gradient.abs())


@planted("01-leaks", says="exactly zero")
def zero_forgotten(weight_gradient, bias_gradient, sigma):
    return sigma <= 0.1 * bias_gradient.abs()


@planted("01-leaks", says="does not decide")
def noise_alone(weight_gradient, bias_gradient, sigma):
    return bool(bias_gradient != 0) and sigma < 0.05


@planted("01-leaks", says="own noise")
def brightness_forgotten(weight_gradient, bias_gradient, sigma):
    return bool(bias_gradient != 0) and bool(sigma / bias_gradient.abs() < 0.1)


@planted("01-leaks", says="negative bias gradient")
def sign_of_k(weight_gradient, bias_gradient, sigma):
    return bool(bias_gradient > 0) and bool(sigma / bias_gradient < 0.05)
