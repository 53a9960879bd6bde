"""The Hopper kernel with a Config and a grid of the test's choice, by the package's own host functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numerics import Inputs, assert_within_contract

from cuflash import jit, launch, launch_hopper, reference
from cuflash.config_hopper import HopperConfig, choose_hopper, why_not
from cuflash.problem import Problem
from cuflash.tensor_map import Encoder
from emulator.session import Emulator

_L2_BYTES = 1 << 20


def attend(
    session: Emulator,
    problem: Problem,
    q: Any,
    k: Any,
    v: Any,
    *,
    config: HopperConfig | None = None,
    multiprocessors: int = 3,
) -> tuple[Any, Any]:
    """out and lse of emulated arrays, computed by hopper/forward.cu."""
    assert why_not(problem, (9, 0)) is None
    cp = session.cp
    config = config or choose_hopper(problem, multiprocessors)
    out = cp.empty((*q.shape[:3], v.shape[3]), q.dtype)
    lse = cp.empty((problem.batch, problem.heads_q, problem.seqlen_q), np.float32)
    counter = cp.zeros(1, np.uint32)
    call = launch_hopper.hopper_forward_call(
        problem,
        config,
        *(launch.Operand(x.shape, x.strides) for x in (q, k, v, out)),
        layout="bshd",
        multiprocessors=multiprocessors,
        l2_bytes=_L2_BYTES,
    )
    encoded = [Encoder(m)(x.data.ptr).value for m, x in zip(call.maps, (q, k, v, out), strict=True)]
    function = jit.load(jit.compile(config, "sm_90a"), call.shared_bytes)
    function(
        call.grid, call.block, (*encoded, lse.data.ptr, counter.data.ptr, call.params), call.shared_bytes
    )
    assert counter[0] == 0
    return out, lse


def check_hopper(session: Emulator, problem: Problem, inputs: Inputs, **options: Any) -> None:
    """Run the kernel on ``inputs`` and hold out and lse to the contract."""
    out, lse = attend(session, problem, *(session.cp.asarray(x) for x in inputs[:3]), **options)
    masks: dict[str, Any] = {"causal_offset": problem.causal_offset, "scale": problem.scale}
    expected = reference.attention(*inputs[:3], **masks)
    standard = reference.standard_attention(*inputs[:3], **masks)
    assert_within_contract(out.get(), expected[0], standard[0], "out")
    assert_within_contract(lse.get(), expected[1], standard[1], "lse")
