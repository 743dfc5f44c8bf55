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

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-1, torch.float16: 1e-2}
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


def _closest(outputs: list[fc.Output], x: Tensor) -> tuple[float, fc.Output]:
    errors = [gi.metrics.relative_error(o.x, x.double()) for o in outputs]
    place = errors.index(min(errors))
    return errors[place], outputs[place]


# --- with a bias ------------------------------------------------------------------------------


@given(sizes, sizes, seeds, st.floats(-9, 9), st.floats(-9, 9))
@settings(deadline=None, max_examples=60)
def test_every_row_says_x_whatever_its_size(m: int, n: int, seed: int, k10: float, x10: float):
    g = _generator(seed)
    k = torch.randn(m, generator=g, dtype=torch.float64) * 10**k10
    x = torch.randn(n, generator=g, dtype=torch.float64) * 10**x10
    for method in fc.METHODS:
        found = fc.recover_input(torch.outer(k, x), k, method)
        assert gi.metrics.relative_error(found, x) < 1e-13, method


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_precision_comes_back_in_float64(dtype: torch.dtype) -> None:
    weight, bias, x = _layer(20, 30, seed=1)
    loss, x = nn.CrossEntropyLoss(), x.to(dtype)
    G, k = _gradients(loss, weight.to(dtype), bias, x, torch.tensor(3))
    found = fc.recover_input(G, k)
    assert found.dtype == torch.float64
    assert gi.metrics.relative_error(found, x) < DTYPES[dtype]


def _errors_under_noise(sigma: float, trials: int = 20) -> dict[str, float]:
    """Median relative error of each method, with the same noise in G and in k."""
    errors: dict[str, list[float]] = {method: [] for method in fc.METHODS}
    for seed in range(trials):
        g = _generator(seed)
        k = torch.randn(64, generator=g, dtype=torch.float64)
        x = torch.randn(100, generator=g, dtype=torch.float64)
        G = torch.outer(k, x) + sigma * torch.randn(64, 100, generator=g, dtype=torch.float64)
        noisy = k + sigma * torch.randn(64, generator=g, dtype=torch.float64)
        for method in fc.METHODS:
            found = fc.recover_input(G, noisy, method)
            errors[method].append(gi.metrics.relative_error(found, x))
    return {method: sorted(e)[trials // 2] for method, e in errors.items()}


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.1, 0.3, 0.6])
def test_total_least_squares_is_the_best_under_noise(sigma: float) -> None:
    errors = _errors_under_noise(sigma)
    assert errors["svd"] <= 1.02 * min(errors.values())
    assert errors["svd"] < 0.8 * errors["best_row"] < 0.8 * errors["mean"]


def test_least_squares_shrinks_under_heavy_noise_and_total_least_squares_does_not() -> None:
    errors = _errors_under_noise(0.6)
    assert errors["svd"] < 0.85 * errors["least_squares"]


@given(seeds, st.floats(-2, 1))
@settings(deadline=None, max_examples=25)
def test_total_least_squares_is_the_singular_vector(seed: int, log_sigma: float) -> None:
    g = _generator(seed)
    whole = torch.randn(9, 1, generator=g).double() @ torch.randn(1, 7, generator=g).double()
    whole += 10**log_sigma * torch.randn(9, 7, generator=g).double()
    v = torch.linalg.svd(whole).Vh[0]
    found = fc.recover_input(whole[:, :-1], whole[:, -1])
    assert torch.allclose(found, v[:-1] / v[-1], rtol=1e-6)


def test_rank_one_gives_the_direction_and_what_is_left() -> None:
    k, x = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0, 0.0])
    fit = fc.rank_one(torch.outer(k, x))
    assert fit.value == pytest.approx(10.0)
    assert fit.residual < 1e-15
    assert torch.allclose(fit.value * torch.outer(fit.left, fit.right), torch.outer(k, x).double())
    assert fc.rank_one(torch.eye(4)).residual == pytest.approx(math.sqrt(3 / 4))


