"""Tests of issue 16: never a wrong answer with a 200."""

# ruff: noqa: F401, F811  the fixtures of the other file are imported by name

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

import scim_server
from test_scim_server import (
    ENT,
    FAC,
    FIELDS,
    GROUP_TYPE,
    TYPES,
    USER,
    USER_TYPE,
    Scim,
    add,
    assert_error,
    pathless,
    put,
    remove,
    scim,
    server,
)

WORK = {"type": "work", "value": "h@x", "primary": True}
NAME = {"givenName": "Ada", "familyName": "Quill", "formatted": "Ada Quill"}
BOSS = {"value": "m-1", "displayName": "Bo", "$ref": "../Users/m-1"}
MANAGER = {ENT: {"manager": BOSS, "department": "Lifts"}}


def boss(**parts: Any) -> Any:
    """Return the enterprise extension with another manager."""
    return {ENT: {"manager": parts, "department": "Lifts"}}


def with_ids(table: Any) -> Any:
    """Return a parametrization of a table whose rows begin with a sentence."""
    names = "before, operations, after"
    return pytest.mark.parametrize(names, [row[1:] for row in table], ids=[row[0] for row in table])


def patched(resource_type: Any, before: Any, operations: Any) -> Any:
    """Return a resource after a PATCH, without its schemas, or the scimType of the error."""
    resource = scim_server.canonical(resource_type, before)
    try:
        steps = scim_server.parse_operations(resource_type, {"Operations": operations})
        after = scim_server.apply_patch(resource_type, resource, steps)
    except scim_server.ScimError as error:
        assert error.status == 400
        return error.scim_type
    return {name: value for name, value in after.items() if name not in ("schemas", "userName")}


# -- 1. Membership that nobody asked to change -------------------------------------------

A, B = {"value": "a", "type": "User"}, {"value": "b", "type": "User"}
MEMBERS = [  # sentence, operations, the members after them or the scimType of the error
    ("the display of a stranger", [put('members[value eq "c"].display', "C")], "noTarget"),
    ("add of a stranger's display", [add('members[value eq "c"].display', "C")], "noTarget"),
    ("a stranger as an object", [put('members[value eq "c"]', {"display": "C"})], "noTarget"),
    ("a stranger with its id", [add('members[value eq "c"]', {"value": "c"})], "noTarget"),
    ("a label makes no member", [add('members[type eq "Group"]', {"value": "c"})], "mutability"),
    ("nor does a display", [add('members[display eq "C"].display', "D")], "noTarget"),
    ("as a name", [pathless({'members[value eq "c"].display': "C"})], "noTarget"),
    ("members.value replaced", [put("members.value", "c")], "mutability"),
    ("members.value added", [add("members.value", "c")], "mutability"),
    ("members.value removed", [remove("members.value")], "mutability"),
    ("members.value as a name", [pathless({"members.value": "c"})], "mutability"),
    ("another id", [put('members[value eq "a"].value', "b")], "mutability"),
    ("another id in an object", [put('members[value eq "a"]', {"value": "b"})], "mutability"),
    ("another id added", [add('members[value eq "a"]', {"value": "b"})], "mutability"),
    ("plain text is an id too", [put('members[value eq "a"]', "b")], "mutability"),
    ("no id", [put('members[value eq "a"].value', None)], "mutability"),
    ("an empty id", [put('members[value eq "a"].value', "")], "mutability"),
    ("a removed id", [remove('members[value eq "a"].value')], "mutability"),
    ("the URL of a member", [put('members[value eq "a"].$ref', "x")], "mutability"),
    ("a member by URL", [remove('members[$ref eq "x"]')], "invalidFilter"),
    ("a member by no URL", [remove("members[not ($ref pr)]")], "invalidFilter"),
    ("empty text is no member", [put("members", "")], "invalidValue"),
    ("nor in a list", [put("members", [""])], "invalidValue"),
    ("removing empty text", [remove("members", "")], "invalidValue"),
    ("the same id", [put('members[value eq "a"].value', "a")], [A, B]),
    ("a display", [put('members[value eq "a"].display', "A")], [{**A, "display": "A"}, B]),
    (
        "an object with the same id",
        [add('members[value eq "a"]', {"value": "a", "$ref": "x", "display": "A"})],
        [{**A, "display": "A"}, B],
    ),
    ("the same type", [put('members[value eq "a"].type', "User")], [A, B]),
    ("another type", [put('members[value eq "a"].type', "Group")], "mutability"),
    (
        "the same object",
        [put('members[value eq "a"]', {**A, "display": "A"})],
        [{**A, "display": "A"}, B],
    ),
    ("an id in another case", [put('members[value eq "A"]', {"value": "A"})], "mutability"),
    (
        "a display for all",
        [put('members[type eq "user"].display', "x")],
        [{**A, "display": "x"}, {**B, "display": "x"}],
    ),
    ("all of a type", [remove('members[type eq "user"]')], []),
    ("an id for all", [put('members[type eq "User"].value', "a")], "mutability"),
    (
        "replacing a member by its display",
        [put('members[value eq "a"]', {"display": "A"})],
        [{**A, "display": "A"}, B],
    ),
    ("removing a stranger", [remove('members[value eq "c"]')], [A, B]),
    ("clearing what no stranger has", [put('members[value eq "c"].display', None)], [A, B]),
    ("an id in capitals", [remove('members[value eq "A"]')], [B]),
    ("and its display", [put('members[value eq "B"].display', "x")], [A, {**B, "display": "x"}]),
    ("an id in capitals with a type", [remove('members[type eq "user" and value eq "A"]')], [B]),
    ("no operation", [], [A, B]),
]


