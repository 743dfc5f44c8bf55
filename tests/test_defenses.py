from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import Update
from gradinv_edu import defenses as d
from gradinv_edu.errors import (
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    UnsupportedLayerError,
    UnsupportedLossError,
    VanishingGradientError,
)

LOSS = nn.CrossEntropyLoss()
DTYPES = [torch.float64, torch.float32]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def updates(draw: st.DrawFn) -> Update:
    source = seeded(draw(st.integers(0, 10_000)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    tensors = [(scale * torch.randn(s, generator=source, dtype=torch.float64)) for s in shapes]
    return Update({f"{i}.weight": t.to(dtype) for i, t in enumerate(tensors)})


def flat(update: Update) -> Tensor:
    return torch.cat([g.double().flatten() for g in update.gradients.values()])


def small() -> tuple[nn.Sequential, Tensor, Update]:
    model = gi.models.mlp([64, 40, 10], "tanh", dtype=torch.float64)
    x = gi.data.digit(3, dtype=torch.float64)
    return model, x, gi.observe(model, LOSS, x, torch.tensor([3]))


def equal(a: Update, b: Update) -> bool:
    return all(torch.equal(a.gradients[n], b.gradients[n]) for n in a.gradients)


# --- laws ------------------------------------------------------------------------------------

EVERY = {
    "clip": lambda u: d.clip(u, 0.3),
    "add_noise": lambda u: d.add_noise(u, 0.1),
    "keep_largest": lambda u: d.keep_largest(u, 0.3),
    "keep_random": lambda u: d.keep_random(u, 0.3),
    "quantize": lambda u: d.quantize(u, 4),
    "sign": d.sign,
}


@pytest.mark.parametrize("name", EVERY)
@settings(deadline=None, max_examples=30)
@given(update=updates())
def test_a_defense_keeps_names_shapes_dtypes_and_the_original(name: str, update: Update) -> None:
    before = {n: g.clone() for n, g in update.gradients.items()}
    sent = EVERY[name](update)
    assert equal(update, Update(before))
    assert list(sent.gradients) == list(before)
    for n, g in sent.gradients.items():
        assert g.shape == before[n].shape and g.dtype == before[n].dtype
    assert equal(sent, EVERY[name](update))


@settings(deadline=None)
@given(update=updates(), norm=st.floats(1e-4, 1e4))
def test_clipping_bounds_the_norm_keeps_the_direction_and_is_idempotent(
    update: Update, norm: float
) -> None:
    g, c = flat(update), flat(d.clip(update, norm))
    assert float(c.norm()) <= norm * (1 + 1e-5)
    assert torch.allclose(c, g * min(1.0, norm / float(g.norm())), rtol=1e-5, atol=0)
    assert torch.allclose(flat(d.clip(d.clip(update, norm), norm)), c, rtol=1e-5, atol=0)


@settings(deadline=None)
@given(update=updates(), fraction=st.floats(0.01, 1))
def test_pruning_leaves_exactly_its_share_and_the_largest(update: Update, fraction: float) -> None:
    for sent in (d.keep_largest(update, fraction), d.keep_random(update, fraction)):
        for name, g in sent.gradients.items():
            count = int((g != 0).sum())
            assert count == math.ceil(fraction * g.numel() - 1e-9)
            assert torch.equal(g[g != 0], update.gradients[name][g != 0])
    top = d.keep_largest(update, fraction)
    for name, g in top.gradients.items():
        dropped = update.gradients[name][g == 0]
        if dropped.numel():
            assert float(dropped.abs().max()) <= float(g[g != 0].abs().min())
    assert equal(d.keep_largest(top, fraction), top)


@settings(deadline=None)
@given(update=updates(), bits=st.integers(2, 16))
def test_quantization_is_near_has_few_levels_and_is_idempotent(update: Update, bits: int) -> None:
    sent = d.quantize(update, bits)
    for name, g in sent.gradients.items():
        true = update.gradients[name].double()
        gap = float(true.abs().max()) / (2 ** (bits - 1) - 1)
        assert float((g.double() - true).abs().max()) <= gap * (0.5 + 1e-3)
        assert g.unique().numel() <= 2**bits - 1
    for name, g in d.quantize(sent, bits).gradients.items():
        assert torch.allclose(g, sent.gradients[name], rtol=1e-5, atol=0)


def test_unbiased_where_it_is_claimed() -> None:
    g = torch.linspace(-1, 1, 11, dtype=torch.float64)
    update = Update({"w": g})
    source = seeded(1)
    pruned = [d.keep_random(update, 0.3, source, unbiased=True) for _ in range(4000)]
    rounded = [d.quantize(update, 3, source) for _ in range(4000)]
    noisy = [d.add_noise(update, 1.0, source) for _ in range(4000)]
    for drawn, sigma in ((pruned, 1.6), (rounded, 0.2), (noisy, 1.0)):
        mean = torch.stack([u.gradients["w"] for u in drawn]).mean(0)
        assert float((mean - g).abs().max()) < 5 * sigma / math.sqrt(4000)
    biased = d.quantize(update, 3).gradients["w"]
    assert float((biased - g).abs().max()) > 0.1


def test_noise_has_the_size_that_was_asked_for() -> None:
    noise = d.add_noise(Update({"w": torch.zeros(100_000, dtype=torch.float64)}), 0.5, seeded(2))
    assert abs(float(noise.gradients["w"].std()) - 0.5) < 0.01
    other = d.add_noise(Update({"w": torch.zeros(100_000, dtype=torch.float64)}), 0.5, seeded(3))
    assert not equal(noise, other)


def test_sign_and_half() -> None:
    update = Update({"w": torch.tensor([-2.0, 0.0, 1e-3, 70.0])})
    assert d.sign(update).gradients["w"].tolist() == [-1, 0, 1, 1]
    assert d.half(update).gradients["w"].dtype == torch.float16
    with pytest.raises(InvalidTensorError, match="float16 gradient of w"):
        d.half(Update({"w": torch.tensor([1e6])}))


def test_defenses_compose_and_the_settings_of_the_update_stay() -> None:
    model, x, _ = small()
    sent = gi.observe(model, LOSS, x, torch.tensor([3]), local_steps=2, learning_rate=0.1)
    both = d.quantize(d.clip(sent, 0.1), 8)
    assert (both.local_steps, both.learning_rate) == (2, 0.1)
    both.check(model)


def test_an_update_that_is_zero_or_not_finite() -> None:
    zero = Update({"w": torch.zeros(3)})
    for change in EVERY.values():
        assert torch.isfinite(flat(change(zero))).all()
    broken = Update({"w": torch.tensor([1.0, math.nan])})
    for change in [*EVERY.values(), d.half]:
        with pytest.raises(InvalidTensorError, match="w has 1 NaN"):
            change(broken)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda u: d.clip(u, 0), "norm must be a positive number"),
        (lambda u: d.clip(u, math.nan), "norm must be a positive number"),
        (lambda u: d.add_noise(u, -1), "sigma must be zero or more"),
        (lambda u: d.keep_largest(u, 0), r"fraction must be .* \(0, 1\]"),
        (lambda u: d.keep_largest(u, 1.5), r"fraction must be .* \(0, 1\]"),
        (lambda u: d.keep_random(u, -0.1), r"fraction must be .* \(0, 1\]"),
        (lambda u: d.quantize(u, 1), "whole number from 2 to 16"),
        (lambda u: d.quantize(u, 4.0), "whole number from 2 to 16"),
    ],
)
def test_impossible_parameters_are_refused(call: object, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        call(small()[2])  # type: ignore[operator]


# --- the server that knows ---------------------------------------------------------------------


def test_clipping_changes_no_ratio() -> None:
    model, x, update = small()
    sent = d.clip(update, 1e-3)
    found = gi.recover(model, sent, (1, 8, 8), LOSS)
    assert gi.metrics.relative_error(found.inputs, x) < 1e-12


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), fraction=st.floats(0.3, 1))
def test_a_pruned_dense_layer_is_exact_where_entries_are_left(seed: int, fraction: float) -> None:
    source = seeded(seed)
    k, x = (torch.randn(n, generator=source, dtype=torch.float64) for n in (60, 20))
    update = Update({"weight": torch.outer(k, x), "bias": k})
    for sent in (d.keep_random(update, fraction, source), d.keep_largest(update, fraction)):
        found = d.recover_pruned(sent.gradients["weight"], sent.gradients["bias"])
        known = found.isfinite()
        assert torch.allclose(found[known], x[known], rtol=1e-9, atol=1e-12)
        seen = (sent.gradients["weight"] != 0)[sent.gradients["bias"] != 0].any(0)
        assert bool(known[seen].all())


