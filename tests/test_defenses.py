"""Laws of every registered defense: a new one is tested by being registered."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradinv_edu import Update, data, models, scoreboard
from gradinv_edu.engine import defenses
from gradinv_edu.engine.defenses import DEFENSES, Defense
from gradinv_edu.errors import (
    DoesNotApplyError,
    GradientInversionError,
    InvalidArgumentError,
    InvalidTensorError,
    UnknownNameError,
)

LOSS, SHAPE = nn.CrossEntropyLoss(), (1, 8, 8)
X, Y = data.digits(range(8))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sent(defense: Defense, model: nn.Sequential, x: torch.Tensor = X) -> Update:
    n = defense.samples
    return defense.send(model, LOSS, x[:n], Y[:n], 0.5, seeded(1))


def same(a: Update, b: Update) -> bool:
    return all(torch.equal(g, b.gradients[n]) for n, g in a.gradients.items())


@pytest.mark.parametrize("defense", DEFENSES.values(), ids=list(DEFENSES))
def test_laws(defense: Defense) -> None:
    network = models.lenet(SHAPE, generator=seeded(0)).eval()
    before = {n: p.clone() for n, p in network.state_dict().items()}
    state = torch.get_rng_state()
    model = defense.build(network, SHAPE, seeded(2))
    kept = {n: p.clone() for n, p in model.state_dict().items()}
    update = sent(defense, model)
    # what is sent has the names, shapes and dtypes of the model, and says how many samples
    update.check(model)
    assert list(update.gradients) == [n for n, _ in model.named_parameters()]
    wanted = torch.float16 if defense.kind == "half" else torch.float32
    assert {g.dtype for g in update.gradients.values()} == {wanted}
    assert update.samples == defense.samples
    # the same generator draws the same; model, network and the global draws are left alone
    assert same(update, sent(defense, defense.build(network, SHAPE, seeded(2))))
    assert torch.equal(state, torch.get_rng_state())
    assert not network.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in network.state_dict().items())
    assert all(torch.equal(kept[n], p) for n, p in model.state_dict().items())
    # the model still classifies, and what is not finite is refused
    assert model(X[:2]).shape == (2, 10)
    with pytest.raises(InvalidTensorError, match="NaN"):
        sent(defense, model, X * math.nan)
    with pytest.raises(GradientInversionError):
        sent(defense, model, torch.cat([X, X], dim=1))


def test_the_table_and_what_does_not_apply() -> None:
    assert all(d.name == name for name, d in DEFENSES.items())
    with pytest.raises(UnknownNameError, match="No defense 'prayer'; there are none, batch of 2"):
        defenses.get("prayer")
    with pytest.raises(InvalidArgumentError, match="a defense 'sign' already"):
        defenses.register(DEFENSES["sign"])
    dense = scoreboard.NETS["dense"].make(SHAPE, seeded(0))
    block = models.norm_resnet(SHAPE, width=8)
    for network, reason in ((dense, "tells every pixel"), (block, "inside a block")):
        with pytest.raises(DoesNotApplyError, match=reason):
            defenses.get("rank far below").build(network, SHAPE, seeded(0))
