#!/usr/bin/env python3
"""scim_server: a SCIM 2.0 server in one file, for Microsoft Entra ID and its like.

People assigned to an enterprise application in Entra ID arrive here by SCIM and become employees of
Facilio: created, updated, and marked inactive when they leave. Python 3.10+, standard library only.

Run it        python scim_server.py                       serves sample_config.json, or a demo tenant
              python scim_server.py token                 makes a secret for a tenant
              python scim_server.py check --config FILE   explains a configuration
              python scim_server.py employees --tenant acme   (and changes) shows what the sync did
              python scim_server.py demo                  plays Entra ID against the running server
Embed it      with running("config.json") as server: print(server.url)
              application = wsgi("config.json")           for gunicorn, or under a prefix in Flask
              Directory(Store("one.sqlite3")).create("User", {"userName": "ada"})   no HTTP at all
Test with it  with running() as server:                   an empty one in memory, on a free port
                  requests.get(server.url + "/Users", headers={
                      "Authorization": "Bearer " + server.token("demo")})

Chapters      1 Vocabulary        schema URNs, limits, ScimError
              2 Schemas           Attribute, Schema, ResourceType: the data that decides everything
              3 Filters, paths    text to a bound tree; matches() reads it in Python
              4 Resources         accept() lets a body in, project() lets a resource out
              5 PATCH             operations on a resource, all or none
              6 Queries           the filter tree as SQL
              7 Store             one SQLite file per tenant: sessions, transactions, backup
              8 Employees         the Facilio employee made from a user
              9 Directory         one tenant's operations, a transaction each
             10 Configuration     tenants, tokens, custom fields
             11 Messages          Request, Response, Call, bodies, lists, errors
             12 SCIM endpoints    resources, queries, cursors, discovery, Bulk
             13 Provisioning log  what each call did, and what to do when it failed
             14 Other endpoints   employees, changes, the console's API, health, metrics
             15 Application       handle(Request) -> Response: tenants, tokens, routes
             16 HTTP server       sockets
             17 Console           the page that shows why a sync works or fails
             18 Interface         running(), wsgi(), main() and the commands

One request   octets -> connection (buffer, deadline) -> head -> token checked -> body -> Request
              -> Application.handle (route, operation) -> Directory operation (accept, patch or
              query, one transaction) -> Store -> project -> Response -> one write to the socket

Notation, kept to everywhere below:

    resource   canonical JSON object, e.g. {"schemas": [...], "id": "2819c2", "userName": "BJensen"}
    attribute  an Attribute, e.g. that of emails, or of emails.type
    filter     a bound filter tree, e.g. Compare(emails.type, "eq", "work")
    key        the form in which values compare, e.g. "bjensen" for the userName "BJensen"
    entry      a row of the index, (path, key, element), e.g. ("emails.type", "work", 0)
    version    the opaque part of an ETag
"""

from __future__ import annotations

import argparse
import base64
import copy
import csv
import difflib
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import operator
import os
import queue
import re
import secrets
import selectors
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO
from unicodedata import normalize
from urllib.parse import parse_qsl, quote, unquote, urlencode

# ----------------------------------------------------------------------------
# 1. Vocabulary                                          RFC 7643, RFC 7644 §3.12
#
# The names of the protocol, the limits of this server, and its error.
# Uses no other chapter.
# ----------------------------------------------------------------------------

USER = "urn:ietf:params:scim:schemas:core:2.0:User"
GROUP = "urn:ietf:params:scim:schemas:core:2.0:Group"
ENTERPRISE = "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User"
FACILIO = "urn:ietf:params:scim:schemas:extension:facilio:2.0:User"
SCHEMA = "urn:ietf:params:scim:schemas:core:2.0:Schema"
RESOURCE_TYPE = "urn:ietf:params:scim:schemas:core:2.0:ResourceType"
PROVIDER_CONFIG = "urn:ietf:params:scim:schemas:core:2.0:ServiceProviderConfig"
LIST_RESPONSE = "urn:ietf:params:scim:api:messages:2.0:ListResponse"
BULK_RESPONSE = "urn:ietf:params:scim:api:messages:2.0:BulkResponse"
PATCH_OP = "urn:ietf:params:scim:api:messages:2.0:PatchOp"
ERROR = "urn:ietf:params:scim:api:messages:2.0:Error"
BASE_PATH = "/scim/v2"
DEFAULT_COUNT, MAX_COUNT = 100, 1_000  # default and maximum page size
# PATCH of a group with more members answers 204: its cost depends on the change, not on the group.
MAX_ANSWERED_MEMBERS = 1_000
MAX_FILTER_LENGTH, MAX_FILTER_DEPTH = 8 * 1024, 50  # characters, nested brackets
MAX_DETAIL, MAX_TEXT = 4_000, 64 * 1024  # characters of an error's detail, of a value
MAX_VALUES, MAX_DEPTH = 1_000, 50  # values of an attribute except members, nesting of a body
MAX_BODY, MAX_BULK_BODY = 2 * 1024 * 1024, 10 * 1024 * 1024  # bytes
MAX_BULK_OPERATIONS = 1_000
MAX_WAIT = 60  # seconds that a long poll may wait
CURSOR_SECONDS, SIGNATURE_LENGTH = 3_600, 16  # validity of a cursor, bytes of its HMAC
__version__ = "1.0.0"
# fmt: off
__all__ = [  # the public interface; everything else may change
    "Application", "Change", "Config", "ConfigError", "CustomField", "Directory", "Employee",
    "Exchange", "Fault", "Page", "Request", "Response", "ScimError", "ScimServer", "Store",
    "StoreError", "load_config", "main", "parse_config", "running", "wsgi",
]
# fmt: on
UTC = timezone.utc  # Python 3.10 has no datetime.UTC
Json = Any  # what json.loads returns
Resource = dict[str, Any]


class ScimError(Exception):
    """An error response: HTTP status, scimType (RFC 7644 table 9, or "") and detail.

    An administrator reads the detail in a provisioning log. It names the attribute or option, and
    says what is wrong and what would be right. headers are added to the HTTP response. reason says
    why in a form that the provisioning log can look up: a key, then the parts of its sentence,
    such as ("boolean", "active", '"maybe"'). Without a reason the log quotes the detail.
    """

    def __init__(
        self,
        status: int,
        scim_type: str,
        detail: str,
        headers: Mapping[str, str] = {},
        reason: tuple[str, ...] = (),
    ) -> None:
        super().__init__(detail)
        self.status, self.scim_type = status, scim_type
        self.detail = detail if len(detail) <= MAX_DETAIL else f"{detail[: MAX_DETAIL - 3]}..."
        self.headers, self.reason = dict(headers), reason

    def body(self) -> Json:
        """Return the Error message of RFC 7644 §3.12; its status is a string."""
        return {
            "schemas": [ERROR],
            "status": str(self.status),
            **({"scimType": self.scim_type} if self.scim_type else {}),
            "detail": self.detail,
        }


# These take the detail and, by name, headers and reason.
invalid_filter = partial(ScimError, 400, "invalidFilter")
invalid_path = partial(ScimError, 400, "invalidPath")
invalid_syntax = partial(ScimError, 400, "invalidSyntax")
invalid_value = partial(ScimError, 400, "invalidValue")


def quoted(value: Json) -> str:
    """Return a client's value as JSON text of at most 80 characters, for an error's detail."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


# ----------------------------------------------------------------------------
# 2. Schemas                                                            RFC 7643
#
# The attributes of users and groups, as frozen data. This data alone decides what
# is validated, what type a filter compares, what is returned, what PATCH may
# write and what /Schemas prints.
# Uses chapter 1. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------

TYPE_NAMES = {  # every other type is sent as a String
    "boolean": "a Boolean",
    "integer": "a 64-bit Integer",
    "dateTime": "a dateTime",
    "complex": "an object",
}
INTEGER_LIMIT = 2**63
INTEGER_TEXT = re.compile(r"-?\d{1,19}", re.ASCII)
DATE_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d+))?"
    r"(?:Z|([+-])(\d\d):(\d\d))?",
    re.ASCII | re.IGNORECASE,
)


def date_time_key(text: str) -> str:
    """Return a dateTime as UTC text that sorts by time; ValueError if it is not a dateTime."""
    # Python 3.10's fromisoformat refuses "Z", and the seven fraction digits that Entra sends.
    if not (parts := DATE_TIME.fullmatch(text)):
        raise ValueError(text)
    instant = datetime(*map(int, parts.group(1, 2, 3, 4, 5, 6)))  # type: ignore[arg-type]
    offset = timedelta(hours=int(parts[9] or 0), minutes=int(parts[10] or 0))  # none means UTC
    with suppress(OverflowError):  # .NET's DateTime.MinValue or MaxValue with a UTC offset
        instant += -offset if parts[8] == "+" else offset
    return f"{instant.isoformat()}.{(parts[7] or '').rstrip('0'):0<9}"


# Full-width and half-width characters, and those that they equal in a name (RFC 8265 §3.3.2).
WIDTHS = {code: normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFF01, 0xFFEF))}
KEYS: dict[str, Callable[[Any], str]] = {  # how values become keys; the other types are text
    "boolean": lambda value: "true" if value else "false",
    # A filter may compare with 41.5, or with a number beyond all Integers.
    "integer": lambda number: (
        f"{int(min(max(number, -INTEGER_LIMIT - 1), INTEGER_LIMIT) // 1) + INTEGER_LIMIT:020d}"
        + "." * (number % 1 > 0)
    ),
    "dateTime": date_time_key,
    "complex": lambda value: "1",  # marks presence: complex values have no order of their own
}


@dataclass(frozen=True, eq=False)
class Attribute:
    """An attribute and its characteristics (RFC 7643 §2.2, §7).

    The fields after description are our own.
    """

    name: str
    type: str = "string"
    multi_valued: bool = False
    required: bool = False
    case_exact: bool = False
    mutability: str = "readWrite"
    returned: str = "default"
    uniqueness: str = "none"
    canonical_values: tuple[str, ...] = ()
    reference_types: tuple[str, ...] = ()
    sub_attributes: tuple[Attribute, ...] = ()
    description: str = ""
    published: bool = True  # whether /Schemas lists it
    default: Json = None  # the value of a new resource if the client sends none
    is_membership: bool = False  # groups and members, which are stored as rows, not in the body
    computed: bool = False  # made for each response: it cannot be sent, found or sorted by
    is_name: bool = False  # compared as a userName: full-width letters equal normal ones (RFC 8265)
    identifies: bool = False  # a new value drops those beside it: they describe somebody else
    path: str = ""  # in a resource type: "emails.type", "urn:…:User:department"
    index: str = field(init=False)  # path in lower case
    by_name: dict[str, Attribute] = field(init=False, repr=False)  # names in lower case

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", self.path.lower())
        object.__setattr__(self, "by_name", {sub.name.lower(): sub for sub in self.sub_attributes})

    def with_paths(self, prefix: str = "") -> Attribute:
        """Return a copy in which this attribute and its sub-attributes know their paths."""
        path = prefix + self.name
        # A colon separates an extension's URN from an attribute (RFC 7644 §3.10), a dot all others.
        below = path and path + (":" if ":" in self.name else ".")
        return replace(
            self,
            path=path,
            sub_attributes=tuple(sub.with_paths(below) for sub in self.sub_attributes),
        )

    def sub_attribute(self, name: str) -> Attribute | None:
        """Return the sub-attribute with a name in any case (RFC 7643 §2.1), or None."""
        return self.by_name.get(name.lower())

    @property
    def value_attribute(self) -> Attribute | None:
        """The sub-attribute "value", which a bare value stands for (RFC 7643 §2.4), or None."""
        # In an extension, "value" would be an ordinary attribute, such as a custom field.
        return None if ":" in self.name else self.by_name.get("value")

    def convert(self, value: Json) -> Json:
        """Return a JSON value in the type of this simple attribute; ScimError 400 invalidValue.

        Text is converted to a Boolean or an Integer: Entra's Switch() mapping sends "True".
        """
        if self.type == "boolean":
            if isinstance(value, (bool, str)) and str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
        elif self.type == "integer":
            if (
                type(value) is int or (isinstance(value, str) and INTEGER_TEXT.fullmatch(value))
            ) and -INTEGER_LIMIT <= int(value) < INTEGER_LIMIT:
                return int(value)
        elif isinstance(value, str) and self.type != "complex":
            if len(value) > MAX_TEXT:
                raise invalid_value(
                    f"{self.path}: the text has {len(value)} characters, more than {MAX_TEXT}"
                )
            if self.type != "dateTime":
                return value
            with suppress(ValueError):
                date_time_key(value)
                return value
        expected, excerpt = TYPE_NAMES.get(self.type, "a String"), quoted(value)
        raise invalid_value(
            f"{self.path}: expected {expected}, got {excerpt}",
            reason=(self.type, self.path, excerpt)
            if self.type in ("boolean", "integer")
            else ("type", self.path, expected, excerpt),
        )

    def values(self, holder: Mapping[str, Json]) -> list[Json]:
        """Return the values of this attribute in a resource or complex value: none, one or many."""
        value = holder.get(self.name, [])
        return value if self.multi_valued or self.name not in holder else [value]

    def key(self, value: Json) -> str:
        """Return the text that decides which values are equal, and the order of values."""
        if key := KEYS.get(self.type):
            return key(value)
        # é may be sent as one character or as two (RFC 7644 §5). Case folding takes some apart.
        text = value.translate(WIDTHS) if self.is_name else value
        return value if self.case_exact else normalize("NFC", normalize("NFC", text).casefold())


def strings(*names: str) -> tuple[Attribute, ...]:
    """Return attributes of type string that have a name and no other characteristic."""
    return tuple(map(Attribute, names))


# fmt: off
def multi_valued(
    name: str, value_type: str = "string", types: tuple[str, ...] = (), display: bool = True
) -> Attribute:
    """Return a multi-valued attribute with the default sub-attributes of RFC 7643 §2.4.

    types are the canonical values of "type"; display says whether /Schemas lists "display".
    """
    return Attribute(name, "complex", multi_valued=True, sub_attributes=(
        Attribute("value", value_type, case_exact=value_type != "string",
                  reference_types=("external",) if value_type == "reference" else ()),
        Attribute("display", published=display),
        Attribute("type", canonical_values=types),
        Attribute("primary", "boolean"),
    ))


read_only = partial(Attribute, mutability="readOnly")
EXTERNAL_ID = Attribute("externalId", case_exact=True)
COMMON = (
    read_only("schemas", "reference", multi_valued=True, case_exact=True, returned="always"),
    read_only("id", case_exact=True, returned="always", uniqueness="server"),
    EXTERNAL_ID,
)
META = read_only("meta", "complex", sub_attributes=(
    read_only("resourceType", case_exact=True),
    read_only("created", "dateTime"),
    read_only("lastModified", "dateTime"),
    read_only("location", "reference", case_exact=True, computed=True),
    read_only("version", case_exact=True, computed=True),
))
# fmt: on


@dataclass(frozen=True)
class Schema:
    """A schema (RFC 7643 §7). Its attributes have no paths yet: a resource type adds them."""

    id: str
    name: str
    description: str
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True, eq=False)
class ResourceType:
    """A resource type (RFC 7643 §6): an endpoint, a core schema and its extensions.

    root is the resource type seen as one complex attribute, which contains each extension as a
    complex attribute. So the same functions walk resources, complex values and extension objects.
    """

    name: str
    endpoint: str
    schema: Schema
    extensions: tuple[Schema, ...] = ()
    root: Attribute = field(init=False, repr=False)

    def __post_init__(self) -> None:
        attributes = (
            *COMMON,
            *self.schema.attributes,
            *(Attribute(e.id, "complex", sub_attributes=e.attributes) for e in self.extensions),
            META,
        )
        object.__setattr__(
            self, "root", Attribute("", "complex", sub_attributes=attributes).with_paths()
        )

    @cached_property
    def scopes(self) -> dict[str, Attribute]:
        """The complex attribute that the URN of each schema stands for: root, or an extension."""
        return {
            self.schema.id: self.root,
            **{e.id: self.root.by_name[e.id.lower()] for e in self.extensions},
        }

    def location(self, base_url: str, id: str) -> str:
        """Return the URL of a resource."""
        return f"{base_url}{self.endpoint}/{id}"


# fmt: off
USER_SCHEMA = Schema(USER, "User", "User Account", (
    Attribute("userName", required=True, uniqueness="server", is_name=True),
    Attribute("name", "complex", sub_attributes=strings(
        "formatted", "familyName", "givenName", "middleName", "honorificPrefix", "honorificSuffix",
    )),
    *strings("displayName", "nickName"),
    Attribute("profileUrl", "reference", case_exact=True, reference_types=("external",)),
    Attribute("title", description="The job title; the employee's designation"),
    *strings("userType", "preferredLanguage", "locale", "timezone"),
    # Okta treats a user without active as deactivated, so every user has it.
    Attribute("active", "boolean", default=True),
    # Okta always sends a password. It is accepted, but neither stored nor published.
    Attribute("password", mutability="writeOnly", returned="never", published=False),
    # Entra's validator tests each published attribute, and stops at the display of these two.
    multi_valued("emails", types=("work", "home", "other"), display=False),
    multi_valued("phoneNumbers", types=("work", "home", "mobile", "fax", "pager", "other"),
                 display=False),
    multi_valued("ims", types=("aim", "gtalk", "icq", "xmpp", "msn", "skype", "qq", "yahoo")),
    multi_valued("photos", "reference", types=("photo", "thumbnail")),
    Attribute("addresses", "complex", multi_valued=True, sub_attributes=(
        *strings("formatted", "streetAddress", "locality", "region", "postalCode", "country"),
        Attribute("type", canonical_values=("work", "home", "other")),
        Attribute("primary", "boolean"),
        Attribute("display", published=False),
    )),
    read_only("groups", "complex", multi_valued=True, is_membership=True, sub_attributes=(
        read_only("value", case_exact=True),
        read_only("$ref", "reference", case_exact=True, reference_types=("Group",), computed=True),
        read_only("display", is_name=True),  # the displayName of the group
        read_only("type", canonical_values=("direct",)),
    )),
    multi_valued("entitlements"),
    multi_valued("roles"),
    multi_valued("x509Certificates", "binary"),
))
GROUP_SCHEMA = Schema(GROUP, "Group", "Group", (
    # RFC 7643 allows groups with the same name. Here a name is unique: Entra matches groups by it.
    Attribute("displayName", required=True, uniqueness="server", is_name=True),
    Attribute("members", "complex", multi_valued=True, is_membership=True, sub_attributes=(
        # The id of a user or group. Another id would be another member (RFC 7643 §8.7.1).
        Attribute("value", required=True, case_exact=True, mutability="immutable"),
        # The server sets $ref. If it were not published, or as readOnly, scim2-tester would send
        # ids that do not exist, and the server would ignore them.
        Attribute("$ref", "reference", case_exact=True, mutability="immutable", computed=True,
                  reference_types=("User", "Group")),
        Attribute("type", canonical_values=("User", "Group"), mutability="immutable"),
        Attribute("display"),
    )),
))
ENTERPRISE_SCHEMA = Schema(ENTERPRISE, "EnterpriseUser", "Enterprise User", (
    *strings("employeeNumber", "costCenter", "organization", "division", "department"),
    Attribute("manager", "complex", sub_attributes=(
        Attribute("value", case_exact=True, identifies=True),
        Attribute("$ref", "reference", case_exact=True, published=False,
                  reference_types=("User",)),
        Attribute("displayName"),
    )),
))
# fmt: on
MEMBERSHIP_ATTRIBUTES = tuple(
    attribute.name
    for attribute in (*USER_SCHEMA.attributes, *GROUP_SCHEMA.attributes)
    if attribute.is_membership
)


@dataclass(frozen=True)
class CustomField:
    """A custom field of the tenant's Employee module: String, Integer or Boolean."""

    link_name: str
    type: str = "String"
    display_name: str = ""

    @property
    def urn(self) -> str:
        """The name to paste into Entra's attribute list."""
        return f"{FACILIO}:{self.link_name}"


@lru_cache(1024)  # tenants with the same custom fields share their resource types
def resource_types(custom_fields: tuple[CustomField, ...]) -> dict[str, ResourceType]:
    """Return a tenant's resource types by name; User comes first, as Entra's validator needs it."""
    facilio = Schema(
        FACILIO,
        "FacilioUser",
        "Custom fields of the Employee module",
        tuple(
            Attribute(custom.link_name, custom.type.lower(), description=custom.display_name)
            for custom in custom_fields
        ),
    )
    return {
        "User": ResourceType("User", "/Users", USER_SCHEMA, (ENTERPRISE_SCHEMA, facilio)),
        "Group": ResourceType("Group", "/Groups", GROUP_SCHEMA),
    }


# ----------------------------------------------------------------------------
# 3. Filters and paths                               RFC 7644 §3.4.2.2, §3.5.2
#
# The text of a filter becomes a tree, and every name in it an Attribute. The tree
# has two readers: matches() here, compile_filter() in chapter 6.
# Uses chapters 1 and 2. Knows nothing of HTTP, SQL or the clock.
# ----------------------------------------------------------------------------

Attributes = tuple[Attribute, ...]  # from the top down: (emails, type) for emails.type


@dataclass(frozen=True, slots=True)
class AttributePath:
    """A path from a resource, or from one complex value, down to an attribute."""

    attributes: Attributes

    @property
    def attribute(self) -> Attribute:
        """The attribute at the end of the path."""
        return self.attributes[-1]

    def items(self, value: Json) -> list[Json]:
        """Return the values at this path in a resource or complex value, as one flat list."""
        items = [value]
        for attribute in self.attributes:
            items = [item for holder in items for item in attribute.values(holder)]
        return items

    def keys(self, value: Json) -> list[str]:
        """Return the keys of the values at this path."""
        return [self.attribute.key(item) for item in self.items(value)]


@dataclass(frozen=True, slots=True)
class Compare:
    """Whether one of an attribute's values compares with a literal as op says.

    value is the literal in the attribute's type (for an Integer any number), key is its key. op is
    one of OPERATORS.
    """

    target: AttributePath
    op: str
    key: str
    value: Json


@dataclass(frozen=True, slots=True)
class Present:
    """Whether an attribute has a value that is not empty (pr)."""

    target: AttributePath


@dataclass(frozen=True, slots=True)
class And:
    """Whether all of some filters match; And(()) matches everything."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Whether any of some filters matches; Or(()) matches nothing."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """Whether a filter does not match."""

    inner: Filter


@dataclass(frozen=True, slots=True)
class ValuePath:
    """Whether a single value of a complex attribute matches a filter on its sub-attributes."""

    target: AttributePath
    inner: Filter


Filter = Compare | Present | And | Or | Not | ValuePath
EVERYTHING, NOTHING = And(()), Or(())
OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "eq": operator.eq,
    "co": operator.contains,
    "sw": str.startswith,
    "ew": str.endswith,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
}


def matches(filter: Filter, value: Json, fold: Callable[[str], str] = str) -> bool:
    """Return whether a resource, or one value of a complex attribute, satisfies a filter.

    fold prepares keys for a looser comparison.
    """
    match filter:
        case And(filters):
            return all(matches(inner, value, fold) for inner in filters)
        case Or(filters):
            return any(matches(inner, value, fold) for inner in filters)
        case Not(inner):
            return not matches(inner, value, fold)
        case ValuePath(target, inner):
            return any(matches(inner, item, fold) for item in target.items(value))
        case Present(target):
            return any(target.keys(value))  # empty text has an empty key: it is not present
        case Compare(target, op, key):
            return any(OPERATORS[op](fold(own_key), fold(key)) for own_key in target.keys(value))


# -- Names -------------------------------------------------------------------


def split_urn(name: str, resource_type: ResourceType) -> tuple[Attribute, list[str]] | None:
    """Return what the schema URN at the start of a name stands for, and the names after it.

    A URN stands for the root or for an extension. Return None if the name does not start with one.
    """
    # No URN is the start of another one. Before 2018 Entra wrote a dot instead of the colon.
    for urn, scope in resource_type.scopes.items():
        rest = name[len(urn) :]
        if name[: len(urn)].lower() == urn.lower() and rest[:1] in ("", ":", "."):
            return scope, rest[1:].split(".") if rest[1:] else []
    return None


@lru_cache(1024)
def resolve(name: str, resource_type: ResourceType) -> Attributes | None:
    """Return the attributes from the root down to a name in attrPath notation; None if unknown.

    The URN of the core schema stands for the root itself: the result is ().
    """
    # Entra sends the bare path "manager", so a name without URN is looked up in extensions too.
    all_scopes = [(scope, name.split(".")) for scope in resource_type.scopes.values()]
    split = split_urn(name, resource_type)
    for scope, names in [split] if split else all_scopes:
        attributes = () if scope is resource_type.root else (scope,)
        for part in names:
            if not (sub := scope.sub_attribute(part)):
                break
            scope, attributes = sub, (*attributes, sub)
        else:  # all names are known
            return attributes
    return None


def resolve_sub_attribute(
    attributes: Attributes | None, name: str, strict: bool = False
) -> Attributes | None:
    """Return, as a path, the sub-attribute that a name means in the brackets after an attribute.

    Return None if the name or the attribute is unknown. If strict, an unknown name is a ScimError
    400 invalidPath.
    """
    sub = attributes[-1].sub_attribute(name) if attributes else None
    if strict and attributes and not sub:
        raise invalid_path(f"path: {attributes[-1].path} has no sub-attribute {quoted(name)}")
    return (sub,) if sub else None


# -- The parser: a rule takes tokens and a position; it returns a filter and the next position --

Tokens = list[tuple[str, str, int]]  # kind, text, column from 1
Scope = partial[Attributes | None]  # of resolve, or in brackets of resolve_sub_attribute
Parsed = tuple[Filter, int]  # with the position after it
TOKEN = re.compile(
    r"""
    \s* (?: (?P<string> "(?:[^"\\]|\\.)*" )
          | (?P<number> -?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.]) )
          | (?P<name>   [A-Za-z$_][\w$-]*
                        (?: (?:[.:][\w$-]+)* : [\w$-]+ (?:\.[\w$-]+)* | \.[\w$-]+ )? )
          | (?P<sub>    \.[A-Za-z$][\w$-]* )
          | (?P<mark>   [()\[\]] )
          | (?P<error>  \S (?:.*\S)? ) )""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)
UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # NUL and lone surrogates: databases refuse them
LITERAL = json.JSONDecoder(
    strict=False,  # text may contain control characters; 5.0 is the Integer 5
    parse_float=lambda text: int(number) if (number := float(text)).is_integer() else number,
)


STRING_TYPES = ("string", "reference")


def bad_filter(column: int, expected: str, text: str) -> ScimError:
    """Return the error for a text that the syntax does not allow at a column, "" for the end."""
    return invalid_filter(
        f"filter, column {column}: expected {expected}, found {quoted(text) if text else 'the end'}"
    )


def tokens_of(text: str) -> Tokens:
    """Return the tokens of a filter or path, then an end token; ScimError 400 invalidFilter.

    Text that is not a token becomes an error token up to the end. No rule of the parser accepts it.
    """
    if len(text) > MAX_FILTER_LENGTH:
        raise invalid_filter(f"filter: longer than {MAX_FILTER_LENGTH} characters")
    tokens = [
        (kind := token.lastgroup or "", token[kind], token.start(kind) + 1)
        for token in TOKEN.finditer(text)
    ]
    return [*tokens, ("end", "", len(text.rstrip()) + 1)]


def parse_filter(text: str, resource_type: ResourceType) -> Filter:
    """Return the tree of a filter on resources (RFC 7644 §3.4.2.2); ScimError 400 invalidFilter."""
    return parse_filter_tokens(
        "", tokens_of(text), 0, partial(resolve, resource_type=resource_type)
    )[0]


# FILTER = attrExp / logExp / valuePath / *1"not" "(" FILTER ")"; "and" binds tighter than "or"
def parse_filter_tokens(
    closing: str, tokens: Tokens, position: int, scope: Scope, depth: int = 0
) -> Parsed:
    """Return the filter up to its closing bracket, or up to the end of the tokens ("")."""
    if depth > MAX_FILTER_DEPTH:
        raise invalid_filter(f"filter: brackets nested deeper than {MAX_FILTER_DEPTH}")
    term, position = parse_term(tokens, position, scope, depth)
    alternatives = [[term]]  # the terms of And, for each filter of Or
    while (word := tokens[position][1].lower()) in ("and", "or"):
        term, position = parse_term(tokens, position + 1, scope, depth)
        if word == "or":
            alternatives.append([])
        alternatives[-1].append(term)
    _, text, column = tokens[position]
    if text != closing:
        raise bad_filter(column, f"'{closing}'" if closing else "'and', 'or' or the end", text)
    filters = [And(tuple(terms)) if len(terms) > 1 else terms[0] for terms in alternatives]
    return (Or(tuple(filters)) if len(filters) > 1 else filters[0]), position + 1


def parse_term(tokens: Tokens, position: int, scope: Scope, depth: int) -> Parsed:
    """Return the filter of an attrExp, a valuePath or a filter in brackets, perhaps after "not"."""
    kind, text, column = tokens[position]
    if text == "(":
        return parse_filter_tokens(")", tokens, position + 1, scope, depth + 1)
    following = tokens[position + 1][1] if kind != "end" else ""
    if text.lower() == "not" and following == "(":
        inner, position = parse_term(tokens, position + 1, scope, depth)
        return Not(inner), position
    if kind != "name":
        raise bad_filter(column, "an attribute name", text)
    # In brackets there are no other brackets (RFC 7644 figure 1): they would have no meaning.
    if following == "[" and scope.func is resolve:
        return parse_value_path(tokens, position + 1, scope(text), text, depth)
    return parse_expression(tokens, position + 1, scope(text), text)


# valuePath = attrPath "[" valFilter "]", and what Entra sends: valuePath "." subAttr SP compareOp …
def parse_value_path(
    tokens: Tokens, position: int, attributes: Attributes | None, name: str, depth: int
) -> Parsed:
    """Return a value path, from its bracket on; a comparison after it is added to its filter."""
    inner, position = parse_brackets(tokens, position, attributes, name, depth)
    kind, text, _ = tokens[position]
    if kind == "sub":
        sub = resolve_sub_attribute(attributes, text[1:])
        comparison, position = parse_expression(tokens, position + 1, sub, name + text)
        inner = And((inner, comparison))
    return (ValuePath(AttributePath(attributes), inner) if attributes else NOTHING), position


def parse_brackets(
    tokens: Tokens,
    position: int,
    attributes: Attributes | None,
    name: str,
    depth: int,
    strict: bool = False,
) -> Parsed:
    """Return the filter in square brackets on the values of a complex attribute."""
    if attributes and attributes[-1].type != "complex":
        raise invalid_filter(
            f"{name}: only a complex attribute can have a filter in brackets, but its type is "
            f"{attributes[-1].type}"
        )
    return parse_filter_tokens(
        "]",
        tokens,
        position + 1,
        partial(resolve_sub_attribute, attributes, strict=strict),
        depth + 1,
    )


# attrExp = attrPath SP "pr" / attrPath SP compareOp SP compValue
def parse_expression(
    tokens: Tokens, position: int, attributes: Attributes | None, name: str
) -> Parsed:
    """Return the comparison of an attribute, from its operator on."""
    _, text, column = tokens[position]
    op = text.lower()
    if attributes and attributes[-1].computed:
        raise invalid_filter(f"{name}: made for each response; a filter cannot use it")
    if op == "pr":
        return (present(attributes) if attributes else NOTHING), position + 1
    if op != "ne" and op not in OPERATORS:
        raise bad_filter(column, "an operator (eq, ne, co, sw, ew, gt, ge, lt, le, pr)", text)
    return bind_comparison(attributes, name, op, parse_literal(*tokens[position + 1])), position + 2


def present(attributes: Attributes) -> Filter:
    """Return the filter that an attribute, or any part of a complex one, has a value (pr)."""
    parts = [(*attributes, sub) for sub in attributes[-1].sub_attributes if not sub.computed]
    return Or(tuple(map(present, parts))) if parts else Present(AttributePath(attributes))


def parse_literal(kind: str, text: str, column: int) -> Json:
    """Return the JSON value of a token; ScimError 400 invalidFilter if it is not a simple value."""
    with suppress(ValueError):
        literal = LITERAL.decode(text.lower() if kind == "name" else text)
        # An object such as {"a": 1} is an error token.
        if kind != "error" and not (isinstance(literal, str) and UNSTORABLE.search(literal)):
            return literal
    raise bad_filter(column, "a value: text in double quotes, a number, true, false or null", text)


def bind_comparison(attributes: Attributes | None, name: str, op: str, literal: Json) -> Filter:
    """Return the filter that compares an attribute with a literal; ScimError 400 invalidFilter."""
    if op == "ne":  # the opposite of eq, so it also matches resources that lack the attribute
        return Not(bind_comparison(attributes, name, "eq", literal))
    if not attributes:  # an attribute that is not in the schemas has no value (RFC 7644 §3.4.2.1)
        return NOTHING
    if value_attribute := attributes[-1].value_attribute:
        attributes = (*attributes, value_attribute)
    target, attribute = AttributePath(attributes), attributes[-1]
    check_comparison(attribute, name, op, literal)
    if literal is None:
        return Not(Present(target))
    try:  # a number need not be an Integer to compare with one
        value = (
            literal
            if attribute.type == "integer" and type(literal) in (int, float)
            else attribute.convert(literal)
        )
    except ScimError as error:
        raise invalid_filter(error.detail, reason=error.reason) from None
    return Compare(target, op, attribute.key(value), value)


def check_comparison(attribute: Attribute, name: str, op: str, literal: Json) -> None:
    """Raise ScimError 400 invalidFilter if an operator does not suit the type or null."""
    if attribute.type == "complex":
        raise invalid_filter(
            f"{name}: compare one of its sub-attributes: "
            + ", ".join(sub.name for sub in attribute.sub_attributes)
        )
    # Boolean and binary have no order (RFC 7644 table 3); only text has a beginning and an end.
    unordered = op in ("gt", "ge", "lt", "le") and attribute.type in ("boolean", "binary")
    not_text = op in ("co", "sw", "ew") and attribute.type not in STRING_TYPES
    if unordered or not_text or (literal is None and op != "eq"):
        raise invalid_filter(
            f"{name}: '{op}' cannot compare the type {attribute.type} with {quoted(literal)}"
        )


# -- Paths of PATCH ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PatchPath:
    """The path of a PATCH operation, such as emails[type eq "work"].value; () means no path."""

    attributes: Attributes  # (emails,)
    filter: Filter | None = None  # on its values: Compare(type, "eq", "work")
    sub_attribute: Attribute | None = None  # value

    @property
    def read_only_attribute(self) -> Attribute | None:
        """The first attribute of the path that no client may change, or None."""
        # Through a filter an immutable attribute may be sent if its value stays the same.
        return next(
            (
                attribute
                for attribute in (*self.attributes, self.sub_attribute)
                if attribute
                and (
                    attribute.computed
                    or attribute.mutability == "readOnly"
                    or (attribute.mutability == "immutable" and not self.filter)
                )
            ),
            None,
        )


# PATH = attrPath / valuePath [subAttr]
def parse_path(text: str, resource_type: ResourceType) -> PatchPath:
    """Return what a PATCH path means (RFC 7644 §3.5.2); ScimError invalidPath or invalidFilter."""
    if len(text) > MAX_FILTER_LENGTH:  # before resolve(): its cache must not fill with long paths
        raise invalid_path(f"path {quoted(text)}: longer than {MAX_FILTER_LENGTH} characters")
    name, bracket, _ = text.strip().partition("[")
    attributes = resolve(name, resource_type)
    if attributes is None or (bracket and not attributes):
        raise unknown_attribute(name, resource_type)
    if not bracket:
        return PatchPath(attributes)
    tokens = tokens_of(text)
    filter, position = parse_brackets(tokens, 1, attributes, name, 0, strict=True)
    kind, rest, _ = tokens[position]
    sub = attributes[-1].sub_attribute(rest[1:]) if kind == "sub" else None
    if tokens[position + 1 if sub else position][0] != "end":
        raise invalid_path(
            f"path {quoted(text)}: only a sub-attribute of {attributes[-1].path} can follow ']'"
        )
    return PatchPath(attributes, filter, sub)


def unknown_attribute(name: str, resource_type: ResourceType) -> ScimError:
    """Return the error for an unknown attribute; in an extension it lists the attributes."""
    scope, names = split_urn(name, resource_type) or (resource_type.root, [name])
    if scope is resource_type.root:
        return invalid_path(f"path {quoted(name)}: {resource_type.name} has no such attribute")
    wrong_name = ".".join(names)
    right_names = ", ".join(sub.name for sub in scope.sub_attributes) or "none"
    return invalid_path(
        f"path: {scope.name} has no attribute '{wrong_name}'; its attributes are: {right_names}",
        reason=("link_name", wrong_name[:80], right_names) if scope.name == FACILIO else (),
    )


