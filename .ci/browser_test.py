"""Test the console in a real browser: Debian's chromium, controlled through chromedriver.

Usage: browser_test.py [DIRECTORY FOR SCREENSHOTS]. The exit status is 0 if all checks pass;
otherwise the error names the problem. Uses the standard library only. The environment variables
CHROMIUM and CHROMEDRIVER may name other programs.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FACILIO = "urn:ietf:params:scim:schemas:extension:facilio:2.0:User"
ENTERPRISE = "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User"
XSS = "<img src=x onerror=window.pwned=1><script>window.pwned=1</script>"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

CONTRAST = """
const rgb = color => color.match(/[\\d.]+/g).map(Number);
const linear = channel => channel <= .04045 ? channel / 12.92 : ((channel + .055) / 1.055) ** 2.4;
const luminance = color => color.slice(0, 3).map(channel => linear(channel / 255))
  .reduce((sum, channel, index) => sum + channel * [.2126, .7152, .0722][index], 0);
const background = node => {
  const color = node ? rgb(getComputedStyle(node).backgroundColor) : [255, 255, 255];
  return color.length < 4 || color[3] ? color : background(node.parentElement); };
const contrast = node => {
  const colors = [rgb(getComputedStyle(node).color), background(node)];
  const [lighter, darker] = colors.map(luminance).sort((a, b) => b - a);
  return (lighter + .05) / (darker + .05); };
"""
# Returns whether the pointer is over a button, and the contrast of its text.
HOVERED = CONTRAST + "return [arguments[0].matches(':hover'), contrast(arguments[0])];"
# Returns the elements whose text has a contrast below 4.5 to its background (WCAG 2.2 AA).
LOW_CONTRAST = (
    CONTRAST
    + """
const hasText = node =>
  [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
return [...document.querySelectorAll('body *')]
  .filter(node => node.checkVisibility() && !node.disabled && hasText(node) && contrast(node) < 4.5)
  .map(node => node.outerHTML.slice(0, 120));
"""
)
# Returns the cumulative layout shift of the page, without the shifts that follow an input.
LAYOUT_SHIFT = """
return new Promise(resolve => {
  let sum = 0;
  const add = shift => { if (!shift.hadRecentInput) sum += shift.value; };
  new PerformanceObserver(list => list.getEntries().forEach(add))
    .observe({type: 'layout-shift', buffered: true});
  setTimeout(() => resolve(sum), 0); });
"""
# Returns the top of the first row of the log, its height and the number of rows in the window.
LOG_ROWS = """
const rows = [...document.querySelectorAll('.log summary')].map(row => row.getBoundingClientRect());
return [rows[0].top, rows[0].height, rows.filter(row => row.bottom <= innerHeight).length];
"""
ENTER, TAB, DOWN, UP = "\ue007", "\ue004", "\ue015", "\ue013"


def send(method: str, url: str, body: Any = None, token: str = "") -> Any:
    """Return the JSON body of a response, whatever its status."""
    request = urllib.request.Request(
        url,
        method=method,
        headers={"Content-Type": "application/json"},
        data=None if body is None else json.dumps(body).encode(),
    )
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        return json.loads(error.read() or b"null")


@contextmanager
def running(*command: str, ready: str) -> Iterator[str]:
    """Run a program until the block ends; yield the first group of the line that matches ready."""
    # chromedriver fails if the port that it picks for IPv4 is in use for IPv6, or the reverse.
    for _ in range(3):
        program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            for line in program.stdout or ():
                if match := re.search(ready, line):
                    yield match[1]
                    return
        finally:
            program.terminate()
            program.wait()
    raise RuntimeError(f"{command[0]} ended before it was ready")


class Browser:
    """A tab of a headless chromium."""

    def __init__(self, driver: str, profile: str) -> None:
        options = {
            "args": [*FLAGS, f"--user-data-dir={profile}"],
            **({"binary": os.environ["CHROMIUM"]} if "CHROMIUM" in os.environ else {}),
        }
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        body = {"capabilities": {"alwaysMatch": capabilities}}
        session = send("POST", f"{driver}/session", body)["value"]
        if "sessionId" not in session:
            raise RuntimeError(session.get("message"))
        self.url = f"{driver}/session/{session['sessionId']}"

    def do(self, command: str, **parameters: Any) -> Any:
        """Send a command of the WebDriver protocol and return its value."""
        value = send("POST", f"{self.url}/{command}", parameters)["value"]
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(value["message"])
        return value

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a JavaScript function body and return its result."""
        return self.do("execute/sync", script=script, args=list(arguments))

    def devtools(self, command: str, **parameters: Any) -> None:
        """Send a command of the DevTools protocol."""
        self.do("goog/cdp/execute", cmd=command, params=parameters)

    def wait_for(self, expression: str, *arguments: Any) -> Any:
        """Return the value of a JavaScript expression as soon as it is true."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if value := self.run(f"return {expression}", *arguments):
                return value
            time.sleep(0.05)
        raise AssertionError(
            f"never true: {expression} {arguments}; the page shows: "
            + self.run("return document.body.innerText")
        )

    def press(self, *keys: str) -> None:
        """Press keys one after the other in the focused element."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.do("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def hover(self, element: Any) -> None:
        """Move the pointer over an element."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        move = {"type": "pointerMove", "x": 0, "y": 0, "origin": element}
        self.do("actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def emulate(self, width: int, theme: str, height: int = 900) -> None:
        """Set the size of the window and the colour theme, with reduced motion."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.devtools(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": theme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )


