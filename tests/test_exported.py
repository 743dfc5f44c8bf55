"""Saved programs of torch.export: the same layers again, and nothing in the file is run."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradinv_edu as gi
from gradinv_edu import exported
from gradinv_edu.errors import ModelFileError, UnsupportedLayerError

LOSS = nn.CrossEntropyLoss()


def saved(
    model: nn.Module, path: Path, shape: tuple[int, ...], decompose: bool = False, **options: Any
) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (torch.zeros(2, *shape),), **options)
        torch.export.save(program.run_decompositions() if decompose else program, path)
    return path


def sample(shape: tuple[int, ...], many: int = 2) -> Tensor:
    return torch.rand(many, *shape, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    """What people write: layers in a forward pass with functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.inside = nn.ModuleDict({"way": nn.Conv2d(4, 4, 1)})
        self.out = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.conv(x)), 0.2)
        x = F.avg_pool2d(x + self.inside["way"](x), 2)
        x = F.dropout(x.view(x.size(0), -1), 0.25, self.training)
        return torch.sigmoid(self.out(F.elu(F.softplus(x))))


ACTIVATIONS = (
    nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(0.7), nn.CELU(0.5), nn.SELU(),
    nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(), nn.Softplus(2.0), nn.Sigmoid(),
    nn.Tanh(), nn.Hardtanh(-2, 2), nn.PReLU(), nn.Identity(),
)  # fmt: skip
POOLS = (
    nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.MaxPool2d(3, 2, 1),
    nn.AdaptiveAvgPool2d(2),
)  # fmt: skip
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: gi.models.mlp((12, 7, 4)), (12,)),
    "lenet": (lambda: gi.models.lenet((3, 16, 16)), (3, 16, 16)),
    "cnn6": (lambda: gi.models.cnn6((3, 16, 16)), (3, 16, 16)),
    "photo_cnn": (lambda: gi.models.photo_cnn((3, 16, 16)), (3, 16, 16)),
    "resnet": (lambda: gi.models.resnet((3, 16, 16)).eval(), (3, 16, 16)),
    "wide_cnn": (lambda: gi.models.wide_cnn((3, 16, 16), bias=True), (3, 16, 16)),
    "functional": (lambda: Functional().eval(), (3, 8, 8)),
    "alone": (lambda: nn.Linear(6, 3), (6,)),
    "activations": (lambda: nn.Sequential(nn.Linear(6, 9), *ACTIVATIONS), (6,)),
    "pools": (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), *POOLS), (3, 32, 32)),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2, dilation=2, groups=2), nn.AvgPool1d(2), nn.Flatten(),
            nn.Unflatten(1, (4, 3)),
        ),
        (2, 17),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_layers_compute_what_the_program_computes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = make()
    read = exported.load(saved(model, tmp_path / "net.pt2", shape))
    assert torch.equal(read(sample(shape)), model(sample(shape)))
    assert [(n, p.shape) for n, p in sorted(read.named_parameters())] == [
        (n, p.shape) for n, p in sorted(model.named_parameters())
    ]
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in read.state_dict().items())


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn6", "wide_cnn", "resnet", "pools"])
def test_a_decomposed_program_is_read_as_well(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    model = make()
    read = exported.load(saved(model, tmp_path / "net.pt2", shape, decompose=True))
    torch.testing.assert_close(read(sample(shape)), model(sample(shape)))
    assert dict(read.named_parameters()).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("training", [False, True])
def test_a_network_of_torchvision(training: bool, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10).train(training)
    read = exported.load(saved(model, tmp_path / "net.pt2", (3, 32, 32)))
    assert read.training is training
    assert torch.equal(read(sample((3, 32, 32))), model(sample((3, 32, 32))))
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in read.state_dict().items())
    if training:  # in eval mode its blocks can be taken apart, which takes a minute
        one, other = (gi.audit(m, (3, 32, 32), jacobian=False) for m in (read, model))
        assert one.to_dict()["layers"] == other.to_dict()["layers"]
        assert one.verdict == other.verdict


