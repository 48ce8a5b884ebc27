"""Which latents know where places are: cities of the world, GB, IT and four US states.

    python -m benchmarks.geography [--size reduced|full] [--model smollm2|gemma]
                                   [--part layers|findings|published|probe]

layers     by layer, area and prompt: how many GBA latents and raw residual units pass Moran's I
           >= 0.3 under free permutation, within labels, and after covariates (see geo_report)
findings   the same with every control at the spots of the study: GBA and TopK latents, raw
           units, MLP neurons, an untrained model, token-shuffled names, the tokens themselves; and
           the ten best latents of each area with their places and what they do on ordinary text
published  the label in the prompt and the BOS in the mean, as in arXiv 2505.03368, on its planar
           weights: how many pass, and how many of them vanish within labels
probe      ridge from latents and from raw units to coordinates, spatially blocked, in every area,
           and within the countries of the world (geography_probe)

Prompts and layers were compared on the four areas; ``--part findings --areas FR DE`` looks at two
that took no part in that choice. Vectors are kept in the cache folder. SAEs were trained on
independent text (geography_saes); "262k" in a name says on how many tokens, where that is not all
there are.
"""

import argparse
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from benchmarks.common import Goal, write_result
from benchmarks.geography_data import (
    AREAS,
    FRESH,
    LABELLED,
    LIMITS,
    PROMPT_NAMES,
    STUDIES,
    Lab,
    Spot,
    codes_of,
    neurons,
    normalised,
    open_lab,
    planar,
    prompt_of,
    residual,
    shuffled,
    units_of,
)
from benchmarks.geography_probe import probe_rows
from sae_apps.geospatial.controls import token_features
from sae_apps.geospatial.places import Places
from sae_apps.geospatial.prompts import ProbeConfig
from sae_apps.geospatial.report import GeoReport, Nulls, geo_report
from sae_apps.tasks.text import open_text
from sae_core.exemplars import LatentExemplars, exemplars
from sae_core.features import SparseFeatures
from sae_core.featurize import featurize
from sae_core.text import split_rows

PARTS = ("layers", "findings", "published", "probe")
NULLS = Nulls(permutations_screened=1999)
TEXT_ROWS = {"reduced": 200, "full": 2000}
N_BEST, N_TEXTS, AROUND = 10, 3, 6
OF_BEST = (
    "feature", "n_active", "I", "I_after", "I_beyond", "verdict", "label", "label_share",
    "label_base",
)  # fmt: skip
CONTEXT = 128
LOG = logging.getLogger(__name__)


