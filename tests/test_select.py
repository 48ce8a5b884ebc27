"""Selection against brute force, planted topics, and every switch on its own."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from test_embed import HOOK_POINT, perfect_sae, with_template

from sae_apps.selection import presence, ranking, similarity
from sae_apps.selection.budget import (
    Budget,
    Room,
    TopLists,
    in_turns,
    length_bins,
    parse_budget,
    quotas,
)
from sae_apps.selection.config import SelectConfig
from sae_apps.selection.embed import EmbedConfig, Encoder, encode
from sae_apps.selection.instructions import open_instructions
from sae_apps.selection.pool import PoolFeatures, write_pool
from sae_apps.selection.prototypes import make_prototypes
from sae_apps.selection.result import SelectionResult, describe
from sae_apps.selection.select import select
from sae_apps.selection.spans import tokenise
from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance

ORIGIN = Provenance("model", "main", HOOK_POINT, "sae", "planted", "0", "torch 2")
# scores are float32 in the package and float64 in the formulas here
ROUNDING = 1e-6
JACCARD = SelectConfig(metric="jaccard", prototypes="one", strategy="topk")


def features(
    dense: np.ndarray, *, groups: list[str] | None = None, first: int = 0, tokens=None
) -> SparseFeatures:
    n = len(dense)
    tokens = np.full(n, 20) if tokens is None else tokens
    rows = pa.table(
        {
            "row_id": pa.array(range(first, first + n), pa.int64()),
            "n_tokens": pa.array(tokens, pa.int32()),
            "group": pa.array(groups or [None] * n, pa.string()),
        }
    )
    return SparseFeatures(sparse.csr_array(dense.astype(np.float32)), rows, ORIGIN)


def random_codes(seed: int, n: int, d_sae: int = 30, density: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.exponential(size=(n, d_sae)) * (rng.random((n, d_sae)) < density)


def jaccard(codes: np.ndarray, prototype: np.ndarray) -> np.ndarray:
    """Equation 9 as it stands."""
    below = np.maximum(codes, prototype).sum(axis=1)
    return np.minimum(codes, prototype).sum(axis=1) / np.where(below > 0, below, 1)


def texts_of_topics(rng: np.random.Generator, topic: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Sums over the tokens of rows, [n, 80]: a token fires three latents of its topic's ten, and
    three of the forty that all topics share."""
    codes = np.zeros((len(topic), 80))
    for row, (mine, length) in enumerate(zip(topic, tokens, strict=True)):
        own = 10 * mine + rng.integers(0, 10, 3 * length)
        shared = 40 + rng.integers(0, 40, 3 * length)
        np.add.at(codes[row], np.concatenate([own, shared]), rng.exponential(size=6 * length))
    return codes


# ---- what is picked ----


@pytest.mark.parametrize("config", [JACCARD, replace(JACCARD, metric="cosine"), SelectConfig()])
def test_a_planted_topic_is_found(config: SelectConfig) -> None:
    rng = np.random.default_rng(0)
    topic, tokens = rng.integers(0, 4, 400), rng.integers(8, 80, 400)
    pool = features(texts_of_topics(rng, topic, tokens) / tokens[:, None])
    few = rng.integers(8, 80, 12)
    aims = features(texts_of_topics(rng, np.full(12, 2), few) / few[:, None])
    got = select(pool, aims, budget=60, config=config)
    precision = (topic[got.picks["row_id"].to_numpy()] == 2).mean()
    by_chance = (topic == 2).mean()
    assert precision >= 0.95 > 3 * by_chance


def test_sum_pooling_follows_the_length_of_the_targets_and_mean_pooling_does_not() -> None:
    rng = np.random.default_rng(1)
    tokens = np.rint(2 ** rng.uniform(3, 8, 500)).astype(int)
    sums = texts_of_topics(rng, rng.integers(0, 4, 500), tokens)

    def picked_length(pool: np.ndarray, length: int, pooled: bool) -> float:
        own = np.full(20, length)
        aims = texts_of_topics(rng, rng.integers(0, 4, 20), own) / (length if pooled else 1)
        got = select(features(pool, tokens=tokens), features(aims), budget=50, config=JACCARD)
        return float(np.log2(got.picks["n_tokens"].to_numpy()).mean())

    short, long = (picked_length(sums, n, False) for n in (12, 200))
    assert abs(short - np.log2(12)) < 1 and abs(long - np.log2(200)) < 1
    short, long = (picked_length(sums / tokens[:, None], n, True) for n in (12, 200))
    assert abs(short - long) < 0.5
    assert min(short, long) > np.log2(tokens).mean() + 1, "the mean's own bias: long rows"


