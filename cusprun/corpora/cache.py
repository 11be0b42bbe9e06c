"""Where fetched packages and the documents read out of them are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$CUSPRUN_CACHE``, or the user's cache directory for cusprun; not created here."""
    chosen = os.environ.get("CUSPRUN_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("cusprun")
