"""Prompts continued without and with an edit, and texts with the words of a concept covered.

Which words are of the concept says the App itself: those with a token at which the joint excess
posterior of its units (``app``, gate "joint") reaches a threshold. So abusive text can be shown
without its abuse, and no list of words is needed. It is a guess of a small model: it covers too
much as well as too little.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sae_apps.suppression.app import App
from sae_apps.suppression.suppress import suppress
from sae_core.errors import UserError
from sae_core.hooks import read_and_stop, resolve_hook_point
from sae_core.models import LanguageModel

COVER = "\u2592"
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Continuation:
    """One prompt, continued twice by greedy decoding."""

    prompt: str
    """What was given."""
    plain: str
    """Its continuation by the model as it is."""
    suppressed: str
    """Its continuation under the edit."""


def continue_prompts(
    lm: LanguageModel,
    edit: Any,
    prompts: Sequence[str],
    *,
    strength: float | None = None,
    new_tokens: int = 40,
) -> list[Continuation]:
    """Continue prompts without and with an edit.

    Args:
        edit: as for ``suppress``.
        prompts: one at a time goes through the model.
        strength: as for ``suppress``.
        new_tokens: of each continuation at most.
    """

    def continued(prompt: str) -> str:
        ids = lm.tokenizer(prompt, return_tensors="pt").to(lm.device)
        pad = lm.tokenizer.pad_token_id
        out = lm.model.generate(
            **ids, max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=lm.tokenizer.eos_token_id if pad is None else pad,
        )  # fmt: skip
        return lm.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    plain = [continued(prompt) for prompt in prompts]
    with suppress(lm, edit, strength):
        suppressed = [continued(prompt) for prompt in prompts]
    return [Continuation(*one) for one in zip(prompts, plain, suppressed, strict=True)]


@torch.no_grad()
def cover(lm: LanguageModel, app: App, text: str, threshold: float = 0.5) -> str:
    """The text with every character of a word of the concept replaced by ``COVER``.

    Args:
        threshold: least excess posterior of a covered token, in [0, 1].
    Raises:
        UserError: another threshold, or a tokenizer that does not say where its tokens are.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"Expected a threshold in [0, 1], got {threshold}.")
    if not getattr(lm.tokenizer, "is_fast", False):
        raise UserError("Expected a fast tokenizer, which says where its tokens are, got another.")
    if not text.strip() or not app.units.n_units:
        return text
    found = lm.tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    offsets = found.pop("offset_mapping")[0].tolist()
    point = resolve_hook_point(lm.model, app.hook_point)
    state = read_and_stop(lm.model, [point], dict(found.to(lm.device)))[point.name][0]
    values = app.units.values(state.float())
    assert isinstance(values, torch.Tensor)
    weight = replace(app, gate="joint", mode="excess").weight(values)[:, 0]
    spans = [span for span, w in zip(offsets, weight.tolist(), strict=True) if w >= threshold]

    def covered(word: re.Match[str]) -> str:
        touched = any(first < word.end() and last > word.start() for first, last in spans)
        return COVER * len(word[0]) if touched else word[0]

    return _WORD.sub(covered, text)
