"""Tests of issue 16: the rest of kinds 6 to 9, for the owner to move into their chapters."""

# ruff: noqa: F811  fixtures

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import requests

import scim_server
from test_scim_server import (
    CONFIG,
    ENT,
    FAC,
    FIELDS,
    GROUP_TYPE,
    USER_TYPE,
    Scim,
    add,
    assert_error,
    bulk,
    changes,
    console,  # noqa: F401  a fixture
    employees,
    logged,
    mounted,
    post,
    put,
    remove,
    scim,  # noqa: F401  a fixture
    server,  # noqa: F401  a fixture
)

# -- 4. Resources, 5. PATCH --


NO_IDS = [  # sentence, body of a group or operations, the answer
    ("null as the only member", [put("members", [None])], 400),
    ("two nulls", [put("members", [None, None])], 400),
    ("null beside a member", [put("members", [None, {"value": "{ada}"}])], 400),
    ("a member without parts", [put("members", [{}])], 400),
    ("a member without id", [put("members", [{"display": "Ada"}])], 400),
    ("a member whose id is null", [put("members", [{"value": None}])], 400),
    ("a member whose id is empty", [put("members", [{"value": ""}])], 400),
    ("empty text", [put("members", [""])], 400),
    ("a list in the list", [put("members", [[]])], 400),
    ("no path", [{"op": "replace", "value": {"members": [None]}}], 400),
    ("an empty list", [put("members", [])], 200),
    ("null for all members", [put("members", None)], 200),
    ("the path alone", [remove("members")], 200),
]


@pytest.mark.parametrize(
    "operations, status", [row[1:] for row in NO_IDS], ids=[row[0] for row in NO_IDS]
)
def test_only_an_empty_list_or_null_empties_a_group(
    scim: Scim, operations: Any, status: int
) -> None:
    ada = scim.user("ada")["id"]
    path = f"/Groups/{scim.group('Crew', ada)['id']}"
    text = json.dumps(operations).replace("{ada}", ada)
    answer = scim.try_patch(path, *json.loads(text))
    assert answer.status_code == status, answer.text
    members = [member["value"] for member in scim.get(path).get("members", [])]
    assert members == ([ada] if status == 400 else [])


def test_a_put_with_null_as_a_member_is_refused(scim: Scim) -> None:
    ada = scim.user("ada")["id"]
    group = scim.group("Crew", ada)
    body = {"displayName": "Crew", "members": [None]}
    assert_error(scim.call("PUT", f"/Groups/{group['id']}", body), 400, "invalidValue", "members")
    assert scim.get(f"/Groups/{group['id']}") == group
    assert (
        "members" not in scim.call("PUT", f"/Groups/{group['id']}", {**body, "members": []}).json()
    )


NO_MANAGER = [  # sentence, the manager that is sent
    ("value and name are empty", {"value": "", "displayName": ""}),
    ("all parts are empty", {"value": "", "$ref": "", "displayName": ""}),
    ("the name comes first", {"displayName": "", "value": ""}),
    ("null and empty", {"value": None, "displayName": ""}),
    ("in a list", [{"value": "", "displayName": ""}]),
]


@pytest.mark.parametrize("op", ["add", "replace", "without path", "POST", "PUT"])
@pytest.mark.parametrize(
    "manager", [row[1] for row in NO_MANAGER], ids=[row[0] for row in NO_MANAGER]
)
def test_an_object_of_empty_texts_is_no_manager(scim: Scim, op: str, manager: Any) -> None:
    ada = scim.user("ada", **{ENT: {"manager": {"value": "m", "displayName": "Max"}}})
    body = {"userName": "bob", ENT: {"manager": manager}}
    if op == "POST":
        after = scim.create("/Users", **body)
    elif op == "PUT":
        after = scim.call("PUT", f"/Users/{ada['id']}", body).json()
    else:
        path = f"{ENT}:manager"
        operation = {"op": op, "path": path, "value": manager}
        if op == "without path":
            operation = {"op": "replace", "value": {path: manager}}
        after = scim.patch(f"/Users/{ada['id']}", operation)
    assert ENT not in after and ENT not in after["schemas"]


def test_an_empty_name_of_a_manager_clears_the_name_only(scim: Scim) -> None:
    ada = scim.user("ada", **{ENT: {"manager": {"value": "m", "displayName": "Max"}}})
    after = scim.patch(f"/Users/{ada['id']}", add(f"{ENT}:manager", {"displayName": ""}))
    assert after[ENT]["manager"] == {"value": "m"}


