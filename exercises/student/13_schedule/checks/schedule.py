"""Checks of the exercises on defense by schedule.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
from collections.abc import Callable
from typing import Any
import torch
from torch import Tensor, nn
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, demand, expect, normal, pair, refuse, right
LOSS = nn.CrossEntropyLoss()
class Schedules(Mistakes, of='schedule-schedules'):

    def too_few_steps(*_):
        """The first schedule has {steps} local steps; take ten or more."""
        raise NotImplementedError

    def decay_in_the_first(*_):
        """The first schedule puts the ratio off by {error:.0%}. A sum of steps keeps it, as long
        as nothing but multiples of gradients is summed."""
        raise NotImplementedError

    def weights_that_hardly_move(*_):
        """The first schedule moves the weights by {moved:.1%} only: that it leaves the ratio alone
        says little. Which setting decides how far they move?"""
        raise NotImplementedError

    def many_steps_in_the_second(*_):
        """The second schedule may have one local step only; yours has {steps}."""
        raise NotImplementedError

    def momentum_taken_for_a_defense(*_):
        """The second schedule leaves the ratio exact, to {error:.0e}. Momentum and more steps only
        change how often each gradient counts; what bends the entries of W and b differently?"""
        raise NotImplementedError
def _ratio_error(settings: dict[str, Any], seed: int) -> tuple[float, float]:
    """How far the ratio is off, and how far the weights moved, relative to themselves."""
    generator = torch.Generator().manual_seed(seed)
    model = gi.models.mlp((30, 20, 5), 'tanh', dtype=torch.float64, generator=generator)
    x = normal(seed, 1, 30).abs()
    try:
        sent = gi.observe(model, LOSS, x, torch.tensor([1]), **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        refuse(f'gi.observe does not take these settings: {error}')
    name, bias = [n for n, _ in model.named_parameters()][:2]
    G, b = (sent.gradients[name], sent.gradients[bias])
    moved = settings.get('learning_rate', 0) * G.norm() / model.get_parameter(name).detach().norm()
    found = gi.fully_connected.recover_input(G, b)
    return (gi.metrics.relative_error(found, x.flatten()), float(moved))
def check_schedules(schedules: Student, seed: int=3) -> None:
    """Check: ten steps that hide nothing, and one step that does."""
    first, second = pair(ask(schedules), 'schedules()')
    both = isinstance(first, dict) and isinstance(second, dict)
    demand(both, 'Return two dictionaries of settings for gi.observe: `return first, second`.')
    steps, late = (first.get('local_steps', 1), second.get('local_steps', 1))
    demand(steps >= 10, Schedules.too_few_steps, steps=steps)
    error, moved = _ratio_error(first, seed)
    demand(error < 1e-06, Schedules.decay_in_the_first, error=error)
    demand(moved > 0.1, Schedules.weights_that_hardly_move, moved=moved)
    demand(late == 1, Schedules.many_steps_in_the_second, steps=late)
    other, _ = _ratio_error(second, seed)
    demand(other > 0.1, Schedules.momentum_taken_for_a_defense, error=other)
    right(f'{steps} steps moved the weights by {moved:.0%} and the ratio by nothing; a single step of the other put it off by {other:.0%}. It is not the number of steps that decides.')
from .recorded import recorded

check_counts = recorded("check_counts")
check_without_decay = recorded("check_without_decay")
check_imitate = recorded("check_imitate")
check_verdict = recorded("check_verdict")
