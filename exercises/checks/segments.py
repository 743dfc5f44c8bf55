"""Checks of the exercises on segments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradinv_edu as gi

from .verdict import Mistakes, Student, ask, demand, expect, normal, pair, right


def _left_over(top: Tensor, slopes: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """What the gradient constraints leave over, and the input that they were solved for."""
    k = top * slopes
    x = G.T @ k / (k @ k)
    return torch.outer(k, x) - G, x


def _turned(top: Tensor, slopes: Tensor, G: Tensor, rounds=30, score=None, once=False) -> Tensor:
    """Turn the unit whose change points along what is left over, until nothing is."""
    slopes, seen = slopes.clone(), set()
    for _ in range(rounds):
        r, x = _left_over(top, slopes, G)
        if r.norm() < 1e-9 * G.norm():
            break
        points = (r @ x).abs() if score is None else score(r, x, slopes)
        for unit in seen if once else ():
            points[unit] = -1
        unit = int(points.argmax())
        seen.add(unit)
        slopes[unit] = 1.2 - slopes[unit]
    return slopes


class Pursue(Mistakes, of="segments-pursue"):
    def turned_once_only(top, slopes, G):
        """You turned one unit. Something may still be left over: compute it again, and go on until
        nothing is."""
        return _turned(top, slopes, G, rounds=1)

    def loudest_unit_first(top, slopes, G):
        """You turn the units that the layers above speak of most loudly. What is left over has a
        direction: which unit's change points along it?"""
        return _turned(top, slopes, G, 3, lambda r, x, s: top.abs(), once=True)

    def quietest_row_first(top, slopes, G):
        """You turn the units of which least is left over: those that were right."""
        return _turned(top, slopes, G, 3, lambda r, x, s: -(r @ x).abs(), once=True)

    def nothing_turned(top, slopes, G):
        """These are the slopes that were given to you."""
        return slopes

    def other_slope_is_one_over_it(top, slopes, G):
        """A slope came out that is neither 1 nor 0.2: the other side of 1 is 0.2, and the other
        side of 0.2 is 1."""
        true = _turned(top, slopes, G)
        return torch.where(true == slopes, slopes, 1 / slopes)


def check_pursue(pursue: Student, seed: int = 1, units: int = 16) -> None:
    """Check: units on the wrong side of their kinks, found by what they leave over."""
    for wrong in (1, 2):
        x, top, z = normal(seed, 20), normal(seed + 1, units), normal(seed + 2, units)
        true = torch.ones_like(z).masked_fill(z < 0, 0.2)
        order = torch.randperm(units, generator=torch.Generator().manual_seed(seed + wrong))
        read = true.clone()
        read[order[:wrong]] = 1.2 - read[order[:wrong]]
        given = (top, read, torch.outer(top * true, x))
        case = f"with {wrong} on the wrong side"
        expect("segments-pursue", pursue, given, true, "the slopes", case)
    right("The gradient tells on which side its own units were; nobody has to guess.")


class Design(Mistakes, of="segments-design"):
    def a_real_network():
        """Return two whole numbers from 1 to 8: the filters of the first layer and of the
        second."""
        return 12, 36

    def plenty_of_filters():
        """With {first} and {second} filters the second layer has full rank: no analysis would call
        it safe. Take filters away, or make its input larger."""
        return 2, 8

    def hardly_any_filters():
        """With {first} and {second} filters the whole gradient leaves {open} directions of the
        picture open: this network is safe from one gradient of one sample. Find one that only
        looks so."""
        return 2, 1

    def too_few_to_count():
        """The second layer has {equations} equations for {unknowns} unknowns: a count already says
        that it lacks some. Find one where the count is content, the rank is not, and the picture
        falls all the same."""
        return 2, 2


def check_design(design: Student, seed: int = 4) -> None:
    """Check: a layer that lacks rank in a network that does not."""
    first, second = answer = pair(ask(design), "design()")
    demand(all(isinstance(n, int) and 1 <= n <= 8 for n in answer), Design.a_real_network)
    model, x = _two_layers(first, second, seed), normal(seed + 9, 1, 1, 8, 8).abs()
    equations, unknowns, rank = _second_layer(model, x)
    facts = {"first": first, "second": second, "equations": equations, "unknowns": unknowns}
    demand(rank < unknowns, Design.plenty_of_filters, **facts)
    open_ = x.numel() - _whole_rank(model, x)
    demand(open_ == 0, Design.hardly_any_filters, **facts, open=open_)
    demand(equations >= unknowns, Design.too_few_to_count, **facts)
    right(
        f"{equations} equations, rank {rank} for {unknowns} unknowns, and yet the whole gradient "
        "determines every pixel: a layer without rank is not a safe network."
    )


def _two_layers(first: int, second: int, seed: int) -> nn.Sequential:
    """The network of the exercise, with weights of its own generator."""
    one = nn.Conv2d(1, first, 3, 1, 1, bias=False)
    two = nn.Conv2d(first, second, 3, 2, 1, bias=False)
    head = nn.Linear(16 * second, 10, bias=False)
    model = nn.Sequential(one, nn.LeakyReLU(0.2), two, nn.LeakyReLU(0.2), nn.Flatten(), head)
    with torch.no_grad():
        for place, parameter in enumerate(model.double().parameters()):
            parameter.copy_(normal(seed + place, *parameter.shape) / parameter[0].numel() ** 0.5)
    return model


def _second_layer(model: nn.Sequential, x: Tensor) -> tuple[int, int, int]:
    inner = model[:2](x).detach()
    z = model[2](inner).detach().requires_grad_()
    loss = nn.functional.cross_entropy(model[3:](z), torch.tensor([3]))
    (k,) = torch.autograd.grad(loss, z)
    matrix = gi.systems.LayerSystem(model[2], k, tuple(inner.shape[1:])).to_dense(scaled=True)
    return (*matrix.shape, int(torch.linalg.matrix_rank(matrix, rtol=1e-10)))


def _whole_rank(model: nn.Sequential, x: Tensor) -> int:
    """Rank of the derivative of the whole gradient with respect to the picture."""
    x = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(x), torch.tensor([3]))
    sent = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    parts = []
    for gradient in sent:
        flat = gradient.flatten()
        every = torch.eye(len(flat), dtype=flat.dtype)
        (rows,) = torch.autograd.grad(flat, x, every, retain_graph=True, is_grads_batched=True)
        parts.append(rows.flatten(1) / gradient.detach().abs().max())
    return int(torch.linalg.matrix_rank(torch.cat(parts), rtol=1e-10))
