"""Max pooling undone: winners' candidates, small networks, and what must not be believed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import Shape, distance, normal, seeded
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.engine import unpool
from gradinv_edu.engine.folded import Folded
from gradinv_edu.engine.winners import Winners, find_winners, windows
from gradinv_edu.errors import (
    InconsistentGradientError,
    InvalidTensorError,
    NotRecoveredError,
    UnsupportedLayerError,
    VanishingGradientError,
)

# --- which entries may hold which maximum -------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn) -> tuple[nn.Module, Shape]:
    """A pooling of every kind, and the shape of a map that it takes."""
    sides = st.integers(1, 9)
    if draw(st.booleans()):
        H, W = draw(sides), draw(sides)
        return nn.AdaptiveMaxPool2d((draw(st.integers(1, H)), draw(st.integers(1, W)))), (H, W)
    dimensions, size = draw(st.integers(1, 2)), st.integers(1, 3)
    kernel = [draw(size) for _ in range(dimensions)]
    options: dict[str, Any] = {
        "stride": tuple(draw(st.integers(1, 4)) for _ in kernel),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "dilation": draw(st.integers(1, 2)),
        "ceil_mode": draw(st.booleans()),
    }
    kind = (nn.MaxPool1d, nn.MaxPool2d)[dimensions - 1]
    options = {
        n: v[0] if dimensions == 1 and isinstance(v, tuple) else v for n, v in options.items()
    }
    pool = kind(kernel[0] if dimensions == 1 else tuple(kernel), **options)
    shape = tuple(draw(sides) for _ in kernel)
    try:
        assume(bool(pool(torch.zeros(1, 1, *shape)).isfinite().all()))  # no window all padding
    except RuntimeError:  # larger than the map
        assume(False)
    return pool, shape


def listed(pool: nn.Module, maps: Tensor, k: Tensor, relu: bool) -> Winners:
    filters, shape = len(maps), tuple(maps.shape[1:])
    pooled = pool(maps[None]).reshape(filters, -1)
    bounds = pooled.clamp_min(0) if relu else pooled
    live = pooled > 0 if relu else torch.ones_like(pooled, dtype=torch.bool)
    return find_winners(pooled, k, live, bounds, windows(pool, shape), shape, 1e-9)


@settings(max_examples=50)
@given(pools(), st.booleans(), st.integers(0, 1000))
def test_every_winner_is_among_its_candidates(
    case: tuple[nn.Module, Shape], relu: bool, seed: int
) -> None:
    pool, shape = case
    maps = normal((3, *shape), seed).requires_grad_()
    pooled = pool(maps[None])
    k = normal(pooled.shape, seed + 1) * (pooled > 0 if relu else 1)
    (k_below,) = torch.autograd.grad(pooled, maps, k)
    found = listed(pool, maps.detach(), k.reshape(3, -1), relu)
    there = (found.gather(maps.detach()) == found.values[:, None]) & found.possible
    assert bool((there.sum(1) == 1).all())
    placed = found.scatter(there * found.k[:, None])
    torch.testing.assert_close(placed[0], k_below)
    assert len(found.at(there.long().argmax(1)).unique()) == len(found.values)
    assert bool((maps.flatten(1) <= found.bounds).all())


def test_a_place_below_a_smaller_maximum_is_ruled_out() -> None:
    maps = torch.tensor([[[3.0, 1.0, 0.0, 2.0, 1.0]]])
    found = listed(nn.MaxPool2d((1, 3), stride=(1, 2)), maps, torch.ones(1, 2), relu=True)
    assert found.values.tolist() == [3, 2]
    assert found.places.tolist() == [[0, 1, -1], [2, 3, 4]]


def test_equal_maxima_of_windows_that_overlap_are_one_winner() -> None:
    maps = torch.tensor([[[0.0, 1.0, 5.0, 4.0, 2.0]]])
    found = listed(
        nn.MaxPool2d((1, 3), stride=(1, 2)), maps, torch.tensor([[1.0, 10.0]]), relu=True
    )
    assert found.values.tolist() == [5] and found.k.tolist() == [11]
    assert found.places.tolist() == [[2]]


def test_a_chain_of_equal_maxima_with_nothing_in_common_stays_apart() -> None:
    maps = torch.ones(1, 1, 7)
    found = listed(nn.MaxPool2d((1, 3), stride=(1, 2)), maps, torch.ones(1, 3), relu=True)
    assert found.values.tolist() == [1, 1, 1]
    assert found.places.tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]


# --- small networks -----------------------------------------------------------------------------


def filter_gradient(module: nn.Module, x: Tensor, k: Tensor) -> Tensor:
    """Of the convolution's weight alone, where a norm with one of its own follows."""
    weight = next(module.parameters())
    return torch.autograd.grad((module(x) * k).sum(), weight)[0]


