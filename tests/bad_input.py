"""One valid call of every public function, and kinds of what may come in an argument's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import gradinv_edu as gi

LOSS = nn.CrossEntropyLoss()
Call = tuple[Callable[..., Any], dict[str, Any]]


def _r(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(54, 3))
        return net.double()


def _wide() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4)).double()


def _gpt() -> nn.Module:
    from gradinv_edu import language

    return language.gpt(20, 32)


@cache
def _ids() -> Tensor:
    return torch.tensor([[3, 5, 7, 11, 2, 9]])


def calls() -> dict[str, Call]:
    """``{name: (function, valid arguments)}``, new objects at each call."""
    from gradinv_edu import (
        batches,
        compression,
        convolution,
        design,
        dropout,
        fully_connected,
        labels,
        networks,
        noise,
        optimization,
        perceptron,
        privacy,
        pruning,
        rank,
        schedule,
        sharing,
        systems,
        tokens,
    )

    net, x, y = _net(), _r(1, 1, 5, 5), torch.tensor([1])
    update = gi.observe(net, LOSS, x, y)
    wide, xs, ys = _wide(), _r(2, 8), torch.tensor([1, 3])
    many = gi.observe(wide, LOSS, xs, ys)
    g = {n: many.gradients[n] for n in many.gradients}
    one = gi.observe(wide, LOSS, xs[:1], ys[:1]).gradients
    conv = net[0]
    k = _r(1, 6, 3, 3, seed=1)
    wg = convolution.weight_gradient(conv, x, k)
    model = _gpt()
    words = gi.observe(model, LOSS, _ids()[:, :-1], _ids()[:, 1:])
    whole = {"model": net, "update": update, "input_shape": (1, 5, 5), "loss": LOSS}
    layer = {"weight_gradient": one["0.weight"], "bias_gradient": one["0.bias"]}
    head = {
        "weight": wide[2].weight.detach(),
        "weight_gradient": one["2.weight"],
        "bias": wide[2].bias.detach(),
    }
    pair = {"weight_gradient": g["0.weight"], "bias_gradient": g["0.bias"]}
    change = {"update": update}
    return {
        "sharing.observe": (
            sharing.observe,
            {"model": net, "loss": LOSS, "inputs": x, "targets": y},
        ),
        "sharing.observe steps": (
            sharing.observe,
            {
                "model": net,
                "loss": LOSS,
                "inputs": x,
                "targets": y,
                "local_steps": 2,
                "learning_rate": 0.1,
                "batch_size": 1,
                "momentum": 0.5,
                "weight_decay": 0.01,
            },
        ),
        "sharing.without_weight_decay": (
            sharing.without_weight_decay,
            {"model": net, "update": update},
        ),
        "perceptron.mixture": (perceptron.mixture, {"inputs": xs, "output_gradients": _r(2)}),
        "perceptron.noise_error": (
            perceptron.noise_error,
            {"inputs": xs[0], "bias_gradient": torch.tensor(0.3), "sigma": 0.1},
        ),
        "perceptron.recover_direction": (perceptron.recover_direction, {"weight_gradient": _r(8)}),
        "perceptron.recover_input": (
            perceptron.recover_input,
            {"weight_gradient": _r(8), "bias_gradient": torch.tensor(0.5)},
        ),
        "perceptron.recover_penalised_input": (
            perceptron.recover_penalised_input,
            {
                "weight_gradient": _r(8),
                "bias_gradient": torch.tensor(0.5),
                "weight": _r(8, seed=1),
                "bias": torch.tensor(0.1),
                "penalty": 0.1,
            },
        ),
        "fully_connected.rank_one": (fully_connected.rank_one, layer),
        "fully_connected.recover_input": (fully_connected.recover_input, layer),
        "fully_connected.recover_from_cross_entropy": (
            fully_connected.recover_from_cross_entropy,
            head,
        ),
        "fully_connected.recover_output": (
            fully_connected.recover_output,
            {"loss": LOSS, **head, "bias_gradient": one["2.bias"]},
        ),
        "convolution.as_dense": (convolution.as_dense, {"conv": conv, "input_shape": (1, 5, 5)}),
        "convolution.patches": (convolution.patches, {"conv": conv, "inputs": x}),
        "convolution.recover_input_as_dense": (
            convolution.recover_input_as_dense,
            {
                "conv": conv,
                "weight_gradient": wg,
                "bias_gradient": k.sum((0, 2, 3)),
                "input_shape": (1, 5, 5),
            },
        ),
        "convolution.signed_mean_patch": (
            convolution.signed_mean_patch,
            {"conv": conv, "inputs": x, "output_gradient": k},
        ),
        "convolution.weight_gradient": (
            convolution.weight_gradient,
            {"conv": conv, "inputs": x, "output_gradient": k},
        ),
        "systems.LayerSystem": (
            systems.LayerSystem,
            {"module": conv, "output_gradient": k, "input_shape": (1, 5, 5)},
        ),
        "systems.LayerSystem.solve": (
            systems.LayerSystem(conv, k, (1, 5, 5)).solve,
            {"outputs": conv(x).detach(), "weight_gradient": wg},
        ),
        "recursion.recover": (gi.recover, whole),
        "recursion.recover polish": (gi.recover, whole | {"polish": True, "batch_size": 1}),
        "batches.count_labels": (
            batches.count_labels,
            {"bias_gradient": g["2.bias"], "batch_size": 2},
        ),
        "batches.expected_isolated": (
            batches.expected_isolated,
            {"rows": 40, "batch_size": 2, "active": 0.5},
        ),
        "batches.forward_agreement": (
            batches.forward_agreement,
            {
                "weight": wide[0].weight.detach(),
                "bias": wide[0].bias.detach(),
                "weight_gradient": g["0.weight"],
                "inputs": xs,
            },
        ),
        "batches.isolated_samples": (batches.isolated_samples, {**pair, "outputs": 4}),
        "batches.low_rank_factors": (
            batches.low_rank_factors,
            {"matrix": g["0.weight"], "rank": 2},
        ),
        "batches.null_vectors": (batches.null_vectors, {"left": _r(40, 2), "draws": 5}),
        "batches.possible_labels": (
            batches.possible_labels,
            {"weight_gradient": g["2.weight"], "batch_size": 2},
        ),
        "batches.recover_batch": (
            batches.recover_batch,
            {
                **pair,
                "batch_size": 2,
                "weight": wide[0].weight.detach(),
                "bias": wide[0].bias.detach(),
            },
        ),
        "batches.recover_outputs": (
            batches.recover_outputs,
            {
                "weight": wide[2].weight.detach(),
                "bias": wide[2].bias.detach(),
                "weight_gradient": g["2.weight"],
                "bias_gradient": g["2.bias"],
                "batch_size": 2,
            },
        ),
        "networks.blind": (
            networks.blind,
            {
                "conv": nn.Conv2d(9, 9, 3, padding=1).double(),
                "weight_gradient": _r(9, 9, 3, 3),
                "total": _r(9),
                "input_shape": (9, 2, 2),
            },
        ),
        "networks.may_be_blind": (networks.may_be_blind, {"conv": conv, "input_shape": (1, 5, 5)}),
        "tokens.adapter_capacity": (
            tokens.adapter_capacity,
            {"rank": 4, "adapters": 2, "rounds": 2, "width": 32},
        ),
        "tokens.chance": (
            tokens.chance,
            {"candidates": 100, "tolerance": 0.01, "dimension": 32, "rank": 8},
        ),
        "tokens.locate": (tokens.locate, {"model": model}),
        "tokens.recover_patches": (
            tokens.recover_patches,
            {"position_gradient": _r(5, 12), "patch_gradient": _r(12, 6)},
        ),
        "tokens.recover_tokens": (tokens.recover_tokens, {"model": model, "update": words}),
        "tokens.untied": (
            tokens.untied,
            {
                "embedding_gradient": words.gradients["wte.weight"],
                "position_gradient": words.gradients["wpe.weight"],
            },
        ),
        "rank.audit": (gi.audit, {"model": net, "input_shape": (1, 5, 5), "inputs": x}),
        "rank.jacobian_rank": (
            rank.jacobian_rank,
            {"model": net, "input_shape": (1, 5, 5), "loss": LOSS, "inputs": x, "targets": y},
        ),
        "rank.leak_map": (
            rank.leak_map,
            {"model": net, "input_shape": (1, 5, 5), "inputs": x, "probes": 2},
        ),
        "rank.rank_law": (rank.rank_law, {"conv": conv, "input_shape": (1, 5, 5)}),
        "optimization.match_gradients": (
            optimization.match_gradients,
            whole | {"steps": 2, "targets": y},
        ),
        "optimization.total_variation": (optimization.total_variation, {"x": x}),
        "design.accuracy": (design.accuracy, {"model": net, "inputs": x, "targets": y}),
        "design.filter_bound": (
            design.filter_bound,
            {"channels": 3, "size": 32, "kernel": 3, "stride": 1, "padding": 1},
        ),
        "design.train": (
            design.train,
            {"model": _net(), "loss": LOSS, "inputs": x, "targets": y, "steps": 1, "batch_size": 1},
        ),
        "schedule.average_gradient": (schedule.average_gradient, {"model": net, "update": update}),
        "schedule.effective_steps": (schedule.effective_steps, change),
        "schedule.simulated_update": (
            schedule.simulated_update,
            {"model": net, "update": update, "loss": LOSS, "inputs": x, "targets": y},
        ),
        "dropout.classifier": (dropout.classifier, {"model": net}),
        "dropout.recovery_chance": (
            dropout.recovery_chance,
            {"filters": 8, "channels": 1, "size": 8, "kernel": 3, "rate": 0.5},
        ),
        "dropout.with_dropout": (dropout.with_dropout, {"model": net, "rate": 0.5}),
        "noise.add_noise": (noise.add_noise, {**change, "sigma": 0.1}),
        "noise.clip": (noise.clip, {**change, "norm": 1.0}),
        "compression.half": (compression.half, change),
        "compression.quantize": (compression.quantize, {**change, "bits": 4}),
        "compression.sign": (compression.sign, change),
        "compression.soteria": (
            compression.soteria,
            {"model": net, "update": update, "inputs": x, "fraction": 0.5},
        ),
        "pruning.complete_pruned": (
            pruning.complete_pruned,
            {"model": net, "update": update, "loss": LOSS},
        ),
        "pruning.entries_kept": (pruning.entries_kept, {"fraction": 0.1, "entries": 50}),
        "pruning.keep_largest": (pruning.keep_largest, {**change, "fraction": 0.5}),
        "pruning.keep_random": (pruning.keep_random, {**change, "fraction": 0.5}),
        "pruning.recover_pruned": (pruning.recover_pruned, layer),
        "privacy.privacy_spent": (
            privacy.privacy_spent,
            {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 10, "delta": 1e-5},
        ),
        "privacy.gaussian_delta": (
            privacy.gaussian_delta,
            {"sigma": 1.0, "epsilon": 1.0, "sensitivity": 1.0},
        ),
        "privacy.gaussian_sigma": (privacy.gaussian_sigma, {"epsilon": 1.0, "delta": 1e-5}),
        "rank.noise_floor": (
            rank.noise_floor,
            {"model": net, "inputs": x, "sigma": 0.1, "loss": LOSS, "targets": y, "prior": 1.0},
        ),
        "privacy.dp_sgd": (
            privacy.dp_sgd,
            {
                "model": net,
                "loss": LOSS,
                "inputs": x,
                "targets": y,
                "noise_multiplier": 1.0,
                "norm": 1.0,
                "dataset_size": 10,
            },
        ),
        "labels.recover_labels": (
            labels.recover_labels,
            {"model": net, "update": update, "loss": LOSS},
        ),
        "metrics.psnr": (gi.metrics.psnr, {"a": x, "b": x * 0.9, "data_range": 1.0}),
        "metrics.ssim": (gi.metrics.ssim, {"a": _r(1, 1, 12, 12), "b": _r(1, 1, 12, 12, seed=2)}),
        "metrics.relative_error": (gi.metrics.relative_error, {"a": x, "b": x * 0.9}),
    }


def _poked(value: float) -> Callable[[Tensor], Tensor]:
    def poke(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[:1] = value
        return t

    return poke


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "NaN": _poked(float("nan")),
    "infinity": _poked(float("inf")),
    "minus infinity": _poked(float("-inf")),
    "huge": lambda t: t * 1e300,
    "subnormal": lambda t: t * 1e-310,
    "zero": torch.zeros_like,
    "one axis more": lambda t: t[None],
    "one axis less": lambda t: t[0] if t.ndim else t[None],
    "empty": lambda t: t.new_zeros((0, *t.shape[1:])),
    "one entry more": lambda t: torch.cat([t, t[:1]]) if t.ndim else torch.stack([t, t]),
    "integers": lambda t: t.long(),
    "booleans": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex128),
    "half": lambda t: t.half(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse() if t.ndim else t[None].to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "numpy": lambda t: t.numpy(),
    "a list": lambda t: t.tolist(),
    "None": lambda t: None,
    "text": lambda t: "tensor",
}
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "requires grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "non-contiguous": lambda t: torch.stack([t, t], -1)[..., 0],
    "a view": lambda t: torch.stack([t, t])[1],
    "a parameter": lambda t: nn.Parameter(t.clone()) if t.is_floating_point() else t,
}


def _changed(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = value
    return model


def _hooked(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
    return model


def _shared(model: nn.Module) -> nn.Module:
    twice = nn.Linear(3, 3).double()
    return nn.Sequential(model, twice, nn.ReLU(), twice)


SAME_MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hooks": _hooked,
    "frozen": lambda m: m.requires_grad_(False),
}
MODELS: dict[str, Callable[[nn.Module], Any]] = {
    **SAME_MODELS,
    "shared weights": _shared,
    "None": lambda m: None,
    "text": lambda m: "model",
    "a class": lambda m: type(m),
    "a function": lambda m: lambda x: x,
    "no parameters": lambda m: nn.Identity(),
    "empty": lambda m: nn.Sequential(),
    "NaN weights": lambda m: _changed(m, float("nan")),
    "infinite weights": lambda m: _changed(m, float("inf")),
    "on meta": lambda m: m.to("meta"),
    "complex": lambda m: m.to(torch.complex128),
    "half": lambda m: m.half(),
    "another": lambda m: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).double(),
    "DataParallel": lambda m: nn.DataParallel(m),
    "compiled by script": lambda m: torch.jit.script(m),
}
UPDATES: dict[str, Callable[[gi.Update], Any]] = {
    "None": lambda u: None,
    "a dictionary": lambda u: u.gradients,
    "no gradients": lambda u: gi.Update({}),
    "one missing": lambda u: gi.Update(dict([*u.gradients.items()][1:])),
    "one more": lambda u: gi.Update({**u.gradients, "more": torch.ones(2)}),
    "prefixed": lambda u: gi.Update({f"module.{n}": g for n, g in u.gradients.items()}),
    "NaN": lambda u: gi.Update({n: _poked(float("nan"))(g) for n, g in u.gradients.items()}),
    "other shapes": lambda u: gi.Update({n: g[None] for n, g in u.gradients.items()}),
    "integers": lambda u: gi.Update({n: g.long() for n, g in u.gradients.items()}),
    "complex": lambda u: gi.Update({n: g.cfloat() for n, g in u.gradients.items()}),
    "meta": lambda u: gi.Update({n: g.to("meta") for n, g in u.gradients.items()}),
    "sparse": lambda u: gi.Update({n: g.to_sparse() for n, g in u.gradients.items()}),
    "zero": lambda u: gi.Update({n: torch.zeros_like(g) for n, g in u.gradients.items()}),
}
SHAPES: dict[str, Any] = {
    "None": None,
    "negative": (1, -5, 5),
    "zero": (1, 0, 5),
    "fractions": (1.0, 5.5, 5),
    "text": "1x5x5",
    "short": (5,),
    "no axis": (),
    "larger": (1, 50, 50),
    "a number": 5,
    "with batch": (1, 1, 5, 5),
    "other channels": (3, 5, 5),
    "smaller": (1, 2, 2),
}
INTEGERS: dict[str, Any] = {
    "negative": -1,
    "zero": 0,
    "a fraction": 1.5,
    "text": "3",
    "None": None,
    "NaN": float("nan"),
    "a list": [1],
    "a tensor of two": torch.ones(2),
}
FLOATS: dict[str, Any] = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "negative": -1.0,
    "text": "0.1",
    "None": None,
    "a list": [0.1],
    "complex": 1j,
}
LOSSES: dict[str, Any] = {
    "None": None,
    "text": "cross entropy",
    "a class": nn.CrossEntropyLoss,
    "another": nn.L1Loss(),
    "a constant": lambda z, y: torch.tensor(1.0),
}


def corruptions(value: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What may stand in the place of one argument."""
    if isinstance(value, Tensor):
        yield from ((n, lambda c=c: c(value)) for n, c in TENSORS.items())
    elif isinstance(value, gi.Update):
        yield from ((n, lambda c=c: c(value)) for n, c in UPDATES.items())
    elif isinstance(value, nn.Module) and "Loss" not in type(value).__name__:
        yield from ((n, lambda c=c: c(value)) for n, c in MODELS.items())
    else:
        kinds: dict[Any, dict[str, Any]] = {tuple: SHAPES, int: INTEGERS, float: FLOATS}
        table = kinds.get(type(value), LOSSES)
        yield from ((n, lambda c=c: c) for n, c in table.items())
