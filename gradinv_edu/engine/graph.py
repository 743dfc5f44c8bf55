"""A model read as steps from the input to the output, whatever way its forward pass is written."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import InvalidTensorError, UnsupportedLayerError
from .layers import RULES, Rule, rule_of
from .layers.activations import Hardsigmoid
from .layers.branches import OUT_OF_PLACE, Block, Call, Concatenation, Node, Product, Sum
from .layers.resampling import LinearCall
from .layers.reshaping import Permute, Reshape

__all__ = ["OPERATIONS", "Step", "in_float64", "trace", "unwatched"]


@dataclass(frozen=True)
class Step:
    """One layer on the way from the input to the output, where all that is known lies on one edge.

    Attributes
    ----------
    name : str
        In the model; of a block of branches, the operation in which they meet.
    rule : :class:`~gradinv_edu.engine.layers.base.Rule`
        Of the layer, on a float64 copy.
    input_shape, output_shape : tuple of int
        Without the batch dimension.
    """

    name: str
    rule: Rule
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.rule.module

    def full_name(self, own: str) -> str:
        """Name in the model of what the layer calls ``own``."""
        return f"{self.name}.{own}" if self.name else own

    def parameters(self) -> Iterator[tuple[str, str]]:
        """Name of every parameter in the layer, and in the model."""
        for own, _ in self.module.named_parameters():
            if isinstance(self.module, Block):
                _, index, rest = own.split(".", 2)
                yield own, f"{self.module.nodes[int(index)].name}.{rest}"
            else:
                yield own, self.full_name(own)


# Operations with one tensor for an input that go by another name than the layer that they are.
OPERATIONS: dict[str, Callable[..., nn.Module | None]] = {
    "dropout": lambda p=0.5, training=True: nn.Dropout(p).train(training),
    "contiguous": lambda *_, **__: nn.Identity(),
    "clone": lambda *_, **__: nn.Identity(),
    "clamp": lambda min=None, max=None: _clamp(min, max),
    "clip": lambda min=None, max=None: _clamp(min, max),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: nn.Hardtanh(min_val, max_val),
    "pixel_shuffle": nn.PixelShuffle,
    "pixel_unshuffle": nn.PixelUnshuffle,
    "channel_shuffle": nn.ChannelShuffle,
    "stochastic_depth": lambda p, mode, training=True: None if training else nn.Identity(),
}
IGNORED = {"inplace", "input", "_stacklevel", "dtype"}
PERMUTES = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"}
# linear where all but one of the arguments are constants; whether one is, a probe tells
LINEAR = {
    *("getitem", "narrow", "select", "index_select", "flip", "roll", "expand", "pad", "neg"),
    *("mean", "sum", "add", "add_", "iadd", "sub", "sub_", "isub", "rsub", "mul", "mul_", "imul"),
    *("div", "div_", "truediv", "itruediv", "cat", "concat", "stack", "einsum", "matmul"),
    *("interpolate", "upsample", "_patch_merging_pad", "tile", "repeat", "repeat_interleave"),
}
RESHAPES = {"flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"}
JOINS: dict[str, Callable[..., nn.Module]] = {
    **dict.fromkeys(("add", "add_", "iadd"), lambda *_, **__: Sum()),
    **dict.fromkeys(("mul", "mul_", "imul"), lambda *_, **__: Product()),
    **dict.fromkeys(("cat", "concat"), lambda _, dim=0: Concatenation(dim)),
}


def _clamp(low: float | None, high: float | None) -> nn.Module | None:
    if high is None:
        return nn.ReLU() if low == 0 else None
    return None if low is None else nn.Hardtanh(low, high)


def trace(model: nn.Module, input_shape: Sequence[int]) -> list[Step]:
    """List the layers of ``model`` from the input to the output.

    Where ways part and meet again, everything between is one step, a
    :class:`~gradinv_edu.engine.layers.branches.Block`.

    Parameters
    ----------
    model : nn.Module
        Any whose forward pass ``torch.fx`` can trace.
    input_shape : tuple of int
        Of one input, without the batch dimension.

    Returns
    -------
    list of Step
        On a float64 copy in the same train or eval mode; the caller's model is left alone.

    Raises
    ------
    UnsupportedLayerError
        If the forward pass cannot be traced, takes a second input, gives more than one tensor, or
        uses a layer with parameters twice; the message names the place.
    InvalidTensorError
        If the model does not take inputs of this shape.
    """
    double = in_float64(model)
    reader = _Reader(double, tuple(input_shape))
    tracer = _Tracer()
    if tracer.is_leaf_module(double, ""):
        reader.end(reader.layer("", double, [reader.input]))
    else:
        reader.read(_graph(tracer, double), tracer.node_name_to_scope)
    return reader.steps()


def in_float64(model: nn.Module) -> nn.Module:
    """Copy a model, nothing in place, no parameter with a gradient; what is float64 is shared."""
    parameters = {
        id(p): nn.Parameter(p.detach().to(torch.float64), requires_grad=False)
        for p in model.parameters()
        if not isinstance(p, nn.UninitializedParameter)
    }
    double = unwatched(copy.deepcopy(model, dict[int, Any](parameters)).to(torch.float64))
    for module in double.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return double


def unwatched(model: nn.Module) -> nn.Module:
    """Take the backward hooks off a copy, which torch does not differentiate twice."""
    for module in model.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return model


class _Tracer(fx.Tracer):
    """One for each thread: while it traces, torch.fx sees the calls of every module anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Leave the calls of other threads as they are."""
        if get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


_ALONE = Lock()  # torch.fx changes nn.Module itself for as long as it traces


@contextmanager
def _restored() -> Iterator[None]:
    """Give ``nn.Module`` back as it was: an interrupt may end torch.fx as it takes its own back."""
    kept = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(nn.Module, name, method)


def _graph(tracer: fx.Tracer, model: nn.Module) -> fx.Graph:
    try:
        with _ALONE, _restored():
            return tracer.trace(model)
    except Exception as error:  # a forward pass may raise anything on what stands for a tensor
        raise UnsupportedLayerError(
            f"torch.fx cannot trace the forward pass of {type(model).__name__}: {error}. "
            "Write it without control flow on data (no if, while or len() on a tensor's values), "
            "or as nn.Sequential."
        ) from error


@dataclass(frozen=True)
class _Edge:
    """A tensor that depends on the input: its place among all of them, and its value at zero."""

    place: int
    value: Tensor


@dataclass(frozen=True)
class _Parts:
    """Several tensors given by one operation, each an operation of its own once it is picked."""

    edges: list[_Edge]
    apply: Callable[..., Any]


@dataclass
class _Reader:
    """Runs a graph once at zero and notes the operations on what depends on the input."""

    model: nn.Module
    input_shape: tuple[int, ...]
    nodes: list[Node] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    owners: dict[int, str] = field(default_factory=dict)
    scopes: Mapping[str, tuple[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        zero = torch.zeros(1, *self.input_shape, dtype=torch.float64, device=device)
        self.input, self.shapes, self.output = _Edge(0, zero), [self.input_shape], 0
        self.generator = torch.Generator().manual_seed(0)

    def read(self, graph: fx.Graph, scopes: Mapping[str, tuple[str, Any]]) -> None:
        """Take in a whole graph; ``scopes`` tell in which part of the model a node lies."""
        self.scopes = scopes
        known: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
            if node.op == "placeholder":
                known[node] = self._placeholder(node, bool(known))
            elif node.op == "get_attr":
                known[node] = _attribute(self.model, str(node.target))
            elif node.op == "output":
                self.end(args[0])
            else:
                known[node] = self._operation(node, args, kwargs)

    def _placeholder(self, node: fx.Node, second: bool) -> Any:
        if not second:
            return self.input
        if node.args:
            return node.args[0]
        raise UnsupportedLayerError(
            f"The model takes a second input, {node.name!r}; one is handled."
        )

    def end(self, output: Any) -> None:
        """Note what the model gives."""
        if not isinstance(output, _Edge):
            several = isinstance(output, dict | list | tuple | _Parts)
            kind = "constant" if isinstance(output, Tensor) else type(output).__name__
            kind = ("dict" if isinstance(output, dict) else "tuple") if several else kind
            aux = getattr(self.model, "aux_logits", False)
            raise UnsupportedLayerError(
                f"{type(self.model).__name__} gives a {kind}; one tensor that depends on the "
                "input is handled."
                + (" Wrap it so that its forward pass returns one of them." if several else "")
                + (" Call .eval(), or build it with aux_logits=False." if aux and several else "")
            )
        self.output = output.place

    def _operation(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
        edges, name, function = _edges([args, kwargs]), _name(node), self._function(node)
        place = self._place(node)
        if node.op == "call_module" and edges and len(args) == 1 and not kwargs:
            return self.layer(name, self.model.get_submodule(name), edges)
        parts = [part for part in args if isinstance(part, _Parts)]
        if parts and name == "getitem":
            edges, apply = parts[0].edges, partial(_pick, parts[0].apply, args[1])
        else:
            apply = partial(_evaluate, function, args, kwargs)
        values = [edge.value for edge in edges]
        with torch.no_grad(), _context(place, values or [self.input.value]):
            value = apply(*values)
        if not edges:
            return value
        if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
            return _Parts(edges, apply)
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value  # a size, a comparison: the same for every input of this shape
        norm = self.scopes.get(node.name, ("", None))
        if name == "layer_norm" and len(edges) == 1 and (own := self._layer_norm(norm[0])):
            return self.layer(norm[0], own, edges)
        return self.layer(place, _as_layer(name, args, kwargs, edges, value, apply), edges)

    def _layer_norm(self, path: str) -> nn.Module | None:
        """The layer itself where a module descends from it and calls its function."""
        module = self.model.get_submodule(path)
        if not isinstance(module, nn.LayerNorm):
            return None
        plain = nn.LayerNorm(module.normalized_shape, module.eps, module.elementwise_affine)
        plain.weight, plain.bias = module.weight, module.bias
        return plain.train(module.training)

    def _place(self, node: fx.Node) -> str:
        """An operation's name, after the part of the model that does it."""
        path = self.scopes.get(node.name, ("", None))[0]
        return ".".join(part for part in (path, re.sub(r"_\d+$", "", node.name)) if part)

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))
        if node.op == "call_method":
            name = "reshape" if node.target == "view" else str(node.target)
            return lambda own, *args, **kwargs: getattr(own, name)(*args, **kwargs)
        target: Any = node.target
        function: Callable[..., Any] = OUT_OF_PLACE.get(target, target)
        return function

    def layer(self, name: str, module: nn.Module, edges: Sequence[_Edge]) -> Any:
        """Note one operation and the tensor that it gives."""
        if any(True for _ in module.parameters()):
            if id(module) in self.owners:
                raise UnsupportedLayerError(
                    f"{name} and {self.owners[id(module)]} are the same layer, used twice: its "
                    "gradient is the sum of both uses, which cannot be taken apart."
                )
            self.owners[id(module)] = name
        if type(module) is nn.Hardsigmoid:
            module = Hardsigmoid()
        inputs = [edge.value for edge in edges]
        with torch.no_grad(), _context(name or type(module).__name__, inputs):
            one = len(inputs) == 1
            value = rule_of(module).sample(inputs[0], self.generator) if one else module(*inputs)
        if not isinstance(value, Tensor):
            raise UnsupportedLayerError(
                f"{name or type(module).__name__} gives a {type(value).__name__}, not one tensor."
            )
        used = {node.name for node in self.nodes}
        own, count = name, 0
        while name in used:  # an activation may be used again: no two steps go by one name
            count += 1
            name = f"{own}_{count}"
        self.nodes.append(Node(name, module, tuple(edge.place for edge in edges)))
        self.shapes.append(tuple(value.shape[1:]))
        return _Edge(len(self.nodes), value)

    def steps(self) -> list[Step]:
        """Cut wherever only one tensor is still needed; what lies between two cuts is one step."""
        used = self._leading_to_output()
        last = {0: 0}  # the last node that needs each tensor
        for place in used:
            last |= dict.fromkeys(self.nodes[place - 1].sources, place)
        last[self.output] = len(self.nodes) + 1
        steps, region, start, alive = [], [], 0, {0}
        for place in used:
            region.append(place)
            alive = {p for p in (*alive, place) if last.get(p, 0) > place}
            if alive == {place}:
                steps.append(self._step(region, start))
                region, start = [], place
        return steps

    def _leading_to_output(self) -> list[int]:
        wanted = {self.output}
        for place in range(len(self.nodes), 0, -1):
            if place in wanted:
                wanted |= set(self.nodes[place - 1].sources)
        return sorted(wanted - {0})

    def _step(self, region: Sequence[int], start: int) -> Step:
        first = self.nodes[region[0] - 1]
        name, module = self.nodes[region[-1] - 1].name, first.module
        if len(region) > 1 or first.sources != (start,):
            local = {start: 0, **{place: i + 1 for i, place in enumerate(region)}}
            found = [self.nodes[place - 1] for place in region]
            module = Block(
                [Node(n.name, n.module, tuple(local[s] for s in n.sources)) for n in found]
            )
        return Step(name, rule_of(module), self.shapes[start], self.shapes[region[-1]])


