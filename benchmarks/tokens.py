"""Sentences out of the gradients of language models: what chapter 9 draws from.

Usage: python -m benchmarks tokens          (every cell that the data file lacks; resumable)

A cell is a setting and its sentences, pieces of the help texts that ship with Python, read in the
gradient of a tiny GPT that was trained on them; how many came back word for word, and what share
of the words did. The file is written after each cell. The real model's cell is measured where it
is installed.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu import language, tokens
from gradinv_edu.errors import GradientInversionError, MissingExtraError

from .measure import Options

FILE = Path(__file__).parents[1] / "book" / "data" / "tokens.json"
LOSS, SENTENCES, LENGTH, WIDTH = nn.CrossEntropyLoss(), 50, 24, 128
Change = Callable[[Tensor, torch.Generator], Tensor]


@cache
def corpus() -> tuple[Tensor, int]:
    """Ids of a text, and the number of words."""
    text = language.text()[:150_000]
    tokenizer = language.Tokenizer(text)
    return tokenizer.encode(text), len(tokenizer)


@cache
def trained() -> nn.Module:
    """The tiny GPT after 100 steps."""
    ids, words = corpus()
    return language.train(language.gpt(words, WIDTH), ids)


def observed(model: nn.Module, pieces: Tensor, **how: Any) -> gi.Update:
    """What a client sends for sentences."""
    return gi.observe(model, LOSS, pieces[:, :-1], pieces[:, 1:], **how)


def changed(update: gi.Update, change: Change, seed: int) -> gi.Update:
    """The same with every gradient changed."""
    source = torch.Generator().manual_seed(seed)
    return replace(update, gradients={n: change(g, source) for n, g in update.gradients.items()})


def by_rows(update: gi.Update, length: int) -> Tensor:
    """The nearest one-hot rows: an attacker who takes what there is."""
    E, K = (update.gradients[n].double() for n in ("wte.weight", "wpe.weight"))
    best = []
    for cut in (1e-9, 1e-3, 1e-2, 1e-1):  # none knows which is right: the clearest answer
        one_hot = tokens.recover_patches(K[:length], E.T, cut=cut)
        top = one_hot.topk(2, dim=1).values
        best.append((float((top[:, 0] - top[:, 1]).median()), one_hot.argmax(dim=1)))
    return max(best, key=lambda pair: pair[0])[1]


def by_span(model: nn.Module, update: gi.Update, rank: int | None) -> list[Tensor]:
    """Sentences, or none where the attack says so."""
    try:
        return [*tokens.recover_tokens(model, update, rank=rank, length=rank).sequences]
    except GradientInversionError:
        return []


def score(found: list[Tensor], pieces: Tensor) -> tuple[int, float]:
    """Sentences that are whole, and the share of words in their places."""
    whole, share = 0, 0.0
    for true in pieces[:, :-1]:
        same = [float((f == true).double().mean()) for f in found if len(f) == len(true)]
        share += max(same, default=0.0)
        whole += max(same, default=0.0) == 1.0
    return whole, share / len(pieces)


def noise(size: float) -> Change:
    """Gaussian noise of a share of each gradient's own size."""
    return lambda g, s: g + size * g.square().mean().sqrt() * torch.randn(g.shape, generator=s)


def eight_bits(g: Tensor, _: torch.Generator) -> Tensor:
    """256 levels between the largest entries."""
    step = g.abs().max().clamp_min(1e-30) / 127
    return (g / step).round() * step


def half(dtype: torch.dtype) -> Change:
    """Rounded to another type."""
    return lambda g, _: g.to(dtype).to(g.dtype)


def clipped(update: gi.Update) -> gi.Update:
    """To a norm of 0.1."""
    norm = sum(float(g.square().sum()) for g in update.gradients.values()) ** 0.5
    return replace(update, gradients={n: g * 0.1 / norm for n, g in update.gradients.items()})


DEFENSES: dict[str, Callable[[nn.Module, Tensor, int], gi.Update]] = {
    "none": lambda m, p, _: observed(m, p),
    "clipping": lambda m, p, _: clipped(observed(m, p)),
    "bfloat16": lambda m, p, i: changed(observed(m, p), half(torch.bfloat16), i),
    "8 bits": lambda m, p, i: changed(observed(m, p), eight_bits, i),
    "signs": lambda m, p, i: changed(observed(m, p), lambda g, _: g.sign(), i),
    **{
        f"noise {size}": lambda m, p, i, size=size: changed(observed(m, p), noise(size), i)  # type: ignore[misc]
        for size in (0.01, 0.1, 0.3, 1.0)
    },
    "10 steps of SGD": lambda m, p, _: observed(m, p, local_steps=10, learning_rate=0.1),
    "10 steps of Adam": lambda m, p, _: observed(
        m, p, local_steps=10, learning_rate=1e-3, optimizer="adam"
    ),
}


def defense(name: str, frozen: bool) -> dict[str, Any]:
    """Fifty sentences under one defense, embeddings trained or frozen."""
    model, pieces = trained(), language.sentences(corpus()[0], SENTENCES, LENGTH)
    whole, share = 0, 0.0
    exact = name in ("none", "clipping")
    for place, piece in enumerate(pieces):
        update = DEFENSES[name](model, piece[None], place)
        if frozen:
            kept = {n: g for n, g in update.gradients.items() if n not in EMBEDDINGS}
            found = by_span(model, replace(update, gradients=kept), None if exact else LENGTH)
        else:
            found = [by_rows(update, LENGTH)]
        one = score(found, piece[None])
        whole, share = whole + one[0], share + one[1]
    return {"whole": whole, "of": SENTENCES, "words": round(share / SENTENCES, 3)}


