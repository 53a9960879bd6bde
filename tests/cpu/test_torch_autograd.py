"""Gradients, torch.compile, autocast, checkpointing and torch.func on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

import cuflash

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import (  # noqa: E402
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

GROUPED = ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 3))  # q, k, v: Sq ≠ Sk, Hq ≠ Hkv, D ≠ Dv
OUT = (2, 5, 4, 3)


def tensors(dtype: Any = torch.float32, *, shapes: Any = GROUPED, grad: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
        for shape in shapes
    ]


def gradients(function: Any, inputs: list[Any]) -> tuple[Any, ...]:
    return torch.autograd.grad(function(*inputs).square().sum(), inputs)


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Recorder(TorchDispatchMode):
    """Notes the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "cuflash":
            self.calls.append((function.name().removeprefix("cuflash::"), args))
        return function(*args, **(kwargs or {}))


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradcheck_in_float64(layout: str, causal: bool | str, return_lse: bool) -> None:
    inputs = tensors(torch.float64)
    if layout == "bhsd":
        inputs = [x.transpose(1, 2).detach().requires_grad_() for x in inputs]
    options = {"causal": causal, "scale": 0.7, "layout": layout, "return_lse": return_lse}
    assert torch.autograd.gradcheck(lambda *x: cuflash.attention(*x, **options), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_gradients_equal_those_of_sdpa(dtype: Any, tolerance: float) -> None:
    inputs = tensors(dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]

    def sdpa(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    actual = gradients(lambda *x: cuflash.attention(*x, causal="top_left"), inputs)
    for gradient, x, expected in zip(actual, inputs, gradients(sdpa, wide), strict=True):
        assert (gradient.dtype, gradient.shape) == (x.dtype, x.shape)
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_one_input_that_requires_grad_is_enough(needed: int) -> None:
    inputs = tensors(grad=False)
    expected = gradients(cuflash.attention, tensors())[needed]
    inputs[needed].requires_grad_()
    cuflash.attention(*inputs).square().sum().backward()
    for i, x in enumerate(inputs):
        assert (x.grad is not None) == (i == needed)
    assert_equal(inputs[needed].grad, expected)


def test_a_loss_of_lse_alone_has_gradients() -> None:
    inputs = tensors(torch.float64)
    q, k, v = inputs

    def reference(q: Any, k: Any) -> Any:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / 8**0.5
        return scores.logsumexp(-1)

    actual = torch.autograd.grad(cuflash.attention(q, k, v, return_lse=True)[1].square().sum(), inputs)
    expected = torch.autograd.grad(reference(q, k).square().sum(), (q, k))
    torch.testing.assert_close(actual, (*expected, torch.zeros_like(v)))


def test_rows_that_see_no_key_and_empty_inputs_have_finite_gradients() -> None:
    inputs = tensors(shapes=((1, 9, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)))
    dq, dk, dv = gradients(lambda *x: cuflash.attention(*x, causal=True), inputs)
    assert not dq[:, :6].any()
    assert dq[:, 6:].any()
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    empty = tensors(shapes=((1, 0, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)))
    assert not any(x.any() for x in gradients(cuflash.attention, empty))


def test_the_operators_run_only_where_a_gradient_is_needed() -> None:
    with Recorder() as recorder, torch.no_grad():
        cuflash.attention(*tensors())
    assert recorder.calls == []
    with Recorder() as recorder:
        cuflash.attention(*tensors(grad=False))
        assert recorder.calls == []
        cuflash.attention(*tensors()).sum().backward()
    assert [name for name, _ in recorder.calls] == [
        "attention_forward",
        "attention_backward",
    ]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_backward_is_as_deterministic_as_torch_is_told_to_be(deterministic: bool) -> None:
    out = cuflash.attention(*tensors())
    torch.use_deterministic_algorithms(deterministic)
    try:
        with Recorder() as recorder:
            out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    [(_, arguments)] = recorder.calls
    assert arguments[-2] is deterministic


def test_second_derivatives_and_tangents_are_refused_clearly() -> None:
    q, k, v = tensors()
    (dq,) = torch.autograd.grad(cuflash.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dq.sum().backward()

    def loss(q: Any) -> Any:
        return cuflash.attention(q, k, v).square().sum()

    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q.detach())
    with pytest.raises(NotImplementedError, match="forward-mode tangents"):
        torch.func.jvp(loss, (q.detach(),), (q.detach(),))


def test_batched_gradients_equal_those_one_by_one() -> None:
    q, k, v = tensors()
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    for result in (out, lse):
        cotangents = torch.randn(3, *result.shape, dtype=result.dtype)
        batched = torch.autograd.grad(result, (q, k), cotangents, is_grads_batched=True, retain_graph=True)
        for i, cotangent in enumerate(cotangents):
            single = torch.autograd.grad(result, (q, k), cotangent, retain_graph=True)
            torch.testing.assert_close([x[i] for x in batched], list(single))


def test_lazily_negated_gradients_and_inputs_are_taken() -> None:
    def negated(x: Any) -> Any:
        return torch.complex(torch.zeros_like(x), x).conj().imag

    q, k, v = tensors()
    assert negated(q).is_neg()
    out = cuflash.attention(negated(q), k, v)
    torch.testing.assert_close(out, cuflash.attention(-q, k, v))
    weights = torch.randn_like(out)
    actual = torch.autograd.grad((negated(out) * weights).sum(), (q, k, v), retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(out, (q, k, v), -weights))


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_graph_traced_by_make_fx_holds_the_operator(pre_dispatch: bool) -> None:
    make_fx = pytest.importorskip("torch.fx.experimental.proxy_tensor").make_fx
    traced = make_fx(lambda *x: cuflash.attention(*x, causal=True), pre_dispatch=pre_dispatch)(*tensors())
    assert "cuflash.attention_forward" in str(traced.graph)


def test_errors_are_those_of_calls_without_gradients() -> None:
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"^v has dtype float64, q has float32"):
        cuflash.attention(q, k, v.double())
    with pytest.raises(ValueError, match=r"^k is on device meta"):
        cuflash.attention(q, k.to("meta"), v)
    with pytest.raises(TypeError, match=r"^scale must be"):
        cuflash.attention(q, k, v, scale=True)
    with pytest.raises(TypeError, match=r"^return_lse must be"):
        cuflash.attention(q, k, v, return_lse=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^algorithm must be"):
        cuflash.attention(q, k, v, algorithm=None)  # type: ignore[arg-type]


def test_a_call_that_needs_gradients_is_explained() -> None:
    assert cuflash.explain(*tensors()).family == "cpu"


# --- torch.compile and torch.export -------------------------------------------------------------------------


def loss_in_graph(q: Any, k: Any, v: Any) -> Any:
    out, lse = cuflash.attention(q * 2, k, v, causal=True, return_lse=True)
    return out.sin().sum() + lse.sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_makes_one_graph_with_the_same_gradients(dynamic: bool) -> None:
    torch._dynamo.reset()
    inputs = tensors(torch.float64)
    compiled = torch.compile(loss_in_graph, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shapes in (GROUPED, ((3, 4, 6, 8), (3, 9, 3, 8), (3, 9, 3, 5))):
        inputs = tensors(torch.float64, shapes=shapes)
        actual = torch.autograd.grad(compiled(*inputs), inputs)
        torch.testing.assert_close(actual, torch.autograd.grad(loss_in_graph(*inputs), inputs))


def test_compile_needs_no_gradient() -> None:
    torch._dynamo.reset()
    inputs = tensors(grad=False)
    compiled = torch.compile(loss_in_graph, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss_in_graph(*inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 6, 2, 3)}, "v has sequence length 6, k has 7"),
        ({"k": torch.zeros(2, 7, 2, 8).double()}, "k has dtype float64, q has float32"),
        ({"causal": "left"}, "causal must be"),
        ({"algorithm": "fa3"}, "algorithm must be one of"),
    ],
)
def test_bad_input_is_named_while_tracing(change: dict[str, Any], message: str) -> None:
    torch._dynamo.reset()
    ran = []

    def backend(graph: Any, _: Any) -> Any:
        ran.append(graph)
        return graph

    call = dict(zip("qkv", tensors(grad=False), strict=True)) | change
    with pytest.raises(RuntimeError, match=message):
        torch.compile(lambda **x: cuflash.attention(**x), fullgraph=True, backend=backend)(**call)
    assert not ran


