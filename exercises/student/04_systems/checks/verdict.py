"""What a check says of an answer: that it is right, or what kind of wrong it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

Student = Callable[..., Any]

ROUNDING = 1e-9
SINGLE = 1e-4
AUTOGRAD = (  # what "without automatic differentiation" forbids
    *("torch.autograd.grad", "torch.autograd.backward", "torch.Tensor.backward"),
    *("torch.func.grad", "torch.func.vjp"),
)
UNFINISHED = "Not done yet: put your code where `raise NotImplementedError` stands."


class WrongAnswerError(AssertionError):
    """An answer is wrong; the message says in which way, and does not give the right one.

    ``share`` is the part of the points that it earns all the same.
    """

    share = 0.0

    def _render_traceback_(self) -> list[str]:
        """Show one sentence in a notebook, not a page of the check's own code."""
        return [f"Not right yet. {self}"]


class Mistakes:
    """The known mistakes of one exercise: ``class Shares(Mistakes, of="batches-shares")``.

    Each function is an answer as a student might give it, and its docstring is what such a
    student is told. A check tells it where :func:`expect` finds the same values, or where it
    demands what this mistake lacks. ``{…}`` in a docstring is filled in by :func:`demand`;
    "Like NAME." stands for the docstring of another; one in dots, "… words …", is a part of what
    the check says of any such answer. Functions with an underscore are helpers.
    """

    KNOWN: ClassVar[dict[str, list[Student]]] = {}
    OWN: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init_subclass__(cls, of: str, own: tuple[str, ...] = ()) -> None:
        """Note the mistakes of exercise ``of``, and the functions that earn nothing in it."""
        Mistakes.OWN[of] = own
        answers = {k: f for k, f in vars(cls).items() if callable(f) and not k.startswith("_")}
        for answer in answers.values():
            if other := re.fullmatch(r"Like (\w+)\.", answer.__doc__):
                answer.__doc__ = answers[other[1]].__doc__
        Mistakes.KNOWN[of] = list(answers.values())


def told(hint: str | Student, **facts: object) -> str:
    """Return a hint as one line, or that of a known mistake."""
    words = hint if isinstance(hint, str) else hint.__doc__ or ""
    return " ".join((words.format(**facts) if facts else words).split())


def pattern(mistake: Student) -> str:
    """Return the regular expression of what a known mistake is told, figures left open."""
    return re.sub(r"\\\{[^}]*\\\}|(\\ )?…(\\ )?", ".*", re.escape(told(mistake)))


def right(text: str) -> None:
    """Say that an exercise is solved, and what has been shown by it."""
    print(f"Right. {text}")


def refuse(hint: str | Student, **facts: object) -> None:
    """Raise :class:`WrongAnswerError`."""
    raise WrongAnswerError(told(hint, **facts)) from None


def demand(condition: object, hint: str | Student, **facts: object) -> None:
    """Refuse with ``hint``, or that of a known mistake, unless ``condition`` holds."""
    if not condition:
        refuse(hint, **facts)


def each(
    student: Student,
    cases: Iterable[tuple[Any, ...]],
    case: str = "",
    options: tuple[str, ...] = (),
) -> None:
    """Demand the right value of each case; one is its arguments, what is right, and the hint."""
    for *given, truth, hint in cases:
        answer = ask(student, *given, case=case.format(*given))
        if options:
            one = f"Answer with one of {', '.join(options)}; yours is {answer!r}."
            demand(isinstance(answer, str) and answer in options, one)
        demand((bool(answer) if isinstance(truth, bool) else answer) == truth, hint)


def ask(function: Student, *arguments: object, case: str = "") -> Any:
    """Call a student's function on copies; what goes wrong inside is told with its case."""
    name = getattr(function, "__name__", "your answer")
    demand(callable(function), f"{name} is a {type(function).__name__}; define a function.")
    try:
        answer = function(*_fresh(arguments))
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


def _fresh(value: Any) -> Any:
    """Copy tensors, also those in tuples and lists."""
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_fresh(part) for part in value)
    return value.clone() if isinstance(value, Tensor) else value


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, float64, the same for everyone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def expect(
    exercise: str,
    student: Student,
    given: tuple[Any, ...],
    truth: Any,
    what: str | tuple[str, str],
    case: str = "",
    tolerance: float = ROUNDING,
) -> Any:
    """Ask for one answer, accept the truth, and tell the known mistake that gives the same.

    Parameters
    ----------
    exercise : str
        Whose mistakes to try.
    student : function
        What a student wrote.
    given : tuple
        Its arguments; the mistakes get the same.
    truth : Tensor, number, or two of them
        What is right.
    what : str, or two
        Name of the answer, or of its two parts, as the sentence's subject.
    case : str
        Which case this is, for the sentence.
    tolerance : float
        Largest relative difference that counts as rounding.
    """
    answer = ask(student, *given, case=case)
    if isinstance(what, str):
        _part(answer, truth, f"{what} {case}".strip(), known(exercise, given), tolerance)
        return answer
    parts = pair(answer, f"{getattr(student, '__name__', 'your answer')}(...)")
    for i, name in enumerate(what):
        wrong = ((hint, both[i]) for hint, both in known(exercise, given))
        _part(parts[i], truth[i], f"{name} {case}".strip(), wrong, tolerance)
    return answer


def _part(
    value: object, truth: Any, what: str, wrong: Iterable[tuple[str, Any]], tolerance: float
) -> None:
    truth = torch.as_tensor(truth, dtype=torch.float64)
    answer = tensor(value, what)
    one = answer.reshape(()) if truth.ndim == 0 and answer.numel() == 1 else answer
    compare(one, truth, what, wrong, tolerance)


def known(exercise: str, given: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Give what each known mistake of ``exercise`` answers, with its hint."""
    for mistake in Mistakes.KNOWN[exercise]:
        if not told(mistake).startswith("…"):
            with suppress(Exception):  # a mistake that does not stand this case
                yield told(mistake), mistake(*_fresh(given))


def distance(answer: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry of the truth; NaN counts as infinite."""
    if answer.shape != truth.shape:
        return float("inf")
    gap = (answer - truth).abs().max() / truth.abs().max().clamp(min=1e-300)
    return float(gap.nan_to_num(nan=torch.inf))


def _same(answer: Tensor, wrong: Any, tolerance: float) -> bool:
    wrong = torch.as_tensor(wrong).detach().to(torch.float64)
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
    mistakes: Iterable[tuple[str, Any]] = (),
    tolerance: float = ROUNDING,
) -> None:
    """Accept ``value`` if it is ``truth``; otherwise say which known mistake would give it.

    ``mistakes`` are hints with the wrong values that they belong to; the first that agrees with
    ``value``, and not with ``truth``, is told.
    """
    answer = tensor(value, what)
    truth = truth.detach().to(torch.float64)
    if distance(answer, truth) < tolerance:
        return
    for hint, wrong in mistakes:
        if not _same(truth, wrong, SINGLE) and _same(answer, wrong, max(tolerance, SINGLE)):
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
