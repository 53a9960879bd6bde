"""What modifiers cost: against the kernel without them, and against PyTorch's FlexAttention.

FlexAttention has no dropout: that is against the FlashAttention-2 of PyTorch's scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch

import cuflash
from benchmarks import timing
from benchmarks.peers import Inputs, Run, in_direction, prepare_peer, require_agreement, sdpa
from benchmarks.results import Row, significant
from benchmarks.speed import new_memory_is_nan, random_inputs
from benchmarks.timing import Timer
from benchmarks.workload import Workload, grid_point
from cuflash.philox import dropout_keep, kept_scale

TOPIC = "modifiers"
METHOD = (
    f"{timing.METHOD} ms: cuflash with the modifier; plain_ms: without it, with the same causal mask; peers: "
    "ms of compiled flex_attention (dynamic=False) with the same mask and formula. Forwards also give lse, "
    "as in training. A backward is cuflash.attention_backward with all its kernels; FlexAttention's is "
    "torch.autograd.grad through a forward that ran before. FlexAttention's block mask is made before, and "
    "so is the mask summary of cuflash, but where the row says otherwise. Peer fa2_sdpa: the "
    "FlashAttention-2 of PyTorch's scaled_dot_product_attention, with dropout. All must agree with a plain "
    "computation in float32 of one batch element and two of its heads; fa2_sdpa, whose draws are others, "
    "without its dropout."
)
PASSES = ("forward", "backward")

ScoreMod = Callable[..., Any]  # FlexAttention's: (score, b, h, q, kv)
MaskMod = Callable[..., Any]  # (b, h, q, kv)


@dataclass(frozen=True)
class Mods:
    """One modifier, as each library is given it."""

    # how it is given → the options of ``cuflash.attention_backward``; of ``attention`` all but bias_grad
    ours: dict[str, dict[str, Any]]
    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    by_batch: bool = False  # mask_mod depends on b
    sinks: Any = None  # which FlexAttention has not
    dropout: tuple[float, int] | None = None  # p and seed; nor this
    learnt: Sequence[Any] = ()  # what score_mod reads whose gradients a backward gives too
    plain: dict[str, Any] = field(default_factory=dict)  # the options without the modifier


@dataclass(frozen=True)
class Point:
    """One modifier at one shape."""

    case: str
    workload: Workload

    def __str__(self) -> str:
        return f"modifiers-{self.case}-d{self.workload.head_dim}-s{self.workload.seqlen}"


def points(cases: Iterable[str], shapes: Iterable[tuple[int, int]]) -> list[Point]:
    """Of (head_dim, seqlen) ``shapes``."""
    return [
        Point(case, grid_point(head_dim, seqlen, CASES[case].causal, direction="backward"))
        for (head_dim, seqlen), case in product(shapes, cases)
    ]


# --- the cases ----------------------------------------------------------------------------------------------


def _is_causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv <= q


def _causal(w: Workload, device: Any) -> Mods:
    return Mods({"causal": {"causal": True}}, mask_mod=_is_causal)


def _window(w: Workload, device: Any) -> Mods:
    left = w.seqlen // 8
    return Mods(
        {"window": {"causal": True, "window": (left, None)}},
        mask_mod=lambda b, h, q, kv: (kv <= q) & (q - kv <= left),
        plain={"causal": True},
    )


def _document(w: Workload, device: Any) -> Mods:
    """Eight documents of unequal length to a sequence, packed."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.rand(w.batch, 7, generator=generator).mul(w.seqlen).int().sort(1).values
    doc = torch.searchsorted(ends, torch.arange(w.seqlen).int().expand(w.batch, -1).contiguous(), right=True)
    doc = doc.int().to(device)
    given = {"causal": True, "mask_mod": "doc[b, q] == doc[b, kv]", "mod_args": {"doc": doc}}
    return Mods(
        {
            "mask_mod": {**given, "mask_summary": cuflash.MaskSummary()},
            "mask_mod, looked through in each call": given,
        },
        mask_mod=lambda b, h, q, kv: (kv <= q) & (doc[b, q] == doc[b, kv]),
        by_batch=True,
        plain={"causal": True},
    )


