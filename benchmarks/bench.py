#!/usr/bin/env python3
"""The load bench of scim_server: what it does a second, beside what this machine could do.

    python benchmarks/bench.py                             10 000 users, everything
    python benchmarks/bench.py --users 1000000 --keep DIR  DIR keeps the filled database for the next run
    python benchmarks/bench.py --only lookup,create        some rows, by the start of their names
    python benchmarks/bench.py --against scim2-server      the same load on a peer
    python benchmarks/bench.py --compare A.json B.json     two results of --json

README.md beside this file says what each row means. Standard library only; Linux, for /proc.

Sections: requests and connections; load from processes; people and the filled server; limits of the
machine; rows; start, memory and first sync; the peer; results; command line.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import select
import shutil
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

SERVER = Path(__file__).resolve().parent.parent / "scim_server.py"
ENTERPRISE = "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User"
FACILIO = "urn:ietf:params:scim:schemas:extension:facilio:2.0:User"
PATCH_OP = "urn:ietf:params:scim:api:messages:2.0:PatchOp"
BULK_REQUEST = "urn:ietf:params:scim:api:messages:2.0:BulkRequest"
TOKEN = "bench-secret-token"
CONFIG: dict[str, Any] = {"data_dir": "data", "tenants": [{
    "name": "bench", "tokens": [{"name": "bench", "secret": TOKEN}],
    "custom_fields": [{"link_name": "costcode", "type": "String"},
                      {"link_name": "badge_number", "type": "Integer"}]}]}
PAGE = 100                        # resources in a page of the list rows
FILL_BATCH = 500                  # users in a Bulk request
MEMBER_BATCH = 10_000             # members in a PATCH
GROUP_SIZES = (10, 1_000, 10_000, 100_000)
PATIENCE = 300                    # seconds that an answer may take
FORK = multiprocessing.get_context("fork")
Json = Any
now = time.perf_counter


class BenchError(Exception):
    """The bench cannot go on; the text says why."""


# -- Requests and connections ------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A server under load."""

    host: str
    port: int
    path: str = ""
    token: str = ""

    @classmethod
    def of(cls, url: str, token: str) -> Target:
        """Return the target of a URL."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise BenchError(f"{url}: expected http://HOST:PORT/PATH (the bench speaks no TLS)")
        return cls(parts.hostname, parts.port or 80, parts.path.rstrip("/"), token)

    def render(self, method: str, path: str, body: Json = None) -> bytes:
        """Return the octets of a request."""
        octets = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {self.host}:{self.port}",
                 f"Authorization: Bearer {self.token}", "Accept: application/scim+json"]
        if body is not None:
            lines += ["Content-Type: application/scim+json", f"Content-Length: {len(octets)}"]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + octets

    def lookup(self, filter: str, resources: str = "Users") -> bytes:
        """Return the octets of a query."""
        return self.render("GET", f"/{resources}?filter={quote(filter)}")


class Wire:
    """A keep-alive connection with one request in flight; opened again where the server ends it."""

    LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
    CLOSES = re.compile(rb"HTTP/1\.0|.*\r\nconnection: *close", re.IGNORECASE | re.DOTALL)

    def __init__(self, target: Target) -> None:
        self.target = target
        self.durations = array("d")
        self.answer = b""
        self.socket: socket.socket | None = None
        self.connect()

    def connect(self) -> socket.socket:
        """Open the connection if it is not open."""
        if self.socket is None:
            self.socket = socket.create_connection((self.target.host, self.target.port), PATIENCE)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A timeout of Python costs a poll for each recv; one of the kernel costs nothing.
            self.socket.settimeout(None)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                                   struct.pack("ll", PATIENCE, 0))
        return self.socket

    def send(self, request: bytes) -> None:
        """Start a request and its clock."""
        self.request, self.answer, self.needed = request, b"", 0
        self.started = now()
        (self.socket or self.connect()).sendall(request)

    def receive(self) -> bool:
        """Read once; return whether the answer is there."""
        chunk = self.socket.recv(1 << 18)                # type: ignore[union-attr]
        if not chunk:
            raise BenchError(f"the server closed the connection on {self.shown()}")
        self.answer = self.answer + chunk if self.answer else chunk
        if not self.needed:
            self.head_end = self.answer.find(b"\r\n\r\n")
            if self.head_end < 0:
                return False
            length = self.LENGTH.search(self.answer, 0, self.head_end)
            self.needed = self.head_end + 4 + (int(length[1]) if length else 0)
        return len(self.answer) >= self.needed

    def finish(self, statuses: tuple[int, ...]) -> None:
        """Stop the clock; BenchError where the status is not an expected one."""
        self.durations.append(now() - self.started)
        if int(self.answer[9:12]) not in statuses:
            raise BenchError(f"expected {' or '.join(map(str, statuses))} of {self.shown()}, got "
                             f"{self.answer[:2000].decode(errors='replace')}")
        if self.CLOSES.match(self.answer, 0, self.head_end):
            self.close()

    def exchange(self, request: bytes, *statuses: int) -> Json:
        """Send a request and return the JSON of its answer, None where it is empty."""
        self.send(request)
        while not self.receive():
            pass
        self.finish(statuses or (200,))
        body = self.answer[self.head_end + 4:]
        return json.loads(body) if body else None

    def shown(self) -> str:
        """Return the request line of the request in flight."""
        return self.request.partition(b"\r\n")[0].decode()

    def close(self) -> None:
        """Close the connection."""
        if self.socket:
            self.socket.close()
            self.socket = None


# -- Load from processes -----------------------------------------------------------


Requests = Callable[[Target, int], Iterator[bytes]]      # of the connection with a number


@dataclass(frozen=True)
class Load:
    """What came of a measurement: requests a second, and percentiles in milliseconds."""

    rate: float
    p50: float
    p99: float
    count: int

    @classmethod
    def of(cls, durations: Sequence[float], rate: float) -> Load:
        """Return the load of some durations in seconds."""
        ordered = sorted(durations)
        at = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (.5, .99)]
        return cls(rate, at[0] * 1000, at[1] * 1000, len(ordered))

    @classmethod
    def median(cls, loads: Sequence[Load]) -> Load:
        """Return the medians of several runs."""
        rate, p50, p99 = (statistics.median(getattr(load, name) for load in loads)
                          for name in ("rate", "p50", "p99"))
        return cls(rate, p50, p99, sum(load.count for load in loads))


def measure(target: Target, requests: Requests, connections: int, seconds: float,
            statuses: tuple[int, ...] = (200,), cycle: int = 1) -> list[Load]:
    """Load a target over some connections; return a Load for each place in the cycle of requests.

    A connection ends after a whole cycle, such as the adding and the removing of a member.
    """
    count = min(connections, os.cpu_count() or 1)
    pipes, processes = [], []
    for first in range(count):
        ours, theirs = FORK.Pipe()
        numbers = range(first, connections, count)
        processes.append(FORK.Process(target=load_worker, daemon=True, args=(
            theirs, target, requests, numbers, seconds, statuses, cycle)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        for _ in map(received, pipes):
            pass                                          # all are connected
        for pipe in pipes:
            pipe.send("go")
        answers = [received(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    elapsed = max(ended for _, ended, _ in answers) - min(started for started, _, _ in answers)
    series = [array("d", octets) for _, _, wires in answers for octets in wires]
    if cycle == 1:
        durations = [one for wire in series for one in wire]
        return [Load.of(durations, len(durations) / elapsed)]
    parts = [[one for wire in series for one in wire[place::cycle]] for place in range(cycle)]
    return [Load.of(part, connections / statistics.fmean(part)) for part in parts]


def received(pipe: Pipe) -> Any:
    """Return what a worker says; BenchError where that is an error."""
    try:
        message = pipe.recv()
    except EOFError:
        raise BenchError("a load process died") from None
    if isinstance(message, str):
        raise BenchError(message)
    return message


def load_worker(pipe: Pipe, target: Target, requests: Requests, numbers: Sequence[int],
                seconds: float, statuses: tuple[int, ...], cycle: int) -> None:
    """Be a process that loads a target over its share of the connections."""
    try:
        wires = {Wire(target): requests(target, number) for number in numbers}
        pipe.send(None)
        pipe.recv()
        started = now()
        drive = drive_one if len(wires) == 1 else drive_many
        drive(wires, started + seconds, statuses, cycle)
        pipe.send((started, now(), [wire.durations.tobytes() for wire in wires]))
    except (BenchError, OSError) as error:
        pipe.send(str(error) or repr(error))


def drive_one(wires: dict[Wire, Iterator[bytes]], deadline: float, statuses: tuple[int, ...],
              cycle: int) -> None:
    """Send one request after the other until a deadline."""
    [(wire, requests)] = wires.items()
    while now() < deadline or len(wire.durations) % cycle:
        wire.send(next(requests))
        while not wire.receive():
            pass
        wire.finish(statuses)


def drive_many(wires: dict[Wire, Iterator[bytes]], deadline: float, statuses: tuple[int, ...],
               cycle: int) -> None:
    """Keep a request in flight on each connection until a deadline, then await the answers."""
    poll, by_number = select.poll(), {}
    for wire, requests in wires.items():
        number = wire.connect().fileno()
        by_number[number] = (wire, requests)
        poll.register(number, select.POLLIN)
        wire.send(next(requests))
    while by_number:
        for number, _ in poll.poll(PATIENCE * 1000) or [(-1, 0)]:
            if number < 0:
                raise BenchError(f"no answer within {PATIENCE} s")
            wire, requests = by_number[number]
            if not wire.receive():
                continue
            wire.finish(statuses)
            if now() >= deadline and len(wire.durations) % cycle == 0:
                poll.unregister(number)
                del by_number[number]
            elif wire.socket is None:
                raise BenchError("the server does not keep connections alive; use --connections 1")
            else:
                wire.send(next(requests))


# -- People and the filled server --------------------------------------------------


def person(tag: str, number: int = 0, custom: bool = True, title: str = "") -> Json:
    """Return a user as Entra ID sends it; people in a hundred share a title, in ten a family."""
    user: Json = {
        "schemas": ["urn:ietf:params:scim:schemas:core:2.0:User", ENTERPRISE],
        "userName": f"user{tag}@example.com", "externalId": f"ext{tag}",
        "active": number % 10 != 0, "displayName": f"Given Family {tag}",
        "name": {"givenName": f"Given{number % 1000}", "familyName": f"Family {number // 10}"},
        "title": title or f"Title {number // 100}",
        "emails": [{"type": "work", "value": f"user{tag}@example.com", "primary": True},
                   {"type": "home", "value": f"home{tag}@example.org"}],
        "phoneNumbers": [{"type": "work", "value": f"+1 555 {tag}"}],
        ENTERPRISE: {"employeeNumber": tag, "department": f"Department {number % 50}"}}
    if custom:
        user["schemas"] += [FACILIO]
        user[FACILIO] = {"costcode": f"CC{tag}", "badge_number": number}
    return user


def bulk(operations: Sequence[tuple[str, Json]]) -> Json:
    """Return a Bulk request of POSTs, each (path, body)."""
    return {"schemas": [BULK_REQUEST], "Operations": [
        {"method": "POST", "path": path, "bulkId": f"b{number}", "data": body}
        for number, (path, body) in enumerate(operations)]}


def send_bulk(wire: Wire, operations: Sequence[tuple[str, Json]]) -> list[str]:
    """Create resources by Bulk and return their ids."""
    answers = wire.exchange(wire.target.render("POST", "/Bulk", bulk(operations)))["Operations"]
    if refused := [answer for answer in answers if str(answer["status"]) != "201"]:
        raise BenchError(f"Bulk: {len(refused)} operations refused, the first one: {refused[0]}")
    return [answer["location"].rpartition("/")[2] for answer in answers]


def members_patch(op: str, ids: Sequence[str]) -> Json:
    """Return the PATCH that adds or removes members."""
    return {"schemas": [PATCH_OP], "Operations": [
        {"op": op, "path": "members", "value": [{"value": id} for id in ids]}]}


class Progress:
    """A line on standard error for long work: how much is done, and the rate."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.begun, self.told = what, total, now(), now()

    def at(self, done: int) -> None:
        """Tell, now and then and at the end."""
        terminal, last = sys.stderr.isatty(), done >= self.total
        if last or now() - self.told > (0.5 if terminal else 10):
            self.told = now()
            rate = done / max(now() - self.begun, 1e-9)
            print(f"\r{self.what}: {done:,} of {self.total:,}, {rate:,.0f}/s", file=sys.stderr,
                  end="\n" if last or not terminal else "", flush=True)


