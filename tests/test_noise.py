"""What is sent after clipping, noise, pruning, rounding; and the server that knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from updates import LOSS, THREE, flat, seeded, small

import gradinv_edu as gi
from gradinv_edu import Update, compression, design, noise, privacy, pruning
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    UnsupportedLayerError,
    UnsupportedLossError,
    VanishingGradientError,
)

Change = Callable[[Update], Update]
CHANGES: dict[str, Change] = {
    "clip": lambda u: noise.clip(u, 0.3),
    "add_noise": lambda u: noise.add_noise(u, 0.1),
    "keep_largest": lambda u: pruning.keep_largest(u, 0.3),
    "keep_random": lambda u: pruning.keep_random(u, 0.3),
    "quantize": lambda u: compression.quantize(u, 4),
    "sign": compression.sign,
    "half": compression.half,
}


@st.composite
def updates(draw: st.DrawFn) -> Update:
    source, scale = seeded(draw(st.integers(0, 10_000))), 10.0 ** draw(st.integers(-3, 3))
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    tensors = [scale * torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]
    return Update({f"{i}.weight": t.to(dtype) for i, t in enumerate(tensors)})


@pytest.mark.parametrize("name", CHANGES)
@settings(max_examples=20)
@given(update=updates())
def test_laws_of_what_is_sent(name: str, update: Update) -> None:
    before, sent = {n: g.clone() for n, g in update.gradients.items()}, CHANGES[name](update)
    assert torch.equal(flat(update), flat(Update(before)))
    assert torch.equal(flat(sent), flat(CHANGES[name](update)))
    assert list(sent.gradients) == list(before)
    for n, g in sent.gradients.items():
        assert g.shape == before[n].shape
        assert g.dtype == (torch.float16 if name == "half" else before[n].dtype)
    assert not flat(CHANGES[name](Update({"w": torch.zeros(3)}))).isnan().any()
    for wrong, match in (
        (Update({"w": torch.tensor([1.0, math.nan])}), "w has 1 NaN"),
        ({"w": torch.ones(2)}, "must be an Update, got dict"),
    ):
        with pytest.raises(InvalidTensorError, match=match):
            CHANGES[name](wrong)  # type: ignore[arg-type]


@given(update=updates(), norm=st.floats(1e-4, 1e4), fraction=st.floats(0.01, 1))
def test_clipping_shortens_and_pruning_keeps_its_share(
    update: Update, norm: float, fraction: float
) -> None:
    g, c = flat(update), flat(noise.clip(update, norm))
    assert torch.allclose(c, g * min(1.0, norm / float(g.norm())), rtol=1e-5, atol=0)
    top = pruning.keep_largest(update, fraction)
    for sent in (top, pruning.keep_random(update, fraction)):
        for name, pruned in sent.gradients.items():
            kept = pruned != 0
            assert int(kept.sum()) == math.ceil(fraction * pruned.numel() - 1e-9)
            assert torch.equal(pruned[kept], update.gradients[name][kept])
            if sent is top and not kept.all():
                dropped = update.gradients[name][~kept].abs()
                assert float(dropped.max()) <= float(pruned[kept].abs().min())


@given(update=updates(), bits=st.integers(2, 16))
def test_quantization_is_near_and_has_few_levels(update: Update, bits: int) -> None:
    sent = compression.quantize(update, bits)
    for name, g in sent.gradients.items():
        true = update.gradients[name].double()
        gap = float(true.abs().max()) / (2 ** (bits - 1) - 1)
        assert float((g.double() - true).abs().max()) <= gap * (0.5 + 1e-3)
        assert g.unique().numel() <= 2**bits - 1
    assert torch.allclose(flat(compression.quantize(sent, bits)), flat(sent), rtol=1e-5, atol=0)


def test_unbiased_where_it_is_claimed_and_of_the_size_that_was_set() -> None:
    update, source = Update({"w": torch.linspace(-1, 1, 11, dtype=torch.float64)}), seeded(1)
    for change, sigma in (
        (lambda: pruning.keep_random(update, 0.3, source, unbiased=True), 1.6),
        (lambda: compression.quantize(update, 3, source), 0.2),
        (lambda: noise.add_noise(update, 1.0, source), 1.0),
    ):
        drawn = torch.stack([change().gradients["w"] for _ in range(2000)])
        gap = drawn.mean(0) - update.gradients["w"]
        assert float(gap.abs().max()) < 5 * sigma / math.sqrt(2000)
    zeros = Update({"w": torch.zeros(100_000, dtype=torch.float64)})
    assert abs(float(flat(noise.add_noise(zeros, 0.5, seeded(2))).std()) - 0.5) < 0.01
    few = compression.sign(Update({"w": torch.tensor([-2.0, 0.0, 1e-3, 70.0])}))
    assert few.gradients["w"].tolist() == [-1, 0, 1, 1]


U = Update({"0.weight": torch.ones(2, 3)})
X, Y = gi.data.digits(range(4))
MLP = gi.models.mlp((64, 10))
SPOILED = torch.cat([X[:3], X[3:] * math.nan])


def private(x: Tensor = X, y: Tensor = Y, loss: nn.Module = LOSS, **options: Any) -> object:
    return privacy.dp_sgd(MLP, loss, x, y, **{"noise_multiplier": 1.0, **options})


def pruned(**settings: Any) -> Update:
    model = gi.models.mlp([64, 40, 10], "tanh")
    count = settings.pop("samples", 1)
    return pruning.keep_largest(gi.observe(model, LOSS, X[:count], Y[:count], **settings), 0.5)


def complete(update: Update, loss: Any = LOSS) -> object:
    return pruning.complete_pruned(gi.models.mlp([64, 40, 10], "tanh"), update, loss)


def soteria(x: Tensor, hidden: int = 40, fraction: float = 0.5) -> object:
    net = gi.models.mlp([64, hidden, 10], "tanh", dtype=torch.float64)
    return compression.soteria(net, small()[2], x, fraction)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        *(
            (lambda f=f, v=v: f(U, v), InvalidArgumentError, match)
            for f, match, values in (
                (noise.clip, "norm must be a positive number", (0, math.nan, "0.1", None, True)),
                (noise.add_noise, "sigma must be zero or more", (-1, "0.1", True)),
                (pruning.keep_largest, r"fraction must be .* \(0, 1\]", (0, 1.5, None)),
                (pruning.keep_random, r"fraction must be .* \(0, 1\]", (-0.1, True)),
                (compression.quantize, "whole number from 2 to 16", (1, 4.0, True)),
            )
            for v in values
        ),
        (lambda: compression.half(Update({"w": torch.tensor([1e6])})), InvalidTensorError,
         "float16 gradient of w"),
        (lambda: compression.Bottleneck(4, 0), InvalidArgumentError, "size must be a whole"),
        (lambda: pruning.recover_pruned(torch.ones(3, 2), torch.zeros(3)), VanishingGradientError,
         "bias_gradient"),
        (lambda: pruning.recover_pruned(torch.ones(3, 2), torch.ones(2)), InvalidTensorError,
         "bias_gradient has shape"),
        (lambda: complete(pruned(samples=4)), InvalidArgumentError, "4 samples and 1 local"),
        (lambda: complete(pruned(local_steps=3, learning_rate=0.1)), InvalidArgumentError,
         "1 samples and 3 local"),
        (lambda: complete(pruned(), nn.MSELoss()), UnsupportedLossError, "not for MSELoss"),
        (lambda: complete(Update({"1.bias": torch.ones(40)})), UnsupportedLayerError,
         "sent a weight and a bias"),
        (lambda: soteria(X[:1].double(), fraction=0.0), InvalidArgumentError, "fraction"),
        (lambda: soteria(X[:1].double(), 30), InvalidTensorError, "has shape"),
        (lambda: soteria(X[:2].double()), InvalidTensorError, "inputs has 2 samples"),
        (lambda: soteria(X[:1] * math.nan), InvalidTensorError, "64 NaN"),
        (lambda: soteria(X[:1, ..., :7]), InvalidTensorError, r"inputs of shape \(1, 8, 7\)"),
        (lambda: privacy.gaussian_delta(0.0, 1.0), InvalidArgumentError, "sigma"),
        (lambda: privacy.gaussian_delta(1.0, 1.0, -1.0), InvalidArgumentError, "sensitivity"),
        (lambda: privacy.gaussian_sigma(math.nan), InvalidArgumentError, "epsilon"),
        (lambda: privacy.gaussian_sigma(1.0, 2.0), InvalidArgumentError, "delta"),
        (lambda: private(noise_multiplier=-1.0), InvalidArgumentError, "noise_multiplier"),
        (lambda: private(norm=0.0), InvalidArgumentError, "norm"),
        (lambda: private(delta=1.0), InvalidArgumentError, "delta"),
        (lambda: private(dataset_size=1), InvalidArgumentError, "dataset_size"),
        (lambda: private(steps=0), InvalidArgumentError, "steps"),
        (lambda: private(SPOILED), InvalidTensorError, "inputs has 64 NaN"),
        (lambda: private(X, Y[:2]), InvalidTensorError, "4 inputs and 2 targets"),
        (lambda: private(X[..., :7]), InvalidTensorError, "do not take inputs"),
        (lambda: private(X[:0], Y[:0]), InvalidTensorError, "0 inputs and 0 targets"),
        (lambda: private(loss=nn.CrossEntropyLoss(reduction="none")), UnsupportedLossError,
         "use reduction"),
        (lambda: privacy.dp_sgd(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)), LOSS, X, Y,
            noise_multiplier=1.0), UnsupportedLayerError, "BatchNorm"),
        (lambda: privacy.train_privately(
            MLP, LOSS, SPOILED, Y, noise_multiplier=1.0, steps=1), InvalidTensorError, "64 NaN"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    call: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call()


# --- the server that knows --------------------------------------------------------------------


def test_clipping_changes_no_ratio_and_keeps_the_settings() -> None:
    model, x, update = small()
    found = gi.recover(model, noise.clip(update, 1e-3), (1, 8, 8), LOSS)
    assert gi.metrics.relative_error(found.inputs, x) < 1e-12
    sent = gi.observe(model, LOSS, x, THREE, local_steps=2, learning_rate=0.1)
    both = compression.quantize(noise.clip(sent, 0.1), 8)
    assert (both.local_steps, both.learning_rate) == (2, 0.1)


def test_opacus_clips_every_sample_adds_noise_of_the_right_size_and_touches_nothing() -> None:
    pytest.importorskip("opacus")
    model = small()[0].eval()
    x, y = gi.data.digits([0, 1, 2, 3], dtype=torch.float64)
    before, state = flat(Update(dict(model.named_parameters()))).clone(), torch.get_rng_state()

    def sent(sigma: float) -> Tensor:
        return flat(privacy.dp_sgd(
            model, LOSS, x, y, noise_multiplier=sigma, norm=0.05, generator=seeded(5)
        ).update)  # fmt: skip

    each = [gi.observe(model, LOSS, x[i : i + 1], y[i : i + 1]) for i in range(4)]
    mean = torch.stack([flat(noise.clip(u, 0.05)) for u in each]).mean(0)
    assert torch.allclose(sent(0.0), mean, rtol=1e-3, atol=1e-9)
    assert abs(float((sent(2.0) - mean).std()) / (2.0 * 0.05 / 4) - 1) < 0.05
    assert torch.equal(sent(2.0), sent(2.0))
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    assert torch.equal(before, flat(Update(dict(model.named_parameters()))))
    assert all(p.grad is None for p in model.parameters())


def test_privacy_accounting_grows_shrinks_and_meets_the_gaussian_mechanism() -> None:
    pytest.importorskip("opacus")
    spent = privacy.privacy_spent
    assert spent(1.0, 0.01, 1000) > spent(1.0, 0.01, 1) > spent(4.0, 0.01, 1)
    assert spent(1.0, 1.0, 1) > spent(1.0, 0.01, 1) and spent(0.0, 1.0, 1) == math.inf
    # Rényi divergence a/(2 sigma^2), turned into (epsilon, delta) at its best order a
    sigma, delta = 5.0, 1e-5
    bound = min(
        a / (2 * sigma**2) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in (1 + i / 1000 for i in range(100, 20_000))
    )
    assert abs(spent(sigma, 1.0, 1, delta) - bound) < 1e-3


def test_the_gaussian_mechanism_is_its_integral() -> None:
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    p = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    for sigma, epsilon, far in ((1.0, 1.0, 1.0), (3.0, 0.2, 1.0), (0.5, 4.0, 2.0)):
        shift = far / sigma
        q = (-(z - shift).square() / 2).exp() / math.sqrt(2 * math.pi)
        delta = float((q - math.exp(epsilon) * p).clamp(min=0).sum() * (z[1] - z[0]))
        found = privacy.gaussian_delta(sigma, epsilon, far)
        assert found == pytest.approx(delta, abs=1e-6)
        again = privacy.gaussian_sigma(epsilon, found, far)
        assert again == pytest.approx(sigma, rel=1e-6)

    def classical(epsilon: float) -> float:
        return math.sqrt(2 * math.log(1.25e5)) / epsilon

    assert privacy.gaussian_sigma(1.0) < classical(1.0)
    assert privacy.gaussian_sigma(1000.0) > 4 * classical(1000.0)


def test_private_training_learns_and_noise_costs() -> None:
    pytest.importorskip("opacus")
    x, y = gi.data.digits(range(600))
    scores = []
    for sigma in (0.0, 40.0):
        trained, epsilon = privacy.train_privately(
            gi.models.mlp([64, 32, 10]), LOSS, x, y,
            noise_multiplier=sigma, steps=100, learning_rate=1.0,
        )  # fmt: skip
        scores.append(design.accuracy(trained, x, y))
        assert epsilon == privacy.privacy_spent(sigma, 50 / 600, 100)
    assert scores[0] > 0.75 and scores[1] < scores[0] - 0.2
