"""The one base class of errors that a person can act on.

Command-line programs print such an error as one sentence and exit non-zero; anything else that
escapes is a defect and keeps its traceback.
"""


class SketchfleetError(Exception):
    """Says what is wrong, which limit was met, and what to do, in one sentence."""


class MissingExtraError(SketchfleetError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; install it with: pip install 'sketchfleet[{extra}]'"
        )
