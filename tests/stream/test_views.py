"""Decoding and crops: every kind of image, the boxes of the official code, crops as good as those of the whole image."""

import io
import random
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from streamlearn.contract.config import CropConfig
from streamlearn.contract.errors import Corrupt
from streamlearn.stream import views
from streamlearn.stream.decode import SCALES, Buffer, decode, header, pixels
from streamlearn.stream.keys import draws, key, permutation, uniform
from tests.ingest.server import BODIES, picture
from tests.stream import official


def encoded(image, kind, **more):
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


RAMP = Image.fromarray(np.linspace(0, 255, 30 * 40).reshape(30, 40).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("grey jpeg", encoded(RAMP, "JPEG")),
        ("cmyk jpeg", encoded(RAMP.convert("CMYK"), "JPEG")),
        ("16-bit png", encoded(Image.fromarray(np.asarray(RAMP).astype(np.uint16) * 257), "PNG")),
        ("palette gif", encoded(RAMP.convert("P"), "GIF")),
        ("grey alpha png", encoded(RAMP.convert("LA"), "PNG")),
        ("rgba webp", encoded(RAMP.convert("RGBA"), "WEBP", lossless=True)),
        ("1-bit png", encoded(RAMP.convert("1"), "PNG")),
    ],
)
def test_every_kind_of_image_becomes_rgb(name, data):
    pixels = decode(data)
    assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8
    if "1-bit" not in name:
        assert np.abs(pixels.astype(int) - np.asarray(RAMP)[..., None]).mean() < 6, name


def test_transparency_is_laid_on_white():
    assert decode(encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG")).min() == 255


def test_an_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode(encoded(RAMP.convert("RGB"), "JPEG", exif=exif)).shape == (40, 30, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_as_pillow_turns_it(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(decode(picture(3, size=(40, 30)))), kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    known = header(data)
    assert (known.height, known.width) == upright.shape[:2]
    np.testing.assert_array_equal(pixels(data, known), upright)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("scale", SCALES)
def test_a_scaled_decode_is_the_image_made_smaller(scale, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(decode(picture(3, size=(101, 75)))), "JPEG", exif=exif)
    known = header(data)
    small = pixels(data, known, scale=scale)
    assert small.shape == (-(-known.height // scale), -(-known.width // scale), 3)
    assert abs(small.mean() - pixels(data, known).mean()) < 4


def test_a_buffer_changes_no_pixel_and_grows_as_needed():
    buffer, bodies = Buffer(), [picture(i, size=(20 + 30 * i, 40)) for i in (1, 3, 2)]
    for body in bodies:
        np.testing.assert_array_equal(pixels(body, header(body), buffer=buffer), decode(body))


@pytest.mark.parametrize("name", ["empty", "page", "noise", "truncated-png", "header-only", "huge"])
def test_what_cannot_be_decoded_is_corrupt_with_a_reason(name):
    with pytest.raises(Corrupt, match="of [0-9]+ bytes: .+"):
        decode(BODIES[name])


def test_an_image_that_is_not_of_the_size_that_it_said_is_corrupt():
    data = encoded(RAMP, "PNG")
    with pytest.raises(Corrupt, match=r"\(40, 30\) px, and not \(41, 30\)"):
        pixels(data, replace(header(data), width=41))


def test_real_photographs_decode(data_dir):
    for body in photographs(data_dir, 60):
        reference = np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)
        assert np.abs(decode(body).astype(int) - reference).mean() < 1.0


@pytest.mark.parametrize("size", [(400, 300), (90, 640), (7, 5)])
@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14)])
def test_boxes_are_distributed_as_those_of_the_official_code(size, scale):
    count, rng = 20_000, random.Random(0)
    ours = views.boxes(draws(key("t"), count), np.tile([size], (count, 1)), range(1), np.array([scale]))[0]
    theirs = np.array([official.box(rng, *size, scale) for _ in range(count)])
    assert ours.min() >= 0 and (ours[:, 2:] <= size).all() and (ours[:, 2:] > ours[:, :2]).all()

    def measures(boxes):
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        return np.stack([boxes[:, 0], boxes[:, 1], width, height, width * height, width / height])

    for mine, reference in zip(measures(ours), measures(theirs), strict=True):
        both = np.unique(np.concatenate([mine, reference]))
        apart = np.abs(np.searchsorted(np.sort(mine), both, "right") - np.searchsorted(np.sort(reference), both, "right")).max() / count
        assert apart < 1.95 * (2 / count) ** 0.5  # Kolmogorov-Smirnov at 0.1 %


CROPS = (CropConfig(count=2, size=32, scale=(0.14, 1.0)), CropConfig(count=4, size=16, scale=(0.05, 0.14)))


@pytest.mark.parametrize(("size", "usual"), [((60, 50), 1), ((500, 375), 4), ((2000, 1500), 8)])
def test_an_image_is_decoded_at_the_smallest_scale_that_magnifies_no_crop(size, usual):
    keys, sizes = draws(key("s"), 500), np.tile([size], (500, 1))
    boxes, scales = views.plan(keys, sizes, CROPS)
    whole = views.boxes(keys, sizes, range(6), np.array([crop.scale for crop in CROPS for _ in range(crop.count)]))
    room = ((whole[..., 2:] - whole[..., :2]).min(2) / views.sides(CROPS)[:, None]).min(0)
    expected = [max([s for s in SCALES if s <= r], default=1) for r in room]
    assert scales.tolist() == expected and np.median(scales) == usual
    assert (boxes % scales[:, None] == 0).all() and (boxes[..., 2:] <= size).all()
    assert (np.abs(boxes - whole) <= np.where(scales > 1, scales, 0)[:, None]).all()  # moved by less than a px of the smaller image
    assert ((boxes[..., 2:] - boxes[..., :2]) // scales[:, None] >= views.sides(CROPS)[:, None, None] - 1)[:, scales > 1].all()


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9))


