"""The members of a plain tar, from its headers; several times as fast as `tarfile`.

Reads the output of WebDataset's writer and of GNU tar: ustar headers, pax and GNU long names. Anything else is refused,
and so is an archive without its end mark: one cut off between two members would otherwise pass for a shorter one.
Archives put together with cat are read to the end of the last one, as by `tar --ignore-zeros`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lcm_ds.errors import InputError
from lcm_ds.files import OpenFile

BLOCK = 512
_WINDOW = 8192  # bytes read at a time
HEAD = 128  # bytes of a member read together with its header: the header of an .npy file
_END = bytes(BLOCK)
MOST_OCTAL = 8**11 - 1  # what a size field holds in digits; base 256 holds more than any file
_USTAR = np.frombuffer(b"ustar\0", np.uint8)  # GNU has spaces there, and other things behind
_REGULAR = tuple(b"0\0")
_OCTAL_POWERS = np.array([8**power for power in range(5, -1, -1)], np.uint32)  # of six octal digits
_IGNORED = frozenset(b"gK12345")  # comments, links, devices and folders hold no samples
_ADOPTED = {
    b"PAR1": "parquet",
    b"ARRO": "an Arrow file",
    b"\x93NUM": "an .npy file",
    b"PK\x03\x04": "a zip or .npz file",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class Members(NamedTuple):
    """The regular files of a tar, in order, column by column: lists of the same length."""

    names: list[str]
    offsets: list[int]  # of their bytes in the tar
    sizes: list[int]
    heads: list[bytes]  # their first HEAD bytes; of a shorter file, also what follows it


def read_members(data: OpenFile | bytes, location: str) -> Members:
    """The regular files of the tar in `data`, in order. Raises InputError, beginning with `location`."""
    if (packed := _COMPRESSED.get(data[0:2])) is not None:
        raise InputError(f"{location}: is compressed ({packed}); shards are plain tars")
    if (kind := _ADOPTED.get(data[0:4])) is not None:
        raise InputError(f"{location}: is {kind}, not a tar: lcm-ds adopt takes parquet, .npy, .npz and Arrow files")
    starts, sizes, blocks = _walk(data, location)
    # Everything but the walk is done for all headers at once, which is several times as fast.
    _check_sums(blocks, starts, location)
    names = _names(blocks)
    offsets = [at + BLOCK for at in starts]
    heads = np.ascontiguousarray(blocks[:, BLOCK:]).view(f"V{HEAD}").ravel().tolist()
    if np.isin(blocks[:, 156], _REGULAR).all():  # nearly always: nothing but files
        return Members(names, offsets, sizes, heads)
    members = Members([], [], [], [])
    long_name: str | None = None
    for start, size, kind, name, head in zip(offsets, sizes, blocks[:, 156].tolist(), names, heads, strict=True):
        if kind in _REGULAR:
            members.names.append(long_name or name)
            members.offsets.append(start)
            members.sizes.append(size)
            members.heads.append(head)
        elif kind == ord("L"):
            long_name = _text(data[start : start + size])
            continue
        elif kind == ord("x"):
            long_name = _pax_path(data[start : start + size], location)
            continue
        elif kind not in _IGNORED:
            raise InputError(f"{location}: its member {name!r} is of type {chr(kind)!r}, which is not read here")
        long_name = None
    return members


def _names(blocks: np.ndarray) -> list[str]:
    """The names in headers, uint8 [headers, 512 and more]."""
    fields = np.ascontiguousarray(blocks[:, :100]).view("S100").ravel().tolist()
    split = np.flatnonzero((blocks[:, 345] != 0) & (blocks[:, 257:263] == _USTAR).all(axis=1))
    for index in split.tolist():  # ustar has the folder of a long name in a field of its own
        fields[index] = b"%b/%b" % (_upto_zero(blocks[index, 345:500].tobytes()), _upto_zero(fields[index]))
    together = b"\n".join(fields)
    if together.count(b"\n") == len(fields) - 1 and 0 not in together:
        return together.decode("utf-8", errors="surrogateescape").split("\n")
    return [_text(field) for field in fields]


def _walk(data: OpenFile | bytes, location: str) -> tuple[list[int], list[int], np.ndarray]:
    """Of each header its offset, the bytes that follow it, and uint8 [headers, 512 + HEAD], its bytes and the next."""
    starts: list[int] = []
    sizes: list[int] = []
    pieces: list[bytes] = []
    length = BLOCK + HEAD
    at = rest = 0
    window = data[0:_WINDOW]  # small members are read together with the next one's header
    while True:
        if rest + length > len(window):
            rest, window = 0, data[at : at + _WINDOW]
        piece = window[rest : rest + length]
        try:
            size = int(piece[124:135], 8)  # nearly always eleven octal digits
        except ValueError:
            header = piece[:BLOCK]
            if header == _END:
                if (more := _behind_end(data, at)) is not None:  # another archive, behind this one
                    at, rest, window = more, 0, data[more : more + _WINDOW]
                    continue
                return starts, sizes, np.frombuffer(b"".join(pieces), np.uint8).reshape(-1, length)
            if at > len(data):
                name = _text(pieces[-1][:100])
                raise InputError(f"{location}: is cut off in its member {name!r}") from None
            if len(header) < BLOCK:
                raise InputError(
                    f"{location}: is cut off: it ends at byte {len(data)} without a tar's end mark"
                ) from None
            size = _number(header[124:136], at, location)
        if size < 0 or size > max(len(data), MOST_OCTAL):
            raise _no_header(at, location)
        starts.append(at)
        pieces.append(piece)
        sizes.append(size)
        step = BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        at += step
        rest += step


def _behind_end(data: OpenFile | bytes, at: int) -> int | None:
    """The first block behind the end mark at byte `at` that is not zeros; None if there is none."""
    while window := data[at : at + 8 * _WINDOW]:
        if rest := window.lstrip(b"\0"):
            return at + (len(window) - len(rest)) // BLOCK * BLOCK
        at += len(window)
    return None


def _number(field: bytes, at: int, location: str) -> int:
    """A number of the header at byte `at`: octal digits, or base 256 if the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b" \0") or b"0", 8)
    except ValueError:
        raise _no_header(at, location) from None


