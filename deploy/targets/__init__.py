"""What each kind of device is given: one module per target, each a function from an expert to the files of its bundle.

A target adds the artifact in the form its device likes and whatever starts it there. What every bundle has (README,
model card, licences, bill of materials, manifest, signature) is added around it by `cusprun.deploy.ship`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cusprun.deploy.expert import Expert
from cusprun.deploy.files import Files


@dataclass(frozen=True)
class Wish:
    """What the one who ships may choose; None is the target's own choice."""

    format: str | None = None
    quant: str | None = None


@dataclass(frozen=True)
class Notes:
    """What a target tells the receiver; it goes into the bundle's README.md."""

    start: str  # Markdown: how to start it on this device, with the commands
    needs: tuple[str, ...] = ()  # runtimes and versions that open it
    unproven: tuple[str, ...] = ()  # what could not be run where the bundle was made, and how it was checked instead


Target = Callable[[Expert, Files, Wish], Notes]

NAMES = ("laptop", "phone", "browser", "server")
PER_LAYER = ("deci", "openelm")  # llama.cpp's architectures that carry widths of their own in every layer


def find_target(name: str) -> Target:
    """The function of a target; only its module is imported."""
    if name == "laptop":
        from cusprun.deploy.targets.laptop import gather
    elif name == "server":
        from cusprun.deploy.targets.server import gather
    elif name == "phone":
        from cusprun.deploy.targets.phone import gather
    elif name == "browser":
        from cusprun.deploy.targets.browser import gather
    else:
        raise ValueError(f"no target {name}: {', '.join(NAMES)}")
    return gather
