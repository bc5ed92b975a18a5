"""The one family of errors that a user can cause and mend; everything else is a fault of ours."""

from __future__ import annotations


class VitquantError(Exception):
    """A request that cannot be met, said in one line: what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class CaptureError(VitquantError):
    """A model cannot be captured as one graph."""


class RecipeError(VitquantError):
    """A recipe, an override or a bit width is not valid, or does not fit the model."""


class CalibrationError(VitquantError):
    """The calibration data or what the model makes of it cannot give quantization parameters.

    Arguments:
        problem: what is wrong, and what to do.
        site: where in the model, a site or one of its operands; empty when it is no single place.
    """

    def __init__(self, problem: str, site: str = "") -> None:
        super().__init__(f"{site}: {problem}" if site else problem)
        self.problem, self.site = problem, site


class AllocationError(VitquantError):
    """Bits cannot be spent as asked, or what says how sensitive a model is cannot be read."""


class CheckpointError(VitquantError):
    """A saved model is damaged, incomplete, of another model or of another format."""


class LoweringError(VitquantError):
    """An operation cannot be computed in integers.

    Arguments:
        problem: the site and the reason.
        remedy: what to do; empty when the problem says it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy


class ExportError(VitquantError):
    """A file cannot be written, a format cannot hold the model, or a runtime refuses it."""


class DataError(VitquantError):
    """A data set cannot be read as asked."""


class ModelError(VitquantError):
    """A model, its name, its arguments or its weights do not fit together."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, 300 characters at most; its type where it says nothing."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