@pytest.mark.parametrize(
    "operations, after", [row[1:] for row in MEMBERS], ids=[row[0] for row in MEMBERS]
)
def test_a_patch_makes_nobody_a_member_by_accident(operations: Any, after: Any) -> None:
    found = patched(GROUP_TYPE, {"displayName": "Crew", "members": [A, B]}, operations)
    assert (found.get("members", []) if isinstance(found, dict) else found) == after


def test_an_id_that_means_two_members_without_case_means_neither() -> None:
    members = [{"value": "ab"}, {"value": "AB"}]
    for operation, kept in (
        (remove('members[value eq "Ab"]'), ["ab", "AB"]),
        (remove('members[value eq "AB"]'), ["ab"]),
        (remove('members[value eq "ab"]'), ["AB"]),
    ):
        found = patched(GROUP_TYPE, {"displayName": "Crew", "members": members}, [operation])
        assert [member["value"] for member in found["members"]] == kept


GRANTS = [  # sentence, operations: each names a value that the user does not have
    ("a role", [put('roles[value eq "admin"].display', "Admin")]),
    ("a role that becomes primary", [put('roles[value eq "admin"].primary', True)]),
    ("a role as an object", [add('roles[value eq "admin"]', {"display": "Admin"})]),
    ("a role with its type", [put('roles[type eq "x" and value eq "admin"].display', "Admin")]),
    ("an entitlement", [add('entitlements[value eq "all"].type', "x")]),
    ("an e-mail", [put('emails[value eq "new@x"].primary', True)]),
    ("an e-mail by text", [put('emails[value eq "new@x"]', "new@x")]),
    ("a telephone number", [put('phoneNumbers[value eq "1"].type', "work")]),
    ("a photo", [put('photos[value eq "1"].type', "photo")]),
    ("an address by its country", [put('addresses[country eq "CH"].locality', "Wil")]),
    ("as a name", [pathless({'roles[value eq "admin"].display': "Admin"})]),
]


@pytest.mark.parametrize("operations", [row[1] for row in GRANTS], ids=[row[0] for row in GRANTS])
def test_no_value_is_made_from_a_filter_on_what_it_is(operations: Any) -> None:
    assert patched(USER_TYPE, {"userName": "tom"}, operations) == "noTarget"


MADE = [  # sentence, before, operations, after
    ("from a type", {}, [put('emails[type eq "work"].value', "h@x")], {"emails": [{"type": "work", "value": "h@x"}]}),
    ("from primary", {}, [add('roles[primary eq "True"].value', "x")], {"roles": [{"primary": True, "value": "x"}]}),
    ("from a display", {}, [add('ims[display eq "d"].value', "x")], {"ims": [{"display": "d", "value": "x"}]}),
    ("from text", {}, [put('emails[type eq "work"]', "h@x")], {"emails": [{"type": "work", "value": "h@x"}]}),
    ("but not from nothing", {}, [put('emails[type eq "work"].value', "")], {}),
    ("and not from null", {}, [put('emails[type eq "work"]', {"value": None})], {}),
]  # fmt: skip


@with_ids(MADE)
def test_a_value_is_made_from_the_labels_of_a_filter(
    before: Any, operations: Any, after: Any
) -> None:
    assert patched(USER_TYPE, {"userName": "tom", **before}, operations) == after


@pytest.fixture
def crew(scim: Scim) -> tuple[Scim, str, list[str]]:
    """A group with a member, and the ids of that member and of another user."""
    ids = [scim.user(name)["id"] for name in ("ada", "bob")]
    return scim, f"/Groups/{scim.group('Crew', ids[0])['id']}", ids


def members_of(scim: Scim, path: str) -> list[str]:
    """Return the ids of the members of a group."""
    return [member["value"] for member in scim.get(path).get("members", [])]


