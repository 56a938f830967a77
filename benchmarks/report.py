"""The table of results: printed as it grows, kept as JSON, compared."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """A line of the table: a value in a unit, and its ratio to the limit that is named."""

    name: str
    what: str
    connections: int
    value: float
    unit: str
    p50: float | None = None
    p99: float | None = None
    ratio: float | None = None
    limit: str = ""
    note: str = ""


class Report:
    """The table, printed as it grows."""

    LINE = "{:<19} {:<38} {:>5} {:>9} {:<10} {:>8} {:>8} {:>7}  {}"

    def __init__(self) -> None:
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        """Print and keep a result."""
        if not self.results:
            print(
                self.LINE.format(
                    "row", "what", "conn.", "value", "unit", "p50 ms", "p99 ms", "ratio", "to"
                )
            )
        self.results.append(result)
        print(
            self.LINE.format(
                result.name,
                result.what,
                result.connections,
                digits(result.value),
                result.unit,
                digits(result.p50),
                digits(result.p99),
                digits(result.ratio),
                f"{result.limit}  {result.note}".strip(),
            ),
            flush=True,
        )

    def save(self, path: str, options: argparse.Namespace) -> None:
        """Write the results for --compare."""
        machine = {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        Path(path).write_text(
            json.dumps(
                {
                    "machine": machine,
                    "options": vars(options),
                    "results": [asdict(result) for result in self.results],
                },
                indent=1,
            )
            + "\n"
        )


def digits(value: float | None) -> str:
    """Return a number with three digits or all before the point, "" for None."""
    if value is None:
        return ""
    places = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:,.{places}f}"


def compare(paths: Sequence[str]) -> None:
    """Print the values of two files of results beside each other, and the second by the first."""
    before, after = (
        {
            (found["name"], found["what"], found["connections"]): found
            for found in json.loads(Path(path).read_text())["results"]
        }
        for path in paths
    )
    line = "{:<19} {:<38} {:>5} {:<10} {:>10} {:>10} {:>7} {:>7}"
    print(line.format("row", "what", "conn.", "unit", "A", "B", "B / A", "p99"))
    for key in (key for key in before if key in after):
        old, new = before[key], after[key]
        p99 = new["p99"] / old["p99"] if old["p99"] and new["p99"] else None
        print(
            line.format(
                *key,
                old["unit"],
                digits(old["value"]),
                digits(new["value"]),
                digits(new["value"] / old["value"]),
                digits(p99),
            )
        )
