"""The command line: ``python -m cuflash demo``, ``info`` and, in a checkout, ``bench``."""

from __future__ import annotations

import argparse
import sys

from cuflash import demo, info


def main(arguments: list[str] | None = None) -> int:
    options, rest = _parser().parse_known_args(arguments)
    if options.command == "bench":
        return _bench(options, rest)
    if rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "info":
        return info.main()
    try:
        demo.run(options.device, options.heads, options.max_seqlen)
    except demo.DemoError as error:
        print(f"cuflash demo: {error}", file=sys.stderr)
        return 2
    return 0


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    """The benchmarks are not part of an installed package: their results files are of the repository."""
    try:
        from benchmarks import claims, run
        from benchmarks.results import RESULTS_DIR
    except ImportError as error:
        print(f"cuflash bench: run it in a checkout of the repository ({error})", file=sys.stderr)
        return 2
    if options.claims:
        print(claims.table(claims.load(RESULTS_DIR)))
        return 0
    return run.main(rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cuflash", description="Exact FlashAttention.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo_parser = commands.add_parser(
        "demo",
        help="attention on real text: what attends to what, and error, time and memory",
        description="Compute causal attention over Newton's Opticks with cuflash and with standard "
        "attention: which words attend to which; error, time, speed-up and memory at growing lengths.",
    )
    demo_parser.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="where to compute; auto takes the GPU if the kernels can run on it (default: auto)",
    )
    demo_parser.add_argument(
        "--heads", type=int, help="attention heads of 64 dimensions (default: 4 on the CPU, 16 on a GPU)"
    )
    demo_parser.add_argument(
        "--max-seqlen", type=int, help="longest sequence, in words (default: 4096 on the CPU, 32768 on a GPU)"
    )
    commands.add_parser(
        "info",
        help="versions, device, kernel cache, and which kernel families can run here",
        description="Print versions, device, kernel cache, and which kernel families run here or why not.",
    )
    bench_parser = commands.add_parser(
        "bench",
        help="in a checkout: measure (see python -m benchmarks.run --help), or print the claims table",
        description="Without --claims: python -m benchmarks.run with the same arguments.",
        add_help=False,
    )
    bench_parser.add_argument(
        "--claims", action="store_true", help="what the papers claim beside what was measured here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
