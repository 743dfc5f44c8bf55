"""Updates of small networks: what the tests of defenses share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import Update

LOSS = nn.CrossEntropyLoss()
THREE = torch.tensor([3])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(update: Update) -> Tensor:
    return torch.cat([g.double().flatten() for g in update.gradients.values()])


def small() -> tuple[nn.Sequential, Tensor, Update]:
    model = gi.models.mlp([64, 40, 10], "tanh", dtype=torch.float64)
    x = gi.data.digit(3, dtype=torch.float64)
    return model, x, gi.observe(model, LOSS, x, THREE)
