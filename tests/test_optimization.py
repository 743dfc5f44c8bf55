"""The search: faithful to its papers, fair to the attacker, and blind to the truth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradinv_edu import data, labels, metrics, models, sharing
from gradinv_edu import optimization as opt
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    UnknownNameError,
    UnsupportedLayerError,
    VanishingGradientError,
)

CE = nn.CrossEntropyLoss()
SHAPE = (1, 8, 8)
CLASS = torch.tensor([3])
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"local_steps": 4, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01},
]


def _seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return models.mlp((64, 24, 10), "sigmoid", dtype=dtype)


def _digit(dtype: torch.dtype = torch.float64) -> Tensor:
    return data.digit(3, dtype=dtype)


def _match(net: nn.Module, update: sharing.Update, **settings: Any) -> opt.Match:
    return opt.match_gradients(net, update, SHAPE, CE, **{"method": "idlg", **settings})


# --- the objective ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(opt.METHODS))
@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_the_objective_vanishes_at_the_truth(method: str, settings: dict[str, Any]) -> None:
    net, x = _net(), _digit()
    update = sharing.observe(net, CE, x, CLASS, **settings)
    found = _match(net, update, method=method, start=x, targets=CLASS, steps=1)
    assert found.objective < 1e-14
    assert metrics.psnr(found.inputs, x) > 100


def test_the_objective_is_the_published_one() -> None:
    net, x = _net(), _digit()
    guess = torch.rand(1, *SHAPE, generator=_seed(0), dtype=torch.float64)
    update = sharing.observe(net, CE, x, CLASS)
    own = sharing.observe(net, CE, guess, CLASS).gradients
    a, b = (torch.cat([g.flatten() for g in s.values()]) for s in (own, update.gradients))
    common: dict[str, Any] = {"start": guess, "targets": CLASS, "steps": 1}
    squared = _match(net, update, **common).history[0]
    assert squared == pytest.approx(float((a - b).square().sum() / b.square().sum()))
    cosine = _match(net, update, method="inverting_gradients", total_variation=0.1, **common)
    steps = (guess.diff(dim=-1).abs().mean() + guess.diff(dim=-2).abs().mean()).item()
    wanted = 1 - float(torch.cosine_similarity(a, b, dim=0)) + 0.1 * steps
    assert cosine.history[0] == pytest.approx(wanted)


# --- the search -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "start"),
    [(torch.float32, "normal"), (torch.float64, "uniform"), (torch.float64, "patterned")],
)
def test_idlg_finds_the_picture(dtype: torch.dtype, start: str) -> None:
    net = _net(dtype)
    update = sharing.observe(net, CE, _digit(dtype), CLASS)
    found = _match(net, update, start=start, steps=60)
    assert found.targets.tolist() == [3]
    assert found.inputs.dtype == torch.float64 and found.inputs.shape == (1, *SHAPE)
    assert metrics.psnr(found.inputs, _digit()) > 50


def test_dlg_guesses_the_label_along() -> None:
    net = _net()
    found = _match(net, sharing.observe(net, CE, _digit(), CLASS), method="dlg", restarts=3)
    assert found.targets.tolist() == [3]
    assert metrics.psnr(found.inputs, _digit()) > 50


def test_inverting_gradients_stays_among_pictures() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    found = _match(net, update, method="inverting_gradients", steps=300)
    assert float(found.inputs.min()) >= 0 and float(found.inputs.max()) <= 1
    assert metrics.psnr(found.inputs, _digit()) > 20


def test_the_aware_attacker_sees_through_local_steps() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS, local_steps=5, learning_rate=0.5)
    aware, unaware = (_match(net, update, simulate=s, steps=30) for s in (True, False))
    assert metrics.psnr(aware.inputs, _digit()) > 60
    assert metrics.psnr(unaware.inputs, _digit()) < 30
    assert unaware.objective > 1e-6 > aware.objective


def test_pruned_entries_that_are_known_are_left_out() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    kept = {n: torch.rand(g.shape, generator=_seed(1)) < 0.5 for n, g in update.gradients.items()}
    update.gradients.update({n: g * kept[n] for n, g in update.gradients.items()})
    settings: dict[str, Any] = {"targets": CLASS, "steps": 60}
    aware, unaware = _match(net, update, known=kept, **settings), _match(net, update, **settings)
    assert metrics.psnr(aware.inputs, _digit()) > 50
    assert metrics.psnr(unaware.inputs, _digit()) < 20


def test_masks_of_dropout_are_guessed_along() -> None:
    first, drop, head = nn.Linear(64, 40), nn.Dropout(0.3), nn.Linear(40, 10)
    net = nn.Sequential(nn.Flatten(), first, nn.Sigmoid(), drop, head).double()
    update = sharing.observe(net, CE, _digit(), CLASS, generator=_seed(0))
    settings: dict[str, Any] = {"method": "inverting_gradients", "targets": CLASS, "steps": 800}
    aware = _match(net, update, guess_masks=True, **settings)
    unaware = _match(net, update, **settings)
    dropped = update.gradients["4.weight"].abs().sum(dim=0) == 0
    assert list(aware.masks) == ["3"] and not unaware.masks
    assert torch.equal(aware.masks["3"].flatten() < 0.5, dropped)
    assert aware.objective < unaware.objective / 10


def test_what_was_not_sent_is_not_matched() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    del update.gradients["3.weight"], update.gradients["3.bias"]
    found = _match(net, update, targets=CLASS, steps=60)
    assert found.objective < 1e-10


def test_the_best_point_wins_not_the_last() -> None:
    net, near = _net(), _digit() * 0.99
    update = sharing.observe(net, CE, _digit(), CLASS)
    wild = _match(net, update, method="inverting_gradients", start=near, steps=3)
    assert wild.history[0] == min(wild.history) < wild.history[-1]
    assert torch.equal(wild.inputs, near)


def test_the_run_of_lowest_objective_wins() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    found = _match(net, update, steps=2, restarts=3)
    assert len(found.histories) == 3 and found.history in found.histories
    alone = [_match(net, update, steps=2, start=s).objective for s in ("normal", "uniform")]
    assert found.objective <= alone[0]


def test_a_search_stops_early() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    done = _match(net, update, tolerance=1e-6)
    assert done.converged and done.objective <= 1e-6 and len(done.history) < 50
    tired = _match(net, update, method="inverting_gradients", patience=5, learning_rate=1e-9)
    assert not tired.converged and len(tired.history) < 20


# --- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "classes", [[4], [1, 7, 7, 2], [0, 0, 0, 5], [9, 8, 3, 1, 0, 4], [7, 1, 7, 2, 7, 1]]
)
def test_labels_are_counted(bias: bool, classes: list[int]) -> None:
    net = models.lenet(SHAPE, bias=bias, dtype=torch.float64)
    x = data.digits(range(len(classes)), dtype=torch.float64)[0]
    for settings in ({}, {"local_steps": 3, "learning_rate": 0.001, "momentum": 0.5}):
        update = sharing.observe(net, CE, x, torch.tensor(classes), **settings)  # type: ignore[arg-type]
        found = labels.recover_labels(net, update, CE, SHAPE).tolist()
        rough = not bias and 0 in classes  # the class that this network prefers
        assert found == sorted(classes) or (rough and set(found) <= set(classes))


def test_steps_that_move_the_weights_do_not_hide_the_label_of_one_sample() -> None:
    net = models.lenet(SHAPE, generator=torch.Generator().manual_seed(1000))
    update = sharing.observe(net, CE, *data.digits([5]), local_steps=10, learning_rate=0.3)
    assert labels.recover_labels(net, update, CE, SHAPE).tolist() == [5]


def test_labels_of_other_losses() -> None:
    net = models.mlp((64, 8, 1), dtype=torch.float64)
    target = torch.ones(1, 1, dtype=torch.float64)
    loss = nn.BCEWithLogitsLoss()
    update = sharing.observe(net, loss, _digit(), target)
    assert torch.equal(labels.recover_labels(net, update, loss), target)
    two = sharing.observe(net, loss, _digit().repeat(2, 1, 1, 1), target.repeat(2, 1))
    with pytest.raises(InvalidArgumentError, match="No rule gives the labels"):
        labels.recover_labels(net, two, loss)


# --- manners ----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_picture_and_nothing_else_changes() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5), nn.BatchNorm1d(10))
    net = net.double().eval()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    update = sharing.observe(net, CE, _digit(), CLASS)
    one, two, other = (
        _match(net, update, method="dlg", steps=2, generator=_seed(s)) for s in (5, 5, 6)
    )
    assert torch.equal(one.inputs, two.inputs) and one.history == two.history
    assert not torch.equal(one.inputs, other.inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training and isinstance(net[2], nn.Dropout)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(net.state_dict()[n], v) for n, v in before.items())


def test_it_works_inside_no_grad() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    with torch.inference_mode():
        assert _match(net, update, steps=20).objective < 1e-3


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "gan"}, UnknownNameError, "No method 'gan'; there are dlg, idlg"),
        ({"start": "flat"}, UnknownNameError, "No start 'flat'; there are normal"),
        ({"steps": 0}, InvalidArgumentError, "steps must be a whole number"),
        ({"restarts": 1.5}, InvalidArgumentError, "restarts must be a whole number"),
        ({"learning_rate": -1.0}, InvalidArgumentError, "learning_rate must be positive, got -1.0"),
        (
            {"total_variation": float("nan")},
            InvalidArgumentError,
            "total_variation must be zero or more, got nan",
        ),
        ({"patience": 0}, InvalidArgumentError, "patience must be"),
        ({"guess_masks": True}, InvalidArgumentError, "needs a dropout layer in training mode"),
        ({"targets": torch.tensor([1, 2])}, InvalidTensorError, "a tensor of 1 labels"),
        ({"start": torch.zeros(1, 64)}, InvalidTensorError, "start has shape"),
        ({"known": {"7.weight": torch.ones(1)}}, InvalidTensorError, "which was not sent"),
        ({"known": {"1.bias": torch.ones(24)}}, InvalidTensorError, "must be boolean of shape"),
    ],
)
def test_what_cannot_be_is_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    with pytest.raises(error, match=message):
        _match(net, update, **settings)


def test_updates_that_say_nothing_are_refused() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    nothing = {n: torch.zeros_like(g, dtype=torch.bool) for n, g in update.gradients.items()}
    with pytest.raises(VanishingGradientError, match="Every known entry"):
        _match(net, update, known=nothing)
    with pytest.raises(InvalidTensorError, match="the model no such parameter"):
        _match(models.lenet(SHAPE), update)
    with pytest.raises(InvalidArgumentError, match="is for pictures"):
        opt.match_gradients(net, update, (64,), CE, total_variation=0.1)
    zero = sharing.Update({n: torch.zeros_like(g) for n, g in update.gradients.items()})
    with pytest.raises(VanishingGradientError, match="The classifier's gradient"):
        labels.recover_labels(net, zero, CE)
    spoiled = sharing.Update({n: g * torch.nan for n, g in update.gradients.items()})
    with pytest.raises(InvalidTensorError, match="NaN"):
        labels.recover_labels(net, spoiled, CE)
    with pytest.raises(InvalidTensorError, match="the model no such parameter"):
        labels.recover_labels(models.lenet(SHAPE), update, CE)
    del update.gradients["3.weight"]
    with pytest.raises(UnsupportedLayerError, match="give them as targets"):
        _match(net, update)


def test_shapes_and_labels_that_do_not_fit_are_told_in_shapes() -> None:
    net = _net()
    update = sharing.observe(net, CE, _digit(), CLASS)
    with pytest.raises(InvalidTensorError, match=r"do not take inputs \(1, 1, 8, 7\)"):
        opt.match_gradients(net, update, (1, 8, 7), CE)
    for wrong in (torch.tensor([12]), torch.tensor([1.0])):
        with pytest.raises(InvalidTensorError, match=r"and targets \(1,\)"):
            _match(net, update, targets=wrong)
    with pytest.raises(InvalidArgumentError, match="input_shape is the shape of one"):
        opt.match_gradients(net, update, None, CE)  # type: ignore[arg-type]
    for tolerance in (-1.0, float("nan"), "small"):
        with pytest.raises(InvalidArgumentError, match="tolerance must be"):
            _match(net, update, tolerance=tolerance)
