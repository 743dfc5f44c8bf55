"""Plausible mistakes in the exercises to chapter 10; each must be refused by the right hint."""

from __future__ import annotations

import torch
from torch import nn

from gradinv_edu.coursework.mistakes import planted
from gradinv_edu.metrics import wilson_interval


def _counts(steps, momentum):
    return torch.tensor(
        [sum(momentum**j for j in range(steps - t)) for t in range(steps)], dtype=torch.float64
    )


@planted("10-counts", says="plain SGD")
def momentum_ignored(steps, momentum):
    return torch.ones(steps, dtype=torch.float64)


@planted("10-counts", says="backwards")
def counted_from_the_end(steps, momentum):
    return _counts(steps, momentum).flip(0)


@planted("10-counts", says="last step alone")
def last_velocity_only(steps, momentum):
    return torch.tensor([momentum ** (steps - 1 - t) for t in range(steps)], dtype=torch.float64)


@planted("10-counts", says="for ever")
def geometric_series_without_end(steps, momentum):
    return torch.full((steps,), 1 / (1 - momentum), dtype=torch.float64)


@planted("10-counts", says="one step later")
def own_step_left_out(steps, momentum):
    return _counts(steps, momentum) - 1


def _share(steps, rate, momentum, decay):
    theta, v, share = 1.0, 0.0, 0.0
    for _ in range(steps):
        v = momentum * v + decay * theta
        theta, share = theta - rate * v, share + v
    return share


@planted("10-decay", says="stand still")
def decay_of_weights_that_stand_still(sent, start, steps, rate, momentum, decay):
    return sent - decay * float(_counts(steps, momentum).sum()) * start


@planted("10-decay", says="there were more")
def decay_of_one_step(sent, start, steps, rate, momentum, decay):
    return sent - decay * start


@planted("10-decay", says="added it once more")
def decay_added(sent, start, steps, rate, momentum, decay):
    return sent + _share(steps, rate, momentum, decay) * start


@planted("10-decay", says="passes through the momentum")
def momentum_forgotten(sent, start, steps, rate, momentum, decay):
    return sent - _share(steps, rate, 0.0, decay) * start


@planted("10-decay", says="without dividing")
def not_divided_by_the_learning_rate(sent, start, steps, rate, momentum, decay):
    return sent - rate * _share(steps, rate, momentum, decay) * start


def _gradient(W, b, x, target):
    k = torch.softmax(W @ x + b, 0) - nn.functional.one_hot(torch.tensor(target), len(b))
    return torch.outer(k, x), k


def _walk(W, b, x, target, steps, rate):
    start_W, start_b = W, b
    for _ in range(steps):
        G, k = _gradient(W, b, x, target)
        W, b = W - rate * G, b - rate * k
    return (start_W - W) / rate, (start_b - b) / rate


@planted("10-imitate", says="T times")
def first_gradient_times_steps(weight, bias, guess, target, steps, rate):
    G, k = _gradient(weight, bias, guess, target)
    return steps * G, steps * k


@planted("10-imitate", says="first step alone")
def one_step_only(weight, bias, guess, target, steps, rate):
    return _gradient(weight, bias, guess, target)


@planted("10-imitate", says="is their sum")
def mean_for_sum(weight, bias, guess, target, steps, rate):
    W, b = _walk(weight, bias, guess, target, steps, rate)
    return W / steps, b / steps


@planted("10-imitate", says="end - start")
def end_minus_start(weight, bias, guess, target, steps, rate):
    W, b = _walk(weight, bias, guess, target, steps, rate)
    return -W, -b


@planted("10-imitate", says="divided by the learning rate")
def movement_for_update(weight, bias, guess, target, steps, rate):
    W, b = _walk(weight, bias, guess, target, steps, rate)
    return rate * W, rate * b


@planted("10-imitate", says="no derivative reaches the guess")
def guess_detached(weight, bias, guess, target, steps, rate):
    return _walk(weight, bias, guess.detach(), target, steps, rate)


@planted("10-imitate", says="pass through every step")
def weights_detached_between_steps(weight, bias, guess, target, steps, rate):
    W, b, total_W, total_b = weight, bias, 0, 0
    for _ in range(steps):
        G, k = _gradient(W, b, guess, target)
        total_W, total_b = total_W + G, total_b + k
        W, b = W - rate * G.detach(), b - rate * k.detach()
    return total_W, total_b


GOOD = {"local_steps": 20, "learning_rate": 0.5, "momentum": 0.9}
ADAM = {"local_steps": 1, "learning_rate": 0.01, "optimizer": "adam"}


@planted("10-schedules", says="ten or more")
def too_few_steps():
    return {**GOOD, "local_steps": 3}, ADAM


@planted("10-schedules", says="how far they move")
def weights_that_hardly_move():
    return {"local_steps": 10, "learning_rate": 1e-4}, ADAM


@planted("10-schedules", says="multiples of gradients")
def decay_in_the_first():
    return {**GOOD, "weight_decay": 0.1}, ADAM


@planted("10-schedules", says="how often each gradient counts")
def momentum_taken_for_a_defense():
    return GOOD, {"local_steps": 1, "learning_rate": 0.5, "momentum": 0.99}


@planted("10-schedules", says="one local step only")
def many_steps_in_the_second():
    return GOOD, {**ADAM, "local_steps": 10}


def _judged(attackers, drop, interval):
    least, most = [], []
    for before, after in attackers.values():
        low, high = interval(sum(before), len(before))
        low_after, high_after = interval(sum(after), len(after))
        least.append(low - high_after)
        most.append(high - low_after)
    if min(least) > drop:
        return "holds"
    return "does not hold" if min(most) < drop else "open"


@planted("10-verdict", says="so few trials, how far")
def rates_without_intervals(attackers, drop):
    return _judged(attackers, drop, lambda a, n: (a / n, a / n))


@planted("10-verdict", says="Use Wilson's")
def plus_or_minus_for_wilson(attackers, drop):
    def interval(successes, trials):
        p = successes / trials
        reach = 1.96 * (p * (1 - p) / trials) ** 0.5
        return p - reach, p + reach

    return _judged(attackers, drop, interval)


@planted("10-verdict", says="by *how much*")
def intervals_only_apart(attackers, drop):
    verdict = _judged(attackers, drop, wilson_interval)
    apart = _judged(attackers, 0.0, wilson_interval) == "holds"
    return "holds" if apart and verdict == "does not hold" else verdict


@planted("10-verdict", says="knows of it")
def naive_attacker_only(attackers, drop):
    return _judged(dict(list(attackers.items())[:1]), drop, wilson_interval)


@planted("10-verdict", says="waits for the last")
def open_taken_for_holds(attackers, drop):
    known = {
        name: runs for name, runs in attackers.items() if len(attackers) == 1 or len(runs[0]) > 10
    }
    return _judged(known, drop, wilson_interval)
