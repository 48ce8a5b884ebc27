"""Selection, identifiability and separability on the page: numbers, gaps, links, hostile text."""

import math
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from test_report import EVIL, UNDEFINED, Page
from test_separability import planted

from sae_apps.report import (
    ConceptSet,
    IdentifiabilityView,
    LatentVerdicts,
    RunPair,
    Section,
    SelectedRow,
    SelectionReason,
    SelectionTarget,
    SelectionView,
    SeparabilityView,
    build_page,
    identifiability_section,
    latent_anchors,
    latents_section,
    selection_section,
    separability_section,
)
from sae_apps.report.distribution import histogram
from sae_apps.report.formats import DASH
from sae_apps.report.identifiability import random_shares
from sae_apps.report.selection import CHARS, N_PICKS, cut
from sae_apps.report.separability import small
from sae_apps.report.verdicts import decades, group_rows
from sae_apps.suppression.polysemanticity import polysemanticity
from sae_apps.suppression.separability import separability
from sae_core.errors import UserError
from sae_core.identifiability import agreement, chance_mcs
from sae_core.theory import Condition
from sae_core.verdict import FLAGS

CONDITION = asdict(Condition("H1", 3.0, None, 2.0, False, None, None, "L0"))
INTEGRAL = 1e-3  # trapezoids of 1/2000 width
CARDS = [{"latent": j, "freq": 0.1, "max_act": 1.0, "texts": []} for j in (12, 7, 12)]


def pick(k: int, **changes: Any) -> SelectedRow:
    reasons = [SelectionReason(12, 0.5, [" def", " return"]), SelectionReason(4, 0.25)]
    values = {"row_id": 100 + k, "score": 0.9 - k / 100, "text": f"pick {k}", "reasons": reasons}
    return SelectedRow(**(values | changes))


def target(name: str = "code", n: int = 12, **changes: Any) -> SelectionTarget:
    values: dict[str, Any] = {"picks": [pick(k) for k in range(n)], "n_examples": 5}
    values |= {"examples": ["like this"], "n_picked": 40}
    values |= {"pool_scores": [i / 100 for i in range(100)], "pick_scores": [0.9, 0.95]}
    return SelectionTarget(name, **(values | changes))


def selection(**changes: Any) -> SelectionView:
    values = {"targets": [target()], "n_pool": 100, "budget": "2 rows", "method": "presence"}
    return SelectionView(**(values | changes))


def verdicts(**changes: Any) -> LatentVerdicts:
    values: dict[str, Any] = {
        "freq": [0.2, 0.05, 0.01, 0.002, 0.0, 0.03],
        "score": [0.9, 0.5, 0.95, 0.1, 0.0, 0.3],
        "flag": ["reliable", "doubtful", "reliable", "unreliable", "unreliable", "doubtful"],
        "consistency": [0.95, 0.75, 0.99, 0.2, 0.0, 0.6],
    }
    return LatentVerdicts(**(values | changes))


def identified(**changes: Any) -> IdentifiabilityView:
    values: dict[str, Any] = {
        "runs": ["seed0", "seed1"],
        "latents": verdicts(),
        "d_in": 64,
        "n_tokens": 64_000,
        "pairs": [RunPair("seed0", "seed1", 0.71, [0.95, 0.75, 0.99, 0.2, 0.6], 50, 0.002)],
    }
    return IdentifiabilityView(**(values | changes))


def unit(k: int, **changes: Any) -> dict[str, Any]:
    values = {"unit": k, "concept": "dog", "rate": 0.01, "raw": 0.8, "debiased": 0.75}
    return values | {"p": 1 / 21, "q": 0.004, "status": "ok"} | changes


def kind(**changes: Any) -> dict[str, Any]:
    values = {"units": 64, "live": 50, "debiased_live": 0.12, "debiased_top50": 0.41, "best": 0.75}
    shared = {"q": 50, "overlap": 0.07, "chance": 0.013, "shared": None}
    leading = [unit(k) for k in range(3)]
    more = {"passing": 20, "alpha": 0.01, "polysemanticity": shared, "leading": leading}
    return values | more | changes


