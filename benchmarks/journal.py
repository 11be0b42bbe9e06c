"""Finished runs of a bench that is not finished: interrupted, the same command goes on with the next run.

Kept by what was asked: the artifacts' sha256, sizes, settings, machine and versions. A finished bench leaves none,
the next one measures anew; so does one that was interrupted more than a day ago.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cusprun.benchmarks.environment import machine
from cusprun.corpora.cache import make_folder
from cusprun.errors import InvalidRequest
from cusprun.files import written_whole

VERSION = 1  # raise where a run measures something else under the same settings
DAY_S = 86400.0


class Journal:
    """One line of JSON for each run, below ``folder``; at most one bench at a time writes it.

    Raises InvalidRequest where another process is at the same bench: they would disturb each other's figures.
    """

    def __init__(self, folder: Path, asked: Any) -> None:
        identity = json.dumps([VERSION, asked, machine()], sort_keys=True)
        make_folder(folder)
        self._path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.jsonl"
        self._lock = FileLock(self._path.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InvalidRequest("the same bench is running already: wait until it is done") from None
        for path in folder.glob("*.jsonl"):
            if time.time() - path.stat().st_mtime > DAY_S:
                path.unlink(missing_ok=True)
        self._runs = self._read()
        self.kept = len(self._runs)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._path.is_file():
            return {}
        runs = {}
        for line in self._path.read_text(encoding="utf-8").splitlines():
            name, found = json.loads(line)
            runs[name] = found
        return runs

    def find(self, name: str) -> dict[str, Any] | None:
        """The run of that name, if it is done."""
        return self._runs.get(name)

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Keeps a run."""
        self._runs[name] = found
        text = "".join(json.dumps(entry) + "\n" for entry in self._runs.items())
        with written_whole(self._path) as part:
            part.write_text(text, encoding="utf-8")

    def finish(self) -> None:
        """Forgets the runs: the bench is done."""
        self._path.unlink(missing_ok=True)
        if os.name == "posix":  # elsewhere a file that is open cannot go
            self._path.with_suffix(".lock").unlink(missing_ok=True)

    def close(self) -> None:
        self._lock.release()
