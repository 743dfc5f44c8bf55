"""Chapter 9: patches, words and adapters."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import gradinv_edu as gi
from gradinv_edu import language, tokens
from gradinv_edu.errors import (
    CapacityError,
    InvalidArgumentError,
    InvalidTensorError,
    MissingExtraError,
    NotRecoveredError,
    UnsupportedLayerError,
    VanishingGradientError,
)

LOSS = nn.CrossEntropyLoss()
WORDS = 300


@cache
def corpus() -> Tensor:
    text = language.text()[:40_000]
    return language.Tokenizer(text, WORDS).encode(text)


def observed(model: nn.Module, pieces: Tensor, without: tuple[str, ...] = (), **how) -> gi.Update:
    update = gi.observe(model, LOSS, pieces[:, :-1], pieces[:, 1:], **how)
    kept = {n: g for n, g in update.gradients.items() if not any(w in n for w in without)}
    return replace(update, gradients=kept)


def as_set(sequences) -> set[tuple[int, ...]]:
    return {tuple(ids.tolist()) for ids in sequences}


# --- patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 5, 11])
def test_patches_come_back_while_a_layer_norm_leaves_dimensions(T: int) -> None:
    D, n = 12, 7
    K = torch.randn(T, D, dtype=torch.float64)
    K -= K.mean(dim=1, keepdim=True)  # what a LayerNorm does to every token's gradient
    X = torch.rand(T, n, dtype=torch.float64)
    assert torch.allclose(tokens.recover_patches(K, K.T @ X), X, atol=1e-9)


def test_one_patch_more_than_the_dimensions_is_refused_not_guessed() -> None:
    K = torch.randn(12, 12, dtype=torch.float64)
    K -= K.mean(dim=1, keepdim=True)
    with pytest.raises(CapacityError, match=r"12 tokens.*rank 11, at most 11 of width 12"):
        tokens.recover_patches(K, K.T @ torch.rand(12, 7, dtype=torch.float64))
    assert tokens.recover_patches(K, K.T @ torch.ones(12, 7).double(), cut=1e-9).shape == (12, 7)


def vit(width: int = 48, dtype: torch.dtype = torch.float32, **how) -> VisionTransformer:
    torch.manual_seed(1)
    net = VisionTransformer(16, 4, 2, 4, width, 64, num_classes=5, **how).to(dtype)
    nn.init.normal_(net.heads.head.weight, std=0.02)  # its own is zero, and tells nothing
    return net.eval()


PHOTO, LABEL = gi.data.photo("astronaut", size=16), torch.tensor([3])


@pytest.mark.parametrize(
    ("dtype", "decibels"), [(torch.float32, 80), (torch.float64, 220)], ids=["32", "64"]
)
def test_a_vision_transformer_gives_its_picture_away(dtype: torch.dtype, decibels: float) -> None:
    net = vit(dtype=dtype)
    update = gi.observe(net, LOSS, PHOTO.to(dtype), LABEL)
    found = gi.recover(net, update, (3, 16, 16), LOSS)
    assert gi.metrics.psnr(found.inputs, PHOTO.double()) > decibels
    assert found.exact and found.targets.tolist() == [3]
    true = gi.metrics.relative_error(found.inputs, PHOTO.double())
    assert found.layers[0].error > true / 10  # the account is honest
    assert gi.audit(net, (3, 16, 16)).exact


def test_too_many_patches_for_the_width_are_said_by_recovery_and_audit_alike() -> None:
    net = vit(16)
    found = gi.recover(net, gi.observe(net, LOSS, PHOTO, LABEL), (3, 16, 16), LOSS)
    assert not found.exact and not found.layers[0].full_rank
    assert not gi.audit(net, (3, 16, 16)).exact


def test_several_steps_and_dropout_leave_the_picture_readable() -> None:
    net = vit(dtype=torch.float64, dropout=0.1).train()
    update = gi.observe(net, LOSS, PHOTO.double(), LABEL, local_steps=3, learning_rate=0.1)
    assert gi.recover(net, update, (3, 16, 16), LOSS).exact
    adam = gi.observe(
        net, LOSS, PHOTO.double(), LABEL, local_steps=1, learning_rate=1e-3, optimizer="adam"
    )
    assert not gi.recover(net, adam, (3, 16, 16), LOSS).exact


def test_what_a_vision_transformer_does_not_give_is_refused_by_name() -> None:
    net = vit()
    update = gi.observe(net, LOSS, PHOTO, LABEL)
    with pytest.raises(InvalidTensorError, match=r"pictures of shape \(3, 32, 32\): Wrong image"):
        gi.recover(net, update, (3, 32, 32), LOSS)
    with pytest.raises(NotRecoveredError, match="shared by all 2 pictures"):
        gi.recover(net, update, (3, 16, 16), LOSS, batch_size=2)
    nn.init.zeros_(net.heads.head.weight)
    with pytest.raises(VanishingGradientError, match="pos_embedding is zero"):
        gi.recover(net, gi.observe(net, LOSS, PHOTO, LABEL), (3, 16, 16), LOSS)
    audit = gi.audit(net, (3, 16, 16))
    assert audit.verdict == "not by this attack" and not audit.exact
    assert "no gradient passes" in audit.reason


@pytest.mark.parametrize("helped", [False, True], ids=["alone", "with the patch gradient"])
def test_patches_come_back_from_the_span_where_no_position_is_sent(helped: bool) -> None:
    net = vit(72, torch.float64)
    nn.init.normal_(net.encoder.layers[0].ln_1.bias, std=0.1)  # the scale becomes an unknown
    sent = gi.observe(net, LOSS, PHOTO.double(), LABEL).gradients
    first = "encoder.layers.encoder_layer_0."
    norm, conv = net.get_submodule(first + "ln_1"), net.conv_proj
    found = tokens.patches_in_span(
        sent[first + "self_attention.in_proj_weight"],
        conv.weight.flatten(1),
        conv.bias + net.encoder.pos_embedding[0, 1:],
        norm.weight,
        norm.bias,
        sent["conv_proj.weight"].flatten(1) if helped else None,
    )
    picture = nn.functional.fold(found.T[None], 16, 4, stride=4)
    assert gi.metrics.psnr(picture, PHOTO.double()) > 120
    with pytest.raises(CapacityError, match="outside the span of 16 tokens"):
        tokens.patches_in_span(
            torch.rand(60, 48), torch.rand(48, 48), torch.rand(16, 48), *torch.rand(2, 48)
        )


# --- words ----------------------------------------------------------------------------------------

NETS = {
    "gpt": lambda: language.gpt(WORDS, 64),
    "gpt, tied": lambda: language.gpt(WORDS, 64, tied=True),
    "llama": lambda: language.llama(WORDS, 64),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_sentence_comes_back_word_for_word(name: str, frozen: bool) -> None:
    net = NETS[name]()
    for piece in language.sentences(corpus(), 3, 16):
        update = observed(net, piece[None], ("wte", "wpe", "embed") if frozen else ())
        found = tokens.recover_tokens(net, update)
        assert found.exact and torch.equal(found.ids, piece[:-1])
        assert 10 * found.accepted < found.refused <= 1


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_several_sentences_are_told_apart(name: str) -> None:
    net, pieces = NETS[name](), language.sentences(corpus(), 3, 12)
    found = tokens.recover_tokens(net, observed(net, pieces))
    assert as_set(found.sequences) == as_set(pieces[:, :-1]) and found.exact


def test_more_words_than_the_width_are_refused_not_garbled() -> None:
    net, pieces = NETS["gpt"](), language.sentences(corpus(), 8, 15)
    with pytest.raises(CapacityError, match=r"span all 6[34] dimensions.*smaller batch"):
        tokens.recover_tokens(net, observed(net, pieces))


def test_words_after_steps_of_sgd_as_weights_show_them() -> None:
    net, piece = NETS["gpt"](), language.sentences(corpus(), 1, 12)
    found = tokens.recover_tokens(net, observed(net, piece, local_steps=3, learning_rate=0.1))
    assert torch.equal(found.ids, piece[0, :-1])


def test_the_count_of_words_that_pass_by_chance() -> None:
    D, r, count, tolerance = 12, 10, 20_000, 0.1
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(r, D, generator=source, dtype=torch.float64)
    span = tokens.Span(tokens.Directions(rows, 1e-15))
    far = span.distance(torch.randn(count, D, generator=source, dtype=torch.float64))
    passed = int((far < tolerance).sum())
    assert abs(passed / tokens.chance(count, tolerance, D, r) - 1) < 0.15
    assert tokens.chance(count, 0.0, D, r) == 0.0
    assert span.rank == r and float(span.distance(rows).max()) < 1e-12


class Other(nn.Module):
    """A GPT whose parts have other names."""

    def __init__(self) -> None:
        super().__init__()
        own = language.gpt(WORDS, 64)
        self.words, self.places, self.h = own.wte, own.wpe, own.h
        self.norm, self.head = own.ln_f, own.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        z = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.h:
            z = block(z)
        return self.head(self.norm(z)).transpose(1, 2)


def test_another_model_needs_a_layout_and_no_more() -> None:
    net, piece = Other(), language.sentences(corpus(), 1, 10)
    update = observed(net, piece)
    with pytest.raises(UnsupportedLayerError, match=r"layout=Layout\(embedding"):
        tokens.recover_tokens(net, update)
    own = tokens.Layout("words", "places", "h.{}", ("attn.q_proj", "attn.k_proj", "attn.v_proj"))
    assert torch.equal(tokens.recover_tokens(net, update, layout=own).ids, piece[0, :-1])


def test_bad_updates_are_refused_by_name() -> None:
    net, piece = NETS["gpt"](), language.sentences(corpus(), 1, 10)
    update = observed(net, piece)
    with pytest.raises(InvalidTensorError, match="no such parameter"):
        tokens.recover_tokens(NETS["llama"](), update)
    with pytest.raises(InvalidTensorError, match="has shape"):
        tokens.recover_tokens(language.gpt(WORDS + 1, 64), update)
    with pytest.raises(InvalidTensorError, match=r"holds no gradient of h\.0\.attn"):
        tokens.recover_tokens(net, observed(net, piece, ("attn", "wte")))
    broken = {n: torch.full_like(g, torch.nan) for n, g in update.gradients.items()}
    with pytest.raises(InvalidTensorError, match="NaN or infinite"):
        tokens.recover_tokens(net, replace(update, gradients=broken))
    source = torch.Generator().manual_seed(1)
    other = language.gpt(WORDS, 64, generator=source)
    with pytest.raises(NotRecoveredError, match="another model's"):
        tokens.recover_tokens(other, observed(net, piece, ("wte", "wpe")))
    with pytest.raises(InvalidArgumentError, match="2 models and 1 updates"):
        tokens.recover_tokens([net, net], update)


# --- adapters -------------------------------------------------------------------------------------


def test_the_law_of_adapters() -> None:
    assert [tokens.adapter_capacity(4, 2, rounds, 20) for rounds in (1, 2, 3, 4)] == [0, 8, 16, 20]
    with pytest.raises(InvalidArgumentError, match="rounds must be a whole number"):
        tokens.adapter_capacity(4, 2, 0, 20)


def test_rounds_of_lora_add_up_to_the_law() -> None:
    base = language.gpt(WORDS, 64, dtype=torch.float64)
    piece, rank = language.sentences(corpus(), 1, 14), 4
    found: dict[int, bool] = {}
    models, updates = [], []
    for turn in range(1, 4):
        net = language.adapted(base, rank, generator=torch.Generator().manual_seed(turn))
        with torch.no_grad():  # as if trained before: B is no longer zero
            for name, p in net.named_parameters():
                if name.endswith("lora_B.weight"):
                    p.normal_(0, 0.1, generator=torch.Generator().manual_seed(turn))
        models.append(net)
        updates.append(observed(net, piece))
        predicted = tokens.adapter_capacity(rank, 2, turn + 1, 64) > 14
        try:
            result = tokens.recover_tokens(models, updates, length=14)
            found[turn] = result.exact and torch.equal(result.ids, piece[0, :-1])
        except NotRecoveredError:
            found[turn] = False
        assert found[turn] == predicted
    assert found == {1: False, 2: True, 3: True}


def test_the_first_round_of_lora_says_so() -> None:
    net = language.adapted(language.gpt(WORDS, 64), 4)
    with pytest.raises(VanishingGradientError, match="begin with B = 0"):
        tokens.recover_tokens(net, observed(net, language.sentences(corpus(), 1, 6)))


class Bottleneck(nn.Module):
    """An adapter with a bias, beside the attention of a block."""

    def __init__(self, attention: nn.Module, rank: int) -> None:
        super().__init__()
        self.attention, self.down, self.up = attention, nn.Linear(64, rank), nn.Linear(rank, 64)

    def forward(self, u: Tensor) -> Tensor:
        return self.attention(u) + self.up(self.down(u).relu())


@pytest.mark.parametrize(("length", "rank", "read"), [(1, 8, True), (8, 8, True), (9, 8, False)])
def test_a_bottleneck_with_a_bias_shows_its_rank_in_the_first_round(
    length: int, rank: int, read: bool
) -> None:
    net, piece = NETS["gpt"]().double(), language.sentences(corpus(), 1, length)
    net.requires_grad_(False)
    net.h[0].attn = Bottleneck(net.h[0].attn, rank).double()
    update = observed(net, piece)
    here = tokens.Layout("wte", "wpe", "h.{}", ("attn.down",))
    try:
        found = tokens.recover_tokens(net, update, layout=here, length=length)
        assert torch.equal(found.ids, piece[0, :-1]) == read
    except NotRecoveredError:
        assert not read
    if length == 1:  # one word: every unit that fired has it in its ratio
        W, b = (update.gradients[f"h.0.attn.down.{p}"] for p in ("weight", "bias"))
        u = net.h[0].ln_1(net.wte.weight[piece[0, 0]] + net.wpe.weight[0])
        ratio = gi.fully_connected.recover_input(W, b)
        assert gi.metrics.relative_error(ratio, u.detach()) < 1e-9


def test_gpt2_of_transformers_and_lora_of_peft_are_read_as_they_are() -> None:
    from benchmarks.tokens import Logits

    transformers, peft = (pytest.importorskip(name) for name in ("transformers", "peft"))
    sizes = {"vocab_size": WORDS, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    (piece,) = language.sentences(corpus(), 1, 8)
    for without in ((), ("wte", "wpe")):
        found = tokens.recover_tokens(Logits(net), observed(Logits(net), piece[None], without))
        assert found.exact and torch.equal(found.ids, piece[:-1])
    settings = {"r": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapted = Logits(peft.get_peft_model(net, peft.LoraConfig(**settings))).eval()
    with pytest.raises(VanishingGradientError, match="begin with B = 0"):
        tokens.recover_tokens(adapted, observed(adapted, piece[None]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    found = tokens.recover_tokens(adapted, observed(adapted, piece[None]), length=8)
    assert found.exact and torch.equal(found.ids, piece[:-1])


@pytest.mark.parametrize(
    ("name", "full"), [("vit_small_patch32_224", 1), ("vit_tiny_patch16_224", 0)]
)
def test_timms_vision_transformers_give_their_pictures_away(name: str, full: bool) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, num_classes=10).eval()
    nn.init.normal_(net.head.weight, std=0.02)  # 196 patches in a width of 192 are too many
    photo = gi.data.photo("astronaut", size=224)
    found = gi.recover(net, gi.observe(net, LOSS, photo, LABEL), (3, 224, 224), LOSS)
    assert found.exact == bool(full)
    assert gi.metrics.psnr(found.inputs, photo.double()) > (80 if full else 35)


# --- a federation ---------------------------------------------------------------------------------


def test_flower_clients_send_their_sentences_and_the_guard_sees_it_first() -> None:
    from flwr.serverapp.strategy import FedAvg

    from gradinv_edu import federation as fed

    net, pieces = NETS["gpt"](), language.sentences(corpus(), 2, 12)

    def data(context) -> tuple[Tensor, Tensor]:
        own = pieces[[int(context.node_config["partition-id"])]]
        return own[:, :-1], own[:, 1:]

    def rounds(mods) -> fed.CuriousServer:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=2, min_train_nodes=2)
        server = fed.CuriousServer(strategy, net)
        app = fed.client_app(net, LOSS, data, mods)
        fed.simulate(server, app, net, fed.Schedule(learning_rate=0.1), clients=2)
        return server

    seen = rounds([]).received
    for one, piece in zip(seen, pieces, strict=True):
        assert torch.equal(tokens.recover_tokens(one.model, one.update).ids, piece[:-1])
    guard = fed.LeakAudit(net, LOSS, data)
    held = rounds([guard])
    assert not held.received and len(held.failures) == 2
    assert [r.action for r in guard.reports] == ["withheld"] * 2
    assert all(r.attempts[0].words == 1.0 for r in guard.reports)
    assert "100 % of the words" in str(guard.reports[0])


def test_a_real_model_gives_sentences_away_as_the_page_says() -> None:
    try:
        net, tokenizer = language.smollm2()
    except MissingExtraError as error:
        pytest.skip(str(error))
    for sentence in ("The spare key is under the third flower pot.",):
        ids = torch.tensor([tokenizer.encode(sentence + "\n").ids])
        found = tokens.recover_tokens(net, observed(net, ids))
        assert found.exact and tokenizer.decode(found.ids.tolist()) == sentence
