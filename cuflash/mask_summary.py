"""``MaskSummary``: what a pass over a mask found out, kept from call to call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from cuflash.arrays import GpuArrays
from cuflash.modified import SummaryLauncher


class _Kept(NamedTuple):
    arrays: tuple[int, ...]  # the addresses of the mask and of what its formula reads, and numbers
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
    and results would be wrong. Arrays at other addresses, other formulas and other numbers are noticed. What
    is kept was written on the stream of the call that found it out; other streams must wait for that.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}

    def clear(self) -> None:
        """Forget everything; the next calls look again."""
        self._kept.clear()

    def __repr__(self) -> str:
        return f"<cuflash.MaskSummary of {len(self._kept)} kernels>"

    def fetch(
        self,
        summary: SummaryLauncher,
        gpu: GpuArrays,
        device: int,
        mask: int,
        mod_args: Sequence[int],
        stream: int,
    ) -> tuple[int, int]:
        """The addresses of mask_tiles and keys_seen; queues the pass if they are not known yet."""
        arrays = (mask, *mod_args[: summary.mod_args])
        key = device, summary.key
        kept = self._kept.get(key)
        if kept is None or kept.arrays != arrays:
            if gpu.is_capturing(device):
                raise ValueError(
                    "mask_summary does not hold what this call needs, and a CUDA graph is being captured: "
                    "make the call once before the capture, with the same arrays"
                )
            buffer = gpu.empty((summary.words,), "float32", device)
            kept = _Kept(arrays, buffer, gpu.pointer(buffer))
            summary(mask, mod_args, kept.address, stream)
            self._kept[key] = kept
        return summary.parts(kept.address)
