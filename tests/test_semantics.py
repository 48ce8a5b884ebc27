"""Semantic consistency: known shares, its control, and words aligned with tokens of real text."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from benchmarks import semantics, semantics_data
from benchmarks.semantics import label_consistency, semantic_consistency
from benchmarks.semantics_data import Labelled, Sentence, read_conllu, token_labels
from sae_core.errors import UserError
from sae_core.sae import SAE, SAEConfig

NOUN, PUNCT, AUX, PART = map(semantics_data.UPOS.index, ("NOUN", "PUNCT", "AUX", "PART"))
HOOK = "layers.2.out"


def csr(dense: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array(dense.astype(np.float32))


def noise(n_items: int, n_latents: int, density: float, seed: int = 0) -> np.ndarray:
    """Activations that know nothing of any label."""
    rng = np.random.default_rng(seed)
    return rng.random((n_items, n_latents)) * (rng.random((n_items, n_latents)) < density)


# ---- shares ----


def test_a_share_by_hand():
    label = np.array([0, 0, 1, 2, 1, 0])
    acts = np.zeros((6, 3))
    acts[[0, 1, 2], 0] = 1.0  # labels 0 0 1
    acts[[2, 4], 1] = 1.0  # labels 1 1
    acts[[0], 2] = 1.0  # active once: not counted
    found = label_consistency(csr(acts), label, n_min=2)
    assert found.latent.tolist() == [0, 1]
    assert found.label.tolist() == [0, 1]
    assert found.share == pytest.approx([2 / 3, 1.0])
    assert found.mean_share == pytest.approx(5 / 6)
    assert found.base_rate == pytest.approx(0.5)
    assert found.mean_excess == pytest.approx(found.mean_share - found.mean_control)


def test_the_strongest_items_alone_can_be_counted():
    label = np.array([0, 0, 1, 1, 1])
    acts = np.array([[5.0], [4.0], [3.0], [2.0], [1.0]])
    assert label_consistency(csr(acts), label, n_min=2).share == pytest.approx([0.6])
    top = label_consistency(csr(acts), label, n_min=2, top=2)
    assert (top.share.tolist(), top.label.tolist()) == ([1.0], [0])


def test_items_without_a_label_count_nowhere():
    label = np.array([0, -1, -1, 1, 0])
    acts = np.ones((5, 1))
    found = label_consistency(csr(acts), label, n_min=3)
    assert found.share == pytest.approx([2 / 3])
    assert found.n_items == 3
    with pytest.raises(UserError, match="at least 4 items, got none"):
        label_consistency(csr(acts), label, n_min=4)


def test_selective_latents_score_1_and_blind_ones_the_base_rate():
    rng = np.random.default_rng(1)
    label = rng.choice(3, size=4000, p=[0.5, 0.3, 0.2])
    selective = np.eye(3)[label] * noise(4000, 3, 0.5)
    good = label_consistency(csr(selective), label)
    assert good.share == pytest.approx([1.0, 1.0, 1.0])
    assert good.mean_excess == pytest.approx(0.5, abs=0.03)
    blind = label_consistency(csr(noise(4000, 40, 0.25)), label)
    assert blind.mean_share == pytest.approx(0.5, abs=0.02)
    assert abs(blind.mean_excess) < 0.01
    low, high = blind.interval
    assert low <= blind.mean_excess <= high < 0.02
    assert good.interval[0] > 0.4


def test_few_items_raise_the_control_as_they_raise_the_share():
    """With 3 items of 10 equal labels the largest share is far above 1/10, by chance alone."""
    label = np.random.default_rng(2).integers(10, size=3000)
    found = label_consistency(csr(noise(3000, 400, 0.01)), label, n_min=3, top=3)
    assert found.mean_share > 0.35
    assert abs(found.mean_excess) < 0.03


def test_the_seed_decides_control_and_interval():
    label = np.random.default_rng(0).integers(3, size=200)
    acts = csr(noise(200, 5, 0.5))
    one, same, other = (label_consistency(acts, label, seed=seed) for seed in (0, 0, 1))
    assert (one.control == same.control).all()
    assert one.interval == same.interval
    assert (one.control != other.control).any()
    assert (one.share == other.share).all()


@pytest.mark.parametrize("bad", [{"n_min": 0}, {"top": 0}, {"n_permutations": 0}])
def test_bad_sizes_are_refused(bad: dict):
    with pytest.raises(UserError, match="at least 1, got"):
        label_consistency(csr(np.ones((3, 1))), np.zeros(3, dtype=int), **{"n_min": 1} | bad)
    with pytest.raises(UserError, match="each of 3 items.*got 2 labels"):
        label_consistency(csr(np.ones((3, 1))), np.zeros(2, dtype=int), n_min=1)


# ---- words and tokens ----

CONLLU = """\
# text = I don't gotta go, Al.
1\tI\tI\tPRON\t_\t_\t0\t_\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\t_\t_\t0\t_\t_\t_
3\tn't\tnot\tPART\t_\t_\t0\t_\t_\t_
4-5\tgotta\t_\t_\t_\t_\t_\t_\t_\t_
4\tgot\tget\tVERB\t_\t_\t0\t_\t_\t_
5\tto\tto\tPART\t_\t_\t0\t_\t_\t_
6\tgo\tgo\tVERB\t_\t_\t0\t_\t_\tSpaceAfter=No
6.1\tfar\tfar\tADV\t_\t_\t_\t_\t_\t_
7\t,\t,\tPUNCT\t_\t_\t0\t_\t_\t_
8\tAl\tAl\tPROPN\t_\t_\t0\t_\t_\tSpaceAfter=No
9\t.\t.\tPUNCT\t_\t_\t0\t_\t_\t_

