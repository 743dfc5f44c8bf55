"""Typed errors: each says what was wrong and what to do about it."""

from __future__ import annotations


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


class UpdateFileError(GradientInversionError, OSError):
    """An update file is missing, truncated, or holds something else."""


class ModelFileError(GradientInversionError, OSError):
    """A model file is missing, damaged, or holds no program of ``torch.export``."""


class UnknownNameError(GradientInversionError, LookupError):
    """No picture, model or method goes by this name; the message lists those that do."""


class InvalidArgumentError(GradientInversionError, ValueError):
    """An argument has a value that cannot be; the message says which values can."""


class NotRecoveredError(GradientInversionError, RuntimeError):
    """The search ended, by its budget or by itself, without an answer that may be trusted."""


class MissingExtraError(GradientInversionError, ImportError):
    """A part of the package needs something that is not installed; the message names the extra."""


class ResultsFileError(GradientInversionError, OSError):
    """A results file is damaged, or was made by other versions or with other settings."""
