"""Rank: verdicts against dense ranks and against what recovery achieves; reports say why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import rank
from gradinv_edu.errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    UnsupportedLayerError,
    UnsupportedLossError,
)
from gradinv_edu.systems import LayerSystem

CE = nn.CrossEntropyLoss()
Pick = Callable[..., int]


def picker(generator: torch.Generator) -> Pick:
    def pick(*options: int) -> int:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    return pick


def random_net(pick: Pick) -> tuple[nn.Module, tuple[int, ...]]:
    """A small random chain: one to three convolutions of random geometry, then a dense layer."""
    kinds = [nn.Tanh(), nn.LeakyReLU(0.2), nn.ReLU(), nn.ELU(), nn.Sigmoid(), nn.Softplus()]
    torch.manual_seed(pick(*range(10**6)))
    channels, size = pick(1, 2, 3), pick(4, 5)
    shape = (channels, size, size)
    layers: list[nn.Module] = []
    for _ in range(pick(1, 1, 2, 3)):
        width, groups = pick(2, 3, 4, 6, 8), pick(1, 1, 1, channels)
        options = {"stride": pick(1, 1, 2), "padding": pick(0, 1), "bias": bool(pick(0, 1))}
        width += -width % groups
        layers += [nn.Conv2d(channels, width, pick(1, 2, 3), groups=groups, **options)]
        layers += [kinds[pick(*range(6))]]
        channels = width
        if pick(0, 0, 0, 1):
            layers.append(nn.AvgPool2d(2, 1))
    layers.append(nn.Flatten())
    flat = nn.Sequential(*layers)(torch.zeros(1, *shape)).numel()
    return nn.Sequential(
        *layers, nn.Linear(flat, pick(3, 5), bias=bool(pick(0, 1)))
    ).double(), shape


def random_nets(seed: int, count: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
    pick, found = picker(torch.Generator().manual_seed(seed)), []
    while len(found) < count:
        try:
            found.append(random_net(pick))
        except RuntimeError:  # a kernel larger than what is left of the picture
            continue
    return found


def dense_rank(system: LayerSystem) -> int:
    """By singular values, of the matrix that the system writes out itself."""
    return int(torch.linalg.matrix_rank(system.to_dense(scaled=True), rtol=1e-10))


# --- the verdict ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(4))
def test_every_verdict_is_the_dense_rank(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 300 networks in all, each by the routes that large layers take."""
    seen: list[tuple[LayerSystem, rank._Found]] = []
    assess = rank._assess

    def watched(system: LayerSystem, generator: torch.Generator) -> rank._Found:
        found = assess(system, generator)
        seen.append((system, found))
        return found

    monkeypatch.setattr(rank, "_assess", watched)
    monkeypatch.setattr(rank, "DENSE_UNKNOWNS", 12)
    for model, shape in random_nets(block, 78):
        gi.audit(model, shape, together=False, jacobian=False)
    methods = {found.method for _, found in seen}
    assert {"svd", "inertia", "gradient", "iterative"} <= methods
    for system, found in seen:
        truth = dense_rank(system)
        assert found.recoverable == (truth == system.unknowns)
        assert found.rank == truth, found


def test_the_audit_agrees_with_what_recovery_achieves() -> None:
    verdicts = []
    for model, shape in random_nets(7, 60):
        x = torch.rand(1, *shape, dtype=torch.float64)
        audit = gi.audit(model, shape, inputs=x, together=False, jacobian=False)
        update = gi.observe(model, CE, x, torch.tensor([1]))
        try:
            found = gi.recover(model, update, shape, CE, together=False)
        except GradientInversionError:
            assert not audit.exact
            continue
        assert audit.exact == found.exact, audit
        verdicts.append(audit.exact)
        deficient = [layer.name for layer in found.layers if not layer.full_rank]
        told = [a.name for a in reversed(audit.layers) if a.needed and not a.recoverable]
        assert deficient[:1] == told[:1]  # below the first, recovery walks on with a guess
    assert 10 < sum(verdicts) < len(verdicts) - 10


