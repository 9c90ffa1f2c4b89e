"""Every error that kiln raises on purpose, and the exit code that the command line gives it.

    KilnError                 1    never raised itself
    |-- SpecError             2    the input is wrong: an argument, a file, a prompt
    |-- UnsupportedError      10   the input is valid and impossible here
    |   `-- DeviceMismatch    10   an engine was built for another machine
    |-- UntrustedError        11   a signature is missing or not trusted
    |-- BundleError           12   digest, schema or structure of a bundle is wrong
    |-- OutOfMemory           13
    |-- DiskFullError         14
    |-- BuildError            15   a tool failed; carries its log
    |-- ParityError           16   an engine's numbers, or a quality gate, failed
    |-- MissingError          17   a component, an extra or a command isn't installed or present
    |-- SelfTestError         18
    `-- PartialError          20   part of a batch was finished

0 is success and 130 is Ctrl-C. A message is one sentence that names what is wrong, the value seen,
the legal values where there are any, and the fix.
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "BundleError",
    "DeviceMismatch",
    "DiskFullError",
    "KilnError",
    "MissingError",
    "OutOfMemory",
    "ParityError",
    "PartialError",
    "SelfTestError",
    "SpecError",
    "UnsupportedError",
    "UntrustedError",
]


class KilnError(Exception):
    """The root: `str(error)` is the one sentence that the user reads."""

    exit_code = 1


class SpecError(KilnError):
    """The input is wrong."""

    exit_code = 2


class UnsupportedError(KilnError):
    """The input is valid, and impossible on this machine or with this backend."""

    exit_code = 10


class DeviceMismatch(UnsupportedError):  # noqa: N818 (the name that DESIGN.md gives it)
    """An artifact was built for another machine; both values are named."""


class UntrustedError(KilnError):
    """A signature is missing, or is valid and not trusted."""

    exit_code = 11


class BundleError(KilnError):
    """A bundle's bytes, schema or structure are wrong."""

    exit_code = 12


class OutOfMemory(KilnError):  # noqa: N818 (the name that DESIGN.md gives it)
    """Not enough memory; the message says how much is needed and free."""

    exit_code = 13


class DiskFullError(KilnError):
    """Not enough disk space; the message says how much is needed and free."""

    exit_code = 14


class BuildError(KilnError):
    """A tool failed while exporting or building."""

    exit_code = 15

    def __init__(self, message: str, *, log: str = "") -> None:
        """Keep the tool's own words in `log`; `-v` shows them."""
        super().__init__(message)
        self.log = log


class ParityError(KilnError):
    """An engine's numbers differ too much from the oracle's, or a quality gate failed."""

    exit_code = 16


class MissingError(KilnError):
    """Something needed isn't installed; the message has the command that installs it."""

    exit_code = 17


class SelfTestError(KilnError):
    """A recorded input no longer gives the recorded output."""

    exit_code = 18


class PartialError(KilnError):
    """Part of the work was finished and kept; the message says what wasn't."""

    exit_code = 20
