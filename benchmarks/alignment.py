"""Do latents keep the relations of their items, and more than the activations they are made from?

    python -m benchmarks.alignment [--size full] [--part monet]

SmolLM2-135M, layers.15.out, the GBA and the TopK SAE of benchmarks.selection_data. Items, each
against a space that the model had no part in:

    places      the largest cities of the world, last token of "The city of NAME"; great-circle
                distance; once more with countries as strata: structure finer than the country
    words       frequent nouns of ud_english_ewt, last token of "The WORD"; MiniLM's embedding
    languages   declarations of human rights, mean over the tokens of the first 1,500 characters;
                cosine of the counts of character trigrams

Units are compared as they are and less their mean over the items: means that all items share carry
most of a residual vector, but no relation. delta is against the centred units. ``null`` rows say
how often p <= .05 where nothing is aligned (permuted items, 200 repeats, 199 permutations each).

Part monet: the same items through the small Monet of benchmarks.monet (2.5M tokens of training):
the experts and the halves of its last router beside the units that this router reads.
"""

import argparse
import gzip
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse

from benchmarks.common import Goal, write_result
from benchmarks.concept_data import SHARED, _lines
from benchmarks.minilm import embed_minilm
from benchmarks.selection_data import saes
from sae_apps.alignment import great_circle, relational_alignment
from sae_apps.geospatial.places import load_places
from sae_apps.tasks.align_run import item_codes
from sae_core.models import DEFAULT_MODEL, LanguageModel, load_model

HOOK = "layers.15.out"
SIZES = {"reduced": 200, "full": 600}  # places and words
REPEATS, N_NULL = 200, 40
MIN_CHARS = 3000  # of a language's text


@dataclass(frozen=True)
class Items:
    """Texts, and the space that they are compared with."""

    name: str
    texts: list[str]
    space: np.ndarray
    """An embedding, or distances."""
    distances: bool = False
    strata: list[str] | None = None
    is_pooled: bool = False
    """Mean over the tokens; else the last one."""


def places(n: int) -> Iterator[Items]:
    """Cities by population, one of a name."""
    found = load_places("world", limit=2 * n)
    population = np.array(found.column("population"))
    chosen: dict[str, int] = {}
    for i in np.argsort(-population, kind="stable").tolist():
        chosen.setdefault(found.name[i], i)
    keep = list(chosen.values())[:n]
    km = great_circle(np.asarray(found.lat)[keep], np.asarray(found.lon)[keep])
    texts = [f"The city of {found.name[i]}" for i in keep]
    countries = [str(found.column("country")[i]) for i in keep]
    yield Items("places", texts, km, True)
    yield Items("places within countries", texts, km, True, countries)


def words(n: int) -> Items:
    """The most frequent nouns of the corpus."""
    counts: Counter[str] = Counter()
    for part in ("train_from_sources", "test"):
        for line in _lines("ud_english_ewt", f"en_ewt-{part}.conllu.gz"):
            cells = line.split("\t")
            if len(cells) == 10 and cells[3] == "NOUN" and cells[2].isalpha():
                counts[cells[2].lower()] += 1
    found = [word for word, _ in counts.most_common(n)]
    return Items("words", [f"The {word}" for word in found], embed_minilm(found))


def languages() -> Items:
    """Every text that is long enough, against its character trigrams."""
    with gzip.open(SHARED / "udhr" / "udhr.json.gz", "rt", encoding="utf-8") as file:
        texts = [text for _, text in sorted(json.load(file).items()) if len(text) >= MIN_CHARS]
    number: dict[str, int] = {}
    rows, columns = [], []
    for i, text in enumerate(texts):
        flat = " ".join(text.lower().split())
        for j in range(len(flat) - 2):
            rows.append(i)
            columns.append(number.setdefault(flat[j : j + 3], len(number)))
    counts = sparse.coo_array((np.ones(len(rows)), (rows, columns))).toarray()
    return Items("languages", [text[:1500] for text in texts], counts, is_pooled=True)


def codes_of(
    lm: LanguageModel, items: Items, kinds: dict[str, Any], hook_point: str = HOOK
) -> dict[str, Float[np.ndarray, "n p"] | sparse.csr_array]:
    """Activations of the items and their codes, at the last token or on average."""
    pooling = "mean" if items.is_pooled else "last"
    units, codes = item_codes(lm, hook_point, items.texts, kinds, pooling)
    return {"units, centred": units - units.mean(0), "units": units, **codes}


