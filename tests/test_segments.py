"""Several layers as one unknown: deficient layers, branches, kinks, and the polish of the whole."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Shape, distance, normal, seeded
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.engine import kinks, polish, segment
from gradinv_edu.engine.block import BlockSystem
from gradinv_edu.engine.block import solve as solve_block
from gradinv_edu.engine.graph import trace
from gradinv_edu.engine.layers import rule_of
from gradinv_edu.engine.layers.branches import Block
from gradinv_edu.engine.recovery import Recovering
from gradinv_edu.engine.solve import Solution
from gradinv_edu.errors import (
    InconsistentGradientError,
    InvalidArgumentError,
    InvalidTensorError,
    VanishingGradientError,
)
from gradinv_edu.systems import LayerSystem, ScaledSystem

CE, LABEL = nn.CrossEntropyLoss(), torch.tensor([3])


def photo(name: str, size: int) -> Tensor:
    return gi.data.photo(name, size, dtype=torch.float64)


def recovered(model: nn.Module, x: Tensor) -> gi.Recovery:
    return gi.recover(model, gi.observe(model, CE, x, LABEL), tuple(x.shape[1:]), CE)


def sides(z: Tensor) -> tuple[Tensor, Tensor]:
    """Slope of a leaky ReLU at ``z``, and that of its other side, in float64."""
    slope = torch.where(z > 0, torch.ones_like(z), torch.full_like(z, 0.2))
    return slope, 1.2 - slope


# --- a deficient layer with those below ---------------------------------------------------------


def deficient_net(filters: int, activation: nn.Module, below: int = 12) -> nn.Sequential:
    """Like R-GAP's CNN6-d, small: layer 2 has too few filters, layer 1 equations to spare."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, below, 4, 2, 2, bias=False), activation,
        nn.Conv2d(below, filters, 3, 2, 1, bias=False), activation,
        nn.Flatten(), nn.Linear(filters * 25, 10, bias=False),
    ).double()  # fmt: skip


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.Tanh(), nn.ELU()])
def test_a_deficient_layer_falls_with_the_one_below(activation: nn.Module) -> None:
    x = photo("coffee", 16)
    found = recovered(deficient_net(9, activation), x)
    assert found.layers[-1].name == "0+2" and found.exact
    assert gi.metrics.psnr(found.inputs, x) > 150


def test_the_walk_goes_on_below_layers_that_were_solved_together() -> None:
    torch.manual_seed(2)
    low = nn.Conv2d(1, 3, 3, padding=1, bias=False).double()
    model = nn.Sequential(low, nn.Tanh(), *deficient_net(9, nn.Tanh()))
    x = photo("coffee", 16).mean(1, keepdim=True)
    found = recovered(model, x)
    assert [layer.name for layer in found.layers] == ["7", "2+4", "0"]
    assert found.exact and distance(found.inputs, x) < 1e-7


def test_without_a_matrix_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deficient_net(9, nn.Tanh(), below=16), photo("astronaut", 16)
    written = recovered(model, x)
    monkeypatch.setattr(segment, "DENSE", 0)
    free = recovered(model, x)
    assert written.layers[-1].name == free.layers[-1].name == "0+2"
    assert written.exact and free.exact and distance(free.inputs, written.inputs) < 1e-7


def test_where_the_layers_below_do_not_make_up_for_it_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = recovered(deficient_net(3, nn.LeakyReLU(0.2)), photo("cat", 16))
    assert not found.exact and not all(layer.full_rank for layer in found.layers)
    monkeypatch.setattr(segment, "DENSE", 0)
    monkeypatch.setattr(segment, "STEPS", 500)
    assert not recovered(deficient_net(7, nn.Tanh()), photo("cat", 16)).exact


def test_a_walk_asks_only_layers_with_equations_to_spare() -> None:
    model = deficient_net(3, nn.Tanh(), below=2)  # the layer below lacks equations of its own
    walk = Recovering(trace(model, (3, 16, 16)), {}, torch.float64)
    system = LayerSystem(model[2], normal((1, 3, 5, 5), 0), (2, 9, 9))
    rows = system.right_hand_side(normal((1, 3, 5, 5), 1), None)
    assert walk.together(system, rows, 1, below=1, tolerance=1e-9) is None
    conv = nn.Conv2d(1, 3, 3, padding=1).double()
    floor = segment.Floor("conv", conv, normal((2, 1, 5, 5), 0), [rule_of(nn.Tanh())])
    assert segment.spare_equations([floor], 10) == 2 * (3 * 25 - 25) - 10


