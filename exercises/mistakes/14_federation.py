"""Plausible mistakes in the exercises to chapter 14; each must be refused by the right hint."""

from __future__ import annotations

import torch

import gradinv_edu as gi
from gradinv_edu.coursework.mistakes import planted


@planted("14-gradient", says="*against* the gradient")
def sign_turned(sent, returned, rate, decay):
    return (returned - sent) / rate - decay * sent


@planted("14-gradient", says="multiplied by the learning rate where")
def rate_multiplied(sent, returned, rate, decay):
    return (sent - returned) * rate - decay * sent


@planted("14-gradient", says="step itself")
def rate_forgotten(sent, returned, rate, decay):
    return sent - returned - decay * sent


@planted("14-gradient", says="two parts")
def decay_forgotten(sent, returned, rate, decay):
    return (sent - returned) / rate


@planted("14-gradient", says="came back")
def decay_of_the_returned_weights(sent, returned, rate, decay):
    return (sent - returned) / rate - decay * returned


@planted("14-gradient", says="brackets included")
def decay_divided_by_the_rate(sent, returned, rate, decay):
    return (sent - returned - decay * sent) / rate


def _average(replies, start):
    total = sum(n for _, n in replies)
    return {name: sum(n * end[name] for end, n in replies) / total for name in start}


def _ratio(start, end, layer="1"):
    G, b = (start[f"{layer}.{p}"] - end[f"{layer}.{p}"] for p in ("weight", "bias"))
    return gi.fully_connected.recover_input(G, b)


@planted("14-curious", says="weigh every client alike")
def plain_mean(start, replies):
    mean = {name: sum(end[name] for end, _ in replies) / len(replies) for name in start}
    return torch.stack([_ratio(start, end) for end, _ in replies]), mean


@planted("14-curious", says="divide by the number")
def sum_for_mean(start, replies):
    total = {name: sum(n * end[name] for end, n in replies) for name in start}
    return torch.stack([_ratio(start, end) for end, _ in replies]), total


@planted("14-curious", says="same for everybody")
def pictures_of_the_average(start, replies):
    average = _average(replies, start)
    return torch.stack([_ratio(start, average) for _ in replies]), average


@planted("14-curious", says="meets the picture itself")
def gradient_of_the_wrong_layer(start, replies):
    pictures = [_ratio(start, end, "3") for end, _ in replies]
    return torch.stack(pictures), _average(replies, start)


@planted("14-curious", says="what the training changed")
def weights_divided(start, replies):
    pictures = [
        end["1.bias"] @ end["1.weight"] / end["1.bias"].square().sum() for end, _ in replies
    ]
    return torch.stack(pictures), _average(replies, start)


@planted("14-curious", says="0/0")
def dead_units_averaged(start, replies):
    pictures = []
    for end, _ in replies:
        G, b = (start[f"1.{p}"] - end[f"1.{p}"] for p in ("weight", "bias"))
        pictures.append((G / b[:, None]).mean(dim=0))
    return torch.stack(pictures), _average(replies, start)


def _combined(start, first, second, p, q):
    changes = (
        p * (start[n] - first[0][n]) - q * (start[n] - second[0][n]) for n in ("1.weight", "1.bias")
    )
    return gi.fully_connected.recover_input(*changes)


@planted("14-unmask", says="subtracted averages")
def averages_subtracted(start, first, second):
    return _combined(start, first, second, 1, 1)


@planted("14-unmask", says="exchanged")
def counts_exchanged(start, first, second):
    return _combined(start, first, second, second[1], first[1])


@planted("14-unmask", says="one round alone")
def first_round_alone(start, first, second):
    return _combined(start, first, second, 1, 0)


@planted("14-unmask", says="one round alone")
def second_round_alone(start, first, second):
    return _combined(start, first, second, 0, -1)


@planted("14-unmask", says="to cancel")
def rounds_added(start, first, second):
    return _combined(start, first, second, first[1], -second[1])


def _audit(model, loss, data, **settings):
    return gi.federation.LeakAudit(model, loss, data, **{"seconds": 60, **settings})


@planted("14-guarded", says="outermost")
def guard_inside_the_noise(model, loss, data, noise):
    return [noise, _audit(model, loss, data)]


@planted("14-guarded", says="nobody looks")
def no_guard(model, loss, data, noise):
    return [noise]


@planted("14-guarded", says="not in your list any more")
def noise_thrown_out(model, loss, data, noise):
    return [_audit(model, loss, data)]


@planted("14-guarded", says="only says so")
def a_warning_only(model, loss, data, noise):
    return [_audit(model, loss, data, policy="warn"), noise]


@planted("14-guarded", says="call nothing a leak")
def limits_out_of_reach(model, loss, data, noise):
    limits = gi.federation.Limits(psnr=1000, ssim=1.1)
    return [_audit(model, loss, data, limits=limits), noise]


@planted("14-guarded", says="somebody else's picture")
def one_picture_for_all(model, loss, data, noise):
    def blank(context):
        inputs, targets = data(context)
        return torch.zeros_like(inputs), targets

    return [_audit(model, loss, blank), noise]


def _judged(r, secure=True, steps=True, noise=("client",), colluding=True, samples=True):
    if r.noise_at in noise and r.epsilon <= 1:
        return "nothing shown"
    together = r.clients - (r.colluding if colluding else 0) if r.secure else 1
    pictures = together * (r.samples if samples else 1)
    if (pictures > 1 and (pictures > 8 or r.steps > 1)) or (steps is False and r.steps > 1):
        return "nothing shown"
    if r.secure and not secure:
        return "nothing shown"
    return "what" if together > 1 else "whose"


@planted("14-learns", says="after the server has seen")
def noise_of_the_server_trusted(round_):
    return _judged(round_, noise=("client", "server"))


@planted("14-learns", says="nobody can tell who sent which")
def masks_hide_the_sum_too(round_):
    return _judged(round_, secure=False)


@planted("14-learns", says="same in every step")
def local_steps_trusted(round_):
    return _judged(round_, steps=False)


@planted("14-learns", says="taken out of the sum")
def colluding_clients_forgotten(round_):
    return _judged(round_, colluding=False)


@planted("14-learns", says="too large to hide")
def any_epsilon_believed(round_):
    return "nothing shown" if round_.noise_at == "client" else _judged(round_)


@planted("14-learns", says="do not come apart")
def clients_counted_instead_of_samples(round_):
    return _judged(round_, samples=False)


@planted("14-learns", says="nobody can tell who sent which")
def sum_read_with_names(round_):
    return _judged(round_).replace("what", "whose")
