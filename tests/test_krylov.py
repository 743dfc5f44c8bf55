"""The iteration: its answer against a dense solve, its singular values, its rank test."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradinv_edu.krylov import Rows, cgls, open_share, ritz_values, squared_norm


@dataclass
class Matrix:
    """Two blocks of rows as a linear map."""

    A: Tensor
    split: int

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    def forward(self, x: Tensor) -> Rows:
        y = self.A @ x
        return Rows(y[: self.split], y[self.split :])

    def adjoint(self, r: Rows) -> Tensor:
        return self.A.T @ r.flat()

    def single(self) -> Matrix:
        return Matrix(self.A.float(), self.split)


def _matrix(
    rows: int, columns: int, condition: float, seed: int, rank: int | None = None
) -> Matrix:
    g = torch.Generator().manual_seed(seed)
    M = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), min(rows, columns))
    if rank is not None:
        values[rank:] = 0
    return Matrix(U @ (values.double()[:, None] * Vh), rows // 2)


def _normal(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(A: Matrix, y: Tensor) -> Rows:
    return Rows(y[: A.split].clone(), y[A.split :].clone())


@settings(max_examples=60)
@given(
    columns=st.integers(1, 80),
    spare=st.integers(0, 40),
    condition=st.sampled_from([1.0, 10.0, 100.0]),
    consistent=st.booleans(),
    mixed=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_it_gives_the_answer_of_a_dense_solve(
    columns: int, spare: int, condition: float, consistent: bool, mixed: bool, seed: int
) -> None:
    A = _matrix(columns + spare, columns, condition, seed)
    y = A.A @ _normal(columns, seed + 1) if consistent else _normal(columns + spare, seed + 2)
    run = cgls(A, _rows(A, y), 0.0, 20_000, fast=A.single() if mixed else None)
    expected = torch.linalg.lstsq(A.A, y[:, None], driver="gelsd").solution[:, 0]
    assert float((run.x - expected).norm()) <= 1e-9 * condition * float(expected.norm())
    assert run.converged
    gap = A.adjoint(run.unexplained)
    assert run.norm == pytest.approx(float(gap.norm()), rel=1e-6, abs=1e-300)


def test_float32_steps_take_no_more_iterations_than_float64_ones() -> None:
    A = _matrix(400, 300, 30.0, 3)
    b = _rows(A, A.A @ _normal(300, 1))
    target = 1e-14 * float(A.adjoint(b).norm())
    double = cgls(A, b, target, 5000)
    mixed = cgls(A, b, target, 5000, fast=A.single())
    assert mixed.converged and double.converged
    assert mixed.iterations <= 1.2 * double.iterations
    torch.testing.assert_close(mixed.x, double.x, rtol=1e-11, atol=1e-11)


def test_the_residual_of_the_right_hand_side_is_left_as_it_was() -> None:
    A = _matrix(20, 10, 3.0, 0)
    b = _rows(A, _normal(20, 1))
    before = b.flat().clone()
    cgls(A, b, 0.0, 100, fast=A.single())
    assert torch.equal(b.flat(), before)


def test_where_float32_gets_no_further_float64_goes_on() -> None:
    A = _matrix(120, 100, 1e4, 1)
    x = _normal(100, 2)
    run = cgls(A, _rows(A, A.A @ x), 0.0, 50_000, fast=A.single())
    assert float((run.x - x).norm() / x.norm()) < 1e-8


def test_a_cap_ends_it_and_is_told() -> None:
    A = _matrix(120, 100, 1e4, 1)
    run = cgls(A, _rows(A, A.A @ _normal(100, 2)), 0.0, 12, fast=A.single())
    assert run.iterations == 12 and not run.converged


def test_it_stops_where_the_caller_says_enough() -> None:
    A = _matrix(120, 100, 100.0, 1)
    x = _normal(100, 2)
    near = lambda found: float((found - x).norm()) < 0.1 * float(x.norm())  # noqa: E731
    run = cgls(A, _rows(A, A.A @ x), 0.0, 5000, enough=near)
    full = cgls(A, _rows(A, A.A @ x), 0.0, 5000)
    assert near(run.x) and run.iterations < full.iterations


def test_progress_is_told_the_step_and_the_share_left() -> None:
    A = _matrix(60, 50, 10.0, 1)
    seen: list[tuple[int, float]] = []
    run = cgls(
        A, _rows(A, A.A @ _normal(50, 2)), 0.0, 5000, progress=lambda n, r: seen.append((n, r))
    )
    assert [n for n, _ in seen] == list(range(1, run.iterations + 1))
    assert seen[-1][1] < 1e-12 < seen[0][1]


def test_ritz_values_are_singular_values() -> None:
    A = _matrix(60, 40, 20.0, 5)
    run = cgls(A, _rows(A, _normal(60, 1)), 0.0, 400)
    smallest, largest = ritz_values(run.alphas, run.betas)
    assert largest == pytest.approx(1.0, rel=1e-6)
    assert smallest == pytest.approx(1 / 20, rel=1e-3)
    assert ritz_values([], []) == (0.0, 0.0)


@settings(max_examples=60)
@given(
    columns=st.integers(2, 120),
    missing=st.integers(0, 5),
    condition=st.sampled_from([2.0, 50.0]),
    mixed=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_dye_tells_how_much_is_open(
    columns: int, missing: int, condition: float, mixed: bool, seed: int
) -> None:
    missing = min(missing, columns - 1)
    A = _matrix(columns + 5, columns, condition, seed, columns - missing)
    dye = _normal(columns, seed + 7)
    share, run = open_share(A, dye, 20_000, fast=A.single() if mixed else None)
    seen = torch.linalg.svd(A.A)[2][: columns - missing]
    left = squared_norm(dye - seen.T @ (seen @ dye)) / squared_norm(dye)
    if missing and left > 1e-5:
        assert share == pytest.approx(left, rel=1e-4)
    elif not missing:
        assert share == 0.0 and squared_norm(run.x) < 1e-6
