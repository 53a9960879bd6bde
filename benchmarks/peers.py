"""What cuflash is compared with, each run only where it can be imported and can do the problem.

Nothing is imported before a peer is prepared: a missing library is then one more reason in ``peer_errors``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

# Largest ‖out − expected‖ / ‖expected‖ allowed in any row of the output. Two right kernels differ by their
# roundings to bfloat16, about 0.005; one that drops 64 keys out of 16384 is off by 0.06.
ROW_TOLERANCE = 0.02
# Of a gradient that many rows are taken together. One alone may be a small difference of large numbers: the
# first of dq under a causal mask is 0 but for roundings.
GRADIENT_ROWS = 64

Run = Callable[[], Any]  # returns the output, or the gradients of q, k and v


@dataclass(frozen=True)
class Inputs:
    """torch tensors (batch, seqlen, heads, head_dim) on the GPU, and the mask; dout asks for the backward."""

    q: Any
    k: Any
    v: Any
    causal: bool
    dout: Any = None

    def bhsd(self) -> tuple[Any, Any, Any]:
        """Views with the axes in the order SDPA takes them; nothing is copied."""
        return self.q.transpose(1, 2), self.k.transpose(1, 2), self.v.transpose(1, 2)

    @property
    def is_grouped(self) -> bool:
        return self.q.shape[2] != self.k.shape[2]


@dataclass(frozen=True)
class Peer:
    """``prepare`` returns the forward to time; whatever it raises is the reason the peer is absent."""

    label: str
    prepare: Callable[[Inputs], Run]


def reference(inputs: Inputs) -> Any:
    """SDPA's answer by whichever backend PyTorch picks: what every timed function must agree with."""
    return in_direction(sdpa(None), inputs)()


def in_direction(prepare: Callable[[Inputs], Run], inputs: Inputs, learnt: Sequence[Any] = ()) -> Run:
    """The forward that ``prepare`` makes, or its backward where ``inputs`` ask for that.

    The gradients are of q, k, v and the leaves ``learnt``.

    The backward is run by autograd, not by each library's own operator: it is the call that users make, and
    it launches the same kernels and no more. What autograd adds is host time, which ``Timer`` leaves out.
    """
    if inputs.dout is None:
        return prepare(inputs)
    from torch.autograd import grad

    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = prepare(replace(inputs, q=q, k=k, v=v))()
    return lambda: grad(out, (q, k, v, *learnt), inputs.dout, retain_graph=True)


def row_error(out: Any, expected: Any, rows: int = 1) -> float:
    """The largest relative error of an output row, or of up to ``rows`` together; NaN if any element is NaN.

    By row, because late rows are averages of many values and small: one bound for all elements would pass a
    kernel that gets every late row wrong.
    """
    together = math.gcd(rows, expected.shape[1])

    def norms(x: Any) -> Any:
        return x.norm(dim=-1).unflatten(1, (-1, together)).norm(dim=2)

    expected = expected.float()
    return float((norms(out.float() - expected) / norms(expected)).max())


def require_agreement(name: str, result: Any, expected: Any) -> float:
    """The largest row error of the output or, where ``expected`` is a tuple, of the gradients.

    Raises if one is too large or NaN, because a wrong answer must never yield a figure.
    """
    if isinstance(expected, tuple):
        parts = zip(("dq", "dk", "dv"), result, expected, strict=True)
        errors = {f"{name}'s {part}": row_error(x, y, GRADIENT_ROWS) for part, x, y in parts}
    else:
        errors = {name: row_error(result, expected)}
    for what, error in errors.items():
        if not error <= ROW_TOLERANCE:
            raise ArithmeticError(f"{what} is wrong: a row is off by {error:.3g}, more than {ROW_TOLERANCE}")
    return max(errors.values())


def prepare_peers(
    names: Iterable[str], inputs: Inputs, expected: Any
) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers that ran the problem once and agreed, and for each of the others the reason it is absent."""
    runs: dict[str, Run] = {}
    errors: dict[str, str] = {}
    for name in names:
        made = prepare_peer(
            partial(in_direction, PEERS[name].prepare, inputs),
            partial(require_agreement, name, expected=expected),
        )
        if isinstance(made, str):
            errors[name] = made
        else:
            runs[name] = made
    return runs, errors


def prepare_peer(prepare: Callable[[], Run], require: Callable[[Any], float]) -> Run | str:
    """What ``prepare`` returns, once it ran and its result passed ``require``, or why there is no such."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = prepare()
            require(run())
        except Exception as error:  # anything at all may be wrong with another library
            return reason(error, [str(warning.message) for warning in caught])
    return run


