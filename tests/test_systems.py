"""What a server knows of a layer, with masks, batches, units, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import Shape, distance, mask, normal, problem
from torch import Tensor, nn

from gradinv_edu.engine.solve import rank_of
from gradinv_edu.errors import InvalidTensorError, UnsupportedLayerError
from gradinv_edu.systems import LayerSystem, ScaledSystem

CONV = nn.Conv2d(1, 4, 3, padding=1)


# --- the solution -------------------------------------------------------------------------------


def test_what_an_output_has_gathered_above_stays_out_of_a_small_map() -> None:
    p = problem(nn.Conv2d(2, 9, 3, padding=1), (2, 4, 4), seed=3)
    found = p.system().solve(p.z + 1e-3 * normal(p.z.shape, 2), p.gradient)
    assert found.full_rank and found.residual > 1e-5  # of all rows, those of z too
    assert found.iterations == 0 and distance(found.x, p.x) < 1e-11


DETERMINED: dict[str, tuple[nn.Module, Shape]] = {
    "strided": (nn.Conv2d(2, 9, 4, stride=2, padding=1), (2, 6, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 5, 5)),
    "3d": (nn.Conv3d(1, 3, 2), (1, 4, 4, 4)),
    "circular": (nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), (1, 6, 6)),
    "conv, pool": (nn.Sequential(nn.Conv2d(1, 9, 3, padding=1), nn.AvgPool2d(2)), (1, 6, 6)),
    "norm": (nn.BatchNorm2d(2).eval(), (2, 4, 4)),
}


@pytest.mark.parametrize("name", DETERMINED)
def test_a_determined_layer_gives_its_input_and_lstsq_s_answer_under_noise(name: str) -> None:
    p = problem(*DETERMINED[name], seed=3)
    system = p.system()
    z = p.z + 0.1 * normal(p.z.shape, 2)
    g = p.gradient + 0.1 * normal(p.gradient.shape, 3)
    A, b = system.to_dense(scaled=True), system.right_hand_side(z, g).flat()
    wanted = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
    rest = float((b - A @ wanted).norm() / b.norm())
    for dense in (True, False):
        found = system.solve(p.z, p.gradient, dense=dense)
        assert found.full_rank and found.residual < 1e-13 and distance(found.x, p.x) < 1e-11
        noisy = system.solve(z, g, dense=dense)
        assert distance(noisy.x, wanted) < 1e-9
        assert noisy.residual == pytest.approx(rest, rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_groups_of_channels_are_blocks_of_the_matrix(masked: bool) -> None:
    conv = nn.Conv2d(6, 12, 3, groups=3, stride=2, padding=1, dtype=torch.float64)
    k = normal((1, 12, 3, 3), 1)
    system = ScaledSystem(LayerSystem(conv, k, (6, 5, 5), mask(k.shape, 2) if masked else None))
    blocks, whole = system.blocks(3), system.matrix()
    assert blocks.numel() == whole.numel() / 3
    values = torch.linalg.svdvals(blocks).flatten().sort(descending=True).values
    assert distance(values, torch.linalg.svdvals(whole)) < 1e-13
    assert rank_of(blocks) == rank_of(whole)


def test_a_sample_without_its_batch_dimension() -> None:
    p = problem(CONV, (1, 5, 5))
    system = LayerSystem(p.module, p.k[0], (1, 5, 5), torch.ones_like(p.k[0]))
    assert distance(system.solve(p.z[0], p.gradient).x, p.x) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_is_solved_in_double(dtype: torch.dtype) -> None:
    p = problem(CONV, (1, 5, 5))
    system = LayerSystem(p.module, p.k.to(dtype), (1, 5, 5))
    found = system.solve(p.z.to(dtype), p.gradient.to(dtype)).x
    assert found.dtype == torch.float64
    assert distance(found, p.x) < 100 * torch.finfo(dtype).eps


def test_what_float32_clients_send_is_solved_to_its_own_precision_and_ends() -> None:
    p = problem(nn.Conv2d(3, 11, 5, stride=2, padding=2), (3, 24, 24), seed=5)
    system = LayerSystem(p.module, p.k.float(), (3, 24, 24))
    found = system.solve(p.z.float(), p.gradient.float(), dense=False)
    assert found.full_rank and found.iterations < 5000
    assert distance(found.x, p.x) < 1e-5 and 1e-9 < found.residual < 1e-6


def test_more_equations_than_unknowns_are_no_proof_of_rank() -> None:
    pooled = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 8, 1))  # eight filters, one value each
    p = problem(pooled, (1, 4, 4), seed=1)
    system = p.system()
    assert system.equations == 40 > system.unknowns
    assert not any(system.solve(p.z, p.gradient, dense=d).full_rank for d in (True, False))


# --- masks, sets of constraints, batches, units -------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_masked_entries_may_be_anything(dense: bool) -> None:
    p = problem(nn.Conv2d(2, 12, 3, padding=1), (2, 6, 6), seed=6)
    rows, some = mask(p.k.shape, 1) > 0, mask(p.gradient.shape, 2)
    z, g = torch.where(rows, p.z, torch.nan), torch.where(some > 0, p.gradient, torch.inf)
    system = p.system(rows, some)
    assert system.weight_equations == int(rows.sum())
    assert system.gradient_equations == int((some > 0).sum())
    found = system.solve(z, g, dense=dense)
    assert found.full_rank and distance(found.x, p.x) < 1e-9


def test_a_mask_between_zero_and_one_weighs() -> None:
    p, weights = problem(nn.Linear(3, 5), (3,)), torch.linspace(0.1, 1, 5).double()[None]
    z = p.z + normal(p.z.shape, 4)
    found = p.system(weights).solve(z, None).x
    A, b = weights.T * p.module.weight.detach(), (weights * (z - p.module.bias.detach())).T
    torch.testing.assert_close(found, torch.linalg.lstsq(A, b).solution.T)


@pytest.mark.parametrize("dense", [True, False])
def test_one_set_of_constraints_alone(dense: bool) -> None:
    p = problem(nn.Conv2d(1, 4, 3), (1, 6, 6))  # 36 unknowns: 64 weight, 36 gradient equations
    system = p.system()
    assert (system.weight_equations, system.gradient_equations) == (64, 36)
    less = system.without(weight=True), system.without(gradient=True)
    assert [s.equations for s in less] == [36, 64] and system.equations == 100
    for z, g in ((p.z, None), (None, p.gradient)):
        found = system.solve(z, g, dense=dense)
        assert found.full_rank and distance(found.x, p.x) < 1e-6
    nothing = p.system(0 * p.k).solve(p.z, None, dense=dense)
    assert not nothing.full_rank and not nothing.x.any()


def test_batches_share_gradient_constraints() -> None:
    p = problem(nn.Conv2d(2, 8, 3, padding=1), (2, 4, 4), batch=3, seed=4)
    system = p.system()
    assert (system.unknowns, system.gradient_equations) == (96, 144)
    assert all(distance(system.solve(p.z, p.gradient, dense=d).x, p.x) < 1e-9 for d in (1, 0))
    rows = torch.zeros_like(p.k)
    rows[0] = 1  # the first sample's outputs alone: 144 shared equations for the other two
    assert distance(p.system(rows).solve(p.z, p.gradient).x, p.x) < 1e-9
    fewer = torch.ones_like(p.gradient)
    fewer[4:] = 0  # 72 of them
    assert not p.system(0 * rows, fewer).solve(p.z, p.gradient).full_rank


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_row_scaling_makes_the_answer_and_the_work_free_of_units(size: float) -> None:
    p = problem(nn.Conv2d(2, 4, 3, padding=1), (2, 8, 8), seed=1)
    system = LayerSystem(p.module, size * p.k, (2, 8, 8))
    scale = p.module.weight.detach().norm() / (size * p.k).norm()
    assert system.gradient_scale == pytest.approx(float(scale))
    found = system.solve(p.z, size * p.gradient, dense=False)
    same = p.system().solve(p.z, p.gradient, dense=False)
    assert abs(found.iterations - same.iterations) <= 0.1 * same.iterations + 2
    assert distance(found.x, p.x) < 1e-9
    scaled, plain = (torch.linalg.cond(system.to_dense(scaled=s)) for s in (True, False))
    assert float(scaled) <= 1.05 * float(plain)


# --- what is refused, and what is left alone ----------------------------------------------------

ONES, K, W = torch.ones, torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3)
BAD = torch.full((1, 2, 3, 3), torch.nan)


def made(k: object = K, shape: Shape = (1, 5, 5), **masks: Tensor) -> LayerSystem:
    return LayerSystem(nn.Conv2d(1, 2, 3), k, shape, **masks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: made(ONES(1, 2, 4, 4)), r"output_gradient has shape \(1, 2, 4, 4\).*\(N, 2, 3, 3"),
        (lambda: made(BAD), "output_gradient has 18 NaN or infinite"),
        (lambda: made(K.long()), r"output_gradient has dtype torch\.int64"),
        (lambda: made(ONES(0, 2, 3, 3)), "output_gradient is empty"),
        (lambda: made([1.0]), r"output_gradient must be a torch\.Tensor, got list"),
        (lambda: made(shape=(3, 5, 5)), r"does not take inputs of shape \(3, 5, 5\)"),
        (lambda: made(row_mask=ONES(3)), r"row_mask has shape \(3,\), expected \(1, 2, 3, 3\)"),
        (lambda: made(row_mask=BAD), "row_mask has 18 NaN"),
        (lambda: made(gradient_mask=ONES(2, 1)), r"gradient_mask has shape \(2, 1\)"),
        (lambda: made().solve(ONES(1, 2, 9), W), r"outputs has shape \(1, 1, 2, 9\)"),
        (lambda: made().solve(K, ONES(18)), r"weight_gradient has shape \(18,\)"),
        (lambda: made().solve(BAD, W), "outputs has 18 NaN"),
        (lambda: made().solve(K, W / 0), "weight_gradient has 18 NaN or infinite"),
        (lambda: made().solve(K, "W"), r"weight_gradient must be a torch\.Tensor, got str"),
        (lambda: made().solve(None, None), "both None: nothing is known"),
    ],
)
def test_bad_tensors_are_refused_by_name(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidTensorError, match=says):
        call()


def hidden(inner: nn.Module) -> nn.Module:
    """In a module whose own mode says nothing of what is inside."""
    outer = nn.Sequential(inner)
    outer.training = False
    return outer


AFFINE, RANDOM = "not affine in its input", "in train mode"


@pytest.mark.parametrize(
    ("module", "says"),
    [
        *((m, AFFINE) for m in (nn.ReLU(), nn.MaxPool2d(2, 1), nn.InstanceNorm2d(2))),
        *((nn.Sequential(m), AFFINE) for m in (nn.Sigmoid(), nn.LeakyReLU(0.2))),
        *((m, RANDOM) for m in (nn.BatchNorm2d(2), nn.Dropout(0.5))),
        *((hidden(m), RANDOM) for m in (nn.BatchNorm2d(2), nn.Dropout(0.5))),
    ],
)
def test_what_is_not_affine_is_refused_before_it_is_changed(module: nn.Module, says: str) -> None:
    module = module.double()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(UnsupportedLayerError, match=says):
        LayerSystem(module, ONES(1, 2, 4, 4), (2, 4, 4))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_the_layer_and_the_arguments_are_left_alone() -> None:
    module = nn.Sequential(nn.Conv2d(1, 9, 3, padding=1), nn.BatchNorm2d(9)).eval()
    module[0].weight.grad = torch.full_like(module[0].weight, 7.0)
    before, state = copy.deepcopy(module), torch.get_rng_state()
    z = module(normal((1, 1, 5, 5), 0).float()).detach()
    k, arguments = torch.ones_like(z), [torch.ones_like(z), z.clone()]
    for dense in (True, False):
        LayerSystem(module, k, (1, 5, 5)).solve(z, None, dense=dense)
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    assert bool((module[0].weight.grad == 7).all()) and module[1].weight.grad is None
    assert not module.training and torch.equal(state, torch.get_rng_state())
    assert torch.equal(k, arguments[0]) and torch.equal(z, arguments[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dense", [True, False])
def test_a_system_stays_on_its_device(dense: bool) -> None:
    p = problem(nn.Conv2d(2, 8, 3, padding=1), (2, 6, 6))
    z, g = p.z.cuda(), p.gradient.cuda()
    system = LayerSystem(p.module.cuda(), p.k.cuda(), (2, 6, 6))
    found = system.solve(z, g, dense=dense)
    assert found.x.is_cuda and found.full_rank and distance(found.x.cpu(), p.x) < 1e-9
