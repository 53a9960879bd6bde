"""Standard attention on a GPU, with the score matrix in memory: what the flash kernels are measured against.

Two products by cuBLAS and one fused softmax between them, as good as this way can be: scale and mask cost no
pass of their own, inputs are read in place, the matrix is in the input dtype and overwritten by its softmax.
``cuflash.standard_backward`` is the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

from cuflash import cublas, jit, launcher
from cuflash.launch_standard import StandardForward
from cuflash.tensor_map import EncodedMap


class StandardLauncher:
    """Called as a ``launcher.Launcher`` of one kernel is."""

    def __init__(self, calls: StandardForward, softmax: jit.Program) -> None:
        """Load the softmax on the current device."""
        cublas.prepare()
        function = jit.load(softmax, calls.softmax.shared_bytes)
        self._scores = cublas.Multiplier(calls.scores)
        self._softmax = launcher.Launcher(function, calls.softmax, addresses=3)
        self._output = cublas.Multiplier(calls.output)

    def __call__(self, maps: Sequence[EncodedMap], addresses: Sequence[int], stream: int) -> None:
        """Queue one forward: the addresses of q, k, v, out, lse or null, and the workspace."""
        cublas.refuse_capture(stream)
        q, k, v, out, lse, scores = addresses
        self._scores(q, k, scores, stream)
        self._softmax((), (scores, out, lse), stream)
        self._output(scores, v, out, stream)
