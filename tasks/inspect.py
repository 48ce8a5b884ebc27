"""``sae-apps inspect``: latents with their frequency and top texts, or the top latents of a row."""

import os
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_core.errors import UserError

from .common import PROG, StopSignal, run_command
from .evaluation import counted_passes
from .featurize import FinishedRun, open_run
from .identify_files import stored_verdict, verdict_text
from .parsing import CommandParser, take
from .progress import Progress

if TYPE_CHECKING:
    from sae_core.exemplars import LatentExemplars
    from sae_core.features import SparseFeatures

EXAMPLE = f"{PROG} inspect --run runs/x --latent 12,99 --texts 5"
# A token is highlighted from this share of the latent's largest activation on; a second, stronger
# colour marks those above the larger share.
WEAK, STRONG = 0.2, 0.6
RESET, DIM_MARK, BRIGHT_MARK = "\033[0m", "\033[1;30;48;5;229m", "\033[1;30;48;5;214m"


@dataclass(frozen=True)
class InspectOptions:
    """What is shown."""

    run: str | None = None
    """Folder of a finished run."""
    features: str | None = None
    """Folder of features made by featurize (null: the folder features in the run)."""
    latent: str | None = None
    """Latents to show, e.g. 12,99."""
    top: int = 10
    """Without --latent: how many latents, spread over the range of frequencies or the top ones."""
    order: Literal["spread", "frequent", "strong"] = "spread"
    """Without --latent: which ones: a spread of frequencies, the most frequent, the strongest."""
    texts: int = 3
    """Texts a latent."""
    window: int = 40
    """Tokens shown of each text, around the strongest one."""
    row: int | None = None
    """Show the top latents of the row with this row_id instead."""
    device: str | None = None
    """Where model and SAE run (null: as in training)."""

    def __post_init__(self) -> None:
        if min(self.top, self.texts, self.window) < 1:
            raise UserError(
                "top, texts and window must be at least 1, got "
                f"{self.top}, {self.texts} and {self.window}."
            )


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "inspect",
        "Show latents: how often they fire and the texts on which they fire most, token by "
        "token; or the latents that are most active in a row.",
        EXAMPLE,
    )
    parser.add_argument(
        "--accept_terms", action="store_true", help="Consent to the terms of a model that has some."
    )
    parser.add_options(InspectOptions)
    options = parser.parse(argv)
    chosen = take(InspectOptions, options)
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def work(_stop: StopSignal) -> tuple[Any, str]:
        run = open_run(chosen.run, device=chosen.device)
        features = open_features(run, chosen.features)
        if chosen.row is not None:
            data = describe_row(run, features, chosen.row, chosen.top)
            return data, row_text(data)
        latents = choose(features, chosen)
        if options.dry_run:
            data = {"latents": latents, "texts": chosen.texts * len(latents)}
            return data, f"{data['texts']} texts would run through the model; nothing is written"
        data = describe_latents(
            run,
            features,
            latents,
            chosen,
            accept_terms=options.accept_terms,
            quiet=options.quiet,
        )
        return data, "\n\n".join(card_text(card, in_colour) for card in data["latents"])

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)


def open_features(run: FinishedRun, folder: str | None) -> "SparseFeatures":
    """Raises:
    UserError: no features there, or made by another SAE.
    """
    from sae_core.store import load_features

    path = Path(folder) if folder else run.folder.path / "features"
    if not path.is_dir():
        raise UserError(
            f"Expected features at {path}, got nothing: make them with "
            f"{PROG} featurize --run {run.folder.path}."
        )
    features = load_features(path)
    if features.provenance.sae_hash != run.sae.hash():
        raise UserError(
            f"Expected features of the SAE in {run.folder.path}, got another SAE's in {path}."
        )
    return features


def choose(features: "SparseFeatures", options: InspectOptions) -> list[int]:
    """The latents asked for.

    Raises:
        UserError: no number, or none of this SAE.
    """
    import numpy as np

    from sae_core.exemplars import choose_latents

    if options.latent is not None:
        try:
            latents = [int(part) for part in str(options.latent).split(",")]
        except ValueError as error:
            raise UserError(
                f"--latent must be numbers such as 12,99, got {options.latent!r}."
            ) from error
        for latent in latents:
            if not 0 <= latent < features.d_sae:
                raise UserError(
                    f"--latent must lie between 0 and {features.d_sae - 1}, got {latent}."
                )
        return latents
    if options.order == "spread":
        return list(choose_latents(features, options.top, 0))
    values = features.freq
    if options.order == "strong":
        values = features.acts.max(axis=0).toarray().ravel()
    best = np.argsort(-values, kind="stable")[: options.top]
    return [int(latent) for latent in best if features.freq[latent] > 0]