def test_layers_that_make_up_for_another_are_told_with_it() -> None:
    wide, narrow = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 2)
    layers = [wide, nn.LeakyReLU(0.2), narrow, nn.LeakyReLU(0.2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(288, 5)).double()
    audit = gi.audit(model, (3, 7, 7))
    second = audit.layers[1]
    assert second.deficiency > 0 and not second.recoverable
    assert second.settled and second.verdict == "determined together with 0" and audit.exact
    x = torch.rand(1, 3, 7, 7).double()
    update = gi.observe(model, CE, x, torch.tensor([1]))
    assert gi.recover(model, update, (3, 7, 7), CE).exact
    alone = gi.audit(model, (3, 7, 7), together=False)
    assert not alone.exact and f"{second.deficiency} dimensions" in alone.layers[1].verdict


def test_cnn6_and_cnn6_d() -> None:
    good = gi.audit(gi.models.cnn6(outputs=10), (3, 32, 32))
    assert good.exact and good.begins == "13" and good.network is None
    assert [layer.rank_index for layer in good.layers] == [0] * 7
    assert good.weighted_index == 0
    resistant = gi.audit(gi.models.cnn6_d(outputs=10), (3, 32, 32), together=False)
    second = resistant.layers[1]
    counts = (second.weight_equations, second.gradient_equations, second.unknowns, second.rank)
    assert counts == (1620, 2160, 3468, 3188)
    assert second.method == "inertia" and not second.recoverable and second.rank_index == -280
    assert not resistant.exact and "input of 2" in resistant.verdict
    assert resistant.weighted_index == round(-280 * 5 / 6)
    assert rank.rank_law(gi.models.cnn6_d()[2], (12, 17, 17)).rank == 3188


@pytest.mark.parametrize("width, exact", [(0.5, False), (3, True)])
def test_relu_is_a_matter_of_width(width: float, exact: bool) -> None:
    model = gi.models.wide_cnn((3, 16, 16), activation="relu", width=width)
    audit = gi.audit(model, (3, 16, 16))
    assert audit.exact == exact
    assert "dead" in " ".join(audit.notes)
    first = audit.layers[0]
    assert first.weight_equations < int(16 * width) * 64


# --- the law ----------------------------------------------------------------------------------


def random_convolution(pick: Pick) -> tuple[nn.Conv2d, tuple[int, ...]] | None:
    groups = pick(1, 1, 1, 2)
    C, F, size = groups * pick(1, 2, 3), groups * pick(1, 2, 3, 4, 6, 8), pick(4, 5, 6, 7, 8)
    options = {"stride": pick(1, 1, 2, 3), "padding": pick(0, 1, 2), "dilation": pick(1, 1, 1, 2)}
    conv = nn.Conv2d(C, F, pick(1, 2, 3, 4), groups=groups, bias=False, **options).double()
    try:
        conv(torch.zeros(1, C, size, size).double())
    except RuntimeError:
        return None
    return (conv, (C, size, size)) if C * size**2 <= 150 else None


def test_the_law_against_dense_ranks() -> None:
    """Both ways: an upper bound always, and the rank itself nearly always."""
    pick, tried, right = picker(torch.Generator().manual_seed(2)), 0, 0
    while tried < 400:
        drawn = random_convolution(pick)
        if drawn is None:
            continue
        conv, shape = drawn
        tried += 1
        out = conv(torch.zeros(1, *shape).double())
        A = rank._dense(LayerSystem(conv, torch.randn_like(out), shape))
        law, truth = rank.rank_law(conv, shape), rank._svd_rank(A)
        assert law.rank >= truth and law.gradient_rank >= rank._svd_rank(A[out.numel() :])
        right += law.rank == truth
    assert right >= 0.95 * tried


@settings(max_examples=40)
@given(
    channels=st.integers(1, 3),
    filters=st.integers(1, 8),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    masked=st.booleans(),
)
def test_pairs_of_filters_hold_the_same_equation(
    channels: int, filters: int, kernel: int, stride: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(filters)
    conv = nn.Conv2d(channels, filters, kernel, stride=stride, bias=False).double()
    k = torch.randn_like(conv(torch.zeros(1, channels, 8, 8).double()))
    mask = torch.ones_like(k)
    if masked:
        mask = (torch.rand(k.shape, generator=generator) < 0.5).double()
    k = k * mask
    A = rank._dense(LayerSystem(conv, k, (channels, 8, 8), mask))
    rows = int(mask.sum())
    flat = k.reshape(1, filters, -1)
    shared = rank._shared(flat[0], (mask != 0).reshape(1, filters, -1)[0])
    left_null = len(A) - rank._svd_rank(A)
    own = len(A) - rows - rank._svd_rank(A[rows:]) if len(A) > rows else 0
    assert left_null - own >= shared


def test_law_of_signals_volumes_and_what_is_no_convolution() -> None:
    signal = nn.Conv1d(2, 3, 5, stride=2, padding=2, bias=False).double()
    volume = nn.Conv3d(2, 2, 2, bias=False).double()
    circular = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False).double()
    for conv, shape in ((signal, (2, 24)), (volume, (2, 4, 4, 4)), (circular, (2, 6, 6))):
        k = torch.randn_like(conv(torch.zeros(1, *shape).double()))
        assert rank.rank_law(conv, shape).rank == dense_rank(LayerSystem(conv, k, shape))
    with pytest.raises(UnsupportedLayerError, match="no convolution"):
        rank.rank_law(nn.Linear(3, 4), (3,))
    with pytest.raises(InvalidTensorError, match="does not take inputs"):
        rank.rank_law(signal, (3, 24))
    with pytest.raises(InvalidTensorError, match="larger than"):
        rank.rank_law(nn.Conv2d(1, 1, 9), (1, 4, 4))


# --- the whole network ------------------------------------------------------------------------

SMOOTH_HEAD = [nn.Flatten(), nn.Linear(48, 200), nn.Tanh(), nn.Linear(200, 10)]
# network on 3×8×8 pixels: (layers, rank of its Jacobian); what each gives away is FIELD's table
EXAMPLES: dict[str, tuple[list[nn.Module], int]] = {
    "one hidden unit": ([nn.Flatten(), nn.Linear(192, 1), nn.Tanh(), nn.Linear(1, 10)], 192),
    "strided 1×1": ([nn.Conv2d(3, 8, 1, stride=2), nn.Flatten(), nn.Linear(128, 50)], 48),
    "pooled first": ([nn.AvgPool2d(2), *SMOOTH_HEAD], 48),
    "mean of a linear convolution": (
        [nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)],
        27,
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_rank_of_a_whole_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, expected = EXAMPLES[name]
    model = nn.Sequential(*layers).double()
    found = rank.jacobian_rank(model, (3, 8, 8))
    assert found.rank == expected <= found.unknowns
    assert found.full == (expected == 192) == (found.condition is not None)
    monkeypatch.setattr(rank, "ENTRIES", 0)  # as for large networks: random rows
    assert rank.jacobian_rank(model, (3, 8, 8)).rank == expected


def test_rank_of_a_whole_network_against_autograd() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(18, 2)).double()
    x, y = torch.rand(1, 1, 5, 5).double(), torch.tensor([1])
    weights = list(model.parameters())

    def gradient(picture: Tensor) -> Tensor:
        found = torch.autograd.grad(CE(model(picture), y), weights, create_graph=True)
        return torch.cat([g.flatten() for g in found])

    J = torch.autograd.functional.jacobian(gradient, x).reshape(-1, 25)
    found = rank.jacobian_rank(model, (1, 5, 5), inputs=x, targets=y, loss=CE)
    assert found.rank == int(torch.linalg.matrix_rank(J)) and found.parameters == len(J)


def test_a_deficient_layer_in_a_network_of_full_rank() -> None:
    convolutions = [nn.Conv2d(3, 12, 3, padding=1), nn.Tanh(), nn.Conv2d(12, 6, 3, stride=2)]
    model = nn.Sequential(*convolutions, nn.Tanh(), nn.Flatten(), nn.Linear(54, 10)).double()
    audit = gi.audit(model, (3, 8, 8), together=False)
    assert not audit.layers[1].recoverable and not audit.exact
    assert audit.network is not None and audit.network.full


def test_dead_units_tell_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    with torch.no_grad():
        model[1].bias.fill_(-100.0)
    audit = gi.audit(model, (3, 8, 8))
    assert audit.network is not None and audit.network.rank == 0
    assert audit.parameter_bound and not audit.exact


# --- the leak map -----------------------------------------------------------------------------


def test_leak_map_is_the_diagonal_of_the_projector() -> None:
    conv = nn.Conv2d(2, 3, 3, stride=2).double()
    system = LayerSystem(conv, torch.randn(1, 3, 4, 4).double(), (2, 9, 9))
    A = system.to_dense(scaled=True)
    truth = (torch.linalg.pinv(A) @ A).diagonal().reshape(2, 9, 9)
    found = rank.system_leak_map(system)
    assert torch.allclose(found, truth, atol=1e-8)
    assert float(found.sum()) == pytest.approx(dense_rank(system))


def test_leak_map_by_probing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gi.models.wide_cnn((3, 12, 12), activation="relu", width=0.5)
    exact = gi.rank.leak_map(model, (3, 12, 12))
    monkeypatch.setattr(rank, "EXACT_MAP", 0)
    probed = gi.rank.leak_map(model, (3, 12, 12), probes=40)
    assert float(probed.min()) >= 0 and float(probed.max()) <= 1
    assert float((probed - exact).abs().mean()) < 0.1
    assert float(probed.mean()) == pytest.approx(float(exact.mean()), abs=0.03)


def test_leak_map_of_a_stride_that_skips_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(128, 4))
    for whole in (False, True):
        found = rank.leak_map(model.double(), (3, 8, 8), whole=whole)
        seen = torch.zeros(3, 8, 8, dtype=torch.float64)
        seen[:, ::2, ::2] = 1
        assert torch.allclose(found, seen, atol=1e-6)