def rows_of(
    lm: LanguageModel,
    items: Items,
    kinds: dict[str, Any],
    how: Any,
    hook_point: str = HOOK,
    of: str = "",
) -> Iterator[dict]:
    """A row for every kind of code; ``of`` names the model where it is not the default."""
    codes, title = codes_of(lm, items, kinds, hook_point), items.name + of
    for name, one in codes.items():
        base = None if name == "units, centred" else codes["units, centred"]
        found = relational_alignment(
            one, items.space, distances=items.distances, strata=items.strata, baseline=base, **how
        )
        low, high = found.ci or (None, None)
        delta_low, delta_high = found.delta_ci or (None, None)
        yield {
            "name": f"{title} | {name}", "items": title, "codes": name,
            "n_items": found.n_items, "n_dropped": found.n_dropped, "rho": found.rho,
            "rho_low": low, "rho_high": high, "p": found.p, "null_sd": found.null_sd,
            "delta": found.delta, "delta_low": delta_low, "delta_high": delta_high,
            "least_item": float(found.per_item.min()), "rejected": None,
        }  # fmt: skip


def monet(items: Items, how: Any) -> Iterator[dict]:
    """Rows of the small Monet: experts and halves of its last router."""
    from benchmarks.monet_train import SIZES as SHAPES
    from benchmarks.monet_train import trained
    from sae_core.monet.masks import router_layers
    from sae_core.monet.routing import expert_routing

    lm = load_model(str(trained("vertical logits", SHAPES["reduced"])))
    layer = router_layers(lm.model)[-1]
    experts = expert_routing(lm.model, layer, threshold=0.0)
    halves = expert_routing(lm.model, layer, threshold=0.0, units="halves")
    kinds = {"experts": experts, "halves": halves}
    yield from rows_of(lm, items, kinds, how, experts.hook_point, ", small Monet")


def null_rows(codes: Any, items: Items) -> dict[str, Any]:
    """How often permuted items are called aligned."""
    rng = np.random.default_rng(0)
    p = []
    for seed in range(REPEATS):
        chosen = rng.choice(codes.shape[0], N_NULL, replace=False)
        other = rng.permutation(chosen)
        space = items.space[np.ix_(other, other)] if items.distances else items.space[other]
        p.append(
            relational_alignment(codes[chosen], space, distances=items.distances,
                                 permutations=199, n_boot=0, seed=seed).p
        )  # fmt: skip
    empty = dict.fromkeys(
        ("n_dropped", "rho", "rho_low", "rho_high", "p", "null_sd", "delta", "delta_low",
         "delta_high", "least_item")
    )  # fmt: skip
    return {
        "name": f"null | {items.name}", "items": items.name, "codes": "permuted gba",
        "n_items": N_NULL, **empty, "rejected": float(np.mean(np.array(p) <= 0.05)),
    }  # fmt: skip


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """The test keeps its level; latents keep the relations of their activations."""
    found = []
    for row in rows:
        if row["rejected"] is not None:
            value = row["rejected"]
            found.append(Goal(f"{row['name']}: share rejected at .05", value, "<= 0.09",
                              value <= 0.09, f"{REPEATS} repeats"))  # fmt: skip
        if row["codes"] == "gba":
            name = f"{row['items']}: rho of GBA latents over that of the centred units"
            found.append(Goal(name, row["delta"], ">= 0", row["delta"] >= 0,
                              f"[{row['delta_low']:.3f}, {row['delta_high']:.3f}]"))  # fmt: skip
    return found


def main() -> None:
    """Measure and write results/alignment.json."""
    parser = argparse.ArgumentParser(description="Relations among codes and among meanings.")
    parser.add_argument("--size", choices=SIZES, default="reduced")
    parser.add_argument("--part", choices=("monet",), help="into the last result")
    args, started, rows = parser.parse_args(), time.time(), []
    n = SIZES[args.size]
    how = {"permutations": 999 if args.size == "reduced" else 9999, "n_boot": 500}
    if args.part == "monet":
        rows = [row for items in (*places(n), words(n), languages()) for row in monet(items, how)]
        write_result("alignment", rows, goals, started, merge=True)
        return
    lm, kinds = load_model(DEFAULT_MODEL, dtype=torch.bfloat16), saes()
    everything = [*places(n), words(n), languages()]
    for items in everything:
        for row in rows_of(lm, items, kinds, how):
            rows.append(row)
            print(row, flush=True)
    plain = everything[0]
    rows.append(null_rows(codes_of(lm, plain, kinds)["gba"], plain))
    write_result("alignment", rows, goals, started)


if __name__ == "__main__":
    main()
