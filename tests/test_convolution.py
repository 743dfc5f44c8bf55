"""A convolution as a dense layer: the matrix, the summed gradient, and the shortcut's answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradinv_edu import convolution
from gradinv_edu.convolution import (
    as_dense,
    patches,
    recover_input_as_dense,
    signed_mean_patch,
    weight_gradient,
)
from gradinv_edu.data import photo
from gradinv_edu.errors import (
    InvalidTensorError,
    UnknownNameError,
    UnsupportedLayerError,
    VanishingGradientError,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")

MODULES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Any, tuple[int, ...]]:
    axes = draw(st.sampled_from([1, 2, 2, 3]))
    few = st.tuples(*[st.integers(1, 3)] * axes)
    kernel, dilation = draw(few), draw(st.tuples(*[st.integers(1, 2)] * axes))
    padding = draw(st.one_of(st.tuples(*[st.integers(0, 2)] * axes), st.sampled_from(["valid"])))
    stride = draw(few)
    if draw(st.integers(0, 3)) == 0:
        padding, stride = "same", (1,) * axes
    groups = draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    conv = MODULES[axes](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=draw(st.booleans()),
        dtype=torch.float64,
    )
    return conv, (conv.in_channels, *draw(st.tuples(*[st.integers(5, 6)] * axes)))


def _client(conv: Any, x: Tensor, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Output gradient of a made-up loss, and the gradients that autograd finds with it."""
    z = conv(x)
    k = _random(*z.shape, seed=seed)
    (G,) = torch.autograd.grad(z, conv.weight, k)
    return k, G, k.flatten(2).sum(dim=(0, 2))


@settings(max_examples=60)
@given(layers())
def test_the_matrix_is_the_layer(case: tuple[Any, tuple[int, ...]]) -> None:
    conv, shape = case
    x = _random(1, *shape)
    z = conv(x)
    bias = 0 if conv.bias is None else conv.bias.reshape(1, -1, *[1] * (z.dim() - 2))
    T = as_dense(conv, shape)
    assert T.shape == (z.numel(), x.numel()) and T.dtype == torch.float64
    torch.testing.assert_close(T @ x.flatten(), (z - bias).detach().flatten())


@settings(max_examples=60)
@given(layers(), st.integers(1, 3))
def test_the_gradient_is_the_sum_over_positions(
    case: tuple[Any, tuple[int, ...]], samples: int
) -> None:
    conv, shape = case
    x = _random(samples, *shape)
    k, G, b = _client(conv, x)
    torch.testing.assert_close(weight_gradient(conv, x, k), G)
    ratio = G / b.reshape(-1, *[1] * (G.dim() - 1))
    torch.testing.assert_close(signed_mean_patch(conv, x, k), ratio, rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(layers())
def test_every_output_is_the_filter_times_its_patch(case: tuple[Any, tuple[int, ...]]) -> None:
    conv, shape = case
    x = _random(2, *shape)
    seen = patches(conv, x).unflatten(2, (conv.groups, -1))
    filters = conv.weight.detach().reshape(conv.groups, -1, seen.shape[-1])
    z = torch.einsum("npgj,gfj->ngfp", seen, filters).flatten(1, 2)
    bias = 0 if conv.bias is None else conv.bias.detach()[None, :, None]
    torch.testing.assert_close(z + bias, conv(x).detach().flatten(2))


def test_patches_agree_with_torchs_own_unfold() -> None:
    conv = nn.Conv2d(3, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    x = _random(2, 3, 9, 8)
    theirs = nn.functional.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))
    assert torch.equal(patches(conv, x), theirs.transpose(1, 2))


def test_the_ratio_is_the_signed_mean_patch_to_rounding() -> None:
    x = photo("astronaut", size=24, dtype=torch.float64)
    conv = nn.Conv2d(3, 8, 5, padding=2, dtype=torch.float64)
    k, G, b = _client(conv, x)
    mean = signed_mean_patch(conv, x, k)
    ratio = G / b[:, None, None, None]
    assert float((ratio - mean).norm() / mean.norm()) < 1e-12