@pytest.mark.parametrize("count", [1, 3])
def test_a_replace_with_unknown_ids_alone_is_refused_and_leaves_the_group(
    crew: Any, count: int
) -> None:
    scim, path, (ada, _) = crew
    ghosts = [{"value": f"ghost-{number}"} for number in range(count)]
    body = {"displayName": "Renamed", "members": ghosts}
    for answer in (
        scim.try_patch(path, put("members", ghosts)),
        scim.try_patch(path, pathless({"displayName": "Renamed", "members": ghosts})),
        scim.call("PUT", path, body),
    ):
        assert_error(answer, 400, "invalidValue", "members", *[one["value"] for one in ghosts])
    assert members_of(scim, path) == [ada] and scim.get(path)["displayName"] == "Crew"


def test_unknown_ids_beside_known_ones_are_ignored(crew: Any) -> None:
    scim, path, (ada, bob) = crew
    scim.patch(path, put("members", [{"value": "ghost"}, {"value": bob}]))
    assert members_of(scim, path) == [bob]
    scim.patch(path, put("members", [{"value": "ghost"}]), add("members", [{"value": ada}]))
    assert members_of(scim, path) == [ada]
    assert scim.call(
        "PUT", path, {"displayName": "Crew", "members": [{"value": "ghost"}, {"value": bob}]}
    ).ok
    assert members_of(scim, path) == [bob]


def test_who_is_removed_while_a_stranger_is_added_is_removed(crew: Any) -> None:
    scim, path, (ada, _) = crew
    scim.patch(path, remove("members", [{"value": ada}]), add("members", [{"value": "ghost"}]))
    assert members_of(scim, path) == []
    scim.patch(path, add("members", [{"value": "ghost"}]))
    assert scim.create("/Groups", displayName="New", members=[{"value": "ghost"}])["id"]
    assert_error(scim.try_patch(path, put("members", [{"value": "ghost"}])), 400, "invalidValue")
    scim.patch(path, put("members", []))


def test_an_id_in_capitals_removes_its_member_over_http(crew: Any) -> None:
    scim, path, (ada, _) = crew
    scim.patch(path, put(f'members[value eq "{ada.upper()}"].display', "Ada"))
    assert scim.get(path)["members"][0]["display"] == "Ada"
    scim.patch(path, remove(f'members[value eq "{ada.upper()}"]'))
    assert members_of(scim, path) == []


def test_the_id_of_a_member_is_published_as_immutable(scim: Scim) -> None:
    attributes = {
        one["name"]: one for one in scim.get(f"/Schemas/{scim_server.GROUP}")["attributes"]
    }
    parts = {one["name"]: one["mutability"] for one in attributes["members"]["subAttributes"]}
    assert parts["value"] == parts["$ref"] == "immutable"


# -- 2. Partial complex values --------------------------------------------------------------

