"""The two ways a command ends badly: what was asked makes no sense (exit code 2), or doing it failed (exit code 1)."""

from __future__ import annotations

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
