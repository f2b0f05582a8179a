"""The pages in headless Chromium: no requests, no errors, nothing wider than the window.

Set ``PERA_SHOTS`` to a folder to save screenshots there.
"""

import base64
import fcntl
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from test_hostile import MARKUP, told_run, told_study
from test_run import FIGURES, HOSTILE, adapters, bare_run, full_run  # noqa: F401
from test_study import STUDY, made_up

from pera_lab.report.run import write_report
from pera_lab.report.study import write_study_report
from pera_lab.study import load_study
from pera_lab.study.results import Results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--hide-scrollbars"),
    *("--disable-extensions", "--disable-dev-shm-usage", "--proxy-bypass-list=<-loopback>", "--remote-debugging-pipe"),
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install the package chromium"),
]
NARROW, WIDE = 360, 1100
PAGES = ["complete", "bare", "several", "study"]


class Browser:
    """A Chromium page, controlled through the DevTools pipe: JSON messages that end with a NUL."""

    def __init__(self, profile, proxy):
        def pipes():
            for wanted, descriptor in ((3, commands), (4, answers)):
                os.dup2(descriptor, wanted)

        down, up = os.pipe(), os.pipe()
        commands, answers = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (down[0], up[1]))
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--proxy-server=127.0.0.1:{proxy}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=pipes, close_fds=False, **quiet)
        for end in (commands, answers, down[0], up[1]):
            os.close(end)
        self._to, self._from = os.fdopen(down[1], "wb", buffering=0), os.fdopen(up[0], "rb", buffering=0)
        self._rest, self._count, self._session, self.events = b"", 0, None, []
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Send a command and return its result. Events that arrive first go to ``events``."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file):
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def ask(self, expression):
        """Return the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def show(self, width, scheme="light", medium="screen"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=medium, features=features)

    def shoot(self, name):
        if folder := os.environ.get("PERA_SHOTS"):
            shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def happened(self, method):
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self):
        self._to.close()
        self._from.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self):
        while b"\0" not in self._rest:
            received = self._from.read(1 << 16)
            assert received, "Chromium ended"
            self._rest += received
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="module")
def proxy():
    """The port of a proxy for all requests of the browser, and the connections it received."""
    connections = []
    server = socket.create_server(("127.0.0.1", 0))

    def listen():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(connection.recv(200))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield server.getsockname()[1], connections
    server.close()


def left(proxy):
    """The requests of the page. Chromium's own requests to Google are excluded."""
    return [request for request in proxy[1] if b".google" not in request.partition(b"\r\n")[0]]


@pytest.fixture(scope="module")
def browser(tmp_path_factory, proxy):
    browser = Browser(tmp_path_factory.mktemp("profile"), proxy[0])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, adapters):  # noqa: F811
    """Pages of a complete run with hostile text, of a run with only a recipe, of three runs, and of a study."""
    folder = tmp_path_factory.mktemp("runs")
    run = full_run(folder / "demo-<b>1", adapters, text=f"{HOSTILE} {'long' * 100} {'word ' * 30}")
    other = full_run(folder / "other", adapters, learning_rate=2e-3)
    bare = bare_run(folder / ("bare" * 20))
    files = {}
    for name, runs in {"complete": [run], "bare": [bare], "several": [run, other, bare]}.items():
        files[name] = folder / f"{name}.html"
        write_report(runs, files[name])
    (folder / "study.yaml").write_text(STUDY.replace("RANKS", "[3, 4]"))
    study = made_up(folder / "study", load_study(str(folder / "study.yaml")), adapters)
    files["study"] = write_study_report(Results(study), folder / "study.html")[0]
    return files


@pytest.mark.parametrize("name", PAGES)
def test_page_makes_no_requests_and_logs_nothing(browser, pages, proxy, name):
    browser.show(WIDE)
    browser.open(pages[name])
    assert [r["request"]["url"] for r in browser.happened("Network.requestWillBeSent")] in (
        [pages[name].as_uri()],
        [pages[name].as_uri(), "data:,"],
    )
    assert browser.happened("Runtime.consoleAPICalled") == []
    assert browser.happened("Runtime.exceptionThrown") == []
    assert browser.happened("Log.entryAdded") == []
    assert browser.happened("Page.javascriptDialogOpening") == []
    assert left(proxy) == []


def test_listener_sees_requests(browser, proxy, tmp_path):
    (tmp_path / "leak.html").write_text("<img src=http://page.invalid/x>")
    browser.open(tmp_path / "leak.html")
    assert [b"GET http://page.invalid/x" in request for request in left(proxy)] == [True]
    proxy[1].clear()


