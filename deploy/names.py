"""Which file names a bundle may hold: plain relative paths that mean one and the same file on every system.

What is refused would leave the bundle's folder, could not be written on Windows, or would meet another name there.
"""

from __future__ import annotations

import unicodedata

LONGEST = 240  # bytes of a path
LONGEST_PART = 200
FORBIDDEN = set('<>:"|?*\\')
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(1, 10))}


def why_refused(name: str) -> str | None:
    """Why a bundle cannot hold a file of this name; None where it can."""
    if not name or not name.isprintable():
        return "has a name with control characters or none"
    if name.startswith("/") or (len(name) > 1 and name[1] == ":" and name[0].isalpha()):
        return "has an absolute path"
    if ".." in name.replace("\\", "/").split("/"):
        return "leaves the bundle's folder by .."
    if FORBIDDEN & set(name):
        return f"has a character in its name that is not allowed: {sorted(FORBIDDEN & set(name))[0]}"
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST:
        return f"has a path of more than {LONGEST} bytes"
    if unicodedata.normalize("NFC", name) != name:
        return "has a name that is not in Unicode's composed form"
    for part in name.split("/"):
        if part in ("", "."):
            return "has an empty part in its path"
        if part.endswith((".", " ")) or part.startswith(" "):
            return "has a part in its path that begins or ends with a space, or ends with a dot"
        if part.partition(".")[0].casefold() in RESERVED:
            return "has a name that is a device on Windows"
        if len(part.encode()) > LONGEST_PART:
            return f"has a part in its path of more than {LONGEST_PART} bytes"
    return None


class Names:
    """Names that were taken, so that none comes twice, also not where upper and lower case are one."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}

    def take(self, name: str) -> str | None:
        """Takes a name; says why it cannot be had, None where it can."""
        if (reason := why_refused(name)) is not None:
            return reason
        key = name.casefold()
        if key in self._files:
            other = self._files[key]
            return "comes twice" if other == name else f"differs from {other} in upper and lower case alone"
        if key in self._folders:
            return "is a file and a folder"
        parts = name.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder.casefold() in self._files:
                return f"lies in {folder}, which is a file"
            other = self._folders.setdefault(folder.casefold(), folder)
            if other != folder:
                return f"lies in {folder}, which differs from {other} in upper and lower case alone"
        self._files[key] = name
        return None
