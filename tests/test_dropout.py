"""Dropout goes before the classifier, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradinv_edu as gi
from gradinv_edu import dropout
from gradinv_edu.errors import InvalidArgumentError, UnsupportedLayerError


def test_dropout_goes_before_the_classifier_and_nowhere_else() -> None:
    model = gi.models.wide_cnn((1, 8, 8), bias=True).train()
    defended = dropout.with_dropout(model, 0.3)
    kinds = [type(layer).__name__ for layer in defended]
    assert kinds[-2:] == ["Dropout", "Linear"] and kinds.count("Dropout") == 1
    assert defended[-2].p == 0.3 and defended.training and defended[-2].training
    assert torch.equal(defended.eval()(gi.data.digit(3)), model.eval()(gi.data.digit(3)))
    assert defended[0].weight is not model[0].weight
    for rate in (1.0, -0.1, "half", True):
        with pytest.raises(InvalidArgumentError, match=r"rate must be in \[0, 1\)"):
            dropout.with_dropout(model, rate)  # type: ignore[arg-type]
    for net, match in ((nn.Sequential(nn.ReLU()), "no dense layer"), (nn.Linear(2, 2), "nn.Seq")):
        with pytest.raises(UnsupportedLayerError, match=match):
            dropout.with_dropout(net, 0.5)  # type: ignore[arg-type]


def test_the_chance_of_a_recovery_is_the_share_of_masks_that_keep_enough() -> None:
    source, needed = torch.Generator().manual_seed(0), 192 - 4 * 27 + 4
    kept = (torch.rand(20_000, 4 * 64, generator=source) < 0.3).sum(1)
    share = float((kept >= needed).double().mean())
    assert dropout.recovery_chance(4, 3, 8, 3, 0.7, padding=1) == pytest.approx(share, abs=0.01)
    assert dropout.recovery_chance(10, 3, 8, 3, 0.5, padding=1) > 0.999
    for bad in ({"filters": 0}, {"rate": 1.0}, {"kernel": 2.5}):
        given = {"filters": 4, "channels": 3, "size": 8, "kernel": 3, "rate": 0.5} | bad
        with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
            dropout.recovery_chance(**given)  # type: ignore[arg-type]
