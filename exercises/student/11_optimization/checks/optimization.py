"""Checks of the exercises on attacks by optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import (
    Mistakes,
    Student,
    ask,
    demand,
    each,
    expect,
    known,
    normal,
    refuse,
    right,
    tensor,
)

METHODS = ("dlg", "idlg", "inverting_gradients")


def _long(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _terms(sent, guessed, x):
    """Squared distance, relative; cosine; total variation."""
    g, h = _long(sent), _long(guessed)
    variation = x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
    distance = (h - g).square().sum() / g.square().sum()
    return distance, h @ g / (h.norm() * g.norm()), variation


def _objectives(sent, guessed, x, alpha):
    distance, cosine, variation = _terms(sent, guessed, x)
    return distance, 1 - cosine + alpha * variation


class Objectives(Mistakes, of="optimization-objectives"):
    def distance_undivided(sent, guessed, x, alpha):
        """Your distance is not divided by anything: it should be 1 for a guess whose gradient is
        zero."""
        both = _objectives(sent, guessed, x, alpha)
        return both[0] * _long(sent).square().sum(), both[1]

    def length_of_the_difference(sent, guessed, x, alpha):
        """Like distance_undivided."""
        return (_long(guessed) - _long(sent)).norm(), _objectives(sent, guessed, x, alpha)[1]

    def norm_for_its_square(sent, guessed, x, alpha):
        """Your distance is not squared; that moves no minimum, but it is not DLG's objective."""
        both = _objectives(sent, guessed, x, alpha)
        return both[0].sqrt(), both[1]

    def mean_over_layers(sent, guessed, x, alpha):
        """You compared tensor by tensor and took the mean. The gradient is one long vector: one
        length, one angle."""
        each = [_objectives([g], [h], x, alpha) for g, h in zip(sent, guessed, strict=True)]
        return torch.tensor(each, dtype=x.dtype).mean(0).tolist()

    def mean_of_angles(sent, guessed, x, alpha):
        """Like mean_over_layers."""
        both = Objectives.mean_over_layers(sent, guessed, x, alpha)
        return _objectives(sent, guessed, x, alpha)[0], both[1]

    def sum_over_layers(sent, guessed, x, alpha):
        """Like mean_over_layers."""
        distance, angle = Objectives.mean_over_layers(sent, guessed, x, alpha / len(sent))
        return len(sent) * distance, len(sent) * angle

    def divided_by_the_guess(sent, guessed, x, alpha):
        """You divided by the guess's gradient. Divide by what does not change with the guess."""
        return _objectives(guessed, sent, x, alpha)

    def cosine_descended(sent, guessed, x, alpha):
        """Your cosine is largest for the right picture, and an objective is descended."""
        distance, cosine, variation = _terms(sent, guessed, x)
        return distance, cosine + alpha * variation

    def minus_cosine(sent, guessed, x, alpha):
        """Like cosine_descended."""
        distance, cosine, variation = _terms(sent, guessed, x)
        return distance, -cosine + alpha * variation

    def variation_left_out(sent, guessed, x, alpha):
        """The second objective has a part that looks at the picture alone, and yours has none."""
        return _objectives(sent, guessed, x, 0)

    def sum_for_mean(sent, guessed, x, alpha):
        """You added the differences of neighbours up; the chapter takes their means."""
        variation = x.diff(dim=-1).abs().sum() + x.diff(dim=-2).abs().sum()
        distance, cosine, _ = _terms(sent, guessed, x)
        return distance, 1 - cosine + alpha * variation

    def squares_for_sizes(sent, guessed, x, alpha):
        """You squared the differences of neighbours, where total variation takes their sizes."""
        variation = x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean()
        distance, cosine, _ = _terms(sent, guessed, x)
        return distance, 1 - cosine + alpha * variation

    def inner_product_for_cosine(sent, guessed, x, alpha):
        """Your inner product is not divided by both lengths, so that it is not a cosine."""
        distance, _, variation = _terms(sent, guessed, x)
        return distance, 1 - _long(guessed) @ _long(sent) + alpha * variation

    def weight_left_out(sent, guessed, x, alpha):
        """You left out the weight of the total variation."""
        return _objectives(sent, guessed, x, 1)


def check_objectives(objectives: Student, seed: int = 1, size: int = 6) -> None:
    """Check: what DLG and what Inverting Gradients descend."""
    sent = [(i + 1) * normal(seed + i, *s) for i, s in enumerate([(4, 3, 2, 2), (4,), (10, 16)])]
    guessed = [g + 0.5 * normal(seed + 9 + i, *g.shape) for i, g in enumerate(sent)]
    given = (sent, guessed, normal(seed + 20, 1, 1, size, size + 1), 0.3)
    parts = ("DLG's objective", "the objective of Inverting Gradients")
    expect("optimization-objectives", objectives, given, _objectives(*given), parts)
    right("One asks for the gradient, the other for its direction and a smooth picture.")


