"""Validation shared by every module: a bad tensor is refused by name before it is used."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    VanishingGradientError,
)

__all__ = [
    "as_many",
    "checked",
    "finite",
    "fits",
    "fitting",
    "not_all_zero",
    "number",
    "shaped",
    "whole",
]


def finite(tensor: object, name: str) -> Tensor:
    """Return ``tensor`` in float64, on its own device, detached.

    Raises
    ------
    InvalidTensorError
        If it is not a real floating-point tensor, is empty, or holds NaN or infinite entries.
    """
    return _finite(tensor, name).detach().to(torch.float64)


def _finite(tensor: object, name: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise InvalidTensorError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise InvalidTensorError(
            f"{name} has dtype {tensor.dtype}, not a real floating-point one: "
            "convert it with .to(torch.float64)."
        )
    if tensor.numel() == 0:
        raise InvalidTensorError(f"{name} is empty, shape {tuple(tensor.shape)}.")
    if not all(math.isfinite(end) for end in torch.aminmax(tensor.detach())):  # no copy
        bad = int((~torch.isfinite(tensor)).sum())
        raise InvalidTensorError(
            f"{name} has {bad} NaN or infinite entries of {tensor.numel()}; "
            "drop the update or find where the client's loss overflowed."
        )
    return tensor


def fits(tensor: object, name: str, shape: Sequence[int]) -> None:
    """Refuse ``tensor`` unless it is finite, floating-point and of this shape; nothing is copied.

    Raises
    ------
    InvalidTensorError
        As :func:`finite`, or if the shape differs from ``shape``.
    """
    have = tuple(_finite(tensor, name).shape)
    if have != tuple(shape):
        raise InvalidTensorError(f"{name} has shape {have}, expected {tuple(shape)}.")


def shaped(tensor: Tensor, name: str, shape: Sequence[int]) -> Tensor:
    """Return :func:`finite` of ``tensor`` if it :func:`fits`.

    Raises
    ------
    InvalidTensorError
        As :func:`fits`.
    """
    fits(tensor, name, shape)
    return tensor.detach().to(torch.float64)


def not_all_zero(tensor: Tensor, name: str) -> Tensor:
    """Return ``tensor`` unless every entry is zero.

    Raises
    ------
    VanishingGradientError
        If ``tensor`` is zero everywhere.
    """
    if not bool(tensor.any()):
        raise VanishingGradientError(
            f"{name} is zero everywhere: this layer learned nothing from the sample and so "
            "says nothing of it; use another layer or another update."
        )
    return tensor


def whole(value: object, name: str, least: int = 1) -> int:
    """Return ``value`` if it is a whole number, ``least`` or more.

    Raises
    ------
    InvalidArgumentError
        If it is something else, ``True`` and ``2.0`` among it.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidArgumentError(
            f"{name} must be a whole number, {least} or more; got {value!r}."
        )
    return value


def number(value: object, name: str, wanted: str, fits: Callable[[float], bool]) -> float:
    """Return ``value`` if it is a finite number that ``fits``; ``wanted`` says which ones do.

    Raises
    ------
    InvalidArgumentError
        If it is something else.
    """
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not fits(value):  # type: ignore[arg-type]
        raise InvalidArgumentError(f"{name} must be {wanted}, got {value!r}.")
    return value  # type: ignore[return-value]


def as_many(inputs: Tensor, targets: Tensor) -> None:
    """Refuse samples and labels that are not as many, or none.

    Raises
    ------
    InvalidTensorError
        If so; the message tells both numbers.
    """
    if not 0 < len(inputs) == len(targets):
        raise InvalidTensorError(
            f"There are {len(inputs)} inputs and {len(targets)} targets: there must be as many of "
            "one as of the other, one or more."
        )


@contextmanager
def fitting(refusal: str) -> Iterator[None]:
    """Say in the caller's words, which have shapes, what torch says of a product of matrices.

    Raises
    ------
    InvalidTensorError
        If what runs inside fails for a shape or a type; it opens with ``refusal``.
    """
    try:
        yield
    except (GradientInversionError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise InvalidTensorError(f"{refusal}: {error}") from error


_P = ParamSpec("_P")
_R = TypeVar("_R")
_SHAPE = re.compile(r"^Float\[Tensor, [\"']([^\"']*)[\"']\]")


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check tensors against the shapes in the signature before the function runs.

    Arguments annotated ``Float[Tensor, " m n"]`` (jaxtyping's notation; ``...`` is any shape,
    a name the same size throughout the call) must be finite floating-point tensors of that
    shape. The function gets them in float64, detached, on the device of the first.

    Raises
    ------
    InvalidTensorError
        From the wrapped function, if an argument is something else; the message names it.
    """
    signature = inspect.signature(function)
    declared = {name: str(p.annotation) for name, p in signature.parameters.items()}
    shapes = {n: m[1].split() for n, text in declared.items() if (m := _SHAPE.match(text))}

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        call = signature.bind(*args, **kwargs)
        sizes: dict[str, int] = {}
        device: torch.device | None = None
        for name, dims in shapes.items():
            value = call.arguments.get(name)
            if name not in call.arguments or (value is None and "None" in declared[name]):
                continue
            tensor = finite(value, name)
            _fit(tensor, name, dims, sizes)
            device = device or tensor.device
            call.arguments[name] = tensor.to(device)
        return function(*call.args, **call.kwargs)

    return wrapper


def _fit(tensor: Tensor, name: str, dims: Sequence[str], sizes: dict[str, int]) -> None:
    """Compare a shape with the declared one; names seen for the first time get their sizes."""
    if "..." in dims:
        return
    wanted = [int(d) if d.isdigit() else sizes.get(d) for d in dims]
    fits = tensor.dim() == len(dims) and all(
        want in (None, have) for want, have in zip(wanted, tensor.shape, strict=True)
    )
    if not fits:
        known = {d: sizes[d] for d in dims if d in sizes}
        where = ", ".join(f"{d} = {size}" for d, size in known.items())
        raise InvalidTensorError(
            f"{name} has shape {tuple(tensor.shape)}, expected ({', '.join(dims)})"
            + (f" with {where}." if where else ".")
        )
    sizes.update({d: n for d, n in zip(dims, tensor.shape, strict=True) if not d.isdigit()})
