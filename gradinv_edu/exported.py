"""A saved ``torch.export`` program as layers, read without running anything in the file."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelFileError, UnsupportedLayerError

SCHEMA = 8  # major version of the graph's description; torch 2.7 to 2.15
DTYPES = {  # by torch's number for them in the file
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    13: torch.bfloat16,
}
SUMS, SIZES = ("add", "add_"), ("sym_size", "sym_constrain_range", "_assert_scalar")
ALIASES = ("view", "reshape", "flatten", "unflatten", "dropout", "_unsafe_view")


class Program(nn.Module):
    """The layers of a saved program, by the names that they had in the model.

    Parameters and buffers have the model's names, so that its updates and weights fit. Batch norm
    and dropout are in the mode in which the program was exported.

    Parameters
    ----------
    steps : sequence of (str, sequence of str, nn.Module or None, str)
        For each: the value made, the values taken, the layer (``None``: their sum) and its name.
    source, result : str
        The value that is the input, and the one that is the output.
    """

    def __init__(
        self,
        steps: Sequence[tuple[str, Sequence[str], nn.Module | None, str]],
        source: str,
        result: str,
    ) -> None:
        super().__init__()
        self._program = (source, [(made, taken, path) for made, taken, _, path in steps], result)
        for _, _, layer, path in steps:
            if layer is not None:
                _put(self, path, layer)
        modes = [m.training for m in self.modules() if isinstance(m, _MODAL)]
        self.training = any(modes) or not modes

    def forward(self, x: Tensor) -> Tensor:
        """Compute what the program does, layer by layer."""
        source, steps, result = self._program
        values = {source: x}
        for made, taken, path in steps:
            arguments = [values[name] for name in taken]
            layer = self.get_submodule(path) if path else None
            values[made] = layer(*arguments) if layer else arguments[0] + arguments[1]
        return values[result]


_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    *above, last = path.split(".")
    for name in above:
        if root._modules.get(name) is None:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    root.add_module(last, layer)


def load(path: str | Path) -> nn.Module:
    r"""Read a file that ``torch.export.save`` wrote.

    The archive's description of the graph is JSON and its weights are plain bytes; nothing else
    in it is opened. ``torch.export.load`` is not used: it unpickles what the file says is
    pickled, its example inputs among it, and evaluates symbolic sizes as Python.

    Parameters
    ----------
    path : str or Path
        Of the ``.pt2`` file.

    Returns
    -------
    nn.Module
        A :class:`Program`, or the layer itself if the model was a single one.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, or no program; if a weight is pickled.
    UnsupportedLayerError
        If the program has an operation that is no layer here; the message names it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _build(_Archive(path, archive))
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(
            f"Cannot read a program from {path}: {error}. Give a file that torch.export.save wrote."
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, UnsupportedLayerError):
            raise
        raise ModelFileError(
            f"The program in {path} is damaged, or of another version of torch "
            f"({type(error).__name__}: {error}). Export it again."
        ) from None


# --- the file ---------------------------------------------------------------------------------


