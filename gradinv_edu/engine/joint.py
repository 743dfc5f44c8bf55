"""Systems at a sample that are more than one layer's: blocks of branches, norms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from . import block, normalised
from .edges import Edges
from .evidence import ENTRIES, TRIED, tested
from .gauss_newton import Linearised
from .graph import Step
from .layers import rule_of
from .layers.branches import Block
from .layers.norms import Norm
from .norm_system import NormSystem
from .reports import TOLERANCES
from .solve import DENSE, rank_of, rank_test
from .verdicts import LayerAudit
from .walk import Group, State

__all__ = ["LARGEST", "Branching", "Normalising"]

LARGEST, STEPS = 8192, 1000  # unknowns of a system whose rank is tested, and most steps of it
SMALL = 256  # … of a block with a norm of its own statistics, whose factor needs many steps
LONGEST = 65_536  # unknowns of a norm and the layer below it, likewise


@dataclass(frozen=True)
class Branching:
    """A block of branches at a sample, as one system that is linearised there.

    Attributes
    ----------
    step : Step
        The block.
    x : Tensor
        Its input.
    state : State
        At its output.
    needed : bool
        Whether the recursion passes here.
    generator : torch.Generator or None
        Of random starts.
    positive : bool
        Whether no entry of the input is negative.
    """

    step: Step
    x: Tensor
    state: State
    needed: bool
    generator: torch.Generator | None
    positive: bool = False

    @property
    def system(self) -> block.BlockSystem:
        """All of its equations, without right-hand sides."""
        assert isinstance(self.step.module, Block)
        shapes = {name: torch.zeros_like(p) for name, p in self.step.module.named_parameters()}
        system = block.BlockSystem(self.step.module, self.state.k, shapes, self.state.weight)
        system.use("all")
        return system

    def counted(self) -> LayerAudit:
        """Fewer rows than unknowns decide at once."""
        system, step = self.system, self.step
        counts = (self.x.numel(), system.weight_equations, system.gradient_equations)
        return LayerAudit.counted(step.name, step.rule.kind, *counts, needed=self.needed)

    def joint(self, found: LayerAudit) -> LayerAudit:
        """Test the rank of all rows together, and solve a small block as a recovery does."""
        if found.recoverable is not None:
            return found
        system = self.system
        if self._unfolds(system):
            return replace(found, rank=found.unknowns, method="layer by layer", recoverable=True)
        own = any(rule_of(layer).normalises for layer in system.block.layers)
        if found.unknowns > (SMALL if own else LARGEST):
            return found
        rank, method, recoverable = self._rank(system)
        settled = False
        if recoverable and self.state.doubt is not None:  # nothing here proves the sides
            method, recoverable = "undecided", None
        if recoverable and self.x.numel() <= TRIED and self.needed:
            assert isinstance(self.step.module, Block)
            k, weight = self.state.k, self.state.weight
            tried = block.BlockSystem(self.step.module, k, system.gradients_at(self.x), weight)
            shape, generator = self.step.input_shape, self.generator
            answer = block.solve(tried, self.state.value, shape, generator=generator)
            settled = answer.full_rank and answer.residual <= TOLERANCES[torch.float64][0]
            method = method if settled else "undecided"
            recoverable = settled or None
        return replace(found, rank=rank, method=method, recoverable=recoverable, settled=settled)

    def _unfolds(self, system: block.BlockSystem) -> bool:
        """Whether each layer inside, by its own gradient, gives the input."""
        if self.state.doubt is not None:
            return False
        sent, shape = system.gradients_at(self.x), self.step.input_shape
        edges = Edges(system.block, sent, shape, 1e-16, self.positive, iterate=False)
        return edges.settle(self.state.k, self.state.value, self.state.weight)

    def _rank(self, system: block.BlockSystem) -> tuple[int, str, bool | None]:
        n, x = self.x.numel(), self.x
        equations = system.weight_equations + system.gradient_equations
        if n <= DENSE and n * equations <= ENTRIES:
            rank = rank_of(Linearised(system.rows, x).matrix())
            return rank, "svd", rank == n
        assert self.generator is not None
        system.balance(x, self.generator)
        at = Linearised(system.rows, x)
        return tested(rank_test(at, x, cap=STEPS, generator=self.generator, spectrum=False), n)


@dataclass(frozen=True)
class Normalising:
    """A norm of its own statistics and the affine layer below it, at a sample.

    Attributes
    ----------
    name : str
        Of the norm.
    group : Group
        The layer below.
    rule : Norm
        The norm's.
    x : Tensor
        Input of the layer below.
    state : State
        At the norm's output.
    gradient : Tensor or None
        ``∂L/∂W`` of the layer below.
    needed : bool
        Whether the recursion passes here.
    generator : torch.Generator or None
        Of random starts.
    lost : int
        Constants of its input that nothing below tells.
    """

    name: str
    group: Group
    rule: Norm
    x: Tensor
    state: State
    gradient: Tensor | None
    needed: bool
    generator: torch.Generator | None
    lost: int = 0

    @cached_property
    def system(self) -> NormSystem:
        """All of their equations."""
        state, shape = self.state, self.group.input_shape
        module, rule = self.group.module, self.rule
        return NormSystem(module, rule, state.value, state.k, shape, self.gradient, state.weight)

    def counted(self) -> LayerAudit:
        """Fewer rows than unknowns decide at once."""
        system, group = self.system, self.group
        gradient = system.gradient_equations
        return LayerAudit.counted(
            f"{group.name}+{self.name}",
            f"{group.kind}+{self.rule.kind}",
            system.unknowns,
            system.equations - gradient,
            gradient,
            needed=self.needed,
        )

    def joint(self, found: LayerAudit) -> LayerAudit:
        """Test the rank, and solve a small system as a recovery does."""
        if self.lost:
            return replace(found, rank=found.rank - self.lost, recoverable=False)
        if found.recoverable is not None:
            return found
        system, n = self.system, self.system.unknowns
        if n > LONGEST:
            return found
        test = normalised.account_at(system, self.x, self.generator)
        if not test.full_rank:
            rank = min(found.rank, n - 1, round(n * (1 - test.undetermined)))
            method = "svd" if n <= DENSE else "estimate"
            return replace(found, rank=rank, method=method, recoverable=False)
        found = replace(found, rank=n, method="svd" if n <= DENSE else "iterative")
        if system.linear or not self.needed or n > TRIED:
            return replace(found, recoverable=True)
        solved = normalised.solve(system, generator=self.generator).solution
        settled = solved.residual <= TOLERANCES[torch.float64][0]
        return replace(found, recoverable=True, settled=settled)