def provision(base: str, token: str) -> str:
    """Send good and bad calls like an identity provider, with a script in every text.

    Return the id of the user whose texts are scripts.
    """

    def scim(method: str, path: str, body: Any = None) -> Any:
        return send(method, f"{base}/scim/v2{path}", body, token)

    names = [
        "Ada Lovelace",
        "Noor Haddad",
        "Tomas Wirth",
        "Mei Tanaka",
        "Lars Holm",
        "Ines Duarte",
    ] * 5
    user_ids = [
        scim(
            "POST",
            "/Users",
            {
                "userName": (mail := f"{name.split()[0].lower()}.{number}@bw.example"),
                "displayName": name,
                "externalId": f"5b0c7f7e-0001-4000-8000-{number:012}",
                "title": "Lift Inspector",
                "emails": [{"type": "work", "primary": True, "value": mail}],
                "active": number % 7 > 0,
                FACILIO: {
                    "costcode": f"C-{number}",
                    "badge_number": number,
                    "is_contractor": number % 2 > 0,
                },
                ENTERPRISE: {"department": "Lifts"},
            },
        )["id"]
        for number, name in enumerate(names)
    ]
    user_id = scim(
        "POST",
        "/Users",
        {
            "userName": XSS,
            "displayName": XSS,
            "title": XSS,
            "externalId": XSS,
            "emails": [{"type": "work", "value": XSS}],
            "phoneNumbers": [{"type": "work", "value": XSS}],
            FACILIO: {"costcode": XSS},
            ENTERPRISE: {"department": XSS, "manager": {"value": user_ids[0]}},
        },
    )["id"]
    group = {"displayName": f"Night Crew {XSS}", "externalId": XSS}
    group_id = scim("POST", "/Groups", group)["id"]
    members = [{"value": id} for id in (*user_ids[:3], user_id, XSS)]
    operation = {"op": "add", "path": "members", "value": members}
    scim("PATCH", f"/Groups/{group_id}", {"Operations": [operation]})
    scim("GET", "/Users?filter=userName+eq+%22ada%22")
    for operation in (
        {"op": "replace", "path": "title", "value": "Chief"},
        {"op": "replace", "path": "active", "value": "False"},
        {"op": "add", "path": f"{FACILIO}:badge_number", "value": XSS},
        {"op": "add", "path": f"{FACILIO}:costcoed", "value": "C-7"},
    ):
        scim("PATCH", f"/Users/{user_id}", {"Operations": [operation]})
    return str(user_id)


