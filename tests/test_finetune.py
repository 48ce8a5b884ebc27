"""Fine-tuning on picks: the partial training is the whole one, runs go on, intervals are right."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import finetune, finetune_rows, finetune_table, tuning
from benchmarks.finetune import cell_key, run_cells
from benchmarks.finetune_rows import Cell, Held, held_out, spend, wrong_solutions
from benchmarks.tuning import Example, Setting, encode, entering, evaluate, make_student, train
from sae_core.errors import UserError
from sae_core.models import LanguageModel
from tests.tiny_models import N_LAYERS, tiny_model

SETTING = Setting(first=2, lr=3e-3, batch_tokens=64, max_len=64, is_mixed=False)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32, another order of sums


class Tokenizer:
    """Characters as tokens; the template's marks are single tokens."""

    chat_template = "yes"
    eos_token_id = 2
    marks = {"<s>": 300, "<u>": 301, "<a>": 302}

    def apply_chat_template(self, turns: list, add_generation_prompt: bool, tokenize: bool) -> str:
        return f"<s>be nice<u>{turns[0]['content']}<a>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        for mark, number in self.marks.items():
            text = text.replace(mark, chr(number))
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def make_lm(architecture: str = "llama") -> LanguageModel:
    return LanguageModel(tiny_model(architecture), Tokenizer(), "tiny", "r1")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_lm()


