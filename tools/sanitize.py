"""Small calls of one family, forward and backward, for compute-sanitizer to watch.

    compute-sanitizer --tool racecheck python tools/sanitize.py FAMILY [HEAD_DIM ...]

FAMILY is a value of ``algorithm=``. Arrays come from cudaMalloc, not from CuPy's pool, so that memcheck sees
where each ends.
"""

import sys

import cupy as cp

import cuflash


def call(algorithm: str, head_dim: int, causal: bool, deterministic: bool) -> None:
    def random(seqlen: int, heads: int) -> cp.ndarray:
        return cp.random.standard_normal((1, seqlen, heads, head_dim), cp.float32).astype(cp.float16)

    q, k, v, dout = random(200, 2), random(300, 1), random(300, 1), random(200, 2)
    options = {"causal": causal, "algorithm": algorithm}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=deterministic, **options)


def main(algorithm: str, *head_dims: str) -> None:
    cp.cuda.set_allocator(None)
    for head_dim in map(int, head_dims or (64, 128)):
        for causal in (False, True):
            for deterministic in (False, True):
                call(algorithm, head_dim, causal, deterministic)
                cp.cuda.Device().synchronize()
                print(f"{algorithm}, head dim {head_dim}, {causal=}, {deterministic=}: ran", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
