#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# ///
"""scim_server: a SCIM 2.0 server in one file, for Microsoft Entra ID and other identity providers.

People who are assigned to an enterprise application in Entra ID are provisioned here by SCIM. They
become employees of Facilio: created, updated, and marked inactive when they leave. The server needs
Python 3.10 or newer and nothing else.

Run it        python scim_server.py               serve sample_config.json, or a demo tenant
              python scim_server.py demo          play Entra ID against the running server
              python scim_server.py check         explain a configuration; also: init, token,
                                                  employees, changes, backup, restore, migrate
Embed it      server = ScimServer("config.json"); server.start()        and later: server.stop()
              application = wsgi("config.json")   for gunicorn, or under a prefix in Flask
              Directory(Store("one.sqlite3")).create("User", {"userName": "ada"})     without HTTP
Test with it  with running() as server:           an empty server in memory, on a free port;
                  server.token("demo")            server.url, faults, requests(), reset(), advance()
              pytest -p scim_server               the same as the fixture scim
              python scim_server.py --test        the same for other languages: /_test/

Chapters      1 Vocabulary        schema URNs, limits, ScimError
              2 Schemas           Attribute, Schema, ResourceType: data that decides everything else
              3 Filters, paths    text becomes a tree; matches() evaluates it in Python
              4 Resources         accept() lets a body in, project() lets a resource out
              5 PATCH             operations on a resource: all of them, or none
              6 Queries           the tables, and the filter tree as SQL
              7 Databases         connections and transactions; errors become StoreError
              8 Store             one tenant's tables: sessions, transactions, backup
              9 Employees         the Facilio employee made from a user
             10 Directory         the operations on one tenant, a transaction each
             11 Configuration     tenants, tokens and clients, custom fields
             12 Messages          Request, Response, Call, credentials, bodies, errors, HTTP/1.1
             13 SCIM endpoints    resources, queries, cursors, discovery, Bulk
             14 Provisioning log  what each call did, what to do when it failed
             15 Other endpoints   employees, changes, open problems, metrics
             16 Application       tenants, routes, handle(Request) -> Response
             17 Test aids         injected faults, the journal of requests, the control API
             18 Connections       sockets, TLS, deadlines, the watching thread
             19 HTTP server       lanes for reads and writes, answers; WSGI
             20 Console           the page that shows why provisioning works or fails
             21 Embedding         ScimServer, running(), wsgi(); reloading the configuration
             22 Demo              the requests of Entra ID, played against a server
             23 Commands          main() and the command line

One request   octets -> Connection (buffer, deadline) -> read_head(), body -> Request -> lane ->
              Application.handle (token, route) -> Directory (accept, PATCH or query, in one
              transaction) -> Session -> project() -> Response -> octets

Notation      resource   a canonical JSON object: {"schemas": [...], "id": "2819", "userName": "Bo"}
              attribute  an Attribute, for example that of emails or of emails.type
              filter     a filter tree, for example Compare(emails.type, "eq", "work")
              key        the form in which values compare: "bo" for the userName "Bo"
              entry      a row of the index, (path, key, element): ("emails.type", "work", 0)
              version    an ETag, as in meta.version: W/"3"; that of a file is its format

PYTEST_DONT_REWRITE: this file is a plugin of pytest, which need not change its assertions.
"""

from __future__ import annotations

# Older Pythons know no match. They take this line for a print statement of Python 2: the last line
# of their error is "SyntaxError: Missing parentheses … "scim_server needs Python 3.10 or newer"".
# fmt: off
match lambda: print , "scim_server needs Python 3.10 or newer":
    case _: pass
# fmt: on

import argparse
import base64
import copy
import csv
import difflib
import errno
import hashlib
import hmac
import http.client
import importlib
import io
import ipaddress
import itertools
import json
import logging
import operator
import os
import queue
import random
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
import urllib.error
import urllib.request
import uuid
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType, ModuleType, NoneType, SimpleNamespace
from typing import Any, Literal, NamedTuple, TypeVar, cast
from unicodedata import normalize
from urllib.parse import parse_qsl, quote, unquote, urlencode

# ----------------------------------------------------------------------------
# 1. Vocabulary                                          RFC 7643, RFC 7644 §3.12
#
# The names of the protocol, the limits of this server, its loggers and its error.
# Uses no other chapter.
# ----------------------------------------------------------------------------

USER = "urn:ietf:params:scim:schemas:core:2.0:User"
GROUP = "urn:ietf:params:scim:schemas:core:2.0:Group"
ENTERPRISE = "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User"
FACILIO = "urn:ietf:params:scim:schemas:extension:facilio:2.0:User"
LIST_RESPONSE = "urn:ietf:params:scim:api:messages:2.0:ListResponse"
BULK_RESPONSE = "urn:ietf:params:scim:api:messages:2.0:BulkResponse"
PATCH_OP = "urn:ietf:params:scim:api:messages:2.0:PatchOp"
ERROR = "urn:ietf:params:scim:api:messages:2.0:Error"
BASE_PATH = "/scim/v2"
DEFAULT_COUNT, MAX_COUNT = 100, 1_000  # default and maximum page size
# PATCH of a group with more members answers 204: its cost depends on the change, not on the group.
MAX_ANSWERED_MEMBERS = 1_000
MAX_FILTER_LENGTH = 8 * 1024  # characters
MAX_FILTER_TERMS, MAX_FILTER_DEPTH = 300, 8  # nested brackets; SQLite limits the SQL of a filter
MAX_DETAIL, MAX_TEXT = 4_000, 64 * 1024  # characters of an error's detail, of a value
MAX_VALUES, MAX_DEPTH = 1_000, 50  # values of an attribute except members, nesting of a body
# What a write may cost, so that others need not wait long: visits to values by a PATCH, in units of
# what a term of a filter costs, and members that are added or removed.
MAX_VISITS, MAX_MEMBER_CHANGES = 1_000_000, 100_000
# Bytes of a body: of any request, of a bulk request, and where no token is needed.
MAX_BODY, MAX_BULK_BODY, MAX_PUBLIC_BODY = 2 * 1024 * 1024, 10 * 1024 * 1024, 8 * 1024
MAX_CONTAINERS = 250_000  # objects and lists of a body: each takes far more memory than its text
LINK_SIZE = 200  # characters of a member of a group, or a group of a user, in an answer
MAX_PAGE = 8 * 1024 * 1024  # characters of the resources in a page
MAX_BULK_OPERATIONS = 1_000
MAX_WAIT = 60  # seconds that a long poll may wait
CURSOR_SECONDS, ACCESS_SECONDS = 3_600, 3_600  # validity of a cursor, of an access token
SIGNATURE_LENGTH = 16  # bytes of an HMAC
__version__ = "1.0.0"
# fmt: off
__all__ = [  # the public interface; everything else may change
    "Application", "Change", "Config", "ConfigError", "Control", "CustomField", "Directory",
    "Employee", "Exchange", "Fault", "Page", "Request", "Response", "ScimError", "ScimServer",
    "Store", "StoreError", "load_config", "main", "parse_config", "running", "wsgi",
]
# fmt: on
UTC = timezone.utc  # Python 3.10 has no datetime.UTC
Json = Any  # what json.loads returns
Resource = dict[str, Any]
# What happens, and each request. A program that embeds this file decides where that is written.
LOG, ACCESS_LOG = logging.getLogger("scim_server"), logging.getLogger("scim_server.access")


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
        # A client's text in a detail may have half a surrogate pair, which UTF-8 cannot carry.
        detail = detail.encode("utf-8", "replace").decode()
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
    # Return a client's value as JSON text of at most 80 characters, for an error's detail.
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
    # Return a dateTime as UTC text that sorts by time; ValueError if it is not a dateTime.
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


def complex_key(value: Mapping[str, Json]) -> str:
    # Return "1" for a complex value, "" if all of its parts are empty text: it is not present.
    return "1" * any(
        complex_key(part) if isinstance(part, dict) else part != "" for part in value.values()
    )


KEYS: dict[str, Callable[[Any], str]] = {  # how values become keys; the other types are text
    "boolean": lambda value: "true" if value else "false",
    # A filter may compare with 41.5, or with a number beyond all Integers.
    "integer": lambda number: (
        f"{int(min(max(number, -INTEGER_LIMIT - 1), INTEGER_LIMIT) // 1) + INTEGER_LIMIT:020d}"
        + "." * (number % 1 > 0)
    ),
    "dateTime": date_time_key,
    "complex": complex_key,  # marks presence: complex values have no order of their own
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
    clearable: bool = False  # "" clears it although it is a String
    path: str = ""  # in a resource type: "emails.type", "urn:…:User:department"

    @cached_property
    def index(self) -> str:  # the path in lower case
        return self.path.lower()

    @cached_property
    def by_name(self) -> dict[str, Attribute]:
        # The sub-attributes by their names in lower case: names ignore case (RFC 7643 §2.1).
        return {sub.name.lower(): sub for sub in self.sub_attributes}

    def with_paths(self, prefix: str = "") -> Attribute:
        # Return a copy in which this attribute and its sub-attributes know their paths.
        path = prefix + self.name
        # A colon separates an extension's URN from an attribute (RFC 7644 §3.10), a dot all others.
        below = path and path + (":" if ":" in self.name else ".")
        return replace(
            self,
            path=path,
            sub_attributes=tuple(sub.with_paths(below) for sub in self.sub_attributes),
        )

    @property
    def value_attribute(self) -> Attribute | None:
        # The sub-attribute "value", which a bare value stands for (RFC 7643 §2.4), or None.
        # In an extension, "value" would be an ordinary attribute, such as a custom field.
        return None if ":" in self.name else self.by_name.get("value")

    def convert(self, value: Json, scim_type: str = "invalidValue") -> Json:
        """Return a JSON value in the type of this simple attribute; ScimError 400 with scim_type.

        Text is converted to a Boolean or an Integer: Entra's Switch() mapping sends "True".
        """
        match self.type:
            case "boolean" if str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
            case "integer" if (
                type(value) in (int, str)
                and INTEGER_TEXT.fullmatch(str(value))
                and -INTEGER_LIMIT <= int(value) < INTEGER_LIMIT
            ):
                return int(value)
            case "string" | "reference" | "binary" | "dateTime" if isinstance(value, str):
                if len(value) > MAX_TEXT:
                    raise ScimError(
                        400,
                        scim_type,
                        f"{self.path}: the text has {len(value)} characters, more than {MAX_TEXT}",
                    )
                with suppress(ValueError):
                    KEYS.get(self.type, str)(value)  # fails for text that is no dateTime
                    return value
        expected, excerpt = TYPE_NAMES.get(self.type, "a String"), quoted(value)
        raise ScimError(
            400,
            scim_type,
            f"{self.path}: expected {expected}, got {excerpt}",
            reason=(self.type, self.path, excerpt)
            if self.type in ("boolean", "integer")
            else ("type", self.path, expected, excerpt),
        )

    def values(self, holder: Mapping[str, Json]) -> list[Json]:
        # Return the values of this attribute in a resource or complex value: none, one or many.
        value = holder.get(self.name, [])
        return value if self.multi_valued or self.name not in holder else [value]

    def key(self, value: Json) -> str:
        # Return the text that decides which values are equal, and the order of values.
        if key := KEYS.get(self.type):
            return key(value)
        if self.case_exact or value.isascii():
            return str(value if self.case_exact else value.lower())
        # é may be sent as one character or as two (RFC 7644 §5). Case folding takes some apart.
        text = value.translate(WIDTHS) if self.is_name else value
        return normalize("NFC", normalize("NFC", text).casefold())


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

    @cached_property
    def root(self) -> Attribute:
        return Attribute(
            "",
            "complex",
            sub_attributes=(
                *COMMON,
                *self.schema.attributes,
                *(Attribute(e.id, "complex", sub_attributes=e.attributes) for e in self.extensions),
                META,
            ),
        ).with_paths()

    @cached_property
    def scopes(self) -> dict[str, Attribute]:
        # The complex attribute that the URN of each schema stands for: root, or an extension.
        return {
            self.schema.id: self.root,
            **{e.id: self.root.by_name[e.id.lower()] for e in self.extensions},
        }

    def location(self, base_url: str, id: str) -> str:
        return f"{base_url}{self.endpoint}/{id}"


# fmt: off
USER_SCHEMA = Schema(USER, "User", "User Account", (
    Attribute("userName", required=True, uniqueness="server", is_name=True),
    Attribute("name", "complex", sub_attributes=tuple(map(Attribute, (
        "formatted", "familyName", "givenName", "middleName", "honorificPrefix", "honorificSuffix",
    )))),
    *map(Attribute, ("displayName", "nickName")),
    Attribute("profileUrl", "reference", case_exact=True, reference_types=("external",)),
    Attribute("title", description="The job title; the employee's designation"),
    *map(Attribute, ("userType", "preferredLanguage", "locale", "timezone")),
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
        *map(Attribute, (
            "formatted", "streetAddress", "locality", "region", "postalCode", "country",
        )),
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
    *map(Attribute, ("employeeNumber", "costCenter", "organization", "division", "department")),
    Attribute("manager", "complex", sub_attributes=(
        Attribute("value", case_exact=True, identifies=True, clearable=True),
        Attribute("$ref", "reference", case_exact=True, published=False,
                  reference_types=("User",)),
        Attribute("displayName", clearable=True),
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
    # Return a tenant's resource types by name; User comes first, as Entra's validator needs it.
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


FIELD_TYPES = {
    str: "string",
    int: "integer",
    bool: "boolean",
}  # of a custom field, by the type of a value


def resource_types_of(values: Mapping[str, Json]) -> dict[str, ResourceType]:
    # Return the resource types with custom fields that fit some values, given by link name.
    return resource_types(
        tuple(CustomField(name, FIELD_TYPES[type(value)]) for name, value in values.items())
    )


# ----------------------------------------------------------------------------
# 3. Filters and paths                               RFC 7644 §3.4.2.2, §3.5.2
#
# The text of a filter becomes a tree, and every name in it an Attribute. The tree
# has two readers: matches() here, compile_filter() in chapter 6.
# Uses chapters 1 and 2. Knows nothing of HTTP, SQL or the clock.
# ----------------------------------------------------------------------------

AttributePath = tuple[Attribute, ...]  # a path from the top down: (emails, type) for emails.type


@dataclass(frozen=True, slots=True)
class Compare:
    """Whether one of an attribute's values compares with a literal as op says.

    value is the literal in the attribute's type (for an Integer any number), key is its key. op is
    one of OPERATORS. With "pr" key and value are "".
    """

    target: AttributePath
    op: str
    key: str
    value: Json


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


Filter = Compare | And | Or | Not | ValuePath
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
    "pr": operator.gt,  # what is empty has an empty key: it is not present
}


def values_at(path: AttributePath, value: Json) -> list[Json]:
    # Return the values at a path in a resource or complex value, as one flat list.
    values = [value]
    for attribute in path:
        values = [item for holder in values for item in attribute.values(holder)]
    return values


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
            return any(matches(inner, item, fold) for item in values_at(target, value))
        case Compare(target, op, key):
            return any(
                OPERATORS[op](fold(target[-1].key(item)), fold(key))
                for item in values_at(target, value)
            )


def terms_of(filter: Filter) -> list[Filter]:
    # Return the terms that must all match.
    return (
        [term for inner in filter.filters for term in terms_of(inner)]
        if isinstance(filter, And)
        else [filter]
    )


# -- Names -------------------------------------------------------------------


def split_urn(name: str, resource_type: ResourceType) -> tuple[str, str]:
    # Return the schema URN at the start of a name, "" if there is none, and the rest of the name.
    # No URN is the start of another one. Before 2018 Entra wrote a dot instead of the colon.
    for urn in resource_type.scopes:
        rest = name[len(urn) :]
        if name[: len(urn)].lower() == urn.lower() and rest[:1] in ("", ":", "."):
            return urn, rest[1:]
    return "", name


@lru_cache(1024)
def resolve(name: str, resource_type: ResourceType) -> AttributePath | None:
    """Return the attributes from the root down to a name in attrPath notation; None if unknown.

    The URN of the core schema stands for the root itself: the result is ().
    """
    name_urn, rest = split_urn(name, resource_type)
    for urn, scope in resource_type.scopes.items():
        # Entra sends the bare path "manager", so a name without URN is looked up in extensions too.
        if name_urn in ("", urn):
            down = list(
                itertools.accumulate(
                    rest.split(".") if rest or not name_urn else [],
                    lambda above, part: above and above.by_name.get(part.lower()),
                    initial=cast(Attribute | None, scope),
                )
            )
            if all(down):  # every name is known; the root has no path
                return tuple(attribute for attribute in down if attribute and attribute.path)
    return None


def resolve_sub_attribute(
    attributes: AttributePath | None, name: str, strict: bool = False
) -> AttributePath | None:
    """Return, as a path, the sub-attribute that a name means in the brackets after an attribute.

    Return None if the name or the attribute is unknown. If strict, an unknown name is a ScimError
    400 invalidPath.
    """
    sub = attributes[-1].by_name.get(name.lower()) if attributes else None
    if strict and attributes and not sub:
        raise invalid_path(f"path: {attributes[-1].path} has no sub-attribute {quoted(name)}")
    return (sub,) if sub else None


# -- The parser: a rule takes tokens and a position; it returns a filter and the next position --

Tokens = list[tuple[str, str, int]]  # kind, text, column from 1
Scope = partial[AttributePath | None]  # of resolve, or in brackets of resolve_sub_attribute
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
    # Return the error for a text that the syntax does not allow at a column, "" for the end.
    return invalid_filter(
        f"filter, column {column}: expected {expected}, found {quoted(text) if text else 'the end'}"
    )


def tokens_of(text: str) -> Tokens:
    """Return the tokens of a filter or path, then an end token; ScimError 400 invalidFilter.

    Text that is not a token becomes an error token up to the end. No rule of the parser accepts it.
    """
    if len(text) > MAX_FILTER_LENGTH:
        raise invalid_filter(f"filter: longer than {MAX_FILTER_LENGTH} characters")
    return [
        (kind := token.lastgroup or "", token[kind], token.start(kind) + 1)
        for token in TOKEN.finditer(text)
    ] + [("end", "", len(text.rstrip()) + 1)]


def parse_filter(text: str, resource_type: ResourceType) -> Filter:
    # Return the tree of a filter on resources (RFC 7644 §3.4.2.2); ScimError 400 invalidFilter.
    tokens = tokens_of(text)
    if sum(text.lower() in ("and", "or") for _, text, _ in tokens) >= MAX_FILTER_TERMS:
        raise invalid_filter(f"filter: more than {MAX_FILTER_TERMS} terms")
    return parse_filter_tokens("", tokens, 0, partial(resolve, resource_type=resource_type))[0]


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
    following = tokens[position + 1][1] if kind != "end" else ""
    match kind, text.lower(), following:
        case _, "(", _:
            return parse_filter_tokens(")", tokens, position + 1, scope, depth + 1)
        case _, "not", "(":
            inner, position = parse_term(tokens, position + 1, scope, depth)
            return Not(inner), position
        # In brackets there are no other brackets (RFC 7644 figure 1): they would have no meaning.
        case "name", _, "[" if scope.func is resolve:
            return parse_value_path(tokens, position + 1, scope(text), text, depth)
        case "name", *_:
            return parse_expression(tokens, position + 1, scope(text), text)
        case _:
            raise bad_filter(column, "an attribute name", text)


# valuePath = attrPath "[" valFilter "]", and what Entra sends: valuePath "." subAttr SP compareOp …
def parse_value_path(
    tokens: Tokens, position: int, attributes: AttributePath | None, name: str, depth: int
) -> Parsed:
    # Return a value path, from its bracket on; a comparison after it is added to its filter.
    inner, position = parse_brackets(tokens, position, attributes, name, depth)
    kind, text, _ = tokens[position]
    if kind == "sub":
        comparison, position = parse_expression(
            tokens, position + 1, resolve_sub_attribute(attributes, text[1:]), name + text
        )
        inner = And((inner, comparison))
    return (ValuePath(attributes, inner) if attributes else NOTHING), position


def parse_brackets(
    tokens: Tokens,
    position: int,
    attributes: AttributePath | None,
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
    tokens: Tokens, position: int, attributes: AttributePath | None, name: str
) -> Parsed:
    """Return the comparison of an attribute, from its operator on."""
    _, text, column = tokens[position]
    op = text.lower()
    if attributes and attributes[-1].computed:
        raise invalid_filter(f"{name}: made for each response; a filter cannot use it")
    if op == "pr":
        return (Compare(attributes, "pr", "", "") if attributes else NOTHING), position + 1
    if op != "ne" and op not in OPERATORS:
        raise bad_filter(column, "an operator (eq, ne, co, sw, ew, gt, ge, lt, le, pr)", text)
    # ne is the opposite of eq, so it also matches resources that lack the attribute.
    filter = bind_comparison(
        attributes, name, "eq" if op == "ne" else op, parse_literal(*tokens[position + 1])
    )
    return Not(filter) if op == "ne" else filter, position + 2


def parse_literal(kind: str, text: str, column: int) -> Json:
    # Return the JSON value of a token; ScimError 400 invalidFilter if it is not a simple value.
    with suppress(ValueError):
        literal = LITERAL.decode(text.lower() if kind == "name" else text)
        # An object such as {"a": 1} is an error token.
        if kind != "error" and not (isinstance(literal, str) and UNSTORABLE.search(literal)):
            return literal
    raise bad_filter(column, "a value: text in double quotes, a number, true, false or null", text)


def bind_comparison(attributes: AttributePath | None, name: str, op: str, literal: Json) -> Filter:
    """Return the filter that compares an attribute with a literal; ScimError 400 invalidFilter."""
    if not attributes:  # an attribute that is not in the schemas has no value (RFC 7644 §3.4.2.1)
        return NOTHING
    if value_attribute := attributes[-1].value_attribute:
        attributes = (*attributes, value_attribute)
    attribute = attributes[-1]
    check_comparison(attribute, name, op, literal)
    if literal is None:
        return Not(Compare(attributes, "pr", "", ""))
    value = (
        literal  # a number need not be an Integer to compare with one
        if attribute.type == "integer" and type(literal) in (int, float)
        else attribute.convert(literal, "invalidFilter")
    )
    return Compare(attributes, op, attribute.key(value), value)


def check_comparison(attribute: Attribute, name: str, op: str, literal: Json) -> None:
    """Raise ScimError 400 invalidFilter if an operator does not suit the type or null."""
    if attribute.type == "complex":
        raise invalid_filter(
            f"{name}: compare one of its sub-attributes: "
            + ", ".join(sub.name for sub in attribute.sub_attributes)
        )
    # Boolean and binary have no order (RFC 7644 table 3); only text has a beginning and an end.
    if (
        (op in ("gt", "ge", "lt", "le") and attribute.type in ("boolean", "binary"))
        or (op in ("co", "sw", "ew") and attribute.type not in STRING_TYPES)
        or (literal is None and op != "eq")
    ):
        raise invalid_filter(
            f"{name}: '{op}' cannot compare the type {attribute.type} with {quoted(literal)}"
        )


# -- Paths of PATCH ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PatchPath:
    """The path of a PATCH operation, such as emails[type eq "work"].value; () means no path."""

    attributes: AttributePath  # (emails,)
    filter: Filter | None = None  # on its values: Compare(type, "eq", "work")
    sub_attribute: Attribute | None = None  # value
    cost: int = 3  # of a visit to one value, in terms of a filter


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
    sub = attributes[-1].by_name.get(rest[1:].lower()) if kind == "sub" else None
    if tokens[position + 1 if sub else position][0] != "end":
        raise invalid_path(
            f"path {quoted(text)}: only a sub-attribute of {attributes[-1].path} can follow ']'"
        )
    return PatchPath(attributes, filter, sub, cost=3 + len(tokens) // 4)


def unknown_attribute(name: str, resource_type: ResourceType) -> ScimError:
    # Return the error for an unknown attribute; in an extension it lists the attributes.
    urn, wrong_name = split_urn(name, resource_type)
    if urn in ("", resource_type.schema.id):
        return invalid_path(f"path {quoted(name)}: {resource_type.name} has no such attribute")
    right_names = ", ".join(sub.name for sub in resource_type.scopes[urn].sub_attributes) or "none"
    return invalid_path(
        f"path: {urn} has no attribute '{wrong_name}'; its attributes are: {right_names}",
        reason=("link_name", wrong_name[:80], right_names) if urn == FACILIO else (),
    )


# ----------------------------------------------------------------------------
# 4. Resources                                 RFC 7643 §2 and §3, RFC 7644 §3.9
#
# accept() makes a canonical resource from a client's JSON: names as in the schema,
# no nulls, no empty lists, values in their declared types. All other code trusts
# that a resource is canonical, and does not check again.
# project() chooses what a client sees of a resource; index_entries() what is indexed.
# StoredResource is its row in a store; Precondition compares versions.
# Uses chapters 1 to 3. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------


def lowercase_keys(
    value: Json, expected: str = "the body must be a JSON object"
) -> dict[str, Json]:
    """Return a JSON object with its names in lower case; ScimError 400 if it is not an object.

    The same name in two spellings is a ScimError 400 too.
    """
    if not isinstance(value, dict):
        raise invalid_syntax(f"{expected}, got {quoted(value)}")
    names = [name.lower() for name in value]
    if len(set(names)) < len(names):
        raise invalid_value(f"{quoted(Counter(names).most_common(1)[0][0])}: sent twice")
    return dict(zip(names, value.values(), strict=True))


def accept(attribute: Attribute, value: Json) -> Resource:
    # Return the canonical form of a client's complex value (or a resource, for the root of its
    # type); ScimError 400 if it is not valid.
    sent = lowercase_keys(value)
    # Read-only and unknown attributes are ignored: Entra and Okta send some of them.
    accepted = {
        sub.name: item
        for name, sub in attribute.by_name.items()
        if name in sent and sub.mutability in ("readWrite", "immutable") and not sub.computed
        if (item := accept_value(sub, sent[name])) is not None
    }
    require(attribute, accepted)
    return accepted


def accept_value(attribute: Attribute, value: Json) -> Json:
    """Return the canonical value of an attribute; ScimError 400 invalidValue.

    Return None for what means "no value" (RFC 7643 §2.5): null, [] (not for a custom field), {} of
    a complex attribute, and "" of an attribute that is not a String or is clearable.
    """
    if not attribute.multi_valued:
        # [] means that there is no value, except for a custom field, which must not be a list.
        return (
            None
            if value == [] and FACILIO not in attribute.path
            else accept_single(attribute, unlisted(attribute, value))
        )
    # OneLogin's template sends emails as one object.
    items = value if isinstance(value, list) else [value] * (value is not None)
    accepted = [
        item for item in (accept_single(attribute, item) for item in items) if item is not None
    ]
    keep_one_primary(accepted)
    return accepted or None


def unlisted(attribute: Attribute, value: Json) -> Json:
    # Return the item of a list with one item, if it stands for a single complex value.
    # Entra's tutorial sends the manager as a list.
    return (
        value[0]
        if attribute.type == "complex" and isinstance(value, list) and len(value) == 1
        else value
    )


def accept_single(attribute: Attribute, value: Json) -> Json:
    """Return one canonical value, or None if it is empty; ScimError 400 invalidValue.

    Entra clears every type of attribute with "". A member that is null or "" is an error: to
    ignore it could empty the group.
    """
    if not attribute.is_membership and (
        value is None or (value == "" and (attribute.type != "string" or attribute.clearable))
    ):
        return None
    # A reference to a user or group may be relative. Another host in it would mislead its readers.
    if (
        "User" in attribute.reference_types
        and isinstance(value, str)
        and not re.fullmatch(r"(\.\./)*/?[\w~%-][\w.~%/-]*", value, re.ASCII)
    ):
        return None
    # A bare value stands for {"value": …}: managers by id, and Entra's roles as JSON text.
    if attribute.value_attribute and not isinstance(value, (dict, list)):
        value = {"value": value}
    if attribute.type == "complex" and isinstance(value, dict):
        return accept(attribute, value) or None
    return attribute.convert(value)  # refuses a complex value that is not an object


def is_primary(value: Json) -> bool:
    return isinstance(value, dict) and value.get("primary") is True


def keep_one_primary(values: list[Json], previous: Json = None) -> None:
    # Keep one primary value: the last new one, else the previous one (RFC 7644 §3.5.2).
    new = [value for value in values if is_primary(value) and value is not previous]
    for value in filter(is_primary, values):
        value["primary"] = not new or value is new[-1]


def require(attribute: Attribute, value: Mapping[str, Json], patched: bool = False) -> None:
    """Check the required attributes, and the number of values, of a complex value (or a resource).

    Raise ScimError 400 invalidValue, or mutability if a PATCH has removed a required attribute.
    """
    for sub in attribute.sub_attributes:
        if sub.required and not str(value.get(sub.name) or "").strip():
            raise ScimError(
                400,
                "mutability" if patched and sub.name not in value else "invalidValue",
                f"{sub.path} is required and must not be empty",
                reason=("required", sub.path),
            )
        if sub.is_membership:
            for item in value.get(sub.name, ()):
                require(sub, item)
        elif sub.multi_valued and len(value.get(sub.name, ())) > MAX_VALUES:
            raise invalid_value(f"{sub.path}: more than {MAX_VALUES} values")


def defaults(resource_type: ResourceType) -> Resource:
    # Return the attributes that a new resource gets if the client does not send them.
    return {
        sub.name: sub.default
        for sub in resource_type.root.sub_attributes
        if sub.default is not None
    }


def canonical(resource_type: ResourceType, resource: Resource) -> Resource:
    # Return a resource in the order of the schema, with its "schemas" up to date.
    resource = {**resource, "schemas": schemas_of(resource_type, resource)}
    return {
        sub.name: resource[sub.name]
        for sub in resource_type.root.sub_attributes
        if sub.name in resource
    }


def schemas_of(resource_type: ResourceType, resource: Mapping[str, Json]) -> list[str]:
    # Return the URNs of the schemas that a resource has attributes of (RFC 7643 §3).
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
        # Return whether any part of a top-level attribute is selected.
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
    # Return the selected part of a complex value (or a resource); whole means all is wanted.
    selected = {}
    for name, item in value.items():
        sub = attribute.by_name[name.lower()]
        sub_whole = whole or sub in (selection.wanted or ())
        if sub in selection.parents and sub not in selection.unwanted:
            parts = [select(sub, part, selection, sub_whole) for part in sub.values(value)]
            if any(parts):
                selected[name] = list(filter(None, parts)) if sub.multi_valued else parts[0]
        elif sub.returned == "always" or (sub_whole and sub not in selection.unwanted):
            selected[name] = item
    return selected


def memberships(resource: Resource, base_url: str) -> Resource:
    # Return the groups or members of a resource, with absolute URLs.
    return {
        name: [{**item, "$ref": base_url + item["$ref"]} for item in resource[name]]
        for name in MEMBERSHIP_ATTRIBUTES
        if name in resource
    }


def project(
    resource_type: ResourceType, resource: Resource, selection: Selection, base_url: str
) -> Resource:
    # Return what a client sees of a resource, with absolute URLs that begin with base_url.
    resource = {
        **resource,
        "meta": resource["meta"] | {"location": resource_type.location(base_url, resource["id"])},
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
    # Yield an entry for each simple value in a resource (or complex value).
    for name, item in value.items():
        sub = attribute.by_name[name.lower()]
        # The primary value is number 0: sorting uses it (RFC 7644 §3.4.2.3).
        parts = sorted(item, key=is_primary, reverse=True) if sub.multi_valued else [item]
        for number, part in enumerate(parts, start=0 if sub.multi_valued else element):
            if sub.type == "complex":
                yield from index_entries(sub, part, number)
            else:
                yield sub.index, sub.key(part), number


# -- The stored form -----------------------------------------------------------

to_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode
DECODER = json.JSONDecoder()


Encoded = str  # the JSON text of a resource that is sent as it is


def from_json(text: str) -> Json:
    return DECODER.raw_decode(text)[0]  # unlike decode(), it does not look for blanks around it


def pruned(value: Json) -> Json:
    # Return a JSON value without its empty objects and lists, which removals leave.
    match value:
        case dict():
            return {
                name: inner
                for name, item in value.items()
                if (inner := pruned(item)) not in ({}, [])
            }
        case list():
            return [item for item in map(pruned, value) if item != {}]
        case _:
            return value


class StoredResource:
    """A row of the table of resources, by its columns: body and hidden are JSON text."""

    def __init__(self, *columns: Any) -> None:
        (
            self.seq,
            self.type,
            self.id,
            self.body,
            self.hidden,
            self.revision,
            self.created,
            self.modified,
            self.member_count,
        ) = columns

    @cached_property
    def attributes(self) -> Resource:
        # The body, parsed once: the resource without what is computed. It is never changed.
        return from_json(self.body)  # type: ignore[no-any-return]

    def changed(self, attributes: Resource, **columns: Any) -> StoredResource:
        # Return the next revision, with other attributes and other values of some columns.
        body, row = to_json(attributes), copy.copy(self)
        if len(body) > MAX_BODY:  # it could not be sent back, and would slow down each later write
            raise invalid_value(f"the {self.type} would have more than {MAX_BODY} characters")
        vars(row).update(columns, attributes=attributes, body=body, revision=self.revision + 1)
        return row

    def with_fields_of(self, user_type: ResourceType) -> StoredResource:
        """Return the row with the present custom fields.

        Values of other fields, and of other types, are hidden: they come back with their
        fields.
        """
        offset = offset_of_member(self.body, FACILIO)
        if not offset and self.hidden == "{}":
            return self
        present: Resource = DECODER.raw_decode(self.body, offset)[0] if offset else {}
        hidden, by_name = from_json(self.hidden), user_type.root.by_name[FACILIO.lower()].by_name
        values = [
            (sub.name if sub and sub.type == FIELD_TYPES[type(value)] else "", name, value)
            for name, value in (*hidden.items(), *present.items())  # a present value wins
            for sub in [by_name.get(name.lower())]
        ]
        visible = {field: value for field, _, value in values if field}
        others = {name: value for field, name, value in values if not field}
        if (visible, others) == (present, hidden):
            return self
        attributes = pruned(self.attributes | {FACILIO: visible})
        return self.changed(attributes, hidden=to_json(others))

    def encoded(
        self, resource_type: ResourceType, version: str, links: Resource, base_url: str
    ) -> Encoded:
        """A whole resource as project() shows it; links are its groups or members.

        Building a dict only to serialise it would make a page of 100 a third slower.
        """
        schemas = '","'.join(
            schema.id
            for schema in (resource_type.schema, *resource_type.extensions)
            if schema is resource_type.schema or offset_of_member(self.body, schema.id)
        )
        text = to_json(memberships(links, base_url))[1:-1] + "," if links else ""
        return Encoded(
            f'{{"schemas":["{schemas}"],"id":{to_json(self.id)},"meta":{{"resourceType":'
            f'"{self.type}","created":"{self.created}","lastModified":"{self.modified}","version":'
            f'{to_json(version)},"location":'
            f"{to_json(resource_type.location(base_url, self.id))}}},{text}{self.body[1:]}"
        )

    def entries(self, resource_type: ResourceType) -> set[Entry]:
        return {
            *index_entries(resource_type.root, self.attributes),
            *(("schemas", urn, 1) for urn in schemas_of(resource_type, self.attributes)[1:]),
            ("meta.created", date_time_key(self.created), 0),
            ("meta.lastmodified", date_time_key(self.modified), 0),
        }


def stored(resource: Resource) -> Resource:
    # Return the attributes of a resource that are stored in its body.
    computed = ("schemas", "id", "meta", *MEMBERSHIP_ATTRIBUTES)
    return {name: value for name, value in resource.items() if name not in computed}


def offset_of_member(body: str, name: str) -> int:
    # Return the offset of a member's value in a body's JSON text; 0 if there is no such member.
    # In the text of a value the quotes would be escaped; no sub-attribute has the name of a URN.
    offset = body.rfind(f'"{name}":')
    return offset + len(name) + 3 if offset > 0 else 0


# -- Versions ------------------------------------------------------------------


class Precondition(NamedTuple):
    """A client's conditions on a version (RFC 7644 §3.14); a header that is absent is ""."""

    if_match: str = ""
    if_none_match: str = ""

    def excludes(self, version: str) -> bool:
        return self._names(self.if_none_match, version)

    def check(self, version: str) -> None:
        # Raise ScimError 412 if a write must not happen on this version.
        if self.if_match and not self._names(self.if_match, version):
            raise ScimError(412, "", f"If-Match: the version is now {version}; read it again")
        if self.excludes(version):
            raise ScimError(412, "", f"If-None-Match: the version is {version}")

    def _names(self, header: str, version: str) -> bool:
        # Versions are weak and are compared as such, although RFC 7644 uses them with If-Match.
        tags = header and [tag.strip().removeprefix("W/") for tag in header.split(",")]
        return "*" in tags or version.removeprefix("W/") in tags


ALWAYS = Precondition()


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

    @property
    def names_members(self) -> bool:  # by their ids, not by a filter
        return self.path.attributes[-1].is_membership and not self.path.filter

    @property
    def lists_values(self) -> bool:  # to add, or members to remove
        return (
            isinstance(self.value, list)
            and not self.path.filter
            and (self.op == "add" or (self.op == "remove" and self.names_members))
            # Which value is primary depends on the order of operations: the last one decides.
            and not any(map(is_primary, self.value))
        )


def parse_operations(resource_type: ResourceType, body: Json) -> list[Operation]:
    """Return the operations of a PATCH body; ScimError 400.

    An object that is merged becomes one operation for each of its attributes. Operations that add
    values to one attribute, or remove members, become one. An empty list changes nothing: Entra's
    older validator sends one.
    """
    if not isinstance(items := lowercase_keys(body).get("operations"), list):
        raise invalid_syntax("Operations: expected a list of PATCH operations")
    return list(merge_runs(step for item in items for step in parse_operation(resource_type, item)))


def merge_runs(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Yield operations; those that add values to an attribute, or remove members, become one.

    Operations on other attributes may stand between them, but none on the same one.
    """
    # Okta and Entra send one operation per member, with thousands in a request. If they were not
    # merged, each of them would go through all those members.
    places: dict[Attribute, int] = {}
    by_attribute = sorted(
        operations, key=lambda step: places.setdefault(step.path.attributes[0], len(places))
    )
    for (op, path, is_list), run in itertools.groupby(
        by_attribute, lambda step: (step.op, step.path, step.lists_values)
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
    # "id" when it renames a group. A misspelt custom field in a name is an error, so that the
    # administrator sees it; inside an extension's object it is ignored, as in a body.
    for name, item in value.items():
        plain = name[:MAX_FILTER_LENGTH].partition("[")[0].strip()
        if resolve(plain, resource_type) is not None or split_urn(plain, resource_type)[0]:
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
    for part in filter(None, (*path.attributes, path.sub_attribute)):
        # Through a filter an immutable attribute may be sent if its value stays the same.
        if (
            part.computed
            or part.mutability == "readOnly"
            or (part.mutability == "immutable" and not path.filter)
        ):
            raise ScimError(400, "mutability", f"{part.path} is {part.mutability}")
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
        yield Operation(op, path, accept_operand(op, path, value), value)


def normal_form(op: str, path: PatchPath, value: Json) -> tuple[PatchPath, Json]:
    """Return the path and value of an operation in the form that apply_operation() expects.

    Two spellings are translated. To remove members[value eq "x"] is to remove [{"value": "x"}]
    from members. Plain text for an object means its "value": a manager by id, or a new address for
    emails[type eq "work"]. A value is dropped if there is no list to remove it from.
    """
    match path:
        case PatchPath((members,), Compare((sub,), "eq", _, id), None) if (
            op == "remove"
            and members.is_membership
            and sub is members.value_attribute
            and id == id.lower()  # an id in another case is compared with those of all members
        ):
            return PatchPath((members,)), [{"value": id}]
        case PatchPath((*_, holder), filter, sub) if filter or not holder.multi_valued:
            value = None if op == "remove" else unlisted(holder, value)
            is_text = not isinstance(value, (dict, list, NoneType))
            if is_text and filter and not sub:
                return replace(path, sub_attribute=holder.value_attribute), value
            if is_text and not filter and holder.value_attribute:
                return path, {"value": value}
    return path, value


def accept_operand(op: str, path: PatchPath, value: Json) -> Json:
    """Return the canonical value of an operation on a path, or None; ScimError 400.

    For the values that a filter selects, it is an object with the parts to change, None for those
    to clear.
    """
    attribute, sub = path.attributes[-1], path.sub_attribute
    if not path.filter:
        return None if attribute.mutability == "writeOnly" else accept_value(attribute, value)
    if not (sub or isinstance(value, dict)):
        return None if value is None else accept_single(attribute, value)
    parts = lowercase_keys({sub.name: value} if sub else value)
    clears = op == "replace" and attribute.multi_valued and not sub  # the parts that are not sent
    # A filter selects and does not write: what it says stays in the spelling that is stored.
    return {
        part.name: accept_value(part, parts.get(name))
        for name, part in attribute.by_name.items()
        if not part.computed
        if name in parts
        or (clears and part.mutability != "immutable" and part.name not in equal_terms(path.filter))
    }


def check_member_changes(count: int) -> None:
    # Raise ScimError 400 tooMany for more changes of members than a request may make.
    if count > MAX_MEMBER_CHANGES:
        raise ScimError(400, "tooMany", f"members: more than {MAX_MEMBER_CHANGES} changes")


def touched_member_ids(operations: Iterable[Operation]) -> set[str] | None:
    """Return the ids of the members that operations can change; None means any member.

    The directory reads these members only, so that a change costs the same in a large group.
    ScimError 400 tooMany for more of them than a request may change.
    """
    changes = [step for step in operations if step.path.attributes[0].is_membership]
    check_member_changes(sum(len(step.value or ()) for step in changes if step.names_members))
    return (
        {item["value"] for step in changes for item in step.value or ()}
        if all(
            step.names_members and step.op != "replace" and step.sent is not None
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
        if sub.value_attribute
        for value in sub.values(patched)
        if value.get("value")
    ]
    visits = 0
    for operation in operations:
        # Long texts count as several values.
        values = operation.path.attributes[0].values(patched)
        visits += operation.path.cost * (len(values) + len(to_json(values)) // 256)
        if visits > MAX_VISITS:
            raise ScimError(
                400,
                "tooMany",
                f"Operations: they visit more than {MAX_VISITS} values; send fewer at a time",
            )
        apply_operation(patched, operation)
    for value in with_value:
        # An e-mail that has lost its address is no e-mail any longer.
        if not value.get("value") and value.keys() <= {"value", "type", "primary"}:
            value.clear()
    patched = pruned(patched)
    require(resource_type.root, patched, patched=True)
    return canonical(resource_type, patched)


def apply_operation(resource: Resource, operation: Operation) -> None:
    """Change a resource by one operation; ScimError 400 noTarget."""
    path = operation.path
    primary = next(filter(is_primary, path.attributes[0].values(resource)), None)
    holders = [resource]  # the objects with the attribute: the resource, or for example all e-mails
    for container in path.attributes[:-1]:
        for holder in holders:
            if operation.op != "remove" and not holder.get(container.name):
                holder[container.name] = [{}] if container.multi_valued else {}
        holders = [item for holder in holders for item in container.values(holder)]
    for holder in holders:
        if path.filter:
            change_selected(path.attributes[-1], holder, operation, path.filter)
        else:
            change(path.attributes[-1], holder, operation)
    keep_one_primary(path.attributes[0].values(resource), primary)


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
    # Most removed values have the same sub-attributes, so that few parts of a value are looked up.
    name_sets = {frozenset(name for name, _ in key) for key in removed_keys}
    return [
        value
        for value, key in ((value, identity_key(attribute, value)) for value in values)
        if removed_keys.isdisjoint(
            frozenset(part for part in key if part[0] in names) for names in name_sets
        )
    ]


def add_values(attribute: Attribute, values: list[Json], added: list[Json]) -> None:
    # Append new values to a list; a value that is in the list already is updated instead.
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
    # Return a key that two values share if they count as the same, such as members by their id.
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
    if attribute.is_membership and not selected:
        # The id of a member in another case is accepted if it means one member only.
        similar = [value for value in values if matches(filter, value, str.lower)]
        selected = similar * (len(similar) == 1)
    for value in selected:
        change_value(attribute, value, operation)
    # To clear what is not there makes nothing.
    if not selected and any(part not in (None, "") for part in (operation.value or {}).values()):
        values = [*values, new_value(attribute, operation, filter)]
    holder[attribute.name] = (
        [value for value in values if value] if attribute.multi_valued else next(iter(values), {})
    )


def new_value(attribute: Attribute, operation: Operation, filter: Filter) -> Resource:
    """Return the value that an operation adds if a filter selects none; ScimError 400 noTarget.

    Entra sends replace on emails[type eq "work"].value when there is no work e-mail yet. RFC
    7644 §3.5.2.3 asks for noTarget; Entra's validator expects a new value. It is made from
    labels only: a change of a user who is not a member, or lacks a role, must not grant it.
    """
    value = equal_terms(filter)
    change_value(attribute, value, operation)
    # A value that does not match the filter would be added again at each retry.
    if (
        attribute.is_membership
        or not (labels := equal_terms(filter).keys())
        or labels - {"type", "primary", "display"}
        or not matches(filter, value)
    ):
        raise ScimError(400, "noTarget", f"{attribute.path}: no value matches the filter")
    return value


def change_value(attribute: Attribute, value: Resource, operation: Operation) -> None:
    """Change the parts of a selected value that an operation names; without parts, clear it.

    ScimError 400 mutability for another value of an immutable part, such as the id of a member.
    """
    if operation.value is None and operation.op != "add":
        value.clear()
    for name, part in (operation.value or {}).items():
        sub = attribute.by_name[name.lower()]
        if sub.mutability == "immutable" and part != value.get(name):
            raise ScimError(400, "mutability", f"{attribute.path}: id and type cannot be changed")
        change(sub, value, Operation(operation.op, operation.path, part, operation.sent))


def equal_terms(filter: Filter) -> Resource:
    # Return the sub-attributes that a filter requires to be equal to a value.
    return {
        term.target[0].name: term.value
        for term in terms_of(filter)
        if isinstance(term, Compare) and term.op == "eq" and len(term.target) == 1
    }


# ----------------------------------------------------------------------------
# 6. Queries                                                   RFC 7644 §3.4.2
#
# The tables. The filter tree as SQL: walks along the index, conditions on one row, the two
# halves of a sorted query, positions. At the end, the other rows that a store returns:
# employees and changes.
# Uses chapters 1 to 4. Text and parameters only: no connection, no HTTP.
# ----------------------------------------------------------------------------

FORMAT = 8  # of these tables, with what ADD_TO_FORMAT_7 adds
TABLES = """
    CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS number (name TEXT PRIMARY KEY,    -- of a table
        last INTEGER NOT NULL) WITHOUT ROWID;    -- the last number given out to a row
    CREATE TABLE IF NOT EXISTS tally (type TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS resource (seq INTEGER PRIMARY KEY, type TEXT NOT NULL,
        id TEXT NOT NULL UNIQUE, body TEXT NOT NULL,  -- JSON without schemas, id, meta and members
        hidden TEXT NOT NULL,         -- JSON: values of custom fields that are not configured now
        revision INTEGER NOT NULL, created TEXT NOT NULL, modified TEXT NOT NULL,
        member_count INTEGER NOT NULL);
    CREATE INDEX resource_type ON resource (type, seq);
    CREATE TABLE IF NOT EXISTS value (path INTEGER NOT NULL,     -- path_number()
        key TEXT NOT NULL, seq INTEGER NOT NULL, element INTEGER NOT NULL,
        rest TEXT NOT NULL,           -- what follows the first KEY_LENGTH characters of the key
        PRIMARY KEY (path, key, seq, element)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS member (group_seq INTEGER NOT NULL, member_seq INTEGER NOT NULL,
        display TEXT, display_key TEXT,          -- as its client sent it, and the whole key
        PRIMARY KEY (group_seq, member_seq)) WITHOUT ROWID;
    CREATE INDEX member_groups ON member (member_seq, group_seq);
    CREATE TABLE IF NOT EXISTS employee (id INTEGER PRIMARY KEY,
        user_id TEXT NOT NULL UNIQUE, -- of the SCIM user, the last one if it was deleted
        provisioned INTEGER NOT NULL, -- 0 when that user was deleted
        external_id TEXT NOT NULL, user_name TEXT NOT NULL,      -- the userName as its key
        active INTEGER NOT NULL, manager_id TEXT NOT NULL,       -- the manager's SCIM id, or ''
        changed TEXT NOT NULL, record TEXT NOT NULL);            -- JSON
    CREATE INDEX employee_external_id ON employee (substr(external_id, 1, 400), provisioned);
    CREATE INDEX employee_user_name ON employee (substr(user_name, 1, 400), provisioned);
    CREATE INDEX employee_manager ON employee (substr(manager_id, 1, 400)) WHERE manager_id <> '';
    CREATE TABLE IF NOT EXISTS change (seq INTEGER PRIMARY KEY, at TEXT NOT NULL,
        kind TEXT NOT NULL, id TEXT NOT NULL,    -- of the user or group, or the employee's number
        member TEXT NOT NULL,         -- of a membership
        token TEXT NOT NULL, attributes TEXT NOT NULL);          -- JSON, names
    CREATE INDEX change_id ON change (id);
    CREATE INDEX change_member ON change (member) WHERE member <> '';
    CREATE TABLE IF NOT EXISTS request (seq INTEGER PRIMARY KEY, level INTEGER NOT NULL,
        subject TEXT NOT NULL, entry TEXT NOT NULL);    -- id of the user or group or '', JSON
    INSERT INTO number VALUES ('resource', 0), ('employee', 0), ('change', 0), ('request', 0)"""
# fmt: off
TABLE_KEYS = {  # the first columns of each table
    "setting": "name", "number": "name", "tally": "type", "resource": "seq", "employee": "id",
    "value": "path, key, seq, element", "member": "group_seq, member_seq", "change": "seq",
    "request": "seq",
}
# fmt: on
KEY_LENGTH = 400  # characters of a key in the index, the rest is beside it: PostgreSQL has a limit
Sql = tuple[str, list[Any]]  # a text and its parameters, in order


@lru_cache(4096)
def path_number(path: str) -> int:
    # Return the number that stands for an attribute's path in the index, as all servers do.
    # 48 bits of a digest: among 10 000 paths no two are equal, at odds of five millions to one.
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:6], "big")


# Entries that are not stored, because other tables have the values, by their attributes' paths.
EACH = "'' AS rest, seq, 0 AS element FROM resource"
MEMBERS = "group_seq AS seq, member_seq AS element FROM member"
GROUPS = "member_seq AS seq, group_seq AS element FROM member"
MEMBER = f"'' AS rest, {MEMBERS} JOIN resource ON resource.seq = member_seq"
FIRST_ELEMENT = {  # the value to sort by; of other attributes it is element 0
    "members": "(SELECT min(member_seq) FROM member WHERE group_seq = entry.seq)",
    "groups": "(SELECT min(group_seq) FROM member WHERE member_seq = entry.seq)",
}
DERIVED_ENTRIES = {
    "schemas": f"CASE type WHEN 'User' THEN '{USER}' ELSE '{GROUP}' END AS key, {EACH} UNION ALL "
    f"SELECT key, rest, seq, element FROM value WHERE path = {path_number('schemas')}",
    "id": f"id AS key, {EACH}",
    "meta": f"'1' AS key, {EACH}",
    "meta.resourcetype": f"type AS key, {EACH}",
    "members": f"'1' AS key, '' AS rest, {MEMBERS}",
    "members.value": f"id AS key, {MEMBER}",
    "members.type": f"lower(type) AS key, {MEMBER}",
    "members.display": f"substr(display_key, 1, {KEY_LENGTH}) AS key, "
    f"substr(display_key, {KEY_LENGTH + 1}) AS rest, {MEMBERS} WHERE display_key IS NOT NULL",
    "groups": f"'1' AS key, '' AS rest, {GROUPS}",
    "groups.value": f"id AS key, '' AS rest, {GROUPS} JOIN resource ON resource.seq = group_seq",
    "groups.type": f"'direct' AS key, '' AS rest, {GROUPS}",
    "groups.display": f"key, rest, {GROUPS} JOIN value ON value.seq = group_seq "
    f"AND path = {path_number('displayname')}",
}
ORDER = ("ORDER BY missing, key, seq", "ORDER BY missing DESC, key DESC, seq DESC")  # of positions
OPERATOR_SIGNS = {"eq": "=", "gt": ">", "ge": ">=", "lt": "<", "le": "<=", "pr": ">"}
NO_SET = 4  # the breadth of a filter whose matches are not a set of index entries
Filters = Mapping[str, Filter]  # by the types of the resources that they select
TYPE = Attribute("resourceType", canonical_values=("User", "Group"), path="meta.resourceType")


def compile_filter(filter: Filter, row: str = "resource") -> Sql:
    # Return a filter as an SQL condition on one row: a resource or, in the brackets of a value
    # path, an entry of the index.
    match filter:
        case And(filters):
            return join_sql(" AND ", [compile_filter(inner, row) for inner in filters], "1 = 1")
        case Or(filters):
            return join_sql(" OR ", [compile_filter(inner, row) for inner in filters], "1 = 0")
        case Not(inner):
            sql, parameters = compile_filter(inner, row)
            return f"NOT {sql}", parameters
        case Compare((_, attribute), "eq", key) if attribute.index == TYPE.index:
            return "(resource.type = ?)", [key]
        case ValuePath() | Compare():
            # The columns that identify the row, and the name of the entries compared with it.
            columns, alias = (
                (("seq",), "entry") if row == "resource" else (("seq", "element"), "probe")
            )
            (entries, parameters), is_lookup = compile_entries(filter, alias)
            of_row, of_entry = (
                ", ".join(f"{name}.{column}" for column in columns) for name in (row, alias)
            )
            # A term whose entries stand together is looked up for the row. Any other is a set.
            # OFFSET is a fence: PostgreSQL would plan hundreds of terms as one join.
            sql = (
                f"EXISTS (SELECT 1 FROM {entries} AND ({of_entry}) = ({of_row}) LIMIT 1 OFFSET 0)"
                if is_lookup
                else f"({of_row}) IN (SELECT {of_entry} FROM {entries} LIMIT {2**62} OFFSET 0)"
            )
            return sql, parameters


def compile_entries(term: ValuePath | Compare, alias: str = "entry") -> tuple[Sql, bool]:
    """Return what follows FROM to read the index entries that match; conditions can be appended.

    Also whether they stand together in the index, in the order of seq.
    """
    match term:
        case ValuePath(target, inner):
            first, others = split_filter(inner, lambda term: isinstance(term, Compare))
            entries, is_lookup = (
                compile_entries(cast(Compare, first), alias)
                if first
                else (entries_of(target[-1], alias), False)
            )
            condition = compile_filter(others, alias)
        case Compare(target, op, key):
            entries, condition = entries_of(target[-1], alias), compile_comparison(op, key)
            is_lookup = op == "eq" and target[-1].index not in DERIVED_ENTRIES
    return (f"{entries[0]} AND {condition[0]}", entries[1] + condition[1]), is_lookup


def compile_comparison(op: str, key: str) -> Sql:
    # Return the condition that an entry compares with a key as op says.
    match op:
        case "co":
            return "instr(key || rest, ?) > 0", [key]
        case "ew":
            return f"substr(key || rest, length(key) + length(rest) - {len(key) - 1}) = ?", [key]
        case "sw":
            start, rest = key[:KEY_LENGTH], key[KEY_LENGTH:]
            last = start.ljust(KEY_LENGTH, chr(sys.maxunicode))  # of all keys with this start
            return f"key BETWEEN ? AND ? AND substr(rest, 1, {len(rest)}) = ?", [start, last, rest]
        case _:
            return compare_keys(OPERATOR_SIGNS[op], key)


def compare_keys(sign: str, key: str) -> Sql:
    # An entry with less than KEY_LENGTH characters has no rest.
    if len(key) < KEY_LENGTH:
        return f"key {sign} ?", [key]
    return f"(key, rest) {sign} (?, ?)", [key[:KEY_LENGTH], key[KEY_LENGTH:]]


def join_sql(word: str, conditions: Sequence[Sql], empty: str) -> Sql:
    return (
        f"({word.join(sql for sql, _ in conditions) or empty})",
        [parameter for _, parameters in conditions for parameter in parameters],
    )


def entries_of(attribute: Attribute, alias: str = "entry") -> Sql:
    # Return what follows FROM to read an attribute's index entries; conditions can be appended.
    if derived := DERIVED_ENTRIES.get(attribute.index):
        return f"(SELECT {derived}) AS {alias} WHERE 1 = 1", []
    condition, parameters = join_sql(
        " OR ",
        [("path = ?", [path_number(simple.index)]) for simple in simple_attributes(attribute)],
        "1 = 0",
    )
    return f"value AS {alias} WHERE {condition}", parameters


def simple_attributes(attribute: Attribute) -> list[Attribute]:
    # Return the attributes that a complex one consists of, for it has no entries of its own.
    return (
        [simple for sub in attribute.sub_attributes for simple in simple_attributes(sub)]
        if attribute.type == "complex"
        else [attribute]
    )


# -- Walks: what is read to find the matches --


def compile_source(filter: Filter) -> tuple[Sql, str]:
    """Return what follows FROM to read the matches, and the name of the row that orders them.

    The most selective set of the index is read; what else is asked is asked about its
    resources.
    """
    term, others = split_filter(filter, lambda term: breadth(term) < NO_SET)
    condition, parameters = compile_filter(others)
    if not term:
        return (f"resource WHERE {condition}", parameters), "resource"
    (rows, values), in_order = compile_set(term)
    if in_order:
        # CROSS JOIN keeps SQLite from reading the resources first.
        source = f"({rows}) AS entry CROSS JOIN resource WHERE resource.seq = entry.seq"
    else:
        # A plain column would have SQLite use the index of types, then sort the resources.
        condition = condition.replace("resource.type =", "resource.type || '' =")
        source = f"resource WHERE resource.seq IN ({rows})"
    return (f"{source} AND {condition}", values + parameters), "entry" if in_order else "resource"


def compile_set(filter: Filter) -> tuple[Sql, bool]:
    """Return the query of the seq of all matches, if breadth(filter) is less than NO_SET.

    Also whether it yields them in order, each once.
    """
    match filter:
        case Or(filters):
            sql, values = join_sql(
                " UNION ",
                [compile_set(inner)[0] for inner in filters],
                "SELECT seq FROM resource WHERE 1 = 0",
            )
            return (sql[1:-1], values), False
        case ValuePath(target) | Compare(target):
            (entries, values), is_lookup = compile_entries(filter)
            return (
                (f"SELECT entry.seq FROM {entries}", values),
                is_lookup and not any(attribute.multi_valued for attribute in target),
            )
        case _:
            (source, values), _ = compile_source(filter)
            return (f"SELECT resource.seq FROM {source}", values), False


def split_filter(filter: Filter, suits: Callable[[Filter], bool]) -> tuple[Filter | None, Filter]:
    # Return the most selective term that suits, None if there is none, and the remaining terms.
    terms = dict.fromkeys(terms_of(filter))
    first = min((term for term in terms if suits(term)), key=breadth, default=None)
    return first, And(tuple(term for term in terms if term is not first))


def breadth(filter: Filter) -> int:
    """Return an estimate of how many rows match: 0 for a few, 1 for a range of them, 2 for most.

    3 is for most in no order. NO_SET if other resources match too: outside of brackets, the
    index says nothing about Not and the type.
    """
    match filter:
        case Compare((*_, attribute), "eq") if attribute.index != TYPE.index:
            return 2 if attribute.type == "boolean" or attribute.canonical_values else 0
        case Compare(_, op) if op != "eq":
            return 3 if op == "pr" else 1
        case ValuePath(_, inner):
            return min(breadth(inner), 3)
        case And(filters):
            return min(map(breadth, filters), default=NO_SET)
        case Or(filters):
            return max(map(breadth, filters), default=0)
        case _:
            return NO_SET


class Sorting(NamedTuple):
    """What to order a query by (RFC 7644 §3.4.2.3)."""

    target: AttributePath
    descending: bool = False


class Position(NamedTuple):
    """The place of a resource in a sorted query; missing is 1 if it has no value to sort by."""

    missing: int
    key: str  # without its rest
    seq: int


@dataclass(frozen=True)
class Window:
    """The part of a query's resources to read: count of them, after an offset or a position."""

    count: int
    offset: int = 0
    after: Position | None = None
    backward: bool = False  # towards the first resource; the page keeps the order of the query
    size: int = 2**62  # characters of resources that fit in; the first resource always does


class Page(NamedTuple):
    """The answer to a query: how many resources match in all, and those in the window."""

    total_results: int | None  # None after a position: only the first page is worth a count
    resources: list[Any]
    first: Position | None = None  # of the first resource of the page
    last: Position | None = None
    more: bool = False  # whether there are more resources in the direction of the window


def after_position_sql(missing: int, columns: str, after: Position | None, descending: bool) -> Sql:
    # Return the condition that a row of one half of a query comes after a position.
    if after and missing == after.missing:
        values = [after.key, after.seq] if "key" in columns else [after.seq]
        return f"({columns}) {'<' if descending else '>'} ({', '.join('?' * len(values))})", values
    # All rows of the other half come after the position, or none.
    return "1 = 1" if not after or (missing > after.missing) != descending else "1 = 0", []


def of_types(filters: Filters) -> Filter:
    # Return the filter that a resource is of a type in filters and matches its filter.
    alternatives = [
        And((Compare((META, TYPE), "eq", type, type), inner)) for type, inner in filters.items()
    ]
    return Or(tuple(alternatives)) if len(alternatives) > 1 else alternatives[0]


def compile_page(filter: Filter, sorting: Sorting | None, window: Window) -> Sql:
    # Return the query of a page and one row more; missing and key precede each resource.
    descending = (sorting is not None and sorting.descending) != window.backward
    # The positions come first, so that the bodies of skipped resources are not read.
    columns = "resource.seq" if sorting or window.offset else "resource.*"
    positions, parameters = compile_positions(filter, sorting, window, descending, columns)
    page = f"{positions} LIMIT ? OFFSET ?"
    sql = f"SELECT missing, key, resource.* FROM ({page}) AS page JOIN resource USING (seq) "
    return (
        page if columns == "resource.*" else sql + ORDER[descending],
        [*parameters, window.count + 1, window.offset],
    )


def compile_positions(
    filter: Filter, sorting: Sorting | None, window: Window, descending: bool, columns: str
) -> Sql:
    """Return the query of the positions of all matches in order, from the window's position on.

    A sort walks along the index, then along the resources without a value: those come last in
    ascending order and first in descending order (RFC 7644 §3.4.2.3).
    """
    (source, parameters), row = compile_source(filter)
    missing, down = int(sorting is not None), " DESC" * descending
    bound, bounds = after_position_sql(missing, f"{row}.seq", window.after, descending)
    keyless = f"SELECT {missing} AS missing, '' AS key, {columns} FROM {source} AND {bound}"
    keyless_values, order = [*parameters, *bounds], f"ORDER BY {row}.seq{down}"
    if not sorting:
        return f"{keyless} {order}", keyless_values
    entries, path = entries_of(attribute := sorting.target[-1])
    element = f"element = {FIRST_ELEMENT.get(attribute.index.partition('.')[0], 0)}"
    walk, walk_bounds = after_position_sql(0, "key, entry.seq", window.after, descending)
    among = f"entry.seq IN (SELECT resource.seq FROM {source})"
    if breadth(filter) > 1:  # each step tests one resource
        condition, parameters = compile_filter(filter)
        among = (
            "EXISTS (SELECT 1 FROM resource WHERE resource.seq = entry.seq AND "
            f"{condition} LIMIT 1 OFFSET 0)"
        )
    limit = window.offset + window.count + 1
    keyed = (
        f"SELECT * FROM (SELECT 0 AS missing, key, entry.seq FROM {entries} AND {element} "
        f"AND {walk} AND {among} ORDER BY key{down}, entry.seq{down} LIMIT ?) AS keyed"
    )
    keyless = (
        f"SELECT * FROM ({keyless} AND resource.seq NOT IN (SELECT entry.seq FROM {entries} "
        f"AND {element}) {order} LIMIT ?) AS keyless"
    )
    halves = [
        (keyed, [*path, *walk_bounds, *parameters, limit]),
        (keyless, [*keyless_values, *path, limit]),
    ]
    # The second half is only run if the first has too few rows.
    (first, values), (second, others) = halves[::-1] if descending else halves
    return f"{first} UNION ALL {second}", [*values, *others]


# -- The rows of employees and changes --------------------------------------------


class EmployeeRow(NamedTuple):
    """A stored employee, by the columns of its table, and the manager's employee id if known."""

    id: int
    user_id: str
    provisioned: bool  # 0 or 1 when read from the database
    external_id: str
    user_name: str
    active: bool  # likewise
    manager_id: str
    changed: str
    record: Resource
    manager: int | None = None
    groups: tuple[str, ...] = ()  # the bodies of the groups that the user is a direct member of


NEW_EMPLOYEE = EmployeeRow(0, "", False, "", "", True, "", "", {})  # before a user's first write
EMPLOYEE_STATES = {  # conditions on employees, in the console
    "all": "1 = 1",
    "active": "active = 1",
    "inactive": "active = 0 AND provisioned = 1",
    "left": "provisioned = 0",  # there is no SCIM user any more
}


def compile_employees(state: str, text: str, names: Iterable[str]) -> Sql:
    # Return the condition that employees are in a state and have a text in a value, in any case.
    # lower() changes ASCII letters only: "ö" is searched as "Ö" too, as names begin.
    forms = {
        to_json(form.encode().lower().decode())[1:-1]
        for form in filter(None, (text.lower(), text.upper(), text.title()))
    }
    # A record is JSON: what may have the text but is no value is removed before it is searched.
    others = (*(f'"{name.lower()}":' for name in names), ":true", ":false")
    removed = [other for other in others if any(form in other for form in forms)]
    values = "replace(" * len(removed) + "lower(record)" + ", ?, '')" * len(removed)
    sql = f"instr(lower(user_name || ' ' || external_id), ?) > 0 OR instr({values}, ?) > 0"
    sql, parameters = join_sql(" OR ", [(sql, [form, *removed, form]) for form in forms], "1 = 1")
    return f"{EMPLOYEE_STATES[state]} AND {sql}", parameters


@dataclass(frozen=True)
class Change:
    """A row of the change feed; seq numbers a tenant's changes in the order of their commits."""

    seq: int
    at: str
    kind: str
    id: str  # of the user or group, or the number of the employee
    member: str  # the id of the resource that joined or left a group
    token: str  # the name of the token that made the change
    attributes: list[str]  # the names changed
    values: dict[str, list[Json]]  # the old and the new value by name; some are left out


Differences = dict[str, list[Json]]  # the old and the new value by name, None for no value
# What a write notes in the change feed: a kind of change, id and member of each, and what differs.
NewChange = tuple[str, Sequence[tuple[str, str]], Differences]


# ----------------------------------------------------------------------------
# 7. Databases
#
# A Database is where one tenant's tables are: an SQLite file, or a schema in PostgreSQL. It
# has pools of Links: a Link is a connection that runs SQL in transactions and savepoints.
# The only chapter that names a database module; what an engine raises becomes a StoreError.
# Uses chapters 1, 2 and 6. Knows tables of older files only, and of HTTP only status numbers.
# ----------------------------------------------------------------------------

BUSY_SECONDS = 5  # how long a write waits for another process, and a reader for a connection
READERS = 16  # maximum of concurrent connections that read an SQLite file
EARLIER_STEP = "an earlier step of the same write failed"


class StoreError(Exception):
    """A tenant's database cannot be used; the text says why and what to do.

    reason is what the engine says, status that of the answer to a request, and effect what has
    become of the request's change.
    """

    effect = "nothing was changed, try again"

    def __init__(self, text: str, reason: str = "", status: int = 503) -> None:
        super().__init__(text)
        self.reason, self.status = reason or text, status


class Damaged(StoreError):
    """A database is unreadable, or its file is gone; a backup can replace it."""


class Unopened(StoreError):
    """A database that the first request to its tenant opens."""


class Uncertain(StoreError):
    """A connection ended during a commit, and whether that was executed is unknown."""

    effect = "the change may be stored or not, read it"


class Link:
    """A connection to a database.

    run takes a statement and its values, one for each ?, and returns a cursor; run_many takes a
    statement and rows of values. Both are used in a block of transaction() or snapshot() only:
    what the engine raises leaves the block as a StoreError, as it leaves one of errors().
    """

    place: str  # which database it is, for messages
    schema = ""  # that of the tenant, for an engine that keeps several in a database
    run: Callable[..., Any]
    run_many: Callable[..., Any]
    errors: Callable[[], AbstractContextManager[None]]
    _connection: Any  # of the engine's module

    @contextmanager
    def transaction(self) -> Iterator[None]:
        # Make a block a transaction, or a savepoint of the open one; undo it if it raises.
        is_step = self.in_transaction
        with self.errors():
            try:
                self.run("SAVEPOINT step") if is_step else self.begin()
                yield
                self.run("RELEASE step") if is_step else self.commit()
            except BaseException:
                undo = ("ROLLBACK TO step", "RELEASE step") if is_step else ("ROLLBACK",)
                for statement in undo if self.in_transaction else ():
                    self.run(statement)
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        # Let a block see one commit, whatever is written meanwhile.
        with self.errors():
            try:
                self.run("BEGIN")
                yield
            finally:
                if self.in_transaction:
                    self.run("ROLLBACK")

    def begin(self) -> None:
        # Begin a transaction when no other one writes the tenant.
        self.run("BEGIN IMMEDIATE")

    def commit(self) -> None:
        # Commit; an error if the engine has ended the transaction already.
        self.run("COMMIT")

    def load(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        # Insert whole rows into a table, at least one.
        self.run_many(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    @property
    def in_transaction(self) -> bool:
        return bool(self._connection.in_transaction)

    @property
    def is_usable(self) -> bool:  # whether an idle link can be lent again
        return not self.in_transaction  # which is open only if it could not be undone

    @property
    def version(self) -> int:  # the format of the tables, 0 if there are none
        return int(self.run("PRAGMA user_version").fetchone()[0])

    def close(self) -> None:
        self._connection.close()


class Pool:
    """At most size links to a database. A thread takes one for each transaction."""

    def __init__(self, connect: Callable[[], Link], size: int) -> None:
        self._connect, self._idle = connect, list[Link]()
        self._free, self._closed = threading.Semaphore(size), False

    @contextmanager
    def link(self, schema: str = "") -> Iterator[Link]:
        # Lend a link to a block; StoreError if all are in use for BUSY_SECONDS.
        if not self._free.acquire(timeout=BUSY_SECONDS):
            raise StoreError("all connections to the database are in use")
        try:
            link = self._take()
            link.schema = schema
            try:
                yield link
            finally:
                self._idle.append(link)
                if self._closed:
                    self.close()
        finally:
            self._free.release()

    def _take(self) -> Link:
        if self._closed:
            raise StoreError("the store is closed")
        with suppress(IndexError):  # checking first would not help: other threads pop, too
            while not (link := self._idle.pop()).is_usable:
                link.close()
            return link
        return self._connect()

    def close(self) -> None:
        # Close all links; one that is in use now is closed when it comes back.
        self._closed = True
        with suppress(IndexError):
            while True:
                self._idle.pop().close()


class Database:
    """Where tenants' tables are.

    location is a path or a URL, and place names it in messages. Its writers are links for
    transactions, and its readers for snapshots; None if readers have to use the one writer.
    is_quick says that a look-up takes less time than giving it to another thread, is_remote that a
    thread mostly waits meanwhile.
    """

    is_quick = is_remote = False

    def __init__(self, location: str, place: str, writers: Pool, readers: Pool | None) -> None:
        self.location, self.place, self.writers, self.readers = location, place, writers, readers

    def schema_of(self, tenant: str) -> str:
        # Return the schema of a tenant, which is created if it does not exist.
        return ""

    def check(self) -> None:
        # Raise StoreError if the database does not answer.
        with (self.readers or self.writers).link() as link, link.errors():
            link.run("SELECT 1 FROM sqlite_master")

    def verify(self, pages: bool = False) -> bool:
        """Raise Damaged if the database is not in its place any more.

        With pages, the next part of its content is checked, too; returns whether there was one.
        """
        return False

    def close(self) -> None:
        # Close all links; those in use are closed when they come back.
        for pool in filter(None, (self.writers, self.readers)):
            pool.close()


# -- SQLite ------------------------------------------------------------------------

# A commit that returns is on the disk. On macOS only fullfsync makes the disk write what it holds.
DURABLE = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "fullfsync = ON",
    "checkpoint_fullfsync = ON",
)
WRITER_PRAGMAS = (
    "cache_size = -8000",  # KiB in memory: the entries of one user are all over the index
    "wal_autocheckpoint = 4000",  # pages: those that every create changes are copied once
    "temp_store = MEMORY",  # otherwise each savepoint creates and removes a file
    *DURABLE,
)
# Scripts for files of formats 1 to 6, before and after the tables of chapter 6 are made. The first
# formats had fewer tables. The index had the path as text, and entries of complex attributes: after
# their path, "." or ":" follows in others. Formats 1 to 5 had other keys of text that is not ASCII;
# a former userName is known by its key only.
SET_ASIDE = """
    ALTER TABLE value RENAME TO older_value; DROP TABLE IF EXISTS tally;
    DROP INDEX IF EXISTS resource_type; DROP INDEX IF EXISTS member_groups;
    DROP INDEX IF EXISTS employee_external_id; DROP INDEX IF EXISTS employee_user_name;
    DROP INDEX IF EXISTS employee_manager; DROP INDEX IF EXISTS change_at;
    DROP INDEX IF EXISTS change_id; DROP INDEX IF EXISTS change_member"""
COPY_OLDER = f"""
    INSERT INTO tally SELECT type, count(*) FROM resource GROUP BY type;
    UPDATE number SET last = coalesce((SELECT seq FROM sqlite_sequence AS older
        WHERE older.name = number.name), 0);
    UPDATE member SET display_key = text_key(display)
        WHERE length(display) < length(CAST(display AS BLOB));
    UPDATE employee SET user_name = name_key(user_name) WHERE id IN (SELECT id FROM employee
        WHERE length(user_name) < length(CAST(user_name AS BLOB)));
    INSERT INTO value SELECT path_number(path), substr(key, 1, {KEY_LENGTH}), seq, element,
        substr(key, {KEY_LENGTH + 1}) FROM (SELECT DISTINCT path FROM older_value
            WHERE path NOT IN ('schemas', 'id', 'meta.resourcetype')
            ORDER BY path_number(path)) AS paths CROSS JOIN older_value USING (path)
        WHERE NOT EXISTS (SELECT 1 FROM older_value AS sub WHERE sub.path > paths.path || '.'
            AND sub.path < paths.path || '/') AND NOT EXISTS (SELECT 1 FROM older_value AS sub
            WHERE sub.path > paths.path || ':' AND sub.path < paths.path || char(59));
    INSERT INTO value SELECT path_number('schemas'), '{ENTERPRISE}', seq, 1, ''
        FROM older_value WHERE path = '{ENTERPRISE.lower()}';
    INSERT INTO value SELECT path_number('schemas'), '{FACILIO}', seq, 1, ''
        FROM older_value WHERE path = '{FACILIO.lower()}';
    PRAGMA secure_delete = FAST;
    DROP TABLE older_value"""
# For files of formats 1 to 7, and for new ones.
ADD_TO_FORMAT_7 = """
    ALTER TABLE change ADD COLUMN old_and_new TEXT NOT NULL DEFAULT '{}';    -- JSON, by name
    CREATE INDEX change_deactivated ON change (at) WHERE kind = 'employee.deactivated'"""


class SqliteLink(Link):
    """A connection to an SQLite file; "" is a temporary one that ends with its connection."""

    def __init__(
        self, path: str, pragmas: Iterable[str] = (), timeout: float = BUSY_SECONDS, **options: Any
    ) -> None:
        self.place, self._patience = path, float(BUSY_SECONDS)
        with self.errors():
            self._connection = sqlite3.connect(
                path, timeout=timeout, isolation_level=None, check_same_thread=False, **options
            )
            self.run, self.run_many = self._connection.execute, self._connection.executemany
            for pragma in pragmas:
                self.run(f"PRAGMA {pragma}")
        for name, function in (  # older formats had other keys and paths
            ("text_key", Attribute("text").key),
            ("name_key", Attribute("name", is_name=True).key),
            ("path_number", path_number),
        ):
            self._connection.create_function(name, 1, function)

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # the subclasses mean something else
                raise StoreError(
                    f"{self.place}: cannot be used ({error})",
                    str(error),
                    507 if "full" in str(error) else 503,
                ) from error
            raise Damaged(
                f"{self.place}: damaged ({error}); put a backup in its place: see the command "
                "`python scim_server.py restore`",
                f"{os.path.basename(self.place)} is damaged ({error}), restore a backup",
            ) from error

    def begin(self) -> None:
        # After a write that waited for another process in vain, the next ones do not wait until
        # one succeeds. So each is answered in time, however many of them are queued.
        patience, self._patience = self._patience, 0.0
        self.run(f"PRAGMA busy_timeout = {int(1_000 * patience)}")
        super().begin()
        self._patience = BUSY_SECONDS

    def check_pages(self, part: str = "1") -> None:
        # Read all pages, or those of a table and its indexes; Damaged if one of them is.
        with self.errors():
            if (finding := self.run(f"PRAGMA quick_check({part})").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(finding)

    def copy_to(self, target: SqliteLink) -> None:
        # Replace the content of another database by one commit of this one.
        with self.errors():
            self._connection.backup(target._connection)


def make_file(path: str) -> None:
    # Make a file if there is none, and its directory. It has personal data: it is for this user
    # alone, as is the write-ahead log then.
    Path(path).parent.mkdir(0o700, parents=True, exist_ok=True)
    Path(path).touch(0o600)


def file_id(path: str) -> int:
    # Return what tells a file from another one that has its name later; 0 for no file.
    with suppress(OSError):
        return os.stat(path).st_ino
    return 0


class SqliteDatabase(Database):
    """An SQLite file, or ":memory:" for one that ends with its store.

    With must_exist it is not created but checked first, all of it.
    """

    def __init__(self, path: str, must_exist: bool = False) -> None:
        self.is_quick = path != ":memory:"
        try:
            if must_exist and not os.path.getsize(path):  # which raises if there is none
                raise FileNotFoundError("it is empty")
            if self.is_quick:
                make_file(path)
            # Closing a database removes its WAL.
            self._must_check = must_exist or os.path.exists(f"{path}-wal")
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be opened for writing ({error}); "
                "choose a data_dir that this user may write to"
            ) from error
        super().__init__(
            path,
            path,
            Pool(self._open_writer, 1),
            Pool(self._open_reader, READERS) if self.is_quick else None,
        )

    def _open_reader(self) -> Link:
        self.verify()  # a new link must not lead to another file
        return SqliteLink(self.place, DURABLE)

    def _open_writer(self) -> Link:
        if self._must_check:
            # A link of its own is closed at once, so that a damaged file can be replaced.
            with closing(SqliteLink(self.place)) as link:
                link.check_pages()
        link = SqliteLink(self.place, WRITER_PRAGMAS)
        self._unchecked = [
            name for (name,) in link.run("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        self._ids = {
            file: file_id(file) for file in (self.place, f"{self.place}-wal", f"{self.place}-shm")
        }
        return link

    def verify(self, pages: bool = False) -> bool:
        if file_id(self.place) != self._ids[self.place]:
            with self.writers.link() as link, link.errors():
                # The file is completed, wherever it is now. Then its write-ahead log goes: SQLite
                # would apply it to any other file in this place.
                if link.run("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    raise StoreError(f"{self.place}: deleted or replaced while it was read")
                for file, id in self._ids.items():
                    if file_id(file) == id:
                        Path(file).unlink(missing_ok=True)  # other processes do this, too
                raise sqlite3.DatabaseError("it was deleted or replaced")
        if not (pages and self.readers and self._unchecked):
            return False
        with self.readers.link() as link:
            cast(SqliteLink, link).check_pages(self._unchecked.pop())
        return True


# -- PostgreSQL ----------------------------------------------------------------------
#
# A tenant is a schema. Its table state has one row: the format of the tables, and a ticket that
# each write replaces. The row is also the lock by which the writers of all processes take turns,
# and after a lost connection the ticket tells whether a write was committed. All else is READ
# COMMITTED: a statement sees what the last holder of the lock has committed.

OLDEST_POSTGRES = 14
POSTGRES_READERS, POSTGRES_WRITERS = 8, 4  # maximum of connections of a process to a database
SCHEMAS_PER_LINK = 256  # the server keeps some 100 kB for each schema that a connection has used
POSTGRES_DEFAULTS = {  # of the connection; the URL may change them
    "application_name": "scim_server",
    "connect_timeout": 5,
    "keepalives_idle": 10,  # seconds
    "tcp_user_timeout": 10_000,  # milliseconds until a server that does not answer is given up
}
POSTGRES_SETTINGS = {  # of the session
    "search_path": "",  # a table without its schema is an error
    "plan_cache_mode": "force_generic_plan",  # for what is prepared: planning costs 0.1 ms
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
    "work_mem": "64MB",
    "lock_timeout": "5s",
    "statement_timeout": "30s",
}
# fmt: off
POSTGRES_SQL = (  # what PostgreSQL has in place of SQLite's words; @ stands for the schema
    (r"^BEGIN$",                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
    (r"^PRAGMA user_version$",  "SELECT version FROM state"),
    (r"^PRAGMA user_version =", "UPDATE state SET version ="),
    (r" FROM sqlite_master$",   ""),
    (r"^DELETE FROM (?=\w+$)",  "TRUNCATE TABLE "),
    (r"\b(FROM|JOIN|INTO|UPDATE|TABLE|TABLE IF NOT EXISTS) ([a-z_]+)\b(?![.(])", r'\1 "@".\2'),
    (r"\b(INDEX (?:IF NOT EXISTS )?\w+ ON) ",                            r'\1 "@".'),
    (r"\bINTEGER\b",      "BIGINT"),
    (r"(?<!AS )\bTEXT\b", 'TEXT COLLATE "C"'),  # the order of the octets, as in SQLite
    (r"('|END) AS key\b", r'\1 COLLATE "C" AS key'),  # a constant has no order of its own
    (r"\bWITHOUT ROWID\b", ""),
    (r"\binstr\(",        "strpos("),
    (r"json_group_array\(", "json_agg("),
    (r"value FROM json_each\(\?\)", "json_array_elements_text(?::json)"),
    (r"json_extract\(record, \?\) COLLATE NOCASE",  # the result is compared by its type
     "lower(jsonb_path_query_first(record::jsonb, ?::jsonpath)::text)::jsonb"),
)
# fmt: on
MAKE_SCHEMA = """
    DO $$ BEGIN
        PERFORM pg_advisory_xact_lock(hashtext('scim_server'));
        IF to_regnamespace('"@"') IS NULL THEN
            CREATE SCHEMA "@";
        END IF;
        IF to_regclass('"@".state') IS NULL THEN
            CREATE TABLE "@".state (version bigint NOT NULL, ticket text NOT NULL);
            INSERT INTO "@".state VALUES (0, '');
        END IF;
    END $$"""
# What helps, by the SQLSTATE or its class; "" is a lost connection. Other errors are mistakes.
REMEDIES = {
    "25006": "it only reads: name the primary in the URL, or all servers and "
    "target_session_attrs=read-write",
    "42501": "let the role own its schemas: GRANT CREATE ON DATABASE {0.dbname} TO {0.user}",
    "42P01": "put a backup of the tenant in its place",  # tables were dropped
    "53": "free space on its disk, or raise its limit",
    **dict.fromkeys(("", "08", "25", "40", "55", "57", "58", "XX"), "the server's log says more"),
}


@lru_cache(1)
def psycopg() -> Any:
    # Return the driver of PostgreSQL, imported when it is needed first; StoreError without it.
    try:
        driver = importlib.import_module("psycopg")
        return driver if driver.RawCursor else None  # new in 3.2
    except (ImportError, AttributeError) as error:
        raise StoreError(
            "postgresql:// needs psycopg 3.2 or newer: python -m pip install 'psycopg[binary]'"
        ) from error


def place_of(url: str) -> str:
    # Return a URL without user, password and options.
    return re.sub(r"(?<=//)[^/]*@|\?.*", "", url)


def reason_of(error: Any) -> str:
    # Return the message of a psycopg error without hints, and without repetitions for other hosts.
    text = error.diag.message_primary or re.split(r"\n\s*Is the|\nMultiple", str(error))[0]
    return " ".join(text.split())


@lru_cache(2_000)
def to_postgres(sql: str) -> tuple[str, bool | None]:
    # Return a statement in which @ stands for the schema, and False if it is always planned.
    for pattern, replacement in POSTGRES_SQL:
        sql = re.sub(pattern, replacement, sql)
    numbers = itertools.count(1)
    sql = re.sub(r"\?", lambda mark: f"${next(numbers)}", sql)
    # How many rows a range or a sort reads depends on the values. Several statements in one text,
    # which save round trips, cannot be prepared.
    return sql, False if re.search(r"\b(key|rest)\)? [<>]|strpos|BY missing|;", sql) else None


class PostgresLink(Link):
    """A connection to a PostgreSQL database, for one tenant's schema at a time."""

    def __init__(self, url: str) -> None:
        driver = psycopg()
        self._url, self.place = url, place_of(url)
        self._schemas, self._ticket = set[str](), ("", "")
        # Versions of pgbouncer before 1.21 need a URL with this.
        address = re.sub("prepared_statements=false&?", "", url)
        try:
            options = POSTGRES_DEFAULTS | driver.conninfo.conninfo_to_dict(address)
            settings = (f"-c {name}={value}" for name, value in POSTGRES_SETTINGS.items())
            # pgbouncer refuses a blank at the end.
            options["options"] = " ".join([*settings, options.get("options", "")]).rstrip()
            self._connection = driver.connect(
                **options,
                autocommit=True,
                cursor_factory=driver.RawCursor,
                prepare_threshold=5 if address == url else None,
            )
        except driver.Error as error:
            raise StoreError(
                f"{self.place}: cannot be used ({reason_of(error)}); "
                "correct the URL, or start the server",
                "its server cannot be reached",  # a client need not know where that is
            ) from error
        if (version := self._connection.info.server_version // 10_000) < OLDEST_POSTGRES:
            raise StoreError(
                f"{self.place}: is PostgreSQL {version}; use {OLDEST_POSTGRES} or newer"
            )
        for type in (int, bool):
            self._connection.adapters.register_dumper(type, driver.types.numeric.Int8Dumper)

    def run(self, sql: str, values: Sequence[Any] = ()) -> Any:
        text, prepare = to_postgres(sql)
        return self._connection.execute(text.replace("@", self.schema), values, prepare=prepare)

    def run_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        text, _ = to_postgres(sql)
        if rows := list(rows):
            self._connection.cursor().executemany(text.replace("@", self.schema), rows)

    def load(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        with self._connection.cursor().copy(f'COPY "{self.schema}".{table} FROM STDIN') as copy:
            for row in rows:
                copy.write_row(row)

    @contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except psycopg().Error as error:
            state = error.sqlstate or ""
            remedy = REMEDIES.get(state) or REMEDIES.get(state[:2])
            if not remedy or not (state or isinstance(error, psycopg().OperationalError)):
                raise
            reason = reason_of(error)
            raise StoreError(
                f"{self.place}: cannot be used ({reason}); {remedy.format(self._connection.info)}",
                reason,
                507 if state == "53100" else 503,
            ) from error

    def begin(self) -> None:
        cursor = self.run(
            "BEGIN ISOLATION LEVEL READ COMMITTED; "
            "UPDATE state SET ticket = gen_random_uuid()::text "
            "RETURNING ticket, pg_current_xact_id()::text"
        )
        cursor.nextset()
        self._ticket = cursor.fetchone()

    def commit(self) -> None:
        if self._connection.info.transaction_status.name != "INTRANS":
            raise StoreError(EARLIER_STEP)  # COMMIT would be a ROLLBACK without an error
        try:
            self.run("COMMIT")
        except psycopg().OperationalError:
            if not self._was_committed():
                raise

    def _was_committed(self) -> bool:
        # Return whether the server executed a COMMIT that it did not answer; Uncertain.
        ticket, transaction = self._ticket
        for _ in range(10):
            with suppress(StoreError), closing(PostgresLink(self._url)) as link, link.errors():
                link.schema = self.schema
                # This waits until the server has ended the transaction.
                [(latest,)] = link.run("SELECT ticket FROM state FOR UPDATE")
                [(status,)] = link.run(
                    "SELECT CASE WHEN id < pg_snapshot_xmax(pg_current_snapshot()) THEN "
                    "pg_xact_status(id) END FROM (SELECT ?::text::xid8 AS id) AS lost",
                    [transaction],
                )
                if latest == ticket or status != "committed":
                    return bool(latest == ticket)
                # Another process has written since. After a crash the server may give the number
                # of a lost transaction to another one, so this is no proof.
                break
            threading.Event().wait(BUSY_SECONDS / 10)
        raise Uncertain("the connection ended during the commit")

    @property
    def in_transaction(self) -> bool:
        return self._connection.info.transaction_status.name in ("INTRANS", "INERROR")

    @property
    def is_usable(self) -> bool:
        self._schemas.add(self.schema)
        try:
            # A server that ends a connection says so first: then the second call sees the end.
            for _ in range(2):
                self._connection.pgconn.consume_input()
        except psycopg().OperationalError:
            return False
        status = self._connection.info.transaction_status.name
        return status == "IDLE" and len(self._schemas) < SCHEMAS_PER_LINK


class PostgresDatabase(Database):
    """A PostgreSQL database with a schema for each tenant; they share its connections."""

    is_remote = True

    def __init__(self, url: str) -> None:
        super().__init__(
            url,
            place_of(url),
            Pool(partial(PostgresLink, url), POSTGRES_WRITERS),
            Pool(partial(PostgresLink, url), POSTGRES_READERS),
        )

    def schema_of(self, tenant: str) -> str:
        schema = f"t_{tenant.lower()}"
        if not re.fullmatch("[a-z0-9_-]{3,63}", schema):  # PostgreSQL would cut a longer one
            schema = f"t_{hashlib.sha256(schema.encode()).hexdigest()[:40]}"
        with self.writers.link(schema) as link, link.errors():
            link.run(MAKE_SCHEMA)
        return schema


def is_postgres(location: str) -> bool:
    return location.startswith(("postgresql://", "postgres://"))


Location = str | os.PathLike[str] | Database  # a path, a URL, or a database that stores share


# ----------------------------------------------------------------------------
# 8. Store
#
# One tenant's resources, memberships, employees and changes in the tables of chapter 6.
# Uses chapters 1 to 7. Knows nothing of HTTP.
# ----------------------------------------------------------------------------

POLL_SECONDS = 0.5  # how often a waiting reader looks for commits of other processes
MANY = 500  # values in one statement, rows of a step of a copy
COUNT = """INSERT INTO tally VALUES (?, ?) ON CONFLICT (type)
    DO UPDATE SET count = tally.count + excluded.count"""
# The bodies of the groups of an employee's user, except a group.
OTHER_GROUPS = """(SELECT CAST(coalesce(json_group_array(crew.body), '[]') AS TEXT)
    FROM member JOIN resource AS crew ON crew.seq = group_seq
    WHERE group_seq <> ? AND member_seq =
        (SELECT seq FROM resource WHERE id = CAST(user_id AS TEXT)))"""


class Session:
    """What one transaction reads and writes; made by Store.reading() and Store.writing()."""

    def __init__(self, link: Link) -> None:
        self.run, self.run_many, self.load = link.run, link.run_many, link.load
        self._time = self._newest = ""  # of the changes made here, of the newest one before

    # -- Resources --

    def find(self, type: str, id: str) -> StoredResource | None:
        rows = self.run("SELECT * FROM resource WHERE id = ? AND type = ?", [id, type])
        return next(itertools.starmap(StoredResource, rows), None)

    def seqs_of(self, ids: Iterable[str]) -> dict[str, int]:
        # Return the numbers of the resources with some ids, by id; unknown ids are left out.
        return dict(self._among("SELECT id, seq FROM resource WHERE id IN", ids))

    def _among(self, sql: str, values: Iterable[Any], *parameters: Any) -> Iterator[Any]:
        # Yield the rows of a query that ends with IN, for some of the values at a time.
        remaining = list(values)
        for start in range(0, len(remaining), MANY):
            batch = remaining[start : start + MANY]
            yield from self.run(
                f"{sql} ({', '.join('?' * len(batch))})", [*parameters, *batch]
            ).fetchall()

    def names(self, ids: Sequence[str]) -> dict[str, Resource]:
        # Return type, name, number of members and, of users, activity of users and groups, by id.
        # A user has the name of its employee, also after it was deleted.
        return {
            id: {
                "type": type,
                "name": body.get("displayName") or body["name"],
                "members": members,
                "active": bool(active),
            }
            for id, type, text, members, active in self._among(
                "SELECT * FROM (SELECT user_id AS id, 'User' AS type, record, 0 AS members, active "
                "FROM employee UNION ALL SELECT id, type, body, member_count, 1 FROM resource "
                "WHERE type = 'Group') AS named WHERE id IN",
                ids,
            )
            for body in [from_json(text)]
        }

    def resources(self, every: bool = True) -> Iterator[StoredResource]:
        # Yield all resources, or those that a configuration has an effect on: the groups, and what
        # has custom fields. Each may be changed before the next.
        affected = f"(type = 'Group' OR hidden <> '{{}}' OR instr(body, '{FACILIO}') > 0)"
        for rows in self.batches("resource", "1 = 1" if every else affected):
            yield from itertools.starmap(StoredResource, rows)

    def is_in_use(self, type: str, path: str, key: str, seq: int) -> bool:
        # Return whether a resource of a type, other than number seq, has a key at a path.
        same, values = compare_keys("=", key)
        return bool(
            self.run(
                "SELECT 1 FROM value JOIN resource ON resource.seq = value.seq "
                f"WHERE path = ? AND {same} AND type = ? AND resource.seq <> ? LIMIT 1",
                [path_number(path), *values, type, seq],
            ).fetchall()
        )

    def save(self, row: StoredResource, before: set[Entry], after: set[Entry]) -> None:
        # Store a resource and the differences in its index entries; a new one gets its seq.
        if not row.seq:
            row.seq = self.next_number("resource")
            self.run(COUNT, [row.type, 1])
        content = [row.body, row.hidden, row.revision, row.created, row.modified, row.member_count]
        self.run(
            "INSERT INTO resource VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (seq) "
            "DO UPDATE SET body = excluded.body, hidden = excluded.hidden, "
            "revision = excluded.revision, modified = excluded.modified, "
            "member_count = excluded.member_count",
            [row.seq, row.type, row.id, *content],
        )
        self.update_index(row.seq, before, after)

    def delete(self, row: StoredResource, entries: set[Entry]) -> None:
        self.run("DELETE FROM member WHERE group_seq = ?", [row.seq])
        self.run("DELETE FROM resource WHERE seq = ?", [row.seq])
        self.update_index(row.seq, entries, set())
        self.run(COUNT, [row.type, -1])

    def update_index(self, seq: int, before: set[Entry], after: set[Entry]) -> None:
        lost, new = (
            [
                (path_number(path), key[:KEY_LENGTH], seq, element, key[KEY_LENGTH:])
                for path, key, element in entries
            ]
            for entries in (before - after, after - before)
        )
        self.run_many(
            "DELETE FROM value WHERE (path, key, seq, element, rest) = (?, ?, ?, ?, ?)", lost
        )
        self.run_many("INSERT INTO value VALUES (?, ?, ?, ?, ?)", new)

    def total(self, filters: Filters) -> int:
        # Return how many resources match; filters has a filter for each type to count.
        if all(filter == EVERYTHING for filter in filters.values()):
            counts = dict(self.run("SELECT type, count FROM tally").fetchall())
            return sum(counts.get(type, 0) for type in filters)
        (source, parameters), _ = compile_source(of_types(filters))
        return int(self.run(f"SELECT count(*) FROM {source}", parameters).fetchone()[0])

    def page(
        self, filters: Filters, sorting: Sorting | None, window: Window
    ) -> tuple[list[tuple[int, str, StoredResource]], bool]:
        # Return a window's matches, each after its missing and key, and whether there are more.
        matches, size, more = list[tuple[int, str, StoredResource]](), 0, False
        for values in self.run(*compile_page(of_types(filters), sorting, window)):
            row = StoredResource(*values[2:])
            size += len(row.body) + LINK_SIZE * row.member_count
            if more := len(matches) == window.count or (size > window.size and matches != []):
                break
            matches.append((values[0], values[1], row))
        # A membership is shown with its group, which is counted above, and again with its member.
        while len(matches) > 1 and self.membership_count(matches) * LINK_SIZE > window.size:
            matches, more = matches[: len(matches) // 2], True
        return matches[::-1] if window.backward else matches, more

    # -- Memberships --

    def members(self, group_seq: int, ids: Iterable[str] | None = None) -> list[Resource]:
        # Return the members of a group, all or those among ids, as canonical values with $ref.
        sql = (
            "SELECT id, type, display FROM member JOIN resource ON seq = member_seq WHERE group_seq"
        )
        rows = (
            self.run(f"{sql} = ? ORDER BY member_seq", [group_seq])
            if ids is None
            else self._among(f"{sql} = ? AND member_seq IN", self.seqs_of(ids).values(), group_seq)
        )
        return [
            {"value": id, "$ref": f"/{type}s/{id}", "type": type}
            | ({} if display is None else {"display": display})
            for id, type, display in rows
        ]

    def membership_count(self, matches: Sequence[tuple[int, str, StoredResource]]) -> int:
        counts = self._among(
            "SELECT count(*) FROM member WHERE member_seq IN", (row.seq for *_, row in matches)
        )
        return sum(count for (count,) in counts)

    def groups(self, seqs: Sequence[int]) -> dict[int, list[Resource]]:
        """Return the groups that each of some resources is a direct member of."""
        groups: dict[int, list[Resource]] = {seq: [] for seq in seqs}
        rows = self._among(
            "SELECT member_seq, group_seq, id, body FROM member "
            "JOIN resource ON resource.seq = group_seq WHERE member_seq IN",
            seqs,
        )
        for seq, _, id, body in sorted(rows):
            groups[seq].append(
                {
                    "value": id,
                    "$ref": f"/Groups/{id}",
                    "display": from_json(body)["displayName"],
                    "type": "direct",
                }
            )
        return groups

    def add_members(
        self, group_seq: int, members: Mapping[str, str | None], display: Attribute
    ) -> list[str]:
        """Store new members, or new displays of members, by id; return the ids that exist.

        An id that no resource of the tenant has is ignored: one unknown member in a push of
        many must not lose the others, because Okta does not repeat a push that failed.
        """
        seqs = self.seqs_of(members)
        self.run_many(
            "INSERT INTO member VALUES (?, ?, ?, ?) ON CONFLICT (group_seq, member_seq) "
            "DO UPDATE SET display = excluded.display, display_key = excluded.display_key",
            [
                (group_seq, seqs[id], text, None if text is None else display.key(text))
                for id, text in members.items()
                if id in seqs
            ],
        )
        return [id for id in members if id in seqs]

    def remove_members(self, group_seq: int, ids: Iterable[str]) -> None:
        self.run_many(
            "DELETE FROM member WHERE group_seq = ? AND member_seq = ?",
            [(group_seq, seq) for seq in self.seqs_of(ids).values()],
        )

    # -- Employees --

    def put_employee(self, row: EmployeeRow) -> int:
        id = row.id or self.next_number("employee")
        self.run(
            "INSERT INTO employee VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) "
            "DO UPDATE SET user_id = excluded.user_id, provisioned = excluded.provisioned, "
            "external_id = excluded.external_id, user_name = excluded.user_name, "
            "active = excluded.active, manager_id = excluded.manager_id, "
            "changed = excluded.changed, record = excluded.record",
            [id, *row[1:8], to_json(row.record)],
        )
        return id

    def employee_of(self, user_id: str) -> EmployeeRow | None:
        return next(iter(self._employees("user_id = ?", [user_id])), None)

    def former_employee(self, external_id: str, user_name: str) -> EmployeeRow | None:
        # Return the inactive employee that a person was; user_name is a key.
        # It has no SCIM user any more, or one under another name that was deactivated. A userName
        # can be given to another person: if both have an externalId, that decides.
        rows = self._employees(
            "active = 0 AND (substr(external_id, 1, 400) = ? AND external_id = ? AND "
            "external_id <> '' OR substr(user_name, 1, 400) = ? AND user_name = ? AND "
            "provisioned = 0 AND '' IN (external_id, ?)) "
            "ORDER BY CASE external_id WHEN '' THEN 1 WHEN ? THEN 0 ELSE 1 END, id DESC LIMIT 1",
            [external_id[:400], external_id, user_name[:400], user_name, external_id, external_id],
        )
        return next(iter(rows), None)

    def employees(
        self, after: int, last: int, active: bool | None, since: str
    ) -> list[EmployeeRow]:
        # Return some employees with ids after one and up to another; since is a key.
        return self._employees(
            "id > ? AND id <= ? AND active = coalesce(?, active) AND changed >= ? "
            "ORDER BY id LIMIT ?",
            [after, last, active, since, DEFAULT_COUNT],
        )

    def find_employees(
        self, condition: Sql, field: str, descending: bool, window: Window
    ) -> tuple[int, list[EmployeeRow]]:
        # Return how many employees fulfil a condition, and a window on them, sorted by a field.
        (sql, values), path = condition, '$."' + field.replace(".", '"."') + '"'
        [[total]] = self.run(f"SELECT count(*) FROM employee WHERE {sql}", values).fetchall()
        ids = self.run(
            f"SELECT id FROM employee WHERE {sql} ORDER BY json_extract(record, ?) COLLATE NOCASE "
            f"{'DESC NULLS LAST' if descending else 'ASC NULLS FIRST'}, id LIMIT ? OFFSET ?",
            [*values, path, window.count, window.offset],
        ).fetchall()
        return total, [row for id in ids for row in self._employees("id = ?", id)]

    def reassign_reports(self, old_id: str, new_id: str) -> None:
        self.run(
            "UPDATE employee SET manager_id = ? "
            "WHERE substr(manager_id, 1, 400) = ? AND manager_id = ? AND manager_id <> ''",
            [new_id, old_id, old_id],
        )

    def _employees(self, condition: str, values: Sequence[Any]) -> list[EmployeeRow]:
        return [
            EmployeeRow(*[*columns, from_json(record), manager, (*from_json(bodies),)])
            for *columns, record, manager, bodies in self.run(
                "SELECT *, (SELECT id FROM employee AS boss WHERE boss.user_id = "
                f"employee.manager_id) AS manager, {OTHER_GROUPS} FROM employee WHERE {condition}",
                [0, *values],
            )
        ]

    def change_employees(
        self, group_seq: int, now: str, user_ids: Sequence[str] | None
    ) -> Iterator[tuple[str, str]]:
        # Set the time of the last change for the employees in a group, all or those of some users.
        # Yield for each the bodies of its other groups as a JSON list, and its number.
        users = (
            "SELECT value FROM json_each(?)"
            if user_ids
            else "SELECT id FROM member JOIN resource ON seq = member_seq WHERE group_seq = ?"
        )
        yield from self.run(
            f"UPDATE employee SET changed = ? WHERE user_id IN ({users}) "
            f"RETURNING {OTHER_GROUPS}, CAST(id AS TEXT)",
            [now, to_json(user_ids) if user_ids else group_seq, group_seq],
        )

    # -- Changes --

    def log(
        self, changes: Sequence[tuple[str, ...]], keep: int, older_than: str, up_to: str
    ) -> None:
        # Append rows to the change feed; drop those beyond the newest keep, or before a time, but
        # none after the time up_to.
        self._append("change", changes)
        # At most two old rows are deleted for each new one, so that trimming never delays a write.
        self.run(
            "DELETE FROM change WHERE seq < (SELECT min(seq) FROM change) + ? AND at <= ? AND "
            "(seq <= (SELECT max(seq) FROM change) - ? OR at < ?)",
            [2 * len(changes), up_to, keep, older_than],
        )

    def changes(self, after: int, count: int) -> list[Change]:
        # Return at most count changes after a number; ScimError 410 if not all are kept.
        first, last = self.change_bounds()
        if not first <= after <= last:
            raise ScimError(
                410,
                "",
                f"after={after}: the feed holds the changes after {first}, up to {last}; "
                f"read all employees, then start again with after={last}",
            )
        return self._changes("seq > ? ORDER BY seq LIMIT ?", [after, count])

    def changes_about(self, id: str, employee: int, count: int) -> list[Change]:
        # Return the newest changes of a user or group and of an employee (0 for none).
        return self._changes(
            "seq IN (SELECT seq FROM change WHERE id = ? AND kind NOT LIKE 'employee.%' UNION ALL "
            "SELECT seq FROM change WHERE id = ? AND kind LIKE 'employee.%' UNION ALL "
            "SELECT seq FROM change WHERE member = ? AND member <> '') ORDER BY seq DESC LIMIT ?",
            [id, str(employee), id, count],
        )

    def _changes(self, condition: str, values: Sequence[Any]) -> list[Change]:
        return [
            Change(*[*columns, from_json(attributes), from_json(values)])
            for *columns, attributes, values in self.run(
                f"SELECT * FROM change WHERE {condition}", values
            )
        ]

    def nth_deactivation(self, number: int, since: str) -> str | None:
        # Return when the newest deactivation but number - 1 happened; None if there were fewer
        # after a time.
        rows = self.run(
            "SELECT at FROM change WHERE kind = 'employee.deactivated' AND at > ? "
            "ORDER BY at DESC LIMIT 1 OFFSET ?",
            [since, number - 1],
        )
        return next((at for (at,) in rows), None)

    def change_bounds(self) -> tuple[int, int]:
        # Return the number before the first change that is kept, and that of the newest change.
        last, first, start = self.run(
            "SELECT last, (SELECT min(seq) - 1 FROM change), (SELECT value FROM setting "
            "WHERE name = 'feed_start') FROM number WHERE name = 'change'"
        ).fetchone()
        return max(last if first is None else first, int(start or 0)), last

    def time_of_write(self, now: str) -> str:
        # Return the time of all changes in this session: now, but never before earlier ones.
        # If the clock goes back it stands still, so that readers who ask for what has changed
        # since a time miss nothing. The clocks of two machines differ, too.
        self._time = self._time or max(now, self._newest)
        return self._time

    def moved_to(self) -> str:
        # Return where the content was moved to, or "".
        # The same round trip reads what time_of_write() needs, and the roles of the newest
        # configuration as JSON: a writer may have waited for it with those of an older one.
        moved, self.roles, self._newest = self.run(
            "SELECT coalesce((SELECT value FROM setting WHERE name = 'moved to'), ''), "
            "coalesce((SELECT value FROM setting WHERE name = 'roles'), '{}'), "
            "coalesce((SELECT at FROM change ORDER BY seq DESC LIMIT 1), '')"
        ).fetchone()
        return str(moved)

    # -- The provisioning log --

    def note_requests(self, rows: Iterable[tuple[int, str, Json]], keep: int) -> None:
        # Append entries, each preceded by its level and subject, and keep the newest.
        self._append(
            "request",
            [
                (level, subject, to_json(entry).encode("utf-8", "replace").decode())
                for level, subject, entry in rows
            ],
        )
        self.run("DELETE FROM request WHERE seq <= (SELECT max(seq) FROM request) - ?", [keep])

    def requests(
        self,
        after: int = 0,
        before: int = 2**62,
        level: int = 0,
        subject: str = "",
        text: str = "",
    ) -> Iterator[Json]:
        """Yield entries between two numbers with a minimum level, newest first."""
        while rows := self.run(
            "SELECT * FROM request WHERE seq > ? AND seq < ? AND level >= ? AND "
            "? IN ('', subject) AND instr(lower(entry), ?) > 0 ORDER BY seq DESC LIMIT 100",
            # In the text only ASCII letters become small, as SQL's lower() does it.
            [after, before, level, subject, text.encode().lower().decode()],
        ).fetchall():
            yield from (
                {"seq": seq, "level": level, "subject": subject, **from_json(entry)}
                for seq, level, subject, entry in rows
            )
            before = rows[-1][0]

    def batches(self, table: str, condition: str = "1 = 1") -> Iterator[list[Any]]:
        # Yield the rows of a table in the order of its key, some at a time.
        key, after, values = TABLE_KEYS[table], "1 = 1", list[Any]()
        size = len(key.split(", "))
        sql = f"SELECT * FROM {table} WHERE {condition} AND %s ORDER BY {key} LIMIT {MANY}"
        while rows := self.run(sql % after, values).fetchall():
            yield rows
            after, values = f"({key}) > ({', '.join('?' * size)})", rows[-1][:size]

    def _append(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        # Insert rows, each preceded by its number.
        if rows:
            first = self.next_number(table, len(rows))
            self.load(table, [(number, *row) for number, row in enumerate(rows, first)])

    def next_number(self, table: str, count: int = 1) -> int:
        # Give out numbers of a table's rows: return the first of count.
        [[last]] = self.run(
            "UPDATE number SET last = last + ? WHERE name = ? RETURNING last", [count, table]
        ).fetchall()
        return int(last) - count + 1

    def numbers(self) -> dict[str, int]:
        # Return the last number that each table has given out.
        return dict(self.run("SELECT name, last FROM number").fetchall())

    def continue_numbering(self, numbers: Mapping[str, int]) -> None:
        # After a restore, reuse no number and end the feed for all its readers (410).
        last = {name: max(seq, numbers.get(name, 0)) for name, seq in self.numbers().items()}
        last["change"] += 1  # also for readers that had read all changes
        self.run_many(
            "UPDATE number SET last = ? WHERE name = ?", [(seq, name) for name, seq in last.items()]
        )
        self.set_setting("feed_start", str(last["change"]))

    def clear(self) -> None:
        # Remove all rows but the name of the tenant; all numbers start again.
        for table in TABLE_KEYS.keys() - {"number"}:
            # The semicolon keeps PostgreSQL from TRUNCATE, which locks out readers.
            rows = " WHERE name <> 'tenant'" if table == "setting" else ";"
            self.run(f"DELETE FROM {table}{rows}")
        self.run("UPDATE number SET last = 0")

    def setting(self, name: str) -> str:
        sql = "SELECT coalesce((SELECT value FROM setting WHERE name = ?), '')"
        return str(self.run(sql, [name]).fetchone()[0])

    def set_setting(self, name: str, value: str) -> None:
        self.run(
            "INSERT INTO setting VALUES (?, ?) ON CONFLICT (name) "
            "DO UPDATE SET value = excluded.value",
            [name, value],
        )


def migrate(link: Link) -> None:
    """Bring the tables of an older version, or of none, up to date; StoreError for a newer one."""
    with link.transaction():
        version = link.version
        if version > FORMAT:
            raise StoreError(
                f"{link.place}: written by a newer scim_server (format {version}, "
                f"this one knows {FORMAT}); run that version"
            )
        if version < FORMAT:
            scripts = [SET_ASIDE, TABLES, COPY_OLDER] if version else [TABLES]
            for statement in ";".join([*scripts * (version < 7), ADD_TO_FORMAT_7]).split(";"):
                link.run(statement)
            if 0 < version < 6:
                renew_index(Session(link))
            link.run(f"PRAGMA user_version = {FORMAT}")


def renew_index(session: Session) -> None:
    # Make all entries again: other versions made other keys.
    # Two names that have become equal both stay: a name is compared only when it is written.
    session.run("DELETE FROM value")
    for row in session.resources():
        # The values tell the custom fields, also those of an earlier configuration.
        types = resource_types_of(row.attributes.get(FACILIO, {}))
        session.update_index(row.seq, set(), row.entries(types[row.type]))


class Store:
    """One tenant's database: a file, or ":memory:" for one that ends with the store.

    Or the tenant's schema in a PostgreSQL database, which is a URL or an object that others share.
    Safe from several threads. A reader sees the last commit and waits for no writer, only for a
    free connection, except in memory; writers take turns. StoreError if it cannot be used, or if
    it must_exist and its file is missing, empty or damaged.
    """

    def __init__(self, location: Location, tenant: str = "", must_exist: bool = False) -> None:
        self._is_shared = isinstance(location, Database)
        self.database = (
            location
            if isinstance(location, Database)
            else PostgresDatabase(str(location))
            if is_postgres(str(location))
            else SqliteDatabase(os.fspath(location), must_exist)
        )
        self._writing = threading.RLock()
        self._link: Link | None = None  # that of the outermost block of writing()
        self._written, self._interrupted = threading.Condition(), False
        try:
            self.schema = self.database.schema_of(tenant)
            self.place = f"{self.database.place} {self.schema}".rstrip()
            with self.database.writers.link(self.schema) as link:
                migrate(link)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def writing(self, is_copy: bool = False) -> Iterator[Session]:
        """Yield a session; its changes are on the disk when the block ends, or undone if it raises.

        A block inside a block of the same thread is a savepoint: it is undone alone if it raises.
        If the engine rolls back the whole transaction in it, all later steps and the commit fail.
        StoreError if the content was moved, except for a copy that replaces it.
        """
        with self._writing:
            if self._link and not self._link.in_transaction:
                raise StoreError(EARLIER_STEP)  # the engine has ended the transaction
            lent = nullcontext(self._link) if self._link else self._writer()
            with lent as link, link.transaction():
                session = Session(link)
                if (moved := session.moved_to()) and not is_copy:
                    raise StoreError(
                        f"{self.place}: the data was moved to {moved}", "the data was moved"
                    )
                yield session

    @contextmanager
    def _writer(self) -> Iterator[Link]:
        # Lend a link to the outermost block of writing(); afterwards tell those who wait.
        self.database.verify()
        try:
            with self.database.writers.link(self.schema) as self._link:
                yield self._link
        finally:
            self._link = None
        with self._written:
            self._written.notify_all()

    def reading(self) -> AbstractContextManager[Session]:
        """Return a context of a session that sees one commit, whatever is written meanwhile."""
        return self._snapshot(self.database.readers) if self.database.readers else self.writing()

    @contextmanager
    def _snapshot(self, readers: Pool) -> Iterator[Session]:
        with readers.link(self.schema) as link, link.snapshot():
            yield Session(link)

    def wait(self, seconds: float) -> bool:
        """Wait for a write, at most seconds and POLL_SECONDS; return False if interrupted.

        It may return without a write, since writes of other processes are not signalled.
        """
        with self._written:
            if not self._interrupted:
                self._written.wait(min(seconds, POLL_SECONDS))
            return not self._interrupted

    def interrupt(self) -> None:
        """End all waiting, permanently."""
        with self._written:
            self._interrupted = True
            self._written.notify_all()

    def close(self) -> None:
        """Close the database after the present write; a read in progress closes its connection."""
        self.interrupt()
        with self._writing:
            if not self._is_shared:
                self.database.close()

    def backup(self, path: str) -> None:
        """Write one commit to a new SQLite file, while others read and write; StoreError."""
        try:
            Path(path).touch(0o600, exist_ok=False)
            source = self.database.readers or self.database.writers
            with source.link(self.schema) as present, closing(SqliteLink(path)) as target:
                if isinstance(present, SqliteLink):
                    present.copy_to(target)  # fast, page by page
                else:
                    with present.snapshot(), target.transaction():
                        migrate(target)
                        copy_rows(Session(present), Session(target))
        except (OSError, StoreError) as error:
            raise StoreError(
                f"{self.place}: cannot be copied to {path} ({error}); "
                "name a new file for the backup"
            ) from error

    def move_to(self, target: Store, report: Callable[[str], None]) -> None:
        """Copy all content to an empty store, then refuse writes; if it fails, stay in use.

        Readers are served meanwhile. Writers of all processes wait for the lock. StoreError.
        """
        with self.writing() as source:
            with target.writing(is_copy=True) as session:
                if any(session.numbers().values()) and not session.setting("moved to"):
                    raise StoreError(f"{target.place}: has content already; remove it, or move it")
                copy_rows(source, session, report)
            source.set_setting("moved to", target.place)


def copy_rows(
    source: Session, target: Session, report: Callable[[str], None] = lambda text: None
) -> None:
    # Replace the rows of all tables by those of another database, and compare; StoreError.
    for table in TABLE_KEYS:
        target.run(f"DELETE FROM {table}")
        count = 0
        for rows in source.batches(table):
            target.load(table, rows)
            count += len(rows)
            report(f"{table}: {count} rows")
        pairs = itertools.zip_longest(source.batches(table), target.batches(table))
        if any(rows != copies for rows, copies in pairs):
            raise StoreError(f"{table}: the rows of the copy differ")


# ----------------------------------------------------------------------------
# 9. Employees
#
# What the sync is for: the employee of Facilio that a SCIM user is. The sources of
# its fields, its upkeep at every write of a user, and its table form.
# Uses chapters 1 to 8. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------

# Rows: the source in Entra ID, the SCIM path, and what an administrator must change in Entra's
# default mapping ("" for nothing).
# fmt: off
ENTRA_MAPPING = (
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
# The fields of an employee and the SCIM paths that they are made from: the first choice that has
# a value counts, and the values of a choice with + are joined by a space.
EMPLOYEE_SOURCES = {
    "name": ("displayName", "name.formatted", "name.givenName + name.familyName", "userName"),
    "email": ("emails[primary eq true].value", 'emails[type eq "work"].value', "userName"),
    "phone": ('phoneNumbers[type eq "work"].value',),
    "mobile": ('phoneNumbers[type eq "mobile"].value',),
    "designation": ("title",),
    "department": (f"{ENTERPRISE}:department",),
    "employeeNumber": (f"{ENTERPRISE}:employeeNumber",),
    "costCenter": (f"{ENTERPRISE}:costCenter",),
    "organization": (f"{ENTERPRISE}:organization",),
    "division": (f"{ENTERPRISE}:division",),
    "language": ("preferredLanguage",),
    "locale": ("locale",),
    "timezone": ("timezone",),
}
# fmt: on
USER_TYPE = resource_types(())["User"]
name_key = lru_cache(4_096)(USER_TYPE.root.by_name["username"].key)  # of a group's name, too


@dataclass(frozen=True)
class Employee:
    """An employee of Facilio; text that is unknown is ""."""

    id: int  # never changes for a person
    user_id: str  # the SCIM id
    external_id: str
    active: bool
    name: str
    email: str
    phone: str
    mobile: str
    designation: str
    department: str
    employeeNumber: str
    costCenter: str
    organization: str
    division: str
    language: str
    locale: str
    timezone: str
    manager: int | None  # the manager's employee id if known
    groups: list[str]  # the names of those that the user is a direct member of, sorted
    roles: list[str]  # what the configuration makes of these groups, sorted
    changed: str  # time of the last change, a dateTime in UTC
    custom_fields: dict[str, Json]  # values by link name


Roles = tuple[tuple[str, str], ...]  # (key of a group's name or externalId, role)
Groups = tuple[str, ...]  # the bodies of groups, as JSON


@lru_cache
def roles_of(text: str) -> Roles:
    # Return roles from their stored form.
    return tuple(from_json(text).items())


@lru_cache(4_096)
def fields_of_groups(groups: Groups, roles: Roles) -> Resource:
    # Return the fields of an employee that its groups decide, None for an empty one.
    bodies = [from_json(body) for body in groups]
    keys = {
        name_key(body.get(name, "")) for body in bodies for name in ("displayName", "externalId")
    }
    return {
        "groups": sorted(body["displayName"] for body in bodies) or None,
        "roles": sorted({role for key, role in roles if key in keys}) or None,
    }


def to_employee(row: EmployeeRow, roles: Roles) -> Employee:
    of_groups = fields_of_groups(row.groups, roles)
    return Employee(
        id=row.id,
        user_id=row.user_id,
        external_id=row.external_id,
        active=bool(row.active),
        manager=row.manager,
        groups=[*(of_groups["groups"] or ())],
        roles=[*(of_groups["roles"] or ())],
        changed=row.changed,
        **row.record,
    )


EMPLOYEE_PATHS = {
    name: [[parse_path(path, USER_TYPE) for path in choice.split(" + ")] for choice in choices]
    for name, choices in EMPLOYEE_SOURCES.items()
}


def employee_record(user: Resource) -> Resource:
    # Return the fields of an employee that are copied from a user, by their names in Employee.
    return {
        name: next(filter(None, (joined_texts(paths, user) for paths in choices)), "")
        for name, choices in EMPLOYEE_PATHS.items()
    } | {"custom_fields": dict(user.get(FACILIO, {}))}


def joined_texts(paths: list[PatchPath], resource: Resource) -> str:
    # Return the texts at some paths in a resource, with a space between them.
    return " ".join(filter(None, (text_at(path, resource) for path in paths)))


def text_at(path: PatchPath, resource: Resource) -> str:
    # Return the first text at a path in a resource, "" if there is none.
    texts = (
        item.get(path.sub_attribute.name) if path.sub_attribute else item
        for item in values_at(path.attributes, resource)
        if not path.filter or matches(path.filter, item)
    )
    return str(next(filter(None, texts), ""))


# -- Upkeep ----------------------------------------------------------------------


def time_text(instant: datetime) -> str:
    # Return an instant as dateTime text, in UTC with milliseconds, as in meta.created.
    return instant.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def change_kind(before: Resource, after: Resource) -> str:
    # Return "created", "updated" … for a change from before to after; {} means it is absent.
    if not before or not after:
        return "deleted" if before else "created"
    activity: tuple[Json, Json] = before.get("active"), after.get("active")
    return {(True, False): "deactivated", (False, True): "reactivated"}.get(activity, "updated")


def values_by_path(attribute: Attribute, resource: Resource) -> Iterator[tuple[str, Json]]:
    # Yield the values that a client may write, with their paths; those of an extension one by one.
    for sub in attribute.sub_attributes:
        is_writable = sub.mutability == "readWrite" and sub.returned != "never"
        if sub.name in resource and is_writable and not sub.is_membership:
            yield from (
                [(f"{sub.path}:{name}", item) for name, item in resource[sub.name].items()]
                if ":" in sub.name
                else [(sub.path, resource[sub.name])]
            )


def differences(before: Resource, after: Resource) -> Differences:
    return {
        name: [before.get(name), after.get(name)]
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    }


def update_employee(
    session: Session,
    user_id: str,
    user: Resource,
    now: str,
    roles: Roles,
    is_new: bool = True,
) -> list[NewChange]:
    """Make the employee of a user follow a write, and return the change if there is one.

    {} as the user means that it was deleted.
    """
    columns = employee_columns(user_id, user)
    before = None if is_new else session.employee_of(user_id)
    # A new user is a returning person or a new employee. If a user's employee was given to a newer
    # user, the older user has no employee until it is activated again.
    if not before and (is_new or columns.get("active")):
        before = (
            session.former_employee(columns["external_id"], columns["user_name"]) or NEW_EMPLOYEE
        )
    if not before or (after := before._replace(**columns)) == before:
        return []
    id = session.put_employee(after._replace(changed=now))
    if before.user_id not in ("", user_id):  # a returning person keeps their reports
        session.reassign_reports(before.user_id, user_id)
    if before.user_id != user_id and (before.id or not is_new):  # it has the groups of another user
        after = session.employee_of(user_id) or after
    old, new = compared_fields(before, roles) if before.id else {}, compared_fields(after, roles)
    pairs = differences(old, new)
    return [(f"employee.{change_kind(old, new)}", [(str(id), "")], pairs)] if pairs else []


def changes_in_group(
    session: Session,
    group_seq: int,
    now: str,
    versions: Sequence[tuple[Groups, Roles]],
    user_ids: Sequence[str] | None = None,
) -> list[NewChange]:
    """Return the changes of the employees in a group, all or those of some of its users.

    The versions are the group's body and the roles, before and after. A version without a body
    means that users join or leave.
    """
    is_change = differences(*itertools.starmap(fields_of_groups, versions)) and user_ids != []
    rows = sorted(session.change_employees(group_seq, now, user_ids)) if is_change else []
    return [
        ("employee.updated", [(id, "") for _, id in employees], pairs)
        for bodies, employees in itertools.groupby(rows, operator.itemgetter(0))
        for others in [from_json(bodies)]
        if (
            pairs := differences(
                *(fields_of_groups((*others, *group), roles) for group, roles in versions)
            )
        )
    ]


GUARDED_TIME = timedelta(hours=1)


def check_deactivations(session: Session, number: int, now: datetime, name: str) -> None:
    # Raise ScimError 429 if an hour has had this number of deactivations.
    if at := session.nth_deactivation(number, time_text(now - GUARDED_TIME)):
        age = now - datetime.fromisoformat(at.replace("Z", "+00:00"))
        raise ScimError(
            429,
            "",
            f"max_deactivations: {number} employees have become inactive within an hour; "
            f"{quoted(name)} was not changed. If this is intended, raise or remove "
            "max_deactivations in the configuration, which is loaded within a second",
            {"Retry-After": str(3_600 - int(age.total_seconds()))},
            ("guard", str(number)),
        )


def employee_columns(user_id: str, user: Resource) -> Resource:
    # Return the columns of EmployeeRow that a user decides; those of {} make it inactive.
    if not user:
        return {"provisioned": False, "active": False}
    return {
        "user_id": user_id,
        "provisioned": True,
        "external_id": user.get("externalId", ""),
        "user_name": name_key(user["userName"]),
        "manager_id": user.get(ENTERPRISE, {}).get("manager", {}).get("value", ""),
        "record": employee_record(user),
        # A new employee is active; if active was removed, the employee keeps its state.
        **({"active": user["active"]} if "active" in user else {}),
    }


def compared_fields(row: EmployeeRow, roles: Roles) -> Resource:
    values = {
        **row.record,
        **fields_of_groups(row.groups, roles),
        "active": bool(row.active),
        "external_id": row.external_id,
        "user_id": row.user_id,
        "manager": row.manager_id,
    }
    return {name: value for name, value in values.items() if value not in ("", {}, None)}


# -- Table form ------------------------------------------------------------------


def employee_table(employees: Iterable[Employee], link_names: Sequence[str]) -> Iterator[list[str]]:
    # Yield the header and a row of texts for each employee, the custom fields as last columns.
    columns = [field.name for field in fields(Employee) if field.name != "custom_fields"]
    yield columns + [f"custom_fields.{name}" if name in columns else name for name in link_names]
    for employee in employees:
        yield [
            "" if value in (None, []) else value if isinstance(value, str) else to_json(value)
            for value in (
                *(getattr(employee, name) for name in columns),
                *(employee.custom_fields.get(name) for name in link_names),
            )
        ]


def employee_csv(table: Iterable[list[str]]) -> Iterator[str]:
    # Yield the lines of a table as CSV (RFC 4180).
    for row in table:
        line = io.StringIO()
        # A spreadsheet would run a cell that looks like a formula; an apostrophe makes it text.
        csv.writer(line).writerow(
            f"'{cell}"
            if cell[:1] in tuple("=+-@\t\r\n＝＋－＠") and not re.fullmatch(r"-?\d+", cell)
            else cell
            for cell in row
        )
        yield line.getvalue()


# ----------------------------------------------------------------------------
# 10. Directory                                                   RFC 7644 §3
#
# One tenant's SCIM operations, a transaction each. Takes and returns canonical
# resources; the clock and the maker of ids are arguments.
# Uses chapters 1 to 9. Knows nothing of HTTP.
# ----------------------------------------------------------------------------

KEEP_CHANGES = 1_000_000
KEEP_DAYS = 90
KEEP_LOG = 10_000
MAX_KEPT_VALUE = 1_000  # characters of an old and a new value together, as JSON, in the feed
MAX_POLLS = 4  # reads of long polls at the same time
CHANGED_SINCE = Attribute("changed_since", "dateTime").with_paths()
WHOLE = Selection()
Clock = Callable[[], datetime]
utc_now: Clock = partial(datetime.now, UTC)
Result = TypeVar("Result")


def random_id() -> str:
    return str(uuid.uuid4())


def random_secret(purpose: str) -> str:
    # Return 64 hexadecimal digits. A test may need the same ones each time: they depend on purpose.
    return secrets.token_hex(32)


class Directory:
    """One tenant's users, groups and employees, without any HTTP. Safe from several threads.

    A resource type is one of resource_types or its name; bodies and resources are JSON objects.
    Operations raise ScimError 404 for an id that no resource of the type has, 400 as accept and
    parse_operations do, 409 uniqueness for a userName or group displayName that is in use, and 412
    for a precondition that fails. cursor_key is a secret of the store for signing cursors. keep is
    how many changes the feed holds, keep_days for how long, keep_values whether with old and new
    values. max_deactivations is how many employees may become inactive in an hour, 0 for any
    number; the next one is 429. roles has the roles of employees by the displayName or externalId
    of a group. StoreError if the store fails, or is another tenant's.
    """

    def __init__(
        self,
        store: Store,
        custom_fields: Sequence[CustomField] = (),
        clock: Clock = utc_now,
        new_id: Callable[[], str] = random_id,
        keep: int = KEEP_CHANGES,
        keep_days: int = KEEP_DAYS,
        keep_values: bool = True,
        max_deactivations: int = 0,
        new_secret: Callable[[str], str] = random_secret,
        roles: Mapping[str, str] = {},
        tenant: str = "",
    ) -> None:
        self.store, self.clock, self.new_id, self.token = store, clock, new_id, ""
        self._new_secret, self._tenant = new_secret, tenant
        self.keep, self.keep_days, self.keep_values = keep, keep_days, keep_values
        self.max_deactivations, self._polls = max_deactivations, threading.Semaphore(MAX_POLLS)
        self.differences: Differences = {}  # of the user or group that was written last
        self.custom_fields = tuple(custom_fields)
        self.resource_types = resource_types(self.custom_fields)
        self.link_names = [custom.link_name for custom in self.custom_fields]
        self.roles: Roles = tuple((name_key(name), role) for name, role in roles.items())
        with store.writing() as session:
            self.prepare(session)

    @classmethod
    def as_stored(cls, store: Store) -> Directory:
        """Return a directory with the custom fields and roles that its server has stored.

        It may write.
        """
        with store.reading() as session:
            custom_fields, roles = (
                json.loads(session.setting(name) or "{}") for name in ("custom_fields", "roles")
            )
        return cls(store, tuple(CustomField(*pair) for pair in custom_fields), roles=roles)

    def on_behalf_of(self, token: str) -> Directory:
        """Return this directory with the name of the token whose changes it makes.

        It remembers the differences that it has made to a user or group.
        """
        view = copy.copy(self)
        vars(view).update(token=token, differences={})
        return view

    # -- SCIM operations --

    def create(self, type: ResourceType | str, body: Json) -> Resource:
        """Store a new resource and return it (RFC 7644 §3.3)."""
        resource_type = self._type(type)
        resource = accept(resource_type.root, body)
        resource.update(defaults(resource_type) | resource)
        with self.store.writing() as session:
            now = self._now(session)
            row = StoredResource(0, resource_type.name, self.new_id(), "{}", "{}", 0, now, now, 0)
            # Members and the employee need its number, which it gets with the first save.
            session.save(row, set(), row.entries(resource_type))
            row = self._save(session, row, {}, resource, replaces_members=False)
            return self._resource(session, row, groups={row.seq: []})

    def get(self, type: ResourceType | str, id: str, selection: Selection = WHOLE) -> Resource:
        """Return a resource (RFC 7644 §3.4.1), with its members only if they are selected."""
        with self.store.reading() as session:
            row = self._find(session, type, id).with_fields_of(self.resource_types["User"])
            return self._resource(session, row, selection)

    def query(
        self,
        type: ResourceType | str,
        filter: Filter | str = EVERYTHING,
        sorting: Sorting | None = None,
        start_index: int = 1,
        count: int = DEFAULT_COUNT,
        selection: Selection = WHOLE,
    ) -> Page:
        """Return at most count resources of a type that match, from the 1-based start_index.

        Without sorting the order is that of creation, so that paging sees each resource once
        (RFC 7644 §3.4.2). A filter as text raises ScimError 400 invalidFilter.
        """
        resource_type = self._type(type)
        tree = parse_filter(filter, resource_type) if isinstance(filter, str) else filter
        return self.search(
            {resource_type.name: (tree, selection)},
            sorting,
            Window(max(count, 0), max(start_index, 1) - 1),
        )

    def search(
        self,
        queries: Mapping[str, tuple[Filter, Selection]],
        sorting: Sorting | None,
        window: Window,
        base_url: str = "",
    ) -> Page:
        """Return a window on the matches of several types, each with a filter (RFC 7644 §3.4.2.1).

        With a base_url, resources that are selected as a whole are Encoded.
        """
        filters = {name: filter for name, (filter, _) in queries.items()}
        with self.store.reading() as session:
            matches, more = session.page(filters, sorting, window)
            # A first page that is not full, or one with the last match, says how many there are.
            uncounted = not window.after and (more or (window.offset and not matches))
            total = session.total(filters) if uncounted else window.offset + len(matches)
            rows = [row.with_fields_of(self.resource_types["User"]) for *_, row in matches]
            groups = session.groups([row.seq for row in rows if row.type == "User"])
            resources: list[Resource | Encoded] = [
                row.encoded(
                    self.resource_types[row.type],
                    *self._links(session, row, groups=groups),
                    base_url,
                )
                if base_url and queries[row.type][1] == WHOLE
                else self._resource(session, row, queries[row.type][1], groups=groups)
                for row in rows
            ]
        first, last = [
            Position(missing, key, row.seq) for missing, key, row in matches[:1] + matches[-1:]
        ] or (None, None)
        return Page(None if window.after else total, resources, first, last, more)

    def replace(
        self, type: ResourceType | str, id: str, body: Json, condition: Precondition = ALWAYS
    ) -> Resource:
        """Store a resource in place of the present one and return it (RFC 7644 §3.5.1)."""
        resource_type = self._type(type)
        resource = accept(resource_type.root, body)
        with self.store.writing() as session:
            row, before = self._find_to_write(session, type, id, condition)
            # Okta leaves out active when it changes other attributes: that must not reactivate.
            kept = {name: before[name] for name in defaults(resource_type) if name in before}
            resource.update(kept | resource)
            return self._resource(session, self._save(session, row, before, resource, True))

    def patch(
        self,
        type: ResourceType | str,
        id: str,
        body: Json | list[Operation],
        condition: Precondition = ALWAYS,
        selection: Selection = WHOLE,
    ) -> Resource | None:
        """Apply a PATCH body, or its operations, to a resource (RFC 7644 §3.5.2).

        Returns the resource; None for a group of more than MAX_ANSWERED_MEMBERS, unless attributes
        are selected.
        """
        resource_type = self._type(type)
        operations = (
            body
            if isinstance(body, list) and all(isinstance(step, Operation) for step in body)
            else parse_operations(resource_type, body)
        )
        with self.store.writing() as session:
            row, before = self._find_to_write(
                session, type, id, condition, touched_member_ids(operations)
            )
            row = self._save(
                session,
                row,
                before,
                apply_patch(resource_type, before, operations),
                any(step.op == "replace" and step.names_members for step in operations),
            )
            # RFC 7644 requires a body whenever attributes are selected, whatever the size.
            if row.member_count > MAX_ANSWERED_MEMBERS and selection.wanted is None:
                return None
            return self._resource(session, row, selection)

    def delete(self, type: ResourceType | str, id: str, condition: Precondition = ALWAYS) -> None:
        """Remove a resource and its memberships (RFC 7644 §3.6)."""
        with self.store.writing() as session:
            row, before = self._find_to_write(session, type, id, condition, only_members=())
            groups = [item["value"] for item in session.groups([row.seq])[row.seq]]
            for group in [self._find(session, "Group", value) for value in groups if value != id]:
                self._save_members(session, group, {"members": [{"value": id}]}, group.attributes)
                self._touch(session, group, group.attributes, group.member_count - 1)
            removed = [(id, item["value"]) for item in session.members(row.seq)]
            self._log(session, [("member.removed", removed, {})])
            self._record(session, row, before, {})
            session.delete(row, row.entries(self._type(type)))

    def seed(self, source: Resource | str | os.PathLike[str]) -> dict[str, str]:
        """Create users and groups from {"Users": [body, …], "Groups": [body, …]}, or such a file.

        A member may be given by the userName or displayName that the seed has, as {"value": name}
        or the name alone.
        Returns the ids by name.
        """
        document = (
            source if isinstance(source, dict) else json.loads(Path(source).read_text("utf-8"))
        )
        if other_keys := sorted(document.keys() - {"Users", "Groups"}):
            raise invalid_value(f"seed: expected Users and Groups, got {quoted(other_keys)}")
        ids: dict[str, str] = {}
        with self.store.writing():
            for body in document.get("Users") or ():
                user = self.create("User", body)
                ids[user["userName"]] = user["id"]
            for body in document.get("Groups") or ():
                members = [
                    {**member, "value": ids.get(member.get("value", ""), member.get("value"))}
                    for item in body.get("members") or ()
                    for member in [item if isinstance(item, dict) else {"value": item}]
                ]
                group = self.create("Group", {**body, "members": members})
                if unknown := {member["value"] for member in members} - {
                    member["value"] for member in group.get("members", ())
                }:
                    raise invalid_value(
                        f"members of {group['displayName']}: "
                        f"{', '.join(sorted(map(str, unknown)))}: "
                        "expected the id of a resource, or the name of one in the same seed"
                    )
                ids[group["displayName"]] = group["id"]
        return ids

    # -- Employees and changes --

    def employees(
        self,
        active: bool | None = None,
        changed_since: str = "",
        id: int | None = None,
        after: int = 0,
    ) -> Iterator[Employee]:
        """Yield employees by their ids, those after an id: active or not, changed since a dateTime.

        Raises ScimError 400 invalidValue for a changed_since that is no dateTime.
        """
        since = changed_since and CHANGED_SINCE.key(CHANGED_SINCE.convert(changed_since))
        after, last = (after, 2**62) if id is None else (max(after, id - 1), id)
        while rows := self._read(
            partial(Session.employees, after=after, last=last, active=active, since=since)
        ):
            yield from (to_employee(row, self.roles) for row in rows)
            after = rows[-1].id

    def changes(self, after: int = 0, wait: float = 0, count: int = MAX_COUNT) -> list[Change]:
        """Return at most count changes after a number; wait for seconds if there is none.

        Raises ScimError 410 if the feed no longer has them: its detail says where to start.
        """
        return self._read(lambda session: session.changes(after, count), wait)

    def requests(
        self,
        after: int = 0,
        before: int = 0,
        count: int = DEFAULT_COUNT,
        level: int = 0,
        subject: str = "",
        text: str = "",
        matches: Callable[[Json], bool] | None = None,
        wait: float = 0,
    ) -> list[Json]:
        """Return entries of the provisioning log, newest first; wait seconds if there is none.

        before 0 is the end; level 1 is warnings and refusals, 2 refusals; each entry contains text
        and matches.
        """
        return self._read(
            lambda session: list(
                itertools.islice(
                    filter(matches, session.requests(after, before or 2**62, level, subject, text)),
                    count,
                )
            ),
            wait,
        )

    def _read(self, read: Callable[[Session], Result], wait: float = 0) -> Result:
        # An empty answer is read again until wait seconds are over.
        end = time.monotonic() + wait
        while True:
            # Long polls must not take all readers from the look-ups, which never wait for one.
            with self._polls if wait else nullcontext(), self.store.reading() as session:
                rows = read(session)
            remaining = end - time.monotonic()
            if rows or remaining <= 0 or not self.store.wait(remaining):
                return rows

    def history(self, id: str) -> tuple[Employee | None, list[Change]]:
        """Return the employee that a user is or was, and the newest changes of a user or group."""
        with self.store.reading() as session:
            row = session.employee_of(id)
            changes = session.changes_about(id, row.id if row else 0, DEFAULT_COUNT)
        return to_employee(row, self.roles) if row else None, changes

    def follow(
        self, after: int = 0, wait: bool = True, kind: str = "employee."
    ) -> Iterator[Change]:
        """Yield the changes after a number whose kind begins so, then each new one.

        A consumer that stores seq after each change, and starts again with follow(seq), misses
        none. If the feed no longer has the next ones, it gets a change of the kind employee.current
        for every employee, active or not: seq is 0 until the last of them, and 0 starts with
        everything again. This ends with the store, or without wait after the newest change. With
        wait, a StoreError is logged, and reading is tried again.
        """
        while True:
            try:
                changes, after = self._next_changes(after, MAX_WAIT if wait else 0)
            except StoreError:
                if not wait:
                    raise
                changes = ()
                if self.store.wait(POLL_SECONDS):  # the file may be locked for a while
                    LOG.exception("the changes cannot be read, trying again")
            yield from (change for change in changes if change.kind.startswith(kind))
            if not changes and not (wait and self.store.wait(0)):
                return

    def _next_changes(self, after: int, wait: float) -> tuple[Iterable[Change], int]:
        # Return changes as follow() yields them, and the number of the newest one.
        try:
            changes: Iterable[Change] = self.changes(after, wait)
            last = max((change.seq for change in changes), default=after)
        except ScimError:  # 410
            _, last = self._read(Session.change_bounds)  # before the employees are read
            employees = [(employee.id, employee.changed) for employee in self.employees()]
            changes = (
                Change(
                    last * (id == employees[-1][0]), at, "employee.current", str(id), "", "", [], {}
                )
                for id, at in employees
            )
        with self.store.reading() as session:  # the server's configuration may have changed
            self.roles = tuple(from_json(session.setting("roles") or "{}").items())
        return changes, last

    def on_change(self, callback: Callable[[Change], None]) -> threading.Thread:
        """Call back with each change from now on, in order, after its commit; return the thread.

        The changes are those of follow() and of every kind. Exceptions of the callback are logged,
        then ignored. The thread ends with the store.
        """

        def run(after: int) -> None:
            for change in self.follow(after, kind=""):
                try:
                    callback(change)
                except Exception:
                    LOG.exception("a callback of on_change() failed")

        thread = threading.Thread(
            target=run, args=[self._read(Session.change_bounds)[1]], daemon=True
        )
        thread.start()
        return thread

    # -- Reading: from a stored resource to what is shown --

    def _type(self, type: ResourceType | str) -> ResourceType:
        if isinstance(type, str) and type not in self.resource_types:
            raise ScimError(
                404,
                "",
                f"{quoted(type)} is no resource type; there are {', '.join(self.resource_types)}",
            )
        return self.resource_types[type] if isinstance(type, str) else type

    def _find(self, session: Session, type: ResourceType | str, id: str) -> StoredResource:
        name = self._type(type).name
        if row := session.find(name, id):
            return row
        raise ScimError(404, "", f"{name} {quoted(id)} does not exist", reason=("gone", name, id))

    def _find_to_write(
        self,
        session: Session,
        type: ResourceType | str,
        id: str,
        condition: Precondition,
        only_members: Iterable[str] | None = None,
    ) -> tuple[StoredResource, Resource]:
        row = self._with_current_fields(session, self._find(session, type, id))
        resource = self._resource(session, row, only_members=only_members)
        condition.check(resource["meta"]["version"])
        return row, resource

    def _resource(
        self,
        session: Session,
        row: StoredResource,
        selection: Selection = WHOLE,
        only_members: Iterable[str] | None = None,
        groups: Mapping[int, list[Resource]] | None = None,
    ) -> Resource:
        version, links = self._links(session, row, selection, only_members, groups)
        return {
            "schemas": schemas_of(self.resource_types[row.type], row.attributes),
            "id": row.id,
            **row.attributes,
            "meta": {
                "resourceType": row.type,
                "created": row.created,
                "lastModified": row.modified,
                "version": version,
            },
            **links,
        }

    def _links(
        self,
        session: Session,
        row: StoredResource,
        selection: Selection = WHOLE,
        only_members: Iterable[str] | None = None,
        groups: Mapping[int, list[Resource]] | None = None,
    ) -> tuple[str, Resource]:
        # The version of a resource, and its groups or its members.
        if members := self.resource_types[row.type].root.by_name.get("members"):
            selected = row.member_count and selection.includes(members)
            links = {"members": session.members(row.seq, only_members)} if selected else {}
            return f'W/"{row.revision}"', links
        if not (own_groups := (groups or session.groups([row.seq]))[row.seq]):
            return f'W/"{row.revision}"', {}
        # A group that is renamed changes its members' groups, and so their versions.
        fingerprint = hashlib.sha256(to_json(own_groups).encode()).hexdigest()[:12]
        return f'W/"{row.revision}-{fingerprint}"', {"groups": own_groups}

    # -- Writing: what is checked, stored and logged --

    def _save(
        self,
        session: Session,
        row: StoredResource,
        before: Resource,
        after: Resource,
        replaces_members: bool,
    ) -> StoredResource:
        for sub in self.resource_types[row.type].root.sub_attributes:
            if (
                sub.uniqueness == "server"
                and sub.mutability != "readOnly"
                and (value := after.get(sub.name)) not in (None, before.get(sub.name))
                and session.is_in_use(row.type, sub.index, sub.key(value), row.seq)
            ):
                raise ScimError(
                    409,
                    "uniqueness",
                    f"{sub.name} {quoted(value)} is already in use by another {row.type}",
                    reason=("taken", sub.name, str(value), row.type),
                )
        attributes = stored(after)
        if attributes != row.attributes:
            self._record(session, row, before, after)
        growth, members_changed = self._save_members(session, row, before, after)
        # Unknown ids are ignored beside known ones. Alone they would empty the group.
        if replaces_members and after.get("members") and not row.member_count + growth:
            ids = ", ".join(quoted(member["value"]) for member in after["members"][:3])
            raise invalid_value(
                f"members: no user or group has the id {ids}; the group is unchanged",
                reason=("members", ids),
            )
        if attributes == row.attributes and not members_changed:
            return row  # nothing is written
        return self._touch(session, row, attributes, row.member_count + growth)

    def _touch(
        self, session: Session, row: StoredResource, attributes: Resource, member_count: int
    ) -> StoredResource:
        resource_type, now = self.resource_types[row.type], max(row.modified, self._now(session))
        changed = row.changed(attributes, modified=now, member_count=member_count)
        session.save(changed, row.entries(resource_type), changed.entries(resource_type))
        return changed

    def _save_members(
        self, session: Session, row: StoredResource, before: Resource, after: Resource
    ) -> tuple[int, bool]:
        # Returns by how many the group has grown, and whether any member has changed.
        if not (members := self.resource_types[row.type].root.by_name.get("members")):
            return 0, False
        old, new = (
            {member["value"]: member.get("display") for member in resource.get("members", ())}
            for resource in (before, after)
        )
        removed = sorted(old.keys() - new.keys())
        differing = dict(member for member in new.items() if member not in old.items())
        check_member_changes(len(removed) + len(differing))
        versions: list[tuple[Groups, Roles]] = [
            ((to_json(stored(after)),), roles_of(session.roles)),
            ((), roles_of(session.roles)),
        ]
        changes = changes_in_group(session, row.seq, self._now(session), versions, removed)
        session.remove_members(row.seq, removed)
        written = session.add_members(row.seq, differing, members.by_name["display"])
        added = [id for id in written if id not in old]
        changes += changes_in_group(session, row.seq, self._now(session), versions[::-1], added)
        kinds = {"removed": removed, "updated": sorted({*written} - {*added}), "added": added}
        self._log(
            session,
            [
                *((f"member.{kind}", [(row.id, id) for id in kinds[kind]], {}) for kind in kinds),
                *changes,
            ],
        )
        return len(added) - len(removed), bool(removed or written)

    def _record(
        self, session: Session, row: StoredResource, before: Resource, after: Resource
    ) -> None:
        # {} as before or after: the resource is new or deleted.
        root, kind = self.resource_types[row.type].root, change_kind(before, after)
        self.differences = pairs = differences(
            *(dict(values_by_path(root, version)) for version in (before, after))
        )
        changes: list[NewChange] = [(f"{row.type.lower()}.{kind}", [(row.id, "")], pairs)]
        roles = roles_of(session.roles)
        if row.type == "User":
            changes += update_employee(
                session, row.id, after, self._now(session), roles, not before
            )
        elif before:
            versions = [((to_json(stored(it)),) if it else (), roles) for it in (before, after)]
            changes += changes_in_group(session, row.seq, self._now(session), versions)
        if any(kind == "employee.deactivated" for kind, *_ in changes) and self.max_deactivations:
            check_deactivations(session, self.max_deactivations, self.clock(), before["userName"])
        self._log(session, changes)

    def _log(self, session: Session, changes: Sequence[NewChange]) -> None:
        # Append changes of one time to the feed, which is trimmed too.
        now = self._now(session)
        rows = [
            (now, kind, id, member, self.token, *texts)
            for kind, ids, pairs in changes
            for texts in [(to_json([*pairs]), to_json(self.kept(pairs)))]
            for id, member in ids
        ]
        if rows:
            clock = self.clock()
            oldest = time_text(clock - timedelta(days=self.keep_days))
            # check_deactivations() counts those that the feed has.
            up_to = time_text(clock - GUARDED_TIME) if self.max_deactivations else now
            session.log(rows, self.keep, oldest, up_to)

    def kept(self, pairs: Differences) -> Differences:
        return {
            name: pair
            for name, pair in pairs.items()
            if self.keep_values and len(to_json(pair)) <= MAX_KEPT_VALUE
        }

    def _now(self, session: Session) -> str:
        return session.time_of_write(time_text(self.clock()))

    # -- What was stored under another configuration, or by an older version --

    def prepare(self, session: Session) -> None:
        """Bring the content of another configuration or version, or none, up to date."""
        pairs = [[custom.link_name, custom.type.lower()] for custom in self.custom_fields]
        current = {
            "custom_fields": to_json(pairs),
            "roles": to_json(dict(self.roles)),
            "employees": "made",
        }
        former = {name: session.setting(name) for name in (*current, "tenant", "cursor_key")}
        owner = former["tenant"] or self._tenant
        if self._tenant not in ("", owner):
            raise StoreError(
                f"{self.store.place}: is the file of tenant {owner}, not of {self._tenant}"
            )
        # An employee with other roles has the same change in each of its groups.
        changes: dict[str, NewChange] = {}
        is_current, is_older = current.items() <= former.items(), not former["employees"]
        for row in () if is_current else session.resources(every=is_older):
            match row.type, former["employees"]:
                case "User", "":  # an older version stored users without employees
                    created = update_employee(
                        session, row.id, row.attributes, self._now(session), self.roles
                    )
                    self._log(session, created)
                case "Group", "made":
                    roles = roles_of(session.roles), self.roles
                    versions = [((row.body,), version) for version in roles]
                    changes |= {
                        id: (kind, [(id, "")], pairs)
                        for kind, employees, pairs in changes_in_group(
                            session, row.seq, self._now(session), versions
                        )
                        for id, _ in employees
                    }
            self._with_current_fields(session, row)
        self._log(session, list(changes.values()))
        secret = former["cursor_key"] or self._new_secret("cursor key")
        self.cursor_key = bytes.fromhex(secret)
        current |= {"tenant": owner, "cursor_key": secret}
        for name, value in current.items() - former.items():
            session.set_setting(name, value)

    def _with_current_fields(self, session: Session, row: StoredResource) -> StoredResource:
        # Store a resource of another configuration as this one sees it.
        user_type = self.resource_types["User"]
        if (changed := row.with_fields_of(user_type)) is not row:
            # The index has the entries of the other configuration; the values tell its types.
            types = resource_types_of(row.attributes.get(FACILIO, {}))
            session.save(changed, row.entries(types["User"]), changed.entries(user_type))
            self._record(session, row, row.attributes, changed.attributes)
        return changed


# ----------------------------------------------------------------------------
# 11. Configuration
#
# A JSON file of tenants, credentials and custom fields becomes frozen dataclasses. Each of
# their fields carries the rule for its JSON value, and one reader applies the rules. It
# reports every mistake in a file by its JSON path.
# Uses chapters 1, 2, 8 and 10. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------


class ConfigError(Exception):
    """An unusable configuration; problems has a line for each mistake, its JSON path first.

    source is its file, or "document" for one that a program passed.
    """

    def __init__(self, problems: list[str], source: str) -> None:
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))
        self.problems, self.source = problems, source


# -- Rules: what a JSON value may be -------------------------------------------------

# A kind is a function that converts a value, and the words for what the value must be. The
# function returns None or raises an error for a wrong value. A dict sets several fields.
Kind = tuple[Callable[[Any], Any], str]
# A rule is a kind, or [kind of the list, rule of its items], or settings by key for an object
# that becomes a tuple, or the dataclass that an object becomes.
Rule = Kind | list[Any] | dict[str, Any] | type


def text_of(pattern: str, expected: str, convert: Callable[[str], Any] = str) -> Kind:
    # Return the rule for texts that match a pattern as a whole; convert makes the setting.
    return lambda value: convert(value) if re.fullmatch(pattern, value) else None, expected


def host_and_port(value: Json) -> dict[str, Any] | None:
    # A port alone leaves the host as it is.
    host, colon, port = value.rpartition(":")
    valid = bool(host) == bool(colon) and re.fullmatch(r"\d{1,5}", port) and int(port) < 65_536
    return {"port": int(port), **({"host": host.strip("[]")} if host else {})} if valid else None


def digest(secret: str) -> str:
    # SHA-256 as hex. Secrets are only compared in this form.
    return hashlib.sha256(secret.encode()).hexdigest()


# fmt: off
TEXT = text_of(r"[^\x00-\x1f]*[^\s\x00][^\x00-\x1f]*", "text that is not empty")
OBJECT = (lambda value: value if isinstance(value, dict) else None, "an object")
LIST = (lambda value: value if isinstance(value, list) else None, "a list")
FULL_LIST = (lambda value: value if isinstance(value, list) and value else None,
             "a list with at least one item")
FLAG = (lambda value: value if isinstance(value, bool) else None, "true or false")
POSITIVE = (lambda value: value if type(value) is int and 0 < value <= 10**8 else None,
         "a whole number from 1 to 100000000")
ROLES = (lambda value: tuple((name_key(name), role) for name, role in value.items())
         if all(TEXT[0](text) for pair in value.items() for text in pair)
         and len(set(map(name_key, value))) == len(value) else None,
         'an object of texts such as {"Night Crew": "Technician"}, each group once')
DATABASE = text_of(r"postgres(ql)?://\S+", "a URL such as postgresql://user@host/name")
DAYS = (lambda value: value if type(value) is int and 0 < value <= 36_500 else None,
        "1 to 36500 days")
ADDRESS = (host_and_port, "HOST:PORT such as 127.0.0.1:8080, or a PORT")
FILE = (lambda value: TEXT[0](value), TEXT[1])
SECRET_TEXT = text_of("[!-~]+", "visible ASCII characters without blanks",
                 convert=lambda secret: {"secret": secret, "sha256": digest(secret)})
SECRET_FILE = (lambda value: {
    "sha256": SECRET_TEXT[0](Path(value).read_text("utf-8-sig").strip())["sha256"]}
    # Neither a pipe, which may wait, nor a file that is no secret but fills the memory.
    if os.path.isfile(value) and os.path.getsize(value) <= MAX_TEXT else None,
               "the path of a readable file with nothing but the secret")
HOST_NAME = text_of("[A-Za-z0-9._-]+", "a host name such as scim.example.com", convert=str.lower)
NETWORK = (lambda value: ipaddress.ip_network(str(value)),
           "an address such as 10.0.0.1 or 10.0.0.0/8")
TIME = (lambda value: datetime.fromisoformat(date_time_key(value)[:19]).replace(tzinfo=UTC),
        "a time such as 2027-01-31T00:00:00Z")
# fmt: on


# -- Settings: each key of the file is a field of one of these dataclasses ----------------------


def setting(
    rule: Rule | None,
    default: Any = MISSING,
    *,
    key: str = "",
    unique: Callable[[str], str] | None = None,
    live: bool = False,
    secret: bool = False,
) -> Any:
    """Return a dataclass field with the rule for its JSON value; without a default it is required.

    key is the path in JSON if it is not the field's name. unique is for a value that no two objects
    of a list may share: it returns the form in which they compare. A live setting takes effect
    without a restart. A secret is left out of the repr.
    """
    return field(
        default=default,
        repr=not secret,
        metadata={"rule": rule, "key": key, "unique": unique, "live": live},
    )


NEVER = datetime.max.replace(tzinfo=UTC)
WARNING_TIME, CHECK_TIME = timedelta(days=30), timedelta(days=14)  # before a credential expires


@dataclass(frozen=True)
class Token:
    """A secret that selects a tenant: its SHA-256 as hex, and the text if the file has it."""

    name: str = setting(TEXT, "", unique=str)
    sha256: str = setting(
        text_of("[0-9A-Fa-f]{64}", "64 hexadecimal digits", convert=str.lower), ""
    )
    expires: datetime | None = setting(TIME, None)  # noqa: RUF009
    secret: str = setting(SECRET_TEXT, "", secret=True)
    secret_file: str = setting(SECRET_FILE, "")  # read with the configuration; only sha256 is kept
    access: str = setting(text_of("full|read", "full or read"), "full")  # read: no write is allowed

    @property
    def entry(self) -> str:
        # What names it in the database; no other entry of the tenant's configuration has it.
        return self.name

    def time_left(self, now: datetime) -> timedelta:
        # Return the time until it expires, negative afterwards.
        return (self.expires or NEVER) - now

    def expired(self, now: datetime) -> bool:
        return self.time_left(now) <= timedelta(0)


@dataclass(frozen=True)
class Client(Token):
    """An id and a secret; they are exchanged for access tokens, which select the tenant (OAuth)."""

    name: str = setting(
        text_of("[!-9;-~]+", "visible ASCII characters without blanks and colons"), key="id"
    )

    @property
    def entry(self) -> str:  # two entries may have one id, while a new secret replaces the old one
        return f"{self.name}:{digest(self.sha256)[:16]}"


@dataclass(frozen=True)
class Tenant:
    """A customer with users and groups of its own; each of its credentials selects it."""

    name: str = setting(
        text_of(
            "[A-Za-z0-9][A-Za-z0-9_-]{0,62}",
            "letters, digits, - and _ (it names the tenant's file)",
        ),
        unique=str.lower,
    )
    tokens: tuple[Token, ...] = setting([LIST, Token], ())
    clients: tuple[Client, ...] = setting([LIST, Client], ())
    custom_fields: tuple[CustomField, ...] = setting([LIST, CustomField], ())
    database: str = setting(DATABASE, "", secret=True)  # in place of the server's
    keep_log: int = setting(POSITIVE, KEEP_LOG, key="log.keep")
    log_bodies: bool = setting(FLAG, False, key="log.bodies")
    log_values: bool = setting(FLAG, True, key="log.values")
    max_deactivations: int = setting(POSITIVE, 0)  # in an hour; 0 is any number
    paused: bool = setting(FLAG, False)
    roles: tuple[tuple[str, str], ...] = setting(ROLES, ())

    @property
    def credentials(self) -> tuple[Token, ...]:
        return (*self.tokens, *self.clients)

    def without_secrets(self) -> Tenant:
        return replace(
            self,
            tokens=tuple(replace(token, secret="") for token in self.tokens),
            clients=tuple(replace(client, secret="") for client in self.clients),
        )


@dataclass(frozen=True)
class Config:
    """The server's configuration."""

    tenants: tuple[Tenant, ...] = setting([FULL_LIST, Tenant], live=True)
    host: str = setting(ADDRESS, "127.0.0.1", key="listen")  # which also sets the port
    port: int = setting(None, 8080, key="listen")
    data_dir: str = setting(FILE, "scim-data")
    database: str = setting(DATABASE, "", secret=True)  # in place of files in data_dir
    tls: tuple[str, str] | None = setting(  # files of the certificate and its key
        {"certificate": setting(FILE), "key": setting(FILE)}, None
    )
    trusted_proxies: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = setting(
        [LIST, NETWORK], ()
    )
    host_names: tuple[str, ...] = setting([LIST, HOST_NAME], (), live=True)
    max_connections: int = setting(POSITIVE, 512)
    max_memory: int = setting(POSITIVE, 256)  # MiB of bodies, answers and log entries in flight
    reuse_port: bool = setting(FLAG, False)  # other processes may listen on the same address
    access_log: str = setting(text_of("text|json|off", "text, json or off"), "text")
    # The metrics token is for reading /metrics from another machine.
    metrics_sha256: str = setting(
        (lambda value: TEXT[0](value) and digest(value), TEXT[1]),
        "",
        key="metrics_token",
        live=True,
    )
    keep_changes: int = setting(POSITIVE, KEEP_CHANGES, key="changes.keep", live=True)
    keep_days: int = setting(DAYS, KEEP_DAYS, key="changes.days", live=True)
    console: bool = setting(FLAG, True)
    source: str = setting(None, "document", live=True)  # its file, for error messages

    @property
    def credentials(self) -> list[tuple[Tenant, Token]]:
        return [(tenant, item) for tenant in self.tenants for item in tenant.credentials]


# The settings of each kind of object, by their paths in JSON.
SETTINGS: dict[type, dict[str, Any]] = {
    record: {
        item.metadata["key"] or item.name: item for item in fields(record) if item.metadata["rule"]
    }
    for record in (Token, Client, Tenant, Config)
} | {
    CustomField: {  # chapter 2, where it stands, has no rules
        "link_name": setting(
            text_of(
                "[A-Za-z][A-Za-z0-9_-]*",  # RFC 7643 §2.1
                "a letter, then letters, digits, - and _",
                convert=lambda name: {"link_name": name, "display_name": name},
            ),
            unique=str.lower,
        ),
        "type": setting(text_of("String|Integer|Boolean", "String, Integer or Boolean")),
        "display_name": setting(TEXT, ""),  # the link name if the file has none
    }
}


# -- The reader ------------------------------------------------------------------------


@dataclass
class ConfigReader:
    """Converts JSON values by rules and collects a problem, path first, for every mistake.

    source is the file or "document". Relative paths of files start in folder.
    """

    source: str = "document"
    folder: str = ""
    # Where each unique value stands, by the path of the list in which no other may be the same
    # ("" for the whole file), its key, and the value itself.
    paths: dict[tuple[str, str, str], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def result(self, path: str, value: Json, rule: Rule) -> Any:
        # Return a JSON value as its rule converts it, an object with settings by key as a dict;
        # ConfigError with every mistake.
        converted = (
            self._read_members(path, value, rule)
            if isinstance(rule, dict)
            else self.read(path, value, rule)
        )
        if self.problems:
            raise ConfigError(self.problems, self.source)
        return converted

    def read(self, path: str, value: Json, rule: Rule) -> Any:
        """Return a JSON value as its rule converts it, None for a wrong one."""
        if isinstance(rule, list):
            items = self.read(path, value, rule[0]) or ()
            return tuple(self.read(f"{path}[{n}]", item, rule[1]) for n, item in enumerate(items))
        if isinstance(rule, dict):
            return tuple(self._read_members(path, value, rule).values())
        if isinstance(rule, type):
            return self._read_record(path, value, rule)
        convert, expected = rule
        with suppress(AttributeError, OSError, OverflowError, TypeError, ValueError):
            if rule in (FILE, SECRET_FILE) and TEXT[0](value) and value != ":memory:":
                value = os.path.join(self.folder, value)
            if (converted := convert(value)) is not None:
                return converted
        # A wrong value near a token or client may be a secret, and is not repeated.
        excerpt = "" if re.search("token|client", path) else f", got {quoted(value)}"
        self.problems.append(f"{path and path + ': '}expected {expected}{excerpt}")
        return None

    def require_unique(self, path: str, list_path: str, key: str, value: str) -> None:
        # Report a value that stands at another path in the list already.
        if (earlier := self.paths.setdefault((list_path, key, value), path)) != path:
            self.problems.append(f"{path}: the same {key.replace('_', ' ')} as {earlier}")

    def _read_record(self, path: str, value: Json, record: type) -> Any:
        # Return an object as a dataclass, None if there is a mistake anywhere.
        values = self._read_members(path, value, SETTINGS[record])
        if issubclass(record, Token):
            sources = {"secret", "secret_file", "sha256"}
            if isinstance(value, dict) and len(sources & value.keys()) != 1:
                self.problems.append(
                    f"{path}: expected either sha256, secret or secret_file; "
                    "`python scim_server.py token` makes a secret and its sha256"
                )
            if sha256 := values.get("sha256"):
                self.require_unique(path, "", "secret", sha256)
            values.setdefault("name", path)
        return None if self.problems else record(**values)

    def _read_members(self, path: str, value: Json, settings: dict[str, Any]) -> dict[str, Any]:
        # Return an object's values by field; report unknown keys and missing ones.
        if self.read(path, value, OBJECT) is None:
            return {}
        prefix, keys = path and path + ".", dict.fromkeys(key.split(".")[0] for key in settings)
        self.problems += [
            f"{prefix}{key}: unknown key; known are {', '.join(sorted(keys))}"
            for key in sorted(value.keys() - keys.keys())
        ]
        values: dict[str, Any] = {}
        for key in keys:
            option, place = settings.get(key), prefix + key
            if not option:  # an object whose members have settings such as changes.keep
                inner = {
                    name.removeprefix(f"{key}."): settings[name]
                    for name in settings
                    if name.startswith(f"{key}.")
                }
                values |= self._read_members(place, value.get(key, {}), inner)
            elif key in value:
                converted = self.read(place, value[key], option.metadata["rule"])
                values |= (
                    converted if isinstance(converted, dict) else {option.name or key: converted}
                )
                if converted and (fold := option.metadata["unique"]):
                    self.require_unique(place, path.rpartition("[")[0], key, fold(value[key]))
            elif option.default is MISSING:
                self.problems.append(f"{place}: is missing")
        return values


# -- Whole configurations ------------------------------------------------------------------

DEMO = {
    "tenants": [
        {
            "name": "demo",
            "tokens": [{"name": "entra", "secret": "demo-secret-token"}],
            "custom_fields": [{"link_name": "badge_number", "type": "Integer"}],
        }
    ]
}


# The secrets of DEMO and of sample_config.json, which everybody can read.
PUBLISHED = {digest(f"{name}-secret-token") for name in ("demo", "acme-sample", "globex-sample")}


def is_loopback(host: str) -> bool:
    # Only programs on this machine can reach such a host.
    return host in ("localhost", "::1") or host.startswith("127.")


def check_config(config: Config, has_hook: bool = False) -> None:
    """Raise ConfigError if nobody can call a tenant, or everybody can, or settings do not fit.

    A tenant needs no credentials if a hook authenticates its callers.
    """
    problems = ["reuse_port: needs a data_dir on disk, which processes can share"] * (
        config.reuse_port and config.data_dir == ":memory:" and not config.database
    )
    problems += [
        f"tenants[{number}].tokens: is missing; a tenant needs tokens or clients"
        for number, tenant in enumerate(config.tenants)
        if not (tenant.credentials or has_hook)
    ]
    problems += [
        f"tenant {tenant.name}: everybody knows the secret of {credential.name}, and others can "
        f"reach {config.host}; `python scim_server.py token` makes a secret"
        for tenant, credential in config.credentials
        if credential.sha256 in PUBLISHED and not is_loopback(config.host)
    ]
    if problems:
        raise ConfigError(problems, config.source)


def expiry_warnings(config: Config, now: datetime) -> list[str]:
    # Return a line for each credential that expires soon; each day it is another line.
    return [
        f"warning: {credential.name} of tenant {tenant.name} expires in "
        f"{credential.time_left(now).days} day(s); `python scim_server.py token` makes another"
        for tenant, credential in config.credentials
        if timedelta(0) < credential.time_left(now) < WARNING_TIME
    ]


def parse_config(document: Json) -> Config:
    """Return the configuration that a JSON document describes; ConfigError with every mistake."""
    return cast(Config, ConfigReader().result("", document, Config))


def parse_tenant(document: Json, others: Sequence[Tenant]) -> Tenant:
    """Return the tenant that a JSON document describes; ConfigError with every mistake.

    It must share neither its name nor a secret with other tenants, but it may replace the one of
    exactly the same name.
    """
    name = document.get("name") if isinstance(document, dict) else None
    paths = {
        ("", key, value): f"tenant {other.name}"
        for other in others
        if other.name != name
        for key, value in [
            ("name", other.name.lower()),
            *(("secret", credential.sha256) for credential in other.credentials),
        ]
    }
    return cast(Tenant, ConfigReader(paths=paths).result("tenant", document, Tenant))


def load_config(path: str | os.PathLike[str]) -> Config:
    """Return the configuration in a JSON file; its relative paths start beside it. ConfigError."""
    source, folder = os.fspath(path), str(Path(path).resolve().parent)
    try:
        document = json.loads(Path(path).read_text("utf-8-sig"), object_pairs_hook=unique_names)
    except OSError as error:
        raise ConfigError([f"cannot be read ({error.strerror})"], source) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"is not valid JSON: {error}"], source) from error
    return replace(
        cast(Config, ConfigReader(source, folder).result("", document, Config)), source=source
    )


def unique_names(pairs: list[tuple[str, Json]]) -> Json:
    # Return the members of a JSON object as a dict; ValueError if two have the same name.
    members = dict(pairs)
    if len(members) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{quoted(name)} appears twice in one object")
    return members


Source = Config | Mapping[str, Json] | str | os.PathLike[str] | None


def to_config(source: Source, port: int | None = None) -> Config:
    """Return the configuration that a program names: a Config, a file, a document, or None.

    None stands for the demo tenant. A document is for a program that embeds the server: without
    its own settings, data stays in memory and the port is a free one. A port replaces that of the
    configuration. Raises ConfigError.
    """
    if source is None or isinstance(source, Mapping):
        defaults = {"listen": "127.0.0.1:0", "data_dir": ":memory:"}
        config = parse_config({**defaults, **(DEMO if source is None else source)})
    else:
        config = source if isinstance(source, Config) else load_config(source)
    return config if port is None else replace(config, port=port)


def store_location(config: Config, tenant: Tenant) -> str:
    # Return the URL of the database that has the tenant's schema, or the path of its file.
    folder, file = config.data_dir, f"{tenant.name.lower()}.sqlite3"
    path = folder if folder == ":memory:" else os.path.join(folder, file)
    return tenant.database or config.database or path


FileSignature = list[tuple[int, int]]


def file_signature(*files: str) -> FileSignature:
    """Return time and size of files, so that a change shows; [] if one is missing.

    The size tells a half-written file from the whole one, which may have the same time.
    """
    with suppress(OSError):
        return [(status.st_mtime_ns, status.st_size) for status in map(os.stat, files)]
    return []


# ----------------------------------------------------------------------------
# 12. Messages                                RFC 7644 §3.1, §3.12, RFC 9110, 9112
#
# What comes in and goes out. First as plain Python: requests, responses and calls,
# credentials, bodies, lists and errors. Then as octets of HTTP/1.1, read from a buffer and
# written.
# Uses chapters 1 to 11. Knows nothing of sockets.
# ----------------------------------------------------------------------------

RETRY = {"Retry-After": "5"}  # seconds; a tenant whose database failed is opened again meanwhile

# -- Requests, responses and calls --


class Caller(NamedTuple):
    """Whose credential a request has; with a refusal, the credential does not count."""

    tenant: Tenant
    credential: Token
    directory: Directory | StoreError  # the tenant's, or why it cannot be opened
    refusal: tuple[str, ...] = ()  # the reason, as in ScimError

    def check_write(self) -> None:
        """Raise ScimError 403 if the credential may only read, 503 if the tenant is paused."""
        if self.credential.access == "read":
            raise ScimError(
                403,
                "",
                f'{self.credential.name} has "access": "read": it may read, but not write',
                reason=("read-only", self.credential.name),
            )
        if self.tenant.paused:
            raise ScimError(
                503,
                "",
                f"tenant {self.tenant.name} is paused by its configuration; nothing is changed",
                {"Retry-After": "60"},
                ("paused",),
            )


class Request(NamedTuple):
    """A request: header names in lower case; path and query as they were in the target."""

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes | Json = b""  # Bulk passes JSON that is already parsed
    scheme: str = "http"  # with host: the URL by which the client reached this server
    host: str = "localhost"
    mount_point: str = ""  # the path that the server is mounted at
    client: str = ""  # its IP address
    id: str = "-"  # for the logs
    # None until somebody asks whose token it has; False if it is nobody's.
    caller: Caller | Literal[False] | None = None
    encoded: bool = False  # whether resources in the answer may be Encoded

    @property
    def tenant(self) -> str:
        return self.caller.tenant.name if self.caller and not self.caller.refusal else ""


class Response(NamedTuple):
    """An answer; its body stays JSON, or text such as CSV, until the edge serialises it."""

    status: int
    body: Json = None  # None is no body; another is application/scim+json unless headers say
    headers: Mapping[str, str] = MappingProxyType({})
    tenant: str = ""  # for the logs, as is the route
    route: str = ""
    reason: tuple[str, ...] = ()  # of an error, for the provisioning log


@dataclass(slots=True)
class Call:
    """A request with its route; admission and the operation fill in the other fields."""

    request: Request
    route: Route
    id: str = ""  # the last segment of the path, where the route has {id}
    caller: Caller | None = None
    directory: Directory = field(init=False)  # set when the token was accepted
    parameters: Mapping[str, str] = field(default_factory=dict)  # names in lower case
    body: Json = None  # the parsed JSON, kept for the provisioning log
    operations: Sequence[Operation] = ()  # of a PATCH

    @property
    def resource_types(self) -> tuple[ResourceType, ...]:
        types, name = self.directory.resource_types, self.route.type
        return (types[name],) if name else tuple(types.values())

    @property
    def base_url(self) -> str:
        return f"{self.request.scheme}://{self.request.host}{self.request.mount_point}{BASE_PATH}"

    @property
    def condition(self) -> Precondition:
        return Precondition(
            self.request.headers.get("if-match", ""), self.request.headers.get("if-none-match", "")
        )

    def json(self) -> Json:
        # Return the JSON of the body; ScimError 400 invalidSyntax.
        self.body = parse_body(self.request)
        return self.body

    def selection(self, resource_type: ResourceType) -> Selection:
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
        # Return an integer parameter, moved into its bounds; ScimError 400 for other text.
        text = self.parameters.get(name.lower()) or str(default)
        if not re.fullmatch(r"[+-]?\d{1,40}", text.strip(), re.ASCII):
            raise ScimError(400, scim_type, f"{name}: expected an integer, got {quoted(text)}")
        return max(least, min(int(text), most))

    def text(self, name: str) -> str:
        # Return a parameter that a database takes; ScimError 400.
        if UNSTORABLE.search(text := self.parameters.get(name.lower(), "").strip()):
            raise invalid_value(f"{name}: no text has a NUL")
        return text

    def choice(self, name: str, *choices: str) -> str:
        # Return a parameter that is one of some words, by default the first; ScimError 400.
        text = self.parameters.get(name.lower(), "").strip() or choices[0]
        words = {word.lower(): word for word in choices}
        if text.lower() not in words:
            raise invalid_value(
                f"{name}: expected {' or '.join(filter(None, words))}, got {quoted(text)}"
            )
        return words[text.lower()]

    def projected(self, resource: Resource | Encoded) -> Json:
        if isinstance(resource, Encoded):
            return resource
        resource_type = self.directory.resource_types[resource["meta"]["resourceType"]]
        return project(resource_type, resource, self.selection(resource_type), self.base_url)

    def answer(self, resource: Resource, status: int = 200) -> Response:
        url = self.resource_types[0].location(self.base_url, resource["id"])
        return Response(
            status,
            self.projected(resource),
            {"ETag": resource["meta"]["version"], "Location": url, "Content-Location": url},
        )


class Usage:
    """What requests in flight take of this process: connections, and octets, by tenant.

    Octets are those of bodies, of answers and of log entries that wait. A tenant may take half of
    all connections and half of all octets; "" stands for those without a token. Safe from several
    threads.
    """

    def __init__(self, max_connections: int, max_octets: int) -> None:
        self.max_connections, self.max_octets = max(max_connections // 2, 1), max_octets
        self._connections, self._octets = Counter[str](), Counter[str]()
        self._total, self._lock = 0, threading.Lock()
        self._crowded = dict[str, bool]()  # tenants of which a request was refused

    def take(self, *changes: tuple[str, int, int]) -> None:
        # Note that tenants take so many connections and octets more, or fewer if negative.
        with self._lock:
            for tenant, connections, octets in changes:
                self._connections[tenant] += connections
                self._octets[tenant] += octets
                self._total += octets

    def check_connections(self, tenant: str) -> None:
        # Raise ScimError 429 if a tenant can have no more connections with requests in flight.
        if tenant and self._connections[tenant] >= self.max_connections:
            self._crowded[tenant] = True
            raise ScimError(
                429,
                "",
                f"{self.max_connections} requests of this tenant are in flight already; "
                "that is half of max_connections",
                RETRY,
            )

    def check_memory(self, tenant: str) -> None:
        # Raise ScimError 503 if a tenant, or all of them, take more memory than they may.
        if self._total > self.max_octets or self._octets[tenant] > self.max_octets // 2:
            raise ScimError(503, "", "too much is in flight now for max_memory; try again", RETRY)

    def may_wait(self, tenant: str) -> bool:
        # Return whether a long poll may go on: one ends for each refused request of its tenant.
        return not self._crowded.pop(tenant, False)


Operate = Callable[[Call], Response]


@dataclass(frozen=True, eq=False)
class Route:
    label: str  # the path for the logs, "" for a path that does not exist
    access: str  # one of the constants of chapter 16
    type: str = ""  # the resource type at this path, "" for all of them
    # By method: the lane and the operation.
    operations: dict[str, tuple[str, Operate]] = field(default_factory=dict)

    @property
    def allow(self) -> dict[str, str]:
        # The header field Allow; HEAD and OPTIONS come after the methods of the table.
        return {"Allow": ", ".join(sorted(self.operations, key="HEAD OPTIONS".find))}


# -- Credentials: bearer tokens (RFC 6750), and clients that ask for them (RFC 6749) --

TOKEN_PATH, FORM = "/oauth2/token", "application/x-www-form-urlencoded"
# What people paste with a secret, by the words of the log for it. UTF-8 arrives as Latin-1.
PASTED = {
    "the word Bearer": r"bearer(?:[:\s]|%20)+",
    "another scheme": r"\A[\w-]+ +",
    "quotes": r"[\"'`\xab\xbb\u2018-\u201f]|\xe2\x80[\x98-\x9f]|%2[27]",
    "a line break": r"[\r\n]|\\[rn]|%0[ad]",
    "blanks": r"[^\S\r\n]|\xc2\xa0|\xe2\x80\x8b|\u200b|%20",
}
invalid_client = partial(
    ScimError, 401, "invalid_client", headers={"WWW-Authenticate": 'Basic realm="scim"'}
)


def token_url(base_url: str) -> str:
    return base_url.removesuffix(BASE_PATH) + TOKEN_PATH


def is_same(text: str, secret: str) -> bool:
    # The time of this does not show where the two differ.
    return hmac.compare_digest(text.encode(), secret.encode())


def sealed(key: bytes, content: str, context: str = "") -> str:
    # Return a text for a URL or a header, with a signature that covers a context too; decoded()
    # returns the text.
    octets = content.encode()
    mac = hmac.digest(key, context.encode() + octets, "sha256")[:SIGNATURE_LENGTH]
    return base64.urlsafe_b64encode(mac + octets).decode().rstrip("=")


def access_token(tenant: Tenant, client: Token, directory: Directory, end: str) -> str:
    # Return an access token until a time in seconds. Only the database and the configuration
    # together have its key, which changes with the client's entry.
    entry = "access token", client.name, client.sha256, str(client.expires), client.access
    key = hmac.digest(directory.cursor_key, to_json(entry).encode(), "sha256")
    return sealed(key, f"{end} {tenant.name} {client.entry}")


def decoded(text: str, start: int = 0) -> str:
    # Return what base64 stands for, in the alphabet for URLs too, from an octet on; "" if it is
    # malformed. A sealed text is only to be trusted if sealed() makes it again of its content.
    with suppress(ValueError):
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)[
            start:
        ].decode()
    return ""


def credentials_of(request: Request) -> tuple[str, str]:
    # Return the scheme and the secret of a request's Authorization, "" for a missing part.
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return scheme.lower(), secret


def readings(text: str, scheme: str = "") -> Iterator[tuple[str, str]]:
    # Yield what may be meant by a secret after a scheme, and the mistake of who pasted it. First
    # comes the secret as it is, without a mistake; then without what does not belong to it.
    yield (rest := text[len(scheme) :] if text.lower().startswith(scheme) else ""), ""
    pasted = (rest or text)[:1_000]
    words = [word for word, pattern in PASTED.items() if re.search(pattern, pasted, re.IGNORECASE)]
    yield (
        re.sub("|".join(PASTED.values()), "", pasted, flags=re.IGNORECASE),
        f"with {' and '.join(words)}" if words else "without the word Bearer",
    )


def unauthorized(request: Request, caller: Caller | None = None) -> ScimError:
    # Return the one answer to every problem with a bearer token; its reason is for the logs.
    authorization = request.headers.get("authorization", "")
    word = "unknown" if re.match("bearer .", authorization, re.IGNORECASE) else "malformed"
    return ScimError(
        401,
        "",
        "the bearer token is missing, unknown or expired; check the Secret Token of the "
        "enterprise application",
        {
            "WWW-Authenticate": 'Bearer realm="scim"'  # RFC 6750 §3.1
            + ', error="invalid_token"' * bool(authorization)
        },
        caller.refusal if caller else (word if authorization else "missing",),
    )


def token_request(request: Request) -> dict[str, str]:
    """Return the fields of a request for an access token, those in Authorization included.

    RFC 6749 §2.3.1: a client has its id and secret in Authorization, in the form, or in both if
    they agree. ScimError 400 invalid_request or 401 invalid_client.
    """
    scheme, encoded = credentials_of(request)
    form = dict(pairs := parse_qsl(request.body.decode(errors="replace")))
    basic = decoded(encoded.strip()).partition(":")[::2] if scheme == "basic" else ()
    header = dict(zip(("client_id", "client_secret"), map(unquote, basic), strict=False))
    type = request.headers.get("content-type", FORM).partition(";")[0].strip().lower()
    if type != FORM or len(form) < len(pairs):
        raise ScimError(400, "", f"expected a form ({FORM}) that has each field once")
    if not all(is_same(form.get(name, header[name]), header[name]) for name in header):
        raise ScimError(
            400,
            "",
            "client_id and client_secret are not the same in Authorization and in the form; "
            "choose one way to send them",
        )
    form |= header
    if not form.get("client_id") or not form.get("client_secret"):
        raise invalid_client(
            "client_id and client_secret are needed, in the form or as Authorization: Basic; "
            "enter Client Identifier and Client Secret in Entra ID",
            reason=("missing",),
        )
    return form


# -- Bodies --


def parse_body(request: Request) -> Json:
    """Return the JSON of a body; ScimError 400 invalidSyntax says where it is wrong."""
    if not isinstance(body := request.body, bytes):
        return body
    # A text may hold brackets too, but no client sends so many of them.
    if (brackets := body.count(b"{") + body.count(b"[")) > MAX_CONTAINERS:
        raise ScimError(413, "", f"the body has more than {MAX_CONTAINERS} objects and lists")
    try:
        value = json.loads(
            body.decode("utf-8-sig"),
            parse_constant=not_json,
            parse_float=finite,
            object_pairs_hook=unique_names,
        )
        # Only a body with escapes or many brackets can hold what the walk is for.
        if b"\\u" in body or brackets > MAX_DEPTH:
            check_texts(value)
        return value
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid_syntax(f"the body is not JSON: {why}", reason=("body", why)) from None


def check_texts(value: Json, path: str = "", depth: int = 0) -> None:
    # Raise ValueError for JSON that is too deep, or has text that databases refuse.
    if depth > MAX_DEPTH:
        raise ValueError(f"{path[:80]}: nested deeper than {MAX_DEPTH}")
    match value:
        case str() if UNSTORABLE.search(value):
            raise ValueError(f"{path or 'it'}: text with NUL or half a surrogate pair")
        case dict():
            for name, item in value.items():
                check_texts(name, path, depth)
                check_texts(item, f"{path}.{name}" if path else name, depth + 1)
        case list():
            for number, item in enumerate(value):
                check_texts(item, f"{path}[{number}]", depth + 1)


def not_json(word: str) -> Json:
    # Refuse NaN and Infinity, which json.loads accepts and RFC 8259 does not allow.
    raise ValueError(word)


def finite(text: str) -> float:
    # Return a JSON number; ValueError for one like 1e999, which Python reads as Infinity.
    return float(text) if float("-inf") < float(text) < float("inf") else not_json(quoted(text))


# -- Answers: lists and errors --


def list_response(resources: Iterable[Json], total: int, **more: Json) -> Response:
    # Return a ListResponse (RFC 7644 §3.4.2); itemsPerPage counts the resources in it.
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


def plain_response(body: Json, type: str = "application/json", **headers: str) -> Response:
    return Response(200, body, {"Content-Type": type, **headers})


warn_once = lru_cache(10_000)(LOG.warning)


def error_response(error: Exception, path: str = "") -> Response:
    """Return the answer to a request that failed; log an error that the client did not cause.

    It is a SCIM error, or at the path of access tokens an error of RFC 6749 §5.2.
    """
    if not isinstance(error, ScimError):
        with suppress(Exception):  # a handler that fails must not stop the answer
            LOG.error("a request failed", exc_info=error)
        error = (
            ScimError(
                error.status,
                "",
                f"the tenant's database failed: {error.reason}; {error.effect}",
                RETRY,
            )
            if isinstance(error, StoreError)
            else ScimError(500, "", "the server failed; its log says why")
        )
    if path == TOKEN_PATH:
        codes = {401: "invalid_client", 500: "server_error", 503: "server_error"}
        return plain_response(
            {
                "error": error.scim_type or codes.get(error.status, "invalid_request"),
                "error_description": re.sub(r"[^ !#-\[\]-~]", "'", error.detail),
            },
            **error.headers,
        )._replace(status=error.status, reason=error.reason)
    return Response(error.status, error.body(), error.headers, reason=error.reason)


# -- HTTP/1.1: generators that read a buffer (sans-IO) --
#
# The parser of http.server accepts what two readers could frame in two ways; this one does not. A
# reader takes octets from the front of a buffer that somebody else fills, and returns a value. It
# yields False while octets are missing, and True when it only lets other connections have a turn.

MAX_REQUEST_LINE, MAX_CHUNK_LINE = 8 * 1024, 1024  # octets
MAX_HEAD, MAX_FIELDS = 32 * 1024, 100  # octets of the header fields, their number
CHUNKS_PER_ROUND = 64  # of a body, before the other connections have their turn
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/(\d)\.(\d)\r\n")
FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
AUTHORITY = re.compile(r"[A-Za-z0-9._~%!$&'()*+,;=-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")
LENGTH = re.compile(r"\d{1,19}", re.ASCII)
REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
Reading = Generator[bool, None, bytes]


def read_exactly(buffer: bytearray, length: int) -> Reading:
    while len(buffer) < length:
        yield False
    octets = bytes(buffer[:length])
    del buffer[:length]
    return octets


def read_until(buffer: bytearray, mark: bytes, limit: int, status: int, detail: str) -> Reading:
    # Read up to a mark and including it; ScimError of that status beyond limit octets.
    while (end := buffer.find(mark, 0, limit)) < 0:
        if len(buffer) > limit:
            raise ScimError(status, "", detail)
        yield False
    return (yield from read_exactly(buffer, end + len(mark)))


def read_request_line(buffer: bytearray) -> Reading:
    # Read the line that begins a request (RFC 9112 §3); ScimError 414.
    while len(buffer) < 2:
        yield False
    if buffer.startswith(b"\x16\x03"):  # a TLS handshake (RFC 8446 §5.1)
        warn_once("a client sent TLS to a port for http; configure tls, or use http:// there")
        raise ScimError(400, "", "this port is for http://, not for https://")
    limits = (MAX_REQUEST_LINE, 414, f"the request line is longer than {MAX_REQUEST_LINE} octets")
    line = yield from read_until(buffer, b"\n", *limits)
    if line == b"\r\n":  # RFC 9112 §2.2: one empty line before a request is ignored
        line = yield from read_until(buffer, b"\n", *limits)
    return line


def read_fields(buffer: bytearray, status: int) -> Generator[bool, None, dict[str, str]]:
    """Read the header fields or trailers after a line (RFC 9112 §5), by names in lower case.

    ScimError 400 for a malformed field; ScimError of that status for too many or too long ones.
    """
    # The end of the line before goes back, so that a head without fields ends like the others.
    buffer[:0] = b"\r\n"
    octets = yield from read_until(
        buffer, b"\r\n\r\n", MAX_HEAD, status, f"the header fields take more than {MAX_HEAD} octets"
    )
    lines = octets.split(b"\r\n")[1:-2]
    headers: dict[str, str] = {}
    for field_line in map(FIELD_LINE.fullmatch, lines):
        if not field_line:
            raise ScimError(400, "", "a header field is malformed")
        name = field_line[1].decode().lower()
        value = field_line[2].rstrip(b" \t").decode("latin-1")
        # check_framing() refuses two values of the fields that may have only one.
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if len(lines) > MAX_FIELDS:
        raise ScimError(status, "", f"there are more than {MAX_FIELDS} header fields")
    return headers


def read_head(buffer: bytearray, line: bytes) -> Generator[bool, None, Request]:
    # Read the head of a request after its first line (RFC 9112 §5); ScimError 400, 431 or 505.
    if not (start := REQUEST_LINE.fullmatch(line)):
        raise ScimError(400, "", "the request line is malformed")
    if start[3] != b"1":
        raise ScimError(505, "", "this server speaks HTTP/1.1")
    headers = yield from read_fields(buffer, 431)
    check_framing(headers, int(start[4]))
    if start[4] == b"0":  # no 100 Continue; one side alone cannot keep the connection
        is_kept = "keep-alive" in headers.get("connection", "").lower()
        headers |= {"expect": "", "connection": "keep-alive" if is_kept else "close"}
    host, target = host_and_target(start[2].decode(), headers.get("host") or "localhost")
    path, _, query = target.partition("?")
    return Request(start[1].decode(), path, query, headers, host=host)


def check_framing(headers: Mapping[str, str], minor_version: int) -> None:
    """Raise ScimError 400 for a head whose framing is ambiguous: request smuggling, RFC 9112 §6."""
    host, length, coding = map(headers.get, ("host", "content-length", "transfer-encoding"))
    for is_valid, detail in (
        (
            AUTHORITY.fullmatch(host) if host else host == "" or minor_version == 0,
            "host: expected one host name or address with an optional port",
        ),
        (length is None or LENGTH.fullmatch(length), "content-length: expected a number"),
        (
            coding is None or (length is None and minor_version > 0),
            "transfer-encoding: not with content-length or HTTP/1.0",
        ),
        (
            coding is None or coding.lower() == "chunked",
            "transfer-encoding: expected chunked alone",
        ),
    ):
        if not is_valid:
            raise ScimError(400, "", detail)


def too_large(limit: int) -> ScimError:
    return ScimError(413, "", f"the body is larger than {limit} octets")


def read_chunks(buffer: bytearray, limit: int) -> Reading:
    """Read a chunked body (RFC 9112 §7.1), ignoring extensions and trailers; ScimError 400, 413."""
    detail = "the chunked body is malformed"
    body, chunks = bytearray(), 0
    while line := CHUNK_LINE.fullmatch(
        (yield from read_until(buffer, b"\n", MAX_CHUNK_LINE, 400, detail))
    ):
        if not (size := int(line[1], 16)):
            yield from read_fields(buffer, 400)  # the trailers
            return bytes(body)
        if len(body) + size > limit:
            raise too_large(limit)
        body += yield from read_exactly(buffer, size)
        if (yield from read_exactly(buffer, 2)) != b"\r\n":
            break
        chunks += 1
        if chunks % CHUNKS_PER_ROUND == 0:
            yield True
    raise ScimError(400, "", detail)


def host_and_target(target: str, host: str) -> tuple[str, str]:
    # Return host and path with query of a target, maybe a whole URL (RFC 9112 §3.2); ScimError.
    if target.startswith("/") or target == "*":
        return host, target
    if not (parts := re.fullmatch(r"(?i:https?)://([^/?]+)(.*)", target)) or (
        not AUTHORITY.fullmatch(parts[1])
    ):
        raise ScimError(400, "", "the request target is neither a path nor a URL")
    return parts[1], parts[2] if parts[2].startswith("/") else f"/{parts[2]}"


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    # Return proto, host and for as the nearest proxy gives them (RFC 7239, else X-Forwarded-*).
    fields = {
        name.strip().lower(): value.strip(' "')
        for pair in headers.get("forwarded", "").rpartition(",")[2].split(";")
        for name, _, value in [pair.partition("=")]
    }
    return {
        name: fields.get(name) or headers.get(f"x-forwarded-{name}", "").rpartition(",")[2].strip()
        for name in ("proto", "host", "for")
    }


# -- Answers as octets --


def body_text(body: Json) -> str:
    # Return the text of an answer's body; Encoded resources of a list are JSON text already.
    if not isinstance(body, dict) or "Resources" not in body:
        return body if isinstance(body, str) else to_json(body)
    texts = (item if isinstance(item, Encoded) else to_json(item) for item in body["Resources"])
    return f"{to_json({**body, 'Resources': []})[:-2]}{','.join(texts)}]}}"


def to_http(response: Response, request: Request) -> tuple[str, list[tuple[str, str]], bytes]:
    """Return the status, the header fields and the body of an answer."""
    body = b"" if response.body is None else body_text(response.body).encode()
    # Nearly every answer is about people: no cache keeps one, and no browser guesses its type.
    fields = {
        "X-Request-Id": request.id,
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        **({} if response.body is None else {"Content-Type": "application/scim+json"}),
        # RFC 9110 §8.6: no length in a 204, no length 0 in a 304
        **({} if response.status in (204, 304) else {"Content-Length": str(len(body))}),
        **response.headers,
    }
    return (
        f"{response.status} {http.client.responses.get(response.status, 'Other')}",
        # Names ignore case: a header of the answer replaces one of ours.
        list({name.lower(): (name, value) for name, value in fields.items()}.values()),
        b"" if request.method == "HEAD" else body,
    )


# ----------------------------------------------------------------------------
# 13. SCIM endpoints                                           RFC 7644 §3, §4
#
# Each operation takes a Call and returns a Response: discovery, resources, queries,
# cursors, .search and Bulk.
# Uses chapters 1 to 12. Knows nothing of sockets.
# ----------------------------------------------------------------------------

# -- Discovery -------------------------------------------------------------------


def attribute_document(attribute: Attribute) -> Json:
    """Return an attribute as RFC 7643 §7 describes it, without what does not apply."""
    document = {
        "name": attribute.name,
        "type": attribute.type,
        "multiValued": attribute.multi_valued,
        "required": attribute.required,
        "mutability": attribute.mutability,
        "returned": attribute.returned,
        "caseExact": attribute.case_exact if attribute.type in (*STRING_TYPES, "binary") else None,
        "uniqueness": attribute.uniqueness if attribute.type != "complex" else None,
        "description": attribute.description or attribute.name,
        "canonicalValues": list(attribute.canonical_values) or None,
        "referenceTypes": list(attribute.reference_types) or None,
        "subAttributes": [
            attribute_document(sub) for sub in attribute.sub_attributes if sub.published
        ]
        or None,
    }
    return {name: value for name, value in document.items() if value is not None}


def schema_documents(directory: Directory, base_url: str) -> dict[str, Json]:
    # Entra's validator wants externalId in a core schema, though RFC 7643 has it in none.
    return {
        schema.id: {
            "schemas": ["urn:ietf:params:scim:schemas:core:2.0:Schema"],
            "id": schema.id,
            "name": schema.name,
            "description": schema.description,
            "attributes": [
                attribute_document(attribute)
                for attribute in (*added, *schema.attributes)
                if attribute.published
            ],
            "meta": {"resourceType": "Schema", "location": f"{base_url}/Schemas/{schema.id}"},
        }
        for resource_type in directory.resource_types.values()
        for schema, added in (
            (resource_type.schema, (EXTERNAL_ID,)),
            *((extension, ()) for extension in resource_type.extensions),
        )
        if schema.attributes
    }


def resource_type_documents(directory: Directory, base_url: str) -> dict[str, Json]:
    return {
        name: {
            "schemas": ["urn:ietf:params:scim:schemas:core:2.0:ResourceType"],
            "id": name,
            "name": name,
            "description": resource_type.schema.description,
            "endpoint": resource_type.endpoint,
            "schema": resource_type.schema.id,
            "schemaExtensions": [
                {"schema": extension.id, "required": False}
                for extension in resource_type.extensions
                if extension.attributes
            ],
            "meta": {
                "resourceType": "ResourceType",
                "location": f"{base_url}/ResourceTypes/{name}",
            },
        }
        for name, resource_type in directory.resource_types.items()
    }


AUTHENTICATION_SCHEMES = (
    ("oauthbearertoken", "Bearer token", "The tenant's secret as Authorization: Bearer", "rfc6750"),
    ("oauth2", "Client credentials", "A client's access token from {}", "rfc6749"),
)


def config_document(directory: Directory, base_url: str) -> dict[str, Json]:
    """Return the service provider configuration (RFC 7643 §5), the one document without an id."""
    return {
        "": {
            "schemas": ["urn:ietf:params:scim:schemas:core:2.0:ServiceProviderConfig"],
            "patch": {"supported": True},
            # authentik reads a missing maxOperations as "no PATCH and no filter".
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
                    "type": type,
                    "name": name,
                    "primary": type == "oauthbearertoken",
                    "description": description.format(token_url(base_url)),
                    "specUri": f"https://www.rfc-editor.org/rfc/{rfc}",
                }
                for type, name, description, rfc in AUTHENTICATION_SCHEMES
            ],
            "meta": {
                "resourceType": "ServiceProviderConfig",
                "location": f"{base_url}/ServiceProviderConfig",
            },
        }
    }


DOCUMENTS = {
    "ServiceProviderConfig": config_document,
    "Schemas": schema_documents,
    "ResourceTypes": resource_type_documents,
}


def get_documents(call: Call) -> Response:
    # Answer GET of a discovery endpoint: all documents, or one; sorting and paging are ignored.
    if "filter" in call.parameters:  # RFC 7644 §4
        raise ScimError(403, "", "filter: discovery endpoints take no filter")
    documents = DOCUMENTS[call.route.label.split("/")[1]](call.directory, call.base_url)
    if document := {name.lower(): item for name, item in documents.items()}.get(call.id.lower()):
        return Response(200, document)
    if not call.id:
        return list_response(documents.values(), len(documents), startIndex=1)
    raise ScimError(404, "", f"{quoted(call.id)} does not exist; there are {', '.join(documents)}")


# -- Resources -------------------------------------------------------------------


def create_resource(call: Call) -> Response:
    return call.answer(call.directory.create(call.route.type, call.json()), 201)


def get_resource(call: Call) -> Response:
    resource_type, condition = call.resource_types[0], call.condition
    resource = call.directory.get(resource_type, call.id, call.selection(resource_type))
    version = resource["meta"]["version"]
    condition._replace(if_none_match="").check(version)
    response = call.answer(resource)
    return response._replace(status=304, body=None) if condition.excludes(version) else response


def replace_resource(call: Call) -> Response:
    return call.answer(
        call.directory.replace(call.route.type, call.id, call.json(), call.condition)
    )


def patch_resource(call: Call) -> Response:
    (resource_type,) = call.resource_types
    call.operations = parse_operations(resource_type, call.json())
    resource = call.directory.patch(
        resource_type, call.id, call.operations, call.condition, call.selection(resource_type)
    )
    return call.answer(resource) if resource else Response(204)  # a group with many members


def delete_resource(call: Call) -> Response:
    call.directory.delete(call.route.type, call.id, call.condition)
    return Response(204)


def refuse_me(call: Call) -> Response:  # RFC 7644 §3.11
    raise ScimError(501, "", "/Me: a bearer token stands for a tenant, not for a person")


# -- Queries and cursors ---------------------------------------------------------


def list_resources(call: Call) -> Response:
    # Answer GET /Users, GET /Groups and GET /: filter, sort and page (RFC 7644 §3.4.2), by index or
    # by cursor (RFC 9865). An empty cursor gives the first page.
    text = call.parameters.get("filter")
    queries = {
        resource_type.name: (
            EVERYTHING if text is None else parse_filter(text, resource_type),
            call.selection(resource_type),
        )
        for resource_type in call.resource_types
    }
    if (cursor := call.parameters.get("cursor")) is not None and "startindex" in call.parameters:
        raise invalid_value("startIndex: not together with cursor")
    total, after, backward = read_cursor(call, cursor) if cursor else (0, None, False)
    start_index = call.integer("startIndex", 1, 1)
    error = "invalidValue" if cursor is None else "invalidCount"
    count = call.integer("count", DEFAULT_COUNT, 0, MAX_COUNT, error)
    window = Window(count, start_index - 1, after, backward, MAX_PAGE)
    page = call.directory.search(
        queries,
        parse_sorting(call),
        window,
        call.base_url if call.request.encoded else "",
    )
    total = total if page.total_results is None else page.total_results
    place = (
        {"startIndex": start_index} if cursor is None else page_cursors(call, total, window, page)
    )
    return list_response(map(call.projected, page.resources), total, **place)


def search_resources(call: Call) -> Response:
    """Answer POST /.search, /Users/.search and /Groups/.search (RFC 7644 §3.4.3)."""
    parameters = {}
    for name, value in lowercase_keys(call.json()).items():
        texts = [
            text for text in (value if isinstance(value, list) else [value]) if text is not None
        ]
        if not all(isinstance(text, (str, int)) for text in texts) or (
            name != "filter" and len(",".join(map(str, texts))) > MAX_FILTER_LENGTH
        ):
            raise invalid_value(
                f"{name}: expected text, an integer or names, of at most {MAX_FILTER_LENGTH} "
                f"characters, got {quoted(value)}"
            )
        if texts:
            parameters[name] = ",".join(map(str, texts))
    call.parameters = parameters
    return list_resources(call)


def parse_sorting(call: Call) -> Sorting | None:
    # Return how to sort; an unknown attribute is ignored (RFC 7644 §3.4.2.3).
    descending = call.choice("sortOrder", "ascending", "descending") == "descending"
    name = call.parameters.get("sortby", "").strip()
    target = next(filter(None, (resolve(name, type) for type in call.resource_types if name)), None)
    if target and (value_attribute := target[-1].value_attribute):
        target = (*target, value_attribute)
    if target and target[-1].computed:
        raise invalid_value(f"sortBy: {name} is computed for each answer; it cannot sort")
    # A complex attribute without a value has no order either.
    return Sorting(target, descending) if target and target[-1].type != "complex" else None


def page_cursors(call: Call, total: int, window: Window, page: Page) -> dict[str, str]:
    # Return the cursors of the next and the previous page. A cursor holds all that its page needs,
    # and a signature: the server keeps nothing, and one of another tenant or query is refused.
    # There is always a page in the direction that we came from; in the other, page.more tells.
    issued, backward = int(call.directory.clock().timestamp()), window.backward
    return {
        name: sealed_cursor(call, to_json([total, name == "previousCursor", issued, *position]))
        for name, position in (
            ("nextCursor", page.last if backward or page.more else None),
            ("previousCursor", page.first if (page.more if backward else window.after) else None),
        )
        if position
    }


def read_cursor(call: Call, text: str) -> tuple[int, Position, bool]:
    """Return the total, position and direction of a cursor; ScimError 400 if it is not usable."""
    content = decoded(text, SIGNATURE_LENGTH)
    if not content or not is_same(text, sealed_cursor(call, content)):
        raise ScimError(
            400,
            "invalidCursor",
            "cursor: not issued by this server for this filter and sort; start again with an "
            "empty cursor",
        )
    total, backward, issued, *position = json.loads(content)
    if call.directory.clock().timestamp() > issued + CURSOR_SECONDS:
        raise ScimError(
            400,
            "expiredCursor",
            f"cursor: older than {CURSOR_SECONDS} seconds; start again with an empty cursor",
        )
    return total, Position(*position), backward


def sealed_cursor(call: Call, content: str) -> str:
    # What is the same for all pages of one query is signed too.
    query = (
        [type.name for type in call.resource_types],
        [call.parameters.get(name, "") for name in ("filter", "sortby", "sortorder")],
    )
    return sealed(call.directory.cursor_key, content, to_json(query))


# -- Bulk ------------------------------------------------------------------------

# "bulkId:x" stands for the id of what the POST with the bulkId x creates (RFC 7644 §3.7.2).
BULK_ID = re.compile(r"\AbulkId:(\S+)\Z")
MAX_CYCLE = 128 * 1024  # characters of operations that need each other, and share a transaction
SECONDS_PER_COMMIT = 1  # after which a Bulk commits, so that other writers have their turn
IdOf = Callable[[str], str | None]  # the id for a bulkId, or None
Performed = tuple[Call, Response, float]  # a call, its answer, and how many seconds it took


class BulkOperation(NamedTuple):
    method: str
    endpoint: str
    type: ResourceType  # of the endpoint; an unknown one is refused later
    id: str  # the rest of the path, "" for none
    bulk_id: str
    version: str
    content: Json  # its data
    references: set[str]  # the bulkIds that id and content refer to

    def target(self, id_of: IdOf) -> str:
        # Return the id in the path; for a bulkId the id that it stands for, if there is one.
        return BULK_ID.sub(lambda reference: id_of(reference[1]) or self.id, self.id)

    def body(self, id_of: IdOf) -> Json:
        return (
            patch_with_ids(self.content, self.type, id_of)
            if self.method == "PATCH"
            else with_ids(self.content, self.type.root, id_of)
        )


def parse_bulk_operation(item: Json, types: Mapping[str, ResourceType]) -> BulkOperation:
    """Return an operation of a bulk request; ScimError 400 invalidSyntax."""
    members = lowercase_keys(item, "Operations: expected objects")
    texts = {name: members.get(name.lower()) for name in ("method", "path", "bulkId", "version")}
    for name, value in texts.items():
        if not isinstance(value, (str, type(None))):
            raise invalid_syntax(f"Operations: {name} must be text, got {quoted(value)}")
    method, path, bulk_id, version = (value or "" for value in texts.values())
    endpoint, _, id = path.strip("/").partition("/")
    operation = BulkOperation(
        method.upper(),
        endpoint,
        types.get(endpoint.removesuffix("s")) or types["User"],
        id,
        bulk_id,
        version,
        members.get("data"),
        set(),
    )
    # Most operations refer to nothing, and need no walk through their content.
    if "bulkId:" in to_json([id, operation.content]):
        operation.target(operation.references.add)
        operation.body(operation.references.add)
    return operation


def holds_id(attribute: Attribute) -> bool:
    # Return whether text in an attribute refers to a resource: it is a manager or a member.
    text = attribute.value_attribute or attribute
    return text.name == "$ref" or (
        text.name == "value" and text.type == "string" and text.case_exact
    )


def with_ids(value: Json, attribute: Attribute, id_of: IdOf) -> Json:
    """Return an attribute's value with ids in place of bulkIds; one without id is left out."""
    match value:
        case str() if holds_id(attribute) and (reference := BULK_ID.match(value)):
            return id_of(reference[1])
        case list():
            return [
                new
                for item in value
                if (new := with_ids(item, attribute, id_of)) is not None or item is None
            ]
        case dict():
            members = {
                name: with_ids(item, sub, id_of)
                if (sub := attribute.by_name.get(name.lower()))
                else item
                for name, item in value.items()
            }
            lost = list(members.values()).count(None) > list(value.values()).count(None)
            return None if lost and holds_id(attribute) else members
    return value


def patch_with_ids(body: Json, resource_type: ResourceType, id_of: IdOf) -> Json:
    """Return the body of a PATCH, or a part of it, with ids in place of bulkIds."""
    if not isinstance(body, dict):
        return (
            [patch_with_ids(item, resource_type, id_of) for item in body]
            if isinstance(body, list)
            else body
        )
    members = lowercase_keys(body)
    path, value = members.get("path"), members.get("value")
    if "operations" in members:
        members["operations"] = patch_with_ids(members["operations"], resource_type, id_of)
    elif path and isinstance(path, str):
        members["path"], value = path_with_ids(path, value, resource_type, id_of)
    elif isinstance(value, dict):
        value = dict(path_with_ids(*pair, resource_type, id_of) for pair in value.items())
    return members | ({"value": value} if "value" in members else {})


def path_with_ids(
    path: str, value: Json, resource_type: ResourceType, id_of: IdOf
) -> tuple[str, Json]:
    # Return a path of a PATCH and the value for it, with ids in place of bulkIds in both.
    name = re.sub(r"(?s)\[.*\]", "", path[:MAX_FILTER_LENGTH]).strip()
    attributes = resolve(name, resource_type) or (resource_type.root,)
    if any(map(holds_id, attributes)):
        path = re.sub(
            r'((?i:value\s+eq\s+"))bulkId:([^\s"]+)(?=")',  # in the brackets
            lambda term: f"{term[1]}{id_of(term[2])}",
            path,
        )
    return path, with_ids(value, attributes[-1], id_of)


def order_of(needs: Sequence[set[int]]) -> Iterator[list[int]]:
    """Yield operations in their order, but each after those it needs.

    needs has the numbers of these for each operation. Operations that need each other are yielded
    together, at the place of the last of them.
    """
    # Bit n of reach[m] says that operation m needs operation n, perhaps by way of others.
    reach = [sum(1 << other for other in {number, *needed}) for number, needed in enumerate(needs)]
    for middle in filter(needs.__getitem__, set().union(*needs)):
        reach = [bits | reach[middle] if bits >> middle & 1 else bits for bits in reach]
    cycles: dict[int, list[int]] = {}  # by what they reach; mostly of a single operation
    for number, bits in enumerate(reach):
        cycles.setdefault(bits, []).append(number)
    done, waiting = 0, sorted(cycles, key=lambda bits: cycles[bits][-1])
    while waiting:
        # A cycle is ready if what it reaches is done, except the cycle itself.
        ready = next(at for at in waiting if (at & ~done).bit_count() == len(cycles[at]))
        waiting.remove(ready)
        yield cycles[ready]
        done |= ready


class Bulk:
    """The state of a bulk request (RFC 7644 §3.7); ScimError 400 if two POSTs share a bulkId."""

    def __init__(
        self, call: Call, perform: Callable[[Request], Performed], operations: list[BulkOperation]
    ) -> None:
        self.call, self.perform, self.operations = call, perform, operations
        self.calls: dict[int, tuple[Call, float]] = {}  # with their seconds, by operation's number
        self.responses: dict[int, Response] = {}  # likewise
        self.posts: dict[str, int] = {}  # bulkId to the number of its POST
        for number, operation in enumerate(operations):
            if (
                operation.method == "POST"
                and self.posts.setdefault(operation.bulk_id, number) != number
            ):
                raise invalid_value(f"bulkId {quoted(operation.bulk_id)}: each POST needs its own")
        self.needs = [
            {self.posts[bulk_id] for bulk_id in operation.references & self.posts.keys()}
            for operation in operations
        ]

    def run(self, fail_on_errors: int) -> list[Json]:
        """Return the answers in the order of the request; stop at that number of errors.

        A commit that fails after others is the error of its operations, and the last one.
        """
        store, cycles = self.call.directory.store, deque(order_of(self.needs))
        committed, errors = set[int](), 0
        while cycles and errors < fail_on_errors:
            if committed:
                store.wait(0.01)  # so that a writer that waits can begin
            try:
                with store.writing():
                    seconds = 0.0
                    while cycles and errors < fail_on_errors and seconds < SECONDS_PER_COMMIT:
                        cycle = cycles.popleft()
                        self._perform(cycle)
                        errors += sum(self.responses[number].status >= 400 for number in cycle)
                        seconds += sum(self.calls[n][1] for n in cycle if n in self.calls)
            except StoreError as error:
                if not committed:
                    raise
                self.responses |= dict.fromkeys(
                    self.responses.keys() - committed, error_response(error)
                )
                break
            committed = set(self.responses)
        return [self._answer(number) for number in sorted(self.responses)]

    def _perform(self, cycle: list[int]) -> None:
        # Do the operations of a cycle, all or none. Nearly every cycle is a single operation that
        # does not need itself: then the directory does it whole or not at all.
        needs_itself, number = self.needs[cycle[0]] & {*cycle}, cycle[0]
        try:
            if (
                needs_itself
                and len(to_json([self.operations[n].content for n in cycle])) > MAX_CYCLE
            ):
                raise ScimError(
                    413, "", f"operations that need each other have more than {MAX_CYCLE} octets"
                )
            with self.call.directory.store.writing() if needs_itself else nullcontext():
                for number in cycle:
                    self._check(self.operations[number], cycle)
                    self.responses[number] = self._send(number, self.operations[number].method)
                for number in cycle:
                    # It was created without the references to itself and to those after it.
                    if any(other >= number for other in self.needs[number] & {*cycle}):
                        self.responses[number] = self.responses[number]._replace(
                            headers=self._send(number, "PUT").headers
                        )
        except ScimError as error:
            conflict = ScimError(
                409,
                "",
                f"bulkId {quoted(self.operations[number].bulk_id)}: "
                "this operation and its own need each other",
            )
            self.responses |= dict.fromkeys(cycle, error_response(conflict))
            self.responses[number] = error_response(error)

    def _id_of(self, bulk_id: str) -> str | None:
        response = self.responses.get(self.posts.get(bulk_id, -1))
        return response.body["id"] if response and response.status == 201 else None

    def _check(self, operation: BulkOperation, cycle: list[int]) -> None:
        method, path = operation.method, f"/{operation.endpoint}/{operation.id}"
        for is_valid, detail in (
            (
                re.fullmatch(
                    r"(POST /(Users|Groups)/|(PUT|PATCH|DELETE) /(Users|Groups)/[^/]+)",
                    f"{method} {path}",
                ),
                (
                    "method and path: expected POST with a path such as /Users, or PUT, PATCH or "
                    f"DELETE with one such as /Users/2819, got {quoted(method)} and {quoted(path)}"
                ),
            ),
            (method == "DELETE" or operation.content is not None, f"data: {method} needs some"),
            (method != "POST" or operation.bulk_id, "bulkId: POST needs one"),
        ):
            if not is_valid:
                raise invalid_value(detail)
        for bulk_id in sorted(operation.references):
            if self._id_of(bulk_id) is None and self.posts.get(bulk_id) not in cycle:
                raise ScimError(
                    409, "", f"bulkId {quoted(bulk_id)}: no POST of this request created it"
                )

    def _send(self, number: int, method: str) -> Response:
        operation, request = self.operations[number], self.call.request
        # The PUT that completes a cycle is that of a resource that was just created.
        id = (
            self.responses[number].body["id"]
            if number in self.responses
            else operation.target(self._id_of)
        )
        headers = {name: value for name, value in request.headers.items() if name[:3] != "if-"}
        call, response, seconds = self.perform(
            request._replace(
                method=method,
                path=f"{BASE_PATH}/{operation.endpoint}/{quote(id, safe='')}",
                query="",
                headers=headers | ({"if-match": operation.version} if operation.version else {}),
                caller=self.call.caller,
                body=operation.body(self._id_of) if operation.references else operation.content,
            )
        )
        self.calls.setdefault(number, (call, seconds))  # the PUT of a cycle is no call of a client
        if response.status >= 400:
            raise ScimError(
                response.status,
                response.body.get("scimType", ""),
                response.body["detail"],
                response.headers,
                response.reason,
            )
        return response

    def _answer(self, number: int) -> Json:
        operation, response = self.operations[number], self.responses[number]
        answer = {
            "location": response.headers.get("Location", "")
            if operation.method == "POST"
            else f"{self.call.base_url}/{operation.endpoint}/{operation.target(self._id_of)}",
            "method": operation.method,
            "bulkId": operation.bulk_id,
            "version": response.headers.get("ETag"),
            "status": str(response.status),
            "response": response.body if response.status >= 400 else None,
        }
        return {name: value for name, value in answer.items() if value}


def run_bulk(
    perform: Callable[[Request], Performed],
    note: Callable[[Call, Response, float], Any],
    call: Call,
) -> Response:
    """Answer POST /Bulk: few commits of operations, each of them done whole or not at all.

    perform() does one. note() puts it into the log when all are done, with its final answer.
    """
    message = lowercase_keys(call.json())
    items, limit = message.get("operations"), message.get("failonerrors")
    if not isinstance(items, list) or not items:
        raise invalid_syntax("Operations: expected a list of operations")
    if len(items) > MAX_BULK_OPERATIONS:
        raise ScimError(
            413, "", f"Operations: {len(items)} are more than maxOperations, {MAX_BULK_OPERATIONS}"
        )
    if limit is not None and (type(limit) is not int or limit < 1):
        raise invalid_value(f"failOnErrors: expected 1 or more, got {quoted(limit)}")
    bulk = Bulk(
        call,
        perform,
        [parse_bulk_operation(item, call.directory.resource_types) for item in items],
    )
    answers = bulk.run(limit or len(items))
    for number, (performed, seconds) in bulk.calls.items():
        note(performed, bulk.responses[number], seconds)
    return Response(200, {"schemas": [BULK_RESPONSE], "Operations": answers})


# ----------------------------------------------------------------------------
# 14. Provisioning log
#
# What each call did, warnings about it, and what to do when it failed. A thread in the
# background writes it.
# Uses chapters 1 to 13. Knows nothing of sockets.
# ----------------------------------------------------------------------------

LOG_READS = 50  # calls in the queue; further reads that succeed, which say little, are left out
LOGGED_BODY = 32 * 1024  # octets; a longer body is not kept for the log
# The attributes that the schemas keep secret, and what a client may send by mistake.
SECRET = re.compile(
    "|".join(
        ["secret", "token", "authorization"]
        + [sub.name for sub in USER_TYPE.root.sub_attributes if sub.returned == "never"]
    ),
    re.IGNORECASE,
)
SECRET_NAME = re.compile(rf"[\w.:$-]*({SECRET.pattern})", re.IGNORECASE)
REDACTED = "•••"
OBJECT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
VERBS = {"GET": "Read", "POST": "Create", "PUT": "Replace", "PATCH": "Update", "DELETE": "Delete"}
Reason = tuple[str, ...]  # why a call failed or gets a warning: a key of EXPLANATIONS, and parts
Sent = tuple[str, str, Json]  # what a client wrote: "add" except in a PATCH, path, value
# By key, the most severe first: the kind of trouble; the names of the reason's parts; the cause and
# the rest of the sentence that explains it; the remedy. Calls are grouped by their cause, which
# shows what differs from person to person in quotes or not at all. "value" may be a secret.
EXPLANATIONS = {
    "failed": (
        "connection",
        "detail",
        "The server failed",
        ": {detail}.",
        "Entra retries automatically; the server's log says why it failed.",
    ),
    "guard": (
        "guard",
        "number",
        "A limit of deactivations is reached",
        ". An hour may have {number} deactivations, and has had them; this person stays active.",
        "Is it intended? Then raise max_deactivations. If not, check who is assigned in Entra.",
    ),
    "paused": (
        "connection",
        "",
        "The tenant is paused",
        ": it can be read, but nothing is changed.",
        "Remove paused from the tenant in the configuration. Entra repeats the call later.",
    ),
    "path": (
        "connection",
        "url base",
        "A call went to a path that does not exist",
        ": {url}.",
        "The Tenant URL must end in {base}, exactly once, with nothing after it.",
    ),
    "body": (
        "connection",
        "problem",
        "The body of a call is not JSON",
        ": {problem}.",
        "Check whether a proxy in front of the server changes or truncates requests.",
    ),
    "expired": (
        "authentication",
        "token expires",
        "The token “{token}” expired on {expires}",
        "; a call from {client} was refused.",
        "If later calls fail too, make another secret with `token`, and enter it in Entra.",
    ),
    "malformed": (
        "authentication",
        "token mistake",
        "The secret of “{token}” was sent {mistake}",
        "; a call from {client} was refused.",
        "Enter the secret alone, as `token` printed it, in the field of Entra that it is for.",
    ),
    "read-only": (
        "authentication",
        "token",
        "A call tried to write with “{token}”, which may only read",
        "; it came from {client}.",
        'Enter the secret of an entry that does not have "access": "read".',
    ),
    "link_name": (
        "mapping",
        "name link_names",
        "No custom field has the link name “{name}”",
        "{hint}",
        "Correct the name in Entra's attribute list for customappsso; there are {link_names}.",
    ),
    "integer": (
        "mapping",
        "path value",
        "The field “{path}” takes a whole number",
        ", but {value} was sent.",
        "Map it from an attribute that contains only digits, or make the custom field a String.",
    ),
    "boolean": (
        "mapping",
        "path value",
        "The field “{path}” takes true or false",
        ", but {value} was sent.",
        "Use an expression that returns true or false; for active it is Not([IsSoftDeleted]).",
    ),
    "type": (
        "mapping",
        "path expected value",
        "The attribute “{path}” takes {expected}",
        ", but {value} was sent.",
        "Map it from another attribute.",
    ),
    "required": (
        "mapping",
        "path",
        "“{path}” was sent without a value",
        ".",
        "Map it from an attribute that every account has; for userName that is userPrincipalName.",
    ),
    "taken": (
        "mapping",
        "path value type",
        "Another {type} already has the {path}",
        " {value}.",
        "Change one of the two in Entra; if they are the same, match by {path} (precedence 1).",
    ),
    "gone": (
        "mapping",
        "type value",
        "A {type} to which Entra refers no longer exists here",
        ".",
        "Choose “Restart provisioning” in Entra; it looks up every account again.",
    ),
    "refused": (
        "mapping",
        "detail",
        "The call was refused: {detail}",
        ".",
        "Compare the mapping in Entra with the table on the Set-up page.",
    ),
    "active": (
        "mapping",
        "value",
        "The expression for active is still Switch(…)",
        ": it sent the text {value}.",
        "Map Not([IsSoftDeleted]) to active, and append ?aadOptscim062020 to the Tenant URL.",
    ),
    "shared": (
        "mapping",
        "value name other other_id",
        "Two active users have the same externalId",
        ": {name} and {other} have {value}. They are two employees.",
        "If they are one person, deactivate one of them; if not, map objectId to externalId.",
    ),
    "externalId": (
        "mapping",
        "value",
        "The externalId is not an objectId",
        ": it is {value}.",
        "Map objectId to externalId, so that a person who is renamed stays the same employee.",
    ),
    "members": (
        "mapping",
        "ids",
        "Members that were not provisioned are ignored",
        ": no user or group has the id {ids}.",
        "Assign these people to the application too, so that Entra creates them before the group.",
    ),
    "emails": (
        "mapping",
        "value name",
        "The work e-mail is not the userName",
        ": it is {value}, not {name}.",
        'Map userPrincipalName to emails[type eq "work"].value.',
    ),
    "deleted": (
        "deletion",  # no problem, and no cause of one
        "type at",
        "",
        "The {type} was deleted on {at}; this call changed nothing.",
        "Nothing. If such calls go on for days, choose “Restart provisioning” in Entra.",
    ),
}
# What a person's later call must send correctly to solve a problem that names no path.
CORRECTED_BY = {
    "link_name": [FACILIO],
    "active": ["active"],
    "shared": ["externalId", "active"],
    "externalId": ["externalId"],
    "members": ["members"],
    "emails": ["emails", "userName"],
    "guard": ["active"],
}
# fmt: off
STEPS = (  # of the set-up: key, operation in the log, title, how to get there
    ("lookup", "Look up user",    "A person is looked up",
     "In Entra: Provisioning → Provision on demand."),
    ("create", "Create user",     "A person is created",
     "Start provisioning: everyone who is assigned is created."),
    ("custom", "",                "A custom field arrives",
     "Add its name to the attribute list, then map to it."),
    ("update", "Update user",     "A person is updated",
     "Change a job title in Entra and wait for a cycle."),
    ("off",    "Deactivate user", "A person is deactivated",
     "Unassign a test person and wait for a cycle."),
)
# fmt: on


@dataclass(eq=False)
class LogItem:
    """A call of a tenant's client on its way to the log."""

    call: Call  # without headers, which hold the secret
    caller: Caller
    response: Response
    instant: datetime
    seconds: float
    logged: bool  # False: it only shows that the token is in use
    octets: int = 0  # of what it keeps in memory, about

    @cached_property
    def resource(self) -> Resource:
        # The user or group in the answer, or the only one that a query returned; {} for none.
        body = self.response.body if self.call.route.type and self.response.status < 300 else None
        resource: Resource = next(iter(body.get("Resources", [body])), {}) if body else {}
        return from_json(resource) if isinstance(resource, Encoded) else resource

    @cached_property
    def sent(self) -> list[Sent]:
        # What the client wrote, the attributes of an extension one by one.
        sent, call = list(map(sent_by, self.call.operations)), self.call
        body = call.body if call.route.type and isinstance(call.body, dict) else {}
        for name, value in body.items() if call.request.method != "PATCH" else ():
            if name.lower() in (ENTERPRISE.lower(), FACILIO.lower()) and isinstance(value, dict):
                sent += [("add", f"{name}:{sub}", item) for sub, item in value.items()]
            elif name.lower() not in ("schemas", "id", "meta"):
                sent.append(("add", name, value))
        return [(op, redacted(path)[:200], value) for op, path, value in sent]

    @property
    def differences(self) -> Differences:  # that it made to a user or group
        return self.call.directory.differences if self.response.status < 400 else {}

    @cached_property
    def may_show_secret(self) -> bool:  # in the detail of an error, which quotes what was sent
        request, body = self.call.request, self.call.body
        is_unparsed = body is None and bool(request.body)
        may_have_secret = is_unparsed or SECRET.search(f"{body!r} {unquote(request.query)}")
        return self.response.status >= 400 and bool(may_have_secret)


def sent_by(operation: Operation) -> Sent:
    # Return an operation of a PATCH as the log shows it, with canonical names.
    path = operation.path
    terms = equal_terms(path.filter).items() if path.filter else ()
    filter = " and ".join(f"{name} eq {quoted(value)}" for name, value in terms) or "…"
    brackets = f"[{filter}]" if path.filter else ""
    sub = f".{path.sub_attribute.name}" if path.sub_attribute else ""
    # Members come as objects, ids or a filter; the accepted value has them in one form.
    value = operation.value if path.attributes[0].is_membership else operation.sent
    return operation.op, path.attributes[-1].path + brackets + sub, value


def member_ids(path: str, value: Json) -> list[str]:
    # Return the ids of the members that were sent, "" for one that a filter selects.
    items = [""] if "[" in path else value if isinstance(value, list) else [value] if value else []
    return [str(item.get("value", "") if isinstance(item, dict) else item) for item in items]


# -- What a call did -----------------------------------------------------------------


def operation_name(item: LogItem) -> str:
    # Return what a call does, such as "Update user": a phrase that the subject's name follows.
    request, route, noun = item.call.request, item.call.route.label, item.call.route.type.lower()
    if not noun:
        return f"Call {route or request.path[:80]}"
    if request.method in ("GET", "POST") and re.search(r"filter|\.search", request.query + route):
        return f"Look up {noun}"
    if request.method == "GET" and not item.call.id:
        return f"List {noun}s"
    return patch_name(item) or f"{VERBS.get(request.method, request.method)} {noun}"


def patch_name(item: LogItem) -> str:
    # Return "Deactivate user", "Add 3 members to" and the like; "" for another PATCH or method.
    state, counts = "", Counter[str]()
    for op, path, value in item.sent if item.call.operations else ():
        if path == "active":
            state = "Deactivate user" if str(value).lower() == "false" else "Activate user"
        elif path.startswith("members"):
            counts["set" if op == "replace" else op] += len(member_ids(path, value))
    parts = [f"{op} {n} member{'s' * (n > 1)}" for op, n in sorted(counts.items()) if n]
    preposition = "to" if parts and parts[-1].startswith("add") else "of"
    return state or (f"{' and '.join(parts)} {preposition}".capitalize() if parts else "")


def subject_name(session: Session, item: LogItem, id: str) -> str:
    """Return the name of the user or group that a call is about, "" if it is not known."""
    call, resource = item.call, item.resource
    filter = dict(parse_qsl(call.request.query)).get("filter", "")
    literal = None if SECRET.search(filter) else re.search(r'eq "(.*?)"', filter)
    row = None if resource else session.find(call.route.type, id)
    employee = None if resource else session.employee_of(id)
    candidates = (
        resource,
        call.body if isinstance(call.body, dict) else {},
        row.attributes if row else {},
        employee.record if employee else {},
        {name: old for name, (old, _) in item.differences.items()},  # of a deletion
        {"name": literal[1]} if literal else {},
    )
    return next(
        (
            name
            for candidate in candidates
            for key in ("displayName", "userName", "name")
            if isinstance(name := candidate.get(key), str) and name
        ),
        "",
    )


# -- Warnings and errors -------------------------------------------------------------


def user_warnings(item: LogItem) -> Iterator[Reason]:
    """Yield warnings about values of a user that show a mistake in the mapping."""
    directory, user = item.call.directory, item.resource
    user_type = directory.resource_types["User"]
    for _, path, value in item.sent:
        match path.lower():
            case "active" if isinstance(value, str):
                yield "active", quoted(value)
            case "externalid" if not OBJECT_ID.fullmatch(str(value)):
                yield "externalId", quoted(value)
            case name if name.startswith(FACILIO.lower()) and not resolve(path, user_type):
                yield "link_name", path[len(FACILIO) + 1 :], ", ".join(directory.link_names)
    names = {path.lower().partition("[")[0] for _, path, _ in item.sent} & {"emails", "username"}
    yield from (
        ("emails", quoted(email.get("value")), quoted(user.get("userName")))
        for email in (user.get("emails", ()) if names else ())
        if email.get("type") == "work"
        and name_key(str(email.get("value"))) != name_key(str(user.get("userName")))
    )


def shared_id_warnings(session: Session, item: LogItem) -> Iterator[Reason]:
    """Yield a warning for each active user that has the externalId that was sent for another."""
    user, paths = item.resource, [path.lower() for _, path, _ in item.sent]
    if "externalid" in paths and (text := user.get("externalId")):
        same = Compare((USER_TYPE.root.by_name["externalid"],), "eq", text, text)
        yield from (
            (
                "shared",
                *map(quoted, (text, user.get("userName"), row.attributes["userName"])),
                row.id,
            )
            for *_, row in session.page({"User": same}, None, Window(DEFAULT_COUNT))[0]
            # Another user may have come between the call and this moment.
            if row.id != user["id"]
            and row.created <= time_text(item.instant)
            and row.attributes.get("active")
        )


def member_warnings(session: Session, item: LogItem) -> Iterator[Reason]:
    # Yield a warning about members that no user or group is.
    ids = {
        id
        for op, path, value in item.sent
        if path.lower() == "members" and op != "remove"
        for id in member_ids(path, value)
    }
    # The answer shows who became a member; the store may have changed since.
    ids -= {member.get("value") for member in item.resource.get("members", ())}
    if missing := sorted(ids - session.seqs_of(ids).keys()):
        yield "members", ", ".join(map(quoted, missing[:3])) + (", …" if missing[3:] else "")


# An error quotes what was sent as JSON text, or it ends with what it got.
def without_quotes(text: str) -> str:
    return re.sub(r'got .*|"(\\.|[^"\\])*("|$)', REDACTED, text, flags=re.DOTALL)


def redacted(value: Json) -> Json:
    # Return a body with the values of secrets hidden, in filters and in a PATCH too.
    if isinstance(value, str):
        # A filter, or the path of a PATCH, may have the secret beside its name.
        return REDACTED if SECRET.search(value) and not SECRET_NAME.fullmatch(value) else value
    if not isinstance(value, dict):
        return [redacted(item) for item in value] if isinstance(value, list) else value
    path = " ".join(str(item) for name, item in value.items() if name.lower() == "path")
    hidden = "value" if SECRET.search(path) else ""  # of a PATCH operation on a secret
    return {
        redacted(name): REDACTED
        if SECRET.search(name) or name.lower() == hidden
        else redacted(item)
        for name, item in value.items()
    }


def explain(reason: Reason, item: LogItem) -> Json:
    # Return the kind of a trouble, the sentence that explains it with its cause, the remedy, and
    # which attributes of whom are corrected by a later call that solves it.
    kind, names, cause, rest, remedy = EXPLANATIONS[reason[0]]
    parts = dict(zip(names.split(), reason[1:], strict=True))
    if item.may_show_secret:
        parts = {name: without_quotes(part) for name, part in parts.items()} | {"value": REDACTED}
    # A custom field is known by its link name; the full stop of a detail is that of our sentence.
    parts = {name: part.removeprefix(f"{FACILIO}:").rstrip(".") for name, part in parts.items()}
    links = {link.lower(): link for link in parts.get("link_names", "").split(", ")}
    similar = difflib.get_close_matches(parts.get("name", "").lower(), links, 1)
    parts |= {
        "hint": f": did you mean “{links[similar[0]]}”?" if similar else ".",
        "client": item.call.request.client,
    }
    return {
        "kind": kind,
        "text": (cause + rest).format(**parts),
        "remedy": remedy.format(**parts),
        "cause": cause.format(**{name: without_quotes(part) for name, part in parts.items()}),
        "attributes": [
            corrected_by(path)[0]
            for path in CORRECTED_BY.get(reason[0], reason[1 : 1 + names.startswith("path")])
        ],
        "other": parts.get("other_id", ""),
    }


# -- Entries -------------------------------------------------------------------------


def attributes_of(item: LogItem) -> list[str]:
    # Return the paths that a client wrote; of a PATCH that did not parse, the wrong one.
    call, reason = item.call, item.response.reason
    if (
        call.route.type
        and call.request.method == "PATCH"
        and not item.sent
        and reason
        and EXPLANATIONS[reason[0]][1].startswith(("path", "name"))
    ):
        return [reason[1]]
    return list(dict.fromkeys(path for _, path, _ in item.sent))


def reasons_of(session: Session, item: LogItem, id: str, detail: str) -> list[Reason]:
    """Return why a call failed or gets warnings, the most severe first."""
    status, type = item.response.status, item.call.route.type
    # The detail explains an error without a reason.
    reason = item.response.reason or ("failed" if status >= 500 else "refused", detail)
    for change in session.changes_about(id, 0, MAX_COUNT) if reason[0] == "gone" else ():
        if change.kind in ("user.deleted", "group.deleted"):
            reason = "deleted", type, f"{change.at[:10]} {change.at[11:16]} UTC"
    if status >= 400:
        return [reason]
    warnings = (
        (*user_warnings(item), *shared_id_warnings(session, item))
        if type == "User"
        else member_warnings(session, item)
    )
    return sorted(set(warnings), key=lambda reason: (list(EXPLANATIONS).index(reason[0]), reason))


def describe(session: Session, item: LogItem) -> tuple[int, str, Json]:
    """Return a call's level (0 done, 1 warning, 2 refused), its subject's id and its entry."""
    call, response, refused = item.call, item.response, item.response.status >= 400
    detail = (response.body.get("detail") or response.body["error_description"]) if refused else ""
    detail = without_quotes(detail) if item.may_show_secret else detail
    id = item.resource.get("id") or (call.id if call.route.type else "")
    reasons = reasons_of(session, item, id, detail)
    has_body = item.caller.tenant.log_bodies and call.body is not None
    entry = {
        "at": time_text(item.instant),
        "token": item.caller.credential.name,
        "operation": operation_name(item),
        "type": call.route.type,
        "name": subject_name(session, item, id)[:200],
        "status": response.status,
        "id": call.request.id,
        "milliseconds": round(item.seconds * 1000, 1),
        "method": call.request.method,
        "path": call.request.path[:500],
        "query": "" if SECRET.search(unquote(call.request.query)) else call.request.query[:2000],
        "client": call.request.client,
        "attributes": attributes_of(item)[:50],
        "values": redacted(call.directory.kept(item.differences)),
        "detail": detail,
        "notes": [explain(reason, item) for reason in reasons],
        **({"body": redacted(call.body)} if has_body else {}),
    }
    return 2 if refused and reasons[0][0] != "deleted" else int(bool(reasons)), id, entry


@lru_cache
def corrected_by(path: str) -> tuple[str, str]:
    # Return the attribute that a path belongs to and its extension, "" for none, in lower case.
    urn, _, name = path.partition("[")[0].lower().rpartition(":")
    return f"{urn}:{name.partition('.')[0]}".lstrip(":"), urn


def write_log(store: Store, items: Sequence[LogItem]) -> None:
    """Write calls of one tenant to its log, with each token's last use and the set-up's steps."""
    logged = [item for item in items if item.logged]
    with store.reading() as session:
        rows = [describe(session, item) for item in logged]
    with store.writing() as session:
        session.note_requests(rows, items[-1].caller.tenant.keep_log)
        uses = {
            f"used {item.caller.credential.entry}": time_text(item.instant)
            for item in items
            if item.response.status != 401
        }
        steps = {
            f"first {step}": entry["at"]
            for item, (level, _, entry) in reversed([*zip(logged, rows, strict=True)])
            for step, operation, *_ in STEPS
            if level < 2 and not session.setting(f"first {step}")
            if operation == entry["operation"]
            or (step == "custom" and item.resource.get(FACILIO) and entry["attributes"])
        }
        for name, text in {**uses, **steps}.items():
            session.set_setting(name, text)


class BackgroundWriter:
    """A queue whose items a daemon thread passes to write, those of a pause of seconds together.

    add() never blocks: when limit items are queued, it drops further ones and returns False. write
    must not raise.
    """

    def __init__(self, write: Callable[[list[Any]], None], pause: float, limit: int) -> None:
        self._write, self._pause, self._limit = write, pause, limit
        self._items, self._closing = queue.SimpleQueue[Any](), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, item: Any) -> bool:
        if fits := self._items.qsize() < self._limit:
            self._items.put(item)
        return fits

    def close(self, seconds: float = 5) -> None:
        # Write the queued items, in at most that time, and end the thread.
        self._closing.set()
        self._items.put(None)  # the end
        self._thread.join(seconds)

    def _run(self) -> None:
        batch: list[Any] = []
        while None not in batch:
            batch = [self._items.get()]
            self._closing.wait(self._pause)
            batch += [self._items.get() for _ in range(self._items.qsize())]
            self._write([item for item in batch if item is not None])


class ProvisioningLog(BackgroundWriter):
    """The queue of calls for the logs of their tenants; calls with unknown tokens are counted."""

    def __init__(self, usage: Usage) -> None:
        super().__init__(self._store, pause=0.2, limit=5_000)
        self.usage = usage
        # By tenant: successful look-ups left out under load, and calls that should be in the log.
        self.skipped, self.missing = Counter[str](), Counter[str]()
        self.unknown_token: dict[str, Any] = {"calls": 0}  # and "since"

    def note(self, call: Call, response: Response, now: datetime, seconds: float) -> None:
        """Queue a call for its tenant's log, or count it if no tenant has its token."""
        request, caller, label, status = (
            call.request,
            call.caller,
            call.route.label,
            response.status,
        )
        # A path that does not exist has no label.
        is_failure = status >= 400 and label in ("", TOKEN_PATH)
        logged = is_failure or request.path.startswith(BASE_PATH)
        if not caller and logged and status == 401:
            self.unknown_token["calls"] += 1
            self.unknown_token.setdefault("since", time_text(now))
        is_console = label.startswith("/console/")  # it does not show a token's use
        if not caller or is_console or isinstance(directory := caller.directory, StoreError):
            return  # there is no log
        if request.method == "GET" and status < 300 and self._items.qsize() >= LOG_READS:
            self.skipped[caller.tenant.name] += logged
            return
        # The headers hold the secret.
        call.request, call.directory = request._replace(headers={}, caller=None), directory
        self._queue(LogItem(call, caller, response, now, seconds, logged))

    def _queue(self, item: LogItem) -> None:
        # Queue a call without a long body and without a list of several resources.
        call, answer = item.call, item.response.body
        if isinstance(answer, dict) and len(answer.get("Resources", ())) > 1:
            item.response = item.response._replace(body=None)
        body = call.request.body  # of an operation of Bulk it is JSON
        item.octets = len(body if isinstance(body, bytes) else to_json(body))
        if item.octets > LOGGED_BODY:
            call.request, call.body = call.request._replace(body=b""), None
            call.operations, item.may_show_secret = (), True
        item.octets += len(to_json(item.response.body))
        if self.add(item):
            self.usage.take((item.caller.tenant.name, 0, item.octets))
        else:
            self.missing[item.caller.tenant.name] += 1

    def _store(self, batch: list[LogItem]) -> None:
        for store in dict.fromkeys(item.call.directory.store for item in batch):
            items = [item for item in batch if item.call.directory.store is store]
            tenant = items[0].caller.tenant.name
            try:
                write_log(store, items)
            except Exception:  # noqa: BLE001  a failing log must not stop provisioning
                self.missing[tenant] += len(items)
            self.usage.take((tenant, 0, -sum(item.octets for item in items)))


# ----------------------------------------------------------------------------
# 15. Other endpoints
#
# Employees, changes, the console's API with the causes of open problems, and metrics.
# Uses chapters 1 to 14. Knows nothing of sockets.
# ----------------------------------------------------------------------------

# -- Employees and changes -----------------------------------------------------------


def csv_response(table: Iterable[list[str]], **headers: str) -> Response:
    return plain_response("".join(employee_csv(table)), "text/csv; charset=utf-8", **headers)


def list_employees(call: Call) -> Response:
    """Answer GET /employees: those after a cursor, as JSON or, if Accept asks for it, CSV."""
    active = call.choice("active", "", "true", "false")
    count = call.integer("count", DEFAULT_COUNT, 1, MAX_COUNT)
    employees, size, more = list[Employee](), 0, False
    for employee in call.directory.employees(
        active == "true" if active else None,
        call.parameters.get("changed_since", ""),
        call.integer("id", 0) if "id" in call.parameters else None,
        call.integer("cursor", 0),
    ):
        size += len(repr(employee))
        if more := len(employees) == count or (size > MAX_PAGE and employees != []):
            break
        employees.append(employee)
    cursor = {"nextCursor": str(employees[-1].id)} if more else {}
    query = urlencode({**call.parameters, "cursor": cursor.get("nextCursor", "")})
    base_url = call.base_url.removesuffix(BASE_PATH)
    headers = {"Link": f'<{base_url}/employees?{query}>; rel="next"'} if more else {}
    if "text/csv" in call.request.headers.get("accept", ""):
        return csv_response(employee_table(employees, call.directory.link_names), **headers)
    return plain_response({"employees": list(map(asdict, employees)), **cursor}, **headers)


def get_employee(call: Call) -> Response:
    id = int(call.id) if re.fullmatch(r"\d{1,18}", call.id, re.ASCII) else 0
    if not (employee := next(call.directory.employees(id=id), None)):
        raise ScimError(404, "", f"employee {quoted(call.id)} does not exist")
    return plain_response(asdict(employee))


def long_poll(usage: Usage, call: Call, read: Callable[[float], list[Any]]) -> list[Any]:
    """Return what read(seconds) returns; with wait, not before it returns something.

    The answer is empty after wait seconds, and earlier if the tenant has too many requests.
    """
    for seconds in [1] * call.integer("wait", 0, 0, MAX_WAIT) or [0]:
        if (rows := read(seconds)) or not usage.may_wait(call.request.tenant):
            break
    return rows


def list_changes(usage: Usage, call: Call) -> Response:
    # Answer GET /changes: those after a number; with wait, block until there are some.
    after, count = call.integer("after", 0), call.integer("count", MAX_COUNT, 1, MAX_COUNT)
    changes = long_poll(usage, call, lambda wait: call.directory.changes(after, wait, count))
    return plain_response(
        {"changes": list(map(asdict, changes)), "after": changes[-1].seq if changes else after}
    )


# -- The console's API ---------------------------------------------------------------


@lru_cache(2)
def page_response(page: str) -> Response:
    """Return the console's page; its policy allows only the script and style in it."""
    own = "; ".join(
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    )
    return plain_response(
        page,
        "text/html; charset=utf-8",
        **{
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; connect-src 'self'; img-src data:; "
            f"require-trusted-types-for 'script'; {own}",
        },
    )


def entra_mapping(directory: Directory) -> Iterator[list[str]]:
    # Yield rows of source, customappsso attribute, type in Entra, and the change to make.
    types = {"boolean": "Boolean", "integer": "Integer", "complex": "Reference"}
    fields = (
        ("", f"{FACILIO}:{name}", "custom field: choose its source")
        for name in directory.link_names
    )
    for source, target, change in (*ENTRA_MAPPING, *fields):
        path = parse_path(target, directory.resource_types["User"])
        type = (path.sub_attribute or path.attributes[-1]).type
        yield [source, target, types.get(type, "String"), change]


# Whether an entry of the log matches a parameter. A word of an action or name begins with the text,
# so that "activate" does not match "Deactivate user"; times are texts with milliseconds.
LOG_FILTERS: dict[str, Callable[[str, Json], bool]] = {
    "status": lambda text, entry: str(entry["status"]).startswith(text),
    "action": lambda text, entry: f" {text}".lower() in f" {entry['operation']}".lower(),
    "person": lambda text, entry: f" {text}".lower() in f" {entry['name']}".lower(),
    "token": lambda text, entry: entry["token"] == text,
    "cause": lambda text, entry: any(note.get("cause") == text for note in entry["notes"]),
    "from": lambda time, entry: entry["at"][:23] >= time,
    "to": lambda time, entry: entry["at"][:23] <= time,
}
LOG_TIMES = {name: Attribute(name, "dateTime").with_paths() for name in ("from", "to")}


def get_log(log: ProvisioningLog, call: Call) -> Response:
    filters = {
        name: bound.key(bound.convert(value))[:23] if (bound := LOG_TIMES.get(name)) else value
        for name, value in call.parameters.items()
        if name in LOG_FILTERS and value
    }
    read = partial(
        call.directory.requests,
        call.integer("after", 0),
        call.integer("before", 0),
        call.integer("count", DEFAULT_COUNT, 1, MAX_COUNT),
        call.integer("level", 0),
        call.text("subject"),
        call.text("text"),
        lambda entry: all(LOG_FILTERS[name](value, entry) for name, value in filters.items()),
    )
    return plain_response({"entries": long_poll(log.usage, call, read)})


MAX_CAUSES = 50  # in an answer


def open_causes(entries: Iterable[Json]) -> list[Json]:
    """Return the causes of the problems that no later call has solved, the most severe first.

    The entries come newest first. A problem is solved when its attribute is sent correctly for the
    same person, or the person is deleted. One that concerns no attribute is solved by a call with
    the same method, a refused access token by any call; one that concerns no person by a call with
    the same token or client.
    """
    corrected, open_calls = set[tuple[str, str]](), defaultdict[str, list[Json]](list)
    for entry in entries:
        person, wrong = entry["subject"] or entry["name"], set[str]()
        for note in entry["notes"]:
            is_grant = entry["path"] == TOKEN_PATH
            names = set(note.get("attributes") or [TOKEN_PATH if is_grant else entry["method"]])
            wrong |= names
            of_person = note["kind"] in ("mapping", "guard")
            whose = {person, note.get("other")} if of_person else {entry["token"], entry["client"]}
            solved_by = itertools.product(whose - {""}, names | {"DELETE"})
            if note.get("cause") and corrected.isdisjoint(solved_by):
                facts = {"level": entry["level"], "at": entry["at"], "who": person * of_person}
                open_calls[note["cause"]].append(note | facts | {"type": entry["type"]})
        if entry["level"] < 2:
            names = {entry["method"], *itertools.chain(*map(corrected_by, entry["attributes"]))}
            corrected.update(
                itertools.product([entry["subject"], entry["name"]], names - wrong),
                itertools.product([entry["token"], entry["client"]], [entry["method"], TOKEN_PATH]),
            )
    causes = [
        {
            **calls[0],
            "level": max(call["level"] for call in calls),
            "calls": len(calls),
            **{
                name: len({call["who"] for call in calls if call["type"] == type} - {""})
                for name, type in (("people", "User"), ("groups", "Group"))
            },
            "first": calls[-1]["at"],
            "last": calls[0]["at"],
        }
        for calls in open_calls.values()
    ]
    by_severity = operator.itemgetter("level", "people", "groups", "calls")
    return sorted(causes, key=by_severity, reverse=True)[:MAX_CAUSES]


def get_causes(log: ProvisioningLog, call: Call) -> Response:
    # Answer GET /console/api/causes: those of all calls, or of those about a user or group. A call
    # with an unknown token may be any tenant's.
    with call.directory.store.reading() as session:
        entries = session.requests(subject=call.text("subject"))
        causes = open_causes(itertools.islice(entries, KEEP_LOG))
    return plain_response({"causes": causes, "unknown_token": log.unknown_token})


def get_setup(log: ProvisioningLog, call: Call) -> Response:
    """Answer GET /console/api/setup: what to enter in Entra ID, and what has worked already."""
    directory, now = call.directory, call.directory.clock()
    tenant = call.caller.tenant  # type: ignore[union-attr]  # the route needs a token
    with directory.store.reading() as session:
        steps = [
            {"title": title, "hint": hint, "at": session.setting(f"first {step}")}
            for step, _, title, hint in STEPS
            if tenant.custom_fields or step != "custom"
        ]
        tokens = [
            {
                "kind": type(credential).__name__.lower(),
                "name": credential.name,
                "access": credential.access,
                "last_use": session.setting(f"used {credential.entry}"),
                "expires": time_text(credential.expires) if credential.expires else "",
                "expired": credential.expired(now),
                "days_left": credential.time_left(now).days,
            }
            for credential in tenant.credentials
        ]
    return plain_response(
        {
            "version": __version__,
            "tenant": tenant.name,
            "paused": tenant.paused,
            "max_deactivations": tenant.max_deactivations,
            "url": call.base_url,
            "token_url": token_url(call.base_url),
            "steps": steps,
            "left_out": [log.skipped[tenant.name], log.missing[tenant.name]],
            "tokens": tokens,
            "last": directory.requests(count=1),
            "mapping": list(entra_mapping(directory)),
            "fields": [
                {
                    **asdict(custom),
                    "urn": custom.urn,
                    "people": directory.query("User", f"{custom.urn} pr", count=0).total_results,
                }
                for custom in tenant.custom_fields
            ],
        }
    )


def get_mapping(call: Call) -> Response:
    titles = ["Entra ID source", "customappsso attribute", "type", "change"]
    return csv_response([titles, *entra_mapping(call.directory)])


def find_employees(call: Call) -> Response:
    """Answer GET /console/api/employees: a page of those in a state that have a text, sorted.

    This reads all employees: it takes about two seconds for 300 000.
    """
    link_names = call.directory.link_names
    condition = compile_employees(
        call.choice("state", *EMPLOYEE_STATES),
        call.text("text"),
        ["custom_fields", *EMPLOYEE_SOURCES, *link_names],
    )
    count = call.integer("count", DEFAULT_COUNT, 1, MAX_COUNT)
    with call.directory.store.reading() as session:
        total, rows = session.find_employees(
            condition,
            call.choice("sortBy", *EMPLOYEE_SOURCES, *map("custom_fields.{}".format, link_names)),
            call.choice("sortOrder", "ascending", "descending") == "descending",
            Window(count, call.integer("startIndex", 1, 1) - 1),
        )
    return plain_response(
        {
            "total": total,
            "employees": [
                {**asdict(to_employee(row, call.directory.roles)), "left": not row.provisioned}
                for row in rows
            ],
        }
    )


def get_names(call: Call) -> Response:
    # Answer GET /console/api/names: the names of users and groups, by id.
    with call.directory.store.reading() as session:
        return plain_response(session.names(call.text("ids").split(",")))


def get_history(call: Call) -> Response:
    employee, changes = call.directory.history(call.id)
    return plain_response(
        {"employee": employee and asdict(employee), "changes": list(map(asdict, changes))}
    )


# -- For the operator: no tenant's token, and nothing about people -------------------


class Metrics:
    """Counts of answers, in the text format of Prometheus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str, str, int], tuple[int, float]] = {}

    def add(self, method: str, response: Response, seconds: float) -> None:
        key = (response.tenant, method, response.route, response.status)
        with self._lock:
            count, total = self._counts.get(key, (0, 0.0))
            self._counts[key] = (count + 1, total + seconds)

    def answer(self, config: Config, now: datetime) -> Response:
        with self._lock:
            counts = sorted(self._counts.items())
        lines = []
        for number, name, help in (
            (0, "scim_requests_total", "Requests answered"),
            (1, "scim_request_seconds_total", "Seconds spent on them"),
        ):
            lines += [
                f"# HELP {name} {help}",
                f"# TYPE {name} counter",
                *(
                    f'{name}{{tenant="{tenant}",method="{method}",route="{route}",'
                    f'status="{status}"}} {values[number]:g}'
                    for (tenant, method, route, status), values in counts
                ),
            ]
        lines += [
            "# HELP scim_credential_seconds_left Seconds until a token or client expires",
            "# TYPE scim_credential_seconds_left gauge",
            *(
                f'scim_credential_seconds_left{{tenant="{tenant.name}",credential='
                f"{json.dumps(credential.entry, ensure_ascii=False)}}} "
                f"{credential.time_left(now).total_seconds():.0f}"
                for tenant, credential in config.credentials
                if credential.expires
            ),
            "",
        ]
        return plain_response("\n".join(lines), "text/plain; version=0.0.4; charset=utf-8")


# ----------------------------------------------------------------------------
# 16. Application                                           RFC 7644 §2, §3.12
#
# The tenants: which are served, with which tokens, from which store. The one table of
# routes. And handle(Request) -> Response: token to tenant, path to operation, every
# failure to a SCIM error.
# Uses chapters 1 to 15. Knows nothing of sockets.
# ----------------------------------------------------------------------------


# -- Routes --------------------------------------------------------------------------

# Who may call.
ANYONE, PROBE, OPERATOR, BEARER, NOWHERE = "anyone", "probe", "operator", "bearer", "nowhere"
CONTROL = "control"
# Lanes of the HTTP server: at once; with the reads one by one; of a network database several at a
# time, look-ups and other reads; with the writes; one by one beside the writes; in its own thread.
# The table has LOOKUP for a read that may be quick: then lane_of() decides.
# fmt: off
QUICK, READ, LOOKUP, REMOTE, WRITE, BULK, SLOW = (
    "quick", "read", "lookup", "remote", "write", "bulk", "slow")
# fmt: on
RouteRow = tuple[str, str, str, str, Operate]  # methods, path, who may call, lane, operation
# The quick queries: an equality on a nearly unique attribute, with small parameters beside it.
SMALL = r"(?:(?:excludedA|a)ttributes=[\w.:,$%-]*|startIndex=\d{1,3}|count=\d{1,2})"
EQUALS = r"(?:%20|\+)eq(?:%20|\+)%22(?:[^%&\" ]|%(?!22))*%22"
QUICK_QUERIES = {
    "User": re.compile(rf"({SMALL}&)*filter=(userName|externalId){EQUALS}(&{SMALL})*", re.ASCII),
    "Group": re.compile(  # a group is small only without its members
        rf"(excludedAttributes=members&)?filter=(displayName|externalId){EQUALS}"
        r"(?(1)|&excludedAttributes=members)",
        re.ASCII,
    ),
}


def route_table(rows: Iterable[RouteRow]) -> dict[tuple[str, ...], Route]:
    # Return routes by the segments of their paths; {type} stands for Users and for Groups.
    routes: dict[tuple[str, ...], Route] = {}
    for methods, pattern, access, lane, operation in rows:
        for path in (pattern.replace("{type}", "Users"), pattern.replace("{type}", "Groups")):
            segments = tuple(filter(None, path.split("/")))
            type = {"Users": "User", "Groups": "Group"}.get("".join(segments[2:3]), "")
            route = Route(path.removeprefix(BASE_PATH) or "/", access, type)
            routes.setdefault(segments, route).operations.update(
                dict.fromkeys(methods.replace("GET", "GET HEAD").split(), (lane, operation)),
                OPTIONS=(QUICK, lambda call: Response(204, headers=call.route.allow)),
            )
    return routes


class Application:
    """All tenants of a configuration as one endpoint; the bearer token alone selects the tenant.

    directories has each tenant's Directory by name. If a tenant's database cannot be used, it has
    the StoreError instead: this tenant is answered 503, the others are served. The tenants of a
    PostgreSQL database are opened when they are needed first, except one of them. Of a secret it
    keeps only the hash.

    authenticate is for a program that keeps tokens itself: it is asked about tokens that no tenant
    has, and returns a tenant's name or None. page is the console, "" for none. more_rows are routes
    beside those of its own.
    """

    def __init__(
        self,
        config: Config,
        authenticate: Callable[[str], str | None] | None = None,
        clock: Clock = utc_now,
        new_id: Callable[[], str] = random_id,
        page: str = "",
        new_secret: Callable[[str], str] = random_secret,
        more_rows: Iterable[RouteRow] = (),
    ) -> None:
        self.directories: dict[str, Directory | StoreError] = {}
        self._databases: dict[str, PostgresDatabase] = {}  # by their URLs
        self._authenticate, self._clock = authenticate, clock
        self._new_id, self._new_secret = new_id, new_secret
        self._temporary = set[tuple[str, Token]]()  # by tenant; no configuration has them
        self._configuring = threading.RLock()
        self.configure(config)
        self.usage = Usage(config.max_connections, config.max_memory * 1024 * 1024)
        self.log, self.metrics = ProvisioningLog(self.usage), Metrics()
        self.closing = threading.Event()
        threading.Thread(
            target=self._watch, args=(weakref.ref(self), self.closing), daemon=True
        ).start()
        has_console = page and config.console
        self._routes = route_table(
            row
            for row in (*self._rows(page), *more_rows)
            if has_console or not re.fullmatch("/|/console/.*", row[1])
        )

    # -- Tenants --

    def configure(self, config: Config) -> None:
        """Serve the tenants of a configuration from now on; a StoreError changes nothing.

        A tenant that is served already keeps its store.
        """
        check_config(config, has_hook=self._authenticate is not None)
        with self._configuring:
            before = {directory.store for directory in self.available}
            self.directories = {
                tenant.name: self._open(config, tenant, is_needed=False)
                for tenant in config.tenants
            }
            self.tenants = {tenant.name: tenant.without_secrets() for tenant in config.tenants}
            self.config = replace(config, tenants=tuple(self.tenants.values()))
            self._temporary = {pair for pair in self._temporary if pair[0] in self.tenants}
            self._index_credentials()
            urls = self._databases.keys() - {
                store_location(config, item) for item in config.tenants
            }
            unused: list[Store | Database] = [
                *(before - {directory.store for directory in self.available}),
                *map(self._databases.pop, urls),
            ]
        for item in unused:
            item.close()

    def add_tenant(self, document: Json) -> Directory:
        # Add or replace a tenant, as in the configuration file; ConfigError, StoreError.
        with self._configuring:
            tenant = parse_tenant(document, self.config.tenants)
            tenants = {**self.tenants, tenant.name: tenant}
            self.configure(replace(self.config, tenants=tuple(tenants.values())))
        return self.directory(tenant.name)

    def remove_tenant(self, name: str) -> None:
        # Serve a tenant no more, and keep its data; KeyError for a name that no tenant has.
        with self._configuring:
            others = tuple(filter(partial(operator.ne, self.tenants[name]), self.config.tenants))
            self.configure(replace(self.config, tenants=others))

    def directory(self, name: str) -> Directory:
        # Return the directory of a tenant; KeyError, or StoreError if it cannot be used.
        directory = self.directories[name]
        if isinstance(directory, Unopened):
            directory = self._opened(name) or directory
        if isinstance(directory, StoreError):
            raise directory.with_traceback(None)  # it would grow
        return directory

    @property
    def available(self) -> list[Directory]:
        return [item for item in self.directories.values() if isinstance(item, Directory)]

    @property
    def failures(self) -> dict[str, StoreError]:
        # Why tenants are not served, by their names.
        return {
            name: error
            for name, error in self.directories.items()
            if isinstance(error, StoreError) and not isinstance(error, Unopened)
        }

    # -- Credentials --

    def token(self, name: str, kind: type[Token] = Token) -> str:
        # Return a new secret of a tenant, valid while the tenant is served; KeyError.
        secret = self._new_secret(f"{kind.__name__} {name}")
        with self._configuring:
            self._temporary.add((self.tenants[name].name, kind("made", digest(secret))))
            self._index_credentials()
        return secret

    def client(self, name: str) -> tuple[str, str]:
        # Return id and secret of a new client of a tenant, valid like those of token().
        return "made", self.token(name, Client)

    def _index_credentials(self) -> None:
        # Find credentials by the hash of their secret, or by the entry that is in access tokens.
        pairs = self.config.credentials + [
            (self.tenants[name], item) for name, item in self._temporary
        ]
        self._credentials = {
            key: (tenant, item)
            for tenant, item in pairs
            for key in (item.sha256, f"{tenant.name} {item.entry}")
        }

    def known_caller(self, request: Request) -> Caller | None:
        # Return who sent a request, by the configuration; None for an unknown credential.
        if request.caller is not None:
            return request.caller or None
        scheme, secret = credentials_of(request)
        pair = self._credentials.get(digest(secret)) if scheme == "bearer" and secret else None
        if pair and type(pair[1]) is Token:
            return self._caller(*pair)
        caller = self._holder_of_access_token(secret) if scheme == "bearer" else None
        return caller or self._holder(Token, request.headers.get("authorization", ""), "bearer ")

    def _holder(
        self, kind: type[Token], text: str, scheme: str = "", id: str = ""
    ) -> Caller | None:
        # Return whose secret a text is; refused if it was sent with a mistake.
        for secret, mistake in readings(text, scheme):
            if secret and (pair := self._credentials.get(digest(secret))):
                name = pair[1].name
                if type(pair[1]) is not kind:
                    mistake = f"in the place of a {kind.__name__.lower()}'s"
                elif id and not is_same(id, name):
                    mistake = "with another Client Identifier"
                return self._caller(*pair, ("malformed", name, mistake) if mistake else ())
        return None

    def _holder_of_access_token(self, text: str) -> Caller | None:
        # Return the client that an access token was issued to, as if its secret had that end.
        end, _, entry = decoded(text, SIGNATURE_LENGTH).partition(" ")
        pair = self._credentials.get(entry)
        caller = self._caller(*pair) if pair else None
        # A database that is not open cannot verify it: then _answer() asks again.
        if not pair or not caller or isinstance(caller.directory, StoreError):
            return caller
        if not is_same(text, access_token(*pair, caller.directory, end)):
            return None
        client = replace(pair[1], expires=datetime.fromtimestamp(float(end), UTC))
        return self._caller(pair[0], client)

    def _caller(
        self, tenant: Tenant, credential: Token, refusal: tuple[str, ...] = ()
    ) -> Caller | None:
        # How often the clock is read must not depend on how a request arrives, for running().
        if credential.expires and not refusal and credential.expired(self._clock()):
            refusal = "expired", credential.name, f"{credential.expires:%Y-%m-%d %H:%M} UTC"
        directory = self.directories.get(tenant.name)  # None: it was removed at this moment
        return Caller(tenant, credential, directory, refusal) if directory else None

    # -- Databases --

    def _open(
        self, config: Config, tenant: Tenant, is_needed: bool = True
    ) -> Directory | StoreError:
        # Return the directory of a tenant, the present one if it fits, or why there is none.
        location = store_location(config, tenant)
        current = self.directories.get(tenant.name)
        store = current.store if isinstance(current, Directory) else None
        if store and store.database.location != location:
            current = store = None
        options: dict[str, Any] = {
            "keep": config.keep_changes,
            "keep_days": config.keep_days,
            "keep_values": tenant.log_values,
            "max_deactivations": tenant.max_deactivations,
        }
        if (
            isinstance(current, Directory)
            and current.custom_fields == tenant.custom_fields
            and current.roles == tenant.roles
        ):
            vars(current).update(options)
            return current
        try:
            if is_postgres(location) and not store:
                if location in self._databases and not is_needed:
                    return Unopened("it is opened by the first request")
                database = self._databases.setdefault(location, PostgresDatabase(location))
                store = Store(database, tenant.name)
            directory = Directory(
                # An empty file must not take the place of one that is lost.
                store or Store(location, must_exist=isinstance(current, Damaged)),
                tenant.custom_fields,
                self._clock,
                self._new_id,
                new_secret=lambda purpose: self._new_secret(f"{purpose} {tenant.name}"),
                **options,
                roles=dict(tenant.roles),
                tenant=tenant.name,
            )
        except StoreError as error:
            # It keeps no traceback, whose variables would keep the file open.
            return (
                current if isinstance(current, Damaged) else type(error)(str(error), error.reason)
            )
        return directory

    def _opened(self, name: str) -> Directory | StoreError | None:
        # Return the directory of a tenant after another attempt to open it; None for no tenant.
        tenant = self.tenants.get(name)
        directory = self._open(self.config, tenant) if tenant else None  # others need not wait
        with self._configuring:
            current = self.directories.get(name)
            if directory and isinstance(current, StoreError) and self.tenants.get(name) is tenant:
                self.directories[name] = current = directory
            elif isinstance(directory, Directory) and directory is not current:
                directory.store.close()  # another thread was faster
        return current

    def _fail(self, name: str, error: Exception) -> None:
        # Stop serving a tenant whose database is damaged, until it can be opened again.
        directory = self.directories.get(name)
        if isinstance(error, Damaged) and isinstance(directory, Directory):
            # Without the traceback, whose variables would live on.
            self.directories[name] = Damaged(str(error), error.reason)
            directory.store.close()  # so that the file can be replaced
            LOG.error("tenant %s is not served, the others are: %s", name, error)

    @staticmethod
    def _watch(reference: weakref.ref[Application], closing: threading.Event) -> None:
        # In a thread: check all databases, a table at a time, and open again those that failed.
        rest = 0.0
        while not closing.wait(rest) and (application := reference()):
            started, is_checking = time.monotonic(), False
            for name, directory in list(application.directories.items()):
                try:
                    if isinstance(directory, Directory):
                        is_checking |= directory.store.database.verify(pages=not is_checking)
                    elif not isinstance(directory, Unopened):
                        application._opened(name)
                except StoreError as error:
                    application._fail(name, error)
            del application
            # At most a quarter of one processor: requests come first.
            rest = max(3 * (time.monotonic() - started), 0.01 if is_checking else 1)

    # -- The table of routes, emptying, closing --

    def _rows(self, page: str) -> list[RouteRow]:
        # Methods, path, who may call, lane, operation.
        health, page_answer = plain_response("ok\n", "text/plain"), page_response(page)
        bulk = partial(run_bulk, self._perform, self._finish)
        log, setup, causes = map(self._with_log, (get_log, get_setup, get_causes))
        changes = partial(list_changes, self.usage)
        # fmt: off
        return [
            ("GET",    "/healthz",                       PROBE,    QUICK, lambda call: health),
            ("GET",    "/readyz",                        PROBE,    READ,  self._get_readiness),
            ("GET",    "/metrics",                       OPERATOR, READ,  lambda call:
                self.metrics.answer(self.config, self._clock())),
            ("POST",   TOKEN_PATH,                       ANYONE,   READ,  self._grant_access),
            ("GET",    "/scim/v2",                       BEARER,   READ,  list_resources),
            ("GET",    "/scim/v2/ServiceProviderConfig", BEARER,   QUICK, get_documents),
            ("GET",    "/scim/v2/Schemas",               BEARER,   QUICK, get_documents),
            ("GET",    "/scim/v2/Schemas/{id}",          BEARER,   QUICK, get_documents),
            ("GET",    "/scim/v2/ResourceTypes",         BEARER,   QUICK, get_documents),
            ("GET",    "/scim/v2/ResourceTypes/{id}",    BEARER,   QUICK, get_documents),
            ("GET POST PUT PATCH DELETE", "/scim/v2/Me", BEARER,   QUICK, refuse_me),
            ("POST",   "/scim/v2/Bulk",                  BEARER,   BULK,  bulk),
            ("POST",   "/scim/v2/.search",               BEARER,   READ,  search_resources),
            ("POST",   "/scim/v2/{type}/.search",        BEARER,   READ,  search_resources),
            ("GET",    "/scim/v2/{type}",                BEARER,   LOOKUP, list_resources),
            ("POST",   "/scim/v2/{type}",                BEARER,   WRITE, create_resource),
            ("GET",    "/scim/v2/Users/{id}",            BEARER,   LOOKUP, get_resource),
            ("GET",    "/scim/v2/Groups/{id}",           BEARER,   READ,  get_resource),
            ("PUT",    "/scim/v2/{type}/{id}",           BEARER,   WRITE, replace_resource),
            ("PATCH",  "/scim/v2/{type}/{id}",           BEARER,   WRITE, patch_resource),
            ("DELETE", "/scim/v2/{type}/{id}",           BEARER,   WRITE, delete_resource),
            ("GET",    "/employees",                     BEARER,   READ,  list_employees),
            ("GET",    "/employees/{id}",                BEARER,   READ,  get_employee),
            ("GET",    "/changes",                       BEARER,   SLOW,  changes),
            ("GET",    "/",                              ANYONE,   QUICK, lambda call: page_answer),
            # The console's reads are not part of the provisioning, and not in its log.
            ("GET",    "/console/api/{type}",            BEARER,   READ,  list_resources),
            ("GET",    "/console/api/log",               BEARER,   SLOW,  log),
            ("GET",    "/console/api/causes",            BEARER,   SLOW,  causes),
            ("GET",    "/console/api/setup",             BEARER,   READ,  setup),
            ("GET",    "/console/api/mapping",           BEARER,   READ,  get_mapping),
            ("GET",    "/console/api/employees",         BEARER,   READ,  find_employees),
            ("GET",    "/console/api/names",             BEARER,   READ,  get_names),
            ("GET",    "/console/api/history/{id}",      BEARER,   READ,  get_history),
        ]
        # fmt: on

    def _with_log(self, get: Callable[[ProvisioningLog, Call], Response]) -> Operate:
        return lambda call: get(self.log, call)  # which reset() replaces

    def interrupt(self) -> None:
        """End all long polls, permanently."""
        for directory in self.available:
            directory.store.interrupt()

    def reset(self) -> None:
        """Empty all tenants, as if their stores were new; all tokens stay valid. StoreError."""
        self.log.close()  # writes what is on its way
        try:
            for directory in map(self.directory, self.tenants):
                with directory.store.writing() as session:
                    session.clear()
                    directory.prepare(session)
        finally:  # the server goes on even if a tenant cannot be emptied
            self.log = ProvisioningLog(self.usage)

    def close(self) -> None:
        """Write the logs and close the stores; the application cannot be used afterwards."""
        self.closing.set()
        self.log.close()
        with self._configuring:  # the configuration may be reloaded at this moment
            for directory in self.available:
                directory.store.close()
            for database in self._databases.values():
                database.close()

    # -- Requests --

    def handle(self, request: Request) -> Response:
        """Return the answer to a request; every failure is a SCIM error (RFC 7644 §3.12)."""
        return self._finish(*self._perform(request))

    def handle_all(self, requests: Sequence[Request]) -> list[Response]:
        """Return the answers to writes of one tenant: each whole or not at all, all in one commit.

        The first request shows which tenant that is.
        """
        if len(requests) == 1:  # needs no savepoint
            return [self.handle(requests[0])]
        started, responses = time.perf_counter(), list[Response]()
        calls = [Call(request, *self.find_route(request.path)) for request in requests]
        try:
            if not (caller := self.caller_of(requests[0])):
                raise unauthorized(requests[0])
            with self._directory_of(caller).store.writing():
                responses = list(map(self._answer, calls))
        except Exception as error:  # noqa: BLE001  a commit that fails undoes all of them
            # After an error such as a full disk nothing can be committed: that error is the cause.
            cause = next((answer for answer in responses if answer.status == 507), None)
            responses = [cause or error_response(error)] * len(calls)
        return [
            self._finish(call, response, time.perf_counter() - started)
            for call, response in zip(calls, responses, strict=True)
        ]

    def caller_of(self, request: Request) -> Caller | None:
        """Return who sent a request; the hook is asked about a token that no tenant has."""
        if not self.must_ask(request) or not self._authenticate:
            return self.known_caller(request)
        try:
            name = self._authenticate(credentials_of(request)[1])
        except (Exception, SystemExit) as error:  # noqa: BLE001  its text may hold the secret
            raise ScimError(
                503, "", f"the authenticate hook failed ({type(error).__name__})", RETRY
            ) from None
        tenant = self.tenants.get(name) if isinstance(name, str) else None
        return self._caller(tenant, Token("authenticate")) if tenant else None

    def must_ask(self, request: Request) -> bool:
        """Return whether only the hook can tell who sent a request; it may take its time."""
        if not self._authenticate or request.caller is not None:
            return False
        scheme, secret = credentials_of(request)
        return scheme == "bearer" and bool(secret) and not self.known_caller(request)

    def check_head(self, request: Request) -> None:
        """Raise ScimError 401, 404, 405, 415 or 503 if the head of a request decides on that."""
        call = Call(request, *self.find_route(request.path), caller=self.known_caller(request))
        try:
            self._check_head(call)
        except ScimError as error:
            self._finish(call, error_response(error, call.route.label), 0)  # for the log
            raise

    def lane_of(self, request: Request) -> str:
        """Return the lane of a request; never waits."""
        route, id = self.find_route(request.path)
        lane, _ = route.operations.get(request.method, (QUICK, None))
        if route.access not in (BEARER, NOWHERE):
            return lane
        if not (caller := self.known_caller(request)) or caller.refusal:
            return QUICK
        if isinstance(directory := caller.directory, StoreError):
            return SLOW if isinstance(directory, Unopened) else QUICK
        if lane == SLOW and "wait" not in unquote(request.query).lower():
            lane = READ
        database = directory.store.database
        if lane == LOOKUP:
            # With a store in memory, readers wait for the writer.
            small = LOOKUP if database.is_remote else QUICK if database.is_quick else READ
            lane = small if id or QUICK_QUERIES[route.type].fullmatch(request.query) else READ
        return REMOTE if lane == READ and database.is_remote else lane

    def body_limit(self, path: str) -> int:
        """Return how many octets the body of a request to a path may have."""
        route, _ = self.find_route(path)
        limit = MAX_BODY if route.access == BEARER else MAX_PUBLIC_BODY
        return MAX_BULK_BODY if route.label == "/Bulk" or route.access == CONTROL else limit

    def find_route(self, path: str) -> tuple[Route, str]:
        """Return the route of a path, literal ones first, and the id in the path."""
        segments = [unquote(part) if "%" in part else part for part in path.split("/") if part]
        if route := self._routes.get(tuple(segments)):
            return route, ""
        route = self._routes.get((*segments[:-1], "{id}"))
        if route and "\0" not in segments[-1]:
            return route, segments[-1]
        # At an unknown path below /scim/v2, 401 comes before 404.
        return Route("", BEARER if segments[:2] == ["scim", "v2"] else NOWHERE), ""

    def _perform(self, request: Request) -> Performed:
        started, call = time.perf_counter(), Call(request, *self.find_route(request.path))
        return call, self._answer(call), time.perf_counter() - started

    def _answer(self, call: Call) -> Response:
        request, access = call.request, call.route.access
        try:
            if access in (BEARER, NOWHERE):  # the log shows calls to unknown paths, too
                call.caller = self.caller_of(request)
            self._check_head(call)
            if call.caller and access == BEARER:
                directory = self._directory_of(call.caller)
                if isinstance(call.caller.directory, StoreError):
                    # Only now that the database is open, an access token can be verified.
                    caller = self.caller_of(request._replace(caller=None))
                    call.request = request._replace(caller=caller or False)
                    return self._answer(call)
                call.directory = directory.on_behalf_of(call.caller.credential.name)
                call.caller = call.caller._replace(directory=call.directory)
            if request.query:
                call.parameters = {
                    name.lower(): value
                    for name, value in parse_qsl(request.query, keep_blank_values=True)
                }
            _, operation = call.route.operations[request.method]
            return operation(call)
        except Exception as error:  # noqa: BLE001  a bug of ours must not cut the connection
            self._fail(call.caller.tenant.name if call.caller else "", error)
            return error_response(error, call.route.label)

    def _directory_of(self, caller: Caller) -> Directory:
        # Return the directory of a caller's tenant, opened if need be, or raise ScimError 503.
        try:
            return self.directory(caller.tenant.name)
        except (StoreError, KeyError) as error:  # KeyError: the tenant was removed at this moment
            # Another reason may name another tenant, or a path on this machine.
            reason = f" ({error.reason})" if isinstance(error, Damaged) else ""
            raise ScimError(
                503,
                "",
                f"the tenant's database cannot be used{reason}; the server's log says why",
                RETRY,
            ) from None

    def _grant_access(self, call: Call) -> Response:
        # Answer POST /oauth2/token: an access token for a client (RFC 6749 §4.4).
        form = token_request(call.request)
        if form.get("grant_type") != "client_credentials":
            code = "unsupported_grant_type" if "grant_type" in form else ""
            raise ScimError(400, code, "grant_type: expected client_credentials")
        call.request = call.request._replace(body=b"")  # which held the secret
        call.caller = caller = self._holder(Client, form["client_secret"], id=form["client_id"])
        if not caller or caller.refusal:
            raise invalid_client(
                "the client is unknown or expired, or its secret is wrong; check both in Entra ID",
                reason=caller.refusal if caller else ("unknown",),
            )
        tenant, client, *_ = caller
        directory, now = self._directory_of(caller), self._clock()
        seconds = min(ACCESS_SECONDS, int(client.time_left(now).total_seconds()))
        token = access_token(tenant, client, directory, str(now.timestamp() + seconds))
        scope = {"scope": form["scope"]} if "scope" in form else {}
        return plain_response(
            {"access_token": token, "token_type": "Bearer", "expires_in": seconds, **scope},
            Pragma="no-cache",
        )

    def _admit_operator(self, request: Request, access: str) -> None:
        # Raise ScimError 421 for a host name that is not this server's: a page on the Web can let a
        # name of its own stand for this machine (DNS rebinding), but not an address. Then raise 401
        # for /metrics unless the request is from this machine or has the metrics token.
        name = re.sub(r":\d+$", "", request.host).rstrip(".").lower()
        if not re.fullmatch(r"[\d.]+|\[.*\]", name, re.ASCII) and (
            name not in ("localhost", self.config.host.lower(), *self.config.host_names)
        ):
            raise ScimError(421, "", f"host: {quoted(name)} is not one of the host_names")
        is_local = request.client in ("127.0.0.1", "::1") and not (
            {"forwarded", "x-forwarded-for"} & request.headers.keys()
        )
        # A browser names the server whose page sends a request.
        is_own = request.headers.get("origin") in (None, f"{request.scheme}://{request.host}")
        if access == CONTROL and not (is_local and is_own):
            raise ScimError(
                403,
                "",
                f"{request.path} is for programs on this machine, not for proxies and other pages",
            )
        if (
            access == OPERATOR
            and not is_local
            and not is_same(digest(credentials_of(request)[1]), self.config.metrics_sha256)
        ):
            raise ScimError(
                401,
                "",
                "/metrics: on loopback, or with metrics_token as bearer token",
                {"WWW-Authenticate": "Bearer"},
                unauthorized(request).reason,
            )

    def _check_head(self, call: Call) -> None:
        # Raise ScimError 401, 404, 405, 415 or 503 for a request that no body can make good.
        request, access, operations = call.request, call.route.access, call.route.operations
        if access == BEARER and (not call.caller or call.caller.refusal):
            raise unauthorized(request, call.caller)
        if access in (PROBE, OPERATOR, CONTROL):
            self._admit_operator(request, access)
        if not operations:
            raise ScimError(
                404,
                "",
                f"{request.path} does not exist (case matters); "
                f"Users and Groups follow {BASE_PATH}",
                reason=("path", request.path, BASE_PATH),
            )
        if request.method not in operations:
            allow = call.route.allow
            raise ScimError(
                405,
                "",
                f"{request.method} is not for {request.path}; it takes {allow['Allow']}",
                allow,
            )
        if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
            raise ScimError(
                415,
                "",
                f"Content-Encoding: {quoted(coding)} is not supported; send the body as it is",
                {"Accept-Encoding": "identity"},
            )
        if isinstance(request.body, bytes):  # else it is an operation of a bulk request
            self.usage.check_memory(request.tenant)
        lane, _ = operations[request.method]
        if lane in (WRITE, BULK) and call.caller:
            call.caller.check_write()

    def _get_readiness(self, call: Call) -> Response:  # each file and each server answers
        with suppress(StoreError):
            for database in {directory.store.database for directory in self.available}:
                database.check()
            if not self.failures:
                return plain_response("ready\n", "text/plain")
        return Response(503, "not ready\n", {"Content-Type": "text/plain", **RETRY})

    def _finish(self, call: Call, response: Response, seconds: float) -> Response:
        # Note a call in the log of its tenant; name tenant and route in the answer, for other logs.
        with suppress(Exception):  # a failing log must not stop the answer
            self.log.note(call, response, self._clock(), seconds)
        if response.status == 401:
            return response
        tenant = call.caller.tenant.name if call.caller and not call.caller.refusal else ""
        return Response(*response[:3], tenant, call.route.label, response.reason)


# ----------------------------------------------------------------------------
# 17. Test aids
#
# For the test of a SCIM client: faults to inject, the journal of what it sent, the clock,
# and the control API, by which tests in any language use all of this.
# Uses chapters 1, 2, 9 to 12, 14 and 16. Knows nothing of sockets.
# ----------------------------------------------------------------------------

MAX_JOURNAL, CONTROL_PATH = 1_000, "/_test"  # requests that a test may inspect
FIRST_TICK = datetime(2026, 1, 1, tzinfo=UTC)  # of a deterministic clock

# -- Faults --------------------------------------------------------------------------


def delay_range(value: Json) -> Json:
    # Return the least and the most seconds of a delay that is a number or such a pair.
    least, most = value if isinstance(value, (list, tuple)) else (value, value)
    return (least, most) if 0 <= least <= most <= 3_600 else None


# How a fault damages the body of an answer.
# fmt: off
DAMAGES: dict[str, Callable[[Response], Response]] = {
    "":      lambda answer: answer,
    "json":  lambda answer: answer._replace(body=body_text(answer.body)[:-1]),  # lacks its end
    "empty": lambda answer: answer._replace(body=""),
    "type":  lambda answer: answer._replace(
        headers={**answer.headers, "Content-Type": "text/html"}),
}
ANY_TEXT = (lambda value: value if isinstance(value, str) else None, "text")
COUNTER = (lambda value: value if type(value) is int and value >= 0 else None, "a whole number")
# The members of a fault: their rules and defaults.
FAULT: dict[str, Any] = {
    # That of the answer instead, and the request is not executed. 401 is as for an expired token,
    # 412 as for an ETag that is not current.
    "status": setting((lambda value: value if COUNTER[0](value) in (0, *range(400, 600)) else None,
                       "a status from 400 to 599"), 0),
    # It lets `after` requests pass, then meets `times` (None: all), each with a probability. The
    # seed makes that repeatable.
    "times": setting((lambda value: {"times": value} if value is None or COUNTER[0](value)
                      else None, "a whole number from 1 on, or null for always"), 1),
    "after": setting(COUNTER, 0),
    "probability": setting((lambda value: value if 0 < value <= 1 else None,
                            "a number above 0, at most 1"), 1),
    "seed": setting(COUNTER, 0),
    # The requests that it is for; "" stands for all.
    "method": setting(text_of("(?i:GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS)?",
                              "a method such as PATCH", convert=str.upper), ""),
    "path": setting(ANY_TEXT, ""),   # text that the path contains
    "query": setting(ANY_TEXT, ""),  # text that the decoded query contains
    "body": setting((lambda value: value if isinstance(value, str) or callable(value) else None,
                     "text that the body contains"), ""),  # or a function of the Request
    "tenant": setting(ANY_TEXT, ""),
    # What it does besides.
    "delay": setting((delay_range, "seconds up to 3600, or a pair of them"), (0, 0)),
    "cut": setting(FLAG, False),   # close the connection in the middle of the answer's body
    "drop": setting(FLAG, False),  # close it without any octet of an answer
    "damage": setting((lambda value: value if value in DAMAGES else None,
                       "json, empty or type"), ""),
    "headers": setting((lambda value: {"headers": dict(value)} if all(
        FIELD_LINE.fullmatch(f"{name}: {text}".encode()) for name, text in dict(value).items())
        else None, "an object of header fields"), {}),  # those that the answer has, too
}
# fmt: on


class Fault(SimpleNamespace):
    """A fault that meets some requests: Fault(429, times=2, method="GET", path="/Users").

    The arguments, which are also its attributes, are the members of FAULT. passed is how many
    requests have matched, and fired how many it has met. ConfigError names a wrong argument.
    """

    def __init__(self, status: int = 0, **members: Any) -> None:
        members = ConfigReader().result("fault", {"status": status, **members}, FAULT)
        super().__init__(**members, passed=0, fired=0)

    def __getattr__(self, name: str) -> Any:
        # Return the default of a member that was not given.
        return FAULT[name].default if name in FAULT else object.__getattribute__(self, name)

    def meets(self, request: Request) -> bool:
        """Return whether this request meets the fault, and count it."""
        matches = bool(
            self.fired != self.times
            and self.method in ("", request.method)
            and self.tenant in ("", request.tenant)
            and self.path in request.path
            and self.query in unquote(request.query.replace("+", " "))
            and (
                self.body(request)
                if callable(self.body)
                else self.body in request.body.decode(errors="replace")
            )
        )
        self.passed += matches
        meets = (
            matches
            and self.passed > self.after
            and random.Random(f"{self.seed} {self.passed}").random() < self.probability
        )
        self.fired += meets
        return meets

    def answer(
        self,
        request: Request,
        handle: Callable[[Request], Response],
        wait: Callable[[float], object],
    ) -> Response:
        # Return the answer with its damage; handle executes the request, if no status is set.
        wait(random.uniform(*self.delay))
        answer = (
            error_response(self._error(request), request.path) if self.status else handle(request)
        )
        answer = answer if answer.body is None else DAMAGES[self.damage](answer)
        return answer._replace(headers={**answer.headers, **self.headers})

    def _error(self, request: Request) -> ScimError:
        stale = "If-Match: the version has changed; read the resource again"
        return (
            unauthorized(request)
            if self.status == 401
            else ScimError(
                self.status,
                "",
                stale if self.status == 412 else "injected fault",
                {"Retry-After": "1"} if self.status in (429, 503) else {},
            )
        )

    def octets(self, head: bytes, body: bytes) -> bytes:
        # Return what is sent of an answer. A cut leaves nothing of one without a body.
        end = len(body) // 2 if self.cut else len(body)
        return b"" if self.drop or (self.cut and not end) else head + body[:end]


# -- The control of a server under test ----------------------------------------------


class Exchange(SimpleNamespace):
    """A request and the status of its answer, for a test to inspect; secrets are left out.

    Attributes: method, path, query, headers (names in lower case), json (of the body, None if it is
    none), status, tenant, and at, the time of the answer.
    """


class Control:
    """What a test controls of a server: its content, clock, ids and secrets, faults, the journal.

    The clock is one to start from. With deterministic, ids and secrets count up, and so does the
    clock if none is given: it starts in 2026, and advances a millisecond each time it is read. The
    journal keeps the newest requests, at most `keep`, and dropped counts the others. has_api adds
    the control API to the server.
    """

    application: Application  # that of the server

    def __init__(
        self,
        clock: Clock | None = None,
        deterministic: bool = False,
        keep: int = 0,
        has_api: bool = False,
    ) -> None:
        self._deterministic, self._keep, self._lock = deterministic, keep, threading.Lock()
        self._clock = clock or (
            (lambda: FIRST_TICK + timedelta(milliseconds=next(self._counts["tick"])))
            if deterministic
            else utc_now
        )
        self.faults: list[Fault] = []
        self.restart()
        self.rows = control_rows(self) if has_api else []

    def restart(self) -> None:
        # Start again with ids, secrets and the clock, without faults and with an empty journal.
        self._counts = defaultdict[str, Iterator[int]](itertools.count)
        self._offset, self._frozen = timedelta(), cast("datetime | None", None)
        self.request_ids = map(
            f"{self.new_secret('request ids')[:8]}-{{}}".format, itertools.count(1)
        )
        self.faults.clear()
        self.forget_requests()

    def reset(self) -> None:
        """Empty all tenants, and restart; secrets that were issued stay valid. StoreError."""
        self.restart()
        self.application.reset()

    # -- The clock, ids and secrets --

    def now(self) -> datetime:
        return self._frozen or self._clock() + self._offset

    def new_id(self) -> str:
        return (
            str(uuid.UUID(int=next(self._counts["id"]) + 1)) if self._deterministic else random_id()
        )

    def new_secret(self, purpose: str) -> str:
        return (
            digest(f"{purpose} {next(self._counts[purpose])}")
            if self._deterministic
            else random_secret(purpose)
        )

    def adjust_clock(
        self,
        set: datetime | None = None,
        advance: timedelta = timedelta(),
        freeze: bool | None = None,
    ) -> Json:
        """Set the clock, advance it, stop it or let it go on; return {"now": …, "frozen": …}.

        ScimError 400 for a time that is not in the years 1970 to 8999.
        """
        now = (set or self.now()) + advance
        if not 1970 <= now.year < 9000:
            raise invalid_value(f"clock: {now:%Y} is not in the years 1970 to 8999")
        frozen = bool(self._frozen) if freeze is None else freeze
        self._offset, self._frozen = now - self._clock(), now if frozen else None
        return {"now": time_text(now), "frozen": frozen}

    def advance(self, **duration: float) -> None:
        """Advance the clock; the arguments are those of timedelta, such as days=1."""
        self.adjust_clock(advance=timedelta(**duration))

    # -- Faults and the journal --

    def fault_for(self, request: Request) -> Fault | None:
        # Return the first fault that a request meets; calls of the control API meet none.
        with self._lock:
            return next(
                (
                    fault
                    for fault in self.faults
                    if self.application.find_route(request.path)[0].access != CONTROL
                    and fault.meets(request)
                ),
                None,
            )

    def unspent(self) -> list[Fault]:
        """Return the faults that no request has met."""
        return [fault for fault in self.faults if not fault.fired]

    def note(self, request: Request, response: Response, now: datetime) -> None:
        """Append a request to the journal, without the secrets in its head."""
        if self._keep and (route := self.application.find_route(request.path)[0]).access != CONTROL:
            json, is_secret = None, route.label == TOKEN_PATH
            with suppress(ScimError):  # it is malformed
                json = None if is_secret else parse_body(request)
            exchange = Exchange(
                method=request.method,
                path=request.path,
                query=request.query,
                headers={
                    name: REDACTED if SECRET.search(name) else value
                    for name, value in request.headers.items()
                },
                json=json,
                status=response.status,
                tenant=response.tenant,
                at=time_text(now),
            )
            with self._lock:
                self.dropped += len(self.journal) == self._keep
                self.journal.append(exchange)

    def requests(
        self, method: str = "", path: str = "", status: int = 0, tenant: str = "", since: str = ""
    ) -> list[Exchange]:
        """Return the exchanges of the journal that match all conditions.

        path is a text that the path contains, since a dateTime. A line in the log says how many the
        journal has dropped.
        """
        if self.dropped or not self._keep:  # which a server without a journal cannot count
            LOG.warning("the journal has dropped %s earlier requests", self.dropped or "all")
        return [
            item
            for item in list(self.journal)
            if method.upper() in ("", item.method)
            and path in item.path
            and status in (0, item.status)
            and tenant in ("", item.tenant)
            and date_time_key(item.at) >= (since and date_time_key(since))
        ]

    def forget_requests(self) -> None:
        self.journal, self.dropped = deque[Exchange](maxlen=self._keep), 0


# -- The control API: the same over HTTP ---------------------------------------------


GROUP_SEED = (  # a member is a name or an id, alone or as the value of an object
    lambda group: (
        group
        if all(
            isinstance(item.get("value") if isinstance(item, dict) else item, str)
            for item in list(group.get("members") or ())
        )
        else None
    ),
    "an object with members that are texts",
)


def operate(name: str, rules: dict[str, Any], act: Callable[..., Any], call: Call) -> Response:
    # Answer a call of the control API: act() takes the members of the body, or of the URL's query.
    document = call.json() if call.request.body else dict(call.parameters)
    try:
        return plain_response(act(**ConfigReader().result(name, document, rules)) or {})
    except ConfigError as error:
        raise invalid_value("; ".join(error.problems)) from None


def control_rows(control: Control) -> list[RouteRow]:
    """Return the routes of the control API."""
    # fmt: off
    text = setting(ANY_TEXT, "")
    tenant = (lambda name: name if name in control.application.tenants else None,
              "the name of a tenant")
    actions: tuple[tuple[str, str, Callable[..., Any], dict[str, Any]], ...] = (
        ("POST",   "reset",    control.reset, {}),
        ("POST",   "seed",     lambda tenant, **resources: {
            "ids": control.application.directory(tenant).seed(resources)}, {
            "tenant": setting(tenant), "Users": setting([LIST, OBJECT], ()),
            "Groups": setting([LIST, GROUP_SEED], ())}),
        ("POST",   "token",    lambda tenant: {
            "token": control.application.token(tenant),
            **dict(zip(("client_id", "client_secret"), control.application.client(tenant)))}, {
            "tenant": setting(tenant)}),
        ("GET",    "clock",    control.adjust_clock, {}),
        ("POST",   "clock",    control.adjust_clock, {
            "set": setting(TIME, None), "freeze": setting(FLAG, None),
            "advance": setting((lambda value: timedelta(**value) if abs(timedelta(**value))
                                < timedelta(36_525) else None,
                                'less than a century, such as {"days": 1, "minutes": 30}'), None)}),
        ("GET",    "faults",   lambda: {"faults": [
            {**vars(item), "body": str(item.body)} for item in control.faults]}, {}),
        ("POST",   "faults",   lambda **members: control.faults.append(Fault(**members)),
         {**FAULT, "tenant": setting(tenant, "")}),
        ("DELETE", "faults",   control.faults.clear, {}),
        ("GET",    "requests", lambda **conditions: {
            "requests": list(map(vars, control.requests(**conditions))),
            "dropped": control.dropped}, {
            **dict.fromkeys(("method", "path", "tenant"), text),
            "status": setting((int, "a status such as 200"), 0),
            "since": setting((lambda value: date_time_key(value) and value, TIME[1]), "")}),
        ("DELETE", "requests", control.forget_requests, {}),
    )
    # fmt: on
    return [
        (method, f"{CONTROL_PATH}/{name}", CONTROL, SLOW, partial(operate, name, rules, act))
        for method, name, act, rules in actions
    ]


# ----------------------------------------------------------------------------
# 18. Connections                                         RFC 9110, RFC 9112
#
# Sockets: TLS, limits, deadlines, keep-alive. One thread watches all connections: it
# accepts, receives, and sends what the system did not take at once.
# Uses chapters 1, 9, 11 to 14 and 16. Knows nothing of SCIM but the form of its errors.
# ----------------------------------------------------------------------------

HEAD_SECONDS = 10  # for a head or a TLS handshake to arrive
# A body or an answer that moves no octet for STALL_SECONDS, or too few in PACE_SECONDS, is cut.
STALL_SECONDS, PACE_SECONDS, PACE_OCTETS = 10, 30, 30 * 1024
IDLE_SECONDS = 65
LINGER_SECONDS = 5  # for a client to read the answer to a request that was not read to its end
STOP_SECONDS = 10  # how long a stopping server waits for requests in flight
SWEEP_SECONDS = 1  # how often deadlines are checked
PAUSE_SECONDS = 0.05  # how long a read waits for its turn, or a full server before it accepts
RECEIVE_OCTETS = 16 * 1024  # at a time; also the size of a TLS record, of which nothing remains
IDLE, READING, ANSWERING, SENDING, LINGERING = (  # the states of a connection
    "idle",
    "reading",
    "answering",
    "sending",
    "lingering",
)
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def tls_context(*files: str) -> ssl.SSLContext:
    # Return the TLS context of a certificate and its key; OSError if they cannot be used.
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)  # of TLS 1.2 or later
    try:
        context.load_cert_chain(*files)
    except OSError as error:
        raise OSError(f"tls: {' and '.join(files)}: cannot be used ({error})") from error
    return context


# -- Connections --


class Connection:
    """A client: its socket, the octets that arrived, the answer that is not sent yet, a deadline.

    It belongs to the watching thread, except in the state ANSWERING, in which it belongs to the one
    thread that executes its request.
    """

    def __init__(self, socket: socket.socket, client: str, usage: Usage) -> None:
        socket.setblocking(False)
        self.socket, self.client, self.usage = socket, client, usage
        self.held = "", 0  # what it takes of usage: its tenant, and octets
        self.events = 0  # what the selector watches the socket for
        self.since = time.monotonic()  # when it came, or last had an answer with a good token
        self.buffer = bytearray()  # arrived and not parsed yet
        self.reader: Generator[bool, None, Request] | None = None  # of the request that arrives now
        self.request: Request | None = None  # whose head has arrived
        self.line, self.started = b"", 0.0  # its first line; when it began to arrive
        self.unsent = memoryview(b"")  # of the answer
        self.kept = True  # whether another request may come after it
        self.rest()

    def allow(self, seconds: float, pace: float = 0) -> None:
        # Set a deadline. With a pace, octets that move put it off, for pace seconds at most.
        self.deadline, self.moved = time.monotonic() + seconds, 0
        self.pace_end = pace and time.monotonic() + pace

    def note_moved(self, octets: int) -> None:
        # Octets of a body or an answer have moved. Those that come early earn no time for others.
        self.moved += octets
        if self.moved >= PACE_OCTETS:
            self.allow(STALL_SECONDS, PACE_SECONDS)
        elif octets:
            self.deadline = min(time.monotonic() + STALL_SECONDS, self.pace_end)

    def hold(self, tenant: str, octets: int) -> None:
        # Account for a request in flight, of a tenant or "", and for its body or its answer.
        self.usage.take((self.held[0], -1, -self.held[1]), (tenant, 1, octets))
        self.held = (tenant, octets)

    def receive(self) -> bool:
        """Move the octets that arrived to the buffer; return False if the client has closed."""
        try:
            octets = self.socket.recv(RECEIVE_OCTETS)  # which also does the TLS handshake
        except OSError as error:
            if getattr(error, "reason", "") == "HTTP_REQUEST":  # answered past the TLS that failed
                warn_once("a client sent http to a port for https; use https:// there")
                with suppress(OSError):
                    socket.socket.recv(self.socket, RECEIVE_OCTETS)  # else the answer might be lost
                    socket.socket.send(
                        self.socket,
                        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
                        b"this port is for https://, not for http://\n",
                    )
            return isinstance(error, WOULD_BLOCK)
        self.buffer += octets
        if self.pace_end:  # they belong to a body
            self.note_moved(len(octets))
            self.hold(self.held[0], self.held[1] + len(octets))
        return bool(octets)

    def send(self, octets: bytes) -> None:
        """Send what the system takes without waiting and keep the rest in unsent."""
        if octets:
            self.unsent = memoryview(bytes(self.unsent) + octets if self.unsent else octets)
        try:
            while self.unsent:
                sent = self.socket.send(self.unsent)
                self.unsent = self.unsent[sent:]
                self.note_moved(sent)
        except WOULD_BLOCK:  # what is sent later stays in memory until all is sent
            self.hold(
                self.request.tenant if self.request else "",
                max(self.held[1], self.unsent.nbytes),
            )
        except OSError:  # the client is gone
            self.unsent, self.kept = memoryview(b""), False

    def has_unread(self) -> bool:
        with suppress(OSError):  # nothing has arrived, or the connection has ended
            return bool(socket.socket.recv(self.socket, 1, socket.MSG_PEEK))
        return False

    def rest(self) -> None:
        self.hold("", 0)
        self.allow(IDLE_SECONDS)  # first: from IDLE on, the watching thread may set another one
        self.state = IDLE


def listen(config: Config) -> socket.socket:
    # Return a socket that listens where a configuration says; port 0 picks a free one. OSError.
    try:
        return socket.create_server(
            (config.host, config.port),
            family=socket.AF_INET6 if ":" in config.host else socket.AF_INET,
            backlog=128,
            reuse_port=config.reuse_port,
        )
    except (OSError, OverflowError, ValueError) as error:  # no such port, no reuse_port here
        raise OSError(
            f"listen: {config.host}:{config.port} cannot be used: "
            f"{getattr(error, 'strerror', '') or error}"
        ) from error


def url_of(config: Config, port: int) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http{'s' * bool(config.tls)}://{host}:{port}{BASE_PATH}"


# -- The watching thread --


class Watcher:
    """One thread that watches all connections: accepts, receives, parses, sends the rest, closes.

    It alone uses the selector and the set of connections. A subclass reads, executes and refuses
    requests: execute() hands a connection to the thread that answers it, give_back() returns it.
    """

    # Read the next request from the buffer of a connection; ScimError for one to refuse.
    read_request: Callable[[Connection], Generator[bool, None, Request]]
    # Have a request answered, by this thread or another one, which then calls give_back().
    execute: Callable[[Connection, Request], None]
    # Answer a request that cannot be read, and close the connection after it.
    refuse: Callable[[Connection, ScimError], None]

    def __init__(self, application: Application, listener: socket.socket | None) -> None:
        self.application, config = application, application.config
        self._signature = file_signature(*config.tls or ())  # of the files of the TLS context
        self.tls = tls_context(*config.tls) if config.tls else None
        self.socket = listener or listen(config)
        self.socket.setblocking(False)
        # Its connections inherit this: an answer is not held back until the one before has arrived.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.server_address = self.socket.getsockname()
        self.events = 0  # what the selector watches this socket for: nothing while it is full
        self.connections: set[Connection] = set()
        self.thread: threading.Thread | None = None  # that watches, which only the first may
        self.stopping, self.stopped = threading.Event(), threading.Event()
        self._lock, self._first = threading.Lock(), threading.Lock()  # to give back, to start once
        self._returned: deque[Connection] = deque()  # to go on with
        self.closing = ExitStack()  # closes what the answers need, after the last one
        self.closing.callback(self.stopped.set)  # the last of its callbacks
        self._swept = 0.0  # when deadlines were checked last
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._alarm = socket.socketpair()  # the end to watch, the end to write to

    def start(self) -> None:
        """Serve in a thread of its own until stop(); RuntimeError if this is not the first time."""
        self._begin(threading.Thread(target=self._run)).start()

    def serve_forever(self) -> None:
        """Serve in this thread until stop(); RuntimeError if this is not the first time."""
        self._begin(threading.current_thread())
        self._run()

    def stop(self) -> None:
        """Accept nothing more, end long polls, wait for the other requests, close everything.

        Any thread may call this, even before start() and again. In the thread that serves, such as
        in a signal handler, it does not wait.
        """
        self.application.interrupt()  # which ends long polls
        self.stopping.set()
        with suppress(RuntimeError):  # it serves, or has stopped
            self.serve_forever()  # which only closes
        self._wake()
        if self.thread is not threading.current_thread():
            self.stopped.wait()

    def _begin(self, thread: threading.Thread) -> threading.Thread:
        if not self._first.acquire(blocking=False):
            raise RuntimeError("this server was started or stopped already; make another one")
        self.thread = thread
        return thread

    def _run(self) -> None:
        # Watch all connections until stopping is set, and then until all requests are answered.
        self._alarm.setblocking(False)
        with self.closing, self._selector, self._wakeup, self._alarm:
            self._selector.register(self._wakeup, selectors.EVENT_READ)
            self._watch(self, selectors.EVENT_READ)
            try:
                while not self.stopping.is_set():
                    self._round()
            finally:
                self.stop()  # if Ctrl-C ends the loop
                self._watch(self, 0)
                self.socket.close()
                end = time.monotonic() + STOP_SECONDS
                while self.connections:
                    self._round()
                    for peer in list(self.connections):
                        is_done = peer.state in (IDLE, LINGERING) and not peer.has_unread()
                        if is_done or time.monotonic() > end:
                            self._close(peer)

    def give_back(self, connection: Connection) -> None:
        # Go on with a connection whose request was answered; for the thread that answered it.
        with self._lock:
            if (
                connection.kept
                and connection.events
                and not (connection.unsent or connection.buffer or connection.reader)
                and not self.stopping.is_set()
            ):
                connection.rest()
                return
            self._returned.append(connection)
        self._wake()

    def guarded(self, action: Callable[..., None], connection: Connection, *more: Any) -> None:
        # Call action(connection, *more); if it raises, only this connection is lost.
        try:
            action(connection, *more)
        except Exception as error:  # noqa: BLE001
            error_response(error)  # logs it
            connection.unsent, connection.kept = memoryview(b""), False
            self.give_back(connection)

    def _wake(self) -> None:
        with suppress(OSError):  # many wake-ups wait already, or the thread has ended
            self._alarm.send(b"!")

    def _round(self) -> None:
        # Wait for events, for a time at most, and do what is due.
        seconds = 0 if self._returned else SWEEP_SECONDS if self.events else PAUSE_SECONDS
        ready = [key.data for key, _ in self._selector.select(seconds)]
        for peer in ready:
            match peer:
                case Connection():
                    self.guarded(self._on_event, peer)
                case None:
                    self._wakeup.recv(RECEIVE_OCTETS)
        for _ in range(len(self._returned)):
            if (connection := self._returned.popleft()) in self.connections:
                self.guarded(self._go_on, connection)
        if self in ready:  # may evict a connection, so those that have sent a request come first
            self._accept()
        elif not self.stopping.is_set():
            self._watch(self, selectors.EVENT_READ)
        if (now := time.monotonic()) > self._swept + SWEEP_SECONDS:
            self._swept = now
            for connection in list(self.connections):
                self.guarded(self._check_deadline, connection)

    def _accept(self) -> None:
        # Accept a connection; at the limit, another one makes room, or the newcomer waits.
        try:
            if (
                len(self.connections) >= self.application.config.max_connections
                and not self._evict()
            ):
                raise OSError("all connections are in use")
            client_socket, address = self.socket.accept()
            connection = Connection(client_socket, address[0], self.application.usage)
            if self.tls and (files := self.application.config.tls):
                self._renew_tls(files)
                # The handshake is part of receiving.
                connection.socket = self.tls.wrap_socket(
                    client_socket, server_side=True, do_handshake_on_connect=False
                )
                connection.allow(HEAD_SECONDS)
        except (BlockingIOError, ConnectionError, ssl.SSLError):
            pass  # another process has accepted it, or its client is gone
        except OSError as error:  # there is no room, or no file descriptor
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._evict():
                self._watch(self, 0)
        else:
            self.connections.add(connection)
            self._watch(connection, selectors.EVENT_READ)

    def _renew_tls(self, files: tuple[str, str]) -> None:
        # Load the certificate again if its files have changed and can be used.
        if (signature := file_signature(*files)) != self._signature:
            self._signature = signature  # also of unusable files, so that this is logged once
            try:
                self.tls = tls_context(*files)
            except OSError as error:
                LOG.error("%s; keeping the previous certificate", error)

    def _evict(self) -> bool:
        # Close the connection whose last good token is oldest; return False if all are busy.
        for connection in sorted(self.connections, key=lambda peer: peer.since):
            if not (
                connection.state == ANSWERING
                or (connection.state == SENDING and connection.held[0])  # it had a good token
                or (connection.state != LINGERING and connection.has_unread())
            ):
                self._close(connection)
                return True
        return False

    def _watch(self, peer: Connection | Watcher, events: int) -> None:
        # Have the selector watch a connection, or the listening socket, for events, or for none.
        if peer.events not in (0, events):
            with suppress(KeyError):  # Ctrl-C may have come before the last line of this
                self._selector.unregister(peer.socket)
        if events not in (0, peer.events):
            self._selector.register(peer.socket, events, peer)
        peer.events = events

    def _close(self, connection: Connection) -> None:
        self._watch(connection, 0)
        connection.hold("", 0)
        connection.socket.close()
        self.connections.discard(connection)

    def _on_event(self, connection: Connection) -> None:
        # Receive from a connection, or send to it what remains.
        if connection.state == ANSWERING:
            with self._lock:  # it may be given back at this moment
                if connection.state == ANSWERING:
                    self._watch(connection, 0)
        elif connection.state == SENDING:
            connection.send(b"")
            if not connection.unsent:
                self._go_on(connection)
        elif not connection.receive():
            self._close(connection)
        elif connection.state == LINGERING:
            connection.buffer.clear()
        elif connection.buffer:
            self._parse(connection)

    def _go_on(self, connection: Connection) -> None:
        # Do what comes after an answer, or after a part of a body that took its time.
        if connection.unsent:
            connection.state = SENDING
            connection.allow(STALL_SECONDS, PACE_SECONDS)
            self._watch(connection, selectors.EVENT_WRITE)
        elif not connection.kept:
            # To close it now would lose the answer: unread octets make the system reset it.
            connection.state = LINGERING
            with suppress(OSError):  # SSLSocket.shutdown() would end the encryption, too
                socket.socket.shutdown(connection.socket, socket.SHUT_WR)
            connection.hold("", 0)
            connection.allow(LINGER_SECONDS)
            self._watch(connection, selectors.EVENT_READ)
        else:
            if not connection.reader:
                connection.rest()
            self._watch(connection, selectors.EVENT_READ)
            if connection.buffer or connection.reader:
                self._parse(connection)

    def _check_deadline(self, connection: Connection) -> None:
        # Close a connection that was silent or slow for too long; answer a request that began.
        if connection.state == SENDING:
            # The system reports room when a third of its buffer is free, which may come late.
            self._on_event(connection)
        if connection.state == ANSWERING or connection.deadline > time.monotonic():
            return  # in this order, see rest()
        if connection.state == READING:
            self.refuse(
                connection,
                ScimError(
                    408,
                    "",
                    f"the request took too long: a head may take {HEAD_SECONDS} s; "
                    f"a body must have {PACE_OCTETS} octets in {PACE_SECONDS} s "
                    f"and no pause of {STALL_SECONDS} s",
                ),
            )
        else:
            self._close(connection)

    def _parse(self, connection: Connection) -> None:
        # Parse what has arrived, and execute or refuse the request that it is.
        connection.state = READING
        connection.reader = connection.reader or self.read_request(connection)
        try:
            if connection.pace_end:  # it is a body
                self.application.usage.check_memory(connection.held[0])
            if next(connection.reader):
                self._watch(connection, 0)  # an event would queue it a second time
                self._returned.append(connection)
        except StopIteration as end:
            connection.reader, connection.state = None, ANSWERING
            self.execute(connection, end.value)
        except ScimError as error:
            self.refuse(connection, error)


# ----------------------------------------------------------------------------
# 19. HTTP server                                         RFC 9110, RFC 9112
#
# An application behind the connections of chapter 18 and the parser of chapter 12. The
# watching thread answers what is quick. The other reads have a lane, writes have
# another, and what may wait for long has a thread of its own. Or the server is somebody
# else's (WSGI).
# Uses chapters 1 and 9 to 18. Knows nothing of SCIM but the form of its errors.
# ----------------------------------------------------------------------------

MAX_LANE_THREADS = 8
# A tenant's share of the reading threads. With MAX_POLLS it is less than the readers of a store, so
# that a quick look-up never waits for one.
MAX_READS = MAX_LANE_THREADS // 2
MAX_WRITES_PER_COMMIT, MAX_OCTETS_PER_COMMIT = 64, 64 * 1024  # octets of their bodies
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
http_date = lru_cache(2)(partial(formatdate, usegmt=True))  # the Date field of one second


# -- The access log --

TRACEPARENT = re.compile(  # of W3C's Trace Context
    "(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


def log_requests(style: str, lines: Iterable[dict[str, Any]]) -> None:
    """Log requests: a record's message is a line in a style, text or json.

    The parts of the line are attributes of the record, for the formatters of other programs.
    """
    for line in lines:
        line["time"] = time_text(line["time"])
        words = [str(value) or "-" for name, value in line.items() if name != "traceparent"]
        text = json.dumps(line) if style == "json" else " ".join(words)
        with suppress(Exception):  # a handler that fails must not stop the others
            ACCESS_LOG.info(text, extra={"reason": "", "traceparent": "", **line})


# -- Lanes --

Batch = list[tuple[Connection, Request]]


class Lane:
    """Threads for requests of one kind. Each tenant has a queue, and a share of the threads.

    answer() is called with the first of a tenant's requests, at most max_batch of them. A long body
    is taken alone: it is parsed before its transaction begins.
    """

    def __init__(self, share: int, answer: Callable[[Batch], None], max_batch: int = 1) -> None:
        self._share, self._answer, self._max_batch = share, answer, max_batch
        self._threads, self._lock = ThreadPoolExecutor(MAX_LANE_THREADS), threading.Lock()
        self._waiting = defaultdict[str, Batch](list)
        self._busy = Counter[str]()  # threads, by tenant

    def add(self, connection: Connection, request: Request) -> None:
        with self._lock:
            self._waiting[request.tenant].append((connection, request))
            if self._busy[request.tenant] < self._share:
                self._busy[request.tenant] += 1
                self._threads.submit(self._run, request.tenant)

    def _run(self, tenant: str) -> None:
        # Answer a batch of a tenant. Its next batch queues after those of other tenants.
        with self._lock:
            waiting = self._waiting[tenant]
            octets = itertools.accumulate(len(it.body) for _, it in waiting[: self._max_batch])
            batch = waiting[: max(1, sum(total <= MAX_OCTETS_PER_COMMIT for total in octets))]
            del waiting[: len(batch)]
        self._answer(batch)
        with self._lock:
            if waiting:
                self._threads.submit(self._run, tenant)
            else:
                self._busy[tenant] -= 1


# -- The server --


class HttpServer(Watcher):
    """An application on a socket: its configuration says with what TLS and how many connections.

    Raises OSError if the address or the certificate cannot be used.

    Quick requests are answered by the watching thread. Other reads take turns in a lane: threads
    that compete for the interpreter at each call of SQLite halve what all of them get done. Those
    that wait for another machine take no turns. The writes that wait for one tenant share a
    transaction.
    """

    def __init__(
        self, application: Application, listener: socket.socket | None, control: Control
    ) -> None:
        super().__init__(application, listener)
        config = application.config
        self.control, self.url = control, url_of(config, self.server_address[1])
        self.closing.callback(application.close)
        # Handlers write to a file or elsewhere, which may take its time. Lines wait for others for
        # 50 ms, and at most 10 000 of them wait for a slow handler.
        self.log = BackgroundWriter(partial(log_requests, config.access_log), 0.05, 10_000)
        self.closing.callback(self.log.close, 1)
        self._turn = threading.Lock()
        self._threads = ThreadPoolExecutor(config.max_connections, "asks or waits")
        self._lanes: dict[str, Callable[[Connection, Request], object]] = {
            QUICK: self._answer,
            READ: Lane(MAX_READS, self._answer_in_turn).add,
            LOOKUP: Lane(MAX_READS, self._answer_each).add,
            REMOTE: Lane(MAX_READS, self._answer_each).add,
            WRITE: Lane(1, self._answer_writes, MAX_WRITES_PER_COMMIT).add,
            BULK: Lane(1, self._answer_each).add,
            SLOW: lambda *arguments: self._threads.submit(self.guarded, self._answer, *arguments),
        }
        self.closing.callback(self._threads.shutdown, wait=False)
        self.closing.callback(self._lanes.clear)  # which ends their idle threads

    # -- Requests --

    def read_request(self, connection: Connection) -> Generator[bool, None, Request]:
        """Read the next request from the buffer of a connection; ScimError for one to refuse."""
        connection.kept, connection.request, connection.line = True, None, b""
        connection.started = time.perf_counter()
        connection.allow(HEAD_SECONDS)
        connection.line = yield from read_request_line(connection.buffer)
        head = yield from read_head(connection.buffer, connection.line)
        connection.request = request = self.build_request(head, connection.client)
        caller = self.application.known_caller(request)
        if self.application.must_ask(request):
            # The hook is asked before the body arrives, with which a stranger could fill the
            # memory, and in another thread, because it may take its time.
            connection.state = ANSWERING  # neither read nor closed meanwhile
            answer = self._threads.submit(self.application.caller_of, request)
            answer.add_done_callback(lambda _: self.give_back(connection))
            yield False
            caller = answer.result()
        connection.request = request = request._replace(caller=caller or False)
        self.application.usage.check_connections(request.tenant)
        connection.hold(request.tenant, len(connection.buffer))
        length, coding = map(request.headers.get, ("content-length", "transfer-encoding"))
        if not (length or coding):
            return request
        if not length or int(length) > len(connection.buffer):
            self.application.check_head(request)  # before 100 Continue and the rest of the body
        limit = self.application.body_limit(request.path)
        if length and int(length) > limit:
            raise too_large(limit)
        if request.headers.get("expect", "").lower() == "100-continue":
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.allow(STALL_SECONDS, PACE_SECONDS)
        body = (
            read_exactly(connection.buffer, int(length))
            if length
            else read_chunks(connection.buffer, limit)
        )
        return request._replace(body=(yield from body))

    def build_request(self, head: Request, client: str) -> Request:
        """Return a request without its body: where it is from, and how it named this server."""
        host, headers = head.host, head.headers
        scheme, address = "https" if self.tls else "http", client.partition("%")[0]
        if any(
            ipaddress.ip_address(address) in network
            for network in self.application.config.trusted_proxies
        ):
            proxied = forwarded(headers)
            client = proxied["for"] or client
            scheme = proxied["proto"] if proxied["proto"] in ("http", "https") else scheme
            host = proxied["host"] if AUTHORITY.fullmatch(proxied["host"]) else host
        id = headers.get("x-request-id", "")
        return head._replace(
            scheme=scheme,
            host=host,
            client=client,
            id=id if REQUEST_ID.fullmatch(id) else next(self.control.request_ids),
            encoded=True,
        )

    def execute(self, connection: Connection, request: Request) -> None:
        """Answer a quick request; hand another one to its lane."""
        # A fault may delay the requests that meet it. The others must not wait for them.
        self._lanes[SLOW if self.control.faults else self.application.lane_of(request)](
            connection, request
        )

    def refuse(self, connection: Connection, error: ScimError) -> None:
        """Answer a request that cannot be read, and close the connection after it."""
        # The answer to HEAD has no body, even if nothing but the method can be read.
        is_head = (connection.line or connection.buffer).startswith(b"HEAD ")
        request = connection.request or Request(
            "HEAD" if is_head else "", "", id=next(self.control.request_ids)
        )
        connection.reader, connection.state, connection.kept = None, ANSWERING, False
        self._send(
            connection,
            request,
            error_response(error, self.application.find_route(request.path)[0].label),
            None,
        )

    def _answer(self, connection: Connection, request: Request) -> None:
        # Execute a request and send the answer; it may meet a fault.
        fault, handle = self.control.fault_for(request), self.application.handle
        answer = fault.answer(request, handle, self.stopping.wait) if fault else handle(request)
        self._send(connection, request, answer, fault)

    def _answer_each(self, reads: Batch) -> None:
        for connection, request in reads:
            self.guarded(self._answer, connection, request)

    def _answer_in_turn(self, reads: Batch) -> None:
        # Answer a read when the one before is done, or after PAUSE_SECONDS.
        in_turn = self._turn.acquire(timeout=PAUSE_SECONDS)
        self._answer_each(reads)
        if in_turn:
            self._turn.release()

    def _answer_writes(self, writes: Batch) -> None:
        responses = self.application.handle_all([request for _, request in writes])
        for (connection, request), response in zip(writes, responses, strict=True):
            self.guarded(self._send, connection, request, response, None)

    # -- Answers --

    def _send(
        self, connection: Connection, request: Request, response: Response, fault: Fault | None
    ) -> None:
        # Send an answer, or what a fault leaves of it; note it; give the connection back.
        now = self.control.now()
        self.control.note(request, response, now)
        status, fields, body = to_http(response, request)
        connection.kept = connection.kept and not (
            (fault and (fault.cut or fault.drop))
            or self.stopping.is_set()
            or "close" in request.headers.get("connection", "").lower()
        )
        fields += [
            ("Date", http_date(int(now.timestamp()))),
            ("Connection", "keep-alive" if connection.kept else "close"),
        ]
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
        head = f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("latin-1", "replace")
        if response.tenant and response.route:
            connection.since = time.monotonic()
        connection.hold("", 0)  # before the client can send its next request on another connection
        connection.send(fault.octets(head, body) if fault else head + body)
        # The client reads meanwhile. Its next request on this connection finds the counts.
        seconds = time.perf_counter() - connection.started
        self._note(request, response, now, seconds, len(body))
        self.give_back(connection)

    def _note(
        self, request: Request, response: Response, now: datetime, seconds: float, octets: int
    ) -> None:
        # Count a request and log it, without a secret, a value of a resource, or what ends a line.
        method = request.method if request.method in METHODS else "other"
        self.application.metrics.add(method, response, seconds)
        if self.application.config.access_log != "off" and ACCESS_LOG.isEnabledFor(logging.INFO):
            refused = response.status in (401, 403) and response.reason
            self.log.add(
                {
                    "time": now,
                    "tenant": response.tenant,
                    "method": method,
                    "route": response.route,
                    "status": response.status,
                    "milliseconds": round(seconds * 1000, 1),
                    "bytes": octets,
                    "id": request.id,
                    **({"reason": refused[0].split()[0]} if refused else {}),
                    **(
                        {"traceparent": trace[0]}
                        if (trace := TRACEPARENT.fullmatch(request.headers.get("traceparent", "")))
                        else {}
                    ),
                }
            )


# -- WSGI --


@dataclass(frozen=True)
class WsgiApplication:
    """An application as WSGI has it (PEP 3333); limits on time and connections are its server's."""

    application: Application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        request = self._request(environ)
        try:
            response = self.application.handle(request._replace(body=self._body(environ, request)))
        except ScimError as error:
            response = error_response(error, self.application.find_route(request.path)[0].label)
        status, fields, body = to_http(response, request)
        start_response(status, fields)
        return [body]

    def _request(self, environ: dict[str, Any]) -> Request:
        # Return a request without its body; WSGI has decoded the path, as Latin-1.
        headers = {
            name[5:].replace("_", "-").lower(): value
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        mount_point, path = (
            quote(environ.get(name, "").encode("latin-1")) for name in ("SCRIPT_NAME", "PATH_INFO")
        )
        # The path as it was sent, if the server passes it: in it an encoded slash is data.
        target = (environ.get("REQUEST_URI") or environ.get("RAW_URI", "")).partition("?")[0]
        sent = target.removeprefix(environ.get("SCRIPT_NAME", ""))
        path = sent if unquote(sent) == unquote(path) else path
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
# 20. Console
#
# The page at /, which shows an administrator why provisioning works or fails:
# HTML, style and script in one string. The script reads the API of chapter 15
# and the SCIM endpoints.
# Uses nothing.
# ----------------------------------------------------------------------------

CONSOLE_PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>SCIM console</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='-1 -1 2 2'><circle r='1' fill='%2325d'/></svg>">
<style>
:root { color-scheme: light dark; --bg: #f5f6f8; --card: #fff; --hover: #f0f3f8; --text: #1b2330; --dim: #566174; --line: #e0e4ea;
  --accent: #2f5fd0; --pressed: #244cab; --link: #2450b8; --ok: #12683f; --ok-bg: #e4f3ea; --warn: #7a4b00; --warn-bg: #fcf1d8; --bad: #a3211b;
  --bad-bg: #fce9e7 }
@media (prefers-color-scheme: dark) { :root { --bg: #10141b; --card: #181e27; --hover: #1f2732; --text: #e7ebf2; --dim: #a2aec0;
  --line: #2b3341; --accent: #3a66cf; --pressed: #2f56b3; --link: #93b4ff; --ok: #83dcab; --ok-bg: #15301f;
  --warn: #f1c76c; --warn-bg: #332812; --bad: #ffa29a; --bad-bg: #3a1b1b } }
.ok { --tone: var(--ok); --tint: var(--ok-bg) } .warn, .change { --tone: var(--warn); --tint: var(--warn-bg) }
.bad { --tone: var(--bad); --tint: var(--bad-bg) } .pill, .note, .ok .mark, .change { background: var(--tint) }
* { box-sizing: border-box } html { overflow-y: scroll } :focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 22px; line-height: 1.25; margin: 0 0 4px } h1:focus, main:focus { outline: none } h2 { font-size: 16px; margin: 0 0 10px } p { margin: 0 0 12px }
a { color: var(--link) } code, pre { font: 13px/1.5 ui-monospace, monospace } ol, ul { list-style: none; margin: 0; padding: 0 }
.dim, .live, .lead, summary time, dt, header span { color: var(--dim) } .dim, .live, .pill, .small, summary time { font-size: 13px }
header { background: var(--card); border-bottom: 1px solid var(--line) } header span { font-weight: 400; margin-right: 14px }
header > div, main { max-width: 1440px; margin: 0 auto; padding: 0 20px } main { padding-top: 18px; padding-bottom: 80px }
header > div, nav, .bar, .copy, label { display: flex; align-items: center; gap: 10px } header > div, .bar { flex-wrap: wrap }
nav { flex: 1 } nav a { padding: 16px 10px 13px; border-bottom: 3px solid transparent; color: var(--dim); text-decoration: none }
nav a:hover, nav [aria-current] { color: var(--text) } nav [aria-current] { border-color: var(--accent) }
section, .card, .log { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 18px; min-width: 0 }
section, .card { padding: 18px 20px } .empty { text-align: center; padding: 48px 20px } form.card { max-width: 420px; margin: 10vh auto }
form > * { margin-bottom: 12px } form button, [type=search], [type=password] { width: 100% } .health h2, .problem { color: var(--tone) }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); margin: 18px 0 }
.grid > *, .health p, .note p, .steps p, dd, dd p { margin: 0 } .health h2::before { content: "●"; margin-right: 7px }
.copy { justify-content: space-between } .bar { margin: 0 0 10px; min-height: 38px }
.bar [type=search] { flex: 1 1 220px; max-width: 420px } .copy code { user-select: all }
input, select, button { font: inherit; color: inherit; border: 1px solid var(--dim); border-radius: 7px; background: var(--card);
  padding: 7px 12px; min-height: 38px } [type=checkbox] { min-height: 0; width: 18px; height: 18px; accent-color: var(--accent) }
::placeholder { color: var(--dim); opacity: 1 } button { cursor: pointer; white-space: nowrap } button:disabled { opacity: .45 }
button:hover:enabled { background: var(--hover) } .primary:enabled { background: var(--accent); border-color: var(--accent); color: #fff }
.primary:hover:enabled { background: var(--pressed) } h3 { font-size: 15px; margin: 18px 0 4px } h3 + .dim { margin: 0 }
section > .copy, section > button + .dim { margin: 4px 0 10px } section > .dim:has(+ .copy) { margin: 0 } h2 + h3 { margin-top: 0 }
ins { color: var(--text); text-decoration: none } .narrow { display: none } .list td { min-width: 90px } .list td:nth-child(2) { min-width: 150px }
.people { max-height: 96px; overflow: auto; margin: 6px 0 }
.small { padding: 2px 10px; min-height: 28px } th button { border: 0; padding: 0; min-height: 24px; background: none; font: inherit }
[aria-sort=ascending] button::after { content: " ↑" } [aria-sort=descending] button::after { content: " ↓" }
.log { overflow: hidden } .log > li + li { border-top: 1px solid var(--line) } .log:empty, .log [open] .brief { display: none }
.live { margin-left: auto; min-width: 8em; text-align: end } .more { padding: 4px 18px 18px } .more .bar { margin: 14px 0 0 }
summary { cursor: pointer } summary:hover { background: var(--hover) } summary:focus-visible { outline-offset: -3px }
summary::-webkit-details-marker { display: none } .brief { font-size: 14px; color: var(--tone, var(--dim)) } .ok .brief { color: var(--dim) }
.log summary { display: grid; grid-template-columns: 4.6em minmax(0, 4fr) minmax(0, 6fr) 6em; gap: 0 14px; padding: 4px 18px;
  align-items: baseline } .log summary time { grid-column: 4; text-align: end } .log details:not([open]) summary > :not(time) { white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis } .day { padding: 4px 18px; background: var(--bg); font-size: 13px; font-weight: 600 }
.causes { padding: 8px 20px; margin: 0 0 12px; position: relative } .causes summary { font-weight: 600; padding: 2px 0 } .causes.all li { display: flex }
.causes li { display: flex; flex-wrap: wrap; gap: 0 14px; padding: 3px 0; align-items: baseline } .causes li:nth-child(n+4) { display: none }
.causes p { margin: 0; flex: 1 1 300px; font-size: 14px } .causes a { color: var(--tone); font-weight: 600 }
.causes > button { position: absolute; top: 6px; right: 20px } .causes.all > button { display: none }
.filters { display: none; flex-wrap: wrap; gap: 8px } .filters.shown { display: flex } .bar + .filters { margin: -4px 0 12px }
.filters > *, .filters label > * { font-size: 14px; min-height: 32px; padding: 3px 8px } .filters label { padding: 0 } [size] { width: 11em }
.skip { position: absolute; top: -60px } .skip:focus { top: 4px; left: 4px; background: var(--card); padding: 8px 12px; z-index: 1 }
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
@media (min-width: 1000px) { .filters { display: flex } .toggle { display: none } h1, .lead { display: inline-block; margin-right: 14px } }
@media (max-width: 640px) { header > div { padding: 8px 14px 0 } main { padding: 18px 14px 80px } header b, .live { flex: 1 }
  nav { order: 3; flex: 1 0 100%; gap: 0 } nav a { padding: 10px 8px 8px } section, .card, .more { padding: 14px }
  .more { padding-top: 2px } .log summary { grid-template-columns: 4.4em minmax(0, 1fr) auto; padding: 6px 14px; gap: 0 8px }
  .log summary > :nth-child(2) { grid-column: 2 / -1 } .log summary > .brief { grid-area: 2 / 2 }
  .log summary time { grid-area: 2 / 3; line-height: 21px } .brief:empty + time, .log [open] time { grid-area: 2 / 2; text-align: start }
  .lead { font-size: 14px; margin: 0 0 8px } .causes { padding: 4px 14px } .causes > button { right: 14px }
  .bar { gap: 8px } .bar [type=search] { flex-basis: 120px } .live { min-width: 0 } .filters > *, .filters label > * { flex: 1 1 8em }
  .scroll { margin: 0 -14px; padding: 0 14px } thead, .list td:first-child::before { display: none } .narrow { display: flex }
  table { overflow-wrap: anywhere } tr { display: block; padding: 10px 0; border-bottom: 1px solid var(--line) }
  td { display: flex; gap: 12px; border: 0; padding: 2px 0 }
  td::before { content: attr(data-label); flex: 0 0 104px; color: var(--dim) } td > :not(.pill) { min-width: 0; flex: 1 }
  td:has(> span:empty) { display: none } }
</style>
<header hidden><a class="skip" href="#/">Skip to the content</a><div><b>SCIM console <span></span></b><nav aria-label="Sections"></nav>
<button class="small">Sign out</button></div></header><main></main>
<form class="card" hidden><h1>SCIM console</h1><p class="lead">Sign in with a Secret Token of the tenant. It may be one with read access.
 It stays in this tab. The console changes nothing.</p><label for="token">Secret Token</label>
<input type="password" id="token" autocomplete="off" required><button class="primary">Sign in</button></form>
<script>
const [ENTERPRISE, FACILIO] = ['enterprise', 'facilio'].map(name => `urn:ietf:params:scim:schemas:extension:${name}:2.0:User`);
const LEVELS = [['ok', '✓', 'success'], ['warn', '!', 'warning'], ['bad', '✕', 'error']];
const [header, main, form] = document.body.children;
const [tenantName, nav, signOutButton] = header.querySelectorAll('span, nav, button');
let setup = null;  // the answer of /console/api/setup
let view = new AbortController();  // aborted when another view opens
let shownPath = '';  // of the address, without its options

// -- Elements: server text becomes text nodes, never HTML --
// h('p.dim', {title: 'x'}, 'text'): the properties are optional.
function h(selector, ...children) {
  const [tag, ...classes] = selector.split('.'), element = document.createElement(tag);
  const properties = children[0]?.constructor === Object ? children.shift() : {};
  for (const [name, value] of Object.entries(properties)) name in element ? element[name] = value : element.setAttribute(name, value);
  element.classList.add(...classes); element.append(...children.flat(9).filter(Boolean));
  return element;
}
// link('Ada', 'people', id) leads to a view; an object after the path has options of the view: link('All', 'log', {text: 'Ada'}).
function link(text, ...path) {
  const options = typeof path.at(-1) === 'object' ? Object.entries(path.pop()).filter(([, value]) => value) : [];
  const query = options.length ? '?' + new URLSearchParams(options) : '';
  return h('a', {href: ['#', ...path.map(encodeURIComponent)].join('/') + query}, text || path.at(-1));
}
const date = at => new Date(at).toLocaleString('en-GB', {dateStyle: 'medium', timeStyle: 'long'});  // with the time zone
const day = at => new Date(at).toLocaleDateString('en-GB', {weekday: 'long', day: 'numeric', month: 'long', year: 'numeric'});
const UNITS = [['day', 86400], ['hour', 3600], ['minute', 60], ['second', 1]];
function ago(at) {  // '5min ago', or the date of what is older than a month
  const seconds = Math.max(1, (Date.now() - new Date(at)) / 1000), [unit, size] = UNITS.find(([, length]) => seconds >= length);
  return seconds > 30 * 86400 ? new Date(at).toLocaleDateString('en-GB', {dateStyle: 'medium'}) :
    new Intl.RelativeTimeFormat('en', {style: 'narrow'}).format(-Math.floor(seconds / size), unit);
}
const time = at => h('time', {dateTime: at, title: date(at)}, ago(at));
setInterval(() => document.querySelectorAll('time').forEach(element => { element.textContent = ago(element.dateTime); }), 30000);
const valueText = value => value === true ? 'Yes' : value === false ? 'No' : String(value ?? '');
const plural = (number, one, many = one + 's') => `${number.toLocaleString('en')} ${number === 1 ? one : many}`;
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
// Users and groups by id: {'5b0c': {type: 'Group', name: 'Crew', members: 3, active: true}}.
async function getNames(ids) {
  const parts = [...new Set(ids)].reduce((all, id, index) => (index % 100 ? all.at(-1).push(id) : all.push([id]), all), []);
  return Object.assign({}, ...await Promise.all(parts.map(part => get('/console/api/names', {ids: part.join()}))));
}
// Text of a value that changed; an id of names becomes the name.
function changedText(value, names) {
  if (Array.isArray(value)) return value.map(item => changedText(item, names)).join(', ');
  if (value && typeof value === 'object') return changedText(value.value ?? Object.values(value).map(valueText).join(' '), names);
  return names[value]?.name || valueText(value);
}
// What changed, from old to new values: {title: ['Engineer', 'Chief']}. Some values are not kept.
const changeList = (attributes, values, names = {}) => attributes.map(path => {
  const [before, after] = (values[path] || []).map(value => changedText(value, names)), name = nameList([path]);
  return h('p.dim', before === undefined ? name : [name + ': ', before && [h('del', before), ' → '], h('ins', after || 'no value')]);
});
const valueChanges = values => Object.entries(values).map(([path, pair]) =>
  `${nameList([path])}: ${pair.map(value => changedText(value, {}) || '–').join(' → ')}`);
// A button that copies a text; a page that came over HTTP has no clipboard, so it shows the text.
const copyButton = (title, text, label = title) => h('button.small', {ariaLabel: label, onclick: async ({target}) => {
  if (navigator.clipboard) { await navigator.clipboard.writeText(text()); target.textContent = 'Copied'; }
  else target.parentElement.append(h('pre', {tabIndex: 0}, text())); }}, title);
const copyable = text => h('div.copy', h('code', text), navigator.clipboard && copyButton('Copy', () => text, 'Copy ' + text));
function download(name, ...parts) {
  const href = URL.createObjectURL(new Blob(parts));
  h('a', {download: name, href}).click(); setTimeout(URL.revokeObjectURL, 1000, href);
}

// -- The address: #/view/id?name=value has all that a view shows, so that a link, Back and reload restore it --
const viewPath = () => location.hash.split('?')[0];
const options = () => new URLSearchParams(location.hash.split('?')[1]);
const option = name => options().get(name) || '';
// Put options of the view into the address, as a step for Back or in place of the newest step.
function remember(changes, isStep = true) {
  const all = options();
  for (const [name, value] of Object.entries(changes)) value ? all.set(name, value) : all.delete(name);
  const hash = viewPath() + (all.size ? '?' + all : '');
  if (hash !== location.hash) history[isStep ? 'pushState' : 'replaceState'](null, '', hash);
}
// Return a select of [value, text] pairs.
const choice = (title, values) => h('select', {ariaLabel: title}, values.map(([value, text = value]) => h('option', {value}, text)));
// Return a field whose value is an option of the view; a change leads to the first page.
function filterField(name, field, load, isStep = true) {
  const value = option(name);
  if (field.options && ![...field.options].some(item => item.value === value)) field.append(h('option', {value}, value));
  field.value = value;
  field.onchange = () => { remember({[name]: field.value, page: '', open: ''}, isStep); return load(); };
  return field;
}
function searchField(placeholder, load, timer) {
  const field = filterField('text', h('input', {type: 'search', ariaLabel: placeholder, placeholder}), load, false);
  const search = field.onchange;
  field.oninput = () => { clearTimeout(timer); timer = setTimeout(search, 250); };
  field.onchange = null;  // it comes with the click that leaves the field: a new list would take that click
  return field;
}

// -- The server: the token is sent in a header only --
async function request(path, signal) {
  const response = await fetch(path, {signal, headers: {Authorization: 'Bearer ' + sessionStorage.token}});
  if (response.status === 401) signIn('The token is unknown or has expired.');
  if (!response.ok) throw Error((await response.json().catch(() => ({}))).detail || `The server answered ${response.status}.`);
  return response;
}
const get = async (path, parameters) => (await request(path + '?' + new URLSearchParams(parameters), view.signal)).json();
const getLog = async parameters => (await get('/console/api/log', parameters)).entries;
const getSetup = async () => { setup = await get('/console/api/setup'); };
const downloadMapping = async () => download('mapping.csv', await (await request('/console/api/mapping')).blob());
// Long polls while the view is open; each failure doubles the pause.
async function followLog(status, refresh) {
  const {signal} = view;
  for (let after = setup.last[0]?.seq || 0, pause = 1000; !signal.aborted;)
    try {
      status.textContent ||= 'Live';
      const [newest] = await getLog({after, wait: 25, count: 100});
      status.textContent = 'Live'; pause = 1000;
      if (newest) { after = newest.seq; await refresh(); await new Promise(resolve => setTimeout(resolve, 1000)); }
    } catch (error) {
      if (signal.aborted) return;
      status.textContent = `Connection lost, retrying in ${pause / 1000} s`;
      await new Promise(resolve => setTimeout(resolve, pause)); pause = Math.min(2 * pause, 60000);
    }
}

// -- The log: causes of open problems, filters, calls --
const ACTIONS = ['Create user', 'Update user', 'Replace user', 'Activate user', 'Deactivate user', 'Delete user', 'Look up user',
  'Create group', 'Update group', 'Replace group', 'Delete group', 'Look up group', 'List', 'Read', 'Call'];
const FILTERS = ['text', 'level', 'status', 'action', 'person', 'token', 'from', 'to', 'cause', 'subject'];
const logFilters = () => Object.fromEntries([...options()].filter(([name, value]) => value && FILTERS.includes(name)));
// The fields 'from' and 'to' show the local time; the address and the server have UTC.
function timeField(title, name, load) {
  const field = h('input', {type: 'datetime-local'}), start = new Date(option(name));
  if (+start) field.value = new Date(start - start.getTimezoneOffset() * 60000).toISOString().slice(0, 16);
  field.onchange = () => {
    remember({[name]: field.value && new Date(field.value).toISOString(), page: '', open: ''}); return load(); };
  return h('label', title, field);
}
function filterFields(load) {
  const field = (name, element) => filterField(name, element, load), tokens = [...new Set(setup.tokens.map(({name}) => name))];
  return [field('level', choice('Outcome', [['', 'All outcomes'], ['1', 'Problems'], ['2', 'Errors']])),
    field('status', choice('Status', [['', 'All statuses'], ...[200, 201, 204, 400, 401, 403, 404, 409, 412, 429, 500, 503].map(code => [code])])),
    field('action', choice('Action', [['', 'All actions'], ['member', 'Change members'], ...ACTIONS.map(action => [action])])),
    field('person', h('input', {size: 16, placeholder: 'Person or group', ariaLabel: 'Person or group'})),
    field('token', choice('Token or client', [['', 'All tokens'], ...tokens.map(name => [name])])),
    timeField('From', 'from', load), timeField('To', 'to', load)];
}
function causeItem({cause, remedy, kind, level, people, groups, calls, first, last}) {
  const who = [people && plural(people, 'person', 'people'), groups && plural(groups, 'group')].filter(Boolean).join(' and ');
  const sentence = cause.replace(/^[A-Z](?=[a-z ])/, letter => letter.toLowerCase());
  return h('li.' + LEVELS[level][0], link(`${who || plural(calls, 'call')}: ${sentence}`, 'log', {cause}), h('p', remedy),
    h('span.dim', plural(calls, 'call'), ', ', time(first), calls > 1 && [' to ', time(last)]));
}
function causeCard({causes, unknown_token: unknown}) {
  const number = causes.length, card = h('details.card.causes', {open: innerWidth > 640},
    h('summary', number ? `Open problems: ${number}` : 'Calls with an unknown token'), h('ol', causes.map(causeItem)));
  if (number > 3) card.append(h('button.small', {onclick: () => card.classList.add('all')}, `Show all ${number}`));
  if (unknown.calls) card.append(h('p.dim', `${plural(unknown.calls, 'call')} to this server had a token of no tenant since `, time(unknown.since),
    '; they are counted for all tenants together. If Entra reports 401, enter the Secret Token again.'));
  return number || unknown.calls ? card : setup.last.length ? h('p.brief.ok', '✓ No open problems.') : '';
}
// What the filters without a field select, with a link that removes them.
const otherFilters = () => [['cause', 'Problem'], ['subject', 'ID']].filter(([name]) => option(name)).map(([name, title]) =>
  h('p', `${title}: ${option(name)} `, link('Show all', 'log', {...logFilters(), [name]: ''})));

// -- A call --
// The plainest form of a call for a shell; the secret is a variable of the shell.
function curlCommand({method, path, query, body}) {
  const quoted = text => `'${text.replaceAll("'", `'\\''`)}'`, hasBody = ['POST', 'PUT', 'PATCH'].includes(method);
  return [`curl --globoff -X ${method} ${quoted(setup.url.replace(/\/scim\/v2$/, '') + path + (query ? '?' + query : ''))}`,
    '-H "Authorization: Bearer $SECRET_TOKEN"', hasBody && "-H 'Content-Type: application/scim+json'",
    hasBody && (body ? '-d ' + quoted(JSON.stringify(body)) : '-d @body.json')].filter(Boolean).join(' \\\n  ') +
    (hasBody && !body ? '  # the log keeps bodies if "log": {"bodies": true} is configured' : '');
}
// A call without what may be about a person: names, values, ids, addresses. What is not known to be harmless is left out.
const WORDS = /^(|scim|v2|Users|Groups|Me|Bulk|Schemas|ResourceTypes|ServiceProviderConfig|\.search|oauth2|token)$/i;
const harmlessPath = path => /^[\w:.$-]+(\[type eq "\w+"\](\.\w+)?)?$/.test(path) ? path : '…';
const harmlessQuery = query => [...new URLSearchParams(query)].map(([name, value]) => name === 'filter' ?
  `filter=${value.match(/^(id|userName|externalId|displayName|active|emails|members)\b[\w.]* (eq|ne|co|sw|ew|pr)\b/)?.[0] || ''} …` :
  /^(attributes|excludedAttributes|startIndex|count|cursor|sortBy|sortOrder|aadOptscim\d+)$/.test(name) ? name + '=…' : '…').join('&');
const supportText = call => [['Server', `scim_server ${setup.version}`], ['Time', call.at], ['Action', `${call.method} ${call.type || 'call'}`],
  ['Path', call.path.split('/').map(part => WORDS.test(part) ? part : '…').join('/')], ['Query', harmlessQuery(call.query)],
  ['Status', call.status], ['Attributes', call.attributes.map(harmlessPath).join(', ')],
  ...call.notes.flatMap(note => [['Problem', note.cause || note.kind], ['Remedy', note.cause && note.remedy]]),
  ['Duration', `${call.milliseconds} ms`], ['Request ID', call.id]]
  .filter(([, value]) => value).map(([name, value]) => `${name}: ${value}`).join('\n').replace(/[^\s"“”]+@[^\s"“”]+/g, '…');
function logEntry(call) {
  const [level, sign, meaning] = LEVELS[call.level], path = {User: 'people', Group: 'groups'}[call.type], seq = String(call.seq);
  const values = call.values || {};
  const brief = call.notes[0]?.text || /^P(UT|ATCH)$/.test(call.method) && valueChanges(values).join(', ');
  const address = {page: call.seq + 1, open: seq};
  return h('li', h('details.' + level, {id: 'call-' + seq, ontoggle: ({target}) => {
    if (target.open || option('open') === seq) remember({open: target.open && seq}, false); }},
  h('summary', h('span.pill', {title: meaning}, `${sign} ${call.status}`), h('span', call.operation, ' ', h('b', call.name)),
    h('span.brief', brief), time(call.at)),
  h('div.more', call.notes.map(note => h('div.note', h('p.dim', note.kind), h('p', note.text),
    h('p', h('b', 'What to do: '), note.remedy))),
  pairs([[call.type, path && call.subject && [link(call.name, path, call.subject), ' · ', link('all calls', 'log', {subject: call.subject})]],
    ['Changed', ...changeList(Object.keys(values), values)], ['Attributes', nameList(call.attributes)],
    ['Error', call.detail], ['Request', h('code', `${call.method} ${call.path}${call.query ? '?' + call.query : ''}`)],
    ['Token', `${call.token}, from ${call.client || 'an unknown address'}`],
    ['Time', `${date(call.at)}, in ${call.milliseconds} ms`], ['Request ID', call.id]]), call.body && json(call.body),
  h('div.bar', copyButton('Copy link', () => link('', 'log', address).href), copyButton('Copy as curl', () => curlCommand(call)),
    copyButton('Copy for support', () => supportText(call), 'Copy for support: without personal data')))));
}
const dayBreaks = calls => calls.flatMap((call, index) => [index && day(calls[index - 1].at) === day(call.at) ? '' :
  h('li.day', day(call.at)), logEntry(call)]);

// -- Export: all calls that the filters select --
const CSV_COLUMNS = {time: 'at', action: 'operation', name: 'name', status: 'status', level: 'level', problem: 'notes', attributes: 'attributes',
  token: 'token', client: 'client', method: 'method', path: 'path', query: 'query', milliseconds: 'milliseconds', 'request id': 'id'};
const cellText = value => Array.isArray(value) ? value.map(item => item.text || item).join('; ') : String(value ?? '');
// A spreadsheet would run a cell that looks like a formula; an apostrophe makes it text.
const csvCell = value => `"${cellText(value).replace(/^[=+@\t\r＝＋－＠-]/, "'$&").replaceAll('"', '""')}"`;
async function exportCalls(format) {
  const calls = [];
  for (let before = 0, page; !page || page.length === 1000; before = page.at(-1)?.seq)
    calls.push(...page = await getLog({...logFilters(), before, count: 1000}));
  download('log.' + format, format === 'json' ? JSON.stringify(calls, null, 1) : [Object.keys(CSV_COLUMNS), ...calls.map(call =>
    Object.values(CSV_COLUMNS).map(name => call[name]))].map(cells => cells.map(csvCell).join(',') + '\r\n').join(''));
}
async function showLog() {
  const search = searchField('Search names, attributes, errors', load), status = h('span', {role: 'status'});
  const list = h('div'), causes = h('div'), lead = h('span'), footer = h('div.bar'), filters = h('div.filters', filterFields(load),
    h('button', {onclick: () => exportCalls('csv'), title: 'All calls that the filters select'}, 'CSV'),
    h('button', {onclick: () => exportCalls('json'), title: 'All calls that the filters select'}, 'JSON'));
  const toggle = h('button.toggle', {ariaExpanded: 'false',
    onclick: () => { toggle.ariaExpanded = String(filters.classList.toggle('shown')); }}, 'Filters');
  const showNew = h('button.small', {hidden: true, onclick: load}, 'Show new calls');
  const clear = h('a', {href: '#/log'}, 'Clear'), getCalls = before => getLog({...logFilters(), before, count: 50});
  let loads = 0, causesAt = 0;
  async function load() {
    const number = ++loads, open = option('open'), page = option('page') || 0;
    const areCausesDue = Date.now() - causesAt > 10000;  // the server reads the whole log for them
    const [calls, answer] = await Promise.all([getCalls(page), areCausesDue && get('/console/api/causes'), getSetup()]);
    if (number < loads) return;  // a newer search started
    if (+open > 0 && !page && !calls.some(({seq}) => String(seq) === open)) { remember({page: +open + 1}, false); return load(); }
    const active = Object.keys(logFilters()).length;
    showNew.hidden = true; clear.hidden = !active; toggle.textContent = `Filters${active ? ` (${active})` : ''}`;
    if (answer && !causes.contains(document.activeElement)) {
      const [old] = causes.children, card = causeCard(answer);
      if (old?.open !== undefined && card) { card.open = old.open; card.className = old.className; }
      causesAt = Date.now(); causes.replaceChildren(card);
    }
    const [lastCall] = setup.last, [skipped, missing] = setup.left_out;
    lead.replaceChildren(...lastCall ? ['Last call ', time(lastCall.at), ` with “${lastCall.token}”.`] :
      ['The calls of identity providers, their outcome, and how to fix what failed.']);
    list.replaceChildren(...otherFilters(), h('ol.log', dayBreaks(calls)), calls.length ? '' : active ?
      notice('No matching calls', 'Change the filters, or ', link('show all calls', 'log'), '.') :
      notice('No calls yet', 'Calls from Entra ID appear here, with their outcome. See ', link('Set-up', 'setup'),
        ' for what to enter there.'));
    footer.replaceChildren(...[calls.length === 50 && link('Older calls', 'log', {...logFilters(), page: calls.at(-1).seq}),
      page && link('Newest calls', 'log', logFilters()), skipped && h('span.dim', `${plural(skipped, 'successful look-up')} not kept`),
      missing && h('span.dim', `${plural(missing, 'call')} missing`)].filter(Boolean));
    const opened = open && list.querySelector('#call-' + CSS.escape(open));
    if (opened) { opened.open = true; requestAnimationFrame(() => opened.scrollIntoView({block: 'nearest'})); }
  }
  await load();
  const isRead = () => scrollY > 200 || option('page') || list.querySelector('[open]') || list.contains(document.activeElement);
  followLog(status, () => isRead() ? showNew.hidden = false : load());
  return ['Provisioning log', lead, causes, h('div.bar', search, toggle, clear, h('span.live', showNew, ' ', status)), filters, list, footer];
}

// -- Set-up --
async function testConnection(output) {  // like Entra's button: filters that match no one
  const probe = (endpoint, attribute) => get('/console/api/' + endpoint, {filter: `${attribute} eq "${Math.random()}"`}).then(
    page => [!page.totalResults, `${endpoint}: the filter works. It matched nothing, as expected.`],
    error => [false, `${endpoint}: ${error.message}`]);
  const results = await Promise.all([probe('Users', 'userName'), probe('Groups', 'displayName')]);
  if (!setup.url.startsWith(location.origin + '/')) results.push([false, `This page is at ${location.origin}, but the server ` +
    `believes its URL is ${setup.url}. Let the proxy keep the Host header, or add the proxy to trusted_proxies.`]);
  if (location.protocol !== 'https:')
    results.push([false, 'This page was loaded over HTTP. Entra ID needs HTTPS and a public host name: set up TLS.']);
  output.replaceChildren(...results.map(([good, text]) => h('p', pill(good, ''), ' ', text)));
}
const ENTRA_NOTES = [  // title, text: what administrators wonder about
  ['Who is provisioned', 'Settings → Scope → “Sync only assigned users and groups”: those under Users and groups, and the direct members ' +
    'of assigned groups. Members of nested groups are not.'],
  ['When', 'After “Start provisioning” the first cycle sends everyone, which may take hours. Later cycles start about every 40 minutes: ' +
    'a change in Entra ID may take that long to arrive.'],
  ['Provision on demand', 'It sends one person, or a group with up to five of its members, at once, and shows each step: use it to test ' +
    'a mapping. It sends Entra\'s default form of PATCH even if the Tenant URL ends in ?aadOptscim062020; both work here.'],
  ['People who exist already', 'Entra looks everyone up by userName first. A match is updated, not created again. A person who left and ' +
    'comes back, with the same externalId or userName, is the same employee.'],
];
// Why Entra ID cannot reach a URL; '' if nothing speaks against it.
function reachProblem(url) {
  const {protocol, hostname} = new URL(url);
  const isPrivate = /^([^.]+|.*\.(local|internal|localhost)|127\..*|10\..*|192\.168\..*|172\.(1[6-9]|2\d|3[01])\..*)$/.test(hostname);
  return [protocol === 'http:' && 'Entra ID needs https: set up TLS, in the server or in a proxy in front of it.', isPrivate &&
    `Entra ID cannot reach ${hostname}, which is no name on the Internet: open the console under the server's public name.`]
    .filter(Boolean).join(' ');
}
function credentialList(kind) {
  const use = ({access, expired, expires, last_use}) => [access === 'read' && 'read-only; ', expired && h('span.pill.bad', '✕ expired'),
    expires && ` ${expired ? '' : 'expires '}on ${date(expires)}; `, last_use ? `last used on ${date(last_use)}` : 'never used'];
  const credentials = setup.tokens.filter(credential => credential.kind === kind);
  return credentials.length ? pairs(credentials.map(credential =>
    [kind === 'client' ? copyable(credential.name) : credential.name, ...use(credential)])) : h('p', 'None yet.');
}
function connectionSection() {
  const output = h('div', {role: 'status'}), problem = reachProblem(setup.url);
  return section('Connection', h('p.dim', 'Enterprise application → Provisioning → New configuration → Tenant URL'), copyable(setup.url),
    h('p.dim', 'The same for Entra\'s standards-compliant PATCH; both work'), copyable(setup.url + '?aadOptscim062020'),
    problem && h('p.note.warn', 'This URL will not work. ' + problem),
    h('h3', 'Either: OAuth2 client credentials grant'), h('p.dim', 'Token Endpoint'), copyable(setup.token_url),
    h('p.dim', 'Client Identifier and Client Secret, as printed by: python3 scim_server.py token --client'), credentialList('client'),
    h('h3', 'Or: Bearer authentication'),
    h('p.dim', 'Secret Token, as printed by: python3 scim_server.py token --name entra'), credentialList('token'), h('p'),
    h('button.primary', {onclick: () => testConnection(output)}, 'Test Connection'),
    h('p.dim', 'This tests the way from this browser to the server. The button of the same name in Entra ID tests the way from there.'), output);
}
async function showSetup() {
  const steps = h('ol.steps'), fields = h('tbody'), status = h('span.dim', {role: 'status'});
  const mappingTitles = ['Source', 'Target', 'Type', 'Change'], fieldTitles = ['Field', 'Type', 'Name in Entra', 'Employees'];
  async function load() {
    await getSetup();
    steps.replaceChildren(...setup.steps.map(({at, title, hint}) => h(at ? 'li.ok' : 'li', h('span.mark', {ariaHidden: 'true'},
      at && '✓'), h('div', h('b', title), h('p.dim', at ? 'Done on ' + date(at) : hint)))));
    fields.replaceChildren(...setup.fields.map(({display_name, type, urn, people}) => row(fieldTitles,
      [display_name, type, copyable(urn), pill(people, `${people || 'none'} with a value`)])));
  }
  await load(); followLog(status, load);
  const source = text => text.includes('(') ? copyable(text) : text || '(your choice)';
  return ['Set-up', 'What to enter in the Entra admin center, and what the server has received.',
    h('div.grid', connectionSection(), h('div', section(['Checklist ', status], steps),
      section('How Entra ID provisions', ENTRA_NOTES.map(([title, text]) => [h('h3', title), h('p', text)])))),
    section('Attribute mapping', h('p.dim', 'Mappings → Provision Microsoft Entra ID Users: sources in Entra ID, ' +
      'targets in customappsso. Highlighted rows differ from Entra\'s default mapping.'), table(headCells(mappingTitles),
      h('tbody', setup.mapping.map(([from, target, type, change]) => row(mappingTitles,
        [source(from), copyable(target), type, change], change ? 'tr.change' : 'tr')))), h('p'),
    h('button', {onclick: downloadMapping}, 'Download as CSV')),
    section('Custom fields', setup.fields.length ? [h('p.dim', 'Show advanced options → Edit attribute list for customappsso: ' +
      'add these names with these types, then map to them.'), table(headCells(fieldTitles), fields)] : h('p.dim',
      'None. Configure them as “custom_fields” of the tenant.'))];
}

// -- Employees and groups: the server filters, sorts and pages --
const STATES = [['', 'All'], ['active', 'Active'], ['inactive', 'Inactive'], ['left', 'Left']];
const statePill = ({active, left}) => active ? pill(true, 'Active') : pill(false, left ? 'Left' : 'Inactive', left ? '×' : '–');
// Columns: title, what to sort by, content of a cell.
const employeeColumns = () => [['Name', 'name', employee => link(employee.name, 'people', employee.user_id)],
  ['E-mail', 'email', employee => mail(employee.email)], ['Designation', 'designation', employee => employee.designation],
  ['Department', 'department', employee => employee.department], ['No.', 'employeeNumber', employee => employee.employeeNumber],
  ['Roles', '', employee => (employee.roles || []).join(', ')],
  ...setup.fields.map(({display_name, link_name}) => [display_name, 'custom_fields.' + link_name,
    employee => valueText(employee.custom_fields[link_name])]), ['State', '', statePill]];
const mail = address => h('span', address.split(/(?=@)/).map(part => [h('wbr'), part]));  // it may break before the @
const email = ({emails = [], userName}) =>
  mail((emails.find(({primary}) => primary) || emails.find(({type}) => type === 'work'))?.value || userName);
const MEMBER_COLUMNS = [['Name', 'displayName', user => link(user.displayName || user.userName, 'people', user.id)],
  ['E-mail', 'emails.value', email], ['Designation', 'title', user => user.title], ['State', 'active', statePill]];
const GROUP_COLUMNS = [['Name', 'displayName', group => link(group.displayName, 'groups', group.id)],
  ['Members', '', group => String(group.memberCount)], ['External ID', 'externalId', group => group.externalId],
  ['Changed', 'meta.lastModified', group => time(group.meta.lastModified)]];
// These return a page of items, and how many there are.
async function readEmployees(parameters) {
  const {employees, total} = await get('/console/api/employees', parameters);
  return [employees, total];
}
async function readResources(endpoint, searched, {text, state, ...page}, baseFilter) {
  const terms = [baseFilter, state && `active eq ${state === 'active'}`,
    text && `(${searched.map(name => `${name} co ${JSON.stringify(text)}`).join(' or ')})`].filter(Boolean);
  const {Resources: resources, totalResults} = await get('/console/api/' + endpoint,
    {...page, excludedAttributes: 'members', ...terms.length && {filter: terms.join(' and ')}});
  return [resources, totalResults];
}
const readMembers = (parameters, groupId) => readResources('Users', ['displayName', 'userName', 'emails.value', 'title'], parameters,
  `groups.value eq ${JSON.stringify(groupId)}`);
async function readGroups(parameters) {
  const [groups, total] = await readResources('Groups', ['displayName', 'externalId'], parameters);
  const names = await getNames(groups.map(({id}) => id));
  return [groups.map(group => ({...group, memberCount: names[group.id]?.members ?? 0})), total];
}
async function sortedList(placeholder, columns, states, read, ifEmpty) {
  const titles = columns.map(([title]) => title), search = searchField(placeholder, load), [[, firstColumn]] = columns;
  const state = filterField('state', h('select', states.map(([value, text]) => h('option', {value}, text))), load);
  const message = h('div'), body = h('tbody'), range = h('span.dim', {role: 'status'});
  let start, loads = 0;
  const [previous, next] = [['Previous', -25], ['Next', 25]].map(([text, step]) =>
    h('button', {onclick: () => { remember({page: start + step}); return load(); }}, text));
  const sorting = () => ({sortBy: option('sort') || firstColumn, sortOrder: option('order') || 'ascending'});
  const sort = (path, order) => { remember({sort: path, order, page: ''}); return load(); };
  const sortOrReverse = path => sort(path, sorting().sortBy === path && sorting().sortOrder === 'ascending' ? 'descending' : '');
  const heads = headCells(columns.map(([title, path]) => path ? h('button', {onclick: () => sortOrReverse(path)}, title) : title));
  const sortField = h('select', {onchange: () => sort(...sortField.value.split(' '))},  // where the heads have no room
    columns.filter(([, path]) => path).flatMap(([title, path]) =>
      [h('option', {value: path}, title + ' ↑'), h('option', {value: path + ' descending'}, title + ' ↓')]));
  const card = h('div.card.list', table(heads, body));
  async function load() {
    const number = ++loads, {sortBy, sortOrder} = sorting(), text = search.value.trim();
    start = Math.max(1, +option('page') || 1);
    const [items, total] = await read({text, state: state.value, startIndex: start, count: 25, sortBy, sortOrder});
    if (number < loads) return;  // a newer search started
    columns.forEach(([, path], index) => { heads[index].ariaSort = path && path === sortBy ? sortOrder : 'none'; });
    body.replaceChildren(...items.map(item => row(titles, columns.map(([, , content]) => content(item)))));
    for (const [index, head] of heads.entries())  // a column without any value takes no room
      for (const cell of [head, ...[...body.rows].map(({cells}) => cells[index])])
        cell.hidden = head.ariaSort === 'none' && ![...body.rows].some(({cells}) => cells[index].textContent);
    sortField.value = sortOrder === 'descending' ? sortBy + ' descending' : sortBy;
    card.hidden = !total;
    message.replaceChildren(total ? '' : state.value || text ? notice('No results', 'Change the search or show all.') : ifEmpty);
    range.textContent = total ? `${start}–${start + items.length - 1} of ${total}` : ''; previous.hidden = next.hidden = total <= 25;
    [previous.disabled, next.disabled] = [start < 2, start + 25 > total];
  }
  await load();
  return [h('div.bar', search, states.length > 0 && h('label', 'Show', state),
    h('label.narrow', 'Sort', sortField)), message, card, h('div.bar', previous, next, range)];
}
const showEmployees = async () => ['Employees', 'The people of Facilio whom Entra ID provisioned, with those who left.', ...await sortedList(
  'Search all fields and custom fields', employeeColumns(), STATES, readEmployees,
  notice('No employees yet', 'Employees appear with the first cycle of Entra ID. ', link('See the checklist', 'setup'), '.'))];
const showGroups = async () => ['Groups', 'The provisioned groups.', ...await sortedList('Search groups', GROUP_COLUMNS, [], readGroups, notice(
  'No groups yet', 'Assign a group to the application in Entra ID, and keep “Provision Microsoft Entra ID Groups” enabled.'))];

// -- One person, one group --
const isOfEmployee = ({kind}) => kind.startsWith('employee.');
// The changes of one write are one step of the timeline: those of a user, of its employee and of memberships.
function timelineSteps(changes) {
  const steps = new Map();
  for (const change of changes) {
    const key = change.at + change.token;
    steps.set(key, [...steps.get(key) || [], change]);
  }
  return [...steps.values()];
}
// 'members added: Ada, Bo' of the group with an id, 'added to Night Crew' of the person with an id.
function membershipTitle(id, verb, changes, names) {
  const isGroup = changes[0].id === id, others = changes.map(change => isGroup ? change.member : change.id);
  return [isGroup ? `members ${verb}: ` : {added: 'added to ', removed: 'removed from ', updated: 'shown differently in '}[verb],
    others.map((other, index) => [index > 0 && ', ', names[other] ?
      link(names[other].name, names[other].type === 'Group' ? 'groups' : 'people', other) : 'one that was deleted'])];
}
function stepTitle(id, changes, names) {
  const own = changes.filter(({member}) => !member), isOfUser = !own.every(isOfEmployee), titles = [];
  const kinds = own.map(({kind}) => kind).filter(kind => !isOfUser || kind !== 'employee.updated').reverse();
  const verbs = new Set(kinds.map(kind => kind.split('.')[1]));
  if (isOfUser && verbs.size === 1) titles.push(...verbs);
  else if (isOfUser || own.length === changes.length) titles.push(kinds.join(', ').replaceAll('.', ' '));
  for (const verb of ['added', 'removed', 'updated']) {
    const memberships = changes.filter(({kind}) => kind === 'member.' + verb);
    if (memberships.length) titles.push(membershipTitle(id, verb, memberships, names));
  }
  return titles.map((title, index) => [index > 0 && ', ', title]);
}
function timelineStep(id, changes, names) {
  const [{at, token}] = changes, own = changes.filter(({member}) => !member), employee = own.find(isOfEmployee);
  const {kind = '', attributes = [], values = {}} = own.find(change => !isOfEmployee(change)) || employee || {};
  const isMembership = own.length < changes.length, shown = attributes.filter(name => !isMembership || name !== 'groups');
  const others = employee?.kind === kind || kind === 'user.created' ? [] : employee?.attributes.filter(name =>
    !nameList(attributes).split(', ').includes(name) && !['custom_fields', 'groups'].includes(name)) || [];
  return h('li', h('div', h('b', stepTitle(id, changes, names)), h('span.dim', ' ', time(at), token && ` by “${token}”`),
    kind.endsWith('.deleted') ? '' : changeList(shown, values, names),
    others.length && h('p.dim', 'Field of the employee: ' + others.join(', '))));
}
const problemNote = ({level, text, remedy, calls, last}) => h('div.note.' + LEVELS[level][0], h('p', text), h('p', h('b', 'What to do: '), remedy),
  h('p', `${plural(calls, 'call')}, the last `, time(last)));
async function resourceDetails(endpoint, id) {  // resource, employee (of a user), what is known by name, open problems, sections
  const [{Resources: [resource]}, {changes, employee}, calls, {causes}] = await Promise.all([
    get('/console/api/' + endpoint, {filter: `id eq ${JSON.stringify(id)}`, excludedAttributes: 'members'}),
    get('/console/api/history/' + encodeURIComponent(id)), getLog({subject: id, count: 20}), get('/console/api/causes', {subject: id})]);
  const managers = changes.flatMap(({values = {}}) => (values[ENTERPRISE + ':manager'] || []).map(manager => manager?.value));
  const names = await getNames([id, ...managers, ...changes.flatMap(change => [change.id, change.member])].filter(Boolean));
  const steps = timelineSteps(changes).map(step => timelineStep(id, step, names));
  return [resource, employee, names[id], causes.map(problemNote),
    h('div.grid', section('History', steps.length ? h('ol.steps.history', steps) : 'No changes recorded.',
      changes.length === 100 && h('p.dim', 'These are the newest 100 changes.')),
      section('SCIM resource', resource ? json(resource) : employee ? 'Deleted. The employee remains.' : 'Deleted.')),
    h('h2', 'Calls ', h('span.dim', link('all in the log', 'log', {subject: id}))),
    calls.length ? h('ol.log', calls.map(logEntry)) : notice('No calls', 'The log has none about it.')];
}
async function showEmployee(id) {
  const [resource, employee, , problems, ...sections] = await resourceDetails('Users', id), manager = resource?.[ENTERPRISE]?.manager;
  if (!employee) return ['Not found', 'No employee has this ID.', link('All employees', 'people')];
  const managerName = manager && (manager.displayName || (await getNames([manager.value]))[manager.value]?.name || 'not provisioned yet');
  return [employee.name, [link('Employees', 'people'), ` / employee ${employee.id} `, statePill({...employee, left: !resource})],
    ...problems, h('div.grid', section('Employee', pairs([['E-mail', employee.email], ['Designation', employee.designation],
      ['Department', employee.department], ['Phone', employee.phone], ['Mobile', employee.mobile], ['Employee no.', employee.employeeNumber],
      ['Roles', employee.roles?.join(', ')], ['Manager', manager && link(managerName, 'people', manager.value)], ['Language', employee.language],
      ['Changed', time(employee.changed)], ['External ID', employee.external_id]])),
    section('Custom fields', setup.fields.length ? pairs(setup.fields.map(field => [field.display_name,
      valueText(employee.custom_fields[field.link_name]) || h('span.dim', 'no value')])) : 'None', h('p'), h('h2', 'Groups'),
    resource?.groups ? h('ul', resource.groups.map(group => h('li', link(group.display, 'groups', group.value)))) : 'None')), ...sections];
}
async function showGroup(id) {
  const [resource, , {members = 0} = {}, problems, ...sections] = await resourceDetails('Groups', id);
  return [resource?.displayName || 'Deleted group', [link('Groups', 'groups'), ` / ${plural(members, 'member')}`], ...problems, h('h2', 'Members'),
    ...await sortedList('Search members', MEMBER_COLUMNS, STATES.slice(0, 3), parameters => readMembers(parameters, id),
      notice('No members', 'Assign people to this group in Entra ID.')), ...sections];
}

// -- Sign-in and navigation --
const SECTIONS = {log: ['Log', showLog], setup: ['Set-up', showSetup], people: ['Employees', showEmployees, showEmployee],
  groups: ['Groups', showGroups, showGroup]};
const expiryNotes = tokens => tokens.filter(({expired, days_left}) => !expired && days_left < 30).map(({kind, name, expires}) =>
  h('p.note.warn', `The ${kind} “${name}” expires on ${date(expires)}. Make a new secret with “token” and enter it in Entra ID.`));
// The people who are still active because max_deactivations held back a call of the last day: [[id, name]].
async function heldBack() {
  if (!setup.max_deactivations) return [];
  const calls = await getLog({text: '"kind":"guard"', count: 1000}), since = Date.now() - 24 * 3600 * 1000;
  const people = new Map(calls.filter(({status, at}) => status === 429 && Date.parse(at) > since).map(({subject, name}) => [subject, name]));
  const names = await getNames([...people.keys()]);
  return [...people].filter(([id]) => names[id]?.active);
}
async function banners() {  // above every view
  const held = await heldBack(), people = held.map(([id, name], index) => [index > 0 && ', ', link(name, 'people', id)]);
  return [setup.paused && h('div.note.bad', h('b', 'This tenant is paused. '), 'It can be read, but every write is refused with 503. ' +
    'Remove “paused” from its configuration; Entra ID then repeats the calls.'),
  held.length && h('div.note.bad', h('b', `${held.length} deactivations are held back. `), `More than ${setup.max_deactivations} people would ` +
    'have become inactive within an hour (max_deactivations). Still active: ', h('p.people', {tabIndex: 0}, people),
  'Is it intended? Raise max_deactivations; Entra ID repeats the calls. If not, check who is assigned in Entra ID.'),
  ...expiryNotes(setup.tokens)];
}
const alertBox = text => h('div.bad', {role: 'alert'}, h('p.note', text));
function signIn(...messages) {
  delete sessionStorage.token; setup = null; view.abort();
  header.hidden = true; form.hidden = false; form.token.value = '';
  main.replaceChildren(...messages.map(alertBox), form); form.token.focus();
}
form.onsubmit = event => { event.preventDefault(); sessionStorage.token = form.token.value.trim(); show(); };
async function show(event) {
  view.abort();
  const {signal} = view = new AbortController(), [name, id] = viewPath().slice(2).split('/').map(decoded);
  const current = Object.hasOwn(SECTIONS, name) ? name : 'log', [, showAll, showDetails] = SECTIONS[current];
  if (!sessionStorage.token) return signIn();
  const [title, lead, ...content] = await Promise.resolve(setup || getSetup()).then(() => (id && showDetails || showAll)(id))
    .catch(error => ['Something went wrong', error.message, h('button', {onclick: show}, 'Try again')]);
  const notes = setup ? await banners().catch(() => []) : [];
  if (signal.aborted) return;
  header.hidden = false; document.title = `${title} – SCIM console`; tenantName.textContent = setup?.tenant || '';
  nav.replaceChildren(...Object.entries(SECTIONS).map(([path, [text]]) =>
    h('a', {href: '#/' + path, ...path === current && {ariaCurrent: 'page'}}, text)));
  const heading = h('h1', {tabIndex: -1}, title);
  main.replaceChildren(...notes.filter(Boolean), heading, h('p.lead', lead), ...content.filter(Boolean));
  if (event?.type === 'hashchange' && shownPath !== viewPath()) { scrollTo(0, 0); heading.focus(); }
  shownPath = viewPath();
}
const decoded = text => { try { return decodeURIComponent(text); } catch { return text; } };  // a link that was typed or cut
function route(event) {
  const token = location.hash.match(/^#token=(.+)/)?.[1];  // from the link that the server prints
  if (token) { sessionStorage.token = decoded(token); setup = null; }
  if (token || !location.hash) history.replaceState(null, '', '#/log');
  return show(event);
}
signOutButton.onclick = () => signIn();
header.querySelector('.skip').onclick = event => { event.preventDefault(); main.tabIndex = -1; main.focus(); };
// '/' leads to the search, the arrow keys go through the rows of a list.
addEventListener('keydown', event => {
  const {key, target} = event, search = main.querySelector('[type=search]'), isTyping = target.matches('input, select, textarea');
  if (event.ctrlKey || event.altKey || event.metaKey || (isTyping && target !== search)) return;
  const rows = [...main.querySelectorAll('.log summary, tbody tr :first-child a')], place = rows.indexOf(target);
  const isInList = place >= 0 || target === search, [up, down] = [key === 'ArrowUp', key === 'ArrowDown'];
  const next = key === '/' && !isTyping ? search : isInList && down ? rows[place + 1] : isInList && up ? rows[place - 1] || search : null;
  if (next) { event.preventDefault(); next.focus(); }
});
addEventListener('unhandledrejection', event => {  // an error of a button or a search; ignored if its view is gone
  event.preventDefault();
  if (!view.signal.aborted && event.reason.name !== 'AbortError') main.prepend(alertBox(event.reason.message));
});
addEventListener('hashchange', route); route();
</script></html>
"""


# ----------------------------------------------------------------------------
# 21. Embedding
#
# The server for other programs: ScimServer, running() and wsgi(), and the thread that
# reloads a changed configuration.
# Uses everything above.
# ----------------------------------------------------------------------------


class ScimServer(HttpServer):
    """A server as an object: a configuration, its tenants and the console at an address.

    config is a Config, its file, its document, or None for a demo tenant in memory. A file is read
    again when it changes. port replaces the port of the configuration; 0 picks a free one. listener
    is a socket to accept from instead. authenticate is that of Application. control is for a server
    under test, which has its methods. Call start() or serve_forever(), and then stop(). Raises
    ConfigError, OSError, and StoreError if no tenant can be served.
    """

    def __init__(
        self,
        config: Source = None,
        *,
        port: int | None = None,
        listener: socket.socket | None = None,
        authenticate: Callable[[str], str | None] | None = None,
        control: Control | None = None,
    ) -> None:
        signature = signature_of(config)  # before the file is read
        settings, control = to_config(config, port), control or Control()
        with ExitStack() as stack:  # which closes what is open if the rest fails
            listener = stack.enter_context(listener or listen(settings))
            if control.rows and not is_loopback(listener.getsockname()[0]):
                raise ConfigError(
                    ["listen: the control API is for an address of this machine alone"],
                    settings.source,
                )
            application = Application(
                settings,
                authenticate,
                control.now,
                control.new_id,
                CONSOLE_PAGE,
                control.new_secret,
                control.rows,
            )
            control.application = application
            stack.callback(application.close)
            if not application.available:
                application.directory(settings.tenants[0].name)  # raises the StoreError
            super().__init__(application, listener, control)
            stack.pop_all()
        self.root = self.url.removesuffix(BASE_PATH)
        self.token, self.client = application.token, application.client
        self.directory, self.faults = application.directory, control.faults
        self.requests, self.unspent = control.requests, control.unspent
        self.reset, self.advance = control.reset, control.advance
        warn_about_setup(application)
        follow_file(application, config, partial(to_config, config, port), signature)


@contextmanager
def running(
    config: Source = None,
    *,
    port: int = 0,
    authenticate: Callable[[str], str | None] | None = None,
    clock: Clock | None = None,
    deterministic: bool = False,
    custom_fields: Sequence[CustomField] = (),
    data_dir: str | os.PathLike[str] = "",
    control_api: bool = False,
    faults_must_fire: bool = False,
) -> Iterator[ScimServer]:
    """Run a server under test during a with block; see its url, token() and directory().

    config, authenticate are those of ScimServer, clock and deterministic those of Control; port 0
    is a free one. custom_fields are those of all tenants, in place of the configuration's, as
    data_dir is. control_api adds /_test/. faults_must_fire raises AssertionError at the end for
    faults that no request has met. Raises ConfigError, OSError, and StoreError if a tenant cannot
    be served.
    """
    control = Control(clock, deterministic, MAX_JOURNAL, control_api)
    if custom_fields or data_dir:  # such a server does not follow its file
        config = to_config(config)
        documents = [
            {key: text for key, text in vars(custom).items() if text} for custom in custom_fields
        ]
        own_fields = ConfigReader().result("custom_fields", documents, [LIST, CustomField])
        config = replace(
            config,
            data_dir=os.fspath(data_dir) or config.data_dir,
            tenants=tuple(
                replace(tenant, custom_fields=own_fields or tenant.custom_fields)
                for tenant in config.tenants
            ),
        )
    server = ScimServer(config, port=port, authenticate=authenticate, control=control)
    try:
        for error in server.application.failures.values():
            raise error
        server.start()
        yield server
        if faults_must_fire and (faults := server.unspent()):
            raise AssertionError(f"no request met {', '.join(map(repr, faults))}")
    finally:
        server.stop()


# -- The plugin of pytest: `pytest -p scim_server` -------------------------------------


def server_factory() -> Iterator[Callable[..., ScimServer]]:
    # Yield a function like running(), whose servers stop at the end.
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(
            running(*arguments, **{"faults_must_fire": True, **options})
        )


def pytest_configure(config: Any) -> None:
    """Give pytest two fixtures: scim_server_factory, and scim, an empty server for each test."""
    fixture, fixtures = importlib.import_module("pytest").fixture, ModuleType("fixtures")
    vars(fixtures).update(
        scim_server_factory=fixture(server_factory),
        scim=fixture(lambda scim_server_factory: scim_server_factory()),
    )
    config.pluginmanager.register(fixtures, "fixtures of scim_server")


def wsgi(
    config: Source = None, *, authenticate: Callable[[str], str | None] | None = None
) -> WsgiApplication:
    """Return the server as a WSGI application, for gunicorn or to mount under a prefix.

    The arguments are those of running(). A configuration file is reloaded when it changes. Call
    this in each process: neither open database files nor threads survive a fork.
    """
    signature, load = signature_of(config), partial(to_config, config)
    application = Application(load(), authenticate, page=CONSOLE_PAGE)
    follow_file(application, config, load, signature)
    return WsgiApplication(application)


# -- Reloading the configuration -----------------------------------------------------


def signature_of(source: Source) -> FileSignature:
    # Return the signature of a configuration file; call this before the file is read.
    return file_signature(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else []


def follow_file(
    application: Application,
    source: Source,
    load: Callable[[], Config],
    signature: FileSignature,
) -> None:
    """Reload a configuration file within a second after it no longer has the signature.

    A daemon thread does this, until the application is closed or nothing else refers to it.
    """
    reference, closing = weakref.ref(application), application.closing

    def run() -> None:
        while not closing.wait(1) and (application := reference()):
            for line in expiry_warnings(application.config, utc_now()):
                warn_once(line)
            if (latest := signature_of(source)) != signature:
                signature[:] = latest
                reload_config(application, load, source)
            del application

    if isinstance(source, (str, os.PathLike)):
        threading.Thread(target=run, daemon=True).start()


def warn_about_setup(application: Application) -> None:
    for name, error in application.failures.items():
        LOG.error("tenant %s is not served, the others are: %s", name, error)
    config = application.config
    if not (is_loopback(config.host) or config.tls or config.trusted_proxies):
        LOG.warning(
            "warning: %s is reachable from other machines and tokens are sent unencrypted; "
            "configure tls, or trusted_proxies for a proxy that provides it",
            config.host,
        )


def reload_config(application: Application, load: Callable[[], Config], file: Source) -> None:
    """Apply a changed configuration, or keep the current one if it is invalid."""
    current = application.config
    fixed = [option for option in fields(Config) if not option.metadata["live"]]
    try:
        config = load()
        application.configure(
            replace(config, **{option.name: getattr(current, option.name) for option in fixed})
        )
    except (ConfigError, StoreError, OSError, ValueError) as error:
        LOG.error(
            "%s: not loaded, keeping the previous configuration: %s",
            file,
            "; ".join(getattr(error, "problems", [str(error)])),
        )
        return
    warn_about_setup(application)
    pending = dict.fromkeys(
        option.metadata["key"] or option.name
        for option in fixed
        if getattr(config, option.name) != getattr(current, option.name)
    )
    LOG.info(
        "%s: loaded, %d tenant(s)%s",
        file,
        len(config.tenants),
        f"; take effect after a restart: {', '.join(pending)}" if pending else "",
    )


# ----------------------------------------------------------------------------
# 22. Demo
#
# Entra ID's cycle, played against any SCIM server by a table of steps.
# Uses chapters 1, 2 and 12. Knows nothing of the server in this file.
# ----------------------------------------------------------------------------


class UsageError(Exception):
    """A command that cannot run with these options; the text says why."""


NO_ANSWER = (  # a part of an error, and what to do
    ("unknown url type", "a URL begins with http:// or https://"),
    ("CERTIFICATE_VERIFY_FAILED", "if its authority is your own, name the file with --cafile"),
    ("WRONG_VERSION_NUMBER", "this is a port for http://, not https://"),
    ("", "start the server in another terminal: python3 scim_server.py"),
)


def answer_to(
    method: str,
    url: str,
    body: str = "",
    type: str = "application/scim+json",
    *,
    token: str = "",
    tls: ssl.SSLContext | None = None,
) -> tuple[int, dict[str, Json]]:
    # Return the status of the answer to a request, and its JSON object, or its text as the detail
    # of one. UsageError if there is no answer.
    headers = {"Content-Type": type} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        request = urllib.request.Request(url, body.encode() or None, headers, method=method)
        with urllib.request.urlopen(request, timeout=30, context=tls) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        remedy = next(remedy for part, remedy in NO_ANSWER if part in str(error))
        raise UsageError(f"{url}: no answer ({error}); {remedy}") from error
    with suppress(TypeError, ValueError):
        return status, dict(json.loads(text))
    return status, {"detail": text[:80].decode(errors="replace").strip()}


DEMO_ADA = {
    "schemas": [USER, ENTERPRISE],
    "userName": "{email}",
    "externalId": "{ada_object_id}",
    "displayName": "Ada Demo",
    "title": "Engineer",
    "active": True,
    "emails": [{"type": "work", "value": "{email}", "primary": True}],
    ENTERPRISE: {"department": "Lifts"},
}
DEMO_BOB = {
    **DEMO_ADA,
    "userName": "bob.{email}",
    "externalId": "{bob_object_id}",
    "displayName": "Bob Demo",
    "emails": [{"type": "work", "value": "bob.{email}", "primary": True}],
}
LOOK_UP = "/Users?filter=userName%20eq%20%22"
# A step: title, method, path, body, then the status and values that the answer must have, and the
# label of its id: {label} stands for the id in later steps. The body of a PATCH is a list of
# operations, or the values to change, which each dialect sends in its own way.
# fmt: off
DEMO_STEPS: list[tuple[str, str, str, Any, int, dict[str, Any], str]] = [
    ("Test Connection: look up a user who does not exist",
     "GET", LOOK_UP + "{nobody}%22", None, 200, {"totalResults": 0}, ""),
    ("Ada is assigned: look her up",
     "GET", LOOK_UP + "{email}%22", None, 200, {"totalResults": 0}, ""),
    ("Create Ada, an engineer", "POST", "/Users", DEMO_ADA, 201, {"title": "Engineer"}, "ada"),
    ("Create her again: refused",
     "POST", "/Users", DEMO_ADA, 409, {"scimType": "uniqueness"}, ""),
    ("Create Bob", "POST", "/Users", DEMO_BOB, 201, {}, "bob"),
    ("Her job title changes",
     "PATCH", "/Users/{ada}", {"title": "Chief"}, 200, {"title": "Chief"}, ""),
    ("Her department changes", "PATCH", "/Users/{ada}", {f"{ENTERPRISE}:department": "Roofs"},
     200, {ENTERPRISE: {"department": "Roofs"}}, ""),
    ("The custom field {custom} is mapped",
     "PATCH", "/Users/{ada}", {f"{FACILIO}:{{custom}}": "{sample}"}, 200, {}, ""),
    ("A mapping mistake, no such custom field: refused",
     "PATCH", "/Users/{ada}", {f"{FACILIO}:no_such_field": "1"}, 400, {}, ""),
    ("The group Night Crew, with Ada", "POST", "/Groups",
     {"schemas": [GROUP], "displayName": "Night Crew {email}", "members": [{"value": "{ada}"}]},
     201, {}, "crew"),
    ("Bob joins the crew", "PATCH", "/Groups/{crew}",
     [{"op": "Add", "path": "members", "value": [{"value": "{bob}"}]}], 200, {}, ""),
    ("Ada leaves the crew", "PATCH", "/Groups/{crew}",
     [{"op": "Remove", "path": "members", "value": [{"value": "{ada}"}]}], 200, {}, ""),
    ("Ada is disabled", "PATCH", "/Users/{ada}", {"active": False}, 200, {"active": False}, ""),
    ("Ada is back", "PATCH", "/Users/{ada}", {"active": True}, 200, {"active": True}, ""),
    ("Ada is deleted for good", "DELETE", "/Users/{ada}", None, 204, {}, ""),
    ("Bob is deleted for good", "DELETE", "/Users/{bob}", None, 204, {}, ""),
    ("The crew is deleted for good", "DELETE", "/Groups/{crew}", None, 204, {}, ""),
    ("Nothing is left of her", "GET", "/Users/{ada}", None, 404, {}, ""),
]
# fmt: on


def changes_of(dialect: str, values: Mapping[str, Json]) -> Json:
    # Return PATCH operations that replace values, as Entra sends them with or without its flag.
    if dialect == "aadOptscim062020":
        return [{"op": "replace", "value": values}]
    return [  # Switch() in a mapping makes a text of a Boolean.
        {"op": "Replace", "path": path, "value": str(value) if isinstance(value, bool) else value}
        for path, value in values.items()
    ]


STOPS = {401: "the token is wrong", 404: "the path is wrong: a Tenant URL ends in /scim/v2"}


def play(url: str, answer_to: Callable[..., Any], dialect: str, custom: Json) -> int:
    """Play the steps in a dialect of PATCH and print them; return how many went wrong.

    answer_to is that of above with a token. custom is a custom field of /Schemas, or {}. UsageError
    for 401 or 404 where another status was expected: then no later step can succeed.
    """
    names = {  # what the {names} in the steps stand for
        "email": f"ada.{secrets.token_hex(4)}@demo.example",
        **{name: str(uuid.uuid4()) for name in ("nobody", "ada_object_id", "bob_object_id")},
        "custom": custom.get("name", ""),
        "sample": {"integer": "1", "boolean": "True"}.get(custom.get("type"), "one"),
    }

    fill = partial(re.sub, r"\{(\w+)\}", lambda match: names[match[1]])
    print(f"\n{url}, dialect {dialect}")
    wrong = 0
    for title, method, path, body, status, values, label in DEMO_STEPS:
        if "{custom}" in title and not custom:
            continue
        if method == "PATCH":
            operations = body if isinstance(body, list) else changes_of(dialect, body)
            body = {"schemas": [PATCH_OP], "Operations": operations}
        actual, answer = answer_to(method, url + fill(path), fill(to_json(body)) if body else "")
        good = actual == status and values.items() <= answer.items()
        detail = answer.get("detail", "") or ("" if good else quoted(answer))
        line = f"  {'ok   ' if good else 'WRONG'}  {fill(title):<52} {actual}  {detail}".rstrip()
        print(line if good else f"{line}\n         expected {status} {to_json(values)}", flush=True)
        if actual in STOPS and not good:
            raise UsageError(f"{url}: {STOPS[actual]}")
        wrong += not good
        names[label] = str(answer.get("id", "unknown"))
    return wrong


# ----------------------------------------------------------------------------
# 23. Commands
#
# main() and its commands: serve (the default), token, check, employees, changes, backup,
# restore, migrate and demo. COMMANDS says what each of them does; None stands for status 0.
# A problem that the user can solve is one line on standard error and exit status 2.
# Uses everything above.
# ----------------------------------------------------------------------------

EXIT_SECONDS = 14  # after SIGTERM; until STOP_SECONDS, requests in flight are answered
RESERVED_FILES, FILES_PER_TENANT = 64, 24


def chosen_file(options: argparse.Namespace) -> str:
    # "" stands for the built-in demo.
    sample = Path(__file__).with_name("sample_config.json")
    return options.config or (str(sample) if sample.exists() else "")


def chosen_config(options: argparse.Namespace) -> Config:
    """Return the configuration file's content with the options of the command line; ConfigError."""
    file = chosen_file(options)
    config = load_config(file) if file else parse_config(DEMO)
    listen = (
        ConfigReader("command line").result("--listen or SCIM_LISTEN", options.listen, ADDRESS)
        if options.listen
        else {}
    )
    if options.test:  # a reset must not empty what a configuration names
        config = replace(
            config,
            data_dir=":memory:",
            database="",
            tenants=tuple(replace(tenant, database="") for tenant in config.tenants),
        )
    return replace(config, data_dir=options.data_dir or config.data_dir, **listen)


def chosen_url(config: Config, url: str | None) -> str:
    # Return the Tenant URL that an option gives, or that of the configuration.
    return (url or url_of(config, config.port)).partition("?")[0].rstrip("/")


def chosen_tenant(options: argparse.Namespace) -> tuple[Config, Tenant]:
    # Return the configuration and the tenant that --tenant names; UsageError.
    config = chosen_config(options)
    tenants = {tenant.name: tenant for tenant in config.tenants}
    if options.tenant not in tenants:
        raise UsageError(f"--tenant {options.tenant}: the configuration has {', '.join(tenants)}")
    return config, tenants[options.tenant]


def existing_store(config: Config, tenant: Tenant) -> Store:
    # Return a tenant's store, which a running server may be using; UsageError if there is none.
    location = store_location(config, tenant)
    if not is_postgres(location) and not os.path.exists(location):
        raise UsageError(f"{location}: does not exist, tenant {tenant.name} has no data yet")
    return Store(location, tenant.name)


def serve(options: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM, reloading the configuration file when it changes."""
    file, load = chosen_file(options), partial(config_for_serving, options)
    signature, config = file_signature(file), load()
    deterministic = options.test == "deterministic"
    control = Control(None, deterministic, MAX_JOURNAL, has_api=True) if options.test else None
    server = ScimServer(config, control=control)
    follow_file(server.application, file or None, load, signature)

    def stop(*_: object) -> None:
        # The alarm ends the process, whatever is running then; what is not committed is undone,
        # as after a crash. Windows has no alarm.
        getattr(signal, "alarm", int)(EXIT_SECONDS)
        # stop() waits for the loop in this thread, so it needs another one.
        threading.Thread(target=server.stop).start()

    def stop_at_exit() -> None:
        threading.main_thread().join()
        server.stop()

    if threading.current_thread() is not threading.main_thread():  # which gets all signals
        threading.Thread(target=stop_at_exit).start()
    else:
        for name, handler in (
            ("SIGINT", stop),
            ("SIGTERM", stop),
            # A false signature makes the next check reload the file. An Event would not do: a
            # second signal during its set() would wait for the lock that the first one holds.
            ("SIGHUP", lambda *_: signature.append((0, 0))),
        ):
            if hasattr(signal, name):  # Windows has no SIGHUP
                signal.signal(getattr(signal, name), handler)
    is_private = is_loopback(config.host) or sys.stdout.isatty()
    print(
        greeting(server.url, config if is_private else server.application.config)
        + f"\n\nControl API  {server.root}{CONTROL_PATH}" * bool(options.test),
        flush=True,
    )
    server.serve_forever()


def config_for_serving(options: argparse.Namespace) -> Config:
    """Raise the limit of open files; return a configuration with the connections that it allows."""
    config = chosen_config(options)
    with suppress(ImportError, OSError, ValueError):
        import resource  # Windows has no such module and no such limit.

        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        # The others are for the tenants' files and their readers.
        room = limit - min(limit // 2, RESERVED_FILES + FILES_PER_TENANT * len(config.tenants))
        if 0 < room < config.max_connections:
            LOG.warning(
                "max_connections: %d, because only %d files may be open (ulimit -n)", room, limit
            )
            return replace(config, max_connections=room)
    return config


def usable_secret(tenant: Tenant) -> str:
    # Return a secret of a tenant that is in the configuration and has not expired, or "".
    return next(
        (token.secret for token in tenant.tokens if token.secret and not token.expired(utc_now())),
        "",
    )


def greeting(url: str, config: Config) -> str:
    """Return what to paste into Entra ID: Tenant URL, and secrets that the file holds."""
    lines = [f"scim_server listening on {url}"]
    for tenant in config.tenants:
        lines += ["", f"tenant {tenant.name}", f"  Tenant URL    {url}"]
        lines += [f"  Token Endpoint  {token_url(url)}"] * bool(tenant.clients)
        lines += [
            f"  {'Client Secret' if isinstance(credential, Client) else 'Secret Token'}  "
            f"{credential.secret or 'not shown'}  "
            f"({credential.name}{', expired' * credential.expired(utc_now())})"
            for credential in tenant.credentials
        ]
        # This link signs in to the console. On loopback nobody else can use it.
        if config.console and is_loopback(config.host) and (secret := usable_secret(tenant)):
            lines.append(f"  Console       {url.removesuffix(BASE_PATH)}/#token={quote(secret)}")
    return "\n".join(lines)


def make_token(options: argparse.Namespace) -> None:
    secret, id = secrets.token_urlsafe(32), f"{options.name}-{secrets.token_hex(4)}"
    label = f"Client Identifier:\n\n  {id}\n\nClient Secret" if options.client else "Secret Token"
    kind, name = ("clients", {"id": id}) if options.client else ("tokens", {"name": options.name})
    print(
        f"{label}, shown only once:\n\n  {secret}\n\n"
        f'Entry for the tenant\'s "{kind}" in the configuration:\n\n  '
        + json.dumps({**name, "sha256": digest(secret)})
    )


def state_of(credential: Token, last_use: str) -> str:
    # Return how a credential is used and when it ends; one that is not used can be withdrawn.
    days, end = credential.time_left(utc_now()).days, time_text(credential.expires or NEVER)
    ends = f", expired {end}" if days < 0 else f", expires {end}, {days} day(s) left"
    return (
        f"{type(credential).__name__.lower():<8} {credential.name}, "
        + (f"last used {last_use}" if last_use else "never used")
        + (ends if credential.expires else "")
        + (", read-only" if credential.access == "read" else "")
    )


def write_config(options: argparse.Namespace) -> None:
    secret = secrets.token_urlsafe(32)
    tokens = [{"name": "entra", "sha256": digest(secret)}]
    tenant = {"name": options.tenant, "tokens": tokens, "custom_fields": []}
    ConfigReader("command line").result("--tenant", tenant, Tenant)  # ConfigError for a wrong name
    document = {"listen": "127.0.0.1:8080", "data_dir": "scim-data", "tenants": [tenant]}
    with open(options.file, "x", encoding="utf-8") as file:  # OSError if there is one
        file.write(json.dumps(document, indent=2) + "\n")
    print(
        f"{options.file}: written. Secret Token of tenant {options.tenant}, shown only once:\n\n"
        f"  {secret}\n\nStart the server: python3 scim_server.py --config {options.file}"
    )


def check_ready(config: Config, url: str) -> int:
    # Ask a server, by default the one of the configuration, whether it is ready; 1 if not.
    tls = ssl.create_default_context()
    if not url:  # a certificate has another name than the one to call this machine by
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    base = chosen_url(config, url)
    status, answer = answer_to("GET", base.removesuffix(BASE_PATH) + "/readyz", tls=tls)
    is_ready = status == 200 and answer == {"detail": "ready"}  # other servers have another text
    print("ready" if is_ready else f"not ready: {base} answers {status}, {answer.get('detail')}")
    return int(not is_ready)


def check(options: argparse.Namespace) -> int:
    config = chosen_config(options)
    if options.ready is not None:
        return check_ready(config, options.ready)
    check_config(config)
    if config.tls:
        tls_context(*config.tls)  # raises OSError for unusable files
    print(f"{chosen_file(options) or 'the built-in demo'}: no mistakes found")
    for tenant in config.tenants:
        print(
            f"\ntenant {tenant.name}: {len(tenant.tokens)} token(s), "
            f"{len(tenant.clients)} client(s), {len(tenant.custom_fields)} custom field(s)"
        )
        last_uses: dict[Token, str] = {}
        with (
            suppress(UsageError),  # there is no store yet
            closing(existing_store(config, tenant)) as store,
            store.reading() as session,
        ):
            last_uses = {
                credential: session.setting(f"used {credential.entry}")
                for credential in tenant.credentials
            }
        for credential in tenant.credentials:
            print(f"  {state_of(credential, last_uses.get(credential, ''))}")
        for custom in tenant.custom_fields:
            print(f"  {custom.type:<8} {custom.urn}")
    return int(any(item.time_left(utc_now()) < CHECK_TIME for _, item in config.credentials))


def back_up(options: argparse.Namespace) -> None:
    with closing(existing_store(*chosen_tenant(options))) as store:
        store.backup(options.file)
    print(f"tenant {options.tenant}: {store.place} copied to {options.file}")


def restore_file(path: str, backup: str, tenant: str, now: str) -> str:
    """Give a tenant's database the content of a backup, all or nothing, while no server uses it.

    A damaged database is moved aside to *.damaged-NOW; returns the new name, "" if it was sound.
    StoreError for a file that is no backup of the tenant, and for a database that is in use.
    """
    with closing(SqliteLink("")) as restored:  # a temporary file
        copy_backup(backup, restored, tenant)
        if is_postgres(path):
            with closing(Store(path, tenant)) as store, store.writing(is_copy=True) as session:
                Session(restored).continue_numbering(session.numbers())
                copy_rows(Session(restored), session)
            return ""
        try:
            try:
                replace_content(path, restored)
                return ""
            except Damaged:
                with suppress(StoreError), closing(SqliteLink(path)) as damaged, damaged.snapshot():
                    # Often its numbers can still be read.
                    Session(restored).continue_numbering(Session(damaged).numbers())
                # The damaged database stays in its place until there is a better one.
                replace_content(f"{path}.restored", restored)
                for file in filter(os.path.exists, (path, f"{path}-wal")):
                    os.replace(file, f"{file}.damaged-{now}")
                os.replace(f"{path}.restored", path)
                return f"{path}.damaged-{now}"
        except (OSError, StoreError) as error:
            raise StoreError(
                f"{path}: cannot be replaced ({error}); stop the server that uses it"
            ) from error


def copy_backup(backup: str, target: SqliteLink, tenant: str) -> None:
    """Copy a tenant's backup to another database, in the format of this version; StoreError.

    Without immutable=1, SQLite opens no database in a directory where it may not write.
    """
    address = Path(backup).resolve().as_uri() + (
        "?mode=ro" if os.path.exists(f"{backup}-wal") else "?mode=ro&immutable=1"
    )
    try:
        with closing(SqliteLink(address, uri=True)) as source, target.errors():
            source.copy_to(target)
            if not target.version:
                raise StoreError("not made by scim_server")
            if (owner := Session(target).setting("tenant")) not in ("", tenant):
                raise StoreError(f"a backup of tenant {owner}, not of {tenant}")
        target.check_pages()
        migrate(target)
    except StoreError as error:
        raise StoreError(
            f"{backup}: cannot be restored ({error.reason}); choose another one"
        ) from error


def replace_content(path: str, restored: SqliteLink) -> None:
    # Replace the content of a database in one commit; no number is given out again.
    make_file(path)
    # Nothing can be read in this mode while another process has the database open.
    with closing(SqliteLink(path, ["locking_mode = EXCLUSIVE"], timeout=0)) as target:
        target.check_pages()
        migrate(target)
        with restored.transaction(), target.snapshot():
            Session(restored).continue_numbering(Session(target).numbers())
        restored.copy_to(target)


def restore(options: argparse.Namespace) -> None:
    config, tenant = chosen_tenant(options)
    path = store_location(config, tenant)
    if path == ":memory:":
        raise StoreError("data_dir: :memory: keeps nothing, so there is nothing to restore to")
    if moved := restore_file(path, options.file, tenant.name, f"{utc_now():%Y%m%dT%H%M%S.%f}"):
        LOG.warning("%s: damaged, moved to %s", path, moved)
    print(f"tenant {tenant.name}: {path} is as {options.file} was")


def move(options: argparse.Namespace) -> None:
    config, tenant = chosen_tenant(options)
    is_url = is_postgres(options.to)
    new_config = replace(
        config,
        database=options.to if is_url else "",
        data_dir=config.data_dir if is_url else options.to,
    )
    location = store_location(new_config, replace(tenant, database=""))
    with (
        closing(existing_store(config, tenant)) as source,
        closing(Store(location, tenant.name)) as target,
    ):
        source.move_to(target, lambda text: print(f"\r{text}\033[K", end="", file=sys.stderr))
        print(f"\rtenant {tenant.name}: moved to {target.place}\033[K")
    print(f'Name it as "{"database" if is_url else "data_dir"}", then restart the servers.')


def show_employees(options: argparse.Namespace) -> None:
    directory = Directory.as_stored(existing_store(*chosen_tenant(options)))
    employees = directory.employees(
        {"true": True, "false": False}.get(options.active), options.changed_since, options.id
    )
    table = employee_table(employees, directory.link_names)
    forms = {  # all of them are lazy, and only the chosen one is made
        "table": aligned(table),
        "csv": employee_csv(table),
        "json": (json.dumps(asdict(employee), ensure_ascii=False) + "\n" for employee in employees),
    }
    sys.stdout.writelines(forms[options.format])


def aligned(table: Iterable[Sequence[str]]) -> Iterator[str]:
    # Yield a table as aligned lines, without empty columns; its first row has the titles.
    rows = list(table)
    widths = {
        n: max(map(len, column))
        for n, column in enumerate(zip(*rows, strict=True))
        if any(column[1:]) or not rows[1:]
    }
    for row in rows:
        yield "  ".join(row[n].ljust(width) for n, width in widths.items()).rstrip() + "\n"


def show_changes(options: argparse.Namespace) -> None:
    directory = Directory.as_stored(existing_store(*chosen_tenant(options)))
    with suppress(KeyboardInterrupt):
        for change in directory.follow(options.after, options.follow, kind=""):
            print(json.dumps(asdict(change), ensure_ascii=False), flush=True)


def demo(options: argparse.Namespace) -> int:
    config = chosen_config(options)
    url = chosen_url(config, options.url)
    token, mistake = options.token or usable_secret(config.tenants[0]), "--token is needed"
    try:
        tls = ssl.create_default_context(cafile=options.cafile)
    except OSError as error:
        raise UsageError(f"--cafile {options.cafile}: cannot be used ({error})") from error
    if options.client_id or options.client_secret:
        form = {
            "grant_type": "client_credentials",
            "client_id": options.client_id,
            "client_secret": options.client_secret,
        }
        _, answer = answer_to("POST", token_url(url), urlencode(form), FORM, tls=tls)
        token, mistake = answer.get("access_token"), f"--client-id: no access token: {answer}"
    if not token:
        raise UsageError(mistake)
    with_token = partial(answer_to, token=token, tls=tls)
    status, schema = with_token("GET", f"{url}/Schemas/{FACILIO}")
    custom: Json = next(iter(schema.get("attributes", ())), {}) if status == 200 else {}
    wrong = sum(play(url, with_token, name, custom) for name in ("default", "aadOptscim062020"))
    print(f"\n{wrong or 'no'} step(s) went wrong")
    return 1 if wrong else 0


# -- The command line ------------------------------------------------------------------

Options = dict[str, dict[str, Any]]  # the keyword arguments of add_argument(), by option
# fmt: off
SERVE_OPTIONS: Options = {
    "--config": {"metavar": "FILE", "help": "configuration (default: sample_config.json in the "
                 "directory of this program, otherwise a built-in demo tenant)"},
    "--data-dir": {"metavar": "DIR", "help": "directory of the tenants' files; "
                   ":memory: stores nothing on disk"},
    "--listen --port": {"metavar": "HOST:PORT", "dest": "listen",
                        "help": "address, or only the port; port 0 picks a free one"},
    "--test": {"nargs": "?", "const": "live", "choices": ("live", "deterministic"),
               "help": "for tests of a client: add the control API /_test/, and keep all data in "
               "memory unless --data-dir is given; deterministic: ids, secrets and clock count up"},
    "--version": {"action": "version", "version": f"scim_server {__version__}"},
}
CONFIG, DATA_DIR = (
    {name: {**SERVE_OPTIONS[name], "default": argparse.SUPPRESS}}
    for name in ("--config", "--data-dir")
)
TENANT: Options = {"--tenant": {"required": True, "metavar": "NAME"}, **DATA_DIR, **CONFIG}
COPY: Options = {"file": {"metavar": "FILE"}, **TENANT}
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int | None], str, Options]] = {
    "token": (make_token, "make a secret and its configuration entry", {
        "--name": {"default": "entra", "help": "name of the token (default: entra)"},
        "--client": {"action": "store_true",
                     "help": "make a Client Identifier and a Client Secret (OAuth 2.0)"}}),
    "init": (write_config, "write a first configuration, with a fresh secret", {
        "file": {"nargs": "?", "default": "config.json", "metavar": "FILE"},
        "--tenant": {"default": "main", "metavar": "NAME"}}),
    "check": (check, "validate a configuration, list the custom fields' names for Entra ID", {
        "--ready": {"nargs": "?", "const": "", "metavar": "URL",
                    "help": "instead ask a running server whether it is ready (status 0), "
                            "or not (1)"},
        **CONFIG, **DATA_DIR}),
    "employees": (show_employees, "print a tenant's employees", {
        "--format": {"choices": ("table", "csv", "json"), "default": "table"},
        "--active": {"choices": ("true", "false"), "help": "only active, or only inactive ones"},
        "--changed-since": {"default": "", "metavar": "TIME",
                            "help": "such as 2026-11-24T08:00:00Z"},
        "--id": {"type": int, "help": "only the employee with this id"},
        **TENANT}),
    "changes": (show_changes, "print a tenant's changes, a line of JSON each", {
        "--after": {"type": int, "default": 0, "metavar": "SEQ",
                    "help": "only changes after this number"},
        "--follow": {"action": "store_true", "help": "keep printing new changes until Ctrl-C"},
        **TENANT}),
    "backup": (back_up, "copy a tenant's database to a new file, even while the server runs", COPY),
    "restore": (restore, "put a backup in the place of a tenant's database", COPY),
    "migrate": (move, "move a tenant's data to another database, while it is read", {
        "--to": {"required": True, "metavar": "PLACE",
                 "help": "a directory, or postgresql://user@host/database"},
        **TENANT}),
    "demo": (demo, "play Entra ID's cycle against a running server", {
        "--url": {"metavar": "URL", "help": "its Tenant URL (default: as configured)"},
        "--token": {"help": "its Secret Token (default: that of the first tenant)"},
        "--client-id": {"metavar": "ID", "default": "",
                        "help": "its Client Identifier, in place of --token"},
        "--client-secret": {"metavar": "SECRET", "default": "", "help": "its Client Secret"},
        "--cafile": {"metavar": "FILE", "help": "certificate of the authority of its certificate"},
        **CONFIG}),
}
# fmt: on


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    # Return the options of the command line; run is the function to call.
    parser = argparse.ArgumentParser(
        prog="scim_server.py", description="A SCIM 2.0 server for Microsoft Entra ID, in one file."
    )
    commands = parser.add_subparsers(metavar="COMMAND", help="without a command: serve")
    for name, (run, purpose, options) in {"": (serve, "", SERVE_OPTIONS), **COMMANDS}.items():
        command = commands.add_parser(name, help=purpose) if name else parser
        command.set_defaults(run=run)
        for option, details in options.items():
            command.add_argument(*option.split(), **details)
    # Containers are configured by environment variables.
    for name in ("config", "listen", "data_dir"):
        parser.set_defaults(**{name: os.environ.get(f"SCIM_{name.upper()}") or None})
    return parser.parse_args(arguments)


class LinePrinter(logging.Handler):
    """Prints what is logged on standard error, which may be closed."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(
                f"{'scim_server: ' * (record.name != ACCESS_LOG.name)}{self.format(record)}\n"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, 2 for a problem that the user can solve.

    A server ends after SIGINT or SIGTERM. In another thread than the main one, it ends with the
    main thread; use ScimServer to end it earlier.
    """
    # A service may start this without an output: then Python has None in its place.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Names are in UTF-8, whatever the code page of a console, and lines end as CSV says.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="")
    options, printer, level = parse_options(arguments), LinePrinter(), LOG.level
    LOG.addHandler(printer)
    LOG.setLevel(logging.INFO)
    try:
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # such as `| head`. Python flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, StoreError, ScimError, OSError) as error:
        LOG.error("%s", error)
    except ConfigError as error:
        for line in error.problems if options.run is check else ["; ".join(error.problems)]:
            LOG.error("%s: %s", error.source, line)
    finally:
        LOG.removeHandler(printer)
        LOG.setLevel(level)
    return 2


if __name__ == "__main__":
    sys.exit(main())
