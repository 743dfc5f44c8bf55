"""Models by name: a module's factory, torchvision, the course; and what torch says of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    UnknownNameError,
    UnsupportedLayerError,
    UpdateFileError,
)

__all__ = ["load_model", "load_weights", "told"]

NETS = ("cnn6", "cnn6_d", "lenet", "lenet_dlg", "photo_cnn", "resnet", "wide_cnn")


def load_model(name: str, input_shape: tuple[int, ...] = ()) -> nn.Module:
    """Make the model that a name stands for, in train mode, as a client trains it.

    Parameters
    ----------
    name : str
        ``module:factory`` (a function of nothing, or a module object), the name of a classifier
        in torchvision, or ``gradinv:NAME`` for a network of :mod:`gradinv_edu.kit.models`.
        UnknownNameError if there is none; InvalidArgumentError if it makes no ``nn.Module``,
        UnsupportedLayerError if it makes a program of ``torch.export``.
    input_shape : tuple of int
        Given to the networks of :mod:`gradinv_edu.kit.models`.
    """
    home, _, factory = name.partition(":")
    if home == "gradinv":
        made = _own(factory, input_shape or (3, 32, 32))
    else:
        made = _imported(home, factory) if factory else _torchvision(name)
    if not isinstance(made, nn.Module):
        raise InvalidArgumentError(f"{name} makes a {type(made).__name__}, not a torch.nn.Module.")
    try:
        return made.train()
    except NotImplementedError:  # torch.export's programs stay in the mode of their export
        raise UnsupportedLayerError(
            f"{name} makes a program of torch.export, which has operations and no layers: load its "
            "state_dict into the network that it was exported from."
        ) from None


def _own(name: str, input_shape: tuple[int, ...]) -> object:
    if name not in NETS:
        raise UnknownNameError(f"No network {name!r} in the course; {', '.join(NETS)}.")
    try:
        made: object = getattr(models, name)(input_shape)
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from None
    return made


def _imported(home: str, factory: str) -> object:
    sys.path.insert(0, "")  # as python -m does: modules in the present folder
    try:
        made: Any = attrgetter(factory)(importlib.import_module(home))
    except (ImportError, AttributeError) as error:
        raise UnknownNameError(f"Cannot import {home}:{factory}: {error}.") from None
    finally:
        sys.path.remove("")
    try:
        return made if isinstance(made, nn.Module) or not callable(made) else made()
    except Exception as error:  # the factory is the user's: whatever it raises is told
        raise InvalidArgumentError(f"{home}:{factory}() raised {_plain(error)}") from error


def _torchvision(name: str) -> object:
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UnknownNameError(
            f"torchvision has no classifier {name!r}; for your own give module:factory, for one "
            f"of the course gradinv:NAME ({', '.join(NETS)})."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: object = torchvision.models.get_model(name, weights=None)
    return model


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill a model from a safetensors file.

    UpdateFileError if it cannot be read, InvalidTensorError if it is another model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UpdateFileError(
            f"Cannot read weights from {path}: {error}. Give a safetensors file."
        ) from None
    except RuntimeError as error:
        message = " ".join(str(error).split())
        raise InvalidTensorError(f"The weights in {path} are another model's: {message}") from None
    return model


def _plain(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def told(name: str, model: nn.Module, shape: tuple[int, ...]) -> Iterator[None]:
    """Say in words what torch raises of a model that does not take the input, or be traced.

    InvalidTensorError of the one, UnsupportedLayerError of the other.
    """
    mode, weight = model.training, next(model.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            model.eval()(weight.new_zeros(1, *shape))
    except Exception as error:  # whatever the model's own code raises
        raise InvalidTensorError(
            f"{name} does not take inputs of shape {shape}: {_plain(error)} "
            "Give --input the shape that it was made for."
        ) from error
    finally:
        model.train(mode)
    try:
        yield
    except (GradientInversionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.fx raises what the model's code raises on its proxies
        raise UnsupportedLayerError(
            f"{name} cannot be taken apart into layers: {_plain(error)} Write its forward without "
            "branches on sizes or values, or give the part of it that meets the input."
        ) from error
