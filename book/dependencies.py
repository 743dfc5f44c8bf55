"""Writes the page of what the course stands on: each package, why, its licence, its releases.

Names and reasons are read from pyproject.toml, the version in use from constraints.txt, licences
from what is installed, dates from data/releases.toml.

    python book/dependencies.py             writes the page
    python book/dependencies.py --ask URL   asks a package index (PEP 691) for the dates first
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
import urllib.request
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

BOOK = Path(__file__).parent
RELEASES = BOOK / "data" / "releases.toml"
PAGE = BOOK / "dependencies.md"
NAME = re.compile(r"[\w-]+")
NEEDED = re.compile(r'^    "([\w-]+)[^"]*", +# (.+)$', re.MULTILINE)
FILE = re.compile(r".+?-(\d+(?:\.\d+)*(?:\.?post\d+)?)(?:-.*\.whl|\.tar\.gz|\.zip)$")
# spelt out at length where the package says it, or not at all
LICENCES = {
    "scipy": "BSD-3-Clause", "scikit-image": "BSD-3-Clause",
    "jupyterlab": "BSD-3-Clause", "nbgrader": "BSD-3-Clause", "axe-playwright-python": "MIT",
    "gguf": "MIT", "tokenizers": "Apache-2.0", "peft": "Apache-2.0", "timm": "Apache-2.0",
    "transformers": "Apache-2.0",
}  # fmt: skip
HEAD = """# What the course stands on

Each package that pyproject.toml names, with why, its licence as it states it, the version that constraints.txt pins, and the newest release that the index had on {day}.
The package's own ranges are wider: it is tested with torch 2.5 and with the current one.

Nothing of this is copied into the repository but the fonts and the client side of MathJax and reveal.js, which come as files of their packages.
None of it needs the network once installed; Flower's and Ray's telemetry is switched off before they load.

Whether a version has a known weakness only a service on the network can say: `uvx pip-audit -r constraints.txt --no-deps` asks it.
"""


def needed() -> Iterator[tuple[str, str, str]]:
    """Extra, package and reason, as pyproject.toml has them."""
    text = (BOOK.parent / "pyproject.toml").read_text("utf-8")
    reasons = dict(NEEDED.findall(text))
    project = tomllib.loads(text)["project"]
    for extra, lines in {
        "": project["dependencies"],
        **project["optional-dependencies"],
    }.items():
        for name in (NAME.match(line)[0] for line in lines):
            if name != project["name"]:
                yield extra, name, reasons[name]


def pinned() -> dict[str, str]:
    """Package and version, as constraints.txt has them."""
    lines = (BOOK.parent / "constraints.txt").read_text("utf-8").splitlines()
    pairs = (line.split(";")[0].split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def licence(name: str) -> str:
    """In the package's own words, if these are a line."""
    if name in LICENCES:
        return LICENCES[name]
    try:
        said = metadata(name)
    except PackageNotFoundError:
        return "?"
    text = said.get("License-Expression") or said.get("License") or ""
    classes = [
        c.split(" :: ")[-1] for c in said.get_all("Classifier", []) if "License ::" in c
    ]
    return text if text and "\n" not in text else (classes or ["?"])[-1]


def ask(index: str) -> None:
    """Dates of the pinned and of the newest release, from the index."""
    rows, pins = [], pinned()
    for name in dict.fromkeys(canonicalize_name(name) for _, name, _ in needed()):
        request = urllib.request.Request(
            f"{index.rstrip('/')}/{name}/",
            headers={"Accept": "application/vnd.pypi.simple.v1+json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                files = json.load(answer)["files"]
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{name}: {error}") from error
        dates: dict[Version, str] = {}
        for file in files:
            if found := FILE.match(file["filename"]):
                dates.setdefault(Version(found[1]), file["upload-time"][:10])
        newest = max(dates)
        version = Version(pins[name]) if name in pins else newest
        rows.append(
            f'{name} = ["{version}", "{dates[version]}", "{newest}", "{dates[newest]}"]'
        )
    told = (
        f'asked = "{date.today()}"\n\n[releases] # pinned, its date, newest, its date\n'
    )
    RELEASES.write_text(told + "\n".join(rows) + "\n", "utf-8")


def page() -> str:
    """One table for each extra."""
    stored, pins = tomllib.loads(RELEASES.read_text("utf-8")), pinned()
    parts, last = [HEAD.format(day=stored["asked"])], None
    for extra, name, why in needed():
        if extra != last:
            title = "Always" if not extra else f"With `[{extra}]`"
            parts.append(
                f"\n## {title}\n\n| package | why | licence | in use | newest |\n"
            )
            parts.append("|---|---|---|---|---|\n")
            last = extra
        key = canonicalize_name(name)
        version, day, newest, newest_day = stored["releases"][key]
        if key in pins and pins[key] != version:
            raise SystemExit(
                f"{name}: constraints.txt pins {pins[key]}; ask the index again."
            )
        parts.append(
            f"| {name} | {why} | {licence(name)} | {version} ({day}) | {newest} ({newest_day}) |\n"
        )
    return "".join(parts)


def main() -> None:
    """Write the page."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--ask", metavar="URL", help="address of a simple index")
    wanted = options.parse_args()
    if wanted.ask:
        ask(wanted.ask)
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
