"""The work behind ``sae-apps monet``: assign experts, save masks, measure, write one folder.

masks/DOMAIN.safetensors   the experts of a domain, for ``ExpertMask.load``; with a score also those
                           that correlate with it
experts.parquet            every expert that belongs to a domain: layer, number, halves, weights
damage.parquet             a row for each mask and domain: perplexity, rise, interval
report.html                the same as a page (with the extra ``report``)
summary.json               settings and the numbers
manifest.json              sha256 of every file, written last
"""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_apps.experts import (
    Assignment,
    Damage,
    assign_experts,
    correlated_experts,
    matched_random,
    measure_damage,
    measure_use,
)
from sae_core.activations import HarvestConfig
from sae_core.errors import UserError
from sae_core.monet.masks import ExpertMask, router_layers
from sae_core.monet.routing import expert_routing
from sae_core.store import atomic_folder

from .common import plain, to_json
from .finished import SUMMARY, finished_folder
from .monet_plan import Plan, file_name

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

LOG = logging.getLogger(__name__)
FORMAT, VERSION = "sae-apps-monet", 1
RANDOM = "random, as heavy as "


def finished(plan: Plan) -> dict[str, Any] | None:
    """What the same command wrote before, whole; None where nothing is there.

    Raises:
        UserError: the folder holds something else; CorruptFileError: a file has changed since.
    """
    return finished_folder(plan.out, plan.identity, FORMAT, VERSION)


