"""Deleted experts of a Monet model: the rise in perplexity by mask and domain, with controls."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_apps.report.formats import number, percent
from sae_apps.report.page import Section, render


def experts_section(
    plain: Mapping[str, float], masks: Sequence[Mapping[str, Any]], facts: Mapping[str, str]
) -> Section:
    """One row a mask, one column a domain; random experts of equal weight in brackets.

    Args:
        plain: perplexity by domain, without a mask.
        masks: mask, n_experts, weight (share of the routing weight), rise and random by domain
            (None where there is nothing to delete), selectivity and random_selectivity or None.
        facts: name and sentence, how this was measured.
    """
    html = render(
        "experts.html.j2",
        domains=list(plain),
        plain=[number(value, 4) for value in plain.values()],
        rows=[_row(one, list(plain)) for one in masks],
        facts=facts,
    )
    return Section("experts", "Deleted experts", html)


def _row(mask: Mapping[str, Any], domains: Sequence[str]) -> dict[str, Any]:
    size, weight = f"{mask['n_experts']:,}", percent(mask["weight"], 2)
    row = {"mask": mask["mask"], "n": size, "weight": weight}
    if mask["rise"] is None:
        return row | {"cells": None}
    cells = [
        {"rise": f"{mask['rise'][d]:+.2f}", "random": f"{mask['random'][d]:+.2f}",
         "own": d == mask["mask"]}
        for d in domains
    ]  # fmt: skip
    ratios = (mask["selectivity"], mask["random_selectivity"])
    own, random = ("\u2013" if one is None else number(one, 3) for one in ratios)
    return row | {"cells": cells, "ratio": own, "random_ratio": random}
