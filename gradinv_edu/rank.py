"""Rank: which layers, and which networks, give their input away, told before any data is sent."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from html import escape
from itertools import islice

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, jvp, vmap

from . import checks, joint
from .activations import NORMS, is_elementwise, undo
from .chain import POOLS, RESHAPES, WEIGHTED, Residual, Step, trace
from .errors import (
    InvalidArgumentError,
    InvalidTensorError,
    UnsupportedLayerError,
    UnsupportedLossError,
)
from .krylov import cgls, open_share
from .residual import Linearised, ResidualSystem, refuse_random
from .systems import DENSE_UNKNOWNS, RANK_TOLERANCE, LayerSystem, ScaledSystem

INERTIA_UNKNOWNS = 4096  # up to which the rank of a deficient layer is counted exactly
INERTIA_TOLERANCE = 1e-13  # eigenvalues of the normal equations below this share count as zero
BUDGET = 2e11  # multiplications that one iterative rank test may take
FEWEST_STEPS = 20  # of such a test; with fewer it is not begun
ENTRIES = 3e7  # of a matrix that is written out
AUTOMATIC_JACOBIAN = 512  # unknowns up to which `audit` computes the whole network's rank unasked
EXACT_MAP = 1024  # unknowns up to which a leak map is exact
PROJECTED = 1e-5  # residual, relative, at which a probe is projected well enough
PROJECTION_STEPS = 500
SUM_UNKNOWNS = 8192  # up to which a residual block is audited as one system
SUM_STEPS = 1000  # of its iterative rank test
PROBE_GAP = 1e-9  # singular values of a sketched Jacobian below this share count as zero

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerAudit:
    """What one layer's equations can tell of its input, given that the layers above are undone.

    Attributes
    ----------
    name, kind : str
        Of the layer in the model, and its type; ``first+…+last`` where pooling is solved
        together with the layer that feeds it.
    unknowns : int
        Entries of the layer's input.
    weight_equations, gradient_equations : int
        Rows of ``W`` whose right-hand side is known (a ReLU's dead units are masked), rows of
        ``K``.
    rank : int
        Of both sets together; see ``method``.
    method : str
        How the rank was found: ``"closed form"`` (dense layers), ``"svd"``, ``"inertia"`` (both
        exact), ``"law"`` (:func:`rank_law`), ``"gradient"`` (the gradient constraints alone
        determine everything), ``"iterative"`` (full rank by a matrix-free test), ``"at most"``
        (an upper bound below the unknowns), ``"estimate"``, ``"undecided"`` (an upper bound, the
        test's budget was spent).
    recoverable : bool or None
        Whether the layer's own equations determine its input; ``None`` where undecided.
    together : tuple of str
        Layers below that make up for what this one lacks, if they do.
    settled : bool
        Whether :func:`gradinv_edu.joint.solve` found the answer that they determine, at the
        sample.
    needed : bool
        Whether the recursion passes here at all: it begins at the lowest dense layer with a bias.
    """

    name: str
    kind: str
    unknowns: int
    weight_equations: int
    gradient_equations: int
    rank: int
    method: str
    recoverable: bool | None
    together: tuple[str, ...] = ()
    settled: bool = False
    needed: bool = True

    @property
    def rank_index(self) -> int:
        """``rank − unknowns``: zero where the input is determined, else minus what is missing."""
        return self.rank - self.unknowns

    @property
    def deficiency(self) -> int:
        """Dimensions of the input that the layer's own equations leave open."""
        return self.unknowns - self.rank

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.needed:
            return "not needed"
        if self.recoverable:
            return "determined"
        if self.together:
            but = "" if self.settled else ", but not found"
            return f"determined together with {', '.join(self.together)}{but}"
        if self.recoverable is None:
            return "undecided"
        bound = "at least " if self.method == "at most" else ""
        about = "about " if self.method == "estimate" else ""
        return f"{bound}{about}{self.deficiency} dimensions stay open"


@dataclass(frozen=True)
class Stop:
    """A place where the recursion cannot go on, and why.

    Attributes
    ----------
    name, kind : str
        Of the layer or operation.
    reason : str
        What it does to its input.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class NetworkRank:
    """Rank of a whole network's Jacobian ``∂(∇θ)/∂x`` at one input.

    Attributes
    ----------
    unknowns, parameters : int
        Columns and rows: entries of the input, entries of the gradient.
    rank : int
        Numerical rank, each parameter's rows weighted by the size of its gradient.
    condition : float or None
        Largest over smallest singular value where the Jacobian was written out and has full
        column rank.
    """

    unknowns: int
    parameters: int
    rank: int
    condition: float | None = None

    @property
    def full(self) -> bool:
        """Whether the gradient determines the input locally."""
        return self.rank == self.unknowns


@dataclass(frozen=True)
class Audit:
    """What the gradient of one sample gives away, by the network's equations alone.

    Attributes
    ----------
    model : str
        Its class.
    input_shape : tuple of int
        Of one sample.
    parameters : int
        Entries of the gradient: Geiping et al.'s bound asks whether they outnumber the input's.
    layers : tuple of LayerAudit
        From the input to the output.
    stops : tuple of Stop
        Where the recursion cannot go on, from the input to the output; the layers below are
        counted as if it could.
    exact : bool
        Whether :func:`gradinv_edu.recursion.recover` can be expected to return the input exactly:
        there is a place to begin, no stop below it, and every layer is determined, alone or
        together with those below.
    begins : str or None
        Layer at which the recursion begins.
    network : NetworkRank or None
        Rank of the whole network's Jacobian, where it was asked for or is cheap.
    notes : tuple of str
        What the verdicts assume.
    """

    model: str
    input_shape: Shape
    parameters: int
    layers: tuple[LayerAudit, ...]
    stops: tuple[Stop, ...]
    exact: bool
    begins: str | None
    network: NetworkRank | None
    notes: tuple[str, ...]

    @property
    def unknowns(self) -> int:
        """Entries of one input."""
        return math.prod(self.input_shape)

    @property
    def parameter_bound(self) -> bool:
        """Whether the gradient has at least as many entries as the input: necessary, no more."""
        return self.parameters >= self.unknowns

    @property
    def weighted_index(self) -> int:
        """Chen and Campbell's index: rank indices, weighing most near the input.

        ``Σ_i round((rank_i − unknowns_i)·(L−1−i)/(L−1))`` over all ``L`` layers but the last,
        as their published code computes it. Source: Chen and Campbell (2022).
        """
        last = len(self.layers) - 1
        shares = ((last - place) / last for place in range(last))
        indices = (layer.rank_index for layer in self.layers)
        return sum(round(i * share) for i, share in zip(indices, shares, strict=False))

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.exact:
            return "The gradient of one sample gives its input away exactly."
        if self.stops:
            return f"The recursion stops at {self.stops[-1].name}: {self.stops[-1].reason}."
        open_ = [a.name for a in self.layers if a.needed and not (a.recoverable or a.settled)]
        return f"The recursion does not determine the input of {', '.join(open_)}."

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, strings and lists, for ``json.dumps``."""
        whole = asdict(self)
        whole["unknowns"], whole["verdict"] = self.unknowns, self.verdict
        whole["parameter_bound"] = self.parameter_bound
        for entry, layer in zip(whole["layers"], self.layers, strict=True):
            entry["rank_index"], entry["verdict"] = layer.rank_index, layer.verdict
        plain = _plain(whole)
        assert isinstance(plain, dict)
        return plain

    def __str__(self) -> str:
        rows = [_COLUMNS, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 1, 7) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self._remarks()])

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in _COLUMNS)
        body = "".join(
            "<tr>"
            + f'<th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in map(_row, self.layers)
        )
        shape = "×".join(map(str, self.input_shape))
        caption = f"Audit of {escape(self.model)} on inputs of {shape}"
        remarks = "".join(f"<li>{escape(remark)}</li>" for remark in self._remarks())
        return (
            f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table><ul>{remarks}</ul>"
        )

    def _remarks(self) -> list[str]:
        bound = "no fewer than" if self.parameter_bound else "fewer than"
        lines = [
            f"{self.parameters} parameters, {bound} the {self.unknowns} entries of the input",
            *([] if self.begins is None else [f"the recursion begins at {self.begins}"]),
            *_grouped(self.stops),
            *self.notes,
        ]
        if self.network is not None:
            kind = "full" if self.network.full else "not full"
            rank = f"{self.network.rank} of {self.network.unknowns}"
            lines.append(f"whole network: the Jacobian has rank {rank} ({kind})")
        return [*lines, f"exact: {self.exact}"]


