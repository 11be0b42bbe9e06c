"""What cusprun asks of other packages, by the installed metadata, and what of it is here."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from packaging.requirements import Requirement

OURS = "cusprun"


@dataclass(frozen=True)
class Package:
    """One requirement of cusprun itself (``extra`` None) or of one of its extras."""

    name: str
    extra: str | None
    wanted: str  # such as ">=2.6", empty where any version will do
    version: str | None  # None where it is not installed

    @property
    def satisfied(self) -> bool:
        return self.version is not None and Requirement(f"x{self.wanted}").specifier.contains(
            self.version, prereleases=True
        )

    def __str__(self) -> str:
        if self.version is None:
            return f"{self.name}{self.wanted} is missing"
        return f"{self.name} {self.version} is here and {self.wanted} is needed"


def read_packages(ours: str = OURS) -> tuple[Package, ...]:
    """Every requirement that holds on this system and Python, cusprun's own first."""
    metadata = distribution(ours).metadata
    extras = [None, *(metadata.get_all("Provides-Extra") or ())]
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or ()]
    found = [
        Package(requirement.name, extra, str(requirement.specifier), _version(requirement.name))
        for extra in extras
        for requirement in requirements
        if requirement.name != ours and _belongs(requirement, extra)
    ]
    return tuple(found)


def _belongs(requirement: Requirement, extra: str | None) -> bool:
    """Whether a requirement is one of that extra and not one without it."""
    if requirement.marker is None:
        return extra is None
    without = requirement.marker.evaluate({"extra": ""})
    return without if extra is None else requirement.marker.evaluate({"extra": extra}) and not without


def _version(name: str) -> str | None:
    try:
        found: str | None = distribution(name).version
    except PackageNotFoundError:
        return None
    return found


def lacking(packages: Iterable[Package], extra: str | None) -> list[Package]:
    """Those of an extra that are missing or too old."""
    return [package for package in packages if package.extra == extra and not package.satisfied]


def modules(packages: Iterable[Package]) -> list[str]:
    """One name to import for each package that is installed."""
    return [next(_modules(distribution(package.name))) for package in packages if package.version is not None]


def _modules(installed: Distribution) -> Iterator[str]:
    """The top-level modules of a package, first the one that is called like it."""
    name = installed.metadata["Name"].lower().replace("-", "_")
    tops = {
        file.parts[0].removesuffix(".py")
        for file in installed.files or ()
        if file.parts[-1] == "__init__.py" or (len(file.parts) == 1 and file.suffix == ".py")
    }
    own = sorted(top for top in tops if not top.startswith("_"))
    yield from sorted(own, key=lambda top: top.lower() != name)
    yield name


def install_command(extra: str | None = None) -> str:
    """The command that adds an extra (or what cusprun itself lacks) to this very Python."""
    wanted = _source() + (f"[{extra}]" if extra else "")
    return " ".join([*_pip(), "install", *(["-e"] if _editable() else []), quoted(wanted)])


def reinstall_command(package: str) -> str:
    """The command that builds a package of native code anew for this machine."""
    return " ".join([*_pip(), "install", "--force-reinstall", "--no-deps", "--no-cache-dir", quoted(package)])


def quoted(word: str) -> str:
    """A word as the system's shell reads it."""
    if sys.platform == "win32":
        return subprocess.list2cmdline([word]) if " " in word else word
    return shlex.quote(word)


def _pip() -> list[str]:
    """`pip` where the shell finds this Python's, else this Python by its path."""
    pip = shutil.which("pip")
    ours = Path(sys.executable).parent
    return ["pip"] if pip is not None and Path(pip).parent == ours else [quoted(sys.executable), "-m", "pip"]


def _direct_url() -> dict[str, object]:
    text = distribution(OURS).read_text("direct_url.json")
    return json.loads(text) if text else {}


def _editable() -> bool:
    folder = _direct_url().get("dir_info")
    return isinstance(folder, dict) and bool(folder.get("editable"))


def _source() -> str:
    """The checkout that cusprun was installed from and may be edited in, else its name."""
    url = urlparse(str(_direct_url().get("url", "")))
    return unquote(url.path) if _editable() and url.scheme == "file" else OURS