# ----------------------------------------------------------------------------
# 4. Resources                                 RFC 7643 §2 and §3, RFC 7644 §3.9
#
# accept() makes a canonical resource from a client's JSON: names as in the schema,
# no nulls, no empty lists, values in their declared types. All other code trusts
# that a resource is canonical, and does not check again.
# project() chooses what a client sees of a resource; index_entries() what is indexed.
# Uses chapters 1 to 3. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------


def lowercase_keys(
    value: Json, expected: str = "the body must be a JSON object"
) -> dict[str, Json]:
    """Return a JSON object with its names in lower case; ScimError 400 if it is not an object."""
    if not isinstance(value, dict):
        raise invalid_syntax(f"{expected}, got {quoted(value)}")
    return {name.lower(): item for name, item in value.items()}


def accept(resource_type: ResourceType, body: Json) -> Resource:
    """Return the canonical resource for a client's JSON body; ScimError 400 if it is not valid."""
    if not isinstance(body, dict):
        raise invalid_syntax(f"the body must be a JSON object, got {quoted(body)}")
    return accept_complex(resource_type.root, body)


def accept_complex(attribute: Attribute, value: Mapping[str, Json]) -> Resource:
    """Return the canonical form of a complex value (or a resource); ScimError 400 invalidValue."""
    sent: dict[str, Json] = {}
    for name, item in value.items():
        sub = attribute.sub_attribute(name)
        # Read-only and unknown attributes are ignored: Entra and Okta send some of them.
        if (
            sub
            and sub.mutability in ("readWrite", "immutable")
            and not sub.computed
            and item is not None
        ):
            if sub.name in sent:
                raise invalid_value(f"{sub.path}: sent twice")
            sent[sub.name] = item
    accepted = {
        sub.name: item
        for sub in attribute.sub_attributes
        if sub.name in sent
        if (item := accept_value(sub, sent[sub.name])) is not None
    }
    require(attribute, accepted)
    return accepted


def accept_value(attribute: Attribute, value: Json) -> Json:
    """Return the canonical value of an attribute; ScimError 400 invalidValue.

    Return None for null, [] and {}, which mean that there is no value (RFC 7643 §2.5), and for ""
    if the attribute is not a String.
    """
    if not attribute.multi_valued:
        # [] means that there is no value, except for a custom field, which must not be a list.
        if value == [] and FACILIO not in attribute.path:
            return None
        return accept_single(attribute, unlisted(attribute, value))
    # OneLogin's template sends emails as one object.
    items = value if isinstance(value, list) else [value]
    accepted = [
        item for item in (accept_single(attribute, item) for item in items) if item is not None
    ]
    keep_one_primary(accepted)
    return accepted or None


def unlisted(attribute: Attribute, value: Json) -> Json:
    """Return the item of a list with one item, if it stands for a single complex value."""
    # Entra's tutorial sends the manager as a list.
    is_item = attribute.type == "complex" and isinstance(value, list) and len(value) == 1
    return value[0] if is_item else value


def accept_single(attribute: Attribute, value: Json) -> Json:
    """Return one canonical value, or None if it is empty; ScimError 400 invalidValue."""
    # Entra clears every type of attribute with "". A member that is "" is an error: to ignore it
    # could empty the group.
    if value is None or (
        value == ""
        and (attribute.type != "string" or attribute.identifies)
        and not attribute.is_membership
    ):
        return None
    if attribute.type == "complex":
        # A bare value stands for {"value": …}: managers by id, and Entra's roles as JSON text.
        if not isinstance(value, (dict, list)) and attribute.value_attribute:
            value = {"value": value}
        if isinstance(value, dict):
            return accept_complex(attribute, value) or None
    return attribute.convert(value)  # refuses a complex value that is not an object


def is_primary(value: Json) -> bool:
    """Return whether a value of a multi-valued attribute is its primary one."""
    return isinstance(value, dict) and value.get("primary") is True


def keep_one_primary(values: list[Json], previous: Json = None) -> None:
    """Keep one primary value: the last new one, else the previous one (RFC 7644 §3.5.2)."""
    new = [value for value in values if is_primary(value) and value is not previous]
    for value in filter(is_primary, values):
        if new and value is not new[-1]:
            value["primary"] = False


def require(attribute: Attribute, value: Mapping[str, Json]) -> None:
    """Check the required attributes, and the number of values, of a complex value (or a resource).

    Raise ScimError 400 invalidValue.
    """
    for sub in attribute.sub_attributes:
        if sub.required and not str(value.get(sub.name) or "").strip():
            raise invalid_value(
                f"{sub.path} is required and must not be empty", reason=("required", sub.path)
            )
        if sub.is_membership:
            for item in value.get(sub.name, ()):
                require(sub, item)
        elif sub.multi_valued and len(value.get(sub.name, ())) > MAX_VALUES:
            raise invalid_value(f"{sub.path}: more than {MAX_VALUES} values")


def defaults(resource_type: ResourceType) -> Resource:
    """Return the attributes that a new resource gets if the client does not send them."""
    return {
        sub.name: sub.default
        for sub in resource_type.root.sub_attributes
        if sub.default is not None
    }


def canonical(resource_type: ResourceType, resource: Resource) -> Resource:
    """Return a resource in the order of the schema, with its "schemas" up to date."""
    resource = {**resource, "schemas": schemas_of(resource_type, resource)}
    return {
        sub.name: resource[sub.name]
        for sub in resource_type.root.sub_attributes
        if sub.name in resource
    }


def schemas_of(resource_type: ResourceType, resource: Mapping[str, Json]) -> list[str]:
    """Return the URNs of the schemas that a resource has attributes of (RFC 7643 §3)."""
    return [
        resource_type.schema.id,
        *(schema.id for schema in resource_type.extensions if schema.id in resource),
    ]


# -- Projection ------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """Which attributes a client wants to see: those of attributes, without excludedAttributes."""

    wanted: frozenset[Attribute] | None = None  # None means all
    unwanted: frozenset[Attribute] = frozenset()
    parents: frozenset[Attribute] = frozenset()  # complex attributes that contain one of these

    def includes(self, attribute: Attribute) -> bool:
        """Return whether any part of a top-level attribute is selected."""
        return attribute not in self.unwanted and (
            self.wanted is None or attribute in self.wanted or attribute in self.parents
        )


@lru_cache(1024)
def parse_selection(attributes: str, excluded: str, resource_type: ResourceType) -> Selection:
    """Return the selection of the two query parameters (RFC 7644 §3.9); both may be empty.

    Each is a list of names with commas between them. Unknown names are ignored.
    """
    wanted, unwanted = (
        [path for name in names.split(",") if (path := resolve(name.strip(), resource_type))]
        for names in (attributes, excluded)
    )
    return Selection(
        frozenset(path[-1] for path in wanted) if attributes.strip() else None,
        frozenset(path[-1] for path in unwanted),
        frozenset(parent for path in (*wanted, *unwanted) for parent in path[:-1]),
    )


def select(attribute: Attribute, value: Resource, selection: Selection, whole: bool) -> Resource:
    """Return the selected part of a complex value (or a resource); whole means all is wanted."""
    selected = {}
    for name, item in value.items():
        sub = attribute.by_name[name.lower()]
        sub_whole = whole or sub in (selection.wanted or ())
        if sub.returned == "always":
            selected[name] = item
        elif sub in selection.parents and sub not in selection.unwanted:
            parts = [select(sub, part, selection, sub_whole) for part in sub.values(value)]
            if any(parts):
                selected[name] = list(filter(None, parts)) if sub.multi_valued else parts[0]
        elif sub_whole and sub not in selection.unwanted:
            selected[name] = item
    return selected


def memberships(resource: Resource, base_url: str) -> Resource:
    """Return the groups or members of a resource, with absolute URLs."""
    return {
        name: [{**item, "$ref": base_url + item["$ref"]} for item in resource[name]]
        for name in MEMBERSHIP_ATTRIBUTES
        if name in resource
    }


def project(
    resource_type: ResourceType, resource: Resource, selection: Selection, base_url: str
) -> Resource:
    """Return what a client sees of a resource, with absolute URLs that begin with base_url."""
    location = resource_type.location(base_url, resource["id"])
    resource = {
        **resource,
        "meta": {**resource["meta"], "location": location},
        **memberships(resource, base_url),
    }
    if selection.wanted is None and not selection.unwanted:
        return resource
    return select(resource_type.root, resource, selection, whole=selection.wanted is None)


# -- The index -------------------------------------------------------------------

Entry = tuple[str, str, int]  # path, key, element


def index_entries(
    attribute: Attribute, value: Mapping[str, Json], element: int = 0
) -> Iterator[Entry]:
    """Yield an entry for each value in a resource (or complex value), simple or complex."""
    for name, item in value.items():
        sub = attribute.by_name[name.lower()]
        # The primary value is number 0: sorting uses it (RFC 7644 §3.4.2.3).
        items: Iterable[tuple[int, Json]] = (
            enumerate(sorted(item, key=is_primary, reverse=True))
            if sub.multi_valued
            else [(element, item)]
        )
        for number, part in items:
            yield sub.index, sub.key(part), number
            if sub.type == "complex":
                yield from index_entries(sub, part, number)


# ----------------------------------------------------------------------------
# 5. PATCH                                                      RFC 7644 §3.5.2
#
# parse_operations() reads all operations of a request first: it finds the
# attributes of their paths and accepts their values. Then apply_patch() makes a
# new resource from the old one, with all operations or, after an error, none.
# Uses chapters 1 to 4. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """One PATCH operation: add, replace or remove.

    value is the accepted value; sent is the JSON value as the client sent it, None if it sent none.
    """

    op: str
    path: PatchPath
    value: Json = None
    sent: Json = None


def parse_operations(resource_type: ResourceType, body: Json) -> list[Operation]:
    """Return the operations of a PATCH body; ScimError 400.

    An object that is merged becomes one operation for each of its attributes. Operations in a row
    that add members, or remove members, become one operation. An empty list changes nothing:
    Entra's older validator sends one.
    """
    if not isinstance(items := lowercase_keys(body).get("operations"), list):
        raise invalid_syntax("Operations: expected a list of PATCH operations")
    return list(
        merge_consecutive(step for item in items for step in parse_operation(resource_type, item))
    )


def merge_consecutive(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Yield operations; those in a row that add members, or remove members, become one."""
    # Okta and Entra send one operation per member, with thousands in a request. If they were not
    # merged, each of them would go through all those members. Other lists have a primary value,
    # which is that of the last operation.
    for (op, path, is_list), run in itertools.groupby(
        operations,
        lambda step: (
            step.op,
            step.path,
            step.op != "replace"
            and step.path.attributes[0].is_membership
            and isinstance(step.value, list),
        ),
    ):
        steps = list(run)
        if is_list and len(steps) > 1:
            yield Operation(
                op,
                path,
                [value for step in steps for value in step.value],
                [
                    value
                    for step in steps
                    for value in (step.sent if isinstance(step.sent, list) else [step.sent])
                ],
            )
        else:
            yield from steps


def parse_operation(resource_type: ResourceType, item: Json) -> Iterator[Operation]:
    """Yield the operations that an item of Operations stands for; ScimError 400.

    The names in the item and its op may be in any case.
    """
    item = lowercase_keys(item, "Operations: expected objects")
    op, text, value = str(item.get("op")).lower(), item.get("path"), item.get("value")
    if op not in ("add", "replace", "remove"):
        raise invalid_syntax(f"op: expected add, replace or remove, got {quoted(item.get('op'))}")
    if op != "remove" and "value" not in item:
        raise invalid_value(f"{op} {text or 'without path'}: value is missing")
    if text is not None and not isinstance(text, str):
        raise invalid_path(f"path: expected text, got {quoted(text)}")
    path = parse_path(text, resource_type) if text else PatchPath(())
    yield from (
        # To replace an extension by its URN is to replace all of it.
        bind_operation(op, path, value, merge=op == "add" or ":" not in path.attributes[-1].name)
        if path.attributes
        else parse_pathless(resource_type, op, value)
    )


def parse_pathless(resource_type: ResourceType, op: str, value: Json) -> Iterator[Operation]:
    """Yield an operation for each name in the value of an operation without path; ScimError 400."""
    if op == "remove":
        raise ScimError(400, "noTarget", "remove without path: the path of an attribute is needed")
    if not isinstance(value, dict):
        raise invalid_value(f"{op} without path: expected an object, got {quoted(value)}")
    # With aadOptscim062020 Entra sends paths as names: "name.familyName", "URN:department".
    # Names that a body may not set (id, meta, unknown names) are ignored, as in a body: Okta sends
    # "id" when it renames a group. A misspelt custom field is an error, so that the administrator
    # sees it.
    for name, item in value.items():
        plain = name[:MAX_FILTER_LENGTH].partition("[")[0].strip()
        if resolve(plain, resource_type) is None and not split_urn(plain, resource_type):
            continue
        path = parse_path(name, resource_type)
        if not path.attributes:
            yield from parse_pathless(resource_type, op, item)
        elif path.attributes[0].mutability != "readOnly":
            yield from bind_operation(op, path, item, merge=True)


def bind_operation(op: str, path: PatchPath, value: Json, merge: bool) -> Iterator[Operation]:
    """Yield the operation on a path, with its value accepted; ScimError 400.

    With merge, an object becomes one operation for each of its sub-attributes, so that the other
    sub-attributes keep their values (RFC 7644 §3.5.2.1, §3.5.2.3).
    """
    if attribute := path.read_only_attribute:
        raise ScimError(400, "mutability", f"{attribute.path} is {attribute.mutability}")
    path, value = normal_form(op, path, value)
    attribute = path.attributes[-1]
    if (
        merge
        and isinstance(value, dict)
        and attribute.type == "complex"
        and not (attribute.multi_valued or path.filter)
    ):
        parts = lowercase_keys(value)
        # In the order of the schema: a new manager comes before the manager's displayName.
        for sub in attribute.sub_attributes:
            if (name := sub.name.lower()) in parts and sub.mutability != "readOnly":
                yield from bind_operation(
                    op, PatchPath((*path.attributes, sub)), parts[name], merge
                )
    else:
        yield Operation(op, path, accept_operand(path, value), value)


def normal_form(op: str, path: PatchPath, value: Json) -> tuple[PatchPath, Json]:
    """Return the path and value of an operation in the form that apply_operation() expects.

    Two spellings are translated. To remove members[value eq "x"] is to remove [{"value": "x"}]
    from members. Plain text for an object means its "value": a manager by id, or a new address for
    emails[type eq "work"]. A value is dropped if there is no list to remove it from.
    """
    match path:
        case PatchPath((members,), Compare(AttributePath((sub,)), "eq", _, id), None) if (
            op == "remove"
            and members.is_membership
            and sub is members.value_attribute
            and id == id.lower()  # an id in another case is compared with those of all members
        ):
            return PatchPath((members,)), [{"value": id}]
        case PatchPath((*_, holder), filter) if filter or not holder.multi_valued:
            value = None if op == "remove" else unlisted(holder, value)
            if (
                (value_attribute := holder.value_attribute)
                and not path.sub_attribute
                and not isinstance(value, (dict, list, type(None)))
            ):
                path = (
                    PatchPath(path.attributes, filter, value_attribute)
                    if filter
                    else PatchPath((*path.attributes, value_attribute))
                )
    return path, value


def accept_operand(path: PatchPath, value: Json) -> Json:
    """Return the canonical value of an operation on a path, or None; ScimError 400.

    For the values that a filter selects, it is an object with the parts to change, None for those
    to clear.
    """
    attribute = path.attributes[-1]
    if not path.filter:
        return None if attribute.mutability == "writeOnly" else accept_value(attribute, value)
    if not (path.sub_attribute or isinstance(value, dict)):
        return accept_single(attribute, value)
    sent = lowercase_keys({path.sub_attribute.name: value} if path.sub_attribute else value)
    return {
        sub.name: accept_value(sub, sent[sub.name.lower()])
        for sub in attribute.sub_attributes
        if sub.name.lower() in sent and not sub.computed
    }


def touched_member_ids(operations: Iterable[Operation]) -> set[str] | None:
    """Return the ids of the members that operations can change; None means any member.

    The directory reads these members only, so that a change costs the same in a large group.
    """
    changes = [step for step in operations if step.path.attributes[0].is_membership]
    return (
        {item["value"] for step in changes for item in step.value or ()}
        if all(
            step.path == PatchPath(step.path.attributes[:1])
            and step.op != "replace"
            and step.sent is not None
            for step in changes
        )
        else None
    )


def apply_patch(
    resource_type: ResourceType, resource: Resource, operations: Iterable[Operation]
) -> Resource:
    """Return a new resource, the old one after all operations; ScimError 400."""
    patched = copy.deepcopy(resource)
    with_value = [
        value
        for sub in resource_type.root.sub_attributes
        if sub.multi_valued and sub.value_attribute and not sub.is_membership
        for value in sub.values(patched)
        if value.get("value")
    ]
    for operation in operations:
        apply_operation(patched, operation)
    for value in with_value:
        # An e-mail that has lost its address is no e-mail any longer.
        if not value.get("value") and value.keys() <= {"value", "type", "primary"}:
            value.clear()
    patched = pruned(patched)
    if missing := [
        sub.path
        for sub in resource_type.root.sub_attributes
        if sub.required and sub.name not in patched
    ]:
        raise ScimError(
            400,
            "mutability",
            f"{missing[0]} is required and cannot be removed",
            reason=("required", missing[0]),
        )
    require(resource_type.root, patched)
    return canonical(resource_type, patched)


def apply_operation(resource: Resource, operation: Operation) -> None:
    """Change a resource by one operation; ScimError 400 noTarget."""
    path = operation.path
    first, attribute = path.attributes[0], path.attributes[-1]
    primary = next(filter(is_primary, first.values(resource)), None)
    holders = [resource]  # the objects with the attribute: the resource, or for example all e-mails
    for container in path.attributes[:-1]:
        for holder in holders:
            if operation.op != "remove" and not holder.get(container.name):
                holder[container.name] = [{}] if container.multi_valued else {}
        holders = [item for holder in holders for item in container.values(holder)]
    for holder in holders:
        if path.filter:
            change_selected(attribute, holder, operation, path.filter)
        else:
            change(attribute, holder, operation)
    keep_one_primary(first.values(resource), primary)


def change(attribute: Attribute, holder: Resource, operation: Operation) -> None:
    """Add, replace or remove an attribute in a resource or complex value."""
    if operation.op == "remove" and attribute.multi_valued and operation.sent is not None:
        # Entra without aadOptscim062020 sends the values to remove, members by their ids.
        holder[attribute.name] = without_values(
            attribute, attribute.values(holder), operation.value or []
        )
    elif operation.op == "add" and attribute.multi_valued:
        add_values(attribute, holder.setdefault(attribute.name, []), operation.value or [])
    else:
        if attribute.identifies and holder.get(attribute.name) != operation.value:
            holder.clear()
        if operation.value is None:
            holder.pop(attribute.name, None)
        else:
            holder[attribute.name] = copy.deepcopy(operation.value)


def without_values(attribute: Attribute, values: list[Json], removed: list[Json]) -> list[Json]:
    """Return the values of an attribute that are not among the removed ones.

    A removed value may lack sub-attributes: {"type": "work"} removes every work e-mail.
    """
    removed_keys = {identity_key(attribute, value) for value in removed} - {frozenset()}
    return [
        value
        for value in values
        if (key := identity_key(attribute, value)) not in removed_keys
        and (attribute.is_membership or not any(part <= key for part in removed_keys))
    ]


def add_values(attribute: Attribute, values: list[Json], added: list[Json]) -> None:
    """Append new values to a list; a value that is in the list already is updated instead."""
    key = partial(identity_key, attribute, adding=True)
    present: dict[Any, Resource] = {key(value): value for value in values}
    for value in copy.deepcopy(added):
        same = present.setdefault(key(value), value)
        same.update(value)
        if same is value:
            values.append(value)


def identity_key(
    attribute: Attribute, value: Resource, adding: bool = False
) -> frozenset[tuple[str, str]]:
    """Return a key that two values share if they count as the same, such as members by their id."""
    names = ["value"] if attribute.is_membership else [name for name in value if name != "primary"]
    if adding and "value" in value:  # RFC 7643 §2.4: one value for each type and value
        names = [name for name in names if name in ("type", "value")]
    return frozenset((name, attribute.by_name[name.lower()].key(value[name])) for name in names)


def change_selected(
    attribute: Attribute, holder: Resource, operation: Operation, filter: Filter
) -> None:
    """Change the values of an attribute that a filter selects; ScimError 400 noTarget."""
    values = attribute.values(holder)
    selected = [value for value in values if matches(filter, value)]
    # The id of a member in another case is accepted if it means one member only.
    if (
        not selected
        and attribute.is_membership
        and len(loosely := [value for value in values if matches(filter, value, str.lower)]) == 1
    ):
        selected = loosely
    for value in selected:
        change_value(attribute, value, operation, filter)
    if not selected and operation.value:
        values = [*values, new_value(attribute, operation, filter)]
    holder[attribute.name] = (
        [value for value in values if value] if attribute.multi_valued else (values or [{}])[0]
    )


def new_value(attribute: Attribute, operation: Operation, filter: Filter) -> Resource:
    """Return the value that an operation adds if a filter selects none; ScimError 400 noTarget."""
    if all(part in (None, "") for part in operation.value.values()):
        return {}  # to clear what is not there makes nothing
    # Entra sends replace on emails[type eq "work"].value when there is no work e-mail yet.
    # RFC 7644 §3.5.2.3 asks for noTarget; Entra's validator expects a new value. It is made from
    # labels only: to change somebody who is no member, or has no such role, must not grant it.
    value = equal_terms(filter)
    change_value(attribute, value, operation, filter)
    # A value that does not match the filter would be added again at each retry.
    if (
        attribute.is_membership
        or not set() < equal_terms(filter).keys() <= {"type", "primary", "display"}
        or not matches(filter, value)
    ):
        raise ScimError(400, "noTarget", f"{attribute.path}: no value matches the filter")
    return value


def change_value(
    attribute: Attribute, value: Resource, operation: Operation, filter: Filter
) -> None:
    """Change a selected value by an operation, or only the sub-attribute at the end of its path.

    ScimError 400 mutability for another value of an immutable part, such as the id of a member.
    """
    immutable = [sub.name for sub in attribute.sub_attributes if sub.mutability == "immutable"]
    before = {name: value[name] for name in immutable if name in value}
    if operation.op != "add" and not operation.path.sub_attribute:
        # A filter selects and does not write: what it says stays in the spelling that is stored.
        kept = {*equal_terms(filter), *immutable} if attribute.multi_valued else set(value)
        for name in value.keys() - (kept if operation.value is not None else ()):
            del value[name]
    for name, part in (operation.value or {}).items():
        change(attribute.by_name[name.lower()], value, replace(operation, value=part))
    if value and any(before.get(name) != value.get(name) for name in immutable):
        raise ScimError(400, "mutability", f"{attribute.path}: id and type cannot be changed")


def equal_terms(filter: Filter) -> Resource:
    """Return the sub-attributes that a filter requires to be equal to a value."""
    match filter:
        case Compare(AttributePath((sub,)), "eq", _, value):
            return {sub.name: value}
        case And(filters):
            return {name: value for inner in filters for name, value in equal_terms(inner).items()}
        case _:
            return {}


def pruned(value: Json) -> Json:
    """Return a JSON value without its empty objects and lists, which removals leave."""
    if isinstance(value, dict):
        return {
            name: inner for name, item in value.items() if (inner := pruned(item)) not in ({}, [])
        }
    if isinstance(value, list):
        return [item for item in map(pruned, value) if item != {}]
    return value


# ----------------------------------------------------------------------------
# 6. Queries                                                   RFC 7644 §3.4.2
#
# The filter tree as SQL: conditions, sorted halves and positions. Every filter
# uses the index: each term is a set of rows, `seq IN (SELECT …)`, one range of it.
# Uses chapters 1 to 4. Text and parameters only: no connection, no HTTP.
# ----------------------------------------------------------------------------

# What other rows tell is not stored as index entries: these make them, under the attributes' paths.
EACH = "seq, 0 AS element FROM resource"
# The first member or group is element 0: sorting uses it.
MEMBERS = (
    "group_seq AS seq, member_seq - (SELECT min(member_seq) FROM member AS other "
    "WHERE other.group_seq = member.group_seq) AS element FROM member"
)
GROUPS = (
    "member_seq AS seq, group_seq - (SELECT min(group_seq) FROM member AS other "
    "WHERE other.member_seq = member.member_seq) AS element FROM member"
)
DERIVED_ENTRIES = {
    "schemas": f"CASE type WHEN 'User' THEN '{USER}' ELSE '{GROUP}' END AS key, {EACH} UNION ALL "
    f"SELECT CASE path WHEN '{FACILIO.lower()}' THEN '{FACILIO}' ELSE '{ENTERPRISE}' END, seq, 1 "
    f"FROM value WHERE path IN ('{FACILIO.lower()}', '{ENTERPRISE.lower()}')",
    "id": f"id AS key, {EACH}",
    "meta": f"'1' AS key, {EACH}",
    "meta.resourcetype": f"type AS key, {EACH}",
    "members": f"'1' AS key, {MEMBERS}",
    "members.value": f"id AS key, {MEMBERS} JOIN resource ON resource.seq = member_seq",
    "members.type": f"lower(type) AS key, {MEMBERS} JOIN resource ON resource.seq = member_seq",
    "members.display": f"display_key AS key, {MEMBERS} WHERE display_key IS NOT NULL",
    "groups": f"'1' AS key, {GROUPS}",
    "groups.value": f"id AS key, {GROUPS} JOIN resource ON resource.seq = group_seq",
    "groups.type": f"'direct' AS key, {GROUPS}",
    "groups.display": f"key, {GROUPS} JOIN value ON value.seq = group_seq AND path = 'displayname'",
}
ORDER = ("ORDER BY missing, key, seq", "ORDER BY missing DESC, key DESC, seq DESC")  # of positions
COMPARISONS = {  # with a key for each mark; all but co and ew are one range of the index
    "eq": "key = ?",
    "gt": "key > ?",
    "ge": "key >= ?",
    "lt": "key < ?",
    "le": "key <= ?",
    "co": "instr(key, ?) > 0",
    "ew": "substr(key, -length(?), length(?)) = ?",
    "sw": "key >= ? AND key < ? || CAST(x'FF' AS TEXT)",  # no octet of UTF-8 is as great as FF
}
Sql = tuple[str, list[Any]]  # a condition and its parameters, in order
Filters = Mapping[str, Filter]  # by the types of the resources that they select
COLUMNS = {"resource": "seq", "entry": "seq, element"}  # by which a condition knows its rows


def compile_filter(filter: Filter, row: str = "resource") -> Sql:
    """Return a filter as an SQL condition on a row: a resource or, in a value path, an index entry."""
    match filter:
        case And(filters):
            return join_sql(" AND ", compile_terms(filters, row), "1 = 1")
        case Or(filters):
            return join_sql(" OR ", [compile_filter(inner, row) for inner in filters], "1 = 0")
        case Not(inner):
            sql, parameters = compile_filter(inner, row)
            return f"NOT ({sql})", parameters
        case ValuePath(target, inner):
            sql, parameters = compile_filter(inner, "entry")
            return rows(target, row, f"key = '1' AND {sql}", parameters)
        case Present(target):
            return rows(target, row, "key > ''", [])
        case Compare(target, op, key):
            return rows(target, row, COMPARISONS[op], [key] * COMPARISONS[op].count("?"))


def compile_terms(filters: Iterable[Filter], row: str) -> list[Sql]:
    """Return the terms of And, the narrowest first: a set of rows, in which equalities are probed."""
    # Another set would be made whole, be it of a million rows, before SQLite looks into it.
    terms = sorted(filters, key=width)
    narrow = bool(terms) and width(terms[0]) < 2
    return [
        probe(term, row) if narrow and number else compile_filter(term, row)
        for number, term in enumerate(terms)
    ]


def width(filter: Filter) -> int:
    """Return a guess at how many rows a filter finds: 0 a few, 1 a range of them, 2 most of them."""
    match filter:
        case Compare(AttributePath((*_, attribute)), "eq"):
            return 2 if attribute.type == "boolean" or attribute.canonical_values else 0
        case Compare():
            return 1
        case ValuePath(_, inner):
            return width(inner)
        case And(filters):
            return min(map(width, filters), default=2)
        case Or(filters):
            return max(map(width, filters), default=0)
        case _:
            return 2


def is_set(filter: Filter) -> bool:
    """Return whether all that a filter finds is in sets of rows, which no Not goes beyond."""
    match filter:
        case And(filters):
            return any(map(is_set, filters))
        case Or(filters):
            return all(map(is_set, filters))
        case _:
            return not isinstance(filter, Not)


def probe(filter: Filter, row: str) -> Sql:
    """Return an equality as a look-up for one row, another filter as it is."""
    match filter:
        case Compare(AttributePath((*_, attribute)), "eq", key) if (
            attribute.index not in DERIVED_ENTRIES
        ):
            same = " AND ".join(f"probe.{name} = {row}.{name}" for name in COLUMNS[row].split(", "))
            sql = f"EXISTS (SELECT 1 FROM value AS probe WHERE path = ? AND key = ? AND {same})"
            return sql, [attribute.index, key]
        case _:
            return compile_filter(filter, row)


def join_sql(word: str, compiled: Sequence[Sql], empty: str) -> Sql:
    """Return conditions joined by AND or OR, or what stands for none of them."""
    return (
        f"({word.join(sql for sql, _ in compiled) or empty})",
        [parameter for _, parameters in compiled for parameter in parameters],
    )


def rows(target: AttributePath, row: str, condition: str, parameters: list[Any]) -> Sql:
    """Return that a row is among the index entries of a target that meet a condition."""
    source, values = entries_of(target.attribute)
    return f"({COLUMNS[row]}) IN (SELECT {COLUMNS[row]} FROM {source} AND {condition})", [
        *values,
        *parameters,
    ]


def entries_of(attribute: Attribute) -> Sql:
    """Return the index entries of an attribute as what follows FROM, to which conditions are added."""
    if linked := DERIVED_ENTRIES.get(attribute.index):
        return f"(SELECT {linked}) AS entry WHERE 1 = 1", []
    return "value AS entry WHERE path = ?", [attribute.index]


class Sorting(NamedTuple):
    """What to order a query by (RFC 7644 §3.4.2.3)."""

    target: AttributePath
    descending: bool = False


class Position(NamedTuple):
    """Where a resource stands in a sorted query: those without a value (missing 1) come last."""

    missing: int
    key: str
    seq: int


@dataclass(frozen=True)
class Window:
    """The part of a query's resources to read: count, behind an offset or behind a position."""

    count: int
    offset: int = 0
    after: Position | None = None
    backward: bool = False  # towards the first resource; the page keeps the order of the query


def bound_sql(missing: int, columns: str, after: Position | None, descending: bool) -> Sql:
    """Return what keeps one half of a query, in the order of columns, behind a position."""
    if after is None or missing != after.missing:
        whole = after is None or (missing > after.missing) != descending
        return "1 = 1" if whole else "1 = 0", []
    values = [after.key, after.seq] if "key" in columns else [after.seq]
    return f"({columns}) {'<' if descending else '>'} ({', '.join('?' * len(values))})", values


# ----------------------------------------------------------------------------
# 7. Store
#
# One tenant's resources, memberships, employees and changes in one SQLite file.
# The only chapter that names a database module; it raises StoreError.
# Uses chapters 1 to 6. Knows nothing of HTTP and of JSON bodies.
# ----------------------------------------------------------------------------

MIGRATIONS = (  # the script at n makes a file of version n one of version n + 1
    """
    CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE resource (seq INTEGER PRIMARY KEY AUTOINCREMENT, type TEXT NOT NULL, id TEXT NOT NULL UNIQUE,
        body TEXT NOT NULL,           -- canonical JSON without schemas, id, meta and members
        hidden TEXT NOT NULL,         -- JSON: values of custom fields that are not configured now
        revision INTEGER NOT NULL, created TEXT NOT NULL, modified TEXT NOT NULL,
        member_count INTEGER NOT NULL);
    CREATE INDEX resource_type ON resource (type, seq);
    CREATE TABLE value (path TEXT NOT NULL, key TEXT NOT NULL, seq INTEGER NOT NULL, element INTEGER NOT NULL,
        PRIMARY KEY (path, key, seq, element)) WITHOUT ROWID;
    CREATE TABLE member (group_seq INTEGER NOT NULL, member_seq INTEGER NOT NULL,
        display TEXT, display_key TEXT,         -- as its client sent it, and the key
        PRIMARY KEY (group_seq, member_seq)) WITHOUT ROWID;
    CREATE INDEX member_groups ON member (member_seq, group_seq);
    """,
    """
    CREATE TABLE employee (id INTEGER PRIMARY KEY AUTOINCREMENT,
        user_id TEXT NOT NULL UNIQUE, -- of the SCIM user, the last one where it was deleted
        provisioned INTEGER NOT NULL, -- 0 when that user was deleted
        external_id TEXT NOT NULL,
        user_name TEXT NOT NULL,      -- as its key
        active INTEGER NOT NULL,
        manager_id TEXT NOT NULL,     -- the SCIM id of the manager, or ''
        changed TEXT NOT NULL, record TEXT NOT NULL);                -- JSON
    CREATE INDEX employee_external_id ON employee (external_id, provisioned);
    CREATE INDEX employee_user_name ON employee (user_name, provisioned);
    CREATE TABLE change (seq INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, kind TEXT NOT NULL,
        id TEXT NOT NULL,             -- of the user or group, or the number of the employee
        member TEXT NOT NULL,         -- of a membership
        token TEXT NOT NULL, attributes TEXT NOT NULL);              -- JSON, names
    CREATE INDEX change_at ON change (at);
    """,
    """
    CREATE TABLE tally (type TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO tally SELECT type, count(*) FROM resource GROUP BY type;
    """,
    """
    CREATE TABLE request (seq INTEGER PRIMARY KEY AUTOINCREMENT,
        level INTEGER NOT NULL,       -- 0 done, 1 done with a warning, 2 refused
        subject TEXT NOT NULL,        -- id of the user or group, or ''
        entry TEXT NOT NULL);         -- JSON
    CREATE INDEX change_id ON change (id);
    CREATE INDEX change_member ON change (member) WHERE member <> '';
    """,
    """
    DELETE FROM value WHERE path IN ('schemas', 'id', 'meta', 'meta.resourcetype');
    DROP INDEX change_at;
    CREATE INDEX employee_manager ON employee (manager_id) WHERE manager_id <> '';
    """,
)
BUSY_SECONDS = 5  # how long a write waits for that of another process
MAX_WRITES_PER_COMMIT = 64  # writes that share a commit
WRITER_CACHE = 8000  # KiB of pages that a writer keeps: a user is entries all over the index
WAL_PAGES = 4000  # written before they are copied: those that all creates change but once
READERS = 16  # connections that read at once; more would take turns anyway
POLL_SECONDS = 0.5  # how often a waiting reader looks for what other processes wrote
to_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode
DECODER = json.JSONDecoder()


class Encoded(str):
    """JSON text of a resource, which goes out as it is."""


def from_json(text: str) -> Json:
    """Return what dump() made text of."""
    return DECODER.raw_decode(text)[0]  # without a look for blanks around it


class StoreError(Exception):
    """A tenant's file cannot be used; the text says why and what to do."""


class Damaged(StoreError):
    """A file that SQLite cannot trust."""

    def __init__(self, path: str, finding: str) -> None:
        super().__init__(
            f"{path}: damaged ({finding}); put a backup in its place: "
            "python scim_server.py restore --tenant NAME FILE"
        )


def store_error(path: str, error: sqlite3.DatabaseError) -> StoreError:
    """Return the error of a file that SQLite cannot use now, or not at all."""
    if isinstance(error, sqlite3.OperationalError):
        return StoreError(f"{path}: cannot be used ({error})")
    return Damaged(path, str(error))


class Row(NamedTuple):
    """A stored resource, by the columns of its table: body and hidden are JSON text."""

    seq: int
    type: str
    id: str
    body: str
    hidden: str
    revision: int
    created: str
    modified: str
    member_count: int

    @property
    def attributes(self) -> Resource:
        """The body as a resource, read anew: canonical but for what is computed."""
        return from_json(self.body)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Change:
    """A row of the change feed; seq counts the changes of a tenant in the order of their commits."""

    seq: int
    at: str
    kind: str
    id: str  # of the user or group, or the number of the employee
    member: str  # the id of who joined or left a group
    token: str  # the name of the token that it was done with
    attributes: list[str]  # the names changed


class EmployeeRow(NamedTuple):
    """A stored employee, by the columns of its table, and the manager's employee id where known."""

    id: int
    user_id: str
    provisioned: bool  # as the database has it, 0 or 1
    external_id: str
    user_name: str
    active: bool  # this too
    manager_id: str
    changed: str
    record: Resource
    manager: int | None = None