def make_examples(n: int = 12, seed: int = 0) -> list[Example]:
    """Random prompts with random responses."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        start, length = int(rng.integers(3, 9)), int(rng.integers(2, 7))
        ids = np.append(rng.integers(3, 512, start + length), 2)
        found.append(Example(ids, start, start + length, length))
    return found


# ---- rows to tokens ----


def test_the_response_is_what_follows_the_prompt():
    one = encode(Tokenizer(), "2+2?", " four\n", 64)
    text = Tokenizer().decode(one.ids.tolist())
    assert text == f"{chr(300)}be nice{chr(301)}2+2?{chr(302)}four{chr(2)}"
    assert Tokenizer().decode(one.ids[one.start : one.stop].tolist()) == "four"
    assert (one.n_chars, one.ids[one.stop]) == (4, 2)


def test_a_long_prompt_loses_its_beginning_and_a_long_response_its_end():
    one = encode(Tokenizer(), "abc" * 20 + "the question", "yes", 32)
    text = Tokenizer().decode(one.ids.tolist())
    assert len(one.ids) == 32
    assert text.startswith(f"{chr(300)}be nice{chr(301)}")
    assert text.endswith(f"the question{chr(302)}yes{chr(2)}")
    cut = encode(Tokenizer(), "why?" * 10, "because " * 20, 32)
    assert (len(cut.ids), cut.start, cut.stop) == (32, 8, 32)
    assert Tokenizer().decode(cut.ids[8:].tolist()) == ("because " * 20)[:24]
    assert cut.n_chars == 24
    assert 2 not in cut.ids


def test_without_a_template_prompt_and_response_are_lines(tiny_lm):
    one = encode(tiny_lm.tokenizer, "Once upon", "a time", 64)
    assert tiny_lm.tokenizer.decode(one.ids[: one.start], skip_special_tokens=True) == "Once upon\n"
    assert tiny_lm.tokenizer.decode(one.ids[one.start : one.stop]).strip() == "a time"
    assert one.ids[one.stop] == tiny_lm.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("response", "right"), [("6*8=48, 48+0=48\n#### 48", "48"), ("3.48 and 480: 7\n#### 7", "7")]
)
def test_wrong_solutions_differ_in_the_final_number_alone(response: str, right: str):
    found = wrong_solutions(response, np.random.default_rng(0))
    assert len(set(found)) == 3
    for text in found:
        wrong = text.rpartition("#### ")[2]
        assert wrong != right
        assert len(wrong) == len(right)
        assert text.replace("3.48", "@").replace("480", "&").replace(wrong, right) == (
            response.replace("3.48", "@").replace("480", "&")
        )


@pytest.mark.parametrize("response", ["no number", "#### 1,200", "#### -3", "#### 2.5"])
def test_solutions_without_a_plain_number_are_not_ranked(response: str):
    assert wrong_solutions(response, np.random.default_rng(0)) == []


def test_a_budget_is_spent_from_the_top():
    n_tokens = np.array([5, 30, 10, 8, 5, 100])
    assert spend([1, 0, 2, 3, 4], n_tokens, 50) == [1, 0, 2, 4]  # 3 exceeds what is left
    assert spend([5, 0], n_tokens, 50) == [0]
    assert spend([0, 2], n_tokens, 4) == []
    assert spend([], n_tokens, 4) == []
    order = np.random.default_rng(0).permutation(1000)
    lengths = np.random.default_rng(1).integers(20, 200, 1000)
    spent = lengths[spend(order.tolist(), lengths, 9000)].sum()
    assert 9000 - 20 < spent <= 9000


# ---- training ----


def whole_loss(model: Any, examples: list[Example]) -> torch.Tensor:
    """The definition: one row at a time through the whole model."""
    total, n = torch.zeros(()), 0
    for one in examples:
        ids = torch.from_numpy(one.ids)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        for place in range(one.start, len(one.ids)):
            total = total - logits[place - 1].log_softmax(0)[ids[0, place]]
            n += 1
    return total / n


@pytest.mark.parametrize("first", [0, 1, N_LAYERS - 1])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_partial_training_has_the_whole_models_loss_and_gradients(architecture: str, first: int):
    lm, examples = make_lm(architecture), make_examples()
    student = make_student(lm, first)
    nll, _, row = tuning.response_losses(
        student, entering(lm, first, examples, batch_tokens=40), examples, False
    )
    nll.mean().backward()
    whole = tiny_model(architecture)
    if first:  # frozen below
        whole.get_input_embeddings().requires_grad_(False)
    expected = whole_loss(whole, examples)
    expected.backward()
    assert nll.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(nll) == len(row) == sum(len(e.ids) - e.start for e in examples)
    path, blocks = tuning.decoder_blocks(whole)
    theirs = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    compared = 0
    for name, parameter in student.model.named_parameters():
        if parameter.grad is None:
            continue
        if name.startswith(f"{path}."):  # block 0 of the student is block `first` of the model
            number, _, rest = name.removeprefix(f"{path}.").partition(".")
            name = f"{path}.{int(number) + first}.{rest}"
        torch.testing.assert_close(parameter.grad, theirs[name], **CLOSE)
        compared += 1
    assert compared == len(student.parameters)
    assert len(blocks) == N_LAYERS


def test_two_steps_move_the_blocks_as_they_move_the_whole_model(lm):
    """A whole model whose lower part is frozen, trained by hand: the same weights."""
    examples, setting = make_examples(4), replace(SETTING, batch_tokens=1000, epochs=2)
    student = make_student(lm, 2)
    train(student, entering(lm, 2, examples), examples, setting, 0)
    whole = tiny_model("llama")
    moved = [*whole.model.layers[2:].parameters(), whole.model.norm.weight]
    start = [p.detach().clone() for p in moved]
    optimizer = torch.optim.AdamW(moved, lr=SETTING.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        whole_loss(whole, examples).backward()
        torch.nn.utils.clip_grad_norm_(moved, 1.0)
        optimizer.step()
    for mine, theirs, before in zip(student.parameters, moved, start, strict=True):
        # Adam divides by the gradient's size: where that is tiny, rounding decides the step
        wrong = (mine - theirs).abs() > 1e-3 * (theirs - before).abs() + 1e-6
        assert wrong.float().mean() < 0.01


def test_what_lies_below_is_left_alone_and_the_model_too(lm):
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    examples = make_examples()
    student = make_student(lm, 2)
    train(student, entering(lm, 2, examples), examples, SETTING, 0)
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert torch.equal(
        student.model.get_input_embeddings().weight, lm.model.model.embed_tokens.weight
    )
    assert not torch.equal(student.model.model.norm.weight, lm.model.model.norm.weight)
    old = lm.model.model.layers[2].mlp.up_proj.weight
    assert not torch.equal(student.model.model.layers[0].mlp.up_proj.weight, old)


def test_training_lowers_the_loss_of_its_rows_not_of_shuffled_labels(lm):
    """The same prompts and responses, paired otherwise: only the true pairing is learnt."""
    rng = np.random.default_rng(0)
    responses = [rng.integers(3, 512, 5) for _ in range(8)]
    prompts = [rng.integers(3, 512, 6) for _ in range(8)]

    def paired(shift: int) -> list[Example]:
        rows = [np.concatenate([p, responses[(i + shift) % 8], [2]]) for i, p in enumerate(prompts)]
        return [Example(ids, 6, 11, 5) for ids in rows]

    student, true, control = make_student(lm, 2), paired(0), paired(3)

    def losses() -> tuple[float, float]:
        both = (evaluate(student, entering(lm, 2, rows), rows, SETTING) for rows in (true, control))
        first, second = (found.nll.sum() / 40 for found in both)
        return first, second

    before = losses()
    setting = replace(SETTING, epochs=50, lr=0.01)
    steps = train(student, entering(lm, 2, true), true, setting, 0)
    after = losses()
    assert steps[-1] < 0.2 * steps[0]
    assert after[0] < 1
    assert before[0] - after[0] > 5
    assert before[1] - after[1] < 0.5 * (before[0] - after[0])
    assert evaluate(student, entering(lm, 2, true), true, SETTING).is_exact.all()
    assert not evaluate(student, entering(lm, 2, control), control, SETTING).is_exact.any()


def test_exact_is_what_greedy_decoding_gives(lm):
    """Responses that the model itself writes are exact, and no longer so with one other token."""
    rows = []
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(3, 512, 6)
        for _ in range(4):
            logits = lm.model(input_ids=torch.from_numpy(ids)[None]).logits[0, -1]
            ids = np.append(ids, int(logits.argmax()))
        rows.append(Example(ids, 6, 9, 3))  # its own last token stands for the end of turn
    student = make_student(lm, 1)
    assert evaluate(student, entering(lm, 1, rows), rows, SETTING).is_exact.tolist() == [1, 1, 1]
    for place, expected in ((7, 0), (9, 0), (2, None)):
        changed = rows[0].ids.copy()
        changed[place] = (changed[place] + 1) % 512
        one = [rows[0]._replace(ids=changed)]
        found = evaluate(student, entering(lm, 1, one), one, SETTING).is_exact.tolist()
        assert expected is None or found == [expected]
    cut = [Example(rows[0].ids[:9], 6, 9, 3)]  # the end of turn is missing: nobody knows
    assert evaluate(student, entering(lm, 1, cut), cut, SETTING).is_exact.tolist() == [0]


def test_the_measured_loss_leaves_the_end_of_turn_out(lm):
    examples = make_examples(5)
    student = make_student(lm, 2)
    found = evaluate(student, entering(lm, 2, examples), examples, SETTING)
    for one, nll in zip(examples, found.nll, strict=True):
        shorter = one._replace(ids=one.ids[: one.stop])
        expected = whole_loss(lm.model, [shorter]).item() * (one.stop - one.start)
        assert nll == pytest.approx(expected, rel=1e-4)


def test_the_seed_decides_the_order_and_nothing_else_does(lm):
    examples = make_examples(20)
    states = entering(lm, 2, examples)

    def trained(seed: int) -> tuple[list[float], torch.Tensor]:
        student = make_student(lm, 2)
        return train(student, states, examples, SETTING, seed), student.parameters[0].detach()

    (one, weights), (same, again), (other, moved) = trained(0), trained(0), trained(1)
    assert one == same
    assert torch.equal(weights, again)
    assert one != other
    assert sorted(np.round(one[:1], 3)) != sorted(np.round(other[:1], 3))
    assert not torch.equal(weights, moved)


def test_the_rate_rises_and_falls(lm, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spied(self: Any, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    examples = make_examples(10)
    setting = replace(SETTING, batch_tokens=1, lr=1.0, warmup=0.4)
    train(make_student(lm, 3), entering(lm, 3, examples), examples, setting, 0)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_a_block_that_is_not_there_is_refused(lm):
    with pytest.raises(UserError, match=r"block in 0\.\.3, got 4"):
        make_student(lm, 4)


# ---- cells ----


def row(label: str, text: str, held: bool) -> SimpleNamespace:
    return SimpleNamespace(
        label=label, prompt=text, response=f"r{text}", text=f"{text}\nr{text}", held_out=held
    )


def test_held_out_rows_are_new_and_take_turns_over_labels():
    rows = [row("bbh:a", f"a{i}", True) for i in range(9)]
    rows += [row("bbh:b", f"b{i}", True) for i in range(3)] + [row("mbpp", "m", True)]
    rows += [row("bbh:a", "pool", False)]
    size = replace(finetune_rows.SIZES["cpu"], n_held=6, setting=SETTING)
    seen = {"a0\nra0", "b1\nrb1"}
    found = held_out(Tokenizer(), rows, "mix:bbh", size, seen)
    texts = [Tokenizer().decode(e.ids[e.start : e.stop].tolist()) for e in found.rows]
    assert sorted(text[1] for text in texts) == ["a"] * 4 + ["b"] * 2
    assert not {"ra0", "rb1", "rpool"} & set(texts)
    assert len(set(texts)) == 6
    assert found.ranked == []
    assert len(held_out(Tokenizer(), rows, "bbh:b", size, set()).rows) == 3


def test_solutions_of_gsm8k_are_ranked_unless_cut():
    rows = [row("gsm8k", f"q{i}", True) for i in range(4)]
    for number, one in enumerate(rows):
        one.response = f"so 1{number}\n#### 1{number}" + ("" if number else " or so")
    size = replace(finetune_rows.SIZES["cpu"], n_held=4, n_ranked=2, setting=SETTING)
    found = held_out(Tokenizer(), rows, "gsm8k", size, set())
    assert [len(group) for group in found.ranked] == [4, 4]
    short = replace(size, setting=replace(SETTING, max_len=16))
    assert held_out(Tokenizer(), rows, "gsm8k", short, set()).ranked == []


def make_cell(method: str = "a", seed: int = 0, n: int = 3) -> Cell:
    return Cell(method, "t", 0.05, seed, tuple(make_examples(n)), 1)


def fake_bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Ten pool rows, the last not trainable; `down` and `up` rank them by place."""
    from benchmarks import selection

    pool = np.arange(5, 15)
    aim = SimpleNamespace(name="t", is_hit=pool < 8, draws=[np.array([0, 1]), np.array([2])])
    score = {"down": lambda draws: [-pool * len(draw) for draw in draws],
             "up": lambda draws: [pool * len(draw) for draw in draws]}  # fmt: skip
    methods = [SimpleNamespace(name=n, score=lambda _, d, f=f: f(d)) for n, f in score.items()]
    monkeypatch.setattr(selection, "main_methods", lambda bench: methods)
    return SimpleNamespace(data=SimpleNamespace(pool=pool, rows=[None] * 15), aims=[aim])


