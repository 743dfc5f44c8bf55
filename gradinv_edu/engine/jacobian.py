"""How the whole gradient changes with the input: the rows of its Jacobian, or their rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from .. import checks
from ..errors import UnsupportedLayerError, UnsupportedLossError
from .graph import in_float64
from .krylov import Progress
from .solve import draw

__all__ = ["GAP", "WholeGradient", "forked_randomness", "numerical_rank"]

ENTRIES = 3e7  # of a Jacobian that is written out
GAP = 1e-9  # singular values of it below this share of the largest count as zero


class WholeGradient:
    """The gradient of a loss as a function of the input, each parameter's weighted by its size.

    Parameters
    ----------
    model : nn.Module
        Evaluated on a float64 copy in eval mode.
    x : Tensor
        ``(1, *input_shape)``: where.
    loss : nn.Module, optional
        By default cross-entropy, or the logistic loss for one output.
    targets : Tensor, optional
        By default random.
    generator : torch.Generator
        Of all that is random.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        loss: nn.Module | None,
        targets: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self.model = in_float64(model).eval()
        for module in self.model.modules():
            if type(module) is nn.Hardsigmoid:  # torch has no second derivative of its own
                module.forward = lambda z: nn.functional.relu6(z + 3) / 6  # type: ignore[assignment]
        self.weights = {n: p.detach() for n, p in self.model.named_parameters()}
        if not self.weights:
            raise UnsupportedLayerError("The model has no parameters, so it sends no gradient.")
        self.generator, self.x = generator, x.to(next(iter(self.weights.values())).device)
        self.parameters = sum(p.numel() for p in self.weights.values())
        refusal = f"The model does not take inputs of shape {tuple(self.x.shape[1:])}"
        with checks.fitting(refusal), torch.no_grad():
            output: Tensor = self.model(self.x)
        self.loss, self.targets = _loss(output, loss, targets, generator)
        sizes = {n: float(g.norm()) for n, g in grad(self.value)(self.weights, self.x).items()}
        self.scale = {n: 1 / s if s > 0 else 0.0 for n, s in sizes.items()}
        self.written = self.parameters * self.x.numel() <= ENTRIES

    def value(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Loss."""
        value: Tensor = self.loss(functional_call(self.model, weights, (x,)), self.targets)
        return value

    def rows(self, progress: Progress | None = None) -> Tensor:
        """The Jacobian where it is small; else as many random combinations of rows as have rank."""
        if self.written:
            return self.columns().T
        n, rows, wanted = self.x.numel(), self.x.new_zeros(0, self.x.numel()), 64
        while True:
            rows = torch.cat([rows, self._combinations(min(wanted, n + 8) - len(rows))])
            if progress is not None:
                progress(len(rows), 0.0)
            if numerical_rank(rows) < len(rows) or len(rows) >= n + 8:
                return rows
            wanted *= 2

    def columns(self, weighted: bool = True) -> Tensor:
        """The Jacobian itself, a row for each entry of the input: forward over reverse."""

        def gradient(x: Tensor) -> Tensor:
            found = grad(self.value)(self.weights, x)
            scale = self.scale if weighted else dict.fromkeys(self.scale, 1.0)
            return torch.cat([g.flatten() * scale[n] for n, g in found.items()])

        def push(tangent: Tensor) -> Tensor:
            column: Tensor = jvp(gradient, (self.x,), (tangent.reshape(self.x.shape),))[1]
            return column

        identity = torch.eye(self.x.numel(), dtype=self.x.dtype, device=self.x.device)
        return torch.cat([vmap(push)(part) for part in torch.split(identity, 64)])

    def _combinations(self, count: int) -> Tensor:
        size = max(1, min(32, int(1e7 / self.parameters)))
        parts = [min(size, count - done) for done in range(0, count, size)]
        return torch.cat([self._combined(part) for part in parts])

    def _combined(self, count: int) -> Tensor:
        directions = {
            n: self.scale[n]
            * torch.randn(count, *w.shape, generator=self.generator, dtype=w.dtype).to(w.device)
            for n, w in self.weights.items()
        }

        def row(direction: dict[str, Tensor]) -> Tensor:
            def along(x: Tensor) -> Tensor:
                slope: Tensor = jvp(lambda w: self.value(w, x), (self.weights,), (direction,))[1]
                return slope

            pulled: Tensor = grad(along)(self.x)
            return pulled.flatten()

        combined: Tensor = vmap(row)(directions)
        return combined


def numerical_rank(rows: Tensor) -> int:
    """Singular values above ``GAP`` times the largest."""
    values = torch.linalg.svdvals(rows)
    return int((values > GAP * values.max()).sum())


@contextmanager
def forked_randomness() -> Iterator[None]:
    """A global generator of its own, and quiet about what torch's own rules deprecate."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        torch.manual_seed(0)
        yield


def _loss(
    output: Tensor, loss: nn.Module | None, targets: Tensor | None, generator: torch.Generator
) -> tuple[nn.Module, Tensor]:
    single = output.numel() == 1
    chosen = loss or (nn.BCEWithLogitsLoss() if single else nn.CrossEntropyLoss())
    if type(chosen) is nn.MSELoss and chosen.reduction in ("mean", "sum"):
        chosen = _SquaredError(chosen.reduction)
    if targets is None and isinstance(chosen, nn.CrossEntropyLoss):
        targets = torch.randint(output.shape[-1], (1,), generator=generator)
    elif targets is None:
        targets = (draw(output, generator) > 0).to(output.dtype)
    targets = targets.to(output.device)
    given = f"outputs {tuple(output.shape)} with targets {tuple(targets.shape)}, {targets.dtype}"
    with checks.fitting(f"The loss does not take {given}"):
        value = chosen(output, targets)
    if value.dim():
        raise UnsupportedLossError(
            f"The loss gives {tuple(value.shape)}, not one number: use reduction='mean' or 'sum'."
        )
    return chosen, targets


class _SquaredError(nn.Module):
    """``nn.MSELoss`` in operations whose forward-mode rules torch has."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        square = (output - targets).square()
        return square.sum() if self.reduction == "sum" else square.mean()
