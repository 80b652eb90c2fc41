"""Contract 1: what is read is what was written, without a copy; anything else is an error that names shard and key."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm_ds.data.format import ShardInfo, open_dataset
from lcm_ds.data.shard import Shard, open_shard, verify
from lcm_ds.data.tar import read_members
from lcm_ds.data.writer import Document, write_shard
from lcm_ds.errors import InputError
from lcm_ds.files import sha256_of

Make = Callable[..., Document]


def npy(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def tar_of(path: Path, members: dict[str, bytes], **options: object) -> Path:
    """A tar as others make it."""
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def mistake(*arguments: object) -> str:
    with pytest.raises(InputError) as caught:
        Shard(*arguments)  # type: ignore[arg-type]
    assert len(caught.value.errors) == 1
    return str(caught.value)


def test_a_file_that_becomes_shorter_is_an_error_that_names_shard_and_key(tmp_path: Path, document: Make) -> None:
    write_shard(tmp_path, "a.tar", [document("a"), document("b", 40)])
    shard = Shard(tmp_path / "a.tar")
    os.truncate(tmp_path / "a.tar", 3000)
    assert shard.concepts(0).shape == (3, 4)
    with pytest.raises(InputError) as caught:
        shard.concepts(1, 20)
    assert caught.value.errors == [f"{tmp_path}/a.tar: b: is cut off: the file has become shorter"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_concepts_go_straight_to_a_part_of_a_batch(tmp_path: Path, document: Make, dtype: type) -> None:
    made = document("a", 9)
    write_shard(tmp_path, "a.tar", [made])
    batch = np.full((2, 8, 4), 7, dtype)
    Shard(tmp_path / "a.tar").read_into(batch[1, 2:6], 0, 5)
    np.testing.assert_array_equal(batch[1, 2:6], made.concepts[5:9].astype(np.float16))
    batch[1, 2:6] = 7
    assert (batch == 7).all()


def test_an_open_shard_outlives_its_file(tmp_path: Path, document: Make) -> None:
    made = document("a")
    write_shard(tmp_path, "a.tar", [made])
    shard = Shard(tmp_path / "a.tar")
    (tmp_path / "a.tar").unlink()
    np.testing.assert_array_equal(shard.concepts(0), made.concepts.astype(np.float16))


# --- tars ---


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, form: int) -> None:
    long = "d" * 60 + "/" + "n" * 90 + ".npy"  # ustar: in two fields; GNU and pax: a header of its own
    names = ["a.npy", "folder/b.npy", long, "after.npy"] + (
        ["ä" * 120 + ".npy"] if form != tarfile.USTAR_FORMAT else []
    )
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "made elsewhere"}) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * number
            info.mtime = 0.5 * number  # type: ignore[assignment]  # a fraction is a pax header
            tar.addfile(info, io.BytesIO(bytes(info.size)))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                other = tarfile.TarInfo(f"other{number}")
                other.type, other.linkname = kind, "l" * 120 if form != tarfile.USTAR_FORMAT else "a.npy"
                tar.addfile(other)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert list(zip(*read_members(path.read_bytes(), "here")[:3], strict=True)) == expected
    assert [name for name, _, _ in expected] == names


def test_a_tar_cut_at_the_boundary_of_a_member_is_not_a_shorter_one(tmp_path: Path, document: Make) -> None:
    info = write_shard(tmp_path, "a.tar", [document(f"d{i}") for i in range(4)])
    whole = (tmp_path / "a.tar").read_bytes()
    members = read_members(whole, "here")
    for name, offset in zip(members.names, members.offsets, strict=True):
        boundary = offset - 512
        (tmp_path / "a.tar").write_bytes(whole[:boundary])
        if boundary:
            assert "is cut off" in mistake(tmp_path / "a.tar")
            assert "shards.jsonl lists" in mistake(tmp_path / "a.tar", info)
        # Cut, and closed as a tar should be: only the list knows better.
        (tmp_path / "a.tar").write_bytes((whole[:boundary] + bytes(len(whole)))[: len(whole)])
        expected = "has a .json and no .npy" if name.endswith(".npy") else "documents with"
        assert expected in mistake(tmp_path / "a.tar", info)
    (tmp_path / "a.tar").write_bytes(whole[: members.offsets[-1] + 3])
    assert "is cut off in its member 'd3.npy'" in mistake(tmp_path / "a.tar")


def test_what_is_no_plain_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"")
    assert mistake(path) == f"{path}: is empty"
    path.write_bytes(b"no tar at all " * 100)
    assert "is no tar, or damaged" in mistake(path)
    path.write_bytes(gzip.compress(b"x"))
    assert "is compressed (gzip); shards are plain tars" in mistake(path)
    assert "cannot be read: No such file" in mistake(tmp_path / "nowhere.tar")


@pytest.fixture(scope="module")
def whole_shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShardInfo]:
    folder = tmp_path_factory.mktemp("whole")
    documents = [Document(f"k{i}", str(i), "s", ["One.", "Two."], np.full((2, 3), i / 8)) for i in range(3)]
    return folder, write_shard(folder, "whole.tar", documents)


@given(data=st.data())
def test_damage_is_an_error_or_not_in_what_is_read(whole_shard: tuple[Path, ShardInfo], data: st.DataObject) -> None:
    """Any one byte changed, or all from some byte on: never a crash, never other counts than the list's."""
    folder, info = whole_shard
    whole = (folder / "whole.tar").read_bytes()
    at = data.draw(st.integers(0, info.bytes - 1))
    if data.draw(st.booleans()):
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    else:
        damaged = whole[:at]
    (folder / "damaged.tar").write_bytes(damaged)
    try:
        shard = Shard(folder / "damaged.tar", replace(info, name="damaged.tar"), 3, "float16")
    except InputError as error:
        message = str(error)
    else:
        assert len(damaged) == len(whole)
        assert [shard.concepts(i).shape for i in range(len(shard))] == [(2, 3)] * 3
        return
    assert message.startswith(f"{folder}/damaged.tar: ")