def test_rows_without_a_bias_gradient_serve_once_their_scale_is_known() -> None:
    k, x = torch.tensor([2.0, 3.0]).double(), torch.tensor([5.0, 7.0, 11.0]).double()
    G = torch.outer(k, x)
    G[0, 2] = 0
    bias = torch.tensor([2.0, 0.0]).double()  # row 1 alone saw the last pixel, without its scale
    assert torch.allclose(d.recover_pruned(G, bias), x)
    G[1] = 0
    assert d.recover_pruned(G, bias).isnan().tolist() == [False, False, True]


def test_pruned_layers_refuse_what_cannot_be() -> None:
    with pytest.raises(VanishingGradientError, match="bias_gradient"):
        d.recover_pruned(torch.ones(3, 2), torch.zeros(3))
    with pytest.raises(InvalidTensorError, match="bias_gradient has shape"):
        d.recover_pruned(torch.ones(3, 2), torch.ones(2))


def cnn() -> tuple[nn.Sequential, Tensor, Update]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 64), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(64, 10)).double()
    x = gi.data.photo("cat", 8, dtype=torch.float64)
    return model, x, gi.observe(model, LOSS, x, torch.tensor([4]))


def test_a_cnn_pruned_by_lot_is_exact_once_completed() -> None:
    model, x, update = cnn()
    sent = d.keep_random(update, 0.5)
    completed = d.complete_pruned(model, sent, LOSS)
    assert "0.weight" not in completed.gradients
    assert torch.allclose(completed.gradients["3.weight"], update.gradients["3.weight"])
    found = gi.recover(model, completed, (3, 8, 8), LOSS)
    assert found.exact and gi.metrics.psnr(found.inputs, x) > 200
    try:  # the server that takes zeros for numbers
        naive = gi.recover(model, sent, (3, 8, 8), LOSS)
        assert not naive.exact and gi.metrics.psnr(naive.inputs, x) < 30
    except GradientInversionError:
        pass


