#!/usr/bin/env python3
"""The load bench of scim_server: what it does a second, beside what this machine could do.

    python benchmarks/bench.py                             10 000 users, everything
    python benchmarks/bench.py --users 1000000 --keep DIR  DIR keeps the filled database for the next run
    python benchmarks/bench.py --only lookup,create        some rows, by the start of their names
    python benchmarks/bench.py --database postgresql://…   the same rows, the data on PostgreSQL
    python benchmarks/bench.py --against scim2-server      the same load on a peer
    python benchmarks/bench.py --compare A.json B.json     two results of --json

README.md beside this file says what each row means. Standard library only; Linux, for /proc.

Beside it, load.py makes the load, limits.py knows what the machine could do, people.py is whom the
server knows, report.py prints. Here: the server; rows; start, memory and first sync; the peer; command
line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from limits import NUMBER, SERVER, Limits
from load import BenchError, Json, Load, Requests, Target, Wire, measure, now
from people import (
    ENTERPRISE,
    FACILIO,
    FILL_BATCH,
    PATCH_OP,
    People,
    Progress,
    bulk,
    group_body,
    members_patch,
    person,
    send_bulk,
)
from report import Report, Result, compare, digits

TOKEN = "bench-secret-token"
CONFIG: dict[str, Any] = {
    "data_dir": "data",
    "tenants": [
        {
            "name": "bench",
            "tokens": [{"name": "bench", "secret": TOKEN}],
            "custom_fields": [
                {"link_name": "costcode", "type": "String"},
                {"link_name": "badge_number", "type": "Integer"},
            ],
        }
    ],
}
PAGE = 100  # resources in a page of the list rows
GROUP_SIZES = (10, 1_000, 10_000, 100_000)


# -- The server ----------------------------------------------------------------------


# Runs scim_server.py with commits that are counted, an octet of a file each, and delayed as a slow
# disk would: while the lock for writing is held. Transactions that wrote nothing cost no disk.
SLOW_COMMITS = """
import os, runpy, sqlite3, sys, time
delay, log = float(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
connect = sqlite3.connect
class Slow(sqlite3.Connection):
    seen = 0
    def slow(self):
        if self.total_changes != self.seen:
            self.seen = self.total_changes
            os.write(log, b".")
            time.sleep(delay)
    def execute(self, sql, *parameters):
        if sql[:6].upper() == "COMMIT":
            self.slow()
        return super().execute(sql, *parameters)
    def commit(self):
        self.slow()
        super().commit()
sqlite3.connect = lambda *rest, **named: connect(*rest, **{"factory": Slow, **named})
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Server:
    """A server in a folder of its own: scim_server.py, also as a module, or another command.

    With --processes, several processes share the address and the folder. With --database, the
    folder has the configuration alone, and its tenant is in the database.
    """

    def __init__(
        self,
        folder: Path,
        options: argparse.Namespace,
        command: Sequence[str] | None = None,
        module: bool = False,
        tenant: str = "bench",
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.commits_file = folder / "commits"
        self.processes = options.processes
        config = CONFIG | dict(options.set)
        if self.processes > 1:
            config["reuse_port"] = True
        if options.database:
            config["database"] = options.database
            config["tenants"] = [CONFIG["tenants"][0] | {"name": tenant}]
        (folder / "config.json").write_text(json.dumps(config))
        delay = (
            []
            if options.commit_delay is None
            else ["-c", SLOW_COMMITS, str(options.commit_delay / 1000), str(self.commits_file)]
        )
        run = ["-m", SERVER.stem] if module else [*delay, str(SERVER)]
        self.command = command or [
            sys.executable,
            *run,
            "--listen",
            "127.0.0.1:0",
            "--config",
            str(folder / "config.json"),
        ]
        self.running: list[subprocess.Popen[str]] = []

    def start(self) -> Target:
        """Start the processes and return where they listen."""
        self.target = Target.of(self.spawn(self.command), TOKEN)
        for _ in range(1, self.processes):
            address = f"{self.target.host}:{self.target.port}"
            self.spawn([address if word == "127.0.0.1:0" else word for word in self.command])
        return self.target

    def spawn(self, command: Sequence[str]) -> str:
        """Start a process and return the URL that it prints."""
        log = self.folder / "server.log"
        with open(log, "a" if self.running else "w") as stream:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**os.environ, "PYTHONPATH": str(SERVER.parent), "PYTHONDONTWRITEBYTECODE": ""},
            )
        self.running.append(process)
        for line in process.stdout or ():
            if match := re.match(r"(?:scim_server listening|Serving SCIM) on (\S+)", line):
                return match[1]
        raise BenchError(f"the server did not start:\n{log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End the processes and wait for that."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()
        self.running.clear()

    def rss(self) -> float:
        """Return the resident memory of the processes and of those they started, in MiB."""
        pending = [process.pid for process in self.running]
        kilobytes = 0
        for pid in pending:
            with suppress(OSError):  # a process that has ended meanwhile
                status = Path(f"/proc/{pid}/status").read_text()
                kilobytes += int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pending += map(int, (task / "children").read_text().split())
        return kilobytes / 1024

    def commits(self) -> int:
        """Return how many commits wrote something, as --commit-delay counts them."""
        return self.commits_file.stat().st_size if self.commits_file.exists() else 0


def fresh_tenant() -> str:
    """Return the name of a tenant that no database has yet."""
    return f"bench-{time.time_ns():x}"


# -- Rows --------------------------------------------------------------------------

MARK = "mark-mark-mark-md"  # stands in a template for what makes a user one of its own
POOL = 20_000  # requests that a reading row chooses from
ALL, FEW = (1, 8, 64), (1, 8)  # connections


@dataclass(frozen=True)
class Row:
    """A measurement: names and descriptions (of every second request, where there are two), how
    to make the requests, which limit it is held against, and what a good answer is.

    hits is how many resources the answer must find; things is how many a request makes.
    """

    names: tuple[str, ...]
    what: tuple[str, ...]
    requests: Requests
    limit: str = "stock"
    statuses: tuple[int, ...] = (200,)
    hits: int | None = None
    unit: str = "requests/s"
    things: int = 1
    connections: tuple[int, ...] = ALL


def read_row(
    name: str,
    what: str,
    people: People,
    path: Callable[[int], str],
    hits: int | None = None,
    connections: tuple[int, ...] = ALL,
) -> Row:
    """Return a row of GETs; path makes one for the number of a user."""
    pools: dict[Target, list[bytes]] = {}

    def requests(target: Target, number: int) -> Iterator[bytes]:
        chance = random.Random()
        if target not in pools:  # before the processes are forked
            pools[target] = [
                target.render("GET", path(chance.randrange(people.count))) for _ in range(POOL)
            ]
        while True:
            yield chance.choice(pools[target])

    return Row((name,), (what,), requests, hits=hits, connections=connections)


def filter_row(
    name: str,
    what: str,
    people: People,
    filter: Callable[[int], str],
    hits: int,
    connections: tuple[int, ...] = ALL,
) -> Row:
    """Return a row of a filter; it is made for the number of a user."""
    return read_row(
        name,
        f"{what}: {hits} found",
        people,
        lambda n: f"/Users?filter={quote(filter(n))}",
        hits,
        connections,
    )


def lookup_rows(people: People) -> list[Row]:
    """Return the rows that Entra ID asks for most."""
    return [
        filter_row(
            "lookup", "userName eq", people, lambda n: f'userName eq "user{n:07}@example.com"', 1
        ),
        filter_row(
            "miss", "userName eq", people, lambda n: f'userName eq "nobody{n:07}@example.com"', 0
        ),
        read_row("get", "GET by id", people, lambda n: f"/Users/{random.choice(people.sample())}"),
    ]


def list_rows(people: People) -> list[Row]:
    """Return the rows of pages; deep is the end by index, the middle by cursor."""
    last = people.count - PAGE + 1
    return [
        read_row("list-first", f"first {PAGE} by index", people, lambda n: f"/Users?count={PAGE}"),
        read_row(
            "list-last",
            f"last {PAGE} by index",
            people,
            lambda n: f"/Users?startIndex={last - n % PAGE}&count={PAGE}",
            connections=FEW,
        ),
        read_row(
            "cursor-first",
            f"first {PAGE} by cursor",
            people,
            lambda n: f"/Users?count={PAGE}&cursor=",
        ),
        read_row(
            "cursor-deep",
            f"{PAGE} in the middle by cursor",
            people,
            lambda n: f"/Users?count={PAGE}&cursor={people.middle}",
        ),
    ]


def filter_rows(people: People) -> list[Row]:
    """Return the rows of filters other than the lookup."""
    rows = [
        ("filter-title", "title eq", lambda n: f'title eq "Title {n // 100}"', 100, ALL),
        ("filter-sw", "userName sw", lambda n: f'userName sw "user{n // 100:05}"', 100, ALL),
        (
            "filter-path",
            "emails[type and value eq]",
            lambda n: f'emails[type eq "work" and value eq "user{n:07}@example.com"]',
            1,
            ALL,
        ),
        (
            "filter-and",
            "title eq and familyName eq",
            lambda n: f'title eq "Title {n // 100}" and name.familyName eq "Family {n // 10}"',
            10,
            ALL,
        ),
        (
            "filter-broad",
            "title eq and active eq true",
            lambda n: f'title eq "Title {n // 100}" and active eq true',
            90,
            ALL,
        ),
        (
            "filter-or",
            "userName eq or externalId eq",
            lambda n: f'userName eq "user{n:07}@example.com" or externalId eq "nobody"',
            1,
            ALL,
        ),
        ("filter-co", "userName co", lambda n: f'userName co "{n:07}@"', 1, FEW),
    ]
    if people.custom:
        rows.insert(
            1,
            (
                "filter-custom",
                "custom field eq",
                lambda n: f'{FACILIO}:costcode eq "CC{n:07}"',
                1,
                ALL,
            ),
        )
    return [
        filter_row(name, what, people, filter, hits, connections)
        for name, what, filter, hits, connections in rows
    ]


def fresh_tags(number: int) -> Iterator[str]:
    """Yield texts as long as MARK that no user has yet, for a connection."""
    run = f"{time.time_ns() // 1_000_000:x}"[-9:]
    return (f"{run}{number:02x}{count:05x}n" for count in itertools.count())


def create_rows(people: People) -> list[Row]:
    """Return the rows that make and change users."""

    def patches(target: Target, number: int) -> Iterator[bytes]:
        chance = random.Random()
        sample = people.sample()
        for tag in fresh_tags(number):
            yield target.render(
                "PATCH",
                f"/Users/{chance.choice(sample)}",
                {
                    "schemas": [PATCH_OP],
                    "Operations": [
                        {"op": "replace", "path": f"{ENTERPRISE}:department", "value": tag}
                    ],
                },
            )

    def creates(target: Target, number: int) -> Iterator[bytes]:
        template = target.render("POST", "/Users", person(MARK, 1, people.custom, "New hire"))
        return (template.replace(MARK.encode(), tag.encode()) for tag in fresh_tags(number))

    def bulks(target: Target, number: int) -> Iterator[bytes]:
        template = target.render(
            "POST",
            "/Bulk",
            bulk(
                [
                    ("/Users", person(f"{MARK}-{k}", 1, people.custom, "New hire"))
                    for k in range(100)
                ]
            ),
        )
        return (template.replace(MARK.encode(), tag.encode()) for tag in fresh_tags(number))

    return [
        Row(("patch",), ("PATCH of one attribute",), patches, "fsync", connections=ALL),
        Row(("create",), ("POST of a user",), creates, "sqlite", (201,)),
        Row(
            ("bulk",),
            ("Bulk of 100 POSTs",),
            bulks,
            "sqlite",
            unit="users/s",
            things=100,
            connections=(1,),
        ),
    ]


def group_row(people: People, size: int) -> Row:
    """Return the row that adds members to a group and removes them, each connection its own."""
    made: list[Any] = []

    def requests(target: Target, number: int) -> Iterator[bytes]:
        if not made:  # before the processes are forked
            made.extend((people.joiners(max(ALL)), people.group(size)))
        joiners, group = made
        return itertools.cycle(
            [
                target.render(
                    "PATCH", f"/Groups/{group}", members_patch(op, [joiners[number % max(ALL)]])
                )
                for op in ("add", "remove")
            ]
        )

    return Row(
        (f"group-{size}-add", f"group-{size}-remove"),
        (f"one member to a group of {size:,}", f"one member of a group of {size:,}"),
        requests,
        "fsync",
        (200, 204),
    )


def all_rows(people: People) -> list[Row]:
    """Return all rows of requests, in the order in which they are measured."""
    return [
        *lookup_rows(people),
        *list_rows(people),
        *filter_rows(people),
        *create_rows(people),
        *(group_row(people, size) for size in GROUP_SIZES if size <= people.count),
    ]


def probe(row: Row, target: Target) -> int:
    """Try a row once, and return the size of the answer's body; BenchError for a wrong answer."""
    with closing(Wire(target)) as wire:
        for request in itertools.islice(row.requests(target, 0), len(row.names)):
            answer = wire.exchange(request, *row.statuses)
            size = len(wire.answer) - wire.head_end - 4
            if row.hits is not None and answer["totalResults"] != row.hits:
                raise BenchError(
                    f"{row.names[0]}: expected {row.hits} resources, "
                    f"got {answer['totalResults']} of {wire.shown()}"
                )
            if row.unit == "users/s" and (
                refused := [one for one in answer["Operations"] if str(one["status"]) != "201"]
            ):
                raise BenchError(f"{row.names[0]}: {refused[0]}")
    return size


def run_row(
    row: Row,
    target: Target,
    server: Server | None,
    limits: Limits,
    report: Report,
    options: argparse.Namespace,
) -> None:
    """Measure a row over each number of connections and report it against its limit."""
    size = probe(row, target)
    for connections in (n for n in row.connections if n in options.connections):
        before = server.commits() if server else 0
        runs = [
            measure(
                target, row.requests, connections, options.seconds, row.statuses, len(row.names)
            )
            for _ in range(options.runs)
        ]
        loads = [Load.median(loads) for loads in zip(*runs, strict=True)]
        note = ""
        if options.commit_delay is not None and row.limit != "stock":
            if not (commits := server.commits() - before if server else 0):
                raise BenchError(f"{row.names[0]}: the wrapper of --commit-delay saw no commit")
            note = f"{sum(load.count for load in loads) / commits:.1f} requests a commit"
        limit, limit_name = limits.rate(row.limit, size, connections)
        ceiling, _ = limits.rate("generator", 1024, connections)
        if statistics.fmean(load.rate for load in loads) > ceiling / 2:
            note += " (over half of the generator's ceiling: it is measured too)"
        for name, what, load in zip(row.names, row.what, loads, strict=True):
            rate = load.rate * row.things
            report.add(
                Result(
                    name,
                    what,
                    connections,
                    rate,
                    row.unit,
                    load.p50,
                    load.p99,
                    rate / limit,
                    limit_name,
                    note,
                )
            )


# -- Start, memory, first sync -------------------------------------------------------


def report_start(server: Server, what: str, report: Report, runs: int) -> None:
    """Measure the start of a server that is not running, and its memory after the first answer."""
    times, sizes, bare = [], [], []
    for _ in range(runs):
        started = now()
        target = server.start()
        with closing(Wire(target)) as wire:
            wire.exchange(target.lookup('userName eq "user0000000@example.com"'))
            times.append(now() - started)
        sizes.append(server.rss())
        server.stop()
        started = now()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(now() - started)
    seconds, limit = statistics.median(times), statistics.median(bare)
    report.add(
        Result(
            "start",
            f"to the first answer, {what}",
            1,
            seconds,
            "s",
            None,
            None,
            seconds / limit,
            "python -c pass",
        )
    )
    report.add(Result("rss-idle", f"resident after it, {what}", 1, statistics.median(sizes), "MiB"))


def report_soak(people: People, server: Server, minutes: float, report: Report) -> None:
    """Mix reads and writes over 8 connections for a time, and report rate and memory ten times."""
    rows = [row for row in [*lookup_rows(people), *create_rows(people)] if row.names[0] != "bulk"]
    for row in rows:
        probe(row, people.target)

    def requests(target: Target, number: int) -> Iterator[bytes]:
        return (
            next(series)
            for series in itertools.cycle([row.requests(target, number) for row in rows])
        )

    for tenth in range(1, 11):
        [load] = measure(people.target, requests, 8, minutes * 6, (200, 201))
        what = f"reads and writes, minute {digits(minutes * tenth / 10)}"
        report.add(Result("soak", what, 8, load.rate, "requests/s", load.p50, load.p99))
        report.add(Result("rss-soak", what, 8, server.rss(), "MiB"))


def report_crowded(people: People, report: Report, options: argparse.Namespace) -> None:
    """Report look-ups over 8 connections while 20 other connections loop a costly filter."""
    lookup = next(row for row in lookup_rows(people) if row.names[0] == "lookup")
    costly = next(row for row in filter_rows(people) if row.names[0] == "filter-co")
    loads = []
    for _ in range(options.runs):
        with ThreadPoolExecutor(1) as pool:
            arguments = (people.target, costly.requests, 20, options.seconds + 1)
            crowd = pool.submit(measure, *arguments)
            time.sleep(0.5)
            loads += measure(people.target, lookup.requests, 8, options.seconds)
            crowd.result()
    load = Load.median(loads)
    what = "userName eq, beside 20 clients of co"
    report.add(Result("crowded", what, 8, load.rate, "requests/s", load.p50, load.p99))


def sync_singly(wire: Wire, users: int, groups: int, progress: Progress) -> tuple[list[float], ...]:
    """Do a first sync as Entra ID does, and return the seconds of each user and of each group."""
    target, ids, user_times, group_times = wire.target, [], [], []
    for number in range(users):
        body, started = person(f"{number:07}", number), now()
        wire.exchange(target.lookup(f'userName eq "{body["userName"]}"'))
        ids.append(wire.exchange(target.render("POST", "/Users", body), 201)["id"])
        user_times.append(now() - started)
        progress.at(number + 1)
    for number in range(groups):
        started, name = now(), f"group {number}"
        wire.exchange(target.lookup(f'displayName eq "{name}"', "Groups"))
        id = wire.exchange(target.render("POST", "/Groups", group_body(name)), 201)["id"]
        patch = members_patch("add", sync_members(ids, number))
        wire.exchange(target.render("PATCH", f"/Groups/{id}", patch), 200, 204)
        group_times.append(now() - started)
        progress.at(users + number + 1)
    return user_times, group_times


def sync_by_bulk(
    wire: Wire, users: int, groups: int, progress: Progress
) -> tuple[list[float], ...]:
    """Do the same by Bulk, without lookups, and return the seconds of each request."""
    ids: list[str] = []
    user_times, group_times = [], []
    for first in range(0, users, FILL_BATCH):
        numbers, started = range(first, min(first + FILL_BATCH, users)), now()
        ids += send_bulk(wire, [("/Users", person(f"{n:07}", n)) for n in numbers])
        user_times.append(now() - started)
        progress.at(numbers[-1] + 1)
    for first in range(0, groups, 100):
        numbers, started = range(first, min(first + 100, groups)), now()
        send_bulk(
            wire, [("/Groups", group_body(f"group {n}", sync_members(ids, n))) for n in numbers]
        )
        group_times.append(now() - started)
        progress.at(users + numbers[-1] + 1)
    return user_times, group_times


def sync_members(ids: Sequence[str], number: int) -> list[str]:
    """Return the ids of the 100 members of a group of the first sync, or fewer."""
    return [ids[(number * 37 + step * 101) % len(ids)] for step in range(min(100, len(ids)))]


def report_sync(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Measure first syncs into empty servers, one request after the other and by Bulk."""
    users = options.sync_users
    groups, seconds = max(users // 100, 1), {}
    for way, sync in (("sync", sync_singly), ("sync-bulk", sync_by_bulk)):
        shutil.rmtree(folder / way, ignore_errors=True)
        server = Server(folder / way, options, tenant=fresh_tenant())
        try:
            with closing(Wire(server.start())) as wire:
                user_times, group_times = sync(wire, users, groups, Progress(way, users + groups))
        finally:
            server.stop()
            shutil.rmtree(folder / way, ignore_errors=True)
        seconds[way] = sum(user_times) + sum(group_times)
        for what, count, times in (
            (f"{users:,} users", users, user_times),
            (f"{groups:,} groups of 100", groups, group_times),
        ):
            report.add(Result(way, what, 1, count / sum(times), "a second"))
            if tenth := len(times) // 10:
                report.add(
                    Result(
                        way,
                        f"{what}: last tenth's time",
                        1,
                        sum(times[-tenth:]),
                        "s",
                        None,
                        None,
                        sum(times[-tenth:]) / sum(times[:tenth]),
                        "the first tenth's",
                    )
                )
    report.add(Result("sync", "the whole", 1, seconds["sync"], "s"))
    report.add(
        Result(
            "sync-bulk",
            "the whole",
            1,
            seconds["sync-bulk"],
            "s",
            None,
            None,
            seconds["sync"] / seconds["sync-bulk"],
            "times as fast as without",
        )
    )


# -- The peer ----------------------------------------------------------------------


def peer_server(name: str, folder: Path, options: argparse.Namespace) -> tuple[Server, str]:
    """Return a peer installed in a venv, as its README serves it, and its name with the version."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        print(f"installing {name}", file=sys.stderr)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", name], check=True
        )
    code = f"import importlib.metadata; print(importlib.metadata.version({name!r}))"
    version = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(python.parent / name), "--port", str(port)]
    return Server(folder / "peer", options, command), f"{name} {version}"


