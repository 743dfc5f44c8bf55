"""Chapter 5: both sets of equations as one linear map, its adjoint, its rank and its solution."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradinv_edu.errors import InvalidTensorError, UnsupportedLayerError
from gradinv_edu.systems import (
    LayerSystem,
    ModuleOperator,
    ScaledSystem,
    operator,
    pack,
    weight_names,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PADDING_MODES = ("zeros", "reflect", "circular", "replicate")


def _seed(module: nn.Module, seed: int) -> nn.Module:
    """Weights, biases and running statistics from one seed, in float64."""
    g = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            noise = torch.rand(buffer.shape, generator=g, dtype=torch.float64)
            buffer.data = noise + 0.5 if name.endswith("var") else noise
    return module.eval()


def _normal(shape: tuple[int, ...] | torch.Size, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=g, dtype=torch.float64)


def _mask(shape: tuple[int, ...] | torch.Size, seed: int) -> Tensor:
    return (_normal(shape, seed) > -0.5).double()


def _outputs(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


def _weight_gradient(module: nn.Module, x: Tensor, k: Tensor) -> Tensor:
    """Autograd's own answer for the layer's weights."""
    parameters = dict(module.named_parameters())
    wanted = {name: parameters[name] for name in weight_names(module)}
    given_ = torch.autograd.grad((module(x) * k).sum(), list(wanted.values()))
    return pack(dict(zip(wanted, given_, strict=True)))


def _problem(
    module: nn.Module, shape: tuple[int, ...], seed: int = 0, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, output gradient, outputs and weight gradient of one layer."""
    x = _normal((batch, *shape), seed)
    z = _outputs(module, x)
    k = _normal(z.shape, seed + 1)
    return x, k, z, _weight_gradient(module, x, k)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Any convolution: 1 to 3 dimensions, stride, padding, dilation, groups, padding mode."""
    d = draw(st.integers(1, 3))
    pick = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(d))  # noqa: E731
    groups = draw(st.integers(1, 2))
    module = CONVOLUTIONS[d - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        pick(1, 3),
        stride=pick(1, 3),
        padding=pick(0, 2),
        dilation=pick(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(PADDING_MODES)),
    )
    return module, (module.in_channels, *pick(5, 6))


@st.composite
def modules(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Any module affine in its input that a chain may hold."""
    h, w = draw(st.integers(4, 7)), draw(st.integers(4, 7))
    conv = nn.Conv2d(2, 3, draw(st.integers(1, 3)), padding=1, stride=draw(st.integers(1, 2)))
    kinds: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
        "linear": lambda: (nn.Linear(h, w, bias=draw(st.booleans())), (h,)),
        "linear on rows": lambda: (nn.Linear(h, w), (3, h)),
        "convolution": lambda: draw(convolutions()),
        "same, odd": lambda: (nn.Conv2d(2, 2, (3, 5), padding="same", dilation=2), (2, h, w)),
        "same, even": lambda: (nn.Conv2d(2, 2, (2, 4), padding="same"), (2, h, w)),
        "valid": lambda: (nn.Conv2d(2, 2, 3, padding="valid"), (2, h, w)),
        "pool": lambda: (nn.AvgPool2d(2, stride=1, padding=1), (2, h, w)),
        "adaptive": lambda: (nn.AdaptiveAvgPool2d((3, 2)), (2, h, w)),
        "norm": lambda: (nn.BatchNorm2d(2), (2, h, w)),
        "flatten": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(h * w, 3)), (1, h, w)),
        "conv, pool": lambda: (nn.Sequential(conv, nn.AvgPool2d(2)), (2, h, w)),
        "conv, norm": lambda: (nn.Sequential(conv, nn.BatchNorm2d(3)), (2, h, w)),
        "conv, conv": lambda: (nn.Sequential(conv, nn.Conv2d(3, 2, 1)), (2, h, w)),
    }
    module, shape = kinds[draw(st.sampled_from(sorted(kinds)))]()
    return _seed(module, draw(st.integers(0, 999))), shape