def test_a_cnn_of_which_the_largest_entries_are_kept_is_near() -> None:
    model, x, update = cnn()
    completed = d.complete_pruned(model, d.keep_largest(update, 0.5), LOSS)
    found = gi.recover(model, completed, (3, 8, 8), LOSS)
    assert not found.exact and gi.metrics.psnr(found.inputs, x) > 25


def test_a_pruned_update_needs_a_dense_layer_without_dropout_above() -> None:
    model, x, update = cnn()
    with pytest.raises(UnsupportedLayerError, match="sent a weight and a bias"):
        d.complete_pruned(model, Update({"0.bias": update.gradients["0.bias"]}), LOSS)
    defended = d.with_dropout(model.train(), 0.5)
    sent = d.keep_random(gi.observe(defended, LOSS, x, torch.tensor([4])), 0.5)
    with pytest.raises(UnsupportedLayerError, match="5 drops units"):
        d.complete_pruned(defended, sent, LOSS)


def test_what_was_not_pruned_is_left_as_it_was() -> None:
    model, _, update = small()
    completed = d.complete_pruned(model, update, LOSS)
    assert set(completed.gradients) == set(update.gradients)
    for name, g in update.gradients.items():
        assert torch.allclose(completed.gradients[name], g, rtol=1e-9, atol=1e-15)


# --- differential privacy ------------------------------------------------------------------------


def test_opacus_without_noise_is_the_clipped_gradient() -> None:
    pytest.importorskip("opacus")
    model, x, update = small()
    none = d.dp_sgd(model, LOSS, x, torch.tensor([3]), noise_multiplier=0.0, norm=1e6)
    assert none.epsilon == math.inf
    for name, g in update.gradients.items():
        assert torch.allclose(none.update.gradients[name], g, rtol=1e-6, atol=1e-12)
    clipped = d.dp_sgd(model, LOSS, x, torch.tensor([3]), noise_multiplier=0.0, norm=0.01)
    assert torch.allclose(flat(clipped.update), flat(d.clip(update, 0.01)), rtol=1e-4, atol=1e-12)


