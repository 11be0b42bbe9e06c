"""A wheel from the Python package index, through pip with the user's own index settings.

Only wheels: fetching a source distribution makes pip run its build code, and packages are data here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.corpora.sources import run_client
from cusprun.errors import Failed

if TYPE_CHECKING:
    from cusprun.corpora.catalog import Source


def download(source: Source, folder: Path) -> Path:
    """Fetches the wheel into ``folder`` and returns its path; the pinned file, whatever Python this is."""
    what = f"{source.package}=={source.version}"
    if importlib.util.find_spec("pip") is None:
        raise Failed(f"{what} cannot be fetched: this Python has no pip (python -m ensurepip)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", *tag_options(source.file), what, "--dest", str(folder)]
    run_client(command, what, folder)
    found = folder / source.file
    if not found.is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise Failed(f"{what}: pip brought {names}, and the catalog expects {source.file}")
    return found


def tag_options(file: str) -> list[str]:
    """pip's options that choose the wheel ``file`` on any machine."""
    python, abi, platforms = file.removesuffix(".whl").split("-")[-3:]
    if abi == "none" and platforms == "any":
        return ["--ignore-requires-python"]
    options = ["--ignore-requires-python", "--implementation", python[:2], "--abi", abi]
    options += ["--python-version", f"{python[2]}.{python[3:]}"]
    for platform in platforms.split("."):
        options += ["--platform", platform]
    return options
