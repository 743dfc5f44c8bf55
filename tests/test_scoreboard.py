"""The board's figures come out again; a run can be stopped, and never mixes or loses a cell."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gradinv_edu import data, metrics, scoreboard
from gradinv_edu.errors import (
    InvalidArgumentError,
    InvalidTensorError,
    NotRecoveredError,
    ResultsFileError,
    UnknownNameError,
)
from gradinv_edu.scoreboard import ATTACKERS, AWARE, DEFENSES, NETS, PRICE, Settings

BOARD = scoreboard.load()
SETTINGS = Settings(**BOARD["settings"])
ALL = scoreboard.keys()
SMALL = Settings(pictures=1, seeds=1, steps=20)
CHEAP: list[scoreboard.Key] = [
    ("dense", "none", "ratio"),
    ("dense", "none", "recursion"),
    ("dense", "batch of 4", "aware algebra"),
]


# --- the committed file -----------------------------------------------------------------------


def test_every_cell_is_there_and_whole() -> None:
    assert set(BOARD["cells"]) == {"/".join(key) for key in ALL}
    assert Settings() == SETTINGS
    assert {"gradinv_edu", "torch", "opacus", "python"} <= set(BOARD["versions"])
    assert "1000" in BOARD["seeds"]
    for name, cell in BOARD["cells"].items():
        if "does_not_apply" in cell:
            assert len(cell["does_not_apply"]) > 20, name
        elif name.endswith(PRICE):
            assert len(cell["accuracy"]) == SETTINGS.seeds
            assert all(0 <= a <= 1 for a in cell["accuracy"])
        else:
            assert len(cell["psnr"]) == len(cell["ssim"]) >= SETTINGS.pictures
            assert cell["seconds"] >= 0
            assert len(cell.get("exact", cell["psnr"])) == len(cell["psnr"])


def test_what_is_vouched_for_is_so() -> None:
    vouched = [
        psnr
        for cell in BOARD["cells"].values()
        for psnr, exact in zip(cell.get("psnr", []), cell.get("exact", []), strict=False)
        if exact
    ]
    assert len(vouched) > 100 and min(vouched) > 40


def test_baselines_are_those_of_the_victims() -> None:
    assert scoreboard.baselines(SETTINGS) == BOARD["baselines"]
    assert len(BOARD["baselines"]["mean"]) == SETTINGS.pictures


@pytest.mark.parametrize(
    "key",
    [
        ("dense", "none", "ratio"),
        ("dense", "10 % by lot", "aware algebra"),
        ("dense", "batch of 8", "aware algebra"),
        ("dense", "sign", "recursion"),
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
    assert fresh.get("errors") == stored.get("errors")
    assert fresh.get("exact") == stored.get("exact")
    assert fresh.get("does_not_apply") == stored.get("does_not_apply")
    for now, then in zip(fresh.get("psnr", []), stored.get("psnr", []), strict=True):
        # far over what can be seen, figures are the processor's
        assert now == pytest.approx(then, abs=1.5) or min(now, then) > 60


def test_a_price_comes_out_again() -> None:
    fresh = scoreboard.measure(("dense", "none", PRICE), SETTINGS)
    stored = BOARD["cells"]["dense/none/price"]
    assert fresh["accuracy"] == pytest.approx(stored["accuracy"], abs=0.02)


def test_batches_are_free_and_noise_states_its_promise() -> None:
    cells = BOARD["cells"]
    assert cells["wide/batch of 8/price"]["accuracy"] == cells["wide/none/price"]["accuracy"]
    strong, weak = cells["wide/DP-SGD, σ = 1/price"], cells["wide/DP-SGD, σ = 0.1/price"]
    assert 4 < strong["epsilon_of_one_update"] < 6
    assert weak["epsilon_of_one_update"] > 50


# --- a cell -----------------------------------------------------------------------------------


def test_a_score_does_not_depend_on_the_order_of_a_batch() -> None:
    truth, _ = data.digits(range(5))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(scoreboard.matched(truth[order], truth), truth.double())
    assert torch.equal(scoreboard.matched(truth[order].reshape(5, 64), truth), truth.double())


def test_fewer_pictures_than_there_were_leave_gaps() -> None:
    truth, _ = data.digits(range(3))
    found = scoreboard.matched(truth[2], truth)
    assert torch.equal(found[2], truth[2].double())
    assert found[:2].isnan().all()
    with pytest.raises(InvalidTensorError, match="no whole number of pictures"):
        scoreboard.matched(torch.rand(65), truth)


def test_an_attack_without_an_answer_is_a_failure_with_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(sent: scoreboard.Sent) -> scoreboard.Answer:
        raise NotRecoveredError("none")

    monkeypatch.setitem(ATTACKERS, "recursion", broken)
    cell = scoreboard.measure(("dense", "none", "recursion"), Settings(pictures=2))
    pictures = scoreboard.load_data()
    floor = metrics.psnr(pictures.x.mean(0), pictures.test_x[0])
    assert cell["errors"] == {"NotRecoveredError": 2}
    assert cell["exact"] == [False, False]
    assert cell["psnr"][0] == pytest.approx(floor, abs=0.06)


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKERS, "recursion", lambda sent: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scoreboard.measure(("dense", "none", "recursion"), SMALL)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (("wide", "none", "ratio"), "first layer is a convolution"),
        (("dense", "rank far below", PRICE), "dense first layer tells every pixel"),
        (("lenet", "none", "aware algebra"), "nothing to know of"),
        (("lenet", "clipping to 0.1", "aware search"), "does not see a factor"),
        (("wide", "PRECODE", "aware search"), "new in every guess"),
    ],
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else None,
)
def test_what_does_not_apply_says_why(key: scoreboard.Key, reason: str) -> None:
    assert reason in scoreboard.measure(key, SMALL)["does_not_apply"]


def test_the_board_leaves_the_global_draws_alone() -> None:
    before = torch.get_rng_state()
    scoreboard.measure(("dense", "PRECODE", "cosine + TV"), SMALL)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"data": "faces"}, UnknownNameError, "No data 'faces'"),
        ({"pictures": 0}, InvalidArgumentError, "pictures must be a whole number from 1"),
        ({"seeds": 1.5}, InvalidArgumentError, "seeds must be a whole number"),
        ({"steps": 19}, InvalidArgumentError, "from 20, got 19"),
        ({"steps": True}, InvalidArgumentError, "steps must be"),
    ],
)
def test_impossible_settings(arguments: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        Settings(**arguments)


def test_unknown_cells() -> None:
    with pytest.raises(UnknownNameError, match="No 'resnet' on the board; there are dense"):
        scoreboard.keys(nets=["resnet"])
    with pytest.raises(UnknownNameError, match="No 'prayer'"):
        scoreboard.measure(("dense", "prayer", "ratio"), SMALL)
    with pytest.raises(UnknownNameError, match="No 'gossip'"):
        scoreboard.run(os.devnull, cells=[("dense", "none", "gossip")])


def test_cifar10_where_the_reader_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def pictures(root: str, indices: range) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(len(indices), 3, 32, 32, generator=generator)
        return x, torch.arange(len(indices)) % 10

    scoreboard.load_data.cache_clear()
    monkeypatch.setattr(data, "cifar10", pictures)
    cell = scoreboard.measure(("dense", "none", "ratio"), Settings("cifar10", 1, 1, 20))
    scoreboard.load_data.cache_clear()
    assert min(cell["psnr"]) > 100


def test_cifar10_where_the_reader_has_not(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--file", str(tmp_path / "board.json"), "--cifar10", str(tmp_path)]
    assert scoreboard.main(arguments) == 2
    assert capsys.readouterr().err
    assert not (tmp_path / "board.json").exists()


# --- stopping and going on --------------------------------------------------------------------


def _run(file: Path, **options: Any) -> dict[str, Any]:
    return scoreboard.run(file, settings=SMALL, cells=CHEAP, progress=False, **options)


def _without_seconds(board: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {n: v for n, v in cell.items() if n != "seconds"}
        for name, cell in board["cells"].items()
    }


def test_a_crash_loses_no_finished_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, measure = tmp_path / "board.json", scoreboard.measure

    def fragile(key: scoreboard.Key, *rest: Any) -> scoreboard.Cell:
        if key == CHEAP[2]:
            raise KeyboardInterrupt
        return measure(key, *rest)

    monkeypatch.setattr(scoreboard, "measure", fragile)
    with pytest.raises(KeyboardInterrupt):
        _run(file)
    kept = scoreboard.load(file)
    assert set(kept["cells"]) == {"/".join(key) for key in CHEAP[:2]}
    assert [path.name for path in tmp_path.iterdir()] == ["board.json"]

    asked: list[scoreboard.Key] = []
    monkeypatch.setattr(
        scoreboard, "measure", lambda key, *rest: asked.append(key) or measure(key, *rest)
    )
    whole = _run(file)
    assert asked == [CHEAP[2]]
    assert {n: whole["cells"][n] for n in kept["cells"]} == kept["cells"]
    assert scoreboard.load(file) == whole


def test_a_finished_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "board.json"
    copy.write_bytes(scoreboard.FILE.read_bytes())
    monkeypatch.setattr(scoreboard, "measure", lambda *_: pytest.fail("nothing is missing"))
    monkeypatch.setattr(scoreboard, "versions", lambda: BOARD["versions"])
    assert scoreboard.run(copy, progress=False) == BOARD
    assert copy.read_bytes() == scoreboard.FILE.read_bytes()
    scoreboard.save(BOARD, copy)
    assert copy.read_bytes() == scoreboard.FILE.read_bytes()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b["versions"].update(torch="1.0.0"), "other versions .torch '1.0.0', now"),
        (lambda b: b["versions"].update(gradinv_edu="9"), "other versions"),
        (lambda b: b["settings"].update(steps=77), "other settings .steps 77, now 20"),
        (lambda b: b.update(format=0), "another format than 1"),
        (lambda b: b.pop("cells"), "no results file of this program"),
        (lambda b: b.update(seeds="others"), "other seeds"),
        (lambda b: b.update(versions=None), "another format than 1"),
        (lambda b: b.update(settings=[]), "another format than 1"),
        (lambda b: b.update(baselines="none"), "another format than 1"),
        (lambda b: b["cells"].update({"dense/none/DLG": {}}), "damaged: its cell 'dense/none/DLG'"),
        (lambda b: b["cells"].update({f"dense/none/{PRICE}": {"psnr": [1]}}), "holds no accuracy"),
    ],
    ids=[
        "torch",
        "package",
        "settings",
        "format",
        "cells",
        "seeds",
        "no versions",
        "no settings",
        "no baselines",
        "an empty cell",
        "another cell",
    ],
)
def test_a_file_of_another_kind_is_not_touched(tmp_path: Path, change: Any, match: str) -> None:
    file = tmp_path / "board.json"
    board = scoreboard.load(tmp_path / "none.json", SMALL)
    change(board)
    file.write_text(json.dumps(board))
    before = file.read_bytes()
    with pytest.raises(ResultsFileError, match=match):
        _run(file)
    assert file.read_bytes() == before


def test_a_truncated_file_is_not_touched(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "board.json"
    file.write_bytes(scoreboard.FILE.read_bytes()[:1000])
    assert scoreboard.main(["--file", str(file)]) == 2
    assert "no results file of this program" in capsys.readouterr().err
    assert len(file.read_bytes()) == 1000
    with pytest.raises(ResultsFileError, match="There is no results file"):
        scoreboard.load(tmp_path / "nowhere.json")
    with pytest.raises(ResultsFileError, match="IsADirectory"):
        scoreboard.load(tmp_path)
    with pytest.raises(UnknownNameError, match="No data 'mnist'; there are digits, cifar10"):
        scoreboard.load_data("mnist")


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "board.json"
    arguments = ["--file", str(file), "--nets", "dense", "--defenses", "none", "--pictures", "1"]
    assert scoreboard.main([*arguments, "--attackers", "ratio"]) == 0
    assert list(scoreboard.load(file)["cells"]) == ["dense/none/ratio"]
    assert "100%" in capsys.readouterr().err
    assert scoreboard.main([*arguments, "--workers", "0"]) == 2
    assert "workers must be a whole number from 1" in capsys.readouterr().err


def test_workers_find_the_same(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    alone = _run(tmp_path / "alone.json")
    assert _without_seconds(_run(tmp_path / "two.json", workers=2)) == _without_seconds(alone)


def test_a_local_ray_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        found = _run(tmp_path / "ray.json", ray=True)
    finally:
        ray.shutdown()
    assert _without_seconds(found) == _without_seconds(_run(tmp_path / "alone.json"))


def test_the_names_of_the_board() -> None:
    assert set(AWARE) < set(ATTACKERS)
    assert all(defense.name == name for name, defense in DEFENSES.items())
    assert len(scoreboard.keys()) == len(NETS) * len(DEFENSES) * (len(ATTACKERS) + 1)


def test_a_summary_counts_what_the_cell_holds() -> None:
    cell = BOARD["cells"]["dense/10 % by lot/aware algebra"]
    found = scoreboard.summary(BOARD, ("dense", "10 % by lot", "aware algebra"))
    assert found is not None and found.exact == sum(cell["exact"]) / len(cell["exact"])
    assert found.successes.successes == sum(psnr > scoreboard.SUCCESS for psnr in cell["psnr"])
    assert scoreboard.summary(BOARD, ("wide", "none", "ratio")) is None
    with pytest.raises(UnknownNameError, match="has no cell 'wide/none/DLG' yet"):
        scoreboard.summary({"cells": {}}, ("wide", "none", "DLG"))


def test_who_knows_is_never_worse_off() -> None:
    for net in NETS:
        for defense in DEFENSES:
            naive = scoreboard.best(BOARD, net, defense, naive=True)
            aware = scoreboard.best(BOARD, net, defense)
            assert (naive is None) == (aware is None)
            if naive is not None and aware is not None:
                assert naive.attacker not in AWARE
                assert aware.psnr >= naive.psnr


def test_the_drawing_names_every_row_and_column() -> None:
    figure = scoreboard.draw(BOARD)
    labels = [[text.get_text() for text in axes.get_xticklabels()] for axes in figure.axes]
    assert labels == [list(ATTACKERS)] * len(NETS)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(DEFENSES)