def test_the_floors_together_leave_out_a_share_of_the_spare_rows() -> None:
    for floors, spare, each in ((1, 12, 6), (3, 12, 2), (3, -4, 0)):
        own = SimpleNamespace(share=0.5, spare=spare, floors=[None] * floors)
        assert segment._Problem.dropped.fget(own) == each  # type: ignore[attr-defined]


def test_a_floor_is_its_matrix_and_undoes_what_it_activates() -> None:
    conv = seeded(nn.Conv2d(2, 3, 3, padding=1), 0)
    rules = [rule_of(m) for m in (nn.LeakyReLU(0.2), nn.Flatten())]
    floor, x = segment.Floor("conv", conv, normal((2, 2, 4, 4), 0), rules), normal((2, 2, 4, 4), 1)
    through = floor.weights.matrix() @ x.flatten() + floor.weights.offset.flatten()
    torch.testing.assert_close(through, conv(x).detach().flatten())
    rows, r = floor.weights.forward(x), segment.Rows(normal((2, 3, 4, 4), 2), x.new_zeros(0))
    assert float((rows.z * r.z).sum()) == pytest.approx(float((x * floor.weights.adjoint(r)).sum()))
    z = normal((2, 3, 4, 4), 3)
    a, slope = floor.activate(z)
    torch.testing.assert_close(floor.undo(a.reshape(2, -1)), z)
    assert torch.equal(slope, sides(z)[0].flatten())


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.LeakyReLU(0.2)])
@pytest.mark.parametrize("dense", [6144, 0])
def test_a_batch_is_solved_in_the_order_of_its_samples(
    activation: nn.Module, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "DENSE", dense)
    low, high = seeded(nn.Conv1d(1, 8, 3), 1), seeded(nn.Conv1d(8, 6, 3), 2)
    for layer in (low, high):
        layer.weight.data /= layer.weight.data.norm()
    x = normal((2, 1, 12), 3)
    with torch.no_grad():
        a = activation(low(x))
        z = high(a)
    system = LayerSystem(high, torch.ones_like(z), (8, 10))
    rows = system.without(gradient=True).right_hand_side(z, None)
    floor = segment.Floor("low", low, torch.zeros_like(x), [rule_of(activation)])
    missing = system.unknowns - z.numel()
    found = segment.solve([floor], ScaledSystem(system.without(gradient=True)), rows, missing)
    assert found.converged and found.solution.full_rank
    assert distance(found.inputs[0], x) < 1e-7 and distance(found.inputs[1], a) < 1e-7
    torch.testing.assert_close(found.outputs[0], low(x).detach(), rtol=1e-6, atol=1e-6)


# --- blocks of branches -------------------------------------------------------------------------


class Residual(nn.Module):
    """As in ResNet: two convolutions with a norm, and what they are added to."""

    def __init__(
        self, channels: int, hidden: int, act: nn.Module, out: int = 0, stride: int = 1
    ) -> None:
        super().__init__()
        out = out or channels
        self.one = nn.Conv2d(channels, hidden, 3, stride, 1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(hidden), act
        self.two = nn.Conv2d(hidden, out, 3, 1, 1, bias=False)
        alike = stride == 1 and out == channels
        self.short = nn.Identity() if alike else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.act(self.norm(self.one(x))))
        out += self.short(x)
        return out


