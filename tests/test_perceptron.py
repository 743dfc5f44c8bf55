"""The bias ratio against the inputs that made the gradients, and what is left where it fails."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.errors import InvalidTensorError, VanishingGradientError
from gradinv_edu.perceptron import (
    mixture,
    noise_error,
    recover_direction,
    recover_input,
    recover_penalised_input,
)

PHOTO = "astronaut"
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": nn.MSELoss(),
    "logistic": nn.BCEWithLogitsLoss(),
    "absolute": nn.L1Loss(),
    "huber": nn.HuberLoss(),
    "poisson": nn.PoissonNLLLoss(),
    "hinge": lambda z, y: (2 - (2 * y - 1) * z).relu().sum(),
    "wild": lambda z, y: (z.sin().exp() * (z - y)).sum(),
}


def _gradient(
    loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    net = gi.models.perceptron(x[0].numel(), generator=generator, dtype=x.dtype)
    update = gi.observe(net, loss, x, torch.ones(len(x), 1))
    return update.gradients["1.weight"][0], update.gradients["1.bias"][0]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the ratio ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@given(n=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_any_loss_gives_the_input(
    loss: Callable[[Tensor, Tensor], Tensor], n: int, seed: int
) -> None:
    x = _random(1, n, seed=seed)
    weight, bias = _gradient(loss, x, seed)
    assume(bias != 0)  # a sample beyond the hinge moves nothing
    found = recover_input(weight, bias)
    assert torch.allclose(found, x[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_a_photograph_of_512_by_512_pixels(dtype: torch.dtype, error: float, loss: str) -> None:
    x = gi.data.photo(PHOTO, dtype=dtype)
    assert x.shape == (1, 3, 512, 512)
    found = recover_input(*_gradient(LOSSES[loss], x))
    assert gi.metrics.relative_error(found, x.flatten()) < error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_costs_the_digits_of_the_dtype_and_the_answer_is_float64(
    dtype: torch.dtype,
) -> None:
    x, k = _random(500), torch.tensor(0.37, dtype=torch.float64)
    found = recover_input((k * x).to(dtype), k.to(dtype))
    assert found.dtype == torch.float64
    assert gi.metrics.relative_error(found, x) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_small_bias_gradient_costs_nothing_until_underflow(dtype: torch.dtype) -> None:
    x = _random(500)
    for k in (2.0**-i for i in range(0, 60, 4)):
        sent = torch.tensor(k, dtype=torch.float64)
        found = recover_input((sent * x).to(dtype), sent.to(dtype))
        assert gi.metrics.relative_error(found, x) < torch.finfo(dtype).eps


def test_float16_loses_digits_below_its_smallest_normal_number() -> None:
    x = _random(500)
    errors = [
        gi.metrics.relative_error(recover_input((k * x).half(), torch.tensor(k).half()), x)
        for k in (2.0**-4, 2.0**-16, 2.0**-22)
    ]
    assert errors[0] < 1e-3
    assert errors[1] > 2 * errors[0]
    assert errors[2] > 20 * errors[1]


def test_it_solves_in_float64_what_was_sent_in_half_precision() -> None:
    g_W, g_b = torch.tensor([1.0, 3.0]).half(), torch.tensor(3.0).half()
    assert torch.equal(recover_input(g_W, g_b), torch.tensor([1 / 3, 1], dtype=torch.float64))


def test_fifty_local_steps_do_not_stop_it_and_adam_does() -> None:
    x = gi.data.photo(PHOTO, 32, torch.float64)
    net = gi.models.perceptron(x.numel(), dtype=torch.float64)

    def error(**settings: object) -> float:
        update = gi.observe(
            net, nn.BCEWithLogitsLoss(), x, torch.ones(1, 1), local_steps=50, **settings
        )
        update = gi.sharing.without_weight_decay(net, update)
        sent = (update.gradients["1.weight"][0], update.gradients["1.bias"][0])
        return gi.metrics.relative_error(recover_input(*sent), x.flatten())

    assert error(learning_rate=1e-4) < 1e-12
    assert error(learning_rate=1e-4, momentum=0.9) < 1e-12
    assert error(learning_rate=1e-4, momentum=0.9, weight_decay=0.1) < 1e-12
    assert error(learning_rate=1e-4, optimizer="adam") > 0.3


# --- a known penalty ---------------------------------------------------------------------------


@given(penalty=st.floats(0, 10), seed=st.integers(0, 2**20), biased=st.booleans())
def test_a_known_penalty_is_taken_out(penalty: float, seed: int, biased: bool) -> None:
    W, b, x = _random(9, seed=seed), _random(seed=seed + 1), _random(9, seed=seed + 2)
    W, b = W.requires_grad_(), b.requires_grad_()
    cost = W.square().sum() + (b.square() if biased else 0)
    loss = (W @ x + b - 20) ** 2 + penalty * cost
    g_W, g_b = torch.autograd.grad(loss, (W, b))
    found = recover_penalised_input(g_W, g_b, W, b if biased else None, penalty)
    assert torch.allclose(found, x, rtol=1e-10, atol=1e-12)


def test_no_penalty_is_the_plain_ratio() -> None:
    g_W, g_b, W = _random(4), _random(seed=3), _random(4, seed=2)
    assert torch.equal(
        recover_penalised_input(g_W, g_b, W, g_b, penalty=0.0), recover_input(g_W, g_b)
    )


def test_weight_decay_of_an_optimiser_is_twice_the_penalty() -> None:
    x = _random(1, 6)
    net = gi.models.perceptron(6, dtype=torch.float64)
    update = gi.observe(net, nn.MSELoss(), x, torch.ones(1, 1), weight_decay=0.3)
    found = recover_penalised_input(
        update.gradients["1.weight"][0],
        update.gradients["1.bias"][0],
        net[1].weight[0],
        net[1].bias[0],
        penalty=0.15,
    )
    assert torch.allclose(found, x[0], rtol=1e-12)


# --- no bias, a batch, noise -------------------------------------------------------------------


@given(k=st.floats(-1e3, 1e3).filter(bool), seed=st.integers(0, 2**20))
def test_without_a_bias_the_direction_is_left(k: float, seed: int) -> None:
    x = _random(12, seed=seed)
    found = recover_direction(k * x)
    assert torch.allclose(found, math.copysign(1, k) * x / x.norm(), rtol=1e-9)


def test_the_direction_of_a_tiny_gradient_does_not_underflow() -> None:
    assert torch.allclose(recover_direction(_random(5) * 1e-200), recover_direction(_random(5)))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@given(samples=st.integers(1, 6), seed=st.integers(0, 2**20))
def test_a_batch_gives_the_mixture(
    loss: Callable[[Tensor, Tensor], Tensor], samples: int, seed: int
) -> None:
    x = _random(samples, 7, seed=seed)
    net = gi.models.perceptron(
        7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    z = net(x).detach().requires_grad_()
    (k,) = torch.autograd.grad(loss(z, torch.ones(samples, 1).double()), z)
    total = float(k.sum().abs())
    if total < 1e-6 * float(k.abs().max()) or not total:
        return  # the ratio of what cancels is noise
    found = recover_input(*_gradient(loss, x, seed))
    assert torch.allclose(found, mixture(x, k[:, 0]), rtol=1e-8, atol=1e-8 / total)


def test_the_shares_add_up_to_one_and_may_be_negative() -> None:
    x = torch.eye(2, dtype=torch.float64)
    found = mixture(x, torch.tensor([3.0, -2.0]))
    assert torch.equal(found, torch.tensor([3.0, -2.0], dtype=torch.float64))


@pytest.mark.parametrize("k, sigma", [(1.0, 1e-4), (-0.01, 1e-4), (0.5, 1e-2)])
def test_noise_moves_the_ratio_as_far_as_the_formula_says(k: float, sigma: float) -> None:
    x, true_k = _random(50), torch.tensor(k, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    squares = []
    for _ in range(2000):
        noise = sigma * torch.randn(51, generator=generator, dtype=torch.float64)
        found = recover_input(k * x + noise[:50], true_k + noise[50])
        squares.append(gi.metrics.relative_error(found, x) ** 2)
    measured = math.sqrt(sum(squares) / len(squares))
    assert measured == pytest.approx(noise_error(x, true_k, sigma), rel=0.05)


# --- what is refused ---------------------------------------------------------------------------

ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    "weight, bias, message",
    [
        (torch.tensor([1.0, math.nan]), ONE, "weight_gradient has 1 NaN or infinite"),
        (torch.ones(2), torch.tensor(math.inf), "bias_gradient has 1 NaN or infinite"),
        (torch.ones(2, 3), ONE, r"weight_gradient has shape \(2, 3\)"),
        (torch.ones(2), torch.ones(2), r"bias_gradient has shape \(2,\), expected \(\)"),
        (torch.ones(2, dtype=torch.int64), ONE, "weight_gradient has dtype torch.int64"),
        (torch.ones(0), ONE, "weight_gradient is empty"),
        ([1.0], ONE, "weight_gradient must be a torch.Tensor, got list"),
    ],
)
def test_bad_tensors_are_refused(weight: Tensor, bias: Tensor, message: str) -> None:
    with pytest.raises(InvalidTensorError, match=message):
        recover_input(weight, bias)


def test_a_zero_gradient_says_nothing() -> None:
    with pytest.raises(VanishingGradientError, match="bias_gradient is zero everywhere"):
        recover_input(torch.ones(2), torch.tensor(0.0))
    with pytest.raises(VanishingGradientError, match="weight_gradient is zero everywhere"):
        recover_direction(torch.zeros(2))
    with pytest.raises(VanishingGradientError, match="sum of output_gradients is zero"):
        mixture(torch.ones(2, 3), torch.tensor([1.0, -1.0]))
    with pytest.raises(VanishingGradientError, match="inputs is zero"):
        noise_error(torch.zeros(2), ONE, 0.1)


def test_a_ratio_beyond_float64_is_refused() -> None:
    with pytest.raises(VanishingGradientError, match="leaves float64's range"):
        recover_input(torch.ones(2).double(), torch.tensor(1e-320, dtype=torch.float64))


def test_a_weight_of_another_layer_is_refused() -> None:
    with pytest.raises(InvalidTensorError, match=r"weight has shape \(3,\), expected \(2\)"):
        recover_penalised_input(torch.ones(2), ONE, torch.ones(3), None, 0.1)
    with pytest.raises(InvalidTensorError, match="2 inputs need as many output_gradients, got 3"):
        mixture(torch.ones(2, 4), torch.ones(3))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_settings_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="penalty must be zero or positive"):
        recover_penalised_input(torch.ones(2), ONE, torch.ones(2), ONE, value)
    with pytest.raises(ValueError, match="sigma must be zero or positive"):
        noise_error(torch.ones(2), ONE, value)
