"""The house rules: one stem in every room, equations tied to code, nothing that names a machine."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import gradinv_edu

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
# chapters that share a module with others
SHARED = {
    "design": "defenses",
    "dropout": "defenses",
    "noise": "defenses",
    "schedule": "optimization",
}
MODULES = sorted(p.stem for p in (ROOT / "gradinv_edu").glob("[a-z]*.py"))
LABEL = re.compile(r"^:label:\s*([\w-]+)", re.MULTILINE)
EQUATION = re.compile(r":eq:`([\w-]+)`")
ROLE = re.compile(r"\{(?:func|class|meth)\}`~?([\w.]+)`")


def _toc() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [toc["root"], *files]


def _cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]


def _public() -> Iterator[tuple[str, object]]:
    for stem in MODULES:
        module = importlib.import_module(f"gradinv_edu.{stem}")
        for name, value in vars(module).items():
            made_here = getattr(value, "__module__", "") == module.__name__
            if name.startswith("_") or not made_here or not callable(value):
                continue
            yield f"gradinv_edu.{stem}.{name}", value
            # a protocol's methods say by their types what they ask for
            if inspect.isclass(value) and not getattr(value, "_is_protocol", False):
                yield from _methods(f"gradinv_edu.{stem}.{name}", value)


def _methods(name: str, owner: type) -> Iterator[tuple[str, object]]:
    for attribute, value in vars(owner).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if not attribute.startswith("_") and inspect.isfunction(function):
            yield f"{name}.{attribute}", function


PUBLIC = dict(_public())
EQUATIONS: dict[str, list[str]] = {}
for _name, _value in PUBLIC.items():
    for _label in EQUATION.findall(_value.__doc__ or ""):
        EQUATIONS.setdefault(_label, []).append(_name)
LABELS = {
    label: (chapter, place)
    for chapter in CHAPTERS
    for place, text in enumerate(_cells(chapter))
    for label in LABEL.findall(text)
}


def test_the_table_of_contents_and_the_folder_name_the_same_files() -> None:
    files = {f"book/{p.stem}" for p in (ROOT / "book").glob("*.*") if p.suffix in {".ipynb", ".md"}}
    assert set(_toc()) == files
    assert len(_toc()) == len(files)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_has_its_module_and_its_tests(chapter: Path) -> None:
    stem = chapter.stem.split("_", 1)[1]
    stem = SHARED.get(stem, stem)
    assert (ROOT / "gradinv_edu" / f"{stem}.py").is_file()
    assert (ROOT / "tests" / f"test_{stem}.py").is_file()


@pytest.mark.parametrize("label", sorted(EQUATIONS))
def test_an_equation_that_code_names_is_in_a_chapter(label: str) -> None:
    assert label in LABELS, f"{EQUATIONS[label]} implement(s) an equation that no chapter states"


@pytest.mark.parametrize("label", sorted(LABELS))
def test_an_equation_that_a_chapter_states_is_code(label: str) -> None:
    assert label in EQUATIONS, f"no public docstring says: Implements :eq:`{label}`"
    chapter, place = LABELS[label]
    named = {name for text in _cells(chapter)[place : place + 2] for name in ROLE.findall(text)}
    assert named & set(EQUATIONS[label]), (
        f"{chapter.stem}, cell {place}: name one of {EQUATIONS[label]} beside the equation"
    )


def test_an_equation_has_one_home() -> None:
    stated = [x for chapter in CHAPTERS for text in _cells(chapter) for x in LABEL.findall(text)]
    assert sorted(stated) == sorted(set(stated))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_objects_are_documented(name: str) -> None:
    assert inspect.getdoc(PUBLIC[name]), f"{name} has no docstring"


@pytest.mark.parametrize("name", sorted(n for n in PUBLIC if inspect.isfunction(PUBLIC[n])))
def test_a_function_that_is_an_equation_opens_with_its_formula(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    if "Implements :eq:" in text:
        assert ":math:`" in text.splitlines()[0], f"{name}: {text.splitlines()[0]}"


def test_the_public_face_is_lazy_and_complete() -> None:
    assert set(MODULES) <= set(gradinv_edu.__all__)
    for name in gradinv_edu.__all__:
        assert getattr(gradinv_edu, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gradinv_edu.nothing  # noqa: B018


def test_the_package_leaves_the_global_state_and_the_model_alone() -> None:
    model = gradinv_edu.models.mlp([12, 16, 10], dtype=torch.float64).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(1, 12, generator=generator, dtype=torch.float64)
    before = torch.get_rng_state()
    loss = torch.nn.CrossEntropyLoss()
    update = gradinv_edu.observe(model, loss, inputs, torch.tensor([3]))
    gradinv_edu.recover(model, update, input_shape=(12,), loss=loss)
    gradinv_edu.models.cnn6(input_shape=(3, 16, 16))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_constraints_pin_names_and_record_no_address() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"^[\w.-]+==[\w.+]+(\s*;.*)?$", pin) for pin in pins)
    assert not any("://" in line or "@" in line for line in lines)


def test_every_file_states_the_same_version() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{gradinv_edu.__version__}"' in project
    assert citation["version"] == gradinv_edu.__version__