class Joined(nn.Module):
    """Two ways of two convolutions, end to end, as in Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(self.one(x)), self.two(x)], 1)


def observed(
    module: nn.Module, x: Tensor, masked: bool = False
) -> tuple[BlockSystem, Tensor, dict[str, Tensor]]:
    """A block's equations, outputs and gradients, as the layers above hand them down."""
    (step,) = trace(module.eval(), tuple(x.shape[1:]))
    assert isinstance(step.module, Block)
    step.module.requires_grad_(True)
    s = step.module(x)
    mask = (s > 0).to(s) if masked else None
    k = normal(s.shape, 1) * (1 if mask is None else mask)
    named = dict(step.module.named_parameters())
    found = torch.autograd.grad(s, list(named.values()), k)
    sent = dict(zip(named, found, strict=True))
    s = s.detach() if mask is None else torch.where(mask > 0, s.detach(), torch.nan)
    return BlockSystem(step.module, k, sent, mask), s, sent


BLOCKS: dict[str, tuple[nn.Module, bool]] = {
    "identity, tanh": (Residual(4, 4, nn.Tanh()), False),
    "identity, leaky": (Residual(4, 4, nn.LeakyReLU(0.2)), False),
    "identity, ReLU inside and above": (Residual(4, 12, nn.ReLU()), True),
    "strided, ELU": (Residual(4, 8, nn.ELU(), 8, 2), False),
    "strided, leaky": (Residual(4, 8, nn.LeakyReLU(0.2), 8, 2), False),
    "strided, ReLU inside and above": (Residual(4, 16, nn.ReLU(), 16, 2), True),
    "joined": (Joined(), False),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_the_input_of_a_block_comes_back(case: str) -> None:
    module, masked = copy.deepcopy(BLOCKS[case][0]), BLOCKS[case][1]
    x = torch.rand(1, 4, 6, 6, dtype=torch.float64) - (0 if masked else 0.5)
    system, s, sent = observed(module, x, masked)
    solution = solve_block(system, s, (4, 6, 6))
    assert distance(solution.x, x) < 1e-9
    assert solution.full_rank and solution.residual < 1e-10
    found = system.gradients_at(x)
    assert all(torch.allclose(found[name], g) for name, g in sent.items())


def test_a_block_that_loses_its_input_says_so_and_so_does_another_sample_s_gradient() -> None:
    x = torch.rand(1, 4, 6, 6, dtype=torch.float64)
    system, s, _ = observed(Residual(4, 1, nn.Tanh(), 1, 2), x)
    solution = solve_block(system, s, (4, 6, 6))
    assert not solution.full_rank and solution.undetermined > 0.1
    system, s, sent = observed(Residual(4, 4, nn.LeakyReLU(0.2)), x)
    foreign = {name: g.flip(0) for name, g in sent.items()}
    system = BlockSystem(system.block, system.k, foreign)
    assert solve_block(system, s, (4, 6, 6)).residual > 1e-2


def small_resnet(act: type[nn.Module], width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False), act(),
        Residual(width, width, act()), act(),
        Residual(width, 2 * width, act(), 2 * width, 2), act(),
        nn.Flatten(), nn.Linear(2 * width * 16, 10, bias=False),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("act", "width", "dtype", "least"),
    [
        (nn.Tanh, 8, torch.float64, 200),
        (nn.LeakyReLU, 16, torch.float64, 200),
        (nn.ReLU, 24, torch.float64, 200),
        (nn.Tanh, 8, torch.float32, 60),
    ],
)
def test_a_residual_network_gives_its_picture_away(
    act: type[nn.Module], width: int, dtype: torch.dtype, least: float
) -> None:
    x = photo("cat", 8).to(dtype)
    found = recovered(small_resnet(act, width).to(dtype), x)
    assert found.exact and found.targets.tolist() == [3]
    assert gi.metrics.psnr(found.inputs, x.double()) > least
    assert [layer.name for layer in found.layers] == ["7", "4.add", "2.add", "0"]


def test_a_dropout_used_twice_keeps_two_masks() -> None:
    drop, x = nn.Dropout(0.3), photo("cat", 8).flatten(1)
    torch.manual_seed(3)
    layers = nn.Linear(192, 64, False), nn.Tanh(), drop, nn.Linear(64, 48, False), nn.Tanh(), drop
    model = nn.Sequential(*layers, nn.Linear(48, 10)).double().train()
    found = recovered(model, x)
    assert found.exact and distance(found.inputs, x) < 1e-9


def test_a_narrow_residual_network_is_not_called_exact() -> None:
    assert not recovered(small_resnet(nn.ReLU, 2).double(), photo("cat", 8)).exact


