"""Flip, colour and blur: drawn and done as the official code does, on batches in floats and on single crops in bytes."""

import collections
import random

import numpy as np
import pytest
import torch
from PIL import Image

from streamlearn.contract.config import StreamConfig
from streamlearn.stream import distort, distort_cpu, views
from streamlearn.stream.decode import decode
from streamlearn.stream.distort import Distortions
from streamlearn.stream.keys import draws, key
from tests.ingest.server import picture
from tests.stream import official
from tests.stream.test_views import photographs

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
CONFIG = StreamConfig(**PLAIN)


def some_crops(data_dir, count, size):
    bodies = photographs(data_dir, count)
    return np.stack([np.asarray(Image.fromarray(decode(body)).resize((size, size), Image.Resampling.BILINEAR)) for body in bodies])


def on_batches(crops, drawn, config=CONFIG):
    return (distort.distorted(torch.from_numpy(crops), drawn, config) * 255).permute(0, 2, 3, 1).numpy()


def on_bytes(crops, drawn, config=CONFIG):
    return np.stack([distort_cpu.distorted(crop, drawn, i) for i, crop in enumerate(crops)]).astype(float)


def by_the_official_code(crops, drawn):
    return np.stack(
        [
            np.asarray(
                official.done(
                    Image.fromarray(crop), flip=drawn.flip_N[i], jitter=drawn.jitter_N[i], order=drawn.order_N4[i].tolist(),
                    factors=drawn.factor_N4[i].tolist(), grey=drawn.grey_N[i], sigma=float(drawn.sigma_N[i]),
                )
            ).astype(float)
            for i, crop in enumerate(crops)
        ]
    )  # fmt: skip


WAYS = pytest.mark.parametrize("way", [on_batches, on_bytes])


@WAYS
def test_the_same_draws_give_the_pixels_of_the_official_code(way, data_dir):
    crops = some_crops(data_dir, 60, 96)
    drawn = distort.draw(draws(key("o"), len(crops)), range(1), CONFIG)
    apart = np.abs(way(crops, drawn) - by_the_official_code(crops, drawn)).mean((1, 2, 3))
    assert np.mean(apart) < 1.5 and apart.max() < 2.5  # levels of 255; Pillow cuts off what is under one after each operation, we do not


def only(**one):
    """Draws in which nothing happens but this."""
    nothing = {
        "flip_N": [False], "jitter_N": [False], "order_N4": [[0, 1, 2, 3]], "factor_N4": [[1.0, 1.0, 1.0, 0.0]], "grey_N": [False], "sigma_N": [0.0],
    }  # fmt: skip
    return Distortions(**{name: np.array(value) for name, value in (nothing | one).items()})


@WAYS
@pytest.mark.parametrize(
    "one",
    [
        {"flip_N": [True]}, {"grey_N": [True]}, {"sigma_N": [0.3]}, {"sigma_N": [1.0]}, {"sigma_N": [1.9]},
        {"jitter_N": [True], "factor_N4": [[1.7, 1.0, 1.0, 0.0]]}, {"jitter_N": [True], "factor_N4": [[1.0, 0.3, 1.0, 0.0]]},
        {"jitter_N": [True], "factor_N4": [[1.0, 1.8, 1.0, 0.0]]}, {"jitter_N": [True], "factor_N4": [[1.0, 1.0, 1.8, 0.0]]},
        {"jitter_N": [True], "factor_N4": [[1.0, 1.0, 1.0, 0.19]]}, {"jitter_N": [True], "factor_N4": [[1.0, 1.0, 1.0, -0.2]]},
        {"jitter_N": [True], "factor_N4": [[1.6, 0.5, 1.5, 0.1]], "order_N4": [[3, 1, 0, 2]]},
        {"jitter_N": [True], "factor_N4": [[1.6, 0.5, 1.5, 0.1]], "order_N4": [[2, 0, 1, 3]], "grey_N": [True]},
    ],
    ids=str,
)  # fmt: skip
def test_each_operation_is_that_of_the_official_code(way, one, data_dir):
    crops = some_crops(data_dir, 8, 64)
    for crop in crops:
        mine, reference = way(crop[None], only(**one)), by_the_official_code(crop[None], only(**one))
        assert np.abs(mine - reference).mean() < 2.0
        assert abs((mine - reference).mean()) < (2.0 if one.get("factor_N4", [[0]])[0][0] == 1.6 else 1.0)  # neither lighter nor darker


