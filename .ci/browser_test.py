"""The console in a real browser: Debian's chromium, driven by chromedriver's HTTP protocol.

Usage: browser_test.py [DIRECTORY FOR SCREENSHOTS]. Ends with status 0, or an error that says what
is wrong with the page. Standard library only; CHROMIUM and CHROMEDRIVER may name other programs.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
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

# Each text on the page whose contrast to its background is below 4.5 (WCAG 2.2 AA).
FAINT = """
const light = rgb => rgb.slice(0, 3).map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, n) => sum + c * [.2126, .7152, .0722][n], 0);
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const ground = node => { const c = rgb(getComputedStyle(node).backgroundColor);
  return c.length < 4 || c[3] ? c : node.parentElement ? ground(node.parentElement) : [255, 255, 255]; };
return [...document.querySelectorAll('body *')].filter(node => node.checkVisibility() && !node.disabled
  && [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())).filter(node => {
  const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
  return (a + .05) / (b + .05) < 4.5; }).map(node => node.outerHTML.slice(0, 120));
"""
SHIFT = """
return new Promise(done => { let sum = 0; const seen = new PerformanceObserver(list =>
  list.getEntries().forEach(one => { if (!one.hadRecentInput) sum += one.value; }));
  seen.observe({type: 'layout-shift', buffered: true}); setTimeout(() => done(sum), 0); });
"""


def send(method: str, url: str, body: Any = None, token: str = "") -> Any:
    """Return the JSON that a server answers, whatever the status."""
    request = urllib.request.Request(
        url,
        method=method,
        headers={"Content-Type": "application/json"},
        data=None if body is None else json.dumps(body).encode(),
    )
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return json.loads(error.read() or b"null")


@contextmanager
def running(*command: str, ready: str) -> Iterator[str]:
    """Run a program until the block ends; gives what its output has of a pattern's group."""
    for _ in range(
        3
    ):  # chromedriver finds a port in one address family that the other has given away
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
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = send("POST", f"{driver}/session", {"capabilities": {"alwaysMatch": wanted}})[
            "value"
        ]
        if "sessionId" not in session:
            raise RuntimeError(session.get("message"))
        self.url = f"{driver}/session/{session['sessionId']}"

    def do(self, command: str, **parameters: Any) -> Any:
        """Send a command of the WebDriver protocol."""
        value = send("POST", f"{self.url}/{command}", parameters)["value"]
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(value["message"])
        return value

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what JavaScript returns."""
        return self.do("execute/sync", script=script, args=list(arguments))

    def devtools(self, command: str, **parameters: Any) -> None:
        """Send a command of the DevTools protocol."""
        self.do("goog/cdp/execute", cmd=command, params=parameters)

    def until(self, script: str, *arguments: Any) -> Any:
        """Return what an expression gives as soon as it is true."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if value := self.run(f"return {script}", *arguments):
                return value
            time.sleep(0.05)
        raise AssertionError(
            f"never true: {script} {arguments}; the page says: "
            + self.run("return document.body.innerText")
        )

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, where the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.do("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def appear(self, width: int, theme: str) -> None:
        """Take a width, and a theme with as little motion as can be."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
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


def fill(base: str, token: str) -> str:
    """Let an identity provider do well and badly, with an attack in every text; gives a person's id."""

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
    ids = [
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
    person = scim(
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
            ENTERPRISE: {"department": XSS, "manager": {"value": ids[0]}},
        },
    )["id"]
    group = scim("POST", "/Groups", {"displayName": f"Night Crew {XSS}", "externalId": XSS})["id"]
    scim(
        "PATCH",
        f"/Groups/{group}",
        {
            "Operations": [
                {
                    "op": "add",
                    "path": "members",
                    "value": [{"value": id} for id in (*ids[:3], person, XSS)],
                }
            ]
        },
    )
    scim("GET", "/Users?filter=userName+eq+%22ada%22")
    for operation in (
        {"op": "replace", "path": "title", "value": "Chief"},
        {"op": "replace", "path": "active", "value": "False"},
        {"op": "add", "path": f"{FACILIO}:badge_number", "value": XSS},
        {"op": "add", "path": f"{FACILIO}:costcoed", "value": "C-7"},
    ):
        scim("PATCH", f"/Users/{person}", {"Operations": [operation]})
    return str(person)


def heading(browser: Browser, text: str) -> None:
    """Wait for a view."""
    browser.until("document.querySelector('main h1')?.innerText === arguments[0]", text)


def picture(browser: Browser, name: str, screenshots: Path | None) -> None:
    """Keep how the whole page looks, where a directory for it was given."""
    if screenshots:
        width, height = browser.run("return [innerWidth, document.documentElement.scrollHeight]")
        browser.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=min(height, 2400),
            deviceScaleFactor=1,
            mobile=False,
        )
        shot = send("GET", f"{browser.url}/screenshot")["value"]
        (screenshots / f"{name}.png").write_bytes(base64.b64decode(shot))


