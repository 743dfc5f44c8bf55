"""Checks of the exercises to chapter 8, attacks by optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..metrics import psnr
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor

METHODS = ("dlg", "idlg", "inverting_gradients")


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


UNDIVIDED = (
    "Your distance is not divided by anything: it should be 1 for a guess whose gradient is zero."
)
ROOT = "Your distance is not squared; that moves no minimum, but it is not DLG's objective."
EACH = (
    "You compared tensor by tensor and took the mean. The gradient is one long vector: one length, "
    "one angle."
)
OWN_LENGTH = "You divided by the guess's gradient. Divide by what does not change with the guess."
NEARNESS = "Your cosine is largest for the right picture, and an objective is descended."
NO_TV = "The second objective has a part that looks at the picture alone, and yours has none."
TV_SUM = "You added the differences of neighbours up; the chapter takes their means."
TV_SQUARED = "You squared the differences of neighbours, where total variation takes their sizes."
UNSCALED = "Your inner product is not divided by both lengths, so that it is not a cosine."
WEIGHT = "You left out the weight of the total variation."


def _parts(picture: Tensor) -> tuple[Tensor, Tensor]:
    return picture.diff(dim=-1), picture.diff(dim=-2)


def check_objectives(objectives: Student, seed: int = 1, size: int = 6) -> None:
    """Check 8.1: what DLG and what Inverting Gradients descend."""
    shapes = [(4, 3, 2, 2), (4,), (10, 16)]
    sent = [(i + 1) * _random(seed + i, *shape) for i, shape in enumerate(shapes)]
    found = [g + 0.5 * _random(seed + 9 + i, *g.shape) for i, g in enumerate(sent)]
    picture, alpha = _random(seed + 20, 1, 1, size, size + 1), 0.3
    g, h = (torch.cat([part.flatten() for part in parts]) for parts in (sent, found))
    pairs = list(zip(found, sent, strict=True))
    distance = (h - g).square().sum() / g.square().sum()
    each = torch.stack([(a - b).square().sum() / b.square().sum() for a, b in pairs])
    cosine, across, down = h @ g / (h.norm() * g.norm()), *_parts(picture)
    variation = across.abs().mean() + down.abs().mean()
    angles = torch.stack(
        [nn.functional.cosine_similarity(a.ravel(), b.ravel(), 0) for a, b in pairs]
    )
    answer = ask(objectives, [t.clone() for t in sent], [t.clone() for t in found], picture, alpha)
    first, second = pair(answer, "objectives(...)")
    known: list[Wrong] = [
        (UNDIVIDED, distance * g.square().sum()),
        (UNDIVIDED, (h - g).norm()),
        (ROOT, distance.sqrt()),
        (EACH, each.mean()),
        (EACH, each.sum()),
        (OWN_LENGTH, (h - g).square().sum() / h.square().sum()),
    ]
    compare(first, distance, "DLG's objective", known)
    total, squared = across.abs().sum() + down.abs().sum(), across.square().mean()
    known = [
        (NO_TV, 1 - cosine),
        (NEARNESS, cosine + alpha * variation),
        (NEARNESS, -cosine + alpha * variation),
        (EACH, 1 - angles.mean() + alpha * variation),
        (EACH, (1 - angles).sum() + alpha * variation),
        (TV_SUM, 1 - cosine + alpha * total),
        (TV_SQUARED, 1 - cosine + alpha * (squared + down.square().mean())),
        (UNSCALED, 1 - h @ g + alpha * variation),
        (WEIGHT, 1 - cosine + variation),
    ]
    compare(second, 1 - cosine + alpha * variation, "the objective of Inverting Gradients", known)
    right("One asks for the gradient, the other for its direction and a smooth picture.")


LIST = "Return {samples} whole numbers, one label for each sample, in ascending order."
ONCE = (
    "You name each class once. Several samples may share a label: what becomes of an entry when "
    "one of its labels has been taken account of?"
)
STUCK = (
    "You find the same class again and again: a label that has been found still pulls its entry "
    "down."
)
UNSUBTRACTED = (
    "You took the entries as they are. This network prefers some classes whatever it sees, and "
    "that hides their labels: take away what is due to it."
)
SIGN = "You looked for the highest entries; a label pulls its own down."
NEGATIVES = (
    "You returned the negative entries. With several samples their number is not that of the "
    "samples."
)
ASCENDING = "The labels are right, and not in ascending order."


def _greedy(b: Tensor, p: Tensor, samples: int, pull: float, back: float = 1.0) -> list[int]:
    rest, found = b - pull * p, []
    for _ in range(samples):
        found.append(int(rest.argmin()))
        rest[found[-1]] += back / samples
    return sorted(found)


def check_labels(labels: Student, seed: int = 2, samples: int = 8) -> None:
    """Check 8.2: the labels of a batch, from the last bias gradient."""
    classes = 6
    g = torch.Generator().manual_seed(seed)
    bias = torch.tensor([2.2, 0.2, -0.4, 0.0, 0.5, -1.0], dtype=torch.float64)
    y = torch.cat([torch.tensor([0, 0]), torch.randint(3, classes, (samples - 2,), generator=g)])
    p = (bias + 0.05 * _random(seed, samples, classes)).softmax(1)
    mean = bias.softmax(0)
    b = (p - nn.functional.one_hot(y, classes)).mean(0)
    true = sorted(y.tolist())
    answer = ask(labels, b.clone(), mean.clone(), samples)
    try:
        found = [int(value) for value in answer]
    except (TypeError, ValueError):
        found = []
    negative = (b < 0).nonzero().flatten().tolist()
    known = [
        (ONCE, sorted((b - mean).topk(min(samples, classes), largest=False).indices.tolist())),
        (ONCE, _greedy(b, mean, samples, 1.0, float(samples))),
        (STUCK, _greedy(b, mean, samples, 1.0, 0.0)),
        (UNSUBTRACTED, _greedy(b, mean, samples, 0.0)),
        (SIGN, _greedy(-b, -mean, samples, 1.0, 1.0)),
        (NEGATIVES, negative),
    ]
    for hint, wrong in known:
        demand(sorted(found) != wrong or wrong == true, hint)
    demand(len(set(found)) > 1 or len(found) != samples, STUCK)
    demand(len(found) == samples, LIST.format(samples=samples))
    demand(sorted(found) == true, f"{_misplaced(found, y)} of {samples} labels are not right.")
    demand(found == true, ASCENDING)
    right("Subtract, take the lowest, give its pull back, and look again.")


def _misplaced(found: list[int], y: Tensor) -> int:
    rest = y.tolist()
    for value in found:
        if value in rest:
            rest.remove(value)
    return len(rest)


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
        return self._made(method, start)

    def _made(self, method: str, start: int) -> Run:
        place = METHODS.index(method)
        draw = _random(self.seed + 100 * start + place, 5)
        lost = start % 4 == place
        scale = (1e-9, 1e-6, 1e-2)[place]
        objective = float("nan") if lost else scale * float(draw[4].exp())
        return Run(draw[:4].clone(), objective)

    def ended(self, method: str, starts: list[int]) -> list[Run]:
        """Return the runs of a method that did not end in NaN, the lowest objective first."""
        runs = [self._made(method, start) for start in starts]
        return sorted((r for r in runs if r.objective == r.objective), key=lambda r: r.objective)


ONE_FOR_EACH = "Return a dictionary with one picture for each of the methods {names}."
UNEVEN = (
    "{first} had {more} starts and {second} {fewer}: more tries alone make an attack look better. "
    "Give all the same starts."
)
LOST = (
    "A run of {method} ended in NaN, and you keep it or are stopped by it: every comparison with "
    "NaN is false."
)
HIGHEST = "For {method} you keep the run of highest objective."
LATEST = "For {method} you keep one by its place, the first or the last, and not by its objective."
ACROSS = (
    "You give {method} the picture of another attack. The objectives of different attacks are "
    "different measures: choose within an attack."
)
MEAN = "For {method} you mix the runs' pictures; the mean of two guesses is neither."


def check_contest(contest: Student, seed: int = 3, runs: int = 6) -> None:
    """Check 8.3: three attacks on one gradient, compared fairly."""
    searches, starts = Searches(seed), list(range(runs))
    answer = ask(contest, searches.run, list(starts))
    names = ", ".join(METHODS)
    demand(
        isinstance(answer, dict) and set(answer) == set(METHODS), ONE_FOR_EACH.format(names=names)
    )
    counts = {m: len({s for n, s in searches.asked if n == m}) for m in METHODS}
    most, least = max(METHODS, key=lambda m: counts[m]), min(METHODS, key=lambda m: counts[m])
    facts = {"first": most, "more": counts[most], "second": least, "fewer": counts[least]}
    demand(counts[most] == counts[least] == runs, UNEVEN.format(**facts))
    every = [searches._made(m, s).inputs for m in METHODS for s in starts]
    for method in METHODS:
        kept = tensor(answer[method], f"the picture of {method}")
        ended = searches.ended(method, starts)
        if torch.equal(kept, ended[0].inputs.double()):
            continue
        own = [searches._made(method, start) for start in starts]
        lost = [run for run in own if run.objective != run.objective]
        demand(not any(torch.equal(kept, run.inputs) for run in lost), LOST.format(method=method))
        demand(not torch.equal(kept, ended[-1].inputs), HIGHEST.format(method=method))
        ends = (own[0].inputs, own[-1].inputs)
        demand(not any(torch.equal(kept, end) for end in ends), LATEST.format(method=method))
        mine = any(torch.equal(kept, run.inputs) for run in own)
        demand(mine or not any(torch.equal(kept, x) for x in every), ACROSS.format(method=method))
        demand(mine, MEAN.format(method=method))
        demand(False, LATEST.format(method=method))
    right(f"{runs} starts for each, and only what the attacker sees decides.")


SHAPE = "Return a picture of the same shape as the one that you were given."
RANGE = "Your picture leaves [0, 1]: from {low:.2f} to {high:.2f}."
BLACK = "Your picture sends a gradient of zero, and a direction is what zero does not have."
SAME = (
    "The cosine is blind to the change, and so is the eye: by {change:.0%} of the picture's size. "
    "Change it by 30 % at least."
)
SEEN = (
    "The cosine sees it: the objective is {objective:.1e}. Without a bias and with ReLU, what does "
    "a change of the picture do that all layers pass on alike?"
)
SHIFTED = (
    "The cosine sees it: {objective:.1e}. You moved all pixels by the same amount, and the network "
    "passes on sums of pixels with weights: which kind of change commutes with that?"
)


def _gradient(weights: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    leaves = [w.clone().requires_grad_() for w in weights]
    logit = leaves[1] @ (leaves[0] @ x.flatten()).relu()
    loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.ones_like(logit))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])


def check_another(another: Student, seed: int = 4, size: int = 8) -> None:
    """Check 8.4: two pictures that the cosine cannot tell apart."""
    x = 0.2 + 0.6 * _random(seed, size, size).sigmoid()
    weights = _random(seed + 1, 30, size**2) / size, _random(seed + 2, 1, 30) / 5
    found = tensor(ask(another, x.clone()), "your picture")
    demand(found.shape == x.shape, SHAPE)
    low, high = float(found.min()), float(found.max())
    demand(low >= 0 and high <= 1, RANGE.format(low=low, high=high))
    g, h = _gradient(weights, x), _gradient(weights, found)
    demand(float(h.norm()) > 1e-12, BLACK)
    objective = 1 - float(g @ h / (g.norm() * h.norm()))
    moved = found - x
    shifted = float((moved - moved.mean()).abs().max()) < 1e-9 < float(moved.abs().max())
    demand(objective < 1e-9 or not shifted, SHIFTED.format(objective=objective))
    demand(objective < 1e-9, SEEN.format(objective=objective))
    change = float(moved.norm() / x.norm())
    demand(change >= 0.3, SAME.format(change=change))
    distance = float((h - g).square().sum() / g.square().sum())
    right(
        f"The cosine differs from one by {max(objective, 0):.0e}, and the picture is at "
        f"{psnr(found, x):.0f} dB. DLG's distance would have seen it: {distance:.2f}."
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


SOUND = (
    "Same gradient, same starts, nobody peeked, and both baselines are beaten: the claim stands."
)
WORSE = "The rival's figure is higher, and you let the claim stand."
BELOW_MEAN = (
    "The result is worse than a picture that needs no gradient at all, the mean; the rival is "
    "worse still, and that saves nothing."
)
BELOW_NEAREST = (
    "The nearest picture of the class scores higher: a label and an album would have done better."
)
PEEKED = "The result was picked with the truth in hand, which no attacker has."
RIVAL_PEEKED = (
    "Only the rival was picked with the truth in hand. That flatters the rival, and the claim "
    "stands all the same: {ours} dB beat even the flattered figure."
)
MORE_STARTS = "One attack was allowed {more} starts and the other {fewer}."
OTHER = "The two attacks did not see the same gradient."


def check_stands(stands: Student, seed: int = 5) -> None:
    """Check 8.5: whether a comparison of two attacks means anything."""
    shift = float(_random(seed, 1).abs())
    fair = Claim(25 + shift, 22 + shift, 12, 19, "objective", "objective", 6, 6, True)
    cases = [
        (fair, True, SOUND),
        (replace(fair, rival_psnr=fair.psnr + 1), False, WORSE),
        (replace(fair, psnr=11.0, rival_psnr=9.0), False, BELOW_MEAN),
        (replace(fair, psnr=18.0, rival_psnr=9.0), False, BELOW_NEAREST),
        (replace(fair, chosen_by="truth"), False, PEEKED),
        (replace(fair, starts=100), False, MORE_STARTS.format(more=100, fewer=6)),
        (replace(fair, same_update=False), False, OTHER),
        (
            replace(fair, rival_chosen_by="truth"),
            True,
            RIVAL_PEEKED.format(ours=round(fair.psnr)),
        ),
    ]
    for case, truth, hint in cases:
        demand(bool(ask(stands, case)) == truth, hint)
    right("Both baselines, the same gradient, the same starts, and the truth kept out of it.")
