"""Every error that caravan raises on purpose: one line that says what, where, what was got, and the remedy."""


class CaravanError(Exception):
    """Root of all errors a user can act on; the command line prints it as one line and exits with 1."""


class ConfigError(CaravanError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(CaravanError):
    """A file, row, label or text cannot be used as data."""


class BackboneError(CaravanError):
    """A frozen model cannot be found, verified or used."""


class StorageError(CaravanError):
    """A saved retriever, checkpoint or result cannot be written, read or trusted."""


class TrainingError(CaravanError):
    """Training cannot start or go on: nothing to learn from, or a loss that is no longer finite."""


class FederationError(CaravanError):
    """A federated run cannot start or go on: no usable client, a refused update, a missing engine."""


class BudgetError(CaravanError):
    """Something would need more memory than the caller allows."""


class PrivacyError(CaravanError):
    """A privacy guarantee cannot be given, would be broken, or its budget is spent."""


class AnswerError(CaravanError):
    """A question cannot be answered: the generator is missing or fails, or the prompt has no room."""


class GeneratorError(AnswerError):
    """Whoever writes answers refuses, fails, or cannot be reached; the question is not at fault."""


class IntegrationError(CaravanError, ImportError):
    """A package that an integration is for is not installed; an `ImportError` too, as it is told at the import."""
