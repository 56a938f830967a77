"""The load: requests over keep-alive connections from processes of their own, by hand-made HTTP.

The generator must be cheap, or it would be measured instead of the server: requests are made before
their clock starts, answers are looked at as far as their status and length, and the bench prints what
the generator reaches against a server that does nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import select
import socket
import statistics
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any
from urllib.parse import quote, urlsplit

PATIENCE = 300  # seconds that an answer may take
RESTING = 20  # seconds after which a connection is opened again
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
        lines = [
            f"{method} {self.path}{path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            f"Authorization: Bearer {self.token}",
            "Accept: application/scim+json",
        ]
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
        self.started = now()
        self.socket: socket.socket | None = None
        self.connect()

    def connect(self) -> socket.socket:
        """Open the connection if it is not open."""
        if self.socket is None:
            self.socket = socket.create_connection((self.target.host, self.target.port), PATIENCE)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A timeout of Python costs a poll for each recv; one of the kernel costs nothing.
            self.socket.settimeout(None)
            self.socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0)
            )
        return self.socket

    def send(self, request: bytes) -> None:
        """Start a request and its clock."""
        self.request, self.answer, self.needed = request, b"", 0
        self.started = now()
        (self.socket or self.connect()).sendall(request)

    def receive(self) -> bool:
        """Read once; return whether the answer is there."""
        chunk = self.socket.recv(1 << 18)  # type: ignore[union-attr]
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
            raise BenchError(
                f"expected {' or '.join(map(str, statuses))} of {self.shown()}, got "
                f"{self.answer[:2000].decode(errors='replace')}"
            )
        if self.CLOSES.match(self.answer, 0, self.head_end):
            self.close()

    def exchange(self, request: bytes, *statuses: int) -> Json:
        """Send a request and return the JSON of its answer, None where it is empty."""
        if now() - self.started > RESTING:  # the server may have ended it meanwhile
            self.close()
        self.send(request)
        while not self.receive():
            pass
        self.finish(statuses or (200,))
        body = self.answer[self.head_end + 4 :]
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


Requests = Callable[[Target, int], Iterator[bytes]]  # of the connection with a number


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
        at = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (0.5, 0.99)]
        return cls(rate, at[0] * 1000, at[1] * 1000, len(ordered))

    @classmethod
    def median(cls, loads: Sequence[Load]) -> Load:
        """Return the medians of several runs."""
        rate, p50, p99 = (
            statistics.median(getattr(load, name) for load in loads)
            for name in ("rate", "p50", "p99")
        )
        return cls(rate, p50, p99, sum(load.count for load in loads))


def measure(
    target: Target,
    requests: Requests,
    connections: int,
    seconds: float,
    statuses: tuple[int, ...] = (200,),
    cycle: int = 1,
) -> list[Load]:
    """Load a target over some connections; return a Load for each place in the cycle of requests.

    A connection ends after a whole cycle, such as the adding and the removing of a member.
    """
    count = min(connections, os.cpu_count() or 1)
    pipes, processes = [], []
    for first in range(count):
        ours, theirs = FORK.Pipe()
        numbers = range(first, connections, count)
        processes.append(
            FORK.Process(
                target=load_worker,
                daemon=True,
                args=(theirs, target, requests, numbers, seconds, statuses, cycle),
            )
        )
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        for _ in map(received, pipes):
            pass  # all are connected
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


def load_worker(
    pipe: Pipe,
    target: Target,
    requests: Requests,
    numbers: Sequence[int],
    seconds: float,
    statuses: tuple[int, ...],
    cycle: int,
) -> None:
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


def drive_one(
    wires: dict[Wire, Iterator[bytes]], deadline: float, statuses: tuple[int, ...], cycle: int
) -> None:
    """Send one request after the other until a deadline."""
    [(wire, requests)] = wires.items()
    while now() < deadline or len(wire.durations) % cycle:
        wire.send(next(requests))
        while not wire.receive():
            pass
        wire.finish(statuses)


def drive_many(
    wires: dict[Wire, Iterator[bytes]], deadline: float, statuses: tuple[int, ...], cycle: int
) -> None:
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
