"""From sizes to a kernel launch: parameter packing, grid, limits, and what is read and written in place."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structs import members

from cuflash import launch
from cuflash.arrays import ArrayInfo
from cuflash.arrays.overlap import Footprint
from cuflash.config import choose
from cuflash.launch_hopper import with_bias_map
from cuflash.launcher import Launcher
from cuflash.layouts import Layouts, fa2_layouts, hopper_layouts
from cuflash.problem import Problem, make_problem
from cuflash.tensor_map import EncodedMap

H100_L2 = 50 << 20


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_longlong) for name in ("batch", "row", "head")]


class ForwardParams(ctypes.Structure):
    _fields_ = [
        *((name, Strides) for name in ("q", "k", "v", "out")),
        *(
            (name, ctypes.c_int)
            for name in ("seqlen_q", "seqlen_k_visible", "heads_q", "group_size", "batch_heads")
        ),
        *((name, ctypes.c_int) for name in ("head_dim", "head_dim_v", "causal_offset", "m_blocks")),
        ("heads_per_wave", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


def problem_of(
    sq: int = 300, sk: int = 300, *, batch: int = 2, hq: int = 6, hkv: int = 2, **options: Any
) -> Problem:
    d, dv = options.pop("head_dim", 64), options.pop("head_dim_v", 32)
    shapes = (batch, sq, hq, d), (batch, sk, hkv, d), (batch, sk, hkv, dv)
    return make_problem(*shapes, "float16", **options)


def call_of(problem: Problem, l2_bytes: int = H100_L2) -> launch.KernelCall:
    config = choose(problem, (9, 0), vector_out=True)
    q, k, v, out = (launch.Strides(10 * i, 10 * i + 1, 10 * i + 2) for i in range(4))
    return launch.forward_call(problem, config, q, k, v, out, l2_bytes)


def test_params_have_the_members_of_the_kernels_struct_in_its_order() -> None:
    kinds = {"int": np.int32, "float": np.float32, "Strides": launch.FORWARD_PARAMS["q"]}
    fields = launch.FORWARD_PARAMS.names or ()
    assert [(n, launch.FORWARD_PARAMS[n]) for n in fields] == [
        (n, kinds[k]) for n, k in members("fa2/forward.cu", "ForwardParams")
    ]
    strides = members("core/strides.cuh", "Strides")
    assert [(n, "long long") for n in launch.FORWARD_PARAMS["q"].names or ()] == strides


def test_params_have_the_offsets_a_c_compiler_gives_them() -> None:
    fields = launch.FORWARD_PARAMS.fields
    assert fields is not None
    for name, _ in ForwardParams._fields_:  # type: ignore[misc]
        assert fields[name][1] == getattr(ForwardParams, name).offset
    assert launch.FORWARD_PARAMS.itemsize == ctypes.sizeof(ForwardParams)
    assert launch.FORWARD_PARAMS.alignment == ctypes.alignment(ForwardParams)


def test_params_hold_the_problem() -> None:
    problem = problem_of(300, 500, causal=True, scale=-0.25)
    call = call_of(problem)
    params = ForwardParams.from_buffer_copy(call.params.tobytes())
    assert [getattr(params.out, n) for n in ("batch", "row", "head")] == [30, 31, 32]
    assert (params.seqlen_q, params.seqlen_k_visible, params.causal_offset) == (300, 500, 200)
    assert (params.heads_q, params.group_size, params.batch_heads) == (6, 3, 12)
    assert (params.head_dim, params.head_dim_v) == (64, 32)
    assert params.scale == 0.25, "the sign is Config.negative_scale"
    assert params.scale_log2 == pytest.approx(0.25 * math.log2(math.e), rel=1e-7)
    config = choose(problem, (9, 0), vector_out=True)
    assert params.m_blocks == -(-300 // config.block_m)
    assert call.grid == (params.m_blocks * 12,)
    assert call.block == (config.threads,)
    assert type(call.params) is np.void, "CuPy passes a NumPy scalar by value"


def test_keys_no_query_sees_are_not_counted() -> None:
    params = call_of(problem_of(5, 400, causal="top_left")).params
    assert (params["seqlen_k_visible"], params["causal_offset"]) == (5, 0)
    assert call_of(problem_of(5, 0)).params["seqlen_k_visible"] == 0


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, -1e-300])
def test_a_scale_that_float32_flushes_to_zero_stays_positive(scale: float) -> None:
    params = call_of(problem_of(scale=scale)).params
    assert params["scale"] == params["scale"].dtype.type(2.0**-126)
    assert params["scale_log2"] >= 2.0**-126


def test_a_scale_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="scale 3e\\+38"):
        call_of(problem_of(scale=3e38))


def test_heads_per_wave_fills_the_budget_of_l2_and_no_more() -> None:
    problem = problem_of(8192, 8192, batch=8, hq=32, hkv=32, head_dim=128, head_dim_v=128, causal=True)
    head_bytes = 8192 * (128 + 128) * 2
    assert launch.heads_per_wave(problem, H100_L2) == (32 << 20) // head_bytes == 8
    assert launch.heads_per_wave(problem, 1 << 20) == 1, "never none"
    short = dataclasses.replace(problem, seqlen_k=16)
    assert launch.heads_per_wave(short, H100_L2) == 256, "never more than there are"
    assert launch.heads_per_wave(dataclasses.replace(problem, seqlen_k=0), H100_L2) == 256
    assert launch.heads_per_wave(dataclasses.replace(problem, causal_offset=None), H100_L2) == 1


def test_sizes_beyond_the_kernels_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k has sequence length 2147483648"):
        call_of(problem_of(1, 1 << 31))
    with pytest.raises(ValueError, match=r"q has sequence length"):
        call_of(problem_of((1 << 30) + 1, 1))
    with pytest.raises(ValueError, match=r"q needs 2147483648 thread blocks .*2147483647"):
        call_of(problem_of(1, 1, batch=1 << 31, hq=1, hkv=1))
    assert call_of(problem_of(1, 1, batch=(1 << 31) - 1, hq=1, hkv=1)).grid == ((1 << 31) - 1,)


def test_strides_beyond_32_bits_arrive_whole() -> None:
    strides = launch.kernel_strides((2, 9, 9, 8), (1 << 40, 1 << 36, 1 << 33, 2), 2, "bshd")
    assert strides == (1 << 39, 1 << 35, 1 << 32)


class Driver:
    """In place of the driver: what each launch passes, the arguments as bytes of the given sizes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
        self.sizes, self.seen = sizes, []
        runtime = types.SimpleNamespace(memGetInfo=lambda: (0, 0), getDevice=lambda: 0)
        cuda = types.SimpleNamespace(driver=types.SimpleNamespace(launchKernel=self.launch), runtime=runtime)
        monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))

    def launch(self, function: int, *rest: int) -> None:
        *shape_and_stream, arguments, extra = rest
        assert extra == 0
        pointers = (ctypes.c_uint64 * len(self.sizes)).from_address(arguments)
        given = [ctypes.string_at(p, size) for p, size in zip(pointers, self.sizes, strict=True)]
        self.seen.append((function, shape_and_stream, given))