def test_methods_spend_the_same_budget_on_rows_that_may_be_trained_on(monkeypatch):
    bench = fake_bench(monkeypatch)
    rows = {place: Example(np.full(10, place), 4, 9, 5) for place in range(5, 14)}
    cells = finetune_rows.make_cells(bench, rows, ["down", "up"], ["t"], [0.25, 0.5], 2)
    assert [(c.method, c.share, c.seed) for c in cells] == [
        ("untrained", 0.0, 0),
        *((m, share, seed) for seed in (0, 1) for share in (0.25, 0.5) for m in ("down", "up")),
    ]
    picked = [[int(one.ids[0]) for one in c.picks] for c in cells]
    assert picked[:5] == [[], [5, 6], [13, 12], [5, 6, 7, 8], [13, 12, 11, 10]]  # 14 is left out
    assert [c.n_hits for c in cells[:5]] == [0, 2, 0, 3, 0]
    with pytest.raises(UserError, match="names out of down, up, got 'sideways'"):
        finetune_rows.make_cells(bench, rows, ["sideways"], ["t"], [0.5], 1)
    with pytest.raises(UserError, match="names out of t, got 'u'"):
        finetune_rows.make_cells(bench, rows, ["up"], ["u"], [0.5], 1)


def test_a_cell_gives_its_sums(lm):
    rows = make_examples(4, seed=1)
    wrong = [one._replace(ids=np.roll(one.ids, 1)) for one in rows[:2]]
    held = Held(rows, [[rows[0], wrong[0]], [wrong[1], rows[1]]])
    states = finetune.remembered(lm, 2)
    found = finetune.run_cell(lm, make_cell(), held, SETTING, states)
    again = finetune.run_cell(lm, make_cell(), held, SETTING, states)
    assert found["nll"] == again["nll"]
    assert found["tokens"] == sum(len(e.ids) for e in make_examples(3))
    untrained = make_student(lm, 2)
    base = finetune.run_cell(lm, Cell("untrained", "t", 0.0, 0, (), 0), held, SETTING, states)
    plain = evaluate(untrained, states(rows), rows, SETTING)
    assert base["nll"] == pytest.approx(plain.nll, abs=1e-5)
    flat = [one for group in held.ranked for one in group]
    nll = evaluate(untrained, states(flat), flat, SETTING).nll
    assert base["is_ranked"] == [int(nll[0] < nll[1]), int(nll[2] < nll[3])]
    assert base["steps"] == 0 < found["steps"]
    assert found["nll"] != base["nll"]


