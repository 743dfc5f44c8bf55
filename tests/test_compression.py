"""Pruning, Soteria, PRECODE: what the server that knows makes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from updates import LOSS, THREE, flat, seeded, small

import gradinv_edu as gi
from gradinv_edu import Update, compression, dropout, pruning
from gradinv_edu.errors import UnsupportedLayerError


def cnn() -> tuple[nn.Sequential, Tensor, Update]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 64), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(64, 10)).double()
    x = gi.data.photo("cat", 8, dtype=torch.float64)
    return model, x, gi.observe(model, LOSS, x, torch.tensor([4]))


@settings(max_examples=40)
@given(seed=st.integers(0, 999), fraction=st.floats(0.3, 1))
def test_a_pruned_dense_layer_is_exact_where_entries_are_left(seed: int, fraction: float) -> None:
    source = seeded(seed)
    k, x = (torch.randn(n, generator=source, dtype=torch.float64) for n in (60, 20))
    update = Update({"weight": torch.outer(k, x), "bias": k})
    for sent in (
        pruning.keep_random(update, fraction, source), pruning.keep_largest(update, fraction)
    ):  # fmt: skip
        found = pruning.recover_pruned(sent.gradients["weight"], sent.gradients["bias"])
        known = found.isfinite()
        assert torch.allclose(found[known], x[known], rtol=1e-9, atol=1e-12)
        seen = (sent.gradients["weight"] != 0)[sent.gradients["bias"] != 0].any(0)
        assert bool(known[seen].all())


def test_rows_without_a_bias_gradient_serve_once_their_scale_is_known() -> None:
    k, x = torch.tensor([2.0, 3.0]).double(), torch.tensor([5.0, 7.0, 11.0]).double()
    G, bias = torch.outer(k, x), torch.tensor([2.0, 0.0]).double()
    G[0, 2] = 0  # row 1 alone saw the last pixel, without its scale
    assert torch.allclose(pruning.recover_pruned(G, bias), x)
    G[1] = 0
    assert pruning.recover_pruned(G, bias).isnan().tolist() == [False, False, True]


def test_a_pruned_cnn_is_completed_above_and_exact_or_says_that_it_is_not() -> None:
    model, x, update = cnn()
    completed = pruning.complete_pruned(model, pruning.keep_random(update, 0.5), LOSS)
    assert "0.weight" not in completed.gradients
    assert torch.allclose(completed.gradients["3.weight"], update.gradients["3.weight"])
    found = gi.recover(model, completed, (3, 8, 8), LOSS)
    assert found.exact and gi.metrics.psnr(found.inputs, x) > 200
    largest = pruning.complete_pruned(model, pruning.keep_largest(update, 0.5), LOSS)
    found = gi.recover(model, largest, (3, 8, 8), LOSS)
    assert not found.exact and gi.metrics.psnr(found.inputs, x) > 25
    whole = pruning.complete_pruned(model, update, LOSS)
    assert torch.allclose(flat(whole), flat(update), rtol=1e-9, atol=1e-15)
    dropped = dropout.with_dropout(model.train(), 0.5)
    sent = pruning.keep_random(gi.observe(dropped, LOSS, x, torch.tensor([4])), 0.5)
    with pytest.raises(UnsupportedLayerError, match="5 drops units"):
        pruning.complete_pruned(dropped, sent, LOSS)


def test_soteria_prunes_the_classifier_where_features_are_large_for_their_slope() -> None:
    model, x, update = small()
    sent = compression.soteria(model, update, x, 0.2)
    kept = (sent.gradients["3.weight"] != 0).any(0)
    assert int(kept.sum()) == 8
    for name, g in update.gradients.items():
        assert torch.equal(sent.gradients[name], g) == (name != "3.weight")
    features = model[:3](x).detach().flatten()
    slopes = torch.autograd.functional.jacobian(lambda t: model[:3](t).flatten(), x)
    score = slopes.flatten(1).norm(dim=1) / (features.abs() + 0.1)
    assert float(score[kept].min()) >= float(score[~kept].max())


def test_a_bottleneck_draws_above_its_encoder_and_hides_nothing_below() -> None:
    model, x, _ = small()
    block = compression.Bottleneck(40, 6, dtype=torch.float64)
    net = nn.Sequential(*model[:3], block, model[3]).train()
    one, two = (gi.observe(net, LOSS, x, THREE, generator=seeded(s)) for s in (1, 2))
    assert not torch.equal(flat(one), flat(two))
    parts = (one.gradients[f"3.encode.{part}"] for part in ("weight", "bias"))
    features = gi.fully_connected.recover_input(*parts)
    assert gi.metrics.relative_error(features, model[:3](x).detach().flatten()) < 1e-12


# --- differential privacy ---------------------------------------------------------------------
