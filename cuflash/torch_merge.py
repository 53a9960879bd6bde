"""PyTorch: ``merge_attention`` under autograd, torch.compile and torch.func.

Where only autograd looks on, and in a compiled graph, the merge is that of ``cuflash.merge``; its backward is
the closed form in PyTorch's operations, which torch.compile fuses. torch.func sees nothing but operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cuflash import arrays
from cuflash import merge as untraced
from cuflash.arrays.torch import FakeTensors
from cuflash.checks_merge import check_merge, lse_shape

_FAKE = FakeTensors()


def is_tracked(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> bool:
    """Whether PyTorch differentiates or traces this call."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(x.requires_grad for x in (*outs, *lses)))
        or torch._C._are_functorch_transforms_active()
    )


def merge(outs: list[Tensor], lses: list[Tensor], layout: str) -> tuple[Tensor, Tensor]:
    """``cuflash.merge_attention`` with gradients."""
    if torch.compiler.is_compiling():
        return merge_attention(outs, lses, layout)  # whose fake implementation checks
    check_merge(_FAKE, outs, lses, layout)
    if torch._C._are_functorch_transforms_active():
        return _in_operations(outs, lses, layout)
    return _Merge.apply(layout, *outs, *lses)


@torch.library.custom_op("cuflash::merge_attention", mutates_args=())
def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor], layout: str) -> tuple[Tensor, Tensor]:
    """Return out and lse."""
    return untraced.merge(arrays.TORCH, outs, lses, layout)


@merge_attention.register_fake
def _(outs: Sequence[Tensor], lses: Sequence[Tensor], layout: str) -> tuple[Tensor, Tensor]:
    check_merge(_FAKE, outs, lses, layout)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lse_shape(tuple(outs[0].shape), layout))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, lses, ctx.layout = inputs
    ctx.save_for_backward(*output, *outs, *lses)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    out, lse, *parts = ctx.saved_tensors
    count = len(parts) // 2
    douts, dlses = _gradients(dout, dlse, out, lse, parts[:count], parts[count:], ctx.layout)
    return douts, dlses, None


merge_attention.register_autograd(_differentiate, setup_context=_save)


class _Merge(torch.autograd.Function):
    """The same without the operator, whose dispatch takes longer."""

    @staticmethod
    def forward(ctx: Any, layout: str, *parts: Tensor) -> tuple[Tensor, Tensor]:
        count = len(parts) // 2
        outs, lses = parts[:count], parts[count:]
        result = untraced.merge(arrays.TORCH, outs, lses, layout)
        _save(ctx, (outs, lses, layout), result)
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        douts, dlses, _ = _differentiate(ctx, dout, dlse)
        return None, *douts, *dlses


def _gradients(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    layout: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """The closed form that ``cuflash.merge_attention`` documents."""
    dout_wide, out_wide = dout.to(lse.dtype), out.to(lse.dtype)
    douts, dlses = [], []
    for part, part_lse in zip(outs, lses, strict=True):
        blind = part_lse == -torch.inf
        weight = torch.where(blind, 0, part_lse - torch.where(blind, 0, lse)).exp().masked_fill(blind, 0)
        row_weight, row_blind = _by_row(weight, layout), _by_row(blind, layout)
        difference = torch.where(row_blind, 0, part.to(lse.dtype)) - out_wide
        slope = _by_lse((dout_wide * difference).sum(-1), layout)
        douts.append((row_weight * dout_wide).masked_fill(row_blind, 0).to(part.dtype))
        dlses.append((weight * (dlse + slope)).masked_fill(blind, 0))
    return douts, dlses


def _in_operations(outs: Sequence[Tensor], lses: Sequence[Tensor], layout: str) -> tuple[Tensor, Tensor]:
    """The merge in operations that every transform knows, with finite gradients where a row saw no key."""
    stacked = torch.stack(list(lses))
    blind = stacked == -torch.inf
    finite = stacked.masked_fill(blind, 0)
    largest = stacked.detach().amax(0)
    nobody = largest == -torch.inf
    weights = (finite - largest.masked_fill(nobody, 0)).exp().masked_fill(blind, 0)
    total = weights.sum(0).masked_fill(nobody, 1)
    lse = (largest.masked_fill(nobody, 0) + total.log()).masked_fill(nobody, -torch.inf)
    parts = [
        part.to(lse.dtype).masked_fill(_by_row(unseen, layout), 0) * _by_row(weight / total, layout)
        for part, weight, unseen in zip(outs, weights, blind, strict=True)
    ]
    return torch.stack(parts).sum(0).to(outs[0].dtype), lse


def _by_row(lse: Tensor, layout: str) -> Tensor:
    return (lse.transpose(-1, -2) if layout == "bshd" else lse).unsqueeze(-1)


def _by_lse(rows: Tensor, layout: str) -> Tensor:
    return rows.transpose(-1, -2) if layout == "bshd" else rows
