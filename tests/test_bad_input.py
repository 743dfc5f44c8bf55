"""What a caller may hand over by mistake: a typed error with a mend, or the right answer.

Every public function stands in :func:`bad_input.calls` with one valid call; each of its arguments
is replaced, one at a time, by the kinds of things that may come in its place: here a third of
them, another third for each argument; all with ``EVERY_KIND=1`` (two CPU minutes).
"""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import pytest
import torch
from bad_input import LOSS, SAME, SAME_MODELS, calls, corruptions
from torch import Tensor, nn

import gradinv_edu as gi
from gradinv_edu.errors import GradientInversionError

EVERY = "EVERY_KIND" in os.environ
PATIENCE = 60  # CPU seconds: what hangs is no answer
NAMES = [*calls()]


def _state(arguments: dict[str, Any]) -> list[Any]:
    """Everything of the caller's that a call might change."""
    found: list[Any] = [torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()]
    for value in arguments.values():
        if isinstance(value, nn.Module):
            found += [(n, t.clone(), t.requires_grad) for n, t in value.state_dict().items()]
            for module in value.modules():
                found += [module.training, len(module._forward_hooks), len(module._backward_hooks)]
            found += [p.grad for p in value.parameters()]
        elif isinstance(value, gi.Update):
            found += [(n, g.clone()) for n, g in value.gradients.items()]
        elif isinstance(value, Tensor):
            found += [value.detach().clone(), value.grad, value.requires_grad]
    return found


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"no answer in {PATIENCE} CPU s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_every_mistake_gets_a_typed_error_or_the_right_answer(name: str) -> None:
    function, valid = calls()[name]
    before = _state(valid)
    function(**valid)
    if name != "design.train":  # the one whose purpose is to change the model
        assert _equal(_state(valid), before)
    for argument in valid:
        kinds = [*dict(corruptions(valid[argument]))]
        for kind in kinds if EVERY else kinds[crc32(f"{name}{argument}".encode()) % 3 :: 3]:
            function, arguments = calls()[name]
            make = dict(corruptions(arguments[argument]))[kind]
            try:
                arguments[argument] = make()
            except Exception:  # torch itself does not make such a thing
                continue
            state = _state({n: v for n, v in arguments.items() if n != argument})
            with _in_time():
                try:
                    function(**arguments)
                except GradientInversionError as error:
                    assert len(str(error).split()) > 3, f"{argument}, {kind}: {error}"
                except Exception as error:
                    message = f"{argument}, {kind}: {type(error).__name__}: {error}"
                    raise AssertionError(message) from error
            if name != "design.train":
                kept = {n: v for n, v in arguments.items() if n != argument}
                assert _equal(_state(kept), state), f"{argument}, {kind}"


def _numbers(found: Any) -> Iterator[Tensor]:
    """The tensors of an answer, whatever holds them."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, float):
        yield torch.tensor(found)
    elif isinstance(found, dict):
        yield from (t for v in found.values() for t in _numbers(v))
    elif isinstance(found, list | tuple):
        yield from (t for v in found for t in _numbers(v))
    elif isinstance(found, gi.Update):
        yield from _numbers(found.gradients)
    elif isinstance(found, gi.Recovery):
        yield found.inputs


TRAINING = {"sharing.observe", "sharing.observe steps", "design.train", "privacy.dp_sgd"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_how_a_tensor_is_stored_changes_no_answer(name: str) -> None:
    function, valid = calls()[name]
    want = [*_numbers(function(**valid))]
    for kind, change in {**SAME, **SAME_MODELS}.items():
        function, arguments = calls()[name]
        changed = Tensor if kind in SAME else nn.Module
        own = {n: v for n, v in arguments.items() if isinstance(v, changed) and v is not LOSS}
        if name in TRAINING and kind == "frozen":
            continue
        same = {n: change(v) for n, v in own.items()}  # type: ignore[operator]
        found = [*_numbers(function(**arguments | same))]
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-6, atol=1e-9)


def test_every_public_function_stands_in_the_table() -> None:
    """But for those whose own tests hand over servers, files, boards and steps of an engine."""
    from importlib import import_module

    elsewhere = {"federation", "scoreboard", "segments", "networks", "systems", "tokens"}
    for chapter in {name.split(".")[0] for name in NAMES} - elsewhere - {"metrics"}:
        module = import_module(f"gradinv_edu.{chapter}")
        public = {n for n in module.__all__ if inspect.isfunction(getattr(module, n))}
        named = {name.split(".")[1].split(" ")[0] for name in NAMES if name.startswith(chapter)}
        assert public - named <= LEFT.get(chapter, set()), chapter


LEFT = {
    "batches": {"sparse_basis", "sparse_directions"},
    "compression": set(),
    "design": {"most_likely_input"},
    "fully_connected": {"recover_from_logistic"},
    "noise": {"each_gradient"},
    "optimization": {"cosine_distance", "squared_distance"},
    "privacy": {"train_privately"},
    "pruning": {"gradients_above"},
    "rank": {"system_leak_map"},
}
