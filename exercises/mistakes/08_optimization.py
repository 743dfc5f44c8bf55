"""Plausible mistakes in the exercises to chapter 8; each must be refused by the right hint."""

from __future__ import annotations

import torch

from gradinv_edu.coursework.mistakes import planted


def _objectives(sent, guessed, picture, alpha):
    target = torch.cat([tensor.flatten() for tensor in sent])
    guess = torch.cat([tensor.flatten() for tensor in guessed])
    distance = (guess - target).square().sum() / target.square().sum()
    cosine = guess @ target / (guess.norm() * target.norm())
    variation = picture.diff(dim=-1).abs().mean() + picture.diff(dim=-2).abs().mean()
    return distance, cosine, variation


@planted("08-objectives", says="not divided by anything")
def distance_undivided(sent, guessed, picture, alpha):
    _, cosine, variation = _objectives(sent, guessed, picture, alpha)
    distance = sum((h - g).square().sum() for h, g in zip(guessed, sent, strict=True))
    return distance, 1 - cosine + alpha * variation


@planted("08-objectives", says="tensor by tensor")
def mean_over_layers(sent, guessed, picture, alpha):
    distance, _, variation = _objectives(sent, guessed, picture, alpha)
    both = zip(guessed, sent, strict=True)
    cosines = [(h * g).sum() / (h.norm() * g.norm()) for h, g in both]
    return distance, 1 - sum(cosines) / len(cosines) + alpha * variation


@planted("08-objectives", says="an objective is descended")
def cosine_descended(sent, guessed, picture, alpha):
    distance, cosine, variation = _objectives(sent, guessed, picture, alpha)
    return distance, cosine + alpha * variation


@planted("08-objectives", says="looks at the picture alone")
def variation_left_out(sent, guessed, picture, alpha):
    distance, cosine, _ = _objectives(sent, guessed, picture, alpha)
    return distance, 1 - cosine


@planted("08-objectives", says="takes their means")
def sum_for_mean(sent, guessed, picture, alpha):
    distance, cosine, _ = _objectives(sent, guessed, picture, alpha)
    variation = picture.diff(dim=-1).abs().sum() + picture.diff(dim=-2).abs().sum()
    return distance, 1 - cosine + alpha * variation


@planted("08-objectives", says="not squared")
def norm_for_its_square(sent, guessed, picture, alpha):
    distance, cosine, variation = _objectives(sent, guessed, picture, alpha)
    return distance.sqrt(), 1 - cosine + alpha * variation


def _greedy(rest, samples, back):
    found = []
    for _ in range(samples):
        found.append(int(rest.argmin()))
        rest[found[-1]] += back
    return sorted(found)


@planted("08-labels", says="each class once")
def lowest_entries(bias_gradient, probabilities, samples):
    lowest = (bias_gradient - probabilities).argsort()[:samples]
    return sorted(lowest.tolist())


@planted("08-labels", says="still pulls its entry")
def pull_not_given_back(bias_gradient, probabilities, samples):
    return _greedy(bias_gradient - probabilities, samples, 0.0)


@planted("08-labels", says="each class once")
def sum_for_mean_given_back(bias_gradient, probabilities, samples):
    return _greedy(bias_gradient - probabilities, samples, 1.0)


@planted("08-labels", says="prefers some classes")
def predictions_not_subtracted(bias_gradient, probabilities, samples):
    return _greedy(bias_gradient, samples, 1 / samples)


@planted("08-labels", says="negative entries")
def negative_entries(bias_gradient, probabilities, samples):
    return (bias_gradient < 0).nonzero().flatten().tolist()


@planted("08-labels", says="ascending order")
def order_of_discovery(bias_gradient, probabilities, samples):
    return _greedy(bias_gradient - probabilities, samples, 1 / samples)[::-1]


METHODS = ("dlg", "idlg", "inverting_gradients")


