"""The distortions of stream/distort.py on the bytes of one crop: what a worker does where the learner has no device to do it on.

OpenCV's vectorised integer code: three times as fast as the same in torch on a CPU, and rounded to bytes after each operation as the
official code has it.
"""

import functools
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from streamlearn.stream.decode import Pixels
from streamlearn.stream.distort import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION, Distortions, kernel

cv2.setNumThreads(1)  # a view is too small to share out: with threads each call waits longer for them than it works
_GREY = np.tile(np.array(LUMA, dtype=np.float32), (3, 1))
_SAME = np.eye(3, dtype=np.float32)


def distorted(crop: Pixels, draws: Distortions, row: int) -> Pixels:
    """(S,S,3), with the draws of that row; not normalised."""
    x: NDArray[Any] = cv2.flip(crop, 1) if draws.flip_N[row] else crop
    if draws.jitter_N[row]:
        for kind in draws.order_N4[row].tolist():
            x = _adjusted(x, kind, float(draws.factor_N4[row, kind]))
    if draws.grey_N[row]:
        x = cv2.transform(x, _GREY)
    if draws.sigma_N[row] > 0:
        taps = _taps(round(float(draws.sigma_N[row]), 2))
        x = cv2.sepFilter2D(x, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    return x


def _adjusted(x: NDArray[Any], kind: int, factor: float) -> NDArray[Any]:
    if kind == BRIGHTNESS:
        return cv2.convertScaleAbs(x, alpha=factor)
    if kind == CONTRAST:
        mean = cv2.mean(x)[:3] @ np.array(LUMA)
        return cv2.addWeighted(x, factor, x, 0, (1 - factor) * mean)
    if kind == SATURATION:
        return cv2.transform(x, factor * _SAME + (1 - factor) * _GREY)
    assert kind == HUE
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV_FULL)
    turned = np.tile(np.array([int(factor * 255) & 255, 0, 0], dtype=np.uint8), x.shape[1])  # a turn is 256 here, and bytes wrap
    rows = hsv.reshape(len(hsv), -1)  # added row by row: every third byte by itself takes three times as long
    np.add(rows, turned, out=rows)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@functools.lru_cache(maxsize=256)
def _taps(sigma: float) -> NDArray[np.float32]:
    """In 256ths that add up to one: OpenCV's integer filter rounds each tap by itself, and would lighten or darken the view."""
    taps = np.rint(kernel(sigma) * 256)
    taps[len(taps) // 2] += 256 - taps.sum()
    return (taps / 256).astype(np.float32)
