"""Put benchmarks/results/ into README.md and docs/: tables between markers, figures in docs/figures/.

python -m benchmarks.report            rewrite pages and figures
python -m benchmarks.report --check    change nothing; fail if anything is out of date

A page shows a results file, named without ".json", between two lines:

    <!-- results:h100-fa2-forward -->
    <!-- /results -->

"results:NAME" is the whole table; "results:NAME:summary", ":burst", ":candidates", ":against_fa2" and
":figure" are other views of the file. "results:claims" is the table of ``benchmarks.claims``, from all files.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import claims
from benchmarks import results as results_files
from benchmarks.plots import draw, fingerprint, has_figure, title
from benchmarks.results import ROOT, Results
from benchmarks.tables import VIEWS

BLOCK = re.compile(r"<!-- results:(?P<name>[\w.-]+?)(?::(?P<view>\w+))? -->\n.*?<!-- /results -->", re.DOTALL)
CLAIMS = "claims"
MARKER = re.compile(r"<!-- (?:results:\S*|/results) -->")


class ReportError(Exception):
    """The pages and the results do not fit together; the message says what to do."""


@dataclass(frozen=True)
class Report:
    """The pages, results and figures of one checkout."""

    root: Path

    def results(self) -> dict[str, Results]:
        """Every results file, checked, by its name without the suffix."""
        return {path.stem: results_files.load(path) for path in sorted(self.results_dir.glob("*.json"))}

    @property
    def results_dir(self) -> Path:
        return self.root / "benchmarks" / "results"

    def figure(self, name: str) -> Path:
        return self.root / "docs" / "figures" / f"{name}.svg"

    def pages(self) -> list[Path]:
        return [*self.root.glob("README.md"), *sorted(self.root.glob("docs/**/*.md"))]


def outdated_pages(report: Report) -> dict[Path, str]:
    """New text of every page whose blocks no longer say what the results say."""
    results = report.results()
    shown: set[str] = set()
    new: dict[Path, str] = {}
    for page in report.pages():
        old = page.read_text(encoding="utf-8")
        text = rewrite(old, page, report, results, shown)
        if text != old:
            new[page] = text
    if hidden := sorted(results.keys() - shown):
        raise ReportError(
            f"no page shows {', '.join(hidden)}: add <!-- results:{hidden[0]} --> and <!-- /results -->"
        )
    return new


def rewrite(text: str, page: Path, report: Report, results: dict[str, Results], shown: set[str]) -> str:
    """``text`` with every block filled anew; the names it shows are added to ``shown``."""

    def fill(block: re.Match[str]) -> str:
        name, view = block["name"], block["view"] or "table"
        opening = block[0].splitlines()[0]
        if len(MARKER.findall(block[0])) != 2:
            raise ReportError(
                f"{page.name}: {opening} is not closed by <!-- /results --> before the next block"
            )
        if name == CLAIMS:
            return f"{opening}\n\n{claims.table(results)}\n\n<!-- /results -->"
        if name not in results:
            raise ReportError(f"{page.name}: {opening} names no file in benchmarks/results/")
        shown.add(name)
        return f"{opening}\n\n{_view(view, name, page, report, results[name])}\n\n<!-- /results -->"

    if len(MARKER.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise ReportError(
            f"{page.name}: a <!-- results:NAME --> line without <!-- /results -->, or the reverse"
        )
    return BLOCK.sub(fill, text)


def _view(view: str, name: str, page: Path, report: Report, results: Results) -> str:
    if view == "figure":
        if not has_figure(results):
            raise ReportError(f"{page.name}: {name} has no figure; show a table of it")
        path = os.path.relpath(report.figure(name), page.parent).replace(os.sep, "/")
        return f"![{title(results)}]({path})"
    if view not in VIEWS:
        raise ReportError(f"{page.name}: view {view!r} is none of {', '.join([*VIEWS, 'figure'])}")
    return VIEWS[view](results)


def outdated_figures(report: Report) -> dict[str, Callable[[], None]]:
    """For each figure that was drawn of other results, or never, what draws it."""
    redraw: dict[str, Callable[[], None]] = {}
    for name, results in report.results().items():
        mark = fingerprint(report.results_dir / f"{name}.json")
        path = report.figure(name)
        if has_figure(results) and not (path.exists() and mark in path.read_text(encoding="utf-8")):
            redraw[name] = partial(draw, results, mark, path)
    return redraw


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is (or, without --check, now is) as the results say."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Quote the results files."
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if anything is out of date"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to work on (default: this one)")
    options = parser.parse_args(arguments)
    report = Report(options.root.resolve())
    try:
        pages, figures = outdated_pages(report), outdated_figures(report)
    except (ReportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    changed = [
        *(str(page.relative_to(report.root)) for page in pages),
        *(f"figure {name}" for name in figures),
    ]
    if options.check:
        for what in changed:
            print(f"out of date: {what}; run python -m benchmarks.report", file=sys.stderr)
        return 1 if changed else 0
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")
    for redraw in figures.values():
        redraw()
    print("\n".join(f"wrote {what}" for what in changed) or "nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
