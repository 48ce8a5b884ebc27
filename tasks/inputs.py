"""What a run reads: model, text, hook point, and activations, harvested or used again.

A run with ``--activations OTHER`` trains on the shards of a finished run, which must be what it
would harvest itself: the same model, text, held-out rows, hook point, tokens and precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sae_core.errors import UserError

from .common import token_count
from .processes import Team, own_device
from .progress import Progress
from .runs import RunFolder

if TYPE_CHECKING:
    from sae_core.models import LanguageModel
    from sae_core.shards import ShardedActivations
    from sae_core.text import TextSource
    from sae_core.tokens import HarvestConfig

    from .settings import TrainSettings

PARTS = ("train", "held_out")


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked."""

    lm: "LanguageModel"
    hook_point: str
    train_rows: "TextSource"
    held_out_rows: "TextSource"
    data_id: str


def open_inputs(settings: "TrainSettings", *, accept_terms: bool = False) -> Inputs:
    """Open the text and the model, and find the hook point; writes nothing into the run.

    Raises:
        UserError: any of them does not exist or cannot be used.
    """
    from sae_core.hooks import resolve_hook_point
    from sae_core.text import split_rows

    from .settings import open_model, open_source

    source = open_source(settings.text)
    rows, held_out = split_rows(source, settings.text.held_out_frac, settings.split_seed)
    for part, name in ((rows, "training"), (held_out, "held-out")):
        if next(iter(part), None) is None:
            raise UserError(
                f"Expected {name} rows in {source.id}, got none at text.held_out_frac "
                f"{settings.text.held_out_frac}."
            )
    own = replace(settings.model, device=own_device(settings.model.device))
    lm = open_model(own, accept_terms=accept_terms)
    hook_point = settings.hook_point(lm)
    resolve_hook_point(lm.model, hook_point)
    settings.check(d_in=lm.d_model)
    return Inputs(lm, hook_point, rows, held_out, source.id)


def provenance(settings: "TrainSettings", inputs: Inputs) -> dict[str, str]:
    """What the run reads; a run is continued only on the same."""
    return {
        "model_id": inputs.lm.model_id,
        "model_revision": inputs.lm.revision,
        "hook_point": inputs.hook_point,
        "data_id": inputs.data_id,
        "seed": str(settings.run.seed),
    }


def with_split_of(settings: "TrainSettings") -> "TrainSettings":
    """The settings, with the held-out rows of the run whose activations they use.

    Raises:
        UserError: no finished run there, or one whose activations are gone.
    """
    path = settings.run.activations
    if path is None:
        return settings
    other = RunFolder(Path(path))
    config = other.read()["config"]
    if not other.is_finished or not all((other.activations / one).is_dir() for one in PARTS):
        raise UserError(
            f"Expected a finished run with its activations at {path}, got one without "
            f"{'results.json' if not other.is_finished else 'the folder activations'}."
        )
    if settings.text.split_seed is not None:
        return settings
    seed = config["text"].get("split_seed", config["seed"])
    return replace(settings, text=replace(settings.text, split_seed=seed))


def parts_of(
    settings: "TrainSettings", inputs: Inputs
) -> Iterator[tuple[str, "TextSource", "HarvestConfig"]]:
    """What is harvested: the name of each part, its rows, and how many of their tokens."""
    from sae_core.tokens import count_tokens

    wanted = token_count(settings.run.eval_tokens)
    n_held_out = count_tokens(inputs.lm.tokenizer, inputs.held_out_rows, settings.harvest, wanted)
    rows_of = (inputs.train_rows, inputs.held_out_rows)
    for name, rows, n in zip(PARTS, rows_of, (settings.max_tokens, n_held_out), strict=True):
        yield name, rows, replace(settings.harvest, max_tokens=n)


def harvest(
    settings: "TrainSettings", inputs: Inputs, run: RunFolder, team: Team, *, quiet: bool
) -> tuple["ShardedActivations", "ShardedActivations"]:
    """Activations of the training and the held-out tokens on disk, of this run or of another.

    The other processes of the team are in ``help_to_harvest``.

    Raises:
        UserError: too little text, a full disk, or activations of another harvest (the message says
            what differs). CorruptFileError: a shard is not what was written.
    """
    from sae_core.dealer import Dealer
    from sae_core.harvest import open_harvest
    from sae_core.shards import ShardedActivations

    other = settings.run.activations
    folder = RunFolder(Path(other)).activations if other else run.activations
    stored = []
    for name, rows, config in parts_of(settings, inputs):
        found = open_harvest(
            inputs.lm, rows, {folder / name: [inputs.hook_point]}, config,
            dtype=settings.store_dtype(), shard_tokens=settings.shard_tokens(),
        )  # fmt: skip
        team.tell(found.place)
        with Progress(f"harvest {name}", config.max_tokens, "tokens", enabled=not quiet) as shown:
            folders = found.write(shown.update_to, Dealer())
        team.is_awaited = True
        if other:
            stored.append(ShardedActivations.open(folder / name, inputs.hook_point, verify=True))
        else:
            stored.append(folders[inputs.hook_point])
    return stored[0], stored[1]


def help_to_harvest(settings: "TrainSettings", inputs: Inputs, team: Team) -> None:
    """The share of another process in ``harvest``."""
    from sae_core.harvest import help_harvest

    for _, rows, config in parts_of(settings, inputs):
        place, dtype = team.hear(), settings.store_dtype()
        help_harvest(inputs.lm, rows, [inputs.hook_point], config, place, dtype=dtype)
