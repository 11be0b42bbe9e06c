"""Bundles as one file, .tar.zst or .zip: the same files give the same bytes, whenever and wherever they are packed.

Only regular files in a fixed form are written, so the reader takes that form alone, byte for byte: no links, no
folders, no dates, no comments, nothing behind the end, and no two files of one name. A .zip stores its files as they
are, because quantized weights hardly shrink and compressors differ from machine to machine; it ends at 4 GiB.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from cusprun.deploy.manifest import MOST_FILES
from cusprun.deploy.names import Names
from cusprun.errors import Failed, InvalidRequest, MissingPackage

SUFFIXES = {"tar.zst": ".tar.zst", "zip": ".zip"}
PIECE = 1 << 20
BLOCK = 512  # bytes of a tar header
LEVEL = 10
WINDOW_BITS = 23  # a .zst makes its reader keep 8 MiB
MOST_BYTES = 256 << 30  # of all files together
LARGEST_RATIO = 100  # files over archive, beyond what is small
SMALL = 256 << 20
# Zstandard's magic number, a frame with a checksum and nothing else, and its window.
FRAME = bytes((0x28, 0xB5, 0x2F, 0xFD, 0x04, WINDOW_BITS - 10 << 3))
# A frame that decompressors skip, with the sha256 of all before it: a compressed stream has bits that mean nothing.
SEAL = struct.pack("<II", 0x184D2A5C, 32)
SIP = 1024  # compressed bytes taken at a time: no more than 32 MiB come of them
USTAR_LARGEST = 8 << 30
ZIP_LARGEST = 0xFFFFFFFF
ZIP_EPOCH = 0x0021  # 1980-01-01, the first date that a .zip knows
UTF8_NAMES = 0x0800
LOCAL, CENTRAL, END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
KINDS = {
    tarfile.LNKTYPE: "a link", tarfile.SYMTYPE: "a link", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe", tarfile.DIRTYPE: "a folder", tarfile.GNUTYPE_SPARSE: "a file with holes",
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """One file to pack."""

    name: str
    path: Path
    size: int  # bytes
    executable: bool


@dataclass(frozen=True)
class Member:
    """One file of an archive that is read; ``pieces`` has to be used up before the next member."""

    name: str
    size: int  # bytes
    executable: bool
    pieces: Iterator[bytes]


def archive_kind(path: Path) -> str | None:
    """The kind of archive that a file's name says; None where it says none."""
    return next((kind for kind, suffix in SUFFIXES.items() if path.name.lower().endswith(suffix)), None)


def write_archive(path: Path, kind: str, top: str, files: Iterable[Packed]) -> None:
    """Packs ``files`` below one folder named ``top``. Raises InvalidRequest where a .zip cannot hold them."""
    rows = [Packed(f"{top}/{file.name}", file.path, file.size, file.executable) for file in files]
    with path.open("xb") as sink:
        (_write_tar if kind == "tar.zst" else _write_zip)(sink, rows)


def read_archive(path: Path) -> Iterator[Member]:
    """The files of an archive, names without the folder around them.

    Raises InvalidRequest where the file's name is no archive's; Failed where it is not an archive that
    :func:`write_archive` wrote, with what is wrong.
    """
    kind = archive_kind(path)
    if kind is None:
        raise InvalidRequest(f"{path} is no bundle: name a folder, a {' or a '.join(SUFFIXES.values())}")
    return _checked(path, _read_tar(path) if kind == "tar.zst" else _read_zip(path))


def _checked(path: Path, members: Iterable[Member]) -> Iterator[Member]:
    """Members with names that may be, within limits."""
    names, total, top = Names(), 0, None
    most = min(MOST_BYTES, max(SMALL, LARGEST_RATIO * path.stat().st_size))
    for count, member in enumerate(members, 1):
        if count > MOST_FILES + 2:
            raise Failed(f"{path.name} has more than {MOST_FILES} files, the most that a bundle has")
        if (reason := names.take(member.name)) is not None:
            raise Failed(f"{path.name}: {_shown(member.name)} {reason}")
        folder, slash, name = member.name.partition("/")
        if not slash or top not in (None, folder):
            raise Failed(f"{path.name}: {member.name} does not lie in the one folder that a bundle has")
        top, total = folder, total + member.size
        if total > most:
            raise Failed(f"{path.name} would unpack to more than {most >> 20} MiB: it is no bundle of this size")
        yield Member(name, member.size, member.executable, member.pieces)
    if top is None:
        raise Failed(f"{path.name} is empty")


# tar.zst -------------------------------------------------------------------------------------------------------------


