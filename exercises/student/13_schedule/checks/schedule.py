"""Checks of the exercises on defense by schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import Mistakes, Student, ask, demand, expect, normal, pair, refuse, right

LOSS = nn.CrossEntropyLoss()


def _counts(steps: int, momentum: float) -> Tensor:
    powers = torch.tensor([momentum**j for j in range(steps)], dtype=torch.float64)
    return powers.cumsum(0).flip(0)


class Counts(Mistakes, of="schedule-counts"):
    def momentum_ignored(steps, momentum):
        """Your counts are those of plain SGD. With momentum a gradient goes on pushing in the
        steps after its own."""
        return torch.ones(steps)

    def counted_from_the_end(steps, momentum):
        """Your order is backwards: which gradient has the most steps left in which to push?"""
        return _counts(steps, momentum).flip(0)

    def last_velocity_only(steps, momentum):
        """Those are the shares in the last step alone; the update sums all steps."""
        return torch.tensor([momentum ** (steps - 1 - t) for t in range(steps)]).double()

    def last_velocity_backwards(steps, momentum):
        """Like last_velocity_only."""
        return Counts.last_velocity_only(steps, momentum).flip(0)

    def geometric_series_without_end(steps, momentum):
        """You let every gradient push for ever; the client stops after T steps."""
        return torch.full((steps,), 1 / (1 - momentum), dtype=torch.float64)

    def own_step_left_out(steps, momentum):
        """A gradient counts in its own step already: you begin one step later."""
        return _counts(steps, momentum) - 1


def check_counts(
    counts: Student, cases: tuple[tuple[int, float], ...] = ((4, 0.5), (6, 0.9))
) -> None:
    """Check: how often each step's gradient counts in the update, under momentum."""
    for steps, momentum in cases:
        case = f"for {steps} steps with momentum {momentum}"
        given = (steps, momentum)
        expect("schedule-counts", counts, given, _counts(*given), "the counts", case)
    right("Weights and biases share these counts, so the ratio of a first dense layer keeps x.")


def _share(steps: int, rate: float, momentum: float, decay: float) -> float:
    """How much of the first weights the decay puts into an update."""
    theta, v, share = 1.0, 0.0, 0.0
    for _ in range(steps):
        v = momentum * v + decay * theta
        theta, share = theta - rate * v, share + v
    return share


class WithoutDecay(Mistakes, of="schedule-decay"):
    def decay_of_weights_that_stand_still(sent, start, steps, rate, momentum, decay):
        """You took the decay of weights that stand still. They shrink from step to step, and the
        decay with them."""
        return sent - decay * _counts(steps, momentum).sum() * start

    def decay_times_steps(sent, start, steps, rate, momentum, decay):
        """Like decay_of_weights_that_stand_still."""
        return sent - decay * steps * start

    def decay_of_one_step(sent, start, steps, rate, momentum, decay):
        """You took the decay of the first step out; there were more."""
        return sent - decay * start

    def decay_added(sent, start, steps, rate, momentum, decay):
        """What the decay added to the update must be taken away, and you added it once more."""
        return sent + _share(steps, rate, momentum, decay) * start

    def momentum_forgotten(sent, start, steps, rate, momentum, decay):
        """The decay passes through the momentum as well: it is added before the velocity."""
        return sent - _share(steps, rate, 0.0, decay) * start

    def not_divided_by_the_learning_rate(sent, start, steps, rate, momentum, decay):
        """The update is (start - end) / η; you took away what the decay moved the weights by,
        without dividing that by the learning rate."""
        return sent - rate * _share(steps, rate, momentum, decay) * start


def check_without_decay(without_decay: Student, seed: int = 1, steps: int = 8) -> None:
    """Check: known weight decay, taken out of an update of several steps."""
    start, clean, schedule = normal(seed, 3, 5), normal(seed + 1, 3, 5), (steps, 0.4, 0.5, 0.1)
    given = (clean + _share(*schedule) * start, start, *schedule)
    expect("schedule-decay", without_decay, given, clean, "the update without its decay")
    right("What the server knows of the schedule costs the attack nothing.")


def _walk(W, b, x, target, steps, rate, still=False):
    """The client's update; with ``still``, no derivative passes through moving weights."""
    total_W, total_b = torch.zeros_like(W), torch.zeros_like(b)
    for _ in range(steps):
        k = torch.softmax(W @ x + b, 0) - torch.eye(len(b), dtype=b.dtype)[target]
        G = torch.outer(k, x)
        total_W, total_b = total_W + G, total_b + k
        W, b = (W - rate * (G.detach() if still else G)), b - rate * (k.detach() if still else k)
    return total_W, total_b


