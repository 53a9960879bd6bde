"""Modifiers in PyTorch: autograd, torch.compile, opcheck and torch.func on the CPU."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

import cuflash

torch = pytest.importorskip("torch")

import cuflash.torch  # noqa: E402
from cuflash.torch_schema import TENSORS, flatten, restore  # noqa: E402

SHAPES = ((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 3))


def tensors(dtype: Any = torch.float64, *, grad: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
        for shape in SHAPES
    ]


def operands(dtype: Any = torch.float64, *, grad: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "bias": normal(1, 4, 5, 7).requires_grad_(grad),
        "sinks": normal(4).requires_grad_(grad),
        "alibi_slopes": normal(4).abs(),
        "mask": torch.rand((2, 1, 5, 7), generator=generator) < 0.8,
        "key_padding": torch.tensor([7, 4]),
        "query_padding": torch.tensor([5, 3], dtype=torch.int32),
        "seed": torch.tensor(-12345),
    }


SCALARS: dict[str, Any] = {"window": (4, 2), "softcap": 1.5, "dropout_p": 0.3}


def leaves_of(given: dict[str, Any]) -> list[Any]:
    return [x for x in given.values() if x.requires_grad]


@pytest.mark.parametrize(
    ("name", "return_lse"),
    [
        *(
            (name, True)
            for name in ("window", "softcap", "dropout_p", "bias", "sinks", "mask", "key_padding")
        ),
        *(("all", return_lse) for return_lse in (False, True)),
    ],
)
def test_gradcheck_in_float64(name: str, return_lse: bool) -> None:
    given, scalars = operands(), dict(SCALARS)
    if name != "all":
        scalars = {n: x for n, x in scalars.items() if n == name}
        given = {n: x for n, x in given.items() if n == name or (n == "seed" and name == "dropout_p")}
    else:  # a padding row has lse −inf, of which there is no finite difference
        given.pop("query_padding")
    leaves = {n: x for n, x in given.items() if x.requires_grad}

    def call(q: Any, k: Any, v: Any, *changed: Any) -> Any:
        new = given | dict(zip(leaves, changed, strict=True))
        return cuflash.attention(q, k, v, return_lse=return_lse, **scalars, **new)

    if name in ("window", "mask", "key_padding") and return_lse:
        given["sinks"] = torch.zeros(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(call, [*tensors(), *leaves.values()])


def test_autograd_returns_what_attention_backward_does_and_only_what_is_needed() -> None:
    q, k, v = tensors()
    given = operands()
    out, lse = cuflash.attention(q, k, v, return_lse=True, **SCALARS, **given)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    inputs = [q, k, v, *leaves_of(given)]
    actual = torch.autograd.grad((out, lse), inputs, (dout, dlse), retain_graph=True)
    plain = {name: x.detach() for name, x in given.items()}
    saved = [x.detach() for x in (dout, q, k, v, out, lse)]
    expected = cuflash.attention_backward(*saved, dlse=dlse, **SCALARS, **plain)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for x, want in zip(inputs, expected, strict=True):
        (got,) = torch.autograd.grad((out, lse), [x], (dout, dlse), retain_graph=True)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_window_of_nothing_but_the_diagonal_reaches_the_backward(compiled: bool) -> None:
    torch._dynamo.reset()

    def call(q: Any, k: Any, v: Any) -> Any:
        return cuflash.attention(q, k, v, window=(0, 0)).square().sum()

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    inputs = tensors()
    dq, dk, dv = torch.autograd.grad(function(*inputs), inputs)
    assert not dq.abs().gt(1e-12).any(), "one key: its probability is 1 whatever the query"
    assert not dk.abs().gt(1e-12).any()
    assert not dv[:, :2].any(), "keys before the first diagonal"
    assert dv[:, 2:].all()


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_an_operand_that_requires_grad_is_enough(name: str) -> None:
    inputs = tensors(grad=False)
    given = {name: operands()[name]}
    cuflash.attention(*inputs, **given).square().sum().backward()
    assert given[name].grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_of_what_they_are_of(dtype: Any) -> None:
    inputs, given = tensors(dtype), operands(torch.float32)
    cuflash.attention(*inputs, **SCALARS, **given).float().square().sum().backward()
    for x in (*inputs, *leaves_of(given)):
        assert (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_makes_one_graph_with_the_same_gradients(dynamic: bool) -> None:
    def loss(q: Any, k: Any, v: Any, given: dict[str, Any]) -> Any:
        out, lse = cuflash.attention(q * 2, k, v, return_lse=True, **SCALARS, **given)
        return out.sin().sum() + lse[:, :, :3].sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs, given = tensors(), operands()
    needed = [*inputs, *leaves_of(given)]
    actual = torch.autograd.grad(compiled(*inputs, given), needed)
    torch.testing.assert_close(actual, torch.autograd.grad(loss(*inputs, given), needed))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_without_a_seed_it_comes_from_torchs_generator(compiled: bool, grad: bool) -> None:
    torch._dynamo.reset()

    def call(q: Any, k: Any, v: Any) -> Any:
        return cuflash.attention(q, k, v, dropout_p=0.5)

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    inputs = tensors(grad=grad)
    outs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outs.append(function(*inputs))
    assert (outs[0] == outs[1]).all()
    assert (outs[0] != outs[2]).any()
    assert (function(*inputs) != outs[2]).any(), "every call draws another"


def test_a_seed_may_be_any_number_of_64_bits() -> None:
    q, k, v = tensors()
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        out = cuflash.attention(q, k, v, dropout_p=0.5, seed=seed)
        plain = cuflash.attention(q.detach(), k.detach(), v.detach(), dropout_p=0.5, seed=seed)
        torch.testing.assert_close(out, plain, rtol=0, atol=0)


def test_checkpoint_replays_the_dropout_mask() -> None:
    inputs, again = tensors(), tensors()
    torch.manual_seed(3)
    cuflash.attention(*inputs, dropout_p=0.5).square().sum().backward()
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(
        lambda *x: cuflash.attention(*x, dropout_p=0.5), *again, use_reentrant=False
    )
    out.square().sum().backward()
    torch.testing.assert_close([x.grad for x in again], [x.grad for x in inputs], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: Any) -> None:
    call = ("bottom_right", None, "bshd")
    given = operands(dtype)
    modifiers = (4, None, 1.5, 0.3, *[""] * 4, *(given[name] for name in TENSORS))
    inputs = tensors(dtype)
    torch.library.opcheck(torch.ops.cuflash.attention_forward.default, (*inputs, *call, "auto", *modifiers))
    options = {"window": (4, None), "softcap": 1.5, "dropout_p": 0.3, **given}
    out, lse = cuflash.attention(*inputs, causal=True, return_lse=True, **options)
    saved = [x.detach() for x in (out.cos(), *inputs, out, lse)]
    flat = [x.detach() if isinstance(x, torch.Tensor) else x for x in modifiers]
    for wanted in ("", "bias", "bias sinks"):
        torch.library.opcheck(
            torch.ops.cuflash.attention_backward.default, (*saved, None, *call, False, "auto", wanted, *flat)
        )


def test_func_grad_equals_autograd() -> None:
    given = operands()
    q, k, v = tensors()

    def loss(q: Any, bias: Any, sinks: Any) -> Any:
        new = given | {"bias": bias, "sinks": sinks}
        return cuflash.attention(q, k.detach(), v.detach(), **SCALARS, **new).square().sum()

    wrt = q, given["bias"], given["sinks"]
    actual = torch.func.grad(loss, argnums=(0, 1, 2))(*(x.detach() for x in wrt))
    torch.testing.assert_close(actual, torch.autograd.grad(loss(*wrt), wrt))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("mapped", [(), ("bias", "sinks", "mask"), ("key_padding", "alibi_slopes")])
def test_func_vmap_gives_what_calls_one_by_one_give(dropout: bool, mapped: tuple[str, ...]) -> None:
    given = operands(grad=False)
    scalars = dict(SCALARS)
    if not dropout:
        given.pop("seed")
        scalars.pop("dropout_p")
    for name in mapped:
        x = given[name]
        given[name] = torch.stack([x, ~x if name == "mask" else x // 2 if "padding" in name else 2 * x])
    q = torch.stack([tensors(grad=False)[0], tensors(grad=False)[0].flip(0)])
    _, k, v = tensors(grad=False)
    leaves = ("bias", "sinks")

    def loss(q: Any, leaf: Any, others: dict[str, Any]) -> Any:
        new = others | dict(zip(leaves, leaf, strict=True))
        return cuflash.attention(q, k, v, **scalars, **new).square().sum()

    dims = {name: 0 if name in mapped else None for name in given}
    others = {name: x for name, x in given.items() if name not in leaves}
    leaf = tuple(given[name] for name in leaves)
    gradient = torch.func.grad(loss, argnums=(0, 1))
    in_dims = (0, tuple(dims[n] for n in leaves), {name: dims[name] for name in others})
    together = torch.func.vmap(gradient, in_dims=in_dims)(q, leaf, others)
    for i in range(2):
        one = gradient(
            q[i],
            tuple(given[n][i] if n in mapped else given[n] for n in leaves),
            {n: x[i] if n in mapped else x for n, x in others.items()},
        )
        torch.testing.assert_close(together[0][i], one[0])
        for a, b in zip(together[1], one[1], strict=True):
            torch.testing.assert_close(a[i], b)


def test_slopes_have_no_gradient_and_say_so() -> None:
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"^alibi_slopes requires grad, and has no gradient"):
        cuflash.attention(*tensors(torch.float32), alibi_slopes=slopes)
    cuflash.attention(*tensors(torch.float32), alibi_slopes=slopes.detach()).sum().backward()


def test_errors_are_those_of_calls_without_gradients() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"^bias has shape \(5, 7\)"):
        cuflash.attention(q, k, v, bias=torch.zeros(5, 7, dtype=torch.float64))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: cuflash.attention(*x[:3], mask=x[3]), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match="mask has dtype float64"):
        compiled(q, k, v, torch.zeros(2, 4, 5, 7, dtype=torch.float64))


def test_modifiers_of_gpu_tensors_are_traced() -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 5, 4, 8, device="cuda", dtype=torch.float16)
        out, lse = torch.ops.cuflash.attention_forward(x, x, x, "none", None, "bshd", "auto", None, None, 2.0)
        assert out.shape == x.shape
        assert lse.shape == (2, 4, 5)


def test_a_seed_that_is_a_number_becomes_a_tensor_without_a_copy_from_the_host() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from cuflash.modifiers import collect

    class Recorder(TorchDispatchMode):
        ran: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.ran.append(function._overloadpacket.__name__)
            return function(*args, **kwargs or {})

    modifiers, operands = collect({"dropout_p": 0.5, "seed": 2**64 - 3})
    flat = flatten(modifiers, operands, torch.device("cpu"))
    assert restore(flat)[1]["seed"] == -3
    with Recorder():
        flatten(modifiers, operands, torch.device("meta"))
    assert Recorder.ran == ["full"]
