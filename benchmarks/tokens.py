"""Sentences out of the gradients of language models: what chapter 9 draws from.

Usage: python -m benchmarks tokens          (every cell that the data file lacks; resumable)

A cell is a setting and its sentences, pieces of the help texts that ship with Python, read in the
gradient of a tiny GPT that was trained on them; how many came back word for word, and what share
of the words did. Patches are twenty crops of photographs through five vision transformers each.
The file is written after each cell. Cells of the real model are measured where it is installed,
those of ``peft`` where that and ``transformers`` are.
"""

from __future__ import annotations

import copy
import itertools
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
from gradinv_edu.engine.files import write_whole
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


# Patches.

TILES, SIDE, PICTURES, SEEDS = 64, 4, 20, 5


@cache
def crops() -> Tensor:
    """Twenty pictures of 32×32, two or three of each photograph."""
    photos = [gi.data.photo(name, size=64) for name in gi.data.PHOTOS]
    corners = ((0, 0), (20, 24), (32, 4))
    return torch.cat([p[..., y : y + 32, x : x + 32] for y, x in corners for p in photos])[
        :PICTURES
    ]


def vit(width: int, seed: int, dropout: float = 0.0) -> nn.Module:
    """A small vision transformer, its head drawn, with 64 patches."""
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = VisionTransformer(32, SIDE, 2, 4, width, 2 * width, dropout, num_classes=10)
        nn.init.normal_(net.heads.head.weight, std=0.02)
    return net.train(bool(dropout))


# What is done to the update, and the noise on an entry that a server would reckon with, as a share
# of the entries' size: after steps, that of the rounded weights whose difference is sent.
Condition = tuple[dict[str, Any], Change | None, float]
CONDITIONS: dict[str, Condition] = {
    "one gradient": ({}, None, 0.0),
    **{f"width {width}": ({"width": width}, None, 0.0) for width in (64, 48, 32)},
    **{f"dropout {p}": ({"dropout": p}, None, 0.0) for p in (0.1, 0.5)},
    **{
        f"{n} steps of SGD": ({"local_steps": n, "learning_rate": 0.1}, None, 1e-5) for n in (3, 20)
    },
    "a step of Adam": ({"local_steps": 1, "learning_rate": 1e-3, "optimizer": "adam"}, None, 1e-4),
    "float16": ({}, half(torch.float16), 3e-4),
    "bfloat16": ({}, half(torch.bfloat16), 2e-3),
    **{f"noise {s:g}": ({}, noise(s), s) for s in (1e-5, 1e-3, 1e-1)},
    **{f"a batch of {n}": ({"batch": n}, None, 0.0) for n in (2, 4)},
}


def through(name: str) -> dict[str, Any]:
    """Decibels of twenty pictures in five networks each, without and with the prior."""
    settings, change, size = CONDITIONS[name]
    how, plain, smooth = dict(settings), list[float](), list[float]()
    batch, dropout, width = how.pop("batch", 1), how.pop("dropout", 0.0), how.pop("width", 128)
    for seed in range(SEEDS):
        net = vit(width, seed, dropout)
        for i in range(PICTURES):
            x, source = crops().roll(-i, 0)[:batch], torch.Generator().manual_seed(i)
            update = gi.observe(net, LOSS, x, torch.arange(batch), generator=source, **how)
            update = changed(update, change, i) if change else update
            K = update.gradients["encoder.pos_embedding"][0].double()
            G = update.gradients["conv_proj.weight"].flatten(1).double()
            # noise is as large as the whole tensor says, and the class token's row is the loudest
            entry = size * float((K if "noise" in name else K[1:]).square().mean().sqrt())
            K = K[1:]
            far = entry * (TILES**0.5 + width**0.5) / float(torch.linalg.matrix_norm(K, 2))
            plain.append(_decibels(tokens.recover_patches(K, G, cut=max(far, 1e-6)), x))
            smooth.append(_decibels(by_prior(K, G, size, entry), x))
    return {"plain": _spread(plain), "smooth": _spread(smooth), "of": len(plain)}


@cache
def alike(reach: float = 8.0) -> Tensor:
    """A root of the covariance of pixels, in the order of the patches: near ones are alike."""
    grid = torch.cartesian_prod(torch.arange(32), torch.arange(32)).double()
    order = nn.functional.unfold(
        torch.arange(1024).reshape(1, 1, 32, 32).double(), SIDE, stride=SIDE
    )
    grid = grid[order[0].T.long().flatten()]
    return torch.linalg.cholesky(0.06 * torch.exp(-torch.cdist(grid, grid) / reach))