def test_leak_map_of_a_residual_network() -> None:
    from torchvision.models import resnet18

    found = rank.leak_map(resnet18(weights=None).eval(), (3, 16, 16))
    assert torch.allclose(found, torch.ones(3, 16, 16, dtype=torch.float64), atol=1e-6)


def test_leak_map_refuses() -> None:
    model = gi.models.mlp([12, 4, 3])
    with pytest.raises(InvalidArgumentError, match="probes"):
        rank.leak_map(model, (12,), probes=0)
    with pytest.raises(UnsupportedLayerError, match="begins with Sigmoid"):
        rank.leak_map(nn.Sequential(nn.Sigmoid(), nn.Linear(4, 3)), (4,))


# --- models in the wild -----------------------------------------------------------------------


class Textbook(nn.Module):
    """LeNet as textbooks write it: functions, max pooling, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(400, 120), nn.Linear(120, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(x + torch.relu(self.inside(x)), 1))


class LargeResidual(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64 * 64, 4)


class Narrow(nn.Module):
    """A residual block whose ways both lose pixels, and one that keeps them."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, filters, 3, 2, 1), nn.Conv2d(filters, filters, 3, 1, 1)
        self.short, self.head = nn.Conv2d(3, filters, 1, 2), nn.Linear(16 * filters, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.short(x) + self.two(torch.tanh(self.one(x))), 1))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_where_the_recursion_stops_is_told() -> None:
    found = gi.audit(Textbook(), (3, 32, 32))
    assert [layer.name for layer in found.layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert not found.exact and found.begins == "fc1"
    assert len(found.stops) == 2 and all("forgets" in s.reason for s in found.stops)
    assert found.stops[-1].name in found.verdict
    assert found.layers[3].verdict == "not needed"
    assert found.layers[1].recoverable  # its own equations would do, if only z were known


def test_residual_sums_and_batch_norm() -> None:
    from torchvision.models import resnet18

    small = gi.audit(Residual(), (3, 8, 8))
    assert [layer.kind for layer in small.layers] == ["Residual", "Linear"] and not small.stops
    assert small.exact and small.layers[0].rank == 192 and small.layers[0].method == "svd"
    large = gi.audit(LargeResidual(), (3, 64, 64))
    assert [stop.kind for stop in large.stops] == ["add"] and "branches" in large.stops[0].reason
    model = resnet18(weights=None)
    found = gi.audit(model, (3, 32, 32))
    kinds = {stop.kind for stop in found.stops}
    assert kinds == {"BatchNorm2d", "MaxPool2d", "add"} and not found.exact
    assert len(found.layers) == 22 and found.parameters == 11_689_512
    shortcut = next(a for a in found.layers if a.name == "layer2.0.downsample.0")
    assert not shortcut.recoverable and shortcut.rank == 1024 and "at least" in shortcut.verdict
    evaluated = gi.audit(model.eval(), (3, 32, 32))
    assert {stop.kind for stop in evaluated.stops} == {"MaxPool2d"}
    blocks = [layer for layer in evaluated.layers if layer.kind == "Residual"]
    assert len(blocks) == 8 and blocks[0].unknowns == 4096


@pytest.mark.parametrize("filters", [1, 2, 4, 8])
def test_the_audit_of_a_residual_block_agrees_with_its_recovery(filters: int) -> None:
    torch.manual_seed(filters)
    model = Narrow(filters).double()
    found = gi.audit(model, (3, 8, 8))
    loss = nn.CrossEntropyLoss()
    update = gi.observe(
        model, loss, gi.data.photo("cat", 8, dtype=torch.float64), torch.tensor([1])
    )
    assert gi.recover(model, update, (3, 8, 8), loss).exact == found.exact == (filters >= 4)


def test_batch_norm_in_a_chain() -> None:
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.AvgPool2d(2), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 16, 5)).double()
    assert gi.audit(model.eval(), (3, 8, 8)).exact
    training = gi.audit(model.train(), (3, 8, 8))
    assert not training.exact and "train mode" in training.verdict


