"""A convolution as a dense layer: the matrix, the summed gradient, and the shortcut's answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradinv_edu.convolution import (
    as_dense,
    patches,
    recover_input_as_dense,
    signed_mean_patch,
    weight_gradient,
)
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    UnknownNameError,
    UnsupportedLayerError,
    VanishingGradientError,
)
from gradinv_edu.kit.data import photo

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")

MODULES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
close = torch.testing.assert_close


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Any, tuple[int, ...]]:
    axes = draw(st.sampled_from([1, 2, 2, 3]))
    few = st.tuples(*[st.integers(1, 3)] * axes)
    padding = draw(st.one_of(st.tuples(*[st.integers(0, 2)] * axes), st.sampled_from(["valid"])))
    stride = draw(few)
    if draw(st.integers(0, 3)) == 0:
        padding, stride = "same", (1,) * axes
    groups = draw(st.integers(1, 2))
    conv = MODULES[axes](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        draw(few),
        stride=stride,
        padding=padding,
        dilation=draw(st.tuples(*[st.integers(1, 2)] * axes)),
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
        dtype=torch.float64,
    )
    return conv, (conv.in_channels, *draw(st.tuples(*[st.integers(5, 6)] * axes)))


def _sent(conv: Any, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output gradient of a made-up loss, and the gradients that autograd finds with it."""
    z = conv(x)
    k = _random(*z.shape, seed=7) if k is None else k
    (G,) = torch.autograd.grad(z, conv.weight, k)
    return k, G, k.flatten(2).sum(dim=(0, 2))


def _shortcut(conv: Any, x: Tensor, reading: str = "filters") -> Tensor:
    _, G, b = _sent(conv, x)
    return recover_input_as_dense(conv, G, b, tuple(x.shape[1:]), reading)


# --- laws of every layer -----------------------------------------------------------------------


@settings(max_examples=80)
@given(layers(), st.integers(1, 3))
def test_matrix_patches_and_gradient_are_the_layer_s(
    case: tuple[Any, tuple[int, ...]], samples: int
) -> None:
    conv, shape = case
    x = _random(samples, *shape)
    bias = 0 if conv.bias is None else conv.bias.reshape(1, -1, *[1] * (len(shape) - 1))
    linear = (conv(x) - bias).detach()
    T = as_dense(conv, shape)
    assert T.dtype == torch.float64 and not T.requires_grad
    close(x.flatten(1) @ T.T, linear.flatten(1))

    seen = patches(conv, x).unflatten(2, (conv.groups, -1))
    filters = conv.weight.detach().reshape(conv.groups, -1, seen.shape[-1])
    close(torch.einsum("npgj,gfj->ngfp", seen, filters).flatten(1, 2), linear.flatten(2))

    k, G, b = _sent(conv, x)
    close(weight_gradient(conv, x, k), G)
    ratio = G / b.reshape(-1, *[1] * (G.dim() - 1))
    close(signed_mean_patch(conv, x, k), ratio, rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(layers())
def test_the_unrolled_reading_is_the_dense_formula_on_the_scattered_gradient(
    case: tuple[Any, tuple[int, ...]],
) -> None:
    conv, shape = case
    if conv.groups > 1:
        return  # groups are dense layers of their own, each with its own denominator
    k, G, b = _sent(conv, _random(1, *shape))
    answer = recover_input_as_dense(conv, G, b, shape, "unrolled")
    conv.weight.data = G
    matrix, repeated = as_dense(conv, shape), b.repeat_interleave(k[0, 0].numel())
    close(answer.flatten(), matrix.T @ repeated / repeated.square().sum())


def test_patches_agree_with_torchs_own_unfold_and_a_groups_is_a_layer_of_its_own() -> None:
    conv = nn.Conv2d(3, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    x = _random(2, 3, 9, 8)
    theirs = nn.functional.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))
    assert torch.equal(patches(conv, x), theirs.transpose(1, 2))
    whole, half = (nn.Conv2d(2 * n, 3 * n, 3, groups=n, dtype=torch.float64) for n in (2, 1))
    _, G, b = _sent(whole, _random(1, 4, 6, 6))
    first = recover_input_as_dense(half, G[:3], b[:3], (2, 6, 6))
    close(recover_input_as_dense(whole, G, b, (4, 6, 6))[:2], first)


# --- where the shortcut is right, and where it is not --------------------------------------------


@pytest.mark.parametrize("reading", ["filters", "unrolled"])
def test_exact_where_the_kernel_is_as_large_as_the_picture(reading: str) -> None:
    x = _random(1, 3, 6, 5)
    close(_shortcut(nn.Conv2d(3, 4, (6, 5), dtype=torch.float64), x, reading), x[0])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_exact_where_the_input_is_constant(axes: int) -> None:
    x = torch.full((1, 2, *[7] * axes), 0.3, dtype=torch.float64)
    x[:, 1] = 0.8
    close(_shortcut(MODULES[axes](2, 4, 3, dtype=torch.float64), x), x[0])


