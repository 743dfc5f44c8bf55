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
from torch import Tensor, nn

from .errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    UnsupportedLayerError,
    VanishingGradientError,
)

__all__ = [
    "KINDS",
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


def _dense(tensor: object, name: str) -> Tensor:
    """``tensor``, if its entries are numbers in memory."""
    if not isinstance(tensor, Tensor):
        raise InvalidTensorError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.layout != torch.strided:
        raise InvalidTensorError(f"{name} is stored as {tensor.layout}: give {name}.to_dense().")
    if tensor.is_quantized:
        raise InvalidTensorError(f"{name} is quantised: give {name}.dequantize().")
    if tensor.is_meta:
        raise InvalidTensorError(f"{name} is on the meta device and holds no numbers.")
    if tensor.is_complex():
        raise InvalidTensorError(f"{name} has dtype {tensor.dtype}, not a real one.")
    return tensor


def _finite(tensor: object, name: str) -> Tensor:
    tensor = _dense(tensor, name)
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
    if not inputs.ndim or not targets.ndim:
        raise InvalidTensorError("inputs and targets need an axis of samples: .unsqueeze(0).")
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


def _model(model: object, name: str) -> None:
    """Refuse what is no module, or one whose numbers cannot be computed with."""
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"{name} must be a torch.nn.Module, got {_said(model)}: build the network first."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidArgumentError(f"{name} is a ScriptModule: give the module it was made from.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InvalidArgumentError(f"{name} is wrapped in DataParallel: give {name}.module.")
    for own, p in model.named_parameters():
        if isinstance(p, nn.UninitializedParameter):
            raise UnsupportedLayerError(
                f"{own} is not initialised yet: call the model once, so that it takes shape."
            )
        if not _dense(p, f"The parameter {own}").is_floating_point():
            raise InvalidTensorError(f"The parameter {own} has dtype {p.dtype}, not a real one.")
        if p.numel() and not all(map(math.isfinite, torch.aminmax(p.detach()))):
            raise InvalidTensorError(
                f"The parameter {own} has NaN or infinite entries: give the weights that the "
                "client began with."
            )


def _convolution(conv: object, name: str) -> None:
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise UnsupportedLayerError(
            f"{_said(conv)} is not a convolution: give an nn.Conv1d, Conv2d or Conv3d."
        )
    _model(conv, name)


def _shape(shape: object, name: str) -> None:
    """Refuse what is no shape of one sample."""
    listed = isinstance(shape, tuple | list) and len(shape) > 0
    if not listed or not all(type(n) is int and n > 0 for n in shape):  # type: ignore[attr-defined]
        raise InvalidArgumentError(
            f"{name} is the shape of one sample, positive whole numbers such as (3, 32, 32); "
            f"got {shape!r}."
        )


def _loss(loss: object, name: str) -> None:
    """Refuse what is no function of outputs and targets."""
    if isinstance(loss, type) or not callable(loss):
        raise InvalidArgumentError(
            f"{name} must be a loss such as torch.nn.CrossEntropyLoss(), got {_said(loss)}."
        )


def each(check: Callable[[object, str], object]) -> Callable[[object, str], None]:
    """The same check of one, or of each in a sequence of them."""

    def check_each(value: object, name: str) -> None:
        for one in value if isinstance(value, tuple | list) and value else [value]:
            check(one, name)

    return check_each


def _said(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


# what an argument must be, by its annotation; other modules add the types that they define
KINDS: dict[str, Callable[[object, str], object]] = {
    "Tensor": _dense,
    **dict.fromkeys(("nn.Module", "nn.Sequential"), _model),
    "Conv": _convolution,
    "nn.Module | Sequence[nn.Module]": each(_model),
    **dict.fromkeys(("tuple[int, ...]", "Shape"), _shape),
    **dict.fromkeys(("Loss", "nn.CrossEntropyLoss"), _loss),
}

_P = ParamSpec("_P")
_R = TypeVar("_R")
_SHAPE = re.compile(r"^Float\[Tensor, [\"']([^\"']*)[\"']\]")


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check arguments against their annotations before the function runs.

    ``Float[Tensor, " m n"]`` (jaxtyping's notation; ``...`` is any shape, a name the same size
    throughout the call) must be a finite floating-point tensor of that shape; the function gets
    it in float64, detached, on the device of the first. Tensors, models, losses and shapes
    must be what their annotation says (:data:`KINDS`), and are handed on as they are.

    Raises
    ------
    InvalidTensorError
        From the wrapped function, if a tensor is something else; the message names it.
    InvalidArgumentError
        If another argument is.
    """
    signature = inspect.signature(function)
    declared = {name: str(p.annotation) for name, p in signature.parameters.items()}
    shapes = {n: m[1].split() for n, text in declared.items() if (m := _SHAPE.match(text))}
    bare = {n: text.removesuffix(" | None") for n, text in declared.items()}
    bare |= dict.fromkeys({"loss"} & declared.keys(), "Loss")  # a module or a function

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        call = signature.bind(*args, **kwargs)
        sizes: dict[str, int] = {}
        device: torch.device | None = None
        for name, value in call.arguments.items():
            if value is None and "None" in declared[name]:
                continue
            if name in shapes:
                tensor = finite(value, name)
                _fit(tensor, name, shapes[name], sizes)
                device = device or tensor.device
                call.arguments[name] = tensor.to(device)
            elif bare[name] in KINDS:
                KINDS[bare[name]](value, name)
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
