"""The demo's report: one section for the run, one for each application, from the stages' files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import read_json
from .demo_data import TARGETS
from .featurize import open_run
from .runs import RunFolder, read_metrics
from .select_files import KEY

if TYPE_CHECKING:
    from sae_apps.report import (
        IdentifiabilityView,
        Section,
        SelectionTarget,
        SelectionView,
        SeparabilityView,
    )

    from .demo_stages import Found
    from .select_files import Output

N_EXAMPLES, N_PICKS, N_TOKENS = 3, 10, 6
CHECKED = ("rows", "without_text", "empty", "exact_duplicates", "picked", "picked_tokens")


def write_page(
    path: Path, results: Mapping[str, Any], cards: Sequence[Mapping[str, Any]], found: "Found"
) -> None:
    """Key facts, training, rates, what to rely on, latents, and what the applications found."""
    from sae_apps.report import (
        build_page,
        frequencies_section,
        identifiability_section,
        latents_section,
        overview_section,
        training_section,
        write_report,
    )

    out = path.parent
    sections = [
        overview_section(results),
        training_section(
            read_metrics(RunFolder(out).metrics_file),
            dead_window_tokens=results["dead_after_tokens"],
        ),
        frequencies_section(results["groups"], n_tokens=results["n_eval_tokens"]),
        identifiability_section(identifiability(out, found, cards)),
        latents_section(cards),
        *applications(found, cards),
    ]
    subtitle = (
        f"{results['kind'].upper()} with {results['d_sae']:,} latents on "
        f"{results['provenance']['hook_point']} of {results['provenance']['model_id']}"
    )
    write_report(path, build_page("Sparse autoencoder: the demo run", subtitle, sections))


def applications(found: "Found", cards: Sequence[Mapping[str, Any]]) -> "list[Section]":
    """A section for each application that ran."""
    from sae_apps.report import (
        geography_section,
        selection_section,
        separability_section,
        suppression_section,
    )

    sections = []
    if found.picks is not None:
        sections.append(selection_section(selection(found.picks, found.data, cards)))
    if found.geography is not None:
        from .geo_page import geography

        plan, summary = found.geography
        sections.append(geography_section(geography(plan.out, plan, summary)))
    if found.separability is not None:
        sections.append(separability_section(separability(found.separability, cards)))
    if found.suppression is not None:
        from .suppress_page import suppression_view

        plan, summary = found.suppression
        sections.append(suppression_section(suppression_view(plan.out, plan, summary)))
    return sections


def strongest(cards: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Latent to the distinct tokens on which it fires most in its card's texts."""
    found = {}
    for card in cards:
        pairs = [
            pair
            for text in card["texts"]
            for pair in zip(text["acts"], text["tokens"], strict=True)
        ]
        ordered = [token for act, token in sorted(pairs, key=lambda one: -one[0]) if act > 0]
        found[card["latent"]] = list(dict.fromkeys(ordered))[:N_TOKENS]
    return found


def identifiability(
    out: Path, found: "Found", cards: Sequence[Mapping[str, Any]]
) -> "IdentifiabilityView":
    """Both runs compared, and the verdict on every latent of the first."""
    import torch

    from sae_apps.report import IdentifiabilityView, LatentVerdicts, RunPair, latent_anchors
    from sae_core.identifiability import agreement
    from sae_core.verdict import FLAGS

    runs = [open_run(str(out)), open_run(str(found.second))]
    names = (f"seed {runs[0].settings.run.seed}", f"seed {runs[1].settings.run.seed}")
    alive = [torch.tensor(run.extra["freq"]) > 0 for run in runs]
    one = agreement(
        *(run.sae.W_dec.detach().float().cpu() for run in runs), alive_a=alive[0], alive_b=alive[1]
    )
    kept, report = runs[0].extra["identify"], found.identify
    group, taf = runs[0].extra["group"], runs[0].extra["taf"]
    return IdentifiabilityView(
        runs=names,
        latents=LatentVerdicts(
            freq=runs[0].extra["freq"],
            score=kept["score"],
            flag=[FLAGS[place] for place in kept["flag"]],
            consistency=kept["consistency"],
            group=[f"at most {taf[place]:.3%}" for place in group] if group else None,
            reasons={
                latent["latent"]: latent["reason"]
                for some in report["examples"].values()
                for latent in some
            },
            tokens=strongest(cards),
        ),
        d_in=runs[0].sae.d_in,
        n_tokens=report["n_tokens"],
        pairs=[RunPair(*names, one.pw_mcc, one.mcs[one.alive].tolist(), one.n_alive_b, one.gap)],
        causes=report["causes"],
        conditions=report["conditions"],
        anchors=latent_anchors(cards),
        facts={
            "Runs": f"{' and '.join(names)}: the same activations in another order, other initial "
            "weights",
        },
    )


