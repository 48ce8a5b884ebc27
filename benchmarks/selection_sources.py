"""Rows of the selection suite's pool and targets, out of six sources."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

T0_SOURCES = (
    "adversarial_qa", "ag_news", "amazon_polarity", "app_reviews", "cnn_dailymail", "common_gen",
    "commonsense_qa", "cosmos_qa", "dbpedia_14", "dream", "duorc", "gigaword", "glue_mrpc",
    "glue_qqp", "imdb", "kilt_tasks", "multi_news", "paws", "qasc", "quarel", "quartz", "quoref",
    "ropes", "rotten_tomatoes", "samsum", "sciq", "social_i_qa", "trec", "wiki_bio", "wiki_hop",
    "wiki_qa", "wiqa", "xsum", "yelp_review_full",
)  # fmt: skip

SHARED = Path(__file__).parents[2] / "shared" / "data"
# rows of the pool by source (BBH: a task), and rows a target has to draw from
POOL_ROWS = {
    "reduced": {"t0": 2300, "flan": 1200, "gpteacher": 600, "gsm8k": 300, "mbpp": 250, "bbh": 15},
    "full": {"t0": 60_000, "flan": 40_000, "gpteacher": 9_000, "gsm8k": 7_473, "mbpp": 487,
             "bbh": 125},
}  # fmt: skip
TARGET_ROWS = {"reduced": 48, "full": 400}
# the source datasets of T0 with their held-out template
HELD_OUT_TEMPLATES = {
    "ag_news": "ag_news_which_section_choices",
    "app_reviews": "app_reviews_convert_to_star_rating",
    "common_gen": "common_gen_Put_together",
    "cosmos_qa": "cosmos_qa_context_question_description_text",
    "glue_qqp": "glue_qqp_duplicate_or_not",
    "paws": "paws_labeled_final_Meaning_no_label",
    "quartz": "quartz_read_passage_below_choose",
    "samsum": "samsum_To_sum_up_this_dialog",
    "sciq": "sciq_Multiple_Choice_Closed_Book_",
    "social_i_qa": "social_i_qa_I_was_wondering",
    "trec": "trec_what_category_best_describe",
    "wiqa": "wiqa_what_is_the_missing_first_step",
}


class Row(NamedTuple):
    """One instruction with its origin."""

    row_id: int
    source: str
    """t0, flan, gpteacher, gsm8k, mbpp or bbh."""
    label: str
    """What decides a hit: source:dataset or source:task."""
    prompt: str
    response: str
    held_out: bool
    """Whether it belongs to the targets."""

    @property
    def text(self) -> str:
        return f"{self.prompt}\n{self.response}".strip()


@dataclass(frozen=True, eq=False)
class Target:
    """What is searched for, and what counts as found."""

    members: np.ndarray
    """Places of the rows that target examples are drawn from; none is in the pool."""
    relevant: np.ndarray
    """Places of the pool rows that count as hits."""


def _lines(*path: str) -> Iterator[dict[str, Any]]:
    with gzip.open(SHARED.joinpath(*path), "rt", encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


def _sampled(rows: list[Any], n: int, seed: int) -> list[Any]:
    """At most n of the rows, in their order."""
    if len(rows) <= n:
        return rows
    kept = np.random.default_rng(seed).permutation(len(rows))[:n]
    return [rows[i] for i in np.sort(kept)]


def t0_source(template: str) -> str:
    """The source dataset of a T0 template."""
    found = [name for name in T0_SOURCES if template.startswith(name)]
    return max(found, key=len)


def _t0(n: int, n_target: int) -> Iterator[tuple[str, str, str, str, bool]]:
    pool: list[Any] = []
    held: dict[str, list[Any]] = {name: [] for name in HELD_OUT_TEMPLATES.values()}
    for row in _lines("t0_p3_sample", "t0_train_sample.jsonl.gz"):
        held.get(row["template"], pool).append(row)
    for row in _sampled(pool, n, 1):
        yield "t0", f"t0:{t0_source(row['template'])}", row["prompt"], row["completion"], False
    for source, template in HELD_OUT_TEMPLATES.items():
        for row in _sampled(held[template], n_target, 2):
            yield "t0", f"t0:{source}", row["prompt"], row["completion"], True


def _flan(n: int) -> Iterator[tuple[str, str, str, str, bool]]:
    files = [p for p in sorted((SHARED / "flan_cot").glob("*.tsv.gz")) if "gsm8k" not in p.name]
    found = []
    for path in files:
        task = path.name.split("_train")[0]
        with gzip.open(path, "rt", encoding="utf-8") as handle:
            for line in handle:
                cells = [cell.replace("\\n", "\n") for cell in line.rstrip("\n").split("\t")]
                if len(cells) == 3:
                    found.append((task, cells[0], f"{cells[2]}\n{cells[1]}"))
    for task, prompt, response in _sampled(found, n, 3):
        yield "flan", f"flan:{task}", prompt, response, False


def _gpteacher(n: int) -> Iterator[tuple[str, str, str, str, bool]]:
    found = []
    for path in sorted((SHARED / "gpteacher").glob("*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as handle:
            rows = json.load(handle)
        name = path.name.split("-")[0]
        for row in rows:
            prompt = f"{row['instruction']}\n{row.get('input') or ''}".strip()
            found.append((name, prompt, row["response"]))
    for name, prompt, response in _sampled(found, n, 4):
        yield "gpteacher", f"gpteacher:{name}", prompt, response, False


def _gsm8k(n: int, n_target: int) -> Iterator[tuple[str, str, str, str, bool]]:
    for name, count, held_out in (("train", n, False), ("test", n_target, True)):
        for row in _sampled(list(_lines("gsm8k", f"{name}.jsonl.gz")), count, 5):
            yield "gsm8k", "gsm8k", row["question"], row["answer"], held_out


def _mbpp(n: int, n_target: int) -> Iterator[tuple[str, str, str, str, bool]]:
    rows = list(_lines("mbpp", "mbpp.jsonl.gz"))
    order = np.random.default_rng(6).permutation(len(rows))
    half = len(rows) // 2
    for places, count, held_out in ((order[:half], n, False), (order[half:], n_target, True)):
        for place in places[:count]:
            row = rows[place]
            yield "mbpp", "mbpp", row["text"], row["code"].replace("\r\n", "\n"), held_out


def _bbh(n: int, n_target: int) -> Iterator[tuple[str, str, str, str, bool]]:
    tasks: dict[str, list[Any]] = {}
    for row in _lines("bbh", "bbh.jsonl.gz"):
        tasks.setdefault(row["task"], []).append(row)
    for task, rows in sorted(tasks.items()):
        order = np.random.default_rng(7).permutation(len(rows))
        half = len(rows) // 2
        for places, count, held_out in ((order[:half], n, False), (order[half:], n_target, True)):
            for place in places[:count]:
                row = rows[place]
                yield "bbh", f"bbh:{task}", row["input"], row["target"], held_out


def make_rows(size: str) -> list[Row]:
    """The rows of the pool and of the targets, each text once (the first of its kind stays)."""
    n, m = POOL_ROWS[size], TARGET_ROWS[size]
    parts = (
        _t0(n["t0"], m), _flan(n["flan"]), _gpteacher(n["gpteacher"]), _gsm8k(n["gsm8k"], m),
        _mbpp(n["mbpp"], m), _bbh(n["bbh"], m),
    )  # fmt: skip
    rows: list[Row] = []
    seen: set[str] = set()
    for source, label, prompt, response, held_out in (row for part in parts for row in part):
        row = Row(len(rows), source, label, prompt, response, held_out)
        if row.text and row.text not in seen:
            seen.add(row.text)
            rows.append(row)
    return rows


def make_targets(rows: list[Row]) -> dict[str, Target]:
    """A target for each label that has held-out rows."""
    labels = np.array([row.label for row in rows])
    held = np.array([row.held_out for row in rows])
    names = dict.fromkeys(labels[held])
    return {
        str(name): Target(
            np.flatnonzero(held & (labels == name)), np.flatnonzero(~held & (labels == name))
        )
        for name in names
    }
