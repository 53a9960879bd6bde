"""The Hopper forward's choices, shared-memory map and tensor maps; and that every Config compiles cleanly."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cuflash import config_hopper_backward, jit
from cuflash.config_hopper import (
    TILES,
    WARPGROUP_ROWS,
    HopperConfig,
    choose_hopper,
    launch_registers,
    make_config,
    why_not,
)
from cuflash.config_modifiers import ModifierFlags
from cuflash.launch import Operand
from cuflash.launch_hopper import FORWARD_PARAMS, bias_map, hopper_forward_call
from cuflash.problem import make_problem
from cuflash.resources import shared_memory_per_block
from cuflash.tensor_map import PANEL_COLUMNS, tensor_map, why_not_mapped

ROOT = Path(__file__).resolve().parents[2]
HOPPER = (9, 0)
IDS = [f"{tile.head_dim}-{tile.head_dim_v}-{tile.warpgroups}x64" for tile in TILES]


def problem_of(
    head_dim=64, head_dim_v=None, *, seqlen_q=300, seqlen_k=300, dtype="bfloat16", heads=4, **options
):
    return make_problem(
        (2, seqlen_q, heads, head_dim),
        (2, seqlen_k, 2, head_dim),
        (2, seqlen_k, 2, head_dim_v or head_dim),
        dtype,
        **options,
    )


def contiguous(*shape: int) -> Operand:
    return Operand(shape, np.empty(shape, np.float16).strides)


def call_of(problem, *, layout="bshd", multiprocessors=132, l2_bytes=50 << 20):
    def operand(seqlen, heads, head_dim):
        if layout == "bshd":
            return contiguous(problem.batch, seqlen, heads, head_dim)
        return contiguous(problem.batch, heads, seqlen, head_dim)

    return hopper_forward_call(
        problem,
        choose_hopper(problem),
        operand(problem.seqlen_q, problem.heads_q, problem.head_dim),
        operand(problem.seqlen_k, problem.heads_kv, problem.head_dim),
        operand(problem.seqlen_k, problem.heads_kv, problem.head_dim_v),
        operand(problem.seqlen_q, problem.heads_q, problem.head_dim_v),
        layout=layout,
        multiprocessors=multiprocessors,
        l2_bytes=l2_bytes,
    )


# --- choice and resources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim_gets_a_tile_that_holds_it(head_dim):
    for head_dim_v in range(8, 257, 8):
        config = choose_hopper(problem_of(head_dim, head_dim_v))
        assert config.head_dim >= head_dim
        assert config.head_dim_v >= head_dim_v
        assert config.block_m == WARPGROUP_ROWS * config.warpgroups


@pytest.mark.parametrize("tile", TILES, ids=IDS)
def test_tiles_fit_shared_memory_and_registers(tile):
    for causal in (False, True):
        config = make_config(tile, dtype="bfloat16", causal=causal)
        assert config.shared_bytes <= shared_memory_per_block(HOPPER)
        registers = config.producer_registers + config.warpgroups * config.consumer_registers
        allocated = (1 + config.warpgroups) * launch_registers(config.warpgroups, config.blocks_per_sm)
        assert registers <= allocated
        assert config.producer_registers % 8 == config.consumer_registers % 8 == 0


@pytest.mark.parametrize("tile", TILES, ids=IDS)
def test_the_page_shows_the_budget_of_each_tile(tile):
    config = make_config(tile, dtype="bfloat16", causal=True)
    accumulators = config.block_n // 2 + config.block_n // 4 + config.head_dim_v // 2
    only = "; short causal" if tile.causal_seqlen_q else ""
    cells = (
        f"{tile.head_dim}, {tile.head_dim_v}{only}",
        *(config.block_m, config.block_n, config.q_stages, config.stages, config.shared_bytes),
        launch_registers(tile.warpgroups, tile.blocks_per_sm),
        *(config.producer_registers, config.consumer_registers, accumulators),
    )
    row = f"| {' | '.join(map(str, cells))} |"
    assert row in (ROOT / "docs" / "hopper-forward.md").read_text().splitlines()


def test_the_largest_row_comes_last_so_that_every_problem_has_one():
    assert (TILES[-1].head_dim, TILES[-1].head_dim_v) == (256, 256)


def test_shared_memory_map_of_head_dim_128():
    config = choose_hopper(problem_of(128))
    tile = 128 * 128 * 2
    assert config.shared_bytes == 2 * tile + 2 * 2 * tile + tile + 2 * 16 + (2 + 2 * 2) * 16 + 8


def test_shared_memory_counts_whole_panels_and_stages_o_in_v():
    config = choose_hopper(problem_of(96, dtype="float16"))
    assert config.shared_bytes == choose_hopper(problem_of(128)).shared_bytes
    wide = choose_hopper(problem_of(256))
    assert wide.q_stages == 1
    assert wide.shared_bytes == 128 * 512 + 2 * 2 * 80 * 512 + 16 + (1 + 2 * 2) * 16 + 8


def packed(seqlen_q, heads_q, heads_kv, batch, multiprocessors=132):
    shapes = (batch, seqlen_q, heads_q, 128), (batch, 500, heads_kv, 128), (batch, 500, heads_kv, 128)
    return choose_hopper(make_problem(*shapes, "float16"), multiprocessors).packed_heads


@pytest.mark.parametrize(
    ("sizes", "pack"),
    [
        ((1, 32, 8, 64), 4),  # 512 tiles instead of 2048
        ((1, 32, 8, 1), 1),  # 32 tiles are one wave already
        ((1, 128, 1, 64), 64),  # a warpgroup's rows hold one query
        ((1, 24, 4, 64), 2),  # 6 heads share a key: pairs of them
        ((1, 35, 5, 64), 1),  # 7: no power of two
        ((1, 32, 32, 64), 1),  # nobody shares
        ((128, 32, 8, 64), 1),  # full tiles
        ((33, 32, 8, 64), 2),  # three times 33 do not fill 128 rows, four times do not fit
        ((65, 32, 8, 64), 1),
        ((1, 32, 8, 4), 1),  # one wave either way
        ((8192, 32, 8, 64), 1),
    ],
)
def test_heads_are_packed_where_that_halves_the_waves(sizes, pack):
    assert packed(*sizes) == pack


def test_a_packed_map_walks_the_heads_of_a_pack_first():
    bshd = tensor_map(*contiguous(2, 300, 8, 128), "bfloat16", "bshd", rows=64, seqlen=300, packed_heads=4)
    assert bshd.shape == (128, 4, 300, 2, 2)
    assert bshd.strides == (256, 8 * 256, 4 * 256, 300 * 8 * 256)
    assert bshd.box == (PANEL_COLUMNS, 4, 16, 1, 1)


def test_a_packed_call_counts_packs_as_heads():
    shapes = (64, 20, 32, 128), (64, 500, 8, 128), (64, 500, 8, 128)
    problem = make_problem(*shapes, "float16")
    operands = [contiguous(*shape) for shape in (shapes[0], *shapes[1:], shapes[0])]
    config = choose_hopper(problem)
    assert config.packed_heads == 4
    call = hopper_forward_call(
        problem, config, *operands, layout="bshd", multiprocessors=132, l2_bytes=50 << 20
    )
    fields = ("heads_q", "group_size", "batch_heads", "m_blocks", "tiles", "seqlen_q")
    assert [int(call.params[name]) for name in fields] == [8, 1, 512, 1, 512, 20]
    assert [len(description.shape) for description in call.maps] == [5, 4, 4, 5]


def test_tiles_are_taken_dynamically_under_a_causal_mask_only():
    assert not choose_hopper(problem_of()).dynamic_tiles
    assert choose_hopper(problem_of(causal=True)).dynamic_tiles
    assert choose_hopper(problem_of(causal="top_left")).dynamic_tiles


def test_stub_holds_the_constants_and_not_what_ptxas_may_spill():
    stub = choose_hopper(problem_of(128, causal=True, scale=-1.0)).stub()
    for line in (
        "using Element = bf16;",
        "static constexpr int kBlockM = 128;",
        "static constexpr int kConsumerRegisters = 232;",
        "static constexpr bool kCausal = true;",
        "static constexpr bool kNegativeScale = true;",
        '#include "hopper/forward.cu"',
    ):
        assert line in stub
    assert "kSpillBytes" not in stub


@pytest.mark.parametrize(
    ("problem", "capability", "reason"),
    [
        (problem_of(), (8, 0), "this GPU has 8.0"),
        (problem_of(), (10, 0), "this GPU has 10.0"),
        (problem_of(dtype="float32"), HOPPER, "not float32"),
        (problem_of(seqlen_k=0), HOPPER, "no query sees a key"),
        (problem_of(seqlen_q=0, seqlen_k=0, causal=True), HOPPER, "no query sees a key"),
    ],
)
def test_why_not_says_what_is_in_the_way(problem, capability, reason):
    assert reason in why_not(problem, capability)


def test_why_not_has_no_objection_to_what_the_kernel_can_do():
    assert why_not(problem_of(), HOPPER) is None
    assert why_not(problem_of(72, 40, seqlen_q=500, seqlen_k=3, dtype="float16", causal=True), HOPPER) is None


# --- tensor maps --------------------------------------------------------------------------------------------


def test_map_of_either_layout_walks_the_same_axes():
    expected_shape = (128, 300, 6, 2)
    bshd = tensor_map(*contiguous(2, 300, 6, 128), "bfloat16", "bshd", rows=64, seqlen=300)
    assert (bshd.shape, bshd.strides) == (expected_shape, (6 * 256, 256, 300 * 6 * 256))
    bhsd = tensor_map(*contiguous(2, 6, 300, 128), "bfloat16", "bhsd", rows=64, seqlen=300)
    assert (bhsd.shape, bhsd.strides) == (expected_shape, (256, 300 * 256, 300 * 6 * 256))
    assert bshd.box == bhsd.box == (PANEL_COLUMNS, 64, 1, 1)


def test_map_ignores_strides_of_single_elements():
    description = tensor_map((1, 300, 1, 64), (-7, 128, 3, 2), "float16", "bshd", rows=64, seqlen=300)
    assert description.strides == (128, 16, 16)


@pytest.mark.parametrize(
    ("shape", "strides", "pointer", "reason"),
    [
        ((2, 9, 3, 64), (4096, 384, 128, 4), 0, "last axis"),
        ((2, 9, 3, 60), (3240, 360, 120, 2), 0, "multiple of 8"),
        ((2, 9, 3, 64), (3456, 384, 128, 2), 8, "multiples of 16 bytes"),
        ((2, 9, 3, 64), (3456, 392, 128, 2), 0, "multiples of 16 bytes"),
        ((2, 9, 3, 64), (3456, -384, 128, 2), 0, "strides from 0"),
        ((2, 9, 3, 64), (2**40, 384, 128, 2), 0, "strides from 0"),
    ],
)
def test_why_not_mapped_says_what_tma_cannot_take(shape, strides, pointer, reason):
    assert reason in why_not_mapped(shape, strides, pointer)


def test_why_not_mapped_has_no_objection_to_views_and_broadcasts():
    assert why_not_mapped((2, 9, 3, 64), (9 * 1152, 1152, 384, 2), 4096) is None
    assert why_not_mapped((2, 9, 3, 64), (0, 128, 0, 2), 16) is None
    assert why_not_mapped((1, 9, 1, 64), (-1, 128, 3, 2), 16) is None


# --- launch -------------------------------------------------------------------------------------------------


def test_call_is_persistent_and_counts_tiles():
    call = call_of(problem_of(128, seqlen_q=1000, heads=6))
    assert call.grid == (96,)  # 8 blocks of 128 rows · 2 · 6 heads: fewer than there are multiprocessors
    assert call.block == (384,)
    assert (call.params["m_blocks"], call.params["tiles"], call.params["batch_heads"]) == (8, 96, 12)
    assert call.params["group_size"] == 3
    assert call_of(problem_of(128, seqlen_q=10_000, heads=6)).grid == (132,)


def test_call_ends_k_and_v_at_the_last_key_some_query_sees():
    problem = problem_of(seqlen_q=100, seqlen_k=300, causal="top_left")
    call = call_of(problem)
    assert [description.shape[1] for description in call.maps] == [100, 100, 100, 100]
    assert call.params["seqlen_k_visible"] == 100
    call = call_of(problem_of(seqlen_q=100, seqlen_k=300, causal=True))
    assert [description.shape[1] for description in call.maps] == [100, 300, 300, 100]
    assert call.params["causal_offset"] == 200


def test_call_moves_tiles_of_the_config():
    config, call = choose_hopper(problem_of(192, 128)), call_of(problem_of(192, 128), layout="bhsd")
    assert [description.box[1] for description in call.maps] == [
        config.block_m,
        config.block_n,
        config.block_n,
        WARPGROUP_ROWS,
    ]
    assert [description.shape[0] for description in call.maps] == [192, 192, 128, 128]
    assert [description.shape[2] for description in call.maps] == [4, 2, 2, 4]


def test_a_bias_in_tiles_is_a_map_with_steps_of_0_where_it_is_broadcast():
    problem = problem_of(128, seqlen_q=100, seqlen_k=300)
    description = bias_map(problem, Operand((1, 4, 100, 300), (7, 304 * 200, 608, 2)), rows=128)
    assert description.shape == (300, 100, 4, 2)
    assert description.strides == (608, 304 * 200, 0)
    assert description.box == (PANEL_COLUMNS, 128, 1, 1)
    later = bias_map(problem, Operand((1, 1, 1, 300), (7, 7, 7, 2)), rows=64, first_row=30)
    assert (later.shape, later.strides) == ((300, 70, 4, 2), (0, 0, 0))


@pytest.mark.parametrize("problem", [problem_of(128), problem_of(256, causal=True)])
def test_a_bias_in_tiles_has_tiles_of_its_own(problem):
    flags = ModifierFlags(bias=True, unit_strides=True, bias_tiles=True)
    config = choose_hopper(problem, modifiers=flags)
    assert config.block_n % PANEL_COLUMNS == 0
    assert "kBiasTiles = true" in config.stub()
    without = replace(config, modifiers=replace(flags, bias_tiles=False))
    bias_bytes = config.stages * (2 * config.block_m * config.block_n + 16)  # and a ring's barriers
    assert config.shared_bytes == without.shared_bytes + bias_bytes


def test_call_gives_the_kernel_the_magnitude_of_the_scale():
    params = call_of(problem_of(scale=-0.5)).params
    assert params["scale"] == np.float32(0.5)
    assert params["scale_log2"] == np.float32(0.5 * np.log2(np.e))
    assert call_of(problem_of(scale=0.0)).params["scale"] == np.finfo(np.float32).smallest_normal
    with pytest.raises(ValueError, match="too large for float32"):
        call_of(problem_of(scale=1e39))


def test_call_refuses_sizes_beyond_32_bits():
    shape = (1, 2**30 + 1, 1, 64)
    problem = make_problem(shape, shape, shape, "bfloat16")
    operands = [Operand(shape, (0, 0, 0, 2))] * 4
    options = {"layout": "bshd", "multiprocessors": 132, "l2_bytes": 50 << 20}
    with pytest.raises(ValueError, match="sequence length"):
        hopper_forward_call(problem, choose_hopper(problem), *operands, **options)


def test_params_have_no_holes():
    assert sum(FORWARD_PARAMS[name].itemsize for name in FORWARD_PARAMS.names) == FORWARD_PARAMS.itemsize


# --- compilation --------------------------------------------------------------------------------------------


def compile_cleanly(config: HopperConfig) -> jit.Program:
    try:
        arch = jit.architecture(HOPPER)
    except jit.CompileError as error:
        pytest.skip(f"the installed NVRTC has no target for sm_90a: {error}")
    program = jit.compile(config, arch)
    assert program.warnings == ()  # C75xx: ptxas serialised wgmma
    assert program.spill_stores <= config.spill_bytes
    assert program.registers == launch_registers(config.warpgroups, config.blocks_per_sm)
    assert program.static_shared_bytes == 0
    return program


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tile", TILES, ids=IDS)
def test_every_tile_compiles_without_serialised_products_or_spills(tile, causal):
    compile_cleanly(make_config(tile, dtype="bfloat16", causal=causal))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_float16_and_negative_scale_compile(head_dim):
    compile_cleanly(choose_hopper(problem_of(head_dim, dtype="float16", causal=True, scale=-1.0)))


def test_kernel_refuses_a_shared_memory_map_that_is_not_the_hosts():
    config = choose_hopper(problem_of())

    class Wrong(HopperConfig):
        @property
        def shared_bytes(self) -> int:
            return super().shared_bytes + 16

    wrong = Wrong(**{name: getattr(config, name) for name in config.__dataclass_fields__})
    with pytest.raises(jit.CompileError, match="the host's map is the same"):
        jit.compile(wrong, "sm_90a")


def test_generated_wgmma_wrappers_are_up_to_date():
    subprocess.run([sys.executable, ROOT / "tools" / "generate_wgmma.py", "--check"], check=True)


def test_wgmma_wrappers_are_those_in_use(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import generate_wgmma

    backward = (*config_hopper_backward.TILES, *config_hopper_backward.WIDE_TILES)
    transposed = {tile.block_m for tile in backward}
    dq = {tile.dq_columns for tile in backward}
    assert set(generate_wgmma.SMEM_SMEM) == {tile.block_n for tile in TILES} | transposed | dq
    gradients = {n for tile in backward for n in (tile.head_dim, tile.head_dim_v)}
    assert set(generate_wgmma.REGISTER_SMEM) == {tile.head_dim_v for tile in TILES} | gradients


def test_all_table_rows_are_reachable():
    reached = {
        (config.head_dim, config.head_dim_v, config.warpgroups)
        for config in (
            choose_hopper(problem_of(d, dv, causal=causal))
            for causal in (False, True)
            for d, dv in itertools.product(range(8, 257, 8), repeat=2)
        )
    }
    assert reached == {(tile.head_dim, tile.head_dim_v, tile.warpgroups) for tile in TILES}


@pytest.mark.parametrize(
    ("seqlen_q", "causal", "rows"),
    [(512, True, 128), (1024, "top_left", 128), (1025, True, 192), (512, False, 192)],
)
def test_short_causal_problems_of_head_dim_64_get_shorter_tiles(seqlen_q, causal, rows):
    assert choose_hopper(problem_of(64, seqlen_q=seqlen_q, seqlen_k=2048, causal=causal)).block_m == rows
