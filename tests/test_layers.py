"""Laws that every rule of the registry keeps: a new kind of layer is tested by being registered."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, Shape, distance, mask, normal, problem, seeded
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.engine.layers import RULES, Affine, Rule, Undone, pull_back, rule_of
from gradinv_edu.engine.layers.branches import Branches, Call
from gradinv_edu.engine.layers.pooling import MaxPooling
from gradinv_edu.engine.solve import rank_of
from gradinv_edu.errors import InconsistentGradientError, InvalidTensorError, UnsupportedLayerError
from gradinv_edu.systems import ScaledSystem

KINDS = list(dict.fromkeys(RULES.values()))
EXAMPLES = [example for kind in KINDS for example in kind.examples()]
# layers that are affine together, and a subclass that must not be taken for its parent


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


TOGETHER: list[tuple[nn.Module, Shape]] = [
    (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (1, 3, 4)),
    (nn.Sequential(nn.Conv2d(2, 9, 3, padding=1), nn.AvgPool2d(2)), (2, 4, 6)),
    (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval()), (2, 5, 5)),
    (nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Conv1d(3, 2, 1)), (2, 9)),
    (Doubled(1, 2, 3), (1, 5, 5)),
    (nn.Conv2d(4, 8, 3, padding=1, groups=2), (4, 5, 5)),
    (nn.Conv2d(2, 20, 3, stride=3), (2, 6, 6)),
]


def named(example: tuple[nn.Module, Shape]) -> str:
    return f"{example[0]!r} on {example[1]}".replace("\n", "")


def examples(flag: str, *more: tuple[nn.Module, Shape]) -> pytest.MarkDecorator:
    cases = [case for case in EXAMPLES if getattr(rule_of(case[0]), flag)] + list(more)
    return pytest.mark.parametrize(("module", "shape"), cases, ids=[named(c) for c in cases])


@st.composite
def convolutions(draw: st.DrawFn, groups: int = 3) -> tuple[nn.Module, Shape]:
    """Any convolution: dimensions, stride, padding and its mode, dilation, groups."""
    d, groups = draw(st.integers(1, 3)), draw(st.integers(1, groups))
    pick = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(d))  # noqa: E731
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        pick(1, 3),
        stride=pick(1, 3),
        padding=pick(0, 2),
        dilation=pick(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"])),
    )
    return module, (module.in_channels, *pick(5, 5 if d == 3 else 7))


# --- the registry ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_that_inverts_has_examples_of_its_own(kind: type[Rule]) -> None:
    cases = list(kind.examples())
    assert cases or not (kind.affine or kind.elementwise or kind.reshapes)
    for module, _ in cases:
        assert type(rule_of(module)) is kind and rule_of(module).refusal is None


REFUSED: list[tuple[nn.Module, str]] = [
    (nn.FractionalMaxPool2d(2, output_size=2), "draws its windows"),
    (nn.LocalResponseNorm(2), "size of its neighbours"),
    (Call("square", torch.square), "not among the operations"),
    (nn.LeakyReLU(-0.1), "two inputs give one output"),
    (nn.PReLU(2, init=0.0), "two inputs give one output"),
    *((m, "what is added to all of its inputs") for m in (nn.Softmax(1), nn.LogSoftmax(1))),
    *((m, "cannot be undone entry by entry") for m in (nn.Tanhshrink(), nn.LSTM(2, 2))),
]


@pytest.mark.parametrize(("module", "reason"), REFUSED)
def test_what_cannot_be_inverted_is_refused_with_its_reason(module: nn.Module, reason: str) -> None:
    rule = rule_of(module)
    kind = "square" if isinstance(module, Call) else type(module).__name__
    assert rule.refusal is not None and reason in rule.refusal
    with pytest.raises(UnsupportedLayerError, match=rf"body\.2 \({kind}\) cannot be .*{reason}"):
        rule.undo(torch.ones(1, 4, 4, 4, dtype=torch.float64), "body.2", 1e-15)


def test_every_rule_without_examples_is_among_the_refused() -> None:
    bare = {kind for kind in KINDS if not list(kind.examples())} - {Branches, MaxPooling}
    assert bare <= {type(rule_of(module)) for module, _ in REFUSED}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize(("module", "shape"), EXAMPLES, ids=[named(e) for e in EXAMPLES])
def test_a_layer_is_left_as_it_was(module: nn.Module, shape: Shape) -> None:
    module = seeded(module, 0)
    before, mode, rule = copy.deepcopy(module.state_dict()), module.training, rule_of(module)
    x = normal((1, *shape), 1).abs()
    z = rule.sample(x, torch.Generator().manual_seed(0)).detach()
    rule.pull(torch.ones_like(z), x)
    if rule.elementwise:
        rule.undo(z, "layer", 1e-15)
    if rule.affine:
        given_ = Problem(module, x, torch.ones_like(z))
        given_.system().solve(z, None)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module.training == mode
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


# --- layers that give rows ----------------------------------------------------------------------


def keeps_the_laws(p: Problem, masked: bool, seed: int) -> None:
    """Adjoint, agreement with automatic differentiation, and both matrices."""
    system = p.system()
    if masked:
        some = mask(system.gradient_shape, seed) if system.gradient_shape.numel() else None
        system = p.system(mask(p.k.shape, seed + 1), some)
    # the map is what automatic differentiation makes of the layer, less its value at zero
    rows, gradient_rows = system.matvec(p.x)
    at_zero = Problem(p.module, torch.zeros_like(p.x), p.k)
    weigh = 1.0 if system.row_mask is None else system.row_mask
    weigh_gradient = 1.0 if system.gradient_mask is None else system.gradient_mask
    torch.testing.assert_close(rows, weigh * (p.z - at_zero.z), rtol=1e-11, atol=1e-11)
    difference = weigh_gradient * (p.gradient - at_zero.gradient)
    torch.testing.assert_close(gradient_rows, difference, rtol=1e-10, atol=1e-10)
    # ⟨A x, r⟩ = ⟨x, Aᵀ r⟩, as it stands and as it is solved
    r, g = normal(rows.shape, seed + 2), normal(gradient_rows.shape, seed + 3)
    size = float(rows.norm() * r.norm() + gradient_rows.norm() * g.norm())
    left = float((rows * r).sum() + (gradient_rows * g).sum())
    assert abs(left - float((p.x * system.rmatvec(r, g)).sum())) <= 1e-13 * size
    scaled = ScaledSystem(system)
    b, image = system.right_hand_side(p.z, p.gradient), scaled.forward(p.x)
    left, right = float(image.flat() @ b.flat()), float((p.x * scaled.adjoint(b)).sum())
    assert abs(left - right) <= 1e-12 * float(image.flat().norm() * b.flat().norm())
    # the right-hand side is where the true input lands, and the matrices are the map
    torch.testing.assert_close(image.flat(), b.flat(), rtol=1e-9, atol=1e-9)
    flat = torch.cat([rows.reshape(-1), gradient_rows.reshape(-1)])
    torch.testing.assert_close(system.to_dense() @ p.x.reshape(-1), flat)
    torch.testing.assert_close(system.to_dense(scaled=True) @ p.x.reshape(-1), b.flat())


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("masked", [False, True])
@examples("affine", *TOGETHER)
def test_an_affine_layer_keeps_the_laws(module: nn.Module, shape: Shape, masked: bool) -> None:
    for batch in (1, 2, 3):
        keeps_the_laws(problem(module, shape, batch, seed=batch), masked, 7 * batch)


@settings(max_examples=60)
@given(
    case=convolutions(), batch=st.integers(1, 3), masked=st.booleans(), seed=st.integers(0, 9999)
)
def test_any_convolution_keeps_the_laws(
    case: tuple[nn.Module, Shape], batch: int, masked: bool, seed: int
) -> None:
    keeps_the_laws(problem(*case, batch, seed), masked, seed)


def is_honest(p: Problem, seed: int) -> None:
    """The rank that is told is the rank; full rank gives the input; bounds are bounds."""
    system = p.system()
    values = torch.linalg.svdvals(system.to_dense(scaled=True))
    seen = values[values > 1e-10 * values[0]]
    if float(seen[-1] / seen[0]) < 1e-3:
        return  # neither clearly determined nor clearly open
    full, n = len(seen) == system.unknowns, system.unknowns
    for dense in (True, False):
        found = system.solve(p.z, p.gradient, dense=dense)
        assert found.full_rank == full and (found.iterations == 0) == dense
        assert found.residual < 1e-9
        assert not full or distance(found.x, p.x) < 1e-8
    assert found.undetermined == 0 if full else 0 < found.undetermined <= 1
    rule = rule_of(p.module)
    rule = rule if isinstance(rule, Affine) else Affine(p.module)
    known = normal(p.k.shape, seed) > -0.8
    for k in (p.k, p.k * known):  # a dead unit has no gradient either
        masked = Problem(p.module, p.x, k).system(known)
        bound, sure = rule.bounds(k[0], known[0], p.shape)
        assert rank_of(masked.to_dense()) <= bound <= n
        A, rows = masked.to_dense(), p.k.numel()
        assert not sure or rank_of(A[rows:] if sure == "gradient" else A[:rows]) == n
        assert bound <= rule.most(known[0], p.shape) <= n


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@examples("affine", *TOGETHER)
def test_the_rank_of_an_affine_layer_is_told(module: nn.Module, shape: Shape) -> None:
    is_honest(problem(module, shape, seed=3), 5)


@settings(max_examples=30)
@given(
    case=convolutions(groups=2).filter(lambda case: math.prod(case[1]) <= 200),
    seed=st.integers(0, 9999),
)
def test_the_rank_of_any_convolution_is_told(case: tuple[nn.Module, Shape], seed: int) -> None:
    is_honest(problem(*case, seed=seed), seed)


@pytest.mark.parametrize("shape", [(3, 5, 5), (1, 5), (1, 1, 1)])
def test_a_convolution_does_not_count_on_a_shape_that_it_does_not_take(shape: Shape) -> None:
    conv = nn.Conv2d(1, 2, 3)
    with pytest.raises(InvalidTensorError, match=r"does not take inputs|larger than the padded"):
        rule_of(conv).bounds(torch.ones(2, 3, 3), torch.ones(2, 3, 3).bool(), shape)  # type: ignore[attr-defined]


# --- layers undone entry by entry ---------------------------------------------------------------

SHAPED = [(nn.CELU(1.3), (6,)), (nn.Dropout(0.9).train(), (3, 40)), (nn.PReLU(), (3, 4))]


def applied(rule: Rule, z: Tensor) -> Tensor:
    """The layer, with the same draw each time."""
    return rule.sample(z, torch.Generator().manual_seed(0))


@examples("elementwise", *SHAPED)
@pytest.mark.parametrize("seed", range(4))
def test_an_elementwise_layer_is_undone(module: nn.Module, shape: Shape, seed: int) -> None:
    rule, z, h = rule_of(seeded(module, seed)), 2 * normal((2, *shape), seed + 1), 1e-6
    if isinstance(module, nn.PReLU):  # one-to-one while its slope is positive
        rule.module.weight.data.abs_()
    z = torch.where(z.abs() < 1e-3, 1.0, z)  # off the kink
    with torch.no_grad():
        a, slope = applied(rule, z), pull_back(lambda t: applied(rule, t), torch.ones_like(z), z)
        difference = (applied(rule, z + h) - applied(rule, z - h)) / (2 * h)
    undone = rule.undo(a, "layer", 1e-15)
    if undone.other is not None:
        is_undone_on_one_side(undone, z, a, slope, rule)
        return
    assert torch.equal(undone.known, slope != 0)
    assert rule.homogeneous == torch.allclose(applied(rule, 99 * z), 99 * a)
    torch.testing.assert_close(undone.inputs, z * undone.known, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(undone.slope, slope, rtol=1e-9, atol=1e-12)
    # torch's own CELU derivative takes 1/alpha in float32, as the client's does
    torch.testing.assert_close(undone.slope, difference, rtol=1e-7, atol=1e-7)
    turn = rule.turn(a, z, 1e-15)
    if turn is not None:
        other = pull_back(lambda t: applied(rule, t), torch.ones_like(z), -z)
        torch.testing.assert_close(turn, (other - slope) * z, rtol=1e-12, atol=1e-12)
    assert turn is None or rule.kinked


def is_undone_on_one_side(undone: Undone, z: Tensor, a: Tensor, slope: Tensor, rule: Rule) -> None:
    """Both sides give the output, one of them is the input, with its slope; the other falls."""
    assert undone.other is not None
    least = a.min() if rule.kinked else -0.5
    assert float(undone.other.inputs[undone.other.known & (a < 0)].max()) < float(least)
    for side in (undone, undone.other):
        torch.testing.assert_close(rule.forward(side.inputs)[side.known], a[side.known])
        certain = (a > 0) & side.known
        torch.testing.assert_close(side.inputs[certain], z[certain], rtol=1e-9, atol=1e-9)
    assert bool((undone.slope >= 0).all()) and bool((undone.other.slope[a < 0] <= 0).all())
    right = (undone.inputs - z).abs() < (undone.other.inputs - z).abs()
    for name, wanted in (("inputs", z), ("slope", slope)):
        found = torch.where(right, getattr(undone, name), getattr(undone.other, name))
        known = torch.where(right, undone.known, undone.other.known)
        torch.testing.assert_close(found[known], wanted[known], rtol=1e-6, atol=1e-6)
    gone = ~undone.known & ~undone.other.known  # at zero, or at the minimum
    assert float((gone & (slope.abs() > 1e-5)).sum()) == 0
    assert bool((~undone.known | (a > 0) | (a < 0)).all())


@examples("elementwise", *SHAPED)
def test_any_output_is_undone_or_refused_and_never_infinite(
    module: nn.Module, shape: Shape
) -> None:
    rule = rule_of(seeded(module, 0))
    if isinstance(module, nn.PReLU):
        rule.module.weight.data.abs_()
    for size in (1e4, -1e4):  # saturated: unknown, with the slope that it certainly had
        z = normal((1, *shape), 1)
        z.view(-1)[0] = size
        undone = rule.undo(applied(rule, z).detach(), "layer", 1e-15)
        assert bool(torch.isfinite(undone.inputs).all() and torch.isfinite(undone.slope).all())
        assert not undone.slope[~undone.known].any()
    wild = 5 * normal((1, *shape), 2)
    clamped = rule.undo(rule.clamp(wild), "layer", 1e-15)
    assert bool(torch.isfinite(clamped.inputs).all())
    assert bool(rule.undo(torch.full_like(wild, rule.inside), "layer", 0).known.any()) or (
        rule.inside == 0  # where no output can be undone, as of a unit that is off
    )
    if not rule.random:
        try:
            undone = rule.undo(wild, "layer", 1e-15)
        except InconsistentGradientError as error:
            assert "layer lies" in str(error)
        else:
            again = rule.forward(undone.inputs)
            torch.testing.assert_close(again[undone.known], wild[undone.known])


RANGES = [
    (nn.Sigmoid(), 1.2, r"\[0.0, 1.0\]"),
    (nn.Sigmoid(), -0.1, r"\[0.0, 1.0\]"),
    (nn.Tanh(), -1.5, r"\[-1.0, 1.0\]"),
    (nn.Softsign(), 1.5, r"\[-1.0, 1.0\]"),
    (nn.ELU(0.5), -0.6, r"\[-0.5, inf\]"),
    (nn.CELU(0.5), -0.6, r"\[-0.5, inf\]"),
    (nn.SELU(), -1.8, r"\[-1.758"),
    (nn.Softplus(), -0.1, r"\[0.0, inf\]"),
    (nn.LogSigmoid(), 0.1, r"\[-inf, 0.0\]"),
    (nn.ReLU(), -0.1, r"\[0.0, inf\]"),
    (nn.Hardsigmoid(), 1.2, r"\[0.0, 1.0\]"),
    (nn.GELU(), -0.2, r"\[-0.1699"),
    (nn.SiLU(), -0.3, r"\[-0.2784"),
]


@pytest.mark.parametrize(("module", "a", "ends"), RANGES)
def test_an_output_out_of_range_has_no_input(module: nn.Module, a: float, ends: str) -> None:
    rule = rule_of(module)
    outputs = torch.tensor([[rule.inside or 0.3, a]], dtype=torch.float64)
    with pytest.raises(InconsistentGradientError, match=rf"features\.1 lies .* range {ends}"):
        rule.undo(outputs, "features.1", 1e-15)
    low, high = getattr(rule, "span", (0.0, math.inf))
    end = high if a > high else low  # rounding beyond the end is no contradiction
    outputs[0, 1] = end + math.copysign(1e-12, a - end)
    assert not rule.undo(outputs, "features.1", 1e-13).known[0, 1]


def test_a_slope_is_not_rounded_to_float32() -> None:
    a = torch.tensor([[-1.0, 2.0]], dtype=torch.float64)
    undone = rule_of(nn.LeakyReLU(0.2)).undo(a, "leaky", 0.0)
    assert undone.slope.tolist() == [[0.2, 1.0]] and undone.inputs.tolist() == [[-1 / 0.2, 2.0]]
    turn = rule_of(nn.LeakyReLU(0.2)).turn(a, torch.ones_like(a), 1e-15)
    assert turn is not None and turn.tolist() == [[0.8, -0.8]]


def test_zeros_are_told_from_small_values_by_the_gap_between_them() -> None:
    noise, values = 1e-13 * normal((1, 200), 0), mask((1, 300), 1) + 1e-6
    undone = rule_of(nn.ReLU()).undo(torch.cat([noise, values], 1), "relu", 1e-13)
    assert torch.equal(undone.known, torch.arange(500)[None] >= 200)


def test_a_batch_norm_uses_its_own_eps_and_a_closed_channel_is_unknown() -> None:
    norm = nn.BatchNorm1d(2, eps=0.75).double().eval()
    norm.running_var.fill_(0.25)
    norm.weight.data = torch.tensor([0.0, 2.0], dtype=torch.float64)
    undone = rule_of(norm).undo(torch.ones(1, 2, dtype=torch.float64), "norm", 1e-15)
    assert undone.known.tolist() == [[False, True]]
    assert undone.inputs.tolist() == [[0.0, 0.5]] and undone.slope.tolist() == [[0.0, 2.0]]


@examples("reshapes")
def test_reshaping_keeps_the_entries_in_order(module: nn.Module, shape: Shape) -> None:
    rule, x = rule_of(module), normal((2, *shape), 0)
    k = normal(rule.forward(x).shape, 1)
    y = rule.forward(x)
    assert torch.equal(y.flatten(), x.flatten()) is not rule.reorders
    assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)
    assert torch.equal(rule.pull(y, x), x)  # what pulls a gradient back undoes it
    assert torch.equal(rule.forward(rule.pull(k, x)), k)


def test_a_walk_goes_down_through_entries_in_another_order() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        below, above = nn.Conv2d(1, 8, 3, padding=1), nn.ConvTranspose2d(2, 4, 3, padding=1)
        parts = [below, nn.Tanh(), nn.PixelShuffle(2), above, nn.Tanh(), nn.Flatten()]
        model = nn.Sequential(*parts, nn.Linear(4 * 64, 5)).double()
    x, loss = normal((1, 1, 4, 4), 0), nn.CrossEntropyLoss()
    found = gi.recover(model, gi.observe(model, loss, x, torch.tensor([1])), (1, 4, 4), loss)
    assert found.exact and distance(found.inputs, x) < 1e-10
