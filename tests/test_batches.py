"""Chapter 6: the last layer of a batch taken apart, and the batch taken through whole networks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import batches
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    NotRecoveredError,
    UnsupportedLossError,
)

CE = nn.CrossEntropyLoss()
PHOTOS = ("astronaut", "cat", "coffee", "rocket", "retina", "camera")


def _layer(
    N: int, labels: list[int], seed: int, bias: bool = False, reduction: str = "mean"
) -> tuple[nn.Linear, Tensor]:
    """A dense layer of ten classes with the gradient of a batch, and that batch."""
    g = torch.Generator().manual_seed(seed)
    layer = nn.Linear(40, 10, bias=bias).double()
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) / 40**0.5
    x = torch.randn(N, 40, generator=g, dtype=torch.float64)
    nn.CrossEntropyLoss(reduction=reduction)(layer(x), torch.tensor(labels)).backward()
    return layer, x


def _recover(layer: nn.Linear, N: int, **options: str) -> list[batches.BatchOutput]:
    bias = layer.bias
    return batches.recover_outputs(
        layer.weight,
        bias,
        layer.weight.grad,
        None if bias is None else bias.grad,
        N,
        **options,
    )


@settings(max_examples=20)
@given(
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_every_sample_of_a_batch_comes_back(
    labels: list[int], bias: bool, reduction: str, seed: int
) -> None:
    N = len(labels)
    layer, x = _layer(N, labels, seed, bias, reduction)
    found = _recover(layer, N, reduction=reduction)[0]
    assert found.targets.tolist() == sorted(labels)
    near = torch.cdist(found.x, x).min(dim=1)
    assert sorted(near.indices.tolist()) == list(range(N))
    assert float(near.values.max() / x.norm(dim=1).mean()) < 1e-9
    expected = found.k.T @ found.x
    torch.testing.assert_close(expected, layer.weight.grad, rtol=1e-9, atol=1e-12)


@settings(max_examples=20)
@given(labels=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_no_label_of_the_batch_is_called_impossible(labels: list[int], seed: int) -> None:
    layer, _ = _layer(len(labels), labels, seed)
    assert set(labels) <= set(batches.possible_labels(layer.weight.grad, len(labels)))


def test_the_jacobian_is_that_of_automatic_differentiation() -> None:
    layer, _ = _layer(3, [1, 4, 4], 0, bias=True)
    left, V = batches._split(layer.weight.grad, 3)
    problem = batches._Problem(layer.weight.detach() @ V, layer.bias.detach(), 3 * left, 3)
    problem.total = 3 * layer.bias.grad
    D = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one_hot = torch.eye(10, dtype=torch.float64)[[1, 4, 4]]
    expected = torch.autograd.functional.jacobian(lambda d: problem.residuals(d, one_hot), D)
    torch.testing.assert_close(problem.jacobian(D)[0], expected[0, :, 0].flatten(1))


def test_a_batch_of_another_size_is_told_by_its_rank() -> None:
    layer, _ = _layer(3, [1, 4, 5], 0)
    with pytest.raises(NotRecoveredError, match="rank 3, not 2"):
        _recover(layer, 2)


@pytest.mark.parametrize("size", [0, 10])
def test_impossible_batch_sizes_are_refused(size: int) -> None:
    layer, _ = _layer(3, [1, 4, 5], 0)
    with pytest.raises(InvalidArgumentError, match="at most 9 samples"):
        _recover(layer, size)


def test_a_gradient_of_another_loss_is_not_explained() -> None:
    layer, _ = _layer(2, [1, 4], 0)
    layer.weight.grad = layer.weight.grad * 3
    with pytest.raises(NotRecoveredError, match="no predictions explain"):
        _recover(layer, 2)


def test_nan_is_refused() -> None:
    layer, _ = _layer(2, [1, 4], 0)
    layer.weight.grad[0, 0] = torch.nan
    with pytest.raises(InvalidTensorError):
        _recover(layer, 2)


# --- whole networks ------------------------------------------------------------------------------


def _photographs(N: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cat([gi.data.photo(name, size, dtype=dtype) for name in PHOTOS[:N]])


@pytest.mark.parametrize("N", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_through_cnn6(N: int, dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 1, 3, 5, 7, 8][:N])
    model = gi.models.cnn6((3, 16, 16), outputs=10, dtype=dtype)
    x = _photographs(N, 16, dtype)
    found = gi.recover(model, gi.observe(model, CE, x, labels), (3, 16, 16), CE, batch_size=N)
    assert found.exact or dtype == torch.float32
    assert torch.equal(found.targets, labels)
    worst = min(gi.metrics.psnr(a, b) for a, b in zip(found.inputs, x.double(), strict=True))
    assert worst > (200 if dtype == torch.float64 else 70)
    assert found.layers[-1].unknowns == N * 3 * 16 * 16


def test_two_samples_of_one_class_and_dense_layers() -> None:
    model = gi.models.mlp([48, 40, 30, 10], activation="tanh", bias=False, dtype=torch.float64)
    x = torch.rand(2, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    update = gi.observe(model, CE, x, torch.tensor([4, 4]))
    found = gi.recover(model, update, (48,), CE, batch_size=2)
    near = torch.cdist(found.inputs, x).min(dim=1)
    assert found.exact and float(near.values.max()) < 1e-6
    assert sorted(near.indices.tolist()) == [0, 1]


def test_a_deficient_layer_is_solved_together_for_every_sample() -> None:
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 5, 2, 2, bias=False),
        nn.Sigmoid(),
        nn.Conv2d(12, 4, 5, 2, 2, bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(64, 10, bias=False),
    ).double()
    for p in model.parameters():
        p.data = torch.rand(p.shape, generator=g, dtype=torch.float64) - 0.5
    x = _photographs(2, 16)[:, :1]
    update = gi.observe(model, CE, x, torch.tensor([2, 6]))
    alone = gi.recover(model, update, (1, 16, 16), CE, batch_size=2, together=False)
    assert not alone.exact and gi.metrics.psnr(alone.inputs, x) < 20  # least norm, and it says so
    assert not all(layer.full_rank for layer in alone.layers)
    both = gi.recover(model, update, (1, 16, 16), CE, batch_size=2)
    assert both.exact and both.layers[-1].name == "0+2"
    assert gi.metrics.psnr(both.inputs, x) > 120


def test_only_cross_entropy_takes_a_batch_apart() -> None:
    model = gi.models.mlp([8, 6, 3], dtype=torch.float64)
    x = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = nn.MSELoss()
    update = gi.observe(model, loss, x, torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(UnsupportedLossError, match="softmax cross-entropy"):
        gi.recover(model, update, (8,), loss, batch_size=2)


def test_a_size_or_a_reduction_that_cannot_be_is_refused() -> None:
    G = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for size in ("3", 2.0, True):
        with pytest.raises(InvalidArgumentError, match="batch_size is"):
            batches.possible_labels(G, size)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="reduction is 'mean' or 'sum'; got 'none'"):
        batches.recover_outputs(G, None, G, None, 4, reduction="none")
