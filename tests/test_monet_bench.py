"""The parts of the Monet benchmark: models of one size, sequences of all domains, goals, tables."""

from dataclasses import replace

import numpy as np
import torch

from benchmarks import monet, monet_data, monet_table, monet_train
from benchmarks.matching import goals as matching_goals
from benchmarks.matching import matched_row

SMALL = replace(
    monet_train.Size(), d_model=16, layers=2, heads=2, vocab=300, n=8, m=4, routing_heads=2,
    topk=2, tokens=5000, context=16, batch=8,
)  # fmt: skip


def test_models_of_all_kinds_have_one_size_and_learn() -> None:
    sizes, ids = [], torch.randint(0, 300, (1, 16)).repeat(160, 1)
    for kind in monet_train.KINDS:
        model = monet_train.build(kind, SMALL)
        sizes.append(sum(p.numel() for p in model.parameters()))
        curve = monet_train.fit(model, ids, SMALL, "cpu")["curve"]
        assert curve[0][1] > curve[-1][1] + 0.1  # one sequence, seen again and again
    assert max(sizes) < 1.02 * min(sizes)


def test_passages_cover_a_text_and_code_keeps_its_lines() -> None:
    text = "word " * 1000
    pieces = monet_data._passages(text)
    assert "".join(pieces) == " ".join(text.split())[: sum(map(len, pieces))]
    assert all(len(p) == monet_data.PASSAGE for p in pieces[:-1])
    assert monet_data._passages("def f():\n    pass\n", join=False) == ["def f():\n    pass"]


def test_sequences_hold_every_domain_alike_and_a_seed_fixes_their_order() -> None:
    texts = {d: [f"{d} text {i} " * 30 for i in range(20)] for d in monet_data.DOMAINS}
    corpus = monet_data.Corpus(texts, texts)
    tokenizer = monet_data.make_tokenizer(corpus, 300)
    ids = monet_data.sequences(tokenizer, corpus, 4000, 16, seed=0)
    assert ids.shape == (250, 16)
    counts = [sum(d in tokenizer.decode(row) for row in ids) for d in ("python", "wikipedia")]
    assert 40 <= counts[0] <= 60 and 40 <= counts[1] <= 60
    assert torch.equal(ids, monet_data.sequences(tokenizer, corpus, 4000, 16, seed=0))
    assert not torch.equal(ids, monet_data.sequences(tokenizer, corpus, 4000, 16, seed=1))


def test_goals_and_tables_of_monet() -> None:
    base = {
        "name": "x: without a", "what": "domain", "kind": "x", "domain": "a", "experts": 5,
        "by_chance": 0.5, "weight": 0.1, "plain": 9.0, "own_rise": 3.0, "own_low": 2.0,
        "own_high": 4.0, "others_rise": 0.2, "ratio": 15.0, "random_own": 1.0,
        "random_others": 1.0, "random_ratio": 1.0,
    }  # fmt: skip
    rows = [base, base | {"ratio": 9.0}, base | {"ratio": None}]
    assert [goal.met for goal in monet.goals(rows)] == [True, False, True]
    shown = monet_table.monet_domains({"rows": rows})
    assert "15.0" in shown and "others fell" in shown and "+3.0 [+2.0, +4.0]" in shown
    assert [g.met for g in monet.goals([{"what": "masked", "peak_gib": 5.0}])] == [False]


def test_every_layer_is_timed_plain_and_masked() -> None:
    rows = monet.speed_rows("cpu", 1, (16, 32, 4, 2, 4, 8))
    plain = [row for row in rows if row["what"] == "speed"]
    assert [row["kind"] for row in plain] == ["horizontal", "vertical", "dense"]
    assert all(row["forward_tokens_s"] > row["step_tokens_s"] > 0 for row in plain)
    assert len([row for row in rows if row["what"] == "masked"]) == 6
    assert "deleted" in monet_table.monet_speed({"rows": rows})


def test_matching_finds_the_planted_pairs_and_its_goals_can_fail() -> None:
    row = matched_row(300, 24)
    assert np.isclose(row["pw_mcc"], row["true"], atol=1e-6)
    assert [goal.met for goal in matching_goals([row])] == [True, True, True]
    assert not matching_goals([row | {"true": 0.5}])[-1].met
