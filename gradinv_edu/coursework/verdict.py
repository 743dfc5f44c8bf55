"""What a check says: that an answer is right, or what kind of wrong it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .wrong import WrongAnswerError

Student = Callable[..., Any]
Wrong = tuple[str, Tensor]

ROUNDING = 1e-9
SINGLE = 1e-4
UNFINISHED = "Not done yet: put your code where `raise NotImplementedError` stands."


def right(text: str) -> None:
    """Say that an exercise is solved, and what has been shown by it."""
    print(f"Right. {text}")


def refuse(hint: str) -> None:
    """Raise :class:`WrongAnswerError`."""
    raise WrongAnswerError(hint) from None


def demand(condition: object, hint: str) -> None:
    """Refuse with ``hint`` unless ``condition`` holds."""
    if not condition:
        refuse(hint)


def ask(function: Student, *arguments: object, case: str = "") -> Any:
    """Call a student's function; what goes wrong inside is told with its case."""
    name = getattr(function, "__name__", "your answer")
    demand(callable(function), f"{name} is a {type(function).__name__}; define a function.")
    try:
        answer = function(*arguments)
    except NotImplementedError:
        raise WrongAnswerError(UNFINISHED) from None
    except Exception as error:
        where = f" {case}" if case else ""
        raise WrongAnswerError(
            f"{name} stopped{where} with {type(error).__name__}: {error}"
        ) from error
    demand(
        answer is not None, f"{name} returned nothing (None): does it end in a return statement?"
    )
    return answer


def tensor(value: object, what: str) -> Tensor:
    """``value`` as a float64 tensor, or a verdict on what it is instead."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise WrongAnswerError(f"{what} must be a tensor; yours is a {type(value).__name__}.")
    return value.detach().to(torch.float64)


def pair(value: object, what: str) -> tuple[Any, Any]:
    """``value`` as two things, or a verdict on what it is instead."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise WrongAnswerError(f"{what} must be two things, in this order: `return first, second`.")
    return value[0], value[1]


def distance(answer: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry of the truth; NaN counts as infinite."""
    if answer.shape != truth.shape:
        return float("inf")
    gap = (answer - truth).abs().max() / truth.abs().max().clamp(min=1e-300)
    return float(gap.nan_to_num(nan=torch.inf))


def _same(answer: Tensor, wrong: Tensor, tolerance: float) -> bool:
    wrong = wrong.detach().to(torch.float64)
    if answer.shape != wrong.shape:
        return False
    holes = wrong.isfinite().logical_not()
    if bool(holes.any()):
        return torch.equal(holes, answer.isfinite().logical_not())
    return distance(answer, wrong) < tolerance


def compare(
    value: object,
    truth: Tensor,
    what: str,
    mistakes: Sequence[Wrong] = (),
    tolerance: float = ROUNDING,
) -> None:
    """Accept ``value`` if it is ``truth``; otherwise say which known mistake would give it.

    Parameters
    ----------
    value : object
        What the student's function returned.
    truth : Tensor
        What is right.
    what : str
        Name of the value, as the sentence's subject.
    mistakes : sequence of (hint, wrong value)
        What known mistakes would have given here; the first that agrees is told.
    tolerance : float
        Largest relative difference that counts as rounding.
    """
    answer = tensor(value, what)
    truth = truth.detach().to(torch.float64)
    if distance(answer, truth) < tolerance:
        return
    for hint, wrong in mistakes:
        told_apart = not _same(truth, wrong, SINGLE)
        if told_apart and _same(answer, wrong, max(tolerance, SINGLE)):
            refuse(hint)
    demand(
        answer.shape == truth.shape,
        f"{what} has shape {tuple(answer.shape)}, and should have {tuple(truth.shape)}.",
    )
    refuse(_kind(answer, truth, what))


def _kind(answer: Tensor, truth: Tensor, what: str) -> str:
    """Say in general what kind of wrong an answer is."""
    if not bool(answer.isfinite().all()):
        return f"{what} has entries that are NaN or infinite: was something divided by zero?"
    if distance(answer, truth) < SINGLE:
        return (
            f"{what} is right to a few digits only: everything here is float64, so did you "
            "compute, or compare, in float32? (torch.tensor(0.2) is, and so are two plain numbers "
            "in torch.where.)"
        )
    factor = float((answer * truth).sum() / truth.square().sum())
    if factor != 0 and distance(answer / factor, truth) < SINGLE:
        return f"{what} has the right direction, but is {factor:.4g} times what it should be."
    wrong = (answer - truth).abs() > SINGLE * truth.abs().max()
    return f"{what} is wrong in {int(wrong.sum())} of {truth.numel()} entries."
