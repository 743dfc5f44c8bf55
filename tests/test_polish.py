"""The polish: digits won back, none lost, and the truth told about what cannot be won."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

from gradinv_edu import data, metrics, models, polish, recursion, sharing
from gradinv_edu.chain import trace
from gradinv_edu.errors import (
    InconsistentGradientError,
    InvalidTensorError,
    UnsupportedLayerError,
    VanishingGradientError,
)

SHAPE = (3, 16, 16)
LOSS = nn.CrossEntropyLoss()
TARGET = torch.tensor([3])


def _sent(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return sharing.observe(model, LOSS, x, TARGET).gradients


def _near(x: Tensor, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return x.double() + size * torch.randn(x.shape, generator=generator, dtype=torch.float64)


def _gradient_at(model: nn.Module, shape: tuple[int, ...]) -> polish.GradientAt:
    return polish.chain_gradient(trace(model, shape), {}, LOSS, TARGET)


def _tiny(inputs: int = 6, bias: bool = True) -> nn.Sequential:
    generator = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(inputs, 8, bias), nn.Tanh(), nn.Linear(8, 4, bias)).double()
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return model


def _blind() -> tuple[nn.Sequential, Tensor]:
    """Four pixels of which the network sees only the two averages."""
    model = nn.Sequential(nn.AvgPool1d(2), nn.Flatten(), *_tiny(2))
    return model, torch.tensor([[[0.1, 0.7, 0.4, 0.2]]], dtype=torch.float64)


# --- the digits ------------------------------------------------------------------------------


@pytest.mark.parametrize("photo", ["astronaut", "coffee"])
def test_float32_gradients_of_lenet_are_read_to_over_110_db(photo: str) -> None:
    x = data.photo(photo, size=16)
    model = models.lenet(SHAPE, bias=False)
    update = sharing.observe(model, LOSS, x, TARGET)
    begun = recursion.recover(model, update, SHAPE, LOSS).inputs
    begun = _near(begun, 3e-3)  # as many digits as are lost at 32 x 32
    assert metrics.psnr(begun, x.double()) < 60
    done = polish.polish(_gradient_at(model, SHAPE), begun, update.gradients, torch.float32)
    assert metrics.psnr(done.inputs, x.double()) >= 110
    assert done.full_rank
    assert done.at_noise
    assert metrics.relative_error(done.inputs, x.double()) <= done.error < 1e-4
    assert len(done.mismatches) <= 6


def test_an_exact_answer_is_not_harmed() -> None:
    x = data.photo("astronaut", size=16).double()
    model = models.lenet(SHAPE, bias=False, dtype=torch.float64)
    begun = _near(x, 1e-12)
    done = polish.polish(_gradient_at(model, SHAPE), begun, _sent(model, x), torch.float64)
    assert metrics.relative_error(done.inputs, x) <= metrics.relative_error(begun, x)
    assert list(done.mismatches) == sorted(done.mismatches, reverse=True)
    again = polish.polish(_gradient_at(model, SHAPE), done.inputs, _sent(model, x), torch.float64)
    assert metrics.relative_error(again.inputs, x) < 1e-13


def test_without_a_dense_matrix_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = data.photo("astronaut", size=16)
    model = models.lenet(SHAPE, bias=False)
    arguments = (_gradient_at(model, SHAPE), _near(x, 3e-3), _sent(model, x), torch.float32)
    dense = polish.polish(*arguments)
    monkeypatch.setattr(polish, "DENSE_UNKNOWNS", 1)
    free = polish.polish(*arguments)
    assert metrics.relative_error(free.inputs, dense.inputs) < 1e-8
    assert free.full_rank
    assert free.smallest_singular_value <= 1.5 * dense.smallest_singular_value


# --- against a dense reference ------------------------------------------------------------------


def test_one_step_is_the_least_squares_step() -> None:
    model, x = _tiny(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64).unsqueeze(0)
    sent, f, begun = _sent(model, x), _gradient_at(model, (6,)), _near(x, 1e-3)
    weights = {n: 1 / g.abs().max() for n, g in sent.items()}

    def flat(x: Tensor) -> Tensor:
        return torch.cat([(f(x)[n] * w).reshape(-1) for n, w in weights.items()])

    J = jacrev(flat)(begun).reshape(-1, 6)
    residual = torch.cat([(sent[n] * w).reshape(-1) for n, w in weights.items()]) - flat(begun)
    wanted = begun + torch.linalg.lstsq(J, residual[:, None]).solution.reshape(x.shape)
    done = polish.polish(f, begun, sent, torch.float64, steps=1)
    torch.testing.assert_close(done.inputs, wanted, rtol=1e-9, atol=1e-12)
    values = torch.linalg.svdvals(J)
    assert done.smallest_singular_value <= float(values[-1]) * 1.1
    assert done.smallest_singular_value >= float(values[-1]) / 10
    assert done.largest_singular_value >= float(values[0]) * 0.9


def test_the_gradient_of_the_chain_is_the_one_that_is_sent() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 4))
    model = model.double()
    x = torch.rand(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = _gradient_at(model, (2, 4, 4))(x)
    for name, gradient in _sent(model, x).items():
        torch.testing.assert_close(found[name], gradient)


# --- the rank ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_unknowns", [4096, 1])
def test_what_the_network_does_not_see_is_told(
    dense_unknowns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polish, "DENSE_UNKNOWNS", dense_unknowns)
    model, x = _blind()
    begun = _near(x, 1e-2)
    done = polish.polish(_gradient_at(model, (1, 4)), begun, _sent(model, x), torch.float64)
    assert done.at_noise  # the gradient is explained
    assert not done.full_rank  # and yet nothing may be believed
    assert done.error == math.inf
    pool = nn.AvgPool1d(2)
    torch.testing.assert_close(pool(done.inputs), pool(x))


def test_a_gradient_of_another_model_does_not_come_down_to_noise() -> None:
    model, x = _tiny(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64).unsqueeze(0)
    sent = {n: g + 0.1 * g.abs().max() * torch.randn_like(g) for n, g in _sent(model, x).items()}
    done = polish.polish(_gradient_at(model, (6,)), x, sent, torch.float64)
    assert not done.at_noise
    assert done.error > 1e-3


def test_a_far_start_still_lowers_the_mismatch() -> None:
    model, x = _tiny(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64).unsqueeze(0)
    begun = _near(x, 0.5)
    done = polish.polish(_gradient_at(model, (6,)), begun, _sent(model, x), torch.float64, steps=30)
    assert list(done.mismatches) == sorted(done.mismatches, reverse=True)
    assert metrics.relative_error(done.inputs, x) < 1e-10


def test_across_a_kink_the_start_is_given_back() -> None:
    model = models.cnn6_d((3, 8, 8), outputs=4, dtype=torch.float64)
    x = data.photo("astronaut", size=8).double()
    begun = _near(x, 0.05)
    done = polish.polish(_gradient_at(model, (3, 8, 8)), begun, _sent(model, x), torch.float64)
    assert not done.at_noise
    assert torch.equal(done.inputs, begun)
    assert len(done.mismatches) == 1


# --- errors and manners ---------------------------------------------------------------------------


def _arguments() -> tuple[polish.GradientAt, Tensor, dict[str, Tensor]]:
    model, x = _tiny(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64).unsqueeze(0)
    return _gradient_at(model, (6,)), x, _sent(model, x)


def test_what_cannot_be_polished_is_refused_by_name() -> None:
    f, x, sent = _arguments()
    bad = dict(sent, **{"0.weight": sent["0.weight"] * math.nan})
    with pytest.raises(InvalidTensorError, match=r"0\.weight.*NaN"):
        polish.polish(f, x, bad, torch.float64)
    with pytest.raises(InvalidTensorError, match=r"0\.weight.*shape"):
        polish.polish(f, x, dict(sent, **{"0.weight": sent["0.weight"].T}), torch.float64)
    with pytest.raises(InvalidTensorError, match="No name of gradients"):
        polish.polish(f, x, {"other": x}, torch.float64)
    with pytest.raises(InvalidTensorError, match=r"floating-point torch\.dtype"):
        polish.polish(f, x, sent, torch.int64)
    with pytest.raises(InvalidTensorError, match="inputs has 1 NaN"):
        polish.polish(f, torch.where(x == x[0, 0], math.nan, x), sent, torch.float64)
    with pytest.raises(VanishingGradientError, match="Every gradient"):
        polish.polish(f, x, {n: 0 * g for n, g in sent.items()}, torch.float64)
    with pytest.raises(ValueError, match="at least 1"):
        polish.polish(f, x, sent, torch.float64, steps=0)


def test_a_gradient_that_is_not_finite_is_told() -> None:
    _, x, sent = _arguments()
    with pytest.raises(InconsistentGradientError, match="not finite"):
        polish.polish(lambda x: {n: g / 0 for n, g in sent.items()}, x, sent, torch.float64)


def test_a_dropout_needs_its_mask() -> None:
    model = nn.Sequential(nn.Dropout(0.5), *_tiny()).train()
    steps = trace(model, (6,))
    with pytest.raises(UnsupportedLayerError, match="dropout in train mode"):
        polish.chain_gradient(steps, {}, LOSS, TARGET)
    kept = {steps[0].name: torch.tensor([[2.0, 0, 2, 2, 0, 2]], dtype=torch.float64)}
    found = polish.chain_gradient(steps, kept, LOSS, TARGET)(torch.ones(1, 6, dtype=torch.float64))
    assert not found["1.weight"][:, 1].any()


def test_nothing_of_the_callers_is_touched() -> None:
    model, x = _tiny(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64).unsqueeze(0)
    sent, before, begun = _sent(model, x), copy.deepcopy(model), _near(x, 1e-3)
    kept, state = begun.clone(), torch.get_rng_state()
    first = polish.polish(_gradient_at(model, (6,)), begun, sent, torch.float64)
    second = polish.polish(_gradient_at(model, (6,)), begun, sent, torch.float64)
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(begun, kept)
    assert torch.equal(state, torch.get_rng_state())
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is None
        assert p.requires_grad


def test_progress_is_told() -> None:
    f, x, sent = _arguments()
    seen: list[tuple[int, float]] = []
    done = polish.polish(f, _near(x, 1e-3), sent, torch.float64, progress=lambda *a: seen.append(a))
    assert seen[-1] == (done.iterations, done.mismatches[-1])
    assert [i for i, _ in seen] == sorted(i for i, _ in seen)
