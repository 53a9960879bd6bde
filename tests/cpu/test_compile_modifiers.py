"""Kernels with modifiers compile for every target, within the resources their Configs state."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_compile import CAPABILITIES

from cuflash import config, config_backward, config_hopper, config_hopper_backward, jit
from cuflash.config_modifiers import (
    PLAIN,
    MaskSummaryConfig,
    ModifierFlags,
    SinksGradientConfig,
    SumPartsConfig,
    bias_gradient_config,
    mask_summary_config,
    mod_args_gradient_config,
)
from cuflash.formulas import ModArg
from cuflash.problem import make_problem
from cuflash.resources import shared_bytes, shared_memory_per_block

IDS = [f"sm_{major}{minor}" for major, minor in CAPABILITIES]
TABLES = [(8, 0), (8, 6), (9, 0)]  # one target for each table of tiles, to spare time
NAMES = ("window", "softcap", "alibi", "bias", "mask", "key_padding", "query_padding", "sinks", "dropout")
EVERYTHING = ModifierFlags(**dict.fromkeys(NAMES, True))
IN_TILES = {"bias": True, "unit_strides": True, "bias_pairs": True, "bias_tiles": True}
SOME = {
    "Gemma": ModifierFlags(window=True, softcap=True),
    "float32 bias": ModifierFlags(bias=True, bias_float32=True, unit_strides=True, bias_pairs=True),
    "mask": ModifierFlags(mask=True, unit_strides=True),
    "dropout": ModifierFlags(dropout=True),
    "one number a head or sequence": ModifierFlags(
        alibi=True, sinks=True, key_padding=True, query_padding=True
    ),
}


SOME_BIASES = {
    "pairs": ModifierFlags(bias=True, unit_strides=True, bias_pairs=True),
    "float32": SOME["float32 bias"],
    "any strides": ModifierFlags(bias=True),
    "dropout": ModifierFlags(bias=True, unit_strides=True, bias_pairs=True, dropout=True),
}


def problem_of(head_dim, dtype="bfloat16"):
    shape = (1, 1000, 2, head_dim)
    return make_problem(shape, shape, shape, dtype, causal=True)


def configs_for(capability, head_dim, flags):
    """The forward, and the three programs of the backward."""
    problem = problem_of(head_dim)
    backward = config_backward.choose(
        problem, capability, deterministic=False, vector_out=True, modifiers=flags
    )
    return (
        config.choose(problem, capability, vector_out=True, modifiers=flags),
        *backward,
    )


HOPPER_TILES = {
    f"{kind}-{tile.head_dim}-{tile.head_dim_v}": (module, tile)
    for kind, module, tiles in (
        ("forward", config_hopper, config_hopper.MODIFIED_TILES),
        ("backward", config_hopper_backward, config_hopper_backward.MODIFIED_TILES),
        ("backward", config_hopper_backward, config_hopper_backward.MODIFIED_WIDE_TILES),
    )
    for tile in tiles
}
BIAS_TILES = {
    f"{kind}-{tile.head_dim}-{tile.head_dim_v}": (module, tile)
    for kind, module in (("forward", config_hopper), ("backward", config_hopper_backward))
    for tile in module.BIAS_TILES
}


def hopper_config(name, flags, causal=True, **options):
    module, tile = (BIAS_TILES if flags.bias_tiles else HOPPER_TILES)[name]
    return module.make_config(tile, dtype="bfloat16", causal=causal, modifiers=flags, **options)


def compile_within_limits(program_config, capability):
    try:
        arch = jit.architecture(capability)
    except jit.CompileError as error:
        pytest.skip(f"the installed NVRTC has no target for {capability}: {error}")
    program = jit.compile(program_config, arch)
    assert program.warnings == ()
    assert program.spill_stores <= getattr(program_config, "spill_bytes", 0)
    assert program.static_shared_bytes == 0


FORMULAS = ModifierFlags(
    score_mod="score > 0 ? slope[h] * tanh(score) : exp(score) - sqrt(fabs(score) + 1) * pow(score, 2) / cap",
    mask_mod="doc[b, q] == doc[b, kv]",
    mod_args=(ModArg("cap", "float"), ModArg("doc", "int64", 2), ModArg("slope", "bfloat16", 1)),
)


@pytest.mark.parametrize("capability", TABLES, ids=str)
def test_formulas_compile_for_every_table_of_tiles(capability):
    for program_config in configs_for(capability, 128, FORMULAS):
        compile_within_limits(program_config, capability)


def test_formulas_compile_together_with_all_modifiers():
    flags = replace(
        EVERYTHING, **{name: getattr(FORMULAS, name) for name in ("score_mod", "mask_mod", "mod_args")}
    )
    for program_config in (
        configs_for((9, 0), 64, flags)[0],
        bias_gradient_config(problem_of(128), (9, 0), flags),
        MaskSummaryConfig(128, 64, True, replace(FORMULAS, mask=True)),
    ):
        compile_within_limits(program_config, (9, 0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"score_mod": "score +\n  slope[h] * q(3)"},
            r"score_mod does not compile: line 2, 'slope\[h\] \* q\(3\)'",
        ),
        ({"mask_mod": "doc"}, "mask_mod does not compile: line 1, 'doc'"),
    ],
)
def test_nvrtc_points_into_a_formula_that_does_not_compile(wrong, message):
    config = configs_for((9, 0), 64, replace(FORMULAS, **wrong))[0]
    with pytest.raises(ValueError, match=message) as caught:
        jit.compile(config, jit.architecture((9, 0)))
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("capability", TABLES, ids=str)
def test_the_gradients_of_arguments_compile_for_every_table_of_tiles(capability):
    for head_dim in (64, 256):
        config = mod_args_gradient_config(problem_of(head_dim), capability, FORMULAS, ("slope",))
        compile_within_limits(config, capability)


def test_the_gradients_of_arguments_compile_with_all_modifiers_and_several_sites():
    formula = "score * a[h] * a[q] + (one - tanh(a[kv % 3]))"
    args = (ModArg("a", "float32", 1), ModArg("one", "float16"))
    flags = replace(EVERYTHING, score_mod=formula, mod_args=args)
    config = mod_args_gradient_config(problem_of(128), (9, 0), flags, ("one", "a"))
    assert config.sites == ("a", "a", "a", "one")
    compile_within_limits(config, (9, 0))


def test_what_arguments_are_converted_to_compiles_with_a_gradient_too():
    formula = (
        "score + float(t[h]) * int(t[q]) + (bool(t[kv]) && !t[h] ? float(kv) : float(score) * int(score))"
    )
    flags = ModifierFlags(score_mod=formula, mod_args=(ModArg("t", "float32", 1),))
    for program_config in (
        configs_for((9, 0), 64, flags)[0],
        mod_args_gradient_config(problem_of(64), (9, 0), flags, ("t",)),
    ):
        compile_within_limits(program_config, (9, 0))


@pytest.mark.parametrize("capability", TABLES, ids=str)
def test_all_modifiers_at_once_compile_for_every_table_of_tiles(capability):
    for program_config in configs_for(capability, 128, EVERYTHING):
        compile_within_limits(program_config, capability)


@pytest.mark.parametrize("name", SOME)
def test_each_compiles_without_spilling_more_than_its_config_states(name):
    for program_config in configs_for((9, 0), 64, SOME[name]):
        compile_within_limits(program_config, (9, 0))


@pytest.mark.parametrize("name", HOPPER_TILES)
def test_hopper_programs_compile_with_all_modifiers_at_once(name):
    """No C75: ptxas serialises no product."""
    compile_within_limits(hopper_config(name, EVERYTHING), (9, 0))


@pytest.mark.parametrize("flags", SOME)
@pytest.mark.parametrize("name", ["forward-128-128", "backward-128-128", "backward-256-256"])
def test_hopper_programs_with_a_few_modifiers_hardly_spill(name, flags):
    compile_within_limits(replace(hopper_config(name, SOME[flags]), spill_bytes=96), (9, 0))


def test_hopper_programs_with_a_bias_in_tiles_spill_nothing_with_it_and_little_with_all():
    for name in ("forward-128-128", "backward-128-128"):
        compile_within_limits(replace(hopper_config(name, ModifierFlags(**IN_TILES)), spill_bytes=0), (9, 0))
    for name in ("forward-256-256", "backward-128-128"):
        made = hopper_config(name, replace(EVERYTHING, **IN_TILES))
        compile_within_limits(replace(made, spill_bytes=160), (9, 0))


@pytest.mark.parametrize("name", BIAS_TILES)
def test_hopper_programs_with_a_bias_in_tiles_fit_shared_memory(name):
    made = hopper_config(name, replace(EVERYTHING, **IN_TILES))
    assert made.shared_bytes <= shared_memory_per_block((9, 0))


@pytest.mark.parametrize("name", ["forward-64-64", "backward-128-128", "backward-192-192"])
def test_hopper_programs_compile_with_formulas(name):
    compile_within_limits(hopper_config(name, FORMULAS), (9, 0))


def test_hopper_programs_that_are_deterministic_or_full_compile_with_all_modifiers():
    for name in ("backward-128-128", "backward-256-256"):
        compile_within_limits(hopper_config(name, EVERYTHING, causal=False, deterministic=True), (9, 0))
    compile_within_limits(hopper_config("forward-128-128", EVERYTHING, causal=False), (9, 0))


@pytest.mark.parametrize("name", HOPPER_TILES)
def test_hopper_programs_fit_shared_memory_and_registers(name):
    made = hopper_config(name, EVERYTHING)
    assert made.shared_bytes <= shared_memory_per_block((9, 0))
    if isinstance(made, config_hopper.HopperConfig):
        pool = (1 + made.warpgroups) * config_hopper.launch_registers(made.warpgroups, made.blocks_per_sm)
        assert made.producer_registers + made.warpgroups * made.consumer_registers <= pool
        assert made.packed_heads == 1
        assert made.dynamic_tiles
        # One pass over a mask has whole rows of a tile, and whole warps.
        threads = mask_summary_config(problem_of(64), EVERYTHING, made.block_m, made.block_n).threads
        assert threads % made.block_n == threads % 32 == 0


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim_gets_hopper_programs_with_its_modifiers(head_dim):
    problem, flags = problem_of(head_dim), SOME["mask"]
    forward = config_hopper.choose_hopper(problem, modifiers=flags)
    backward = config_hopper_backward.choose_hopper(problem, deterministic=False, modifiers=flags).main
    for made in (forward, backward):
        assert made.modifiers == flags
        assert made.head_dim >= head_dim
    assert backward.kernel in ("hopper/backward.cu", "hopper/backward_wide.cu")


ALONE = {
    **{name: ModifierFlags(**{name: True}) for name in NAMES},
    "score_mod": replace(FORMULAS, mask_mod="", mod_args=(FORMULAS.mod_args[0], FORMULAS.mod_args[2])),
    "mask_mod": replace(FORMULAS, score_mod="", mod_args=(FORMULAS.mod_args[1],)),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_modifier_spills_little_more_than_a_plain_kernel(name):
    more = {"bias": 160, "mask_mod": 240}.get(name, 32)
    plain, modified = (configs_for((9, 0), 128, flags) for flags in (PLAIN, ALONE[name]))
    for i in (0, 2):  # the forward, and the backward's main kernel
        assert modified[i].spill_bytes == plain[i].spill_bytes + more
        compile_within_limits(modified[i], (9, 0))


def test_what_runs_beside_the_main_kernels_compiles_without_spills():
    window = ModifierFlags(window=True, mask=True)
    for program_config in (
        MaskSummaryConfig(128, 64, True, window),
        SinksGradientConfig("bfloat16", ModifierFlags(sinks=True, query_padding=True)),
        SumPartsConfig("float16"),
        bias_gradient_config(problem_of(128), (9, 0), EVERYTHING),
        bias_gradient_config(problem_of(256), (8, 6), ModifierFlags(bias=True)),
    ):
        compile_within_limits(program_config, (9, 0))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=IDS)
def test_shared_memory_of_every_head_dim_fits(capability):
    limit = shared_memory_per_block(capability)
    for head_dim in range(8, 257, 8):
        forward, _, backward, _ = configs_for(capability, head_dim, EVERYTHING)
        assert shared_bytes(forward) <= limit
        assert backward.shared_bytes <= limit
        assert backward.min_blocks_per_sm * (backward.shared_bytes + 1024) <= limit + 1024
        half = backward.warps // 2
        assert backward.block_m % (16 * half // backward.key_warps) == 0
        assert backward.block_m % (16 * backward.dq_row_warps) == 0
        of_bias = bias_gradient_config(problem_of(head_dim), capability, EVERYTHING)
        assert of_bias.min_blocks_per_sm * (of_bias.shared_bytes + 1024) <= limit + 1024
        assert of_bias.block_m * of_bias.block_n >= (64 * 64 if limit > 128 * 1024 else 64 * 32)
        assert mod_args_gradient_config(problem_of(head_dim), capability, EVERYTHING, ()).m_tiles == 1


@pytest.mark.parametrize("flags", SOME_BIASES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_gradient_of_a_bias_spills_no_more_than_its_config_states(head_dim, flags):
    compile_within_limits(bias_gradient_config(problem_of(head_dim), (9, 0), SOME_BIASES[flags]), (9, 0))


def test_a_plain_stub_defines_every_flag_as_false():
    assert not any(PLAIN.constants().values())
    assert "kModified = true" in configs_for((9, 0), 64, SOME["mask"])[0].stub()