"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.conllu.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return path


@pytest.mark.parametrize("end", ["", "\n"])
def test_words_find_their_place_in_the_text(tmp_path: Path, end: str):
    (sentence,) = read_conllu(written(tmp_path, CONLLU.rstrip("\n") + "\n" + end))
    words = [(sentence.text[a:b], semantics_data.UPOS[upos]) for a, b, upos in sentence.spans]
    assert words == [
        ("I", "PRON"), ("do", "AUX"), ("n't", "PART"),  # "gotta" is not got + to: no stretch
        ("go", "VERB"), (",", "PUNCT"), ("Al", "PROPN"), (".", "PUNCT"),
    ]  # fmt: skip


def test_a_text_that_lacks_its_word_is_refused(tmp_path: Path):
    path = written(tmp_path, CONLLU.replace("# text = I", "# text = You"))
    with pytest.raises(UserError, match="expected 'I' at character 0 of \"You"):
        list(read_conllu(path))
    with pytest.raises(UserError, match="got 'ODD'"):
        list(read_conllu(written(tmp_path, CONLLU.replace("\tVERB", "\tODD"))))


def test_a_token_has_the_label_of_its_word_or_none():
    sentence = Sentence("cats don't.", ((0, 4, NOUN), (5, 7, AUX), (7, 10, PART), (10, 11, PUNCT)))
    offsets = [(0, 0), (0, 3), (3, 4), (4, 5), (4, 7), (5, 8), (7, 10), (8, 11), (10, 11)]
    #           BOS      "cat"   "s"     " "     " do"    "don"    "n't"    "'t."    "."
    expected = [-1, NOUN, NOUN, -1, AUX, -1, PART, -1, PUNCT]
    assert token_labels(offsets, sentence).tolist() == expected
    two_of_a_kind = Sentence("!!", ((0, 1, PUNCT), (1, 2, PUNCT)))
    assert token_labels([(0, 2)], two_of_a_kind).tolist() == [PUNCT]
    half_known = Sentence("gotta!", ((5, 6, PUNCT),))
    assert token_labels([(0, 5), (4, 6)], half_known).tolist() == [-1, -1]


