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
             14 Other endpoints   employees, changes, the console's API, metrics
             15 Application       handle(Request) -> Response: tenants, tokens, routes, health
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
import struct
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TextIO
from urllib.parse import parse_qsl, quote, unquote, urlencode

# ----------------------------------------------------------------------------
# 1. Vocabulary                                          RFC 7643, RFC 7644 §3.12
#
# The names of the protocol, the limits of this server, and its one error.
# Knows nothing of everything else.
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
DEFAULT_COUNT = 100  # resources in a page when the client names no count
MAX_COUNT = 1_000  # and at the most
MAX_ANSWERED_MEMBERS = 1_000  # a PATCH of a larger group answers 204: it costs what it changes
MAX_FILTER_LENGTH = 8 * 1024  # characters
MAX_FILTER_DEPTH = 50
MAX_DETAIL = 4_000  # characters of an error's detail
MAX_TEXT = 64 * 1024  # characters of a value
MAX_VALUES = 1_000  # of an attribute; members are bounded by the body alone
MAX_DEPTH = 50  # of objects and lists in a body
MAX_BODY = 2 * 1024 * 1024  # octets
MAX_BULK_BODY = 10 * 1024 * 1024
MAX_BULK_OPERATIONS = 1_000
MAX_WAIT = 60  # seconds that a long poll may wait
CURSOR_SECONDS = 3_600  # how long a cursor may be used
SIGNATURE_LENGTH = 16  # octets of its HMAC
__version__ = "1.0.0"
__all__ = [  # the public interface; the rest may change
    "Application",
    "Change",
    "Config",
    "ConfigError",
    "CustomField",
    "Directory",
    "Employee",
    "Exchange",
    "Fault",
    "Page",
    "Request",
    "Response",
    "ScimError",
    "ScimServer",
    "Store",
    "StoreError",
    "load_config",
    "main",
    "parse_config",
    "running",
    "wsgi",
]
UTC = timezone.utc  # Python 3.10 has no datetime.UTC
Json = Any  # what json.loads returns
Resource = dict[str, Any]


class ScimError(Exception):
    """An answer other than success: HTTP status, scimType of RFC 7644 table 9 or "", and a sentence.

    The detail is read by an administrator in a provisioning log: it names the attribute or option,
    says what was found, and what would do. headers go into the HTTP answer.
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
        self.reason = reason
        self.status, self.scim_type, self.headers = status, scim_type, dict(headers)
        self.detail = detail if len(detail) <= MAX_DETAIL else f"{detail[: MAX_DETAIL - 3]}..."

    def body(self) -> Json:
        """Return the Error message of RFC 7644 §3.12; its status is a string."""
        scim_type = {"scimType": self.scim_type} if self.scim_type else {}
        return {"schemas": [ERROR], "status": str(self.status), **scim_type, "detail": self.detail}


invalid_filter = partial(ScimError, 400, "invalidFilter")  # these take the detail alone
invalid_path = partial(ScimError, 400, "invalidPath")
invalid_syntax = partial(ScimError, 400, "invalidSyntax")
invalid_value = partial(ScimError, 400, "invalidValue")


def quoted(value: Json) -> str:
    """Return a client's value as JSON text, cut to a length that fits an error's detail."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


# ----------------------------------------------------------------------------
# 2. Schemas                                                            RFC 7643
#
# What a resource is made of, as frozen data. It alone decides what is validated,
# what type a filter compares, what is returned, what PATCH may write and what
# /Schemas prints. Uses chapter 1. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------

TYPE_NAMES = {
    "boolean": "a Boolean",
    "integer": "an Integer",
    "dateTime": "a dateTime",
    "complex": "an object",
}
INTEGER_LIMIT = 2**63  # integers are 64-bit, as in the store's keys
DATE_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?"
    r"(?:Z|([+-])(\d\d):(\d\d))?",
    re.ASCII | re.IGNORECASE,
)


def date_time_key(text: str) -> str:
    """Return a dateTime as UTC text whose order is that of the instants; ValueError if it is none."""
    # Entra sends years from 0001 and seven fraction digits, which Python 3.10's fromisoformat refuses.
    if not (parts := DATE_TIME.fullmatch(text)):
        raise ValueError(text)
    instant = datetime(*map(int, parts.group(1, 2, 3, 4, 5, 6)))  # type: ignore[arg-type]
    offset = timedelta(hours=int(parts[9] or 0), minutes=int(parts[10] or 0))  # none means UTC
    try:
        instant += -offset if parts[8] == "+" else offset
    except OverflowError:  # .NET's first and last instant, elsewhere than in Greenwich
        instant = datetime.min if parts[8] == "+" else datetime.max.replace(microsecond=0)
    return f"{instant.isoformat()}.{(parts[7] or ''):0<9}"


@dataclass(frozen=True, eq=False)
class Attribute:
    """An attribute with its characteristics (RFC 7643 §2.2, §7) and, behind description, our own."""

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
    default: Json = None  # the value of a resource whose client never sent one
    is_membership: bool = False  # marks membership, which is kept as rows and not in the body
    path: str = ""  # in a resource type: "emails.type", "urn:…:User:department"
    index: str = field(init=False)  # path in lower case
    by_name: dict[str, Attribute] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", self.path.lower())
        object.__setattr__(self, "by_name", {sub.name.lower(): sub for sub in self.sub_attributes})

    def with_paths(self, prefix: str = "") -> Attribute:
        """Return this attribute and its sub-attributes with their paths, behind a prefix."""
        path = prefix + self.name
        # An extension's attributes follow its URN after a colon (RFC 7644 §3.10), others after a dot.
        below = path and path + (":" if ":" in self.name else ".")
        subs = tuple(sub.with_paths(below) for sub in self.sub_attributes)
        return replace(self, path=path, sub_attributes=subs)

    def sub_attribute(self, name: str) -> Attribute | None:
        """Return the sub-attribute of that name in any case (RFC 7643 §2.1), or None."""
        return self.by_name.get(name.lower())

    @property
    def value_attribute(self) -> Attribute | None:
        """The sub-attribute "value", for which a complex attribute may stand (RFC 7643 §2.4)."""
        return (
            self.by_name.get("value") if ":" not in self.name else None
        )  # a field of an extension

    def convert(self, value: Json) -> Json:
        """Return a JSON value in the type of this simple attribute; ScimError 400 invalidValue."""
        if self.type == "boolean":
            # Text for a Boolean or an Integer is converted: Entra's Switch() mapping sends "True".
            if isinstance(value, (bool, str)) and str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
        elif self.type == "integer":
            if isinstance(value, str) and re.fullmatch(r"-?\d{1,19}", value, re.ASCII):
                value = int(value)
            if type(value) is int:
                if not -INTEGER_LIMIT <= value < INTEGER_LIMIT:
                    raise invalid_value(
                        f"{self.path}: {quoted(value)} is beyond the 64 bits of an Integer"
                    )
                return value
        elif isinstance(value, str) and self.type != "complex":
            if len(value) > MAX_TEXT:
                raise invalid_value(
                    f"{self.path}: the text has {len(value)} characters, more than {MAX_TEXT}"
                )
            if self.type != "dateTime":
                return value
            with suppress(ValueError):
                return date_time_key(value) and value
        expected = TYPE_NAMES.get(self.type, "a String")
        parts = (self.path, quoted(value))
        raise invalid_value(
            f"{self.path}: expected {expected}, got {quoted(value)}",
            reason=(self.type, *parts)
            if self.type in ("integer", "boolean")
            else ("type", self.path, expected, quoted(value)),
        )

    def values(self, holder: Mapping[str, Json]) -> list[Json]:
        """Return the values of this attribute in a resource or complex value, none, one or many."""
        value = holder.get(self.name, [])
        return value if self.multi_valued or self.name not in holder else [value]

    def key(self, value: Json) -> str:
        """Return the text by whose code points values of this attribute are equal and in order."""
        if self.type == "boolean":
            return "true" if value else "false"
        if self.type == "integer":
            return f"{value + INTEGER_LIMIT:020d}"
        if self.type == "dateTime":
            return date_time_key(value)
        if self.type == "complex":
            return "1"  # says only that it is there
        return value if self.case_exact else value.casefold()  # type: ignore[no-any-return]


def strings(*names: str) -> tuple[Attribute, ...]:
    """Return attributes of type String with no characteristic but their names."""
    return tuple(map(Attribute, names))


def plural(
    name: str, value_type: str = "string", types: tuple[str, ...] = (), display: bool = True
) -> Attribute:
    """Return a multi-valued attribute with the default sub-attributes of RFC 7643 §2.4."""
    return Attribute(
        name,
        "complex",
        multi_valued=True,
        sub_attributes=(
            Attribute(
                "value",
                value_type,
                case_exact=value_type != "string",
                reference_types=("external",) if value_type == "reference" else (),
            ),
            Attribute("display", published=display),
            Attribute("type", canonical_values=types),
            Attribute("primary", "boolean"),
        ),
    )


@dataclass(frozen=True)
class Schema:
    """A schema (RFC 7643 §7): URN, name, and attributes not yet placed in a resource type."""

    id: str
    name: str
    attributes: tuple[Attribute, ...]
    description: str = ""


computed = partial(Attribute, mutability="readOnly")
EXTERNAL_ID = Attribute("externalId", case_exact=True)
COMMON = (
    computed("schemas", "reference", multi_valued=True, case_exact=True, returned="always"),
    computed("id", case_exact=True, returned="always", uniqueness="server"),
    EXTERNAL_ID,
)
META = computed(
    "meta",
    "complex",
    sub_attributes=(
        computed("resourceType", case_exact=True),
        computed("created", "dateTime"),
        computed("lastModified", "dateTime"),
        computed("location", "reference", case_exact=True),
        computed("version", case_exact=True),
    ),
)


@dataclass(frozen=True, eq=False)
class ResourceType:
    """A resource type (RFC 7643 §6) and, as root, all its attributes seen as one complex attribute."""

    name: str
    endpoint: str
    schema: Schema
    extensions: tuple[Schema, ...] = ()
    root: Attribute = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # With extensions as complex attributes named by their URNs, the same few lines walk
        # resources, complex values and extension objects.
        extensions = [
            Attribute(one.id, "complex", sub_attributes=one.attributes) for one in self.extensions
        ]
        attributes = (*COMMON, *self.schema.attributes, *extensions, META)
        object.__setattr__(
            self, "root", Attribute("", "complex", sub_attributes=attributes).with_paths()
        )

    def location(self, base_url: str, id: str) -> str:
        """Return the URL of a resource."""
        return f"{base_url}{self.endpoint}/{id}"

    @property
    def scopes(self) -> dict[str, Attribute]:
        """What the URNs of the schemas mean: the root, and its attributes that are extensions."""
        extensions = [self.root.by_name[extension.id.lower()] for extension in self.extensions]
        return {self.schema.id: self.root, **{found.name: found for found in extensions}}