def test_elsewhere_it_is_wrong_and_the_ratio_is_the_signed_mean_patch_to_rounding() -> None:
    x, conv = photo("cat", size=24, dtype=torch.float64), nn.Conv2d(3, 4, 5, padding=2).double()
    assert float((_shortcut(conv, x) - x[0]).norm() / x.norm()) > 0.2
    k, G, b = _sent(conv, x)
    mean = signed_mean_patch(conv, x, k)
    assert float((G / b[:, None, None, None] - mean).norm() / mean.norm()) < 1e-12


def test_one_active_position_gives_its_patch_exactly() -> None:
    conv, x = nn.Conv2d(3, 4, 3, dtype=torch.float64), _random(1, 3, 8, 8)
    k, places = torch.zeros(1, 4, 6, 6, dtype=torch.float64), [(0, 1), (2, 2), (5, 0), (3, 4)]
    for f, (i, j) in enumerate(places):
        k[0, f, i, j] = 1.5 - f
    _, G, b = _sent(conv, x, k)
    for f, (i, j) in enumerate(places):
        close(G[f] / b[f], x[0, :, i : i + 3, j : j + 3])


def test_pixels_that_no_patch_reaches_stay_zero() -> None:
    x = torch.ones(1, 1, 7, 7, dtype=torch.float64)
    answer = _shortcut(nn.Conv2d(1, 2, 2, stride=3, dtype=torch.float64), x)
    assert bool((answer[0, 2] == 0).all())
    close(answer[0, :2, :2], x[0, 0, :2, :2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_is_taken_and_the_layer_left_as_it_was(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(1, 2, 2).to(dtype)
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    G, b = torch.ones(2, 1, 2, 2, dtype=dtype), torch.ones(2, dtype=dtype)
    answer = recover_input_as_dense(conv, G, b, (1, 4, 4))
    assert answer.dtype == torch.float64 and bool((answer == 1).all())
    assert as_dense(conv, (1, 4, 4)).dtype == torch.float64
    assert conv.weight.dtype == dtype and conv.weight.grad is None
    assert all(torch.equal(conv.state_dict()[name], before[name]) for name in before)


def test_a_filter_whose_gradient_sums_to_zero_has_no_mean() -> None:
    conv, x = nn.Conv1d(1, 2, 2), _random(1, 1, 3)
    mean = signed_mean_patch(conv, x, torch.tensor([[[1.0, -1.0], [1.0, 0.0]]]))
    assert bool(mean[0].isnan().all()) and bool(mean[1].isfinite().all())


# --- what is refused ---------------------------------------------------------------------------

CONV, G, B, X = nn.Conv2d(1, 2, 3), torch.ones(2, 1, 3, 3), torch.ones(2), torch.ones(1, 1, 5, 5)
THREE, SHAPE = nn.Conv2d(3, 2, 3), (1, 5, 5)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (InvalidTensorError, r"802816 × 150528: 966\.8 GB .*LayerSystem",
         lambda: as_dense(nn.Conv2d(3, 64, 7, stride=2, padding=3), (3, 224, 224))),
        *[(UnsupportedLayerError, f"{type(wrong).__name__} is not a conv",
           lambda wrong=wrong: as_dense(wrong, (1, 4, 4)))
          for wrong in (nn.Linear(3, 3), nn.ConvTranspose2d(1, 1, 2))],
        *[(InvalidTensorError, r"expected \(3, any, any\)", lambda s=s: as_dense(THREE, s))
          for s in [(1, 8, 8), (3, 8), (3, 8, 8, 8)]],
        *[(InvalidArgumentError, "input_shape is the shape of one", lambda s=s: as_dense(CONV, s))
          for s in [(1, 0, 8), (1, -1, -1), (1, 2.0, 8)]],
        (InvalidTensorError, r"input of shape \(1, 4, 4\) does not fit Conv2d.*is 4 but size is 5",
         lambda: as_dense(nn.Conv2d(1, 1, (1, 3), dilation=2), (1, 4, 4))),
        (InvalidTensorError, r"weight_gradient .*expected \(2, 1, 3, 3\)",
         lambda: recover_input_as_dense(CONV, G[:1], B, SHAPE)),
        (InvalidTensorError, r"bias_gradient .*expected \(2,\)",
         lambda: recover_input_as_dense(CONV, G, B[:1], SHAPE)),
        (InvalidTensorError, "NaN or infinite",
         lambda: recover_input_as_dense(CONV, G / 0, B, SHAPE)),
        (InvalidTensorError, r"output_gradient .*expected \(1, 2, 3, 3\)",
         lambda: weight_gradient(CONV, X, torch.ones(1, 2, 4, 4))),
        (InvalidTensorError, "int64", lambda: patches(CONV, X.long())),
        (VanishingGradientError, "output_gradient is zero everywhere",
         lambda: signed_mean_patch(CONV, X, torch.zeros(1, 2, 3, 3))),
        (VanishingGradientError, "bias_gradient is zero everywhere",
         lambda: recover_input_as_dense(CONV, G, B * 0, SHAPE)),
        (UnknownNameError, '"filters" or "unrolled"',
         lambda: recover_input_as_dense(CONV, G, B, SHAPE, "stacked")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    error: type[Exception], message: str, call: Callable[[], object]
) -> None:
    with pytest.raises(error, match=message):
        call()
