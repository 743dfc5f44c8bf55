"""The command line: what it prints for people and for machines, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import nn

import gradinv_edu as gi
from gradinv_edu import cli
from gradinv_edu.engine.loading import told
from gradinv_edu.errors import InvalidTensorError

PACKAGE = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 4))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(64, 4)

    def forward(self, x):
        return self.dense(x.flatten(1)) if x.sum() < 1e9 else x


def saved():
    net = make()
    program = torch.export.export(net, (torch.zeros(1, 1, 8, 8),))
    torch.export.save(program, "saved.pt2")
    net.load_state_dict(torch.export.load("saved.pt2").state_dict)
    return net


def program():
    return torch.export.load("saved.pt2").module()


net = make()
number = 3


def broken():
    raise AttributeError("no weights today")
"""
LOSS = nn.CrossEntropyLoss()
SHAPE = ("--input", "1,8,8")


@pytest.fixture(autouse=True)
def _nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "the_nets.py").write_text(PACKAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "the_nets", raising=False)


def answer(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def observed(model: nn.Module) -> str:
    gi.observe(model, LOSS, gi.data.digit(7), torch.tensor([2])).save("update.safetensors")
    return "update.safetensors"


def test_an_audit_is_the_packages_and_fails_a_pipeline_above_its_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["audit", "the_nets:make", *SHAPE]) == 0
    printed = capsys.readouterr().out
    assert "determined" in printed and "gives its input away exactly" in printed
    assert cli.main(["audit", "the_nets:net", *SHAPE, "--json"]) == 0
    found = answer(capsys)
    assert found.pop("leak") == 1.0
    model = cli.load_model("the_nets:net")
    assert found == json.loads(json.dumps(gi.audit(model, (1, 8, 8)).to_dict()))
    for limit, code in (("0.5", 1), ("1", 0)):
        assert cli.main(["audit", "the_nets:make", *SHAPE, "--limit", limit]) == code