def separated(**changes: Any) -> SeparabilityView:
    kinds = {"latents": kind(), "residual": kind(debiased_top50=0.2)}
    one = ConceptSet("pets", {"dog": 30, "cat": 31}, kinds, {"dog": 900})
    return SeparabilityView(**({"sets": [one], "permutations": 20} | changes))


def words(section: Section) -> str:
    """What a reader reads, with single spaces."""
    page = Page(str(section.html))
    return " ".join(" ".join(data for _, data in page.texts).split())


def whole(**changes: Any) -> str:
    sections = [
        selection_section(selection(**changes)),
        identifiability_section(identified(conditions=[CONDITION], causes={"rare": 2}, **changes)),
        separability_section(separated(**changes)),
        latents_section(CARDS),
    ]
    return build_page("t", "", sections)


# All three


def test_sections_are_well_formed_and_link_only_to_what_is_there() -> None:
    document = whole(anchors=latent_anchors(CARDS), facts={"SAE": "a run"})
    page = Page(document)
    assert page.errors == []
    assert len(page.ids) == len(set(page.ids))
    links = [attrs["href"] for attrs in page.find("a")]
    assert links.count("#latents-1") == N_PICKS  # latent 12 is a reason of each pick shown
    assert {link.removeprefix("#") for link in links} <= set(page.ids)
    assert 'href="#latents-1"' not in whole()
    tables = re.findall(r"<table>.*?</table>", document, re.DOTALL)
    assert len(tables) == 6
    for table in tables:
        heads = table.count("<th ") + table.count("<th>")
        assert "<caption>" in table and heads == len(re.findall(r'<th scope="', table))
    regions = page.of_class("scroll")
    assert len(regions) == len(tables)
    for attrs in regions:
        assert attrs["tabindex"] == "0" and attrs["role"] == "region" and attrs["aria-label"]


def test_the_first_card_of_a_latent_is_its_anchor() -> None:
    assert latent_anchors(CARDS) == {12: "latents-1", 7: "latents-2"}
    ids = Page(str(latents_section(CARDS).html)).ids
    assert {"latents-1", "latents-2"} <= set(ids)


def test_hostile_text_stays_text() -> None:
    reasons = [SelectionReason(3, 0.5, [EVIL])]
    one = SelectionTarget(EVIL, 3, [EVIL], [pick(0, text=EVIL, row_id=EVIL, reasons=reasons)], 1,
                          [0.1, 0.2], [0.2], [EVIL])  # fmt: skip
    chosen = selection(targets=[one], budget=EVIL, method=EVIL, warnings=[EVIL], facts={EVIL: EVIL},
                       anchors={3: EVIL})  # fmt: skip
    latents = verdicts(group=[EVIL] * 6, reasons={3: EVIL}, tokens={3: [EVIL]})
    run = replace(identified().pairs[0], a=EVIL, b=EVIL)
    condition = CONDITION | {"name": EVIL, "note": EVIL}
    found = identified(runs=[EVIL, "b"], latents=latents, pairs=[run], causes={EVIL: 1},
                       conditions=[condition], anchors={3: EVIL}, facts={EVIL: EVIL})  # fmt: skip
    kinds = {EVIL: kind(leading=[unit(0, concept=EVIL)]), "latents": kind()}
    concepts = ConceptSet(EVIL, {EVIL: 3}, kinds)
    apart = separated(sets=[concepts], correction=EVIL, words={0: [EVIL]}, facts={EVIL: EVIL})
    sections = [selection_section(chosen), identifiability_section(found),
                separability_section(apart)]  # fmt: skip
    document = build_page("t", "", sections)
    page = Page(document)
    assert page.errors == [] and not page.find("img")
    assert len(page.find("script")) == document.count("<script") == 1
    assert not [1 for _, attrs in page.elements if any(n.startswith("on") for n in attrs)]
    for tag in ("h3", "li", "p", "dd", "dt", "bdi", "th", "td", "title"):
        assert any(EVIL in data for name, data in page.texts if name == tag), tag


