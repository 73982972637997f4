"""Every exception that actprune raises on purpose; each message names the value, the limit and the cure."""


class ActPruneError(Exception):
    """Base class: catch this to catch everything actprune raises on purpose."""


class ConfigError(ActPruneError, ValueError):
    """A setting is outside what it may be."""


class TraceError(ActPruneError, RuntimeError):
    """The model could not be traced with the example inputs."""


class BudgetError(ActPruneError, ValueError):
    """The budget cannot be reached with the units that may leave."""


class ObservationError(ActPruneError, RuntimeError):
    """Activations are missing, NaN or infinite."""


class SurgeryError(ActPruneError, RuntimeError):
    """A cut did not leave a working model; the model was put back as it was."""


class DataError(ActPruneError, RuntimeError):
    """A dataset is missing or unreadable."""


class StorageError(ActPruneError, OSError):
    """A file could not be written; what was there before is intact."""


class ExportError(ActPruneError, RuntimeError):
    """A network could not be exported, or the exported one computes something else."""
