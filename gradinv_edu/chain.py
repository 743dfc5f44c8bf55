"""A model as a chain of layers, whatever way its forward pass is written."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
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


class Residual(nn.Module):
    r""":math:`x \mapsto f(x) + g(x)`: two ways from one place, summed, as one layer.

    Parameters
    ----------
    branch, shortcut : sequence of (str, nn.Module)
        Layers of either way, first to last, with their names in the model; none: the identity.
    """

    def __init__(
        self, branch: Sequence[tuple[str, nn.Module]], shortcut: Sequence[tuple[str, nn.Module]]
    ) -> None:
        super().__init__()
        self.ways = (tuple(branch), tuple(shortcut))
        self.layers = nn.ModuleList(module for way in self.ways for _, module in way)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of both ways."""
        ends = []
        for way in self.ways:
            y = x
            for _, module in way:
                y = module(y.clone() if getattr(module, "inplace", False) else y)
            ends.append(y)
        return ends[0] + ends[1]

    def names(self) -> Iterator[tuple[str, str]]:
        """Every parameter's name in this layer, and in the model."""
        layers = [layer for way in self.ways for layer in way]
        for index, (prefix, module) in enumerate(layers):
            for own, known in parameter_names(module):
                full = known if isinstance(module, Residual) else _join(prefix, known)
                yield f"layers.{index}.{own}", full


def parameter_names(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a layer's parameters, and what the model calls them below the layer's own name."""
    if isinstance(module, Residual):
        yield from module.names()
    else:
        for name, _ in module.named_parameters():
            yield name, name


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

    @property
    def summing(self) -> bool:
        """Whether two ways meet in the layer: a residual block."""
        return isinstance(self.module, Residual)

    def parameters(self) -> Iterator[tuple[str, str]]:
        """Name of every parameter in the layer, and in the model."""
        for own, known in parameter_names(self.module):
            yield own, known if self.summing else _join(self.name, known)


def trace(model: nn.Module, input_shape: tuple[int, ...], *, sums: bool = False) -> list[Step]:
    """List the layers of ``model`` from the input to the output.

    Parameters
    ----------
    model : nn.Module
        A (nested) ``nn.Sequential``, or any module whose forward pass ``torch.fx`` can trace and
        which is a chain: each layer takes the output of the one before.
    input_shape : tuple of int
        Shape of one input, without the batch dimension.
    sums : bool
        Whether two ways that part and meet again in a sum become one :class:`Residual` layer;
        refused otherwise.

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
    named = _sequential(double, sums) if _all_sequential(double) else _traced(double, sums)
    _refuse_sharing(list(_flat(named)))
    return _with_shapes(named, tuple(input_shape), double)


def _all_sequential(model: nn.Module) -> bool:
    return isinstance(model, nn.Sequential) or _is_layer(model)


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn") or isinstance(module, Reshape)


def _sequential(model: nn.Module, sums: bool, prefix: str = "") -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Sequential):
        if _is_layer(model):
            return [(prefix, model)]
        return _below(prefix, _traced(model, sums))
    return [
        layer
        for name, child in model._modules.items()  # named_children() names a shared layer once
        if child is not None
        for layer in _sequential(child, sums, _join(prefix, name))
    ]


