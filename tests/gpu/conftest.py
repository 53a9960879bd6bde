"""GPU tests are skipped, each by name and with the reason, where no GPU can run the kernels."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest


@functools.cache
def why_no_gpu() -> str | None:
    try:
        import cupy

        capability = cupy.cuda.Device().compute_capability
    except Exception as error:
        return f"needs a CUDA GPU: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None if int(capability) >= 80 else f"needs compute capability 8.0, this GPU has {capability}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and (reason := why_no_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))


def hopper_or_skip() -> str:
    """ "hopper" where the current GPU has that family."""
    import cupy

    capability = cupy.cuda.Device().compute_capability
    if capability != "90":
        pytest.skip(f"the hopper family needs compute capability 9.0, this GPU has {capability}")
    return "hopper"


def skip_past_head_dim_of(algorithm: str, head_dim: int) -> None:
    """Skip, by name, what the family refuses."""
    if algorithm == "fa1" and head_dim > 128:
        pytest.skip(f"the fa1 family takes head_dim to 128, not {head_dim}")


def skip_if_standard(algorithm: str) -> None:
    """Skip a comparison bit for bit of calls whose arrays have different strides or heads."""
    if algorithm == "standard":
        pytest.skip(
            "cuBLAS chooses its kernels by strides and batch: the standard family's bits depend on them"
        )


def skip_if_not_captured(algorithm: str) -> None:
    """Skip the capture of a family that refuses it, which tests of its own hold it to."""
    if algorithm == "standard":
        pytest.skip("the standard family refuses to be captured: CuPy calls no cuBLAS meanwhile")


@pytest.fixture(params=["fa2", "hopper", "fa1", "standard"])
def algorithm(request: pytest.FixtureRequest) -> str:
    """Each kernel family; one that the GPU has not is skipped."""
    return hopper_or_skip() if request.param == "hopper" else request.param


@pytest.fixture
def attention(algorithm: str):
    """``cuflash.attention`` by each kernel family."""
    import cuflash

    return functools.partial(cuflash.attention, algorithm=algorithm)


@pytest.fixture
def nan_pool():
    """CuPy's memory pool full of freed NaN, so that whatever is read before it is written shows."""
    import cupy as cp

    cp.get_default_memory_pool().free_all_blocks()
    blocks = [
        cp.full((size,), 0xFF, cp.uint8)
        for size in (1 << 24, 1 << 20, 1 << 16, 1 << 12, 512)
        for _ in range(8)
    ]
    del blocks
