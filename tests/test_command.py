"""The command as its users run it: a child process, its exit code, its two streams and the files that it leaves."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pandas
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import pytest
from conftest import HOME, NO_JAVA, java_is_there, path_env, read_lake, start_spark_connect

import etl

ODD = "it's [a] {b} *c? #d%20+e,é k=v"  # shells, URLs, patterns and partitions all take it for something else
PLAY_TS = 1542241826796  # 2018-11-15 00:30:26.796 UTC, a Thursday
SONG_LINE: dict[str, Any] = {
    "num_songs": 1,
    "artist_id": "AR1",
    "artist_latitude": 59.91,
    "artist_longitude": 10.75,
    "artist_location": "Oslo",
    "artist_name": "The Harbour",
    "song_id": "SO1",
    "title": "Slow Tide",
    "duration": 218.93179,
    "year": 2004,
}
LOG_LINE: dict[str, Any] = {
    "artist": "The Harbour",
    "auth": "Logged In",
    "firstName": "Ryan",
    "gender": "M",
    "itemInSession": 0,
    "lastName": "Smith",
    "length": 218.93179,
    "level": "free",
    "location": "San Jose-Sunnyvale-Santa Clara, CA",
    "method": "PUT",
    "page": "NextSong",
    "registration": 1541016707796.0,
    "sessionId": 583,
    "song": "Slow Tide",
    "status": 200,
    "ts": PLAY_TS,
    "userAgent": '"Mozilla/5.0"',
    "userId": "26",
}
TWO_SONGS: tuple[dict[str, Any], ...] = (
    {},
    {"song_id": "SO2", "artist_id": "AR2", "title": "Étude №2", "artist_name": "Noor", "year": 0},
)
# The second is paid and an hour later, the third unknown to the catalogue and a month later; the last is no play.
THREE_PLAYS: tuple[dict[str, Any], ...] = (
    {},
    {"itemInSession": 1, "ts": PLAY_TS + 3_600_000, "level": "paid"},
    {"userId": "7", "firstName": "Ida", "ts": PLAY_TS + 30 * 86_400_000, "song": "Неизвестная"},
    {"userId": "7", "page": "Home", "itemInSession": 1, "song": None, "artist": None, "length": None},
)


def write_input(
    folder: Path, songs: Sequence[Mapping[str, Any]] = ({},), plays: Sequence[Mapping[str, Any]] = ({},)
) -> Path:
    """A file a song and one file of log lines; each dict is a change to the default line."""
    for number, change in enumerate(songs):
        path = folder / "song_data" / "A" / f"TR{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**SONG_LINE, **change}))
    log = folder / "log_data" / "2018" / "11" / "2018-11-15-events.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("\n".join(json.dumps({**LOG_LINE, **change}) for change in plays))
    return folder


def plain_env(**extra: str) -> dict[str, str]:
    """This environment, without what chooses an engine."""
    chosen_elsewhere = ("SPARK_REMOTE", "PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET")
    return {key: value for key, value in path_env(**extra).items() if key in extra or key not in chosen_elsewhere}


def run(
    *args: object, env: Mapping[str, str] | None = None, script: Path = HOME / "etl.py", timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, args)]
    full = plain_env() if env is None else dict(env)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=full, timeout=timeout)


def split_steps(stderr: str) -> tuple[list[str], list[str]]:
    """The names of the steps that stderr tells with their seconds, and its other lines."""
    lines = stderr.splitlines()
    steps = [re.fullmatch(r"(\S.*?) +\d+\.\d s", line) for line in lines]
    return [step[1] for step in steps if step], [line for line, step in zip(lines, steps) if not step]


def refusal(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line with which a run was refused."""
    _, others = split_steps(done.stderr)
    assert done.returncode == code, done.stderr
    assert len(others) == 1, done.stderr
    assert others[0].startswith("etl.py: ")
    assert done.stdout == ""
    return others[0]


@pytest.fixture
def small_input(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in")


@pytest.fixture(scope="session")
def needs_spark(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--engine") == "sail":
        pytest.skip("asked for Sail only")
    if not java_is_there():
        pytest.skip(NO_JAVA)


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def test_help_names_every_flag_and_exit_code() -> None:
    done = run("--help", env=plain_env(COLUMNS="80"))
    assert (done.returncode, done.stderr) == (0, "")
    flags = ["--help", "--config", "--input", "--output", "--engine", "--max-rejects", "--max-shrink", "--version"]
    assert set(flags) == set(re.findall(r"--[a-z-]+", done.stdout))
    assert "{auto,sail,spark}" in done.stdout
    codes = done.stdout.partition("exit codes:")[2]
    assert re.findall(r"\b\d+\b", codes) == ["0", "1", "2", "3", "4", "130", "143"]


def test_help_fits_a_terminal_of_80_columns() -> None:
    lines = run("--help", env=plain_env(COLUMNS="80")).stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []


def test_version_is_the_scripts() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"etl.py {etl.VERSION}\n", "")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--colour", "red"], "--colour"),
        (["data"], "data"),
        (["--inp", "data"], "--inp"),
        (["--eng=sail"], "--eng"),
        (["--max-reject", "0"], "--max-reject"),
        (["--engine", "flink"], "flink"),
        (["--engine"], "--engine"),
        (["--config"], "--config"),
        (["--max-rejects", "half"], "max-rejects"),
        (["--max-shrink", "2"], "max-shrink"),
    ],
)
def test_a_wrong_flag_is_one_line(args: list[str], told: str) -> None:
    assert told in refusal(run(*args))


