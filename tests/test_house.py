"""The house rules: one stem in every room, equations tied to code, nothing that names a machine."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import gradinv_edu

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gradinv_edu"
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
SOURCES = sorted((ROOT / "exercises" / "source").glob("*/*.ipynb"))
PAGES = [
    ROOT / "book" / f"{name}.md"
    for name in ("claims", "command_line", "field", "glossary", "notation")
]
MODULE_FILES = sorted(PACKAGE.rglob("*.py"))
STEMS = [chapter.stem.split("_", 1)[1] for chapter in CHAPTERS]
LABEL = re.compile(r"^:label:\s*([\w-]+)", re.MULTILINE)
IMPLEMENTS = re.compile(r"Implements\s+((?:(?:,|and|\s)*:eq:`[\w-]+`)+)")
# of this package, as Sphinx writes them in a docstring and MyST in a page
ROLE = re.compile(
    r"\{?:?(?:py:)?(?:func|class|meth|mod|data|attr|exc|obj)[:}]+`~?(gradinv_edu[\w.]*)`"
)


def _toc() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [toc["root"], *files]


def _cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]


# --- every module, and every public name at its home ----------------------------------------------

NAMES = ["gradinv_edu", *(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "gradinv_edu."))]
MODULES: dict[str, ModuleType] = {name: importlib.import_module(name) for name in NAMES}


def _file(name: str) -> Path:
    return Path(str(MODULES[name].__file__))


def _public(name: str) -> Iterator[tuple[str, object]]:
    """What a module makes for others: what its ``__all__`` names, and the methods of that."""
    module = MODULES[name]
    for member in getattr(module, "__all__", ()):
        value = getattr(module, member)
        if not callable(value) or getattr(value, "__module__", "") != name:
            continue
        yield f"{name}.{member}", value
        # a protocol's methods say by their types what they ask for
        if inspect.isclass(value) and not getattr(value, "_is_protocol", False):
            yield from ((f"{name}.{member}.{k}", f) for k, f in _methods(value))


def _methods(owner: type) -> Iterator[tuple[str, Callable[..., object]]]:
    for attribute, value in vars(owner).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        # a field's default may be a function too, of another name
        own = inspect.isfunction(function) and function.__name__ == attribute
        if own and not attribute.startswith("_"):
            yield attribute, function


def _resolved(role: str) -> object:
    """What a role points to: a module, or an attribute of one, of any depth."""
    parts = role.split(".")
    depth = next(d for d in range(len(parts), 0, -1) if ".".join(parts[:d]) in MODULES)
    value: object = MODULES[".".join(parts[:depth])]
    for part in parts[depth:]:
        owner, value = value, getattr(value, part, None)
        if value is None and part not in getattr(owner, "__annotations__", {}):
            raise AttributeError(role)
    return value


PUBLIC = dict(pair for name in NAMES for pair in _public(name))
HOMES: dict[str, list[str]] = {}  # of each equation: the objects that say that they implement it
for _name, _value in PUBLIC.items():
    for _labels in IMPLEMENTS.findall(_value.__doc__ or ""):
        for _label in re.findall(r"`([\w-]+)`", _labels):
            HOMES.setdefault(_label, []).append(_name)
LABELS = {
    label: (chapter, place)
    for chapter in CHAPTERS
    for place, text in enumerate(_cells(chapter))
    for label in LABEL.findall(text)
}


@pytest.mark.parametrize("name", NAMES)
def test_a_module_says_what_is_public(name: str) -> None:
    module = MODULES[name]
    assert module.__doc__ and "\n" not in module.__doc__.splitlines()[0]
    made_here = any(getattr(value, "__module__", "") == name for value in vars(module).values())
    assert hasattr(module, "__all__") or not made_here
    for member in getattr(module, "__all__", ()):
        assert getattr(module, member, None) is not None, member


def test_public_objects_are_documented() -> None:
    assert [name for name, value in PUBLIC.items() if not inspect.getdoc(value)] == []


def test_the_public_face_is_lazy_and_complete() -> None:
    tops = {name.removeprefix("gradinv_edu.") for name in NAMES[1:] if name[-1] != "_"}
    face = {name.removeprefix("kit.") for name in tops if "engine." not in name}
    assert face <= set(gradinv_edu.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gradinv_edu.nothing  # noqa: B018


# --- who imports whom -----------------------------------------------------------------------------


def _imports(name: str) -> set[str]:
    """Modules of the package that a module imports, inside its functions too."""
    found: set[str] = set()
    package = name if _file(name).name == "__init__.py" else name.rpartition(".")[0]
    waiting: list[ast.AST] = [ast.parse(_file(name).read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            # `from . import x` may name a module or a name inside one
            names = (f"{base}.{alias.name}" for alias in node.names)
            found |= {full if full in MODULES else base for full in names}
        waiting += ast.iter_child_nodes(node)
    return found & set(MODULES) - {name}


def test_modules_import_downwards_only() -> None:
    try:
        TopologicalSorter({name: _imports(name) for name in NAMES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_reader_of_imports_sees_those_inside_functions() -> None:
    assert "gradinv_edu.sharing" in _imports("gradinv_edu.recursion")
    assert "gradinv_edu.engine.layers.base" in _imports("gradinv_edu.engine.layers.dense")
    assert "gradinv_edu.kit.plotting" in _imports("gradinv_edu.engine.results")
    assert "gradinv_edu.recursion" not in _imports("gradinv_edu")  # for the type checker alone


# --- chapters -------------------------------------------------------------------------------------


def test_the_table_of_contents_and_the_folder_name_the_same_files() -> None:
    files = {f"book/{p.stem}" for p in (ROOT / "book").glob("*.*") if p.suffix in {".ipynb", ".md"}}
    assert set(_toc()) == files
    assert len(_toc()) == len(files)


def test_chapters_stand_in_the_order_of_their_numbers() -> None:
    """Numbers may be missing; only `_toc.yml` and files' names tell them."""
    stems = [Path(file).name for file in _toc()]
    numbers = [int(stem[:2]) for stem in stems if re.match(r"\d\d_", stem)]
    assert numbers == sorted(set(numbers))


