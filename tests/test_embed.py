"""Codes of rows against one plain forward pass, and the tokens that enter them."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import D_MODEL, MAX_POSITIONS, tiny_model

from sae_apps.selection.embed import (
    EmbedConfig,
    Encoder,
    check_fit,
    encode,
    load_encoder,
    measure_fvu,
)
from sae_apps.selection.instructions import InstructionRow
from sae_apps.selection.spans import tokenise, touches
from sae_apps.selection.tokens import top_tokens
from sae_core.errors import CorruptFileError, UserError
from sae_core.models import LanguageModel
from sae_core.sae import SAE, SAEConfig, save_sae

HOOK_POINT = "layers.2.out"
# Activations of one token differ by rounding between batches of different width.
ROUNDING = 1e-4
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
ROWS = [
    InstructionRow(7, "Tell me about a dog.", "Once upon a time there was a dog named Max."),
    InstructionRow(3, "Who is the user?", "The assistant said: user! " * 9, "talk"),
    InstructionRow(5, "Hi", "", "talk"),
    InstructionRow(9, "One day Lily went to the park with her mom and her big red ball.", "Yes."),
    InstructionRow(1, "Sum 2 and 3\nplease", "5", "sum"),
]


def perfect_sae(d_in: int = 64, seed: int = 0) -> SAE:
    """x = relu(x q) q' - relu(-x q) q' for an orthogonal q: an SAE whose FVU is 0."""
    sae = SAE(SAEConfig(d_in, 2 * d_in, kind="relu"))
    noise = torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(noise)[0]
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([q, -q], dim=1))
        sae.W_dec.copy_(torch.cat([q, -q], dim=1).T)
    return sae.eval()


def with_template(lm: LanguageModel, template: str | None = TEMPLATE) -> LanguageModel:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    return replace(lm, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def encoder(tiny_lm) -> Encoder:
    return Encoder(with_template(tiny_lm), perfect_sae(), HOOK_POINT)


def kept_text(encoder: Encoder, row: InstructionRow, **changes) -> str:
    config = replace(encoder.config, **changes)
    (tokens,) = tokenise(encoder.lm.tokenizer, [row], config, encoder.context)
    return encoder.lm.tokenizer.decode(tokens.ids[tokens.keep])


def dense(encoder: Encoder, rows, **changes) -> np.ndarray:
    return encode(replace(encoder, config=replace(encoder.config, **changes)), rows).acts.toarray()


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("form", ["plain", "chat"])
def test_a_code_is_the_mean_over_the_tokens_of_one_forward_pass(encoder, special, form) -> None:
    got = dense(encoder, ROWS, special=special, form=form)
    config = replace(encoder.config, special=special, form=form)
    for i, tokens in enumerate(tokenise(encoder.lm.tokenizer, ROWS, config, 2048)):
        ids = torch.from_numpy(tokens.ids)[None]
        with torch.no_grad():
            hidden = encoder.lm.model(ids, output_hidden_states=True).hidden_states[3][0]
        acts = encoder.sae.encode(hidden).numpy()
        assert tokens.keep.all() == special, "control: something is left out"
        np.testing.assert_allclose(got[i], acts[tokens.keep].mean(axis=0), atol=ROUNDING)


def test_special_tokens_the_template_and_the_first_token_are_left_out(encoder) -> None:
    for row in ROWS:
        # tokens of SentencePiece know no leading space, and the joint "\n" is no one's own
        want = (row.prompt + row.response).replace("\n", "").replace(" ", "")
        for form in ("chat", "plain"):
            got = kept_text(encoder, row, form=form).replace("\n", "").replace(" ", "")
            # plain text begins with <s>, so that no token of the row is the first
            assert got == want, form
    assert "assistant" in kept_text(encoder, ROWS[0], special=True)
    assert "assistant" not in kept_text(encoder, ROWS[0])


def test_the_first_token_is_left_out_where_nothing_special_is_in_front(tiny_lm) -> None:
    lm = with_template(tiny_lm, "{% for m in messages %}{{ m['content'] }} {% endfor %}")
    encoder = Encoder(lm, perfect_sae(), HOOK_POINT)
    row = InstructionRow(0, "Lily saw a dog", "and ran")
    (tokens,) = tokenise(lm.tokenizer, [row], encoder.config, 99)
    assert not tokens.keep[0] and tokens.keep[1:].sum() >= 3
    assert tokens.ids[0] != lm.tokenizer.bos_token_id


def test_a_chat_gets_no_second_bos(encoder) -> None:
    (tokens,) = tokenise(encoder.lm.tokenizer, ROWS[:1], encoder.config, 99)
    bos = encoder.lm.tokenizer.bos_token_id
    assert tokens.ids[0] == bos and tokens.ids[1] != bos
    assert (tokens.ids == bos).sum() == 2, "one before each message"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("form", ["plain", "chat"])
def test_prompt_and_response_share_no_token_and_make_up_all(encoder, special, form) -> None:
    def keep(span: str) -> list[np.ndarray]:
        config = replace(encoder.config, special=special, form=form, span=span)
        return [t.keep for t in tokenise(encoder.lm.tokenizer, ROWS, config, 2048)]

    for prompt, response, whole in zip(keep("prompt"), keep("response"), keep("all"), strict=True):
        assert not (prompt & response).any()
        np.testing.assert_array_equal(prompt | response, whole)
    assert kept_text(encoder, ROWS[4], span="response", special=False).strip() == "5"
    assert kept_text(encoder, ROWS[2], span="response", special=False) == ""


def test_a_token_touches_a_span_by_a_character() -> None:
    offsets = np.array([[0, 0], [0, 3], [3, 5], [5, 9], [7, 7]])
    assert touches(offsets, [(2, 3)]).tolist() == [False, True, False, False, False]
    assert touches(offsets, [(3, 6)]).tolist() == [False, False, True, True, False]
    assert touches(offsets, [(9, 12), (3, 3)]).tolist() == [False] * 5


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_batches_padding_and_order_make_no_difference(tiny_lm, architecture: str) -> None:
    lm = with_template(replace(tiny_lm, model=tiny_model(architecture)))
    encoder = Encoder(lm, perfect_sae(D_MODEL), HOOK_POINT, EmbedConfig(max_len=MAX_POSITIONS))
    whole = encode(encoder, ROWS)
    one = dense(encoder, ROWS, batch_tokens=1)  # a row at a time: nothing is padded
    np.testing.assert_allclose(one, whole.acts.toarray(), atol=ROUNDING)
    left = copy.deepcopy(lm.tokenizer)
    left.padding_side = "left"
    for other in (
        replace(encoder, config=replace(encoder.config, window_rows=2)),
        replace(encoder, lm=replace(lm, tokenizer=left)),
    ):
        backwards = encode(other, ROWS[::-1])
        np.testing.assert_allclose(
            backwards.acts.toarray()[::-1], whole.acts.toarray(), atol=ROUNDING
        )
    assert whole.rows["row_id"].to_pylist() == [7, 3, 5, 9, 1]
    assert whole.rows["group"].to_pylist() == [None, "talk", "talk", None, "sum"]
    assert np.abs(np.diff(whole.acts.toarray(), axis=0)).max() > 100 * ROUNDING, "control"


def test_the_head_of_a_long_row_is_read(encoder) -> None:
    long = InstructionRow(0, "", "The dog ran to the park. " * 40)
    head = encode(replace(encoder, config=EmbedConfig(max_len=30, form="plain")), [long])
    (n_tokens,), (length,) = (head.rows[name].to_pylist() for name in ("n_tokens", "length"))
    assert n_tokens == 29 and length > 200
    config = EmbedConfig(max_len=2048, form="plain", special=True)
    (tokens,) = tokenise(encoder.lm.tokenizer, [long], config, 30)
    with torch.no_grad():
        ids = torch.from_numpy(tokens.ids)[None]
        hidden = encoder.lm.model(ids, output_hidden_states=True).hidden_states[3][0, 1:]
    want = encoder.sae.encode(hidden).mean(dim=0).numpy()
    np.testing.assert_allclose(head.acts.toarray()[0], want, atol=ROUNDING)
    bounded = replace(encoder, lm=replace(encoder.lm, model=tiny_model("gpt2")))
    assert bounded.context == MAX_POSITIONS, "never more than the model's positions"


def test_a_row_without_text_has_an_empty_code(encoder) -> None:
    rows = [InstructionRow(0, " ", "\n"), ROWS[0], InstructionRow(4, "", "")]
    got = encode(encoder, rows)
    assert np.diff(got.acts.indptr)[[0, 2]].tolist() == [0, 0] and got.acts.nnz > 0
    assert got.rows["n_tokens"].to_pylist()[::2] == got.rows["length"].to_pylist()[::2] == [0, 0]
    nothing = encode(encoder, rows[::2])
    assert nothing.acts.nnz == 0


def test_progress_and_origin(encoder) -> None:
    counts: list[int] = []
    config = EmbedConfig(window_rows=2)
    got = encode(replace(encoder, config=config), ROWS, data_id="five", progress=counts.append)
    assert counts == [2, 2, 1]
    origin = got.provenance
    assert origin.data_id.startswith("five[mean of all, chat, without special")
    assert (origin.hook_point, origin.sae_hash) == (HOOK_POINT, encoder.sae.hash())


def test_bad_rows_and_settings_are_refused(encoder) -> None:
    with pytest.raises(UserError, match="at least one row, got none from nowhere"):
        encode(encoder, [], data_id="nowhere")
    with pytest.raises(UserError, match="every row_id once, got 7 2 times"):
        encode(encoder, [ROWS[0], ROWS[1], ROWS[0]])
    with pytest.raises(UserError, match="width d_in 32, but layers.2.out of .* has 64"):
        encode(replace(encoder, sae=perfect_sae(32)), ROWS)
    for setting, said in (
        ({"pooling": "median"}, "a pooling of .*, got 'median'"),
        ({"span": "answer"}, "a span of .*, got 'answer'"),
        ({"form": "html"}, "a form of .*, got 'html'"),
        ({"max_len": 0}, "max_len of at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=said):
            EmbedConfig(**setting)


def test_the_fit_is_measured_and_a_misfit_refused(encoder) -> None:
    assert measure_fvu(encoder, ROWS) == pytest.approx(0, abs=1e-6)
    assert check_fit(encoder, [ROWS[2]._replace(prompt="a")]) is None, "one token: nothing varies"
    wrong = perfect_sae()
    with torch.no_grad():
        wrong.W_dec.neg_()  # x_hat = -x
    with pytest.raises(UserError, match=r"SAE trained on layers.2.out .* below 1 .* got [4-9]\.\d"):
        check_fit(replace(encoder, sae=wrong), ROWS)


def test_identity_names_what_a_code_depends_on(encoder) -> None:
    before = encoder.identity()
    encoder.lm.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=3)
    assert encoder.identity() == before == json.loads(json.dumps(before))
    for other in (
        replace(encoder, config=EmbedConfig(special=True)),
        replace(encoder, sae=perfect_sae(seed=1)),
        replace(encoder, lm=with_template(encoder.lm, TEMPLATE + " ")),
        replace(encoder, hook_point="layers.1.out"),
    ):
        assert sum(other.identity()[name] != value for name, value in before.items()) == 1


def test_top_tokens_are_those_of_all_activations(encoder) -> None:
    got = top_tokens(encoder, ROWS, [0, 5, 90], n=3)
    config = replace(encoder.config, window_rows=2)
    assert top_tokens(replace(encoder, config=config), ROWS, [90, 5, 0], n=3) == got
    best: dict[tuple[int, int], float] = {}
    for tokens in tokenise(encoder.lm.tokenizer, ROWS, encoder.config, 2048):
        with torch.no_grad():
            ids = torch.from_numpy(tokens.ids)[None]
            hidden = encoder.lm.model(ids, output_hidden_states=True).hidden_states[3][0]
        acts = encoder.sae.encode(hidden).numpy()
        for place in np.flatnonzero(tokens.keep):
            for latent in got:
                key = latent, int(tokens.ids[place])
                best[key] = max(best.get(key, 0.0), float(acts[place, latent]))
    for latent, strings in got.items():
        mine = {token: act for (one, token), act in best.items() if one == latent and act > 0}
        order = sorted(mine, key=lambda token: -mine[token])[:3]
        assert strings == [encoder.lm.tokenizer.decode([token]) for token in order]
    with pytest.raises(UserError, match="latents between 0 and 127, got 128"):
        top_tokens(encoder, ROWS, [128])
    with pytest.raises(UserError, match="n of at least 1, got 0"):
        top_tokens(encoder, ROWS, [1], n=0)


# ---- from a folder ----


def facts_of(lm: LanguageModel) -> dict[str, str]:
    return {"hook_point": HOOK_POINT, "model_id": lm.model_id, "model_revision": lm.revision}


def test_an_encoder_is_loaded_from_a_run_and_from_an_sae(tmp_path, tiny_lm) -> None:
    save_sae(tmp_path / "run" / "sae", perfect_sae(), facts_of(tiny_lm))
    settings = {"config": {"model": {"name": tiny_lm.model_id, "dtype": "bfloat16"}}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    from_run = load_encoder(tmp_path / "run", config=EmbedConfig(span="prompt"))
    assert from_run.lm.model.dtype == torch.bfloat16, "as in training"
    assert from_run.config.span == "prompt" and from_run.hook_point == HOOK_POINT
    got = load_encoder(tmp_path / "run" / "sae", model=tiny_lm)
    assert got.lm is tiny_lm and got.sae.hash() == perfect_sae().hash()
    assert encode(got, ROWS).acts.nnz > 0
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="settings of a run"):
        load_encoder(tmp_path / "run")


def test_an_sae_of_another_model_is_refused(tmp_path, tiny_lm) -> None:
    facts = facts_of(tiny_lm)
    save_sae(tmp_path / "sae", perfect_sae(), facts)
    other = replace(tiny_lm, model_id="other", revision="0123456789abcdef")
    with pytest.raises(UserError, match=r"stories260k .*, got other \(0123456789ab\)"):
        load_encoder(tmp_path / "sae", model=other)
    moved = replace(tiny_lm, model_id="elsewhere")
    assert load_encoder(tmp_path / "sae", model=moved).lm.model_id == "elsewhere", "same weights"
    save_sae(tmp_path / "old", perfect_sae(), facts | {"model_revision": "unknown"})
    with pytest.raises(UserError, match="got elsewhere"):
        load_encoder(tmp_path / "old", model=moved)
    assert load_encoder(tmp_path / "old", model=tiny_lm).lm is tiny_lm
    save_sae(tmp_path / "wide", perfect_sae(32), facts)
    with pytest.raises(UserError, match="width d_in 32"):
        load_encoder(tmp_path / "wide", model=tiny_lm)


def test_folders_without_a_usable_sae_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="finished run or the folder of an SAE at .*, got nothing"):
        load_encoder(tmp_path / "absent")
    with pytest.raises(UserError, match="got a folder without one"):
        load_encoder(tmp_path)
    save_sae(tmp_path / "sae", perfect_sae(), {"model_id": "m"})
    with pytest.raises(UserError, match="come with its hook_point, got none"):
        load_encoder(tmp_path / "sae")
