"""``sae-apps convert``: SAEs of other libraries to ours, and ours to SAELens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_core.errors import CorruptFileError, UserError, reason

from .common import PROG, StopSignal, run_command
from .parsing import CommandParser, take
from .runs import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.interop import Converted

EXAMPLE = f"{PROG} convert gemma-scope/layer_12 --to native --out saes/layer_12"
NATIVE = ("config.json", "sae.safetensors")
N_REAL = 512  # tokens of a run on which the written files are checked, beside random activations


@dataclass(frozen=True)
class ConvertOptions:
    """Where to, and what the conversion is checked on."""

    to: Literal["native", "sae_lens"] = "native"
    """native (config.json, sae.safetensors, read by every command) or sae_lens."""
    out: str | None = None
    """Folder of the result: new or empty."""
    activations: str | None = None
    """Real activations [n, d_in] to check the conversion on, .npy or .safetensors with one
    matrix (null: those that a run keeps, where SOURCE is a run; random ones always)."""
    overwrite: bool = False
    """Replace what this command wrote there before."""


@dataclass(frozen=True)
class Source:
    """The SAE to convert and what is known about it."""

    format: str
    converted: "Converted"
    x: "Tensor | None"
    """Real activations, or None."""


def main(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "convert",
        "Convert an SAE between formats: SOURCE is a folder of SAELens, sparsify or "
        "dictionary_learning, of an SAE or a run of this program. Codes and reconstructions are "
        "compared with a second formula, that of the foreign format, before anything is written.",
        EXAMPLE,
    )
    parser.usage = f"{PROG} convert SOURCE --to native|sae_lens --out DIR [options]"
    parser.add_argument("source", nargs="?", type=str, help="Folder of the SAE.")
    parser.add_options(ConvertOptions)
    options = parser.parse(argv)
    chosen = take(ConvertOptions, options)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        if options.source is None or (chosen.out is None and not options.dry_run):
            raise UserError(f"Expected the folder of an SAE and --out, e.g. {EXAMPLE}")
        source = open_source(Path(options.source), chosen.activations)
        if source.format == "native" and chosen.to == "native":
            raise UserError(f"{options.source} is native already: expected --to sae_lens.")
        is_dry = options.dry_run
        notes = source.converted.notes + (preview if is_dry else write)(source, chosen)
        report = summary(source, chosen, notes, is_written=not is_dry)
        return report, as_text(report)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)


def open_source(folder: Path, activations: str | None) -> Source:
    """Read an SAE of any format, checked against its own formula.

    Raises:
        UserError: no format fits, or the files are not as expected.
    """
    from sae_core.interop import Converted, foreign_format, read_foreign
    from sae_core.sae import load_sae

    run = RunFolder(folder)
    is_run = run.run_file.is_file() and run.sae.is_dir()
    place = run.sae if is_run else folder
    if all((place / name).is_file() for name in NATIVE):
        sae, facts = load_sae(place)
        x = read_activations(Path(activations), sae.d_in) if activations else None
        if x is None and is_run:
            x = stored_activations(run, facts)
        return Source("native", Converted(sae, (), facts), x)
    x = read_activations(Path(activations), None) if activations else None
    return Source(foreign_format(folder) or "unknown", read_foreign(folder, x=x), x)


def read_activations(file: Path, d_in: int | None) -> "Tensor":
    """A matrix [n, d_in] of activations, float32.

    Raises:
        UserError: no such file, not one matrix of finite numbers, or of another width.
    """
    import torch
    from safetensors.torch import load_file

    from sae_core.untrusted import read_array

    if not file.is_file() or file.suffix not in (".npy", ".safetensors"):
        found = "nothing" if not file.exists() else file.name
        raise UserError(f"Expected a .npy or .safetensors file at {file}, got {found}.")
    try:
        if file.suffix == ".npy":
            found = [torch.from_numpy(read_array(file))]
        else:
            found = list(load_file(file).values())
    except Exception as error:  # safetensors and torch share no base class of theirs
        raise CorruptFileError(f"{file} cannot be read: {reason(error)}.") from error
    shapes = [list(tensor.shape) for tensor in found]
    if len(found) != 1 or found[0].ndim != 2 or d_in not in (None, shapes[0][1]):
        width = "d_in" if d_in is None else f"d_in={d_in}"
        raise UserError(f"Expected one matrix [n, {width}] in {file}, got shapes {shapes}.")
    x = None if found[0].is_complex() else found[0].float()
    if x is None or not (x.shape[0] and torch.isfinite(x).all()):
        raise UserError(
            f"Expected finite real activations of at least one token in {file}, got "
            f"{found[0].dtype} of shape {shapes[0]}."
        )
    return x


def stored_activations(run: RunFolder, facts: dict[str, Any]) -> "Tensor | None":
    """The first held-out tokens that a run keeps; None where they were deleted."""
    from sae_core.shards import ShardedActivations

    folder = run.activations / "held_out"
    if not folder.is_dir():
        return None
    stored = ShardedActivations.open(folder, facts["hook_point"])
    return next(stored.iter_sequential(N_REAL)).x.float()


def write(source: Source, chosen: ConvertOptions) -> tuple[str, ...]:
    """Write the result; what had to be folded, one sentence each."""
    from sae_core.interop import write_sae_lens
    from sae_core.sae import save_sae

    assert chosen.out is not None
    converted, out = source.converted, Path(chosen.out)
    if chosen.to == "native":
        save_sae(out, converted.sae, converted.facts, overwrite=chosen.overwrite)
        return ()
    return write_sae_lens(
        converted.sae, out, converted.facts, x=source.x, overwrite=chosen.overwrite
    )


def preview(source: Source, chosen: ConvertOptions) -> tuple[str, ...]:
    """What writing would fold, or its refusal; nothing is written."""
    from sae_core.interop.saelens_write import lens_tensors

    return lens_tensors(source.converted.sae)[2] if chosen.to == "sae_lens" else ()


def summary(
    source: Source, chosen: ConvertOptions, notes: tuple[str, ...], *, is_written: bool
) -> dict[str, Any]:
    """What was converted, as JSON types."""
    sae = source.converted.sae
    facts = source.converted.facts
    return {
        "from": source.format, "to": chosen.to, "out": chosen.out if is_written else None,
        "kind": sae.config.kind, "d_in": sae.d_in, "d_sae": sae.d_sae,
        "model_id": facts.get("model_id"), "hook_point": facts.get("hook_point"),
        "checked_on_tokens": 0 if source.x is None else len(source.x), "notes": list(notes),
    }  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """The summary as lines for people."""
    real = report["checked_on_tokens"]
    lines = [
        f"{report['from']} SAE of {report['d_sae']:,} latents (kind {report['kind']}, "
        f"d_in {report['d_in']}) to {report['to']}",
        "codes and reconstructions agree on random activations"
        + (f" and {real} given tokens" if real else ""),
        *(f"note: {note}" for note in report["notes"]),
        f"written to {report['out']}" if report["out"] else "nothing was written",
    ]
    return "\n".join(lines)