def _prefix(w: Workload, device: Any) -> Mods:
    prefix = torch.arange(1, w.batch + 1, device=device, dtype=torch.int32) * (w.seqlen // (2 * w.batch))
    given = {"mask_mod": "kv <= q || kv < prefix[b]", "mod_args": {"prefix": prefix}}
    return Mods(
        {"mask_mod": {**given, "mask_summary": cuflash.MaskSummary()}},
        mask_mod=lambda b, h, q, kv: (kv <= q) | (kv < prefix[b]),
        by_batch=True,
    )


def _alibi(w: Workload, device: Any) -> Mods:
    slopes = 2.0 ** (-8 * torch.arange(1.0, w.heads_q + 1, device=device) / w.heads_q)
    formula = {"score_mod": "score + slope[h] * (kv - q)", "mod_args": {"slope": slopes}}
    return Mods(
        {"alibi_slopes": {"causal": True, "alibi_slopes": slopes}, "score_mod": {"causal": True, **formula}},
        score_mod=lambda score, b, h, q, kv: score + slopes[h] * (kv - q),
        mask_mod=_is_causal,
        plain={"causal": True},
    )


def _softcap(w: Workload, device: Any) -> Mods:
    cap = 30.0
    formula = {"score_mod": "cap * tanh(score / cap)", "mod_args": {"cap": cap}}
    return Mods(
        {"softcap": {"causal": True, "softcap": cap}, "score_mod": {"causal": True, **formula}},
        score_mod=lambda score, b, h, q, kv: cap * torch.tanh(score / cap),
        mask_mod=_is_causal,
        plain={"causal": True},
    )


def _mask(w: Workload, device: Any) -> Mods:
    """Blocks of 128 by 128, of which a quarter is seen, and those of the diagonal: one for all heads."""
    size = min(128, w.seqlen // 8)
    blocks = torch.rand(w.seqlen // size, w.seqlen // size, generator=torch.Generator().manual_seed(3)) < 0.25
    blocks.fill_diagonal_(True)
    mask = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)[None, None].to(device)
    given = {"causal": True, "mask": mask}
    return Mods(
        {
            "mask": {**given, "mask_summary": cuflash.MaskSummary()},
            "mask, looked through in each call": given,
        },
        mask_mod=lambda b, h, q, kv: (kv <= q) & mask[0, 0, q, kv],
        plain={"causal": True},
    )


def _bias(w: Workload, device: Any) -> Mods:
    """One for all batch elements, and fixed."""
    bias = _random_bias(w, device)
    return Mods(
        {"bias": {"bias": bias, "bias_grad": False}},
        score_mod=lambda score, b, h, q, kv: score + bias[0, h, q, kv],
    )


def _learnt_bias(w: Workload, device: Any) -> Mods:
    """The same, and its gradient is of its shape: summed over the batch."""
    bias = _random_bias(w, device)
    leaf = bias.detach().requires_grad_()
    return Mods(
        {"bias": {"bias": bias}},
        score_mod=lambda score, b, h, q, kv: score + leaf[0, h, q, kv],
        learnt=(leaf,),
    )


def _random_bias(w: Workload, device: Any) -> Any:
    generator = torch.Generator(device).manual_seed(2)
    shape = (1, w.heads_q, w.seqlen, w.seqlen)
    return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, w.dtype))


def _padding(w: Workload, device: Any) -> Mods:
    """Sequences of all lengths up to the longest, which is the one that results are compared of."""
    lengths = torch.arange(1, w.batch + 1, device=device, dtype=torch.int32) * w.seqlen // w.batch
    return Mods(
        {"key_padding and query_padding": {"key_padding": lengths, "query_padding": lengths}},
        mask_mod=lambda b, h, q, kv: (kv < lengths[b]) & (q < lengths[b]),
        by_batch=True,
    )


def _sinks(w: Workload, device: Any) -> Mods:
    sinks = torch.linspace(-1, 1, w.heads_q, device=device)
    return Mods(
        {"sinks": {"causal": True, "sinks": sinks}}, mask_mod=_is_causal, sinks=sinks, plain={"causal": True}
    )


def _dropout(w: Workload, device: Any) -> Mods:
    p, seed = 0.1, 4
    return Mods(
        {"dropout_p": {"causal": True, "dropout_p": p, "seed": seed}},
        mask_mod=_is_causal,
        dropout=(p, seed),
        plain={"causal": True},
    )