# --- kinks --------------------------------------------------------------------------------------

KINKED: list[tuple[nn.Module, Shape]] = [
    (nn.Conv2d(2, 6, 3, padding=1, bias=False), (2, 6, 6)),
    (nn.Conv2d(2, 12, 4, 2, 1, bias=False), (2, 8, 8)),
    (nn.Conv1d(2, 5, 3, padding=1, bias=False), (2, 12)),
    (nn.Linear(6, 8, bias=False), (6,)),
]


Misread = tuple[LayerSystem, Tensor, Tensor, Tensor, Tensor, Tensor]


def misread(which: int, seed: int) -> Misread:
    """A layer below a leaky ReLU, one unit of it read wrong, and every unit in doubt."""
    module, shape = seeded(KINKED[which][0], seed), KINKED[which][1]
    x = normal((1, *shape), seed + 1)
    z = module(x).detach()
    above, wrong = normal(z.shape, seed + 2), torch.zeros(z.shape, dtype=torch.bool)
    wrong.view(-1)[seed % z.numel()] = True
    slope, other = sides(z)
    g = LayerSystem(module, slope * above, shape).matvec(x)[1]
    read = torch.where(wrong, other, slope)
    turn = (1.2 - 2 * read) * above  # to the other of the two slopes
    return LayerSystem(module, read * above, shape), x, z, g, turn, wrong


def settled(system: LayerSystem, z: Tensor, g: Tensor, turn: Tensor):  # type: ignore[no-untyped-def]
    def solve(k: Tensor, g: Tensor, before: Solution):  # type: ignore[no-untyped-def]
        again = LayerSystem(system.module, k, system.input_shape)
        return again, again.solve(z, g, before=before)

    first = system.solve(z, g)
    return first, *kinks.settle(system, first, g, turn, solve)


@settings(max_examples=60)
@given(which=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_at_the_true_input_the_wrong_unit_matches_best(which: int, seed: int) -> None:
    system, x, _, g, turn, wrong = misread(which, seed)
    found = kinks.misread(system, x, g, turn)
    assert bool(found[wrong].all())
    assert int(found.transpose(0, 1).flatten(1).sum(1).max()) == 1  # of each filter one at most


@settings(max_examples=30)
@given(which=st.integers(0, 2), seed=st.integers(0, 10**6))
def test_the_residual_only_falls_and_the_right_turn_is_exact(which: int, seed: int) -> None:
    system, x, z, g, turn, wrong = misread(which, seed)
    first, after, solution, turned = settled(system, z, g, turn)
    assert turned == int((after.k != system.k).sum())
    assert solution.residual <= first.residual
    if torch.equal(after.k != system.k, wrong):
        assert distance(solution.x, x) < 1e-7


@pytest.mark.parametrize("which", [1, 3])
def test_one_wrong_unit_is_put_right_nearly_always_and_noise_turns_nothing(which: int) -> None:
    right = 0
    for seed in range(20):
        system, x, z, g, turn, wrong = misread(which, seed)
        _, after, _, _ = settled(system, z, g, turn)
        right += torch.equal(after.k != system.k, wrong)
        g = system.matvec(x)[1]
        noisy = g + 1e-2 * g.std() * normal(g.shape, seed)
        first, same, solution, turned = settled(system, z, noisy, turn)
        assert same is system and solution is first and turned == 0
    assert right >= 13


def test_a_grouped_layer_is_left_as_it_is() -> None:
    grouped = nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False).double()
    system = LayerSystem(grouped, normal((1, 4, 4, 4), 0), (2, 4, 4))
    z, g = torch.zeros_like(system.k), torch.ones(4, 1, 3, 3).double()
    first, same, solution, turned = settled(system, z, g, torch.ones_like(system.k))
    assert same is system and solution is first and turned == 0


