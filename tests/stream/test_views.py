"""Decoding and views: every kind of image, the right distributions, nothing that depends on batch mates."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from streamlearn.contract.config import CropConfig, StreamConfig
from streamlearn.contract.errors import Corrupt
from streamlearn.stream import views
from streamlearn.stream.decode import decode
from streamlearn.stream.keys import draws, key, permutation, uniform
from tests.ingest.server import BODIES, picture


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


@pytest.mark.parametrize("name", ["empty", "page", "noise", "truncated-png", "header-only", "huge"])
def test_what_cannot_be_decoded_is_corrupt_with_a_reason(name):
    with pytest.raises(Corrupt, match="of [0-9]+ bytes: .+"):
        decode(BODIES[name])


def test_real_photographs_decode(data_dir):
    import tarfile

    with tarfile.open(data_dir / "imagenet-sample-1000.tar") as tar:
        bodies = [tar.extractfile(m).read() for m in tar.getmembers()[:60] if m.isfile()]
    for body in bodies:
        reference = np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)
        assert np.abs(decode(body).astype(int) - reference).mean() < 1.0


def test_boxes_have_the_areas_and_ratios_of_the_recipe():
    keys, sizes = draws(key("t"), 20_000), np.tile([[400, 300]], (20_000, 1))
    left, top, right, bottom = views.boxes(keys, sizes, 0, (0.14, 1.0)).T
    area, ratio = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 400 and bottom.max() <= 300
    assert 0.14 <= area.min() < 0.15 and 0.93 < area.max() <= 1.0
    assert ratio.min() > 0.74 and ratio.max() < 1.34 and abs(np.log(ratio).mean()) < 0.05  # a landscape keeps a few more of the wide ones
    small = views.boxes(keys, sizes, 0, (0.05, 0.14))
    shares = (small[:, 2] - small[:, 0]) * (small[:, 3] - small[:, 1]) / 120_000
    np.testing.assert_allclose(np.quantile(shares, [0.25, 0.5, 0.75]), [0.0725, 0.095, 0.1175], rtol=0.02)  # uniform in area


def test_draws_are_uniform_and_independent_of_each_other():
    keys = draws(key("u"), 50_000)
    a, b = uniform(keys, 1), uniform(keys, 2)
    assert abs(a.mean() - 0.5) < 0.01 and abs(a.std() - 12**-0.5) < 0.005 and abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert sorted(permutation(key("p"), 1000).tolist()) == list(range(1000))


CONFIG = StreamConfig(crops=(CropConfig(count=2, size=24, scale=(0.2, 1.0)),), jitter=1.0, blur=0.5)


def made(images, keys):
    return views.augment(views.crops(images, keys, CONFIG.crops[0], 0), keys, CONFIG, 0)


def test_a_view_does_not_depend_on_its_batch_mates():
    images, keys = [decode(picture(i, size=(40, 30))) for i in range(6)], draws(key("k"), 6)
    whole = made(images, keys)
    for i in (0, 3, 5):
        torch.testing.assert_close(made([images[i]], keys[i : i + 1])[:, 0], whole[:, i], atol=1e-5, rtol=1e-5)
    swapped = made(images[::-1], keys[::-1].copy())
    torch.testing.assert_close(swapped.flip(1), whole, atol=1e-5, rtol=1e-5)


def test_colour_distortion_has_the_probabilities_of_the_recipe():
    matrix, contrast = views.colour(draws(key("c"), 20_000), 0, 1.0)
    grey = (matrix[:, 0] - matrix[:, 1]).abs().amax(1) < 1e-9
    plain = ((matrix - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2)) < 1e-9) & (contrast == 1)
    assert abs(grey.double().mean() - 0.2) < 0.01 and abs(plain.double().mean() - 0.2 * 0.8) < 0.01
    assert 0.2 <= contrast.min() < 0.25 and 1.75 < contrast.max() <= 1.8


def test_without_jitter_and_blur_a_view_is_the_crop_itself():
    config = CONFIG.model_copy(update={"jitter": 0.0, "blur": 0.0})
    pixels = views.crops([decode(picture(1))], draws(key("x"), 1), config.crops[0], 0)
    out = views.augment(pixels, draws(key("x"), 1), config, 0)
    back = out * torch.tensor(config.std).view(1, 1, 3, 1, 1) + torch.tensor(config.mean).view(1, 1, 3, 1, 1)
    torch.testing.assert_close((back * 255).round().to(torch.uint8), torch.from_numpy(pixels).permute(0, 1, 4, 2, 3))


def test_blur_smooths_about_half_of_the_views_and_keeps_their_mean():
    keys = draws(key("b"), 400)
    x = torch.rand(400, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    y = views._blurred(x, keys, 0.5, 0, 1)
    touched = (y != x).flatten(1).any(1)
    assert 0.42 < touched.double().mean() < 0.58
    torch.testing.assert_close(y.mean((2, 3)), x.mean((2, 3)), atol=0.03, rtol=0)
    strong = y[touched].std((2, 3)).mean() / x[touched].std((2, 3)).mean()
    assert strong < 0.6


@pytest.mark.parametrize(("size", "side"), [((48, 48), 32), ((500, 375), 224), ((30, 60), 32)])
def test_the_evaluation_crop_is_the_centre(size, side):
    image = np.zeros((size[1], size[0], 3), np.uint8)
    image[size[1] // 2 - 3 : size[1] // 2 + 3, size[0] // 2 - 3 : size[0] // 2 + 3] = 255
    crop = views.eval_crop(image, side).astype(float)
    ys, xs = np.nonzero(crop[..., 0] > 60)
    assert crop.shape == (side, side, 3) and abs(ys.mean() - (side - 1) / 2) < 1 and abs(xs.mean() - (side - 1) / 2) < 1
