"""Decoded images on a pile, and their crops, cut and resized by the learner's device.

Who decodes has no time for more: reading a JPEG's codes takes what it takes, and resizing six views takes more than half as long again.  So
a worker decodes each image straight into memory that the learner shares, one image after another, and writes down for each view where its
box lies; the device resizes the boxes of a whole batch at once.  A photograph of 0.2 MP has 1.4 times the bytes of its six crops.

An image for which there is no room (a large one, of which a small crop is wanted) is cropped by the worker, and each crop is an image of its
own with a box around all of it, which resizing leaves as it is.  There is room for the crops of all images still to come, always.

Whoever cuts, the bytes are the same: both do torch's antialiased bilinear resize of bytes, in whole numbers.  So no view depends on its
batch mates, on who was given the room, or on the device.  On a CPU torch's own code cuts one view after another; elsewhere:

  filter     a triangle that reaches one px of the view to either side, but no less than one px of the image; cut off at the box's edge,
             normalised in float64, and rounded to 16-bit whole numbers with as many bits after the point as the largest leaves room for
  passes     rows first, rounded to bytes, then columns

Shapes: V views, B images, N rows (views of images), S the side of a view in px, T taps, H the height of the highest box.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from streamlearn.stream import views
from streamlearn.stream.decode import Pixels
from streamlearn.stream.views import Ints

OFFSET, WIDTH, LEFT, TOP, RIGHT, BOTTOM = range(6)  # where a view lies: first byte of its image, px in a row of that; the box in px
COLUMNS = 6
WORKED_ON = 2**22  # px of the first pass at once: 80 MB, and as much for rounding
_ALIGNED = 64  # bytes: images begin with a cache line
_BITS = 22  # after the point, at most: a sum of 255 times the weights fits into 32


def per_image(sides_V: Ints, decoded_bytes: int = 0) -> int:
    """Bytes on a pile for an image: on the average so many, and never less than its finished crops take."""
    return _up(max(decoded_bytes, 3 * int(np.square(sides_V).sum())))


@dataclass
class Pile:
    """The images of one batch, in the making or made."""

    table_VB6: Ints
    memory: Pixels  # B * per_image bytes
    sides_V: Ints
    used: int = 0  # bytes
    done: int = 0  # images

    def room(self) -> Pixels:
        """For the next image, if all that follow come as finished crops."""
        following = self.table_VB6.shape[1] - self.done - 1
        return self.memory[self.used : len(self.memory) - following * per_image(self.sides_V)]

    def add(self, slot: int, image: Pixels, boxes_V4: Ints) -> None:
        """An image that fits into `room`, most likely decoded there; boxes in its px."""
        place = self.memory[self.used : self.used + image.size]
        if not np.may_share_memory(place, image):  # turned upright, or decoded by Pillow
            place.reshape(image.shape)[...] = image
        self.table_VB6[:, slot, OFFSET], self.table_VB6[:, slot, WIDTH] = self.used, image.shape[1]
        self.table_VB6[:, slot, LEFT:] = boxes_V4
        self._next(image.size)

    def add_crops(self, slot: int, image: Pixels, boxes_V4: Ints) -> None:
        """Its crops alone."""
        start = self.used
        for view, side in enumerate(self.sides_V.tolist()):
            size = 3 * side * side
            views.cut(image, boxes_V4[view], self.memory[start : start + size].reshape(side, side, 3))
            self.table_VB6[view, slot] = start, side, 0, 0, side, side
            start += size
        self._next(start - self.used)

    def needed(self) -> Pixels:
        """The bytes up to the end of the last line that a box reaches to: what must go to the device."""
        offset, width, bottom = (self.table_VB6[..., column] for column in (OFFSET, WIDTH, BOTTOM))
        return self.memory[: int((offset + 3 * width * bottom).max())]

    def _next(self, size: int) -> None:
        self.used, self.done = self.used + _up(size), self.done + 1


def _up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


# -- the device's part -----------------------------------------------------------------------------------------------------


def resized(memory: Tensor, table_N6: Ints, side: int) -> Tensor:
    """(N,S,S,3) uint8, on the device of `memory`, the bytes of a pile."""
    return (one_by_one if memory.device.type == "cpu" else all_at_once)(memory, table_N6, side)


def one_by_one(memory: Tensor, table_N6: Ints, side: int) -> Tensor:
    """By torch's own code for a CPU, which has no counterpart for bytes elsewhere."""
    pixels, out = memory.numpy(), np.empty((len(table_N6), side, side, 3), np.uint8)
    for row, (offset, width, left, top, right, bottom) in enumerate(table_N6.tolist()):
        lines = pixels[offset : offset + 3 * width * bottom].reshape(bottom, width, 3)
        views.cut(lines, np.array((left, top, right, bottom)), out[row])
    return torch.from_numpy(out)


