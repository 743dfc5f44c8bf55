"""Sparse directions: what a column space says of the zeros in it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradinv_edu.engine.low_rank import low_rank_factors, machine_epsilon
from gradinv_edu.engine.sparse import null_vectors, sparse_basis, sparse_directions
from gradinv_edu.engine.witness import NonzeroRows
from gradinv_edu.errors import (
    InconsistentGradientError,
    InvalidArgumentError,
    InvalidTensorError,
    NotRecoveredError,
    UnknownNameError,
    VanishingGradientError,
)


def _mixed(m: int, n: int, N: int, seed: int, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """``K X`` and ``K``, whose columns are zero in about ``share`` of the rows."""
    g = torch.Generator().manual_seed(seed)
    K = torch.randn(m, N, generator=g).double() * (torch.rand(m, N, generator=g) > share)
    return K @ torch.randn(N, n, generator=g).double(), K


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """Cosines between the columns of ``a`` and of ``b``."""
    return ((a / a.norm(dim=0)).T @ (b / b.norm(dim=0))).abs()


def _of(left: Tensor, K: Tensor) -> Tensor:
    """Directions of the columns of ``K``, as rows of length one."""
    q = torch.linalg.lstsq(left, K).solution.T
    return q / q.norm(dim=1, keepdim=True)


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_factors_give_the_matrix_back_and_both_spaces(N: int, seed: int) -> None:
    G, K = _mixed(60, 30, N, seed)
    f = low_rank_factors(G, N)
    assert torch.allclose(f.left * f.values @ f.right * G.abs().max(), G, atol=1e-10)
    assert torch.allclose(f.left @ (f.left.T @ K), K, atol=1e-10)
    assert torch.equal(f.living, (G != 0).any(dim=1))


@given(st.integers(2, 10), st.integers(0, 10_000))
def test_a_draw_vanishes_on_its_rows(N: int, seed: int) -> None:
    f = low_rank_factors(_mixed(400, 20, N, seed)[0], N)
    q = null_vectors(f.left[f.living], 50, torch.Generator().manual_seed(seed))
    zeros = ((q @ f.left[f.living].T).abs() < 1e-9).sum(dim=1)
    assert float((zeros >= N - 1).double().mean()) > 0.7  # all but those with a row drawn twice


def test_rows_in_which_one_sample_is_off_give_its_direction() -> None:
    G, K = _mixed(400, 20, 3, 1)
    f = low_rank_factors(G, 3)
    hits = _alike(f.left @ null_vectors(f.left[f.living], 200).T, K) > 1 - 1e-12
    # about 3/4 · P(both rows have this one off): a quarter of the draws would be many
    assert bool(hits.any(dim=0).all())
    assert 0.2 < float(hits.any(dim=1).double().mean()) < 0.9


@settings(max_examples=12)
@given(st.integers(2, 9), st.integers(0, 10_000), st.sampled_from(["descent", "sampling"]))
def test_the_basis_is_the_sparse_factor_up_to_order_and_length(
    N: int, seed: int, method: str
) -> None:
    G, K = _mixed(160, 30, N, seed)
    f = low_rank_factors(G, N)
    closest = _alike(f.left @ sparse_basis(f, method=method), K).max(dim=1)
    assert bool((closest.values > 1 - 1e-12).all())
    assert sorted(closest.indices.tolist()) == list(range(N))


@settings(max_examples=25)
@given(st.integers(2, 8), st.integers(0, 10_000))
def test_mixtures_are_never_witnessed(N: int, seed: int) -> None:
    G, K = _mixed(120, 30, N, seed)
    f = low_rank_factors(G, N)
    rows = NonzeroRows(f)
    q = rows.witnessed(null_vectors(rows.left, 1000, torch.Generator().manual_seed(seed)))
    assert bool((_alike(f.left @ q.T, K).max(dim=1).values > 1 - 1e-9).all())


def test_a_direction_that_hangs_on_one_row_is_no_witness() -> None:
    """Two samples cancel in one row: more zeros than N − 1, and still a mixture."""
    G, K = _mixed(200, 30, 4, 3)
    f = low_rank_factors(G, 4)
    rows, row = NonzeroRows(f), int(((K[:, 0] != 0) & (K[:, 1] != 0)).nonzero()[0])
    mixture = _of(f.left, (K[:, 0] / K[row, 0] - K[:, 1] / K[row, 1])[:, None])
    assert int(rows.zeros(mixture).sum()) > 4
    assert len(rows.witnessed(mixture)) == 0
    assert len(rows.witnessed(_of(f.left, K[:, :1]))) > 0


def test_few_zeros_that_never_meet_are_no_sign_of_mixtures() -> None:
    """A tenth of 60 rows each: that both are zero in one row is not to be expected."""
    K = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).double()
    for sample in range(3):
        K[6 * sample : 6 * sample + 6, sample] = 0.0
    f = low_rank_factors(K @ torch.linalg.qr(K[:20].T.double())[1], 3)
    assert NonzeroRows(f).ambiguity(_of(f.left, K)) == ""


def test_what_is_known_is_not_found_again() -> None:
    G, K = _mixed(200, 30, 6, 4)
    f = low_rank_factors(G, 6)
    q = sparse_directions(f.left[f.living], 16, known=_of(f.left, K[:, :5]))
    alike = _alike(f.left @ q.T, K)
    assert bool((alike[:, 5] > 1 - 1e-9).all())
    assert bool((alike[:, :5] < 0.999).all())


def _dense() -> Tensor:
    return _mixed(100, 30, 5, 5, share=0.0)[0]


def _always_on() -> Tensor:
    """One sample is on in every row."""
    G, K = _mixed(150, 30, 4, 6)
    X = torch.linalg.lstsq(K, G).solution
    K[:, 2] = torch.randn(150, generator=torch.Generator().manual_seed(1)).double()
    return K @ X


def _same_zeros() -> Tensor:
    """Two samples are on in the same rows."""
    G, K = _mixed(150, 30, 4, 7)
    X = torch.linalg.lstsq(K, G).solution
    noise = torch.randn(150, generator=torch.Generator().manual_seed(1)).double()
    K[:, 3] = noise * (K[:, 2] != 0)
    return K @ X


def _one_output() -> Tensor:
    """There ``k_nj = w_j δ_n`` wherever n is on: two samples cancel in whole rows."""
    g = torch.Generator().manual_seed(8)
    on = (torch.rand(300, 4, generator=g) > 0.5).double()
    K = torch.randn(300, 1, generator=g).double() * on * torch.tensor([1.0, -2.0, 0.5, 3.0])
    return K @ torch.randn(4, 20, generator=g).double()


@pytest.mark.parametrize(
    ("build", "N", "method", "budget", "says"),
    [
        (_dense, 5, "descent", 512, r"Found 0 of 5 .* in 512 starts.* no ReLU"),
        (_dense, 5, "sampling", 3000, r"Found 0 of 5 .* in 3000 draws"),
        (_always_on, 4, "descent", 512, r"Found 3 of 4 .* on in every row"),
        (_same_zeros, 4, "descent", 512, r"Found 2 of 4"),
        (_one_output, 4, "descent", None, r"Found 4 of 4 .* one proportion"),
        (_one_output, 4, "sampling", None, r"Found 4 of 4 .* one proportion"),
    ],
)
def test_where_zeros_do_not_tell_the_search_says_so(build, N, method, budget, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NotRecoveredError, match=says):
        sparse_basis(low_rank_factors(build(), N), method=method, budget=budget)


G, THREE = _mixed(50, 20, 5, 9)[0], low_rank_factors(_mixed(40, 20, 3, 11)[0], 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: low_rank_factors(G, 6), InconsistentGradientError, "5, .* size 6: two samples"),
        (lambda: low_rank_factors(G, 4), InconsistentGradientError, "5, .* size 4: the batch is l"),
        (lambda: low_rank_factors(G, 21), InvalidArgumentError, r"1 to 20, .* \(50, 20\).* got 21"),
        (lambda: low_rank_factors(G, True), InvalidArgumentError, "got True"),
        (lambda: low_rank_factors(0 * G, 1), VanishingGradientError, "zero everywhere"),
        (lambda: low_rank_factors(G * math.nan, 1), InvalidTensorError, "NaN or infinite"),
        (lambda: sparse_basis(THREE, method="luck"), UnknownNameError, "'luck'; there are descent"),
        (lambda: sparse_basis(THREE, budget=0), InvalidArgumentError, "budget must be .* got 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call, error, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        call()


def test_precision_and_noise_are_read_off_the_numbers() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert machine_epsilon(G.to(dtype).double()) == torch.finfo(dtype).eps
    noisy = G.float() + 1e-5 * torch.randn(G.shape, generator=torch.Generator().manual_seed(0))
    assert 1e-5 < low_rank_factors(noisy, 5).noise < 1e-3
    with pytest.raises(InconsistentGradientError, match="has rank 5, which is not the batch size"):
        low_rank_factors(G + 1e-5 * torch.randn_like(G), 4)


def test_progress_is_told_and_the_generator_decides(capsys: pytest.CaptureFixture[str]) -> None:
    before, reports = torch.get_rng_state(), []
    again = [
        sparse_basis(
            THREE, generator=torch.Generator().manual_seed(5), progress=lambda *r: reports.append(r)
        )
        for _ in range(2)
    ]
    sparse_basis(THREE, progress=True)
    assert reports[-1] == (768, 3, 3) and "256 starts: 3 of 3 found" in capsys.readouterr().err
    assert torch.equal(*again) and torch.equal(torch.get_rng_state(), before)
