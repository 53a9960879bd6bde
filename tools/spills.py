"""Print docs/modifiers.md's table: what modifiers make a thread of the Hopper kernels store to the stack.

python tools/spills.py [ROW ...]

Needs NVRTC, but no GPU. ROW is part of a row's name. All rows take some minutes: 78 programs are compiled.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuflash import config_hopper, config_hopper_backward, jit
from cuflash.config_modifiers import ModifierFlags
from cuflash.formulas import ModArg

HEAD_DIMS = (64, 128, 256)
NAMES = ("window", "softcap", "alibi", "bias", "mask", "key_padding", "query_padding", "sinks", "dropout")
ROWS = {
    "window": ModifierFlags(window=True),
    "softcap": ModifierFlags(softcap=True),
    "ALiBi": ModifierFlags(alibi=True),
    "bias, pairs read at once": ModifierFlags(bias=True, unit_strides=True, bias_pairs=True),
    "bias, element by element": ModifierFlags(bias=True),
    "mask": ModifierFlags(mask=True, unit_strides=True),
    "key_padding": ModifierFlags(key_padding=True),
    "query_padding": ModifierFlags(query_padding=True),
    "sinks": ModifierFlags(sinks=True),
    "dropout": ModifierFlags(dropout=True),
    "score_mod, of an array element": ModifierFlags(
        score_mod="score + slope[h] * (kv - q)", mod_args=(ModArg("slope", "float32", 1),)
    ),
    "mask_mod, of two array elements": ModifierFlags(
        mask_mod="doc[b, q] == doc[b, kv]", mod_args=(ModArg("doc", "int32", 2),)
    ),
    "all but formulas at once": ModifierFlags(**dict.fromkeys(NAMES, True)),
}
TILES = (
    (config_hopper, config_hopper.MODIFIED_TILES),
    (
        config_hopper_backward,
        (*config_hopper_backward.MODIFIED_TILES, *config_hopper_backward.MODIFIED_WIDE_TILES),
    ),
)


def spills(flags: ModifierFlags) -> list[int]:
    """Of the forward, then of the backward's main kernel, at each of HEAD_DIMS; causal, bfloat16, sm_90a."""
    arch = jit.architecture(config_hopper.CAPABILITY)
    found = []
    for module, tiles in TILES:
        for head_dim in HEAD_DIMS:
            tile = next(tile for tile in tiles if tile.head_dim == tile.head_dim_v == head_dim)
            config = module.make_config(tile, dtype="bfloat16", causal=True, modifiers=flags)
            found.append(jit.compile(config, arch).spill_stores)
    return found


def main(asked: list[str]) -> None:
    print("| | forward 64 | 128 | 256 | backward 64 | 128 | 256 |\n|-|-|-|-|-|-|-|")
    for name, flags in ROWS.items():
        if not asked or any(part in name for part in asked):
            print(f"| {name} |", " | ".join(map(str, spills(flags))), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
