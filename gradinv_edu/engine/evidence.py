"""How one layer's equations are judged at a sample: kinds of evidence, the cheapest first.

Each kind is a function from a :class:`Layer` to what it can tell, a
:class:`~gradinv_edu.engine.verdicts.LayerAudit`, or None. A new one is one function and its place
in :data:`LADDER`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..systems import LayerSystem, ScaledSystem
from . import preimages
from .blind import possible
from .layers import Affine, rule_of, weight_names
from .layers.convolution import Conv
from .reports import TOLERANCES
from .solve import DENSE, Solution, inertia_rank, patience, rank_of, rank_test
from .verdicts import LayerAudit, Verdict
from .walk import Group

__all__ = [
    "LADDER",
    "Evidence",
    "Layer",
    "counted",
    "final",
    "refined",
    "sided",
    "system_matrix",
    "tested",
]

INERTIA = 4096  # unknowns up to which the rank of a deficient layer is counted exactly
ENTRIES = 3e7  # of a matrix that is written out
BUDGET = 1e11  # multiplications that one iterative rank test may take
ASIDE = 5e9  # likewise, of a layer that decides nothing: inside a block, above the beginning
TRAFFIC = 1000  # multiplications in the time that moving one entry through a step takes
PREIMAGES = 2.0  # equations an unknown from which units with two inputs were always settled
TRIED = 2048  # unknowns up to which they are settled at the sample
FEWEST = 20  # steps of such a test; with fewer it is not begun


@dataclass(frozen=True)
class Layer:
    """Layers that are affine together, at a sample.

    Attributes
    ----------
    group : Group
        The layers.
    x, k : Tensor
        Their input, and ``∂L/∂z`` at their output.
    known : Tensor or None
        Shaped as ``k``: 0 where an output is not known, 1 where it is; None: all are.
    needed : bool
        Whether the recursion passes here.
    given, block : str
        As of :class:`~gradinv_edu.engine.verdicts.LayerAudit`.
    summed : bool
        Whether the sum of ``k`` over positions is sent: as the gradient of a bias here or in a
        norm right above.
    generator : torch.Generator or None
        Of random starts.
    doubt : Doubt or None
        Units above of which two inputs give one output.
    """

    group: Group
    x: Tensor
    k: Tensor
    known: Tensor | None
    needed: bool = True
    given: str = ""
    block: str = ""
    summed: bool = False
    generator: torch.Generator | None = None
    doubt: preimages.Doubt | None = None

    @property
    def rule(self) -> Affine:
        """Of all the layers as one."""
        rule = rule_of(self.group.module)
        return rule if isinstance(rule, Affine) else Affine(self.group.module)

    @property
    def unknowns(self) -> int:
        """Entries of the input."""
        return math.prod(self.group.input_shape)

    @property
    def rows(self) -> Tensor:
        """Bool: which outputs are known."""
        ones = torch.ones_like(self.k, dtype=torch.bool)
        return ones if self.known is None else self.known != 0

    @property
    def gradient_equations(self) -> int:
        """Entries of the weight's gradient."""
        module = self.group.module
        return sum(module.get_parameter(name).numel() for name in weight_names(module))

    def writable(self, groups: int = 1) -> bool:
        """Whether the equations may be written out as a matrix, or as one a group."""
        rows, unknowns = self.k.numel() + self.gradient_equations, self.unknowns // groups
        return unknowns <= INERTIA and unknowns * rows <= ENTRIES

    @property
    def system(self) -> LayerSystem:
        """Both sets of equations."""
        return LayerSystem(self.group.module, self.k, self.group.input_shape, self.known)

    def told(self, rank: int, method: str, recoverable: bool | None) -> LayerAudit:
        """One kind of evidence's answer."""
        return LayerAudit(
            name=self.group.name,
            kind=self.group.kind,
            unknowns=self.unknowns,
            weight_equations=self.k.numel() if self.known is None else int(self.rows.sum()),
            gradient_equations=self.gradient_equations,
            rank=rank,
            method=method,
            recoverable=recoverable,
            needed=self.needed,
            given=self.given,
            block=self.block,
        )


Evidence = Callable[[Layer], LayerAudit | None]


def counted(layer: Layer) -> LayerAudit:
    """Fewer rows than unknowns decide at once: no values are looked at."""
    bound = layer.rule.most(layer.rows, layer.group.input_shape)
    if bound < layer.unknowns:
        return layer.told(bound, "at most", False)
    return layer.told(layer.unknowns, "undecided", None)


def closed_form(layer: Layer) -> LayerAudit | None:
    """``∂L/∂W = k xᵀ`` of a dense layer on a vector."""
    if layer.group.dense and bool(layer.k.any()):
        return layer.told(layer.unknowns, "closed form", True)
    return None


def blind(layer: Layer) -> LayerAudit | None:
    r""":math:`\operatorname{rank} k = \operatorname{rank} x = P` positions.

    Then the weight gradient ``G_t = k S_t xᵀ`` of a convolution that keeps the picture's size,
    ``S_t`` the shift by tap ``t``, gives the input *and* ``k`` up to a factor, whatever stands
    above, and the sum of ``k`` fixes that.
    """
    conv = layer.group.module
    if not layer.summed or not isinstance(conv, Conv) or conv.groups > 1:
        return None
    if not possible(conv, layer.group.input_shape):
        return None
    k, x = layer.k[0].flatten(1), layer.x[0].flatten(1)
    positions = k.shape[1]
    if rank_of(k) < positions or rank_of(x) < positions or not bool(k.sum(1).any()):
        return None
    return replace(layer.told(layer.unknowns, "blind", True), given="")


