"""Which of two inputs an activation had: settled where the equations tell, else told."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import distance, normal
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.engine import preimages
from gradinv_edu.systems import LayerSystem

LOSS, LABEL = nn.CrossEntropyLoss(), torch.tensor([3])
KINDS = [nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, lambda: nn.GELU(approximate="tanh")]


def network(activation: nn.Module, gain: float = 1.0, width: int = 12) -> nn.Module:
    """Three convolutions with a norm in eval mode, in float64; ``gain`` mixes the sides."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            copy.deepcopy(activation),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width).eval(),
            copy.deepcopy(activation),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            copy.deepcopy(activation),
            nn.Flatten(),
            nn.Linear(2 * width * 9, 10),
        ).double()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(gain)
    return model


def picture(size: int = 6, seed: int = 0) -> Tensor:
    return normal((1, 2, size, size), seed).sigmoid()


@pytest.mark.parametrize(("kind", "gain"), [(kind, 3.0) for kind in KINDS] + [(nn.GELU, 1.0)])
def test_a_network_of_two_sided_activations_is_recovered(kind: type, gain: float) -> None:
    model, x = network(kind(), gain), picture()
    update = gi.observe(model, LOSS, x, LABEL)
    found = gi.recover(model, update, (2, 6, 6), LOSS)
    assert found.exact and distance(found.inputs, x) < 1e-8
    assert not any(layer.unsettled for layer in found.layers)
    assert gi.audit(model, (2, 6, 6), inputs=x, jacobian=False).exact


def test_batches_and_a_dense_layer_without_bias_are_settled() -> None:
    model, x = network(nn.SiLU(), 2.0), torch.cat([picture(seed=1), picture(seed=2)])
    update = gi.observe(model, LOSS, x, torch.tensor([3, 5]))
    found = gi.recover(model, update, (2, 6, 6), LOSS, batch_size=2)
    assert found.exact and distance(found.inputs, x) < 1e-8
    dense = nn.Sequential(nn.Linear(6, 9, bias=False), nn.GELU(), nn.Linear(9, 4, bias=False))
    update = gi.observe(dense.double(), LOSS, x[0, 0, :1, :6], LABEL)
    found = gi.recover(dense, update, (6,), LOSS)
    assert found.exact and distance(found.inputs, x[0, 0, :1, :6]) < 1e-12


def layer(
    conv: nn.Conv2d, x: Tensor, k: Tensor
) -> tuple[LayerSystem, preimages.Doubt, Tensor, Tensor]:
    """A convolution under SiLU, what is known above it, and its true outputs and gradient."""
    from gradinv_edu.engine.layers import rule_of

    rule = rule_of(nn.SiLU())
    z = conv(x).detach()
    (slope,) = torch.autograd.grad(nn.functional.silu(z.requires_grad_()).sum(), z)
    z, both = z.detach(), rule.undo(rule.forward(z.detach()), "silu", 1e-15)
    assert both.other is not None
    sides = [preimages.Sides(u.inputs, k * u.slope, u.known.double()) for u in (both, both.other)]
    doubt = preimages.Doubt(*sides, both.slope != both.other.slope)
    (gradient,) = torch.autograd.grad(conv(x), conv.weight, k * slope)
    return LayerSystem(conv, k * slope, tuple(x.shape[1:])), doubt, z, gradient


@pytest.mark.parametrize("filters", [4, 8])
def test_cross_validation_settles_what_plain_alternation_does_not(filters: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        conv = nn.Conv2d(4, filters, 3, padding=1).double()
    conv.weight.data.mul_(16)
    x = normal((1, 4, 8, 8), 5).sigmoid()
    _, doubt, z, gradient = layer(conv, x, normal((1, filters, 8, 8), 6))
    sides, unsure = preimages.settle(conv, (4, 8, 8), gradient, doubt)
    other = doubt.nearer(z)
    assert 0.1 < float(other[doubt.units].double().mean()) < 0.9  # no side is rare
    torch.testing.assert_close(sides.value, z, rtol=1e-6, atol=1e-6)
    assert not unsure
    way = preimages._Settling(conv, (4, 8, 8), gradient, doubt)
    side, holds = way.alternate(way.prior > 0, preimages.PLAIN, careful=False)
    assert holds == torch.equal(side, other) and holds == (filters == 8)
    p, apart = way.cross_validate(torch.Generator().manual_seed(0)), way.gap.abs() > 0.5
    assert torch.equal((p > 0.5)[apart], other[apart])  # by itself, but for close sides
    assert not torch.equal((way.prior > 0)[apart], other[apart])


@pytest.mark.parametrize("dense", [10**6, 0])
def test_a_row_is_confirmed_where_another_says_the_same(
    dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preimages, "DENSE", dense)
    up = nn.Upsample(size=(3, 2)).double()  # of three rows, the first two are one
    system = LayerSystem(up, torch.ones(1, 1, 3, 2, dtype=torch.float64), (1, 2, 2))
    units = torch.ones(1, 1, 3, 2, dtype=torch.bool)
    found = preimages.confirmed(system, units)
    assert found[0, 0].tolist() == [[True, True], [True, True], [False, False]]
    units[0, 0, 1] = False
    assert preimages.confirmed(system, units)[0, 0].tolist()[2] == [False, False]
    with_mask = LayerSystem(up, system.k, (1, 2, 2), (~units).double())
    assert not preimages.confirmed(with_mask, units).any()  # and without spare equations none


def test_units_that_nothing_confirms_are_told_by_number_and_the_answer_is_not_exact() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Upsample(scale_factor=1), nn.SiLU()]
        model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(8 * 36, 5)).double()
    x = picture(6)
    update = gi.observe(model, LOSS, x, LABEL)
    found = gi.recover(model, update, (2, 6, 6), LOSS)
    units = int((model[:3](x) < 0).sum())
    told = next(layer for layer in found.layers if layer.name == "2")
    assert not found.exact and told.unsettled == units
    assert f"{units} units with two inputs unsettled" in str(found)
    seen = gi.audit(model, (2, 6, 6), inputs=x, jacobian=False)
    assert not seen.exact and f"{units} units above may have either of two inputs" in str(seen)