@pytest.mark.parametrize("name", ["missing.cfg", "folder", "binary"])
def test_a_config_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert str(tmp_path / name) in refusal(run("--config", tmp_path / name))


# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--input", "--output"])
@pytest.mark.parametrize("scheme", ["https", "file", "s3n"])
def test_other_schemes_than_s3_are_refused(tmp_path: Path, small_input: Path, flag: str, scheme: str) -> None:
    places = {"--input": str(small_input), "--output": str(tmp_path / "out"), flag: f"{scheme}://bucket/x"}
    told = refusal(run(*(word for pair in places.items() for word in pair)))
    assert f"{scheme}://" in told
    assert "s3a://" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--input", "--output"])
@pytest.mark.parametrize("scheme", ["s3", "S3A"])
def test_s3_is_refused_for_now(tmp_path: Path, small_input: Path, flag: str, scheme: str) -> None:
    places = {"--input": str(small_input), "--output": str(tmp_path / "out"), flag: f"{scheme}://bucket/x"}
    assert "not S3 yet" in refusal(run(*(word for pair in places.items() for word in pair)))


def test_an_output_in_or_around_the_input_is_refused(small_input: Path) -> None:
    for output in (small_input, small_input / "song_data" / "lake", small_input.parent):
        assert str(output) in refusal(run("--input", small_input, "--output", output))
    assert sorted(path.name for path in small_input.iterdir()) == ["log_data", "song_data"]


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, small_input: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in refusal(run("--input", small_input, "--output", tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that cannot be read. Each is found before an engine starts, so that one engine will do.
# ---------------------------------------------------------------------------------------------------------------------


def refused_input(folder: Path, output: Path) -> str:
    told = refusal(run("--input", folder, "--output", output))
    assert not output.exists()
    return told


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused_input(tmp_path / "nowhere", tmp_path / "out")


def test_an_input_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    assert str(tmp_path / "file") in refused_input(tmp_path / "file", tmp_path / "out")


@pytest.mark.parametrize("kind", ["song_data", "log_data"])
def test_an_input_without_one_of_its_folders_is_named(tmp_path: Path, small_input: Path, kind: str) -> None:
    shutil.rmtree(small_input / kind)
    told = refused_input(small_input, tmp_path / "out")
    assert str(small_input) in told
    assert kind in told


@pytest.mark.parametrize("kind", ["song_data", "log_data"])
def test_an_input_folder_without_a_file_to_read_is_named(tmp_path: Path, small_input: Path, kind: str) -> None:
    shutil.rmtree(small_input / kind)
    for name in ("x.txt", "x.JSON", "x.json.bz2", "_x.json", ".x.json", "_y/x.json", ".y/x.json.gz"):
        (small_input / kind / name).parent.mkdir(parents=True, exist_ok=True)
        (small_input / kind / name).write_text("{}")
    done = run("--input", small_input, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert str(small_input / kind) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["song_data/A/gone.json", "log_data/gone.json.gz", "log_data/2019", "song_data/B"])
def test_a_link_to_nowhere_is_named(tmp_path: Path, small_input: Path, name: str) -> None:
    (small_input / name).symlink_to(tmp_path / "nowhere")
    assert str(small_input / name) in refused_input(small_input, tmp_path / "out")


def test_a_link_to_itself_is_named(tmp_path: Path, small_input: Path) -> None:
    (small_input / "log_data" / "x.json").symlink_to("x.json")
    assert "x.json" in refused_input(small_input, tmp_path / "out")


@pytest.mark.parametrize("to", [".", "..", "../..", "../../.."])
def test_a_link_back_to_a_folder_above_is_named(tmp_path: Path, small_input: Path, to: str) -> None:
    (small_input / "log_data" / "2018" / "again").symlink_to(to)
    told = refused_input(small_input, tmp_path / "out")
    assert f"{small_input / 'log_data' / '2018' / 'again'}: a link that leads back" in told


def test_two_links_that_lead_to_each_others_folder_are_named(tmp_path: Path, small_input: Path) -> None:
    for one, other in ("ab", "ba"):
        (small_input / "log_data" / one).mkdir()
        (small_input / "log_data" / one / "on").symlink_to(small_input / "log_data" / other)
    assert "/on/on: a link that leads back" in refused_input(small_input, tmp_path / "out")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_named(
    tmp_path: Path, small_input: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_input / "log_data")  # a socket's path must be short
    if kind == "pipe":
        os.mkfifo("x.json")
    else:
        with socket.socket(socket.AF_UNIX) as here:
            here.bind("x.json")
    assert str(small_input / "log_data" / "x.json") in refused_input(small_input, tmp_path / "out")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can reach, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


# Root may read everything, so it becomes nobody; who may not read root's own Python, so what the job takes comes first.
AS_NOBODY = """
import email.parser, encodings.ascii, encodings.idna, encodings.utf_8_sig, importlib.metadata, os, sys
import pyspark.sql.connect.session, pysail.spark
sys.path.insert(0, sys.argv.pop(1))
import etl
os.getuid() or os.setuid(65534)
sys.exit(etl.main())
"""


def run_as_nobody(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AS_NOBODY, str(HOME), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=plain_env(), timeout=60)


@pytest.mark.parametrize("name", ["log_data/x.json", "song_data/A/x.json.gz", "log_data/2019", "song_data"])
def test_what_may_not_be_read_is_named(open_folder: Path, name: str) -> None:
    write_input(open_folder / "in")
    if "." in name:
        (open_folder / "in" / name).write_bytes(b"")
    else:
        (open_folder / "in" / name).mkdir(exist_ok=True)
    (open_folder / "in" / name).chmod(0)
    told = refusal(run_as_nobody("--input", open_folder / "in", "--output", open_folder / "out"))
    (open_folder / "in" / name).chmod(0o700)
    assert str(open_folder / "in" / name) in told
    assert not (open_folder / "out").exists()


def test_an_output_that_may_not_be_written_is_named(open_folder: Path) -> None:
    write_input(open_folder / "in")
    (open_folder / "closed").mkdir()
    (open_folder / "closed").chmod(0o555)
    for output in (open_folder / "closed", open_folder / "closed" / "deeper"):
        told = refusal(run_as_nobody("--input", open_folder / "in", "--output", output))
        assert str(open_folder / "closed") in told


def break_archive(folder: Path, how: str) -> Path:
    path = folder / "log_data" / "broken.json.gz"
    whole = gzip.compress("\n".join(json.dumps({**LOG_LINE, "itemInSession": i}) for i in range(5000)).encode())
    broken = {
        "cut": whole[: len(whole) // 2],
        "not packed": b'{"page": "Home"}\n',
        "damaged": whole[:200] + b"\xff" * 50 + whole[250:],
        "a wrong sum": whole[:-8] + bytes(8),
    }
    path.write_bytes(broken[how])
    return path


@pytest.mark.parametrize("how", ["cut", "not packed", "damaged", "a wrong sum"])
def test_a_broken_archive_is_named(tmp_path: Path, small_input: Path, how: str) -> None:
    path = break_archive(small_input, how)
    done = run("--input", small_input, "--output", tmp_path / "out", "--engine", "sail")
    _, others = split_steps(done.stderr)
    assert (done.returncode, len(others)) == (2, 1), done.stderr
    assert others[0].startswith(f"etl.py: {path}: ")
    assert not any((tmp_path / "out" / name).exists() for name in etl.TABLES)


# ---------------------------------------------------------------------------------------------------------------------
# Engines that cannot start
# ---------------------------------------------------------------------------------------------------------------------


Refuse = Callable[[str, Mapping[str, str]], str]


@pytest.fixture
def refused_engine(tmp_path: Path, small_input: Path) -> Refuse:
    """The line with which a run on the engine is refused, within seconds and without a trace in the output."""

    def refuse(engine: str, env: Mapping[str, str]) -> str:
        done = run("--input", small_input, "--output", tmp_path / "out", "--engine", engine, env=env, timeout=40)
        assert not any((tmp_path / "out" / name).exists() for name in etl.TABLES)
        return refusal(done)

    return refuse


def without(env: Mapping[str, str], *names: str) -> dict[str, str]:
    return {key: value for key, value in env.items() if key not in names}


def test_spark_without_java_on_the_path_is_one_line_with_the_way_out(refused_engine: Refuse, tmp_path: Path) -> None:
    told = refused_engine("spark", without(plain_env(), "JAVA_HOME") | {"PATH": str(tmp_path)})
    assert "Java" in told
    assert "--engine sail" in told
    assert "JAVA_HOME" in told


def test_spark_with_an_empty_java_home_is_one_line_that_names_it(refused_engine: Refuse, tmp_path: Path) -> None:
    told = refused_engine("spark", plain_env(JAVA_HOME=str(tmp_path)))
    assert str(tmp_path) in told
    assert "--engine sail" in told


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'openjdk version \"1.8.0_402\"' >&2", "Java 8"),
        ("echo 'openjdk version \"11.0.22\" 2024-01-16' >&2", "Java 11"),
        ("echo 'openjdk version \"25\" 2025-09-16' >&2", "Java 25"),
        ("echo 'Picked up JAVA_TOOL_OPTIONS: -Dx'  >&2; echo 'java version \"11\"' >&2", "Java 11"),
        ("echo 'The operation couldn’t be completed.' >&2; exit 1", "Java"),
        ("kill -9 $$", "Java"),
        ("echo", "Java"),
    ],
)
def test_spark_with_an_unfit_java_is_one_line_that_names_it(
    refused_engine: Refuse, tmp_path: Path, script: str, told: str
) -> None:
    (tmp_path / "java" / "bin").mkdir(parents=True)
    java = tmp_path / "java" / "bin" / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    line = refused_engine("spark", plain_env(JAVA_HOME=str(tmp_path / "java")))
    assert told in line
    assert "17 or 21" in line
    assert "--engine sail" in line


WITHOUT_PACKAGE = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "{name}" else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (found for found in super().find_distributions(*args, **kwargs) if found.metadata["Name"] != "{name}")

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


@pytest.mark.parametrize(
    ("name", "engine", "told"),
    [
        ("pysail", "auto", "pysail"),
        ("pysail", "sail", "--engine spark"),
        ("pyspark", "auto", "PySpark"),
        ("pyspark", "spark", "PySpark"),
    ],
)
def test_a_missing_package_is_one_line_that_names_it(
    refused_engine: Refuse, tmp_path: Path, name: str, engine: str, told: str
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_PACKAGE.replace("{name}", name))
    line = refused_engine(engine, plain_env(PYTHONPATH=str(tmp_path / "site")))
    assert told in line
    assert "requirements.txt" in line


def test_help_and_version_need_no_package(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_PACKAGE.replace("{name}", "pyspark"))
    for flag in ("--help", "--version"):
        done = run(flag, env=plain_env(PYTHONPATH=str(tmp_path)))
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("version", ["3.4.4", "4.3.0", "5.0.0"])
def test_a_pyspark_that_sail_refuses_is_one_line_that_names_it(
    refused_engine: Refuse, tmp_path: Path, version: str
) -> None:
    site = tmp_path / "site"
    (site / f"pyspark-{version}.dist-info").mkdir(parents=True)
    (site / f"pyspark-{version}.dist-info" / "METADATA").write_text(f"Name: pyspark\nVersion: {version}\n")
    (site / "sitecustomize.py").write_text(f"import pyspark\npyspark.__version__ = '{version}'\n")
    line = refused_engine("sail", plain_env(PYTHONPATH=str(site)))
    assert version in line
    assert "--engine spark" in line


@pytest.mark.parametrize("address", ["spark://host:7077", "host:15002", "sc://", "sc://;token={}", "https://u:{}@h"])
def test_a_spark_remote_of_another_form_is_one_line(refused_engine: Refuse, address: str) -> None:
    secret = SECRETS["AWS_SESSION_TOKEN"]
    told = refused_engine("auto", plain_env(SPARK_REMOTE=address.format(secret)))
    assert "SPARK_REMOTE" in told
    assert not leaks(SECRETS, told.encode())


def test_a_spark_remote_where_nobody_answers_is_one_line(refused_engine: Refuse) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, never listening: refuses, and nobody else can take it
        told = refused_engine("auto", plain_env(SPARK_REMOTE=f"sc://127.0.0.1:{closed.getsockname()[1]}"))
    assert "SPARK_REMOTE" in told


# ---------------------------------------------------------------------------------------------------------------------
# A run, on each engine: checkout, input and output have odd names, and secrets stand in dl.cfg and the environment
# ---------------------------------------------------------------------------------------------------------------------

SECRETS = {
    "AWS_ACCESS_KEY_ID": "XKIDQ3EGZYVN5TKWM2XH",
    "AWS_SECRET_ACCESS_KEY": "qVxKdTfzLmRbWcHs/JgNpYtQu3+Zo8EvXaBiDeFkwO",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEJrLkPmQsTuVwXyZaBcDeFgH==",
    "AWS_ENDPOINT_URL": "https://someone:JhGfDsAqWeRtYuIoP@host:9000",
}
SECRETS_OF_THE_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "XSIDZ7HNQXPL4RWVE9CJ",
    "AWS_SECRET_ACCESS_KEY": "zMnBvCxLkJhGfDsA+pOiUyTrEwQ/1029384756QpWo",
    "AWS_SESSION_TOKEN": "IQoJb3JpZ2luX2VjEPLoKmIjNuHbYgVtFcRdXeSzWaQ==",
    "AWS_ENDPOINT_URL": "https://another:MnBvCxZqAwSxEdCrF@host:9000",
}


