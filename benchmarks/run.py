"""Run a benchmark and write its results file.

python -m benchmarks.run forward                         the grid, against SDPA's flash backend and cuDNN
python -m benchmarks.run backward --deterministic        the same of gradients; also deterministic ones
python -m benchmarks.run decode                          steps of decoding over a KV cache, against FA3, SDPA
python -m benchmarks.run decode-pages                    what pages cost, by how they lie in memory
python -m benchmarks.run host                            host time of a call, cold and warm first call
python -m benchmarks.run jax-call                        cost of a call in JAX: buffer_callback, FFI, jax.nn
python -m benchmarks.run counters                        how busy kernels keep the GPU, by ncu
python -m benchmarks.run tiles                           candidate tiles of FA2 forward, against SDPA's flash
python -m benchmarks.run train                           loss curves of a small GPT, with each attention
python -m benchmarks.run gpt2                            steps of GPT-2, with each attention
python -m benchmarks.run memory                          memory beyond inputs and outputs, by each family
python -m benchmarks.run matmul                          the rate of large matrix products
python -m benchmarks.run modifiers                       the cost of modifiers, and FlexAttention's time
python -m benchmarks.run varlen                          packed documents, against dense and others' varlen

Every benchmark takes --results-dir and --commit, tiles also --budget-ms, train also --steps, counters also
--families and --topic, modifiers also --cases, --shapes, --algorithm or --families (such as hopper,fa2, which
then take turns), --budget-ms and --topic, varlen also --budget-ms, decode and decode-pages also --points,
--splits, --topic and --budget-ms; the other options are forward's and backward's.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from benchmarks import machine
from benchmarks.options import add_options, topic, workloads
from benchmarks.peers import DoesNotFitError
from benchmarks.results import TIMES, Recorder, Row
from benchmarks.tables import candidate_label
from benchmarks.workload import Workload

Point = TypeVar("Point")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything asked for was measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Run a benchmark.")
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS))
    add_options(parser.add_argument)
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.run", *arguments])
    return BENCHMARKS[options.benchmark](options, command)


def _speed(options: argparse.Namespace, command: str) -> int:
    direction = options.benchmark
    if reason := machine.why_no_torch():
        return _skip(direction, reason)
    from benchmarks import speed

    def measure(workload: Workload) -> list[Row]:
        prepared = speed.prepare(
            workload, options.algorithm, options.peers, deterministic=options.deterministic
        )
        return speed.measure(prepared, budget_ms=options.budget_ms, burst=options.burst)

    header = machine.header(command, options.commit, speed.METHODS[direction])
    recorder = Recorder(options.results_dir, topic(options, direction), header)
    return _record(workloads(options, direction), measure, recorder)


def _decode(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_torch():
        return _skip(options.benchmark, reason)
    from benchmarks import decode

    def measure(point: decode.Point) -> list[Row]:
        return decode.measure(point, options.splits, budget_ms=options.budget_ms)

    header = machine.header(command, options.commit, decode.METHOD)
    all_points = decode.PAGE_ORDERS if options.benchmark == "decode-pages" else decode.POINTS
    points = [point for point in all_points if re.search(options.points, str(point))]
    return _record(points, measure, Recorder(options.results_dir, options.topic or options.benchmark, header))


def _host(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_cupy():
        return _skip("host", reason)
    from benchmarks import host

    steady = host.steady_us(host.POINTS)

    def measure(point: host.Point) -> list[Row]:
        return [host.measure(point, steady)]

    header = machine.header(command, options.commit, host.METHOD)
    return _record(host.POINTS, measure, Recorder(options.results_dir, "host", header))


def _jax_call(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_jax():
        return _skip("jax-call", reason)
    from benchmarks import jax_call

    expected = jax_call.reference()

    def measure(contender: str) -> list[Row]:
        return [jax_call.measure(contender, expected)]

    header = machine.header(command, options.commit, jax_call.METHOD)
    return _record(jax_call.CONTENDERS, measure, Recorder(options.results_dir, jax_call.TOPIC, header))


def _counters(options: argparse.Namespace, command: str) -> int:
    from benchmarks import counters

    if reason := machine.why_no_torch() or counters.why_not():
        return _skip("counters", reason)
    header = machine.header(command, options.commit, counters.METHOD)
    recorder = Recorder(options.results_dir, options.topic or "counters", header)
    return _record(["all"], lambda _: counters.measure(options.families or counters.FAMILIES), recorder)


def _tiles(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_torch():
        return _skip("tiles", reason)
    from benchmarks import tiles, timing

    def measure(workload: Workload) -> list[Row]:
        return tiles.measure(workload, budget_ms=options.budget_ms)

    header = machine.header(command, options.commit, timing.METHOD)
    tiles.compile_all()
    return _record(tiles.WORKLOADS, measure, Recorder(options.results_dir, tiles.TOPIC, header))


def _train(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_torch():
        return _skip("train", reason)
    from benchmarks import train

    def measure(curve: train.Curve) -> list[Row]:
        return [train.measure_curve(curve, options.steps)]

    header = machine.header(command, options.commit, train.CURVES_METHOD)
    return _record(train.CURVES, measure, Recorder(options.results_dir, train.CURVES_TOPIC, header))


def _gpt2(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_torch():
        return _skip("gpt2", reason)
    from benchmarks import train

    header = machine.header(command, options.commit, train.GPT2_METHOD)
    recorder = Recorder(options.results_dir, train.GPT2_TOPIC, header)
    return _record(train.POINTS, train.measure_steps, recorder)


def _memory(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_torch():
        return _skip("memory", reason)
    from benchmarks import memory

    header = machine.header(command, options.commit, memory.METHOD)
    return _record(memory.POINTS, memory.measure, Recorder(options.results_dir, memory.TOPIC, header))


def _matmul(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_torch():
        return _skip("matmul", reason)
    from benchmarks import matmul

    def measure(product: matmul.Product) -> list[Row]:
        return matmul.measure(product, budget_ms=options.budget_ms)

    header = machine.header(command, options.commit, matmul.METHOD)
    return _record(matmul.PRODUCTS, measure, Recorder(options.results_dir, matmul.TOPIC, header))


def _modifiers(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_torch():
        return _skip("modifiers", reason)
    from benchmarks import modifiers

    algorithms = options.families or (options.algorithm,)

    def measure(point: modifiers.Point) -> list[Row]:
        return modifiers.measure(point, algorithms, budget_ms=options.budget_ms)

    header = machine.header(command, options.commit, modifiers.METHOD)
    recorder = Recorder(options.results_dir, options.topic or modifiers.TOPIC, header)
    return _record(modifiers.points(options.cases, options.shapes), measure, recorder)


def _varlen(options: argparse.Namespace, command: str) -> int:
    if reason := machine.why_no_torch():
        return _skip("varlen", reason)
    from benchmarks import varlen

    def measure(point: varlen.Point) -> list[Row]:
        return varlen.measure(point, budget_ms=options.budget_ms)

    header = machine.header(command, options.commit, varlen.METHOD)
    return _record(varlen.POINTS, measure, Recorder(options.results_dir, varlen.TOPIC, header))


BENCHMARKS = {
    "forward": _speed,
    "backward": _speed,
    "decode": _decode,
    "decode-pages": _decode,
    "host": _host,
    "jax-call": _jax_call,
    "counters": _counters,
    "tiles": _tiles,
    "train": _train,
    "gpt2": _gpt2,
    "memory": _memory,
    "matmul": _matmul,
    "modifiers": _modifiers,
    "varlen": _varlen,
}


def _record(points: Iterable[Point], measure: Callable[[Point], list[Row]], into: Recorder) -> int:
    """Measure and record each point; one that fails is named, leaves no row, and does not stop the others.

    One whose score matrix does not fit in memory is named too, and no failure.
    """
    failed = 0
    for point in points:
        try:
            rows = measure(point)
        except DoesNotFitError as error:
            into.skip(str(point), str(error))
            print(f"{point}: SKIPPED: {error}", flush=True)
        except Exception as error:  # whatever a kernel under test can do wrong
            failed += 1
            print(f"{point}: FAILED {type(error).__name__}: {error}", flush=True)
        else:
            for row in rows:
                into.add(row)
                failed += "error" in row
                print(f"{point}: {summary(row)}", flush=True)
    print(f"{into.path}: {failed} failed")
    return 1 if failed else 0


def summary(row: Row) -> str:
    """One line of a row's figures, with our speed over each peer's."""
    if row["direction"] in TIMES:
        told = row.get("error") or ", ".join(f"{name} {row[name]}" for name in TIMES[row["direction"]])
        told += "".join(f", no {name} (see peer_errors)" for name in row.get("peer_errors", {}))
        return f"{row['family']}: {told}" if row["direction"] == "train" else told
    peers = [f"{name} {peer:.0f} (x{row['tflops'] / peer:.2f})" for name, peer in row["peers"].items()]
    absent = [f"no {name} (see peer_errors)" for name in row["peer_errors"]]
    candidate = f"{candidate_label(row['features'])}: " if row["features"] else ""
    return candidate + ", ".join([f"{row['tflops']:.0f} TFLOP/s", *peers, *absent])


def _skip(name: str, reason: str) -> int:
    """Said plainly and not counted as success: nothing was measured."""
    print(f"SKIPPED {name}: {reason}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