@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_undefined_numbers_are_dashes(hole: float) -> None:
    reasons = [SelectionReason(3, hole), SelectionReason(4, 0.5)]
    one = target(n=1, picks=[pick(0, score=hole, reasons=reasons)], pool_scores=[hole, 0.5],
                 pick_scores=[hole])  # fmt: skip
    holes = [hole] * 6
    latents = verdicts(score=holes, consistency=holes)
    pairs = [RunPair("a", "b", hole, holes, 50)]
    conditions = [CONDITION | dict.fromkeys(("measured", "low", "high", "met_frac"), hole)]
    numbers = dict.fromkeys(("debiased_live", "debiased_top50", "best"), hole)
    rows = [unit(0, **dict.fromkeys(("rate", "raw", "debiased", "p", "q"), hole))]
    kinds = {"latents": kind(**numbers, leading=rows, polysemanticity={})}
    sections = [
        selection_section(selection(targets=[one], is_exact=False, recall=hole)),
        identifiability_section(identified(latents=latents, pairs=pairs, conditions=conditions)),
        separability_section(separated(sets=[ConceptSet("pets", {"dog": 3}, kinds)])),
    ]
    for section in sections:
        page = Page(str(section.html))
        assert page.errors == [] and DASH in page.text
        assert not re.search(UNDEFINED, str(section.html)), section.id


def test_what_is_absent_is_said_in_a_sentence() -> None:
    assert "nothing was picked" in words(selection_section(selection(targets=[])))
    nothing = replace(target(n=0), n_picked=0, pool_scores=(), pick_scores=())
    html = selection_section(selection(targets=[nothing]))
    assert "Nothing was picked for this target." in words(html) and "<svg" not in html.html
    empty = LatentVerdicts([], [], [])
    html = identifiability_section(IdentifiabilityView([], empty, 8, 0))
    for text in ("No run was given", "No latent fired", "They were not measured"):
        assert text in words(html)
    assert "<table" not in html.html and "<svg" not in html.html
    html = separability_section(SeparabilityView([], 20))
    assert "No labelled texts were measured." in words(html)
    none = ConceptSet("pets", {}, {})
    html = separability_section(SeparabilityView([none], 20))
    for text in ("No kind of unit was measured.", "not recorded", "No unit was live"):
        assert text in words(html)
    dead = ConceptSet("pets", {"dog": 1}, {"latents": kind(live=0, passing=0, leading=[])})
    html = separability_section(SeparabilityView([dead], 20))
    assert "No unit was live" in words(html) and "dog: 1 text." in words(html)


# Selection


def test_selection_says_what_was_asked_and_left_out() -> None:
    counts = {"without_text": 3, "empty": 1, "exact_duplicates": 41, "contaminated": None}
    text = words(selection_section(selection(counts=counts)))
    for seen in ("code (5)", "100 rows", "2 rows", "40 rows were picked", "Every row of the pool",
                 "Without text 3", "No active latent 1", "Exact duplicates 41",
                 "Near duplicates not checked", "In the evaluation set not checked"):  # fmt: skip
        assert seen in text, seen
    many = [target(f"t{k}") for k in range(8)]
    assert "t5 (5) and 2 more" in words(selection_section(selection(targets=many)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_exact": False}, "misses was not measured"),
        ({"is_exact": False, "recall": 0.94}, "finds only 94.0% of the exact best rows"),
        ({"counts": {"empty": 2}}, "2.00% of the pool have no active latent"),
        ({"targets": [target(n_examples=1)]}, "1 example describe"),
        ({"targets": [target(pick_scores=[0.0, 0.3, 0.0])]}, "2 picks share nothing"),
        ({"targets": [target(warnings=["Mind the gap."])]}, "Mind the gap."),
        ({"warnings": ["Mind it all."]}, "Mind it all."),
    ],
)
def test_selection_warns(changes: dict[str, Any], said: str) -> None:
    html = str(selection_section(selection(**changes)).html)
    (listed,) = re.findall(r'<ul class="warnings".*?</ul>', html, re.DOTALL)
    assert said in listed


def test_selection_does_not_warn_of_what_is_well() -> None:
    fine = selection(is_exact=False, recall=0.95, counts={"empty": 1})
    html = str(selection_section(fine).html)
    assert "warnings" not in html and "95.0% of the exact best" in html


