"""A model on a GPU where there is none: shapes, types and devices without numbers.

``FakeTensorMode`` carries a pretended device through every operation and refuses to mix two of
them, so a tensor that was left on the CPU is an error here. What asks for a value (a rank, a
tolerance) ends such a run; everything before it was seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch
from test_layers import EXAMPLES, TOGETHER, named
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from gradinv_edu import checks
from gradinv_edu.engine.layers import rule_of
from gradinv_edu.engine.layers.resampling import LinearCall
from gradinv_edu.errors import UnsupportedLayerError
from gradinv_edu.systems import LayerSystem

Shape = tuple[int, ...]
# an operation of a forward pass holds its own constants, in its example on the CPU
CASES = [case for case in (*EXAMPLES, *TOGETHER) if not isinstance(case[0], LinearCall)]
DEVICE = "meta"  # autograd runs on this one without a driver; it is as far from the CPU as CUDA
ASKS_FOR_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.fixture(autouse=True)
def _nothing_has_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether entries are finite cannot be asked of them."""
    monkeypatch.setattr(checks, "_finite", lambda tensor, name: tensor)
    for kind in ("Tensor", "nn.Module"):
        monkeypatch.setitem(checks.KINDS, kind, lambda value, name: None)


def pretended(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer with its tensors on the pretended device; it is changed in place."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, t in table.items():
                if t is not None:
                    kind = dtype if t.is_floating_point() else t.dtype
                    there = torch.empty(t.shape, dtype=kind, device=DEVICE)
                    table[name] = nn.Parameter(there) if table is part._parameters else there
    return module


def seen(found: object) -> Iterator[Tensor]:
    """The tensors of a result."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, tuple):
        yield from (t for part in found for t in seen(part))
    elif hasattr(found, "__dict__"):
        yield from (t for part in vars(found).values() for t in seen(part))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("module", "shape"), CASES, ids=[named(c) for c in CASES])
def test_a_rule_keeps_the_device(module: nn.Module, shape: Shape, dtype: torch.dtype) -> None:
    layer, double = copy.deepcopy(module), copy.deepcopy(module)
    with FakeTensorMode():
        layer, double = pretended(layer, dtype), pretended(double, torch.float64)
        rule, x = rule_of(layer), torch.empty(2, *shape, dtype=dtype, device=DEVICE)
        z = rule.forward(x)
        steps: list[Callable[[], object]] = [
            lambda: rule.pull(torch.empty_like(z), x),
            lambda: rule.clamp(z),
            lambda: rule.undo(z, "layer", 1e-15),
            lambda: rule.turn(z, torch.empty_like(z), 1e-15),
        ]
        if rule.affine:
            k = torch.empty(z.shape, dtype=torch.float64, device=DEVICE)
            mask = torch.ones_like(k)
            steps.append(lambda: products(LayerSystem(double, k, shape)))
            steps.append(lambda: products(LayerSystem(double, k, shape, row_mask=mask)))
        for step in steps:
            with suppress(*ASKS_FOR_VALUES, UnsupportedLayerError):
                assert all(t.device.type == DEVICE for t in seen(step()))


def products(system: LayerSystem) -> tuple[object, ...]:
    """Both products and the matrix."""
    x = torch.empty(2, *system.input_shape, dtype=torch.float64, device=DEVICE)
    image = system.matvec(x)
    return image, system.rmatvec(*image), system.to_dense()


def test_a_tensor_left_behind_is_an_error() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="same device"):
        torch.empty(2, device=DEVICE) + torch.empty(2)
