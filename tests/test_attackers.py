"""Laws of every registered attacker: it reads what is undefended, and does not vouch for errors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from gradinv_edu import data, metrics, models, scoreboard
from gradinv_edu.engine import attackers, defenses
from gradinv_edu.engine.attackers import ATTACKERS, Received
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


def received(defense: str, net: str = "dense", steps: int = 100) -> Received:
    own = defenses.get(defense)
    model = own.build(scoreboard.NETS[net].make(SHAPE, seeded(0)), SHAPE, seeded(0))
    update = own.send(model, LOSS, X[: own.samples], Y[: own.samples], 0.5, seeded(1))
    return Received(model, update, LOSS, SHAPE, own, X, steps)


# one defense whose answer each aware attacker must have; the naive meet none
WITHIN = {"aware algebra": "batch of 2", "aware search": "1 local step"}


@pytest.mark.parametrize("name", ATTACKERS)
def test_an_attacker_reads_a_digit_and_leaves_everything_alone(name: str) -> None:
    attacker, given = attackers.get(name), received(WITHIN.get(name, "none"))
    state, before = torch.get_rng_state(), copy.deepcopy(given.model.state_dict())
    answer, again = attacker(given), attacker(given)
    victims = X[: given.update.samples].double()
    assert metrics.psnr(scoreboard.matched(answer.inputs, victims), victims) > 50
    assert answer.exact == attacker.promises
    assert torch.equal(answer.inputs, again.inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], p) for n, p in given.model.state_dict().items())
    assert given.model.training and all(p.grad is None for p in given.model.parameters())


SURE = [name for name, attacker in ATTACKERS.items() if attacker.promises]


@pytest.mark.parametrize("net", ["dense", "lenet", "vit"])
@pytest.mark.parametrize("defense", defenses.DEFENSES)
def test_who_is_sure_is_right(defense: str, net: str) -> None:
    try:
        given = received(defense, net)
    except DoesNotApplyError:
        return
    for name in SURE:
        try:
            answer = attackers.get(name)(given)
        except GradientInversionError:
            continue
        if answer.exact:
            victims = X[: given.update.samples].double()
            assert metrics.psnr(scoreboard.matched(answer.inputs, victims), victims) > 40, name


@pytest.mark.parametrize("defense", ["random 10 %", "Soteria, 20 % kept"])
def test_a_block_that_sent_nothing_whole_is_no_crash(defense: str) -> None:
    try:
        answer = attackers.get("aware algebra")(received(defense, "resnet"))
    except GradientInversionError:
        return
    assert not answer.exact


@pytest.mark.parametrize("name", ATTACKERS)
@pytest.mark.parametrize("wrong", ["shape", "picture"])
def test_what_does_not_fit_is_refused_by_a_typed_error(name: str, wrong: str) -> None:
    given = received(WITHIN.get(name, "none"), steps=20)
    gradients, shape = dict(given.update.gradients), SHAPE
    first = next(iter(gradients))
    if wrong == "shape":
        gradients[first] = gradients[first][:, :-1]
    else:
        shape = (1, 9, 9)
    bad = replace(given, update=replace(given.update, gradients=gradients), input_shape=shape)
    with pytest.raises(InvalidTensorError, match="shape"):
        attackers.get(name)(bad)


def test_soteria_is_undone_where_the_columns_left_are_enough() -> None:
    conv, head = nn.Conv2d(3, 20, 3, padding=1), nn.Linear(20 * 256, 10)
    victim = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), head).double()
    x, own = data.photo("cat", size=16, dtype=torch.float64), defenses.get("Soteria, 20 % kept")
    model = own.build(victim, (3, 16, 16), seeded(0))
    update = own.send(model, LOSS, x, torch.tensor([3]), 0.1, seeded(0))
    answer = attackers.get("aware algebra")(Received(model, update, LOSS, (3, 16, 16), own))
    assert answer.exact and metrics.psnr(answer.inputs, x) > 200


def test_the_table_and_what_does_not_apply() -> None:
    assert all(attacker.name == name for name, attacker in ATTACKERS.items())
    with pytest.raises(UnknownNameError, match="No attacker 'gossip'; there are ratio, recursion"):
        attackers.get("gossip")
    with pytest.raises(InvalidArgumentError, match="an attacker 'ratio' already"):
        attackers.register("ratio")
    for name, defense, net, reason in (
        ("ratio", "none", "wide", "first layer is a convolution"),
        ("aware algebra", "none", "lenet", "nothing to know of"),
        ("aware search", "clipping to 0.1", "lenet", "does not see a factor"),
        ("aware search", "PRECODE", "wide", "new in every guess"),
    ):
        with pytest.raises(DoesNotApplyError, match=reason):
            attackers.get(name)(received(defense, net))
    unbiased = models.mlp((64, 24, 10), bias=False)
    update = defenses.get("none").send(unbiased, LOSS, X[:1], Y[:1], 0.5, seeded(0))
    with pytest.raises(DoesNotApplyError, match=r"No gradient of 1\.bias"):
        attackers.get("ratio")(Received(unbiased, update, LOSS, SHAPE))
