"""Checks of the exercises on defense by compression.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
import torch
from torch import Tensor, nn
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, compare, demand, known, normal, pair, right, tensor
class Leaks(Mistakes, of='compression-leaks'):

    def size_of_the_message_for_its_content(*_):
        """Messages {name}: A factor stands before G and b alike; however small the message, its
        ratio is the picture."""
        raise NotImplementedError

    def naive_attack_only(*_):
        """Messages {name}: A server that combines the rows better reads the pictures out of this
        noise. Judge by the best attack you know of, not by the first."""
        raise NotImplementedError

    def zeros_taken_for_numbers(*_):
        """Messages {name}: The zeros in this message are pruned entries, and a server leaves them
        out."""
        raise NotImplementedError

    def only_what_is_exact(*_):
        """Messages {name}: So few levels look coarse; all rows together still tell the picture."""
        raise NotImplementedError

    def no_baseline(*_):
        """Messages {name}: What can be recovered here is no nearer than the mean of the pictures,
        for which nobody needs a gradient. Which baseline did you compare with?"""
        raise NotImplementedError
def _message(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of one dense layer of 48 units, of norm 1."""
    k = normal(11, 48)
    k = k * (0.05 + torch.rand(48, generator=torch.Generator().manual_seed(2)).double().square())
    size = float(k.norm() * torch.cat([x, x.new_ones(1)]).norm())
    return (torch.outer(k, x) / size, k / size)
def check_leaks(leaks: Student, seed: int=5, first: int=200) -> None:
    """Check: whether a client's messages give its pictures away."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        G, b = _message(x)
        draws = torch.randn(48, len(x) + 1, generator=generator, dtype=torch.float64) * sigma
        return (G + draws[:, :-1], b + draws[:, -1])

    def clipped(x: Tensor) -> tuple[Tensor, Tensor]:
        G, b = _message(x)
        return (0.001 * G, 0.001 * b)

    def pruned(x: Tensor) -> tuple[Tensor, Tensor]:
        G, b = _message(x)
        return (G * (torch.rand(G.shape, generator=generator) < 0.15), b)

    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        G, b = ((2 * g / g.abs().max()).round() / 2 * g.abs().max() for g in _message(x))
        return (G, b)
    clients = [('clipped to a thousandth', clipped, Leaks.size_of_the_message_for_its_content), ('with a little noise', lambda x: noisy(x, 0.01), Leaks.naive_attack_only), ('pruned by lot', pruned, Leaks.zeros_taken_for_numbers), ('of five levels an entry', rounded, Leaks.only_what_is_exact), ('with the noise of a promise', lambda x: noisy(x, 1.0), Leaks.no_baseline), ('with noise of a tenth', lambda x: noisy(x, 0.1), Leaks.no_baseline)]
    pictures = gi.data.digits(range(first, first + 15), dtype=torch.float64)[0].flatten(1)
    for name, client, hint in clients:
        answer = ask(leaks, client, pictures, case=f'for messages {name}')
        demand(bool(answer) == (hint is not Leaks.no_baseline), hint, name=name)
    right('Rescaled, masked, rounded: it leaks. Blurred beyond the baseline: it does not.')
from .recorded import recorded

check_fill = recorded("check_fill")
check_see_through = recorded("check_see_through")