def check_empty(browser: Browser, link: str, base: str, screenshots: Path | None) -> None:
    """Where nothing has happened yet, every view says what to do next, and the connection is tested."""
    browser.appear(1600, "light")
    browser.do("url", url=link)
    for view, title, words in (
        ("log", "Provisioning log", "Nobody has called yet"),
        ("people", "Employees", "Nobody is here yet"),
        ("groups", "Groups", "No groups yet"),
        ("setup", "Set-up", "nobody has it"),
    ):
        browser.run("location.hash = arguments[0]", f"#/{view}")
        heading(browser, title)
        assert words in browser.run("return document.querySelector('main').innerText")
        if view == "setup":
            browser.run("document.querySelector('button.main').click()")
            browser.until("document.body.innerText.includes('Groups: the filter was understood')")
            assert not browser.run("return document.querySelectorAll('.done').length")
        picture(browser, f"empty-{view}", screenshots)
    browser.run("document.querySelector('#out').click()")
    heading(browser, "SCIM console")
    picture(browser, "sign-in", screenshots)


def check_sign_in(browser: Browser, link: str, base: str) -> None:
    """The printed link signs in and leaves no token in the address; so does the form, by keyboard."""
    browser.do("url", url=link)
    heading(browser, "Provisioning log")
    assert browser.run("return location.href") == f"{base}/#/log"
    browser.run("document.querySelector('#out').click()")
    heading(browser, "SCIM console")
    assert browser.run("return sessionStorage.length") == 0
    browser.press(*link.partition("#token=")[2], "\ue007")
    heading(browser, "Provisioning log")
    for _ in range(30):  # every control can be reached, and is seen to be
        browser.press("\ue004")
        if browser.run("return document.activeElement.type") == "checkbox":
            break
    assert browser.run("return document.activeElement.matches(':focus-visible')")
    browser.press(" ")
    browser.until(
        "document.querySelectorAll('.log > li').length && "
        "!document.querySelector('.log details.ok')"
    )


def check_trouble(browser: Browser, person: str) -> None:
    """A failed mapping is explained, and leads to the employee, whose texts are but texts."""
    browser.run("document.querySelectorAll('.log details').forEach(one => one.open = true)")
    text = browser.until(
        "[...document.querySelectorAll('.log details.bad')].map(one => one.innerText)"
        ".find(text => text.includes('costcoed'))"
    )
    assert "did you mean “costcode”?" in text and "What to do:" in text, text
    assert "takes a whole number" in browser.run("return document.body.innerText")
    browser.run("[...document.querySelectorAll('.log details.bad a')].at(-1).click()")
    heading(browser, XSS)
    assert browser.run("return location.hash") == f"#/people/{person}"
    page = browser.run("return document.body.innerText")
    assert page.count(XSS) > 5 and "Member added" in page, page


