"""Publishing to a folder: a lake that survives kills, faults, full disks, rivals, signals and other people's files.

Most tests replay a run: this file, started as a program, forks a child for each, which does all that etl.main does
but for the engine's part; the staged tables come from a run that was made once. The child counts the operations that
change the output (by Python's audit events, so that none escapes; fsync and the exchange of folders by name) and at
one of them is killed, fails or gets a signal. It is killed before the operation; after it is before the next. Where
a file is opened for writing it is killed in the middle of the write, too.

The ordinary run takes a seeded sample of the operations, and a few kills of whole runs; with SWEEP=full in the
environment (make sweep) it takes every operation, also every one of the recovery after every other, and twenty kills.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import duckdb
import pytest
from conftest import HOME, path_env, read_lake, run_etl

import etl

FULL = os.environ.get("SWEEP") == "full"
NOBODY = 65534  # a user who owns nothing, where the tests run as root
Rows = dict[str, list[tuple[Any, ...]]]
Tree = dict[str, str | bytes | None]

# ---------------------------------------------------------------------------------------------------------------------
# Inputs and whole runs
# ---------------------------------------------------------------------------------------------------------------------

NOV_15, DEC_1 = 1542241826796, 1543622400000  # 2018-11-15 00:30:26.796 and 2018-12-01 00:00 UTC


def song(number: int, **changes: object) -> dict[str, object]:
    """Song SO1 by AR1, and so on, as a line of song_data."""
    line = {"song_id": f"SO{number}", "title": f"Title {number}", "artist_id": f"AR{number}"}
    return {**line, "artist_name": f"Artist {number}", "duration": 200.5 + number, "year": 2000 + number, **changes}


def play(user: int, number: int, **changes: object) -> dict[str, object]:
    """A play of song SO1, and so on, as a line of log_data."""
    line = {"page": "NextSong", "ts": NOV_15, "userId": str(user), "level": "free", "sessionId": 7, "itemInSession": 0}
    return {**line, "song": f"Title {number}", "artist": f"Artist {number}", "length": 200.5 + number, **changes}


def put_input(folder: Path, songs: Iterable[object], plays: Iterable[object]) -> Path:
    """An input of two files; what is no text becomes JSON."""
    for kind, lines in (("song_data", songs), ("log_data", plays)):
        (folder / kind).mkdir(parents=True)
        text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / kind / "lines.json").write_text("".join(f"{line}\n" for line in text))
    return folder


def put_one(folder: Path, number: int) -> Path:
    """An input of which every row of every table tells the number."""
    return put_input(folder, [song(number)], [play(100 + number, number, ts=NOV_15 + 1000 * number)])


def rows_of_one(number: int) -> list[list[object]]:
    """What tells put_one's number, table by table."""
    instant = NOV_15 + 1000 * number
    return [[(instant, 100 + number)], [100 + number], [f"SO{number}"], [f"AR{number}"], [instant]]


def rows_seen(lake: Path) -> list[list[object]]:
    songplays, users, songs, artists, instants = read_lake(lake).values()
    firsts = [[row[0] for row in rows] for rows in (users, songs, artists, instants)]
    return [[row[1:3] for row in songplays], *firsts]


def tree(folder: Path) -> Tree:
    """Everything below a folder: files by content, links by target, folders as None."""
    found: Tree = {}
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            link, is_folder = path.is_symlink(), path.is_dir()
            content = f"-> {os.readlink(path)}" if link else None if is_folder else path.read_bytes()
            found[path.relative_to(folder).as_posix()] = content
    return found


def complaint(told: str) -> str:
    """The one line of a run's stderr that is not a step's."""
    steps = ("list input", "start engine", "read ", "stage ", "build ", "audit", "publish")
    (line,) = (line for line in told.splitlines() if not (line.startswith(steps) and re.search(r"\d\.\d s$", line)))
    assert line.startswith("etl.py: "), line
    return line.removeprefix("etl.py: ")


def latest(lake: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((lake / "_runs" / "latest.json").read_text()))


def records(lake: Path) -> list[dict[str, Any]]:
    """The runs' records, oldest first, but for latest.json."""
    return [json.loads(path.read_text()) for path in sorted((lake / "_runs").glob("2*.json"))]


def listed(lake: Path) -> dict[str, int]:
    """The data files of the last published run."""
    return {path: size for table in latest(lake)["tables"].values() for path, size in table["files"].items()}


def there(lake: Path) -> dict[str, int]:
    """The data files in the tables' folders."""
    paths = (path for name in etl.TABLES for path in (lake / name).rglob("*.parquet"))
    return {path.relative_to(lake).as_posix(): path.stat().st_size for path in paths}


