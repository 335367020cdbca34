"""Crops that the device cuts from decoded images: byte for byte those of the workers, wherever an image lies and whoever cuts it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from streamlearn.contract.config import CropConfig
from streamlearn.contract.shards import ShardSample
from streamlearn.stream import crop, views
from streamlearn.stream.crop import COLUMNS, OFFSET, WIDTH, Pile
from streamlearn.stream.decode import Buffer, decode, header, pixels
from streamlearn.stream.keys import draws, key
from streamlearn.stream.worker import BatchSpec, Place, make
from tests.ingest.server import BODIES, picture
from tests.stream.test_views import encoded, photographs, psnr
from tests.stream.world import CONFIG

SIDES = views.sides(CONFIG.crops)


@st.composite
def piles(draw):
    """Images of noise, one after another, and boxes in them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    table, parts, offset = [], [], 0
    for _ in range(draw(st.integers(1, 6))):
        width, height = (draw(st.one_of(st.integers(1, 9), st.integers(1, 400))) for _ in range(2))
        parts.append(rng.integers(0, 256, 3 * width * height + 5, dtype=np.uint8))
        for _ in range(draw(st.integers(1, 3))):
            left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
            right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
            table.append((offset, width, left, top, right, bottom))
        offset += len(parts[-1])
    return np.concatenate(parts), np.array(table)


@settings(deadline=None, max_examples=150)
@given(piles(), st.sampled_from([1, 2, 8, 13, 16, 57, 96]))
def test_a_device_cuts_the_very_bytes_that_a_worker_does(pile, side):
    memory, table_N6 = pile
    found = crop.all_at_once(torch.from_numpy(memory), table_N6, side)
    for row, (offset, width, left, top, right, bottom) in zip(found.numpy(), table_N6.tolist(), strict=True):
        image = memory[offset : offset + 3 * width * bottom].reshape(bottom, width, 3)
        by_a_worker = np.empty((side, side, 3), np.uint8)
        views.cut(image, np.array((left, top, right, bottom)), by_a_worker)
        np.testing.assert_array_equal(row, by_a_worker)
    assert torch.equal(crop.one_by_one(torch.from_numpy(memory), table_N6, side), found)


@pytest.mark.parametrize("side", [1, 7, 96, 224])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (5, 3), (224, 224), (500, 375), (4500, 60), (1921, 1082)])
def test_from_one_px_to_a_reduction_by_thousands_the_bytes_are_the_same(size, side):
    memory = torch.from_numpy(np.random.default_rng(side).integers(0, 256, 3 * size[0] * size[1], dtype=np.uint8))
    table_16 = np.array([[0, size[0], 0, 0, *size]])
    assert torch.equal(crop.all_at_once(memory, table_16, side), crop.one_by_one(memory, table_16, side))


def test_a_box_of_the_size_of_its_view_is_that_view():
    memory = np.random.default_rng(0).integers(0, 256, 3 * 96 * 96, dtype=np.uint8)
    found = crop.all_at_once(torch.from_numpy(memory), np.array([[0, 96, 0, 0, 96, 96]]), 96)
    np.testing.assert_array_equal(found[0], memory.reshape(96, 96, 3))


def test_crops_are_those_of_pillow_to_within_one_level(data_dir):
    found = []
    for i, body in enumerate(photographs(data_dir, 20)):
        image = decode(body)
        size = np.array([image.shape[1::-1]])
        boxes_2B4 = views.boxes(draws(key("b", i), 1), size, range(2), np.array([(0.14, 1.0), (0.05, 0.14)]))
        for side, corners in zip((224, 96), boxes_2B4[:, 0].tolist(), strict=True):
            reference = np.asarray(Image.fromarray(image).crop(corners).resize((side, side), Image.Resampling.BILINEAR)).astype(int)
            table_16 = np.array([[0, image.shape[1], *corners]])
            ours = crop.all_at_once(torch.from_numpy(image.ravel()), table_16, side)[0].numpy()
            assert np.abs(ours - reference).max() <= 1
            found.append(psnr(ours, reference))
    assert min(found) > 52


def test_what_is_worked_on_at_once_changes_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    memory = torch.from_numpy(rng.integers(0, 256, 3 * 60 * 50, dtype=np.uint8))
    table = np.array([(0, 60, x, y, x + w, y + h) for x, y, w, h in rng.integers(1, 25, (20, 4)).tolist()])
    whole = crop.all_at_once(memory, table, 16)
    for most in (1, 16 * 24, 16 * 60):
        monkeypatch.setattr(crop, "WORKED_ON", most)
        assert torch.equal(crop.all_at_once(memory, table, 16), whole)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=50), st.sampled_from([8, 96, 224]))
def test_parts_are_all_rows_once_and_no_larger_than_memory_allows(heights, side):
    heights = np.sort(heights)
    parts = sorted(crop._parts(heights, side), key=lambda part: part.start)
    assert (parts[0].start, parts[-1].stop) == (0, len(heights)) and all(a.stop == b.start for a, b in pairwise(parts))
    assert all((p.stop - p.start) * heights[p].max() * side <= max(crop.WORKED_ON, heights[p].max() * side) for p in parts)


# -- what a worker lays on a pile ------------------------------------------------------------------------------------------


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(decode(picture(3, size=(90, 60)))), "JPEG", exif=exif)


