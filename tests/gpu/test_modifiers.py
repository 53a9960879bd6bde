"""Modifiers on the GPU: pairs of them against float64, PyTorch's autograd, streams and CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import VIEWS, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from modified import (
    BLIND,
    CHOICES,
    PAIRS,
    check_blind_rows,
    check_modified,
    make_modified,
    on_device,
    options_of,
)

import cuflash

cp = pytest.importorskip("cupy")

CAUSAL = (False, True, "top_left")
ALONE = {
    "window": (300, 100),
    "softcap": 5.0,
    "dropout_p": 0.2,
    **{name: True for name in CHOICES if name not in ("window", "softcap", "dropout_p")},
}


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    seqlens=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]),
    head_dims=st.sampled_from([(64, 64), (128, 128), (40, 96), (59, 7), (192, 128), (256, 256)]),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    causal=st.sampled_from(CAUSAL),
    modifiers=PAIRS,
    broadcast=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    views=st.tuples(*[st.sampled_from(sorted(VIEWS))] * 4),
    deterministic=st.booleans(),
)
def test_random_pairs_stay_within_the_numerics_contract(
    nan_pool_once,
    family,
    seed,
    batch,
    seqlens,
    heads,
    head_dims,
    dtype,
    causal,
    modifiers,
    broadcast,
    views,
    deterministic,
):
    problem, inputs, operands = make_modified(
        seed, batch, seqlens, heads, head_dims, dtype, causal, modifiers, broadcast
    )
    options = options_of(problem, causal, modifiers, family)
    check_modified(cp, problem, inputs, operands, options, views, deterministic=deterministic)


@pytest.fixture(scope="module", params=["hopper", "fa2"])
def family(request):
    """The families that have modifiers, where they run."""
    if request.param == "hopper" and cp.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    return request.param


@pytest.fixture(scope="module")
def nan_pool_once():
    """CuPy's memory pool full of freed NaN, so that whatever is read before it is written shows."""
    cp.get_default_memory_pool().free_all_blocks()
    blocks = [cp.full((size,), 0xFF, cp.uint8) for size in (1 << 24, 1 << 20, 1 << 16, 512) for _ in range(8)]
    del blocks


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ALONE)
def test_each_modifier_is_right_at_a_length_of_many_tiles(family, name, head_dim):
    modifiers = {name: ALONE[name]}
    problem, inputs, operands = make_modified(
        1, 1, (900, 1100), (4, 2), (head_dim, head_dim), "bfloat16", True, modifiers
    )
    check_modified(cp, problem, inputs, operands, options_of(problem, True, modifiers, family))


def test_auto_takes_the_fastest_family_with_modifiers_and_is_right():
    """Seqlens for which a plain backward is by pairs of thread blocks, which have none."""
    modifiers = {"softcap": 5.0, "bias": True, "key_padding": True}
    problem, inputs, operands = make_modified(
        8, 2, (400, 500), (4, 2), (128, 128), "bfloat16", False, modifiers, (True, False, False)
    )
    options = options_of(problem, False, modifiers, "auto")
    for deterministic in (False, True):
        check_modified(cp, problem, inputs, operands, options, deterministic=deterministic)
    q, k, v = (cp.asarray(x) for x in inputs[:3])
    explained = cuflash.explain(q, k, v, **options, **on_device(cp, operands))
    expected = "hopper" if cp.cuda.Device().compute_capability == "90" else "fa2"
    assert (explained.family, explained.backward.split()[0]) == (expected, expected)


@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
def test_all_modifiers_at_once(family, head_dims):
    problem, inputs, operands = make_modified(
        2, 2, (500, 600), (4, 2), head_dims, "float16", True, ALONE, (True, False, False)
    )
    check_modified(cp, problem, inputs, operands, options_of(problem, True, ALONE, family))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_hundred_calls_behind_a_slow_kernel_agree_bit_for_bit(family, head_dim):
    """Lengths and a mask: what is zeroed in shared memory between TMA and the products."""
    modifiers = {"mask": True, "key_padding": True, "query_padding": True, "softcap": 5.0, "dropout_p": 0.1}
    problem, inputs, operands = make_modified(
        6, 2, (700, 900), (4, 2), (head_dim, head_dim), "bfloat16", True, modifiers, (True, True, False)
    )
    operands["mask"][..., 100:110] = False
    options = options_of(problem, True, modifiers, family) | on_device(cp, operands)
    q, k, v, dout = (cp.asarray(x) for x in inputs[:4])
    large = cp.ones((4096, 4096), cp.float32)
    runs = set()
    for i in range(100):
        if i % 2:
            large @ large
        out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=True, **options)
        runs.add(b"".join(to_numpy(x).tobytes() for x in (out, lse, *gradients)))
    assert len(runs) == 1


