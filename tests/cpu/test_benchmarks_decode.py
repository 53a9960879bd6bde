"""The points of the decode benchmark, and its answers' checks, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not part of the installed package
torch = pytest.importorskip("torch")

from benchmarks import decode, peers  # noqa: E402


def test_points_are_told_apart_and_pages_fill_caches() -> None:
    points = (*decode.POINTS, *decode.PAGE_ORDERS[1:8], *decode.PAGE_ORDERS[9:])  # two are in both
    assert len(set(map(str, points))) == len(points)
    assert all(point.page_size is None or point.seqlen_k % point.page_size == 0 for point in decode.POINTS)
    issue = {(p.batch, p.seqlen_k, p.heads_kv) for p in decode.POINTS if not p.features}
    assert {(1, 4096, 8), (1, 65536, 8), (8, 8192, 8), (32, 8192, 8), (128, 2048, 8), (4, 16384, 1)} <= issue
    assert {p.page_size for p in decode.POINTS} == {None, 16, 64}


@pytest.mark.parametrize("point", decode.PAGE_ORDERS, ids=str)
def test_pages_lie_in_the_order_that_a_point_names(point: decode.Point) -> None:
    pages = 4096
    order = decode._page_order(point, pages, torch.Generator().manual_seed(0))
    assert torch.equal(order.flatten().sort().values, torch.arange(pages))
    size = point.page_near or point.page_runs
    blocks, in_order = order.reshape(-1, size), torch.arange(pages).view(-1, size)
    if point.page_near:  # shuffled inside of each block
        assert torch.equal(blocks.sort(1).values, in_order)
        assert torch.equal(blocks, in_order) == (size == 1)
    else:  # the blocks are shuffled
        assert torch.equal(blocks - blocks[:, :1], in_order - in_order[:, :1])
        assert not torch.equal(blocks, in_order)


def inputs_of(point: decode.Point) -> decode.Inputs:
    """As ``decode.random_inputs`` draws them, on the CPU."""
    shape = (point.batch, point.seqlen_k, point.heads_kv, decode.HEAD_DIM)
    table = None
    if point.page_size:
        pages = point.batch * point.seqlen_k // point.page_size
        shape = (pages, point.page_size, *shape[2:])
        table = torch.randperm(pages).view(point.batch, -1).to(torch.int32)
    new = (torch.randn(point.batch, 1, *shape[2:]) for _ in range(2)) if point.append else (None, None)
    k, v = new
    lengths = torch.tensor([point.seqlen_k, point.seqlen_k // 2], dtype=torch.int32) - int(point.append)
    q = torch.randn(point.batch, point.seqlen_q, point.heads_q, decode.HEAD_DIM)
    return decode.Inputs(q, [(torch.randn(shape), torch.randn(shape))], lengths, table, k, v, 1)


@pytest.mark.parametrize(
    "point",
    [
        decode.Point(2, 96, 8, 2),
        decode.Point(2, 96, 8, 1, page_size=16),
        decode.Point(2, 96, 8, 2, page_size=32, append=True),
        decode.Point(2, 96, 4, 4, seqlen_q=5),
    ],
    ids=str,
)
def test_the_reference_is_what_our_cpu_path_computes(point: decode.Point) -> None:
    inputs = inputs_of(point)
    out = decode.ours(inputs)(*inputs.caches[0])
    assert peers.require_agreement("ours", out, decode.reference(inputs, point)) < 1e-5
    if point.page_size:
        piece = decode.in_one_piece(inputs, point)
        assert [x.data_ptr() for x in piece.caches[0]] == [x.data_ptr() for x in inputs.caches[0]]
        out = decode.ours(piece)(*piece.caches[0])
        assert peers.require_agreement("ours", out, decode.reference(piece, point)) < 1e-5
