"""Clusters on kernels of a few lines: what is right, and each fault by itself."""
# ruff: noqa: E501 - a mutation is easiest to compare with its source unwrapped

from __future__ import annotations

import numpy as np
import pytest

from emulator import KernelFault, toolchain
from emulator.test_checks import run

# Each block of a pair fills the 1024 bytes at 1024 with its number, warp by warp, and copies them to the other one's 2048,
# whose mbarrier at 0 counts them. Everybody copies what came to y, and arrives at the sender's mbarrier at 8, which waits
# for it: what it sent has arrived.
EXCHANGE = """(int* y) {
  DYN_SMEM(s);
  const unsigned base = cvta_to_shared(s), rank = cluster_ctarank(), peer = rank ^ 1;
  if (threadIdx.x == 0) {
    mbarrier_init(base, 1);
    mbarrier_init(base + 8, 64);
    fence_mbarrier_init();
  }
  barrier_cluster_arrive_relaxed();
  barrier_cluster_wait();
  for (int i = threadIdx.x; i < 256; i += 64) ((int*)(s + 1024))[i] = 1000 * blockIdx.x + i;
  fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(base, 1024);
    cp_async_bulk_shared(mapa(base + 2048, peer), base + 1024, 1024, mapa(base, peer));
  }
  mbarrier_wait(base, 0);
  for (int i = threadIdx.x; i < 256; i += 64) y[256 * blockIdx.x + i] = ((int*)(s + 2048))[i];
  mbarrier_arrive_cluster(mapa(base + 8, peer));
  mbarrier_wait(base + 8, 0);
  ((int*)(s + 1024))[threadIdx.x] = 0;
}"""


def exchange(emulated, body=EXCHANGE, **options):
    y = emulated.cp.zeros((6, 256), np.int32)
    run(emulated, body, y, grid=6, shared_bytes=4096, **{"cluster": 2} | options)
    return y.get()


def test_blocks_of_a_cluster_copy_to_each_other(emulated):
    expected = 1000 * (np.arange(6) ^ 1)[:, None] + np.arange(256)
    for seed in range(10):
        emulated.seed = seed
        emulated.resident_blocks = 1 + seed % 5
        np.testing.assert_array_equal(exchange(emulated), expected)


def test_a_relaxed_arrival_at_the_barrier_of_the_cluster_orders_nothing(emulated):
    body = """(int* y) {
      if (threadIdx.x == 0) y[cluster_ctarank()] = 1;
      barrier_cluster_arrive_relaxed();
      barrier_cluster_wait();
      if (threadIdx.x == 0) y[2 + cluster_ctarank()] = y[cluster_ctarank() ^ 1];
    }"""
    y = emulated.cp.zeros(4, np.int32)
    with pytest.raises(KernelFault, match=r"\[race\] global memory"):
        run(emulated, body, y, grid=2, cluster=2)


