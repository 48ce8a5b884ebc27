"""What a latent stands for, in a few words: the tokens on which it fires most."""

from collections.abc import Collection, Iterable

import numpy as np
import torch

from sae_apps.selection.embed import Encoder, stream_codes
from sae_apps.selection.instructions import InstructionRow
from sae_apps.selection.spans import tokenise
from sae_core.errors import UserError
from sae_core.text import windows


def top_tokens(
    encoder: Encoder, rows: Iterable[InstructionRow], latents: Collection[int], n: int = 8
) -> dict[int, list[str]]:
    """The distinct tokens with the largest activations of each latent, the largest first.

    Streams: memory for one window of rows and n tokens a latent. Tokens that the
    encoder does not pool, such as the template's, do not count.

    Args:
        rows: a sample, e.g. the first thousand rows of the pool or the picks themselves.
        latents: columns of the codes.
        n: at most so many tokens a latent; fewer come back where it fires on fewer.
    Raises:
        UserError: a latent out of range, or n below 1.
    """
    d_sae = encoder.sae.d_sae
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise UserError(f"Expected latents between 0 and {d_sae - 1}, got {latent}.")
    if n < 1:
        raise UserError(f"Expected n of at least 1, got {n}.")
    best: dict[int, dict[int, float]] = {int(latent): {} for latent in latents}
    wanted = torch.tensor(sorted(best), dtype=torch.int64)
    for window in windows(rows, encoder.config.window_rows):
        tokens = tokenise(encoder.lm.tokenizer, window, encoder.config, encoder.context)
        ids = np.concatenate([one.ids for one in tokens])
        starts = np.cumsum([0, *(len(one.ids) for one in tokens)])
        for codes, batch in stream_codes(encoder, tokens):
            token = ids[starts[batch.row_id.numpy()] + batch.position.numpy()]
            asked = codes.keep(torch.isin(codes.col, wanted.to(codes.col.device)))
            key = torch.stack([asked.col.cpu(), torch.from_numpy(token)[asked.row.cpu()]])
            pairs, pair = key.unique(dim=1, return_inverse=True)
            top = torch.zeros(pairs.shape[1]).scatter_reduce(
                0, pair, asked.values.float().cpu(), "amax"
            )
            for latent, name, act in zip(*pairs.tolist(), top.tolist(), strict=True):
                best[latent][name] = max(act, best[latent].get(name, 0.0))
        # whatever is among the n largest in the end is among them from its largest on
        best = {latent: _largest(held, n) for latent, held in best.items()}
    return {
        latent: [encoder.lm.tokenizer.decode([name]) for name in held]
        for latent, held in best.items()
    }


def _largest(held: dict[int, float], n: int) -> dict[int, float]:
    """The n tokens of the largest activations, the largest first, equal ones by id."""
    order = sorted(held.items(), key=lambda item: (-item[1], item[0]))
    return dict(order[:n])