@dataclass
class Pooled:
    """A convolution below a max pooling, its input, and all that a server learns of it."""

    conv: nn.Module
    pool: nn.Module
    x: Tensor
    activation: nn.Module | None = None
    below: nn.Module | None = None

    def __post_init__(self) -> None:
        a = self.x if self.below is None else self.below(self.x).relu()
        y = self.conv(a)
        z = y if self.activation is None else self.activation(y)
        self.value = self.pool(z)
        self.k = normal(self.value.shape, 5).to(self.x.dtype)
        (self.k_below,) = torch.autograd.grad(self.value, y, self.k, retain_graph=True)
        self.gradient = filter_gradient(self.conv, a.detach(), self.k_below)
        self.value = self.value.detach()

    def solve(self, **options: Any) -> unpool.Unpooled:
        options = {"activation": self.activation, "below": self.below, **options}
        given = [options.pop(n, getattr(self, n)) for n in ("value", "k", "gradient")]
        return unpool.solve(self.conv, self.pool, *given, tuple(self.x.shape[1:]), **options)


def photo(height: int, width: int) -> Tensor:
    return gi.data.photo("cat", (height, width), dtype=torch.float64)


def conv(channels: int, filters: int, *size: Any, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return nn.Conv2d(channels, filters, *size, **options).double()


def normed(layer: nn.Module) -> nn.Module:
    norm = seeded(nn.BatchNorm2d(layer.out_channels), 4).eval()  # type: ignore[arg-type]
    for name in ("weight", "bias", "running_mean"):
        getattr(norm, name).data.abs_().mul_(0.1).add_(float(name == "weight"))
    return nn.Sequential(layer, norm)


CASES = {
    "overlap, ReLU, batch norm": lambda: Pooled(
        normed(conv(3, 48, 5, stride=2, padding=2, bias=False)),
        nn.MaxPool2d(3, 2, 1), photo(16, 16), nn.ReLU(),
    ),
    "rectangles, gaps": lambda: Pooled(
        conv(3, 48, 3, padding=1), nn.MaxPool2d((2, 3), (3, 3)), photo(12, 10), nn.ReLU()
    ),
    "dilation, rounded up": lambda: Pooled(
        conv(3, 24, 3, padding=1), nn.MaxPool2d(2, dilation=2, ceil_mode=True), photo(11, 9),
        nn.LeakyReLU(0.1),
    ),
    "adaptive, without activation": lambda: Pooled(
        conv(3, 24, 3, padding=1), nn.AdaptiveMaxPool2d((4, 5)), photo(11, 12)
    ),
    "tanh, two groups": lambda: Pooled(
        conv(4, 32, 3, groups=2), nn.MaxPool2d(2), photo(12, 12)[:, [0, 1, 2, 0]], nn.Tanh()
    ),
    "two convolutions": lambda: Pooled(
        conv(24, 24, 3, padding=1), nn.MaxPool2d(2), photo(12, 12), nn.ReLU(),
        normed(conv(3, 24, 3, padding=1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_small_networks_are_undone(name: str) -> None:
    case = CASES[name]()
    found = case.solve()
    assert found.verified and found.solution.full_rank and found.misfit < 1e-8
    assert distance(found.solution.x, case.x) < 1e-9
    assert distance(found.k, case.k_below) < 1e-12
    assert found.equations > case.x.numel()


def test_signals_are_undone() -> None:
    torch.manual_seed(0)
    x = normal((1, 2, 40), 1).cumsum(-1) / 4
    case = Pooled(nn.Conv1d(2, 24, 5, padding=2).double(), nn.MaxPool1d(3, 2), x, nn.ReLU())
    found = case.solve()
    assert found.verified and distance(found.solution.x, x) < 1e-9


def test_a_flat_part_of_the_picture_does_no_harm() -> None:
    """Ties that are no shared winners: every place of the flat part has the same patch."""
    case = CASES["overlap, ReLU, batch norm"]()
    x = case.x.clone()
    x[:, :, 4:12] = 1.0
    case = Pooled(case.conv, case.pool, x, nn.ReLU())
    found = case.solve()
    assert found.verified and distance(found.solution.x, x) < 1e-9


def test_values_that_are_not_known_cost_equations_only() -> None:
    case = CASES["overlap, ReLU, batch norm"]()
    known = torch.ones_like(case.value)
    known[:, ::9] = 0
    k = case.k * known
    whole = Pooled(case.conv, case.pool, case.x, case.activation)
    y = case.conv(case.x)
    (k_below,) = torch.autograd.grad(case.pool(y.relu()), y, k, retain_graph=True)
    gradient = filter_gradient(case.conv, case.x, k_below)
    hidden = case.value * known  # a bound of zero, were it believed
    found = whole.solve(k=k, gradient=gradient, value=hidden, weight=known)
    assert found.verified and distance(found.solution.x, case.x) < 1e-9


def test_float32_gives_what_float32_can() -> None:
    case = CASES["overlap, ReLU, batch norm"]()
    conv32, x = copy.deepcopy(case.conv).float(), case.x.float()
    single = Pooled(conv32, case.pool, x, case.activation)
    found = single.solve(noise=6e-8)
    assert found.verified and found.solution.x.dtype == torch.float64
    assert gi.metrics.psnr(found.solution.x, case.x) > 80


def test_a_round_can_be_watched_and_happens_again() -> None:
    case, seen = CASES["overlap, ReLU, batch norm"](), []
    found = case.solve(watch=lambda n, places, belief: seen.append((n, places, belief)))
    again = case.solve()
    assert torch.equal(found.solution.x, again.solution.x) and found.rounds == again.rounds
    assert [n for n, _, _ in seen] == list(range(1, found.rounds + 1))
    assert torch.equal(seen[-1][1], found.places)
    sure = [float((belief > 0.99).double().mean()) for _, _, belief in seen]
    assert sure[0] < 0.6 and sure[-1] > 0.9
    # the places are those where the layer's output has its maxima
    z = case.conv(case.x).reshape(-1)
    assert distance(z[found.places], found.winners.values) < 1e-9


def test_a_norm_of_its_own_statistics_leaves_the_brightness_open() -> None:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(600, 5)).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.uniform_(model[1].bias, 0.0, 0.2)
    x, loss = photo(10, 10), nn.CrossEntropyLoss()
    found = gi.recover(model, gi.observe(model, loss, x, torch.tensor([1])), (3, 10, 10), loss)
    factor = (found.inputs * x).sum() / found.inputs.square().sum()
    assert distance(factor * found.inputs, x) < 1e-11 and "brightness" in found.hidden[0]
    assert found.candidates[0].determined and not found.exact


def test_what_is_left_is_relative_to_the_values() -> None:
    case = CASES["rectangles, gaps"]()
    small, large = case.solve(rounds=0), copy.deepcopy(case.conv)
    for p in large.parameters():
        p.data *= 1024
    again = Pooled(large, case.pool, case.x, case.activation).solve(rounds=0)
    assert again.misfit == pytest.approx(small.misfit, rel=1e-9)


# --- what must not be believed ------------------------------------------------------------------


def test_too_few_live_windows_are_not_verified() -> None:
    case = Pooled(conv(3, 3, 3, padding=1), nn.MaxPool2d(4), photo(12, 12), nn.ReLU())
    found = case.solve(rounds=10)
    assert not found.verified and not found.solution.full_rank


def test_another_samples_gradient_is_not_verified() -> None:
    case = CASES["rectangles, gaps"]()
    found = case.solve(gradient=case.gradient + 1e-4 * normal(case.gradient.shape, 9), rounds=26)
    assert not found.verified and not found.solution.full_rank and found.misfit > 1e-8


def test_a_fit_by_chance_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many arrangements as the equations to spare can tell apart, none is proven."""
    case = CASES["rectangles, gaps"]()
    monkeypatch.setattr(Winners, "arrangements", 8.0 * 10**6)
    found = case.solve()
    assert found.misfit < 1e-8 and not found.verified and not found.solution.full_rank


def test_bad_arguments_are_refused() -> None:
    case = CASES["rectangles, gaps"]()
    with pytest.raises(InvalidTensorError, match="value has shape"):
        case.solve(value=case.value[..., 1:])
    with pytest.raises(InvalidTensorError, match="weight_gradient has shape"):
        case.solve(gradient=case.gradient[1:])
    with pytest.raises(InvalidTensorError, match="does not take inputs"):
        Folded(case.conv, (4, 12, 10))
    with pytest.raises(VanishingGradientError, match="weight_gradient"):
        case.solve(gradient=0 * case.gradient)
    with pytest.raises(InconsistentGradientError, match="leads below it"):
        case.solve(value=0 * case.value)
    for module, text in (
        (nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4)), "not above Conv2d"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padded with zeros"),
        (nn.Sequential(conv(3, 4, 3), nn.AvgPool2d(2)), "filter by filter"),
        (nn.Linear(3, 4), "not above Linear"),
    ):
        with pytest.raises(UnsupportedLayerError, match=text):
            Folded(module, (3, 6, 6))
    with pytest.raises(UnsupportedLayerError, match="cannot be listed"):
        windows(nn.FractionalMaxPool2d(2, output_size=3), (6, 6))
    with pytest.raises(InvalidTensorError, match="does not take maps"):
        windows(nn.MaxPool2d(7), (6, 6))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (4, 7, 6)),
        (nn.Conv1d(3, 5, 3, padding=2, dilation=2), (3, 9)),
        (nn.Conv3d(1, 2, 2), (1, 4, 3, 5)),
    ],
)
def test_a_folded_convolution_is_the_convolution(layer: nn.Module, shape: Shape) -> None:
    layer, a = layer.double(), normal((1, *shape), 0).requires_grad_()
    z, folded = layer(a), Folded(layer, shape)
    k = normal(z.shape, 1)
    G, below = torch.autograd.grad(z, (next(layer.parameters()), a), k)
    torch.testing.assert_close(folded(a), z)
    torch.testing.assert_close(folded.gradient(k, a), G)
    torch.testing.assert_close(folded.rows_adjoint(k), below)
    # the gradient's adjoints, in each of its two arguments
    product = (folded.gradient(k, a) * G).sum()
    torch.testing.assert_close((folded.rows(a, G) * k).sum(), product)
    torch.testing.assert_close((folded.rows_adjoint(k, G) * a).sum(), product)


def test_near_ties_are_left_to_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a smooth picture rows cannot tell places apart; without such rounds it takes longer."""
    torch.manual_seed(4)
    x = gi.data.photo("retina", 32, dtype=torch.float64)
    stem = nn.Conv2d(3, 64, 11, stride=4, padding=2).double()
    case = Pooled(stem, nn.MaxPool2d(3, 2), x, nn.ReLU())
    found = case.solve(rounds=20)
    assert found.verified and distance(found.solution.x, x) < 1e-9
    monkeypatch.setattr(unpool, "FREED", 0)
    assert not case.solve(rounds=20).verified


@pytest.mark.parametrize(("filters", "error"), [(1, NotRecoveredError), (40, None)])
def test_below_an_answer_in_doubt_nothing_is_blamed_on_the_gradient(
    monkeypatch: pytest.MonkeyPatch, filters: int, error: type[Exception] | None
) -> None:
    def contradicted(*_: object, **__: object) -> None:
        raise InconsistentGradientError("as a search would say")

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, filters, 2), nn.LeakyReLU(),
        nn.Flatten(), nn.Linear(9 * filters, 5),
    ).double()  # fmt: skip
    loss, x = nn.CrossEntropyLoss(), torch.rand(1, 1, 10, 10).double()
    update = gi.observe(model, loss, x, torch.tensor([2]))
    monkeypatch.setattr("gradinv_edu.engine.unpool.solve", contradicted)
    with pytest.raises(error or InconsistentGradientError, match="as a search would say") as caught:
        gi.recover(model, update, (1, 10, 10), loss)
    assert ("is not determined" in str(caught.value)) == bool(error)
