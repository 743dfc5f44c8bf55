"""What a dense layer's gradient says of one sample, checked against the sample."""

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
    InvalidTensorError,
    UndeterminedScaleError,
    UnknownNameError,
    UnsupportedLossError,
    VanishingGradientError,
)

CE, BCE, MSE = nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()
SUM = nn.BCEWithLogitsLoss(reduction="sum")
CLOSED_FORMS = {CE: fc.recover_from_cross_entropy, SUM: fc.recover_from_logistic}
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 40)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _layer(m: int, n: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and one input, of both signs."""
    g = _generator(seed)
    weight = torch.randn(m, n, generator=g, dtype=torch.float64) * scale / math.sqrt(n)
    bias = torch.randn(m, generator=g, dtype=torch.float64)
    return weight, bias, torch.randn(n, generator=g, dtype=torch.float64)


def _gradients(
    loss: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias gradient, in the dtype of the weight; a batch where x has two dimensions."""
    W = weight.clone().requires_grad_()
    b = (torch.zeros_like(W[:, 0]) if bias is None else bias.to(W.dtype)).requires_grad_()
    z = x.to(W.dtype) @ W.T + b
    if isinstance(loss, nn.CrossEntropyLoss) and z.dim() == 1:
        z, y = z[None], y[None]
    return torch.autograd.grad(loss(z, y), (W, b))


def _closest(heads: list[fc.Head], x: Tensor) -> tuple[float, fc.Head]:
    errors = [gi.metrics.relative_error(head.inputs[0], x.double()) for head in heads]
    place = errors.index(min(errors))
    return errors[place], heads[place]


def _one_label(weight: Tensor, bias: Tensor | None, x: Tensor, y: int) -> tuple[float, fc.Head]:
    """The one answer of the softmax, whose label must be right."""
    G, _ = _gradients(CE, weight, bias, x, torch.tensor(y))
    (found,) = fc.recover_from_cross_entropy(weight, G, bias)
    assert found.targets.tolist() == [y]
    return _closest([found], x)


# --- with a bias ------------------------------------------------------------------------------


@given(sizes, sizes, seeds, st.floats(-9, 9), st.floats(-9, 9))
@settings(max_examples=60)
def test_every_row_says_x_whatever_its_size(m: int, n: int, seed: int, k10: float, x10: float):
    g = _generator(seed)
    k = torch.randn(m, generator=g, dtype=torch.float64) * 10**k10
    x = torch.randn(n, generator=g, dtype=torch.float64) * 10**x10
    for method in fc.METHODS:
        found = fc.recover_input(torch.outer(k, x), k, method)
        assert gi.metrics.relative_error(found, x) < 1e-13, method


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("float64", 1e-13), ("float32", 1e-6), ("bfloat16", 1e-1), ("float16", 1e-2)],
)
def test_any_precision_comes_back_in_float64(dtype: str, bound: float) -> None:
    weight, bias, x = _layer(20, 30, seed=1)
    weight, x = weight.to(getattr(torch, dtype)), x.to(getattr(torch, dtype))
    found = fc.recover_input(*_gradients(CE, weight, bias, x, torch.tensor(3)))
    assert found.dtype == torch.float64
    assert gi.metrics.relative_error(found, x) < bound


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.1, 0.3, 0.6])
def test_total_least_squares_is_the_best_under_noise(sigma: float) -> None:
    """Median relative error of each method, with the same noise in G and in k."""
    errors: dict[str, list[float]] = {method: [] for method in fc.METHODS}
    for seed in range(20):
        g = _generator(seed)
        k, x = (torch.randn(n, generator=g, dtype=torch.float64) for n in (64, 100))
        noise = sigma * torch.randn(64, 101, generator=g, dtype=torch.float64)
        for method in fc.METHODS:
            found = fc.recover_input(torch.outer(k, x) + noise[:, :-1], k + noise[:, -1], method)
            errors[method].append(gi.metrics.relative_error(found, x))
    median = {method: sorted(e)[10] for method, e in errors.items()}
    assert median["svd"] <= 1.02 * min(median.values())
    assert median["svd"] < 0.8 * median["best_row"] < 0.8 * median["mean"]
    assert sigma < 0.6 or median["svd"] < 0.85 * median["least_squares"]  # which shrinks


