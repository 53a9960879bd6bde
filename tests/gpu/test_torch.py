"""PyTorch tensors on the GPU: their own streams, allocator and result type."""

from __future__ import annotations

import pytest

import cuflash

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")


@pytest.fixture
def qkv():
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(2, 200, 4, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3)
    ]


def _sdpa(q, k, v, **options):
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result_is_a_tensor_of_the_same_device_and_dtype_and_agrees_with_sdpa(qkv, dtype):
    q, k, v = (x.to(dtype) for x in qkv)
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    assert (out.dtype, out.device, lse.dtype) == (dtype, q.device, torch.float32)
    error = (out.double() - _sdpa(q, k, v, is_causal=True)).abs().max()
    assert error < (0.002 if dtype == torch.float16 else 0.016)


def test_current_torch_stream_is_used_and_the_device_never_synchronised(qkv):
    expected = cuflash.attention(*qkv)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = [torch.full_like(x, float("nan")) for x in qkv]
        torch.cuda._sleep(300_000_000)
        for target, source in zip(late, qkv, strict=True):
            target.copy_(source)
        out = cuflash.attention(*late)
        done = torch.cuda.Event()
        done.record()
        assert not done.query(), "the call waited for the device"
    stream.synchronize()
    assert torch.equal(out, expected)


def test_memory_comes_from_torchs_allocator(qkv):
    cuflash.attention(*qkv)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = cuflash.attention(*qkv)
    assert torch.cuda.max_memory_allocated() - before == out.numel() * 2


@pytest.mark.parametrize("causal", [False, True])
def test_a_torch_graph_captures_the_call(qkv, causal):
    q, k, v = qkv
    cuflash.attention(q, k, v, causal=causal)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuflash.attention(q, k, v, causal=causal)
    q.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, cuflash.attention(q, k, v, causal=causal))


def test_a_tensor_that_requires_grad_is_refused_with_out_and_accepted_under_no_grad(qkv):
    q, k, v = qkv
    k.requires_grad_()
    out = torch.empty_like(q)
    with pytest.raises(ValueError, match=r"^k requires grad"):
        cuflash.attention(q, k, v, out=out)
    with torch.no_grad():
        assert not cuflash.attention(q, k, v, out=out).requires_grad


def test_float32_is_refused_with_what_to_do(qkv):
    with pytest.raises(TypeError, match="bfloat16"):
        cuflash.attention(*(x.float() for x in qkv))


def test_odd_head_dims_and_strides_agree_with_sdpa(qkv):
    q, k, v = (x[..., 1:60] for x in qkv)
    error = (cuflash.attention(q, k, v).double() - _sdpa(q, k, v)).abs().max()
    assert error < 0.016


def test_out_is_written_in_place(qkv):
    q, k, v = qkv
    out = torch.full((2, 4, 200, 64), float("nan"), device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    assert cuflash.attention(q, k, v, out=out) is out
    assert torch.equal(out, cuflash.attention(q, k, v))


def test_mixing_a_cpu_tensor_in_names_the_argument(qkv):
    q, k, v = qkv
    with pytest.raises((TypeError, ValueError), match=r"\bv\b"):
        cuflash.attention(q, k, v.cpu())
