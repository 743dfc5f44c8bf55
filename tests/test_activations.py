"""Elementwise layers undone: the inverse is an inverse, and what cannot be known is masked."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradinv_edu.activations import INVERSES, is_elementwise, slope, undo, zero_level
from gradinv_edu.errors import InconsistentGradientError, UnsupportedLayerError


def _prelu() -> nn.Module:
    module = nn.PReLU(3).double()
    module.weight.data = torch.tensor([0.1, 0.25, 2.0], dtype=torch.float64)
    return module


INVERTIBLE = {
    "leaky": nn.LeakyReLU(0.2),
    "prelu": _prelu(),
    "elu": nn.ELU(0.7),
    "celu": nn.CELU(1.3),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(),
    "softplus, sharp": nn.Softplus(beta=3.0),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
}
ENTRIES = st.lists(st.floats(-6, 6), min_size=6, max_size=6)


def _picture(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 3, 2)


def _auto_slope(module: nn.Module, z: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(lambda t: module(t).sum(), z)


def test_every_inverse_is_tested() -> None:
    assert {type(m) for m in INVERTIBLE.values()} == set(INVERSES)


@pytest.mark.parametrize("name", INVERTIBLE)
@settings(max_examples=60)
@given(values=ENTRIES)
def test_the_inverse_is_an_inverse(name: str, values: list[float]) -> None:
    module, z = INVERTIBLE[name], _picture(values)
    with torch.no_grad():
        a = module(z)
    undone = undo(module, name, a, 1e-15)
    assert bool(undone.known.all())
    # one rounding of a, carried back through the inverse's own slope
    reach = 4e-16 * (1 + a.abs()) / _auto_slope(module, z)
    assert bool(((undone.inputs - z).abs() <= 1e-14 * (1 + z.abs()) + 4 * reach).all())


@pytest.mark.parametrize("name", INVERTIBLE)
@settings(max_examples=30)
@given(values=ENTRIES)
def test_the_slope_is_the_one_that_autograd_finds(name: str, values: list[float]) -> None:
    module, z = INVERTIBLE[name], _picture(values)
    expected = _auto_slope(module, z)
    assert torch.equal(slope(module, z), expected)
    with torch.no_grad():
        undone = undo(module, name, module(z), 1e-15)
    away = z.abs() > 1e-6  # on a kink either side's slope will do
    torch.testing.assert_close(undone.slope[away], expected[away], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_a_slope_against_finite_differences(name: str) -> None:
    module, h = INVERTIBLE[name], 1e-6
    z = torch.tensor([-3.0, -1.0, -0.2, 0.2, 1.0, 3.0], dtype=torch.float64).reshape(1, 3, 2)
    with torch.no_grad():
        difference = (module(z + h) - module(z - h)) / (2 * h)
    # torch's own CELU derivative takes 1/alpha in float32, whatever the input's type
    loose = 1e-7 if name == "celu" else 1e-9
    torch.testing.assert_close(slope(module, z), difference, rtol=loose, atol=loose)


# --- what cannot be known ----------------------------------------------------------------------


@given(values=ENTRIES)
def test_a_relu_tells_its_positive_entries_and_masks_the_rest(values: list[float]) -> None:
    z = _picture(values)
    z[0, 0, 0] = 3.0
    z = torch.where(z.abs() < 1e-3, 0.0, z)
    undone = undo(nn.ReLU(), "relu", z.clamp(min=0), 1e-15)
    assert torch.equal(undone.known, z > 0)
    assert torch.equal(undone.inputs, z.clamp(min=0))
    assert torch.equal(undone.slope, (z > 0).double())


def test_a_relu_s_zeros_are_told_from_small_values_by_the_gap_between_them() -> None:
    g = torch.Generator().manual_seed(0)
    noise = 1e-13 * torch.randn(200, generator=g, dtype=torch.float64)
    values = torch.rand(300, generator=g, dtype=torch.float64) + 1e-6
    a = torch.cat([noise, values]).reshape(1, -1)
    undone = undo(nn.ReLU(), "relu", a, 1e-13)
    assert int(undone.known.sum()) == 300 and bool(undone.known[0, 200:].all())
    assert 1e-13 < zero_level(a, 1e-13) < 1e-6


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_dropout_in_train_mode_is_undone_by_its_zeros(p: float) -> None:
    module = nn.Dropout(p).train()
    z = torch.randn(1, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keep = torch.rand(1, 400, generator=torch.Generator().manual_seed(2)) > p
    undone = undo(module, "dropout", keep * z / (1 - p), 1e-15)
    assert torch.equal(undone.known, keep)
    torch.testing.assert_close(undone.inputs, keep * z)
    torch.testing.assert_close(undone.slope, keep.double() / (1 - p))


@pytest.mark.parametrize("module", [nn.Dropout(0.5).eval(), nn.Dropout(0.0).train()])
def test_a_dropout_that_drops_nothing_hides_nothing(module: nn.Module) -> None:
    a = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64)
    undone = undo(module, "dropout", a, 1e-15)
    assert torch.equal(undone.inputs, a) and bool(undone.known.all())
    assert torch.equal(undone.slope, torch.ones_like(a))


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Tanh(), nn.ELU(), nn.Softplus()])
def test_a_saturated_entry_is_unknown_not_infinite(module: nn.Module) -> None:
    z = torch.tensor([[1e4, -1e4, 0.3]], dtype=torch.float64)
    undone = undo(module, "act", module(z), 1e-15)
    assert bool(torch.isfinite(undone.inputs).all())
    assert bool(torch.isfinite(undone.slope).all())
    assert undone.known.tolist()[0][1:] == [False, True]
    assert undone.slope[0, 1] == 0


@pytest.mark.parametrize(
    ("module", "a", "bounds"),
    [
        (nn.Sigmoid(), [0.5, 1.2], r"range \[0.0, 1.0\]"),
        (nn.Sigmoid(), [0.5, -0.1], r"range \[0.0, 1.0\]"),
        (nn.Tanh(), [0.5, -1.5], r"range \[-1.0, 1.0\]"),
        (nn.ELU(0.5), [3.0, -0.6], r"range \[-0.5, inf\]"),
        (nn.CELU(0.5), [3.0, -0.6], r"range \[-0.5, inf\]"),
        (nn.SELU(), [3.0, -1.8], "outside its range"),
        (nn.Softplus(), [3.0, -0.1], r"range \[0.0, inf\]"),
        (nn.ReLU(), [3.0, -0.1], r"range \[0.0, inf\]"),
    ],
)
def test_an_output_out_of_range_has_no_input(
    module: nn.Module, a: list[float], bounds: str
) -> None:
    outputs = torch.tensor([a], dtype=torch.float64)
    with pytest.raises(InconsistentGradientError, match=r"output found for features\.1 lies 0"):
        undo(module, "features.1", outputs, 1e-15)
    with pytest.raises(InconsistentGradientError, match=bounds):
        undo(module, "features.1", outputs, 1e-15)


def test_rounding_beyond_the_end_of_a_range_is_no_contradiction() -> None:
    a = torch.tensor([[0.5, 1.0 + 1e-12]], dtype=torch.float64)
    assert undo(nn.Sigmoid(), "s", a, 1e-13).known.tolist() == [[True, False]]


@pytest.mark.parametrize("module", [nn.MaxPool2d(2), nn.Softmax(1), nn.Hardtanh(), nn.GELU()])
def test_what_has_no_inverse_is_refused_by_name(module: nn.Module) -> None:
    assert not is_elementwise(module)
    with pytest.raises(UnsupportedLayerError, match=rf"body\.2 \({type(module).__name__}\)"):
        undo(module, "body.2", torch.ones(1, 2, 4, 4, dtype=torch.float64), 1e-15)


# --- batch norm --------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_in_eval_mode_is_undone(affine: bool) -> None:
    module = nn.BatchNorm2d(3, affine=affine).double().eval()
    g = torch.Generator().manual_seed(0)
    module.running_mean = torch.randn(3, generator=g, dtype=torch.float64)
    module.running_var = torch.rand(3, generator=g, dtype=torch.float64) + 0.1
    if affine:
        module.weight.data = torch.randn(3, generator=g, dtype=torch.float64)
        module.bias.data = torch.randn(3, generator=g, dtype=torch.float64)
    z = torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64)
    undone = undo(module, "norm", module(z).detach(), 1e-15)
    torch.testing.assert_close(undone.inputs, z)
    torch.testing.assert_close(undone.slope, _auto_slope(module, z))
    assert bool(undone.known.all())


def test_a_batch_norm_s_closed_channel_is_unknown() -> None:
    module = nn.BatchNorm1d(2).double().eval()
    module.weight.data = torch.tensor([0.0, 2.0], dtype=torch.float64)
    undone = undo(module, "norm", torch.ones(1, 2, dtype=torch.float64), 1e-15)
    assert undone.known.tolist() == [[False, True]]
    assert undone.slope[0, 0] == 0 and undone.inputs[0, 0] == 0


@pytest.mark.parametrize(
    "module", [nn.BatchNorm2d(3).train(), nn.BatchNorm2d(3, track_running_stats=False).eval()]
)
def test_a_batch_norm_that_uses_its_batch_is_refused(module: nn.Module) -> None:
    with pytest.raises(UnsupportedLayerError, match="norm1 is a batch norm in train mode"):
        undo(module, "norm1", torch.ones(1, 3, 2, 2, dtype=torch.float64), 1e-15)


@pytest.mark.parametrize(
    "module", [*INVERTIBLE.values(), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(3)]
)
def test_layers_are_told_apart_and_left_alone(module: nn.Module) -> None:
    assert is_elementwise(module)
    module = copy.deepcopy(module).double().eval()
    before = copy.deepcopy(module.state_dict())
    a = torch.full((1, 3, 2), 0.4, dtype=torch.float64)
    undo(module, "layer", a, 1e-15)
    assert bool((a == 0.4).all()) and not module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
