"""A damaged parquet file whose column metadata end the process where they are asked for.

pyarrow 26 looks at the size statistics of a column outside of its guard. One bit of the schema,
optional to required, makes the histogram of levels too long; a program that prints the column's
metadata is ended by std::terminate. The readers here never ask: they refuse or accept.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Of an element in the schema (thrift, compact): field 3, int32, zigzag of 1 (optional) or 0
# (required); field 4, a string, its length and the name.
OPTIONAL, REQUIRED = b"\x25\x02\x18\x04text", b"\x25\x00\x18\x04text"
READERS = ("table", "records", "places", "described")
CHILD = """
import sys
from pathlib import Path
from sae_apps.geospatial import places_files
from sae_core import described, records, untrusted
from sae_core.errors import UserError

file = Path(sys.argv[1])
for name, read in (
    ("table", lambda: untrusted.read_table(file)),
    ("records", lambda: list(records.read_records(file))),
    ("places", lambda: places_files.read_table(str(file), {}, [])),
    ("described", lambda: described.read_described(file, b"k", "me")),
):
    try:
        read()
        print(name, "accepted")
    except UserError as error:
        print(name, "refused", error)
"""
CONTROL = """
import sys
import pyarrow.parquet as pq
str(pq.read_metadata(sys.argv[1]).row_group(0).column(0))
"""


def child(code: str, file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(file)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a b", "c"]}), file)
    content = file.read_bytes()
    assert content.count(OPTIONAL) == 1
    file.write_bytes(content.replace(OPTIONAL, REQUIRED))
    return file


def test_the_readers_refuse_what_would_end_the_process(damaged: Path) -> None:
    done = child(CHILD, damaged)
    assert done.returncode == 0, done.stderr[-500:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(READERS)
    assert all(line.split()[1] == "refused" and str(damaged) in line for line in lines)


def test_control_the_metadata_of_the_column_end_the_process(damaged: Path) -> None:
    done = child(CONTROL, damaged)
    if done.returncode == 0:
        pytest.skip(f"This pyarrow, {pa.__version__}, reads the column's metadata.")
    assert done.returncode in (-signal.SIGABRT, 1), done.stderr[-500:]
    assert "histogram size mismatch" in done.stderr
