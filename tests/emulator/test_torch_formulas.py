"""Formulas in PyTorch: autograd, torch.compile and torch.func, with the emulator in place of a GPU.

Tensors stay in host memory and pass for tensors on a GPU: what the adapter hands on is computed by the
emulated kernels.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import cuflash
from cuflash import api, api_backward, arrays

torch = pytest.importorskip("torch")

import cuflash.torch as adapter  # noqa: E402
from cuflash import torch_schema  # noqa: E402
from cuflash.arrays import torch as tensors  # noqa: E402


@pytest.fixture
def on_gpu(emulated, monkeypatch):
    """Calls that the adapter makes run on the emulator."""
    cp = emulated.cp

    def there(x):
        return cp.asarray(x.detach().numpy()) if isinstance(x, torch.Tensor) else x

    def all_there(operands):
        return {name: there(x) for name, x in operands.items()}

    def back(results):
        return tuple(torch.from_numpy(x.get()) for x in results)

    def attend(native, q, k, v, out, options, operands):
        return back(compute(arrays.CUPY, there(q), there(k), there(v), None, options, all_there(operands)))

    def differentiate(dout, q, k, v, out, lse, dlse, options, operands):
        given = map(there, (dout, q, k, v, out, lse, dlse))
        return back(compute_gradients(*given, options, all_there(operands)))

    compute, compute_gradients, info = api.attend, api_backward.differentiate, tensors._info
    monkeypatch.setattr(adapter.api, "attend", attend)
    monkeypatch.setattr(adapter.api_backward, "differentiate", differentiate)
    monkeypatch.setattr(tensors, "_info", lambda x, pointer: replace(info(x, pointer), device=0))
    return cp


FORMULA = "tanh(score / cap) * cap + slope[h] * (kv - q) * rate + offset"
MASK = "kv <= q + shift"


def leaves():
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 30, 4, 64), "k": (2, 40, 2, 64), "v": (2, 40, 2, 64)}
    made = {n: torch.randn(s, generator=generator).half().requires_grad_() for n, s in shapes.items()}
    made["slope"] = torch.rand(4, generator=generator).requires_grad_()
    made["offset"] = torch.rand((), generator=generator).requires_grad_()
    return made


def loss(q, k, v, slope, offset, cap=3.0):
    args = {"slope": slope, "cap": cap, "rate": 0.25, "shift": 10, "offset": offset}
    out, lse = cuflash.attention(q, k, v, score_mod=FORMULA, mask_mod=MASK, mod_args=args, return_lse=True)
    return out.float().square().sum() + lse.sum()


def expected(q, k, v, slope, offset, cap=3.0):
    """The loss, by PyTorch's own operations in float32."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    i, j = torch.arange(30)[:, None], torch.arange(40)
    score = torch.tanh(q @ k.mT / 8 / cap) * cap + slope[:, None, None] * (j - i) * 0.25 + offset
    score = score.masked_fill(j > i + 10, float("-inf"))
    return (score.softmax(-1) @ v).square().sum() + score.logsumexp(-1).sum()


def check(function, **options):
    inputs = leaves()
    wanted = torch.autograd.grad(expected(*inputs.values(), **options), list(inputs.values()))
    actual = torch.autograd.grad(function(*inputs.values(), **options), list(inputs.values()))
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=2e-2)


def test_autograd_gives_the_gradients_of_inputs_and_arguments(on_gpu):
    check(loss)


def test_only_the_gradients_that_are_needed_are_asked_for(on_gpu, monkeypatch):
    seen = []
    differentiate = adapter.api_backward.differentiate
    monkeypatch.setattr(
        adapter.api_backward,
        "differentiate",
        lambda *arguments: seen.append(arguments[7].wanted) or differentiate(*arguments),
    )
    for names, wanted in ((["q"], ()), (["v", "slope"], ("mod_args['slope']",))):
        inputs = {name: x.detach().requires_grad_(name in names) for name, x in leaves().items()}
        loss(*inputs.values()).backward()
        assert seen.pop() == wanted


def test_an_argument_that_requires_grad_is_enough(on_gpu):
    inputs = {name: x.detach() for name, x in leaves().items()}
    inputs["slope"].requires_grad_()
    loss(*inputs.values()).backward()
    assert inputs["slope"].grad.abs().sum() > 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_makes_one_graph_with_the_same_gradients(on_gpu, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    re.purge()  # as in a process that never called it in eager mode: Dynamo cannot trace re's compiler
    check(compiled)
    check(compiled, cap=2.0)


def test_func_grad_and_vmap(on_gpu):
    inputs = {name: x.detach() for name, x in leaves().items()}
    by = tuple(range(len(inputs)))
    reference = torch.func.grad(expected, by)(*inputs.values())
    actual = torch.func.grad(loss, by)(*inputs.values())
    stacked = [torch.stack([x, x]) for x in inputs.values()]
    mapped = torch.func.vmap(torch.func.grad(loss, by))(*stacked)
    for got, each, want in zip(actual, mapped, reference, strict=True):
        torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(each[1].float(), want.float(), atol=2e-2, rtol=2e-2)


def test_numbers_reach_the_kernels_as_they_are():
    for value in (3, -7, 0.1, 1e-30, -2.5e300, float("inf"), -float("inf"), 0.0):
        given = {"score_mod": "x", "mod_args": {"x": value}}
        modifiers, operands = cuflash.modifiers.collect(given)
        again, numbers = torch_schema.restore(torch_schema.flatten(modifiers, operands, None))
        assert (again, numbers) == (modifiers, operands)
        assert type(numbers["mod_args['x']"]) is type(value)


def test_an_error_names_the_formula_while_it_is_traced(on_gpu):
    torch._dynamo.reset()
    inputs = leaves()

    def call(q, k, v):
        return cuflash.attention(q, k, v, score_mod="score + nothing").sum()

    with pytest.raises(Exception, match="score_mod mentions nothing, which it does not know"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(inputs["q"], inputs["k"], inputs["v"])
