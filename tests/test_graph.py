"""A model read as steps: found however its forward pass is written, refused by name otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from gradinv_edu.engine.graph import OPERATIONS, PERMUTES, RESHAPES, Step, _linear, trace
from gradinv_edu.engine.layers.branches import Call
from gradinv_edu.errors import InvalidTensorError, UnsupportedLayerError

Shape = tuple[int, ...]


def agrees(model: nn.Module, shape: Shape) -> list[Step]:
    """The steps compute what the model computes, fit each other, and name every parameter."""
    steps = trace(model, shape)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept, found = x.clone(), x
    with torch.no_grad():
        for step in steps:
            found = step.module(found)
            assert tuple(found.shape[1:]) == step.output_shape
        wanted = copy.deepcopy(model).double()(x.clone())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, kept)  # operations in place are done out of place
    assert steps[0].input_shape == shape
    assert all(one.output_shape == two.input_shape for one, two in pairwise(steps))
    own = {known: step.module.get_parameter(n) for step in steps for n, known in step.parameters()}
    parameters = dict(model.named_parameters())
    assert set(own) <= set(parameters)
    assert all(torch.equal(p, parameters[name].double()) for name, p in own.items())
    return steps


def kinds(steps: list[Step]) -> list[str]:
    return [step.rule.kind for step in steps]


class Passing(nn.Module):
    """A forward pass of its own, around layers."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.way = nn.ModuleDict(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x, **self.layers)


# --- layers in a row ----------------------------------------------------------------------------


def test_nested_sequential_is_flattened_with_the_names_of_its_parameters() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.Identity(),
        nn.Sequential(nn.Sequential(nn.AvgPool2d(2)), nn.Flatten()),
        nn.Dropout(0.5),
        nn.Linear(36, 10),
    ).eval()
    steps = agrees(model, (1, 6, 6))
    assert [s.name for s in steps] == ["0.0", "0.1", "0.2", "1", "2.0.0", "2.1", "3", "4"]
    named = [known for step in steps for _, known in step.parameters()]
    assert named == [name for name, _ in model.named_parameters()]
    (alone,) = agrees(nn.Linear(3, 2), (3,))
    assert alone.name == "" and [known for _, known in alone.parameters()] == ["weight", "bias"]


def test_an_activation_may_be_used_twice_and_a_layer_out_of_the_way_is_left_out() -> None:
    act = nn.Tanh()
    assert len(agrees(nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 2), act), (3,))) == 4
    assert [s.name for s in trace(nn.Sequential(act, nn.Sequential(act)), (3,))] == ["0", "0_1"]
    beside = Passing(
        lambda x, one, two: (one(x), two(x))[1], one=nn.Linear(3, 3), two=nn.Linear(3, 3)
    )
    assert [s.name for s in agrees(beside, (3,))] == ["layers.two"]


def test_the_steps_are_a_double_copy_in_the_same_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    model.append(nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(2)))
    before, state = copy.deepcopy(model), torch.get_rng_state()
    steps = trace(model, (3,))
    assert [s.module.training for s in steps] == [True, False, True, True, True, True]
    assert int(steps[5].module.num_batches_tracked) == 0  # no statistics spent on a shape
    assert torch.equal(state, torch.get_rng_state())
    for step in steps:
        for p in step.module.parameters():
            assert p.dtype == torch.float64
            p.data.zero_()
    (step,) = trace(Passing(lambda x: F.dropout(x, 0.4)), (3,))
    assert isinstance(step.module, nn.Dropout) and step.module.p == 0.4 and step.module.training
    assert model[4][0].inplace and all(p.requires_grad for p in model.parameters())
    for (name, a), b in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name


# --- operations of a forward pass ---------------------------------------------------------------