# ---------------------------------------------------------------------------------------------------------------------
# Replays, the child's side
# ---------------------------------------------------------------------------------------------------------------------

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
READS = ("open", "os.listdir", "os.scandir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def serve() -> None:
    """Replay a run for each line of stdin; answer with its exit code, what it told and its operations."""
    codecs.lookup("utf-8-sig")  # an unprivileged child may be unable to load it
    for line in sys.stdin:
        with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as steps:
            child = os.fork()
            if not child:
                replay(json.loads(line), told.fileno(), steps.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = []
            for file in (told, steps):
                file.seek(0)
                texts.append(file.read().decode())
        print(json.dumps([code, *texts]), flush=True)


class Steps:
    """Counts and tells the operations on the output; one of them is where the process ends, fails or gets a signal."""

    def __init__(self, task: dict[str, Any], log: int) -> None:
        self.task, self.log, self.done, self.counting = task, log, 0, True

    def take(self, name: str, path: object = "") -> None:
        if not self.counting:
            return
        self.done += 1
        os.write(self.log, f"{name} {path}\n".encode())
        is_it, number = self.done == self.task["at"], self.task["number"]
        if self.task["how"] == "kill" and is_it:
            os._exit(9)
        if self.task["how"] == "tear" and is_it:  # the kernel kills after ten bytes of the write that follows
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        if self.task["how"] == "signal" and is_it:
            os.kill(os.getpid(), number)
        if self.task["how"] == "raise" and (is_it or (self.task["lasting"] and self.done > self.task["at"])):
            raise OSError(number, os.strerror(number), path or self.task["output"])

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """Python's own word that an operation is about to be done."""
        inside = bool(args) and isinstance(args[0], (str, Path)) and str(args[0]).startswith(self.task["output"])
        if event in CHANGES:
            try:
                self.take(event, args[0])
            except FileNotFoundError:
                if event == "os.remove":  # then it is gone indeed
                    self.counting = False
                    os.unlink(args[0], dir_fd=args[1] if args[1] >= 0 else None)
                    self.counting = True
                raise
        elif event == "open" and inside and args[2] & WRITING:
            self.take("open", args[0])
        elif event in READS and inside and self.task["reads"]:
            self.take("read", args[0])


def replay(task: dict[str, Any], told: int, log: int) -> NoReturn:
    """Run etl.main, but for the engine's part."""
    os.dup2(told, 1)
    os.dup2(told, 2)
    if task["user"]:
        os.setgid(task["user"])
        os.setuid(task["user"])
    steps, swap = Steps(task, log), etl.exchange

    def exchange(one: Path, other: Path) -> bool:
        with contextlib.suppress(OSError):  # the real one tells by its answer
            steps.take("exchange", other)
            return bool(task["exchange"]) and swap(one, other)
        return False

    def stage_tables(run: etl.Run, *_: object) -> None:
        if not task["staged"]:
            raise etl.Stop("refused", code=3)
        steps.counting = False
        shutil.copytree(Path(task["staged"], "staging"), run.staging)
        steps.counting = True
        record = json.loads(Path(task["staged"], "record.json").read_text())
        run.record.update((key, record[key]) for key in ("inputs", "rejects", "audit", "matched", "levels"))
        etl.list_tables(run, {name: table["rows"] for name, table in record["tables"].items()})
        etl.check_audit(run)
        if task["vanish"]:
            shutil.rmtree(task["output"])

    def stop() -> None:
        time.sleep(60 if task["hang"] else 0)

    replaced: dict[str, Callable[..., Any]] = {
        "check_engine": lambda _: None,
        "open_engine": lambda name: etl.Engine(name, "replayed", cast("Any", None), stop),
        "stage_tables": stage_tables,
        "exchange": exchange,
    }
    vars(etl).update(replaced)
    vars(os).update(fsync=lambda _: steps.take("fsync"))  # what is written outlives a kill, if not a power failure
    sys.addaudithook(steps.hear)
    code = etl.main(["--input", task["input"], "--output", task["output"], "--engine", "sail", *task["args"]])
    sys.stdout.flush()
    os._exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Replays, the tests' side
# ---------------------------------------------------------------------------------------------------------------------


class Replayed(NamedTuple):
    """How a replay ended, and the operations that it came to."""

    code: int
    told: str
    steps: list[str]


class Lake(NamedTuple):
    """A run to replay, and the lake on which it is: its rows before and after."""

    input: Path
    staged: Path
    before: Path | None
    old: Rows | None
    new: Rows


Run = Callable[..., Replayed]


@pytest.fixture(scope="session")
def replayed() -> Iterator[Run]:
    """Replays a run on an output: `staged` is None for one that is refused right after its recovery."""
    command = [sys.executable, __file__]
    env = path_env(PYTHONPATH=str(HOME), PYTHONDONTWRITEBYTECODE="1")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdin
        assert server.stdout
        to, answers = server.stdin, server.stdout

        def run(lake: Lake, output: Path, *, refused: bool = False, **task: object) -> Replayed:
            default: dict[str, object] = {"how": "count", "at": 0, "number": 0, "lasting": False, "reads": False}
            default.update(exchange=True, user=0, vanish=False, hang=False)
            default.update(args=["--max-rejects", "1"], input=str(lake.input))
            staged = None if refused else str(lake.staged)
            print(json.dumps({**default, "output": str(output), "staged": staged, **task}), file=to, flush=True)
            code, told, steps = json.loads(answers.readline())
            return Replayed(code, told, steps.splitlines())

        yield run
        to.close()


SAVING = """
import json, pathlib, shutil, sys, etl
place, commit = pathlib.Path(sys.argv.pop(1)), etl.commit
def save(target, record):
    shutil.copytree(target.root / etl.STAGING / record["run"], place / "staging")
    (place / "record.json").write_text(json.dumps(record))
    commit(target, record)
etl.commit = save
sys.exit(etl.main())
"""


@pytest.fixture(scope="session")
def lakes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lake]:
    """Two whole runs, one on an empty output and one on its lake, each with what it had staged right before commit."""
    folder = tmp_path_factory.mktemp("lakes")
    inputs = {
        # A table's folder may come (2010, December), go (2001) or stay.
        "first": put_input(
            folder / "first",
            [song(1), song(2), song(4), '{"song_id": "SO3"'],
            [play(26, 1), play(26, 2, itemInSession=1), play(8, 3, ts=NOV_15 + 5), "no JSON"],
        ),
        "second": put_input(
            folder / "second",
            [song(2, title="Renamed"), song(4), song(10, artist_id="AR2"), "[]"],
            [play(26, 4, level="paid"), play(9, 10, ts=DEC_1)],
        ),
    }
    lake, kept = folder / "lake", {}
    before: Path | None = None
    old: Rows | None = None
    for name, place in inputs.items():
        command = [sys.executable, "-c", SAVING, str(folder / f"staged {name}"), "--engine", "sail"]
        command += ["--max-rejects", "1", "--input", str(place), "--output", str(lake)]
        env = path_env(PYTHONPATH=str(HOME))
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=120)
        assert run.returncode == 0, run.stderr
        (folder / f"staged {name}" / "staging" / "tables" / "songs" / "_SUCCESS").touch()  # as Spark would
        new = {table: rows for table in etl.TABLES if (rows := read_table(lake, table)) is not None}
        assert all(new[table] != old[table] for table in etl.TABLES if old), "each table tells old from new"
        kept[name] = Lake(place, folder / f"staged {name}", before, old, new)
        before, old = Path(shutil.copytree(lake, folder / f"lake after {name}")), new
    return kept


READ: dict[tuple[str, tuple[tuple[str, int], ...]], list[tuple[Any, ...]]] = {}  # file names are unique to a run


def read_table(lake: Path, name: str) -> list[tuple[Any, ...]] | None:
    """A table as DuckDB reads it, None where its folder is missing."""
    if not (lake / name).is_dir():
        return None
    files = tuple(
        (str(path.relative_to(lake)), path.stat().st_size) for path in sorted((lake / name).rglob("*.parquet"))
    )
    if (name, files) not in READ:
        with duckdb.connect() as database:
            glob = f"{lake / name}/**/*.parquet".replace("'", "''")
            query = f"SELECT * FROM read_parquet('{glob}', hive_partitioning = true) ORDER BY ALL"
            READ[name, files] = database.execute(query).fetchall()
    return READ[name, files]


# Other people's files and folders in the old lake: empty ones, in folders that go, and links out of it.
FOREIGN_FILES = (
    "notes.txt",
    "mine/deep.csv",
    "_staging/mine.txt",
    "users/READ ME.md",
    "artists/deep/er/x.csv",
    "songs/year=2001/mine",
    "songs/.hidden",
    "_runs/mine.json",
    "_rejects/mine.txt",
)
FOREIGN_FOLDERS = ("empty", "users/empty", "songs/year=2001/empty/er")
FOREIGN_LINKS = ("link", "users/link", "time/year=2018/link")


def make_lake(lake: Lake, folder: Path) -> Path:
    """The lake before the run, in a new folder, with other people's files in it."""
    output = folder / "lake"
    if lake.before is None:
        return output
    shutil.copytree(lake.before, output)
    for path in FOREIGN_FILES:
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (output / path).write_text(path)
    for path in FOREIGN_FOLDERS:
        (output / path).mkdir(parents=True)
    (folder / "outside").mkdir()
    (folder / "outside" / "kept.txt").write_text("kept")
    for path in FOREIGN_LINKS:
        (output / path).symlink_to(folder / "outside")
    return output