def test_the_published_method_is_its_equations(tiny_lm) -> None:
    encoder = Encoder(with_template(tiny_lm), perfect_sae(), HOOK_POINT, EmbedConfig(max_len=77))
    rows = [{"prompt": f"Tom saw {n} {a}s.", "response": f"The {a} ran. " * n} for n, a in ANIMALS]
    aims = [{"prompt": "A dog?", "response": "The dog ran."}, {"prompt": "A big cat and a cow"}]
    config = SelectConfig.preset("mona")
    got = select(rows, open_instructions(aims, prompt="prompt"), encoder, "30%", config=config)

    def code(row) -> np.ndarray:
        (tokens,) = tokenise(encoder.lm.tokenizer, [row], EmbedConfig(special=True), 2048)
        with torch.no_grad():
            ids = torch.from_numpy(tokens.ids)[None]
            hidden = encoder.lm.model(ids, output_hidden_states=True).hidden_states[3][0]
        return encoder.sae.encode(hidden).mean(dim=0).double().numpy()

    codes = np.stack([code(row) for row in open_instructions(rows)])
    mean = np.mean([code(row) for row in open_instructions(aims, prompt="prompt")], axis=0)
    want = jaccard(codes, mean)
    np.testing.assert_allclose(got.scores["score"].to_numpy(), want, atol=1e-4)
    score = got.scores["score"].to_numpy()
    order = np.argsort(-score, kind="stable")[:6]
    assert got.picks["row_id"].to_pylist() == order.tolist() and len(got) == 6
    assert got.picks["score"].to_pylist() == score[order].tolist()
    assert asdict(config) == {
        "metric": "jaccard", "weights": "none", "prototypes": "one", "strategy": "topk",
        "length": "none", "exact_duplicates": False, "near_duplicates": None,
        "duplicate_span": "all",
        "embed": asdict(EmbedConfig(pooling="mean", span="all", special=True)),
        "n_reasons": 5, "seed": 0,
    }  # fmt: skip
    assert got.provenance["encoding"]["embed.special"], "the preset's settings were used"


ANIMALS = [(n, a) for n in range(1, 6) for a in ("dog", "cat", "bird", "frog")]


def test_ties_go_by_index() -> None:
    codes = np.tile(random_codes(2, 3), (4, 1))
    got = select(features(codes), features(codes[[1]]), budget=6, config=JACCARD)
    assert got.picks["row_id"].to_pylist()[:4] == [1, 4, 7, 10]
    later = got.picks["row_id"].to_pylist()[4:]
    assert later == sorted(later)


@pytest.mark.parametrize("metric", ["jaccard", "cosine", "l2", "presence"])
def test_empty_codes_come_last_and_are_counted(metric: str) -> None:
    codes = random_codes(3, 12)
    codes[[0, 5]] = 0
    # far from everything: at this distance an empty code would win by l2
    codes[7:] *= 100
    config = replace(JACCARD, metric=metric)
    got = select(features(codes), features(random_codes(4, 3)), budget="100%", config=config)
    assert got.picks["row_id"].to_pylist()[-2:] == [0, 5] and got.counts["empty"] == 2
    if metric != "l2":
        assert got.scores["score"].to_numpy()[[0, 5]].tolist() == [0, 0]
    groups = replace(config, prototypes="group", strategy="round_robin")
    aims = features(random_codes(4, 3), groups=["a", "b", "a"])
    got = select(features(codes), aims, budget="100%", config=groups)
    assert set(got.picks["row_id"].to_pylist()[-2:]) == {0, 5}


def test_idf_weights_are_those_of_the_pool() -> None:
    codes, aims = random_codes(5, 40, density=0.5), random_codes(6, 4)
    codes[:, 0] = 9  # always on: its weight is 0
    config = replace(JACCARD, weights="idf")
    got = select(features(codes), features(aims), budget=5, config=config)
    idf = np.log(41 / ((codes > 0).sum(axis=0) + 1))
    want = jaccard(codes * idf, aims.mean(axis=0) * idf)
    np.testing.assert_allclose(got.scores["score"].to_numpy(), want, atol=ROUNDING)
    plain = select(features(codes), features(aims), budget=5, config=JACCARD)
    assert np.abs(plain.scores["score"].to_numpy() - want).max() > 0.05, "control"
    row = got.picks["row_id"][0].as_py()
    part = np.minimum(codes[row], aims.mean(axis=0)) * idf
    for latent, share in got.why(row):
        assert share == pytest.approx(part[latent] / part.sum(), rel=1e-5)
    assert part.argmax() == got.why(row)[0][0] and 0 not in dict(got.why(row))
    with pytest.raises(UserError, match="score of 0 for all 40 rows"):
        select(features(np.ones((40, 30))), features(aims), budget=5, config=config)


