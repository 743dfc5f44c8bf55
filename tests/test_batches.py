"""A batch through a dense layer: mixtures, lonely rows, labels, and every sample again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from benchmarks.campaign import _wide
from gradinv_edu import batches
from gradinv_edu.errors import (
    InconsistentGradientError,
    InvalidArgumentError,
    InvalidTensorError,
    NotRecoveredError,
    UndeterminedScaleError,
    VanishingGradientError,
)

LOSS = nn.CrossEntropyLoss()
PHOTOS = ("astronaut", "cat", "coffee", "rocket", "retina", "china", "flower", "brick")
F64, F32 = torch.float64, torch.float32


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _samples(N: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = _generator(seed)
    return torch.randn(N, n, generator=g).double(), torch.randint(10, (N,), generator=g)


def _net(*sizes: int, seed: int = 0, activation: str = "relu", dtype: torch.dtype = F64):  # type: ignore[no-untyped-def]
    sizes = sizes if len(sizes) > 2 else (*sizes, 10)
    return gi.models.mlp(sizes, activation=activation, dtype=dtype, generator=_generator(seed))


def _first(model: nn.Sequential, x: Tensor, y: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
    sent = list(gi.observe(model, LOSS, x, y, **settings).gradients.values())  # type: ignore[arg-type]
    return sent[0], sent[1]


def _recovered(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """With the layer's own weights, which the server has."""
    layer = {"weight": model[1].weight, "bias": model[1].bias}
    return batches.recover_batch(*_first(model, x, y), len(x), **layer)


