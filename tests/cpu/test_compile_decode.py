"""Every decode kernel that would be chosen compiles for every target, without warnings; hardly any spills."""

from __future__ import annotations

import dataclasses

import pytest

from cuflash import jit
from cuflash.config_decode import AppendConfig, DecodeConfig, DecodeFeatures, choose
from cuflash.problem import make_problem

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
PLAIN = DecodeFeatures(
    causal=True, window=False, positions=False, rotary=False, interleaved=False, page_size=0, aligned=True
)
ALL = DecodeFeatures(
    causal=True, window=True, positions=True, rotary=True, interleaved=True, page_size=64, aligned=True
)


def config_for(
    capability: tuple[int, int],
    head_dim: int,
    rows: int,
    features: DecodeFeatures = PLAIN,
    *,
    scale: float = 1.0,
    dtype: str = "bfloat16",
    **constants: bool,
) -> DecodeConfig:
    group = 4 if rows % 4 == 0 else 1
    shape = (1, 512, 1, head_dim)
    problem = make_problem((1, rows // group, group, head_dim), shape, shape, dtype, causal=True, scale=scale)
    return dataclasses.replace(choose(problem, capability, features), **constants)


def compile_clean(config: DecodeConfig | AppendConfig, capability: tuple[int, int]) -> None:
    try:
        arch = jit.architecture(capability)
    except jit.CompileError as error:
        pytest.skip(f"the installed NVRTC has no target for {capability}: {error}")
    program = jit.compile(config, arch)
    assert program.warnings == ()
    assert program.spill_stores <= getattr(config, "spill_bytes", 0)
    assert program.static_shared_bytes == 0


SHAPES = [
    *(((9, 0), head_dim, rows) for head_dim in (64, 96, 128, 256) for rows in (4, 32, 64, 400)),
    # The largest tiles for the other targets, to spare time.
    *((capability, 128, rows) for capability in CAPABILITIES if capability != (9, 0) for rows in (4, 400)),
    *((capability, 256, 64) for capability in CAPABILITIES if capability != (9, 0)),
]


@pytest.mark.parametrize(("capability", "head_dim", "rows"), SHAPES, ids=str)
def test_every_shape_compiles_without_spills_beyond_its_config(capability, head_dim, rows):
    compile_clean(config_for(capability, head_dim, rows, split=rows < 64), capability)


@pytest.mark.parametrize("rows", [4, 32, 64, 400])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_all_options_at_once_compile_without_spills_beyond_their_config(head_dim, rows):
    config = config_for((9, 0), head_dim, rows, ALL, scale=-1.0, split=True, appends=rows < 64)
    compile_clean(config, (9, 0))


@pytest.mark.parametrize(
    "change",
    [{"aligned": False}, {"page_size": 17}, {"page_size": 17, "aligned": False}, {"interleaved": False}],
    ids=str,
)
def test_every_option_compiles(change):
    features = ALL._replace(**change)
    compile_clean(config_for((9, 0), 128, 4, features, dtype="float16", appends=True, split=True), (9, 0))
    compile_clean(config_for((8, 0), 128, 64, features, dtype="float16"), (8, 0))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("page_size", [0, 16, 17])
def test_appending_compiles(page_size, aligned):
    for capability in ((8, 0), (9, 0)):
        compile_clean(AppendConfig("float16", 128, 64, True, False, page_size, aligned), capability)