class People:
    """The users on a target: count of them, numbered in the order of their creation."""

    def __init__(self, target: Target, count: int, custom: bool = True) -> None:
        self.target, self.count, self.custom = target, count, custom
        self.wire = Wire(target)
        self._sample: list[str] = []
        self._first: list[str] = []

    def found(self, user_name: str) -> str:
        """Return the id of the user with a userName, "" if there is none."""
        found = self.wire.exchange(self.target.lookup(f'userName eq "{user_name}"'))
        return found["Resources"][0]["id"] if found["totalResults"] else ""

    def numbered(self, number: int) -> str:
        """Return the id of the user with a number, "" if there is none."""
        return self.found(f"user{number:07}@example.com")

    def fill(self) -> None:
        """Create the users that are missing, by Bulk."""
        if self.numbered(self.count):
            raise BenchError(f"there are more than {self.count:,} users already; use another --keep")
        present, end = 0, self.count                     # the users below present are there
        while present < end:
            middle = (present + end) // 2
            present, end = (middle + 1, end) if self.numbered(middle) else (present, middle)
        progress = Progress("filling", self.count - present)
        for first in range(present, self.count, FILL_BATCH):
            numbers = range(first, min(first + FILL_BATCH, self.count))
            send_bulk(self.wire, [("/Users", person(f"{n:07}", n, self.custom)) for n in numbers])
            progress.at(numbers[-1] + 1 - present)

    def sample(self) -> list[str]:
        """Return the ids of some users all over the range."""
        if not self._sample:
            numbers = random.sample(range(self.count), min(self.count, 5_000))
            self._sample = [self.numbered(number) for number in numbers]
        return self._sample

    def first(self, count: int) -> list[str]:
        """Return the ids of the first users."""
        if len(self._first) < count:
            ids = (id for page, _ in self.pages(1_000) for id in page)
            self._first = list(itertools.islice(ids, count))
        return self._first[:count]

    def pages(self, size: int) -> Iterator[tuple[list[str], str]]:
        """Yield the ids on each page of users, and the cursor behind it."""
        cursor = ""
        while True:
            page = self.wire.exchange(self.target.render(
                "GET", f"/Users?attributes=userName&count={size}&cursor={cursor}"))
            cursor = page.get("nextCursor", "")
            yield [user["id"] for user in page["Resources"]], cursor
            if not cursor:
                return

    @functools.cached_property
    def middle(self) -> str:
        """The cursor behind half of the users."""
        seen, size = 0, min(1_000, self.count // 4)
        for ids, cursor in self.pages(size):
            seen += len(ids)
            if seen >= self.count // 2:
                return cursor
        raise BenchError("paging by cursor ended before half of the users")

    def joiners(self, count: int) -> list[str]:
        """Return the ids of users that are in no group."""
        names = [f"joiner-{number}" for number in range(count)]
        return [self.found(f"user{name}@example.com") or self.wire.exchange(
            self.target.render("POST", "/Users", person(name, 0, self.custom, "Joiner")), 201)["id"]
            for name in names]

    def group(self, size: int) -> str:
        """Create a group of some size, instead of one that an earlier run left; return its id."""
        name = f"bench group of {size}"
        left = self.wire.exchange(self.target.lookup(f'displayName eq "{name}"', "Groups"))
        for group in left.get("Resources", ()):
            self.wire.exchange(self.target.render("DELETE", f"/Groups/{group['id']}"), 204)
        body = {"schemas": ["urn:ietf:params:scim:schemas:core:2.0:Group"], "displayName": name}
        id = self.wire.exchange(self.target.render("POST", "/Groups", body), 201)["id"]
        ids = self.first(size)
        for start in range(0, size, MEMBER_BATCH):
            patch = members_patch("add", ids[start:start + MEMBER_BATCH])
            self.wire.exchange(self.target.render("PATCH", f"/Groups/{id}", patch), 200, 204)
        return str(id)


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
    """A server process on a folder of its own; scim_server.py, or what command says."""

    def __init__(self, folder: Path, options: argparse.Namespace,
                 command: Sequence[str] | None = None) -> None:
        self.folder, self.token = folder, TOKEN
        folder.mkdir(parents=True, exist_ok=True)
        self.commits_file = folder / "commits"
        settings = dict(option.split("=", 1) for option in options.set)
        (folder / "config.json").write_text(json.dumps(
            CONFIG | {name: setting(text) for name, text in settings.items()}))
        delay = [] if options.commit_delay is None else [
            "-c", SLOW_COMMITS, str(options.commit_delay / 1000), str(self.commits_file)]
        workers = ["--workers", str(options.workers)] if options.workers else []
        self.command = command or [sys.executable, *delay, str(SERVER), "--listen", "127.0.0.1:0",
                                   "--config", str(folder / "config.json"), *workers]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Target:
        """Start the process and return where it listens."""
        log = self.folder / "server.log"
        with open(log, "w") as stream:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=stream,
                                            text=True)
        for line in self.process.stdout or ():
            if found := re.match(r"(?:scim_server listening|Serving SCIM) on (\S+)", line):
                return Target.of(found[1], self.token)
        raise BenchError(f"the server did not start:\n{log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End the process and wait for that."""
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.process.stdout:
                self.process.stdout.close()
            self.process = None

    def rss(self) -> float:
        """Return the resident memory of the process and those it started, in MiB."""
        pending = [self.process.pid] if self.process else []
        kilobytes = 0
        for pid in pending:
            with suppress(OSError):                      # a worker that ended meanwhile
                status = Path(f"/proc/{pid}/status").read_text()
                kilobytes += int(re.search(r"VmRSS:\s+(\d+)", status)[1])   # type: ignore[index]
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pending += map(int, (task / "children").read_text().split())
        return kilobytes / 1024

    def commits(self) -> int:
        """Return how many commits wrote something, as --commit-delay counts them."""
        return self.commits_file.stat().st_size if self.commits_file.exists() else 0


def setting(text: str) -> Json:
    """Return the value of --set: JSON, else text."""
    with suppress(ValueError):
        return json.loads(text)
    return text


# -- Limits of this machine --------------------------------------------------------


@contextmanager
def served(serve: Callable[[Pipe, int], None], size: int) -> Iterator[Target]:
    """Run a server of a constant of some size in a process."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=serve, args=(theirs, size), daemon=True)
    process.start()
    try:
        yield Target("127.0.0.1", ours.recv())
    finally:
        process.terminate()
        process.join()


def serve_stock(pipe: Pipe, size: int) -> None:
    """Serve a constant by http.server as it comes, one write an answer and no log: at its best."""
    body = b"x" * size

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/scim+json")
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    pipe.send(server.server_address[1])
    server.serve_forever()


def serve_echo(pipe: Pipe, size: int) -> None:
    """Serve a constant for whatever comes: what is left is the cost of the generator."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
    poll, listener = select.poll(), socket.create_server(("127.0.0.1", 0), backlog=128)
    poll.register(listener, select.POLLIN)
    peers: dict[int, socket.socket] = {}
    pipe.send(listener.getsockname()[1])
    while True:
        for number, _ in poll.poll():
            if number == listener.fileno():
                peer, _ = listener.accept()
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peers[peer.fileno()] = peer
                poll.register(peer, select.POLLIN)
            elif peers[number].recv(65536):
                peers[number].sendall(answer)
            else:
                poll.unregister(number)
                peers.pop(number).close()


def constant_requests(target: Target, number: int) -> Iterator[bytes]:
    """Yield the request for a constant, with the head of any other GET."""
    return itertools.repeat(target.lookup('userName eq "user0000000@example.com"'))


def fsyncs(folder: Path, seconds: float) -> Load:
    """Measure appending 4 KiB to a file and one fsync."""
    durations, end = [], now() + seconds
    with tempfile.TemporaryFile(dir=folder) as file:
        while (started := now()) < end:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            durations.append(now() - started)
    return Load.of(durations, len(durations) / sum(durations))


def server_module() -> Any:
    """Return scim_server as a module."""
    sys.path.insert(0, str(SERVER.parent))
    return importlib.import_module(SERVER.stem)


NUMBER, ID = "9876543210", "id-of-the-user"      # stand in the rows of a create for what differs
Insert = tuple[str, str, list[dict[str, Any]]]   # table, statement, rows


def rows_of_a_create(path: Path) -> list[Insert]:
    """Return what a create writes, taken from the tables of an empty store before and after one."""
    module = server_module()
    fields = [module.CustomField("costcode", "String"), module.CustomField("badge_number", "Integer")]
    directory = module.Directory(module.Store(path), module.resource_types(fields), new_id=lambda: ID)
    inserts: list[Insert] = []
    with closing(sqlite3.connect(path)) as reader:
        tables = reader.execute("SELECT name, sql LIKE '%AUTOINCREMENT%' FROM sqlite_master "
                                "WHERE type = 'table' AND name NOT LIKE 'sqlite_%'").fetchall()
        before = {name: reader.execute(f"SELECT * FROM {name}").fetchall() for name, _ in tables}
        directory.create(directory.resource_types["User"], person(NUMBER))
        for name, numbered in tables:                      # the first column may number itself
            found = reader.execute(f"SELECT * FROM {name}")
            columns = [column[0] for column in found.description][numbered:]
            rows = [dict(zip(columns, row[numbered:], strict=True))
                    for row in found if row not in before[name]]
            marks = ", ".join(f":{column}" for column in columns)
            inserts += [(name, f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({marks})", rows)]
    directory.store.close()
    return [insert for insert in inserts if insert[2]]


class RawSqlite:
    """What a create costs in SQLite alone: the same rows, a commit each, on a copy of the database."""

    def __init__(self, folder: Path, filled: Path | None, delay: float) -> None:
        self.delay = delay
        path = folder / "raw.sqlite3"
        for stale in folder.glob("raw.sqlite3*"):
            stale.unlink()
        self.inserts = rows_of_a_create(path)
        if filled:
            with closing(sqlite3.connect(filled)) as source, closing(sqlite3.connect(path)) as copy:
                source.backup(copy)
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = FULL")

    def run(self, seconds: float) -> Load:
        """Measure creates, the making of the rows not counted."""
        durations, end = [], now() + seconds
        execute, execute_many = self.connection.execute, self.connection.executemany
        while now() < end:
            inserts, seq = self._fresh(), 0
            started = now()
            execute("BEGIN IMMEDIATE")
            for table, statement, rows in inserts:
                if table == "resource":
                    seq = execute(statement, rows[0]).lastrowid or 0
                else:
                    execute_many(statement, [{**row, "seq": seq} for row in rows])
            time.sleep(self.delay) if self.delay else None
            execute("COMMIT")
            durations.append(now() - started)
        return Load.of(durations, len(durations) / sum(durations))

    def _fresh(self) -> list[Insert]:
        number, id = f"{random.randrange(10 ** 10):010}", str(uuid.uuid4())
        return [(table, statement, [
            {name: value.replace(NUMBER, number).replace(ID, id) if isinstance(value, str) else value
             for name, value in row.items()} for row in rows])
            for table, statement, rows in self.inserts]


@dataclass
class Limits:
    """What this machine could do, each measured when it is first asked for and reported."""

    options: argparse.Namespace
    report: Report
    folder: Path
    filled: Path | None
    known: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def rate(self, kind: str, size: int, connections: int) -> tuple[float, str]:
        """Return requests a second of a limit, and its name; size is that of the answer's body."""
        step = 1 << max(size.bit_length() - 2, 7)          # neighbours in size share a measurement
        size = max(round(size / step), 1) * step
        name, key = {
            "stock": (f"http.server, {size:,} B", (kind, size, connections)),
            "generator": (f"the generator, {size:,} B", (kind, size, connections)),
            "sqlite": ("raw SQLite create", (kind, 0, 1)), "fsync": ("one fsync", (kind, 0, 1))}[kind]
        if key not in self.known:
            load = Load.median(list(self._loads(*key)))
            self.known[key] = load.rate
            self.report.add(Result("limit", name, key[2], load.rate, "a second", load.p50, load.p99))
        return self.known[key], name

    def _loads(self, kind: str, size: int, connections: int) -> Iterator[Load]:
        seconds, runs = self.options.seconds, range(self.options.runs)
        if kind == "fsync":
            yield from (fsyncs(self.folder, seconds) for _ in runs)
        elif kind == "sqlite":
            raw = RawSqlite(self.folder, self.filled, (self.options.commit_delay or 0) / 1000)
            yield from (raw.run(seconds) for _ in runs)
            raw.connection.close()
        else:
            with served(serve_stock if kind == "stock" else serve_echo, size) as target:
                for _ in runs:
                    yield measure(target, constant_requests, connections, seconds)[0]


# -- Rows --------------------------------------------------------------------------

MARK = "mark-mark-mark-md"        # stands in a template for what makes a user one of its own
POOL = 20_000                     # requests that a reading row chooses from
ALL, FEW = (1, 8, 64), (1, 8)     # connections


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


def read_row(name: str, what: str, people: People, path: Callable[[int], str],
             hits: int | None = None, connections: tuple[int, ...] = ALL) -> Row:
    """Return a row of GETs; path makes one for the number of a user."""
    pools: dict[Target, list[bytes]] = {}

    def requests(target: Target, number: int) -> Iterator[bytes]:
        chance = random.Random()
        if target not in pools:                            # before the processes are forked
            pools[target] = [target.render("GET", path(chance.randrange(people.count)))
                             for _ in range(POOL)]
        while True:
            yield chance.choice(pools[target])
    return Row((name,), (what,), requests, hits=hits, connections=connections)


def filter_row(name: str, what: str, people: People, filter: Callable[[int], str], hits: int,
               connections: tuple[int, ...] = ALL) -> Row:
    """Return a row of a filter; it is made for the number of a user."""
    return read_row(name, f"{what}: {hits} found", people,
                    lambda n: f"/Users?filter={quote(filter(n))}", hits, connections)


def lookup_rows(people: People) -> list[Row]:
    """Return the rows that Entra ID asks for most."""
    return [
        filter_row("lookup", "userName eq", people,
                   lambda n: f'userName eq "user{n:07}@example.com"', 1),
        filter_row("miss", "userName eq", people,
                   lambda n: f'userName eq "nobody{n:07}@example.com"', 0),
        read_row("get", "GET by id", people, lambda n: f"/Users/{random.choice(people.sample())}"),
    ]


def list_rows(people: People) -> list[Row]:
    """Return the rows of pages; deep is the end by index, the middle by cursor."""
    last = people.count - PAGE + 1
    return [
        read_row("list-first", f"first {PAGE} by index", people, lambda n: f"/Users?count={PAGE}"),
        read_row("list-last", f"last {PAGE} by index", people,
                 lambda n: f"/Users?startIndex={last - n % PAGE}&count={PAGE}", connections=FEW),
        read_row("cursor-first", f"first {PAGE} by cursor", people,
                 lambda n: f"/Users?count={PAGE}&cursor="),
        read_row("cursor-deep", f"{PAGE} in the middle by cursor", people,
                 lambda n: f"/Users?count={PAGE}&cursor={people.middle}"),
    ]


def filter_rows(people: People) -> list[Row]:
    """Return the rows of filters other than the lookup."""
    rows = [
        ("filter-title", "title eq", lambda n: f'title eq "Title {n // 100}"', 100, ALL),
        ("filter-sw", "userName sw", lambda n: f'userName sw "user{n // 100:05}"', 100, ALL),
        ("filter-path", "emails[type and value eq]",
         lambda n: f'emails[type eq "work" and value eq "user{n:07}@example.com"]', 1, ALL),
        ("filter-and", "title eq and familyName eq",
         lambda n: f'title eq "Title {n // 100}" and name.familyName eq "Family {n // 10}"', 10, ALL),
        ("filter-broad", "title eq and active eq true",
         lambda n: f'title eq "Title {n // 100}" and active eq true', 90, ALL),
        ("filter-co", "userName co", lambda n: f'userName co "{n:07}@"', 1, FEW),
    ]
    if people.custom:
        rows.insert(1, ("filter-custom", "custom field eq",
                        lambda n: f'{FACILIO}:costcode eq "CC{n:07}"', 1, ALL))
    return [filter_row(name, what, people, filter, hits, connections)
            for name, what, filter, hits, connections in rows]


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
            yield target.render("PATCH", f"/Users/{chance.choice(sample)}", {
                "schemas": [PATCH_OP], "Operations": [{
                    "op": "replace", "path": f"{ENTERPRISE}:department", "value": tag}]})

    def creates(target: Target, number: int) -> Iterator[bytes]:
        template = target.render("POST", "/Users", person(MARK, 1, people.custom, "New hire"))
        return (template.replace(MARK.encode(), tag.encode()) for tag in fresh_tags(number))

    def bulks(target: Target, number: int) -> Iterator[bytes]:
        template = target.render("POST", "/Bulk", bulk([
            ("/Users", person(f"{MARK}-{k}", 1, people.custom, "New hire")) for k in range(100)]))
        return (template.replace(MARK.encode(), tag.encode()) for tag in fresh_tags(number))
    return [
        Row(("patch",), ("PATCH of one attribute",), patches, "fsync", connections=ALL),
        Row(("create",), ("POST of a user",), creates, "sqlite", (201,)),
        Row(("bulk",), ("Bulk of 100 POSTs",), bulks, "sqlite", unit="users/s", things=100,
            connections=(1,)),
    ]


def group_row(people: People, size: int) -> Row:
    """Return the row that adds members to a group and removes them, each connection its own."""
    made: list[Any] = []

    def requests(target: Target, number: int) -> Iterator[bytes]:
        if not made:                                       # before the processes are forked
            made.extend((people.joiners(max(ALL)), people.group(size)))
        joiners, group = made
        return itertools.cycle([target.render("PATCH", f"/Groups/{group}",
                                              members_patch(op, [joiners[number % max(ALL)]]))
                                for op in ("add", "remove")])
    return Row((f"group-{size}-add", f"group-{size}-remove"),
               (f"one member to a group of {size:,}", f"one member of a group of {size:,}"),
               requests, "fsync", (200, 204))


def all_rows(people: People) -> list[Row]:
    """Return all rows of requests, in the order in which they are measured."""
    return [*lookup_rows(people), *list_rows(people), *filter_rows(people), *create_rows(people),
            *(group_row(people, size) for size in GROUP_SIZES if size <= people.count)]


def probe(row: Row, target: Target) -> int:
    """Try a row once, and return the size of the answer's body; BenchError for a wrong answer."""
    with closing(Wire(target)) as wire:
        for request in itertools.islice(row.requests(target, 0), len(row.names)):
            answer = wire.exchange(request, *row.statuses)
            size = len(wire.answer) - wire.head_end - 4
            if row.hits is not None and answer["totalResults"] != row.hits:
                raise BenchError(f"{row.names[0]}: expected {row.hits} resources, "
                                 f"got {answer['totalResults']} of {wire.shown()}")
            if row.unit == "users/s" and (refused := [
                    one for one in answer["Operations"] if str(one["status"]) != "201"]):
                raise BenchError(f"{row.names[0]}: {refused[0]}")
    return size


def measure_row(row: Row, target: Target, connections: int, options: argparse.Namespace) -> list[Load]:
    """Return the medians of several runs of a row, for each of its names."""
    runs = [measure(target, row.requests, connections, options.seconds, row.statuses,
                    len(row.names)) for _ in range(options.runs)]
    return [Load.median(loads) for loads in zip(*runs, strict=True)]


def run_rows(rows: Sequence[Row], target: Target, server: Server | None, limits: Limits,
             options: argparse.Namespace) -> None:
    """Measure rows and report them against their limits."""
    for row in rows:
        size = probe(row, target)
        for connections in (n for n in row.connections if n in options.connections):
            before = server.commits() if server else 0
            loads = measure_row(row, target, connections, options)
            commits = server.commits() - before if server else 0
            writes = row.limit != "stock"
            if writes and options.commit_delay is not None and not commits:
                raise BenchError(f"{row.names[0]}: the wrapper of --commit-delay saw no commit")
            note = f"{sum(load.count for load in loads) / commits:.1f} requests a commit" \
                if writes and commits else ""
            limit, limit_name = limits.rate(row.limit, size, connections)
            ceiling, _ = limits.rate("generator", 1024, connections)
            if sum(load.rate for load in loads) / len(loads) > ceiling / 2:
                note += " (half of the generator's ceiling: measures both)"
            for name, what, load in zip(row.names, row.what, loads, strict=True):
                rate = load.rate * row.things
                limits.report.add(Result(name, what, connections, rate, row.unit, load.p50, load.p99,
                                         rate / limit, limit_name, note))


# -- Start, memory, first sync -------------------------------------------------------


def time_start(server: Server) -> float:
    """Return the seconds from the start of a server to its first answer, and leave it running."""
    started = now()
    target = server.start()
    with closing(Wire(target)) as wire:
        wire.exchange(target.lookup('userName eq "user0000000@example.com"'))
    return now() - started


def bare_start() -> float:
    """Return the seconds that Python takes to start and do nothing."""
    started = now()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return now() - started


def report_start(server: Server, what: str, report: Report, runs: int) -> None:
    """Measure the start of a server that is not running, and its memory after the first answer."""
    times, sizes, bare = [], [], []
    for _ in range(runs):
        times.append(time_start(server))
        sizes.append(server.rss())
        server.stop()
        bare.append(bare_start())
    seconds, limit = statistics.median(times), statistics.median(bare)
    report.add(Result("start", f"to the first answer, {what}", 1, seconds, "s", None, None,
                      seconds / limit, "python -c pass"))
    report.add(Result("rss-idle", f"resident after it, {what}", 1, statistics.median(sizes), "MiB"))


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


def sync_by_bulk(wire: Wire, users: int, groups: int, progress: Progress) -> tuple[list[float], ...]:
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
        send_bulk(wire, [("/Groups", group_body(f"group {n}", sync_members(ids, n))) for n in numbers])
        group_times.append(now() - started)
        progress.at(users + numbers[-1] + 1)
    return user_times, group_times


def group_body(name: str, ids: Sequence[str] = ()) -> Json:
    """Return a group with members."""
    body = {"schemas": ["urn:ietf:params:scim:schemas:core:2.0:Group"], "displayName": name}
    return {**body, "members": [{"value": id} for id in ids]} if ids else body


def sync_members(ids: Sequence[str], number: int) -> list[str]:
    """Return the ids of the 100 members of a group of the first sync, or fewer."""
    return [ids[(number * 37 + step * 101) % len(ids)] for step in range(min(100, len(ids)))]


def report_sync(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Measure first syncs into empty servers, one request after the other and by Bulk."""
    users = options.sync_users
    groups, seconds = max(users // 100, 1), {}
    for way, sync in (("sync", sync_singly), ("sync-bulk", sync_by_bulk)):
        shutil.rmtree(folder / way, ignore_errors=True)
        server = Server(folder / way, options)
        try:
            with closing(Wire(server.start())) as wire:
                user_times, group_times = sync(wire, users, groups, Progress(way, users + groups))
        finally:
            server.stop()
            shutil.rmtree(folder / way, ignore_errors=True)
        seconds[way] = sum(user_times) + sum(group_times)
        for what, count, times in ((f"{users:,} users", users, user_times),
                                   (f"{groups:,} groups of 100", groups, group_times)):
            report.add(Result(way, what, 1, count / sum(times), "a second"))
            if tenth := len(times) // 10:
                report.add(Result(way, f"{what}: last tenth's time", 1, sum(times[-tenth:]), "s",
                                  None, None, sum(times[-tenth:]) / sum(times[:tenth]),
                                  "the first tenth's"))
    report.add(Result("sync", "the whole", 1, seconds["sync"], "s"))
    report.add(Result("sync-bulk", "the whole", 1, seconds["sync-bulk"], "s", None, None,
                      seconds["sync"] / seconds["sync-bulk"], "times as fast as without"))


# -- The peer ----------------------------------------------------------------------


def peer_server(name: str, folder: Path, options: argparse.Namespace) -> tuple[Server, str]:
    """Return a peer installed in a venv, as its README serves it, and its name with the version."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        print(f"installing {name}", file=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", name],
                       check=True)
    code = f"import importlib.metadata; print(importlib.metadata.version({name!r}))"
    version = subprocess.run([python, "-c", code], check=True, capture_output=True,
                             text=True).stdout.strip()
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
        rows = [{row.names[0]: row for row in [*lookup_rows(people), *create_rows(people)]}
                for people in crowds]
        for key in ("lookup", "get", "create"):
            loads: list[list[Load]] = [[], []]
            for _ in range(options.runs):
                for people, found, series in zip(crowds, rows, loads, strict=True):
                    probe(found[key], people.target)
                    series += measure(people.target, found[key].requests, 1, options.seconds,
                                      found[key].statuses)
            ours, theirs = map(Load.median, loads)
            report.add(Result(key, name, 1, theirs.rate, "requests/s", theirs.p50, theirs.p99))
            report.add(Result(key, "scim_server", 1, ours.rate, "requests/s", ours.p50, ours.p99,
                              ours.rate / theirs.rate, name))
    finally:
        for server in servers:
            server.stop()


# -- Results -----------------------------------------------------------------------


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
            print(self.LINE.format("row", "what", "conn.", "value", "unit", "p50 ms", "p99 ms",
                                   "ratio", "to"))
        self.results.append(result)
        print(self.LINE.format(
            result.name, result.what, result.connections, digits(result.value), result.unit,
            digits(result.p50), digits(result.p99), digits(result.ratio),
            f"{result.limit}  {result.note}".strip()), flush=True)

    def save(self, path: str, options: argparse.Namespace) -> None:
        """Write the results for --compare."""
        machine = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version,
                   "system": platform.platform(), "cpus": os.cpu_count(),
                   "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        Path(path).write_text(json.dumps({
            "machine": machine, "options": vars(options),
            "results": [asdict(result) for result in self.results]}, indent=1) + "\n")