def selection(
    output: "Output", data: Path, cards: Sequence[Mapping[str, Any]]
) -> "SelectionView":
    """The picks of both targets with their reasons, against the scores of the whole pool."""
    import pyarrow.parquet as pq

    from sae_apps.report import SelectionView, latent_anchors

    meta = read_json(output.meta)
    picks = _lines(output.picks)
    sources = [row["source"] for row in _lines(data / "pool.jsonl")]
    scores = pq.read_table(output.data["scores"], columns=["score", "group"]).to_pylist()
    right = sum(row["source"] == _target(row[KEY]["group"]) for row in picks)
    chance = sum(sources.count(_target(row[KEY]["group"])) for row in picks) / len(sources)
    return SelectionView(
        targets=[_selected(name, data, picks, scores) for name in TARGETS],
        n_pool=len(sources),
        budget=f"{len(picks)} rows",
        method="presence of latents, mean of the three nearest examples",
        counts={name: meta["summary"]["counts"][name] for name in CHECKED},
        anchors=latent_anchors(cards),
        facts={
            "Pool": ", ".join(
                f"{sources.count(name)} of {name}" for name in dict.fromkeys(sources)
            ),
            "Check": f"{right} of {len(picks)} picks come from the source of their target; picked "
            f"at random {chance:.1f} would. The examples of the targets are not in the pool.",
        },
    )


def _selected(
    name: str, data: Path, picks: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]
) -> "SelectionTarget":
    from sae_apps.report import SelectedRow, SelectionReason, SelectionTarget

    examples = [_text(row) for row in _lines(data / f"{name}.jsonl")]
    mine = [row for row in picks if _target(row[KEY]["group"]) == name]
    return SelectionTarget(
        name=name,
        n_examples=len(examples),
        examples=examples[:N_EXAMPLES],
        picks=[
            SelectedRow(
                row[KEY]["row_id"],
                row[KEY]["score"],
                _text(row),
                [
                    SelectionReason(why["latent"], why["share"], why["tokens"].split(" | "))
                    for why in row[KEY]["reasons"]
                ],
            )
            for row in mine[:N_PICKS]
        ],
        n_picked=len(mine),
        pool_scores=[row["score"] for row in scores if _target(row["group"]) == name],
        pick_scores=[row[KEY]["score"] for row in mine],
    )


def separability(
    summary: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]
) -> "SeparabilityView":
    """Latents, residual dimensions and neurons under praise and blame."""
    from sae_apps.report import ConceptSet, SeparabilityView, latent_anchors

    from .separability import SeparabilityOptions

    one = ConceptSet("sentences on films", summary["texts"], summary["units"], summary["tokens"])
    return SeparabilityView(
        [one],
        SeparabilityOptions.permutations,
        words=strongest(cards),
        anchors=latent_anchors(cards),
    )


def _target(group: str) -> str:
    """``arithmetic:13`` is the example 13 of the target arithmetic."""
    return group.rpartition(":")[0] or group


def _text(row: Mapping[str, Any]) -> str:
    return f"{row['prompt']}\n{row['response']}"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