def run(plan: Plan) -> dict[str, Any]:
    """Assign, mask, measure and write the folder; returns the summary."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen, model = plan.chosen, plan.lm.model
    routings = {
        layer: expert_routing(model, layer, chosen.threshold) for layer in router_layers(model)
    }
    LOG.info("Reading %d documents for the use of experts", len(plan.to_choose.texts))
    use = measure_use(plan.lm, routings, plan.to_choose.texts, _harvest(plan.lm))
    found = {
        layer: assign_experts(
            one, plan.to_choose.labels, ratio=chosen.ratio, min_tokens=chosen.min_tokens,
            permutations=chosen.permutations, seed=chosen.seed,
        )
        for layer, one in use.items()
    }  # fmt: skip
    masks = _masks(plan, found, use, routings[next(iter(routings))].router.n)
    shown = {name: mask for name, mask in masks.items() if mask.size}
    if not shown:
        raise UserError(
            f"Expected experts of some domain, got none at --ratio {chosen.ratio} and --min-tokens "
            f"{chosen.min_tokens}."
        )
    LOG.info("Measuring %d masks on %d documents", len(shown), len(plan.to_judge.texts))
    damage = measure_damage(
        plan.lm, plan.to_judge.texts, plan.to_judge.labels, shown,
        n_boot=chosen.n_boot, seed=chosen.seed,
    )  # fmt: skip
    summary = _summary(plan, found, masks, damage)
    with atomic_folder(plan.out, overwrite=chosen.overwrite) as folder:
        for name, mask in masks.items():
            if not name.startswith(RANDOM):
                mask.save(folder / "masks" / f"{file_name(name)}.safetensors")
        pq.write_table(_experts(found), folder / "experts.parquet")
        pq.write_table(pa.Table.from_pylist(damage_rows(damage)), folder / "damage.parquet")
        if find_spec("jinja2"):
            _write_page(folder / "report.html", plan, summary)
        content = {"format": FORMAT, "version": VERSION, "identity": plan.identity}
        text = to_json(content | {"summary": summary}) + "\n"
        (folder / SUMMARY).write_text(text, encoding="utf-8")
    return summary


def _harvest(lm: "LanguageModel") -> HarvestConfig:
    size = min(512, lm.max_positions)
    return HarvestConfig(context_size=size, batch_tokens=max(4096, size))


def _masks(
    plan: Plan, found: Mapping[int, Assignment], use: Mapping[int, Any], n: int
) -> dict[str, ExpertMask]:
    """A mask for each domain, one for the score, and the random ones."""
    chosen, domains = plan.chosen, next(iter(found.values())).domains
    masks = {
        name: ExpertMask(n, {layer: one.of(name) for layer, one in found.items()}, name)
        for name in domains
    }
    if chosen.score:
        correlated = {
            layer: correlated_experts(
                one, plan.to_choose.scores, chosen.correlation, min_tokens=chosen.min_tokens
            )[0]
            for layer, one in use.items()
        }
        name = f"{chosen.score} >= {chosen.correlation:g}"
        masks[name] = ExpertMask(n, correlated, f"correlation with {name}")
    for name, mask in list(masks.items()):
        for draw in range(chosen.random_draws if mask.size else 0):
            masks[f"{RANDOM}{name} ({draw + 1})"] = ExpertMask(n, {
                layer: matched_random(found[layer].mass, experts, chosen.seed * 1000 + draw)
                for layer, experts in mask.removed.items()
            })  # fmt: skip
    return masks


def _experts(found: Mapping[int, Assignment]) -> Any:
    import pyarrow as pa

    columns: dict[str, list[Any]] = {
        name: [] for name in ("layer", "expert", "i", "j", "domain", "weight", "second_weight")
    }
    for layer, one in found.items():
        n = int(len(one.domain) ** 0.5)
        experts = np.flatnonzero(one.domain >= 0)
        second, first = np.partition(one.score[:, experts], -2, axis=0)[-2:]
        values = (
            [layer] * len(experts), experts, experts // n, experts % n,
            [one.domains[d] for d in one.domain[experts]], first, second,
        )  # fmt: skip
        for name, value in zip(columns, values, strict=True):
            columns[name] += list(value)
    return pa.table(columns)


def damage_rows(damage: Damage) -> list[dict[str, Any]]:
    """A flat record for each mask and domain."""
    return [
        {"mask": mask, "domain": domain, "perplexity": float(damage.masked[row, column]),
         "plain": float(damage.plain[column]), "rise": float(damage.rise[row, column]),
         "low": float(damage.low[row, column]), "high": float(damage.high[row, column])}
        for row, mask in enumerate(damage.masks) for column, domain in enumerate(damage.domains)
    ]  # fmt: skip


def masks_summary(
    damage: Damage, masks: Mapping[str, ExpertMask], found: Mapping[int, Assignment]
) -> list[dict[str, Any]]:
    """One record a mask that is not random: sizes, rises by domain, and those of its controls."""
    rows = []
    for name in (one for one in masks if not one.startswith(RANDOM)):
        controls = [i for i, one in enumerate(damage.masks) if one.startswith(f"{RANDOM}{name} (")]
        weight = [float(found[layer].mass[e].sum() / max(found[layer].mass.sum(), 1e-30))
                  for layer, e in masks[name].removed.items()]  # fmt: skip
        row: dict[str, Any] = {
            "mask": name, "n_experts": masks[name].size, "weight": float(np.mean(weight)),
            "rise": None, "random": None, "selectivity": None, "random_selectivity": None,
        }  # fmt: skip
        if name in damage.masks:
            rise = damage.rise[damage.masks.index(name)]
            row["rise"] = dict(zip(damage.domains, rise.tolist(), strict=True))
            mean = damage.rise[controls].mean(0)
            row["random"] = dict(zip(damage.domains, mean.tolist(), strict=True))
            if name in damage.domains:
                own = damage.domains.index(name)
                row["selectivity"] = damage.selectivity(name, name)
                others = float(np.delete(mean, own).mean())
                row["random_selectivity"] = float(mean[own]) / others if others > 0 else None
        rows.append(row)
    return rows


def _summary(
    plan: Plan, found: Mapping[int, Assignment], masks: Mapping[str, ExpertMask], damage: Damage
) -> dict[str, Any]:
    routers = [
        {"layer": layer, "domain": name, "n_experts": int(one.n_experts[d]),
         "by_chance": float(one.null_mean[d]), "p": float(one.p[d])}
        for layer, one in found.items() for d, name in enumerate(one.domains)
    ]  # fmt: skip
    return plain({
        "plain": dict(zip(damage.domains, damage.plain.tolist(), strict=True)),
        "masks": masks_summary(damage, masks, found), "routers": routers,
        "documents": [len(plan.to_choose.texts), len(plan.to_judge.texts)],
        "model_id": plan.lm.model_id, "model_revision": plan.lm.revision, "out": str(plan.out),
    })  # fmt: skip


def _write_page(path: Path, plan: Plan, summary: Mapping[str, Any]) -> None:
    from sae_apps.report import build_page, experts_section, write_report

    n_chosen, n_judged = summary["documents"]
    facts = {
        "Experts": f"chosen on {n_chosen:,} documents: routing weight at least "
        f"{plan.chosen.ratio:g} times that in any other domain, active in {plan.chosen.min_tokens} "
        "tokens or more",
        "Perplexity": f"of {n_judged:,} other documents; nothing is rescaled after deleting",
        "Random experts": f"of equal routing weight, mean of {plan.chosen.random_draws} draws",
    }
    section = experts_section(summary["plain"], summary["masks"], facts)
    title = f"Experts of {Path(str(plan.chosen.model)).name}"
    write_report(path, build_page(title, summary["model_id"], [section]))


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary as lines for people."""
    domains = list(summary["plain"])
    width = max(14, *(len(name) for name in domains))
    lines = [
        "perplexity    " + "  ".join(f"{d} {p:.2f}" for d, p in summary["plain"].items()),
        "rise where the experts of a domain are deleted (random ones of equal weight in brackets):",
    ]
    for row in summary["masks"]:
        cells = "no experts" if row["rise"] is None else "  ".join(
            f"{d} {row['rise'][d]:+.2f} [{row['random'][d]:+.2f}]" for d in domains
        )  # fmt: skip
        ratio = "" if row["selectivity"] is None else f"; own / others {row['selectivity']:.1f}"
        lines.append(f"  {row['mask']:<{width}} {row['n_experts']:>7,} experts  {cells}{ratio}")
    return "\n".join([*lines, f"written to    {summary['out']}"])


def estimate(plan: Plan) -> dict[str, Any]:
    """How many documents and passes."""
    n_masks = len(set(plan.to_choose.labels)) + bool(plan.chosen.score)
    passes = 1 + n_masks * (1 + plan.chosen.random_draws)
    return {
        "to_choose": len(plan.to_choose.texts), "to_judge": len(plan.to_judge.texts),
        "passes": passes, "out": str(plan.out),
    }  # fmt: skip


def estimate_text(report: Mapping[str, Any]) -> str:
    """The estimate as lines for people."""
    return (
        f"documents  {report['to_choose']:,} to choose experts on, {report['to_judge']:,} to "
        f"measure on; {report['passes']} passes\nnothing was written"
    )
