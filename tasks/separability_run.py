"""The work behind ``sae-apps separability``: read labelled texts, measure, write one folder.

KIND.parquet     every unit of a kind: distances, p-values, status
summary.json     settings, texts and tokens by concept, scores by kind, pairs of concepts
manifest.json    sha256 of every file, written last
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_apps.suppression.concepts import LabelledTexts, require_classes
from sae_apps.suppression.measure import MeasureConfig, measure
from sae_apps.suppression.polysemanticity import polysemanticity
from sae_apps.suppression.separability import pairwise, separability
from sae_apps.suppression.stream import unit_stream
from sae_apps.suppression.units import open_units
from sae_core.activations import HarvestConfig
from sae_core.errors import UserError
from sae_core.records import read_records
from sae_core.store import atomic_folder
from sae_core.text import rows_from_texts
from sae_core.tokens import count_tokens
from sae_core.weights import refuse_misspelt

from .cached import absent_model
from .common import plain, size, to_json
from .featurize import FinishedRun, open_run
from .finished import SUMMARY, finished_folder
from .progress import Progress, duration

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

    from .separability import ConceptOptions, SeparabilityOptions

FORMAT, VERSION = "sae-apps-separability", 1
PROBE_TEXTS = 32


@dataclass(frozen=True)
class Plan:
    """What is to be done; the model is opened only where it is needed."""

    chosen: "SeparabilityOptions"
    run: FinishedRun
    data: LabelledTexts
    """Balanced."""
    out: Path
    identity: dict[str, Any]
    """All that the result depends on."""
    accept_terms: bool = False

    @property
    def harvest(self) -> HarvestConfig:
        """Chunks and batches."""
        size = self.chosen.context_size
        return HarvestConfig(context_size=size, batch_tokens=max(2048, size))

    @cached_property
    def lm(self) -> "LanguageModel":
        """The model of the run, checked to be the one that the SAE was trained on."""
        from sae_apps.selection.encoder import load_encoder

        device = self.chosen.device or self.run.settings.model.device
        return load_encoder(
            self.run.folder.path,
            model=self.chosen.model,
            device=device,
            accept_terms=self.accept_terms,
        ).lm


def read_labelled(options: "ConceptOptions") -> LabelledTexts:
    """Texts and labels of a file.

    Raises:
        UserError: no file, or a record without the columns; see ``read_records``.
    """
    if not options.data:
        raise UserError("Expected a file of labelled texts, got none: add --data FILE.")
    path = Path(options.data)
    if not path.is_file():
        raise UserError(f"Expected a file of labelled texts at {path}, got nothing.")
    columns = [options.text, options.label, *([options.group] if options.group else [])]
    rows: list[list[Any]] = []
    for place, record in read_records(path):
        for name in columns:
            if record.get(name) is None:
                known = ", ".join(record) or "none"
                raise UserError(f"{place}: expected the column {name!r}, got {known}.")
        rows.append([record[name] for name in columns])
    texts, labels, groups = ([row[i] for row in rows if i < len(row)] for i in range(3))
    data = LabelledTexts(
        path.stem, tuple(texts), tuple(map(str, labels)), tuple(map(str, groups)), path.name
    )
    if options.concepts:
        data = data.only([name.strip() for name in options.concepts.split(",")])
    return data


def make_plan(
    chosen: "SeparabilityOptions", concept: "ConceptOptions", *, accept_terms: bool = False
) -> Plan:
    """Open the run and read the texts.

    Raises:
        UserError: anything that is missing or does not fit, before the model is read.
    """
    finished_run = open_run(chosen.run, device=chosen.device)
    if chosen.model:
        refuse_misspelt(chosen.model)
    found = read_labelled(concept)
    require_classes(found, MeasureConfig().min_texts)
    data = found.balanced(concept.n_per_class, chosen.seed)
    out = Path(chosen.out) if chosen.out else finished_run.folder.path / f"separability-{data.name}"
    identity = {
        "data": data.digest(),
        "classes": list(data.classes),
        "sae_hash": finished_run.sae.hash(),
        "hook_point": finished_run.hook_point,
        "model": chosen.model or finished_run.settings.model.name,
    }
    names = ("units", "bins", "permutations", "correction", "context_size", "seed")
    identity |= {name: value for name, value in asdict(chosen).items() if name in names}
    return Plan(chosen, finished_run, data, out, plain(identity), accept_terms)


def finished(plan: Plan) -> dict[str, Any] | None:
    """What the same command wrote before, whole; None where nothing is there.

    Raises:
        UserError: the folder holds something else; CorruptFileError: a file has changed since.
    """
    return finished_folder(plan.out, plan.identity, FORMAT, VERSION)


def run(plan: Plan, *, quiet: bool = False) -> dict[str, Any]:
    """Measure every kind of units and write the folder; returns the summary."""
    chosen, data = plan.chosen, plan.data
    config = MeasureConfig(chosen.bins, chosen.permutations, seed=chosen.seed)
    summary: dict[str, Any] = {"data": data.name, "texts": data.counts, "out": str(plan.out)}
    summary["hook_point"], summary["units"] = plan.run.hook_point, {}
    n_tokens = count_tokens(plan.lm.tokenizer, rows_from_texts(list(data.texts)), plan.harvest)
    with atomic_folder(plan.out, overwrite=chosen.overwrite) as folder:
        for kind in dict.fromkeys(chosen.units.split(",")):
            sae = plan.run.sae if kind == "latents" else None
            units = open_units(plan.lm, sae, plan.run.hook_point, kind)
            with Progress(kind, 2 * n_tokens, "tokens", enabled=not quiet) as shown:
                stream = unit_stream(plan.lm, units, data, plan.harvest, shown.update)
                counts, permuted = measure(
                    stream, data, units.n_units, has_atom=not units.two_sided, config=config
                )
            how = {"kind": kind, "hook_point": units.hook_point, **plan.identity}
            table = separability(counts, permuted, chosen.correction, how)  # type: ignore[arg-type]
            table.save(folder / f"{kind}.parquet")
            summary["tokens"] = dict(zip(counts.classes, counts.n.tolist(), strict=True))
            leading = table.table.take(table.top(10)).to_pylist()
            summary["units"][kind] = {
                **table.summary(),
                "polysemanticity": polysemanticity(counts, permuted),
                "pairs": pairwise(counts, permuted),
                "leading": leading,
            }
        content = {"format": FORMAT, "version": VERSION, "identity": plan.identity}
        text = to_json(content | {"summary": summary}) + "\n"
        (folder / SUMMARY).write_text(text, encoding="utf-8")
    return plain(summary)


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary as lines for people."""
    texts = ", ".join(f"{name} {n:,}" for name, n in summary["texts"].items())
    tokens = ", ".join(f"{name} {n:,}" for name, n in summary["tokens"].items())
    lines = [f"texts       {texts}", f"tokens      {tokens}"]
    for kind, found in summary["units"].items():
        lines.append(
            f"{kind:<11} {found['live']:,} of {found['units']:,} live; mean distance of these "
            f"{found['raw_live']:.3f} raw, {found['debiased_live']:.3f} debiased; best "
            f"{found['best']:.3f}; {found['passing']:,} at a false discovery rate of "
            f"{found['alpha']:g}"
        )
        for row in found["leading"][:3]:
            lines.append(
                f"  unit {row['unit']:<6} {row['debiased']:.3f}  most in {row['concept']}, "
                f"active on {row['rate']:.1%} of tokens"
            )
    return "\n".join([*lines, f"written to  {summary['out']}"])


