"""``sae-apps sweep``: several SAEs (hook points, kinds, widths, seeds) on one harvest.

Each SAE gets a finished run of its own, as ``train`` makes it; the model runs once for all.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .common import PROG, StopSignal, run_command
from .parsing import CommandParser
from .sweep_plan import Lists, SweepPlan, make_plan
from .train import SHORT, add_training_options, groups_of, parse_with

if TYPE_CHECKING:
    from jsonargparse import Namespace

EXAMPLE = (
    f"{PROG} sweep --model smollm2-135m --text demo --hooks layers.6.out layers.15.out --tokens 1M "
    "--kinds gba topk --widths 2304 4608 --seeds 0 1 --out runs/sweep"
)
# what the lists take the place of, --activations, which each run has from the sweep, and the parts
# for several processes, which share the command train alone
REPLACED = ("hook", "seed", "activations", "latent_parts", "sae.kind", "sae.d_sae")


def build_parser() -> CommandParser:
    parser = CommandParser(
        "sweep",
        "Train an SAE for each combination of hook point, kind, width and seed, on activations "
        "that one pass of the model harvests for all of them, and evaluate each on the same "
        "held-out text. Every SAE gets a run of its own below the output, as train makes it. A "
        "sweep that was stopped continues with the same command, and one that is finished grows "
        "with longer lists.",
        EXAMPLE,
        short={short: key for short, key in SHORT.items() if key not in REPLACED},
    )
    for flag, kind, text in (
        ("--hooks", str, "Hook points, e.g. layers.6.out layers.15.out."),
        ("--kinds", str, "Kinds of SAE: gba topk batch_topk jumprelu relu (null: gba)."),
        ("--widths", int, "Numbers of latents (null: 8 times d_in)."),
        ("--seeds", int, "Initial weights and batch order; the first decides the held-out rows, "
                         "of all SAEs, unless --text.split_seed does (null: 0)."),
    ):  # fmt: skip
        parser.add_argument(flag, nargs="+", type=kind, help=text)
    add_training_options(parser, skip=REPLACED)
    return parser


def main(argv: Sequence[str]) -> int:
    plan, options = parse(argv)

    def work(stop: StopSignal) -> tuple[Any, str]:
        from .sweep_run import as_text, estimate, estimate_text, sweep

        if options.dry_run:
            report = estimate(plan, accept_terms=options.accept_terms)
            return report, estimate_text(report)
        found = sweep(plan, stop, accept_terms=options.accept_terms, quiet=options.quiet)
        return found, as_text(found)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)


def parse(argv: Sequence[str]) -> tuple[SweepPlan, "Namespace"]:
    """The flags as the settings of each run, and the flags themselves.

    Raises:
        UserError: a list that is empty or names something twice, or settings that do not fit.
    """
    from .settings import need_out

    options = parse_with(build_parser(), argv)
    given = {name: options[name] for name in ("kinds", "widths", "seeds")}
    given = {name: values for name, values in given.items() if values is not None}
    lists = Lists(options.hooks or (), **given)
    groups = groups_of(options)
    out = need_out(groups["run"].out)
    text = groups["text"]
    if text.split_seed is None:
        text = replace(text, split_seed=lists.seeds[0])
    return make_plan(lists, out, {**groups, "text": text}, options.sae.as_dict()), options