class _Hashed:
    """Writes on, and hashes what it wrote."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink, self.digest = sink, hashlib.sha256()

    def write(self, piece: bytes) -> int:
        self.digest.update(piece)
        return self._sink.write(piece)


def _write_tar(sink: BinaryIO, files: Iterable[Packed]) -> None:
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
            stream.write(_tar_header(file.name, file.size, file.executable))
            for piece in _exactly(file):
                stream.write(piece)
            stream.write(bytes(-file.size % BLOCK))
        stream.write(bytes(2 * BLOCK))


def _tar_header(name: str, size: int, executable: bool) -> bytes:
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


def _read_tar(path: Path) -> Iterator[Member]:
    with path.open("rb") as file:
        frame = _Frame(path, file)
        while (header := frame.read(BLOCK)) != bytes(BLOCK):
            yield _tar_member(path, header, frame.read)
        if frame.read(BLOCK) != bytes(BLOCK):
            _damaged(path, "its end is not one")
        frame.close()


class _Frame:
    """One frame of Zstandard, read in bounded memory; what it began with is what :func:`_write_tar` writes."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._left = _check_seal(path, file)
        zstandard = _zstandard()
        self._path, self._file, self._error = path, file, zstandard.ZstdError
        self._stream = zstandard.ZstdDecompressor(max_window_size=1 << WINDOW_BITS).decompressobj()
        begin = self._sip(len(FRAME))
        if begin != FRAME:
            _damaged(path, "it does not begin as a .tar.zst of ours")
        self._ready = bytearray(self._decompress(begin))

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes. Raises Failed where there are fewer."""
        while len(self._ready) < count:
            piece = b"" if self._stream.eof else self._sip()
            if not piece:
                _damaged(self._path, "it ends before its end")
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
            _damaged(self._path, "it ends before its end")
        if self._ready or self._stream.unused_data or self._left:
            _damaged(self._path, "something stands behind its end")

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
        _damaged(path, "it does not end as a .tar.zst of ours")
    file.seek(0)
    digest, left = hashlib.sha256(), length
    while left:
        piece = file.read(min(left, PIECE))
        digest.update(piece)
        left -= len(piece)
    if digest.digest() != seal[len(SEAL) :]:
        _damaged(path, "its bytes are not those that it was written with")
    file.seek(0)
    return length


def _tar_member(path: Path, header: bytes, read: Callable[[int], bytes]) -> Member:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise Failed(f"{path.name} is damaged: {error}") from error
    if info.type != tarfile.REGTYPE:
        kind = KINDS.get(info.type, "an entry of a kind that is not a file")
        raise Failed(f"{path.name}: {_shown(info.name)} is {kind}, and a bundle holds plain files alone")
    if info.size < 0 or info.size > MOST_BYTES:
        raise Failed(f"{path.name}: {_shown(info.name)} has a size that cannot be")
    executable = bool(info.mode & 0o100)

    def pieces() -> Iterator[bytes]:
        try:
            wanted = _tar_header(info.name, info.size, executable)
        except (InvalidRequest, UnicodeError):
            wanted = b""
        if wanted != header:
            _damaged(path, f"the header of {_shown(info.name)} is not as `cusprun-edge ship` writes it")
        left = info.size
        while left:
            yield read(min(left, PIECE))
            left -= min(left, PIECE)
        if (padding := -info.size % BLOCK) and read(padding) != bytes(padding):
            _damaged(path, f"something stands behind {info.name}")

    return Member(info.name, info.size, executable, pieces())


# zip -----------------------------------------------------------------------------------------------------------------


def _write_zip(sink: BinaryIO, files: Iterable[Packed]) -> None:
    central: list[bytes] = []
    for file in files:
        crc = 0
        for piece in _exactly(file):
            crc = zlib.crc32(piece, crc)
        offset = sink.tell()
        local, entry = _zip_headers(file.name, file.size, crc, file.executable, offset)
        central.append(entry)
        sink.write(local)
        for piece in _exactly(file):
            sink.write(piece)
    start = sink.tell()
    sink.write(b"".join(central))
    if sink.tell() + END.size > ZIP_LARGEST:
        raise InvalidRequest("a .zip holds 4 GiB at most: write --archive tar.zst")
    sink.write(_zip_end(len(central), sink.tell() - start, start))


def _zip_headers(name: str, size: int, crc: int, executable: bool, offset: int) -> tuple[bytes, bytes]:
    """The header before a file and its line in the directory at the end."""
    if max(size, offset) > ZIP_LARGEST - (1 << 20):
        raise InvalidRequest("a .zip holds 4 GiB at most: write --archive tar.zst")
    encoded = name.encode()
    mode = (0o100755 if executable else 0o100644) << 16
    unix = 3 << 8 | 20
    local = LOCAL.pack(b"PK\x03\x04", 20, UTF8_NAMES, 0, 0, ZIP_EPOCH, crc, size, size, len(encoded), 0)
    entry = CENTRAL.pack(
        b"PK\x01\x02", unix, 20, UTF8_NAMES, 0, 0, ZIP_EPOCH, crc, size, size, len(encoded), 0, 0, 0, 0, mode, offset
    )
    return local + encoded, entry + encoded


def _zip_end(count: int, size: int, start: int) -> bytes:
    return END.pack(b"PK\x05\x06", 0, 0, count, count, size, start, 0)


def _read_zip(path: Path) -> Iterator[Member]:
    with path.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        file.seek(max(0, length - END.size))
        end = file.read()
        if len(end) != END.size or not end.startswith(b"PK\x05\x06"):
            _damaged(path, "it does not end as a .zip of ours")
        _, _, _, count, _, size, start, _ = END.unpack(end)
        if count > MOST_FILES + 2:
            raise Failed(f"{path.name} has more than {MOST_FILES} files, the most that a bundle has")
        if end != _zip_end(count, size, start) or start + size + END.size != length:
            _damaged(path, "its directory is not where it should be")
        file.seek(start)
        directory = file.read(size)
        offset = at = 0
        for _ in range(count):
            member, offset, at = _zip_member(path, file, directory, at, offset)
            yield member
        if at != size or offset != start:
            _damaged(path, "something stands between its files")


def _zip_member(path: Path, file: BinaryIO, directory: bytes, at: int, offset: int) -> tuple[Member, int, int]:
    """One file, where the next one begins, and where its line in the directory does."""
    line = directory[at : at + CENTRAL.size]
    if len(line) != CENTRAL.size or not line.startswith(b"PK\x01\x02"):
        _damaged(path, "its directory ends before its end")
    _, made, _, flags, method, _, _, crc, packed, size, length, *_, outside, _ = CENTRAL.unpack(line)
    encoded = directory[at + CENTRAL.size : at + CENTRAL.size + length]
    name = encoded.decode("utf-8", "surrogateescape")
    kind = outside >> 28 if made >> 8 == 3 else 0o10
    if kind != 0o10 or name.endswith("/"):
        what = {0o12: "a link", 0o4: "a folder"}.get(4 if name.endswith("/") else kind, "no file")
        raise Failed(f"{path.name}: {_shown(name)} is {what}, and a bundle holds plain files alone")
    if method or packed != size:
        raise Failed(f"{path.name}: {_shown(name)} is compressed, and a .zip of ours stores its files as they are")
    if flags & 1:
        raise Failed(f"{path.name}: {_shown(name)} is encrypted: unpack it and verify the folder")
    executable = bool(outside >> 16 & 0o100)

    def pieces() -> Iterator[bytes]:
        try:
            local, entry = _zip_headers(name, size, crc, executable, offset)
        except (InvalidRequest, UnicodeError):
            local = entry = b""
        file.seek(offset)
        if file.read(len(local)) != local or directory[at : at + len(entry)] != entry or not entry:
            _damaged(path, f"the header of {_shown(name)} is not as `cusprun-edge ship` writes it")
        left, found = size, 0
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                _damaged(path, "it ends before its end")
            left, found = left - len(piece), zlib.crc32(piece, found)
            yield piece
        if found != crc:
            _damaged(path, f"{name} has another checksum than its header says")

    member = Member(name, size, executable, pieces())
    return member, offset + LOCAL.size + length + size, at + CENTRAL.size + length


# both ----------------------------------------------------------------------------------------------------------------


def _exactly(file: Packed) -> Iterator[bytes]:
    """A file's bytes. Raises Failed where there are more or fewer than was said."""
    left = file.size
    with file.path.open("rb") as source:
        while piece := source.read(PIECE):
            left -= len(piece)
            if left < 0:
                break
            yield piece
    if left:
        raise Failed(f"{file.path} changed while it was packed: give the same command again")


def _shown(name: str) -> str:
    """A name from outside for a message: no control characters, of bounded length."""
    return ascii(name)[:120]


def _damaged(path: Path, what: str) -> NoReturn:
    raise Failed(f"{path.name} is damaged: {what}")


def _zstandard() -> Any:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise MissingPackage("zstandard", "ship", "a .tar.zst") from error
    return zstandard