# -- 6. Queries --


PRESENCE = [  # sentence, attributes of a user, filter, whether it matches
    ("one part has text", {"name": {"givenName": "Ada"}}, "name pr", True),
    ("all parts are empty", {"name": {"givenName": "", "familyName": ""}}, "name pr", False),
    ("one of two parts is empty", {"name": {"givenName": "", "familyName": "B"}}, "name pr", True),
    ("no value", {}, "name pr", False),
    ("empty e-mail", {"emails": [{"value": ""}]}, "emails pr", False),
    ("a type alone", {"emails": [{"type": "work", "value": ""}]}, "emails pr", True),
    ("primary false", {"emails": [{"primary": False}]}, "emails pr", True),
    ("one of two", {"emails": [{"value": ""}, {"value": "a@b"}]}, "emails pr", True),
    ("empty, negated", {"emails": [{"value": ""}]}, "not (emails pr)", True),
    ("empty, compared", {"emails": [{"value": ""}]}, 'emails[value eq ""]', True),
    ("empty, compared by ne", {"emails": [{"value": ""}]}, 'emails[value ne "x"]', True),
    ("an extension", {ENT: {"division": "x"}}, f"{ENT} pr", True),
    ("an extension of empty text", {ENT: {"division": ""}}, f"{ENT} pr", False),
    ("a number in an extension", {FAC: {"locker_no": 0}}, f"{FAC} pr", True),
    ("a complex part", {ENT: {"manager": {"value": "m"}}}, f"{ENT} pr", True),
]


@pytest.mark.parametrize(
    "attributes, filter, matches", [row[1:] for row in PRESENCE], ids=[row[0] for row in PRESENCE]
)
def test_a_complex_attribute_is_present_if_a_part_is_not_empty(
    attributes: Any, filter: str, matches: bool
) -> None:
    directory = scim_server.Directory(scim_server.Store(":memory:"), FIELDS)
    user = directory.create("User", {"userName": "ada", **attributes})
    assert directory.query("User", filter).total_results == matches
    assert scim_server.matches(scim_server.parse_filter(filter, USER_TYPE), user) == matches


NE = [  # sentence, e-mails, filter, whether it matches
    ("ne is the opposite of eq", ["a@x", "b@x"], 'emails.value ne "a@x"', False),
    ("no value equals it", ["b@x"], 'emails.value ne "a@x"', True),
    ("no value at all", [], 'emails.value ne "a@x"', True),
    ("in brackets it asks each value", ["a@x", "b@x"], 'emails[value ne "a@x"]', True),
    ("in brackets no value is no match", [], 'emails[value ne "a@x"]', False),
]


@pytest.mark.parametrize(
    "emails, filter, matches", [row[1:] for row in NE], ids=[row[0] for row in NE]
)
def test_ne_means_not_eq(emails: list[str], filter: str, matches: bool) -> None:
    directory = scim_server.Directory(scim_server.Store(":memory:"))
    directory.create("User", {"userName": "ada", "emails": [{"value": value} for value in emails]})
    assert directory.query("User", filter).total_results == matches


# -- 7. Store: files of format 5 --


E_ACUTE = ("jos\u00e9", "jose\u0301")
WIDE = "\uff21\uff44\uff41"  # Ada in full-width letters
OLD_ROWS = [  # path, text as it was sent, key in format 5
    ("username", E_ACUTE[1], E_ACUTE[1]),
    ("username", WIDE, WIDE.casefold()),
    ("title", "Cafe\u0301", "cafe\u0301"),
    ("emails.value", "E\u0301@x", "e\u0301@x"),
    (f"{FAC}:union_code".lower(), "O\u0308l", "o\u0308l"),
    ("displayname", "Cre\u0301w", "cre\u0301w"),
]