def _k(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """``∂L/∂z`` of the first layer, a row for each sample."""
    z = model[1](x.flatten(1)).detach().requires_grad_()
    (k,) = torch.autograd.grad(LOSS(model[2:](z), y), z)
    return k


def _error(truth: Tensor, found: Tensor) -> float:
    """Worst relative error after matching in the best order; infinite if one is named twice."""
    x = truth.flatten(1).double()
    gaps = (x[:, None] - found[None]).norm(dim=2) / x.norm(dim=1)[:, None]
    if sorted(gaps.argmin(dim=1).tolist()) != list(range(len(x))):
        return math.inf
    return float(gaps.min(dim=1).values.max())


# --- mixtures and lonely rows ------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 8), st.integers(0, 10_000))
def test_ratios_are_affine_mixtures_and_equal_ones_are_samples(N: int, seed: int) -> None:
    x, y = _samples(N, 30, seed)
    net = _net(30, 200, seed=seed)
    (G, b), k = _first(net, x, y), _k(net, x, y)
    sure = b.abs() > 1e-6
    shares = (k / k.sum(dim=0))[:, sure]
    assert torch.allclose(shares.sum(dim=0), torch.ones(int(sure.sum())).double())
    assert torch.allclose(G[sure] / b[sure, None], shares.T @ x, atol=1e-8, rtol=1e-6)
    alone = (k != 0).sum(dim=0) == 1
    named = {n for n in range(N) if int((alone & (k[n] != 0)).sum()) > 1}
    found = batches.isolated_samples(G, b, outputs=10)
    rows = [f.rows.tolist() for f in batches.isolated_samples(2**14 * G, b, outputs=10)]
    assert rows == [f.rows.tolist() for f in found]  # whatever the unit of x
    closest = [int((x - f.x).norm(dim=1).argmin()) for f in found]
    assert set(closest) == named and len(closest) == len(named)
    assert [len(f.rows) for f in found] == sorted((len(f.rows) for f in found), reverse=True)
    for f, n in zip(found, closest, strict=True):
        assert gi.metrics.relative_error(f.x, x[n]) < 1e-9
        assert bool((alone & (k[n] != 0))[f.rows].all())


def test_shares_are_signed_and_large() -> None:
    x, y = _samples(8, 100, 0)
    k = _k(_net(100, 400), x, y)
    shares = (k / k.sum(dim=0))[:, (k != 0).sum(dim=0) > 1]
    assert float((shares < 0).any(dim=0).double().mean()) > 0.5
    assert float(shares.abs().max()) > 5


def test_equal_rows_from_float32_gradients_and_where_there_are_none() -> None:
    x, y = _samples(4, 50, 1)
    found = batches.isolated_samples(*_first(_net(50, 400, dtype=F32), x, y), 10)
    assert _error(x, torch.stack([f.x for f in found])) < 1e-5
    assert batches.isolated_samples(*_first(_net(50, 200), *_samples(16, 50, 2)), 10) == []


@pytest.mark.parametrize("outputs", [1, 2])
def test_equal_rows_under_two_outputs_are_no_certificate(outputs: int) -> None:
    """Mixtures agree there, and nothing in the gradient tells them from samples."""
    x, y = _samples(3, 40, 3)
    net = _net(40, 300, outputs)
    loss, targets = (
        (nn.BCEWithLogitsLoss(), (y[:, None] > 4).double()) if outputs == 1 else (LOSS, y % 2)
    )
    G, b, *_ = gi.observe(net, loss, x, targets).gradients.values()
    with pytest.raises(InconsistentGradientError, match=r"Under . output.* proves nothing"):
        batches.isolated_samples(G, b, outputs)
    with pytest.raises(InconsistentGradientError, match=r"groups of rows .* a single output"):
        batches.isolated_samples(G, b, 10)
    with pytest.raises(NotRecoveredError, match="single output"):
        batches.recover_batch(G, b, 3)


def test_two_photographs_under_two_classes_look_like_one_sample() -> None:
    """Every row is on for both, and all ratios agree on a picture that neither is."""
    pair = torch.cat([gi.data.photo(n, 32, torch.float64) for n in ("astronaut", "rocket")])
    net = gi.models.mlp((3072, 50, 2), dtype=torch.float64)
    nn.init.constant_(net[1].bias, 3.0)
    G, b, *_ = gi.observe(net, LOSS, pair, torch.tensor([0, 0])).gradients.values()
    ratios = G / b[:, None]
    assert gi.metrics.relative_error(ratios[1:], ratios[:-1]) < 1e-12
    assert min(gi.metrics.relative_error(ratios[0], p.flatten()) for p in pair) > 0.3
    with pytest.raises(InconsistentGradientError, match=r"Under 2 output.* one proportion"):
        batches.isolated_samples(G, b, outputs=2)


@given(st.integers(1, 20), st.floats(0.02, 0.98))
def test_the_expected_number_is_the_binomials(N: int, q: float) -> None:
    expected = batches.expected_isolated(1000, N, q)
    assert math.isclose(expected, 1000 * math.comb(N, 1) * q * (1 - q) ** (N - 1))
    best = batches.expected_isolated(1000, N, 1 / N)
    assert expected <= best * (1 + 1e-12)
    assert best >= 1000 / math.e


def test_the_expected_number_is_what_is_counted() -> None:
    counts = []
    for seed in range(20):
        x, y = _samples(4, 50, seed)
        counts.append(int(((_k(_net(50, 400, seed=seed), x, y) != 0).sum(dim=0) == 1).sum()))
    assert abs(sum(counts) / 20 - batches.expected_isolated(400, 4, 0.5)) < 8


# --- labels ----------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_counts_are_exact_with_the_samples_own_predictions(N: int, seed: int) -> None:
    g = _generator(seed)
    z, y = 3 * torch.randn(N, 7, generator=g).double(), torch.randint(7, (N,), generator=g)
    p = z.softmax(dim=1)
    counts = batches.count_labels((p - nn.functional.one_hot(y, 7)).mean(dim=0), N, p)
    assert torch.equal(counts, torch.bincount(y, minlength=7))
    assert counts.dtype == torch.int64


def test_counts_are_estimated_for_an_untrained_network() -> None:
    x, _ = gi.data.digits(range(30))
    y = torch.tensor([0] * 12 + [3] * 10 + [7] * 8)
    net = gi.models.mlp((64, 200, 10))
    b = gi.observe(net, LOSS, x, y).gradients["3.bias"]
    truth = torch.bincount(y, minlength=10)
    assert int((batches.count_labels(b, 30) - truth).abs().sum()) <= 4
    mean = net(x).softmax(1).mean(0).detach()
    assert torch.equal(batches.count_labels(b, 30, mean), truth)


@given(st.integers(1, 50), st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_an_estimate_is_always_a_count(N: int, entries: list[float]) -> None:
    counts = batches.count_labels(torch.tensor(entries).double(), N)
    assert int(counts.sum()) == N
    assert bool((counts >= 0).all())


# --- the whole batch -------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 4, 8, 16])
def test_every_sample_of_a_batch_is_exact_and_so_are_its_labels(N: int) -> None:
    x, y = _samples(N, 100, N)
    net = _net(100, 400, seed=N)
    found = _recovered(net, x, y)
    assert found.dtype == F64 and _error(x, found) < 1e-9
    sent = gi.observe(net, LOSS, x, y).gradients["3.bias"]
    counts = batches.count_labels(sent, N, net(found).softmax(dim=1))
    assert torch.equal(counts, torch.bincount(y, minlength=10))


@settings(max_examples=10)
@given(st.integers(2, 8), st.integers(0, 10_000))
def test_order_and_scale_of_the_loss_do_not_matter(N: int, seed: int) -> None:
    x, y = _samples(N, 30, seed)
    net = _net(30, 160, seed=seed)
    (G, b), (W, c) = _first(net, x, y), (net[1].weight, net[1].bias)
    order = torch.randperm(160, generator=_generator(seed))
    found = batches.recover_batch(G, b, N, weight=W, bias=c)
    layer = {"weight": W[order], "bias": c[order]}
    again = batches.recover_batch(1e-6 * G[order], 1e-6 * b[order], N, **layer)
    assert _error(x, found) < 1e-9
    assert _error(found, again) < 1e-9


def test_draws_find_what_descent_finds() -> None:
    x, y = _samples(8, 100, 5)
    sent = _first(_net(100, 400), x, y)
    drawn = batches.recover_batch(*sent, 8, method="sampling", generator=_generator(1))
    assert _error(batches.recover_batch(*sent, 8), drawn) < 1e-9


def test_twenty_four_samples() -> None:
    x, y = _samples(24, 100, 6)
    net = gi.models.mlp((100, 400, 100, 10), dtype=F64)
    assert _error(x, _recovered(net, x, y)) < 1e-9


@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-9), (F32, 1e-5)])
def test_digits_and_photographs(dtype: torch.dtype, bound: float) -> None:
    x, y = gi.data.digits(range(16))
    net, x = gi.models.mlp((64, 600, 100, 10), dtype=dtype), x.to(dtype)
    found = _recovered(net, x, y)
    assert _error(x, found) < bound
    layer, (G, _) = (net[1].weight, net[1].bias), _first(net, x, y)
    assert batches.forward_agreement(*layer, G, found) > 0.999
    photos = torch.cat([gi.data.photo(name, 32, dtype) for name in PHOTOS])
    assert _error(photos, _recovered(_net(3072, 256, dtype=dtype), photos, y[:8])) < bound


