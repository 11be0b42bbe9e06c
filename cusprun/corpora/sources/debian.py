"""A package of the Debian archive, through apt-get; it is read as data and never installed.

Debian's mirrors offer one version per release: when a point release replaces the pinned one, apt-get no longer finds
it, and the error says so. The text that was fetched before stays usable from the cache.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.corpora.sources import run_client
from cusprun.errors import Failed

if TYPE_CHECKING:
    from cusprun.corpora.catalog import Source


def download(source: Source, folder: Path) -> Path:
    """Fetches the .deb into ``folder`` and returns its path."""
    what = f"{source.package}={source.version}"
    apt = shutil.which("apt-get")
    if apt is None:
        raise Failed(f"{what} is a Debian package and there is no apt-get here: use Debian or Ubuntu, or other text")
    folder.chmod(0o755)
    try:
        run_client([apt, "download", what], what, folder)
    except Failed as error:
        raise Failed(
            f"{error}\nThe catalog pins {what} (Debian 12). Run `apt-get update`; on another release, or after a point "
            "release has replaced it, that version is no longer offered: bring your own text with --corpus FILE."
        ) from error
    found = sorted(folder.glob("*.deb"))
    if not found:
        raise Failed(f"{what}: apt-get brought no package")
    return found[0]
