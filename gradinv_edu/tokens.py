r"""Transformers: a position embedding is a bias for each token, a word one more patch.

``∂L/∂pos = k`` and ``∂L/∂E = kᵀ X`` give the patches (:func:`recover_patches`); with one-hot
``X`` the words. Without them, what entered a block lies in the span of its gradients
(:func:`recover_tokens`), and adapters show the same span a few rows a round
(:func:`adapter_capacity`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import checks
from .checks import checked
from .engine.low_rank import machine_epsilon
from .engine.sentences import Reader, Sentences
from .engine.solve import Truncated
from .engine.span import Span, chance
from .engine.transformer import GPT2, LAYOUTS, LLAMA, Directions, Layout, Parts, locate
from .errors import CapacityError, InvalidArgumentError
from .update import Update

__all__ = [
    "GPT2",
    "LAYOUTS",
    "LLAMA",
    "Directions",
    "Layout",
    "Sentences",
    "Span",
    "adapter_capacity",
    "chance",
    "locate",
    "patches_in_span",
    "recover_patches",
    "recover_tokens",
    "untied",
]

SHARE = 0.2  # how far an entry of a one-hot row may lie from 0 or 1


@checked
def recover_patches(
    position_gradient: Float[Tensor, " T D"],
    patch_gradient: Float[Tensor, " D n"],
    *,
    cut: float | None = None,
) -> Float[Tensor, " T n"]:
    r""":math:`k^\top X = \partial L/\partial E`, so :math:`X = (k^\top)^+\,\partial L/\partial E`.

    A learned position is added to its token as a bias is to a neuron, so its gradient is the
    token's own: :math:`k = \partial L/\partial\text{pos}`. Nothing above the embedding matters.
    A LayerNorm there makes every row of ``k`` sum to zero: exact for :math:`T \le D - 1`.
    With :math:`\partial L/\partial E` of words, turned, in place of patches: one-hot rows.
    Implements :eq:`position-bias`.

    Parameters
    ----------
    position_gradient : Tensor
        ``k``, ``(T, D)``, of one sample or several steps on it; class and register tokens left
        out.
    patch_gradient : Tensor
        ``∂L/∂E``, ``(D, n)``, of the patch embedding.
    cut : float, optional
        Leave out singular values of ``k`` below this share of the largest, for noisy or half
        precision gradients; the answer is then of least norm, and nothing is refused.

    Returns
    -------
    Tensor
        ``(T, n)``, float64.

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        If shapes do not belong together, an entry is not finite, or ``k`` is zero: the head's
        weights may be, as in many a fresh vision transformer.
    CapacityError
        If ``k`` has not full row rank: more patches than dimensions tell apart.

    Notes
    -----
    Source: a near relative of APRIL's closed form (Lu et al., 2022), without its conditions.
    """
    K = checks.not_all_zero(position_gradient, "position_gradient")
    limit = 4 * machine_epsilon(K) if cut is None else cut
    if cut is not None and not 0 <= cut < 1:
        raise InvalidArgumentError(f"cut is a share of the largest singular value, got {cut!r}.")
    told = Truncated.of(K.T, limit)
    if cut is None and told.rank < len(K):
        raise CapacityError(
            f"{len(K)} tokens, and their gradients have rank {told.rank}, at most "
            f"{K.shape[1] - 1} of width {K.shape[1]}: larger patches, or cut=1e-6 for the answer "
            "of least norm."
        )
    return told.solve(patch_gradient)


@checked
def patches_in_span(
    rows: Float[Tensor, " m D"],
    weight: Float[Tensor, " D n"],
    offsets: Float[Tensor, " T D"],
    scale: Float[Tensor, " D"],
    shift: Float[Tensor, " D"],
    patch_gradient: Float[Tensor, " D n"] | None = None,
) -> Float[Tensor, " T n"]:
    r""":math:`W[\gamma \odot C(E x_t + c_t) + s_t \beta] = 0`: where no position was sent.

    What enters the first block, LayerNorm of ``E x + c``, lies in the span of its gradients; ``W``
    holds the directions outside. But for its scale s a LayerNorm is linear (``C`` takes the mean
    away), so s is one more unknown. Exact for :math:`D \ge T + n + 2`; with ``patch_gradient``,
    whose rows span the patches, for :math:`D \ge 2T + 2`.

    Parameters
    ----------
    rows : Tensor
        Gradients of the first block's q, k and v, ``(m, D)``.
    weight, offsets : Tensor
        ``E``, ``(D, n)``, and ``c``, ``(T, D)``: its bias and the fixed position of each patch.
    scale, shift : Tensor
        γ and β of the LayerNorm.
    patch_gradient : Tensor, optional
        ``∂L/∂E``, ``(D, n)``.

    Returns
    -------
    Tensor
        ``(T, n)``, float64.

    Raises
    ------
    InvalidTensorError, VanishingGradientError
        If shapes do not belong together, or the rows are zero.
    CapacityError
        If the directions outside the span do not determine a patch.
    """
    G = checks.not_all_zero(rows, "rows")
    G = G / G.norm(dim=1, keepdim=True).clamp_min(1e-300)
    noise = machine_epsilon(rows) * float(torch.linalg.matrix_norm(G, 2))
    W = Span(Directions(G, noise)).outside.T
    T, n = len(offsets), weight.shape[1]
    basis = torch.eye(n).to(weight)
    if patch_gradient is not None:
        basis = torch.linalg.svd(patch_gradient, full_matrices=False).Vh[:T].T
    free = G.shape[1] - T - 1
    if basis.shape[1] + 1 > free:
        raise CapacityError(
            f"{max(free, 0)} directions lie outside the span of {T} tokens in a width of "
            f"{G.shape[1]}, and a patch has {basis.shape[1]} unknowns and a scale: larger patches "
            "leave fewer tokens; with patch_gradient a patch has no more unknowns than tokens."
        )

    def seen(v: Tensor) -> Tensor:
        outside: Tensor = W @ (scale[:, None] * (v - v.mean(dim=0)))
        return outside

    A = seen(weight @ basis)
    A = torch.cat([A, (W @ shift)[:, None]], dim=1) if bool(shift.any()) else A
    found = torch.linalg.lstsq(A, -seen(offsets.T), driver="gelsd", rcond=1e-14).solution
    X: Tensor = (basis @ found[: basis.shape[1]]).T
    return X


@checked
def untied(
    embedding_gradient: Float[Tensor, " V D"], position_gradient: Float[Tensor, " T D"]
) -> tuple[Tensor, Tensor]:
    r""":math:`\partial L/\partial E = \Pi^\top k + (p - y)^\top H`, less the second term.

    Where the head is the embedding, its gradient comes on top. Rows of words that were not
    written hold nothing else, so the quieter half of the rows spans ``H``: what is orthogonal to
    it is left of both. Guaranteed for :math:`2T \le D - 1`. Implements :eq:`tied-head`.

    Parameters
    ----------
    embedding_gradient, position_gradient : Tensor
        ``(V, D)`` and ``(T, D)``.

    Returns
    -------
    embedding_gradient, position_gradient : Tensor
        Likewise, as an untied model would send them, up to the lost directions.
    """
    quiet = embedding_gradient.norm(dim=1).argsort()[: len(embedding_gradient) // 2]
    H = torch.linalg.svd(embedding_gradient[quiet], full_matrices=False).Vh
    H = H[: len(position_gradient)]
    return (
        embedding_gradient - embedding_gradient @ H.T @ H,
        position_gradient - position_gradient @ H.T @ H,
    )


@checked
def adapter_capacity(rank: int, adapters: int, rounds: int, width: int) -> int:
    r""":math:`\min\bigl(D, \text{rank}\cdot\text{adapters}\cdot(\text{rounds}-1)\bigr)` inputs.

    LoRA's ``W = W₀ + BA`` begins with B = 0, so A's gradient ``Bᵀ Σ k uᵀ`` is zero in the first
    round. From the second on, each adapter that reads the same stream shows ``rank`` rows of
    the inputs' span; in the first block the inputs stay, and rounds on the same data add up.
    Implements :eq:`adapter-law`.

    Parameters
    ----------
    rank, adapters, rounds, width : int
        Width is D. InvalidArgumentError if one is not a whole number, 1 or more.

    >>> adapter_capacity(8, 2, 2, 576)
    16
    """
    for value, name in ((rank, "rank"), (adapters, "adapters"), (rounds, "rounds")):
        checks.whole(value, name)
    return min(checks.whole(width, "width"), rank * adapters * (rounds - 1))


@checked
def recover_tokens(
    model: nn.Module | Sequence[nn.Module],
    update: Update | Sequence[Update],
    *,
    layout: Layout | None = None,
    length: int | None = None,
    rank: int | None = None,
) -> Sentences:
    r""":math:`u = \text{norm}(E_v + P_t) \in \text{rowspan}[\,G_Q; G_K; G_V\,]`: a word was there.

    Each row of a projection's gradient is :math:`\sum_t k_t u_t^\top`, so what entered the first
    block lies in their span, and a word that was not written does not. Order, and whose sentence
    it is, by the same test on the second block: beginnings grow by a word at a time. Frozen,
    tied and rotary models alike. Implements :eq:`token-span`.
    Where the embedding and learned positions of one sentence are sent, :func:`recover_patches`
    is tried first.

    Parameters
    ----------
    model : nn.Module, or one for each update
        As the server sent it; its parts are found by ``layout``.
    update : Update, or several
        Of one client. Several rounds on the same data add up, as adapters need.
    layout : Layout, optional
        Where the parts lie; by default as in GPT-2 or Llama, whichever fits.
    length : int, optional
        Most tokens of a sentence; by default as many as positions were trained, else 64.
    rank : int, optional
        Distinct inputs, where noise hides them: all other directions count as outside.

    Returns
    -------
    Sentences

    Raises
    ------
    UnsupportedLayerError
        If the embedding or the blocks are not found; the message says how to describe them.
    InvalidTensorError, VanishingGradientError
        If the update is not the model's, holds NaN or no gradient of the first block's
        projections, or these are zero.
    CapacityError
        If more distinct inputs went in than the width, or the adapters' rows, tell apart.
    NotRecoveredError
        If no word passes.

    Notes
    -----
    Source: Petrov et al. (2024), DAGER, for the span test and its order; positions, all of q, k
    and v, rounds, the count by chance and ``exact`` are this project's.
    """
    reader = Reader(model, update, layout, length, rank)
    return _by_positions(reader.parts, reader.updates) or reader.read()


def _by_positions(parts: Parts, updates: Sequence[Update]) -> Sentences | None:
    """One sentence from the embedding's own gradient, where it comes out one-hot."""
    sent = [updates[0].gradients.get(n or "") for n in (parts.embedding, parts.positions)]
    if updates[0].samples > 1 or any(g is None or not bool(g.any()) for g in sent):
        return None
    E, K = (g.double() for g in sent if g is not None)
    K = K[: int(K.any(dim=1).nonzero().max()) + 1]
    written = E.any(dim=1).nonzero()[:, 0]
    E, K = untied(E[written], K) if parts.tied else (E[written], K)
    try:
        one_hot = recover_patches(K, E.T, cut=1e-9 if parts.tied else None)
    except CapacityError:
        return None
    ids = one_hot.argmax(dim=1)
    far = (one_hot - torch.eye(len(written)).to(one_hot)[ids]).abs().amax(dim=1)
    near, width = float(far.max()), parts.width - 1
    if near > SHARE or (parts.tied and 2 * len(K) > width):
        return None
    words = written[ids]
    return Sentences((words,), torch.unique(words), near, 1 - near, len(K), width, 0.0, True)
