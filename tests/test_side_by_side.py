"""Published systems beside ours: skipped, resumed and failed clearly; adapters call what is there.

The checkouts here are small stand-ins that the tests write; the real ones are the user's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradinv_edu as gi

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import adapters, cases, side_by_side, store  # noqa: E402
from benchmarks.adapters import SYSTEMS  # noqa: E402
from benchmarks.side_by_side import Job  # noqa: E402

GOOD = {"cpu_seconds": 1.0, "wall_seconds": 1.0, "mib": 1.0, "psnr": 50.0, "runs": 1}

RGAP = {
    "config.yaml": "",
    "recursive_attack.py": """
def r_gap(out, k, g, x_shape, weight, module):
    return x_shape.numpy(), weight
""",
    "main.py": """
import argparse
import torch
import torchvision
from gradinv_edu.kit.models import cnn6 as CNN6, cnn6_d as CNN6d
from recursive_attack import r_gap
import matplotlib.pyplot as plt

open("config.yaml").close()
parser = argparse.ArgumentParser()
parser.add_argument("-m")
net_name = parser.parse_args().m

def main():
    (image, _), _ = dataloader(dataset="CIFAR10", mode="attack", index=-1)
    x = torchvision.transforms.ToTensor()(image)[None]
    net = CNN6()
    assert net_name == "CNN6"
    p = net(x)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(p, (p <= 0).float())
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    print("as chatty as the original")
    for g in reversed(gradients[:-1]):
        given = dict(out=None, k=None, x_shape=x.reshape(-1), module=None, weight=None)
        x_, _ = r_gap(**given, g=FACTOR * g.numpy())
    plt.figure("origin")

FACTOR = 1
""",
}
BREACHING = {
    "breaching/__init__.py": """
from breaching import attacks
def get_attack_config(attack):
    return attack
""",
    "breaching/attacks.py": """
class Analytic:
    def reconstruct(self, server, user, secrets, dryrun):
        assert len(server[0]["parameters"]) == len(user[0]["gradients"])
        assert user[0]["metadata"]["labels"].tolist() == [3]
        w, b = user[0]["gradients"]
        return {"data": (w / b[:, None]).mean(0).reshape(1, *server[0]["metadata"].shape)}, None

def prepare_attack(model, loss, configuration, setup):
    assert configuration == "analytic"
    return Analytic()
""",
}
DLG = {
    "models/__init__.py": "",
    "models/vision.py": """
import torch.nn as nn
class LeNet(nn.Module):
    def __init__(self):
        super(LeNet, self).__init__()
        act = nn.Sigmoid
        c = lambda i, s: nn.Conv2d(i, 12, kernel_size=5, padding=2, stride=s)
        self.body = nn.Sequential(c(3, 2), act(), c(12, 2), act(), c(12, 1), act())
        self.fc = nn.Sequential(nn.Linear(768, 100))
    def forward(self, x):
        return self.fc(self.body(x).flatten(1))
def weights_init(m):
    raise AssertionError("not our weights")
""",
    "main.py": """
import argparse
import torch
import matplotlib.pyplot as plt
from torchvision import datasets, transforms
argparse.ArgumentParser().parse_args()
image, label = datasets.CIFAR100("~/.torch", download=True)[25]
assert label == 3
gt_data = transforms.ToTensor()(image)[None]
plt.imshow(image)
from models.vision import LeNet, weights_init
net = LeNet()
net.apply(weights_init)
dummy_data = (gt_data + 0 * net(gt_data).sum()).detach().requires_grad_(True)
plt.show()
""",
}
INVERTING = {
    "inversefed/__init__.py": """
class GradientReconstructor:
    def __init__(self, model, mean_std, config, num_images):
        assert config["max_iterations"] == 4000 and num_images == 1
        self.mean, self.deviation = mean_std
    def reconstruct(self, gradient, labels, img_shape):
        assert labels.tolist() == [3] and len(gradient) == 8
        return self.mean + 0.5 * self.deviation.expand(1, *img_shape), {}