def test_opacus_clips_every_sample_and_adds_noise_of_the_right_size() -> None:
    pytest.importorskip("opacus")
    model, _, _ = small()
    x, y = gi.data.digits([0, 1, 2, 3], dtype=torch.float64)
    each = [gi.observe(model, LOSS, x[i : i + 1], y[i : i + 1]) for i in range(4)]
    mean = sum(flat(d.clip(u, 0.05)) for u in each) / 4
    quiet = d.dp_sgd(model, LOSS, x, y, noise_multiplier=0.0, norm=0.05)
    assert torch.allclose(flat(quiet.update), mean, rtol=1e-3, atol=1e-9)
    loud = d.dp_sgd(model, LOSS, x, y, noise_multiplier=2.0, norm=0.05, generator=seeded(5))
    noise = flat(loud.update) - mean
    assert abs(float(noise.std()) / (2.0 * 0.05 / 4) - 1) < 0.05
    again = d.dp_sgd(model, LOSS, x, y, noise_multiplier=2.0, norm=0.05, generator=seeded(5))
    assert equal(loud.update, again.update)


def test_opacus_leaves_model_and_global_randomness_alone() -> None:
    pytest.importorskip("opacus")
    model, x, _ = small()
    model.eval()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()
    d.dp_sgd(model, LOSS, x, torch.tensor([3]), noise_multiplier=1.0)
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_privacy_accounting_grows_and_shrinks_as_it_must() -> None:
    pytest.importorskip("opacus")
    one = d.privacy_spent(1.0, 0.01, 1)
    assert d.privacy_spent(1.0, 0.01, 1000) > one > d.privacy_spent(4.0, 0.01, 1)
    assert d.privacy_spent(1.0, 1.0, 1) > one
    assert d.privacy_spent(0.0, 1.0, 1) == math.inf
    # Gaussian mechanism: Rényi divergence a/(2 sigma^2), turned into (epsilon, delta) at its best a
    sigma, delta = 5.0, 1e-5
    orders = [1 + i / 1000 for i in range(100, 20_000)]
    bound = min(
        a / (2 * sigma**2) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in orders
    )
    assert abs(d.privacy_spent(sigma, 1.0, 1, delta) - bound) < 1e-3


def test_private_training_learns_and_noise_costs() -> None:
    pytest.importorskip("opacus")
    x, y = gi.data.digits(range(600))
    model = gi.models.mlp([64, 32, 10])
    scores = []
    for sigma in (0.0, 40.0):
        trained, epsilon = d.train_privately(
            model, LOSS, x, y, noise_multiplier=sigma, steps=100, learning_rate=1.0
        )
        scores.append(d.accuracy(trained, x, y))
        assert epsilon == d.privacy_spent(sigma, 50 / 600, 100)
    assert scores[0] > 0.75 and scores[1] < scores[0] - 0.2
    assert d.accuracy(model, x, y) < 0.3


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": 1.0, "norm": 0.0}, "norm"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, "delta"),
        ({"noise_multiplier": 1.0, "steps": 0}, "steps"),
        ({"noise_multiplier": 1.0, "dataset_size": 0}, "dataset_size"),
    ],
)
def test_impossible_privacy_is_refused(settings_: dict[str, float], match: str) -> None:
    model, x, _ = small()
    with pytest.raises(InvalidArgumentError, match=match):
        d.dp_sgd(model, LOSS, x, torch.tensor([3]), **settings_)  # type: ignore[arg-type]


def test_a_layer_that_opacus_does_not_support_is_named() -> None:
    pytest.importorskip("opacus")
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 10)]
    model = nn.Sequential(*layers).double()
    x = gi.data.digit(3, dtype=torch.float64)
    with pytest.raises(UnsupportedLayerError, match="BatchNorm"):
        d.dp_sgd(model, LOSS, x, torch.tensor([3]), noise_multiplier=1.0)


# --- by design ----------------------------------------------------------------------------------


