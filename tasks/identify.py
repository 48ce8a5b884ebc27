"""``sae-apps identify``: the conditions of the theory for an SAE, and which latents to trust."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_core.errors import UserError

from .common import PROG, StopSignal, run_command, size, token_count
from .featurize import FinishedRun, open_run
from .identify_files import save
from .parsing import CommandParser, take
from .progress import progress

if TYPE_CHECKING:
    from sae_core.activations import Activations
    from sae_core.conditions import Conditions
    from sae_core.shards import ShardedActivations
    from sae_core.verdict import Verdict

EXAMPLE = f"{PROG} identify runs/seed0 runs/seed1 runs/seed2 --tokens 64k"
BATCH = 4096  # tokens
SHOWN = 5  # latents of each flag in the summary


@dataclass(frozen=True)
class IdentifyOptions:
    """What is measured."""

    tokens: int | str = "64k"
    """Stored tokens of the first run to measure on, e.g. 64k (fewer where fewer are stored)."""
    part: Literal["held_out", "train"] = "held_out"
    """Which of the first run's stored activations."""
    sample_tokens: int | str = "64k"
    """Tokens whose codes are kept in memory for the pairwise co-occurrence."""
    device: str | None = None
    """Where the SAE runs (null: as in training)."""

    def __post_init__(self) -> None:
        token_count(self.tokens)
        token_count(self.sample_tokens, "--sample-tokens")


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "identify",
        "Measure the conditions under which the theory promises that latents are features, and "
        "say for each latent of the first run whether to rely on it. Further runs, trained with "
        "other seeds, add how consistently each latent is found. The result is kept with the "
        "first run's SAE, and inspect shows it.",
        EXAMPLE,
    )
    parser.usage = f"{PROG} identify RUN [RUN ...] [options]"
    parser.add_argument("runs", nargs="*", type=str, help="Folders of finished runs.")
    parser.add_options(IdentifyOptions)
    options = parser.parse(argv)
    chosen = take(IdentifyOptions, options)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        runs = open_runs(options.runs, device=chosen.device)
        stored = open_stored(runs[0], chosen.part)
        n_tokens = min(token_count(chosen.tokens), stored.n_tokens)
        if options.dry_run:
            return estimate(runs, n_tokens, chosen)
        found, judged, report = identify(runs, stored, n_tokens, chosen, quiet=options.quiet)
        save(runs[0], found, judged, report)
        return report, as_text(report)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)