USER_SCHEMA = Schema(
    USER,
    "User",
    description="User Account",
    attributes=(
        Attribute("userName", required=True, uniqueness="server"),
        Attribute(
            "name",
            "complex",
            sub_attributes=strings(
                "formatted",
                "familyName",
                "givenName",
                "middleName",
                "honorificPrefix",
                "honorificSuffix",
            ),
        ),
        *strings("displayName", "nickName"),
        Attribute("profileUrl", "reference", case_exact=True, reference_types=("external",)),
        Attribute("title", description="The job title; the employee's designation"),
        *strings("userType", "preferredLanguage", "locale", "timezone"),
        # Okta takes a user without active for a deactivated one, so a user always has it.
        Attribute("active", "boolean", default=True),
        # Okta always sends a password: it is accepted, and neither stored nor published.
        Attribute("password", mutability="writeOnly", returned="never", published=False),
        # Entra's validator makes a test for each published attribute and stops at these displays.
        plural("emails", types=("work", "home", "other"), display=False),
        plural(
            "phoneNumbers", types=("work", "home", "mobile", "fax", "pager", "other"), display=False
        ),
        plural("ims", types=("aim", "gtalk", "icq", "xmpp", "msn", "skype", "qq", "yahoo")),
        plural("photos", "reference", types=("photo", "thumbnail")),
        Attribute(
            "addresses",
            "complex",
            multi_valued=True,
            sub_attributes=(
                *strings(
                    "formatted", "streetAddress", "locality", "region", "postalCode", "country"
                ),
                Attribute("type", canonical_values=("work", "home", "other")),
                Attribute("primary", "boolean"),
                Attribute("display", published=False),
            ),
        ),
        computed(
            "groups",
            "complex",
            multi_valued=True,
            is_membership=True,
            sub_attributes=(
                computed("value", case_exact=True),
                computed("$ref", "reference", case_exact=True, reference_types=("Group",)),
                computed("display"),
                computed("type", canonical_values=("direct",)),
            ),
        ),
        plural("entitlements"),
        plural("roles"),
        plural("x509Certificates", "binary"),
    ),
)
GROUP_SCHEMA = Schema(
    GROUP,
    "Group",
    description="Group",
    attributes=(
        # RFC 7643 does not ask for unique names; Entra matches groups by displayName, so it needs them.
        Attribute("displayName", required=True, uniqueness="server"),
        Attribute(
            "members",
            "complex",
            multi_valued=True,
            is_membership=True,
            sub_attributes=(
                Attribute(
                    "value", required=True, case_exact=True
                ),  # an id of ours, and ids have a case
                # Computed, yet published: without it scim2-tester sends ids of nobody, which are passed over.
                Attribute(
                    "$ref",
                    "reference",
                    case_exact=True,
                    mutability="immutable",
                    reference_types=("User", "Group"),
                ),
                Attribute("type", canonical_values=("User", "Group")),
                Attribute("display"),
            ),
        ),
    ),
)
MEMBERSHIP_ATTRIBUTES = tuple(
    found.name
    for schema in (USER_SCHEMA, GROUP_SCHEMA)
    for found in schema.attributes
    if found.is_membership
)
ENTERPRISE_SCHEMA = Schema(
    ENTERPRISE,
    "EnterpriseUser",
    description="Enterprise User",
    attributes=(
        *strings("employeeNumber", "costCenter", "organization", "division", "department"),
        Attribute(
            "manager",
            "complex",
            sub_attributes=(
                Attribute("value", case_exact=True),
                Attribute(
                    "$ref", "reference", case_exact=True, published=False, reference_types=("User",)
                ),
                Attribute("displayName"),
            ),
        ),
    ),
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


@lru_cache(1024)  # tenants with the same custom fields share what is made of them
def resource_types(custom_fields: tuple[CustomField, ...]) -> dict[str, ResourceType]:
    """Return a tenant's resource types by name, User first (Entra's validator reads them in order)."""
    own = Schema(
        FACILIO,
        "FacilioUser",
        description="Custom fields of the Employee module",
        attributes=tuple(
            Attribute(custom.link_name, custom.type.lower(), description=custom.display_name)
            for custom in custom_fields
        ),
    )
    return {
        "User": ResourceType("User", "/Users", USER_SCHEMA, (ENTERPRISE_SCHEMA, own)),
        "Group": ResourceType("Group", "/Groups", GROUP_SCHEMA),
    }


# ----------------------------------------------------------------------------
# 3. Filters and paths                               RFC 7644 §3.4.2.2, §3.5.2
#
# Text becomes a tree once, with every name bound to its Attribute; then there
# are two readers: matches() here, compile_filter() in chapter 6.
# Uses chapters 1 and 2. Knows nothing of HTTP, SQL or the clock.
# ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttributePath:
    """Where a filter looks: attributes from a resource, or from one complex value, downwards."""

    attributes: tuple[Attribute, ...]

    @property
    def attribute(self) -> Attribute:
        """The last attribute, the one that is looked at."""
        return self.attributes[-1]

    def items(self, value: Json) -> list[Json]:
        """Return the values at this target in a resource or complex value, one by one."""
        found = [value]
        for attribute in self.attributes:
            found = [item for holder in found for item in attribute.values(holder)]
        return found

    def keys(self, value: Json) -> list[str]:
        """Return the keys of the values at this target."""
        return [self.attribute.key(item) for item in self.items(value)]


@dataclass(frozen=True, slots=True)
class Compare:
    """A comparison of an attribute's keys with the key of a literal, whose JSON value it keeps."""

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
    """All of some filters; without any, everything matches."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Any of some filters; without any, nothing matches."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite of a filter."""

    inner: Filter


@dataclass(frozen=True, slots=True)
class ValuePath:
    """Whether one and the same value of a complex attribute satisfies a filter on it."""

    target: AttributePath
    inner: Filter


Filter = Compare | Present | And | Or | Not | ValuePath
EVERYTHING, NOTHING = And(()), Or(())
TEST: dict[str, Callable[[str, str], bool]] = {
    "eq": operator.eq,
    "co": operator.contains,
    "sw": str.startswith,
    "ew": str.endswith,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
}


def matches(filter: Filter, value: Json) -> bool:
    """Return whether a resource, or one value of a complex attribute, satisfies a filter."""
    match filter:
        case And(filters):
            return all(matches(inner, value) for inner in filters)
        case Or(filters):
            return any(matches(inner, value) for inner in filters)
        case Not(inner):
            return not matches(inner, value)
        case ValuePath(target, inner):
            return any(matches(inner, item) for item in target.items(value))
        case Present(target):
            return any(target.keys(value))  # the key of empty text is empty: not present
        case Compare(target, op, key):
            return any(TEST[op](found, key) for found in target.keys(value))


# -- Names -------------------------------------------------------------------

Bound = tuple[Attribute, ...] | None  # the attributes down to what a name means; None if unknown


def find_extension(name: str, resource_type: ResourceType) -> tuple[Attribute, str] | None:
    """Return the complex attribute that the schema URN at the head of a name means, and the rest."""
    # URNs hold dots and colons themselves, and none begins with another. A dot in place of the
    # colon behind one is the spelling that Entra used before 2018.
    for urn, scope in resource_type.scopes.items():
        rest = name[len(urn) :]
        if name[: len(urn)].lower() == urn.lower() and rest[:1] in ("", ":", "."):
            return scope, rest[1:]
    return None


@lru_cache(1024)
def resolve(name: str, resource_type: ResourceType) -> Bound:
    """Return the attributes from the root to a name in attrPath notation, () to the root by its URN."""
    # A bare name that the core schema lacks may be an extension's, for Entra's path "manager".
    scopes, names = list(resource_type.scopes.values()), name.split(".")
    if extension := find_extension(name, resource_type):
        scope, rest = extension
        scopes, names = [scope], rest.split(".") if rest else []
    for scope in scopes:
        found = () if scope is resource_type.root else (scope,)
        for part in names:
            if not (sub := scope.sub_attribute(part)):
                break
            scope, found = sub, (*found, sub)
        else:
            return found
    return None


def resolve_below(target: Bound, name: str, strict: bool = False) -> Bound:
    """Return the sub-attribute of a target's last attribute as the scope of its value filter; ScimError if strict."""
    sub = target[-1].sub_attribute(name) if target else None
    if strict and target and not sub:
        raise invalid_path(f"path: {target[-1].path} has no sub-attribute {quoted(name)}")
    return (sub,) if sub else None


# -- The parser: each rule takes tokens and a position, and returns what it read and the next one ---

Tokens = list[tuple[str, str, int]]  # kind, text, column from 1
Scope = Callable[[str], Bound]  # binds the names in a filter
Parsed = tuple[Filter, int]  # and the position after it
TOKEN = re.compile(
    r"""
    \s* (?: (?P<string> "(?:[^"\\]|\\.)*" )
          | (?P<number> -?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.]) )
          | (?P<name>   [A-Za-z$_][\w.:$-]* )
          | (?P<sub>    \.[A-Za-z$][\w$-]* )
          | (?P<mark>   [()\[\]] ) )""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)
UNSTORABLE = re.compile(
    "[\0\ud800-\udfff]"
)  # NUL and half a surrogate pair: no UTF-8 database takes it
LITERAL = json.JSONDecoder(strict=False)  # which may hold control characters
STRING_TYPES = ("string", "reference")


def bad_filter(column: int, expected: str, found: str) -> ScimError:
    """Return the error of a filter that does not parse."""
    found = quoted(found) if found else "the end"
    return invalid_filter(f"filter, column {column}: expected {expected}, found {found}")


def tokens_of(text: str) -> Tokens:
    """Return the tokens of a filter or path, an end token last; ScimError 400 invalidFilter."""
    if len(text) > MAX_FILTER_LENGTH:
        raise invalid_filter(f"filter: longer than {MAX_FILTER_LENGTH} characters")
    tokens, position, end = [], 0, len(text.rstrip())
    while position < end:
        if not (token := TOKEN.match(text, position)):
            rest = text[position:end].lstrip()
            raise bad_filter(
                end - len(rest) + 1, "a name, a value in double quotes or a bracket", rest
            )
        kind = token.lastgroup or ""
        tokens.append((kind, token[kind], token.start(kind) + 1))
        position = token.end()
    return [*tokens, ("end", "", end + 1)]


def parse_filter(text: str, resource_type: ResourceType) -> Filter:
    """Return the bound tree of a filter on resources (RFC 7644 §3.4.2.2); ScimError invalidFilter."""
    return parse_until("", tokens_of(text), 0, partial(resolve, resource_type=resource_type))[0]


# FILTER = attrExp / logExp / valuePath / *1"not" "(" FILTER ")"; "and" binds tighter than "or"
def parse_until(mark: str, tokens: Tokens, position: int, scope: Scope, depth: int = 0) -> Parsed:
    """Return the filter that a mark closes, a bracket or "" for the end; what follows is behind it."""
    if depth > MAX_FILTER_DEPTH:
        raise invalid_filter(f"filter: brackets nested deeper than {MAX_FILTER_DEPTH}")
    term, position = parse_term(tokens, position, scope, depth)
    choices = [[term]]
    while (word := tokens[position][1].lower()) in ("and", "or"):
        term, position = parse_term(tokens, position + 1, scope, depth)
        if word == "or":
            choices.append([])
        choices[-1].append(term)
    _, text, column = tokens[position]
    if text != mark:
        raise bad_filter(column, f"'{mark}'" if mark else "'and', 'or' or the end", text)
    filters = [And(tuple(terms)) if len(terms) > 1 else terms[0] for terms in choices]
    return (Or(tuple(filters)) if len(filters) > 1 else filters[0]), position + 1


def parse_term(tokens: Tokens, position: int, scope: Scope, depth: int) -> Parsed:
    """Return one attrExp, valuePath or bracketed filter, "not" before it or none."""
    kind, text, column = tokens[position]
    if text == "(":
        return parse_until(")", tokens, position + 1, scope, depth + 1)
    following = tokens[position + 1][1] if kind != "end" else ""
    if text.lower() == "not" and following == "(":
        inner, position = parse_term(tokens, position + 1, scope, depth)
        return Not(inner), position
    if kind != "name":
        raise bad_filter(column, "an attribute name", text)
    if following == "[":
        return parse_value_path(tokens, position + 1, scope(text), text, depth)
    return parse_expression(tokens, position + 1, scope(text), text)


# valuePath = attrPath "[" valFilter "]", and what Entra sends: valuePath "." subAttr SP compareOp …
def parse_value_path(tokens: Tokens, position: int, target: Bound, name: str, depth: int) -> Parsed:
    """Return a value path; with a sub-attribute after it, the comparison joins its filter."""
    inner, position = parse_brackets(tokens, position, target, name, depth)
    kind, text, _ = tokens[position]
    if kind == "sub":
        sub = resolve_below(target, text[1:])
        comparison, position = parse_expression(tokens, position + 1, sub, name + text)
        inner = And((inner, comparison))
    return (ValuePath(AttributePath(target), inner) if target else NOTHING), position


def parse_brackets(
    tokens: Tokens, position: int, target: Bound, name: str, depth: int, strict: bool = False
) -> Parsed:
    """Return the filter in square brackets on the values of a complex attribute."""
    if target and target[-1].type != "complex":
        raise invalid_filter(
            f"{name}: a filter in brackets needs a complex attribute, this one is of type "
            f"{target[-1].type}"
        )
    return parse_until(
        "]", tokens, position + 1, partial(resolve_below, target, strict=strict), depth + 1
    )


def parse_expression(tokens: Tokens, position: int, target: Bound, name: str) -> Parsed:
    """Return the comparison of a named attribute, from its operator on."""
    _, text, column = tokens[position]
    op = text.lower()
    if op == "pr":
        return (Present(AttributePath(target)) if target else NOTHING), position + 1
    if op != "ne" and op not in TEST:
        raise bad_filter(column, "an operator (eq, ne, co, sw, ew, gt, ge, lt, le, pr)", text)
    return bind_comparison(target, name, op, parse_literal(*tokens[position + 1])), position + 2


def parse_literal(kind: str, text: str, column: int) -> Json:
    """Return the JSON value that a comparison names."""
    with suppress(ValueError):
        literal = LITERAL.decode(text.lower() if kind == "name" else text)
        if not (isinstance(literal, str) and UNSTORABLE.search(literal)):
            return literal
    raise bad_filter(column, "a value: text in double quotes, a number, true, false or null", text)


def bind_comparison(target: Bound, name: str, op: str, literal: Json) -> Filter:
    """Return the filter that compares a target with a literal of its type."""
    if op == "ne":  # the opposite of eq, so it also holds for a resource without the attribute
        return Not(bind_comparison(target, name, "eq", literal))
    if not target:  # an attribute that the schemas lack has no value (RFC 7644 §3.4.2.1)
        return NOTHING
    if standing := target[-1].value_attribute:
        target = (*target, standing)
    attribute = target[-1]
    if attribute.type == "complex":
        names = ", ".join(sub.name for sub in attribute.sub_attributes)
        raise invalid_filter(f"{name}: compare one of its sub-attributes: {names}")
    if literal is None and op == "eq":
        return Not(Present(AttributePath(target)))
    # Boolean and binary have no order (RFC 7644 table 3); only text has a beginning and an end.
    unordered = op in ("gt", "ge", "lt", "le") and attribute.type in ("boolean", "binary")
    shapeless = op in ("co", "sw", "ew") and attribute.type not in STRING_TYPES
    if literal is None or unordered or shapeless:
        raise invalid_filter(
            f"{name}: '{op}' does not go with {quoted(literal)} and the type {attribute.type}"
        )
    if isinstance(literal, float) and literal.is_integer() and attribute.type == "integer":
        literal = int(literal)
    try:
        literal = attribute.convert(literal)
    except ScimError as error:
        raise invalid_filter(error.detail) from None
    return Compare(AttributePath(target), op, attribute.key(literal), literal)


# -- Paths of PATCH ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PatchPath:
    """The target of a PATCH operation, such as emails[type eq "work"].value."""

    attributes: tuple[Attribute, ...]  # (emails,)
    filter: Filter | None = None  # on its values: Compare(type, "eq", "work")
    sub_attribute: Attribute | None = None  # value

    @property
    def read_only(self) -> Attribute | None:
        """The first attribute on the way that no client may change, if any."""
        return next(
            (
                found
                for found in (*self.attributes, self.sub_attribute)
                if found and found.mutability in ("readOnly", "immutable")
            ),
            None,
        )


# PATH = attrPath / valuePath [subAttr]
def parse_path(text: str, resource_type: ResourceType) -> PatchPath:
    """Return what a PATCH path means (RFC 7644 §3.5.2); ScimError 400 invalidPath or invalidFilter."""
    if len(text) > MAX_FILTER_LENGTH:  # which nobody shall keep in a cache
        raise invalid_path(f"path {quoted(text)}: longer than {MAX_FILTER_LENGTH} characters")
    name, bracket, _ = text.strip().partition("[")
    attributes = resolve(name, resource_type)
    if attributes is None:
        scope, rest = find_extension(name, resource_type) or (resource_type.root, name)
        names = ", ".join(sub.name for sub in scope.sub_attributes) or "none"
        raise invalid_path(
            f"path {quoted(text)}: " + why_unknown(name, resource_type),
            reason=("link_name", rest[:80], names) if scope.name == FACILIO else (),
        )
    if not bracket:
        return PatchPath(attributes)
    if not attributes:
        raise invalid_path(f"path {quoted(text)}: a filter needs an attribute")
    tokens = tokens_of(text)
    filter, position = parse_brackets(tokens, 1, attributes, name, 0, strict=True)
    kind, rest, _ = tokens[position]
    sub = attributes[-1].sub_attribute(rest[1:]) if kind == "sub" else None
    if tokens[position + bool(sub)][0] != "end":
        raise invalid_path(
            f"path {quoted(text)}: what follows ']' must be a sub-attribute of {attributes[-1].path}"
        )
    return PatchPath(attributes, filter, sub)


def why_unknown(name: str, resource_type: ResourceType) -> str:
    """Return why a name is no attribute; for an extension with the names that it has."""
    scope, rest = find_extension(name, resource_type) or (resource_type.root, name)
    if scope is resource_type.root:
        return f"{resource_type.name} has no such attribute"
    known = ", ".join(sub.name for sub in scope.sub_attributes) or "none"
    return f"{scope.name} has no attribute '{rest}'; its attributes are: {known}"


# ----------------------------------------------------------------------------
# 4. Resources                                 RFC 7643 §2 and §3, RFC 7644 §3.9
#
# accept() makes a canonical resource of a client's JSON: schema spelling, no
# nulls, no empty lists, declared types. Nothing behind this door checks again.
# project() chooses what of a resource goes out; index_entries() what is indexed.
# Uses chapters 1 to 3. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------


def lowercase_keys(
    value: Json, expected: str = "the body must be a JSON object"
) -> dict[str, Json]:
    """Return the members of a message, or of a part of it, by names in lower case; ScimError 400."""
    if not isinstance(value, dict):
        raise invalid_syntax(f"{expected}, got {quoted(value)}")
    return {name.lower(): item for name, item in value.items()}


def accept(resource_type: ResourceType, body: Json) -> Resource:
    """Return the canonical resource that a client's JSON body describes; ScimError 400 if none."""
    if not isinstance(body, dict):
        raise invalid_syntax(f"the body must be a JSON object, got {quoted(body)}")
    return accept_complex(resource_type.root, body)


def accept_complex(attribute: Attribute, value: Mapping[str, Json]) -> Resource:
    """Return a complex value (or a resource) with canonical names, in the order of the schema."""
    given: dict[str, Json] = {}
    for name, item in value.items():
        sub = attribute.sub_attribute(name)
        # What is read-only is left out, and what no schema knows, as Entra and Okta need.
        if sub and sub.mutability == "readWrite" and item is not None:
            if sub.name in given:
                raise invalid_value(f"{sub.path}: given twice")
            given[sub.name] = item
    accepted = {
        sub.name: item
        for sub in attribute.sub_attributes
        if sub.name in given
        if (item := accept_value(sub, given[sub.name])) is not None
    }
    require(attribute, accepted)
    return accepted


def accept_value(attribute: Attribute, value: Json) -> Json:
    """Return the canonical value of an attribute; None for null, [] and {} (RFC 7643 §2.5)."""
    if not attribute.multi_valued:
        if (
            value == [] and FACILIO not in attribute.path
        ):  # unassigned; a custom field takes no list
            return None
        # Entra's tutorial sends a manager as a list of one.
        if attribute.type == "complex" and isinstance(value, list) and len(value) == 1:
            value = value[0]
        return accept_single(attribute, value)
    # OneLogin's template sends emails as one object.
    items = value if isinstance(value, list) else [value]
    accepted = [
        item for item in (accept_single(attribute, item) for item in items) if item is not None
    ]
    keep_one_primary(accepted)
    return accepted or None


def accept_single(attribute: Attribute, value: Json) -> Json:
    """Return one canonical value, or None if it is empty."""
    if value is None:
        return None
    if attribute.type != "complex":
        return attribute.convert(value)
    # A bare value stands for {"value": …}: managers by id, and Entra's roles as JSON text.
    if not isinstance(value, (dict, list)) and attribute.value_attribute:
        value = {"value": value}
    if not isinstance(value, dict):
        attribute.convert(value)
    accepted = accept_complex(attribute, value)
    # Entra clears a manager with "", which refers to nobody.
    nobody = (
        accepted.get("value") == "" and attribute.value_attribute and not attribute.multi_valued
    )
    return None if nobody else accepted or None


def is_primary(value: Json) -> bool:
    """Return whether a value of a multi-valued attribute is its primary one."""
    return isinstance(value, dict) and value.get("primary") is True


def keep_one_primary(values: list[Json], earlier: Json = None) -> None:
    """Leave but one value primary: the last that became so, else the earlier one (RFC 7644 §3.5.2)."""
    winners = [value for value in values if is_primary(value) and value is not earlier]
    for value in values:
        if winners and value is not winners[-1] and is_primary(value):
            value["primary"] = False


def require(attribute: Attribute, value: Mapping[str, Json]) -> None:
    """Raise ScimError 400 invalidValue unless a complex value (or a resource) has what it must."""
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
    """Return what a new resource has where its client says nothing."""
    return {
        sub.name: sub.default
        for sub in resource_type.root.sub_attributes
        if sub.default is not None
    }


def canonical(resource_type: ResourceType, resource: Resource) -> Resource:
    """Return a resource in the order of the schema, its "schemas" made anew."""
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
        *(one.id for one in resource_type.extensions if one.id in resource),
    ]


# -- Projection ------------------------------------------------------------------

Tree = dict[str, Any]  # names to the trees of what is meant below; None means all of it


def name_tree(names: str, resource_type: ResourceType) -> Tree:
    """Return the attributes of a comma-separated list as a tree; unknown ones are left out."""
    found = [resolve(name.strip(), resource_type) for name in names.split(",")]
    tree: Tree = {}
    for attributes in sorted(filter(None, found), key=len, reverse=True):
        node = tree
        for attribute in attributes[:-1]:
            node = node.setdefault(attribute.name, {})
        node[attributes[-1].name] = None  # shorter names come last and put the whole for a part
    return tree


@dataclass(frozen=True)
class Selection:
    """What a client wants to see of a resource: the trees of attributes and excludedAttributes."""

    wanted: Tree | None = None
    unwanted: Tree = field(default_factory=dict)

    def includes(self, attribute: Attribute) -> bool:
        """Return whether an attribute of the root is asked for, as a whole or in part."""
        asked = self.wanted is None or attribute.name in self.wanted
        return asked and self.unwanted.get(attribute.name, {}) is not None


@lru_cache(1024)
def parse_selection(attributes: str, excluded: str, resource_type: ResourceType) -> Selection:
    """Return the selection of the two query parameters (RFC 7644 §3.9); both may be empty."""
    return Selection(
        name_tree(attributes, resource_type) if attributes.strip() else None,
        name_tree(excluded, resource_type),
    )


def select(attribute: Attribute, value: Resource, wanted: Tree | None, unwanted: Tree) -> Resource:
    """Return the part of a complex value (or a resource) that trees of names leave."""
    selected = {}
    for name, item in value.items():
        sub = attribute.by_name[name.lower()]
        if sub.returned != "always":
            inner, outer = (wanted or {}).get(name), unwanted.get(name, {})
            if outer is None or (wanted is not None and name not in wanted):
                continue
            if sub.type == "complex" and (inner or outer):
                items = [select(sub, one, inner, outer) for one in sub.values(value)]
                if not any(items):
                    continue
                item = list(filter(None, items)) if sub.multi_valued else items[0]
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
    """Return what a client gets to see of a resource, with absolute URLs below base_url."""
    location = resource_type.location(base_url, resource["id"])
    resource = {
        **resource,
        "meta": {**resource["meta"], "location": location},
        **memberships(resource, base_url),
    }
    if selection.wanted is None and not selection.unwanted:
        return resource
    return select(resource_type.root, resource, selection.wanted, selection.unwanted)


# -- The index -------------------------------------------------------------------

Entry = tuple[str, str, int]  # path, key, element


def index_entries(
    attribute: Attribute, value: Mapping[str, Json], element: int = 0
) -> Iterator[Entry]:
    """Yield an entry for each value in a resource (or a complex value), and one for each complex."""
    for name, item in value.items():
        sub = attribute.by_name[name.lower()]
        items: Iterable[tuple[int, Json]] = [(element, item)]
        if sub.multi_valued:  # the primary one is number 0, the one to sort by (RFC 7644 §3.4.2.3)
            items = enumerate(sorted(item, key=lambda one: not is_primary(one)))
        for number, one in items:
            yield sub.index, sub.key(one), number
            if sub.type == "complex":
                yield from index_entries(sub, one, number)


# ----------------------------------------------------------------------------
# 5. PATCH                                                      RFC 7644 §3.5.2
#
# A request's operations are read at once, paths bound and values accepted; then
# apply_patch() makes a new resource of an old one, whole or not at all.
# Uses chapters 1 to 4. Knows nothing of HTTP or SQL.
# ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: add, replace or remove, its target, its accepted value, and if one was given."""

    op: str
    path: PatchPath
    value: Json = None
    sent: Json = None  # the value as the client sent it


def parse_operations(resource_type: ResourceType, body: Json) -> list[Operation]:
    """Return a PATCH body's operations, objects that merge split into attributes; ScimError 400."""
    if not isinstance(items := lowercase_keys(body).get("operations"), list) or not items:
        raise invalid_syntax("Operations: expected a list of PATCH operations")
    return list(
        joined(operation for item in items for operation in parse_operation(resource_type, item))
    )


def joined(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Yield operations, those as one that add to or remove from the same attribute one after the other."""
    # Okta and Entra name members one by one: thousands of steps through all of a group.
    for (op, path, many), run in itertools.groupby(
        operations,
        lambda one: (one.op, one.path, one.op != "replace" and isinstance(one.value, list)),
    ):
        steps = list(run)
        yield from (
            [Operation(op, path, *[[value for one in steps for value in one.value]] * 2)]
            if many
            else steps
        )


def parse_operation(resource_type: ResourceType, item: Json) -> Iterator[Operation]:
    """Yield what one item of Operations asks for; its names and op go without regard to case."""
    item = lowercase_keys(item, "Operations: expected objects")
    op, text, value = str(item.get("op")).lower(), item.get("path"), item.get("value")
    if op not in ("add", "replace", "remove"):
        raise invalid_syntax(f"op: expected add, replace or remove, got {quoted(item.get('op'))}")
    if op != "remove" and "value" not in item:
        raise invalid_value(f"{op} {text or ''}: value is missing")
    if text is not None and not isinstance(text, str):
        raise invalid_path(f"path: expected text, got {quoted(text)}")
    path = parse_path(text, resource_type) if text else PatchPath(())
    if path.attributes:
        yield from bind_operation(op, path, value, merge=op == "add")
    elif op == "remove":
        raise ScimError(400, "noTarget", "remove: a path is needed to say what to remove")
    else:
        yield from parse_members(resource_type, op, value)


def parse_members(resource_type: ResourceType, op: str, value: Json) -> Iterator[Operation]:
    """Yield the operations that the members of a path-less operation's value stand for."""
    if not isinstance(value, dict):
        raise invalid_value(f"{op} without path: expected an object, got {quoted(value)}")
    # Entra's flag dialect sends paths as names: "name.familyName", "URN:department". What a body may
    # not set (id, meta, unknown names) is ignored as in a body: Okta sends "id" with each rename.
    # A misspelt custom field is an error as in a path, so that the administrator sees it.
    for name, one in value.items():
        plain = name[:MAX_FILTER_LENGTH].partition("[")[0].strip()
        if resolve(plain, resource_type) is None and not find_extension(plain, resource_type):
            continue
        path = parse_path(name, resource_type)
        if not path.attributes:
            yield from parse_members(resource_type, op, one)
        elif not path.read_only:
            yield from bind_operation(op, path, one, merge=True)


def bind_operation(op: str, path: PatchPath, value: Json, merge: bool) -> Iterator[Operation]:
    """Yield the operation on a path, its value accepted; one for each sub-attribute to merge."""
    if read_only := path.read_only:
        raise ScimError(400, "mutability", f"{read_only.path} is read-only")
    attribute = path.sub_attribute or path.attributes[-1]
    match path:
        case PatchPath((_,), Compare(AttributePath((by,)), "eq", _, id), None) if (
            op == "remove" and attribute.is_membership and by is attribute.value_attribute
        ):
            path, value = PatchPath(path.attributes), [{"value": id}]
    holder = path.attributes[-2:][0]
    if (
        attribute is holder.value_attribute and not holder.multi_valued
    ):  # stands for the whole manager
        path, attribute, value = PatchPath(path.attributes[:-1]), holder, {"value": value}
    # A complex value that names its own value (a manager) is replaced whole: an old $ref would lie.
    if (
        merge
        and attribute.type == "complex"
        and not attribute.value_attribute
        and not attribute.multi_valued
        and isinstance(value, dict)
    ):
        for name, one in value.items():
            sub = attribute.sub_attribute(name)
            if sub and sub.mutability != "readOnly":
                yield from bind_operation(op, PatchPath((*path.attributes, sub)), one, merge)
        return
    if attribute.mutability == "writeOnly" or (op == "remove" and not attribute.multi_valued):
        accepted = None
    elif path.filter and not path.sub_attribute:
        one = value[0] if isinstance(value, list) and len(value) == 1 else value
        terms = lowercase_keys(equal_terms(path.filter)) if isinstance(one, dict) and one else {}
        accepted = accept_single(attribute, terms | lowercase_keys(one) if terms else one)
    else:
        accepted = accept_value(attribute, value)
    yield Operation(op, path, accepted, value)


def touched_member_ids(operations: Iterable[Operation]) -> set[str] | None:
    """Return the ids of the members that operations can touch; None where it may be any."""
    # With them a change of membership costs what it changes, however large the group is.
    asked = [one for one in operations if one.path.attributes[0].is_membership]
    plain = all(
        one.path == PatchPath(one.path.attributes[:1])
        and one.op != "replace"
        and one.sent is not None
        for one in asked
    )
    return {value["value"] for one in asked for value in one.value or ()} if plain else None


def apply_patch(
    resource_type: ResourceType, resource: Resource, operations: Iterable[Operation]
) -> Resource:
    """Return the resource after all operations, or ScimError 400; that handed in stays as it is."""
    patched = copy.deepcopy(resource)
    for operation in operations:
        apply_operation(patched, operation)
    patched = pruned(patched)
    for sub in resource_type.root.sub_attributes:
        if sub.required and sub.name not in patched:
            raise ScimError(400, "mutability", f"{sub.path} is required and cannot be removed")
    require(resource_type.root, patched)
    return canonical(resource_type, patched)


def apply_operation(resource: Resource, operation: Operation) -> None:
    """Change a resource by one operation."""
    path = operation.path
    first, attribute = path.attributes[0], path.attributes[-1]
    primary = next(filter(is_primary, first.values(resource)), None)
    holders = [resource]
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
    value = operation.value
    if operation.op == "remove" and attribute.multi_valued and operation.sent is not None:
        # Entra's default dialect lists the values to remove, for members by their ids.
        unwanted = {identity(attribute, one) for one in value or ()} - {frozenset()}
        holder[attribute.name] = [
            one
            for one in attribute.values(holder)
            if (known := identity(attribute, one)) not in unwanted
            and (attribute.is_membership or not any(given <= known for given in unwanted))
        ]  # or parts of it
    elif value is None:
        if operation.op != "add":
            holder.pop(attribute.name, None)
    elif operation.op == "add" and attribute.multi_valued:
        add_values(attribute, holder.setdefault(attribute.name, []), value)
    else:
        holder[attribute.name] = copy.deepcopy(value)


def add_values(attribute: Attribute, values: list[Json], added: list[Json]) -> None:
    """Append the values that are not there yet; one that is there takes over what else was sent."""
    same = partial(identity, attribute, adding=True)
    present: dict[Any, Resource] = {same(value): value for value in values}
    for value in copy.deepcopy(added):
        known = present.setdefault(same(value), value)
        known.update(value)
        if known is value:
            values.append(value)


def identity(
    attribute: Attribute, value: Resource, adding: bool = False
) -> frozenset[tuple[str, str]]:
    """Return by what a complex value is the same as another: a member by its value alone."""
    names = ["value"] if attribute.is_membership else [name for name in value if name != "primary"]
    if adding and "value" in value:  # RFC 7643 §2.4: none twice with the same type and value
        names = [name for name in names if name in ("type", "value")]
    return frozenset((name, attribute.by_name[name.lower()].key(value[name])) for name in names)


def change_selected(
    attribute: Attribute, holder: Resource, operation: Operation, filter: Filter
) -> None:
    """Change the values of an attribute that a filter selects, or a sub-attribute of each."""
    no_target = ScimError(400, "noTarget", f"{attribute.path}: no value matches the filter")
    values, created = attribute.values(holder), None
    selected = [value for value in values if matches(filter, value)]
    if not selected and operation.op != "remove" and operation.value is not None:
        # Entra sends replace on emails[type eq "work"].value when there is no work e-mail yet;
        # RFC 7644 §3.5.2.3 would answer noTarget. We create the value, as Entra's validator asks.
        if not (created := equal_terms(filter)) or (values and not attribute.multi_valued):
            raise no_target
        selected, values = [created], [*values, created]
    for value in selected:
        if operation.path.sub_attribute:
            change(operation.path.sub_attribute, value, operation)
            continue
        if operation.op != "add":
            value.clear()
        if operation.op != "remove":
            value.update(operation.value or {})
    if created and not matches(filter, created):  # each repetition would make another one
        raise no_target
    kept = [value for value in values if value]
    holder[attribute.name] = kept if attribute.multi_valued else next(iter(kept), {})


def equal_terms(filter: Filter) -> Resource:
    """Return the sub-attributes that a filter says are equal to a value."""
    match filter:
        case Compare(AttributePath((sub,)), "eq", _, value):
            return {sub.name: value}
        case And(filters):
            return {name: value for inner in filters for name, value in equal_terms(inner).items()}
        case _:
            return {}


def pruned(value: Json) -> Json:
    """Return a JSON value without the empty objects and lists that removals left."""
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
MEMBERS = "group_seq AS seq, member_seq AS element FROM member"
GROUPS = "member_seq AS seq, group_seq AS element FROM member"
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

    status, reason = 503, ""


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
            return self._complete(session, self._save(session, row, before, accepted))

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
        operations = body if isinstance(body, list) else parse_operations(resource_type, body)
        named = touched_member_ids(operations)
        with self.store.writing() as session:
            row = self._find(session, type, id, writing=True)
            before = self._complete(session, row, named=named)
            condition.check(before["meta"]["version"])
            row = self._save(session, row, before, apply_patch(resource_type, before, operations))
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
        raise ScimError(
            404, "", f"{name} {quoted(id)} does not exist", reason=("missing", name, quoted(id))
        )

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
                    reason=("taken", sub.name, quoted(resource[sub.name]), row.type),
                )

    def _save(self, session: Session, row: Row, before: Resource, after: Resource) -> Row:
        """Store a resource that a client changed; where nothing differs, nothing is written."""
        self._check_unique(session, row, after)
        balance, changed = self._link(session, row, before, after)
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

RETRY_SECONDS = 5  # a tenant whose database failed is opened again after this time
RETRY = {"Retry-After": str(RETRY_SECONDS)}
unauthorized = partial(  # one answer for every problem with a bearer token
    ScimError,
    401,
    "",
    "the bearer token is missing, unknown or expired; check the Secret Token of the enterprise "
    "application",
    {"WWW-Authenticate": 'Bearer realm="scim"'},
)
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Caller(NamedTuple):
    """Who sent a request: tenant, token, and the tenant's directory or why it cannot be opened."""

    tenant: Tenant
    token: Token
    directory: Directory | StoreError


class Request(NamedTuple):
    """A request: header names in lower case; path and query as they were in the target."""

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = NO_HEADERS
    body: bytes | Json = b""  # Bulk passes JSON that is already parsed
    scheme: str = "http"  # with host: the URL by which the client reached this server
    host: str = "localhost"
    mount_point: str = ""  # the path that the server is mounted at
    client: str = ""  # its IP address
    id: str = "-"  # for the logs
    caller: Caller | None = None  # set where the token has been read already
    encoded: bool = False  # whether resources in the answer may be Encoded


class Response(NamedTuple):
    """An answer; its body stays JSON, or text such as CSV, until the edge serialises it."""

    status: int
    body: Json = None  # None is no body; another is application/scim+json unless headers say
    headers: Mapping[str, str] = NO_HEADERS
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
        """The resource type of the endpoint; all of them at the root."""
        return tuple(
            resource_type
            for name, resource_type in self.directory.resource_types.items()
            if self.route.type in ("", name)
        )

    @property
    def base_url(self) -> str:
        """The URL of the SCIM endpoint, as this client reached it."""
        return f"{self.request.scheme}://{self.request.host}{self.request.mount_point}{BASE_PATH}"

    @property
    def condition(self) -> Precondition:
        """The precondition of the request's headers."""
        return Precondition(
            self.request.headers.get("if-match", ""), self.request.headers.get("if-none-match", "")
        )

    def json(self) -> Json:
        """Return the JSON of the body; ScimError 400 invalidSyntax."""
        self.body = parse_body(self.request)
        return self.body

    def selection(self, resource_type: ResourceType) -> Selection:
        """Return which attributes of a resource type the client wants."""
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
        """Return an integer parameter, moved into its bounds; ScimError 400 for other text."""
        if not (text := self.parameters.get(name.lower(), "")):
            return default
        if not re.fullmatch(r"[+-]?\d{1,40}", text.strip(), re.ASCII):
            raise ScimError(400, scim_type, f"{name}: expected an integer, got {quoted(text)}")
        return max(least, min(int(text), most))

    def projected(self, resource: Resource | Encoded) -> Json:
        """Return the part of a resource that the client selected."""
        if isinstance(resource, Encoded):
            return resource
        resource_type = self.directory.resource_types[resource["meta"]["resourceType"]]
        return project(resource_type, resource, self.selection(resource_type), self.base_url)

    def answer(self, resource: Resource, status: int = 200) -> Response:
        """Return an answer with a resource."""
        headers = {"ETag": resource["meta"]["version"]}
        if status == 201:
            headers["Location"] = self.resource_types[0].location(self.base_url, resource["id"])
        return Response(status, self.projected(resource), headers)


Queries = Mapping[str, tuple[Filter, Selection]]  # by the names of the resource types
Operate = Callable[[Call], Response]


@dataclass(frozen=True, eq=False)
class Route:
    """A path: who may call it, and for each method the lane and the operation."""

    label: str  # the path for the logs, "" for a path that does not exist
    access: str  # one of the constants of chapter 15
    type: str = ""  # the resource type at this path, "" for all of them
    operations: dict[str, tuple[str, Operate]] = field(default_factory=dict)


def parse_body(request: Request) -> Json:
    """Return the JSON of a body; ScimError 400 invalidSyntax says where it is wrong."""
    if not isinstance(body := request.body, bytes):
        return body
    try:
        value = json.loads(
            body.decode("utf-8-sig"), parse_constant=not_json, object_pairs_hook=unique_names
        )
        # Only a body with escapes or many brackets can hold what the walk is for.
        if b"\\u" in body or body.count(b"{") + body.count(b"[") > MAX_DEPTH:
            for path, text in texts_in(value):
                if UNSTORABLE.search(text):
                    raise ValueError(f"{path or 'it'}: text with NUL or half a surrogate pair")
        return value
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        detail = f"the body is not JSON: {why}"
        raise invalid_syntax(detail, reason=("body", detail)) from None


def texts_in(value: Json, path: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (path, text) for each text in a JSON value, names too; ValueError if it is too deep."""
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
    """Refuse NaN and Infinity, which json.loads accepts and RFC 8259 does not allow."""
    raise ValueError(word)


def list_response(resources: Iterable[Json], total: int, **more: Json) -> Response:
    """Return a ListResponse (RFC 7644 §3.4.2); itemsPerPage counts the resources in it."""
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
    return Response(error.status, error.body(), error.headers, reason=error.reason)


def plain_response(body: Json, type: str = "application/json", **headers: str) -> Response:
    """Return an answer that is not a SCIM message."""
    return Response(200, body, {"Content-Type": type, **headers})


def credentials_of(request: Request) -> tuple[str, str]:
    """Return the scheme and the secret of a request's Authorization, "" for a missing part."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return scheme, secret.strip()


def response_for(error: Exception) -> Response:
    """Return the answer to a request that failed; print an error that the client did not cause."""
    if isinstance(error, ScimError):
        return error_response(error)
    with suppress(OSError, ValueError):  # standard error may be closed
        traceback.print_exception(error)
    if isinstance(error, StoreError):
        detail = f"the tenant's database failed: {error.reason}; nothing was changed, try again"
        return error_response(ScimError(error.status, "", detail, RETRY))
    return error_response(ScimError(500, "", "the server failed; its log says why"))


# ----------------------------------------------------------------------------
# 12. SCIM endpoints                                           RFC 7644 §3, §4
#
# Each operation takes a Call and returns a Response: discovery, resources, queries,
# cursors, .search and Bulk.
# Uses chapters 1 to 11. Knows nothing of sockets.
# ----------------------------------------------------------------------------

# -- Discovery -------------------------------------------------------------------


def attribute_document(attribute: Attribute) -> Json:
    """Return an attribute as RFC 7643 §7 describes it, without what does not apply."""
    has_case = attribute.type in STRING_TYPES or attribute.type == "binary"
    document = {
        "name": attribute.name,
        "type": attribute.type,
        "multiValued": attribute.multi_valued,
        "required": attribute.required,
        "mutability": attribute.mutability,
        "returned": attribute.returned,
        "caseExact": attribute.case_exact if has_case else None,
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
    """Return a tenant's schemas by URN (RFC 7643 §7)."""
    # Entra's validator wants externalId in a core schema, though RFC 7643 has it in none.
    return {
        schema.id: {
            "schemas": [SCHEMA],
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
    """Return a tenant's resource types by name (RFC 7643 §6)."""
    return {
        name: {
            "schemas": [RESOURCE_TYPE],
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


def config_document(directory: Directory, base_url: str) -> dict[str, Json]:
    """Return the service provider configuration (RFC 7643 §5), the one document without an id."""
    return {
        "": {
            "schemas": [PROVIDER_CONFIG],
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


DOCUMENTS = {
    "ServiceProviderConfig": config_document,
    "Schemas": schema_documents,
    "ResourceTypes": resource_type_documents,
}


def get_documents(call: Call) -> Response:
    """Answer GET of a discovery endpoint: all documents, or one; sorting and paging are ignored."""
    if "filter" in call.parameters:  # RFC 7644 §4
        raise ScimError(403, "", "filter: discovery endpoints take no filter")
    documents = DOCUMENTS[call.route.label.split("/")[1]](call.directory, call.base_url)
    by_name = {name.lower(): document for name, document in documents.items()}
    if document := by_name.get(call.id.lower()):
        return Response(200, document)
    if not call.id:
        return list_response(documents.values(), len(documents), startIndex=1)
    raise ScimError(404, "", f"{quoted(call.id)} does not exist; there are {', '.join(documents)}")


# -- Resources -------------------------------------------------------------------


def create_resource(call: Call) -> Response:
    """Answer POST /Users and POST /Groups."""
    return call.answer(call.directory.create(call.route.type, call.json()), 201)


def get_resource(call: Call) -> Response:
    """Answer GET /Users/{id}."""
    resource_type, condition = call.resource_types[0], call.condition
    resource = call.directory.get(resource_type, call.id, call.selection(resource_type))
    version = resource["meta"]["version"]
    if condition.if_match:
        condition._replace(if_none_match="").check(version)
    if condition.excludes(version):
        return Response(304, headers={"ETag": version})
    return call.answer(resource)


def replace_resource(call: Call) -> Response:
    """Answer PUT /Users/{id}."""
    return call.answer(
        call.directory.replace(call.route.type, call.id, call.json(), call.condition)
    )


def patch_resource(call: Call) -> Response:
    """Answer PATCH /Users/{id}: 200 with the resource, or 204 for a group with many members."""
    (resource_type,) = call.resource_types
    call.operations = parse_operations(resource_type, call.json())
    resource = call.directory.patch(
        resource_type, call.id, call.operations, call.condition, call.selection(resource_type)
    )
    return call.answer(resource) if resource else Response(204)


def delete_resource(call: Call) -> Response:
    """Answer DELETE /Users/{id}."""
    call.directory.delete(call.route.type, call.id, call.condition)
    return Response(204)


def refuse_me(call: Call) -> Response:
    """Answer /Me (RFC 7644 §3.11)."""
    raise ScimError(501, "", "/Me: a bearer token stands for a tenant, not for a person")


# -- Queries and cursors ---------------------------------------------------------


def list_resources(call: Call) -> Response:
    """Answer GET /Users, GET /Groups and GET /: filter, sort, page (RFC 7644 §3.4.2)."""
    text, types = call.parameters.get("filter", "").strip(), call.resource_types
    queries = {
        resource_type.name: (
            parse_filter(text, resource_type) if text else EVERYTHING,
            call.selection(resource_type),
        )
        for resource_type in types
    }
    sorting = parse_sorting(call.parameters, types)
    if "cursor" in call.parameters:
        return list_by_cursor(call, queries, sorting)
    start_index = call.integer("startIndex", 1, 1)
    count = call.integer("count", DEFAULT_COUNT, 0, MAX_COUNT)
    page = call.directory.search(
        queries,
        sorting,
        Window(count, start_index - 1),
        call.base_url if call.request.encoded else "",
    )
    return list_response(
        map(call.projected, page.resources), page.total_results or 0, startIndex=start_index
    )


def search_resources(call: Call) -> Response:
    """Answer POST /.search, /Users/.search and /Groups/.search (RFC 7644 §3.4.3)."""
    parameters = {}
    for name, value in lowercase_keys(call.json()).items():
        items = value if isinstance(value, list) else [value]
        texts = [item for item in items if item is not None]
        if not all(isinstance(text, (str, int)) for text in texts):
            raise invalid_value(f"{name}: expected text, an integer or names, got {quoted(value)}")
        if texts:
            parameters[name] = ",".join(map(str, texts))
        if name != "filter" and len(parameters.get(name, "")) > MAX_FILTER_LENGTH:
            raise invalid_value(f"{name}: longer than {MAX_FILTER_LENGTH} characters")
    call.parameters = parameters
    return list_resources(call)


def parse_sorting(parameters: Mapping[str, str], types: Iterable[ResourceType]) -> Sorting | None:
    """Return how to sort; an unknown attribute is ignored (RFC 7644 §3.4.2.3)."""
    order = parameters.get("sortorder", "").strip().lower() or "ascending"
    if order not in ("ascending", "descending"):
        raise invalid_value(f"sortOrder: expected ascending or descending, got {quoted(order)}")
    name = parameters.get("sortby", "").strip()
    target = next(filter(None, (resolve(name, type) for type in types)), None) if name else None
    if target and (value_attribute := target[-1].value_attribute):
        target = (*target, value_attribute)
    return Sorting(AttributePath(target), order == "descending") if target else None


def list_by_cursor(call: Call, queries: Queries, sorting: Sorting | None) -> Response:
    """Answer a query that pages by cursor (RFC 9865); an empty cursor gives the first page."""
    if "startindex" in call.parameters:
        raise invalid_value("startIndex: not together with cursor")
    count = call.integer("count", DEFAULT_COUNT, 0, MAX_COUNT, "invalidCount")
    total, after, backward = read_cursor(call)
    page = call.directory.search(
        queries,
        sorting,
        Window(count, 0, after, backward),
        call.base_url if call.request.encoded else "",
    )
    total = total if page.total_results is None else page.total_results
    cursors = {}
    # There is always a page in the direction that we came from; in the other, page.more tells.
    if page.last and (page.more or backward):
        cursors["nextCursor"] = make_cursor(call, total, page.last, backward=False)
    if page.first and (page.more if backward else after is not None):
        cursors["previousCursor"] = make_cursor(call, total, page.first, backward=True)
    return list_response(map(call.projected, page.resources), total, **cursors)


# A cursor holds all that the next page needs, and a signature: (query, total, backward, issued,
# missing, key, seq). The server keeps nothing, and a cursor of another tenant is not accepted.
def make_cursor(call: Call, total: int, position: Position, backward: bool) -> str:
    """Return a cursor for the page after a position, or before it."""
    content = to_json(
        [query_digest(call), total, backward, int(call.directory.clock().timestamp()), *position]
    ).encode()
    return base64.urlsafe_b64encode(signature(call, content) + content).decode().rstrip("=")


def read_cursor(call: Call) -> tuple[int, Position | None, bool]:
    """Return the total, position and direction of a cursor; ScimError 400 if it is not usable."""
    if not (text := call.parameters["cursor"]):
        return 0, None, False
    octets = b""
    with suppress(ValueError):
        octets = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    mac, content = octets[:SIGNATURE_LENGTH], octets[SIGNATURE_LENGTH:]
    advice = "start again with an empty cursor"
    if not content or not hmac.compare_digest(mac, signature(call, content)):
        raise ScimError(400, "invalidCursor", f"cursor: not issued by this server; {advice}")
    query, total, backward, issued, *position = json.loads(content)
    if query != query_digest(call):
        raise ScimError(400, "invalidCursor", "cursor: it belongs to another filter or sort")
    if call.directory.clock().timestamp() > issued + CURSOR_SECONDS:
        raise ScimError(
            400, "expiredCursor", f"cursor: older than {CURSOR_SECONDS} seconds; {advice}"
        )
    return total, Position(*position), backward


def query_digest(call: Call) -> str:
    """Return a digest that is the same for all pages of one query."""
    terms = [call.parameters.get(name, "") for name in ("filter", "sortby", "sortorder")]
    return digest(to_json([[type.name for type in call.resource_types], terms]))[:16]


def signature(call: Call, content: bytes) -> bytes:
    """Return the HMAC of a cursor's content under the tenant's key."""
    return hmac.digest(call.directory.cursor_key, content, "sha256")[:SIGNATURE_LENGTH]


# -- Bulk ------------------------------------------------------------------------

# "bulkId:x" stands for the id of what the POST with the bulkId x creates (RFC 7644 §3.7.2).
BULK_ID = re.compile(r"bulkId:(\S+)")


class BulkOperation(NamedTuple):
    """One operation of a bulk request."""

    method: str
    endpoint: str
    id: str  # the rest of the path, "" for none
    bulk_id: str
    version: str
    content: Json  # its data
    references: set[str]  # the bulkIds that id and content refer to


def parse_bulk_operation(item: Json) -> BulkOperation:
    """Return an operation of a bulk request; ScimError 400 invalidSyntax."""
    members = lowercase_keys(item, "Operations: expected objects")
    texts = {name: members.get(name.lower()) for name in ("method", "path", "bulkId", "version")}
    for name, value in texts.items():
        if not isinstance(value, (str, type(None))):
            raise invalid_syntax(f"Operations: {name} must be text, got {quoted(value)}")
    method, path, bulk_id, version = (value or "" for value in texts.values())
    endpoint, _, id = path.strip("/").partition("/")
    content = members.get("data")
    # Most operations refer to nothing, and need no walk through their content.
    strings = texts_in([id, content]) if "bulkId:" in to_json([id, content]) else ()
    references = {match[1] for _, text in strings if (match := BULK_ID.fullmatch(text))}
    return BulkOperation(method.upper(), endpoint, id, bulk_id, version, content, references)


def with_ids(value: Json, ids: Mapping[str, str]) -> Json:
    """Return JSON with ids in place of bulkIds, without objects whose bulkId is not in ids."""
    if isinstance(value, str) and (reference := BULK_ID.fullmatch(value)):
        return ids.get(reference[1])
    if isinstance(value, list):
        return [item for item in (with_ids(item, ids) for item in value) if item is not None]
    if isinstance(value, dict):
        members = {name: with_ids(item, ids) for name, item in value.items()}
        if any(members[name] is None and isinstance(item, str) for name, item in value.items()):
            return None
        return {
            name: item for name, item in members.items() if item is not None or value[name] is None
        }
    return value


class Bulk:
    """The state of a bulk request (RFC 7644 §3.7); ScimError 400 if two POSTs share a bulkId."""

    def __init__(
        self, call: Call, perform: Callable[[Request], Response], operations: list[BulkOperation]
    ) -> None:
        self.call, self.perform, self.operations = call, perform, operations
        self.answers: dict[int, Json] = {}  # by the operation's number, until now
        self.posts: dict[str, int] = {}  # bulkId to the number of its POST
        self.ids: dict[str, str] = {}  # bulkId to the id of the created resource
        self.incomplete: list[int] = []  # POSTs that were done before those they refer to
        for number, operation in enumerate(operations):
            if (
                operation.method == "POST"
                and self.posts.setdefault(operation.bulk_id, number) != number
            ):
                raise invalid_value(f"bulkId {quoted(operation.bulk_id)}: each POST needs its own")

    def run(self, fail_on_errors: int) -> list[Json]:
        """Return the answers in the order of the request; stop at that number of errors."""
        for number in self._order():
            self._perform(number)
            fail_on_errors -= "response" in self.answers[number]
            if not fail_on_errors:
                break
        for number in list(self.incomplete):
            self._complete(number)
        return [self.answers[number] for number in sorted(self.answers)]

    def _order(self) -> Iterator[int]:
        # Yield all numbers, each after the POSTs it refers to; a cycle is broken at its end.
        started, done = set[int](), set[int]()
        for first in range(len(self.operations)):
            stack = [first]
            while stack:
                number = stack[-1]
                if number not in started:
                    started.add(number)
                    needed = {
                        self.posts.get(bulk_id, number)
                        for bulk_id in self.operations[number].references
                    }
                    stack += sorted(needed - started, reverse=True)
                elif stack.pop() not in done:
                    done.add(number)
                    yield number

    def _perform(self, number: int) -> None:
        # Then complete the operations that waited for the id of this one.
        operation = self.operations[number]
        missing = operation.references - self.ids.keys()
        try:
            self._check(operation, missing)
            response = self._send(operation, operation.method, operation.id)
        except ScimError as error:
            response = error_response(error)
        self._answer(number, response)
        if response.status == 201:
            self.ids[operation.bulk_id] = response.body["id"]
            self.incomplete += [number] if missing else []
            for other in list(self.incomplete):
                if self.operations[other].references <= self.ids.keys():
                    self._complete(other)

    def _check(self, operation: BulkOperation, missing: set[str]) -> None:
        method, path = operation.method, f"/{operation.endpoint}/{operation.id}"
        if method not in ("POST", "PUT", "PATCH", "DELETE"):
            raise invalid_value(
                f"method: expected POST, PUT, PATCH or DELETE, got {quoted(method)}"
            )
        if not re.fullmatch("/(Users|Groups)/" + ("" if method == "POST" else "[^/]+"), path):
            expected = "/Users" if method == "POST" else "/Users/2819c223"
            raise invalid_path(f"path: {method} needs one such as {expected}, got {quoted(path)}")
        if method != "DELETE" and operation.content is None:
            raise invalid_value(f"data: {method} needs some")
        if method == "POST" and not operation.bulk_id:
            raise invalid_value("bulkId: POST needs one")
        for bulk_id in sorted(missing):
            if self.posts.get(bulk_id) is None or self.posts[bulk_id] in self.answers:
                raise ScimError(
                    409, "", f"bulkId {quoted(bulk_id)}: no POST of this request created it"
                )

    def _send(self, operation: BulkOperation, method: str, id: str) -> Response:
        request, path_id = self.call.request, quote(with_ids(id, self.ids) or "", safe="")
        headers = {name: value for name, value in request.headers.items() if name[:3] != "if-"}
        if operation.version:
            headers["if-match"] = operation.version
        return self.perform(
            request._replace(
                method=method,
                path=f"{BASE_PATH}/{operation.endpoint}/{path_id}",
                query="",
                headers=headers,
                caller=self.call.caller,
                body=with_ids(operation.content, self.ids)
                if operation.references
                else operation.content,
            )
        )

    def _complete(self, number: int) -> None:
        # Replace the resource now that its references have ids; delete it if one has none.
        operation = self.operations[number]
        id = f"bulkId:{operation.bulk_id}"
        self.incomplete.remove(number)
        response = error_response(
            ScimError(409, "", "a bulkId that this resource refers to was not created")
        )
        if operation.references <= self.ids.keys():
            response = self._send(operation, "PUT", id)
        if response.status == 200:
            self.answers[number]["version"] = response.headers["ETag"]
        else:
            self._send(operation, "DELETE", id)
            self._answer(number, response)

    def _answer(self, number: int, response: Response) -> None:
        operation = self.operations[number]
        id = with_ids(operation.id, self.ids) or operation.id
        answer = {
            "location": response.headers.get("Location", "")
            if operation.method == "POST"
            else f"{self.call.base_url}/{operation.endpoint}/{id}",
            "method": operation.method,
            "bulkId": operation.bulk_id,
            "version": response.headers.get("ETag"),
            "status": str(response.status),
            "response": response.body if response.status >= 300 else None,
        }
        self.answers[number] = {name: value for name, value in answer.items() if value}


def run_bulk(perform: Callable[[Request], Response], call: Call) -> Response:
    """Answer POST /Bulk: operations in one commit, each of them done whole or not at all."""
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
    with call.directory.store.writing():
        bulk = Bulk(call, perform, list(map(parse_bulk_operation, items)))
        answers = bulk.run(limit or len(items))
    return Response(200, {"schemas": [BULK_RESPONSE], "Operations": answers})


# ----------------------------------------------------------------------------
# 13. Provisioning log
#
# What each call did, warnings about it, and what to do when it failed. A thread in
# the background writes it.
# Uses chapters 1 to 12. Knows nothing of sockets.
# ----------------------------------------------------------------------------

LOG_WAITING = 5_000  # calls in the queue; further ones are dropped and counted
LOG_READS = 50  # the same for successful reads, the least informative calls
LOG_PAUSE = 0.2  # seconds to collect calls for one transaction
LOGGED_BODY = 32 * 1024  # octets; a longer body is not kept for the log
LOGGED_PATH = 200  # characters of an attribute's path
SECRET = re.compile(r"password|secret|token|authorization", re.IGNORECASE)
REDACTED = "•••"
OBJECT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
VERBS = {"GET": "Read", "POST": "Create", "PUT": "Replace", "PATCH": "Update", "DELETE": "Delete"}
Reason = tuple[str, ...]  # why a call failed or gets a warning: a key of EXPLANATIONS, and parts
Sent = tuple[str, str, Json]  # what a client wrote: "add" except in a PATCH, path, value
# By key: the kind of trouble, the names of the reason's parts, and the sentence and the remedy that
# show them. The part "value" may be a secret.
EXPLANATIONS = {
    "expired": (
        "authentication",
        "token expires",
        "The token “{token}” expired on {expires}; a call from {client} was refused.",
        "Make a new token with `python scim_server.py token`; enter its secret in Entra.",
    ),
    "scheme": (
        "authentication",
        "token",
        "A call from {client} sent the token “{token}”, but not as a bearer token.",
        "Choose bearer authentication in the client.",
    ),
    "path": (
        "connection",
        "path base",
        "The call went to {path}, which does not exist.",
        "The Tenant URL must end in {base}, exactly once, with nothing after it.",
    ),
    "body": (
        "connection",
        "problem",
        "The body could not be read: {problem}.",
        "Check whether a proxy in front of the server changes or truncates requests.",
    ),
    "failed": (
        "connection",
        "detail",
        "The server failed: {detail}.",
        "Entra retries automatically; the server's log says why it failed.",
    ),
    "link_name": (
        "mapping",
        "name link_names",
        "No custom field has the link name “{name}”{hint}",
        "Correct the name in Entra's attribute list for customappsso; there are {link_names}.",
    ),
    "integer": (
        "mapping",
        "path value",
        "The field “{path}” takes a whole number, but {value} was sent.",
        "Map it from an attribute that contains only digits, or make the custom field a String.",
    ),
    "boolean": (
        "mapping",
        "path value",
        "The field “{path}” takes true or false, but {value} was sent.",
        "Use an expression that returns true or false; for active it is Not([IsSoftDeleted]).",
    ),
    "type": (
        "mapping",
        "path expected value",
        "The attribute “{path}” takes {expected}, but {value} was sent.",
        "Map it from another attribute.",
    ),
    "required": (
        "mapping",
        "path",
        "“{path}” was sent without a value.",
        "Map it from an attribute that every account has; for userName that is userPrincipalName.",
    ),
    "taken": (
        "mapping",
        "path value type",
        "Another {type} already has the {path} {value}.",
        "Change one of the two in Entra; if they are the same, match by {path} (precedence 1).",
    ),
    "missing": (
        "mapping",
        "type value",
        "Entra refers to a {type} that no longer exists here.",
        "Choose “Restart provisioning” in Entra; it looks up every account again.",
    ),
    "active": (
        "mapping",
        "value",
        "active was sent as the text {value}: its mapping still uses Switch(…).",
        "Map Not([IsSoftDeleted]) to active, and append ?aadOptscim062020 to the Tenant URL.",
    ),
    "emails": (
        "mapping",
        "value name",
        "The work e-mail {value} is not the userName {name}.",
        'Map userPrincipalName to emails[type eq "work"].value.',
    ),
    "externalId": (
        "mapping",
        "value",
        "externalId is {value}, which is not an objectId.",
        "Map objectId to externalId, so that a person who is renamed stays the same employee.",
    ),
    "members": (
        "mapping",
        "ids",
        "No user or group has the id {ids}; these members were ignored.",
        "Assign these people to the application too, so that Entra creates them before the group.",
    ),
    "refused": (
        "mapping",
        "detail",
        "The call was refused: {detail}.",
        "Compare the mapping in Entra with the table on the Set-up page.",
    ),
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
    is_long: bool = False  # whether the body was too long to keep

    @cached_property
    def resource(self) -> Resource:
        """The user or group in the answer, or the only one that a query returned; {} for none."""
        has_any = self.call.route.type and self.response.body and self.response.status < 300
        body = self.response.body if has_any else {}
        resources = body.get("Resources", [body])
        resource: Resource = resources[0] if len(resources) == 1 else {}
        return from_json(resource) if isinstance(resource, Encoded) else resource

    @cached_property
    def sent(self) -> list[Sent]:
        """What the client wrote, the attributes of an extension one by one."""
        sent, call = list(map(sent_by, self.call.operations)), self.call
        is_resource = call.route.type and call.request.method in ("POST", "PUT")
        body = call.body if is_resource and isinstance(call.body, dict) else {}
        for name, value in body.items():
            if name.lower() in (ENTERPRISE.lower(), FACILIO.lower()) and isinstance(value, dict):
                sent += [("add", f"{name}:{sub}", item) for sub, item in value.items()]
            elif name.lower() not in ("schemas", "id", "meta"):
                sent.append(("add", name, value))
        return [(op, path[:LOGGED_PATH], value) for op, path, value in sent]

    @cached_property
    def may_show_secret(self) -> bool:
        """Whether an error of this call may quote a secret."""
        body = self.call.request.body if self.call.body is None else self.call.body
        return self.is_long or SECRET.search(f"{body!r} {self.call.request.query}") is not None


def sent_by(operation: Operation) -> Sent:
    """Return an operation of a PATCH as the log shows it, with canonical names."""
    path = operation.path
    terms = equal_terms(path.filter).items() if path.filter else ()
    filter = " and ".join(f"{name} eq {quoted(value)}" for name, value in terms) or "…"
    brackets = f"[{filter}]" if path.filter else ""
    sub = f".{path.sub_attribute.name}" if path.sub_attribute else ""
    # Members come as objects, ids or a filter; the accepted value has them in one form.
    value = operation.value if path.attributes[0].is_membership else operation.sent
    return operation.op, path.attributes[-1].path + brackets + sub, value


def member_ids(path: str, value: Json) -> list[str]:
    """Return the ids of the members that were sent, "" for one that a filter selects."""
    items = [""] if "[" in path else value if isinstance(value, list) else [value] if value else []
    return [str(item.get("value", "") if isinstance(item, dict) else item) for item in items]


# -- What a call did -----------------------------------------------------------------


def operation_name(item: LogItem) -> str:
    """Return what a call does, such as "Update user": a phrase that the subject's name follows."""
    request, route, noun = item.call.request, item.call.route.label, item.call.route.type.lower()
    if not noun:
        return f"Call {route or request.path[:80]}"
    if request.method in ("GET", "POST") and re.search(r"filter|\.search", request.query + route):
        return f"Look up {noun}"
    if request.method == "GET" and not item.call.id:
        return f"List {noun}s"
    return patch_name(item) or f"{VERBS.get(request.method, request.method)} {noun}"


def patch_name(item: LogItem) -> str:
    """Return "Deactivate user", "Add 3 members to" and the like; "" for another PATCH or method."""
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
    candidates = [resource, call.body if isinstance(call.body, dict) else {}]
    if not resource:
        row, employee = session.find(call.route.type, id), session.employee_of(id)
        candidates += [row.attributes if row else {}, employee.record if employee else {}]
    candidates.append({"name": literal[1] if literal else ""})
    keys = ("displayName", "userName", "name")
    names = (candidate.get(key) for candidate in candidates for key in keys)
    return next((name for name in names if name and isinstance(name, str)), "")


# -- Warnings and errors -------------------------------------------------------------


def warnings_about(session: Session, item: LogItem) -> list[Reason]:
    """Return the warnings about a call that succeeded, each once."""
    checks = (value_warnings, email_warnings, member_warnings)
    return list(dict.fromkeys(reason for warn_of in checks for reason in warn_of(session, item)))


def value_warnings(session: Session, item: LogItem) -> Iterator[Reason]:
    """Yield warnings about values of a user that show a mistake in the mapping."""
    directory, is_user = item.call.directory, item.call.route.type == "User"
    user_type = directory.resource_types["User"]
    for _, path, value in item.sent if is_user else ():
        name = path.lower()
        if name == "active" and isinstance(value, str):
            yield "active", quoted(value)
        elif name == "externalid" and not OBJECT_ID.fullmatch(str(value)):
            yield "externalId", quoted(value)
        elif name.startswith(FACILIO.lower()) and not resolve(path, user_type):
            yield "link_name", path[len(FACILIO) + 1 :], ", ".join(directory.link_names)


def email_warnings(session: Session, item: LogItem) -> Iterator[Reason]:
    """Yield a warning about a work e-mail that is not the userName."""
    names = {path.lower().partition("[")[0] for _, path, _ in item.sent} & {"emails", "username"}
    for email in item.resource.get("emails", ()) if names else ():
        value, user_name = email.get("value"), item.resource.get("userName")
        if email.get("type") == "work" and str(value).casefold() != str(user_name).casefold():
            yield "emails", quoted(value), quoted(user_name)


def member_warnings(session: Session, item: LogItem) -> Iterator[Reason]:
    """Yield a warning about members that no user or group is."""
    ids: set[str] = set()
    for op, path, value in item.sent if item.call.route.type == "Group" else ():
        if path.lower() == "members" and op != "remove":
            ids.update(member_ids(path, value))
    # The answer shows who became a member; the store may have changed since.
    ids -= {member.get("value") for member in item.resource.get("members", ())}
    if missing := session.unknown_ids(sorted(ids)):
        yield "members", ", ".join(map(quoted, missing[:3])) + (", …" if missing[3:] else "")


def redacted_text(text: str) -> str:
    """Return text without the values that it quotes."""
    return re.sub(r'got .*|"(\\.|[^"\\])*("|$)', REDACTED, text, flags=re.DOTALL)


def redacted(value: Json) -> Json:
    """Return a body with the values of secrets hidden, in a PATCH too."""
    if not isinstance(value, dict):
        return [redacted(item) for item in value] if isinstance(value, list) else value
    path = " ".join(str(item) for name, item in value.items() if name.lower() == "path")
    hidden = "value" if SECRET.search(path) else ""  # of a PATCH operation on a secret
    return {
        name: REDACTED if SECRET.search(name) or name.lower() == hidden else redacted(item)
        for name, item in value.items()
    }


def explain(reason: Reason, item: LogItem) -> Json:
    """Return the kind of a trouble, the sentence that explains it, and the remedy."""
    kind, names, text, remedy = EXPLANATIONS[reason[0]]
    parts = dict(zip(names.split(), reason[1:], strict=True))
    if item.response.status >= 400 and item.may_show_secret:
        parts = {name: redacted_text(part) for name, part in parts.items()} | {"value": REDACTED}
    # A custom field is known by its link name; the full stop of a detail is that of our sentence.
    parts = {name: part.removeprefix(f"{FACILIO}:").rstrip(".") for name, part in parts.items()}
    links = {link.lower(): link for link in parts.get("link_names", "").split(", ")}
    similar = difflib.get_close_matches(parts.get("name", "").lower(), links, 1)
    hint = f": did you mean “{links[similar[0]]}”?" if similar else "."
    parts |= {"hint": hint, "client": item.call.request.client}
    return {"kind": kind, "text": text.format(**parts), "remedy": remedy.format(**parts)}


# -- Entries -------------------------------------------------------------------------


def failure_of(item: LogItem) -> tuple[str, Reason]:
    """Return the detail and the reason of an error; its detail explains one without a reason."""
    detail = (item.response.body or {}).get("detail", "")
    detail = redacted_text(detail) if item.may_show_secret else detail
    fallback = ("failed" if item.response.status >= 500 else "refused", detail)
    return detail, item.response.reason or fallback


def attributes_of(item: LogItem, reason: Reason) -> list[str]:
    """Return the paths that a client wrote; of a PATCH that did not parse, the wrong one."""
    call, paths = item.call, dict.fromkeys(path for _, path, _ in item.sent)
    names_path = reason and EXPLANATIONS[reason[0]][1].startswith(("path", "name"))
    if not paths and names_path and call.route.type and call.request.method == "PATCH":
        return [reason[1]]
    return list(paths)


def describe(session: Session, item: LogItem) -> tuple[int, str, Json]:
    """Return a call's level (0 done, 1 warning, 2 refused), its subject's id and its entry."""
    call, refused = item.call, item.response.status >= 400
    detail, reason = failure_of(item) if refused else ("", ())
    reasons = [reason] if refused else warnings_about(session, item)
    id = item.resource.get("id") or (call.id if call.route.type else "")
    entry = {
        "at": time_text(item.instant),
        "token": item.caller.token.name,
        "operation": operation_name(item),
        "type": call.route.type,
        "name": subject_name(session, item, id)[:200],
        "status": item.response.status,
        "id": call.request.id,
        "milliseconds": round(item.seconds * 1000, 1),
        "method": call.request.method,
        "path": call.request.path[:500],
        "client": call.request.client,
        "attributes": attributes_of(item, reason)[:50],
        "detail": detail,
        "notes": [explain(reason, item) for reason in reasons],
    }
    if item.caller.tenant.log_bodies and call.body is not None:
        entry["body"] = redacted(call.body)
    return 2 if refused else int(bool(reasons)), id, entry


def write_log(store: Store, items: Sequence[LogItem]) -> None:
    """Write calls of one tenant to its log, with each token's last use and the set-up's steps."""
    logged = [item for item in items if item.logged]
    uses = {item.caller.token.name: item.instant for item in items if item.response.status != 401}
    with store.reading() as session:
        rows = [describe(session, item) for item in logged]
    with store.writing() as session:
        session.note_requests(rows, items[-1].caller.tenant.keep_log)
        for token, instant in uses.items():
            session.set_setting(f"used {token}", time_text(instant))
        for item, (level, _, entry) in zip(logged, rows, strict=True):
            done = [step for step, operation, _, _ in STEPS if operation == entry["operation"]]
            done += ["custom"] if item.resource.get(FACILIO) and entry["attributes"] else []
            for step in done if level < 2 else ():
                if not session.setting(f"first {step}"):
                    session.set_setting(f"first {step}", entry["at"])


class BackgroundWriter:
    """A queue whose items a daemon thread passes to write, those of a pause of seconds together.

    add() never blocks: when limit items are queued, further ones are dropped and counted in lost.
    write must not raise.
    """

    def __init__(self, write: Callable[[list[Any]], None], pause: float, limit: int) -> None:
        self._write, self._pause, self._limit = write, pause, limit
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock, self._flush_now, self.lost = threading.Lock(), threading.Event(), 0
        self._thread: threading.Thread | None = None

    def add(self, item: Any) -> None:
        """Queue an item, or count it as lost."""
        if self._items.qsize() >= self._limit:
            self.lost += 1
            return
        self._items.put(item)
        with self._lock:
            if not self._thread:
                thread = threading.Thread(target=self._run, daemon=True)
                with suppress(RuntimeError):  # no thread could be started; the next item retries
                    thread.start()
                    self._thread = thread

    def close(self, seconds: float = 5) -> None:
        """Write the queued items, in at most that time; a later item starts another thread."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread:
            self._flush_now.set()
            self._items.put(None)
            thread.join(seconds)
            self._flush_now.clear()

    def _run(self) -> None:
        batch: list[Any] = []
        while None not in batch:
            batch = [self._items.get()]
            self._flush_now.wait(self._pause)
            batch += [self._items.get() for _ in range(self._items.qsize())]
            self._write([item for item in batch if item is not None])


class ProvisioningLog(BackgroundWriter):
    """The queue of calls for the logs of their tenants."""

    def __init__(self) -> None:
        super().__init__(self._store, LOG_PAUSE, LOG_WAITING)
        self.unknown_token_calls, self.unknown_token_since = 0, ""

    def has_room(self, request: Request, response: Response) -> bool:
        """Return whether a call may be added: at most LOG_READS successful reads are queued."""
        return request.method != "GET" or response.status >= 300 or self._items.qsize() < LOG_READS

    def add(self, item: LogItem) -> None:
        """Queue a call, without long bodies and long lists."""
        call, answer = item.call, item.response.body
        if isinstance(answer, dict) and len(answer.get("Resources", ())) > 2:
            item.response = item.response._replace(body={"Resources": answer["Resources"][:2]})
        if isinstance(call.request.body, bytes) and len(call.request.body) > LOGGED_BODY:
            call.request, call.body = call.request._replace(body=b""), None
            call.operations, item.is_long = (), True
        super().add(item)

    def count_unknown_token(self, at: str) -> None:
        """Count a call with an unknown token, which belongs to no tenant."""
        with self._lock:
            self.unknown_token_calls += 1
            self.unknown_token_since = self.unknown_token_since or at

    def _store(self, batch: list[LogItem]) -> None:
        for store in dict.fromkeys(item.call.directory.store for item in batch):
            items = [item for item in batch if item.call.directory.store is store]
            try:
                write_log(store, items)
            except Exception:  # noqa: BLE001  a failing log must not stop provisioning
                self.lost += len(items)


# ----------------------------------------------------------------------------
# 14. Other endpoints
#
# Employees, changes, the console's API and metrics.
# Uses chapters 1 to 13. Knows nothing of sockets.
# ----------------------------------------------------------------------------

# -- Employees and changes -----------------------------------------------------------


def list_employees(call: Call) -> Response:
    """Answer GET /employees: those after a cursor, as JSON or, if Accept asks for it, CSV."""
    active = call.parameters.get("active", "").lower()
    if active not in ("", "true", "false"):
        raise invalid_value(f"active: expected true or false, got {quoted(active)}")
    count = call.integer("count", DEFAULT_COUNT, 1, MAX_COUNT)
    rows = call.directory.employees(
        active == "true" if active else None,
        call.parameters.get("changed_since", ""),
        call.integer("id", 0) if "id" in call.parameters else None,
        call.integer("cursor", 0),
    )
    employees = list(itertools.islice(rows, count + 1))
    headers, cursor = {}, {}
    if len(employees) > count:
        employees.pop()
        cursor = {"nextCursor": str(employees[-1].id)}
        query = urlencode({**call.parameters, "cursor": employees[-1].id})
        headers["Link"] = f'<{call.base_url.removesuffix(BASE_PATH)}/employees?{query}>; rel="next"'
    if "text/csv" in call.request.headers.get("accept", ""):
        table = employee_table(employees, call.directory.link_names)
        return plain_response("".join(employee_csv(table)), "text/csv; charset=utf-8", **headers)
    return plain_response({"employees": list(map(asdict, employees)), **cursor}, **headers)


def get_employee(call: Call) -> Response:
    """Answer GET /employees/{id}."""
    id = int(call.id) if re.fullmatch(r"\d{1,18}", call.id, re.ASCII) else 0
    if not (employee := next(call.directory.employees(id=id), None)):
        raise ScimError(404, "", f"employee {quoted(call.id)} does not exist")
    return plain_response(asdict(employee))


def list_changes(call: Call) -> Response:
    """Answer GET /changes: those after a number; with wait, block until there are some."""
    after, wait = call.integer("after", 0), call.integer("wait", 0, 0, MAX_WAIT)
    changes = call.directory.changes(after, wait, call.integer("count", MAX_COUNT, 1, MAX_COUNT))
    last = changes[-1].seq if changes else after
    return plain_response({"changes": list(map(asdict, changes)), "after": last})


# -- The console's API ---------------------------------------------------------------

ENTRA_MAPPING = (  # source in Entra ID, customappsso attribute, the change to make
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
    """Return the console's page; its policy allows only the script and style in it."""
    own = "; ".join(
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    )
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"connect-src 'self'; img-src data:; require-trusted-types-for 'script'; {own}"
    )
    headers = {"Referrer-Policy": "no-referrer", "Content-Security-Policy": policy}
    return console_response(page, "text/html; charset=utf-8", **headers)


def entra_mapping(directory: Directory) -> list[list[str]]:
    """Return rows of source, customappsso attribute, type in Entra, and the change to make."""
    types, rows = {"boolean": "Boolean", "integer": "Integer", "complex": "Reference"}, []
    fields = (
        ("", f"{FACILIO}:{name}", "custom field: choose its source")
        for name in directory.link_names
    )
    for source, target, change in (*ENTRA_MAPPING, *fields):
        path = parse_path(target, directory.resource_types["User"])
        type = (path.sub_attribute or path.attributes[-1]).type
        rows.append([source, target, types.get(type, "String"), change])
    return rows


def get_log(log: ProvisioningLog, call: Call) -> Response:
    """Answer GET /console/api/log: entries newest first, those after or before a number."""
    entries = call.directory.requests(
        call.integer("after", 0),
        call.integer("before", 0),
        call.integer("count", DEFAULT_COUNT, 1, MAX_COUNT),
        call.integer("level", 0),
        call.parameters.get("subject", ""),
        call.parameters.get("text", ""),
        call.integer("wait", 0, 0, MAX_WAIT),
    )
    return console_response({"entries": entries, "lost": log.lost})


def get_setup(log: ProvisioningLog, call: Call) -> Response:
    """Answer GET /console/api/setup: what to enter in Entra ID, and what has worked already."""
    directory, now = call.directory, call.directory.clock()
    user_type = directory.resource_types["User"]
    tenant = call.caller.tenant  # type: ignore[union-attr]  # the route needs a token
    with directory.store.reading() as session:
        steps = [
            {"title": title, "hint": hint, "at": session.setting(f"first {step}")}
            for step, _, title, hint in STEPS
            if tenant.custom_fields or step != "custom"
        ]
    tokens = [
        {
            "name": token.name,
            "last_use": directory.last_use(token.name),
            "expires": time_text(token.expires) if token.expires else "",
            "expired": token.expired(now),
        }
        for token in tenant.tokens
    ]
    fields = [
        {
            **asdict(custom),
            "urn": custom.urn,
            "people": directory.query(user_type, f"{custom.urn} pr", count=0).total_results,
        }
        for custom in tenant.custom_fields
    ]
    return console_response(
        {
            "tenant": tenant.name,
            "url": call.base_url,
            "steps": steps,
            "lost": log.lost,
            "tokens": tokens,
            "last": directory.requests(count=1),
            "refused": directory.requests(text='"status":401'),
            "strangers": log.unknown_token_calls,
            "strange_since": log.unknown_token_since,
            "mapping": entra_mapping(directory),
            "fields": fields,
        }
    )


def get_mapping(call: Call) -> Response:
    """Answer GET /console/api/mapping: the attribute mapping as CSV."""
    header = ["Entra ID source", "customappsso attribute", "type", "change"]
    table = [header, *entra_mapping(call.directory)]
    return console_response("".join(employee_csv(table)), "text/csv; charset=utf-8")


def get_history(call: Call) -> Response:
    """Answer GET /console/api/history/{id}: a user's employee, and changes of a user or group."""
    employee, changes = call.directory.history(call.id)
    return console_response(
        {"employee": employee and asdict(employee), "changes": list(map(asdict, changes))}
    )


# -- For the operator: no tenant's token, and nothing about people -------------------


class Metrics:
    """Counts of answers, in the text format of Prometheus."""

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
        """Return all counts."""
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


# ----------------------------------------------------------------------------
# 15. Application                                           RFC 7644 §2, §3.12
#
# Tenants: who is served, with which tokens, from which store. Then the one table of
# routes, and handle(Request) -> Response: token to tenant, path to operation, every
# failure to a SCIM error.
# Uses chapters 1 to 14. Knows nothing of sockets.
# ----------------------------------------------------------------------------


class Tenants:
    """The tenants of a configuration, their directories and tokens; of a secret only the hash.

    directories has each tenant's Directory by name. If a tenant's database cannot be used, it has
    the StoreError instead: this tenant is answered 503, the others are served.
    """

    def __init__(self, config: Config, clock: Clock, new_id: Callable[[], str]) -> None:
        self.directories: dict[str, Directory | StoreError] = {}
        self._clock, self._new_id = clock, new_id
        self._tried = clock()  # when databases that failed were opened last
        self._configuring = threading.RLock()
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Serve the tenants of a configuration from now on; a StoreError changes nothing.

        A tenant that is served already keeps its store.
        """
        make_data_dir(config)
        with self._configuring:
            before = self.directories
            self.directories = {
                tenant.name: self._open(config, tenant) for tenant in config.tenants
            }
            tenants = tuple(
                replace(tenant, tokens=tuple(replace(token, secret="") for token in tenant.tokens))
                for tenant in config.tenants
            )
            self.config = replace(config, tenants=tenants)
            self.tenants = {tenant.name: tenant for tenant in tenants}
            self._tokens = {
                token.sha256: (tenant, token) for tenant in tenants for token in tenant.tokens
            }
        for name in before.keys() - self.directories.keys():
            if isinstance(directory := before[name], Directory):
                directory.store.interrupt()
                directory.store.close()

    def add_tenant(self, document: Json) -> Directory:
        """Add or replace a tenant, as in the configuration file; ConfigError, StoreError."""
        with self._configuring:
            tenant = parse_tenant(document, self.config.tenants)
            others = tuple(other for other in self.config.tenants if other.name != tenant.name)
            self.configure(replace(self.config, tenants=(*others, tenant)))
        return self.directory(tenant.name)

    def remove_tenant(self, name: str) -> None:
        """Stop serving a tenant; its file stays."""
        with self._configuring:
            others = tuple(tenant for tenant in self.config.tenants if tenant.name != name)
            self.configure(replace(self.config, tenants=others))

    def directory(self, name: str) -> Directory:
        """Return the directory of a tenant; KeyError, or StoreError if it cannot be used."""
        directory = self.directories[name]
        if isinstance(directory, StoreError):
            raise directory
        return directory

    @property
    def available(self) -> list[Directory]:
        """The directories of the tenants whose databases can be used."""
        return [item for item in self.directories.values() if isinstance(item, Directory)]

    def token(self, name: str) -> str:
        """Return a new secret of a tenant, valid until the next configuration; KeyError."""
        secret = secrets.token_urlsafe(32)
        with self._configuring:
            self._tokens = {**self._tokens, digest(secret): (self.tenants[name], Token("made", ""))}
        return secret

    def known_caller(self, request: Request) -> Caller | None:
        """Return who sent a request, by the tokens of the configuration, expired ones included."""
        if request.caller:
            return request.caller
        secret = credentials_of(request)[1]
        entry = self._tokens.get(digest(secret)) if secret else None
        return self._caller(*entry) if entry else None

    def _caller(self, tenant: Tenant, token: Token) -> Caller | None:
        directory = self.directories.get(tenant.name)  # None: it was removed at this moment
        return Caller(tenant, token, directory) if directory else None

    def _open(self, config: Config, tenant: Tenant) -> Directory | StoreError:
        # Return the directory of a tenant, the present one if it fits, or why there is none.
        current = self.directories.get(tenant.name)
        if isinstance(current, Directory) and current.custom_fields == tenant.custom_fields:
            current.keep, current.keep_days = config.keep_changes, config.keep_days
            return current
        try:
            directory = Directory(
                current.store
                if isinstance(current, Directory)
                else Store(store_path(config, tenant)),
                tenant.custom_fields,
                self._clock,
                self._new_id,
                config.keep_changes,
                config.keep_days,
            )
            directory.claim(tenant.name)
        except StoreError as error:
            return error
        return directory

    def _may_reopen(self) -> bool:
        return self._clock() - self._tried > timedelta(seconds=RETRY_SECONDS)

    def _reopened(self, name: str) -> Directory:
        # Return the directory of a tenant whose database failed, or raise ScimError 503.
        if self._may_reopen():
            with self._configuring:
                self._tried = self._clock()
                if tenant := self.tenants.get(name):  # else it was removed meanwhile
                    self.directories[name] = self._open(self.config, tenant)
        if not isinstance(directory := self.directories.get(name), Directory):
            raise ScimError(
                503, "", "the tenant's database cannot be used; the server's log says why", RETRY
            )
        return directory


# -- Routes --------------------------------------------------------------------------

ANYONE, OPERATOR, BEARER, NOWHERE = "anyone", "operator", "bearer", "nowhere"  # who may call
# Lanes of the HTTP server: at once, with the reads, with the writes, in a thread of its own.
QUICK, READ, WRITE, SLOW = "quick", "read", "write", "slow"
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
UNKNOWN_PATH = Route("", NOWHERE)
UNKNOWN_SCIM_PATH = Route("", BEARER)  # 401 comes before 404


def route_table(rows: Iterable[RouteRow]) -> dict[tuple[str, ...], Route]:
    """Return routes by the segments of their paths; {type} stands for Users and for Groups."""
    routes: dict[tuple[str, ...], Route] = {}
    for methods, pattern, access, lane, operation in rows:
        for path in (pattern.replace("{type}", "Users"), pattern.replace("{type}", "Groups")):
            segments = tuple(filter(None, path.split("/")))
            type = {"Users": "User", "Groups": "Group"}.get("".join(segments[2:3]), "")
            route = Route(path.removeprefix(BASE_PATH) or "/", access, type)
            for method in methods.replace("GET", "GET HEAD").split():
                routes.setdefault(segments, route).operations[method] = lane, operation
    return routes


def labelled(call: Call, response: Response) -> Response:
    """Return a response with the tenant and the route of its call, for the logs."""
    if response.status == 401:
        return response
    tenant = call.caller.tenant.name if call.caller else ""
    return Response(*response[:3], tenant, call.route.label, response.reason)


class Application(Tenants):
    """All tenants of a configuration as one endpoint; the bearer token alone selects the tenant.

    authenticate is for a program that keeps tokens itself: it is asked about tokens that no tenant
    has, and returns a tenant's name or None. page is the console, "" for none.
    """

    def __init__(
        self,
        config: Config,
        authenticate: Callable[[str], str | None] | None = None,
        clock: Clock = utc_now,
        new_id: Callable[[], str] = random_id,
        page: str = "",
    ) -> None:
        super().__init__(config, clock, new_id)
        self.log, self.metrics = ProvisioningLog(), Metrics()
        self._authenticate = authenticate
        self._routes = route_table(self._rows(page if config.console else ""))

    def _rows(self, page: str) -> list[RouteRow]:
        # Methods, path, who may call, lane, operation.
        page_answer, bulk = page_response(page), partial(run_bulk, self.handle)
        log, setup = partial(get_log, self.log), partial(get_setup, self.log)
        # fmt: off
        rows: list[RouteRow] = [
            ("GET",    "/healthz",                       ANYONE,   QUICK, self._get_health),
            ("GET",    "/readyz",                        ANYONE,   READ,  self._get_readiness),
            ("GET",    "/metrics",                       OPERATOR, READ,  self._get_metrics),
            ("GET",    "/scim/v2",                       BEARER,   READ,  list_resources),
            ("GET",    "/scim/v2/ServiceProviderConfig", BEARER,   QUICK, get_documents),
            ("GET",    "/scim/v2/Schemas",               BEARER,   QUICK, get_documents),
            ("GET",    "/scim/v2/Schemas/{id}",          BEARER,   QUICK, get_documents),
            ("GET",    "/scim/v2/ResourceTypes",         BEARER,   QUICK, get_documents),
            ("GET",    "/scim/v2/ResourceTypes/{id}",    BEARER,   QUICK, get_documents),
            ("GET POST PUT PATCH DELETE", "/scim/v2/Me", BEARER,   QUICK, refuse_me),
            ("POST",   "/scim/v2/Bulk",                  BEARER,   WRITE, bulk),
            ("POST",   "/scim/v2/.search",               BEARER,   READ,  search_resources),
            ("POST",   "/scim/v2/{type}/.search",        BEARER,   READ,  search_resources),
            ("GET",    "/scim/v2/{type}",                BEARER,   QUICK, list_resources),
            ("POST",   "/scim/v2/{type}",                BEARER,   WRITE, create_resource),
            ("GET",    "/scim/v2/Users/{id}",            BEARER,   QUICK, get_resource),
            ("GET",    "/scim/v2/Groups/{id}",           BEARER,   READ,  get_resource),
            ("PUT",    "/scim/v2/{type}/{id}",           BEARER,   WRITE, replace_resource),
            ("PATCH",  "/scim/v2/{type}/{id}",           BEARER,   WRITE, patch_resource),
            ("DELETE", "/scim/v2/{type}/{id}",           BEARER,   WRITE, delete_resource),
            ("GET",    "/employees",                     BEARER,   READ,  list_employees),
            ("GET",    "/employees/{id}",                BEARER,   READ,  get_employee),
            ("GET",    "/changes",                       BEARER,   SLOW,  list_changes),
            ("GET",    "/",                              ANYONE,   QUICK, lambda call: page_answer),
            ("GET",    "/console/api/log",               BEARER,   SLOW,  log),
            ("GET",    "/console/api/setup",             BEARER,   READ,  setup),
            ("GET",    "/console/api/mapping",           BEARER,   READ,  get_mapping),
            ("GET",    "/console/api/history/{id}",      BEARER,   READ,  get_history),
        ]
        # fmt: on
        return [row for row in rows if page or not re.fullmatch("/|/console/.*", row[1])]

    def interrupt(self) -> None:
        """End all long polls, permanently."""
        for directory in self.available:
            directory.store.interrupt()

    def close(self) -> None:
        """Write the logs and close the stores; the application cannot be used afterwards."""
        self.log.close()
        for directory in self.available:
            directory.store.close()

    # -- Requests --

    def handle(self, request: Request) -> Response:
        """Return the answer to a request; every failure is a SCIM error (RFC 7644 §3.12)."""
        started, call = time.perf_counter(), Call(request, *self._find_route(request.path))
        response = self._answer(call)
        self._note(call, response, time.perf_counter() - started)
        return response

    def handle_all(self, requests: Sequence[Request]) -> list[Response]:
        """Return the answers to writes of one tenant: each whole or not at all, all in one commit.

        The first request shows which tenant that is.
        """
        started, responses = time.perf_counter(), list[Response]()
        calls = [Call(request, *self._find_route(request.path)) for request in requests]
        try:
            if not (caller := self.caller_of(requests[0])):
                raise unauthorized()
            if isinstance(directory := caller.directory, StoreError):
                return list(map(self.handle, requests))
            with directory.store.writing():
                responses = list(map(self._answer, calls))
        except Exception as error:  # noqa: BLE001  a commit that fails undoes all of them
            # After an error such as a full disk there is nothing to commit: that error is the cause.
            cause = next((answer for answer in responses if answer.status == 507), None)
            response = cause or response_for(error)
            responses = [labelled(call, response) for call in calls]
        for call, response in zip(calls, responses, strict=True):
            self._note(call, response, time.perf_counter() - started)
        return responses

    def caller_of(self, request: Request) -> Caller | None:
        """Return who sent a request; the hook is asked about a token that no tenant has."""
        caller, secret = self.known_caller(request), credentials_of(request)[1]
        if caller or not secret or not self._authenticate:
            return caller
        try:
            name = self._authenticate(secret)
        except (Exception, SystemExit) as error:  # noqa: BLE001  its text may hold the secret
            raise ScimError(
                503, "", f"the authenticate hook failed ({type(error).__name__})", RETRY
            ) from None
        tenant = self.tenants.get(name) if isinstance(name, str) else None
        return self._caller(tenant, Token("authenticate", "")) if tenant else None

    def lane_of(self, request: Request) -> str:
        """Return the lane of a request: QUICK, READ, WRITE or SLOW; never waits."""
        route, id = self._find_route(request.path)
        lane, _ = route.operations.get(request.method, (QUICK, None))
        if route.access in (ANYONE, OPERATOR):
            return lane
        if not (caller := self.known_caller(request)):
            return SLOW if self._authenticate and credentials_of(request)[1] else QUICK
        if isinstance(directory := caller.directory, StoreError):
            return SLOW if self._may_reopen() else QUICK
        if lane == SLOW and "wait" not in unquote(request.query).lower():
            return READ
        if lane == QUICK and route.type:
            # With a store in memory, readers wait for the writer.
            quick = id or QUICK_QUERIES[route.type].fullmatch(request.query)
            return QUICK if quick and directory.store.path != ":memory:" else READ
        return lane

    def body_limit(self, path: str) -> int:
        """Return how many octets the body of a request to a path may have."""
        return MAX_BULK_BODY if path == f"{BASE_PATH}/Bulk" else MAX_BODY

    def _find_route(self, path: str) -> tuple[Route, str]:
        # Return the route of a path, literal ones first, and the id in the path.
        segments = [unquote(part) if "%" in part else part for part in path.split("/") if part]
        if route := self._routes.get(tuple(segments)):
            return route, ""
        if route := self._routes.get((*segments[:-1], "{id}")):
            return route, segments[-1]
        return UNKNOWN_SCIM_PATH if segments[:2] == ["scim", "v2"] else UNKNOWN_PATH, ""

    def _answer(self, call: Call) -> Response:
        request, access = call.request, call.route.access
        try:
            if access in (BEARER, NOWHERE):  # the log shows calls to unknown paths, too
                call.caller = self.caller_of(request)
            if access == BEARER:
                call.directory = self._admit(request, call.caller)
            elif access == OPERATOR:
                self._admit_operator(request)
            response = self._perform(call)
        except Exception as error:  # noqa: BLE001  a bug of ours must not cut the connection
            response = response_for(error)
        return labelled(call, response)

    def _admit(self, request: Request, caller: Caller | None) -> Directory:
        # Return the caller's directory, in the name of its token, or raise ScimError 401 or 503.
        if not caller:
            raise unauthorized()
        tenant, token, directory = caller
        if token.expired(now := self._clock()):
            raise unauthorized(reason=("expired", token.name, time_text(token.expires or now)[:16]))
        if credentials_of(request)[0].lower() != "bearer":
            raise unauthorized(reason=("scheme", token.name))
        if isinstance(directory, StoreError):
            directory = self._reopened(tenant.name)
        return directory.on_behalf_of(token.name)

    def _admit_operator(self, request: Request) -> None:
        # Raise ScimError 401 unless the request is from this machine or has the metrics token.
        is_forwarded = {"forwarded", "x-forwarded-for"} & request.headers.keys()
        is_local = request.client in ("127.0.0.1", "::1") and not is_forwarded
        if not is_local and digest(credentials_of(request)[1]) != self.config.metrics_sha256:
            raise ScimError(
                401,
                "",
                "/metrics: on loopback, or with metrics_token as bearer token",
                {"WWW-Authenticate": "Bearer"},
            )

    def _perform(self, call: Call) -> Response:
        request, operations = call.request, call.route.operations
        if not operations:
            raise ScimError(
                404,
                "",
                f"{request.path} does not exist (case matters); "
                f"Users and Groups follow {BASE_PATH}",
                reason=("path", request.path, BASE_PATH),
            )
        if request.method not in operations:
            methods = sorted(operations, key="HEAD".__eq__)  # HEAD comes last
            allow = {"Allow": ", ".join([*methods, "OPTIONS"])}
            if request.method == "OPTIONS":
                return Response(204, headers=allow)
            raise ScimError(
                405,
                "",
                f"{request.method} is not for {request.path}; it takes {allow['Allow']}",
                allow,
            )
        if request.query:
            query = parse_qsl(request.query, keep_blank_values=True)
            call.parameters = {name.lower(): value for name, value in query}
        return operations[request.method][1](call)

    def _get_health(self, call: Call) -> Response:  # the process is up
        return plain_response("ok\n", "text/plain")

    def _get_metrics(self, call: Call) -> Response:
        return plain_response(self.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")

    def _get_readiness(self, call: Call) -> Response:  # the database of each tenant answers
        with suppress(StoreError, KeyError):  # KeyError: a tenant was removed at this moment
            for name in list(self.directories):
                self.directory(name).last_use("")
            return plain_response("ready\n", "text/plain")
        return Response(503, "not ready\n", {"Content-Type": "text/plain", **RETRY})

    def _note(self, call: Call, response: Response, seconds: float) -> None:
        # Pass a call to its tenant's log, or count it if no tenant has its token.
        request, caller = call.request, call.caller
        is_lost = response.status == 404 and not response.route
        # Reading the results in the console is not a part of the provisioning.
        is_console = request.method == "GET" and "x-console" in request.headers
        logged = (request.path.startswith(BASE_PATH) or is_lost) and not is_console
        with suppress(Exception):  # a failing log must not stop the answer
            if not caller and logged and response.status == 401:
                self.log.count_unknown_token(time_text(self._clock()))
            if not caller or isinstance(directory := caller.directory, StoreError):
                return  # there is no log
            if self.log.has_room(request, response):
                # The headers hold the secret.
                call.request, call.directory = request._replace(headers={}, caller=None), directory
                self.log.add(LogItem(call, caller, response, self._clock(), seconds, logged))
            else:
                self.log.lost += logged


# ----------------------------------------------------------------------------
# 16. HTTP server                                         RFC 9110, RFC 9112
#
# Bytes become a Request and a Response becomes bytes: strict framing, limits,
# keep-alive, one write per answer. The head is read by our own parser: the stock
# one forgives what two readers could read in two ways. One thread watches all
# connections and answers what is quick, others do what takes time.
# Uses chapters 1, 6, 8 to 10. Knows nothing of SCIM but the form of its errors.
# ----------------------------------------------------------------------------

MAX_REQUEST_LINE, MAX_HEAD, MAX_CHUNK_LINE = 8 * 1024, 32 * 1024, 1024  # octets
MAX_FIELDS = 100
HEAD_SECONDS = 10  # for a head to arrive, a handshake, the first octet of a body
SLOWEST = 1024  # octets a second, of a body either way
IDLE_SECONDS = 65
TURN_SECONDS = 1  # that a read waits for others
COSTLY = 8  # reads without a turn at once
STOP_SECONDS = 10  # how long a stopping server waits for requests in flight
LOG_LINES = 10_000  # that wait for a stream
MAX_EXCHANGES = 1_000  # that are kept for a test to look at
LOG_SECONDS = 0.05  # that a line may wait for others
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/(\d)\.(\d)\r\n")
FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)\r\n")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
ABSOLUTE_FORM = re.compile(r"https?://([^/?]+)(.*)", re.IGNORECASE)
AUTHORITY = re.compile(r"[A-Za-z0-9._~%!$&'()*+,;=-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")
LENGTH = re.compile(r"\d{1,19}", re.ASCII)
ANNOUNCED = re.compile(
    rb"\r\n(authorization|content-length|transfer-encoding|expect):[ \t]*([^\r\n]*)", re.IGNORECASE
)
IDLE, READING, ANSWERING = "idle", "reading", "answering"
RECEIVED = 16 * 1024  # octets at a time
SPARE_THREADS = 4  # that wait to lead
YIELD_SECONDS = 0.0002  # for each connection, to other workers before it takes one more
SWEEP_SECONDS = 1  # how often those who fell silent are looked for
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)


# Whether a selector sees a connection that another thread registers while it waits.
WATCHES = hasattr(selectors, "EpollSelector") or hasattr(selectors, "KqueueSelector")
Listener = socket.socket
Stamp = list[tuple[int, int]]
http_date = lru_cache(2)(partial(formatdate, usegmt=True))  # a second as a Date field has it


def log_line(text: str) -> None:
    """Print a line for the operator."""
    print(f"scim_server: {text}", file=sys.stderr, flush=True)


class Connection:
    """A client's octets, each awaited until a deadline alone (else TimeoutError); and what it is at."""

    def __init__(self, socket: socket.socket) -> None:
        self.socket, self.state, self.evicted = socket, IDLE, False
        self.since = time.monotonic()  # accepted, or a request with a good token was here last
        self.octets = bytearray()  # that came and were not read yet
        socket.setblocking(True)  # BSD hands on what its listener is
        self.allow(HEAD_SECONDS)

    def allow(self, seconds: float, pace: float = 0) -> None:
        """Set the deadline, and by how many seconds each octet that comes puts it off."""
        self.deadline, self._pace = time.monotonic() + seconds, pace

    def is_unread(self) -> bool:
        """Return whether octets have come that nobody has read yet."""
        with suppress(OSError):  # there are none, or it has ended
            return bool(self.socket.recv(1, socket.MSG_PEEK | DONT_WAIT))
        return False

    def fill(self, flags: int = 0) -> None:
        """Take in octets; EOFError at their end. With flags of recv() BlockingIOError where none have come."""
        if not flags:
            self._limit(socket.SO_RCVTIMEO, self.deadline)
        try:
            came = self.socket.recv(RECEIVED, flags)
        except BlockingIOError as error:
            raise error if flags else TimeoutError from error
        if not came:
            raise EOFError
        self.octets += came
        self.deadline += len(came) * self._pace

    def until(self, mark: bytes, limit: int, status: int, detail: str) -> bytes:
        """Return the octets up to a mark and with it; ScimError of that status if they are more than the limit."""
        while (end := self.octets.find(mark, 0, limit)) < 0:
            if len(self.octets) > limit:
                raise ScimError(status, "", detail)
            self.fill()
        return self.exactly(end + len(mark))

    def exactly(self, length: int) -> bytes:
        """Return that many octets."""
        while len(self.octets) < length:
            self.fill()
        found = bytes(self.octets[:length])
        del self.octets[:length]
        return found

    def send(self, octets: bytes) -> None:
        """Send octets, at SLOWEST or better."""
        deadline, left = time.monotonic() + HEAD_SECONDS + len(octets) / SLOWEST, memoryview(octets)
        while left:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                left = left[self.socket.send(left) :]
            except BlockingIOError as error:
                raise TimeoutError from error

    def send_now(self, octets: bytes) -> bytes:
        """Send what can be sent without waiting, and return the rest."""
        try:
            return octets[self.socket.send(octets, DONT_WAIT) :]
        except BlockingIOError:
            return octets

    def _limit(self, option: int, deadline: float) -> None:
        """Have the next wait end at a deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if os.name == "nt" or isinstance(self.socket, ssl.SSLSocket):  # which would wait again
            self.socket.settimeout(left)
        else:  # settimeout() costs two calls of the system more for each wait
            self.socket.setsockopt(
                socket.SOL_SOCKET, option, struct.pack("ll", *divmod(int(left * 1e6) + 1, 10**6))
            )  # 0 would be no limit

    def end(self, how: int) -> None:
        """End reading, writing or both, from whatever thread."""
        with suppress(OSError):
            socket.socket.shutdown(self.socket, how)  # that of ssl.SSLSocket ends encryption too

    def linger(self) -> None:
        """Read on for a moment after a refusal: closing on unread octets would take it back."""
        self.end(socket.SHUT_WR)
        self.allow(1)
        while True:
            self.fill()
            self.octets.clear()


def read_head(peer: Connection) -> tuple[str, str, int, dict[str, str]]:
    """Return method, target, minor version, headers of a request (RFC 9112 §3, §5); ScimError 400, 414, 431, 505."""
    limits = (MAX_REQUEST_LINE, 414, f"the request line is longer than {MAX_REQUEST_LINE} octets")
    line = peer.until(b"\n", *limits)
    if line == b"\r\n":  # RFC 9112 §2.2: one empty line is forgiven
        line = peer.until(b"\n", *limits)
    if not (start := REQUEST_LINE.fullmatch(line)):
        raise ScimError(400, "", "the request line is malformed")
    if start[3] != b"1":
        raise ScimError(505, "", "this server speaks HTTP/1.1")
    peer.octets[:0] = b"\r\n"  # the end of the line again: there may be no fields
    head = peer.until(
        b"\r\n\r\n", MAX_HEAD, 431, f"the header fields take more than {MAX_HEAD} octets"
    )
    headers: dict[str, str] = {}
    position, end = 2, len(head) - 2
    while position < end:
        if not (parts := FIELD_LINE.match(head, position)):
            raise ScimError(400, "", "a header field is malformed")
        position = parts.end()
        name, value = parts[1].decode().lower(), parts[2].rstrip(b" \t").decode("latin-1")
        if name in headers and name in ("host", "content-length", "transfer-encoding"):
            raise ScimError(400, "", f"{name}: given twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if head.count(b"\n") > MAX_FIELDS + 2:
        raise ScimError(431, "", f"there are more than {MAX_FIELDS} header fields")
    check_framing(headers, int(start[4]))
    return start[1].decode(), start[2].decode(), int(start[4]), headers


def check_framing(headers: Mapping[str, str], minor_version: int) -> None:
    """Raise ScimError 400 for a head that two readers could frame in two ways (RFC 9112 §6)."""
    host, length, coding = (
        headers.get(name) for name in ("host", "content-length", "transfer-encoding")
    )
    if (host is None and minor_version > 0) or (host and not AUTHORITY.fullmatch(host)):
        raise ScimError(400, "", "host: expected one host name or address with an optional port")
    if length is not None and not LENGTH.fullmatch(length):
        raise ScimError(400, "", "content-length: expected a number")
    if coding and (length is not None or minor_version == 0):
        raise ScimError(400, "", "transfer-encoding: not with content-length or HTTP/1.0")
    if coding and coding.lower() != "chunked":
        raise ScimError(400, "", "transfer-encoding: expected chunked alone")


def too_large(limit: int) -> ScimError:
    """Return the error of a body over the limit."""
    return ScimError(413, "", f"the body is larger than {limit} octets")


def read_chunks(peer: Connection, limit: int) -> bytes:
    """Return a chunked body (RFC 9112 §7.1), without its extensions and trailers; ScimError 400, 413."""
    malformed = ScimError(400, "", "the chunked body is malformed")
    next_line = partial(peer.until, b"\n", MAX_CHUNK_LINE, malformed.status, malformed.detail)
    body = bytearray()
    while head := CHUNK_LINE.fullmatch(next_line()):
        if not (size := int(head[1], 16)):
            if any(next_line() == b"\r\n" for _ in range(MAX_FIELDS)):
                return bytes(body)
            break
        if len(body) + size > limit:
            raise too_large(limit)
        body += peer.exactly(size)
        if peer.exactly(2) != b"\r\n":
            break
    raise malformed


def arrived(octets: bytearray) -> tuple[bytes, bytes] | None:
    """Return the request line and the Authorization of a request that has come with all its body, else None."""
    if (end := octets.find(b"\r\n\r\n")) < 0:
        return None
    fields = ANNOUNCED.findall(octets, 0, end)
    found = {name.lower(): value for name, value in fields}
    length = found.get(b"content-length", b"0")
    if (
        len(found) < len(fields)
        or b"transfer-encoding" in found
        or b"expect" in found
        or not LENGTH.fullmatch(length.decode("latin-1"))
        or len(octets) - end - 4 < int(length)
    ):
        return None
    return bytes(octets[: octets.find(b"\r\n")]), found.get(b"authorization", b"")


def origin_form(target: str, host: str) -> tuple[str, str]:
    """Return host and path with query of a target, maybe a whole URL (RFC 9112 §3.2); ScimError 400."""
    if target.startswith("/") or target == "*":
        return host, target
    if not (parts := ABSOLUTE_FORM.fullmatch(target)) or not AUTHORITY.fullmatch(parts[1]):
        raise ScimError(400, "", "the request target is neither a path nor a URL")
    return parts[1], parts[2] if parts[2].startswith("/") else f"/{parts[2]}"


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """Return proto, host and for as the nearest proxy gives them (RFC 7239, else X-Forwarded-*)."""
    nearest = headers.get("forwarded", "").rpartition(",")[2]
    found = {
        name.strip().lower(): value.strip(' "')
        for name, _, value in (pair.partition("=") for pair in nearest.split(";"))
    }
    return {
        name: found.get(name) or headers.get(f"x-forwarded-{name}", "").rpartition(",")[2].strip()
        for name in ("proto", "host", "for")
    }


def file_signature(*files: str) -> Stamp:
    """Return by what a change of files shows, [] where one is missing; half a file may have the time of the whole."""
    with suppress(OSError):
        return [(found.st_mtime_ns, found.st_size) for found in map(os.stat, files)]
    return []


class Tls:
    """The TLS context of the files of a certificate and its key; OSError where it cannot be made."""

    def __init__(self, *files: str) -> None:
        self._files, self._seen = files, file_signature(*files)
        try:
            self._context = self._load()
        except OSError as error:
            raise OSError(f"tls: {' and '.join(files)}: cannot be used ({error})") from error

    def context(self) -> ssl.SSLContext:
        """Return the context for a new connection, made anew when the files change if they can be used."""
        with suppress(OSError):
            if (found := file_signature(*self._files)) != self._seen:
                try:
                    self._context = self._load()
                except ssl.SSLError as error:
                    log_line(
                        f"{' and '.join(self._files)}: cannot be used ({error}); "
                        "the earlier certificate serves on"
                    )
                self._seen = found  # so that it is said once
        return self._context

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._files)
        return context


def request_log(style: str, stream: TextIO) -> BackgroundWriter:
    """Return what writes requests, as dicts whose values hold no blank, to a stream: as text, json or not at all."""

    def text(line: dict[str, Any]) -> str:
        line["time"] = time_text(datetime.fromtimestamp(line["time"], UTC))
        values = [str(value) or "-" for value in line.values()]
        return json.dumps(line) if style == "json" else " ".join(values)

    def write(lines: list[dict[str, Any]]) -> None:
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.write("".join(f"{text(line)}\n" for line in lines))
            stream.flush()

    return BackgroundWriter(write, LOG_SECONDS, 0 if style == "off" else LOG_LINES)


def text_of_body(body: Json) -> str:
    """Return the text of an answer's body; in a list, Encoded resources go out as they are."""
    if isinstance(body, str):
        return body
    if not isinstance(body, dict) or "Resources" not in body:
        return to_json(body)
    texts = ",".join(one if isinstance(one, Encoded) else to_json(one) for one in body["Resources"])
    return f"{to_json({**body, 'Resources': []})[:-2]}{texts}]}}"


def to_http(response: Response, request: Request) -> tuple[str, list[tuple[str, str]], bytes]:
    """Return the status, the header fields and the body of an answer."""
    body = b"" if response.body is None else text_of_body(response.body).encode()
    fields = [("X-Request-Id", request.id), *response.headers.items()]
    if response.body is not None and "Content-Type" not in response.headers:
        fields.append(("Content-Type", "application/scim+json"))
    if response.status not in (204, 304):  # RFC 9110 §8.6: never with a 204, nor 0 with a 304
        fields.append(("Content-Length", str(len(body))))
    status = f"{response.status} {http.client.responses.get(response.status, 'Other')}"
    return status, fields, b"" if request.method == "HEAD" else body


class Exchange(NamedTuple):
    """A request and its answer, as a test of a client looks at them."""

    request: Request
    response: Response


@dataclass
class Fault:
    """What the next requests meet, for tests of clients."""

    status: int = 0  # in place of the answer; 401 as of an expired token, 412 as of ETags
    times: int = 1
    method: str = ""  # "" is any
    path: str = ""  # a text in the path of those that meet it
    delay: float = 0  # seconds
    cut: bool = False  # in the middle of the answer's body
    headers: Mapping[str, str] = field(default_factory=dict)

    def meets(self, request: Request) -> bool:
        """Return whether a request meets this fault."""
        return (
            self.times > 0
            and self.method.upper() in ("", request.method)
            and self.path in request.path
        )

    def response(self) -> Response:
        """Return the answer that the status means."""
        error = (
            unauthorized()
            if self.status == 401
            else ScimError(
                self.status,
                "",
                "If-Match: the version is another now; read it again"
                if self.status == 412
                else "a fault that a test asked for",
                {"Retry-After": "1"} if self.status in (429, 503) else {},
            )
        )
        error.headers.update(self.headers)
        return error_response(error)


class Handler:
    """One connection, request after request; a step returns whether to go on, None leaves that to another thread."""

    def __init__(self, server: ScimServer, peer: Connection, client: str) -> None:
        self.server, self.peer, self.client = server, peer, client
        self.watched = False  # by the thread that leads, which alone takes steps then
        self.patient = True  # whether the thread that takes steps may wait for this client
        self._request: Request | None = None  # being read, as far as its head has come
        self._minor_version, self._started = 1, 0.0

    def run(self, step: Callable[[], bool | None]) -> None:
        """Take a step; then let the connection rest, or close it where it ended or failed."""
        going: bool | None = False
        try:
            try:
                going = step()
            except ScimError as error:
                going = self._refuse(error)
        except (EOFError, OSError):  # the client is gone, or was silent for too long
            pass
        except Exception as error:  # noqa: BLE001  a bug of ours ends no more than this
            response_for(error)
        if going:
            self.server.rest(self)
        elif going is False:
            self.server.close(self)

    def serve(self) -> bool:
        """Serve a connection that cannot be watched, in a thread of its own."""
        if self.server.tls:
            tls = self.server.tls.context().wrap_socket(
                self.peer.socket, server_side=True, do_handshake_on_connect=False
            )
            self.peer.socket = tls  # which can be ended from here on
            tls.settimeout(HEAD_SECONDS)  # of the whole handshake
            tls.do_handshake()
        going: bool | None = True
        while going and not self.server.stopping.is_set():
            self.peer.state = IDLE
            self.peer.allow(IDLE_SECONDS)
            self.peer.fill()
            going = self.exchange()
        return False

    def take(self) -> bool | None:
        """Take what has come, in the thread that leads: it answers what is quick, and waits for nothing."""
        try:
            self.peer.fill(DONT_WAIT)
        except BlockingIOError:
            return True
        self.peer.state = READING
        line, key = arrived(self.peer.octets) or (b"", b"")
        if line:
            self.server.begin(self.peer)  # it came whole, and makes room for nobody
        if self.server.faults:  # whose delay is for those it meets alone
            line = b""
        lane = self.lane(line.decode("latin-1"), key.decode("latin-1"))
        if lane == QUICK:
            return self.exchange()
        if lane != WRITE:
            return self.later(self.exchange)
        self.server.unwatch(self)
        self.server.gather(key, self)
        return None

    def lane(self, line: str, authorization: str) -> str:
        """Return the lane of a request by its first line."""
        if line.count(" ") != 2:
            return SLOW
        method, target, _ = line.split(" ")
        path, _, query = target.partition("?")
        headers = {"authorization": authorization}
        return self.server.application.lane_of(Request(method, path, query, headers))

    def exchange(self) -> bool | None:
        """Read a request that has come, or is coming, and have it answered; and others that follow at once."""
        while True:
            request = self.receive()
            going = self.answer(request, *self.server.answer(request, in_turn=self.patient))
            if not going or not self.patient or not self.peer.octets:
                return going
            self.peer.state = IDLE

    def receive(self) -> Request:
        """Return the next request; ScimError for one to refuse."""
        if self.peer.state == IDLE:
            self.peer.state = READING
        self.peer.allow(HEAD_SECONDS)
        self._request, self._started = None, time.perf_counter()
        try:
            method, target, self._minor_version, headers = read_head(self.peer)
            self._request = request = self.server.build_request(
                method, target, headers, self.client
            )
            if body := self._body(request):
                request = request._replace(body=body)
        except TimeoutError:
            raise ScimError(
                408,
                "",
                f"the request took too long: its head must come within {HEAD_SECONDS} s, "
                f"its body at {SLOWEST} octets a second",
            ) from None
        self.server.begin(self.peer)
        return request

    def answer(self, request: Request, response: Response, cut: bool = False) -> bool | None:
        """Send an answer, or half of one that is to be cut."""
        if response.tenant:
            self.peer.since = time.monotonic()
        else:
            self.peer.state = READING  # an answer to nobody makes room for others
        options = request.headers.get("connection", "").lower()
        last = (
            self.server.stopping.is_set()
            or "close" in options
            or cut
            or (self._minor_version == 0 and "keep-alive" not in options)
        )
        return self._send(request, response, last, cut)

    def later(self, step: Callable[[], bool | None]) -> bool | None:
        """Have another thread take a step, one that may wait."""
        self.server.unwatch(self)
        self.patient = True
        self.server.leave(partial(self.run, step))
        return None

    def _body(self, request: Request) -> bytes:
        """Return the body that a head announces (RFC 9112 §6.3); ScimError 413 before reading too much."""
        limit, headers = self.server.application.body_limit(request.path), request.headers
        length = int(headers.get("content-length", 0))
        if length > limit:
            raise too_large(limit)
        if headers.get("expect", "").lower() == "100-continue" and self._minor_version > 0:
            self.peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.peer.allow(HEAD_SECONDS, 1 / SLOWEST)
        chunked = "transfer-encoding" in headers
        return read_chunks(self.peer, limit) if chunked else self.peer.exactly(length)

    def _refuse(self, error: ScimError) -> bool | None:
        """Answer a request that could not be read, and end."""
        if not self.patient:
            return self.later(partial(self._refuse, error))
        self._send(
            self._request or Request("", "", id=self.server.request_id("")),
            error_response(error),
            last=True,
        )
        self.peer.linger()
        return False

    def _send(
        self, request: Request, response: Response, last: bool, cut: bool = False
    ) -> bool | None:
        status, fields, body = to_http(response, request)
        lines = [
            f"HTTP/1.1 {status}",
            f"Date: {http_date(int(time.time()))}",
            *(f"{name}: {value}" for name, value in fields),
            *(["Connection: close"] if last else []),
            "\r\n",
        ]
        octets = (
            "\r\n".join(lines).encode("latin-1", "replace")
            + body[: len(body) // 2 if cut else None]
        )
        try:
            if not self.patient and (octets := self.peer.send_now(octets)):
                return self.later(partial(self._send_rest, octets, not last))
            self.peer.send(octets)
        finally:
            self.server.note(request, response, time.perf_counter() - self._started, len(body))
        return not last

    def _send_rest(self, octets: bytes, going: bool) -> bool:
        self.peer.send(octets)
        return going


def listen(config: Config) -> Listener:
    """Return a socket that listens where a configuration says; port 0 picks a free one. OSError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.create_server((config.host, config.port), family=family, backlog=128)
    listener.setblocking(False)  # of workers that are woken one gets it
    return listener


def url_of(config: Config, port: int) -> str:
    """Return the Tenant URL of a server on a port."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http{'s' * bool(config.tls)}://{host}:{port}{BASE_PATH}"


class ScimServer(http.server.HTTPServer):
    """An application on a socket. See url; running() starts and stops it.

    Its configuration says where, with what TLS and for how many. For tests of clients, faults may be
    appended to, and exchanges has what was asked and answered last where it is not None. Without a socket
    that listens it makes one. Raises OSError where the address or the certificate cannot be had.

    A crew of threads serves. One of them leads: it waits for all connections and answers what is quick;
    what takes longer becomes a task, which it does itself while another one leads. Writes that come
    meanwhile with one token are one task, and share a commit.
    """

    def __init__(self, application: Application, listener: Listener | None = None) -> None:
        self.application, self.config = application, application.config
        self.tls = Tls(*self.config.tls) if self.config.tls else None
        self.log = request_log(self.config.access_log, sys.stderr)
        self.stopping, self.stopped = threading.Event(), threading.Event()
        self.faults: list[Fault] = []
        self.exchanges: list[Exchange] | None = None
        self.connections: dict[Handler, Connection] = {}
        self._changed, self._lead = threading.Condition(), threading.Lock()
        self._turn, self._costly = threading.Lock(), threading.Semaphore(COSTLY)
        self._run, self._numbers = secrets.token_hex(4), itertools.count(1)  # for request ids
        self._tasks: deque[Callable[[], None]] = deque()  # that the one who leads has left
        self._writes: dict[bytes, list[Handler]] = {}  # that wait, by their Authorization
        self._free = self._leader = 0  # how many of the crew lead or wait to; who does
        self._selector, self._swept = selectors.DefaultSelector(), 0.0
        self._bell, self._ear = socket.socketpair()  # to wake who leads
        self._bell.setblocking(False)
        super().__init__(("", 0), http.server.BaseHTTPRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener or listen(self.config)
        self.server_address = self.socket.getsockname()
        self.url = url_of(self.config, self.server_address[1])
        self.token, self.directory = application.token, application.directory  # at hand for a test

    # -- Connections --

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Take in connections until stop()."""
        self._selector.register(self._ear, selectors.EVENT_READ, partial(self._ear.recv, 4096))
        with self._changed:
            self._hire()
        super().serve_forever(poll_interval)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; of workers, the one that has the fewest is the first to."""
        if self.config.workers > 1:
            time.sleep(min(len(self.connections), 10) * YIELD_SECONDS)
        return super().get_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection in; at the limit, the one that rests longest makes room for it."""
        with self._changed:
            while (
                len(self.connections) >= self.config.max_connections and not self.stopping.is_set()
            ):
                resting = [
                    handler for handler, peer in self.connections.items() if peer.state != ANSWERING
                ]
                resting.sort(key=lambda handler: handler.peer.since)
                if loser := next(
                    (one for one in resting if not (one.watched and one.peer.is_unread())), None
                ):
                    self.connections.pop(loser).evicted = True
                    loser.peer.end(socket.SHUT_RDWR)
                else:
                    self._changed.wait(0.1)  # for one of the answers
            handler = Handler(self, Connection(request), client_address[0])
            self.connections[handler] = handler.peer
        with suppress(OSError):
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        try:
            if self.tls or not WATCHES:
                threading.Thread(target=handler.run, args=(handler.serve,), daemon=True).start()
            else:
                self.rest(handler)
        except RuntimeError:  # there can be no more threads
            self.close(handler)

    def rest(self, handler: Handler) -> None:
        """Have a connection watched for its next request, or that answered where it has come already."""
        if handler.peer.octets:
            handler.peer.state = IDLE
            handler.later(handler.exchange)
            return
        with self._changed:
            if not self.stopping.is_set():
                handler.peer.state, handler.patient = IDLE, False
                handler.peer.allow(IDLE_SECONDS)
                if not handler.watched:
                    handler.watched = True
                    ready = partial(handler.run, handler.take)
                    self._selector.register(handler.peer.socket, selectors.EVENT_READ, ready)
                return
        self.close(handler)

    def unwatch(self, handler: Handler) -> None:
        """Watch a connection no more; for who leads, or where nobody does."""
        if handler.watched:
            self._selector.unregister(handler.peer.socket)
            handler.watched = False

    def begin(self, peer: Connection) -> None:
        """Note that a request is answered now; EOFError if its connection had to make room."""
        if peer.state == ANSWERING:
            return  # and makes room for nobody
        with self._changed:
            if peer.evicted:
                raise EOFError
            peer.state = ANSWERING

    def close(self, handler: Handler) -> None:
        """Close a connection and forget it."""
        self.unwatch(handler)
        handler.peer.end(socket.SHUT_WR)
        with suppress(OSError):
            handler.peer.socket.close()
        with self._changed:
            self.connections.pop(handler, None)
            self._changed.notify_all()

    def stop(self) -> None:
        """Accept nothing more, wait for the requests in flight, close all connections."""
        with self._changed:
            if self.stopping.is_set():
                self._changed.wait_for(self.stopped.is_set)
                return
            self.stopping.set()
        self.application.interrupt()
        ending = threading.Thread(target=self.shutdown)
        ending.start()
        with suppress(OSError):  # a knock, which ends the wait for one
            socket.create_connection(self.socket.getsockname()[:2], 1).close()
        ending.join()
        self.server_close()
        self._ring()
        with self._changed:
            self._changed.wait_for(lambda: not self._free)  # from here on nobody leads
        for handler, peer in self.connections.copy().items():
            if handler.watched:
                self.close(handler)
            elif peer.state == IDLE:
                peer.end(socket.SHUT_RD)  # its read ends
        with self._changed:
            self._changed.wait_for(lambda: not self.connections, STOP_SECONDS)
        for end in (self._selector, self._bell, self._ear):
            end.close()
        self.log.close(1)
        with self._changed:
            self.stopped.set()
            self._changed.notify_all()

    # -- The crew --

    def leave(self, task: Callable[[], None]) -> None:
        """Have a task done by a thread of its own, which is one that leads now or will."""
        with self._changed:
            if self.stopping.is_set():
                threading.Thread(target=task, daemon=True).start()
                return
            self._tasks.append(task)
        if self._leader != threading.get_ident():
            self._ring()

    def gather(self, key: bytes, handler: Handler) -> None:
        """Have a write done together with others that wait with the same Authorization."""
        with self._changed:
            if key in self._writes:
                self._writes[key].append(handler)
                return
            self._writes[key] = [handler]
        self.leave(partial(self._write, key))

    def _ring(self) -> None:
        """Wake who leads."""
        with suppress(BlockingIOError):  # it was rung so often already
            self._bell.send(b"!")

    def _hire(self) -> None:
        """Take one more into the crew, under the lock of what changes."""
        with suppress(RuntimeError):  # of no more threads: then nobody leads for a while
            threading.Thread(target=self._work, daemon=True).start()
            self._free += 1

    def _work(self) -> None:
        """Lead, do a task that leading brought, and queue up to lead again."""
        while True:
            with self._lead:
                self._leader = threading.get_ident()
                task = self._await_task()
                self._leader = 0
            with self._changed:
                self._free -= 1
                if task and not self._free:
                    self._hire()
                self._changed.notify_all()
            if not task:
                return
            task()
            with self._changed:
                if self._free >= SPARE_THREADS or self.stopping.is_set():
                    return
                self._free += 1

    def _await_task(self) -> Callable[[], None] | None:
        """Watch all connections until there is a task; None when the server stops and all that came is taken."""
        while not self._tasks:
            stopping = self.stopping.is_set()
            for key, _ in self._selector.select(0 if stopping else SWEEP_SECONDS):
                key.data()
            if stopping:
                break
            if (now := time.monotonic()) > self._swept + SWEEP_SECONDS:
                self._swept = now
                with self._changed:
                    for peer in self.connections.values():
                        if peer.state == IDLE and peer.deadline < now:
                            peer.end(socket.SHUT_RDWR)  # which who watches it sees
        return self._tasks.popleft() if self._tasks else None

    def _write(self, key: bytes) -> None:
        """Answer the writes that wait with one Authorization, as long as there are any."""
        asked: list[tuple[Handler, Request]] = []

        def receive(handler: Handler) -> None:
            asked.append((handler, handler.receive()))

        while handlers := self._gathered(key):
            asked.clear()
            for handler in handlers:
                handler.run(partial(receive, handler))
            answers = self.answer_all([request for _, request in asked])
            for (handler, request), answer in zip(asked, answers, strict=True):
                handler.run(partial(handler.answer, request, *answer))

    def _gathered(self, key: bytes) -> list[Handler]:
        """Return writes to answer together; where there are none, the next one begins another task."""
        with self._changed:
            if handlers := self._writes.pop(key):
                self._writes[key] = handlers[MAX_WRITES_PER_COMMIT:]
        return handlers[:MAX_WRITES_PER_COMMIT]

    # -- Requests --

    def build_request(
        self, method: str, target: str, headers: Mapping[str, str], client: str
    ) -> Request:
        """Return a request without its body: where it came from, and how it named this server."""
        host, target = origin_form(target, headers.get("host") or "localhost")
        path, _, query = target.partition("?")
        scheme = "https" if self.tls else "http"
        if any(
            ipaddress.ip_address(client.partition("%")[0]) in network
            for network in self.config.trusted_proxies
        ):
            told = forwarded(headers)
            client = told["for"] or client
            scheme = told["proto"] if told["proto"] in ("http", "https") else scheme
            host = told["host"] if AUTHORITY.fullmatch(told["host"]) else host
        return Request(
            method,
            path,
            query,
            headers,
            b"",
            scheme,
            host,
            "",
            client,
            self.request_id(headers.get("x-request-id", "")),
            encoded=True,
        )

    def request_id(self, given: str) -> str:
        """Return the id of a request: that of its header where it has a good one, or a new one."""
        return given if REQUEST_ID.fullmatch(given) else f"{self._run}-{next(self._numbers)}"

    def answer_all(self, requests: Sequence[Request]) -> list[tuple[Response, bool]]:
        """Return the answers to writes with the same Authorization, in one commit unless there are faults."""
        if len(requests) < 2 or self.faults:
            return list(map(self.answer, requests))
        responses = self.application.handle_all(requests)
        for request, response in zip(requests, responses, strict=True):
            self._keep(request, response)
        return [(response, False) for response in responses]

    def answer(self, request: Request, in_turn: bool = False) -> tuple[Response, bool]:
        """Return the answer to a request, and whether it is to be cut; faults come first."""
        fault = self._fault(request) if self.faults else None
        if fault and fault.delay:
            self.stopping.wait(fault.delay)
        response = fault.response() if fault and fault.status else self._handle(request, in_turn)
        self._keep(request, response)
        return response, fault is not None and fault.cut

    def _fault(self, request: Request) -> Fault | None:
        """Return the fault that a request meets, counted."""
        with self._changed:
            if fault := next((one for one in self.faults if one.meets(request)), None):
                fault.times -= 1
        return fault

    def _keep(self, request: Request, response: Response) -> None:
        if self.exchanges is not None:
            if isinstance(response.body, dict):
                response = response._replace(body=from_json(text_of_body(response.body)))
            self.exchanges.append(Exchange(request, response))
            del self.exchanges[:-MAX_EXCHANGES]

    def _handle(self, request: Request, in_turn: bool) -> Response:
        """Have a request handled; reads that do not wait by intent take turns where they should.

        Threads that compete for the interpreter at each call of SQLite halve what all of them get
        done. Whoever has waited for TURN_SECONDS, behind a costly filter, goes on without a turn, but
        COSTLY of them at once leave some of the READERS to who leads.
        """
        reads = request.method in ("GET", "HEAD") or request.path.endswith("/.search")
        if (
            not (in_turn and reads and "authorization" in request.headers)
            or "wait" in request.query
        ):
            return self.application.handle(request)
        mine = self._turn.acquire(timeout=TURN_SECONDS)
        try:
            with self._costly:
                return self.application.handle(request)
        finally:
            if mine:
                self._turn.release()

    def note(self, request: Request, response: Response, seconds: float, octets: int) -> None:
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
        root, path = (
            quote(environ.get(name, "").encode("latin-1")) for name in ("SCRIPT_NAME", "PATH_INFO")
        )
        host = headers.get("host") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
        given = headers.get("x-request-id", "")
        return Request(
            environ["REQUEST_METHOD"],
            path,
            environ.get("QUERY_STRING", ""),
            headers,
            b"",
            environ["wsgi.url_scheme"],
            host,
            root,
            environ.get("REMOTE_ADDR", ""),
            given if REQUEST_ID.fullmatch(given) else str(uuid.uuid4()),
            encoded=True,
        )

    def _body(self, environ: dict[str, Any], request: Request) -> bytes:
        limit, length = self.application.body_limit(request.path), environ.get("CONTENT_LENGTH")
        if length and not LENGTH.fullmatch(length):
            raise ScimError(400, "", "content-length: expected a number")
        # A server that takes chunked bodies ends the stream itself, and says so.
        size = int(length) if length else limit + 1 if environ.get("wsgi.input_terminated") else 0
        body: bytes = environ["wsgi.input"].read(min(size, limit + 1))
        if len(body) > limit:
            raise too_large(limit)
        return body


# ----------------------------------------------------------------------------
# 17. Console
#
# The page at / by which an administrator sees why a sync works or fails: HTML,
# style and script in one string, that reads the API of chapter 10.
# Uses nothing.
# ----------------------------------------------------------------------------

CONSOLE_PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>SCIM console</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='-1 -1 2 2'><circle r='1' fill='%2325d'/></svg>">
<style>
:root { color-scheme: light dark; --bg: #f5f6f8; --card: #fff; --hover: #f0f3f8; --ink: #1b2330; --soft: #566174; --line: #e0e4ea;
  --fill: #2f5fd0; --link: #2450b8; --ok: #12683f; --okay: #e4f3ea; --warn: #7a4b00; --warned: #fcf1d8; --bad: #a3211b; --badly: #fce9e7; }
@media (prefers-color-scheme: dark) { :root { --bg: #10141b; --card: #181e27; --hover: #1f2732; --ink: #e7ebf2; --soft: #a2aec0;
  --line: #2b3341; --fill: #3a66cf; --link: #93b4ff; --ok: #83dcab; --okay: #15301f; --warn: #f1c76c; --warned: #332812; --bad: #ffa29a;
  --badly: #3a1b1b; } }
.ok { --tone: var(--ok); --ground: var(--okay); } .warn, .change { --tone: var(--warn); --ground: var(--warned); }
.bad { --tone: var(--bad); --ground: var(--badly); } .pill, .note, .ok .mark, .change { background: var(--ground); }
* { box-sizing: border-box; } html { overflow-y: scroll; } :focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; outline: none; } h2 { font-size: 16px; margin: 0 0 10px; } p { margin: 0 0 12px; }
a { color: var(--link); } code, pre { font: 13px/1.5 ui-monospace, monospace; } ol, ul { list-style: none; margin: 0; padding: 0; }
.soft, .live, .lead, summary time, dt, header span { color: var(--soft); } .soft, .live, .pill, .small, summary time { font-size: 13px; }
header { background: var(--card); border-bottom: 1px solid var(--line); } header span { font-weight: 400; margin-right: 14px; }
header > div, main { max-width: 1280px; margin: 0 auto; padding: 0 20px; } main { padding-top: 28px; padding-bottom: 80px; }
header > div, nav, .bar, .copy, label { display: flex; align-items: center; gap: 10px; } header > div, .bar { flex-wrap: wrap; }
nav { flex: 1; } nav a { padding: 16px 10px 13px; border-bottom: 3px solid transparent; color: var(--soft); text-decoration: none; }
nav a:hover, nav [aria-current] { color: var(--ink); } nav [aria-current] { border-color: var(--fill); }
section, .card, .log { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 18px; min-width: 0; }
section, .card { padding: 18px 20px; } .empty { text-align: center; padding: 48px 20px; } .sign { max-width: 420px; margin: 10vh auto; }
.sign > * { margin-bottom: 12px; } .sign button, [type=search], [type=password] { width: 100%; } .state h2, .why { color: var(--tone); }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); margin: 18px 0; }
.grid > *, .state p, .note p, .steps p, dd { margin: 0; } .state h2::before { content: "●"; margin-right: 7px; }
.copy { justify-content: space-between; } .bar { margin: 0 0 14px; min-height: 38px; }
.bar [type=search] { flex: 1 1 220px; max-width: 420px; } .copy code { user-select: all; }
input, select, button { font: inherit; color: inherit; border: 1px solid var(--soft); border-radius: 7px; background: var(--card);
  padding: 7px 12px; min-height: 38px; } [type=checkbox] { min-height: 0; width: 18px; height: 18px; accent-color: var(--fill); }
::placeholder { color: var(--soft); opacity: 1; } button { cursor: pointer; white-space: nowrap; } button:disabled { opacity: .45; }
button:hover:enabled { background: var(--hover); } .main:enabled { background: var(--fill); border-color: var(--fill); color: #fff; }
.small { padding: 2px 10px; min-height: 28px; } th button { border: 0; padding: 0; min-height: 24px; background: none; font: inherit; }
[aria-sort=ascending] button::after { content: " ↑"; } [aria-sort=descending] button::after { content: " ↓"; }
.log { overflow: hidden; } .log > li + li { border-top: 1px solid var(--line); }
.live { margin-left: auto; min-width: 8em; text-align: end; } .more { padding: 4px 18px 18px; }
summary { display: grid; grid-template-columns: 4.6em minmax(0, 1fr) auto; gap: 2px 14px; padding: 10px 18px; align-items: baseline;
  cursor: pointer; } summary:hover { background: var(--hover); } summary:focus-visible { outline-offset: -3px; }
summary::-webkit-details-marker, [open] .why, .log:empty { display: none; } .why { grid-column: 2 / -1; font-size: 14px; }
.note { border-radius: 8px; padding: 12px 16px; margin: 6px 0 12px; }
.pill { color: var(--tone); border-radius: 20px; padding: 0 9px; white-space: nowrap; }
.note .soft::first-letter, .history b::first-letter { text-transform: uppercase; } .history b, .pill { display: inline-block; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) minmax(0, 1fr); gap: 5px 18px; margin: 0; }
pre { margin: 10px 0 0; padding: 14px; background: var(--bg); border-radius: 8px; overflow: auto; max-height: 560px; }
.mark { flex: none; width: 24px; height: 24px; border-radius: 50%; border: 2px solid var(--line); text-align: center; line-height: 20px; }
.steps li > * { min-width: 0; } .ok .mark { border-color: var(--tone); color: var(--tone); }
.steps li { display: flex; gap: 12px; padding: 8px 0; } .scroll { overflow-x: auto; margin: 0 -20px; padding: 0 20px; }
table { border-collapse: collapse; width: 100%; overflow-wrap: break-word; } .list table { overflow-wrap: anywhere; }
th, td { text-align: left; padding: 9px 14px 9px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { white-space: nowrap; } tbody tr:last-child td { border: 0; } .change { box-shadow: -20px 0 var(--ground), 20px 0 var(--ground); }
@media (max-width: 640px) { header > div { padding: 8px 14px 0; } main { padding: 18px 14px 80px; } header b, .live { flex: 1; }
  nav { order: 3; flex: 1 0 100%; gap: 0; } nav a { padding: 10px 8px 8px; } section, .card, .more { padding: 14px; }
  .more { padding-top: 2px; } summary { grid-template-columns: 4.4em minmax(0, 1fr); padding: 10px 14px; } summary time { grid-column: 2; }
  .scroll { margin: 0 -14px; padding: 0 14px; } thead { display: none; } table { overflow-wrap: anywhere; }
  tr { display: block; padding: 10px 0; border-bottom: 1px solid var(--line); } td { display: flex; gap: 12px; border: 0; padding: 2px 0; }
  td::before { content: attr(data-label); flex: 0 0 104px; color: var(--soft); } td > :not(.pill) { min-width: 0; flex: 1; }
  td:has(> span:empty) { display: none; } }
</style>
<header hidden><div><b>SCIM console <span id="tenant"></span></b><nav aria-label="Sections"></nav>
<button id="out" class="small">Sign out</button></div></header><main></main>
<form class="card sign" hidden><h1>SCIM console</h1><p class="lead">Sign in with the Secret Token of your tenant: the one that Entra ID
 has. It stays in this tab, and what you see is read-only.</p><label for="token">Secret Token</label>
<input type="password" id="token" autocomplete="off" required><button class="main">Sign in</button></form>
<script>
const [ENTERPRISE, FACILIO] = ['enterprise', 'facilio'].map(name => `urn:ietf:params:scim:schemas:extension:${name}:2.0:User`);
const LEVELS = [['ok', '✓', 'done'], ['warn', '!', 'done with a warning'], ['bad', '✕', 'refused']];
const [header, main, form] = document.body.children;
let setup = null, view = new AbortController();        // what the server knows of the tenant; the view on show

// -- Elements: whatever comes from the server becomes text, never HTML --
function h(kind, ...children) {                        // h('p.soft', {title: 'x'}, 'text'): the properties may be left out
  const [tag, ...classes] = kind.split('.'), element = document.createElement(tag);
  const properties = children[0]?.constructor === Object ? children.shift() : {};
  for (const [name, value] of Object.entries(properties)) name in element ? element[name] = value : element.setAttribute(name, value);
  element.classList.add(...classes); element.append(...children.flat(9).filter(Boolean));
  return element;
}
const link = (text, ...way) => h('a', {href: ['#', ...way.map(encodeURIComponent)].join('/')}, text || way.at(-1));
const full = at => new Date(at).toLocaleString('en-GB', {dateStyle: 'medium', timeStyle: 'medium'});
const when = at => h('time', {dateTime: at}, full(at));
const words = value => value === true ? 'Yes' : value === false ? 'No' : String(value ?? '');
const short = names => names.join(', ').replaceAll(FACILIO + ':', '').replaceAll(ENTERPRISE + ':', '');
const pill = (good, text, sign = '!') => h('span.pill.' + (good ? 'ok' : 'warn'), `${good ? '✓' : sign} ${text}`);
const json = value => h('pre', {tabIndex: 0}, JSON.stringify(value, null, 2));
const section = (title, ...content) => h('section', h('h2', title), ...content);
const empty = (title, ...text) => h('div.card.empty', h('h2', title), h('p', ...text));
const pairs = rows => h('dl', rows.filter(([, ...all]) => all.some(Boolean)).map(([name, ...all]) => [h('dt', name), h('dd', all)]));
const table = (heads, body) => h('div.scroll', h('table', h('thead', h('tr', heads)), body));
const titled = titles => titles.map(title => h('th', {scope: 'col'}, title));
const row = (titles, values, kind = 'tr') => h(kind, values.map((value, n) =>
  h('td', {'data-label': titles[n]}, value instanceof Element ? value : h('span', value))));
const copyable = text => h('div.copy', h('code', text), h('button.small', {ariaLabel: 'Copy ' + text, hidden: !navigator.clipboard,
  onclick: ({target}) => { navigator.clipboard.writeText(text); target.textContent = 'Copied'; }}, 'Copy'));
const searchField = (placeholder, load, typing) => h('input', {type: 'search', ariaLabel: placeholder, placeholder,
  oninput: () => { clearTimeout(typing); typing = setTimeout(load, 250); }});

// -- The server: the token goes in a header, and nowhere else --
async function ask(path, signal) {
  const answer = await fetch(path, {signal, headers: {Authorization: 'Bearer ' + sessionStorage.token, 'X-Console': '1'}});
  if (answer.status === 401) signIn('This server does not know the token, or it has expired.');
  if (!answer.ok) throw Error((await answer.json().catch(() => ({}))).detail || 'The server answered ' + answer.status);
  return answer;
}
const get = async (path, parameters) => (await ask(path + '?' + new URLSearchParams(parameters), view.signal)).json();
const getLog = async parameters => (await get('/console/api/log', parameters)).entries;
const getSetup = async () => { setup = await get('/console/api/setup'); };
const download = async (path, name) =>
  h('a', {href: URL.createObjectURL(await (await ask('/console/api/' + path)).blob()), download: name}).click();
async function follow(state, use) {                    // long polls while the view is on show; each failure doubles the pause
  const {signal} = view;
  for (let after = setup.last[0]?.seq || 0, pause = 1000; !signal.aborted;)
    try {
      state.textContent ||= 'Live';
      const [newest] = await getLog({after, wait: 25, count: 100});
      state.textContent = 'Live'; pause = 1000;
      if (newest) { after = newest.seq; await use(); }
    } catch (error) {
      if (signal.aborted) return;
      state.textContent = `No answer, next try in ${pause / 1000} s`;
      await new Promise(wake => setTimeout(wake, pause)); pause = Math.min(2 * pause, 60000);
    }
}

// -- The log --
function entry(call) {
  const [level, sign, meaning] = LEVELS[call.level], [note] = call.notes, place = {User: 'people', Group: 'groups'}[call.type];
  return h('li', h('details.' + level, h('summary', h('span.pill', {title: meaning}, `${sign} ${call.status}`),
    h('span', call.operation, ' ', h('b', call.name)), when(call.at), note && h('span.why', note.text)),
  h('div.more', call.notes.map(one => h('div.note', h('p.soft', one.kind), h('p', one.text),
    h('p', h('b', 'What to do: '), one.remedy))),
  pairs([['About', place && call.subject && link(call.name, place, call.subject)], ['Attributes', short(call.attributes)],
    ['Answer', call.detail], ['Request', h('code', `${call.method} ${call.path}`)],
    ['Token', `${call.token}, from ${call.client || 'an unknown address'}`], ['Took', `${call.milliseconds} ms`],
    ['Request id', call.id]]), call.body && json(call.body))));
}
function health(troubles) {
  const {last: [last], refused, strangers} = setup, unseen = last ? setup.fields.filter(one => !one.people) : [];
  const of = kind => troubles.filter(one => one.seq > last.seq - 100 && one.notes.some(note => note.kind === kind));
  const [lost] = of('connection'), wrong = of('mapping'), first = ([{notes: [note]}]) => note.text;
  const card = (level, title, ...text) => h('div.card.state.' + level, h('h2', title), h('p', text));
  return h('div.grid', card(!last || lost ? 'warn' : 'ok', 'Connection', last ? `Last call on ${full(last.at)}, token “${last.token}”. ` :
    ['Nobody has called yet. Enter the ', link('Tenant URL', 'setup'), ' in Entra ID.'],
  lost && `${lost.notes[0].text} ${lost.notes[0].remedy}`, setup.lost && ` ${setup.lost} calls are missing in the log.`),
  card(refused.length || strangers ? 'warn' : 'ok', 'Authentication', refused.length ?
    `${refused.length} refused since ${full(refused.at(-1).at)}. ${first(refused)}` : strangers ? 'Calls were refused:' :
      'No call was refused.', strangers && ` ${strangers} with an unknown token since ${full(setup.strange_since)}.`),
  card(wrong.length ? LEVELS[wrong[0].level][0] : unseen.length ? 'warn' : 'ok', 'Attribute mapping', wrong.length ?
    `${wrong.length} of the last 100 calls had trouble. ${first(wrong)} ` : last ? 'All that was sent fits. ' : 'Nothing was sent yet. ',
  unseen.length && [link('Custom fields', 'setup'), ` that nobody has: ${unseen.map(one => one.display_name).join(', ')}.`]));
}
async function showLog() {
  const search = searchField('Search names, attributes, answers', load), problems = h('input', {type: 'checkbox', onchange: load});
  const list = h('div'), top = h('div'), state = h('span', {role: 'status'});
  const fresh = h('button.small', {hidden: true, onclick: load}, 'Show new calls');
  const older = h('button', {onclick: async () => list.firstChild.append(...take(await page(oldest)))}, 'Show older calls');
  const page = before => getLog({before, count: 50, level: +problems.checked, text: search.value});
  const take = calls => { oldest = calls.at(-1)?.seq; older.hidden = calls.length < 50; return calls.map(entry); };
  let turn = 0, oldest;
  async function load() {
    const mine = ++turn, [calls, troubles] = await Promise.all([page(0), getLog({level: 1}), getSetup()]);
    if (mine !== turn) return;                         // another search has overtaken this answer
    fresh.hidden = true; top.replaceChildren(health(troubles));
    list.replaceChildren(h('ol.log', take(calls)), calls.length ? '' : problems.checked || search.value ?
      empty('No call fits', 'Clear the search, or look at all calls.') :
      empty('Nobody has called yet', 'As soon as Entra ID sends something it appears here, with what came of it. Go to ',
        link('Set-up', 'setup'), ' for what to enter there.'));
  }
  await load(); follow(state, () => scrollY < 200 && !list.querySelector('[open]') ? load() : fresh.hidden = false);
  return ['Provisioning log', 'What identity providers asked for, what came of it, and what to do where it failed.', top,
    h('div.bar', search, h('label', problems, 'Problems only'), h('span.live', fresh, ' ', state)), list, older];
}

// -- Set-up --
async function testConnection(result) {                // what Entra's button does: look for somebody who is not there
  const look = (endpoint, name) => get('/scim/v2/' + endpoint, {filter: `${name} eq "${Math.random()}"`}).then(
    found => [!found.totalResults, `${endpoint}: the filter was understood and found nobody, as it should.`],
    error => [false, `${endpoint}: ${error.message}`]);
  const lines = await Promise.all([look('Users', 'userName'), look('Groups', 'displayName')]);
  if (!setup.url.startsWith(location.origin + '/')) lines.push([false, `This page is at ${location.origin}, but the server takes ` +
    `itself for ${setup.url}: let the proxy keep the Host header, or trust it (trusted_proxies).`]);
  if (location.protocol !== 'https:')
    lines.push([false, 'This page came by http. Entra ID calls by https only, on a public name: put TLS in front.']);
  result.replaceChildren(...lines.map(([good, text]) => h('p', pill(good, ''), ' ', text)));
}
async function showSetup() {
  const steps = h('ol.steps'), fields = h('tbody'), result = h('div', {role: 'status'}), state = h('span.soft', {role: 'status'});
  const targets = ['Source', 'Target', 'Type', 'Change'], names = ['Field', 'Type', 'Name in Entra', 'Arrived'];
  async function load() {
    await getSetup();
    steps.replaceChildren(...setup.steps.map(one => h(one.at ? 'li.ok' : 'li', h('span.mark', {ariaHidden: 'true'}, one.at && '✓'),
      h('div', h('b', one.title), h('p.soft', one.at ? 'Done: first on ' + full(one.at) : one.hint)))));
    fields.replaceChildren(...setup.fields.map(one => row(names, [one.display_name, one.type, copyable(one.urn),
      one.people ? pill(true, `${one.people} people`) : pill(false, 'nobody has it')])));
  }
  await load(); follow(state, load);
  return ['Set-up', 'What to enter in the Entra admin center, and what has arrived from there so far.', h('div.grid',
    section('Connection', h('p.soft', 'Enterprise application → Provisioning → Automatic → Tenant URL'), copyable(setup.url), h('p'),
      h('p.soft', 'Secret Token: the secret of one of these tokens, which only you have'), pairs(setup.tokens.map(one => [one.name,
        one.expired && h('span.pill.bad', '✕ expired'), one.expires && ` ${one.expired ? 'on' : 'expires'} ${full(one.expires)}; `,
        one.last_use ? `last used on ${full(one.last_use)}` : 'never used'])), h('p'),
      h('button.main', {onclick: () => testConnection(result)}, 'Test Connection'), h('p'), result),
    section(['Check list ', state], steps)),
  section('Attribute mapping', h('p.soft', 'Mappings → Provision Microsoft Entra ID Users: from the source in Entra ID to the ' +
    'target in customappsso. Highlighted is what differs from Entra\'s proposal.'), table(titled(targets), h('tbody',
    setup.mapping.map(([source, target, type, change]) => row(targets, [source || '(your choice)', h('code', target), type, change],
      change ? 'tr.change' : 'tr')))), h('p'),
  h('button', {onclick: () => download('mapping', 'mapping.csv')}, 'Download as CSV')),
  section('Custom fields', setup.fields.length ? [h('p.soft', 'Show advanced options → Edit attribute list for customappsso: ' +
    'add these names with these types, then map to them.'), table(titled(names), fields)] : h('p.soft', 'This tenant has none. ' +
    'They are “custom_fields” of the tenant in the configuration.'), h('p'),
  h('button', {onclick: () => download('schema', 'customappsso.json')}, 'Download the schema as JSON'))];
}

// -- Employees and groups: the server filters, sorts and pages --
const mail = user => (user.emails?.find(one => one.primary) || user.emails?.find(one => one.type === 'work'))?.value;
const SEARCHED = {Users: ['displayName', 'userName', 'emails.value', 'title'], Groups: ['displayName', 'externalId']};
const COLUMNS = {                                      // title, what it sorts by, what it shows of a resource
  Users: () => [['Name', 'displayName', one => link(one.displayName || one.userName, 'people', one.id)],
    ['E-mail', 'emails.value', one => mail(one) || one.userName], ['Designation', 'title', one => one.title || ''],
    ...setup.fields.map(field => [field.display_name, field.urn, one => words(one[FACILIO]?.[field.link_name])]),
    ['Active', 'active', one => one.active ? pill(true, 'Active') : pill(false, 'Inactive', '–')]],
  Groups: () => [['Name', 'displayName', one => link(one.displayName, 'groups', one.id)],
    ['External id', 'externalId', one => one.externalId || ''], ['Changed', 'meta.lastModified', one => when(one.meta.lastModified)]],
};
async function listing(endpoint, none, base) {
  const columns = COLUMNS[endpoint](), titles = columns.map(([title]) => title), search = searchField('Search', () => load(1));
  const state = h('select', {onchange: () => load(1)}, [['', 'All'], ['active eq true', 'Active'], ['active eq false', 'Inactive']]
    .map(([value, text]) => h('option', {value}, text)));
  const lacking = h('div'), body = h('tbody'), count = h('span.soft', {role: 'status'});
  let start, sort = 'displayName', order = 'ascending', turn = 0;
  const back = h('button', {onclick: () => load(start - 25)}, 'Previous'), next = h('button', {onclick: () => load(start + 25)}, 'Next');
  const sortBy = path => { [sort, order] = [path, sort === path && order === 'ascending' ? 'descending' : 'ascending']; load(1); };
  const heads = titled(columns.map(([title, path]) => h('button', {onclick: () => sortBy(path)}, title)));
  const card = h('div.card.list', table(heads, body));
  async function load(from) {
    const text = search.value.trim(), mine = ++turn, word = JSON.stringify(text);
    const terms = [base, state.value, text && `(${SEARCHED[endpoint].map(name => `${name} co ${word}`).join(' or ')})`];
    start = Math.max(1, from);
    const {Resources: found, totalResults: total} = await get('/scim/v2/' + endpoint, {startIndex: start, count: 25, sortBy: sort,
      sortOrder: order, excludedAttributes: 'members', filter: terms.filter(Boolean).join(' and ')});
    if (mine !== turn) return;                         // another search has overtaken this answer
    columns.forEach(([, path], n) => { heads[n].ariaSort = path === sort ? order : 'none'; });
    body.replaceChildren(...found.map(one => row(titles, columns.map(([, , show]) => show(one)))));
    card.hidden = !total;
    lacking.replaceChildren(total ? '' : state.value || text ? empty('Nothing fits', 'Try another word, or show all.') : none);
    count.textContent = total ? `${start}–${start + found.length - 1} of ${total}` : ''; back.hidden = next.hidden = total <= 25;
    [back.disabled, next.disabled] = [start < 2, start + 25 > total];
  }
  await load(1);
  return [h('div.bar', search, endpoint === 'Users' && h('label', 'Show', state)), lacking, card, h('div.bar', back, next, count)];
}
const showPeople = async () => ['Employees', 'People as they were provisioned; each is an employee of Facilio.', ...await listing(
  'Users', empty('Nobody is here yet', 'People appear with the first cycle of Entra ID. ', link('See how far it is', 'setup'), '.'))];
const showGroups = async () => ['Groups', 'Groups as they were provisioned.', ...await listing('Groups', empty('No groups yet',
  'Assign a group to the application in Entra ID, and leave “Provision Microsoft Entra ID Groups” on.'))];
async function about(endpoint, id) {                   // a resource, its employee if it has one, and what both kinds show of it
  const [{Resources: [resource]}, {changes, employee}, calls] = await Promise.all([
    get('/scim/v2/' + endpoint, {filter: `id eq ${JSON.stringify(id)}`, excludedAttributes: 'members'}),
    get('/console/api/history/' + encodeURIComponent(id)), getLog({subject: id, count: 20})]);
  const history = changes.map(one => h('li', h('div', h('b', one.kind.replace('.', ' ')), one.member && [': ', one.id === id ?
    link('this person', 'people', one.member) : link('this group', 'groups', one.id)], h('p.soft', full(one.at),
    one.token && ` by “${one.token}”`, one.attributes.length && ': ' + short(one.attributes)))));
  return [resource, employee, h('div.grid', section('History', history.length ? h('ol.steps.history', history) : 'None is left.'),
    section('SCIM resource', resource ? json(resource) : 'It was deleted; the employee stays.')), h('h2', 'Calls'),
  calls.length ? h('ol.log', calls.map(entry)) : empty('No calls', 'The log holds none about it.')];
}
async function showPerson(id) {
  const [resource, employee, ...rest] = await about('Users', id), boss = resource?.[ENTERPRISE]?.manager;
  if (!employee) return ['Nobody here', 'No employee has this id.', link('All employees', 'people')];
  const manager = boss && (boss.displayName || (employee.manager ? `employee ${employee.manager}` : 'not known here yet'));
  return [employee.name, [link('Employees', 'people'), ` / employee ${employee.id}`], h('div.grid', section('Employee', pairs([
    ['Active', words(employee.active)], ['E-mail', employee.email], ['Designation', employee.designation],
    ['Department', employee.department], ['Phone', employee.phone], ['Mobile', employee.mobile], ['Number', employee.employeeNumber],
    ['Manager', boss && link(manager, 'people', boss.value)], ['Language', employee.language], ['Changed', when(employee.changed)],
    ['External id', employee.external_id]])),
  section('Custom fields', setup.fields.length ? pairs(setup.fields.map(one => [one.display_name,
    words(employee.custom_fields[one.link_name]) || h('span.soft', 'not sent')])) : 'None', h('p'), h('h2', 'Groups'),
  resource?.groups ? h('ul', resource.groups.map(one => h('li', link(one.display, 'groups', one.value)))) : 'None')), ...rest];
}
async function showGroup(id) {
  const [resource, , ...rest] = await about('Groups', id), none = empty('No members', 'Assign people to this group in Entra ID.');
  return [resource?.displayName || 'A group that was deleted', link('Groups', 'groups'), h('p'), h('h2', 'Members'),
    ...await listing('Users', none, `groups.value eq ${JSON.stringify(id)}`), ...rest];
}

// -- Sign in, and the way from view to view --
const SECTIONS = {log: ['Log', showLog], setup: ['Set-up', showSetup], people: ['Employees', showPeople, showPerson],
  groups: ['Groups', showGroups, showGroup]};
const alarm = problem => h('div.bad', {role: 'alert'}, h('p.note', problem));
function signIn(...problems) {
  delete sessionStorage.token; setup = null; view.abort();
  header.hidden = true; form.hidden = false; form.token.value = '';
  main.replaceChildren(...problems.map(alarm), form); form.token.focus();
}
form.onsubmit = event => { event.preventDefault(); sessionStorage.token = form.token.value.trim(); show(); };
async function show(event) {
  view.abort();
  const {signal} = view = new AbortController(), [name, id] = location.hash.slice(2).split('/').map(decodeURIComponent);
  const chosen = SECTIONS[name] ? name : 'log', [, all, one] = SECTIONS[chosen];
  if (!sessionStorage.token) return signIn();
  const failed = error => ['That did not work', error.message, h('button', {onclick: show}, 'Try again')];
  const [title, lead, ...rest] = await Promise.resolve(setup || getSetup()).then(() => (id && one || all)(id)).catch(failed);
  if (signal.aborted) return;
  header.hidden = false; document.title = `${title} – SCIM console`;
  document.querySelector('#tenant').textContent = setup?.tenant || '';
  document.querySelector('nav').replaceChildren(...Object.entries(SECTIONS).map(([section, [text]]) =>
    h('a', {href: '#/' + section, ...section === chosen && {ariaCurrent: 'page'}}, text)));
  main.replaceChildren(h('h1', {tabIndex: -1}, title), h('p.lead', lead), ...rest.filter(Boolean));
  if (event?.type === 'hashchange') { scrollTo(0, 0); main.firstChild.focus(); }
}
function enter(event) {
  const [, given] = location.hash.match(/^#token=(.+)$/) || [];   // of the link that the server prints
  if (given) { sessionStorage.token = decodeURIComponent(given); setup = null; }
  if (given || !location.hash) history.replaceState(null, '', '#/log');
  return show(event);
}
document.querySelector('#out').onclick = () => signIn();
addEventListener('unhandledrejection', event => {      // of a button or a search; where the view has gone, nobody cares
  event.preventDefault();
  if (!view.signal.aborted && event.reason.name !== 'AbortError') main.prepend(alarm(event.reason.message));
});
addEventListener('hashchange', enter); enter();
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
    listener: Listener,
    seen: Stamp,
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


def supervise(options: argparse.Namespace, config: Config, listener: Listener, told: str) -> None:
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
    listener: Listener,
    seen: Stamp,
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


def follow_file(options: argparse.Namespace, server: ScimServer, seen: Stamp) -> None:
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
