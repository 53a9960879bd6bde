"""The command line: ``python -m cuflash demo`` and ``python -m cuflash info``."""

from __future__ import annotations

import argparse
import sys

from cuflash import demo, info


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "info":
        return info.main()
    try:
        demo.run(options.device, options.heads, options.max_seqlen)
    except demo.DemoError as error:
        print(f"cuflash demo: {error}", file=sys.stderr)
        return 2
    return 0


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
    return parser


if __name__ == "__main__":
    sys.exit(main())