def test_a_header_that_changed_in_one_byte_is_damage(whole_shard: tuple[Path, ShardInfo]) -> None:
    whole = (whole_shard[0] / "whole.tar").read_bytes()
    for header in (offset - 512 for offset in read_members(whole, "here").offsets):
        for at in range(header, header + 512, 7):
            damaged = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            with pytest.raises(InputError, match=r"^here: is "):
                read_members(damaged, "here")


def test_a_size_in_base_256_is_damage(whole_shard: tuple[Path, ShardInfo]) -> None:
    whole = (whole_shard[0] / "whole.tar").read_bytes()
    for header in (offset - 512 for offset in read_members(whole, "here").offsets):
        damaged = bytearray(whole)
        damaged[header + 124] ^= 0x80
        with pytest.raises(InputError, match=f"^here: is no tar, or damaged: no member's header at byte {header}"):
            read_members(bytes(damaged), "here")


# --- documents ---


def test_a_pickle_is_refused_and_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    pickled = npy(np.array([[Trap(), Trap()]], dtype=object), allow_pickle=True)
    path = tar_of(tmp_path / "a.tar", {"x.npy": pickled})
    assert mistake(path) == f"{path}: x.npy: holds pickled objects, which are never loaded; concepts are plain numbers"
    assert not (tmp_path / "sprung").exists()


GOOD = np.zeros((3, 4), np.float16)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(GOOD.astype(np.float32)), "x.npy: is float32, its dataset is float16"),
        (npy(GOOD.astype(">f2")), "x.npy: is >f2, its dataset is float16"),
        (npy(np.zeros((3, 5), np.float16)), "x.npy: has embed_dim 5, its dataset 4"),
        (npy(np.zeros(4, np.float16)), r"x.npy: has shape [4]; concepts are [n, embed_dim]"),
        (npy(np.asfortranarray(GOOD)), "x.npy: [3, 4] is in Fortran order (column by column): save it again with"),
        (npy(GOOD)[:-2], "x.npy: has 150 bytes, which is not what [3, 4] float16 takes"),
        (npy(GOOD) + b"12", "x.npy: has 154 bytes"),
        (npy(GOOD)[:50], "x.npy: not an .npy file"),
        (b"", "x.npy: not an .npy file"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "x.npy: not an .npy file"),
    ],
)
def test_a_document_that_is_not_the_datasets_kind_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tar_of(tmp_path / "a.tar", {"fine.npy": npy(GOOD), "x.npy": data})
    assert mistake(path, None, 4, "float16").startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{[]: 1}", "not an .npy file"),
        ("{'descr': 1, 2}", "not an .npy file"),
        ("(" * 300, "not an .npy file"),
        ("{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 3)}", "has shape [-1, 3]"),
        ("{'descr': '<f2', 'fortran_order': False, 'shape': (-2, -3)}", "has shape [-2, -3]"),
        ("{'descr': '<f2', 'fortran_order': False, 'shape': (0, -3)}", "has shape [0, -3]"),
        ("{'descr': [('a', '<f2')], 'fortran_order': False, 'shape': (2, 3)}", "concepts are plain numbers"),
        ("{'descr': '|V2', 'fortran_order': False, 'shape': (2, 3)}", "concepts are plain numbers"),
    ],
)
@pytest.mark.parametrize("known", [(), (None, 3, "float16")])
def test_an_array_header_that_is_none_is_named(tmp_path: Path, header: str, message: str, known: tuple) -> None:
    text = (header.ljust(117) + "\n").encode()
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(12)
    path = tar_of(tmp_path / "a.tar", {"x.npy": data})
    line = mistake(path, *known)
    assert line.startswith(f"{path}: x.npy: ")
    assert message in line


