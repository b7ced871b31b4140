"""The whole job, by its command: the real month, generated lakes, and input that is the same but for its form."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import oracle
import pytest
from conftest import HOME, NO_JAVA, java_is_there, read_lake, run_etl

Row = tuple[Any, ...]
Tables = dict[str, list[Row]]

LAKES = int(os.environ.get("LAKES", "3"))  # generated ones; a sweep has more
# Spark takes its time: unless there are many lakes, it does the first only.
ON_BOTH = range(1, 2 if LAKES <= 3 else LAKES + 1)
ON_SAIL = range(ON_BOTH.stop, max(LAKES, ON_BOTH.stop) + 1)
SHAPES: tuple[dict[str, object], ...] = (
    {"songs": 60, "users": 20, "events": 600, "bad": 0.1, "repeated": 0.2},
    {"songs": 300, "users": 60, "events": 1500, "bad": 0.02, "repeated": 0.05, "start": "2020-12-20", "days": 20},
    {"songs": 20, "users": 3, "events": 300, "bad": 0.3, "repeated": 0.4, "start": "2016-02-25", "days": 8},
    {"songs": 120, "users": 200, "events": 900, "bad": 0, "repeated": 0.5, "start": "2000-01-01", "days": 3},
    {"songs": 40, "users": 1, "events": 200, "bad": 0.5, "repeated": 0, "start": "2099-12-01", "days": 31},
)


class Lake:
    """What a run wrote: its tables and rejects as the oracle gives them, and its record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tables: Tables = {
            name: sorted((row[:9] for row in rows) if name == "songplays" else rows, key=repr)
            for name, rows in read_lake(folder).items()
        }
        self.record: dict[str, Any] = json.loads((folder / "_runs" / "latest.json").read_bytes())
        self.rejects = read_rejects(folder, self.record["run"])

    def query(self, sql: str) -> list[Row]:
        """Rows of a query over the tables by their names."""
        with duckdb.connect() as database:
            database.execute("SET TimeZone = 'UTC'")
            for name in self.tables:
                glob = str(self.folder / name / "**" / "*.parquet").replace("'", "''")
                source = f"read_parquet('{glob}', hive_partitioning = true)"
                database.execute(f'CREATE VIEW "{name}" AS SELECT * FROM {source}')
            return database.execute(sql).fetchall()


def read_rejects(folder: Path, run: str) -> list[Row]:
    files = [str(path) for path in (folder / "_rejects" / run).rglob("*.parquet")]
    if not files:
        return []
    with duckdb.connect() as database:
        columns = "kind, source_file, line, reason, field"
        return sort_rows(database.execute(f"SELECT {columns} FROM read_parquet(?)", [files]).fetchall())


def sort_rows(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=repr)


def run(source: Path, output: Path, engine: str) -> Lake:
    """The job as a user runs it, on input of which much may be damaged."""
    done = run_etl("--input", source, "--output", output, "--max-rejects", 1, engine=engine)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    return Lake(output)


def assert_as_expected(lake: Lake, source: Path) -> None:
    """Tables, rejects and counts are the oracle's, to the row."""
    tables, rejects, counts = oracle.expect(source)
    for name, rows in tables.items():
        assert lake.tables[name] == sort_rows(rows), name
    assert lake.rejects == sort_rows(rejects)
    assert_counts(lake.record, tables, counts)


def assert_counts(record: dict[str, Any], tables: Tables, counts: dict[str, Counter[str]]) -> None:
    song, log = counts["song"], counts["log"]
    assert {name: table["rows"] for name, table in record["tables"].items()} == {
        name: len(rows) for name, rows in tables.items()
    }
    names = ("lines", "blank", "accepted", "rejected", "repeats")
    found = record["inputs"]
    assert {name: found["song"][name] for name in names} == {name: song[name] for name in names}
    assert found["song"]["songs"] == len(tables["songs"])
    log_names = (*names, "plays", "other_pages", "logged_out")
    assert {name: found["log"][name] for name in log_names} == {name: log[name] for name in log_names}
    assert found["log"]["songplays"] == len(tables["songplays"])
    assert record["matched"] == sum(row[4] is not None for row in tables["songplays"])
    assert record["levels"] == Counter(row[4] for row in tables["users"])
    rejected = Counter({"song": song["rejected"], "log": log["rejected"]})
    by_kind: Counter[str] = Counter()
    for group in record["rejects"]:
        by_kind[group["kind"]] += group["lines"]
    assert by_kind == rejected


# ------------------------------------------------------------------------------------------------------- the real month