def estimate(plan: Plan) -> dict[str, Any]:
    """Texts, tokens and time, from some of the texts."""
    data, kinds = plan.data, list(dict.fromkeys(plan.chosen.units.split(",")))
    if missing := absent_model(plan.chosen.model or plan.run.settings.model.name):
        return {"missing": missing, "texts": data.counts, "out": str(plan.out)}
    tokens = count_tokens(plan.lm.tokenizer, rows_from_texts(list(data.texts)), plan.harvest)
    some = data.take(range(0, len(data), max(1, len(data) // PROBE_TEXTS)))
    seconds, columns = 0.0, (plan.chosen.permutations * 4 + 8) * len(data.classes)
    memory = 0
    for kind in kinds:
        sae = plan.run.sae if kind == "latents" else None
        units = open_units(plan.lm, sae, plan.run.hook_point, kind)
        start, seen = time.monotonic(), 0
        for _, item in unit_stream(plan.lm, units, some, plan.harvest)():
            seen += len(item)
        seconds += 2 * (time.monotonic() - start) * tokens / max(1, seen)
        memory = max(memory, units.n_units * (plan.chosen.bins + 1) * columns)
    return {
        "texts": data.counts,
        "tokens": tokens,
        "passes": 2 * len(kinds),
        "seconds": seconds,
        "memory_bytes": memory,
        "out": str(plan.out),
    }


def estimate_text(report: Mapping[str, Any]) -> str:
    """The estimate as lines for people."""
    texts = ", ".join(f"{name} {n:,}" for name, n in report["texts"].items())
    if missing := report.get("missing"):
        return f"texts       {texts}\nnot estimated: {missing[0]}\nnothing was written"
    return "\n".join(
        [
            f"texts       {texts}",
            f"tokens      {report['tokens']:,} a pass, {report['passes']} passes",
            f"time        about {duration(report['seconds'])} in the model; counting is not timed",
            f"memory      about {size(report['memory_bytes'])} of counts",
            "nothing was written",
        ]
    )
