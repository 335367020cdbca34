"""Banks of every format are the same bank; changed bytes are noticed; complaints name file and remedy."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from streamlearn.__main__ import cli
from streamlearn.contract.config_probe import BankConfig
from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.probes.bank_book import BankBook
from streamlearn.probes.banks import load_bank
from tests.ingest.server import picture
from tests.probes.world import bank_file, class_folders, labelled, shard


def bank(train, **more):
    return BankConfig(name="b", train=str(train), **more)


def test_a_bank_is_split_the_same_way_every_time(tmp_path):
    config = bank(bank_file(tmp_path))
    one, two = load_bank(config, 16), load_bank(config, 16)
    assert one.digest == two.digest == load_bank(config, 20).digest and one.train.images_NSSC.shape[1:] == (16, 16, 3)
    assert len(one.train.labels) + len(one.test.labels) == 60


def test_a_bank_of_folders_is_read_by_class_without_its_damaged_images(tmp_path):
    class_folders(tmp_path / "bank")
    (tmp_path / "bank" / "class1" / "007.jpg").write_bytes(b"\xff\xd8\xff broken")
    found = load_bank(bank(tmp_path / "bank"), 16)
    assert found.classes == ("class0", "class1") and len(found.train.labels) + len(found.test.labels) == 39


def test_folder_parquet_and_shards_of_the_same_images_are_the_same_bank(tmp_path):
    root = class_folders(tmp_path / "folders")
    order = sorted(root.rglob("*.jpg"))
    rows = [(p.parent.name, p.read_bytes()) for p in order]
    pq.write_table(pa.table({"jpeg": [d for _, d in rows], "label": [c for c, _ in rows]}), tmp_path / "bank.parquet")
    samples = [(f"{i:05d}", {"jpg": d, "cls": c.encode()}) for i, (c, d) in enumerate(rows)]
    one = shard(tmp_path / "one.tar", samples)
    shard(tmp_path / "many" / "000.tar", samples[:13]), shard(tmp_path / "many" / "001.tar", samples[13:])
    structs = [{"bytes": d, "path": "x"} for _, d in rows]
    pq.write_table(pa.table({"image": structs, "y": [c for c, _ in rows]}), tmp_path / "hub.parquet")
    found = [load_bank(bank(t), 16) for t in (root, tmp_path / "bank.parquet", one, tmp_path / "many")]
    found.append(load_bank(bank(tmp_path / "hub.parquet", image_column="image", label_column="y"), 16))
    assert len({b.digest for b in found}) == 1 and all((b.train.images_NSSC == found[0].train.images_NSSC).all() for b in found)
    assert all(torch.equal(b.test.labels, found[0].test.labels) for b in found)


def test_more_images_than_wanted_are_drawn_evenly_from_the_classes(tmp_path):
    found = load_bank(bank(bank_file(tmp_path, count=90), test=bank_file(tmp_path, name="t.parquet"), max_train=12, max_test=30), 16)
    assert torch.bincount(found.train.labels).tolist() == [4, 4, 4] and len(found.test.labels) == 30


def test_a_list_of_labels_makes_a_multi_label_bank_and_ignored_ones_are_marked(tmp_path):
    def samples(start):
        return [
            labelled(i, label=["cat"] if i % 2 else ["cat", "dog"], hard=["dog"] if i % 3 == 1 else []) for i in range(start, start + 20)
        ]

    config = bank(shard(tmp_path / "a.tar", samples(0)), test=shard(tmp_path / "b.tar", samples(100)), ignore_column="hard")
    found = load_bank(config, 16)
    assert found.multi and found.classes == ("cat", "dog") and found.train.labels.shape == (20, 2)
    assert (found.train.labels[:, 0] == 1).all()
    assert found.train.labels[:8, 1].tolist() == [1, -1, 1, 0, 1, 0, 1, -1]  # 4 shows a dog for sure, so it is judged
    table = pa.table({"jpeg": [picture(i) for i in range(20)], "label": [[], ["a"], ["a", "b"], ["b"]] * 5})
    pq.write_table(table, tmp_path / "lists.parquet")
    lists = load_bank(bank(tmp_path / "lists.parquet", test=str(tmp_path / "lists.parquet")), 16)
    assert lists.train.labels[:4].tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"label_column": "y"}, "no column 'y'; there are jpeg, label"),
        ({"train": "nowhere.txt"}, "neither a folder"),
        ({"train": "nowhere.parquet"}, "nowhere.parquet: not a readable parquet"),
        ({"train": "nowhere.tar"}, "nowhere.tar: not a readable webdataset shard"),
        ({"image_column": "label"}, "row .: label holds no bytes; name the column of encoded images"),
    ],
)
def test_a_bad_bank_is_named_with_the_remedy(tmp_path, change, complaint):
    with pytest.raises(ConfigError, match=f"probe bank b: .*{complaint}"):
        load_bank(BankConfig(name="b", **{"train": bank_file(tmp_path)} | change), 16)


def test_one_class_is_no_bank(tmp_path):
    with pytest.raises(ConfigError, match="1 classes"):
        load_bank(bank(bank_file(tmp_path, classes=1)), 16)


def test_an_image_outside_of_any_class_is_named(tmp_path):
    (class_folders(tmp_path / "bank") / "stray.jpg").write_bytes(picture(1))
    with pytest.raises(ConfigError, match=r"stray\.jpg: lies in no class \(1 such\); move it"):
        load_bank(bank(tmp_path / "bank"), 16)


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"jpg": picture(0)}, "sample 00000: no label: neither 'label' in its .json nor a .cls"),
        ({"cls": b"1"}, "sample 00000: no image in it; it has .cls"),
        ({"jpg": picture(0), "json": b"{"}, "sample 00000: its .json is not JSON"),
        ({"jpg": picture(0), "json": b'{"label": ["a"]}'}, "some labels are lists and some are not"),
    ],
)
def test_a_bad_sample_of_a_shard_is_named(tmp_path, parts, complaint):
    path = shard(tmp_path / "a.tar", [("00000", parts), *[labelled(i, label="x") for i in range(1, 5)]])
    with pytest.raises(ConfigError, match=f"a.tar: {complaint}"):
        load_bank(bank(path), 16)


def test_test_images_of_a_class_that_the_bank_lacks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not in the bank: \['7', '8', '9'\]"):
        load_bank(bank(bank_file(tmp_path), test=bank_file(tmp_path, name="t.parquet", first=7)), 16)


def test_a_bank_that_has_changed_is_not_the_configured_one(tmp_path):
    root = class_folders(tmp_path / "bank")
    digest = load_bank(bank(root), 16).digest
    assert load_bank(bank(root, digest=digest), 16).digest == digest
    (root / "class1" / "003.jpg").write_bytes(picture(999))
    with pytest.raises(ConfigError, match=f"its images or labels have changed: digest .*, not {digest[:19]}…; restore them"):
        load_bank(bank(root, digest=digest), 16)
    (root / "class1" / "003.jpg").write_bytes(picture(3))
    (root / "class1" / "003.jpg").rename(root / "class0" / "003.jpg")
    with pytest.raises(ConfigError, match="have changed"):
        load_bank(bank(root, digest=digest), 16)


def test_banks_are_registered_listed_and_verified_by_command(tmp_path):
    root, home = class_folders(tmp_path / "bank"), str(tmp_path / "home")

    def run(*words):
        return CliRunner().invoke(cli, ["banks", *words, "--home", home])

    added = run("add", "mine", "--train", str(root), "--generation", "2026Q4")
    assert added.exit_code == 0 and "2 classes" in added.output
    assert run("add", "mine", "--train", str(root), "--generation", "2026Q4").exit_code == 0  # again, unchanged
    listed = json.loads(run("list", "--json").output)
    assert listed[0]["bank"]["generation"] == "2026Q4" and sum(listed[0]["counts"].values()) == 40 and "mine" in run("list").output
    assert run("verify").output.startswith("ok mine sha256:")
    (root / "class1" / "003.jpg").write_bytes(picture(999))
    (root / "class0" / "new.jpg").write_bytes(picture(998))
    (root / "class0" / "002.jpg").unlink()
    bad = run("verify", "mine")
    assert isinstance(bad.exception, ConfigError)
    message = str(bad.exception)
    assert "003.jpg" in message and "has changed" in message and "002.jpg" in message and "has gone" in message and "new.jpg" in message
    other = run("add", "mine", "--train", str(root))
    assert isinstance(other.exception, ConfigError) and "choose another name" in str(other.exception)
    assert "registered are: mine" in str(run("verify", "yours").exception)


def test_a_damaged_book_names_its_file(tmp_path):
    book = BankBook(tmp_path)
    book.add(bank(bank_file(tmp_path)))
    book.path("b").write_text("{")
    with pytest.raises(Corrupt, match=r"banks/b\.json: not a registered bank: .*add the bank again"):
        BankBook(tmp_path).all()


def test_damaged_images_are_counted_when_a_bank_is_registered(tmp_path):
    root = class_folders(tmp_path / "bank")
    (root / "class1" / "003.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert BankBook(tmp_path).add(bank(root)).damaged == 1