""",
}


def checkout(folder: Path, files: dict[str, str]) -> str:
    """Write a stand-in for published code."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let cells go to a file of this test."""
    monkeypatch.setattr(store, "FILE", tmp_path / "data" / "benchmarks.json")
    return tmp_path / "data" / "benchmarks.json"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure nothing; keep the keys of the cells that would have been."""
    keys: list[str] = []

    def instead(job: Job, python: str) -> dict[str, Any]:
        keys.append(job.key)
        return dict(GOOD)

    monkeypatch.setattr(side_by_side, "apart", instead)
    return keys


@pytest.fixture
def as_before() -> Iterator[None]:
    """Undo what adapters do to this process, which the benchmark gives them one of their own."""
    import matplotlib.pyplot
    import torchvision

    folder, path, arguments, modules = os.getcwd(), sys.path[:], sys.argv[:], dict(sys.modules)
    datasets, drawing = torchvision.datasets, matplotlib.pyplot
    yield
    os.chdir(folder)
    sys.path[:], sys.argv[:] = path, arguments
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.modules["matplotlib.pyplot"] = matplotlib.pyplot = drawing
    torchvision.datasets = datasets


# What is skipped


def test_without_checkouts_every_published_system_is_skipped(
    file: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    side_by_side.main(["--sizes", "32"])
    said = capsys.readouterr().out
    for name, system in SYSTEMS.items():
        if system.option:
            assert f"{name}: skipped, no checkout given (--{system.option} DIR)" in said
    assert asked and all(key.startswith("own") for key in asked)


def test_a_folder_that_is_no_checkout_is_told(
    file: Path, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side_by_side.main(["--rgap", str(tmp_path), "--sizes", "32"])
    told = "has no recursive_attack.py: not a checkout of JunyiZhu-AI/R-GAP"
    assert told in capsys.readouterr().out
    assert not [key for key in asked if key.startswith("R-GAP")]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    folder = checkout(tmp_path, RGAP)
    system = replace(SYSTEMS["R-GAP"], needs=(("no_such_module", "no-such-package"),))
    why = side_by_side.unavailable(system, folder, sys.executable)
    assert why and why.startswith("install no-such-package for") and "--python" in why
    assert side_by_side.unavailable(SYSTEMS["R-GAP"], folder, sys.executable) is None


# What is resumed


def test_a_stored_cell_is_not_measured_again(file: Path, asked: list[str]) -> None:
    wanted = ["--nets", "CNN6", "--sizes", "32"]
    side_by_side.main(wanted)
    assert asked == [
        "own/CNN6/32/1", "own, float64/CNN6/32/1", "own, polished/CNN6/32/1", "own/CNN6/32/2"
    ]  # fmt: skip
    before = file.read_text()
    side_by_side.main(wanted)
    assert len(asked) == 4 and file.read_text() == before


def test_a_killed_run_goes_on_where_it_was(
    file: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    instead = side_by_side.apart

    def killed(job: Job, python: str) -> dict[str, Any]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return instead(job, python)

    monkeypatch.setattr(side_by_side, "apart", killed)
    with pytest.raises(KeyboardInterrupt):
        side_by_side.main(["--nets", "CNN6"])
    assert list(store.cells("side_by_side")) == asked
    monkeypatch.setattr(side_by_side, "apart", instead)
    side_by_side.main(["--nets", "CNN6"])
    assert len(asked) == len(set(asked)) == 3 + 1 + len(side_by_side.LADDER)


def test_fresh_measures_again(file: Path, asked: list[str]) -> None:
    wanted = ["--nets", "CNN6-d", "--sizes", "32", "--threads", "1"]
    for arguments in (wanted, [*wanted, "--fresh"]):
        side_by_side.main(arguments)
    assert len(asked) == 4


def test_no_cell_is_begun_after_the_minutes(
    file: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    side_by_side.main(["--minutes", "0"])
    assert not asked and "left for another call: the time is up" in capsys.readouterr().out


@pytest.mark.parametrize("end", [{"failed": "over 16 GiB"}, {**GOOD, "psnr": 3.0}])
def test_a_ladder_ends_at_its_first_failure(
    file: Path, monkeypatch: pytest.MonkeyPatch, end: dict[str, Any]
) -> None:
    asked: list[str] = []

    def instead(job: Job, python: str) -> dict[str, Any]:
        asked.append(job.key)
        return dict(end if job.size == 48 else GOOD)

    monkeypatch.setattr(side_by_side, "apart", instead)
    side_by_side.main(["--nets", "LeNet", "--threads", "1"])
    assert [k for k in asked if k.startswith("own/")] == [f"own/LeNet/{s}/1" for s in (32, 16, 48)]
    cell = store.cells("side_by_side")["own/LeNet/48/1"]
    assert end.items() <= cell.items() and cell["threads"] == 1


def test_what_a_system_was_given_is_stored(file: Path, asked: list[str], tmp_path: Path) -> None:
    folder = checkout(tmp_path / "rgap", RGAP)
    side_by_side.main(["--rgap", folder, "--nets", "CNN6", "--sizes", "32"])
    about = store.cells("side_by_side_systems")["R-GAP"]
    assert about["given"] == SYSTEMS["R-GAP"].given and "MagicMock" in about["given"]
    assert about["source"] == "JunyiZhu-AI/R-GAP" and about["commit"] == ""
    assert str(tmp_path) not in file.read_text()


# How cells end


def test_an_own_cell_is_what_recover_gives() -> None:
    cell = side_by_side.apart(Job("own", "CNN6", 16))
    case = cases.case("CNN6", 16)
    found = gi.recover(case.model, case.update(), (3, 16, 16), case.loss)
    assert cell["psnr"] == pytest.approx(gi.metrics.psnr(found.inputs, case.x.double()), abs=1)
    assert cell["psnr"] > 100 and cell["cpu_seconds"] > 0


@pytest.mark.parametrize(
    ("main", "limits", "said"),
    [
        ("while True: pass", {"seconds": 1}, "over 1 s of CPU time per thread"),
        ("held = [torch.ones(2**24) for _ in range(60)]", {"gib": 1.0}, "over 1 GiB"),
        ("raise RuntimeError('as published')", {}, "RuntimeError: as published"),
    ],
    ids=["time", "memory", "exception"],
)
def test_a_failure_is_stored_with_its_reason(
    tmp_path: Path, main: str, limits: dict[str, Any], said: str
) -> None:
    text = RGAP["main.py"].replace("def main():\n", f"def main():\n    {main}\n")
    folder = checkout(tmp_path, {**RGAP, "main.py": text})
    job = Job("R-GAP", "CNN6", 16, checkout=folder, **limits)
    assert side_by_side.apart(job) == {"failed": said}


def test_short_recoveries_are_repeated_and_long_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 100, 2))
    x, calls = torch.zeros(2, 2), []

    def recover() -> Tensor:
        calls.append(1)
        return x + 0.1

    assert side_by_side.measure(recover, x)["runs"] == len(calls) == 1 + side_by_side.REPEATS
    monkeypatch.setattr(side_by_side.time, "process_time", lambda: next(clock))
    cell = side_by_side.measure(recover, x)
    assert cell["runs"] == 1 and cell["cpu_seconds"] == 2 and cell["psnr"] == 20


# Adapters, with a stand-in for what they call


def prepared(name: str, net: str, folder: str, size: int = 16) -> tuple[cases.Case, Tensor]:
    case = cases.case(net, size)
    return case, SYSTEMS[name].prepare(case, folder)()


def test_rgap_is_given_picture_weights_and_no_drawing(tmp_path: Path, as_before: None) -> None:
    case, found = prepared("R-GAP", "CNN6", checkout(tmp_path, RGAP))
    assert torch.equal(found, case.x)


def test_rgap_with_another_gradient_is_refused(tmp_path: Path, as_before: None) -> None:
    text = RGAP["main.py"].replace("FACTOR = 1", "FACTOR = 2")
    with pytest.raises(ValueError, match="computes another gradient"):
        prepared("R-GAP", "CNN6", checkout(tmp_path, {**RGAP, "main.py": text}))


def test_breaching_is_given_both_sides(tmp_path: Path, as_before: None) -> None:
    case, found = prepared("breaching, analytic", "perceptron", checkout(tmp_path, BREACHING))
    assert gi.metrics.psnr(found, case.x) > 100


def test_dlg_is_run_as_a_script(tmp_path: Path, as_before: None) -> None:
    case, found = prepared("DLG", "LeNet", checkout(tmp_path, DLG))
    assert torch.equal(found, case.x) and not found.requires_grad


def test_inverting_gradients_is_given_its_configuration(tmp_path: Path, as_before: None) -> None:
    _, found = prepared("Inverting Gradients", "LeNet", checkout(tmp_path, INVERTING))
    assert found.shape == (1, 3, 16, 16) and bool((found == 0.5).all())


def test_every_published_system_says_what_it_was_given_and_where_it_is() -> None:
    text = adapters.__doc__ or ""
    for system in SYSTEMS.values():
        assert system.given
        if system.option:
            assert f"--{system.option}``" in text and system.source in text and system.holds


# What all are given


@pytest.mark.parametrize("net", list(cases.NETS))
def test_a_case_is_one_picture_of_8_bits_and_its_gradient(net: str) -> None:
    case = cases.case(net, 16)
    pixels = case.x * 255
    assert case.x.dtype == torch.float32 and torch.allclose(pixels, pixels.round(), atol=1e-4)
    assert all(g.dtype == torch.float32 for g in case.update().gradients.values())
    if isinstance(case.loss, nn.BCEWithLogitsLoss):
        assert bool(case.target == (case.model(case.x) <= 0))


@pytest.mark.parametrize("size", [16, 32, 50])
def test_lenet_is_the_published_one(size: int) -> None:
    model = cases.published_lenet((3, size, size))
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 100)
    assert [m.stride[0] for m in model if isinstance(m, nn.Conv2d)] == [2, 2, 1]
    if size == 32:
        assert model[-1].in_features == 768


def test_only_the_last_layer_of_ten_classes_has_a_bias() -> None:
    case = cases.case("CNN6, 10 classes", 16)
    assert [n for n, _ in case.model.named_parameters() if "bias" in n] == ["13.bias"]


def test_a_job_travels_to_its_process() -> None:
    job = Job("own", "MLP", 16, 2, "", 5, 1.5)
    assert Job(**json.loads(json.dumps(vars(job)))) == job


def test_cells_of_the_data_file_belong_to_systems_and_nets() -> None:
    for key, cell in store.cells("side_by_side").items():
        name, net, _, threads = key.split("/")
        assert net in SYSTEMS[name].nets and cell["threads"] == int(threads)
        assert "failed" in cell or GOOD.keys() <= cell.keys()
