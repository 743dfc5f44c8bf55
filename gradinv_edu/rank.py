"""Rank: which layers, and which networks, give their input away, told before any data is sent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checks import checked
from .engine import patches
from .engine.auditing import Auditing
from .engine.jacobian import WholeGradient, forked_randomness, numerical_rank
from .engine.layers.convolution import Conv, places
from .engine.leak import leak_map, noise_floor, system_leak_map
from .engine.progress import bar, end_of, until
from .engine.sample import Shape, begin, sample, seeded
from .engine.verdicts import LayerAudit, Stop, Verdict, conclusion
from .errors import UnsupportedLayerError
from .kit import report

__all__ = [
    "Audit",
    "LayerAudit",
    "NetworkRank",
    "RankLaw",
    "Stop",
    "Verdict",
    "audit",
    "jacobian_rank",
    "leak_map",
    "noise_floor",
    "rank_law",
    "system_leak_map",
]

AUTOMATIC = 512  # unknowns up to which `audit` computes the whole network's rank unasked
ENTRIES = 3e7  # of its Jacobian, likewise


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
        together with others, with nothing hidden.
    begins : str or None
        Layer at which the recursion begins.
    network : NetworkRank or None
        Rank of the whole network's Jacobian, where it was wanted or is cheap.
    notes : tuple of str
        What the verdicts assume.
    untested : tuple of str
        Layers whose tests the given time or the budget did not allow, where these may change the
        verdict.
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
    untested: tuple[str, ...] = ()

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
        return sum(
            round(layer.rank_index * (last - place) / last)
            for place, layer in enumerate(self.layers[:-1])
        )

    @property
    def verdict(self) -> Verdict:
        """One of five words; :attr:`reason` says why."""
        return self._conclusion[0]

    @property
    def reason(self) -> str:
        """One sentence: the verdict, the count or the layer behind it, and what remains."""
        return self._conclusion[1]

    @property
    def _conclusion(self) -> tuple[Verdict, str]:
        return conclusion(self.layers, self.stops, self.untested)

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, strings and lists, for ``json.dumps``."""
        return report.audit_dict(self)

    def __str__(self) -> str:
        return report.audit_text(self)

    def _repr_html_(self) -> str:
        return report.audit_html(self)


@checked
def audit(
    model: nn.Module,
    input_shape: Shape,
    *,
    inputs: Tensor | None = None,
    jacobian: bool | None = None,
    generator: torch.Generator | None = None,
    progress: bool | Callable[[Audit], None] = False,
    seconds: float | None = None,
    walk: type[Auditing] = Auditing,
) -> Audit:
    r""":math:`\operatorname{rank}[W_l; K_l] \stackrel{?}{=} n_l` for every layer ``l``.

    Which layers, and so which networks, give their input away: told from the architecture and
    its weights, before any data is sent, by the walk that a recovery takes. A random input and
    random output gradients stand for the sample; ranks are the same for almost all of them, except
    that a ReLU masks the rows of the units that are dead for the sample at hand. Equations are
    counted first, in all layers; what takes time comes after that, from the input up.
    Implements :eq:`audit-verdict`.

    Parameters
    ----------
    model : nn.Module
        Any that ``torch.fx`` can trace. Where it holds layers that cannot be undone, the report
        says where and why, and counts the layers below as if they had been. Below max pooling
        they are counted as if the places of the maxima were found.
    input_shape : tuple of int
        Of one sample, such as ``(3, 32, 32)``.
    inputs : Tensor, optional
        ``(1, *input_shape)``: audit at this sample instead of a random one, for networks that
        mask rows.
    jacobian : bool, optional
        Whether to compute the rank of the whole network's Jacobian
        (:func:`jacobian_rank`); by default for up to 512 unknowns.
    generator : torch.Generator, optional
        Of the random input and gradients; a fixed one by default.
    progress : bool or callable
        Show a bar; or what to call with the audit so far, first when all is counted, then after
        each test.
    seconds : float, optional
        Time after which no test is begun or gone on with: the audit then says what it knows, and
        names in ``untested`` what it did not get to. By default each test has a budget of
        operations, so that verdicts do not depend on the machine.
    walk : type
        As for :func:`gradinv_edu.recursion.recover`.

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
    Rank analysis: Zhu and Blaschko (2021). Their published code prints rank and columns of a
    system that has the padding's pixels too; the difference is ``rank_index``, ``rank −
    unknowns``. (The formula of their index RA-i could not be read.) Chen and Campbell (2022)
    print it as well, and weigh it into one number (:attr:`Audit.weighted_index`).
    """
    end = end_of(seconds)
    shape, generator = tuple(input_shape), seeded(generator)
    network = None
    embedding = patches.find(model, shape)
    if embedding is not None:
        return _by_positions(embedding, model)
    with forked_randomness():
        x = sample(shape, inputs, generator)
        way, begins, notes = begin(model, x, generator, walk)

        def so_far() -> Audit:
            masked = ["masked rows: those of units that are dead for the sample at hand"]
            layers, stops = tuple(reversed(way.layers)), tuple(reversed(way.stops))
            needed = [layer for layer in layers if layer.needed and not layer.block]
            plain = all(layer.known and not layer.hidden for layer in needed)
            return Audit(
                model=type(model).__name__,
                input_shape=shape,
                parameters=sum(p.numel() for p in model.parameters()),
                layers=layers,
                stops=stops,
                exact=plain and not stops,
                begins=begins,
                network=network,
                notes=(*(masked if way.masked else []), *notes),
                untested=way.untested,
            )

        with bar("audit", progress is True) as moving:
            way.progress = moving
            way.run(end, (lambda: progress(so_far())) if callable(progress) else None)
        if not way.layers:
            raise UnsupportedLayerError(
                "The model has no dense or convolutional layer: no parameter's gradient holds the "
                "input."
            )
        cheap = sum(p.numel() for p in model.parameters()) * x.numel() <= ENTRIES
        if jacobian or (jacobian is None and cheap and x.numel() <= AUTOMATIC):
            network = _network(model, shape, x, generator, wanted=bool(jacobian), end=end)
        return so_far()


