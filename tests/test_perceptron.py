"""The bias ratio against the inputs that made the gradients, and what is left where it fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.errors import InvalidArgumentError, InvalidTensorError, VanishingGradientError
from gradinv_edu.perceptron import (
    mixture,
    noise_error,
    recover_direction,
    recover_input,
    recover_penalised_input,
)

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "squared": nn.MSELoss(),
    "logistic": nn.BCEWithLogitsLoss(),
    "absolute": nn.L1Loss(),
    "huber": nn.HuberLoss(),
    "poisson": nn.PoissonNLLLoss(),
    "hinge": lambda z, y: (2 - (2 * y - 1) * z).relu().sum(),
    "wild": lambda z, y: (z.sin().exp() * (z - y)).sum(),
}
SEEDS = st.integers(0, 2**20)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _gradient(loss: Loss, x: Tensor, seed: int = 0, **how: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    net = gi.models.perceptron(x[0].numel(), generator=generator, dtype=x.dtype)
    update = gi.observe(net, loss, x, torch.ones(len(x), 1), **how)
    update = update if how.get("optimizer") else gi.sharing.without_weight_decay(net, update)
    return update.gradients["1.weight"][0], update.gradients["1.bias"][0]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the ratio ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@settings(max_examples=30)
@given(n=st.integers(1, 40), samples=st.integers(1, 6), seed=SEEDS)
def test_any_loss_gives_the_input_and_of_a_batch_the_mixture(
    loss: Loss, n: int, samples: int, seed: int
) -> None:
    x = _random(samples, n, seed=seed)
    weight, bias = _gradient(loss, x, seed)
    net: Any = gi.models.perceptron(
        n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    z = net(x).detach().requires_grad_()
    (k,) = torch.autograd.grad(loss(z, torch.ones(samples, 1).double()), z)
    # a sample beyond the hinge moves nothing; the ratio of what cancels is noise
    assume(float(bias.abs()) > 1e-6 * float(k.abs().max()))
    found = recover_input(weight, bias)
    torch.testing.assert_close(found, mixture(x, k[:, 0]), rtol=1e-8, atol=1e-8)
    if samples == 1:
        torch.testing.assert_close(found, x[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_a_photograph_of_512_by_512_pixels(dtype: torch.dtype, error: float, loss: str) -> None:
    x = gi.data.photo("astronaut", dtype=dtype)
    assert x.shape == (1, 3, 512, 512)
    found = recover_input(*_gradient(LOSSES[loss], x))
    assert gi.metrics.relative_error(found, x.flatten()) < error


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_costs_the_digits_of_the_dtype_until_underflow(dtype: torch.dtype) -> None:
    """However small the bias gradient is; float16 alone has no small numbers."""
    for power in range(0, 2 if dtype == torch.float16 else 60, 4):
        x, k = _random(500), torch.tensor(0.37 * 2.0**-power, dtype=torch.float64)
        found = recover_input((k * x).to(dtype), k.to(dtype))
        assert found.dtype == torch.float64
        assert gi.metrics.relative_error(found, x) < torch.finfo(dtype).eps


def test_float16_loses_digits_below_its_smallest_normal_number() -> None:
    x, powers = _random(500), (2.0**-4, 2.0**-16, 2.0**-22)
    errors = [
        gi.metrics.relative_error(recover_input((k * x).half(), torch.tensor(k).half()), x)
        for k in powers
    ]
    assert errors[0] < 1e-3 and errors[1] > 2 * errors[0] and errors[2] > 20 * errors[1]


@pytest.mark.parametrize("more", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_fifty_local_steps_do_not_stop_it_and_adam_does(more: dict[str, float]) -> None:
    x, how = gi.data.photo("cat", 32, torch.float64), {"local_steps": 50, "learning_rate": 1e-4}
    found = recover_input(*_gradient(LOSSES["logistic"], x, **how, **more))
    assert gi.metrics.relative_error(found, x.flatten()) < 1e-12
    found = recover_input(*_gradient(LOSSES["logistic"], x, **how, optimizer="adam"))
    assert gi.metrics.relative_error(found, x.flatten()) > 0.3


# --- a known penalty, no bias, noise ------------------------------------------------------------


@given(penalty=st.floats(0, 10), seed=SEEDS, biased=st.booleans())
def test_a_known_penalty_is_taken_out(penalty: float, seed: int, biased: bool) -> None:
    W, b, x = _random(9, seed=seed), _random(seed=seed + 1), _random(9, seed=seed + 2)
    W, b = W.requires_grad_(), b.requires_grad_()
    cost = W.square().sum() + (b.square() if biased else 0)
    loss = (W @ x + b - 20) ** 2 + penalty * cost
    g_W, g_b = torch.autograd.grad(loss, (W, b))
    found = recover_penalised_input(g_W, g_b, W, b if biased else None, penalty)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-12)


def test_weight_decay_of_an_optimiser_is_twice_the_penalty() -> None:
    x, net = _random(1, 6), gi.models.perceptron(6, dtype=torch.float64)
    sent = gi.observe(net, nn.MSELoss(), x, torch.ones(1, 1), weight_decay=0.3).gradients
    g_W, g_b = sent["1.weight"][0], sent["1.bias"][0]
    found = recover_penalised_input(g_W, g_b, net[1].weight[0], net[1].bias[0], penalty=0.15)
    torch.testing.assert_close(found, x[0], rtol=1e-12, atol=0)


@given(k=st.floats(-1e3, 1e3).filter(bool), seed=SEEDS, scale=st.sampled_from([1.0, 1e-200]))
def test_without_a_bias_the_direction_is_left(k: float, seed: int, scale: float) -> None:
    assume(abs(k) > 1e-50)
    x = _random(12, seed=seed)
    found = recover_direction(k * scale * x)
    torch.testing.assert_close(found, math.copysign(1, k) * x / x.norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("k, sigma", [(1.0, 1e-4), (-0.01, 1e-4), (0.5, 1e-2)])
def test_noise_moves_the_ratio_as_far_as_the_formula_says(k: float, sigma: float) -> None:
    x, true_k = _random(50), torch.tensor(k, dtype=torch.float64)
    noise = sigma * _random(2000, 51, seed=7)
    found = (k * x + noise[:, :50]) / (k + noise[:, 50:])
    measured = float(((found - x).norm(dim=1) / x.norm()).square().mean().sqrt())
    assert measured == pytest.approx(noise_error(x, true_k, sigma), rel=0.05)


# --- what is refused ---------------------------------------------------------------------------

ONE, PAIR = torch.tensor(1.0), torch.ones(2)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (InvalidTensorError, "weight_gradient has 1 NaN or infinite",
         lambda: recover_input(torch.tensor([1.0, math.nan]), ONE)),
        (InvalidTensorError, "bias_gradient has 1 NaN or infinite",
         lambda: recover_input(PAIR, ONE * math.inf)),
        (InvalidTensorError, r"weight_gradient has shape \(2, 3\)",
         lambda: recover_input(torch.ones(2, 3), ONE)),
        (InvalidTensorError, r"bias_gradient has shape \(2,\), expected \(\)",
         lambda: recover_input(PAIR, PAIR)),
        (InvalidTensorError, r"weight_gradient has dtype torch\.int64",
         lambda: recover_input(PAIR.long(), ONE)),
        (InvalidTensorError, "weight_gradient is empty", lambda: recover_input(PAIR[:0], ONE)),
        (InvalidTensorError, "weight_gradient must be a torch.Tensor, got list",
         lambda: recover_input([1.0], ONE)),  # type: ignore[arg-type]
        (InvalidTensorError, r"weight has shape \(3,\), expected \(n\) with n = 2",
         lambda: recover_penalised_input(PAIR, ONE, torch.ones(3), None, 0.1)),
        (InvalidTensorError, r"output_gradients has shape \(3,\), expected \(N\) with N = 2",
         lambda: mixture(torch.ones(2, 4), torch.ones(3))),
        (VanishingGradientError, "bias_gradient is zero everywhere",
         lambda: recover_input(PAIR, ONE * 0)),
        (VanishingGradientError, "weight_gradient is zero everywhere",
         lambda: recover_direction(PAIR * 0)),
        (VanishingGradientError, "sum of output_gradients is zero",
         lambda: mixture(torch.ones(2, 3), torch.tensor([1.0, -1.0]))),
        (VanishingGradientError, "inputs is zero", lambda: noise_error(PAIR * 0, ONE, 0.1)),
        (VanishingGradientError, "leaves float64's range",
         lambda: recover_input(PAIR, ONE.double() * 1e-320)),
        *[(InvalidArgumentError, "penalty must be zero or positive",
           lambda v=v: recover_penalised_input(PAIR, ONE, PAIR, ONE, v))
          for v in (-1.0, math.nan, math.inf)],
        *[(InvalidArgumentError, "sigma must be zero or positive",
           lambda v=v: noise_error(PAIR, ONE, v)) for v in (-1.0, math.nan, math.inf)],
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    error: type[Exception], message: str, call: Callable[[], object]
) -> None:
    with pytest.raises(error, match=message):
        call()
