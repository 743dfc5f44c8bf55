"""Checks of the exercises to chapter 9, tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .verdict import Mistakes, Student, ask, demand, each, expect, normal, refuse, right


def _tokens(seed: int, tokens: int, width: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients behind a LayerNorm, a class token first, and what was embedded."""
    K = normal(seed, tokens + 1, width)
    K = K - K.mean(dim=1, keepdim=True)
    X = normal(seed + 1, tokens, entries)
    return K, K[1:].T @ X, X


def _solved(K: Tensor, G: Tensor) -> Tensor:
    return torch.linalg.pinv(K.T) @ G


class ReadPatches(Mistakes, of="09-patches", own=("gradinv_edu.tokens.recover_patches",)):
    def class_token_kept(position_gradient, patch_gradient):
        """One row too many: the class token has a position, and no patch."""
        return _solved(position_gradient, patch_gradient)

    def last_patch_dropped(position_gradient, patch_gradient):
        """You left out the last position. The class token stands at the other end."""
        return _solved(position_gradient[:-1], patch_gradient)

    def multiplied_not_solved(position_gradient, patch_gradient):
        """You multiplied by K. That gives mixtures of patches: the system must be solved."""
        return position_gradient[1:] @ patch_gradient

    def each_row_by_itself(position_gradient, patch_gradient):
        """You divided as for one neuron, token by token. The tokens' gradients are not orthogonal,
        so each row must give room to the others."""
        K = position_gradient[1:]
        return (K @ patch_gradient) / K.square().sum(dim=1, keepdim=True)

    def turned(position_gradient, patch_gradient):
        """The answer is turned: one row for each patch is wanted."""
        return _solved(position_gradient[1:], patch_gradient).T


def check_read_patches(read_patches: Student, seed: int = 1, tokens: int = 6) -> None:
    """Check 9.1: patches, and words, from a position embedding's gradient."""
    for entries in (5, 9):
        K, G, X = _tokens(seed + entries, tokens, 12, entries)
        case = f"of {entries} numbers each"
        expect("09-patches", read_patches, (K, G), X, "the patches", case, tolerance=1e-7)
    K, _, _ = _tokens(seed, tokens, 12, 3)
    words = torch.randint(20, (tokens,), generator=torch.Generator().manual_seed(seed))
    one_hot = torch.nn.functional.one_hot(words, 20).double()
    given = (K, K[1:].T @ one_hot)
    expect("09-patches", read_patches, given, one_hot, "the one-hot words", tolerance=1e-7)
    right("A position is a bias for each token, and a word is a patch with one entry.")


def _basis(rows: Tensor) -> Tensor:
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    return Vh[: int((1e-10 * S[0] < S).sum())]


class Distances(Mistakes, of="09-span"):
    def length_left_in(rows, candidates):
        """Long candidates get long distances: divide by each candidate's length."""
        V = _basis(rows)
        return (candidates - candidates @ V.T @ V).norm(dim=1)

    def share_inside(rows, candidates):
        """That is the share *inside* the span: it is one where the distance is zero."""
        V = _basis(rows)
        return (candidates @ V.T).norm(dim=1) / candidates.norm(dim=1)

    def squared(rows, candidates):
        """You left the distance squared."""
        V = _basis(rows)
        rest = candidates - candidates @ V.T @ V
        return rest.square().sum(dim=1) / candidates.square().sum(dim=1)

    def rows_taken_for_a_basis(rows, candidates):
        """Rows of a gradient are neither orthogonal nor of length one: make a basis of their span
        first."""
        rest = candidates - candidates @ rows.T @ rows
        return rest.norm(dim=1) / candidates.norm(dim=1)

    def noise_directions_kept(rows, candidates):
        """There are more rows than dimensions in their span, and you kept directions that the rows
        do not have: look at the singular values."""
        V = torch.linalg.svd(rows, full_matrices=False).Vh
        return (candidates - candidates @ V.T @ V).norm(dim=1) / candidates.norm(dim=1)