# --- the loss instead of the bias -------------------------------------------------------------


@given(st.integers(3, 60), st.integers(2, 40), seeds, st.floats(-1, 1.3))
@settings(deadline=None, max_examples=80)
def test_softmax_fixes_scale_sign_and_label(m: int, n: int, seed: int, log_scale: float) -> None:
    weight, _, x = _layer(m, n, seed, 10**log_scale)
    y = torch.randint(m, (), generator=_generator(seed))
    G, k = _gradients(nn.CrossEntropyLoss(), weight, None, x, y)
    (found,) = fc.recover_from_cross_entropy(weight, G)
    assert int(found.target) == y
    assert gi.metrics.relative_error(found.x, x) < 1e-11
    assert torch.allclose(found.k, k, rtol=1e-9, atol=1e-13)


def test_softmax_reaches_the_last_digits() -> None:
    errors = []
    for seed in range(50):
        weight, _, x = _layer(10, 64, seed)
        G, _ = _gradients(nn.CrossEntropyLoss(), weight, None, x, torch.tensor(seed % 10))
        errors.append(_closest(fc.recover_from_cross_entropy(weight, G), x)[0])
    assert max(errors) < 1e-13


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_the_features_does_not_matter(sign: int) -> None:
    weight, _, x = _layer(10, 20, seed=2)
    x = sign * x.abs()
    G, _ = _gradients(nn.CrossEntropyLoss(), weight, None, x, torch.tensor(6))
    (found,) = fc.recover_from_cross_entropy(weight, G)
    assert int(found.target) == 6
    assert torch.allclose(found.x, x, rtol=1e-12)


@pytest.mark.parametrize("margin", [5.0, 15.0, 30.0, 80.0])
def test_a_confident_float32_prediction_still_tells_label_and_scale(margin: float) -> None:
    weight, _, x = _layer(10, 50, seed=3)
    weight[4] += margin * x / x.square().sum()
    weight, x = weight.float(), x.float()
    G, _ = _gradients(nn.CrossEntropyLoss(), weight, None, x, torch.tensor(4))
    (found,) = fc.recover_from_cross_entropy(weight, G)
    assert int(found.target) == 4
    assert gi.metrics.relative_error(found.x, x) < 1e-5


def test_a_label_whose_own_gradient_was_rounded_away_is_found() -> None:
    weight, _, x = _layer(10, 50, seed=3)
    weight[4] += 30 * x / x.square().sum()
    weight, x = weight.float(), x.float()
    G, k = _gradients(nn.CrossEntropyLoss(), weight, torch.zeros(10), x, torch.tensor(4))
    assert k[4] == 0  # p_y − 1 in float32
    assert int(fc.recover_from_cross_entropy(weight, G)[0].target) == 4
    assert int(fc.recover_from_bias(nn.CrossEntropyLoss(), weight, k * 0, G, k).target) == 4


def test_probabilities_that_underflow_are_left_out() -> None:
    weight, _, x = _layer(10, 50, seed=4, scale=3)
    weight[:4] -= 150 * x / x.square().sum()
    weight, x = weight.float(), x.float()
    G, _ = _gradients(nn.CrossEntropyLoss(), weight, None, x, torch.tensor(7))
    assert not G[:4].any()
    (found,) = fc.recover_from_cross_entropy(weight, G)
    assert int(found.target) == 7
    assert gi.metrics.relative_error(found.x, x) < 1e-6


def test_a_bias_whose_gradient_was_withheld_shifts_the_logits() -> None:
    weight, bias, x = _layer(10, 30, seed=5)
    G, _ = _gradients(nn.CrossEntropyLoss(), weight, bias, x, torch.tensor(1))
    (found,) = fc.recover_from_cross_entropy(weight, G, bias)
    assert torch.allclose(found.x, x, rtol=1e-11)
    (same,) = fc.recover_output(nn.CrossEntropyLoss(), weight, bias, G, None)
    assert torch.equal(same.x, found.x)