def test_float32_on_a_gpu_is_refused_while_tracing() -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 5, 4, 8, device="cuda")
        out, lse = torch.ops.cuflash.attention_forward(*[x.half()] * 3, "none", None, "bshd", "auto")
        assert (out.device, out.dtype, lse.shape) == (x.device, torch.float16, (2, 4, 5))
        with pytest.raises(TypeError, match=r"^q has dtype float32"):
            torch.ops.cuflash.attention_forward(x, x, x, "none", None, "bshd", "auto")


def test_export_holds_the_operator() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return cuflash.attention(q, k, v, causal=True)

    inputs = tensors(grad=False)
    program = torch.export.export(Module(), tuple(inputs))
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.cuflash.attention_forward.default in targets
    assert_equal(program.module()(*inputs), cuflash.attention(*inputs, causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: Any) -> None:
    options = ("bottom_right", None, "bshd")
    inputs = tensors(dtype)
    torch.library.opcheck(torch.ops.cuflash.attention_forward.default, (*inputs, *options, "auto"))
    out, lse = cuflash.attention(*inputs, causal=True, return_lse=True)
    saved = [x.detach() for x in (out.cos(), *inputs, out, lse)]
    for dlse in (None, lse.detach().sin()):
        torch.library.opcheck(
            torch.ops.cuflash.attention_backward.default, (*saved, dlse, *options, False, "auto")
        )


# --- autocast, checkpointing, torch.func --------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_for_a_matrix_product(grad: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    q, k, v = tensors(grad=grad)
    function = torch.compile(cuflash.attention, fullgraph=True, backend="aot_eager") if compiled else None
    with torch.autocast("cpu", torch.bfloat16):
        out = (function or cuflash.attention)(q, k, v.bfloat16())
        assert cuflash.explain(q, k, v).problem.dtype == "bfloat16"
        doubles = cuflash.attention(*(x.double() for x in (q, k, v)))
    assert doubles.dtype is torch.float64
    assert_equal(out, cuflash.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    if grad:
        out.float().sum().backward()
        assert q.grad.dtype is torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_same_gradients(use_reentrant: bool) -> None:
    expected = gradients(cuflash.attention, tensors())
    inputs = tensors()
    out = checkpoint(lambda *x: cuflash.attention(*x), *inputs, use_reentrant=use_reentrant)
    out.square().sum().backward()
    assert_equal(tuple(x.grad for x in inputs), expected)


def test_selective_checkpointing_can_save_the_operator() -> None:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = operator is torch.ops.cuflash.attention_forward.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    inputs = tensors()
    with Recorder() as recorder:
        out = checkpoint(
            lambda *x: cuflash.attention(*x).sin(), *inputs, use_reentrant=False, context_fn=contexts
        )
        out.sum().backward()
    assert [name for name, _ in recorder.calls].count("attention_forward") == 1


def test_func_grad_equals_autograd() -> None:
    def loss(*x: Any) -> Any:
        return cuflash.attention(*x).square().sum()

    inputs = [x.detach() for x in tensors()]
    assert_equal(torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), gradients(cuflash.attention, tensors()))


def test_func_vmap_extends_the_batch() -> None:
    q, k, v = (torch.stack([x, 2 * x, -x]) for x in tensors(grad=False))

    def loss(q: Any, k: Any, v: Any) -> Any:
        return cuflash.attention(q, k, v).square().sum()

    vmap, grad = torch.func.vmap, torch.func.grad
    mapped = vmap(cuflash.attention, in_dims=(1, None, 3))(q.movedim(0, 1), k[0], v.movedim(0, 3))
    dv = vmap(grad(loss, argnums=2), in_dims=(0, None, 0))(q, k[0], v)
    for i in range(3):
        assert_equal(mapped[i], cuflash.attention(q[i], k[0], v[i]))
        assert_equal(dv[i], grad(loss, argnums=2)(q[i], k[0], v[i]))
    assert vmap(cuflash.attention)(q[:0], k[:0], v[:0]).shape == (0, *OUT)
