"""R-GAP of Zhu and Blaschko (2021), run through ``main.main`` of its repository."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import Case, System
from gradinv_edu.kit.metrics import relative_error

GIVEN = (
    "this net's weights (its last layer made to fit other sizes than 32×32), the picture in place "
    "of its data loader, MagicMock for its drawing of figures, np.bool where numpy lacks it; "
    "main.main computes the gradient itself, with its own loss, for the label against the "
    "prediction, which it takes as known"
)


def prepare(case: Case, checkout: str) -> Callable[[], Tensor]:
    """Put net and picture into the hands of ``main``; its last layer's answer is the picture."""
    from torchvision.transforms.functional import to_pil_image

    published, found = load(checkout, case.net), []
    expected = case.update().gradients.values()
    make, solve = getattr(published, case.net.replace("-", "")), published.r_gap

    def with_our_weights() -> nn.Module:
        theirs: nn.Module = make()
        for parameter, ours in zip(theirs.parameters(), case.model.parameters(), strict=True):
            parameter.data = ours.data.clone()
        return theirs

    def recorded(**arguments: Any) -> Any:
        check_same(torch.as_tensor(arguments["g"]), expected)
        found.append(solve(**arguments))
        return found[-1]

    setattr(published, case.net.replace("-", ""), with_our_weights)
    published.r_gap, published.plt = recorded, MagicMock()
    published.dataloader = lambda **_: ((to_pil_image(case.x[0]), 0), None)

    def recover() -> Tensor:
        published.main()
        return torch.as_tensor(found[-1][0]).reshape(case.x.shape)

    return recover


def check_same(gradient: Tensor, expected: Iterable[Tensor]) -> None:
    """Make sure that it attacks the gradient that all others are given."""
    alike = [ours for ours in expected if ours.shape == gradient.shape]
    if not any(relative_error(gradient, ours) < 1e-3 for ours in alike):
        raise ValueError("the checkout computes another gradient than this project")


def load(checkout: str, net: str) -> Any:
    """Import its ``main``, which reads options and, in its own folder, a configuration."""
    if not hasattr(np, "bool"):
        np.bool = np.bool_
    os.chdir(checkout)
    sys.path.insert(0, checkout)
    sys.argv = ["main.py", "-m", net]
    return importlib.import_module("main")


SYSTEMS = {
    "R-GAP": System(
        prepare,
        nets=("CNN6", "CNN6-d"),
        given=GIVEN,
        source="JunyiZhu-AI/R-GAP",
        option="rgap",
        holds="recursive_attack.py",
        needs=(("yaml", "pyyaml"),),
    )
}
