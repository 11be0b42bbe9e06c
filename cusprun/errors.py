"""The two ways a command ends badly: what was asked makes no sense (exit code 2), or doing it failed (exit code 1)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable


class InvalidRequest(ValueError):
    """What was asked makes no sense; the message says what to write instead. The command line exits with 2."""

    exit_code = 2

    @classmethod
    def together(cls, problems: Iterable[str]) -> InvalidRequest:
        """One error out of many problems, so that a user mends them all at once."""
        found = list(problems)
        if len(found) == 1:
            return cls(found[0])
        return cls("\n".join(f"- {problem}" for problem in found))


class Failed(RuntimeError):
    """What was asked makes sense and went wrong; the message says what and where. The command line exits with 1."""

    exit_code = 1


class MissingPackage(InvalidRequest):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'cusprun[{extra}]'")


def reason_of(error: Exception) -> str:
    """Why a file could not be read or written; what to do where the disk is full.

    Takes the errors of libraries that tell no error number but repeat the system's words.
    """
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename is not None else ""
        return f"the disk is full{where}: make room and give the same command again"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error)
