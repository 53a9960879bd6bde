"""The backward of standard attention on a GPU: five products by cuBLAS, one fused kernel for the softmax.

P is computed again from q, k and lse, because ``attention_backward`` takes no score matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cuflash import cublas, launcher
from cuflash.config_standard import StandardBackwardConfigs
from cuflash.launch_standard import StandardBackward


@dataclass(frozen=True, slots=True)
class StandardSteps:
    """The parts of one backward, loaded on their device; None where there is nothing to do."""

    calls: StandardBackward
    scores: cublas.Multiplier
    dprobabilities: cublas.Multiplier
    softmax: launcher.Launcher | None
    dq: cublas.Multiplier
    dk: cublas.Multiplier
    dv: cublas.Multiplier
    sum_dk: launcher.Launcher | None
    sum_dv: launcher.Launcher | None
    takes_counter: ClassVar[bool] = False

    @property
    def workspace_words(self) -> int:
        """Words of 4 bytes that a call needs."""
        return self.calls.workspace_words

    def run(self, at: dict[str, int], workspace: int, nbytes: dict[str, int], stream: int) -> None:
        """Queue one backward: addresses by argument name, gradients' included; dlse is 0 where not given."""
        from cupy.cuda import runtime

        cublas.refuse_capture(stream)
        calls = self.calls
        for name in calls.zeroed:
            if nbytes[name]:
                runtime.memsetAsync(at[name], 0, nbytes[name], stream)
        scores, dscores = workspace, workspace + 4 * calls.dscores_word
        self.scores(at["q"], at["k"], scores, stream)
        self.dprobabilities(at["dout"], at["v"], dscores, stream)
        if self.softmax is not None:
            self.softmax((), (scores, dscores, at["lse"], at["dlse"]), stream)
        for name, multiply, sum_up, matrix, other, word in (
            ("dv", self.dv, self.sum_dv, scores, "dout", calls.dv_parts_word),
            ("dk", self.dk, self.sum_dk, dscores, "q", calls.dk_parts_word),
        ):
            if sum_up is None:
                multiply(matrix, at[other], at[name], stream)
            else:
                parts = workspace + 4 * word
                multiply(matrix, at[other], parts, stream)
                sum_up((), (parts, at[name]), stream)
        self.dq(dscores, at["k"], at["dq"], stream)


def load_standard_steps(
    configs: StandardBackwardConfigs, calls: StandardBackward, arch: str
) -> StandardSteps:
    """Compile and load on the current device."""
    cublas.prepare()
    return StandardSteps(
        calls,
        scores=cublas.Multiplier(calls.scores),
        dprobabilities=cublas.Multiplier(calls.dprobabilities),
        softmax=launcher.load(configs.softmax, calls.softmax, arch, addresses=4),
        dq=cublas.Multiplier(calls.dq),
        dk=cublas.Multiplier(calls.dk),
        dv=cublas.Multiplier(calls.dv),
        sum_dk=launcher.load(configs.sum_dk, calls.sum_dk, arch, addresses=2),
        sum_dv=launcher.load(configs.sum_dv, calls.sum_dv, arch, addresses=2),
    )