def test_picks_have_their_reasons_and_the_rest() -> None:
    page = Page(str(selection_section(selection()).html))
    ranks = [attrs["value"] for attrs in page.of_class("pick")]
    assert ranks == [str(k) for k in range(1, N_PICKS + 1)]
    text = words(selection_section(selection()))
    assert "score 0.900 row 100 pick 0 50% latent 12 def return 25% latent 4" in text
    assert "All other latents together: 25% of the score." in text
    assert "pick 9" in text and "pick 10" not in text and "7 more picks" in text
    widths = [attrs["style"] for tag, attrs in page.elements if tag == "i"]
    assert widths[:2] == ["width:100.0%", "width:50.0%"]
    bare = selection(targets=[target(picks=[pick(0, reasons=())])])
    assert "does not divide into latents" in words(selection_section(bare))


def test_each_target_is_a_fold_and_the_first_is_open() -> None:
    page = Page(str(selection_section(selection(targets=[target("a"), target("b")])).html))
    folds = page.of_class("target")
    assert [fold["id"] for fold in folds] == ["selection-1", "selection-2"]
    assert ["open" in fold for fold in folds] == [True, False]


def test_scores_in_a_sentence() -> None:
    text = words(selection_section(selection()))
    assert "The picks score 0.900 to 0.950, their median is 0.925." in text
    assert "The median of the pool is 0.495." in text  # of 0.00, 0.01, ... 0.99
    assert "The lowest pick is above 90.0% of the pool." in text


def test_long_texts_are_cut() -> None:
    assert cut("x" * CHARS) == "x" * CHARS
    assert cut("x" * (CHARS + 1)) == "x" * CHARS + "…"
    assert cut("  a\r\nb ") == "a\nb"


def test_selection_refuses_more_picks_than_were_picked() -> None:
    with pytest.raises(UserError, match="'code': expected at most 1 picks and 5 examples, got 2"):
        target(n=2, n_picked=1)
    with pytest.raises(UserError, match="0 examples, got 12 and 1"):
        target(n_examples=0)


def test_histogram_is_shares_over_common_bins() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=40), rng.normal(size=4000)
    one, other = histogram({"few": few, "many": [*many, math.nan], "none": [math.inf]})
    assert (one.name, other.name) == ("few", "many") and one.x == other.x
    assert sum(one.y) == pytest.approx(1) and sum(other.y) == pytest.approx(1)
    width = one.x[1] - one.x[0]
    lo = min(few.min(), many.min())
    assert one.x[0] == pytest.approx(lo + width / 2)
    inside = (many >= lo + 10 * width) & (many < lo + 11 * width)
    assert other.y[10] == pytest.approx(inside.mean())
    (same,) = histogram({"same": [2.0, 2.0]})
    assert (same.x, same.y) == ([2.0], [1.0])
    assert histogram({"none": []}) == []


# Identifiability


def test_flags_are_those_of_the_verdict() -> None:
    latents = LatentVerdicts([0.1] * 3, [0.5] * 3, FLAGS)
    assert group_rows(latents)[-1]["flags"] == [1, 1, 1]


@pytest.mark.parametrize(("d", "m"), [(1, 3), (3, 20), (64, 50), (576, 4000)])
def test_random_directions_are_those_of_chance_mcs(d: int, m: int) -> None:
    """E[max] is the integral of P(max > t); below 0 the largest of m lies with 2^-m only."""
    t = np.linspace(0, 1, 2001)
    below = {1: 0.5**m}.get(d, 0.0)  # in R^1 the largest is -1 with that probability
    area = np.trapezoid(random_shares(d, m, t.tolist()), t)
    assert area - below == pytest.approx(chance_mcs(d, m), abs=INTEGRAL)
    assert random_shares(d, m, [0.0, 1.0]) == [pytest.approx(1 - 0.5**m), 0.0]


