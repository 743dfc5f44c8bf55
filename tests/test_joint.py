"""Layers solved together: exact where one alone lacks equations, and silent where all lack them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradinv_edu as gi
from gradinv_edu import joint
from gradinv_edu.krylov import Rows
from gradinv_edu.systems import LayerSystem, ScaledSystem

CE = nn.CrossEntropyLoss()


def deficient_net(filters: int, activation: nn.Module) -> nn.Module:
    """Like R-GAP's CNN6-d, small: layer 2 has too few filters, layer 1 spare equations."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 12, 4, 2, 2, bias=False), activation,
            nn.Conv2d(12, filters, 3, 2, 1, bias=False), activation,
            nn.Flatten(), nn.Linear(filters * 25, 10, bias=False),
        ).double()  # fmt: skip


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.Tanh(), nn.ELU()])
@pytest.mark.parametrize("photo", ["astronaut", "coffee"])
def test_a_deficient_layer_falls_with_the_one_below(activation: nn.Module, photo: str) -> None:
    model = deficient_net(9, activation)
    x = gi.data.photo(photo, 16, dtype=torch.float64)
    update = gi.observe(model, CE, x, torch.tensor([3]))
    found = gi.recover(model, update, (3, 16, 16), CE)
    assert found.layers[-1].name == "0+2"
    assert found.exact and gi.metrics.psnr(found.inputs, x) > 150


def test_where_the_floors_below_have_no_equations_to_spare() -> None:
    model = deficient_net(3, nn.LeakyReLU(0.2))
    x = gi.data.photo("cat", 16, dtype=torch.float64)
    update = gi.observe(model, CE, x, torch.tensor([3]))
    found = gi.recover(model, update, (3, 16, 16), CE)
    assert not found.exact
    assert any(not layer.full_rank for layer in found.layers)


def test_counting_what_is_spare() -> None:
    conv = nn.Conv2d(1, 3, 3, padding=1).double()
    floor = joint.Floor("conv", conv, (1, 5, 5), [nn.Tanh()])
    assert joint.spare_equations([floor], 10) == 3 * 25 - 25 - 10


def test_floor_matrix_is_the_convolution() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    floor = joint.Floor("conv", conv, (2, 4, 4))
    x = torch.randn(1, 2, 4, 4).double()
    through = floor.matrix(x) @ x.flatten() + floor.offset(x).flatten()
    assert torch.allclose(through, conv(x).flatten(), atol=1e-12)


def test_floor_undoes_what_it_activates() -> None:
    conv = nn.Conv2d(1, 2, 3).double()
    floor = joint.Floor("conv", conv, (1, 6, 6), [nn.LeakyReLU(0.2), nn.Flatten()])
    z = torch.randn(1, 2, 4, 4).double()
    a, slope = floor.activate(z)
    assert torch.allclose(floor.undo(a.unsqueeze(0)), z, atol=1e-12)
    assert torch.allclose(slope, 0.2 + 0.8 * (z > 0).double().flatten(), atol=1e-15)


# --- without a matrix --------------------------------------------------------------------------


def roomy_net(activation: nn.Module) -> nn.Module:
    """The floor has a third more equations than unknowns; layer 2 has too few."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 2, bias=False), activation,
            nn.Conv2d(16, 9, 3, 2, 1, bias=False), activation,
            nn.Flatten(), nn.Linear(9 * 25, 10, bias=False),
        ).double()  # fmt: skip


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.Tanh()])
def test_matrix_free_and_dense_agree(
    activation: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = roomy_net(activation)
    x = gi.data.photo("astronaut", 16, dtype=torch.float64)
    update = gi.observe(model, CE, x, torch.tensor([3]))
    written = gi.recover(model, update, (3, 16, 16), CE)
    monkeypatch.setattr(joint, "DENSE", 0)
    free = gi.recover(model, update, (3, 16, 16), CE)
    for found in (written, free):
        assert found.layers[-1].name == "0+2"
        assert found.exact and gi.metrics.psnr(found.inputs, x) > 150


def test_matrix_free_is_as_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "DENSE", 0)
    monkeypatch.setattr(joint, "STEPS", 500)
    model = deficient_net(7, nn.Tanh())
    x = gi.data.photo("cat", 16, dtype=torch.float64)
    update = gi.observe(model, CE, x, torch.tensor([3]))
    assert not gi.recover(model, update, (3, 16, 16), CE).exact


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_stack_and_its_adjoint(dtype: torch.dtype, error: float) -> None:
    model = deficient_net(5, nn.Tanh())
    floor = joint.Floor("0", model[0], (3, 16, 16), [model[1]])
    k = torch.randn(1, 5, 5, 5).double()
    top = LayerSystem(model[2], k, (12, 9, 9))
    slope, kept = torch.rand(12 * 81).double(), torch.rand(12 * 81).round().double()
    link = joint._Link(floor, slope, kept).to(dtype)
    stack = joint._Stack([link], ScaledSystem(top, dtype), (12, 9, 9), dtype)
    v = torch.randn(768 + 972).to(dtype)
    rows = stack.forward(v)
    r = Rows(torch.randn_like(rows.z), torch.randn_like(rows.g))
    assert float(rows.flat() @ r.flat()) == pytest.approx(float(v @ stack.adjoint(r)), rel=error)