def test_dropout_goes_before_the_classifier_and_nowhere_else() -> None:
    model = gi.models.wide_cnn((1, 8, 8), bias=True).train()
    defended = d.with_dropout(model, 0.3)
    kinds = [type(layer).__name__ for layer in defended]
    assert kinds[-2:] == ["Dropout", "Linear"] and kinds.count("Dropout") == 1
    assert defended[-2].p == 0.3 and defended.training and defended[-2].training
    x = gi.data.digit(3)
    assert torch.equal(defended.eval()(x), model.eval()(x))
    assert defended[0].weight is not model[0].weight
    for rate in (1.0, -0.1):
        with pytest.raises(InvalidArgumentError, match=r"rate must be in \[0, 1\)"):
            d.with_dropout(model, rate)
    with pytest.raises(UnsupportedLayerError, match="no dense layer"):
        d.with_dropout(nn.Sequential(nn.ReLU()), 0.5)
    with pytest.raises(UnsupportedLayerError, match=r"nn\.Sequential"):
        d.with_dropout(nn.Linear(2, 2), 0.5)  # type: ignore[arg-type]


GEOMETRIES = [(1, 8, 3, 2, 1), (1, 8, 3, 1, 1), (3, 8, 4, 4, 0), (3, 8, 5, 3, 2), (1, 8, 8, 1, 0)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_filter_bound_is_the_rank_of_the_matrix(geometry: tuple[int, ...]) -> None:
    channels, size, kernel, stride, padding = geometry
    bound = d.filter_bound(channels, size, kernel, stride, padding)

    def rank(filters: int) -> int:
        source = seeded(filters)
        conv = nn.Conv2d(channels, filters, kernel, stride, padding, bias=False).double()
        conv.weight.data = torch.randn(conv.weight.shape, generator=source, dtype=torch.float64)
        side = (size + 2 * padding - kernel) // stride + 1
        k = torch.randn(1, filters, side, side, generator=source, dtype=torch.float64)
        shape = (channels, size, size)
        return int(torch.linalg.matrix_rank(gi.systems.LayerSystem(conv, k, shape).to_dense()))

    pixels = channels * size**2
    for filters in range(1, bound + 1):
        assert rank(filters) < pixels


def test_the_filter_bound_counts_dependent_equations_once() -> None:
    # 24 equations for 16 pixels, of rank 15: the small layer that chapter 5 counts by hand
    assert d.filter_bound(1, 4, 2, stride=2) == 3


def test_dropout_makes_gradient_constraints_news() -> None:
    assert d.filter_bound(3, 8, 3, 1, 1) == 2
    assert [d.filter_bound(3, 8, 3, 1, 1, rate=p) for p in (0.5, 0.7, 0.9)] == [3, 4, 5]
    with pytest.raises(InvalidArgumentError, match="rate"):
        d.filter_bound(3, 8, 3, rate=1.0)


def test_impossible_geometry_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        d.filter_bound(1, 4, 9)
    with pytest.raises(InvalidArgumentError, match="stride must be a whole number from 1"):
        d.filter_bound(1, 4, 3, 0)


def narrow() -> tuple[nn.Sequential, Tensor, gi.Recovery]:
    source = seeded(0)
    conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(32, 10)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=source, dtype=torch.float64) / 3
    x = gi.data.digit(3, dtype=torch.float64)
    update = gi.observe(model, LOSS, x, torch.tensor([3]))
    return model, x, gi.recover(model, update, (1, 8, 8), LOSS)


def test_what_a_narrow_first_layer_hides_changes_no_gradient() -> None:
    model, x, found = narrow()
    assert not found.exact
    sent = gi.observe(model, LOSS, x, torch.tensor([3]))
    other = gi.observe(model, LOSS, found.inputs, torch.tensor([3]))
    assert torch.allclose(flat(sent), flat(other), rtol=1e-8, atol=1e-12)
    assert gi.metrics.psnr(found.inputs, x) < 40


def test_the_most_likely_input_fits_the_equations_and_is_nearer() -> None:
    model, x, found = narrow()
    examples = gi.data.digits(range(100, 600), dtype=torch.float64)[0]
    likely = d.most_likely_input(model, found, LOSS, examples)
    other = gi.observe(model, LOSS, likely, torch.tensor([3]))
    sent = gi.observe(model, LOSS, x, torch.tensor([3]))
    assert torch.allclose(flat(sent), flat(other), rtol=1e-6, atol=1e-10)
    assert gi.metrics.psnr(likely, x) > gi.metrics.psnr(found.inputs, x)
    with pytest.raises(InvalidTensorError, match="examples have shape"):
        d.most_likely_input(model, found, LOSS, torch.rand(5, 1, 4, 4))


