"""What a model makes of texts under edits: likelihood, divergence and activations, text by text.

    nll = - sum_t log p'(w_t | w_<t)        perplexity = exp(sum nll / sum n)
    kl  = sum_t sum_w p(w | w_<t) log( p(w | w_<t) / p'(w | w_<t) )

p is the plain model, p' the edited one (``suppress``, scope text); sums over the scored tokens of
the text (``plain_texts``), over which activations are pooled as well. An instruction before the
text is context only: its tokens are neither scored nor pooled.

An edit at the place where the plain model was read acts on the kept states, and a pass for its
likelihood starts there (``sae_core.resume``); any other edit takes a whole pass.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_apps.suppression.plain_texts import (
    Batch,
    Line,
    PlainTexts,
    ReadConfig,
    padded,
    read_plain,
)
from sae_apps.suppression.rivals import PromptEdit
from sae_apps.suppression.suppress import edited, suppress
from sae_core.errors import UserError
from sae_core.hooks import read_and_stop, resolve_hook_point
from sae_core.models import LanguageModel
from sae_core.resume import resume_from

_KEPT_BYTES = 1 << 30  # logits of the plain model, kept between calls up to here
_CHUNK = 128  # tokens whose distributions are compared at once: they stay in the cache


@dataclass(frozen=True, eq=False)
class Reading:
    """n texts read by the model under one edit."""

    nll: Float[np.ndarray, " n"]
    """Summed over the scored tokens [nats]."""
    kl: Float[np.ndarray, " n"]
    """From the plain model to the edited one, summed [nats]; 0 for the plain model."""
    n_tokens: Int[np.ndarray, " n"]
    """Scored tokens, the same under every edit."""
    pooled: Float[np.ndarray, "n d"]
    """Mean of the (edited) activations over the scored tokens."""

    @property
    def perplexity(self) -> float:
        """exp of the mean nll a token: sums are divided, not averaged by text."""
        return float(np.exp(self.nll.sum() / self.n_tokens.sum()))


@torch.no_grad()
def pool_texts(
    lm: LanguageModel, plain: PlainTexts, edits: Sequence[Any]
) -> list[Float[np.ndarray, "n d"]]:
    """Mean activations of every text: plain, then under each edit.

    Raises:
        UserError: an instruction that leaves no room for the text.
    """
    _check_room(lm, edits, plain.config)
    found: list[list[np.ndarray]] = [[] for _ in (None, *edits)]
    for batch in plain.batches:
        for parts, edit in zip(found, (None, *edits), strict=True):
            parts.append(_pooled(_state(lm, plain, batch, edit)))
    order = np.argsort([line.place for batch in plain.batches for line in batch.lines])
    return [np.concatenate(parts)[order] for parts in found]


@torch.no_grad()
def read_texts(
    lm: LanguageModel,
    texts: Sequence[str] | PlainTexts,
    edits: Sequence[Any],
    read_at: str,
    config: ReadConfig | None = None,
) -> list[Reading]:
    """Read texts with the plain model and under every edit.

    Args:
        texts: as in ``read_plain``, or what it made of them (at the same place).
        edits: edits with ``hook_point`` and ``apply``, or ``PromptEdit``.
        read_at: as there.
    Returns:
        The plain reading, then one for each edit.
    Raises:
        UserError: as ``read_plain``, or an instruction that leaves no room for the text.
    """
    plain = texts if isinstance(texts, PlainTexts) else read_plain(lm, texts, read_at, config)
    pooled = pool_texts(lm, plain, edits)
    sums = [np.zeros((2, len(plain.n_tokens))) for _ in pooled]
    for number, batch in enumerate(plain.batches):
        places = [line.place for line in batch.lines]
        base, target = _plain_logits(lm, plain, number), _targets(batch.lines).to(lm.device)
        sums[0][0, places] = _by_line(_compare(base, None, target)[0], batch.lines)
        for total, edit in zip(sums[1:], edits, strict=True):
            found = _compare(base, _logits(lm, plain, batch, edit), target)
            for row, values in zip(total, found, strict=True):
                row[places] = _by_line(values, batch.lines)
    return [
        Reading(nll, kl, plain.n_tokens, mean)
        for (nll, kl), mean in zip(sums, pooled, strict=True)
    ]


# ---- one batch under one edit ----


class _Seen(NamedTuple):
    value: Float[Tensor, "b t d"]
    scored: Bool[Tensor, "b t"]


def _is_here(lm: LanguageModel, plain: PlainTexts, edit: Any) -> bool:
    """Whether the edit acts on the kept states."""
    if edit is None or isinstance(edit, PromptEdit):
        return False
    place = resolve_hook_point(lm.model, edit.hook_point)
    return (place.path, place.side) == (plain.point.path, plain.point.side)


def _state(lm: LanguageModel, plain: PlainTexts, batch: Batch, edit: Any) -> _Seen:
    """The (edited) value at the place of the reading."""
    if edit is None:
        return _Seen(batch.state, batch.scored)
    if _is_here(lm, plain, edit):
        return _Seen(edited(lm, edit, batch.state, batch.inputs), batch.scored)
    ids, mask, scored = padded(lm, batch.lines, _prefix(lm, edit))
    with _applied(lm, edit):
        inputs = {"input_ids": ids, "attention_mask": mask}
        return _Seen(read_and_stop(lm.model, [plain.point], inputs)[plain.point.name], scored)


def _pooled(seen: _Seen) -> Float[np.ndarray, "b d"]:
    weight = seen.scored.float()
    total = torch.einsum("bt,btd->bd", weight, seen.value.float())
    return (total / weight.sum(1, keepdim=True)).cpu().numpy()


def _logits(
    lm: LanguageModel, plain: PlainTexts, batch: Batch, edit: Any
) -> Float[Tensor, "n vocabulary"]:
    """Of what follows each token before a scored one."""
    if plain.can_resume and (edit is None or _is_here(lm, plain, edit)):
        value = _state(lm, plain, batch, edit).value
        with resume_from(lm.model, plain.point, value):
            return _scored_logits(lm, batch.inputs, batch.scored)
    ids, mask, scored = padded(lm, batch.lines, _prefix(lm, edit))
    with _applied(lm, edit):
        return _scored_logits(lm, {"input_ids": ids, "attention_mask": mask}, scored)


def _scored_logits(
    lm: LanguageModel, inputs: Mapping[str, Tensor], scored: Bool[Tensor, "b t"]
) -> Float[Tensor, "n vocabulary"]:
    return lm.model(**inputs, use_cache=False).logits[:, :-1][scored[:, 1:]]


def _plain_logits(lm: LanguageModel, plain: PlainTexts, number: int) -> Tensor:
    if number in plain.logits:
        return plain.logits[number]
    found = _logits(lm, plain, plain.batches[number], None)
    kept = sum(one.nbytes for one in plain.logits.values())
    if kept + found.nbytes <= _KEPT_BYTES:
        plain.logits[number] = found
    return found


def _compare(
    base: Float[Tensor, "n vocabulary"],
    logits: Float[Tensor, "n vocabulary"] | None,
    target: Int[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """nll of each token by the logits (None: by the base), and KL from the base to them."""
    nll, kl = [], []
    for start in range(0, len(target), _CHUNK):
        part = slice(start, start + _CHUNK)
        log_p = base[part].float().log_softmax(-1)
        log_q = log_p if logits is None else logits[part].float().log_softmax(-1)
        nll.append(-log_q.gather(1, target[part, None]).squeeze(1))
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(nll), torch.cat(kl)


def _targets(lines: Sequence[Line]) -> Int[Tensor, " n"]:
    pairs = (zip(line.ids, line.is_scored, strict=True) for line in lines)
    return torch.tensor([token for line in pairs for token, scored in line if scored])


def _applied(lm: LanguageModel, edit: Any) -> Any:
    if edit is None or isinstance(edit, PromptEdit):
        return nullcontext()
    return suppress(lm, edit)


def _prefix(lm: LanguageModel, edit: Any) -> list[int]:
    if not isinstance(edit, PromptEdit) or not edit.prefix:
        return []
    return list(lm.tokenizer(edit.prefix, add_special_tokens=False)["input_ids"])


def _check_room(lm: LanguageModel, edits: Sequence[Any], config: ReadConfig) -> None:
    for edit in edits:
        room = lm.max_positions - len(_prefix(lm, edit))
        if room < config.context_size:
            raise UserError(
                f"Expected an instruction that leaves {config.context_size} of the model's "
                f"{lm.max_positions} positions, got {max(0, room)} left."
            )


def _by_line(values: Float[Tensor, " n"], lines: Sequence[Line]) -> Float[np.ndarray, " b"]:
    """Sums over the scored tokens of each line, float64."""
    lengths = [sum(row.is_scored) for row in lines]
    return np.array([float(part.double().sum()) for part in values.split(lengths)])
