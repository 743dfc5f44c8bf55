"""A check that knows what is right for its own data, and no way of computing it.

In a student's folder this is ``checks/recorded.py``; ``cases.json`` beside it was recorded from
the real checks, with the answers of known mistakes and the hints that these earned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .values import Values
from .verdict import SINGLE, ask, compare, demand, distance, refuse, right

CASES = Path(__file__).with_name("cases.json")
VALUES = Values(trusting=True)


def recorded(name: str) -> Callable[..., None]:
    """Return the check of this name."""

    def check(student: Callable[..., Any]) -> None:
        _check(student, json.loads(CASES.read_text("utf-8"))[name])

    check.__name__ = name
    return check


def _check(student: Callable[..., Any], case: dict[str, Any]) -> None:
    for place, call in enumerate(case["calls"]):
        given = VALUES.unpack(call["given"])
        leaf = call.get("leaf")
        if leaf is not None:
            given[leaf].requires_grad_()
        answer = with_slope(ask(student, *given), given, leaf)
        truth = VALUES.unpack(call["truth"])
        if not call["judged"] or same(answer, truth, case["tolerance"], case["free"]):
            continue
        for wrong, hint in case["flips"].get(str(place), []):
            if type(answer) is type(wrong) and answer == wrong:
                refuse(hint)
        theirs = [
            m for m in case["mistakes"] if alike(sketch(answer), m["answers"].get(str(place)))
        ]
        if theirs and not same(answer, truth, SINGLE, case["free"]):
            rest = {place: sketch(answer)} | _sketches(student, case["calls"], place + 1)
            refuse(max(theirs, key=lambda m: _agreeing(m, rest))["hint"])
        _general(answer, truth, call["what"], case["tolerance"])
    right(case["right"])


def _sketches(student: Callable[..., Any], calls: list[Any], first: int) -> dict[int, Any]:
    """What a student answers to the other questions: it tells mistakes apart that look alike."""
    found = {}
    for place in range(first, len(calls)):
        given = VALUES.unpack(calls[place]["given"])
        with suppress(Exception):
            found[place] = sketch(student(*given))
    return found


def _agreeing(mistake: dict[str, Any], mine: dict[int, Any]) -> int:
    return sum(alike(m, mistake["answers"].get(str(place))) for place, m in mine.items())


def with_slope(answer: Any, given: list[Any], leaf: int | None) -> Any:
    """Return the answer, with its derivative by an argument where the check looks at that."""
    if leaf is None:
        return answer
    parts = list(answer) if isinstance(answer, tuple | list) else [answer]
    value = sum((p * weights(p.numel()).reshape(p.shape)).sum() for p in parts)
    slope = None
    if isinstance(value, Tensor) and value.requires_grad:
        slope = torch.autograd.grad(value, given[leaf], allow_unused=True)[0]
    return (*(p.detach() if isinstance(p, Tensor) else p for p in parts), slope)


def weights(count: int, turn: float = 1.0) -> Tensor:
    """Give numbers that no answer is orthogonal to."""
    return torch.cos(turn * torch.arange(1, count + 1, dtype=torch.float64).square())


def same(answer: Any, truth: Any, tolerance: float, free: bool = False) -> bool:
    """Say whether two answers are equal up to rounding; if ``free``, NaN stands for anything."""
    if isinstance(truth, tuple | list):
        if not isinstance(answer, tuple | list) or len(answer) != len(truth):
            return False
        return all(same(a, t, tolerance, free) for a, t in zip(answer, truth, strict=True))
    if isinstance(truth, dict):
        if not isinstance(answer, dict) or set(answer) != set(truth):
            return False
        return all(same(answer[k], t, tolerance, free) for k, t in truth.items())
    if isinstance(truth, bool):
        return not isinstance(answer, str | tuple | list) and bool(answer) == truth
    if truth is None or isinstance(truth, str | set):
        return bool(answer == truth)
    found, true = _tensor(answer), _tensor(truth)
    if found is None or found.numel() != true.numel() or (true.ndim and found.shape != true.shape):
        return False
    if torch.isinf(true).any():
        return torch.equal(found, true)
    found = found.reshape(true.shape)
    if not free and not torch.equal(found.isnan(), true.isnan()):
        return False
    found = torch.where(true.isnan(), 0.0, found)
    return distance(found, true.nan_to_num()) < tolerance


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64)
    return torch.tensor(float(value)).double() if isinstance(value, int | float) else None


def sketch(answer: Any) -> Any:
    """Give a few numbers by which a wrong answer is known again."""
    if isinstance(answer, tuple | list):
        return [sketch(part) for part in answer]
    if isinstance(answer, dict):
        return [[str(key), sketch(part)] for key, part in answer.items()]
    found = _tensor(answer) if not isinstance(answer, bool | str) else None
    if found is None:
        return repr(answer) if not isinstance(answer, set) else sorted(map(str, answer))
    holes = int((~found.isfinite()).sum())
    flat = found.nan_to_num(posinf=0.0, neginf=0.0).flatten()
    marks = [float(flat @ weights(len(flat), turn)) for turn in (1.0, 2.3)]
    return {"shape": list(found.shape), "holes": holes, "marks": [*marks, float(flat.norm())]}


def alike(mine: Any, theirs: Any) -> bool:
    """Say whether two sketches are of the same answer."""
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(alike, mine, theirs))
    if isinstance(mine, dict) and isinstance(theirs, dict):
        same_shape = (mine["shape"], mine["holes"]) == (theirs["shape"], theirs["holes"])
        size = max(theirs["marks"][2], 1e-300)
        pairs = zip(mine["marks"], theirs["marks"], strict=True)
        return same_shape and all(abs(a - b) < SINGLE * size for a, b in pairs)
    return bool(mine == theirs)


def _general(answer: Any, truth: Any, what: str, tolerance: float) -> None:
    """Say what kind of wrong an answer is that no known mistake gives."""
    if isinstance(truth, tuple | list):
        parts = isinstance(answer, tuple | list) and len(answer) == len(truth)
        demand(parts, f"{what} must be {len(truth)} things, in the order of the exercise.")
        for number, (part, true) in enumerate(zip(answer, truth, strict=True), start=1):
            if not same(part, true, tolerance):
                _general(part, true, f"part {number} of {what}", tolerance)
    elif isinstance(truth, Tensor) and not truth.isnan().any():
        compare(answer, truth, what, (), tolerance)
        refuse(f"{what} is not right.")
    elif isinstance(truth, float) and isinstance(answer, int | float | Tensor):
        compare(answer, torch.tensor(truth).double(), what, (), tolerance)
    demand(not isinstance(truth, Tensor), f"{what} is not right; NaN is for what nothing tells.")
    shown = answer if isinstance(answer, bool | int | float | str) else type(answer).__name__
    refuse(f"{what} is {shown!r}, which is not right.")
