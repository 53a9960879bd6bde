"""PyTorch on the GPU: gradients under autograd, torch.compile, CUDA graphs, checkpointing and autocast."""

from __future__ import annotations

import pytest

import cuflash
from gpu.conftest import hopper_or_skip

torch = pytest.importorskip("torch")
cp = pytest.importorskip("cupy")

from torch.utils.checkpoint import checkpoint  # noqa: E402

SQUARE = ((2, 200, 4, 64),) * 3
GROUPED = ((2, 130, 6, 64), (2, 200, 2, 64), (2, 200, 2, 32))
ODD = ((2, 130, 4, 59), (2, 200, 4, 59), (2, 200, 4, 111))


def make_tensors(shapes=SQUARE, dtype=torch.bfloat16, grad=True):
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_(grad)
        for shape in shapes
    ]


def weighted(out, lse):
    """A loss whose gradients with respect to out and lse differ from element to element."""
    return (out.float().sin().sum() + lse.cos().sum()).to(out.dtype)


def loss_of(**options):
    return lambda q, k, v: weighted(*cuflash.attention(q, k, v, return_lse=True, **options))


def standard(q, k, v, causal=False):
    """Attention and lse by matrix products in q's dtype."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda")
        scores = scores.masked_fill(hidden.triu(1 + scores.shape[-1] - scores.shape[-2]), -torch.inf)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return (wide.softmax(-1).to(q.dtype) @ v).transpose(1, 2), wide.logsumexp(-1)


def gradients(loss, inputs):
    return torch.autograd.grad(loss(*inputs), inputs)


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", [SQUARE, GROUPED, ODD], ids=["square", "grouped", "odd"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_gradients_stay_within_the_numerics_contract(dtype, causal, shapes, layout):
    inputs = make_tensors(shapes, dtype)

    def loss(q, k, v):
        if layout == "bshd":
            return loss_of(causal=causal)(q, k, v)
        swapped = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = cuflash.attention(*swapped, causal=causal, layout="bhsd", return_lse=True)
        return weighted(out.transpose(1, 2), lse)

    def reference(*x):
        return weighted(*standard(*x, causal=causal))

    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected, allowed = gradients(reference, wide), gradients(reference, inputs)
    for name, actual, want, other in zip("qkv", gradients(loss, inputs), expected, allowed, strict=True):
        error, bound = (actual - want).abs().max(), 2 * (other - want).abs().max() + 1e-5
        assert error <= bound, f"d{name}: {error} > {bound}"


def test_gradients_after_the_hopper_forward():
    inputs = make_tensors()
    assert_close(
        gradients(loss_of(causal=True, algorithm=hopper_or_skip()), inputs),
        gradients(loss_of(causal=True, algorithm="fa2"), inputs),
    )


@pytest.mark.parametrize("algorithm", ["fa1", "standard"])
@pytest.mark.parametrize("shapes", [SQUARE, GROUPED, ODD], ids=["square", "grouped", "odd"])
def test_families_to_compare_with_differentiate_with_their_own_backward(algorithm, shapes):
    inputs = make_tensors(shapes)
    expected = gradients(loss_of(causal=True, algorithm="fa2"), inputs)
    assert_close(gradients(loss_of(causal=True, algorithm=algorithm), inputs), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of(causal=True, algorithm=algorithm), fullgraph=True)
    assert_close(gradients(compiled, inputs), expected)


@pytest.mark.parametrize("algorithm", ["fa1", "standard"])
def test_families_to_compare_with_run_on_torchs_current_stream(algorithm):
    q, k, v = make_tensors(grad=False)
    expected = cuflash.attention(q, k, v, algorithm=algorithm)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        torch.cuda._sleep(100_000_000)
        for target, source in zip(late, (q, k, v), strict=True):
            target.copy_(source)
        out = cuflash.attention(*late, algorithm=algorithm)
    stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_a_gradient_broadcast_from_a_scalar():
    inputs = make_tensors()
    actual = gradients(lambda *x: cuflash.attention(*x).sum(), inputs)
    assert_close(actual, gradients(lambda *x: standard(*x)[0].sum(), inputs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_makes_one_graph_with_the_same_gradients(dynamic):
    torch._dynamo.reset()
    loss = loss_of(causal=True)
    compiled = torch.compile(lambda q, k, v: loss(q * 2, k, v), fullgraph=True, dynamic=dynamic)
    for shapes in (SQUARE, GROUPED):
        inputs = make_tensors(shapes)
        expected = gradients(lambda q, k, v: loss(q * 2, k, v), inputs)
        assert_close(gradients(compiled, inputs), expected)


@pytest.mark.parametrize("algorithm", ["auto", "fa2", "hopper", "fa1"])
def test_a_cuda_graph_captures_forward_and_backward(algorithm):
    if algorithm == "hopper":
        hopper_or_skip()
    inputs = make_tensors(ODD)
    loss = loss_of(causal=True, algorithm=algorithm)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(loss, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(loss, inputs)
    for factor in (2, 0.5):
        with torch.no_grad():
            for x in inputs:
                x.mul_(factor)
        graph.replay()
        assert_close(captured, gradients(loss, inputs))


def test_compile_with_cuda_graphs_keeps_the_gradients():
    torch._dynamo.reset()
    compiled = torch.compile(loss_of(), fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        inputs = make_tensors()
        assert_close([x.clone() for x in gradients(compiled, inputs)], gradients(loss_of(), inputs))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_same_gradients(use_reentrant):
    inputs = make_tensors()
    expected = gradients(loss_of(), inputs)
    checkpoint(loss_of(), *inputs, use_reentrant=use_reentrant).backward()
    assert_close([x.grad for x in inputs], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_as_for_a_matrix_product(dtype):
    inputs = make_tensors(dtype=torch.float32)
    with torch.autocast("cuda", dtype):
        out = cuflash.attention(*inputs)
        with torch.no_grad():
            assert torch.equal(cuflash.attention(*inputs), out)
    assert torch.equal(out, cuflash.attention(*(x.to(dtype) for x in inputs)))
    assert [x.dtype for x in torch.autograd.grad(out.sum(), inputs)] == [torch.float32] * 3


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_give_the_same_bits():
    inputs = make_tensors(((2, 1000, 4, 64),) * 3)
    first = gradients(loss_of(), inputs)
    for _ in range(10):
        for a, b in zip(gradients(loss_of(), inputs), first, strict=True):
            assert torch.equal(a, b)


def test_all_memory_comes_from_torchs_allocator():
    inputs = make_tensors(ODD)
    gradients(loss_of(), inputs)
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    gradients(loss_of(), inputs)
    assert pool.total_bytes() == before


def test_the_backward_runs_on_the_stream_of_its_forward():
    inputs = make_tensors()
    expected = gradients(loss_of(), inputs)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = [torch.full_like(x, float("nan")) for x in inputs]
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for target, source in zip(late, inputs, strict=True):
                target.copy_(source)
        actual = gradients(loss_of(), [x.requires_grad_() for x in late])
    stream.synchronize()
    assert_close(actual, expected)


@pytest.mark.usefixtures("deterministic")  # opcheck compares two backwards
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opcheck(dtype):
    import cuflash.torch  # defines the operators

    inputs = make_tensors(dtype=dtype)
    options = ("bottom_right", None, "bshd")
    torch.library.opcheck(torch.ops.cuflash.attention_forward.default, (*inputs, *options, "auto"))
    out, lse = cuflash.attention(*inputs, causal=True, return_lse=True)
    saved = [x.detach() for x in (out.cos(), *inputs, out, lse)]
    torch.library.opcheck(
        torch.ops.cuflash.attention_backward.default, (*saved, None, *options, True, "auto")
    )


def test_func_grad_and_vmap():
    inputs = [x.detach() for x in make_tensors()]
    expected = gradients(loss_of(), make_tensors())
    assert_close(torch.func.grad(loss_of(), argnums=(0, 1, 2))(*inputs), expected)
    stacked = [torch.stack([x, x / 2]) for x in inputs]
    mapped = torch.func.vmap(torch.func.grad(loss_of(), argnums=(0, 1, 2)))(*stacked)
    assert_close([x[0] for x in mapped], expected)


def test_float32_is_refused_by_name_with_gradients_and_while_tracing():
    torch._dynamo.reset()
    inputs = make_tensors(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"^q has dtype float32"):
        cuflash.attention(*inputs)
    with pytest.raises(RuntimeError, match="q has dtype float32"):
        torch.compile(cuflash.attention, fullgraph=True)(*inputs)