NOBODY = EmployeeRow(0, "", False, "", "", False, "", "", {})  # of whom an employee is made


class Session:
    """What one transaction reads and writes; made by Store.reading() and Store.writing()."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.run = connection.execute
        self.run_many = connection.executemany

    def put(self, row: Row | EmployeeRow) -> int:
        """Store a row of its table, a new one where its number (the first column) is 0; return the number."""
        table = "resource" if isinstance(row, Row) else "employee"
        (key, number), *columns = [
            column for column in row._asdict().items() if column[0] != "manager"
        ]
        values = [to_json(value) if isinstance(value, dict) else value for _, value in columns]
        changes = ", ".join(f"{name} = excluded.{name}" for name, _ in columns)
        sql = f"INSERT INTO {table} VALUES (?{', ?' * len(values)}) ON CONFLICT ({key}) DO UPDATE SET {changes}"
        new = self.run(sql, [number or None, *values]).lastrowid
        return number or new or 0

    # -- Resources --

    def find(self, type: str, id: str) -> Row | None:
        """Return the resource of a type with an id, or None."""
        found = self.run("SELECT * FROM resource WHERE id = ? AND type = ?", [id, type]).fetchone()
        return Row(*found) if found else None

    def holding(self, text: str) -> list[Row]:
        """Return the resources in whose body or hidden values a text occurs."""
        sql = "SELECT * FROM resource WHERE instr(body, ?) OR hidden <> '{}'"
        return [Row(*found) for found in self.run(sql, [text])]

    def taken(self, type: str, path: str, key: str, seq: int) -> bool:
        """Return whether a resource of a type, other than that numbered seq, has a key at a path."""
        sql = (
            "SELECT 1 FROM value JOIN resource ON resource.seq = value.seq "
            "WHERE path = ? AND key = ? AND type = ? AND resource.seq <> ?"
        )
        return self.run(sql, [path, key, type, seq]).fetchone() is not None

    def save(self, row: Row, before: Iterable[Entry], after: Iterable[Entry]) -> int:
        """Store a resource, a new one where its seq is 0, and what differs in the index; return the seq."""
        seq = self.put(row)
        self._index(seq, before, after)
        if not row.seq:
            self._tally(row.type, 1)
        return seq

    def delete(self, row: Row, entries: Iterable[Entry]) -> None:
        """Remove a resource with its members."""
        self.run("DELETE FROM member WHERE group_seq = ?", [row.seq])
        self.run("DELETE FROM resource WHERE seq = ?", [row.seq])
        self._index(row.seq, entries, ())
        self._tally(row.type, -1)

    def _tally(self, type: str, by: int) -> None:
        self.run(
            "INSERT INTO tally VALUES (?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            [type, by],
        )

    def _index(self, seq: int, before: Iterable[Entry], after: Iterable[Entry]) -> None:
        old, new = set(before), set(after)
        self.run_many(
            "DELETE FROM value WHERE path = ? AND key = ? AND element = ? AND seq = ?",
            [(*entry, seq) for entry in old - new],
        )
        self.run_many(
            "INSERT INTO value (path, key, element, seq) VALUES (?, ?, ?, ?)",
            [(*entry, seq) for entry in new - old],
        )

    def total(self, filters: Filters) -> int:
        """Return how many resources match; filters has a filter for each type asked for."""
        if all(filter == EVERYTHING for filter in filters.values()):
            counts = dict(self.run("SELECT type, count FROM tally").fetchall())
            return sum(counts.get(type, 0) for type in filters)
        condition, parameters = self._condition(filters)
        return int(
            self.run(f"SELECT count(*) FROM resource WHERE {condition}", parameters).fetchone()[0]
        )

    def page(
        self, filters: Filters, sorting: Sorting | None, window: Window
    ) -> list[tuple[int, str, Row]]:
        """Return a window on what matches, and one more where there is; each behind missing and key of its position."""
        descending = (sorting is not None and sorting.descending) != window.backward
        flat = (
            not sorting and not window.offset
        )  # what is skipped is not worth a look at its resource
        sql, parameters = self._positions(
            sorting, window, descending, filters, "resource.*" if flat else "seq"
        )
        sql += " LIMIT ? OFFSET ?"
        if not flat:
            sql = f"SELECT missing, key, resource.* FROM ({sql}) JOIN resource USING (seq) {ORDER[descending]}"
        try:
            found = self.run(sql, [*parameters, window.count + 1, window.offset]).fetchall()
        except sqlite3.OperationalError as error:
            if "parser stack" in str(error) or "too large" in str(error):
                raise invalid_filter("filter: too many terms or brackets") from None
            raise
        return [
            (missing, key, Row(*row))
            for missing, key, *row in (found[::-1] if window.backward else found)
        ]

    def _condition(self, filters: Filters) -> Sql:
        # A + before a column keeps SQLite from its index: of a set it would walk the index of types instead.
        terms = [
            ("+" * is_set(filter), type, *compile_filter(filter))
            for type, filter in filters.items()
        ]
        return join_sql(
            " OR ",
            [(f"({plus}type = ? AND {sql})", [type, *found]) for plus, type, sql, found in terms],
            "1 = 0",
        )

    def _positions(
        self,
        sorting: Sorting | None,
        window: Window,
        descending: bool,
        filters: Filters,
        columns: str,
    ) -> Sql:
        # A sort is a walk along the index, then those without a value: they come last in ascending
        # order and first in descending order (§3.4.2.3). Behind a position the walk starts there.
        condition, parameters = self._condition(filters)
        missing, down = int(sorting is not None), " DESC" * descending
        bound, bounds = bound_sql(missing, "seq", window.after, descending)
        rest = f"SELECT {missing} AS missing, '' AS key, {columns} FROM resource WHERE {condition} AND {bound}"
        if not sorting:
            return f"{rest} ORDER BY seq{down}", [*parameters, *bounds]
        source, path = entries_of(sorting.target.attribute)
        walk, walk_bounds = bound_sql(0, "key, seq", window.after, descending)
        # A set is made once and asked at each step; of others each step asks the resource, up to the page's end.
        among = (
            f"seq IN (SELECT seq FROM resource WHERE {condition})"
            if all(map(is_set, filters.values()))
            else f"EXISTS (SELECT 1 FROM resource WHERE resource.seq = entry.seq AND {condition})"
        )
        keyed = f"SELECT 0 AS missing, key, seq FROM {source} AND element = 0 AND {walk} AND {among} ORDER BY key{down}"
        keyless = (
            f"{rest} AND seq NOT IN (SELECT seq FROM {source} AND element = 0) ORDER BY seq{down}"
        )
        limit = window.offset + window.count + 1
        halves = [
            (
                f"SELECT * FROM ({keyed}, seq{down} LIMIT ?)",
                [*path, *walk_bounds, *parameters, limit],
            ),
            (f"SELECT * FROM ({keyless} LIMIT ?)", [*parameters, *bounds, *path, limit]),
        ]
        (first, values), (second, others) = halves[::-1] if descending else halves
        return f"{first} UNION ALL {second}", [
            *values,
            *others,
        ]  # the second only where the first ends too early

    # -- Memberships --

    def members(self, group_seq: int, ids: Iterable[str] | None = None) -> list[Resource]:
        """Return the members of a group, all or those among ids, as canonical values with $ref."""
        sql = "SELECT id, type, display FROM member JOIN resource ON seq = member_seq WHERE group_seq = ?"
        if ids is None:
            found = self.run(f"{sql} ORDER BY member_seq", [group_seq]).fetchall()
        else:
            found = [
                row for id in sorted(ids) for row in self.run(f"{sql} AND id = ?", [group_seq, id])
            ]
        return [
            {"value": id, "$ref": f"/{type}s/{id}", "type": type}
            | ({} if display is None else {"display": display})
            for id, type, display in found
        ]

    def groups(self, seqs: Sequence[int]) -> dict[int, list[Resource]]:
        """Return the groups that each of some resources is a direct member of."""
        found: dict[int, list[Resource]] = {seq: [] for seq in seqs}
        sql = (
            f"SELECT member_seq, id, body FROM member JOIN resource ON resource.seq = group_seq "
            f"WHERE member_seq IN ({', '.join('?' * len(seqs))}) ORDER BY member_seq, group_seq"
        )
        for seq, id, body in self.run(sql, seqs):
            found[seq].append(
                {
                    "value": id,
                    "$ref": f"/Groups/{id}",
                    "display": from_json(body)["displayName"],
                    "type": "direct",
                }
            )
        return found

    def link(
        self, group_seq: int, members: Iterable[tuple[str, str | None]], display: Attribute
    ) -> list[str]:
        """Store members, ids with displays, that a group gained or whose display changed; return their ids."""
        # An id that no resource of the tenant has is passed over: one stranger in a push of many
        # must not lose the others, since Okta does not repeat a push that failed.
        sql = (
            "INSERT INTO member SELECT ?, seq, ?, ? FROM resource WHERE id = ? ON CONFLICT DO "
            "UPDATE SET display = excluded.display, display_key = excluded.display_key"
        )
        return [
            id
            for id, text in members
            if self.run(
                sql, [group_seq, text, None if text is None else display.key(text), id]
            ).rowcount
        ]

    def unlink(self, group_seq: int, ids: Iterable[str]) -> list[str]:
        """Remove members from a group and return the ids of those that were there."""
        sql = "DELETE FROM member WHERE group_seq = ? AND member_seq = (SELECT seq FROM resource WHERE id = ?)"
        return [id for id in ids if self.run(sql, [group_seq, id]).rowcount]

    # -- Employees --

    def employee_of(self, user_id: str) -> EmployeeRow | None:
        """Return the employee that a SCIM user is, or None."""
        return next(self._employees("user_id = ?", [user_id]), None)

    def former_employee(self, external_id: str, user_name: str) -> EmployeeRow | None:
        """Return the employee without a SCIM user that a person was; userName as its key."""
        # A userName is given out again; where both have an externalId, that alone tells who is who.
        newest = "AND provisioned = 0 ORDER BY id DESC LIMIT 1"
        by_id = self._employees(f"external_id = ? AND '' <> ? {newest}", [external_id, external_id])
        by_name = self._employees(
            f"user_name = ? AND '' IN (external_id, ?) {newest}", [user_name, external_id]
        )
        return next(itertools.chain(by_id, by_name), None)

    def employees(
        self, after: int, last: int, count: int, active: bool | None, since: str
    ) -> list[EmployeeRow]:
        """Return employees by their ids, behind one up to another, count at most; a time as its key."""
        return list(
            self._employees(
                "id > ? AND id <= ? AND ifnull(active = ?, 1) AND changed >= ? ORDER BY id LIMIT ?",
                [after, last, active, since, count],
            )
        )

    def follow_manager(self, before: str, after: str) -> None:
        """Let the reports of a manager have the SCIM id that is the manager's now."""
        self.run(
            "UPDATE employee SET manager_id = ? WHERE manager_id = ? AND manager_id <> ''",
            [after, before],
        )

    def _employees(self, condition: str, values: Sequence[Any]) -> Iterator[EmployeeRow]:
        sql = (
            "SELECT *, (SELECT id FROM employee AS boss WHERE boss.user_id = employee.manager_id) "
            f"FROM employee WHERE {condition}"
        )
        for *columns, record, manager in self.run(sql, values):
            yield EmployeeRow(*[*columns, from_json(record), manager])

    # -- Changes --

    def log(self, changes: Sequence[tuple[str, ...]], keep: int, older_than: str) -> None:
        """Append rows to the change feed, numbered here; forget those beyond so many, and those before a time."""
        self.run_many("INSERT INTO change VALUES (NULL, ?, ?, ?, ?, ?, ?)", changes)
        # Two for each that comes: whatever there is to forget, no write waits for it.
        self.run(
            "DELETE FROM change WHERE seq < (SELECT min(seq) FROM change) + ? AND "
            "(seq <= (SELECT max(seq) FROM change) - ? OR at < ?)",
            [2 * len(changes), keep, older_than],
        )

    def changes(self, after: int, count: int) -> list[Change]:
        """Return the changes behind one, as many as count."""
        return self._changes("seq > ? ORDER BY seq LIMIT ?", [after, count])

    def changes_about(self, id: str, employee: int, count: int) -> list[Change]:
        """Return the newest changes of a user or group and of an employee (0 for none)."""
        return self._changes(
            "seq IN (SELECT seq FROM change WHERE id = ? AND kind NOT LIKE 'employee.%' UNION ALL "
            "SELECT seq FROM change WHERE id = ? AND kind LIKE 'employee.%' UNION ALL "
            "SELECT seq FROM change WHERE member = ? AND member <> '') ORDER BY seq DESC LIMIT ?",
            [id, str(employee), id, count],
        )

    def _changes(self, condition: str, values: Sequence[Any]) -> list[Change]:
        found = self.run(f"SELECT * FROM change WHERE {condition}", values)
        return [Change(*[*columns, from_json(attributes)]) for *columns, attributes in found]

    def change_bounds(self) -> tuple[int, int]:
        """Return the number before the first change that is kept, and that of the last one made."""
        return self.run(
            "SELECT max(ifnull((SELECT min(seq) - 1 FROM change), seq), ifnull((SELECT "
            "CAST(value AS INTEGER) FROM setting WHERE name = 'feed_start'), 0)), seq "
            "FROM sqlite_sequence WHERE name = 'change'"
        ).fetchone() or (0, 0)

    # -- The provisioning log --

    def note_requests(self, rows: Iterable[tuple[int, str, Json]], keep: int) -> None:
        """Append entries, each behind its level and its subject, and keep so many of the newest."""
        self.run_many(
            "INSERT INTO request (level, subject, entry) VALUES (?, ?, ?)",
            [
                (level, subject, to_json(entry).encode("utf-8", "replace").decode())
                for level, subject, entry in rows
            ],
        )
        self.run("DELETE FROM request WHERE seq <= (SELECT max(seq) FROM request) - ?", [keep])

    def requests(
        self, after: int, before: int, count: int, level: int, subject: str, text: str
    ) -> list[Json]:
        """Return entries with their numbers, newest first: between two numbers, from a level on."""
        sql = (
            "SELECT seq, level, subject, entry FROM request WHERE seq > ? AND seq < ? AND level >= ? "
            "AND ? IN ('', subject) AND instr(lower(entry), lower(?)) ORDER BY seq DESC LIMIT ?"
        )
        return [
            {"seq": seq, "level": level, "subject": subject, **from_json(entry)}
            for seq, level, subject, entry in self.run(
                sql, [after, before, level, subject, text, count]
            )
        ]

    def unknown_ids(self, ids: Iterable[str]) -> list[str]:
        """Return those of some ids that no resource has."""
        return [
            id for id in ids if not self.run("SELECT 1 FROM resource WHERE id = ?", [id]).fetchone()
        ]

    # -- Settings --

    def numbers(self) -> dict[str, int]:
        """Return the last number that each table has given out."""
        return dict(self.run("SELECT name, seq FROM sqlite_sequence").fetchall())

    def number_on(self, given: Mapping[str, int]) -> None:
        """Give out no number again, and end the feed for all who followed it, even to its end (410)."""
        restored = self.numbers()
        last = {name: max(seq, restored.get(name, 0)) for name, seq in given.items()}
        last["change"] = last.get("change", 0) + 1
        self.run_many("DELETE FROM sqlite_sequence WHERE name = ?", [(name,) for name in last])
        self.run_many("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", last.items())
        self.set_setting("feed_start", str(last["change"]))

    def setting(self, name: str) -> str:
        """Return a stored setting, "" if it was never set."""
        found = self.run("SELECT value FROM setting WHERE name = ?", [name]).fetchone()
        return found[0] if found else ""

    def set_setting(self, name: str, value: str) -> None:
        """Store a setting."""
        self.run("INSERT OR REPLACE INTO setting VALUES (?, ?)", [name, value])


@dataclass
class Batch:
    """Writes that share a commit: how many, and how it ended."""

    size: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    error: sqlite3.Error | None = None


