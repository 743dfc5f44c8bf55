"""Figures show what they were given, in colours that everyone can tell apart."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb

from gradinv_edu import data, plotting
from gradinv_edu.errors import InvalidTensorError

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


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_stay_apart(sight: str) -> None:
    from skimage.color import deltaE_ciede2000, rgb2lab

    linear = np.clip(_linear(plotting.COLOURS) @ np.array(SIGHT[sight]).T, 0, 1)
    seen = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    lab = rgb2lab(seen[None])[0]
    assert min(deltaE_ciede2000(a, b) for a, b in combinations(lab, 2)) > 15


def test_colours_stand_out_from_white() -> None:
    luminance = _linear(plotting.COLOURS) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05)).min() > 3  # WCAG 2.1, graphics


def test_compare_shows_truth_recovery_and_amplified_difference() -> None:
    truth = data.photo("cat", 16, torch.float64)
    recovered = truth + 3e-13
    figure = plotting.compare(truth, recovered)
    assert _titles(figure) == ["truth", "recovered", "difference × 1e12"]
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert np.array_equal(shown[0], truth[0].permute(1, 2, 0).numpy())
    assert np.allclose(shown[1], shown[0], atol=1e-12)
    assert np.allclose(shown[2], 0.5 + 0.15, atol=1e-3)


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
    assert _titles(plotting.compare(truth, truth + difference, gain=gain))[2] == title


def test_compare_takes_many_rows_and_flat_recoveries() -> None:
    truth = torch.cat([data.photo("cat", 8), data.photo("coffee", 8)])
    figure = plotting.compare(truth, truth.double().flatten(), ("x", "y", "z"))
    assert len(figure.axes) == 6
    assert _titles(figure) == ["x", "y", "z: none", "", "", ""]
    shown = np.asarray(figure.axes[4].images[0].get_array())
    assert np.array_equal(shown, truth[1].double().permute(1, 2, 0).numpy())
    mixed = [data.digit(1), data.photo("cat", 8)]
    assert len(plotting.compare(mixed, mixed).axes) == 6


def test_compare_takes_a_list_of_flat_recoveries() -> None:
    truth = [data.photo("cat", (6, 8))[0], data.digit(1)[0]]
    for shape in ((-1,), (1, -1)):
        figure = plotting.compare(truth, [t.reshape(shape) for t in truth])
        assert _titles(figure)[2] == "difference: none"
        assert len(figure.axes) == 6
    with pytest.raises(InvalidTensorError, match=r"shape \(60,\).*\.reshape\(1, height, width\)"):
        plotting.compare(truth[1:], [truth[1].flatten()[:60]])
    with pytest.raises(InvalidTensorError, match=r"truth has shape \(64,\).*\.reshape"):
        plotting.compare([truth[1].flatten()], truth[1:])


def test_a_picture_on_its_side_is_not_read_as_flat() -> None:
    cat = data.photo("cat", (6, 8))
    with pytest.raises(InvalidTensorError, match="must pair up"):
        plotting.compare(cat, cat.transpose(2, 3))


def test_what_is_no_tensor_or_empty_is_refused_by_name() -> None:
    with pytest.raises(InvalidTensorError, match=r"pictures must be .*, got NoneType"):
        plotting.gallery(None)  # type: ignore[arg-type]
    with pytest.raises(InvalidTensorError, match=r"recovered must be .*, got ndarray"):
        plotting.compare(data.digit(1), data.digit(1).numpy())  # type: ignore[arg-type]
    with pytest.raises(InvalidTensorError, match="pictures holds no picture"):
        plotting.gallery(torch.zeros(0, 1, 8, 8))


def test_grey_is_drawn_grey() -> None:
    figure = plotting.compare(data.digit(3)[0, 0], data.digit(3)[0])
    assert figure.axes[0].images[0].get_cmap().name == "gray"
    assert figure.axes[0].images[0].get_clim() == (0, 1)


def test_gallery_shows_each_picture_under_its_title() -> None:
    names = ["cat", "rocket", "china"]
    figure = plotting.gallery([data.photo(n, (12, 16)) for n in names], names, columns=2)
    assert _titles(figure) == [*names, ""]
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 0]


def test_curves_differ_in_more_than_colour() -> None:
    figure = plotting.curves([1, 10], {"a": [1, 2], "b": [3, 4]}, "steps", "error", log="xy")
    first, second = figure.axes[0].lines
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_marker() != second.get_marker()
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["a", "b"]


@pytest.mark.filterwarnings("error")
def test_a_figure_is_small_opaque_and_draws_without_a_warning() -> None:
    truth = data.photo("astronaut", 64)
    file = io.BytesIO()
    plotting.compare(truth, truth).savefig(file, format="png", bbox_inches="tight")
    assert len(file.getvalue()) < 120_000
    file.seek(0)
    assert plt.imread(file)[..., 3].min() == 1


def test_style_is_put_back() -> None:
    before = matplotlib.rcParams["axes.spines.top"]
    with plotting.style():
        assert not matplotlib.rcParams["axes.spines.top"]
    assert matplotlib.rcParams["axes.spines.top"] == before


def test_what_is_no_picture_is_refused() -> None:
    cat = data.photo("cat", 8)
    with pytest.raises(InvalidTensorError, match=r"a picture is \(H, W\)"):
        plotting.gallery(torch.zeros(2, 8, 8))
    with pytest.raises(InvalidTensorError, match="recovered has 192 NaN"):
        plotting.compare(cat, cat * torch.nan)
    with pytest.raises(InvalidTensorError, match="they must pair up"):
        plotting.compare(cat, data.photo("cat", 9))
    with pytest.raises(InvalidTensorError, match="pictures holds no picture"):
        plotting.gallery([])
    with pytest.raises(InvalidTensorError, match="'a' has 1 points, x has 2"):
        plotting.curves([1, 2], {"a": [1]}, "x", "y")


def test_impossible_settings_are_refused() -> None:
    cat = data.photo("cat", 8)
    with pytest.raises(ValueError, match="titles are three"):
        plotting.compare(cat, cat, ("a", "b"))
    with pytest.raises(ValueError, match="gain is a positive number"):
        plotting.compare(cat, cat, gain=-1)
    with pytest.raises(ValueError, match="1 pictures need as many titles, got 2"):
        plotting.gallery(cat, ["a", "b"])
    with pytest.raises(ValueError, match="columns must be one or more"):
        plotting.gallery(cat, columns=0)
