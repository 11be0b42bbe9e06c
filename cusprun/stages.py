"""Finished stages of a build by content hash: a stage whose inputs and outputs are unchanged is not run again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from cusprun.errors import Failed, InvalidRequest, reason_of
from cusprun.files import sha256_file, write_json, written_whole
from cusprun.progress import say

# Raise a stage's number when what it writes from the same inputs changes.
VERSIONS = {
    "text": 3,
    "prices": 4,
    "sensitivity": 4,
    "sizes": 1,
    "rounding": 1,
    "spend": 4,
    "trim": 1,
    "retext": 2,
    "statistics": 2,
    "plan": 3,
    "refit": 5,
    "compacted": 1,
    "model": 2,
    "imatrix": 1,
    "gptq": 1,
    "gguf": 1,
    "onnx": 2,
    "quality": 2,
    "questions": 1,
    "samples": 1,
    "speed": 2,
    "frontier": 2,
}


class Stages:
    """The stages of one output folder; each finished one has a record in ``.stages``."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / ".stages"
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, key: str, outputs: Sequence[Path], work: Callable[[], Any], *, listed: bool = True) -> Any:
        """The JSON value of ``work``, or of the record where ``key`` is the same and every output is as it was.

        ``outputs`` are files or folders below the output folder that ``work`` leaves, whole or not at all. Raises
        Failed naming the stage where they cannot be written or read.
        """
        from safetensors import SafetensorError

        record = self._read(name)
        if record is not None and record["key"] == key and record["outputs"] == self._hashes(outputs):
            if listed:
                say(f"{name}: done before, kept")
            return record["value"]
        try:
            self._path(name).unlink(missing_ok=True)
            start = time.monotonic()
            value = work()
            seconds = time.monotonic() - start
            found = {"key": key, "outputs": self._hashes(outputs), "seconds": round(seconds, 2), "value": value}
            write_json(self._path(name), found)
        except (OSError, SafetensorError) as error:
            raise Failed(f"{name}: {reason_of(error)}") from error
        if listed:
            say(f"{name}: {seconds:.1f} s")
        return json.loads(json.dumps(value))

    def step(
        self, name: str, inputs: Sequence[str], outputs: Sequence[Path], work: Callable[[], Any]
    ) -> dict[str, Any]:
        """Runs a stage; its key is made of its name, its version and ``inputs``, hashes. Returns key and value.

        Of a name such as gguf.q8_0 the part before the point has the version.
        """
        version = VERSIONS[name.split(".")[0]]
        key = hashlib.sha256(json.dumps([name, version, *inputs]).encode()).hexdigest()
        return {"key": key, "value": self.run(name, key, outputs, work)}

    def seconds(self) -> dict[str, float]:
        """How long each finished stage took when it ran."""
        names = sorted(path.stem for path in self.folder.glob("*.json"))
        return {name: record["seconds"] for name in names if (record := self._read(name)) is not None}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            record = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return record if isinstance(record, dict) and {"key", "outputs", "seconds", "value"} <= record.keys() else None

    def _hashes(self, outputs: Sequence[Path]) -> dict[str, str] | None:
        """sha256 of every file below ``outputs``; None where one is missing."""
        hashes = {}
        for output in outputs:
            if not output.exists():
                return None
            files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
            hashes.update({path.relative_to(self.out).as_posix(): sha256_file(path) for path in files})
        return hashes


@contextmanager
def sole_builder(out: Path) -> Iterator[None]:
    """Holds the output folder for one build. Raises InvalidRequest where another build is at work in it.

    A build that ends badly before any of its stages was done leaves nothing behind, the folder itself included where
    it was not there before; a recipe.yaml that lay there has its old bytes again.
    """
    from filelock import FileLock, Timeout

    made = [path for path in (out, *out.parents) if not path.exists()]
    folder, recipe = out / ".stages", out / "recipe.yaml"
    given = recipe.read_bytes() if recipe.is_file() else None
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InvalidRequest(
            f"--out {out}: another build is at work there; wait for it or choose another folder"
        ) from None
    try:
        yield
    except BaseException:
        if not any(folder.glob("*.json")) and {path.name for path in out.iterdir()} <= {".stages", "recipe.yaml"}:
            if given is None:
                recipe.unlink(missing_ok=True)
            elif recipe.read_bytes() != given:
                with written_whole(recipe) as part:
                    part.write_bytes(given)
            shutil.rmtree(folder, ignore_errors=True)
            for path in made:
                with suppress(OSError):  # somebody else has put something there by now
                    path.rmdir()
        raise
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Removes what killed processes left half-written below ``folder`` (names that cusprun.files gives).

    Other processes may be at work there: what disappears meanwhile is none of this one's business.
    """
    for at, folders, files in os.walk(folder):  # which passes over folders that have gone
        for name in [*folders, *files]:
            found = re.fullmatch(r"\..*\.(\d+)\.[0-9a-f]{8}\.part.*", name)
            if not found or psutil.pid_exists(int(found[1])):
                continue
            path = Path(at, name)
            with suppress(FileNotFoundError):  # somebody else swept it away
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