@pytest.mark.parametrize("kind", ["run", "runs", "study"])
def test_markup_neither_runs_nor_asks_for_anything(browser, proxy, tmp_path, adapters, kind):  # noqa: F811
    file = tmp_path / "page.html"
    if kind == "study":
        write_study_report(Results(told_study(tmp_path / "study", adapters, MARKUP)), file)
    else:
        run = told_run(tmp_path / "run", adapters, MARKUP)
        write_report([run] if kind == "run" else [run, run], file)
    browser.open(file)
    title = browser.ask("document.title")
    time.sleep(0.3)  # a refresh or a script would act by now
    assert browser.ask("[document.title, location.href]") == [title, file.as_uri()]
    assert title.endswith("· PERA report")
    requests = {event["request"]["url"] for event in browser.happened("Network.requestWillBeSent")}
    assert requests <= {file.as_uri(), "data:,"}
    for event in ("Page.javascriptDialogOpening", "Page.frameRequestedNavigation", "Page.windowOpen", "Log.entryAdded"):
        assert browser.happened(event) == []
    assert len(browser.happened("Page.frameNavigated")) == 1
    assert browser.ask("document.querySelectorAll('script, img, iframe, object, [onerror], [onload]').length") == 0
    assert left(proxy) == []


def test_every_figure_is_drawn(browser, pages):
    browser.show(WIDE)
    browser.open(pages["complete"])
    assert browser.ask("[...document.querySelectorAll('figure')].map(f => f.id)") == [
        f"run1-{name}-figure" for name in FIGURES
    ]
    sizes = browser.ask(
        "[...document.querySelectorAll('figure svg')].map(s => [s.getBBox().width, s.clientWidth, s.clientHeight])"
    )
    assert all(drawn > 100 and width > 300 and height > 80 for drawn, width, height in sizes)
    assert browser.ask("document.querySelectorAll('figure svg text').length") > 50
    lost = "[...document.querySelectorAll('svg [*|href]')].filter(u => !document.querySelector(u.getAttribute('href')))"
    assert browser.ask(f"{lost}.length") == 0


def test_text_is_shown_as_written(browser, pages):
    browser.show(WIDE)
    browser.open(pages["complete"])
    text = " ".join(browser.ask("document.body.innerText").split())
    for sentence in (
        "demo-<b>1",
        "25.0 % base model → 50.0 % with adapter",
        "2 newly right, 1 newly wrong, 0 still right, 1 still wrong.",
        '<script>alert("x")</script> <img src=http://evil.test/x onerror=alert(1)> **b**',
        "\\x1b[31mred\\x07 \\u202eback\\x9b",
        "same outputs as the adapter",
    ):
        assert sentence in text, sentence
    assert browser.ask("document.querySelectorAll('script, img, main b').length") == 0


@pytest.mark.parametrize("width", [320, NARROW, 390, WIDE, 1280, 1920])
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_the_window(browser, pages, name, width):
    browser.show(width)
    browser.open(pages[name])
    browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    boxed = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 200))"""
    assert browser.ask(boxed) == []
    small = """Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"""
    if name != "bare":
        assert browser.ask(small) > 7


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["several", "study"])
def test_text_has_enough_contrast(browser, pages, name, scheme):
    """Text has a contrast of at least 4.5 to the page, and lines of figures of at least 3."""
    browser.show(WIDE, scheme)
    browser.open(pages[name])
    colors = browser.ask(
        """(() => {
          const of = (e, p) => getComputedStyle(e)[p];
          const texts = [...document.querySelectorAll('h1,h2,h3,p,a,th,td,pre,dt,summary,figcaption,span,small')];
          const marks = [...document.querySelectorAll('svg path')].map(e => of(e, 'stroke')).filter(c => c !== 'none');
          return {paper: of(document.body, 'backgroundColor'), texts: [...new Set(texts.map(e => of(e, 'color')))],
                  labels: [...new Set([...document.querySelectorAll('svg text')].map(e => of(e, 'fill')))],
                  marks: [...new Set(marks)]};
        })()"""
    )
    paper = luminance(colors["paper"])
    assert (paper > 0.9) == (scheme == "light")
    assert len(colors["marks"]) >= 4
    for least, found in ((4.5, colors["texts"] + colors["labels"]), (3, colors["marks"])):
        for color in found:
            assert contrast(luminance(color), paper) >= least, (color, least)


def test_closed_details_are_printed(browser, pages):
    browser.show(WIDE)
    browser.open(pages["complete"])
    shown = """[...document.querySelectorAll('details')].every(d =>
        d.getBoundingClientRect().height >= d.querySelector('table').getBoundingClientRect().height)"""
    assert browser.ask(shown) is False
    browser.show(700, "dark", medium="print")
    assert browser.ask(shown) is True
    assert luminance(browser.ask("getComputedStyle(document.body).backgroundColor")) > 0.9
    sticking = (
        """[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > innerWidth).length"""
    )
    assert browser.ask(sticking) == 0


@pytest.mark.skipif("PERA_SHOTS" not in os.environ, reason="pictures are taken only if PERA_SHOTS names a folder")
@pytest.mark.parametrize("name", PAGES)
def test_pictures(browser, pages, name):
    browser.open(pages[name])
    for label, options in {
        "light": {"width": WIDE},
        "dark": {"width": WIDE, "scheme": "dark"},
        "narrow": {"width": NARROW},
        "print": {"width": 700, "medium": "print"},
    }.items():
        browser.show(**options)
        browser.shoot(f"{name}-{label}")


def luminance(color):
    """Relative luminance of a CSS colour "rgb(r, g, b)", by WCAG."""
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a, b):
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