FAULTS = {
    "no barrier of the cluster after the initialisation": ("race", "  barrier_cluster_arrive_relaxed();\n  barrier_cluster_wait();\n", "  __syncthreads();\n"),
    "no wait at the barrier of the cluster": ("race", "  barrier_cluster_wait();\n", ""),
    "a wait without an arrival": ("barrier", "  barrier_cluster_arrive_relaxed();\n", ""),
    "two arrivals without a wait": ("barrier", "  barrier_cluster_arrive_relaxed();\n", "  barrier_cluster_arrive_relaxed();\n  barrier_cluster_arrive_relaxed();\n"),
    "one block does not come to the barrier": ("deadlock", "  barrier_cluster_arrive_relaxed();\n  barrier_cluster_wait();\n", "  if (rank) {\n    barrier_cluster_arrive_relaxed();\n    barrier_cluster_wait();\n  }\n  __syncthreads();\n"),
    "no fence before a copy": ("proxy", "  fence_proxy_async_shared();\n", ""),
    "no barrier before a copy": ("race", "  __syncthreads();\n", ""),
    "initialisation not fenced": ("proxy", "    fence_mbarrier_init();\n", ""),
    "a copy to oneself": ("deadlock", "mapa(base + 2048, peer), base + 1024, 1024, mapa(base, peer)", "base + 2048, base + 1024, 1008, base"),
    "an mbarrier of another block than the bytes": ("bounds", "1024, mapa(base, peer)", "1024, base"),
    "a copy from another block": ("bounds", "mapa(base + 2048, peer), base + 1024", "base + 2048, mapa(base + 1024, peer)"),
    "an ordinary arrival at another block's mbarrier": ("bounds", "mbarrier_arrive_cluster(", "mbarrier_arrive("),
    "a wait for another block's mbarrier": ("bounds", "mbarrier_wait(base, 0)", "mbarrier_wait(mapa(base, peer), 0)"),
    "a copy past shared memory": ("bounds", "base + 2048, peer", "base + 3584, peer"),
    "a copy that is no multiple of 16 bytes": ("alignment", "base + 1024, 1024,", "base + 1024, 1000,"),
    "a copy to an address that is no multiple of 16 bytes": ("alignment", "base + 2048, peer", "base + 2056, peer"),
    "no such block": ("bounds", "peer = rank ^ 1", "peer = rank + 1"),
    "fewer bytes expected than come": ("barrier", "expect_tx(base, 1024)", "expect_tx(base, 512)"),
    "more bytes expected than come": ("deadlock", "expect_tx(base, 1024)", "expect_tx(base, 1040)"),
    "no wait for what comes": ("race", "  mbarrier_wait(base, 0);\n", ""),
    "what is on its way is overwritten": ("race", "  mbarrier_wait(base + 8, 0);\n", ""),
    "the end before the peer has arrived": ("in flight", "  mbarrier_wait(base + 8, 0);\n  ((int*)(s + 1024))[threadIdx.x] = 0;\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_by_its_check(emulated, name):
    check, old, new = FAULTS[name]
    assert EXCHANGE.count(old) == 1
    checks = set()
    for seed in range(3):
        emulated.seed = seed
        try:
            exchange(emulated, EXCHANGE.replace(old, new))
        except KernelFault as fault:
            checks |= fault.checks
    assert check in checks


def test_a_block_that_ends_without_knowing_of_its_peer_is_noticed_in_every_interleaving(emulated):
    body = EXCHANGE.replace("  mbarrier_wait(base + 8, 0);\n  ((int*)(s + 1024))[threadIdx.x] = 0;\n", "")
    for seed in range(10):
        emulated.seed = seed
        with pytest.raises(KernelFault) as caught:
            exchange(emulated, body)
        assert "in flight" in caught.value.checks


def test_a_grid_must_be_made_of_whole_clusters(emulated):
    with pytest.raises(KernelFault, match=r"\[launch\](.|\n)*clusters of 4"):
        exchange(emulated, cluster=4)


def test_a_descriptor_of_an_unmasked_address_multiplies_something_else(emulated):
    """Of 128 columns, whose two panels lie the leading offset apart: bits of the rank fall into it."""
    body = """(float* y) {
      DYN_SMEM(s);
      for (int i = threadIdx.x; i < 2048; i += 128) ((int*)s)[i] = 0;
      for (int i = threadIdx.x; i < 16384; i += 128) ((short*)(s + 8192))[i] = i < 8192 + 128 ? 0 : 0x3f80;
      fence_proxy_async_shared();
      __syncthreads();
      const unsigned long long high = (1024ull / 16 | 1u << 30) << 32;
      const unsigned b = cvta_to_shared(s) + 8192;
      unsigned a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
      float d[16][4];
      wgmma_fence();
      wgmma_m64k16_bf16_rs<1>(d, a, ((ADDRESS) / 16 + (16384 / 16 << 16)) | high, 0);
      wgmma_commit_group();
      wgmma_wait_group<0>();
      if (threadIdx.x == 0) y[blockIdx.x] = d[15][0];
    }"""
    y = emulated.cp.zeros(2, np.float32)
    options = {"grid": 2, "threads": 128, "shared_bytes": 8192 + 65536, "cluster": 2}
    emulated.check_races = False
    run(emulated, body.replace("ADDRESS", "b & 0x3ffff"), y, **options)
    np.testing.assert_array_equal(y.get(), [14, 14])
    run(emulated, body.replace("ADDRESS", "b"), y, **options)
    assert y[0] == 14
    assert y[1] != 14


def test_the_size_of_a_cluster_is_what_the_kernel_states():
    assert toolchain.cluster_blocks('extern "C" __global__ void __cluster_dims__(2, 1, 1) f() {}', {}) == 2
    assert toolchain.cluster_blocks('extern "C" __global__ void f() {}', {}) == 1
