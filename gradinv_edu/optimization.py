r"""The other family: guess a picture, compute its gradient, correct the guess."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import checks, schedule
from .checks import checked
from .engine import guess, search
from .engine.search import Method
from .errors import (
    InvalidArgumentError,
    InvalidTensorError,
    UnknownNameError,
)
from .labels import recover_labels
from .sharing import Loss, Update

__all__ = [
    "METHODS",
    "STARTS",
    "Match",
    "cosine_distance",
    "match_gradients",
    "squared_distance",
    "total_variation",
]


def squared_distance(own: Sequence[Tensor], sent: Sequence[Tensor]) -> Tensor:
    r""":math:`\lVert g(x') - g \rVert^2 / \lVert g \rVert^2`: DLG's distance of two gradients."""
    gap = sum(((a - b).square().sum() for a, b in zip(own, sent, strict=True)), torch.zeros(()))
    return gap / _size(sent)


def cosine_distance(own: Sequence[Tensor], sent: Sequence[Tensor]) -> Tensor:
    r""":math:`1 - \cos(g(x'), g)`: the distance of Inverting Gradients."""
    along = sum(((a * b).sum() for a, b in zip(own, sent, strict=True)), torch.zeros(()))
    tiny = torch.finfo(own[0].dtype).tiny
    return 1 - along / (_size(own) * _size(sent)).sqrt().clamp(min=tiny)


def _size(gradient: Sequence[Tensor]) -> Tensor:
    return sum((g.square().sum() for g in gradient[1:]), gradient[0].square().sum())


