"""Typed errors: each says what was wrong and what to do about it."""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "DoesNotApplyError",
    "GradientInversionError",
    "InconsistentGradientError",
    "InvalidArgumentError",
    "InvalidTensorError",
    "MissingExtraError",
    "NotRecoveredError",
    "RayStartError",
    "ResultsFileError",
    "UndeterminedScaleError",
    "UnknownNameError",
    "UnsupportedLayerError",
    "UnsupportedLossError",
    "UpdateFileError",
    "VanishingGradientError",
]


class GradientInversionError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidTensorError(GradientInversionError, ValueError):
    """A tensor has the wrong shape or type, or holds NaN or infinite entries."""


class VanishingGradientError(GradientInversionError, ValueError):
    """The gradient that a formula divides by is zero everywhere, so it carries nothing."""


class UndeterminedScaleError(GradientInversionError, ValueError):
    """Layer and loss leave the scale of the input open: no bias and no equation for it."""


class UnsupportedLayerError(GradientInversionError, ValueError):
    """The model has a layer that cannot be traced or inverted; the message names it."""


class UnsupportedLossError(GradientInversionError, ValueError):
    """No equation is known here that leads from this loss to the output's gradient."""


class InconsistentGradientError(GradientInversionError, ValueError):
    """No input explains this gradient: it does not belong to this model, loss or batch size."""


class CapacityError(GradientInversionError, ValueError):
    """More tokens or patches went in than the gradient has dimensions to tell them apart."""


class UpdateFileError(GradientInversionError, OSError):
    """An update file is missing, truncated, or holds something else."""


class UnknownNameError(GradientInversionError, LookupError):
    """No picture, model or method goes by this name; the message lists those that do."""


class InvalidArgumentError(GradientInversionError, ValueError):
    """An argument has a value that cannot be; the message says which values can."""


class NotRecoveredError(GradientInversionError, RuntimeError):
    """The search ended, by its budget or by itself, without an answer that may be trusted."""


class MissingExtraError(GradientInversionError, ImportError):
    """A part of the package needs something that is not installed; the message names the extra."""


class RayStartError(GradientInversionError, RuntimeError):
    """Ray did not start or did not last on this machine, mostly for want of time."""


class ResultsFileError(GradientInversionError, OSError):
    """A results file is damaged, or was made by other versions or with other settings."""


class DoesNotApplyError(GradientInversionError):
    """An attack or a defense has no meaning for this network; the message is the reason."""
