"""A model as a chain of layers, whatever way its forward pass is written."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .activations import is_elementwise
from .errors import InvalidTensorError, UnsupportedLayerError

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity)


class Reshape(nn.Module):
    """A call of ``view``, ``reshape`` or ``flatten`` in a forward pass, as a layer."""

    def __init__(self, start: int = 1) -> None:
        super().__init__()
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        """Flatten from dimension ``start`` on."""
        return x.flatten(self.start)


@dataclass(frozen=True)
class Step:
    """One layer of the chain: its name in the model, and the shapes around it (no batch)."""

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def weighted(self) -> bool:
        """Whether the layer is linear in its input with a weight of its own."""
        return isinstance(self.module, WEIGHTED)

    @property
    def pooling(self) -> bool:
        """Whether the layer averages: linear, without a weight."""
        return isinstance(self.module, POOLS)

    @property
    def elementwise(self) -> bool:
        """Whether the layer acts entry by entry."""
        return is_elementwise(self.module)

    @property
    def reshaping(self) -> bool:
        """Whether the layer only renames the entries."""
        return isinstance(self.module, (*RESHAPES, Reshape))


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> list[Step]:
    """List the layers of ``model`` from the input to the output.

    Parameters
    ----------
    model : nn.Module
        A (nested) ``nn.Sequential``, or any module whose forward pass ``torch.fx`` can trace and
        which is a chain: each layer takes the output of the one before.
    input_shape : tuple of int
        Shape of one input, without the batch dimension.

    Returns
    -------
    list of Step
        On a float64 copy of the model in the same train or eval mode; the caller's model is
        left alone.

    Raises
    ------
    UnsupportedLayerError
        If the forward pass branches, shares a weighted layer, or cannot be traced; the message
        names the place.
    InvalidTensorError
        If the model does not take inputs of this shape.
    """
    double = copy.deepcopy(model).to(torch.float64).requires_grad_(False)
    named = _sequential(double) if _all_sequential(double) else _traced(double)
    _refuse_sharing(named)
    return _with_shapes(named, tuple(input_shape), double)


def _all_sequential(model: nn.Module) -> bool:
    return isinstance(model, nn.Sequential) or _is_layer(model)


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn") or isinstance(module, Reshape)


def _sequential(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Sequential):
        if _is_layer(model):
            return [(prefix, model)]
        return [(_join(prefix, name), module) for name, module in _traced(model)]
    return [
        layer
        for name, child in model._modules.items()  # named_children() names a shared layer once
        if child is not None
        for layer in _sequential(child, _join(prefix, name))
    ]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _traced(model: nn.Module) -> list[tuple[str, nn.Module]]:
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:
        raise UnsupportedLayerError(
            f"torch.fx cannot trace the forward pass of {type(model).__name__}: {error}. "
            "Write it without control flow on data, or as nn.Sequential."
        ) from error
    layers: list[tuple[str, nn.Module]] = []
    previous: fx.Node | None = None
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and not node.users):
            continue
        if node.op == "placeholder":
            _refuse_second_input(previous, node)
        elif node.op == "output":
            _refuse_branch(previous, node)
            continue
        elif not _is_size_query(node):
            _refuse_branch(previous, node)
            layers += _layers_of(graph, node)
        else:
            continue
        previous = node
    return layers


def _is_size_query(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target == "size") or node.target in (
        getattr,
        operator.getitem,
    )


def _refuse_second_input(previous: fx.Node | None, node: fx.Node) -> None:
    if previous is not None:
        raise UnsupportedLayerError(
            f"The model takes a second input, {node.name!r}; one is handled."
        )


def _refuse_branch(previous: fx.Node | None, node: fx.Node) -> None:
    used = [n for n in node.all_input_nodes if not _is_size_query(n) and n.op != "get_attr"]
    if used != [previous]:
        sources = ", ".join(n.name for n in used) or "nothing"
        raise UnsupportedLayerError(
            f"The model is not a chain: {node.name!r} takes {sources}, where the layer before is "
            f"{previous.name if previous else None!r}. Sums and concatenations of branches "
            "(residual connections) make one joint system, which is not solved here."
        )


def _layers_of(graph: fx.GraphModule, node: fx.Node) -> list[tuple[str, nn.Module]]:
    if node.op == "call_module":
        return _sequential(graph.get_submodule(str(node.target)), str(node.target))
    module = _from_call(node)
    if module is None:
        raise UnsupportedLayerError(
            f"{node.name!r} calls {getattr(node.target, '__name__', node.target)}, which is not "
            "among the operations that the recursion can undo; use the layer from torch.nn."
        )
    return [(node.name, module)]


def _from_call(node: fx.Node) -> nn.Module | None:
    key = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    make = _CALLS.get(str(key))
    return make(*node.args[1:], **_options(node)) if make else None


def _options(node: fx.Node) -> dict[str, object]:
    return {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}


def _dropout(p: float = 0.5, training: bool = True) -> nn.Module:
    return nn.Dropout(p).train(training)


def _flatten(start_dim: int = 0, end_dim: int = -1) -> nn.Module:
    if end_dim != -1 or start_dim == 0:
        raise UnsupportedLayerError("flatten must keep the batch dimension: use flatten(x, 1).")
    return Reshape(start_dim)


def _view(*shape: object) -> nn.Module:
    flat = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
    if not isinstance(flat, tuple) or len(flat) != 2:
        raise UnsupportedLayerError("view and reshape are handled where they flatten: (N, -1).")
    return Reshape(1)


_CALLS: dict[str, Callable[..., nn.Module]] = {
    "relu": lambda: nn.ReLU(),
    "relu_": lambda: nn.ReLU(),
    "leaky_relu": lambda negative_slope=0.01: nn.LeakyReLU(negative_slope),
    "elu": lambda alpha=1.0: nn.ELU(alpha),
    "celu": lambda alpha=1.0: nn.CELU(alpha),
    "selu": lambda: nn.SELU(),
    "softplus": lambda beta=1.0, threshold=20.0: nn.Softplus(beta, threshold),
    "sigmoid": lambda: nn.Sigmoid(),
    "tanh": lambda: nn.Tanh(),
    "avg_pool1d": nn.AvgPool1d,
    "avg_pool2d": nn.AvgPool2d,
    "avg_pool3d": nn.AvgPool3d,
    "adaptive_avg_pool1d": nn.AdaptiveAvgPool1d,
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
    "adaptive_avg_pool3d": nn.AdaptiveAvgPool3d,
    "max_pool2d": nn.MaxPool2d,
    "dropout": _dropout,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
}


def _refuse_sharing(layers: list[tuple[str, nn.Module]]) -> None:
    seen: dict[int, str] = {}
    for name, module in layers:
        if not any(True for _ in module.parameters()):
            continue
        if id(module) in seen:
            raise UnsupportedLayerError(
                f"{name} and {seen[id(module)]} are the same layer, used twice: its gradient "
                "is the sum of both uses, which the recursion cannot take apart."
            )
        seen[id(module)] = name


def _with_shapes(
    layers: list[tuple[str, nn.Module]], input_shape: tuple[int, ...], model: nn.Module
) -> list[Step]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x = torch.zeros(1, *input_shape, dtype=torch.float64, device=device)
    steps = []
    for name, module in layers:
        try:
            with torch.no_grad():
                y = _shape_only(module, x)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InvalidTensorError(
                f"{name or type(module).__name__} does not take inputs of shape "
                f"{tuple(x.shape[1:])}; is input_shape {input_shape} right? ({error})"
            ) from None
        steps.append(Step(name, module, tuple(x.shape[1:]), tuple(y.shape[1:])))
        x = y
    return steps


def _shape_only(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
        return x  # neither statistics nor random numbers are spent on a shape
    output: Tensor = module(x)
    return output