def test_an_interrupted_run_goes_on(tmp_path: Path):
    cells = [make_cell(seed=seed) for seed in range(4)]
    held = {"t": Held(make_examples(2, seed=1), [])}
    path, ran = tmp_path / "cells.jsonl", []

    def run(cell: Cell, rows: Held) -> dict[str, Any]:
        if len(ran) == 2:
            raise TimeoutError
        ran.append(cell.seed)
        return {"nll": [float(cell.seed), 1.0], "seconds": 0.0}

    with pytest.raises(TimeoutError):
        run_cells(cells, held, SETTING, "r1", path, run)
    assert ran == [0, 1]
    with path.open("a") as file:
        file.write('{"key": "half a li')  # as a crash of the machine may leave it
    path.write_text(path.read_text() + "\n")
    ran.clear()
    ran.append(-1)
    again = [make_cell(method="b", seed=0), *cells[:2], cells[2]]
    records = run_cells(again, held, SETTING, "r1", path, run)
    assert ran == [-1, 2]
    assert [r["nll"][0] for r in records] == [0.0, 0.0, 1.0, 2.0]
    assert [r["method"] for r in records] == ["b", "a", "a", "a"]  # same rows, same training
    assert len([line for line in path.read_text().splitlines() if '"nll"' in line]) == 3
    assert json.loads(path.read_text().splitlines()[0])["key"]


