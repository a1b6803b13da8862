"""The report in a real browser, at the width of a telephone and of a laptop."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_run import make_run

from prsl_kernels.experiments.report import build_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (380, 1280)
# The page itself has no script and forbids them; a copy of it is measured, in a frame, since a window is never narrow.
MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !e.closest(".scroll, pre, .skip");
});
parent.postMessage({
  inner: innerWidth, page: document.documentElement.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 80)),
  broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length, images: document.images.length,
}, "*");
</script></body>"""
FRAME = """<!DOCTYPE html><script>
onmessage = event => { document.documentElement.dataset.found = JSON.stringify(event.data); };
</script><iframe src="copy.html" style="border: 0; width: %dpx; height: 900px"></iframe>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path; install one, for example "
                       "with `apt-get install chromium`, to look at the report in a browser"),
]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("browser")
    recipe = make_run(
        run, images=12, keep=4, pixels=16, texts=("word " * 400, "unbroken" * 200, "<b>bold</b>", "short")
    )
    return build_report(run, recipe=recipe)


def browse(page: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
         f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", *more, page.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(report: Path, tmp_path: Path, width: int) -> None:
    copy = tmp_path / "copy.html"
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    copy.write_text(source.replace("</body>", MEASURE), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % width)
    dom = browse(frame, tmp_path, "--virtual-time-budget=10000", "--dump-dom").stdout
    told = re.search(r'data-found="([^"]*)"', dom)
    assert told is not None, "the browser did not run the measurement"
    found = json.loads(told[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["inner"] == width
    assert found["page"] <= width, found["wide"]
    assert found["wide"] == []
    assert found["images"] > 60
    assert found["broken"] == 0


def test_no_request_and_no_complaint(report: Path, tmp_path: Path) -> None:
    requests, complaints = watch(report, tmp_path)
    assert requests == set()
    assert complaints == []


def test_requests_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/picture.png">')
    assert watch(page, tmp_path)[0] == {"http://127.0.0.1:9/picture.png"}


def watch(page: Path, folder: Path) -> tuple[set[str], list[str]]:
    """What the page asked for over the network, and what the browser's console said."""
    log = folder / "net.json"
    result = browse(page, folder, f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom")
    events = [event.get("params", {}) for event in json.loads(log.read_text(encoding="utf-8"))["events"]]
    asked = [event for event in events if "initiator" in event and "url" in event]
    # "not an origin": the browser's own errands.
    pages = {
        event["url"] for event in asked if event["initiator"] != "not an origin" and event["url"].startswith("http")
    }
    return pages, [line for line in result.stderr.splitlines() if "CONSOLE" in line]