def test_chunks_do_not_change_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    whole = as_dense(conv, (2, 7, 6))
    monkeypatch.setattr(convolution, "CHUNK", 5 * whole.shape[0])
    assert torch.equal(as_dense(conv, (2, 7, 6)), whole)


def test_an_untied_dense_layer_does_give_the_picture() -> None:
    conv, x = nn.Conv2d(1, 2, 3, dtype=torch.float64), _random(1, 1, 6, 6)
    T = as_dense(conv, (1, 6, 6)).requires_grad_()
    k = _random(len(T))
    (untied,) = torch.autograd.grad(T @ x.flatten(), T, k)
    torch.testing.assert_close(untied[3] / k[3], x.flatten())


def _shortcut(conv: Any, x: Tensor, k: Tensor | None = None, reading: str = "filters") -> Tensor:
    z = conv(x)
    k = _random(*z.shape, seed=7) if k is None else k
    (G,) = torch.autograd.grad(z, conv.weight, k)
    return recover_input_as_dense(
        conv, G, k.flatten(2).sum(dim=(0, 2)), tuple(x.shape[1:]), reading
    )


@pytest.mark.parametrize("reading", ["filters", "unrolled"])
def test_exact_where_the_kernel_is_as_large_as_the_picture(reading: str) -> None:
    x = _random(1, 3, 6, 5)
    answer = _shortcut(nn.Conv2d(3, 4, (6, 5), dtype=torch.float64), x, reading=reading)
    torch.testing.assert_close(answer, x[0])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_exact_where_the_input_is_constant(axes: int) -> None:
    x = torch.full((1, 2, *[7] * axes), 0.3, dtype=torch.float64)
    x[:, 1] = 0.8
    answer = _shortcut(MODULES[axes](2, 4, 3, dtype=torch.float64), x)
    torch.testing.assert_close(answer, x[0])


def test_one_active_position_gives_its_patch_exactly() -> None:
    conv, x = nn.Conv2d(3, 4, 3, dtype=torch.float64), _random(1, 3, 8, 8)
    k = torch.zeros(1, 4, 6, 6, dtype=torch.float64)
    places = [(0, 1), (2, 2), (5, 0), (3, 4)]
    for f, (i, j) in enumerate(places):
        k[0, f, i, j] = 1.5 - f
    (G,) = torch.autograd.grad(conv(x), conv.weight, k)
    ratio = G / k.sum(dim=(0, 2, 3))[:, None, None, None]
    for f, (i, j) in enumerate(places):
        torch.testing.assert_close(ratio[f], x[0, :, i : i + 3, j : j + 3])


def test_elsewhere_it_is_wrong() -> None:
    x = photo("cat", size=24, dtype=torch.float64)
    answer = _shortcut(nn.Conv2d(3, 4, 5, padding=2, dtype=torch.float64), x)
    assert float((answer - x[0]).norm() / x.norm()) > 0.2


@settings(max_examples=30)
@given(layers())
def test_the_unrolled_reading_is_the_dense_formula_on_the_scattered_gradient(
    case: tuple[Any, tuple[int, ...]],
) -> None:
    conv, shape = case
    if conv.groups > 1:
        return  # groups are dense layers of their own, each with its own denominator
    k, G, b = _client(conv, _random(1, *shape))
    scattered = type(conv).__new__(type(conv))
    scattered.__dict__.update(conv.__dict__)
    scattered._parameters = {"weight": nn.Parameter(G), "bias": None}
    matrix = as_dense(scattered, shape)
    repeated = b.repeat_interleave(k[0, 0].numel())
    expected = matrix.T @ repeated / repeated.square().sum()
    answer = recover_input_as_dense(conv, G, b, shape, "unrolled")
    torch.testing.assert_close(answer.flatten(), expected)


def test_each_group_is_a_layer_of_its_own() -> None:
    x = _random(1, 4, 6, 6)
    whole = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    _, G, b = _client(whole, x)
    half = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    first = recover_input_as_dense(half, G[:3], b[:3], (2, 6, 6))
    assert torch.equal(recover_input_as_dense(whole, G, b, (4, 6, 6))[:2], first)