_COLUMNS = ("layer", "kind", "unknowns", "weight", "gradient", "rank", "index", "verdict")


def _row(layer: LayerAudit) -> tuple[str, ...]:
    bounded = layer.method in ("at most", "undecided")
    sign = "≤" if bounded else "≈" if layer.method == "estimate" else ""
    numbers = (layer.unknowns, layer.weight_equations, layer.gradient_equations)
    index = f"{sign}{layer.rank_index}"
    return (
        layer.name,
        layer.kind,
        *map(str, numbers),
        f"{sign}{layer.rank}",
        index,
        layer.verdict,
    )


def _grouped(stops: Sequence[Stop]) -> list[str]:
    places: dict[tuple[str, str], list[str]] = {}
    for stop in stops:
        places.setdefault((stop.kind, stop.reason), []).append(stop.name)
    return [
        f"stops at {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)} "
        f"({kind}): {reason}"
        for (kind, reason), names in places.items()
    ]


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


# --- the rank law -----------------------------------------------------------------------------


@dataclass(frozen=True)
class RankLaw:
    """A convolution's rank, counted.

    Attributes
    ----------
    unknowns, seen : int
        Entries of the input, and those that some position of the kernel sees.
    weight_equations, gradient_equations : int
        Rows of ``W`` (those that see a pixel) and of ``K``.
    gradient_rank : int
        Of ``K``.
    shared : int
        Equations that both sets hold: one for each pair of filters.
    rank : int
        Of both sets together.
    """

    unknowns: int
    seen: int
    weight_equations: int
    gradient_equations: int
    gradient_rank: int
    shared: int
    rank: int

    @property
    def full(self) -> bool:
        """Whether the input is determined."""
        return self.rank == self.unknowns


def rank_law(conv: nn.Module, input_shape: Shape) -> RankLaw:
    r""":math:`\mathrm{rank}[W; K] = \min(n,\; |W| + \mathrm{rank}\,K - F^2)`.

    The rank of a convolution's two sets of equations without a matrix, by counting. ``|W|`` is
    the number of weight equations. ``rank K`` is counted for each channel and each class of
    pixels that the stride keeps apart: the class's rows or its pixels, whichever is less.
    ``F²`` equations, one for each pair of filters, are in both sets (with groups, per group;
    ``F·P`` where there are fewer positions ``P`` than filters ``F``). Implements :eq:`rank-law`.

    Parameters
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
        Any stride, padding, dilation and groups.
    input_shape : tuple of int
        ``(C, *spatial)``.

    Returns
    -------
    RankLaw

    Raises
    ------
    UnsupportedLayerError
        If the module is no convolution.
    InvalidTensorError
        If it does not take inputs of this shape.

    Notes
    -----
    As an upper bound it is a theorem. As an equality it holds for weights and output gradients
    in general position where the rows of ``W`` have no dependences of their own; they do where
    padded corners see fewer pixels than there are filters, or where ``W`` nearly suffices alone.
    """
    if not isinstance(conv, Conv):
        raise UnsupportedLayerError(
            f"{type(conv).__name__} is no convolution; a dense layer always has full rank."
        )
    index, n = _places(conv, input_shape)
    groups, filters = conv.groups, conv.out_channels // conv.groups
    channels = conv.in_channels // groups
    offset, position = torch.nonzero(index, as_tuple=True)
    pixel = index[offset, position] - 1
    visible, seen = _distinct(position), conv.in_channels * _distinct(pixel)
    classes = _classes(offset, pixel, n)
    K = conv.in_channels * sum(min(filters * offsets, pixels) for offsets, pixels in classes)
    rows, shared = conv.out_channels * visible, groups * filters * min(filters, visible)
    return RankLaw(
        unknowns=conv.in_channels * n,
        seen=seen,
        weight_equations=rows,
        gradient_equations=conv.out_channels * channels * len(index),
        gradient_rank=K,
        shared=shared,
        rank=min(seen, rows + K - shared),
    )


def _places(conv: Conv, input_shape: Shape) -> tuple[Tensor, int]:
    """Pixel (from 1; 0 is padding) that each place of the kernel lies on at each position."""
    spatial = tuple(input_shape[1:])
    ranks = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    dimensions = next(d for kind, d in ranks.items() if isinstance(conv, kind))
    if len(spatial) != dimensions or input_shape[0] != conv.in_channels:
        raise InvalidTensorError(
            f"{type(conv).__name__} with {conv.in_channels} channels does not take inputs of "
            f"shape {tuple(input_shape)}."
        )
    n = math.prod(spatial)
    numbered = torch.arange(1.0, n + 1, dtype=torch.float64).reshape(1, 1, *spatial)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    index = nn.functional.pad(numbered, conv._reversed_padding_repeated_twice, mode=mode)[0, 0]
    for axis in range(dimensions):
        kernel, stride, dilation = (
            conv.kernel_size[axis],
            conv.stride[axis],
            conv.dilation[axis],
        )
        positions = (index.shape[2 * axis] - dilation * (kernel - 1) - 1) // stride + 1
        if positions < 1:
            raise InvalidTensorError(
                f"The kernel {conv.kernel_size} is larger than the padded input {spatial}."
            )
        grid = (stride * torch.arange(positions))[:, None] + dilation * torch.arange(kernel)
        index = index.index_select(2 * axis, grid.reshape(-1))
        split = (*index.shape[: 2 * axis], positions, kernel, *index.shape[2 * axis + 1 :])
        index = index.reshape(split)
    order = [2 * a + 1 for a in range(dimensions)] + [2 * a for a in range(dimensions)]
    places = math.prod(conv.kernel_size)
    return index.permute(order).reshape(places, -1).long(), n


def _distinct(numbers: Tensor) -> int:
    return int((torch.bincount(numbers) > 0).sum())


