# SPDX-License-Identifier: Apache-2.0
"""The errors of this package: each says what is wrong, where, and what to do next."""


class EigenpruneError(Exception):
    """Base of every error that eigenprune raises on purpose."""


class ConfigError(EigenpruneError, ValueError):
    """A setting is unknown, out of range, of the wrong type, or at odds with another one."""


class CalibrationError(EigenpruneError, ValueError):
    """The calibration or evaluation texts cannot be used: none, too short, or of another kind."""


class WeightError(EigenpruneError, ValueError):
    """A weight or an activation cannot be worked with: NaN, infinity, no data on this device."""


class BudgetError(EigenpruneError, ValueError):
    """No choice of ranks meets the budget."""


class CheckpointError(EigenpruneError, RuntimeError):
    """A checkpoint is cut short, contradicts its own config, or cannot be written."""


class HubError(EigenpruneError, RuntimeError):
    """A model cannot be pushed: a name or a file is refused, or the Hub said no."""