def digits(value: float | None) -> str:
    """Return a number with three digits or all before the point, "" for None."""
    if value is None:
        return ""
    places = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:,.{places}f}"


def compare(paths: Sequence[str]) -> None:
    """Print the values of two files of results beside each other, and the second by the first."""
    before, after = ({(found["name"], found["what"], found["connections"]): found
                      for found in json.loads(Path(path).read_text())["results"]} for path in paths)
    line = "{:<19} {:<38} {:>5} {:<10} {:>10} {:>10} {:>7} {:>7}"
    print(line.format("row", "what", "conn.", "unit", "A", "B", "B / A", "p99"))
    for key in before.keys() & after.keys() and [key for key in before if key in after]:
        old, new = before[key], after[key]
        p99 = new["p99"] / old["p99"] if old["p99"] and new["p99"] else None
        print(line.format(*key, old["unit"], digits(old["value"]), digits(new["value"]),
                          digits(new["value"] / old["value"]), digits(p99)))


# -- Command line ------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description="The load bench of scim_server.")
    add = parser.add_argument
    add("--users", type=int, default=10_000, metavar="N", help="users to fill in (default 10000)")
    add("--sync-users", type=int, metavar="N", help="users of the first sync (default: as --users, "
                                                    "10000 at the most)")
    add("--only", default="", metavar="NAME,…", help="rows, by the start of their names: "
        "lookup, miss, get, list, cursor, filter, patch, create, bulk, group, start, rss, sync")
    add("--connections", default="1,8,64", metavar="N,…", help="of 1, 8 and 64")
    add("--seconds", type=float, default=2, metavar="S", help="of a measurement (default 2)")
    add("--runs", type=int, default=3, metavar="R", help="the medians of which count (default 3)")
    add("--json", metavar="FILE", help="write the results")
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help="print two results, then end")
    add("--against", choices=["scim2-server"], help="measure lookup, get and create on a peer too")
    add("--url", help="load a server that runs, with --token")
    add("--token", default=TOKEN)
    add("--keep", metavar="DIR", help="scratch directory; what is filled there is used again")
    add("--commit-delay", type=float, metavar="MS", help="delay each commit, and count them (0: "
                                                         "only count)")
    add("--workers", type=int, metavar="N", help="passed on to the server")
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="of the server's configuration, such as access_log=off")
    options = parser.parse_args(arguments)
    if options.users < 100 or options.users % 100:
        parser.error("--users: expected a multiple of 100")
    if options.url and (options.commit_delay is not None or options.workers or options.against):
        parser.error("--url: the server runs already; not with --commit-delay, --workers, --against")
    options.only = tuple(filter(None, options.only.split(",")))
    options.connections = [int(text) for text in options.connections.split(",")]
    options.sync_users = options.sync_users or min(options.users, 10_000)
    return options