def _greedy(rest: Tensor, samples: int, back: float) -> list[int]:
    found: list[int] = []
    for _ in range(samples):
        found.append(int(rest.argmin()))
        rest[found[-1]] += back
    return sorted(found)


class Labels(Mistakes, of="optimization-labels"):
    def lowest_entries(b, p, samples):
        """You name each class once. Several samples may share a label: what becomes of an entry
        when one of its labels has been taken account of?"""
        return sorted((b - p).argsort()[:samples].tolist())

    def sum_for_mean_given_back(b, p, samples):
        """Like lowest_entries."""
        return _greedy(b - p, samples, 1.0)

    def pull_not_given_back(b, p, samples):
        """You find the same class again and again: a label that has been found still pulls its
        entry down."""
        return _greedy(b - p, samples, 0.0)

    def predictions_not_subtracted(b, p, samples):
        """You took the entries as they are. This network prefers some classes whatever it sees,
        and that hides their labels: take away what is due to it."""
        return _greedy(b, samples, 1 / samples)

    def highest_entries(b, p, samples):
        """You looked for the highest entries; a label pulls its own down."""
        return _greedy(p - b, samples, 1 / samples)

    def negative_entries(b, p, samples):
        """You returned the negative entries. With several samples their number is not that of the
        samples."""
        return (b < 0).nonzero().flatten().tolist()

    def order_of_discovery(b, p, samples):
        """The labels are right, and not in ascending order."""
        return _greedy(b - p, samples, 1 / samples)[::-1]


def check_labels(labels: Student, seed: int = 2, samples: int = 8) -> None:
    """Check: the labels of a batch, from the last bias gradient."""
    classes = 6
    g = torch.Generator().manual_seed(seed)
    bias = torch.tensor([2.2, 0.2, -0.4, 0.0, 0.5, -1.0], dtype=torch.float64)
    y = torch.cat([torch.tensor([0, 0]), torch.randint(3, classes, (samples - 2,), generator=g)])
    p = (bias + 0.05 * normal(seed, samples, classes)).softmax(1)
    given = ((p - nn.functional.one_hot(y, classes)).mean(0), bias.softmax(0), samples)
    answer, true = ask(labels, *given), sorted(y.tolist())
    try:
        found = [int(value) for value in answer]
    except (TypeError, ValueError):
        found = []
    for hint, wrong in known("optimization-labels", given):
        demand(sorted(found) != wrong or wrong == true, hint)
    demand(len(set(found)) > 1 or len(found) != samples, Labels.pull_not_given_back)
    listed = f"Return {samples} whole numbers, one label for each sample, in ascending order."
    demand(len(found) == samples, listed)
    missing = sum(max(0, true.count(label) - found.count(label)) for label in set(true))
    demand(missing == 0, f"{missing} of {samples} labels are not right.")
    demand(found == true, Labels.order_of_discovery)
    right("Subtract, take the lowest, give its pull back, and look again.")


@dataclass(frozen=True)
class Run:
    """What one run of a search ends with; an attacker sees no more of it."""

    inputs: Tensor
    objective: float


@dataclass
class Searches:
    """Stand-ins for three attacks on one gradient, which keep account of who asked for what.

    Each run's picture is worth as many decibels as a generator says, and its objective goes with
    that roughly; the three objectives differ in scale, and one run of each attack ends in NaN.
    """

    seed: int
    asked: list[tuple[str, int]] = field(default_factory=list)

    def run(self, method: str, start: int) -> Run:
        """Return what ``method`` finds from ``start``."""
        demand(method in METHODS, f"There is no method {method!r}; there are {', '.join(METHODS)}.")
        self.asked.append((method, start))
        return self.made(method, start)

    def made(self, method: str, start: int) -> Run:
        """Make a run without keeping account of it."""
        place = METHODS.index(method)
        draw = normal(self.seed + 100 * start + place, 5)
        objective = (1e-9, 1e-6, 1e-2)[place] * float(draw[4].exp())
        return Run(draw[:4].clone(), float("nan") if start % 4 == place else objective)


def _ended(search, method, starts):
    """The runs of a method that did not end in NaN."""
    runs = [search(method, start) for start in starts]
    return [run for run in runs if run.objective == run.objective]


def _objective(run: Run) -> float:
    return run.objective


