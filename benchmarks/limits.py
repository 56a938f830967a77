"""The limits of a machine: http.server with a constant, a socket with a constant, SQLite alone, fsync."""

from __future__ import annotations

import argparse
import http.server
import importlib
import itertools
import os
import select
import socket
import sqlite3
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from load import FORK, Json, Load, Target, measure, now
from report import Report, Result

SERVER = Path(__file__).resolve().parent.parent / "scim_server.py"


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
    """Serve a constant by http.server as it comes, its log to nowhere."""
    body = b"x" * size
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else its second write awaits an ACK: 25 answers a second

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/scim+json")
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(body)

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


NUMBER, ID = "9876543210", "id-of-the-user"  # stand in the rows of a create for what differs
Insert = tuple[str, str, list[dict[str, Any]]]  # table, statement, rows


def rows_of_a_create(path: Path, body: Json) -> list[Insert]:
    """Return what the create of a user writes, taken from the tables of an empty store before and after one."""
    module = server_module()
    fields = [
        module.CustomField("costcode", "String"),
        module.CustomField("badge_number", "Integer"),
    ]
    directory = module.Directory(module.Store(path), fields, new_id=lambda: ID)
    inserts: list[Insert] = []
    with closing(sqlite3.connect(path)) as reader:
        tables = reader.execute(
            "SELECT name, sql LIKE '%AUTOINCREMENT%' FROM sqlite_master "
            "WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
        before = {name: reader.execute(f"SELECT * FROM {name}").fetchall() for name, _ in tables}
        directory.create("User", body)
        for name, numbered in tables:  # the first column may number itself
            found = reader.execute(f"SELECT * FROM {name}")
            columns = [column[0] for column in found.description][numbered:]
            rows = [
                dict(zip(columns, row[numbered:], strict=True))
                for row in found
                if row not in before[name]
            ]
            marks = ", ".join(f":{column}" for column in columns)
            inserts += [
                (name, f"REPLACE INTO {name} ({', '.join(columns)}) VALUES ({marks})", rows)
            ]
    directory.store.close()
    return [insert for insert in inserts if insert[2]]


class RawSqlite:
    """What a create costs in SQLite alone: the same rows, a commit each, on a copy of the database."""

    def __init__(self, folder: Path, filled: Path | None, delay: float, body: Json) -> None:
        self.delay = delay
        self.path = path = folder / "raw.sqlite3"
        for stale in folder.glob("raw.sqlite3*"):
            stale.unlink()
        self.inserts = rows_of_a_create(path, body)
        if filled:
            with closing(sqlite3.connect(filled)) as source, closing(sqlite3.connect(path)) as copy:
                source.backup(copy)
        self.numbers = itertools.count(5 * 10**9)
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

    def close(self) -> None:
        """Remove the copy."""
        self.connection.close()
        self.path.unlink()

    def _fresh(self) -> list[Insert]:
        number, id = f"{next(self.numbers):010}", str(uuid.uuid4())
        return [
            (
                table,
                statement,
                [
                    {
                        name: value.replace(NUMBER, number).replace(ID, id)
                        if isinstance(value, str)
                        else value
                        for name, value in row.items()
                    }
                    for row in rows
                ],
            )
            for table, statement, rows in self.inserts
        ]


@dataclass
class Limits:
    """What this machine could do, each measured when it is first asked for and reported."""

    options: argparse.Namespace
    report: Report
    folder: Path
    filled: Path | None  # the database that SQLite alone works on a copy of
    user: Json  # with NUMBER for what differs between users
    known: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def rate(self, kind: str, size: int, connections: int) -> tuple[float, str]:
        """Return requests a second of a limit, and its name; size is that of the answer's body."""
        step = 1 << max(size.bit_length() - 2, 7)  # neighbours in size share a measurement
        size = max(round(size / step), 1) * step
        name, key = {
            "stock": (f"http.server, {size:,} B", (kind, size, connections)),
            "generator": (f"the generator, {size:,} B", (kind, size, connections)),
            "sqlite": ("raw SQLite create", (kind, 0, 1)),
            "fsync": ("one fsync", (kind, 0, 1)),
        }[kind]
        if key not in self.known:
            load = Load.median(list(self._loads(*key)))
            self.known[key] = load.rate
            self.report.add(
                Result("limit", name, key[2], load.rate, "a second", load.p50, load.p99)
            )
        return self.known[key], name

    def _loads(self, kind: str, size: int, connections: int) -> Iterator[Load]:
        seconds, runs = self.options.seconds, range(self.options.runs)
        if kind == "fsync":
            yield from (fsyncs(self.folder, seconds) for _ in runs)
        elif kind == "sqlite":
            raw = RawSqlite(
                self.folder, self.filled, (self.options.commit_delay or 0) / 1000, self.user
            )
            yield from (raw.run(seconds) for _ in runs)
            raw.close()
        else:
            with served(serve_stock if kind == "stock" else serve_echo, size) as target:
                for _ in runs:
                    yield measure(target, constant_requests, connections, seconds)[0]
