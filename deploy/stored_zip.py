"""A .zip in one form: files stored as they are, all of 1980-01-01, nothing between or behind them; 4 GiB at most."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from cusprun.deploy.manifest import MOST_FILES
from cusprun.deploy.members import PIECE, Member, Packed, damaged, exactly, shown
from cusprun.deploy.names import LONGEST
from cusprun.errors import Failed, InvalidRequest

LARGEST = 0xFFFFFFFF
EPOCH = 0x0021  # 1980-01-01, the first date that a .zip knows
UTF8_NAMES = 0x0800
LOCAL, CENTRAL, END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")


def write_zip(sink: BinaryIO, files: Iterable[Packed]) -> None:
    """Writes the archive. Raises InvalidRequest where it would be larger than 4 GiB."""
    central: list[bytes] = []
    for file in files:
        crc = 0
        for piece in exactly(file):
            crc = zlib.crc32(piece, crc)
        offset = sink.tell()
        local, entry = zip_headers(file.name, file.size, crc, file.executable, offset)
        central.append(entry)
        sink.write(local)
        for piece in exactly(file):
            sink.write(piece)
    start = sink.tell()
    sink.write(b"".join(central))
    if sink.tell() + END.size > LARGEST:
        raise InvalidRequest("a .zip holds 4 GiB at most: write --archive tar.zst")
    sink.write(zip_end(len(central), sink.tell() - start, start))


def zip_headers(name: str, size: int, crc: int, executable: bool, offset: int) -> tuple[bytes, bytes]:
    """The header before a file and its line in the directory at the end."""
    if max(size, offset) > LARGEST - (1 << 20):
        raise InvalidRequest("a .zip holds 4 GiB at most: write --archive tar.zst")
    encoded = name.encode()
    mode = (0o100755 if executable else 0o100644) << 16
    unix = 3 << 8 | 20
    local = LOCAL.pack(b"PK\x03\x04", 20, UTF8_NAMES, 0, 0, EPOCH, crc, size, size, len(encoded), 0)
    entry = CENTRAL.pack(
        b"PK\x01\x02", unix, 20, UTF8_NAMES, 0, 0, EPOCH, crc, size, size, len(encoded), 0, 0, 0, 0, mode, offset
    )
    return local + encoded, entry + encoded


def zip_end(count: int, size: int, start: int) -> bytes:
    """What stands behind the directory: how many files, how long it is, where it begins."""
    return END.pack(b"PK\x05\x06", 0, 0, count, count, size, start, 0)


def read_zip(path: Path) -> Iterator[Member]:
    """The files of the archive. Raises Failed where it is not one that :func:`write_zip` wrote."""
    with path.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        file.seek(max(0, length - END.size))
        end = file.read()
        if len(end) != END.size or not end.startswith(b"PK\x05\x06"):
            damaged(path, "it does not end as a .zip of ours")
        _, _, _, count, _, size, start, _ = END.unpack(end)
        if count > MOST_FILES + 2:
            raise Failed(f"{path.name} has more than {MOST_FILES} files, the most that a bundle has")
        if end != zip_end(count, size, start) or start + size + END.size != length:
            damaged(path, "its directory is not where it should be")
        if size > count * (CENTRAL.size + LONGEST):
            raise Failed(f"{path.name}: a file in it has a path of more than {LONGEST} bytes, or it is no .zip of ours")
        file.seek(start)
        directory = file.read(size)
        offset = at = 0
        for _ in range(count):
            member, offset, at = _zip_member(path, file, directory, at, offset)
            yield member
        if at != size or offset != start:
            damaged(path, "something stands between its files")


def _zip_member(path: Path, file: BinaryIO, directory: bytes, at: int, offset: int) -> tuple[Member, int, int]:
    """One file, where the next one begins, and where its line in the directory does."""
    line = directory[at : at + CENTRAL.size]
    if len(line) != CENTRAL.size or not line.startswith(b"PK\x01\x02"):
        damaged(path, "its directory ends before its end")
    _, made, _, flags, method, _, _, crc, packed, size, length, *_, outside, _ = CENTRAL.unpack(line)
    encoded = directory[at + CENTRAL.size : at + CENTRAL.size + length]
    name = encoded.decode("utf-8", "surrogateescape")
    kind = outside >> 28 if made >> 8 == 3 else 0o10
    if kind != 0o10 or name.endswith("/"):
        what = {0o12: "a link", 0o4: "a folder"}.get(4 if name.endswith("/") else kind, "no file")
        raise Failed(f"{path.name}: {shown(name)} is {what}, and a bundle holds plain files alone")
    if method or packed != size:
        raise Failed(f"{path.name}: {shown(name)} is compressed, and a .zip of ours stores its files as they are")
    if flags & 1:
        raise Failed(f"{path.name}: {shown(name)} is encrypted: unpack it and verify the folder")
    executable = bool(outside >> 16 & 0o100)

    def pieces() -> Iterator[bytes]:
        try:
            local, entry = zip_headers(name, size, crc, executable, offset)
        except (InvalidRequest, UnicodeError):
            local = entry = b""
        file.seek(offset)
        if file.read(len(local)) != local or directory[at : at + len(entry)] != entry or not entry:
            damaged(path, f"the header of {shown(name)} is not as `cusprun-edge ship` writes it")
        left, found = size, 0
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                damaged(path, "it ends before its end")
            left, found = left - len(piece), zlib.crc32(piece, found)
            yield piece
        if found != crc:
            damaged(path, f"{name} has another checksum than its header says")

    member = Member(name, size, executable, pieces())
    return member, offset + LOCAL.size + length + size, at + CENTRAL.size + length
