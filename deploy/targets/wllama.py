"""wllama, llama.cpp in WebAssembly, out of its two npm packages: from the cache, a folder of the user's, or by npm.

What is taken must have the pinned sha512, so a bundle's bytes do not depend on where the packages came from.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from cusprun.corpora.cache import cache_folder, make_folder
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import written_whole
from cusprun.progress import say

VERSION = "3.8.1"
LLAMA_CPP = "b11364"  # the llama.cpp in it
FOLDER = "CUSPRUN_WLLAMA"  # names a folder that holds the packages' .tgz files
PATIENCE_S = 300  # for npm
LARGEST = 64 * 2**20  # bytes of a package, and of a file in it


@dataclass(frozen=True)
class Package:
    """An npm package at one version, and what a bundle takes out of it."""

    name: str
    sha512: str  # base64, as npm writes it in dist.integrity
    members: Mapping[str, str]  # path in the package -> path in the bundle

    @property
    def archive(self) -> str:
        """The name that `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{VERSION}.tgz"


PACKAGES = (
    Package(
        "@wllama/wllama",
        "Pl7BEJhPU8OHnV/yhn3DFZYhLLOdSHh+4TND79WCftHnlUAdQPAsyc/CfIOY+4mVxvf5VW3Xw3Uf7BBfotS1gw==",
        {
            "package/esm/index.js": "wllama/wllama.js",
            "package/esm/wasm/wllama.wasm": "wllama/wllama.wasm",
            "package/LICENCE": "LICENSES/wllama.txt",
        },
    ),
    # For browsers without 64-bit memory or without promises in WebAssembly, Safari above all.
    Package(
        "@wllama/wllama-compat",
        "IvmjrJ+JzDbt3w1FQq1yAmnFEiLGCceowK2Q80zW+k9ChFkPBM1ByX/9xm2xVxyd8MHC50VpuDo6SDE83k9kIQ==",
        {
            "package/wasm/wllama.js": "wllama/compat.js",
            "package/wasm/wllama.wasm": "wllama/compat.wasm",
        },
    ),
)


def fetch_wllama(packages: tuple[Package, ...] = PACKAGES) -> dict[str, bytes]:
    """The files of wllama that a bundle holds, by their path in it.

    Raises InvalidRequest where a package is neither here nor to be had, Failed where npm or the disk fails.
    """
    found: dict[str, bytes] = {}
    for package in packages:
        found.update(read_members(_archive(package), package))
    return found


def has_wllama(packages: tuple[Package, ...]) -> bool:
    """Whether :func:`fetch_wllama` finds every package here, so that it takes no npm."""
    return all(any(_checked(path, package) is not None for path in _places(package)) for package in packages)


def read_members(archive: bytes, package: Package) -> dict[str, bytes]:
    """The members that ``package`` names, read in memory; nothing else of the archive is touched or unpacked."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=BytesIO(archive), mode="r:gz") as tar:
        for member, name in package.members.items():
            try:
                info = tar.getmember(member)
            except KeyError:
                raise Failed(f"{package.archive} has no {member}") from None
            file = tar.extractfile(info) if info.isreg() and info.size <= LARGEST else None
            if file is None:
                raise Failed(f"{member} in {package.archive} is no plain file of at most {LARGEST >> 20} MiB")
            found[name] = file.read()
    return found


def _archive(package: Package) -> bytes:
    """The package's bytes; in the cache from then on."""
    cached, *own = _places(package)
    if (archive := _checked(cached, package)) is not None:
        return archive
    if own:
        (given,) = own
        if not given.is_file():
            raise InvalidRequest(f"{FOLDER} names {given.parent}, which has no {package.archive}; {_by_hand(package)}")
        archive = _checked(given, package)
        if archive is None:
            raise InvalidRequest(
                f"{given} is not the published {package.name} {VERSION}: its sha512 is another; {_by_hand(package)}"
            )
    else:
        archive = _packed(package)
    make_folder(cached.parent)
    with written_whole(cached) as part:
        part.write_bytes(archive)
    return archive


def _places(package: Package) -> list[Path]:
    """Where the package is looked for: in the cache, then in the user's folder where one is named."""
    folder = os.environ.get(FOLDER)
    own = [Path(folder).expanduser() / package.archive] if folder else []
    return [cache_folder() / "npm" / package.archive, *own]


def _checked(path: Path, package: Package) -> bytes | None:
    """The file's bytes where it is there and has the pinned sha512."""
    if not path.is_file() or path.stat().st_size > LARGEST:
        return None
    archive = path.read_bytes()
    digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    return archive if digest == package.sha512 else None


def _by_hand(package: Package) -> str:
    return (
        f"where there is a network, `npm pack {package.name}@{VERSION}` writes {package.archive}: put it into a folder "
        f"and name that in {FOLDER}"
    )


def _packed(package: Package) -> bytes:
    """The package from the registry that npm is configured for."""
    npm = shutil.which("npm")
    if npm is None:
        raise InvalidRequest(
            f"a bundle for browsers needs the npm package {package.name} {VERSION}, and npm is not here: install "
            f"Node.js; or {_by_hand(package)}"
        )
    say(f"fetching {package.name} {VERSION} by npm")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{package.name}@{VERSION}", "--ignore-scripts", "--pack-destination", folder]
        try:
            subprocess.run(
                command, cwd=folder, capture_output=True, text=True, errors="replace", check=True, timeout=PATIENCE_S
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"npm did not answer in {PATIENCE_S} s; {_by_hand(package)}") from None
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "npm error" in line or "npm ERR" in line]
            reason = "; ".join(lines[:3]) or error.stderr.strip()[-300:]
            raise Failed(f"npm could not fetch {package.name} {VERSION}: {reason}; {_by_hand(package)}") from None
        archive = _checked(Path(folder) / package.archive, package)
    if archive is None:
        raise Failed(
            f"what npm fetched as {package.name} {VERSION} is not what was published: its sha512 is another; "
            "mind the registry in `npm config get registry`"
        )
    return archive
