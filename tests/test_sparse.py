"""Sparse directions: what a column space says of the zeros in it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradinv_edu import sparse
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


def _matched(a: Tensor, b: Tensor) -> bool:
    """Whether each column is one of the other's, up to order and length."""
    closest = _alike(a, b).max(dim=1)
    exact = bool((closest.values > 1 - 1e-12).all())
    return exact and sorted(closest.indices.tolist()) == list(range(b.shape[1]))


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_a_split_gives_the_matrix_back_and_both_spaces(N: int, seed: int) -> None:
    G, K = _mixed(60, 30, N, seed)
    parts = sparse.split(G, N)
    assert torch.allclose(parts.left * parts.values @ parts.right * G.abs().max(), G, atol=1e-10)
    assert torch.allclose(parts.left @ (parts.left.T @ K), K, atol=1e-10)
    assert torch.equal(parts.living, (G != 0).any(dim=1))


@given(st.integers(2, 10), st.integers(0, 10_000))
def test_a_draw_vanishes_on_its_rows(N: int, seed: int) -> None:
    parts = sparse.split(_mixed(400, 20, N, seed)[0], N)
    left = parts.left[parts.living]
    q = sparse.sampled(left, 50, torch.Generator().manual_seed(seed))
    zeros = ((q @ left.T).abs() < 1e-9).sum(dim=1)
    assert float((zeros >= N - 1).double().mean()) > 0.7  # all but those with a row drawn twice


def test_rows_in_which_one_sample_is_off_give_its_direction() -> None:
    G, K = _mixed(400, 20, 3, 1)
    parts = sparse.split(G, 3)
    q = sparse.sampled(parts.left[parts.living], 200)
    hits = _alike(parts.left @ q.T, K) > 1 - 1e-12
    # about 3/4 · P(both rows have this one off): a quarter of the draws would be many
    assert bool(hits.any(dim=0).all())
    assert 0.2 < float(hits.any(dim=1).double().mean()) < 0.9


@settings(max_examples=25)
@given(st.integers(2, 9), st.integers(0, 10_000), st.sampled_from(["descent", "sampling"]))
def test_the_basis_is_the_sparse_factor_up_to_order_and_length(
    N: int, seed: int, method: str
) -> None:
    G, K = _mixed(160, 30, N, seed)
    parts = sparse.split(G, N)
    basis = sparse.sparse_basis(parts, method=method)
    assert _matched(parts.left @ basis.directions, K)
    shares = (K == 0).double().mean(dim=0)
    assert torch.allclose(basis.zero_shares.sort().values, shares.sort().values)


@settings(max_examples=40)
@given(st.integers(2, 8), st.integers(0, 10_000))
def test_mixtures_are_never_witnessed(N: int, seed: int) -> None:
    G, K = _mixed(120, 30, N, seed)
    parts = sparse.split(G, N)
    rows = sparse._Rows(parts)
    q = sparse.sampled(rows.left, 2000, torch.Generator().manual_seed(seed))
    witnessed = rows.witnessed(q)
    assert bool((_alike(parts.left @ witnessed.T, K).max(dim=1).values > 1 - 1e-9).all())


def test_a_direction_that_hangs_on_one_row_is_no_witness() -> None:
    """Two samples cancel in one row: more zeros than N − 1, and still a mixture."""
    G, K = _mixed(200, 30, 4, 3)
    parts = sparse.split(G, 4)
    rows = sparse._Rows(parts)
    row = int(((K[:, 0] != 0) & (K[:, 1] != 0)).nonzero()[0])
    mixture = K[:, 0] / K[row, 0] - K[:, 1] / K[row, 1]
    q = torch.linalg.lstsq(parts.left, mixture[:, None]).solution.T
    q = q / q.norm()
    assert int(rows.zeros(q).sum()) > 4
    assert len(rows.witnessed(q)) == 0
    true = torch.linalg.lstsq(parts.left, K[:, :1]).solution.T
    assert len(rows.witnessed(true / true.norm())) > 0


def test_what_is_known_is_not_found_again() -> None:
    G, K = _mixed(200, 30, 6, 4)
    parts = sparse.split(G, 6)
    left = parts.left[parts.living]
    known = torch.linalg.lstsq(parts.left, K[:, :5]).solution.T
    q = sparse.descended(left, 16, known=known)
    alike = _alike(parts.left @ q.T, K)
    assert bool((alike[:, 5] > 1 - 1e-9).all())
    assert bool((alike[:, :5] < 0.999).all())


