"""The errors that a user can cause and correct; any other exception is a bug."""

from __future__ import annotations


class VitquantError(Exception):
    """A request that cannot be met; the message says in one line what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class CaptureError(VitquantError):
    """A model cannot be captured as one graph."""


class RecipeError(VitquantError):
    """A recipe, an override or a bit width is not valid, or does not fit the model."""


class CalibrationError(VitquantError):
    """Quantization parameters cannot be determined from the calibration data or the model's tensors.

    Arguments:
        problem: what is wrong, and what to do.
        site: the site or operand of the model concerned; empty if it is not a single one.
    """

    def __init__(self, problem: str, site: str = "") -> None:
        super().__init__(f"{site}: {problem}" if site else problem)
        self.problem, self.site = problem, site


class AllocationError(VitquantError):
    """Bits cannot be allocated as asked, or a sensitivity table cannot be read."""


class CheckpointError(VitquantError):
    """A saved model is damaged, incomplete, of another model or of another format."""


class LoweringError(VitquantError):
    """An operation cannot be computed in integers.

    Arguments:
        problem: the site and the reason.
        remedy: what to do; empty if `problem` includes it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy


class ExportError(VitquantError):
    """A file cannot be written, a format cannot represent the model, or a runtime refuses it."""


class WorkerError(VitquantError):
    """Processes that share a computation cannot be started or reached, or are lost again and again."""


class DataError(VitquantError):
    """A data set cannot be read as asked."""


class ModelError(VitquantError):
    """A model, its name, its arguments or its weights do not fit together."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, at most 300 characters; the error's type if the message is empty."""
    return _line(error, 0)


def last_line(error: BaseException) -> str:
    """The last line likewise, where the lines before it say how the error came about."""
    return _line(error, -1)


def _line(error: BaseException, index: int) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[index][:300] if lines else type(error).__name__
