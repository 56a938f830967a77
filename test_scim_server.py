"""Tests of scim_server, in the order of its chapters: real HTTP, real SQLite files."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

import scim_server

USER = scim_server.USER
GROUP = scim_server.GROUP
ENT = scim_server.ENTERPRISE
FAC = scim_server.FACILIO
PATCH_OP = "urn:ietf:params:scim:api:messages:2.0:PatchOp"
HERE = Path(__file__).parent

CONFIG = {"tenants": [
    {"name": "acme", "tokens": [{"name": "entra", "secret": "acme-secret"}], "custom_fields": [
        {"link_name": "union_code", "display_name": "Union code", "type": "String"},
        {"link_name": "locker_no", "type": "Integer"},
        {"link_name": "night_shift", "type": "Boolean"},
    ]},
    {"name": "globex", "tokens": [{"name": "entra", "secret": "globex-secret"}]},
]}


class Scim:
    """A tenant seen by its client: paths below /scim/v2, bodies and answers as JSON."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {token}"

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> requests.Response:
        """Send a request; header names are given with underscores."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        fields.setdefault("Content-Type", "application/scim+json; charset=utf-8")
        return self.session.request(method, self.url + path, json=body, headers=fields)

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON of a GET that succeeds."""
        answer = self.session.get(self.url + path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def create(self, path: str, **body: Any) -> Any:
        """Return the resource that a POST creates."""
        answer = self.call("POST", path, body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def user(self, name: str, **attributes: Any) -> Any:
        """Return a new user."""
        return self.create("/Users", userName=name, **attributes)

    def group(self, name: str, *members: str) -> Any:
        """Return a new group with members of those ids."""
        return self.create("/Groups", displayName=name, members=[{"value": id} for id in members])

    def try_patch(self, path: str, *operations: Any) -> requests.Response:
        """Send operations as one PATCH."""
        return self.call("PATCH", path, {"schemas": [PATCH_OP], "Operations": list(operations)})

    def patch(self, path: str, *operations: Any) -> Any:
        """Return the resource after a PATCH that succeeds."""
        answer = self.try_patch(path, *operations)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def names(self, filter: str, path: str = "/Users", **parameters: Any) -> list[str]:
        """Return the userNames or displayNames that a filter finds, in order."""
        found = self.get(path, filter=filter, **parameters)["Resources"]
        return [one.get("userName") or one["displayName"] for one in found]


def assert_error(answer: requests.Response, status: int, scim_type: str = "",
                 *words: str) -> None:
    """Check that an answer is a SCIM error (RFC 7644 §3.12) whose detail has some words."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"].startswith("application/scim+json")
    error = answer.json()
    assert error["schemas"] == [scim_server.ERROR]
    assert error["status"] == str(status)
    assert error.get("scimType", "") == scim_type, error
    assert error["detail"] and all(word in error["detail"] for word in words), error


@contextmanager
def serving(data_dir: Path, document: Any = CONFIG) -> Iterator[scim_server.ScimServer]:
    """Run a server on a free port of this process."""
    config = scim_server.parse_config({**document, "data_dir": str(data_dir)})
    directories = scim_server.open_directories(config)
    server = scim_server.ScimServer(scim_server.Application(directories), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
        for directory in directories.values():
            directory.store.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[scim_server.ScimServer]:
    """A server with the tenants acme and globex, both empty."""
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def scim(server: scim_server.ScimServer) -> Scim:
    """The client of the tenant acme."""
    return Scim(server.url, "acme-secret")


@pytest.fixture
def globex(server: scim_server.ScimServer) -> Scim:
    """The client of another tenant on the same server."""
    return Scim(server.url, "globex-secret")


# -- 2. Schemas ----------------------------------------------------------------


# -- 3. Filters and paths --------------------------------------------------------


# -- 4. Resources ----------------------------------------------------------------


# -- 5. PATCH --------------------------------------------------------------------


# -- 6. Storage ------------------------------------------------------------------


# -- 7. Employees ----------------------------------------------------------------


# -- 8. Directory: what identity providers send ------------------------------------


# -- 9. Configuration --------------------------------------------------------------


# -- 10. Application ---------------------------------------------------------------


def test_a_user_that_was_created_can_be_read(scim: Scim) -> None:
    created = scim.user("ada", title="Engineer")
    assert scim.get(f"/Users/{created['id']}") == created


# -- 11. HTTP server ---------------------------------------------------------------


# -- 13. Command line --------------------------------------------------------------


# -- Properties: random people against a second reading of the RFCs ------------------

SEED = int(os.environ.get("SCIM_SEED", "0")) or random.randrange(1, 10 ** 9)
FILTER_COUNT = int(os.environ.get("SCIM_FILTERS", "5000"))
PATCH_COUNT = int(os.environ.get("SCIM_PATCHES", "2000"))
TEXTS = ["a", "A", "ab", "B", "ß", "SS", "é", "É", "%", "_", 'q"q', "back\\slash", "a b", "x", "zz",
         "\U0001f600", "İ"]
TIMES = ["2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00", "2025-12-31T23:59:59.9999999Z",
         "0001-01-01T00:00:00.0000000Z"]
NUMBERS = [0, 1, -1, 7, 2 ** 40, -2 ** 63, 2 ** 63 - 1]
TYPES = scim_server.resource_types(scim_server.parse_config(CONFIG).tenants[0].custom_fields)
USER_TYPE = TYPES["User"]


def some_value(chance: random.Random, attribute: scim_server.Attribute) -> Any:
    """Return a random value of an attribute, one that clients may write."""
    if attribute.type == "complex":
        subs = [sub for sub in attribute.sub_attributes if sub.mutability == "readWrite"]
        chosen = chance.sample(subs, chance.randint(1, min(3, len(subs))))
        return {sub.name: some_value(chance, sub) for sub in chosen}
    kinds = {"boolean": [True, False], "integer": NUMBERS, "dateTime": TIMES}
    return chance.choice(kinds.get(attribute.type, TEXTS))


def writable(attribute: scim_server.Attribute) -> list[scim_server.Attribute]:
    """Return the sub-attributes that clients may write and read back."""
    return [sub for sub in attribute.sub_attributes
            if sub.mutability == "readWrite" and not sub.linked]


def some_user(chance: random.Random, name: str) -> Any:
    """Return the body of a random user."""
    body: dict[str, Any] = {}
    for sub in chance.sample(writable(USER_TYPE.root), chance.randint(0, 9)):
        count = chance.randint(1, 3) if sub.multi_valued else 1
        values = [some_value(chance, sub) for _ in range(count)]
        body[sub.name] = values if sub.multi_valued else values[0]
    return body | {"userName": name}


def stored_below(attribute: scim_server.Attribute) -> list[scim_server.Attribute]:
    """Return the sub-attributes but for those that are made for each answer."""
    return [sub for sub in attribute.sub_attributes
            if sub.name not in ("version", "location", "$ref")]


def some_filter(chance: random.Random, scope: scim_server.Attribute, depth: int = 3) -> str:
    """Return the text of a random filter on the attributes of a scope."""
    if depth and chance.random() < 0.5:
        inner = [some_filter(chance, scope, depth - 1) for _ in range(chance.randint(1, 3))]
        joined = chance.choice([" and ", " or ", " OR "]).join(inner)
        return f"({joined})" if chance.random() < 0.6 else f"not ({joined})"
    attribute = chance.choice(stored_below(scope))
    name = attribute.name
    if attribute.type == "complex":
        if chance.random() < 0.2:
            return f"{name} pr"
        below = ":" if ":" in name else "."
        if below == "." and chance.random() < 0.5:
            return f"{name}[{some_filter(chance, attribute, depth - 1 if depth else 0)}]"
        attribute = chance.choice(stored_below(attribute))
        name += below + attribute.name
        if attribute.type == "complex":
            return f"{name} pr"
    return f"{name} {some_comparison(chance, attribute)}"


def some_comparison(chance: random.Random, attribute: scim_server.Attribute) -> str:
    """Return an operator that goes with an attribute, and a literal of its type."""
    if chance.random() < 0.15:
        return chance.choice(["pr", "eq null", "ne null"])
    operators = {"boolean": "eq ne", "binary": "eq ne", "integer": "eq ne gt ge lt le",
                 "dateTime": "eq ne gt ge lt le"}.get(attribute.type, "eq ne co sw ew gt ge lt le")
    literal = json.dumps(some_value(chance, attribute), ensure_ascii=chance.random() < 0.5)
    return f"{chance.choice(operators.split())} {literal}"


@pytest.fixture(scope="module")
def crowd() -> Iterator[tuple[scim_server.Directory, list[Any]]]:
    """A directory of random users and groups, and all its resources."""
    chance = random.Random(SEED)
    store = scim_server.Store(":memory:")
    directory = scim_server.Directory(store, TYPES)
    ids = [directory.create(USER_TYPE, some_user(chance, f"{chance.choice(TEXTS)}{number}"))["id"]
           for number in range(40)]
    for number in range(6):
        members = [{"value": id, "display": chance.choice(TEXTS)}
                   for id in chance.sample(ids, chance.randint(0, 9))]
        body = {"displayName": f"{chance.choice(TEXTS)}{number}", "members": members}
        ids.append(directory.create(TYPES["Group"], body)["id"])
    yield directory, [resource for found in TYPES.values()
                      for resource in directory.query(found, count=100).resources]
    store.close()


def test_any_filter_finds_in_sql_what_it_matches_in_python(crowd: Any) -> None:
    directory, resources = crowd
    chance = random.Random(SEED)
    for _ in range(FILTER_COUNT):
        found = TYPES[chance.choice(["User", "User", "User", "Group"])]
        text = some_filter(chance, found.root)
        filter = scim_server.parse_filter(text, found)
        expected = [one["id"] for one in resources if one["meta"]["resourceType"] == found.name
                    and scim_server.matches(filter, one)]
        page = directory.query(found, filter, count=100)
        assert [one["id"] for one in page.resources] == expected, f"seed {SEED}: {text}"
        assert page.total_results == len(expected)


def test_any_sort_gives_the_order_of_the_keys_with_missing_values_last(crowd: Any) -> None:
    directory, resources = crowd
    chance = random.Random(SEED)
    users = [one for one in resources if one["meta"]["resourceType"] == "User"]
    simple = [(sub,) for sub in writable(USER_TYPE.root) if sub.type != "complex"]
    simple += [(sub, low) for sub in writable(USER_TYPE.root) for low in sub.sub_attributes
               if low.type != "complex"]
    for _ in range(300):
        target = scim_server.Target(chance.choice(simple))

        def order(one: Any, target: scim_server.Target = target) -> tuple[bool, str]:
            # The primary value counts, else the first (RFC 7644 §3.4.2.3).
            values = target.attributes[0].name in one and scim_server.Target(
                target.attributes[:1]).items(one) or []
            values = sorted(values, key=lambda value: not scim_server.is_primary(value))
            below = scim_server.Target(target.attributes[1:]) if target.attributes[1:] else None
            keys = [target.attribute.key(item) for value in values[:1]
                    for item in (below.items(value) if below else [value])]
            return (not keys, keys[0] if keys else "")
        expected = [one["id"] for one in sorted(users, key=order)]
        page = directory.query(USER_TYPE, sorting=scim_server.Sorting(target), count=100)
        assert [one["id"] for one in page.resources] == expected, (SEED, target.attribute.path)


# A second, naive reading of RFC 7644 §3.5.2 with this server's decisions: it knows no schema but
# what a step of the generator tells, and takes every rule literally.

Step = tuple[str, list[str], str, bool, Any, str, Any]


def some_step(chance: random.Random) -> tuple[Any, Step]:
    """Return a random operation as sent, and as a step for the naive reading.

    A step is (op, holder names, attribute, multi-valued, (sub, value) of a filter, sub, value).
    """
    op = chance.choice(["add", "replace", "remove"])
    attribute = chance.choice([sub for sub in writable(USER_TYPE.root) if sub.name != "userName"])
    holders: list[str] = []
    path = attribute.name
    if attribute.type == "complex" and not attribute.multi_valued and chance.random() < 0.8:
        holders = [attribute.name]
        attribute = chance.choice(writable(attribute))
        path += (":" if ":" in path else ".") + attribute.name
    filter, sub, value = None, "", some_value(chance, attribute)
    if attribute.multi_valued:
        by = chance.choice([one for one in attribute.sub_attributes if one.type == "string"])
        filter = (by.name, chance.choice(TEXTS[:3])) if chance.random() < 0.6 else None
        if filter:
            path += f"[{by.name} eq {json.dumps(filter[1])}]"
            if chance.random() < 0.6:
                inner = chance.choice(attribute.sub_attributes)
                sub, value = inner.name, some_value(chance, inner)
                path += "." + sub
        else:
            value = [some_value(chance, attribute) for _ in range(chance.randint(1, 2))]
    sent = {"op": op, "path": path} | ({} if op == "remove" else {"value": value})
    if op != "remove" and chance.random() < 0.25:        # the flag dialect: paths as names
        sent = {"op": op, "value": {path: value}}
        op = "add" if isinstance(value, dict) and not attribute.multi_valued else op
    return sent, (op, holders, attribute.name, attribute.multi_valued, filter, sub, value)


EXACT = {("photos", "value"), ("x509Certificates", "value")}     # the values that have a case
SUBS = {"manager": {"value"}}


def same(name: str, one: Any, other: Any) -> bool:
    """Return whether two values of an attribute are the same, whatever is said of primary."""
    def bare(value: Any) -> Any:
        return {sub: item.casefold() if isinstance(item, str) and (name, sub) not in EXACT else item
                for sub, item in value.items() if sub != "primary"}
    return bare(one) == bare(other)


def naive_patch(resource: Any, steps: list[Step]) -> Any:
    """Return what steps make of a resource."""
    resource = json.loads(json.dumps(resource))
    for op, holders, name, multi_valued, filter, sub, value in steps:
        holder = resource
        for inner in holders:
            holder = holder.setdefault(inner, {})
        value = json.loads(json.dumps(value))
        was_primary = [one for one in holder.get(name, []) if is_true(one)] if multi_valued else []
        if filter:
            naive_selected(holder, op, name, filter, sub, value)
        elif op == "remove":
            holder.pop(name, None)
        elif op == "replace" and multi_valued:
            holder[name] = one_primary(value, [])
        elif multi_valued:
            for one in one_primary(value, []):
                twin = [old for old in holder.get(name, []) if same(name, old, one)]
                twin[-1].update(one) if twin else holder.setdefault(name, []).append(one)
        elif op == "add" and isinstance(value, dict) and "value" not in SUBS.get(name, ()):
            holder.setdefault(name, {}).update(value)
        else:
            holder[name] = value
        if multi_valued:
            one_primary(holder.get(name, []), was_primary)
        resource = without_empty(resource)
    return {"active": True} | resource


def naive_selected(holder: Any, op: str, name: str, filter: Any, sub: str, value: Any) -> None:
    """Do a step on the values that a filter selects."""
    by, wanted = filter
    values = holder.setdefault(name, [])
    chosen = [one for one in values if str(one.get(by, "\0")).casefold() == wanted.casefold()]
    if op != "remove" and not chosen:
        chosen = [{by: wanted}]
        values.append(chosen[0])
    for one in chosen:
        if sub and op == "remove":
            one.pop(sub, None)
        elif sub:
            one[sub] = value
        else:
            if op != "add":
                one.clear()
            if op == "replace":
                one[by] = wanted
            if op != "remove":
                one.update(value)


def is_true(value: Any) -> bool:
    """Return whether a value is the primary one."""
    return value.get("primary") is True


def one_primary(values: Any, before: Any) -> Any:
    """Leave primary to the last value that became so."""
    fresh = [one for one in values if is_true(one) and not any(one is old for old in before)]
    for one in values:
        if fresh and one is not fresh[-1] and is_true(one):
            one["primary"] = False
    return values


def without_empty(value: Any) -> Any:
    """Return JSON without empty objects and lists."""
    if isinstance(value, dict):
        found = {name: without_empty(item) for name, item in value.items()}
        return {name: item for name, item in found.items() if item not in ({}, [])}
    return [without_empty(item) for item in value if item != {}] if isinstance(value, list) else value


def test_any_patch_does_what_a_naive_reading_of_the_rfc_does() -> None:
    chance = random.Random(SEED)
    for _ in range(PATCH_COUNT):
        before = scim_server.canonical(USER_TYPE, scim_server.accept(USER_TYPE,
                                                                     some_user(chance, "u")))
        pairs = [some_step(chance) for _ in range(chance.randint(1, 4))]
        sent = [operation for operation, _ in pairs]
        operations = scim_server.parse_operations(USER_TYPE, {"Operations": sent})
        after = scim_server.apply_patch(USER_TYPE, before, operations)
        expected = naive_patch(before, [step for _, step in pairs])
        expected["schemas"] = [USER] + [urn for urn in (ENT, FAC) if urn in expected]
        assert after == expected, f"seed {SEED}: {json.dumps(before)} {json.dumps(sent)}"


# -- The file itself ---------------------------------------------------------------
