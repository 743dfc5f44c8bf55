"""Gradient rows by channel, what signs tell beyond them, and units that a bias's gradient names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import distance, seeded
from torch import Tensor, nn

from gradinv_edu.engine import channels, kinks
from gradinv_edu.engine.layers import rule_of
from gradinv_edu.engine.solve import Solution
from gradinv_edu.systems import LayerSystem


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Conv2d, tuple[int, ...], int]:
    groups, size = draw(st.sampled_from([1, 1, 2])), draw(st.integers(3, 6))
    conv = nn.Conv2d(
        2 * groups, groups * draw(st.integers(1, 6)), draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)), padding=draw(st.integers(0, 1)), groups=groups,
    )  # fmt: skip
    return conv.double(), (2 * groups, size, size), draw(st.integers(0, 99))


@given(layers())
@settings(max_examples=40, deadline=None)
def test_rows_by_channel_are_the_dense_rows(case: tuple[nn.Conv2d, tuple[int, ...], int]) -> None:
    conv, shape, seed = case
    with torch.no_grad():
        conv.weight.copy_(normal(tuple(conv.weight.shape), seed))
    x = normal((1, *shape), seed + 1)
    z = conv(x).detach()
    k = normal(tuple(z.shape), seed + 2)
    system = LayerSystem(conv, k, shape)
    G = system.matvec(x)[1]
    rows = system.without(weight=True).to_dense()[z.numel() :]
    dense = torch.linalg.pinv(rows, rtol=1e-10) @ G.flatten()
    rank = int(torch.linalg.matrix_rank(rows, rtol=1e-10))
    found = system.by_channel(None, G)
    assert found is not None and round(found.undetermined * x.numel()) == x.numel() - rank
    torch.testing.assert_close(found.x.flatten(), dense, rtol=1e-7, atol=1e-7)
    both = system.by_channel(z, G)
    whole = int(torch.linalg.matrix_rank(system.to_dense(), rtol=1e-10))
    assert both is not None and round(both.undetermined * x.numel()) == x.numel() - whole
    if both.full_rank:
        torch.testing.assert_close(both.x, x, rtol=1e-6, atol=1e-6)


def test_one_channels_matrix_has_a_row_for_each_tap_of_each_filter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conv = nn.Conv2d(2, 6, 3, padding=1, groups=2).double()
    operator = rule_of(conv).operator(normal((1, 6, 4, 4), 0), (2, 4, 4))  # type: ignore[attr-defined]
    for entries in (3 * 9 * 16 - 1, 3 * 9 * 16):
        monkeypatch.setattr(channels, "ENTRIES", entries)
        assert channels.small(operator) == (entries == 3 * 9 * 16)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6])
def test_what_is_known_of_the_input_is_taken_in(kept: float) -> None:
    conv = nn.Conv2d(4, 5, 1, bias=False).double()
    x = normal((1, 4, 3, 3), 0)
    k = normal((1, 5, 3, 3), 1)
    k[:, :, 0] = 0  # nothing comes back from the first row of pixels
    where = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < kept
    system = LayerSystem(conv, k, (4, 3, 3))
    found = system.by_channel(None, system.matvec(x)[1], (x, where))
    assert found is not None
    seen = where.clone()
    ranks = torch.linalg.matrix_rank(k[0].flatten(1))
    if ranks == 5:  # six pixels with five filters: one of them must be known
        enough = (~where[0, :, 1:].flatten(1)).sum(1) <= 5
        seen[0, enough, 1:] = True
        torch.testing.assert_close(found.x[seen], x[seen])
    assert found.full_rank == bool(seen.all())


def program(zeros: float, directions: int, seed: int) -> tuple[channels.Channels, Tensor]:
    """A point without negative entries, moved along open directions."""
    x = normal((1, 4, 6, 6), seed).abs()
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < zeros
    x[hidden] = 0.0
    free = normal((directions, 4, 6, 6), seed + 1)
    moved = x + torch.tensordot(normal((directions,), seed + 2), free, 1)
    return channels.Channels(moved, 1.0, 1.0, directions, free), x


@pytest.mark.parametrize("seed", range(5))
def test_signs_tell_what_many_zeros_leave_open_and_claim_nothing_else(seed: int) -> None:
    found, x = program(0.6, 12, seed)
    told = channels.nonnegative(found)
    assert told.missing == 0
    torch.testing.assert_close(told.x, x, rtol=1e-10, atol=1e-10)
    few, _ = program(0.15, 40, seed)  # a whole cone of points without negative entries
    assert channels.nonnegative(few) is few
    wrong = channels.Channels(found.x - 2 * found.x.abs().max(), 1.0, 1.0, 12, found.free)
    assert channels.nonnegative(wrong).missing == 12


@pytest.mark.parametrize("seed", range(5))
def test_signs_tell_it_through_noise_as_near_as_the_noise(seed: int) -> None:
    found, x = program(0.6, 12, seed)
    noise = 1e-5
    moved = found.x + noise * normal(tuple(x.shape), seed + 3) * x.abs().max()
    told = channels.nonnegative(channels.Channels(moved, 1.0, 1.0, 12, found.free), noise)
    assert told.missing == 0 and distance(told.x, x) < 10 * noise


@pytest.mark.parametrize("kernel", [1, 3])
def test_filters_that_stand_out_are_read_again_from_what_the_others_tell(kernel: int) -> None:
    """Units of six filters in forty, too many for a pursuit one by one."""
    conv = seeded(nn.Conv2d(20, 40, kernel, padding=kernel // 2, bias=False), 0)
    x, k = normal((1, 20, 3, 3), 1).clamp_min(0), normal((1, 40, 3, 3), 2)
    G = LayerSystem(conv, k, (20, 3, 3)).matvec(x)[1]
    places = torch.rand(k.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    wrong = places & (torch.arange(40) < 6).reshape(-1, 1, 1)
    turn = torch.where(places, normal(tuple(k.shape), 4), torch.zeros_like(k))
    read = torch.where(wrong, k - turn, k)

    def solve(k: Tensor, G: Tensor, before: Solution | None) -> tuple[LayerSystem, Solution]:
        system = LayerSystem(conv, k, (20, 3, 3))
        solution = system.by_channel(None, G)
        assert solution is not None
        return system, solution

    first = solve(read, G, None)
    system, solution, turned = kinks.settle(*first, G, turn, solve)
    assert turned == int((wrong & (turn != 0)).sum()) > 20
    assert distance(solution.x, x) < 1e-9 < 1e-3 < distance(first[1].x, x)
    torch.testing.assert_close(system.k, k)


@pytest.mark.parametrize("count", [1, 2])
def test_the_gradient_of_a_bias_names_units_on_the_wrong_side(count: int) -> None:
    k, off = normal((1, 3, 4, 4), 0), torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    off.view(3, -1)[1, :count] = True
    turn = normal(tuple(k.shape), 1) * (torch.arange(16).reshape(4, 4) < 8)
    sums = (k + turn * off).flatten(2).sum(2)[0]
    found = kinks.told_by_sums(k, turn, sums, 1e-9)
    assert torch.equal(found, off)
    assert not bool(kinks.told_by_sums(k, turn, k.flatten(2).sum(2)[0], 1e-9).any())
    flat, turned = k.flatten(1)[:, :5], turn.flatten(1)[:, :5]  # a dense layer's: one place each
    wrong = torch.tensor([[False, True, False, False, True]])
    told = kinks.told_by_sums(flat, turned, (flat + wrong * turned)[0], 1e-9)
    assert told.equal(wrong & (turned.abs() > 1e-6))
