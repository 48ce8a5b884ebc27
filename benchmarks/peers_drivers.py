"""Train an SAE with one library, round by round as told; for the interpreter that has the library.

    PYTHON -m benchmarks.peers_drivers SPEC

SPEC is JSON: trainer, setting, d_sae, k, batch, steps (of the schedule), round (steps a round),
lr_times (of the library's own rate), threads, train, held_out (float32 .npy [n, d_in]). A line
"round" on the standard input trains for one round and answers milliseconds of processor and clock a
step; "settle" trains ours until its L0 is near k; "quality" answers FVU and L0 of the held-out
tokens; "memory" the process's peak. Each peer is driven by its own trainer's step, with what that
does by default: SAELens `SAETrainer.step`, dictionary_learning `TopKTrainer.update`, sparsify the
statements of `Trainer.fit` (1.3.3), whose loop itself wants a language model. Only warm-ups longer
than the run are shortened, to 5% of it. Batches are read from the file as they are needed, in turn,
so that no driver holds the data.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.longrun_memory import peak_mib

Apply = Callable[[Tensor], tuple[Tensor, Tensor]]
Made = tuple[Callable[[], object], Apply | None]
WARMUP_FRAC = 0.05
NEAR = 0.95  # of the L0 asked for
STEPS = (250, 600)  # at least and at most: it starts there, falls for forty steps and comes back


def batches(path: Path, n: int) -> Iterator[Tensor]:
    """Batches of n rows of a float32 .npy, in order and for ever; a rest below n is left out."""
    rows, width = np.load(path, mmap_mode="r").shape
    start = path.stat().st_size - 4 * rows * width  # the header is what is not data
    while True:
        for first in range(0, rows - n + 1, n):
            offset = start + 4 * first * width
            found = np.fromfile(path, np.float32, n * width, offset=offset)
            yield torch.from_numpy(found.reshape(n, width))


def bfloat16(setting: str) -> AbstractContextManager[Any]:
    """Autocast on the processor, where the setting asks for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in setting)


def repeated(step: Callable[[Tensor], object], stream: Iterator[Tensor], n: int) -> Any:
    """A round: one step on each of the next n batches."""

    def advance() -> None:
        for x in islice(stream, n):
            step(x)

    return advance


def floor(spec: dict[str, Any], stream: Iterator[Tensor]) -> Made:
    """The bfloat16 product of the encoder alone."""
    x = next(stream)
    w = torch.randn(spec["d_sae"], x.shape[1]).bfloat16().T
    u = x.bfloat16()
    return repeated(lambda _: u @ w, iter(lambda: x, None), spec["round"]), None


def ours(spec: dict[str, Any], stream: Iterator[Tensor]) -> Made:
    """`sae_core.train`: kind in the trainer's name, the encoder's type in the setting."""
    from sae_core.sae import SAE, SAEConfig
    from sae_core.state import TrainConfig, default_lr
    from sae_core.train import train

    kind: Any = spec["trainer"].split()[1]
    first = next(stream)
    sae = SAE(
        SAEConfig(first.shape[1], spec["d_sae"], kind=kind, k=spec["k"]),
        generator=torch.Generator().manual_seed(0),
    )
    config = TrainConfig(
        steps=spec["steps"], batch_size=spec["batch"], log_every=spec["round"],
        precision=spec["setting"], lr=spec["lr_times"] * default_lr(kind, spec["d_sae"]),
    )  # fmt: skip
    records = train(sae, stream, config)

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        return sae.reconstruct(x), sae.encode(x)

    return lambda: next(records), apply


