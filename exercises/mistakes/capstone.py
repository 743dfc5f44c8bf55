"""Plausible mistakes in the capstone; each must be refused by the right hint."""

from __future__ import annotations

import torch
from torch import nn

import gradinv_edu as gi
from gradinv_edu.coursework.mistakes import planted

LOSS = nn.CrossEntropyLoss()


def _recovery(model, file):
    try:
        return gi.recover(model, gi.Update.load(file), (1, 8, 8), LOSS)
    except gi.errors.GradientInversionError:
        return None


@planted("capstone-investigate", says="stopped on two samples")
def no_update_is_ever_odd(model, file):
    recovery = gi.recover(model, gi.Update.load(file), (1, 8, 8), LOSS)
    return recovery.inputs, recovery.targets


@planted("capstone-investigate", says="return nothing")
def bias_ratio_or_nothing(model, file):
    gradients = list(gi.Update.load(file).gradients.values())
    if gradients[1].dim() != 1:
        return None
    return gi.fully_connected.recover_input(gradients[0], gradients[1]), torch.tensor(1)


@planted("capstone-investigate", says="label is not")
def prediction_for_label(model, file):
    recovery = _recovery(model, file)
    return recovery and (recovery.inputs, model(recovery.inputs).argmax())


@planted("capstone-investigate", says="within reach")
def stretched_to_be_looked_at(model, file):
    recovery = _recovery(model, file)
    if recovery is None:
        return None
    x = recovery.inputs - recovery.inputs.mean()
    return x / x.abs().max(), recovery.targets


@planted("capstone-sure", says="whatever it is")
def always_sure(model, file):
    return 1.0


@planted("capstone-sure", says="a layer lacks rank")
def whoever_explains_the_gradient_is_right(model, file):
    recovery = _recovery(model, file)
    if recovery is None:
        return 0.0
    return 0.95 if recovery.mismatch is None or recovery.mismatch < 1e-6 else 0.05


@planted("capstone-sure", says="More than one sample")
def full_rank_is_enough(model, file):
    recovery = _recovery(model, file)
    if recovery is None:
        return 0.0
    return 0.95 if all(layer.full_rank for layer in recovery.layers) else 0.05


@planted("capstone-sure", says="Dare to say so")
def never_sure(model, file):
    recovery = _recovery(model, file)
    return 0.05 if recovery is not None else 0.0


@planted("capstone-sure", says="mean squared difference")
def hardly_committed(model, file):
    recovery = _recovery(model, file)
    return 0.55 if recovery is not None and recovery.exact else 0.45
