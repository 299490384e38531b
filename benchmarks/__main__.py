"""Measure every section (or those named): print tables, write JSON, pictures and pages. --quick only asserts counts.

python -m benchmarks equal accuracy --rows quadratic --methods CG --rounds 3
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import hypergrad as hg

from . import (
    accuracy,
    bilevel,
    blocks,
    checks,
    counts,
    equal,
    estimators,
    loops,
    report,
    scaling,
    size,
    small,
    sums,
    tasks,
    unrolled,
)

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SECTIONS = {
    "equal": equal.SECTION,
    "accuracy": accuracy.SECTION,
    "blocks": blocks.SECTION,
    "unrolled": unrolled.SECTION,
    "loops": loops.SECTION,
    "tasks": tasks.SECTION,
    "bilevel": bilevel.SECTION,
    "sums": sums.SECTION,
    "small": small.SECTION,
    "estimators": estimators.SECTION,
    "size": size.SECTION,
    "checks": checks.SECTION,
    "scaling": scaling.SECTION,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="assert counts on small problems; no times")
    parser.add_argument("--full", action="store_true", help=f"rows of several GiB too: {', '.join(size.FULL)}")
    parser.add_argument("--redraw", action="store_true", help="pictures and pages alone, from the JSON files")
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="only rows whose name holds one of these")
    parser.add_argument("--methods", nargs="+", metavar="WORD", help="only methods whose name holds one of these")
    parser.add_argument("--rounds", type=int, help="rounds of the clock (default: each row's own)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files and pictures")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.quick:
        counts.run()
        return
    if options.redraw:
        for name in options.sections or SECTIONS:
            report.redraw(SECTIONS[name], options.output / f"benchmarks_{name}")
        report.pages(SECTIONS, options.output)
        return
    # The tables list the errors in float32 after K steps; the library's warnings about them would repeat that.
    warnings.simplefilter("ignore", hg.HypergradientWarning)
    for name in tqdm(options.sections or SECTIONS, desc="sections"):
        section = SECTIONS[name]
        rows = [r for r in section.rows() if not options.rows or any(word in r for word in options.rows)]
        rows = [r for r in rows if options.full or r not in size.FULL]
        if rows:
            results, settings = section.measure(rows, options.methods, options.rounds)
            print(
                f"{section.title}\n{report.write(section, results, settings, options.output / f'benchmarks_{name}')}\n"
            )
    report.pages(SECTIONS, options.output)


if __name__ == "__main__":
    main()