def _below(prefix: str, layers: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The same layers by their names in the model that holds them as ``prefix``."""
    named = []
    for name, module in layers:
        if isinstance(module, Residual):
            module = Residual(*(_below(prefix, way) for way in module.ways))
        named.append((_join(prefix, name), module))
    return named


def _join(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


_Way = tuple[tuple[fx.Node, tuple[tuple[str, nn.Module], ...]], ...]  # nodes from the input on


def _traced(model: nn.Module, sums: bool) -> list[tuple[str, nn.Module]]:
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:
        raise UnsupportedLayerError(
            f"torch.fx cannot trace the forward pass of {type(model).__name__}: {error}. "
            "Write it without control flow on data, or as nn.Sequential."
        ) from error
    ways: dict[fx.Node, _Way] = {}
    previous: fx.Node | None = None
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and not node.users):
            continue
        if node.op == "placeholder":
            _refuse_second_input(previous, node)
            ways[node] = ()
        elif node.op == "output":
            return _all_used(ways, previous, node, sums)
        elif _is_size_query(node):
            continue
        else:
            ways[node] = _way_to(graph, ways, previous, node, sums)
        previous = node
    raise UnsupportedLayerError(f"{type(model).__name__} returns nothing.")


def _way_to(
    graph: fx.GraphModule,
    ways: dict[fx.Node, _Way],
    previous: fx.Node | None,
    node: fx.Node,
    sums: bool,
) -> _Way:
    sources = _sources(node)
    if sums and len(sources) == 2 and _kind(node) in _SUMS and not node.kwargs:
        return _met(ways, node, *sources)
    if not sums or len(sources) != 1 or sources[0] not in ways:
        _refuse_branch(previous, node)
    return (*ways[sources[0]], (node, tuple(_layers_of(graph, node, sums))))


def _met(ways: dict[fx.Node, _Way], node: fx.Node, one: fx.Node, other: fx.Node) -> _Way:
    """One layer for what lies between the place where two ways part and their sum."""
    a, b = ways[one], ways[other]
    common = 0
    while common < min(len(a), len(b)) and a[common][0] is b[common][0]:
        common += 1
    branch, shortcut = (
        [layer for _, layers in way[common:] for layer in layers]
        for way in sorted((a, b), key=len, reverse=True)
    )
    return (*a[:common], (node, ((node.name, Residual(branch, shortcut)),)))


def _all_used(
    ways: dict[fx.Node, _Way], previous: fx.Node | None, output: fx.Node, sums: bool
) -> list[tuple[str, nn.Module]]:
    """Layers on the way to the output, after checking that none lies beside it."""
    (last,) = _sources(output) if sums and len(_sources(output)) == 1 else (None,)
    if last is None or last not in ways:
        _refuse_branch(previous, output)
        assert previous is not None
        last = previous
    layers = [layer for _, found in ways[last] for layer in found]
    on_the_way = {id(module) for _, module in _flat(layers)}
    for node, way in ways.items():
        for name, module in _flat(way[-1][1] if way else ()):
            if id(module) not in on_the_way:
                raise UnsupportedLayerError(
                    f"The model is not a chain: {name or node.name!r} does not lead to its output."
                )
    return layers


def _flat(layers: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Layers one by one, those inside residual blocks as well."""
    for name, module in layers:
        if isinstance(module, Residual):
            for way in module.ways:
                yield from _flat(way)
        else:
            yield name, module


def _sources(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if not _is_size_query(n) and n.op != "get_attr"]


def _kind(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


_SUMS = {"add", "add_", "iadd"}


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
    used = _sources(node)
    if used != [previous]:
        sources = ", ".join(n.name for n in used) or "nothing"
        raise UnsupportedLayerError(
            f"The model is not a chain: {node.name!r} takes {sources}, where the layer before is "
            f"{previous.name if previous else None!r}. Branches are handled where two of them "
            "part and meet again in a sum (residual connections)."
        )


def _layers_of(graph: fx.GraphModule, node: fx.Node, sums: bool) -> list[tuple[str, nn.Module]]:
    if node.op == "call_module":
        return _sequential(graph.get_submodule(str(node.target)), sums, str(node.target))
    module = _from_call(node)
    if module is None:
        raise UnsupportedLayerError(
            f"{node.name!r} calls {getattr(node.target, '__name__', node.target)}, which is not "
            "among the operations that the recursion can undo; use the layer from torch.nn."
        )
    return [(node.name, module)]


def _from_call(node: fx.Node) -> nn.Module | None:
    make = _CALLS.get(_kind(node))
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
        if not isinstance(y, Tensor):
            raise UnsupportedLayerError(
                f"{name or type(module).__name__} gives a {type(y).__name__}, not one tensor."
            )
        steps.append(Step(name, module, tuple(x.shape[1:]), tuple(y.shape[1:])))
        x = y
    return steps


def _shape_only(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, Residual):
        module = copy.deepcopy(module).eval()
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
        return x  # neither statistics nor random numbers are spent on a shape
    output: Tensor = module(x)
    return output
