"""Where the parts of a language model lie, and what enters its blocks for words of one's choice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from ..checks import checked
from ..errors import UnsupportedLayerError, VanishingGradientError
from ..update import Update
from .low_rank import machine_epsilon

__all__ = ["GPT2", "LAYOUTS", "LLAMA", "Directions", "Layout", "Parts", "Reached", "locate"]

CHUNK = 2**22  # entries of a stream that are computed at a time


@dataclass(frozen=True)
class Layout:
    """Where a family of language models keeps its parts: the ends of their names.

    A model of another family needs one of its own, and nothing else:
    ``Layout("tok_embeddings", None, "layers.{}", ("attention.wq", "attention.wk"))``.

    Attributes
    ----------
    embedding : str
        The ``nn.Embedding`` of the words.
    positions : str or None
        The ``nn.Embedding`` of learned positions, if there is one.
    blocks : str
        A block, with ``{}`` for its number.
    projections : tuple of str
        Layers in a block that read the normalised stream: those that exist are taken.
    """

    embedding: str
    positions: str | None
    blocks: str
    projections: tuple[str, ...]


SEPARATE = ("q_proj", "k_proj", "v_proj")
GPT2 = Layout("wte", "wpe", "h.{}", ("attn.c_attn", *(f"attn.{p}" for p in SEPARATE)))
LLAMA = Layout("embed_tokens", None, "layers.{}", tuple(f"self_attn.{p}" for p in SEPARATE))
LAYOUTS = {"GPT-2": GPT2, "Llama": LLAMA}


@dataclass(frozen=True)
class Directions:
    """Gradient rows that lie in the span of what entered a block, each matrix of norm 1.

    ``matrix`` is ``(m, d)``, float64; ``noise`` its largest singular value that rounding explains.
    """

    matrix: Tensor
    noise: float


@dataclass(frozen=True)
class Parts:
    """A model with its parts found.

    Attributes
    ----------
    model : nn.Module
        In eval mode.
    embedding, positions : str, str or None
        Names of their weights.
    projections : tuple of tuple of str
        Of each block.
    tied : bool
        Whether the embedding's weight serves another layer as well: the head.
    """

    model: nn.Module
    embedding: str
    positions: str | None
    projections: tuple[tuple[str, ...], ...]
    tied: bool

    @property
    def vocabulary(self) -> int:
        """Number of words."""
        return len(self.model.get_parameter(self.embedding))

    @property
    def width(self) -> int:
        """Entries of the stream at each position, d."""
        return self.model.get_parameter(self.embedding).shape[1]

    @property
    def length(self) -> int | None:
        """Most positions that there are; ``None`` where they are not learned."""
        return None if self.positions is None else len(self.model.get_parameter(self.positions))

    def entering(self, block: int, ids: Tensor) -> Iterator[Tensor]:
        """What enters a block's projections at the last position of ``ids``, ``(N, T)``.

        Some sentences at a time, ``(n, d)``, float64; what lies above is not computed.
        """
        device = self.model.get_parameter(self.embedding).device
        size = max(1, CHUNK // (ids.shape[1] * self.width))
        reader = self.model.get_submodule(self.projections[block][0])

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise Reached(inputs[0][:, -1].double())

        hook = reader.register_forward_pre_hook(stop)
        try:
            for some in torch.split(ids.to(device), size):
                try:
                    with torch.no_grad(), checks.fitting(f"The model does not take {ids.shape}"):
                        self.model(some)
                    raise UnsupportedLayerError(
                        f"The forward pass does not come to {self.projections[block][0]}: describe "
                        "the model with layout=Layout(embedding, positions, blocks, projections)."
                    )
                except Reached as reached:
                    yield reached.stream
        finally:
            hook.remove()

    def rows(self, update: Update, block: int) -> Directions | None:
        """Rows that a block's projections, or the adapters on them, sent; ``None`` if none did.

        VanishingGradientError if all are zero.
        """
        found, noises, names = [], [], []
        for name in self.projections[block]:
            for inner, layer in self.model.get_submodule(name).named_modules():
                place = f"{name}.{inner}.weight" if inner else f"{name}.weight"
                sent = update.gradients.get(place)
                turned = _reads(layer, self.width)
                if sent is None or turned is None:
                    continue
                names.append(place)
                G = (sent.T if turned else sent).double()
                size = float(G.norm())
                if size > 0:
                    found.append(G / size)
                    noises.append(self._noise(update, place, sent) / size)
        if names and not found:
            raise VanishingGradientError(
                f"The gradients of {', '.join(names)} are zero. Adapters begin with B = 0, and in "
                "their first round A has no gradient: give the update of a later round."
            )
        if not found:
            return None
        matrix = torch.cat(found)
        eps = max(machine_epsilon(update.gradients[place]) for place in names)
        return Directions(
            matrix, max(eps * float(torch.linalg.matrix_norm(matrix, 2)), *noises, 0.0)
        )

    def _noise(self, update: Update, name: str, sent: Tensor) -> float:
        """Singular value of the rounding in a difference of weights, divided by the rate."""
        if update.learning_rate is None:
            return 0.0
        weight = self.model.get_parameter(name).detach()
        rms = float(weight.double().square().mean().sqrt())
        entry = torch.finfo(weight.dtype).eps / 4 * rms / update.learning_rate
        return float(entry * sum(side**0.5 for side in sent.shape))


class Reached(Exception):
    """Not an error: the place where to stop."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


def _reads(layer: nn.Module, width: int) -> bool | None:
    """Whether a layer that reads the stream keeps its weight turned; ``None`` if it reads none."""
    if isinstance(layer, nn.Linear):
        return False if layer.in_features == width else None
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "Conv1D" and weight is not None:  # GPT-2's in transformers
        return True
    return None


@checked
def locate(model: nn.Module, layout: Layout | None = None) -> Parts:
    """Find a model's parts, by a layout or by the first of :data:`LAYOUTS` that fits.

    UnsupportedLayerError if none does; the message says how to describe the model.
    """
    names = dict(model.named_modules())
    for tried in [layout] if layout is not None else LAYOUTS.values():
        embedding = _ending(names, tried.embedding)
        blocks = list[tuple[str, ...]]()
        while found := [
            name
            for p in tried.projections
            if (name := _ending(names, f"{tried.blocks.format(len(blocks))}.{p}")) is not None
        ]:
            blocks.append(tuple(found))
        if embedding is None or not blocks or not isinstance(names[embedding], nn.Embedding):
            continue
        positions = None if tried.positions is None else _ending(names, tried.positions)
        if tried.positions is not None and positions is None:
            continue
        weight = f"{embedding}.weight"
        shared = model.get_parameter(weight)
        tied = sum(p is shared for _, p in model.named_parameters(remove_duplicate=False)) > 1
        own = copy.deepcopy(model).eval() if model.training else model
        place = None if positions is None else f"{positions}.weight"
        return Parts(own, weight, place, tuple(blocks), tied)
    wanted = "the layout given" if layout is not None else f"the layouts of {', '.join(LAYOUTS)}"
    raise UnsupportedLayerError(
        f"No embedding with blocks above it was found in {type(model).__name__} by {wanted}: say "
        "where they lie, with layout=Layout(embedding, positions, blocks, projections)."
    )


def _ending(names: dict[str, nn.Module], end: str) -> str | None:
    """The first name that is ``end``, or ends in it."""
    return next((n for n in names if n == end or n.endswith("." + end)), None)