def test_numbers_of_a_pair_are_those_of_agreement() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, 16, generator=generator) for _ in range(2))
    b[:20] = a[:20] + 0.3 * b[:20]
    found = agreement(a, b, thresholds=(0.7, 0.9))
    pair = RunPair("x", "y", found.pw_mcc, found.mcs.tolist(), found.n_alive_b, found.gap)
    text = words(identifiability_section(identified(d_in=16, pairs=[pair])))
    shares = [f"{100 * found.shares[t]:.1f}%" for t in (0.7, 0.9)]
    row = ["x in y", "30", f"{found.pw_mcc:.3f}", f"{found.mean_mcs:.3f}",
           f"{found.chance_mcs:.3f}", *shares]  # fmt: skip
    assert " ".join(row) in re.sub(r" to [\d.]+", "", text)
    assert 0 < found.shares[0.9] < found.shares[0.7] < 1


def test_curve_is_the_share_above_each_cosine() -> None:
    html = str(identifiability_section(identified()).html)
    tips = set(re.findall(r"<title>(seed0 in seed1 [^<]+)</title>", html))
    assert "seed0 in seed1 100% at 0" in tips and "seed0 in seed1 0% at 1" in tips
    assert any(tip.startswith("seed0 in seed1 60.0% at 0.7") for tip in tips)  # 3 of 5
    assert "random directions 0% at 1" in html


def test_of_many_pairs_the_lowest_median_and_highest_are_drawn() -> None:
    pairs = [RunPair("a", f"r{k}", k / 10, [0.5], 9) for k in (3, 1, 5, 2, 4)]
    html = str(identifiability_section(identified(pairs=pairs)).html)
    legend = html[html.index("legend") : html.index("</ul>")]
    assert re.findall(r"</svg>([^<]+)</li>", legend) == [
        "a in r1", "a in r3", "a in r5", "random directions",
    ]  # fmt: skip
    assert html.count('<th scope="row">a in') == 5 and "the table has all" in html
    three = str(identifiability_section(identified(pairs=pairs[:3])).html)
    assert "the table has all" not in three and "a in r1</li>" in three


def test_groups_are_decades_of_frequency_of_the_alive() -> None:
    names, order = decades(np.array([0.01, 0.0999, 0.1, 1.0, 0.001, 0.0, 0.00099]))
    assert names.tolist() == ["1% to 10%", "1% to 10%", "10% to 100%", "10% to 100%",
                              "0.1% to 1%", "10% to 100%", "0.01% to 0.1%"]  # fmt: skip
    assert order == ["10% to 100%", "1% to 10%", "0.1% to 1%", "0.01% to 0.1%"]
    rows = group_rows(verdicts())
    assert [(row["name"], row["n"]) for row in rows] == [
        ("10% to 100%", 1), ("1% to 10%", 3), ("0.1% to 1%", 1), ("All", 5),
    ]  # fmt: skip
    assert rows[1]["mean"] == "0.780" and rows[1]["shares"] == [2 / 3, 1 / 3]
    assert rows[1]["flags"] == [1, 2, 0] and rows[-1]["flags"] == [2, 2, 1]
    assert rows[1]["score"] == "0.583"


def test_given_groups_keep_their_order() -> None:
    latents = verdicts(group=["b", "a", "b", "a", "dead", "a"])
    assert [(row["name"], row["n"]) for row in group_rows(latents)] == [
        ("b", 2), ("a", 3), ("All", 5),
    ]  # fmt: skip


def test_headline_counts_the_alive() -> None:
    text = words(identifiability_section(identified()))
    assert "Reliable latents 2 40% of the 5 alive latents" in text
    assert "Unreliable latents 1 20%" in text and "(PW-MCC) 0.710" in text
    assert "2 runs are compared: seed0, seed1. The verdicts are on the latents of seed0" in text


def test_one_run_has_scores_instead_of_agreement() -> None:
    view = identified(runs=["seed0"], latents=verdicts(consistency=None), pairs=())
    text = words(identifiability_section(view))
    assert "agreement across seeds is not known" in text and "Mean score" in text
    assert "Mean consistency" not in text and "<svg" not in identifiability_section(view).html
    assert "Most trusted latent 2 score 0.950" in text