class Store:
    """One tenant's database: a file, or with ":memory:" one that is gone with the store.

    Safe from several threads. Readers see the last commit and wait for nobody; writers take turns.
    Raises StoreError if the file cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._writing = threading.RLock()
        self._owner = 0  # the thread that writes now
        self._waiting: list[int] = []  # threads that will write next
        self._batch = Batch()
        self.resting = self._closed = self._interrupted = False
        self._written = threading.Condition()
        self._idle: list[sqlite3.Connection] = []
        self._readers = threading.Semaphore(READERS)
        try:
            if self.path != ":memory:":
                # Personal data: for the owner of the process alone (SQLite copies the mode to WAL).
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            unclean = os.path.exists(f"{self.path}-wal") and os.path.getsize(
                f"{self.path}-wal"
            )  # none after a close
            self._writer = self._connect(writer=True)
            if (
                unclean
                and (found := self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok"
            ):
                raise Damaged(self.path, found)
            self._migrate()
        except sqlite3.DatabaseError as error:
            raise store_error(self.path, error) from error
        except OSError as error:
            raise StoreError(
                f"{self.path}: cannot be opened for writing ({error}); "
                "choose a directory that this user may write to"
            ) from error

    def _connect(self, writer: bool = False) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if writer:
            connection.execute(f"PRAGMA cache_size = -{WRITER_CACHE}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
            connection.execute(
                "PRAGMA temp_store = MEMORY"
            )  # a savepoint would make and remove a file
        return connection

    def _migrate(self) -> None:
        with self._transaction() as session:
            version = session.run("PRAGMA user_version").fetchone()[0]
            if version > len(MIGRATIONS):
                raise StoreError(
                    f"{self.path}: written by a newer scim_server (format {version}, "
                    f"this one knows {len(MIGRATIONS)}); run that version"
                )
            for statement in ";".join(MIGRATIONS[version:]).split(";"):
                session.run(statement)
            session.run(f"PRAGMA user_version = {len(MIGRATIONS)}")

    @contextmanager
    def _transaction(self, end: str = "COMMIT") -> Iterator[Session]:
        """Give a session in a transaction of its own, or in a step of the one that is open; end may be ""."""
        connection, begin, undo = self._writer, "BEGIN IMMEDIATE", ["ROLLBACK"]
        if connection.in_transaction:
            begin, end, undo = (
                "SAVEPOINT step",
                "RELEASE step",
                ["ROLLBACK TO step", "RELEASE step"],
            )
        connection.execute(begin)
        try:
            yield Session(connection)
            if end:
                connection.execute(end)
        except BaseException:
            if connection.in_transaction:
                for statement in undo:
                    connection.execute(statement)
            raise

    @contextmanager
    def writing(self, alone: bool = False) -> Iterator[Session]:
        """Give a session whose changes are on the disk when the block ends, or undone if it raises.

        Who waits for a turn joins the transaction of the one before, in a savepoint of its own, unless
        it comes alone: SQLite copies each page that a savepoint changes. The last one commits for all.
        Inside a write of the same thread (Bulk) it is a step of that one.
        """
        if self._owner == threading.get_ident():
            self._check_open()
            with self._transaction() as session:
                yield session
            return
        self._waiting.append(threading.get_ident())
        with self._writing:
            self._waiting.remove(threading.get_ident())
            if alone and not self._closed and self._writer.in_transaction:
                self._commit()  # after which a store that rests is closed
            if self._closed:
                self._writer, self._closed = self._connect(writer=True), False
            self._owner = threading.get_ident()
            try:
                if not self._writer.in_transaction:
                    self._batch = Batch()
                batch = self._batch
                batch.size += 1
                with self._transaction(end="") as session:
                    yield session
                    self._check_open()
            except sqlite3.Error as error:
                if not self._writer.in_transaction:  # SQLite gave up all of the batch
                    self._batch.error = error
                raise
            finally:
                self._owner = 0
                if (
                    not self._waiting
                    or self._batch.size >= MAX_WRITES_PER_COMMIT
                    or not self._writer.in_transaction
                ):
                    self._commit()
        batch.done.wait()
        if batch.error:
            raise sqlite3.OperationalError(str(batch.error)) from batch.error

    def _check_open(self) -> None:
        """Raise OperationalError where SQLite gave the transaction up, with all that was in it."""
        if not self._writer.in_transaction:
            raise sqlite3.OperationalError("an earlier step of the same write failed")

    def _commit(self) -> None:
        """End the batch; where that fails, all of it did."""
        try:
            if (
                not self._batch.error and self._writer.in_transaction
            ):  # it is not where the only write failed
                self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            self._batch.error = error
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        finally:
            self._batch.done.set()  # whatever happens, nobody waits for ever
        if self.resting:
            self._let_go()
        with self._written:
            self._written.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait for a write, or what another process may have written; return whether to go on."""
        with self._written:
            if not self._interrupted:
                self._written.wait(min(seconds, POLL_SECONDS))
            return not self._interrupted

    def interrupt(self) -> None:
        """End all waiting, for good."""
        with self._written:
            self._interrupted = True
            self._written.notify_all()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Give a session that sees one commit, whatever is written meanwhile."""
        if self.path == ":memory:":  # a database in memory belongs to its one connection
            with self._writing, self._transaction() as session:
                yield session
            return
        with self._readers:
            try:
                connection = self._idle.pop()  # without a look first: others take them too
            except IndexError:
                connection = self._connect()
            try:
                connection.execute("BEGIN")
                yield Session(connection)
            finally:
                connection.rollback()  # of what was only read
                self._idle.append(connection)
                if self.resting:
                    self._let_go()

    def backup(self, path: str) -> None:
        """Write a copy of one commit to a new file, while others read and write; StoreError."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            with closing(self._connect()) as source, closing(sqlite3.connect(path)) as copy_of_it:
                source.backup(copy_of_it)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"{path}: cannot be written ({error}); name a new file for the backup"
            ) from error

    def restore(self, path: str, tenant: str) -> None:
        """Become what a backup of a tenant holds, all or nothing; StoreError for another file."""
        # A backup may lie where nothing can be written, which SQLite believes when told.
        mode = "mode=ro" if os.path.exists(f"{path}-wal") else "immutable=1"
        try:
            with (
                closing(
                    sqlite3.connect(
                        f"{Path(path).resolve().as_uri()}?{mode}", uri=True, isolation_level=None
                    )
                ) as source,
                self._writing,
            ):
                if (found := source.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                    raise StoreError(f"{path}: damaged ({found}); choose another backup")
                if not 0 < source.execute("PRAGMA user_version").fetchone()[0] <= len(MIGRATIONS):
                    raise StoreError(f"{path}: not a backup that this scim_server knows")
                caller = Session(source).setting("tenant")
                if caller not in ("", tenant):
                    raise StoreError(f"{path}: is a backup of tenant {caller}, not of {tenant}")
                given = Session(self._writer).numbers()
                source.backup(self._writer)
                self._migrate()
                with self._transaction() as session:
                    session.number_on(given)
        except sqlite3.Error as error:
            raise StoreError(f"{path}: cannot be restored to {self.path} ({error})") from error

    def rest(self) -> None:
        """Close the file's handles, now and after each use, until resting is false again."""
        self.resting = True
        self._let_go()

    def _let_go(self) -> None:
        if self.path != ":memory:" and self._writing.acquire(blocking=False):
            try:
                if not self._closed and not self._writer.in_transaction:
                    self._writer.close()
                    self._closed = True
                with suppress(IndexError):  # not by a look first: readers take them too
                    while True:
                        self._idle.pop().close()
            finally:
                self._writing.release()

    def close(self) -> None:
        """Close the file; nobody may use the store afterwards."""
        with self._writing:
            if not self._closed and self._writer.in_transaction:  # of writes that wait for company
                self._commit()
            for connection in (*self._idle, self._writer):
                connection.close()


# ----------------------------------------------------------------------------
# 8. Employees
#
# What the sync is for: the employee of Facilio that a SCIM user is, each field
# with the SCIM paths that it is made of, and its table form.
# Uses chapters 1 to 4. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------


def made_of(*choices: str) -> dict[str, list[list[PatchPath]]]:
    """Return of which paths in a user a field is made: the first choice with a value counts, "+" puts a blank."""
    user_type = resource_types(())["User"]
    return {
        "choices": [
            [parse_path(path, user_type) for path in choice.split("+")] for choice in choices
        ]
    }


@dataclass(frozen=True)
class Employee:
    """An employee of Facilio; text that is unknown is ""."""

    id: int  # stays the same for a person for ever
    user_id: str  # the SCIM id
    external_id: str
    active: bool
    name: str = field(
        metadata=made_of(
            "displayName", "name.formatted", "name.givenName+name.familyName", "userName"
        )
    )
    email: str = field(
        metadata=made_of(
            "emails[primary eq true].value", 'emails[type eq "work"].value', "userName"
        )
    )
    phone: str = field(metadata=made_of('phoneNumbers[type eq "work"].value'))
    mobile: str = field(metadata=made_of('phoneNumbers[type eq "mobile"].value'))
    designation: str = field(metadata=made_of("title"))
    department: str = field(metadata=made_of(f"{ENTERPRISE}:department"))
    employeeNumber: str = field(metadata=made_of(f"{ENTERPRISE}:employeeNumber"))
    costCenter: str = field(metadata=made_of(f"{ENTERPRISE}:costCenter"))
    organization: str = field(metadata=made_of(f"{ENTERPRISE}:organization"))
    division: str = field(metadata=made_of(f"{ENTERPRISE}:division"))
    language: str = field(metadata=made_of("preferredLanguage"))
    locale: str = field(metadata=made_of("locale"))
    timezone: str = field(metadata=made_of("timezone"))
    manager: int | None  # the manager's employee id where known
    changed: str  # time of the last change, a dateTime in UTC
    custom_fields: dict[str, Json]  # values by link name


CHOICES = {found.name: found.metadata["choices"] for found in fields(Employee) if found.metadata}


def employee_record(user: Resource) -> Resource:
    """Return what an employee record says of a user, by the names of Employee."""
    record: Resource = {}
    for name, choices in CHOICES.items():
        texts = (
            " ".join(filter(None, (text_at(path, user) for path in paths))) for paths in choices
        )
        record[name] = next(filter(None, texts), "")
    return record | {"custom_fields": dict(user.get(FACILIO, {}))}


def text_at(path: PatchPath, resource: Resource) -> str:
    """Return the first text at a path in a resource, "" if there is none."""
    for item in AttributePath(path.attributes).items(resource):
        text = item.get(path.sub_attribute.name) if path.sub_attribute else item
        if text and (not path.filter or matches(path.filter, item)):
            return str(text)
    return ""


def employee_table(employees: Iterable[Employee], link_names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the header and a row of texts for each employee, the custom fields as last columns."""
    columns = [found.name for found in fields(Employee) if found.name != "custom_fields"]
    yield columns + [f"custom_fields.{name}" if name in columns else name for name in link_names]
    for employee in employees:
        values = [getattr(employee, name) for name in columns]
        values += [employee.custom_fields.get(name) for name in link_names]
        yield [
            "" if value is None else value if isinstance(value, str) else json.dumps(value)
            for value in values
        ]


def employee_csv(table: Iterable[list[str]]) -> Iterator[str]:
    """Yield the lines of a table as CSV (RFC 4180)."""
    for row in table:
        line = io.StringIO()
        # A spreadsheet runs a cell that starts like a formula; behind an apostrophe it is text.
        csv.writer(line).writerow(
            f"'{cell}"
            if cell[:1] in tuple("=+-@\t\r") and not re.fullmatch(r"-?\d+", cell)
            else cell
            for cell in row
        )
        yield line.getvalue()


# ----------------------------------------------------------------------------
# 9. Directory                                                   RFC 7644 §3
#
# One tenant's SCIM operations, a transaction each. Takes and gives canonical
# resources; the clock and the maker of ids are arguments.
# Uses chapters 1 to 7. Knows nothing of HTTP.
# ----------------------------------------------------------------------------

KEEP_CHANGES = 1_000_000
KEEP_DAYS = 90
KEEP_LOG = 10_000
KINDS = {str: "string", int: "integer", bool: "boolean"}  # the types of custom fields' values
CHANGED_SINCE = Attribute("changed_since", "dateTime").with_paths()
WHOLE = Selection()


class Page(NamedTuple):
    """The answer to a query: how many resources match in all, and those of the window asked for."""

    total_results: (
        int | None
    )  # None behind a position: counting again would cost more than the page
    resources: list[Any]
    first: Position | None = None  # where the page begins
    last: Position | None = None  # where it ends
    more: bool = False  # whether resources follow on its far side


class Precondition(NamedTuple):
    """What a client makes of a version (RFC 7644 §3.14): If-Match and If-None-Match, "" if absent."""

    if_match: str = ""
    if_none_match: str = ""

    def excludes(self, version: str) -> bool:
        """Return whether If-None-Match names a version."""
        return self._names(self.if_none_match, version)

    def check(self, version: str) -> None:
        """Raise ScimError 412 where a write must not happen on this version."""
        if self.if_match and not self._names(self.if_match, version):
            raise ScimError(412, "", f"If-Match: the version is now {version}; read it again")
        if self.excludes(version):
            raise ScimError(412, "", f"If-None-Match: the version is {version}")

    def _names(self, listed: str, version: str) -> bool:
        # Versions are weak, and compare as such: RFC 7644 uses them with If-Match all the same.
        tags = [tag.strip().removeprefix("W/") for tag in listed.split(",")]
        return "*" in tags or version.removeprefix("W/") in tags


ALWAYS = Precondition()
Clock = Callable[[], datetime]
utc_now: Clock = partial(datetime.now, UTC)


def random_id() -> str:
    """Return a new resource id."""
    return str(uuid.uuid4())


class Directory:
    """One tenant's users, groups and employees, without any HTTP. Safe from several threads.

    A resource type is one of resource_types or its name; bodies and resources are JSON objects. Operations
    raise ScimError 404 for an id that no resource of the type has, 400 as accept and parse_operations do,
    409 uniqueness for a userName or group displayName that is taken, and 412 for a condition that does not
    hold. cursor_key is a secret of the store for signing cursors. keep is how many changes the feed holds,
    keep_days for how long. StoreError for a store that cannot be used.
    """

    def __init__(
        self,
        store: Store,
        custom_fields: Sequence[CustomField] = (),
        clock: Clock = utc_now,
        new_id: Callable[[], str] = random_id,
        keep: int = KEEP_CHANGES,
        keep_days: int = KEEP_DAYS,
    ) -> None:
        self.store, self.clock, self.new_id, self.token = store, clock, new_id, ""
        self.keep, self.keep_days = keep, keep_days
        self.custom_fields = tuple(custom_fields)
        self.resource_types = resource_types(self.custom_fields)
        self._kinds = {custom.link_name: custom.type.lower() for custom in self.custom_fields}
        self.link_names = list(self._kinds)
        try:
            with store.writing() as session:
                if not session.setting("cursor_key"):
                    session.set_setting("cursor_key", secrets.token_hex(32))
                self.cursor_key = bytes.fromhex(session.setting("cursor_key"))
                self._adopt_custom_fields(session)
                self._adopt_users(session)
        except sqlite3.DatabaseError as error:
            raise store_error(store.path, error) from error

    @classmethod
    def as_stored(cls, store: Store) -> Directory:
        """Return a directory to read from, with the custom fields that its server has given it."""
        with store.reading() as session:
            known = json.loads(session.setting("custom_fields") or "[]")
        return cls(store, tuple(CustomField(*one) for one in known))

    def claim(self, tenant: str) -> None:
        """Note whose store this is; StoreError where it is another tenant's."""
        with self.store.writing() as session:
            caller = session.setting("tenant")
            if caller not in ("", tenant):
                raise StoreError(
                    f"{self.store.path}: is the file of tenant {caller}, not of {tenant}"
                )
            if not caller:
                session.set_setting("tenant", tenant)

    def on_behalf_of(self, token: str) -> Directory:
        """Return this directory with the name of the token whose changes it makes."""
        view = Directory.__new__(Directory)
        vars(view).update(vars(self), token=token)
        return view

    def create(self, type: ResourceType | str, body: Json) -> Resource:
        """Store a new resource and return it (RFC 7644 §3.3)."""
        resource_type = self._type(type)
        accepted = accept(resource_type, body)
        accepted.update(defaults(resource_type) | accepted)
        now = time_text(self.clock())
        row = Row(
            0, resource_type.name, self.new_id(), to_json(stored(accepted)), "{}", 1, now, now, 0
        )
        with self.store.writing() as session:
            self._check_unique(session, row, accepted)
            row = row._replace(seq=session.save(row, (), row_entries(resource_type, row)))
            self._record(session, row, {}, accepted)
            if count := self._link(session, row, {}, accepted)[0]:
                row = row._replace(member_count=count)
                session.put(row)
            return self._complete(session, row)

    def get(self, type: ResourceType | str, id: str, selection: Selection = WHOLE) -> Resource:
        """Return a resource (RFC 7644 §3.4.1), with its members only where they are selected."""
        with self.store.reading() as session:
            return self._complete(session, self._find(session, type, id), selection)

    def query(
        self,
        type: ResourceType | str,
        filter: Filter | str = EVERYTHING,
        sorting: Sorting | None = None,
        start_index: int = 1,
        count: int = DEFAULT_COUNT,
        selection: Selection = WHOLE,
    ) -> Page:
        """Return the count resources of a type that match, from the 1-based start_index.

        Without sorting the order is that of creation, so that paging sees each resource once
        (RFC 7644 §3.4.2). A filter as text raises ScimError 400 invalidFilter.
        """
        resource_type = self._type(type)
        if isinstance(filter, str):
            filter = parse_filter(filter, resource_type)
        window = Window(max(count, 0), max(start_index, 1) - 1)
        return self.search({resource_type.name: (filter, selection)}, sorting, window)

    def search(
        self,
        asked: Mapping[str, tuple[Filter, Selection]],
        sorting: Sorting | None,
        window: Window,
        base_url: str = "",
    ) -> Page:
        """Return a window on what matches of several types, each with its filter (RFC 7644 §3.4.2.1)."""
        # With a base_url, what is wanted whole is Encoded, as project() shows it to a client.
        filters = {name: filter for name, (filter, _) in asked.items()}
        as_it_lies = {
            name for name, (_, selection) in asked.items() if base_url and selection == WHOLE
        }
        with self.store.reading() as session:
            found = session.page(filters, sorting, window)
            total = None if window.after else len(found) + window.offset
            if more := len(found) > window.count:
                del found[0 if window.backward else -1]
            if total is not None and (more or (window.offset and not found)):
                total = session.total(filters)  # where the page does not tell
            rows = [self._fitted(row) for *_, row in found]
            groups = session.groups([row.seq for row in rows if row.type == "User"])
            resources = [
                self._encoded(session, row, groups, base_url)
                if row.type in as_it_lies
                else self._complete(session, row, asked[row.type][1], groups=groups)
                for row in rows
            ]
        ends = [Position(missing, key, row.seq) for missing, key, row in found[:1] + found[-1:]]
        first, last = ends or (None, None)
        return Page(total, resources, first, last, more)

    def replace(
        self, type: ResourceType | str, id: str, body: Json, condition: Precondition = ALWAYS
    ) -> Resource:
        """Store a resource in place of what was there and return it (RFC 7644 §3.5.1)."""
        resource_type = self._type(type)
        accepted = accept(resource_type, body)
        with self.store.writing() as session:
            row = self._find(session, type, id, writing=True)
            before = self._complete(session, row)
            condition.check(before["meta"]["version"])
            # Okta leaves out active when it changes other attributes: that must not reactivate.
            kept = {name: before[name] for name in defaults(resource_type) if name in before}
            accepted.update(kept | accepted)
            return self._complete(
                session, self._save(session, row, before, accepted, members_replaced=True)
            )

    def patch(
        self,
        type: ResourceType | str,
        id: str,
        body: Json,
        condition: Precondition = ALWAYS,
        selection: Selection = WHOLE,
    ) -> Resource | None:
        """Store what PATCH makes of a resource (RFC 7644 §3.5.2); return it, None for a group too large to answer."""
        resource_type = self._type(type)
        operations = parse_operations(resource_type, body)
        named = touched_member_ids(operations)
        with self.store.writing() as session:
            row = self._find(session, type, id, writing=True)
            before = self._complete(session, row, named=named)
            condition.check(before["meta"]["version"])
            after = apply_patch(resource_type, before, operations)
            row = self._save(
                session,
                row,
                before,
                after,
                members_replaced=any(
                    step.op == "replace" and step.path == PatchPath(step.path.attributes[:1])
                    for step in operations
                    if step.path.attributes[0].is_membership
                ),
            )
            # Where some of its attributes are selected, RFC 7644 asks for them, be it large or not.
            if row.member_count > MAX_ANSWERED_MEMBERS and selection.wanted is None:
                return None
            return self._complete(session, row, selection)

    def delete(self, type: ResourceType | str, id: str, condition: Precondition = ALWAYS) -> None:
        """Remove a resource and its memberships (RFC 7644 §3.6)."""
        with self.store.writing() as session:
            row = self._find(session, type, id, writing=True)
            before = self._complete(session, row, named=())
            condition.check(before["meta"]["version"])
            for group in session.groups([row.seq])[row.seq]:
                holder = self._find(session, "Group", group["value"])
                session.unlink(holder.seq, [id])
                self._log(session, "member.removed", holder.id, [id])
                self._touch(session, holder, holder.body, holder.member_count - 1)
            self._log(
                session, "member.removed", id, [one["value"] for one in session.members(row.seq)]
            )
            session.delete(row, row_entries(self._type(type), row))
            self._record(session, row, before, {})

    def seed(self, source: Resource | str | os.PathLike[str]) -> dict[str, str]:
        """Create users and groups as {"Users": [body, …], "Groups": [body, …]} lists them, or a file of it.

        Members may be given by userName or displayName, as {"value": name} or the name alone. Returns
        the ids by name.
        """
        document = (
            source if isinstance(source, dict) else json.loads(Path(source).read_text("utf-8"))
        )
        ids: dict[str, str] = {}
        with self.store.writing():
            for body in document.get("Users", ()):
                made = self.create("User", body)
                ids[made["userName"]] = made["id"]
            for body in document.get("Groups", ()):
                given = [
                    one if isinstance(one, dict) else {"value": one}
                    for one in body.get("members", ())
                ]
                members = [{**one, "value": ids.get(one["value"], one["value"])} for one in given]
                made = self.create("Group", {**body, "members": members})
                if len(made.get("members", ())) < len({one["value"] for one in members}):
                    raise invalid_value(
                        f"members of {made['displayName']}: some are nobody's names or ids"
                    )
                ids[made["displayName"]] = made["id"]
        return ids

    def last_use(self, token: str) -> str:
        """Return when a token was used last, as a dateTime; "" for never."""
        with self.store.reading() as session:
            return session.setting(f"used {token}")

    # -- Employees and changes --

    def employees(
        self,
        active: bool | None = None,
        changed_since: str = "",
        id: int | None = None,
        after: int = 0,
    ) -> Iterator[Employee]:
        """Yield employees by their ids, those behind one: active or not, changed since a dateTime.

        Raises ScimError 400 invalidValue for a changed_since that is no dateTime.
        """
        since = changed_since and CHANGED_SINCE.key(CHANGED_SINCE.convert(changed_since))
        after, last = (after, 2**62) if id is None else (max(after, id - 1), id)
        while found := self._read(
            partial(
                Session.employees,
                after=after,
                last=last,
                count=DEFAULT_COUNT,
                active=active,
                since=since,
            )
        ):
            for row in found:
                yield Employee(
                    id=row.id,
                    user_id=row.user_id,
                    external_id=row.external_id,
                    active=bool(row.active),
                    manager=row.manager,
                    changed=row.changed,
                    **row.record,
                )
            after = found[-1].id

    def changes(self, after: int = 0, wait: float = 0, count: int = MAX_COUNT) -> list[Change]:
        """Return the changes behind a number, as many as count; wait seconds where there is none.

        Raises ScimError 410 where the feed no longer has them: its detail says where to start.
        """

        def read(session: Session) -> list[Change]:
            first, last = session.change_bounds()
            if not first <= after <= last:
                raise ScimError(
                    410,
                    "",
                    f"after={after}: the feed holds the changes behind {first}, up to "
                    f"{last}; read all employees, then start again with after={last}",
                )
            return session.changes(after, count)

        return self._read(read, wait)

    def requests(
        self,
        after: int = 0,
        before: int = 0,
        count: int = DEFAULT_COUNT,
        level: int = 0,
        subject: str = "",
        text: str = "",
        wait: float = 0,
    ) -> list[Json]:
        """Return entries of the provisioning log, newest first; wait seconds where there is none.

        before is 0 for the end; level 0 is all, 1 warnings and refusals, 2 refusals; text is in an entry.
        """
        return self._read(
            lambda session: session.requests(after, before or 2**62, count, level, subject, text),
            wait,
        )

    def _read(self, read: Callable[[Session], list[Any]], wait: float = 0) -> list[Any]:
        """Return what is read, again and again for so many seconds while there is nothing."""
        end = time.monotonic() + wait
        while True:
            with self.store.reading() as session:
                found = read(session)
            left = end - time.monotonic()
            if found or left <= 0 or not self.store.wait(left):
                return found

    def history(self, id: str) -> tuple[Employee | None, list[Change]]:
        """Return the employee that a user is or was, and the newest changes of a user or group."""
        with self.store.reading() as session:
            row = session.employee_of(id)
            changes = session.changes_about(id, row.id if row else 0, DEFAULT_COUNT)
        return next(self.employees(id=row.id), None) if row else None, changes

    def on_change(self, callback: Callable[[Change], None]) -> threading.Thread:
        """Call back with each change from now on, in order, after its commit; returns the thread.

        What the callback raises is printed and harms nobody. The thread ends with the store.
        """

        def follow(after: int) -> None:
            """Hand on what comes behind a change."""
            while self.store.wait(0):
                try:
                    found = self.changes(after, MAX_WAIT)
                except ScimError:  # a slow callback: what the feed has forgotten is passed over
                    with self.store.reading() as session:
                        after, found = session.change_bounds()[0], []
                except sqlite3.OperationalError:  # the file fails for a while
                    traceback.print_exc()
                    self.store.wait(POLL_SECONDS)
                    continue
                for change in found:
                    after = change.seq
                    try:
                        callback(change)
                    except Exception:  # noqa: BLE001  somebody else's code
                        traceback.print_exc()

        with self.store.reading() as session:
            _, after = session.change_bounds()
        thread = threading.Thread(target=follow, args=(after,), daemon=True)
        thread.start()
        return thread

    def _record(self, session: Session, row: Row, before: Resource, after: Resource) -> None:
        """Note that a resource became another ({} is none), and make its employee follow."""
        self._log(
            session,
            f"{row.type.lower()}.{change_verb(before, after)}",
            row.id,
            attributes=changed_names(self.resource_types[row.type].root, before, after),
        )
        if row.type == "User":
            self._employ(session, row.id, after)

    def _employ(self, session: Session, user_id: str, user: Resource) -> None:
        """Make the employee of a user follow; {} is the user that is no more, whose employee remains."""
        now = time_text(self.clock())
        before = session.employee_of(user_id) or NOBODY
        after = before._replace(provisioned=False, active=False, changed=now)
        if user:
            external_id = user.get("externalId", "")
            key = self.resource_types["User"].root.by_name["username"].key(user["userName"])
            before = before if before.id else session.former_employee(external_id, key) or NOBODY
            active = user.get(
                "active", before.active or before is NOBODY
            )  # taken away, it tells nothing
            manager = user.get(ENTERPRISE, {}).get("manager", {}).get("value", "")
            after = EmployeeRow(
                before.id,
                user_id,
                True,
                external_id,
                key,
                active,
                manager,
                now,
                employee_record(user),
            )
        if before._replace(changed=now, manager=after.manager) == after:
            return
        id = session.put(after)
        if before.user_id not in ("", user_id):  # who comes back has the same reports
            session.follow_manager(before.user_id, user_id)
        old, new = (
            {
                **row.record,
                "active": row.active,
                "external_id": row.external_id,
                "user_id": row.user_id,
                "manager": row.manager_id,
            }
            for row in (before, after)
        )
        if names := [name for name in new if (new[name] or "") != (old.get(name) or "")]:
            self._log(
                session,
                f"employee.{change_verb(old if before.id else {}, new)}",
                str(id),
                attributes=names,
            )

    def _log(
        self,
        session: Session,
        kind: str,
        id: str,
        members: Iterable[str] = ("",),
        attributes: Sequence[str] = (),
    ) -> None:
        """Append to the change feed, a row for each member, and forget the oldest."""
        now, names = self.clock(), to_json(attributes)
        session.log(
            [(time_text(now), kind, id, member, self.token, names) for member in members],
            self.keep,
            time_text(now - timedelta(days=self.keep_days)),
        )

    # -- Helpers --

    def _type(self, type: ResourceType | str) -> ResourceType:
        if isinstance(type, str) and type not in self.resource_types:
            raise ScimError(
                404,
                "",
                f"{quoted(type)} is no resource type; there are {', '.join(self.resource_types)}",
            )
        return self.resource_types[type] if isinstance(type, str) else type

    def _find(
        self, session: Session, type: ResourceType | str, id: str, writing: bool = False
    ) -> Row:
        name = self._type(type).name
        if row := session.find(name, id):
            return self._fitted(row, session if writing else None)
        raise ScimError(404, "", f"{name} {quoted(id)} does not exist")

    def _complete(
        self,
        session: Session,
        row: Row,
        selection: Selection = WHOLE,
        named: Iterable[str] | None = None,
        groups: Mapping[int, list[Resource]] | None = None,
    ) -> Resource:
        """Return a stored row as a resource with its version, groups, and its members or those named."""
        version, linked = self._linked(session, row, selection, named, groups)
        attributes = row.attributes
        return {
            "schemas": schemas_of(self.resource_types[row.type], attributes),
            "id": row.id,
            **attributes,
            "meta": {
                "resourceType": row.type,
                "created": row.created,
                "lastModified": row.modified,
                "version": version,
            },
            **linked,
        }

    def _encoded(
        self, session: Session, row: Row, groups: Mapping[int, list[Resource]], base_url: str
    ) -> Encoded:
        """Return what project() shows of a whole resource; what is stored goes into it as it lies."""
        # A dict would be made only to be dumped: a page of 100 took a third longer.
        resource_type = self.resource_types[row.type]
        version, linked = self._linked(session, row, groups=groups)
        schemas = '","'.join(
            [
                resource_type.schema.id,
                *[one.id for one in resource_type.extensions if member_at(row.body, one.id)],
            ]
        )
        joined = to_json(memberships(linked, base_url))[1:-1] + "," if linked else ""
        return Encoded(
            f'{{"schemas":["{schemas}"],"id":{to_json(row.id)},"meta":{{"resourceType":"{row.type}",'
            f'"created":"{row.created}","lastModified":"{row.modified}","version":{to_json(version)},'
            f'"location":{to_json(resource_type.location(base_url, row.id))}}},{joined}{row.body[1:]}'
        )

    def _linked(
        self,
        session: Session,
        row: Row,
        selection: Selection = WHOLE,
        named: Iterable[str] | None = None,
        groups: Mapping[int, list[Resource]] | None = None,
    ) -> tuple[str, Resource]:
        """Return the version of a row, and its groups or its members."""
        members = self.resource_types[row.type].root.by_name.get("members")
        if members:
            shows = row.member_count and selection.includes(members)
            return f'W/"{row.revision}"', {
                "members": session.members(row.seq, named)
            } if shows else {}
        if not (joined := (groups or session.groups([row.seq]))[row.seq]):
            return f'W/"{row.revision}"', {}
        # A group that is renamed changes its members' groups, and so their versions.
        fingerprint = hashlib.sha256(to_json(joined).encode()).hexdigest()[:12]
        return f'W/"{row.revision}-{fingerprint}"', {"groups": joined}

    def _check_unique(self, session: Session, row: Row, resource: Resource) -> None:
        for sub in self.resource_types[row.type].root.sub_attributes:
            unique = (
                sub.uniqueness == "server" and sub.mutability != "readOnly" and sub.name in resource
            )
            if unique and session.taken(row.type, sub.index, sub.key(resource[sub.name]), row.seq):
                raise ScimError(
                    409,
                    "uniqueness",
                    f"{sub.name} {quoted(resource[sub.name])} is already in "
                    f"use by another {row.type}",
                )

    def _save(
        self,
        session: Session,
        row: Row,
        before: Resource,
        after: Resource,
        members_replaced: bool,
    ) -> Row:
        """Store a resource that a client changed; where nothing differs, nothing is written."""
        self._check_unique(session, row, after)
        balance, changed = self._link(session, row, before, after)
        # Beside known ids unknown ones are ignored. Alone they would empty the group.
        if members_replaced and not row.member_count + balance and after.get("members"):
            raise invalid_value(
                "members: no user or group has one of these ids: "
                + ", ".join(quoted(member["value"]) for member in after["members"])
            )
        attributes = stored(after)
        differs = attributes != row.attributes
        if not differs and not changed:
            return row
        saved = self._touch(session, row, to_json(attributes), row.member_count + balance)
        if differs:
            self._record(session, row, before, after)
        return saved

    def _touch(self, session: Session, row: Row, body: str, count: int) -> Row:
        """Store a body as the next revision of a row and return the row as it is now."""
        resource_type, now = self.resource_types[row.type], time_text(self.clock())
        changed = row._replace(
            body=body, revision=row.revision + 1, modified=now, member_count=count
        )
        session.save(changed, row_entries(resource_type, row), row_entries(resource_type, changed))
        return changed

    def _link(
        self, session: Session, row: Row, before: Resource, after: Resource
    ) -> tuple[int, bool]:
        """Store the differences in membership; return by how many it grew and if it changed."""
        if not (members := self.resource_types[row.type].root.sub_attribute("members")):
            return 0, False
        old, new = (
            {member["value"]: member.get("display") for member in resource.get("members", ())}
            for resource in (before, after)
        )
        removed = session.unlink(row.seq, old.keys() - new.keys())
        differing = [member for member in new.items() if member not in old.items()]
        written = session.link(row.seq, differing, members.by_name["display"])
        added = [id for id in written if id not in old]
        updated = [id for id in written if id in old]
        for kind, ids in (
            ("member.removed", removed),
            ("member.added", added),
            ("member.updated", updated),
        ):
            if ids:
                self._log(session, kind, row.id, ids)
        return len(added) - len(removed), bool(written or removed)

    def _adopt_custom_fields(self, session: Session) -> None:
        """Fit what is stored to the custom fields of now; values of others, or other types, are hidden."""
        configured = to_json(list(self._kinds.items()))
        if session.setting("custom_fields") != configured:
            for row in session.holding(FACILIO):
                self._fitted(row, session)
            session.set_setting("custom_fields", configured)

    def _fitted(self, row: Row, session: Session | None = None) -> Row:
        """Return a row with the custom fields of now where another view of the tenant left others in it."""
        at = member_at(row.body, FACILIO)
        found: Resource = DECODER.raw_decode(row.body, at)[0] if at else {}
        kinds = {name: KINDS[type(value)] for name, value in found.items()}
        if row.hidden == "{}" and kinds.items() <= self._kinds.items():
            return row
        user_type = self.resource_types["User"]
        extension = user_type.root.by_name[FACILIO.lower()]
        visible, hidden, earlier = Resource(), Resource(), from_json(row.hidden)
        for name, value in (*found.items(), *earlier.items()):
            sub = extension.sub_attribute(name)
            if sub and sub.name not in visible and sub.type == KINDS[type(value)]:
                visible[sub.name] = value
            else:
                hidden.setdefault(name, value)
        if (visible, hidden) == (found, earlier):
            return row
        body = to_json(pruned(row.attributes | {FACILIO: visible}))
        fitted = row._replace(body=body, hidden=to_json(hidden), revision=row.revision + 1)
        if (
            session
        ):  # one that writes; the index holds what that view wrote, by types that the values show
            written = resource_types(tuple(CustomField(*one) for one in kinds.items()))["User"]
            session.save(fitted, row_entries(written, row), row_entries(user_type, fitted))
            self._record(session, row, row.attributes, fitted.attributes)
        return fitted

    def _adopt_users(self, session: Session) -> None:
        """Make the employees of users that an older version stored without them."""
        if not session.setting("employees"):
            for *_, row in session.page({"User": EVERYTHING}, None, Window(2**62)):
                self._employ(session, row.id, row.attributes)
            session.set_setting("employees", "made")


def time_text(instant: datetime) -> str:
    """Return an instant as the dateTime of meta.created, in UTC with milliseconds."""
    return instant.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def change_verb(before: Resource, after: Resource) -> str:
    """Return what happened to a resource or employee that was one thing and is another."""
    if not before or not after:
        return "deleted" if before else "created"
    was, now = before.get("active"), after.get("active")
    if was == now or was is None or now is None:
        return "updated"
    return "reactivated" if now else "deactivated"


def changed_names(attribute: Attribute, before: Resource, after: Resource) -> list[str]:
    """Return the paths of the attributes that differ; those of an extension one by one."""
    names = []
    for sub in attribute.sub_attributes:
        old, new = before.get(sub.name, {}), after.get(sub.name, {})
        if old != new and sub.mutability == "readWrite" and not sub.is_membership:
            names += (
                [sub.path]
                if ":" not in sub.name
                else [
                    f"{sub.path}:{name}"
                    for name in {**old, **new}
                    if old.get(name) != new.get(name)
                ]
            )
    return names


def stored(resource: Resource) -> Resource:
    """Return the part of a resource that is kept in its row's body."""
    made_anew = ("schemas", "id", "meta", *MEMBERSHIP_ATTRIBUTES)
    return {name: value for name, value in resource.items() if name not in made_anew}


def member_at(body: str, name: str) -> int:
    """Return where the value of a member stands in a body's JSON text; 0 for nowhere."""
    # In the text of a value the quotes would stand behind backslashes; no sub-attribute has the name of a URN.
    found = body.rfind(f'"{name}":')
    return found + len(name) + 3 if found > 0 else 0


def row_entries(resource_type: ResourceType, row: Row) -> Iterator[Entry]:
    """Yield what the index holds of a row."""
    yield from index_entries(resource_type.root, row.attributes)
    yield "meta.created", date_time_key(row.created), 0
    yield "meta.lastmodified", date_time_key(row.modified), 0


# ----------------------------------------------------------------------------
# 10. Configuration
#
# A JSON file of tenants, tokens and custom fields becomes frozen data. Every
# mistake of a file is found in one go and named by its JSON path.
# Uses chapters 1, 2 and 8. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Kind = tuple[Callable[[Any], Any], str]  # reads a JSON value or refuses it, and what is expected
Rule = Kind | Callable[[str, Json], Any]  # or what takes a JSON path and the value there


def text_of(pattern: str, expected: str) -> Kind:
    """Return the kind of the texts that match a pattern as a whole."""
    return lambda value: value if re.fullmatch(pattern, value) else None, expected


def host_and_port(value: Json) -> tuple[str, int] | None:
    """Return the parts of an address, None for another text."""
    found = re.fullmatch(r"(.+):(\d{1,5})", value)
    return (found[1].strip("[]"), int(found[2])) if found and int(found[2]) < 65536 else None


TEXT = text_of(r"[^\x00-\x1f]*[^\s\x00][^\x00-\x1f]*", "text that is not empty")
TENANT_NAME = text_of(
    "[A-Za-z0-9][A-Za-z0-9_-]{0,62}",
    "letters, digits, - and _ (the name is that of the tenant's file)",
)
LINK_NAME = text_of(
    "[A-Za-z][A-Za-z0-9_-]*", "a letter, then letters, digits, - and _"
)  # RFC 7643 §2.1
FIELD_TYPE = text_of("String|Integer|Boolean", "String, Integer or Boolean")
TOKEN_SECRET = text_of("[!-~]+", "visible ASCII characters without blanks")
TOKEN_HASH = text_of("[0-9A-Fa-f]{64}", "64 hexadecimal digits")
LOG_FORM = text_of("text|json|off", "text, json or off")
OBJECT = (lambda value: value if isinstance(value, dict) else None, "an object")
LIST = (lambda value: value if isinstance(value, list) else None, "a list")
FLAG = (lambda value: value if isinstance(value, bool) else None, "true or false")
NUMBER = (
    lambda value: value if type(value) is int and 0 < value <= 10**8 else None,
    "a whole number of 1 or more",
)
DAYS = (
    lambda value: value if type(value) is int and 0 < value <= 36_500 else None,
    "1 to 36500 days",
)
ADDRESS = (host_and_port, "HOST:PORT such as 127.0.0.1:8080")
NETWORK = (
    lambda value: ipaddress.ip_network(str(value)),
    "an address such as 10.0.0.1 or 10.0.0.0/8",
)
TIME = (
    lambda value: datetime.fromisoformat(date_time_key(value)[:19]).replace(tzinfo=UTC),
    "a time such as 2027-01-31T00:00:00Z",
)
DEMO = {
    "tenants": [
        {
            "name": "demo",
            "tokens": [{"name": "entra", "secret": "demo-secret-token"}],
            "custom_fields": [{"link_name": "badge_number", "type": "Integer"}],
        }
    ]
}


class ConfigError(Exception):
    """A configuration that cannot be used; problems has a line for each mistake, its path first."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Token:
    """A bearer token: its SHA-256 as hex, when it ends, and the secret where the file holds it."""

    name: str
    sha256: str
    expires: datetime | None = None
    secret: str = field(default="", repr=False)

    def expired(self, now: datetime) -> bool:
        """Return whether it is over by a time."""
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class Tenant:
    """A customer: people of its own, selected by any of its tokens."""

    name: str
    tokens: tuple[Token, ...]
    custom_fields: tuple[CustomField, ...] = ()
    keep_log: int = KEEP_LOG
    log_bodies: bool = False


@dataclass(frozen=True)
class Config:
    """What a server serves, and where."""

    tenants: tuple[Tenant, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    data_dir: str = "scim-data"
    tls: tuple[str, str] | None = None  # the files of certificate and key
    trusted_proxies: tuple[Network, ...] = ()  # whose Forwarded headers are believed
    max_connections: int = 512
    workers: int = 1  # processes
    access_log: str = "text"  # or json, or off
    metrics_sha256: str = ""  # of the token that reads /metrics from afar
    keep_changes: int = KEEP_CHANGES
    keep_days: int = KEEP_DAYS
    console: bool = True


def digest(secret: str) -> str:
    """Return the SHA-256 of a token's secret as hex, the only form in which secrets compare."""
    return hashlib.sha256(secret.encode()).hexdigest()


def load_config(path: str | os.PathLike[str]) -> Config:
    """Return the configuration in a JSON file, beside which its relative paths lie; ConfigError."""
    try:
        document = json.loads(Path(path).read_text("utf-8-sig"), object_pairs_hook=unique_names)
    except OSError as error:
        raise ConfigError([f"cannot be read ({error}); name a file with --config"]) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"is not valid JSON: {error}"]) from error
    config, folder = parse_config(document), Path(path).resolve().parent
    tls = config.tls and (str(folder / config.tls[0]), str(folder / config.tls[1]))
    data_dir = config.data_dir if config.data_dir == ":memory:" else str(folder / config.data_dir)
    return replace(config, tls=tls, data_dir=data_dir)


def unique_names(pairs: list[tuple[str, Json]]) -> Json:
    """Return the object of some members; ValueError for a name that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"{names.most_common(1)[0][0]}: given twice in one object")
    return found


def parse_config(document: Json) -> Config:
    """Return the configuration that a JSON document describes; ConfigError with every mistake."""
    reader = ConfigReader()
    found = reader.members(
        "",
        document,
        {
            "listen": ADDRESS,
            "data_dir": TEXT,
            "access_log": LOG_FORM,
            "metrics_token": TEXT,
            "max_connections": NUMBER,
            "workers": NUMBER,
            "console": FLAG,
            "tenants": partial(reader.items, rule=reader.tenant, least=1),
            "changes": partial(reader.members, rules={"keep": NUMBER, "days": DAYS}),
            "tls": partial(
                reader.members,
                rules={"certificate": TEXT, "key": TEXT},
                needed={"certificate", "key"},
            ),
            "trusted_proxies": partial(reader.items, rule=NETWORK),
        },
        {"tenants"},
    )
    if reader.problems:
        raise ConfigError(reader.problems)
    host, port = found.pop("listen", (Config.host, Config.port))
    tls, metrics, changes = (found.pop(name, {}) for name in ("tls", "metrics_token", "changes"))
    return Config(
        host=host,
        port=port,
        tls=(tls["certificate"], tls["key"]) if tls else None,
        metrics_sha256=digest(metrics) if metrics else "",
        keep_changes=changes.get("keep", KEEP_CHANGES),
        keep_days=changes.get("days", KEEP_DAYS),
        **found,
    )


def to_config(source: Config | Mapping[str, Json] | str | os.PathLike[str] | None) -> Config:
    """Return a configuration: one as it is, that of a file, that of a document, or the demo's.

    A document, for a program that embeds the server, keeps nothing on disk, listens on a free port
    and writes no access log unless it says so. Raises ConfigError.
    """
    if isinstance(source, Config):
        return source
    if source is None or isinstance(source, Mapping):
        return parse_config(
            {
                "listen": "127.0.0.1:0",
                "data_dir": ":memory:",
                "access_log": "off",
                **(DEMO if source is None else source),
            }
        )
    return load_config(source)


def store_path(config: Config, tenant: Tenant) -> str:
    """Return the file of a tenant."""
    folder = config.data_dir
    return (
        folder if folder == ":memory:" else os.path.join(folder, f"{tenant.name.lower()}.sqlite3")
    )


def make_data_dir(config: Config) -> None:
    """Make the directory of the tenants' files where there is none; StoreError."""
    try:
        if config.data_dir != ":memory:":
            os.makedirs(config.data_dir, mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{config.data_dir}: cannot be made ({error.strerror}); "
            "choose another place with --data-dir"
        ) from error


class ConfigReader:
    """What reads a configuration by rules, leaves out what is wrong, and notes why by its JSON path."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._seen: dict[tuple[str, str], str] = {}  # (what, value) to the path it stands at

    def wrong(self, path: str, problem: str) -> None:
        """Note a mistake."""
        self.problems.append(f"{path or 'the file'}: {problem}")

    def unique(self, path: str, what: str, value: str, reason: str) -> None:
        """Note a value that stands at an earlier path already."""
        if value and (earlier := self._seen.setdefault((what, value), path)) != path:
            self.wrong(path, f"{reason} {earlier}")

    def read(self, path: str, value: Json, rule: Rule) -> Any:
        """Return what a rule makes of a value, None for a wrong one; what may be a secret is not shown."""
        if callable(rule):
            return rule(path, value)
        convert, expected = rule
        with suppress(TypeError, ValueError):
            if (found := convert(value)) is not None:
                return found
        self.wrong(
            path, f"expected {expected}" + ("" if "token" in path else f", got {quoted(value)}")
        )
        return None

    def members(
        self, path: str, value: Json, rules: Mapping[str, Rule], needed: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Return what rules make of an object's members; unknown and missing names are mistakes."""
        if self.read(path, value, OBJECT) is None:
            return {}
        below = path and path + "."
        for name in sorted(value.keys() - rules.keys()):
            self.wrong(below + name, f"unknown key; known are {', '.join(sorted(rules))}")
        for name in sorted(set(needed) - value.keys()):
            self.wrong(below + name, "is missing")
        return {
            name: found
            for name, rule in rules.items()
            if name in value and (found := self.read(below + name, value[name], rule)) is not None
        }

    def items(self, path: str, value: Json, rule: Rule, least: int = 0) -> tuple[Any, ...]:
        """Return what a rule makes of the items of a list."""
        if self.read(path, value, LIST) is None:
            return ()
        if len(value) < least:
            self.wrong(path, "expected at least one")
        return tuple(
            self.read(f"{path}[{number}]", item, rule) for number, item in enumerate(value)
        )

    def tenant(self, path: str, value: Json) -> Tenant:
        """Return a tenant."""
        found = self.members(
            path,
            value,
            {
                "name": TENANT_NAME,
                "tokens": partial(self.items, rule=self.token, least=1),
                "custom_fields": partial(self.items, rule=self.custom_field),
                "log": partial(self.members, rules={"keep": NUMBER, "bodies": FLAG}),
            },
            {"name", "tokens"},
        )
        name, log = found.get("name", ""), found.get("log", {})
        self.unique(f"{path}.name", "tenant", name.lower(), "the same name as")
        return Tenant(
            name,
            found.get("tokens", ()),
            found.get("custom_fields", ()),
            log.get("keep", KEEP_LOG),
            log.get("bodies", False),
        )

    def token(self, path: str, value: Json) -> Token:
        """Return a token; its hash must be the only one of its kind among all tenants."""
        found = self.members(
            path,
            value,
            {"name": TEXT, "secret": TOKEN_SECRET, "sha256": TOKEN_HASH, "expires": TIME},
        )
        name, secret = found.get("name", path), found.get("secret", "")
        if isinstance(value, dict) and ("secret" in value) == ("sha256" in value):
            self.wrong(
                path, "expected either secret or sha256; `python scim_server.py token` makes both"
            )
        sha256 = digest(secret) if secret else found.get("sha256", "").lower()
        self.unique(f"{path}.name", path.rpartition("[")[0], name, "the same name as")
        self.unique(path, "token", sha256, "the same token as")
        return Token(name, sha256, found.get("expires"), secret)

    def custom_field(self, path: str, value: Json) -> CustomField:
        """Return a custom field; link names compare without case, as attribute names do."""
        rules = {"link_name": LINK_NAME, "type": FIELD_TYPE, "display_name": TEXT}
        found = self.members(path, value, rules, {"link_name", "type"})
        name = found.get("link_name", "")
        self.unique(
            f"{path}.link_name", path.rpartition("[")[0], name.lower(), "the same link name as"
        )
        return CustomField(name, found.get("type", ""), found.get("display_name", name))


# ----------------------------------------------------------------------------
# 11. Messages                                            RFC 7644 §3.1, §3.12
#
# What comes in and goes out, as plain Python: requests, responses, calls, bodies,
# lists and errors.
# Uses chapters 1 to 10. Knows nothing of sockets.
# ----------------------------------------------------------------------------

RETRY_SECONDS = 5  # after which a tenant whose file failed is opened again
RETRY = {"Retry-After": str(RETRY_SECONDS)}
unauthorized = partial(  # whatever is wrong with a bearer token
    ScimError,
    401,
    "",
    "the bearer token is missing, unknown or expired; check the Secret Token of the enterprise "
    "application",
    {"WWW-Authenticate": 'Bearer realm="scim"'},
)
Caller = tuple[Tenant, Token, Directory | StoreError]  # of a request
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Request(NamedTuple):
    """A request: header names in lower case; path and query as they stood in the target."""

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = NO_HEADERS
    body: bytes | Json = b""  # Bulk hands in JSON that was read already
    scheme: str = "http"  # and host: how the client named this server
    host: str = "localhost"
    mount_point: str = ""  # the path that the server is mounted at
    client: str = ""  # the address that it came from
    id: str = "-"  # for the logs
    caller: Caller | None = None  # whose it is, where that is known: Bulk asks for many but once
    encoded: bool = (
        False  # whether resources in the answer may be Encoded, for who makes bytes of them
    )


class Response(NamedTuple):
    """An answer; its body stays JSON, or is text such as CSV, until the edge makes bytes of it."""

    status: int
    body: Json = None  # None is no body; another is application/scim+json unless headers say
    headers: Mapping[str, str] = NO_HEADERS
    tenant: str = ""  # for the logs: whose request it was, and for what route
    route: str = ""


class Call(NamedTuple):
    """A request on its way to an operation: whose directory, what of it, and how it was asked."""

    request: Request
    directory: Directory
    resource_type: ResourceType  # of the endpoint
    resource_types: tuple[ResourceType, ...]  # this one, at the root all
    endpoint: str  # the first segment of the path
    id: str  # the last, where there are others
    parameters: Mapping[str, str]  # of the query, names in lower case
    condition: Precondition  # on the version
    base_url: str
    application: Any
    caller: Caller | None  # of the request

    def selection(self, resource_type: ResourceType) -> Selection:
        """Return what the client wants to see of resources of a type."""
        return parse_selection(
            self.parameters.get("attributes", ""),
            self.parameters.get("excludedattributes", ""),
            resource_type,
        )

    def integer(
        self,
        name: str,
        default: int,
        least: int = -(10**18),
        most: int = 10**18,
        scim_type: str = "invalidValue",
    ) -> int:
        """Return an integer parameter, moved into bounds; ScimError 400 with the scimType if it is none."""
        if not (text := self.parameters.get(name.lower(), "")):
            return default
        if not re.fullmatch(r"[+-]?\d{1,40}", text.strip(), re.ASCII):
            raise ScimError(400, scim_type, f"{name}: expected an integer, got {quoted(text)}")
        return max(least, min(int(text), most))

    def search(
        self, asked: Mapping[str, tuple[Filter, Selection]], sorting: Sorting | None, window: Window
    ) -> Page:
        """Return a window on what matches, Encoded for who makes bytes of it."""
        return self.directory.search(
            asked, sorting, window, self.base_url if self.request.encoded else ""
        )

    def projected(self, resource: Resource | Encoded) -> Json:
        """Return as much of a resource as the client selected."""
        if isinstance(resource, Encoded):
            return resource
        resource_type = self.directory.resource_types[resource["meta"]["resourceType"]]
        return project(resource_type, resource, self.selection(resource_type), self.base_url)

    def answer(self, resource: Resource, status: int = 200) -> Response:
        """Return the answer that shows a resource."""
        headers = {"ETag": resource["meta"]["version"]}
        if status == 201:
            headers["Location"] = self.resource_type.location(self.base_url, resource["id"])
        return Response(status, self.projected(resource), headers)


def parse_body(request: Request) -> Json:
    """Return the JSON of a body; ScimError 400 invalidSyntax names the place of what is wrong."""
    if not isinstance(body := request.body, bytes):
        return body
    try:
        value = json.loads(
            body.decode("utf-8-sig"), parse_constant=not_json, object_pairs_hook=unique_names
        )
        # Only a body with escapes or deep nesting can hold what the walk looks for.
        if b"\\u" in body or is_deep(value):
            for path, text in texts_in(value):
                if UNSTORABLE.search(text):
                    raise ValueError(f"{path or 'it'}: text with NUL or half a surrogate pair")
        return value
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise invalid_syntax(f"the body is not JSON: {reason}") from None


def is_deep(value: Json) -> bool:
    """Return whether a JSON value is nested deeper than MAX_DEPTH, level by level."""
    level: list[Any] = [[value]]
    depth = 0
    while level and depth <= MAX_DEPTH:
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        depth += 1
    return bool(level)


