"""Real pictures: photographs and digits that ship inside packages, and a reader's own.

Everything comes as a tensor in [0, 1] with a batch dimension, ready for a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .errors import UnknownNameError

Size = int | tuple[int, int] | None
Pixels = np.ndarray[Any, np.dtype[Any]]


def _skimage(name: str) -> Callable[[], Pixels]:
    def read() -> Pixels:
        from skimage import data

        pixels: Pixels = getattr(data, name)()
        return pixels

    return read


def _sklearn(name: str) -> Callable[[], Pixels]:
    def read() -> Pixels:
        from sklearn.datasets import load_sample_image

        pixels: Pixels = load_sample_image(name)
        return pixels

    return read


PHOTOS: dict[str, Callable[[], Pixels]] = {
    "astronaut": _skimage("astronaut"),
    "cat": _skimage("cat"),
    "coffee": _skimage("coffee"),
    "rocket": _skimage("rocket"),
    "retina": _skimage("retina"),
    "camera": _skimage("camera"),
    "brick": _skimage("brick"),
    "china": _sklearn("china.jpg"),
    "flower": _sklearn("flower.jpg"),
}


def photo(name: str, size: Size = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Load a photograph that ships inside scikit-image or scikit-learn; nothing is downloaded.

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

    The licences are as scikit-image and scikit-learn state them.

    Parameters
    ----------
    name : str
        One of the names above.
    size : int or (int, int), optional
        Side, or height and width. The largest centred part of that aspect is cut out and
        resized with antialiasing, so nothing is squeezed. ``None``: as it is.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    Tensor, (1, 3, H, W)
        In [0, 1]; a grey picture has three equal channels.

    Raises
    ------
    UnknownNameError
        If there is no photograph of that name; the message lists those there are.
    ValueError
        If ``size`` is not made of positive whole numbers.
    """
    if name not in PHOTOS:
        raise UnknownNameError(f"No photo {name!r}; there are {', '.join(PHOTOS)}.")
    picture = _resized(_unit(PHOTOS[name]()), size)
    return picture.expand(1, 3, -1, -1).contiguous().to(dtype)


def picture(
    path: str | PathLike[str], size: Size = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Load a picture file of the reader's own, in any format that Pillow reads.

    Parameters
    ----------
    path : str or path
        The file; the camera's rotation mark is obeyed, transparency is dropped.
    size, dtype
        As in :func:`photo`.

    Returns
    -------
    Tensor, (1, 3, H, W)
        In [0, 1].

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    PIL.UnidentifiedImageError
        If the file is not a picture.
    ValueError
        If ``size`` is not made of positive whole numbers.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    return _resized(_unit(np.asarray(upright)), size).to(dtype)


def digit(index: int, size: Size = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Load one of scikit-learn's 1797 handwritten digits of 8×8 pixels.

    Parameters
    ----------
    index : int
        From 0 to 1796; the first ten are 0, 1, …, 9.
    size, dtype
        As in :func:`photo`.

    Returns
    -------
    Tensor, (1, 1, 8, 8)
        In [0, 1], or of another height and width if ``size`` says so.

    Raises
    ------
    UnknownNameError
        If there is no such digit.
    ValueError
        If ``size`` is not made of positive whole numbers.
    """
    return digits([index], size, dtype)[0]


def digits(
    indices: Iterable[int] | None = None, size: Size = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Load scikit-learn's handwritten digits with their labels.

    From the UCI repository's *Optical Recognition of Handwritten Digits* (Alpaydin and Kaynak,
    1998; CC BY 4.0), as it ships inside scikit-learn.

    Parameters
    ----------
    indices : iterable of int, optional
        Which of the 1797; ``None``: all.
    size, dtype
        As in :func:`photo`.

    Returns
    -------
    inputs : Tensor, (N, 1, 8, 8)
        In [0, 1].
    labels : Tensor, (N,)
        int64.

    Raises
    ------
    UnknownNameError
        If there is no digit of some index.
    ValueError
        If ``size`` is not made of positive whole numbers.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    places = _places(indices, len(source.target), "digit")
    inputs = torch.from_numpy(source.images[places] / 16).unsqueeze(1)
    labels = torch.from_numpy(source.target[places].astype(np.int64))
    return _resized(inputs, size).to(dtype), labels


def mnist(
    root: str | PathLike[str],
    download: bool = False,
    *,
    indices: Iterable[int] | None = None,
    train: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Load MNIST through torchvision, where it already lies on disk or may be downloaded.

    Parameters
    ----------
    root : str or path
        torchvision's data folder.
    download : bool
        Whether to ask the network for what is missing.
    indices : iterable of int, optional
        Which pictures; ``None``: all.
    train : bool
        The training half (60 000) instead of the test half (10 000).
    dtype : torch.dtype
        Of the pictures.

    Returns
    -------
    inputs : Tensor, (N, 1, 28, 28)
        In [0, 1].
    labels : Tensor, (N,)
        int64.

    Raises
    ------
    FileNotFoundError
        If the files are not there and ``download`` is false.
    UnknownNameError
        If there is no picture of some index.
    """
    return _torchvision("MNIST", root, download, indices, train, dtype)


def cifar10(
    root: str | PathLike[str],
    download: bool = False,
    *,
    indices: Iterable[int] | None = None,
    train: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Load CIFAR-10 through torchvision, where it already lies on disk or may be downloaded.

    Parameters
    ----------
    root : str or path
        torchvision's data folder.
    download : bool
        Whether to ask the network for what is missing.
    indices : iterable of int, optional
        Which pictures; ``None``: all.
    train : bool
        The training half (50 000) instead of the test half (10 000).
    dtype : torch.dtype
        Of the pictures.

    Returns
    -------
    inputs : Tensor, (N, 3, 32, 32)
        In [0, 1].
    labels : Tensor, (N,)
        int64.

    Raises
    ------
    FileNotFoundError
        If the files are not there and ``download`` is false.
    UnknownNameError
        If there is no picture of some index.
    """
    return _torchvision("CIFAR10", root, download, indices, train, dtype)


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
    height, width = (size, size) if isinstance(size, int) else size
    for side in (height, width):
        if not isinstance(side, int) or isinstance(side, bool) or side < 1:
            raise ValueError(f"size must be positive whole numbers, got {size!r}.")
    part = _centred(pictures, height, width)
    if part.shape[-2:] == (height, width):
        return part.contiguous()
    return functional.interpolate(part, (height, width), mode="bilinear", antialias=True)


def _centred(pictures: Tensor, height: int, width: int) -> Tensor:
    """Cut out the largest centred part with the aspect of ``height`` × ``width``."""
    h, w = pictures.shape[-2:]
    scale = min(h / height, w / width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (h - rows) // 2, (w - columns) // 2
    return pictures[..., top : top + rows, left : left + columns]
