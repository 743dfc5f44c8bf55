"""Checks of the exercises to chapter 10, defense by schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..fully_connected import recover_input
from ..metrics import relative_error, wilson_interval
from ..models import mlp
from ..sharing import observe
from .verdict import Student, Wrong, ask, compare, demand, pair, right, tensor

LOSS = nn.CrossEntropyLoss()


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PLAIN = (
    "Your counts are those of plain SGD. With momentum a gradient goes on pushing in the steps "
    "after its own."
)
BACKWARDS = "Your order is backwards: which gradient has the most steps left in which to push?"
LAST = "Those are the shares in the last step alone; the update sums all steps."
FOREVER = "You let every gradient push for ever; the client stops after T steps."
EARLY = "A gradient counts in its own step already: you begin one step later."


def _counts(steps: int, momentum: float) -> Tensor:
    return torch.tensor(
        [sum(momentum**j for j in range(steps - t)) for t in range(steps)], dtype=torch.float64
    )


def check_counts(
    counts: Student, cases: tuple[tuple[int, float], ...] = ((4, 0.5), (6, 0.9))
) -> None:
    """Check 10.1: how often each step's gradient counts in the update, under momentum."""
    for steps, momentum in cases:
        true = _counts(steps, momentum)
        powers = torch.tensor([momentum**j for j in range(steps)], dtype=torch.float64)
        known: list[Wrong] = [
            (PLAIN, torch.ones_like(true)),
            (BACKWARDS, true.flip(0)),
            (LAST, powers.flip(0)),
            (LAST, powers),
            (FOREVER, torch.full_like(true, 1 / (1 - momentum))),
            (EARLY, true - 1),
        ]
        case = f"for {steps} steps with momentum {momentum}"
        compare(ask(counts, steps, momentum, case=case), true, f"the counts {case}", known)
    right("Weights and biases share these counts, so the ratio of a first dense layer keeps x.")


STANDING = (
    "You took the decay of weights that stand still. They shrink from step to step, and the decay "
    "with them."
)
ONCE = "You took the decay of the first step out; there were more."
PLUS = "What the decay added to the update must be taken away, and you added it once more."
NO_MOMENTUM = "The decay passes through the momentum as well: it is added before the velocity."
STEP_SIZE = (
    "The update is (start - end) / η; you took away what the decay moved the weights by, without "
    "dividing that by the learning rate."
)


def _decay_share(steps: int, rate: float, momentum: float, decay: float) -> float:
    theta, v, share = 1.0, 0.0, 0.0
    for _ in range(steps):
        v = momentum * v + decay * theta
        theta -= rate * v
        share += v
    return share


def check_without_decay(without_decay: Student, seed: int = 1, steps: int = 8) -> None:
    """Check 10.2: known weight decay, taken out of an update of several steps."""
    rate, momentum, decay = 0.4, 0.5, 0.1
    start, clean = _random(seed, 3, 5), _random(seed + 1, 3, 5)
    share = _decay_share(steps, rate, momentum, decay)
    sent = clean + share * start
    answer = ask(without_decay, sent.clone(), start.clone(), steps, rate, momentum, decay)
    known: list[Wrong] = [
        (hint, sent - wrong * start)
        for hint, wrong in (
            (STANDING, decay * steps),
            (STANDING, sum(_counts(steps, momentum).tolist()) * decay),
            (ONCE, decay),
            (PLUS, -share),
            (NO_MOMENTUM, _decay_share(steps, rate, 0.0, decay)),
            (STEP_SIZE, rate * share),
        )
    ]
    compare(answer, clean, "the update without its decay", known)
    right("What the server knows of the schedule costs the attack nothing.")


TIMES = (
    "You took one gradient T times. The client's weights move between its steps; yours must move "
    "along."
)
ONE = "That is the gradient of the first step alone."
MEAN = "That is the mean of the steps' gradients; an update is their sum."
SIGN = "Your sign is that of end - start."
MOVED = "You return how far the weights moved; the update is that divided by the learning rate."
CUT = (
    "The values are right, but no derivative reaches the guess: a search could not use them. Where "
    "did you detach, or call backward without create_graph?"
)
PARTIAL = (
    "The values are right, but their derivative by the guess is not: it must pass through every "
    "step, the weights' movement included."
)


