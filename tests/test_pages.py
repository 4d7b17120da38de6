"""The reports in a real browser: they render, fetch nothing, complain of nothing and fit, wide and narrow.

Chromium without a window, driven over its debugging pipe, so nothing but the browser is needed. CHROMIUM
names it; where that is set, a missing browser is a failure, not a reason to skip. UNDIVIDED_PAGES: more
pages to open, parted by colons. UNDIVIDED_SCREENSHOTS: a folder for pictures of everything opened.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from undivided.bench import peers, report, shapes
from undivided.bench.results import Change, Peak, Ratio, Record, Results
from undivided.conformance import check
from undivided.conformance.report import html

pytestmark = pytest.mark.full
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 390)
PATIENCE_S = 60.0
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)

LOOK = """
(() => {
  const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
  const inScroller = e => { for (; e; e = e.parentElement) if (scrolls(e)) return true; return false; };
  const name = e => `<${e.tagName.toLowerCase()}> ${(e.innerText || e.alt || '').trim().slice(0, 60)}`;
  const all = [...document.body.querySelectorAll('*')];
  const wide = all.filter(e => !inScroller(e) &&
      (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1));
  const cut = all.filter(e => !scrolls(e) && e.scrollWidth > e.clientWidth + 1 &&
      getComputedStyle(e).overflowX !== 'visible');
  const luminance = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(x => x / 255)
        .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (/^rgb\\(/.test(colour)) return colour;
    }
    return matchMedia('(prefers-color-scheme: dark)').matches ? 'rgb(18, 18, 18)' : 'rgb(255, 255, 255)';
  };
  const faint = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).filter(e => {
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((x, y) => x - y);
    return (b + 0.05) / (a + 0.05) < 4.5;
  });
  return {
    title: document.title,
    text: document.body.innerText,
    unseen: [...document.querySelectorAll('h1, h2, table, img')]
        .filter(e => !e.checkVisibility() || !e.getBoundingClientRect().height).map(name),
    images: document.images.length,
    missing: [...document.images].filter(e => !e.complete || !e.naturalWidth).map(name),
    wide: wide.map(name), cut: cut.map(name), faint: faint.map(name),
    scrolled: document.documentElement.scrollWidth > innerWidth,
    height: document.documentElement.scrollHeight,
  };
})()
"""
"""What a page looks like from inside. faint: text whose contrast is below 4.5, the WCAG's AA."""


