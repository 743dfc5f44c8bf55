"""Networks people use: blind convolutions, channels, and torchvision's nets from end to end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import distance, normal, seeded
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import gradinv_edu as gi
from gradinv_edu.engine.edges import _output_gradient
from gradinv_edu.engine.graph import trace
from gradinv_edu.engine.layers import rule_of
from gradinv_edu.engine.layers.branches import Block
from gradinv_edu.engine.propagation import Propagation
from gradinv_edu.errors import (
    InconsistentGradientError,
    InvalidTensorError,
    UnsupportedLayerError,
)
from gradinv_edu.networks import blind, may_be_blind
from gradinv_edu.systems import LayerSystem

CE, LABEL = nn.CrossEntropyLoss(), torch.tensor([3])
RESNET = (3, 32, 32)


def gradients(conv: nn.Module, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of the weight, and the sum that a bias would have."""
    (found,) = torch.autograd.grad(conv(x), conv.get_parameter("weight"), k)
    return found, k[0].flatten(1).sum(1)


# --- blind --------------------------------------------------------------------------------------

sizes = st.integers(1, 3)
spare = st.integers(0, 3)


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.integers(1, 2), spare, spare, spare, spare, st.integers(0, 10**6))
def test_blind_is_exact_where_enough_is_alive_and_says_nothing_elsewhere(
    h: int, w: int, groups: int, filters: int, channels: int, still: int, dark: int, seed: int
) -> None:
    ins, outs = groups * (h * w + channels), groups * (h * w + filters)
    conv = seeded(nn.Conv2d(ins, outs, 3, padding=1, groups=groups), seed)
    x, k = normal((1, ins, h, w), seed + 1), normal((1, outs, h, w), seed + 2)
    k[:, :still], x[:, :dark] = 0, 0
    found = blind(conv, *gradients(conv, x, k), (ins, h, w))
    if still > filters or dark > channels:
        assert found is None
    else:
        assert found is not None and found.solution.full_rank
        assert max(distance(found.solution.x, x), distance(found.k, k)) < 1e-6


def test_blind_takes_kernels_that_are_not_square_and_gradients_in_float32() -> None:
    conv = seeded(nn.Conv2d(8, 9, (3, 5), padding=(1, 2)), 1)
    x, k = normal((1, 8, 2, 3), 2), normal((1, 9, 2, 3), 3)
    G, total = gradients(conv, x, k)
    found = blind(conv, G, total, (8, 2, 3))
    rough = blind(conv, G.float().double(), total.float().double(), (8, 2, 3), noise=1.2e-7)
    assert found is not None and distance(found.solution.x, x) < 1e-10
    assert rough is not None and 1e-9 < distance(rough.solution.x, x) < 1e-3


def test_a_gradient_of_no_picture_leaves_a_residual() -> None:
    conv = nn.Conv2d(9, 9, 3, padding=1).double()
    found = blind(conv, normal(conv.weight.shape, 1), normal((9,), 2), (9, 2, 2))
    assert found is None or found.solution.residual > 0.1


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(8, 4, 3, padding=1), (8, 3, 3)),  # more positions than filters
        (nn.Conv2d(4, 8, 3, padding=1), (4, 3, 3)),  # … than channels
        (nn.Conv2d(8, 8, 3, padding=1, groups=4), (8, 2, 2)),  # … than a group has
        (nn.Conv2d(8, 8, 3, padding=1, stride=2), (8, 2, 2)),
        (nn.Conv2d(16, 16, 3), (16, 4, 4)),
        (nn.Conv2d(8, 8, 2, padding=1), (8, 2, 2)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (8, 2, 2)),
    ],
    ids=["filters", "channels", "groups", "stride", "padding", "even", "circular"],
)
def test_blind_is_not_begun_where_it_cannot_end(conv: nn.Conv2d, shape: tuple[int, ...]) -> None:
    assert not may_be_blind(conv, shape)
    assert may_be_blind(nn.Conv2d(8, 8, 3, padding=1), (8, 2, 2))