def _softmax_gradient(W: Tensor, b: Tensor, x: Tensor, target: int) -> Tensor:
    """[∂L/∂W | ∂L/∂b] of cross-entropy on one dense layer."""
    k = torch.softmax(W @ x + b, 0) - torch.eye(len(b), dtype=b.dtype)[target]
    return torch.outer(k, torch.cat([x, x.new_ones(1)]))


def _imitated(theta: Tensor, x: Tensor, target: int, steps: int, rate: float) -> Tensor:
    total = torch.zeros_like(theta)
    for _ in range(steps):
        total = total + _softmax_gradient(theta[:, :-1], theta[:, -1], x, target)
        theta = theta - rate * _softmax_gradient(theta[:, :-1], theta[:, -1], x, target)
    return total


def _joined(value: object) -> Tensor:
    W, b = (tensor(part, "the update") for part in pair(value, "the update"))
    demand(b.ndim == 1 and W.ndim == 2, "Return the update of W, then that of b.")
    return torch.cat([W, b[:, None]], 1)


def check_imitate(imitate: Student, seed: int = 2, steps: int = 5) -> None:
    """Check 10.3: the client's steps, taken with a guess, and differentiable."""
    W, b, x, rate, target = _random(seed, 4, 6), _random(seed + 1, 4), _random(seed + 2, 6), 0.3, 2
    theta = torch.cat([W, b[:, None]], 1)
    true, first = _imitated(theta, x, target, steps, rate), _imitated(theta, x, target, 1, rate)
    guess = x.clone().requires_grad_()
    answer = ask(imitate, W.clone(), b.clone(), guess, target, steps, rate)
    known: list[Wrong] = [
        (TIMES, steps * first),
        (ONE, first),
        (MEAN, true / steps),
        (SIGN, -true),
        (SIGN, -rate * true),
        (MOVED, rate * true),
    ]
    compare(_joined(answer), true, "the update [W | b]", known)
    _check_derivative(answer, guess, theta, (target, steps, rate))
    right("At the truth it is the update, and a search can follow its slope through every step.")


def _check_derivative(
    answer: Any, guess: Tensor, theta: Tensor, schedule: tuple[int, int, float]
) -> None:
    probe = _random(9, *theta.shape)
    update = torch.cat([answer[0], answer[1][:, None]], 1)
    demand(update.requires_grad, CUT)
    (slope,) = torch.autograd.grad((update * probe).sum(), guess, allow_unused=True)
    if slope is None:
        demand(False, CUT)
    x = guess.detach().clone().requires_grad_()
    (true,) = torch.autograd.grad((_imitated(theta, x, *schedule) * probe).sum(), x)
    demand(torch.allclose(slope, true, rtol=1e-6, atol=1e-9), PARTIAL)


KEYS = "Return two dictionaries of settings for gi.observe: `return first, second`."
REFUSED = "gi.observe does not take these settings: {error}"
FEW = "The first schedule has {steps} local steps; take ten or more."
STILL = (
    "The first schedule moves the weights by {moved:.1%} only: that it leaves the ratio alone "
    "says little. Which setting decides how far they move?"
)
BLURRED = (
    "The first schedule puts the ratio off by {error:.0%}. A sum of steps keeps it, as long as "
    "nothing but multiples of gradients is summed."
)
CLEAR = (
    "The second schedule leaves the ratio exact, to {error:.0e}. Momentum and more steps only "
    "change how often each gradient counts; what bends the entries of W and b differently?"
)
ONE_STEP = "The second schedule may have one local step only; yours has {steps}."


