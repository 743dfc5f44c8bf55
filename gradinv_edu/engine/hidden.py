"""What a norm hides of the layers below it, a factor and some constants, and what tells them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import GradientInversionError, UndeterminedScaleError
from .graph import Step
from .layers import pull_back
from .layers.activations import ReLU
from .layers.norms import Groups, Norm

__all__ = ["Hidden", "bias_below", "constants", "fitted", "shifted", "shifts", "summed"]

GRID, DECADES, RED = 241, 12.0, 8  # of the search for a factor under a curved activation


@dataclass(frozen=True)
class Hidden:
    """A value is known but for one positive factor ``s`` a sample, and ``∂L/∂a`` but for ``1/s``.

    Attributes
    ----------
    norm : str
        Step whose input hides it: ``x → c·x`` leaves its output as it was.
    guess : Tensor
        ``(1,)`` where all samples share it, else ``(N,)``: what ε tells of it.
    unseen : Tensor or None
        Shaped as the value: numbers of the entries that are open up to a common constant besides.
    """

    norm: str
    guess: Tensor
    unseen: Tensor | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What is hidden, for a report."""
        each = "" if len(self.guess) == 1 else " of each sample"
        factor = f"brightness: one factor{each} ({self.norm} leaves x and c·x alike)"
        if self.unseen is None:
            return (factor,)
        count = int(self.unseen.max()) + 1
        return factor, f"contrast: {count} constants ({self.norm} leaves x and x + c alike)"

    def times(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        """``x`` times the factor; by default the guess."""
        by = self.guess if by is None else by
        return x * by.expand(len(x)).reshape(-1, *[1] * (x.dim() - 1))


def bias_below(steps: Sequence[Step], position: int, hidden: Hidden) -> int | None:
    """Next step at or below ``position`` whose bias the factor reaches; None: there is none yet.

    Raises
    ------
    UndeterminedScaleError
        If a layer in between needs the factor and nothing tells it.
    """
    curved = None
    for index in range(position, -1, -1):
        step = steps[index]
        if getattr(step.module, "bias", None) is not None:
            if curved is not None and len(hidden.guess) > 1:
                break
            return index
        passes = step.rule.reshapes or step.rule.homogeneous
        if not passes and not step.rule.affine:
            curved = curved or step
        if step.rule.weighted or not (passes or step.rule.elementwise or step.rule.affine):
            break
    if curved is not None:
        raise UndeterminedScaleError(
            f"{hidden.norm} leaves what is below it up to a factor, {curved.name} "
            f"({curved.rule.kind}) needs that factor, and no bias between them tells it."
        )
    return None


def summed(
    steps: Sequence[Step], position: int, index: int, value: Tensor, k: Tensor, noise: float
) -> Tensor:
    """``∂L/∂b`` of step ``index``, of each sample, from what is known at the output of another."""
    for place in range(position, index, -1):
        step = steps[place]
        if step.rule.elementwise:
            undone = step.rule.undo(value, step.name, noise)
            value, k = undone.inputs, k * undone.slope
        elif step.rule.affine:
            below = value.new_zeros(len(value), *step.input_shape)
            value, k = below, pull_back(step.module, k, below)
        value = value.reshape(len(value), *step.input_shape)
        k = k.reshape(len(k), *step.input_shape)
    step = steps[index]
    if step.rule.normalises:
        return torch.stack([step.rule.parameter_sum(part[None]) for part in k])  # type: ignore[attr-defined]
    like, bias = k.new_zeros(1, *step.input_shape), step.module.get_parameter("bias").detach()

    def shifted(b: Tensor) -> Tensor:
        out: Tensor = functional_call(step.module, {"bias": b}, (like,))
        return out

    return torch.stack([pull_back(shifted, part[None], bias).reshape(-1) for part in k])


def fitted(
    predicted: Callable[[Tensor], Tensor], sent: Tensor, hidden: Hidden, curved: bool
) -> tuple[Tensor, float]:
    r""":math:`\sum_n \frac{1}{s_n} b_n = \partial L/\partial b` for the factors ``s``.

    Parameters
    ----------
    predicted : callable
        From factors to ``∂L/∂b`` of each sample, ``(N, entries)``.
    sent : Tensor
        ``∂L/∂b``, flat.
    factor : Factor
        What is to be found.
    curved : bool
        Whether the prediction is more than one over the factor times a constant.

    Returns
    -------
    factors : Tensor
        Shaped as the guess.
    spread : float
        What they leave unexplained, relative.
    """
    one = torch.ones_like(hidden.guess)
    size = float(sent.norm()) or 1.0
    if not curved:
        B = predicted(one)
        B = B.sum(0, keepdim=True) if len(one) == 1 else B
        inverse = torch.linalg.lstsq(B.T, sent[:, None]).solution[:, 0]
        spread = float((B.T @ inverse - sent).norm()) / size
        return 1 / torch.where(inverse == 0, 1.0, inverse), spread

    def rest(log: float) -> Tensor:
        s = torch.exp(one * log)
        try:
            return predicted(s).sum(0) - sent
        except GradientInversionError:  # out of the activation's range
            return torch.full_like(sent, torch.inf)

    best = _searched(lambda log: float(rest(log).norm()))
    for _ in range(RED):
        r, h = rest(best), 1e-5
        slope = (rest(best + h) - rest(best - h)) / (2 * h)
        move = float(slope @ r) / max(float(slope @ slope), 1e-300)
        if not float(rest(best - move).norm()) < float(r.norm()):
            break
        best -= move
    return torch.exp(one * best), float(rest(best).norm()) / size


def _searched(gap: Callable[[float], float]) -> float:
    """Least gap over many decades, closer and closer."""
    middle, width = 0.0, DECADES * math.log(10)
    for points in (GRID, 13, 13, 13):
        grid = torch.linspace(middle - width, middle + width, points, dtype=torch.float64).tolist()
        middle = min(grid, key=gap)
        width *= 3 / points
    return middle


# --- constants ----------------------------------------------------------------------------------


def constants(module: nn.Module, groups: Groups, like: Tensor) -> Tensor | None:
    """Entries to which a constant can be added unseen: each group of ``W x`` gains a constant.

    All entries of a channel, or those that the stride keeps apart; under a dense layer each
    feature of a batch.

    Parameters
    ----------
    module : nn.Module
        The affine layer under a norm.
    groups : Groups
        Of the norm.
    like : Tensor
        Of the input's shape, batch included.

    Returns
    -------
    Tensor or None
        Shaped as the input: number of the constant that may be added to each entry, −1 for none.
    """
    stride = getattr(module, "stride", ())
    stride = stride if isinstance(stride, tuple) and len(stride) == like.dim() - 2 else ()
    place = torch.zeros(like.shape[2:], dtype=torch.long, device=like.device)
    for axis, s in enumerate(stride):
        along = torch.arange(like.shape[2 + axis], device=like.device) % s
        place = place * s + along.reshape(-1, *[1] * (len(stride) - 1 - axis))
    size = torch.linspace(1.0, 2.0, like.shape[1], dtype=like.dtype, device=like.device)
    shape = (-1, *[1] * (like.dim() - 2))
    with torch.no_grad():
        at_zero: Tensor = module(like)

    def hides(where: Tensor) -> bool:
        with torch.no_grad():
            z: Tensor = module((size.reshape(shape) * where).expand_as(like)) - at_zero
        rest = z - groups.spread(groups.sum(z) / groups.sum(torch.ones_like(z)))
        return float(rest.abs().max()) <= 1e-12 * max(float(z.abs().max()), 1e-300)

    apart = [place == r for r in range(int(place.max()) + 1)]
    found = [where for where in apart if hides(where)]
    found = found or [where for where in (place >= 0,) if hides(where)]
    if not found:
        return None
    channel = torch.arange(like.shape[1], device=like.device).reshape(shape)
    number = -torch.ones_like(like[0], dtype=torch.long)
    for i, where in enumerate(found):
        number = torch.where(where, channel * len(found) + i, number)
    sample = torch.arange(len(like), device=like.device).reshape(-1, *[1] * (like.dim() - 1))
    own = int(groups.family.max()) > 0  # every sample has constants of its own
    return torch.where(number >= 0, number + own * sample * (int(number.max()) + 1), -1)


def shifted(x: Tensor, number: Tensor, by: Tensor) -> Tensor:
    """``x`` with each of its open constants added."""
    return x + torch.where(number >= 0, by[number.clamp_min(0)], torch.zeros_like(x))


def shifts(
    steps: Sequence[Step], position: int, x: Tensor, number: Tensor, noise: float
) -> Callable[[Tensor], Tensor] | None:
    r""":math:`\min(x + c) = 0` under a ReLU, else :math:`\sum\sigma^{-1}(s(x + c)) = n\beta`.

    From factors to the constants, by what is known of the activation and the norm below.

    Parameters
    ----------
    steps, position
        The model, and the step whose output is ``x``.
    x, number : Tensor
        The value up to factor and constants.
    noise : float
        Of the value.

    Returns
    -------
    callable or None
        None where neither tells.
    """
    while position >= 0 and steps[position].rule.reshapes:
        position -= 1
    if position < 0:
        return None
    count, own = int(number.max()) + 1, number >= 0
    if isinstance(steps[position].rule, ReLU):
        least = x.new_full((count,), math.inf)
        least = least.scatter_reduce(0, number[own], x[own], "amin")
        zeros = x - least[number.clamp_min(0)] <= max(1e2 * noise, 1e-12) * x.abs().max()
        told = x.new_zeros(count).index_add(0, number[own], zeros[own].to(x))
        return (lambda s: -least) if bool((told >= 2).all()) else None
    return _by_means(steps, position, x, number)


def _by_means(
    steps: Sequence[Step], position: int, x: Tensor, number: Tensor
) -> Callable[[Tensor], Tensor] | None:
    above = [steps[position].rule] if steps[position].rule.elementwise else []
    norm = position - len(above)
    if norm < 0 or not isinstance(steps[norm].rule, Norm) or not steps[norm].rule.normalises:
        return None
    rule, name = steps[norm].rule, steps[norm].name
    assert isinstance(rule, Norm)
    gain, shift = rule.coefficients(x.reshape(len(x), *steps[norm].output_shape))
    gain, shift = gain.reshape(x.shape), shift.reshape(x.shape)
    of = rule.groups(torch.Size((len(x), *steps[norm].output_shape)), x.device)
    groups = Groups(of.of.reshape(x.shape), of.family)
    count, own, all_ = int(number.max()) + 1, number >= 0, number.clamp_min(0)
    of_number = all_.new_zeros(count).index_put((number[own],), groups.of[own])
    alone = len(set(of_number.tolist())) == count  # every constant in a group of its own
    if not rule.centred or not alone or bool((gain == 0).any()):
        return None
    sign = groups.sum(gain)[of_number].sign()

    def mean(s: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        y = shifted(x, number, by) * s
        slope = torch.ones_like(y)
        for rule in above:
            own, safe = (rule.undo(a, name, 1.0) for a in (y, rule.clamp(y)))
            y = torch.where(own.known, own.inputs, safe.inputs)
            slope = torch.where(own.known, own.slope, safe.slope)
        rise = torch.where((number >= 0) & (slope != 0), s / (slope * gain), 0.0)
        middle, rising = groups.sum((y - shift) / gain), groups.sum(rise)
        return middle[of_number] * sign, rising[of_number] * sign

    def found(s: Tensor) -> Tensor:
        """By Newton's steps, halving where they leave the interval."""
        high = x.new_full((count,), 50 * float(x.abs().max()))
        low, by = -high, torch.zeros_like(high)
        for _ in range(60):
            above_zero, rise = mean(s, by)
            low, high = torch.where(above_zero > 0, low, by), torch.where(above_zero > 0, by, high)
            step = by - above_zero / rise
            step = torch.where((step > low) & (step < high), step, (low + high) / 2)
            still = float((step - by).abs().max()) <= 1e-16 * float(x.abs().max())
            by = step
            if still:
                break
        return by

    return found