@given(seeds, st.floats(-2, 1))
@settings(max_examples=25)
def test_total_least_squares_is_the_singular_vector(seed: int, log_sigma: float) -> None:
    g = _generator(seed)
    whole = torch.randn(9, 1, generator=g).double() @ torch.randn(1, 7, generator=g).double()
    whole += 10**log_sigma * torch.randn(9, 7, generator=g).double()
    v = torch.linalg.svd(whole).Vh[0]
    found = fc.recover_input(whole[:, :-1], whole[:, -1])
    assert torch.allclose(found, v[:-1] / v[-1], rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-160, 1e160])
def test_rank_one_gives_the_direction_and_what_is_left(size: float) -> None:
    k, x = torch.tensor([3.0, 4.0]).double(), size * torch.tensor([0.0, 2.0, 0.0]).double()
    fit = fc.rank_one(torch.outer(k, x))
    assert fit.value == pytest.approx(10 * size)
    assert fit.residual < 1e-15
    assert torch.allclose(fit.value * torch.outer(fit.left, fit.right), torch.outer(k, x), atol=0)
    assert fc.rank_one(torch.eye(4)).residual == pytest.approx(math.sqrt(3 / 4))


# --- the softmax instead of the bias ----------------------------------------------------------


@given(st.integers(3, 60), st.integers(2, 40), seeds, st.floats(-1, 1.3), st.booleans())
@settings(max_examples=80)
def test_softmax_fixes_scale_sign_and_label(
    m: int, n: int, seed: int, log_scale: float, biased: bool
) -> None:
    weight, bias, x = _layer(m, n, seed, 10**log_scale)
    x, bias = (x.abs() if seed % 3 else -x.abs()) if seed % 2 else x, bias if biased else None
    y = seed % m
    error, found = _one_label(weight, bias, x, y)
    assert error < 1e-11
    _, k = _gradients(CE, weight, bias, x, torch.tensor(y))
    assert torch.allclose(found.k[0], k, rtol=1e-9, atol=1e-13)


def test_softmax_reaches_the_last_digits() -> None:
    cases = [(*_layer(10, 64, seed)[::2], seed % 10) for seed in range(50)]
    assert max(_one_label(weight, None, x, y)[0] for weight, x, y in cases) < 1e-13


@pytest.mark.parametrize("margin", [5.0, 15.0, 30.0, 80.0])
def test_a_confident_float32_prediction_still_tells_label_and_scale(margin: float) -> None:
    weight, _, x = _layer(10, 50, seed=3)
    weight[4] += margin * x / x.square().sum()
    weight, x = weight.float(), x.float()
    assert _one_label(weight, None, x, 4)[0] < 1e-5
    G, k = _gradients(CE, weight, None, x, torch.tensor(4))
    assert margin < 30 or k[4] == 0  # p_y − 1 in float32
    assert not k.any() or fc.recover_output(CE, weight, 0 * k, G, k)[0].targets == 4


def test_probabilities_that_underflow_are_left_out() -> None:
    weight, _, x = _layer(10, 50, seed=4, scale=3)
    weight[:4] -= 150 * x / x.square().sum()
    weight, x = weight.float(), x.float()
    assert not _gradients(CE, weight, None, x, torch.tensor(7))[0][:4].any()
    assert _one_label(weight, None, x, 7)[0] < 1e-6


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-12, 1e-30])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits_equal_to_the_last_digit_still_fix_the_scale(
    size: float, dtype: torch.dtype, bound: float
) -> None:
    weight, bias, x = _layer(10, 50, seed=13)
    for b in (None, bias):
        assert _one_label(weight.to(dtype), b, size * x, 8)[0] < bound


def test_softmax_survives_noise_that_the_rows_show() -> None:
    weight, _, x = _layer(10, 200, seed=6)
    G, _ = _gradients(CE, weight, None, x, torch.tensor(2))
    G += 1e-3 * G.abs().max() * torch.randn(G.shape, generator=_generator(0), dtype=torch.float64)
    (found,) = fc.recover_from_cross_entropy(weight, G)
    assert int(found.targets) == 2 and 1e-4 < found.residual < 0.1
    assert _closest([found], x)[0] < 0.02


