"""The programs of packed sequences compile for every target, within the resources their Configs state."""

from __future__ import annotations

import pytest
from test_compile import CAPABILITIES

from cuflash import config, config_backward, config_hopper, config_hopper_backward, jit
from cuflash.config_modifiers import ModifierFlags
from cuflash.config_packed import BlocksConfig
from cuflash.problem import make_problem

PACKED = ModifierFlags(varlen=True)
MORE_SPILLS = 48  # bytes, beyond those that the table allows a plain program: the lengths are not constants


def compile_(made, capability, blocks=1, spill_bytes=0):
    try:
        arch = jit.architecture(capability)
    except jit.CompileError as error:
        pytest.skip(f"the installed NVRTC has no target for {capability}: {error}")
    program = jit.compile(made, arch)
    assert program.warnings == ()
    assert program.registers <= min(255, 65536 // (made.threads * blocks) // 8 * 8)
    assert program.spill_stores <= spill_bytes
    assert program.static_shared_bytes == 0


TARGETS = [
    *((capability, 128, True, False) for capability in CAPABILITIES),
    # The rest for one target, to spare time.
    *(((9, 0), head_dim, True, False) for head_dim in (64, 256)),
    *(((9, 0), head_dim, False, True) for head_dim in (64, 128, 256)),
]


@pytest.mark.parametrize(("capability", "head_dim", "causal", "deterministic"), TARGETS, ids=str)
def test_kernels_spill_hardly_more_than_plain_ones(capability, head_dim, causal, deterministic):
    shape = (1, 1000, 2, head_dim)
    problem = make_problem(shape, shape, shape, "bfloat16", causal=causal)
    plain = config.choose(problem, capability, vector_out=True)
    made = config.choose(problem, capability, vector_out=True, modifiers=PACKED)
    compile_(made, capability, made.min_blocks_per_sm, plain.spill_bytes + MORE_SPILLS)
    options = {"deterministic": deterministic, "vector_out": True}
    allowed = config_backward.choose(problem, capability, **options).main.spill_bytes
    pre, main, post = config_backward.choose(problem, capability, **options, modifiers=PACKED)
    compile_(main, capability, main.min_blocks_per_sm, allowed + MORE_SPILLS)
    compile_(pre, capability, spill_bytes=8)  # a word, of a pass that waits for memory
    compile_(post, capability)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("tile", config_hopper.TILES, ids=str)
def test_hopper_forward_compiles_without_serialised_wgmma_or_spills(tile, causal):
    made = config_hopper.make_config(tile, dtype="bfloat16", causal=causal, dynamic_tiles=True, varlen=True)
    compile_(made, (9, 0), made.blocks_per_sm, made.spill_bytes)


ALL = ModifierFlags(window=True, softcap=True, alibi=True, sinks=True, dropout=True, varlen=True)
WINDOW = ModifierFlags(window=True, varlen=True)


@pytest.mark.parametrize(("head_dim", "flags"), [(64, ALL), (128, ALL), (256, ALL), (256, WINDOW)], ids=str)
def test_hopper_forward_with_modifiers_compiles_without_serialised_wgmma(head_dim, flags):
    made = config_hopper.make_config(
        next(tile for tile in config_hopper.MODIFIED_TILES if tile.head_dim == head_dim),
        dtype="bfloat16",
        causal=True,
        dynamic_tiles=True,
        varlen=True,
        modifiers=flags,
    )
    compile_(made, (9, 0), made.blocks_per_sm, spill_bytes=160)


@pytest.mark.parametrize("in_order_and_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_hopper_backward_compiles_without_serialised_wgmma_or_spills(head_dim, in_order_and_causal):
    tiles = (*config_hopper_backward.TILES, *config_hopper_backward.WIDE_TILES)
    made = config_hopper_backward.make_config(
        next(tile for tile in tiles if tile.head_dim == head_dim),
        dtype="bfloat16",
        causal=in_order_and_causal,
        deterministic=in_order_and_causal,
        modifiers=PACKED,
    )
    compile_(made, (9, 0), spill_bytes=made.spill_bytes)


@pytest.mark.parametrize(
    "tile", [config_hopper_backward.MODIFIED_TILES[-1], config_hopper_backward.WIDE_TILES[-1]]
)
def test_hopper_backward_with_every_modifier_compiles_without_serialised_wgmma(tile):
    made = config_hopper_backward.make_config(
        tile, dtype="bfloat16", causal=True, deterministic=True, modifiers=ALL
    )
    compile_(made, (9, 0), spill_bytes=128)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_the_pass_that_lists_blocks_compiles_without_spills(capability):
    for causal in (False, True):
        for window in (False, True):
            compile_(BlocksConfig(128, 64, causal, ModifierFlags(varlen=True, window=window)), capability)
