"""What a Config asks of a multiprocessor: shared memory, computed here and asserted against what runs.

Pure Python. Sizes in bytes; limits from the CUDA C++ Programming Guide, table "Technical Specifications per
Compute Capability".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuflash.config import Config

MINIMUM_CAPABILITY = (8, 0)  # cp.async, and mma.sync on bfloat16
ELEMENT_BYTES = 2  # the kernels take float16 and bfloat16

# Most dynamic shared memory one thread block may use, by compute capability.
_SHARED_MEMORY_PER_BLOCK = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (11, 0): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}


def shared_memory_per_block(capability: tuple[int, int]) -> int:
    """The limit of ``capability``; of the smallest known one for a capability newer than this table."""
    return _SHARED_MEMORY_PER_BLOCK.get(capability, 99 * 1024)


def blocks_fit(blocks: int, shared_bytes: int, capability: tuple[int, int]) -> bool:
    """Whether ``blocks`` thread blocks of ``shared_bytes`` each have room on a multiprocessor.

    What a block reserves for the system, 1 KB, comes on top of its own.
    """
    return blocks * (shared_bytes + 1024) <= shared_memory_per_block(capability) + 1024


def shared_bytes(config: Config) -> int:
    """Dynamic shared memory of one thread block: the Q tile (reused for O) and the ring of K/V tiles."""
    q_or_o = config.block_m * max(config.head_dim, config.head_dim_v)
    ring = config.stages * config.block_n * max(config.head_dim, config.head_dim_v)
    return ELEMENT_BYTES * (q_or_o + ring)


def register_limit(config: Config) -> int:
    """Most registers a thread can have with ``min_blocks_per_sm`` blocks on a multiprocessor (of 64 K)."""
    fitting = 65536 // (config.threads * config.min_blocks_per_sm)
    return min(255, fitting // 8 * 8)  # allocated in units of 8
