"""The section on suppression: which lines are drawn, what the table says, nothing is executed."""

import pytest

from sae_apps.report import RemovalCurve, SuppressionView, suppression_section
from sae_core.errors import UserError


def curve(method: str, last: float = 3.0) -> RemovalCurve:
    return RemovalCurve(method, [0.0, 0.5, 0.9], [20.0, 20.5, 20.0 + last])


def row(method: str, increase: float | None, at: float = 0.8) -> dict:
    if increase is None:
        return {"method": method, "at": at, "strength": None, "reason": "removes at most 12%"}
    return {
        "method": method, "at": at, "strength": 1.5, "reason": "", "perplexity_increase": increase,
        "perplexity_increase_low": None, "perplexity_increase_high": 9.0, "kl": 0.0123,
        "erased_refitted": 0.25,
    }  # fmt: skip


def test_the_method_and_the_three_cheapest_rivals_are_drawn() -> None:
    names = ["app", "mask", "range", "aura", "leace", "told"]
    costs = [5.0, 4.0, 1.0, None, 3.0, 2.0]
    curves = [curve(name) for name in names[:-1]] + [RemovalCurve("told", [0, 0.5], [20, 21])]
    matched = [row(name, cost) for name, cost in zip(names, costs, strict=True)]
    html = str(suppression_section(SuppressionView("dog", curves, matched)).html)
    legend = html[html.index("legend") : html.index("</ul>")]
    drawn = {name for name in names if f"</svg>{name}" in legend}
    assert drawn == {"app", "mask", "range", "leace"}
    assert "2 more methods are in the table" in html
    assert html.count("80%") == 6 and html.count("key-line") == 4
    assert html.count('scope="row"') == 6 and "removes at most 12%" in html
    assert "+4.00" in html and "0.0123" in html and "75.0%" in html and "1.5" in html


def test_intervals_and_negative_costs() -> None:
    cheap = row("app", -0.25) | {"perplexity_increase_low": -1.0, "perplexity_increase_high": 0.5}
    html = str(suppression_section(SuppressionView("dog", [], [cheap])).html)
    assert "-0.25" in html and "-1.00 to +0.50" in html and "<figure" not in html


def test_texts_are_escaped_and_the_reader_is_told_whether_words_are_covered() -> None:
    one = {"prompt": "<b>x</b>", "plain": "<script>alert(1)</script>", "suppressed": "fine"}
    covered = str(suppression_section(SuppressionView("dog", continuations=[one])).html)
    bare = str(suppression_section(SuppressionView("dog", (), (), [one], False)).html)
    assert "<script" not in covered and "&lt;script&gt;" in covered and "are covered" in covered
    assert "Texts are shown as they are" in bare and "are covered" not in bare


def test_a_curve_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(UserError, match="app: expected as many perplexities .* got 1 and 2"):
        RemovalCurve("app", [0.0, 1.0], [20.0])