def fates(lake: Lake, output: Path) -> dict[str, str]:
    """Each table's rows: old, new, or neither."""
    found = {}
    for name in etl.TABLES:
        rows = read_table(output, name)
        is_old = rows == (lake.old[name] if lake.old else None)
        found[name] = "new" if rows == lake.new[name] else "old" if is_old else "missing" if rows is None else "neither"
    return found


def is_committed(lake: Lake, output: Path) -> bool:
    """Is there a journal, or is the record of the last published run a new one?"""
    now, before = ((place / "_runs" / "latest.json") if place else None for place in (output, lake.before))
    new = now is not None and now.exists() and (before is None or now.read_bytes() != before.read_bytes())
    return new or (output / "_staging" / "journal.json").exists()


def assert_in_order(lake: Lake, output: Path, fate: str) -> None:
    """Every table has this fate, nothing is left over, what is not the job's is there."""
    assert set(fates(lake, output).values()) == {fate}, fates(lake, output)
    found = tree(output) if output.exists() else {}
    foreign: set[str] = set()
    if lake.before:
        foreign = {part for path in (*FOREIGN_FILES, *FOREIGN_FOLDERS, *FOREIGN_LINKS) for part in upwards(path)}
        assert {path: found.get(path) for path in FOREIGN_FILES} == {path: path.encode() for path in FOREIGN_FILES}
        assert {path: found.get(path, "gone") for path in FOREIGN_FOLDERS} == dict.fromkeys(FOREIGN_FOLDERS)
        outside = output.parent / "outside"
        assert {path: found.get(path) for path in FOREIGN_LINKS} == dict.fromkeys(FOREIGN_LINKS, f"-> {outside}")
        assert tree(outside) == {"kept.txt": b"kept"}
    runs = {path.split("/")[1].removesuffix(".json") for path in found if re.match(r"_runs/2.*\.json$", path)}
    files = listed(output) if "_runs/latest.json" in found else {}
    assert there(output) == files
    expected = {part for path in files for part in upwards(path)} | {"_runs", "_runs/latest.json", "_rejects"}
    expected |= {f"_runs/{run}.json" for run in runs} | foreign
    rejects = {path for path in found if path.startswith("_rejects/") and path.split("/")[1] in runs}
    assert found.keys() - expected - rejects == set(), "nothing is left over"
    assert all(path.endswith(".parquet") for path in rejects if path.count("/") > 1)
    if files:
        assert latest(output)["run"] in runs
        assert any(path.startswith(f"_rejects/{latest(output)['run']}/") for path in rejects)


def upwards(path: str) -> list[str]:
    """A path and the folders above it."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def some(steps: int, most: int, seed: int = 7) -> list[int]:
    """The numbers of the operations to test: all, or a sample."""
    every = range(1, steps + 1)
    return list(every) if FULL else sorted(random.Random(seed).sample(every, min(steps, most)))


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------

# The last is for systems without an exchange of folders: there, a table is missing for a moment.
SCENES = {"a first run": ("first", True), "a second run": ("second", True), "two renames": ("second", False)}


@pytest.mark.parametrize("scene", SCENES)
def test_a_run_killed_at_any_operation_leaves_every_table_old_or_new_and_the_next_run_mends_it(
    scene: str, lakes: dict[str, Lake], replayed: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake, swaps = lakes[SCENES[scene][0]], SCENES[scene][1]
    (tmp_path / "whole").mkdir()
    output = make_lake(lake, tmp_path / "whole")
    whole = replayed(lake, output, exchange=swaps)
    assert whole.code == 0, whole.told
    assert_in_order(lake, output, "new")

    writes = [at for at, step in enumerate(whole.steps, start=1) if step.startswith("open")]
    points = sorted([*((at, "kill") for at in some(len(whole.steps), 36)), *((at, "tear") for at in writes)])
    was_committed = False
    for at, how in points:
        folder = tmp_path / str(at)
        folder.mkdir()
        output = make_lake(lake, folder)
        killed = replayed(lake, output, how=how, at=at, exchange=swaps)
        assert killed.code == (9 if how == "kill" else -signal.SIGXFSZ), killed.told
        committed, found = is_committed(lake, output), fates(lake, output)
        assert committed or not was_committed, "there is one commit point"
        was_committed = committed
        allowed = {"old", "new"} if committed else {"old"}
        assert set(found.values()) <= allowed | ({"missing"} if not swaps else set()), (whole.steps[at - 1], found)
        after = replayed(lake, output, refused=True, exchange=swaps)
        assert (after.code, complaint(after.told)) == (3, "refused"), whole.steps[at - 1]
        assert_in_order(lake, output, "new" if committed else "old")
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{scene}: killed at {len(points)} of {len(whole.steps) + len(writes)} points")


@pytest.mark.parametrize("scene", SCENES)
def test_a_recovery_killed_at_any_operation_is_finished_by_the_next_run(
    scene: str, lakes: dict[str, Lake], replayed: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake, swaps = lakes[SCENES[scene][0]], SCENES[scene][1]
    (tmp_path / "whole").mkdir()
    steps = replayed(lake, make_lake(lake, tmp_path / "whole"), exchange=swaps).steps
    commit = next(at for at, step in enumerate(steps, start=1) if step.startswith("exchange") or "fsync" in step)
    firsts = range(commit, len(steps) + 1)
    kills, states, seen, mended = 0, 0, set(), set()
    for first in firsts if FULL else random.Random(11).sample(firsts, 4):
        folder, again = tmp_path / str(first), tmp_path / "again" / "lake"
        folder.mkdir()
        output = make_lake(lake, folder)
        replayed(lake, output, how="kill", at=first, exchange=swaps)
        fate = "new" if is_committed(lake, output) else "old"
        if shape(lake, output) in seen:  # the operation before changed nothing
            continue
        seen.add(shape(lake, output))
        states += 1
        copy(folder, again.parent)
        recovery = replayed(lake, again, refused=True, exchange=swaps)
        assert_in_order(lake, again, fate)
        for second in some(len(recovery.steps), 12, seed=first):
            copy(folder, again.parent)
            assert replayed(lake, again, refused=True, how="kill", at=second, exchange=swaps).code == 9
            kills += 1
            if shape(lake, again) not in mended:
                mended.add(shape(lake, again))
                allowed = {"old", fate} | ({"missing"} if not swaps else set())
                assert set(fates(lake, again).values()) <= allowed, (steps[first - 1], recovery.steps[second - 1])
                replayed(lake, again, refused=True, exchange=swaps)
                assert_in_order(lake, again, fate)
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\nthe recovery of {scene}: killed {kills} times, after {states} kills of the run")


def shape(lake: Lake, output: Path) -> tuple[object, ...]:
    """What tells one state of an output from another, but for the names of the replayed runs."""
    paths = sorted(re.sub(r"\d{8}T\d{6}Z-\w{6}", "RUN", path) for path in tree(output))
    record = output / "_runs" / "latest.json"
    is_old = lake.before is not None and record.read_bytes() == (lake.before / "_runs" / "latest.json").read_bytes()
    return is_committed(lake, output), is_old, *paths


def copy(folder: Path, to: Path) -> None:
    """Copy a lake and the folder outside it, to which the copy's links lead."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, symlinks=True)
    for path in to.rglob("*link"):
        path.unlink()
        path.symlink_to(to / "outside")


