"""Layers solved together: exact where one alone lacks equations, and silent where all lack them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradinv_edu as gi
from gradinv_edu import joint

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
