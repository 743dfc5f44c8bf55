"""A dense layer's gradient, and all that it says of one sample, or of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor, nn

from . import checks, sparse
from .errors import (
    InconsistentGradientError,
    InvalidArgumentError,
    InvalidTensorError,
    UndeterminedScaleError,
    UnknownNameError,
    UnsupportedLossError,
)

POWER_STEPS = 30
SETTLED = 2e-15  # change of a singular vector of length one: rounding alone
CHUNK = 2**20  # entries that are worked on at a time
EXTREME = 1e-200  # squares of entries are left room over the smallest number


@dataclass(frozen=True)
class RankOne:
    """Best rank-one fit ``value · left rightᵀ``; ``residual`` is what it leaves, relative."""

    left: Tensor
    value: float
    right: Tensor
    residual: float


@dataclass(frozen=True)
class Output:
    """The last layer undone: ``k = ∂L/∂z``, its input ``x``, and the label.

    Attributes
    ----------
    k : Tensor
        ``(m,)``.
    x : Tensor
        ``(n,)``.
    target : Tensor
        Class index ``()`` for cross-entropy, else ``(m,)``.
    residual : float
        How far the equations used contradict each other, relative.
    """

    k: Tensor
    x: Tensor
    target: Tensor
    residual: float


def rank_one(weight_gradient: Tensor, bias_gradient: Tensor | None = None) -> RankOne:
    r""":math:`G = \sigma_1 u v^\top + \dots`: one sample's weight gradient ``k xᵀ`` has rank one.

    Gives the direction of ``x`` (and of ``k``), not its scale or sign. Implements
    :eq:`rank-one-gradient`.

    Parameters
    ----------
    weight_gradient : Tensor
        ``(m, n)``, floating point.
    bias_gradient : Tensor, optional
        ``(m,)``; beside the other as one more column.

    Returns
    -------
    RankOne

    Raises
    ------
    InvalidTensorError
        If one is not finite floating point, or has the wrong shape.
    VanishingGradientError
        If the weight's is zero everywhere.
    """
    G = checks.not_all_zero(
        checks.shaped(weight_gradient, "weight_gradient", (None, None)), "weight_gradient"
    )
    blocks = [G]
    if bias_gradient is not None:
        blocks.append(checks.shaped(bias_gradient, "bias_gradient", (len(G),))[:, None])
    u, value, v = _leading_triple(*blocks)
    parts = torch.split(value * v, [block.shape[1] for block in blocks])
    rest = math.hypot(*(_rest(block, u, part) for block, part in zip(blocks, parts, strict=True)))
    return RankOne(u, value, v, rest / math.hypot(*(float(block.norm()) for block in blocks)))


def _rest(G: Tensor, u: Tensor, v: Tensor) -> float:
    """``‖G − u vᵀ‖``, some rows at a time: to allocate such a matrix again costs more than sums."""
    rows = max(1, CHUNK // G.shape[1])
    parts = zip(torch.split(G, rows), torch.split(u, rows), strict=True)
    return math.hypot(*(float(torch.addr(g, part, v, alpha=-1).norm()) for g, part in parts))


def _leading_triple(*blocks: Tensor) -> tuple[Tensor, float, Tensor]:
    """Of the blocks side by side; power iteration settles at once where the rank is nearly one.

    Elsewhere the SVD decides.
    """
    size = max(abs(float(end)) for block in blocks for end in torch.aminmax(block))
    scale = 1.0 if EXTREME < size * size < 1 / EXTREME else size
    G = blocks if scale == 1.0 else [block / scale for block in blocks]  # squares would vanish
    row = int(torch.stack([block.norm(dim=1) for block in G]).norm(dim=0).argmax())
    v = [block[row] for block in G]
    right = torch.cat(v)
    right = right / right.norm()
    for _ in range(POWER_STEPS):
        u = reduce(torch.add, (block @ part for block, part in zip(G, v, strict=True)))
        u = u / u.norm()
        v, before = [u @ block for block in G], right
        right = torch.cat(v)
        value, right = scale * float(right.norm()), right / right.norm()
        if float((right - before).norm()) < SETTLED:
            return u, value, right
    U, S, Vh = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    return U[:, 0], float(S[0]), Vh[0]


def _svd(G: Tensor, b: Tensor) -> Tensor:
    u, _, _ = _leading_triple(G, b[:, None])
    return (G.T @ u) / (b @ u)  # v[:n] / v[n], each relative to its own size


def _best_row(G: Tensor, b: Tensor) -> Tensor:
    row = int(b.abs().argmax())
    return G[row] / b[row]


def _mean(G: Tensor, b: Tensor) -> Tensor:
    alive = b != 0
    return (G[alive] / b[alive, None]).mean(dim=0)


def _least_squares(G: Tensor, b: Tensor) -> Tensor:
    return G.T @ b / b.square().sum()


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "svd": _svd,
    "best_row": _best_row,
    "mean": _mean,
    "least_squares": _least_squares,
}


def recover_input(weight_gradient: Tensor, bias_gradient: Tensor, method: str = "svd") -> Tensor:
    r""":math:`x = v_{1:n} / v_{n+1}`, with :math:`[\,G \mid k\,] \approx \sigma_1 u v^\top`.

    Every row of a dense layer's gradient is one perceptron's and says the same ``x``; under
    noise in both parts the maximum-likelihood answer is total least squares, the leading right
    singular vector. Implements :eq:`rank-one-svd`; ``"least_squares"`` is
    :eq:`least-squares-row`.

    Parameters
    ----------
    weight_gradient : Tensor
        ``∂L/∂W``, ``(m, n)``.
    bias_gradient : Tensor
        ``∂L/∂b = k``, ``(m,)``.
    method : {"svd", "best_row", "mean", "least_squares"}
        The last three for comparison: the row of the largest bias gradient, the plain mean of
        all rows' ratios (as R-GAP and others take it), and ``Gᵀk / |k|²``.

    Returns
    -------
    Tensor
        ``(n,)``, float64.

    Raises
    ------
    InvalidTensorError
        If shapes do not belong together, or a tensor is not finite floating point.
    VanishingGradientError
        If the bias gradient is zero everywhere.
    UnknownNameError
        If there is no such method.

    Notes
    -----
    Source: Phong et al. (2018) for the ratio; total least squares is this project's choice.
    """
    if method not in METHODS:
        raise UnknownNameError(f"No method {method!r}; there are {', '.join(METHODS)}.")
    return METHODS[method](*_pair(weight_gradient, bias_gradient))


def _pair(weight_gradient: Tensor, bias_gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    G = checks.shaped(weight_gradient, "weight_gradient", (None, None))
    if bias_gradient is None:
        raise UndeterminedScaleError(
            "bias_gradient is missing: without it the weight gradient gives every sample's "
            "direction at most, not its length."
        )
    b = checks.shaped(bias_gradient, "bias_gradient", (None,)).to(G.device)
    if len(b) != len(G):
        raise InvalidTensorError(
            f"weight_gradient has {len(G)} rows and bias_gradient {len(b)} entries: they do not "
            "belong to the same layer."
        )
    return G, checks.not_all_zero(b, "bias_gradient")


# --- a batch --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Isolated:
    """A sample that several rows name alike: ``x``, ``(n,)``, and those ``rows``."""

    x: Tensor
    rows: Tensor


def isolated_samples(
    weight_gradient: Tensor, bias_gradient: Tensor, tolerance: float | None = None
) -> list[Isolated]:
    r""":math:`G_i / b_i = G_j / b_j \Rightarrow` one sample alone excites rows i and j: it is this.

    A row's ratio is a mixture of the samples that excite it, in shares that differ from row to
    row; two rows agree only where there was nothing to mix. No truth is needed to see that.
    Under a network with a single output (or two classes) the shares depend on nothing but which
    samples excite a row, so that mixtures agree too; that is refused where it shows. Implements
    :eq:`lonely-rows`.

    Parameters
    ----------
    weight_gradient, bias_gradient : Tensor
        ``(m, n)`` and ``(m,)``, of a batch of any size.
    tolerance : float, optional
        Greatest relative difference of ratios that count as equal; by default, what rounding of
        the client's type explains.

    Returns
    -------
    list of Isolated
        The sample of most rows first; each from the row of its largest bias gradient.

    Raises
    ------
    InvalidTensorError, VanishingGradientError, UndeterminedScaleError
        As :func:`recover_batch`.
    InvalidArgumentError
        If the tolerance is negative or NaN.
    InconsistentGradientError
        If there are more groups of equal rows than the gradient's rank has room for: some are
        mixtures.
    """
    G, b = _pair(weight_gradient, bias_gradient)
    if tolerance is not None and not tolerance >= 0:
        raise InvalidArgumentError(f"tolerance is zero or more; got {tolerance!r}.")
    eps = sparse.rounding(G)
    groups = _groups(G, b, 1e3 * eps if tolerance is None else tolerance)
    found = [Isolated(G[r[0]] / b[r[0]], r) for r in groups]
    if found:
        _check_independent(torch.stack([f.x for f in found]))
    return sorted(found, key=lambda f: -len(f.rows))


def _groups(G: Tensor, b: Tensor, tolerance: float) -> list[Tensor]:
    """Rows of equal ratio, two or more; in each group the largest bias gradient first."""
    rows = b.abs().argsort(descending=True)
    rows = rows[b[rows] != 0]
    ratios = G[rows] / b[rows, None]
    size = ratios.norm(dim=1)
    groups, free = [], torch.ones(len(rows), dtype=torch.bool, device=G.device)
    for place in range(len(rows)):
        near = (ratios - ratios[place]).norm(dim=1) <= tolerance * size[place]
        near &= free
        if bool(free[place]) and int(near.sum()) > 1:
            groups.append(rows[near])
        free &= ~near
    return groups


def _check_independent(x: Tensor) -> None:
    whole = torch.cat([x, x.norm(dim=1).mean().expand(len(x), 1)], dim=1)
    S = torch.linalg.svdvals(whole)
    if len(x) > whole.shape[1] or float(S[-1]) < 1e-6 * float(S[0]):
        raise InconsistentGradientError(
            f"{len(x)} groups of rows have equal ratios, but these are mixtures of one another: "
            "rows are mixed in equal shares, as under a network with a single output, and "
            "equality proves nothing there."
        )


def expected_isolated(rows: int, batch_size: int, active: float) -> float:
    r""":math:`m\,N\,q\,(1 - q)^{N-1}`: rows that one sample alone excites.

    In a layer of m rows, each excited by each of N samples with probability q, independently.
    Largest at q = 1/N, where it is nearly m/e. Implements :eq:`isolated-count`.

    Parameters
    ----------
    rows, batch_size : int
        m and N.
    active : float
        q, in [0, 1].

    Returns
    -------
    float

    Raises
    ------
    InvalidArgumentError
        If m or N is not a positive whole number, or q no probability.

    Examples
    --------
    >>> expected_isolated(1000, 4, 0.5)
    250.0
    """
    _positive(rows, "rows")
    _positive(batch_size, "batch_size")
    if not isinstance(active, int | float) or not 0 <= active <= 1:
        raise InvalidArgumentError(f"active is a probability, from 0 to 1; got {active!r}.")
    return rows * batch_size * active * (1 - active) ** (batch_size - 1)


def _positive(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgumentError(f"{name} must be a whole number, one or more; got {value!r}.")
    return value


def count_labels(
    bias_gradient: Tensor, batch_size: int, probabilities: Tensor | None = None
) -> Tensor:
    r""":math:`\text{count}_c = \sum_n p_{nc} - N\,\partial L/\partial b_c`: labels of a batch.

    For softmax cross-entropy averaged over the batch; ``b`` is the last layer's bias. Exact
    where the predictions of the samples themselves are known; otherwise an estimate, which
    supposes that they are on average as given. Implements :eq:`label-counts`.

    Parameters
    ----------
    bias_gradient : Tensor
        ``(C,)``.
    batch_size : int
        N.
    probabilities : Tensor, optional
        ``(N, C)``: the predictions of the samples, once they are recovered. ``(C,)``: a mean
        prediction, for instance over samples like them. ``None``: 1/C each, as an untrained
        network predicts, nearly.

    Returns
    -------
    Tensor
        ``(C,)``, int64, adds up to N.

    Raises
    ------
    InvalidTensorError
        If a shape is wrong, a tensor is not finite floating point, or probabilities are negative.
    InvalidArgumentError
        If the batch size is not a positive whole number.
    InconsistentGradientError
        If exact predictions do not give whole numbers: they belong to other samples, or the
        batch size or the loss is another.

    Examples
    --------
    >>> count_labels(torch.tensor([-0.25, 0.25, 0.0]), 4, torch.tensor([0.25, 0.25, 0.5]))
    tensor([2, 0, 2])
    """
    b = checks.shaped(bias_gradient, "bias_gradient", (None,))
    _positive(batch_size, "batch_size")
    exact = isinstance(probabilities, Tensor) and probabilities.dim() == 2
    counts = _predicted(probabilities, batch_size, b) - batch_size * b
    rounded = _apportioned(counts.clamp_min(0), batch_size)
    if exact and float((counts - rounded).abs().max()) > 0.1:
        raise InconsistentGradientError(
            f"With these predictions the counts are {[round(c, 2) for c in counts.tolist()]}, not "
            "whole numbers: they are of other samples, or the batch size or the loss is another."
        )
    return rounded


def _predicted(probabilities: Tensor | None, batch_size: int, b: Tensor) -> Tensor:
    """``Σ_n p_n``, ``(C,)``."""
    if probabilities is None:
        return torch.full_like(b, batch_size / len(b))
    p = checks.finite(probabilities, "probabilities").to(b.device)
    p = checks.shaped(p, "probabilities", (batch_size, len(b)) if p.dim() == 2 else (len(b),))
    if bool((p < 0).any()) or not bool(p.sum(dim=-1).all()):
        raise InvalidTensorError(
            "probabilities are negative, or zero for every class: give the softmax of the logits."
        )
    return p.sum(dim=0) if p.dim() == 2 else batch_size * p / p.sum()


def _apportioned(counts: Tensor, total: int) -> Tensor:
    """Whole numbers near ``counts`` that add up to ``total``: the largest remainders go up."""
    counts = counts if bool(counts.any()) else torch.ones_like(counts)
    scaled = counts / counts.sum() * total
    whole = scaled.floor().long()
    short = total - int(whole.sum())
    whole[(scaled - whole).argsort(descending=True, stable=True)[:short]] += 1
    return whole


def recover_batch(
    weight_gradient: Tensor,
    bias_gradient: Tensor,
    batch_size: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    method: str = "descent",
    generator: torch.Generator | None = None,
    progress: sparse.Progress | bool = False,
    budget: int | None = None,
) -> Tensor:
    r""":math:`x_n = (K^+ G)_n / (K^+ b)_n`: every sample of a batch, from the sparse ``K``.

    ``[G | b] = K [X | 1]`` has rank N, and after a ReLU each column of ``K`` is zero in many
    rows, those in which its sample is off. :func:`gradinv_edu.sparse.sparse_basis` finds the
    columns up to their lengths, and the bias gradient ``b = ∂L/∂b`` gives those. For one
    averaged gradient, or the sum of several local steps in which each sample has rows where it
    stays off. Implements :eq:`batch-inputs`.

    Parameters
    ----------
    weight_gradient, bias_gradient : Tensor
        ``∂L/∂W`` and ``∂L/∂b`` of a dense layer before a ReLU, ``(m, n)`` and ``(m,)``.
    batch_size : int
        N, the number of different samples.
    weight, bias : Tensor, optional
        The layer's own ``(m, n)`` and ``(m,)`` when the gradient was taken. With them an answer
        is accepted only if it passes :func:`forward_agreement`, and the search ends as soon as
        it does; leave them out for several local steps, which switch units. Without them, and
        with more samples than outputs of the next layer, mixtures may be as sparse: an answer
        whose zeros are few, or avoid each other, is refused.
    method : {"descent", "sampling"}
        How sparse directions are looked for: by descent, or by SPEAR's draws, whose number grows
        as :math:`2^N`.
    generator : torch.Generator, optional
        Source of starts or draws; ``None``: a fixed seed.
    progress : bool or callable
        Called with starts or draws spent, samples found and samples wanted; ``True`` prints.
    budget : int, optional
        Starts or draws at most.

    Returns
    -------
    Tensor
        ``(batch_size, n)``, float64, in no particular order.

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        If shapes do not belong together, or a tensor is not finite floating point, or is zero.
    UndeterminedScaleError
        If ``bias_gradient`` is ``None``.
    InvalidArgumentError
        If the batch size is more than min(m, n + 1), the budget is no positive number, or
        ``bias`` is given without ``weight``.
    InconsistentGradientError
        If the gradient's rank is not the batch size.
    NotRecoveredError
        If the search ended without all samples, or what it found may be mixtures; the message
        says how far it got.

    Notes
    -----
    Source: Dimitrov et al. (2024), SPEAR, for split, draws, greedy choice and scale. Descent, the
    witness and the test for ambiguity are this project's.
    """
    G, b = _pair(weight_gradient, bias_gradient)
    if bias is not None and weight is None:
        raise InvalidArgumentError("bias is of no use without weight: give both, or neither.")
    eps = max(sparse.rounding(G), sparse.rounding(b))
    scale = G.norm() / b.norm()  # so that neither part drowns the other
    whole = torch.cat([G, (scale * b)[:, None]], dim=1)
    parts = sparse.split(whole, batch_size, eps)
    accept = None if weight is None else partial(_agrees, weight, bias, parts, whole, scale)
    basis = sparse.sparse_basis(
        parts,
        method=method,
        generator=generator,
        progress=progress,
        budget=budget,
        accept=accept,
    )
    return _inputs(parts, basis, whole, scale)


def _inputs(parts: sparse.Split, basis: sparse.Basis, whole: Tensor, scale: Tensor) -> Tensor:
    rows = torch.linalg.lstsq(parts.left @ basis.directions, whole).solution
    inputs: Tensor = rows[:, :-1] / rows[:, -1:] * scale
    return inputs


def _agrees(
    weight: Tensor,
    bias: Tensor | None,
    parts: sparse.Split,
    whole: Tensor,
    scale: Tensor,
    basis: sparse.Basis,
) -> bool:
    x = _inputs(parts, basis, whole, scale)
    return forward_agreement(weight, bias, whole[:, :-1], x) > 0.99


def forward_agreement(
    weight: Tensor, bias: Tensor | None, weight_gradient: Tensor, inputs: Tensor
) -> float:
    r""":math:`[k_{nj} \neq 0] = [w_j \cdot x_n + b_j > 0]`: in what share of rows this holds.

    The server has the weights, and the forward pass tells which units each recovered sample
    switches on; with ``K = G X⁺`` the gradient tells it again. For the samples themselves both
    agree in all rows that are not zero. Implements :eq:`forward-witness`.

    Parameters
    ----------
    weight, bias : Tensor
        Of the layer, ``(m, n)`` and ``(m,)`` or ``None``.
    weight_gradient : Tensor
        ``(m, n)``, one averaged gradient.
    inputs : Tensor
        Recovered samples, ``(N, n)``.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    InvalidTensorError
        If shapes do not belong together, or a tensor is not finite floating point.

    Notes
    -----
    Source: Dimitrov et al. (2024) choose their directions by this agreement.
    """
    W, G, b = _layer(weight, weight_gradient, bias)
    x = checks.shaped(inputs, "inputs", (None, W.shape[1])).to(W.device)
    K = torch.linalg.lstsq(x.T, G.T).solution.T
    living = (G != 0).any(dim=1)
    size = K.square().mean(dim=0).sqrt()
    on = K.abs() > max(1e-9, 100 * sparse.rounding(weight_gradient)) * size
    agree = on == (W @ x.T + b[:, None] > 0)
    return float(agree[living].double().mean())


# --- the loss fixes the scale ---------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """``G = c vᵀ``: each row's multiple of ``v``, and how precisely it is known."""

    c: Tensor
    v: Tensor
    precision: Tensor
    residual: float
    eps: float

    @property
    def trusted(self) -> Tensor:
        return self.precision < 0.2

    @property
    def tolerance(self) -> float:
        """A contradiction that rounding and noise may explain."""
        return min(0.5, max(1e3 * self.eps, 100 * self.residual))

    def mirrored(self) -> _Rows:
        return replace(self, c=-self.c, v=-self.v)


