"""This package: its recursion as it is, polished, and from float64 gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import gradinv_edu as gi
from benchmarks.cases import NETS, Case, System
from benchmarks.cases import case as make_case

GIVEN = "net and gradient; the label is not told. A small recovery beforehand loads libraries"


def prepare(case: Case, checkout: str, polish: bool = False) -> Callable[[], Tensor]:
    """Everything after the gradient is measured."""
    update = case.update()
    small = make_case("CNN6", 8, case.x.dtype)
    gi.recover(small.model, small.update(), small.shape, small.loss)

    def recover() -> Tensor:
        return gi.recover(case.model, update, case.shape, case.loss, polish=polish).inputs

    return recover


SYSTEMS = {
    "own": System(prepare, tuple(NETS), GIVEN),
    "own, float64": System(prepare, tuple(NETS), GIVEN, dtype=torch.float64, climbs=False),
    "own, polished": System(partial(prepare, polish=True), ("CNN6",), GIVEN, climbs=False),
}