def run_against(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Measure lookup, GET and create on this server and a peer in turns, over one connection."""
    peer, name = peer_server(options.against, folder, options)
    servers = [Server(folder / "server", options), peer]
    try:
        crowds = [People(server.start(), options.users, custom=False) for server in servers]
        for people in crowds:
            people.fill()
        rows = [
            {row.names[0]: row for row in [*lookup_rows(people), *create_rows(people)]}
            for people in crowds
        ]
        for key in ("lookup", "get", "create"):
            loads: list[list[Load]] = [[], []]
            for _ in range(options.runs):
                for people, found, series in zip(crowds, rows, loads, strict=True):
                    probe(found[key], people.target)
                    series += measure(
                        people.target, found[key].requests, 1, options.seconds, found[key].statuses
                    )
            ours, theirs = map(Load.median, loads)
            report.add(Result(key, name, 1, theirs.rate, "requests/s", theirs.p50, theirs.p99))
            report.add(
                Result(
                    key,
                    "scim_server",
                    1,
                    ours.rate,
                    "requests/s",
                    ours.p50,
                    ours.p99,
                    ours.rate / theirs.rate,
                    name,
                )
            )
    finally:
        for server in servers:
            server.stop()


# -- Command line ------------------------------------------------------------------


def setting(text: str) -> tuple[str, Json]:
    """Return the name and the value of --set: JSON, else text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description="The load bench of scim_server.")
    add = parser.add_argument
    add("--processes", type=int, default=1, metavar="N", help="that share the address (default 1)")
    add("--users", type=int, default=10_000, metavar="N", help="users to fill in (default 10000)")
    add(
        "--sync-users",
        type=int,
        metavar="N",
        help="users of the first sync (default: as --users, 10000 at the most)",
    )
    add(
        "--only",
        default="",
        metavar="NAME,…",
        help="rows, by the start of their names: "
        "lookup, miss, get, list, cursor, filter, patch, create, bulk, group, start, rss, sync",
    )
    add("--connections", default="1,8,64", metavar="N,…", help="of 1, 8 and 64")
    add("--seconds", type=float, default=2, metavar="S", help="of a measurement (default 2)")
    add("--runs", type=int, default=3, metavar="R", help="the medians of which count (default 3)")
    add(
        "--soak",
        type=float,
        metavar="MINUTES",
        help="then reads and writes for so long, and memory",
    )
    add("--json", metavar="FILE", help="write the results")
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="print two results, then end")
    add("--against", choices=["scim2-server"], help="measure lookup, get and create on a peer too")
    add("--database", metavar="URL", help="of an empty PostgreSQL database for the data")
    add("--url", help="load a server that runs, with --token")
    add("--token", default=TOKEN)
    add("--keep", metavar="DIR", help="scratch directory; what is filled there is used again")
    add(
        "--commit-delay",
        type=float,
        metavar="MS",
        help="delay each commit, and count them (0: only count)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=setting,
        help="of the server's configuration, such as access_log=off",
    )
    options = parser.parse_args(arguments)
    if options.users < 100 or options.users % 100:
        parser.error("--users: expected a multiple of 100")
    if options.url and (options.commit_delay is not None or options.against):
        parser.error("--url: the server runs already; not with --commit-delay, --against")
    if options.database and options.commit_delay is not None:
        parser.error("--database: --commit-delay delays the commits of SQLite alone")
    options.only = tuple(options.only.split(","))  # every name starts with ""
    options.connections = [int(text) for text in options.connections.split(",")]
    options.sync_users = options.sync_users or min(options.users, 10_000)
    return options


