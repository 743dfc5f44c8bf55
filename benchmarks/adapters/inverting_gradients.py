"""Inverting Gradients (Geiping et al., 2020), through its ``GradientReconstructor``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, System

# of its notebook "Recovery from Gradient Information", for pictures of 32×32
CONFIGURATION = {
    "signed": True,
    "boxed": True,
    "cost_fn": "sim",
    "indices": "def",
    "weights": "equal",
    "lr": 0.1,
    "optim": "adam",
    "restarts": 1,
    "max_iterations": 4000,
    "total_variation": 1e-6,
    "init": "randn",
    "filter": "none",
    "lr_decay": True,
    "scoring_choice": "loss",
}
GIVEN = (
    "net, gradient and label through GradientReconstructor.reconstruct, in the configuration of "
    "its notebook Recovery from Gradient Information (4000 iterations), mean 0 and deviation 1"
)


def prepare(case: Case, checkout: str) -> Callable[[], Tensor]:
    """Ready the reconstructor with its published configuration."""
    sys.path.insert(0, checkout)
    published = importlib.import_module("inversefed")
    gradients = list(case.update().gradients.values())
    scale = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    torch.manual_seed(0)

    def recover() -> Tensor:
        machine = published.GradientReconstructor(case.model, scale, dict(CONFIGURATION), 1)
        found: Tensor = machine.reconstruct(gradients, case.target, img_shape=case.shape)[0]
        return found

    return recover


SYSTEMS = {
    "Inverting Gradients": System(
        prepare,
        nets=("LeNet", "CNN6, 10 classes"),
        given=GIVEN,
        source="JonasGeiping/invertinggradients",
        option="inverting-gradients",
        holds="inversefed/__init__.py",
    )
}
