"""Activations and their stream: the oracle is one plain forward pass per chunk, without padding."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, MAX_POSITIONS, SLIDING_WINDOW, tiny_model
from torch import Tensor
from transformers import AutoTokenizer

from sae_core.activations import (
    Activations,
    HarvestConfig,
    replace_activations,
    stream_activations,
)
from sae_core.errors import UserError
from sae_core.models import LanguageModel
from sae_core.text import TextRow, TextSource, rows_from_texts
from sae_core.tokens import START, Cursor, TokenBatch, count_tokens, token_windows

# Values are of order 10 and float32 sums over 48 terms are taken in another order when the shape
# of the batch changes; a leak from another chunk or from padding shows as 0.01 and more.
ROUNDING = 2e-4
POINTS = ["layers.2.out", "layers.1.mlp.in", "layers.1.mlp.out", "layers.2.attn.out"]
SENTENCE = "once upon a time there was little girl who liked to play with big red dog"
WORDS = SENTENCE.split()

Key = tuple[int, int]


def texts(n: int, longest: int = 60) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=rng.integers(0, longest))) for _ in range(n)]


ROWS = rows_from_texts(["", "a", *texts(9, longest=30)])


@pytest.fixture(scope="module")
def tokenizer(stories260k: Path):  # noqa: ANN201 - a class of transformers
    return AutoTokenizer.from_pretrained(stories260k)


@pytest.fixture(scope="module")
def tiny(tokenizer) -> Callable[..., LanguageModel]:  # noqa: ANN001
    def build(architecture: str, attention: str = "sdpa") -> LanguageModel:
        return LanguageModel(tiny_model(architecture, attention), tokenizer, architecture, "0")

    return build


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., LanguageModel]) -> LanguageModel:
    return tiny("llama")


def collect(
    lm: LanguageModel, config: HarvestConfig, points: Sequence[str] = POINTS, rows=ROWS
) -> dict[str, Activations]:
    """Everything at each point, sorted by row and position; a token that comes twice fails here."""
    parts = list(stream_activations(lm, rows, points, config))
    assert all(set(part) == set(points) for part in parts)
    found = {}
    for name in points:
        x = torch.cat([part[name].x for part in parts])
        row_id = torch.cat([part[name].row_id for part in parts])
        position = torch.cat([part[name].position for part in parts])
        order = torch.from_numpy(np.lexsort((position.numpy(), row_id.numpy())))
        found[name] = Activations(x, row_id, position).select(order)
        assert len(set(keys(found[name]))) == len(x)
    return found


def keys(item: Activations) -> list[Key]:
    return list(zip(item.row_id.tolist(), item.position.tolist(), strict=True))


def alone(lm: LanguageModel, ids: Sequence[int]) -> dict[str, Tensor]:
    """[t, d] at POINTS in an ordinary, whole, unpadded forward pass, by plain torch hooks."""
    blocks = next(m for m in lm.model.modules() if isinstance(m, torch.nn.ModuleList))
    attention = next(n for n in ("self_attn", "attn", "attention") if hasattr(blocks[2], n))
    modules = [blocks[2], blocks[1].mlp, blocks[1].mlp, getattr(blocks[2], attention)]
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in zip(POINTS, modules, strict=True):

        def note(_: torch.nn.Module, args: tuple, output: Any, name: str = name) -> None:
            value = args[0] if name.endswith(".in") else output
            seen[name] = (value[0] if isinstance(value, tuple) else value)[0]

        handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        lm.model(torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    return seen


def expected(lm: LanguageModel, size: int) -> dict[str, Activations]:
    """The kept tokens by hand: chunks of ``size`` that all begin with the BOS, which is dropped."""
    rows, places, vectors = [], [], {name: [] for name in POINTS}
    for row in ROWS:
        _, *ids = lm.tokenizer(row.text)["input_ids"]
        for start in range(0, len(ids), size - 1):
            part = ids[start : start + size - 1]
            values = alone(lm, [lm.tokenizer.bos_token_id, *part])
            rows += [row.row_id] * len(part)
            places += range(1 + start, 1 + start + len(part))
            for name in POINTS:
                vectors[name].append(values[name][1:])
    row_id, position = torch.tensor(rows), torch.tensor(places, dtype=torch.int32)
    return {name: Activations(torch.cat(vectors[name]), row_id, position) for name in POINTS}


def assert_same(
    got: dict[str, Activations], want: dict[str, Activations], tolerance: float
) -> None:
    for name in POINTS:
        assert keys(got[name]) == keys(want[name])
        assert (got[name].x - want[name].x).abs().max() <= tolerance


# --- every token has the activation of an unpadded pass of its own ------------------------------


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [*((name, "sdpa") for name in ARCHITECTURES), ("llama", "eager"), ("gemma3", "eager")],
)
def test_neither_batching_nor_batch_size_matters(
    tiny: Callable[..., LanguageModel], architecture: str, attention: str
) -> None:
    lm = tiny(architecture, attention)
    want = expected(lm, SLIDING_WINDOW)
    assert len(want[POINTS[0]]) > 100
    for batching in ("pad", "pack"):
        for batch_tokens in (SLIDING_WINDOW, 256):
            config = HarvestConfig(SLIDING_WINDOW, batch_tokens, batching, window_rows=7)
            assert_same(collect(lm, config), want, ROUNDING)


def test_the_context_matters(llama: LanguageModel) -> None:
    """The control: what other chunks must not do, the own chunk does."""
    short = collect(llama, HarvestConfig(8, 256))[POINTS[0]]
    long = collect(llama, HarvestConfig(64, 256))[POINTS[0]]
    assert keys(short) == keys(long)
    late = (short.position > 8) & (short.position < 64)
    difference = (short.x - long.x).abs().amax(1)
    assert late.sum() > 50 and difference[late].min() > 10 * ROUNDING
    assert difference[short.position < 8].max() <= ROUNDING


def test_padding_keeps_sliding_layers_exact_beyond_their_window(
    tiny: Callable[..., LanguageModel],
) -> None:
    lm = tiny("gemma3")
    size = 3 * SLIDING_WINDOW
    got = collect(lm, HarvestConfig(size, 512, window_rows=7))
    assert_same(got, expected(lm, size), ROUNDING)


def test_the_tokenizers_padding_side_and_token_do_not_matter(
    llama: LanguageModel, stories260k: Path
) -> None:
    config = HarvestConfig(16, 256)
    other = AutoTokenizer.from_pretrained(stories260k, padding_side="left")
    other.pad_token = "a"
    assert_same(collect(replace(llama, tokenizer=other), config), collect(llama, config), 0.0)


def test_a_real_model_agrees_with_its_own_hidden_states(tiny_lm: LanguageModel) -> None:
    rows = rows_from_texts(["Once upon a time, there was a little girl named Lily.", "The end."])
    got = collect(tiny_lm, HarvestConfig(128, 256), ["layers.1.out"], rows)["layers.1.out"]
    for row in rows:
        ids = tiny_lm.tokenizer(row.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = tiny_lm.model(ids, output_hidden_states=True).hidden_states[2][0]
        mine = got.x[got.row_id == row.row_id]
        torch.testing.assert_close(mine, hidden[1:], atol=1e-5, rtol=1e-5)


# --- which tokens come, and in which order ------------------------------------------------------


def kept(lm: LanguageModel, config: HarvestConfig, rows=ROWS) -> list[Key]:
    stream = stream_activations(lm, rows, ["layers.0.in"], config)
    items = [values["layers.0.in"] for values in stream]
    return [(int(r), int(p)) for i in items for r, p in zip(i.row_id, i.position, strict=True)]


def test_positions_are_those_of_the_rows_own_tokenisation(llama: LanguageModel) -> None:
    """layers.0.in is the embedding, so each vector tells which token it belongs to."""
    embedding = llama.model.get_input_embeddings().weight
    found = collect(llama, HarvestConfig(16, 256), ["layers.0.in"])["layers.0.in"]
    for row in ROWS:
        ids = torch.tensor(llama.tokenizer(row.text)["input_ids"])
        mine = found.row_id == row.row_id
        assert found.position[mine].tolist() == list(range(1, len(ids)))  # 0 is the BOS
        assert torch.equal(found.x[mine], embedding[ids[1:]])


def test_special_and_first_tokens_come_only_when_asked_for(llama: LanguageModel) -> None:
    rows = rows_from_texts(["once upon</s>a time"])
    ids = llama.tokenizer(rows.open().__next__().text)["input_ids"]
    end = ids.index(llama.tokenizer.eos_token_id)
    places = list(range(len(ids)))

    def positions(**options: bool) -> list[int]:
        return [p for _, p in kept(llama, HarvestConfig(128, 256, **options), rows)]

    assert positions() == [p for p in places if p not in (0, end)]
    assert positions(include_special=True) == places[1:]
    assert positions(include_special=True, include_first=True) == places
    assert positions(include_first=True) == [p for p in places if p not in (0, end)]


def test_a_copied_bos_is_never_kept(llama: LanguageModel) -> None:
    rows = rows_from_texts([" ".join(WORDS * 4)])
    n = len(llama.tokenizer(" ".join(WORDS * 4))["input_ids"])
    config = HarvestConfig(16, 256, include_special=True, include_first=True)
    assert sorted(kept(llama, config, rows)) == [(0, place) for place in range(n)]


def test_without_a_bos_the_first_token_of_each_chunk_is_left_out(
    llama: LanguageModel, stories260k: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_file=str(stories260k / "tokenizer.json"), bos_token="<s>", unk_token="<unk>"
    )
    plain.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    if plain("a")["input_ids"][0] == plain.bos_token_id:
        plain = _without_bos(plain)
    text = " ".join(WORDS * 4)
    n = len(plain(text)["input_ids"])
    lm = replace(llama, tokenizer=plain)
    got = sorted(p for _, p in kept(lm, HarvestConfig(16, 256), rows_from_texts([text])))
    assert got == [place for place in range(n) if place % 16]


def _without_bos(tokenizer):  # noqa: ANN001, ANN202
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    return tokenizer


def test_the_order_is_the_same_every_time_and_with_or_without_the_thread(
    llama: LanguageModel,
) -> None:
    config = HarvestConfig(16, 64, window_rows=4)
    runs = [
        torch.cat([v[POINTS[0]].x for v in stream_activations(llama, ROWS, POINTS, config, **how)])
        for how in ({}, {}, {"prefetch": 0})
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_rows_stay_within_windows(llama: LanguageModel) -> None:
    rows = [row for row, _ in kept(llama, HarvestConfig(16, 64, window_rows=4))]
    last = {row: place for place, row in enumerate(rows)}
    first = {row: place for place, row in reversed(list(enumerate(rows)))}
    # a window takes at most 4 rows, so rows that are 4 apart are never in one
    assert all(last[a] < first[b] for a in first for b in first if b >= a + 4)
    assert rows != sorted(rows), "within a window they are sorted by length"


@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_max_tokens_stops_exactly_at_the_first_tokens_of_the_text(
    llama: LanguageModel, batching: str
) -> None:
    everything = sorted(kept(llama, HarvestConfig(16, 64, batching, window_rows=4)))
    for n in (1, 15, 16, 17, 100, len(everything)):
        config = HarvestConfig(16, 64, batching, window_rows=4, max_tokens=n)
        assert sorted(kept(llama, config)) == everything[:n]


def test_fewer_tokens_than_asked_for(llama: LanguageModel) -> None:
    n = len(kept(llama, HarvestConfig(16, 64)))
    with pytest.raises(UserError, match=rf"asked for {n + 1} tokens, the text has only {n} "):
        kept(llama, HarvestConfig(16, 64, max_tokens=n + 1))
    assert count_tokens(llama.tokenizer, ROWS, HarvestConfig(16, 64)) == n
    assert count_tokens(llama.tokenizer, ROWS, HarvestConfig(16, 64), limit=20) == 20


# --- windows of tokens --------------------------------------------------------------------------


def flat(batches: Sequence[TokenBatch]) -> list[tuple[int, int, int]]:
    return [
        (int(row), int(place), int(token))
        for batch in batches
        for row, place, token in zip(
            batch.row_id, batch.position, batch.input_ids.flatten()[batch.keep], strict=True
        )
    ]


@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_what_follows_a_cursor_does_not_depend_on_what_precedes_it(
    llama: LanguageModel, batching: str
) -> None:
    rows = rows_from_texts(["", *texts(12), " ".join(WORDS * 40), *texts(5)])  # one is very long
    config = HarvestConfig(16, 64, batching, window_rows=4)
    whole = list(token_windows(llama.tokenizer, rows, config))
    assert any(window.end.chunks for window in whole), "the long row must be cut by a window"
    for done, window in enumerate(whole[:-1], start=1):
        rest = list(token_windows(llama.tokenizer, rows, config, window.end))
        assert [w.end for w in rest] == [w.end for w in whole[done:]]
        assert [flat(w.batches) for w in rest] == [flat(w.batches) for w in whole[done:]]
    assert whole[-1].end == Cursor(19, 0)
    assert Cursor(0, 0) == START


def test_batches_stay_within_their_budget_and_windows_within_memory(
    llama: LanguageModel,
) -> None:
    rows = rows_from_texts([" ".join(WORDS * 300), *texts(30)])
    for batching in ("pad", "pack"):
        config = HarvestConfig(16, 64, batching, window_rows=4)
        for window in token_windows(llama.tokenizer, rows, config):
            assert all(batch.input_ids.numel() <= 64 for batch in window.batches)
            assert sum(int((b.chunk >= 0).sum()) for b in window.batches) < 4 * 16 + 16


def test_packing_wastes_less_than_padding(llama: LanguageModel) -> None:
    rows = rows_from_texts(texts(60, longest=20))

    def size(batching: str) -> tuple[int, int]:
        config = HarvestConfig(64, 256, batching)
        batches = [b for w in token_windows(llama.tokenizer, rows, config) for b in w.batches]
        return sum(b.input_ids.shape[0] for b in batches), sum(b.keep.numel() for b in batches)

    (padded, tokens), (packed, same_tokens) = size("pad"), size("pack")
    assert tokens == same_tokens
    assert packed < padded / 2


def test_the_tokenizer_works_ahead_in_a_thread_that_ends(llama: LanguageModel) -> None:
    names: set[str] = set()

    def rows() -> Iterator[TextRow]:
        for number, text in enumerate(texts(40)):
            names.add(threading.current_thread().name)
            yield TextRow(number, text, {})

    before = threading.active_count()
    stream = stream_activations(
        llama, TextSource("x", rows), POINTS, HarvestConfig(16, 64, window_rows=4)
    )
    next(stream)
    assert threading.active_count() == before + 1
    del stream
    assert threading.active_count() == before
    assert names and threading.current_thread().name not in names


def test_long_rows_bring_no_warning(
    llama: LanguageModel, stories260k: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = AutoTokenizer.from_pretrained(stories260k, model_max_length=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept(replace(llama, tokenizer=short), HarvestConfig(16, 64))
    assert "longer than" not in caplog.text


# --- dtypes and bad values ----------------------------------------------------------------------


def test_the_asked_dtype_is_the_rounded_value(llama: LanguageModel) -> None:
    config = HarvestConfig(16, 64)
    full = torch.cat([v[POINTS[0]].x for v in stream_activations(llama, ROWS, POINTS, config)])
    for dtype in (torch.bfloat16, torch.float16):
        stream = stream_activations(llama, ROWS, POINTS, config, dtype=dtype)
        assert torch.equal(torch.cat([v[POINTS[0]].x for v in stream]), full.to(dtype))


def test_a_bfloat16_model_works_in_both_batchings(tiny: Callable[..., LanguageModel]) -> None:
    lm = tiny("llama")
    lm.model.to(torch.bfloat16)
    for batching in ("pad", "pack"):
        stream = stream_activations(lm, ROWS, POINTS, HarvestConfig(16, 64, batching))
        assert {v[POINTS[0]].x.dtype for v in stream} == {torch.bfloat16}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_names_its_row_and_position(
    llama: LanguageModel, value: float
) -> None:
    found = collect(llama, HarvestConfig(16, 64))["layers.2.out"]
    (row, place), target = keys(found)[40], found.x[40]

    def spoil(x: Tensor) -> Tensor:
        hit = (x - target).abs().amax(-1) < ROUNDING
        return torch.where(hit[..., None], torch.full_like(x, value), x)

    with (
        replace_activations(llama, "layers.2.out", spoil),
        pytest.raises(UserError, match=rf"row_id {row} at token position {place}\b"),
    ):
        collect(llama, HarvestConfig(16, 64))


def test_float16_overflow_is_refused(llama: LanguageModel) -> None:
    with (
        replace_activations(llama, "layers.2.out", lambda x: x + 1e5),
        pytest.raises(UserError, match=r"inf \(torch.float16\)"),
    ):
        list(stream_activations(llama, ROWS, POINTS, HarvestConfig(16, 64), dtype=torch.float16))


def make(n: int = 3, d: int = 2, **other: Tensor) -> Activations:
    fields = {
        "x": torch.zeros(n, d),
        "row_id": torch.arange(n),
        "position": torch.arange(n, dtype=torch.int32),
    }
    return Activations(**{**fields, **other})


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """As in production: without the shape checks of the test run, which come before our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("shapes_unchecked")
def test_activations_are_checked_on_construction() -> None:
    assert len(make()) == 3 and make().d_in == 2
    assert len(make(0)) == 0
    with pytest.raises(UserError, match=r"each of the 3 vectors, got \(2,\)"):
        make(row_id=torch.arange(2))
    with pytest.raises(UserError, match=r"matrix \[n, d_in\], got torch.float32 of shape \(3,\)"):
        make(x=torch.zeros(3))
    with pytest.raises(UserError, match="int64"):
        make(x=torch.zeros(3, 2, dtype=torch.int64))
    # finite numbers whose sum is not: no reason to refuse
    big = torch.full((3, 2), 3e38)
    assert torch.equal(make(x=big).x, big)


