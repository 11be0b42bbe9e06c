"""Tiny wheels, npm tarballs and Debian packages, built as the real ones are, and hostile ones."""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def make_wheel(path: Path, files: Mapping[str, str | bytes]) -> Path:
    """A zip archive of these members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tar_bytes(files: Mapping[str, str | bytes], links: Mapping[str, str] | None = None) -> bytes:
    """An uncompressed tar of these members and symbolic links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def make_npm(path: Path, files: Mapping[str, str | bytes], links: Mapping[str, str] | None = None) -> Path:
    """A gzipped tarball, as `npm pack` writes."""
    import gzip

    path.write_bytes(gzip.compress(tar_bytes(files, links)))
    return path


def make_deb(path: Path, files: Mapping[str, str | bytes], links: Mapping[str, str] | None = None) -> Path:
    """An ar archive of debian-binary, control.tar.xz and data.tar.xz."""
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": lzma.compress(tar_bytes({"./control": "Package: tiny\n"})),
        "data.tar.xz": lzma.compress(tar_bytes(files, links)),
    }
    content = b"!<arch>\n"
    for name, data in parts.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        content += data + b"\n" * (len(data) % 2)
    path.write_bytes(content)
    return path