PARTS = [  # sentence, before, operations, after
    ("replace of a name", {"name": NAME}, [put("name", {"givenName": "Eda"})], {"name": {**NAME, "givenName": "Eda"}}),
    ("add to a name", {"name": NAME}, [add("name", {"givenName": "Eda"})], {"name": {**NAME, "givenName": "Eda"}}),
    ("by the URN of the core schema", {"name": NAME}, [put(f"{USER}:name", {"GIVENNAME": "Eda"})], {"name": {**NAME, "givenName": "Eda"}}),
    ("without a path", {"name": NAME}, [pathless({"name": {"givenName": "Eda"}})], {"name": {**NAME, "givenName": "Eda"}}),
    ("without a path, below the URN", {"name": NAME}, [pathless({USER: {"name": {"givenName": "Eda"}}})], {"name": {**NAME, "givenName": "Eda"}}),
    ("null for one part", {"name": NAME}, [put("name", {"formatted": None})], {"name": {"givenName": "Ada", "familyName": "Quill"}}),
    ("null for one part, added", {"name": NAME}, [add("name", {"formatted": None})], {"name": {"givenName": "Ada", "familyName": "Quill"}}),
    ("null for one part, without a path", {"name": NAME}, [pathless({"name": {"formatted": None}})], {"name": {"givenName": "Ada", "familyName": "Quill"}}),
    ("null for one part as a path", {"name": NAME}, [pathless({"name.formatted": None}, "add")], {"name": {"givenName": "Ada", "familyName": "Quill"}}),
    ("null for all parts", {"name": {"givenName": "T"}}, [put("name", {"givenName": None})], {}),
    ("null for the whole", {"name": NAME}, [put("name", None)], {}),
    ("an object that names nothing", {"name": NAME}, [put("name", {})], {"name": NAME}),
    ("unknown names only", {"name": NAME}, [put("name", {"nothing": "x"})], {"name": NAME}),
    ("the name of a manager, added", MANAGER, [add(f"{ENT}:manager", {"displayName": "Cy"})], boss(**{**BOSS, "displayName": "Cy"})),
    ("the name of a manager, replaced", MANAGER, [put("manager", {"displayName": "Cy"})], boss(**{**BOSS, "displayName": "Cy"})),
    ("the name of a manager, without a path", MANAGER, [pathless({f"{ENT}:manager": {"displayName": "Cy"}})], boss(**{**BOSS, "displayName": "Cy"})),
    ("the name of a manager, below the URN", MANAGER, [pathless({ENT: {"manager": {"displayName": "Cy"}}}, "add")], boss(**{**BOSS, "displayName": "Cy"})),
    ("add on a bare URN", MANAGER, [add(ENT, {"manager": {"displayName": "Cy"}})], boss(**{**BOSS, "displayName": "Cy"})),
    ("null for the name of a manager", MANAGER, [put("manager", {"displayName": None})], boss(value="m-1", **{"$ref": "../Users/m-1"})),
    ("the same manager", MANAGER, [put("manager", {"value": "m-1"})], MANAGER),
    ("the same manager by path", MANAGER, [put("manager.value", "m-1")], MANAGER),
    ("another manager", MANAGER, [put("manager", {"value": "m-2"})], boss(value="m-2")),
    ("another manager, added", MANAGER, [add("manager", {"value": "m-2"})], boss(value="m-2")),
    ("another manager by id", MANAGER, [add("manager", "m-2")], boss(value="m-2")),
    ("another manager in a list", MANAGER, [add("manager", [{"value": "m-2"}])], boss(value="m-2")),
    ("another manager by path", MANAGER, [put(f"{ENT}:manager.value", "m-2")], boss(value="m-2")),
    ("another manager as a name", MANAGER, [pathless({f"{ENT}:manager.value": "m-2"})], boss(value="m-2")),
    ("another manager below the URN", MANAGER, [add(ENT, {"manager": {"value": "m-2"}})], boss(value="m-2")),
    ("another manager and the name", MANAGER, [put("manager", {"displayName": "Cy", "value": "m-2"})], boss(value="m-2", displayName="Cy")),
    ("no manager by null", MANAGER, [put("manager", {"value": None})], {ENT: {"department": "Lifts"}}),
    ("no manager by add of nothing", MANAGER, [add("manager", "")], {ENT: {"department": "Lifts"}}),
    ("no manager by add of an empty value", MANAGER, [add("manager", {"value": ""})], {ENT: {"department": "Lifts"}}),
    ("no manager below the URN", MANAGER, [add(ENT, {"manager": ""})], {ENT: {"department": "Lifts"}}),
    ("no manager without a path", MANAGER, [pathless({f"{ENT}:manager": ""}, "add")], {ENT: {"department": "Lifts"}}),
    ("no manager by path", MANAGER, [remove("manager.value")], {ENT: {"department": "Lifts"}}),
    ("replace on a bare URN", MANAGER, [put(ENT, {"division": "D"})], {ENT: {"division": "D"}}),
    ("null for a custom field", {FAC: {"locker_no": 1, "union_code": "U7"}}, [add(FAC, {"locker_no": None})], {FAC: {"union_code": "U7"}}),
    ("a name by filter", {"name": NAME}, [put('name[familyName eq "quill"]', {"givenName": "Eda"})], {"name": {**NAME, "givenName": "Eda"}}),
]  # fmt: skip


@with_ids(PARTS)
def test_parts_that_a_value_does_not_name_stay(before: Any, operations: Any, after: Any) -> None:
    assert patched(USER_TYPE, {"userName": "tom", **before}, operations) == after


# -- 3. A filter selects; it does not write ---------------------------------------------------

