"""A model as a chain of layers: found however it is written, refused where it is none."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradinv_edu.chain import Reshape, Step, trace
from gradinv_edu.errors import InvalidTensorError, UnsupportedLayerError


def _run(steps: list[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step.module(x)
    return x


def _agrees(model: nn.Module, shape: tuple[int, ...]) -> list[Step]:
    """The chain computes what the model computes, and its shapes fit each other."""
    steps = trace(model, shape)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x)
        torch.testing.assert_close(_run(steps, x), expected)
    assert steps[0].input_shape == shape
    assert steps[-1].output_shape == tuple(expected.shape[1:])
    for one, two in pairwise(steps):
        assert one.output_shape == two.input_shape
    return steps


def _kinds(steps: list[Step]) -> list[str]:
    return [type(s.module).__name__ for s in steps]


# --- sequential --------------------------------------------------------------------------------


def test_nested_sequential_is_flattened_with_the_names_of_its_parameters() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
        nn.Identity(),
        nn.Sequential(nn.Sequential(nn.AvgPool2d(2)), nn.Flatten()),
        nn.Dropout(0.5),
        nn.Linear(36, 10),
    ).eval()
    steps = _agrees(model, (1, 6, 6))
    names = ["0.0", "0.1", "0.2", "1", "2.0.0", "2.1", "3", "4"]
    assert [s.name for s in steps] == names
    assert {f"{s.name}.weight" for s in steps if s.weighted} <= dict(
        model.named_parameters()
    ).keys()
    assert [s.weighted for s in steps] == [i in (0, 7) for i in range(8)]
    assert [s.pooling for s in steps] == [i == 4 for i in range(8)]
    assert [s.elementwise for s in steps] == [i in (1, 2, 6) for i in range(8)]
    assert [s.reshaping for s in steps] == [i in (3, 5) for i in range(8)]


def test_one_layer_is_a_chain() -> None:
    (step,) = _agrees(nn.Linear(3, 2), (3,))
    assert (step.name, step.input_shape, step.output_shape) == ("", (3,), (2,))


def test_unflatten_and_signals() -> None:
    model = nn.Sequential(nn.Unflatten(1, (2, 8)), nn.Conv1d(2, 3, 3, stride=2), nn.Flatten())
    steps = _agrees(model, (16,))
    assert [s.reshaping for s in steps] == [True, False, True]


def test_the_chain_is_a_double_copy_in_the_same_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    before = copy.deepcopy(model)
    steps = trace(model, (3,))
    assert [s.module.training for s in steps] == [True, False, True, True]
    for step in steps:
        assert all(p.dtype == torch.float64 for p in step.module.parameters())
        for p in step.module.parameters():
            p.data.zero_()
    for (name, a), (_, b) in zip(
        before.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b) and a.dtype == b.dtype, name


def test_batch_norm_in_train_mode_spends_no_statistics_on_a_shape() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
    steps = trace(model, (1, 5, 5))
    assert int(steps[1].module.num_batches_tracked) == 0
    assert bool((steps[1].module.running_mean == 0).all())


# --- forward passes of one's own ---------------------------------------------------------------


class Functional(nn.Module):
    """A forward pass as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sigmoid())
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        x = F.avg_pool2d(x, 2)
        x = self.block(x)
        x = F.adaptive_avg_pool2d(x, 1)
        x = torch.flatten(x, 1)
        x = F.dropout(x, 0.3, training=False)
        return torch.tanh(self.fc(x)) if True else x


def test_a_forward_pass_with_functional_calls_is_traced() -> None:
    steps = _agrees(Functional(), (1, 8, 8))
    assert _kinds(steps) == [
        "Conv2d",
        "LeakyReLU",
        "AvgPool2d",
        "Conv2d",
        "Sigmoid",
        "AdaptiveAvgPool2d",
        "Reshape",
        "Dropout",
        "Linear",
        "Tanh",
    ]
    assert [s.name for s in steps if s.weighted] == ["conv1", "block.0", "fc"]
    assert steps[1].module.negative_slope == 0.2
    assert isinstance(steps[6].module, Reshape) and steps[6].reshaping
    assert not steps[7].module.training


CALLS = {
    "relu": lambda x: F.relu(x),
    "relu, in place": lambda x: F.relu(x, inplace=True),
    "torch relu": lambda x: torch.relu(x),
    "method relu": lambda x: x.relu(),
    "leaky": lambda x: F.leaky_relu(x, negative_slope=0.3),
    "elu": lambda x: F.elu(x, alpha=0.5),
    "celu": lambda x: F.celu(x, 0.5),
    "selu": lambda x: F.selu(x),
    "softplus": lambda x: F.softplus(x, beta=2),
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": lambda x: torch.tanh(x),
    "pool": lambda x: F.avg_pool2d(x, kernel_size=2, stride=1, padding=1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, output_size=(2, 3)),
    "dropout": lambda x: F.dropout(x, p=0.2, training=False),
    "view": lambda x: x.view(x.size(0), -1),
    "view, shape": lambda x: x.view(x.shape[0], -1),
    "reshape": lambda x: x.reshape(x.size(0), -1),
    "torch reshape": lambda x: torch.reshape(x, (x.size(0), -1)),
    "flatten": lambda x: x.flatten(1),
    "flatten, named": lambda x: torch.flatten(x, start_dim=1),
}


