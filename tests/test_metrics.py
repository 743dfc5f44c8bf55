"""Figures against other libraries', and against what is known without any."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradinv_edu import data, metrics
from gradinv_edu.errors import InvalidArgumentError, InvalidTensorError


def _noisy(picture: Tensor, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(picture.shape, generator=generator, dtype=torch.float64)
    return picture + size * noise


@pytest.mark.parametrize("noise", [1e-12, 1e-3, 0.1])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_psnr_is_other_libraries_psnr(noise: float, data_range: float) -> None:
    from skimage.metrics import peak_signal_noise_ratio as skimage_s
    from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_s

    a = data.photo("cat", 32, torch.float64) * data_range
    b = _noisy(a, noise * data_range)
    found = metrics.psnr(b, a, data_range)
    wanted = skimage_s(a.numpy(), b.numpy(), data_range=data_range)
    assert found == pytest.approx(wanted, abs=1e-9)
    assert found == pytest.approx(float(torchmetrics_s(b, a, data_range=data_range)), abs=1e-4)


@pytest.mark.parametrize("name", ["cat", "astronaut"])
def test_ssim_is_other_libraries_ssim(name: str) -> None:
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure

    a = data.photo(name, 48, torch.float64)
    b = _noisy(a, 0.05)
    # scikit-image leaves the border out, torchmetrics mirrors it
    mirrored = [np.pad(p[0].numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect") for p in (a, b)]
    wanted = structural_similarity(
        *mirrored, channel_axis=0, data_range=1.0, gaussian_weights=True,
        use_sample_covariance=False,
    )  # fmt: skip
    assert metrics.ssim(b, a) == pytest.approx(wanted, abs=1e-9)
    assert metrics.ssim(b, a) == float(structural_similarity_index_measure(b, a, data_range=1.0))


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(3, 3)
    assert metrics.psnr(a, a + 0.1) == pytest.approx(20, abs=1e-5)
    assert metrics.psnr(a, a) == math.inf


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (2, 3, 5, 9), (3, 3), (1, 3, 16, 16)])
def test_ssim_takes_small_pictures_of_any_form(shape: tuple[int, ...]) -> None:
    a = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert metrics.ssim(a, 1 - a) < 0.2


@given(scale=st.floats(1e-12, 1e3), factor=st.floats(1e-6, 1e6))
def test_relative_error_is_a_ratio(scale: float, factor: float) -> None:
    b = torch.arange(1.0, 7.0, dtype=torch.float64)
    found = metrics.relative_error(factor * b * (1 + scale), factor * b)
    assert found == pytest.approx(scale, rel=1e-3)


def test_relative_error_of_nothing() -> None:
    zero = torch.zeros(3)
    assert metrics.relative_error(zero, zero) == 0
    assert metrics.relative_error(zero + 1, zero) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pictures_are_compared_in_float64(dtype: torch.dtype) -> None:
    a = data.photo("cat", 16, torch.float64)
    error = metrics.relative_error(a.to(dtype), a)
    assert 0 < error < torch.finfo(dtype).eps
    assert metrics.psnr(a.to(dtype), a) > -20 * math.log10(torch.finfo(dtype).eps)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.relative_error])
def test_what_cannot_be_compared_is_refused(metric: object) -> None:
    a = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvalidTensorError, match=r"a has shape .* compare like with like"):
        metric(a, a[..., :8])  # type: ignore[operator]
    with pytest.raises(InvalidTensorError, match="b has 768 NaN or infinite entries"):
        metric(a, a * torch.nan)  # type: ignore[operator]
    with pytest.raises(InvalidTensorError, match="a has dtype"):
        metric(a.to(torch.uint8), a)  # type: ignore[operator]


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_impossible_ranges_are_refused(metric: object) -> None:
    a = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"data_range must be positive, got -1\.0"):
        metric(a, a, -1.0)  # type: ignore[operator]
    with pytest.raises(InvalidTensorError, match="3 pixels a side or more"):
        metrics.ssim(torch.zeros(2, 9), torch.zeros(2, 9))


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (7, 60), (30, 60), (60, 60), (1, 1)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_is_scipy_s(successes: int, trials: int, confidence: float) -> None:
    from scipy.stats import binomtest

    wanted = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    found = metrics.wilson_interval(successes, trials, confidence)
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_a_rate_counts_and_reads_well() -> None:
    rate = metrics.success_rate(i < 57 for i in range(60))
    assert (rate.successes, rate.trials, rate.rate) == (57, 60, 0.95)
    assert str(rate) == "57/60 = 95% (86% to 98%)"
    assert metrics.success_rate([True] * 60).low > 0.93
    assert metrics.success_rate([True] * 60).high == 1.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_counts_that_cannot_be_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be"):
        metrics.wilson_interval(successes, trials)
    with pytest.raises(InvalidArgumentError, match="confidence must lie"):
        metrics.wilson_interval(1, 2, 1.0)
