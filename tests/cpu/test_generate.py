"""The generating example on the CPU: with its cache it writes what the plain implementation writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from examples import generate, generate_model, generate_plain, training
from examples.generate_model import Model, Shape

COUNT = 16
PROMPTS = [prompt.encode() for prompt in generate.PROMPTS]
TINY = Shape(layers=2, width=16, heads_q=4, heads_kv=2, head_dim=8, hidden=24, context=64)


@pytest.fixture(scope="module")
def model() -> Model:
    return generate_model.load()


@pytest.mark.parametrize(("temperature", "page_size"), [(0.0, None), (0.0, 16), (0.8, None), (0.8, 48)])
def test_texts_are_those_of_the_plain_implementation(
    model: Model, temperature: float, page_size: int | None
) -> None:
    noise = generate.make_noise(model, len(PROMPTS), temperature, seed=1)
    texts, _ = generate.generate(np, model, PROMPTS, COUNT, noise, page_size=page_size)
    assert [len(text) for text in texts] == [len(prompt) + COUNT for prompt in PROMPTS]
    differences, closest = generate.compare(model, PROMPTS, texts, noise)
    print(f"closest choice: {closest:.1e}")
    assert not differences


@pytest.mark.parametrize("bug", ["rotary_interleaved", "causal", "cache_seqlens", "lengths"])
def test_a_wrong_use_of_the_cache_writes_something_else(
    model: Model, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison would notice: pairs of the other kind, a prompt that sees its future, a lost prompt."""
    right = cuflash.attention_kv_cache

    def wrong(q: Any, *caches: Any, **options: Any) -> Any:
        if bug == "rotary_interleaved":
            options[bug] = True
        elif bug == "causal":
            options[bug] = q.shape[1] == 1
        elif bug == "cache_seqlens":
            options[bug] = options[bug] // 2
        else:  # one for all texts
            options["cache_seqlens"] = np.full_like(options["cache_seqlens"], options["cache_seqlens"].max())
        return right(q, *caches, **options)

    monkeypatch.setattr(cuflash, "attention_kv_cache", wrong)
    noise = generate.make_noise(model, len(PROMPTS), 0.8, seed=1)
    texts, _ = generate.generate(np, model, PROMPTS, COUNT, noise)
    differences, _ = generate.compare(model, PROMPTS, texts, noise)
    assert differences


def test_weights_are_small_and_as_good_as_their_file_says(model: Model) -> None:
    assert generate_model.WEIGHTS_PATH.stat().st_size <= 2e6
    assert {weight.dtype for weight in model.weights.values()} == {np.dtype(np.float16)}
    assert model.training["command"]
    held_out = training.TEXT[-model.shape.context - 1 :]
    weights = {name: weight.astype(np.float64) for name, weight in model.weights.items()}
    scores = generate_plain.logits(model, weights, held_out[:-1])
    losses = np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(scores)), held_out[1:]]
    assert losses.mean() == pytest.approx(model.training["validation_loss"], abs=0.5)


def test_a_trained_model_is_saved_loaded_and_understood_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training's decoder, the plain implementation's and the one with a cache are one model."""
    torch = pytest.importorskip("torch")
    from examples import generate_train

    monkeypatch.setattr(training, "TEXT", training.TEXT[:2000])
    trained = generate_train.train(TINY, steps=3, batch=2, device="cpu")
    assert trained.training["step"] == 3
    trained.save(tmp_path / "weights.npz")
    model = generate_model.load(tmp_path / "weights.npz")
    assert (model.shape, model.training) == (TINY, trained.training)

    # Weights as large as those of a long training, so that the layers matter.
    rng = np.random.default_rng(0)
    model.weights.update({n: rng.normal(0, 0.5, w.shape).astype("e") for n, w in model.weights.items()})
    weights = {name: weight.astype(np.float64) for name, weight in model.weights.items()}
    decoder = generate_train.Decoder(TINY)
    decoder.load_state_dict({f"{name}.weight": torch.from_numpy(x) for name, x in weights.items()})
    tokens = training.TEXT[:40]
    with torch.no_grad():
        ours = decoder(torch.tensor(tokens[None]).long())[0]
    np.testing.assert_allclose(ours, generate_plain.logits(model, weights, tokens), atol=1e-4)
    noise = generate.make_noise(model, 1, 0.0, seed=0)
    texts, _ = generate.generate(np, model, [b"T"], 10, noise)
    assert generate.compare(model, [b"T"], texts, noise)[0] == []


def test_a_token_that_differs_is_named_with_its_margin(model: Model) -> None:
    noise = generate.make_noise(model, 1, 0.0, seed=0)
    (text,), _ = generate.generate(np, model, PROMPTS[:1], 4, noise)
    wrong = text[:-1] + bytes([text[-1] ^ 1])
    (difference,), closest = generate.compare(model, PROMPTS[:1], [wrong], noise)
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