def test_pixels_that_no_patch_reaches_stay_zero() -> None:
    x = torch.ones(1, 1, 7, 7, dtype=torch.float64)
    answer = _shortcut(nn.Conv2d(1, 2, 2, stride=3, dtype=torch.float64), x)
    assert bool((answer[0, 2] == 0).all())
    torch.testing.assert_close(answer[0, :2, :2], x[0, 0, :2, :2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_is_taken_and_float64_returned(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(1, 2, 2).to(dtype)
    G, b = torch.ones(2, 1, 2, 2, dtype=dtype), torch.ones(2, dtype=dtype)
    answer = recover_input_as_dense(conv, G, b, (1, 4, 4))
    assert answer.dtype == torch.float64 and bool((answer == 1).all())
    assert as_dense(conv, (1, 4, 4)).dtype == torch.float64


def test_the_layer_is_left_as_it_was() -> None:
    conv = nn.Conv2d(1, 2, 3)
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    as_dense(conv, (1, 5, 5))
    assert all(torch.equal(conv.state_dict()[name], before[name]) for name in before)
    assert conv.weight.dtype == torch.float32 and conv.weight.grad is None


def test_a_filter_whose_gradient_sums_to_zero_has_no_mean() -> None:
    conv, x = nn.Conv1d(1, 2, 2), _random(1, 1, 3)
    k = torch.tensor([[[1.0, -1.0], [1.0, 0.0]]])
    mean = signed_mean_patch(conv, x, k)
    assert bool(mean[0].isnan().all()) and bool(mean[1].isfinite().all())
    with pytest.raises(VanishingGradientError, match="output_gradient is zero everywhere"):
        signed_mean_patch(conv, x, torch.zeros_like(k))


def test_a_matrix_too_large_is_refused_with_its_size() -> None:
    with pytest.raises(InvalidTensorError, match=r"802816 × 150528: 966\.8 GB .*LayerSystem"):
        as_dense(nn.Conv2d(3, 64, 7, stride=2, padding=3), (3, 224, 224))


def test_what_is_no_convolution_is_refused() -> None:
    for wrong in (nn.Linear(3, 3), nn.ConvTranspose2d(1, 1, 2)):
        with pytest.raises(UnsupportedLayerError, match=f"{type(wrong).__name__} is not a conv"):
            as_dense(wrong, (1, 4, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8), (3, 8, 8, 8)])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTensorError, match=r"expected \(3, any, any\)"):
        as_dense(nn.Conv2d(3, 2, 3), shape)


def test_a_kernel_larger_than_the_input_is_refused() -> None:
    with pytest.raises(InvalidTensorError, match=r"spans 5 places of axis 2"):
        as_dense(nn.Conv2d(1, 1, (1, 3), dilation=2), (1, 4, 4))


def test_gradients_that_do_not_fit_are_refused() -> None:
    conv = nn.Conv2d(1, 2, 3)
    G, b = torch.ones(2, 1, 3, 3), torch.ones(2)
    with pytest.raises(InvalidTensorError, match=r"weight_gradient .*expected \(2, 1, 3, 3\)"):
        recover_input_as_dense(conv, G[:1], b, (1, 5, 5))
    with pytest.raises(InvalidTensorError, match=r"bias_gradient .*expected \(2\)"):
        recover_input_as_dense(conv, G, b[:1], (1, 5, 5))
    with pytest.raises(InvalidTensorError, match="NaN or infinite"):
        recover_input_as_dense(conv, G / 0, b, (1, 5, 5))
    with pytest.raises(InvalidTensorError, match=r"output_gradient .*expected \(1, 2, 3, 3\)"):
        weight_gradient(conv, torch.ones(1, 1, 5, 5), torch.ones(1, 2, 4, 4))
    with pytest.raises(VanishingGradientError, match="bias_gradient is zero everywhere"):
        recover_input_as_dense(conv, G, torch.zeros(2), (1, 5, 5))
    with pytest.raises(UnknownNameError, match='"filters" or "unrolled"'):
        recover_input_as_dense(conv, G, b, (1, 5, 5), "stacked")
    with pytest.raises(InvalidTensorError, match="int64"):
        patches(conv, torch.ones(1, 1, 5, 5, dtype=torch.int64))