def test_without_a_place_to_begin() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1)]
    found = gi.audit(nn.Sequential(*layers, nn.Flatten()), (3, 8, 8))
    assert found.begins is None and not found.exact and "begin" in found.stops[-1].reason


def test_models_and_shapes_that_are_refused() -> None:
    model = gi.models.cnn6((3, 16, 16))
    with pytest.raises(UnsupportedLayerError, match="cannot trace"):
        gi.audit(Branching(), (4,))
    with pytest.raises(UnsupportedLayerError, match="no dense or convolutional"):
        gi.audit(nn.Sequential(nn.ReLU()), (4,))
    with pytest.raises(InvalidTensorError, match="does not take inputs"):
        gi.audit(model, (5, 16, 16))
    with pytest.raises(InvalidTensorError, match="does not take inputs"):
        gi.audit(Residual(), (7, 8, 8))
    with pytest.raises(InvalidTensorError, match="inputs has shape"):
        gi.audit(model, (3, 16, 16), inputs=torch.zeros(2, 3, 16, 16))
    for shape in ((), (3, 0, 16), (3, 16.0, 16)):
        with pytest.raises(InvalidArgumentError, match="input_shape"):
            gi.audit(model, shape)
    with pytest.raises(InvalidTensorError, match="does not take inputs"):
        rank.jacobian_rank(model, (5, 16, 16))
    with pytest.raises(UnsupportedLayerError, match="no parameters"):
        rank.jacobian_rank(nn.ReLU(), (4,))


