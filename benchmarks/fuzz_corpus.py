"""Good examples of what users and other programs write, and checksums that fit changed ones."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.described import SEAL


def reseal(folder: Path) -> None:
    """Checksums and seals as a hostile writer would make them: fitting what is there."""
    for manifest in folder.rglob("manifest.json"):
        try:
            content = json.loads(manifest.read_text())
            if content.get("format") == "sae-apps-folder":
                content["files"] = {
                    name: {"sha256": _sha(manifest.parent / name),
                           "bytes": (manifest.parent / name).stat().st_size}
                    for name in content["files"] if (manifest.parent / name).is_file()
                }  # fmt: skip
            for shard in content.get("shards", ()):
                file = manifest.parent / shard["file"]
                shard |= {"sha256": _sha(file), "bytes": file.stat().st_size}
            manifest.write_text(json.dumps(content))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            continue  # the manifest itself is the input
    for file in folder.rglob("*.json"):
        _unseal(file)


def _unseal(file: Path) -> None:
    """Take the seal away: records of old versions have none, so no reader asks for it."""
    try:
        content = json.loads(file.read_text())
        if isinstance(content, dict) and content.pop("seal", None) is not None:
            file.write_text(json.dumps(content))
    except (ValueError, RecursionError):
        return


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def text_files(folder: Path, root: Path) -> None:
    folder.mkdir(exist_ok=True)
    lines = (root / "pool.jsonl").read_text().splitlines()[:12]
    records = [json.loads(line) for line in lines]
    for i, record in enumerate(records):
        record |= {"id": i, "label": "ab"[i % 2], "score": i / 2}
    text = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "a.jsonl").write_text(text)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "a.json").write_text(json.dumps(records))
    talk = [{"messages": [{"role": "user", "content": r["prompt"]},
                          {"role": "assistant", "content": r["response"]}]} for r in records]
    (folder / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in talk))
    (folder / "a.txt").write_text("\n".join(r["prompt"].replace("\n", " ") for r in records))
    for suffix, sign in (("csv", ","), ("tsv", "\t")):
        rows = ["prompt,response,label".replace(",", sign)]
        rows += [sign.join('"' + r[k].replace('"', '""').replace("\n", " ") + '"'
                           for k in ("prompt", "response", "label")) for r in records]
        (folder / f"a.{suffix}").write_text("\n".join(rows) + "\n")
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet")


def without_seal(tables: Path, good: Path) -> None:
    """The tables as an old version wrote them: nothing stands between a change and its reader."""
    good.mkdir(exist_ok=True)
    for file in tables.glob("*.parquet"):
        table = pq.read_table(file)
        kept = {k: v for k, v in (table.schema.metadata or {}).items() if k != SEAL}
        pq.write_table(table.replace_schema_metadata(kept), good / file.name)


def places_files(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    rows = [("Rome", 41.9, 12.5, "Lazio", 2_800_000), ("Milan", 45.5, 9.2, "Lombardy", 1_300_000),
            ("Pisa", 43.7, 10.4, "Tuscany", 90_000), ("Bari", 41.1, 16.9, "Apulia", 320_000)]
    names = ("name", "lat", "lon", "admin", "population")
    text = ",".join(names) + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / "a.csv").write_text(text)
    (folder / "a.tsv").write_text(text.replace(",", "\t"))
    records = [dict(zip(names, row, strict=True)) for row in rows]
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet")
    features = [
        {"type": "Feature", "properties": {"name": r["name"], "admin": r["admin"]},
         "geometry": {"type": "Point", "coordinates": [r["lon"], r["lat"]]}} for r in records
    ]  # fmt: skip
    (folder / "a.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": features})
    )