# --- twins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [CE, SUM], ids=["two classes", "one logit"])
@given(sizes, seeds, st.floats(-1, 1.3), st.booleans())
@settings(max_examples=60)
def test_twins_explain_the_gradient_and_one_is_the_truth(
    loss: nn.Module, n: int, seed: int, log_scale: float, biased: bool
) -> None:
    softmax, bound = loss is CE, 1e-6 if loss is CE else 1e-5
    weight, bias, x = _layer(1 + softmax, n, seed, 10 ** min(log_scale, 1 + 0.3 * softmax))
    y = torch.tensor(seed % 2) if softmax else torch.tensor([seed % 2]).double()
    bias = bias if biased else None
    G, _ = _gradients(loss, weight, bias, x, y)
    heads = CLOSED_FORMS[loss](weight, G, bias)
    error, found = _closest(heads, x)
    assert error < bound and torch.equal(found.targets.flatten(), y.reshape(1))
    assert 1 <= len(heads) <= 4
    for twin in heads:
        again, _ = _gradients(loss, weight, bias, twin.inputs[0], twin.targets[0])
        assert torch.allclose(again, G, rtol=bound, atol=1e-14)


@pytest.mark.parametrize(("margin", "count"), [(-2.0, 1), (-0.1, 1), (0.5, 2), (1.0, 2), (6.0, 2)])
def test_a_right_prediction_has_twins_and_a_wrong_one_has_none(margin: float, count: int) -> None:
    weight, _, x = _layer(1, 20, seed=7)
    x = x * margin / (weight[0] @ x)
    G, _ = _gradients(BCE, weight, None, x, torch.ones(1).double())
    heads = [h for h in fc.recover_from_logistic(weight, G) if h.targets == 1]
    margins = sorted(float(h.inputs @ weight[0]) for h in heads)
    assert len(margins) == count
    assert min(abs(m - margin) for m in margins) < 1e-12
    assert margin != 0.5 or margins[1] == pytest.approx(2.5088, abs=1e-4)  # the twin of one half


def test_where_both_roots_meet_rounding_leaves_one_of_them() -> None:
    weight, _, x = _layer(1, 20, seed=8)
    tangent = 1.2784645427610738  # 1 + W(1/e)
    x = (x * tangent / (weight[0] @ x)).float()
    G, _ = _gradients(BCE, weight.float(), None, x, torch.ones(1))
    error, _ = _closest(fc.recover_from_logistic(weight.float(), G), x)
    assert error < 5e-3  # half of the digits: the two answers come from a square root


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_several_logits_share_one_scale(dtype: torch.dtype, bound: float, scale: float) -> None:
    for seed in range(20):
        weight, _, x = _layer(6, 30, seed, scale)
        weight, x = weight.to(dtype), x.to(dtype)
        y = (torch.rand(6, generator=_generator(seed)) > 0.5).to(dtype)
        heads = fc.recover_from_logistic(weight, _gradients(SUM, weight, None, x, y)[0])
        error, found = _closest(heads, x)
        assert error < bound and torch.equal(found.targets[0], y.double())
        assert _closest(heads, -x)[0] < 1e-4  # its mirror image, with every label changed


# --- any loss, any bias -----------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["both", "bias kept back", "no bias"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("kind", "y"),
    [
        (nn.CrossEntropyLoss, torch.tensor(4)),
        (nn.BCEWithLogitsLoss, torch.tensor([1, 0, 1, 1, 0]).double()),
        (nn.MSELoss, torch.linspace(-1, 2, 5).double()),
    ],
)
def test_the_last_layer_is_undone(kind: type, y: Tensor, reduction: str, sent: str) -> None:
    weight, bias, x = _layer(5, 12, seed=9)
    loss, own = kind(reduction=reduction), None if sent == "no bias" else bias
    G, k = _gradients(loss, weight, own, x, y)
    given = (loss, weight.requires_grad_(), own, G, k if sent == "both" else None)
    if kind is nn.MSELoss and sent != "both":
        with pytest.raises(UndeterminedScaleError, match="any scale of the input has a target"):
            fc.recover_output(*given)
        return
    error, found = _closest(fc.recover_output(*given), x)
    assert error < 1e-12 and found.residual < 1e-13
    assert torch.allclose(found.targets[0].double(), y.double(), atol=1e-12)
    assert torch.allclose(found.k[0], k, rtol=1e-10)
    assert not found.inputs.requires_grad and not found.k.requires_grad
    assert found.inputs.dtype == torch.float64 and found.inputs.device == G.device


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("loss", CLOSED_FORMS, ids=["softmax", "logistic"])
@pytest.mark.parametrize("m", [3, 10, 50])
def test_another_models_gradient_is_refused(loss: nn.Module, m: int) -> None:
    y = torch.tensor(0) if loss is CE else torch.ones(m).double()
    for seed in range(10):
        weight, _, x = _layer(m, 30, seed)
        G, _ = _gradients(loss, weight, None, x, y)
        with pytest.raises(InconsistentGradientError, match=r"No scale makes .* another layer"):
            CLOSED_FORMS[loss](_layer(m, 30, seed + 100)[0], G)


