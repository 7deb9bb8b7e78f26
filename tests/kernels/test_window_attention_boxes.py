"""The cut of a map into boxes, against the roll, the partition and the mask that it replaces."""

import math

import pytest
import torch
from bevt_kernels.testing import relative_index
from bevt_kernels.window_attention import boxes, reference

CPU = torch.device("cpu")
MAPS = [
    # grid, window, shift, table window
    ((8, 14, 14), (8, 7, 7), (0, 3, 3), (8, 7, 7)),
    ((4, 6, 6), (2, 3, 3), (1, 1, 2), (2, 4, 3)),
    ((3, 5, 4), (3, 5, 4), (1, 4, 2), (3, 5, 4)),
    ((1, 7, 14), (1, 7, 7), (0, 0, 0), (8, 7, 7)),
]


def box_tokens(cut: boxes.Cut) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every box: where its tokens lie among all clips' tokens, and their rows of the table relative to the first."""
    found = []
    for shape, start, first, count in cut.shapes:
        n = math.prod(shape)
        for origin in cut.origins[first : first + count]:
            found.append((origin + cut.tokens[start : start + n], cut.table_rows[start : start + n]))
    return found


@pytest.mark.parametrize(("size", "window", "shift"), [(12, 4, 0), (12, 4, 3), (4, 4, 1), (1, 1, 0)])
def test_segments_cover_the_axis(size: int, window: int, shift: int) -> None:
    lengths = [window] * (size // window) if not shift else [shift, *[window] * (size // window - 1), window - shift]
    found = boxes.segments(size, window, shift)
    assert [length for _, length in found] == lengths
    assert [start for start, _ in found] == [sum(lengths[:i]) for i in range(len(lengths))]


@pytest.mark.parametrize(("grid", "window", "shift", "table"), MAPS)
def test_boxes_hold_the_pairs_that_the_mask_leaves(grid, window, shift, table) -> None:
    clips = 2
    place = torch.arange(clips * math.prod(grid)).view(clips, *grid, 1).double()
    windows = reference.partition(place, 1, 1, window, shift)[0, :, 0, :, 0].long()  # (B * n, N) places on the map
    mask = reference.border_bias(grid, window, shift, place)
    expected = set()
    for i, tokens in enumerate(windows):
        kept = torch.ones(len(tokens), len(tokens), dtype=torch.bool) if mask is None else mask[i % len(mask), 0] == 0
        query, key = kept.nonzero().T
        expected |= set(zip(tokens[query].tolist(), tokens[key].tolist()))
    found = box_tokens(boxes.cut(clips, grid, window, shift, table, CPU))
    pairs = [pair for tokens, _ in found for pair in torch.cartesian_prod(tokens, tokens).tolist()]
    assert len(pairs) == len(expected)
    assert {tuple(pair) for pair in pairs} == expected


@pytest.mark.parametrize(("grid", "window", "shift", "table"), MAPS)
def test_table_rows_follow_true_offsets(grid, window, shift, table) -> None:
    cut = boxes.cut(1, grid, window, shift, table, CPU)
    for shape, start, _, _ in cut.shapes:
        rows = cut.table_rows[start : start + math.prod(shape)]
        row = rows[:, None] - rows[None] + boxes.table_size(table) // 2
        assert torch.equal(row.long(), relative_index(shape, table))


def test_padding_looks_up_minus_infinity() -> None:
    table_window = (2, 3, 3)
    cut = boxes.cut(1, (2, 3, 3), (2, 3, 3), (1, 1, 0), table_window, CPU)
    rows = boxes.table_size(table_window)
    padded = boxes.padded_table(torch.randn(rows, 2), 2.0)
    for shape, start, _, _ in cut.shapes:
        n = math.prod(shape)
        query = cut.table_rows[start : start + boxes.PAD].long()
        key = torch.where(torch.arange(boxes.PAD) < n, -query, query)
        bias = padded[1][rows // 2 + query[:, None] + key]
        assert bias[:n, :n].isfinite().all()
        assert (bias[n:] == -math.inf).all()
        assert (bias[:, n:] == -math.inf).all()
        assert (cut.tokens[start + n : start + boxes.PAD] == cut.tokens[start + n - 1]).all()


def test_groups_share_a_shape_and_hold_every_box_once() -> None:
    call = (3, (4, 6, 6), (2, 3, 3), (1, 1, 2), (2, 4, 3), CPU)
    cut, groups, sums = boxes.cut(*call), boxes.groups(*call, 4), boxes.bias_sums(*call, 4, 8)
    held = [box for _, _, first, count in groups.tolist() for box in range(first, first + count)]
    assert held == list(range(len(cut.origins)))
    assert groups[:, 3].max() <= 4
    assert (groups[:-1, 0] >= groups[1:, 0]).all()  # the long ones first
    at, tiles = 0, 0
    for (first, pieces, side, *box), (shape, start, _, count) in zip(sums.shapes.tolist(), cut.shapes):
        assert tuple(box) == shape
        assert groups[at : at + pieces, 1].tolist() == [start] * pieces
        assert groups[at : at + pieces, 3].sum() == count
        assert 8 * (side - 1) < math.prod(shape) <= 8 * side
        assert sums.starts[at : at + pieces].tolist() == [tiles + i * side**2 for i in range(pieces)]
        assert first == tiles
        at, tiles = at + pieces, tiles + pieces * side**2
    assert (at, tiles) == (len(groups), sums.tiles)
