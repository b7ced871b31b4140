"""What every test stands on: the two engines, rows to start from, the real month, the command, the lake it writes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import pytest
from pyspark.sql import DataFrame

import etl

HOME = Path(etl.__file__).parent
ENGINES = ("sail", "spark")
NO_JAVA = "no Java 17 or 21 was found, so Spark's half of the tests did not run (set JAVA_HOME to one)"

# The default play is the default song, played.
PLAY: dict[str, Any] = {
    "source_file": "log_data/2018/11/2018-11-15-events.json",
    "ts": 1542241826796,  # 2018-11-15 00:30:26.796 UTC, a Thursday
    "user_id": 26,
    "level": "free",
    "session_id": 583,
    "item_in_session": 0,
    "song": "Slow Tide",
    "artist": "The Harbour",
    "length": 218.93179,
    "location": "San Jose-Sunnyvale-Santa Clara, CA",
    "user_agent": '"Mozilla/5.0"',
    "first_name": "Ryan",
    "last_name": "Smith",
    "gender": "M",
}
SONG: dict[str, Any] = {
    "source_file": "song_data/A/A/A/TRAAA.json",
    "song_id": "SO1",
    "title": "Slow Tide",
    "artist_id": "AR1",
    "artist_name": "The Harbour",
    "duration": 218.93179,
    "year": 2004,
    "artist_location": "Oslo",
    "artist_latitude": 59.91,
    "artist_longitude": 10.75,
}
TYPES = {field.column: field.type for source in etl.SOURCES.values() for field in source.fields}
STAGED_TYPES = {**TYPES, "source_file": "string", "user_id": "bigint", "year": "int"}


def java_is_there() -> bool:
    java = os.path.join(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    if not shutil.which(java):
        return False
    words = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    return re.search(r'version "(17|21)[."]', words) is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=("both", *ENGINES), default="both", help="the engine to test on")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `engine`, or `engine_name`, runs once on each."""
    asked = metafunc.config.getoption("--engine")
    names = [name for name in ENGINES if asked in ("both", name)]
    marks = [pytest.mark.skipif(name == "spark" and not java_is_there(), reason=NO_JAVA) for name in names]
    if "engine_name" in metafunc.fixturenames:
        params = [pytest.param(name, marks=mark, id=name) for name, mark in zip(names, marks)]
        metafunc.parametrize("engine_name", params, scope="session")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], etl.Engine]]:
    """Each engine when it is first asked for. Spark is a Connect server of its own, so that both fit in one process."""
    opened: dict[str, etl.Engine] = {}
    servers: list[subprocess.Popen[bytes]] = []

    def get(name: str) -> etl.Engine:
        if name not in opened:
            if name == "spark":
                server, address = start_spark_connect(tmp_path_factory.mktemp("spark-connect"))
                servers.append(server)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("SPARK_REMOTE", address)
                    opened[name] = etl.open_engine(name)
            else:
                opened[name] = etl.open_engine(name)
        return opened[name]

    yield get
    for engine in opened.values():
        engine.stop()
    for server in servers:
        server.terminate()
        server.wait(30)


def start_spark_connect(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A Spark Connect server on a free port, ready to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**etl.LOCAL_SPARK, "spark.connect.grpc.binding.port": str(port)}
    confs = [word for key, value in settings.items() for word in ("--conf", f"{key}={value}")]
    server_class = "org.apache.spark.sql.connect.service.SparkConnectServer"
    submit = [str(Path(sys.executable).parent / "spark-submit"), "--master", "local[2]", "--class", server_class]
    log = (folder / "log").open("wb")
    server = subprocess.Popen([*submit, *confs, "spark-internal"], cwd=folder, env=path_env(), stdout=log, stderr=log)
    log.close()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server, f"sc://127.0.0.1:{port}"
        time.sleep(0.2)
    raise AssertionError(f"the Spark Connect server did not start: {(folder / 'log').read_text()[-2000:]}")


def path_env(**extra: str) -> dict[str, str]:
    """This environment, with the Python that runs the tests first on PATH, without what an open session left in it."""
    here = {
        name: value for name, value in os.environ.items() if name not in ("SPARK_CONNECT_MODE_ENABLED", "SPARK_REMOTE")
    }
    return {**here, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **extra}


@pytest.fixture(scope="session")
def engine(engine_name: str, engines: Callable[[str], etl.Engine]) -> etl.Engine:
    return engines(engine_name)


class Frames:
    """Staged frames of an engine: each dict is a change to the default row."""

    def __init__(self, engine: etl.Engine) -> None:
        self.engine = engine

    def plays(self, *changes: Mapping[str, Any]) -> DataFrame:
        return self._frame(PLAY, changes)

    def songs(self, *changes: Mapping[str, Any]) -> DataFrame:
        return self._frame(SONG, changes)

    def _frame(self, default: Mapping[str, Any], changes: tuple[Mapping[str, Any], ...]) -> DataFrame:
        unknown = {name for change in changes for name in change} - set(default)
        assert not unknown, f"no such columns: {unknown}"
        rows = [tuple({**default, **change}.values()) for change in changes]
        return self.engine.spark.createDataFrame(rows, ", ".join(f"{name} {STAGED_TYPES[name]}" for name in default))


@pytest.fixture
def frames(engine: etl.Engine) -> Frames:
    return Frames(engine)


@pytest.fixture(scope="session")
def real_month() -> Path:
    folder = Path(os.environ.get("REAL_MONTH", HOME.parent / "shared" / "realdata"))
    if not (folder / "log_data").is_dir():
        pytest.skip("the real month is not here: set REAL_MONTH to a folder with its song_data/ and log_data/")
    return folder


def run_etl(*args: object, engine: str = "sail", **env: str) -> subprocess.CompletedProcess[str]:
    """python etl.py, as a user runs it."""
    command = [sys.executable, str(HOME / "etl.py"), "--engine", engine, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=path_env(**env), timeout=300)


def read_lake(lake: Path) -> dict[str, list[tuple[Any, ...]]]:
    """The five tables as DuckDB reads them, sorted, columns as in the contract; instants as epoch milliseconds."""
    tables = {}
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        for name, table in etl.TABLES.items():
            names = (column.split()[0] for column in table.columns.split(", "))
            chosen = ", ".join(f"epoch_ms({name}) AS {name}" if name == "start_time" else name for name in names)
            glob = str(lake / name / "**" / "*.parquet").replace("'", "''")
            rows = database.execute(f"SELECT {chosen} FROM read_parquet('{glob}', hive_partitioning = true)").fetchall()
            tables[name] = sorted(rows, key=repr)
    return tables