def configuration_file(folder: str) -> str:
    """Return a copy of the sample configuration in which acme has a client that ends in days."""
    document = json.loads((ROOT / "sample_config.json").read_text())
    end = datetime.now(timezone.utc) + timedelta(days=5, hours=1)
    client = {"id": "entra-1", "secret": "client-secret", "expires": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
    document["tenants"][0]["clients"] = [client]
    document["tenants"][0]["roles"] = {f"Night Crew {XSS}": "Technician"}
    file = Path(folder, "config.json")
    file.write_text(json.dumps(document))
    return str(file)


def wait_for_view(browser: Browser, text: str) -> None:
    """Wait until the page has a heading."""
    browser.wait_for("document.querySelector('main h1')?.innerText === arguments[0]", text)


def open_view(browser: Browser, base: str, fragment: str, title: str) -> None:
    """Load a view of the page anew and wait until it shows its title."""
    browser.do("url", url=f"{base}/#/{fragment}")
    browser.do("refresh")
    wait_for_view(browser, title)


def text_of(browser: Browser, selector: str) -> str:
    """Return the visible text of an element."""
    return str(browser.run("return document.querySelector(arguments[0]).innerText", selector))


def take_screenshot(browser: Browser, name: str, screenshots: Path | None) -> None:
    """Save a screenshot of the whole page if there is a directory for it."""
    if screenshots:
        width, height = browser.run("return [innerWidth, document.documentElement.scrollHeight]")
        browser.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=min(height, 2400),
            deviceScaleFactor=1,
            mobile=False,
        )
        image = send("GET", f"{browser.url}/screenshot")["value"]
        (screenshots / f"{name}.png").write_bytes(base64.b64decode(image))


def check_buttons(browser: Browser, where: str) -> None:
    """The text of each button is readable while the pointer is over it."""
    visible = "[...document.querySelectorAll('button')].filter(button => button.checkVisibility())"
    for button in browser.run(f"return {visible}.filter(button => !button.disabled)"):
        browser.hover(button)
        is_hovered, contrast = browser.run(HOVERED, button)
        text = browser.run("return arguments[0].outerHTML", button)
        assert is_hovered and contrast >= 4.5, f"{where}: {contrast} of {text}"


def check_empty(browser: Browser, link: str, screenshots: Path | None) -> None:
    """Without calls every view says what to do next, and Test Connection marks no step as done."""
    browser.emulate(1600, "light")
    browser.do("url", url=link)
    for view, title, text in (
        ("log", "Provisioning log", "No calls yet"),
        ("people", "Employees", "No employees yet"),
        ("groups", "Groups", "No groups yet"),
        ("setup", "Set-up", "none with a value"),
    ):
        browser.run("location.hash = arguments[0]", f"#/{view}")
        wait_for_view(browser, title)
        assert text in browser.run("return document.querySelector('main').innerText")
        if view == "setup":
            browser.run("document.querySelector('button.primary').click()")
            browser.wait_for("document.body.innerText.includes('Groups: the filter works')")
            open_steps = "return document.querySelectorAll('.steps > li:not(.ok)').length"
            assert browser.run(open_steps) == 5
            page = browser.run("return document.querySelector('main').innerText")
            assert "/oauth2/token" in page and "None yet" not in page, page
        banner = browser.run("return document.querySelector('main > .note.warn').innerText")
        assert "The client “entra-1” expires on" in banner, banner
        take_screenshot(browser, f"empty-{view}", screenshots)
    browser.run("document.querySelector('header button').click()")
    wait_for_view(browser, "SCIM console")
    take_screenshot(browser, "sign-in", screenshots)
    for theme in ("light", "dark"):
        browser.emulate(1600, theme)
        check_buttons(browser, f"sign-in in {theme}")


def check_sign_in(browser: Browser, link: str, base: str) -> None:
    """The printed link signs in and the token leaves the address; the form works by keyboard."""
    browser.do("url", url=link)
    wait_for_view(browser, "Provisioning log")
    assert browser.run("return location.href") == f"{base}/#/log"
    browser.run("document.querySelector('header button').click()")
    wait_for_view(browser, "SCIM console")
    assert browser.run("return sessionStorage.length") == 0
    browser.press(*link.partition("#token=")[2], ENTER)
    wait_for_view(browser, "Provisioning log")
    # A filter can be reached by keyboard, and its focus is visible.
    for _ in range(30):
        browser.press(TAB)
        if browser.run("return document.activeElement.ariaLabel") == "Outcome":
            break
    assert browser.run("return document.activeElement.matches(':focus-visible')")
    browser.press("P")
    browser.wait_for(
        "document.querySelectorAll('.log > li').length && "
        "!document.querySelector('.log details.ok')"
    )


