"""From what was found to what can be done here: yes, yes with limits, or no and why, for each thing cusprun does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from cusprun.doctor.machine import Machine, unused_instructions
from cusprun.doctor.packages import Package, install_command, lacking, reinstall_command
from cusprun.doctor.tools import Tool

Verdict = Literal["yes", "limited", "no"]
LIBRARIES = {  # what is tried, and the package that brings it
    "torch": "torch", "transformers": "transformers", "llama.cpp": "llama-cpp-python", "onnxruntime": "onnxruntime",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing that was tried, in a process of its own."""

    name: str
    ok: bool
    detail: str  # what was found, or how it failed
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """Everything that was looked at."""

    machine: Machine
    packages: tuple[Package, ...]
    tools: dict[str, Tool]
    checks: dict[str, Check]
    unfetchable: tuple[str, ...] = ()  # texts of the catalog that nothing here fetches, one line for each program
    wllama: bool = False  # what runs in the browser is here: it takes no npm


@dataclass(frozen=True)
class Ability:
    """One thing that cusprun does. ``reasons`` say why not, or with which limits; ``install`` mends them."""

    name: str
    core: bool  # of cusprun itself, no extra
    verdict: Verdict
    reasons: tuple[str, ...]
    install: tuple[str, ...]
    note: str = ""  # what it takes, where that is known