def test_without_draws_a_view_is_the_crop_itself():
    crop = decode(picture(1, size=(32, 32)))[None]
    np.testing.assert_allclose(on_batches(crop, only()), crop, atol=1e-3)
    np.testing.assert_array_equal(on_bytes(crop, only()), crop)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_draws_are_distributed_as_those_of_the_official_code(strength):
    count, rng = 20_000, random.Random(1)
    ours = distort.draw(draws(key("d"), count), range(3, 4), StreamConfig(jitter=strength))
    theirs = [official.draw(rng, strength) for _ in range(count)]
    for name, mine in (("flip", ours.flip_N), ("jitter", ours.jitter_N), ("grey", ours.grey_N), ("sigma", ours.sigma_N > 0)):
        assert abs(mine.mean() - np.mean([bool(t[name]) for t in theirs])) < 0.015, name
    numbers = [(ours.factor_N4[:, i], np.array([t["factors"][i] for t in theirs])) for i in range(4)]
    numbers.append((ours.sigma_N[ours.sigma_N > 0], np.array([t["sigma"] for t in theirs if t["sigma"]])))
    for mine, reference in numbers:
        np.testing.assert_allclose(np.quantile(mine, np.linspace(0, 1, 11)), np.quantile(reference, np.linspace(0, 1, 11)), atol=0.04)
    orders = collections.Counter(map(tuple, ours.order_N4.tolist()))
    assert len(orders) == 24 and max(orders.values()) < 1.2 * count / 24 and min(orders.values()) > 0.8 * count / 24


def test_the_draws_of_a_sample_are_independent_of_each_other():
    drawn = distort.draw(draws(key("i"), 20_000), range(1), CONFIG)
    more = distort.draw(draws(key("i"), 20_000), range(1, 2), CONFIG)
    columns = [
        drawn.flip_N,
        drawn.jitter_N,
        drawn.grey_N,
        drawn.sigma_N,
        *drawn.factor_N4.T,
        drawn.order_N4[:, 0],
        more.flip_N,
        more.sigma_N,
    ]
    correlated = np.abs(np.corrcoef(np.array(columns, dtype=float)) - np.eye(len(columns)))
    assert correlated.max() < 0.03


@WAYS
def test_views_look_as_the_official_ones_do(way, data_dir):
    """Brightness, spread, colourfulness and detail over many crops: the means agree to within their sampling error."""
    crops, rng = np.concatenate([some_crops(data_dir, 100, 48)] * 8), random.Random(2)
    mine = way(crops, distort.draw(draws(key("l"), len(crops)), range(1), CONFIG))
    theirs = np.stack([np.asarray(official.done(Image.fromarray(c), **official.draw(rng))).astype(float) for c in crops])

    def looks(x):
        detail = np.abs(np.diff(x, axis=1)).mean((1, 2, 3))
        return np.stack([x.mean((1, 2, 3)), x.std((1, 2, 3)), (x.max(3) - x.min(3)).mean((1, 2)), detail, (x > 254).mean((1, 2, 3))])

    for a, b in zip(looks(mine), looks(theirs), strict=True):
        assert abs(a.mean() - b.mean()) < 4 * ((a.var() + b.var()) / len(a)) ** 0.5
        assert 0.85 < a.std() / b.std() < 1.18


def test_no_jitter_and_no_blur_leave_the_flip():
    drawn = distort.draw(draws(key("n"), 1000), range(1), StreamConfig(jitter=0.0, blur=0.0))
    assert not drawn.jitter_N.any() and not drawn.grey_N.any() and not drawn.sigma_N.any() and 400 < drawn.flip_N.sum() < 600


@WAYS
def test_a_view_does_not_depend_on_its_batch_mates(way, data_dir):
    crops, keys = some_crops(data_dir, 12, 32), draws(key("k"), 12)
    whole = way(crops, distort.draw(keys, range(1), CONFIG))
    for i in (0, 5, 11):
        alone = way(crops[i : i + 1], distort.draw(keys[i : i + 1], range(1), CONFIG))
        np.testing.assert_allclose(alone[0], whole[i], atol=1e-3)


def test_rows_are_the_views_of_all_images_one_view_after_another():
    keys = draws(key("r"), 7)
    both, second = distort.draw(keys, range(2, 4), CONFIG), distort.draw(keys, range(3, 4), CONFIG)
    assert len(both.flip_N) == 14
    np.testing.assert_array_equal(both.rows(slice(7, 14)).factor_N4, second.factor_N4)


def test_large_batches_are_worked_on_in_parts(monkeypatch, data_dir):
    crops = some_crops(data_dir, 10, 32)
    drawn = distort.draw(draws(key("p"), 10), range(1), StreamConfig())
    whole = distort.distorted(torch.from_numpy(crops), drawn, StreamConfig())
    monkeypatch.setattr(distort, "ROWS", 3)
    torch.testing.assert_close(distort.distorted(torch.from_numpy(crops), drawn, StreamConfig()), whole, atol=1e-4, rtol=0)


def test_the_evaluation_pixels_and_the_distorted_are_normalised_alike(data_dir):
    crops, config = some_crops(data_dir, 3, 32), StreamConfig(jitter=0, blur=0)
    drawn = Distortions(*(np.concatenate([getattr(only(), name)] * 3) for name in only().__dataclass_fields__))
    torch.testing.assert_close(distort.distorted(torch.from_numpy(crops), drawn, config), views.normalised(crops, config.mean, config.std))
