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