def written(layer: Layer) -> LayerAudit | None:
    """Singular values of a small matrix, or of one a group of channels that see no other's."""
    groups = getattr(layer.group.module, "groups", 1)
    if layer.unknowns > groups * DENSE or not layer.writable(groups):
        return None
    if groups == 1:
        rank = rank_of(system_matrix(layer.system))
    else:
        rank = rank_of(ScaledSystem(layer.system).blocks(groups))
    return layer.told(rank, "svd", rank == layer.unknowns)


def by_channel(layer: Layer) -> LayerAudit | None:
    """Gradient rows act alike on every channel: the rank of one small matrix bounds or decides."""
    n = layer.unknowns
    bound, sure = layer.rule.bounds(layer.k, layer.rows, layer.group.input_shape)
    if bound < n:
        lawful = layer.known is None and isinstance(layer.group.module, Conv)
        return layer.told(bound, "law" if lawful else "at most", False)
    return None if sure is None else layer.told(n, sure, True)


def iterative(layer: Layer) -> LayerAudit | None:
    """What is left of a random start that the equations are to turn into zero."""
    n, system = layer.unknowns, layer.system
    shape = system.gradient_shape
    positions = system.k.numel() // (shape[0] if len(shape) > 1 else system.k.shape[1])
    price = 4 * shape.numel() * positions + TRAFFIC * (n + system.k.numel())
    budget = ASIDE if layer.block or not layer.needed else BUDGET
    cap = int(min(patience(n), budget / price))
    if cap < FEWEST:
        return None
    A = ScaledSystem(system)
    test = rank_test(
        A, cap=cap, generator=layer.generator, fast=A.to(torch.float32), spectrum=False
    )
    return layer.told(*tested(test, n))


def inertia(layer: Layer) -> LayerAudit | None:
    """Signs of a factorisation count the rank of a matrix that can be written out."""
    if not layer.writable():
        return None
    rank = inertia_rank(system_matrix(layer.system))
    return layer.told(rank, "inertia", rank == layer.unknowns)


def sided(layer: Layer, found: LayerAudit) -> LayerAudit:
    """Whether a layer that determines its input also tells which of two inputs units above had."""
    doubt, system = layer.doubt, layer.system
    if doubt is None or not found.recoverable:
        return found
    proven = preimages.confirmed(system, doubt.units, layer.generator)
    open_ = int((doubt.units & ~proven).sum())
    settles: bool | None = system.equations >= PREIMAGES * system.unknowns
    if not open_ and system.unknowns <= TRIED:
        rows = system.matvec(layer.x)[1] + getattr(system.operator, "gradient_offset", 0.0)
        gradient = rows if rows.numel() else None
        group = layer.group
        sides, unsure = preimages.settle(
            group.module, group.input_shape, gradient, doubt, layer.generator
        )
        true = doubt.choose(doubt.nearer(group.module(layer.x)))
        gap = (sides.weight * (sides.value - true.value)).norm()
        settles = float(gap) <= TOLERANCES[torch.float64][0] * float(true.value.norm())
        settles = settles and not unsure
    verdict = False if open_ else True if settles else None
    return replace(found, recoverable=verdict, unsettled=open_)


# after `counted`; the second set is for layers that no cheaper evidence decides
LADDER: tuple[tuple[Evidence, ...], tuple[Evidence, ...]] = (
    (closed_form, blind, written, by_channel),
    (iterative, inertia),
)
EXACT = ("svd", "inertia")  # methods that leave nothing to refine
BOUNDS = ("at most", "law")


def refined(layer: Layer, found: LayerAudit, evidence: Evidence) -> LayerAudit:
    """``found`` with what one more kind of evidence tells, where it can tell more."""
    lacking = found.recoverable is False
    if final(found) or (lacking and evidence is iterative):
        return found
    more = evidence(layer)
    if more is None:
        return found
    if lacking and found.method in BOUNDS:  # a bound is a theorem, a count is numerical
        return replace(more, rank=min(more.rank, found.rank), recoverable=False)
    return more


def final(found: LayerAudit) -> bool:
    """Whether no more evidence is needed."""
    return bool(found.recoverable) or found.method in EXACT or found.verdict is Verdict.SEARCH


def tested(test: Solution, n: int) -> tuple[int, str, bool | None]:
    """Rank, method and verdict of an iterative test on ``n`` unknowns."""
    if test.undetermined == 0:
        return n, "iterative", True
    if test.converged:
        return min(n - 1, round(n * (1 - test.undetermined))), "estimate", False
    return n, "undecided", None


def system_matrix(system: LayerSystem) -> Tensor:
    """Scaled rows that the masks leave, ``(equations, unknowns)``."""
    rows = system.to_dense(scaled=True)
    return rows if system.row_mask is None else rows[rows.abs().amax(dim=1) > 0]
