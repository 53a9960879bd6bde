"""Plans of GPU calls, kept by all that they depend on: shapes, strides, dtypes, alignment, options."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from cuflash.arrays import GpuArrays

# A plan is a few KB. Growing sequences (decoding) make a new one every step, so the number is bounded.
# Starting afresh costs each live signature one slow call; keeping the plans in order of use, every call.
_MAX_PLANS = 4096

Plan = TypeVar("Plan")


class Plans(Generic[Plan]):
    """The plans of one public function, made at the first call of each signature."""

    def __init__(
        self, check: Callable[[GpuArrays, dict[str, Any], Any], Any], make: Callable[[Any, Any], Plan]
    ) -> None:
        """``check(gpu, arrays, options)``: the request, or an error; ``make(request, options)``: its plan."""
        self._check, self._make = check, make
        self._kept: dict[Hashable, Plan] = {}

    def find(self, gpu: GpuArrays, arrays: dict[str, Any], options: Any, *more: Hashable) -> Plan:
        """That of a call with ``arrays`` by argument name, a NamedTuple of options, and what else counts."""
        signature = gpu.signature
        try:
            # 1 == True == 1.0, but not all of them are allowed everywhere.
            key = (options, *map(type, options), *more, *[(name, signature(x)) for name, x in arrays.items()])
            plan = self._kept.get(key)
        except (RuntimeError, TypeError):
            self._check(gpu, arrays, options)  # names what has no address or cannot be hashed
            raise
        return self.add(key, gpu, arrays, options) if plan is None else plan

    def get(self, key: Hashable) -> Plan | None:
        """That of a call whose ``key`` is made up elsewhere."""
        return self._kept.get(key)

    def add(self, key: Hashable, gpu: GpuArrays, arrays: dict[str, Any], options: Any) -> Plan:
        """Check the call, make its plan and keep it."""
        plan = self._make(self._check(gpu, arrays, options), options)
        if len(self._kept) >= _MAX_PLANS:
            self._kept.clear()
        self._kept[key] = plan
        return plan

    def __len__(self) -> int:
        return len(self._kept)
