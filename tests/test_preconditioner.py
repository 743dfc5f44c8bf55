"""The border preconditioner: symmetric, positive definite, the dense answer, and the rank seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import distance, normal
from torch import nn

import gradinv_edu as gi
from gradinv_edu.engine import preconditioner
from gradinv_edu.engine.krylov import Rows, cgls
from gradinv_edu.engine.layers.convolution import ConvolutionOperator
from gradinv_edu.engine.preconditioner import Bordered
from gradinv_edu.engine.segment import within_reach
from gradinv_edu.engine.solve import open_share
from gradinv_edu.systems import LayerSystem, ScaledSystem

# filters, channels, kernel, stride, padding: with and without padding, 1 to 3 missing lines
KINDS = [(16, 3, 4, 2, 1), (10, 7, 3, 1, 1), (8, 5, 5, 1, 2), (16, 3, 7, 2, 3), (6, 4, 3, 1, 0)]


def system(kind: tuple[int, ...], side: int, seed: int = 0) -> LayerSystem:
    filters, channels, kernel, stride, padding = kind
    conv = nn.Conv2d(channels, filters, kernel, stride, padding, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(normal(conv.weight.shape, seed))
    z = conv(torch.zeros(1, channels, side, side, dtype=torch.float64))
    return LayerSystem(conv, normal(z.shape, seed + 1), (channels, side, side))


@pytest.fixture(autouse=True)
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconditioner, "SMALLEST", 24)


def made(layer: LayerSystem) -> Bordered:
    operator = ScaledSystem(layer).operator
    assert isinstance(operator, ConvolutionOperator)
    return Bordered(operator.weight, operator.geometry, layer.input_shape)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_symmetric_and_nearly_the_inverse(kind: tuple[int, ...]) -> None:
    layer = system(kind, 26)
    M = made(layer)
    x, y = normal(layer.like.shape, 2), normal(layer.like.shape, 3)
    assert float((M(x) * y).sum()) == pytest.approx(float((x * M(y)).sum()), rel=1e-3, abs=1e-3)
    A = ScaledSystem(layer.without(gradient=True))
    b = A.forward(x)
    target = 1e-12 * float(A.adjoint(b).norm())
    plain, few = (cgls(A, b, target, 400, precondition=p) for p in (None, M))
    assert few.converged and distance(few.x, x) < 1e-6
    assert 3 * few.iterations < plain.iterations


def test_it_is_positive_definite_and_its_border_is_exact() -> None:
    layer = system(KINDS[0], 16)
    M, A = made(layer), ScaledSystem(layer.without(gradient=True))
    units = torch.eye(layer.unknowns, dtype=torch.float64).reshape(-1, 3, 16, 16)
    inverse = M(units).flatten(1)
    W = A.matrix()[: layer.weight_equations]
    L = torch.linalg.cholesky(W.T @ W)
    spread = torch.linalg.eigvalsh(L.T @ ((inverse + inverse.T) / 2) @ L)
    assert float(spread[0]) > 0.1 and float(spread[-1]) < 3
    assert float(((spread - 1).abs() < 0.2).double().mean()) > 0.85


@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    side=st.integers(24, 30),
    damage=st.sampled_from(["none", "channel", "filters", "alike"]),
    seed=st.integers(0, 999),
)
def test_the_rank_is_that_of_a_plain_test(
    kind: tuple[int, ...], side: int, damage: str, seed: int
) -> None:
    layer = system(kind, side, seed)
    W = layer.module.weight
    with torch.no_grad():
        if damage == "channel":  # a channel that no filter sees
            W[:, 0] = 0
        elif damage == "filters":  # so few alive that equations are too few
            W[2:] = 0
        elif damage == "alike":  # two channels that no filter tells apart
            W[:, 1] = W[:, 0]
    layer = LayerSystem(layer.module, layer.k, layer.input_shape).without(gradient=True)
    M, A = made(layer), ScaledSystem(layer)
    dye = normal(layer.like.shape, seed + 5)
    left, _ = open_share(A, dye, 400, precondition=M)
    assert (left > 0) == (damage != "none")


def test_a_solve_with_it_gives_the_input_and_one_without_rank_the_least_norm() -> None:
    layer = system(KINDS[1], 26)
    x = normal(layer.like.shape, 4)
    z, G = layer.matvec(x)
    found = layer.solve(z, G)
    assert found.full_rank and distance(found.x, x) < 1e-10 and found.iterations < 150
    plain = layer.solve(z, G, max_iterations=20_000)  # a cap is of plain steps
    assert plain.iterations > 150
    with torch.no_grad():
        layer.module.weight[:, 1] = layer.module.weight[:, 0]
    alike = LayerSystem(layer.module, layer.k, layer.input_shape)
    found = alike.without(gradient=True).solve(alike.matvec(x)[0], None)
    mean = (x[:, 0] + x[:, 1]) / 2
    assert not found.full_rank and found.residual < 1e-12
    assert distance(found.x[:, 0], mean) < 1e-3 and distance(found.x[:, 2:], x[:, 2:]) < 1e-6


def test_what_it_is_not_made_for_has_none() -> None:
    few, small = system((11, 3, 4, 2, 1), 26), system(KINDS[0], 16)
    assert Bordered.of(ScaledSystem(system(KINDS[0], 26)).operator) is not None
    assert Bordered.of(ScaledSystem(few).operator) is None
    assert Bordered.of(ScaledSystem(small).operator) is None
    assert Bordered.of(nn.Linear(2, 2)) is None


def test_an_iteration_ends_where_a_preconditioner_is_not_definite() -> None:
    layer = system(KINDS[0], 24)
    A = ScaledSystem(layer)
    b = A.forward(normal(layer.like.shape, 1))
    run = cgls(A, b, 0.0, 100, precondition=lambda s: -s)
    assert not run.converged and run.iterations == 0
    assert isinstance(run.unexplained, Rows)


@pytest.mark.parametrize(("unknowns", "spare", "within"), [
    (25_000, 32, False), (25_000, 2_000, True), (6_000, 0, True), (6_000, -1, False),
])  # fmt: skip
def test_a_joint_solve_is_begun_only_where_steps_suffice(
    unknowns: int, spare: int, within: bool
) -> None:
    assert within_reach(unknowns, spare) == within


def test_equations_of_which_a_few_changed_start_from_the_answer_before() -> None:
    layer = system(KINDS[0], 26)
    x = normal(layer.like.shape, 4)
    z, G = layer.matvec(x)
    first = layer.solve(z, G + 1e-3 * normal(G.shape, 5), max_iterations=10_000)
    again = layer.solve(z, G, before=first)
    assert again.full_rank and distance(again.x, x) < 1e-10
    # no second dye: the first one's value, or what these steps see below it
    low, known = again.smallest_singular_value, first.smallest_singular_value
    assert 0.99 * known <= low <= known
    cold = layer.solve(z, G, max_iterations=10_000)
    assert again.iterations - first.iterations < 0.7 * cold.iterations


def test_a_recovery_that_runs_out_of_time_says_so_and_gives_what_it_has() -> None:
    net = gi.models.lenet((3, 16, 16), dtype=torch.float64)
    photo, loss = gi.data.photo("cat", 16, dtype=torch.float64), nn.CrossEntropyLoss()
    update = gi.observe(net, loss, photo, torch.tensor([1]))
    ended = gi.recover(net, update, (3, 16, 16), loss, seconds=0)
    assert ended.ran_out and not ended.exact and bool(ended.inputs.isnan().all())
    assert ended.inputs.shape == photo.shape and "ran out" in str(ended)
    whole = gi.recover(net, update, (3, 16, 16), loss, seconds=600)
    assert whole.exact and not whole.ran_out
    with pytest.raises(gi.errors.InvalidArgumentError, match="seconds"):
        gi.recover(net, update, (3, 16, 16), loss, seconds=-1)