def _classes(row: Tensor, pixel: Tensor, n: int) -> list[tuple[int, int]]:
    """``(rows, pixels)`` of each set of pixels that no row links to the others."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    size = n + int(row.max()) + 1
    ones = torch.ones(len(row)).numpy()
    links = coo_matrix((ones, (pixel.numpy(), n + row.numpy())), shape=(size, size))
    label = torch.from_numpy(connected_components(links, directed=False)[1])
    rows = Counter(label[n + torch.bincount(row).nonzero()[:, 0]].tolist())
    pixels = Counter(label[torch.bincount(pixel).nonzero()[:, 0]].tolist())
    return [(rows[c], pixels[c]) for c in rows]


# --- one system's rank ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    rank: int
    method: str
    recoverable: bool | None


def _assess(system: LayerSystem, generator: torch.Generator) -> _Found:
    """Rank and verdict, by the cheapest way that is certain."""
    n = system.unknowns
    if n <= DENSE_UNKNOWNS and _writable(system):
        rank = _svd_rank(_dense(system))
        return _Found(rank, "svd", rank == n)
    bound, gradient_alone = _bounds(system)
    if bound < n:
        return _counted(system, bound)
    if gradient_alone:
        return _Found(n, "gradient", True)
    return _tested(system, bound, generator)


def _assess_sum(system: ResidualSystem, x: Tensor, generator: torch.Generator) -> _Found:
    """Rank of a residual block's equations, linearised at ``x``."""
    n, at = x.numel(), Linearised(system, x)
    equations = system.weight_equations + system.gradient_equations
    if n <= DENSE_UNKNOWNS and n * equations <= ENTRIES:
        units = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *x.shape)
        rank = _svd_rank(torch.stack([at.forward(unit).flat() for unit in units], dim=1))
        return _Found(rank, "svd", rank == n)
    if equations < n:
        return _Found(equations, "at most", False)
    system.balance(x, generator)
    share, run = open_share(Linearised(system, x), _draw(x, generator), SUM_STEPS)
    if share == 0:
        return _Found(n, "iterative", True)
    if run.iterations < SUM_STEPS:
        return _Found(min(n - 1, round(n * (1 - share))), "estimate", False)
    return _Found(n, "undecided", None)


def _counted(system: LayerSystem, bound: int) -> _Found:
    """Rank of a system that a bound shows to be deficient."""
    if _writable(system):
        return _Found(min(_inertia_rank(_dense(system)), bound), "inertia", False)
    if system.row_mask is None and isinstance(system.module, Conv):
        return _Found(bound, "law", False)
    return _Found(bound, "at most", False)


def _tested(system: LayerSystem, bound: int, generator: torch.Generator) -> _Found:
    """Rank by what the solver leaves of a random start."""
    n = system.unknowns
    cap = int(min(10_000 + 4 * math.isqrt(n), BUDGET / (4 * n + 4 * _multiplications(system))))
    share, finished = 1.0, False
    if cap >= FEWEST_STEPS:
        exact, fast = ScaledSystem(system), ScaledSystem(system, torch.float32)
        dye = _draw(torch.zeros(1, *system.input_shape, device=system.k.device), generator)
        share, run = open_share(exact, dye.double(), cap, fast=fast)
        finished = run.iterations < cap
    if share == 0:
        return _Found(n, "iterative", True)
    if _writable(system):
        rank = _inertia_rank(_dense(system))
        return _Found(rank, "inertia", rank == n)
    if finished:
        return _Found(min(bound, n - 1, round(n * (1 - share))), "estimate", False)
    return _Found(min(bound, n), "undecided", None)


def _writable(system: LayerSystem) -> bool:
    rows = system.k.numel() + system.gradient_shape.numel()
    return system.unknowns <= INERTIA_UNKNOWNS and system.unknowns * rows <= ENTRIES


def _multiplications(system: LayerSystem) -> float:
    """Of one application, about."""
    weights = system.gradient_shape.numel()
    positions = math.prod(system.k.shape[2:]) if system.k.dim() > 2 else 1
    return float(weights * positions)


def _bounds(system: LayerSystem) -> tuple[int, bool]:
    """Upper bound of the rank, certain; and whether the gradient constraints alone suffice."""
    n, rows = system.unknowns, system.weight_equations
    if not isinstance(system.module, Conv):
        return min(n, rows + system.gradient_equations), False
    index, pixels = _places(system.module, system.input_shape)
    seen = _distinct(index[index > 0])
    channels = system.input_shape[0] // system.module.groups
    blocks = _channel_blocks(system.module, system.k, index, pixels)
    ranks = [_block_rank(block) for block in blocks]
    K = channels * sum(rank for rank, _ in ranks)
    whole = all(exact and rank == pixels for rank, exact in ranks)
    visible = (index > 0).any(0)
    known = _row_known(system)[:, :, visible]
    filters = system.module.out_channels // system.module.groups
    k = system.k.reshape(system.module.groups, filters, -1)[:, :, visible]
    shared = sum(_shared(k[g], known[g]) for g in range(len(k)))
    bound = K + int(known.sum()) - shared
    return min(seen * system.input_shape[0], bound), whole


