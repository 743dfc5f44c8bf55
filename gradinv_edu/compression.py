r"""Fewer bits, and two published defenses of single layers: Soteria and PRECODE."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import jacrev

from . import checks
from .checks import checked
from .dropout import classifier
from .engine.graph import unwatched
from .errors import InvalidArgumentError, InvalidTensorError
from .noise import each_gradient
from .pruning import entries_kept
from .sharing import Update

__all__ = ["Bottleneck", "half", "quantize", "sign", "soteria"]


@checked
def quantize(update: Update, bits: int, generator: torch.Generator | None = None) -> Update:
    r""":math:`g \leftarrow \tfrac{s}{q}\,\operatorname{round}(\tfrac{q}{s}\, g)`.

    :math:`s = \max|g|`, :math:`q = 2^{\text{bits}-1}-1`: every tensor keeps its largest size and,
    for each entry, one of :math:`2q + 1` evenly spaced levels. Implements :eq:`quantization`.

    Parameters
    ----------
    update : Update
        What the client would send.
    bits : int
        Bits for an entry, sign included: 2 to 16; for one bit see :func:`sign`.
    generator : torch.Generator, optional
        If given, an entry is rounded up or down at random, so that its expectation is the entry;
        ``None``: to the nearest level.

    Raises
    ------
    InvalidArgumentError, InvalidTensorError
        If ``bits`` is impossible; if the update holds NaN or infinite entries.

    Notes
    -----
    Source: Alistarh et al. (2017) for random rounding.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise InvalidArgumentError(
            f"bits must be a whole number from 2 to 16, got {bits!r}; for one bit take sign()."
        )
    q: int = 2 ** (bits - 1) - 1

    def rounded(g: Tensor) -> Tensor:
        largest = float(g.abs().max())
        if not largest:
            return g
        level = g / largest * q
        if generator is None:
            return level.round() * (largest / q)
        drawn = torch.rand(g.shape, generator=generator, device=generator.device, dtype=g.dtype)
        return (level + drawn.to(g.device)).floor().clamp(-q, q) * (largest / q)

    return each_gradient(update, rounded)


@checked
def sign(update: Update) -> Update:
    r""":math:`g \leftarrow \operatorname{sign}(g)`: one bit an entry, all sizes gone.

    Parameters
    ----------
    update : Update
        What the client would send.

    Raises
    ------
    InvalidTensorError
        If the update holds NaN or infinite entries.

    Notes
    -----
    Source: Bernstein et al. (2018).
    """
    return each_gradient(update, torch.sign)


@checked
def half(update: Update) -> Update:
    r""":math:`g \leftarrow \operatorname{float16}(g)`: 11 binary digits, nothing under 6e-8.

    Parameters
    ----------
    update : Update
        What the client would send; what comes out says float16.

    Raises
    ------
    InvalidTensorError
        If an entry is larger than float16 can hold, 65504, or is NaN.
    """
    gradients = {
        n: g.to(torch.float16) for n, g in each_gradient(update, lambda g: g).gradients.items()
    }
    for name, g in gradients.items():
        checks.finite(g, f"The float16 gradient of {name}")
    return replace(update, gradients=gradients)


@checked
def soteria(model: nn.Sequential, update: Update, inputs: Tensor, fraction: float) -> Update:
    r""":math:`\partial L/\partial W_{:,i} \leftarrow 0` where :math:`\lVert \partial r_i/\partial x\rVert / |r_i|` is least.

    Columns of the classifier's weight gradient are pruned, one for each feature :math:`r_i` whose
    loss is said to put the reconstruction farthest off; everything else is sent as it is.
    Implements :eq:`soteria-columns`.

    Parameters
    ----------
    model : torch.nn.Sequential
        Of the client; its last dense layer is the one defended.
    update : Update
        What the client would send.
    inputs : Tensor, (1, …)
        The client's sample.
    fraction : float
        Share of the features whose columns are kept, in (0, 1].

    Raises
    ------
    InvalidArgumentError, InvalidTensorError
        If ``fraction`` is not in (0, 1]; if update or input do not fit, or are not finite.
    UnsupportedLayerError
        If the model is not sequential or has no dense layer.

    Notes
    -----
    Source: Sun et al. (2021), whose published code ranks the features by the size of their
    derivative over that of the feature.
    """  # noqa: E501
    update.check(model)
    place = classifier(model)
    if len(checks.finite(inputs, "inputs")) != 1:
        raise InvalidTensorError(
            f"inputs has {len(inputs)} samples; Soteria defends one at a time."
        )
    encoder = unwatched(copy.deepcopy(model[:place])).eval().requires_grad_(False)
    x = inputs.detach().to(next(model.parameters()).dtype)
    with checks.fitting(f"The model does not take inputs of shape {tuple(x.shape[1:])}"):
        r = encoder(x).flatten()
    slopes = jacrev(lambda x: encoder(x).flatten())(x)
    score = slopes.flatten(1).norm(dim=1) / (r.abs() + 0.1)
    pruned = score.argsort()[: len(r) - entries_kept(fraction, len(r))]
    name = f"{[n for n, _ in model.named_children()][place]}.weight"
    defended = update.gradients[name].clone()
    defended[:, pruned] = 0
    return replace(update, gradients={**update.gradients, name: defended})


class Bottleneck(nn.Module):
    r""":math:`\mu, \log\sigma^2 = E h,\ b = \mu + \sigma \odot \epsilon,\ \hat h = D b`: PRECODE.

    A variational bottleneck: the gradient of everything above the draw :math:`\epsilon`
    depends on it. Implements :eq:`variational-bottleneck`.

    Parameters
    ----------
    features, size : int
        Of :math:`h` and :math:`\hat h`, and of :math:`b`.
    generator : torch.Generator, optional
        Of the weights; ``None``: a fixed seed.
    dtype : torch.dtype
        Of the weights.

    Notes
    -----
    Source: Scheliga, Mäder and Seeland (2022). Draws come from torch's global generator, as
    dropout's do, so that :func:`~gradinv_edu.sharing.observe` seeds them.
    """

    def __init__(
        self,
        features: int,
        size: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.whole(features, "features")
        checks.whole(size, "size")
        self.encode = nn.Linear(features, 2 * size, device="meta", dtype=dtype)
        self.decode = nn.Linear(size, features, device="meta", dtype=dtype)
        self.to_empty(device="cpu")  # torch's own first weights would move the global generator
        source = torch.Generator().manual_seed(0) if generator is None else generator
        for layer in (self.encode, self.decode):
            for parameter in layer.parameters():
                limit = 1 / math.sqrt(layer.in_features)
                drawn = torch.empty(parameter.shape, dtype=torch.float64, device=source.device)
                parameter.data.copy_(drawn.uniform_(-limit, limit, generator=source))

    def forward(self, h: Tensor) -> Tensor:
        """Draw once and decode: (N, features) to the same."""
        mean, log_variance = self.encode(h).chunk(2, dim=-1)
        drawn: Tensor = self.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        return drawn
