"""One pass, killed again and again: the short form of `python -m bench.passes`."""

import pytest

from bench.passes import coloured, drive, numbers, wrong
from streamlearn.stream.decode import decode


def test_the_colour_of_an_image_spells_its_number():
    import torch

    for number in (0, 39, 40, 12_345, 63_999):
        x = torch.from_numpy(decode(coloured(number)).copy()).permute(2, 0, 1).float()[None, None] / 255
        assert numbers(x) == [number]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_again_and_again_during_one_pass_each_sample_is_fresh_exactly_once(tmp_path):
    assert drive(tmp_path, samples=1200, kills=6, seed=4, limit_s=550) == 6
    assert wrong(tmp_path, 1200) == []
