"""JAX: ``merge_attention`` in JAX's own operations, which XLA fuses into a kernel or two on any device.

So it works wherever JAX does: under jit, grad, vmap, shard_map, on arrays that are spread over devices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cuflash.arrays.jax import JaxAvals
from cuflash.checks_merge import check_merge, named_parts

Arrays = tuple[Any, ...]


def merge(outs: list[Any], lses: list[Any], layout: str) -> tuple[Any, Any]:
    """``cuflash.merge_attention`` of JAX arrays, traced or not."""
    for name, x in named_parts(outs, lses).items():
        if not isinstance(x, jax.core.Tracer) and x.is_deleted():
            raise ValueError(f"{name} is a JAX array that was deleted or donated")
        if not isinstance(x.dtype, np.dtype):  # PRNG keys
            raise TypeError(f"{name} has dtype {x.dtype}; merge_attention takes floating point arrays")
    check_merge(JaxAvals(None), outs, lses, layout)
    return _compiled(tuple(outs), tuple(lses), layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _merge(outs: Arrays, lses: Arrays, layout: str) -> tuple[Any, Any]:
    stacked = jnp.stack(lses)
    largest = stacked.max(0)
    offset = jnp.where(largest == -jnp.inf, 0, largest)
    weights = jnp.exp(stacked - offset)
    total = weights.sum(0)
    divisor = jnp.where(total == 0, 1, total)
    acc = jnp.zeros(outs[0].shape, total.dtype)
    for part, lse, weight in zip(outs, lses, weights, strict=True):
        seen = _by_row(lse != -jnp.inf, layout)
        acc += jnp.where(seen, part.astype(acc.dtype), 0) * _by_row(weight, layout)
    out = (acc / _by_row(divisor, layout)).astype(outs[0].dtype)
    return out, jnp.where(total == 0, -jnp.inf, offset + jnp.log(divisor))


def _merge_fwd(outs: Arrays, lses: Arrays, layout: str) -> tuple[tuple[Any, Any], Any]:
    out, lse = _merge(outs, lses, layout)
    return (out, lse), (outs, lses, out, lse)


def _merge_bwd(layout: str, saved: Any, cotangents: tuple[Any, Any]) -> tuple[Arrays, Arrays]:
    """The closed form that ``cuflash.merge_attention`` documents."""
    outs, lses, out, lse = saved
    dout, dlse = cotangents
    dout_wide, out_wide = dout.astype(lse.dtype), out.astype(lse.dtype)
    douts, dlses = [], []
    for part, part_lse in zip(outs, lses, strict=True):
        seen = part_lse != -jnp.inf
        row_seen = _by_row(seen, layout)
        weight = jnp.where(seen, jnp.exp(jnp.where(seen, part_lse, 0) - jnp.where(seen, lse, 0)), 0)
        difference = jnp.where(row_seen, part.astype(lse.dtype), 0) - out_wide
        slope = (dout_wide * difference).sum(-1)
        slope = slope.swapaxes(-1, -2) if layout == "bshd" else slope
        douts.append(jnp.where(row_seen, _by_row(weight, layout) * dout_wide, 0).astype(part.dtype))
        dlses.append(jnp.where(seen, weight * (dlse + slope), 0))
    return tuple(douts), tuple(dlses)


_merge.defvjp(_merge_fwd, _merge_bwd)
_compiled = jax.jit(_merge, static_argnums=2)


def _by_row(lse: Any, layout: str) -> Any:
    return (lse.swapaxes(-1, -2) if layout == "bshd" else lse)[..., None]