def _rows(G: Tensor) -> _Rows:
    fit, eps = rank_one(G), sparse.rounding(G)
    v = fit.right
    c = G @ v  # and not σ₁u, whose small entries carry the rounding of its large ones
    noise = (G - torch.outer(c, v)).norm(dim=1) / math.sqrt(max(len(v) - 1, 1))
    precision = torch.where(c == 0, math.inf, eps + noise / c.abs().clamp_min(1e-300))
    return _Rows(c, v, precision, fit.residual, eps)


def recover_from_cross_entropy(
    weight: Tensor, weight_gradient: Tensor, bias: Tensor | None = None
) -> list[Output]:
    r""":math:`s = \log(c_i / c_j) \,/\, (w_i - w_j)\cdot v` from rows i, j; then :math:`x = s\,v`.

    Without any bias gradient ``G = k xᵀ = c vᵀ`` leaves the scale ``s`` open; the softmax
    closes it, since ``k = softmax(W x + b) − e_y``: the one entry of its own sign is the label
    (:eq:`label-sign`), the logarithms of all others are the logits up to a constant. Two rows
    other than the label's are enough; all are used, each by its precision. Two classes leave
    one such row, up to two scales for each label, and no contradiction even for several samples.
    Implements :eq:`softmax-scale`.

    Parameters
    ----------
    weight : Tensor
        ``W``, ``(m, n)`` with m ≥ 2.
    weight_gradient : Tensor
        ``∂L/∂W``, ``(m, n)``.
    bias : Tensor, optional
        ``b``, ``(m,)``, where the layer has one but its gradient was withheld.

    Returns
    -------
    list of Output
        Best first; more than one where several scales satisfy every row.

    Raises
    ------
    InvalidTensorError
        If shapes do not match, or there is one class only.
    VanishingGradientError
        If the gradient is zero everywhere.
    InconsistentGradientError
        If no scale satisfies the rows: several samples, or another model's gradient.

    Notes
    -----
    Derived for this project; no published source is known to us.
    """
    W, G, b = _layer(weight, weight_gradient, bias)
    if len(W) < 2:
        raise InvalidTensorError("Cross-entropy needs two classes or more; weight has one row.")
    rows = _rows(G)
    found = [o for side in (rows, rows.mirrored()) for o in _softmax_outputs(W, b, side)]
    if not found:
        raise InconsistentGradientError(
            "No scale makes softmax(W x + b) − e_y agree with this weight gradient: it is the sum "
            "of several samples, or belongs to another layer, loss or model."
        )
    return _best(found, rows.eps)


