"""The report page: well-formed and self-contained, hostile texts, undefined numbers, charts."""

import gzip
import html
import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
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
from sae_apps.report import page as page_module
from sae_apps.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    N_MARKS,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    Series,
    domain,
    line_chart,
    log_ticks,
    nice_ticks,
    polylines,
)
from sae_apps.report.formats import DASH, clean, duration, memory, number, percent, short
from sae_apps.report.latents import TOKENS_AFTER, TOKENS_BEFORE, highlight
from sae_core.errors import UserError

EVIL = """<script>alert(1)</script>"'><img src=x onerror=alert(2)></style></title>&amp;"""
VOID = {"meta", "link", "br", "img", "input", "hr", "source", "base", "col", "embed", "wbr"}
NAN = float("nan")
UNDEFINED = re.compile(r"\b(nan|NaN|None|inf|Infinity)\b")


class Page(HTMLParser):
    """Tags on a stack; everything that a check asks for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.errors: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        if self.stack:
            self.errors.append(f"left open: {self.stack}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(names) != len(set(names)):
            self.errors.append(f"<{tag}> repeats an attribute: {names}")
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack[-1] != tag:
            self.errors.append(f"</{tag}> closes {self.stack[-3:]}")
        else:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def find(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attrs for _, attrs in self.elements if name in attrs.get("class", "").split()]

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag not in ("script", "style"))


def record(step: int, **changes: Any) -> dict[str, Any]:
    tokens = 1024 * step
    values = {"fvu": 0.2 + 0.8 / step, "l0": 70 + 2000 / step, "dead_fraction": 0.01}
    return {"step": step, "tokens": tokens, "lr": 1e-3, **values, **changes}


def group(k: int, **changes: Any) -> dict[str, Any]:
    taf = 0.1 / 10**k
    values = {"mean_freq": 0.7 * taf, "median_freq": 0.6 * taf, "max_freq": taf}
    return {
        "group": k,
        "taf": taf,
        "n_latents": 100,
        "n_above": 0,
        "n_dead": k,
        **values,
        **changes,
    }


def text(tokens: list[str], acts: list[float], **changes: Any) -> dict[str, Any]:
    return {"row_id": 7, "meta": {"domain": "code"}, "tokens": tokens, "acts": acts, **changes}


def card(latent: int, n_texts: int = 1, **changes: Any) -> dict[str, Any]:
    texts = [text([" def", " f", "():"], [0.0, 2.0, 4.0]) for _ in range(n_texts)]
    return {"latent": latent, "freq": 0.01 * latent, "max_act": 4.0, "texts": texts, **changes}


def results(**changes: Any) -> dict[str, Any]:
    values = {
        "fvu": 0.1834,
        "l0": 73.21,
        "alive_frac": 0.9826,
        "n_eval_tokens": 40960,
        "kind": "gba",
        "d_in": 576,
        "d_sae": 4608,
        "n_tokens": 3_000_000,
        "n_rows": 2400,
        "wall_seconds": 512.4,
        "loss_recovered": {
            "ce_clean": 3.2,
            "ce_sae": 3.4,
            "ce_zero": 11.0,
            "recovered_zero": 0.972,
            "recovered_mean": 0.951,
        },
        "provenance": {
            "model_id": "smollm2-135m",
            "model_revision": "abc123",
            "hook_point": "layers.15.out",
            "sae_hash": "f" * 64,
            "data_id": "demo",
            "seed": "0",
            "versions": "torch 2.13.0",
        },
    }
    return values | changes


def whole_page() -> str:
    return build_page(
        "A model",
        "seen through its features",
        [
            overview_section(results()),
            training_section([record(i) for i in range(1, 400)], dead_window_tokens=100_000),
            frequencies_section([group(0), group(1, n_above=3), group(2, median_freq=0.0)]),
            latents_section([card(i, n_texts=i % 6) for i in range(20)]),
        ],
    )


def body_page(section: Section) -> Page:
    return Page(build_page("t", "", [section]))


# The page


def test_page_is_well_formed_html() -> None:
    text = whole_page()
    page = Page(text)
    assert page.errors == []
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert len(page.ids) == len(set(page.ids)) > 25
    for tag in ("h1", "main", "nav", "title"):
        assert len([name for name, _ in page.elements if name == tag and tag != "title"]) <= 1
    assert ("title", "A model") in page.texts
    assert page.find("meta")[1]["content"].startswith("width=device-width")


def test_page_parser_notices_a_broken_page() -> None:
    """Control of the check above: a tag left open, an id twice."""
    broken = whole_page().replace("</figcaption>", "", 1)
    assert Page(broken).errors


def test_every_link_has_its_target_and_nothing_points_outside() -> None:
    page = Page(whole_page())
    links = [attrs["href"] for attrs in page.find("a")]
    assert len(links) == 5  # four sections and the skip link
    assert {link.removeprefix("#") for link in links} <= set(page.ids)
    assert [attrs["href"] for attrs in page.find("link")] == ["data:,"]
    for tag, attrs in page.elements:
        assert not {"src", "srcset", "action", "data", "xlink:href"} & set(attrs), (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        for name in ("aria-labelledby", "for"):
            assert set(attrs.get(name, "").split()) <= set(page.ids)
    own = "".join(data for tag, data in page.texts if tag in ("style", "script"))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch|XMLHttp", own)
    assert "http" not in whole_page().replace("http-equiv", "")


def test_policy_admits_the_inlined_script_and_no_other() -> None:
    import base64
    import hashlib

    page = Page(whole_page())
    script = "".join(data for tag, data in page.texts if tag == "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(m["content"] for m in page.find("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_same_input_gives_the_same_page() -> None:
    assert whole_page() == whole_page()


def test_page_without_sections() -> None:
    page = Page(build_page("Empty", "", []))
    assert page.errors == [] and not page.find("nav") and not page.of_class("subtitle")


def test_later_sections_join_the_navigation() -> None:
    section = Section("map", "Places", Markup('<p id="map-1">here</p>'))
    page = Page(build_page("t", "", [overview_section({}), section]))
    assert [a["href"] for a in page.find("a")[1:]] == ["#overview", "#map"]
    assert "map-1" in page.ids


def test_page_refuses_what_it_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Section("one", "One", Markup("<p>x</p>"))
    with pytest.raises(UserError, match="different ids, got one twice"):
        build_page("t", "", [good, good])
    with pytest.raises(UserError, match="html as Markup, got str"):
        Section("one", "One", "<p>x</p>")  # type: ignore[arg-type]
    for bad in ("", "Two", "2", "a b", "content", "x\n"):
        with pytest.raises(UserError, match=r"Section\.id must be"):
            Section(bad, "One", Markup(""))
    with pytest.raises(UserError, match="got str and list"):
        build_page("t", [good], "sub")  # type: ignore[arg-type]
    size = len(build_page("t", "", [good]).encode())
    monkeypatch.setattr(page_module, "MAX_BYTES", size)
    build_page("t", "", [good])
    monkeypatch.setattr(page_module, "MAX_BYTES", size - 1)
    with pytest.raises(UserError, match=f"at most {size - 1:,} bytes, got {size:,}.*'one' with 8"):
        build_page("t", "", [good])


def test_a_full_page_of_long_texts_stays_small() -> None:
    """Twenty latents, ten texts each of 512 tokens that all fire: far below the limit."""
    tokens, acts = [" token<"] * 512, [1.0] * 512
    texts = [text(tokens, acts) for _ in range(10)]
    records = [record(i) for i in range(1, 5000)]
    page = build_page(
        "t",
        "",
        [training_section(records), latents_section([card(i, texts=texts) for i in range(20)])],
    )
    assert len(page.encode()) < page_module.MAX_BYTES / 4


def test_write_report_replaces_the_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.html"
    write_report(target, "old")
    write_report(target, whole_page())
    assert target.read_text(encoding="utf-8") == whole_page()
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]


# Hostile text


def test_hostile_text_stays_text_everywhere() -> None:
    provenance = dict.fromkeys(results()["provenance"], EVIL)
    evil_card = card(
        1,
        texts=[text([EVIL, EVIL], [0.0, 1.0], meta={"domain": EVIL}, row_id=EVIL)],
        shares={EVIL: 0.5},
    )
    sections = [
        overview_section(results(provenance=provenance, kind=EVIL, machine=EVIL, command=EVIL)),
        latents_section([evil_card]),
        Section("evil", EVIL, line_chart([Series(EVIL, [1, 2], [1, 2])] * 2, title=EVIL, desc=EVIL,
                                         x_label=EVIL, y_label=EVIL)),
    ]  # fmt: skip
    document = build_page(EVIL, EVIL, sections)
    page = Page(document)
    assert page.errors == []
    assert len(page.find("script")) == 1 and not page.find("img")
    assert document.count("<script") == 1
    assert not [1 for _, attrs in page.elements if any(n.startswith("on") for n in attrs)]
    for tag in ("h1", "title", "h2", "mark", "desc", "dd", "span", "b", "text"):
        assert any(EVIL in data for name, data in page.texts if name == tag), tag


def test_forbidden_characters_are_replaced() -> None:
    dirty = "a\x00b\x1bc\x85d\ud800e\uffff\U0001ffff\r\nf\r\tg"
    assert clean(dirty) == "a\ufffdb\ufffdc\ufffdd\ufffde\ufffd\ufffd\nf\n\tg"
    document = build_page(
        dirty, "", [latents_section([card(1, texts=[text([dirty], [1.0])])])]
    ).encode("utf-8")
    assert b"\x00" not in document and b"\x1b" not in document


@given(st.lists(st.text(st.characters(exclude_categories=())), max_size=5), st.data())
def test_highlight_keeps_every_text(tokens: list[str], data: st.DataObject) -> None:
    """Whatever the tokens: reading the markup back gives the cleaned text, and only <mark>."""
    n = len(tokens)
    acts = data.draw(st.lists(st.floats(), min_size=n, max_size=n))
    page = Page(f"<p>{highlight(tokens, acts, 9.0)}</p>")
    assert page.errors == []
    assert page.text == "".join(clean(token) for token in tokens)
    assert len(page.find("mark")) == sum(act > 0 and act < math.inf for act in acts)


def test_real_texts_of_many_scripts(shared_data: Path) -> None:
    """The declaration of human rights in every language of the collection, as cards."""
    with gzip.open(shared_data / "udhr" / "udhr.json.gz", "rt", encoding="utf-8") as file:
        texts = json.load(file)
    cards = []
    for i, (code, words) in enumerate(sorted(texts.items())):
        tokens = re.findall(r"\s*\S+", words)[:60]
        acts = [float(j % 5 == 0) for j in range(len(tokens))]
        one = text(tokens, acts, meta={"domain": code})
        cards.append(card(i, max_act=1.0, texts=[one]))
    page = body_page(latents_section(cards))
    assert page.errors == []
    assert len(page.of_class("card")) == len(texts) > 500
    # the strongest token is the first, so each text is shown from its start
    for code in ("eng", "arb", "heb", "cmn_hans", "hin"):
        if code in texts:
            start = "".join(re.findall(r"\s*\S+", texts[code])[: TOKENS_AFTER + 1])
            assert clean(start) in page.text, code


# Undefined numbers


@pytest.mark.parametrize("hole", [None, NAN, math.inf, -math.inf])
def test_undefined_numbers_are_dashes(hole: float | None) -> None:
    holes = {key: hole for key in results() if key not in ("provenance", "loss_recovered")}
    loss = dict.fromkeys(results()["loss_recovered"], hole)
    frequencies = dict.fromkeys(("taf", "mean_freq", "median_freq", "max_freq"), hole)
    sections = [
        overview_section(results(**holes, loss_recovered=loss, provenance=None)),
        training_section([record(1), record(2, fvu=hole, l0=hole, dead_fraction=hole)]),
        frequencies_section([group(0), group(1, **frequencies)]),
        latents_section(
            [card(1, freq=hole, max_act=hole, texts=[text(["a", "b"], [hole, 1.0])],
                  shares={"code": hole})]
        ),
    ]  # fmt: skip
    page = Page(build_page("t", "", sections))
    assert page.errors == []
    assert page.text.count(DASH) > 15
    assert not re.search(UNDEFINED, page.text)
    for tag, attrs in page.elements:
        for name, value in attrs.items():
            if (tag, name) != ("meta", "content"):
                assert not re.search(UNDEFINED, value), (tag, name)


def test_empty_results_give_a_page_of_dashes() -> None:
    page = body_page(overview_section({}))
    values = [attrs for attrs in page.of_class("value")]
    assert len(values) >= 10
    assert page.text.count(DASH) >= len(values)


def test_numbers_as_text() -> None:
    assert number(0.18341) == "0.183"
    assert number(999.7) == "1,000"
    assert number(73.04) == "73.0"
    assert number(1234567) == "1,234,567"
    assert number(0) == "0" and number(0.0) == "0"
    assert number(-2.5) == "\N{MINUS SIGN}2.50"
    assert number(0.0000213) == "2.13 × 10⁻⁵"
    assert percent(0.9826) == "98.3%"
    assert percent(1) == "100%"
    assert percent(0.99996) == ">99.9%"
    assert percent(0.9994) == "99.9%"
    assert percent(0.996, 2) == ">99%"
    assert percent(0.00087, 2) == "0.087%"
    assert duration(3.21) == "3.2 s"
    assert duration(512.4) == "8 min 32 s"
    assert duration(3780) == "1 h 03 min"
    assert memory(3.2 * 2**30) == "3.20 GiB" and memory(2**19) == "0.500 MiB"
    ticks = [0, 0.05, 500, 20_000, 1.5e6, 1e-4, 2e-5]
    assert [short(v) for v in ticks] == ["0", "0.05", "500", "20k", "1.5M", "10⁻⁴", "2×10⁻⁵"]
    for function in (number, percent, duration, memory):
        assert function(None) == function(NAN) == DASH


# Charts


def test_scales_map_known_values() -> None:
    assert Scale(0, 10, 40, 290)(2.5) == pytest.approx(102.5)
    assert Scale(0, 10, 200, 0)(2.5) == pytest.approx(150)
    assert Scale(1, 1000, 0, 300, True)(10) == pytest.approx(100)


def test_ticks_are_round_numbers() -> None:
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert nice_ticks(0, 0.22) == [0, 0.05, 0.1, 0.15, 0.2]
    assert nice_ticks(3, 47) == [10, 20, 30, 40]
    assert log_ticks(1e3, 2e6) == pytest.approx([1e3, 1e4, 1e5, 1e6])
    assert log_ticks(40, 2500) == pytest.approx([50, 100, 200, 500, 1000, 2000])
    assert log_ticks(1, 1e12) == pytest.approx([1, 1e3, 1e6, 1e9, 1e12])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_lie_inside_and_are_few(lo: float, width: float) -> None:
    ticks = nice_ticks(lo, lo + width)
    slack = 1e-6 * max(abs(lo), width)
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    assert lo - slack <= ticks[0] and ticks[-1] <= lo + width + slack


@given(st.floats(1e-9, 1e6), st.floats(1.01, 1e9))
def test_log_ticks_lie_inside_and_are_few(lo: float, ratio: float) -> None:
    ticks = log_ticks(lo, lo * ratio)
    assert 2 <= len(ticks) <= 9
    assert all(lo * (1 - 1e-6) <= tick <= lo * ratio * (1 + 1e-6) for tick in ticks)


def chart(*series: Series, **changes: Any) -> Page:
    labels = {"title": "T", "desc": "D", "x_label": "x", "y_label": "y"}
    page = Page(str(line_chart(series, **(labels | changes))))
    assert page.errors == []
    return page


def test_line_chart_puts_known_points_at_known_places() -> None:
    page = chart(Series("a", [0, 5, 10], [0, 1, 2]))
    x = [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    y = [HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2, TOP]
    (line,) = page.of_class("line")
    want = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    assert line["d"] == want
    dots = [(float(c["cx"]), float(c["cy"])) for c in page.find("circle")]
    assert dots == [(pytest.approx(a), pytest.approx(b)) for a, b in zip(x, y, strict=True)]
    assert page.texts[:2] == [("title", "T"), ("desc", "D")]
    titles = [data for tag, data in page.texts if tag == "title"][1:]
    assert titles == ["0 at 0", "1 at 5", "2 at 10"]
    assert all(mark["tabindex"] == "0" for mark in page.of_class("mark"))


def test_line_chart_on_log_axes() -> None:
    page = chart(Series("a", [1, 10, 100], [1, 10, 1000]), log_x=True, log_y=True)
    points = re.findall(r"([\d.]+),([\d.]+)", page.of_class("line")[0]["d"])
    assert float(points[1][0]) == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.06)
    height = HEIGHT - BOTTOM - TOP
    assert float(points[1][1]) == pytest.approx(HEIGHT - BOTTOM - height / 3, abs=0.06)


def test_what_cannot_be_drawn_is_a_gap() -> None:
    page = chart(Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, NAN, 4.0, 5.0]))
    assert len(page.of_class("line")) == 2
    page = chart(Series("a", [1, 2, 3], [1.0, 0.0, 3.0]), log_y=True)
    assert len(page.of_class("line")) == 2
    assert len(page.of_class("mark")) == 2


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("values", [[], [5.0], [0.0], [3.0, 3.0], [NAN], [-1.0], [1e-300]])
def test_poor_series_do_not_crash(values: list[float], is_log: bool) -> None:
    page = chart(Series("a", values, values), log_x=is_log, log_y=is_log)
    drawable = [v for v in values if math.isfinite(v) and (v > 0 or not is_log)]
    assert len(page.of_class("line")) == (1 if drawable else 0)
    assert bool(page.of_class("empty")) == (not drawable)
    assert chart().of_class("empty")


def test_thinning_keeps_a_spike_and_few_points() -> None:
    n = 20_000
    values = [math.sin(i) for i in range(n)]
    values[777], values[12_345] = 9.0, -9.0
    x, y = Scale(0, n - 1, 0, 250), Scale(-9, 9, 100, 0)
    (run,) = polylines(Series("a", range(n), values), x, y)
    assert len(run) <= 2 * 251
    assert min(py for _, py in run) == 0 and max(py for _, py in run) == 100
    assert [px for px, _ in run] == sorted(px for px, _ in run)


def test_marks_are_few_and_exact() -> None:
    values = [1 / (i + 1) for i in range(5000)]
    page = chart(Series("a", range(5000), values))
    titles = [data for tag, data in page.texts if tag == "title"][1:]
    assert len(titles) == N_MARKS
    assert titles[0] == "1.00 at 0" and titles[-1] == f"{number(values[-1])} at 5k"
    bands = [(float(r["x"]), float(r["width"])) for r in page.of_class("band")]
    for (x0, width), (x1, _) in zip(bands, bands[1:], strict=False):
        assert x0 + width == pytest.approx(x1, abs=0.11)  # no hole between the bands


def test_two_series_are_told_apart() -> None:
    page = chart(Series("a", [1, 2], [1, 2]), Series("b", [1, 2], [2, 1]))
    assert [line["class"] for line in page.of_class("line")] == ["line s0", "line s1"]
    assert ("title", "b 2 at 1") in page.texts


def test_series_of_unequal_length_is_refused() -> None:
    with pytest.raises(UserError, match="got 2 x and 1 y"):
        Series("a", [1, 2], [1])


def test_domain() -> None:
    assert domain([3, None, NAN, 1]) == (1, 3)
    assert domain([3, 1], floor=0) == (0, 3)
    assert domain([0, 3, 1], is_log=True) == (1, 3)
    assert domain([]) == (0, 1) and domain([4]) == (2, 6) and domain([0]) == (-0.5, 0.5)
    assert domain([0, 0], floor=0) == (0, 1)  # a share that is always 0 has no negative axis


# Sections


def values_of(page: Page) -> dict[str, str]:
    """term -> value of the definition lists."""
    terms = [data for tag, data in page.texts if tag == "dt"]
    found, want = {}, iter(terms)
    previous = ""
    for tag, data in page.texts:
        if tag == "dt":
            previous = next(want)
        elif tag == "dd" and previous and previous not in found:
            found[previous] = data
    return found


def test_overview_shows_the_facts() -> None:
    page = body_page(overview_section(results()))
    values = values_of(page)
    assert values["Variance left unexplained (FVU)"] == "0.183"
    assert values["Active latents per token (L0)"] == "73.2"
    assert values["Latents alive"] == "98.3%"
    assert values["Loss recovered"] == "97.2%"
    assert values["Model"] == "smollm2-135m"
    assert values["Hook point"] == "layers.15.out"
    assert values["Kind"] == "GBA (group bias adaptation)"
    assert values["Dictionary size (d_sae)"] == "4,608"
    assert values["Wall time"] == "8 min 32 s"
    assert values["SAE hash"] == "f" * 64
    assert "fired at least once in 40,960 held-out tokens" in page.text
    windowed = body_page(overview_section(results(dead_window_tokens=5000)))
    assert "fired in the last 5,000 tokens" in windowed.text
    assert "95.1%" in page.text and "40,960 held-out tokens" in page.text


def test_overview_reads_alive_from_dead_and_top_level_first() -> None:
    values = results(dead_fraction=0.25, model_id="mine")
    del values["alive_frac"]
    shown = values_of(body_page(overview_section(values)))
    assert shown["Latents alive"] == "75.0%"
    assert shown["Model"] == "mine"
    with pytest.raises(UserError, match="provenance.*mapping, got str"):
        overview_section({"provenance": "x"})


def test_training_shows_three_charts_and_their_last_values() -> None:
    records = [record(i) for i in range(1, 101)]
    page = body_page(training_section(records, dead_window_tokens=5000))
    charts = page.of_class("line")
    assert len(charts) == 3
    last = [d for tag, d in page.texts if d in (number(0.208), number(90.0), percent(0.01))]
    assert len(last) >= 3
    assert "not fired for 5,000 tokens" in page.text
    assert page.text.count("training tokens (log scale)") == 3
    assert "latents per token (log scale)" in page.text  # 2070 -> 90 spans more than 20 times
    assert "FVU (log scale)" not in page.text


def test_training_reads_records_as_objects_too() -> None:
    dicts = [record(i) for i in range(1, 9)]
    objects = [SimpleNamespace(**values) for values in dicts]
    assert training_section(dicts) == training_section(objects)


def test_training_without_records_and_with_a_bad_one() -> None:
    page = body_page(training_section([]))
    assert page.errors == [] and "no training steps" in page.text
    bad = record(1)
    del bad["l0"]
    with pytest.raises(UserError, match="Expected a field 'l0'.*'fvu'"):
        training_section([bad])


@dataclass(frozen=True)
class GroupRecord:
    group: int
    taf: float
    n_latents: int
    mean_freq: float
    median_freq: float
    max_freq: float
    n_above: int
    n_dead: int


def test_frequencies_say_honestly_how_many_are_above() -> None:
    groups = [GroupRecord(**group(0)), GroupRecord(**group(1, n_above=7, max_freq=0.02))]
    page = body_page(frequencies_section(groups))
    sentence = " ".join(page.text.split())
    assert "Here 7 of the 200 latents (3.5%) fire more often than 1.1 × their ceiling" in sentence
    assert "1 (0.50%) never fired" in sentence
    assert len(page.of_class("above")) == 2  # the group's mark and its row
    calm = body_page(frequencies_section([group(0)], n_tokens=4096))
    sentence = " ".join(calm.text.split())
    assert "none of the 100 latents fires more often" in sentence
    assert "never fired, on the 4,096 tokens that were measured." in sentence
    assert not calm.of_class("above")


def test_frequency_chart_puts_the_ceiling_on_the_diagonal() -> None:
    page = body_page(frequencies_section([group(0), group(1), group(2)]))
    numbers = re.compile(r"-?[\d.]+")
    x0, y0, x1, y1 = map(float, numbers.findall(page.of_class("ceiling-line")[0]["d"]))
    for tick in page.of_class("ceiling"):
        left, height, width = map(float, numbers.findall(tick["d"]))
        share = (left + width / 2 - x0) / (x1 - x0)
        assert y0 + share * (y1 - y0) == pytest.approx(height, abs=0.3)
    # the largest frequency equals the ceiling: each bar ends at its tick, and starts below it
    for bar, tick in zip(page.of_class("range"), page.of_class("ceiling"), strict=True):
        _, low, high = map(float, numbers.findall(bar["d"]))
        assert high == pytest.approx(float(numbers.findall(tick["d"])[1]), abs=0.11)
        assert low > high  # SVG counts downwards


def test_frequencies_of_odd_groups() -> None:
    page = body_page(frequencies_section([]))
    assert page.errors == [] and "no groups" in page.text
    dead = group(0, mean_freq=0.0, median_freq=0.0, max_freq=0.0, n_dead=100)
    page = body_page(frequencies_section([dead]))
    assert len(page.of_class("ceiling")) == 1 and not page.of_class("range")
    page = body_page(frequencies_section([group(0, n_latents=0)]))
    assert DASH in page.text


def test_card_shows_its_numbers_and_folds_after_three_texts() -> None:
    page = body_page(latents_section([card(12, n_texts=5, shares={"a": 0.25, "b": 0.75})]))
    (article,) = page.of_class("card")
    assert article["data-latent"] == "12" and float(article["data-freq"]) == pytest.approx(0.12)
    assert ("summary", "2 more texts") in page.texts
    assert len(page.of_class("passage")) == 5 and len(page.of_class("chip")) == 5
    assert [i["style"] for i in page.find("i")] == ["width:75.0%", "width:25.0%"]
    assert "fires on 12.0% of tokens largest activation 4.00" in page.text
    asked = body_page(latents_section([card(12, taf=0.125)]))
    assert "fires on 12.0% of tokens asked for at most 12.5% largest" in asked.text
    few = body_page(latents_section([card(12, n_texts=3)]))
    assert not few.find("details")
    rows = {key: value for key, value in card(12).items() if key != "freq"} | {"freq_rows": 0.5}
    assert "fires on 50.0% of rows" in body_page(latents_section([rows])).text


def test_marks_carry_the_share_of_the_largest_activation() -> None:
    marked = highlight(["a", "b", "c", "d"], [0.0, 1.0, 4.0, 8.0], 4.0)
    marks = Page(str(marked)).find("mark")
    assert [m["style"] for m in marks] == ["--a:0.25", "--a:1.00", "--a:1.00"]
    assert [m["title"] for m in marks] == ["1.00", "4.00", "8.00"]


def test_long_texts_are_cut_around_the_strongest_token() -> None:
    n, peak = 300, 150
    tokens = [f" t{i}" for i in range(n)]
    acts = [0.0] * n
    acts[peak] = 3.0
    page = body_page(latents_section([card(1, texts=[text(tokens, acts)])]))
    shown = [int(i) for i in re.findall(r"\bt(\d+)", page.text)]
    assert shown == list(range(peak - TOKENS_BEFORE, peak + TOKENS_AFTER + 1))
    assert len(page.of_class("cut")) == 2
    for start, n_tokens, n_cuts in ((0, 1, 0), (0, 2, 1), (4, 5, 1), (4, 9, 2)):
        part = text(["a"], [1.0], start=start, n_tokens=n_tokens)
        page = body_page(latents_section([card(1, texts=[part])]))
        assert len(page.of_class("cut")) == n_cuts


def test_latents_degrade_without_a_script() -> None:
    """Without JavaScript the controls stay hidden and every card is there to read."""
    page = Page(whole_page())
    assert "hidden" in next(f for f in page.find("form"))
    assert len(page.of_class("card")) == 20
    assert not [c for c in page.of_class("card") if "hidden" in c]
    assert body_page(latents_section([])).errors == []


def test_latents_refuse_a_text_with_missing_activations() -> None:
    with pytest.raises(
        UserError, match="Row 7: expected as many .* got 1 activations and 2 tokens"
    ):
        latents_section([card(1, texts=[text(["a", "b"], [1.0])])])
    with pytest.raises(UserError, match="Expected a field 'max_act'"):
        latents_section([{"latent": 1, "texts": []}])


# Colours


def luminance(rgb: tuple[float, float, float]) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def palette(scheme: str) -> dict[str, tuple[float, float, float]]:
    css = (Path(page_module.__file__).parent / "templates" / "style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    block = light if scheme == "light" else dark
    colours = {
        name: tuple(int(value[i : i + 2], 16) for i in (0, 2, 4))
        for name, value in re.findall(r"--([a-z]+): #([0-9a-f]{6});", block)
    }
    glow = [float(v) for v in re.search(r"--glow: (\d+) (\d+) (\d+);", block).groups()]  # type: ignore[union-attr]
    top = float(re.search(r"--glow-max: ([\d.]+);", block)[1])  # type: ignore[index]
    paper = colours["paper"]
    colours["mark"] = tuple(top * g + (1 - top) * p for g, p in zip(glow, paper, strict=True))
    return colours  # type: ignore[return-value]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_keeps_its_contrast(scheme: str) -> None:
    """WCAG AA asks 4.5 for text; the strongest highlight included."""
    colour = palette(scheme)
    for name in ("ink", "soft", "accent", "above"):
        assert contrast(colour[name], colour["paper"]) >= 4.5, name
        assert contrast(colour[name], colour["panel"]) >= 4.5, name
    assert contrast(colour["ink"], colour["mark"]) >= 4.5
    # and the highlight is seen at all
    assert contrast(colour["mark"], colour["paper"]) >= 1.4
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)


def test_templates_hold_no_escape_hatch() -> None:
    """No template turns escaping off; html.escape agrees with what the page does to text."""
    folder = Path(page_module.__file__).parent / "templates"
    sources = "".join(path.read_text() for path in folder.glob("*.j2"))
    assert "safe" not in re.findall(r"\|\s*(\w+)", sources) and "autoescape" not in sources
    assert html.escape("<b>", quote=True) in build_page("<b>", "", [])