def texts_in(value: Json, path: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield every text in a JSON value behind its path, names included; ValueError beyond MAX_DEPTH."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{path[:80]}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield path, name
            yield from texts_in(item, f"{path}.{name}" if path else name, depth + 1)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from texts_in(item, f"{path}[{number}]", depth + 1)


def not_json(word: str) -> Json:
    """Refuse NaN and Infinity, which Python reads and RFC 8259 does not know."""
    raise ValueError(word)


def list_response(resources: Iterable[Json], total: int, **more: Json) -> Response:
    """Return a ListResponse (RFC 7644 §3.4.2); itemsPerPage is what this answer holds."""
    page = list(resources)
    return Response(
        200,
        {
            "schemas": [LIST_RESPONSE],
            "totalResults": total,
            **more,
            "itemsPerPage": len(page),
            "Resources": page,
        },
    )


def error_response(error: ScimError) -> Response:
    """Return a SCIM error as an answer."""
    return Response(error.status, error.body(), error.headers)


def plain_response(body: Json, type: str = "application/json", **headers: str) -> Response:
    """Return an answer that is no SCIM message."""
    return Response(200, body, {"Content-Type": type, **headers})


def credentials_of(request: Request) -> tuple[str, str]:
    """Return the scheme and the secret of a request's Authorization, "" for what is missing."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return scheme, secret.strip()


def response_for(error: Exception) -> Response:
    """Return the answer to a request that failed; what its client cannot mend is printed."""
    if isinstance(error, ScimError):
        return error_response(error)
    with suppress(OSError, ValueError):  # nobody reads it
        traceback.print_exception(error)
    if isinstance(error, sqlite3.DatabaseError):  # of the disk or the file
        return error_response(
            ScimError(
                507 if "full" in str(error) else 503,
                "",
                f"the tenant's database failed: {error}; nothing was changed, "
                "the request may be repeated",
                RETRY,
            )
        )
    return error_response(ScimError(500, "", "the server failed; its log says why"))


# ----------------------------------------------------------------------------
# 12. SCIM endpoints                                           RFC 7644 §3, §4
#
# Each operation takes a Call and returns a Response: resources, queries, cursors,
# .search, discovery and Bulk.
# Uses chapters 1 to 11. Knows nothing of sockets.
# ----------------------------------------------------------------------------

# -- Discovery -------------------------------------------------------------------


def published_attribute(attribute: Attribute) -> Json:
    """Return an attribute as RFC 7643 §7 describes it, without what does not apply."""
    cased = attribute.type in STRING_TYPES or attribute.type == "binary"
    found = {
        "name": attribute.name,
        "type": attribute.type,
        "multiValued": attribute.multi_valued,
        "required": attribute.required,
        "mutability": attribute.mutability,
        "returned": attribute.returned,
        "caseExact": attribute.case_exact if cased else None,
        "uniqueness": attribute.uniqueness if attribute.type != "complex" else None,
        "description": attribute.description or attribute.name,
        "canonicalValues": list(attribute.canonical_values) or None,
        "referenceTypes": list(attribute.reference_types) or None,
        "subAttributes": [
            published_attribute(sub) for sub in attribute.sub_attributes if sub.published
        ]
        or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def published_schemas(directory: Directory, base_url: str) -> dict[str, Json]:
    """Return a tenant's schemas by URN (RFC 7643 §7); externalId is listed for Entra's validator."""
    return {
        schema.id: {
            "schemas": [SCHEMA],
            "id": schema.id,
            "name": schema.name,
            "description": schema.description,
            "attributes": [
                published_attribute(attribute)
                for attribute in ((EXTERNAL_ID,) if schema is found.schema else ())
                + schema.attributes
                if attribute.published
            ],
            "meta": {"resourceType": "Schema", "location": f"{base_url}/Schemas/{schema.id}"},
        }
        for found in directory.resource_types.values()
        for schema in (found.schema, *found.extensions)
        if schema.attributes
    }


def published_resource_types(directory: Directory, base_url: str) -> dict[str, Json]:
    """Return a tenant's resource types by name (RFC 7643 §6)."""
    return {
        found.name: {
            "schemas": [RESOURCE_TYPE],
            "id": found.name,
            "name": found.name,
            "description": found.schema.description,
            "endpoint": found.endpoint,
            "schema": found.schema.id,
            "schemaExtensions": [
                {"schema": one.id, "required": False} for one in found.extensions if one.attributes
            ],
            "meta": {
                "resourceType": "ResourceType",
                "location": f"{base_url}/ResourceTypes/{found.name}",
            },
        }
        for found in directory.resource_types.values()
    }


def published_config(directory: Directory, base_url: str) -> dict[str, Json]:
    """Return the service provider configuration (RFC 7643 §5), the one document without an id."""
    return {
        "": {
            "schemas": [PROVIDER_CONFIG],
            "patch": {"supported": True},
            # authentik takes a missing maxOperations for "no PATCH and no filter".
            "bulk": {
                "supported": True,
                "maxOperations": MAX_BULK_OPERATIONS,
                "maxPayloadSize": MAX_BULK_BODY,
            },
            "filter": {"supported": True, "maxResults": MAX_COUNT},
            "changePassword": {"supported": False},
            "sort": {"supported": True},
            "etag": {"supported": True},
            "pagination": {
                "cursor": True,
                "index": True,
                "defaultPaginationMethod": "index",
                "maxPageSize": MAX_COUNT,
                "defaultPageSize": DEFAULT_COUNT,
                "cursorTimeout": CURSOR_SECONDS,
            },
            "authenticationSchemes": [
                {
                    "type": "oauthbearertoken",
                    "name": "Bearer token",
                    "primary": True,
                    "description": "The tenant's secret token as Authorization: Bearer (RFC 6750)",
                    "specUri": "https://www.rfc-editor.org/rfc/rfc6750",
                }
            ],
            "meta": {
                "resourceType": "ServiceProviderConfig",
                "location": f"{base_url}/ServiceProviderConfig",
            },
        }
    }


PUBLISHED = {
    "ServiceProviderConfig": published_config,
    "Schemas": published_schemas,
    "ResourceTypes": published_resource_types,
}


def get_published(call: Call) -> Response:
    """Answer GET of a discovery endpoint: its documents, where sort and page count for nothing, or one."""
    if "filter" in call.parameters:  # RFC 7644 §4
        raise ScimError(403, "", "filter: discovery endpoints take no filter")
    found = PUBLISHED[call.endpoint](call.directory, call.base_url)
    if document := {name.lower(): one for name, one in found.items()}.get(call.id.lower()):
        return Response(200, document)
    if not call.id:
        return list_response(found.values(), len(found), startIndex=1)
    raise ScimError(404, "", f"{quoted(call.id)} does not exist; there are {', '.join(found)}")


# -- Operations: each takes a call and gives a response ----------------------------


def create_resource(call: Call) -> Response:
    """Answer POST /Users and POST /Groups."""
    return call.answer(call.directory.create(call.resource_type, parse_body(call.request)), 201)


def get_resource(call: Call) -> Response:
    """Answer GET /Users/{id}."""
    found = call.directory.get(call.resource_type, call.id, call.selection(call.resource_type))
    version = found["meta"]["version"]
    if call.condition.if_match:
        call.condition._replace(if_none_match="").check(version)
    if call.condition.excludes(version):
        return Response(304, headers={"ETag": version})
    return call.answer(found)


def replace_resource(call: Call) -> Response:
    """Answer PUT /Users/{id}."""
    return call.answer(
        call.directory.replace(
            call.resource_type, call.id, parse_body(call.request), call.condition
        )
    )


def patch_resource(call: Call) -> Response:
    """Answer PATCH /Users/{id}: 200 with the resource, or 204 for a group with a great many members."""
    patched = call.directory.patch(
        call.resource_type,
        call.id,
        parse_body(call.request),
        call.condition,
        call.selection(call.resource_type),
    )
    return call.answer(patched) if patched else Response(204)


def delete_resource(call: Call) -> Response:
    """Answer DELETE /Users/{id}."""
    call.directory.delete(call.resource_type, call.id, call.condition)
    return Response(204)


def list_resources(call: Call) -> Response:
    """Answer GET /Users, GET /Groups and GET /: filter, sort, page (RFC 7644 §3.4.2)."""
    text = call.parameters.get("filter")
    asked = {
        found.name: (
            EVERYTHING if text is None else parse_filter(text, found),
            call.selection(found),
        )
        for found in call.resource_types
    }
    sorting = parse_sorting(call.parameters, call.resource_types)
    if "cursor" in call.parameters:
        return list_by_cursor(call, asked, sorting)
    start_index = call.integer("startIndex", 1, 1)
    count = call.integer("count", DEFAULT_COUNT, 0, MAX_COUNT)
    page = call.search(asked, sorting, Window(count, start_index - 1))
    return list_response(
        map(call.projected, page.resources), page.total_results or 0, startIndex=start_index
    )


def list_by_cursor(
    call: Call, asked: Mapping[str, tuple[Filter, Selection]], sorting: Sorting | None
) -> Response:
    """Answer a query that pages by cursor (RFC 9865): an empty one asks for the first page."""
    if "startindex" in call.parameters:
        raise invalid_value("startIndex: not together with cursor")
    count = call.integer("count", DEFAULT_COUNT, 0, MAX_COUNT, "invalidCount")
    total, after, backward = read_cursor(call)
    page = call.search(asked, sorting, Window(count, 0, after, backward))
    total = total if page.total_results is None else page.total_results
    cursors = {}
    # On the side that a walk comes from there is always something; on the other, more says.
    if page.last and (page.more or backward):
        cursors["nextCursor"] = make_cursor(call, total, page.last, backward=False)
    if page.first and (page.more if backward else after is not None):
        cursors["previousCursor"] = make_cursor(call, total, page.first, backward=True)
    return list_response(map(call.projected, page.resources), total, **cursors)


# A cursor holds all that the next page needs, and a signature: (query, total, backward, issued,
# missing, key, seq). Nothing is kept on the server, and nobody can make one for another tenant.
def make_cursor(call: Call, total: int, position: Position, backward: bool) -> str:
    """Return a cursor to the page behind a position."""
    content = to_json(
        [query_digest(call), total, backward, int(call.directory.clock().timestamp()), *position]
    ).encode()
    return base64.urlsafe_b64encode(signature(call, content) + content).decode().rstrip("=")


def read_cursor(call: Call) -> tuple[int, Position | None, bool]:
    """Return total, position and direction of a cursor; ScimError 400 invalidCursor or expiredCursor."""
    if not (text := call.parameters["cursor"]):
        return 0, None, False
    octets = b""
    with suppress(ValueError):
        octets = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    mac, content = octets[:SIGNATURE_LENGTH], octets[SIGNATURE_LENGTH:]
    again = "start again with an empty cursor"
    if not content or not hmac.compare_digest(mac, signature(call, content)):
        raise ScimError(400, "invalidCursor", f"cursor: not one of this server; {again}")
    query, total, backward, issued, *position = json.loads(content)
    if query != query_digest(call):
        raise ScimError(400, "invalidCursor", "cursor: it belongs to another filter or sort")
    if call.directory.clock().timestamp() > issued + CURSOR_SECONDS:
        raise ScimError(
            400, "expiredCursor", f"cursor: older than {CURSOR_SECONDS} seconds; {again}"
        )
    return total, Position(*position), backward


def query_digest(call: Call) -> str:
    """Return what makes two requests pages of one query."""
    terms = [call.parameters.get(name, "") for name in ("filter", "sortby", "sortorder")]
    return digest(to_json([[found.name for found in call.resource_types], terms]))[:16]


def signature(call: Call, content: bytes) -> bytes:
    """Return the HMAC of a cursor's content under the tenant's key."""
    return hmac.digest(call.directory.cursor_key, content, "sha256")[:SIGNATURE_LENGTH]


def search_resources(call: Call) -> Response:
    """Answer POST /.search, /Users/.search and /Groups/.search (RFC 7644 §3.4.3)."""
    parameters = {}
    for name, value in lowercase_keys(parse_body(call.request)).items():
        names = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
        if not all(isinstance(one, (str, int)) for one in names):
            raise invalid_value(f"{name}: expected text, an integer or names, got {quoted(value)}")
        if names:
            parameters[name] = ",".join(map(str, names))
        if name != "filter" and len(parameters.get(name, "")) > MAX_FILTER_LENGTH:
            raise invalid_value(f"{name}: longer than {MAX_FILTER_LENGTH} characters")
    return list_resources(call._replace(parameters=parameters))


def parse_sorting(parameters: Mapping[str, str], types: Iterable[ResourceType]) -> Sorting | None:
    """Return what to sort by; an attribute that nobody has sorts nothing (RFC 7644 §3.4.2.3)."""
    order = parameters.get("sortorder", "").strip().lower() or "ascending"
    if order not in ("ascending", "descending"):
        raise invalid_value(f"sortOrder: expected ascending or descending, got {quoted(order)}")
    name = parameters.get("sortby", "").strip()
    target = next(filter(None, (resolve(name, found) for found in types)), None) if name else None
    if target and (standing := target[-1].value_attribute):
        target = (*target, standing)
    if target and target[-1].computed:
        raise invalid_value(f"sortBy: {name} is made for each response; nothing is sorted by it")
    return Sorting(AttributePath(target), order == "descending") if target else None


# -- Bulk: a loop over handle ------------------------------------------------------

BULK_ID = re.compile(
    r"bulkId:(\S+)"
)  # what stands for the id of what a POST makes (RFC 7644 §3.7.2)


class BulkOperation(NamedTuple):
    """One operation of a bulk request: a method, an endpoint, an id below it or "", its data."""

    method: str
    endpoint: str
    id: str
    bulk_id: str
    version: str
    data: Json
    references: set[str]  # the bulkIds whose resources it needs the ids of


def parse_bulk_operation(item: Json) -> BulkOperation:
    """Return an operation of a bulk request; ScimError 400 invalidSyntax."""
    given = {
        name: value
        for name, value in lowercase_keys(item, "Operations: expected objects").items()
        if value is not None
    }
    for name in ("method", "path", "bulkId", "version"):
        if not isinstance(value := given.setdefault(name.lower(), ""), str):
            raise invalid_syntax(f"Operations: {name} must be text, got {quoted(value)}")
    endpoint, _, id = given["path"].strip("/").partition("/")
    data = given.get("data")
    texts = texts_in([id, data]) if "bulkId:" in to_json([id, data]) else ()  # few refer to others
    references = {found[1] for _, text in texts if (found := BULK_ID.fullmatch(text))}
    return BulkOperation(
        given["method"].upper(), endpoint, id, given["bulkid"], given["version"], data, references
    )


def resolved(value: Json, ids: Mapping[str, str]) -> Json:
    """Return JSON with ids for its bulkIds, without the objects that refer to one not yet known."""
    if isinstance(value, str) and (reference := BULK_ID.fullmatch(value)):
        return ids.get(reference[1])
    if isinstance(value, list):
        return [one for item in value if (one := resolved(item, ids)) is not None]
    if isinstance(value, dict):
        found = {name: resolved(item, ids) for name, item in value.items()}
        if any(found[name] is None and isinstance(item, str) for name, item in value.items()):
            return None
        return {
            name: item for name, item in found.items() if item is not None or value[name] is None
        }
    return value


class Bulk:
    """A bulk request at work (RFC 7644 §3.7); ScimError 400 invalidValue where two POSTs share a bulkId."""

    def __init__(self, call: Call, operations: Sequence[BulkOperation]) -> None:
        self.call, self.operations = call, operations
        self.answers: dict[int, Json] = {}  # so far, by number
        self.makers: dict[str, int] = {}  # a bulkId to the POST that makes its resource
        self.ids: dict[str, str] = {}  # a bulkId to the id of what was made
        self.incomplete: list[int] = []  # made before what they refer to, in a circle
        for number, made in enumerate(operations):
            if made.method == "POST" and self.makers.setdefault(made.bulk_id, number) != number:
                raise invalid_value(
                    f"bulkId {quoted(made.bulk_id)}: each POST needs one of its own"
                )

    def run(self, fail_on_errors: int) -> list[Json]:
        """Return the answers in the order of the request, until there are so many errors."""
        errors = 0
        for number in self._order():
            self._perform(number)
            errors += "response" in self.answers[number]
            if errors >= fail_on_errors:
                break
        for number in list(self.incomplete):
            self._finish(number)
        return [self.answers[number] for number in sorted(self.answers)]

    def _order(self) -> Iterator[int]:
        """Yield all numbers, each after the makers it refers to; a circle is cut where it closes."""
        started: set[int] = set()
        done: set[int] = set()
        for first in range(len(self.operations)):
            stack = [first]
            while stack:
                number = stack[-1]
                if number not in started:
                    started.add(number)
                    makers = {
                        self.makers.get(name, number) for name in self.operations[number].references
                    }
                    stack += sorted(makers - started, reverse=True)
                elif stack.pop() not in done:
                    done.add(number)
                    yield number

    def _perform(self, number: int) -> None:
        operation = self.operations[number]
        try:
            self._check(operation)
            missing = operation.references - self.ids.keys()
            for name in sorted(missing):
                if self.makers.get(name) is None or self.makers[name] in self.answers:
                    raise ScimError(
                        409, "", f"bulkId {quoted(name)}: no POST of this request made it"
                    )
            response = self._send(operation, operation.method, operation.id)
        except ScimError as error:
            response = error_response(error)
        self._note(number, response)
        if response.status == 201:
            self.ids[operation.bulk_id] = response.body["id"]
            self.incomplete += [number] if missing else []
            for one in [
                one for one in self.incomplete if self.operations[one].references <= self.ids.keys()
            ]:
                self._finish(one)

    def _check(self, operation: BulkOperation) -> None:
        method, path = operation.method, f"/{operation.endpoint}/{operation.id}"
        if method not in ("POST", "PUT", "PATCH", "DELETE"):
            raise invalid_value(
                f"method: expected POST, PUT, PATCH or DELETE, got {quoted(method)}"
            )
        if not re.fullmatch("/(Users|Groups)/" + ("" if method == "POST" else "[^/]+"), path):
            expected = "/Users" if method == "POST" else "/Users/2819c223"
            raise invalid_path(f"path: {method} needs one such as {expected}, got {quoted(path)}")
        if method != "DELETE" and operation.data is None:
            raise invalid_value(f"data: {method} needs some")
        if method == "POST" and not operation.bulk_id:
            raise invalid_value("bulkId: POST needs one")

    def _send(self, operation: BulkOperation, method: str, id: str) -> Response:
        request, path_id = self.call.request, quote(resolved(id, self.ids) or "", safe="")
        headers = {name: value for name, value in request.headers.items() if name[:3] != "if-"}
        if operation.version:
            headers["if-match"] = operation.version
        return self.call.application.handle(  # type: ignore[no-any-return]
            request._replace(
                method=method,
                path=f"{BASE_PATH}/{operation.endpoint}/{path_id}",
                query="",
                headers=headers,
                caller=self.call.caller,
                body=resolved(operation.data, self.ids) if operation.references else operation.data,
            )
        )

    def _finish(self, number: int) -> None:
        """Replace what was made without its references as they are known; undo its making where one is not."""
        operation = self.operations[number]
        id = f"bulkId:{operation.bulk_id}"
        self.incomplete.remove(number)
        response = error_response(
            ScimError(409, "", "a bulkId that this resource refers to was not made")
        )
        if operation.references <= self.ids.keys():
            response = self._send(operation, "PUT", id)
        if response.status == 200:
            self.answers[number]["version"] = response.headers["ETag"]
        else:
            self._send(operation, "DELETE", id)
            self._note(number, response)

    def _note(self, number: int, response: Response) -> None:
        operation = self.operations[number]
        location = (
            response.headers.get("Location", "")
            if operation.method == "POST"
            else f"{self.call.base_url}/{operation.endpoint}/{resolved(operation.id, self.ids) or operation.id}"
        )
        answer = {
            "location": location,
            "method": operation.method,
            "bulkId": operation.bulk_id,
            "version": response.headers.get("ETag"),
            "status": str(response.status),
            "response": response.body if response.status >= 300 else None,
        }
        self.answers[number] = {name: value for name, value in answer.items() if value}


def run_bulk(call: Call) -> Response:
    """Answer POST /Bulk: operations in one commit, each of them done whole or not at all."""
    message = lowercase_keys(parse_body(call.request))
    items, limit = message.get("operations"), message.get("failonerrors")
    if not isinstance(items, list) or not items:
        raise invalid_syntax("Operations: expected a list of operations")
    if len(items) > MAX_BULK_OPERATIONS:
        raise ScimError(
            413,
            "",
            f"Operations: {len(items)} are more than the {MAX_BULK_OPERATIONS} of maxOperations",
        )
    if limit is not None and (type(limit) is not int or limit < 1):
        raise invalid_value(f"failOnErrors: expected 1 or more, got {quoted(limit)}")
    with call.directory.store.writing(alone=True):
        answers = Bulk(call, list(map(parse_bulk_operation, items))).run(limit or len(items))
    return Response(200, {"schemas": [BULK_RESPONSE], "Operations": answers})


# ----------------------------------------------------------------------------
# 13. Provisioning log
#
# What each call did, what is doubtful about it and what to do, written in the
# background.
# Uses chapters 1 to 12. Knows nothing of sockets.
# ----------------------------------------------------------------------------

LOG_WAITING = 5_000  # calls that wait to be written; what comes on top is lost
LOG_READS = 50  # the same of reads that succeeded, which tell least
LOG_PAUSE = 0.2  # seconds in which calls gather for one transaction
LOGGED_BODY, LOGGED_PATH = 32 * 1024, 200  # octets; a longer body is not looked into; characters
SECRET = re.compile(r"password|secret|token|authorization", re.IGNORECASE)
Sent = tuple[str, str, Json]  # an operation ("add" but for PATCH), a path, the value written to it
OBJECT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
VERBS = {"GET": "Read", "POST": "Create", "PUT": "Replace", "PATCH": "Update", "DELETE": "Delete"}


# How "STATUS detail" or a line of findings() begins, and the kind of trouble; what it means, by its groups; what
# to do. The first that fits counts; the last fits everything.
EXPLANATIONS = (
    (
        r"401 expired",
        "authentication",
        "The token “{token}” expired on {expires}; a call from {client} was refused.",
        "`python scim_server.py token` makes another: its entry goes to the tenant's tokens, its secret to Entra.",
    ),
    (
        r"401 ",
        "authentication",
        "A call from {client} sent the token “{token}”, but not as a bearer token.",
        "Choose bearer authentication in the client.",
    ),
    (
        r"404 .* follow (/.*)",
        "connection",
        "The call went to {path}, where nothing is.",
        "Let the Tenant URL end in {0}, once, with nothing behind it.",
    ),
    (
        r".*facilio:2.0:User has no attribute '(.*)'; its attributes are: (.*)",
        "mapping",
        "No custom field has the link name “{0}”{hint}",
        "Correct the name in Entra's attribute list for customappsso; this tenant has {1}.",
    ),
    (
        r"400 (\S+): expected a 64-bit Integer, got (.*)",
        "mapping",
        "The field “{0}” takes a whole number, and {1} was sent.",
        "Map it from an attribute that holds digits alone, or make the custom field a String.",
    ),
    (
        r"400 (\S+): expected a Boolean, got (.*)",
        "mapping",
        "The field “{0}” takes true or false, and {1} was sent.",
        "Use an expression that gives true or false; for active it is Not([IsSoftDeleted]).",
    ),
    (
        r"400 (\S+): expected (.*), got (.*)",
        "mapping",
        "The attribute “{0}” takes {1}, and {2} was sent.",
        "Map it from another attribute.",
    ),
    (
        r"400 (\S+) is required",
        "mapping",
        "“{0}” was sent without a value.",
        "Map it from an attribute that every account has; for userName that is userPrincipalName.",
    ),
    (
        r"409 (\S+) (.*) is already in use by another (\w+)",
        "mapping",
        "Another {2} has the {0} {1} already.",
        "Change one of the two in Entra; if they are the same, match by {0} (precedence 1).",
    ),
    (
        r"404 (\w+) .* does not exist",
        "mapping",
        "Entra refers to a {0} that is not here any more.",
        "Choose “Restart provisioning” in Entra, which looks everybody up anew.",
    ),
    (
        r"4\d\d (the body .*)",
        "connection",
        "The body could not be read: {0}.",
        "See whether a proxy in front of the server changes or cuts requests.",
    ),
    (
        r"5\d\d (.*)",
        "connection",
        "The server could not do it: {0}.",
        "Entra repeats the call by itself; the server's log says why it failed.",
    ),
    (
        r"active: (.*)",
        "mapping",
        "active was sent as the text {0}: Entra's expression is still Switch(…), or its dialect the old one.",
        "Set the expression of active to Not([IsSoftDeleted]) and add ?aadOptscim062020 to the Tenant URL.",
    ),
    (
        r"emails: (.*) for (.*)",
        "mapping",
        "The work e-mail {0} is not the userName {1}: emails is not fed from userPrincipalName.",
        'Map userPrincipalName to emails[type eq "work"].value.',
    ),
    (
        r"externalId: (.*)",
        "mapping",
        "externalId is {0}, which is no objectId.",
        "Map objectId to externalId, so that a person who is renamed stays the same employee.",
    ),
    (
        r"members: (.*)",
        "mapping",
        "Nobody has the id {0}; such members were passed over.",
        "Assign these people to the application too, so that Entra creates them before their group.",
    ),
    (
        r"(?:\d{3} )?(.*)",
        "mapping",
        "The call was refused: {0}.",
        "Compare the mapping in Entra with the table on the Set-up page.",
    ),
)
STEPS = (  # of the set-up: key, operation, title, how to get there
    (
        "lookup",
        "Look up user",
        "A person is looked up",
        "In Entra: Provisioning → Provision on demand.",
    ),
    (
        "create",
        "Create user",
        "A person is created",
        "Start provisioning: whoever is assigned is created.",
    ),
    ("custom", "", "A custom field arrives", "Add its name to the attribute list, then map to it."),
    (
        "update",
        "Update user",
        "A person is updated",
        "Change a job title in Entra and wait for a cycle.",
    ),
    (
        "off",
        "Deactivate user",
        "A person is deactivated",
        "Unassign a test person and wait for a cycle.",
    ),
)


@dataclass(frozen=True, eq=False)
class LoggedCall:
    """A call of a tenant's client on its way to the log; request and response without what it omits."""

    instant: datetime
    tenant: Tenant
    token: Token
    directory: Directory
    request: Request
    response: Response
    seconds: float
    logged: bool  # else it tells no more than that the token is in use

    @cached_property
    def type(self) -> str:
        """User, Group, or "" where the call was for something else."""
        types, endpoint = (
            self.directory.resource_types.values(),
            self.response.route.split("/")[1:2],
        )
        return next((found.name for found in types if [found.endpoint[1:]] == endpoint), "")

    @cached_property
    def resource(self) -> Resource:
        """The user or group in the answer, or the only one that a query found; {} for none."""
        body = (self.response.body if self.type and self.response.status < 300 else None) or {}
        found = body.get("Resources", [body])
        if len(found) != 1:
            return {}
        return from_json(found[0]) if isinstance(found[0], Encoded) else found[0]  # type: ignore[no-any-return]


def sent_values(body: Json) -> Iterator[Sent]:
    """Yield what the body of a write says, paths cut to LOGGED_PATH; the attributes of an extension one by one."""
    found = {name.lower(): item for name, item in body.items()} if isinstance(body, dict) else {}
    steps = found.get("operations", [{"op": "add", "value": body}])
    for item in steps if isinstance(steps, list) else []:
        step = {name.lower(): one for name, one in item.items()} if isinstance(item, dict) else {}
        op, path, value = str(step.get("op")).lower(), step.get("path"), step.get("value")
        pairs = [(str(path), value)] if path else value.items() if isinstance(value, dict) else []
        for name, one in pairs:
            if name.lower() in (ENTERPRISE.lower(), FACILIO.lower()) and isinstance(one, dict):
                yield from (
                    (op, f"{name}:{sub}"[:LOGGED_PATH], inner) for sub, inner in one.items()
                )
            elif name.lower() not in ("schemas", "id", "meta"):
                yield op, name[:LOGGED_PATH], one


def member_ids(path: str, value: Json) -> list[str]:
    """Return the ids of the members that a path and a value mean, "" for one in another form."""
    items = [""] if "[" in path else value if isinstance(value, list) else [value] if value else []
    return [str(item.get("value", "") if isinstance(item, dict) else item) for item in items]


def findings(session: Session, call: LoggedCall, sent: Sequence[Sent]) -> Iterator[str]:
    """Yield what is doubtful in a call that was done, in words that EXPLANATIONS knows."""
    user_type, user = call.directory.resource_types["User"], call.resource
    if call.type == "Group":
        asked = {
            id
            for op, path, value in sent
            if path.lower() == "members" and op != "remove"
            for id in member_ids(path, value)
        } - {one.get("value") for one in call.resource.get("members", ())}
        if missing := session.unknown_ids(sorted(asked)):
            yield "members: " + ", ".join(map(quoted, missing[:3])) + (", …" if missing[3:] else "")
    for _, path, value in sent if call.type == "User" else ():
        name = path.lower().partition("[")[0]
        if name == "active" and isinstance(value, str):
            yield f"active: {quoted(value)}"
        elif name == "externalid" and not OBJECT_ID.fullmatch(str(value)):
            yield f"externalId: {quoted(value)}"
        elif name.startswith(FACILIO.lower()) and not resolve(path, user_type):
            yield unknown_attribute(path, user_type).detail
        elif name in ("emails", "username"):
            for mail in user.get("emails", []):
                differs = str(mail.get("value")).casefold() != user.get("userName", "").casefold()
                if mail.get("type") == "work" and differs:
                    yield f"emails: {quoted(mail.get('value'))} for {quoted(user.get('userName'))}"


def explain(finding: str, call: LoggedCall) -> Json:
    """Return the kind of a trouble, the sentence that explains it, and the remedy."""
    match, (_, kind, text, remedy) = next(
        (match, row)
        for row in EXPLANATIONS
        if (match := re.match(row[0], finding.replace(f"{FACILIO}:", ""), re.DOTALL))
    )
    parts = [part.strip(".") for part in match.groups()]
    links = {name.lower(): name for name in call.directory.link_names}
    close = difflib.get_close_matches("".join(parts[:1]).lower(), links, 1)
    found = {
        "hint": f": did you mean “{links[close[0]]}”?" if close else ".",
        "token": call.token.name,
        "path": call.request.path,
        "client": call.request.client,
        "expires": time_text(call.token.expires)[:16] if call.token.expires else "",
    }
    return {
        "kind": kind,
        "text": text.format(*parts, **found),
        "remedy": remedy.format(*parts, **found),
    }


def refusal(call: LoggedCall, raw: str) -> str:
    """Return status and detail of an error, without values where a secret was among what was sent."""
    detail = (call.response.body or {}).get("detail", "")
    if call.response.status == 401 and call.token.expired(call.instant):
        detail = "expired"
    if SECRET.search(raw + call.request.query):
        detail = re.sub(r'got .*|"(\\.|[^"\\])*("|$)', "•••", detail, flags=re.DOTALL)
    return f"{call.response.status} {detail}"


def in_words(call: LoggedCall, sent: Sequence[Sent]) -> str:
    """Return what a call does, such as "Update user"; the name of whom it concerns reads on."""
    method, route, thing = call.request.method, call.response.route, call.type.lower()
    if not thing or (
        method in ("GET", "POST") and re.search(r"filter|\.search", call.request.query + route)
    ):
        return f"Look up {thing}" if thing else f"Call {route or call.request.path[:80]}"
    if method == "GET" and "{id}" not in route:
        return f"List {thing}s"
    states = [str(value).lower() for _, path, value in sent if path.lower() == "active"]
    if method == "PATCH" and thing == "user" and states:
        return "Deactivate user" if states[-1] == "false" else "Activate user"
    counts = {"add": 0, "remove": 0, "set": 0}
    for op, path, value in sent if method == "PATCH" else ():
        if path.lower().startswith("members"):
            counts[op if op in counts else "set"] += len(member_ids(path, value))
    parts = [f"{op} {count} member{'s' * (count > 1)}" for op, count in counts.items() if count]
    link = "to" if parts and parts[-1].startswith("add") else "of"
    return (
        f"{' and '.join(parts)} {link}".capitalize()
        if parts
        else f"{VERBS.get(method, method)} {thing}"
    )


def name_of(session: Session, call: LoggedCall, id: str, body: Json) -> str:
    """Return the name of whom a call concerns, as far as anybody knows it."""

    def candidates() -> Iterator[Mapping[str, Json]]:
        yield call.resource
        yield body if isinstance(body, dict) else {}
        if row := session.find(call.type, id):
            yield row.attributes
        elif employee := session.employee_of(id):
            yield employee.record
        filter = dict(parse_qsl(call.request.query)).get("filter", "")
        if not SECRET.search(filter) and (literal := re.search(r'eq "(.*?)"', filter)):
            yield {"name": literal[1]}

    names = (
        known.get(name) for known in candidates() for name in ("displayName", "userName", "name")
    )
    return next((name for name in names if name and isinstance(name, str)), "")


def masked(value: Json) -> Json:
    """Return a body with the values of secrets hidden, in a PATCH too."""
    if not isinstance(value, dict):
        return [masked(item) for item in value] if isinstance(value, list) else value
    hidden = SECRET.search(
        " ".join(str(item) for name, item in value.items() if name.lower() == "path")
    )
    return {
        name: "•••" if SECRET.search(name) or (hidden and name.lower() == "value") else masked(item)
        for name, item in value.items()
    }


def describe(session: Session, call: LoggedCall) -> tuple[int, str, Json]:
    """Return the level (0 done, 1 doubtful, 2 refused), the id concerned and the log entry of a call."""
    request, status, refused = call.request, call.response.status, call.response.status >= 400
    body, raw = request.body, ""
    if isinstance(body, bytes):
        raw, body = body.decode("utf-8", "replace"), None
        with suppress(ValueError, RecursionError):
            body = json.loads(raw)
    sent = list(sent_values(body)) if call.type else []
    notes = (
        [refusal(call, raw or to_json(body))] if refused else list(findings(session, call, sent))
    )
    in_path = unquote(request.path.rstrip("/").split("/")[-1])
    id = call.resource.get("id") or (in_path if "{id}" in call.response.route and call.type else "")
    entry = {
        "at": time_text(call.instant),
        "token": call.token.name,
        "operation": in_words(call, sent),
        "type": call.type,
        "name": name_of(session, call, id, body)[:200],
        "status": status,
        "id": request.id,
        "milliseconds": round(call.seconds * 1000, 1),
        "method": request.method,
        "path": request.path[:500],
        "client": request.client,
        "attributes": list(dict.fromkeys(path for _, path, _ in sent))[:50],
        "detail": notes[0][4:] if refused else "",
        "notes": [explain(note, call) for note in dict.fromkeys(notes)],
    }
    if call.tenant.log_bodies and body is not None:
        entry["body"] = masked(body)
    return 2 if refused else int(bool(notes)), id, entry


def write_log(store: Store, calls: Sequence[LoggedCall]) -> None:
    """Store calls of one tenant in its log, each token's last use, and when a step of the set-up was done first."""
    logged = [call for call in calls if call.logged]
    uses = {call.token.name: call.instant for call in calls if call.response.status != 401}
    with store.reading() as session:
        rows = [describe(session, call) for call in logged]
    with store.writing() as session:
        session.note_requests(rows, calls[-1].tenant.keep_log)
        for token, instant in uses.items():
            session.set_setting(f"used {token}", time_text(instant))
        for call, (level, _, entry) in zip(logged, rows, strict=True):
            done = [step for step, operation, _, _ in STEPS if operation == entry["operation"]]
            done += ["custom"] if call.resource.get(FACILIO) and entry["attributes"] else []
            for step in done if level < 2 else ():
                if not session.setting(f"first {step}"):
                    session.set_setting(f"first {step}", entry["at"])


class BackgroundWriter:
    """Items that a daemon thread hands to write, together with what comes in a pause of seconds.

    Nobody waits for it: an item that finds limit others waiting is lost; lost counts them. write must not raise.
    """

    def __init__(self, write: Callable[[list[Any]], None], pause: float, limit: int) -> None:
        self._write, self._pause, self._limit = write, pause, limit
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock, self._hurry, self.lost = threading.Lock(), threading.Event(), 0
        self._thread: threading.Thread | None = None

    def add(self, item: Any) -> None:
        """Have an item written, or count it as lost."""
        if self._items.qsize() >= self._limit:
            self.lost += 1
            return
        self._items.put(item)
        with self._lock:
            if not self._thread:
                thread = threading.Thread(target=self._run, daemon=True)
                with suppress(RuntimeError):  # of no more threads: the next item tries again
                    thread.start()
                    self._thread = thread

    def close(self, seconds: float = 5) -> None:
        """Write what waits, for so long at the most; a later item starts another thread."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread:
            self._hurry.set()
            self._items.put(None)
            thread.join(seconds)
            self._hurry.clear()

    def _run(self) -> None:
        batch: list[Any] = []
        while None not in batch:
            batch = [self._items.get()]
            self._hurry.wait(self._pause)
            batch += [self._items.get() for _ in range(self._items.qsize())]
            self._write([item for item in batch if item is not None])


class ProvisioningLog(BackgroundWriter):
    """Calls on their way to the logs of their tenants; lost counts those that could not be written."""

    def __init__(self) -> None:
        super().__init__(self._store, LOG_PAUSE, LOG_WAITING)
        self.strangers, self.strange_since = 0, ""  # calls with an unknown token

    def has_room(self, request: Request, response: Response) -> bool:
        """Return whether a call may be added: of reads that succeeded, which tell least, LOG_READS wait at most."""
        return request.method != "GET" or response.status >= 300 or self._items.qsize() < LOG_READS

    def add(self, call: LoggedCall) -> None:
        """Have a call written, without long bodies and long lists."""
        body, answer = call.request.body, call.response.body
        if isinstance(answer, dict) and len(answer.get("Resources", ())) > 2:
            call = replace(
                call, response=call.response._replace(body={"Resources": answer["Resources"][:2]})
            )
        if isinstance(body, bytes) and len(body) > LOGGED_BODY:
            call = replace(call, request=call.request._replace(body=b""))
        super().add(call)

    def add_stranger(self, at: str) -> None:
        """Count a call with an unknown token, which belongs to no tenant."""
        with self._lock:
            self.strangers, self.strange_since = self.strangers + 1, self.strange_since or at

    def _store(self, batch: list[LoggedCall]) -> None:
        for store in dict.fromkeys(call.directory.store for call in batch):
            calls = [call for call in batch if call.directory.store is store]
            try:
                write_log(store, calls)
            except Exception:  # noqa: BLE001  trouble with the log is none of the sync
                self.lost += len(calls)


# ----------------------------------------------------------------------------
# 14. Other endpoints
#
# Employees, changes, the console's API, health and metrics.
# Uses chapters 1 to 13. Knows nothing of sockets.
# ----------------------------------------------------------------------------

# -- Employees and changes --


def list_employees(call: Call) -> Response:
    """Answer GET /employees: those behind a cursor, as JSON or, where Accept asks for it, CSV."""
    active = call.parameters.get("active", "").lower()
    if active not in ("", "true", "false"):
        raise invalid_value(f"active: expected true or false, got {quoted(active)}")
    count = call.integer("count", DEFAULT_COUNT, 1, MAX_COUNT)
    found = list(
        itertools.islice(
            call.directory.employees(
                active == "true" if active else None,
                call.parameters.get("changed_since", ""),
                call.integer("id", 0) if "id" in call.parameters else None,
                call.integer("cursor", 0),
            ),
            count + 1,
        )
    )
    headers, cursor = {}, {}
    if len(found) > count:
        found.pop()
        cursor = {"nextCursor": str(found[-1].id)}
        query = urlencode({**call.parameters, "cursor": found[-1].id})
        headers["Link"] = f'<{call.base_url.removesuffix(BASE_PATH)}/employees?{query}>; rel="next"'
    if "text/csv" in call.request.headers.get("accept", ""):
        table = employee_table(found, call.directory.link_names)
        return plain_response("".join(employee_csv(table)), "text/csv; charset=utf-8", **headers)
    return plain_response({"employees": list(map(asdict, found)), **cursor}, **headers)


def get_employee(call: Call) -> Response:
    """Answer GET /employees/{id}."""
    id = int(call.id) if re.fullmatch(r"\d{1,18}", call.id, re.ASCII) else 0
    if not (found := next(call.directory.employees(id=id), None)):
        raise ScimError(404, "", f"employee {quoted(call.id)} does not exist")
    return plain_response(asdict(found))


def list_changes(call: Call) -> Response:
    """Answer GET /changes: what came behind a number; waits for it where nothing has."""
    after, wait = call.integer("after", 0), call.integer("wait", 0, 0, MAX_WAIT)
    found = call.directory.changes(after, wait, call.integer("count", MAX_COUNT, 1, MAX_COUNT))
    return plain_response(
        {"changes": list(map(asdict, found)), "after": found[-1].seq if found else after}
    )


# -- The console's API ---------------------------------------------------------------

MAPPING = (  # source in Entra ID, customappsso attribute, what is to be changed
    ("userPrincipalName", "userName", "make it required, matching precedence 1"),
    ("Not([IsSoftDeleted])", "active", "an expression, instead of Switch(…)"),
    ("objectId", "externalId", "instead of mailNickname"),
    ("userPrincipalName", 'emails[type eq "work"].value', "instead of mail"),
    ("displayName", "displayName", ""),
    ("jobTitle", "title", ""),
    ("givenName", "name.givenName", ""),
    ("surname", "name.familyName", ""),
    ("telephoneNumber", 'phoneNumbers[type eq "work"].value', ""),
    ("mobile", 'phoneNumbers[type eq "mobile"].value', ""),
    ("preferredLanguage", "preferredLanguage", ""),
    ("department", f"{ENTERPRISE}:department", ""),
    ("employeeId", f"{ENTERPRISE}:employeeNumber", ""),
    ("manager", f"{ENTERPRISE}:manager", ""),
)


def console_response(body: Json, type: str = "application/json", **headers: str) -> Response:
    """Return an answer for the console, which no cache keeps."""
    return plain_response(
        body, type, **{"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **headers}
    )


def page_response(page: str) -> Response:
    """Return the console; its policy lets run what is in the page and nothing else."""
    own = "; ".join(
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    )
    return console_response(
        page,
        "text/html; charset=utf-8",
        **{
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            f"connect-src 'self'; img-src data:; require-trusted-types-for 'script'; {own}",
        },
    )


def entra_mapping(directory: Directory) -> list[list[str]]:
    """Return rows of source, customappsso attribute, type for Entra, and what is to be changed."""
    types, rows = {"boolean": "Boolean", "integer": "Integer", "complex": "Reference"}, []
    fields = (
        ("", f"{FACILIO}:{name}", "custom field: choose its source")
        for name in directory.link_names
    )
    for source, target, change in (*MAPPING, *fields):
        path = parse_path(target, directory.resource_types["User"])
        type = (path.sub_attribute or path.attributes[-1]).type
        rows.append([source, target, types.get(type, "String"), change])
    return rows


def get_log(call: Call) -> Response:
    """Answer GET /console/api/log: entries newest first, those after or before a number."""
    found = call.directory.requests(
        call.integer("after", 0),
        call.integer("before", 0),
        call.integer("count", DEFAULT_COUNT, 1, MAX_COUNT),
        call.integer("level", 0),
        call.parameters.get("subject", ""),
        call.parameters.get("text", ""),
        call.integer("wait", 0, 0, MAX_WAIT),
    )
    return console_response({"entries": found, "lost": call.application.log.lost})


def get_setup(call: Call) -> Response:
    """Answer GET /console/api/setup: what to enter in Entra ID, and what came of it so far."""
    directory, log = call.directory, call.application.log
    tenant = call.caller[0]  # type: ignore[index]
    user_type, now = directory.resource_types["User"], directory.clock()
    with directory.store.reading() as session:
        steps = [
            {"title": title, "hint": hint, "at": session.setting(f"first {step}")}
            for step, _, title, hint in STEPS
            if tenant.custom_fields or step != "custom"
        ]
    return console_response(
        {
            "tenant": tenant.name,
            "url": call.base_url,
            "steps": steps,
            "lost": log.lost,
            "tokens": [
                {
                    "name": token.name,
                    "last_use": directory.last_use(token.name),
                    "expires": time_text(token.expires) if token.expires else "",
                    "expired": token.expired(now),
                }
                for token in tenant.tokens
            ],
            "last": directory.requests(count=1),
            "refused": directory.requests(text='"status":401'),
            "strangers": log.strangers,
            "strange_since": log.strange_since,
            "mapping": entra_mapping(directory),
            "fields": [
                {
                    **asdict(custom),
                    "urn": custom.urn,
                    "people": directory.query(
                        user_type, parse_filter(f"{custom.urn} pr", user_type), count=0
                    ).total_results,
                }
                for custom in tenant.custom_fields
            ],
        }
    )


def get_mapping(call: Call) -> Response:
    """Answer GET /console/api/mapping: the attribute mapping as CSV."""
    table = [
        ["Entra ID source", "customappsso attribute", "type", "change"],
        *entra_mapping(call.directory),
    ]
    return console_response("".join(employee_csv(table)), "text/csv; charset=utf-8")


def get_entra_schema(call: Call) -> Response:
    """Answer GET /console/api/schema: customappsso as Entra's schema editor (Microsoft Graph) has it."""
    attributes = [
        {
            "name": target,
            "type": type,
            "required": target == "userName",
            "anchor": False,
            "caseExact": False,
            "multivalued": False,
            "mutability": "ReadWrite",
            "defaultValue": None,
            "flowNullValues": False,
            "apiExpressions": [],
            "metadata": [],
            "referencedObjects": [{"referencedObjectName": "User", "referencedProperty": None}]
            if type == "Reference"
            else [],
        }
        for _, target, type, _ in entra_mapping(call.directory)
    ]
    return console_response(
        {
            "directories": [
                {"name": "customappsso", "objects": [{"name": "User", "attributes": attributes}]}
            ]
        }
    )


def get_history(call: Call) -> Response:
    """Answer GET /console/api/history/{id}: a user's employee, and the changes of a user or group."""
    employee, changes = call.directory.history(call.id)
    return console_response(
        {"employee": employee and asdict(employee), "changes": list(map(asdict, changes))}
    )


class Metrics:
    """Counts of what was answered, as Prometheus reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str, str, int], tuple[int, float]] = {}

    def add(self, method: str, response: Response, seconds: float) -> None:
        """Count an answer."""
        key = (response.tenant, method, response.route, response.status)
        with self._lock:
            count, total = self._counts.get(key, (0, 0.0))
            self._counts[key] = (count + 1, total + seconds)

    def text(self) -> str:
        """Return all counts in the text format of Prometheus."""
        with self._lock:
            counts = sorted(self._counts.items())
        lines = []
        for number, name, help in (
            (0, "scim_requests_total", "Requests answered"),
            (1, "scim_request_seconds_total", "Seconds spent on them"),
        ):
            lines += [f"# HELP {name} {help}", f"# TYPE {name} counter"]
            lines += [
                f'{name}{{tenant="{tenant}",method="{method}",route="{route}",status="{status}"}} '
                f"{values[number]:g}"
                for (tenant, method, route, status), values in counts
            ]
        return "\n".join(lines) + "\n"


# -- For the operator: no tenant's token, and nothing of a tenant --------------------


def get_readiness(application: Any, request: Request) -> Response:
    """Answer GET /readyz: the database of each tenant answers."""
    served = application.available
    with suppress(sqlite3.Error):
        for directory in served:
            directory.last_use("")
        if len(served) == len(application.directories):
            return plain_response("ready\n", "text/plain")
    return Response(503, "not ready\n", {"Content-Type": "text/plain", **RETRY})


def get_metrics(application: Any, request: Request) -> Response:
    """Answer GET /metrics, for this machine or with the token that the configuration names."""
    local = (
        request.client in ("127.0.0.1", "::1")
        and not {"forwarded", "x-forwarded-for"} & request.headers.keys()
    )
    if not local and digest(credentials_of(request)[1]) != application.config.metrics_sha256:
        return error_response(
            ScimError(
                401,
                "",
                "/metrics: on loopback, or with metrics_token as bearer token",
                {"WWW-Authenticate": "Bearer"},
            )
        )
    return plain_response(application.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")


# ----------------------------------------------------------------------------
# 15. Application                                           RFC 7644 §2, §3.12
#
# handle(Request) -> Response: token to tenant, path to operation, every failure
# to a SCIM error.
# Uses chapters 1 to 14. Knows nothing of sockets.
# ----------------------------------------------------------------------------

OPEN_TENANTS = 64  # whose files are kept open


# -- Routes ------------------------------------------------------------------------

Operate = Callable[[Call], Response]
Route = tuple[dict[str, Operate], str]  # operations by method, and the path for the logs
ROUTES: dict[str, dict[str, Operate]] = {  # those with a slash in front are outside of BASE_PATH
    "": {"GET": list_resources},
    **{
        path: {"GET": get_published}
        for path in (
            "ServiceProviderConfig",
            "Schemas",
            "Schemas/{id}",
            "ResourceTypes",
            "ResourceTypes/{id}",
        )
    },
    "Bulk": {"POST": run_bulk},
    ".search": {"POST": search_resources},
    "{type}/.search": {"POST": search_resources},
    "{type}": {"GET": list_resources, "POST": create_resource},
    "{type}/{id}": {
        "GET": get_resource,
        "PUT": replace_resource,
        "PATCH": patch_resource,
        "DELETE": delete_resource,
    },
    "/employees": {"GET": list_employees},
    "/employees/{id}": {"GET": get_employee},
    "/changes": {"GET": list_changes},
    **{
        f"/console/api/{name}": {"GET": operate}
        for name, operate in (
            ("log", get_log),
            ("setup", get_setup),
            ("mapping", get_mapping),
            ("schema", get_entra_schema),
            ("history/{id}", get_history),
        )
    },
}
ROUTE_TABLE: dict[tuple[str, ...], Route] = {  # by the segments of the path; HEAD is as GET
    tuple(path.split("/")) if path else (): (
        methods | ({"HEAD": methods["GET"]} if "GET" in methods else {}),
        "/" + path.removeprefix("/"),
    )
    for pattern, methods in ROUTES.items()
    for path in (pattern.replace("{type}", endpoint) for endpoint in ("Users", "Groups"))
}


def find_route(segments: Sequence[str]) -> Route | None:
    """Return the route of a path, literal ones first."""
    return ROUTE_TABLE.get(tuple(segments)) or ROUTE_TABLE.get((*segments[:-1], "{id}"))


QUICK, READ, WRITE, SLOW = "quick", "read", "write", "slow"  # shim

# By the first line of a request: what is answered in no time, somebody by id or by a name that few
# have; and writes of one resource, which those of others may share a commit with.
SHOWN = rb"((excludedA|a)ttributes=[\w.:,$%-]*|startIndex=\d{1,3}|count=\d{1,2})"
EQUALS = rb"(%20|\+)eq(%20|\+)%22([^%&\" ]|%(?!22))*%22"
USER_BY, GROUP_BY = (
    rb"filter=(userName|externalId)" + EQUALS,
    rb"filter=(displayName|externalId)" + EQUALS,
)
LOOKUP = re.compile(
    rb"GET /scim/v2/(Users/[^/?. ]+[? ]|"
    rb"Users\?(" + SHOWN + rb"&)*" + USER_BY + rb"(&" + SHOWN + rb")* |"
    rb"Groups\?(excludedAttributes=members&"
    + GROUP_BY
    + rb"|"
    + GROUP_BY
    + rb"&excludedAttributes=members) )"
)
SMALL_WRITE = re.compile(rb"(POST|PUT|PATCH|DELETE) /scim/v2/(Users|Groups)(/[\w-]+)? ")


class Application:
    """All tenants of a configuration behind one endpoint; the bearer token alone says which one.

    directories has each tenant's Directory by its name; a tenant whose file cannot be used has the StoreError
    instead: it is answered 503, the others are served. Of secrets only hashes are kept. authenticate, for a program
    that keeps tokens itself, takes a bearer token that no tenant has and returns a tenant's name, or None. page is
    the console, "" for none.
    """

    def __init__(
        self,
        config: Config,
        authenticate: Callable[[str], str | None] | None = None,
        clock: Clock = utc_now,
        new_id: Callable[[], str] = random_id,
        page: str = "",
    ) -> None:
        self.page = page if config.console else ""
        self.log = ProvisioningLog()
        self.metrics = Metrics()
        self.directories: dict[str, Directory | StoreError] = {}
        self._ask, self._clock, self._new_id = authenticate, clock, new_id
        self._awake: dict[str, Store] = {}  # whose files are open, oldest use first
        self._latest: Store | None = None
        self._tried = clock()
        self._configuring, self._waking = threading.RLock(), threading.Lock()
        self.configure(config)

    # -- Tenants --

    def configure(self, config: Config) -> None:
        """Serve a configuration's tenants from now on, known ones from their store; StoreError changes nothing."""
        make_data_dir(config)
        with self._configuring:
            before = self.directories
            self.directories = {
                tenant.name: self._open(config, tenant) for tenant in config.tenants
            }
            # A hook or a file that is tried again may take long; in memory readers wait for who writes.
            self._slow = (
                bool(self._ask)
                or config.data_dir == ":memory:"
                or len(self.available) < len(config.tenants)
            )
            hashed = tuple(
                replace(tenant, tokens=tuple(replace(token, secret="") for token in tenant.tokens))
                for tenant in config.tenants
            )
            self.config = replace(config, tenants=hashed)
            self.tenants = {tenant.name: tenant for tenant in hashed}
            self._tokens = {
                token.sha256: (tenant, token) for tenant in hashed for token in tenant.tokens
            }
        for name in before.keys() - self.directories.keys():
            if isinstance(gone := before[name], Directory):
                gone.store.interrupt()
                gone.store.rest()  # closed after each of the requests in flight

    def add_tenant(self, document: Json) -> Directory:
        """Serve a tenant, given as in a configuration, be it known; ConfigError and StoreError."""
        reader = ConfigReader()
        tenant = reader.tenant("tenant", document)
        with self._configuring:
            others = [one for one in self.config.tenants if one.name != tenant.name]
            if any(one.name.lower() == tenant.name.lower() for one in others):
                reader.wrong("tenant.name", "the same name as another tenant's, but for its case")
            for token in tenant.tokens:
                if (
                    other := self._tokens.get(token.sha256, (tenant, token))[0].name
                ) != tenant.name:
                    reader.wrong("tenant.tokens", f"the same token as that of {other}")
            if reader.problems:
                raise ConfigError(reader.problems)
            self.configure(replace(self.config, tenants=(*others, tenant)))
        return self.directory(tenant.name)

    def remove_tenant(self, name: str) -> None:
        """Serve a tenant no more; its file stays."""
        with self._configuring:
            self.configure(
                replace(
                    self.config,
                    tenants=tuple(one for one in self.config.tenants if one.name != name),
                )
            )

    def directory(self, name: str) -> Directory:
        """Return the directory of a tenant; KeyError, or StoreError where its file is no good."""
        found = self.directories[name]
        if isinstance(found, StoreError):
            raise found
        return found

    @property
    def available(self) -> list[Directory]:
        """The directories of the tenants whose files are good."""
        return [found for found in self.directories.values() if isinstance(found, Directory)]

    def token(self, name: str) -> str:
        """Return a new secret of a tenant, good until the next configuration; KeyError."""
        secret = secrets.token_urlsafe(32)
        with self._configuring:
            self._tokens = {**self._tokens, digest(secret): (self.tenants[name], Token("made", ""))}
        return secret

    def interrupt(self) -> None:
        """End all long polls, for good."""
        for directory in self.available:
            directory.store.interrupt()

    def close(self) -> None:
        """Write the logs and close the files; nobody may use the application afterwards."""
        self.log.close()
        for directory in self.available:
            directory.store.close()

    def _open(self, config: Config, tenant: Tenant) -> Directory | StoreError:
        """Return the directory of a tenant, the one that is in use where it fits, or why not."""
        known = self.directories.get(tenant.name)
        if isinstance(known, Directory) and known.custom_fields == tenant.custom_fields:
            known.keep, known.keep_days = config.keep_changes, config.keep_days
            return known
        try:
            store = (
                known.store if isinstance(known, Directory) else Store(store_path(config, tenant))
            )
            directory = Directory(
                store,
                tenant.custom_fields,
                self._clock,
                self._new_id,
                config.keep_changes,
                config.keep_days,
            )
            directory.claim(tenant.name)
        except StoreError as error:
            return error
        self._wake(tenant.name, directory)
        return directory

    # -- Requests --

    def handle(self, request: Request) -> Response:
        """Return the answer to a request; whatever goes wrong is a SCIM error (RFC 7644 §3.12)."""
        started = time.perf_counter()
        response, caller = self._answer(request)
        with suppress(Exception):  # whatever becomes of the log, the answer goes out
            self._note(request, response, caller, time.perf_counter() - started)
        return response

    def handle_all(self, requests: Sequence[Request]) -> list[Response]:
        """Return the answers to writes with the same Authorization: each whole or not at all, in one commit."""
        started, caller = time.perf_counter(), None
        try:
            if not (caller := self.caller(requests[0])):
                raise unauthorized()  # a hook is asked once
            if isinstance(directory := caller[2], StoreError):
                return list(map(self.handle, requests))
            with directory.store.writing():
                responses = [
                    self._answer(request._replace(caller=caller))[0] for request in requests
                ]
        except Exception as error:  # noqa: BLE001  also of the commit, which undoes all of them
            responses = [
                response_for(error)._replace(tenant=caller[0].name if caller else "")
            ] * len(requests)
        for request, response in zip(requests, responses, strict=True):
            with suppress(Exception):
                self._note(request, response, caller, time.perf_counter() - started)
        return responses

    def known_caller(self, request: Request) -> Caller | None:
        """Shim."""
        secret = credentials_of(request)[1]
        found = self._tokens.get(digest(secret)) if secret else None
        directory = self.directories.get(found[0].name) if found else None
        return (*found, directory) if found and directory else None

    def lane_of(self, request: Request) -> str:
        """Shim."""
        if not request.caller:
            return SLOW if self._ask else QUICK
        if "wait" in request.query or isinstance(request.caller[2], StoreError):
            return SLOW
        line = f"{request.method} {request.path}{'?' if request.query else ''}{request.query} "
        if self.is_quick(line.encode()):
            return QUICK
        if request.method in ("GET", "HEAD", "OPTIONS") or request.path.endswith("/.search"):
            return READ
        return WRITE

    def is_quick(self, line: bytes) -> bool:
        """Return whether a request, by its first line, is answered in no time."""
        return not self._slow and LOOKUP.match(line) is not None

    def _note(
        self, request: Request, response: Response, caller: Caller | None, seconds: float
    ) -> None:
        """Put a call of a tenant's client on its log; a call with an unknown token is counted."""
        lost_its_way = response.status == 404 and not response.route
        # Reading what the sync did is no part of it.
        logged = (request.path.startswith(BASE_PATH) or lost_its_way) and not (
            request.method == "GET" and "x-console" in request.headers
        )
        if not caller and logged and response.status == 401:
            self.log.add_stranger(time_text(self._clock()))
        if not caller or isinstance(directory := caller[2], StoreError):
            return  # there is no log
        if self.log.has_room(request, response):
            logged_request = Request(
                request.method,
                request.path,
                request.query,
                {},
                request.body,
                client=request.client,
                id=request.id,
            )  # without headers, which hold the secret
            self.log.add(
                LoggedCall(
                    self._clock(), *caller[:2], directory, logged_request, response, seconds, logged
                )
            )
        else:
            self.log.lost += logged

    def _answer(self, request: Request) -> tuple[Response, Caller | None]:
        caller, route = None, ""
        try:
            segments = [
                unquote(part) if "%" in part else part for part in request.path.split("/") if part
            ]
            if public := PUBLIC.get(path := "/".join(segments)):
                return public(self, request)._replace(route=f"/{path}"), None
            if request.path == "/" and request.method in ("GET", "HEAD") and self.page:
                return page_response(self.page)._replace(route="/"), None
            caller = self.caller(request)
            inside = f"/{'/'.join(segments[:2])}" == BASE_PATH
            segments = segments[2:] if inside else ["", *segments]
            found = (
                find_route(segments)
                if inside or self.page or segments[1:2] != ["console"]
                else None
            )
            directory = self._authenticate(request, caller) if inside or found else None
            if segments[:1] == ["Me"]:
                raise ScimError(
                    501, "", "/Me: a bearer token stands for a tenant, not for a person"
                )
            if not found or not directory:
                raise ScimError(
                    404,
                    "",
                    f"{request.path} does not exist (case matters); "
                    f"Users and Groups follow {BASE_PATH}",
                )
            methods, route = found
            response = self._dispatch(request, caller, directory, segments, methods)
        except Exception as error:  # noqa: BLE001  a bug of ours must not cut the connection
            response = response_for(error)
        tenant = caller[0].name if caller and response.status != 401 else ""
        return Response(response.status, response.body, response.headers, tenant, route), caller

    def body_limit(self, path: str) -> int:
        """Return how many octets the body of a request to a path may have."""
        return MAX_BULK_BODY if path == f"{BASE_PATH}/Bulk" else MAX_BODY

    def caller(self, request: Request) -> Caller | None:
        """Return the tenant and the token that a request names, be it expired; None for nobody's."""
        if request.caller:
            return request.caller
        secret = credentials_of(request)[1]
        found = self._tokens.get(digest(secret)) if secret else None
        if secret and not found and self._ask:
            try:
                name = self._ask(secret)
            except (Exception, SystemExit) as error:  # noqa: BLE001  its text may hold the secret
                raise ScimError(
                    503, "", f"the authenticate hook failed ({type(error).__name__})", RETRY
                ) from None
            tenant = self.tenants.get(name) if isinstance(name, str) else None
            found = (tenant, Token("authenticate", "")) if tenant else None
        directory = (
            self.directories.get(found[0].name) if found else None
        )  # None: removed at this moment
        return (*found, directory) if found and directory else None

    def _authenticate(self, request: Request, caller: Caller | None) -> Directory:
        """Return the directory that a request is for, in the name of its token."""
        scheme, now = credentials_of(request)[0], self._clock()
        if not caller or scheme.lower() != "bearer" or caller[1].expired(now):
            raise unauthorized()
        tenant, token, directory = caller
        if isinstance(directory, StoreError):
            directory = self._retried(tenant, now)
        self._wake(tenant.name, directory)
        return directory.on_behalf_of(token.name)

    def _retried(self, tenant: Tenant, now: datetime) -> Directory:
        """Return the directory of a tenant that could not be opened, tried again now; ScimError 503."""
        found = self.directories.get(tenant.name)
        if now - self._tried > timedelta(seconds=RETRY_SECONDS):
            with self._configuring:
                self._tried = now
                if known := self.tenants.get(tenant.name):  # else it was removed meanwhile
                    found = self.directories[tenant.name] = self._open(self.config, known)
        if not isinstance(found, Directory):
            raise ScimError(
                503, "", "the tenant's database cannot be used; the server's log says why", RETRY
            )
        return found

    def _wake(self, tenant: str, directory: Directory) -> None:
        """Note the use of a tenant; of more than OPEN_TENANTS the one not used longest rests."""
        if self._latest is not directory.store:
            with self._waking:  # not configuring, which may wait for who writes
                self._latest = directory.store
                directory.store.resting = False
                self._awake.pop(tenant, None)
                self._awake[tenant] = directory.store
                if len(self._awake) > OPEN_TENANTS:
                    self._awake.pop(next(iter(self._awake))).rest()

    def _dispatch(
        self,
        request: Request,
        caller: Caller | None,
        directory: Directory,
        segments: list[str],
        methods: Mapping[str, Operate],
    ) -> Response:
        if request.method not in methods:
            allow = {"Allow": ", ".join([*methods, "OPTIONS"])}
            if request.method == "OPTIONS":
                return Response(204, headers=allow)
            raise ScimError(
                405,
                "",
                f"{request.method} is not for {request.path}; it takes {allow['Allow']}",
                allow,
            )
        query = parse_qsl(request.query, keep_blank_values=True) if request.query else ()
        endpoint, *rest = segments or [""]
        types = tuple(directory.resource_types.values())
        asked = tuple(found for found in types if found.endpoint == f"/{endpoint}") or types
        return methods[request.method](
            Call(
                request,
                directory,
                asked[0],
                asked,
                endpoint,
                rest[-1] if rest else "",
                {name.lower(): value for name, value in query},
                Precondition(
                    request.headers.get("if-match", ""), request.headers.get("if-none-match", "")
                ),
                f"{request.scheme}://{request.host}{request.mount_point}{BASE_PATH}",
                self,
                caller,
            )
        )


PUBLIC = {
    "healthz": lambda application, request: plain_response(
        "ok\n", "text/plain"
    ),  # the process is up
    "readyz": get_readiness,
    "metrics": get_metrics,
}


# ----------------------------------------------------------------------------
# 16. HTTP server                                         RFC 9110, RFC 9112
#
# Octets become a Request and a Response becomes octets: strict framing, limits,
# keep-alive. One thread watches all connections and answers what is quick, reads
# have a lane, writes have another. The parser is sans-IO: it reads a buffer and
# knows no socket. The head has our own parser, because the one of http.server
# accepts what two readers could frame in two ways.
# Uses chapters 1 and 9 to 15. Knows nothing of SCIM but the form of its errors.
# ----------------------------------------------------------------------------

MAX_REQUEST_LINE, MAX_HEAD, MAX_CHUNK_LINE = 8 * 1024, 32 * 1024, 1024  # octets
MAX_FIELDS = 100
HEAD_SECONDS = 10  # for a head, a TLS handshake or the first octet of a body to arrive
MIN_OCTETS_PER_SECOND = 1024  # of a body, in both directions
IDLE_SECONDS = 65
LINGER_SECONDS = 1
STOP_SECONDS = 10  # how long a stopping server waits for requests in flight
SWEEP_SECONDS = 1  # how often deadlines are checked
PAUSE_SECONDS = 0.05  # how long a read waits for its turn, or a full server before it accepts
MAX_READ_THREADS = 8  # the store has more readers, so that a quick look-up never waits for one
MAX_WRITE_THREADS = 8  # one tenant uses at most one of them
MAX_WRITES_PER_COMMIT = 64
CHUNKS_PER_ROUND = 64  # of a body, before the other connections have their turn
RECEIVE_OCTETS = 16 * 1024  # at a time; also the size of a TLS record, of which nothing remains
LOG_LINES = 10_000  # that may wait for the access log
LOG_SECONDS = 0.05  # how long a line of the access log waits for others
MAX_EXCHANGES = 1_000  # that are kept for a test to inspect
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/(\d)\.(\d)\r\n")
FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)\r\n")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
ABSOLUTE_FORM = re.compile(r"https?://([^/?]+)(.*)", re.IGNORECASE)
AUTHORITY = re.compile(r"[A-Za-z0-9._~%!$&'()*+,;=-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")
LENGTH = re.compile(r"\d{1,19}", re.ASCII)
BULK_PATH = f"{BASE_PATH}/Bulk"
IDLE, READING, ANSWERING, SENDING, LINGERING = (
    "idle",
    "reading",
    "answering",
    "sending",
    "lingering",
)
KEEP, CLOSE, LINGER = "keep", "close", "linger"  # what becomes of a connection after an answer
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
FileSignature = list[tuple[int, int]]
Reading = Generator[bool, None, bytes]
http_date = lru_cache(2)(partial(formatdate, usegmt=True))  # the Date field of one second


