"""Tests of scim_server, in the order of its chapters: real HTTP, real SQLite files."""

from __future__ import annotations

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


# -- The file itself ---------------------------------------------------------------
