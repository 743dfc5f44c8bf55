"""Plausible mistakes in the exercises to chapter 12; each must be refused by the right hint."""

from __future__ import annotations

import math

import torch

from gradinv_edu import defenses, fully_connected
from gradinv_edu.coursework.mistakes import planted
from gradinv_edu.metrics import psnr


def _clipped(gradients, norm):
    return gradients * (norm / gradients.norm(dim=1, keepdim=True)).clamp(max=1)


@planted("12-private", says="did you divide by the batch")
def noise_added_after_averaging(gradients, norm, multiplier, noise):
    return _clipped(gradients, norm).mean(0) + multiplier * norm * noise


@planted("12-private", says="root of the batch")
def noise_of_each_sample(gradients, norm, multiplier, noise):
    return _clipped(gradients, norm).mean(0) + multiplier * norm * noise / len(gradients) ** 0.5


@planted("12-private", says="does not know the clipping norm")
def noise_without_the_norm(gradients, norm, multiplier, noise):
    return (_clipped(gradients, norm).sum(0) + multiplier * noise) / len(gradients)


@planted("12-private", says="clipped the mean")
def mean_clipped(gradients, norm, multiplier, noise):
    mean = gradients.mean(0, keepdim=True)
    return _clipped(mean, norm)[0] + multiplier * norm * noise / len(gradients)


@planted("12-private", says="only shortens")
def short_gradients_stretched(gradients, norm, multiplier, noise):
    units = gradients / gradients.norm(dim=1, keepdim=True)
    return (norm * units.sum(0) + multiplier * norm * noise) / len(gradients)


@planted("12-private", says="clipped nothing")
def clipping_forgotten(gradients, norm, multiplier, noise):
    return (gradients.sum(0) + multiplier * norm * noise) / len(gradients)


def _spent(s, log):
    return s + 2 * math.sqrt(s * log)


@planted("12-epsilon", says="convert to ε after that")
def rounds_multiplied(multiplier, rounds, delta):
    return rounds * _spent(1 / (2 * multiplier**2), math.log(1 / delta))


@planted("12-epsilon", says="best one depends")
def one_order_for_all(multiplier, rounds, delta):
    return rounds / multiplier**2 + math.log(1 / delta)


@planted("12-epsilon", says="price of δ")
def delta_forgotten(multiplier, rounds, delta):
    return rounds / (2 * multiplier**2)


@planted("12-epsilon", says="divergence of their own")
def first_term_forgotten(multiplier, rounds, delta):
    return math.sqrt(2 * rounds * math.log(1 / delta)) / multiplier


@planted("12-epsilon", says="base ten")
def logarithm_of_base_ten(multiplier, rounds, delta):
    return _spent(rounds / (2 * multiplier**2), math.log10(1 / delta))


@planted("12-epsilon", says="rounds do not show")
def one_round_for_all(multiplier, rounds, delta):
    return _spent(1 / (2 * multiplier**2), math.log(1 / delta))


@planted("12-fill", says="zeros for numbers")
def zeros_as_numbers(weight_gradient, bias_gradient):
    return bias_gradient @ weight_gradient / bias_gradient.square().sum()


@planted("12-fill", says="averaged the rows' ratios")
def mean_of_ratios(weight_gradient, bias_gradient):
    ratios = weight_gradient / bias_gradient[:, None]
    return ratios.sum(0) / (weight_gradient != 0).sum(0)


@planted("12-fill", says="used one row")
def loudest_row_only(weight_gradient, bias_gradient):
    row = bias_gradient.abs().argmax()
    return weight_gradient[row] / bias_gradient[row]


@planted("12-fill", says="with NaN")
def unknown_pixels_called_black(weight_gradient, bias_gradient):
    seen = (weight_gradient != 0).double()
    share = bias_gradient.square() @ seen
    return (bias_gradient @ weight_gradient / share).nan_to_num()


@planted("12-fill", says="a pixel is a column")
def rows_for_columns(weight_gradient, bias_gradient):
    return weight_gradient.sum(1) / bias_gradient


def _ratio(G, b):
    return b @ G / b.square().sum()


def _undone(encoder, classifier, zeros=False, bent=False, shifted=True, inverted=False):
    r = _ratio(classifier["weight"], classifier["bias"])
    kept = (classifier["weight"] != 0).any(0) | zeros
    kept = ~kept if inverted else kept
    z = r if bent else r.atanh()
    b = encoder.bias.detach() if shifted else torch.zeros_like(r)
    return torch.linalg.pinv(encoder.weight.detach()[kept]) @ (z - b)[kept]


def _below(gradients):
    return _ratio(gradients["1.encode.weight"], gradients["1.encode.bias"])


@planted("12-see-through", says="pruned columns for zeros")
def pruned_features_as_zeros(encoder, classifier, gradients):
    return _undone(encoder, classifier, zeros=True), _below(gradients)


@planted("12-see-through", says="before the tanh")
def activation_not_undone(encoder, classifier, gradients):
    return _undone(encoder, classifier, bent=True), _below(gradients)


@planted("12-see-through", says="still in your right-hand side")
def bias_of_the_encoder_forgotten(encoder, classifier, gradients):
    return _undone(encoder, classifier, shifted=False), _below(gradients)


@planted("12-see-through", says="columns that were pruned")
def columns_exchanged(encoder, classifier, gradients):
    return _undone(encoder, classifier, inverted=True), _below(gradients)


@planted("12-see-through", says="above the draw")
def ratio_of_the_classifier(encoder, classifier, gradients):
    return _undone(encoder, classifier), _ratio(gradients["2.weight"], gradients["2.bias"])


@planted("12-see-through", says="the draw itself")
def ratio_of_the_decoder(encoder, classifier, gradients):
    drawn = _ratio(gradients["1.decode.weight"], gradients["1.decode.bias"])
    return _undone(encoder, classifier), drawn


def _recovered(G, b):
    pruned = defenses.recover_pruned(G, b).nan_to_num()
    return [fully_connected.recover_input(G, b), pruned]


def _judged(client, pictures, attacks, floor=None):
    better = 0
    for x in pictures:
        level = psnr(pictures.mean(0), x) if floor is None else floor
        better += max(psnr(found.clamp(0, 1), x) for found in attacks(*client(x))) > level
    return better > len(pictures) / 2


@planted("12-leaks", says="factor stands before")
def size_of_the_message_for_its_content(client, pictures):
    return all(client(x)[0].norm() > 0.1 for x in pictures) and _judged(
        client, pictures, _recovered
    )


@planted("12-leaks", says="combines the rows better")
def naive_attack_only(client, pictures):
    return _judged(client, pictures, lambda G, b: [(G / b[:, None]).mean(0)])


@planted("12-leaks", says="server leaves them out")
def zeros_taken_for_numbers(client, pictures):
    return _judged(client, pictures, lambda G, b: _recovered(G, b)[:1])


@planted("12-leaks", says="mean of the pictures")
def no_baseline(client, pictures):
    return _judged(client, pictures, _recovered, floor=3.0)


@planted("12-leaks", says="look coarse")
def only_what_is_exact(client, pictures):
    return _judged(client, pictures, _recovered, floor=25.0)
