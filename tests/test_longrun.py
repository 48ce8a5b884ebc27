"""The long run: slope and growth of planted series, memory from /proc, and a run of seconds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import installed

from benchmarks import longrun, longrun_memory, longrun_stream, longrun_table
from benchmarks.longrun_memory import MIB, Memory, memory_of
from benchmarks.longrun_table import Sample, curve_rows, goals, growth, phase_rows, slope
from sae_core.text import TextRow, TextSource, rows_from_texts

HOUR = 3600
SECONDS = (10.0, 30.0, 120.0)  # of the real run; the first in which training begins


def sample(seconds: float, level: float, phase: str = "train", tokens: int = 0) -> Sample:
    """A sample that holds ``level`` MiB, and as much again in mapped files."""
    held = int(level * MIB)
    return Sample(seconds, phase, tokens, Memory(2 * held, held, None))


def series(level, phase: str = "train") -> list[Sample]:
    """An hour of samples of a level that is a function of the seconds."""
    return [sample(t, level(t), phase, 100 * t) for t in range(0, HOUR + 1, 10)]


def test_a_planted_leak_is_found_and_warm_up_is_not_a_leak():
    def level(t: float) -> float:
        return 500 + min(t, 300) + 90 * t / HOUR  # a rise of 300 in five minutes, then 90 an hour

    (row,) = phase_rows("command", "m", series(level), 300)
    assert row["name"] == "command train" and row["samples"] == 331
    assert row["slope_MiB_per_hour"] == pytest.approx(90, abs=0.01)
    assert row["growth_MiB"] == pytest.approx(90 * 55 / 60, rel=0.02)
    assert row["growth"] == pytest.approx(82.5 / 807.5, rel=0.03)
    assert row["after_warm_up_MiB"] == pytest.approx(807.5)
    assert row["end_MiB"] == row["max_MiB"] == pytest.approx(890)
    assert row["rss_end_MiB"] == pytest.approx(1780) and row["pss_end_MiB"] is None
    assert row["tokens_per_s"] == 100 and row["minutes"] == 60
    assert [g.met for g in goals([row])] == [False]


def test_teeth_are_no_growth_though_a_line_over_them_rises():
    times = [float(t) for t in range(0, 1000, 5)]
    teeth = [500 + t % 125 for t in times]
    assert slope(times, teeth) * times[-1] > 10
    assert growth(times, teeth)[0] == pytest.approx(0, abs=1e-9)
    rising = [y + 0.1 * t for t, y in zip(times, teeth, strict=True)]
    rise, share = growth(times, rising)
    assert rise == pytest.approx(100) and share == pytest.approx(100 / 626.95, rel=0.02)


def test_each_phase_has_its_own_warm_up_and_a_short_one_no_row():
    samples = [sample(t, 900 - t, "harvest") for t in range(0, 100, 10)]
    samples += [sample(t, 700 + (400 if t < 150 else 0)) for t in range(100, 300, 10)]
    rows = phase_rows("command", "m", samples, 50)
    assert [row["name"] for row in rows] == ["command harvest", "command train"]
    assert [row["growth_MiB"] < 0 for row in rows] == [True, False]
    assert rows[1]["growth_MiB"] == 0 and rows[1]["rss_max_MiB"] == 2200
    assert [r["name"] for r in phase_rows("command", "m", samples, 100)] == ["command train"]


def test_the_curve_holds_the_first_sample_of_each_minute():
    found = curve_rows("streamed", [sample(t, t) for t in (5, 15, 58, 61, 119, 190)])
    assert [(row["minute"], row["anonymous_MiB"]) for row in found] == [(0, 5), (1, 61), (3, 190)]


def test_a_step_that_sigterm_lost_is_not_met():
    (row,) = phase_rows("command", "m", series(lambda _: 1.0), 300)
    row |= {"exit_code": 143, "checkpoint_step": 7, "last_step": 7}
    assert [g.met for g in goals([row])] == [True, True]
    assert [g.met for g in goals([row | {"last_step": 8}])] == [True, False]
    assert [g.met for g in goals([row | {"exit_code": 0}])] == [True, False]


def made_up(proc: Path, pid: int, parent: int, name: str = "python") -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} ({name}) S {parent} 1 1\n")
    (folder / "status").write_text(f"Name:\t{name}\nVmRSS:\t {pid} kB\nRssAnon:\t 3 kB\n")
    (folder / "smaps_rollup").write_text("00-ff ---p 00 00:00 0 [rollup]\nPss:\t 2 kB\n")


def test_memory_is_that_of_the_whole_tree_and_of_nothing_else(tmp_path):
    for pid, parent in ((10, 1), (11, 10), (12, 11), (20, 1)):
        made_up(tmp_path, pid, parent, name="odd) S 20 (")
    assert sorted(longrun_memory.tree(10, tmp_path)) == [10, 11, 12]
    assert memory_of(10, tmp_path) == Memory(33 * 1024, 9 * 1024, 6 * 1024)
    (tmp_path / "12" / "smaps_rollup").unlink()
    assert memory_of(10, tmp_path) == Memory(33 * 1024, 9 * 1024, None)
    assert memory_of(99, tmp_path) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc (Linux)")
def test_a_real_process_holds_what_it_allocates():
    code = "x = b'1' * (64 * 2**20); print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout and child.stdout.readline() == b"ready\n"
        found = memory_of(child.pid)
        child.communicate(b"\n")
    assert found and 64 * MIB < found.anonymous < 128 * MIB
    assert found.resident > found.anonymous


def test_the_endless_text_has_every_row_in_each_round_and_no_row_id_twice(monkeypatch):
    monkeypatch.setattr(longrun_stream, "BLOCK", 4)
    texts = [f"text {i}" for i in range(10)]
    rows = longrun_stream.endless(rows_from_texts(texts))
    rounds = [[next(rows) for _ in texts] for _ in range(2)]
    assert [sorted(r.text for r in one) for one in rounds] == [texts, texts]
    assert [r.text for r in rounds[0]] != [r.text for r in rounds[1]]
    assert [r.row_id for one in rounds for r in one] == list(range(20))


def test_the_stream_ends_by_sigterm_with_its_last_step_on_disk(stories260k, tmp_path, monkeypatch):
    def rows() -> Iterator[TextRow]:
        for n in range(4000):
            if n == 600:
                os.kill(os.getpid(), signal.SIGTERM)
            yield TextRow(n, f"Once there were {n} cats and a dog.", {})

    monkeypatch.setattr(longrun_stream, "open_text", lambda _: TextSource("t", rows))
    monkeypatch.setattr(longrun_stream, "BATCH", 64)
    monkeypatch.setattr(longrun_stream, "BUFFER", 256)
    monkeypatch.setattr(longrun_stream, "BLOCK", 8)
    assert longrun_stream.stream(str(stories260k), "t", tmp_path / "run") == longrun_table.STOPPED
    found = longrun.saved(tmp_path / "run")
    assert found["checkpoint_step"] == found["last_step"] > 0
    assert longrun.progress(tmp_path / "run", "streamed") == ("streamed", 64 * found["last_step"])


def test_the_harvest_is_as_long_as_the_estimate_says_and_no_longer_than_the_text(
    tmp_path, monkeypatch
):
    stub = tmp_path / "sae-apps"
    estimate = json.dumps({"forward_tokens_per_second": 50.5, "stored_tokens": 1000})
    stub.write_text(f"#!/bin/sh\n[ $1 = train ] && echo '{estimate}'\n")
    stub.chmod(0o700)
    monkeypatch.setattr(longrun, "installed", lambda: str(stub))
    assert longrun.harvest_tokens(["--quiet"], 10.0) == 505
    assert longrun.harvest_tokens(["--quiet"], 100.0) == 1000
    stub.write_text("#!/bin/sh\necho no such text >&2; exit 2\n")
    with pytest.raises(RuntimeError, match="ended with 2: no such text"):
        longrun.harvest_tokens(["--quiet"], 10.0)


def test_a_real_run_is_watched_and_ended(stories260k, tmp_path, monkeypatch):
    installed()  # or the test is skipped
    monkeypatch.setattr(longrun, "harvest_tokens", lambda *_: 5000)
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"One day {i} dogs saw {i * i} birds."}) for i in range(3000)]
    text.write_text("\n".join(lines) + "\n")
    for seconds in SECONDS:
        try:
            scratch = tmp_path / str(seconds)
            scratch.mkdir()
            rows, curve = longrun.long_run("command", str(stories260k), str(text), seconds, scratch)
            break
        except TimeoutError:  # a busy machine
            continue
    else:
        pytest.fail(f"No training within {SECONDS[-1]} s.")
    last = rows[-1]
    assert last["name"] == "command train" and last["exit_code"] == 143
    assert last["checkpoint_step"] == last["last_step"] > 0
    assert last["tokens"] > 0 and last["samples"] > 1 and last["max_MiB"] > 50
    assert curve[0]["minute"] == 0