@pytest.fixture(scope="session")
def real_lakes(real_month: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lake]:
    """The lake of the real month by each engine, made when it is first asked for."""
    made: dict[str, Lake] = {}

    def get(engine: str) -> Lake:
        if engine not in made:
            made[engine] = run(real_month, tmp_path_factory.mktemp("real month") / engine, engine)
        return made[engine]

    return get


@pytest.fixture
def real_lake(engine_name: str, real_lakes: Callable[[str], Lake]) -> Lake:
    return real_lakes(engine_name)


def test_the_real_month_is_what_the_oracle_makes_of_it(real_lake: Lake, real_month: Path) -> None:
    assert_as_expected(real_lake, real_month)


def test_every_line_of_the_real_month_is_accounted_for(real_lake: Lake) -> None:
    inputs = real_lake.record["inputs"]
    counts = {"lines": 71, "blank": 0, "accepted": 71, "rejected": 0, "songs": 71, "repeats": 0}
    assert inputs["song"] == {"files": 71, "bytes": inputs["song"]["bytes"], **counts}
    counts = {"lines": 8056, "blank": 0, "accepted": 8056, "rejected": 0, "songplays": 6820, "repeats": 0}
    counts |= {"plays": 6820, "other_pages": 1236, "logged_out": 286}
    assert inputs["log"] == {"files": 30, "bytes": inputs["log"]["bytes"], **counts}
    assert real_lake.rejects == real_lake.record["rejects"] == []


def test_the_tables_of_the_real_month_have_the_rows_that_are_known(real_lake: Lake) -> None:
    rows = {"songplays": 6820, "users": 96, "songs": 71, "artists": 69, "time": 6813}
    assert {name: len(found) for name, found in real_lake.tables.items()} == rows
    assert {name: table["rows"] for name, table in real_lake.record["tables"].items()} == rows


def test_one_play_of_the_real_month_has_a_song(real_lake: Lake) -> None:
    columns = "user_id, session_id, CAST(start_time AS varchar), song_id, artist_id"
    assert real_lake.query(f"SELECT {columns} FROM songplays WHERE song_id IS NOT NULL OR artist_id IS NOT NULL") == [
        (15, 818, "2018-11-21 21:56:47.796+00", "SOZCTXZ12AB0182364", "AR5KOSW1187FB35FF4")
    ]
    # Its item is part of its name only: 15|818|5|1542837407796.
    assert real_lake.query("SELECT songplay_id FROM songplays WHERE song_id IS NOT NULL") == [
        ("45e2594c1a1e78ffce3304446be280f7",)
    ]
    assert real_lake.record["matched"] == 1


def test_the_users_of_the_real_month_have_their_latest_level(real_lake: Lake) -> None:
    assert real_lake.query("SELECT level, count(*) FROM users GROUP BY level ORDER BY level") == [
        ("free", 74),
        ("paid", 22),
    ]
    changed = "SELECT user_id FROM songplays GROUP BY user_id HAVING count(DISTINCT level) > 1"
    assert real_lake.query(f"SELECT user_id, level FROM users WHERE user_id IN ({changed}) ORDER BY user_id") == [
        (user, "paid") for user in (15, 16, 29, 36, 49, 80, 85, 88)
    ]
    # User 15 goes paid, free, paid within one day.
    levels = real_lake.query(
        "SELECT day, list(level ORDER BY start_time) FROM (SELECT *, start_time::date AS day FROM songplays) "
        "WHERE user_id = 15 GROUP BY day HAVING count(DISTINCT level) > 1 ORDER BY day"
    )
    runs = ["".join(level[0] for level, before in zip(day, [None, *day]) if level != before) for _, day in levels]
    assert runs == ["pfp"]


def test_the_plays_of_the_real_month_fall_on_the_days_that_are_known(real_lake: Lake) -> None:
    join = "FROM songplays JOIN time USING (start_time)"
    assert real_lake.query(f"SELECT week, count(*) {join} GROUP BY week ORDER BY week") == [
        (44, 410),
        (45, 1257),
        (46, 1958),
        (47, 1711),
        (48, 1484),
    ]
    assert real_lake.query(f"SELECT weekday, count(*) {join} GROUP BY weekday ORDER BY weekday") == [
        (1, 396),
        (2, 1014),
        (3, 1071),
        (4, 1364),
        (5, 1052),
        (6, 1295),
        (7, 628),
    ]
    shared = "SELECT start_time FROM songplays GROUP BY start_time HAVING count(DISTINCT user_id) = 2"
    assert real_lake.query(f"SELECT count(*) FROM ({shared})") == [(7,)]
    assert real_lake.query("SELECT DISTINCT year, month FROM songplays") == [(2018, 11)]


