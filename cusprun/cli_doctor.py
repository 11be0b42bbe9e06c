"""`cusprun-edge doctor`: what this machine can build, run and ship, and what to install for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cusprun.flags import Json, print_json

if TYPE_CHECKING:
    from cusprun.doctor import Findings

WORDS = {"yes": "yes", "limited": "yes, but", "no": "no"}


def doctor(
    online: Annotated[bool, typer.Option("--online", help="Ask the hub too; else nothing leaves the machine.")] = False,
    json_: Json = False,
) -> None:
    """Tell what this machine can build, run and ship, and what to install for the rest.

    Every library is really tried, on something tiny and in a process of its own, so that one that crashes is a finding
    too. That takes some seconds; nothing is written that stays. The exit code is 1 where cusprun itself, extras aside,
    cannot work here.

    See also: corpora list, for the texts that are here; build, whose plan says what it takes.

    Example: cusprun-edge doctor
    """
    from cusprun.doctor import as_json, examine, is_sound
    from cusprun.progress import say

    say("trying torch, transformers, llama.cpp, onnxruntime and the packages of the extras ...")
    findings = examine(online=online)
    if json_:
        print_json(as_json(findings))
    else:
        typer.echo("\n".join(as_lines(findings)))
    if not is_sound(findings):
        raise typer.Exit(1)


def as_lines(findings: Findings, width: int | None = None) -> list[str]:
    """The findings for people: the machine, what was tried, what can be done, what to install."""
    import shutil

    from cusprun import __version__
    from cusprun.doctor import judge

    wide = width or min(shutil.get_terminal_size().columns, 100)
    machine, abilities = findings.machine, judge(findings)
    cores = f"{machine.physical_cores or '?'} cores, {machine.logical_cores or '?'} threads"
    lines = [
        *_row("cusprun", f"{__version__}, Python {machine.python} ({machine.executable}), {machine.system}", wide),
        *_row("processor", f"{machine.cpu}, {cores}: {' '.join(machine.instruction_sets) or 'unknown'}", wide),
        *_row("memory", f"{_gb(machine.memory_free_bytes)} of {_gb(machine.memory_bytes)} free", wide),
        *_row("disk", f"{_gb(machine.disk_free_bytes)} free here, {_gb(machine.cache_free_bytes)} in {machine.cache}",
              wide),
        *_row("GPU", _gpus(findings), wide),
        *_row("energy", machine.energy, wide),
        "",
        "Tried",
    ]  # fmt: skip
    for check in findings.checks.values():
        lines += _row(check.name, f"{'ok' if check.ok else 'FAILED'}  {check.detail}", wide, label=22)
    for tool in findings.tools.values():
        lines += _row(tool.name, f"{tool.path}: {tool.version}" if tool.here else str(tool), wide, label=22)
    lines += ["", "What this machine can do"]
    for ability in abilities:
        words = "; ".join([*ability.reasons, *([ability.note] if ability.note else [])])
        verdict = WORDS[ability.verdict]
        lines += _row(ability.name, f"{verdict}: {words}" if words else verdict, wide, label=26)
    wanted: dict[str, list[str]] = {}
    for ability in abilities:
        for command in ability.install:
            wanted.setdefault(command, []).append(ability.name)
    if wanted:
        lines += ["", "To install"]
    for command, names in wanted.items():
        lines += [f"  {command}", *_row("", f"for {', '.join(names)}", wide, label=2)]
    return lines


def _row(name: str, text: str, width: int, label: int = 12) -> list[str]:
    """A label and what is said of it, wrapped beside it."""
    import textwrap

    lead = f"  {name}".ljust(label) + "  "
    return textwrap.wrap(
        text, width, initial_indent=lead, subsequent_indent=" " * len(lead), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _gpus(findings: Findings) -> str:
    """What torch, llama.cpp and onnxruntime compute on beside the processor."""
    torch, llama, onnx = (findings.checks[name] for name in ("torch", "llama.cpp", "onnxruntime"))
    seen = [f"{gpu['name']}, {_gb(gpu['memory_bytes'])}" for gpu in torch.facts.get("gpus", ())]
    seen += ["Metal"] if torch.facts.get("mps") else []
    others = [name for name in onnx.facts.get("providers", ()) if not name.startswith(("CPU", "Azure"))]
    return "; ".join(
        [
            f"torch: {', '.join(seen) or 'none'}",
            f"llama.cpp: {'offloads' if llama.facts.get('gpu_offload') else 'processor alone'}",
            f"onnxruntime: {', '.join(others) or 'processor alone'}",
        ]
    )
