"""Training curves: reconstruction, sparsity and dead latents against the tokens seen."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_apps.report.charts import Series, line_chart
from sae_apps.report.formats import finite, number, percent, required
from sae_apps.report.page import Section, render

N_TABLE_ROWS = 12
LOG_X_RATIO = 30  # a run whose last step is so many times its first shows its start on a log axis
LOG_Y_RATIO = 20  # L0 falls from thousands to tens; on a linear axis the end would lie on the floor

CURVES = (
    ("fvu", "Variance left unexplained (FVU)", "FVU", number, 0.0,
     "The part of each batch that the reconstruction misses."),
    ("l0", "Active latents per token (L0)", "latents per token", number, None,
     "How many latents fire for one token of the batch, on average."),
    ("dead_fraction", "Dead latents", "share of latents", percent, 0.0,
     "Latents that have not fired for {window}."),
)  # fmt: skip


def training_section(records: Sequence[Any], *, dead_window_tokens: int | None = None) -> Section:
    """Three small charts with a common x axis, and the same values as a table.

    Args:
        records: mappings or StepRecords in training order with tokens [tokens], fvu, l0 [latents
            per token] and dead_fraction; an empty sequence gives empty charts.
        dead_window_tokens: silent tokens after which a latent counts as dead, told to the reader.
    Raises:
        UserError: a record lacks one of these fields.
    """
    tokens = [required(record, "tokens") for record in records]
    log_x = _is_wide(tokens, LOG_X_RATIO)
    window = "a long time"
    if dead_window_tokens is not None:
        window = f"{number(dead_window_tokens)} tokens"
    charts = []
    for name, title, unit, show, floor, template in CURVES:
        note = template.format(window=window)
        values = [required(record, name) for record in records]
        log_y = name != "dead_fraction" and _is_wide(values, LOG_Y_RATIO)
        last = next((v for v in reversed(values) if finite(v) is not None), None)
        chart = line_chart(
            [Series(name, tokens, values)],
            title=title,
            desc=f"{note} {_course(values, show)}",
            x_label="training tokens" + (" (log scale)" if log_x else ""),
            y_label=unit + (" (log scale)" if log_y else ""),
            log_x=log_x,
            log_y=log_y,
            y_floor=floor,
            show_y=show,
        )
        charts.append({"title": title, "last": show(last), "note": note, "svg": chart})
    html = render("training.html.j2", charts=charts, rows=_table(records), n=len(records))
    return Section("training", "Training", html)


def _is_wide(values: Sequence[Any], ratio: float) -> bool:
    """All drawable values positive, and the largest at least ``ratio`` times the smallest."""
    usable = [v for v in map(finite, values) if v is not None]
    return bool(usable) and min(usable) > 0 and max(usable) / min(usable) >= ratio


def _course(values: Sequence[Any], show: Any) -> str:
    usable = [v for v in values if finite(v) is not None]
    if not usable:
        return "There are no values."
    return f"It starts at {show(usable[0])} and ends at {show(usable[-1])}."


def _table(records: Sequence[Any]) -> list[Mapping[str, Any]]:
    """At most ``N_TABLE_ROWS`` records, evenly spaced, the first and the last among them."""
    n = min(len(records), N_TABLE_ROWS)
    places = [i * (len(records) - 1) // max(1, n - 1) for i in range(n)]
    names = ("tokens", "fvu", "l0", "dead_fraction")
    return [{name: required(records[i], name) for name in names} for i in places]
