"""The command ``sae-apps``: names the commands, and imports only the one that is asked for."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from sae_core.errors import UserError

from .common import EXIT_BAD_INPUT, EXIT_OK, PROG, nearest, run_guarded
from .processes import is_first, leave, n_processes

COMMANDS = {
    "train": "train a sparse autoencoder on a language model's activations",
    "sweep": "train several (hook points, kinds, widths, seeds) on one harvest",
    "featurize": "turn rows of text into sparse features with a trained SAE",
    "inspect": "show latents: how often they fire, and their top texts",
    "identify": "say which latents to rely on, and which conditions of the theory hold",
    "select": "pick the rows of a pool that are most like given targets, and say why",
    "geo": "find the latents that know where places are, and map them",
    "separability": "measure how far apart units are under different concepts",
    "suppress": "suppress a concept, and measure what that removes and costs",
    "align": "compare relations among codes with those in a semantic space",
    "convert": "convert SAEs of SAELens, sparsify, dictionary_learning; write SAELens",
    "monet": "find the experts of a domain in a Monet model, delete them, measure",
    "doctor": "show what is installed, which devices there are, what is cached",
    "demo": "train, evaluate and show an SAE on the built-in text and model",
}


def usage() -> str:
    lines = "\n".join(f"  {name:<13} {text}" for name, text in COMMANDS.items())
    return (
        f"usage: {PROG} COMMAND [options]\n\n"
        "Train identifiable sparse autoencoders on language models and use their features.\n\n"
        f"commands:\n{lines}\n\n"
        f"  {PROG} COMMAND --help   options with defaults and units\n"
        f"  {PROG} --version        the installed version\n\n"
        f"example:\n  {PROG} train --model smollm2-135m --text demo --hook layers.15.out "
        "--tokens 1M --d-sae 4608 --out runs/x"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (0, 2, 130, 143; see ``common``)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK
    if args[0] == "--version":
        print(f"{PROG} {version(PROG)}")
        return EXIT_OK
    code = EXIT_OK

    def body() -> None:
        nonlocal code
        if args[0] not in COMMANDS:
            found = nearest(args[0], COMMANDS)
            hint = f"the nearest is {found[0]!r}" if found else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"Unknown command {args[0]!r}; {hint}.")
        if n_processes() > 1 and args[0] != "train":
            if not is_first():
                raise SystemExit(EXIT_BAD_INPUT)
            raise UserError(
                f"Expected the command train in {n_processes()} processes, got {args[0]}, which "
                "runs in one (WORLD_SIZE is set, as torchrun sets it)."
            )
        try:
            code = import_module(f".{args[0]}", __package__).main(args[1:])
        except SystemExit as end:  # --help and --print_config end this way
            code = int(end.code or 0)

    return leave(run_guarded(body) or code)


if __name__ == "__main__":
    sys.exit(main())
