"""Where fetched packages and the documents read out of them are kept."""

from __future__ import annotations

import os
from pathlib import Path

from cusprun.errors import Failed


def cache_folder() -> Path:
    """``$CUSPRUN_CACHE``, or the user's cache directory for cusprun; not created here."""
    chosen = os.environ.get("CUSPRUN_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("cusprun")


def make_folder(path: Path) -> Path:
    """Creates a folder of the cache. Raises Failed where that cannot be, naming the variable that moves the cache."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failed(f"{path} cannot be made ({error.strerror}); set CUSPRUN_CACHE to a folder of yours") from error
    return path