def test_an_output_gradient_is_read_where_patches_tell_places_apart() -> None:
    conv, x = nn.Conv2d(2, 3, 2, stride=2).double(), normal((1, 2, 4, 4), 1)
    k = normal((1, 3, 2, 2), 2)
    for same in (False, True):  # two places of one patch: their gradients add up unseen
        if same:
            x[:, :, :2, 2:] = x[:, :, :2, :2]
        found = _output_gradient(rule_of(conv), x, gradients(conv, x, k)[0], 0.0)
        assert found is None if same else found is not None and distance(found, k) < 1e-12


# --- along the edges of a block ---


class Branching(nn.Module):
    """``x`` and its ``tanh``, scaled, as two ways that meet."""

    def __init__(self, meet: str) -> None:
        super().__init__()
        self.meet, self.scale = meet, seeded(nn.BatchNorm2d(2), 3).eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale(torch.tanh(x))
        if self.meet == "reshaped":
            return x.flatten(1) + y.flatten(1)
        if self.meet == "cat":
            return torch.cat([x, y], 1)
        return x + y if self.meet == "sum" else x * y


def moved(meet: str) -> tuple[Propagation, list[Tensor], Callable[[Tensor], list[Tensor]]]:
    """A block's edges, their true values, and the gradient on each by the one at the output."""
    block = trace(Branching(meet).double(), (2, 3, 3))[0].module
    assert isinstance(block, Block)
    x = normal((1, 2, 3, 3), 1).requires_grad_()
    values = block.values(x, torch.Generator())

    def gradients_by(k: Tensor) -> list[Tensor]:
        return [*torch.autograd.grad(values[-1], values, k, retain_graph=True)]

    edges = Propagation(block, {"any": torch.zeros(1).double()}, (2, 3, 3), 1e-15)
    return edges, [value.detach() for value in values], gradients_by


def test_a_value_moves_back_through_a_reshape() -> None:
    edges, values, _ = moved("reshaped")
    edges._know(len(values) - 2, values[-2], None)  # one of the two flattened ways
    while edges._pass():
        pass
    found = edges.values[-1]
    assert found is not None and distance(found, values[-1]) < 1e-12


@pytest.mark.parametrize(("meet", "known"), [("cat", 3), ("sum", 0), ("sum", 1), ("product", 1)])
def test_what_moves_along_the_edges_of_a_block_is_true(meet: str, known: int) -> None:
    """From one value and the gradient at the output, or that of one way of a sum."""
    edges, values, gradients_by = moved(meet)
    k = normal(values[-1].shape, 2)
    truth = gradients_by(k)
    edges._know(known, values[known], None)
    edges.ks[2 if meet == "sum" else 3] = truth[2 if meet == "sum" else 3]
    while edges._pass():
        pass
    for found, true in zip([*edges.values, *edges.ks], [*values, *truth], strict=True):
        assert found is not None
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


def test_a_misread_unit_changes_what_lies_above_it() -> None:
    """The gradient of a way of a sum, of the sum, and what the sum hands to the other way."""
    edges, values, gradients_by = moved("sum")
    k, change = normal(values[-1].shape, 2), normal(values[1].shape, 4)
    truth = gradients_by(k)
    edges.ks[1:], edges.pulled = truth[1:], {(2, 0): k, (2, 1): k}  # type: ignore[assignment]
    edges._turned(1, change)
    edges._know(0, values[0], None)
    while edges._pass():
        pass
    after = gradients_by(k + change * truth[2] / truth[1])
    for found, true in zip(edges.ks, after, strict=True):
        assert found is not None
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


# --- by channel ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Conv2d(2, 1, 3, stride=2),  # leaves most of it open: both answer with the least norm
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(3, 3, (1, 3), padding=(0, 1), groups=3),
    ],
    ids=["plain", "deficient", "dilated", "depthwise"],
)
def test_by_channel_answers_as_the_dense_gradient_rows_do(conv: nn.Conv2d) -> None:
    conv = seeded(conv, 1)
    x = normal((1, conv.in_channels, 5, 5), 2)
    k = normal(conv(x).shape, 3)
    G, _ = gradients(conv, x, k)
    system = LayerSystem(conv, k, tuple(x.shape[1:]))
    units = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    rows = torch.stack([system.matvec(unit)[1].flatten() for unit in units], dim=1)
    found = system.by_channel(None, G)
    assert found is not None
    assert distance(found.x, torch.linalg.pinv(rows, rtol=1e-10) @ G.flatten()) < 1e-9
    rank = int(torch.linalg.matrix_rank(rows, rtol=1e-10))
    assert found.undetermined == pytest.approx(1 - rank / x.numel())


