"""Measurements, stored as they come; what is stored is not measured again.

Usage: python -m benchmarks [SECTION …] [--again] [--only TEXT]
       python -m benchmarks side-by-side [OPTION …]        (its own options: --help)

import        what importing the package adds to importing torch
recovery      the networks of chapter recursion
resistant     CNN6-d over five photographs
audit         what an audit costs
scaling       pixels, depth, width, batch, precision, dense least squares; a GPU where there is one
growth        the pixels alone
side-by-side  published systems, from checkouts of yours
budgets       the course itself: chapters, tests, book, pages; fails beyond its budgets
design        the trainings that chapter design draws from
schedule      the searches that chapter schedule draws from
tokens        the sentences that chapter tokens draws from
learned       torchvision's networks after training, beside fresh ones
trained       the network that chapter rank trains, while it learns
zoo           torchvision's networks, a small one of each family: audits and recoveries
rates         some of them over photographs and draws of their weights
campaign      what claims certainty, over thousands of random cases
mutants       small changes to the package, and whether a test notices them

Without a section: the first five. Figures go to book/data/benchmarks.json, which the pages
benchmarks, zoo and trust of the book draw; those of design, schedule and tokens to files of their
own.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from importlib import import_module

from .measure import Options, environment

USUAL = ("import", "recovery", "resistant", "audit", "scaling")


def main(arguments: list[str]) -> int:
    """Measure the sections named; the exit status says whether a budget is exceeded."""
    os.environ.update(environment(int(os.environ.get("OMP_NUM_THREADS", "1"))))
    if arguments[:1] == ["side-by-side"]:
        from . import side_by_side

        side_by_side.main(arguments[1:])
        return 0
    wanted = parser().parse_args(arguments)
    options = Options(wanted.again, wanted.only)
    return max(measure(name, options) for name in wanted.sections or USUAL)


def parser() -> argparse.ArgumentParser:
    """Of every section but side-by-side, which has its own."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    options.add_argument("sections", nargs="*", metavar="SECTION", choices=[*SECTIONS, []])
    options.add_argument("--again", action="store_true", help="measure what is stored, too")
    options.add_argument("--only", default="", metavar="TEXT", help="cells with this in their key")
    return options


# section: module, function, and what its cells' keys hold
SECTIONS = {
    "import": ("budgets", "main", "import"),
    "recovery": ("nets", "recovery", ""),
    "resistant": ("nets", "resistant", ""),
    "audit": ("nets", "audit", ""),
    "scaling": ("scaling", "main", ""),
    "growth": ("scaling", "main", "pixels/"),
    "budgets": ("budgets", "main", ""),
    "design": ("design", "measure", ""),
    "schedule": ("schedule", "measure", ""),
    "tokens": ("tokens", "measure", ""),
    "trained": ("trained", "measure", ""),
    "learned": ("trained", "learned", ""),
    "zoo": ("zoo", "zoo", ""),
    "rates": ("zoo", "rates", ""),
    "campaign": ("campaign", "campaign", ""),
    "mutants": ("mutants", "mutants", ""),
}


def measure(section: str, options: Options) -> int:
    """One section; its module is loaded only now, since some need more than others."""
    module, function, key = SECTIONS[section]
    call = getattr(import_module(f"benchmarks.{module}"), function)
    status: int = call(replace(options, only=options.only or key))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