def made_by_format_5(path: Path) -> None:
    """Write a file of format 5 with names that later versions compare otherwise."""
    store = scim_server.Store(path)
    directory = scim_server.Directory(store, FIELDS)
    directory.create("User", {"userName": E_ACUTE[0]})
    jose = {
        "title": "Cafe\u0301",
        "emails": [{"value": "E\u0301@x"}],
        FAC: {"union_code": "O\u0308l"},
    }
    ids = [
        directory.create("User", body)["id"]
        for body in (
            {"userName": E_ACUTE[1] + "!", **jose},
            {"userName": "Ada"},
            {"userName": WIDE + "!", "name": {"givenName": ""}},
            {"userName": "plain", "title": "Engineer"},
        )
    ]
    members = [{"value": id, "display": E_ACUTE[1]} for id in ids[:2]]
    directory.create("Group", {"displayName": "Cre\u0301w", "members": members})
    store.close()
    with sqlite3.connect(path) as connection:
        # Two pairs of users whose names were different in format 5.
        for text, _ in [(row[1], row[2]) for row in OLD_ROWS[:2]]:
            connection.execute("UPDATE resource SET body = replace(body, ?, ?)", [text + "!", text])
        for attribute, text, key in OLD_ROWS:
            new = scim_server.Attribute("", is_name=attribute in ("username", "displayname"))
            for suffix in ("", "!") if attribute == "username" else ("",):
                connection.execute(
                    "UPDATE OR IGNORE value SET key = ? WHERE path = ? AND key = ? AND seq > 1 "
                    "AND seq <> 3",
                    [key, attribute, new.key(text + suffix)],
                )
                connection.execute(
                    "UPDATE employee SET user_name = ? WHERE user_name = ?",
                    [key, new.key(text + suffix)] if suffix else ["", "-"],
                )
        connection.execute("UPDATE value SET key = '1' WHERE path = 'name'")
        connection.execute("UPDATE member SET display_key = display")
        connection.execute("PRAGMA user_version = 5")


