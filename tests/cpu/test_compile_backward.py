"""The backward kernels compile for every target, within the resources their Configs state."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
from test_compile import CAPABILITIES, TARGET_IDS, TARGETS

from cuflash import jit
from cuflash.config_backward import _TILES, BackwardConfigs, choose
from cuflash.problem import make_problem
from cuflash.resources import shared_memory_per_block

BACKWARD_MAP = Path(__file__).parents[2] / "kernels_cu" / "fa2" / "backward_layout.cuh"
# Where each row of the tables uses most registers, and one that pads (120 to 128).
HEAD_DIMS = sorted({bound for rows in _TILES.values() for bound, _ in rows} | {32, 120})
CAPABILITY_IDS = [f"sm_{major}{minor}" for major, minor in CAPABILITIES]


def configs_for(
    capability,
    head_dim,
    causal=False,
    *,
    dtype="bfloat16",
    head_dim_v=None,
    deterministic=False,
    vector_out=True,
) -> BackwardConfigs:
    shape, shape_v = (1, 500, 2, head_dim), (1, 500, 2, head_dim_v or head_dim)
    problem = make_problem(shape, shape, shape_v, dtype, causal=causal)
    return choose(problem, capability, deterministic=deterministic, vector_out=vector_out)


def compile_within_limits(configs: BackwardConfigs, capability: tuple[int, int]) -> None:
    try:
        arch = jit.architecture(capability)
    except jit.CompileError as error:
        pytest.skip(f"the installed NVRTC has no target for {capability}: {error}")
    for config in configs:
        program = jit.compile(config, arch)
        blocks = getattr(config, "min_blocks_per_sm", 1)
        assert program.warnings == ()
        assert program.registers <= min(255, 65536 // (config.threads * blocks) // 8 * 8)
        assert program.spill_stores <= getattr(config, "spill_bytes", 0)
        assert program.static_shared_bytes == 0


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("capability", "causal"), TARGETS, ids=TARGET_IDS)
def test_default_configs_compile_without_warnings_or_spills_beyond_their_table(capability, head_dim, causal):
    compile_within_limits(configs_for(capability, head_dim, causal), capability)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic_configs_compile(head_dim, causal):
    compile_within_limits(configs_for((9, 0), head_dim, causal, deterministic=True), (9, 0))


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float16"}, {"head_dim_v": 40}, {"head_dim_v": 256}, {"vector_out": False, "head_dim_v": 59}],
    ids=["float16", "narrow v", "wide v", "unaligned rows"],
)
def test_every_option_compiles(options):
    compile_within_limits(configs_for((9, 0), 64, True, **options), (9, 0))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=CAPABILITY_IDS)
def test_shared_memory_of_every_head_dim_fits_the_stated_number_of_blocks(capability):
    per_block = shared_memory_per_block(capability)
    for head_dim, head_dim_v in itertools.product(range(8, 257, 8), (8, 64, 128, 256)):
        main = configs_for(capability, head_dim, head_dim_v=head_dim_v).main
        assert main.shared_bytes <= per_block
        # What a block reserves for the system comes on top of its own limit.
        assert main.min_blocks_per_sm * (main.shared_bytes + 1024) <= per_block + 1024, main


@pytest.mark.parametrize("capability", CAPABILITIES, ids=CAPABILITY_IDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_are_whole_for_every_warp(capability, head_dim):
    main = configs_for(capability, head_dim).main
    half = main.warps // 2
    assert main.warps % 2 == half % main.key_warps == main.warps % main.dq_row_warps == 0
    assert main.block_n % (16 * main.key_warps) == 0
    assert main.block_m % (16 * main.dq_row_warps) == main.block_m % (16 * half // main.key_warps) == 0


def test_shared_memory_is_what_the_kernels_map_adds_up_to():
    """The constants in the source, evaluated as Python."""
    source = BACKWARD_MAP.read_text()
    for capability, head_dim, head_dim_v in itertools.product(
        CAPABILITIES, (16, 64, 128, 256), (48, 128, 256)
    ):
        main = configs_for(capability, head_dim, head_dim_v=head_dim_v).main
        names = {
            "kBlockM": main.block_m,
            "kBlockN": main.block_n,
            "kHeadDim": main.head_dim,
            "kHeadDimV": main.head_dim_v,
        }
        for name, value in re.findall(r"constexpr int (k\w*(?:Stages|Bytes|Offset)) = (.*?);", source):
            if "?" not in value:  # else another P, which only programs with modifiers store
                names[name] = eval(value, {}, names)
        assert names["kDeltaOffset"] + names["kStages"] * main.block_m * 4 == main.shared_bytes


def test_only_sm_90_and_newer_add_four_floats_at_once():
    assert not configs_for((8, 9), 64).main.vector_reductions
    assert configs_for((9, 0), 64).main.vector_reductions
    assert configs_for((12, 0), 64).postprocess.vector_reductions


def test_the_passes_agree_with_the_main_program_about_the_workspace():
    for capability, head_dim in itertools.product(CAPABILITIES, HEAD_DIMS):
        preprocess, main, postprocess = configs_for(capability, head_dim)
        for config in (preprocess, postprocess):
            assert (config.head_dim, config.block_m, config.dtype) == (
                main.head_dim,
                main.block_m,
                main.dtype,
            )
        assert dataclasses.asdict(postprocess)["vector_reductions"] == main.vector_reductions


def test_a_newer_architecture_than_the_table_gets_a_config_that_fits_the_smallest():
    assert configs_for((13, 0), 256).main.shared_bytes <= 99 * 1024
