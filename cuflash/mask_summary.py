"""``MaskSummary``: what a pass over a mask found out, kept from call to call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from cuflash.arrays import GpuArrays
from cuflash.formulas import is_mod_arg
from cuflash.modified import SummaryLauncher

_MAX_KEPT = 16  # forward and backward of eight kinds of layers or shapes

# What CUDA graphs read, by address: captured before the graph, it is in no pool of the graph's. Nothing tells
# when a graph is gone, so it is kept.
_captured: dict[int, Any] = {}


class _Kept(NamedTuple):
    given: tuple[int, ...]  # the addresses of the mask and of what its formula reads, and numbers
    arrays: tuple[Any, ...]  # what lies there: alive, so that nothing else comes to lie there
    buffer: Any
    address: int


class MaskSummary:
    """Which tiles ``mask`` and ``mask_mod`` hide or show whole, found out once for many calls.

    Without one, each call on a GPU that has either looks through it before its kernel, and each backward
    again. Calls that are given the same object do so once for each kind of kernel, shape and set of arrays::

        summary = cuflash.MaskSummary()
        out, lse = cuflash.attention(q, k, v, mask=mask, mask_summary=summary, return_lse=True)
        dq, dk, dv = cuflash.attention_backward(..., mask=mask, mask_summary=summary)

    Who changes the contents of ``mask`` or of ``mod_args`` in place calls ``clear``: nothing else notices,
    and results would be wrong. Other arrays, other formulas and other numbers are noticed: the last arrays
    that were looked through are kept alive, so that a new one is not at the address of an old one. What the
    last 16 kinds of calls need is kept, a forward and its backward being two; one more takes the place of
    that which was longest without use. What is kept was written on the stream of the call that found it out;
    other streams must wait for that. What a CUDA graph reads stays in memory until the process ends, whatever
    becomes of this object.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()  # the last used is last
        self._lock = threading.Lock()  # PyTorch differentiates in threads of its own, one for each device

    def clear(self) -> None:
        """Forget everything; the next calls look again."""
        with self._lock:
            self._kept.clear()

    def __reduce__(self) -> tuple[type[MaskSummary], tuple[()]]:
        """A copy, of a module that has one, knows nothing: what is kept is by the original's addresses."""
        return MaskSummary, ()

    def __repr__(self) -> str:
        return f"<cuflash.MaskSummary of {len(self._kept)} kernels>"

    def fetch(
        self,
        summary: SummaryLauncher,
        gpu: GpuArrays,
        device: int,
        mask: int,
        mod_args: Sequence[int],
        operands: Mapping[str, Any],
        stream: int,
    ) -> tuple[int, int]:
        """The addresses of mask_tiles and keys_seen; queues the pass if they are not known yet.

        ``mask`` and ``mod_args`` are the addresses, or numbers, of what ``operands`` has by name.
        """
        given = (mask, *mod_args[: summary.mod_args])
        key = device, summary.key
        is_capturing = gpu.is_capturing(device)
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or kept.given != given:
                if is_capturing:
                    raise ValueError(
                        "mask_summary does not hold what this call needs, and a CUDA graph is being "
                        "captured: make the call once before the capture, with the same arrays"
                    )
                buffer = gpu.empty((summary.words,), "float32", device)
                arrays = tuple(
                    x
                    for name, x in operands.items()
                    if name == "mask" or (summary.mod_args and is_mod_arg(name))
                )
                kept = _Kept(given, arrays, buffer, gpu.pointer(buffer))
                summary(mask, mod_args, kept.address, stream)
                self._kept[key] = kept
                if len(self._kept) > _MAX_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            if is_capturing:
                _captured[kept.address] = kept.buffer
        return summary.parts(kept.address)
