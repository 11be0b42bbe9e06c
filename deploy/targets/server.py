"""The server."""

from __future__ import annotations

from cusprun.deploy.expert import Expert
from cusprun.deploy.files import Files
from cusprun.deploy.targets import Notes, Wish


def gather(expert: Expert, files: Files, wish: Wish) -> Notes:
    raise NotImplementedError
