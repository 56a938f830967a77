"""Whom the bench has the server know: users as Entra ID sends them, groups, and their filling in."""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from load import BenchError, Json, Target, Wire, now

ENTERPRISE = "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User"
FACILIO = "urn:ietf:params:scim:schemas:extension:facilio:2.0:User"
PATCH_OP = "urn:ietf:params:scim:api:messages:2.0:PatchOp"
BULK_REQUEST = "urn:ietf:params:scim:api:messages:2.0:BulkRequest"
FILL_BATCH = 500  # users in a Bulk request
MEMBER_BATCH = 10_000  # members in a PATCH


def person(tag: str, number: int = 0, custom: bool = True, title: str = "") -> Json:
    """Return a user as Entra ID sends it; people in a hundred share a title, in ten a family."""
    user: Json = {
        "schemas": ["urn:ietf:params:scim:schemas:core:2.0:User", ENTERPRISE],
        "userName": f"user{tag}@example.com",
        "externalId": f"ext{tag}",
        "active": number % 10 != 0,
        "displayName": f"Given Family {tag}",
        "name": {"givenName": f"Given{number % 1000}", "familyName": f"Family {number // 10}"},
        "title": title or f"Title {number // 100}",
        "emails": [
            {"type": "work", "value": f"user{tag}@example.com", "primary": True},
            {"type": "home", "value": f"home{tag}@example.org"},
        ],
        "phoneNumbers": [{"type": "work", "value": f"+1 555 {tag}"}],
        ENTERPRISE: {"employeeNumber": tag, "department": f"Department {number % 50}"},
    }
    if custom:
        user["schemas"] += [FACILIO]
        user[FACILIO] = {"costcode": f"CC{tag}", "badge_number": number}
    return user


def bulk(operations: Sequence[tuple[str, Json]]) -> Json:
    """Return a Bulk request of POSTs, each (path, body)."""
    return {
        "schemas": [BULK_REQUEST],
        "Operations": [
            {"method": "POST", "path": path, "bulkId": f"b{number}", "data": body}
            for number, (path, body) in enumerate(operations)
        ],
    }


def send_bulk(wire: Wire, operations: Sequence[tuple[str, Json]]) -> list[str]:
    """Create resources by Bulk and return their ids."""
    answers = wire.exchange(wire.target.render("POST", "/Bulk", bulk(operations)))["Operations"]
    if refused := [answer for answer in answers if str(answer["status"]) != "201"]:
        raise BenchError(f"Bulk: {len(refused)} operations refused, the first one: {refused[0]}")
    return [answer["location"].rpartition("/")[2] for answer in answers]


def members_patch(op: str, ids: Sequence[str]) -> Json:
    """Return the PATCH that adds or removes members."""
    return {
        "schemas": [PATCH_OP],
        "Operations": [{"op": op, "path": "members", "value": [{"value": id} for id in ids]}],
    }


def group_body(name: str, ids: Sequence[str] = ()) -> Json:
    """Return a group with members."""
    body = {"schemas": ["urn:ietf:params:scim:schemas:core:2.0:Group"], "displayName": name}
    return {**body, "members": [{"value": id} for id in ids]} if ids else body


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
            print(
                f"\r{self.what}: {done:,} of {self.total:,}, {rate:,.0f}/s",
                file=sys.stderr,
                end="\n" if last or not terminal else "",
                flush=True,
            )


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

    def clear(self) -> None:
        """Remove the groups that an earlier run left."""
        left = self.wire.exchange(
            self.target.render(
                "GET",
                (
                    "/Groups?attributes=displayName&filter="
                    + quote('displayName sw "bench group of"')
                ),
            )
        )
        for group in left.get("Resources", ()):
            self.wire.exchange(self.target.render("DELETE", f"/Groups/{group['id']}"), 204)

    def fill(self) -> None:
        """Create the users that are missing, by Bulk."""
        self.clear()
        if self.numbered(self.count):
            raise BenchError(
                f"there are more than {self.count:,} users already; use another --keep"
            )
        present, end = 0, self.count  # the users below present are there
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
            page = self.wire.exchange(
                self.target.render(
                    "GET", f"/Users?attributes=userName&count={size}&cursor={cursor}"
                )
            )
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
        return [
            self.found(f"user{name}@example.com")
            or self.wire.exchange(
                self.target.render("POST", "/Users", person(name, 0, self.custom, "Joiner")), 201
            )["id"]
            for name in names
        ]

    def group(self, size: int) -> str:
        """Create a group of the first users and return its id."""
        body = group_body(f"bench group of {size}")
        id = self.wire.exchange(self.target.render("POST", "/Groups", body), 201)["id"]
        ids = self.first(size)
        for start in range(0, size, MEMBER_BATCH):
            patch = members_patch("add", ids[start : start + MEMBER_BATCH])
            self.wire.exchange(self.target.render("PATCH", f"/Groups/{id}", patch), 200, 204)
        return str(id)