# --- case studies ---------------------------------------------------------------------------------


def test_soteria_prunes_whole_columns_of_the_classifier_alone() -> None:
    model, x, update = small()
    sent = d.soteria(model, update, x, 0.2)
    name = "3.weight"
    columns = (sent.gradients[name] != 0).any(0)
    assert int(columns.sum()) == 8
    for other, g in update.gradients.items():
        same = torch.equal(sent.gradients[other], g)
        assert same == (other != name)
    with pytest.raises(InvalidArgumentError, match="fraction"):
        d.soteria(model, update, x, 0.0)


def test_soteria_prunes_where_the_feature_is_largest_for_its_slope() -> None:
    model, x, update = small()
    features = model[:3](x).detach().flatten()
    slopes = torch.autograd.functional.jacobian(lambda t: model[:3](t).flatten(), x)
    score = slopes.flatten(1).norm(dim=1) / (features.abs() + 0.1)
    kept = (d.soteria(model, update, x, 0.5).gradients["3.weight"] != 0).any(0)
    assert float(score[kept].min()) >= float(score[~kept].max())


def test_a_bottleneck_hides_nothing_below_its_encoder() -> None:
    model, x, _ = small()
    block = d.Bottleneck(40, 6, dtype=torch.float64)
    defended = nn.Sequential(*model[:3], block, model[3]).train()
    update = gi.observe(defended, LOSS, x, torch.tensor([3]), generator=seeded(1))
    again = gi.observe(defended, LOSS, x, torch.tensor([3]), generator=seeded(2))
    assert not equal(update, again)
    G, b = update.gradients["3.encode.weight"], update.gradients["3.encode.bias"]
    features = gi.fully_connected.recover_input(G, b)
    assert gi.metrics.relative_error(features, model[:3](x).detach().flatten()) < 1e-12


# --- the cost ----------------------------------------------------------------------------------


def test_training_learns_leaves_the_model_alone_and_goes_through_the_defense() -> None:
    x, y = gi.data.digits(range(600))
    model = gi.models.mlp([64, 32, 10])
    before = {n: p.clone() for n, p in model.state_dict().items()}
    trained = d.train(model, LOSS, x, y, steps=150, learning_rate=0.5)
    assert d.accuracy(trained, x, y) > 0.8 > 0.3 > d.accuracy(model, x, y)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    frozen = d.train(
        model, LOSS, x, y, steps=3, defense=lambda u: d.clip(u, 1e-12), learning_rate=0.5
    )
    for n, p in frozen.state_dict().items():
        assert torch.allclose(p, before[n], atol=1e-9)
    with pytest.raises(InvalidArgumentError, match="learning_rate"):
        d.train(model, LOSS, x, y, steps=1, learning_rate=0.0)


# --- what chapter 9 draws from --------------------------------------------------------------------