def rows_of(path: Path, sql: str) -> list[Any]:
    """Return what a query reads from a file."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_the_keys_of_an_older_file_are_renewed_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "acme.sqlite3"
    made_by_format_5(path)
    old = set(rows_of(path, "SELECT path, key FROM value"))
    assert {(row[0], row[2]) for row in OLD_ROWS} <= old
    store = scim_server.Store(path)
    with store.reading() as session:
        for columns in session.run("SELECT * FROM resource").fetchall():
            row = scim_server.StoredResource(*columns)
            type = USER_TYPE if row.type == "User" else GROUP_TYPE
            keys = session.run("SELECT path, key, element FROM value WHERE seq = ?", [row.seq])
            assert set(keys.fetchall()) == row.entries(type)
    directory = scim_server.Directory(store, FIELDS)
    for filter, names in [
        (f'userName eq "{E_ACUTE[0]}"', list(E_ACUTE)),  # both stay
        (f'userName eq "{E_ACUTE[1]}"', list(E_ACUTE)),
        ('userName eq "ada"', ["Ada", WIDE]),
        ('title eq "caf\u00e9"', [E_ACUTE[1]]),
        ('emails.value eq "\u00c9@x"', [E_ACUTE[1]]),
        (f'{FAC}:union_code eq "\u00d6L"', [E_ACUTE[1]]),
        ("name pr", []),
        ('title eq "engineer"', ["plain"]),
    ]:
        found = directory.query("User", filter).resources
        assert [user["userName"] for user in found] == names, filter
    for filter in ('displayName eq "cr\u00e9w"', f'members.display eq "{E_ACUTE[0]}"'):
        assert directory.query("Group", filter).total_results == 1
    store.close()
    assert rows_of(path, "SELECT DISTINCT user_name FROM employee ORDER BY id") == [
        (E_ACUTE[0],),
        ("ada",),
        ("plain",),
    ]


def test_names_that_have_become_equal_stay_until_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "acme.sqlite3"
    made_by_format_5(path)
    store = scim_server.Store(path)
    directory = scim_server.Directory(store, FIELDS)
    [first, second] = directory.query("User", f'userName eq "{E_ACUTE[0]}"').resources
    title = {"Operations": [put("title", "x")]}
    assert directory.patch("User", second["id"], title)["userName"] == second["userName"]
    for name in (E_ACUTE[0], E_ACUTE[1].upper()):
        with pytest.raises(scim_server.ScimError, match="already in use"):
            directory.patch("User", second["id"], {"Operations": [put("userName", name)]})
    directory.patch("User", second["id"], {"Operations": [put("userName", "other")]})
    directory.delete("User", first["id"])
    assert directory.query("User", f'userName eq "{E_ACUTE[0]}"').total_results == 0
    store.close()


def test_a_file_whose_renewal_fails_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "acme.sqlite3"
    made_by_format_5(path)
    before = rows_of(path, "SELECT * FROM value ORDER BY path, key, seq")

    def fail(session: Any) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(scim_server, "renew_keys", fail)
        with pytest.raises(scim_server.StoreError):
            scim_server.Store(path)
    assert rows_of(path, "PRAGMA user_version") == [(5,)]
    assert rows_of(path, "SELECT * FROM value ORDER BY path, key, seq") == before
    scim_server.Store(path).close()
    assert rows_of(path, "PRAGMA user_version") == [(6,)]


def test_the_renewal_writes_no_row_that_stays_the_same(tmp_path: Path) -> None:
    path = tmp_path / "acme.sqlite3"
    store = scim_server.Store(path)
    directory = scim_server.Directory(store, FIELDS)
    for name in ("ada", "bob", "\u00e9"):  # composed already
        directory.create("User", {"userName": name, "title": "Engineer"})
    store.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 5")
        connection.execute(
            "CREATE TRIGGER no_write BEFORE DELETE ON value BEGIN SELECT raise(FAIL, 'write'); END"
        )
    scim_server.Store(path).close()


# -- 8. Employees --


def renamed(scim: Scim, old: Any, new: Any) -> tuple[str, str]:
    """Return the ids of a user that was deactivated and of another one with its externalId."""
    first = scim.create("/Users", externalId="o1", **old)["id"]
    scim.patch(f"/Users/{first}", put("active", False))
    return first, scim.create("/Users", externalId="o1", **new)["id"]


def test_a_person_who_returns_under_a_new_name_is_the_same_employee(scim: Scim) -> None:
    first, second = renamed(scim, {"userName": "ada.old"}, {"userName": "ada.new"})
    [ada] = employees(scim)
    assert (ada["id"], ada["user_id"], ada["active"]) == (1, second, True)
    assert scim.get(f"/Users/{first}")["active"] is False  # the old user stays
    *_, created, moved = changes(scim)
    assert (created["kind"], created["id"]) == ("user.created", second)
    assert (moved["kind"], moved["id"]) == ("employee.reactivated", "1")
    assert {"name", "active", "user_id"} <= set(moved["attributes"])


OLD_USER = [  # sentence, what happens to the old user, employees as (id, old or new user, active)
    ("changes while inactive", [("PATCH", [put("title", "x")])], [(1, "new", True)]),
    ("is put while inactive", [("PUT", None)], [(1, "new", True)]),
    ("is deleted", [("DELETE", None)], [(1, "new", True)]),
    (
        "is active again",
        [("PATCH", [put("active", True)])],
        [(1, "new", True), (2, "old", True)],
    ),
    (
        "is active again for a while",
        [("PATCH", [put("active", True)]), ("PATCH", [put("active", False)]), ("DELETE", None)],
        [(1, "new", True), (2, "old", False)],
    ),
    (
        "loses its state",
        [("PATCH", [remove("active")]), ("PATCH", [put("title", "x")])],
        [(1, "new", True)],
    ),
]


@pytest.mark.parametrize(
    "calls, expected", [row[1:] for row in OLD_USER], ids=[row[0] for row in OLD_USER]
)
def test_an_old_user_has_no_employee_until_it_is_active_again(
    scim: Scim, calls: Any, expected: Any
) -> None:
    first, second = renamed(scim, {"userName": "ada.old"}, {"userName": "ada.new"})
    for method, operations in calls:
        body = {"userName": "ada.old", "externalId": "o1", "title": "x", "active": False}
        answer = scim.call(
            method, f"/Users/{first}", {"Operations": operations} if operations else body
        )
        assert answer.status_code in (200, 204), answer.text
    names = {first: "old", second: "new"}
    found = [(one["id"], names[one["user_id"]], one["active"]) for one in employees(scim)]
    assert found == expected


def test_the_employee_moves_back_if_the_new_user_is_inactive(scim: Scim) -> None:
    first, second = renamed(scim, {"userName": "ada.old"}, {"userName": "ada.new"})
    scim.patch(f"/Users/{second}", put("active", False))
    scim.patch(f"/Users/{first}", put("title", "x"))  # still inactive
    assert [(one["id"], one["user_id"]) for one in employees(scim)] == [(1, second)]
    scim.patch(f"/Users/{first}", put("active", True))
    assert [(one["id"], one["user_id"]) for one in employees(scim)] == [(1, first)]


def test_reports_stay_with_a_manager_who_returns_under_a_new_name(scim: Scim) -> None:
    boss = scim.create("/Users", userName="boss.old", externalId="b")["id"]
    scim.user("bob", **{ENT: {"manager": {"value": boss}}})
    scim.patch(f"/Users/{boss}", put("active", False))
    scim.create("/Users", userName="boss.new", externalId="b")
    assert [(one["id"], one["manager"]) for one in employees(scim)] == [(1, None), (2, 1)]


def test_custom_fields_that_change_make_no_employee_of_an_old_user() -> None:
    store = scim_server.Store(":memory:")
    directory = scim_server.Directory(store, FIELDS)
    old = {"userName": "ada.old", "externalId": "o", "active": False, FAC: {"union_code": "U7"}}
    directory.create("User", old)
    directory.create("User", {"userName": "ada.new", "externalId": "o"})
    directory = scim_server.Directory(store, FIELDS[1:])
    assert [(one.id, one.active) for one in directory.employees()] == [(1, True)]


def test_an_inactive_employee_without_external_id_is_nobody_else(scim: Scim) -> None:
    scim.user("ada", active=False)
    scim.user("bob")
    scim.create("/Users", userName="eve", externalId="")
    assert [one["name"] for one in employees(scim)] == ["ada", "bob", "eve"]


def test_the_external_id_counts_for_more_than_the_user_name(scim: Scim) -> None:
    for name, external_id in (("ada", "o1"), ("bob", "")):
        id = scim.create("/Users", userName=name, externalId=external_id)["id"]
        scim.call("DELETE", f"/Users/{id}")
    scim.create("/Users", userName="bob", externalId="o1")
    assert [(one["id"], one["active"]) for one in employees(scim)] == [(1, True), (2, False)]


SHARED = [  # sentence, active of the first user, externalId of the second; the second's warning
    ("the other is active", True, "5b0c7f7e-0000-4000-8000-000000000001", True),
    ("the other is inactive", False, "5b0c7f7e-0000-4000-8000-000000000001", False),
    ("another externalId", True, "5b0c7f7e-0000-4000-8000-000000000002", False),
    ("the same letters in capitals", True, "5B0C7F7E-0000-4000-8000-000000000001", False),
]


@pytest.mark.parametrize(
    "active, external_id, warned", [row[1:] for row in SHARED], ids=[row[0] for row in SHARED]
)
def test_an_external_id_of_an_active_user_is_warned_of(
    scim: Scim, console: Scim, active: bool, external_id: str, warned: bool
) -> None:
    first = "5b0c7f7e-0000-4000-8000-000000000001"
    scim.create("/Users", userName="ada.old", externalId=first, active=active)
    scim.create("/Users", userName="ada.new", externalId=external_id)
    entry, earlier = logged(console, 2)
    assert entry["status"] == 201 and earlier["notes"] == []
    assert entry["level"] == int(warned) and len(entry["notes"]) == int(warned)
    for note in entry["notes"]:
        assert '"ada.new"' in note["text"] and '"ada.old"' in note["text"]
        assert first in note["text"] and "deactivate" in note["remedy"]


# -- 12. SCIM endpoints --


def test_an_answer_with_a_resource_says_where_it_is(scim: Scim) -> None:
    for path, body in (("/Users", {"userName": "a"}), ("/Groups", {"displayName": "a"})):
        created = scim.call("POST", path, body)
        own = f"{path}/{created.json()['id']}"
        patch = {"Operations": [put("externalId", "x")]}
        for answer in (
            created,
            scim.call("GET", own),
            scim.call("HEAD", own),
            scim.call("GET", f"{own}?attributes=id"),
            scim.call("GET", own, If_None_Match="*"),  # 304 has the headers of 200: RFC 9110
            scim.call("PUT", own, body),
            scim.call("PATCH", own, patch),
            scim.call("PATCH", f"{own}?excludedAttributes=meta", patch),
        ):
            headers = answer.headers
            assert headers["Location"] == headers["Content-Location"] == scim.url + own
        for answer in (scim.call("GET", path), scim.call("DELETE", own)):
            assert not {"Location", "Content-Location"} & answer.headers.keys()


CODINGS = [  # sentence, the header, the status of a POST
    ("gzip", "gzip", 415),
    ("capitals", "GZIP", 415),
    ("two codings", "identity, br", 415),
    ("a made-up coding", "x", 415),
    ("none", None, 201),
    ("identity", "identity", 201),
    ("identity in capitals", "Identity", 201),
]


@pytest.mark.parametrize("way", ["http", "wsgi"])
@pytest.mark.parametrize(
    "coding, status", [row[1:] for row in CODINGS], ids=[row[0] for row in CODINGS]
)
def test_a_compressed_body_is_refused_before_it_is_parsed(
    scim: Scim, way: str, coding: str | None, status: int
) -> None:
    headers = {"Content-Encoding": coding} if coding else {}
    body = b"\x1f\x8b no JSON" if status == 415 else b'{"userName": "ada"}'

    def send(url: str, path: str) -> None:
        answer = requests.post(
            url + path,
            data=body,
            headers={"Authorization": "Bearer acme-secret", "Content-Type": "x/json", **headers},
        )
        if status == 415:
            assert_error(answer, 415, "", "Content-Encoding", coding.lower())
            assert answer.headers["Accept-Encoding"] == "identity"
        else:
            assert answer.status_code == status, answer.text

    with mounted(scim_server.wsgi({**CONFIG, "data_dir": ":memory:"})) as url:
        send(url if way == "wsgi" else scim.url, "/Users")
        if status == 415:
            send(url if way == "wsgi" else scim.url, "/Bulk")


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
def test_an_id_that_cannot_be_is_404(scim: Scim, method: str) -> None:
    body = {"userName": "x", "Operations": []}
    for id in ("%00", "a%00b", "%ff"):
        assert_error(scim.call(method, f"/Users/{id}", body), 404)


# -- 13. Provisioning log --


def group(bulk_id: str, name: str, *members: str) -> Any:
    """Return the POST of a group whose members are bulkIds."""
    return post(
        "/Groups", bulk_id, displayName=name, members=[{"value": f"bulkId:{id}"} for id in members]
    )


CYCLES = [  # sentence, operations, their statuses, the log as (operation, name, status)
    (
        "two that need each other",
        [group("a", "A", "b"), group("b", "B", "a")],
        ["201", "201"],
        [("Create group", "A", 201), ("Create group", "B", 201)],
    ),
    (
        "the last one fails",
        [group("a", "A", "b"), group("b", "", "a")],
        ["409", "400"],
        [("Create group", "A", 409), ("Create group", "", 400)],
    ),
    (
        "the first one fails: the others are not tried",
        [group("a", "", "b"), group("b", "B", "a")],
        ["400", "409"],
        [("Create group", "", 400)],
    ),
    (
        "one that needs itself",
        [group("a", "A", "a")],
        ["201"],
        [("Create group", "A", 201)],
    ),
    (
        "no cycle",
        [group("a", "A"), group("b", "", "a"), group("c", "C", "b")],
        ["201", "400", "409"],
        [("Create group", "A", 201), ("Create group", "", 400)],
    ),
]


@pytest.mark.parametrize(
    "operations, statuses, entries", [row[1:] for row in CYCLES], ids=[row[0] for row in CYCLES]
)
def test_the_log_shows_what_became_of_a_cycle(
    scim: Scim, console: Scim, operations: Any, statuses: Any, entries: Any
) -> None:
    assert [answer["status"] for answer in bulk(scim, *operations)] == statuses
    log = logged(console, len(entries) + 1)[::-1]
    found = [(entry["operation"], entry["name"], entry["status"]) for entry in log]
    assert found == [*entries, ("Call /Bulk", "", 200)]
    assert [entry["level"] for entry in log[:-1]] == [2 * (row[2] >= 400) for row in entries]


def test_the_operation_that_fails_a_cycle_explains_itself_in_the_log(
    scim: Scim, console: Scim
) -> None:
    scim.create("/Groups", displayName="taken")
    bulk(scim, group("a", "A", "b"), group("b", "TAKEN", "a"))
    notes = [entry["notes"][0]["text"] for entry in logged(console, 4)[1:3]]
    assert notes[0].startswith("Another Group already has the displayName")
    assert "need each other" in notes[1]


SAME_NAMES = [  # sentence, userName, work e-mail, whether there is a warning
    ("the same", "ada@x", "ada@x", False),
    ("case", "Ada@X", "ada@x", False),
    ("composed and decomposed", "jos\u00e9@x", "jose\u0301@x", False),
    ("full width", "\uff41da@x", "ada@x", False),
    ("another one", "ada@x", "bob@x", True),
]


@pytest.mark.parametrize(
    "name, email, warned", [row[1:] for row in SAME_NAMES], ids=[row[0] for row in SAME_NAMES]
)
def test_a_work_email_is_compared_as_a_user_name(
    scim: Scim, console: Scim, name: str, email: str, warned: bool
) -> None:
    scim.user(name, emails=[{"type": "work", "value": email}])
    assert len(logged(console, 1)[0]["notes"]) == int(warned)
