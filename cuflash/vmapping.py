"""vmap, for PyTorch and JAX: an axis that is mapped becomes part of the batch axis, the first in every array.

Operands that lack a batch axis, or have 1 there, get one; their gradients are summed over it again. ``xp`` is
``torch`` or ``jax.numpy``. Dropout and formulas are exceptions: they depend on the batch index, and a mapped
call must give what calls one by one give, so the adapters make them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuflash.modifiers import OPERAND_AXES


def merged(
    xp: Any,
    names: Sequence[str],
    arrays: Sequence[Any],
    axes: Sequence[int | None],
    size: int,
    wanted: Sequence[str] = (),
) -> list[Any]:
    """``arrays``, of which ``axes`` are mapped, with ``size`` times their batch; the first has q's."""
    batch = batch_of(arrays[0], axes[0])
    return [
        x
        if name not in wanted and axis is None and _serves_any_batch(name, x)
        else _merge(xp, x, axis, size, batch, OPERAND_AXES.get(name))
        for name, x, axis in zip(names, arrays, axes, strict=True)
    ]


def separated(xp: Any, x: Any, size: int, batch: int, shape: tuple[int, ...] | None = None) -> Any:
    """A result with the mapped axis first again; as a gradient of an array of ``shape``, if that is given."""
    x = xp.reshape(x, (size, batch, *x.shape[1:]))
    if shape is None or tuple(x.shape[1:]) == shape:
        return x
    return xp.reshape(x.sum(1), (size, *shape))


def batch_of(x: Any, axis: int | None) -> int:
    """The batch of an array like q, of which ``axis`` is mapped."""
    return x.shape[0 if axis is None or axis > 0 else 1]


def slice_shape(x: Any, axis: int | None) -> tuple[int, ...]:
    """The shape of each of the arrays that ``x`` is mapped over, or of ``x`` where it is not."""
    return tuple(size for i, size in enumerate(x.shape) if i != axis)


def _merge(xp: Any, x: Any, axis: int | None, size: int, batch: int, ndim: int | None) -> Any:
    x = xp.broadcast_to(x, (size, *x.shape)) if axis is None else xp.moveaxis(x, axis, 0)
    if x.ndim == ndim:  # one axis of which is the mapped one
        x = x[:, None]
    return xp.reshape(xp.broadcast_to(x, (size, batch, *x.shape[2:])), (size * batch, *x.shape[2:]))


def _serves_any_batch(name: str, x: Any) -> bool:
    if name not in OPERAND_AXES:
        return False
    return x.ndim < OPERAND_AXES[name] or (name in ("bias", "mask") and x.shape[0] == 1)