# --- the report -------------------------------------------------------------------------------


class Table(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scopes: list[str | None] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "th":
            self.scopes.append(dict(attrs).get("scope"))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_reports() -> None:
    model = nn.Sequential()
    model.add_module("<first>", nn.Linear(8, 4, bias=False))
    model.add_module("act", nn.Tanh())
    model.add_module("last", nn.Linear(4, 3, bias=False))
    audit = gi.audit(model, (8,))
    text = str(audit)
    assert re.search(r"<first>\s+Linear\s+8\s+4\s+32\s+8\s+0\s+determined", text)
    assert "44 parameters, no fewer than the 8" in text and "exact: True" in text
    table = Table()
    table.feed(audit._repr_html_())
    assert table.scopes == ["col"] * 8 + ["row"] * 2
    assert "caption" in table.tags and "<first>" in table.text and "first" not in table.tags
    plain = json.loads(json.dumps(audit.to_dict()))
    assert plain["layers"][0]["rank_index"] == 0 and plain["exact"] is True
    assert plain["verdict"] == "The gradient of one sample gives its input away exactly."
    assert plain["input_shape"] == [8] and plain["network"]["rank"] == 8


def test_nothing_of_the_callers_is_changed() -> None:
    from torchvision.models import resnet18

    chain = gi.models.wide_cnn((3, 4, 4), activation="relu", width=0.25, dropout=0.5).train()
    for model, size in ((chain, 4), (resnet18(weights=None, num_classes=4), 32)):
        before = {n: p.clone() for n, p in model.state_dict().items()}
        state = torch.get_rng_state()
        first = gi.audit(model, (3, size, size))
        assert torch.equal(state, torch.get_rng_state())
        assert str(first) == str(gi.audit(model, (3, size, size)))
        assert model.training and all(p.grad is None for p in model.parameters())
        assert all(p.requires_grad for p in model.parameters())
        assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_progress_and_generator() -> None:
    model = gi.models.wide_cnn((3, 4, 4), activation="relu")
    seeds = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    one, same, other = (
        gi.audit(model, (3, 4, 4), generator=g, progress=True, jacobian=True) for g in seeds
    )
    assert str(one) == str(same) and one.network is not None
    assert one.layers[0].weight_equations != other.layers[0].weight_equations


def test_squared_error_has_a_rank_and_it_is_the_dense_one() -> None:
    """Torch has no forward-mode rule for its own backward pass of ``nn.MSELoss``."""
    net = gi.models.mlp((9, 12, 3), "tanh", dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, n, generator=source, dtype=torch.float64) for n in (9, 3))

    def gradient(x: Tensor) -> Tensor:
        parts = torch.autograd.grad(nn.MSELoss()(net(x), y), net.parameters(), create_graph=True)
        return torch.cat([p.flatten() for p in parts])

    J = torch.autograd.functional.jacobian(gradient, x).flatten(1)
    found = rank.jacobian_rank(net, (9,), loss=nn.MSELoss(), inputs=x, targets=y)
    assert found.rank == int(torch.linalg.matrix_rank(J)) == 9