def three_groups() -> tuple[np.ndarray, SparseFeatures, np.ndarray]:
    """Codes of a pool, targets in three groups, and the scores by the definition [n, 3]."""
    codes, aims = random_codes(7, 60), random_codes(8, 9)
    groups = ["c", "a", "b"] * 3
    scores = np.stack([jaccard(codes, aims[g::3].mean(axis=0)) for g in range(3)], axis=1)
    return codes, features(aims, groups=groups), scores


def test_max_takes_the_best_score_over_the_groups() -> None:
    codes, aims, scores = three_groups()
    config = replace(JACCARD, prototypes="group", strategy="max")
    got = select(features(codes), aims, budget=20, config=config)
    np.testing.assert_allclose(got.scores["score"].to_numpy(), scores.max(axis=1), atol=ROUNDING)
    order = np.argsort(-scores.max(axis=1), kind="stable")[:20]
    assert got.picks["row_id"].to_pylist() == order.tolist()
    names = np.array(["c", "a", "b"])
    assert got.picks["group"].to_pylist() == names[scores.argmax(axis=1)][order].tolist()


@pytest.mark.parametrize("first_list", [1, 4, 1024])
@pytest.mark.parametrize("length", ["none", "strata"])
def test_round_robin_gives_each_group_its_best_row_in_turn(
    first_list: int, length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_FIRST_LIST", first_list)
    codes, aims, scores = three_groups()
    tokens = np.random.default_rng(0).integers(1, 60, 60)
    pool = features(codes, tokens=tokens)
    config = replace(JACCARD, prototypes="group", strategy="round_robin", length=length)
    got = select(pool, aims, budget=40, config=config)
    left = dict(enumerate(quotas(40, length_bins(tokens), np.ones(60, int), 6).tolist()))
    want: list[tuple[int, int]] = []
    while len(want) < 40:
        group = len(want) % 3
        free = [
            row
            for row in np.argsort(-scores[:, group], kind="stable").tolist()
            if row not in {one for one, _ in want}
            and (length == "none" or left[length_bins(tokens)[row]])
        ]
        left[length_bins(tokens)[free[0]]] -= 1
        want.append((free[0], group))
    assert got.picks["row_id"].to_pylist() == [row for row, _ in want]
    assert got.picks["group"].to_pylist() == ["cab"[group] for _, group in want]
    np.testing.assert_allclose(
        got.picks["score"].to_numpy(), [scores[one] for one in want], atol=ROUNDING
    )


def test_groups_that_want_the_same_rows_get_longer_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_FIRST_LIST", 1)
    codes, one = random_codes(7, 60), random_codes(8, 1)
    aims = features(np.repeat(one, 6, axis=0), groups=list("abcdef"))
    config = replace(JACCARD, prototypes="group", strategy="round_robin")
    got = select(features(codes), aims, budget=30, config=config)
    order = np.argsort(-jaccard(codes, one[0]), kind="stable")[:30]
    assert got.picks["row_id"].to_pylist() == order.tolist(), "20 a list do for 20 picks alone"


def test_shards_make_no_difference() -> None:
    codes, aims, _ = three_groups()
    parts = PoolFeatures.of(
        features(codes[:7]), features(codes[7:50], first=7), features(codes[50:], first=50)
    )
    for config in (
        replace(JACCARD, weights="idf"),
        replace(JACCARD, prototypes="group", strategy="round_robin"),
        SelectConfig(metric="cosine", prototypes="group", strategy="max"),
    ):
        one = select(features(codes), aims, budget=25, config=config)
        many = select(parts, aims, budget=25, config=config)
        for name in ("picks", "scores", "reasons"):
            assert getattr(many, name).equals(getattr(one, name)), (config, name)


@pytest.mark.parametrize("length", ["strata", "target_strata"])
def test_strata_share_out_the_budget_by_length(length: str) -> None:
    codes, aims = random_codes(9, 200), random_codes(10, 10)
    tokens = np.random.default_rng(0).permutation(np.repeat([3, 9, 20, 40], [20, 60, 80, 40]))
    pool, own = features(codes, tokens=tokens), features(aims, tokens=[9] * 4 + [40] * 6)
    got = select(pool, own, budget=20, config=replace(JACCARD, length=length))
    values, counts = np.unique(got.picks["n_tokens"].to_numpy(), return_counts=True)
    want = {3: 2, 9: 6, 20: 8, 40: 4} if length == "strata" else {9: 8, 40: 12}
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == want
    scores = jaccard(codes, aims.mean(axis=0))
    best = np.argsort(-np.where(tokens == 9, scores, -1), kind="stable")[: want[9]]
    assert set(best) <= set(got.picks["row_id"].to_pylist()), "the best of each bin"
    assert (np.diff(got.picks["score"].to_numpy()) <= 0).all(), "ranked by score all the same"
    plain = select(pool, own, budget=20, config=JACCARD)
    assert np.unique(plain.picks["n_tokens"].to_numpy(), return_counts=True)[1].tolist() != [
        *want.values()
    ], "control"


def test_what_a_bin_cannot_fill_goes_to_the_best_of_the_others() -> None:
    codes, aims = random_codes(9, 50), random_codes(10, 10)
    codes[45:] = aims.mean(axis=0) * np.arange(1, 2, 0.2)[:, None]  # the best of all, taken already
    tokens = np.repeat([9, 40], [45, 5])
    own = features(aims, tokens=[40] * 10)
    config = replace(JACCARD, length="target_strata")
    got = select(features(codes, tokens=tokens), own, budget=12, config=config)
    assert sorted(got.picks["n_tokens"].to_pylist()) == [9] * 7 + [40] * 5
    scores = np.where(tokens == 9, jaccard(codes, aims.mean(axis=0)), -1)
    assert set(np.argsort(-scores)[:7]) < set(got.picks["row_id"].to_pylist())
    codes[[0, 1]] = codes[45]  # now two of the others are better than four of these
    got = select(features(codes, tokens=tokens), own, budget=12, config=config)
    assert (np.diff(got.picks["score"].to_numpy()) <= 0).all()
    assert got.picks["row_id"].to_pylist()[:3] == [0, 1, 45]


def test_a_budget_in_tokens_ends_before_the_row_that_would_exceed_it() -> None:
    codes, aims = random_codes(11, 80), random_codes(12, 5)
    tokens = np.random.default_rng(0).integers(5, 60, 80)
    pool = features(codes, tokens=tokens)
    got = select(pool, features(aims), budget="500 tokens", config=JACCARD)
    order = np.argsort(-jaccard(codes, aims.mean(axis=0)), kind="stable")
    spent = np.cumsum(tokens[order])
    n = int((spent <= 500).sum())
    assert got.picks["row_id"].to_pylist() == order[:n].tolist()
    assert got.counts["picked_tokens"] == spent[n - 1] <= 500 < spent[n]
    groups = features(aims, groups=["a", "b", "a", "b", "b"])
    for length in ("none", "strata"):
        config = replace(JACCARD, prototypes="group", strategy="round_robin", length=length)
        got = select(pool, groups, budget="500 tokens", config=config)
        assert 440 < got.counts["picked_tokens"] <= 500
    with pytest.raises(UserError, match=r"the best row fits, got 4 tokens for one of \d+"):
        select(pool, features(aims), budget="4 tokens", config=JACCARD)


# ---- what is said about it ----


def test_reasons_decompose_the_score() -> None:
    codes, aims, scores = three_groups()
    config = replace(JACCARD, prototypes="group", strategy="max", n_reasons=30)
    got = select(features(codes), aims, budget=5, config=config)
    proto = make_prototypes([aims], "group").vectors
    for pick in got.picks.to_pylist():
        row, group = pick["row_id"], "cab".index(pick["group"])
        why = got.why(row)
        assert sum(share for _, share in why) == pytest.approx(1)
        part = np.minimum(codes[row], proto[group])
        for latent, share in why:
            assert share == pytest.approx(part[latent] / part.sum(), rel=1e-5)
        assert [share for _, share in why] == sorted((s for _, s in why), reverse=True)
    with pytest.raises(UserError, match="one of 5 picks, got 999"):
        got.why(999)
    for other in (replace(config, n_reasons=0), replace(config, metric="l2")):
        assert (
            select(features(codes), aims, budget=5, config=other).why(
                int(
                    select(features(codes), aims, budget=5, config=other).picks["row_id"][0].as_py()
                )
            )
            == []
        )
    lines = describe(got, {got.why(got.picks["row_id"][0].as_py())[0][0]: ["dog", " cat"]})
    assert "'dog', ' cat'" in lines.splitlines()[1] and lines.startswith("   1. row ")
    assert "group" in describe(got, n_picks=1) and "row" not in describe(got, n_picks=0)


def test_the_result_gives_records_files_and_a_dataset(encoder_and_rows, tmp_path) -> None:
    encoder, rows, aims = encoder_and_rows
    rows = [{**row, "score": i} for i, row in enumerate(rows)]
    rows[0]["extra"] = float("nan")
    rows[1]["note"] = {"a": [1, 2]}
    got = select(rows, aims, encoder, "100%")
    data = got.dataset()
    assert data.num_rows == len(rows)
    assert set(data.column_names) == {
        "prompt", "response", "score_", "score", "rank", "extra", "note"
    }  # fmt: skip
    assert (
        data["rank"] == list(range(len(rows))) and data["score"] == got.picks["score"].to_pylist()
    )
    for record, pick in zip(data, got.picks.to_pylist(), strict=True):
        assert record["prompt"] == rows[pick["row_id"]]["prompt"]
        assert record["score_"] == pick["row_id"]
    sidecar = got.write(tmp_path / "deep" / "picks.jsonl")
    written = (tmp_path / "deep" / "picks.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["rank"] for line in lines] == list(range(len(rows)))
    assert "NaN" not in written
    facts = json.loads(sidecar.read_text())
    assert facts["counts"] == got.counts and facts["config"]["budget"]["unit"] == "share"
    assert facts["provenance"]["sae_hash"] == encoder.sae.hash()
    got.write(tmp_path / "picks.parquet")
    table = pq.read_table(tmp_path / "picks.parquet")
    assert table["prompt"].to_pylist() == data["prompt"] and table["extra"].null_count == len(rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "deep", "picks.parquet", "picks.parquet.selection.json"
    ]  # fmt: skip
    with pytest.raises(UserError, match="ends in .jsonl or .parquet, got .*picks.csv"):
        got.write(tmp_path / "picks.csv")


def test_features_alone_have_no_records(tmp_path) -> None:
    codes = random_codes(0, 5)
    got = select(features(codes), features(codes[:1]), budget=2)
    with pytest.raises(UserError, match="pass the pool's records"):
        got.dataset()
    got.write(tmp_path / "picks.jsonl")
    first = json.loads((tmp_path / "picks.jsonl").read_text().splitlines()[0])
    assert first["row_id"] == 0 and first["rank"] == 0
    records = [{"text": str(i)} for i in range(5)]
    again = select(features(codes), features(codes[:1]), budget=2, records=records)
    assert again.dataset()["text"][0] == "0"
    few = select(features(codes), features(codes[:1]), budget=5, records=records[:3])
    with pytest.raises(UserError, match="all 5 picks among the rows of .*, got 3: row_id 3"):
        few.dataset()


def test_a_score_that_is_no_number_is_refused() -> None:
    table = pa.table({"score": [0.5, float("nan")]})
    with pytest.raises(UserError, match="finite scores of the picks"):
        SelectionResult(table, table, table, {}, {}, {})


# ---- switches that read text, and rows through a model ----


@pytest.fixture(scope="module")
def encoder_and_rows(tiny_lm):
    encoder = Encoder(with_template(tiny_lm), perfect_sae(), HOOK_POINT, EmbedConfig(max_len=64))
    rows = [{"prompt": f"Tom saw {n} {a}s.", "response": f"The {a} ran. " * n} for n, a in ANIMALS]
    aims = [{"prompt": "A dog?", "response": "The dog ran to Tom."}]
    return encoder, rows[:8], aims


def test_duplicates_and_contaminated_rows_are_not_picked(encoder_and_rows) -> None:
    encoder, rows, aims = encoder_and_rows
    tale = "one day a little red hen found a seed of corn in the yard by the old barn"
    back = " ".join(tale.split()[::-1])
    long = {"prompt": tale, "response": f"ok {back}"}
    near = {**long, "response": long["response"] + " end"}
    copied = {"prompt": "Read: " + " ".join(f"word{i}" for i in range(20)), "response": "done"}
    pool = [*rows, {**rows[0], "prompt": rows[0]["prompt"].upper()}, long, near, copied]
    assert len(pool) == 12
    test_set = [{"prompt": copied["prompt"][6:], "response": "x"}]
    switches = SelectConfig(exact_duplicates=True, near_duplicates=0.7)
    got = select(pool, aims, encoder, 9, config=switches, evaluation=test_set)
    removed = set(range(12)) - set(got.picks["row_id"].to_pylist())
    assert removed == {8, 10, 11}
    names = ("exact_duplicates", "near_duplicates", "contaminated", "rows")
    assert [got.counts[name] for name in names] == [1, 1, 1, 12]
    assert got.scores.num_rows == 12, "removed rows keep their score"
    assert got.provenance["evaluation"].startswith("records@")
    half = select(pool, aims, encoder, "50%", config=switches, evaluation=test_set)
    assert len(half) == 6, "a share is of all 12 rows"
    plain = select(pool, aims, encoder, 12)
    assert len(plain) == 12 and [plain.counts[name] for name in names] == [0, 0, 0, 12]
    with pytest.raises(UserError, match="at most the 9 rows .* that may be picked, got 10"):
        select(pool, aims, encoder, 10, config=switches, evaluation=test_set)
    other = [{**long, "response": "another answer, of other words"}, *pool]
    asked = replace(switches, duplicate_span="prompt")
    found = [select(other, aims, encoder, 1, config=one) for one in (switches, asked)]
    assert [one.counts["exact_duplicates"] for one in found] == [1, 3]
    with pytest.raises(UserError, match="a row of 1 to be left to pick from"):
        select([copied], aims, encoder, 1, evaluation=test_set)


def test_a_written_pool_needs_no_second_encoding(encoder_and_rows, tmp_path) -> None:
    encoder, rows, aims = encoder_and_rows
    folder = tmp_path / "pool"
    first = select(rows, aims, encoder, 3, folder=folder)
    counts: list[int] = []
    again = select(rows, aims, encoder, 3, folder=folder, progress=counts.append)
    assert counts == [] and again.picks.equals(first.picks)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for same in (Dataset.from_list(rows), file, str(file), open_instructions(rows)):
        assert select(same, aims, encoder, 3).picks.equals(first.picks)
    other = select(folder, aims, encoder, 3, config=JACCARD)
    assert other.provenance["data_id"] == first.provenance["data_id"]
    aim_features = encode(encoder, open_instructions(aims))
    alone = select(folder, aim_features, None, 3)
    assert alone.picks.equals(first.picks), "features need no model"


def test_bad_requests_are_refused(encoder_and_rows, tmp_path) -> None:
    encoder, rows, aims = encoder_and_rows
    codes = features(random_codes(0, 5))
    with pytest.raises(UserError, match="empty: expected at least one record, got none"):
        select([], aims, encoder)
    with pytest.raises(UserError, match="target with text, got a target without text"):
        select(rows, [*aims, {"prompt": "", "response": " "}], encoder)
    silent = open_instructions([*aims, {"prompt": "", "response": " "}])
    with pytest.raises(UserError, match="every target of .*, got 1 targets without text"):
        select(rows, silent, encoder)
    with pytest.raises(UserError, match="at most the 8 rows .* got 9 rows"):
        select(rows, aims, encoder, 9)
    with pytest.raises(UserError, match=r"at most the 100 tokens .* got 101 tokens"):
        select(codes, codes, budget="101 tokens")
    with pytest.raises(UserError, match="an SAE to encode the targets, got none"):
        select(rows, aims)
    twice = features(random_codes(0, 5), first=2)
    with pytest.raises(UserError, match="every row_id once, got 2 2 times"):
        select(PoolFeatures.of(codes, twice), codes, budget=1)
    with pytest.raises(UserError, match="pass records="):
        select(codes, codes, budget=1, config=SelectConfig(exact_duplicates=True))
    with pytest.raises(UserError, match="evaluation set as rows of text, got features"):
        select(rows, aims, encoder, 1, evaluation=codes)
    silent = features(np.zeros((2, 30)))
    with pytest.raises(UserError, match="active latent, got 2 targets without"):
        select(codes, silent, budget=1)


def test_features_of_another_sae_or_model_are_refused(encoder_and_rows, tmp_path) -> None:
    encoder, rows, aims = encoder_and_rows
    codes = features(random_codes(0, 5))
    other = SparseFeatures(codes.acts, codes.rows, replace(ORIGIN, sae_hash="other"))
    with pytest.raises(UserError, match="the sae_hash 'sae' of the pool and 'other' of the targe"):
        select(codes, other, budget=1)
    moved = SparseFeatures(codes.acts, codes.rows, replace(ORIGIN, model_revision="new"))
    with pytest.raises(UserError, match="the model_revision 'main' of the pool and 'new'"):
        select(codes, moved, budget=1)
    pool = write_pool(encoder, open_instructions(rows), tmp_path / "pool")
    with pytest.raises(UserError, match="the sae_hash '.*' of the pool"):
        select(pool, aims, replace(encoder, sae=perfect_sae(seed=1)), 1)
    with pytest.raises(UserError, match="encoded with embed.special True, got one with False"):
        select(pool, aims, encoder, 1, config=SelectConfig.preset("mona"))
    prompts = replace(encoder, config=replace(encoder.config, span="prompt", batch_tokens=64))
    assert len(select(pool, aims, prompts, 1)) == 1, "targets may be read otherwise"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"metric": "dice"}, "metric to be one of .*, got 'dice'"),
        ({"weights": "tf"}, "weights to be one of .*, got 'tf'"),
        ({"prototypes": "all"}, "prototypes to be one of .*, got 'all'"),
        ({"strategy": "topk"}, "'topk' with prototypes 'one' .* got 'topk' with 'each'"),
        ({"weights": "idf"}, "weights 'none' with metric 'presence', got 'idf'"),
        ({"strategy": "best"}, "strategy to be one of .*, got 'best'"),
        ({"length": "bins"}, "length to be one of .*, got 'bins'"),
        ({"prototypes": "one", "strategy": "max"}, "another with several, got 'max' with 'one'"),
        ({"near_duplicates": 1.5}, "near_duplicates in .*, got 1.5"),
        ({"n_reasons": -1}, "n_reasons of at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(setting, said: str) -> None:
    with pytest.raises(UserError, match=said):
        SelectConfig(**setting)
    with pytest.raises(UserError, match="a preset of .*, got 'best'"):
        SelectConfig.preset("best")
    assert SelectConfig.preset("recommended") == SelectConfig()


# ---- parts ----


@pytest.mark.parametrize(
    ("given_budget", "amount", "unit"),
    [
        (0.05, 0.05, "share"), ("5%", 0.05, "share"), ("0.5 %", 0.005, "share"), (1.0, 1, "share"),
        ("0.25", 0.25, "share"), (1, 1, "rows"), (1000, 1000, "rows"), ("1000 rows", 1000, "rows"),
        ("1,000", 1000, "rows"), ("1.5k", 1500, "rows"), ("1 row", 1, "rows"),
        ("200k tokens", 200_000, "tokens"), ("2M tokens", 2_000_000, "tokens"),
        (np.int64(7), 7, "rows"), (np.float64(0.5), 0.5, "share"), ("100%", 1, "share"),
        (0.00005, 0.00005, "share"), (np.float32(1e-6), 1e-6, "share"),
    ],
)  # fmt: skip
def test_budgets_are_understood(given_budget, amount: float, unit: str) -> None:
    got = parse_budget(given_budget)
    assert (got.amount, got.unit) == (pytest.approx(amount), unit)
    assert parse_budget(got) is got


@pytest.mark.parametrize(
    "bad", [0, -5, 1.5, "", "five", "0%", "101%", "5 apples", "1.0005k rows", True, None, "-1",
            float("nan"), float("inf"), "1.5 rows", "5% tokens", [3]],
)  # fmt: skip
def test_other_budgets_are_refused(bad) -> None:
    with pytest.raises(UserError, match='Expected a budget like 0.05, "5%", 1000 or "200k tokens"'):
        parse_budget(bad)


def test_a_share_is_of_the_pool_and_at_least_one_row() -> None:
    lengths = np.full(50, 10)
    assert parse_budget("5%").of_pool(lengths) == 3, "2.5 goes up"
    assert parse_budget(0.001).of_pool(lengths) == 1
    assert parse_budget(0.05).of_pool(lengths, n_pool=200) == 10
    assert parse_budget("30 tokens").of_pool(lengths) == 30
    assert Budget(0.05, "share").of_pool(np.ones(3000)) == 150


def test_length_bins_double() -> None:
    tokens = np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024])
    assert length_bins(tokens).tolist() == [0, 0, 1, 1, 2, 2, 3, 9, 10]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), min_size=1), st.integers(1, 999))
