"""The members of a plain tar, found from its headers alone: what the hot path needs and `tarfile` is slow at.

Reads what WebDataset's writer and GNU tar write: ustar headers, pax and GNU long names. Anything else is refused, and
so is an archive without its end mark: one that was cut off between two members would otherwise read as a shorter one.
"""

from __future__ import annotations

from mmap import mmap
from typing import NamedTuple

import numpy as np

from lcm_ds.errors import InputError

BLOCK = 512
_END = bytes(BLOCK)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class Member(NamedTuple):
    """A file in a tar: its bytes lie at `offset`, `size` of them."""

    name: str
    offset: int
    size: int


def read_members(data: mmap | bytes, where: str) -> list[Member]:
    """The regular files of the tar in `data`, in order. Raises InputError, which begins with `where`."""
    if (packed := _COMPRESSED.get(data[:2])) is not None:
        raise InputError(f"{where}: is compressed ({packed}); shards are plain tars")
    members: list[Member] = []
    headers: list[int] = []  # numbers of their blocks
    sums: list[int] = []
    long_name: str | None = None
    at = 0
    while (header := data[at : at + BLOCK]) != _END:
        if len(header) < BLOCK:
            raise InputError(f"{where}: is cut off: it ends at byte {len(data)} without a tar's end mark")
        try:
            size = _number(header[124:136])
            sums.append(_number(header[148:156]))
        except ValueError:
            raise InputError(f"{where}: is no tar, or damaged: no member's header at byte {at}") from None
        headers.append(at // BLOCK)
        start, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        if start + size > len(data):
            raise InputError(f"{where}: is cut off in its member {_name(header)!r}")
        kind = header[156:157]
        if kind in (b"0", b"\0"):
            members.append(Member(long_name or _name(header), start, size))
        elif kind == b"L":
            long_name = _text(data[start : start + size])
            continue
        elif kind == b"x":
            long_name = _pax_path(data[start : start + size], where)
            continue
        elif kind not in b"gK12345":  # comments, links, devices and folders hold no samples
            raise InputError(f"{where}: its member {_name(header)!r} is of type {kind!r}, which is not read here")
        long_name = None
    _check_sums(data, headers, sums, where)
    return members


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.rstrip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", errors="surrogateescape")


def _name(header: bytes) -> str:
    """A member's name; ustar (not GNU) may have the folder of a long one in a field of its own."""
    if header[345] and header[257:263] == b"ustar\0":
        return f"{_text(header[345:500])}/{_text(header[:100])}"
    return _text(header[:100])


def _pax_path(records: bytes, where: str) -> str | None:
    """The `path` among pax records ("LENGTH KEY=VALUE\\n" each); None where it is not among them."""
    path = None
    while records:
        length = records.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(records):
            raise InputError(f"{where}: is damaged: a pax header that cannot be read")
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            path = _text(value)
        elif key == b"size":
            raise InputError(f"{where}: has a member of 8 GiB or more, which is not read here")
        elif key.startswith(b"GNU.sparse"):
            raise InputError(f"{where}: has a sparse member, which is not read here")
        records = records[int(length) :]
    return path


def _check_sums(data: mmap | bytes, headers: list[int], sums: list[int], where: str) -> None:
    """Every header's own checksum, all at once: the sum of its bytes, the eight of the checksum taken as spaces."""
    blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)[headers]
    found = blocks.sum(axis=1, dtype=np.int64) - blocks[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    wrong = np.flatnonzero(found != np.asarray(sums, np.int64))
    if len(wrong):
        raise InputError(f"{where}: is damaged: the member's header at byte {headers[wrong[0]] * BLOCK} is not whole")