def _edges(arguments: Any) -> list[_Edge]:
    """Every tensor that depends on the input, in the order of the arguments."""
    if isinstance(arguments, _Edge):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, list | tuple):
        return [edge for part in arguments for edge in _edges(part)]
    return []


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _pick(apply: Callable[..., Any], index: int, *tensors: Tensor) -> Any:
    return apply(*tensors)[index]


def _evaluate(function: Callable[..., Any], args: Any, kwargs: Any, *tensors: Tensor) -> Any:
    """Do the operation, out of place, with these tensors in the places of the edges."""
    rest = iter(tensors)

    def fill(part: Any) -> Any:
        if isinstance(part, _Edge):
            return next(rest)
        if isinstance(part, list | tuple):
            filled = [fill(p) for p in part]
            return filled if isinstance(part, list) else tuple(filled)
        if isinstance(part, dict):
            return {key: fill(value) for key, value in part.items()}
        return part

    args, kwargs = fill(list(args)), fill(dict(kwargs))
    if kwargs.get("inplace"):
        kwargs["inplace"] = False
    return function(*args, **kwargs)


def _as_layer(
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    edges: Sequence[_Edge],
    value: Tensor,
    function: Callable[..., Any],
) -> nn.Module:
    """The layer that an operation of the forward pass is."""
    if len(edges) > 1 and name in JOINS and set(kwargs) <= {"dim"}:
        return JOINS[name](*args, **kwargs)
    before = edges[0].value
    if len(edges) == 1 and name in RESHAPES:
        if value.dim() > 1 and len(value) == len(before):
            return Reshape(*value.shape[1:])
        raise UnsupportedLayerError(
            f"{name} must keep the batch dimension: use flatten(x, 1) or view(len(x), -1)."
        )
    if len(edges) == 1 and name in PERMUTES:
        return _permutation(name, before, function)
    make = OPERATIONS.get(name) or function_layers().get(name.replace("_", ""))
    options = {k: v for k, v in kwargs.items() if k not in IGNORED}
    plain = not any(isinstance(a, Tensor) for a in (*args[1:], *options.values()))
    if len(edges) == 1 and make is not None and plain:
        return make(*args[1:], **options) or Call(name, function)
    linear = len(edges) == 1 and name in LINEAR and value.dim() > 1 and len(value) == len(before)
    return (
        LinearCall(name, function) if linear and _linear(before, function) else Call(name, function)
    )


