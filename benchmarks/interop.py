"""Do the formats hold? Each SAE library in an environment of its own, against our conversion.

    python -m benchmarks.interop --python sae_lens=PYTHON --python sparsify=PYTHON \
        --python dictionary_learning=PYTHON --python sae_bench=PYTHON

Each PYTHON is an interpreter that can import the library. Reading: the library makes and saves an
SAE with random weights, biases and thresholds, and encodes and decodes 256 random activations; we
convert the folder and do the same. Writing: we write an SAE of each kind for SAELens, which loads,
encodes and decodes. Differences are maxima over all codes, absolute and relative to the largest.
SAEBench: its own functions are given our adapter. With --golden FILE small examples are stored for
the tests instead, without a result file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import ROOT, Goal, write_result
from sae_core.disk import atomic_write_text
from sae_core.interop import read_foreign, write_sae_lens
from sae_core.sae import SAE, Kind, SAEConfig, save_sae

TOLERANCE = 1e-5
LIBRARIES = ("sae_lens", "sparsify", "dictionary_learning")
SEED = 0
PEERS = Path(__file__).with_name("interop_peers.py")
VERSION = "from importlib.metadata import version; print(version({!r}))"
PACKAGES = {
    "sae_lens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
    "sae_bench": "sae-bench",
}


def call(python: str, *argv: str) -> str:
    """Run a script with another interpreter; its output, or its errors where it fails."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"PATH": "/usr/bin:/bin", "HOME": tempfile.gettempdir()}
    run = subprocess.run([python, *argv], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"{python} {' '.join(argv)}\n{run.stderr}")
    return run.stdout.strip()


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Differences of codes and reconstructions, and codes that fire on one side only."""
    record: dict[str, Any] = {"L0": round(float((wanted["codes"] != 0).sum(1).float().mean()), 1)}
    for name in ("codes", "x_hat"):
        gap = float((found[name].double() - wanted[name].double()).abs().max())
        record[f"{name}_abs"] = gap
        record[f"{name}_rel"] = gap / float(wanted[name].abs().max())
    flips = (found["codes"] != 0) != (wanted["codes"] != 0)
    return record | {"flips": int(flips.sum())}


def ours(sae: SAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes and reconstructions of an SAE."""
    return {"codes": sae.encode(x), "x_hat": sae.reconstruct(x)}


def reading(library: str, python: str, folder: Path) -> list[dict[str, Any]]:
    """What the library makes, read by us."""
    folder.mkdir()
    call(python, str(PEERS), "make", library, str(folder))
    rows = []
    for case, place, wanted in cases(folder):
        converted = read_foreign(place, x=wanted["x"])
        rows.append({
            "name": f"{library}: {case}", "library": library, "direction": "read", "case": case,
            "kind": converted.sae.config.kind,
            **difference(ours(converted.sae, wanted["x"]), wanted),
        })  # fmt: skip
    return rows


def cases(folder: Path) -> list[tuple[str, Path, dict[str, torch.Tensor]]]:
    """Name, folder and expected tensors of what `make` left."""
    found = []
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.with_suffix("")
        if place.is_dir():  # else weights inside a case
            found.append((place.relative_to(folder).as_posix(), place, load_file(file)))
    return found


def numbers(tensor: torch.Tensor) -> Any:
    """Nested lists; float32 in the nine digits that are enough for it."""
    if tensor.ndim:
        return [numbers(part) for part in tensor]
    is_short = tensor.dtype == torch.float32
    return float(f"{tensor.item():.9g}") if is_short else tensor.item()