def test_the_key_knows_all_that_the_result_depends_on():
    held = Held(make_examples(2, seed=1), [])
    plain = cell_key(make_cell(), held, SETTING, "r1")
    assert cell_key(make_cell(method="b"), held, SETTING, "r1") == plain
    other = [
        cell_key(make_cell(seed=1), held, SETTING, "r1"),
        cell_key(make_cell(n=2), held, SETTING, "r1"),
        cell_key(make_cell(), Held(make_examples(2, seed=2), []), SETTING, "r1"),
        cell_key(make_cell(), held._replace(ranked=[held.rows]), SETTING, "r1"),
        cell_key(make_cell(), held, replace(SETTING, lr=1.0), "r1"),
        cell_key(make_cell(), held, SETTING, "r2"),
    ]
    moved = make_cell()
    turned = moved._replace(picks=moved.picks[::-1])
    other.append(cell_key(turned, held, SETTING, "r1"))
    assert len({plain, *other}) == 8


# ---- sums ----


def test_the_difference_is_a_ratio_of_sums_with_both_intervals():
    rng = np.random.default_rng(0)
    n_tokens = rng.integers(1, 100, 40)
    noise = rng.normal(size=(3, 40)) * n_tokens
    other = noise + 5 * n_tokens
    ours = noise + 4.5 * n_tokens + np.array([[0.0], [0.1], [0.2]]) * n_tokens
    found = finetune_table.paired(ours, other, n_tokens)
    assert found["difference"] == pytest.approx(-0.4)
    assert found["rows_low"] == pytest.approx(-0.4)  # each row says the same: no width at all
    assert found["rows_high"] == pytest.approx(-0.4)
    low, high = stats.t.interval(0.95, 2, -0.4, 0.1 / 3**0.5)
    assert (found["seeds_low"], found["seeds_high"]) == (pytest.approx(low), pytest.approx(high))
    assert found["seeds_better"] == 3
    one = finetune_table.paired(ours[:1], other[:1], n_tokens)
    assert one["seeds_low"] is None is one["seeds_high"]