def _ratio_error(settings: dict[str, Any], seed: int) -> tuple[float, float]:
    """How far the ratio is off, and how far the weights moved, relative to themselves."""
    generator = torch.Generator().manual_seed(seed)
    model = mlp((30, 20, 5), "tanh", dtype=torch.float64, generator=generator)
    x = _random(seed, 1, 30).abs()
    try:
        sent = observe(model, LOSS, x, torch.tensor([1]), **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        demand(False, REFUSED.format(error=error))
    name, bias = [n for n, _ in model.named_parameters()][:2]
    weight = dict(model.named_parameters())[name].detach()
    G, b = sent.gradients[name], sent.gradients[bias]
    moved = float(settings.get("learning_rate", 0) * G.norm() / weight.norm())
    return relative_error(recover_input(G, b), x.flatten()), moved


def check_schedules(schedules: Student, seed: int = 3) -> None:
    """Check 10.4: ten steps that hide nothing, and one step that does."""
    first, second = pair(ask(schedules), "schedules()")
    demand(isinstance(first, dict) and isinstance(second, dict), KEYS)
    steps = first.get("local_steps", 1)
    demand(steps >= 10, FEW.format(steps=steps))
    error, moved = _ratio_error(first, seed)
    demand(error < 1e-6, BLURRED.format(error=error))
    demand(moved > 0.1, STILL.format(moved=moved))
    late = second.get("local_steps", 1)
    demand(late == 1, ONE_STEP.format(steps=late))
    other, _ = _ratio_error(second, seed)
    demand(other > 0.1, CLEAR.format(error=other))
    right(
        f"{steps} steps moved the weights by {moved:.0%} and the ratio by nothing; a single step "
        f"of the other put it off by {other:.0%}. It is not the number of steps that decides."
    )


Counted = tuple[int, int]
Attackers = dict[str, tuple[list[bool], list[bool]]]

POINTS = (
    "{name}: {before} of {n} before, {after} after. After so few trials, how far from these rates "
    "may the true ones lie?"
)
WALD = (
    "{name}: an interval that shrinks to nothing where all or none succeed claims certainty after "
    "{n} trials. Use Wilson's."
)
TOUCH = (
    "{name}: that the intervals are apart shows that the rate fell. The claim says by *how much*."
)
NAIVE = (
    "A defense is as good as against the attacker who knows of it: {name} loses nothing, and you "
    "say that the claim holds."
)
WEAK_AWARE = (
    "{name}: so few trials neither confirm nor refute the claim, and a claim for all attackers "
    "waits for the last of them."
)


def _verdict(
    attackers: Attackers, drop: float, interval: Callable[[int, int], tuple[float, float]]
) -> str:
    least, most = [], []
    for before, after in attackers.values():
        (low, high), (low_after, high_after) = (interval(sum(r), len(r)) for r in (before, after))
        least.append(low - high_after)
        most.append(high - low_after)
    if all(fall > drop for fall in least):
        return "holds"
    return "does not hold" if any(fall < drop for fall in most) else "open"


def _rates(successes: int, trials: int) -> list[bool]:
    return [True] * successes + [False] * (trials - successes)


VERDICTS = ("holds", "does not hold", "open")
SPELLING = "Return one of 'holds', 'does not hold' and 'open'."
CLAIMS: list[tuple[dict[str, tuple[Counted, Counted]], float, str]] = [
    ({"the search": ((60, 60), (0, 60))}, 0.6, ""),
    ({"the search": ((5, 5), (1, 5))}, 0.6, POINTS),
    ({"the search": ((4, 4), (0, 4))}, 0.6, WALD),
    ({"the search": ((40, 60), (20, 60))}, 0.6, TOUCH),
    ({"unaware": ((60, 60), (0, 60)), "the aware search": ((60, 60), (58, 60))}, 0.6, NAIVE),
    ({"unaware": ((60, 60), (0, 60)), "the aware search": ((2, 2), (1, 2))}, 0.6, WEAK_AWARE),
]


def check_verdict(verdict: Student, times: int = 1) -> None:
    """Check 10.5: whether a claimed fall of a success rate holds."""
    for counts, drop, hint in CLAIMS:
        more = times if hint in ("", NAIVE, TOUCH) else 1
        attackers: Attackers = {
            name: (_rates(more * a, more * n), _rates(more * b, more * m))
            for name, ((a, n), (b, m)) in counts.items()
        }
        answer = ask(verdict, attackers, drop)
        demand(answer in VERDICTS, SPELLING)
        name = list(counts)[-1]
        (before, n), (after, _) = counts[name]
        told = (
            hint or "{name}: {before} of {n} before, {after} after: both intervals leave no doubt."
        )
        true = _verdict(attackers, drop, wilson_interval)
        demand(answer == true, told.format(name=name, before=before, after=after, n=n))
    right("A rate with its interval, a claim with its size, and the attacker who knows.")