class Contest(Mistakes, of="optimization-contest"):
    def one_start_for_the_rivals(search, starts):
        """{first} had {more} starts and {second} {fewer}: more tries alone make an attack look
        better. Give all the same starts."""
        tried = dict.fromkeys(METHODS, starts[2:4]) | {METHODS[2]: starts}
        return {m: min(_ended(search, m, tried[m]), key=_objective).inputs for m in METHODS}

    def nan_overlooked(search, starts):
        """A run of {method} ended in NaN, and you keep it or are stopped by it: every comparison
        with NaN is false."""
        runs = {m: [search(m, start) for start in starts] for m in METHODS}
        return {m: min(each, key=_objective).inputs for m, each in runs.items()}

    def maximum_for_minimum(search, starts):
        """For {method} you keep the run of highest objective."""
        return {m: max(_ended(search, m, starts), key=_objective).inputs for m in METHODS}

    def last_run_taken(search, starts):
        """For {method} you keep one by its place, the first or the last, and not by its
        objective."""
        return {m: _ended(search, m, starts)[-1].inputs for m in METHODS}

    def lowest_objective_of_all(search, starts):
        """You give {method} the picture of another attack. The objectives of different attacks are
        different measures: choose within an attack."""
        every = [run for m in METHODS for run in _ended(search, m, starts)]
        return dict.fromkeys(METHODS, min(every, key=_objective).inputs)

    def mean_of_the_runs(search, starts):
        """For {method} you mix the runs' pictures; the mean of two guesses is neither."""
        ended = {m: [run.inputs for run in _ended(search, m, starts)] for m in METHODS}
        return {m: torch.stack(pictures).mean(0) for m, pictures in ended.items()}


def check_contest(contest: Student, seed: int = 3, runs: int = 6) -> None:
    """Check: three attacks on one gradient, compared fairly."""
    searches, starts = Searches(seed), list(range(runs))
    answer = ask(contest, searches.run, list(starts))
    one_each = f"Return a dictionary with one picture for each of the methods {', '.join(METHODS)}."
    demand(isinstance(answer, dict) and set(answer) == set(METHODS), one_each)
    counts = {m: len({s for n, s in searches.asked if n == m}) for m in METHODS}
    first, second = max(METHODS, key=counts.__getitem__), min(METHODS, key=counts.__getitem__)
    facts = {"first": first, "more": counts[first], "second": second, "fewer": counts[second]}
    demand(set(counts.values()) == {runs}, Contest.one_start_for_the_rivals, **facts)
    every = [searches.made(m, s).inputs for m in METHODS for s in starts]
    for method in METHODS:
        kept = tensor(answer[method], f"the picture of {method}")
        own = [searches.made(method, start) for start in starts]
        ended = sorted(_ended(searches.made, method, starts), key=_objective)

        def among(pictures: list[Tensor], kept: Tensor = kept) -> bool:
            return any(torch.equal(kept, picture) for picture in pictures)

        if not among([ended[0].inputs]):
            lost = [run.inputs for run in own if run.objective != run.objective]
            demand(not among(lost), Contest.nan_overlooked, method=method)
            demand(not among([ended[-1].inputs]), Contest.maximum_for_minimum, method=method)
            mine = among([run.inputs for run in own])
            demand(mine or not among(every), Contest.lowest_objective_of_all, method=method)
            demand(mine, Contest.mean_of_the_runs, method=method)
            refuse(Contest.last_run_taken, method=method)
    right(f"{runs} starts for each, and only what the attacker sees decides.")


class Another(Mistakes, of="optimization-another"):
    def twice_as_bright(x):
        """Your picture leaves [0, 1]: from {low:.2f} to {high:.2f}."""
        return 2 * x

    def black_picture(x):
        """Your picture sends a gradient of zero, and a direction is what zero does not have."""
        return torch.zeros_like(x)

    def hardly_darker(x):
        """The cosine is blind to the change, and so is the eye: by {change:.0%} of the picture's
        size. Change it by 30 % at least."""
        return 0.9 * x

    def brightness_shifted(x):
        """The cosine sees it: {objective:.1e}. You moved all pixels by the same amount, and the
        network passes on sums of pixels with weights: which kind of change commutes with that?"""
        return (x + 1 - x.max()) if x.max() < 0.99 else x - x.min()

    def mirror_image(x):
        """The cosine sees it: the objective is {objective:.1e}. Without a bias and with ReLU, what
        does a change of the picture do that all layers pass on alike?"""
        return x.flip(-1)

    def negative_of_the_picture(x):
        """Like mirror_image."""
        return 1 - x


def _gradient(weights: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    leaves = [w.clone().requires_grad_() for w in weights]
    logit = leaves[1] @ (leaves[0] @ x.flatten()).relu()
    loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.ones_like(logit))
    return _long(list(torch.autograd.grad(loss, leaves)))


