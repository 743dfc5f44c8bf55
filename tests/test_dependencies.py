"""What the course stands on: its page, and what can be installed of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

from scripts import load

BOOK = Path(__file__).parents[1] / "book"


def test_the_page_has_not_drifted() -> None:
    """A dependency without a reason, or a pin whose date nobody asked for, is an error."""
    module = load("dependencies")
    assert module.PAGE.read_text("utf-8") == module.page(), "run python book/dependencies.py"


EXTRAS = ("flwr", "ray", "pandas", "mlxtend", "opacus", "gguf", "tokenizers", "sphinx", "pytest")
ALONE = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None  # as if it were not installed
import torch, gradinv_edu as gi
from gradinv_edu.errors import MissingExtraError
assert gi.__file__.startswith(sys.argv[1]), gi.__file__
net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
x, loss = torch.rand(1, 4).double(), torch.nn.CrossEntropyLoss()
found = gi.recover(net, gi.observe(net, loss, x, torch.tensor([1])), (4,), loss)
assert found.exact and gi.metrics.relative_error(found.inputs, x) < 1e-12
gi.quiz.load("01_perceptron")
try:
    gi.federation
except MissingExtraError as error:
    print(error)
"""


def test_the_wheel_of_the_sdist_stands_alone(tmp_path: Path) -> None:
    """Built without a network, imported without any extra, warnings as errors."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(BOOK.parent / name, source)
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(BOOK.parent / "gradinv_edu", source / "gradinv_edu", ignore=skipped)
    build = "from setuptools.build_meta import build_{0} as b; b({1!r})".format
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    run([sys.executable, "-c", build("sdist", str(tmp_path))], cwd=source)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / packed.name.removesuffix(".tar.gz")
    run([sys.executable, "-c", build("wheel", str(tmp_path))], cwd=unpacked)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-W", "error", "-c", ALONE, str(installed)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'gradinv_edu[federation]'" in done.stdout