def design() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "design.py"
    spec = importlib.util.spec_from_file_location("design_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["conv 2", "dense 4"])
def test_a_slice_of_the_design_data_comes_out_again(name: str) -> None:
    benchmark = design()
    stored = json.loads(benchmark.FILE.read_text())
    assert {key.split("/")[0] for key in stored["cells"]} == set(benchmark.DESIGNS)
    assert (stored["seeds"], stored["victims"], stored["steps"]) == (3, 3, 800)
    again, before = benchmark.cell(name, 1), stored["cells"][f"{name}/1"]
    assert again["parameters"] == before["parameters"]
    assert abs(again["accuracy"] - before["accuracy"]) < 0.03
    for one, other in zip(again["first"], before["first"], strict=True):
        assert one["exact"] == other["exact"]
        assert one["exact"] or abs(one["prior"] - other["prior"]) < 0.2
    assert [t["exact"] for t in again["last"]] == [t["exact"] for t in before["last"]]


# --- what would be answered wrongly ------------------------------------------------------------


@pytest.mark.parametrize("value", ["0.1", None, True])
def test_parameters_that_are_no_numbers_are_refused_by_name(value: object) -> None:
    update = Update({"0.weight": torch.ones(2, 3)})
    for call, name in (
        (d.clip, "norm"),
        (d.add_noise, "sigma"),
        (d.keep_largest, "fraction"),
        (d.keep_random, "fraction"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"{name} must be"):
            call(update, value)  # type: ignore[operator]
    with pytest.raises(InvalidArgumentError, match="noise_multiplier must be"):
        d.privacy_spent(value, 0.1, 1)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="size must be a whole number"):
        d.Bottleneck(4, 0)


def test_a_pruned_batch_is_not_completed_as_if_it_were_one_sample() -> None:
    model = gi.models.mlp([64, 40, 10], "tanh")
    x, y = gi.data.digits(range(4))
    batch = d.keep_largest(gi.observe(model, LOSS, x, y), 0.5)
    with pytest.raises(InvalidArgumentError, match="of 4 samples and 1 local steps"):
        d.complete_pruned(model, batch, LOSS)
    steps = gi.observe(model, LOSS, x[:1], y[:1], local_steps=3, learning_rate=0.1)
    with pytest.raises(InvalidArgumentError, match="of 1 samples and 3 local steps"):
        d.complete_pruned(model, d.keep_largest(steps, 0.5), LOSS)
    one = gi.observe(model, LOSS, x[:1], y[:1])
    with pytest.raises(UnsupportedLossError, match="not for MSELoss"):
        d.complete_pruned(model, one, nn.MSELoss())  # type: ignore[arg-type]


def test_soteria_defends_one_sample_of_its_own_model() -> None:
    model, x, update = small()
    with pytest.raises(InvalidTensorError, match="has shape"):
        d.soteria(gi.models.mlp([64, 30, 10], dtype=torch.float64), update, x, 0.5)
    with pytest.raises(InvalidTensorError, match="inputs has 2 samples"):
        d.soteria(model, update, torch.cat([x, x]), 0.5)
    with pytest.raises(InvalidTensorError, match="64 NaN"):
        d.soteria(model, update, x * math.nan, 0.5)
    with pytest.raises(InvalidTensorError, match=r"does not take inputs of shape \(1, 8, 7\)"):
        d.soteria(model, update, x[..., :7], 0.5)


@pytest.mark.parametrize("defense", [*EVERY.values(), d.half])
def test_what_is_no_update_is_refused(defense: d.Defense) -> None:
    with pytest.raises(InvalidTensorError, match=r"takes an Update, .* got dict"):
        defense({"0.weight": torch.ones(2)})  # type: ignore[arg-type]


def test_a_private_gradient_is_of_finite_samples_that_fit() -> None:
    model, (x, y) = gi.models.mlp((64, 10)), gi.data.digits(range(4))

    def private(x: Tensor, y: Tensor, loss: nn.Module = LOSS, model: nn.Module = model) -> object:
        return d.dp_sgd(model, loss, x, y, noise_multiplier=1.0)

    spoiled = x.clone()
    spoiled[3] = math.nan
    with pytest.raises(InvalidTensorError, match="inputs has 64 NaN"):
        private(spoiled, y)
    with pytest.raises(InvalidTensorError, match="4 inputs and 2 targets"):
        private(x, y[:2])
    with pytest.raises(InvalidTensorError, match="do not take inputs"):
        private(x[..., :7], y)
    with pytest.raises(InvalidTensorError, match="first dimensions must both"):
        private(x[:0], y[:0])
    with pytest.raises(UnsupportedLossError, match="use reduction"):
        private(x, y, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(InvalidTensorError, match="inputs has 64 NaN"):
        d.train_privately(model, LOSS, spoiled, y, noise_multiplier=1.0, steps=1, batch_size=2)


def test_an_accuracy_is_of_numbers_and_of_labels_for_each() -> None:
    model, (x, y) = gi.models.mlp((64, 10)), gi.data.digits(range(4))
    with pytest.raises(InvalidTensorError, match="4 inputs and 2 targets"):
        d.accuracy(model, x, y[:2])
    with pytest.raises(InvalidTensorError, match="0 inputs and 0 targets"):
        d.accuracy(model, x[:0], y[:0])
    with pytest.raises(InvalidTensorError, match="output has 40 NaN"):
        d.accuracy(model, x * math.nan, y)
    with pytest.raises(InvalidTensorError, match="4 inputs and 2 targets"):
        d.train(model, LOSS, x, y[:2], steps=1)