def test_whole_runs_killed_at_random_moments_do_no_harm(lakes: dict[str, Lake], tmp_path: Path) -> None:
    """As kill -9 does: the first runs on an empty output, the next with the other input, and so on."""
    chance, output = random.Random(5), tmp_path / "lake"
    good = {name: lakes[name].new for name in lakes}
    for turn in range(20 if FULL else 4):
        name = ("first", "second")[turn % 2]
        command = [sys.executable, str(HOME / "etl.py"), "--input", str(lakes[name].input), "--output", str(output)]
        command += ["--max-rejects", "1", "--engine", "sail"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=path_env()) as run:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(chance.uniform(0.4, 2.5))
            run.kill()
        for table in etl.TABLES:
            rows = read_table(output, table)
            assert rows is None or rows in (good["first"][table], good["second"][table])
    plain = run_etl("--input", lakes["second"].input, "--output", output, "--max-rejects", 1)
    assert plain.returncode == 0, plain.stderr
    assert {table: read_table(output, table) for table in etl.TABLES} == good["second"]
    assert {path.name for path in output.iterdir()} == {*etl.TABLES, "_runs", "_rejects"}
    assert there(output) == listed(output)


# ---------------------------------------------------------------------------------------------------------------------
# Operations that fail
# ---------------------------------------------------------------------------------------------------------------------

FAULTS = {"no space": errno.ENOSPC, "not permitted": errno.EACCES, "gone": errno.ENOENT, "read-only": errno.EROFS}