class _Archive:
    """The parts of the file that are data: JSON and raw bytes, never a pickle."""

    def __init__(self, path: str | Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        found = [n for n in archive.namelist() if n.endswith("/models/model.json")]
        if len(found) != 1:
            raise ModelFileError(
                f"{path} holds {len(found)} programs called 'model', and one is needed. Give a "
                "file that torch.export.save wrote; weights alone, pickles and TorchScript are "
                "no programs."
            )
        self.root = found[0].removesuffix("models/model.json")
        self.program = self._json("models/model.json")
        if (
            self.program["schema_version"]["major"] != SCHEMA
            or self._bytes("byteorder") != b"little"
        ):
            raise ModelFileError(
                f"{path} is of version {self.program['schema_version']} or not little-endian; "
                f"version {SCHEMA} is read. Export the model again."
            )
        self.weights = self._json("data/weights/model_weights_config.json")["config"]

    def _bytes(self, name: str) -> bytes:
        info = self.archive.getinfo(self.root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ModelFileError(f"{name} in {self.path} is compressed, which torch never does.")
        return self.archive.read(info)

    def _json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._bytes(name))
        return found

    def tensor(self, name: str) -> Tensor:
        entry = self.weights[name]
        if entry["use_pickle"]:
            raise ModelFileError(f"{name} in {self.path} is pickled; pickles are never opened.")
        meta = entry["tensor_meta"]
        dtype = DTYPES.get(meta["dtype"])
        if dtype is None:
            raise ModelFileError(f"{name} in {self.path} is of a dtype that no layer has here.")
        stored = self._bytes("data/weights/" + entry["path_name"])
        flat = torch.frombuffer(bytearray(stored), dtype=dtype)
        sizes, strides = ([_value(n) for n in meta[key]] for key in ("sizes", "strides"))
        taken = flat.as_strided(sizes, strides, _value(meta["storage_offset"])).clone()
        return taken.requires_grad_(bool(meta["requires_grad"]) and dtype.is_floating_point)


def _value(argument: Mapping[str, Any]) -> Any:
    """What an argument in the file says; a size that is only a symbol is ``None``."""
    ((kind, value),) = argument.items()
    if kind in ("as_none", "as_expr", "as_name"):
        return None
    if kind == "as_sym_ints":
        return [_value(v) for v in value]
    if kind == "as_tensors":
        return [v["name"] for v in value]
    if kind in ("as_tensor", "as_sym_int"):
        return value.get("name") if kind == "as_tensor" else _value(value)
    return value


# --- from operations to layers ----------------------------------------------------------------


@dataclass
class _Node:
    """One operation: its name in aten, its arguments by name, and the value that it makes."""

    op: str
    arguments: dict[str, Any]
    made: str
    stack: str

    @classmethod
    def read(cls, node: Mapping[str, Any]) -> _Node:
        target = str(node["target"])
        op = target.removeprefix("torch.ops.aten.").split(".")[0]
        arguments = {i["name"]: _value(i["arg"]) for i in node["inputs"]}
        outputs = [_value(o) for o in node["outputs"]]
        listed = outputs[0] if outputs and isinstance(outputs[0], list) else outputs
        made = next((o for o in listed if isinstance(o, str)), "")
        stack = str(node.get("metadata", {}).get("nn_module_stack", "")).split(";")[-1].split(",")
        return cls(
            op if target.startswith("torch.ops.aten.") else target,
            arguments,
            made,
            stack[1] if len(stack) > 2 else "",
        )

    def get(self, name: str, default: Any = None) -> Any:
        found = self.arguments.get(name, default)
        return default if found is None else found


@dataclass
class _Reader:
    """A program on its way to layers."""

    archive: _Archive
    known: dict[str, str] = field(default_factory=dict)  # value in the graph: parameter's name
    turned: dict[str, str] = field(default_factory=dict)  # value in the graph: what it transposes
    shapes: dict[str, list[Any]] = field(default_factory=dict)

    def weight(self, node: _Node, argument: str) -> str | None:
        """Name in the model of the parameter or buffer that a node takes."""
        value = node.arguments.get(argument)
        if value is None:
            return None
        if value not in self.known:
            raise _refusal(node, f"whose {argument} is computed, not a parameter")
        return self.known[value]

    def layer(self, node: _Node, kind: Callable[..., nn.Module], **names: str | None) -> _Made:
        """Fill a layer with parameters that are called as a layer's are."""
        given = {own: full for own, full in names.items() if full is not None}
        prefix = given["weight"].rpartition(".")[0] if "weight" in given else ""
        for own, full in given.items():
            if full != f"{prefix}.{own}".strip("."):
                raise _refusal(node, f"whose {own} is called {full!r}, not {prefix}.{own}")
        made = kind()
        for own, full in given.items():
            tensor = self.archive.tensor(full)
            if own in made._parameters:
                made._parameters[own] = nn.Parameter(tensor, tensor.requires_grad)
            else:
                made._buffers[own] = tensor.detach()
        return _Made(made, prefix)


@dataclass(frozen=True)
class _Made:
    layer: nn.Module
    path: str = ""


def _refusal(node: _Node, why: str) -> UnsupportedLayerError:
    place = f" in {node.stack}" if node.stack else ""
    return UnsupportedLayerError(
        f"The program calls {node.op} ({node.made or 'no value'}{place}), {why}. Export a network "
        "of dense layers, convolutions, batch norm, poolings, activations and sums."
    )


def _build(archive: _Archive) -> nn.Module:
    module = archive.program["graph_module"]
    signature, reader = module["signature"], _Reader(archive)
    source = _inputs(signature["input_specs"], reader)
    result = _output(signature["output_specs"])
    for name, meta in module["graph"]["tensor_values"].items():
        reader.shapes[name] = [_value(n) for n in meta["sizes"]]
    nodes = [_Node.read(node) for node in module["graph"]["nodes"]]
    _refuse_overwriting(nodes)
    steps = list(_steps(reader, _paths(nodes, reader), nodes))
    if len(steps) == 1 and steps[0][2] is not None and not steps[0][3]:
        return steps[0][2]
    if any(layer is not None and not path for _, _, layer, path in steps):
        raise UnsupportedLayerError(
            "The program has parameters of its own beside its layers; put them into layers."
        )
    return Program(steps, source, result)


def _inputs(specs: Sequence[Mapping[str, Any]], reader: _Reader) -> str:
    sources = []
    for spec in specs:
        ((kind, content),) = spec.items()
        if kind in ("parameter", "buffer"):
            reader.known[content["arg"]["name"]] = content[f"{kind}_name"]
        elif kind == "user_input":
            sources.append(_value(content["arg"]))
    if len(sources) != 1:
        raise UnsupportedLayerError(f"The program takes {len(sources)} inputs; one is handled.")
    return str(sources[0])


def _output(specs: Sequence[Mapping[str, Any]]) -> str:
    results = [_value(s["user_output"]["arg"]) for s in specs if "user_output" in s]
    if len(results) != 1:
        raise UnsupportedLayerError(f"The program returns {len(results)} values; one is handled.")
    return str(results[0])


def _refuse_overwriting(nodes: Sequence[_Node]) -> None:
    """An in-place operation is one that makes a new value, unless the old one is used again."""
    base: dict[str, str] = {}  # value: the one whose memory it shares
    for index, node in enumerate(nodes):
        if node.op not in ALIASES and not node.op.endswith("_"):
            continue
        old = _source(node)
        root = base.get(old, old)
        lost = {root, *(name for name, other in base.items() if other == root)}
        base[node.made] = root
        again = next((n for n in nodes[index + 1 :] if lost & set(_taken(n))), None)
        if node.op.endswith("_") and again is not None:
            raise _refusal(node, f"which overwrites what {again.op} uses later")


def _taken(node: _Node) -> Iterator[str]:
    for value in node.arguments.values():
        yield from (v for v in (value if isinstance(value, list) else [value]) if type(v) is str)


def _paths(nodes: Sequence[_Node], reader: _Reader) -> set[str]:
    """Names that hold other layers, so that no layer without weights can be called by them."""
    full = [*reader.known.values(), *(f"{node.stack}." for node in nodes)]
    parts = [name.split(".")[:-1] for name in full]
    with_weights = {".".join(name.split(".")[:-1]) for name in reader.known.values()}
    return with_weights | {".".join(p[:i]) for p in parts for i in range(len(p))}


def _steps(
    reader: _Reader, taken: set[str], nodes: Sequence[_Node]
) -> Iterator[tuple[str, list[str], nn.Module | None, str]]:
    weights: dict[str, str] = {}
    for node in nodes:
        first = str(node.get("self", node.get("input")))
        if node.op in SIZES or (node.op in SUMS and first in reader.known):
            continue  # asks for a size, or counts the batches of a batch norm
        if node.op in ("t", "permute", "transpose") and first in reader.known:
            reader.turned[node.made] = first
            continue
        if node.op == "getitem" or node.op.endswith("operator.getitem"):
            continue
        if node.op in SUMS:
            yield node.made, _summands(reader, node), None, ""
            continue
        made = _layer(reader, node)
        if made.path or any(True for _ in made.layer.parameters()):
            if made.path in weights:
                raise _refusal(node, f"with the weights of {made.path}, used before")
            weights[made.path] = node.made
            yield node.made, [_source(node)], made.layer, made.path
        else:
            yield node.made, [_source(node)], made.layer, _free(taken, node)


def _free(taken: set[str], node: _Node) -> str:
    path = node.stack if node.stack and node.stack not in taken else node.made
    while path in taken:
        path += "_"
    taken.add(path)
    return path


def _source(node: _Node) -> str:
    return str(node.arguments["mat1" if node.op == "addmm" else next(iter(node.arguments))])


def _summands(reader: _Reader, node: _Node) -> list[str]:
    one, other = node.arguments["self"], node.arguments["other"]
    named = isinstance(one, str) and isinstance(other, str) and other not in reader.known
    if not named or node.get("alpha", 1) != 1:
        raise _refusal(node, "which is no plain sum of two layers' outputs")
    if reader.shapes[one] != reader.shapes[other]:
        raise _refusal(node, f"of shapes {reader.shapes[one]} and {reader.shapes[other]}")
    return [one, other]


def _layer(reader: _Reader, node: _Node) -> _Made:
    if node.op in _WITH_WEIGHTS:
        return _WITH_WEIGHTS[node.op](reader, node)
    op = node.op.removesuffix("_")
    if op in _PLAIN:
        return _Made(_PLAIN[op](node))
    if op in ("view", "reshape", "unflatten", "_unsafe_view"):
        return _Made(_view(reader, node))
    if op == "mean":
        return _Made(_mean(reader, node))
    raise _refusal(node, "which is no layer that can be read")


def _linear(reader: _Reader, node: _Node) -> _Made:
    if node.op in ("addmm", "mm"):
        return _matrix_product(reader, node)
    return _dense(reader, node, reader.weight(node, "weight"), reader.weight(node, "bias"))


def _matrix_product(reader: _Reader, node: _Node) -> _Made:
    turned = reader.turned.get(str(node.arguments["mat2"]))
    if turned is None or node.get("alpha", 1) != 1 or node.get("beta", 1) != 1:
        raise _refusal(node, "which is no dense layer")
    bias = reader.weight(node, "self") if node.op == "addmm" else None
    return _dense(reader, node, reader.known[turned], bias)


def _dense(reader: _Reader, node: _Node, weight: str | None, bias: str | None) -> _Made:
    assert weight is not None
    outputs, inputs = reader.archive.tensor(weight).shape
    return reader.layer(
        node, lambda: nn.Linear(inputs, outputs, bias is not None), weight=weight, bias=bias
    )


_CONVS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def _conv(reader: _Reader, node: _Node) -> _Made:
    if node.get("transposed", False):
        raise _refusal(node, "a transposed convolution")
    weight, bias = reader.weight(node, "weight"), reader.weight(node, "bias")
    assert weight is not None
    outputs, inputs, *kernel = reader.archive.tensor(weight).shape
    groups, many = node.get("groups", 1), len(kernel)

    def make() -> nn.Module:
        made: nn.Module = _CONVS[many + 2](
            inputs * groups,
            outputs,
            tuple(kernel),
            *(_each(node, name, default, many) for name, default in _GEOMETRY),
            groups=groups,
            bias=bias is not None,
        )
        return made

    return reader.layer(node, make, weight=weight, bias=bias)


_GEOMETRY = (("stride", 1), ("padding", 0), ("dilation", 1))


def _each(node: _Node, name: str, default: int, many: int) -> Any:
    found = node.get(name, default)
    if isinstance(found, str):
        return found
    listed = list(found) if isinstance(found, list) else [found]
    return tuple(listed * many if len(listed) == 1 else listed)


def _batch_norm(reader: _Reader, node: _Node) -> _Made:
    names = {n: reader.weight(node, n) for n in ("weight", "bias", "running_mean", "running_var")}
    if None in names.values():
        raise _refusal(node, "without weights or running statistics")
    sizes = reader.shapes[_source(node)]
    kind = {3: nn.BatchNorm1d, 5: nn.BatchNorm3d}.get(len(sizes), nn.BatchNorm2d)
    kind = nn.BatchNorm1d if len(sizes) == 2 else kind
    features = reader.archive.tensor(str(names["weight"])).numel()
    prefix = str(names["weight"]).rpartition(".")[0]
    count = f"{prefix}.num_batches_tracked".strip(".")
    if count in reader.archive.weights:
        names["num_batches_tracked"] = count
    momentum = node.get("momentum", 0.1)
    made = reader.layer(node, lambda: kind(features, node.get("eps", 1e-5), momentum), **names)
    made.layer.train(bool(node.get("training", False)))
    return made


def _prelu(reader: _Reader, node: _Node) -> _Made:
    weight = reader.weight(node, "weight")
    assert weight is not None
    many = reader.archive.tensor(weight).numel()
    return reader.layer(node, lambda: nn.PReLU(many), weight=weight)


_WITH_WEIGHTS: dict[str, Callable[[_Reader, _Node], _Made]] = {
    "linear": _linear,
    "addmm": _linear,
    "mm": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _conv),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    "prelu": _prelu,
}