def test_every_byte_of_an_array_header_may_be_any_other(whole_shard: tuple[Path, ShardInfo]) -> None:
    """It is Python, which has many ways to be wrong."""
    folder, info = whole_shard
    whole = (folder / "whole.tar").read_bytes()
    offset = read_members(whole, "here").offsets[1]
    path = folder / "any.tar"
    path.write_bytes(whole)
    with path.open("r+b", buffering=0) as file:
        for at in range(offset, offset + 128, 3):
            for value in range(0, 256, 5):
                os.pwrite(file.fileno(), bytes([value]), at)
                for known in ((info, 3, "float16"), ()):
                    with suppress(InputError):
                        Shard(path, *known)
            os.pwrite(file.fileno(), whole[at : at + 1], at)


def test_keys_have_to_agree(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {"x.npy": npy(GOOD), "y.json": b"{}"})
    assert mistake(path) == f"{path}: y: has a .json and no .npy"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("x.npy")
            info.size = len(npy(GOOD))
            tar.addfile(info, io.BytesIO(npy(GOOD)))
    assert mistake(path) == f"{path}: x: two documents have this key"


def test_a_tar_made_elsewhere_may_have_other_members_and_documents_without_concepts(tmp_path: Path) -> None:
    empty = np.zeros((0, 4), np.float16)
    members = {
        "x.npy": npy(GOOD),
        "x.txt": b"text",
        "README": b"read me",
        "e.npy": npy(empty),
        "x2.0.npy": b"no sample",
    }
    shard = Shard(tar_of(tmp_path / "a.tar", members))
    assert shard.keys == ["x", "e"]
    assert shard.lengths.tolist() == [3, 0]
    assert shard.concepts(1).shape == (0, 4)
    assert shard.meta(0) == {"id": "x", "source": "a.tar", "sentences": []}


def test_counts_have_to_be_those_of_the_list(tmp_path: Path, document: Make) -> None:
    info = write_shard(tmp_path, "a.tar", [document("a"), document("b")])
    for change in ({"documents": 3}, {"concepts": 7}):
        line = mistake(tmp_path / "a.tar", replace(info, **change))
        assert "has 2 documents with 6 concepts, shards.jsonl lists" in line


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"sentences": ["One."]}, "x: has 1 sentences and 3 concepts"),
        ({"sentences": []}, "x: has 0 sentences and 3 concepts"),
        ({"sentences": "One. Two. Three."}, "x.json: has to be an object with a list of sentences"),
        ([], "x.json: has to be an object"),
        (None, "x.json: not JSON"),
    ],
)
def test_sentences_are_checked_when_they_are_read(tmp_path: Path, meta: object, message: str) -> None:
    data = b"{" if meta is None else json.dumps(meta).encode()
    path = tar_of(tmp_path / "a.tar", {"x.npy": npy(GOOD), "x.json": data})
    shard = Shard(path)
    assert shard.concepts(0).shape == (3, 4)
    with pytest.raises(InputError) as caught:
        shard.meta(0)
    assert str(caught.value).startswith(f"{path}: {message}")


# --- datasets ---


def test_verify_finds_a_byte_that_changed_and_names_every_bad_shard(own_dataset: Path) -> None:
    dataset = open_dataset(own_dataset)
    assert list(chain(*verify(dataset))) == []
    path = own_dataset / "shard-00001.tar"
    data = bytearray(path.read_bytes())
    members = read_members(bytes(data), "here")
    first = next(index for index, name in enumerate(members.names) if name.endswith(".npy"))
    data[members.offsets[first] + members.sizes[first] - 1] ^= 1
    path.write_bytes(data)
    (own_dataset / "shard-00003.tar").unlink()
    changed = (
        f"{path}: has sha256 {sha256_of(path)}, shards.jsonl lists {dataset.shards[1].sha256}: its bytes have changed"
    )
    assert list(chain(*verify(dataset))) == [
        changed,
        f"{own_dataset}/shard-00003.tar: cannot be read: No such file or directory",
    ]
    with pytest.raises(InputError) as caught:
        open_shard(dataset, 1)
    assert str(caught.value) == changed
    # Nothing but the checksum can see it.
    assert open_shard(replace(dataset, checksums=False), 1).lengths.sum() == dataset.shards[1].concepts


def test_a_shard_of_another_dataset_is_refused(own_dataset: Path, synthetic_dataset: Callable[..., Path]) -> None:
    dataset = open_dataset(own_dataset)
    shutil.copy(synthetic_dataset(embed_dim=8) / "shard-00000.tar", own_dataset / "shard-00000.tar")
    with pytest.raises(InputError, match=r"shard-00000\.tar: "):
        open_shard(dataset, 0)
