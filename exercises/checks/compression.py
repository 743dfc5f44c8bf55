"""Checks of the exercises on defense by compression."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import (
    Mistakes,
    Student,
    ask,
    compare,
    demand,
    known,
    normal,
    pair,
    right,
    tensor,
)


class Fill(Mistakes, of="compression-fill", own=("gradinv_edu.pruning.recover_pruned",)):
    def zeros_as_numbers(G, b):
        """You took the zeros for numbers: what was pruned is unknown, and has no say in the
        average."""
        return b @ G / b.square().sum()

    def mean_with_zeros(G, b):
        """Like zeros_as_numbers."""
        return (G / b[:, None]).mean(0)

    def mean_of_ratios(G, b):
        """You averaged the rows' ratios. Noise of rounding is loudest where k is small: which
        weights does least squares give?"""
        return (G / b[:, None]).sum(0) / (G != 0).sum(0)

    def loudest_row_only(G, b):
        """You used one row; pixels that it lost were seen by others."""
        return G[b.abs().argmax()] / b[b.abs().argmax()]

    def first_row_only(G, b):
        """Like loudest_row_only."""
        return G[0] / b[0]

    def unknown_pixels_called_black(G, b):
        """Pixels of which no entry is left are unknown: say so, with NaN."""
        return (b @ G / (b.square() @ (G != 0).double())).nan_to_num()

    def rows_for_columns(G, b):
        """Your answer has an entry for each row; a pixel is a column."""
        return G.sum(1) / b


def check_fill(fill: Student, seed: int = 3, pixels: int = 30) -> None:
    """Check: the picture out of a pruned and rounded gradient."""
    x, k = normal(seed, pixels).abs() + 0.1, normal(seed + 1, 8)
    places = torch.rand(8, pixels, generator=torch.Generator().manual_seed(seed)) < 0.3
    places[:, 4] = False
    G = (torch.outer(k, x) + 0.01 * normal(seed + 2, 8, pixels)) * places
    true = (k @ G) / (k[:, None].square() * places).sum(0)
    answer = tensor(ask(fill, G, k), "the picture")
    demand(answer.shape != (8,), Fill.rows_for_columns)
    wrong = ((hint, found.nan_to_num()) for hint, found in known("compression-fill", (G, k)))
    compare(answer.nan_to_num(), true.nan_to_num(), "the picture", wrong)
    demand(torch.equal(answer.isnan(), true.isnan()), Fill.unknown_pixels_called_black)
    right("Known zeros are left out, and what is left is averaged by its loudness.")


def _ratio(gradients: dict[str, Tensor], name: str = "") -> Tensor:
    G, b = gradients[f"{name}weight"], gradients[f"{name}bias"]
    return b @ G / b.square().sum()


def _soteria(encoder, classifier, zeros=False, bent=False, shifted=True, inverted=False):
    """Undo Soteria, or do it wrong in one respect."""
    r = _ratio(classifier)
    kept = (classifier["weight"] != 0).any(0) | zeros
    kept = ~kept if inverted else kept
    z = r if bent else r.clamp(-1 + 1e-15, 1 - 1e-15).atanh()
    b = encoder.bias.detach() if shifted else torch.zeros_like(r)
    return torch.linalg.pinv(encoder.weight.detach()[kept]) @ (z - b)[kept]


class SeeThrough(Mistakes, of="compression-see-through"):
    def pruned_features_as_zeros(encoder, classifier, gradients):
        """Soteria: you took features of pruned columns for zeros; they are unknown."""
        return _soteria(encoder, classifier, zeros=True), _ratio(gradients, "1.encode.")

    def activation_not_undone(encoder, classifier, gradients):
        """Soteria: those equations speak of z, before the tanh."""
        return _soteria(encoder, classifier, bent=True), _ratio(gradients, "1.encode.")

    def bias_of_the_encoder_forgotten(encoder, classifier, gradients):
        """Soteria: the encoder has a bias, and it is still in your right-hand side."""
        return _soteria(encoder, classifier, shifted=False), _ratio(gradients, "1.encode.")

    def columns_exchanged(encoder, classifier, gradients):
        """Soteria: you used the columns that were pruned."""
        return _soteria(encoder, classifier, inverted=True), _ratio(gradients, "1.encode.")

    def ratio_of_the_classifier(encoder, classifier, gradients):
        """PRECODE: that is the input of the layer above the draw, ratio of the last layer's
        gradients. Which layer meets the picture before anything is drawn?"""
        return _soteria(encoder, classifier), _ratio(gradients, "2.")

    def ratio_of_the_decoder(encoder, classifier, gradients):
        """PRECODE: that is the draw itself, from the decoder's gradient."""
        return _soteria(encoder, classifier), _ratio(gradients, "1.decode.")


