"""The generating example on a GPU: in a graph or not, paged or not, it writes what the plain one writes."""

from __future__ import annotations

import pytest

cp = pytest.importorskip("cupy")

from examples import generate, generate_model, generate_plain  # noqa: E402

COUNT = 100
PROMPTS = [prompt.encode() for prompt in generate.PROMPTS]


@pytest.fixture(scope="module", params=[0.0, 0.8], ids=["greedy", "sampled"])
def expected(request):
    model = generate_model.load()
    noise = generate.make_noise(model, len(PROMPTS), request.param, seed=1)
    plain = [
        generate_plain.generate(model, prompt, COUNT, row) for prompt, row in zip(PROMPTS, noise, strict=True)
    ]
    print(f"closest choice: {min(margins.min() for _, margins in plain):.1e}")
    return model, noise, [text for text, _ in plain]


@pytest.mark.parametrize("graph", [False, True], ids=["launched", "graph"])
@pytest.mark.parametrize("page_size", [None, 16, 64])
def test_texts_are_those_of_the_plain_implementation(expected, page_size, graph):
    model, noise, plain = expected
    texts, seconds = generate.generate(cp, model, PROMPTS, COUNT, noise, page_size=page_size, graph=graph)
    print(f"{seconds * 1e6:.0f} µs a step")
    assert texts == plain