def check_problem(browser: Browser, user_id: str) -> None:
    """A failed mapping is explained; it links to the employee, whose scripts are shown as text."""
    browser.run("document.querySelectorAll('.log details').forEach(entry => entry.open = true)")
    text = browser.wait_for(
        "[...document.querySelectorAll('.log details.bad')].map(entry => entry.innerText)"
        ".find(text => text.includes('costcoed'))"
    )
    assert "did you mean “costcode”?" in text and "What to do:" in text, text
    assert "takes a whole number" in browser.run("return document.body.innerText")
    browser.run("document.querySelector('.log details.bad a[href*=people]').click()")
    wait_for_view(browser, XSS)
    assert browser.run("return location.hash") == f"#/people/{user_id}"
    page = browser.run("return document.body.innerText")
    assert page.count(XSS) > 5 and "Added to Night Crew" in page, page


def check_views(browser: Browser, base: str, user_id: str, screenshots: Path | None) -> None:
    """Every view fits both widths, is readable in both themes, and runs no script in a text."""
    group_id = browser.run("""
        const headers = {Authorization: 'Bearer ' + sessionStorage.token};
        return fetch('/scim/v2/Groups', {headers}).then(response => response.json())
            .then(page => page.Resources[0].id)""")
    titles = {
        "log": "Provisioning log",
        "setup": "Set-up",
        "people": "Employees",
        "groups": "Groups",
        f"people/{user_id}": XSS,
        f"groups/{group_id}": f"Night Crew {XSS}",
    }
    for width in (360, 1600):
        for theme in ("light", "dark"):
            browser.emulate(width, theme)
            for view, title in titles.items():
                browser.do("url", url=f"{base}/#/{view}")
                browser.do("refresh")
                wait_for_view(browser, title)
                where = f"{view} at {width} in {theme}"
                assert (shift := browser.run(LAYOUT_SHIFT)) < 0.1, f"{where}: shifts by {shift}"
                if view == "log":
                    browser.run("document.querySelector('.log details.bad').open = true")
                if width == 1600:
                    check_buttons(browser, f"{view} in {theme}")
                take_screenshot(
                    browser,
                    f"{view.partition('/')[0]}{'-details' * ('/' in view)}-{width}-{theme}",
                    screenshots,
                )
                browser.emulate(width, theme)
                page_width = browser.run("return document.documentElement.scrollWidth")
                assert page_width <= width, f"{where}: {page_width} pixels wide"
                assert (elements := browser.run(LOW_CONTRAST)) == [], f"{where}: {elements}"
                assert not browser.run(
                    "return window.pwned || document.querySelector('main img')"
                ), where


def check_log(browser: Browser, base: str, width: int, theme: str) -> None:
    """The log shows enough rows; open problems come first, and each of them selects its calls."""
    browser.emulate(width, theme, 640 if width < 640 else 1000)
    open_view(browser, base, "log", "Provisioning log")
    top, height, rows = browser.run(LOG_ROWS)
    if width < 640:
        assert top + height < 640 and height < 60, f"the first row is at {top}, {height} high"
        browser.run("document.querySelector('.causes').open = true")
        browser.run("document.querySelector('.toggle').click()")
    else:
        assert rows >= 16, f"{rows} rows at 1600 x 1000"
    low_contrast = browser.run(LOW_CONTRAST)
    assert low_contrast == [], low_contrast
    title = browser.run("return document.querySelector('.log time').title")
    assert re.search(r"\d:\d\d:\d\d (UTC|GMT|[A-Z]+T)", title), title
    assert browser.run("return document.querySelectorAll('.log > .day').length") == 1
    assert "1 person: the expression for active is still Switch(…)" in text_of(browser, ".causes")
    browser.run(
        "[...document.querySelectorAll('.causes a')]"
        ".find(link => link.innerText.includes('expression for active')).click()"
    )
    browser.wait_for("document.querySelectorAll('.log details').length === 1")
    assert "Deactivate user" in text_of(browser, ".log") and "Problem:" in text_of(browser, "main")
    page_width = browser.run("return document.documentElement.scrollWidth")
    assert page_width <= width, f"{page_width} pixels wide at {width}"