class Called(nn.Module):
    def __init__(self, call: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return CALLS[self.call](self.conv(x))


@pytest.mark.parametrize("call", CALLS)
def test_a_functional_call_becomes_its_layer(call: str) -> None:
    steps = _agrees(Called(call), (1, 5, 5))
    assert len(steps) == 2 and not steps[1].weighted


def test_a_custom_module_inside_a_sequential_keeps_its_names() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sequential(Functional()))
    steps = _agrees(model, (1, 8, 8))
    named = dict(model.named_parameters())
    assert all(f"{s.name}.weight" in named for s in steps if s.weighted)
    assert [s.name for s in steps if s.weighted] == ["0", "1.0.conv1", "1.0.block.0", "1.0.fc"]


def test_a_function_dropout_in_training_stays_in_train_mode() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.4)

    (step,) = trace(Dropping(), (3,))
    assert isinstance(step.module, nn.Dropout) and step.module.p == 0.4 and step.module.training


# --- what is no chain --------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.tanh()


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.one(x)
        return self.two(x)


class Flattening(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x)


class Viewing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), 2, -1)


class Squaring(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.square(x)


class Scaling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * 2


REFUSED = [
    (Residual(), (1, 4, 4), "not a chain: 'add' takes x, conv"),
    (nn.Sequential(nn.Conv2d(1, 1, 1), Residual()), (1, 4, 4), "not a chain: 'add'"),
    (Twice(), (3,), "fc and fc are the same layer, used twice"),
    (Branching(), (3,), "cannot trace the forward pass of Branching"),
    (TwoInputs(), (3,), "second input, 'y'"),
    (Skipping(), (3,), "not a chain: 'two' takes x"),
    (Flattening(), (3,), "keep the batch dimension"),
    (Viewing(), (4,), "handled where they flatten"),
    (Squaring(), (3,), "'square' calls square"),
    (Scaling(), (3,), "'mul' calls mul"),
]


@pytest.mark.parametrize(("model", "shape", "message"), REFUSED)
def test_what_is_no_chain_is_refused_by_name(
    model: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        trace(model, shape)


class Bottleneck(nn.Module):
    """A projected shortcut, an addition in place, and a block within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act = Residual(), nn.ReLU(inplace=True)
        self.wide, self.short = nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(1, 2, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.act(self.inner(x)))
        y += self.short(x)
        return torch.relu(y)


def test_a_sum_of_two_ways_is_one_layer_where_sums_are_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), Bottleneck(), nn.Flatten(), nn.Linear(8, 2)).double()
    steps = trace(model, (1, 4, 4), sums=True)
    assert [s.name for s in steps] == ["0", "1.add_1", "1.relu", "2", "3"]
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    kept, found = x.clone(), x
    for step in steps:
        found = step.module(found)
    assert torch.equal(found, model(x)) and torch.equal(x, kept)
    names = dict(pair for step in steps for pair in [(k, o) for o, k in step.parameters()])
    assert set(names) == dict(model.named_parameters()).keys()
    assert steps[1].module.get_parameter(names["1.inner.conv.weight"]).shape == (1, 1, 3, 3)
    assert [s.summing for s in steps] == [False, True, False, False, False]


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return x + self.fc(x)


class Joining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.tanh()], 1)


class TwiceInASum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc(torch.tanh(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Beside(), "'unused' does not lead to its output"),
        (Joining(), "not a chain: 'cat' takes x, tanh"),
        (TwiceInASum(), "fc and fc are the same layer, used twice"),
    ],
)
def test_other_branches_are_refused_even_so(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        trace(model, (3,), sums=True)


def test_a_shared_layer_in_a_sequential_is_refused() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared))
    with pytest.raises(UnsupportedLayerError, match=r"2\.0 and 0 are the same layer, used twice"):
        trace(model, (3,))
    with pytest.raises(UnsupportedLayerError, match="2 and 0 are the same layer, used twice"):
        trace(nn.Sequential(shared, nn.Tanh(), shared), (3,))


def test_an_activation_may_be_used_twice() -> None:
    act = nn.Tanh()
    assert len(_agrees(nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 2), act), (3,))) == 4


@pytest.mark.parametrize(
    ("shape", "place"),
    [((3, 5, 5), "0 does not take"), ((1, 4, 4), "3 does not take"), ((1, 2, 2), "0 does not")],
)
def test_a_wrong_input_shape_is_refused_where_it_fails(shape: tuple[int, ...], place: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    with pytest.raises(InvalidTensorError, match=place):
        trace(model, shape)
    assert len(trace(model, (1, 5, 5))) == 4
