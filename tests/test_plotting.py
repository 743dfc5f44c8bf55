"""Figures show what they were given, in colours that everyone can tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb

from gradinv_edu.errors import InvalidArgumentError, InvalidTensorError
from gradinv_edu.kit import data, plotting
from gradinv_edu.kit.plotting import COLOURS, compare, curves, gallery

# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [
        [0.3673, 0.8606, -0.2280],
        [0.2801, 0.6725, 0.0474],
        [-0.0118, 0.0429, 0.9689],
    ],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before, "a setting of matplotlib was left changed"


def _linear(colours: tuple[str, ...]) -> np.ndarray:
    rgb = np.array([to_rgb(c) for c in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _titles(figure: plt.Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def _shown(figure: plt.Figure, place: int) -> np.ndarray:
    return np.asarray(figure.axes[place].images[0].get_array())


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_stay_apart_and_stand_out_from_white(sight: str) -> None:
    from skimage.color import deltaE_ciede2000, rgb2lab

    linear = np.clip(_linear(COLOURS) @ np.array(SIGHT[sight]).T, 0, 1)
    seen = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    lab = rgb2lab(seen[None])[0]
    assert min(deltaE_ciede2000(a, b) for a, b in combinations(lab, 2)) > 15
    luminance = _linear(COLOURS) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05)).min() > 3  # WCAG 2.1, graphics


def test_compare_shows_truth_recovery_and_amplified_difference() -> None:
    truth = data.photo("cat", 16, torch.float64)
    figure = compare(truth, truth + 3e-13)
    assert _titles(figure) == ["truth", "recovered", "difference × 1e12"]
    assert np.array_equal(_shown(figure, 0), truth[0].permute(1, 2, 0).numpy())
    assert np.allclose(_shown(figure, 1), _shown(figure, 0), atol=1e-12)
    assert np.allclose(_shown(figure, 2), 0.5 + 0.15, atol=1e-3)
    grey = compare(data.digit(3)[0, 0], data.digit(3)[0]).axes[0].images[0]
    assert grey.get_cmap().name == "gray" and grey.get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("difference", "gain", "title"),
    [
        (0.0, "auto", "difference: none"),
        (0.4, "auto", "difference"),
        (7.0, "auto", "difference"),
        (0.02, "auto", "difference × 10"),
        (0.02, 25, "difference × 25"),
        (2e-7, 1e6, "difference × 1e6"),
    ],
)
def test_the_gain_is_printed(difference: float, gain: float, title: str) -> None:
    truth = data.digit(3, dtype=torch.float64)
    assert _titles(compare(truth, truth + difference, gain=gain))[2] == title


def test_compare_takes_many_rows_and_flat_recoveries() -> None:
    truth = torch.cat([data.photo("cat", 8), data.photo("coffee", 8)])
    mixed = [data.photo("cat", (6, 8))[0], data.digit(1)[0]]
    for truths, recovered in [
        (truth, truth.double().flatten()),
        (truth, truth.flatten(1)),
        (truth, list(truth.flatten(1))),
        (mixed, mixed),
        *[(mixed, [t.reshape(shape) for t in mixed]) for shape in ((-1,), (1, -1))],
    ]:
        figure = compare(truths, recovered, ("x", "y", "z"))
        assert _titles(figure) == ["x", "y", "z: none", "", "", ""]
        assert np.array_equal(_shown(figure, 4), _shown(figure, 3))


def test_gallery_shows_each_picture_under_its_title() -> None:
    names = ["cat", "rocket", "china"]
    figure = gallery([data.photo(n, (12, 16)) for n in names], names, columns=2)
    assert _titles(figure) == [*names, ""]
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]


def test_curves_differ_in_more_than_colour() -> None:
    figure = curves([1, 10], {"a": [1, 2], "b": [3, 4]}, "steps", "error", log="xy")
    first, second = figure.axes[0].lines
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_marker() != second.get_marker()
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["a", "b"]


@pytest.mark.filterwarnings("error")
def test_a_figure_is_small_opaque_and_in_its_own_style() -> None:
    truth, file = data.photo("astronaut", 64), io.BytesIO()
    compare(truth, truth).savefig(file, format="png", bbox_inches="tight")
    assert len(file.getvalue()) < 120_000
    file.seek(0)
    assert plt.imread(file)[..., 3].min() == 1
    with plotting.style():
        assert not matplotlib.rcParams["axes.spines.top"]


CAT, ONE = data.photo("cat", (6, 8)), data.digit(1)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (InvalidTensorError, r"pictures must be .*, got NoneType", lambda: gallery(None)),
        (InvalidTensorError, "recovered must be .*, got ndarray",
         lambda: compare(ONE, ONE.numpy())),
        (InvalidTensorError, "pictures holds no picture", lambda: gallery(torch.zeros(0, 1, 8, 8))),
        (InvalidTensorError, "pictures holds no picture", lambda: gallery([])),
        (InvalidTensorError, r"a picture is \(H, W\)", lambda: gallery(torch.zeros(2, 8, 8))),
        (InvalidTensorError, "recovered has 144 NaN", lambda: compare(CAT, CAT * torch.nan)),
        (InvalidTensorError, "must pair up", lambda: compare(CAT, data.photo("cat", 9))),
        (InvalidTensorError, "must pair up", lambda: compare(CAT, CAT.transpose(2, 3))),
        (InvalidTensorError, r"shape \(60,\).*\.reshape\(1, height, width\)",
         lambda: compare(ONE[0], [ONE.flatten()[:60]])),
        (InvalidTensorError, r"truth has shape \(64,\).*\.reshape",
         lambda: compare([ONE.flatten()], ONE)),
        (InvalidTensorError, "'a' has 1 points, x has 2",
         lambda: curves([1, 2], {"a": [1]}, "x", "y")),
        (InvalidArgumentError, "titles are three", lambda: compare(CAT, CAT, ("a", "b"))),
        (InvalidArgumentError, "gain is a positive number", lambda: compare(CAT, CAT, gain=-1)),
        (InvalidArgumentError, "1 pictures need as many titles, got 2",
         lambda: gallery(CAT, ["a", "b"])),
        (InvalidArgumentError, "columns must be a whole number", lambda: gallery(CAT, columns=0)),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(
    error: type[Exception], message: str, call: Callable[[], object]
) -> None:
    with pytest.raises(error, match=message):
        call()
