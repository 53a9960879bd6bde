"""Every kernel the library would choose compiles for every target, within the resources its Config states."""

from __future__ import annotations

import itertools

import pytest

from cuflash import jit
from cuflash.config import _SHORT_QUERY_TILES, _TILES, Config, choose
from cuflash.problem import make_problem
from cuflash.resources import register_limit, shared_bytes, shared_memory_per_block

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
# (capability, causal): without a mask, which needs less, for two of them, to spare time.
TARGETS = [*((capability, True) for capability in CAPABILITIES), ((8, 0), False), ((9, 0), False)]
TARGET_IDS = [f"sm_{major}{minor}-{'causal' if causal else 'full'}" for (major, minor), causal in TARGETS]
# The head dims at which each row of the tables uses most registers, and one that pads (120 to 128).
HEAD_DIMS = sorted(
    {bound for rows in (*_TILES.values(), _SHORT_QUERY_TILES) for bound, _ in rows} | {32, 120}
)


def config_for(
    capability, head_dim, causal, *, seqlen=1000, dtype="bfloat16", head_dim_v=None, vector_out=True
):
    shape, shape_v = (1, seqlen, 2, head_dim), (1, seqlen, 2, head_dim_v or head_dim)
    problem = make_problem(shape, shape, shape_v, dtype, causal=causal)
    return choose(problem, capability, vector_out=vector_out)


def compile_within_limits(config: Config, capability: tuple[int, int]) -> jit.Program:
    try:
        arch = jit.architecture(capability)
    except jit.CompileError as error:
        pytest.skip(f"the installed NVRTC has no target for {capability}: {error}")
    program = jit.compile(config, arch)
    assert program.warnings == ()
    assert program.registers <= register_limit(config)
    assert program.spill_stores <= config.spill_bytes
    assert program.static_shared_bytes == 0
    return program


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("capability", "causal"), TARGETS, ids=TARGET_IDS)
def test_default_config_compiles_without_warnings_or_spills_beyond_its_table(capability, head_dim, causal):
    compile_within_limits(config_for(capability, head_dim, causal), capability)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_short_query_config_compiles_without_spills(capability, head_dim):
    compile_within_limits(config_for(capability, head_dim, True, seqlen=40), capability)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float16"}, {"head_dim_v": 40}, {"head_dim_v": 256}, {"vector_out": False, "head_dim_v": 59}],
    ids=["float16", "narrow v", "wide v", "unaligned out"],
)
def test_every_option_compiles(options):
    compile_within_limits(config_for((9, 0), 64, True, **options), (9, 0))


def test_negative_scale_compiles():
    shape = (1, 300, 2, 64)
    problem = make_problem(shape, shape, shape, "float16", scale=-1.0)
    config = choose(problem, (9, 0), vector_out=True)
    assert config.negative_scale
    compile_within_limits(config, (9, 0))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_shared_memory_of_every_head_dim_fits_the_stated_number_of_blocks(capability):
    per_block = shared_memory_per_block(capability)
    per_multiprocessor = (
        per_block + 1024
    )  # what a block reserves for the system comes on top of its own limit
    for head_dim, head_dim_v, seqlen in itertools.product(range(8, 257, 8), (8, 64, 256), (40, 1000)):
        config = config_for(capability, head_dim, False, seqlen=seqlen, head_dim_v=head_dim_v)
        assert shared_bytes(config) <= per_block
        assert config.min_blocks_per_sm * (shared_bytes(config) + 1024) <= per_multiprocessor, config


def test_a_newer_architecture_than_the_table_gets_a_config_that_fits_the_smallest():
    config = config_for((13, 0), 256, False)
    assert shared_bytes(config) <= 99 * 1024
