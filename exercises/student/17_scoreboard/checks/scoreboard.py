"""Checks of the exercises on the scoreboard.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean, median
import torch
from torch import Tensor
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, compare, demand, known, pair, refuse, right, tensor
def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
NAMES = ('dense', 'lenet', 'wide')
NAIVE = ('ratio', 'recursion', 'DLG', 'cosine + TV')
class _Board:
    """A board that never was, on which every mistake picks another cell."""

    def __init__(self, seed: int) -> None:
        keys = [(net, attacker) for net in NAMES for attacker in NAIVE]
        draws = torch.rand(len(keys), 4, generator=_seeded(seed)).double()
        order = torch.randperm(len(keys), generator=_seeded(seed + 1)).tolist()
        levels = dict.fromkeys(keys, (60.0, 30.0))
        self.empty, self.powerless, self.flatters, self.drop, self.mean = (keys[n] for n in order[:5])
        levels |= {self.powerless: (14.0, 5.0), self.flatters: (45.0, 10.0)}
        levels |= {self.drop: (170.0, 16.0), self.mean: (50.0, 12.0)}
        self.cells: dict[tuple[str, ...], list[float]] = {}
        for place, (net, attacker) in enumerate(keys):
            for kind, level in zip(('none', 'D'), levels[net, attacker], strict=True):
                self.cells[net, kind, attacker] = (level + draws[place] - 0.5).tolist()
        self.cells[self.flatters[0], 'D', self.flatters[1]][1] = 60.0

    def run(self, net: str, defense: str, attacker: str) -> list[float]:
        """Rerun a cell."""
        if (net, attacker) == self.empty and defense != 'none':
            raise gi.scoreboard.DoesNotApplyError('the defense has no meaning in this cell. Catch that error, and go on with the next cell.')
        return list(self.cells[net, 'none' if defense == 'none' else 'D', attacker])
class Flatter(Mistakes, of='scoreboard-flatter'):

    def undefended_row_not_asked(*_):
        """That attacker fails on that network without any defense: its figure says nothing about
        this one, and a careful reviewer asks for the undefended row first."""
        raise NotImplementedError

    def missing_figure_taken_for_zero(*_):
        """In that cell the defense has no meaning, and `run` said so by an error; a figure that
        does not exist flatters nobody."""
        raise NotImplementedError

    def stopped_by_the_first_gap(*_):
        """… stopped with DoesNotApplyError: the defense has no meaning in this cell. Catch …"""
        raise NotImplementedError

    def largest_drop(*_):
        """You took the largest drop. What a table prints is what is left under the defense; which
        pair leaves the least, of those that read undefended pictures?"""
        raise NotImplementedError

    def mean_for_median(*_):
        """One lucky picture moves a mean by a lot. The board's figure is the median of the
        pictures."""
        raise NotImplementedError

    def best_attacker_shown(*_):
        """That pair reads the defended pictures better than another one does: a paper that wants
        to flatter shows the *lowest* figure."""
        raise NotImplementedError
def check_flatter(flatter: Student, seed: int=2) -> None:
    """Check: how a paper would show a defense."""
    for trial in range(3):
        board = _Board(seed + 10 * trial)
        names = 'Return two names: a network, then an attacker.'
        chosen = pair(ask(flatter, board.run, 'dropout 0.5', NAMES, NAIVE), names)
        demand(chosen[0] in NAMES and chosen[1] in NAIVE, names)
        demand(chosen != board.powerless, Flatter.undefended_row_not_asked)
        demand(chosen != board.empty, Flatter.missing_figure_taken_for_zero)
        demand(chosen != board.drop, Flatter.largest_drop)
        demand(chosen != board.mean, Flatter.mean_for_median)
        demand(chosen == board.flatters, Flatter.best_attacker_shown)
    right('So easily is a defense made to look good: nothing was invented, only chosen. Ask for the attacker who knows.')
from .recorded import recorded

check_interval = recorded("check_interval")
check_scores = recorded("check_scores")
check_cheapest = recorded("check_cheapest")
check_judge = recorded("check_judge")