DEPTH = torchvision.ops.StochasticDepth(0.2, "row").eval()
CALLS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu": ("ReLU", F.relu),
    "relu, in place": ("ReLU", lambda x: F.relu(x, inplace=True)),
    "relu_": ("ReLU", lambda x: x.relu_()),
    "torch relu": ("ReLU", torch.relu),
    "leaky_relu": ("LeakyReLU", lambda x: F.leaky_relu(x, negative_slope=0.3)),
    "elu": ("ELU", lambda x: F.elu(x, 0.5)),
    "celu": ("CELU", lambda x: F.celu(x, 0.5)),
    "selu": ("SELU", F.selu),
    "softplus": ("Softplus", lambda x: F.softplus(x, beta=2)),
    "softsign": ("Softsign", F.softsign),
    "log_sigmoid": ("LogSigmoid", F.logsigmoid),
    "sigmoid": ("Sigmoid", lambda x: x.sigmoid()),
    "tanh": ("Tanh", torch.tanh),
    "avg_pool2d": ("AvgPool2d", lambda x: F.avg_pool2d(x, kernel_size=2, stride=1, padding=1)),
    "adaptive_avg_pool2d": ("AdaptiveAvgPool2d", lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
    "max_pool2d": ("MaxPool2d", lambda x: F.max_pool2d(x, 3, stride=2, padding=1)),
    "dropout": ("Dropout", lambda x: F.dropout(x, p=0.2, training=False)),
    "contiguous": ("Identity", lambda x: x.contiguous()),
    "stochastic_depth": ("Identity", lambda x: DEPTH.forward(x)),
    "avg_pool1d": ("AvgPool1d", lambda x: F.avg_pool1d(x.flatten(2), 2)),
    "avg_pool3d": ("AvgPool3d", lambda x: F.avg_pool3d(x, 2)),
    "adaptive_avg_pool1d": ("AdaptiveAvgPool1d", lambda x: F.adaptive_avg_pool1d(x.flatten(2), 2)),
    "adaptive_avg_pool3d": ("AdaptiveAvgPool3d", lambda x: F.adaptive_avg_pool3d(x, 1)),
    "max_pool1d": ("MaxPool1d", lambda x: F.max_pool1d(x.flatten(2), 2)),
    "max_pool3d": ("MaxPool3d", lambda x: F.max_pool3d(x, 2)),
    "view": ("Reshape", lambda x: x.view(x.size(0), -1)),
    "view, in part": ("Reshape", lambda x: x.view(x.shape[0], 2, -1)),
    "reshape": ("Reshape", lambda x: torch.reshape(x, (x.shape[0], -1))),
    "flatten": ("Reshape", lambda x: torch.flatten(x, start_dim=1)),
    "unflatten": ("Reshape", lambda x: x.unflatten(1, (2, 1))),
    "squeeze": ("Reshape", lambda x: x[:, :1].squeeze(1)),
    "unsqueeze": ("Reshape", lambda x: x.unsqueeze(1)),
    "gelu": ("GELU", lambda x: F.gelu(x, approximate="tanh")),
    "silu": ("SiLU", F.silu),
    "mish": ("Mish", F.mish),
    "hardswish": ("Hardswish", lambda x: F.hardswish(x, inplace=True)),
    "hardsigmoid": ("Hardsigmoid", F.hardsigmoid),
    "relu6": ("ReLU6", F.relu6),
    "hardtanh": ("Hardtanh", lambda x: F.hardtanh(x, -0.5, max_val=0.5)),
    "clamp": ("Hardtanh", lambda x: x.clamp(-0.2, 0.2)),
    "clip": ("ReLU", lambda x: torch.clip(x, min=0)),
    "softmax": ("Softmax", lambda x: F.softmax(x, dim=1)),
    "clone": ("Identity", lambda x: x.clone()),
    "interpolate": ("interpolate", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "pad": ("pad", lambda x: F.pad(x, (1, 0, 2, 1), mode="reflect")),
    "mean": ("mean", lambda x: x.mean([2, 3])),
    "mean, kept": ("mean", lambda x: torch.mean(x, dim=(2, 3), keepdim=True)),
    "a part": ("getitem", lambda x: x[:, :, 1:]),
    "alone": ("cat", lambda x: torch.cat([x], 1)),
    "permute": ("Permute", lambda x: x.permute(0, 2, 3, 1)),
    "transpose": ("Permute", lambda x: torch.transpose(x, 1, -1)),
    "swapaxes": ("Permute", lambda x: x.swapaxes(1, 2)),
    "swapdims": ("Permute", lambda x: x.swapdims(1, 2)),
    "movedim": ("Permute", lambda x: x.movedim(1, -1)),
    "moveaxis": ("Permute", lambda x: x.moveaxis(1, -1)),
    "pixel_shuffle": ("PixelShuffle", lambda x: F.pixel_shuffle(torch.cat([x, x], 1), 2)),
    "pixel_unshuffle": ("PixelUnshuffle", lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": ("ChannelShuffle", lambda x: F.channel_shuffle(x, 2)),
    "no rule": ("square", torch.square),
    "a distance": ("sub", lambda x: 1 - x),
    "a factor": ("mul", lambda x: torch.tanh(x) * 2),
}


OPAQUE = {"square"}


def test_every_operation_of_the_table_is_called() -> None:
    assert set(OPERATIONS) | RESHAPES | PERMUTES <= set(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_an_operation_becomes_its_layer(call: str) -> None:
    kind, function = CALLS[call]
    if call == "reshape":
        try:
            fx.symbolic_trace(Passing(lambda x, a: function(a(x)), a=nn.Identity()))
        except TypeError:
            pytest.skip("this torch.fx takes no traced size in torch.reshape's shape")
    layer = nn.Conv3d(1, 2, 2) if "3d" in call else nn.Conv2d(1, 2, 2)
    shape = (1, 5, 5, 5) if "3d" in call else (1, 5, 5)
    steps = agrees(Passing(lambda x, a: function(a(x)), a=layer), shape)
    assert kinds(steps)[0] == type(layer).__name__ and kinds(steps)[-1] == kind
    assert (type(steps[-1].module) is Call) is (kind in OPAQUE)


@pytest.mark.parametrize("bend", [0.0, 1e-4])
def test_what_bends_a_little_is_not_linear(bend: float) -> None:
    assert _linear(torch.ones(1, 2, 3), lambda x: 1 + x + bend * x * x) == (bend == 0)
    assert not _linear(torch.ones(1, 2, 3), lambda x: x - x.mean(0))  # it mixes samples


# --- ways that part and meet again --------------------------------------------------------------


def conv(channels: int = 2, out: int = 2) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def residual(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    out = b(torch.tanh(a(x)))
    out += x
    return torch.relu(out)


def squeeze_excite(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return x * torch.sigmoid(b(F.relu(a(F.adaptive_avg_pool2d(x, 1)))))


def nested(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    y = a(x)
    return x + torch.tanh(y + b(torch.tanh(y)))


def split(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    one, two = x.chunk(2, dim=1)
    return torch.cat([one, two.tanh()], dim=1) + b(a(x))


BRANCHES: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "residual": (residual, ["Residual", "ReLU"]),
    "two ways": (lambda x, a, b: torch.add(a(x), b(x)), ["Residual"]),
    "joined": (lambda x, a, b: torch.cat([a(x), b(x), x], 1), ["Branches"]),
    "squeeze and excitation": (squeeze_excite, ["Branches"]),
    "nested": (nested, ["Branches"]),
    "split": (split, ["Branches"]),
    "in a row": (lambda x, a, b: (lambda y: y + b(y))(x + a(x)), ["Residual", "Residual"]),
}


@pytest.mark.parametrize("case", BRANCHES)
def test_all_between_a_parting_and_a_meeting_is_one_step(case: str) -> None:
    way, wanted = BRANCHES[case]
    steps = agrees(Passing(way, a=conv(), b=conv()), (2, 5, 5))
    assert kinds(steps) == wanted
    named = {known for step in steps for _, known in step.parameters()}
    assert named == {f"layers.{m}.{p}" for m in "ab" for p in ("weight", "bias")}


def test_a_block_says_what_in_it_cannot_be_followed_and_which_gradients_do_not_jump() -> None:
    model = Passing(
        lambda x, a, n, r, b: x + b(r(n(a(x)))),
        a=conv(), n=nn.BatchNorm2d(2), r=nn.LeakyReLU(), b=conv(),
    )  # fmt: skip
    for mode in (True, False):
        (step,) = trace(model.train(mode), (2, 4, 4))
        assert step.rule.refusal is None and step.rule.kinked
    names = dict(step.parameters())
    smooth = {names[own] for own in step.module.smooth()}
    assert smooth == {"layers.b.weight", "layers.b.bias"}
    drawn = nn.FractionalMaxPool2d(1, output_size=4)
    model = Passing(lambda x, a, p, b: x + b(p(a(x))), a=conv(), p=drawn, b=conv())
    (step,) = trace(model, (2, 4, 4))
    assert "layers.p (FractionalMaxPool2d) inside cannot be followed" in str(step.rule.refusal)


MODELS = {
    "resnet18": 32, "densenet121": 32, "mobilenet_v3_small": 32, "squeezenet1_1": 64,
    "googlenet": 32, "shufflenet_v2_x0_5": 32, "alexnet": 64, "convnext_tiny": 32,
    "efficientnet_b0": 32, "mnasnet0_5": 32, "regnet_y_400mf": 32, "mobilenet_v2": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_a_known_network_compute_its_output(name: str) -> None:
    more = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, **more).eval()
    steps = agrees(model, (3, MODELS[name], MODELS[name]))
    named = {known for step in steps for _, known in step.parameters()}
    unused = {n for n, _ in model.named_parameters() if n.startswith("aux") or "layer_scale" in n}
    layers = [m for step in steps for m in step.module.modules()]
    assert not [m.name for m in layers if type(m) is Call]
    assert named == {n for n, _ in model.named_parameters()} - unused


# --- what is refused ----------------------------------------------------------------------------

LINEAR, SHARED = nn.Linear(3, 3), nn.Linear(3, 3)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.tanh()


TWICE = "are the same layer, used twice"
REFUSED: list[tuple[nn.Module, str]] = [
    (Passing(lambda x, a: a(a(x).tanh()), a=LINEAR), rf"layers\.a and layers\.a {TWICE}"),
    (nn.Sequential(SHARED, nn.Tanh(), nn.Sequential(SHARED)), TWICE),
    (Passing(lambda x, a: a(x) + a(x.tanh()), a=LINEAR), TWICE),
    (TwoInputs(), "second input, 'y'"),
    (Passing(lambda x: x if x.sum() > 0 else -x), "cannot trace the forward pass of Passing"),
    (Passing(torch.flatten), "keep the batch dimension"),
    (Passing(lambda x: (x.tanh(), x)), "gives a tuple; one tensor .* Wrap it so that"),
    (Passing(lambda x: {"out": x.tanh()}), "gives a dict; one tensor .* Wrap it so that"),
    (Passing(lambda x: x.transpose(0, 1)), "transpose must keep the batch dimension"),
    (Passing(lambda x: torch.max(x, 1)), "gives a tuple; one tensor .* Wrap it so that"),
    (Passing(lambda x: torch.ones(2)), "gives a constant"),
    (nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2)), "1 gives a tuple, not one tensor"),
]


@pytest.mark.parametrize(("model", "says"), REFUSED)
def test_what_cannot_be_read_is_refused_by_name(model: nn.Module, says: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=says):
        trace(model, (3,))


def test_helpers_beside_the_output_are_named_with_what_to_do() -> None:
    model = torchvision.models.googlenet(weights=None, init_weights=False).train()
    with pytest.raises(
        UnsupportedLayerError, match=r"Call \.eval\(\), or build .*aux_logits=False"
    ):
        trace(model, (3, 64, 64))


@pytest.mark.parametrize(
    ("shape", "place"),
    [((3, 5, 5), "0 does not take"), ((1, 4, 4), "3 does not take"), ((1, 2, 2), "0 does not")],
)
def test_a_wrong_input_shape_is_refused_where_it_fails(shape: Shape, place: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    with pytest.raises(InvalidTensorError, match=place):
        trace(model, shape)
    added = Passing(lambda x, a: x + a(x), a=nn.Linear(3, 2))
    with pytest.raises(InvalidTensorError, match=r"add does not take inputs of shape \(3,\), \(2"):
        trace(added, (3,))
    assert len(trace(model, (1, 5, 5))) == 4


def test_an_interrupt_at_the_end_of_a_trace_leaves_torch_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C while torch.fx took its own back left every later call of any module traced."""
    method, patched = nn.Module.__call__, fx._symbolic_trace._PatchedFnSetAttr
    revert, raised = patched.revert, iter([KeyboardInterrupt])

    def interrupted(self: object) -> None:
        for error in raised:
            raise error
        revert(self)

    monkeypatch.setattr(patched, "revert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace(nn.Sequential(conv()), (2, 4, 4))
    assert nn.Module.__call__ is method
    assert len(trace(nn.Sequential(conv()), (2, 4, 4))) == 1