SELECTED = [  # sentence, before, operations, after
    ("add", {"emails": [{"value": "h@x"}]}, [add('emails[value eq "H@X"]', {"primary": True})], {"emails": [{"value": "h@x", "primary": True}]}),
    ("replace", {"emails": [{"value": "h@x"}]}, [put('emails[value eq "H@X"]', {"primary": True})], {"emails": [{"value": "h@x", "primary": True}]}),
    ("replace by type", {"emails": [WORK]}, [put('emails[type eq "WORK"]', {"value": "n@x"})], {"emails": [{"type": "work", "value": "n@x"}]}),
    ("add by type", {"emails": [WORK]}, [add('emails[type eq "WORK"]', {"value": "n@x"})], {"emails": [{**WORK, "value": "n@x"}]}),
    ("unless the value says so", {"emails": [WORK]}, [add('emails[type eq "WORK"]', {"TYPE": "Work"})], {"emails": [{**WORK, "type": "Work"}]}),
    ("plain text", {"emails": [WORK]}, [put('emails[type eq "work"]', "n@x")], {"emails": [{**WORK, "value": "n@x"}]}),
    ("plain text, added", {"emails": [WORK]}, [add('emails[type eq "work"]', "n@x")], {"emails": [{**WORK, "value": "n@x"}]}),
    ("plain text in a list", {"emails": [WORK]}, [put('emails[type eq "work"]', ["n@x"])], {"emails": [{**WORK, "value": "n@x"}]}),
    ("plain text without a path", {"emails": [WORK]}, [pathless({'emails[type eq "work"]': "n@x"})], {"emails": [{**WORK, "value": "n@x"}]}),
    ("JSON text of a role", {"roles": [{"type": "t", "value": "x"}]}, [put('roles[type eq "t"]', '{"id":"1"}')], {"roles": [{"type": "t", "value": '{"id":"1"}'}]}),
    ("plain text for an address", {"addresses": [{"type": "work"}]}, [put('addresses[type eq "work"]', "x")], "invalidValue"),
    ("null for one part", {"emails": [{**WORK, "display": "d"}]}, [add('emails[type eq "work"]', {"display": None})], {"emails": [WORK]}),
    ("a number", {"emails": [WORK]}, [put('emails[type eq "work"]', 7)], "invalidValue"),
]  # fmt: skip


@with_ids(SELECTED)
def test_a_filter_keeps_the_stored_spelling(before: Any, operations: Any, after: Any) -> None:
    assert patched(USER_TYPE, {"userName": "tom", **before}, operations) == after


# -- 4. Clearing ---------------------------------------------------------------------------

PHONE = {"type": "mobile", "value": "1"}
CLEARED = [  # sentence, before, operations, after
    ("an Integer", {FAC: {"locker_no": 1}}, [put(f"{FAC}:locker_no", "")], {}),
    ("an Integer, added", {FAC: {"locker_no": 1}}, [add(f"{FAC}:locker_no", "")], {}),
    ("a Boolean", {FAC: {"night_shift": True}}, [put(f"{FAC}:night_shift", "")], {}),
    ("a Boolean without a path", {FAC: {"night_shift": True}}, [pathless({f"{FAC}:night_shift": ""})], {}),
    ("below a URN", {FAC: {"locker_no": 1, "union_code": "x"}}, [pathless({FAC: {"locker_no": ""}}, "add")], {FAC: {"union_code": "x"}}),
    ("a bare URN", {FAC: {"locker_no": 1}}, [put(FAC, {"locker_no": "", "union_code": ""})], {FAC: {"union_code": ""}}),
    ("a String is the text", {FAC: {"union_code": "x"}}, [put(f"{FAC}:union_code", "")], {FAC: {"union_code": ""}}),
    ("active", {"active": True}, [put("active", "")], {}),
    ("a complex value", {"name": NAME}, [put("name", "")], {}),
    ("a list", {"emails": [WORK]}, [put("emails", "")], {}),
    ("an item of a list", {"emails": [WORK]}, [put("emails", ["", PHONE])], {"emails": [PHONE]}),
    ("a reference", {"profileUrl": "x"}, [put("profileUrl", "")], {}),
    ("primary", {"emails": [WORK]}, [put('emails[type eq "work"].primary', "")], {"emails": [{"type": "work", "value": "h@x"}]}),
    ("an e-mail that lost its value", {"emails": [WORK]}, [remove('emails[type eq "work"].value')], {}),
    ("by null", {"emails": [WORK]}, [put('emails[type eq "work"].value', None)], {}),
    ("by empty text", {"emails": [WORK]}, [put('emails[type eq "work"].value', "")], {}),
    ("by empty text for the object", {"emails": [WORK]}, [put('emails[type eq "work"]', "")], {}),
    ("by an object", {"emails": [WORK]}, [put('emails[type eq "work"]', {"value": ""})], {}),
    ("without a filter", {"emails": [WORK], "phoneNumbers": [PHONE]}, [remove("emails.value")], {"phoneNumbers": [PHONE]}),
    ("without a path", {"phoneNumbers": [PHONE]}, [pathless({'phoneNumbers[type eq "mobile"].value': ""})], {}),
    ("a role", {"roles": [{"value": "x", "primary": True}]}, [remove('roles[value eq "x"].value')], {}),
    ("not with a display", {"emails": [{**WORK, "display": "d"}]}, [remove('emails[type eq "work"].value')], {"emails": [{"type": "work", "primary": True, "display": "d"}]}),
    ("not before the end", {"emails": [WORK]}, [remove('emails[type eq "work"].value'), add('emails[type eq "work"].value', "n@x")], {"emails": [{**WORK, "value": "n@x"}]}),
    ("not one that never had a value", {"emails": [{"type": "home"}]}, [put("title", "x")], {"title": "x", "emails": [{"type": "home"}]}),
    ("no operations", {"title": "x"}, [], {"title": "x"}),
]  # fmt: skip


