"""What a model makes of texts under edits: likelihood, divergence and activations, text by text.

    nll = - sum_t log p'(w_t | w_<t)        perplexity = exp(sum nll / sum n)
    kl  = sum_t sum_w p(w | w_<t) log( p(w | w_<t) / p'(w | w_<t) )

p is the plain model, p' the edited one (``suppress``, scope text); sums over the tokens of the text
without special ones and without its first, which no text of its own goes before. The same tokens
are pooled. An instruction before the text is context only: its tokens are neither scored nor
pooled. One pass of a batch for each edit; memory is one batch of logits, whatever the text.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_apps.suppression.rivals import PromptEdit
from sae_apps.suppression.suppress import suppress
from sae_core.errors import UserError
from sae_core.hooks import HookPoint, replace_value, resolve_hook_point
from sae_core.models import LanguageModel

_LOGIT_BYTES = 1 << 28  # float32 logits of a batch


@dataclass(frozen=True)
class ReadConfig:
    """How texts are read."""

    context_size: int = 128
    """Tokens of a text at most, an instruction not counted; what is longer is cut."""
    batch_tokens: int = 2048
    """Tokens a forward pass at most, padding counted."""

    def __post_init__(self) -> None:
        if self.context_size < 2 or self.batch_tokens < 1:
            raise UserError(
                "Expected context_size of at least 2 and batch_tokens of at least 1, got "
                f"{self.context_size} and {self.batch_tokens}."
            )


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


class _Line(NamedTuple):
    place: int
    ids: list[int]
    first: int
    """Where the text begins in ids."""
    is_scored: list[bool]


def read_texts(
    lm: LanguageModel,
    texts: Sequence[str],
    edits: Sequence[Any],
    read_at: str,
    config: ReadConfig | None = None,
) -> list[Reading]:
    """Read texts with the plain model and under every edit.

    Args:
        texts: n texts of at least two tokens each.
        edits: edits with ``hook_point`` and ``apply``, or ``PromptEdit``.
        read_at: hook point whose activations are pooled, after the edit where it is the edited
            one.
    Returns:
        The plain reading, then one for each edit.
    Raises:
        UserError: no texts, a text of fewer than two tokens, an unknown hook point, or an
            instruction that leaves no room for the text.
    """
    config = config or ReadConfig()
    if not texts:
        raise UserError("Expected at least one text to read, got none.")
    point = resolve_hook_point(lm.model, read_at)
    rows = _tokenised(lm, texts, config)
    everything: list[Any] = [None, *edits]
    for edit in edits:
        _check_room(lm, edit, config)
    n = len(texts)
    sums = [[np.zeros(n), np.zeros(n), np.zeros((0, 0))] for _ in everything]
    n_tokens = np.array([sum(row.is_scored) for row in rows])
    with torch.no_grad():
        for batch in _batches(lm, rows, config):
            plain: Tensor | None = None
            places = [line.place for line in batch]
            for total, edit in zip(sums, everything, strict=True):
                log_p, pooled = _run(lm, batch, edit, point)
                plain = log_p if plain is None else plain
                total[0][places] = _nll(log_p, batch)
                if edit is not None:
                    total[1][places] = _by_line((plain.exp() * (plain - log_p)).sum(-1), batch)
                if not total[2].size:
                    total[2] = np.zeros((n, pooled.shape[1]), dtype=np.float32)
                total[2][places] = pooled
    return [Reading(nll, kl, n_tokens, pooled) for nll, kl, pooled in sums]


def _tokenised(lm: LanguageModel, texts: Sequence[str], config: ReadConfig) -> list[_Line]:
    special = set(lm.tokenizer.all_special_ids)
    rows = []
    for place, text in enumerate(texts):
        ids = list(lm.tokenizer(text)["input_ids"])[: config.context_size]
        first = next((i for i, token in enumerate(ids) if token not in special), len(ids))
        scored = [i > first and token not in special for i, token in enumerate(ids)]
        if not any(scored):
            raise UserError(f"Expected texts of at least two tokens, got {len(ids)} in {text!r}.")
        rows.append(_Line(place, ids, first, scored))
    return rows


def _prefix(lm: LanguageModel, edit: Any) -> list[int]:
    if not isinstance(edit, PromptEdit) or not edit.prefix:
        return []
    return list(lm.tokenizer(edit.prefix, add_special_tokens=False)["input_ids"])


def _check_room(lm: LanguageModel, edit: Any, config: ReadConfig) -> None:
    room = lm.max_positions - len(_prefix(lm, edit))
    if room < config.context_size:
        raise UserError(
            f"Expected an instruction that leaves {config.context_size} of the model's "
            f"{lm.max_positions} positions, got {max(0, room)} left."
        )


def _batches(lm: LanguageModel, rows: Sequence[_Line], config: ReadConfig) -> Iterator[list[_Line]]:
    """Lines of similar length together."""
    most = max(1, min(config.batch_tokens, _LOGIT_BYTES // (4 * len(lm.tokenizer))))
    batch: list[_Line] = []
    for row in sorted(rows, key=lambda row: (len(row.ids), row.place)):
        if batch and len(row.ids) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _run(
    lm: LanguageModel, batch: list[_Line], edit: Any, point: HookPoint
) -> tuple[Float[Tensor, "n vocabulary"], Float[np.ndarray, "b d"]]:
    """log p of what follows each token before a scored one, and pooled activations."""
    before = _prefix(lm, edit)
    lines = [[*row.ids[: row.first], *before, *row.ids[row.first :]] for row in batch]
    width = max(map(len, lines))
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask, scored = torch.zeros_like(ids), torch.zeros(len(batch), width, dtype=torch.bool)
    for i, (line, row) in enumerate(zip(lines, batch, strict=True)):
        ids[i, : len(line)] = torch.tensor(line)
        mask[i, : len(line)] = 1
        start = row.first + len(before)
        scored[i, start : len(line)] = torch.tensor(row.is_scored[row.first :])
    ids, mask, scored = ids.to(lm.device), mask.to(lm.device), scored.to(lm.device)
    kept: list[Tensor] = []

    def look(value: Tensor) -> Tensor:
        weight = scored.float()
        total = torch.einsum("bt,btd->bd", weight, value.float())
        kept.append(total / weight.sum(1, keepdim=True))
        return value

    is_hooked = edit is not None and not isinstance(edit, PromptEdit)
    # hooks of one point run in the order of registration: the edit, then the look at its result
    with (
        suppress(lm, edit) if is_hooked else nullcontext(),
        replace_value(lm.model, point, look),
    ):
        logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    log_p = logits[:, :-1][scored[:, 1:]].float().log_softmax(-1)
    return log_p, kept[0].cpu().numpy()


def _nll(log_p: Float[Tensor, "n vocabulary"], batch: list[_Line]) -> Float[np.ndarray, " b"]:
    target = [t for row in batch for t, s in zip(row.ids, row.is_scored, strict=True) if s]
    index = torch.tensor(target, device=log_p.device)[:, None]
    return -_by_line(log_p.gather(1, index).squeeze(1), batch)


def _by_line(values: Float[Tensor, " n"], batch: list[_Line]) -> Float[np.ndarray, " b"]:
    """Sums over the scored tokens of each line, float64."""
    lengths = [sum(row.is_scored) for row in batch]
    return np.array([float(part.double().sum()) for part in values.split(lengths)])
