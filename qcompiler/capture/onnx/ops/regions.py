"""Values between the pixels, and poolings over regions of interest."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import op


def between(x: Tensor, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`x` (N, C, H, W) at real places of its images: bilinear, zero outside; (places…, C)."""
    corners = corners_of(x, image, row, column)
    return torch.stack([value * weight for value, weight in corners]).sum(0)


def corners_of(
    x: Tensor, image: Tensor, row: Tensor, column: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The four pixels around each place, and the share of each."""
    height, width = x.shape[2:]
    last = x.permute(0, 2, 3, 1)
    found = []
    for down in (0, 1):
        for right in (0, 1):
            r, q = torch.floor(row) + down, torch.floor(column) + right
            share = (1 - (row - r).abs()) * (1 - (column - q).abs())
            inside = (r >= 0) & (r < height) & (q >= 0) & (q < width)
            index = [image, r.clamp(0, height - 1).long(), q.clamp(0, width - 1).long()]
            pixels: Tensor = torch.ops.aten.index.Tensor(last, index)
            found.append((pixels, torch.where(inside, share, 0.0).unsqueeze(-1)))
    return found


@op("RoiAlign")
def roi_align(call: Call, x: Tensor, rois: Tensor, image: Tensor) -> Tensor:
    """The mean (or the largest corner) of a grid of points in each cell of each region."""
    height, width = call.int("output_height", 1), call.int("output_width", 1)
    points = call.int("sampling_ratio", 0)
    if points < 1:
        raise call.refusal(
            "sampling_ratio is 0, so that the number of points depends on the regions; expected 1 "
            "or more"
        )
    half = call.version >= 16 and call.text("coordinate_transformation_mode", "half_pixel")
    shift = 0.5 if half == "half_pixel" else 0.0
    corners = rois * call.float("spatial_scale", 1.0) - shift
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not shift:
        extent = extent.clamp(min=1.0)
    # Axes: region, row of cells, column of cells, row of points, column of points.
    row = _points(start[:, 1], extent[:, 1], height, points)[:, :, None, :, None]
    column = _points(start[:, 0], extent[:, 0], width, points)[:, None, :, None, :]
    rows, columns = x.shape[2:]
    row, column = torch.broadcast_tensors(row, column)
    inside = (row >= -1) & (row <= rows) & (column >= -1) & (column <= columns)
    found = corners_of(
        x, image.reshape(-1, 1, 1, 1, 1), row.clamp(0, rows - 1), column.clamp(0, columns - 1)
    )
    parts = torch.stack([value * share for value, share in found])
    keep = inside.unsqueeze(-1).to(x.dtype)
    if call.text("mode", "avg") == "max":
        pooled: Tensor = (parts.amax(0) * keep).amax((3, 4))
    else:
        pooled = (parts.sum(0) * keep).mean((3, 4))
    return pooled.permute(0, 3, 1, 2)


def _points(start: Tensor, extent: Tensor, cells: int, points: int) -> Tensor:
    """Centres of `points` equal parts of each of `cells` equal cells: (regions, cells, points)."""
    steps = (torch.arange(cells * points, dtype=start.dtype) + 0.5) / (cells * points)
    return (start[:, None] + extent[:, None] * steps).reshape(-1, cells, points)


@op("MaxRoiPool")
def max_roi_pool(call: Call, x: Tensor, rois: Tensor) -> Tensor:
    """The largest element of each cell of each region; regions are (image, x, y, x, y)."""
    shape = call.ints("pooled_shape")
    corners = torch.floor(rois[:, 1:] * call.float("spatial_scale", 1.0) + 0.5)
    picked = torch.index_select(x, 0, rois[:, 0].long())
    rows = _cells(corners[:, 1], corners[:, 3], shape[0], x.shape[2])
    columns = _cells(corners[:, 0], corners[:, 2], shape[1], x.shape[3])
    low = float("-inf")
    across = [torch.where(columns[:, None, None, i], picked, low).amax(-1) for i in range(shape[1])]
    wide = torch.stack(across, -1)
    down = [torch.where(rows[:, None, i, :, None], wide, low).amax(-2) for i in range(shape[0])]
    pooled = torch.stack(down, -2)
    return torch.where(torch.isinf(pooled), 0.0, pooled)


def _cells(start: Tensor, end: Tensor, cells: int, size: int) -> Tensor:
    """Which pixels lie in which cell: (regions, cells, size)."""
    step = (end - start + 1).clamp(min=1.0) / cells
    numbers = torch.arange(cells, dtype=start.dtype)
    low = torch.floor(numbers * step[:, None]) + start[:, None]
    high = torch.ceil((numbers + 1) * step[:, None]) + start[:, None]
    pixels = torch.arange(size, dtype=start.dtype)
    return (pixels >= low[:, :, None]) & (pixels < high[:, :, None])
