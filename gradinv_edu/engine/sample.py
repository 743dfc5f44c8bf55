"""What stands for a client's sample before any is sent: a random one, and the walk set up at it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import UnsupportedLayerError
from . import losses
from .auditing import Auditing, sample_pass
from .graph import trace
from .solve import draw
from .verdicts import Stop
from .walk import Group, head_of, lowest_dense

__all__ = ["begin", "sample", "seeded"]

Shape = tuple[int, ...]


def begin(
    model: nn.Module, x: Tensor, generator: torch.Generator, kind: type[Auditing] = Auditing
) -> tuple[Auditing, str | None, list[str]]:
    """The walk, the name of the layer where it begins, and what its verdict assumes there."""
    steps = trace(model, x.shape[1:])
    if not steps:
        raise UnsupportedLayerError("The model has no layer.")
    device = next((p.device for p in model.parameters()), x.device)
    lowest = lowest_dense(steps, [name for name, _ in model.named_parameters()])
    notes, stops, begins = [], [], lowest
    if lowest is None:
        try:
            begins = head_of(steps)
        except UnsupportedLayerError:
            why = "nothing gives k to begin with: no dense layer with a bias, none before the loss"
            stops = [Stop(steps[-1].name, steps[-1].rule.kind, why)]
        else:
            single = steps[begins].output_shape == (1,)
            open_ = "one output without a bias: a right prediction may have a twin"
            fixed = "no bias: the loss must fix the scale (softmax with three classes or more)"
            notes = [open_ if single else fixed]
    passed = sample_pass(steps, x.to(device), _output_gradient, generator)
    walk = kind(steps, passed, len(steps) - 1 if begins is None else begins, generator)
    blind = next((place for place in range(walk.begins) if walk.starts_at(place)), None)
    if blind is not None:  # whatever stands above
        walk.begins = begins = blind
        notes, stops = [], []
    walk.stops = stops
    return walk, None if begins is None else Group((steps[begins],)).name, notes


def _output_gradient(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Of cross-entropy with a random label; of one output, any number."""
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        return draw(outputs, generator)
    label = torch.randint(outputs.shape[1], (1,), generator=generator)
    rule = losses.rule(nn.CrossEntropyLoss())
    return rule.output_gradient(outputs, label.to(outputs.device))


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator, or a fixed one."""
    return generator or torch.Generator().manual_seed(20200913)


def sample(shape: Shape, inputs: Tensor | None, generator: torch.Generator) -> Tensor:
    """``(1, *shape)``, float64: the sample that is given, or a random one."""
    if inputs is not None:
        return checks.shaped(inputs, "inputs", (1, *shape))
    return torch.rand(1, *shape, generator=generator, dtype=torch.float64)