def check_distances(distances: Student, seed: int = 5, width: int = 16) -> None:
    """Check 9.2: the share of each candidate outside the span of some rows."""
    for count in (3, width // 2):
        inside = normal(seed + count, count, width)
        rows = normal(seed + 1, 3 * width, count) @ inside
        mixed = normal(seed + 2, 4, count) @ inside
        candidates = torch.cat([mixed, 3 * normal(seed + 3, 5, width)])
        V = _basis(rows)
        rest = candidates - candidates @ V.T @ V
        truth = rest.norm(dim=1) / candidates.norm(dim=1)
        case = f"to a span of {count} dimensions"
        expect("09-span", distances, (rows, candidates), truth, "the distance", case, 1e-7)
    right("Zero for what was mixed into the rows, and for nothing else.")


class RoundsNeeded(Mistakes, of="09-adapters"):
    def rounded_down(inputs, rank, adapters, width):
        """A part of a round's rows may be missing, and then a whole round is: round up."""
        return 0 if inputs > width else 1 + inputs // (rank * adapters)

    def first_round_counted(inputs, rank, adapters, width):
        """You counted the first round. What is B there, and so the gradient of A?"""
        return 0 if inputs > width else math.ceil(inputs / (rank * adapters))

    def one_adapter_only(inputs, rank, adapters, width):
        """Adapters that read the same stream show rows of the same span: their rows add up."""
        return 0 if inputs > width else 1 + math.ceil(inputs / rank)

    def width_forgotten(inputs, rank, adapters, width):
        """A span cannot have more dimensions than the stream: then no number of rounds is
        enough, and the answer is 0."""
        return 1 + math.ceil(inputs / (rank * adapters))

    def one_round_more(inputs, rank, adapters, width):
        """You waited for a row more than there are inputs. As many rows as inputs are enough."""
        return 0 if inputs > width else 2 + inputs // (rank * adapters)


def check_rounds_needed(rounds_needed: Student) -> None:
    """Check 9.3: after how many rounds of LoRA the words come out."""
    cases = [(32, 8, 2, 64), (30, 8, 2, 128), (7, 4, 1, 64), (50, 16, 2, 64), (129, 8, 2, 128)]
    for given in cases:
        inputs, rank, adapters, width = given
        truth = 0 if inputs > width else 1 + math.ceil(inputs / (rank * adapters))
        answer = ask(rounds_needed, *given, case=f"for {inputs} inputs")
        demand(isinstance(answer, int | float), "Return one whole number.")
        if answer == truth:
            continue
        for mistake in Mistakes.KNOWN["09-adapters"]:
            if mistake(*given) == answer:
                refuse(mistake)
        refuse(f"{inputs} inputs, {adapters} adapter(s) of rank {rank}: not {answer} rounds.")
    right("Low rank is a delay, not a bound.")


def _verdict(defense, distinct, width):
    return "yes" if distinct < width and defense != "noise" else "no"


class Readable(Mistakes, of="09-judge"):
    def clipping_believed(defense, distinct, width):
        """Clipping multiplies the whole gradient by one number. Which of the chapter's tests would
        notice?"""
        return "no" if defense == "clipping" else _verdict(defense, distinct, width)

    def freezing_believed(defense, distinct, width):
        """The embedding is not sent. But whose inputs are in the gradients of the first block?"""
        return "no" if defense == "frozen" else _verdict(defense, distinct, width)

    def capacity_forgotten(defense, distinct, width):
        """More distinct inputs than the stream has dimensions: what does their span hold then?"""
        return "no" if defense == "noise" else "yes"

    def full_span_believed(defense, distinct, width):
        """As many inputs as dimensions: then every word lies in the span, and the test says
        nothing."""
        return "yes" if distinct <= width and defense != "noise" else "no"

    def noise_forgotten(defense, distinct, width):
        """Noise as large as the gradient fills every direction: rank and gap are gone."""
        return "yes" if distinct < width else "no"


def check_readable(readable: Student) -> None:
    """Check 9.4: which updates give their words away."""
    cases = (
        ("none", 24, 128, "yes", "One plain sentence is the first thing that this chapter reads."),
        ("clipping", 24, 128, "yes", Readable.clipping_believed),
        ("frozen", 24, 128, "yes", Readable.freezing_believed),
        ("frozen", 900, 128, "no", Readable.capacity_forgotten),
        ("noise", 24, 128, "no", Readable.noise_forgotten),
        ("clipping", 900, 2048, "yes", Readable.clipping_believed),
        ("none", 128, 128, "no", Readable.full_span_believed),
    )
    case = "for {0}, {1} inputs and a width of {2}"
    each(readable, cases, case, options=("yes", "no"))
    right("What protects is a full span or counted noise, not a shorter or a thinner gradient.")
