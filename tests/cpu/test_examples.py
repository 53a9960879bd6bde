"""The examples train on the CPU, with any attention alike."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest

from examples import training
from examples.training import Size, batches, follow

TINY = Size(layers=1, heads=2, head_dim=16, seqlen=64, batch=4)


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize(("framework", "others"), [("torch", ("standard", "sdpa")), ("jax", ("standard",))])
def test_losses_drop_and_do_not_depend_on_the_attention(framework: str, others: tuple[str, ...]) -> None:
    pytest.importorskip(framework)
    example = importlib.import_module(f"examples.gpt_{framework}")
    ours, _ = follow(example.train(TINY, "cuflash", 30, device="cpu"), silent)
    assert len(ours) == 30
    assert ours[0] == pytest.approx(np.log(256), abs=0.1)  # nothing is known of a byte
    assert ours[-1] < ours[0] - 0.8
    for other in others:
        losses, _ = follow(example.train(TINY, other, 30, device="cpu"), silent)
        np.testing.assert_allclose(ours, losses, atol=1e-4)


def test_batches_are_pieces_of_the_text_and_depend_on_the_seed() -> None:
    tokens = batches(TINY, 3, seed=0)
    assert (tokens.shape, tokens.dtype) == ((3, 4, 65), np.uint8)
    assert all(row.tobytes() in training.TEXT_PATH.read_bytes() for row in tokens.reshape(-1, 65))
    np.testing.assert_array_equal(tokens, batches(TINY, 3, seed=0))
    assert not np.array_equal(tokens, batches(TINY, 3, seed=1))


def test_no_position_sees_the_byte_it_must_tell() -> None:
    torch = pytest.importorskip("torch")
    from examples import gpt_torch

    torch.manual_seed(0)
    model = gpt_torch.GPT(TINY, gpt_torch.flash)
    tokens = torch.from_numpy(batches(TINY, 1, seed=0)[0]).long()
    changed = tokens.clone()
    changed[:, -2] ^= 1
    x, y = (model.blocks(model.tokens(t[:, :-1]) + model.positions) for t in (tokens, changed))
    assert torch.equal(x[:, :-1], y[:, :-1])
    assert not torch.equal(x[:, -1], y[:, -1])


def test_the_command_line_trains_and_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(size: Size, attention: str, steps: int, seed: int, device: str) -> Any:
        assert (size, attention, seed, device) == (Size(head_dim=32), "other", 7, "cpu")
        yield from np.linspace(5, 4, steps)

    arguments = [
        "--attention",
        "other",
        "--steps",
        "12",
        "--seed",
        "7",
        "--device",
        "cpu",
        "--head-dim",
        "32",
    ]
    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    training.main(train, ("cuflash", "other"), lambda device: 12_340_000_000)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 10", "step 12", "other"]
    assert lines[-1].startswith("other: loss 4.0000, ")
    assert lines[-1].endswith("peak memory 12.34 GB")