class Lake(NamedTuple):
    """A run and what it left: the odd checkout, the engine's temporary files, and the output under a plain name."""

    done: subprocess.CompletedProcess[str]
    home: Path
    temporary: Path
    output: Path
    plain: Path


@pytest.fixture(scope="module")
def lake(engine_name: str, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    folder = tmp_path_factory.mktemp("run")
    home, temporary = folder / ODD, folder / "temporary"
    for path in (home, temporary):
        path.mkdir()
    shutil.copy(HOME / "etl.py", home)
    places = {"INPUT_DATA_S3": f"in {ODD}".replace("'", ""), "OUTPUT_DATA_S3": f"out {ODD}".replace("'", "")}
    lines = [f"{key}='{value}'\n" for key, value in {**SECRETS, **places}.items()]
    (home / "dl.cfg").write_text("".join(lines), encoding="utf-8")
    source = write_input(home / places["INPUT_DATA_S3"], TWO_SONGS, THREE_PLAYS)
    # The log's plays once more, packed and in a folder with a name of its own; an empty file; a line to reject.
    again = source / "log_data" / ODD
    again.mkdir()
    text = (source / "log_data/2018/11/2018-11-15-events.json").read_bytes()
    (again / f"{ODD}.json.gz".replace("k=", "m=")).write_bytes(gzip.compress(text + b"\n\n{broken\n"))
    (again / f"{ODD}.json".replace("k=", "n=")).write_bytes(b"")
    # None of these is read; only the first three are told.
    for name in ("READ ME.txt", "x.JSON", f"{ODD}.json.bak", "_x.json", ".x.json"):
        (again / name).write_text("{}")
    env = plain_env(TMPDIR=str(temporary), **SECRETS_OF_THE_ENVIRONMENT)
    if engine_name == "spark":
        env["SPARK_LOCAL_DIRS"] = str(temporary)
    flags = ["--max-rejects", "1", *(["--engine", "spark"] if engine_name == "spark" else [])]
    done = run(*flags, env=env, script=home / "etl.py")
    output = home / places["OUTPUT_DATA_S3"]
    assert done.returncode == 0, done.stderr
    shutil.copytree(output, folder / "lake")
    return Lake(done, home, temporary, output, folder / "lake")


def test_the_report_goes_to_stdout(lake: Lake) -> None:
    first, second, *rest = lake.done.stdout.splitlines()
    assert re.fullmatch(r"run \S+: published", first)
    assert second == f"{lake.home}/in {lake.output.name[4:]} -> {lake.output}"
    rows = dict(re.findall(r"^(songplays|users|songs|artists|time) +(\d+) ", "\n".join(rest), re.MULTILINE))
    assert rows == {"songplays": "3", "users": "2", "songs": "2", "artists": "2", "time": "3"}
    assert "2 of 3 songplays have a song" in rest
    assert "users by level: 1 free, 1 paid" in rest


def test_all_but_the_report_goes_to_stderr_a_line_a_step(lake: Lake) -> None:
    steps, others = split_steps(lake.done.stderr)
    assert steps == [
        *("list input", "start engine", "read song lines", "read log lines", "stage plays"),
        *("build songplays", "build users", "build songs", "build artists", "build time", "audit", "publish"),
    ]
    assert "\r" not in lake.done.stderr
    assert "\x1b" not in lake.done.stderr
    warnings = [line for line in others if line.startswith("etl.py: warning: ")]
    assert others == warnings


def test_ignored_files_are_named_once(lake: Lake) -> None:
    _, others = split_steps(lake.done.stderr)
    (told,) = [line for line in others if "ignored" in line]
    for name in ("READ ME.txt", "x.JSON", f"{ODD}.json.bak"):
        assert told.count(f"/{name}") == 1
        assert lake.done.stderr.count(f"/{name}") == 1
    assert "/_x.json" not in lake.done.stderr
    assert "/.x.json" not in lake.done.stderr


def instant(milliseconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(milliseconds=milliseconds)


# In the order of DuckDB's columns: the contract's, then the folders'.
LATER, MUCH_LATER = PLAY_TS + 3_600_000, PLAY_TS + 30 * 86_400_000
SAN_JOSE, AGENT = LOG_LINE["location"], LOG_LINE["userAgent"]


def play_id(*identity: int) -> str:
    return hashlib.md5("|".join(map(str, identity)).encode()).hexdigest()


EXPECTED: dict[str, list[tuple[Any, ...]]] = {
    "songplays": [
        (play_id(26, 583, 0, PLAY_TS), PLAY_TS, 26, "free", "SO1", "AR1", 583, SAN_JOSE, AGENT),
        (play_id(26, 583, 1, LATER), LATER, 26, "paid", "SO1", "AR1", 583, SAN_JOSE, AGENT),
        (play_id(7, 583, 0, MUCH_LATER), MUCH_LATER, 7, "free", None, None, 583, SAN_JOSE, AGENT),
    ],
    "users": [(26, "Ryan", "Smith", "M", "paid"), (7, "Ida", "Smith", "M", "free")],
    "songs": [("SO1", "Slow Tide", "AR1", 2004, 218.93179), ("SO2", "Étude №2", "AR2", 0, 218.93179)],
    "artists": [("AR1", "The Harbour", "Oslo", 59.91, 10.75), ("AR2", "Noor", "Oslo", 59.91, 10.75)],
    "time": [
        (PLAY_TS, 0, 15, 46, 11, 2018, 5),
        (LATER, 1, 15, 46, 11, 2018, 5),
        (MUCH_LATER, 0, 15, 50, 12, 2018, 7),
    ],
}


def test_the_tables_hold_the_same_rows_on_either_engine(lake: Lake) -> None:
    assert read_lake(lake.plain) == {name: sorted(rows, key=repr) for name, rows in EXPECTED.items()}


ARROW = {
    "string": pyarrow.string(),
    "bigint": pyarrow.int64(),
    "int": pyarrow.int32(),
    "double": pyarrow.float64(),
    "timestamp": pyarrow.timestamp("us", tz="UTC"),
}


def test_each_file_has_the_contracts_types_and_codec(lake: Lake) -> None:
    for name, table in etl.TABLES.items():
        files = sorted((lake.output / name).rglob("*.parquet"))
        assert files
        for path in files:
            with pyarrow.parquet.ParquetFile(path) as file:
                found = [(field.name, field.type) for field in file.schema_arrow]
                assert found == [(column, ARROW[kind]) for column, kind in table.stored.items()]
                assert all(field.nullable for field in file.schema_arrow)
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                codecs = {group.column(i).compression for group in groups for i in range(group.num_columns)}
                assert codecs == {"ZSTD"}
                for i, (_, kind) in enumerate(found):
                    if pyarrow.types.is_timestamp(kind):
                        logical = json.loads(file.schema.column(i).logical_type.to_json())
                        assert (logical["isAdjustedToUTC"], logical["timeUnit"]) == (True, "microseconds")
                        assert file.schema.column(i).physical_type == "INT64"


def test_the_folders_are_the_partitions_unpadded_with_a_file_each(lake: Lake) -> None:
    files = [path.relative_to(lake.output) for path in lake.output.rglob("*") if path.is_file()]
    folders = sorted(path.parent.as_posix() for path in files if path.parts[0] in etl.TABLES)
    months = ["year=2018/month=11", "year=2018/month=12"]
    assert folders == [
        "artists",
        *(f"songplays/{month}" for month in months),
        *("songs/year=0", "songs/year=2004"),
        *(f"time/{month}" for month in months),
        "users",
    ]
    assert {path.suffix for path in files if path.parts[0] in etl.TABLES} == {".parquet"}
    assert {path.name for path in lake.output.iterdir()} - {"_staging"} == {*etl.TABLES, "_runs", "_rejects"}
    assert not [path for path in files if path.parts[0] == "_staging"]


DUCKDB = {
    "string": "VARCHAR",
    "bigint": "BIGINT",
    "int": "INTEGER",
    "double": "DOUBLE",
    "timestamp": "TIMESTAMP WITH TIME ZONE",
}


def test_duckdb_opens_the_tables_with_the_contracts_types(lake: Lake) -> None:
    with duckdb.connect() as database:
        for name, table in etl.TABLES.items():
            glob = f"{lake.plain}/{name}/**/*.parquet"
            query = f"DESCRIBE SELECT * EXCLUDE ({', '.join(table.partitions) or 'nothing'})"
            query = query if table.partitions else "DESCRIBE SELECT *"
            found = database.execute(f"{query} FROM read_parquet('{glob}', hive_partitioning = true)").fetchall()
            assert [row[:2] for row in found] == [(column, DUCKDB[kind]) for column, kind in table.stored.items()]
            for column in table.partitions:
                values = database.execute(f"SELECT DISTINCT typeof({column}) FROM read_parquet('{glob}')").fetchall()
                assert values == [("BIGINT",)]


def test_the_query_of_the_report_runs(lake: Lake) -> None:
    query = lake.done.stdout.partition("in DuckDB:\n")[2].strip()
    with duckdb.connect() as database:
        rows = database.execute(query).fetchall()
    assert rows == [("free", 2), ("paid", 1)]


PANDAS = {
    "string": "object",
    "bigint": "int64",
    "int": "int32",
    "double": "float64",
    "timestamp": "datetime64[us, UTC]",
}


def test_pandas_opens_the_tables_with_the_contracts_types(lake: Lake) -> None:
    for name, table in etl.TABLES.items():
        frame = pandas.read_parquet(lake.output / name)
        types = {column: str(frame[column].dtype) for column in frame}
        assert {column: types[column] for column in table.stored} == {
            column: PANDAS[kind] for column, kind in table.stored.items()
        }
        assert sorted(types) == sorted(table.types)
        assert len(frame) == len(EXPECTED[name])
    instants = pandas.read_parquet(lake.output / "songplays")["start_time"].sort_values()
    assert [value.to_pydatetime() for value in instants] == [instant(ts) for ts in (PLAY_TS, LATER, MUCH_LATER)]


def test_pyarrow_opens_the_tables_with_the_contracts_types(lake: Lake) -> None:
    for name, table in etl.TABLES.items():
        rows = pyarrow.dataset.dataset(lake.output / name, format="parquet", partitioning="hive").to_table()
        assert {field.name: field.type for field in rows.schema} == {
            column: ARROW[kind] for column, kind in table.types.items()
        }
        assert rows.num_rows == len(EXPECTED[name])


def pieces(secrets: Mapping[str, str]) -> set[bytes]:
    """Every eight bytes in a row of each secret, also of what it is in a URL, in JSON and in capitals."""
    texts = {part for value in secrets.values() for part in re.split(r"https://|@host:9000", value) if part}
    forms = {form for text in texts for form in (text, text.upper(), text.replace("/", "%2F").replace("+", "%2B"))}
    return {form.encode()[i : i + 8] for form in forms for i in range(len(form) - 7)}


def leaks(secrets: Mapping[str, str], data: bytes) -> set[bytes]:
    return {piece for piece in pieces(secrets) if piece in data}


def test_the_search_for_secrets_finds_them() -> None:
    for secrets in (SECRETS, SECRETS_OF_THE_ENVIRONMENT):
        for value in secrets.values():
            assert leaks(secrets, b"x" + value.encode() + b"x")
        assert not leaks(secrets, Path(etl.__file__).read_bytes())


def test_no_secret_is_told_or_written(lake: Lake) -> None:
    secrets = [SECRETS, SECRETS_OF_THE_ENVIRONMENT]
    written = [path for path in (*lake.home.rglob("*"), *lake.temporary.rglob("*")) if path.is_file()]
    written.remove(lake.home / "dl.cfg")
    assert len([path for path in written if path.suffix == ".parquet"]) > 5
    told = {Path("stdout"): lake.done.stdout.encode(), Path("stderr"): lake.done.stderr.encode()}
    for path, data in {**told, **{path: path.read_bytes() for path in written}}.items():
        for planted in secrets:
            assert not leaks(planted, data), path


def test_nothing_stays_in_the_temporary_folder(lake: Lake) -> None:
    kept = [path for path in lake.temporary.iterdir() if not path.name.startswith("hsperfdata")]
    assert [path for path in kept if path.is_file() or any(path.rglob("*"))] == []


# ---------------------------------------------------------------------------------------------------------------------
# Sail, in environments of all kinds
# ---------------------------------------------------------------------------------------------------------------------


def test_without_flags_data_and_output_stand_beside_the_script(tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_input(home / "data")
    shutil.copy(HOME / "etl.py", home)
    shutil.copy(HOME / "dl.cfg", home)
    (tmp_path / "link.py").symlink_to(home / "etl.py")
    done = run(script=tmp_path / "link.py")
    assert done.returncode == 0, done.stderr
    assert read_lake(home / "output")["users"] == [(26, "Ryan", "Smith", "M", "free")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "link.py"]


def test_sail_needs_nothing_but_python(tmp_path: Path, small_input: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    assert not shutil.which("java", path=str(python.parent))
    done = run("--input", small_input, "--output", tmp_path / "out", env={"PATH": str(python.parent)})
    assert (done.returncode, split_steps(done.stderr)[1]) == (0, [])
    assert len(read_lake(tmp_path / "out")["songplays"]) == 1


@pytest.mark.parametrize(
    "extra",
    [
        {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
        {"SPARK_REMOTE": "sc://127.0.0.1:9"},
        {"SPARK_HOME": "/nowhere", "PYSPARK_PYTHON": "/nowhere", "SPARK_API_MODE": "classic", "JAVA_HOME": "/nowhere"},
        {"PYTHONIOENCODING": "ascii", "TZ": "America/St_Johns"},
        {"PYTHONWARNINGS": "error"},
    ],
    ids=["a proxy", "a Spark elsewhere", "another Spark", "another zone and encoding", "strict warnings"],
)
def test_sail_runs_in_an_environment_made_for_others(
    tmp_path: Path, small_input: Path, extra: Mapping[str, str]
) -> None:
    path = small_input / "log_data" / "é.json"
    path.write_text('{"é": "東京"} ü', encoding="utf-8")
    flags = ["--engine", "sail", "--max-rejects", "1"]
    done = run("--input", small_input, "--output", tmp_path / "out", *flags, env=plain_env(**extra), timeout=50)
    assert (done.returncode, split_steps(done.stderr)[1]) == (0, []), done.stderr
    assert read_lake(tmp_path / "out")["time"] == [(PLAY_TS, 0, 15, 46, 11, 2018, 5)]


def test_on_a_terminal_the_current_step_is_live(tmp_path: Path, small_input: Path) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, str(HOME / "etl.py"), "--input", str(small_input), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=plain_env()) as process:
        os.close(theirs)
        told = b""
        with contextlib.suppress(OSError):  # the end, on Linux
            while block := os.read(ours, 65536):
                told += block
        os.close(ours)
        report = process.stdout.read() if process.stdout else b""
    assert process.returncode == 0, told
    seconds = re.findall(rb"\rstart engine +(\d+\.\d) s", told)
    assert len(seconds) > 2
    assert seconds == sorted(seconds, key=float)
    assert told.endswith(b"\r\x1b[K")  # and nothing of it stays
    assert b"\n" not in told
    assert report.startswith(b"run ")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_makes_no_stack_trace(tmp_path: Path, small_input: Path, stream: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(HOME / "etl.py"), "--input", str(small_input), "--output", str(tmp_path / "out")]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    done = subprocess.run(command, **streams, check=False, env=plain_env(), timeout=60)
    os.close(writing)
    assert b"Traceback" not in (done.stdout or b"") + (done.stderr or b"")
    assert b"Exception ignored" not in (done.stdout or b"") + (done.stderr or b"")


# ---------------------------------------------------------------------------------------------------------------------
# Spark that somebody else started
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_spark")
def test_spark_submit_gives_the_same_rows(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in", TWO_SONGS, THREE_PLAYS)
    submit = [str(Path(sys.executable).parent / "spark-submit"), "--master", "local[2]", str(HOME / "etl.py")]
    flags = ["--input", str(source), "--output", str(tmp_path / "submitted")]
    env = plain_env(**SECRETS_OF_THE_ENVIRONMENT)
    done = subprocess.run([*submit, *flags], capture_output=True, text=True, check=False, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    assert read_lake(tmp_path / "submitted") == {name: sorted(rows, key=repr) for name, rows in EXPECTED.items()}
    record = json.loads((tmp_path / "submitted" / "_runs" / "latest.json").read_text())
    assert record["engine"].startswith("spark ")
    steps, report = split_steps(done.stdout)  # spark-submit sends both streams of a Python script to its own stdout
    assert len(steps) == 12
    assert report[0].startswith("run ")
    assert done.stderr.count("\n") < 100
    assert "\tat " not in done.stderr
    assert not leaks(SECRETS_OF_THE_ENVIRONMENT, (done.stdout + done.stderr).encode())


@pytest.fixture(scope="module")
def spark_remote(needs_spark: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server, address = start_spark_connect(tmp_path_factory.mktemp("server"))
    yield address
    server.terminate()
    server.wait(30)


def test_spark_remote_gives_the_same_rows(tmp_path: Path, spark_remote: str) -> None:
    source = write_input(tmp_path / "in", TWO_SONGS, THREE_PLAYS)
    done = run("--input", source, "--output", tmp_path / "out", env=plain_env(SPARK_REMOTE=spark_remote))
    assert (done.returncode, split_steps(done.stderr)[1]) == (0, []), done.stderr
    assert read_lake(tmp_path / "out") == {name: sorted(rows, key=repr) for name, rows in EXPECTED.items()}
    assert json.loads((tmp_path / "out" / "_runs" / "latest.json").read_text())["engine"].startswith("spark ")


@pytest.mark.parametrize("how", ["cut", "not packed"])
def test_a_broken_archive_is_named_on_spark(tmp_path: Path, small_input: Path, how: str, spark_remote: str) -> None:
    path = break_archive(small_input, how)
    env = plain_env(SPARK_REMOTE=spark_remote)
    done = run("--input", small_input, "--output", tmp_path / "out", env=env)
    _, others = split_steps(done.stderr)
    assert (done.returncode, len(others)) == (2, 1), done.stderr
    assert others[0].startswith(f"etl.py: {path}: ")
    assert not any((tmp_path / "out" / name).exists() for name in etl.TABLES)