def test_a_dense_factor_has_nothing_to_find() -> None:
    G, _ = _mixed(100, 30, 5, 5, share=0.0)
    with pytest.raises(NotRecoveredError, match=r"Found 0 of 5 .* in 512 starts.* no ReLU"):
        sparse.sparse_basis(sparse.split(G, 5), budget=512)
    with pytest.raises(NotRecoveredError, match=r"Found 0 of 5 .* in 3000 draws"):
        sparse.sparse_basis(sparse.split(G, 5), budget=3000, method="sampling")


def test_a_sample_on_in_every_row_is_missing_and_said_to_be() -> None:
    G, K = _mixed(150, 30, 4, 6)
    X = torch.linalg.lstsq(K, G).solution
    K[:, 2] = torch.randn(150, generator=torch.Generator().manual_seed(1)).double()
    with pytest.raises(NotRecoveredError, match=r"Found 3 of 4 .* on in every row"):
        sparse.sparse_basis(sparse.split(K @ X, 4), budget=512)


def test_identical_zeros_cannot_be_told_apart() -> None:
    G, K = _mixed(150, 30, 4, 7)
    X = torch.linalg.lstsq(K, G).solution
    noise = torch.randn(150, generator=torch.Generator().manual_seed(1)).double()
    K[:, 3] = noise * (K[:, 2] != 0)
    with pytest.raises(NotRecoveredError, match=r"Found 2 of 4"):
        sparse.sparse_basis(sparse.split(K @ X, 4), budget=512)


@pytest.mark.parametrize("method", ["descent", "sampling"])
def test_rows_in_one_proportion_are_ambiguous(method: str) -> None:
    """Under one output ``k_nj = w_j δ_n`` wherever n is on: two samples cancel in whole rows."""
    g = torch.Generator().manual_seed(8)
    on = (torch.rand(300, 4, generator=g) > 0.5).double()
    K = torch.randn(300, 1, generator=g).double() * on * torch.tensor([1.0, -2.0, 0.5, 3.0])
    G = K @ torch.randn(4, 20, generator=g).double()
    with pytest.raises(NotRecoveredError, match=r"Found 4 of 4 .* one proportion"):
        sparse.sparse_basis(sparse.split(G, 4), method=method)


def test_the_rank_is_checked_and_told() -> None:
    G, _ = _mixed(50, 20, 5, 9)
    with pytest.raises(InconsistentGradientError, match=r"rank 5, .* batch size 6: two samples"):
        sparse.split(G, 6)
    with pytest.raises(InconsistentGradientError, match=r"rank 5, .* batch size 4: the batch is l"):
        sparse.split(G, 4)
    noisy = G.float() + 1e-5 * torch.randn(G.shape, generator=torch.Generator().manual_seed(0))
    assert 1e-5 < sparse.split(noisy, 5).noise < 1e-3
    with pytest.raises(InvalidArgumentError, match=r"from 1 to 20, .* shape \(50, 20\).* got 21"):
        sparse.split(G, 21)
    with pytest.raises(InvalidArgumentError, match="got True"):
        sparse.split(G, True)


def test_the_clients_precision_is_read_off_the_numbers() -> None:
    G, _ = _mixed(20, 10, 2, 10)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert sparse.rounding(G.to(dtype).double()) == torch.finfo(dtype).eps


def test_bad_arguments_are_refused_by_name() -> None:
    parts = sparse.split(_mixed(40, 20, 3, 11)[0], 3)
    with pytest.raises(UnknownNameError, match=r"'luck'; there are descent, sampling"):
        sparse.sparse_basis(parts, method="luck")
    with pytest.raises(InvalidArgumentError, match=r"budget must be a whole number.*got 0"):
        sparse.sparse_basis(parts, budget=0)
    with pytest.raises(VanishingGradientError, match=r"zero everywhere"):
        sparse.split(torch.zeros(3, 4), 1)
    with pytest.raises(InvalidTensorError, match="1 NaN or infinite"):
        sparse.split(torch.tensor([[1.0, math.nan]]), 1)


def test_progress_is_reported_or_printed(capsys: pytest.CaptureFixture[str]) -> None:
    parts = sparse.split(_mixed(100, 20, 3, 12)[0], 3)
    reports: list[tuple[int, int, int]] = []
    basis = sparse.sparse_basis(parts, progress=lambda *report: reports.append(report))
    assert reports[-1] == (basis.spent, 3, 3)
    sparse.sparse_basis(parts, progress=True)
    assert "256 starts: 3 of 3 found" in capsys.readouterr().err


def test_the_same_generator_gives_the_same_answer() -> None:
    parts = sparse.split(_mixed(100, 20, 5, 13)[0], 5)
    before = torch.get_rng_state()
    bases = [
        sparse.sparse_basis(parts, generator=torch.Generator().manual_seed(5)).directions
        for _ in range(2)
    ]
    assert torch.equal(*bases)
    assert torch.equal(torch.get_rng_state(), before)