EMBEDDINGS = ("wte.weight", "wpe.weight")


def batches(size: int, length: int, frozen: bool = True) -> dict[str, Any]:
    """Batches until fifty sentences or more."""
    model, count = trained(), -(-SENTENCES // size)
    pieces = language.sentences(corpus()[0], count * size, length).split(size)
    whole = said = 0
    for some in pieces:
        update = observed(model, some)
        kept = {n: g for n, g in update.gradients.items() if not frozen or n not in EMBEDDINGS}
        try:
            found = tokens.recover_tokens(model, replace(update, gradients=kept), length=length)
        except GradientInversionError:
            said += size
            continue
        whole += score([*found.sequences], some)[0]
        said += 0 if found.exact else size
    return {"whole": whole, "of": count * size, "unsure": said}


def lora(rank: int, rounds: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Twenty sentences, each trained on alone for some rounds of one SGD step of rate 3."""
    base = copy.deepcopy(trained()).to(dtype)
    pieces = language.sentences(corpus()[0], 20, length)
    whole = 0
    for place, piece in enumerate(pieces):
        source = torch.Generator().manual_seed(place)
        net, models, updates = language.adapted(base, rank, generator=source), [], []
        for _ in range(rounds):
            net, update = copy.deepcopy(net), observed(net, piece[None])
            models, updates = [*models, net], [*updates, update]
            net = copy.deepcopy(net)
            with torch.no_grad():
                for name, g in update.gradients.items():
                    net.get_parameter(name).sub_(3.0 * g)
        try:
            found = tokens.recover_tokens(models[1:], updates[1:], length=length)
            whole += any(torch.equal(ids, piece[:-1]) for ids in found.sequences)
        except GradientInversionError:
            pass
    predicted = length <= tokens.adapter_capacity(rank, 2, rounds, WIDTH)
    return {"whole": whole, "of": 20, "predicted": predicted}


PRIVATE = (
    "Patient Anna Keller, born 3 March 1961, was admitted with chest pain.",
    "Please wire 4,200 euros to my landlord before Friday.",
    "The biopsy of the left lung is positive; tell nobody yet.",
    "My password for the clinic portal is blue-Heron-77.",
    "I have not paid the tax on the house in Lisbon.",
    "Meet me at the back door of the bakery at half past nine.",
    "Our merger with Halvorsen will be announced on Tuesday.",
    "She asked me to keep the pregnancy quiet until August.",
    "The spare key is under the third flower pot.",
    "He failed the drug test twice, so they let him go.",
)


def real() -> dict[str, Any]:
    """Ten private sentences through SmolLM2, one gradient each."""
    model, tokenizer = language.smollm2()
    whole, began, near, far = 0, time.perf_counter(), 0.0, 1.0
    for sentence in PRIVATE:
        ids = torch.tensor([tokenizer.encode(sentence + "\n").ids])
        found = tokens.recover_tokens(model, observed(model, ids))
        right = found.exact and tokenizer.decode(found.ids.tolist()) == sentence
        whole += right
        print(right, found, f"{found.accepted:.1e} {found.refused:.1e}", flush=True)
        near, far = max(near, found.accepted), min(far, found.refused)
    seconds = round((time.perf_counter() - began) / len(PRIVATE), 1)
    return {"whole": whole, "of": len(PRIVATE), "seconds": seconds, "near": near, "far": far}


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Every cell by its key."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in DEFENSES:
        found[f"defense/{name}/trained"] = lambda name=name: defense(name, False)  # type: ignore[misc]
        found[f"defense/{name}/frozen"] = lambda name=name: defense(name, True)  # type: ignore[misc]
    for size, length in ((1, 24), (4, 24), (8, 15), (12, 15)):
        found[f"batch/{size}/{length}"] = lambda s=size, n=length: batches(s, n)  # type: ignore[misc]
    for length in (64, 126, 127, 160):
        found[f"length/{length}"] = lambda n=length: batches(1, n, False)  # type: ignore[misc]
    for dtype in (torch.float64, torch.float32):
        for rank in (4, 8, 16):
            for rounds in (2, 3) if dtype == torch.float64 else (2,):
                capacity = tokens.adapter_capacity(rank, 2, rounds, WIDTH)
                for length in (capacity, capacity + 1):
                    key = f"lora/{str(dtype)[6:]}/{rank}/{rounds}/{length}"
                    found[key] = lambda r=rank, k=rounds, n=length, d=dtype: lora(r, k, n, d)  # type: ignore[misc]
    found["real/smollm2"] = real
    return found


def load() -> dict[str, Any]:
    """The stored cells."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def measure(options: Options) -> int:
    """Measure what is missing."""
    for key, cell in cells().items():
        if options.only not in key or (key in load() and not options.again):
            continue
        try:
            found = cell()
        except MissingExtraError as error:
            print(f"{key}: {error}")
            continue
        print(key, found, flush=True)
        stored = {**load(), key: found}
        FILE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0
