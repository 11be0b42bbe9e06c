"""A .tar.zst in one form: plain files of nobody's, without a date, in one Zstandard frame, sealed by a sha256."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cusprun.deploy.members import MOST_BYTES, PIECE, Member, Packed, damaged, exactly, shown
from cusprun.errors import Failed, InvalidRequest, MissingPackage

BLOCK = 512  # bytes of a tar header
LEVEL = 10
WINDOW_BITS = 23  # a .zst makes its reader keep 8 MiB
# Zstandard's magic number, a frame with a checksum and nothing else, and its window.
FRAME = bytes((0x28, 0xB5, 0x2F, 0xFD, 0x04, WINDOW_BITS - 10 << 3))
# A frame that decompressors skip, with the sha256 of all before it: a compressed stream has bits that mean nothing.
SEAL = struct.pack("<II", 0x184D2A5C, 32)
SIP = 1024  # compressed bytes taken at a time: no more than 32 MiB come of them
USTAR_LARGEST = 8 << 30
KINDS = {
    tarfile.LNKTYPE: "a link", tarfile.SYMTYPE: "a link", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe", tarfile.DIRTYPE: "a folder", tarfile.GNUTYPE_SPARSE: "a file with holes",
}  # fmt: skip


class _Hashed:
    """Writes on, and hashes what it wrote."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink, self.digest = sink, hashlib.sha256()

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        return self._sink.write(piece)


def write_tar(sink: BinaryIO, files: Iterable[Packed]) -> None:
    """Writes the archive. Raises InvalidRequest where a name is too long for a .tar."""
    hashed = _Hashed(sink)
    _write_frame(hashed, files)
    sink.write(SEAL + hashed.digest.digest())


def _write_frame(sink: _Hashed, files: Iterable[Packed]) -> None:
    zstandard = _zstandard()
    settings = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, window_log=WINDOW_BITS, write_checksum=True, write_content_size=False, threads=0
    )
    compressor = zstandard.ZstdCompressor(compression_params=settings)
    with compressor.stream_writer(sink, closefd=False) as stream:
        for file in files:
            stream.write(tar_header(file.name, file.size, file.executable))
            for piece in exactly(file):
                stream.write(piece)
            stream.write(bytes(-file.size % BLOCK))
        stream.write(bytes(2 * BLOCK))


def tar_header(name: str, size: int, executable: bool) -> bytes:
    """The 512 bytes before a file."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o755 if executable else 0o644, 0
    try:
        if size < USTAR_LARGEST:
            header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        else:
            header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    except ValueError as error:
        raise InvalidRequest(f"a .tar cannot hold {name}: {error}") from error
    if len(header) != BLOCK:
        raise InvalidRequest(f"a .tar cannot hold {name}: its path is too long")
    return header


def read_tar(path: Path) -> Iterator[Member]:
    """The files of the archive. Raises Failed where it is not one that :func:`write_tar` wrote."""
    with path.open("rb") as file:
        frame = _Frame(path, file)
        while (header := frame.read(BLOCK)) != bytes(BLOCK):
            yield _tar_member(path, header, frame.read)
        if frame.read(BLOCK) != bytes(BLOCK):
            damaged(path, "its end is not one")
        frame.close()


class _Frame:
    """One frame of Zstandard, read in bounded memory; what it began with is what :func:`write_tar` writes."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._left = _check_seal(path, file)
        zstandard = _zstandard()
        self._path, self._file, self._error = path, file, zstandard.ZstdError
        self._stream = zstandard.ZstdDecompressor(max_window_size=1 << WINDOW_BITS).decompressobj()
        begin = self._sip(len(FRAME))
        if begin != FRAME:
            damaged(path, "it does not begin as a .tar.zst of ours")
        self._ready = bytearray(self._decompress(begin))

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes. Raises Failed where there are fewer."""
        while len(self._ready) < count:
            piece = b"" if self._stream.eof else self._sip()
            if not piece:
                damaged(self._path, "it ends before its end")
            self._ready += self._decompress(piece)
        found = bytes(self._ready[:count])
        del self._ready[:count]
        return found

    def close(self) -> None:
        """Raises Failed where anything stands behind what was read, or the frame's own checksum is missing."""
        while not self._stream.eof and (piece := self._sip()):
            self._ready += self._decompress(piece)
            if self._ready:
                break
        if not self._stream.eof and not self._ready:
            damaged(self._path, "it ends before its end")
        if self._ready or self._stream.unused_data or self._left:
            damaged(self._path, "something stands behind its end")

    def _sip(self, most: int = SIP) -> bytes:
        """The next compressed bytes before the seal."""
        piece = self._file.read(min(most, self._left))
        self._left -= len(piece)
        return piece

    def _decompress(self, piece: bytes) -> bytes:
        try:
            return bytes(self._stream.decompress(piece))
        except self._error as error:
            raise Failed(f"{self._path.name} is damaged: it does not decompress ({error})") from error


def _check_seal(path: Path, file: BinaryIO) -> int:
    """Bytes before the seal. Raises Failed where they are not those that were sealed."""
    length = file.seek(0, io.SEEK_END) - len(SEAL) - 32
    file.seek(max(0, length))
    seal = file.read()
    if length < 0 or not seal.startswith(SEAL):
        damaged(path, "it does not end as a .tar.zst of ours")
    file.seek(0)
    digest, left = hashlib.sha256(), length
    while left:
        piece = file.read(min(left, PIECE))
        digest.update(piece)
        left -= len(piece)
    if digest.digest() != seal[len(SEAL) :]:
        damaged(path, "its bytes are not those that it was written with")
    file.seek(0)
    return length


def _tar_member(path: Path, header: bytes, read: Callable[[int], bytes]) -> Member:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise Failed(f"{path.name} is damaged: {error}") from error
    if info.type != tarfile.REGTYPE:
        kind = KINDS.get(info.type, "an entry of a kind that is not a file")
        raise Failed(f"{path.name}: {shown(info.name)} is {kind}, and a bundle holds plain files alone")
    if info.size < 0 or info.size > MOST_BYTES:
        raise Failed(f"{path.name}: {shown(info.name)} has a size that cannot be")
    executable = bool(info.mode & 0o100)

    def pieces() -> Iterator[bytes]:
        try:
            wanted = tar_header(info.name, info.size, executable)
        except (InvalidRequest, UnicodeError):
            wanted = b""
        if wanted != header:
            damaged(path, f"the header of {shown(info.name)} is not as `cusprun-edge ship` writes it")
        left = info.size
        while left:
            yield read(min(left, PIECE))
            left -= min(left, PIECE)
        if (padding := -info.size % BLOCK) and read(padding) != bytes(padding):
            damaged(path, f"something stands behind {info.name}")

    return Member(info.name, info.size, executable, pieces())


def _zstandard() -> Any:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise MissingPackage("zstandard", "ship", "a .tar.zst") from error
    return zstandard
