"""The command line: what it prints for people and for machines, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gradinv_edu as gi
from gradinv_edu import cli

PACKAGE = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 4))


net = make()
number = 3


def broken():
    raise RuntimeError("no weights today")
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "the_nets.py").write_text(PACKAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "the_nets", raising=False)
    return "the_nets"


def run(*arguments: str) -> int:
    return cli.main(arguments)


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_an_audit_for_people(capsys: pytest.CaptureFixture[str], nets: str) -> None:
    assert run("audit", f"{nets}:make", "--input", "1,8,8") == 0
    printed = capsys.readouterr().out
    assert "determined" in printed and "gives its input away exactly" in printed


def test_an_audit_for_machines_is_the_packages(
    capsys: pytest.CaptureFixture[str], nets: str
) -> None:
    assert run("audit", f"{nets}:net", "--input", "1,8,8", "--json") == 0
    found = answer(capsys)
    model = cli.load_model(f"{nets}:net")
    assert found.pop("leak") == 1.0
    assert found == json.loads(json.dumps(gi.audit(model, (1, 8, 8)).to_dict()))


@pytest.fixture
def program(nets: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.export.export(cli.load_model(f"{nets}:make"), (torch.zeros(1, 1, 8, 8),))
        torch.export.save(made, "net.pt2")
    return "net.pt2"


def test_a_saved_program_is_audited_and_recovered_from_as_its_model(
    capsys: pytest.CaptureFixture[str], nets: str, program: str
) -> None:
    model = cli.load_model(f"{nets}:make")
    update = gi.observe(model, nn.CrossEntropyLoss(), gi.data.digit(7), torch.tensor([2]))
    update.save("update.safetensors")
    save_file(model.state_dict(), "sent.safetensors")
    told = []
    for name in (program, f"{nets}:make"):
        assert run("audit", name, "--input", "1,8,8", "--json") == 0
        told.append({**answer(capsys), "model": None})
        given = ["--model", name, "--weights", "sent.safetensors", "--update", "update.safetensors"]
        assert run("recover", *given, "--input", "1,8,8", "--json") == 0
        told.append(answer(capsys))
    assert told[:2] == told[2:] and told[1]["exact"] is True
    assert run("audit", program, "--input", "1,8,8", "--limit", "0.5", "--json") == 1
    assert cli.load_model(program).training


def test_a_model_file_that_is_no_model_is_told(
    capsys: pytest.CaptureFixture[str], nets: str, program: str
) -> None:
    whole = Path(program).read_bytes()
    Path("short.pt2").write_bytes(whole[: len(whole) // 2])
    torch.save(cli.load_model(f"{nets}:make"), "pickle.pt")
    softmax = nn.Sequential(nn.Linear(64, 4), nn.Softmax(1))
    torch.export.save(torch.export.export(softmax, (torch.zeros(1, 64),)), "softmax.pt2")
    for name, kind, message in (
        ("none.pt2", "ModelFileError", "No such file"),
        ("short.pt2", "ModelFileError", "short.pt2"),
        ("pickle.pt", "ModelFileError", "holds 0 programs"),
        ("softmax.pt2", "UnsupportedLayerError", "calls softmax"),
    ):
        assert run("audit", name, "--input", "64", "--json") == 2
        told = answer(capsys)
        assert told["error"] == kind and message in str(told["message"])


@pytest.mark.parametrize(("limit", "code"), [("0.5", 1), ("1", 0)])
def test_an_audit_fails_a_pipeline_above_the_limit(nets: str, limit: str, code: int) -> None:
    assert run("audit", f"{nets}:make", "--input", "1,8,8", "--limit", limit, "--json") == code


def test_networks_of_torchvision_and_of_the_course() -> None:
    assert isinstance(cli.load_model("squeezenet1_0"), nn.Module)
    before = torch.random.get_rng_state()
    one, other = (cli.load_model("squeezenet1_0").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(before, torch.random.get_rng_state())
    assert cli.load_model("gradinv:lenet", (1, 28, 28))[0].in_channels == 1  # type: ignore[index]


def test_an_update_file_becomes_a_picture(
    capsys: pytest.CaptureFixture[str], nets: str, tmp_path: Path
) -> None:
    from PIL import Image

    model = cli.load_model(f"{nets}:make")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    save_file(model.state_dict(), "sent.safetensors")
    digit = gi.data.digit(7)
    update = gi.observe(model, nn.CrossEntropyLoss(), digit, torch.tensor([2]))
    update.save("update.safetensors")
    common = ["--model", f"{nets}:make", "--weights", "sent.safetensors", "--input", "1,8,8"]
    common += ["--update", "update.safetensors", "--out", "picture.png"]
    assert run("recover", *common, "--json") == 0
    found = answer(capsys)
    assert found["exact"] is True and found["targets"] == [2]
    pixels = torch.from_numpy(np.array(Image.open("picture.png").convert("L"))).double()
    assert (pixels - digit[0, 0] * 255).abs().max() <= 0.5 + 1e-3  # nothing but their rounding
    assert run("recover", *common) == 0
    assert "may be trusted" in capsys.readouterr().out


def test_without_the_weights_sent_nothing_is_called_exact(
    capsys: pytest.CaptureFixture[str], nets: str
) -> None:
    torch.manual_seed(5)
    other = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 4))
    update = gi.observe(other, nn.CrossEntropyLoss(), gi.data.digit(7), torch.tensor([2]))
    update.save("update.safetensors")
    common = ["--model", f"{nets}:make", "--input", "1,8,8", "--update", "update.safetensors"]
    assert run("recover", *common, "--json") != 0
    assert '"exact": true' not in capsys.readouterr().out


def test_the_demo_leaks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "demo.png"
    assert run("demo", "--size", "16", "--out", str(out), "--json") == 0
    found = answer(capsys)
    assert found["exact"] is True and float(str(found["psnr"])) > 90 and out.exists()
    assert run("demo", "--size", "16", "--out", str(out)) == 0
    assert "▀" in capsys.readouterr().out


REFUSED = [
    (["audit", "resnet19", "--input", "3,32,32"], "torchvision has no model 'resnet19'"),
    (["audit", "gradinv:alexnet", "--input", "3,32,32"], "No network 'alexnet' in the course"),
    (["audit", "gradinv:wide_cnn", "--input", "3,1,1"], "too small"),
    (["audit", "no_such_module:make", "--input", "1,8,8"], "Cannot import 'no_such_module'"),
    (["audit", "the_nets:missing", "--input", "1,8,8"], "'the_nets' has no 'missing'"),
    (["audit", "the_nets:number", "--input", "1,8,8"], "makes a int, not a torch.nn.Module"),
    (["audit", "the_nets:broken", "--input", "1,8,8"], "RuntimeError: no weights today"),
    (["audit", "the_nets:make", "--input", "3,8,8"], "does not take inputs of shape"),
    (["demo", "--photo", "dog"], "dog"),
    (["demo", "--size", "2"], "--size is at least 8"),
    (
        ["recover", "--model", "the_nets:make", "--update", "none", "--input", "1,8,8"],
        "none",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_wrong_is_told(
    capsys: pytest.CaptureFixture[str], nets: str, arguments: list[str], message: str
) -> None:
    assert run(*arguments, "--json") == 2
    printed = capsys.readouterr()
    assert message in printed.err and message in json.loads(printed.out)["message"]


def test_files_of_another_kind_are_refused(
    capsys: pytest.CaptureFixture[str], nets: str, tmp_path: Path
) -> None:
    gi.observe(
        gi.models.mlp((4, 3, 2)), nn.CrossEntropyLoss(), torch.ones(1, 4), torch.tensor([0])
    ).save("other.safetensors")
    torch.save({"weight": torch.ones(2)}, "pickle.safetensors")
    save_file({"weight": torch.ones(2)}, "another.safetensors")
    base = ["recover", "--model", f"{nets}:make", "--input", "1,8,8", "--update"]
    assert run(*base, "other.safetensors") == 2
    assert "1.weight" in capsys.readouterr().err
    assert run(*base, "pickle.safetensors") == 2
    for weights, message in (("pickle", "Cannot read weights"), ("another", "another model's")):
        assert run(*base, "other.safetensors", "--weights", f"{weights}.safetensors") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["3,0,8", "three", ""])
def test_a_shape_that_is_none_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], shape: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("audit", "gradinv:lenet", "--input", shape)
    assert stopped.value.code == 2 and "is no shape" in capsys.readouterr().err


def test_the_installed_command_helps_with_examples() -> None:
    command = Path(sys.executable).with_name("gradinv")
    helped = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "gradinv audit resnet18 --input 3,224,224" in helped.stdout


def test_every_command_in_the_book_and_in_the_help_is_one() -> None:
    book = (Path(__file__).parent.parent / "book" / "command_line.md").read_text()
    help_ = re.sub(r"\\\n\s*", "", cli.EPILOGUE)
    lines = re.findall(r"^ *gradinv ((?:\S+ )*\S+)", book + help_, re.MULTILINE)
    assert len(lines) >= 10
    for line in lines:
        words = re.split(r"\s{2,}", line)[0].split()
        assert cli._parser().parse_args(words).run
