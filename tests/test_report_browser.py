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

import numpy as np
import pytest
from markupsafe import Markup

from sae_apps.report import (
    ConceptSet,
    Geography,
    IdentifiabilityView,
    LatentVerdicts,
    MapFeature,
    MapPlaces,
    RemovalCurve,
    RunPair,
    Section,
    SelectedRow,
    SelectionReason,
    SelectionTarget,
    SelectionView,
    SeparabilityView,
    SuppressionView,
    build_page,
    frequencies_section,
    geography_section,
    identifiability_section,
    latent_anchors,
    latents_section,
    overview_section,
    selection_section,
    separability_section,
    suppression_section,
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
document.getElementById("frame").onload = async (event) => {{
  const view = event.target.contentWindow, page = view.document;
  const $ = (s) => page.querySelector(s), $$ = (s) => [...page.querySelectorAll(s)];
  const seen = await (async () => {{ {script} }})();
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
    assert re.findall(r'href="#(\w+)" aria-current="true"', dom) == ["overview"]


def test_navigation_follows_the_reader(browser: str, sample: str, tmp_path: Path) -> None:
    """The page moves at once, its scroll event comes with a frame: here it is sent by hand."""
    script = """
    const marked = () => $$("#sections a[aria-current]").map((a) => a.hash);
    const seen = [marked()];
    const last = page.documentElement.scrollHeight;
    for (const y of [$("#training").offsetTop, $("#frequencies").offsetTop, last, 0]) {
      view.scrollTo({ top: y, behavior: "instant" });
      view.dispatchEvent(new view.Event("scroll"));
      seen.push(marked());
    }
    return seen;
    """
    seen, console = probe(browser, sample, script, tmp_path, width=390)
    assert console == []
    names = ("overview", "training", "frequencies", "latents", "overview")
    assert seen == [[f"#{name}"] for name in names]


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


# ---- the map ----

EVIL = "<img src=x onerror=alert(1)> town"
PLACES = {"West": (10.0, 45.0), EVIL: (15.0, 45.0), "North": (12.0, 47.0), "South": (13.0, 43.0)}


@pytest.fixture(scope="module")
def atlas() -> str:
    """Two features of four places: the first in the west and the north, the second in the south."""
    lon, lat = (np.array(axis) for axis in zip(*PLACES.values(), strict=True))
    places = MapPlaces(list(PLACES), lon, lat, ["Region A", None, "Region B", "Region B"])
    lag, lisa = np.array([0.5, -0.5, 0.5, -1.0]), np.array([1, 3, 0, 4])
    one = MapFeature("latent 7", np.array([2.0, 0, 1, 0]), 0.4, {"q, free": 0.001}, lag, lisa)
    two = MapFeature("latent 9", np.array([0.0, 0, 0, 5]), 0.3, {"q, free": 0.002}, -lag, lisa)
    coast = [np.array([[9.0, 44.0], [12.0, 44.0], [16.0, 46.0]])]
    return build_page("Atlas", "", [geography_section(Geography(places, [one, two], coast))])


WALK = """
const settle = () => new Promise((done) => view.setTimeout(done, 60));
const map = $("#geography-canvas"), scatter = $("#geography-scatter"), tip = $("#geography-tip");
const picture = (canvas = map) => canvas.toDataURL();
const box = map.getBoundingClientRect();
const move = (x, y, kind = "pointermove", on = map) => {
  const at = on.getBoundingClientRect();
  on.dispatchEvent(new view.PointerEvent(kind, {
    clientX: at.left + x, clientY: at.top + y, pointerId: 1, pointerType: "mouse", bubbles: true,
  }));
};
const press = (key) => map.dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true }));
const lines = () => [...tip.children].map((part) => part.textContent);
const pick = (k) => $$('input[name="geography-feature"]')[k].click();
const show = (what) => $(`input[name="geography-view"][value="${what}"]`).click();
const find = (text) => {
  $("#geography-find").value = text;
  $("#geography-find").dispatchEvent(new view.Event("input"));
};
const spot = () => [parseFloat(tip.style.left), parseFloat(tip.style.top) + tip.offsetHeight / 2];
const seen = {};
await settle();
"""


def on_map(browser: str, page: str, script: str, folder: Path, **more: Any) -> Any:
    seen, console = probe(browser, page, WALK + script + "\nreturn seen;", folder, **more)
    # the browser's advice about tests that read a canvas back, not about the page
    assert [line for line in console if "readback" not in line] == []
    return seen


def test_choosing_a_feature_changes_the_map(browser: str, atlas: str, tmp_path: Path) -> None:
    script = """
    const of = () => [picture(), picture(scatter)];
    const ways = { first: of() };
    pick(1); await settle(); ways.second = of();
    seen.chosen = $$("tr.is-chosen").map((row) => row.querySelector("th").textContent);
    seen.named = map.getAttribute("aria-label");
    seen.top = $$("#geography-top li").map((item) => item.textContent);
    show("lisa"); await settle(); ways.lisa = of();
    seen.legend = $("#geography-legend").textContent;
    show("value"); pick(0); await settle(); ways.again = of();
    seen.different = new Set([ways.first[0], ways.second[0], ways.lisa[0]]).size;
    seen.scatters = new Set([ways.first[1], ways.second[1], ways.lisa[1]]).size;
    seen.same = ways.first[0] === ways.again[0] && ways.first[1] === ways.again[1];
    seen.requests = view.performance.getEntriesByType("resource").length;
    seen.static = view.getComputedStyle($(".geo-static")).display;
    """
    seen = on_map(browser, atlas, script, tmp_path)
    assert seen["different"] == 3 and seen["scatters"] == 3 and seen["same"]
    assert seen["chosen"] == ["latent 9"] and seen["named"] == "Map of latent 9, values"
    assert seen["top"] == ["South Region B5"]
    assert "High-High 1" in seen["legend"] and "not significant 1" in seen["legend"]
    assert seen["requests"] == 0 and seen["static"] == "none"


def test_pointing_at_a_place_names_it(browser: str, atlas: str, tmp_path: Path) -> None:
    """The place is found by its name first, which puts the tip beside it."""
    script = """
    find("west"); await settle();
    const [x, y] = [spot()[0], spot()[1]];
    find("nowhere"); await settle(); seen.none = tip.hidden;
    const plain = picture(), quiet = picture(scatter);
    let dx = 0;
    for (; dx < 40 && tip.hidden; dx += 2) { move(x - dx, y); await settle(); }
    seen.lines = lines(); seen.ring = picture() !== plain; seen.linked = picture(scatter) !== quiet;
    move(-500, -500, "pointerleave"); await settle(); seen.left = tip.hidden;
    move(x - dx, y, "pointerdown"); move(x - dx, y, "pointerup"); await settle();
    seen.touched = lines()[0];
    find("img src"); await settle(); seen.evil = lines(); seen.images = $$("img").length;
    map.focus(); press("ArrowRight"); await settle(); seen.walk = [lines()[0]];
    press("ArrowRight"); await settle(); seen.walk.push(lines()[0]);
    press("ArrowRight"); await settle(); seen.walk.push(lines()[0]);
    press("ArrowLeft"); await settle(); seen.walk.push(lines()[0]);
    press("Escape"); await settle(); seen.escaped = tip.hidden;
    """
    seen = on_map(browser, atlas, script, tmp_path)
    assert seen["none"] and seen["lines"] == ["West", "Region A", "value 2", "High-High"]
    assert seen["ring"] and seen["linked"] and seen["left"] and seen["touched"] == "West"
    assert seen["evil"] == [EVIL, "", "silent here", "Low-Low"] and seen["images"] == 0
    assert seen["walk"] == ["West", "North", "North", "West"] and seen["escaped"]


def test_scatter_marks_a_place_at_its_value_and_lag(
    browser: str, atlas: str, tmp_path: Path
) -> None:
    """Values 2, 1 and 0 from right to left; lags 0.5, 0.5 and -1.0 from above."""
    script = """
    const look = () => scatter.getContext("2d")
      .getImageData(0, 0, scatter.width, scatter.height).data.slice();
    const plain = look();
    for (const name of ["west", "north", "south"]) {
      find(name); await settle();
      const now = look(), at = [1e9, 1e9];
      for (let k = 0; k < now.length; k++) {
        if (now[k] === plain[k]) continue;
        const pixel = k >> 2;
        at[0] = Math.min(at[0], pixel % scatter.width);
        at[1] = Math.min(at[1], Math.floor(pixel / scatter.width));
      }
      seen[name] = at;
    }
    """
    seen = on_map(browser, atlas, script, tmp_path)
    west, north, south = seen["west"], seen["north"], seen["south"]
    assert west[0] > north[0] + 20 and north[0] > south[0] + 20
    assert west[0] - north[0] == pytest.approx(north[0] - south[0], abs=2)
    assert west[1] == north[1] and south[1] > north[1] + 40


def test_zoom_drag_and_whole_map(browser: str, atlas: str, tmp_path: Path) -> None:
    script = """
    const whole = picture(), zoom = (way) => $(`[data-zoom="${way}"]`).click();
    zoom("in"); await settle(); const near = picture();
    move(200, 150, "pointerdown"); move(260, 150); move(260, 190); move(260, 190, "pointerup");
    await settle(); const dragged = picture();
    zoom("out"); await settle(); seen.out = picture() === whole;
    zoom("in"); zoom("in"); zoom("all"); await settle(); seen.all = picture() === whole;
    const wheel = (more) => map.dispatchEvent(new view.WheelEvent("wheel",
      { deltaY: -200, bubbles: true, cancelable: true, ...more }));
    seen.scrolls = wheel({}); await settle(); seen.still = picture() === whole;
    seen.held = wheel({ ctrlKey: true }); await settle(); seen.wheeled = picture() !== whole;
    map.focus(); zoom("all"); await settle();
    seen.focused = wheel({}); zoom("all"); seen.end = wheel({ deltaY: 200, ctrlKey: true });
    seen.moves = new Set([whole, near, dragged]).size;
    find("south"); await settle(); seen.inside = spot();
    seen.size = [map.clientWidth, map.clientHeight];
    seen.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
    """
    seen = on_map(browser, atlas, script, tmp_path, width=390)
    assert seen["moves"] == 3 and seen["out"] and seen["all"]
    assert seen["scrolls"] and seen["still"]  # the page scrolls, the map does not
    assert not seen["held"] and seen["wheeled"] and not seen["focused"]
    assert seen["end"]  # the whole map: it cannot become smaller, so the page scrolls
    assert all(0 <= v <= s for v, s in zip(seen["inside"], seen["size"], strict=True))
    assert seen["overflow"] <= 0


def test_map_in_the_dark_and_from_the_address(browser: str, atlas: str, tmp_path: Path) -> None:
    script = """
    const pen = map.getContext("2d"), data = pen.getImageData(0, 0, map.width, map.height).data;
    seen.red = 0;
    for (let i = 0; i < data.length; i += 4) {
      if (data[i] === 215 && data[i + 1] === 25 && data[i + 2] === 28) seen.red++;
    }
    seen.title = map.getAttribute("aria-label");
    """
    script = "view.location.hash = 'feature=2&view=lisa'; await settle(); " + script
    dark = "--blink-settings=preferredColorScheme=0"
    seen, console = probe(browser, atlas, WALK + script + "return seen;", tmp_path, dark)
    assert console == [] and seen["red"] > 5  # High-High in esda's red
    assert seen["title"] == "Map of latent 9, local clusters"


def test_without_a_script_a_drawing_and_a_table_remain(
    browser: str, atlas: str, tmp_path: Path
) -> None:
    start = atlas.rindex("<script>")
    bare = atlas[:start] + atlas[atlas.rindex("</script>") + len("</script>") :]
    script = """
    return { live: $("#geography-live").hidden, dots: $$(".geo-static circle").length,
      drawn: $(".geo-static svg").getBoundingClientRect().height > 100,
      radios: $$('input[type="radio"]').filter((one) => one.offsetParent).length,
      rows: $$(".geo-list tbody tr").length };
    """
    seen, console = probe(browser, bare, script, tmp_path)
    assert console == []
    assert seen == {"live": True, "dots": 2, "drawn": True, "radios": 0, "rows": 2}


# ---- suppression ----


def test_suppression_on_a_phone(browser: str, tmp_path: Path) -> None:
    """Keys stand beside their words, texts wrap, the chart answers to the keyboard."""
    names = ("app", "direction", "leace", "mask")
    curves = [
        RemovalCurve(name, [0.0, 0.4, 0.9], [20.0, 20.2, 21.0 + i]) for i, name in enumerate(names)
    ]
    none = {"at": 0.8, "strength": None, "reason": "removes at most 12%, at strength 3 of up to 3"}
    long = " ".join(["a sentence that goes on and on"] * 6)
    texts = [{"prompt": "<img src=x onerror=alert(1)>", "plain": long, "suppressed": long}]
    view = SuppressionView("dog", curves, [{"method": name, **none} for name in names], texts)
    script = """
    const over = $$("#suppression .legend li").map((li) => {
      const key = li.querySelector("svg").getBoundingClientRect();
      const range = page.createRange(); range.selectNodeContents(li.lastChild);
      return key.width > 60 || key.right > range.getBoundingClientRect().left + 1;
    });
    const cells = $$("#suppression td.words");
    const mark = $("#suppression .mark"); mark.focus();
    return {
      over, images: $$("#suppression td img, #suppression th img").length,
      lines: Math.max(...cells.map((td) => td.getBoundingClientRect().height)),
      wide: Math.max(...cells.map((td) => td.getBoundingClientRect().width)),
      overflow: page.documentElement.scrollWidth - view.innerWidth,
      tip: view.getComputedStyle(mark.querySelector(".tip")).opacity,
    };"""
    page = build_page("Suppression", "", [suppression_section(view)])
    seen, console = probe(browser, page, script, tmp_path, width=390)
    assert console == [] and seen["images"] == 0
    assert seen["over"] == [False] * 4
    assert seen["lines"] > 60 and seen["wide"] < 600  # pixels: several lines, none endless
    assert seen["overflow"] <= 0 and seen["tip"] == "1"


# ---- selection, identifiability, separability ----


@pytest.fixture(scope="module")
def findings() -> str:
    """The three sections with words and names that are too long for a phone, and cards."""
    long = "unbroken" * 30
    cards = [{"latent": j, "freq": 0.1, "max_act": 1.0, "texts": []} for j in (3, 5)]
    anchors = latent_anchors(cards)
    picks = [SelectedRow(k, 0.9, long, [SelectionReason(3, 0.5, [long] * 6)]) for k in range(5)]
    two = (long, "b")
    targets = [SelectionTarget(name, 3, [long], picks, 5, [0.1, 0.5], [0.9]) for name in two]
    asked = SelectionView(targets, 9, "5 rows", long, anchors=anchors, facts={long: long})
    scores = [0.9, 0.1, 0.5, 0.3]
    flags = ["reliable", "unreliable", "doubtful", "doubtful"]
    latents = LatentVerdicts(
        [0.1] * 4, scores, flags, scores, None, {1: long}, dict.fromkeys(range(4), [long])
    )
    pairs = [RunPair(long, "b", 0.5, scores, 4)]
    runs = IdentifiabilityView([long, "b"], latents, 8, 99, pairs, {long: 1}, (), anchors)
    leading = [{"unit": 3, "concept": long, "rate": 0.1, "raw": 0.9, "debiased": 0.8, "p": 0.1}]
    leading = [one | {"q": 0.1} for one in leading]
    names = ("units", "live", "passing", "alpha", "debiased_live", "debiased_top50", "best")
    kind = dict.fromkeys(names, 1) | {"leading": leading}
    concepts = ConceptSet(long, {long: 3, "b": 3}, {"latents": kind})
    apart = SeparabilityView([concepts], 20, words={3: [long] * 6}, anchors=anchors)
    sections = [selection_section(asked), identifiability_section(runs)]
    sections += [separability_section(apart), latents_section(cards)]
    return build_page("Findings", "", sections)


FINDINGS = """
const seen = { errors: $$("[id]").length - new Set($$("[id]").map((e) => e.id)).size };
const folds = $$(".target");
folds[1].querySelector("summary").click();
seen.open = folds.map((fold) => fold.open);
for (const fold of $$("details")) fold.open = true;
seen.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
seen.out = $$("main *").filter((e) => !e.closest(".scroll, svg") && e.getClientRects().length
  && e.getBoundingClientRect().right > page.documentElement.clientWidth + 1).length;
seen.meters = [...new Set($$(".reasons .meter i").map((e) => e.offsetWidth > 10))];
$("#latents-query").value = "zebra";
$("#latents-query").dispatchEvent(new view.Event("input"));
seen.hidden = $("#latents-1").hidden;
const link = $('#selection a[href="#latents-1"]');
link.focus(); seen.focused = page.activeElement === link;
view.location.hash = link.hash;  // a click would leave the frame, whose address is its parent's
await new Promise((done) => view.setTimeout(done, 60));
seen.shown = !$("#latents-1").hidden; seen.query = $("#latents-query").value;
return seen;
"""


@pytest.mark.parametrize("width", [390, 1280])
def test_findings_fit_and_their_links_show_the_card(
    browser: str, findings: str, tmp_path: Path, width: int
) -> None:
    seen, console = probe(browser, findings, FINDINGS, tmp_path, width=width)
    assert console == [] and seen["errors"] == 0
    assert seen["open"] == [True, True]
    assert seen["overflow"] <= 0 and seen["out"] == 0
    assert seen["meters"] == [True]
    assert seen["hidden"] and seen["focused"] and seen["shown"] and seen["query"] == ""
