"""``with emulator():`` makes GPU calls of the package run on the CPU.

Only allocation, compiling and launching are swapped: a module stands in for CuPy, ``jit.compile``,
``jit.load`` and ``launcher.Launcher`` hand out emulated programs, and the emulator's own driver function
encodes tensor maps. cuBLAS's products are NumPy's.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from cuflash import cublas, formulas, jit, launcher, tensor_map
from cuflash.launch import Launchable
from cuflash.tensor_map import EncodedMap
from emulator import banks, device_memory, host_cublas, toolchain
from emulator.findings import KernelFault, parse_findings

_ATTRIBUTES = {
    "cudaDevAttrMultiProcessorCount": 3,  # few, so that persistent kernels take several turns
    "cudaDevAttrL2CacheSize": 1 << 20,
}


class _Options(ctypes.Structure):  # Options in runtime/machine.h
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("resident_blocks", ctypes.c_int),
        ("check_races", ctypes.c_int),
        ("count_banks", ctypes.c_int),
        ("cluster_blocks", ctypes.c_int),
    )


@dataclass(frozen=True, slots=True)
class EmulatedProgram:
    """What the emulator's ``jit.compile`` returns."""

    config: Any
    arch: str
    path: Path
    cluster_blocks: int = 1


@dataclass
class Emulator:
    """A running emulator. ``seed`` decides the interleaving and may be changed between calls."""

    cp: Any
    seed: int = 0
    resident_blocks: int = 3
    check_races: bool = True
    count_banks: bool = False
    edits: Mapping[str, str] = field(default_factory=dict)
    launches: int = 0

    def launch(
        self,
        program: EmulatedProgram,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared_bytes: int,
    ) -> None:
        """Run a grid; KernelFault if a check found something."""
        runtime = toolchain.runtime()
        kernel = ctypes.CDLL(str(program.path))
        packed = _pack(kernel, program.config.entry, arguments)
        runtime.emu_options.restype = ctypes.POINTER(_Options)
        runtime.emu_options()[0] = _Options(
            self.seed, self.resident_blocks, self.check_races, self.count_banks, program.cluster_blocks
        )
        self.launches += 1
        runtime.emu_launch(
            kernel.emu_invoke,
            (ctypes.c_void_p * len(packed))(*[ctypes.addressof(x) for x in packed]),
            (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
            (ctypes.c_uint * 3)(*block, *(1,) * (3 - len(block))),
            ctypes.c_size_t(shared_bytes),
        )
        runtime.emu_findings.restype = ctypes.c_char_p
        findings = parse_findings(runtime.emu_findings().decode())
        if findings:
            raise KernelFault(program.config.entry, findings)

    def bank_conflicts(self) -> list[banks.LineCount]:
        """Shared-memory traffic by source line since the emulator started, with ``count_banks``."""
        return banks.line_counts()


def _pack(kernel: ctypes.CDLL, entry: str, arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments as bytes, as CuPy packs them, held against the sizes of the kernel's parameters."""
    packed = []
    for value in arguments:
        is_pointer = value is None or isinstance(value, int)
        raw = np.uint64(value or 0).tobytes() if is_pointer else value.tobytes()
        packed.append(ctypes.create_string_buffer(raw, len(raw)))
    kernel.emu_parameter_sizes.restype = ctypes.POINTER(ctypes.c_size_t)
    sizes = kernel.emu_parameter_sizes()
    wanted: list[int] = []
    while sizes[len(wanted)]:
        wanted.append(sizes[len(wanted)])
    given = [len(x) for x in packed]
    if given != wanted:
        raise TypeError(f"{entry} takes parameters of {wanted} bytes, the launch gives {given}")
    return packed


@contextlib.contextmanager
def emulator(
    *, capability: tuple[int, int] = (9, 0), edits: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Emulator]:
    """A GPU of compute capability ``capability`` whose kernels run on the CPU; ``.cp`` is its CuPy.

    ``edits`` are replacements of files below ``kernels_cu`` (path → text); ``options`` are ``Emulator``'s.
    """
    cupy: Any = device_memory.cupy_module()
    session = Emulator(cupy, edits=edits or {}, **options)
    cupy.cuda = _cuda_module(capability)
    toolchain.runtime().emu_clear_bank_counts()

    def compile_(config: Any, arch: str, sources: Path | None = None) -> EmulatedProgram:
        try:
            path = toolchain.compile_kernel(config.stub(), config.entry, session.edits)
        except toolchain.CompileError as error:
            raise formulas.blamed(str(error), config) or error from error
        return EmulatedProgram(config, arch, path, toolchain.cluster_blocks(config.stub(), session.edits))

    def load(program: EmulatedProgram, dynamic_shared_bytes: int = 0) -> Any:
        def function(grid: Any, block: Any, arguments: Any, shared_mem: int = 0, stream: Any = None) -> None:
            session.launch(program, grid, block, arguments, shared_mem)

        return function

    def launcher_(
        function: Any,
        call: Launchable,
        *,
        maps: int = 0,
        addresses: int,
        arrays: int = 0,
        map_inside: bool = False,
    ) -> Any:
        def start(encoded: Sequence[EncodedMap], pointers: Sequence[int], stream: int) -> None:
            assert (len(encoded), len(pointers)) == (maps + map_inside, addresses + arrays)
            params = bytearray(call.params.tobytes())
            params[: 8 * arrays] = np.array(pointers[addresses:], np.uint64).tobytes()
            if map_inside:
                params[-tensor_map.MAP_BYTES :] = encoded[-1].value.tobytes()
            struct = np.frombuffer(params, np.uint8)
            arguments = (*(x.value for x in encoded[:maps]), *pointers[:addresses], struct)
            function(call.grid, call.block, arguments, call.shared_bytes)

        return start

    with (
        mock.patch.multiple(jit, compile=compile_, load=load, architecture=_architecture),
        mock.patch.object(launcher, "Launcher", launcher_),
        mock.patch.object(tensor_map, "_driver", _driver),
        mock.patch.multiple(
            cublas, gemm_strided_batched=host_cublas.gemm_strided_batched, prepare=lambda: None
        ),
        _fresh_caches(),
        _modules({"cupy": cupy, "cupy.cuda": cupy.cuda}),
    ):
        yield session


def _architecture(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)


def _driver() -> Any:
    """libcuda as ``tensor_map`` uses it."""
    return types.SimpleNamespace(cuTensorMapEncodeTiled=toolchain.runtime().emu_encode_tensor_map)


def _cuda_module(capability: tuple[int, int]) -> types.ModuleType:
    class Device(contextlib.nullcontext[None]):
        compute_capability = "{}{}".format(*capability)

    class Stream(contextlib.nullcontext["Stream"]):
        ptr = 0

        def __init__(self, non_blocking: bool = False) -> None:
            super().__init__(self)

        def is_capturing(self) -> bool:
            return False

        def synchronize(self) -> None:
            """Launches are over when they return."""

    cuda: Any = types.ModuleType("cupy.cuda")
    cuda.Device = Device
    cuda.Stream = Stream
    cuda.get_current_stream = Stream
    cuda.runtime = types.SimpleNamespace(
        streamIsCapturing=lambda _stream: False,
        getDevice=lambda: 0,
        deviceGetAttribute=lambda name, device: _ATTRIBUTES[name],
        memsetAsync=lambda pointer, value, size, stream: ctypes.memset(pointer, value, size),
        **{name: name for name in _ATTRIBUTES},
    )
    return cuda


@contextlib.contextmanager
def _fresh_caches() -> Iterator[None]:
    """Plans and device memory that the package keeps between calls belong to one session."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            for cache in ("_of_stream", "_unused", "_blocks"):
                kept = getattr(module, cache, None) if name.startswith("cuflash.") else None
                if isinstance(kept, dict | list):
                    stack.enter_context(mock.patch.object(module, cache, type(kept)()))
            if name.startswith("cuflash.plan") and hasattr(module, "_plans"):
                stack.enter_context(mock.patch.object(module._plans, "_kept", {}))
        yield


@contextlib.contextmanager
def _modules(replaced: dict[str, types.ModuleType]) -> Iterator[None]:
    missing = object()
    before = {name: sys.modules.get(name, missing) for name in replaced}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is missing:
                del sys.modules[name]
            else:
                sys.modules[name] = module  # type: ignore[assignment]
