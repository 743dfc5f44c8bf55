"""Every registered loss: its slope, its draws, and its head for one sample and for a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradinv_edu.engine import losses
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    NotRecoveredError,
    UnsupportedLossError,
)

CE = nn.CrossEntropyLoss()
EVERY = [kind(reduction=how) for kind in losses.RULES for how in ("mean", "sum")]


def _layer(labels: list[int], seed: int, bias: bool = False, loss: nn.Module = CE) -> nn.Linear:
    """A dense layer of ten classes with the gradient of a batch, which it keeps as ``x``."""
    g = torch.Generator().manual_seed(seed)
    layer = nn.Linear(40, 10, bias=bias).double()
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) / 40**0.5
    layer.x = torch.randn(len(labels), 40, generator=g, dtype=torch.float64)
    loss(layer(layer.x), torch.tensor(labels)).backward()
    return layer


def _heads(layer: nn.Linear, N: int, loss: nn.Module = CE) -> list[losses.Head]:
    sent = None if layer.bias is None else layer.bias.grad
    return losses.rule(loss).heads(layer.weight, layer.bias, layer.weight.grad, sent, N)


def _targets(loss: nn.Module, z: Tensor, g: torch.Generator) -> Tensor:
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.randint(z.shape[1], (len(z),), generator=g)
    drawn = torch.randn(z.shape, generator=g).double()
    return drawn if isinstance(loss, nn.MSELoss) else (drawn > 0).double()


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_the_slope_is_that_of_automatic_differentiation(loss: nn.Module) -> None:
    g, rule = torch.Generator().manual_seed(0), losses.rule(loss)
    z = torch.randn(4, 6, generator=g).double().requires_grad_()
    targets = _targets(loss, z, g)
    (k,) = torch.autograd.grad(loss(z, targets), z)
    found = rule.output_gradient(z.detach().float(), targets)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, k, rtol=1e-6, atol=1e-7)


def test_what_a_head_leaves_is_relative() -> None:
    g, loss = torch.Generator().manual_seed(2), nn.BCEWithLogitsLoss()
    W, b, x, rest = (torch.randn(s, generator=g).double() for s in ((6, 9), (6,), (9,), (6,)))
    k = (torch.sigmoid(W @ x + b) - (rest > 0).double()) / 6 * (1 + 1e-13 * rest)
    left = [
        losses.rule(loss).heads(W / a, b, torch.outer(k, a * x), None)[0].residual for a in (1, 64)
    ]
    assert left[1] == pytest.approx(left[0], rel=0.1) and 1e-14 < left[0] < 1e-12


@pytest.mark.parametrize("loss", EVERY, ids=repr)
def test_the_target_is_found_from_outputs_and_slope(loss: nn.Module) -> None:
    g, rule = torch.Generator().manual_seed(1), losses.rule(loss)
    layer = nn.Linear(9, 6).double()
    x = torch.randn(1, 9, generator=g).double()
    z = layer(x)
    targets = _targets(loss, z, g)
    G, k = torch.autograd.grad(loss(z, targets), [layer.weight, layer.bias])
    (head,) = rule.heads(layer.weight, layer.bias, G, k)
    torch.testing.assert_close(head.inputs, x)
    torch.testing.assert_close(head.targets, targets.to(head.targets.dtype))
    torch.testing.assert_close(rule.output_gradient(z.detach(), head.targets), head.k)


@settings(max_examples=15)
@given(
    labels=st.lists(st.integers(0, 9), min_size=2, max_size=4),
    bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_every_sample_of_a_batch_comes_back(
    labels: list[int], bias: bool, reduction: str, seed: int
) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    layer = _layer(labels, seed, bias, loss)
    found = _heads(layer, len(labels), loss)[0]
    assert found.targets.tolist() == sorted(labels)
    near = torch.cdist(found.inputs, layer.x).min(dim=1)
    assert sorted(near.indices.tolist()) == list(range(len(labels)))
    assert float(near.values.max() / layer.x.norm(dim=1).mean()) < 1e-9
    expected = found.k.T @ found.inputs
    torch.testing.assert_close(expected, layer.weight.grad, rtol=1e-9, atol=1e-12)
    again = losses.rule(loss).output_gradient(layer(found.inputs).detach(), found.targets)
    torch.testing.assert_close(again, found.k, rtol=1e-6, atol=1e-9)


@settings(max_examples=20)
@given(labels=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_no_label_of_the_batch_is_called_impossible(labels: list[int], seed: int) -> None:
    G = _layer(labels, seed).weight.grad
    assert set(labels) <= set(losses.possible_labels(G, len(labels)))


@pytest.mark.parametrize("biased", [False, True])
def test_the_jacobian_is_that_of_automatic_differentiation(biased: bool) -> None:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    g = torch.Generator().manual_seed(1)
    total = drawn(10) if biased else None
    equations = losses.SoftmaxEquations(drawn(10, 3), drawn(10), drawn(10, 3), total)
    D, one_hot = drawn(1, 3, 3), torch.eye(10, dtype=torch.float64)[[1, 4, 4]]
    expected = torch.autograd.functional.jacobian(lambda d: equations.residuals(d, one_hot), D)
    torch.testing.assert_close(equations.jacobian(D)[0], expected[0, :, 0].flatten(1))


LAYER, TRIPLED, POISONED = (_layer([1, 4, 5], 0) for _ in range(3))
TRIPLED.weight.grad *= 3
POISONED.weight.grad[0, 0] = torch.nan
OUTPUT = (LAYER.weight, None, LAYER.weight.grad, None)


@pytest.mark.parametrize(
    ("call", "arguments", "error", "says"),
    [
        (_heads, (LAYER, 2), NotRecoveredError, "rank 3, not 2"),
        (_heads, (LAYER, 0), InvalidArgumentError, "at most 9 samples"),
        (_heads, (LAYER, 10), InvalidArgumentError, "at most 9 samples"),
        (_heads, (LAYER, "3"), InvalidArgumentError, "batch_size is '3'"),
        (losses.possible_labels, (LAYER.weight, 2.0), InvalidArgumentError, "batch_size is 2.0"),
        (losses.possible_labels, (LAYER.weight, True), InvalidArgumentError, "batch_size is True"),
        (_heads, (TRIPLED, 3), NotRecoveredError, "no predictions explain"),
        (_heads, (POISONED, 3), InvalidTensorError, "1 NaN or infinite"),
        (_heads, (LAYER, 3, nn.MSELoss()), UnsupportedLossError, "softmax cross-entropy"),
        (losses.rule, (nn.functional.cross_entropy,), UnsupportedLossError, "function is not hand"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, arguments, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        call(*arguments)


def test_a_reduction_that_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="reduction is 'mean' or 'sum'; got 'none'"):
        losses.recover_outputs(*OUTPUT, 3, reduction="none")