def test_select_takes_whole_tokens() -> None:
    item = make(x=torch.arange(6.0).reshape(3, 2)).select(torch.tensor([2, 0]))
    assert item.x.tolist() == [[4, 5], [0, 1]]
    assert item.row_id.tolist() == [2, 0] and item.position.tolist() == [2, 0]


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_size": 0}, "context_size must be at least 1, got 0"),
        ({"window_rows": 0}, "window_rows must be at least 1, got 0"),
        ({"batch_tokens": 100}, "context_size 128, got 100"),
        ({"batching": "stack"}, "'pad' or 'pack', got 'stack'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1 or None, got 0"),
    ],
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        HarvestConfig(**options)


def test_settings_that_do_not_fit_the_model(tiny: Callable[..., LanguageModel]) -> None:
    llama, gemma = tiny("llama"), tiny("gemma3")
    with pytest.raises(UserError, match=f"at most the model's {MAX_POSITIONS} .* got 129"):
        stream_activations(llama, ROWS, POINTS, HarvestConfig(129))
    with pytest.raises(UserError, match=f"sliding window of {SLIDING_WINDOW} .*got 17.*'pad'"):
        stream_activations(gemma, ROWS, POINTS, HarvestConfig(17, batching="pack"))
    llama.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="eager or sdpa.*'flash_attention_2'.*'pad'"):
        stream_activations(llama, ROWS, POINTS, HarvestConfig(batching="pack"))


def test_bad_hook_points_are_refused_at_the_call(llama: LanguageModel) -> None:
    with pytest.raises(UserError, match="layer must be in"):
        stream_activations(llama, ROWS, ["layers.7.out"], HarvestConfig())
    with pytest.raises(UserError, match="list of at least one"):
        stream_activations(llama, ROWS, [], HarvestConfig())
    with pytest.raises(UserError, match="list of at least one"):
        stream_activations(llama, ROWS, "layers.1.out", HarvestConfig())
