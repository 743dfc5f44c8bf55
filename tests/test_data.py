"""Pictures are real, in [0, 1], unsqueezed, and need no network."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradinv_edu import data
from gradinv_edu.errors import UnknownNameError


@pytest.mark.parametrize("name", data.PHOTOS)
def test_a_photo_is_a_picture(name: str) -> None:
    picture = data.photo(name, 32)
    assert picture.shape == (1, 3, 32, 32)
    assert picture.dtype == torch.float32
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert float(picture.std()) > 0.03
    assert f"\n    {name} " in (data.photo.__doc__ or "")


def test_without_a_size_a_photo_is_as_it_was_taken() -> None:
    from skimage.data import astronaut

    picture = data.photo("astronaut", dtype=torch.float64)
    wanted = torch.from_numpy(astronaut()).permute(2, 0, 1)[None]
    assert torch.equal((picture * 255).round().to(torch.uint8), wanted)
    assert data.photo("china").shape == (1, 3, 427, 640)


def test_resizing_filters_before_it_samples() -> None:
    """Against the mean of each block: without antialiasing the error is many times this."""
    full = data.photo("brick", 512, torch.float64)
    wanted = torch.nn.functional.avg_pool2d(full, 16)
    smooth = (data.photo("brick", 32, torch.float64) - wanted).norm()
    sampled = (full[..., 8::16, 8::16] - wanted).norm()
    assert float(smooth) < 0.5 * float(sampled)


@given(height=st.integers(1, 60), width=st.integers(1, 60))
@settings(max_examples=20)
def test_sizes_are_as_asked_and_nothing_is_squeezed(height: int, width: int) -> None:
    picture = data.photo("rocket", (height, width))
    assert picture.shape == (1, 3, height, width)
    part = data._centred(torch.zeros(1, 3, 427, 640), height, width)
    rows, columns = part.shape[-2:]
    assert abs(rows * width - columns * height) <= max(height, width)
    assert rows == 427 or columns == 640


def test_a_grey_photo_has_three_equal_channels() -> None:
    camera = data.photo("camera", 16)
    assert torch.equal(camera[:, 0], camera[:, 1])
    assert torch.equal(camera[:, 0], camera[:, 2])


def test_an_unknown_photo_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UnknownNameError, match="No photo 'dog'; there are astronaut, cat, coffee"):
        data.photo("dog")


@pytest.mark.parametrize("size", [0, -3, (4, 0), 2.5, (3.0, 3)])
def test_impossible_sizes_are_refused(size: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        data.photo("cat", size)  # type: ignore[arg-type]


def test_digits_are_scikit_learn_s() -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    inputs, labels = data.digits(dtype=torch.float64)
    assert inputs.shape == (1797, 1, 8, 8)
    assert np.array_equal(inputs[:, 0].numpy() * 16, source.images)
    assert labels.dtype == torch.int64
    assert labels[:10].tolist() == list(range(10))
    assert torch.equal(data.digit(7, dtype=torch.float64), inputs[7:8])
    assert data.digit(7, size=28).shape == (1, 1, 28, 28)


def test_unknown_digits_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="No digit 1797; indices run from 0 to 1796"):
        data.digit(1797)
    with pytest.raises(UnknownNameError, match="No digit -1"):
        data.digit(-1)


def test_a_reader_s_own_picture(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "own.png")
    picture = data.picture(tmp_path / "own.png", dtype=torch.float64)
    assert np.allclose(picture[0].permute(1, 2, 0).numpy() * 255, pixels, atol=1e-12)
    assert data.picture(str(tmp_path / "own.png"), 3).shape == (1, 3, 3, 3)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert data.picture(tmp_path / "grey.png").shape == (1, 3, 4, 6)


def test_the_camera_s_rotation_is_obeyed(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert data.picture(tmp_path / "turned.jpg").shape == (1, 3, 6, 4)


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    from PIL import UnidentifiedImageError

    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        data.picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UnidentifiedImageError, match="cannot identify"):
        data.picture(tmp_path / "text.png")


@pytest.mark.parametrize("load", [data.mnist, data.cifar10])
def test_sets_that_are_not_on_disk_are_refused(load: object, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pass download=True .* data\.digits"):
        load(tmp_path)  # type: ignore[operator]


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


def test_cifar_10_is_read_channels_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision import datasets

    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    fake = SimpleNamespace(data=pixels, targets=[9, 4])
    monkeypatch.setattr(datasets, "CIFAR10", lambda root, train, download: fake)
    inputs, labels = data.cifar10(tmp_path, dtype=torch.float64)
    assert np.allclose(inputs.permute(0, 2, 3, 1).numpy() * 255, pixels, atol=1e-12)
    assert labels.tolist() == [9, 4]
