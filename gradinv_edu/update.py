"""What the server receives from one client: checked, saved and loaded in one place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checks
from .engine.files import write_whole
from .errors import InvalidArgumentError, InvalidTensorError, UnknownNameError, UpdateFileError

__all__ = ["FORMAT", "Update"]

FORMAT = "gradinv_edu.Update/1"


@dataclass(frozen=True, eq=False, repr=False)
class Update:
    r"""What the server receives from one client in one round.

    Raises InvalidArgumentError or UnknownNameError if a setting is impossible.

    Parameters
    ----------
    gradients : dict of str to Tensor
        By the names of ``model.named_parameters()``, in the model's own dtype. After local
        steps: :math:`(\theta_0 - \theta_T) / \eta`. A name that is absent was not sent.
    local_steps, learning_rate : int, float or None
        Number :math:`T` of optimiser steps and :math:`\eta`; ``None`` for a plain gradient.
    batch_size : int or None
        Samples in each step; ``None`` if the server does not know.
    optimizer, momentum, weight_decay : str, float, float
        ``"sgd"`` or ``"adam"``, and its settings.
    samples : int
        Number of samples that the client used.
    buffers : dict of str to Tensor
        By the names of ``model.named_buffers()``: running statistics after the client's steps.
    """

    gradients: dict[str, Tensor]
    local_steps: int = 1
    learning_rate: float | None = None
    batch_size: int | None = None
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    samples: int = 1
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise UnknownNameError(f"No optimizer {self.optimizer!r}; there are sgd, adam.")
        checks.whole(self.local_steps, "local_steps")
        checks.whole(self.samples, "samples")
        if self.batch_size is not None:
            checks.whole(self.batch_size, "batch_size")
        if self.learning_rate is not None:
            checks.number(self.learning_rate, "learning_rate", "positive", lambda v: v > 0)
        elif self.local_steps > 1 or self.optimizer == "adam":
            what = f"{self.local_steps} local step(s) of {self.optimizer}"
            raise InvalidArgumentError(
                f"{what} need a learning_rate; without one, a plain gradient is sent."
            )
        checks.number(self.momentum, "momentum", "in [0, 1)", lambda v: 0 <= v < 1)
        checks.number(self.weight_decay, "weight_decay", "zero or more", lambda v: v >= 0)
        if self.optimizer == "adam" and self.momentum:
            raise InvalidArgumentError("Adam takes no momentum; leave it 0.")

    @property
    def _settings(self) -> dict[str, Any]:
        names = [f.name for f in fields(self) if f.name not in ("gradients", "buffers")]
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        numbers = sum(g.numel() for g in self.gradients.values())
        kinds = ", ".join(sorted({str(g.dtype)[6:] for g in self.gradients.values()}))
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        settings += f"; {len(self.buffers)} buffers" if self.buffers else ""
        return f"Update({len(self.gradients)} tensors of {numbers:,} numbers, {kinds}; {settings})"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the update as safetensors, which hold numbers and text but never code.

        The folder of ``path`` must exist; UpdateFileError if the file cannot be written.
        """
        from safetensors.torch import save

        texts = {"names": [*self.gradients], "buffers": [*self.buffers], "settings": self._settings}
        metadata = {"format": FORMAT} | {key: json.dumps(text) for key, text in texts.items()}
        # cloned: safetensors refuses tensors that share memory
        sent = self.gradients | self.buffers
        tensors = {n: t.detach().cpu().clone().contiguous() for n, t in sent.items()}
        try:
            write_whole(path, save(tensors, metadata))
        except OSError as error:
            raise UpdateFileError(f"Cannot write {path}: {error.strerror or error}.") from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Update:
        """Read what :meth:`save` wrote, onto the CPU, as it was.

        UpdateFileError if the file is missing, truncated, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise UpdateFileError(f"{path} {what}; give the file that Update.save wrote.")
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise UpdateFileError(
                f"{path} ({path.stat().st_size} bytes) is truncated or is not a safetensors file: "
                f"{error}. Ask the client for it again."
            ) from error
        if metadata.get("format") != FORMAT:
            raise UpdateFileError(
                f"{path} is a safetensors file but not an update: its format is "
                f"{metadata.get('format')!r}, expected {FORMAT!r}. Update.save writes such files."
            )
        try:
            names, buffers = (json.loads(metadata.get(k, "[]")) for k in ("names", "buffers"))
            settings = json.loads(metadata["settings"])
            sent = [{name: tensors[name] for name in part} for part in (names, buffers)]
            return cls(sent[0], **settings, buffers=sent[1])
        except (KeyError, TypeError, ValueError, UnknownNameError) as error:
            raise UpdateFileError(f"{path} describes itself wrongly: {error}.") from error

    def check(self, model: nn.Module) -> None:
        """Compare the update with the model that it is said to be of: the one check it needs.

        InvalidTensorError if it is empty, a name or shape is not the model's, or an entry of a
        gradient is NaN, infinite or not a floating-point number.
        """
        parameters, held = dict(model.named_parameters()), dict(model.named_buffers())
        if not self.gradients:
            raise InvalidTensorError("The update holds no gradient at all.")
        for name, gradient in self.gradients.items():
            if name not in parameters:
                raise InvalidTensorError(
                    f"The update has a gradient for {name!r}, the model no such parameter: it has "
                    f"{', '.join(parameters) or 'none'}. Give the model that the client trained."
                )
            checks.fits(gradient, f"The gradient of {name}", parameters[name].shape)
        for name, buffer in self.buffers.items():
            if name not in held or buffer.shape != held[name].shape:
                raise InvalidTensorError(f"The model has no buffer {name!r} of {buffer.shape}.")


def _is_update(update: object, name: str) -> None:
    if not isinstance(update, Update):
        raise InvalidTensorError(
            f"{name} must be an Update, got {type(update).__name__}: gi.observe makes one, "
            "Update.load reads one, and Update(gradients) is one of tensors by parameter names."
        )


checks.KINDS["Update"] = _is_update
checks.KINDS["Update | Sequence[Update]"] = checks.each(_is_update)