NUMBERED = re.compile(r"(?:\{doc\}`|\[)([^`<\]]*?)(\d+)(?: <|\]\(\S*/)(\d\d)_\w+")
BARE = re.compile(r"\b[Cc]hapters? \d")


@pytest.mark.parametrize("path", [*CHAPTERS, *SOURCES, *PAGES, *MODULE_FILES], ids=lambda p: p.name)
def test_a_chapters_number_stands_beside_its_stem(path: Path) -> None:
    """So that no number is left behind when chapters move: a link tells both, nothing else one."""
    text = "\n".join(_cells(path)) if path.suffix == ".ipynb" else path.read_text("utf-8")
    assert all(int(said) == int(number) for _, said, number in NUMBERED.findall(text))
    assert not BARE.findall(NUMBERED.sub("", text))


@pytest.mark.parametrize("stem", STEMS)
def test_a_chapter_has_its_module_and_its_tests(stem: str) -> None:
    assert (PACKAGE / f"{stem}.py").is_file()
    assert (ROOT / "tests" / f"test_{stem}.py").is_file()


# --- equations ------------------------------------------------------------------------------------


def test_equations_of_chapters_and_of_code_are_the_same() -> None:
    assert set(HOMES) == set(LABELS)


@pytest.mark.parametrize("label", sorted(LABELS))
def test_an_equation_has_one_home_that_its_chapter_names(label: str) -> None:
    (home,) = HOMES[label]
    chapter, place = LABELS[label]
    named = [role for text in _cells(chapter)[place : place + 2] for role in ROLE.findall(text)]
    # a role may name it where a chapter's module hands it on
    assert any(_resolved(role) is PUBLIC[home] for role in named), f"beside it: {home}"


def test_an_equation_is_stated_once() -> None:
    stated = [x for chapter in CHAPTERS for text in _cells(chapter) for x in LABEL.findall(text)]
    assert sorted(stated) == sorted(set(stated))


@pytest.mark.parametrize("name", sorted({name for names in HOMES.values() for name in names}))
def test_code_that_is_an_equation_opens_with_its_formula(name: str) -> None:
    assert ":math:`" in (inspect.getdoc(PUBLIC[name]) or "").splitlines()[0]


# --- pages ----------------------------------------------------------------------------------------

TEXTS = [
    *(ROOT / "book").glob("*.md"),
    *(ROOT / "exercises").rglob("*.md"),
    *CHAPTERS,
    *PACKAGE.rglob("*.py"),
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_roles_name_what_exists(path: Path) -> None:
    for role in sorted(set(ROLE.findall(path.read_text(encoding="utf-8")))):
        _resolved(role)


def test_notation_names_classes_and_their_parts_as_they_are() -> None:
    text = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    named = re.findall(r"`([A-Z]\w{3,}(?:\.\w+)?)`", text)
    public = {name.split(".", 1)[1] for name in PUBLIC}
    assert len(named) > 10
    for name in named:
        owner, _, part = name.partition(".")
        homes = [PUBLIC[f"gradinv_edu.{n}"] for n in public if n.split(".")[-1] == owner]
        parts = {attribute for home in homes for attribute in _parts(home)}
        assert homes and part in {"", *parts}, name


def _parts(owner: object) -> set[str]:
    """Attributes of a class, as it declares them or sets them when it is made."""
    assert inspect.isclass(owner)
    declared = {*dir(owner), *inspect.get_annotations(owner)}
    return declared | set(re.findall(r"self\.(\w+)", inspect.getsource(owner)))


QUOTE = re.compile(r"```python\n# (gradinv_edu/\S+)\n(.*?)```", re.DOTALL)


def test_what_contributing_quotes_stands_in_the_file_that_it_names() -> None:
    quotes = QUOTE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert {Path(file).parent.name for file, _ in quotes} == {"engine", "layers", "losses"}
    for file, lines in quotes:
        assert lines in (ROOT / file).read_text(encoding="utf-8"), f"{file}:\n{lines}"


def test_contributing_draws_every_file_of_the_engine() -> None:
    layout = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The layout")[1]
    layout = layout.split("\n## ")[0]
    stems = {f.stem for f in PACKAGE.rglob("*.py") if f.stem != "__init__"} - set(STEMS)
    assert {s for s in stems if not re.search(rf"\b{s}\b", layout)} == set()


# --- state, and what every file says ----------------------------------------------------------


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


def test_every_file_of_the_package_is_installed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.*") if "__pycache__" not in p.parts]
    data = {str(p) for p in files if p.suffix != ".py"}
    patterns = tools["package-data"]["gradinv_edu"]
    assert {f for f in data if not any(fnmatch(f, pattern) for pattern in patterns)} == set()
    folders = {p.parent for p in files if p.suffix == ".py"}
    assert all((PACKAGE / folder / "__init__.py").is_file() for folder in folders)
    assert tools["packages"]["find"]["include"] == ["gradinv_edu*"]


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
