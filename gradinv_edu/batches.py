"""A dense layer's gradient and a batch: ``G = kᵀ X``, and the ReLU's zeros in ``k``.

Rows that one sample alone excites give it at once (:func:`isolated_samples`); else the sparsest
directions of the gradient's column space are the samples' (:func:`recover_batch`). At the other
end of a network the softmax takes a batch apart (:func:`recover_outputs`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from . import checks
from .checks import checked
from .engine.losses import count_labels, possible_labels, recover_outputs
from .engine.low_rank import Factors, low_rank_factors, machine_epsilon, require_bias
from .engine.sparse import Progress, null_vectors, sparse_basis, sparse_directions
from .errors import InconsistentGradientError, InvalidArgumentError, NotRecoveredError

__all__ = [
    "Factors",
    "Isolated",
    "count_labels",
    "expected_isolated",
    "forward_agreement",
    "isolated_samples",
    "low_rank_factors",
    "null_vectors",
    "possible_labels",
    "recover_batch",
    "recover_outputs",
    "sparse_basis",
    "sparse_directions",
]


class Isolated(NamedTuple):
    """A sample that several rows name alike: ``x``, ``(n,)``, and those ``rows``."""

    x: Tensor
    rows: Tensor


@checked
def isolated_samples(
    weight_gradient: Float[Tensor, " m n"],
    bias_gradient: Float[Tensor, " m"] | None,
    outputs: int,
    tolerance: float | None = None,
) -> list[Isolated]:
    r""":math:`G_i / b_i = G_j / b_j \Rightarrow` one sample alone excites rows i and j: it is this.

    A row's ratio is a mixture of the samples that excite it, in a proportion that differs from row
    to row; two rows agree only where there was nothing to mix. No truth is needed to see that.
    Right under one output, or two classes, the proportion is the same in every row: mixtures agree
    too, and no gradient tells them from samples. Implements :eq:`lonely-rows`.

    Parameters
    ----------
    weight_gradient, bias_gradient : Tensor
        ``(m, n)`` and ``(m,)``, of a batch of any size.
    outputs : int
        How many outputs the network has, or the units of a narrower layer above.
    tolerance : float, optional
        Relative difference of equal ratios; by default, what the client's rounding explains.

    Returns
    -------
    list of Isolated
        The sample of most rows first; each from the row of its largest bias gradient.

    Raises
    ------
    InvalidTensorError, VanishingGradientError, UndeterminedScaleError, InvalidArgumentError
        If a tensor, ``outputs`` or the tolerance cannot be.
    InconsistentGradientError
        If equality proves nothing: under fewer than three outputs, or if groups are dependent.
    """
    b = require_bias(bias_gradient)
    if tolerance is not None and not tolerance >= 0:
        raise InvalidArgumentError(f"tolerance is zero or more; got {tolerance!r}.")
    if checks.whole(outputs, "outputs") < 3:
        raise InconsistentGradientError(
            f"Under {outputs} output(s) all rows mix the samples in one proportion: that ratios "
            "are equal proves nothing there. Three outputs or more would make it a certificate."
        )
    tolerance = 1e3 * machine_epsilon(weight_gradient) if tolerance is None else tolerance
    rows = b.abs().argsort(descending=True)
    rows = rows[b[rows] != 0]
    ratios = weight_gradient[rows] / b[rows, None]
    free = torch.ones(len(rows), dtype=torch.bool, device=b.device)
    found = []
    for place, ratio in enumerate(ratios):
        near = free & ((ratios - ratio).norm(dim=1) <= tolerance * ratio.norm())
        if bool(free[place]) and int(near.sum()) > 1:
            found.append(Isolated(ratio, rows[near]))
        free &= ~near
    if found:
        x = torch.stack([sample.x for sample in found])
        whole = torch.cat([x, x.norm(dim=1).mean().expand(len(x), 1)], dim=1)
        S = torch.linalg.svdvals(whole)
        if len(x) > whole.shape[1] or float(S[-1]) < 1e-6 * float(S[0]):
            raise InconsistentGradientError(
                f"{len(x)} groups of rows have equal ratios, but these are mixtures of one "
                "another: rows are mixed in equal shares, as under a network with a single "
                "output, and equality proves nothing there."
            )
    return sorted(found, key=lambda sample: -len(sample.rows))


def expected_isolated(rows: int, batch_size: int, active: float) -> float:
    r""":math:`m\,N\,p_\text{on}\,(1 - p_\text{on})^{N-1}`: rows that one sample alone excites.

    Of m ``rows``, each excited by each of N samples with probability ``active``, independently.
    Largest at 1/N, where it is nearly m/e. Implements :eq:`isolated-count`.
    Raises :class:`InvalidArgumentError` for arguments that cannot be.

    >>> expected_isolated(1000, 4, 0.5)
    250.0
    """
    m, N = checks.whole(rows, "rows"), checks.whole(batch_size, "batch_size")
    if not isinstance(active, int | float) or not 0 <= active <= 1:
        raise InvalidArgumentError(f"active is a probability, from 0 to 1; got {active!r}.")
    return m * N * active * (1 - active) ** (N - 1)


@checked
def recover_batch(
    weight_gradient: Float[Tensor, " m n"],
    bias_gradient: Float[Tensor, " m"] | None,
    batch_size: int,
    *,
    weight: Float[Tensor, " m n"] | None = None,
    bias: Float[Tensor, " m"] | None = None,
    above: Float[Tensor, " outputs m"] | None = None,
    outputs: int | None = None,
    method: str = "descent",
    generator: torch.Generator | None = None,
    progress: Progress | bool = False,
    budget: int | None = None,
) -> Float[Tensor, " batch_size n"]:
    r""":math:`x_n = ((k^\top)^+ G)_n / ((k^\top)^+\, \partial L/\partial b)_n`, from sparse ``k``.

    ``[G | ∂L/∂b] = kᵀ [X | 1]`` has rank N, and after a ReLU each row of ``k`` is zero in many
    rows, those in which its sample is off: :func:`sparse_basis` finds it up to its length, which
    ``b = ∂L/∂b`` gives. For one averaged gradient, or the sum of several local steps in which
    each sample has rows where it stays off. Implements :eq:`batch-inputs`.

    Parameters
    ----------
    weight_gradient, bias_gradient : Tensor
        ``∂L/∂W`` and ``∂L/∂b`` of a dense layer before a ReLU, ``(m, n)`` and ``(m,)``.
    batch_size : int
        N, the number of different samples, at most min(m, n + 1).
    weight, bias : Tensor, optional
        The layer's own ``(m, n)`` and ``(m,)`` when the gradient was taken: an answer must then
        pass :func:`forward_agreement`, and the search ends as soon as it does. Leave them out
        for several local steps, which switch units; then an answer whose zeros are few, or avoid
        each other, is refused.
    above : Tensor, optional
        Weight of the dense layer right above the ReLU, ``(outputs, m)``, when the gradient of one
        step was taken: many more samples are told apart.
    outputs : int, optional
        How many outputs the network has. Under N outputs or fewer, ``k`` has rows of fewer
        dimensions than samples, and mixtures vanish in more of them than a sample does: without
        ``weight`` such an answer is refused. Left out, the caller vouches for more outputs.
    method, generator, progress, budget
        Of the search, as :func:`sparse_basis` takes them.

    Returns
    -------
    Tensor
        ``(batch_size, n)``, float64, in no particular order.

    Raises
    ------
    InvalidTensorError, VanishingGradientError, UndeterminedScaleError, InvalidArgumentError
        If an argument cannot be, or ``bias_gradient`` is ``None``.
    InconsistentGradientError, NotRecoveredError
        If the gradient's rank is not N; if not all samples were found, or they may be mixtures.

    Notes
    -----
    Source: Dimitrov et al. (2024), SPEAR; descent, witness and test of ambiguity: this project.
    """
    G, b = weight_gradient, require_bias(bias_gradient)
    if bias is not None and weight is None:
        raise InvalidArgumentError("bias is of no use without weight: give both, or neither.")
    known = weight is not None or above is not None
    if not known and outputs is not None and checks.whole(outputs, "outputs") <= batch_size:
        raise NotRecoveredError(
            f"Under {outputs} output(s) mixtures of {batch_size} samples vanish in more rows than "
            "the samples do: give weight, whose forward pass tells them apart."
        )
    scale = G.norm() / b.norm()  # so that neither part drowns the other
    whole = torch.cat([G, (scale * b)[:, None]], dim=1)
    eps = max(machine_epsilon(G), machine_epsilon(b))
    factors = low_rank_factors(whole, batch_size, eps)

    def inputs(directions: Tensor) -> Tensor:
        rows = torch.linalg.lstsq(factors.left @ directions, whole).solution
        x: Tensor = rows[:, :-1] / rows[:, -1:] * scale
        return x

    def agrees(directions: Tensor) -> bool:
        assert weight is not None
        return forward_agreement(weight, bias, G, inputs(directions)) > 0.99

    directions = sparse_basis(
        factors,
        method=method,
        above=above,
        generator=generator,
        progress=progress,
        budget=budget,
        accept=None if weight is None else agrees,
    )
    return inputs(directions)


@checked
def forward_agreement(
    weight: Float[Tensor, " m n"],
    bias: Float[Tensor, " m"] | None,
    weight_gradient: Float[Tensor, " m n"],
    inputs: Float[Tensor, " batch n"],
) -> float:
    r""":math:`[k_{nj} \neq 0] = [W_j \cdot x_n + b_j > 0]`: in what share of rows this holds.

    The forward pass tells which units each recovered sample switches on; with ``kᵀ = G X⁺`` the
    gradient tells it again. For the samples themselves both agree in all rows that are not zero.
    Implements :eq:`forward-witness`.

    Parameters
    ----------
    weight, bias, weight_gradient : Tensor
        Of the layer, ``(m, n)``, ``(m,)`` or ``None``, and one averaged gradient ``(m, n)``.
    inputs : Tensor
        Recovered samples, ``(N, n)``.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        If shapes do not belong together, or a tensor is not finite; if the gradient is zero.

    Notes
    -----
    Source: Dimitrov et al. (2024) choose their directions by this agreement.
    """
    G = checks.not_all_zero(weight_gradient, "weight_gradient")
    K = torch.linalg.lstsq(inputs.T, G.T).solution.T
    on = K.abs() > max(1e-9, 100 * machine_epsilon(G)) * K.square().mean(dim=0).sqrt()
    z = weight @ inputs.T + (0 if bias is None else bias[:, None])
    return float((on == (z > 0))[(G != 0).any(dim=1)].double().mean())