def _row_known(system: LayerSystem) -> Tensor:
    assert isinstance(system.module, Conv)
    mask = system.row_mask if system.row_mask is not None else torch.ones_like(system.k)
    groups = system.module.groups
    return (mask != 0).reshape(groups, system.module.out_channels // groups, -1)


def _shared(k: Tensor, known: Tensor) -> int:
    """Equations in both sets: pairs ``(f, f')`` where ``k_f`` meets known rows of ``f'`` only."""
    if bool(known.all()):
        return len(k) * _svd_rank(k)
    total = 0
    for rows in known:
        usable = ~((k != 0) & ~rows).any(dim=1) & (k != 0).any(dim=1)
        total += _svd_rank(k[usable]) if bool(usable.any()) else 0
    return total


def _channel_blocks(conv: Conv, k: Tensor, index: Tensor, n: int) -> Iterator[Tensor | int]:
    """``K`` of one channel, ``(F·U, pixels)``, for each group; its rank's bound where too large."""
    filters = conv.out_channels // conv.groups
    rows = filters * len(index)
    for part in k.reshape(conv.groups, filters, -1):
        if rows * n > ENTRIES or min(rows, n) > INERTIA_UNKNOWNS:
            yield min(rows, n)
            continue
        block = part.new_zeros(filters, len(index), n + 1)
        shape = (filters, *index.shape)
        block.scatter_add_(2, index.to(k.device).expand(shape), part[:, None, :].expand(shape))
        yield block[:, :, 1:].reshape(rows, n)


def _block_rank(block: Tensor | int) -> tuple[int, bool]:
    if isinstance(block, int):
        return block, False
    if min(block.shape) <= DENSE_UNKNOWNS:
        return _svd_rank(block), True
    narrow = block if block.shape[0] >= block.shape[1] else block.T
    return _inertia_rank(narrow), True


def _svd_rank(A: Tensor) -> int:
    values = torch.linalg.svdvals(A)
    return int((values > RANK_TOLERANCE * values.max()).sum()) if values.numel() else 0


def _inertia_rank(A: Tensor) -> int:
    """Rank by Sylvester's law: a factorisation counts the eigenvalues of ``AᵀA`` above zero."""
    gram = A.T @ A
    scale = float(torch.linalg.matrix_norm(gram, 2 if len(gram) < 64 else "fro"))
    if scale == 0:
        return 0
    shift = INERTIA_TOLERANCE * scale
    gram.diagonal().sub_(shift)
    LD, pivots = torch.linalg.ldl_factor(gram)
    single = pivots > 0
    below = int((LD.diagonal()[single] < 0).sum()) + int((~single).sum()) // 2
    return len(gram) - below


def _dense(system: LayerSystem) -> Tensor:
    """Scaled rows that the mask leaves, ``(equations, unknowns)``."""
    module = system.module
    rows = system.to_dense(scaled=True) if not _writes_fast(module) else _dense_conv(system)
    if system.row_mask is None:
        return rows
    kept = (system.row_mask != 0).flatten()
    return torch.cat([rows[: len(kept)][kept], rows[len(kept) :]])


def _writes_fast(module: nn.Module) -> bool:
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _dense_conv(system: LayerSystem) -> Tensor:
    conv = system.module
    assert isinstance(conv, Conv)
    floor = joint.Floor("", copy.deepcopy(conv).double(), system.input_shape)
    W = floor.matrix(system.k)
    index, n = _places(conv, system.input_shape)
    channels, filters = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    K = W.new_zeros(conv.out_channels, channels, len(index), conv.in_channels, n)
    blocks = _channel_blocks(conv, system.k, index, n)
    for g, block in enumerate(blocks):
        assert isinstance(block, Tensor)
        part = block.reshape(filters, len(index), n)
        for c in range(channels):
            K[g * filters : (g + 1) * filters, c, :, g * channels + c] = part
    return torch.cat([W, system.gradient_scale * K.reshape(-1, W.shape[1])])


# --- chains -----------------------------------------------------------------------------------


@dataclass
class _Passed:
    """A random sample's way through the chain."""

    values: list[Tensor]  # input of each step, then the output
    gradients: list[Tensor]  # of a random functional of the output, likewise


def audit(
    model: nn.Module,
    input_shape: Shape,
    *,
    inputs: Tensor | None = None,
    together: bool = True,
    jacobian: bool | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Audit:
    r""":math:`\operatorname{rank}[W_l; K_l] \stackrel{?}{=} n_l` for every layer ``l``.

    Which layers, and so which networks, give their input away: told from the architecture and
    its weights, before any data is sent. A random input and random output gradients stand for
    the sample; ranks are the same for almost all of them, except that a ReLU masks the rows of
    the units that are dead for the sample at hand. Implements :eq:`audit-verdict`.

    Parameters
    ----------
    model : nn.Module
        Any that ``torch.fx`` can trace; a residual block of up to 8192 unknowns counts as one
        layer. Where it is no chain even so, or holds layers that cannot be undone (max pooling,
        batch norm in train mode), the report says where and why, and counts the layers all the
        same.
    input_shape : tuple of int
        Of one sample, such as ``(3, 32, 32)``.
    inputs : Tensor, optional
        ``(1, *input_shape)``: audit at this sample instead of a random one, for networks that
        mask rows.
    together : bool
        Whether to try a layer that lacks equations together with the layers below, as
        :func:`gradinv_edu.recursion.recover` does; ``False`` for layers one at a time.
    jacobian : bool, optional
        Whether to compute the rank of the whole network's Jacobian
        (:func:`jacobian_rank`); by default for up to 512 unknowns.
    generator : torch.Generator, optional
        Of the random input and gradients; a fixed one by default.
    progress : bool
        Show a bar over the layers.

    Returns
    -------
    Audit

    Raises
    ------
    UnsupportedLayerError
        If the model cannot be traced or has no dense or convolutional layer.
    InvalidTensorError
        If the model does not take inputs of this shape, or a parameter is NaN or infinite.
    InvalidArgumentError
        If ``input_shape`` is not a tuple of positive whole numbers.

    Notes
    -----
    Rank analysis: Zhu and Blaschko (2021). Their index RA-i could not be checked against the
    paper's text and is not computed; ``rank_index`` is ``rank − unknowns``, which Chen and
    Campbell (2022) print for each layer and weigh into one number
    (:attr:`Audit.weighted_index`).
    """
    shape = _shape(input_shape)
    _usable(model)
    generator = generator or torch.Generator().manual_seed(20200913)
    with _own_randomness():
        x = _sample(shape, inputs, generator)
        try:
            found = _chain_audit(model, x, generator, progress, together)
        except UnsupportedLayerError as error:
            found = _graph_audit(model, x, generator, progress, error)
        if jacobian or (jacobian is None and math.prod(shape) <= AUTOMATIC_JACOBIAN):
            whole = _jacobian_if_any(model, shape, x, generator, bool(jacobian))
            found = replace(found, network=whole)
    return found


def _shape(input_shape: Shape) -> Shape:
    listed = isinstance(input_shape, Sequence) and len(input_shape) > 0
    if not listed or not all(type(s) is int and s > 0 for s in input_shape):
        raise InvalidArgumentError(
            f"input_shape is the shape of one sample, positive whole numbers such as (3, 32, 32); "
            f"got {input_shape!r}."
        )
    return tuple(input_shape)


def _usable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedLayerError(
            f"The model is a {type(model).__name__}, not a torch.nn.Module."
        )
    if isinstance(model, nn.Sequential) and len(model) == 0:
        raise UnsupportedLayerError("The model has no layer.")
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UnsupportedLayerError(
                f"{name} is not initialised yet: call the model once, so that it takes shape."
            )
        if not bool(torch.isfinite(p).all()):
            raise InvalidTensorError(f"The parameter {name} has NaN or infinite entries.")


@contextmanager
def _own_randomness() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # torch's own forward-mode rules still use what torch deprecates
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        torch.manual_seed(0)
        yield


def _sample(shape: Shape, inputs: Tensor | None, generator: torch.Generator) -> Tensor:
    if inputs is not None:
        return checks.shaped(inputs, "inputs", (1, *shape))
    return torch.rand(1, *shape, generator=generator, dtype=torch.float64)


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return drawn.to(like.device, like.dtype)


def _output_gradient(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Of cross-entropy with a random label; of one output, any number."""
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        return _draw(outputs, generator)
    label = int(torch.randint(outputs.shape[1], (1,), generator=generator))
    k = outputs.detach().softmax(dim=1)
    k[:, label] -= 1
    return k


def _chain_audit(
    model: nn.Module, x: Tensor, generator: torch.Generator, progress: bool, together: bool
) -> Audit:
    steps = trace(model, tuple(x.shape[1:]), sums=True)
    _refuse_sums(steps)
    device = next((p.device for p in model.parameters()), x.device)
    passed = _pass(steps, x.to(device), generator)
    begins, why = _beginning(steps)
    lowest = len(steps) - 1 if begins is None else begins
    walk = _Audited(steps, passed, generator, lowest, together)
    walk.descend(progress)
    if not walk.layers:
        raise UnsupportedLayerError(
            "The model has no dense or convolutional layer: no parameter's gradient holds the "
            "input."
        )
    stops = [*reversed(walk.stops), *([why] if why is not None else [])]
    known = all(a.recoverable or a.settled or a.name in walk.carried for a in walk.needed)
    return Audit(
        model=type(model).__name__,
        input_shape=tuple(x.shape[1:]),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=tuple(reversed(walk.layers)),
        stops=tuple(stops),
        exact=known and not stops,
        begins=None
        if begins is None
        else steps[begins].name or type(steps[begins].module).__name__,
        network=None,
        notes=tuple(walk.notes(None if begins is None else steps[begins])),
    )


def _refuse_sums(steps: Sequence[Step]) -> None:
    for step in steps:
        if isinstance(step.module, Residual):
            refuse_random(step.module)
        if step.summing and math.prod(step.input_shape) > SUM_UNKNOWNS:
            raise UnsupportedLayerError(
                f"The residual block that ends in {step.name} has {math.prod(step.input_shape)} "
                f"unknowns; as one system it is audited up to {SUM_UNKNOWNS}."
            )


def _pass(steps: Sequence[Step], x: Tensor, generator: torch.Generator) -> _Passed:
    values = [x.clone().requires_grad_()]
    for step in steps:
        values.append(_through(step.module, values[-1], generator))
    k = _output_gradient(values[-1], generator)
    gradients = torch.autograd.grad(values[-1], values, k, allow_unused=True)
    filled = [
        torch.zeros_like(v) if g is None else g for v, g in zip(values, gradients, strict=True)
    ]
    return _Passed([v.detach() for v in values], filled)


def _through(module: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """One layer; dropout's mask from the generator, batch norm by its running statistics."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        if not module.training or module.p == 0:
            return x * 1.0
        keep = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x) >= module.p
        return x * keep / (1 - module.p)
    if isinstance(module, NORMS) and module.training:
        return _running_norm(module, x)
    clone = copy.copy(module)
    if getattr(clone, "inplace", False):
        clone.inplace = False  # type: ignore[assignment]
    output: Tensor = clone(x)
    return output


def _running_norm(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, NORMS)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if module.running_mean is None or module.running_var is None:
        return x * 1.0 if module.weight is None else x * module.weight.reshape(shape)
    return nn.functional.batch_norm(
        x, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, 1e-5
    )


def _beginning(steps: Sequence[Step]) -> tuple[int | None, Stop | None]:
    """Step at which the recursion begins, or why it cannot."""
    flat = [i for i, s in enumerate(steps) if _flat(s)]
    biased = [i for i in flat if steps[i].module.bias is not None]
    if biased:
        return biased[0], None
    weighted = [i for i, s in enumerate(steps) if s.weighted]
    last = weighted[-1] if weighted else len(steps) - 1
    if last in flat and all(s.reshaping for s in steps[last + 1 :]):
        return last, None
    end = steps[-1]
    kind = type(end.module).__name__
    reason = "nothing gives k to begin with: no dense layer with a bias, none right before the loss"
    return None, Stop(end.name, kind, reason)


def _flat(step: Step) -> bool:
    return isinstance(step.module, nn.Linear) and len(step.input_shape) == 1


class _Audited:
    """The walk down the chain, as :func:`gradinv_edu.recursion.recover` takes it."""

    def __init__(
        self,
        steps: Sequence[Step],
        passed: _Passed,
        generator: torch.Generator,
        begins: int,
        together: bool = False,
    ) -> None:
        self.steps, self.passed, self.generator, self.begins = steps, passed, generator, begins
        self.together = together
        self.known: Tensor | None = None
        self.layers: list[LayerAudit] = []
        self.stops: list[Stop] = []
        self.carried: set[str] = set()  # floors of a joint system, determined by it
        self.masked = False

    @property
    def needed(self) -> list[LayerAudit]:
        return [layer for layer in self.layers if layer.needed]

    def descend(self, progress: bool) -> None:
        with _bar(len(self.steps), progress) as tick:
            position = len(self.steps) - 1
            while position >= 0:
                below = self._step(position)
                tick(position - below)
                position = below

    def _step(self, position: int) -> int:
        step = self.steps[position]
        if step.reshaping:
            self._reshape(step)
        elif step.weighted or step.pooling:
            return self._layer(position)
        elif step.summing:
            self._sum(position)
        elif (reason := _cannot_undo(step.module)) is not None:
            self._stop(position, reason)
        else:
            self._undo(position)
        return position - 1

    def _reshape(self, step: Step) -> None:
        if self.known is not None:
            self.known = self.known.reshape(1, *step.input_shape)

    def _stop(self, position: int, reason: str) -> None:
        step = self.steps[position]
        self.known = None  # below, layers are counted as if it had been undone
        if position <= self.begins:
            self.stops.append(Stop(step.name, type(step.module).__name__, reason))

    def _undo(self, position: int) -> None:
        step, outputs = self.steps[position], self.passed.values[position + 1]
        found = undo(step.module, step.name, outputs, torch.finfo(torch.float64).eps).known
        both = found if self.known is None else found & self.known
        self.known = None if bool(both.all()) else both

    def _layer(self, position: int) -> int:
        block = _block_of(self.steps, position)
        module = _as_one(block)
        first = position - len(block) + 1
        k = self.passed.gradients[position + 1]
        found, system = self._examine(block, module, k)
        below = first - 1
        needed = position <= self.begins
        self.known = None
        self.layers.append(replace(found, needed=needed))
        wanted = self.together and needed and found.name not in self.carried
        if wanted and found.recoverable is False and system is not None:
            self._borrow(system, found, first)
        return below

    def _sum(self, position: int) -> None:
        """A residual block: everything that its two ways share is one system."""
        step, x = self.steps[position], self.passed.values[position]
        k, mask = self.passed.gradients[position + 1], self.known
        assert isinstance(step.module, Residual)
        self.masked |= mask is not None
        row_mask = None if mask is None else mask.to(torch.float64)
        shapes = {name: torch.zeros_like(p) for name, p in step.module.named_parameters()}
        system = ResidualSystem(step.module, k, shapes, row_mask)
        system.use("all")
        found = _assess_sum(system, x, self.generator)
        self.known = None
        self.layers.append(
            LayerAudit(
                name=step.name,
                kind="Residual",
                unknowns=x.numel(),
                weight_equations=system.weight_equations,
                gradient_equations=system.gradient_equations,
                rank=found.rank,
                method=found.method,
                recoverable=found.recoverable,
                needed=position <= self.begins,
            )
        )

    def _examine(
        self, block: list[Step], module: nn.Module, k: Tensor
    ) -> tuple[LayerAudit, LayerSystem | None]:
        kind = "+".join(type(s.module).__name__ for s in block if not s.reshaping)
        shape, name = block[0].input_shape, _joined(block)
        mask = self.known
        self.masked |= mask is not None
        if len(block) == 1 and _flat(block[0]) and bool(k.any()):
            rows = k.numel() if mask is None else int(mask.sum())
            n = math.prod(shape)
            return LayerAudit(name, kind, n, rows, k.numel() * n, n, "closed form", True), None
        row_mask = None if mask is None else mask.to(torch.float64)
        system = LayerSystem(module, k, shape, row_mask)
        found = _assess(system, self.generator)
        return _report(name, kind, system, found), system

    def _borrow(self, system: LayerSystem, found: LayerAudit, first: int) -> None:
        """Whether layers below make up for what the last one lacks."""
        names, settled = _borrowed(self.steps, self.passed, system, found, first)
        self.layers[-1] = replace(found, together=names, settled=settled)
        if settled:
            self.carried |= set(names)

    def notes(self, begins: Step | None) -> list[str]:
        lines = []
        if self.masked:
            lines.append("masked rows: those of units that are dead for the sample at hand")
        if begins is not None and begins.module.bias is None:
            lines.append(
                "no bias: the loss must fix the scale (softmax with three classes or more)"
            )
            if begins.output_shape == (1,):
                lines[-1] = "one output without a bias: a right prediction may have a twin"
        return lines


def _report(name: str, kind: str, system: LayerSystem, found: _Found) -> LayerAudit:
    return LayerAudit(
        name=name,
        kind=kind,
        unknowns=system.unknowns,
        weight_equations=system.weight_equations,
        gradient_equations=system.gradient_equations,
        rank=found.rank,
        method=found.method,
        recoverable=found.recoverable,
    )


def _cannot_undo(module: nn.Module) -> str | None:
    """Why an elementwise step, or any other, cannot be undone; None where it can."""
    kind = type(module).__name__
    if isinstance(module, NORMS) and module.training:
        return "in train mode it divides by statistics of its own input"
    if is_elementwise(module):
        return None
    if "MaxPool" in kind:
        return "it keeps one entry of each window and forgets which, and all the others"
    if "Norm" in kind:
        return "it divides by statistics of its own input"
    return "it is not linear in its input and cannot be undone entry by entry"


def _block_of(steps: Sequence[Step], position: int) -> list[Step]:
    """Steps that are linear together, as the recursion takes them: pools and what feeds them."""
    block = [steps[position]]
    if steps[position].weighted:
        return block
    for below in reversed(steps[:position]):
        norm = isinstance(below.module, NORMS) and not below.module.training
        if below.weighted or below.pooling or below.reshaping or norm:
            block.insert(0, below)
        if below.weighted:
            return block
        if not (below.pooling or below.reshaping or norm):
            break
    return [steps[position]]


def _as_one(block: list[Step]) -> nn.Module:
    return block[0].module if len(block) == 1 else nn.Sequential(*[s.module for s in block])


def _joined(block: list[Step]) -> str:
    name = block[0].name if len(block) == 1 else f"{block[0].name}+…+{block[-1].name}"
    return name or type(block[0].module).__name__


def _borrowed(
    steps: Sequence[Step], passed: _Passed, system: LayerSystem, found: LayerAudit, first: int
) -> tuple[tuple[str, ...], bool]:
    """Floors with which the deficient system is determined, and whether the rounds find it."""
    determined: tuple[str, ...] = ()
    if system.unknowns > joint.DENSE or not _writable(system):
        return determined, False
    z, gradient = system.matvec(passed.values[first])  # what the server would hold
    rows = system.right_hand_side(z + system.offset, gradient if gradient.numel() else None)
    floors: list[joint.Floor] = []
    position = first - 1
    while (lower := _floor_below(steps, position)) is not None:
        floor, position = lower
        floors.insert(0, floor)
        if sum(f.unknowns for f in floors) + found.deficiency > joint.DENSE:
            break
        if joint.spare_equations(floors, found.deficiency) < 0:
            continue
        names = tuple(f.name for f in floors)
        solved = joint.solve(floors, system, rows, found.deficiency)
        if solved.converged and solved.full_rank:
            return names, True
        start = position + 1
        B = _jacobian_between(steps[start:first], passed.values[start])
        if not determined and _full_column_rank(_dense(system) @ B):
            determined = names
    return determined, False


def _floor_below(steps: Sequence[Step], position: int) -> tuple[joint.Floor, int] | None:
    above: list[nn.Module] = []
    while position >= 0 and not (steps[position].weighted or steps[position].pooling):
        step = steps[position]
        random = isinstance(step.module, nn.modules.dropout._DropoutNd) and step.module.training
        if random or not (step.reshaping or _cannot_undo(step.module) is None):
            return None
        above.insert(0, step.module)
        position -= 1
    if position < 0:
        return None
    block = _block_of(steps, position)
    floor = joint.Floor(_joined(block), _as_one(block), block[0].input_shape, above)
    return floor, position - len(block)


def _jacobian_between(steps: Sequence[Step], x: Tensor) -> Tensor:
    """Jacobian of some steps at ``x``, ``(outputs, inputs)``."""

    def through(value: Tensor) -> Tensor:
        for step in steps:
            value = step.module(value)
        return value.flatten()

    def push(tangent: Tensor) -> Tensor:
        out: Tensor = jvp(through, (x,), (tangent.reshape(x.shape),))[1]
        return out

    identity = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
    return torch.cat([vmap(push)(part) for part in torch.split(identity, 256)]).T


def _full_column_rank(A: Tensor) -> bool:
    if A.shape[0] < A.shape[1]:
        return False
    rank = _svd_rank(A) if A.shape[1] <= DENSE_UNKNOWNS else _inertia_rank(A)
    return rank == A.shape[1]


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    if not shown:
        yield lambda done: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="audit", unit="layer", leave=False) as bar:
        yield bar.update


# --- models that are no chain -----------------------------------------------------------------


class _Recorder(fx.Interpreter):
    """Runs a traced model out of place and keeps what every node gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        """Run one node and keep its result."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.seen[n] = result
        return result

    def call_function(
        self, target: object, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Call the function that does the same out of place."""
        plain = _OUT_OF_PLACE.get(target, target)
        options = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
        return super().call_function(plain, args, options)  # type: ignore[arg-type]


_OUT_OF_PLACE: dict[object, object] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    torch.relu_: torch.relu,
    nn.functional.relu_: nn.functional.relu,
}
_HARMLESS = {"flatten", "view", "reshape", "size", "getitem", "getattr", "contiguous", "dropout"}
_INVERTIBLE = {"leaky_relu", "elu", "celu", "selu", "softplus", "sigmoid", "tanh"}
_ADDING = {"add", "iadd", "sub", "isub", "cat", "concat", "stack", "mul", "imul"}


def _graph_audit(
    model: nn.Module, x: Tensor, generator: torch.Generator, progress: bool, why: Exception
) -> Audit:
    """Layers of a model that is no chain, each counted as if the rest were undone."""
    training = {name for name, module in model.named_modules() if module.training}
    twin = copy.deepcopy(model).eval().requires_grad_(False).to(torch.float64)
    graph = _traced(twin)
    seen, gradients = _record(graph, x, generator)
    stops = list(_graph_stops(graph, training))
    places = list(_graph_layers(graph, seen))
    layers = []
    with _bar(len(places), progress) as tick:
        for node, module in places:
            layers.append(_graph_layer(node, module, seen, gradients, generator))
            tick(1)
    if not layers:
        raise UnsupportedLayerError(str(why)) from why
    masked = any(
        a.weight_equations < seen[n].numel() for a, (n, _) in zip(layers, places, strict=True)
    )
    notes = ["masked rows: those of units that are dead for the sample at hand"] if masked else []
    return Audit(
        model=type(model).__name__,
        input_shape=tuple(x.shape[1:]),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=tuple(layers),
        stops=tuple(stops) or (Stop(type(model).__name__, type(model).__name__, str(why)),),
        exact=False,
        begins=None,
        network=None,
        notes=tuple(notes),
    )


def _traced(twin: nn.Module) -> fx.GraphModule:
    for module in twin.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    try:
        return fx.symbolic_trace(twin)
    except Exception as error:
        raise UnsupportedLayerError(
            f"torch.fx cannot trace the forward pass of {type(twin).__name__}: {error}. "
            "Write it without control flow on data."
        ) from error


def _record(
    graph: fx.GraphModule, x: Tensor, generator: torch.Generator
) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
    device = next((p.device for p in graph.parameters()), x.device)
    recorder = _Recorder(graph)
    try:
        output = recorder.run(x.to(device, torch.float64).requires_grad_())
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise InvalidTensorError(
            f"The model does not take inputs of shape {tuple(x.shape[1:])}: {error}"
        ) from None
    if not isinstance(output, Tensor):
        raise UnsupportedLayerError(
            f"The model returns a {type(output).__name__}; one tensor is handled."
        )
    nodes = [n for n in recorder.seen if recorder.seen[n].requires_grad]
    values = [recorder.seen[n] for n in nodes]
    k = _output_gradient(output, generator)
    found = torch.autograd.grad(output, values, k, allow_unused=True)
    gradients = {
        n: torch.zeros_like(v) if g is None else g
        for n, v, g in zip(nodes, values, found, strict=True)
    }
    return {n: v.detach() for n, v in recorder.seen.items()}, gradients


def _graph_layers(
    graph: fx.GraphModule, seen: Mapping[fx.Node, Tensor]
) -> Iterator[tuple[fx.Node, nn.Module]]:
    for node in graph.graph.nodes:
        if node.op != "call_module" or node not in seen:
            continue
        module = graph.get_submodule(str(node.target))
        if isinstance(module, (*WEIGHTED, *POOLS)):
            yield node, module


def _graph_layer(
    node: fx.Node,
    module: nn.Module,
    seen: Mapping[fx.Node, Tensor],
    gradients: Mapping[fx.Node, Tensor],
    generator: torch.Generator,
) -> LayerAudit:
    source = node.all_input_nodes[0]
    shape, k = tuple(seen[source].shape[1:]), gradients[node]
    mask = _mask_above(node, seen)
    name, kind, n = str(node.target), type(module).__name__, math.prod(shape)
    if isinstance(module, nn.Linear) and len(shape) == 1 and bool(k.any()):
        rows = k.numel() if mask is None else int(mask.sum())
        return LayerAudit(name, kind, n, rows, k.numel() * n, n, "closed form", True)
    system = LayerSystem(module, k, shape, mask)
    return _report(name, kind, system, _assess(system, generator))


def _mask_above(node: fx.Node, seen: Mapping[fx.Node, Tensor]) -> Tensor | None:
    """Units that a ReLU further up leaves active, where only elementwise steps lie between."""
    shape = seen[node].shape
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node not in seen or seen[node].shape != shape:
            return None
        if _kind(node) in ("relu", "relu_", "ReLU"):
            active = (seen[node] > 0).to(torch.float64)
            return None if bool(active.all()) else active
        if not (_kind(node) in _ADDING or _is_norm(node) or _kind(node) in ("Identity", "Dropout")):
            return None
    return None


def _kind(node: fx.Node) -> str:
    if node.op == "call_module":
        return type(_module(node)).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _module(node: fx.Node) -> nn.Module:
    assert node.graph.owning_module is not None
    return node.graph.owning_module.get_submodule(str(node.target))


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(_module(node), NORMS)


def _graph_stops(graph: fx.GraphModule, training: set[str]) -> Iterator[Stop]:
    used: dict[str, str] = {}
    for node in graph.graph.nodes:
        reason = None
        if node.op == "call_module":
            reason = _module_stop(node, training, used)
        elif node.op in ("call_function", "call_method"):
            reason = _call_stop(node)
        if reason is not None:
            name = str(node.target) if node.op == "call_module" else node.name
            yield Stop(name, _kind(node), reason)


def _module_stop(node: fx.Node, training: set[str], used: dict[str, str]) -> str | None:
    module, name = _module(node), str(node.target)
    if name in used and any(True for _ in module.parameters()):
        return "used twice: its gradient is the sum of both uses"
    used[name] = node.name
    if isinstance(module, NORMS) and name in training:
        return "in train mode it divides by statistics of its own input"
    if isinstance(module, (*WEIGHTED, *POOLS, *RESHAPES)):
        return None
    return _cannot_undo(module)


def _call_stop(node: fx.Node) -> str | None:
    kind = _kind(node)
    tensors = [n for n in node.all_input_nodes if _kind(n) not in ("size", "getattr", "getitem")]
    if kind in _ADDING and len(tensors) > 1:
        return "two branches meet: their sum or juxtaposition is one joint system"
    if "max_pool" in kind:
        return "it keeps one entry of each window and forgets which, and all the others"
    if kind in _HARMLESS | _INVERTIBLE | {"relu", "relu_"} or "avg_pool" in kind:
        return None
    if kind in _ADDING:  # with a constant
        return None
    return "it is not among the operations that the recursion can undo"


# --- the whole network ------------------------------------------------------------------------


def jacobian_rank(
    model: nn.Module,
    input_shape: Shape,
    *,
    loss: nn.Module | None = None,
    inputs: Tensor | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> NetworkRank:
    r""":math:`\operatorname{rank}\, \partial(\nabla_\theta L)/\partial x` at one input.

    How many directions of the input the *whole* gradient sees, all layers together. It bounds
    every attack on one gradient locally: a direction that the Jacobian maps to zero changes no
    entry of the gradient. Written out where it is small; else seen through random combinations
    of its rows, each one pass of forward over reverse differentiation, doubled in number until
    their rank no longer grows. Implements :eq:`network-rank`.

    Parameters
    ----------
    model : nn.Module
        Evaluated on a float64 copy in eval mode.
    input_shape : tuple of int
        Of one sample.
    loss : nn.Module, optional
        By default cross-entropy, or the logistic loss for one output.
    inputs : Tensor, optional
        ``(1, *input_shape)``, by default random.
    targets : Tensor, optional
        By default random.
    generator : torch.Generator, optional
        Of all that is random; a fixed one by default.
    progress : bool
        Show a bar over the rows.

    Returns
    -------
    NetworkRank

    Raises
    ------
    InvalidTensorError
        If the model does not take inputs of this shape, the loss not these targets, or a parameter
        is NaN or infinite.
    UnsupportedLossError
        If the loss is not one number.
    UnsupportedLayerError
        If it has no parameters, or an operation without derivatives of second order.
    """
    shape = _shape(input_shape)
    _usable(model)
    generator = generator or torch.Generator().manual_seed(20200913)
    with _own_randomness():
        x = _sample(shape, inputs, generator)
        problem = _Gradient(model, x, loss, targets, generator)
        rows = problem.rows(progress)
    values = torch.linalg.svdvals(rows)
    rank = int((values > PROBE_GAP * values.max()).sum())
    exact = problem.written and rank == x.numel()
    condition = float(values[0] / values[rank - 1]) if exact else None
    return NetworkRank(x.numel(), problem.parameters, rank, condition)


class _Gradient:
    """The gradient of a loss as a function of the input, and its Jacobian's rows."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        loss: nn.Module | None,
        targets: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self.model = copy.deepcopy(model).to(torch.float64).eval().requires_grad_(False)
        for module in self.model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        self.weights = {n: p.detach() for n, p in self.model.named_parameters()}
        if not self.weights:
            raise UnsupportedLayerError("The model has no parameters, so it sends no gradient.")
        self.generator = generator
        self.x = x.to(next(iter(self.weights.values())).device)
        self.parameters = sum(p.numel() for p in self.weights.values())
        output = self._output()
        self.loss, self.targets = _loss(output, loss, targets, generator)
        _check_loss(self.loss, output, self.targets)
        self.scale = self._scale()
        self.written = self.parameters * self.x.numel() <= ENTRIES

    def _output(self) -> Tensor:
        refusal = f"The model does not take inputs of shape {tuple(self.x.shape[1:])}"
        with checks.fitting(refusal), torch.no_grad():
            output: Tensor = self.model(self.x)
        return output

    def value(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        output = functional_call(self.model, weights, (x,))
        value: Tensor = self.loss(output, self.targets)
        return value

    def _scale(self) -> dict[str, float]:
        gradients = grad(self.value)(self.weights, self.x)
        sizes = {n: float(g.norm()) for n, g in gradients.items()}
        return {n: 1 / s if s > 0 else 0.0 for n, s in sizes.items()}

    def rows(self, progress: bool) -> Tensor:
        if self.written:
            return self._all_rows()
        n, rows = self.x.numel(), self.x.new_zeros(0, self.x.numel())
        wanted = 64
        with _bar(n, progress) as tick:
            while True:
                fresh = self._combinations(min(wanted, n + 8) - len(rows))
                tick(len(fresh))
                rows = torch.cat([rows, fresh])
                values = torch.linalg.svdvals(rows)
                rank = int((values > PROBE_GAP * values.max()).sum())
                if rank < len(rows) or len(rows) >= n + 8:
                    return rows
                wanted *= 2

    def _all_rows(self) -> Tensor:
        """The Jacobian itself: its columns, forward over reverse, in batches."""

        def gradient(x: Tensor) -> Tensor:
            found = grad(self.value)(self.weights, x)
            return torch.cat([g.flatten() * self.scale[n] for n, g in found.items()])

        def push(tangent: Tensor) -> Tensor:
            column: Tensor = jvp(gradient, (self.x,), (tangent.reshape(self.x.shape),))[1]
            return column

        identity = torch.eye(self.x.numel(), dtype=self.x.dtype, device=self.x.device)
        return torch.cat([vmap(push)(part) for part in torch.split(identity, 64)]).T

    def _combinations(self, count: int) -> Tensor:
        size = max(1, min(32, int(1e7 / self.parameters)))
        parts = [min(size, count - done) for done in range(0, count, size)]
        return torch.cat([self._combined(part) for part in parts])

    def _combined(self, count: int) -> Tensor:
        directions = {
            n: self.scale[n]
            * torch.randn(count, *w.shape, generator=self.generator, dtype=w.dtype).to(w.device)
            for n, w in self.weights.items()
        }

        def row(direction: dict[str, Tensor]) -> Tensor:
            def along(x: Tensor) -> Tensor:
                slope: Tensor = jvp(lambda w: self.value(w, x), (self.weights,), (direction,))[1]
                return slope

            pulled: Tensor = grad(along)(self.x)
            return pulled.flatten()

        return torch.cat([vmap(row)(directions)])


def _loss(
    output: Tensor, loss: nn.Module | None, targets: Tensor | None, generator: torch.Generator
) -> tuple[nn.Module, Tensor]:
    outputs = output.shape[-1]
    single = output.numel() == 1
    chosen = loss or (nn.BCEWithLogitsLoss() if single else nn.CrossEntropyLoss())
    if type(chosen) is nn.MSELoss and chosen.reduction in ("mean", "sum"):
        chosen = _SquaredError(chosen.reduction)
    if targets is not None:
        return chosen, targets.to(output.device)
    if isinstance(chosen, nn.CrossEntropyLoss):
        label = torch.randint(outputs, (1,), generator=generator)
        return chosen, label.to(output.device)
    return chosen, (_draw(output, generator) > 0).to(output.dtype)


def _check_loss(loss: nn.Module, output: Tensor, targets: Tensor) -> None:
    given = f"outputs {tuple(output.shape)} with targets {tuple(targets.shape)}, {targets.dtype}"
    with checks.fitting(f"The loss does not take {given}"):
        value = loss(output, targets)
    if value.dim():
        raise UnsupportedLossError(
            f"The loss gives {tuple(value.shape)}, not one number: use reduction='mean' or 'sum'."
        )


class _SquaredError(nn.Module):
    """``nn.MSELoss`` in operations whose forward-mode rules torch has."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        square = (output - targets).square()
        return square.sum() if self.reduction == "sum" else square.mean()


def _jacobian_if_any(
    model: nn.Module, shape: Shape, x: Tensor, generator: torch.Generator, wanted: bool
) -> NetworkRank | None:
    cheap = sum(p.numel() for p in model.parameters()) * x.numel() <= ENTRIES
    if not (wanted or cheap):
        return None
    try:
        return jacobian_rank(model, shape, inputs=x, generator=generator)
    except RuntimeError:
        if wanted:
            raise
        return None


# --- the leak map -----------------------------------------------------------------------------


def leak_map(
    model: nn.Module,
    input_shape: Shape,
    *,
    whole: bool = False,
    inputs: Tensor | None = None,
    probes: int = 32,
    generator: torch.Generator | None = None,
) -> Tensor:
    r""":math:`\operatorname{diag}(A^+ A)`: what part of each pixel the equations determine.

    ``A⁺A`` projects onto the row space of the equations ``A``: what they see of a picture. Its
    diagonal is 1 where a pixel is determined, 0 where no equation meets it, and between where
    only combinations with other pixels are; it sums to the rank. Implements :eq:`leak-map`.

    Parameters
    ----------
    model : nn.Module
        As for :func:`audit`.
    input_shape : tuple of int
        Of one sample.
    whole : bool
        Take the rows of the whole network's Jacobian (:func:`jacobian_rank`); by default those
        of the first layer's equations, the layers above taken as undone.
    inputs : Tensor, optional
        ``(1, *input_shape)``: at this picture; by default at a random one.
    probes : int
        Random vectors of Hutchinson's kind for inputs of more than 1024 entries; the error of
        an entry falls as one over their root.
    generator : torch.Generator, optional
        Of all that is random; a fixed one by default.

    Returns
    -------
    Tensor
        ``input_shape``, float64, in [0, 1].

    Raises
    ------
    UnsupportedLayerError
        If the model cannot be traced or does not begin with a layer that is linear.
    InvalidArgumentError
        If ``probes`` is less than 1.
    """
    if type(probes) is not int or probes < 1:
        raise InvalidArgumentError(f"probes is a positive number, got {probes!r}.")
    shape = _shape(input_shape)
    _usable(model)
    generator = generator or torch.Generator().manual_seed(20200913)
    with _own_randomness():
        x = _sample(shape, inputs, generator)
        if whole:
            rows = _Gradient(model, x, None, None, generator).rows(False)
            return _diagonal(rows, PROBE_GAP).reshape(shape)
        return system_leak_map(_first_system(model, x, generator), probes, generator)


def system_leak_map(
    system: LayerSystem, probes: int = 32, generator: torch.Generator | None = None
) -> Tensor:
    r""":math:`\mathrm{diag}(A^+ A) \approx \frac1s \sum_{i=1}^s v_i \odot A^+ A\, v_i`.

    :func:`leak_map` of one layer's equations: exact for up to 1024 unknowns, else by random
    signs ``v_i``, whose projection is the least-norm solution of ``A x = A v_i``.
    Implements :eq:`leak-map`.

    Parameters
    ----------
    system : LayerSystem
        Of one sample.
    probes : int
        Number of random vectors.
    generator : torch.Generator, optional
        Of the random vectors; a fixed one by default.
    """
    generator = generator or torch.Generator().manual_seed(20200913)
    if system.unknowns <= EXACT_MAP:
        return _diagonal(_dense(system), RANK_TOLERANCE).reshape(system.input_shape)
    exact, fast = ScaledSystem(system), ScaledSystem(system, torch.float32)
    total = torch.zeros(system.input_shape, dtype=torch.float64, device=system.k.device)
    for _ in range(probes):
        v = torch.randn(1, *system.input_shape, generator=generator, dtype=torch.float64).sign()
        v = v.to(system.k.device)
        b = exact.forward(v)
        target = PROJECTED * float(exact.adjoint(b).norm())
        total += (v * cgls(exact, b, target, PROJECTION_STEPS, fast=fast).x)[0]
    return (total / probes).clamp(0, 1)


def _diagonal(A: Tensor, tolerance: float) -> Tensor:
    _, values, V = torch.linalg.svd(A, full_matrices=False)
    kept = V[values > tolerance * values.max()]
    diagonal: Tensor = kept.square().sum(dim=0).clamp(0, 1)
    return diagonal


def _first_system(model: nn.Module, x: Tensor, generator: torch.Generator) -> LayerSystem:
    try:
        steps = trace(model, tuple(x.shape[1:]))
    except UnsupportedLayerError:
        return _first_in_graph(model, x, generator)
    passed = _pass(steps, x.to(next(model.parameters()).device), generator)
    for position, step in enumerate(steps):
        if step.weighted or step.pooling:
            return _system_at(steps, passed, position)
        if not step.reshaping:
            break
    raise UnsupportedLayerError(
        f"The model begins with {type(steps[0].module).__name__}, which is not linear."
    )


def _system_at(steps: Sequence[Step], passed: _Passed, position: int) -> LayerSystem:
    """The first layer's system, with the rows masked that the steps above it hide."""
    walk = _Audited(steps, passed, torch.Generator(), position)
    above = position + 1
    while above < len(steps) and not (steps[above].weighted or steps[above].pooling):
        above += 1
    for place in range(above - 1, position, -1):
        step = steps[place]
        if step.reshaping:
            walk._reshape(step)
        elif _cannot_undo(step.module) is None:
            walk._undo(place)
        else:
            walk.known = None
    mask = None if walk.known is None else walk.known.to(torch.float64)
    step = steps[position]
    return LayerSystem(step.module, passed.gradients[position + 1], step.input_shape, mask)


def _first_in_graph(model: nn.Module, x: Tensor, generator: torch.Generator) -> LayerSystem:
    twin = copy.deepcopy(model).eval().requires_grad_(False).to(torch.float64)
    graph = _traced(twin)
    seen, gradients = _record(graph, x, generator)
    node, module = next(iter(islice(_graph_layers(graph, seen), 1)))
    shape = tuple(seen[node.all_input_nodes[0]].shape[1:])
    return LayerSystem(module, gradients[node], shape, _mask_above(node, seen))