@with_ids(CLEARED)
def test_empty_text_clears_what_is_no_string(before: Any, operations: Any, after: Any) -> None:
    assert patched(USER_TYPE, {"userName": "tom", **before}, operations) == after


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_body_clears_with_empty_text_too(scim: Scim, method: str) -> None:
    body = {
        "userName": "ada",
        "profileUrl": "",
        "name": "",
        "addresses": "",
        "emails": [{"value": "h@x", "primary": ""}],
        ENT: {"manager": "", "department": "D"},
        FAC: {"locker_no": "", "night_shift": "", "union_code": ""},
    }
    full = {FAC: {"locker_no": 1, "night_shift": True}, "name": NAME}
    path = (
        "/Users"
        if method == "POST"
        else f"/Users/{scim.create('/Users', userName='ada', **full)['id']}"
    )
    found = scim.call(method, path, body).json()
    assert found[FAC] == {"union_code": ""} and found[ENT] == {"department": "D"}
    assert found["emails"] == [{"value": "h@x"}] and found["active"] is True
    assert found.keys().isdisjoint({"profileUrl", "name", "addresses"})


def test_the_primary_value_is_that_of_the_last_operation() -> None:
    before = {"userName": "tom", "roles": [{"value": "a"}]}
    operations = [
        add("roles", [{"value": "b", "primary": True}]),
        add("roles", [{"value": "a", "primary": True}]),
    ]
    found = patched(USER_TYPE, before, operations)["roles"]
    assert found == [{"value": "a", "primary": True}, {"value": "b", "primary": False}]


def test_an_empty_list_of_operations_answers_with_the_unchanged_resource(scim: Scim) -> None:
    user, group = scim.user("ada", title="x"), scim.group("Crew")
    assert scim.patch(f"/Users/{user['id']}") == user
    assert scim.patch(f"/Groups/{group['id']}") == group
    for body in ({}, {"Operations": None}, {"Operations": {}}):
        assert_error(scim.call("PATCH", f"/Users/{user['id']}", body), 400, "invalidSyntax")


# -- 5. Filters without meaning ----------------------------------------------------------------

MISTAKES = [  # sentence, filter, the column of its error
    ("two dots", 'emails..value eq "x"', 7),
    ("a dot before a bracket", 'emails.[type eq "work"]', 7),
    ("a dot at the end", 'userName. eq "x"', 9),
    ("two dots after a URN", f'{ENT}:manager..value eq "x"', 67),
    ("three names", 'name.familyName.x eq "y"', 16),
    ("a value filter in a value filter", 'emails[addresses[type eq "work"]]', 17),
    ("one that exists", f'{ENT}[manager[value eq "x"]]', 67),
    ("in round brackets", 'emails[(type[value eq "x"])]', 13),
    ("nothing", "", 1),
]


@pytest.mark.parametrize(
    "text, column", [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES]
)
def test_a_filter_without_meaning_is_refused_with_its_column(text: str, column: int) -> None:
    with pytest.raises(scim_server.ScimError) as caught:
        scim_server.parse_filter(text, USER_TYPE)
    assert (caught.value.status, caught.value.scim_type) == (400, "invalidFilter")
    assert f"column {column}:" in caught.value.detail


@pytest.mark.parametrize("text", ["emails..value", "emails.", "title.", f"{ENT}:manager..value"])
def test_a_path_with_an_empty_name_is_refused(text: str) -> None:
    assert patched(USER_TYPE, {"userName": "tom"}, [put(text, "x")]) == "invalidPath"


COMPUTED = [  # type, name
    ("User", "meta.location"),
    ("User", "META.Version"),
    ("User", "groups.$ref"),
    ("User", f"{USER}:groups.$ref"),
    ("Group", "members.$ref"),
    ("Group", "meta.version"),
]


@pytest.mark.parametrize("type, name", COMPUTED)
def test_a_computed_attribute_is_refused_by_name(scim: Scim, type: str, name: str) -> None:
    path, sub = f"/{type}s", name.rpartition(".")[2]
    for comparison in ('eq "x"', 'ne "x"', "pr", "eq null", 'co "x"'):
        answer = scim.call("GET", f"{path}?filter={name} {comparison}")
        assert_error(answer, 400, "invalidFilter", name)
    holder = name.rpartition(".")[0]
    assert_error(
        scim.call("GET", f'{path}?filter={holder}[{sub} eq "x"]'), 400, "invalidFilter", sub
    )
    assert_error(scim.call("GET", f"{path}?sortBy={name}"), 400, "invalidValue", name)