def all_at_once(memory: Tensor, table_N6: Ints, side: int) -> Tensor:
    """The same with operations that every device has.  It waits for nothing: sizes are known here, and one small table goes to the device."""
    boxes_N2 = table_N6[:, [RIGHT, BOTTOM]] - table_N6[:, [LEFT, TOP]]
    order = np.argsort(boxes_N2[:, 1], kind="stable")  # like heights together: the highest of a part decides what the part takes
    sorted_N7 = torch.from_numpy(np.column_stack([table_N6, np.arange(len(table_N6))])[order])
    if memory.is_cuda:
        sorted_N7 = sorted_N7.pin_memory()
    sorted_N7 = sorted_N7.to(memory.device, non_blocking=True)
    out = torch.empty(len(order), side, side, 3, dtype=torch.uint8, device=memory.device)
    padded = F.pad(memory, (0, 3 * int(boxes_N2[:, 0].max())))  # a line as wide as the widest box may begin with any byte of the pile
    for part in _parts(boxes_N2[order, 1], side):
        width, height = (int(length) for length in boxes_N2[order[part]].max(axis=0))
        out[sorted_N7[part, COLUMNS]] = _part(padded, sorted_N7[part], side, width, height)
    return out


def _parts(heights_N: NDArray[np.int64], side: int) -> list[slice]:
    """Of rows in rising order of height, as many at once as memory allows."""
    parts, end = list[slice](), len(heights_N)
    while end:
        count = max(1, WORKED_ON // (int(heights_N[end - 1]) * side))
        parts.append(slice(max(0, end - count), end))
        end = parts[-1].start
    return parts


def _part(padded: Tensor, rows_N7: Tensor, side: int, width: int, height: int) -> Tensor:
    """(N,S,S,3) uint8 of rows whose boxes are at most so large."""
    N, device = len(rows_N7), padded.device
    offset, across, left, top, right, bottom, _ = rows_N7.unsqueeze(2).unbind(1)  # (N,1) each
    last_x, last_y = right - left - 1, bottom - top - 1
    lines_MWC = padded.as_strided((len(padded) - 3 * width, width, 3), (1, 3, 1))  # overlapping: one that begins with each byte
    first_NS, weights_NST, shift_N1 = _filter(right - left, side, width)
    y_NH = torch.arange(height, device=device).expand(N, -1).minimum(last_y)
    starts_NH1 = (offset + 3 * (across * (top + y_NH) + left))[:, :, None]
    sum_NHSC = torch.zeros(N, height, side, 3, dtype=torch.int32, device=device)
    for tap in range(weights_NST.shape[2]):
        x_N1S = (first_NS + tap).minimum(last_x)[:, None]  # beyond the box the weight is 0
        sum_NHSC.addcmul_(lines_MWC[starts_NH1, x_N1S], weights_NST[:, None, :, tap, None])
    lines_NHSC = _bytes(sum_NHSC, shift_N1)

    first_NS, weights_NST, shift_N1 = _filter(bottom - top, side, height)
    row_N1 = torch.arange(N, device=device)[:, None]
    sum_NSSC = torch.zeros(N, side, side, 3, dtype=torch.int32, device=device)
    for tap in range(weights_NST.shape[2]):
        y_NS = (first_NS + tap).minimum(last_y)
        sum_NSSC.addcmul_(lines_NHSC[row_N1, y_NS], weights_NST[:, :, None, tap, None])
    return _bytes(sum_NSSC, shift_N1)


def _filter(length_N1: Tensor, side: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N,S) the first px that each px of a view is made of, (N,S,T) its and the following px' weights, (N,1) the bits after their point.

    Step for step what ATen's UpSampleKernel.cpp does for bytes (_compute_indices_min_size_weights_aa, compute_index_ranges_int16_weights).
    """
    device = length_N1.device
    # by a tensor: a GPU divides by a number by multiplying with its inverse, which is rounded otherwise
    scale_N1 = length_N1.double() / torch.full_like(length_N1, side)
    reach_N1, shrink_N1 = scale_N1.clamp(min=1), 1 / scale_N1.clamp(min=1)
    taps = math.ceil(2 * max(1.0, longest / side))
    centre_NS = scale_N1 * (torch.arange(side, device=device, dtype=torch.float64) + 0.5)
    first_NS = (centre_NS - reach_N1 + 0.5).long().clamp(min=0)
    count_NS = (centre_NS + reach_N1 + 0.5).long().minimum(length_N1) - first_NS
    tap_T = torch.arange(taps, device=device)
    away_NST = ((tap_T + first_NS[..., None] - centre_NS[..., None] + 0.5) * shrink_N1[..., None]).abs()
    weights_NST = (1 - away_NST).clamp(min=0) * (tap_T < count_NS[..., None])
    total_NS = torch.zeros_like(centre_NS)
    for tap in range(taps):  # in this order: a sum that is rounded otherwise could round a weight otherwise
        total_NS = total_NS + weights_NST[..., tap]
    weights_NST = weights_NST / total_NS[..., None]
    powers = 1 << torch.arange(1, _BITS + 1, device=device)
    shift_N1 = (weights_NST.amax((1, 2))[:, None] * powers + 0.5 < 2**15).sum(1, keepdim=True)
    return first_NS, (weights_NST * (1 << shift_N1)[..., None] + 0.5).int(), shift_N1.int()


def _bytes(sum_NHSC: Tensor, shift_N1: Tensor) -> Tensor:
    shift = shift_N1[:, :, None, None]
    return ((sum_NHSC + (1 << (shift - 1))) >> shift).clamp_(0, 255).to(torch.uint8)
