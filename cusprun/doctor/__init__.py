"""What this machine can build, run and ship: facts, small real tries, and a verdict on each thing that cusprun does."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from cusprun.doctor.abilities import Ability, Check, Findings, is_sound, judge
from cusprun.doctor.machine import look_around
from cusprun.doctor.packages import Package, modules, read_packages
from cusprun.doctor.tools import PROGRAMS, find_tool
from cusprun.errors import Failed, InvalidRequest
from cusprun.progress import track

SCHEMA_VERSION = 1
PATIENCE_S = 120.0  # for one try; a library on a cold disk takes its time
CORE = ("transformers", "torch", "llama.cpp", "onnxruntime", "cache")
# Extras whose packages are imported; the demo's is never imported, its file is read.
IMPORTED = ("eval", "recover", "serve", "ship")

__all__ = ["Ability", "Check", "Findings", "as_json", "examine", "is_sound", "judge"]


def examine(*, online: bool = False, patience: float = PATIENCE_S) -> Findings:
    """Looks at the machine and tries what cusprun needs, a few tries at a time, each in a process of its own.

    Writes nothing that stays. ``online`` asks the hub too, else nothing leaves the machine.
    """
    machine, packages = look_around(), read_packages()
    with ThreadPoolExecutor(max_workers=max(2, min(4, os.cpu_count() or 2))) as pool:
        tries = [pool.submit(_try, *one, patience) for one in _tries(packages, online)]
        programs = [pool.submit(find_tool, name) for name in PROGRAMS]
        for _ in track(as_completed(tries), "tries", total=len(tries)):
            pass
        checks = [one.result() for one in tries]
        tools = [one.result() for one in programs]
    # Alone, since it times a matrix product; in a folder that no expert has, so that none is looked at.
    out = os.path.join("experts", f"doctor-{os.getpid()}")
    checks.append(_try("default build", "default build", [out], patience))
    return Findings(
        machine, packages, {tool.name: tool for tool in tools}, {one.name: one for one in checks}, _unfetchable(),
        _has_wllama(),
    )  # fmt: skip


def _tries(packages: Sequence[Package], online: bool) -> list[tuple[str, str, list[Any]]]:
    """Name of the check, of the try, and its arguments; the long ones first."""
    found: list[tuple[str, str, list[Any]]] = [(name, name, []) for name in CORE[:2]]
    for extra in IMPORTED:
        if names := modules(package for package in packages if package.extra == extra):
            found.append((f"packages of {extra}", "imports", [names]))
    found += [(name, name, []) for name in CORE[2:]]
    return [*found, *([("hub", "hub", [])] if online else [])]


def _try(name: str, probe: str, arguments: list[Any], patience: float) -> Check:
    from cusprun.doctor.probes import attempt
    from cusprun.runtimes.child import run_in_child

    start = time.monotonic()
    try:
        facts = run_in_child(attempt, probe, arguments, timeout=patience)
    except (InvalidRequest, Failed) as error:
        return Check(name, False, _short(error), time.monotonic() - start)
    return Check(name, True, facts.pop("detail"), time.monotonic() - start, facts)


def _short(error: Exception) -> str:
    """A child's crash in one line, other messages whole."""
    said = str(error)
    return said.partition("\n")[0].replace("the child process of cusprun.doctor.probes.attempt ", "the process ")


def _unfetchable() -> tuple[str, ...]:
    from cusprun.corpora.catalog import load_catalog
    from cusprun.corpora.listing import unreachable

    return tuple(unreachable(load_catalog()))


def _has_wllama() -> bool:
    from cusprun.deploy.targets import wllama

    return wllama.has_wllama(wllama.PACKAGES)


def as_json(findings: Findings) -> dict[str, Any]:
    """Everything found as one JSON document; docs/doctor.md tells its shape."""
    from cusprun import __version__

    return {
        "schema_version": SCHEMA_VERSION,
        "cusprun": __version__,
        "ok": is_sound(findings),
        "machine": asdict(findings.machine),
        "packages": [{**asdict(one), "satisfied": one.satisfied} for one in findings.packages],
        "tools": [{**asdict(one), "here": one.here} for one in findings.tools.values()],
        "checks": [asdict(one) for one in findings.checks.values()],
        "abilities": [asdict(one) for one in judge(findings)],
    }
