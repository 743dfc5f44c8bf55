"""Values as JSON, and back: nothing that is read is executed or unpickled.

Tensors are bytes with a shape, networks a table of layers with their sizes.
"""

from __future__ import annotations

import base64
import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

DEEPEST = 40  # brackets within brackets
LARGEST = 2**16  # width of a layer; of kernels, strides and the like it is
LARGEST_WINDOW = 64
TYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.bool)
}
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_POOL = ("kernel_size", "stride", "padding")
LAYERS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"),
    "Conv1d": _CONV,
    "Conv2d": _CONV,
    "AvgPool2d": _POOL,
    "MaxPool2d": _POOL,
    "AdaptiveAvgPool2d": ("output_size",),
    "Flatten": ("start_dim", "end_dim"),
    "LeakyReLU": ("negative_slope",),
    "Dropout": ("p",),
    "BatchNorm2d": ("num_features",),
    **dict.fromkeys(("ReLU", "Tanh", "Sigmoid", "Softplus", "ELU", "Identity"), ()),
    **dict.fromkeys(("CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss"), ()),
}


class BadMessageError(ValueError):
    """What arrived is no message of this protocol."""


class Values:
    """Writes values down, and reads them back.

    Parameters
    ----------
    trusting : bool
        Whether records may be read: they may from the grader, and never from a submission.
    """

    def __init__(self, trusting: bool = False) -> None:
        self.trusting = trusting

    def pack(self, value: Any, depth: int = 0) -> Any:
        """Write a value down as JSON; raise ``TypeError`` for what cannot pass."""
        if depth > DEEPEST:
            raise TypeError("an answer that is nested too deeply")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return _pack_tensor(value)
        if isinstance(value, nn.Module):
            return {"net": [self.pack(part, depth + 1) for part in _pack_net(value)]}
        if isinstance(value, dict):
            pairs = [[self.pack(k, depth + 1), self.pack(v, depth + 1)] for k, v in value.items()]
            return {"dict": pairs}
        for kind in (list, tuple, set):
            if isinstance(value, kind):
                value = sorted(value, key=str) if kind is set else value
                return {kind.__name__: [self.pack(part, depth + 1) for part in value]}
        other = self._pack_other(value, depth)
        if other is not None:
            return other
        if dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            return {"record": self.pack(dict(_attributes(value)), depth + 1)}
        if hasattr(value, "item"):
            return self.pack(value.item(), depth + 1)  # a number of numpy
        raise TypeError(f"a {type(value).__name__} cannot be handed to the grader")

    def unpack(self, packed: Any) -> Any:
        """Read a value back; raise :class:`BadMessageError` for what is none."""
        try:
            return self._unpack(packed)
        except BadMessageError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, RuntimeError, RecursionError) as error:
            raise BadMessageError(f"an answer that cannot be read ({error})") from error

    def _unpack(self, packed: Any) -> Any:
        if not isinstance(packed, dict):
            if packed is None or type(packed) in (bool, int, float, str):
                return packed
            raise BadMessageError("an answer that cannot be read")
        ((kind, content),) = packed.items()
        if kind == "tensor":
            return _unpack_tensor(*content)
        if kind in ("list", "tuple", "set"):
            return {"list": list, "tuple": tuple, "set": set}[kind](map(self._unpack, content))
        if kind == "dict":
            return {self._unpack(k): self._unpack(v) for k, v in content}
        if kind == "net":
            return _unpack_net(*map(self._unpack, content))
        if kind == "record" and self.trusting:
            return Record(**self._unpack(content))
        return self._unpack_other(kind, content)

    def _pack_other(self, value: Any, depth: int) -> Any:
        """What only a connection can pass; ``None`` for what is plain."""
        if callable(value):
            raise TypeError(f"a {type(value).__name__} cannot be written down")
        return None

    def _unpack_other(self, kind: str, content: Any) -> Any:
        raise BadMessageError("an answer of a kind that is not allowed")


class Record(SimpleNamespace):
    """What the grader hands over of an object: its plain attributes."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def _pack_tensor(value: Tensor) -> dict[str, Any]:
    plain = value.detach().cpu().contiguous()
    kind = str(plain.dtype).removeprefix("torch.")
    if kind not in TYPES:
        plain, kind = plain.to(torch.float64), "float64"
    data = base64.b64encode(plain.numpy().tobytes()).decode()
    return {"tensor": [kind, list(plain.shape), data]}


def _unpack_tensor(kind: str, shape: list[int], data: str) -> Tensor:
    content, dtype = bytearray(base64.b64decode(data)), TYPES[kind]
    numbers = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return numbers.reshape([int(n) for n in shape])


def _pack_net(net: nn.Module) -> tuple[Any, ...]:
    """Its kind, its sizes or its parts, its numbers, and whether it trains."""
    kind = type(net).__name__
    if kind == "Sequential" and type(net) is nn.Sequential:
        return kind, list(net), {}, net.training
    if kind not in LAYERS or type(net) is not getattr(nn, kind):
        raise TypeError(
            f"a network with a layer {kind}; build it of nn.Sequential and {', '.join(LAYERS)}"
        )
    sizes = [getattr(net, name) for name in LAYERS[kind]]
    return kind, sizes, dict(net.state_dict()), net.training


def _unpack_net(kind: str, sizes: list[Any], state: dict[str, Tensor], training: bool) -> nn.Module:
    if kind == "Sequential":
        return nn.Sequential(*sizes).train(training)
    settings = dict(zip(LAYERS[kind], sizes, strict=True))
    for name, size in settings.items():
        most = LARGEST if name.endswith(("features", "channels")) else LARGEST_WINDOW
        if max(torch.as_tensor(size).flatten().tolist()) > most:
            raise BadMessageError(f"a layer {kind} with a size over {most}")
    if kind in ("Linear", "Conv1d", "Conv2d"):
        settings["bias"] = "bias" in state
    with torch.device("meta"):  # nothing is allocated for sizes that are merely claimed
        net: nn.Module = getattr(nn, kind)(**settings)
    net.load_state_dict(state, assign=True)
    return net.train(training)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """What a record says of itself, as far as it is plain."""
    found = {k: v for k, v in vars(value).items() if not k.startswith("_")}
    plain = (type(None), bool, int, float, str, Tensor, nn.Module, list, tuple, dict)
    return [
        (k, v)
        for k, v in found.items()
        if isinstance(v, plain) or dataclasses.is_dataclass(v) or isinstance(v, SimpleNamespace)
    ]