def test_nan_that_no_query_sees_stays_invisible(family):
    """In keys past a length, before a window or that a mask shows to nobody, and in padding queries."""
    for head_dim in (64, 128, 256):
        modifiers = {"window": (300, 50), "mask": True, "key_padding": True, "query_padding": True}
        problem, inputs, operands = make_modified(
            7, 2, (700, 1500), (2, 1), (head_dim, head_dim), "float16", False, modifiers, (True, True, False)
        )
        operands["key_padding"], operands["query_padding"] = np.array([1500, 1200]), np.array([700, 500])
        operands["mask"][...] = True
        operands["mask"][..., 1000:1010] = False
        for x in (inputs.k, inputs.v):
            x[:, : problem.first_key_visible] = x[:, 1000:1010] = np.nan
            x[1, 1200:] = np.nan
        for x in (inputs.q, inputs.dout):
            x[1, 500:] = np.nan
        q, k, v, dout = (cp.asarray(x) for x in inputs[:4])
        options = options_of(problem, False, {"window": (300, 50)}, family) | on_device(cp, operands)
        out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
        gradients = cuflash.attention_backward(dout, q, k, v, out, lse, **options)
        assert all(np.isfinite(to_numpy(x).astype(np.float32)).all() for x in (out, *gradients))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", BLIND)
def test_rows_that_see_no_key_have_no_gradient_whatever_they_are_given(family, name, head_dim):
    check_blind_rows(cp, name, head_dim, family)


def test_thirty_deterministic_backwards_agree_bit_for_bit(family):
    """With a window and a mask, whose tiles are passed over, and gradients of bias and sinks."""
    modifiers = {"window": (300, None), "mask": True, "bias": True, "sinks": True, "dropout_p": 0.1}
    problem, inputs, operands = make_modified(
        3, 2, (1000, 1000), (4, 2), (64, 64), "bfloat16", True, modifiers, (True, True, False)
    )
    ids = np.arange(1000) // 170 % 3
    operands["mask"] = (ids[:, None] == ids)[None, None]
    options = options_of(problem, True, modifiers, family)
    q, k, v, dout = (cp.asarray(x) for x in inputs[:4])
    arrays = on_device(cp, operands)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options, **arrays)
    runs = {
        b"".join(
            to_numpy(x).tobytes()
            for x in cuflash.attention_backward(
                dout, q, k, v, out, lse, deterministic=True, **options, **arrays
            )
        )
        for _ in range(30)
    }
    assert len(runs) == 1


def test_a_bias_behind_large_strides_is_indexed_in_64_bits():
    """Its last element is more than 2^31 elements after its first."""
    free, _ = cp.cuda.runtime.memGetInfo()
    if free < 6 << 30:
        pytest.skip("needs 6 GiB of free GPU memory")
    seqlen = 130
    base = cp.empty((1 << 31) + (1 << 25), cp.float16)
    step = (1 << 31) // (seqlen - 1)
    bias = cp.lib.stride_tricks.as_strided(base, (1, 1, seqlen, seqlen), (0, 0, 2 * step, 2))
    problem, inputs, operands = make_modified(
        4, 1, (seqlen, seqlen), (2, 2), (64, 64), "float16", False, {"bias": True}, (True, True, False)
    )
    bias[...] = cp.asarray(operands["bias"])
    check_modified(cp, problem, inputs, operands, options_of(problem, False, {}), of_operands=lambda x: bias)


# --- PyTorch ------------------------------------------------------------------------------------------------


def torch_inputs(shape=(2, 200, 4, 64)):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    torch.manual_seed(0)
    return torch, [torch.randn(shape, device="cuda", dtype=torch.float16, requires_grad=True) for _ in "qkv"]