def _no_header(at: int, location: str) -> InputError:
    return InputError(f"{location}: is no tar, or damaged: no member's header at byte {at}")


def _upto_zero(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _text(field: bytes) -> str:
    return (_upto_zero(field) if 0 in field else field).decode("utf-8", errors="surrogateescape")


def _pax_path(records: bytes, location: str) -> str | None:
    """The `path` among pax records ("LENGTH KEY=VALUE\\n" each); None if it is missing."""
    path = None
    while records:
        length = records.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(records):
            raise InputError(f"{location}: is damaged: a pax header that cannot be read")
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            path = _text(value)
        elif key == b"size":
            raise InputError(f"{location}: has a member of 8 GiB or more, which is not read here")
        elif key.startswith(b"GNU.sparse"):
            raise InputError(f"{location}: has a sparse member, which is not read here")
        records = records[int(length) :]
    return path


def _check_sums(blocks: np.ndarray, starts: list[int], location: str) -> None:
    """Compare every header's checksum: the sum of its bytes, with the checksum's own eight bytes as spaces.

    blocks: uint8 [headers, 512 and more]; starts: the offset of each.
    """
    checksums = (
        blocks[:, :BLOCK].sum(axis=1, dtype=np.uint32) - blocks[:, 148:156].sum(axis=1, dtype=np.uint32) + 8 * ord(" ")
    )
    digits = blocks[:, 148:154] - np.uint8(ord("0"))  # nearly always six octal digits
    usual = (digits < 8).all(axis=1) & (blocks[:, 154] == 0) & (blocks[:, 155] == ord(" "))
    right = usual & (digits.astype(np.uint32) @ _OCTAL_POWERS == checksums)
    for index in np.flatnonzero(~right).tolist():
        if _number(blocks[index, 148:156].tobytes(), starts[index], location) != checksums[index]:
            raise InputError(
                f"{location}: is damaged: the member's header at byte {starts[index]} has another checksum"
            )