def check_see_through(see_through: Student, seed: int = 4, pixels: int = 16) -> None:
    """Check: two published defenses, undone."""
    encoder = nn.Linear(pixels, 6 * pixels).double()
    with torch.no_grad():
        encoder.weight.copy_(normal(seed, 6 * pixels, pixels) / (2 * pixels**0.5))
        encoder.bias.copy_(normal(seed + 1, 6 * pixels) / 4)
    x, y, k = (
        normal(seed + 2, pixels).abs(),
        normal(seed + 4, pixels).abs(),
        normal(seed + 3, 10),
    )
    features = encoder(x).tanh().detach()
    pruned = torch.randperm(6 * pixels, generator=torch.Generator().manual_seed(seed))
    features[pruned[: 4 * pixels]] = 0
    classifier = {"weight": torch.outer(k, features), "bias": k}
    block = gi.compression.Bottleneck(pixels, 7, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), block, nn.Linear(pixels, 10).double())
    loss, draws = nn.CrossEntropyLoss(), torch.Generator().manual_seed(seed)
    sent = gi.observe(model, loss, y[None], torch.tensor([2]), generator=draws).gradients
    given, names = (encoder, classifier, dict(sent)), ("Soteria", "PRECODE")
    both = pair(ask(see_through, *given), "Soteria's and PRECODE's pictures")
    answers = [tensor(part, "the picture").flatten() for part in both]
    for name, found in zip(names, answers, strict=True):
        short = found.shape == (pixels,) or (name == "PRECODE" and found.shape == (7,))
        shape = f"{name}: the picture has {pixels} pixels; your answer has shape "
        demand(short, f"{shape}{tuple(found.shape)}.")
    for i, true in enumerate((x, y)):
        wrong = ((hint, parts[i]) for hint, parts in known("compression-see-through", given))
        compare(answers[i], true, f"{names[i]}: the picture", wrong, 1e-7)
    right("Known zeros and draws above the layer that tells: neither hides a picture.")


def _attacks(G: Tensor, b: Tensor) -> list[Tensor]:
    pruned = gi.pruning.recover_pruned(G, b).nan_to_num()
    return [gi.fully_connected.recover_input(G, b), pruned]


def _reads(client, pictures, attacks=_attacks, floor=None) -> bool:
    """Solve the exercise, with other attacks or another baseline."""
    better = 0
    for x in pictures:
        level = gi.metrics.psnr(pictures.mean(0), x) if floor is None else floor
        best = max(gi.metrics.psnr(found.clamp(0, 1), x) for found in attacks(*client(x)))
        better += best > level
    return better > len(pictures) / 2


class Leaks(Mistakes, of="compression-leaks"):
    def size_of_the_message_for_its_content(client, pictures):
        """Messages {name}: A factor stands before G and b alike; however small the message, its
        ratio is the picture."""
        return all(client(x)[0].norm() > 0.1 for x in pictures) and _reads(client, pictures)

    def naive_attack_only(client, pictures):
        """Messages {name}: A server that combines the rows better reads the pictures out of this
        noise. Judge by the best attack you know of, not by the first."""
        return _reads(client, pictures, lambda G, b: [(G / b[:, None]).mean(0)])

    def zeros_taken_for_numbers(client, pictures):
        """Messages {name}: The zeros in this message are pruned entries, and a server leaves them
        out."""
        return _reads(client, pictures, lambda G, b: _attacks(G, b)[:1])

    def only_what_is_exact(client, pictures):
        """Messages {name}: So few levels look coarse; all rows together still tell the picture."""
        return _reads(client, pictures, floor=25.0)

    def no_baseline(client, pictures):
        """Messages {name}: What can be recovered here is no nearer than the mean of the pictures,
        for which nobody needs a gradient. Which baseline did you compare with?"""
        return _reads(client, pictures, floor=3.0)


def _message(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of one dense layer of 48 units, of norm 1."""
    k = normal(11, 48)
    k = k * (0.05 + torch.rand(48, generator=torch.Generator().manual_seed(2)).double().square())
    size = float(k.norm() * torch.cat([x, x.new_ones(1)]).norm())
    return torch.outer(k, x) / size, k / size


def check_leaks(leaks: Student, seed: int = 5, first: int = 200) -> None:
    """Check: whether a client's messages give its pictures away."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        G, b = _message(x)
        draws = torch.randn(48, len(x) + 1, generator=generator, dtype=torch.float64) * sigma
        return G + draws[:, :-1], b + draws[:, -1]

    def clipped(x: Tensor) -> tuple[Tensor, Tensor]:
        G, b = _message(x)
        return 1e-3 * G, 1e-3 * b

    def pruned(x: Tensor) -> tuple[Tensor, Tensor]:
        G, b = _message(x)
        return G * (torch.rand(G.shape, generator=generator) < 0.15), b

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        G, b = ((2 * g / g.abs().max()).round() / 2 * g.abs().max() for g in _message(x))
        return G, b

    clients = [
        ("clipped to a thousandth", clipped, Leaks.size_of_the_message_for_its_content),
        ("with a little noise", lambda x: noisy(x, 0.01), Leaks.naive_attack_only),
        ("pruned by lot", pruned, Leaks.zeros_taken_for_numbers),
        ("of five levels an entry", rounded, Leaks.only_what_is_exact),
        ("with the noise of a promise", lambda x: noisy(x, 1.0), Leaks.no_baseline),
        ("with noise of a tenth", lambda x: noisy(x, 0.1), Leaks.no_baseline),
    ]
    pictures = gi.data.digits(range(first, first + 15), dtype=torch.float64)[0].flatten(1)
    for name, client, hint in clients:
        answer = ask(leaks, client, pictures, case=f"for messages {name}")
        demand(bool(answer) == (hint is not Leaks.no_baseline), hint, name=name)
    right("Rescaled, masked, rounded: it leaks. Blurred beyond the baseline: it does not.")