def test_a_program_for_any_batch_in_the_mode_of_its_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Functional()
    dynamic = ({0: torch.export.Dim("batch")},)
    path = saved(model.train(), tmp_path / "train.pt2", (3, 8, 8), dynamic_shapes=dynamic)
    read = exported.load(path)
    assert (
        read.training
        and not exported.load(saved(model.eval(), tmp_path / "eval.pt2", (3, 8, 8))).training
    )
    assert torch.equal(read.eval()(sample((3, 8, 8), 5)), model.eval()(sample((3, 8, 8), 5)))


@pytest.mark.parametrize("name", ["lenet", "cnn6", "resnet", "wide_cnn"])
def test_the_audit_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    make, shape = CASES[name]
    model = make()
    read = exported.load(saved(model, tmp_path / "net.pt2", shape))
    audits = [gi.audit(m, shape, jacobian=False).to_dict() for m in (read, model)]
    for layer in (*audits[0]["layers"], *audits[1]["layers"]):
        if layer["kind"] == "Residual":  # a sum has no name of its own
            layer["name"] = "sum"
    assert audits[0]["layers"] == audits[1]["layers"]
    assert audits[0]["verdict"] == audits[1]["verdict"]


@pytest.mark.parametrize("name", ["lenet", "cnn6", "wide_cnn"])
def test_the_recovery_is_that_of_the_model(name: str, tmp_path: Path) -> None:
    make, shape = CASES[name]
    model = make()
    read = exported.load(saved(model, tmp_path / "net.pt2", shape))
    loss: nn.Module = LOSS
    target = torch.tensor([0])
    if model(sample(shape, 1)).shape[1] == 1:
        loss, target = nn.BCEWithLogitsLoss(), torch.ones(1, 1)
    update = gi.observe(model, loss, gi.data.photo("cat", 16), target)
    found, expected = (gi.recover(m, update, shape, loss) for m in (read, model))
    assert found.exact == expected.exact
    assert torch.equal(found.inputs, expected.inputs)


def test_weights_of_half_precision_and_frozen_ones(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
        model[0].requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (torch.zeros(2, 4, dtype=dtype),))
            torch.export.save(program, tmp_path / "net.pt2")
        read = exported.load(tmp_path / "net.pt2")
        for (_, one), (_, other) in zip(
            sorted(read.named_parameters()), sorted(model.named_parameters()), strict=True
        ):
            assert torch.equal(one, other) and one.requires_grad == other.requires_grad


# --- nothing in the file is run ---------------------------------------------------------------


