"""The shard format: plain webdataset, the same bytes for the same samples, every sample found again."""

import hashlib
import json
import random
import tarfile

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.contract.errors import Corrupt, StoreFull
from streamlearn.contract.shards import Outcome, ShardWriter, index_shard, read_sidecar, shard_key, sidecar_key, write_sidecar
from tests.contract.test_durable import tiny_disk  # noqa: F401


def write(path, samples):
    writer = ShardWriter(path)
    starts = [writer.add(offset, image, "jpg", {"url": f"http://x/{offset}"}) for offset, image in samples]
    return (*writer.close(), starts)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=0, max_size=3000), max_size=12))
def test_every_image_is_found_again_by_its_place(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("s") / "a.tar"
    _, size, starts = write(path, list(enumerate(images)))
    data = path.read_bytes()
    assert size == len(data) and size % tarfile.RECORDSIZE == 0
    found = index_shard(path)
    assert [data[s.start : s.start + s.size] for s in found] == images
    assert [s.start for s in found] == starts and [s.offset for s in found] == list(range(len(images)))


def test_the_same_samples_give_the_same_bytes(tmp_path):
    samples = [(3, b"a" * 700), (9, b"b")]
    assert write(tmp_path / "a.tar", samples)[0] == write(tmp_path / "b.tar", samples)[0]


def test_the_webdataset_library_reads_it(tmp_path):
    samples = [(offset, random.Random(offset).randbytes(500)) for offset in (0, 4, 7)]
    write(tmp_path / "a.tar", samples)
    read = list(wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [(int(s["__key__"]), s["jpg"]) for s in read] == samples
    assert [json.loads(s["json"])["url"] for s in read] == [f"http://x/{o}" for o, _ in samples]


def test_samples_out_of_order_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "a.tar")
    writer.add(5, b"x", "jpg", {})
    with pytest.raises(ValueError, match="offset 5 after 5"):
        writer.add(5, b"y", "jpg", {})


def test_a_full_disk_takes_nothing_of_a_sample_and_what_was_there_can_be_closed(tiny_disk):  # noqa: F811
    writer, images = ShardWriter(tiny_disk / "a.tar"), [bytes([i]) * 60_000 for i in range(8)]
    with pytest.raises(StoreFull, match=r"a\.tar"):
        for offset, image in enumerate(images):
            writer.add(offset, image, "jpg", {})
    taken = writer.num_samples
    with pytest.raises(StoreFull):  # half of it would have gone in
        writer.add(taken, images[taken], "jpg", {})
    writer.add(taken, b"small", "jpg", {})
    sha256, size = writer.close()
    data = (tiny_disk / "a.tar").read_bytes()
    assert taken and len(data) == size and hashlib.sha256(data).hexdigest() == sha256
    assert [data[s.start : s.start + s.size] for s in index_shard(tiny_disk / "a.tar")] == [*images[:taken], b"small"]


def test_a_shard_that_found_no_room_to_be_closed_is_closed_when_there_is_some(tiny_disk):  # noqa: F811
    writer = ShardWriter(tiny_disk / "a.tar")
    writer.add(0, b"a" * 3000, "jpg", {})
    with pytest.raises(OSError, match="space"):
        (tiny_disk / "ballast").write_bytes(bytes(2**20))
    with pytest.raises(StoreFull):
        writer.close()
    (tiny_disk / "ballast").unlink()
    sha256, size = writer.close()
    data = (tiny_disk / "a.tar").read_bytes()
    assert size == len(data) and hashlib.sha256(data).hexdigest() == sha256 and len(index_shard(tiny_disk / "a.tar")) == 1


@pytest.mark.parametrize("cut", [100, 512, 700, 1600, 2000])
def test_a_shard_cut_anywhere_is_refused_by_name(tmp_path, cut):
    path = tmp_path / "a.tar"
    write(path, [(0, b"a" * 600), (1, b"b" * 600)])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(Corrupt, match=r"a\.tar"):
        index_shard(path)


def test_garbage_is_refused_by_name(tmp_path):
    (tmp_path / "a.tar").write_bytes(random.Random(0).randbytes(20480))
    with pytest.raises(Corrupt, match=r"a\.tar: not a shard"):
        index_shard(tmp_path / "a.tar")


def test_the_sidecar_has_a_row_for_every_offset_and_opens_with_pyarrow(tmp_path):
    rows = [
        Outcome(offset=0, outcome="stored", sha256="ab", member_offset=512, member_size=3),
        Outcome(offset=1, outcome="rejected", reason="gone"),
    ]
    write_sidecar(tmp_path / "a.parquet", rows)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column("outcome").to_pylist() == ["stored", "rejected"]
    assert read_sidecar((tmp_path / "a.parquet").read_bytes()).equals(table)


def test_a_damaged_sidecar_is_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(Corrupt, match=r"a\.parquet"):
        read_sidecar(tmp_path / "a.parquet")


def test_keys_sort_as_offsets_do():
    keys = [shard_key("2026-11-21", "candidates", 0, first, first + 5, "f" * 64) for first in (0, 5, 100, 99995)]
    assert keys == sorted(keys) and sidecar_key(keys[0]).endswith("-ffffffffffff.parquet")