def _ended(search, method, starts):
    runs = [search(method, start) for start in starts]
    return [run for run in runs if run.objective == run.objective]


@planted("08-contest", says="NaN")
def nan_overlooked(search, starts):
    runs = {method: [search(method, start) for start in starts] for method in METHODS}
    return {m: min(each, key=lambda run: run.objective).inputs for m, each in runs.items()}


@planted("08-contest", says="highest objective")
def maximum_for_minimum(search, starts):
    ended = {method: _ended(search, method, starts) for method in METHODS}
    return {m: max(runs, key=lambda run: run.objective).inputs for m, runs in ended.items()}


@planted("08-contest", says="by its place")
def last_run_taken(search, starts):
    ended = {method: _ended(search, method, starts) for method in METHODS}
    return {method: runs[-1].inputs for method, runs in ended.items()}


@planted("08-contest", says="picture of another attack")
def lowest_objective_of_all(search, starts):
    every = [run for method in METHODS for run in _ended(search, method, starts)]
    best = min(every, key=lambda run: run.objective)
    return dict.fromkeys(METHODS, best.inputs)


@planted("08-contest", says="same starts")
def one_start_for_the_rivals(search, starts):
    chosen = {"inverting_gradients": _ended(search, "inverting_gradients", starts)}
    for method in METHODS[:2]:
        chosen[method] = _ended(search, method, starts[2:4])
    return {m: min(runs, key=lambda run: run.objective).inputs for m, runs in chosen.items()}


@planted("08-contest", says="neither")
def mean_of_the_runs(search, starts):
    ended = {method: _ended(search, method, starts) for method in METHODS}
    return {
        method: torch.stack([run.inputs for run in runs]).mean(dim=0)
        for method, runs in ended.items()
    }


@planted("08-another", says="by the same amount")
def brightness_shifted(picture):
    return (picture + 1 - picture.max()) if picture.max() < 0.99 else picture - picture.min()


@planted("08-another", says="leaves [0, 1]")
def twice_as_bright(picture):
    return 2 * picture


@planted("08-another", says="what zero does not have")
def black_picture(picture):
    return torch.zeros_like(picture)


@planted("08-another", says="so is the eye")
def hardly_darker(picture):
    return 0.9 * picture


@planted("08-another", says="pass on alike")
def mirror_image(picture):
    return picture.flip(-1)


@planted("08-another", says="pass on alike")
def negative_of_the_picture(picture):
    return 1 - picture


def _fair(claim):
    same = claim.same_update and claim.starts <= claim.rival_starts
    return same and claim.chosen_by == "objective" and claim.psnr > claim.rival_psnr


@planted("08-stands", says="nearest picture of the class")
def mean_picture_alone(claim):
    return _fair(claim) and claim.psnr > claim.mean_psnr


@planted("08-stands", says="worse than a picture that needs no gradient")
def baselines_forgotten(claim):
    return _fair(claim)


@planted("08-stands", says="truth in hand, which no attacker has")
def peeking_allowed(claim):
    same = claim.same_update and claim.starts <= claim.rival_starts
    return same and claim.psnr > max(claim.rival_psnr, claim.mean_psnr, claim.nearest_psnr)


@planted("08-stands", says="flatters the rival")
def every_unfairness_counted(claim):
    best = max(claim.mean_psnr, claim.nearest_psnr)
    return _fair(claim) and claim.rival_chosen_by == "objective" and claim.psnr > best


@planted("08-stands", says="was allowed")
def starts_not_counted(claim):
    best = max(claim.rival_psnr, claim.mean_psnr, claim.nearest_psnr)
    return claim.same_update and claim.chosen_by == "objective" and claim.psnr > best


@planted("08-stands", says="same gradient")
def gradients_not_compared(claim):
    best = max(claim.rival_psnr, claim.mean_psnr, claim.nearest_psnr)
    return claim.starts <= claim.rival_starts and claim.chosen_by != "truth" and claim.psnr > best