@pytest.mark.skipif(not java_is_there(), reason=NO_JAVA)
def test_both_engines_make_the_same_of_the_real_month(
    request: pytest.FixtureRequest, real_lakes: Callable[[str], Lake]
) -> None:
    """Row by row, and in the same folders, files, columns and types."""
    if request.config.getoption("--engine") != "both":
        pytest.skip("one engine has nothing to be compared with")
    sail, spark = real_lakes("sail"), real_lakes("spark")
    assert sail.tables == spark.tables
    for name in sail.tables:
        described = [lake.query(f'DESCRIBE "{name}"') for lake in (sail, spark)]
        assert described[0] == described[1], name
        folders = [
            sorted({str(Path(path).parent) for path in lake.record["tables"][name]["files"]}) for lake in (sail, spark)
        ]
        assert folders[0] == folders[1], name
        assert [len(lake.record["tables"][name]["files"]) for lake in (sail, spark)] == [len(folders[0])] * 2, name


# ----------------------------------------------------------------------------------------------------- generated lakes


def generate(out: Path, **flags: object) -> Path:
    command = [sys.executable, str(HOME / "tools" / "generate.py"), "--out", str(out)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, check=True, timeout=120)
    return out


@pytest.mark.parametrize("seed", ON_BOTH)
def test_a_generated_lake_is_what_the_oracle_makes_of_it(engine_name: str, seed: int, tmp_path: Path) -> None:
    """Damaged lines and repeated ones among them."""
    source = generate(tmp_path / "input", seed=seed, **SHAPES[seed % len(SHAPES)])
    assert_as_expected(run(source, tmp_path / "lake", engine_name), source)


@pytest.mark.parametrize("seed", ON_SAIL)
def test_more_generated_lakes_are_what_the_oracle_makes_of_them(seed: int, tmp_path: Path) -> None:
    source = generate(tmp_path / "input", seed=seed, **SHAPES[seed % len(SHAPES)])
    assert_as_expected(run(source, tmp_path / "lake", "sail"), source)


# ---------------------------------------------------------------------------------------- the same input, otherwise put


def write_otherwise(source: Path, target: Path, seed: int) -> None:
    """The same lines in another order, each two or three times, in files of other names, sizes and forms."""
    chance = random.Random(seed)
    for kind in ("song", "log"):
        lines = [line for path in (source / f"{kind}_data").rglob("*.json") for line in path.read_bytes().split(b"\n")]
        lines += lines + chance.sample(lines, len(lines) // 3)
        chance.shuffle(lines)
        while lines:
            some, lines = lines[: (size := chance.randrange(1, 400))], lines[size:]
            content = chance.choice((b"\n", b"\r\n", b"\n\n", b"\n \t\n")).join(some) + chance.choice(
                (b"", b"\n", b"\r\n")
            )
            path = target / f"{kind}_data" / chance.choice("abc") / f"{len(lines)}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            if chance.random() < 0.3:
                path.with_suffix(".json.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(chance.choice((b"", b"\xef\xbb\xbf")) + content)


def test_shuffled_split_and_repeated_input_gives_the_same_tables(tmp_path: Path) -> None:
    source = generate(tmp_path / "input", seed=42, songs=150, events=1200, bad=0.05, repeated=0.1)
    write_otherwise(source, tmp_path / "otherwise", seed=42)
    one, other = (run(tmp_path / name, tmp_path / f"lake of {name}", "sail") for name in ("input", "otherwise"))
    assert one.tables == other.tables
    bad = [{(kind, line, reason, field) for kind, _, line, reason, field in lake.rejects} for lake in (one, other)]
    assert bad[0] == bad[1]
    assert len(bad[0]) > 50
    assert_as_expected(other, tmp_path / "otherwise")


def test_a_second_run_over_more_input_gives_what_one_run_over_all_of_it_gives(tmp_path: Path) -> None:
    """A lake is that of its last run's input, whatever it was before."""
    source = generate(tmp_path / "input", seed=43, songs=60, events=500, bad=0.05, repeated=0.1)
    half = tmp_path / "half"
    shutil.copytree(source / "song_data", half / "song_data")
    for path in sorted((source / "log_data").rglob("*.json"))[::2]:
        copy = half / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    run(half, tmp_path / "lake", "sail")
    assert_as_expected(run(source, tmp_path / "lake", "sail"), source)
