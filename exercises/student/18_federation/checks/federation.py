"""Checks of the exercises on a real federation.

Made by exercises/recording.py: what students get.
"""

from __future__ import annotations
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
import torch
from torch import Tensor, nn
import gradinv_edu as gi
from .verdict import Mistakes, Student, ask, compare, demand, expect, known, normal, pair, right, tensor, told
LOSS = nn.CrossEntropyLoss()
class Guarded(Mistakes, of='federation-guarded'):

    def guard_inside_the_noise(*_):
        """An update that the client's noise makes harmless was kept back: your guard judged what
        never leaves. The first mod of the list is the outermost, and sees the reply last."""
        raise NotImplementedError

    def no_guard(*_):
        """There is no LeakAudit in your list: nobody looks before the update leaves."""
        raise NotImplementedError

    def noise_thrown_out(*_):
        """The client's own noise is not in your list any more; the guard comes beside it."""
        raise NotImplementedError

    def a_warning_only(*_):
        """A leaking update left: your guard only says so. Which policy keeps it back?"""
        raise NotImplementedError

    def noise_of_the_guard(*_):
        """Your guard put noise of its own into a leaking update and let it go. Here it is to be
        kept back: such noise promises nothing."""
        raise NotImplementedError

    def limits_out_of_reach(*_):
        """A leaking update left, since your limits call nothing a leak. The default limits will
        do."""
        raise NotImplementedError

    def one_picture_for_all(*_):
        """A leaking update left: your guard compared it with somebody else's picture. Each client
        must be asked for its own, `data(context)`."""
        raise NotImplementedError
class _Blur:
    """A mod that adds noise to the weights that a client returns."""

    def __init__(self, sigma: float, seed: int) -> None:
        self.sigma, self.generator = (sigma, torch.Generator().manual_seed(seed))

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        from flwr.app import ArrayRecord
        reply = call_next(message, context)
        name, arrays = next(iter(reply.content.array_records.items()))
        noisy = {n: t + self.sigma * torch.randn(t.shape, generator=self.generator) for n, t in arrays.to_torch_state_dict().items()}
        reply.content.array_records[name] = ArrayRecord(noisy)
        return reply
def check_guarded(guarded: Student, seed: int=4) -> None:
    """Check: a guard that judges what leaves, in a federation of Flower's."""
    model = gi.models.mlp([64, 40, 10], generator=torch.Generator().manual_seed(seed))
    pictures, labels = gi.data.digits(range(seed % 50, seed % 50 + 3))

    def data(context: Context) -> tuple[Tensor, Tensor]:
        i = int(context.node_config['partition-id'])
        return (pictures[i:i + 1], labels[i:i + 1])
    in_order = 'Return the list of mods, in the order in which they stand around the client.'
    for sigma in (1.0, 1e-07):
        noise = _Blur(sigma, seed)
        mods = ask(guarded, model, LOSS, data, noise)
        demand(isinstance(mods, list) and all((callable(mod) for mod in mods)), in_order)
        audits = [mod for mod in mods if isinstance(mod, gi.federation.LeakAudit)]
        demand(audits, Guarded.no_guard)
        demand(noise in mods, Guarded.noise_thrown_out)
        with gi.federation.quiet(logging.CRITICAL):
            received = _round(model, data, mods).received
        guard = audits[0]
        if sigma == 1.0:
            early = mods.index(noise) < mods.index(guard)
            demand(len(received) == 3 or not early, Guarded.guard_inside_the_noise)
            reason = guard.reports[0].reason if guard.reports else 'it saw nothing'
            kept = f"An update that the client's noise makes harmless was kept back: {reason}."
            demand(len(received) == 3, kept)
        elif received:
            limits, default = (guard.limits, gi.federation.Limits())
            lax = limits.psnr > default.psnr or limits.ssim > default.ssim
            demand(guard.policy != 'warn', Guarded.a_warning_only)
            demand(guard.policy != 'noise', Guarded.noise_of_the_guard)
            demand(False, Guarded.limits_out_of_reach if lax else Guarded.one_picture_for_all)
    right('What the noise hides may leave, and what leaks stays: the server learns of neither why.')
def _round(model: nn.Module, data: Any, mods: list[Any]) -> Any:
    from flwr.serverapp.strategy import FedAvg
    with gi.federation.quiet():
        server = gi.federation.CuriousServer(FedAvg(fraction_evaluate=0.0), model)
    app = gi.federation.client_app(model, LOSS, data, mods)
    gi.federation.simulate(server, app, model, gi.federation.Schedule(0.1), clients=3)
    return server
from .recorded import recorded

check_gradient = recorded("check_gradient")
check_curious = recorded("check_curious")
check_unmask = recorded("check_unmask")
check_learns = recorded("check_learns")
