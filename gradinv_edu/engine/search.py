"""Descents of a guess towards a gradient: objective, optimiser, stopping, the best point found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from .. import checks, schedule
from ..errors import InvalidTensorError, VanishingGradientError
from ..sharing import Loss, Update
from . import guess

__all__ = ["Descent", "Method", "Objective", "descend", "run"]

INNER = 20  # L-BFGS iterations in one step, as DLG and its descendants run it
HISTORY = 100
DECAYS = (3 / 8, 5 / 8, 7 / 8)  # of the steps: there signed Adam's rate is divided by ten
IMPROVED = 1e-3  # relative; less is no progress
MASK_PENALTY = 1e-4  # Scheliga et al. (2023)


@dataclass(frozen=True)
class Method:
    """What makes a published attack itself.

    Attributes
    ----------
    distance : callable
        Of two gradients, as sequences of tensors.
    regularizer : callable
        Of pictures, times ``weight``.
    weight : float
        Of the regulariser.
    guesses_labels, signed_adam : bool
        Labels guessed along, or read first; Adam on the signs of the gradient, or L-BFGS.
    learning_rate : float
        Of the optimiser.
    patience : int or None
        Steps without progress after which a run gives up.
    """

    distance: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    regularizer: Callable[[Tensor], Tensor]
    weight: float = 0.0
    guesses_labels: bool = False
    signed_adam: bool = False
    learning_rate: float = 1.0
    patience: int | None = 30


@dataclass
class Objective:
    """Distance of a guess's gradient from the one that was sent, where that is believed.

    Attributes
    ----------
    model : torch.nn.Module
        A copy; its dropout replaced by guesses.
    update : Update
        Whose schedule is imitated.
    loss : callable
        The client's.
    method : Method
        Distance and regulariser.
    seen, believed : mapping of str to Tensor
        Gradients as they were sent; boolean masks for some of them.
    masks : mapping of str to GuessedDropout
        Guessed along.
    evaluations : int
        How often it was called.
    """

    model: nn.Module
    update: Update
    loss: Loss
    method: Method
    seen: Mapping[str, Tensor]
    believed: Mapping[str, Tensor]
    masks: Mapping[str, guess.GuessedDropout]
    evaluations: int = 0

    def __post_init__(self) -> None:
        for name, mask in self.believed.items():
            if name not in self.seen:
                raise InvalidTensorError(f"known has a mask for {name!r}, which was not sent.")
            if mask.dtype != torch.bool or mask.shape != self.seen[name].shape:
                raise InvalidTensorError(
                    f"known[{name!r}] must be boolean of shape {tuple(self.seen[name].shape)}, "
                    f"got {mask.dtype} of {tuple(mask.shape)}."
                )
        if not any(bool(g.any()) for g in self._known(self.seen)):
            raise VanishingGradientError("Every known entry of the update is zero.")

    def _known(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        found = ((gradients[n], self.believed.get(n)) for n in self.seen)
        return [g if mask is None else g[mask.to(g.device)] for g, mask in found]

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Objective at a guess, and the part of it that is no regulariser."""
        self.evaluations += 1
        sent = schedule.simulated_update(self.model, self.update, self.loss, x, y)
        distance = value = self.method.distance(self._known(sent), self._known(self.seen))
        if self.method.weight:
            value = value + self.method.weight * self.method.regularizer(x)
        for mask in self.masks.values():
            value = value + MASK_PENALTY * (1 - mask.guess.mean() - mask.p).abs()
        return value, distance


@dataclass(frozen=True)
class Descent:
    """Where one run came to.

    Attributes
    ----------
    inputs, targets : Tensor
        The guess at the point of lowest objective.
    masks : dict of str to Tensor
        Guessed along.
    distance : float
        There, without regulariser.
    history : tuple of float
        Objective at the start and after each step.
    """

    inputs: Tensor
    targets: Tensor
    masks: dict[str, Tensor]
    distance: float
    history: tuple[float, ...]