def log_line(text: str) -> None:
    """Print a line for the operator."""
    print(f"scim_server: {text}", file=sys.stderr, flush=True)


# -- The parser: generators that read a buffer --
#
# A reader takes octets from the front of a buffer that somebody else fills, and returns a value. It
# yields False while octets are missing, and True when it only lets other connections have a turn.


class Head(NamedTuple):
    """The head of a request: its header names are in lower case."""

    method: str
    target: str
    minor_version: int  # of HTTP/1
    headers: dict[str, str]


def read_exactly(buffer: bytearray, length: int) -> Reading:
    """Read a number of octets."""
    while len(buffer) < length:
        yield False
    octets = bytes(buffer[:length])
    del buffer[:length]
    return octets


def read_until(buffer: bytearray, mark: bytes, limit: int, status: int, detail: str) -> Reading:
    """Read up to a mark and including it; ScimError of that status beyond limit octets."""
    while (end := buffer.find(mark, 0, limit)) < 0:
        if len(buffer) > limit:
            raise ScimError(status, "", detail)
        yield False
    return (yield from read_exactly(buffer, end + len(mark)))


def read_head(buffer: bytearray) -> Generator[bool, None, Head]:
    """Read the head of a request (RFC 9112 §3, §5); ScimError 400, 414, 431 or 505."""
    limits = (MAX_REQUEST_LINE, 414, f"the request line is longer than {MAX_REQUEST_LINE} octets")
    line = yield from read_until(buffer, b"\n", *limits)
    if line == b"\r\n":  # RFC 9112 §2.2: one empty line before a request is ignored
        line = yield from read_until(buffer, b"\n", *limits)
    if not (start := REQUEST_LINE.fullmatch(line)):
        raise ScimError(400, "", "the request line is malformed")
    if start[3] != b"1":
        raise ScimError(505, "", "this server speaks HTTP/1.1")
    # The end of the request line goes back, so that a head without fields ends like the others.
    buffer[:0] = b"\r\n"
    detail = f"the header fields take more than {MAX_HEAD} octets"
    fields = yield from read_until(buffer, b"\r\n\r\n", MAX_HEAD, 431, detail)
    headers = parse_fields(fields)
    check_framing(headers, int(start[4]))
    return Head(start[1].decode(), start[2].decode(), int(start[4]), headers)


def parse_fields(fields: bytes) -> dict[str, str]:
    """Return header fields, which stand between line ends, by names in lower case; ScimError."""
    headers: dict[str, str] = {}
    position, end = 2, len(fields) - 2
    while position < end:
        if not (field_line := FIELD_LINE.match(fields, position)):
            raise ScimError(400, "", "a header field is malformed")
        position = field_line.end()
        name = field_line[1].decode().lower()
        value = field_line[2].rstrip(b" \t").decode("latin-1")
        if name in headers and name in ("host", "content-length", "transfer-encoding"):
            raise ScimError(400, "", f"{name}: given twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if fields.count(b"\n") > MAX_FIELDS + 2:
        raise ScimError(431, "", f"there are more than {MAX_FIELDS} header fields")
    return headers


def check_framing(headers: Mapping[str, str], minor_version: int) -> None:
    """Raise ScimError 400 for a head whose framing is ambiguous: request smuggling, RFC 9112 §6."""
    host, length, coding = map(headers.get, ("host", "content-length", "transfer-encoding"))
    if (host is None and minor_version > 0) or (host and not AUTHORITY.fullmatch(host)):
        raise ScimError(400, "", "host: expected one host name or address with an optional port")
    if length is not None and not LENGTH.fullmatch(length):
        raise ScimError(400, "", "content-length: expected a number")
    if coding and (length is not None or minor_version == 0):
        raise ScimError(400, "", "transfer-encoding: not with content-length or HTTP/1.0")
    if coding and coding.lower() != "chunked":
        raise ScimError(400, "", "transfer-encoding: expected chunked alone")


def too_large(limit: int) -> ScimError:
    """Return the error for a body over the limit."""
    return ScimError(413, "", f"the body is larger than {limit} octets")


def read_chunks(buffer: bytearray, limit: int) -> Reading:
    """Read a chunked body (RFC 9112 §7.1), ignoring extensions and trailers; ScimError 400, 413."""
    malformed = ScimError(400, "", "the chunked body is malformed")
    read_line = partial(read_until, buffer, b"\n", MAX_CHUNK_LINE, 400, malformed.detail)
    body = bytearray()
    for number in itertools.count(1):
        if not (line := CHUNK_LINE.fullmatch((yield from read_line()))):
            raise malformed
        if not (size := int(line[1], 16)):
            break
        if len(body) + size > limit:
            raise too_large(limit)
        body += yield from read_exactly(buffer, size)
        if (yield from read_exactly(buffer, 2)) != b"\r\n":
            raise malformed
        if number % CHUNKS_PER_ROUND == 0:
            yield True
    for _ in range(MAX_FIELDS):  # trailers, up to an empty line
        if (yield from read_line()) == b"\r\n":
            return bytes(body)
    raise malformed


def host_and_target(target: str, host: str) -> tuple[str, str]:
    """Return host and path with query of a target, maybe a whole URL (RFC 9112 §3.2); ScimError."""
    if target.startswith("/") or target == "*":
        return host, target
    if not (parts := ABSOLUTE_FORM.fullmatch(target)) or not AUTHORITY.fullmatch(parts[1]):
        raise ScimError(400, "", "the request target is neither a path nor a URL")
    return parts[1], parts[2] if parts[2].startswith("/") else f"/{parts[2]}"


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """Return proto, host and for as the nearest proxy gives them (RFC 7239, else X-Forwarded-*)."""
    nearest = headers.get("forwarded", "").rpartition(",")[2]
    pairs = (pair.partition("=") for pair in nearest.split(";"))
    fields = {name.strip().lower(): value.strip(' "') for name, _, value in pairs}
    return {
        name: fields.get(name) or headers.get(f"x-forwarded-{name}", "").rpartition(",")[2].strip()
        for name in ("proto", "host", "for")
    }


# -- TLS and the access log --


def file_signature(*files: str) -> FileSignature:
    """Return time and size of files, so that a change shows; [] if one is missing.

    The size tells a half-written file from the whole one, which may have the same time.
    """
    with suppress(OSError):
        return [(status.st_mtime_ns, status.st_size) for status in map(os.stat, files)]
    return []


class Tls:
    """The TLS context of a certificate and its key; OSError if they cannot be used."""

    def __init__(self, *files: str) -> None:
        self._files, self._signature = files, file_signature(*files)
        try:
            self._context = self._load()
        except OSError as error:
            raise OSError(f"tls: {' and '.join(files)}: cannot be used ({error})") from error

    def context(self) -> ssl.SSLContext:
        """Return the context for a new connection, loaded again if the files have changed."""
        with suppress(OSError):
            if (signature := file_signature(*self._files)) != self._signature:
                try:
                    self._context = self._load()
                except ssl.SSLError as error:
                    files = " and ".join(self._files)
                    log_line(f"{files}: cannot be used ({error}); keeping the previous certificate")
                self._signature = signature  # also of unusable files, so that this is logged once
        return self._context

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._files)
        return context


def request_writer(style: str, stream: TextIO) -> BackgroundWriter:
    """Return a writer of requests, dicts whose values hold no blank, as lines: text, json or off."""

    def text(line: dict[str, Any]) -> str:
        line["time"] = time_text(datetime.fromtimestamp(line["time"], UTC))
        values = [str(value) or "-" for value in line.values()]
        return json.dumps(line) if style == "json" else " ".join(values)

    def write(lines: list[dict[str, Any]]) -> None:
        with suppress(OSError, ValueError):  # the stream is broken or closed
            stream.write("".join(f"{text(line)}\n" for line in lines))
            stream.flush()

    return BackgroundWriter(write, LOG_SECONDS, 0 if style == "off" else LOG_LINES)


# -- Answers --


def body_text(body: Json) -> str:
    """Return the text of an answer's body; Encoded resources of a list are JSON text already."""
    if isinstance(body, str):
        return body
    if not isinstance(body, dict) or "Resources" not in body:
        return to_json(body)
    texts = (item if isinstance(item, Encoded) else to_json(item) for item in body["Resources"])
    return f"{to_json({**body, 'Resources': []})[:-2]}{','.join(texts)}]}}"


def to_http(response: Response, request: Request) -> tuple[str, list[tuple[str, str]], bytes]:
    """Return the status, the header fields and the body of an answer."""
    body = b"" if response.body is None else body_text(response.body).encode()
    fields = [("X-Request-Id", request.id), *response.headers.items()]
    if response.body is not None and "Content-Type" not in response.headers:
        fields.append(("Content-Type", "application/scim+json"))
    if response.status not in (204, 304):  # RFC 9110 §8.6: no length in a 204, no length 0 in a 304
        fields.append(("Content-Length", str(len(body))))
    status = f"{response.status} {http.client.responses.get(response.status, 'Other')}"
    return status, fields, b"" if request.method == "HEAD" else body


class Exchange(NamedTuple):
    """A request and its answer, for a test to inspect."""

    request: Request
    response: Response


