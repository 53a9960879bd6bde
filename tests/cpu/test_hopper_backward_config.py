"""The Hopper backward's choices, shared-memory map and launches; and that every Config compiles cleanly."""

from __future__ import annotations

import itertools

import pytest
from structs import members
from test_hopper_config import HOPPER, ROOT, contiguous, problem_of

from cuflash import config_hopper_backward, families_backward, jit
from cuflash.arrays import ArrayInfo
from cuflash.checks import Options, Request
from cuflash.config_hopper import launch_registers
from cuflash.config_hopper_backward import (
    TILES,
    TILES_PAIR,
    WIDE_TILES,
    HopperPairBackwardConfig,
    HopperWideBackwardConfig,
    MainConfig,
    choose_hopper,
    make_config,
    why_not,
)
from cuflash.families import Gpu
from cuflash.launch import Strides
from cuflash.launch_backward import BackwardStrides
from cuflash.launch_hopper_backward import HOPPER_BACKWARD_PARAMS, hopper_backward_calls
from cuflash.resources import shared_memory_per_block

CHOSEN = (*TILES, *WIDE_TILES)
ALL_TILES = (*CHOSEN, *TILES_PAIR)
IDS = [f"{type(tile).__name__}-{tile.head_dim}-{tile.head_dim_v}" for tile in ALL_TILES]
H100 = Gpu(HOPPER, 132, 50 << 20)


def calls_of(problem, *, deterministic=False, layout="bshd"):
    def operand(seqlen, heads, head_dim):
        axes = (seqlen, heads) if layout == "bshd" else (heads, seqlen)
        return contiguous(problem.batch, *axes, head_dim)

    q = operand(problem.seqlen_q, problem.heads_q, problem.head_dim)
    dout = operand(problem.seqlen_q, problem.heads_q, problem.head_dim_v)
    k = operand(problem.seqlen_k, problem.heads_kv, problem.head_dim)
    v = operand(problem.seqlen_k, problem.heads_kv, problem.head_dim_v)
    operands = {"q": q, "k": k, "v": v, "dout": dout, "dk": k, "dv": v}
    strides = BackwardStrides(*(Strides(10 * i, 10 * i + 1, 10 * i + 2) for i in range(10)))
    configs = choose_hopper(problem, deterministic=deterministic)
    return configs, hopper_backward_calls(
        problem,
        configs,
        strides,
        operands,
        layout,
        multiprocessors=H100.multiprocessors,
        l2_bytes=H100.l2_bytes,
    )


# --- choice and resources -----------------------------------------------------------------------------------


def test_every_head_dim_gets_a_tile_that_holds_it():
    for head_dim, head_dim_v in itertools.product(range(8, 257, 8), repeat=2):
        problem = problem_of(head_dim, head_dim_v)
        assert why_not(problem, HOPPER) is None
        main = choose_hopper(problem, deterministic=False).main
        assert main.head_dim >= head_dim
        assert main.head_dim_v >= head_dim_v


@pytest.mark.parametrize(
    ("problem", "capability", "reason"),
    [
        (problem_of(), (8, 0), "this GPU has 8.0"),
        (problem_of(dtype="float32"), HOPPER, "not float32"),
        (problem_of(seqlen_k=0), HOPPER, "no query sees a key"),
        (problem_of(seqlen_q=0), HOPPER, "there is no query"),
    ],
)
def test_why_not_says_what_is_in_the_way(problem, capability, reason):
    assert reason in why_not(problem, capability)


@pytest.mark.parametrize("tile", ALL_TILES, ids=IDS)
def test_tiles_fit_shared_memory_and_registers(tile):
    config = make_config(tile, dtype="bfloat16", causal=False)
    assert config.shared_bytes <= shared_memory_per_block(HOPPER)
    if isinstance(config, HopperWideBackwardConfig):
        registers = [
            config.load_registers,
            config.probability_registers,
            config.gradient_registers,
            config.query_registers,
        ]
    else:
        registers = [config.helper_registers, config.main_registers, config.main_registers]
    assert sum(registers) <= len(registers) * launch_registers(len(registers) - 1, 1)
    assert all(n % 8 == 0 for n in registers)


