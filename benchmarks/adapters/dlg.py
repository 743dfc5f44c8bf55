"""Deep Leakage from Gradients (Zhu, Liu and Han, 2019): its ``main.py``, run as a script."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from benchmarks.cases import CLASS, Case, System

GIVEN = (
    "no public function: main.py is run as a script, all of its 300 iterations, with this net's "
    "weights in its LeNet (whose last layer is made to fit other sizes than 32×32), the picture "
    "and its label in place of CIFAR-100, MagicMock for matplotlib.pyplot; it computes the "
    "gradient itself and searches for the label too"
)


def prepare(case: Case, checkout: str) -> Callable[[], Tensor]:
    """Put net and picture where the script imports them; its ``dummy_data`` is the answer."""
    import matplotlib
    import torchvision
    from torchvision.transforms.functional import to_pil_image

    os.chdir(checkout)
    sys.path.insert(0, checkout)
    sys.argv = ["main.py"]
    vision: Any = importlib.import_module("models.vision")

    def our_weights(module: nn.Module) -> None:
        if isinstance(module, vision.LeNet):
            for parameter, ours in zip(module.parameters(), case.model.parameters(), strict=True):
                parameter.data = ours.data.clone()

    vision.weights_init = our_weights
    data = [(to_pil_image(case.x[0]), CLASS)] * 26  # the script takes picture 25
    torchvision.datasets = SimpleNamespace(CIFAR100=lambda *_, **__: data)
    matplotlib.pyplot = sys.modules["matplotlib.pyplot"] = MagicMock()
    torch.manual_seed(0)

    def recover() -> Tensor:
        left: dict[str, Any] = runpy.run_path("main.py")
        found: Tensor = left["dummy_data"]
        return found.detach()

    return recover


SYSTEMS = {
    "DLG": System(
        prepare,
        nets=("LeNet",),
        given=GIVEN,
        source="mit-han-lab/dlg",
        option="dlg",
        holds="models/vision.py",
    )
}
