"""Sparse directions of a column space: what tells one sample of a batch from another.

A ReLU layer's gradient is ``G = kᵀ X``: a column of ``kᵀ`` for each sample, zero in the rows
where its sample's unit is off. ``G`` tells a basis ``U`` of these columns
(:func:`~gradinv_edu.batches.low_rank_factors`); its sparsest combinations ``U q`` are they.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .. import checks
from ..checks import checked
from ..errors import NotRecoveredError, UnknownNameError
from .low_rank import Factors
from .witness import NonzeroRows, products, unit

__all__ = ["Progress", "layered_directions", "null_vectors", "sparse_basis", "sparse_directions"]

Progress = Callable[[int, int, int], None]

UNITS = {"descent": "starts", "sampling": "draws"}
ROUNDS = {"descent": 256, "sampling": 4096}
BUDGETS = {"descent": 2**14, "sampling": 2**20}
STEPS, TURNS = 40, 60  # of a start, along one plane and between two
FITTED = 0.9  # of the rows that a sample's direction must explain; mixtures explain a quarter
QUIET = 2  # rounds that find nothing sparser, after which the search ends


@checked
def null_vectors(
    left: Float[Tensor, "m N"], draws: int, generator: torch.Generator | None = None
) -> Tensor:
    r""":math:`U_Z\,q = 0` for N − 1 rows Z: SPEAR's draw.

    If one sample is off in all rows of Z, then ``q`` is its direction: the only one that
    vanishes there. Implements :eq:`null-vector`.

    Parameters
    ----------
    left : Tensor
        ``U``, ``(m, N)``, without zero rows.
    draws : int
        How many sets of rows.
    generator : torch.Generator, optional
        Source of the rows; ``None``: a fixed seed.

    Returns
    -------
    Tensor
        ``(draws, N)``, of length one.

    Notes
    -----
    Source: Dimitrov et al. (2024).
    """
    checks.whole(draws, "draws")
    m, N = left.shape
    rows = _uniform((draws, N - 1), generator, left)
    sets = left[(rows * m).long().clamp_max(m - 1)]
    last = _uniform((draws, 1, N), generator, left) - 0.5
    wanted = torch.zeros(draws, N, 1).to(left)
    wanted[:, -1] = 1
    q, _ = torch.linalg.solve_ex(torch.cat([sets, last], dim=1), wanted)  # a row twice: no answer
    return unit(q[:, :, 0])


def sparse_directions(
    left: Tensor,
    starts: int,
    generator: torch.Generator | None = None,
    known: Tensor | None = None,
    vary: bool = False,
) -> Tensor:
    r""":math:`\min_q \sum_j w_j\,|u_j \cdot q|` over :math:`\lVert q \rVert = 1`, from many starts.

    Of all vectors of one length in the column space, sparse ones have the smallest sum of
    absolute values, at least among their neighbours. The weights ``w_j`` give every row one
    length, in coordinates in which no direction is preferred. Each start goes down by reweighted
    least squares: divide each row by its present ``|u_j · q|``, and take one step of inverse
    iteration. Implements :eq:`sparse-direction`.

    Parameters
    ----------
    left : Tensor
        ``U``, ``(m, N)``, without zero rows.
    starts : int
        How many.
    generator : torch.Generator, optional
        Source of the starts; ``None``: a fixed seed.
    known : Tensor, optional
        Directions ``(r, N)`` with r < N not to be found again.
    vary : bool
        Give each start its own random part of the rows, its own preference for short rows, and
        every other one the sum of square roots to go down on: other paths, for directions that
        the plain ones miss.

    Returns
    -------
    Tensor
        ``(starts, N)``, of length one; what is sparse among them is for the caller to see.

    Notes
    -----
    The objective is dictionary learning's; weights, steps and variation are this project's.
    """
    m, N = left.shape
    sizes = left.norm(dim=1)
    frame = torch.linalg.inv(torch.linalg.qr(left / sizes[:, None]).R)
    even = left @ frame
    even = even / even.norm(dim=1, keepdim=True)
    away = torch.eye(N).to(left)
    if known is not None and len(known):
        span = torch.linalg.qr(torch.linalg.inv(frame) @ known.T).Q
        away = away - span @ span.T
    weights, power = torch.ones(starts, m).to(left), torch.full((starts, 1), -0.5).to(left)
    if vary:
        power[::2] = -0.75
        share = 0.4 + 0.6 * _uniform((starts, 1), generator, left)
        weights = (_uniform((starts, m), generator, left) < share).to(left)
        tilt = 2 * _uniform((starts, 1), generator, left)
        weights = weights * (sizes / left.norm() * m**0.5).clamp_min(1e-3) ** -tilt
    outer = products(even)
    q = unit(_drawn(torch.randn, (starts, N), generator, left) @ away)
    for step in range(STEPS):
        width = max(1e-9, 0.6**step) / N**0.5
        size = (q @ even.T).square() + width**2
        gram = ((weights * size**power) @ outer).unflatten(1, (N, N))
        gram = gram / gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        q, _ = torch.linalg.solve_ex(gram, (q @ away)[:, :, None])
        q = unit(q[:, :, 0])
    return unit(q @ frame.T)


def layered_directions(
    left: Tensor,
    above: Tensor,
    starts: int,
    generator: torch.Generator | None = None,
    eps: float = 2.2e-16,
) -> Tensor:
    r""":math:`u_j \cdot q \in \{0,\; v_j \cdot d\}` for each row j: off, or told from above.

    Where unit j is on for a sample, its ``k`` is ``v_j · d``: its weights into the layer above,
    times the sample's gradient there. So every row of ``(U, V)`` lies on one of two planes, and
    each start alternates between the nearer one and reweighted least squares. No mixture explains
    all rows, however many samples there are for each output.

    Parameters
    ----------
    left, above : Tensor
        ``U``, ``(m, N)``, without zero rows, and ``V``, ``(m, outputs)``, of the same rows.
    starts : int
        How many.
    generator : torch.Generator, optional
        Source of the starts; ``None``: a fixed seed.
    eps : float
        Machine precision of the gradient.

    Returns
    -------
    Tensor
        Those ``(…, N)``, of length one, that explain all rows but a few.

    Notes
    -----
    The planes are subspace clustering's (k-planes: Bradley and Mangasarian, 2000); that a ReLU
    between two known layers makes them two, this project's.
    """
    N = left.shape[1]
    U, size, _ = torch.linalg.svd(above.to(left), full_matrices=False)
    V = U[:, size > 1e-9 * float(size[0])] * left.norm() / N**0.5
    off = torch.cat([left, torch.zeros_like(V)], dim=1)
    planes = torch.stack([off, torch.cat([left, -V], dim=1)])
    frame = torch.linalg.inv(torch.linalg.qr(planes.flatten(0, 1)).R)
    planes = planes @ frame
    planes = planes / planes.norm(dim=2, keepdim=True)
    outer = torch.cat([products(plane) for plane in planes])
    q = unit(_drawn(torch.randn, (starts, len(frame)), generator, left))
    for step in range(TURNS):
        gap = torch.einsum("sn,pjn->psj", q, planes).square()
        width = max(1e-9, 0.7**step) ** 2 / len(frame)
        near = gap.argmin(dim=0) == torch.arange(2, device=gap.device)[:, None, None]
        weights = near * (gap + width).rsqrt()
        gram = (torch.cat([*weights], dim=1) @ outer).reshape(starts, len(frame), -1)
        gram = gram / gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        gram.diagonal(dim1=1, dim2=2).add_(1e-13)
        q = unit(torch.linalg.solve_ex(gram, q[:, :, None])[0][:, :, 0])
    gap = torch.einsum("sn,pjn->psj", q, planes).abs().amin(dim=0)
    fits = (gap < max(1e-7, 1e3 * eps)).double().mean(dim=1) > FITTED
    found = unit(q @ frame.T)[fits, :N]
    return unit(found[found.norm(dim=1) > 1e-3])  # all on d explains nothing


def sparse_basis(
    factors: Factors,
    *,
    method: str = "descent",
    above: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | bool = False,
    budget: int | None = None,
    accept: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    r""":math:`\operatorname{rank} U_{Z \setminus j} = N - 1,\ Z = \{i : u_i \cdot q = 0\}`.

    Which candidates are samples? In general position a vector of the column space that mixes s
    samples is zero where all of them are off, which leaves s dimensions open, and where s − 1
    single rows happen to cancel: it hangs on each of those. A single sample's direction is
    witnessed instead: leave out any one row j of its zeros Z, and the others still fix it.
    Witnessed candidates are taken sparsest first, each independent of those before, until they
    are N. Implements :eq:`witness`.

    Parameters
    ----------
    factors : Factors
        Of the gradient.
    method : {"descent", "sampling"}
        Where candidates come from: :func:`sparse_directions` or :func:`null_vectors`.
    above : Tensor, optional
        Weight of the dense layer above the ReLU, ``(outputs, m)``: candidates come from
        ``layered_directions``, and need no witness.
    generator : torch.Generator, optional
        ``None``: a fixed seed.
    progress : bool or callable
        Called with what was spent, the directions found and those wanted; ``True`` prints them.
    budget : int, optional
        Starts (draws) at most; by default 16 384 (1 048 576).
    accept : callable, optional
        Whether a basis is right, for who can tell; the search goes on until it is. Without it, a
        basis is returned once further rounds find nothing sparser.

    Returns
    -------
    Tensor
        ``(N, N)``, a direction in each column.

    Raises
    ------
    UnknownNameError, InvalidArgumentError
        If there is no such method, or the budget is not a positive whole number.
    NotRecoveredError
        If fewer than N directions were found, or the N found are not the only ones possible; the
        message says how far it got.

    Notes
    -----
    Source: Dimitrov et al. (2024) for draws and greedy choice, where candidates are kept by a
    threshold on their zeros; the witness is this project's.
    """
    if method not in UNITS:
        raise UnknownNameError(f"No method {method!r}; there are {', '.join(UNITS)}.")
    budget = BUDGETS[method] if budget is None else checks.whole(budget, "budget")
    rows, N = NonzeroRows(factors), factors.left.shape[1]
    if N == 1:
        return torch.ones(1, 1).to(factors.left)
    generator = generator or torch.Generator().manual_seed(0)
    found, spent, quiet, turn = factors.left.new_zeros(0, N), 0, 0, 0
    while spent < budget:
        count, turn = min(ROUNDS[method], budget - spent), turn + 1
        spent += count
        if above is not None:
            V = above.T[factors.living]
            candidates = layered_directions(rows.left, V, count, generator, factors.eps)
        elif method == "sampling":
            candidates = null_vectors(rows.left, count, generator)
        else:  # part of what was found: all of it would shut out what a false one stands for
            kept = _uniform((len(found),), generator, found) < (0, 1, 0.5)[turn % 3]
            known = found[kept][: N - 1]
            candidates = sparse_directions(rows.left, count, generator, known, turn > 1)
        new = rows.witnessed(candidates) if above is None else candidates
        before, found = found, rows.sparsest(found, new)
        quiet = quiet + 1 if torch.equal(before, found) else 0
        if callable(progress):
            progress(spent, len(found), N)
        elif progress:
            print(f"{spent} {UNITS[method]}: {len(found)} of {N} found", file=sys.stderr)
        if len(found) == N and (quiet >= QUIET if accept is None else quiet == 0):
            doubt = rows.ambiguity(found) if accept is None and above is None else ""
            if doubt:
                raise NotRecoveredError(
                    f"Found {N} of {N} sparse directions in {spent} {UNITS[method]}, but {doubt}"
                )
            basis = rows.refined(found).T
            if accept is None or accept(basis):
                return basis
    if len(found) == N:
        advice = (
            "They were not confirmed within the budget, by the forward pass where the weights are "
            "given, else by further rounds: a larger budget, or fewer outputs above than samples?"
        )
    elif len(found):
        advice = (
            "A larger budget or a layer with more rows may give the others, unless samples are "
            "multiples of each other or on in every row."
        )
    else:
        advice = (
            "No direction has more zeros than chance: no ReLU follows the layer, the batch is too "
            "large for its rows, or there is noise."
        )
    raise NotRecoveredError(
        f"Found {len(found)} of {N} sparse directions in {spent} {UNITS[method]}. {advice}"
    )


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    return _drawn(torch.rand, shape, generator, like)


def _drawn(
    draw: Callable[..., Tensor],
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    like: Tensor,
) -> Tensor:
    g = generator or torch.Generator().manual_seed(0)
    return draw(shape, generator=g, device=g.device, dtype=torch.float64).to(like)