def _layer(
    weight: Tensor, weight_gradient: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    W = checks.shaped(weight, "weight", (None, None))
    G = checks.shaped(weight_gradient, "weight_gradient", tuple(W.shape)).to(W.device)
    b = torch.zeros_like(W[:, 0]) if bias is None else checks.shaped(bias, "bias", (len(W),))
    return W, checks.not_all_zero(G, "weight_gradient"), b


def _best(found: list[Output], eps: float) -> list[Output]:
    keep = 1e3 * max(eps, min(o.residual for o in found))
    return sorted((o for o in found if o.residual <= keep), key=lambda o: o.residual)


def _softmax_outputs(W: Tensor, b: Tensor, rows: _Rows) -> list[Output]:
    """Outputs with ``c = s·(softmax(s W v + b) − e_y)`` for some label and scale ``s > 0``."""
    negative = (rows.c < 0) & rows.trusted
    if int(negative.sum()) > 1:
        return []
    Wv, others = W @ rows.v, (rows.c > 0) & rows.trusted
    if not bool(others.any()):
        return []
    label = int(rows.c.argmin()) if bool(negative.any()) else None
    found = []
    for start in _softmax_starts(Wv, b, rows.c, others, rows.precision, label):
        s = _polished(start, partial(_log_softmax, Wv, b), rows.c, others, rows.precision)
        y = _label(rows.c, s * Wv + b, rows.trusted)
        found.append(_softmax_output(Wv, b, rows, y, s))
    return [o for o in found if o.residual <= rows.tolerance]


def _label(k: Tensor, z: Tensor, trusted: Tensor | None = None) -> int:
    """Row of the negative entry; where ``p_y`` was rounded to 1, the likeliest row without one."""
    negative = k < 0 if trusted is None else (k < 0) & trusted
    if bool(negative.any()):
        return int(torch.where(negative, k, math.inf).argmin())
    open_rows = k <= 0 if trusted is None else (k <= 0) | ~trusted
    return int(torch.where(open_rows, z, -math.inf).argmax())


def _softmax_starts(
    Wv: Tensor, b: Tensor, c: Tensor, others: Tensor, precision: Tensor, y: int | None
) -> list[float]:
    if int(others.sum()) == 1 and len(c) == 2:
        other = int(others.nonzero()[0, 0])
        beta = float(b[1 - other] - b[other])
        return _logistic_scales(float(Wv[1 - other] - Wv[other]), beta, float(c[other]))
    if int(others.sum()) < 2:
        return []
    w = precision[others].pow(-2)
    left, right = Wv[others], c[others].log() - b[others]
    left, right = left - (w * left).sum() / w.sum(), right - (w * right).sum() / w.sum()
    below = float((w * left.square()).sum())
    s = float((w * left * right).sum()) / below if below > 0 else 0.0
    if abs(s) * math.sqrt(below) < 100:  # logits equal to the last digits: p is that of z = b
        p = torch.softmax(b, 0)
        return [float(c[others].sum() / p[others].sum())]
    return [s] if s > 0 else []


def _log_softmax(Wv: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """``log p`` at ``z = s W v + b``, and its slope in ``s``."""
    log_p = torch.log_softmax(s * Wv + b, 0)
    return log_p, Wv - (log_p.exp() * Wv).sum()


def _polished(
    s: float,
    log_k: Callable[[float], tuple[Tensor, Tensor]],
    c: Tensor,
    rows: Tensor,
    precision: Tensor,
) -> float:
    """Gauss–Newton on ``log s + log |k_j(s)| = log |c_j|``, kept only where it helps."""
    w, wanted = precision[rows].pow(-2), c[rows].abs().log()

    def gap(s: float) -> tuple[Tensor, Tensor]:
        value, slope = log_k(s)
        return math.log(s) + value[rows] - wanted, 1 / s + slope[rows]

    for _ in range(20):
        error, slope = gap(s)
        below = float((w * slope.square()).sum())
        new = s - float((w * slope * error).sum()) / below if below > 0 else s
        if not new > 0 or (w * gap(new)[0].square()).sum() >= (w * error.square()).sum():
            break
        s = new
    return s


def _softmax_output(Wv: Tensor, b: Tensor, rows: _Rows, y: int, s: float) -> Output:
    k = torch.softmax(s * Wv + b, 0)
    k[y] = 0
    k[y] = -k.sum()  # p_y − 1 without cancellation
    gap = s * k - rows.c
    # the client computed p_y − 1 with rounding of the 1, however small the difference is
    gap[y] = (gap[y].abs() - 10 * len(k) * rows.eps * s).clamp_min(0)
    residual = max(float(gap.norm() / (s * k).norm()), rows.residual)
    c = rows.c.clone()
    c[y] = c[y] - rows.c.sum() if bool(rows.trusted.all()) else s * k[y]
    return Output(c / s, s * rows.v, torch.tensor(y, device=c.device), residual)


def recover_from_logistic(
    weight: Tensor, weight_gradient: Tensor, bias: Tensor | None = None
) -> list[Output]:
    r""":math:`\langle W, G\rangle = -\mu\,\sigma(-\mu)` gives the margin by Lambert's W.

    One logit and the binary logistic loss: the margin ``μ = ±z`` has one value where the
    prediction is wrong, two where it is right: *twin data*. Either label explains the gradient
    with its own sign of ``x``. With several logits all share one scale, and every row is an
    equation; mirrored, ``−x`` with all labels changed, is always an answer too. Implements
    :eq:`logistic-root`.

    Parameters
    ----------
    weight, weight_gradient : Tensor
        ``W`` and ``∂L/∂W``, ``(m, n)``; the loss is the sum over the m logits.
    bias : Tensor, optional
        ``b``, ``(m,)``, where the layer has one but its gradient was withheld.

    Returns
    -------
    list of Output
        Every answer: up to four for one logit.

    Raises
    ------
    InvalidTensorError
        If shapes do not match.
    VanishingGradientError
        If the gradient is zero everywhere.
    InconsistentGradientError
        If no scale satisfies all rows.

    Notes
    -----
    Source: Zhu and Blaschko (2021) for the equation and its twins; the closed form and the
    treatment of several logits are this project's.
    """
    W, G, b = _layer(weight, weight_gradient, bias)
    rows = _rows(G)
    found = [o for side in (rows, rows.mirrored()) for o in _logistic_outputs(W, b, side)]
    if not found:
        raise InconsistentGradientError(
            f"No scale makes sigmoid(W x + b) − y agree with this weight gradient in every row "
            f"(⟨W, ∂L/∂W⟩ = {float((W * G).sum()):.3g}, which one sample keeps above −0.2785 for "
            "each logit without a bias): it is the sum of several samples, or belongs to another "
            "layer, loss or model."
        )
    return _best(found, rows.eps)


def _logistic_outputs(W: Tensor, b: Tensor, rows: _Rows) -> list[Output]:
    """Outputs with ``c = s·(σ(s W v + b) − y)``: the signs of ``c`` are the labels."""
    side = torch.where(rows.c < 0, -1.0, 1.0).to(W)  # |k_j| = σ(side·z_j)
    Wv, offset = side * (W @ rows.v), side * b
    top = int(rows.c.abs().argmax())
    starts = _logistic_scales(-float(Wv[top]), -float(offset[top]), float(rows.c[top].abs()))
    found = [_logistic_output(Wv, offset, side, rows, start) for start in starts]
    return [o for o in found if o.residual <= rows.tolerance]


def _logistic_output(Wv: Tensor, b: Tensor, side: Tensor, rows: _Rows, start: float) -> Output:
    # the client computed σ(z) − 1 with rounding of the 1, however small the difference is
    size, rounding = rows.c.abs(), 10 * rows.eps * start
    precision = rows.precision + rounding / size.clamp_min(1e-300)
    s = _polished(start, partial(_log_sigmoid, Wv, b), rows.c, precision < 0.2, precision)
    z = s * Wv + b
    z = torch.where(size > rounding, z, -z.abs())  # no gradient: confident, and right
    y = torch.where(size > rounding, -side, side * (s * Wv + b)) > 0
    gap = ((s * torch.sigmoid(z) - size).abs() - rounding).clamp_min(0)
    residual = max(float(gap.norm() / size.norm()), rows.residual)
    return Output(rows.c / s, s * rows.v, y.to(side), residual)


def _log_sigmoid(Wv: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
    z = s * Wv + b
    return nn.functional.logsigmoid(z), torch.sigmoid(-z) * Wv


def _logistic_scales(m: float, beta: float, a: float) -> list[float]:
    """Every ``s > 0`` with ``s σ(−(m s + β)) = a``, for ``a > 0``.

    Multiplied out, ``s − a = a e^{m s + β}``. With ``u = m (s − a)`` that is
    ``u e^{−u} = m a e^{m a + β}``, so ``u = −W(−m a e^{m a + β})``, on both real branches of
    Lambert's W where ``m > 0`` and the argument lies above ``−1/e``, on one where ``m < 0``.
    """
    if m * a == 0:
        return [a * (1 + math.exp(min(beta, 700.0)))]
    exponent = math.log(abs(m) * a) + m * a + beta
    roots = [a + u / m for u in _lambert(exponent, -1 if m > 0 else 1)]
    return [_polished_scale(s, m, beta, a) for s in roots if s > 0]


def _lambert(exponent: float, sign: int) -> list[float]:
    """Every ``u = −W(sign · e^exponent)``, also where the exponential over- or underflows."""
    from scipy.special import lambertw, wrightomega

    if sign > 0:
        return [-float(wrightomega(exponent))]
    if exponent > -1 + 1e-6:
        return []
    if exponent > -1:  # rounding beyond the tangent point, where both roots meet
        return [1.0]
    if exponent < -700:
        return [0.0, -exponent + math.log(-exponent)]
    return [-float(lambertw(-math.exp(exponent), branch).real) for branch in (0, -1)]


def _polished_scale(s: float, m: float, beta: float, a: float) -> float:
    """Newton's method on ``log s + log σ(−(m s + β)) = log a``."""
    for _ in range(4):
        t = m * s + beta
        p = _sigmoid(t)
        slope = 1 / s - m * p
        error = math.log(s / a) - (max(t, 0.0) + math.log1p(math.exp(-abs(t))))
        new = s - error / slope if abs(slope) * s > 1e-5 else s  # not where two roots meet
        if not (new > 0 and math.isfinite(new)):
            break
        s = new
    return s


def _sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t)) if t >= 0 else math.exp(t) / (1 + math.exp(t))


def recover_from_bias(
    loss: nn.Module,
    weight: Tensor,
    bias: Tensor,
    weight_gradient: Tensor,
    bias_gradient: Tensor,
) -> Output:
    r""":math:`y = \arg\min_j k_j` with :math:`k = \partial L/\partial b`, and ``x`` beside it.

    The bias gradient is ``k`` itself, ``x`` follows by :func:`recover_input`, and the label from
    ``z = W x + b``: for cross-entropy the one negative entry of ``k = softmax(z) − e_y``, else
    ``sigmoid(z) − k`` or ``z − k/2``. Implements :eq:`label-sign`.

    Parameters
    ----------
    loss : nn.Module
        ``CrossEntropyLoss``, ``BCEWithLogitsLoss`` or ``MSELoss``.
    weight, bias : Tensor
        ``W`` and ``b``, ``(m, n)`` and ``(m,)``.
    weight_gradient, bias_gradient : Tensor
        ``∂L/∂W`` and ``∂L/∂b``, ``(m, n)`` and ``(m,)``.

    Returns
    -------
    Output

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        As :func:`recover_input`.
    UnsupportedLossError
        If the loss is none of the three, or has weights, smoothing or a sum over classes.
    """
    _known_loss(loss)
    W, G, b = _layer(weight, weight_gradient, bias)
    k = checks.shaped(bias_gradient, "bias_gradient", (len(W),)).to(W.device)
    x = recover_input(G, k)
    return Output(k, x, _target(loss, W @ x + b, k), rank_one(G, k).residual)


def _target(loss: nn.Module, z: Tensor, k: Tensor) -> Tensor:
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.tensor(_label(k, z), device=k.device)
    factor = len(z) if loss.reduction == "mean" else 1
    if isinstance(loss, nn.MSELoss):
        return z - k * factor / 2
    return torch.sigmoid(z) - k * factor


def _known_loss(loss: nn.Module) -> None:
    if not isinstance(loss, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss | nn.MSELoss):
        raise UnsupportedLossError(
            f"{type(loss).__name__} is not handled; CrossEntropyLoss, BCEWithLogitsLoss and "
            "MSELoss are."
        )
    weights = (getattr(loss, "weight", None), getattr(loss, "pos_weight", None))
    smoothed = getattr(loss, "label_smoothing", None)
    if any(w is not None for w in weights) or smoothed or loss.reduction == "none":
        raise UnsupportedLossError(
            f"{type(loss).__name__} with class weights, label smoothing or reduction 'none' is not "
            "handled."
        )


def recover_output(
    loss: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
) -> list[Output]:
    r""":math:`k = \partial L / \partial z` and ``x`` of the last layer, from its own gradient.

    By the bias gradient where there is one, else by what the loss says. Implements
    :eq:`label-sign`, :eq:`softmax-scale` and :eq:`logistic-root`.

    Parameters
    ----------
    loss : nn.Module
        Applied to the layer's output.
    weight, bias : Tensor
        ``W``, ``(m, n)``, and ``b``, ``(m,)``, or ``None``.
    weight_gradient, bias_gradient : Tensor
        Likewise; ``bias_gradient`` may be ``None`` where it was withheld.

    Returns
    -------
    list of Output
        Every answer that explains the layer's gradient, best first.

    Raises
    ------
    UndeterminedScaleError
        For a squared error without a bias: its unknown target leaves the scale open.
    UnsupportedLossError, InvalidTensorError, VanishingGradientError, InconsistentGradientError
        As the functions that it calls.
    """
    _known_loss(loss)
    if bias is not None and bias_gradient is not None and bool(bias_gradient.any()):
        return [recover_from_bias(loss, weight, bias, weight_gradient, bias_gradient)]
    if isinstance(loss, nn.CrossEntropyLoss):
        return recover_from_cross_entropy(weight, weight_gradient, bias)
    if isinstance(loss, nn.MSELoss):
        raise UndeterminedScaleError(
            "The last layer has no bias and the squared error has an unknown target: any scale of "
            "the input has a target that explains the gradient. A bias anywhere, or a "
            "classification loss, would fix it."
        )
    factor = len(weight) if loss.reduction == "mean" else 1  # the mean over logits, undone
    found = recover_from_logistic(weight, weight_gradient * factor, bias)
    return [Output(o.k / factor, o.x, o.target, o.residual) for o in found]