def by_prior(K: Tensor, G: Tensor, size: float, entry: float) -> Tensor:
    """``Kᵀ X = G`` by the mean of a Gaussian: of grey pictures, smooth as photographs are."""
    root, count = alike(), SIDE**2
    entry += 1e-7 * float(K.square().mean().sqrt())
    noise_ = (size + 1e-7) ** 2 * float(G.square().mean()) + 0.3 * TILES * entry**2
    told = root.T @ (K @ K.T @ root.unflatten(0, (TILES, -1)).flatten(1)).reshape(root.shape)
    told += max(noise_, 1e-12 * float(told.diagonal().mean())) * torch.eye(len(root))
    sent = G.unflatten(1, (-1, count)).transpose(1, 2)  # D, pixels, colours
    rest = (sent - 0.5 * K.sum(dim=0)[:, None, None]).flatten(1)
    b = (K @ rest).unflatten(1, (count, -1)).flatten(0, 1)
    x = 0.5 + root @ torch.cholesky_solve(root.T @ b, torch.linalg.cholesky(told))
    return x.unflatten(0, (TILES, count)).transpose(1, 2).flatten(1)


def _decibels(X: Tensor, pictures: Tensor) -> float:
    """Against the nearest of what was sent."""
    picture = nn.functional.fold(X.T[None].clamp(0, 1), 32, SIDE, stride=SIDE)
    return max(float(gi.metrics.psnr(picture, x[None].double())) for x in pictures)


def _spread(values: list[float]) -> list[float]:
    """The tenth, the half and the ninetieth of a hundred."""
    return [
        round(v, 1) for v in torch.tensor(values).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    ]


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


def hugging_face() -> tuple[nn.Module, Any]:
    """SmolLM2 as transformers has it, and its tokenizer; logits with the words second."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own, tokenizer = language.smollm2()
    first = own.layers[0]
    attention, norm = first.self_attn, first.input_layernorm
    config = LlamaConfig(
        vocab_size=len(own.embed_tokens.weight), hidden_size=own.embed_tokens.embedding_dim,
        intermediate_size=first.gate_proj.out_features, num_hidden_layers=len(own.layers),
        num_attention_heads=attention.q_proj.out_features // attention.size,
        num_key_value_heads=attention.k_proj.out_features // attention.size,
        rms_norm_eps=norm.eps, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": attention.base},
        tie_word_embeddings=True,
    )  # fmt: skip
    net = LlamaForCausalLM(config)
    weights = dict(own.named_parameters())
    with torch.no_grad():
        for name, weight in net.named_parameters():
            place = name.removeprefix("model.").replace(".mlp.", ".")
            value = weights[place]
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # halves where ours has pairs
                pairs = value.unflatten(0, (-1, attention.size // 2, 2))
                value = pairs.transpose(1, 2).reshape(value.shape)
            weight.copy_(value)
    return net.eval(), tokenizer


class Logits(nn.Module):
    """A model of transformers as ``CrossEntropyLoss`` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """``(N, T)`` ids to ``(N, V, T)`` logits."""
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits.transpose(1, 2)


TEXTS = 20


@cache
def with_peft(rank: int, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """SmolLM2 with LoRA on q and v, as ``peft`` puts it there."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(rank)
    net, tokenizer = hugging_face()
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"])
    return Logits(get_peft_model(net, config)).to(dtype).eval(), tokenizer


def peft(rank: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Twenty texts, each trained on alone: the second of two rounds, words and order."""
    net, tokenizer = with_peft(rank, dtype)
    start = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    ids = torch.tensor(tokenizer.encode(language.text()[:20_000]).ids)
    whole = words = predicted = 0
    for piece in language.sentences(ids, TEXTS, length):
        # positions are rotary: the first block's inputs are as many as the different words
        different = len(piece[:-1].unique())
        predicted += different <= tokens.adapter_capacity(rank, 2, 2, 576)
        update = observed(net, piece[None])
        with torch.no_grad():
            for name, g in update.gradients.items():
                net.get_parameter(name).sub_(0.3 * g / g.norm().clamp_min(1e-30))
        update = observed(net, piece[None])
        try:
            found = tokens.recover_tokens(net, update, length=length)
            whole += any(torch.equal(ids_, piece[:-1]) for ids_ in found.sequences)
            true = set(piece[:-1].tolist())
            words += set(found.words.tolist()) == true
        except GradientInversionError as error:
            print(type(error).__name__, flush=True)
        with torch.no_grad():
            for name, value in start.items():
                net.get_parameter(name).copy_(value)
    return {"whole": whole, "words": words, "of": TEXTS, "predicted": predicted}


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
    for dtype, rank in itertools.product((torch.float32, torch.float64), (4, 8, 16)):
        for length in (2 * rank, 2 * rank + 1):
            key = f"peft/{str(dtype)[6:]}/{rank}/{length}"
            found[key] = lambda r=rank, n=length, d=dtype: peft(r, n, d)  # type: ignore[misc]
    for name in CONDITIONS:
        found[f"patches/{name}"] = lambda name=name: through(name)  # type: ignore[misc]
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
        write_whole(FILE, json.dumps(stored, indent=1, sort_keys=True) + "\n")
    return 0