def test_an_empty_filter_is_refused(scim: Scim) -> None:
    scim.user("ada")
    for path in ("/Users?filter=", "/Groups?filter=", "/?filter=%20", "/Users?filter=&count=1"):
        assert_error(scim.call("GET", path), 400, "invalidFilter", "column 1")
    for body in ({"filter": ""}, {"filter": " "}):
        assert_error(scim.call("POST", "/Users/.search", body), 400, "invalidFilter", "column 1")
    assert scim.call("POST", "/Users/.search", {"filter": None}).json()["totalResults"] == 1


STORED = {
    "empty": {"name": {"givenName": ""}, "emails": [{"value": "", "type": ""}], ENT: {"manager": {"displayName": ""}}, FAC: {"union_code": ""}},
    "number": {FAC: {"locker_no": 0}, "emails": [{"primary": False}]},
    "full": {"name": NAME, "emails": [WORK], FAC: {"locker_no": 42, "union_code": "x"}, ENT: {"manager": BOSS}},
    "low": {FAC: {"locker_no": -(2**63)}},
    "high": {FAC: {"locker_no": 2**63 - 1}},
    "none": {},
}  # fmt: skip
ALL = set(STORED)
NUMBER = f"{FAC}:locker_no"
FOUND = [  # filter, who is found
    ("name pr", {"full"}),
    ("not (name pr)", ALL - {"full"}),
    ("emails pr", {"full", "number"}),
    (f"{ENT} pr", {"full"}),
    (f"{ENT}:manager pr", {"full"}),
    (f"{FAC} pr", {"full", "number", "low", "high"}),
    ("groups pr", set()),
    ("meta pr", ALL),
    ('emails[value eq ""]', {"empty"}),
    (f"{NUMBER} eq 41.5", set()),
    (f"{NUMBER} ne 41.5", ALL),
    (f"{NUMBER} gt 41.5", {"full", "high"}),
    (f"{NUMBER} ge 42.0", {"full", "high"}),
    (f"{NUMBER} gt 42.5", {"high"}),
    (f"{NUMBER} lt 41.5", {"number", "low"}),
    (f"{NUMBER} le 42.5", {"number", "low", "full"}),
    (f"{NUMBER} gt -0.5", {"number", "full", "high"}),
    (f"{NUMBER} lt -0.5", {"low"}),
    (f"{NUMBER} lt 1e30", {"number", "low", "full", "high"}),
    (f"{NUMBER} gt 1e30", set()),
    (f"{NUMBER} lt 1e999", {"number", "low", "full", "high"}),
    (f"{NUMBER} gt -1e999", {"number", "low", "full", "high"}),
    (f"{NUMBER} eq 9223372036854775808", set()),
    (f"{NUMBER} lt 9223372036854775808", {"number", "low", "full", "high"}),
    (f"{NUMBER} ge 9223372036854775808", set()),
    (f"{NUMBER} ge -9223372036854775809", {"number", "low", "full", "high"}),
    (f"{NUMBER} le -9223372036854775809", set()),
    (f'meta.created gt "2000-01-01T00:00:00.{"1" * 40}Z"', ALL),
    (f'meta.created lt "2000-01-01T00:00:00.{"1" * 40}Z"', set()),
]


@pytest.fixture(scope="module")
def stored() -> Iterator[tuple[scim_server.Directory, dict[str, Any]]]:
    """A directory of the users above, and its resources by name."""
    with closing(scim_server.Store(":memory:")) as store:
        directory = scim_server.Directory(store, FIELDS)
        yield (
            directory,
            {
                name: directory.create("User", {"userName": name, **body})
                for name, body in STORED.items()
            },
        )


@pytest.mark.parametrize("text, expected", FOUND)
def test_a_filter_finds_by_meaning(stored: Any, text: str, expected: set[str]) -> None:
    directory, resources = stored
    filter = scim_server.parse_filter(text, USER_TYPE)
    found = {one["userName"] for one in directory.query("User", filter).resources}
    assert found == expected
    assert {name for name, one in resources.items() if scim_server.matches(filter, one)} == expected


@pytest.mark.parametrize("name", [f"{NUMBER} eq true", f'{NUMBER} eq "x"', f'{NUMBER} eq "41.5"'])
def test_what_is_no_number_does_not_compare_with_an_integer(name: str) -> None:
    with pytest.raises(scim_server.ScimError):
        scim_server.parse_filter(name, USER_TYPE)


INSTANTS = [  # two dateTimes in ascending order
    ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00.0000000000000001Z"),
    ("2026-01-01T00:00:00.1234567891Z", "2026-01-01T00:00:00.12345678911Z"),
    ("2026-01-01T00:00:00.123456789Z", "2026-01-01T00:00:00.1234567891Z"),
    ("2026-01-01T00:00:00.9999999999999Z", "2026-01-01T00:00:01Z"),
]