def _average(node: _Node) -> nn.Module:
    many = int(node.op[-2])
    kind: Any = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[many]
    window = _each(node, "kernel_size", 1, many)
    stride = _each(node, "stride", 1, many) if node.get("stride") else window
    options = (_each(node, "padding", 0, many), node.get("ceil_mode", False))
    if node.arguments.get("divisor_override") is not None:
        raise _refusal(node, "with a divisor of its own")
    made: nn.Module = kind(window, stride, *options, node.get("count_include_pad", True))
    return made


def _largest(node: _Node) -> nn.Module:
    many = 2 if node.op.startswith("max_pool2d") else int(node.op[-2])
    kind: Any = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[many]
    window = _each(node, "kernel_size", 1, many)
    stride = _each(node, "stride", 1, many) if node.get("stride") else window
    geometry = (_each(node, name, default, many) for name, default in _GEOMETRY[1:])
    made: nn.Module = kind(window, stride, *geometry, ceil_mode=node.get("ceil_mode", False))
    return made


def _adaptive(node: _Node) -> nn.Module:
    many = int(node.op[-2])
    kind: Any = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[many]
    made: nn.Module = kind(_each(node, "output_size", 1, many))
    return made


def _elu(node: _Node) -> nn.Module:
    if node.get("scale", 1) == 1 and node.get("input_scale", 1) == 1:
        return nn.ELU(node.get("alpha", 1.0))
    selu = (1.6732632423543772, 1.0507009873554805)
    if all(map(math.isclose, (node.get("alpha"), node.get("scale")), selu)):
        return nn.SELU()
    raise _refusal(node, "scaled")