def test_most_and_least_consistent_latents() -> None:
    latents = verdicts(reasons={3: "it fires too rarely", 2: "none"}, tokens={2: [" def"]})
    text = words(identifiability_section(identified(latents=latents)))
    most, least = text.split("Most consistent")[1].split("Least consistent")
    assert re.findall(r"latent (\d)", most) == ["2", "0"]
    assert re.findall(r"latent (\d)", least)[:2] == ["3", "5"]  # 4 is dead
    assert "consistency 0.990 fires on 1.0% reliable def" in most and "none" not in most
    assert "unreliable it fires too rarely" in least


def test_conditions_and_causes() -> None:
    conditions = [CONDITION, CONDITION | {"name": "H2", "holds": True, "met_frac": 0.97},
                  CONDITION | {"name": "H3", "holds": None}]  # fmt: skip
    view = identified(conditions=conditions, causes={"few": 2, "many": 9, "no": 0})
    text = words(identifiability_section(view))
    assert "H1 3.00 — 2.00 — no L0 H2 3.00 — 2.00 97.0% yes L0 H3" in text
    assert "cannot say" in text and text.index("many 9") < text.index("few 2")
    assert "no 0" not in text
    short = {name: value for name, value in CONDITION.items() if name != "met_frac"}
    with pytest.raises(UserError, match="'met_frac'"):
        identifiability_section(identified(conditions=[short]))


def test_verdicts_refuse_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="one value a latent everywhere, got .*'score': 2"):
        verdicts(score=[0.5, 0.5])
    with pytest.raises(UserError, match="got 'unclear'"):
        verdicts(flag=["unclear"] * 6)


# Separability


def test_kinds_by_concept_set() -> None:
    text = words(separability_section(separated()))
    assert "q < 0.01" in text and "20 permutations" in text
    assert "pets SAE latents 50 of 64 0.120 0.410 0.750 40.0% 7.0% [1.3%]" in text
    assert "Residual dimensions 50 of 64 0.120 0.200" in text
    assert "dog: 30 texts, 900 tokens; cat: 31 texts." in text
    html = str(separability_section(separated()).html)
    assert 'style="width:41.0%"' in html and 'style="width:20.0%"' in html


def test_records_are_those_of_a_measurement() -> None:
    histogram, permuted = planted(200, 0.3, k=3, units=20, shift=3.0)
    table = separability(histogram, permuted)
    leading = table.table.take(table.top(10)).to_pylist()
    shared = polysemanticity(histogram, permuted)
    record = {**table.summary(), "polysemanticity": shared, "leading": leading}
    one = ConceptSet("planted", dict.fromkeys("abc", 200), {"latents": record})
    text = words(separability_section(separated(sets=[one])))
    best = table.column("debiased").max()
    assert f"latent {table.top(1)[0]} c " in text and f"{best:.3f}" in text
    assert f"{100 * len(table.passing()) / 20:.1f}%" in text


def test_leading_units_with_their_concepts_and_p_values() -> None:
    rows = [unit(k, concept=f"c{k}", q=10.0 ** (-8 + k)) for k in range(12)]
    kinds = {"residual": kind(), "latents": kind(leading=rows)}
    one = ConceptSet("pets", {"dog": 3}, kinds)
    view = separated(sets=[one], words={0: [" def", " x"]}, anchors={1: "latents-1"})
    text = words(separability_section(view))
    assert "latent 0 c0 1.0% 0.800 0.750 0.048 < 10⁻⁶ def x" in text
    assert "c9" in text and "c10" not in text and "SAE latents with the largest" in text
    assert 'href="#latents-1">latent 1<' in str(separability_section(view).html)
    plain = ConceptSet("pets", {"dog": 3}, {"residual": kind()})
    text = words(separability_section(separated(sets=[plain], words={0: [" def"]})))
    assert "unit 0 dog" in text and "latent 0" not in text and "Fires most on" not in text


def test_small_p_values_are_not_spelt_out() -> None:
    assert small(1e-7) == "< 10⁻⁶" and small(1e-6) == "1.0 × 10⁻⁶"
    assert small(0.5) == "0.50" and small(None) == DASH and small(0.0) == "< 10⁻⁶"


def test_records_without_a_field_are_refused() -> None:
    short = {name: value for name, value in kind().items() if name != "passing"}
    with pytest.raises(UserError, match="'passing'"):
        separability_section(separated(sets=[ConceptSet("pets", {}, {"latents": short})]))
