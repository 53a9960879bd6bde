"""The generating example on the CPU: with its cache it writes what the plain implementation writes."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from examples import generate, generate_model, generate_plain, training
from examples.generate_model import Model, Shape

COUNT = 12
PROMPTS = [prompt.encode() for prompt in generate.PROMPTS]
TINY = Shape(layers=2, width=16, heads_q=4, heads_kv=2, head_dim=8, hidden=24, context=64)


@pytest.fixture(scope="module")
def model() -> Model:
    return generate_model.load()


def random_model() -> Model:
    """Weights large enough that every layer matters."""
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.normal, 0.0, 0.4)
    block = {
        "qkv": (sum(TINY.heads) * TINY.head_dim, TINY.width),
        "mix": (TINY.width, TINY.heads_q * TINY.head_dim),
        "widen": (2 * TINY.hidden, TINY.width),
        "narrow": (TINY.width, TINY.hidden),
        "norm_attention": (TINY.width,),
        "norm_mlp": (TINY.width,),
    }
    shapes: dict[str, Any] = {f"blocks.{i}.{n}": s for i in range(TINY.layers) for n, s in block.items()}
    shapes |= {"tokens": (TINY.vocabulary, TINY.width), "norm": (TINY.width,)}
    return Model(TINY, {name: draw(shape).astype(np.float16) for name, shape in shapes.items()}, {})


@pytest.mark.parametrize(("temperature", "page_size"), [(0.0, None), (0.8, 16)])
def test_texts_are_those_of_the_plain_implementation(
    model: Model, temperature: float, page_size: int | None
) -> None:
    noise = generate.make_noise(model, len(PROMPTS), temperature, seed=1)
    texts, _ = generate.generate(np, model, PROMPTS, COUNT, noise, page_size=page_size)
    assert [len(text) for text in texts] == [len(prompt) + COUNT for prompt in PROMPTS]
    differences, closest = generate.compare(model, PROMPTS, texts, noise)
    print(f"closest choices: {closest}")
    assert not differences


@pytest.mark.parametrize("page_size", [None, 48])
@pytest.mark.parametrize("bug", ["none", "rotary_interleaved", "causal", "cache_seqlens", "lengths"])
def test_a_wrong_use_of_the_cache_writes_something_else(
    bug: str, page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison notices pairs of the other kind, a prompt that sees its future, a wrong length."""
    right = cuflash.attention_kv_cache

    def wrong(q: Any, *caches: Any, **options: Any) -> Any:
        lengths = options["cache_seqlens"]
        if bug == "rotary_interleaved":
            options[bug] = True
        elif bug == "causal":
            options[bug] = q.shape[1] == 1
        elif bug == "cache_seqlens":
            options[bug] = lengths // 2
        elif bug == "lengths":  # one for all texts
            options["cache_seqlens"] = np.full_like(lengths, lengths.max())
        return right(q, *caches, **options)

    monkeypatch.setattr(cuflash, "attention_kv_cache", wrong)
    model = random_model()
    noise = generate.make_noise(model, len(PROMPTS), 0.0, seed=0)
    texts, _ = generate.generate(np, model, PROMPTS, COUNT, noise, page_size=page_size)
    differences, _ = generate.compare(model, PROMPTS, texts, noise)
    assert (differences == []) == (bug == "none")


def test_weights_are_small_and_as_good_as_their_file_says(model: Model) -> None:
    assert generate_model.WEIGHTS_PATH.stat().st_size <= 2e6
    assert {weight.dtype for weight in model.weights.values()} == {np.dtype(np.float16)}
    assert model.training["command"]
    weights = {name: weight.astype(np.float64) for name, weight in model.weights.items()}
    held_out = training.TEXT[-len(training.TEXT) // 10 :]
    losses = []
    for start in range(0, len(held_out) - model.shape.context, 4096):
        piece = held_out[start : start + model.shape.context + 1]
        scores = generate_plain.logits(model, weights, piece[:-1])
        losses.append(np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(scores)), piece[1:]])
    assert np.mean(losses) == pytest.approx(model.training["validation_loss"], abs=0.3)


def test_a_trained_model_is_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from examples import generate_train

    monkeypatch.setattr(training, "TEXT", training.TEXT[:2000])
    trained = generate_train.train(TINY, steps=3, batch=2, device="cpu")
    assert trained.training["step"] == 3
    trained.save(tmp_path / "weights.npz")
    model = generate_model.load(tmp_path / "weights.npz")
    assert (model.shape, model.training) == (TINY, trained.training)
    assert model.weights.keys() == trained.weights.keys() == random_model().weights.keys()
    assert all((model.weights[name] == weight).all() for name, weight in trained.weights.items())


def test_the_trainings_decoder_is_the_plain_one() -> None:
    torch = pytest.importorskip("torch")
    from examples.generate_train import Decoder

    model = random_model()
    weights = {name: weight.astype(np.float64) for name, weight in model.weights.items()}
    decoder = Decoder(TINY)
    decoder.load_state_dict({f"{name}.weight": torch.from_numpy(x) for name, x in weights.items()})
    tokens = training.TEXT[:40]
    with torch.no_grad():
        logits = decoder(torch.tensor(tokens[None]).long())[0]
    np.testing.assert_allclose(logits, generate_plain.logits(model, weights, tokens), atol=1e-4)


def test_a_token_that_differs_is_named_with_its_margin(model: Model) -> None:
    noise = generate.make_noise(model, 1, 0.0, seed=0)
    (text,), _ = generate.generate(np, model, PROMPTS[:1], 4, noise)
    wrong = text[:-1] + bytes([text[-1] ^ 1])
    (difference,), (closest,) = generate.compare(model, PROMPTS[:1], [wrong], noise)
    assert f"token {len(text) - 1} differs, where the margin is " in difference
    assert closest > 0


@pytest.mark.parametrize("prompt", [b"", b"x" * 510])
def test_a_prompt_that_cannot_grow_is_an_error(model: Model, prompt: bytes) -> None:
    noise = generate.make_noise(model, 1, 0.0, seed=0)
    with pytest.raises(ValueError, match=f"a prompt of {len(prompt)} tokens cannot grow by 3"):
        generate.generate(np, model, [prompt], 3, noise)


def test_the_command_line_writes_and_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--tokens", "3", "--prompt", "Light", "--check"]
    monkeypatch.setattr(sys, "argv", ["generate", *options])
    generate.main()
    out = capsys.readouterr().out
    assert "\nLight" in out
    assert "tokens/s" in out
    assert "The plain implementation writes the same 3 tokens" in out