def test_what_has_no_audit_is_told_by_name() -> None:
    net = gi.models.mlp((64, 12, 10))
    for shape in (None, 64, (True, 8, 8)):
        with pytest.raises(InvalidArgumentError, match="input_shape is the shape of one sample"):
            rank.audit(net, shape)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLayerError, match=r"is a str, not a torch\.nn\.Module"):
        rank.audit("resnet18", (4,))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLayerError, match="has no layer"):
        rank.audit(nn.Sequential(), (4,))
    with pytest.raises(UnsupportedLayerError, match="weight is not initialised yet"):
        rank.audit(nn.Sequential(nn.LazyLinear(3)), (4,))
    with pytest.raises(UnsupportedLayerError):
        rank.audit(nn.LSTM(4, 4), (3, 4))
    nn.init.constant_(net[1].weight, torch.nan)
    for call in (rank.audit, rank.jacobian_rank, rank.leak_map):
        with pytest.raises(InvalidTensorError, match=r"1\.weight has NaN"):
            call(net, (1, 8, 8))


def test_losses_and_targets_that_do_not_fit_are_refused() -> None:
    net = gi.models.mlp((64, 12, 10))
    for targets in (torch.tensor([12]), torch.tensor([1.0]), torch.tensor([1, 2])):
        with pytest.raises(InvalidTensorError, match=r"does not take outputs \(1, 10\)"):
            rank.jacobian_rank(net, (1, 8, 8), targets=targets)
    with pytest.raises(UnsupportedLossError, match="not one number"):
        rank.jacobian_rank(net, (1, 8, 8), loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(InvalidArgumentError, match=r"positive number, got 1\.5"):
        rank.leak_map(net, (1, 8, 8), probes=1.5)  # type: ignore[arg-type]