def test_the_forward_pass_tells_a_wrong_batch() -> None:
    x, y = _samples(6, 50, 14)
    net = _net(50, 200)
    G, _ = _first(net, x, y)
    layer = net[1].weight, net[1].bias
    assert batches.forward_agreement(*layer, G, x) == 1.0
    mixed = torch.cat([x[:5], x[4:5] + x[5:]])
    assert batches.forward_agreement(*layer, G, mixed) < 0.95


@pytest.mark.parametrize(("N", "dtype", "bound"), [(24, F64, 1e-12), (16, F32, 1e-4)])
def test_the_layer_above_tells_more_samples_than_outputs(
    N: int, dtype: torch.dtype, bound: float
) -> None:
    x, y = gi.data.digits(range(N))
    net, x = _net(64, 400, dtype=dtype), x.to(dtype)
    (G, b), layer = _first(net, x, y), (net[1].weight, net[1].bias)
    found = batches.recover_batch(
        G, b, N, weight=layer[0], bias=layer[1], above=net[3].weight, budget=2048
    )
    assert _error(x, found) < bound
    assert batches.forward_agreement(*layer, G, found) > 0.999
    # weights of another network explain nothing
    with pytest.raises(NotRecoveredError):
        batches.recover_batch(G, b, N, above=net[3].weight.flip(1), budget=256)


def test_more_samples_than_outputs_above_need_the_forward_pass() -> None:
    """Ten classes span nine dimensions: where all samples are on, twelve cancel by themselves."""
    x, y = gi.data.digits(range(12))
    net = _net(64, 600, dtype=F32)
    G, b = _first(net, x, y)
    layer = net[1].weight, net[1].bias
    found = batches.recover_batch(G, b, 12, weight=layer[0], bias=layer[1])
    assert _error(x, found) < 1e-5
    try:
        unchecked = batches.recover_batch(G, b, 12, budget=2048)
    except NotRecoveredError:
        return
    agreement = batches.forward_agreement(*layer, G, unchecked)
    assert (_error(x, unchecked) < 1e-5) == (agreement > 0.99)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_several_local_steps_leave_the_zeros(momentum: float) -> None:
    x, y = _samples(8, 100, 8)
    schedule = {"local_steps": 10, "learning_rate": 0.05, "momentum": momentum, "batch_size": 4}
    sent = _first(_net(100, 400), x, y, **schedule)
    assert _error(x, batches.recover_batch(*sent, 8)) < 1e-9