@pytest.mark.parametrize(("dtype", "least", "gain"), [("float16", 55, 30), ("bfloat16", 25, 12)])
def test_a_photograph_from_half_precision(
    dtype: str, least: float, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, model = photo("astronaut", 32), gi.models.cnn6(outputs=10, dtype=torch.float64)
    update = gi.observe(model, CE, x, LABEL)
    coarse = {name: g.to(getattr(torch, dtype)) for name, g in update.gradients.items()}
    update = replace(update, gradients=coarse)
    found = gi.recover(model, update, (3, 32, 32), CE)
    monkeypatch.setattr(Recovering, "settle", staticmethod(lambda s, found, *_: (s, found, 0)))
    naive = gi.recover(model, update, (3, 32, 32), CE)
    after, before = (gi.metrics.psnr(r.inputs, x) for r in (found, naive))
    assert after > least and after > before + gain
    assert sum(layer.turned for layer in found.layers) > 0
    assert not naive.exact and found.exact == (dtype == "float16")


# --- the polish ---------------------------------------------------------------------------------

SHAPE = (3, 16, 16)


def gradient_at(model: nn.Module, shape: Shape) -> polish.GradientAt:
    return polish.gradient_of(trace(model, shape), {}, CE, LABEL)


def sent_by(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return gi.observe(model, CE, x, LABEL).gradients


def near(x: Tensor, size: float) -> Tensor:
    return x.double() + size * normal(x.shape, 1)


def tiny(inputs: int = 6) -> nn.Sequential:
    return seeded(nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 4)), 4)


X = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).unsqueeze(0)


def test_float32_gradients_of_lenet_are_read_to_over_110_db(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, model = gi.data.photo("astronaut", 16), gi.models.lenet(SHAPE, bias=False)
    begun = near(x, 3e-3)  # as many digits as are lost at 32 x 32
    assert gi.metrics.psnr(begun, x.double()) < 60
    arguments = gradient_at(model, SHAPE), begun, sent_by(model, x), torch.float32
    done = polish.polish(*arguments)
    assert gi.metrics.psnr(done.solution.x, x.double()) >= 110
    assert done.solution.full_rank and done.at_noise and len(done.mismatches) <= 6
    assert distance(done.solution.x, x.double()) <= done.error < 1e-4
    monkeypatch.setattr(polish, "DENSE", 1)  # without a matrix the answer is the same
    free = polish.polish(*arguments)
    assert free.solution.full_rank and distance(free.solution.x, done.solution.x) < 1e-8


def test_an_exact_answer_is_not_harmed() -> None:
    x, model = photo("astronaut", 16), gi.models.lenet(SHAPE, bias=False, dtype=torch.float64)
    f, sent, begun = gradient_at(model, SHAPE), sent_by(model, x), near(x, 1e-12)
    done = polish.polish(f, begun, sent, torch.float64)
    assert distance(done.solution.x, x) <= distance(begun, x)
    assert list(done.mismatches) == sorted(done.mismatches, reverse=True)
    again = polish.polish(f, done.solution.x, sent, torch.float64)
    assert distance(again.solution.x, x) < 1e-13


def test_one_step_is_the_least_squares_step() -> None:
    model, begun = tiny(), near(X, 1e-3)
    sent, f = sent_by(model, X), gradient_at(model, (6,))

    def flat(x: Tensor) -> Tensor:
        found = f(x)
        return torch.cat([(found[n] / g.abs().max()).reshape(-1) for n, g in sent.items()])

    J = torch.autograd.functional.jacobian(flat, begun).reshape(-1, 6)
    rest = flat(X) - flat(begun)
    wanted = begun + torch.linalg.lstsq(J, rest[:, None]).solution.reshape(1, 6)
    done = polish.polish(f, begun, sent, torch.float64, steps=1)
    torch.testing.assert_close(done.solution.x, wanted, rtol=1e-9, atol=1e-12)
    values, found = torch.linalg.svdvals(J), done.solution
    assert 0.1 <= found.smallest_singular_value / float(values[-1]) <= 1.1
    assert found.largest_singular_value >= 0.9 * float(values[0])
    assert found.iterations > X.numel()  # of the step, and of the test of its rank


def test_the_gradient_of_the_steps_is_the_one_that_is_sent() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 4))
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    found = gradient_at(model.double(), (2, 4, 4))(x)
    for name, gradient in sent_by(model, x).items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("dense", [4096, 1])