def check_views(browser: Browser, base: str, person: str, screenshots: Path | None) -> None:
    """Every view fits both widths and is easy to read in both themes, and nothing is run."""
    group = browser.run("""return fetch('/scim/v2/Groups', {headers: {'X-Console': '1', Authorization:
        'Bearer ' + sessionStorage.getItem('token')}}).then(a => a.json()).then(a => a.Resources[0].id)""")
    titles = {
        "log": "Provisioning log",
        "setup": "Set-up",
        "people": "Employees",
        "groups": "Groups",
        f"people/{person}": XSS,
        f"groups/{group}": f"Night Crew {XSS}",
    }
    for width in (360, 1600):
        for theme in ("light", "dark"):
            browser.appear(width, theme)
            for view, title in titles.items():
                browser.do("url", url=f"{base}/#/{view}")
                browser.do("refresh")
                heading(browser, title)
                if view == "log":
                    browser.run("document.querySelector('.log details.bad').open = true")
                picture(
                    browser,
                    f"{view.partition('/')[0]}{'-one' * ('/' in view)}-{width}-{theme}",
                    screenshots,
                )
                browser.appear(width, theme)
                where = f"{view} at {width} in {theme}"
                wide = browser.run("return document.documentElement.scrollWidth")
                assert wide <= width, f"{where}: {wide} pixels wide"
                assert (faint := browser.run(FAINT)) == [], f"{where}: {faint}"
                assert (shift := browser.run(SHIFT)) < 0.1, f"{where}: shifts by {shift}"
                assert not browser.run(
                    "return window.pwned || document.querySelector('main img')"
                ), where


def check_live(browser: Browser, base: str, token: str) -> None:
    """What happens is seen without a reload."""
    browser.do("url", url=f"{base}/#/log")
    heading(browser, "Provisioning log")
    send("POST", f"{base}/scim/v2/Groups", {"displayName": "Late Crew"}, token)
    browser.until("document.querySelector('.log')?.innerText.includes('Late Crew')")


def check_quiet(browser: Browser, base: str) -> None:
    """The browser complained of nothing and called no other host."""
    complaints = [line for line in browser.do("se/log", type="browser") if line["level"] != "INFO"]
    assert complaints == [], complaints
    messages = [
        json.loads(line["message"])["message"] for line in browser.do("se/log", type="performance")
    ]
    urls = [
        one["params"]["request"]["url"]
        for one in messages
        if one["method"] == "Network.requestWillBeSent"
    ]
    strange = [
        url for url in urls if re.match("(http|ws|ftp)", url) and not url.startswith(base + "/")
    ]
    assert len(urls) > 50 and strange == [], strange


def check_refused(browser: Browser) -> None:
    """A token that nobody has is refused in words, and not kept."""
    browser.run("document.querySelector('#out').click()")
    heading(browser, "SCIM console")
    browser.press(*"wrong", "\ue007")
    browser.until(
        "document.querySelector('[role=alert]')?.innerText.includes('does not know the token')"
    )
    assert browser.run("return sessionStorage.length") == 0


def main() -> None:
    """Run all checks, in the order in which a person would come by them."""
    screenshots = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    driver = os.environ.get("CHROMEDRIVER", "chromedriver")
    serve = [sys.executable, str(HERE / "scim_server.py"), "--listen", "127.0.0.1:0"]
    with (
        tempfile.TemporaryDirectory() as profile,
        running(*serve, "--data-dir", ":memory:", ready=r"Console +(\S+)") as link,
        running(driver, "--port=0", ready=r"successfully on port (\d+)") as port,
    ):
        base, _, token = link.partition("/#token=")
        browser = Browser(f"http://127.0.0.1:{port}", profile)
        try:
            check_empty(browser, link, base, screenshots)
            person = fill(base, token)
            check_sign_in(browser, link, base)
            check_trouble(browser, person)
            check_views(browser, base, person, screenshots)
            check_live(browser, base, token)
            check_quiet(browser, base)
            check_refused(browser)
            print(
                "the console: signed in, explained, followed, attacked, looked at in both themes and widths"
            )
        finally:
            send("DELETE", browser.url)


if __name__ == "__main__":
    main()