class _Case:
    """What speaks against one ability."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.missing: list[str] = []
        self.limits: list[str] = []
        self.install: list[str] = []
        self.note = ""

    def needs(self, *checks: str) -> None:
        """Tries that have to have gone well."""
        for name in checks:
            check = self.findings.checks[name]
            if not check.ok:
                self.missing.append(f"{name}: {check.detail}")

    def needs_packages(self, extra: str | None) -> None:
        short = lacking(self.findings.packages, extra)
        self.missing += map(str, short)
        if short:
            self.install.append(install_command(extra))
        check = self.findings.checks.get(f"packages of {extra}")
        if check is not None and not check.ok:
            self.missing.append(f"{check.name}: {check.detail}")

    def needs_tool(self, name: str) -> None:
        tool = self.findings.tools[name]
        if not tool.here:
            self.missing.append(str(tool))
            self.install.append(tool.install)

    def gains_by(self, name: str) -> None:
        tool = self.findings.tools[name]
        if not tool.here:
            self.limits.append(f"{tool} ({tool.purpose})")
            self.install.append(tool.install)

    def closed(self, name: str, core: bool) -> Ability:
        verdict: Verdict = "no" if self.missing else "limited" if self.limits else "yes"
        reasons, install = dict.fromkeys(self.missing + self.limits), dict.fromkeys(self.install)
        return Ability(name, core, verdict, tuple(reasons), tuple(install), self.note)


def _build(case: _Case) -> None:
    case.needs(*LIBRARIES, "cache")
    case.needs_packages(None)
    here = {package.name: package for package in case.findings.packages if package.satisfied}
    broken = [library for library in LIBRARIES if not case.findings.checks[library].ok]
    if "torch" in broken and "transformers" in broken:
        broken.remove("transformers")  # it stands on torch
    for library in broken:
        if (name := LIBRARIES[library]) in here:
            if library == "llama.cpp" and not case.findings.tools["c++"].here:
                case.install.append(case.findings.tools["c++"].install)
            case.install.append(reinstall_command(f"{name}=={here[name].version}"))


def _build_default(case: _Case) -> None:
    case.needs_packages("demo")
    plan = case.findings.checks["default build"]
    if plan.ok:
        case.note = plan.detail
    elif not case.missing:
        case.missing.append(plan.detail)


def _texts(case: _Case) -> None:
    case.limits += case.findings.unfetchable
    for name in ("npm", "apt-get"):
        tool = case.findings.tools[name]
        if not tool.here and any(f" {name} " in line for line in case.findings.unfetchable):
            case.install.append(tool.install)


def _gguf(case: _Case) -> None:
    case.needs("torch", "llama.cpp")


def _onnx(case: _Case) -> None:
    case.needs("torch", "onnxruntime")


def _measure(case: _Case) -> None:
    case.needs("llama.cpp", "onnxruntime", "torch")
    machine, checks = case.findings.machine, case.findings.checks
    if not machine.counts_energy:
        case.limits.append(f"no energy: {machine.energy}")
    if why := checks["cache"].facts.get("stays_warm"):
        case.limits.append(f"no cold loads: {why}")
    compiled = checks["llama.cpp"].facts.get("system_info")
    if compiled and (idle := unused_instructions(machine.instruction_sets, compiled)):
        case.limits.append(f"llama.cpp was compiled without {', '.join(idle)}, which this processor has")
        case.install.append(reinstall_command("llama-cpp-python"))


def _tasks(case: _Case) -> None:
    case.needs("llama.cpp")
    case.needs_packages("eval")


def _recover(case: _Case) -> None:
    case.needs("torch", "transformers")
    case.needs_packages("recover")


def _gpu(case: _Case) -> None:
    torch, llama = case.findings.checks["torch"], case.findings.checks["llama.cpp"]
    case.needs("torch")
    if torch.ok and not torch.facts["gpus"]:
        built = "was built for the processor alone" if torch.facts["cuda_build"] is None else "sees no CUDA device"
        case.missing.append(f"torch {built}")
        if case.findings.tools["nvidia-smi"].here:
            case.install.append("see pytorch.org/get-started/locally, for torch with CUDA")
    if torch.ok and (trouble := torch.facts["gpu_trouble"]):
        case.missing.append(trouble)
    if not case.missing and llama.ok and not llama.facts["gpu_offload"]:
        case.limits.append(
            "llama.cpp was compiled for the processor alone: set CMAKE_ARGS=-DGGML_CUDA=on in the environment first"
        )
        case.install.append(reinstall_command("llama-cpp-python"))


def _chat(case: _Case) -> None:
    runtimes = {"llama.cpp": "a .gguf", "onnxruntime": "an ONNX folder"}
    broken = [name for name in runtimes if not case.findings.checks[name].ok]
    if len(broken) == len(runtimes):
        case.needs(*runtimes)
    else:
        case.limits += [f"not with {runtimes[name]}: {case.findings.checks[name].detail}" for name in broken]


def _serve(case: _Case) -> None:
    _chat(case)
    case.needs_packages("serve")


def _ship(*tries: str) -> Callable[[_Case], None]:
    """What every bundle needs, and the programs that it is tried with before it leaves."""

    def argue(case: _Case) -> None:
        case.needs_packages("ship")
        for name in tries:
            case.gains_by(name)

    return argue


def _ship_browser(case: _Case) -> None:
    if not case.findings.wllama:
        case.needs_tool("npm")
    _ship("chromium")(case)


# In the order of work; core is what cusprun does without extras.
ABILITIES: tuple[tuple[str, bool, Callable[[_Case], None]], ...] = (
    ("build", True, _build),
    ("build the default expert", False, _build_default),
    ("texts of the catalog", False, _texts),
    ("export to GGUF", True, _gguf),
    ("export to ONNX", True, _onnx),
    ("bench", True, _measure),
    ("eval --tasks", False, _tasks),
    ("build --recover", False, _recover),
    ("--device cuda", False, _gpu),
    ("chat", True, _chat),
    ("serve", False, _serve),
    ("ship --target laptop", False, _ship("ollama", "llama-server")),
    ("ship --target phone", False, _ship("adb")),
    ("ship --target browser", False, _ship_browser),
    ("ship --target server", False, _ship("docker")),
    ("keygen, ship --sign", False, _ship()),
    ("verify, unpack", False, _ship()),
)


def judge(findings: Findings) -> tuple[Ability, ...]:
    """What can be done here, in the order of work."""
    found = []
    for name, core, argue in ABILITIES:
        case = _Case(findings)
        argue(case)
        found.append(case.closed(name, core))
    return tuple(found)


def is_sound(findings: Findings) -> bool:
    """Whether cusprun itself works here, extras aside."""
    return not any(ability.core and ability.verdict == "no" for ability in judge(findings))