def open_runs(paths: Sequence[str], *, device: str | None = None) -> list[FinishedRun]:
    """The runs, checked to be of one model and hook point.

    Raises:
        UserError: no run, the same one twice, or runs that cannot be compared.
    """
    if not paths:
        raise UserError(f"Expected the folder of at least one run, got none, e.g. {EXAMPLE}")
    runs = [open_run(path, device=device) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        for name, mine, theirs in (
            ("model", first.extra["model_id"], run.extra["model_id"]),
            ("hook point", first.hook_point, run.hook_point),
            ("width d_in", first.sae.d_in, run.sae.d_in),
            ("normalisation", first.sae.config.normalize, run.sae.config.normalize),
        ):
            if mine != theirs:
                raise UserError(
                    f"Expected runs of one {name}, got {mine} in {first.folder.path} and "
                    f"{theirs} in {run.folder.path}."
                )
    hashes = [run.sae.hash() for run in runs]
    for i, value in enumerate(hashes):
        if value in hashes[:i]:
            raise UserError(
                "Expected runs of different seeds, got the same SAE in "
                f"{runs[hashes.index(value)].folder.path} and {runs[i].folder.path}."
            )
    return runs


def open_stored(run: FinishedRun, part: str) -> "ShardedActivations":
    """Stored activations of a run.

    Raises:
        UserError: they are no longer there.
    """
    from sae_core.shards import ShardedActivations

    folder = run.folder.activations / part
    if not folder.is_dir():
        raise UserError(f"Expected stored activations at {folder}, got no such folder.")
    return ShardedActivations.open(folder, run.hook_point)


def identify(
    runs: list[FinishedRun],
    stored: "ShardedActivations",
    n_tokens: int,
    options: IdentifyOptions,
    *,
    quiet: bool = False,
) -> tuple["Conditions", "Verdict", dict[str, Any]]:
    """Measure the first run's SAE and judge its latents; the report holds plain types."""
    import torch

    from sae_core.conditions import measure_conditions
    from sae_core.identifiability import consistency
    from sae_core.theory import judge
    from sae_core.verdict import verdict

    batches = progress(
        first_tokens(stored, n_tokens), "identify", -(-n_tokens // BATCH), "batches",
        enabled=not quiet,
    )  # fmt: skip
    sae = runs[0].sae
    found = measure_conditions(sae, batches, token_count(options.sample_tokens, "--sample-tokens"))
    agree = None
    if len(runs) > 1:
        alive = [torch.tensor(run.extra["freq"]) > 0 for run in runs]
        agree = consistency([run.sae.W_dec.detach().cpu() for run in runs], alive)
    judged = verdict(found, agree)
    report = {
        "run": str(runs[0].folder.path),
        "runs": [str(run.folder.path) for run in runs],
        "sae_hash": sae.hash(),
        "sae_hashes": [run.sae.hash() for run in runs],
        "model_id": runs[0].extra["model_id"],
        "hook_point": runs[0].hook_point,
        "part": options.part,
        "n_tokens": found.n_tokens,
        "n_sampled": found.n_sampled,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "n_alive": int(found.is_alive.sum()),
        "conditions": [asdict(condition) for condition in judge(found)],
        "flags": judged.counts,
        "causes": judged.cause_counts,
        "n_features_found": judged.n_features,
        "mean_consistency": None if agree is None else float(agree[found.is_alive].mean()),
        "examples": examples(found, judged),
    }
    return found, judged, report


def first_tokens(stored: "ShardedActivations", n_tokens: int) -> Iterator["Activations"]:
    """Batches of the first n_tokens tokens, the last one cut."""
    import torch

    left = n_tokens
    for batch in stored.iter_sequential(BATCH):
        if left <= 0:
            return
        yield batch if len(batch) <= left else batch.select(torch.arange(left))
        left -= len(batch)


def examples(found: "Conditions", judged: "Verdict") -> dict[str, list[dict[str, Any]]]:
    """A few latents of each flag with their reasons: those with the highest scores."""
    from sae_core.verdict import FLAGS, reason

    chosen = {}
    for number, name in reversed(list(enumerate(FLAGS))):
        mine = (judged.flag == number).nonzero()[:, 0]
        best = mine[judged.score[mine].argsort(descending=True, stable=True)[:SHOWN]].tolist()
        chosen[name] = [
            {"latent": j, "score": float(judged.score[j]), "reason": reason(found, judged, j)}
            for j in best
        ]
    return chosen


def estimate(
    runs: list[FinishedRun], n_tokens: int, options: IdentifyOptions
) -> tuple[dict[str, Any], str]:
    """What would be measured and the memory that it takes."""
    from sae_core.conditions import BINS
    from sae_core.cooccurrence import PAIR_BLOCK

    sae = runs[0].sae
    l0 = sum(runs[0].extra["freq"])
    sampled = min(n_tokens, token_count(options.sample_tokens, "--sample-tokens"))
    n_bytes = 4 * sae.d_sae * sae.d_in + 8 * sae.d_sae * BINS + 12 * l0 * sampled + 24 * PAIR_BLOCK
    data = {
        "n_tokens": n_tokens,
        "n_runs": len(runs),
        "d_sae": sae.d_sae,
        "memory_bytes": int(n_bytes),
    }
    text = (
        f"{n_tokens:,} stored tokens through {sae.d_sae:,} latents, {len(runs)} runs compared, "
        f"about {size(n_bytes)} of memory beside the SAEs; nothing is written"
    )
    return data, text


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [
        f"{report['d_sae']:,} latents at {report['hook_point']} of {report['model_id']}, "
        f"{report['n_alive']:,} alive on {report['n_tokens']:,} {report['part']} tokens",
        "",
        f"{'condition':<18}{'measured':>10}{'at least':>10}{'at most':>10}  {'met by':<8}holds",
    ]
    for condition in report["conditions"]:
        numbers = "".join(
            f"{'-' if condition[name] is None else format(condition[name], '.3g'):>10}"
            for name in ("measured", "low", "high")
        )
        share = "-" if condition["met_frac"] is None else f"{100 * condition['met_frac']:.0f}%"
        holds = {True: "yes", False: "no", None: "cannot say"}[condition["holds"]]
        lines.append(f"{condition['name']:<18}{numbers}  {share:<8}{holds}")
        lines.append(f"    {condition['note']}")
    flags = report["flags"]
    lines += [
        "",
        f"{flags['reliable']:,} reliable latents, {flags['doubtful']:,} doubtful, "
        f"{flags['unreliable']:,} unreliable; they are supposed to hold about "
        f"{report['n_features_found']:.0f} features",
    ]
    if report["mean_consistency"] is not None:
        lines.append(
            f"mean consistency of the alive latents over {len(report['runs'])} runs: "
            f"{report['mean_consistency']:.3f}"
        )
    else:
        lines.append("one run only: with runs of other seeds the verdict rests on more")
    lines += [f"  {n:>7,}  {cause}" for cause, n in report["causes"].items() if n]
    for name, found in report["examples"].items():
        lines += [
            f"  latent {one['latent']}: score {one['score']:.2f}, {name}: {one['reason']}"
            for one in found
        ]
    path = Path(report["run"])
    lines.append(f"written to {path / 'identify.json'} and {path / 'identify.safetensors'}")
    return "\n".join(lines)