def test_shared_memory_map_of_head_dim_128():
    config = make_config(TILES[-1], dtype="bfloat16", causal=False)
    k, q, ds = 128 * 256, 64 * 256, 64 * 256
    assert config.shared_bytes == 2 * k + 3 * (2 * q + 2 * 64 * 4) + 2 * ds + 8 * (3 * 3 + 2 * 2 + 2)


def test_shared_memory_map_of_head_dim_256():
    config = choose_hopper(problem_of(256), deterministic=False).main
    tile, ds = 64 * 512, 64 * 128
    assert config.shared_bytes == 2 * tile + 2 * (2 * tile + 2 * 64 * 4) + 4 * ds + 8 * (4 * 2 + 4 * 2 + 2)


def test_shared_memory_map_of_pairs():
    config = make_config(TILES_PAIR[0], dtype="bfloat16", causal=False)
    k, q, ds = 128 * 256, 64 * 256, 64 * 256
    tiles = 2 * k + k // 2 + 3 * q + 2 * q + 4 * ds
    assert config.shared_bytes == tiles + 5 * 64 * 4 + 8 * (3 + 2 * 2 + 3 * 2 + 2)


@pytest.mark.parametrize("tile", ALL_TILES, ids=IDS)
def test_the_page_shows_the_shared_memory_of_each_tile(tile):
    config = make_config(tile, dtype="bfloat16", causal=True)
    kb = 1 / 1024
    both = sum(-(-d // 64) * 64 for d in (config.head_dim, config.head_dim_v))  # whole panels
    k_and_v = config.block_n * both * 2 * kb
    q_and_dout = config.stages * config.block_m * both * 2 * kb
    ds = 2 * config.block_m * config.block_n * 2 * kb
    stages: object = config.stages
    if isinstance(config, HopperPairBackwardConfig):
        # Half of the other's K, a slot more of Q, the other's dS.
        k_and_v, q_and_dout, ds = k_and_v * 5 / 4, q_and_dout * 5 / 4, ds * 2
        stages = f"{config.stages + 1}, {config.stages}"
    p = ds if isinstance(config, HopperWideBackwardConfig) else 0
    rest = config.shared_bytes * kb - k_and_v - q_and_dout - ds - p
    cells = (
        f"{config.head_dim}, pairs" if config.cluster_blocks > 1 else config.head_dim,
        f"{config.block_n} \u00d7 {config.block_m}",
        *(f"{k_and_v:.0f}", f"{q_and_dout:.0f}", stages, f"{ds:.0f}", f"{p:.0f}" if p else "-"),
        *(f"{rest:.1f}", f"{config.shared_bytes * kb:.1f}"),
    )
    row = f"| {' | '.join(map(str, cells))} |"
    assert row in (ROOT / "docs" / "hopper-backward.md").read_text().splitlines()


def test_the_passes_agree_with_the_main_program_about_the_workspace():
    for tile in ALL_TILES:
        preprocess, main, postprocess = config_hopper_backward.with_passes(
            make_config(tile, dtype="float16", causal=True)
        )
        for config in (preprocess, postprocess):
            assert (config.head_dim, config.block_m, config.dtype) == (
                main.head_dim,
                main.block_m,
                "float16",
            )
        assert postprocess.vector_reductions


def test_all_table_rows_are_reachable():
    chosen = (
        choose_hopper(problem_of(*pair), deterministic=False).main
        for pair in itertools.product(range(8, 257, 8), repeat=2)
    )
    assert {(c.head_dim, c.head_dim_v) for c in chosen} == {(t.head_dim, t.head_dim_v) for t in CHOSEN}


# --- which family -------------------------------------------------------------------------------------------


def info(*shape, strides=None):
    return ArrayInfo(shape, strides or contiguous(*shape).strides, "bfloat16", 2, 0, 1 << 20)


def objection(algorithm="auto", head_dim=64, **changed):
    """Why hopper does not compute the backward; None if it does."""
    infos = {"q": info(2, 300, 4, head_dim)} | {name: info(2, 300, 2, head_dim) for name in "kv"} | changed
    request = Request(problem_of(head_dim), infos)
    options = Options(False, None, "bshd", True, algorithm)
    told = families_backward.explained(request, options, H100)
    return None if told == "hopper" else told


def test_auto_takes_them_and_any_family_can_be_asked_for():
    for head_dim in (64, 128, 136, 256):
        assert objection(head_dim=head_dim) is None
        assert objection("hopper", head_dim=head_dim) is None
        assert "was asked for" in objection("fa2", head_dim=head_dim)


def test_auto_leaves_to_fa2_what_only_tma_would_copy():
    backwards = info(2, 300, 2, 64, strides=(300 * 256, -256, 128, 2))
    assert "TMA cannot read k where it lies" in objection(k=backwards)
    assert objection("hopper", k=backwards) is None
    unaligned = info(2, 300, 2, 64, strides=(300 * 260, 260, 130, 2))
    assert objection(k=unaligned) is None, "fa2 copies it too"


# --- launch -------------------------------------------------------------------------------------------------


def test_params_have_the_members_of_the_kernels_struct_in_its_order():
    kinds = {"int32": "int", "float32": "float"}
    dtype = HOPPER_BACKWARD_PARAMS
    assert [(n, kinds[dtype[n].name]) for n in dtype.names] == members(
        "hopper/key_block.cuh", "BackwardParams"
    )


def test_a_thread_block_of_the_wide_kernel_has_64_keys():
    calls = calls_of(problem_of(256, seqlen_q=500, seqlen_k=300))[1]
    assert calls.main.grid == (5 * 2 * 2,)
    assert calls.main.block == (512,)
    assert [m.map.box[1] for m in calls.maps] == [64] * 6


def test_a_thread_block_for_each_key_block_and_key_value_head():
    configs, calls = calls_of(problem_of(96, seqlen_q=500, seqlen_k=300), deterministic=True)
    assert calls.main.grid == (3 * 2 * 2,)
    assert calls.main.block == (384,)
    params = calls.main.params
    assert (params["m_blocks"], params["n_blocks"], params["group_size"]) == (8, 3, 2)
    blocks = 2 * 4 * 8
    assert calls.preprocess.grid == calls.postprocess.grid == (blocks,)
    assert calls.preprocess.params["turns_per_block"] == configs.main.turns_per_block == 4
    assert calls.workspace.words - calls.workspace.turns == blocks * 4


@pytest.mark.parametrize(
    ("seqlen_k", "causal", "deterministic", "paired"),
    [
        (128, False, True, False),
        (129, False, True, True),
        (16384, False, True, True),
        (16384, True, True, False),
        (129, True, False, True),
        (512, False, False, True),
        (513, False, False, False),
        (16384, False, False, False),
    ],
)
def test_pairs_are_taken_where_they_were_measured_to_pay(seqlen_k, causal, deterministic, paired):
    problem = problem_of(128, seqlen_q=512, seqlen_k=seqlen_k, causal=causal)
    main = choose_hopper(problem, deterministic=deterministic).main
    assert isinstance(main, HopperPairBackwardConfig) == paired
    for head_dim in (96, 192):
        other = choose_hopper(problem_of(head_dim, seqlen_q=512, seqlen_k=512), deterministic=True).main
        assert not isinstance(other, HopperPairBackwardConfig)


@pytest.mark.parametrize(("seqlen_k", "pairs"), [(1, 1), (256, 1), (257, 2), (700, 3)])
def test_a_cluster_of_two_thread_blocks_for_each_pair_of_key_blocks(monkeypatch, seqlen_k, pairs):
    monkeypatch.setattr(config_hopper_backward, "TILES", (*TILES_PAIR, *TILES))
    configs, calls = calls_of(problem_of(128, seqlen_q=500, seqlen_k=seqlen_k), deterministic=True)
    assert isinstance(configs.main, HopperPairBackwardConfig)
    assert calls.main.grid == (2 * pairs * 2 * 2,)
    assert calls.main.params["n_blocks"] == pairs
    assert calls.main.params["key_blocks"] == pairs * 2 * 2
    assert [m.map.box[1] for m in calls.maps] == [64, 128, 128, 64, 64, 64]
    assert calls.preprocess.params["turns_per_block"] == configs.main.turns_per_block == 8


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_maps_start_at_the_first_query_that_sees_a_key_and_end_at_the_last_key_seen(layout):
    problem = problem_of(128, 64, seqlen_q=300, seqlen_k=100, causal=True)
    main, calls = calls_of(problem, layout=layout)[0].main, calls_of(problem, layout=layout)[1]
    row = {"bshd": 4 * 256, "bhsd": 256}[layout]
    assert [(m.name, m.offset) for m in calls.maps] == [
        ("q", 200 * row), ("k", 0), ("v", 0), ("dout", 200 * row // 2), ("dk", 0), ("dv", 0)
    ]  # fmt: skip
    assert [m.map.shape[1] for m in calls.maps] == [100] * 6
    assert [m.map.shape[0] for m in calls.maps] == [128, 128, 64, 64, 128, 64]
    assert [m.map.box[1] for m in calls.maps] == [main.block_m, 128, 128, main.block_m, 64, 64]
    assert calls.main.params["causal_offset"] == 0
    unseen = calls_of(problem_of(64, seqlen_q=50, seqlen_k=300, causal="top_left"))[1]
    assert [m.map.shape[1] for m in unseen.maps] == [50, 50, 50, 50, 300, 300]
    assert unseen.main.params["seqlen_k_visible"] == 50


def test_nothing_is_launched_for_an_empty_batch():
    problem = problem_of()
    empty = type(problem)(
        **{name: getattr(problem, name) for name in problem.__dataclass_fields__} | {"batch": 0}
    )
    calls = calls_of(empty)[1]
    assert (calls.preprocess, calls.main, calls.postprocess, calls.maps) == (None, None, None, ())


# --- compilation --------------------------------------------------------------------------------------------


def compile_cleanly(config: MainConfig) -> None:
    try:
        arch = jit.architecture(HOPPER)
    except jit.CompileError as error:
        pytest.skip(f"the installed NVRTC has no target for sm_90a: {error}")
    program = jit.compile(config, arch)
    assert program.warnings == ()  # C75xx: ptxas serialised wgmma
    assert program.spill_stores <= config.spill_bytes
    assert program.registers == launch_registers(config.threads // 128 - 1, 1)
    assert program.static_shared_bytes == 0


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tile", ALL_TILES, ids=IDS)
def test_every_tile_compiles_without_serialised_products_or_spills(tile, causal, deterministic):
    compile_cleanly(make_config(tile, dtype="bfloat16", causal=causal, deterministic=deterministic))


@pytest.mark.parametrize("tile", ALL_TILES, ids=IDS)
def test_float16_compiles(tile):
    compile_cleanly(make_config(tile, dtype="float16", causal=True))


@pytest.mark.parametrize("head_dims", [(128, 64), (64, 128), (72, 8), (256, 128), (136, 256)])
def test_head_dims_that_differ_compile(head_dims):
    compile_cleanly(choose_hopper(problem_of(*head_dims, causal=True), deterministic=False).main)


@pytest.mark.parametrize("tile", [TILES[-1], WIDE_TILES[-1], TILES_PAIR[0]], ids=lambda t: type(t).__name__)
def test_kernel_refuses_a_shared_memory_map_that_is_not_the_hosts(tile):
    config = make_config(tile, dtype="bfloat16", causal=False)
    right = type(config)

    class Wrong(right):
        @property
        def shared_bytes(self) -> int:
            return super().shared_bytes + 16

    wrong = Wrong(**{name: getattr(config, name) for name in config.__dataclass_fields__})
    with pytest.raises(jit.CompileError, match="the host's map is the same"):
        jit.compile(wrong, "sm_90a")