def test_quotas_are_shares_to_within_one(rows, amount: int) -> None:
    bins, cost = (np.array(one) for one in zip(*rows, strict=True))
    got = quotas(amount, bins, cost, 7)
    assert got.sum() == amount and len(got) == 7
    weight = np.bincount(np.minimum(bins, 6), cost, minlength=7)
    assert (np.abs(got - amount * weight / weight.sum()) < 1).all()


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16))
def test_turns_are_fair_and_never_pick_twice(n_groups: int, n: int, amount: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rankings = [rng.permutation(n) for _ in range(n_groups)]
    room = Room(np.ones(n, int), np.zeros(n, int), np.array([amount]))
    got = in_turns(rankings, room)
    assert got is not None and len(got) == min(n, amount)
    rows = [row for row, _, _ in got]
    assert len(set(rows)) == len(rows)
    assert [group for _, group, _ in got] == [i % n_groups for i in range(len(got))]
    for i, (row, group, place) in enumerate(got):
        assert rankings[group][place] == row
        assert set(rankings[group][:place]) <= set(rows[:i]), "nothing better was free"


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**16))
def test_top_lists_hold_the_best_in_the_order_of_a_full_sort(size: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, (n, 2)).astype(np.float32)  # many ties
    tops = TopLists(2, size)
    cuts = [0, *sorted(rng.integers(0, n, 2)), n]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        tops.update(scores[start:stop], np.arange(start, stop))
    for group, (rows, held) in enumerate(zip(tops.rankings(), tops.scores(), strict=True)):
        want = np.argsort(-scores[:, group], kind="stable")[:size]
        assert rows.tolist() == want.tolist()
        assert held.tolist() == scores[want, group].tolist()


