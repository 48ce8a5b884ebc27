"""Fine-tuning on the responses of instructions, of a whole model or of its upper blocks.

    loss = - sum_t log p(y_t | x, y_<t) / |y|,  y: the response's tokens and the end of the turn

Blocks below `first` are frozen, so that the states which enter block `first` are constants: they
are computed once, and training on them has the loss and the gradients of training through the whole
model (tests/test_finetune.py). AdamW (arXiv 1711.05101), linear rise and fall of the rate.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.minilm import batches_by_length
from sae_core.errors import UserError
from sae_core.hooks import decoder_blocks, read_and_stop, resolve_hook_point
from sae_core.models import LanguageModel


@dataclass(frozen=True)
class Setting:
    """What every cell of a run shares; part of the hash under which its result is kept."""

    first: int = 15
    """First block that is trained; 0 trains the whole model, tied embeddings included."""
    lr: float = 2e-4
    """Peak learning rate of AdamW (betas .9, .95; no weight decay)."""
    warmup: float = 0.1
    """Part of the steps with a linear rise; then linear to 0."""
    batch_tokens: int = 1024
    """Largest batch, padding counted."""
    epochs: int = 1
    """Passes over the picks."""
    max_len: int = 256
    """Tokens a row, in training and in measuring."""
    is_mixed: bool = True
    """bfloat16 products through autocast, float32 weights."""


class Example(NamedTuple):
    """A tokenised row: prompt, response, end of turn."""

    ids: Int[np.ndarray, " t"]
    start: int
    """Place of the first response token."""
    stop: int
    """One behind the last response token: the place of the end of turn where it was not cut off."""
    n_chars: int
    """Characters of the response."""


class Loss(NamedTuple):
    """Sums over the response of each row."""

    nll: Float[np.ndarray, " n"]
    """Nats, end of turn not counted."""
    is_exact: Int[np.ndarray, " n"]
    """1 where greedy decoding gives exactly this response and ends."""


class Student(NamedTuple):
    """Blocks of a model from `first` on, with its final norm and its head."""

    model: Any
    parameters: list[torch.nn.Parameter]
    """What training changes."""
    first: int


# ---- rows to tokens ----


def encode(tokenizer: Any, prompt: str, response: str, max_len: int) -> Example:
    """Tokens of a row in the tokenizer's chat template (`prompt newline response` without one).

    A row that is too long loses the beginning of its prompt, down to a quarter of max_len; then
    the end of its response.
    """
    response = response.strip()
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        head = tokenizer(text, add_special_tokens=False)["input_ids"]
        before = tokenizer(text[: text.rfind(prompt)], add_special_tokens=False)["input_ids"]
    else:
        head, before = tokenizer(f"{prompt}\n")["input_ids"], []
    body = tokenizer(response, add_special_tokens=False)["input_ids"]
    kept = max(max_len - len(body) - 1, max_len // 4)
    if len(head) > kept:
        n_before = min(len(before), kept // 2)
        head = head[:n_before] + head[len(head) - (kept - n_before) :]
    ids = (head + body + [tokenizer.eos_token_id])[:max_len]
    stop = min(len(head) + len(body), max_len)
    is_whole = stop == len(head) + len(body)
    shown = response if is_whole else tokenizer.decode(ids[len(head) : stop])
    return Example(np.array(ids, dtype=np.int64), len(head), stop, len(shown))


# ---- the model ----


def make_student(lm: LanguageModel, first: int) -> Student:
    """A copy of the model's blocks from `first` on in float32, ready to train.

    Raises:
        UserError: `first` is no block, or the blocks need more than states at their entrance (then
            the copy does not give the model's own hidden states).
    """
    if not 0 <= first < lm.n_layers:
        raise UserError(f"Expected a first block in 0..{lm.n_layers - 1}, got {first}.")
    model = copy.deepcopy(lm.model).float().requires_grad_(False)
    path, blocks = decoder_blocks(model)
    if first:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, torch.nn.ModuleList(list(blocks)[first:]))
    trained = model if not first else model.base_model
    frozen = set() if not first else {id(p) for p in model.get_input_embeddings().parameters()}
    parameters = [p.requires_grad_() for p in trained.parameters() if id(p) not in frozen]
    return Student(model, parameters, first)


@torch.no_grad()
def entering(
    lm: LanguageModel, first: int, examples: Sequence[Example], batch_tokens: int = 4096
) -> list[Tensor]:
    """States [t, d] entering block `first`; for 0 the ids [t], since embeddings are trained too."""
    if not first:
        return [torch.from_numpy(one.ids) for one in examples]
    point = resolve_hook_point(lm.model, f"layers.{first}.in")
    found: dict[int, Tensor] = {}
    for places in batches_by_length([len(one.ids) for one in examples], batch_tokens):
        ids = _padded([torch.from_numpy(examples[i].ids) for i in places]).to(lm.device)
        states = read_and_stop(lm.model, [point], {"input_ids": ids})[point.name]
        found |= {i: states[n, : len(examples[i].ids)].clone() for n, i in enumerate(places)}
    return [found[i] for i in range(len(examples))]


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Padded on the right, where causal attention never looks: no mask is needed."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def response_losses(
    student: Student, states: Sequence[Tensor], examples: Sequence[Example], is_mixed: bool
) -> tuple[Float[Tensor, " m"], Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Loss of each response token of a batch, end of turn included.

    Returns:
        (nats, 1 where the token is the most probable one, row of the batch).
    """
    device = student.parameters[0].device
    x = _padded(states).to(device)
    row = np.repeat(np.arange(len(examples)), [len(e.ids) - e.start for e in examples])
    place = np.concatenate([np.arange(e.start, len(e.ids)) for e in examples])
    wanted = torch.from_numpy(np.concatenate([e.ids[e.start :] for e in examples])).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
        inputs = {"inputs_embeds": x.float()} if student.first else {"input_ids": x}
        hidden = student.model.base_model(**inputs, use_cache=False).last_hidden_state
        # a token is predicted from the place before it; logits elsewhere are never needed
        logits = student.model.get_output_embeddings()(hidden[row, place - 1]).float()
    nll = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    is_top = (logits.argmax(1) == wanted).long()
    return nll, is_top, torch.from_numpy(row).to(device)


@torch.no_grad()
def evaluate(
    student: Student, states: Sequence[Tensor], examples: Sequence[Example], setting: Setting
) -> Loss:
    """Loss and exactness of each row."""
    nll, exact = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    for places in batches_by_length([len(one.ids) for one in examples], 2 * setting.batch_tokens):
        batch = [examples[i] for i in places]
        loss, top, row = response_losses(
            student, [states[i] for i in places], batch, setting.is_mixed
        )
        is_text = np.concatenate([np.arange(e.start, len(e.ids)) < e.stop for e in batch])
        rows = row.cpu().numpy()
        nll[places] = np.bincount(rows, loss.double().cpu().numpy() * is_text, len(batch))
        missed = np.bincount(rows, 1 - top.cpu().numpy(), len(batch))
        exact[places] = (missed == 0) & np.array([e.stop < len(e.ids) for e in batch])
    return Loss(nll, exact)


def train(
    student: Student,
    states: Sequence[Tensor],
    examples: Sequence[Example],
    setting: Setting,
    seed: int,
) -> list[float]:
    """Train in place on the responses; AdamW, linear rise and fall of the rate.

    Returns:
        Loss of each step before it, nats per token (end of turn included).
    """
    rng = np.random.default_rng(seed)
    batches = list(batches_by_length([len(one.ids) for one in examples], setting.batch_tokens))
    schedule = [batches[i] for _ in range(setting.epochs) for i in rng.permutation(len(batches))]
    n_rise = max(1, round(setting.warmup * len(schedule)))
    optimizer = torch.optim.AdamW(
        student.parameters, lr=setting.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    losses = []
    for step, places in enumerate(schedule):
        rise = (step + 1) / n_rise
        fall = (len(schedule) - step) / max(1, len(schedule) - n_rise)
        optimizer.param_groups[0]["lr"] = setting.lr * min(1.0, rise, fall)
        nll, _, _ = response_losses(
            student, [states[i] for i in places], [examples[i] for i in places], setting.is_mixed
        )
        loss = nll.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
