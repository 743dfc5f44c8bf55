"""A batch through a dense layer: mixtures, lonely rows, labels, and every sample again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import fully_connected as fc
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


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _samples(N: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = _generator(seed)
    return torch.randn(N, n, generator=g).double(), torch.randint(10, (N,), generator=g)


def _net(
    n: int, m: int, seed: int = 0, activation: str = "relu", dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    sizes = (n, m, 10)
    return gi.models.mlp(sizes, activation=activation, dtype=dtype, generator=_generator(seed))


def _recovered(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """With the layer's own weights, which the server has."""
    layer = {"weight": model[1].weight, "bias": model[1].bias}
    return fc.recover_batch(*_first(model, x, y), len(x), **layer)


def _first(model: nn.Sequential, x: Tensor, y: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
    sent = list(gi.observe(model, LOSS, x, y, **settings).gradients.values())  # type: ignore[arg-type]
    return sent[0], sent[1]


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


# --- mixtures --------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(0, 10_000))
def test_a_ratio_of_a_batch_is_an_affine_mixture(N: int, seed: int) -> None:
    x, y = _samples(N, 20, seed)
    net = _net(20, 30, seed)
    G, b = _first(net, x, y)
    k = _k(net, x, y)
    rows = b.abs() > 1e-6
    shares = (k / k.sum(dim=0))[:, rows]
    assert torch.allclose(shares.sum(dim=0), torch.ones(int(rows.sum())).double())
    assert torch.allclose(G[rows] / b[rows, None], shares.T @ x, atol=1e-8, rtol=1e-6)


def test_shares_are_signed_and_large() -> None:
    x, y = _samples(8, 100, 0)
    net = _net(100, 400)
    k = _k(net, x, y)
    shares = k / k.sum(dim=0)
    several = (k != 0).sum(dim=0) > 1
    assert float((shares[:, several] < 0).any(dim=0).double().mean()) > 0.5
    assert float(shares[:, several].abs().max()) > 5


# --- lonely rows -----------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 10_000))
def test_equal_rows_are_samples(N: int, seed: int) -> None:
    x, y = _samples(N, 30, seed)
    net = _net(30, 200, seed)
    G, b = _first(net, x, y)
    active = _k(net, x, y) != 0
    alone = active.sum(dim=0) == 1
    named = {n for n in range(N) if int((alone & active[n]).sum()) > 1}
    found = fc.isolated_samples(G, b)
    closest = [int((x - f.x).norm(dim=1).argmin()) for f in found]
    assert set(closest) == named and len(closest) == len(named)
    for f, n in zip(found, closest, strict=True):
        assert gi.metrics.relative_error(f.x, x[n]) < 1e-9
        assert bool((alone & active[n])[f.rows].all())


def test_equal_rows_from_float32_gradients() -> None:
    x, y = _samples(4, 50, 1)
    net = _net(50, 400, dtype=torch.float32)
    found = fc.isolated_samples(*_first(net, x, y))
    assert _error(x, torch.stack([f.x for f in found])) < 1e-5
    assert [len(f.rows) for f in found] == sorted((len(f.rows) for f in found), reverse=True)


def test_no_two_rows_alike_name_nobody() -> None:
    x, y = _samples(16, 50, 2)
    assert fc.isolated_samples(*_first(_net(50, 200), x, y)) == []


def test_equal_rows_under_one_output_are_no_certificate() -> None:
    x, y = _samples(3, 40, 3)
    net = gi.models.mlp((40, 300, 1), dtype=torch.float64)
    sent = gi.observe(net, nn.BCEWithLogitsLoss(), x, (y[:, None] > 4).double()).gradients
    G, b = sent["1.weight"], sent["1.bias"]
    with pytest.raises(InconsistentGradientError, match=r"groups of rows .* a single output"):
        fc.isolated_samples(G, b)
    with pytest.raises(NotRecoveredError, match="single output"):
        fc.recover_batch(G, b, 3)


@given(st.integers(1, 20), st.floats(0.02, 0.98))
def test_the_expected_number_is_the_binomials(N: int, q: float) -> None:
    expected = fc.expected_isolated(1000, N, q)
    assert math.isclose(expected, 1000 * math.comb(N, 1) * q * (1 - q) ** (N - 1))
    best = fc.expected_isolated(1000, N, 1 / N)
    assert expected <= best * (1 + 1e-12)
    assert best >= 1000 / math.e


def test_the_expected_number_is_what_is_counted() -> None:
    counts = []
    for seed in range(20):
        x, y = _samples(4, 50, seed)
        counts.append(int(((_k(_net(50, 400, seed), x, y) != 0).sum(dim=0) == 1).sum()))
    assert abs(sum(counts) / 20 - fc.expected_isolated(400, 4, 0.5)) < 8


# --- labels ----------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_counts_are_exact_with_the_samples_own_predictions(N: int, seed: int) -> None:
    g = _generator(seed)
    z, y = 3 * torch.randn(N, 7, generator=g).double(), torch.randint(7, (N,), generator=g)
    p = z.softmax(dim=1)
    b = (p - nn.functional.one_hot(y, 7)).mean(dim=0)
    counts = fc.count_labels(b, N, p)
    assert torch.equal(counts, torch.bincount(y, minlength=7))
    assert counts.dtype == torch.int64


def test_counts_are_estimated_for_an_untrained_network() -> None:
    x, _ = gi.data.digits(range(30))
    y = torch.tensor([0] * 12 + [3] * 10 + [7] * 8)
    net = gi.models.mlp((64, 200, 10))
    b = gi.observe(net, LOSS, x, y).gradients["3.bias"]
    truth = torch.bincount(y, minlength=10)
    assert int((fc.count_labels(b, 30) - truth).abs().sum()) <= 4
    mean = net(x).softmax(1).mean(0).detach()
    assert torch.equal(fc.count_labels(b, 30, mean), truth)


@given(st.integers(1, 50), st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_an_estimate_is_always_a_count(N: int, entries: list[float]) -> None:
    counts = fc.count_labels(torch.tensor(entries).double(), N)
    assert int(counts.sum()) == N
    assert bool((counts >= 0).all())


def test_the_predictions_of_others_are_refused() -> None:
    g = _generator(4)
    p = torch.randn(6, 5, generator=g).double().softmax(1)
    b = (p - nn.functional.one_hot(torch.arange(6) % 5, 5)).mean(0)
    with pytest.raises(InconsistentGradientError, match="not whole numbers"):
        fc.count_labels(b, 6, torch.randn(6, 5, generator=g).double().softmax(1))
    with pytest.raises(InvalidTensorError, match=r"probabilities has shape \(6, 5\)"):
        fc.count_labels(b, 7, p)


# --- the whole batch -------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_sample_of_a_batch_is_exact(N: int, seed: int) -> None:
    x, y = _samples(N, 100, seed)
    found = _recovered(_net(100, 400, seed), x, y)
    assert found.dtype == torch.float64
    assert _error(x, found) < 1e-9


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(0, 10_000))
def test_order_and_scale_of_the_loss_do_not_matter(N: int, seed: int) -> None:
    x, y = _samples(N, 30, seed)
    G, b = _first(_net(30, 160, seed), x, y)
    order = torch.randperm(160, generator=_generator(seed))
    found = fc.recover_batch(G, b, N)
    again = fc.recover_batch(1e-6 * G[order], 1e-6 * b[order], N)
    assert _error(x, found) < 1e-9
    assert _error(found, again) < 1e-9


def test_draws_find_what_descent_finds() -> None:
    x, y = _samples(8, 100, 5)
    sent = _first(_net(100, 400), x, y)
    drawn = fc.recover_batch(*sent, 8, method="sampling", generator=_generator(1))
    assert _error(fc.recover_batch(*sent, 8), drawn) < 1e-9


def test_twenty_four_samples() -> None:
    x, y = _samples(24, 100, 6)
    net = gi.models.mlp((100, 400, 100, 10), dtype=torch.float64)
    assert _error(x, _recovered(net, x, y)) < 1e-9


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_real_digits(dtype: torch.dtype, bound: float) -> None:
    x, y = gi.data.digits(range(16))
    net = gi.models.mlp((64, 600, 100, 10), dtype=dtype)
    found = _recovered(net, x.to(dtype), y)
    assert _error(x, found) < bound
    assert (
        fc.forward_agreement(net[1].weight, net[1].bias, _first(net, x.to(dtype), y)[0], found)
        > 0.999
    )


def test_the_forward_pass_tells_a_wrong_batch() -> None:
    x, y = _samples(6, 50, 14)
    net = _net(50, 200)
    G, _ = _first(net, x, y)
    layer = net[1].weight, net[1].bias
    assert fc.forward_agreement(*layer, G, x) == 1.0
    mixed = torch.cat([x[:5], x[4:5] + x[5:]])
    assert fc.forward_agreement(*layer, G, mixed) < 0.95


def test_more_samples_than_outputs_above_need_the_forward_pass() -> None:
    """Ten classes span nine dimensions: where all samples are on, twelve cancel by themselves."""
    x, y = gi.data.digits(range(12))
    net = _net(64, 600, dtype=torch.float32)
    G, b = _first(net, x, y)
    found = fc.recover_batch(G, b, 12, weight=net[1].weight, bias=net[1].bias)
    assert _error(x, found) < 1e-5
    try:
        unchecked = fc.recover_batch(G, b, 12, budget=2048)
    except NotRecoveredError:
        return
    agreement = fc.forward_agreement(net[1].weight, net[1].bias, G, unchecked)
    assert (_error(x, unchecked) < 1e-5) == (agreement > 0.99)


def test_zeros_that_avoid_each_other_are_a_mixtures() -> None:
    """Six samples under five outputs: without the weights nothing but the zeros can tell."""
    x, y = gi.data.digits(range(12, 18))
    net = gi.models.mlp((64, 400, 5), dtype=torch.float64, generator=_generator(2))
    net[1].bias.data += 0.2  # most units are on for all six, and cancel there
    with pytest.raises(NotRecoveredError, match=r"Found 6 of 6 .* Give the layer's weight"):
        fc.recover_batch(*_first(net, x, y % 5), 6)


@pytest.mark.parametrize("seed", [1, 2])
def test_zeros_of_rounding_alone_are_no_samples(seed: int) -> None:
    x, y = _samples(8, 40, seed)
    net = _net(40, 400, seed, dtype=torch.float32)
    net[1].bias.data += 0.46  # few units are off
    with pytest.raises(NotRecoveredError, match=r"Found 8 of 8 .* zeros are few"):
        fc.recover_batch(*_first(net, x.float(), y), 8)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_real_photographs(dtype: torch.dtype, bound: float) -> None:
    x = torch.cat([gi.data.photo(name, 32, dtype) for name in PHOTOS])
    found = _recovered(_net(3072, 256, dtype=dtype), x, torch.arange(8))
    assert _error(x, found) < bound


def test_labels_of_a_recovered_batch() -> None:
    x, y = _samples(8, 100, 7)
    net = _net(100, 400)
    sent = list(gi.observe(net, LOSS, x, y).gradients.values())
    p = net(fc.recover_batch(sent[0], sent[1], 8)).softmax(dim=1)
    assert torch.equal(fc.count_labels(sent[3], 8, p), torch.bincount(y, minlength=10))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_several_local_steps_leave_the_zeros(momentum: float) -> None:
    x, y = _samples(8, 100, 8)
    sent = _first(
        _net(100, 400), x, y, local_steps=10, learning_rate=0.05, momentum=momentum, batch_size=4
    )
    assert _error(x, fc.recover_batch(*sent, 8)) < 1e-9


def test_adam_breaks_the_rank() -> None:
    x, y = _samples(8, 100, 8)
    sent = _first(_net(100, 400), x, y, local_steps=2, learning_rate=1e-3, optimizer="adam")
    with pytest.raises(InconsistentGradientError, match=r"not the batch size 8"):
        fc.recover_batch(*sent, 8)


def test_noise_is_refused_or_told_never_a_wrong_batch() -> None:
    x, y = _samples(8, 100, 9)
    G, b = _first(_net(100, 400), x, y)
    g = _generator(0)
    for sigma in (1e-12, 1e-8, 1e-6, 1e-4, 1e-2):
        size = sigma * float(G.std())
        noisy = (
            G + size * torch.randn(G.shape, generator=g),
            b + size * torch.randn(400, generator=g),
        )
        try:
            error = _error(x, fc.recover_batch(*noisy, 8, budget=1024))
        except (NotRecoveredError, InconsistentGradientError):
            continue
        assert error < 1e3 * sigma
    with pytest.raises(InconsistentGradientError):
        fc.recover_batch(G + torch.randn(G.shape, generator=g) * G.std(), b, 8)


@pytest.mark.parametrize("activation", ["sigmoid", "leaky_relu"])
def test_without_zeros_nothing_is_found(activation: str) -> None:
    x, y = _samples(6, 60, 10)
    sent = _first(_net(60, 200, activation=activation), x, y)
    with pytest.raises(NotRecoveredError, match=r"Found 0 of 6 .* in 512 starts"):
        fc.recover_batch(*sent, 6, budget=512)


def test_duplicates_and_other_batch_sizes_show_in_the_rank() -> None:
    x, y = _samples(6, 60, 11)
    x[5] = x[0]
    sent = _first(_net(60, 200), x, y)
    with pytest.raises(InconsistentGradientError, match=r"rank 5, .* batch size 6: two samples"):
        fc.recover_batch(*sent, 6)
    with pytest.raises(InconsistentGradientError, match=r"rank 5, .* batch size 4"):
        fc.recover_batch(*sent, 4)


def test_more_samples_than_rows_or_columns_are_refused() -> None:
    x, y = _samples(6, 60, 12)
    G, b = _first(_net(60, 40), x, y)
    with pytest.raises(InvalidArgumentError, match=r"from 1 to 40, .* got 41"):
        fc.recover_batch(G, b, 41)
    with pytest.raises(InvalidArgumentError, match=r"got 0"):
        fc.recover_batch(G, b, 0)


def test_bad_tensors_are_refused() -> None:
    G, b = torch.ones(4, 3), torch.ones(4)
    with pytest.raises(UndeterminedScaleError, match="bias_gradient is missing"):
        fc.recover_batch(G, None, 2)  # type: ignore[arg-type]
    with pytest.raises(InvalidTensorError, match="4 rows and bias_gradient 3 entries"):
        fc.recover_batch(G, b[:3], 2)
    with pytest.raises(InvalidTensorError, match="NaN"):
        fc.recover_batch(G * math.nan, b, 2)
    with pytest.raises(InvalidTensorError, match=r"torch.int64"):
        fc.isolated_samples(G.long(), b)
    with pytest.raises(VanishingGradientError, match="bias_gradient is zero everywhere"):
        fc.isolated_samples(G, 0 * b)
    with pytest.raises(InvalidArgumentError, match="active is a probability"):
        fc.expected_isolated(10, 2, 1.5)
    with pytest.raises(InvalidArgumentError, match="batch_size must be a whole number"):
        fc.count_labels(b, 0)


def test_arguments_that_no_answer_belongs_to_are_refused() -> None:
    G, b = torch.ones(4, 3), torch.ones(4)
    for tolerance in (-1.0, math.nan):
        with pytest.raises(InvalidArgumentError, match="tolerance is zero or more"):
            fc.isolated_samples(G, b, tolerance)
    for p in (-torch.ones(4), torch.zeros(4), -torch.ones(2, 4)):
        with pytest.raises(InvalidTensorError, match="give the softmax of the logits"):
            fc.count_labels(b, 2, p)
    with pytest.raises(InvalidTensorError, match=r"probabilities must be .*, got list"):
        fc.count_labels(b, 2, [0.25] * 4)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="bias is of no use without weight"):
        fc.recover_batch(G, b, 1, bias=b)
    with pytest.raises(InvalidArgumentError, match="active is a probability"):
        fc.expected_isolated(10, 2, "half")  # type: ignore[arg-type]
