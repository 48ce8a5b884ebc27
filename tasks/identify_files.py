"""What ``sae-apps identify`` keeps, and what others read of it.

identify.safetensors   per latent: the measurements behind the conditions, score, flag, cause
identify.json          the report, written last; names the SAE it is about
sae/                   the verdict beside the SAE, where ``inspect`` finds it
"""

from typing import TYPE_CHECKING, Any

from .common import to_json
from .featurize import FinishedRun

if TYPE_CHECKING:
    from sae_core.conditions import Conditions
    from sae_core.verdict import Verdict

PER_LATENT = (
    *("count", "mean_act", "peak", "kurtosis", "alignment", "rho", "excess", "partner"),
    *("sample_count", "band_freq", "has_band", "n_copies", "coherence", "max_cosine"),
)


def save(run: FinishedRun, found: "Conditions", judged: "Verdict", report: dict[str, Any]) -> None:
    """Keep the result: arrays beside the run, the verdict with its SAE, identify.json last.

    Each file is whole or absent, and identify.json names the SAE it is about.
    """
    from safetensors.torch import save as to_bytes

    from sae_core.disk import atomic_write_text, disk_errors, owner_tag, remove_stale, replaced_file
    from sae_core.sae import save_sae

    arrays = {name: getattr(found, name) for name in PER_LATENT}
    arrays |= {"score": judged.score, "flag": judged.flag, "cause": judged.cause}
    if judged.consistency is not None:
        arrays["consistency"] = judged.consistency
    path = run.folder.path / "identify.safetensors"
    with disk_errors(path):
        remove_stale(path)
        with replaced_file(path, path.with_name(f".{path.name}.{owner_tag('tmp')}")) as file:
            file.write(to_bytes({name: value.contiguous() for name, value in arrays.items()}))
    agree = judged.consistency
    kept = {
        "n_runs": len(report["runs"]),
        "score": judged.score.tolist(),
        "flag": judged.flag.tolist(),
        "cause": judged.cause.tolist(),
        "consistency": None if agree is None else agree.tolist(),
    }
    save_sae(run.folder.sae, run.sae, run.extra | {"identify": kept}, overwrite=True)
    atomic_write_text(run.folder.path / "identify.json", to_json(report) + "\n")


def stored_verdict(extra: dict[str, Any], latent: int) -> dict[str, Any] | None:
    """What ``save`` kept about one latent; None where identify has not run."""
    from sae_core.verdict import CAUSES, FLAGS

    kept = extra.get("identify")
    if kept is None:
        return None
    agree = kept["consistency"]
    return {
        "n_runs": kept["n_runs"],
        "score": kept["score"][latent],
        "flag": FLAGS[kept["flag"][latent]],
        "cause": CAUSES[kept["cause"][latent]],
        "consistency": None if agree is None else agree[latent],
    }


def verdict_text(found: dict[str, Any]) -> str:
    """``consistency 0.83 over 3 runs, reliable``, with the cause where it is not."""
    agree = found["consistency"]
    head = (
        f"score {found['score']:.2f} from one run"
        if agree is None
        else f"consistency {agree:.2f} over {found['n_runs']} runs"
    )
    why = "" if found["flag"] == "reliable" else f" because {found['cause']}"
    return f"{head}, {found['flag']}{why}"
