"""The work behind ``sae-apps align``: encode the items, compare, write one folder.

items.parquet   every item: its text, whether it has a code, and how well it is placed (rho of its
                row) by the latents
summary.json    settings and the numbers, for latents and for the activations that they are made of
manifest.json   sha256 of every file, written last
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_apps.alignment import Alignment, great_circle, relational_alignment
from sae_core.activations import HarvestConfig, stream_activations
from sae_core.errors import UserError
from sae_core.metrics import evaluating
from sae_core.records import read_records
from sae_core.store import atomic_folder
from sae_core.text import rows_from_texts
from sae_core.weights import refuse_misspelt

from .common import plain, to_json
from .featurize import FinishedRun, open_run
from .finished import SUMMARY, finished_folder

if TYPE_CHECKING:
    from sae_core.models import LanguageModel
    from sae_core.sae import SAE

    from .align import AlignOptions

FORMAT, VERSION = "sae-apps-align", 1
PLACE = ("lat", "lon")


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be done; the model is opened only where it is needed."""

    chosen: "AlignOptions"
    run: FinishedRun
    texts: list[str]
    space: np.ndarray
    """Embedding or distances."""
    is_distance: bool
    strata: list[str] | None
    out: Path
    identity: dict[str, Any]
    """All that the result depends on."""
    accept_terms: bool = False

    @cached_property
    def lm(self) -> "LanguageModel":
        """The model of the run, checked to be the one that the SAE was trained on."""
        from sae_apps.selection.encoder import load_encoder

        return load_encoder(
            self.run.folder.path, model=self.chosen.model, accept_terms=self.accept_terms
        ).lm


def make_plan(chosen: "AlignOptions", *, accept_terms: bool = False) -> Plan:
    """Open the run and read the items.

    Raises:
        UserError: anything that is missing or does not fit, before the model is read.
    """
    finished_run = open_run(chosen.run)
    if chosen.model:
        refuse_misspelt(chosen.model)
    if not chosen.items:
        raise UserError("Expected a file of items, got none: add --items FILE.")
    path = Path(chosen.items)
    if not path.is_file():
        raise UserError(f"Expected a file of items at {path}, got nothing.")
    records = list(read_records(path))
    texts = [str(_value(record, chosen.text, place)) for place, record in records]
    strata = None
    if chosen.strata:
        strata = [str(_value(record, chosen.strata, place)) for place, record in records]
    space, is_distance = _space(chosen.against, records)
    digest = hashlib.sha256(to_json([texts, strata]).encode() + space.tobytes()).hexdigest()
    skipped = ("run", "out", "overwrite", "items")
    identity = {name: v for name, v in asdict(chosen).items() if name not in skipped}
    identity |= {
        "items": digest, "sae_hash": finished_run.sae.hash(), "hook_point": finished_run.hook_point,
    }  # fmt: skip
    out = Path(chosen.out) if chosen.out else finished_run.folder.path / f"align-{path.stem}"
    return Plan(
        chosen, finished_run, texts, space, is_distance, strata, out, plain(identity), accept_terms
    )


def _value(record: Mapping[str, Any], column: str, place: str) -> Any:
    if record.get(column) is None:
        known = ", ".join(record) or "none"
        raise UserError(f"{place}: expected the column {column!r}, got {known}.")
    return record[column]


def _space(against: str, records: Sequence[tuple[str, Any]]) -> tuple[np.ndarray, bool]:
    """The other space, and whether it holds distances."""
    if against.endswith(".npy"):
        if not Path(against).is_file():
            raise UserError(f"Expected a .npy file at {against}, got nothing.")
        try:
            found = np.load(against, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"Expected an array of numbers in {against}, got {error}.") from error
        if found.ndim != 2 or len(found) != len(records) or found.dtype.kind not in "fiu":
            raise UserError(
                f"Expected numbers of shape [{len(records)}, q] in {against}, got {found.dtype} of "
                f"shape {list(found.shape)}."
            )
        return found.astype(np.float64), False
    names = tuple(name.strip() for name in against.split(","))
    values = np.array([[_number(record, name, place) for name in names] for place, record in
                       records]).reshape(len(records), len(names))  # fmt: skip
    if names == PLACE:
        return great_circle(values[:, 0], values[:, 1]), True
    return values, False


def _number(record: Mapping[str, Any], column: str, place: str) -> float:
    value = _value(record, column, place)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{place}: expected a number in {column!r}, got {value!r}.") from None


def finished(plan: Plan) -> dict[str, Any] | None:
    """What the same command wrote before, whole; None where nothing is there.

    Raises:
        UserError: the folder holds something else; CorruptFileError: a file has changed since.
    """
    return finished_folder(plan.out, plan.identity, FORMAT, VERSION)


