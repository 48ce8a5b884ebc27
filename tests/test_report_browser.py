"""The report page in a real browser: no console errors, the filter, the keyboard, narrow screens.

Headless Chromium prints the page after its script has run. A page is probed from a wrapper that
holds it in a frame, as a reader's tools would, and writes what it saw as JSON.
"""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from sae_apps.report import (
    Section,
    build_page,
    frequencies_section,
    latents_section,
    overview_section,
    training_section,
    write_report,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--enable-logging=stderr",
    "--virtual-time-budget=2000",
    "--window-size=1280,900",
    "--dump-dom",
)
SECONDS = 90  # a browser on a busy two-core machine


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"No browser on PATH (looked for {', '.join(BROWSERS)}).")
    return found


def load(browser: str, url: str, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """The document after its script has run, and what it wrote to the console."""
    command = [browser, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(
    browser: str, page: str, script: str, folder: Path, *flags: str, width: int = 1280
) -> tuple[Any, list[str]]:
    """Run ``script`` on a framed page ``width`` pixels wide; it returns what JSON can hold."""
    wrapper = f"""<!DOCTYPE html><title>probe</title>
<iframe id="frame" width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>
<pre id="seen"></pre>
<script>
document.getElementById("frame").onload = (event) => {{
  const view = event.target.contentWindow, page = view.document;
  const $ = (s) => page.querySelector(s), $$ = (s) => [...page.querySelectorAll(s)];
  const seen = (() => {{ {script} }})();
  document.getElementById("seen").textContent = JSON.stringify(seen);
}};
</script>"""
    (folder / "probe.html").write_text(wrapper, encoding="utf-8")
    dom, console = load(browser, (folder / "probe.html").as_uri(), folder, *flags)
    found = re.search(r'<pre id="seen">(.+?)</pre>', dom, re.DOTALL)
    assert found, dom[-500:]
    return json.loads(html.unescape(found[1])), console


class Cards(HTMLParser):
    """The cards in their order, each with whether it is hidden, and the attributes of the form."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.cards: list[tuple[int, bool]] = []
        self.form: dict[str, str | None] = {}
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("class") == "card":
            self.cards.append((int(values["data-latent"] or -1), "hidden" in values))
        if tag == "form":
            self.form = values


WORDS = {11: "python", 5: "History", 8: "cinema", 2: "Python"}
FREQ = {11: 0.1, 5: 0.4, 8: 0.2, 2: None}


@pytest.fixture(scope="module")
def sample() -> str:
    cards = []
    for latent, word in WORDS.items():
        plain = {"row_id": 1, "meta": {"domain": "x"}, "tokens": ["a", " b"], "acts": [1.0, 0.0]}
        folded = plain | {"tokens": ["<b>", f" {word}", " folded"], "acts": [0.0, 2.0, 0.5]}
        freq = FREQ[latent]
        texts = [plain] * 3 + [folded]
        cards.append({"latent": latent, "freq": freq, "max_act": 2.0, "texts": texts})
    records = [
        {"tokens": 1000 * i, "fvu": 1 / i, "l0": 900 / i + 50, "dead_fraction": 0.01}
        for i in range(1, 200)
    ]
    names = ("mean_freq", "median_freq", "max_freq")
    groups = [
        {"group": k, "taf": 10.0**-k, "n_latents": 9, "n_above": k % 2, "n_dead": 0}
        | dict.fromkeys(names, 0.8 * 10.0**-k)
        for k in range(1, 5)
    ]
    return build_page(
        "A report",
        "of a run",
        [
            overview_section({"fvu": 0.2, "provenance": {"sae_hash": "0123456789abcdef" * 4}}),
            training_section(records),
            frequencies_section(groups),
            latents_section(cards),
        ],
    )


def test_page_runs_without_a_console_message(browser: str, sample: str, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", sample)
    dom, console = load(browser, (tmp_path / "report.html").as_uri(), tmp_path)
    assert console == []
    page = Cards(dom)
    assert page.cards == [(11, False), (5, False), (8, False), (2, False)]
    assert "hidden" not in page.form
    assert "4 of 4 shown" in dom
    assert 'href="#overview" aria-current="true"' in dom


def test_filter_from_the_address(browser: str, sample: str, tmp_path: Path) -> None:
    """#q=...&order=...: two cards of four are left, the one of unknown frequency last."""
    write_report(tmp_path / "report.html", sample)
    url = (tmp_path / "report.html").as_uri() + "#q=PYTHON&order=rare"
    dom, console = load(browser, url, tmp_path)
    assert console == []
    assert Cards(dom).cards == [(11, False), (8, True), (5, True), (2, False)]
    assert "2 of 4 shown" in dom


DRIVE = """
const shown = () => $$(".card").filter((c) => !c.hidden).map((c) => Number(c.dataset.latent));
const set = (control, value, event) => {
  $(control).value = value;
  $(control).dispatchEvent(new view.Event(event));
};
const type = (text) => set("#latents-query", text, "input");
const sort = (by) => set("#latents-order", by, "change");
const seen = {};
for (const by of ["number", "frequent", "rare", "given"]) { sort(by); seen[by] = shown(); }
type(" history "); seen.found = shown(); seen.open = $(".card:not([hidden]) details").open;
type("zebra"); seen.none = shown(); seen.says = !$("#latents-nothing").hidden;
type(""); seen.all = shown(); seen.shut = $$(".card details").every((d) => !d.open);

const chart = $("svg.chart"), marks = [...chart.querySelectorAll(".mark")];
const press = (key) => page.activeElement.dispatchEvent(
  new view.KeyboardEvent("keydown", { key, bubbles: true }));
const here = () => marks.indexOf(page.activeElement);
const visible = (mark) => view.getComputedStyle(mark.querySelector(".tip")).opacity;
seen.stops = marks.filter((m) => m.getAttribute("tabindex") === "0").length;
marks[0].focus(); seen.tip = visible(marks[0]); seen.quiet = visible(marks[1]);
press("ArrowRight"); press("ArrowRight"); press("ArrowLeft"); seen.walk = here();
press("End"); seen.end = here() === marks.length - 1;
press("ArrowRight"); seen.stays = here() === marks.length - 1;
press("Home"); seen.home = here();
seen.label = marks[0].getAttribute("aria-label");
seen.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
seen.dark = view.getComputedStyle(page.body).backgroundColor;
seen.bold = $$("b, i").some((e) => e.textContent.includes("folded"));
return seen;
"""


def test_controls_and_keyboard_on_a_phone(browser: str, sample: str, tmp_path: Path) -> None:
    seen, console = probe(browser, sample, DRIVE, tmp_path, width=390)
    assert console == []
    assert seen["given"] == [11, 5, 8, 2]
    assert seen["number"] == [2, 5, 8, 11]
    assert seen["frequent"] == [5, 8, 11, 2]
    assert seen["rare"] == [11, 8, 5, 2]
    assert seen["found"] == [5] and seen["open"] is True
    assert seen["none"] == [] and seen["says"] is True
    assert seen["all"] == [11, 5, 8, 2] and seen["shut"] is True
    assert seen["stops"] == 1 and seen["walk"] == 1
    assert seen["tip"] == "1" and seen["quiet"] == "0"
    assert seen["end"] and seen["stays"] and seen["home"] == 0
    assert seen["label"] == "1.00 at 1k"
    assert seen["overflow"] <= 0  # nothing is wider than the screen
    assert seen["dark"] == "rgb(255, 255, 255)"
    assert seen["bold"] is False  # "<b>" in a token stayed text


def test_dark_scheme(browser: str, sample: str, tmp_path: Path) -> None:
    script = "return view.getComputedStyle(page.body).backgroundColor"
    seen, _ = probe(browser, sample, script, tmp_path, "--blink-settings=preferredColorScheme=0")
    red, green, blue = map(int, re.findall(r"\d+", seen))
    assert max(red, green, blue) < 50


def test_policy_stops_a_foreign_script(browser: str, tmp_path: Path) -> None:
    """Even markup that a section let through cannot run; the console does hear of it."""
    bad = Section("bad", "Bad", Markup("<script>document.title = 'owned'</script><p>text</p>"))
    seen, console = probe(browser, build_page("safe", "", [bad]), "return page.title", tmp_path)
    assert seen == "safe"
    assert any("Content Security Policy" in line for line in console)
