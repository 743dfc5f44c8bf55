"""Figures against other libraries', and against what is known without any."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradinv_edu.errors import InvalidArgumentError, InvalidTensorError
from gradinv_edu.kit import data, metrics


def _noisy(picture: Tensor, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return picture + size * torch.randn(picture.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("noise", [1e-12, 1e-3, 0.1])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_psnr_is_scikit_image_s(noise: float, data_range: float) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    a = data.photo("cat", 32, torch.float64) * data_range
    b = _noisy(a, noise * data_range)
    wanted = peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=data_range)
    assert metrics.psnr(b, a, data_range) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_its_formula_s(data_range: float) -> None:
    a = data.photo("cat", 32, torch.float64)[0] * data_range
    b = _noisy(a, 0.05 * data_range)
    bell = torch.exp(-(torch.arange(-5.0, 6.0, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2

    def mean(p: torch.Tensor) -> torch.Tensor:  # over the window around each pixel
        padded = torch.nn.functional.pad(p[:, None], (5, 5, 5, 5), mode="reflect")
        return torch.nn.functional.conv2d(padded, window)

    mu_a, mu_b, c_1, c_2 = mean(a), mean(b), (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    likeness = (2 * mu_a * mu_b + c_1) * (2 * cov + c_2)
    likeness /= (mu_a**2 + mu_b**2 + c_1) * (var_a + var_b + c_2)
    assert metrics.ssim(b, a, data_range) == pytest.approx(float(likeness.mean()), abs=1e-9)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (2, 3, 5, 9), (3, 3), (1, 3, 16, 16)])
def test_ssim_takes_small_pictures_of_any_form(shape: tuple[int, ...]) -> None:
    a = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert metrics.ssim(a, 1 - a) < 0.2


@given(scale=st.floats(1e-12, 1e3), factor=st.floats(1e-6, 1e6))
def test_known_errors(scale: float, factor: float) -> None:
    b, zero = torch.arange(1.0, 7.0, dtype=torch.float64), torch.zeros(3, 3)
    found = metrics.relative_error(factor * b * (1 + scale), factor * b)
    assert found == pytest.approx(scale, rel=1e-3)
    assert metrics.psnr(b, b + scale) == pytest.approx(-20 * math.log10(scale), abs=0.01)
    assert metrics.psnr(zero, zero) == math.inf
    assert metrics.relative_error(zero, zero) == 0
    assert metrics.relative_error(zero + 1, zero) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pictures_are_compared_in_float64(dtype: torch.dtype) -> None:
    a = data.photo("cat", 16, torch.float64)
    error = metrics.relative_error(a.to(dtype), a)
    assert 0 < error < torch.finfo(dtype).eps
    assert metrics.psnr(a.to(dtype), a) > -20 * math.log10(torch.finfo(dtype).eps)


@given(trials=st.integers(1, 200), part=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
def test_wilson_s_interval_holds_the_rates_that_are_not_improbable(
    trials: int, part: float, confidence: float
) -> None:
    """Its ends are where the share stands as many standard deviations off as it may."""
    from scipy.stats import norm

    successes = round(part * trials)
    low, high = metrics.wilson_interval(successes, trials, confidence)
    share, q = successes / trials, norm.ppf((1 + confidence) / 2)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        off = q * math.sqrt(end * (1 - end) / trials)
        assert abs(share - end) == pytest.approx(off, abs=1e-7)


def test_a_rate_counts_and_reads_well() -> None:
    rate = metrics.success_rate(i < 57 for i in range(60))
    assert (rate.successes, rate.trials, rate.rate) == (57, 60, 0.95)
    assert str(rate) == "57/60 = 95% (86% to 98%)"
    # pictures of one network are not independent: as many as in three trials, not in sixty
    grouped = metrics.clustered_rate([[True] * 20, [True] * 20, [True] * 17 + [False] * 3])
    assert (grouped.successes, grouped.trials) == (57, 60)
    assert grouped.low < metrics.wilson_interval(2, 3)[1] and grouped.low < 0.5 < rate.low
    alone = metrics.clustered_rate([[True]] * 9)
    assert alone == metrics.success_rate([True] * 9)


A = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SMALL = torch.zeros(2, 9)
EVERY, RANGED = (metrics.psnr, metrics.ssim, metrics.relative_error), (metrics.psnr, metrics.ssim)


@pytest.mark.parametrize(
    ("error", "message", "call", "given_"),
    [
        *[
            (InvalidTensorError, message, metric, pair)
            for metric in EVERY
            for message, pair in {
                "a has shape .* compare like with like": (A, A[..., :8]),
                "b has 768 NaN or infinite entries": (A, A * torch.nan),
                "a has dtype": (A.to(torch.uint8), A),
            }.items()
        ],
        *[(InvalidArgumentError, "data_range must be positive", m, (A, A, -1.0)) for m in RANGED],
        (InvalidTensorError, "3 pixels a side or more", metrics.ssim, (SMALL, SMALL)),
        *[
            (InvalidArgumentError, "cannot be", metrics.wilson_interval, counts)
            for counts in [(0, 0), (-1, 5), (6, 5)]
        ],
        (InvalidArgumentError, "confidence must be between", metrics.wilson_interval, (1, 2, 1.0)),
        (InvalidArgumentError, "cannot be", metrics.success_rate, ([],)),
    ],
)
def test_what_cannot_be_compared_or_counted_is_refused(
    error: type[Exception], message: str, call: Any, given_: tuple[Any, ...]
) -> None:
    with pytest.raises(error, match=message):
        call(*given_)