def check_call(browser: Browser, base: str) -> None:
    """A call has its changes; it can be copied as link, as curl and without personal data."""
    browser.emulate(1600, "light")
    open_view(browser, base, "log?action=update&level=0&status=200", "Provisioning log")
    browser.wait_for("document.querySelectorAll('.log details').length === 1")
    assert f"title: {XSS} → Chief" in text_of(browser, ".log")
    browser.run("navigator.clipboard.writeText = text => { window.copied = text; }")
    browser.run("document.querySelector('.log summary').click()")
    browser.wait_for("location.hash.includes('open=')")

    def copied(title: str) -> str:
        script = (
            "[...document.querySelectorAll('.log button')]"
            ".find(button => button.innerText === arguments[0]).click(); return window.copied"
        )
        return str(browser.run(script, title))

    texts = browser.run("""
        return get('/console/api/log', {count: 1000})
          .then(({entries}) => entries.map(supportText).join('\\n') + entries.map(curlCommand))""")
    support_text, _, curl_text = texts.partition("curl ")
    personal = [XSS, "Ada", "Lovelace", "bw.example", "127.0.0.1", "5b0c7f7e", "Night Crew"]
    assert support_text.count("Status: ") > 30
    assert not [text for text in personal if text in support_text], support_text
    assert "sample-secret" not in curl_text and curl_text.count("Bearer $SECRET_TOKEN") > 30
    link, curl, support = map(copied, ("Copy link", "Copy as curl", "Copy for support"))
    assert curl.startswith("curl --globoff -X PATCH 'http") and '"Authorization: Bearer $' in curl
    assert "sample-secret" not in curl and "-d @body.json" in curl, curl
    assert "Path: /scim/v2/Users/…" in support and "Attributes: title" in support, support
    names = (XSS, "Chief", "127.0.0.1", curl.split("/Users/")[1][:36])
    assert not any(name in support for name in names), support
    browser.do("url", url=link)
    browser.do("refresh")
    browser.wait_for("document.querySelector('.log [open]')")
    assert "title:" in text_of(browser, ".log [open]")


def check_export(browser: Browser, base: str) -> None:
    """The calls that the filters select are exported as CSV and JSON."""
    open_view(browser, base, "log?level=1", "Provisioning log")
    browser.run(
        "URL.createObjectURL = blob => { window.file = blob.text(); return '#/log?level=1'; }"
    )
    for format in ("CSV", "JSON"):
        browser.run("delete window.file")
        browser.run(
            "[...document.querySelectorAll('.filters button')]"
            ".find(button => button.innerText === arguments[0]).click()",
            format,
        )
        browser.wait_for("window.file")
        text = browser.run("return window.file")
        if format == "CSV":
            header, *lines = text.split("\r\n")[:-1]
            assert header.startswith('"time","action","name"') and len(lines) == 5, text
        else:
            assert len(json.loads(text)) == 5, text


def check_keyboard(browser: Browser, base: str) -> None:
    """The skip link comes first, / leads to the search, and arrow keys go through the rows."""
    open_view(browser, base, "log", "Provisioning log")
    browser.press(TAB)
    assert browser.run("return document.activeElement.className") == "skip"
    browser.press(ENTER)
    assert browser.run("return document.activeElement.localName") == "main"
    browser.press("/")
    assert browser.run("return document.activeElement.type") == "search"
    browser.press(DOWN, DOWN)
    row = "return [...document.querySelectorAll('.log summary')].indexOf(document.activeElement)"
    assert browser.run(row) == 1
    browser.press(UP, ENTER)
    assert browser.run(row) == 0
    browser.wait_for("location.hash.includes('open=')")
    browser.press(UP, *"costcoed")
    browser.wait_for("document.querySelectorAll('.log details').length === 1")
    browser.run("location.hash = '#/people'")
    wait_for_view(browser, "Employees")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "none"  # the heading has the focus, and no ring
    browser.press("/", DOWN, ENTER)
    browser.wait_for("location.hash.startsWith('#/people/')")


def check_addresses(browser: Browser, base: str) -> None:
    """The address has what a view shows: a link opens it, Back and reload restore it."""
    browser.do("url", url=f"{base}/#/people?text=ada&sort=designation&order=descending")
    browser.do("refresh")
    wait_for_view(browser, "Employees")
    browser.wait_for("document.querySelector('[type=search]').value === 'ada'")
    browser.wait_for(
        "document.querySelector('[aria-sort=descending]')?.innerText === 'Designation'"
    )
    rows = "document.querySelectorAll('tbody tr').length"
    browser.wait_for(f"{rows} === 5")
    browser.run("document.querySelector('[type=search]').select()")
    browser.press(*"noor")
    browser.wait_for("location.hash.includes('text=noor')")
    browser.run("document.querySelector('select').value = 'inactive'")
    browser.run("document.querySelector('select').dispatchEvent(new Event('change'))")
    browser.wait_for(f"location.hash.includes('state=inactive') && {rows} === 1")
    browser.run("history.back()")
    browser.wait_for(f"{rows} === 5 && document.querySelector('select').value === ''")
    browser.run("history.forward()")
    browser.wait_for(f"{rows} === 1 && document.querySelector('[type=search]').value === 'noor'")
    for path in ("constructor", "%", "log?open=x"):
        browser.run("location.hash = arguments[0]", f"#/{path}")
        wait_for_view(browser, "Provisioning log")