def golden(pythons: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """Small examples of each library: configuration, tensors, and what the library computes."""
    found = []
    for library in (name for name in LIBRARIES if name in pythons):
        (folder / library).mkdir()
        call(pythons[library], str(PEERS), "make", library, str(folder / library), "tiny")
        for case, place, wanted in cases(folder / library):
            (config,) = place.glob("*.json")
            (weights,) = [p for p in place.iterdir() if p.is_file() and p != config]
            is_pickle = weights.suffix == ".pt"
            tensors = torch.load(weights, weights_only=True) if is_pickle else load_file(weights)
            found.append({
                "library": library, "case": case, "config_file": config.name,
                "config": json.loads(config.read_text()), "weights_file": weights.name,
                "tensors": {k: [str(t.dtype)[6:], numbers(t)] for k, t in tensors.items()},
                "expected": {k: numbers(t) for k, t in wanted.items()},
            })  # fmt: skip
    return found


def native_saes() -> dict[str, SAE]:
    """An SAE of each kind with random weights, biases, scale and thresholds."""
    generator = torch.Generator().manual_seed(SEED)
    saes: dict[str, SAE] = {}
    forms: tuple[tuple[Kind, dict[str, Any]], ...] = (
        ("gba", {"normalize": "token"}), ("gba", {"normalize": "none"}),
        ("gba", {"normalize": "token", "gate": "relu"}),
        ("gba", {"normalize": "none", "tied": True}),
        ("topk", {"normalize": "token"}), ("topk", {"normalize": "none"}),
        ("batch_topk", {"normalize": "token"}), ("jumprelu", {"normalize": "none"}),
        ("relu", {"normalize": "token"}),
    )  # fmt: skip
    for kind, more in forms:
        sae = SAE(SAEConfig(64, 512, kind=kind, k=8, **more), generator=generator).eval()
        sae.b_enc.data = -0.25 * torch.rand(512, generator=generator)
        sae.b_dec.data = 0.1 * torch.randn(64, generator=generator)
        sae.threshold.data = 0.2 * torch.rand(512, generator=generator)
        if kind == "gba":
            sae.scale.data = 0.5 + torch.rand(512, generator=generator)
        name = ", ".join([kind, *(f"{k}={v}" for k, v in more.items())])
        saes[name] = sae
    return saes


def writing(python: str, folder: Path) -> list[dict[str, Any]]:
    """What we write, read by SAELens."""
    folder.mkdir()
    saes = native_saes()
    x = 3 * torch.randn(256, 64, generator=torch.Generator().manual_seed(SEED + 1))
    for name, sae in saes.items():
        write_sae_lens(sae, folder / name, {"hook_point": "layers.1.out", "model_id": "gpt2"})
        save_file({"x": x}, folder / f"{name}.safetensors")
    call(python, str(PEERS), "load", str(folder))
    return [
        {
            "name": f"to sae_lens: {name}", "library": "sae_lens", "direction": "write",
            "case": name, "kind": sae.config.kind,
            **difference(load_file(folder / f"{name}.out.safetensors"), ours(sae, x)),
        }
        for name, sae in saes.items()
    ]  # fmt: skip


def benching(python: str, folder: Path) -> list[dict[str, Any]]:
    """What SAEBench says of the adapter, for a normalising SAE and one that does not."""
    folder.mkdir()
    x = 3 * torch.randn(256, 64, generator=torch.Generator().manual_seed(SEED + 1))
    names = ("gba, normalize=token", "topk, normalize=none")
    for name in names:
        save_sae(folder / name, native_saes()[name])
        save_file({"x": x}, folder / f"{name}.safetensors")
    call(python, str(PEERS), "bench", str(folder))
    rows = []
    for name in names:
        found = json.loads((folder / f"{name}.bench.json").read_text())
        accepted = not found["absent"] and found["is_unit"] and found["is_repeatable"]
        rows.append({
            "name": f"sae_bench: {name}", "library": "sae_bench", "direction": "adapter",
            "case": name, "kind": name.split(",")[0], "x_hat_rel": found["x_hat"],
            "accepted": accepted, "absent": ", ".join(found["absent"]) or "nothing",
        })  # fmt: skip
    return rows


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Every difference below the tolerance, and SAEBench content."""
    found = []
    for library, direction in dict.fromkeys((r["library"], r["direction"]) for r in rows):
        part = [r for r in rows if (r["library"], r["direction"]) == (library, direction)]
        keys = [key for key in ("codes_rel", "x_hat_rel") if key in part[0]]
        worst = max(row[key] for row in part for key in keys)
        refused = [row["case"] for row in part if not row.get("accepted", True)]
        note = f"{len(part)} SAEs" + (f"; refused: {', '.join(refused)}" if refused else "")
        found.append(
            Goal(
                f"largest relative difference, {library} ({direction})", worst,
                f"<= {TOLERANCE:g}", worst <= TOLERANCE and not refused, note,
            )
        )  # fmt: skip
    return found


def main() -> None:
    """Run what there is an interpreter for."""
    parser = argparse.ArgumentParser(description="Compare with other SAE libraries.")
    parser.add_argument("--python", action="append", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--golden", type=Path, help="store small examples for the tests here")
    arguments = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in arguments.python)
    unknown = sorted(set(pythons) - set(PACKAGES))
    if unknown or not pythons:
        parser.error(f"expected --python LIBRARY=PYTHON with one of {', '.join(PACKAGES)}")
    torch.set_num_threads(1)
    # the result names its command, and where an interpreter lies says nothing to a reader
    sys.argv[1:] = [part for name in pythons for part in ("--python", f"{name}=PYTHON")]
    started, rows = time.time(), []
    versions = {
        name: call(python, "-c", VERSION.format(PACKAGES[name])) for name, python in pythons.items()
    }
    with tempfile.TemporaryDirectory() as temp:
        if arguments.golden:
            examples = golden(pythons, Path(temp))
            atomic_write_text(
                arguments.golden, json.dumps({"versions": versions, "cases": examples}) + "\n"
            )
            return
        for library in (name for name in LIBRARIES if name in pythons):
            rows += reading(library, pythons[library], Path(temp) / library)
        if "sae_lens" in pythons:
            rows += writing(pythons["sae_lens"], Path(temp) / "write")
        if "sae_bench" in pythons:
            rows += benching(pythons["sae_bench"], Path(temp) / "bench")
    rows = [row | {"version": versions[row["library"]]} for row in rows]
    write_result("interop", rows, goals, started)


if __name__ == "__main__":
    main()