def sae_lens(spec: dict[str, Any], stream: Iterator[Tensor]) -> Made:
    """`SAETrainer` with the TopK SAE and its auxiliary loss."""
    import sae_lens as lens
    from sae_lens.config import SAETrainerConfig

    d_in = next(stream).shape[1]
    config = lens.TopKTrainingSAEConfig(
        d_in=d_in, d_sae=spec["d_sae"], k=spec["k"], device="cpu",
        use_sparse_activations="sparse" in spec["setting"],
        rescale_acts_by_decoder_norm="unscaled" not in spec["setting"],
    )  # fmt: skip
    sae = lens.TopKTrainingSAE(config)
    settings = SAETrainerConfig(
        total_training_samples=spec["steps"] * spec["batch"], lr=(lr := 3e-4 * spec["lr_times"]),
        train_batch_size_samples=spec["batch"], autocast="bfloat16" in spec["setting"],
        lr_end=lr / 10,  # as its own configuration fills it in; the schedule is constant
    )  # fmt: skip
    trainer = lens.SAETrainer(settings, sae, stream)

    def step(x: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode(x)
        return sae.decode(codes), codes.to_dense() if codes.is_sparse else codes

    return repeated(step, stream, spec["round"]), apply


def dictionary_learning(spec: dict[str, Any], stream: Iterator[Tensor]) -> Made:
    """`TopKTrainer` with its auxiliary loss; its step stands in autocast as in `trainSAE`."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    rate = 2e-4 / (spec["d_sae"] / 2**14) ** 0.5
    trainer = TopKTrainer(
        steps=spec["steps"], activation_dim=next(stream).shape[1], dict_size=spec["d_sae"],
        k=spec["k"], layer=0, lm_name="none", device="cpu", seed=0, lr=rate * spec["lr_times"],
        warmup_steps=min(1000, round(WARMUP_FRAC * spec["steps"])),
    )  # fmt: skip
    done = 0

    def step(x: Tensor) -> None:
        nonlocal done
        with bfloat16(spec["setting"]):
            trainer.update(done, x)
        done += 1

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = trainer.ae.encode(x)
        return trainer.ae.decode(codes), codes

    return repeated(step, stream, spec["round"]), apply


def sparsify_optimiser(spec: dict[str, Any], sae: Any) -> tuple[Any, Any]:
    """Optimiser and schedule as `Trainer.__init__` makes them: signum by default, or Adam."""
    from sparsify.trainer import SignSGD, get_linear_schedule_with_warmup

    scale = spec["lr_times"] / (spec["d_sae"] / 2**14) ** 0.5
    if "adam" in spec["setting"]:
        optimiser = torch.optim.Adam(sae.parameters(), lr=2e-4 * scale)
        warmup = min(1000, round(WARMUP_FRAC * spec["steps"]))
        return optimiser, get_linear_schedule_with_warmup(optimiser, warmup, spec["steps"])
    from schedulefree import ScheduleFreeWrapper

    optimiser = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=5e-3 * scale), momentum=0.95)
    optimiser.train()
    return optimiser, None


def sparsify(spec: dict[str, Any], stream: Iterator[Tensor]) -> Made:
    """`SparseCoder` and the step of `Trainer.fit` for loss_fn="fvu"; auxk_alpha 0, its default."""
    from sparsify import SparseCoder, SparseCoderConfig

    x = next(stream)
    config = SparseCoderConfig(num_latents=spec["d_sae"], k=spec["k"])
    torch.manual_seed(0)
    sae = SparseCoder(x.shape[1], config, dtype=torch.float32)
    sae.b_dec.data = x.mean(0)
    optimiser, schedule = sparsify_optimiser(spec, sae)
    chunks = 4 if "chunks" in spec["setting"] else 1
    fired = torch.zeros(spec["d_sae"], dtype=torch.bool)
    since = torch.zeros(spec["d_sae"], dtype=torch.long)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        for part in x.chunk(chunks):
            with bfloat16(spec["setting"]):
                out = sae(x=part, y=part, dead_mask=None, total_variance=variance)
            fired[out.latent_indices.flatten()] = True
            float(out.fvu.detach())  # as logged at each step
            # micro_acc_steps, as Trainer divides it
            out.fvu.div(chunks).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        if schedule is not None:
            schedule.step()
        since.add_(len(x))
        since[fired] = 0
        fired.zero_()

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(optimiser, "eval"):
            optimiser.eval()  # the averaged weights, as saved
        acts, index, pre = sae.encode(x)
        return sae.decode(acts, index), torch.zeros_like(pre).scatter(1, index, acts)

    return repeated(step, stream, spec["round"]), apply


@torch.no_grad()
def quality(apply: Apply, path: Path) -> dict[str, float]:
    """FVU about the mean of all tokens, and active latents a token."""
    residual = square = active = n = 0.0
    total: Tensor | float = 0.0
    rows = np.load(path, mmap_mode="r").shape[0]
    for x in islice(batches(path, size := min(rows, 1024)), rows // size):
        x_hat, codes = apply(x)
        residual += float((x - x_hat.float()).square().sum(dtype=torch.float64))
        square += float(x.square().sum(dtype=torch.float64))
        total = total + x.sum(0, dtype=torch.float64)
        active += int((codes != 0).sum())
        n += len(x)
    assert isinstance(total, Tensor)
    return {"fvu": residual / (square - float(total.square().sum()) / n), "l0": active / n}


def timed(advance: Callable[[], Any], n: int) -> dict[str, float]:
    """Milliseconds a step, of processor and clock; L0 where the trainer tells it."""
    cpu, wall = time.process_time(), time.perf_counter()
    told = advance()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    found = {"cpu_ms": 1000 * cpu / n, "wall_ms": 1000 * wall / n}
    return found | ({"l0": told.l0} if hasattr(told, "l0") else {})


def settled(advance: Callable[[], Any], k: int, steps: int) -> dict[str, float]:
    """Rounds until ours keeps the L0 asked for: fewer entries would flatter its time."""
    l0 = 0.0
    least, most = STEPS
    for number in range(steps, most + 1, steps):
        l0 = advance().l0
        if number >= least and l0 >= NEAR * k:
            break
    return {"l0": l0}


def main() -> None:
    """Answer each line of the input with a line of JSON."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    torch.set_num_threads(spec["threads"])
    makers = {
        "floor": floor, "ours": ours, "sae_lens": sae_lens, "sparsify": sparsify,
        "dictionary_learning": dictionary_learning,
    }  # fmt: skip
    stream = batches(Path(spec["train"]), spec["batch"])
    advance, apply = makers[spec["trainer"].split()[0]](spec, stream)
    started = {"start_MiB": peak_mib()}
    for line in sys.stdin:
        if line.strip() == "round":
            answer = timed(advance, spec["round"])
        elif line.strip() == "settle":
            answer = settled(advance, spec["k"], spec["round"])
        elif line.strip() == "quality":
            assert apply is not None
            answer = quality(apply, Path(spec["held_out"]))
        else:
            answer = {"peak_MiB": peak_mib(), **started}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