def test_noise_is_refused_or_told_never_a_wrong_batch() -> None:
    x, y = _samples(8, 100, 9)
    G, b = _first(_net(100, 400), x, y)
    g = _generator(0)
    for sigma in (1e-12, 1e-8, 1e-6, 1e-4, 1e-2):
        noise = sigma * float(G.std()) * torch.randn(400, 101, generator=g)
        try:
            found = batches.recover_batch(G + noise[:, :-1], b + noise[:, -1], 8, budget=1024)
        except (NotRecoveredError, InconsistentGradientError):
            continue
        assert _error(x, found) < 1e3 * sigma
    with pytest.raises(InconsistentGradientError):
        batches.recover_batch(G + torch.randn(G.shape, generator=g) * G.std(), b, 8)


# --- what is refused --------------------------------------------------------------------------


def _digits(labels: int) -> tuple[Tensor, Tensor]:
    x, y = gi.data.digits(range(12, 18))
    return x, y % labels


def _twins() -> tuple[Tensor, Tensor]:
    x, y = _samples(6, 60, 11)
    x[5] = x[0]
    return x, y


SINGLE = {"dtype": F32}
UNSURE, RANK, SIZE = NotRecoveredError, InconsistentGradientError, InvalidArgumentError


@pytest.mark.parametrize(
    ("sizes", "net", "shift", "samples", "N", "error", "says"),
    [  # a positive shift: most units are on; six samples under five outputs cancel where all are
        (
            (64, 400, 5),
            {"seed": 2},
            0.2,
            (_digits, 5),
            6,
            UNSURE,
            "of 6 .* Give the layer's weight",
        ),
        ((40, 400), SINGLE | {"seed": 1}, 0.46, (_samples, 8, 40, 1), 8, UNSURE, "zeros are few"),
        ((40, 400), SINGLE | {"seed": 2}, 0.46, (_samples, 8, 40, 2), 8, UNSURE, "zeros are few"),
        ((60, 200), {"activation": "sigmoid"}, 0, (_samples, 6, 60, 10), 6, UNSURE, "Found 0 of 6"),
        ((60, 200), {"activation": "leaky_relu"}, 0, (_samples, 6, 60, 10), 6, UNSURE, "0 of 6"),
        ((60, 200), {}, 0, (_twins,), 6, RANK, "rank 5, .* batch size 6: two samples"),
        ((60, 200), {}, 0, (_twins,), 4, RANK, "rank 5, .* batch size 4"),
        ((60, 40), {}, 0, (_samples, 6, 60, 12), 41, SIZE, "from 1 to 40, .* got 41"),
        ((60, 40), {}, 0, (_samples, 6, 60, 12), 0, SIZE, "from 1 to 40, .* got 0"),
    ],
)
def test_a_batch_that_cannot_be_taken_apart_is_refused(  # type: ignore[no-untyped-def]
    sizes, net, shift, samples, N, error, says
) -> None:
    model, (draw, *how) = _net(*sizes, **net), samples
    with torch.no_grad():
        model[1].bias += shift
    with pytest.raises(error, match=says):
        batches.recover_batch(*_first(model, *draw(*how)), N, budget=1024)


def test_adam_breaks_the_rank() -> None:
    adam = {"local_steps": 2, "learning_rate": 1e-3, "optimizer": "adam"}
    sent = _first(_net(100, 400), *_samples(8, 100, 8), **adam)
    with pytest.raises(InconsistentGradientError, match="not the batch size 8"):
        batches.recover_batch(*sent, 8)