# --- the map and its adjoint -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@settings(max_examples=120)
@given(
    case=modules(),
    batch=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    masks=st.booleans(),
    constraints=st.sampled_from(("both", "weight", "gradient")),
)
def test_the_adjoint_law(
    case: tuple[nn.Module, tuple[int, ...]], batch: int, seed: int, masks: bool, constraints: str
) -> None:
    module, shape = case
    k = _normal(_outputs(module, torch.zeros(batch, *shape).double()).shape, seed)
    system = LayerSystem(module, k, shape)
    if masks:
        m, g = _mask(k.shape, seed + 1), _mask(system.gradient_shape, seed + 2)
        g_mask = g if system.gradient_shape.numel() else None
        system = LayerSystem(module, k, shape, m, g_mask, constraints=constraints)
    x = _normal((batch, *shape), seed + 3)
    rows, gradient_rows = system.matvec(x)
    r, g = _normal(rows.shape, seed + 4), _normal(gradient_rows.shape, seed + 5)
    left = (rows * r).sum() + (gradient_rows * g).sum()
    right = (x * system.rmatvec(r, g)).sum()
    size = rows.norm() * r.norm() + gradient_rows.norm() * g.norm()
    assert abs(float(left - right)) <= 1e-13 * float(size)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@settings(max_examples=80)