class Imitate(Mistakes, of="schedule-imitate"):
    def first_gradient_times_steps(W, b, guess, target, steps, rate):
        """You took one gradient T times. The client's weights move between its steps; yours must
        move along."""
        return tuple(steps * g for g in _walk(W, b, guess, target, 1, rate))

    def one_step_only(W, b, guess, target, steps, rate):
        """That is the gradient of the first step alone."""
        return _walk(W, b, guess, target, 1, rate)

    def mean_for_sum(W, b, guess, target, steps, rate):
        """That is the mean of the steps' gradients; an update is their sum."""
        return tuple(g / steps for g in _walk(W, b, guess, target, steps, rate))

    def end_minus_start(W, b, guess, target, steps, rate):
        """Your sign is that of end - start."""
        return tuple(-g for g in _walk(W, b, guess, target, steps, rate))

    def movement_from_end_to_start(W, b, guess, target, steps, rate):
        """Like end_minus_start."""
        return tuple(-rate * g for g in _walk(W, b, guess, target, steps, rate))

    def movement_for_update(W, b, guess, target, steps, rate):
        """You return how far the weights moved; the update is that divided by the learning
        rate."""
        return tuple(rate * g for g in _walk(W, b, guess, target, steps, rate))

    def guess_detached(W, b, guess, target, steps, rate):
        """The values are right, but no derivative reaches the guess: a search could not use them.
        Where did you detach, or call backward without create_graph?"""
        return _walk(W, b, guess.detach(), target, steps, rate)

    def weights_detached_between_steps(W, b, guess, target, steps, rate):
        """The values are right, but their derivative by the guess is not: it must pass through
        every step, the weights' movement included."""
        return _walk(W, b, guess, target, steps, rate, still=True)


def check_imitate(imitate: Student, seed: int = 2, steps: int = 5) -> None:
    """Check: the client's steps, taken with a guess, and differentiable."""
    W, b, x = normal(seed, 4, 6), normal(seed + 1, 4), normal(seed + 2, 6)
    guess, same, schedule = x.clone().requires_grad_(), x.clone().requires_grad_(), (2, steps, 0.3)
    true, parts = _walk(W, b, same, *schedule), ("the update of W", "the update of b")
    answer = expect("schedule-imitate", imitate, (W, b, guess, *schedule), true, parts)
    slopes = []
    for update, at in ((answer, guess), (true, same)):
        value = sum((g * normal(9, *g.shape)).sum() for g in update)
        demand(value.requires_grad, Imitate.guess_detached)
        slopes += torch.autograd.grad(value, at, allow_unused=True)
    demand(slopes[0] is not None, Imitate.guess_detached)
    same = torch.allclose(*slopes, rtol=1e-6, atol=1e-9)
    demand(same, Imitate.weights_detached_between_steps)
    right("At the truth it is the update, and a search can follow its slope through every step.")


_GOOD = {"local_steps": 20, "learning_rate": 0.5, "momentum": 0.9}
_ADAM = {"local_steps": 1, "learning_rate": 0.01, "optimizer": "adam"}


class Schedules(Mistakes, of="schedule-schedules"):
    def too_few_steps():
        """The first schedule has {steps} local steps; take ten or more."""
        return {**_GOOD, "local_steps": 3}, _ADAM

    def decay_in_the_first():
        """The first schedule puts the ratio off by {error:.0%}. A sum of steps keeps it, as long
        as nothing but multiples of gradients is summed."""
        return {**_GOOD, "weight_decay": 0.1}, _ADAM

    def weights_that_hardly_move():
        """The first schedule moves the weights by {moved:.1%} only: that it leaves the ratio alone
        says little. Which setting decides how far they move?"""
        return {"local_steps": 10, "learning_rate": 1e-4}, _ADAM

    def many_steps_in_the_second():
        """The second schedule may have one local step only; yours has {steps}."""
        return _GOOD, {**_ADAM, "local_steps": 10}

    def momentum_taken_for_a_defense():
        """The second schedule leaves the ratio exact, to {error:.0e}. Momentum and more steps only
        change how often each gradient counts; what bends the entries of W and b differently?"""
        return _GOOD, {"local_steps": 1, "learning_rate": 0.5, "momentum": 0.99}