# --- whole networks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, Tensor, gi.Update]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = torchvision.models.resnet18(num_classes=10).eval().double()
    x = gi.data.photo("retina", 32, dtype=torch.float64)
    return model, x, gi.observe(model, CE, x, LABEL)


def test_resnet18_gives_a_photograph_away(resnet: tuple[nn.Module, Tensor, gi.Update]) -> None:
    model, x, update = resnet
    found = gi.recover(model, update, RESNET, CE)
    assert found.exact and distance(found.inputs, x) < 1e-9
    names = [report.name for report in found.layers]
    assert names[0].startswith("layer") and names[-1] == "conv1+…+maxpool"


@pytest.mark.parametrize("picture", ["astronaut", "cat"])
def test_resnet50_gives_it_away_in_float32(picture: str) -> None:
    """Its wide layers lose units to rounding: signs, and the filters that stand out, tell them."""
    with torch.random.fork_rng():
        torch.manual_seed(101)
        model = torchvision.models.resnet50(num_classes=10).eval()
    x = gi.data.photo(picture, 32)
    found = gi.recover(model, gi.observe(model, CE, x, LABEL), RESNET, CE)
    assert distance(found.inputs, x.double()) < 1e-5


class Small(nn.Module):
    """Two residual blocks under an average of all positions, norms with random statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        way = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2), nn.BatchNorm2d(2 * width))
        self.one, self.two = BasicBlock(width, width), BasicBlock(width, 2 * width, 2, way)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))


def small(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _with_statistics(Small(width).double().eval())


def _with_statistics(model: nn.Module) -> nn.Module:
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand_like(buffer))
        elif name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


@pytest.mark.parametrize(("width", "seed"), [(32, 1), (32, 2), (4, 4)])
def test_small_residual_nets_are_exact_where_the_audit_says_so(width: int, seed: int) -> None:
    model = small(width, seed)
    x = gi.data.photo("coffee", 8, dtype=torch.float64)
    said = gi.audit(model, (3, 8, 8), inputs=x, jacobian=False)
    found = gi.recover(model, gi.observe(model, CE, x, LABEL), (3, 8, 8), CE)
    assert said.exact == found.exact == (width > 4)
    if found.exact:
        assert distance(found.inputs, x) < 1e-9


def test_what_no_picture_explains_is_not_vouched_for() -> None:
    model, x = small(32, 1), gi.data.photo("coffee", 8, dtype=torch.float64)
    update = gi.observe(model, CE, x, LABEL)
    name = "one.conv1.weight"
    g = update.gradients[name]
    wrong = g + 1e-2 * g.abs().max() * normal(g.shape, 1)
    other = replace(update, gradients={**update.gradients, name: wrong})
    with contextlib.suppress(InconsistentGradientError):
        assert not gi.recover(model, other, (3, 8, 8), CE).exact


# --- bad input ------------------------------------------------------------------------------------


def test_a_picture_of_the_wrong_size_is_refused(
    resnet: tuple[nn.Module, Tensor, gi.Update],
) -> None:
    model, _, update = resnet
    with pytest.raises(InvalidTensorError, match=r"3.*channels|\(1, 32, 32\)"):
        gi.recover(model, update, (1, 32, 32), CE)


def test_a_forward_pass_that_looks_at_values_is_refused_by_name() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.layer(x)
            return z if z.sum() > 0 else -z

    x = torch.rand(1, 4)
    model = Fickle()
    update = gi.observe(model, CE, x, LABEL)
    with pytest.raises(UnsupportedLayerError, match="trace"):
        gi.recover(model, update, (4,), CE)


def test_a_model_without_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    with pytest.raises((InvalidTensorError, UnsupportedLayerError), match=r"parameter|layer"):
        gi.audit(model, (1, 2, 2))