G, B, P = torch.ones(4, 3), torch.ones(4), _samples(6, 5, 4)[0].softmax(1)
MEAN = (P - torch.eye(5)[[0, 1, 2, 3, 4, 0]]).mean(0)
OTHERS = _samples(6, 5, 5)[0].softmax(1)
isolated, count, recover = batches.isolated_samples, batches.count_labels, batches.recover_batch


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: recover(G, None, 2), UndeterminedScaleError, "bias_gradient is missing"),
        (lambda: recover(G, B[:3], 2), InvalidTensorError, r"shape \(3,\), .* m = 4"),
        (lambda: recover(G * math.nan, B, 2), InvalidTensorError, "NaN"),
        (lambda: recover(G, B, 1, bias=B), InvalidArgumentError, "of no use without weight"),
        (lambda: isolated(G.long(), B, 10), InvalidTensorError, "torch.int64"),
        (lambda: isolated(G, 0 * B, 10), VanishingGradientError, "bias_gradient is zero every"),
        (lambda: isolated(G, B, 0), InvalidArgumentError, "outputs must be a whole number"),
        (lambda: isolated(G, B, 10, -1.0), InvalidArgumentError, "tolerance is zero or more"),
        (lambda: isolated(G, B, 10, math.nan), InvalidArgumentError, "tolerance is zero or more"),
        (lambda: batches.expected_isolated(9, 2, 1.5), InvalidArgumentError, "a probability"),
        (lambda: batches.expected_isolated(9, 2, "half"), InvalidArgumentError, "a probability"),
        (lambda: count(B, 0), InvalidArgumentError, "batch_size must be a whole number"),
        (lambda: count(B, 2, -B), InvalidTensorError, "give the softmax of the logits"),
        (lambda: count(B, 2, 0 * B), InvalidTensorError, "give the softmax of the logits"),
        (lambda: count(B, 2, -torch.ones(2, 4)), InvalidTensorError, "give the softmax of the"),
        (lambda: count(B, 2, [0.25] * 4), InvalidTensorError, "probabilities must be .*, got list"),
        (lambda: count(MEAN, 7, P), InvalidTensorError, r"probabilities has shape \(6, 5\)"),
        (lambda: count(MEAN, 6, OTHERS), InconsistentGradientError, "not whole numbers"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        call()


# --- whole networks, from the softmax down -----------------------------------------------------


@pytest.mark.parametrize(("N", "dtype", "bound"), [(2, F32, 70), (6, F64, 200), (6, F32, 70)])
def test_a_batch_through_cnn6(N: int, dtype: torch.dtype, bound: float) -> None:
    labels = torch.tensor([0, 1, 3, 5, 7, 8][:N])
    model = gi.models.cnn6((3, 16, 16), outputs=10, dtype=dtype)
    x = torch.cat([gi.data.photo(name, 16, dtype=dtype) for name in PHOTOS[:N]])
    found = gi.recover(model, gi.observe(model, LOSS, x, labels), (3, 16, 16), LOSS, batch_size=N)
    assert found.exact or dtype == F32
    assert torch.equal(found.targets, labels)
    worst = min(gi.metrics.psnr(a, b) for a, b in zip(found.inputs, x.double(), strict=True))
    assert worst > bound
    assert found.layers[-1].unknowns == N * 3 * 16 * 16


def test_two_samples_of_one_class_and_dense_layers() -> None:
    model = gi.models.mlp([48, 40, 30, 10], activation="tanh", bias=False, dtype=F64)
    x = torch.rand(2, 48, generator=_generator(2), dtype=F64)
    update = gi.observe(model, LOSS, x, torch.tensor([4, 4]))
    found = gi.recover(model, update, (48,), LOSS, batch_size=2)
    assert found.exact and _error(x, found.inputs) < 1e-6


def test_a_deficient_layer_is_solved_together_for_every_sample() -> None:
    g = _generator(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, 2, 2, bias=False),
        nn.Sigmoid(),
        nn.Conv2d(12, 4, 5, 2, 2, bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(64, 10, bias=False),
    ).double()
    for p in model.parameters():
        p.data = torch.rand(p.shape, generator=g, dtype=F64) - 0.5
    x = torch.cat([gi.data.photo(name, 16, dtype=F64) for name in PHOTOS[:2]])[:, :1]
    update = gi.observe(model, LOSS, x, torch.tensor([2, 6]))
    both = gi.recover(model, update, (1, 16, 16), LOSS, batch_size=2)
    assert both.exact and gi.metrics.psnr(both.inputs, x) > 120


def test_few_outputs_are_refused_without_weights() -> None:
    """Two samples under one output: a mixture vanishes in more rows than they do (campaign)."""
    x, _, _, g, outputs = _wide(100_004)
    assert (len(x), outputs) == (2, 1)
    with pytest.raises(NotRecoveredError, match=r"Under 1 output.s. mixtures of 2 samples"):
        batches.recover_batch(g["0.weight"], g["0.bias"], 2, outputs=1)
