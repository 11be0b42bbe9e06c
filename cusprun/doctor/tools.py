"""Programs beside Python that a step needs or gains by: where they are, and how this system installs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 20.0  # for a program to tell its version
# What installs packages, in the order in which it is looked for.
MANAGERS = {
    "pkg": "pkg install",
    "apt-get": "apt-get install",
    "dnf": "dnf install",
    "pacman": "pacman -S",
    "zypper": "zypper install",
    "apk": "apk add",
    "brew": "brew install",
    "winget": "winget install",
}


@dataclass(frozen=True)
class Program:
    """What is looked for; ``packages`` is by package manager, ``page`` is where it comes from elsewhere."""

    purpose: str
    names: tuple[str, ...]
    packages: dict[str, str]
    page: str


PROGRAMS = {
    "c++": Program(
        "compiles llama-cpp-python, which is published as source",
        ("c++", "g++", "clang++", "cl"),
        {"apt-get": "build-essential", "dnf": "gcc-c++", "pacman": "base-devel", "zypper": "gcc-c++",
         "apk": "build-base", "pkg": "clang", "winget": "Microsoft.VisualStudio.2022.BuildTools"},
        "a C++ compiler of your system",
    ),
    "npm": Program(
        "fetches what runs in the browser, and some texts of the catalog",
        ("npm",),
        {"apt-get": "npm", "dnf": "nodejs-npm", "pacman": "npm", "zypper": "npm", "apk": "npm", "pkg": "nodejs",
         "brew": "node", "winget": "OpenJS.NodeJS"},
        "nodejs.org",
    ),
    "apt-get": Program("fetches some texts of the catalog", ("apt-get",), {}, "Debian and Ubuntu have it"),
    "chromium": Program(
        "opens a report or a browser bundle",
        ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
        {"apt-get": "chromium", "dnf": "chromium", "pacman": "chromium", "zypper": "chromium", "apk": "chromium",
         "brew": "--cask chromium", "winget": "Google.Chrome"},
        "chromium.org",
    ),
    "nvidia-smi": Program("tells of an NVIDIA GPU", ("nvidia-smi",), {}, "nvidia.com/drivers"),
    "ollama": Program(
        "tries a laptop bundle's Modelfile",
        ("ollama",),
        {"pacman": "ollama", "brew": "ollama", "winget": "Ollama.Ollama", "pkg": "ollama"},
        "ollama.com/download",
    ),
    "llama-server": Program(
        "tries a laptop bundle's start script",
        ("llama-server",),
        {"brew": "llama.cpp", "winget": "ggml.llamacpp", "pkg": "llama-cpp"},
        "github.com/ggml-org/llama.cpp",
    ),
    "adb": Program(
        "copies a bundle to a phone",
        ("adb",),
        {"apt-get": "adb", "dnf": "android-tools", "pacman": "android-tools", "zypper": "android-tools",
         "apk": "android-tools", "brew": "--cask android-platform-tools", "winget": "Google.PlatformTools"},
        "developer.android.com/tools/releases/platform-tools",
    ),
    "docker": Program(
        "puts a server bundle into a container",
        ("docker", "podman"),
        {"apt-get": "docker.io", "dnf": "podman", "pacman": "docker", "zypper": "docker", "apk": "docker",
         "brew": "--cask docker", "winget": "Docker.DockerDesktop"},
        "docs.docker.com/get-docker",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """A program that was looked for. ``version`` is None where it is not here or did not say one."""

    name: str
    purpose: str
    path: str | None
    version: str | None
    install: str  # the command, or where it comes from

    @property
    def here(self) -> bool:
        return self.path is not None and self.version is not None

    def __str__(self) -> str:
        return f"{self.name} at {self.path} does not run" if self.path else f"{self.name} is missing"


def find_tool(name: str) -> Tool:
    """Looks for a program of PROGRAMS and asks it for its version."""
    program = PROGRAMS[name]
    path = next((found for one in program.names if (found := shutil.which(one))), None)
    return Tool(name, program.purpose, path, _version(path) if path else None, install_command(name))


def _version(path: str) -> str | None:
    """The line in which a program tells its version, of nvidia-smi the first GPU; None where it does not run."""
    flags = {"cl": [], "nvidia-smi": ["-L"]}
    arguments = flags.get(Path(path).stem.lower(), ["--version"])
    try:
        done = subprocess.run(
            [path, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=PATIENCE_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines()]
    return next((line for line in lines if re.search(r"\d+\.\d+|\d{3}", line)), None) if done.returncode == 0 else None


def install_command(name: str) -> str:
    """How this system installs a program: a command where its package manager has it, else where it comes from."""
    program = PROGRAMS[name]
    if name == "c++" and sys.platform == "darwin":
        return "xcode-select --install"
    manager = package_manager()
    if manager is None or manager not in program.packages:
        return f"see {program.page}"
    as_root = manager in ("apt-get", "dnf", "pacman", "zypper", "apk") and hasattr(os, "geteuid") and os.geteuid() != 0
    return f"{'sudo ' if as_root else ''}{MANAGERS[manager]} {program.packages[manager]}"


def package_manager() -> str | None:
    """What installs programs here; Termux's pkg counts there alone, since FreeBSD's has the same name."""
    if sys.platform in ("darwin", "win32"):
        manager = "brew" if sys.platform == "darwin" else "winget"
        return manager if shutil.which(manager) else None
    termux = "com.termux" in os.environ.get("PREFIX", "")
    return next((name for name in MANAGERS if (name != "pkg" or termux) and shutil.which(name)), None)