def reason(error: Exception, notes: Sequence[str] = ()) -> str:
    """One line; SDPA says in warnings, not in its error, why a backend refuses a problem."""
    lines = [f"{type(error).__name__}: {error}".splitlines()[0]]
    lines += [note.split(" (Triggered internally")[0] for note in notes]
    return "; ".join(dict.fromkeys(lines))[:400]


def sdpa(backend: str | None, dropout_p: float = 0.0) -> Callable[[Inputs], Run]:
    """One backend of torch.nn.functional.scaled_dot_product_attention; None: the one that PyTorch picks."""

    def prepare(inputs: Inputs) -> Run:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = inputs.bhsd()
        chosen = nullcontext if backend is None else partial(sdpa_kernel, getattr(SDPBackend, backend))

        def run() -> Any:
            with chosen():
                out = scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout_p, is_causal=inputs.causal, enable_gqa=inputs.is_grouped
                )
            return out.transpose(1, 2)

        return run

    return prepare


class DoesNotFitError(MemoryError):
    """The score matrices that standard attention keeps do not fit in the GPU's memory."""


def require_memory(inputs: Inputs, bytes_a_score: int) -> None:
    """Refuse, before it is tried, what keeps so many bytes for every query, key and head."""
    import torch

    torch.cuda.empty_cache()
    batch, seqlen, heads, _ = inputs.q.shape
    needed = bytes_a_score * batch * heads * seqlen * seqlen
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        raise DoesNotFitError(f"its score matrices need about {needed >> 30} GiB, {free >> 30} GiB are free")


def _standard(inputs: Inputs) -> Run:
    """SDPA's math backend, which keeps float32 scores: three copies at a forward's peak, six in training."""
    require_memory(inputs, 12 if inputs.dout is None else 24)
    return sdpa("MATH")(inputs)


def _eager(inputs: Inputs) -> Run:
    """Attention as models without a fused kernel write it, in the input dtype; autograd keeps the scores.

    At its peak it holds three 16-bit copies of them, in training six and masks of a byte.
    """
    import torch

    require_memory(inputs, 6 if inputs.dout is None else 14)
    seqlen, group = inputs.q.shape[1], inputs.q.shape[2] // inputs.k.shape[2]
    hidden = None
    if inputs.causal:
        hidden = torch.ones(seqlen, seqlen, dtype=torch.bool, device=inputs.q.device).triu(1)

    def run() -> Any:
        q, k, v = inputs.bhsd()
        if group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return run


def _family(algorithm: str) -> Callable[[Inputs], Run]:
    """One of our own kernel families, beside the one that a benchmark is of."""

    def prepare(inputs: Inputs) -> Run:
        import cuflash

        if algorithm == "standard":
            require_memory(inputs, standard_bytes_a_score(inputs))
        return lambda: cuflash.attention(
            inputs.q, inputs.k, inputs.v, causal=inputs.causal, algorithm=algorithm
        )

    return prepare


def standard_bytes_a_score(inputs: Inputs) -> int:
    """What ``algorithm="standard"`` keeps: S, which becomes P; in a backward also dP, which becomes dS."""
    return 2 if inputs.dout is None else 4


def _fa3(inputs: Inputs) -> Run:
    import flash_attn_interface

    return lambda: _first(flash_attn_interface.flash_attn_func(*_qkv(inputs), causal=inputs.causal))


def _fa4(inputs: Inputs) -> Run:
    """Its first call compiles, once for each head dimension, mask, dtype and group, whatever the length."""
    from flash_attn.cute import flash_attn_func

    return lambda: _first(flash_attn_func(*_qkv(inputs), causal=inputs.causal))


def _qkv(inputs: Inputs) -> tuple[Any, Any, Any]:
    return inputs.q, inputs.k, inputs.v


def _first(result: Any) -> Any:
    """FlashAttention returns (out, lse) in some versions and out in others."""
    return result[0] if isinstance(result, tuple) else result


PEERS = {
    "fa2_sdpa": Peer("FA2 (SDPA)", sdpa("FLASH_ATTENTION")),
    "cudnn": Peer("cuDNN", sdpa("CUDNN_ATTENTION")),
    "efficient": Peer("SDPA efficient", sdpa("EFFICIENT_ATTENTION")),
    "standard": Peer("SDPA math", _standard),
    "eager": Peer("PyTorch eager", _eager),
    "fa3": Peer("FA3", _fa3),
    "fa4": Peer("FA4", _fa4),
    "our_hopper": Peer("cuflash hopper", _family("hopper")),
    "our_fa2": Peer("cuflash fa2", _family("fa2")),
    "our_fa1": Peer("cuflash fa1", _family("fa1")),
    "our_standard": Peer("cuflash standard", _family("standard")),
}
DEFAULT_PEERS = ("fa2_sdpa", "cudnn")
