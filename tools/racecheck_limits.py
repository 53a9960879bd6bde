"""What compute-sanitizer's racecheck takes for races that are none: three kernels and three controls.

    compute-sanitizer --tool racecheck python tools/racecheck_limits.py NAME

On an H100 (CUDA 13.0, 2026-11-23) racecheck reported nothing for the kernel "pair", one hazard each for
"two pairs" and "slot", whose results were right, and one for "race", whose was not. "Two pairs" is how the
halves of fa2/backward.cu pass P and dS; the emulator, which knows that order, checks them in CI. "Slot" is
why every thread of the Hopper kernels arrives for itself where it could be one lane, behind __syncwarp.
It reported one or two for "groups", whose results were right, nothing for "even groups", whose warps all pass
barriers equally often: so do those of decode/attention.cu.

PTX orders all but the last: bar.sync after the bar.arrive of others ("producer-consumer model", PTX ISA,
barrier{.cta}), an mbarrier's release of what __syncwarp ordered before it, and __syncthreads, whatever other
barriers some of the warps have passed.
"""

import sys

import cupy as cp

PRELUDE = r"""
#define BAR_SYNC(id) asm volatile("bar.sync %0, 256;" :: "r"(id) : "memory")
#define BAR_ARRIVE(id) asm volatile("bar.arrive %0, 256;" :: "r"(id) : "memory")
__device__ unsigned at(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
__device__ void init(unsigned long long* b, int n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at(b)), "r"(n) : "memory");
}
__device__ void arrive(unsigned long long* b) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" :: "r"(at(b)) : "memory");
}
__device__ void wait(unsigned long long* b, int parity) {
  unsigned done;
  do {
    asm volatile("{.reg .pred p;\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(at(b)), "r"(parity) : "memory");
  } while (!done);
}
extern "C" __global__ void kernel(int* y) {
  __shared__ int s[128];
  __shared__ unsigned long long full, empty;
  const int i = threadIdx.x % 128, other = (i + 37) % 128;
  const bool producer = threadIdx.x < 128;
"""

# Four groups of two warps, each with a barrier of its own, write and read by turns; then all with all.
GROUPS = """
  __shared__ int t[2][256];
  const int group = threadIdx.x / 64, neighbour = group * 64 + (threadIdx.x + 37) %% 64, turns = %s;
  int sum = 0;
  for (int turn = 0; turn < turns; ++turn) {
    t[turn %% 2][threadIdx.x] = threadIdx.x;
    asm volatile("bar.sync %%0, 64;" :: "r"(3 + group) : "memory");
    sum += t[turn %% 2][neighbour];
  }
  __syncthreads();
  t[0][(threadIdx.x + 64) %% 256] = t[1][(threadIdx.x + 64) %% 256] = sum;
  __syncthreads();
  if (producer) y[i] = t[0][threadIdx.x] + t[1][threadIdx.x + 128];"""

BODIES = {
    "pair": """
  if (producer) { s[i] = i; BAR_ARRIVE(1); } else { BAR_SYNC(1); y[i] = s[other]; }""",
    "two pairs": """
  if (producer) { s[i] = i; BAR_ARRIVE(1); BAR_SYNC(2); s[i] = 2 * i; BAR_ARRIVE(1); }
  else { BAR_SYNC(1); y[i] = s[other]; BAR_ARRIVE(2); BAR_SYNC(1); y[i] += s[other]; }""",
    "slot": """
  if (threadIdx.x == 0) { init(&full, 1); init(&empty, 4); }
  __syncthreads();
  if (threadIdx.x == 0) { s[0] = 7; arrive(&full); wait(&empty, 0); s[0] = 8; arrive(&full); }
  else if (!producer) {
    wait(&full, 0);
    y[i] = s[0];
    __syncwarp();
    if (i % 32 == 0) arrive(&empty);
    wait(&full, 1);
    y[i] += s[0];
  }""",
    "groups": GROUPS % "group % 2 ? 3 : 2",
    "even groups": GROUPS % "3",
    "race": """
  if (producer) s[i] = i; else y[i] = s[other];""",
}
SUMS = {"pair": 8128, "two pairs": 3 * 8128, "slot": 15 * 128, "groups": 85696, "even groups": 97920}


def main(name: str) -> None:
    y = cp.zeros(128, cp.int32)
    cp.RawKernel(PRELUDE + BODIES[name] + "\n}", "kernel")((1,), (256,), (y,))
    total = int(y.sum())
    print(f"{name}: {total}, {'right' if total == SUMS.get(name) else 'wrong'}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
