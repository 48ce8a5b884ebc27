"""The key facts of a run, each with a sentence for readers who meet the number first here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_apps.report.formats import DASH, duration, finite, memory, number, percent
from sae_apps.report.page import Section, render
from sae_core.errors import UserError

KINDS = {
    "gba": "GBA (group bias adaptation)",
    "relu": "ReLU + L1",
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "jumprelu": "JumpReLU",
}


@dataclass(frozen=True)
class Fact:
    """A number or a name with its one-line explanation."""

    term: str
    value: str
    note: str = ""


def overview_section(results: Mapping[str, Any]) -> Section:
    """Headline numbers, the setting of the run and its provenance.

    Args:
        results: plain values; what is absent, None or NaN is shown as a dash.
            Quality: fvu, fvu_raw, l0, alive_frac (or dead_fraction), recovered_zero,
            recovered_mean (the last two and ce_clean, ce_sae, ce_zero [nats/token] may sit in
            ``loss_recovered``),
            n_eval_tokens [tokens], dead_window_tokens [tokens].
            Setting: model_id, hook_point, kind, d_in, d_sae, n_tokens [tokens seen in training],
            n_rows, wall_seconds [s], peak_memory_bytes, machine, seed.
            Origin: model_revision, data_id, sae_hash, versions, command; all of them, model_id,
            hook_point and seed may also sit in ``provenance``.
    Raises:
        UserError: ``loss_recovered`` or ``provenance`` is there but is no mapping.
    """
    values: dict[str, Any] = {}
    for name in ("provenance", "loss_recovered"):
        nested = results.get(name) or {}
        if not isinstance(nested, Mapping):
            raise UserError(
                f"Expected results[{name!r}] to be a mapping, got {type(nested).__name__}."
            )
        values |= nested
    values |= results
    html = render(
        "overview.html.j2",
        headline=_headline(values),
        setting=_setting(values),
        origin=_origin(values),
        n_eval_tokens=values.get("n_eval_tokens"),
    )
    return Section("overview", "Overview", html)


def _headline(values: Mapping[str, Any]) -> list[Fact]:
    alive, dead = finite(values.get("alive_frac")), finite(values.get("dead_fraction"))
    if alive is None and dead is not None:
        alive = 1 - dead
    when = "at least once"
    if finite(values.get("dead_window_tokens")) is not None:
        when = f"in the last {number(values['dead_window_tokens'])} tokens"
    elif finite(values.get("n_eval_tokens")) is not None:
        when = f"at least once in {number(values['n_eval_tokens'])} held-out tokens"
    recovered = "100%: the model predicts as well as with its own activations. 0%: as badly as "
    recovered += "with zeros."
    if finite(values.get("recovered_mean")) is not None:
        recovered += f" Against the mean instead of zeros: {percent(values['recovered_mean'])}."
    return [
        Fact(
            "Variance left unexplained (FVU)",
            number(values.get("fvu")),
            f"The part of the activations that the reconstruction misses. "
            f"0 is perfect, 1 is no better than their mean.{_raw_note(values)}",
        ),
        Fact(
            "Active latents per token (L0)",
            number(values.get("l0")),
            "How many latents fire for one token, on average. Fewer are easier to read.",
        ),
        Fact("Latents alive", percent(alive), f"The share of latents that fired {when}."),
        Fact("Loss recovered", percent(values.get("recovered_zero")), recovered),
    ]


def _raw_note(values: Mapping[str, Any]) -> str:
    if finite(values.get("fvu_raw")) is None:
        return ""
    return (
        " Measured on tokens scaled to unit norm; on the activations as they are it is "
        f"{number(values['fvu_raw'])}."
    )


def _setting(values: Mapping[str, Any]) -> list[Fact]:
    kind = _text(values, "kind")
    facts = [
        Fact("Model", _text(values, "model_id"), "The language model whose activations are read."),
        Fact("Hook point", _text(values, "hook_point"), "Where in the model they are read."),
        Fact("Kind", KINDS.get(kind, kind), _kind_note(kind)),
        Fact(
            "Dictionary size (d_sae)",
            number(values.get("d_sae")),
            f"Number of latents, for activations of width {number(values.get('d_in'))}.",
        ),
        Fact(
            "Training tokens",
            number(values.get("n_tokens")),
            "Activations shown to the SAE, repeats included.",
        ),
        Fact("Text rows", number(values.get("n_rows")), "Passages with features in this run."),
    ]
    if finite(values.get("ce_sae")) is not None:
        nats = [number(values.get(name)) for name in ("ce_clean", "ce_sae", "ce_zero")]
        facts.append(
            Fact(
                "Next-token loss",
                f"{nats[0]} → {nats[1]}",
                f"Nats per token, untouched and with the reconstruction spliced in; {nats[2]} "
                "with zeros.",
            )
        )
    facts.append(
        Fact("Wall time", duration(values.get("wall_seconds")), "From the first token to the end.")
    )
    if finite(values.get("peak_memory_bytes")) is not None:
        peak = memory(values["peak_memory_bytes"])
        facts.append(Fact("Peak memory", peak, "Most memory in use at any time."))
    facts.append(Fact("Seed", _text(values, "seed"), "The same seed gives the same result."))
    return facts


def _kind_note(kind: str) -> str:
    if kind == "gba":
        return "Each group of latents holds its own firing rate by adapting its biases."
    return "How the SAE keeps its latents sparse."


def _origin(values: Mapping[str, Any]) -> list[Fact]:
    facts = [
        Fact("Model revision", _text(values, "model_revision")),
        Fact("Text", _text(values, "data_id")),
        Fact("SAE hash", _text(values, "sae_hash")),
        Fact("Versions", _text(values, "versions")),
    ]
    optional = (("Machine", "machine"), ("Command", "command"))
    return facts + [Fact(t, _text(values, key)) for t, key in optional if values.get(key)]


def _text(values: Mapping[str, Any], name: str) -> str:
    """A name as it is; a number without digits lost; a mapping such as versions as ``a 1, b 2``."""
    value = values.get(name)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or DASH
    if value is None or value == "" or (isinstance(value, float) and finite(value) is None):
        return DASH
    return str(value)