def _permutation(name: str, before: Tensor, function: Callable[..., Any]) -> nn.Module:
    """Read off the strides of a tensor whose sizes, one apart, give each another."""
    strides = before.new_empty([2] * before.dim()).stride()
    order = [strides.index(s) for s in function(before.new_empty([2] * before.dim())).stride()]
    if order[0] != 0:
        raise UnsupportedLayerError(f"{name} must keep the batch dimension where it is: the first.")
    return Permute(*order)


def _linear(before: Tensor, function: Callable[..., Any]) -> bool:
    """Whether an operation is linear up to an offset, and does not mix samples, at a probe."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, *before.shape[1:])
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(before.device)
    try:
        zero, one, other = (function(t * x) for t in (0.0, 1.0, -2.0))
        apart = torch.cat([function(x[:1]), function(x[1:])])
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False  # written for one sample
    close = torch.allclose(other - zero, -2 * (one - zero), rtol=1e-9, atol=1e-9)
    return close and apart.shape == one.shape and torch.allclose(apart, one, rtol=1e-9, atol=1e-9)


@cache
def function_layers() -> dict[str, type[nn.Module]]:
    """Layers by the names of the functions that do the same, as ``relu`` and ``avg_pool2d`` do."""
    return {kind.__name__.lower(): kind for kind, rule in RULES.items() if rule.has_function}


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


class _context:
    """Says which operation failed on which shapes in place of what torch says of a product."""

    def __init__(self, name: str, inputs: Sequence[Tensor]) -> None:
        self.name, self.shapes = name, ", ".join(str(tuple(x.shape[1:])) for x in inputs)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, UnsupportedLayerError | InvalidTensorError):
            return
        if isinstance(error, RuntimeError | ValueError | IndexError | TypeError | AssertionError):
            said = str(error).partition(" but got Proxy")[0]
            raise InvalidTensorError(
                f"{self.name} does not take inputs of shape {self.shapes}; is input_shape right? "
                f"({said})"
            ) from None