@dataclass
class Fault:
    """A fault to inject into the next matching requests, to test a client."""

    status: int = 0  # of the answer instead; 401 as for an expired token, 412 as for ETags
    times: int = 1
    method: str = ""  # any if empty
    path: str = ""  # text that the path contains
    delay: float = 0  # seconds
    cut: bool = False  # close the connection in the middle of the answer's body
    headers: Mapping[str, str] = field(default_factory=dict)

    def matches(self, request: Request) -> bool:
        """Return whether this fault is for a request."""
        method = self.method.upper()
        return self.times > 0 and method in ("", request.method) and self.path in request.path

    def response(self) -> Response:
        """Return the answer that the status means."""
        conflict = "If-Match: the version has changed; read the resource again"
        retry = {"Retry-After": "1"} if self.status in (429, 503) else {}
        detail = conflict if self.status == 412 else "injected fault"
        error = unauthorized() if self.status == 401 else ScimError(self.status, "", detail, retry)
        error.headers.update(self.headers)
        return error_response(error)


# -- Connections and lanes --


class Connection:
    """A client: its socket, the octets that arrived, the answer that is not sent yet, a deadline.

    It belongs to the watching thread, except in the state ANSWERING, in which it belongs to the one
    thread that executes its request.
    """

    def __init__(self, socket: socket.socket, client: str) -> None:
        socket.setblocking(False)
        self.socket, self.client = socket, client
        self.events = 0  # what the selector watches the socket for
        self.since = time.monotonic()  # of the connection, or of the last request with a good token
        self.buffer = bytearray()  # arrived and not parsed yet
        self.reader: Generator[bool, None, Request] | None = None  # of the request that arrives now
        self.request: Request | None = None  # whose head has arrived
        self.minor_version, self.started = 1, 0.0
        self.unsent, self.then = memoryview(b""), KEEP
        self.authenticated = False  # whether the last request had a good token
        self.rest()

    def allow(self, seconds: float, pace: float = 0) -> None:
        """Set the deadline; each octet that arrives moves it by pace seconds."""
        self.deadline, self.pace = time.monotonic() + seconds, pace

    def receive(self) -> bool:
        """Move the octets that arrived to the buffer; return False if the client has closed."""
        try:
            octets = self.socket.recv(RECEIVE_OCTETS)  # which also does the TLS handshake
        except WOULD_BLOCK:
            return True
        except OSError:
            return False
        self.buffer += octets
        self.deadline += len(octets) * self.pace
        return bool(octets)

    def send(self, octets: bytes) -> None:
        """Send what the system takes without waiting and keep the rest in unsent."""
        self.unsent = memoryview(bytes(self.unsent) + octets if self.unsent else octets)
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except WOULD_BLOCK:
            pass
        except OSError:  # the client is gone
            self.unsent, self.then = memoryview(b""), CLOSE

    def has_unread(self) -> bool:
        """Return whether octets have arrived that were not received yet."""
        with suppress(OSError):  # nothing has arrived, or the connection has ended
            return bool(socket.socket.recv(self.socket, 1, socket.MSG_PEEK))
        return False

    def rest(self) -> None:
        """Wait for the next request."""
        self.state = IDLE
        self.allow(IDLE_SECONDS)

    @property
    def evictable(self) -> bool:
        """Whether it may be closed to make room: it is not executing, or sending to a good token."""
        return self.state != ANSWERING and not (self.state == SENDING and self.authenticated)

    def shut(self, how: int) -> None:
        """End receiving, sending or both; SSLSocket.shutdown() would end the encryption too."""
        with suppress(OSError):
            socket.socket.shutdown(self.socket, how)


def listen(config: Config) -> socket.socket:
    """Return a socket that listens where a configuration says; port 0 picks a free one. OSError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    address = (config.host, config.port)
    listener = socket.create_server(address, family=family, backlog=128)
    listener.setblocking(False)
    return listener


def url_of(config: Config, port: int) -> str:
    """Return the Tenant URL of a server on a port."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http{'s' * bool(config.tls)}://{host}:{port}{BASE_PATH}"


# -- The server --


