"""FlashAttention-1 without a GPU: its kernels compile for every target, its parameters are the kernels'."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from structs import members
from test_compile import CAPABILITIES, TARGET_IDS, TARGETS

from cuflash import jit, launch_fa1
from cuflash.config_fa1 import (
    _BACKWARD_TILES,
    _TILES,
    MAX_HEAD_DIM,
    Fa1BackwardConfig,
    Fa1Config,
    choose,
    choose_backward,
    why_not,
)
from cuflash.launch import Strides
from cuflash.launch_backward import BackwardStrides
from cuflash.launch_fa1 import backward_calls, forward_call
from cuflash.problem import make_problem
from cuflash.resources import shared_memory_per_block

KERNELS = Path(__file__).parents[2] / "kernels_cu"
CAPABILITY_IDS = [f"sm_{major}{minor}" for major, minor in CAPABILITIES]
# Where each row of the tables uses most registers, one that pads (120 to 128), and small ones.
HEAD_DIMS = sorted(
    {bound for rows in (*_TILES.values(), *_BACKWARD_TILES.values()) for bound, _ in rows} | {16, 96, 120}
)
STRUCTS = [
    ("fa1/forward.cu", "ForwardParams", launch_fa1.FORWARD_PARAMS),
    ("fa1/backward.cu", "BackwardParams", launch_fa1.BACKWARD_PARAMS),
]


def configs_for(
    capability, head_dim, causal=False, *, dtype="bfloat16", head_dim_v=None, vector_out=True, scale=None
) -> tuple[Fa1Config, Fa1BackwardConfig]:
    shape, shape_v = (1, 500, 2, head_dim), (1, 500, 2, head_dim_v or head_dim)
    problem = make_problem(shape, shape, shape_v, dtype, causal=causal, scale=scale)
    forward = choose(problem, capability, vector_out=vector_out)
    return forward, choose_backward(problem, capability, vector_out=vector_out).main


def compile_within_limits(configs: tuple[Fa1Config, Fa1BackwardConfig], capability: tuple[int, int]) -> None:
    try:
        arch = jit.architecture(capability)
    except jit.CompileError as error:
        pytest.skip(f"the installed NVRTC has no target for {capability}: {error}")
    for config in configs:
        program = jit.compile(config, arch)
        assert program.warnings == ()
        limit = min(255, 65536 // (config.threads * config.min_blocks_per_sm) // 8 * 8)
        assert program.registers <= limit
        assert program.spill_stores <= config.spill_bytes
        assert program.static_shared_bytes == 0


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("capability", "causal"), TARGETS, ids=TARGET_IDS)
def test_default_configs_compile_without_warnings_or_spills_beyond_their_table(capability, head_dim, causal):
    compile_within_limits(configs_for(capability, head_dim, causal), capability)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=CAPABILITY_IDS)
def test_no_forward_may_spill(capability, head_dim):
    assert configs_for(capability, head_dim)[0].spill_bytes == 0


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"head_dim_v": 40},
        {"head_dim_v": 128},
        {"vector_out": False, "head_dim_v": 59},
        {"scale": -1.0},
    ],
    ids=["float16", "narrow v", "wide v", "unaligned rows", "negative scale"],
)
def test_every_option_compiles(options):
    compile_within_limits(configs_for((9, 0), 64, True, **options), (9, 0))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=CAPABILITY_IDS)
def test_shared_memory_of_every_head_dim_fits_the_stated_number_of_blocks(capability):
    per_block = shared_memory_per_block(capability)
    for head_dim, head_dim_v in itertools.product(range(8, 129, 8), (8, 64, 128)):
        for config in configs_for(capability, head_dim, head_dim_v=head_dim_v):
            assert config.shared_bytes <= per_block
            # What a block reserves for the system comes on top of its own limit.
            assert config.min_blocks_per_sm * (config.shared_bytes + 1024) <= per_block + 1024, config


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("fa1/forward.cu", "kSumOffset + kWarps * kBlockM * 4"),
        ("fa1/backward.cu", "kDeltaOffset + kStages * kBlockM * 4"),
    ],
)
def test_shared_memory_is_what_the_kernels_map_adds_up_to(path, end):
    """The constants in the source, evaluated as Python."""
    source = (KERNELS / path).read_text()
    for capability, head_dim, head_dim_v in itertools.product(CAPABILITIES, (16, 64, 128), (48, 128)):
        config = configs_for(capability, head_dim, head_dim_v=head_dim_v)["backward" in path]
        names = {
            "kBlockM": config.block_m,
            "kBlockN": config.block_n,
            "kHeadDim": config.head_dim,
            "kHeadDimV": config.head_dim_v,
            "kWarps": config.warps,
        }
        for name, value in re.findall(r"constexpr int (k\w*(?:Stages|Bytes|Offset)) = (.*?);", source):
            names[name] = eval(value, {}, names)
        assert eval(end, {}, names) == config.shared_bytes


@pytest.mark.parametrize(("path", "struct", "dtype"), STRUCTS, ids=[path for path, *_ in STRUCTS])
def test_params_have_the_members_of_the_kernels_struct_in_its_order(path, struct, dtype):
    kinds = {"int": np.dtype(np.int32), "float": np.dtype(np.float32), "Strides": dtype[dtype.names[0]]}
    assert [(n, dtype[n]) for n in dtype.names or ()] == [(n, kinds[k]) for n, k in members(path, struct)]


def test_a_thread_block_does_a_whole_head_and_the_workspace_holds_o_m_and_l():
    problem = make_problem((2, 300, 6, 64), (2, 700, 2, 64), (2, 700, 2, 32), "float16")
    config = choose(problem, (9, 0), vector_out=True)
    call, floats = forward_call(problem, config, *(Strides(0, 0, 0),) * 4)
    assert call.grid == (12,)
    assert (call.params["m_blocks"], call.params["n_blocks"]) == (10, 3)
    assert floats == 12 * 10 * 32 * (32 + 2)
    backward = backward_calls(
        problem, choose_backward(problem, (9, 0), vector_out=True), BackwardStrides(*(Strides(0, 0, 0),) * 10)
    )
    assert backward.main is not None
    assert backward.main.grid == (4,), "one for the query heads that share a key/value head"


def test_one_pass_over_the_keys_needs_no_workspace():
    problem = make_problem((1, 300, 2, 64), (1, 256, 2, 64), (1, 256, 2, 64), "float16")
    config = choose(problem, (9, 0), vector_out=True)
    assert forward_call(problem, config, *(Strides(0, 0, 0),) * 4)[1] == 0


def test_head_dims_past_the_kernels_are_named():
    def problem(head_dim, head_dim_v):
        shape = (1, 8, 1, head_dim)
        return make_problem(shape, shape, (1, 8, 1, head_dim_v), "float16")

    assert why_not(problem(MAX_HEAD_DIM, MAX_HEAD_DIM)) is None
    assert "q has 129" in str(why_not(problem(129, 64)))
    assert "v has 136" in str(why_not(problem(64, 136)))
