"""`cusprun-edge serve`: an artifact behind OpenAI's HTTP interface, one model on one machine.

A request passes `gate` (hosts, key, counting), is read and checked by `app` and `schemas`, waits in `engine`, and comes
back as `replies`. `server` owns the socket, the signals and the order in which all of it ends.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cusprun.deploy.serve.settings import Settings
from cusprun.errors import MissingPackage

NEEDED = ("starlette", "uvicorn", "prometheus_client")


def serve(path: Path, settings: Settings) -> None:
    """Serves the artifact that ``path`` stands for until it is told to stop.

    Raises InvalidRequest where the settings make no sense, the port is taken or a package is missing.
    """
    settings.check()
    for package in NEEDED:
        if find_spec(package) is None:
            raise MissingPackage(package, "serve", "serve")
    from cusprun.deploy.serve.server import run

    run(path, settings)