def cut(image, corners, side):
    out = np.empty((side, side, 3), np.uint8)
    views.cut(image, corners, out)
    return out


def photographs(data_dir, count):
    with tarfile.open(data_dir / "imagenet-sample-1000.tar") as tar:
        return [tar.extractfile(m).read() for m in tar.getmembers()[: count + 10] if m.isfile()][:count]


def test_crops_are_those_of_the_official_code_to_within_rounding(data_dir):
    crops = (CropConfig(count=2, size=224, scale=(0.14, 1.0)), CropConfig(count=4, size=96, scale=(0.05, 0.14)))
    found = []
    for i, body in enumerate(photographs(data_dir, 40)):
        whole, known = Image.open(io.BytesIO(body)).convert("RGB"), header(body)
        boxes, scales = views.plan(draws(key("q", i), 1), np.array([[known.width, known.height]]), crops)
        image = pixels(body, known, scale=int(scales[0]))
        for side, corners in zip(views.sides(crops).tolist(), boxes[:, 0], strict=True):
            reference = np.asarray(official.crop(whole, corners.tolist(), side))
            found.append(psnr(cut(image, corners // scales[0], side), reference))
    assert np.mean(found) > 55 and np.quantile(found, 0.05) > 45


def test_crops_of_a_scaled_decode_are_close_to_those_of_the_whole(data_dir):
    """DCT scaling is another filter than the triangle, not a worse one; a box that is off by a px would fall below 32 dB."""
    crops, found = (CropConfig(count=2, size=64, scale=(0.5, 1.0)),), []
    for i, body in enumerate(photographs(data_dir, 40)):
        known, whole = header(body), decode(body)
        boxes, scales = views.plan(draws(key("q", i), 1), np.array([[known.width, known.height]]), crops)
        image, scale = pixels(body, known, scale=int(scales[0])), int(scales[0])
        for corners in boxes[:, 0]:
            reference = np.asarray(official.crop(Image.fromarray(whole), corners.tolist(), 64))
            found += [psnr(cut(image, corners // scale, 64), reference)] if scale > 1 else []
    assert len(found) > 40 and np.mean(found) > 38 and min(found) > 30


def test_draws_are_uniform_and_independent_of_each_other():
    keys = draws(key("u"), 50_000)
    a, b = uniform(keys, 1), uniform(keys, 2)
    assert abs(a.mean() - 0.5) < 0.01 and abs(a.std() - 12**-0.5) < 0.005 and abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert sorted(permutation(key("p"), 1000).tolist()) == list(range(1000))


@pytest.mark.parametrize(("size", "side"), [((48, 48), 32), ((500, 375), 224), ((30, 60), 32)])
def test_the_evaluation_crop_is_the_centre(size, side):
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[size[1] // 2 - 3 : size[1] // 2 + 3, size[0] // 2 - 3 : size[0] // 2 + 3] = 255
    crop = views.eval_crop(image, side).astype(float)
    ys, xs = np.nonzero(crop[..., 0] > 60)
    assert crop.shape == (side, side, 3) and abs(ys.mean() - (side - 1) / 2) < 1 and abs(xs.mean() - (side - 1) / 2) < 1