def check_another(another: Student, seed: int = 4, size: int = 8) -> None:
    """Check: two pictures that the cosine cannot tell apart."""
    x = 0.2 + 0.6 * normal(seed, size, size).sigmoid()
    weights = normal(seed + 1, 30, size**2) / size, normal(seed + 2, 1, 30) / 5
    found = tensor(ask(another, x), "your picture")
    shape = "Return a picture of the same shape as the one that you were given."
    demand(found.shape == x.shape, shape)
    low, high = float(found.min()), float(found.max())
    demand(low >= 0 and high <= 1, Another.twice_as_bright, low=low, high=high)
    g, h = _gradient(weights, x), _gradient(weights, found)
    demand(float(h.norm()) > 1e-12, Another.black_picture)
    objective = 1 - float(g @ h / (g.norm() * h.norm()))
    moved = found - x
    shifted = float((moved - moved.mean()).abs().max()) < 1e-9 < float(moved.abs().max())
    seen = Another.brightness_shifted if shifted else Another.mirror_image
    demand(objective < 1e-9, seen, objective=objective)
    change = float(moved.norm() / x.norm())
    demand(change >= 0.3, Another.hardly_darker, change=change)
    distance = float((h - g).square().sum() / g.square().sum())
    right(
        f"The cosine differs from one by {max(objective, 0):.0e}, and the picture is at "
        f"{gi.metrics.psnr(found, x):.0f} dB. DLG's distance would have seen it: {distance:.2f}."
    )


@dataclass(frozen=True)
class Claim:
    """An attack is said to be better than another, on one picture.

    Attributes
    ----------
    psnr, rival_psnr : float
        Of the two attacks, in dB.
    mean_psnr, nearest_psnr : float
        Of the two baselines: the mean picture, and the nearest other picture of its class.
    chosen_by, rival_chosen_by : str
        What picked the result among the runs: ``"objective"`` or ``"truth"``.
    starts, rival_starts : int
        How many runs each attack was allowed.
    same_update : bool
        Whether both saw the same gradient.
    """

    psnr: float
    rival_psnr: float
    mean_psnr: float
    nearest_psnr: float
    chosen_by: str
    rival_chosen_by: str
    starts: int
    rival_starts: int
    same_update: bool


def _stands(c: Claim, **overlooked: object) -> bool:
    """Solve the exercise, with some facts replaced by others."""
    c = replace(c, **overlooked)
    honest = c.same_update and c.starts <= c.rival_starts and c.chosen_by == "objective"
    return honest and c.psnr > max(c.rival_psnr, c.mean_psnr, c.nearest_psnr)


class Stands(Mistakes, of="optimization-stands"):
    def rival_forgotten(c):
        """The rival's figure is higher, and you let the claim stand."""
        return _stands(c, rival_psnr=0)

    def baselines_forgotten(c):
        """The result is worse than a picture that needs no gradient at all, the mean; the rival is
        worse still, and that saves nothing."""
        return _stands(c, mean_psnr=0, nearest_psnr=0)

    def mean_picture_alone(c):
        """The nearest picture of the class scores higher: a label and an album would have done
        better."""
        return _stands(c, nearest_psnr=0)

    def peeking_allowed(c):
        """The result was picked with the truth in hand, which no attacker has."""
        return _stands(c, chosen_by="objective")

    def starts_not_counted(c):
        """One attack was allowed 100 starts and the other 6."""
        return _stands(c, starts=0)

    def gradients_not_compared(c):
        """The two attacks did not see the same gradient."""
        return _stands(c, same_update=True)

    def every_unfairness_counted(c):
        """Only the rival was picked with the truth in hand. That flatters the rival, and the claim
        stands all the same: ours beats even the flattered figure."""
        return _stands(c) and c.rival_chosen_by == "objective"


def check_stands(stands: Student, seed: int = 5) -> None:
    """Check: whether a comparison of two attacks means anything."""
    shift = float(normal(seed, 1).abs())
    fair = Claim(25 + shift, 22 + shift, 12, 19, "objective", "objective", 6, 6, True)
    sound = "Same gradient, same starts, nobody peeked, and both baselines are beaten: it stands."
    cases = [
        (fair, True, sound),
        (replace(fair, rival_psnr=fair.psnr + 1), False, Stands.rival_forgotten),
        (replace(fair, psnr=11.0, rival_psnr=9.0), False, Stands.baselines_forgotten),
        (replace(fair, psnr=18.0, rival_psnr=9.0), False, Stands.mean_picture_alone),
        (replace(fair, chosen_by="truth"), False, Stands.peeking_allowed),
        (replace(fair, starts=100), False, Stands.starts_not_counted),
        (replace(fair, same_update=False), False, Stands.gradients_not_compared),
        (replace(fair, rival_chosen_by="truth"), True, Stands.every_unfairness_counted),
    ]
    each(stands, cases)
    right("Both baselines, the same gradient, the same starts, and the truth kept out of it.")