def test_prototypes_are_means_by_group_whatever_the_shards() -> None:
    codes = random_codes(1, 7)
    names = ["b", "a", "b", "b", "a", "b", "a"]
    whole = make_prototypes([features(codes, groups=names)], "group")
    assert whole.names == ("b", "a") and whole.n_rows.tolist() == [4, 3]
    own = np.array(names)
    want = [codes[own == name].mean(axis=0) for name in whole.names]
    np.testing.assert_allclose(whole.vectors, want, rtol=ROUNDING)
    parts = [features(codes[:2], groups=names[:2]), features(codes[2:], groups=names[2:], first=2)]
    np.testing.assert_array_equal(make_prototypes(parts, "group").vectors, whole.vectors)
    one = make_prototypes(parts)
    assert one.names == ("all",) and one.n_rows.tolist() == [7]
    np.testing.assert_allclose(one.vectors[0], codes.mean(axis=0), rtol=ROUNDING)
    mixed = make_prototypes([features(codes[:2], groups=["x", None])], "group")  # type: ignore[list-item]
    assert mixed.names == ("x", "all")
    with pytest.raises(UserError, match="at least one target, got none"):
        make_prototypes([])
    each = make_prototypes([*parts, features(np.zeros((1, 30)), groups=["a"], first=9)], "each")
    assert each.names[:2] == ("b:0", "a:1") and each.n_rows.tolist() == [1] * 7
    np.testing.assert_array_equal(each.vectors, codes.astype(np.float32))
    with pytest.raises(UserError, match="got 'all'"):
        make_prototypes(parts, "all")


