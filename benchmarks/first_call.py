"""Child process of the host benchmark: the time of this process's first call, in ms, on stdout.

python -m benchmarks.first_call '{"head_dim": 64, ...}' fa2      the fields of a Workload, the algorithm
"""

from __future__ import annotations

import json
import sys
import time

import cupy

import cuflash
from benchmarks.host import random_inputs
from benchmarks.workload import Workload


def main(fields: str, algorithm: str) -> None:
    """Imports, CUDA's context and the arrays come first: they are not what a cache of kernels can shorten."""
    q, k, v = random_inputs(Workload(**json.loads(fields)))
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    cuflash.attention(q, k, v, algorithm=algorithm)
    cupy.cuda.Device().synchronize()
    print((time.perf_counter() - start) * 1e3)


if __name__ == "__main__":
    main(*sys.argv[1:])