class Watcher(http.server.HTTPServer, ABC):
    """One thread that watches all connections: accepts, receives, parses, sends the rest, closes.

    It alone uses the selector and the set of connections. A subclass reads, executes and refuses
    requests. A request in execution gives its connection back by finish(), from any thread.
    """

    def __init__(self, listener: socket.socket, tls: Tls | None, max_connections: int) -> None:
        super().__init__(("", 0), http.server.BaseHTTPRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_address = listener, listener.getsockname()
        self.tls, self.max_connections = tls, max_connections
        self.connections: set[Connection] = set()
        self.stopping, self.stopped = threading.Event(), threading.Event()
        self._lock = threading.Lock()  # for giving a connection back
        self._returned: deque[Connection] = deque()  # to go on with
        self._paused, self._swept = False, 0.0  # whether it accepts nothing now; the last sweep
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._alarm = socket.socketpair()  # the end to watch, the end to write to

    def serve_forever(self, poll_interval: float = SWEEP_SECONDS) -> None:
        """Watch all connections until stop(), and then until the requests in flight are answered."""
        self._alarm.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._selector.register(self.socket, selectors.EVENT_READ)
        while not self.stopping.is_set():
            self._round(poll_interval)
        if not self._paused:
            self._selector.unregister(self.socket)
        self.server_close()
        end = time.monotonic() + STOP_SECONDS
        while self.connections and time.monotonic() < end:
            self._round(PAUSE_SECONDS)
            for connection in [
                peer for peer in self.connections if peer.state in (IDLE, LINGERING)
            ]:
                if not connection.has_unread():
                    self._close(connection)
        for connection in list(self.connections):
            self._close(connection)
        for end_point in (self._selector, self._wakeup, self._alarm):
            end_point.close()

    def stop(self) -> None:
        """Accept nothing more, wait for the requests in flight, close all connections."""
        self.stopping.set()
        self._wake()
        self.stopped.wait()

    @abstractmethod
    def read_request(self, connection: Connection) -> Generator[bool, None, Request]:
        """Read the next request from the buffer of a connection; ScimError for one to refuse."""

    @abstractmethod
    def execute(self, connection: Connection, request: Request) -> None:
        """Have a request answered, at once or by another thread; finish() ends it."""

    @abstractmethod
    def refuse(self, connection: Connection, error: ScimError) -> None:
        """Answer a request that cannot be read, and close the connection after it."""

    def give_back(self, connection: Connection) -> None:
        """Go on with a connection whose request was answered; for the thread that answered it."""
        with self._lock:
            waits = connection.then == KEEP and not connection.unsent and not connection.buffer
            if waits and connection.events and not self.stopping.is_set():
                connection.rest()
                return
            self._returned.append(connection)
        self._wake()

    def guarded(self, connection: Connection, action: Callable[..., None], *arguments: Any) -> None:
        """Call a function; a bug in it ends no more than this connection."""
        try:
            action(*arguments)
        except Exception as error:  # noqa: BLE001
            response_for(error)  # prints it
            connection.then, connection.unsent = CLOSE, memoryview(b"")
            self.give_back(connection)

    def _wake(self) -> None:
        """Wake the watching thread."""
        with suppress(OSError):  # many wake-ups wait already, or the thread has ended
            self._alarm.send(b"!")

    def _round(self, seconds: float) -> None:
        """Wait for events, for some seconds at most, and do what is due."""
        paused, newcomer = self._paused, False
        if self._returned or paused:
            seconds = 0 if self._returned else PAUSE_SECONDS
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self.socket:
                newcomer = True
            elif key.fileobj is self._wakeup:
                self._wakeup.recv(RECEIVE_OCTETS)
            else:
                self.guarded(key.data, self._on_event, key.data)
        for _ in range(len(self._returned)):
            if (connection := self._returned.popleft()) in self.connections:
                self.guarded(connection, self._go_on, connection)
        if newcomer:  # may evict a connection, so those that have sent a request come first
            self._accept()
        elif paused:
            self._selector.register(self.socket, selectors.EVENT_READ)
            self._paused = False
        if (now := time.monotonic()) > self._swept + SWEEP_SECONDS:
            self._swept = now
            for connection in [peer for peer in self.connections if peer.deadline < now]:
                self.guarded(connection, self._on_deadline, connection)

    def _accept(self) -> None:
        """Accept a connection; at the limit, another one makes room, or the newcomer waits."""
        try:
            if len(self.connections) >= self.max_connections:
                self._evict()
            client_socket, address = self.get_request()
            with suppress(OSError):
                client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            if self.tls:  # the handshake is part of receiving
                client_socket = self.tls.context().wrap_socket(
                    client_socket, server_side=True, do_handshake_on_connect=False
                )
            connection = Connection(client_socket, address[0])
            if self.tls:
                connection.allow(HEAD_SECONDS)
        except BlockingIOError:  # another process has accepted it
            return
        except OSError:  # no room, no file descriptor is left, or the client has gone already
            self._selector.unregister(self.socket)
            self._paused = True
            return
        self.connections.add(connection)
        self._watch(connection, selectors.EVENT_READ)

    def _evict(self) -> None:
        """Close the connection that was without a request with a good token longest; OSError."""
        evictable = [peer for peer in self.connections if peer.evictable]
        for connection in sorted(evictable, key=lambda peer: peer.since):
            if not connection.has_unread():
                self._close(connection)
                return
        raise OSError("all connections are in use")

    def _watch(self, connection: Connection, events: int) -> None:
        """Have the selector watch a connection for events, or for none."""
        if events and connection.events:
            self._selector.modify(connection.socket, events, connection)
        elif events:
            self._selector.register(connection.socket, events, connection)
        elif connection.events:
            self._selector.unregister(connection.socket)
        connection.events = events

    def _close(self, connection: Connection) -> None:
        """Close a connection and forget it."""
        self._watch(connection, 0)
        connection.shut(socket.SHUT_WR)
        connection.socket.close()
        self.connections.discard(connection)

    def _on_event(self, connection: Connection) -> None:
        """Receive from a connection, or send to it what remains."""
        if connection.state == ANSWERING:
            with self._lock:  # it may be given back at this moment
                if connection.state == ANSWERING:
                    self._watch(connection, 0)
        elif connection.state == SENDING:
            connection.send(b"")
            self._go_on(connection)
        elif not connection.receive():
            self._close(connection)
        elif connection.state == LINGERING:
            connection.buffer.clear()
        elif connection.buffer:
            self._parse(connection)

    def _go_on(self, connection: Connection) -> None:
        """Do what comes after an answer, or after a part of a body that took its time."""
        if connection.unsent:
            connection.state = SENDING
            connection.allow(HEAD_SECONDS + len(connection.unsent) / MIN_OCTETS_PER_SECOND)
            self._watch(connection, selectors.EVENT_WRITE)
        elif connection.then == CLOSE:
            self._close(connection)
        elif connection.then == LINGER:
            # Unread octets would make the system reset the connection, and the answer be lost.
            connection.state = LINGERING
            connection.shut(socket.SHUT_WR)
            connection.allow(LINGER_SECONDS)
            self._watch(connection, selectors.EVENT_READ)
        else:
            if connection.state != READING:
                connection.rest()
            self._watch(connection, selectors.EVENT_READ)
            if connection.buffer:
                self._parse(connection)

    def _on_deadline(self, connection: Connection) -> None:
        """Close a connection that was silent or slow for too long; answer a request that began."""
        if connection.state == READING:
            detail = f"the request took too long: its head must arrive within {HEAD_SECONDS} s, "
            detail += f"its body at {MIN_OCTETS_PER_SECOND} octets a second"
            self.refuse(connection, ScimError(408, "", detail))
        elif connection.state != ANSWERING:
            self._close(connection)

    def _parse(self, connection: Connection) -> None:
        """Parse what has arrived, and execute or refuse the request that it is."""
        if connection.state == IDLE:
            connection.state, connection.started = READING, time.perf_counter()
            connection.allow(HEAD_SECONDS)
        connection.reader = connection.reader or self.read_request(connection)
        try:
            if next(connection.reader):
                self._returned.append(connection)
            return
        except StopIteration as end:
            request: Request | ScimError = end.value
        except ScimError as error:
            request = error
        connection.reader, connection.state = None, ANSWERING
        if isinstance(request, ScimError):
            self.refuse(connection, request)
        else:
            self.execute(connection, request)


class ScimServer(Watcher):
    """An application on a socket. See url; running() starts and stops it.

    Its configuration says where it listens, with what TLS and for how many connections. To test a
    client, append to faults, and set exchanges to a list: it then holds the last requests and
    answers. Raises OSError if the address or the certificate cannot be used.

    Quick requests are answered by the watching thread. Other reads take turns in a lane: threads
    that compete for the interpreter at each call of SQLite halve what all of them get done. The
    writes that wait for one tenant share a transaction.
    """

    def __init__(self, application: Application, listener: socket.socket | None = None) -> None:
        self.application, self.config = application, application.config
        tls = Tls(*self.config.tls) if self.config.tls else None
        super().__init__(listener or listen(self.config), tls, self.config.max_connections)
        self.url = url_of(self.config, self.server_address[1])
        self.token, self.directory = application.token, application.directory  # for tests
        self.faults: list[Fault] = []
        self.exchanges: list[Exchange] | None = None
        self.log = request_writer(self.config.access_log, sys.stderr)
        self._request_ids = map(f"{secrets.token_hex(4)}-{{}}".format, itertools.count(1))
        self._readers, self._turn = ThreadPoolExecutor(MAX_READ_THREADS), threading.Lock()
        self._writers = ThreadPoolExecutor(MAX_WRITE_THREADS)
        self._writes: dict[str, list[tuple[Connection, Request]]] = {}  # that wait, by tenant

    def serve_forever(self, poll_interval: float = SWEEP_SECONDS) -> None:
        """Serve until stop()."""
        super().serve_forever(poll_interval)
        self._readers.shutdown(wait=False)
        self._writers.shutdown(wait=False)
        self.log.close(1)
        self.stopped.set()

    def stop(self) -> None:
        """Accept nothing more, end long polls, wait for the other requests, close everything."""
        self.application.interrupt()
        super().stop()

    # -- Requests --

    def read_request(self, connection: Connection) -> Generator[bool, None, Request]:
        """Read the next request from the buffer of a connection; ScimError for one to refuse."""
        connection.request = None
        head = yield from read_head(connection.buffer)
        connection.request = request = self.build_request(head, connection.client)
        connection.minor_version = head.minor_version
        limit, length = (
            self.application.body_limit(request.path),
            head.headers.get("content-length"),
        )
        if length and int(length) > limit:
            raise too_large(limit)
        if head.minor_version and head.headers.get("expect", "").lower() == "100-continue":
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.allow(HEAD_SECONDS, 1 / MIN_OCTETS_PER_SECOND)
        if "transfer-encoding" in head.headers:
            return request._replace(body=(yield from read_chunks(connection.buffer, limit)))
        if length:
            return request._replace(body=(yield from read_exactly(connection.buffer, int(length))))
        return request

    def build_request(self, head: Head, client: str) -> Request:
        """Return a request without its body: where it is from, and how it named this server."""
        headers = head.headers
        host, target = host_and_target(head.target, headers.get("host") or "localhost")
        path, _, query = target.partition("?")
        scheme, address = "https" if self.tls else "http", client.partition("%")[0]
        proxies = self.config.trusted_proxies
        if proxies and any(ipaddress.ip_address(address) in network for network in proxies):
            proxied = forwarded(headers)
            client = proxied["for"] or client
            scheme = proxied["proto"] if proxied["proto"] in ("http", "https") else scheme
            host = proxied["host"] if AUTHORITY.fullmatch(proxied["host"]) else host
        id = headers.get("x-request-id", "")
        id = id if REQUEST_ID.fullmatch(id) else next(self._request_ids)
        return Request(
            head.method, path, query, headers, b"", scheme, host, "", client, id, None, True
        )

    def execute(self, connection: Connection, request: Request) -> None:
        """Answer a quick request; hand another one to its lane."""
        request = request._replace(caller=self.application.known_caller(request))
        # A fault may delay the requests that meet it, so it gives each request its own thread.
        lane = SLOW if self.faults else self.application.lane_of(request)
        if lane == QUICK:
            self._answer(connection, request)
        elif lane == READ:
            self._readers.submit(
                self.guarded, connection, self._answer_in_turn, connection, request
            )
        elif lane == WRITE:
            self._queue_write(connection, request)
        else:
            arguments = (connection, self._answer, connection, request)
            threading.Thread(target=self.guarded, args=arguments, daemon=True).start()

    def refuse(self, connection: Connection, error: ScimError) -> None:
        """Answer a request that cannot be read, and close the connection after it."""
        request = connection.request or Request("", "", id=next(self._request_ids))
        connection.reader, connection.state = None, ANSWERING
        self._send(connection, request, error_response(error), then=LINGER)

    def _answer(self, connection: Connection, request: Request) -> None:
        """Execute a request and send the answer; faults come first."""
        fault = self._next_fault(request) if self.faults else None
        if fault and fault.delay:
            self.stopping.wait(fault.delay)
        injected = fault.response() if fault and fault.status else None
        response = injected or self.application.handle(request)
        self._send(connection, request, response, cut=fault is not None and fault.cut)

    def _answer_in_turn(self, connection: Connection, request: Request) -> None:
        """Answer a read when the one before is done, or after PAUSE_SECONDS."""
        in_turn = self._turn.acquire(timeout=PAUSE_SECONDS)
        try:
            self._answer(connection, request)
        finally:
            if in_turn:
                self._turn.release()

    def _queue_write(self, connection: Connection, request: Request) -> None:
        """Have a write answered with the others that wait for its tenant."""
        tenant = request.caller[0].name if request.caller else ""
        with self._lock:
            first = tenant not in self._writes
            self._writes.setdefault(tenant, []).append((connection, request))
        if first:
            self._writers.submit(self._answer_writes, tenant)

    def _answer_writes(self, tenant: str) -> None:
        """Answer the writes that wait for a tenant until there are none."""
        while writes := self._next_writes(tenant):
            responses = self.application.handle_all([request for _, request in writes])
            for (connection, request), response in zip(writes, responses, strict=True):
                self.guarded(connection, self._send, connection, request, response)

    def _next_writes(self, tenant: str) -> list[tuple[Connection, Request]]:
        """Take writes of a tenant that may share a transaction; without any, forget the tenant."""
        with self._lock:
            waiting = self._writes[tenant]
            # A Bulk request has a transaction of its own, so that others do not wait for its end.
            bulks = [n or 1 for n, (_, request) in enumerate(waiting) if request.path == BULK_PATH]
            size = min([MAX_WRITES_PER_COMMIT, *bulks])
            self._writes[tenant] = waiting[size:]
            if not waiting:
                del self._writes[tenant]
        return waiting[:size]

    def _next_fault(self, request: Request) -> Fault | None:
        """Return the fault that a request meets, counted."""
        with self._lock:
            if fault := next((fault for fault in self.faults if fault.matches(request)), None):
                fault.times -= 1
        return fault

    # -- Answers --

    def _send(
        self,
        connection: Connection,
        request: Request,
        response: Response,
        then: str = KEEP,
        cut: bool = False,
    ) -> None:
        """Send an answer, half of its body if it is to be cut, note it, give the connection back."""
        status, fields, body = to_http(response, request)
        options = request.headers.get("connection", "").lower()
        keep = "keep-alive" in options if connection.minor_version == 0 else "close" not in options
        if then == KEEP and (cut or not keep or self.stopping.is_set()):
            then = CLOSE
        lines = [f"HTTP/1.1 {status}", f"Date: {http_date(int(time.time()))}"]
        lines += [f"{name}: {value}" for name, value in fields]
        lines += ["\r\n"] if then == KEEP else ["Connection: close", "\r\n"]
        octets = "\r\n".join(lines).encode("latin-1", "replace")
        connection.then, connection.authenticated = then, bool(response.tenant)
        if response.tenant:
            connection.since = time.monotonic()
        connection.send(octets + body[: len(body) // 2 if cut else None])
        self._keep(request, response)
        self._note(request, response, time.perf_counter() - connection.started, len(body))
        self.give_back(connection)

    def _keep(self, request: Request, response: Response) -> None:
        if self.exchanges is not None:
            if isinstance(response.body, dict):
                response = response._replace(body=from_json(body_text(response.body)))
            self.exchanges.append(Exchange(request, response))
            del self.exchanges[:-MAX_EXCHANGES]

    def _note(self, request: Request, response: Response, seconds: float, octets: int) -> None:
        """Count and log an answer: no secret, no value of a resource, nothing that ends a line."""
        method = request.method if request.method in METHODS else "other"
        self.application.metrics.add(method, response, seconds)
        self.log.add(
            {
                "time": time.time(),
                "tenant": response.tenant,
                "method": method,
                "route": response.route,
                "status": response.status,
                "milliseconds": round(seconds * 1000, 1),
                "bytes": octets,
                "id": request.id,
            }
        )


@dataclass(frozen=True)
class WsgiApplication:
    """An application as WSGI has it (PEP 3333); limits on time and connections are its server's."""

    application: Application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """Answer a request."""
        request = self._request(environ)
        try:
            response = self.application.handle(request._replace(body=self._body(environ, request)))
        except ScimError as error:
            response = error_response(error)
        status, fields, body = to_http(response, request)
        start_response(status, fields)
        return [body]

    def _request(self, environ: dict[str, Any]) -> Request:
        """Return a request without its body; WSGI has decoded the path, as Latin-1."""
        headers = {
            name[5:].replace("_", "-").lower(): value
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        mount_point, path = (
            quote(environ.get(name, "").encode("latin-1")) for name in ("SCRIPT_NAME", "PATH_INFO")
        )
        id = headers.get("x-request-id", "")
        return Request(
            environ["REQUEST_METHOD"],
            path,
            environ.get("QUERY_STRING", ""),
            headers,
            b"",
            environ["wsgi.url_scheme"],
            headers.get("host") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}",
            mount_point,
            environ.get("REMOTE_ADDR", ""),
            id if REQUEST_ID.fullmatch(id) else str(uuid.uuid4()),
            None,
            True,
        )

    def _body(self, environ: dict[str, Any], request: Request) -> bytes:
        limit, length = self.application.body_limit(request.path), environ.get("CONTENT_LENGTH")
        if length and not LENGTH.fullmatch(length):
            raise ScimError(400, "", "content-length: expected a number")
        # A server that accepts chunked bodies ends the stream itself, and says so.
        size = limit + 1 if environ.get("wsgi.input_terminated") else 0
        body: bytes = environ["wsgi.input"].read(min(int(length) if length else size, limit + 1))
        if len(body) > limit:
            raise too_large(limit)
        return body


# ----------------------------------------------------------------------------
# 17. Console
#
# The page at /, which shows an administrator why provisioning works or fails:
# HTML, style and script in one string. The script reads the API of chapter 14
# and the SCIM endpoints.
# Uses nothing.
# ----------------------------------------------------------------------------

CONSOLE_PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>SCIM console</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='-1 -1 2 2'><circle r='1' fill='%2325d'/></svg>">
<style>
:root { color-scheme: light dark; --bg: #f5f6f8; --card: #fff; --hover: #f0f3f8; --text: #1b2330; --dim: #566174; --line: #e0e4ea;
  --accent: #2f5fd0; --link: #2450b8; --ok: #12683f; --ok-bg: #e4f3ea; --warn: #7a4b00; --warn-bg: #fcf1d8; --bad: #a3211b;
  --bad-bg: #fce9e7 }
@media (prefers-color-scheme: dark) { :root { --bg: #10141b; --card: #181e27; --hover: #1f2732; --text: #e7ebf2; --dim: #a2aec0;
  --line: #2b3341; --accent: #3a66cf; --link: #93b4ff; --ok: #83dcab; --ok-bg: #15301f; --warn: #f1c76c; --warn-bg: #332812; --bad: #ffa29a;
  --bad-bg: #3a1b1b } }
.ok { --tone: var(--ok); --tint: var(--ok-bg) } .warn, .change { --tone: var(--warn); --tint: var(--warn-bg) }
.bad { --tone: var(--bad); --tint: var(--bad-bg) } .pill, .note, .ok .mark, .change { background: var(--tint) }
* { box-sizing: border-box } html { overflow-y: scroll } :focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; outline: none } h2 { font-size: 16px; margin: 0 0 10px } p { margin: 0 0 12px }
a { color: var(--link) } code, pre { font: 13px/1.5 ui-monospace, monospace } ol, ul { list-style: none; margin: 0; padding: 0 }
.dim, .live, .lead, summary time, dt, header span { color: var(--dim) } .dim, .live, .pill, .small, summary time { font-size: 13px }
header { background: var(--card); border-bottom: 1px solid var(--line) } header span { font-weight: 400; margin-right: 14px }
header > div, main { max-width: 1280px; margin: 0 auto; padding: 0 20px } main { padding-top: 28px; padding-bottom: 80px }
header > div, nav, .bar, .copy, label { display: flex; align-items: center; gap: 10px } header > div, .bar { flex-wrap: wrap }
nav { flex: 1 } nav a { padding: 16px 10px 13px; border-bottom: 3px solid transparent; color: var(--dim); text-decoration: none }
nav a:hover, nav [aria-current] { color: var(--text) } nav [aria-current] { border-color: var(--accent) }
section, .card, .log { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 18px; min-width: 0 }
section, .card { padding: 18px 20px } .empty { text-align: center; padding: 48px 20px } form.card { max-width: 420px; margin: 10vh auto }
form > * { margin-bottom: 12px } form button, [type=search], [type=password] { width: 100% } .health h2, .problem { color: var(--tone) }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); margin: 18px 0 }
.grid > *, .health p, .note p, .steps p, dd { margin: 0 } .health h2::before { content: "●"; margin-right: 7px }
.copy { justify-content: space-between } .bar { margin: 0 0 14px; min-height: 38px }
.bar [type=search] { flex: 1 1 220px; max-width: 420px } .copy code { user-select: all }
input, select, button { font: inherit; color: inherit; border: 1px solid var(--dim); border-radius: 7px; background: var(--card);
  padding: 7px 12px; min-height: 38px } [type=checkbox] { min-height: 0; width: 18px; height: 18px; accent-color: var(--accent) }
::placeholder { color: var(--dim); opacity: 1 } button { cursor: pointer; white-space: nowrap } button:disabled { opacity: .45 }
button:hover:enabled { background: var(--hover) } .primary:enabled { background: var(--accent); border-color: var(--accent); color: #fff }
.small { padding: 2px 10px; min-height: 28px } th button { border: 0; padding: 0; min-height: 24px; background: none; font: inherit }
[aria-sort=ascending] button::after { content: " ↑" } [aria-sort=descending] button::after { content: " ↓" }
.log { overflow: hidden } .log > li + li { border-top: 1px solid var(--line) }
.live { margin-left: auto; min-width: 8em; text-align: end } .more { padding: 4px 18px 18px }
summary { display: grid; grid-template-columns: 4.6em minmax(0, 1fr) auto; gap: 2px 14px; padding: 10px 18px; align-items: baseline;
  cursor: pointer } summary:hover { background: var(--hover) } summary:focus-visible { outline-offset: -3px }
summary::-webkit-details-marker, [open] .problem, .log:empty { display: none } .problem { grid-column: 2 / -1; font-size: 14px }
.note { border-radius: 8px; padding: 12px 16px; margin: 6px 0 12px }
.pill { color: var(--tone); border-radius: 20px; padding: 0 9px; white-space: nowrap }
.note .dim::first-letter, .history b::first-letter { text-transform: uppercase } .history b, .pill { display: inline-block }
dl { display: grid; grid-template-columns: minmax(90px, max-content) minmax(0, 1fr); gap: 5px 18px; margin: 0 }
pre { margin: 10px 0 0; padding: 14px; background: var(--bg); border-radius: 8px; overflow: auto; max-height: 560px }
.mark { flex: none; width: 24px; height: 24px; border-radius: 50%; border: 2px solid var(--line); text-align: center; line-height: 20px }
.steps li > * { min-width: 0 } .ok .mark { border-color: var(--tone); color: var(--tone) }
.steps li { display: flex; gap: 12px; padding: 8px 0 } .scroll { overflow-x: auto; margin: 0 -20px; padding: 0 20px }
table { border-collapse: collapse; width: 100%; overflow-wrap: break-word } .list table { overflow-wrap: anywhere }
th, td { text-align: left; padding: 9px 14px 9px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { white-space: nowrap } tbody tr:last-child td { border: 0 } .change { box-shadow: -20px 0 var(--tint), 20px 0 var(--tint) }
@media (max-width: 640px) { header > div { padding: 8px 14px 0 } main { padding: 18px 14px 80px } header b, .live { flex: 1 }
  nav { order: 3; flex: 1 0 100%; gap: 0 } nav a { padding: 10px 8px 8px } section, .card, .more { padding: 14px }
  .more { padding-top: 2px } summary { grid-template-columns: 4.4em minmax(0, 1fr); padding: 10px 14px } summary time { grid-column: 2 }
  .scroll { margin: 0 -14px; padding: 0 14px } thead { display: none } table { overflow-wrap: anywhere }
  tr { display: block; padding: 10px 0; border-bottom: 1px solid var(--line) } td { display: flex; gap: 12px; border: 0; padding: 2px 0 }
  td::before { content: attr(data-label); flex: 0 0 104px; color: var(--dim) } td > :not(.pill) { min-width: 0; flex: 1 }
  td:has(> span:empty) { display: none } }
</style>
<header hidden><div><b>SCIM console <span></span></b><nav aria-label="Sections"></nav>
<button class="small">Sign out</button></div></header><main></main>
<form class="card" hidden><h1>SCIM console</h1><p class="lead">Sign in with the Secret Token that you entered in Entra ID.
 It stays in this tab. The console changes nothing.</p><label for="token">Secret Token</label>
<input type="password" id="token" autocomplete="off" required><button class="primary">Sign in</button></form>
<script>
const [ENTERPRISE, FACILIO] = ['enterprise', 'facilio'].map(name => `urn:ietf:params:scim:schemas:extension:${name}:2.0:User`);
const LEVELS = [['ok', '✓', 'success'], ['warn', '!', 'warning'], ['bad', '✕', 'error']];
const [header, main, form] = document.body.children;
const [tenantName, nav, signOutButton] = header.querySelectorAll('span, nav, button');
let setup = null;  // the answer of /console/api/setup
let view = new AbortController();  // aborted when another view opens

// -- Elements: server text becomes text nodes, never HTML --
// h('p.dim', {title: 'x'}, 'text'): the properties are optional.
function h(selector, ...children) {
  const [tag, ...classes] = selector.split('.'), element = document.createElement(tag);
  const properties = children[0]?.constructor === Object ? children.shift() : {};
  for (const [name, value] of Object.entries(properties)) name in element ? element[name] = value : element.setAttribute(name, value);
  element.classList.add(...classes); element.append(...children.flat(9).filter(Boolean));
  return element;
}
const link = (text, ...path) => h('a', {href: ['#', ...path.map(encodeURIComponent)].join('/')}, text || path.at(-1));
const date = at => new Date(at).toLocaleString('en-GB', {dateStyle: 'medium', timeStyle: 'medium'});
const time = at => h('time', {dateTime: at}, date(at));
const valueText = value => value === true ? 'Yes' : value === false ? 'No' : String(value ?? '');
const nameList = names => names.join(', ').replace(/urn:\S+:(facilio|enterprise):2.0:User:/g, '');
const pill = (good, text, sign = '!') => h('span.pill.' + (good ? 'ok' : 'warn'), `${good ? '✓' : sign} ${text}`);
const json = value => h('pre', {tabIndex: 0}, JSON.stringify(value, null, 2));
const section = (title, ...content) => h('section', h('h2', title), ...content);
const notice = (title, ...text) => h('div.card.empty', h('h2', title), h('p', ...text));
const pairs = rows => h('dl', rows.filter(([, ...content]) => content.some(Boolean)).map(([name, ...content]) =>
  [h('dt', name), h('dd', content)]));
const table = (heads, body) => h('div.scroll', h('table', h('thead', h('tr', heads)), body));
const headCells = titles => titles.map(title => h('th', {scope: 'col'}, title));
const row = (titles, cells, selector = 'tr') => h(selector, cells.map((cell, index) =>
  h('td', {'data-label': titles[index]}, cell instanceof Element ? cell : h('span', cell))));
const copyable = text => h('div.copy', h('code', text), h('button.small', {ariaLabel: 'Copy ' + text, hidden: !navigator.clipboard,
  onclick: ({target}) => { navigator.clipboard.writeText(text); target.textContent = 'Copied'; }}, 'Copy'));
const searchField = (placeholder, load, timer) => h('input', {type: 'search', ariaLabel: placeholder, placeholder,
  oninput: () => { clearTimeout(timer); timer = setTimeout(load, 250); }});

// -- The server: the token is sent in a header only --
async function request(path, signal) {
  const response = await fetch(path, {signal, headers: {Authorization: 'Bearer ' + sessionStorage.token, 'X-Console': '1'}});
  if (response.status === 401) signIn('The token is unknown or has expired.');
  if (!response.ok) throw Error((await response.json().catch(() => ({}))).detail || `The server answered ${response.status}.`);
  return response;
}
const get = async (path, parameters) => (await request(path + '?' + new URLSearchParams(parameters), view.signal)).json();
const getLog = async parameters => (await get('/console/api/log', parameters)).entries;
const getSetup = async () => { setup = await get('/console/api/setup'); };
const downloadMapping = async () => h('a', {download: 'mapping.csv',
  href: URL.createObjectURL(await (await request('/console/api/mapping')).blob())}).click();
// Long polls while the view is open; each failure doubles the pause.
async function followLog(status, refresh) {
  const {signal} = view;
  for (let after = setup.last[0]?.seq || 0, pause = 1000; !signal.aborted;)
    try {
      status.textContent ||= 'Live';
      const [newest] = await getLog({after, wait: 25, count: 100});
      status.textContent = 'Live'; pause = 1000;
      if (newest) { after = newest.seq; await refresh(); }
    } catch (error) {
      if (signal.aborted) return;
      status.textContent = `Connection lost, retrying in ${pause / 1000} s`;
      await new Promise(resolve => setTimeout(resolve, pause)); pause = Math.min(2 * pause, 60000);
    }
}

// -- The log --
function logEntry(call) {
  const [level, sign, meaning] = LEVELS[call.level], path = {User: 'people', Group: 'groups'}[call.type];
  return h('li', h('details.' + level, h('summary', h('span.pill', {title: meaning}, `${sign} ${call.status}`),
    h('span', call.operation, ' ', h('b', call.name)), time(call.at), call.notes[0] && h('span.problem', call.notes[0].text)),
  h('div.more', call.notes.map(note => h('div.note', h('p.dim', note.kind), h('p', note.text),
    h('p', h('b', 'What to do: '), note.remedy))),
  pairs([[call.type, path && call.subject && link(call.name, path, call.subject)], ['Attributes', nameList(call.attributes)],
    ['Error', call.detail], ['Request', h('code', `${call.method} ${call.path}`)],
    ['Token', `${call.token}, from ${call.client || 'an unknown address'}`], ['Duration', `${call.milliseconds} ms`],
    ['Request ID', call.id]]), call.body && json(call.body))));
}
function healthCards(problems) {  // problems: the newest log entries with a note
  const {last: [lastCall], refused, strangers} = setup, unused = lastCall ? setup.fields.filter(({people}) => !people) : [];
  const recent = kind => problems.filter(call => call.seq > lastCall.seq - 100 && call.notes.some(note => note.kind === kind));
  const [failure] = recent('connection'), mapping = recent('mapping');
  const card = (level, title, ...text) => h('div.card.health.' + level, h('h2', title), h('p', text));
  return h('div.grid', card(!lastCall || failure ? 'warn' : 'ok', 'Connection', lastCall ?
    `Last call on ${date(lastCall.at)} with the token “${lastCall.token}”. ` :
    ['No calls yet. Enter the ', link('Tenant URL', 'setup'), ' in Entra ID.'],
  failure && `${failure.notes[0].text} ${failure.notes[0].remedy}`, setup.lost && ` Calls missing from the log: ${setup.lost}.`),
  card(refused.length || strangers ? 'warn' : 'ok', 'Authentication', refused.length ?
    `Calls refused since ${date(refused.at(-1).at)}: ${refused.length}. ${refused[0].notes[0].text} ` :
    !strangers && 'No calls were refused.',
  strangers && `Calls with an unknown token since ${date(setup.strange_since)}: ${strangers}.`),
  card(mapping.length ? LEVELS[mapping[0].level][0] : unused.length ? 'warn' : 'ok', 'Attribute mapping', mapping.length ?
    `${mapping.length} of the last 100 calls had problems. ${mapping[0].notes[0].text} ` : lastCall ? 'No problems. ' : 'No calls yet. ',
  unused.length && [link('Custom fields', 'setup'), ` no one has a value for: ${unused.map(field => field.display_name).join(', ')}.`]));
}
async function showLog() {
  const search = searchField('Search names, attributes, errors', load), problemsOnly = h('input', {type: 'checkbox', onchange: load});
  const list = h('div'), cards = h('div'), status = h('span', {role: 'status'});
  const showNew = h('button.small', {hidden: true, onclick: load}, 'Show new calls');
  const showOlder = h('button', {onclick: async () => list.firstChild.append(...entries(await getCalls(oldest)))}, 'Show older calls');
  const getCalls = before => getLog({before, count: 50, level: +problemsOnly.checked, text: search.value});
  const entries = calls => { oldest = calls.at(-1)?.seq; showOlder.hidden = calls.length < 50; return calls.map(logEntry); };
  let loads = 0, oldest;
  async function load() {
    const number = ++loads, [calls, problems] = await Promise.all([getCalls(0), getLog({level: 1}), getSetup()]);
    if (number < loads) return;  // a newer search started
    showNew.hidden = true; cards.replaceChildren(healthCards(problems));
    list.replaceChildren(h('ol.log', entries(calls)), calls.length ? '' : problemsOnly.checked || search.value ?
      notice('No matching calls', 'Clear the search or show all calls.') :
      notice('No calls yet', 'Calls from Entra ID appear here, with their outcome. See ', link('Set-up', 'setup'),
        ' for what to enter there.'));
  }
  await load(); followLog(status, () => scrollY < 200 && !list.querySelector('[open]') ? load() : showNew.hidden = false);
  return ['Provisioning log', 'The calls of identity providers, their outcome, and how to fix what failed.', cards,
    h('div.bar', search, h('label', problemsOnly, 'Problems only'), h('span.live', showNew, ' ', status)), list, showOlder];
}

// -- Set-up --
async function testConnection(output) {  // like Entra's button: filters that match no one
  const probe = (endpoint, attribute) => get('/scim/v2/' + endpoint, {filter: `${attribute} eq "${Math.random()}"`}).then(
    page => [!page.totalResults, `${endpoint}: the filter works. It matched nothing, as expected.`],
    error => [false, `${endpoint}: ${error.message}`]);
  const results = await Promise.all([probe('Users', 'userName'), probe('Groups', 'displayName')]);
  if (!setup.url.startsWith(location.origin + '/')) results.push([false, `This page is at ${location.origin}, but the server ` +
    `believes its URL is ${setup.url}. Let the proxy keep the Host header, or add the proxy to trusted_proxies.`]);
  if (location.protocol !== 'https:')
    results.push([false, 'This page was loaded over HTTP. Entra ID needs HTTPS and a public host name: set up TLS.']);
  output.replaceChildren(...results.map(([good, text]) => h('p', pill(good, ''), ' ', text)));
}
async function showSetup() {
  const steps = h('ol.steps'), fields = h('tbody'), output = h('div', {role: 'status'}), status = h('span.dim', {role: 'status'});
  const mappingTitles = ['Source', 'Target', 'Type', 'Change'], fieldTitles = ['Field', 'Type', 'Name in Entra', 'Employees'];
  async function load() {
    await getSetup();
    steps.replaceChildren(...setup.steps.map(({at, title, hint}) => h(at ? 'li.ok' : 'li', h('span.mark', {ariaHidden: 'true'},
      at && '✓'), h('div', h('b', title), h('p.dim', at ? 'Done on ' + date(at) : hint)))));
    fields.replaceChildren(...setup.fields.map(({display_name, type, urn, people}) => row(fieldTitles,
      [display_name, type, copyable(urn), pill(people, `${people || 'none'} with a value`)])));
  }
  await load(); followLog(status, load);
  return ['Set-up', 'What to enter in the Entra admin center, and what the server has received.', h('div.grid',
    section('Connection', h('p.dim', 'Enterprise application → Provisioning → Automatic → Tenant URL'), copyable(setup.url), h('p'),
      h('p.dim', 'Secret Token: the secret of one of these tokens (not shown)'), pairs(setup.tokens.map(
        ({name, expired, expires, last_use}) => [name, expired && h('span.pill.bad', '✕ expired'),
          expires && ` ${expired ? '' : 'expires '}on ${date(expires)}; `, last_use ? `last used on ${date(last_use)}` : 'never used'])),
      h('p'), h('button.primary', {onclick: () => testConnection(output)}, 'Test Connection'), h('p'), output),
    section(['Checklist ', status], steps)),
  section('Attribute mapping', h('p.dim', 'Mappings → Provision Microsoft Entra ID Users: sources in Entra ID, ' +
    'targets in customappsso. Highlighted rows differ from Entra\'s default mapping.'), table(headCells(mappingTitles),
    h('tbody', setup.mapping.map(([source, target, type, change]) => row(mappingTitles,
      [source || '(your choice)', h('code', target), type, change], change ? 'tr.change' : 'tr')))), h('p'),
  h('button', {onclick: downloadMapping}, 'Download as CSV')),
  section('Custom fields', setup.fields.length ? [h('p.dim', 'Show advanced options → Edit attribute list for customappsso: ' +
    'add these names with these types, then map to them.'), table(headCells(fieldTitles), fields)] : h('p.dim',
    'None. Configure them as “custom_fields” of the tenant.'))];
}

// -- Employees and groups: the server filters, sorts and pages --
const email = ({emails = [], userName}) =>
  (emails.find(({primary}) => primary) || emails.find(({type}) => type === 'work'))?.value || userName;
const SEARCHED = {Users: ['displayName', 'userName', 'emails.value', 'title'], Groups: ['displayName', 'externalId']};
const COLUMNS = {  // title, attribute to sort by, content of a cell
  Users: () => [['Name', 'displayName', user => link(user.displayName || user.userName, 'people', user.id)],
    ['E-mail', 'emails.value', email], ['Designation', 'title', user => user.title],
    ...setup.fields.map(field => [field.display_name, field.urn, user => valueText(user[FACILIO]?.[field.link_name])]),
    ['Active', 'active', user => user.active ? pill(true, 'Active') : pill(false, 'Inactive', '–')]],
  Groups: () => [['Name', 'displayName', group => link(group.displayName, 'groups', group.id)],
    ['External ID', 'externalId', group => group.externalId],
    ['Changed', 'meta.lastModified', group => time(group.meta.lastModified)]],
};
async function resourceList(endpoint, ifEmpty, baseFilter) {
  const columns = COLUMNS[endpoint](), titles = columns.map(([title]) => title), search = searchField('Search', () => load(1));
  const state = h('select', {onchange: () => load(1)}, [['', 'All'], ['active eq true', 'Active'], ['active eq false', 'Inactive']]
    .map(([value, text]) => h('option', {value}, text)));
  const message = h('div'), body = h('tbody'), range = h('span.dim', {role: 'status'});
  let start, sortBy = 'displayName', sortOrder = 'ascending', loads = 0;
  const [previous, next] = [['Previous', -25], ['Next', 25]].map(([text, step]) =>
    h('button', {onclick: () => load(start + step)}, text));
  const sort = path => {
    sortOrder = sortBy === path && sortOrder === 'ascending' ? 'descending' : 'ascending'; sortBy = path; load(1); };
  const heads = headCells(columns.map(([title, path]) => h('button', {onclick: () => sort(path)}, title)));
  const card = h('div.card.list', table(heads, body));
  async function load(startIndex) {
    const text = search.value.trim(), literal = JSON.stringify(text), number = ++loads;
    const terms = [baseFilter, state.value, text && `(${SEARCHED[endpoint].map(name => `${name} co ${literal}`).join(' or ')})`];
    start = Math.max(1, startIndex);
    const {Resources: resources, totalResults: total} = await get('/scim/v2/' + endpoint, {startIndex: start, count: 25, sortBy,
      sortOrder, excludedAttributes: 'members', filter: terms.filter(Boolean).join(' and ')});
    if (number < loads) return;  // a newer search started
    columns.forEach(([, path], index) => { heads[index].ariaSort = path === sortBy ? sortOrder : 'none'; });
    body.replaceChildren(...resources.map(resource => row(titles, columns.map(([, , content]) => content(resource)))));
    card.hidden = !total;
    message.replaceChildren(total ? '' : state.value || text ? notice('No results', 'Change the search or show all.') : ifEmpty);
    range.textContent = total ? `${start}–${start + resources.length - 1} of ${total}` : ''; previous.hidden = next.hidden = total <= 25;
    [previous.disabled, next.disabled] = [start < 2, start + 25 > total];
  }
  await load(1);
  return [h('div.bar', search, endpoint === 'Users' && h('label', 'Show', state)), message, card, h('div.bar', previous, next, range)];
}
const showEmployees = async () => ['Employees', 'The provisioned users. Each is a Facilio employee.', ...await resourceList('Users',
  notice('No employees yet', 'Employees appear with the first cycle of Entra ID. ', link('See the checklist', 'setup'), '.'))];
const showGroups = async () => ['Groups', 'The provisioned groups.', ...await resourceList('Groups', notice('No groups yet',
  'Assign a group to the application in Entra ID, and keep “Provision Microsoft Entra ID Groups” enabled.'))];
async function resourceDetails(endpoint, id) {  // resource, employee (of a user), sections of the page
  const [{Resources: [resource]}, {changes, employee}, calls] = await Promise.all([
    get('/scim/v2/' + endpoint, {filter: `id eq ${JSON.stringify(id)}`, excludedAttributes: 'members'}),
    get('/console/api/history/' + encodeURIComponent(id)), getLog({subject: id, count: 20})]);
  const history = changes.map(({kind, id: changedId, member, at, token, attributes}) => h('li', h('div', h('b', kind.replace('.', ' ')),
    member && [': ', changedId === id ? link('this user', 'people', member) : link('this group', 'groups', changedId)],
    h('p.dim', date(at), token && ` by “${token}”`, attributes.length && ': ' + nameList(attributes)))));
  return [resource, employee, h('div.grid', section('History', history.length ? h('ol.steps.history', history) : 'No changes recorded.'),
    section('SCIM resource', resource ? json(resource) : employee ? 'Deleted. The employee remains.' : 'Deleted.')),
  h('h2', 'Calls'), calls.length ? h('ol.log', calls.map(logEntry)) : notice('No calls', 'The log has none about it.')];
}
async function showEmployee(id) {
  const [resource, employee, ...sections] = await resourceDetails('Users', id), manager = resource?.[ENTERPRISE]?.manager;
  if (!employee) return ['Not found', 'No employee has this ID.', link('All employees', 'people')];
  const managerName = manager && (manager.displayName || (employee.manager ? `employee ${employee.manager}` : 'not provisioned yet'));
  return [employee.name, [link('Employees', 'people'), ` / employee ${employee.id}`], h('div.grid', section('Employee', pairs([
    ['Active', valueText(employee.active)], ['E-mail', employee.email], ['Designation', employee.designation],
    ['Department', employee.department], ['Phone', employee.phone], ['Mobile', employee.mobile], ['Employee no.', employee.employeeNumber],
    ['Manager', manager && link(managerName, 'people', manager.value)], ['Language', employee.language],
    ['Changed', time(employee.changed)], ['External ID', employee.external_id]])),
  section('Custom fields', setup.fields.length ? pairs(setup.fields.map(field => [field.display_name,
    valueText(employee.custom_fields[field.link_name]) || h('span.dim', 'no value')])) : 'None', h('p'), h('h2', 'Groups'),
  resource?.groups ? h('ul', resource.groups.map(group => h('li', link(group.display, 'groups', group.value)))) : 'None')), ...sections];
}
async function showGroup(id) {
  const [resource, , ...sections] = await resourceDetails('Groups', id);
  return [resource?.displayName || 'Deleted group', link('Groups', 'groups'), h('p'), h('h2', 'Members'), ...await resourceList('Users',
    notice('No members', 'Assign people to this group in Entra ID.'), `groups.value eq ${JSON.stringify(id)}`), ...sections];
}

// -- Sign-in and navigation --
const SECTIONS = {log: ['Log', showLog], setup: ['Set-up', showSetup], people: ['Employees', showEmployees, showEmployee],
  groups: ['Groups', showGroups, showGroup]};
const alertBox = text => h('div.bad', {role: 'alert'}, h('p.note', text));
function signIn(...messages) {
  delete sessionStorage.token; setup = null; view.abort();
  header.hidden = true; form.hidden = false; form.token.value = '';
  main.replaceChildren(...messages.map(alertBox), form); form.token.focus();
}
form.onsubmit = event => { event.preventDefault(); sessionStorage.token = form.token.value.trim(); show(); };
async function show(event) {
  view.abort();
  const {signal} = view = new AbortController(), [name, id] = location.hash.slice(2).split('/').map(decodeURIComponent);
  const current = SECTIONS[name] ? name : 'log', [, showAll, showDetails] = SECTIONS[current];
  if (!sessionStorage.token) return signIn();
  const [title, lead, ...content] = await Promise.resolve(setup || getSetup()).then(() => (id && showDetails || showAll)(id))
    .catch(error => ['Something went wrong', error.message, h('button', {onclick: show}, 'Try again')]);
  if (signal.aborted) return;
  header.hidden = false; document.title = `${title} – SCIM console`; tenantName.textContent = setup?.tenant || '';
  nav.replaceChildren(...Object.entries(SECTIONS).map(([path, [text]]) =>
    h('a', {href: '#/' + path, ...path === current && {ariaCurrent: 'page'}}, text)));
  main.replaceChildren(h('h1', {tabIndex: -1}, title), h('p.lead', lead), ...content.filter(Boolean));
  if (event?.type === 'hashchange') { scrollTo(0, 0); main.firstChild.focus(); }
}
function route(event) {
  const token = location.hash.match(/^#token=(.+)/)?.[1];  // from the link that the server prints
  if (token) { sessionStorage.token = decodeURIComponent(token); setup = null; }
  if (token || !location.hash) history.replaceState(null, '', '#/log');
  return show(event);
}
signOutButton.onclick = () => signIn();
addEventListener('unhandledrejection', event => {  // an error of a button or a search; ignored if its view is gone
  event.preventDefault();
  if (!view.signal.aborted && event.reason.name !== 'AbortError') main.prepend(alertBox(event.reason.message));
});
addEventListener('hashchange', route); route();
</script></html>
"""


# ----------------------------------------------------------------------------
# 18. Interface
#
# running() and wsgi() for other programs, then main(): serve (the default), token, check,
# employees, changes, backup, restore, demo. What a person must mend is one line on standard error
# and exit status 2.
# Uses everything above.
# ----------------------------------------------------------------------------

KNOCK_SECONDS = 0.1  # how long a server may take to see that it has to end
RELOAD_SECONDS = 1  # how often the configuration file is looked at
FIXED = {
    "host": "listen",
    "port": "listen",
    **{
        name: name
        for name in (
            "data_dir",
            "tls",
            "trusted_proxies",
            "max_connections",
            "workers",
            "access_log",
            "console",
        )
    },
}
Source = Config | Mapping[str, Json] | str | os.PathLike[str] | None
Hook = Callable[[str], str | None] | None


@contextmanager
def running(
    config: Source = None, *, authenticate: Hook = None, deterministic: bool = False
) -> Iterator[ScimServer]:
    """Run a server on a free port while a with block lasts; see its url, token() and directory().

    config is a configuration, its file, its document, or nothing for a demo tenant in memory. deterministic
    lets ids count up and the clock tick a millisecond at each look. Raises ConfigError, StoreError and OSError.
    """
    made = to_config(config)
    ids, ticks, start = itertools.count(1), itertools.count(), datetime(2026, 1, 1, tzinfo=UTC)
    with closing(
        Application(
            replace(made, port=0),
            authenticate,
            (lambda: start + timedelta(milliseconds=next(ticks))) if deterministic else utc_now,
            (lambda: str(uuid.UUID(int=next(ids)))) if deterministic else random_id,
            CONSOLE_PAGE,
        )
    ) as application:
        for tenant in made.tenants:
            application.directory(tenant.name)  # a test wants each of them
        server = ScimServer(application)
        server.exchanges = []
        thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,))
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


def wsgi(config: Source = None, *, authenticate: Hook = None) -> WsgiApplication:
    """Return the server for gunicorn and its like, or to mount under a prefix; arguments as running()."""
    return WsgiApplication(Application(to_config(config), authenticate, page=CONSOLE_PAGE))


# -- Commands: those that return nothing end with status 0 ------------------------------


def chosen_file(options: argparse.Namespace) -> str:
    """Return the configuration file to use, "" for the built-in demo."""
    sample = Path(__file__).with_name("sample_config.json")
    return options.config or (str(sample) if sample.exists() else "")


def chosen_config(options: argparse.Namespace) -> Config:
    """Return the configuration that the command line means; ConfigError."""
    file, reader = chosen_file(options), ConfigReader()
    config = load_config(file) if file else parse_config(DEMO)
    if options.listen:
        host, port = reader.read("--listen", options.listen, ADDRESS) or ("", 0)
        config = replace(config, host=host, port=port)
    workers = (
        config.workers
        if options.workers is None
        else reader.read("--workers", options.workers, NUMBER)
    )
    if reader.problems:
        raise ConfigError(reader.problems)
    return replace(config, data_dir=options.data_dir or config.data_dir, workers=workers)


def chosen_tenant(options: argparse.Namespace) -> tuple[Config, Tenant]:
    """Return the configuration and the tenant that --tenant names; StoreError."""
    config = chosen_config(options)
    tenants = {tenant.name: tenant for tenant in config.tenants}
    if options.tenant not in tenants:
        raise StoreError(
            f"--tenant {options.tenant}: not in the configuration; there are {', '.join(tenants)}"
        )
    return config, tenants[options.tenant]


def chosen_store(options: argparse.Namespace) -> Store:
    """Return the store of --tenant, beside the server that may be at work on it; StoreError."""
    path = store_path(*chosen_tenant(options))
    try:
        os.stat(path)
    except FileNotFoundError:
        raise StoreError(
            f"{path}: does not exist, tenant {options.tenant} keeps no data there yet"
        ) from None
    return Store(path)


def serve(options: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM, the configuration of the day."""
    seen, config = file_signature(chosen_file(options)), chosen_config(options)
    application = Application(config, page=CONSOLE_PAGE)
    if not application.available:
        application.directory(config.tenants[0].name)  # says why
    warn(application)
    if config.tls:
        Tls(*config.tls)  # says what is wrong with it
    try:
        listener = listen(config)
    except OSError as error:
        raise StoreError(
            f"{config.host}:{config.port}: cannot be used ({error.strerror}); "
            "choose another address with --listen HOST:PORT"
        ) from error
    told = greeting(url_of(config, listener.getsockname()[1]), config)
    if config.workers == 1:
        work(options, application, listener, seen, told)
    else:
        application.close()  # SQLite's files do not outlive a fork
        supervise(options, config, listener, told)


def work(
    options: argparse.Namespace,
    application: Application,
    listener: socket.socket,
    seen: FileSignature,
    told: str,
) -> None:
    """Serve until a signal; told is printed when signals are heeded, seen is the stamp of the file that was read."""
    server = ScimServer(application, listener)
    for number in (signal.SIGINT, signal.SIGTERM):  # a thread, as stop() waits for this one's loop
        signal.signal(number, lambda number, frame: threading.Thread(target=server.stop).start())
    if hasattr(signal, "SIGHUP"):
        # What is seen becomes another stamp; an Event's set() in set() would wait for itself.
        signal.signal(signal.SIGHUP, lambda number, frame: seen.append((0, 0)))
    threading.Thread(target=follow_file, args=(options, server, seen), daemon=True).start()
    if told:
        print(told, flush=True)
    server.serve_forever(KNOCK_SECONDS)
    server.stopped.wait()
    application.close()


def supervise(
    options: argparse.Namespace, config: Config, listener: socket.socket, told: str
) -> None:
    """Run workers on one socket, and a new one for each that dies, until a signal."""
    if not hasattr(os, "fork"):
        raise StoreError("workers: more than one needs an operating system that forks")
    if config.data_dir == ":memory:":
        raise StoreError(
            "workers: more than one needs a data_dir on disk, to share what they store"
        )
    # Signals are waited for, not handled: one that came just before os.wait() would wait with it.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # BSD drops what is ignored
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    print(told, flush=True)
    workers: set[int] = set()
    stopping = False
    while workers or not stopping:
        while len(workers) < config.workers and not stopping:
            seen = file_signature(chosen_file(options))
            with suppress(ConfigError):
                config = replace(chosen_config(options), workers=config.workers)
            workers.add(fork_worker(options, config, listener, seen, numbers))
        if (number := signal.sigwait(numbers)) != signal.SIGCHLD:
            stopping = stopping or number != signal.SIGHUP
            for worker in workers:
                os.kill(worker, number)
        for worker, status in [
            found for one in workers if (found := os.waitpid(one, os.WNOHANG))[0]
        ]:
            workers.discard(worker)
            if not stopping:
                log_line(f"worker {worker} ended with status {status}; another one takes its place")
                time.sleep(KNOCK_SECONDS)  # one that cannot start does not spin


def fork_worker(
    options: argparse.Namespace,
    config: Config,
    listener: socket.socket,
    seen: FileSignature,
    numbers: Iterable[int],
) -> int:
    """Return the process id of a new worker, in which this never returns."""
    supervisor = os.getpid()
    if worker := os.fork():
        return worker
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    threading.Thread(target=end_after, args=(supervisor,), daemon=True).start()
    work(options, Application(config, page=CONSOLE_PAGE), listener, seen, "")
    os._exit(0)


def end_after(supervisor: int) -> None:
    """End this worker when its supervisor was killed, so that nobody is left on the address."""
    while os.getppid() == supervisor:
        time.sleep(KNOCK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def follow_file(options: argparse.Namespace, server: ScimServer, seen: FileSignature) -> None:
    """Take the configuration file when it changes, or a signal asked for it, while the server runs."""
    while not server.stopping.wait(RELOAD_SECONDS):
        if (found := file_signature(chosen_file(options))) != seen:
            seen[:] = found
            log_line(f"{chosen_file(options)}: {take_file(options, server)}")


def take_file(options: argparse.Namespace, server: ScimServer) -> str:
    """Serve what the configuration file says, or go on where it has mistakes; return what came of it."""
    try:
        fresh = chosen_config(options)
        server.application.configure(fresh)
    except (ConfigError, StoreError, OSError, ValueError) as error:
        return "not taken, the earlier configuration serves on: " + str(error).replace("\n", "; ")
    warn(server.application)
    changed = dict.fromkeys(
        key for name, key in FIXED.items() if getattr(fresh, name) != getattr(server.config, name)
    )
    return f"taken, {len(fresh.tenants)} tenant(s)" + (
        f"; {', '.join(changed)} will be taken at the next start" if changed else ""
    )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can call a host."""
    return host in ("localhost", "::1") or host.startswith("127.")


def warn(application: Application) -> None:
    """Tell the operator what is unsafe, and who is not served."""
    for name, found in application.directories.items():
        if isinstance(found, StoreError):
            log_line(f"tenant {name} is not served, the others are: {found}")
    config = application.config
    if not (is_loopback(config.host) or config.tls or config.trusted_proxies):
        log_line(
            f"warning: {config.host} is beyond this machine and tokens travel in clear; "
            "configure tls, or trusted_proxies for a proxy that has it"
        )


def greeting(url: str, config: Config) -> str:
    """Return what to paste into Entra ID: Tenant URL, and Secret Token where the file holds it."""
    lines = [f"scim_server listening on {url}"]
    for tenant in config.tenants:
        lines += [
            "",
            f"tenant {tenant.name}",
            f"  Tenant URL    {url}",
            *(
                f"  Secret Token  {token.secret or 'kept as a hash'}  ({token.name}"
                f"{', expired' * token.expired(utc_now())})"
                for token in tenant.tokens
            ),
        ]
        # On loopback such a token, which is for demos, is also in a link that signs in to the console.
        if config.console and is_loopback(config.host):
            lines += [
                f"  Console       {url.removesuffix(BASE_PATH)}/#token={quote(token.secret)}"
                for token in tenant.tokens
                if token.secret and not token.expired(utc_now())
            ][:1]
    return "\n".join(lines)


def make_token(options: argparse.Namespace) -> None:
    """Print a new secret, and its entry for the configuration."""
    secret = secrets.token_urlsafe(32)
    print(
        f"Secret Token, shown this once:\n\n  {secret}\n\n"
        'Entry for the tenant\'s "tokens" in the configuration:\n\n  '
        + json.dumps({"name": options.name, "sha256": digest(secret)})
    )


def check(options: argparse.Namespace) -> None:
    """Print what a configuration means for Entra ID."""
    config = chosen_config(options)
    if config.tls:
        Tls(*config.tls)  # says what is wrong with it
    print(f"{chosen_file(options) or 'the built-in demo'}: no mistakes found")
    for tenant in config.tenants:
        print(
            f"\ntenant {tenant.name}: {len(tenant.tokens)} token(s), {len(tenant.custom_fields)} custom field(s)"
        )
        path, uses = store_path(config, tenant), {}
        with suppress(FileNotFoundError):
            os.stat(path)
            with closing(Store(path)) as store, store.reading() as session:
                uses = {token: session.setting(f"used {token.name}") for token in tenant.tokens}
        for token in tenant.tokens:  # one that nobody uses can be withdrawn
            used = f"last used {uses[token]}" if uses.get(token) else "never used"
            ends = (
                f", expire{'sd'[token.expired(utc_now())]} {time_text(token.expires)}"
                if token.expires
                else ""
            )
            print(f"  token    {token.name}, {used}{ends}")
        for custom in tenant.custom_fields:
            print(f"  {custom.type:<8} {custom.urn}")


def back_up(options: argparse.Namespace) -> None:
    """Copy a tenant's database to a new file, while the server may run."""
    with closing(chosen_store(options)) as store:
        store.backup(options.file)
    print(f"tenant {options.tenant}: {store.path} copied to {options.file}")


def restore(options: argparse.Namespace) -> None:
    """Put a backup in the place of a tenant's database."""
    config, tenant = chosen_tenant(options)
    path = store_path(config, tenant)
    if path == ":memory:":
        raise StoreError("data_dir: :memory: keeps nothing, so there is nothing to restore to")
    if not os.path.isfile(options.file):
        raise StoreError(f"{options.file}: is no file")
    make_data_dir(config)
    made = path
    try:
        store = Store(path)
    except Damaged:  # which stays until there is something better
        store = Store(made := f"{path}.restored")
    try:
        with closing(store):
            store.restore(options.file, tenant.name)
        if made != path:
            now = f"{utc_now():%Y%m%dT%H%M%S.%f}"
            log_line(f"{path}: damaged, kept beside as *.damaged-{now}")
            for file in (path, f"{path}-wal"):
                if os.path.exists(file):
                    os.replace(file, f"{file}.damaged-{now}")
            os.replace(made, path)
    finally:
        if made != path and os.path.exists(made):
            os.remove(made)
    print(f"tenant {tenant.name}: {path} is as {options.file} was")


def show_employees(options: argparse.Namespace) -> None:
    """Print a tenant's employees."""
    directory = Directory.as_stored(chosen_store(options))
    active = None if options.active is None else options.active == "true"
    found = directory.employees(active, options.changed_since, options.id)
    table = employee_table(found, directory.link_names)  # of what is lazy here, one form is printed
    forms = {
        "table": aligned(table),
        "csv": employee_csv(table),
        "json": (json.dumps(asdict(employee), ensure_ascii=False) + "\n" for employee in found),
    }
    sys.stdout.writelines(forms[options.format])


def aligned(table: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a table, whose first row has the titles, as lines; columns that hold nothing are left out."""
    rows = list(table)
    columns = enumerate(zip(*rows, strict=True))
    widths = {n: max(map(len, column)) for n, column in columns if any(column[1:]) or not rows[1:]}
    for row in rows:
        yield "  ".join(row[n].ljust(width) for n, width in widths.items()).rstrip() + "\n"


def show_changes(options: argparse.Namespace) -> None:
    """Print a tenant's changes, a line of JSON each."""
    directory, after = Directory.as_stored(chosen_store(options)), options.after
    with suppress(KeyboardInterrupt):
        while (found := directory.changes(after, MAX_WAIT * options.follow)) or options.follow:
            for change in found:
                after = change.seq
                print(json.dumps(asdict(change), ensure_ascii=False), flush=True)


# -- The demo: Entra ID's cycle, played against any SCIM server ----------------------


class Demo:
    """Requests of Entra ID to a server, each of them printed; wrong counts unexpected answers."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token, self.wrong = url, token, 0

    def send(self, method: str, path: str, body: Json = None) -> tuple[int, Json]:
        """Return status and JSON of the answer to a request; OSError where nobody answers."""
        request = urllib.request.Request(
            self.url + path,
            None if body is None else to_json(body).encode(),
            method=method,
            headers={
                "Authorization": f"Bearer {self.token}",
                "Content-Type": "application/scim+json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            with suppress(ValueError):
                return error.code, json.loads(error.read() or b"{}")
            return error.code, {}

    def step(
        self,
        title: str,
        expected: int,
        method: str,
        path: str,
        body: Json = None,
        /,
        **values: Json,
    ) -> str:
        """Send a request that a status and some values must answer; return the id of the answer."""
        status, answer = self.send(method, path, body)
        good = status == expected and values.items() <= answer.items()
        told = answer.get("detail", "") or ("" if good else quoted(answer))
        print(
            f"  {'ok   ' if good else 'WRONG'}  {title:<52} {status}  {told}".rstrip(), flush=True
        )
        if not good:
            print(f"         expected {expected} {to_json(values)}")
            self.wrong += 1
        return str(answer.get("id", "nobody"))

    def play(self, dialect: str, custom: Json) -> None:
        """Play the cycle in a dialect of PATCH, "default" or of the flag; custom is of /Schemas, or {}."""

        def patch(**operation: Json) -> Json:
            return {"schemas": [PATCH_OP], "Operations": [operation]}

        def change(path: str, value: Json) -> Json:
            old = dialect == "default"
            return (
                patch(op="Replace", path=path, value=value)
                if old
                else patch(op="replace", value={path: value})
            )

        def named(user_name: str) -> str:
            return f"/Users?filter={quote(f'userName eq {to_json(user_name)}')}"

        step, her = self.step, f"ada.{secrets.token_hex(4)}@demo.example"
        user, other = (
            {
                "schemas": [USER, ENTERPRISE],
                "userName": mail,
                "externalId": str(uuid.uuid4()),
                "displayName": name,
                "title": "Engineer",
                "active": True,
                "emails": [{"type": "work", "value": mail, "primary": True}],
                ENTERPRISE: {"department": "Lifts"},
            }
            for mail, name in ((her, "Ada Demo"), (f"bob.{her}", "Bob Demo"))
        )
        off = "False" if dialect == "default" else False  # as Switch() and as Not() send it
        step(
            "Test Connection: look up somebody who is not there",
            200,
            "GET",
            named(str(uuid.uuid4())),
            totalResults=0,
        )
        step("Ada is assigned: look her up", 200, "GET", named(her), totalResults=0)
        ada_id = step("Create Ada, an engineer", 201, "POST", "/Users", user, title="Engineer")
        step("Create her once more: refused", 409, "POST", "/Users", user, scimType="uniqueness")
        bob_id = step("Create Bob", 201, "POST", "/Users", other)
        ada, bob = f"/Users/{ada_id}", f"/Users/{bob_id}"
        step("Her job title changes", 200, "PATCH", ada, change("title", "Chief"), title="Chief")
        step(
            "Her department changes",
            200,
            "PATCH",
            ada,
            change(f"{ENTERPRISE}:department", "Roofs"),
            **{ENTERPRISE: {"department": "Roofs"}},
        )
        if custom:
            value = {"integer": 1, "boolean": True}.get(custom["type"], "one")
            step(
                f"The custom field {custom['name']} is mapped",
                200,
                "PATCH",
                ada,
                change(f"{FACILIO}:{custom['name']}", value),
            )
        mistake = change(f"{FACILIO}:no_such_field", "1")
        step("A mapping mistake, no such custom field: refused", 400, "PATCH", ada, mistake)
        crew = "/Groups/" + step(
            "The group Night Crew, with Ada",
            201,
            "POST",
            "/Groups",
            {
                "schemas": [GROUP],
                "displayName": f"Night Crew {her}",
                "members": [{"value": ada_id}],
            },
        )
        step(
            "Bob joins the crew",
            200,
            "PATCH",
            crew,
            patch(op="Add", path="members", value=[{"value": bob_id}]),
        )
        step(
            "Ada leaves the crew",
            200,
            "PATCH",
            crew,
            patch(op="Remove", path="members", value=[{"value": ada_id}]),
        )
        step("Ada is disabled", 200, "PATCH", ada, change("active", off), active=False)
        step("Ada is back", 200, "PATCH", ada, change("active", True), active=True)
        for name, path in (("Ada", ada), ("Bob", bob), ("The crew", crew)):
            step(f"{name} is deleted for good", 204, "DELETE", path)
        step("Nothing is left of her", 404, "GET", ada)


def demo(options: argparse.Namespace) -> int:
    """Play Entra ID's cycle in both dialects against a server; 1 where a step went wrong."""
    config = chosen_config(options)
    url = (options.url or url_of(config, config.port)).partition("?")[0].rstrip("/")
    known = [
        token.secret
        for token in config.tenants[0].tokens
        if token.secret and not token.expired(utc_now())
    ]
    if not (options.token or known):
        raise StoreError("--token is needed: the configuration has no secret that is good")
    played = Demo(url, options.token or known[0])
    try:
        status, schema = played.send("GET", f"/Schemas/{FACILIO}")
        for dialect in ("default", "aadOptscim062020"):
            print(f"\n{url}, dialect {dialect}")
            played.play(dialect, schema["attributes"][0] if status == 200 else {})
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{url}: no answer ({error}); start the server in another terminal: "
            "python3 scim_server.py"
        ) from error
    print(f"\n{played.wrong or 'no'} step(s) went wrong")
    return 1 if played.wrong else 0


# -- The command line ------------------------------------------------------------------

Options = dict[str, dict[str, Any]]  # as argparse takes them
SERVE_OPTIONS: Options = {
    "--config": {
        "metavar": "FILE",
        "help": "configuration (default: sample_config.json beside this file, "
        "else a built-in demo tenant)",
    },
    "--data-dir": {
        "metavar": "DIR",
        "help": "where the tenants' files are; :memory: keeps nothing",
    },
    "--listen": {"metavar": "HOST:PORT", "help": "address; port 0 picks a free one"},
    "--workers": {"metavar": "N", "type": int, "help": "processes that share the work"},
    "--version": {"action": "version", "version": f"scim_server {__version__}"},
}
CONFIG, DATA_DIR = (
    {name: {**SERVE_OPTIONS[name], "default": argparse.SUPPRESS}}
    for name in ("--config", "--data-dir")
)
TENANT: Options = {"--tenant": {"required": True, "metavar": "NAME"}, **DATA_DIR, **CONFIG}
COPY: Options = {"file": {"metavar": "FILE"}, **TENANT}
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int | None], str, Options]] = {
    "token": (
        make_token,
        "make a secret token and its configuration entry",
        {"--name": {"default": "entra", "help": "name of the token (default: entra)"}},
    ),
    "check": (
        check,
        "validate a configuration, list the custom fields' names for Entra ID",
        {**CONFIG, **DATA_DIR},
    ),
    "employees": (
        show_employees,
        "print a tenant's employees",
        {
            "--format": {"choices": ("table", "csv", "json"), "default": "table"},
            "--active": {"choices": ("true", "false"), "help": "only those who are, or are not"},
            "--changed-since": {
                "default": "",
                "metavar": "TIME",
                "help": "such as 2026-11-24T08:00:00Z",
            },
            "--id": {"type": int, "help": "only this one"},
            **TENANT,
        },
    ),
    "changes": (
        show_changes,
        "print a tenant's changes, a line of JSON each",
        {
            "--after": {
                "type": int,
                "default": 0,
                "metavar": "SEQ",
                "help": "only those behind this one",
            },
            "--follow": {"action": "store_true", "help": "go on with what comes, until Ctrl-C"},
            **TENANT,
        },
    ),
    "backup": (back_up, "copy a tenant's database to a new file, even while the server runs", COPY),
    "restore": (restore, "put a backup in the place of a tenant's database", COPY),
    "demo": (
        demo,
        "play Entra ID's cycle against a running server",
        {
            "--url": {"metavar": "URL", "help": "its Tenant URL (default: as configured)"},
            "--token": {"help": "its Secret Token (default: that of the first tenant)"},
            **CONFIG,
        },
    ),
}


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line asks for; its run is the function to call."""
    parser = argparse.ArgumentParser(
        prog="scim_server.py", description="A SCIM 2.0 server for Microsoft Entra ID, in one file."
    )
    commands = parser.add_subparsers(metavar="COMMAND", help="without one: serve")
    for name, (run, purpose, options) in {"": (serve, "", SERVE_OPTIONS), **COMMANDS}.items():
        command = commands.add_parser(name, help=purpose) if name else parser
        command.set_defaults(run=run)
        for option, details in options.items():
            command.add_argument(option, **details)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 where a person must mend something."""
    options = parse_options(arguments)
    try:
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as behind `| head`; Python would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (StoreError, ScimError, OSError) as error:
        log_line(str(error))
    except ConfigError as error:
        for line in error.problems if options.run is check else ["; ".join(error.problems)]:
            log_line(f"{chosen_file(options)}: {line}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
