"""Words in the first block's span, and sentences by the second's: beginnings that grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import (
    CapacityError,
    InvalidArgumentError,
    InvalidTensorError,
    NotRecoveredError,
    VanishingGradientError,
)
from ..update import Update
from .span import Span, chance, extend
from .transformer import Directions, Layout, Parts, locate

__all__ = ["Reader", "Sentences"]

LIMIT = 0.05  # distance to a span beyond which no word is accepted; less where chance would fill it
CHANCE = 1e-2  # words expected inside the limit by chance, beyond which it is lowered
CLEAR = 10.0  # how much farther the nearest refused must lie than the farthest accepted
AMPLIFIED = 1e4  # distance of a true beginning, at most, over the relative noise of the rows
BEAMS = 64  # beginnings of sentences that are kept, for each sentence
LENGTH = 64  # most tokens of a sentence, where nothing says


@dataclass(frozen=True)
class Sentences:
    """What was read in the gradients of a language model.

    Attributes
    ----------
    sequences : tuple of Tensor
        Ids in order, all but each sentence's last, which is a label only; nearest first.
    words : Tensor
        Ids that passed the first test, ascending, each once.
    accepted, refused : float
        Distance of the farthest word or sentence that was accepted, of the nearest refused.
    rank, dimension : int
        Of the first block's span, and of the space that words can lie in.
    by_chance : float
        Words that would pass the first test by chance (:func:`gradinv_edu.tokens.chance`).
    exact : bool
        True only where sentences are as many as the samples, use every word found, and a clear
        gap parts them from the rest.
    """

    sequences: tuple[Tensor, ...]
    words: Tensor
    accepted: float
    refused: float
    rank: int
    dimension: int
    by_chance: float
    exact: bool

    @property
    def ids(self) -> Tensor:
        """The first sentence; InvalidArgumentError where there is none."""
        if not self.sequences:
            raise InvalidArgumentError("No sentence was put together; see words.")
        return self.sequences[0]

    def __str__(self) -> str:
        return (
            f"{len(self.sequences)} sentences of {len(self.words)} different words, exact: "
            f"{'yes' if self.exact else 'no'}; rank {self.rank} of {self.dimension}"
        )


class Reader:
    """One recovery: the arguments are those of :func:`gradinv_edu.tokens.recover_tokens`."""

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        update: Update | Sequence[Update],
        layout: Layout | None,
        length: int | None,
        rank: int | None,
    ) -> None:
        self.updates = [update] if isinstance(update, Update) else [*update]
        models = [model] if isinstance(model, nn.Module) else [*model]
        if len(models) == 1:
            models *= len(self.updates)
        if not self.updates or len(models) != len(self.updates):
            raise InvalidArgumentError(
                f"{len(models)} models and {len(self.updates)} updates: give one model, or one "
                "for each update."
            )
        for one, sent in zip(models, self.updates, strict=True):
            sent.check(one)
        self.rounds = [locate(one, layout) for one in models]
        self.parts = self.rounds[0]
        self.hard = rank if rank is None else checks.whole(rank, "rank")
        self.length = self._length(length)
        self.samples = max(sent.samples for sent in self.updates)

    def _length(self, wanted: int | None) -> int:
        """Most tokens: as the caller says, as positions were trained, or a guess."""
        if wanted is not None:
            return checks.whole(wanted, "length")
        place, most = self.parts.positions, self.parts.length or LENGTH
        sent = None if place is None else self.updates[0].gradients.get(place)
        if sent is not None and bool(sent.any()):
            return int(sent.any(dim=1).nonzero().max()) + 1
        return min(most, LENGTH)

    # --- spans ----------------------------------------------------------------------------------

    def _spans(self, block: int) -> list[tuple[Parts, Directions]]:
        """Rows of each round that has any; VanishingGradientError if all are zero."""
        found, nothing = [], None
        for parts, sent in zip(self.rounds, self.updates, strict=True):
            try:
                rows = parts.rows(sent, block)
            except VanishingGradientError as error:
                nothing = error
                continue
            if rows is not None:
                found.append((parts, rows))
        if not found and nothing is not None:
            raise nothing
        return found

    def _first(self) -> Span:
        """Of the first block, whose inputs stay the same: rounds add up."""
        found = [rows for _, rows in self._spans(0)]
        if not found:
            names = ", ".join(self.parts.projections[0])
            raise InvalidTensorError(
                f"The update holds no gradient of {names}: words are read in what the first "
                "block's projections, or adapters on them, send."
            )
        rows = Directions(torch.cat([r.matrix for r in found]), max(r.noise for r in found))
        return Span(rows, self.hard)

    # --- the two tests --------------------------------------------------------------------------

    def read(self) -> Sentences:
        """Words, then sentences."""
        span = self._first()
        learned = self.parts.positions is not None
        dimension = self._dimension(learned)
        if span.rank >= dimension:
            raise CapacityError(
                f"The first block's gradients span all {dimension} dimensions that words can lie "
                "in, so that every word passes: fewer tokens, a smaller batch or a wider model "
                "could be read; with noise, give the number of distinct inputs as rank."
            )
        places = self.length if learned else 1
        tested = self.parts.vocabulary * places
        limit = LIMIT
        while chance(tested, limit, dimension, span.rank) > CHANCE and limit > 1e-12:
            limit /= 1.2
        sets, accepted, refused = self._words(span, limit, places)
        words = torch.unique(torch.cat(sets)) if sets else torch.empty(0, dtype=torch.long)
        if not len(words):
            raise NotRecoveredError(
                f"No word lies within {limit:.1g} of the first block's span, the nearest at "
                f"{refused:.1g}: the gradient is another model's, or too noisy; see rank."
            )
        sequences, second = self._sentences(sets, learned)
        used = torch.unique(torch.cat(sequences)) if sequences else words[:0]
        by_chance = chance(tested, accepted, dimension, span.rank)
        exact = (
            len(sequences) == self.samples
            and torch.equal(used, words)
            and by_chance <= CHANCE
            and all(far > CLEAR * near for near, far in ((accepted, refused), second))
        )
        accepted, refused = max(accepted, second[0]), min(refused, second[1])
        return Sentences(
            tuple(sequences), words, accepted, refused, span.rank, dimension, by_chance, exact
        )

    def _limit(self, span: Span) -> float:
        """Distance that the noise may cause: true words lie at some tens of it."""
        return min(LIMIT, max(AMPLIFIED * span.noise / float(span.values[0]), 1e-6))

    def _dimension(self, learned: bool) -> int:
        """Of the space that words can lie in: a LayerNorm takes one dimension away."""
        count = min(self.parts.vocabulary, 4 * self.parts.width)
        u = torch.cat([*self.parts.entering(0, torch.arange(count)[:, None])])
        values = torch.linalg.eigvalsh(u.T @ u)
        return int((values > 1e-9 * values[-1]).sum())

    def _words(self, span: Span, limit: float, places: int) -> tuple[list[Tensor], float, float]:
        """Words that pass at each position, up to the first without any.

        The widest gap between distances up to the limit parts them from the rest; what lies at
        the noise counts as equally near.
        """
        far, every = list[Tensor](), torch.arange(self.parts.vocabulary)[:, None]
        for place in range(places):
            streams = self.parts.entering(0, every.expand(-1, place + 1))
            far.append(torch.cat([span.distance(u) for u in streams]))
            if not bool((far[-1] <= limit).any()):
                break
        floor = 10 * span.noise / float(span.values[0])
        sorted_ = torch.cat(far).clamp_min(floor).sort().values
        most = int((sorted_ <= limit).sum())
        if most == 0 or most == len(sorted_):
            return [], 0.0, float(sorted_[0])
        cut = int((sorted_[1 : most + 1] / sorted_[:most]).argmax())
        accepted, refused = float(sorted_[cut]), float(sorted_[cut + 1])
        sets = [(d <= accepted).nonzero()[:, 0].cpu() for d in far]
        first = next((i for i, words in enumerate(sets) if not len(words)), len(sets))
        return sets[:first], accepted, refused

    def _sentences(
        self, sets: list[Tensor], learned: bool
    ) -> tuple[list[Tensor], tuple[float, float]]:
        """Beginnings that the second block's span holds, grown until nothing follows."""
        if learned and all(len(words) == 1 for words in sets):
            return [torch.cat(sets)], (0.0, 1.0)
        blocks = len(self.parts.projections)
        rounds = self._spans(1) if blocks > 1 else []
        spans = [(parts, Span(rows)) for parts, rows in rounds]
        if not spans:
            return [], (0.0, 1.0)
        limit = max(self._limit(span) for _, span in spans)

        def distance(ids: Tensor) -> Tensor:
            far = [
                torch.cat([span.distance(u) for u in parts.entering(1, ids)])
                for parts, span in spans
            ]
            return torch.stack(far).amin(dim=0).cpu()

        most, accepted, refused = BEAMS * self.samples, 0.0, 1.0
        found, done = torch.zeros(1, 0, dtype=torch.long), list[Tensor]()
        for place in range(self.length):
            if not learned or place < len(sets):
                words = sets[place if learned else 0]
                before = found
                found, near, rest, ended = extend(before, words, distance, limit, most)
                done += [*before[ended]] if place else []
                accepted = max(accepted, float(near.max())) if len(near) else accepted
                refused = min(refused, float(rest.min())) if len(rest) else refused
            if not len(found):
                break
        done += [*found]
        if not learned:  # a run of one word looks like its first everywhere
            done = [ids for ids in done if len(ids) == 1 or not bool((ids == ids[0]).all())]
        return done, (accepted, refused)
