"""Tars as other programs make them: each document is read, or a line says why not; none is left out in silence."""

from __future__ import annotations

import io
import tarfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import webdataset

from lcm_ds.data.format import open_dataset
from lcm_ds.data.shard import open_shard, verify
from lcm_ds.data.tar import read_members
from lcm_ds.data.tools.index import index
from lcm_ds.data.writer import Document, copy_shard, write_shard
from lcm_ds.errors import InputError


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def samples(*names: str) -> dict[str, bytes]:
    random = np.random.default_rng(len(names))
    return {f"{name}.npy": npy(random.normal(size=(4, 3)).astype(np.float32)) for name in names}


@pytest.mark.parametrize("between", [0, 512, 100 * 512, 200 * 1024])
def test_tars_put_together_with_cat_are_read_to_the_end(tmp_path, between):
    """As by `tar --ignore-zeros`; the first ones end with their end marks, and more zeros."""
    parts = [tar(tmp_path / f"{n}.tar", samples(f"a{n}", f"b{n}")).read_bytes() + bytes(between) for n in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    index(str(tmp_path / "all.tar"), tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.info.totals.documents == 6
    assert list(chain(*verify(dataset))) == []
    shard = open_shard(dataset, 0)
    assert shard.keys == ["a0", "b0", "a1", "b1", "a2", "b2"]
    with tarfile.open(tmp_path / "all.tar", ignore_zeros=True) as file:
        for document, member in enumerate(file):
            array = np.load(io.BytesIO(file.extractfile(member).read()))
            np.testing.assert_array_equal(array, shard.concepts(document))


def test_what_is_no_tar_behind_the_end_is_refused(tmp_path):
    data = tar(tmp_path / "a.tar", samples("a")).read_bytes()
    with pytest.raises(InputError, match=rf"a.tar: is no tar, or damaged: no member's header at byte {len(data)}"):
        read_members(data + b"notes" * 300, "a.tar")
    with pytest.raises(InputError, match=r"a.tar: is cut off"):  # a second tar that is cut off
        read_members(data + data[:1024], "a.tar")


def test_two_documents_of_one_key_in_two_tars_are_refused(tmp_path):
    data = tar(tmp_path / "a.tar", samples("a")).read_bytes()
    (tmp_path / "b.tar").write_bytes(data + data)
    with pytest.raises(InputError, match=r"b.tar: a: two documents have this key"):
        index(str(tmp_path / "b.tar"), tmp_path / "out")


def test_names_with_dots_that_would_not_be_read_are_refused(tmp_path):
    path = tar(tmp_path / "a.tar", samples("d0", "v1.5-d1", "data.v2/d2", "v1.5-d3", "V1.D4"))
    with pytest.raises(InputError) as caught:
        index(str(path), tmp_path / "out")
    assert caught.value.errors == [
        f"{path}: 3 members end in .npy and are not read: in WebDataset a key ends at the first dot, so that "
        "v1.5-d1.npy is 5-d1.npy of v1: rename them without dots"
    ]
    only = tar(tmp_path / "b.tar", samples(".d0", "v1.5"))
    with pytest.raises(InputError, match=r"b.tar: 2 members end in .npy and are not read: .* .d0.npy is no sample"):
        index(str(only), tmp_path / "out")


def test_more_arrays_of_a_document_and_files_of_macos_are_left_out(tmp_path):
    members = {**samples("d0", "d1"), **samples("d0.other", "d1.other"), "._d0.npy": b"\0\5\x16\7", "x/._d1.npy": b"\0"}
    path = tar(tmp_path / "a.tar", members)
    index(str(path), tmp_path / "out")
    assert open_dataset(tmp_path / "out").info.totals.documents == 2
    keys = [s["__key__"] for s in webdataset.WebDataset(str(path), shardshuffle=False) if "npy" in s]
    assert keys == ["d0", "d1"]
    index(str(path), tmp_path / "other", extension="other.npy")
    assert open_dataset(tmp_path / "other").info.totals.documents == 2


def test_arrays_in_fortran_order_are_refused_with_what_to_do(tmp_path):
    array = np.asfortranarray(np.arange(15, dtype=np.float32).reshape(5, 3))
    path = tar(tmp_path / "a.tar", {"d.npy": npy(array)})
    with pytest.raises(InputError, match=r"d.npy: \[5, 3\] is in Fortran order .* numpy.ascontiguousarray"):
        index(str(path), tmp_path / "out")
    tar(path, {**samples("c"), "d.npy": npy(np.asfortranarray(array[:1]))})  # one row has no order
    index(str(path), tmp_path / "out")
    np.testing.assert_array_equal(open_shard(open_dataset(tmp_path / "out"), 0).concepts(1), array[:1])


@pytest.mark.parametrize("text", ["One.\r\nTwo.\r\nA\rB.\r\nFour.\r\n", "\ufeffOne.\nTwo.\nA\rB.\nFour."])
def test_lines_of_windows_are_sentences_without_their_ends(tmp_path, text):
    path = tar(tmp_path / "a.tar", {**samples("d"), "d.txt": text.encode()})
    index(str(path), tmp_path / "out", texts="txt")
    assert open_shard(open_dataset(tmp_path / "out"), 0).meta(0)["sentences"] == ["One.", "Two.", "A\rB.", "Four."]


@pytest.mark.parametrize(
    ("begin", "kind"), [(b"PAR1", "parquet"), (b"ARROW1", "an Arrow file"), (b"PK\3\4", "a zip or .npz file")]
)
def test_files_of_other_kinds_are_named(tmp_path, begin, kind):
    (tmp_path / "a").write_bytes(begin + bytes(2000))
    with pytest.raises(InputError, match=rf"a: is {kind}.*, not a tar: lcm-ds adopt takes"):
        index(str(tmp_path / "a"), tmp_path / "out")
    with pytest.raises(InputError, match="is a folder: name its tars, or give it to lcm-ds adopt"):
        index(str(tmp_path), tmp_path / "out")


def test_our_tars_are_those_of_webdatasets_writer(tmp_path):
    random = np.random.default_rng(3)
    made = [Document(f"k{n}", f"ä{n}" * 40, "s", ["a"] * n, random.normal(size=(n, 5))) for n in range(1, 30)]
    write_shard(tmp_path, "0.tar", made)
    ours = (tmp_path / "0.tar").read_bytes()
    buffer = io.BytesIO()
    with (
        webdataset.TarWriter(buffer, encoder=False, mtime=0, user="", group="", mode=0o644) as writer,
        tarfile.open(tmp_path / "0.tar") as file,
    ):
        for n in range(1, 30):
            files = {kind: file.extractfile(f"k{n}.{kind}").read() for kind in ("npy", "json")}
            assert files["npy"] == npy(made[n - 1].concepts.astype(np.float16))
            writer.write({"__key__": f"k{n}", **files})
    assert ours == buffer.getvalue()
    assert len(ours) % 10240 == 0


def test_copies_of_foreign_documents_keep_their_names(tmp_path):
    long = "folder/" * 20 + "ö"
    tar(tmp_path / "a.tar", samples(long, "b"), format=tarfile.PAX_FORMAT)
    index(str(tmp_path / "a.tar"), tmp_path / "out")
    copy_shard(open_shard(open_dataset(tmp_path / "out"), 0), [0], tmp_path, "c.tar")
    with tarfile.open(tmp_path / "c.tar") as file:
        assert file.getnames() == [f"{long}.npy"]