@pytest.mark.parametrize("metric", ["presence", "presence_plain", "jaccard"])
def test_nearest_is_the_mean_of_the_three_best_scores(metric: str) -> None:
    codes, aims = random_codes(3, 50), random_codes(4, 6)
    config = SelectConfig(metric=metric)
    got = select(features(codes), features(aims), budget=5, config=config)
    if metric != "jaccard":
        acts, most = features(codes).acts, {"presence_plain": 0}.get(metric)
        background = presence.background_of([acts], components=most)
        assert (len(background.axes) > 0) == (metric == "presence")
        scores = presence.score(acts, presence.presence(features(aims).acts).toarray(), background)
    else:
        scores = similarity.score(features(codes).acts, aims.astype(np.float32))
    want = np.sort(scores, axis=1)[:, -3:].mean(axis=1)
    np.testing.assert_allclose(got.scores["score"].to_numpy(), want, atol=ROUNDING)
    assert got.picks["row_id"].to_pylist() == np.argsort(-want, kind="stable")[:5].tolist()
    best = scores.argmax(axis=1)
    assert got.scores["group"].to_pylist() == [f"all:{one}" for one in best]
    why = got.why(got.picks["row_id"][0].as_py())
    assert 2 < len(why) <= 5 and 0 < sum(share for _, share in why) <= 1 + ROUNDING


def test_limits_bound_the_number_of_picks() -> None:
    tokens = np.array([5, 1, 3, 9])
    limits = ranking.Limits(np.array([True, False, True, True]), tokens, 8, True)
    assert limits.most == 2, "3 + 5, the row that may not be picked aside"
    assert ranking.Limits(np.ones(4, bool), tokens, 3, False).most == 3
    assert limits.cost.tolist() == [5, 1, 3, 9]
