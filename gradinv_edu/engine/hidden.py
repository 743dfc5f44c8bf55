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
from .layers import Rule, pull_back, rule_of
from .layers.branches import Block, Sum
from .layers.norms import Groups, Norm

__all__ = [
    "Hidden",
    "bias_below",
    "constants",
    "fitted",
    "from_zero",
    "last_bias",
    "shifted",
    "shifts",
    "summed",
    "unshaped",
]

MOST = 0.5  # share of a bias's entries that must agree on a factor for the others to be left out
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

    @property
    def brief(self) -> str:
        """The same in few words, for a line of a table."""
        factor = "one factor" if len(self.guess) == 1 else "one factor a sample"
        return (
            factor
            if self.unseen is None
            else f"{factor} and {int(self.unseen.max()) + 1} constants"
        )

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
        if last_bias(step) is not None:
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


def last_bias(step: Step) -> tuple[str, Rule] | None:
    """Name in a step of the bias that is added last, and the rule of the layer that adds it."""
    module, rule = step.module, step.rule
    if getattr(module, "bias", None) is not None:
        return "bias", rule
    if not isinstance(module, Block) or not isinstance(module.nodes[-1].module, Sum):
        return None
    for source in module.nodes[-1].sources:
        alone = sum(node.sources.count(source) for node in module.nodes) == 1
        own = rule_of(module.layers[source - 1]) if source > 0 else None
        if alone and isinstance(own, Norm) and getattr(own.module, "bias", None) is not None:
            return f"layers.{source - 1}.bias", own
    return None


def summed(
    steps: Sequence[Step],
    position: int,
    index: int,
    value: Tensor,
    k: Tensor,
    noise: float,
    clamp: bool = False,
) -> Tensor:
    """``∂L/∂b`` of step ``index``, of each sample, from what is known at the output of another.

    ``clamp``: the value is in doubt, and may lie outside an activation's range.
    """
    for place in range(position, index, -1):
        step = steps[place]
        if step.rule.elementwise:
            value = step.rule.clamp(value) if clamp else value
            undone = step.rule.undo(value, step.name, noise)
            value, k = undone.inputs, k * undone.slope
        elif step.rule.affine:
            below = value.new_zeros(len(value), *step.input_shape)
            value, k = below, pull_back(step.module, k, below)
        value = value.reshape(len(value), *step.input_shape)
        k = k.reshape(len(k), *step.input_shape)
    step = steps[index]
    told = last_bias(step)
    if told is not None and isinstance(told[1], Norm):
        return torch.stack([told[1].parameter_sum(part[None]) for part in k])
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
        if len(one) == 1:
            return _ratio(B.sum(0), sent)
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


def _ratio(B: Tensor, sent: Tensor) -> tuple[Tensor, float]:
    """``1/s`` of most entries: a unit on the wrong side of its kink spoils one, and no other."""
    live = B != 0
    if not bool(live.any()):
        return torch.ones_like(B[:1]), 1.0
    B, sent = B[live], sent[live]
    ratios = sent / B
    order = ratios.argsort()
    half = B.abs()[order].cumsum(0) >= B.abs().sum() / 2
    gap = (B * ratios[order][half.to(torch.uint8).argmax()] - sent).abs()
    fits = gap <= 10 * gap.median() + 1e-13 * sent.abs().max()
    fits = fits if float(fits.double().mean()) >= MOST else torch.ones_like(fits)
    B, sent = B[fits], sent[fits]
    by = (B @ sent) / (B @ B).clamp_min(1e-300)
    spread = float((by * B - sent).norm() / sent.norm().clamp_min(1e-300))
    return 1 / torch.where(by == 0, 1.0, by)[None], spread


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


def from_zero(x: Tensor, number: Tensor, noise: float) -> tuple[Tensor, Tensor | None]:
    r""":math:`\min(x + c) = 0` under a ReLU: ``x`` with its open constants, and what is a guess.

    Returns
    -------
    x : Tensor
        With the least entry of each constant's at zero.
    floating : Tensor or None
        Bool: entries whose constant is a guess, because no two of them are equal and least, as
        those are that a ReLU has set to zero; all of these are alive, or all but one.
    """
    count, own, at = int(number.max()) + 1, number >= 0, number.clamp_min(0)
    least = x.new_full((count,), math.inf).scatter_reduce(0, number[own], x[own], "amin")
    zeros = x - least[at] <= max(1e2 * noise, 1e-12) * x.abs().max()
    told = x.new_zeros(count).index_add(0, number[own], zeros[own].to(x))
    floating = own & (told < 2)[at]
    return shifted(x, number, -least), floating if bool(floating.any()) else None


def shifts(
    steps: Sequence[Step], position: int, x: Tensor, number: Tensor
) -> Callable[[Tensor], Tensor] | None:
    r""":math:`\sum\phi^{-1}(s(x + c)) = n\beta`: from factors to the open constants.

    Parameters
    ----------
    steps, position
        The model, and the step whose output is ``x``.
    x, number : Tensor
        The value up to factor and constants.

    Returns
    -------
    callable or None
        None where no activation of one way and no norm below tell.
    """
    position = unshaped(steps, position)
    return None if position < 0 else _by_means(steps, position, x, number)


def unshaped(steps: Sequence[Step], position: int) -> int:
    """Position of the next step at or below that does more than to name entries anew."""
    while position >= 0 and steps[position].rule.reshapes:
        position -= 1
    return position


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
