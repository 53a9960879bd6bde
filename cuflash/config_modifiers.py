"""Which modifiers a program has: constants of its Config, so that what is absent costs nothing.

Pure Python without CuPy. Only what changes the code is here: values, shapes and strides are parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from cuflash import formulas
from cuflash.arrays import ArrayInfo
from cuflash.formulas import ModArg
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES, blocks_fit
from cuflash.stub import translation_unit
from cuflash.tensor_map import ALIGNMENT, STRIDE_LIMIT

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True)
class ModifierFlags:
    """The constants; docs/modifiers.md says what each modifier does."""

    window: bool = False  # bounded on the left; the right side is another causal offset
    softcap: bool = False
    alibi: bool = False
    bias: bool = False
    bias_float32: bool = False
    mask: bool = False
    unit_strides: bool = False  # bias and mask, whichever there are, have contiguous rows
    bias_pairs: bool = False  # two neighbouring elements of bias are read at once, but in the backward
    bias_tiles: bool = False  # hopper has TMA bring tiles of bias
    key_padding: bool = False
    query_padding: bool = False
    sinks: bool = False
    dropout: bool = False
    varlen: bool = False  # sequences are packed one after the other: no modifier, but known to the same code
    score_mod: str = ""  # the formula, "" for none
    mask_mod: str = ""
    mod_args: tuple[ModArg, ...] = ()

    def __bool__(self) -> bool:
        return self != PLAIN

    def __str__(self) -> str:
        return " ".join(name for name, on in self._flags().items() if on) or "none"

    def constants(self) -> dict[str, int]:
        """What a stub defines of them."""
        return self._flags() | {"modified": bool(self), "mod_args": len(self.mod_args)}

    @property
    def modify(self) -> bool:
        """Whether there are any modifiers."""
        return replace(self, varlen=False) != PLAIN

    @property
    def of_preprocess(self) -> ModifierFlags:
        """Those that the pass before a backward knows."""
        return replace(self.of_postprocess, query_padding=self.query_padding)

    @property
    def of_postprocess(self) -> ModifierFlags:
        """Those that the pass after a backward knows: with dropout, sequences start elsewhere."""
        return ModifierFlags(varlen=self.varlen, dropout=self.varlen and self.dropout)

    @property
    def masks(self) -> bool:
        """Keys are hidden element by element, and tiles where all of their elements are."""
        return self.mask or bool(self.mask_mod)

    @property
    def makes_two_ps(self) -> bool:
        """In the backward dS takes another P than dV."""
        return bool(self.score_mod) or self.softcap or self.dropout

    @property
    def hides_keys(self) -> bool:
        """Where keys are, that no query sees, is known on the device only."""
        return self.masks or self.key_padding or self.query_padding

    @property
    def arrays(self) -> tuple[str, ...]:
        """The operands that are arguments of formulas, in the order of their addresses."""
        return tuple(arg.operand for arg in self.mod_args)

    def _flags(self) -> dict[str, bool]:
        return {
            field.name: bool(getattr(self, field.name)) for field in fields(self) if field.name != "mod_args"
        }

    def stub(
        self, config: DataclassInstance, kernel: str, derived: Mapping[str, int] = MappingProxyType({})
    ) -> str:
        """The translation unit of ``config``, which has these modifiers and ``derived`` constants."""

        def functions(first_line: int) -> str:
            return formulas.source(self.score_mod, self.mask_mod, self.mod_args, first_line)

        return translation_unit(config, kernel, self.constants() | dict(derived), functions)


PLAIN = ModifierFlags()
_MASK_SUMMARY_THREADS = 256  # about so many
# How they are read: no modifiers.
_OF_BIAS_AND_MASK = {"bias_float32", "unit_strides", "bias_pairs", "bias_tiles"}


def spill_bytes(plain: int, modifiers: ModifierFlags) -> int:
    """What ptxas may store to the stack in a main fa2 kernel with ``modifiers``, of ``plain`` without any.

    For sm_90 and head_dims 64 and 128, one modifier that is no formula adds at most 16 bytes, but a bias that
    is read element by element 148, and a mask_mod 220, in the tiles that it hides in part: what it reads of a
    row or column is held for all of it. The forward with all at once stores 456.
    """
    count = sum(on for name, on in modifiers._flags().items() if name not in _OF_BIAS_AND_MASK)
    if count > 1:
        return 512
    if modifiers.mask_mod:
        return plain + 240
    return plain + (160 if modifiers.bias and not modifiers.bias_pairs else 32 if modifiers else 0)


def mod_args_of(problem: Problem, infos: Mapping[str, ArrayInfo]) -> tuple[ModArg, ...]:
    """The arguments of the formulas of ``problem``, arrays and numbers, in the order of their names."""
    kinds = {formulas.operand_name(name): ModArg(name, kind) for name, kind in problem.formulas.numbers}
    for operand, info in infos.items():
        if formulas.is_mod_arg(operand):
            kinds[operand] = ModArg(formulas.arg_name(operand), info.dtype, len(info.shape))
    return tuple(kinds[operand] for operand in sorted(kinds))


def flags_of(problem: Problem, infos: Mapping[str, ArrayInfo]) -> ModifierFlags:
    """The modifiers of a call whose arrays ``infos`` describes."""
    by_key = [infos[name] for name in ("bias", "mask") if name in infos]
    unit_strides = all(info.shape[3] == 1 or info.strides[3] == info.itemsize for info in by_key)
    return ModifierFlags(
        window=problem.window_offset is not None,
        softcap=problem.softcap is not None,
        alibi="alibi_slopes" in infos,
        bias="bias" in infos,
        bias_float32="bias" in infos and infos["bias"].dtype == "float32",
        mask="mask" in infos,
        unit_strides=bool(by_key) and unit_strides,
        bias_pairs="bias" in infos and unit_strides and _are_pairs(infos["bias"]),
        bias_tiles="bias" in infos and unit_strides and _are_tiles(infos["bias"]),
        key_padding="key_padding" in infos,
        query_padding="query_padding" in infos,
        sinks="sinks" in infos,
        dropout=problem.dropout_p > 0,
        score_mod=problem.formulas.score_mod,
        mask_mod=problem.formulas.mask_mod,
        mod_args=mod_args_of(problem, infos),
    )


def _are_pairs(info: ArrayInfo) -> bool:
    """Every row starts at a multiple of two elements, and has a whole number of pairs."""
    return info.shape[3] % 2 == 0 and all(n % (2 * info.itemsize) == 0 for n in (info.pointer, *_steps(info)))


def _are_tiles(info: ArrayInfo) -> bool:
    """Elements are of 16 bits, and TMA can step along the rows."""
    steps = _steps(info)
    return (
        info.itemsize == ELEMENT_BYTES
        and all(n % ALIGNMENT == 0 for n in (info.pointer, *steps))
        and all(0 <= step < STRIDE_LIMIT for step in steps)
    )


def _steps(info: ArrayInfo) -> list[int]:
    """Strides along the axes before the last that have more than one element."""
    return [stride for stride, size in zip(info.strides[:3], info.shape[:3], strict=True) if size > 1]


@dataclass(frozen=True, slots=True)
class MaskSummaryConfig:
    """Compile-time constants of ``kernels_cu/fa2/mask_summary.cu``."""

    block_m: int  # of the tiles, the main kernel's
    block_n: int
    causal: bool
    modifiers: ModifierFlags = field(metadata={"in_stub": False})
    threads: int = _MASK_SUMMARY_THREADS

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa2/mask_summary.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa2_mask_summary"

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return self.modifiers.stub(self, self.kernel)


def mask_summary_config(
    problem: Problem, modifiers: ModifierFlags, block_m: int, block_n: int
) -> MaskSummaryConfig:
    """Of a main kernel with such tiles. One program serves whatever other modifiers there are."""
    relevant = ModifierFlags(
        window=modifiers.window,
        mask=modifiers.mask,
        mask_mod=modifiers.mask_mod,
        mod_args=modifiers.mod_args if modifiers.mask_mod else (),
    )
    rows = math.lcm(block_n, 32)  # threads that are whole rows of a tile, and whole warps
    return MaskSummaryConfig(
        block_m, block_n, problem.is_causal, relevant, threads=rows * max(1, _MASK_SUMMARY_THREADS // rows)
    )


@dataclass(frozen=True, slots=True)
class SinksGradientConfig:
    """Compile-time constants of ``kernels_cu/fa2/backward_sinks.cu``."""

    dtype: str
    modifiers: ModifierFlags = field(metadata={"in_stub": False})
    threads: int = 256

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa2/backward_sinks.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa2_backward_sinks"

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return self.modifiers.stub(self, self.kernel)


class BiasTile(NamedTuple):
    """How ``BiasGradientConfig`` tiles a bias."""

    block_m: int
    block_n: int
    m_tiles: int
    strip: int
    stages: int
    min_blocks_per_sm: int


@dataclass(frozen=True, slots=True)
class BiasGradientConfig:
    """Compile-time constants of ``kernels_cu/fa2/backward_bias.cu``."""

    dtype: str
    head_dim: int  # of Q and K, padded to a multiple of 16
    head_dim_v: int  # of V and O, padded likewise
    block_m: int  # rows of a tile of the gradient, 16 * m_tiles for each warp
    block_n: int
    m_tiles: int
    strip: int  # keys of the tile whose S and dP are in registers at once
    stages: int  # slots of Q, dO, K and V in shared memory
    min_blocks_per_sm: int  # __launch_bounds__: caps the registers
    causal: bool
    modifiers: ModifierFlags = field(metadata={"in_stub": False})

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa2/backward_bias.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa2_backward_bias"

    @property
    def threads(self) -> int:
        return 32 * self.block_m // (16 * self.m_tiles)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of one thread block, as the kernel maps it."""
        slot = (self.block_m + self.block_n) * (self.head_dim + self.head_dim_v) * ELEMENT_BYTES
        return self.stages * slot

    @property
    def spill_bytes(self) -> int:
        """What ptxas may store to the stack.

        The sums and the bias stay in registers beside S and dP, or what a formula takes. With 32 rows a warp
        that is all there are: what a term needs once, addresses for the most part, is stored.
        """
        return 192 if self.m_tiles > 1 else 64 if self.modifiers.score_mod else 0

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return self.modifiers.stub(self, self.kernel)