class Trap:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The same archive with other contents; no content: without that file."""
    fresh = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(fresh, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return fresh


def edited(path: Path, part: str, edit: Callable[[Any], None]) -> Path:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(part):
            return content
        told = json.loads(content)
        edit(told)
        return json.dumps(told).encode()

    return rewritten(path, change)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return saved(gi.models.mlp((12, 7, 4)), tmp_path / "net.pt2", (12,))


def test_example_inputs_that_are_a_trap_are_never_opened(net: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(((Trap(tmp_path / "sprung"),), {}), buffer)
    trap = buffer.getvalue()
    path = rewritten(net, lambda name, old: trap if "sample_inputs" in name else old)
    exported.load(path)
    assert not (tmp_path / "sprung").exists()
    torch.export.load(path)  # that the trap is one: torch springs it
    assert (tmp_path / "sprung").exists()


def test_a_weight_that_is_a_pickle_is_refused(net: Path, tmp_path: Path) -> None:
    def pickled(told: Any) -> None:
        next(iter(told["config"].values()))["use_pickle"] = True

    path = edited(net, "weights_config.json", pickled)
    with pytest.raises(ModelFileError, match="is pickled; pickles are never opened"):
        exported.load(path)


def test_a_symbolic_size_that_is_python_is_not_evaluated(net: Path, tmp_path: Path) -> None:
    mark = tmp_path / "evaluated"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"

    def planted(told: Any) -> None:
        sizes = told["graph_module"]["graph"]["sym_int_values"]
        sizes["s"] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}
        for value in told["graph_module"]["graph"]["tensor_values"].values():
            if len(value["sizes"]) == 2:
                value["sizes"][0] = {"as_expr": {"expr_str": code, "hint": None}}

    exported.load(edited(net, "model.json", planted))
    assert not mark.exists()


# --- what is no program -----------------------------------------------------------------------


def test_a_truncated_program_is_refused_wherever_it_ends(net: Path, tmp_path: Path) -> None:
    whole = net.read_bytes()
    for share in (0, 0.1, 0.5, 0.9, 0.999):
        short = tmp_path / "short.pt2"
        short.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ModelFileError, match=r"Cannot read a program|holds 0 programs"):
            exported.load(short)


def test_a_damaged_byte_is_seen_by_its_checksum(net: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(net) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("weights/weight_0")]
        stored = archive.read(name)
    whole = bytearray(net.read_bytes())
    whole[bytes(whole).index(stored)] ^= 1
    (tmp_path / "damaged.pt2").write_bytes(whole)
    with pytest.raises(ModelFileError, match="Bad CRC-32"):
        exported.load(tmp_path / "damaged.pt2")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with pytest.raises(ModelFileError, match="No such file"):
        exported.load(path)
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ModelFileError, match="not a zip file"):
        exported.load(path)
    torch.save(gi.models.mlp((4, 3)), path)
    with pytest.raises(ModelFileError, match="holds 0 programs"):
        exported.load(path)
    assert not (tmp_path / "sprung").exists()


def shorter(told: Any) -> None:
    next(iter(told["config"].values()))["tensor_meta"]["sizes"][0] = {"as_int": 10**6}


def missing(told: Any) -> None:
    told["config"].pop(next(iter(told["config"])))


def other_name(told: Any) -> None:
    specs = told["graph_module"]["signature"]["input_specs"]
    specs[0]["parameter"]["parameter_name"] = "__class__.weight"


def other_version(told: Any) -> None:
    told["schema_version"]["major"] = 99


def no_graph(told: Any) -> None:
    told["graph_module"]["graph"] = []


@pytest.mark.parametrize(
    ("part", "edit", "message"),
    [
        ("weights_config.json", shorter, "is damaged"),
        ("weights_config.json", missing, "is damaged"),
        ("model.json", other_name, "damaged"),
        ("model.json", other_version, "version 8 is read"),
        ("model.json", no_graph, "is damaged"),
    ],
)
def test_a_program_that_contradicts_itself_is_refused(
    net: Path, part: str, edit: Callable[[Any], None], message: str
) -> None:
    with pytest.raises((ModelFileError, UnsupportedLayerError), match=message):
        exported.load(edited(net, part, edit))


# --- what is no layer -------------------------------------------------------------------------


class Calls(nn.Module):
    """Any function after a dense layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.dense, self.scale = nn.Linear(12, 12), nn.Parameter(torch.ones(12))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.dense(x))


REFUSED: list[tuple[Callable[..., Any], str]] = [
    (lambda net, z: torch.softmax(z, 1), "calls softmax .*, which is no layer"),
    (lambda net, z: z * net.scale, "calls mul .*, which is no layer"),
    (lambda net, z: z @ net.scale, "calls matmul"),
    (lambda net, z: z + net.scale, "calls add .*, which is no plain sum"),
    (lambda net, z: z + 1, "calls add .*, which is no plain sum"),
    (lambda net, z: torch.add(z, z, alpha=2), "which is no plain sum"),
    (lambda net, z: net.dense(z), "calls linear .*, with the weights of dense, used before"),
    (lambda net, z: F.linear(z, net.dense.weight * 2), "calls mul"),
    (lambda net, z: F.linear(z, net.dense.weight.t()), "whose weight is computed"),
    (lambda net, z: z.flatten(0), "does not flatten each sample"),
    (lambda net, z: z.reshape(1, 24), "does not flatten each sample"),
    (lambda net, z: F.relu_(z.view(2, 3, 4)).flatten(1) + z, "overwrites what add uses"),
    (lambda net, z: (z.sigmoid(), z), "returns 2 values"),
]


@pytest.mark.parametrize(("function", "message"), REFUSED)
def test_an_operation_that_is_no_layer_is_named(
    function: Callable[..., Tensor], message: str, tmp_path: Path
) -> None:
    path = saved(Calls(function), tmp_path / "net.pt2", (12,))
    with pytest.raises(UnsupportedLayerError, match=message):
        exported.load(path)


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    program = torch.export.export(Two(), (torch.ones(2, 3), torch.ones(2, 3)))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(UnsupportedLayerError, match="takes 2 inputs"):
        exported.load(tmp_path / "net.pt2")