@given(seeds, st.floats(-1, 1.3), st.booleans())
@settings(deadline=None, max_examples=60)
def test_two_classes_leave_twins_and_one_is_the_truth(
    seed: int, log_scale: float, biased: bool
) -> None:
    weight, bias, x = _layer(2, 30, seed, 10**log_scale)
    bias, y = (bias if biased else None), torch.tensor(seed % 2)
    loss = nn.CrossEntropyLoss()
    G, _ = _gradients(loss, weight, bias, x, y)
    outputs = fc.recover_from_cross_entropy(weight, G, bias)
    error, found = _closest(outputs, x)
    assert error < 1e-6 and int(found.target) == y
    assert 1 <= len(outputs) <= 4
    for twin in outputs:  # every answer explains the gradient
        again, _ = _gradients(loss, weight, bias, twin.x, twin.target)
        assert torch.allclose(again, G, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-12, 1e-30])
def test_logits_equal_to_the_last_digit_still_fix_the_scale(size: float) -> None:
    weight, bias, x = _layer(10, 50, seed=13)
    x = size * x
    for b in (None, bias):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            G, _ = _gradients(nn.CrossEntropyLoss(), weight.to(dtype), b, x, torch.tensor(8))
            (found,) = fc.recover_from_cross_entropy(weight, G, b)
            assert int(found.target) == 8
            assert gi.metrics.relative_error(found.x, x) < tolerance


def test_softmax_survives_noise_that_the_rows_show() -> None:
    weight, _, x = _layer(10, 200, seed=6)
    G, _ = _gradients(nn.CrossEntropyLoss(), weight, None, x, torch.tensor(2))
    noise = torch.randn(G.shape, generator=_generator(0), dtype=torch.float64)
    G += 1e-3 * G.abs().max() * noise
    (found,) = fc.recover_from_cross_entropy(weight, G)
    assert int(found.target) == 2
    assert gi.metrics.relative_error(found.x, x) < 0.02
    assert 1e-4 < found.residual < 0.1


