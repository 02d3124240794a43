"""Mistakes that a user can mend: one line with the rule, the value and what to do."""


class UserError(ValueError):
    """Base of all errors that the scripts print as one line, without a traceback."""


class ConfigError(UserError):
    """A setting breaks a rule."""


class CheckpointError(UserError):
    """A checkpoint or work directory cannot be used."""


class DatasetError(UserError):
    """A dataset is missing, damaged or cannot be fetched."""


class TrainingError(UserError):
    """Training cannot go on."""


class WeightsError(UserError):
    """A state dict is not that of a network of this family."""


class ResultsError(UserError):
    """A finished run cannot be read."""
