"""Vision transformers: a patch embedding with learned positions, found by how gradients pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import checks
from ..errors import InvalidTensorError, NotRecoveredError
from .jacobian import forked_randomness
from .reports import LayerReport
from .solve import Solution, Truncated
from .transformer import Reached

__all__ = ["PatchEmbedding", "find"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PatchEmbedding:
    """A convolution without overlap whose outputs get a learned position each.

    Attributes
    ----------
    name : str
        Of the convolution.
    conv : nn.Conv2d
        Itself.
    positions : str
        Of the parameter that is added.
    rows : Tensor
        Which of its rows belongs to each patch; the others are class or register tokens'.
    input_shape : tuple of int
        Of one picture.
    """

    name: str
    conv: nn.Conv2d
    positions: str
    rows: Tensor
    input_shape: Shape

    @property
    def bias(self) -> str:
        """Of the convolution's bias, where it has one; its gradient checks the answer."""
        return f"{self.name}.bias"

    @property
    def tokens(self) -> int:
        """Number of patches, T."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """Entries of a token, D."""
        return self.conv.out_channels

    @property
    def unknowns(self) -> int:
        """Entries of the picture."""
        return math.prod(self.input_shape)

    @property
    def rank(self) -> int:
        """Of the equations for a picture in general: a norm above leaves D − 1 dimensions."""
        return min(self.tokens, self.width - 1) * (self.unknowns // self.tokens)

    def solve(
        self, gradients: Mapping[str, Tensor], batch_size: int, eps: float
    ) -> tuple[Tensor, LayerReport]:
        """The picture, ``(1, *input_shape)``, from what was sent, and the account of it."""
        weight = f"{self.name}.weight"
        for name in (self.positions, weight):
            if name not in gradients:
                raise InvalidTensorError(
                    f"The update lacks {name}: patches are read in the gradients of the position "
                    "embedding and of the patch embedding; where positions are fixed, see "
                    "gradinv_edu.tokens.patches_in_span."
                )
        if batch_size > 1:
            raise NotRecoveredError(
                f"A position embedding is shared by all {batch_size} pictures of a batch, so its "
                "gradient is a sum over them and gives none: only batch_size=1 can be read."
            )
        sent = gradients[self.positions].reshape(-1, self.width)
        K = checks.not_all_zero(
            sent[self.rows.to(sent.device)], f"The gradient of {self.positions}"
        )
        G = gradients[weight].flatten(1)
        told = Truncated.of(K.T, 4 * eps)
        X = told.solve(G)
        residual = float((K.T @ X - G).norm() / G.norm().clamp_min(1e-300))
        bias = gradients.get(self.bias)
        if bias is not None:  # adds up k over the patches: a check, if no equation of the picture
            gap = float((K.sum(0) - bias).norm() / K.norm())
            residual = max(residual, gap / math.sqrt(len(K)))
        step = self.conv.kernel_size
        x = functional.fold(X.T[None], self.input_shape[1:], step, stride=step)
        values = told.values[: told.rank]
        open_ = 1 - told.rank / len(K)
        solution = Solution(x, residual, 0, open_, told.smallest, float(values[0]))
        # what is unexplained shows the noise in each of D − T directions, and 1/S what it does to X
        noise = max(residual, eps) / max(self.width - 1 - len(K), 1) ** 0.5
        spread = float((1 / values).norm() * G.norm() / X.norm().clamp_min(1e-300))
        error = noise * spread
        equations = (self.width - 1) * G.shape[1]
        return x, LayerReport(self.name, self.unknowns, equations, solution, error)


def find(model: nn.Module, input_shape: Shape) -> PatchEmbedding | None:
    """The patch embedding of a vision transformer; ``None`` where the model has none.

    Found by the model's own forward pass on a random picture, up to its first norm: a parameter
    belongs to a patch where both get the same gradient.
    """
    places = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    patches = [(n, m) for n, m in places if _tiles(m, input_shape)]
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    if not patches or not norms:
        return None
    name, conv = patches[0]
    outputs, stream = list[Tensor](), list[Tensor]()

    def keep(_: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise Reached(inputs[0])

    hooks = [conv.register_forward_hook(keep)]
    hooks += [norm.register_forward_pre_hook(stop) for norm in norms]
    weights = {n: p for n, p in model.named_parameters() if p.shape[-1:] == (conv.out_channels,)}
    positions = {n: p for n, p in weights.items() if p.dim() in (2, 3) and "weight" not in n}
    source = torch.Generator().manual_seed(0)
    x = torch.rand(1, *input_shape, generator=source).to(conv.weight)
    try:
        with forked_randomness(), torch.enable_grad():
            refusal = f"The model does not take pictures of shape {tuple(input_shape)}"
            with checks.fitting(refusal):
                model(x)
    except Reached as reached:
        stream.append(reached.stream)
    except AssertionError as error:
        raise InvalidTensorError(f"{refusal}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if len(outputs) != 1 or not stream or not stream[0].requires_grad:
        return None
    draw = torch.randn(stream[0].shape, generator=source).to(stream[0])
    asked = [outputs[0], *positions.values()]
    found = torch.autograd.grad(stream[0], asked, draw, allow_unused=True)
    if found[0] is None:
        return None
    k = found[0].flatten(2)[0].T  # (T, D)
    for place, gradient in zip(positions, found[1:], strict=True):
        rows = None if gradient is None else gradient.reshape(-1, conv.out_channels)
        if rows is None or len(rows) < len(k):
            continue
        near = torch.cdist(k.double(), rows.double())
        if float(near.amin(dim=1).max()) <= 1e-6 * float(k.norm()) / math.sqrt(len(k)):
            return PatchEmbedding(name, conv, place, near.argmin(dim=1), tuple(input_shape))
    return None


def _tiles(conv: nn.Conv2d, shape: Shape) -> bool:
    """Whether a convolution cuts pictures of this shape into patches, with none left over."""
    kernel = conv.kernel_size
    plain = conv.stride == kernel and conv.groups == 1 and conv.dilation == (1, 1)
    fits = len(shape) == 3 and shape[0] == conv.in_channels
    unpadded = conv.padding in ((0, 0), 0, "valid")
    divides = fits and all(s % k == 0 for s, k in zip(shape[1:], kernel, strict=True))
    return plain and unpadded and divides and math.prod(kernel) > 1