def run_rows(
    folder: Path, people: People, server: Server | None, options: argparse.Namespace, report: Report
) -> None:
    """Measure the rows that are wanted."""
    in_file = server and not options.database
    filled = folder / "server" / "data" / "bench.sqlite3" if in_file else None
    limits = Limits(options, report, folder, filled, person(NUMBER))
    for row in all_rows(people):
        if any(name.startswith(options.only) for name in row.names):
            run_row(row, people.target, server, limits, report, options)
    if "crowded".startswith(options.only):
        report_crowded(people, report, options)


def run_scratch(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Measure a server of our own on a folder."""
    server = Server(folder / "server", options)
    try:
        People(server.start(), options.users).fill()
        server.stop()
        if "start".startswith(options.only) or "rss-idle".startswith(options.only):
            for module, what in [(False, "empty"), (True, "empty, as a module")]:
                empty = Server(folder / "empty", options, module=module, tenant=fresh_tenant())
                report_start(empty, what, report, options.runs)
                shutil.rmtree(folder / "empty")
            report_start(server, f"{options.users:,} users", report, options.runs)
        run_rows(folder, People(server.start(), options.users), server, options, report)
        if "rss-load".startswith(options.only):
            report.add(Result("rss-load", "resident after all rows", 1, server.rss(), "MiB"))
        if options.soak:
            report_soak(People(server.target, options.users), server, options.soak, report)
    except BenchError as error:
        tail = (server.folder / "server.log").read_text()[-1000:]
        raise BenchError(f"{error}\nthe server's log ends:\n{tail}") from None
    finally:
        server.stop()
    if "sync".startswith(options.only):
        report_sync(folder, options, report)


def run_url(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Measure a server that runs somewhere."""
    people = People(Target.of(options.url, options.token), options.users, custom=False)
    people.fill()
    run_rows(folder, people, None, options, report)


def main() -> int:
    """Run the bench and return its exit status."""
    options, report = parse_options(), Report()
    if options.compare:
        compare(options.compare)
        return 0
    folder = Path(options.keep or tempfile.mkdtemp(prefix="scim-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    run = run_against if options.against else run_url if options.url else run_scratch
    try:
        run(folder, options, report)
    except (BenchError, OSError, subprocess.CalledProcessError) as error:
        print(f"\nbench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if options.json:
            report.save(options.json, options)
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