def test_real_sentences_align_with_real_tokens(tiny_lm, shared_data: Path):
    """Every character of a word is covered by tokens that carry its label, or by mixed ones."""
    sentences = list(read_conllu(shared_data / "ud_english_ewt" / "en_ewt-dev.conllu.gz"))
    assert len(sentences) == 2001
    assert sum(len(s.spans) for s in sentences) > 24_000
    for sentence in sentences[:200]:
        offsets = tiny_lm.tokenizer(sentence.text, return_offsets_mapping=True)["offset_mapping"]
        labels = token_labels(offsets, sentence)
        assert (labels >= 0).sum() > len(labels) / 2
        for start, stop, upos in sentence.spans:
            inside = [
                label
                for (a, b), label in zip(offsets, labels, strict=True)
                if start <= a < b <= stop
            ]
            assert set(inside) <= {upos}


# ---- from texts to shares ----


def test_a_probe_for_punctuation_is_found_in_a_real_model(tiny_lm, tmp_path, shared_data):
    """An SAE whose first latent is a linear probe of PUNCT, beside latents of random direction."""
    labelled = semantics_data.prepare_pos(tiny_lm, HOOK, "reduced", tmp_path / "pos", n_rows=150)
    assert len(labelled.label) == len(labelled.activations)
    assert (labelled.label >= 0).mean() > 0.6
    x = torch.cat([batch.x.float() for batch in labelled.activations.iter_sequential(4096)])
    target = torch.from_numpy(labelled.label == PUNCT).float()
    u = torch.nn.functional.normalize(x, dim=1)
    probe = torch.linalg.lstsq(u, (target - target.mean())[:, None]).solution[:, 0]
    sae = SAE(SAEConfig(64, 16, kind="relu"), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc[:, 0] = probe
        sae.b_enc -= 0.1
    found = semantic_consistency(sae, labelled, top=20)
    assert (found.latent[0], semantics_data.UPOS[found.label[0]]) == (0, "PUNCT")
    assert found.share[0] >= 0.95
    shuffled = np.random.default_rng(0).permutation(labelled.label)
    by_chance = Labelled("pos", semantics_data.UPOS, labelled.activations, shuffled)
    assert semantic_consistency(sae, by_chance, top=20).share[0] < 0.6
    again = semantics_data.prepare_pos(tiny_lm, HOOK, "reduced", tmp_path / "pos", n_rows=150)
    assert (again.label == labelled.label).all()


def test_emotions_are_those_of_whole_comments(tiny_lm, tmp_path, shared_data):
    labelled = semantics_data.prepare_emotion(tiny_lm, HOOK, "reduced", tmp_path / "emo", n_rows=60)
    assert labelled.row_id is not None
    assert len(labelled.label) == len(labelled.row_id) == 60
    assert labelled.names.index("neutral") not in labelled.label
    first = next(
        (text, labels)
        for text, labels in semantics_data.read_emotions(shared_data / "goemotions", "dev")
        if len(labels) == 1 and labelled.names[labels[0]] != "neutral"
    )
    assert labelled.label[0] == first[1][0]
    sae = SAE(SAEConfig(64, 8, kind="topk", k=2), generator=torch.Generator().manual_seed(0))
    acts = semantics.item_activations(sae, labelled).toarray()
    assert acts.shape == (60, 8)
    batches = list(labelled.activations.iter_sequential(4096))
    dense = torch.cat([sae.eval().encode(batch.x.float()) for batch in batches])
    row_id = torch.cat([batch.row_id for batch in batches])
    expected = torch.stack([dense[row_id == i].amax(0) for i in range(60)])
    assert acts == pytest.approx(expected.numpy(), abs=1e-6)


def test_absent_texts_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_APPS_SHARED_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere, got no such folder: set SAE_APPS_SHARED_DATA"):
        semantics_data.shared_data()