def _ratio_error(settings: dict[str, Any], seed: int) -> tuple[float, float]:
    """How far the ratio is off, and how far the weights moved, relative to themselves."""
    generator = torch.Generator().manual_seed(seed)
    model = gi.models.mlp((30, 20, 5), "tanh", dtype=torch.float64, generator=generator)
    x = normal(seed, 1, 30).abs()
    try:
        sent = gi.observe(model, LOSS, x, torch.tensor([1]), **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        refuse(f"gi.observe does not take these settings: {error}")
    name, bias = [n for n, _ in model.named_parameters()][:2]
    G, b = sent.gradients[name], sent.gradients[bias]
    moved = settings.get("learning_rate", 0) * G.norm() / model.get_parameter(name).detach().norm()
    found = gi.fully_connected.recover_input(G, b)
    return gi.metrics.relative_error(found, x.flatten()), float(moved)


def check_schedules(schedules: Student, seed: int = 3) -> None:
    """Check: ten steps that hide nothing, and one step that does."""
    first, second = pair(ask(schedules), "schedules()")
    both = isinstance(first, dict) and isinstance(second, dict)
    demand(both, "Return two dictionaries of settings for gi.observe: `return first, second`.")
    steps, late = first.get("local_steps", 1), second.get("local_steps", 1)
    demand(steps >= 10, Schedules.too_few_steps, steps=steps)
    error, moved = _ratio_error(first, seed)
    demand(error < 1e-6, Schedules.decay_in_the_first, error=error)
    demand(moved > 0.1, Schedules.weights_that_hardly_move, moved=moved)
    demand(late == 1, Schedules.many_steps_in_the_second, steps=late)
    other, _ = _ratio_error(second, seed)
    demand(other > 0.1, Schedules.momentum_taken_for_a_defense, error=other)
    right(
        f"{steps} steps moved the weights by {moved:.0%} and the ratio by nothing; a single step "
        f"of the other put it off by {other:.0%}. It is not the number of steps that decides."
    )


Attackers = dict[str, tuple[list[bool], list[bool]]]
Interval = Callable[[int, int], tuple[float, float]]


def _verdict(
    attackers: Attackers, drop: float, interval: Interval = gi.metrics.wilson_interval
) -> str:
    least, most = [], []
    for before, after in attackers.values():
        (low, high), (low_after, high_after) = (interval(sum(r), len(r)) for r in (before, after))
        least.append(low - high_after)
        most.append(high - low_after)
    if min(least) > drop:
        return "holds"
    return "does not hold" if min(most) < drop else "open"


def _wald(successes: int, trials: int) -> tuple[float, float]:
    p = successes / trials
    reach = 1.96 * (p * (1 - p) / trials) ** 0.5
    return p - reach, p + reach


class Verdict(Mistakes, of="schedule-verdict"):
    def rates_without_intervals(attackers, drop):
        """{name}: {before} of {n} before, {after} after. After so few trials, how far from these
        rates may the true ones lie?"""
        return _verdict(attackers, drop, lambda a, n: (a / n, a / n))

    def plus_or_minus_for_wilson(attackers, drop):
        """{name}: an interval that shrinks to nothing where all or none succeed claims certainty
        after {n} trials. Use Wilson's."""
        return _verdict(attackers, drop, _wald)

    def intervals_only_apart(attackers, drop):
        """{name}: that the intervals are apart shows that the rate fell. The claim says by *how
        much*."""
        true, apart = _verdict(attackers, drop), _verdict(attackers, 0.0) == "holds"
        return "holds" if apart and true == "does not hold" else true

    def naive_attacker_only(attackers, drop):
        """A defense is as good as against the attacker who knows of it: {name} loses nothing, and
        you say that the claim holds."""
        return _verdict(dict(list(attackers.items())[:1]), drop)

    def open_taken_for_holds(attackers, drop):
        """{name}: so few trials neither confirm nor refute the claim, and a claim for all
        attackers waits for the last of them."""
        many = {a: r for a, r in attackers.items() if len(attackers) == 1 or len(r[0]) > 10}
        return _verdict(many, drop)


def check_verdict(verdict: Student, times: int = 1) -> None:
    """Check: whether a claimed fall of a success rate holds."""
    sure = "{name}: {before} of {n} before, {after} after: both intervals leave no doubt."
    unaware = {"unaware": ((60, 60), (0, 60))}
    cases = [
        ({"the search": ((60, 60), (0, 60))}, times, sure),
        ({"the search": ((5, 5), (1, 5))}, 1, Verdict.rates_without_intervals),
        ({"the search": ((4, 4), (0, 4))}, 1, Verdict.plus_or_minus_for_wilson),
        ({"the search": ((40, 60), (20, 60))}, times, Verdict.intervals_only_apart),
        ({**unaware, "the aware search": ((60, 60), (58, 60))}, times, Verdict.naive_attacker_only),
        ({**unaware, "the aware search": ((2, 2), (1, 2))}, 1, Verdict.open_taken_for_holds),
    ]
    for counts, more, hint in cases:
        attackers: Attackers = {
            name: tuple([True] * more * a + [False] * more * (n - a) for a, n in both)
            for name, both in counts.items()
        }
        answer = ask(verdict, attackers, 0.6)
        options = ("holds", "does not hold", "open")
        demand(answer in options, "Return one of 'holds', 'does not hold' and 'open'.")
        name, ((before, n), (after, _)) = list(counts.items())[-1]
        facts = {"name": name, "before": before, "n": n, "after": after}
        demand(answer == _verdict(attackers, 0.6), hint, **facts)
    right("A rate with its interval, a claim with its size, and the attacker who knows.")