@pytest.mark.parametrize("compiled", [False, True])
def test_autograd_gives_the_gradients_of_bias_and_sinks(compiled):
    torch, (q, k, v) = torch_inputs()
    bias = torch.randn(1, 4, 200, 200, device="cuda", requires_grad=True)
    sinks = torch.randn(4, device="cuda", requires_grad=True)

    def ours(q, k, v, bias, sinks):
        return cuflash.attention(q, k, v, causal=True, softcap=5.0, bias=bias, sinks=sinks)

    def plain(q, k, v, bias, sinks):
        q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
        s = 5 * torch.tanh(q @ k.mT / 8 / 5) + bias
        s = s.masked_fill(~torch.ones(200, 200, device="cuda", dtype=torch.bool).tril(), -torch.inf)
        s = torch.cat([s, sinks[:, None, None].double().expand(2, 4, 200, 1)], -1)
        return (s.softmax(-1)[..., :-1] @ v).transpose(1, 2)

    function = torch.compile(ours, fullgraph=True) if compiled else ours
    given = (q, k, v, bias, sinks)
    weight = torch.randn(q.shape, device="cuda", dtype=torch.float64)
    actual = torch.autograd.grad((function(*given).double() * weight).sum(), given)
    expected = torch.autograd.grad((plain(*given) * weight).sum(), given)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=0.02, atol=0.02 * float(b.abs().max()))


def test_a_cuda_graph_draws_a_fresh_mask_at_every_replay_of_a_seed_on_the_device():
    torch, (q, k, v) = torch_inputs()
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def step():
        out = cuflash.attention(q, k, v, dropout_p=0.5, seed=seed)
        return out, *torch.autograd.grad(out.float().sum(), (q, k, v))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    seen = []
    for value in (5, 6, 5):
        seed.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        seen.append(results[0].clone())
        out = cuflash.attention(q.detach(), k.detach(), v.detach(), dropout_p=0.5, seed=value)
        assert torch.equal(out, seen[-1])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_a_cuda_graph_captures_a_seed_that_is_a_number_and_nothing_waits_for_the_device():
    torch, (q, k, v) = torch_inputs()

    def step():
        out = cuflash.attention(q, k, v, dropout_p=0.5, seed=5)
        return out, *torch.autograd.grad(out.float().sum(), (q, k, v))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(results[0], expected[0])


def test_without_a_seed_torchs_generator_draws_one():
    torch, (q, k, v) = torch_inputs()
    outs = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        outs.append(cuflash.attention(q, k, v, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# --- JAX ----------------------------------------------------------------------------------------------------


def test_jit_and_grad_pass_operands_through_xla():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU backend here")
    jnp = jax.numpy
    modifiers = {"softcap": 5.0, "bias": True, "sinks": True, "mask": True, "dropout_p": 0.2}
    problem, inputs, operands = make_modified(
        5, 2, (200, 300), (4, 2), (64, 64), "bfloat16", True, modifiers, (True, False, False)
    )
    seed = np.array([operands["seed"] & 0xFFFFFFFF, operands["seed"] >> 32], np.uint32)
    options = options_of(problem, True, {"softcap": 5.0, "dropout_p": 0.2}) | {"algorithm": "auto"}
    mask = jnp.asarray(operands["mask"])

    def attend(q, k, v, bias, sinks):
        extra = {"bias": bias, "sinks": sinks, "mask": mask, "seed": jnp.asarray(seed)}
        return cuflash.attention(q, k, v, **options, **extra)

    given = [jnp.asarray(x) for x in (*inputs[:3], operands["bias"], operands["sinks"])]
    out, backward = jax.vjp(jax.jit(attend), *given)
    gradients = backward(jnp.asarray(inputs.dout))
    q, k, v, dout = (cp.asarray(x) for x in inputs[:4])
    arrays = on_device(cp, operands)
    expected, lse = cuflash.attention(q, k, v, return_lse=True, **options, **arrays)
    np.testing.assert_array_equal(np.asarray(out), to_numpy(expected))
    wanted = cuflash.attention_backward(dout, q, k, v, expected, lse, **options, **arrays)
    for actual, want in zip(gradients, wanted, strict=True):
        got, want = np.asarray(actual, np.float32), to_numpy(want).astype(np.float32)
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())