class Browser:
    """Chromium with one page; messages are JSON between NUL bytes on descriptors 3 and 4."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, self.write = os.pipe()
        self.read, theirs_out = os.pipe()
        for end in (theirs_in, theirs_out):
            os.set_inheritable(end, True)
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()  # chromium refuses to run as root with it
        command = [program, *FLAGS, *sandbox, f"--user-data-dir={profile}"]
        redirect = ["bash", "-c", f'exec 3<&{theirs_in} 4>&{theirs_out} "$@"', "bash", *command]
        self.log = open(profile / "log", "w+")  # noqa: SIM115, it lives as long as the browser
        self.process = subprocess.Popen(
            redirect, pass_fds=(theirs_in, theirs_out), stdout=self.log, stderr=self.log
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.numbers = itertools.count(1)
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command, wait for its answer; events that come meanwhile are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        while event not in [told.get("method") for told in self.events]:
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self.read, 2**20) if ready else b""
            if not part:
                self.log.seek(0)
                raise RuntimeError(f"the browser does not answer; it said:\n{self.log.read()[-3000:]}")
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))

    def close(self) -> None:
        try:
            self.session = None
            self.ask("Browser.close")
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
        for end in (self.read, self.write):
            os.close(end)
        self.log.close()

    def complaints(self, file: Path, width: int, scheme: str) -> list[str]:
        """Open a page; what is wrong with it."""
        self.events.clear()
        self._size(width, 900)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=file.as_uri())
        self.wait_for("Page.loadEventFired")
        seen = self.ask("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]
        self._photograph(file, width, scheme, seen["height"])
        found = [_complaint(told, file.as_uri()) for told in self.events]
        found += [f"not to be seen: {name}" for name in seen["unseen"]]
        found += [f"picture missing: {name}" for name in seen["missing"]]
        found += [f"wider than the page: {name}" for name in seen["wide"]]
        found += [f"cut off: {name}" for name in seen["cut"]]
        found += [f"hard to read: {name}" for name in seen["faint"]]
        found += ["the page scrolls sideways"] if seen["scrolled"] else []
        found += [] if seen["title"] and len(seen["text"]) > 20 else ["nothing is rendered"]
        return [complaint for complaint in found if complaint]

    def _size(self, width: int, height: int) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def _photograph(self, file: Path, width: int, scheme: str, height: int) -> None:
        folder = os.environ.get("UNDIVIDED_SCREENSHOTS")
        if folder:
            self._size(width, min(height, 8000))
            data = self.ask("Page.captureScreenshot", format="png")["data"]
            Path(folder, f"{file.stem}-{width}-{scheme}.png").write_bytes(base64.b64decode(data))


def _complaint(told: dict[str, Any], own: str) -> str:
    """Of an event: a request to outside, a word of the console, or nothing."""
    given = told.get("params", {})
    match told.get("method"):
        case "Network.requestWillBeSent":
            url = given["request"]["url"]
            return "" if url == own or url.startswith("data:") else f"request: {url[:200]}"
        case "Runtime.exceptionThrown":
            return f"exception: {given['exceptionDetails']['text']}"
        case "Runtime.consoleAPICalled" if given["type"] in ("error", "warning", "assert"):
            return f"console: {given['args']}"
        case "Log.entryAdded" if given["entry"]["level"] in ("error", "warning"):
            return f"log: {given['entry']['text']}"
    return ""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: install chromium, or name one in CHROMIUM (looked for {', '.join(NAMES)})")
    if shutil.which(program) is None:
        pytest.fail(f"CHROMIUM names {program}, which is not there")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5E"
    "rkJggg=="
)
BODY = "<title>t</title><body style='margin: 0'><h1>A page as it should be</h1><p>with some text in it.</p>"


def test_a_good_page_is_not_complained_of(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "good.html"
    wide = f"<div style='overflow-x: auto'><pre>{'wide ' * 200}</pre></div>"
    file.write_text(f"<!DOCTYPE html>{BODY}<img alt=dot src='{PIXEL}'>{wide}")
    assert browser.complaints(file, 390, "light") == []


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("<script>console.error('no')</script>", "console: "),
        ("<script>nobody()</script>", "exception: "),
        ("<link rel=stylesheet href='http://192.0.2.1/x.css'>", "request: http://192.0.2.1/x.css"),
        ("<img alt=gone src='gone.png'>", "picture missing: <img> gone"),
        ("<img alt=broken src='data:image/png;base64,AAAA'>", "picture missing: <img> broken"),
        (f"<p>{'w' * 100}</p>", "the page scrolls sideways"),
        ("<p style='width: 500px'>wide</p>", "wider than the page: <p> wide"),
        (f"<p style='overflow: hidden'>{'w' * 100}</p>", "cut off: <p> www"),
        ("<style>h1 { display: none }</style>", "not to be seen: <h1>"),
        ("<style>body > * { display: none }</style>", "nothing is rendered"),
        ("<p style='color: #aaa; background: #fff'>faint</p>", "hard to read: <p> faint"),
    ],
    ids=lambda x: re.sub(r"\W+", "-", x)[:30],
)
def test_what_is_planted_is_found(browser: Browser, tmp_path: Path, planted: str, complaint: str) -> None:
    """A browser that finds nothing may not have looked."""
    file = tmp_path / "bad.html"
    file.write_text(f"<!DOCTYPE html>{BODY}{planted}")
    found = browser.complaints(file, 390, "light")
    assert any(said.startswith(complaint) for said in found), found


def everything() -> Results:
    """A run on a GPU with every peer there, every section and every mark: the widest page there can be."""
    records = []
    cases = [shape.case(mask, "cuda").name for shape in shapes.SHAPES.values() for mask in shape.masks]
    for case, direction in itertools.product(cases, ("forward", "backward")):
        for i, name in enumerate(peers.DEFAULT):
            ms = 1.234 * (1 + i / 3)
            key = (case, "bfloat16", direction, name)
            if name == "torch-math":
                records.append(Record(*key, status="wrong", reason="out[0, 1, 2, 3] = nan, but 0.1234567"))
            elif name == "xformers":
                records.append(Record(*key, status="n/a", reason="needs xformers.ops, cannot be imported"))
            else:
                share = 0.75 / (1 + i / 3)
                timed = {"p20_ms": 0.9 * ms, "median_ms": ms, "p80_ms": 1.1 * ms, "tflops": 800 * share}
                timed |= {"of_matmul": share, "of_copy": 0.1, "peak_bytes": 2**28, "turns": 15}
                timed |= {"clocks": "1980 MHz, 2619 MHz, 690.12 W, 61"}
                reason = "out[1] is off; but no worse than plain PyTorch" if name == "eager" else ""
                records.append(Record(*key, status="timed", reason=reason, **timed))
    environment = {
        "torch": "2.13.0",
        "date": "2026-01-02",
        "gpu": "NVIDIA H300 80GB HBM9",
        "load": 9.5,
        "threads": 2,
        "cpu": "Somebody's CPU @ 3 GHz",
    }
    environment |= {
        "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        "clocks": "1980 MHz, 2619 MHz, 690 W, 60",
    }
    names = ("forward, full, fp32", "decode 32/8 heads, 8k keys, d 128, bf16, without its instructions")
    return Results(
        environment,
        sources={shape.name: shape.source for shape in shapes.SHAPES.values()},
        roofs={"copy": 3000.0, "bfloat16": 800.0},
        records=tuple(records),
        ratios=tuple(Ratio(name, 0.8 + i, "times as fast", 1.0, 1, 2) for i, name in enumerate(names)),
        peaks=tuple(
            Peak(
                "window 256, 1 head, fp32; for torch-flash a dense mask", n, name, n * n if n < 9e3 else None
            )
            for n, name in itertools.product((1024, 4096, 32768), ("undivided", "torch-flash"))
        ),
        host_us={"forward": 41.5, "PyTorch's SDPA on these 16 x 16 scores, forward + backward": 160.3},
    )


def halved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, and wrong."""
    return (q @ k.mT).softmax(-1) @ v / 2


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A page of each kind as full as it gets, one from the command itself, and those that are asked for."""
    pytest.importorskip("matplotlib", reason="pictures are drawn with it")
    folder = tmp_path_factory.mktemp("pages")
    results = everything()
    changes = [Change(record.key, 1.0, 1.5, 1.5, True) for record in results.records[:9]]
    (folder / "bench-full.html").write_text(report.html(results, changes, ["other surroundings: gpu"]))
    (folder / "check-wrong.html").write_text(html(check(halved, device="cpu")))
    small = ["--device", "cpu", "--shape", "vit-l-16", "--seqlen", "16", "--batch", "1", "--extras"]
    command = [sys.executable, "-m", "undivided", "bench", *small, "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    asked = os.environ.get("UNDIVIDED_PAGES", "")
    return [*sorted(folder.glob("*.html")), *map(Path, filter(None, asked.split(":")))]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_reports(browser: Browser, pages: list[Path], width: int, scheme: str) -> None:
    assert len(pages) >= 3
    found = {file.name: browser.complaints(file.resolve(), width, scheme) for file in pages}
    assert found == {file.name: [] for file in pages}