def _flatten(node: _Node) -> nn.Module:
    if node.get("start_dim", 0) != 1 or node.get("end_dim", -1) != -1:
        raise _refusal(node, "which does not flatten each sample: use flatten(x, 1)")
    return nn.Flatten(1)


def _dropout(node: _Node) -> nn.Module:
    return nn.Dropout(node.get("p", 0.5)).train(bool(node.get("train", False)))


_ADAPTIVE = tuple(f"{_}adaptive_avg_pool{many}d" for _ in ("", "_") for many in (1, 2, 3))

_PLAIN: dict[str, Callable[[_Node], nn.Module]] = {
    "relu": lambda node: nn.ReLU(),
    "relu6": lambda node: nn.ReLU6(),
    "hardtanh": lambda node: nn.Hardtanh(node.get("min_val", -1.0), node.get("max_val", 1.0)),
    "leaky_relu": lambda node: nn.LeakyReLU(node.get("negative_slope", 0.01)),
    "elu": _elu,
    "celu": lambda node: nn.CELU(node.get("alpha", 1.0)),
    "selu": lambda node: nn.SELU(),
    "gelu": lambda node: nn.GELU(node.get("approximate", "none")),
    "silu": lambda node: nn.SiLU(),
    "hardswish": lambda node: nn.Hardswish(),
    "softplus": lambda node: nn.Softplus(node.get("beta", 1.0), node.get("threshold", 20.0)),
    "sigmoid": lambda node: nn.Sigmoid(),
    "tanh": lambda node: nn.Tanh(),
    "flatten": _flatten,
    "dropout": _dropout,
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _average),
    **dict.fromkeys(
        ("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"), _largest
    ),
    **dict.fromkeys(_ADAPTIVE, _adaptive),
}


def _view(reader: _Reader, node: _Node) -> nn.Module:
    before, after = reader.shapes[_source(node)], reader.shapes[node.made]
    if before[0] == after[0] and len(after) == 2:
        return nn.Flatten(1)
    if before[0] == after[0] and len(before) == 2 and None not in after[1:]:
        return nn.Unflatten(1, tuple(after[1:]))
    raise _refusal(node, f"from {before} to {after}, which does not flatten each sample")


def _mean(reader: _Reader, node: _Node) -> nn.Module:
    """What adaptive pooling to one pixel is taken apart into."""
    many = len(reader.shapes[_source(node)])
    over = sorted(d % many for d in node.get("dim", []))
    kinds: dict[int, Any] = {
        3: nn.AdaptiveAvgPool1d,
        4: nn.AdaptiveAvgPool2d,
        5: nn.AdaptiveAvgPool3d,
    }
    if many not in kinds or over != list(range(2, many)):
        raise _refusal(node, f"over {over}, which is no pooling over all places")
    pool: nn.Module = kinds[many](1)
    return pool if node.get("keepdim", False) else nn.Sequential(pool, nn.Flatten(1))
