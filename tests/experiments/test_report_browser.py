"""The report in a real browser, at the width of a telephone and of a laptop."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_run import make_run

from prsl_kernels.experiments.report import build_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (380, 1280)
# The page allows its own script alone; a copy of it is measured, in a frame, since a window is never narrow.
MEASURE = """<script>
(async () => {
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  const images = [...document.images].filter((image) => image.getAttribute("src"));
  const broken = await Promise.all(images.map((image) => image.decode().then(() => 0, () => 1)));
  const wide = [...document.querySelectorAll("body *")].filter((e) => {
    const box = e.getBoundingClientRect();
    return box.width && box.right > innerWidth + 1 && !e.closest(".scroll, pre, .skip");
  });
  parent.postMessage({
    inner: innerWidth, page: document.documentElement.scrollWidth, wide: wide.map((e) => e.outerHTML.slice(0, 80)),
    broken: broken.reduce((sum, one) => sum + one, 0), images: images.length,
    browsers: [...document.querySelectorAll(".browser")].filter((b) => !b.hidden).length,
  }, "*");
})();
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
        run, images=12, keep=4, pixels=16, arms=("ce", "prsl-k20", "prsl-k6"), seeds=(0, 1), full=True,
        texts=("word " * 400, "unbroken" * 200, "<b>bold</b>", "short"),
    )  # fmt: skip
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
    assert found["browsers"] == 2


# What a reader does, in a copy of the page that may run one script more; it leaves what it saw in an attribute.
STEER = """<script>
(async () => {
  const seen = {}, wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const until = async (holds) => { for (let i = 0; i < 200 && !holds(); i += 1) await wait(50); };
  const table = [...document.querySelectorAll("table.sortable")].find((t) => t.tBodies[0].rows.length > 8);
  const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].textContent.trim());
  const last = table.tHead.rows[0].cells.length - 1;
  seen.before = column(last);
  table.tHead.querySelectorAll("button")[last].click();
  seen.sort = table.tHead.rows[0].cells[last].getAttribute("aria-sort");
  seen.sorted = [...table.tBodies[0].rows].map((row) => Number(row.cells[last].dataset.value ?? "NaN"));
  table.tHead.querySelectorAll("button")[last].click();
  table.tHead.querySelectorAll("button")[last].click();
  seen.again = column(last);
  const filter = table.closest(".scroll").previousElementSibling.querySelector("input");
  filter.value = "worst"; filter.dispatchEvent(new Event("input"));
  seen.filtered = [...table.tBodies[0].rows].filter((row) => !row.hidden).length;
  filter.value = ""; filter.dispatchEvent(new Event("input"));
  const root = document.querySelector(".browser"), part = (name) => root.querySelector(`[data-part="${name}"]`);
  const pick = (name, label) => {
    part(name).value = [...part(name).options].find((option) => option.textContent.includes(label)).value;
    part(name).dispatchEvent(new Event("change"));
  };
  const rows = () => [...part("rounds").rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
  pick("image", "captions-0002"); pick("arm", "prsl-k20"); pick("attack", "pgd-l2");
  seen.rounds = rows();
  pick("attack", "bim");
  seen.bim = rows().map((row) => row[0]);
  const canvas = part("noise");
  const read = () => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
  const grey = (data) => data.filter((v, i) => i % 4 < 3).reduce((sum, v) => sum + Math.abs(v - 128), 0);
  part("factor").value = "1"; part("factor").dispatchEvent(new Event("input"));
  await until(() => part("times").textContent === "× 1");
  seen.size = [canvas.width, canvas.height];
  seen.faint = grey(read());
  part("factor").value = "4"; part("factor").dispatchEvent(new Event("input"));
  await until(() => part("times").textContent === "× 4");
  seen.strong = grey(read());
  seen.id = part("id").textContent;
  part("next").click();
  seen.next = part("id").textContent;
  part("find").value = "no such words"; part("find").dispatchEvent(new Event("input"));
  seen.none = [part("shown").hidden, part("empty").textContent];
  part("find").value = "<b>bold</b>"; part("find").dispatchEvent(new Event("input"));
  seen.bold = [part("shown").hidden, document.querySelectorAll(".browser b").length];
  document.documentElement.dataset.found = JSON.stringify(seen);
})();
</script></body>"""


def steered(report: Path, folder: Path) -> dict[str, Any]:
    copy = folder / "steered.html"
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    copy.write_text(source.replace("</body>", STEER), encoding="utf-8")
    dom = browse(copy, folder, "--virtual-time-budget=20000", "--dump-dom").stdout
    told = re.search(r'data-found="([^"]*)"', dom)
    assert told is not None, "the script did not come to its end"
    found: dict[str, Any] = json.loads(html.unescape(told[1]))
    return found


def test_tables_sort_and_filter_and_images_are_picked(report: Path, tmp_path: Path) -> None:
    seen = steered(report, tmp_path)
    assert seen["sort"] == "descending"
    assert seen["sorted"] == sorted(seen["sorted"], reverse=True)
    assert seen["again"] == seen["before"], "the third click gives the first order back"
    assert seen["filtered"] == 1
    assert [row[0] for row in seen["rounds"]] == ["clean", "20"]
    assert seen["bim"] == ["clean", "1", "2", "5", "10", "20", "40"]
    run = report.parent
    rows = pd.read_parquet(run / "captions/attack/prsl-k20/seed-0/outputs.parquet")
    wanted = rows[(rows["id"] == "captions-0002") & (rows["attack"] == "pgd-l2")].iloc[0]
    assert seen["rounds"][1][1].strip('“”"').startswith(wanted["text"][:40].strip())
    assert seen["rounds"][1][3] == f"{wanted['objective_value']:.3f}"
    assert seen["size"] == [16, 16]
    assert 0 < seen["faint"] < seen["strong"] == pytest.approx(4 * seen["faint"]), "the magnification is exact"
    assert seen["id"].startswith("captions-0002")
    assert seen["next"] != seen["id"]
    assert seen["none"] == [True, "No image holds these words."]
    assert seen["bold"] == [False, 0], "what a model says is never markup"


def test_without_a_script_everything_but_the_browser_is_there(report: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.html"
    source = report.read_text(encoding="utf-8")
    copy.write_text(re.sub(r"script-src '[^']*'", "script-src 'none'", source), encoding="utf-8")
    dom = browse(copy, tmp_path, "--dump-dom").stdout
    assert 'class="sort"' not in dom
    assert 'class="sort"' in browse(report, tmp_path, "--dump-dom").stdout
    assert len(re.findall(r'class="browser"[^>]*hidden', dom)) == 2
    assert "Transfer between arms" in dom


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
