"""Analytic and recursive attackers of ``breaching``, called as in its ``minimal_example.py``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.cases import Case, System

GIVEN = (
    "net, gradient and label through attacker.reconstruct, with the package's own configuration "
    "of the attack and no mean or deviation of a data set"
)
NEEDS = (("hydra", "hydra-core"), ("omegaconf", "omegaconf"))


def prepare(case: Case, checkout: str, attack: str = "") -> Callable[[], Tensor]:
    """Ready the attacker of the configuration ``attack``."""
    sys.path.insert(0, checkout)
    published = importlib.import_module("breaching")
    setup = {"device": torch.device("cpu"), "dtype": case.x.dtype}
    configuration = published.get_attack_config(attack)
    attacker = published.attacks.prepare_attack(case.model, case.loss, configuration, setup)
    server, user = server_side(case), user_side(case)

    def recover() -> Tensor:
        answer, _ = attacker.reconstruct(server, user, {}, dryrun=False)
        return torch.as_tensor(answer["data"]).detach().reshape(case.x.shape)

    return recover


def server_side(case: Case) -> list[dict[str, object]]:
    """Model and shape of the pictures, as the server knows them."""
    picture = SimpleNamespace(modality="vision", shape=case.shape, classes=10)
    return [{"parameters": list(case.model.parameters()), "buffers": [], "metadata": picture}]


def user_side(case: Case) -> list[dict[str, object]]:
    """Gradient and, as ``user.provide_labels`` of its cases has it, label."""
    gradients = list(case.update().gradients.values())
    about = {"num_data_points": 1, "labels": case.target, "local_hyperparams": None}
    return [{"gradients": gradients, "buffers": None, "metadata": about}]


def system(attack: str, *nets: str) -> System:
    """One of its attackers."""
    return System(
        partial(prepare, attack=attack),
        nets=nets,
        given=GIVEN,
        source="JonasGeiping/breaching",
        option="breaching",
        holds="breaching/__init__.py",
        needs=NEEDS,
    )


SYSTEMS = {
    "breaching, recursive": system("rgap", "CNN6, 10 classes"),
    "breaching, analytic": system("analytic", "perceptron", "MLP"),
}
