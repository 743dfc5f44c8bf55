"""Widgets: what they store, what a kernel adds, and the browser's figures against the package's."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradinv_edu as gi
from gradinv_edu.errors import InvalidArgumentError
from gradinv_edu.kit import widgets

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
LARGEST_PAGE = 3_000_000
node = shutil.which("node")
needs_node = pytest.mark.skipif(not node, reason="no node here to run the widgets' JavaScript")


def _frame(sigma: float) -> widgets.Frame:
    truth = gi.data.digit(3)
    return widgets.compared(truth, truth + sigma, "a three", spread=f"{sigma:g}")


def _slider(**settings: Any) -> widgets.Slider:
    return widgets.slider(_frame, [0.0, 0.1, 0.5], "Noise", **settings)


def _talk(slider: widgets.Slider, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    slider.send = lambda content, buffers=None: said.append(content)
    for message in messages:
        slider._handle_custom_msg(message, [])
    return said


def test_a_slider_stores_its_frames_with_figures_and_a_text_each() -> None:
    import matplotlib.pyplot as plt

    before, truth = plt.get_fignums(), gi.data.digit(3)
    slider = _slider(start=1, name="{:.1f}".format)
    assert plt.get_fignums() == before, "figures do not stay open"
    assert (slider.index, repr(slider)) == (1, "a slider, Noise: 0.0, 0.1, 0.5")
    assert len({frame["src"] for frame in slider.frames}) == 3
    assert all(frame["src"].startswith("data:image/webp;base64,") for frame in slider.frames)
    exact, good, bad = (dict(frame["numbers"]) for frame in slider.frames)
    assert list(good) == ["PSNR", "relative error", "spread"]
    assert (exact["PSNR"], good["spread"]) == ("inf dB", "0.1")
    assert good["PSNR"] == f"{gi.metrics.psnr((truth + 0.1).clamp(0, 1), truth):.0f} dB"
    assert bad["relative error"] == f"{gi.metrics.relative_error(truth + 0.5, truth):.0e}"
    seen = ("looks the same", "coarse flaws", "hardly to be recognised")
    for words, frame in zip(seen, slider.frames, strict=True):
        assert words in frame["alt"]


def test_a_kernel_computes_another_value_or_says_why_not() -> None:
    slider = _slider()
    assert _talk(slider, {"hello": True}, {"compute": 0.3}) == [{"live": True}, {"live": True}]
    assert [frame["name"] for frame in slider.frames] == ["0.0", "0.1", "0.3", "0.5"]
    assert slider.index == 2
    assert dict(slider.frames[2]["numbers"])["spread"] == "0.3"
    (said,) = _talk(slider, {"compute": math.nan})
    assert "NaN" in said["error"]
    assert len(slider.frames) == 4
    names = widgets.slider(lambda v: _frame(len(v) / 9), ["a", "bb"], "Name")
    assert _talk(names, {"hello": True}) == [{"live": False}], "only rising numbers can be typed"


def _silent(v: float) -> widgets.Frame:
    return widgets.Frame(_frame(v).figure, " ", {})


def _uneven(v: float) -> widgets.Frame:
    return widgets.Frame(_frame(v).figure, "a text", {str(v): ""})


@pytest.mark.parametrize(
    ("message", "frame", "values", "start"),
    [
        ("two values or more", _frame, [0.1], 0),
        ("two values or more", _frame, [], 0),
        ("two values or more", _frame, [0.1, 0.2], 2),
        ("no alternative text", _silent, [0.1, 0.2], 0),
        ("same numbers", _uneven, [0.1, 0.2], 0),
    ],
)
def test_what_a_slider_cannot_show_is_refused(
    message: str, frame: Any, values: list[float], start: int
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        widgets.slider(frame, values, "Noise", start=start)


def test_a_pad_knows_what_is_drawn() -> None:
    pad = widgets.pad()
    assert pad.drawn.shape == (1, 1, 28, 28)
    assert len(pad.weight) == 784
    pad.picture = [0.25] * 784
    assert torch.equal(pad.drawn, torch.full((1, 1, 28, 28), 0.25).double())


def _in_node(script: str, tmp_path: Path) -> Any:
    module = tmp_path / "pad.mjs"
    module.write_text((widgets.FRONTEND / "pad.js").read_text())
    source = f'import * as pad from "{module.as_uri()}";\n{script}'
    done = subprocess.run(
        [str(node), "--input-type=module", "-e", source],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@needs_node
@pytest.mark.parametrize(("bias", "label"), [(-5.0, 0), (0.0, 1), (3.0, 0)])
def test_the_browser_s_gradient_is_the_package_s(bias: float, label: int, tmp_path: Path) -> None:
    pad = widgets.pad()
    neuron = gi.models.perceptron(784, dtype=torch.float64)
    neuron[1].weight.data = torch.tensor([pad.weight], dtype=torch.float64)
    neuron[1].bias.data.fill_(bias)
    truth = torch.full((1, 1), float(label)).double()
    sent = gi.observe(neuron, nn.BCEWithLogitsLoss(), pad.drawn, truth).gradients
    W, x = json.dumps(pad.weight), json.dumps(pad.picture)
    found = _in_node(
        f"const g = pad.gradient({W}, {bias}, {x}, {label});"
        "console.log(JSON.stringify({...g, x: pad.recovered(g)}));",
        tmp_path,
    )
    assert found["bias"] == pytest.approx(sent["1.bias"].item(), rel=1e-6)
    weight = torch.tensor(found["weight"], dtype=torch.float64)
    assert gi.metrics.relative_error(weight, sent["1.weight"][0]) < 1e-12
    ours = gi.perceptron.recover_input(sent["1.weight"][0], sent["1.bias"][0])
    recovered = torch.tensor(found["x"], dtype=torch.float64)
    assert gi.metrics.relative_error(recovered, ours) < 1e-12


@needs_node
@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16"])
def test_the_browser_rounds_as_torch_does(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    values *= 10 ** torch.linspace(4 if name == "float16" else 20, -9, 400, dtype=torch.float64)
    values = torch.cat([values, torch.tensor([0.0, 1.0, 2.0**-24, 2049.0, 2051.0]).double()])
    found = _in_node(
        f"const values = {json.dumps(values.tolist())};"
        f'console.log(JSON.stringify(values.map((v) => pad.rounded(v, "{name}"))));',
        tmp_path,
    )
    expected = values.to(getattr(torch, name)).double()
    assert torch.equal(torch.tensor(found, dtype=torch.float64), expected)


@needs_node
def test_the_browser_s_noise_does_what_the_formula_says(tmp_path: Path) -> None:
    pad, sigma = widgets.pad(), 1e-4
    W, x = json.dumps(pad.weight), json.dumps(pad.picture)
    found = _in_node(
        f"const [W, x] = [{W}, {x}]; const g = pad.gradient(W, 0, x, 1);"
        f'const s = pad.sent(g, pad.gaussians(785), {sigma}, "float64");'
        "const error = pad.relativeError(pad.recovered(s), x);"
        "const zero = pad.recovered({weight: [1], bias: 0});"
        "console.log(JSON.stringify({k: g.bias, error, noise: pad.gaussians(785), zero}));",
        tmp_path,
    )
    noise = torch.tensor(found["noise"])
    assert abs(float(noise.mean())) < 0.15 and abs(float(noise.std()) - 1) < 0.1
    k = torch.tensor(found["k"], dtype=torch.float64)
    expected = gi.perceptron.noise_error(pad.drawn.flatten(), k, sigma)
    assert found["error"] == pytest.approx(expected, rel=0.1)
    assert found["zero"] is None


def _stored(path: Path) -> tuple[dict[str, Any], list[str]]:
    notebook = json.loads(path.read_text())
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    shown = [o["data"][VIEW]["model_id"] for o in outputs if VIEW in o.get("data", {})]
    return notebook["metadata"].get("widgets", {}).get(STATE, {}).get("state", {}), shown


WITH_WIDGETS = [path for path in NOTEBOOKS if _stored(path)[1]]


@pytest.mark.parametrize("path", WITH_WIDGETS, ids=lambda path: path.stem)
def test_a_page_can_show_what_it_stores(path: Path) -> None:
    """The page's own host knows anywidget's modules, and nothing else."""
    assert len(WITH_WIDGETS) > 5
    models, shown = _stored(path)
    for name in shown:
        state = models[name]["state"]
        front = "slider.js" if "frames" in state else "pad.js"
        assert state["_esm"] == (widgets.FRONTEND / front).read_text(), "execute this chapter again"
        assert state["_css"] == (widgets.FRONTEND / "widgets.css").read_text()
        for frame in state.get("frames", []):
            assert len(frame["alt"].split()) >= 4 and frame["numbers"] and frame["src"]
    assert len(models) == 2 * len(shown), "a widget and its layout each, and nothing left over"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_page_is_heavy(path: Path) -> None:
    assert path.stat().st_size < LARGEST_PAGE
