"""The README's tables of benchmarks.geography and benchmarks.moran."""

from collections.abc import Callable
from typing import Any

from benchmarks.common import cell, table

Result = dict[str, Any]
NULLS = ("free", "within", "after", "beyond")
HEADS = dict(zip(NULLS, ("(i) free", "(ii) within labels", "(iii) after covariates",
                         "beyond labels"), strict=True))  # fmt: skip
N_BEST, N_PLACES, N_TEXT = 6, 4, 150
SHOWN_I = 0.3  # of the best latents
IN_FULL = (("world", "name"), ("GB", "ask"))
KINDS: dict[str, Callable[[str], bool]] = {
    "GBA latents": lambda name: name.startswith("gba") and "shuffled" not in name,
    "TopK latents": lambda name: name.startswith("topk"),
    "raw units": lambda name: name == "units",
    "GBA, tokens of names shuffled": lambda name: name.startswith("gba") and "shuffled" in name,
    "raw units, untrained model": lambda name: name == "units, untrained",
}


def counts(row: dict[str, Any]) -> dict[str, str]:
    """How many features of a set pass, by q."""
    return {
        "tested": str(row["n_tested"]),
        "I ≥ 0.5": str(row["n_half"]),
        **{HEADS[null]: cell(row.get(f"n_{null}_q")) for null in NULLS},
        "(i) to (iii)": str(row["n_survives_q"]),
        "largest I": f"{row['max_I'] or 0:.2f}",
        "… beyond labels": f"{row['max_I_beyond'] or 0:.2f}" if "max_I_beyond" in row else "–",
    }


def findings(result: Result) -> str:
    """Every set at the spots that the README shows in full."""
    return table([
        {"places": row["area"], "prompt": row["prompt"], "layer": row["layer"], "what": row["set"]}
        | counts(row)
        for row in result["rows"]
        if row["part"] == "findings" and "n_half" in row
        and (row["area"], row["prompt"]) in IN_FULL
    ])  # fmt: skip


def spots(result: Result) -> str:
    """A row a spot: latents, raw units, and latents of shuffled names."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in result["rows"]:
        if row["part"] != "findings" or "n_half" not in row:
            continue
        what = next((head for head, kind in KINDS.items() if kind(row["set"])), None)
        if what is not None:
            spot = (row["area"], row["prompt"], str(row["layer"]))
            found.setdefault(spot, {})[what] = (
                f"{row['n_free_q']} / {row['n_survives_q']} of {row['n_tested']}, "
                f"{row['max_I'] or 0:.2f}"
            )
    return table([
        {"places": area, "prompt": prompt, "layer": layer} | {k: cells.get(k, "–") for k in KINDS}
        for (area, prompt, layer), cells in found.items()
    ])  # fmt: skip


def layers(result: Result) -> str:
    """GBA latents beside raw units, by layer and prompt, on the world."""
    return table([
        {"places": row["area"], "prompt": row["prompt"], "layer": row["layer"], "what": row["set"]}
        | {key: value for key, value in counts(row).items() if key != "(iii) after covariates"}
        for row in result["rows"]
        if row["part"] == "layers" and row["area"] == "world"
    ])  # fmt: skip


def best(result: Result) -> str:
    """The leading latents of each spot with their places and their ordinary text."""
    return table([
        {
            "places": f"{row['area']}, {row['prompt']}", "latent": row["feature"],
            "I": f"{row['I']:.2f}", "after": _two(row["I_after"]), "beyond": _two(row["I_beyond"]),
            "verdict": row["verdict"], "label": f"{row['label']} {row['label_share']:.0%}",
            "strongest at": ", ".join(row["top_places"].split("; ")[:N_PLACES]),
            "in ordinary text": _short(row["text"]),
        }
        for row in result["rows"]
        if "top_places" in row and row["I"] >= SHOWN_I
        and int(row["set"].removeprefix("best ")) <= N_BEST
    ])  # fmt: skip


def published(result: Result) -> str:
    """The label in the prompt, and what of it is left within labels."""
    return table([
        {
            "places": row["area"], "prompt": row["prompt"], "what": row["set"],
            "tested": row["n_tested"], "I ≥ 0.3, p < 0.01": row["n_free_p"],
            "after correction": row["n_free_q"], "gone within labels": row["vanish_within_q"],
            "beyond labels": cell(row.get("n_beyond_q")), "largest I": f"{row['max_I'] or 0:.2f}",
        }
        for row in result["rows"]
        if row["part"] == "published"
    ])  # fmt: skip


def coordinates(result: Result) -> str:
    """Ridge to latitude and longitude."""
    return table([
        {
            "places": row["area"], "prompt": row["prompt"], "layer": row["layer"],
            "from": row["set"], "folds": row["folds"], "R² latitude": f"{row['r2_lat']:.2f}",
            "R² longitude": f"{row['r2_lon']:.2f}", "median error [km]": f"{row['median_km']:,.0f}",
            "chance [km]": f"{row['chance_km']:,.0f}",
        }
        for row in result["rows"]
        if row["part"] == "probe"
    ])  # fmt: skip


def moran(result: Result) -> str:
    """Times of the test beside the loop over esda's."""
    return table([
        {
            "what": row["what"], "places": f"{row['n']:,}", "features": f"{row['features']:,}",
            "permutations": f"{row['permutations']:,}", "seconds": cell(row["seconds"]),
            "ms a feature": cell(row["ms_per_feature"]), "× esda": cell(row["speedup"]),
            "peak MB": cell(row["peak_mb"] and round(row["peak_mb"])),
        }
        for row in result["rows"]
        if row["seconds"] is not None
    ])  # fmt: skip


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _short(text: str) -> str:
    """The first excerpt, in a table cell."""
    first = text.split(" ⏐ ")[0].strip()
    return (first if len(first) <= N_TEXT else first[:N_TEXT] + "…").replace("|", "¦")


GEOGRAPHY: dict[str, tuple[str, Callable[[Result], str]]] = {
    f"geography_{name}_{model}": (f"geography_{model}", make)
    for model in ("gemma", "smollm2")
    for name, make in (
        ("findings", findings), ("spots", spots), ("layers", layers), ("best", best),
        ("published", published), ("coordinates", coordinates),
    )
}  # fmt: skip