KINDS = {
    "jpeg": picture(1, size=(80, 60)), "grey": encoded(Image.fromarray(decode(picture(2, size=(70, 70)))).convert("L"), "JPEG"),
    "turned": turned(6), "mirrored": turned(2), "png": encoded(Image.fromarray(decode(picture(4, size=(50, 90)))), "PNG"),
    "one px": encoded(Image.new("RGB", (1, 1), (9, 99, 199)), "JPEG"), "scaled": picture(5, size=(700, 600)),
    "large": picture(6, size=(400, 300)), "corrupt": BODIES["header-only"], "half a png": BODIES["truncated-png"],
}  # fmt: skip


def batch(path, bodies, deadly=frozenset()):
    file, places = path / "images", []
    with file.open("wb") as f:
        for n, body in enumerate(bodies):
            places.append(Place(str(file), ShardSample(n, n, "jpg", f.tell(), len(body))))
            f.write(body)
    return BatchSpec(tuple(places), draws(key(0, "pile"), len(bodies)), deadly)


def pile_for(B, decoded_bytes):
    return Pile(
        np.full((len(SIDES), B, COLUMNS), -(2**40)), np.full(B * crop.per_image(SIDES, decoded_bytes), 77, np.uint8), SIDES
    )  # fmt: skip


def by_the_worker(spec):
    out = tuple(np.zeros((c.count, len(spec.places), c.size, c.size, 3), np.uint8) for c in CONFIG.crops)
    return make(CONFIG, spec, out, paint=False), out


def by_the_device(spec, pile):
    sound, finished, first = make(CONFIG, spec, pile, paint=False), [], 0
    memory = torch.from_numpy(pile.needed())
    for c in CONFIG.crops:
        rows = crop.all_at_once(memory, pile.table_VB6[first : first + c.count].reshape(-1, COLUMNS), c.size)
        finished.append(rows.view(c.count, -1, c.size, c.size, 3).numpy())
        first += c.count
    return sound, tuple(finished)


def same(a, b):
    return a[0].tolist() == b[0].tolist() and all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("decoded_bytes", [1, 20_000, 60_000, 2**20])
def test_every_kind_of_image_has_the_crops_of_a_worker_however_little_room_there_is(tmp_path, decoded_bytes):
    for bodies in (KINDS.values(), reversed(KINDS.values())):
        spec = batch(tmp_path, list(bodies), frozenset({0}))
        pile = pile_for(len(KINDS), decoded_bytes)
        assert same(by_the_device(spec, pile), by_the_worker(spec))
        assert pile.used <= len(pile.memory) and pile.done == len(KINDS)


def test_each_kind_alone_has_its_crops(tmp_path):
    for name, body in KINDS.items():
        if "corrupt" not in name and "half" not in name:
            spec = batch(tmp_path, [body])
            assert same(by_the_device(spec, pile_for(1, 2**20)), by_the_worker(spec)), name


def test_an_image_is_on_the_pile_whole_if_there_is_room_and_else_its_crops_are(tmp_path):
    spec = batch(tmp_path, [picture(n, size=size) for n, size in enumerate([(40, 30), (1000, 15), (40, 30)])])
    pile = pile_for(3, 40 * 30 * 3)
    make(CONFIG, spec, pile, paint=False)
    assert pile.table_VB6[:, :, WIDTH].T.tolist() == [[40] * 3, SIDES.tolist(), [40] * 3]
    offsets = pile.table_VB6[:, :, OFFSET].T.tolist()
    assert offsets[0] == [0] * 3 and len(set(offsets[1])) == 3 and offsets[2][0] >= 40 * 30 * 3


def test_a_large_image_takes_the_room_of_the_scale_that_it_is_decoded_at(tmp_path):
    spec = batch(tmp_path, [picture(0, size=(700, 600))])
    pile = pile_for(1, 3 * 350 * 300)
    make(CONFIG, spec, pile, paint=False)
    assert pile.table_VB6[:, 0, WIDTH].max() in (350, 175, 88) and pile.table_VB6[:, 0, OFFSET].tolist() == [0, 0, 0]


def test_images_that_would_fill_the_pile_leave_room_for_the_crops_of_all_others(tmp_path):
    spec = batch(tmp_path, [picture(n, size=(40, 40)) for n in range(12)])
    pile = pile_for(12, 0)
    assert same(by_the_device(spec, pile), by_the_worker(spec))
    widths = pile.table_VB6[0, :, WIDTH].tolist()
    assert pile.used <= len(pile.memory) == 12 * crop.per_image(SIDES) and widths.count(SIDES[0]) >= 10  # 4,800 bytes against 1,728


def test_only_what_holds_the_boxes_is_needed(tmp_path):
    pile = pile_for(2, 2**20)
    make(CONFIG, batch(tmp_path, [picture(n, size=(40, 30)) for n in range(2)]), pile, paint=False)
    assert 40 * 30 * 3 < len(pile.needed()) <= pile.used < len(pile.memory)


def test_a_decoded_photograph_lies_where_it_was_decoded(tmp_path):
    """Not copied: memory that is written twice is a tenth of the work."""
    body = picture(0, size=(80, 60))
    pile = pile_for(1, 2**20)
    image = pixels(body, header(body), buffer=Buffer(pile.room()))
    assert np.shares_memory(image, pile.memory)
    np.testing.assert_array_equal(image, decode(body))


def test_the_default_room_holds_photographs_and_large_ones_decoded_at_half_their_size():
    sides = views.sides((CropConfig(count=2, size=224, scale=(0.14, 1.0)), CropConfig(count=4, size=96, scale=(0.05, 0.14))))
    assert crop.per_image(sides) == 411_648 and crop.per_image(sides, CONFIG.decoded_bytes) == 2**21 > 500 * 500 * 3