def assert_one_line(run: Replayed) -> None:
    """Exit code 2 and one clear line, or 0."""
    assert "Traceback" not in run.told, run.told
    assert run.code in (0, 2), run.told
    if run.code == 2:
        told = re.sub(r"(?s)^run .*?^seconds: [^\n]*\n", "", run.told, flags=re.M)  # a failed run's report
        assert len(complaint(told)) < 400, told


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_of_which_any_operation_fails_says_so_in_one_line_and_the_next_run_mends_it(
    fault: str, lasting: bool, lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    lake = lakes["second"]
    (tmp_path / "whole").mkdir()
    reads = FAULTS[fault] == errno.EACCES
    steps = replayed(lake, make_lake(lake, tmp_path / "whole"), reads=reads).steps
    for at in some(len(steps), 12, seed=FAULTS[fault]):
        folder = tmp_path / str(at)
        folder.mkdir()
        output = make_lake(lake, folder)
        failed = replayed(lake, output, how="raise", number=FAULTS[fault], at=at, lasting=lasting, reads=reads)
        assert_one_line(failed)
        assert set(fates(lake, output).values()) <= {"old", "new"}, steps[at - 1]
        committed = is_committed(lake, output)
        assert failed.code == 2 or committed, steps[at - 1]
        assert replayed(lake, output, refused=True).code == 3
        assert_in_order(lake, output, "new" if committed else "old")
        shutil.rmtree(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, free: int) -> None:
    """Leave so many bytes free."""
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while filler.write(b"x" * 4096):
            pass
    with open(disk / "filler", "r+b") as filler:
        filler.truncate(max(0, filler.seek(0, os.SEEK_END) - free))


def test_a_full_disk_is_told_in_one_line_and_leaves_the_old_lake_whole(
    lakes: dict[str, Lake], small_disk: Path, replayed: Run
) -> None:
    """However much is free: every page from none to enough."""
    lake, codes = lakes["second"], []
    for pages in range(0, 120, 1 if FULL else 3):
        output = Path(shutil.copytree(cast("Path", lake.before), small_disk / "lake"))
        fill(small_disk, pages * 4096)
        run = replayed(lake, output)
        assert_one_line(run)
        assert run.code == 0 or "No space left on device" in run.told
        codes.append(run.code)
        committed, found = is_committed(lake, output), fates(lake, output)
        assert set(found.values()) <= ({"old", "new"} if committed else {"old"})
        (small_disk / "filler").unlink()
        assert replayed(lake, output, refused=committed).code == (3 if committed else 0)
        assert set(fates(lake, output).values()) == {"new"}
        assert {path.name for path in output.iterdir()} == {*etl.TABLES, "_runs", "_rejects"}
        shutil.rmtree(output)
    assert codes[0] == 2
    assert codes[-1] == 0
    assert codes == sorted(codes, reverse=True), "from some size on it is enough"


def test_a_disk_that_fills_up_in_the_engines_hands_is_told_in_one_line(
    lakes: dict[str, Lake], small_disk: Path
) -> None:
    lake = lakes["second"]
    output = Path(shutil.copytree(cast("Path", lake.before), small_disk / "lake"))
    fill(small_disk, 8 * 4096)
    before = tree(output)
    run = run_etl("--input", lake.input, "--output", output, "--max-rejects", 1)
    assert run.returncode == 2, run.stderr
    assert "No space left on device" in complaint(run.stderr)
    assert {path: content for path, content in tree(output).items() if path in before} == before
    assert not (output / "_staging").exists(), "what fills the disk is removed"
    (small_disk / "filler").unlink()
    assert run_etl("--input", lake.input, "--output", output, "--max-rejects", 1).returncode == 0
    assert set(fates(lake, output).values()) == {"new"}


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that an unprivileged user may enter; the tests' own is its owner's only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


LOCKED_UP = {  # what may not be written, below the output
    "the output": [""],
    "all of it": ["", "users", "songs", "songs/year=2001", "songs/year=2002", "_runs", "_rejects"],
    "the records": ["_runs"],
    "a table": ["users"],
}


def copied(lake: Lake, public: Path) -> tuple[Lake, Path]:
    """The lake with its input and staging, and an output as it was before, where another user may see them."""
    here = lake._replace(
        input=Path(shutil.copytree(lake.input, public / "input")),
        staged=Path(shutil.copytree(lake.staged, public / "staged")),
    )
    return here, Path(shutil.copytree(cast("Path", lake.before), public / "lake"))


@pytest.mark.parametrize("what", LOCKED_UP)
def test_an_output_that_may_not_be_written_is_told_in_one_line_and_left_whole(
    what: str, lakes: dict[str, Lake], replayed: Run, public: Path
) -> None:
    if os.getuid():
        pytest.skip("only root can become another user")
    lake = lakes["second"]
    here, output = copied(lake, public)
    for path in (public, *public.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o755 if path.is_dir() else 0o644)
    for locked in LOCKED_UP[what]:
        (output / locked).chmod(0o555)
    run = replayed(here, output, user=NOBODY)
    assert_one_line(run)
    assert run.code == 2 or what == "a table"  # the folder as a whole changes places all the same
    committed, found = is_committed(lake, output), fates(lake, output)
    assert set(found.values()) <= ({"old", "new"} if committed else {"old"})
    assert not run.code or "Permission denied" in run.told
    for path in (output, *output.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    assert replayed(here, output, user=NOBODY, refused=committed).code == (3 if committed else 0)
    assert set(fates(lake, output).values()) == {"new"}
    assert {path.name for path in output.iterdir()} == {*etl.TABLES, "_runs", "_rejects"}


def test_an_output_that_cannot_be_made_is_told_in_one_line(lakes: dict[str, Lake], replayed: Run, public: Path) -> None:
    if os.getuid():
        pytest.skip("only root can become another user")
    here = lakes["first"]._replace(input=Path(shutil.copytree(lakes["first"].input, public / "input")))
    run = replayed(here, public / "no" / "lake", user=NOBODY)
    assert (run.code, complaint(run.told)) == (
        2,
        f"{public / 'no'}: Permission denied; every table is whole, old or new",
    )


def test_an_output_that_vanishes_is_told_in_one_line(lakes: dict[str, Lake], replayed: Run, tmp_path: Path) -> None:
    lake = lakes["second"]
    output = make_lake(lake, tmp_path)
    run = replayed(lake, output, vanish=True)
    assert_one_line(run)
    assert run.code == 2
    assert "No such file or directory" in run.told


# ---------------------------------------------------------------------------------------------------------------------
# Locks
# ---------------------------------------------------------------------------------------------------------------------

# Starts together, whatever time the imports take.
WAITING = "import sys, etl; print('ready', flush=True); sys.stdin.readline(); sys.exit(etl.main())"
HELD = r"held by (run (\S+) on (\S+) since (\S+)|a run that has just begun); try again when it has ended"


def started(*args: object, code: str = "") -> subprocess.Popen[str]:
    """python etl.py, or other code, left running."""
    command = [sys.executable, *(["-c", code] if code else [str(HOME / "etl.py")]), *map(str, args)]
    pipe = subprocess.PIPE
    env = path_env(PYTHONPATH=str(HOME))
    return subprocess.Popen([*command, "--engine", "sail"], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)


def wait_for(folder: Path, pattern: str, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline
        assert run.poll() is None, f"ended before {pattern} was there"
        time.sleep(0.005)


def is_free(output: Path) -> bool:
    handle = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


@pytest.mark.parametrize("rivals", [2, 4])
def test_of_runs_that_start_together_one_publishes_and_the_others_exit_4(rivals: int, tmp_path: Path) -> None:
    output = tmp_path / "lake"
    inputs = [put_one(tmp_path / f"input {number}", number) for number in range(1, rivals + 1)]
    runs = [started("--input", place, "--output", output, code=WAITING) for place in inputs]
    for run in runs:
        assert run.stdout
        assert run.stdin
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        print(file=run.stdin, flush=True)
    told = [run.communicate(timeout=60)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0] + [4] * (rivals - 1), told
    (winner,) = records(output)
    assert rows_seen(output) == rows_of_one(codes.index(0) + 1)
    assert there(output) == listed(output)
    assert winner["input"] == str(inputs[codes.index(0)])
    assert {path.name for path in output.iterdir()} == {*etl.TABLES, "_runs"}, "the losers write nothing"
    for words in (words for words, code in zip(told, codes) if code):
        assert "start engine" not in words, "within seconds"
        held = re.fullmatch(re.escape(f"{output}: ") + HELD, complaint(words))
        assert held, words
        assert held[2] in (None, winner["run"])


def test_a_run_that_finds_another_names_it_and_writes_nothing_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    output, one, other = tmp_path / "lake", put_one(tmp_path / "one", 1), put_one(tmp_path / "other", 2)
    assert run_etl("--input", one, "--output", output).returncode == 0
    with started("--input", other, "--output", output) as holder:
        try:
            wait_for(output, "_staging/owner.json", holder)
            holder.send_signal(signal.SIGSTOP)
            before = tree(output)
            begin = time.monotonic()
            loser = run_etl("--input", one, "--output", output)
            assert time.monotonic() - begin < 10
            owner = json.loads((output / "_staging" / "owner.json").read_text())
            who = f"run {owner['run']} on {socket.gethostname()} since {owner['since']}"
            assert owner["run"] not in {record["run"] for record in records(output)}
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", owner["since"])
            assert (loser.returncode, loser.stdout) == (4, "")
            assert complaint(loser.stderr) == f"{output}: held by {who}; try again when it has ended"
            assert tree(output) == before
            assert rows_seen(output) == rows_of_one(1), "reading needs no lock"
        finally:
            holder.kill()
    after = run_etl("--input", other, "--output", output)
    assert after.returncode == 0, after.stderr
    assert rows_seen(output) == rows_of_one(2)
    assert {path.name for path in output.iterdir()} == {*etl.TABLES, "_runs"}


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------

MOMENTS = ("_staging/owner.json", "_staging/*/log", "_staging/*/tables/time")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_soon_with_one_line_and_nothing_left(
    number: signal.Signals, moment: str, lakes: dict[str, Lake], tmp_path: Path
) -> None:
    lake, output = lakes["second"], tmp_path / "lake"
    shutil.copytree(cast("Path", lake.before), output)
    before = tree(output)
    with started("--input", lake.input, "--output", output, "--max-rejects", 1) as run:
        try:
            wait_for(output, moment, run)
            begin = time.monotonic()
            run.send_signal(number)
            _, told = run.communicate(timeout=60)
        finally:
            run.kill()
    assert time.monotonic() - begin < 10
    assert "Traceback" not in told
    assert run.returncode == SIGNALS[number], told
    assert complaint(told) == f"interrupted by {number.name}; every table is whole, old or new"
    assert is_free(output)
    (record,) = (record for record in records(output) if f"_runs/{record['run']}.json" not in before)
    assert (record["status"], record["error"]) == ("failed", complaint(told))
    after = tree(output)
    mine = {f"_runs/{record['run']}.json", *(path for path in after if path.startswith(f"_rejects/{record['run']}"))}
    assert {path: content for path, content in after.items() if path not in mine} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_at_any_operation_finds_every_table_old_or_new(
    number: signal.Signals, lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    """A run that is about to be committed is finished sooner than given up."""
    lake = lakes["second"]
    (tmp_path / "whole").mkdir()
    steps = replayed(lake, make_lake(lake, tmp_path / "whole")).steps
    for at in some(len(steps), 20, seed=number):
        folder = tmp_path / str(at)
        folder.mkdir()
        output = make_lake(lake, folder)
        run = replayed(lake, output, how="signal", number=number, at=at)
        committed = is_committed(lake, output)
        assert run.code in ((0, SIGNALS[number]) if committed else (SIGNALS[number],)), (steps[at - 1], run.told)
        assert "Traceback" not in run.told
        assert_in_order(lake, output, "new" if committed else "old")
        assert {record["status"] for record in records(output) if record["run"] == latest(output)["run"]} == {
            "published"
        }
        shutil.rmtree(folder)


def test_an_engine_that_a_signal_has_left_unable_to_stop_does_not_hold_up_the_end(
    lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    """One in fifty signals meets PySpark's client while it holds a lock of gRPC; then its stop() waits for ever."""
    lake = lakes["second"]
    (tmp_path / "whole").mkdir()
    steps = replayed(lake, make_lake(lake, tmp_path / "whole")).steps
    at = next(number for number, step in enumerate(steps, start=1) if step.endswith("_SUCCESS"))
    output, begin = make_lake(lake, tmp_path), time.monotonic()
    run = replayed(lake, output, how="signal", number=signal.SIGTERM, at=at, hang=True)
    assert time.monotonic() - begin < 10
    assert run.code == 143
    assert run.told.splitlines()[-1:] == ["etl.py: interrupted by SIGTERM; every table is whole, old or new"]
    assert_in_order(lake, output, "old")


# ---------------------------------------------------------------------------------------------------------------------
# What is not the job's
# ---------------------------------------------------------------------------------------------------------------------


def test_other_peoples_files_stay_and_those_in_a_tables_folder_are_named(
    lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    """Which files: FOREIGN_FILES, FOREIGN_FOLDERS and FOREIGN_LINKS; each kill and fault finds them in its place."""
    lake = lakes["second"]
    output = make_lake(lake, tmp_path)
    run = replayed(lake, output)
    assert run.code == 0, run.told
    assert_in_order(lake, output, "new")
    inside = [path for path in (*FOREIGN_FILES, *FOREIGN_LINKS) if path.split("/")[0] in etl.TABLES]
    assert sorted(latest(output)["foreign"]) == sorted(inside)
    told = [line.partition("left as it is: ")[2] for line in run.told.splitlines() if line.startswith("not this job's")]
    assert len(told) == 5
    assert set(told) <= set(inside)


def test_a_file_where_the_new_table_needs_a_folder_stays_and_so_does_the_table(
    lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    """Somebody's file is called songs/year=2010, as a folder of the second run's is."""
    lake, output = lakes["second"], tmp_path / "lake"
    shutil.copytree(cast("Path", lake.before), output)
    (output / "songs" / "year=2010").write_text("mine")
    run = replayed(lake, output)
    assert_one_line(run)
    assert set(fates(lake, output).values()) <= {"old", "new"}
    replayed(lake, output, refused=True)
    assert any(content == b"mine" for content in tree(output).values())
    assert "_staging" not in tree(output)


@pytest.mark.parametrize("path", ["songs/year=2001", "songs/year=2002"], ids=["one that goes", "one that stays"])
def test_a_link_in_the_place_of_a_tables_inner_folder_is_not_followed(
    path: str, lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    """Somebody moved a folder of the table to another disk and linked it."""
    lake, output = lakes["second"], tmp_path / "lake"
    shutil.copytree(cast("Path", lake.before), output)
    (output / path).rename(tmp_path / "outside")
    (output / path).symlink_to(tmp_path / "outside")
    before = tree(tmp_path / "outside")
    for refused in (False, True):
        assert replayed(lake, output, refused=refused).code in (0, 2, 3)
        assert tree(tmp_path / "outside") == before
    assert (output / path).is_symlink()
    assert "_staging" not in tree(output), "no run waits for it for ever"


def test_files_beside_the_records_that_only_look_like_a_runs_stay(
    lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    """Also where they look like those of a run that is no longer kept; nor do they count as runs."""
    lake, output = lakes["second"], tmp_path / "lake"
    shutil.copytree(cast("Path", lake.before), output)
    run, new, dead = latest(output)["run"], "29991231T235959Z-abcdef", "20000101T000000Z-abcdef"
    mine = [f"_rejects/{name} looked at/part.parquet" for name in (run, new, dead)]
    mine += [f"_runs/{name}{end}" for name in (new, dead) for end in (".json.bak", ".txt", " copy.json")]
    mine += [f"_runs/{new}.{number}" for number in range(30)]
    for path in mine:
        with_file(output, path)
    assert replayed(lake, output).code == 0
    assert set(mine) <= tree(output).keys()
    assert f"_runs/{run}.json" in tree(output), "the second newest run"


def touch_table(output: Path) -> Path:
    (output / "users").mkdir(parents=True)
    (output / "users" / "part.parquet").write_text("somebody's")
    return output


def with_file(output: Path, path: str) -> Path:
    (output / path).parent.mkdir(parents=True, exist_ok=True)
    (output / path).write_text("somebody's")
    return output


def with_link(output: Path, path: str, to: str = "../elsewhere") -> Path:
    (output / to).mkdir(parents=True, exist_ok=True)
    (output / path).symlink_to(to)
    return output


AROUND = "the output must be neither the input, nor inside it, nor around it"
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {  # makes the output from a folder with `input` in it
    "a file": (lambda folder: with_file(folder, "lake") / "lake", "lake: the output is a file, not a folder"),
    "below a file": (lambda folder: with_file(folder, "lake") / "lake" / "in", "Not a directory"),
    "the input": (lambda folder: folder / "input", AROUND),
    "the input by another name": (lambda folder: folder / "input" / ".." / "input", AROUND),
    "inside the input": (lambda folder: folder / "input" / "lake", AROUND),
    "in the input's song_data": (lambda folder: folder / "input" / "song_data" / "lake", AROUND),
    "around the input": (lambda folder: folder, AROUND),
    "a link to the input": (lambda folder: with_link(folder, "lake", "input") / "lake", AROUND),
    "a link into the input": (lambda folder: with_link(folder, "lake", "input/log_data") / "lake" / "in", AROUND),
    "with a table of unknown origin": (lambda folder: touch_table(folder / "lake"), "users: not written by this job"),
    "with a file named like a table": (lambda folder: with_file(folder / "lake", "time"), "time: not written by this"),
    "with a link for a table": (lambda folder: with_link(folder / "lake", "songs"), "songs: a link"),
    "with a link for _runs": (lambda folder: with_link(folder / "lake", "_runs"), "_runs: a link"),
    "with a link for _staging": (lambda folder: with_link(folder / "lake", "_staging"), "_staging: a link"),
    "with a link for _rejects": (lambda folder: with_link(folder / "lake", "_rejects"), "_rejects: a link"),
    "with a damaged journal": (
        lambda folder: with_file(folder / "lake", "_staging/journal.json"),
        "journal.json: damaged",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_output_that_the_run_could_damage_is_refused_and_nothing_changes(
    what: str, lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    lake = lakes["first"]._replace(input=Path(shutil.copytree(lakes["first"].input, tmp_path / "input")))
    output = REFUSED[what][0](tmp_path)
    before = tree(tmp_path)
    run = replayed(lake, output)
    assert run.code == 2, run.told
    assert REFUSED[what][1] in complaint(run.told)
    assert tree(tmp_path) == before


def test_a_damaged_record_is_told_in_one_line_and_the_lake_stays(
    lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    lake, output = lakes["second"], tmp_path / "lake"
    shutil.copytree(cast("Path", lake.before), output)
    (output / "_runs" / "latest.json").write_text('{"format"')
    before = tree(output)
    run = replayed(lake, output)
    told = f"{output}/_runs/latest.json: damaged, or not written by this job; move it away"
    assert (run.code, complaint(run.told)) == (2, told)
    assert {path: content for path, content in tree(output).items() if path in before} == before


def test_a_table_that_somebody_replaced_by_a_file_is_not_deleted(
    lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    lake, output = lakes["second"], tmp_path / "lake"
    shutil.copytree(cast("Path", lake.before), output)
    shutil.rmtree(output / "users")
    (output / "users").write_text("somebody's")
    run = replayed(lake, output)
    assert_one_line(run)
    assert b"somebody's" in tree(output).values()


def test_a_folder_in_a_table_that_may_not_be_read_is_told_in_one_line_before_anything_is_published(
    lakes: dict[str, Lake], replayed: Run, public: Path
) -> None:
    if os.getuid():
        pytest.skip("only root can become another user")
    lake = lakes["second"]
    here, output = copied(lake, public)
    (output / "users" / "private").mkdir()
    (output / "users" / "private" / "file").write_text("somebody's")
    for path in (public, *public.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o755 if path.is_dir() else 0o644)
    os.chown(output / "users" / "private", 0, 0)
    (output / "users" / "private").chmod(0o700)
    run = replayed(here, output, user=NOBODY)
    assert_one_line(run)
    assert run.code == 2
    assert (output / "users" / "private" / "file").read_text() == "somebody's"
    assert set(fates(lake, output).values()) == {"old"}


def test_an_output_that_is_a_link_to_a_folder_is_written_there(
    lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "lake").symlink_to(tmp_path / "real")
    assert replayed(lakes["first"], tmp_path / "lake").code == 0
    assert_in_order(lakes["first"], tmp_path / "real", "new")


# ---------------------------------------------------------------------------------------------------------------------
# Records and the report
# ---------------------------------------------------------------------------------------------------------------------

RECORD = {
    *("format", "run", "status", "error", "started", "version", "engine", "input", "output", "settings", "inputs"),
    *("rejects", "tables", "audit", "ignored", "foreign", "seconds", "matched", "levels"),
}


def test_a_published_runs_record_lists_all_data_files_and_its_query_runs_as_printed(
    engine_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Spark, its markers and checksums are not published."""
    monkeypatch.delenv("SPARK_CONNECT_MODE_ENABLED", raising=False)  # which this process's own sessions set
    odd = tmp_path / "it's [a] lake? *"
    place = put_input(tmp_path / "input", [song(1), song(2)], [play(8, 1), play(9, 9, level="paid"), "no JSON"])
    run = run_etl("--input", place, "--output", odd, "--max-rejects", 0.5, engine=engine_name)
    assert run.returncode == 0, run.stderr
    (record,) = records(odd)
    assert record == latest(odd)
    assert set(record) == RECORD
    assert (record["format"], record["status"], record["error"]) == (1, "published", None)
    assert (record["version"], record["engine"].split()[0]) == (etl.VERSION, engine_name)
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", record["run"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["started"])
    assert (record["input"], record["output"]) == (str(place), str(odd))
    assert record["settings"] == {
        "input": str(place), "output": str(odd), "engine": engine_name, "max_rejects": 0.5, "max_shrink": None,
    }  # fmt: skip
    assert record["inputs"]["log"] == {
        "files": 1, "bytes": (place / "log_data" / "lines.json").stat().st_size, "lines": 3, "blank": 0, "accepted": 2,
        "rejected": 1, "plays": 2, "other_pages": 0, "logged_out": 0, "songplays": 2, "repeats": 0,
    }  # fmt: skip
    assert record["rejects"] == [
        {
            "kind": "log", "reason": "not_an_object", "field": None, "lines": 1,
            "source_file": "log_data/lines.json", "example": "no JSON",
        }
    ]  # fmt: skip
    rows = {"songplays": 2, "users": 2, "songs": 2, "artists": 2, "time": 1}
    assert {name: (table["rows"], table["before"]) for name, table in record["tables"].items()} == {
        name: (count, None) for name, count in rows.items()
    }
    assert all(set(table) == {"rows", "before", "files"} for table in record["tables"].values())
    assert all(set(check) == {"table", "rule", "failed", "examples"} for check in record["audit"])
    assert (record["matched"], record["levels"]) == (1, {"free": 1, "paid": 1})
    assert {"start engine", "audit", "build users"} <= record["seconds"].keys()

    # Everything in the output: the files listed, one file of rejects, two of records.
    files = {path.relative_to(odd).as_posix(): path.stat().st_size for path in odd.rglob("*") if path.is_file()}
    data = {path: size for path, size in files.items() if not path.startswith("_")}
    assert data == listed(odd)
    (rejects,) = (path for path in files.keys() - data.keys() if path.startswith("_rejects/"))
    assert re.fullmatch(rf"_rejects/{record['run']}/[^/._][^/]*\.parquet", rejects)
    assert files.keys() - data.keys() - {rejects} == {"_runs/latest.json", f"_runs/{record['run']}.json"}

    query = run.stdout.rstrip().splitlines()[-1]
    with duckdb.connect() as database:
        assert database.execute(query).fetchall() == [("free", 1), ("paid", 1)]


def test_a_failed_runs_record_is_kept_and_is_never_the_latest(lakes: dict[str, Lake], tmp_path: Path) -> None:
    lake, output = lakes["second"], tmp_path / "lake"
    shutil.copytree(cast("Path", lake.before), output)
    before = tree(output)
    run = run_etl("--input", lake.input, "--output", output, "--max-rejects", 0.1)
    told = "1 of 4 song lines were rejected, a share of 0.2500; --max-rejects allows 0.1"
    assert (run.returncode, complaint(run.stderr)) == (3, told)
    (record,) = (record for record in records(output) if f"_runs/{record['run']}.json" not in before)
    assert set(record) == RECORD - {"matched", "levels"}
    assert (record["status"], record["error"], record["tables"]) == ("failed", told, {})
    assert f"run {record['run']}: failed" in run.stdout
    assert "not_an_object: 1, such as '[]' in song_data/lines.json" in run.stdout
    after = tree(output)
    mine = {path for path in after if record["run"] in path}
    assert {path: content for path, content in after.items() if path not in mine} == before
    with duckdb.connect() as database:
        rejects = database.read_parquet(f"{output}/_rejects/{record['run']}/*.parquet").fetchall()
    assert rejects == [("song", "song_data/lines.json", "[]", "not_an_object", None)]


def test_the_newest_thirty_runs_records_and_rejects_are_kept_and_the_latest_in_any_case(
    lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    lake, output = lakes["second"], tmp_path / "lake"
    shutil.copytree(cast("Path", lake.before), output)
    published = latest(output)["run"]
    # Later runs, as many as are kept; all failed.
    others = [f"29991231T2359{second:02}Z-abcdef" for second in range(30)]
    for other in others:
        with_file(output, f"_runs/{other}.json")
        with_file(output, f"_rejects/{other}/part.parquet")

    def kept(folder: str) -> set[str]:
        return {name.split(".")[0] for name in os.listdir(output / folder)} - {"latest"}

    refused = replayed(lake, output, refused=True)
    assert refused.code == 3
    assert {published, *others} <= kept("_runs")
    assert kept("_rejects") == {published, *others}
    assert replayed(lake, output).code == 0
    now = latest(output)["run"]
    assert kept("_runs") == kept("_rejects") == {now, *others}, "older than thirty others, but the latest"


# ---------------------------------------------------------------------------------------------------------------------
# Refused by accounting
# ---------------------------------------------------------------------------------------------------------------------


def test_a_table_that_would_shrink_too_much_stops_the_run_and_a_smaller_one_is_marked(
    lakes: dict[str, Lake], replayed: Run, tmp_path: Path
) -> None:
    lake, output = lakes["second"], tmp_path / "lake"
    shutil.copytree(cast("Path", lake.before), output)
    before = tree(output)
    run = replayed(lake, output, args=["--max-rejects", "1", "--max-shrink", "0.33"])
    assert run.code == 3
    told = "songplays would shrink from 3 to 2 rows; --max-shrink allows 0.33"
    assert run.told.splitlines()[-1] == f"etl.py: {told}"
    (record,) = (record for record in records(output) if f"_runs/{record['run']}.json" not in before)
    assert (record["status"], record["error"]) == ("failed", told)
    after = tree(output)
    assert {path: content for path, content in after.items() if record["run"] not in path} == before
    assert any(path.startswith(f"_rejects/{record['run']}/") for path in after)

    run = replayed(lake, output, args=["--max-rejects", "1", "--max-shrink", "0.34"])
    assert run.code == 0, run.told
    report = run.told.partition("\ntable ")[2].partition("\n\n")[0].splitlines()[1:]
    changes = {name: change for name, _, _, _, change in (line.split(maxsplit=4) for line in report)}
    assert changes == {
        "songplays": "-1 SHRANK", "users": "+0", "songs": "+0", "artists": "-1 SHRANK", "time": "+0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("songs", "plays", "told"),
    [
        (["{}"], [play(8, 1)], "the input holds not one usable song line"),
        ([song(1)], [play(8, 1, page="Home")], "the input holds not one usable play"),
        ([song(1)], [""], "the input holds not one usable play"),
    ],
    ids=["no song", "no play", "blanks"],
)
def test_an_input_without_a_usable_line_is_refused_before_anything_is_published(
    songs: list[object], plays: list[object], told: str, tmp_path: Path
) -> None:
    output = tmp_path / "lake"
    run = run_etl("--input", put_input(tmp_path / "input", songs, plays), "--output", output, "--max-rejects", 1)
    assert (run.returncode, complaint(run.stderr)) == (3, told)
    (record,) = records(output)
    rejects = {"_rejects"} if songs == ["{}"] else set()
    assert {path.name for path in output.iterdir()} == {"_runs"} | rejects
    assert [path.name for path in (output / "_runs").iterdir()] == [f"{record['run']}.json"]


# ---------------------------------------------------------------------------------------------------------------------
# The real month with 200 damaged lines
# ---------------------------------------------------------------------------------------------------------------------

GOOD = json.dumps(play(8, 1))
DAMAGED = [  # ten of each
    (GOOD[:60], "not_an_object", None),
    (f"[{GOOD}]", "not_an_object", None),
    (GOOD + " and more", "not_an_object", None),
    (GOOD.replace('"', "'"), "not_an_object", None),
    (json.dumps(play(8, 1, length=float("nan"))), "not_an_object", None),
    (json.dumps(play(8, 1, ts=2**70)), "not_an_object", None),
    (r'{"page": "NextSong", "song": "\ud800"}', "not_an_object", None),
    ("42", "not_an_object", None),
    (json.dumps({"ts": 1}), "missing", "page"),
    (json.dumps(play(8, 1, ts=None)), "missing", "ts"),
    (json.dumps(play(8, 1, userId="")), "missing", "userId"),
    (json.dumps(play(8, 1, song=None)), "missing", "song"),
    (json.dumps(play(8, 1, ts="yesterday")), "wrong_type", "ts"),
    (json.dumps(play(8, 1, sessionId=True)), "wrong_type", "sessionId"),
    (json.dumps(play(8, 1, length="200.5")), "wrong_type", "length"),
    (json.dumps(play(8, 1, ts=NOV_15 // 1000)), "out_of_domain", "ts"),
    (json.dumps(play(8, 1, userId="-8")), "out_of_domain", "userId"),
    (json.dumps(play(8, 1, level="gold")), "out_of_domain", "level"),
    (json.dumps(play(8, 1, itemInSession=-1)), "out_of_domain", "itemInSession"),
    (json.dumps(play(8, 1, length=-0.5)), "out_of_domain", "length"),
]


def test_200_damaged_lines_in_the_real_month_are_set_aside_with_their_reasons(real_month: Path, tmp_path: Path) -> None:
    clean = run_etl("--input", real_month, "--output", tmp_path / "clean")
    assert clean.returncode == 0, clean.stderr
    place, output = tmp_path / "input", tmp_path / "lake"
    shutil.copytree(real_month, place)
    lines = [line for line, _, _ in DAMAGED for _ in range(10)]
    (place / "log_data" / "damaged.json").write_text("".join(f"{line}\n" for line in lines))

    refused = run_etl("--input", place, "--output", output)
    assert refused.returncode == 3, refused.stderr
    share = complaint(refused.stderr)
    assert re.fullmatch(
        r"200 of [\d,]+ log lines were rejected, a share of 0\.\d{4}; --max-rejects allows 0\.01", share
    )
    assert {path.name for path in output.iterdir()} == {"_runs", "_rejects"}, "nothing is published"

    allowed = run_etl("--input", place, "--output", output, "--max-rejects", "0.05")
    assert allowed.returncode == 0, allowed.stderr
    assert read_lake(output) == read_lake(tmp_path / "clean")
    expected = sorted(
        (("log", "log_data/damaged.json", line, reason, field) for line, reason, field in DAMAGED for _ in range(10)),
        key=repr,
    )
    for record in records(output):
        with duckdb.connect() as database:
            rejects = database.read_parquet(f"{output}/_rejects/{record['run']}/*.parquet").fetchall()
        assert sorted(rejects, key=repr) == expected


if __name__ == "__main__":
    serve()
