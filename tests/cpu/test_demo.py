"""``python -m cuflash demo``: what it prints is there, is true, and comes out wherever it is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuflash
from cuflash import data, demo, reference

ROOT = Path(cuflash.__file__).resolve().parents[1]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def run_demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # One BLAS thread: with other work on the machine, threads that wait for each other make this crawl.
    environment = {**os.environ, "PYTHONPATH": search, "OPENBLAS_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "cuflash", "demo", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


@pytest.fixture(scope="module")
def text() -> data.Text:
    return data.read_text()


@pytest.fixture(scope="module")
def vectors(text: data.Text) -> np.ndarray:
    return data.word_vectors(text)


@pytest.fixture(scope="module")
def printed() -> str:
    """The output of a small run on the CPU."""
    finished = run_demo("--device", "cpu", "--heads", "2", "--max-seqlen", "512")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


def test_says_where_it_ran_and_what_it_showed(printed: str) -> None:
    assert "Computing on the CPU" in printed.splitlines()[0]
    assert "Kernel family: cpu" in printed
    assert "CPU path" in printed.splitlines()[-2] + printed.splitlines()[-1]


def test_a_pipe_gets_plain_lines(printed: str) -> None:
    assert "\x1b" not in printed
    assert "\r" not in printed
    assert max(map(len, printed.splitlines())) <= demo.PIPE_WIDTH


def test_table_has_every_length_with_small_errors(printed: str) -> None:
    rows = [line.split("│") for line in printed.splitlines() if re.match(r" +\d+ │", line)]
    assert [row[0].strip() for row in rows] == ["256", "512"]
    for row in rows:
        ours, standard = float(row[1]), float(row[2])
        assert 0 < ours <= 2 * standard + 1e-5
        assert 0 < standard < 1e-5


def test_printed_weights_are_those_of_a_plain_softmax(
    printed: str, text: data.Text, vectors: np.ndarray
) -> None:
    sentence = demo.SENTENCE.split()
    end = text.find(sentence) + len(sentence)
    ids = text.ids[end - 512 : end]
    directions = vectors[:, : demo.HEAD_DIM]
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    for word in demo.QUERIES:
        position = len(ids) - len(sentence) + sentence.index(word)
        seen = ids[: position + 1]
        weights = np.exp(demo.SCALE * directions[seen] @ directions[ids[position]])
        weights /= weights.sum()
        [line] = [line for line in printed.splitlines() if line.strip().startswith(f"{word} →")]
        listed = re.findall(r"(\S+) (0\.\d+)", line)
        assert len(listed) == demo.SHOWN_WORDS
        for other, weight in listed:
            expected = weights[seen == text.vocabulary.index(other)].sum()
            assert float(weight) == pytest.approx(expected, abs=6e-4)


def test_vectors_are_the_same_every_time(text: data.Text, vectors: np.ndarray) -> None:
    np.testing.assert_array_equal(data.word_vectors(text), vectors)


@pytest.mark.parametrize(
    ("word", "related", "unrelated"),
    [("violet", "indigo", "telescope"), ("incidence", "sine", "violet"), ("sun", "shone", "incidence")],
)
def test_words_used_alike_have_vectors_alike(
    text: data.Text, vectors: np.ndarray, word: str, related: str, unrelated: str
) -> None:
    directions = vectors[:, : demo.HEAD_DIM]
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = directions @ directions[text.vocabulary.index(word)]
    nearest = [text.vocabulary[i] for i in np.argsort(-cosines)[1:11]]
    assert related in nearest
    assert cosines[text.vocabulary.index(unrelated)] < 0.5 * cosines[text.vocabulary.index(related)]


def test_standard_attention_is_standard(text: data.Text, vectors: np.ndarray) -> None:
    q, k, v = demo.attention_inputs(vectors, text.ids[:100], 3, np.float32)
    exact, _ = reference.attention(q, k, v, causal_offset=0, scale=demo.SCALE)
    np.testing.assert_allclose(demo.standard_attention(np, q, k, v), exact, rtol=0, atol=2e-6)


def test_errors_are_seen(text: data.Text, vectors: np.ndarray) -> None:
    q, k, v = demo.attention_inputs(vectors, text.ids[:512], 2, np.float32)
    out, _ = reference.attention(q, k, v, causal_offset=0, scale=demo.SCALE)
    exact = demo.exact_blocks(q, k, v)
    assert demo.max_error(out, exact) < 1e-12
    out[0, -1, 1, 5] += 0.25
    assert demo.max_error(out, exact) == pytest.approx(0.25)


def test_standard_attention_that_does_not_fit_is_left_out(
    text: data.Text, vectors: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(demo.Cpu):
        def free_bytes(self) -> int:
            return 10**6

    q, k, v = demo.attention_inputs(vectors, text.ids[:512], 2, np.float32)
    row = demo.measure(Full("a test"), q, k, v)
    assert row.standard is None
    demo.show_table(demo.Console(width=demo.PIPE_WIDTH), [row], heads=2)
    printed = capsys.readouterr().out
    assert "— 512 words: standard attention needs 2.6 MB" in printed
    assert len(re.findall(r"│ +—", printed)) == 4


def test_lengths_end_at_the_one_asked_for() -> None:
    assert demo.table_seqlens(256, 1000) == [256, 512, 1000]
    assert demo.table_seqlens(1024, 1024) == [1024]
    assert demo.table_seqlens(1024, 300) == [300]


def test_without_a_gpu_auto_says_what_the_gpu_kernels_need() -> None:
    finished = run_demo("--heads", "1", "--max-seqlen", "256", **NO_GPU)
    assert finished.returncode == 0, finished.stderr
    assert "need an NVIDIA GPU of compute capability ≥ 8.0" in " ".join(finished.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "need an NVIDIA GPU of compute capability ≥ 8.0"),
        (["--heads", "20"], "--heads must be from 1 to 19, got 20"),
        (["--max-seqlen", "255"], "--max-seqlen must be from 256 to 42866, got 255"),
        (["--heads", "two"], "invalid int value"),
    ],
)
def test_what_cannot_be_done_exits_2_with_the_reason(arguments: list[str], message: str) -> None:
    finished = run_demo(*arguments, **NO_GPU)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""


def test_help_explains_every_option() -> None:
    printed = run_demo("--help").stdout
    for option in ("--device {auto,cpu,gpu}", "--heads", "--max-seqlen"):
        assert option in printed