def test_an_audit_tells_what_it_knows_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["audit", "the_nets:make", *SHAPE, "--progress"]
    assert cli.main([*line, "--seconds", "0"]) == 0
    printed = capsys.readouterr()
    assert "not tested to the end: 0" in printed.out and "Unknown" in printed.out
    assert "layers told; Unknown" in printed.err and "exactly" not in printed.err
    assert cli.main([*line, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["verdict"] == "leaks exactly" and found["untested"] == []
    assert printed.err.strip().endswith(found["reason"])


def test_the_weights_of_a_saved_program_come_in_by_a_factory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["audit", "the_nets:saved", *SHAPE, "--json"]) == 0
    assert answer(capsys)["exact"] is True
    assert cli.main(["audit", "the_nets:program", *SHAPE]) == 2
    assert "load its state_dict into the network" in capsys.readouterr().err


def test_networks_of_torchvision_and_of_the_course() -> None:
    before = torch.random.get_rng_state()
    one, other = (cli.load_model("squeezenet1_0").state_dict() for _ in range(2))
    assert one and all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(before, torch.random.get_rng_state())
    assert cli.load_model("gradinv:lenet", (1, 28, 28))[0].in_channels == 1  # type: ignore[index]


def test_an_update_file_becomes_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    model = cli.load_model("the_nets:make")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    save_file(model.state_dict(), "sent.safetensors")
    given = ["recover", "--model", "the_nets:make", *SHAPE, "--update", observed(model)]
    told = [*given, "--weights", "sent.safetensors", "--out", "picture.png"]
    assert cli.main([*told, "--json"]) == 0
    found = answer(capsys)
    assert found["exact"] is True and found["targets"] == [2]
    pixels = torch.from_numpy(np.array(Image.open("picture.png").convert("L"))).double()
    truth = gi.data.digit(7)[0, 0] * 255
    assert (pixels - truth).abs().max() <= 0.5 + 1e-3  # nothing but their rounding
    assert cli.main(told) == 0
    assert "may be trusted" in capsys.readouterr().out
    assert cli.main([*given, "--json"]) != 0  # without the weights that were sent
    assert '"exact": true' not in capsys.readouterr().out


def test_the_demo_leaks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--size", "16", "--json"]) == 0
    found = answer(capsys)
    assert found["exact"] is True and found["psnr"] > 90 and Path("recovered.png").exists()
    assert cli.main(["demo", "--size", "16"]) == 0
    assert "▀" in capsys.readouterr().out


class Picky(nn.Linear):
    """A model with words of its own for an input that it does not take."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 4:
            raise KeyError("four features")
        return super().forward(x)


def test_what_a_model_says_of_a_shape_is_told_with_what_to_do() -> None:
    words = pytest.raises(InvalidTensorError, match=r"four features.*Give --input")
    with words, told("net", Picky(4, 2), (5,)):
        pass
    with told("net", Picky(4, 2), (4,)):
        pass


REFUSED = [
    ("audit resnet19 --input 3,32,32", "UnknownNameError", "no classifier 'resnet19'"),
    ("audit gradinv:alexnet --input 3,32,32", "UnknownNameError", "No network 'alexnet'"),
    ("audit gradinv:wide_cnn --input 3,1,1", "InvalidArgumentError", "too small"),
    ("audit no_module:make --input 1,8,8", "UnknownNameError", "No module named 'no_module'"),
    ("audit the_nets:missing --input 1,8,8", "UnknownNameError", "no attribute 'missing'"),
    ("audit the_nets:number --input 1,8,8", "InvalidArgumentError", "makes a int, not a torch.nn"),
    ("audit the_nets:broken --input 1,8,8", "InvalidArgumentError", "Error: no weights today"),
    ("audit the_nets:make --input 3,8,8", "InvalidTensorError", "does not take inputs of shape"),
    ("audit vit_b_16 --input 3,64,64", "InvalidTensorError", "Expected 224 but got 64!"),
    ("audit the_nets:Branches --input 1,8,8", "UnsupportedLayerError", ""),
    ("demo --photo dog", "UnknownNameError", "dog"),
    ("demo --size 2", "InvalidArgumentError", "--size is at least 8"),
    ("demo --size 8 --out no/folder.png", "InvalidArgumentError", "Cannot write no/folder.png"),
    ("recover UPDATE none", "UpdateFileError", "none does not exist"),
    ("recover UPDATE pickle", "UpdateFileError", "not a safetensors file"),
    ("recover UPDATE other", "InvalidTensorError", "1.weight"),
    ("recover UPDATE other --weights pickle", "UpdateFileError", "Cannot read weights"),
    ("recover UPDATE other --weights tensors", "InvalidTensorError", "another model's"),
]


@pytest.mark.parametrize(("line", "kind", "message"), REFUSED)
def test_what_is_wrong_is_told_with_a_code_of_2(
    capsys: pytest.CaptureFixture[str], line: str, kind: str, message: str
) -> None:
    gi.observe(gi.models.mlp((4, 3, 2)), LOSS, torch.ones(1, 4), torch.tensor([0])).save("other")
    torch.save({"weight": torch.ones(2)}, "pickle")
    save_file({"weight": torch.ones(2)}, "tensors")
    update = "recover --model the_nets:make --input 1,8,8 --update"
    assert cli.main([*line.replace("recover UPDATE", update).split(), "--json"]) == 2
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["error"] == kind and message in told["message"] and told["message"] in printed.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("audit gradinv:lenet --input 3,0,8", "is no shape"),
        ("audit gradinv:lenet --input three", "is no shape"),
        ("audit gradinv:lenet --input 3,32,32 --limit 2", "not in the range"),
        ("audit gradinv:lenet", "Missing option '--input'"),
        ("recover --model gradinv:lenet --input 3,32,32 --update u --loss mae", "cross_entropy"),
        ("nothing", "No such command"),
    ],
)
def test_a_line_that_is_no_command_is_told_with_a_code_of_2(
    capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_the_installed_command_helps_and_refuses() -> None:
    command = Path(sys.executable).with_name("gradinv")
    helped = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "gradinv audit resnet18 --input 3,224,224" in helped.stdout
    refused = subprocess.run([command, "audit", "vit_b_16", "--input", "3,64,64"], text=True,
                             capture_output=True)  # fmt: skip
    assert refused.returncode == 2 and "Give --input the shape" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_every_command_in_the_book_and_in_the_help_is_one() -> None:
    root = Path(__file__).parent.parent
    texts = [(root / name).read_text() for name in ("book/command_line.md", "README.md")]
    text = re.sub(r"(?<=safetensors)( \\)?\n *(?=--)", " ", "\n".join([*texts, cli.EPILOGUE]))
    lines = re.findall(r"^ *(?:\.venv/bin/)?gradinv ((?:\S+ )*\S+)", text, re.MULTILINE)
    assert len(lines) >= 10
    group = typer.main.get_command(cli.app)
    assert isinstance(group, click.Group)
    for line in lines:
        name, *words = re.split(r"\s{2,}", line)[0].split()
        group.commands[name].make_context(name, words)