def test_the_interval_over_rows_covers_the_truth():
    rng, hits = np.random.default_rng(1), 0
    for trial in range(200):
        n_tokens = rng.integers(20, 60, 50)
        gap = (rng.normal(0.05, 0.2, 50) * n_tokens)[None]
        found = finetune_table.paired(gap, np.zeros_like(gap), n_tokens, 300, trial)
        hits += found["rows_low"] <= 0.05 <= found["rows_high"]
    assert 0.88 <= hits / 200 <= 0.99


def records(**losses: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "method": method.replace("_", "-"), "target": target, "share": share, "seed": seed,
            "n_rows": 10, "n_hits": 4, "tokens": 100, "response_tokens": 50, "steps": 2,
            "seconds": 1.0, "nll": [loss * 2 + shift, loss * 6 - shift], "is_exact": [1, 0],
            "is_ranked": [1, 1] if target == "gsm8k" else [],
        }
        for method, values in losses.items()
        for target, loss in zip(("gsm8k", "mbpp", "mix:bbh"), values, strict=True)
        for seed, shift in ((0, 0.01), (1, -0.01))
        for share in ((0.0,) if method == "untrained" else (0.05,))
    ]  # fmt: skip


HELD = {
    name: [Example(np.zeros(4, dtype=np.int64), 1, 3, 4), Example(np.zeros(8), 1, 7, 9)]
    for name in ("gsm8k", "mbpp", "mix:bbh")
}


def test_rows_of_results_are_means_over_seeds():
    found = finetune_table.loss_rows(records(ours=[1.0, 2.0, 3.0]), HELD, "cpu")
    assert [r["loss"] for r in found] == pytest.approx([1.0, 2.0, 3.0])
    assert found[0]["bits_per_char"] == pytest.approx(8 / 13 / np.log(2))
    assert [(r["score_name"], r["score"]) for r in found] == [
        ("ranked", 1.0), (None, None), ("exact", 0.5),
    ]  # fmt: skip
    assert (found[0]["hits"], found[0]["held_tokens"], found[0]["seeds"]) == (0.4, 8, 2)
    assert not any(isinstance(v, (list, dict)) for r in found for v in r.values())


@pytest.mark.parametrize(("best", "met"), [(0.9, True), (1.15, False)])
def test_the_goal_counts_targets_won_against_every_baseline(best: float, met: bool):
    some = records(ours=[best, 1.9, 3.1], random=[1.2, 2.0, 3.0], bm25=[1.1, 2.1, 3.2],
                   untrained=[9.0, 0.1, 0.1])  # fmt: skip
    rows = finetune_table.loss_rows(some, HELD, "cpu")
    rows += finetune_table.difference_rows(some, HELD, "cpu", "ours")
    assert len([r for r in rows if r["kind"] == "difference"]) == 6  # untrained has no budget
    (goal,) = finetune_table.goals(rows)
    assert (goal.value, goal.met) == (2 if met else 1, met)
    assert "mix:bbh +0.1000 [+0.1000, +0.1000] against random" in goal.note