def check_people(browser: Browser, base: str, token: str) -> None:
    """Employees who left are listed and searched; a person's history has names, old and new values."""

    def scim(method: str, path: str, body: Any = None) -> Any:
        return send(method, f"{base}/scim/v2{path}", body, token)

    users = scim("GET", "/Users?count=3")["Resources"]
    ada, noor, tomas = (user["id"] for user in users)
    scim("DELETE", f"/Users/{ada}")
    badge = f"{FACILIO}:badge_number"
    for path, value in (("title", "Chief"), (f"{ENTERPRISE}:manager", tomas), (badge, "A7")):
        operation = {"op": "replace", "path": path, "value": value}
        scim("PATCH", f"/Users/{noor}", {"Operations": [operation]})
    # Options of the address, text of the first row, number of rows.
    for options, text, count in (
        ("state=left", "Left", 1),
        ("text=ada.0&state=left", "Ada Lovelace", 1),
        ("text=lifts&state=inactive", "Lars Holm", 4),
        ("text=C-29", "Ines Duarte", 1),
        ("sort=custom_fields.badge_number&order=descending", "Ines Duarte", 25),
        ("page=26", "Noor Haddad", 6),
    ):
        browser.do("url", url=f"{base}/#/people?{options}")
        browser.wait_for(
            "document.querySelectorAll('tbody tr').length === arguments[1] && "
            "document.querySelector('tbody tr').innerText.includes(arguments[0])",
            text,
            count,
        )
    browser.emulate(360, "light")  # where the table has no heads to sort by
    field = browser.run("return document.querySelector('.narrow select')")
    browser.run("arguments[0].value = 'email descending'; arguments[0].onchange()", field)
    browser.wait_for("document.querySelector('tbody tr').innerText.includes('tomas.8@')")
    assert browser.run("return arguments[0].checkVisibility()", field)
    browser.do("url", url=f"{base}/#/people/{noor}")
    wait_for_view(browser, "Noor Haddad")
    problem = text_of(browser, "main h1 ~ .note.bad")
    assert '“badge_number” takes a whole number, but "A7" was sent' in problem, problem
    history = text_of(browser, ".history")
    assert "title: Lift Inspector → Chief" in history, history
    assert "manager: Tomas Wirth" in history and "Added to Night Crew" in history, history
    assert "roles: Technician" in history and "Technician" in text_of(browser, "section"), history
    browser.do("url", url=f"{base}/#/people/{ada}")
    browser.wait_for("document.querySelector('.lead')?.innerText.includes('Left')")
    assert "Deleted. The employee remains." in browser.run("return document.body.innerText")
    browser.do("url", url=f"{base}/#/groups")
    browser.wait_for(
        "document.querySelector('main').innerText.includes('Night Crew') && "
        "document.querySelector('tbody tr:last-child')?.cells[1].innerText === '3'"
    )


def check_setup(browser: Browser, base: str) -> None:
    """The set-up has both ways to sign in, warns beside the URL, and copies what is to be entered."""
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.devtools("Browser.grantPermissions", permissions=permissions)
    browser.do("url", url=f"{base}/#/setup")
    wait_for_view(browser, "Set-up")
    page = browser.run("return document.querySelector('main').innerText")
    for text in (
        "OAuth2 client credentials grant",
        "Bearer authentication",
        "This URL will not work. Entra ID needs https",
        "Entra ID cannot reach 127.0.0.1",
        "tests the way from this browser",
        "every 40 minutes",
        "Sync only assigned users and groups",
        "Provision on demand",
        "People who exist already",
    ):
        assert text in page, text
    for text in ("Not([IsSoftDeleted])", f"{base}/scim/v2?aadOptscim062020", "title"):
        script = "document.querySelector(`[aria-label=${JSON.stringify(arguments[0])}]`).click()"
        browser.run(script, f"Copy {text}")
        read = "navigator.clipboard.readText().then(copied => copied === arguments[0])"
        browser.wait_for(read, text)