def _by_positions(embedding: patches.PatchEmbedding, model: nn.Module) -> Audit:
    """A vision transformer: its position embedding's gradient is every token's own."""
    determined, stops = embedding.rank == embedding.unknowns, list[Stop]()
    head = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1:]
    for name, last in head:
        if not bool(last.weight.any()):
            why = "its weights are zero: until a step has moved them, no gradient passes it"
            stops.append(Stop(name, type(last).__name__, why))
    equations = (embedding.width - 1) * (embedding.unknowns // embedding.tokens)
    layer = LayerAudit(
        embedding.name, "patches", embedding.unknowns, 0, equations, embedding.rank, "law",
        determined,
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    return Audit(
        type(model).__name__, embedding.input_shape, parameters, (layer,), tuple(stops),
        determined and not stops, embedding.name, None, (),
    )  # fmt: skip


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


@checked
def rank_law(conv: nn.Module, input_shape: Shape) -> RankLaw:
    r""":math:`\mathrm{rank}[W; K] = \min(n,\; |W| + \mathrm{rank}\,K - C'^2)`.

    The rank of a convolution's two sets of equations without a matrix, by counting. ``|W|`` is
    the number of weight equations. ``rank K`` is counted for each channel and each class of
    pixels that the stride keeps apart: the class's rows or its pixels, whichever is less.
    ``C'²`` equations, one for each pair of filters, are in both sets (with groups, per group;
    ``C'·P`` where there are fewer positions ``P`` than filters ``C'``). Implements :eq:`rank-law`.

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
    index, n = places(conv, input_shape)
    groups, filters = conv.groups, conv.out_channels // conv.groups
    offset, position = torch.nonzero(index, as_tuple=True)
    pixel = index[offset, position] - 1
    visible, seen = (len(torch.unique(part)) for part in (position, pixel))
    K = conv.in_channels * sum(min(filters * o, p) for o, p in _classes(offset, pixel, n))
    rows, shared = conv.out_channels * visible, groups * filters * min(filters, visible)
    return RankLaw(
        unknowns=conv.in_channels * n,
        seen=conv.in_channels * seen,
        weight_equations=rows,
        gradient_equations=conv.out_channels * (conv.in_channels // groups) * len(index),
        gradient_rank=K,
        shared=shared,
        rank=min(conv.in_channels * seen, rows + K - shared),
    )


def _classes(row: Tensor, pixel: Tensor, n: int) -> list[tuple[int, int]]:
    """``(rows, pixels)`` of each set of pixels that no row links to the others."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    size = n + int(row.max()) + 1
    ones = torch.ones(len(row)).numpy()
    links = coo_matrix((ones, (pixel.numpy(), n + row.numpy())), shape=(size, size))
    label = torch.from_numpy(connected_components(links, directed=False)[1])
    rows = Counter(label[n + torch.unique(row)].tolist())
    pixels = Counter(label[torch.unique(pixel)].tolist())
    return [(rows[c], pixels[c]) for c in rows]


# --- the whole network ------------------------------------------------------------------------


@checked
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
    shape, generator = tuple(input_shape), seeded(generator)
    with forked_randomness(), bar("jacobian", progress) as moving:
        x = sample(shape, inputs, generator)
        problem = WholeGradient(model, x, loss, targets, generator)
        try:
            rows = problem.rows(moving)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedLayerError(
                f"The gradient cannot be differentiated once more: {error}."
            ) from error
    rank = numerical_rank(rows)
    condition = None
    if problem.written and rank == x.numel():
        values = torch.linalg.svdvals(rows)
        condition = float(values[0] / values[rank - 1])
    return NetworkRank(x.numel(), problem.parameters, rank, condition)


def _network(
    model: nn.Module,
    shape: Shape,
    x: Tensor,
    generator: torch.Generator,
    *,
    wanted: bool,
    end: float | None,
) -> NetworkRank | None:
    try:
        with until(end):
            return jacobian_rank(model, shape, inputs=x, generator=generator)
    except UnsupportedLayerError:  # an operation without second derivatives
        if wanted:
            raise
    return None
