"""Validation shared by every module: a bad tensor is refused by name before it is used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .errors import GradientInversionError, InvalidTensorError, VanishingGradientError


def finite(tensor: Tensor, name: str) -> Tensor:
    """Return ``tensor`` in float64, on its own device, detached.

    Raises
    ------
    InvalidTensorError
        If it is not a real floating-point tensor, is empty, or holds NaN or infinite entries.
    """
    if not isinstance(tensor, Tensor):
        raise InvalidTensorError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise InvalidTensorError(
            f"{name} has dtype {tensor.dtype}; gradients are real floating-point tensors: "
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
    return tensor.detach().to(torch.float64)


def shaped(tensor: Tensor, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """Return :func:`finite` of ``tensor`` after comparing its shape; ``None`` admits any size.

    Raises
    ------
    InvalidTensorError
        As :func:`finite`, or if the shape differs from ``shape``.
    """
    checked = finite(tensor, name)
    fits = checked.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, checked.shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        raise InvalidTensorError(f"{name} has shape {tuple(checked.shape)}, expected {wanted}.")
    return checked


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
