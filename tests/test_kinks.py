"""Kinks: a unit put on the wrong side is named by the next layer's gradient, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import kinks
from gradinv_edu.errors import InvalidTensorError
from gradinv_edu.systems import LayerSystem

LOSS = nn.CrossEntropyLoss()
LABEL = torch.tensor([3])
SHAPE = (3, 32, 32)


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    options = {"bias": False, "dtype": torch.float64}
    return [
        (nn.Conv2d(2, 6, 3, padding=1, **options), (2, 6, 6)),
        (nn.Conv2d(2, 12, 4, 2, 1, **options), (2, 8, 8)),
        (nn.Conv1d(2, 5, 3, padding=1, **options), (2, 12)),
        (nn.Linear(6, 8, **options), (6,)),
    ]


def problem(which: int, seed: int) -> tuple[LayerSystem, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer below a leaky ReLU, one unit of it read wrong, and every unit in doubt."""
    module, shape = layers()[which]
    source = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.normal_(generator=source)
    x = torch.randn(1, *shape, generator=source, dtype=torch.float64)
    z = module(x).detach()
    above = torch.randn(z.shape, generator=source, dtype=torch.float64)
    slope = torch.where(z > 0, 1.0, 0.2)
    wrong = torch.zeros(z.shape, dtype=torch.bool)
    wrong.view(-1)[int(torch.randint(z.numel(), (1,), generator=source))] = True
    read = torch.where(wrong, torch.where(z > 0, 0.2, 1.0), slope)
    turn = (torch.where(read == 1, 0.2, 1.0) - read) * above
    g = LayerSystem(module, slope * above, shape).matvec(x)[1]
    return LayerSystem(module, read * above, shape), x, z, g, turn, wrong


@given(which=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_at_the_true_input_the_wrong_unit_matches_best(which: int, seed: int) -> None:
    system, x, _, g, turn, wrong = problem(which, seed)
    found = kinks.misread(system, x, g, turn)
    assert found[wrong].all()
    assert found.transpose(0, 1).flatten(1).sum(1).max() == 1  # of each filter one at most


@given(which=st.integers(0, 2), seed=st.integers(0, 10**6))
def test_the_residual_only_falls_and_the_right_turn_is_exact(which: int, seed: int) -> None:
    system, x, z, g, turn, wrong = problem(which, seed)
    first = system.solve(z, g)
    settled, solution, turned = kinks.settle(system, first, z, g, turn)
    assert turned == int((settled.k != system.k).sum())
    assert solution.residual <= first.residual
    if torch.equal(settled.k != system.k, wrong):
        assert gi.metrics.relative_error(solution.inputs, x) < 1e-7


def test_one_wrong_unit_is_put_right_nearly_always() -> None:
    right = 0
    for seed in range(40):
        system, _, z, g, turn, wrong = problem(1, seed)
        settled, _, _ = kinks.settle(system, system.solve(z, g), z, g, turn)
        right += torch.equal(settled.k != system.k, wrong)
    assert right >= 30


@given(seed=st.integers(0, 10**6))
def test_noise_turns_nothing(seed: int) -> None:
    system, x, z, _, turn, _ = problem(1, seed)
    source = torch.Generator().manual_seed(seed)
    g = system.matvec(x)[1]
    noisy = g + 1e-2 * g.std() * torch.randn(g.shape, generator=source, dtype=g.dtype)
    first = system.solve(z, noisy)
    same, solution, turned = kinks.settle(system, first, z, noisy, turn)
    assert same is system and solution is first and turned == 0


def test_only_units_near_a_kink_with_two_sides_can_turn() -> None:
    a, k = torch.tensor([[1e-4, -1e-4, 1.0, -1.0]]).double(), torch.ones(1, 4).double()
    leaky = kinks.turn(nn.LeakyReLU(0.2), a, k, 1e-3)
    assert torch.allclose(leaky, torch.tensor([[-0.8, 0.8, 0.0, 0.0]]).double())
    assert torch.allclose(kinks.turn(nn.PReLU(init=0.2).double(), a, k, 1e-3), leaky)
    for smooth in (nn.Tanh(), nn.ReLU(), nn.ELU()):
        assert not kinks.turn(smooth, a, k, 1e-3).any()


def test_a_grouped_layer_and_withheld_equations_are_left_as_they_are() -> None:
    k = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    grouped = nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False).double()
    plain = nn.Conv2d(2, 4, 3, padding=1, bias=False).double()
    for module, constraints in ((grouped, "both"), (plain, "weight")):
        system = LayerSystem(module, k, (2, 4, 4), constraints=constraints)
        z = torch.zeros_like(k)
        g = torch.ones(tuple(system.gradient_shape)).double()
        first = system.solve(z, g)
        same, solution, turned = kinks.settle(system, first, z, g, torch.ones_like(k))
        assert same is system and solution is first and turned == 0


@pytest.mark.parametrize("dtype, least, gain", [("float16", 55, 30), ("bfloat16", 25, 12)])
def test_a_photograph_from_half_precision(dtype: str, least: float, gain: float) -> None:
    photo = gi.data.photo("astronaut", 32, dtype=torch.float64)
    network = gi.models.cnn6(outputs=10, dtype=torch.float64)
    update = gi.observe(network, LOSS, photo, LABEL)
    coarse = {name: g.to(getattr(torch, dtype)) for name, g in update.gradients.items()}
    update = replace(update, gradients=coarse)
    settled = gi.recover(network, update, SHAPE, LOSS)
    naive = gi.recover(network, update, SHAPE, LOSS, settle=False)
    found, before = (gi.metrics.psnr(r.inputs, photo) for r in (settled, naive))
    assert found > least and found > before + gain
    assert sum(layer.turned for layer in settled.layers) > 0
    assert sum(layer.turned for layer in naive.layers) == 0
    assert not naive.exact and settled.exact == (dtype == "float16")


def test_where_no_side_is_in_doubt_nothing_changes() -> None:
    photo = gi.data.photo("cat", 32, dtype=torch.float64)
    network = gi.models.cnn6(outputs=10, dtype=torch.float64)
    update = gi.observe(network, LOSS, photo, LABEL)
    with_it, without = (
        gi.recover(network, update, SHAPE, LOSS, settle=settle) for settle in (True, False)
    )
    assert torch.equal(with_it.inputs, without.inputs)


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("wrong", ["shape", "nan"])
def test_what_does_not_belong_together_is_refused(place: int, wrong: str) -> None:
    system, x, _, g, turn, _ = problem(0, 0)
    given_: list[object] = [system, x, g, turn]
    tensor = given_[place]
    assert isinstance(tensor, Tensor)
    given_[place] = tensor[..., :-1] if wrong == "shape" else tensor * torch.nan
    with pytest.raises(InvalidTensorError, match=r"shape|finite|NaN"):
        kinks.misread(*given_)  # type: ignore[arg-type]
