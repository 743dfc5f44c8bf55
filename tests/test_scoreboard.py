"""The board's figures come out again; a run can be stopped, and never mixes or loses a cell."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch

import gradinv_edu as gi
from gradinv_edu import data, metrics, scoreboard
from gradinv_edu.engine.attackers import ATTACKERS, Received
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    NotRecoveredError,
    ResultsFileError,
    UnknownNameError,
)
from gradinv_edu.scoreboard import DEFENSES, PRICE, Settings

BOARD = scoreboard.load(scoreboard.QUICK_FILE)
STUDY = scoreboard.load()
SETTINGS = scoreboard.QUICK_SETTINGS
ALL = scoreboard.keys()
SMALL = replace(SETTINGS, pictures=1, searched=1, steps=20)
CHEAP: list[scoreboard.Key] = [
    ("dense", "none", "ratio"),
    ("dense", "none", "recursion"),
    ("dense", "batch of 4", "aware algebra"),
]


# --- the committed file -----------------------------------------------------------------------


def test_every_cell_is_there_and_whole_and_what_is_vouched_for_is_so() -> None:
    assert set(BOARD["cells"]) == {"/".join(key) for key in ALL}
    assert len(ALL) == 3 * len(DEFENSES) * len(ATTACKERS)
    assert {**BOARD["settings"], "pictures": 4, "searched": 4} == asdict(SETTINGS)
    assert {**STUDY["settings"], "pictures": 100, "searched": 10} == asdict(Settings())
    assert scoreboard.baselines(SETTINGS) == BOARD["baselines"]
    vouched = []
    for board in (BOARD, STUDY):
        assert {"gradinv_edu", "torch", "opacus", "python"} <= set(board["versions"])
        assert "1000" in board["seeds"]
        for name, cell in board["cells"].items():
            if "does_not_apply" in cell:
                assert len(cell["does_not_apply"]) > 20, name
            elif name.endswith(PRICE):
                assert len(cell["accuracy"]) == board["settings"]["seeds"]
                assert all(0 <= a <= 1 for a in cell["accuracy"])
            else:
                assert len(cell["psnr"]) == len(cell["ssim"]) >= 4
                pairs = zip(cell["psnr"], cell.get("exact", [False] * 999), strict=False)
                vouched += [psnr for psnr, exact in pairs if exact]
    assert len(vouched) > 300 and min(vouched) > 40
    private = STUDY["cells"]["dense/DP-SGD, σ = 1/price"]
    assert 4 < private["epsilon_of_one_update"] < 6


@pytest.mark.parametrize(
    "key",
    [
        ("dense", "none", "ratio"),
        ("dense", "random 10 %", "aware algebra"),
        ("dense", "batch of 8", "aware algebra"),
        ("dense", "sign", "recursion"),
        ("dense", "Soteria, 20 % kept", "aware algebra"),
        ("lenet", "dropout 0.5", "recursion"),
        ("lenet", "rank far below", "aware algebra"),
        ("lenet", "PRECODE", "aware algebra"),
        ("wide", "batch of 2", "recursion"),
        ("wide", "dropout 0.5", "aware algebra"),
        ("wide", "batch of 8", "aware algebra"),
        ("dense", "none", "cosine + TV"),
        ("dense", "rank far below", "recursion"),
    ],
    ids="/".join,
)
def test_a_slice_comes_out_again(key: scoreboard.Key) -> None:
    fresh, stored = scoreboard.measure(key, SETTINGS), BOARD["cells"]["/".join(key)]
    assert set(fresh) == set(stored)
    assert fresh.get("does_not_apply") == stored.get("does_not_apply")
    count = len(fresh.get("psnr", []))  # some cells hold more pictures
    assert fresh.get("exact", []) == stored.get("exact", [])[:count]
    for now, then in zip(fresh.get("psnr", []), stored.get("psnr", [])[:count], strict=True):
        # far over what can be seen, figures are the processor's
        assert now == pytest.approx(then, abs=1.5) or min(now, then) > 60


def test_a_trained_network_comes_out_again_and_is_that_of_the_price() -> None:
    key = ("dense, trained", "none", "recursion")
    few, stored = replace(Settings(), pictures=1, seeds=1), STUDY["cells"]
    now, then = scoreboard.measure(key, few), stored["/".join(key)]
    assert now["exact"] == then["exact"][:1] and now["psnr"][0] > 60 < then["psnr"][0]
    price = scoreboard.measure(("dense", "none", PRICE), few)
    assert price["rate"] == stored["dense/none/price"]["rate"]
    assert price["accuracy"][0] == pytest.approx(
        stored["dense/none/price"]["accuracy"][0], abs=0.02
    )
    assert not [key for key in scoreboard.keys(["wide, trained"]) if key[2] == PRICE]


def test_a_cell_of_too_few_pictures_is_gone_on_with(tmp_path: Path) -> None:
    file, two = tmp_path / "board.json", replace(SMALL, pictures=2)
    one = _run(file)["cells"]["dense/none/recursion"]
    grown = scoreboard.run(file, settings=two, cells=CHEAP, progress=False)["cells"]
    whole = scoreboard.measure(CHEAP[1], two)
    assert grown["dense/none/recursion"]["psnr"] == whole["psnr"] and len(one["psnr"]) == 1
    assert len(grown["dense/batch of 4/aware algebra"]["psnr"]) == 4  # a whole batch was there


# --- a cell -----------------------------------------------------------------------------------


def test_a_score_does_not_depend_on_the_order_of_a_batch_and_leaves_gaps() -> None:
    truth, _ = data.digits(range(5))
    shuffled = truth[[3, 0, 4, 1, 2]]
    for found in (shuffled, shuffled.reshape(5, 64)):
        assert torch.equal(scoreboard.matched(found, truth), truth.double())
    found = scoreboard.matched(truth[2], truth)
    assert torch.equal(found[2], truth[2].double()) and found[:2].isnan().all()
    with pytest.raises(InvalidTensorError, match="no whole number of pictures"):
        scoreboard.matched(torch.rand(65), truth)


def test_an_attack_without_an_answer_fails_by_name_and_other_errors_are_not_swallowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attack(error: Exception) -> None:
        def broken(received: Received) -> Any:
            raise error

        walk = ATTACKERS["recursion"]
        monkeypatch.setitem(ATTACKERS, "recursion", replace(walk, attack=broken))

    attack(NotRecoveredError("none"))
    cell = scoreboard.measure(("dense", "none", "recursion"), replace(SMALL, pictures=2))
    pictures = scoreboard.load_data("digits")
    floor = metrics.psnr(pictures.x.mean(0), pictures.test_x[0])
    assert cell["errors"] == {"NotRecoveredError": 2} and cell["exact"] == [False, False]
    assert cell["psnr"][0] == pytest.approx(floor, abs=0.06)
    attack(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        scoreboard.measure(("dense", "none", "recursion"), SMALL)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Settings(data="faces"), UnknownNameError, "No 'faces'"),
        (lambda: scoreboard.load_data("faces"), UnknownNameError, "are mnist, digits, cifar10"),
        (lambda: Settings(pictures=0), InvalidArgumentError, "pictures must be a whole number"),
        (lambda: Settings(searched=0), InvalidArgumentError, "searched must be a whole number"),
        (lambda: Settings(seeds=1.5), InvalidArgumentError, "seeds must be a whole number"),  # type: ignore[arg-type]
        (lambda: Settings(steps=19), InvalidArgumentError, "20 or more; got 19"),
        (lambda: scoreboard.keys(nets=["gnu"]), UnknownNameError, "there are dense"),
        (lambda: scoreboard.measure(("dense", "prayer", "ratio")), UnknownNameError, "'prayer'"),
        (lambda: scoreboard.run(os.devnull, cells=[("dense", "none", "gossip")]),
         UnknownNameError, "No 'gossip'"),
        (lambda: scoreboard.load("nowhere.json"), ResultsFileError, "There is no results file"),
        (lambda: scoreboard.load("."), ResultsFileError, "IsADirectory"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_cifar10_where_the_reader_has_it_or_has_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["--file", str(tmp_path / "board.json"), "--cifar10", str(tmp_path)]
    assert scoreboard.main(arguments) == 2 and capsys.readouterr().err
    assert scoreboard.main(["--cifar10", str(tmp_path)]) == 2
    assert "a file of their own" in capsys.readouterr().err
    assert not (tmp_path / "board.json").exists()

    def pictures(root: str, indices: range) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(len(indices), 3, 32, 32), torch.arange(len(indices)) % 10

    scoreboard.load_data.cache_clear()
    monkeypatch.setattr(data, "cifar10", pictures)
    cell = scoreboard.measure(("dense", "none", "ratio"), Settings("cifar10", 1, 1, 20))
    scoreboard.load_data.cache_clear()
    assert min(cell["psnr"]) > 100


# --- stopping and going on --------------------------------------------------------------------


def _run(file: Path, **options: Any) -> dict[str, Any]:
    return scoreboard.run(file, settings=SMALL, cells=CHEAP, progress=False, **options)


def _without_seconds(board: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {n: v for n, v in cell.items() if n != "seconds"}
        for name, cell in board["cells"].items()
    }


def test_a_crash_loses_no_finished_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, measure, made = tmp_path / "board.json", scoreboard.measure, []

    def fragile(key: scoreboard.Key, *rest: Any) -> scoreboard.Cell:
        made.append(key)
        if made == CHEAP:
            raise KeyboardInterrupt
        return measure(key, *rest)

    monkeypatch.setattr(scoreboard, "measure", fragile)
    with pytest.raises(KeyboardInterrupt):
        _run(file)
    kept = scoreboard.load(file)
    assert set(kept["cells"]) == {"/".join(key) for key in CHEAP[:2]}
    assert [path.name for path in tmp_path.iterdir()] == ["board.json"]
    whole = _run(file)
    assert made == [*CHEAP, CHEAP[2]]
    assert {n: whole["cells"][n] for n in kept["cells"]} == kept["cells"]
    assert scoreboard.load(file) == whole


def test_a_finished_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, before = tmp_path / "board.json", scoreboard.QUICK_FILE.read_bytes()
    copy.write_bytes(before)
    monkeypatch.setattr(scoreboard, "measure", lambda *_: pytest.fail("nothing is missing"))
    monkeypatch.setattr(scoreboard.sweep, "versions", lambda: BOARD["versions"])
    assert scoreboard.run(copy, settings=SETTINGS, progress=False) == BOARD
    assert copy.read_bytes() == before
    scoreboard.sweep.save(BOARD, copy, ["/".join(key) for key in ALL])
    assert copy.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b["versions"].update(torch="1.0.0"), "other versions .torch '1.0.0', now"),
        (lambda b: b["settings"].update(steps=77), "other settings .steps 77, now 20"),
        (lambda b: b.update(format=0), "other format"),
        (lambda b: b.update(seeds="others"), "other seeds"),
        (lambda b: b.update(seeds=1), "another format"),
        (lambda b: b.pop("cells"), "no results file of this program"),
        (lambda b: b.update(versions=None), "another format"),
        (lambda b: b.update(settings=[]), "another format"),
        (lambda b: b.update(baselines="none"), "another format"),
        (lambda b: b["cells"].update({"dense/none/DLG": {}}), "damaged: its cell 'dense/none/DLG'"),
        (lambda b: b["cells"].update({f"dense/none/{PRICE}": {"psnr": [1]}}), "holds no accuracy"),
    ],
)
def test_a_file_of_another_kind_is_not_touched(tmp_path: Path, change: Any, match: str) -> None:
    file, board = tmp_path / "board.json", scoreboard.load(tmp_path / "none.json", SMALL)
    change(board)
    file.write_text(json.dumps(board))
    before = file.read_bytes()
    with pytest.raises(ResultsFileError, match=match):
        _run(file)
    assert file.read_bytes() == before


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    file, broken = tmp_path / "board.json", tmp_path / "broken.json"
    quick = ["--quick", "--file", str(file), "--pictures", "1"]
    arguments = [*quick, "--nets", "dense", "--defenses", "none"]
    assert scoreboard.main([*arguments, "--attackers", "ratio"]) == 0
    assert list(scoreboard.load(file)["cells"]) == ["dense/none/ratio"]
    assert "100%" in capsys.readouterr().err
    assert scoreboard.main([*arguments, "--workers", "0"]) == 2
    assert "workers must be a whole number" in capsys.readouterr().err
    broken.write_bytes(scoreboard.QUICK_FILE.read_bytes()[:1000])
    assert scoreboard.main(["--quick", "--file", str(broken)]) == 2
    assert "no results file of this program" in capsys.readouterr().err
    assert len(broken.read_bytes()) == 1000


def test_workers_find_the_same(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    alone = _run(tmp_path / "alone.json")
    assert _without_seconds(_run(tmp_path / "two.json", workers=2)) == _without_seconds(alone)


def test_a_local_ray_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except Exception as error:  # a busy machine: no time, or no port
        ray.shutdown()
        pytest.skip(f"Ray did not start: {type(error).__name__}: {error}")
    try:
        found = _run(tmp_path / "ray.json", ray=True)
    except ray.exceptions.RayError as error:
        pytest.skip(f"Ray stopped: {type(error).__name__}: {error}")
    finally:
        ray.shutdown()
    assert _without_seconds(found) == _without_seconds(_run(tmp_path / "alone.json"))


@pytest.mark.parametrize("bias", [True, False])
def test_signs_that_fit_as_a_gradient_are_not_vouched_for(bias: bool) -> None:
    """Trial 49 of the transformer: each row of signs is a sum of whole positions' signs."""
    digits, source = scoreboard.load_data("mnist"), torch.Generator().manual_seed(1049)
    model = scoreboard.NETS["vit"].make((1, 28, 28), source)
    x, y = digits.test_x[49:50], digits.test_y[49:50]
    if not bias:
        model[0].conv.bias = None
    sent = gi.observe(model, scoreboard.LOSS, x, y)
    signs = gi.Update({name: g.sign() for name, g in sent.gradients.items()})
    plain, found = (gi.recover(model, u, (1, 28, 28), scoreboard.LOSS) for u in (sent, signs))
    assert plain.exact and not found.exact
    near, far = (metrics.psnr(answer.inputs, x.double()) for answer in (plain, found))
    assert far < 10 < 100 < near
    assert found.layers[0].full_rank if bias else (found.mismatch or 0.0) > 0.5