@dataclass(frozen=True, slots=True)
class ModArgsGradientConfig(BiasGradientConfig):
    """Compile-time constants of ``kernels_cu/fa2/backward_mod_args.cu``, whose tiles are the bias's."""

    wanted: tuple[str, ...] = field(metadata={"in_stub": False})  # names of arguments

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa2/backward_mod_args.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa2_backward_mod_args"

    @property
    def sites(self) -> tuple[str, ...]:
        """The argument that is read at each place where the formula reads one of those wanted."""
        return formulas.sites(self.modifiers.score_mod, self.modifiers.mod_args, self.wanted)

    @property
    def spill_bytes(self) -> int:
        """What ptxas may store to the stack: sums of several sites are in registers all along."""
        return 96 if len(self.sites) > 1 else 0

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        flags = self.modifiers

        def functions(first_line: int) -> str:
            source = formulas.source(flags.score_mod, flags.mask_mod, flags.mod_args, first_line)
            first_line += source.count("\n")
            return source + formulas.gradient_source(flags.score_mod, flags.mod_args, self.wanted, first_line)

        constants = flags.constants() | {"sites": len(self.sites)}
        return translation_unit(self, self.kernel, constants, functions)


@dataclass(frozen=True, slots=True)
class SumPartsConfig:
    """Compile-time constants of ``kernels_cu/fa2/sum_parts.cu``."""

    dtype: str
    threads: int = 256

    @property
    def kernel(self) -> str:
        """Path of the source below ``kernels_cu/``."""
        return "fa2/sum_parts.cu"

    @property
    def entry(self) -> str:
        """Name of the ``extern "C"`` kernel."""
        return "fa2_sum_parts"

    def stub(self) -> str:
        """The translation unit given to NVRTC."""
        return translation_unit(self, self.kernel)


