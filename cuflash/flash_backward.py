"""The backward of a flash family on a GPU: its main kernel, and a small one before and after it."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash import launcher
from cuflash.config_backward import BackwardConfig, PostprocessConfig, PreprocessConfig
from cuflash.config_fa1 import Fa1BackwardConfig
from cuflash.config_hopper_backward import HopperBackwardConfig, MainConfig
from cuflash.launch_backward import BackwardCalls, FlashConfigs
from cuflash.launch_modifiers import MODIFIER_ARRAYS
from cuflash.tensor_map import Encoder

# The addresses that each kernel takes, by name: arguments, gradients, and parts of the workspace.
_INPUTS = ("q", "k", "v", "dout")
_SUMS = ("lse_log2", "delta", "dq_parts", "turns")
_PREPROCESS_TAKES = ("dout", "out", "lse", "dlse", *_SUMS)
_POSTPROCESS_TAKES = ("dq_parts", "dq")


def _main_takes(main: BackwardConfig | Fa1BackwardConfig | MainConfig) -> tuple[str, ...]:
    if isinstance(main, BackwardConfig):
        return (*_INPUTS, *_SUMS, "dk", "dv", *_arrays_of(main))
    if isinstance(main, Fa1BackwardConfig):
        return (*_INPUTS, *_SUMS[:3], "dk", "dv")
    counter = ("counter",) if main.is_persistent else ()
    return (*_SUMS, *counter, *_arrays_of(main))  # the others by tensor maps


def _arrays_of(
    config: BackwardConfig | MainConfig | PreprocessConfig | PostprocessConfig,
) -> tuple[str, ...]:
    """The arrays of packed sequences and modifiers, at the start of the params of a kernel that has some."""
    of_queries = isinstance(config, PreprocessConfig | PostprocessConfig)
    blocks = "query_blocks" if of_queries else "key_blocks"
    packed = ("sequences", blocks) if config.modifiers.varlen else ()
    if isinstance(config, PostprocessConfig) or not config.modifiers:
        return packed
    return (*packed, *config.modifiers.arrays, *MODIFIER_ARRAYS)


@dataclass(frozen=True, slots=True)
class FlashSteps:
    """The three kernels of one backward, loaded on their device; None where there is nothing to do."""

    calls: BackwardCalls
    preprocess: launcher.Launcher | None
    main: launcher.Launcher | None
    postprocess: launcher.Launcher | None
    preprocess_takes: tuple[str, ...]
    main_takes: tuple[str, ...]
    postprocess_takes: tuple[str, ...]
    encoders: tuple[Encoder, ...]  # of calls.maps
    takes_counter: bool  # the main kernel takes key blocks from a counter

    @property
    def workspace_words(self) -> int:
        """Words of 4 bytes that a call needs."""
        return self.calls.workspace.words

    def run(self, at: dict[str, int], workspace: int, nbytes: dict[str, int], stream: int) -> None:
        """Queue one backward: addresses by argument name, with those of gradients and counter; 0 for none."""
        at = at | self.sums_at(workspace)
        if self.preprocess is not None:
            self.preprocess((), [at[name] for name in self.preprocess_takes], stream)
        if self.main is not None:
            maps = [
                encode(at[m.name] + m.offset)
                for encode, m in zip(self.encoders, self.calls.maps, strict=True)
            ]
            self.main(maps, [at[name] for name in self.main_takes], stream)
        if self.postprocess is not None:
            self.postprocess((), [at[name] for name in self.postprocess_takes], stream)

    def sums_at(self, workspace: int) -> dict[str, int]:
        """The addresses of the parts of a workspace."""
        return {name: workspace + 4 * n for name, n in zip(_SUMS, self.calls.workspace[:4], strict=True)}


def load_flash_steps(configs: FlashConfigs, calls: BackwardCalls, arch: str) -> FlashSteps:
    """Compile and load on the current device."""
    main = configs.main
    main_takes = _main_takes(main)
    main_arrays = 0 if isinstance(main, Fa1BackwardConfig) else len(_arrays_of(main))
    map_inside = any(m.name == "bias" for m in calls.maps)
    of_preprocess = _arrays_of(configs.preprocess)
    preprocess = launcher.load(
        configs.preprocess,
        calls.preprocess,
        arch,
        addresses=len(_PREPROCESS_TAKES),
        arrays=len(of_preprocess),
    )
    of_postprocess = _arrays_of(configs.postprocess)
    postprocess = launcher.load(
        configs.postprocess,
        calls.postprocess,
        arch,
        addresses=len(_POSTPROCESS_TAKES),
        arrays=len(of_postprocess),
    )
    return FlashSteps(
        calls,
        preprocess,
        launcher.load(
            main,
            calls.main,
            arch,
            maps=len(calls.maps) - map_inside,
            addresses=len(main_takes) - main_arrays,
            arrays=main_arrays,
            map_inside=map_inside,
        ),
        postprocess,
        (*_PREPROCESS_TAKES, *of_preprocess),
        main_takes,
        (*_POSTPROCESS_TAKES, *of_postprocess),
        tuple(Encoder(m.map) for m in calls.maps),
        takes_counter=isinstance(main, HopperBackwardConfig) and main.dynamic_blocks,
    )
