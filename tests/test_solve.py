"""Least squares, dense and matrix-free: the answer of a dense solver, and the truth about rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import distance, normal
from torch import Tensor

from gradinv_edu.engine.gauss_newton import Linearised, gauss_newton
from gradinv_edu.engine.krylov import Rows, cgls, open_share, ritz_values, squared_norm
from gradinv_edu.engine.solve import (
    Preconditioned,
    extreme_eigenvalues,
    inertia_rank,
    least_squares,
    rank_of,
    rank_test,
)


@dataclass
class Matrix:
    """Two blocks of rows as a linear map."""

    A: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def like(self) -> Tensor:
        return torch.zeros_like(self.A[0])

    def rows(self, y: Tensor) -> Rows:
        half = len(self.A) // 2
        return Rows(y[:half].clone(), y[half:].clone())

    def forward(self, x: Tensor) -> Rows:
        return self.rows(self.A @ x)

    def adjoint(self, r: Rows) -> Tensor:
        return self.A.T @ r.flat()

    def to(self, dtype: torch.dtype) -> Matrix:
        return Matrix(self.A.to(dtype))

    def matrix(self) -> Tensor:
        return self.A


def matrix(rows: int, columns: int, condition: float, seed: int, rank: int | None = None) -> Matrix:
    """Singular values from 1 down to ``1/condition``; zeros beyond the rank."""
    U, _, Vh = torch.linalg.svd(normal((rows, columns), seed), full_matrices=False)
    values = torch.logspace(0, -math.log10(condition), rank or len(Vh), dtype=torch.float64)
    return Matrix((U[:, : len(values)] * values) @ Vh[: len(values)])


MIXED = st.booleans()


# --- conjugate gradients ------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    columns=st.integers(1, 80),
    spare=st.integers(0, 40),
    condition=st.sampled_from([1.0, 10.0, 100.0]),
    consistent=st.booleans(),
    mixed=MIXED,
    seed=st.integers(0, 9999),
)
def test_it_gives_the_answer_of_a_dense_solve(
    columns: int, spare: int, condition: float, consistent: bool, mixed: bool, seed: int
) -> None:
    A = matrix(columns + spare, columns, condition, seed)
    y = A.A @ normal((columns,), seed + 1) if consistent else normal((columns + spare,), seed + 2)
    b = A.rows(y)
    run = cgls(A, b, 0.0, 20_000, fast=A.to(torch.float32) if mixed else None)
    wanted = torch.linalg.lstsq(A.A, y[:, None], driver="gelsd").solution
    assert run.converged and distance(run.x, wanted) <= 1e-9 * condition
    gap = float(A.adjoint(run.unexplained).norm())
    assert run.norm == pytest.approx(gap, rel=1e-6, abs=1e-300)
    assert torch.equal(b.flat(), y)  # the right-hand side is left as it was


def test_float32_steps_take_no_more_iterations_than_float64_ones() -> None:
    A = matrix(400, 300, 30.0, 3)
    b = A.forward(normal((300,), 1))
    target = 1e-14 * float(A.adjoint(b).norm())
    double, mixed = (cgls(A, b, target, 5000, fast=fast) for fast in (None, A.to(torch.float32)))
    assert mixed.converged and double.converged
    assert mixed.iterations <= 1.2 * double.iterations
    assert distance(mixed.x, double.x) < 1e-11


def test_where_float32_gets_no_further_float64_goes_on() -> None:
    A, x = matrix(120, 100, 1e4, 1), normal((100,), 2)
    run = cgls(A, A.forward(x), 0.0, 50_000, fast=A.to(torch.float32))
    assert distance(run.x, x) < 1e-8


@pytest.mark.parametrize("condition", [3.0, 100.0, 3000.0])
def test_noise_ends_it_early_but_no_nearer_to_it_than_a_third(condition: float) -> None:
    A, x, noise = matrix(150, 100, condition, 1), normal((100,), 2), 1e-5
    y = A.A @ x
    e = normal((150,), 3)
    b = A.rows(y + noise * y.norm() / e.norm() * e)
    early, late = (least_squares(A, b, noise=n, dense=False) for n in (noise, 0.0))
    assert early.iterations < 0.85 * late.iterations
    assert distance(early.x, late.x) <= 0.34 * noise * condition * float(y.norm() / x.norm())


def test_a_cap_is_told_and_so_is_enough_and_progress() -> None:
    A, x = matrix(120, 100, 100.0, 1), normal((100,), 2)
    seen: list[tuple[int, float]] = []
    full = cgls(A, A.forward(x), 0.0, 5000, progress=lambda n, share: seen.append((n, share)))
    assert [n for n, _ in seen] == list(range(1, full.iterations + 1))
    assert seen[-1][1] < 1e-12 < seen[0][1]
    cut = cgls(A, A.forward(x), 0.0, 12, fast=A.to(torch.float32))
    assert cut.iterations == 12 and not cut.converged
    early = cgls(A, A.forward(x), 0.0, 5000, enough=lambda found: distance(found, x) < 0.1)
    assert distance(early.x, x) < 0.1 and early.iterations < full.iterations
    found = least_squares(A, A.forward(x), dense=False, cap=12)
    assert not found.converged and not found.full_rank and found.condition == math.inf


def test_ritz_values_are_singular_values() -> None:
    A = matrix(60, 40, 20.0, 5)
    run = cgls(A, A.rows(normal((60,), 1)), 0.0, 400)
    smallest, largest = ritz_values(run.alphas, run.betas)
    assert largest == pytest.approx(1.0, rel=1e-6) and smallest == pytest.approx(1 / 20, rel=1e-3)
    assert ritz_values([], []) == (0.0, 0.0) and ritz_values([4.0], [0.0]) == (0.5, 0.5)


# --- rank ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    columns=st.integers(2, 120),
    missing=st.integers(0, 5),
    condition=st.sampled_from([2.0, 50.0]),
    mixed=MIXED,
    seed=st.integers(0, 9999),
)
def test_a_random_start_keeps_what_the_equations_do_not_see(
    columns: int, missing: int, condition: float, mixed: bool, seed: int
) -> None:
    rank = max(columns - missing, 1)
    A, dye = matrix(columns + 5, columns, condition, seed, rank), normal((columns,), seed + 7)
    share, run = open_share(A, dye, 20_000, fast=A.to(torch.float32) if mixed else None)
    seen = torch.linalg.svd(A.A)[2][:rank]
    left = squared_norm(dye - seen.T @ (seen @ dye)) / squared_norm(dye)
    if rank == columns:
        assert share == 0.0 and squared_norm(run.x) < 1e-6
    elif left > 1e-5:
        assert share == pytest.approx(left, rel=1e-4)


@settings(max_examples=60)
@given(
    columns=st.integers(2, 60),
    rows=st.integers(2, 60),
    missing=st.integers(0, 3),
    seed=st.integers(0, 9999),
)
def test_dense_and_matrix_free_tell_one_rank_and_one_least_norm_answer(
    columns: int, rows: int, missing: int, seed: int
) -> None:
    rank = max(min(rows, columns) - missing, 1)
    A = matrix(rows, columns, 20.0, seed, rank)
    b = A.rows(normal((rows,), seed + 1))
    wanted = torch.linalg.lstsq(A.A, b.flat()[:, None], driver="gelsd").solution[:, 0]
    rest = float((b.flat() - A.A @ wanted).norm() / b.flat().norm())
    assert rank_of(A.A) == inertia_rank(A.A) == rank
    for dense in (True, False):
        found = least_squares(A, b, dense=dense)
        assert found.full_rank == (rank == columns) and found.converged
        # float32's rounding of what no answer explains drifts where no equation looks
        assert distance(found.x, wanted) < (1e-6 if rank == columns else 1e-3)
        assert found.residual == pytest.approx(rest, rel=1e-6, abs=1e-12)
        assert found.largest_singular_value == pytest.approx(1.0, rel=0.2)
        assert (found.iterations == 0) == dense
    exact = least_squares(A, b, dense=True)
    assert exact.undetermined == pytest.approx(1 - rank / columns)
    if rank == columns > 1:
        assert exact.condition == pytest.approx(20.0)


@pytest.mark.parametrize("missing", [1, 2, 5, 20])
def test_a_single_missing_equation_is_seen_among_hundreds(missing: int) -> None:
    Q, x = torch.linalg.qr(normal((300, 300), 1)).Q, normal((300,), 2)
    A = Matrix(Q[missing:])  # well conditioned: only the missing rows take rank away
    found = least_squares(A, A.forward(x), dense=False)
    assert not found.full_rank
    assert found.residual < 1e-13  # small, and yet the answer is wrong
    assert distance(found.x, x) > 1e-3
    assert distance(found.x, Q[missing:].T @ (Q[missing:] @ x)) < 1e-6
    assert 0 < found.undetermined < 8 * missing / 300  # chi-squared with ``missing`` degrees
    assert rank_of(A.A) == inertia_rank(A.A) == 300 - missing


def test_the_random_start_comes_from_the_generator_and_does_not_change_the_answer() -> None:
    A, x, state = matrix(60, 50, 10.0, 1), normal((50,), 2), torch.get_rng_state()
    answers = []
    for seed in (1, 1, 2, None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        answers.append(least_squares(A, A.forward(x), dense=False, generator=generator))
    assert all(distance(found.x, x) < 1e-10 and found.full_rank for found in answers)
    left = [rank_test(A, generator=torch.Generator().manual_seed(s)).x for s in (1, 1, 2)]
    assert torch.equal(left[0], left[1]) and not torch.equal(left[0], left[2])
    assert torch.equal(state, torch.get_rng_state())


def test_zero_equations_have_rank_zero_and_zero_for_an_answer() -> None:
    A = Matrix(torch.zeros(6, 4, dtype=torch.float64))
    for dense in (True, False):
        found = least_squares(A, A.rows(torch.zeros(6, dtype=torch.float64)), dense=dense)
        assert not found.full_rank and not found.x.any() and found.residual == 0
    assert rank_of(A.A) == inertia_rank(A.A) == 0


def test_extreme_eigenvalues_bracket_the_spectrum() -> None:
    A = matrix(60, 40, 30.0, 2).A
    gram = A.T @ A
    low, high = extreme_eigenvalues(gram, torch.linalg.cholesky(gram))
    assert 1 / 900 <= low * (1 + 1e-9) < 2 / 900 and 0.7 < high <= 1 + 1e-9


# --- equations that are not linear --------------------------------------------------------------


def bend(A: Tensor, split: int) -> tuple[Tensor, ...]:
    def rows(x: Tensor) -> Rows:
        y = A @ x.reshape(-1)
        return Rows(torch.sinh(y[:split]), (y[split:] ** 3 + y[split:]).reshape(-1, 1))

    return rows  # type: ignore[return-value]


@pytest.mark.parametrize("split", [0, 4, 9])
def test_a_linearisation_is_the_derivative_and_keeps_the_adjoint_law(split: int) -> None:
    rows, x = bend(matrix(9, 6, 5.0, 0).A, split), normal((1, 2, 3), 1)  # type: ignore[arg-type]
    at, d = Linearised(rows, x), normal((1, 2, 3), 2)
    pushed = at.forward(d)
    r = Rows(normal(pushed.z.shape, 3), normal(pushed.g.shape, 4))
    left, right = float(pushed.flat() @ r.flat()), float((d * at.adjoint(r)).sum())
    assert left == pytest.approx(right, rel=1e-12)
    plus, minus = (rows(x + h * d).flat() for h in (1e-5, -1e-5))
    torch.testing.assert_close(pushed.flat(), (plus - minus) / 2e-5, rtol=1e-7, atol=1e-8)
    assert torch.equal(at.value.flat(), rows(x).flat())
    units = torch.eye(6, dtype=torch.float64).reshape(6, 1, 2, 3)
    one_by_one = torch.stack([at.forward(unit).flat() for unit in units])
    torch.testing.assert_close(at.columns(units), one_by_one)


def test_rows_that_do_not_depend_on_the_input_have_no_derivative() -> None:
    constant = torch.ones(2, dtype=torch.float64)
    at = Linearised(lambda x: Rows(2 * x, constant), normal((3,), 0))
    assert at.forward(constant.new_ones(3)).flat().tolist() == [2, 2, 2, 0, 0]
    assert at.adjoint(Rows(constant.new_ones(3), constant)).tolist() == [2, 2, 2]


def test_a_preconditioner_changes_the_way_and_not_the_answer() -> None:
    A, x = matrix(80, 60, 1e3, 1), normal((60,), 2)
    L = torch.linalg.cholesky(A.A.T @ A.A)
    undo = lambda y: torch.linalg.solve_triangular(L.T, y[:, None], upper=True)[:, 0]  # noqa: E731
    undo_transposed = lambda s: torch.linalg.solve_triangular(L, s[:, None], upper=False)[:, 0]  # noqa: E731
    made = Preconditioned(A, undo, undo_transposed)
    b, y = A.forward(x), normal((60,), 3)
    left, right = float(made.forward(y).flat() @ b.flat()), float(y @ made.adjoint(b))
    assert left == pytest.approx(right, rel=1e-9)
    target = 1e-12 * float(made.adjoint(b).norm())
    run = cgls(made, b, target, 500)
    assert run.iterations < 10 and distance(undo(run.x), x) < 1e-8


def test_gauss_newton_solves_and_stops_where_no_step_helps() -> None:
    rows, x = bend(matrix(9, 6, 3.0, 0).A, 5), normal((6,), 1)  # type: ignore[arg-type]
    sent, seen = rows(x), []

    def rest(at: Tensor) -> Rows:
        found = rows(at)
        return Rows(sent.z - found.z, sent.g - found.g)

    def step(at: Tensor, r: Rows, norm: float) -> Tensor:
        assert norm == pytest.approx(math.sqrt(r.squared_norm()))
        run = cgls(Linearised(rows, at), r, 0.0, 100)
        return run.x

    begun = x + 0.5 * normal((6,), 2)
    found, norms = gauss_newton(rest, step, begun, progress=lambda *told: seen.append(told))
    assert distance(found, x) < 1e-12
    assert norms == sorted(norms, reverse=True) and seen[0] == (1, norms[1])
    _, norms = gauss_newton(rest, step, begun, target=1e-3)
    assert norms[-1] <= 1e-3 < norms[-2]
    assert len(gauss_newton(rest, step, begun, rounds=2)[1]) == 3
    away = gauss_newton(rest, lambda x, r, n: -step(x, r, n), begun)  # up the hill
    assert torch.equal(away[0], begun) and len(away[1]) == 1
    # a step too long is halved until it helps
    long = gauss_newton(rest, lambda x, r, n: 5 * step(x, r, n), begun, rounds=1)
    assert len(long[1]) == 2 and long[1][1] < long[1][0]
