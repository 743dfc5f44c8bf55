"""Plausible mistakes in the exercises to chapter 3; each must be refused by the right hint."""

from __future__ import annotations

import torch

from gradinv_edu.coursework.mistakes import planted


@planted("03-shares", says="which index is summed")
def summed_over_rows(output_gradients):
    return output_gradients / output_gradients.sum(dim=1, keepdim=True)


@planted("03-shares", says="without their signs")
def signs_dropped(output_gradients):
    return output_gradients.abs() / output_gradients.abs().sum(dim=0)


@planted("03-shares", says="same share")
def mean_of_the_samples(output_gradients):
    return torch.ones_like(output_gradients) / len(output_gradients)


@planted("03-shares", says="softmax")
def softmax_for_ratio(output_gradients):
    return output_gradients.softmax(dim=0)


@planted("03-shares", says="the k themselves")
def division_forgotten(output_gradients):
    return output_gradients


@planted("03-count", says="averaged over the samples")
def mean_for_sum(bias_gradient, probabilities):
    return probabilities.mean(dim=0) - bias_gradient


@planted("03-count", says="the other way")
def sign_turned(bias_gradient, probabilities):
    return probabilities.sum(dim=0) + len(probabilities) * bias_gradient


@planted("03-count", says="equally likely")
def untrained_network_assumed(bias_gradient, probabilities):
    samples, classes = probabilities.shape
    return samples / classes - samples * bias_gradient


@planted("03-count", says="predictions out")
def predictions_left_out(bias_gradient, probabilities):
    return -len(probabilities) * bias_gradient


@planted("03-count", says="signs only")
def negative_entries(bias_gradient, probabilities):
    return (bias_gradient < 0).double()


def _ratios(weight_gradient, bias_gradient):
    alive = bias_gradient != 0
    return weight_gradient[alive] / bias_gradient[alive, None]


def _agreeing(ratios):
    return (torch.cdist(ratios, ratios) < 1e-6 * ratios.norm(dim=1)).sum(dim=1) > 1


@planted("03-lonely", says="Nobody has confirmed")
def every_ratio_believed(weight_gradient, bias_gradient):
    return _ratios(weight_gradient, bias_gradient)


@planted("03-lonely", says="mean over rows")
def mean_of_all_rows(weight_gradient, bias_gradient):
    return _ratios(weight_gradient, bias_gradient).mean(dim=0, keepdim=True)


@planted("03-lonely", says="name it once")
def one_for_every_row(weight_gradient, bias_gradient):
    ratios = _ratios(weight_gradient, bias_gradient)
    return ratios[_agreeing(ratios)]


@planted("03-lonely", says="rows are dead")
def dead_rows_divided(weight_gradient, bias_gradient):
    return weight_gradient / bias_gradient[:, None]


@planted("03-lonely", says="length is not")
def gradient_rows_for_ratios(weight_gradient, bias_gradient):
    ratios = _ratios(weight_gradient, bias_gradient)
    return weight_gradient[bias_gradient != 0][_agreeing(ratios)]


@planted("03-lonely", says="stop at the first pair")
def first_pair_only(weight_gradient, bias_gradient):
    ratios = _ratios(weight_gradient, bias_gradient)
    return ratios[_agreeing(ratios)][:1]


def _directions(whole, samples, draws, sort=True, independent=True):
    left = torch.linalg.svd(whole, full_matrices=False)[0][:, :samples]
    q = torch.stack([torch.linalg.svd(left[rows])[2][-1] for rows in draws])
    zeros = ((q @ left.T).abs() < 1e-9).sum(dim=1)
    kept = []
    for direction in q[zeros.argsort(descending=True)] if sort else q:
        more = torch.stack([*kept, direction])
        if not independent or torch.linalg.matrix_rank(more, rtol=1e-6) == len(more):
            kept.append(direction)
    return left, torch.stack(kept[:samples])


@planted("03-apart", says="direction has no length")
def last_column_not_used(whole, samples, draws):
    left, q = _directions(whole, samples, draws)
    return (torch.linalg.pinv(left @ q.T) @ whole)[:, :-1]


@planted("03-apart", says="only a guess")
def every_draw_believed(whole, samples, draws):
    left, q = _directions(whole, samples, draws, sort=False)
    rows = torch.linalg.pinv(left @ q.T) @ whole
    return rows[:, :-1] / rows[:, -1:]


@planted("03-apart", says="more than once")
def one_direction_twice(whole, samples, draws):
    left, q = _directions(whole, samples, draws, independent=False)
    rows = torch.linalg.pinv(left @ q.T) @ whole
    return rows[:, :-1] / rows[:, -1:]


@planted("03-apart", says="turning them")
def singular_vectors_for_samples(whole, samples, draws):
    rows = torch.linalg.svd(whole, full_matrices=False)[2][:samples]
    return rows[:, :-1] / rows[:, -1:]


@planted("03-apart", says="row for each of the")
def one_column_for_each_sample(whole, samples, draws):
    left, q = _directions(whole, samples, draws)
    rows = torch.linalg.pinv(left @ q.T) @ whole
    return (rows[:, :-1] / rows[:, -1:]).T


def _explained(candidates, gradient):
    k = gradient @ torch.linalg.pinv(candidates)
    return k, bool((k @ candidates - gradient).norm() < 1e-4 * gradient.norm())


def _augmented(candidates, weight_gradient, bias_gradient):
    ones = torch.ones(len(candidates), 1, dtype=candidates.dtype)
    known = torch.cat([candidates, ones], dim=1)
    return _explained(known, torch.cat([weight_gradient, bias_gradient[:, None]], dim=1))


def _agree(weight, bias, k, candidates, rounding=1e-4, share=0.95):
    on = (candidates @ weight.T + bias).T > 0
    return bool(((k.abs() > rounding * k.abs().max()) == on).double().mean() > share)


@planted("03-believe", says="Which units would these switch on")
def equations_alone(weight, bias, weight_gradient, bias_gradient, candidates):
    return _augmented(candidates, weight_gradient, bias_gradient)[1]


@planted("03-believe", says="which other gradient")
def bias_gradient_ignored(weight, bias, weight_gradient, bias_gradient, candidates):
    k, explained = _explained(candidates, weight_gradient)
    return explained and _agree(weight, bias, k, candidates, share=0.9)


@planted("03-believe", says="about 1e-7 is rounding")
def zeros_to_the_last_digit(weight, bias, weight_gradient, bias_gradient, candidates):
    k, explained = _augmented(candidates, weight_gradient, bias_gradient)
    return explained and _agree(weight, bias, k, candidates, rounding=1e-12)


@planted("03-believe", says="Fewer samples")
def count_not_compared(weight, bias, weight_gradient, bias_gradient, candidates):
    _, explained = _augmented(candidates, weight_gradient, bias_gradient)
    return explained or len(candidates) < torch.linalg.matrix_rank(weight_gradient)


@planted("03-believe", says="do not explain the weight gradient")
def rank_for_evidence(weight, bias, weight_gradient, bias_gradient, candidates):
    rank = int(torch.linalg.matrix_rank(weight_gradient, rtol=1e-6))
    return int(torch.linalg.matrix_rank(candidates)) == rank


@planted("03-believe", says="you do not believe it")
def exact_equality(weight, bias, weight_gradient, bias_gradient, candidates):
    k = weight_gradient @ torch.linalg.pinv(candidates)
    return bool((k @ candidates == weight_gradient).all())