@given(case=modules(), batch=st.integers(1, 3), seed=st.integers(0, 10_000))
def test_the_equations_are_those_that_autograd_gives(
    case: tuple[nn.Module, tuple[int, ...]], batch: int, seed: int
) -> None:
    module, shape = case
    x = _normal((batch, *shape), seed)
    z = _outputs(module, x)
    k = _normal(z.shape, seed + 1)
    system = LayerSystem(module, k, shape)
    rows, gradient_rows = system.matvec(x)
    zero = _outputs(module, torch.zeros_like(x))
    torch.testing.assert_close(rows, z - zero, rtol=1e-12, atol=1e-12)
    if system.gradient_shape.numel():
        difference = _weight_gradient(module, x, k) - _weight_gradient(module, 0 * x, k)
        torch.testing.assert_close(gradient_rows, difference, rtol=1e-11, atol=1e-11)
        b = system.right_hand_side(z, _weight_gradient(module, x, k))
        scaled = ScaledSystem(system).forward(x)
        torch.testing.assert_close(b.g, scaled.g, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(b.z, scaled.z, rtol=1e-11, atol=1e-11)


@settings(max_examples=30)
@given(case=convolutions(), seed=st.integers(0, 1000))
def test_direct_calls_and_automatic_differentiation_agree(
    case: tuple[nn.Module, tuple[int, ...]], seed: int
) -> None:
    module, shape = _seed(case[0], seed), case[1]
    x, k, _, _ = _problem(module, shape, seed, batch=2)
    direct, general = operator(module, k, shape), ModuleOperator(module, k, shape)
    for a, b in zip(direct.forward(x), general.forward(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    rows, gradient_rows = direct.forward(x)
    torch.testing.assert_close(
        direct.adjoint(rows, gradient_rows),
        general.adjoint(rows, gradient_rows),
        rtol=1e-11,
        atol=1e-10,
    )


def test_a_subclass_with_its_own_forward_pass_is_not_taken_for_its_parent() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = _seed(Doubled(1, 2, 3), 0)
    x, k, z, g = _problem(module, (1, 5, 5))
    rows, gradient_rows = LayerSystem(module, k, (1, 5, 5)).matvec(x)
    torch.testing.assert_close(gradient_rows, g)
    torch.testing.assert_close(rows, z - _outputs(module, 0 * x))


# --- the matrix and the solution ---------------------------------------------------------------

DETERMINED = {
    "linear": (nn.Linear(6, 4), (6,)),
    "strided": (nn.Conv2d(2, 9, 4, stride=2, padding=1), (2, 6, 8)),
    "dilated": (nn.Conv2d(1, 3, 3, dilation=2, padding=2), (1, 7, 6)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 5, 5)),
    "stride 3": (nn.Conv2d(2, 20, 3, stride=3), (2, 9, 9)),
    "1d": (nn.Conv1d(2, 4, 5, padding=2), (2, 17)),
    "3d": (nn.Conv3d(1, 3, 2), (1, 4, 4, 4)),
    "reflect": (nn.Conv2d(1, 3, 3, padding=1, padding_mode="reflect"), (1, 6, 6)),
    "circular": (nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), (1, 6, 6)),
    "replicate": (nn.Conv2d(1, 3, 3, padding=1, padding_mode="replicate"), (1, 6, 6)),
    "conv, pool": (nn.Sequential(nn.Conv2d(1, 9, 3, padding=1), nn.AvgPool2d(2)), (1, 6, 6)),
    "norm": (nn.BatchNorm2d(2), (2, 4, 4)),
}


@pytest.mark.parametrize("name", DETERMINED)
@pytest.mark.parametrize("dense", [True, False])
def test_a_determined_layer_gives_its_input_back(name: str, dense: bool) -> None:
    module, shape = _seed(copy.deepcopy(DETERMINED[name][0]), 3), DETERMINED[name][1]
    x, k, z, g = _problem(module, shape)
    solution = LayerSystem(module, k, shape).solve(z, g, dense=dense)
    assert solution.full_rank and solution.converged and solution.undetermined == 0
    assert float((solution.inputs - x).norm() / x.norm()) < 1e-11
    assert solution.residual < 1e-13
    assert (solution.iterations == 0) == dense


@pytest.mark.parametrize("name", DETERMINED)
def test_lstsq_on_the_dense_matrix_agrees(name: str) -> None:
    module, shape = _seed(copy.deepcopy(DETERMINED[name][0]), 5), DETERMINED[name][1]
    _, k, z, g = _problem(module, shape, seed=9)
    z, g = z + 0.1 * _normal(z.shape, 2), g + 0.1 * _normal(g.shape, 3)  # no exact answer
    system = LayerSystem(module, k, shape)
    A, b = system.to_dense(scaled=True), system.right_hand_side(z, g).flat()
    expected = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution.reshape(-1)
    for dense in (True, False):
        found = system.solve(z, g, dense=dense)
        assert float((found.inputs.reshape(-1) - expected).norm() / expected.norm()) < 1e-9
        rest = float((b - A @ expected).norm() / b.norm())
        assert found.residual == pytest.approx(rest, rel=1e-6)


def test_the_dense_matrix_is_the_map() -> None:
    module = _seed(nn.Conv2d(2, 3, 3, padding=1), 1)
    x, k, _, _ = _problem(module, (2, 4, 5), batch=2)
    system = LayerSystem(module, k, (2, 4, 5), _mask(k.shape, 4))
    rows, gradient_rows = system.matvec(x)
    both = torch.cat([rows.reshape(-1), gradient_rows.reshape(-1)])
    torch.testing.assert_close(system.to_dense() @ x.reshape(-1), both)
    scaled = ScaledSystem(system).forward(x).flat()
    torch.testing.assert_close(system.to_dense(scaled=True) @ x.reshape(-1), scaled)
    assert system.to_dense().shape == (2 * 60 + 54, 80)


def test_one_output_gradient_without_its_batch_dimension() -> None:
    module = _seed(nn.Conv2d(1, 4, 3, padding=1), 0)
    x, k, z, g = _problem(module, (1, 5, 5))
    system = LayerSystem(module, k[0], (1, 5, 5), torch.ones_like(k[0]))
    torch.testing.assert_close(system.solve(z[0], g).inputs, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_is_solved_in_double(dtype: torch.dtype) -> None:
    module = _seed(nn.Conv2d(1, 4, 3, padding=1), 0)
    x, k, z, g = _problem(module, (1, 5, 5))
    system = LayerSystem(module, k.to(dtype), (1, 5, 5))
    found = system.solve(z.to(dtype), g.to(dtype)).inputs
    assert found.dtype == torch.float64
    assert float((found - x).norm() / x.norm()) < 100 * torch.finfo(dtype).eps


# --- rank --------------------------------------------------------------------------------------


@st.composite
def small_systems(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Layers with about as many equations as unknowns, on either side."""
    if draw(st.booleans()):
        n = draw(st.integers(2, 40))
        return nn.Linear(n, max(1, n + draw(st.integers(-6, 6)))), (n,)
    channels, size = draw(st.integers(1, 3)), draw(st.integers(4, 7))
    conv = nn.Conv2d(
        channels,
        draw(st.integers(1, 5)),
        draw(st.integers(1, 4)),
        stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, 1)),
    )
    return conv, (channels, size, size)


@settings(max_examples=150)
@given(
    case=small_systems(),
    seed=st.integers(0, 10_000),
    masked=st.booleans(),
    constraints=st.sampled_from(("both", "weight", "gradient")),
)
def test_the_dye_tells_the_rank_that_an_svd_tells(
    case: tuple[nn.Module, tuple[int, ...]], seed: int, masked: bool, constraints: str
) -> None:
    module, shape = _seed(case[0], seed), case[1]
    _, k, z, g = _problem(module, shape, seed)
    mask = _mask(k.shape, seed + 2) if masked else None
    system = LayerSystem(module, k, shape, mask, constraints=constraints)
    exact = system.solve(z, g, dense=True)
    values = torch.linalg.svdvals(system.to_dense(scaled=True))
    positive = values[values > 1e-10 * values[0]]
    if positive.numel() and float(positive[-1] / values[0]) < 1e-3:
        return  # neither clearly determined nor clearly open
    found = system.solve(z, g, dense=False)
    assert exact.full_rank == (positive.numel() == system.unknowns)
    assert found.full_rank == exact.full_rank
    assert (found.undetermined > 0) == (exact.undetermined > 0)
    size = float(exact.inputs.norm())
    assert float((found.inputs - exact.inputs).norm()) <= (1e-9 if exact.full_rank else 1e-6) * size


@pytest.mark.parametrize("missing", [1, 2, 5, 20])
def test_a_single_missing_equation_is_seen_among_hundreds(missing: int) -> None:
    module = _seed(nn.Linear(300, 300), 0)
    orthogonal = torch.linalg.qr(_normal((300, 300), 1)).Q
    module.weight.data = orthogonal  # well conditioned: only the mask takes rank away
    x, k, z, g = _problem(module, (300,))
    mask = torch.ones_like(k)
    mask[0, :missing] = 0
    system = LayerSystem(module, k, (300,), mask, constraints="weight")
    found = system.solve(z, g, dense=False)
    assert not found.full_rank
    assert found.residual < 1e-13  # small, and yet the answer is wrong
    assert float((found.inputs - x).norm()) > 1e-3
    expected = module.weight.data.T @ (mask * (z - module.bias)).detach()[0]
    torch.testing.assert_close(found.inputs[0], expected, rtol=1e-6, atol=1e-6)
    assert 0 < found.undetermined < 8 * missing / 300  # chi-squared with ``missing`` degrees


def test_the_least_norm_answer_of_a_deficient_convolution_is_that_of_lstsq() -> None:
    module = _seed(nn.Conv2d(3, 4, 4, stride=2, padding=1), 2)
    x, k, z, _ = _problem(module, (3, 12, 12))
    system = LayerSystem(module, k, (3, 12, 12), constraints="weight")
    found = system.solve(z, None, dense=False)
    A, b = system.to_dense(scaled=True), system.right_hand_side(z, None).flat()
    expected = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution.reshape_as(x)
    assert float((found.inputs - expected).norm() / expected.norm()) < 1e-6
    assert not found.full_rank and found.residual < 1e-13
    assert found.undetermined == pytest.approx(1 - 144 / 432, abs=0.1)


def test_more_equations_than_unknowns_are_no_proof_of_rank() -> None:
    module = _seed(nn.Conv2d(3, 4, 3, stride=3), 0)  # every pixel seen once, by four filters
    _, k, z, g = _problem(module, (3, 9, 9))
    system = LayerSystem(module, k, (3, 9, 9), constraints="gradient")
    assert system.gradient_equations == 108 and system.weight_equations == 0
    both = LayerSystem(module, k, (3, 9, 9))
    assert both.weight_equations + both.gradient_equations == 144
    repeated = _seed(nn.Conv2d(1, 8, 1), 1)  # eight filters that see one pixel each
    repeated.weight.data[:, 0, 0, 0] = 1.0
    pooled = nn.Sequential(nn.AvgPool2d(2), repeated)
    _, k, z, g = _problem(pooled, (1, 4, 4))
    system = LayerSystem(pooled, k, (1, 4, 4))
    assert system.weight_equations + system.gradient_equations > system.unknowns
    assert not system.solve(z, g, dense=False).full_rank
    assert not system.solve(z, g, dense=True).full_rank


def test_batches_share_gradient_constraints() -> None:
    module = _seed(nn.Conv2d(2, 8, 3, padding=1), 4)
    x, k, z, g = _problem(module, (2, 4, 4), batch=3)
    system = LayerSystem(module, k, (2, 4, 4))
    assert system.unknowns == 96 and system.gradient_equations == 144
    for dense in (True, False):
        torch.testing.assert_close(system.solve(z, g, dense=dense).inputs, x)
    rows = torch.zeros_like(k)
    rows[0] = 1  # the first sample's outputs alone: 144 shared equations for the other two
    alone = LayerSystem(module, k, (2, 4, 4), rows)
    torch.testing.assert_close(alone.solve(z, g).inputs, x)
    fewer = _mask(g.shape, 1)
    fewer[4:] = 0  # at most 72 of them
    assert not LayerSystem(module, k, (2, 4, 4), 0 * k, fewer).solve(z, g).full_rank


def test_an_input_of_zeros_is_an_answer_too() -> None:
    module = _seed(nn.Conv2d(1, 4, 3, padding=1, bias=False), 0)
    k = _normal((1, 4, 5, 5), 0)
    found = LayerSystem(module, k, (1, 5, 5)).solve(0 * k, 0 * module.weight.data, dense=False)
    assert found.full_rank and float(found.inputs.abs().max()) < 1e-6


def test_an_iteration_that_is_cut_short_says_so() -> None:
    module = _seed(nn.Conv2d(1, 4, 3, padding=1), 0)
    _, k, z, g = _problem(module, (1, 8, 8))
    system = LayerSystem(module, k, (1, 8, 8))
    found = system.solve(z, g, dense=False, max_iterations=5)
    assert not found.converged and not found.full_rank


# --- masks, scaling, choice of constraints -----------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_masked_entries_may_be_anything(dense: bool) -> None:
    module = _seed(nn.Conv2d(2, 12, 3, padding=1), 6)
    x, k, z, g = _problem(module, (2, 6, 6))
    rows, gradients = _mask(k.shape, 1), _mask(g.shape, 2)
    z = torch.where(rows > 0, z, torch.nan)
    g = torch.where(gradients > 0, g, torch.inf)
    system = LayerSystem(module, k, (2, 6, 6), rows.bool(), gradients)
    assert system.weight_equations == int(rows.sum())
    assert system.gradient_equations == int(gradients.sum())
    found = system.solve(z, g, dense=dense)
    assert found.full_rank
    torch.testing.assert_close(found.inputs, x)


def test_a_mask_between_zero_and_one_weighs() -> None:
    module = _seed(nn.Linear(3, 5), 0)
    _, k, z, _ = _problem(module, (3,))
    weights = torch.rand(k.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = z + _normal(z.shape, 4)
    found = LayerSystem(module, k, (3,), weights, constraints="weight").solve(z, None).inputs
    A, b = weights.T * module.weight.detach(), (weights * (z - module.bias.detach())).T
    torch.testing.assert_close(found, torch.linalg.lstsq(A, b).solution.T)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_row_scaling_makes_the_answer_and_the_work_free_of_units(size: float) -> None:
    module = _seed(nn.Conv2d(2, 4, 3, padding=1), 1)
    x, k, z, g = _problem(module, (2, 8, 8))
    system = LayerSystem(module, size * k, (2, 8, 8))
    scale = module.weight.detach().norm() / (size * k).norm()
    assert system.gradient_scale == pytest.approx(float(scale))
    found = system.solve(z, size * g, dense=False)
    same = LayerSystem(module, k, (2, 8, 8)).solve(z, g, dense=False)
    assert abs(found.iterations - same.iterations) <= 0.1 * same.iterations + 2
    torch.testing.assert_close(found.inputs, x, rtol=1e-9, atol=1e-10)


def test_row_scaling_improves_the_condition() -> None:
    module = _seed(nn.Conv2d(2, 2, 3, padding=1), 1)
    _, k, _, _ = _problem(module, (2, 6, 6))
    system = LayerSystem(module, 1e-4 * k, (2, 6, 6))
    condition = lambda A: float(torch.linalg.cond(A))  # noqa: E731
    assert condition(system.to_dense(scaled=True)) <= condition(system.to_dense())


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("constraints", ["weight", "gradient"])
def test_one_set_of_constraints_alone(constraints: str, dense: bool) -> None:
    module = _seed(nn.Conv2d(1, 4, 3), 0)  # 36 unknowns: 64 weight, 36 gradient equations
    x, k, z, g = _problem(module, (1, 6, 6))
    system = LayerSystem(module, k, (1, 6, 6), constraints=constraints)
    counts = (system.weight_equations, system.gradient_equations)
    assert counts == ((64, 0) if constraints == "weight" else (0, 36))
    other = (z, None) if constraints == "weight" else (None, g)
    found = system.solve(*other, dense=dense)
    assert found.full_rank
    torch.testing.assert_close(found.inputs, x, rtol=1e-6, atol=1e-6)


# --- the iteration -----------------------------------------------------------------------------


def test_the_random_start_comes_from_the_generator_and_does_not_change_the_answer() -> None:
    module = _seed(nn.Conv2d(1, 4, 3, padding=1), 0)
    x, k, z, g = _problem(module, (1, 6, 6))
    system = LayerSystem(module, k, (1, 6, 6))
    for seed in (1, 2):
        found = system.solve(z, g, dense=False, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found.inputs, x)
    again = [system.solve(z, g, dense=False).inputs for _ in range(2)]
    assert torch.equal(*again)


def test_progress_is_reported() -> None:
    module = _seed(nn.Conv2d(1, 4, 3, padding=1), 0)
    _, k, z, g = _problem(module, (1, 6, 6))
    seen: list[tuple[int, float]] = []
    LayerSystem(module, k, (1, 6, 6)).solve(
        z, g, dense=False, progress=lambda i, r: seen.append((i, r))
    )
    assert seen[0][0] == 1 and min(r for _, r in seen) < 1e-4


# --- what is refused, and what is left alone ---------------------------------------------------


def _conv_system(**kwargs: object) -> LayerSystem:
    return LayerSystem(nn.Conv2d(1, 2, 3), torch.ones(1, 2, 3, 3), (1, 5, 5), **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (torch.ones(1, 2, 4, 4), r"output_gradient has shape \(1, 2, 4, 4\).*\(N, 2, 3, 3\)"),
        (torch.full((1, 2, 3, 3), torch.nan), "output_gradient has 18 NaN or infinite"),
        (torch.ones(1, 2, 3, 3, dtype=torch.int64), "output_gradient has dtype torch.int64"),
        (torch.ones(0, 2, 3, 3), "output_gradient is empty"),
    ],
)
def test_a_bad_output_gradient_is_refused(k: Tensor, message: str) -> None:
    with pytest.raises(InvalidTensorError, match=message):
        LayerSystem(nn.Conv2d(1, 2, 3), k, (1, 5, 5))


def test_a_wrong_input_shape_is_refused() -> None:
    with pytest.raises(InvalidTensorError, match=r"does not take inputs of shape \(3, 5, 5\)"):
        LayerSystem(nn.Conv2d(1, 2, 3), torch.ones(1, 2, 3, 3), (3, 5, 5))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"row_mask": torch.ones(3)}, r"row_mask has shape \(3,\), expected \(1, 2, 3, 3\)"),
        ({"gradient_mask": torch.ones(2, 1)}, r"gradient_mask has shape \(2, 1\)"),
        ({"row_mask": torch.full((1, 2, 3, 3), torch.nan)}, "row_mask has 18 NaN"),
    ],
)
def test_a_bad_mask_is_refused(mask: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidTensorError, match=message):
        _conv_system(**mask)


def test_an_unknown_choice_of_constraints_is_refused() -> None:
    with pytest.raises(ValueError, match='"both", "weight" or "gradient", not \'forward\''):
        _conv_system(constraints="forward")


@pytest.mark.parametrize(
    ("z", "g", "message"),
    [
        (torch.ones(1, 2, 9), torch.ones(2, 1, 3, 3), r"outputs has shape \(1, 1, 2, 9\)"),
        (torch.ones(1, 2, 3, 3), torch.ones(18), r"weight_gradient has shape \(18,\)"),
        (torch.full((1, 2, 3, 3), torch.nan), torch.ones(2, 1, 3, 3), "outputs has 18 NaN"),
        (torch.ones(1, 2, 3, 3), torch.full((2, 1, 3, 3), torch.inf), "weight_gradient has 18"),
        (None, torch.ones(2, 1, 3, 3), "outputs is None, but its equations are in the system"),
        (torch.ones(1, 2, 3, 3), None, "weight_gradient is None"),
    ],
)
def test_a_bad_right_hand_side_is_refused(z: Tensor | None, g: Tensor | None, message: str) -> None:
    with pytest.raises(InvalidTensorError, match=message):
        _conv_system().solve(z, g)


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.MaxPool2d(2, stride=1), nn.Sigmoid(), nn.InstanceNorm2d(2)]
)
def test_what_is_not_affine_is_refused(module: nn.Module) -> None:
    k = module(torch.zeros(1, 2, 4, 4))
    with pytest.raises(UnsupportedLayerError, match="not affine in its input"):
        LayerSystem(module, k, (2, 4, 4))


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [nn.BatchNorm2d(2), nn.Dropout(0.5)])
def test_train_mode_is_refused_before_the_layer_is_run(inner: nn.Module, outer: bool) -> None:
    inner = copy.deepcopy(inner).double()
    module = nn.Sequential(inner)
    module.training = outer
    before = copy.deepcopy(inner.state_dict())
    with pytest.raises(UnsupportedLayerError, match="in train mode"):
        LayerSystem(module, torch.ones(1, 2, 4, 4), (2, 4, 4))
    assert all(torch.equal(before[name], value) for name, value in inner.state_dict().items())


def test_the_layer_and_the_arguments_are_left_alone() -> None:
    module = nn.Sequential(nn.Conv2d(1, 9, 3, padding=1), nn.BatchNorm2d(9)).eval()
    module[0].weight.grad = torch.full_like(module[0].weight, 7.0)
    before = copy.deepcopy(module)
    x = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    z = _outputs(module, x)
    k = torch.ones_like(z)
    arguments = [k.clone(), z.clone()]
    system = LayerSystem(module, k, (1, 5, 5), constraints="weight")
    for dense in (True, False):
        system.solve(z, None, dense=dense)
    for a, b in zip(before.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b) and b.requires_grad and b.dtype == torch.float32
    for (name, a), (_, b) in zip(before.named_buffers(), module.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert bool((module[0].weight.grad == 7).all()) and module[1].weight.grad is None
    assert not module.training
    assert torch.equal(k, arguments[0]) and torch.equal(z, arguments[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dense", [True, False])
def test_a_system_stays_on_its_device(dense: bool) -> None:
    module = _seed(nn.Conv2d(2, 8, 3, padding=1), 0)
    x, k, z, g = _problem(module, (2, 6, 6))
    system = LayerSystem(module.cuda(), k.cuda(), (2, 6, 6))
    found = system.solve(z.cuda(), g.cuda(), dense=dense)
    assert found.inputs.is_cuda and found.full_rank
    torch.testing.assert_close(found.inputs.cpu(), x, rtol=1e-9, atol=1e-9)


def test_what_float32_clients_send_is_solved_to_its_own_precision_and_ends() -> None:
    module = _seed(nn.Conv2d(3, 11, 5, stride=2, padding=2), 5)
    x, k, z, g = _problem(module, (3, 24, 24))
    system = LayerSystem(module, k.float(), (3, 24, 24))
    found = system.solve(z.float(), g.float(), dense=False)
    assert found.full_rank and found.converged and found.iterations < 5000
    assert float((found.inputs - x).norm() / x.norm()) < 1e-5
    assert 1e-9 < found.residual < 1e-6