# In the order in which they are tried: the first whose thread blocks fit shared memory.
BIAS_TILES = (
    BiasTile(128, 64, m_tiles=2, strip=32, stages=2, min_blocks_per_sm=2),
    BiasTile(128, 64, m_tiles=2, strip=32, stages=1, min_blocks_per_sm=2),
    BiasTile(64, 64, m_tiles=1, strip=64, stages=1, min_blocks_per_sm=2),
    BiasTile(64, 64, m_tiles=1, strip=64, stages=1, min_blocks_per_sm=1),
    BiasTile(64, 32, m_tiles=1, strip=32, stages=1, min_blocks_per_sm=1),
)


def make_bias_gradient_config(
    tile: BiasTile, problem: Problem, modifiers: ModifierFlags
) -> BiasGradientConfig:
    """A Config with a given tile."""
    head_dim, head_dim_v = (-(-size // 16) * 16 for size in (problem.head_dim, problem.head_dim_v))
    return BiasGradientConfig(
        problem.dtype, head_dim, head_dim_v, causal=problem.is_causal, modifiers=modifiers, **tile._asdict()
    )


def bias_gradient_config(
    problem: Problem,
    capability: tuple[int, int],
    modifiers: ModifierFlags,
    tiles: tuple[BiasTile, ...] = BIAS_TILES,
) -> BiasGradientConfig:
    """The first tile that leaves room for as many thread blocks as it wants on a multiprocessor."""
    configs = (make_bias_gradient_config(tile, problem, modifiers) for tile in tiles)
    return next(c for c in configs if blocks_fit(c.min_blocks_per_sm, c.shared_bytes, capability))


def mod_args_gradient_config(
    problem: Problem, capability: tuple[int, int], modifiers: ModifierFlags, wanted: tuple[str, ...]
) -> ModArgsGradientConfig:
    """The same for the gradients of the arguments called ``wanted``, whose sums are of two rows a thread."""
    tiles = tuple(tile for tile in BIAS_TILES if tile.m_tiles == 1)
    config = bias_gradient_config(problem, capability, modifiers, tiles)
    return ModArgsGradientConfig(**{f.name: getattr(config, f.name) for f in fields(config)}, wanted=wanted)