@checked
def total_variation(x: Tensor) -> Tensor:
    r""":math:`\mathrm{TV}(x) = \overline{|\partial_j x|} + \overline{|\partial_i x|}`.

    Parameters
    ----------
    x : Tensor, (…, H, W)
        Pictures.

    Returns
    -------
    Tensor
        One number, differentiable.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise InvalidTensorError(f"x must be pictures of real numbers, got {x.dtype}, {x.shape}.")
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()


STARTS = {"normal": guess.normal, "uniform": guess.uniform, "patterned": guess.patterned}
METHODS = {
    "dlg": Method(squared_distance, total_variation, guesses_labels=True),
    "idlg": Method(squared_distance, total_variation),
    "inverting_gradients": Method(
        cosine_distance, total_variation, 1e-4, signed_adam=True, learning_rate=0.1, patience=None
    ),
}


@dataclass(frozen=True)
class Match:
    """What a search found, chosen by its own objective and by nothing else.

    Attributes
    ----------
    inputs : Tensor
        ``(samples, *input_shape)``, float64, the point of lowest objective.
    targets : Tensor
        The labels it goes with: recovered, guessed along (DLG), or as they were given.
    objective : float
        At ``inputs``, without total variation and penalty.
    history, histories : tuple
        Objective of the winning run at its start and after each step; of every run, in order.
    evaluations : int
        Gradients of guesses that were computed and differentiated, in all runs together.
    converged : bool
        Whether the objective came down to ``tolerance``. It says that the gradients agree, not
        that the pictures do.
    masks : dict of str to Tensor
        Dropout masks guessed along, by the name of their layer.
    seconds : float
        Spent, on this machine.
    """

    inputs: Tensor
    targets: Tensor
    objective: float
    history: tuple[float, ...]
    histories: tuple[tuple[float, ...], ...] = field(repr=False)
    evaluations: int
    converged: bool
    masks: dict[str, Tensor] = field(repr=False)
    seconds: float = field(repr=False, compare=False)


@torch.inference_mode(False)
@torch.enable_grad()
@checked
def match_gradients(
    model: nn.Module,
    update: Update,
    input_shape: tuple[int, ...],
    loss: Loss,
    *,
    method: str = "dlg",
    targets: Tensor | None = None,
    steps: int = 300,
    restarts: int = 1,
    start: str | Tensor = "normal",
    simulate: bool = True,
    guess_masks: bool = False,
    known: Mapping[str, Tensor] | None = None,
    total_variation: float | None = None,
    learning_rate: float | None = None,
    line_search: bool = False,
    tolerance: float | None = None,
    patience: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Match:
    r""":math:`\hat x = \arg\min_{x'} \lVert g(x') - g \rVert^2 / \lVert g \rVert^2`, by descent.

    Method ``"inverting_gradients"`` minimises :math:`1 - \cos(g(x'), g) + \lambda\,\mathrm{TV}(x')`
    instead. Implements :eq:`gradient-matching` and :eq:`cosine-matching`.

    Parameters
    ----------
    model : torch.nn.Module
        As the server sent it, in the client's mode. Dropout in training mode is ignored, as by an
        attacker who does not know of it, unless ``guess_masks``.
    update : Update
        What one client sent; it says the number of samples.
    input_shape : tuple of int
        Of one sample.
    loss : callable
        The client's.
    method : {"dlg", "idlg", "inverting_gradients"}
        L-BFGS on the squared distance, labels guessed along; the same with labels read first
        (:func:`~gradinv_edu.labels.recover_labels`); Adam on the signs of the gradient of the
        cosine distance, pixels kept in [0, 1].
    targets : Tensor, optional
        True labels, for an attacker who is said to have them; ``None``: recovered.
    steps, restarts : int
        Most steps of one run (20 iterations of L-BFGS each, or one of Adam); number of runs, of
        which the one of lowest objective wins.
    start : {"normal", "uniform", "patterned"} or Tensor
        Where a run begins; ``"patterned"`` is the random quarter, repeated, of Wei et al.
        (2020). A tensor ``(samples, *input_shape)`` serves the first run, ``"normal"`` the others.
    simulate : bool
        Take the client's local steps along (:func:`~gradinv_edu.schedule.simulated_update`), or
        take the update for the plain gradient that it is on average.
    guess_masks : bool
        Optimise the masks of dropout layers along, as Scheliga et al. (2023) do.
    known : mapping of str to Tensor, optional
        By parameter, boolean: where the update is believed; pruned entries are left out so.
    total_variation, learning_rate, patience : float, float, int, optional
        Instead of the method's own; total variation is for pictures.
    line_search : bool
        Strong Wolfe conditions for L-BFGS; the published attacks have none.
    tolerance : float, optional
        Objective at which the search ends; ``None``: some roundings of the model's dtype.
    generator : torch.Generator, optional
        Of the starts; ``None``: a fixed seed.
    progress : bool
        Show a bar.

    Raises
    ------
    InvalidTensorError
        If update, mask, start, targets or ``input_shape`` do not fit the model.
    InvalidArgumentError, UnknownNameError
        If a number cannot be, labels cannot be recovered, or there are no masks to guess; if
        there is no such method or start.

    Notes
    -----
    Sources: Zhu, Liu and Han (2019); Zhao et al. (2020); Geiping et al. (2020). Nothing here sees
    the truth: neither the point nor the run is chosen by it.

    Examples
    --------
    >>> import gradinv_edu as gi
    >>> model, loss = gi.models.mlp((64, 24, 10), "sigmoid"), torch.nn.CrossEntropyLoss()
    >>> update = gi.observe(model, loss, gi.data.digit(3), torch.tensor([3]))
    >>> search = gi.optimization.match_gradients
    >>> match = search(model, update, (1, 8, 8), loss, method="idlg")
    >>> match.targets.item(), gi.metrics.psnr(match.inputs, gi.data.digit(3)) > 30
    (3, True)
    """
    began = time.perf_counter()
    plan = _method(method, input_shape, total_variation, learning_rate, patience)
    checks.whole(steps, "steps")
    checks.whole(restarts, "restarts")
    update.check(model)
    if not simulate and update.learning_rate is not None:
        update = schedule.average_gradient(model, update)
    own = copy.deepcopy(model)
    masks = guess.replace_dropout(own)
    if guess_masks and (not masks or update.local_steps > 1):
        raise InvalidArgumentError(
            "guess_masks needs a dropout layer in training mode and one local step."
        )
    like = own.get_parameter(next(iter(update.gradients))).detach()
    seen = {n: g.detach().to(like) for n, g in update.gradients.items()}
    objective = search.Objective(
        own, update, loss, plan, seen, dict(known or {}), masks if guess_masks else {}
    )
    tolerance = (10 * torch.finfo(like.dtype).eps) ** 2 if tolerance is None else tolerance
    checks.number(tolerance, "tolerance", "zero or more", lambda v: v >= 0)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    labels = targets
    if targets is None and not plan.guesses_labels:
        labels = recover_labels(model, update, loss, tuple(input_shape))
    if labels is not None:
        if not labels.ndim or len(labels) != update.samples:
            raise InvalidTensorError(f"targets must be a tensor of {update.samples} labels.")
        labels = labels.detach().to(like.device, like.dtype if labels.is_floating_point() else None)
    runs: list[search.Descent] = []
    while len(runs) < restarts and not (runs and runs[-1].distance <= tolerance):
        begin = "normal" if runs and isinstance(start, Tensor) else start
        x = _start(begin, (update.samples, *input_shape), source).to(like, copy=True)
        runs.append(search.run(
            objective, x, labels, source, steps=steps, tolerance=tolerance,
            line_search=line_search, progress=progress,
        ))  # fmt: skip
    best = min(runs, key=lambda run: run.distance)
    return Match(
        inputs=best.inputs.double(),
        targets=best.targets,
        objective=best.distance,
        history=best.history,
        histories=tuple(run.history for run in runs),
        evaluations=objective.evaluations,
        converged=best.distance <= tolerance,
        masks=best.masks,
        seconds=time.perf_counter() - began,
    )


def _method(
    name: str,
    shape: Sequence[int],
    weight: float | None,
    learning_rate: float | None,
    patience: int | None,
) -> Method:
    """The method by its name, with what the caller set instead."""
    if name not in METHODS:
        raise UnknownNameError(f"No method {name!r}; there are {', '.join(METHODS)}.")
    picture = len(shape) == 3 and min(shape[1:]) > 1  # a column has no neighbours
    if weight and not picture:
        raise InvalidArgumentError(
            f"total_variation is for pictures (C, H, W); input_shape is {tuple(shape)}."
        )
    own = METHODS[name]
    alpha = own.weight if weight is None else weight
    rate = own.learning_rate if learning_rate is None else learning_rate
    checks.number(alpha, "total_variation", "zero or more", lambda v: v >= 0)
    checks.number(rate, "learning_rate", "positive", lambda v: v > 0)
    patience = own.patience if patience is None else checks.whole(patience, "patience")
    alpha = alpha if picture else 0.0
    return replace(own, weight=alpha, learning_rate=rate, patience=patience)


def _start(start: str | Tensor, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    if isinstance(start, Tensor):
        return checks.shaped(start, "start", shape)
    if start not in STARTS:
        raise UnknownNameError(f"No start {start!r}; there are {', '.join(STARTS)}.")
    return STARTS[start](shape, source)