def run_scratch(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Measure a server of our own on a folder."""
    def wanted(*names: str) -> bool:
        return not options.only or any(name.startswith(options.only) for name in names)

    server = Server(folder / "server", options)
    try:
        People(server.start(), options.users).fill()
        server.stop()
        if wanted("start", "rss"):
            report_start(Server(folder / "empty", options), "empty", report, options.runs)
            shutil.rmtree(folder / "empty")
            report_start(server, f"{options.users:,} users", report, options.runs)
        target = server.start()
        rows = [row for row in all_rows(People(target, options.users)) if wanted(*row.names)]
        limits = Limits(options, report, folder, folder / "server" / "data" / "bench.sqlite3")
        run_rows(rows, target, server, limits, options)
        if wanted("rss") and rows:
            report.add(Result("rss-load", "resident after all rows", 1, server.rss(), "MiB"))
    except BenchError as error:
        tail = (server.folder / "server.log").read_text()[-1000:]
        raise BenchError(f"{error}\nthe server's log ends:\n{tail}") from None
    finally:
        server.stop()
    if wanted("sync"):
        report_sync(folder, options, report)


def run_url(folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Measure a server that runs somewhere."""
    people = People(Target.of(options.url, options.token), options.users, custom=False)
    people.fill()
    rows = [row for row in all_rows(people) if not options.only
            or any(name.startswith(options.only) for name in row.names)]
    run_rows(rows, people.target, None, Limits(options, report, folder, None), options)


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
