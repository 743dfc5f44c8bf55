"""A Sphinx extension: figures of the chapters on the page's own ground, by day and by night.

Charts are drawn on white. Here their white becomes transparent, and they are marked ``chart``, so
that the style sheet can turn their colours by night. A figure that holds pictures keeps these as
they are; only the paper around them becomes transparent, and its titles a grey for both modes.
So it is with the frames of sliders, which lie in the pages themselves.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
from docutils import nodes
from PIL import Image
from scipy.ndimage import binary_fill_holes, find_objects, label
from sphinx.application import Sphinx

INK = (112, 124, 132)  # as far from the page's paper as from its slate
PANEL = 60  # pixels: what is dense and larger is a picture
FRAME = re.compile(r"data:image/webp;base64,([A-Za-z0-9+/=]+)")  # of a slider


def pictures(pixels: np.ndarray) -> list[tuple[slice, slice]]:
    """Where a figure holds pictures: large areas that are dense, or white in a frame.

    Beside pictures, the narrow strip that explains their colours is one too.
    """
    ink = pixels.min(axis=2) < 250
    areas = [(at, ink[at]) for at in find_objects(label(ink)[0])]
    large = [at for at, part in areas if min(part.shape) >= PANEL and _framed(part)]
    if not large:
        return []
    slim = [(at, part) for at, part in areas if 8 <= min(part.shape) < PANEL < max(part.shape)]
    return large + [_trimmed(at, part) for at, part in slim if part.mean() > 0.6]


def _framed(part: np.ndarray) -> bool:
    """Whether an area is a rectangle, and neither a chart's bars nor the meshes of its grid."""
    whole = binary_fill_holes(part).mean() > 0.9
    return bool(whole and (part.mean() > 0.2 or label(~part)[1] == 1))


def _trimmed(at: tuple[slice, slice], part: np.ndarray) -> tuple[slice, slice]:
    """Leave out the ticks of a strip, which stand off its side."""
    rows, columns = (np.flatnonzero(part.mean(axis=axis) > 0.6) for axis in (1, 0))
    top, left = at[0].start, at[1].start
    return slice(top + rows[0], top + rows[-1] + 1), slice(
        left + columns[0], left + columns[-1] + 1
    )


def clear(pixels: np.ndarray) -> np.ndarray:
    """Give the figure, RGBA, with its paper transparent."""
    panels = pictures(pixels)
    alpha = 255 - pixels.min(axis=2)
    part = np.maximum(alpha, 1)[..., None] / 255
    colours = ((pixels - 255.0 * (1 - part)) / part).round().clip(0, 255)
    if panels:  # letters a little bolder: the grey is neither's best contrast
        alpha = (255 * (alpha / 255) ** 0.55).round().astype(np.uint8)
        colours[:] = INK
    for at in panels:
        alpha[at], colours[at] = 255, pixels[at]
    return np.dstack([colours, alpha]).astype(np.uint8)


def mark(app: Sphinx, doctree: nodes.document, _: str) -> None:
    """Mark each chart, and give every box that states a claim one look."""
    for image in doctree.findall(nodes.image):
        path = Path(app.srcdir) / image["uri"]
        if path.suffix == ".png" and not pictures(_pixels(path)):
            image["classes"].append("chart")
    for box in doctree.findall(nodes.admonition):
        if box.children[0].astext().startswith("Claim:"):
            box["classes"] = ["claim"]


def rewrite(app: Sphinx, error: Exception | None) -> None:
    """Give the built book its figures without their paper."""
    if error is not None or app.builder.format != "html":
        return
    for path in (Path(app.outdir) / "_images").glob("*.png"):
        with Image.open(path) as image:
            done = image.mode == "RGBA" and image.getextrema()[3][0] < 255
        if not done:
            Image.fromarray(clear(_pixels(path))).save(path, optimize=True)
    for path in Path(app.outdir).rglob("*.html"):
        page = path.read_text()
        if FRAME.search(page):
            path.write_text(FRAME.sub(clear_frame, page))


def clear_frame(found: re.Match[str]) -> str:
    """Give a slider's frame its paper transparent; ``#chart`` marks those that turn by night."""
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
        if image.mode == "RGBA":
            return found[0]
        pixels = np.asarray(image.convert("RGB"))
    stream = io.BytesIO()
    Image.fromarray(clear(pixels)).save(stream, "WEBP", quality=82, method=4)
    mark = "" if pictures(pixels) else "#chart"
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}{mark}"


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register both."""
    app.connect("doctree-resolved", mark)
    app.connect("build-finished", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