@pytest.mark.parametrize("earlier, later", INSTANTS)
def test_a_date_time_may_have_any_number_of_fraction_digits(earlier: str, later: str) -> None:
    assert scim_server.date_time_key(earlier) < scim_server.date_time_key(later)
    same = earlier.replace("Z", "" if "." in earlier else ".") + "0" * 12 + "Z"
    assert scim_server.date_time_key(earlier) == scim_server.date_time_key(same)


SORTED = [  # endpoint, sortBy, order of the names
    ("/Users", "groups.display", ["bob", "ada", "cy"]),
    ("/Users", "groups.value", ["bob", "ada", "cy"]),
    ("/Users", "groups", ["bob", "ada", "cy"]),
    ("/Groups", "members.value", ["zz", "aa", "mm"]),
    ("/Groups", "members", ["zz", "aa", "mm"]),
    ("/Groups", "members.display", ["aa", "zz", "mm"]),
]


@pytest.mark.parametrize("path, name, order", SORTED)
def test_memberships_sort_by_the_first_value(path: str, name: str, order: list[str]) -> None:
    ids = iter(["1-ada", "2-bob", "3-cy", "4-aa", "5-zz", "6-mm"])
    with closing(scim_server.Store(":memory:")) as store:
        directory = scim_server.Directory(store, new_id=lambda: next(ids))
        for user in ("ada", "bob", "cy"):
            directory.create("User", {"userName": user})
        ada, bob = {"value": "1-ada", "display": "z"}, {"value": "2-bob", "display": "a"}
        for group, members in (("aa", [bob]), ("zz", [bob, ada]), ("mm", [])):
            directory.create("Group", {"displayName": group, "members": members})
        resource_type = TYPES[path[1:-1]]
        attributes = scim_server.resolve(name, resource_type)
        if sub := attributes[-1].value_attribute:
            attributes = (*attributes, sub)
        for descending in (False, True):
            sorting = scim_server.Sorting(scim_server.AttributePath(attributes), descending)
            page = directory.query(resource_type, sorting=sorting)
            found = [one.get("displayName") or one["userName"] for one in page.resources]
            assert found == (order[::-1] if descending else order)
            steps = [
                directory.query(resource_type, sorting=sorting, start_index=start, count=1)
                for start in (1, 2, 3)
            ]
            assert [step.resources[0]["id"] for step in steps] == [
                one["id"] for one in page.resources
            ]


# -- 6. Names are prepared before they are compared --------------------------------------------

E_ACUTE = ("jos\u00e9", "jose\u0301")
SAME = [  # sentence, two names that are the same
    ("an accent as one or two characters", *E_ACUTE),
    ("the other way round", *E_ACUTE[::-1]),
    ("in capitals", "JOSE\u0301", "jos\u00e9"),
    ("what case folding takes apart", "\u0390", "\u03aa\u0301"),
    ("full-width letters", "\uff41\uff44\uff41", "Ada"),
    ("half-width kana", "\uff76", "\u30ab"),
    ("an ideographic blank", "a\u3000b", "a b"),
]


@pytest.mark.parametrize("one, other", [row[1:] for row in SAME], ids=[row[0] for row in SAME])
def test_a_name_is_taken_in_every_spelling(scim: Scim, one: str, other: str) -> None:
    user, group = scim.user(one), scim.group(one)
    assert (user["userName"], group["displayName"]) == (one, one)
    assert_error(scim.call("POST", "/Users", {"userName": other}), 409, "uniqueness")
    assert_error(scim.call("POST", "/Groups", {"displayName": other}), 409, "uniqueness")
    assert scim.names(f'userName eq "{other}"') == [one]
    assert scim.names(f'displayName eq "{other}"', "/Groups") == [one]
    assert scim.names(
        f'userName sw "{other[:-1]}"' if other.isascii() else f'userName ew "{other}"'
    ) == [one]
    free = scim.user("free")["id"]
    assert_error(scim.try_patch(f"/Users/{free}", put("userName", other)), 409, "uniqueness")
    assert_error(scim.call("PUT", f"/Users/{free}", {"userName": other}), 409, "uniqueness")
    assert scim.patch(f"/Users/{user['id']}", put("userName", other))["userName"] == other
    assert scim.call("POST", "/Users", {"userName": other + "\u00b2"}).status_code == 201


def test_other_text_is_composed_but_its_width_counts(scim: Scim) -> None:
    scim.user("ada", title=E_ACUTE[0], externalId=E_ACUTE[0], nickName="\uff41")
    assert scim.names(f'title eq "{E_ACUTE[1]}"') == ["ada"]
    assert scim.names(f'externalId eq "{E_ACUTE[1]}"') == []
    assert scim.names('nickName eq "a"') == []
