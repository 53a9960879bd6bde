"""What a launch tells a kernel of its modifiers. Pure: no GPU, no CuPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cuflash import philox
from cuflash.arrays import ArrayInfo
from cuflash.formulas import MAX_AXES, ModArg, depends_on
from cuflash.launch import LOG2_E, KernelCall, check_grid
from cuflash.problem import Problem

# Arrays of which each call has its own: ModifierParams in kernels_cu/core/modifier_params.cuh starts so.
OPERAND_ARRAYS = ("alibi_slopes", "bias", "mask", "key_padding", "query_padding", "sinks", "seed")
MODIFIER_ARRAYS = (*OPERAND_ARRAYS, "mask_tiles", "keys_seen")

_TILES_OF_WORD = 32
_OPERAND_STRIDES = np.dtype([(axis, np.int64) for axis in ("batch", "head", "row", "key")], align=True)
_TILE_STRIDES = np.dtype(
    [(name, np.int64) for name in ("batch", "head", "query_block", "of_keys", "key_block")], align=True
)
_HEAD_STRIDES = np.dtype([(axis, np.int64) for axis in ("batch", "head")], align=True)
MODIFIER_PARAMS = np.dtype(
    [
        *((name, np.uint64) for name in MODIFIER_ARRAYS),
        *((f"{name}_strides", _OPERAND_STRIDES) for name in ("bias", "mask")),
        ("mask_tiles_strides", _TILE_STRIDES),
        *((f"{name}_strides", _HEAD_STRIDES) for name in ("keys_seen", "slopes", "sinks")),
        *((f"{name}_stride", np.int64) for name in ("key_padding", "query_padding", "seed")),
        *((f"{name}_bytes", np.int32) for name in ("slopes", "sinks", "key_padding", "query_padding")),
        *((name, np.int32) for name in ("seed_kind", "diagonal", "window_offset", "first_key", "blind_rows")),
        ("softcap_log2", np.float32),
        ("softcap_rate", np.float32),
        ("dropped_below", np.uint32),
        ("kept_scale", np.float32),
        ("unused", np.int32),
    ],
    align=True,
)
# ModArgAxes in kernels_cu/core/mod_args.cuh
MOD_ARG_AXES = np.dtype([("strides", np.int64, (MAX_AXES,)), ("sizes", np.int32, (MAX_AXES,))], align=True)
MASK_SUMMARY_PARAMS = np.dtype(
    [
        ("mask", _OPERAND_STRIDES),
        *(
            (name, np.int32)
            for name in (
                *("first_row", "seqlen_q", "seqlen_k", "heads", "m_blocks", "n_blocks"),
                *("query_words", "key_words", "causal_offset", "window_offset"),
            )
        ),
    ],
    align=True,
)

_SEED_KINDS = {"int32": 1, "uint32": 2, "int64": 3, "uint64": 3}  # SeedKind in kernels_cu/core/dropout.cuh
_SEED_PAIR = 4
_LARGE = 1e38


class MaskBlocks(NamedTuple):
    """How a kernel's tiles divide a mask, an axis that is broadcast counting once; words of their bits."""

    batch: int
    heads: int
    m_blocks: int
    n_blocks: int
    query_words: int  # of a query block: TileBits in kernels_cu/core/mask_tiles.cuh
    key_words: int  # of a key block, which has a bit for each of the kernel's query blocks

    @classmethod
    def of(cls, shape: tuple[int, ...], queries: int, block_m: int, block_n: int) -> MaskBlocks:
        """Of ``queries`` of the rows of a mask of this ``shape``, unless they are broadcast."""
        batch, heads, rows, keys = shape
        n_blocks = -(-keys // block_n)
        all_m_blocks = -(-queries // block_m)
        words = -(-n_blocks // _TILES_OF_WORD), -(-all_m_blocks // _TILES_OF_WORD)
        return cls(batch, heads, -(-min(queries, rows) // block_m), n_blocks, *words)

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.m_blocks * self.n_blocks

    @property
    def of_keys(self) -> int:
        """Where in the words of a head those of its key blocks start."""
        return self.m_blocks * self.query_words

    @property
    def of_head(self) -> int:
        """Words of a head."""
        return self.of_keys + self.n_blocks * self.key_words


def mask_shape(problem: Problem, infos: Mapping[str, ArrayInfo]) -> tuple[int, int, int, int]:
    """The shape of mask and mask_mod together, 1 where neither depends on an axis."""
    of_mask = infos["mask"].shape if "mask" in infos else (1, 1, 1, problem.seqlen_k)
    formula = problem.formulas.mask_mod
    full = (problem.batch, problem.heads_q, problem.seqlen_q)
    sizes = (
        whole if depends_on(formula, index) else size
        for whole, size, index in zip(full, of_mask[:3], ("b", "h", "q"), strict=True)
    )
    batch, heads, rows = sizes
    return batch, heads, rows, problem.seqlen_k


def with_mod_args(params: Any, mod_args: tuple[ModArg, ...], infos: Mapping[str, ArrayInfo]) -> Any:
    """A struct that starts with the addresses of ``mod_args`` and ends with their axes; plain without any."""
    if not mod_args:
        return params
    count = (len(mod_args),)
    names = params.dtype.names
    dtype = np.dtype(
        [
            ("mod_args", np.uint64, count),
            *((name, params.dtype[name]) for name in names),
            ("mod_arg_axes", MOD_ARG_AXES, count),
        ],
        align=True,
    )
    made: Any = np.zeros((), dtype)
    for name in names:
        made[name] = params[name]
    for axes, arg in zip(made["mod_arg_axes"], mod_args, strict=True):
        if arg.operand in infos:
            info = infos[arg.operand]
            axes["strides"][: arg.ndim] = element_strides(arg.operand, info)
            axes["sizes"][: arg.ndim] = info.shape
    return made


def modifier_params(
    problem: Problem,
    infos: Mapping[str, ArrayInfo],
    scale: float,
    *,
    first_row: int = 0,
    blind_rows: int = 0,
    mask_blocks: MaskBlocks | None = None,
) -> Any:
    """The struct, but for the arrays; ``scale`` is the kernel's, whose queries start at ``first_row``.

    Of these, the first ``blind_rows`` see no key.
    """
    params: Any = np.zeros((), MODIFIER_PARAMS)
    for name in ("bias", "mask"):
        if name in infos:
            params[f"{name}_strides"] = element_strides(name, infos[name])
    if mask_blocks is not None:
        batch, heads, rows, keys = mask_shape(problem, infos)
        steps = (heads * mask_blocks.of_head, mask_blocks.of_head, mask_blocks.query_words)
        kept = [step if size > 1 else 0 for step, size in zip(steps, (batch, heads, rows), strict=True)]
        params["mask_tiles_strides"] = (*kept, mask_blocks.of_keys, mask_blocks.key_words)
        params["keys_seen_strides"] = (heads * keys if batch > 1 else 0, keys if heads > 1 else 0)
    for name, field in (("alibi_slopes", "slopes"), ("sinks", "sinks")):
        if name in infos:
            strides = element_strides(name, infos[name])
            params[f"{field}_strides"] = strides if len(strides) == 2 else (0, *strides)
            params[f"{field}_bytes"] = infos[name].itemsize
    for name in ("key_padding", "query_padding"):
        if name in infos:
            (params[f"{name}_stride"],) = element_strides(name, infos[name])
            params[f"{name}_bytes"] = infos[name].itemsize
    if "seed" in infos:
        seed = infos["seed"]
        strides = element_strides("seed", seed)
        params["seed_kind"] = _SEED_PAIR if seed.shape == (2,) else _SEED_KINDS[seed.dtype]
        params["seed_stride"] = strides[0] if strides else 0
    params["diagonal"] = problem.diagonal
    params["window_offset"] = (problem.window_offset or 0) + first_row
    params["first_key"] = problem.first_key_visible
    params["blind_rows"] = blind_rows
    if problem.softcap is not None:
        params["softcap_log2"] = problem.softcap * LOG2_E
        # A formula's score is scaled already.
        rate = 2 * LOG2_E * (1.0 if problem.formulas.score_mod else scale) / problem.softcap
        params["softcap_rate"] = np.clip(rate, -_LARGE, _LARGE)  # times a score of 0 it must stay 0
    params["dropped_below"] = philox.dropped_below(problem.dropout_p) << 16
    params["kept_scale"] = philox.kept_scale(problem.dropout_p)
    return params


def mask_summary_call(
    problem: Problem,
    infos: Mapping[str, ArrayInfo],
    mod_args: tuple[ModArg, ...],
    blocks: MaskBlocks,
    threads: int,
    first_row: int,
    queries: int,
) -> KernelCall:
    """The launch of ``fa2_mask_summary`` for ``queries`` from ``first_row`` on.

    ValueError where a grid cannot have as many thread blocks as there are tiles.
    """
    check_grid("mask_mod" if problem.formulas.mask_mod else "mask", blocks.tiles)
    *_, rows, keys = mask_shape(problem, infos)
    params: Any = np.array(
        (
            element_strides("mask", infos["mask"]) if "mask" in infos else (0, 0, 0, 0),
            first_row,
            min(queries, rows),
            keys,
            *blocks[1:],
            (problem.causal_offset or 0) + first_row,
            (problem.window_offset or 0) + first_row,
        ),
        MASK_SUMMARY_PARAMS,
    )
    params = with_mod_args(params, mod_args, infos)[()]
    return KernelCall((blocks.tiles,), (threads,), threads // 32 * 4, params)


def element_strides(name: str, info: ArrayInfo) -> tuple[int, ...]:
    """Strides in elements, 0 along an axis of one. ValueError where elements do not start at multiples."""
    steps = [stride if size > 1 else 0 for stride, size in zip(info.strides, info.shape, strict=True)]
    if 0 not in info.shape and any(n % info.itemsize for n in (info.pointer, *steps)):
        raise ValueError(
            f"{name} has elements that do not start at multiples of {info.itemsize} bytes; copy it"
        )
    return tuple(step // info.itemsize for step in steps)
