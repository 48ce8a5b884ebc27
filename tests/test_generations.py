"""Continuations without and with an edit, covered words, and pipelines inside the block."""

from typing import Any

import pytest
from test_app import fit  # noqa: F401  (a fixture: an App of the concept "sad")

from sae_apps.suppression.app import App
from sae_apps.suppression.fit import Fit
from sae_apps.suppression.generations import COVER, continue_prompts, cover
from sae_apps.suppression.suppress import suppress
from sae_core.errors import UserError
from sae_core.models import LanguageModel

PROMPTS = ["Tom was sad at the sea. Tom", "Lily had a red"]


def test_continuations_are_those_of_generate(tiny_lm: LanguageModel, fit: Fit) -> None:  # noqa: F811
    found = continue_prompts(tiny_lm, fit.app, PROMPTS, strength=4.0, new_tokens=12)
    for one, prompt in zip(found, PROMPTS, strict=True):
        ids = tiny_lm.tokenizer(prompt, return_tensors="pt")
        plain = tiny_lm.model.generate(**ids, max_new_tokens=12, do_sample=False)
        with suppress(tiny_lm, fit.app, 4.0):
            edited = tiny_lm.model.generate(**ids, max_new_tokens=12, do_sample=False)
        n = ids["input_ids"].shape[1]
        decode = tiny_lm.tokenizer.decode
        assert one.prompt == prompt
        assert one.plain == decode(plain[0, n:], skip_special_tokens=True)
        assert one.suppressed == decode(edited[0, n:], skip_special_tokens=True)
    assert any(one.plain != one.suppressed for one in found)
    same = continue_prompts(tiny_lm, fit.app, PROMPTS, strength=0.0, new_tokens=5)
    assert all(one.plain == one.suppressed for one in same)


def test_words_of_the_concept_are_covered(tiny_lm: LanguageModel, fit: Fit) -> None:  # noqa: F811
    text = "Lily cried and cried at the hill. Tom saw a big tree."
    shown = cover(tiny_lm, fit.app, text)
    assert len(shown) == len(text) and COVER in shown
    words, covered = text.split(), shown.split()
    hidden = [w for w, c in zip(words, covered, strict=True) if c == COVER * len(w)]
    assert all(c in (w, COVER * len(w)) for w, c in zip(words, covered, strict=True))  # whole words
    assert "cried" in hidden and not {"saw", "tree."} & set(hidden)
    assert cover(tiny_lm, fit.app, text, threshold=0.0).replace(COVER, "").strip() == ""
    # at 1 only what is certain goes
    assert cover(tiny_lm, fit.app, text, threshold=1.0).count(COVER) <= shown.count(COVER)
    assert cover(tiny_lm, fit.app, "  ") == "  "
    with pytest.raises(UserError, match=r"threshold in \[0, 1\], got 2"):
        cover(tiny_lm, fit.app, text, threshold=2)


def test_a_pipeline_inside_the_block_is_edited(tiny_lm: LanguageModel, fit: Fit) -> None:  # noqa: F811
    from transformers import pipeline

    made: Any = pipeline("text-generation", model=tiny_lm.model, tokenizer=tiny_lm.tokenizer)

    def said(app: App | None) -> str:
        settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
        if app is None:
            return made(PROMPTS[0], **settings)[0]["generated_text"]
        with suppress(made, app, 4.0):  # the pipeline itself may be given
            return made(PROMPTS[0], **settings)[0]["generated_text"]

    (one,) = continue_prompts(tiny_lm, fit.app, PROMPTS[:1], strength=4.0, new_tokens=12)
    assert said(None).strip() == one.plain.strip()
    assert said(fit.app).strip() == one.suppressed.strip() != one.plain.strip()
    assert said(None).strip() == one.plain.strip()  # the hooks are gone


def test_lm_eval_sees_the_edited_model(tiny_lm: LanguageModel, fit: Fit) -> None:  # noqa: F811
    models = pytest.importorskip(
        "lm_eval.models.huggingface", reason="lm-evaluation-harness (lm_eval) is not installed."
    )
    instance = pytest.importorskip("lm_eval.api.instance")
    lm = models.HFLM(pretrained=tiny_lm.model, tokenizer=tiny_lm.tokenizer, batch_size=1)
    asked = [("Tom was sad. Tom cried and", " cried")]
    requests = [instance.Instance("loglikelihood", {}, one, 0) for one in asked]
    plain = lm.loglikelihood(requests)[0][0]
    with suppress(lm, fit.app, 4.0):
        edited = lm.loglikelihood(requests)[0][0]
    assert edited < plain - 0.1
    assert lm.loglikelihood(requests)[0][0] == pytest.approx(plain)