@pytest.mark.parametrize("loss", CLOSED_FORMS, ids=["softmax", "logistic"])
def test_a_batch_of_two_is_refused_or_leaves_a_large_residual(loss: nn.Module) -> None:
    refused = 0
    for seed in range(20):
        weight, _, x = _layer(10, 30, seed)
        both = torch.stack([x, _layer(10, 30, seed + 500)[2]])
        y = torch.tensor([1, 7]) if loss is CE else (weight @ both.T).T.lt(0).double()
        G, _ = _gradients(loss, weight, None, both, y)
        try:
            assert CLOSED_FORMS[loss](weight, G)[0].residual > 0.05
        except InconsistentGradientError:
            refused += 1
    assert refused >= 10


G, K, NAN = torch.ones(3, 2), torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
SMOOTH, WEIGHTED = nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(weight=K)
SIDED, EACH = nn.BCEWithLogitsLoss(pos_weight=K), nn.MSELoss(reduction="none")


@pytest.mark.parametrize(
    ("call", "arguments", "error", "says"),
    [
        (fc.recover_input, (G, K[:2]), InvalidTensorError, r"shape \(2\,\), .* m = 3"),
        (fc.recover_input, (K, K), InvalidTensorError, r"shape \(3,\), expected \(m, n\)"),
        (fc.recover_input, (G.long(), K), InvalidTensorError, "torch.int64"),
        (fc.recover_input, (G, NAN), InvalidTensorError, "1 NaN or infinite entries of 3"),
        (fc.recover_input, (G, None), UndeterminedScaleError, "bias_gradient is missing"),
        (fc.recover_input, (G, 0 * K), VanishingGradientError, "bias_gradient is zero everywhere"),
        (fc.recover_input, (G, K, "median"), UnknownNameError, "'median'; there are svd, best_row"),
        (fc.rank_one, (G / 0,), InvalidTensorError, "infinite entries of 6"),
        (fc.recover_from_cross_entropy, (torch.ones(4, 2), G), InvalidTensorError, r"\(3, 2\)"),
        (fc.recover_from_cross_entropy, (G[:1], G[:1]), InvalidTensorError, "two classes or more"),
        (fc.recover_from_cross_entropy, (G, 0 * G), VanishingGradientError, "weight_gradient is"),
        (fc.recover_from_logistic, (G, 0 * G), VanishingGradientError, "weight_gradient is zero"),
        (fc.recover_from_logistic, (G, G, K[:2]), InvalidTensorError, r"bias has shape \(2,\)"),
        (fc.recover_from_logistic, (G, -0.2 * G), InconsistentGradientError, r"= -1.2, .*−0.2785"),
        (fc.recover_output, (nn.L1Loss(), G, None, G, None), UnsupportedLossError, "L1Loss is not"),
        (fc.recover_output, (SMOOTH, G, None, G, None), UnsupportedLossError, "label smoothing"),
        (fc.recover_output, (WEIGHTED, G, K, G, K), UnsupportedLossError, "class weights"),
        (fc.recover_output, (SIDED, G, K, G, K), UnsupportedLossError, "class weights"),
        (fc.recover_output, (EACH, G, K, G, K), UnsupportedLossError, "reduction 'none'"),
        (fc.recover_output, (CE, G, K, 0 * G, K), VanishingGradientError, "weight_gradient is"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, arguments, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        call(*arguments)
