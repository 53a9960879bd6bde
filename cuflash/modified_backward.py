"""The backward of a call with modifiers: a pass over its mask, and the gradients of its operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from cuflash import launcher
from cuflash.arrays import ArrayInfo
from cuflash.checks_backward import BackwardOptions
from cuflash.config_backward import BackwardConfigs
from cuflash.config_hopper_backward import HopperBackwardConfigs
from cuflash.config_modifiers import (
    BiasGradientConfig,
    ModArgsGradientConfig,
    ModifierFlags,
    SinksGradientConfig,
    SumPartsConfig,
    bias_gradient_config,
    mod_args_gradient_config,
)
from cuflash.flash_backward import FlashSteps, load_flash_steps
from cuflash.formulas import arg_name, is_mod_arg
from cuflash.launch import LOG2_E, KernelCall, params_dtype
from cuflash.launch_backward import (
    BackwardCalls,
    BackwardStrides,
    first_visible_row,
    kernel_call,
    query_blocks,
    visible_rows,
)
from cuflash.launch_modifiers import MODIFIER_ARRAYS, modifier_params, with_mod_args
from cuflash.modified import SummaryLauncher, SummaryPass
from cuflash.problem import Problem
from cuflash.resources import ELEMENT_BYTES

# SinksParams, BiasParams, ModArgsParams (but for its last member) and SumParams in kernels_cu/fa2/
SINKS_PARAMS = params_dtype(
    "dlse", "first_row seqlen_q all_queries heads_q batch rows_per_head shared_by_batch block_rows"
)
BIAS_PARAMS = params_dtype(
    "q k v dout",
    "first_row rows rows_per_head seqlen_q seqlen_k seqlen_k_visible batch heads_q group_size head_dim "
    "head_dim_v causal_offset m_blocks n_blocks bias_batch bias_heads bias_rows bias_m_blocks splits",
    "scale_log2",
)
MOD_ARGS_PARAMS = params_dtype(
    "q k v dout",
    "first_row rows rows_per_head seqlen_q seqlen_k_visible heads_q group_size head_dim head_dim_v "
    "causal_offset m_blocks",
    "scale_log2",
)
SUM_PARAMS = np.dtype([("count", np.int64), ("parts", np.int32), ("bytes", np.int32)], align=True)

SINKS_TAKES = ("lse_log2", "delta", "dlse", "dsinks")
_BIAS_TAKES = ("q", "k", "v", "dout", "lse_log2", "delta")
_BLOCKS_PER_SM = 4  # thread blocks of the bias's gradient that keep a multiprocessor busy

ModifiedConfigs = BackwardConfigs | HopperBackwardConfigs


class SinksGradient(NamedTuple):
    """The kernel of dsinks."""

    config: SinksGradientConfig
    call: KernelCall


class BiasGradient(NamedTuple):
    """The kernel of dbias, and that of the sum of its parts, if they are several."""

    config: BiasGradientConfig
    call: KernelCall
    sum_config: SumPartsConfig
    sum_call: KernelCall | None
    words: int  # of the parts


class ModArgsGradient(NamedTuple):
    """The kernel of the gradients of arguments of a score_mod, and what stores their sums as results."""

    config: ModArgsGradientConfig
    call: KernelCall | None  # None where the formula reads none of them
    stores: tuple[tuple[str, int, SumPartsConfig, KernelCall], ...]  # operand, first of its words, launch
    words: int  # of the sums


class ModifiedCalls(NamedTuple):
    """What runs; None where there is nothing to do."""

    flash: BackwardCalls
    summary: SummaryPass | None
    sinks: SinksGradient | None
    bias: BiasGradient | None
    mod_args: ModArgsGradient | None


def modified_calls(
    problem: Problem,
    infos: Mapping[str, ArrayInfo],
    options: BackwardOptions,
    configs: ModifiedConfigs,
    strides: BackwardStrides,
    capability: tuple[int, int],
    multiprocessors: int,
    of_family: Callable[[Any, Any], BackwardCalls],
) -> ModifiedCalls:
    """The launches for a problem whose Configs have modifiers.

    ``of_family`` makes those of a plain backward from the parameters of the main kernel's modifiers and of
    the preprocess's.
    """
    main, rows = configs.main, visible_rows(problem)
    flags = main.modifiers
    summary = SummaryPass.of(problem, infos, flags, main.block_m, main.block_n, rows)
    params = modifier_params(
        problem,
        infos,
        problem.scale,
        first_row=rows.start,
        blind_rows=first_visible_row(problem) - rows.start,
        mask_blocks=summary.blocks if summary else None,
    )
    main_params = with_mod_args(params, flags.mod_args, infos)
    flash = of_family(main_params, params)
    rows_per_head = query_blocks(problem, main.block_m) * main.block_m
    sinks = bias = of_args = None
    if "sinks" in options.wanted:
        sinks = _sinks_gradient(problem, infos, flags, strides, rows_per_head)
    if "bias" in options.wanted:
        bias = _bias_gradient(problem, infos, flags, strides, rows_per_head, capability, multiprocessors)
    if wanted := tuple(filter(is_mod_arg, options.wanted)):
        of_args = _mod_args_gradient(problem, infos, flags, strides, rows_per_head, capability, wanted)
    return ModifiedCalls(flash, summary, sinks, bias, of_args)


def _sinks_gradient(
    problem: Problem,
    infos: Mapping[str, ArrayInfo],
    flags: ModifierFlags,
    strides: BackwardStrides,
    rows_per_head: int,
) -> SinksGradient | None:
    rows = visible_rows(problem)
    config = SinksGradientConfig(problem.dtype, ModifierFlags(sinks=True, query_padding=flags.query_padding))
    call = kernel_call(
        "sinks",
        math.prod(infos["sinks"].shape),
        config.threads,
        config.threads // 32 * 4,
        SINKS_PARAMS,
        strides.dlse,
        *(rows.start, len(rows), problem.seqlen_q, problem.heads_q, problem.batch, rows_per_head),
        *(int(len(infos["sinks"].shape) == 1), 0),
        modifiers=modifier_params(problem, infos, problem.scale),
    )
    return None if call is None else SinksGradient(config, call)


def _bias_gradient(
    problem: Problem,
    infos: Mapping[str, ArrayInfo],
    flags: ModifierFlags,
    strides: BackwardStrides,
    rows_per_head: int,
    capability: tuple[int, int],
    multiprocessors: int,
) -> BiasGradient | None:
    bias = infos["bias"]
    if 0 in bias.shape:
        return None
    rows = visible_rows(problem)
    config = bias_gradient_config(problem, capability, flags)
    m_blocks, n_blocks = -(-problem.seqlen_q // config.block_m), -(-problem.seqlen_k // config.block_n)
    batch, heads, bias_rows, _ = bias.shape
    bias_m_blocks = 1 if bias_rows == 1 else m_blocks
    tiles = batch * heads * bias_m_blocks * n_blocks
    terms = problem.batch * problem.heads_q * m_blocks // (batch * heads * bias_m_blocks)
    splits = max(1, min(terms, _BLOCKS_PER_SM * multiprocessors // tiles))
    params = _params_of_all_queries(problem, infos, flags)
    s = strides
    call = kernel_call(
        "bias",
        tiles * splits,
        config.threads,
        config.shared_bytes,
        BIAS_PARAMS,
        *(s.q, s.k, s.v, s.dout),
        *(rows.start, len(rows), rows_per_head),
        *(problem.seqlen_q, problem.seqlen_k, problem.seqlen_k_visible),
        *(problem.batch, problem.heads_q, problem.group_size, problem.head_dim, problem.head_dim_v),
        problem.causal_offset or 0,
        *(m_blocks, n_blocks, batch, heads, bias_rows, bias_m_blocks, splits),
        problem.scale * LOG2_E,
        modifiers=params,
    )
    assert call is not None
    sum_config, sum_call, count = SumPartsConfig(problem.dtype), None, math.prod(bias.shape)
    if splits > 1:
        blocks = -(-count // sum_config.threads)
        sizes = (count, splits, bias.itemsize)
        sum_call = kernel_call("bias", blocks, sum_config.threads, 0, SUM_PARAMS, *sizes)
    return BiasGradient(config, call, sum_config, sum_call, splits * count if splits > 1 else 0)


def _params_of_all_queries(problem: Problem, infos: Mapping[str, ArrayInfo], flags: ModifierFlags) -> Any:
    """Of a kernel that counts all queries from 0."""
    return with_mod_args(modifier_params(problem, infos, problem.scale), flags.mod_args, infos)


def _mod_args_gradient(
    problem: Problem,
    infos: Mapping[str, ArrayInfo],
    flags: ModifierFlags,
    strides: BackwardStrides,
    rows_per_head: int,
    capability: tuple[int, int],
    wanted: tuple[str, ...],
) -> ModArgsGradient:
    stores, first, words = [], {}, 0
    for operand in wanted:
        info, first[arg_name(operand)] = infos[operand], words
        count = math.prod(info.shape)
        store = SumPartsConfig(info.dtype if info.itemsize == ELEMENT_BYTES else problem.dtype)
        blocks = -(-count // store.threads)
        store_call = kernel_call(operand, blocks, store.threads, 0, SUM_PARAMS, count, 1, info.itemsize)
        if store_call is not None:
            stores.append((operand, words, store, store_call))
        words += count
    config = mod_args_gradient_config(problem, capability, flags, tuple(first))
    if not config.sites:
        return ModArgsGradient(config, None, tuple(stores), words)
    rows, s = visible_rows(problem), strides
    m_blocks = -(-problem.seqlen_q // config.block_m)
    params = np.dtype(
        [
            *((name, MOD_ARGS_PARAMS[name]) for name in MOD_ARGS_PARAMS.names or ()),
            ("first", np.int64, (len(config.sites),)),
        ],
        align=True,
    )
    call = kernel_call(
        "q",
        problem.batch * problem.heads_q * m_blocks if problem.seqlen_k else 0,
        config.threads,
        config.shared_bytes,
        params,
        *(s.q, s.k, s.v, s.dout),
        *(rows.start, len(rows), rows_per_head),
        *(problem.seqlen_q, problem.seqlen_k_visible, problem.heads_q, problem.group_size),
        *(problem.head_dim, problem.head_dim_v, problem.causal_offset or 0, m_blocks),
        problem.scale * LOG2_E,
        [first[name] for name in config.sites],
        modifiers=_params_of_all_queries(problem, infos, flags),
    )
    return ModArgsGradient(config, call, tuple(stores), words)


@dataclass(frozen=True, slots=True)
class ModArgsLauncher:
    """The launches of the gradients of arguments of a score_mod, loaded on their device."""

    main: launcher.Launcher | None
    stores: tuple[tuple[str, int, launcher.Launcher], ...]  # operand, first of its words, what stores them
    words: int
    takes: tuple[str, ...]

    @classmethod
    def load(cls, of: ModArgsGradient, arch: str) -> ModArgsLauncher:
        takes = (*_BIAS_TAKES, "sums", *of.config.modifiers.arrays, *MODIFIER_ARRAYS)
        first = len(_BIAS_TAKES) + 1
        main = launcher.load(of.config, of.call, arch, addresses=first, arrays=len(takes) - first)
        stores = []
        for operand, word, config, call in of.stores:
            store = launcher.load(config, call, arch, addresses=2)
            assert store is not None
            stores.append((operand, word, store))
        return cls(main, tuple(stores), of.words, takes)

    def __call__(self, at: Mapping[str, int], sums: int, stream: int) -> None:
        """Queue them: addresses by name, as ``ModifiedSteps.run`` has them, and that of the sums."""
        from cupy.cuda import runtime

        runtime.memsetAsync(sums, 0, 4 * self.words, stream)
        if self.main is not None:
            where = {**at, "sums": sums}
            self.main((), [where[name] for name in self.takes], stream)
        for operand, word, store in self.stores:
            store((), [sums + 4 * word, at[f"d{operand}"]], stream)


@dataclass(frozen=True, slots=True)
class ModifiedSteps:
    """The launches of one backward, loaded on their device."""

    flash: FlashSteps
    summary: SummaryLauncher | None
    sinks: launcher.Launcher | None
    bias: launcher.Launcher | None
    sum_bias: launcher.Launcher | None
    of_args: ModArgsLauncher | None
    summary_word: int  # where in the workspace what they write starts
    parts_word: int
    sums_word: int
    workspace_words: int
    mod_args: tuple[str, ...]
    takes_counter: ClassVar[bool] = False

    def run(self, at: dict[str, int], workspace: int, nbytes: dict[str, int], stream: int) -> None:
        """Queue one backward: addresses by argument name, gradients' and operands' included; 0 for none.

        With those of mask_tiles and keys_seen among them, nothing looks through the mask.
        """
        is_known = "mask_tiles" in at
        at = dict.fromkeys(MODIFIER_ARRAYS, 0) | at | self.flash.sums_at(workspace)
        if self.summary is not None and not is_known:
            summary = workspace + 4 * self.summary_word
            at["mask_tiles"], at["keys_seen"] = self.summary(*self.masks(at), summary, stream)
        self.flash.run(at, workspace, nbytes, stream)
        arrays = [at[name] for name in MODIFIER_ARRAYS]
        if self.sinks is not None:
            self.sinks((), [*(at[name] for name in SINKS_TAKES), *arrays], stream)
        if self.bias is not None:
            parts = at["dbias"] if self.sum_bias is None else workspace + 4 * self.parts_word
            mod_args = [at[name] for name in self.mod_args]
            self.bias((), [*(at[name] for name in _BIAS_TAKES), parts, *mod_args, *arrays], stream)
            if self.sum_bias is not None:
                self.sum_bias((), [parts, at["dbias"]], stream)
        if self.of_args is not None:
            self.of_args(at, workspace + 4 * self.sums_word, stream)

    def masks(self, at: Mapping[str, int]) -> tuple[int, list[int]]:
        """The addresses of the mask and of the arguments of formulas."""
        return at.get("mask", 0), [at[name] for name in self.mod_args]


def load_modified_steps(configs: ModifiedConfigs, calls: ModifiedCalls, arch: str) -> ModifiedSteps:
    """Compile and load on the current device."""
    flash = load_flash_steps(configs, calls.flash, arch)
    summary, sinks, bias, of_args = calls[1:]
    summary_word = flash.workspace_words
    after_summary = summary_word + (summary.words if summary else 0)
    parts_word = -(-after_summary // 2) * 2  # stored two at a time
    sums_word = parts_word + (bias.words if bias else 0)
    arrays = len(MODIFIER_ARRAYS)
    mod_args = configs.main.modifiers.arrays
    return ModifiedSteps(
        flash,
        SummaryLauncher.load(summary, arch) if summary else None,
        launcher.load(sinks.config, sinks.call, arch, addresses=len(SINKS_TAKES), arrays=arrays)
        if sinks
        else None,
        launcher.load(
            bias.config, bias.call, arch, addresses=len(_BIAS_TAKES) + 1, arrays=len(mod_args) + arrays
        )
        if bias
        else None,
        launcher.load(bias.sum_config, bias.sum_call, arch, addresses=2) if bias else None,
        ModArgsLauncher.load(of_args, arch) if of_args else None,
        summary_word,
        parts_word,
        sums_word,
        sums_word + (of_args.words if of_args else 0),
        mod_args,
    )