def check_guard(browser: Browser, base: str, token: str, file: Path) -> None:
    """Deactivations that are held back are shown in red with the people, and so is a pause."""
    document = json.loads(file.read_text())

    def show_with(option: str, value: Any) -> str:
        # Change an option of the tenant; return the banner that every view has then.
        document["tenants"][0][option] = value
        file.write_text(json.dumps(document))
        while send("GET", f"{base}/console/api/setup", token=token)[option] != value:
            time.sleep(0.05)
        for user in users:
            send("PATCH", f"{base}/scim/v2/Users/{user['id']}", off, token)
        browser.do("url", url=f"{base}/#/log")
        browser.do("refresh")
        text = browser.wait_for("document.querySelector('main > .note.bad')?.innerText")
        assert (elements := browser.run(LOW_CONTRAST)) == [], elements
        return str(text)

    off = {"Operations": [{"op": "replace", "path": "active", "value": False}]}
    query = "filter=active+eq+true+and+displayName+eq+%22Mei+Tanaka%22&count=3"
    users = send("GET", f"{base}/scim/v2/Users?{query}", token=token)["Resources"]
    banner = show_with("max_deactivations", 1)
    assert "deactivations are held back" in banner, banner
    assert banner.count("Mei Tanaka") in (2, 3), banner
    assert "This tenant is paused" in show_with("paused", True)


def check_live(browser: Browser, base: str, token: str) -> None:
    """A new call appears without a reload."""
    browser.do("url", url=f"{base}/#/log")
    wait_for_view(browser, "Provisioning log")
    send("POST", f"{base}/scim/v2/Groups", {"displayName": "Late Crew"}, token)
    browser.wait_for("document.querySelector('.log')?.innerText.includes('Late Crew')")


def check_browser_log(browser: Browser, base: str) -> None:
    """The browser logged no warning or error and sent no request to another host."""
    warnings = [line for line in browser.do("se/log", type="browser") if line["level"] != "INFO"]
    assert warnings == [], warnings
    messages = [
        json.loads(line["message"])["message"] for line in browser.do("se/log", type="performance")
    ]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    foreign = [
        url for url in urls if re.match("(http|ws|ftp)", url) and not url.startswith(base + "/")
    ]
    assert len(urls) > 50 and foreign == [], foreign


def check_unknown_token(browser: Browser) -> None:
    """An unknown token is rejected with a message and is not stored."""
    browser.run("document.querySelector('header button').click()")
    wait_for_view(browser, "SCIM console")
    browser.press(*"wrong", ENTER)
    browser.wait_for(
        "document.querySelector('[role=alert]')?.innerText.includes('token is unknown')"
    )
    assert browser.run("return sessionStorage.length") == 0


def main() -> None:
    """Run all checks in the order in which an administrator would use the page."""
    screenshots = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    driver = os.environ.get("CHROMEDRIVER", "chromedriver")
    serve = [sys.executable, str(ROOT / "scim_server.py"), "--listen", "127.0.0.1:0", "--config"]
    options = "--data-dir", ":memory:"
    with (
        tempfile.TemporaryDirectory() as profile,
        tempfile.TemporaryDirectory() as folder,
        running(*serve, configuration_file(folder), *options, ready=r"Console +(\S+)") as link,
        running(driver, "--port=0", ready=r"successfully on port (\d+)") as port,
    ):
        base, _, token = link.partition("/#token=")
        browser = Browser(f"http://127.0.0.1:{port}", profile)
        try:
            check_empty(browser, link, screenshots)
            user_id = provision(base, token)
            check_sign_in(browser, link, base)
            check_problem(browser, user_id)
            check_views(browser, base, user_id, screenshots)
            for width in (360, 1600):
                for theme in ("light", "dark"):
                    check_log(browser, base, width, theme)
            check_call(browser, base)
            check_export(browser, base)
            check_keyboard(browser, base)
            check_addresses(browser, base)
            check_live(browser, base, token)
            check_people(browser, base, token)
            check_setup(browser, base)
            check_guard(browser, base, token, Path(folder, "config.json"))
            check_browser_log(browser, base)
            check_unknown_token(browser)
            print("the console passed all checks, in both themes and widths")
        finally:
            send("DELETE", browser.url)


if __name__ == "__main__":
    main()