def as_bytes(*addresses: int) -> list[bytes]:
    return [address.to_bytes(8, "little") for address in addresses]


def test_a_launcher_passes_maps_then_addresses_then_params(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(problem_of())
    driver = Driver(monkeypatch, [128, 128, 8, 8, call.params.nbytes])
    start = Launcher(types.SimpleNamespace(ptr=77), call, maps=2, addresses=2)
    blobs = [bytes(range(i, i + 128)) for i in range(3)]
    maps = [EncodedMap(np.frombuffer(blob, np.uint8)) for blob in blobs]
    start(maps[:2], (5, 0), 9)
    start(maps[1:], (6, 1 << 63), 0)
    shape = [*call.grid, 1, 1, *call.block, 1, 1, call.shared_bytes]
    params = call.params.tobytes()
    assert driver.seen == [
        (77, [*shape, 9], [*blobs[:2], *as_bytes(5, 0), params]),
        (77, [*shape, 0], [*blobs[1:], *as_bytes(6, 1 << 63), params]),
    ]


def test_a_launcher_passes_a_map_at_the_end_of_the_params(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(problem_of())
    call = dataclasses.replace(call, params=with_bias_map(call.params))
    driver = Driver(monkeypatch, [128, 8, call.params.nbytes])
    start = Launcher(types.SimpleNamespace(ptr=77), call, maps=1, addresses=1, map_inside=True)
    blobs = [bytes(range(i, i + 128)) for i in range(3)]
    maps = [EncodedMap(np.frombuffer(blob, np.uint8)) for blob in blobs]
    params = call.params.tobytes()
    assert len(params) % 64 == 0
    start(maps[:2], (5,), 9)
    start(maps[1:], (5,), 9)
    assert [arguments for *_, arguments in driver.seen] == [
        [first, *as_bytes(5), params[:-128] + inside] for first, inside in (blobs[:2], blobs[1:])
    ]


def test_threads_launch_with_their_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(problem_of())
    both_inside = threading.Barrier(2, timeout=10)

    class Overlapping(Driver):
        def launch(self, function: int, *rest: int) -> None:
            both_inside.wait()  # the driver lets other threads run before it has read the arguments
            super().launch(function, *rest)

    driver = Overlapping(monkeypatch, [8, call.params.nbytes])
    start = Launcher(types.SimpleNamespace(ptr=77), call, addresses=1)
    threads = [threading.Thread(target=start, args=((), (i,), i)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((shape[-1], given[0]) for _, shape, given in driver.seen) == list(
        enumerate(as_bytes(1, 2), 1)
    )


# --- strides, copies, vector stores -------------------------------------------------------------------------


def info_of(x: np.ndarray, pointer: int | None = None) -> ArrayInfo:
    address = x.__array_interface__["data"][0] if pointer is None else pointer
    return ArrayInfo(x.shape, x.strides, x.dtype.name, x.itemsize, 0, address)


def aligned(*shape: int) -> np.ndarray:
    """A float16 array that starts at a multiple of 512 bytes, as GPU allocations do."""
    size = math.prod(shape)
    buffer = np.zeros(size + 512, np.float16)
    skip = -buffer.ctypes.data % 512 // 2
    return buffer[skip : skip + size].reshape(shape)


def layouts_of(
    q: np.ndarray, out: np.ndarray | None = None, layout: str = "bshd", plan: Any = fa2_layouts
) -> Layouts:
    infos = {name: info_of(q) for name in "qkv"} | ({} if out is None else {"out": info_of(out)})
    problem = make_problem(q.shape, q.shape, q.shape, "float16", layout=layout)
    return plan(problem, infos, layout)


def strides_of(operand: launch.Operand, layout: str = "bshd") -> launch.Strides:
    return launch.kernel_strides(*operand, 2, layout)


def test_strides_are_those_of_the_layout() -> None:
    x = aligned(2, 5, 3, 64)
    bshd = strides_of(layouts_of(x).q)
    assert bshd == launch.Strides(batch=5 * 3 * 64, row=3 * 64, head=64)
    assert strides_of(layouts_of(x.transpose(0, 2, 1, 3), layout="bhsd").q, "bhsd") == bshd
    assert strides_of(layouts_of(x, layout="bhsd").q, "bhsd") == (bshd.batch, bshd.head, bshd.row)


@pytest.mark.parametrize(
    "view",
    [
        lambda: aligned(2, 5, 3, 64)[:, ::-2],
        lambda: aligned(2, 5, 3, 128)[..., 64:],
        lambda: aligned(2, 5, 3, 128)[..., 8:16],
        lambda: np.broadcast_to(aligned(1, 5, 1, 64), (2, 5, 3, 64)),
        lambda: aligned(2, 3, 5, 64).transpose(0, 2, 1, 3),
        lambda: aligned(1, 1, 1, 8),
        lambda: aligned(1, 13)[:, :8].reshape(1, 1, 1, 8),
        lambda: aligned(2, 5, 3, 8)[:, :, :, :][:, :0],
    ],
)
def test_rows_that_start_at_16_bytes_are_read_in_place(view: Any) -> None:
    assert layouts_of(view()).copies == {}


@pytest.mark.parametrize(
    ("view", "reason", "width"),
    [
        (lambda: aligned(2, 5, 3, 128)[..., ::2], "last axis", 64),
        (lambda: aligned(2, 5, 3, 64)[..., ::-1], "last axis", 64),
        (lambda: np.broadcast_to(aligned(2, 5, 3, 1), (2, 5, 3, 64)), "last axis", 64),
        (lambda: aligned(2, 5, 3, 59), "head_dim 59", 64),
        (lambda: aligned(2, 5, 3, 1), "head_dim 1", 8),
        (lambda: aligned(2, 5, 3, 68)[..., 4:68], "16 bytes", 64),
        (lambda: aligned(2, 5, 3, 72)[..., 1:65], "16 bytes", 64),
    ],
)
def test_other_inputs_are_copied_padded_to_a_multiple_of_8(view: Any, reason: str, width: int) -> None:
    x = view()
    layouts = layouts_of(x)
    assert list(layouts.copies) == ["q", "k", "v"]
    assert reason in layouts.copies["q"]
    for operand in layouts[:3]:
        assert operand.shape == (2, 5, 3, width)
        assert strides_of(operand) == (5 * 3 * width, 3 * width, width)


def test_a_copy_has_the_axis_order_of_its_input() -> None:
    layouts = layouts_of(aligned(2, 3, 5, 59), layout="bhsd")
    assert strides_of(layouts.q, "bhsd") == launch.Strides(batch=3 * 5 * 64, row=64, head=5 * 64)


@pytest.mark.parametrize(
    ("out", "vector_out", "copy_out"),
    [
        (lambda: None, True, False),
        (lambda: aligned(2, 5, 4, 64)[:, :, 1:], True, False),
        (lambda: aligned(2, 5, 3, 67)[..., :64], False, False),
        (lambda: aligned(2, 5, 3, 72)[..., 3:67], False, False),
        (lambda: aligned(2, 5, 3, 128)[..., ::2], True, True),
    ],
)
def test_out_is_written_in_place_unless_its_last_axis_is_strided(
    out: Any, vector_out: bool, copy_out: bool
) -> None:
    target = out()
    layouts = layouts_of(aligned(2, 5, 3, 64), target)
    assert (layouts.vector_out, "out" in layouts.copies) == (vector_out, copy_out)
    if target is not None and not copy_out:
        assert layouts.out == (target.shape, target.strides)


def test_an_odd_head_dim_of_v_is_stored_element_by_element() -> None:
    layouts = layouts_of(aligned(2, 5, 3, 60))
    assert not layouts.vector_out
    assert layouts.out.shape == (2, 5, 3, 60)


def test_tma_stores_an_odd_head_dim_by_way_of_a_copy() -> None:
    layouts = layouts_of(aligned(2, 5, 3, 60), plan=hopper_layouts)
    assert list(layouts.copies) == ["q", "k", "v", "out"]
    assert {operand.shape for operand in layouts[:4]} == {(2, 5, 3, 64)}


def test_tma_copies_what_runs_backwards_and_leaves_the_rest() -> None:
    x = aligned(2, 5, 3, 64)
    assert layouts_of(x, plan=hopper_layouts).copies == {}
    layouts = layouts_of(x[:, ::-1], x, plan=hopper_layouts)
    assert list(layouts.copies) == ["q", "k", "v"]
    assert "from 0 to 2**40" in layouts.copies["q"]


# --- overlap ------------------------------------------------------------------------------------------------

SLICES = st.tuples(st.integers(0, 5), st.integers(0, 6), st.sampled_from([1, 2, 3, -1])).map(
    lambda t: slice(*t)
)


@given(
    st.lists(SLICES, min_size=3, max_size=3),
    st.lists(SLICES, min_size=3, max_size=3),
    st.permutations(range(3)),
)
def test_overlap_is_exact_on_slices_of_one_buffer(first: Any, second: Any, axes: Any) -> None:
    buffer = np.arange(6 * 6 * 6, dtype=np.int16).reshape(6, 6, 6)
    a, b = buffer[tuple(first)], buffer[tuple(second)].transpose(axes)
    shared = bool(np.intersect1d(a, b).size)
    infos = info_of(a), info_of(b)
    footprints = [Footprint.of(info) for info in infos]
    assert footprints[0].overlaps(infos[0].pointer, footprints[1], infos[1].pointer) == shared
    assert not footprints[1].overlaps_itself(), "a slice never does"


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-8, 8)), min_size=1, max_size=3))
def test_an_array_that_overlaps_itself_is_never_missed(axes: list[tuple[int, int]]) -> None:
    offsets = np.zeros((), int)
    for size, stride in axes:
        offsets = np.add.outer(offsets, np.arange(size) * stride)
    shape, strides = tuple(size for size, _ in axes), tuple(stride for _, stride in axes)
    footprint = Footprint.of(ArrayInfo(shape, strides, "int8", 1, 0, 1 << 20))
    if np.unique(offsets).size < offsets.size:
        assert footprint.overlaps_itself()
