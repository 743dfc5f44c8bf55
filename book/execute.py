"""Run chapters in place and store their outputs without what differs from run to run."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import nbformat
from gradinv_edu.engine.files import write_whole
from nbconvert.preprocessors import ExecutePreprocessor

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
REFERENCE = "IPY_MODEL_"


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop timestamps, interpreter versions, and all that differs in widgets from run to run."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    widgets = kept(notebook)
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, **widgets})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)


def kept(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Give the widgets on show names that stay, and return their state; others are dropped."""
    stored = notebook.metadata.get("widgets", {}).get(STATE, {})
    models, names = stored.get("state", {}), {}
    for cell in notebook.cells:
        for place, view in enumerate(views(cell)):
            for part, old in enumerate(family(view["model_id"], models)):
                text = f"{cell.id} {place} {part}"
                names[old] = hashlib.sha256(text.encode()).hexdigest()[:32]
            view["model_id"] = names[view["model_id"]]
    state = {new: renamed(models[old], names) for old, new in names.items()}
    return {"widgets": {STATE: {**stored, "state": state}}} if state else {}


def renamed(model: Any, names: dict[str, str]) -> Any:
    """Return a widget's state with the new names of those that it refers to."""
    text = json.dumps(model)
    for old, new in names.items():
        text = text.replace(REFERENCE + old, REFERENCE + new)
    return json.loads(text)


def views(cell: nbformat.NotebookNode) -> list[dict[str, Any]]:
    """Widgets that a cell shows."""
    outputs = cell.get("outputs", [])
    return [output["data"][VIEW] for output in outputs if VIEW in output.get("data", {})]


def family(name: str, models: dict[str, Any]) -> list[str]:
    """Return a widget and those that its state refers to, such as its layout."""
    found = [name]
    for one in found:
        text = json.dumps(models[one])
        found += [
            other for other in models if REFERENCE + other in text and other not in found
        ]
    return found


def execute(path: Path) -> None:
    """Run one notebook from its own folder and write it back."""
    notebook = nbformat.read(path, as_version=4)
    runner = ExecutePreprocessor(timeout=600, kernel_name="python3")
    runner.preprocess(notebook, {"metadata": {"path": str(path.parent)}})
    tidy(notebook)
    write_whole(path, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        execute(Path(name))