@given(sizes, seeds, st.floats(-1, 1), st.booleans())
@settings(deadline=None, max_examples=60)
def test_one_logit_has_all_its_answers(n: int, seed: int, log_scale: float, biased: bool) -> None:
    weight, bias, x = _layer(1, n, seed, 10**log_scale)
    loss, y = nn.BCEWithLogitsLoss(), torch.tensor([float(seed % 2)]).double()
    bias = bias if biased else None
    G, _ = _gradients(loss, weight, bias, x, y)
    outputs = fc.recover_from_logistic(weight, G, bias)
    error, found = _closest(outputs, x)
    assert error < 1e-5 and torch.equal(found.target, y)
    for twin in outputs:
        again, _ = _gradients(loss, weight, bias, twin.x, twin.target)
        assert torch.allclose(again, G, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize(("margin", "count"), [(-2.0, 1), (-0.1, 1), (0.5, 2), (1.0, 2), (6.0, 2)])
def test_a_right_prediction_has_twins_and_a_wrong_one_has_none(margin: float, count: int) -> None:
    weight, _, x = _layer(1, 20, seed=7)
    x = x * margin / (weight[0] @ x)
    G, _ = _gradients(nn.BCEWithLogitsLoss(), weight, None, x, torch.ones(1).double())
    outputs = [o for o in fc.recover_from_logistic(weight, G) if o.target == 1]
    margins = sorted(float(weight[0] @ o.x) for o in outputs)
    assert len(margins) == count
    assert min(abs(m - margin) for m in margins) < 1e-12
    if margin == 0.5:
        assert margins[1] == pytest.approx(2.5088, abs=1e-4)  # the twin of one half


def test_where_both_roots_meet_rounding_leaves_one_of_them() -> None:
    weight, _, x = _layer(1, 20, seed=8)
    tangent = 1.2784645427610738  # 1 + W(1/e)
    x = (x * tangent / (weight[0] @ x)).float()
    G, _ = _gradients(nn.BCEWithLogitsLoss(), weight.float(), None, x, torch.ones(1))
    error, _ = _closest(fc.recover_from_logistic(weight.float(), G), x)
    assert error < 5e-3  # half of the digits: the two answers come from a square root


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_several_logits_share_one_scale(dtype: torch.dtype, scale: float) -> None:
    for seed in range(20):
        weight, _, x = _layer(6, 30, seed, scale)
        weight, x = weight.to(dtype), x.to(dtype)
        y = (torch.rand(6, generator=_generator(seed)) > 0.5).to(dtype)
        G, _ = _gradients(nn.BCEWithLogitsLoss(reduction="sum"), weight, None, x, y)
        outputs = fc.recover_from_logistic(weight, G)
        error, found = _closest(outputs, x)
        assert error < (1e-12 if dtype == torch.float64 else 1e-5)
        assert torch.equal(found.target, y.double())
        assert _closest(outputs, -x)[0] < 1e-4  # its mirror image, with every label changed


# --- dispatch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_bias_serves_every_loss(reduction: str) -> None:
    weight, bias, x = _layer(5, 12, seed=9)
    binary = torch.tensor([1, 0, 1, 1, 0]).double()
    real = torch.linspace(-1, 2, 5).double()
    for kind, y in (
        (nn.CrossEntropyLoss, torch.tensor(4)),
        (nn.BCEWithLogitsLoss, binary),
        (nn.MSELoss, real),
    ):
        loss = kind(reduction=reduction)
        G, k = _gradients(loss, weight, bias, x, y)
        (found,) = fc.recover_output(loss, weight, bias, G, k)
        assert torch.allclose(found.x, x, rtol=1e-12)
        assert torch.allclose(found.target.double(), y.double(), atol=1e-12)
        assert torch.equal(found.k, k) and found.residual < 1e-14


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_over_logits_is_undone(reduction: str) -> None:
    weight, bias, x = _layer(5, 12, seed=10)
    y = torch.tensor([1, 0, 1, 1, 0]).double()
    loss = nn.BCEWithLogitsLoss(reduction=reduction)
    for b in (None, bias):
        G, k = _gradients(loss, weight, b, x, y)
        error, found = _closest(fc.recover_output(loss, weight, b, G, None), x)
        assert error < 1e-12 and torch.equal(found.target, y)
        assert torch.allclose(found.k, k, rtol=1e-10)


def test_answers_stay_on_the_device_and_leave_no_graph() -> None:
    weight, bias, x = _layer(4, 6, seed=11)
    loss = nn.CrossEntropyLoss()
    G, k = _gradients(loss, weight, bias, x, torch.tensor(0))
    for sent in (k, None):
        (found,) = fc.recover_output(loss, weight.requires_grad_(), bias, G, sent)
        assert not found.x.requires_grad and not found.k.requires_grad
        assert found.x.device == G.device and found.x.dtype == torch.float64


# --- what is refused --------------------------------------------------------------------------

CLOSED_FORMS = [fc.recover_from_cross_entropy, fc.recover_from_logistic]


@pytest.mark.parametrize("recover", CLOSED_FORMS)
@pytest.mark.parametrize("m", [3, 10, 50])
def test_another_models_gradient_is_refused(recover, m: int) -> None:
    softmax = recover is fc.recover_from_cross_entropy
    loss = nn.CrossEntropyLoss() if softmax else nn.BCEWithLogitsLoss(reduction="sum")
    y = torch.tensor(0) if softmax else torch.ones(m).double()
    for seed in range(10):
        weight, _, x = _layer(m, 30, seed)
        G, _ = _gradients(loss, weight, None, x, y)
        with pytest.raises(InconsistentGradientError, match=r"No scale makes .* another layer"):
            recover(_layer(m, 30, seed + 100)[0], G)


@pytest.mark.parametrize("recover", CLOSED_FORMS)
def test_a_batch_of_two_is_refused_or_leaves_a_large_residual(recover) -> None:
    softmax = recover is fc.recover_from_cross_entropy
    loss = nn.CrossEntropyLoss() if softmax else nn.BCEWithLogitsLoss(reduction="sum")
    refused = 0
    for seed in range(20):
        weight, _, x = _layer(10, 30, seed)
        both = torch.stack([x, _layer(10, 30, seed + 500)[2]])
        y = torch.tensor([1, 7]) if softmax else (weight @ both.T).T.lt(0).double()
        G, _ = _gradients(loss, weight, None, both, y)
        try:
            assert recover(weight, G)[0].residual > 0.05
        except InconsistentGradientError:
            refused += 1
    assert refused >= 10


def test_a_product_that_no_margin_has_is_refused() -> None:
    weight = torch.ones(1, 4)
    with pytest.raises(InconsistentGradientError, match=r"= -0.4, .* above −0.2785"):
        fc.recover_from_logistic(weight, -0.1 * weight)


def test_a_squared_error_without_a_bias_leaves_the_scale_open() -> None:
    weight, _, x = _layer(5, 12, seed=12)
    G, _ = _gradients(nn.MSELoss(), weight, None, x, torch.zeros(5).double())
    with pytest.raises(UndeterminedScaleError, match="any scale of the input has a target"):
        fc.recover_output(nn.MSELoss(), weight, None, G, None)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (nn.L1Loss(), "L1Loss is not handled"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "label smoothing"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "class weights"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "class weights"),
        (nn.MSELoss(reduction="none"), "reduction 'none'"),
    ],
)
def test_other_losses_are_refused_by_name(loss: nn.Module, name: str) -> None:
    with pytest.raises(UnsupportedLossError, match=name):
        fc.recover_output(loss, torch.ones(3, 2), None, torch.ones(3, 2), None)
    with pytest.raises(UnsupportedLossError, match=name):
        fc.recover_from_bias(loss, torch.ones(3, 2), torch.ones(3), torch.ones(3, 2), torch.ones(3))