# --- reading it -------------------------------------------------------------------------------


def test_the_table_counts_what_the_cells_hold_and_who_knows_is_never_worse_off() -> None:
    table, cell = scoreboard.table(BOARD), BOARD["cells"]["dense/random 10 %/aware algebra"]
    row = table.loc["dense", "random 10 %", "aware algebra"]
    assert row["exact"] == sum(cell["exact"]) / len(cell["exact"])
    assert row["successes"] == sum(psnr > scoreboard.SUCCESS for psnr in cell["psnr"])
    assert math.isnan(table.loc["wide", "none", "ratio"]["psnr"])
    naive, aware = scoreboard.best(BOARD, naive=True), scoreboard.best(BOARD)
    assert set(naive.index) == set(aware.index)
    assert not any(ATTACKERS[name].aware for name in naive["attacker"])
    assert (aware["psnr"] >= naive["psnr"].reindex(aware.index)).all()


def test_leaks_are_counted_by_networks_beside_what_was_learned() -> None:
    found = scoreboard.leaks(STUDY, "dense, trained")
    none, cells = found.loc["none"], STUDY["cells"]
    scores, psnr = cells["dense/none/price"]["accuracy"], cells["dense, trained/none/ratio"]["psnr"]
    assert none["accuracy"] == pytest.approx(sum(scores) / 5)
    test = scipy.stats.ttest_1samp(scores, 0).confidence_interval()
    assert none["reach"] == pytest.approx((test.high - test.low) / 2)
    assert none["naive read"].trials == len(psnr)
    assert none["naive read"].low == pytest.approx(metrics.wilson_interval(5, 5)[0])
    pairs = zip(found["naive read"], found["aware read"], strict=True)
    assert all(any_.rate >= naive.rate for naive, any_ in pairs)
    fresh = scoreboard.leaks(STUDY, "dense").loc["none", "naive read"]  # a network each
    assert fresh == metrics.success_rate([True] * fresh.trials)
    with pytest.raises(UnknownNameError, match="No attack on 'gnu'"):
        scoreboard.leaks(STUDY, "gnu")


def test_the_drawings_name_every_row_and_column() -> None:
    (axes,) = scoreboard.draw(BOARD, "wide").axes
    columns = [text.get_text().replace("\n", " ") for text in axes.get_xticklabels()]
    assert columns == list(ATTACKERS)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(DEFENSES)
    axes, _ = scoreboard.draw_leaks(STUDY, "dense, trained").axes
    told = [text.get_text() for text in axes.get_yticklabels()]
    assert told == list(scoreboard.leaks(STUDY, "dense, trained").index)


def test_a_training_that_overflows_is_said_to_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = scoreboard.NETS["dense"]
    monkeypatch.setitem(scoreboard.NETS, "dense", replace(kept, rate=1e30, rounds=5))
    scoreboard._rate.cache_clear()
    try:
        for column in (PRICE, "ratio"):
            cell = scoreboard.measure((f"dense{scoreboard.TRAINED}", "none", column), SMALL)
            assert "overflows" in cell["does_not_apply"]
    finally:
        scoreboard._rate.cache_clear()
        scoreboard._trained.cache_clear()
