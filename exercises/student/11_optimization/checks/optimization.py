"""Checks of the exercises on attacks by optimisation.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
from dataclasses import dataclass, field, replace
import torch
from torch import Tensor, nn
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, demand, each, expect, known, normal, refuse, right, tensor
METHODS = ('dlg', 'idlg', 'inverting_gradients')
def _long(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
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
        objective = (1e-09, 1e-06, 0.01)[place] * float(draw[4].exp())
        return Run(draw[:4].clone(), float('nan') if start % 4 == place else objective)
def _ended(search, method, starts):
    """The runs of a method that did not end in NaN."""
    runs = [search(method, start) for start in starts]
    return [run for run in runs if run.objective == run.objective]
def _objective(run: Run) -> float:
    return run.objective
class Contest(Mistakes, of='optimization-contest'):

    def one_start_for_the_rivals(*_):
        """{first} had {more} starts and {second} {fewer}: more tries alone make an attack look
        better. Give all the same starts."""
        raise NotImplementedError

    def nan_overlooked(*_):
        """A run of {method} ended in NaN, and you keep it or are stopped by it: every comparison
        with NaN is false."""
        raise NotImplementedError

    def maximum_for_minimum(*_):
        """For {method} you keep the run of highest objective."""
        raise NotImplementedError

    def last_run_taken(*_):
        """For {method} you keep one by its place, the first or the last, and not by its
        objective."""
        raise NotImplementedError

    def lowest_objective_of_all(*_):
        """You give {method} the picture of another attack. The objectives of different attacks are
        different measures: choose within an attack."""
        raise NotImplementedError

    def mean_of_the_runs(*_):
        """For {method} you mix the runs' pictures; the mean of two guesses is neither."""
        raise NotImplementedError
def check_contest(contest: Student, seed: int=3, runs: int=6) -> None:
    """Check: three attacks on one gradient, compared fairly."""
    searches, starts = (Searches(seed), list(range(runs)))
    answer = ask(contest, searches.run, list(starts))
    one_each = f"Return a dictionary with one picture for each of the methods {', '.join(METHODS)}."
    demand(isinstance(answer, dict) and set(answer) == set(METHODS), one_each)
    counts = {m: len({s for n, s in searches.asked if n == m}) for m in METHODS}
    first, second = (max(METHODS, key=counts.__getitem__), min(METHODS, key=counts.__getitem__))
    facts = {'first': first, 'more': counts[first], 'second': second, 'fewer': counts[second]}
    demand(set(counts.values()) == {runs}, Contest.one_start_for_the_rivals, **facts)
    every = [searches.made(m, s).inputs for m in METHODS for s in starts]
    for method in METHODS:
        kept = tensor(answer[method], f'the picture of {method}')
        own = [searches.made(method, start) for start in starts]
        ended = sorted(_ended(searches.made, method, starts), key=_objective)

        def among(pictures: list[Tensor], kept: Tensor=kept) -> bool:
            return any((torch.equal(kept, picture) for picture in pictures))
        if not among([ended[0].inputs]):
            lost = [run.inputs for run in own if run.objective != run.objective]
            demand(not among(lost), Contest.nan_overlooked, method=method)
            demand(not among([ended[-1].inputs]), Contest.maximum_for_minimum, method=method)
            mine = among([run.inputs for run in own])
            demand(mine or not among(every), Contest.lowest_objective_of_all, method=method)
            demand(mine, Contest.mean_of_the_runs, method=method)
            refuse(Contest.last_run_taken, method=method)
    right(f'{runs} starts for each, and only what the attacker sees decides.')
class Another(Mistakes, of='optimization-another'):

    def twice_as_bright(*_):
        """Your picture leaves [0, 1]: from {low:.2f} to {high:.2f}."""
        raise NotImplementedError

    def black_picture(*_):
        """Your picture sends a gradient of zero, and a direction is what zero does not have."""
        raise NotImplementedError

    def hardly_darker(*_):
        """The cosine is blind to the change, and so is the eye: by {change:.0%} of the picture's
        size. Change it by 30 % at least."""
        raise NotImplementedError

    def brightness_shifted(*_):
        """The cosine sees it: {objective:.1e}. You moved all pixels by the same amount, and the
        network passes on sums of pixels with weights: which kind of change commutes with that?"""
        raise NotImplementedError

    def mirror_image(*_):
        """The cosine sees it: the objective is {objective:.1e}. Without a bias and with ReLU, what
        does a change of the picture do that all layers pass on alike?"""
        raise NotImplementedError

    def negative_of_the_picture(*_):
        """Like mirror_image."""
        raise NotImplementedError
def _gradient(weights: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    leaves = [w.clone().requires_grad_() for w in weights]
    logit = leaves[1] @ (leaves[0] @ x.flatten()).relu()
    loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.ones_like(logit))
    return _long(list(torch.autograd.grad(loss, leaves)))
def check_another(another: Student, seed: int=4, size: int=8) -> None:
    """Check: two pictures that the cosine cannot tell apart."""
    x = 0.2 + 0.6 * normal(seed, size, size).sigmoid()
    weights = (normal(seed + 1, 30, size ** 2) / size, normal(seed + 2, 1, 30) / 5)
    found = tensor(ask(another, x), 'your picture')
    shape = 'Return a picture of the same shape as the one that you were given.'
    demand(found.shape == x.shape, shape)
    low, high = (float(found.min()), float(found.max()))
    demand(low >= 0 and high <= 1, Another.twice_as_bright, low=low, high=high)
    g, h = (_gradient(weights, x), _gradient(weights, found))
    demand(float(h.norm()) > 1e-12, Another.black_picture)
    objective = 1 - float(g @ h / (g.norm() * h.norm()))
    moved = found - x
    shifted = float((moved - moved.mean()).abs().max()) < 1e-09 < float(moved.abs().max())
    seen = Another.brightness_shifted if shifted else Another.mirror_image
    demand(objective < 1e-09, seen, objective=objective)
    change = float(moved.norm() / x.norm())
    demand(change >= 0.3, Another.hardly_darker, change=change)
    distance = float((h - g).square().sum() / g.square().sum())
    right(f"The cosine differs from one by {max(objective, 0):.0e}, and the picture is at {gi.metrics.psnr(found, x):.0f} dB. DLG's distance would have seen it: {distance:.2f}.")
from .recorded import recorded

check_objectives = recorded("check_objectives")
check_labels = recorded("check_labels")
check_stands = recorded("check_stands")