def set_rows(
    report: GeoReport, facts: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """A row per set of a report; ``names`` says what the set ``features`` is called."""
    rows = []
    for row in report.summary.to_pylist():
        what = (names or {}).get(row["set"]) or row["set"]
        name = " | ".join([*(str(value) for value in facts.values()), what])
        rows.append({"name": name, "part": "", **facts, **row, "set": what})
    return rows


def layer_rows(lab: Lab, areas: Sequence[str], prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """GBA latents and raw units of every layer."""
    layers = lab.study.layers
    for area in areas:
        places, w = lab.area(area)
        for prompt in prompts:
            config = prompt_of(prompt, area)
            units = units_of(lab, lab.lm, places, config, [residual(n) for n in layers])
            codes = codes_of(lab, places, config, layers.values())
            for n, name in layers.items():
                baselines = {"units": units[residual(n)]}
                report = geo_report(codes[name], places, w, baselines=baselines, nulls=NULLS)
                facts = {"model": lab.model, "area": area, "prompt": prompt, "layer": n}
                yield from _logged(set_rows(report, facts, {"features": name}), "layers")


def finding_rows(lab: Lab, areas: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every control, and the ten best latents, at the spots of the study."""
    for area in areas:
        places, w = lab.area(area)
        for at in lab.study.main[area]:
            facts = {
                "model": lab.model, "area": area, "prompt": at.prompt, "layer": at.layer,
            }  # fmt: skip
            config = prompt_of(at.prompt, area)
            features, baselines = finding_sets(lab, places, at, config)
            report = geo_report(
                features, places, w, baselines=baselines, nulls=NULLS, n_leading=N_BEST
            )
            yield from _logged(set_rows(report, facts, {"features": at.saes[0]}), "findings")
            yield from _logged(best_rows(lab, report, at, facts), "findings")


def finding_sets(
    lab: Lab, places: Places, at: Spot, config: ProbeConfig
) -> tuple[SparseFeatures, dict[str, Any]]:
    """Latents of the first SAE, and what they are compared with."""
    mine = at.saes[0]
    hooks = [residual(at.layer), neurons(at.layer)]
    units = units_of(lab, lab.lm, places, config, hooks)
    random = units_of(lab, lab.random, places, config, hooks)
    mixed = units_of(lab, lab.lm, places, shuffled(config), hooks[:1])
    codes = codes_of(lab, places, config, at.saes)
    sets: dict[str, Any] = {name: codes[name] for name in at.saes[1:]}
    sets |= {
        "units": units[hooks[0]],
        "neurons": units[hooks[1]],
        f"{mine}, shuffled names": codes_of(lab, places, shuffled(config), [mine])[mine],
        "units, shuffled names": mixed[hooks[0]],
        "units, untrained": random[hooks[0]],
        "neurons, untrained": random[hooks[1]],
        "tokens of the name": token_features(lab.lm, places, config),
    }
    return codes[mine], sets


def best_rows(
    lab: Lab, report: GeoReport, at: Spot, facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The leading latents: I, places, label, and the ordinary text that excites them."""
    leading = report.leading.to_pylist()
    found = on_text(lab, at.saes[0], tuple(row["feature"] for row in leading))
    rows = []
    for rank, (row, text) in enumerate(zip(leading, found, strict=True), start=1):
        name = " | ".join([*(str(value) for value in facts.values()), f"best {rank}"])
        rows.append(
            {
                "name": name, "part": "", **facts, "set": f"best {rank}",
                **{key: row[key] for key in OF_BEST},
                "top_places": "; ".join(row["top_places"]),
                "text_freq_rows": text.freq_rows,
                "text": " ⏐ ".join(_excerpt(one.tokens, one.acts) for one in text.texts),
            }
        )  # fmt: skip
    return rows


def on_text(lab: Lab, sae_name: str, latents: tuple[int, ...]) -> tuple[LatentExemplars, ...]:
    """The held-out passages that excite latents most."""
    sae, hook = lab.saes[sae_name]
    features = text_features(lab, sae_name)
    return exemplars(lab.lm, sae, hook, features, latents, N_TEXTS)


@lru_cache(maxsize=8)
def text_features(lab: Lab, sae_name: str) -> SparseFeatures:
    """Held-out text, which no SAE was trained on, as features."""
    sae, hook = lab.saes[sae_name]
    _, held_out = split_rows(open_text("demo"), 0.1, 0)
    rows = [row for row, _ in zip(held_out, range(TEXT_ROWS[lab.size]), strict=False)]
    return featurize(lab.lm, sae, rows, hook, data_id="demo, held out")


def _excerpt(tokens: Sequence[str], acts: Sequence[float]) -> str:
    """A few tokens around the largest activation, which is marked."""
    peak = max(range(len(acts)), key=lambda i: acts[i])
    part = range(max(0, peak - AROUND), min(len(tokens), peak + AROUND))
    return "".join(f"«{tokens[i]}»" if i == peak else tokens[i] for i in part).replace("\n", " ")


def published_rows(lab: Lab, areas: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The label in the prompt: what passes, and what of it is left within labels."""
    names = [name for name in lab.saes if name.endswith("-15")]  # GBA and TopK, most tokens
    hooks = {n: normalised(lab.study, n) for n in lab.study.published}
    for area in areas:
        places, w = lab.area(area)
        w = w if area == "world" else planar(places)
        for prompt, config in LABELLED.items():
            units = units_of(lab, lab.lm, places, config, hooks.values())
            codes = codes_of(lab, places, config, names)
            sets: dict[str, Any] = {name: codes[name] for name in names[1:]}
            sets |= {f"units behind the norm, layer {n}": units[hook] for n, hook in hooks.items()}
            report = geo_report(codes[names[0]], places, w, baselines=sets, nulls=NULLS)
            facts = {"model": lab.model, "area": area, "prompt": prompt}
            rows = set_rows(report, facts, {"features": names[0]})
            for row, name in zip(rows, ("features", *sets), strict=True):
                row["layer"] = next((n for n in hooks if name.endswith(f"layer {n}")), 15)
                row["vanish_within_q"] = row["n_free_q"] - both(report, name)
            yield from _logged(rows, "published")


def both(report: GeoReport, name: str) -> int:
    """Features that pass freely and within labels too."""
    free = set(report.passing("free", name=name))
    return len(free & set(report.passing("within", name=name)))


def coordinate_rows(
    lab: Lab, areas: Sequence[str], prompts: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The probe's rows, each printed as it comes."""
    for row in probe_rows(lab, areas, prompts):
        yield from _logged([row], "probe")


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """World: ten latents with I >= 0.5. Countries: three that survive labels and covariates."""
    mine = [
        row for row in rows
        if row["part"] in ("layers", "findings") and "n_half" in row
        and row["set"].startswith(("gba", "topk")) and "shuffled" not in row["set"]
    ]  # fmt: skip
    world = [row for row in mine if row["area"] == "world"]
    inside = [row for row in mine if row["area"] != "world"]
    found = []
    if world:
        best = max(world, key=lambda row: row["n_half"])
        found.append(Goal("world: latents of one SAE and prompt with I >= 0.5",
                          float(best["n_half"]), ">= 10", best["n_half"] >= 10,
                          f"{best['name']}; largest I {best['max_I']:.2f}"))  # fmt: skip
    if inside:
        best = max(inside, key=lambda row: (row["n_survives_q"], row["max_I_after"] or 0))
        found.append(Goal("within countries: latents with I >= 0.3 that survive (ii) and (iii)",
                          float(best["n_survives_q"]), ">= 3", best["n_survives_q"] >= 3,
                          f"{best['name']}; largest I after covariates "
                          f"{best['max_I_after'] or 0:.2f}"))  # fmt: skip
    return found


def _logged(rows: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """The rows with their part, each printed as it comes."""
    rows = [{**row, "name": f"{part} | {row['name']}", "part": part} for row in rows]
    for row in rows:
        LOG.info("%s", {k: v for k, v in row.items() if k != "part"})
    return rows


def main() -> None:
    """Run the parts and write the result."""
    parser = argparse.ArgumentParser(description="Which latents know where places are.")
    parser.add_argument("--size", choices=LIMITS, default="reduced")
    parser.add_argument("--model", choices=STUDIES, default="smollm2")
    parser.add_argument("--part", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--areas", choices=(*AREAS, *FRESH), nargs="*", default=list(AREAS))
    parser.add_argument("--prompts", choices=PROMPT_NAMES, nargs="*", default=list(PROMPT_NAMES))
    parser.add_argument("--limit", type=int, help="at most so many places an area")
    parser.add_argument("--dry", action="store_true", help="print, write no result")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    by_layer = args.part != ["probe"] or "ask" in args.prompts
    started, lab = time.time(), open_lab(args.model, args.size, args.limit, by_layer=by_layer)
    parts = {
        "layers": lambda: layer_rows(lab, args.areas, args.prompts),
        "findings": lambda: finding_rows(lab, args.areas),
        "published": lambda: published_rows(lab, args.areas),
        "probe": lambda: coordinate_rows(lab, args.areas, args.prompts),
    }
    rows = [row for part in args.part for row in parts[part]()]
    is_part = args.part != list(PARTS) or args.areas != list(AREAS)
    if not args.dry:
        write_result(f"geography_{args.model}", rows, goals, started, merge=is_part)
    else:
        for goal in goals(rows):
            LOG.info("%s", goal)


if __name__ == "__main__":
    main()