def test_what_the_network_does_not_see_is_told(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polish, "DENSE", dense)
    model, pool = nn.Sequential(nn.AvgPool1d(2), nn.Flatten(), *tiny(2)), nn.AvgPool1d(2)
    x = torch.tensor([[[0.1, 0.7, 0.4, 0.2]]], dtype=torch.float64)
    f, begun = gradient_at(model, (1, 4)), near(x, 1e-2)
    done = polish.polish(f, begun, sent_by(model, x), torch.float64)
    assert done.at_noise  # the gradient is explained
    assert not done.solution.full_rank and done.error == math.inf  # and yet to be believed by none
    torch.testing.assert_close(pool(done.solution.x), pool(x))


def test_a_gradient_of_another_model_does_not_come_down_to_noise() -> None:
    f = gradient_at(tiny(), (6,))
    sent = {n: g + 0.1 * g.abs().max() * normal(g.shape, 0) for n, g in sent_by(tiny(), X).items()}
    done = polish.polish(f, X, sent, torch.float64)
    assert not done.at_noise and done.error > 1e-3


def test_a_far_start_comes_home_and_nothing_of_the_caller_s_is_touched() -> None:
    model, begun, seen = tiny(), near(X, 0.5), []
    sent, f, state, kept = (
        sent_by(model, X),
        gradient_at(tiny(), (6,)),
        torch.get_rng_state(),
        begun.clone(),
    )
    done, again = (
        polish.polish(
            f, begun, sent, torch.float64, steps=30, progress=lambda *told: seen.append(told)
        )
        for _ in range(2)
    )
    assert list(done.mismatches) == sorted(done.mismatches, reverse=True)
    assert distance(done.solution.x, X) < 1e-10
    assert torch.equal(done.solution.x, again.solution.x) and torch.equal(begun, kept)
    assert torch.equal(state, torch.get_rng_state())
    assert [n for n, _ in seen[: len(seen) // 2]] == list(range(1, len(done.mismatches)))


def test_across_a_kink_the_start_is_given_back() -> None:
    model = gi.models.cnn6_d((3, 8, 8), outputs=4, dtype=torch.float64)
    x = photo("astronaut", 8)
    begun = near(x, 0.05)
    f, sent = gradient_at(model, (3, 8, 8)), sent_by(model, x)
    done = polish.polish(f, begun, sent, torch.float64, steps=3)
    assert not done.at_noise and len(done.mismatches) == 1
    assert torch.equal(done.solution.x, begun)


SENT, AT = sent_by(tiny(), X), gradient_at(tiny(), (6,))
NAN = {**SENT, "0.weight": SENT["0.weight"] * math.nan}
TURNED = {**SENT, "0.weight": SENT["0.weight"].T}


ZERO = {n: 0 * g for n, g in SENT.items()}
INFINITE = lambda x: {n: g / 0 for n, g in SENT.items()}  # noqa: E731
BAD_TENSOR, BAD_ARGUMENT = InvalidTensorError, InvalidArgumentError


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"gradients": NAN}, BAD_TENSOR, r"0\.weight.*NaN"),
        ({"gradients": TURNED}, BAD_TENSOR, r"0\.weight.*shape"),
        ({"gradients": {"other": X}}, BAD_TENSOR, "No name of gradients"),
        ({"inputs": X.log() * 0 / 0}, BAD_TENSOR, "inputs has 6 NaN"),
        ({"dtype": torch.int64}, BAD_ARGUMENT, r"floating-point torch\.dtype"),
        ({"steps": 0}, BAD_ARGUMENT, "steps must be a whole number, 1 or more"),
        ({"gradients": ZERO}, VanishingGradientError, "Every gradient is zero"),
        ({"gradient_at": INFINITE}, InconsistentGradientError, "not finite"),
    ],
)
def test_what_cannot_be_polished_is_refused_by_name(
    change: dict[str, object], error: type[Exception], says: str
) -> None:
    arguments = {"gradient_at": AT, "inputs": X, "gradients": SENT, "dtype": torch.float64}
    with pytest.raises(error, match=says):
        polish.polish(**{**arguments, **change})  # type: ignore[arg-type]