def describe_latents(
    run: FinishedRun,
    features: "SparseFeatures",
    latents: list[int],
    options: InspectOptions,
    *,
    accept_terms: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Cards of latents, as JSON types."""
    from sae_core.exemplars import exemplars

    from .settings import open_model

    if "text" not in features.rows.column_names:
        raise UserError(
            "Expected features pooled to rows, with their texts, got token-level features: make "
            "some with another --pooling than none."
        )
    lm = open_model(run.settings.model, accept_terms=accept_terms)
    shown = Progress("top texts", None, "passes", enabled=not quiet)
    with shown, counted_passes(lm.model, shown):
        found = exemplars(
            lm,
            run.sae,
            run.hook_point,
            features,
            latents,
            options.texts,
            run.settings.harvest,
            window=options.window,
        )
    return {"run": str(run.folder.path), "latents": [card(run, one) for one in found]}


def card(run: FinishedRun, found: "LatentExemplars") -> dict[str, Any]:
    """One latent with what training knows about it."""
    group, taf = run.extra["group"], run.extra["taf"]
    number = group[found.latent] if group else None
    return asdict(found) | {
        "freq": run.extra["freq"][found.latent],
        "group": number,
        "taf": None if number is None else taf[number],
        "verdict": stored_verdict(run.extra, found.latent),
    }


def card_text(card: dict[str, Any], in_colour: bool) -> str:
    """A latent as lines: its numbers, then its texts with the tokens marked."""
    head = (
        f"latent {card['latent']}: fires on {100 * card['freq']:.3g}% of the held-out tokens, "
        f"in {100 * card['freq_rows']:.3g}% of the rows, at most {card['max_act']:.3g}"
    )
    if card["group"] is not None:
        head += f"; group {card['group']}, at most {100 * card['taf']:.3g}% asked for"
    if card["verdict"] is not None:
        head += f"; {verdict_text(card['verdict'])}"
    lines = [f"\033[1m{head}{RESET}" if in_colour else head]
    for text in card["texts"]:
        labels = " ".join(f"{name}={value}" for name, value in text["meta"].items())
        marked = highlight(text["tokens"], text["acts"], card["max_act"], in_colour)
        lines.append(
            f"  [row {text['row_id']}{' ' + printable(labels) if labels else ''}] {marked}"
        )
    if not card["texts"]:
        lines.append("  active in no row of these features")
    return "\n".join(lines)


def highlight(tokens: Sequence[str], acts: Sequence[float], top: float, in_colour: bool) -> str:
    """Tokens as one line; those that fire in colour, or in [[brackets]]."""
    parts = []
    for token, act in zip(tokens, acts, strict=True):
        shown = printable(token)
        if act <= 0 or act < WEAK * top or not shown:
            parts.append(shown)
        elif in_colour:
            parts.append(f"{BRIGHT_MARK if act >= STRONG * top else DIM_MARK}{shown}{RESET}")
        else:
            bare = shown.lstrip(" ")
            parts.append(f"{' ' * (len(shown) - len(bare))}[[{bare}]]")
    return "".join(parts)


def printable(text: str) -> str:
    """``text`` on one line, and without the control characters that could steer a terminal."""
    text = text.replace("\n", "\u21b5").replace("\t", " ")
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs", "Cf") else c for c in text)


def describe_row(
    run: FinishedRun, features: "SparseFeatures", row_id: int, n: int
) -> dict[str, Any]:
    """A row with its most active latents, as JSON types.

    Raises:
        UserError: no such row.
    """
    import numpy as np

    latents, acts = features.top_latents(row_id, n)
    place = features.row_index(np.array([row_id]))
    (row,) = features.rows.take(place).to_pylist()
    return {
        "run": str(run.folder.path),
        "row": row,
        "latents": [
            {"latent": int(j), "act": float(a), "freq_rows": float(features.freq[j])}
            for j, a in zip(latents, acts, strict=True)
        ],
    }


def row_text(data: dict[str, Any]) -> str:
    """A row and its latents as lines."""
    row = data["row"]
    lines = [f"row {row['row_id']}: {printable(str(row.get('text', '')))[:300]}"]
    lines += [
        f"  latent {entry['latent']:>6}  activation {entry['act']:>9.4g}  "
        f"active in {100 * entry['freq_rows']:.3g}% of the rows"
        for entry in data["latents"]
    ]
    return "\n".join(lines)
