"""Top texts of latents: the right rows, the right tokens under the right activations."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_core.activations import HarvestConfig, stream_activations
from sae_core.errors import UserError
from sae_core.exemplars import choose_latents, exemplars, token_strings
from sae_core.features import SparseFeatures
from sae_core.featurize import featurize
from sae_core.provenance import Provenance
from sae_core.sae import SAE, SAEConfig
from sae_core.text import rows_from_texts

HOOK_POINT = "layers.2.out"
ORIGIN = Provenance("model", "main", HOOK_POINT, "none", "demo", "0", "torch 2")
TEXTS = (
    "Once upon a time there was a little girl named Lily. She loved to play with her red ball.",
    "Tom saw a big dog in the park.\n\nHe was very happy and ran to the dog. " * 3,
    "The end.",
    "Sara and Ben like the bird. They see the bird fly away. Sara says, bye bye, bird!",
)
# Activations of one token differ by rounding between batches of different width.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2's, learned from one sentence: rare characters become bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end of text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog and the bird  été"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end of text|>")


@settings(max_examples=100)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_byte_level_tokens_join_to_the_text(byte_level, text: str) -> None:
    strings = token_strings(byte_level, text)
    assert len(strings) == len(byte_level(text)["input_ids"])
    assert "".join(strings) == text


def test_byte_level_tokens_are_readable(byte_level) -> None:
    strings = token_strings(byte_level, "the dog\n\tété 😀<|end of text|> x")
    assert strings[:2] == ("the", " dog") and "\n" in strings and "\t" in strings
    smile = strings.index("😀")
    assert strings[smile - 3 : smile] == ("", "", ""), "on the last of its four bytes"
    assert strings[-3] == "<|end of text|>" and strings[-1] == "x"


def test_sentencepiece_tokens_are_readable(tiny_lm) -> None:
    strings = token_strings(tiny_lm.tokenizer, "Once upon\nété 😀")
    assert strings[:4] == ("<s>", " Once", " upon", "\n")
    assert "".join(strings[1:]) == " Once upon\nété 😀"
    assert strings[-4:] == ("", "", "", "😀")


@pytest.fixture(scope="module")
def sae() -> SAE:
    model = SAE(SAEConfig(64, 96, kind="relu"), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.b_enc -= 0.15
        model.b_enc[7] = -1e6  # dead
    return model.eval()


@pytest.fixture(scope="module")
def features(tiny_lm, sae: SAE) -> SparseFeatures:
    meta = [{"domain": "story", "year": 1900 + i} if i else {"year": 1900} for i in range(4)]
    return featurize(tiny_lm, sae, rows_from_texts(TEXTS, meta), HOOK_POINT, data_id="texts")


def test_exemplars_are_the_top_rows_token_by_token(tiny_lm, sae, features) -> None:
    latents = choose_latents(features, 6, seed=0)
    got = exemplars(tiny_lm, sae, HOOK_POINT, features, latents, 2, window=10)
    assert tuple(one.latent for one in got) == latents
    dense = np.zeros((len(TEXTS), 200, sae.d_sae), dtype=np.float32)
    rows = rows_from_texts(TEXTS)
    for found in stream_activations(tiny_lm, rows, [HOOK_POINT], HarvestConfig()):
        batch = found[HOOK_POINT]
        dense[batch.row_id, batch.position] = sae.encode(batch.x).numpy()
    for one in got:
        best = np.argsort(-dense[:, :, one.latent].max(1), kind="stable")[:2]
        assert [text.row_id for text in one.texts] == [
            i for i in best if dense[i, :, one.latent].any()
        ]
        assert one.max_act == pytest.approx(dense[:, :, one.latent].max(), abs=ROUNDING)
        assert one.freq_rows == features.freq[one.latent]
        for text in one.texts:
            strings = token_strings(tiny_lm.tokenizer, TEXTS[text.row_id])
            here = slice(text.start, text.start + len(text.tokens))
            assert text.tokens == strings[here] and text.n_tokens == len(strings)
            expected = dense[text.row_id, here, one.latent]
            np.testing.assert_allclose(text.acts, expected, atol=ROUNDING)
            assert max(text.acts) == pytest.approx(
                dense[text.row_id, :, one.latent].max(), abs=ROUNDING
            )
            assert len(text.tokens) == min(10, len(strings))
    assert any(text.start > 0 for one in got for text in one.texts)


def test_labels_come_along_and_absent_ones_do_not(tiny_lm, sae, features) -> None:
    latent = int(features.top_latents(0, 1)[0][0])
    (one,) = exemplars(tiny_lm, sae, HOOK_POINT, features, [latent], 4)
    meta = {text.row_id: text.meta for text in one.texts}
    assert meta[0] == {"year": 1900}
    assert all(meta[i] == {"domain": "story", "year": 1900 + i} for i in meta if i)
    assert len(meta) > 1


def test_a_dead_latent_has_no_texts(tiny_lm, sae, features) -> None:
    alive = choose_latents(features, 1, seed=0)[0]
    dead, other = exemplars(tiny_lm, sae, HOOK_POINT, features, [7, alive], 2)
    assert (dead.latent, dead.freq_rows, dead.max_act, dead.texts) == (7, 0.0, 0.0, ())
    assert other.texts
    (alone,) = exemplars(tiny_lm, sae, HOOK_POINT, features, [7], 2)
    assert alone == dead


def test_features_of_something_else_are_refused(tiny_lm, sae, features) -> None:
    other = SAE(SAEConfig(64, 96, kind="relu"), generator=torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match="Expected the SAE that made the features"):
        exemplars(tiny_lm, other, HOOK_POINT, features, [0], 1)
    with pytest.raises(UserError, match="layers.2.out, got layers.1.out"):
        exemplars(tiny_lm, sae, "layers.1.out", features, [0], 1)
    with pytest.raises(UserError, match="between 0 and 95, got 96"):
        exemplars(tiny_lm, sae, HOOK_POINT, features, [96], 1)
    with pytest.raises(UserError, match="got 0 and 1"):
        exemplars(tiny_lm, sae, HOOK_POINT, features, [0], 1, window=0)
    tokens = SparseFeatures(
        features.acts, features.rows.drop_columns(["text"]), features.provenance
    )
    with pytest.raises(UserError, match="with a column text"):
        exemplars(tiny_lm, sae, HOOK_POINT, tokens, [0], 1)


def skewed(d_sae: int = 400, n_rows: int = 2000) -> SparseFeatures:
    """Frequencies from 1 down to 1/2000, most of them low, and a fifth of the latents dead."""
    rng = np.random.default_rng(0)
    freq = 1 / np.arange(1, d_sae + 1) ** 1.2
    freq[::5] = 0
    freq[1] = 1
    dense = (rng.random((n_rows, d_sae)) < freq).astype(np.float32)
    return SparseFeatures(sparse.csr_array(dense), pa.table({"row_id": np.arange(n_rows)}), ORIGIN)


def test_chosen_latents_spread_over_the_frequencies() -> None:
    features = skewed()
    chosen = choose_latents(features, 12, seed=0)
    freq = features.freq[list(chosen)]
    assert len(set(chosen)) == 12 and (freq > 0).all()
    assert (np.diff(freq) <= 0).all() and freq[0] == 1.0
    alive = features.freq[features.freq > 0]
    inner_edges = np.geomspace(alive.min(), alive.max(), 13)[1:-1]
    parts = set(np.digitize(alive, inner_edges).tolist())
    assert set(np.digitize(freq, inner_edges).tolist()) == parts and len(parts) > 8
    assert choose_latents(features, 12, seed=0) == chosen
    assert choose_latents(features, 12, seed=1) != chosen


def test_few_or_equal_latents_are_chosen_too() -> None:
    features = skewed()
    alive = set(np.flatnonzero(features.freq).tolist())
    assert set(choose_latents(features, 1000, seed=0)) == alive
    equal = SparseFeatures(
        sparse.csr_array(np.ones((2, 9), np.float32)), pa.table({"row_id": [0, 1]}), ORIGIN
    )
    assert len(set(choose_latents(equal, 5, seed=0))) == 5
    with pytest.raises(UserError, match="at least 1 latent"):
        choose_latents(features, 0, seed=0)