def test_bad_tensors_are_refused_with_their_shapes() -> None:
    G, k = torch.ones(3, 2), torch.ones(3)
    with pytest.raises(InvalidTensorError, match="3 rows and bias_gradient 2 entries"):
        fc.recover_input(G, k[:2])
    with pytest.raises(InvalidTensorError, match=r"shape \(3,\), expected \(any, any\)"):
        fc.recover_input(k, k)
    with pytest.raises(InvalidTensorError, match=r"torch.int64"):
        fc.recover_input(G.long(), k)
    with pytest.raises(InvalidTensorError, match="1 NaN or infinite entries of 3"):
        fc.recover_input(G, torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(InvalidTensorError, match="infinite entries of 6"):
        fc.rank_one(G / 0)
    with pytest.raises(InvalidTensorError, match=r"shape \(3, 2\), expected \(4, 2\)"):
        fc.recover_from_cross_entropy(torch.ones(4, 2), G)
    with pytest.raises(InvalidTensorError, match="two classes or more"):
        fc.recover_from_cross_entropy(torch.ones(1, 2), G[:1])
    with pytest.raises(InvalidTensorError, match=r"bias has shape \(2,\), expected \(3\)"):
        fc.recover_from_logistic(torch.ones(3, 2), G, torch.ones(2))


def test_a_silent_layer_and_an_unknown_method_are_named() -> None:
    G, k = torch.ones(3, 2), torch.ones(3)
    with pytest.raises(VanishingGradientError, match="bias_gradient is zero everywhere"):
        fc.recover_input(G, 0 * k)
    for recover in CLOSED_FORMS:
        with pytest.raises(VanishingGradientError, match="weight_gradient is zero everywhere"):
            recover(torch.ones(3, 2), 0 * G)
    with pytest.raises(UnknownNameError, match="'median'; there are svd, best_row, mean"):
        fc.recover_input(G, k, "median")