@dataclass(frozen=True)
class Case:
    make: Callable[[Workload, Any], Mods]
    causal: bool


CASES = {
    "causal": Case(_causal, True),
    "window": Case(_window, True),
    "document": Case(_document, True),
    "prefix-LM": Case(_prefix, False),
    "ALiBi": Case(_alibi, True),
    "softcap": Case(_softcap, True),
    "mask": Case(_mask, True),
    "bias": Case(_bias, False),
    "learnt-bias": Case(_learnt_bias, False),
    "padding": Case(_padding, False),
    "sinks": Case(_sinks, True),
    "dropout": Case(_dropout, True),
}


# --- what is right ------------------------------------------------------------------------------------------


def reference(inputs: Inputs, mods: Mods) -> tuple[Any, tuple[Any, ...]]:
    """Out and the gradients of q, k and v, in float32, of what ``_slice`` takes."""
    q, k, v, dout = (_slice(x).float() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    batch, seqlen = inputs.q.shape[0] - 1, q.shape[1]
    positions = torch.arange(seqlen, device=q.device)
    index = positions[:, None], positions
    outs, gradients = [], []
    for i, head in enumerate(_heads(inputs.q)):
        leaves = [x[0, :, i].detach().requires_grad_() for x in (q, k, v)]
        score = leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5
        if mods.score_mod is not None:
            score = mods.score_mod(score, batch, head, *index)
        if mods.mask_mod is not None:
            score = score.masked_fill(~mods.mask_mod(batch, head, *index), float("-inf"))
        if mods.sinks is not None:
            score = torch.cat([score, mods.sinks[head].expand(seqlen, 1)], 1)
        probability = score.softmax(1)[:, :seqlen]
        if mods.dropout is not None:
            p, seed = mods.dropout
            kept = dropout_keep(p, seed, batch, head, slice(0, seqlen), slice(0, seqlen))
            probability = probability * torch.from_numpy(kept).to(q.device) * kept_scale(p)
        out = probability @ leaves[2]
        outs.append(out.detach())
        gradients.append(torch.autograd.grad(out, leaves, dout[0, :, i]))
    of_heads = zip(*gradients, strict=True)
    return torch.stack(outs, 1)[None], tuple(torch.stack(x, 1)[None] for x in of_heads)


def _heads(x: Any) -> list[int]:
    return [0, x.shape[2] - 1]


def _slice(x: Any) -> Any:
    """The last batch element's first and last head: a score matrix of all would not fit."""
    return x[-1:, :, _heads(x)].detach()


def _require(name: str, result: Any, expected: Any) -> float:
    if isinstance(expected, tuple):
        return require_agreement(name, tuple(_slice(x) for x in result[:3]), expected)
    return require_agreement(name, _slice(result), expected)


# --- what takes turns ---------------------------------------------------------------------------------------


def measure(point: Point, algorithms: Sequence[str], *, budget_ms: float) -> list[Row]:
    """A results row for each pass, kernel family and way of giving the modifier; raises if cuflash is wrong.

    All that compute the same pass take turns, peers too.
    """
    inputs = random_inputs(point.workload)
    mods = CASES[point.case].make(point.workload, inputs.q.device)
    expected = dict(zip(PASSES, reference(inputs, mods), strict=True))
    theirs, errors = _peer_runs(inputs, mods, expected)
    rows = []
    for name in PASSES:
        given = {
            f"{algorithm} {label}": (algorithm, label) for algorithm, label in product(algorithms, mods.ours)
        }
        runs, row_errors = {}, {}
        for turn, (algorithm, label) in given.items():
            runs[turn] = _our_run(inputs, mods.ours[label], algorithm, name)
            with new_memory_is_nan():
                row_errors[turn] = _require(f"cuflash {label}", runs[turn](), expected[name])
        plain = {f"{ours} plain": _our_run(inputs, mods.plain, ours, name) for ours in algorithms}
        for run in plain.values():
            run()
        free_memory()
        ms = Timer().sustained({**plain, **runs, **theirs[name]}, budget_ms)
        rows += [
            {
                "family": _family(inputs, mods.ours[label], algorithm, name),
                "direction": "modifiers",
                **point.workload.fields(),
                "features": {"modifier": point.case, "given as": label, "pass": name},
                "ms": significant(ms[turn]),
                "plain_ms": significant(ms[f"{algorithm} plain"]),
                "peers": {peer: significant(ms[peer]) for peer in theirs[name]},
                "peer_errors": errors[name],
                "row_error": significant(row_errors[turn]),
            }
            for turn, (algorithm, label) in given.items()
        ]
    return rows


def free_memory() -> None:
    """What the reference and compilers leave in PyTorch's pool."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _our_run(inputs: Inputs, options: dict[str, Any], algorithm: str, name: str) -> Run:
    q, k, v = inputs.q, inputs.k, inputs.v
    given = {**_of_forward(options), "algorithm": algorithm, "return_lse": True}
    if name == "forward":
        return lambda: cuflash.attention(q, k, v, **given)[0]
    out, lse = cuflash.attention(q, k, v, **given)
    given = {**options, "algorithm": algorithm}
    return lambda: cuflash.attention_backward(inputs.dout, q, k, v, out, lse, **given)


def _of_forward(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in options.items() if name != "bias_grad"}


def _family(inputs: Inputs, options: dict[str, Any], algorithm: str, name: str) -> str:
    explanation = cuflash.explain(inputs.q, inputs.k, inputs.v, algorithm=algorithm, **_of_forward(options))
    return explanation.family if name == "forward" else explanation.backward.split()[0]


def _peer_runs(
    inputs: Inputs, mods: Mods, expected: dict[str, Any]
) -> tuple[dict[str, dict[str, Run]], dict[str, dict[str, str]]]:
    """Of each pass, the peers' runs, and for each of the others why there is none."""
    runs: dict[str, dict[str, Run]] = {}
    errors: dict[str, dict[str, str]] = {}
    flex = _flex(inputs, mods)  # one compilation serves both passes
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    for name in PASSES:
        of_pass = inputs if name == "backward" else replace(inputs, q=q, k=k, v=v, dout=None)
        made: dict[str, Run | str]
        if mods.sinks is not None:
            made = {"flex": "FlexAttention has no sinks"}
        elif mods.dropout is not None:
            without = dict(zip(PASSES, reference(inputs, replace(mods, dropout=None)), strict=True))
            made = {
                "flex": "FlexAttention has no dropout",
                "fa2_sdpa": _with_dropout(mods.dropout[0], of_pass, without[name]),
            }
        else:
            made = {"flex": _checked("flex", flex, of_pass, expected[name], mods.learnt)}
        runs[name] = {peer: run for peer, run in made.items() if not isinstance(run, str)}
        errors[name] = {peer: why for peer, why in made.items() if isinstance(why, str)}
    return runs, errors


def _checked(
    name: str, prepare: Callable[[Inputs], Run], of_pass: Inputs, expected: Any, learnt: Sequence[Any] = ()
) -> Run | str:
    run = partial(in_direction, prepare, of_pass, learnt)
    return prepare_peer(run, partial(_require, name, expected=expected))


def _with_dropout(p: float, of_pass: Inputs, expected: Any) -> Run | str:
    """SDPA's FlashAttention-2 with dropout, whose draws are others: without dropout it must be right."""
    checked = _checked("fa2_sdpa", sdpa("FLASH_ATTENTION"), of_pass, expected)
    if isinstance(checked, str):
        return checked
    return prepare_peer(partial(in_direction, sdpa("FLASH_ATTENTION", p), of_pass), lambda result: 0.0)


def _flex(inputs: Inputs, mods: Mods) -> Callable[[Inputs], Run]:
    made: list[Any] = []  # the compiled function and the block mask, which both passes share

    def prepare(of_pass: Inputs) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not made:
            torch._dynamo.reset()  # of one function few specialisations are kept
            block_mask = None
            if mods.mask_mod is not None:
                batch, seqlen, *_ = inputs.q.shape
                size = batch if mods.by_batch else None
                block_mask = create_block_mask(
                    mods.mask_mod, size, None, seqlen, seqlen, device=inputs.q.device
                )
            made[:] = torch.compile(flex_attention, dynamic=False), block_mask
        attend, block_mask = made

        def run() -> Any:
            out = attend(*of_pass.bhsd(), score_mod=mods.score_mod, block_mask=block_mask)
            return out.transpose(1, 2)

        return run

    return prepare