def item_codes(
    lm: "LanguageModel",
    hook_point: str,
    texts: Sequence[str],
    saes: Mapping[str, "SAE"],
    pooling: str = "last",
) -> tuple[Float[np.ndarray, "n d_in"], dict[str, sparse.csr_array]]:
    """Activations of items and their codes by each SAE: of the last token, or on average.

    Texts of more than 256 tokens are read in pieces, as training reads them.

    Raises:
        UserError: a text without a token.
    """
    import torch

    n = len(texts)
    total, tokens, ends = np.zeros((n, lm.d_model)), np.zeros(n), np.full(n, -1)
    codes = {name: sparse.csr_array((n, sae.d_sae)) for name, sae in saes.items()}
    config = HarvestConfig(context_size=256, batch_tokens=2048)
    for found in stream_activations(lm, rows_from_texts(list(texts)), [hook_point], config):
        batch = found[hook_point]
        row, x, stays = batch.row_id.numpy(), batch.x.float(), np.ones(n)
        kept = np.arange(len(row))
        if pooling == "last":  # of all pieces of a text, which come in any order
            kept = _later(row, batch.position.numpy(), ends)
            if not len(kept):
                continue
            stays[row[kept]] = 0
            tokens, total = tokens * stays, total * stays[:, None]
        tokens += np.bincount(row[kept], minlength=n)
        np.add.at(total, row[kept], x[kept].double().cpu().numpy())
        where = sparse.csr_array(
            (np.ones(len(kept)), (row[kept], np.arange(len(kept)))), shape=(n, len(kept))
        )
        for name, sae in saes.items():
            with evaluating(sae), torch.no_grad():
                held = sparse.csr_array(sparse.diags_array(stays) @ codes[name])
                codes[name] = held + where @ sae.encode_sparse(x[kept]).to_scipy()
    if not tokens.all():
        empty = texts[int(tokens.argmin())]
        raise UserError(f"Expected a token of every text, got none of {empty!r}.")
    scale = sparse.diags_array(1 / tokens)
    return total / tokens[:, None], {name: sparse.csr_array(scale @ c) for name, c in codes.items()}


def _later(
    row: Int[np.ndarray, " t"], position: Int[np.ndarray, " t"], ends: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " k"]:
    """Tokens that are the last of their row and lie behind its ``ends``, which move there."""
    order = np.lexsort((position, row))
    last = order[np.r_[row[order][1:] != row[order][:-1], True]]
    last = last[position[last] > ends[row[last]]]
    ends[row[last]] = position[last]
    return last


def run(plan: Plan) -> dict[str, Any]:
    """Encode, compare and write the folder; returns the summary."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chosen = plan.chosen
    read = [chosen.template.replace("{}", text) for text in plan.texts]
    units, codes = item_codes(
        plan.lm, plan.run.hook_point, read, {"latents": plan.run.sae}, chosen.pooling
    )
    found = relational_alignment(
        codes["latents"], plan.space,
        distances=plan.is_distance, metric=chosen.metric, method=chosen.method,
        permutations=chosen.permutations, strata=plan.strata, baseline=units - units.mean(0),
        n_boot=chosen.n_boot, seed=chosen.seed,
    )  # fmt: skip
    summary = _summary(plan, found)
    placed: list[float | None] = [None] * len(plan.texts)
    for i, rho in zip(found.kept.tolist(), found.per_item.tolist(), strict=True):
        placed[i] = rho
    table = {
        "item": np.arange(len(plan.texts)), "text": plan.texts,
        "has_code": [one is not None for one in placed], "rho": placed,
    }  # fmt: skip
    with atomic_folder(plan.out, overwrite=chosen.overwrite) as folder:
        pq.write_table(pa.table(table), folder / "items.parquet")
        content = {"format": FORMAT, "version": VERSION, "identity": plan.identity}
        text = to_json(content | {"summary": summary}) + "\n"
        (folder / SUMMARY).write_text(text, encoding="utf-8")
    return summary


def _summary(plan: Plan, found: Alignment) -> dict[str, Any]:
    numbers = {
        name: getattr(found, name)
        for name in ("rho", "p", "ci", "n_items", "n_dropped", "n_fixed", "null_mean", "null_sd",
                     "baseline_rho", "delta", "delta_ci", "how")
    }  # fmt: skip
    order = np.argsort(found.per_item)
    worst, best = (
        [plan.texts[i] for i in found.kept[part].tolist()] for part in (order[:5], order[:-6:-1])
    )
    return plain(
        numbers | {"placed_best": best, "placed_worst": worst,
                   "hook_point": plan.run.hook_point, "out": str(plan.out)}
    )  # fmt: skip


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary as lines for people."""

    def span(value: Any) -> str:
        return "" if value is None else f" [{value[0]:.3f}, {value[1]:.3f}]"

    left = f", {summary['n_dropped']} left out without a code" if summary["n_dropped"] else ""
    within = ", within strata" if summary["how"]["is_stratified"] else ""
    return "\n".join([
        f"latents      rho {summary['rho']:.3f}{span(summary['ci'])}, p {summary['p']:.2g} "
        f"({summary['how']['permutations']:,} permutations{within})",
        f"activations  rho {summary['baseline_rho']:.3f}; difference {summary['delta']:+.3f}"
        f"{span(summary['delta_ci'])}",
        f"items        {summary['n_items']:,}{left}",
        f"placed best  {', '.join(summary['placed_best'])}",
        f"... worst    {', '.join(summary['placed_worst'])}",
        f"written to   {summary['out']}",
    ])  # fmt: skip


def estimate(plan: Plan) -> dict[str, Any]:
    """How many items and comparisons."""
    n = len(plan.texts)
    return {"items": n, "pairs": n * (n - 1) // 2, "out": str(plan.out)}


def estimate_text(report: Mapping[str, Any]) -> str:
    """The estimate as lines for people."""
    return f"items  {report['items']:,}, {report['pairs']:,} pairs\nnothing was written"
