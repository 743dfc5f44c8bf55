"""What an audit says of a layer and of a network, in words that a person can act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["LayerAudit", "Stop", "Verdict", "conclusion"]

PLACES = "the places of the maxima"
OTHERS = "other attacks, by optimisation with a prior, remain"


class Verdict(StrEnum):
    """What becomes of an input."""

    EXACT = "leaks exactly"
    UP_TO = "leaks up to something hidden"
    SEARCH = "leaks if a search succeeds"
    NOT = "not by this attack"
    UNKNOWN = "unknown"
    UNNEEDED = "not needed"


@dataclass(frozen=True)
class LayerAudit:
    """What one layer's equations can tell of its input, given that the layers above are undone.

    Attributes
    ----------
    name, kind : str
        Of the layer in the model, and its type; ``first+…+last`` where pooling is solved
        together with the layer that feeds it.
    unknowns : int
        Entries of the layer's input.
    weight_equations, gradient_equations : int
        Rows of ``W`` whose right-hand side is known (a ReLU's dead units are masked), rows of
        ``K``.
    rank : int
        Of both sets together; see ``method``.
    method : str
        How the rank was found: ``"closed form"`` (dense layers), ``"svd"``, ``"inertia"`` (both
        exact), ``"law"`` (:func:`gradinv_edu.rank.rank_law`), ``"gradient"`` or ``"weight"`` (these
        constraints alone determine everything), ``"blind"`` (the weight gradient alone gives the
        input, and ``k`` too: nothing from above is needed), ``"iterative"`` (full rank by a
        matrix-free test), ``"at most"`` (an upper bound below the unknowns), ``"estimate"``,
        ``"undecided"`` (an upper bound: not tested, or the test's budget was spent).
    recoverable : bool or None
        Whether the layer's own equations determine its input; ``None`` where undecided, or where
        something must be found first (``given``).
    together : tuple of str
        Layers with which it is determined, if it is not alone.
    settled : bool
        Whether an answer that takes iterations of its own, of a block or together with other
        layers, was found at the sample.
    needed : bool
        Whether the recursion passes here at all: it begins at the lowest dense layer with a bias.
    hidden : str
        What stays open of an input that is otherwise determined, such as one factor a sample.
    given : str
        What a search must find before these equations can be written down, such as the places of
        the maxima of a pooling above.
    block : str
        Block of branches in which the layer lies, counted as if all else in it were undone.
    unsettled : int
        Units of the activation above of which no other equation tells which of two inputs they
        had (:func:`gradinv_edu.engine.preimages.confirmed`).
    """

    name: str
    kind: str
    unknowns: int
    weight_equations: int
    gradient_equations: int
    rank: int
    method: str
    recoverable: bool | None
    together: tuple[str, ...] = ()
    settled: bool = False
    needed: bool = True
    hidden: str = ""
    given: str = ""
    block: str = ""
    unsettled: int = 0

    @classmethod
    def counted(
        cls, name: str, kind: str, unknowns: int, weight: int, gradient: int, *, needed: bool
    ) -> LayerAudit:
        """By its equations' number alone: fewer than unknowns decide at once."""
        few = weight + gradient < unknowns
        rank = min(weight + gradient, unknowns)
        method, recoverable = ("at most", False) if few else ("undecided", None)
        return cls(name, kind, unknowns, weight, gradient, rank, method, recoverable, needed=needed)

    @property
    def rank_index(self) -> int:
        """``rank − unknowns``: zero where the input is determined, else minus what is missing."""
        return self.rank - self.unknowns

    @property
    def deficiency(self) -> int:
        """Dimensions of the input that the layer's own equations leave open."""
        return self.unknowns - self.rank

    @property
    def equations(self) -> int:
        """Of both kinds."""
        return self.weight_equations + self.gradient_equations

    @property
    def known(self) -> bool:
        """Whether its input is determined, by itself or with other layers."""
        return bool(self.recoverable) or self.settled or bool(self.together)

    @property
    def verdict(self) -> Verdict:
        """One of six words."""
        if not self.needed:
            return Verdict.UNNEEDED
        if self.known:
            return Verdict.UP_TO if self.hidden else Verdict.EXACT
        if self.recoverable is False:
            return Verdict.NOT
        return Verdict.SEARCH if self.given and self.method != "undecided" else Verdict.UNKNOWN

    @property
    def reason(self) -> str:
        """One line: why."""
        if not self.needed:
            return "not needed"
        hidden = f", up to {self.hidden}" if self.hidden else ""
        if self.together:
            return f"determined together with {', '.join(self.together)}{hidden}"
        if self.known:
            return f"determined{hidden}"
        if self.unsettled:
            return f"{self.unsettled} units above may have either of two inputs"
        if self.verdict is Verdict.SEARCH:
            return f"determined if {self.given} are found"
        if self.recoverable is None:
            return "undecided: enough equations, rank not tested"
        bound = "at least " if self.method == "at most" else ""
        about = "about " if self.method == "estimate" else ""
        return f"{bound}{about}{self.deficiency} dimensions stay open"


@dataclass(frozen=True)
class Stop:
    """A place that the recursion does not undo, and why; below, layers are counted as if it did.

    Attributes
    ----------
    name, kind : str
        Of the layer or operation.
    reason : str
        What it does to its input.
    verdict : Verdict
        NOT where nothing is known that undoes it, SEARCH where a search may, UNKNOWN where it was
        not tested.
    """

    name: str
    kind: str
    reason: str
    verdict: Verdict = Verdict.NOT


def conclusion(
    layers: Sequence[LayerAudit], stops: Sequence[Stop], untested: Sequence[str]
) -> tuple[Verdict, str]:
    """What a network's layers and stops, from the input up, come to; and a sentence on why.

    What the layer at the input lacks decides first, since nothing lies below that could help;
    then what is not undone, what other layers lack, what is not known, what a search must find,
    what is hidden.

    Parameters
    ----------
    layers, stops : sequence
        From the input to the output.
    untested : sequence of str
        Layers whose tests did not come to an end: what they lack, others may still give.
    """
    chain = [a for a in layers if a.needed and not a.block]
    lacking = [a for a in chain if a.verdict is Verdict.NOT and a.name not in untested]
    if lacking and lacking[0] is chain[0]:
        return Verdict.NOT, _lack(lacking[0])
    for stop in stops:
        if stop.verdict is Verdict.NOT:
            return Verdict.NOT, (
                f"Not by this attack: {stop.name} ({stop.kind}) is not undone, because "
                f"{stop.reason.rstrip('.')}. The layers below are counted as if it had been; "
                f"{OTHERS}."
            )
    if lacking:
        return Verdict.NOT, _lack(lacking[0])
    open_ = [a.name for a in chain if a.verdict is Verdict.UNKNOWN or a.name in untested]
    open_ += [stop.name for stop in stops if stop.verdict is Verdict.UNKNOWN]
    inside = dict.fromkeys(a.block for a in layers if a.block and a.needed and not a.known)
    open_ += [name for name in inside if name not in open_]
    if open_:
        return Verdict.UNKNOWN, (
            f"Unknown: counting excludes no leak at {_listed(open_)}, and no test has shown one; "
            f"{OTHERS}."
        )
    hidden = [a.hidden for a in chain if a.hidden]
    searched = [a for a in chain if a.verdict is Verdict.SEARCH]
    sought = [stop.name for stop in stops if stop.verdict is Verdict.SEARCH]
    if searched or sought:
        counts = "".join(
            f"; {a.name} then has {a.equations} equations for {a.unknowns} unknowns, and enough "
            "rank"
            for a in searched[:1]
        )
        up_to = f", up to {hidden[0]}" if hidden else ""
        return Verdict.SEARCH, (
            "The gradient of one sample gives its input away if a search finds "
            f"{PLACES} of {_listed(sought)}{up_to}{counts}."
        )
    if hidden:
        return Verdict.UP_TO, (
            f"The gradient of one sample gives its input away up to {hidden[0]}."
        )
    return Verdict.EXACT, "The gradient of one sample gives its input away exactly."


def _lack(layer: LayerAudit) -> str:
    if layer.unsettled:
        return (
            f"Not by this attack: of {layer.unsettled} units above {layer.name} no other equation "
            f"tells which of two inputs they had; {OTHERS}."
        )
    most = "at most " if layer.method == "at most" else ""
    about = "about " if layer.method == "estimate" else ""
    even = f" even with {layer.given} known" if layer.given else ""
    least = "at least " if most else about
    return (
        f"Not by this attack: the input of {layer.name} has {layer.unknowns} unknowns, and its "
        f"{layer.equations} equations have{even} a rank of {most}{about}{layer.rank}, so that "
        f"{least}{layer.deficiency} dimensions stay open whatever the layers above tell; {OTHERS}."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