def run(
    objective: Objective,
    x: Tensor,
    labels: Tensor | None,
    source: torch.Generator,
    *,
    steps: int,
    tolerance: float,
    line_search: bool = False,
    progress: bool = False,
) -> Descent:
    """Descend from ``x``; labels that are ``None``, and masks, are drawn and guessed along.

    Parameters
    ----------
    objective : Objective
        To be made small.
    x, labels : Tensor, Tensor or None
        Pictures to begin from, and their labels.
    source : torch.Generator
        Of the draws.
    steps, tolerance : int, float
        Most steps, and the distance at which to end.
    line_search, progress : bool
        Strong Wolfe conditions for L-BFGS; show a bar.
    """
    loss, method, masks = objective.loss, objective.method, objective.masks
    with torch.no_grad():
        for mask in masks.values():
            mask.guess = torch.empty(0)
        with checks.fitting(f"Model and loss do not take inputs {tuple(x.shape)}"):
            output = objective.model(x)
    for mask in masks.values():
        kept = guess.uniform(mask.shape, source) < 1 - mask.p
        mask.guess = kept.to(x).requires_grad_()
    variables = [x.requires_grad_(), *(mask.guess for mask in masks.values())]
    if labels is None:
        variables.append(guess.normal(output.shape, source).to(x).requires_grad_())

    def value() -> tuple[Tensor, Tensor]:
        return objective(x, guess.soft_labels(loss, variables[-1]) if labels is None else labels)

    def project() -> None:
        with torch.no_grad():
            for bounded in [x] * method.signed_adam + [mask.guess for mask in masks.values()]:
                bounded.clamp_(0, 1)

    best, distance, history = descend(
        value, variables, method, project,
        steps=steps, tolerance=tolerance, line_search=line_search, progress=progress,
    )  # fmt: skip
    if labels is None:
        labels = guess.soft_labels(loss, best[-1])
        labels = labels.argmax(dim=-1) if isinstance(loss, nn.CrossEntropyLoss) else labels
    return Descent(best[0], labels, dict(zip(masks, best[1:], strict=False)), distance, history)


def descend(
    objective: Callable[[], tuple[Tensor, Tensor]],
    variables: Sequence[Tensor],
    method: Method,
    project: Callable[[], None],
    *,
    steps: int,
    tolerance: float,
    line_search: bool,
    progress: bool,
) -> tuple[list[Tensor], float, tuple[float, ...]]:
    """Move ``variables`` down ``objective``; every point evaluated competes, by its value alone.

    The best point, its distance, and the objective at the start and after each step.

    Parameters
    ----------
    objective : callable
        Gives the objective at the variables, and the distance in it.
    variables : sequence of Tensor
        Changed in place.
    method : Method
        Which optimiser, and when it gives up.
    project : callable
        Brings the variables back to where they must stay, after each step.
    steps, tolerance, line_search, progress
        As for :func:`run`.
    """
    optimizer: optim.Optimizer
    if method.signed_adam:
        optimizer = optim.Adam(variables, method.learning_rate)
    else:
        optimizer = optim.LBFGS(
            variables, method.learning_rate, INNER, history_size=HISTORY,
            tolerance_grad=0.0, tolerance_change=0.0,
            line_search_fn="strong_wolfe" if line_search else None,
        )  # fmt: skip
    decays = {int(steps * part) for part in DECAYS} - {0} if method.signed_adam else set()
    rate = optim.lr_scheduler.MultiStepLR(optimizer, sorted(decays))
    best, lowest, distance = [v.detach().clone() for v in variables], math.inf, math.inf
    history: list[float] = []

    def closure() -> Tensor:
        nonlocal best, lowest, distance
        value, gap = objective()
        slopes = torch.autograd.grad(value, variables, allow_unused=True, materialize_grads=True)
        for variable, slope in zip(variables, slopes, strict=True):
            variable.grad = slope.sign() if method.signed_adam else slope
        if float(value.detach()) < lowest:
            lowest, distance = float(value.detach()), float(gap.detach())
            best = [v.detach().clone() for v in variables]
        return value.detach()

    step: Callable[..., Tensor] = optimizer.step
    for _ in _counted(steps, progress):
        history.append(float(step(closure)))
        rate.step()
        project()
        stuck = _stuck(history, method.patience)
        if distance <= tolerance or stuck or not math.isfinite(history[-1]):
            break
    history.append(float(closure()))
    return best, distance, tuple(h for h in history if math.isfinite(h))


def _stuck(history: Sequence[float], patience: int | None) -> bool:
    if patience is None or len(history) <= patience:
        return False
    return min(history[-patience:]) > (1 - IMPROVED) * min(history[:-patience])


def _counted(steps: int, progress: bool) -> Iterator[int]:
    if not progress:
        return iter(range(steps))
    from tqdm.auto import tqdm

    return iter(tqdm(range(steps), desc="matching gradients"))
