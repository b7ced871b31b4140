#!/usr/bin/env python3
"""Turn a music app's raw JSON into tables of parquet that analysts can trust.

Reads song_data/ and log_data/ below the input, builds songplays, users, songs,
artists and time, audits them, and only then publishes them below the output.
Every input line is accounted for.
"""

from __future__ import annotations

import argparse
import codecs
import configparser
import contextlib
import ctypes
import difflib
import fcntl
import functools
import gzip
import importlib.metadata
import importlib.util
import io
import json
import logging
import operator
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, Any, NamedTuple, NoReturn

try:
    import pyspark
    from pyspark.sql import Column, DataFrame, SparkSession, Window
    from pyspark.sql import functions as F
except ImportError:  # check_engine says how to mend it; --help and --version work without
    pass

VERSION = "0.1.0"

# =====================================================================================================================
# Contracts: what comes in, what goes out. Audit, writer and tests derive from them.
# =====================================================================================================================


class Field(NamedTuple):
    """A field of an input line. `domain` is a SQL condition on the staged column, `when` on the lines that need it."""

    name: str  # in the JSON
    column: str  # as staged
    type: str
    required: bool = False
    may_be_empty: bool = False
    domain: str = "true"
    when: str = "true"


class Source(NamedTuple):
    """A kind of input: its folder below the input, and its fields in the order in which they are checked."""

    kind: str
    folder: str
    fields: tuple[Field, ...]


SONG_FIELDS = (
    Field("song_id", "song_id", "string", required=True),
    Field("title", "title", "string", required=True, may_be_empty=True),
    Field("artist_id", "artist_id", "string", required=True),
    Field("artist_name", "artist_name", "string", required=True),
    Field("duration", "duration", "double", required=True, domain="duration >= 0"),  # seconds
    Field("year", "year", "bigint"),  # 0: unknown
    Field("artist_location", "artist_location", "string"),
    Field("artist_latitude", "artist_latitude", "double"),  # degrees
    Field("artist_longitude", "artist_longitude", "double"),
)
PLAY = "page = 'NextSong'"
CENTURY = "ts >= 946684800000 AND ts < 4102444800000"  # 2000-01-01 to before 2100-01-01
LEVEL = "level IN ('free', 'paid')"
LOG_FIELDS = (
    Field("page", "page", "string", required=True),
    Field("ts", "ts", "bigint", required=True, domain=CENTURY, when=PLAY),  # epoch milliseconds, UTC
    Field("userId", "user_id", "string", required=True, domain=r"user_id rlike '^[0-9]{1,18}\\z'", when=PLAY),
    Field("level", "level", "string", required=True, domain=LEVEL, when=PLAY),
    Field("sessionId", "session_id", "bigint", required=True, domain="session_id >= 0", when=PLAY),
    Field("itemInSession", "item_in_session", "bigint", required=True, domain="item_in_session >= 0", when=PLAY),
    Field("song", "song", "string", required=True, may_be_empty=True, when=PLAY),
    Field("artist", "artist", "string", required=True, may_be_empty=True, when=PLAY),
    Field("length", "length", "double", required=True, domain="length >= 0", when=PLAY),  # seconds
    Field("location", "location", "string"),
    Field("userAgent", "user_agent", "string"),
    Field("firstName", "first_name", "string"),
    Field("lastName", "last_name", "string"),
    Field("gender", "gender", "string"),
)
SOURCES = {"song": Source("song", "song_data", SONG_FIELDS), "log": Source("log", "log_data", LOG_FIELDS)}
REJECT_COLUMNS = ("kind", "source_file", "line", "reason", "field")  # all strings
MAX_REJECTED_LINE = 4000  # characters kept

NOTHING: Mapping[str, str] = MappingProxyType({})


class Table(NamedTuple):
    """A published table. Its partition columns are ints; they stand in the folders' names, not in the files."""

    grain: str
    columns: str  # DDL
    key: str
    required: tuple[str, ...]
    accepted: Mapping[str, str] = NOTHING  # column -> SQL condition on what is set
    partitions: Mapping[str, str] = NOTHING  # column -> SQL that it equals in every row
    references: Mapping[str, str] = NOTHING  # column -> table whose key it is, where set

    @property
    def stored(self) -> dict[str, str]:
        """Column to type, as in the files."""
        pairs = (column.split() for column in self.columns.split(", "))
        return {name: kind for name, kind in pairs if name not in self.partitions}

    @property
    def types(self) -> dict[str, str]:
        """Column to type, as a reader sees them: the folders' come last."""
        return {**self.stored, **dict.fromkeys(self.partitions, "int")}


MONTHS = {"year": "year(start_time)", "month": "month(start_time)"}
TABLES = {
    "songplays": Table(
        "one row per play (page NextSong)",
        "songplay_id string, start_time timestamp, user_id bigint, level string, song_id string, artist_id string, "
        "session_id bigint, location string, user_agent string",
        key="songplay_id",
        required=("start_time", "user_id", "level", "session_id"),
        accepted={"level": LEVEL},
        partitions=MONTHS,
        references={"user_id": "users", "start_time": "time", "song_id": "songs", "artist_id": "artists"},
    ),
    "users": Table(
        "one row per user who played, as of their latest play",
        "user_id bigint, first_name string, last_name string, gender string, level string",
        key="user_id",
        required=("level",),
        accepted={"level": LEVEL},
    ),
    "songs": Table(
        "one row per song",
        "song_id string, title string, artist_id string, year int, duration double",
        key="song_id",
        required=("title", "artist_id", "duration"),
        accepted={"duration": "duration >= 0"},
        partitions={"year": "year"},
        references={"artist_id": "artists"},
    ),
    "artists": Table(
        "one row per artist",
        "artist_id string, name string, location string, lattitude double, longitude double",
        key="artist_id",
        required=("name",),
        accepted={"location": "location <> ''"},
    ),
    "time": Table(
        "one row per distinct start_time of songplays",
        "start_time timestamp, hour int, day int, week int, month int, year int, weekday int",
        key="start_time",
        required=("hour", "day", "week", "weekday"),
        accepted={
            "hour": "hour = hour(start_time)",
            "day": "day = day(start_time)",
            "week": "week BETWEEN 1 AND 53",
            "weekday": "weekday = dayofweek(start_time)",
        },
        partitions=MONTHS,
    ),
}
ROWS_PER_FILE = 1_000_000

# =====================================================================================================================
# Config: flag, else dl.cfg, else default
# =====================================================================================================================


class Stop(Exception):
    """A fault that the user can mend: one line on stderr, no stack trace, and this exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


class Settings(NamedTuple):
    """What a run was asked to do. Holds no secret: it is kept with the run."""

    input: str
    output: str
    engine: str
    max_rejects: float
    max_shrink: float | None


KEY_PAIR = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OTHER_KEYS = ("AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL")
CONFIG_KEYS = (*KEY_PAIR, *OTHER_KEYS, "INPUT_DATA_S3", "OUTPUT_DATA_S3", "MAX_REJECTS", "MAX_SHRINK")
HELP_END = """PLACE is a folder; s3:// and s3a:// URLs come later.
Each setting: flag, else dl.cfg, else default.

exit codes: 0 done; 1 unexpected fault; 2 usage, input or output;
  3 refused by accounting or audit; 4 another run holds the output;
  130, 143 interrupted"""


def warn(message: str) -> None:
    print(f"etl.py: warning: {message}", file=sys.stderr)


def plain_setting(path: Path, number: int, line: str) -> str:
    """A line of dl.cfg as configparser reads it: without section header, indentation, quotes, trailing comment."""
    line = line.strip()
    setting = re.fullmatch(r"""([^=:#;\['"]+?)\s*[=:]\s*(.*)""", line)
    if not setting:
        return "" if re.fullmatch(r"\[.*\]\s*([#;].*)?", line) else line.lstrip("[")
    key, value = setting.groups()
    if value[:1] not in ("'", '"'):
        value = re.sub(r"(^|\s+)[#;].*", "", value)
        if value.endswith(("'", '"')):
            raise Stop(f"{path}: the quotes on line {number} do not match")
        return f"{key}={value}"
    value, quote, rest = value[1:].partition(value[0])
    if not quote or not re.fullmatch(r"\s*([#;].*)?", rest):
        raise Stop(f"{path}: the quotes on line {number} do not match")
    return f"{key}={value}"


def read_config(path: Path) -> dict[str, str]:
    """The settings of a dl.cfg; what is blank or a placeholder like <> is not set.

    A line that cannot be read is named by its number only, for it may hold the secret.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Stop(f"{path}: cannot be read: {getattr(error, 'strerror', 'not a text file in UTF-8')}") from None
    parser = configparser.RawConfigParser(comment_prefixes=("#", ";"), empty_lines_in_values=False)
    known = {key.lower(): key for key in CONFIG_KEYS}
    parser.optionxform = lambda key: known.get(key.lower(), key)  # type: ignore[assignment,method-assign]
    try:
        parser.read_string("[dl]\n" + "\n".join(plain_setting(path, *line) for line in enumerate(lines, start=1)))
    except configparser.DuplicateOptionError as error:
        raise Stop(f"{path}: line {(error.lineno or 1) - 1} gives a key for the second time") from None
    except configparser.ParsingError as error:
        raise Stop(f"{path}: line {error.errors[0][0] - 1} is not of the form KEY='value'") from None
    settings = {key: value for key, value in parser.items("dl") if value and not re.search("<.*>", value)}
    for key in [key for key, _ in parser.items("dl") if key not in CONFIG_KEYS]:
        near = difflib.get_close_matches(key.upper(), CONFIG_KEYS, n=1, cutoff=0.0)[0]
        # A piece of a secret that is read as a key is not made of words.
        name = f" {key}" if re.fullmatch(r"[A-Z]{1,11}(_[A-Z0-9]{1,11})*|[a-z]{1,11}(_[a-z0-9]{1,11})*", key) else ""
        warn(f"{path}: unknown key{name}; the nearest known one is {near}")
    for one, other in (KEY_PAIR, KEY_PAIR[::-1], ("AWS_SESSION_TOKEN", KEY_PAIR[0])):
        if one in settings and other not in settings:
            raise Stop(f"{path}: {one} is set and {other} is not: set both or none")
    for key in ("INPUT_DATA_S3", "OUTPUT_DATA_S3"):  # a relative folder is meant from the file that names it
        if "://" not in settings.get(key, "://"):
            settings[key] = str(path.parent / settings[key])
    return settings


def share(name: str, text: str) -> float:
    """A share from 0 to 1, as the user wrote it."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise Stop(f"{name}: not a share from 0 to 1, such as 0.01")


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise Stop(f"{message}; see etl.py --help")


def read_settings(argv: Sequence[str] | None) -> Settings:
    """Every setting, from the command line, else dl.cfg, else its default."""
    home = Path(__file__).resolve().parent
    parser = ArgumentParser("etl.py", description=__doc__, epilog=HELP_END, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", metavar="FILE", help="settings (default: dl.cfg beside etl.py)")
    parser.add_argument("--input", metavar="PLACE", help="where song_data/ and log_data/ are (default: data/)")
    parser.add_argument("--output", metavar="PLACE", help="where the tables go (default: output/)")
    words = "auto: spark where spark-submit or SPARK_REMOTE gives it, else sail"
    parser.add_argument("--engine", choices=("auto", "sail", "spark"), default="auto", help=words)
    parser.add_argument("--max-rejects", metavar="SHARE", help="most lines rejected (default: 0.01)")
    parser.add_argument("--max-shrink", metavar="SHARE", help="most rows lost by a table (default: off)")
    parser.add_argument("--version", action="version", version=f"etl.py {VERSION}")
    flags = parser.parse_args(argv)
    for name in (name for name, value in vars(flags).items() if value is not None and not value.strip()):
        raise Stop(f"--{name.replace('_', '-')} is empty")
    path = Path(flags.config) if flags.config else home / "dl.cfg"
    config = read_config(path) if flags.config or path.exists() else {}
    max_shrink = flags.max_shrink or config.get("MAX_SHRINK")
    return Settings(
        flags.input or config.get("INPUT_DATA_S3") or str(home / "data"),
        flags.output or config.get("OUTPUT_DATA_S3") or str(home / "output"),
        flags.engine,
        share("max-rejects", flags.max_rejects or config.get("MAX_REJECTS", "0.01")),
        share("max-shrink", max_shrink) if max_shrink else None,
    )


# =====================================================================================================================
# Signals: a run ends in good order
# =====================================================================================================================

SIGNALS: list[int] = []  # received; an engine's client may swallow what their handler raises


def catch_signals() -> None:
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)


def interrupt(number: int, _frame: object) -> None:
    """End the run in good order, and soon in any case."""
    signal.signal(number, signal.SIG_IGN)
    SIGNALS.append(number)
    logging.disable()  # what engines say of it
    warnings.simplefilter("ignore")
    last_resort = threading.Timer(8, os._exit, [128 + number])
    last_resort.daemon = True
    last_resort.start()
    raise KeyboardInterrupt


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """For what is done sooner than given up: from the commit on, and the end of a run."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# =====================================================================================================================
# Storage: a place on disk. Paths are relative to its root, with forward slashes.
# =====================================================================================================================

Files = dict[str, int]  # path -> bytes
RUNS, REJECTS, STAGING = "_runs", "_rejects", "_staging"
LATEST, JOURNAL, OWNER = f"{RUNS}/latest.json", f"{STAGING}/journal.json", f"{STAGING}/owner.json"
SCRATCH = f"{STAGING}/scratch"  # what is being written, before it gets its name
RUN_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")


class Folder:
    """A place on disk. What changes readers' view changes it in one step: they see old or new, never a part."""

    def __init__(self, root: str) -> None:
        self.root = Path(os.path.abspath(root))

    def __str__(self) -> str:
        return str(self.root)

    def list_input(self, folder: str) -> tuple[Files, list[str]]:
        """Every .json and .json.gz below the folder, and the other files; parts that start with _ or . are skipped."""
        found: Files = {}
        others: list[str] = []
        if not (self.root / folder).is_dir():
            raise Stop(f"{self}: holds no folder {folder}; an input is a folder with song_data/ and log_data/")
        for parent, folders, names in os.walk(self.root / folder, followlinks=True, onerror=raise_error):
            folders[:] = [name for name in folders if not name.startswith(("_", "."))]
            real = os.path.realpath(parent)
            if any(os.path.realpath(above) == real for above in Path(parent).parents):
                raise Stop(f"{parent}: a link that leads back to a folder above it")
            for path in (Path(parent, name) for name in names if not name.startswith(("_", "."))):
                if re.search("[\x00-\x1f\x7f\ud800-\udfff]", str(path)):
                    raise Stop(f"{str(path)!r}: a name that is not UTF-8, or holds a control character; rename it")
                if path.is_symlink() and not path.exists():
                    raise Stop(f"{path}: a link to nowhere")
                if not path.name.endswith((".json", ".json.gz")):
                    others.append(path.relative_to(self.root).as_posix())
                elif not path.is_file():
                    raise Stop(f"{path}: not a file")
                elif not os.access(path, os.R_OK):
                    raise Stop(f"{path}: may not be read")
                else:
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        if not found:
            raise Stop(f"{self.root / folder}: holds no .json or .json.gz file")
        return found, others

    def list_files(self, folder: str) -> Files:
        """Every file below the folder, links as themselves; nothing where the folder is missing."""
        found: Files = {}
        for parent, folders, names in os.walk(self.root / folder, onerror=raise_error if self.exists(folder) else None):
            links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
            for path in (Path(parent, name) for name in links + names):
                found[path.relative_to(self.root).as_posix()] = path.lstat().st_size
        return dict(sorted(found.items()))

    def list_names(self, folder: str) -> list[str]:
        """What stands directly in the folder; nothing where it is missing."""
        return sorted(os.listdir(self.root / folder)) if self.exists(folder) else []

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.root / path)

    def open(self, path: str) -> IO[bytes]:
        """The bytes of a file, unpacked where its name says that it is packed."""
        opener: Callable[..., IO[bytes]] = gzip.open if path.endswith(".gz") else open  # type: ignore[assignment]
        return opener(self.root / path, "rb")

    def read(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Write a small file in one step, and for good even where the power fails after it."""
        for parent in ((self.root / SCRATCH).parent, (self.root / path).parent):
            parent.mkdir(parents=True, exist_ok=True)
        with open(self.root / SCRATCH, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.root / SCRATCH, self.root / path)

    def settle(self, paths: Iterable[str]) -> None:
        """Have files on disk for good."""
        for path in paths:
            handle = os.open(self.root / path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files or folders, and the folders above that this leaves empty; what is gone already is fine."""
        root = Path(os.path.realpath(self.root))
        for path in paths:
            target = self.root / path
            if Path(os.path.realpath(target.parent)) != (root / path).parent:
                continue  # somebody put a link there: what it leads to is not ours
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: stays, and so do those above
                for parent in list(Path(path).parents)[:-1]:
                    (self.root / parent).rmdir()

    def bring_in(self, staged: str, place: str, new: Iterable[str], old: Iterable[str]) -> None:
        """Put a staged folder in its place, whole and at once. `new` and `old` are paths in the place.

        What stood there goes to the staged path, but for files that are not ours, which stay. Can be repeated: file
        names are a run's own, so that a new one in its place tells that the exchange is done.
        """
        source, target = self.root / staged, self.root / place
        aside = source.with_suffix(".old")
        done = aside.exists() or any(self.exists(path) for path in new)
        if target.exists() and not done and not exchange(source, target):
            os.rename(target, aside)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, target)
        if aside.exists():
            os.rename(aside, source)
        ours = {staged + path[len(place) :] for path in old}
        for path in self.list_files(staged).keys() - ours:
            kept = target / path[len(staged) + 1 :]
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.root / path, kept)
        for parent, folders, names in os.walk(source, onerror=raise_error if source.exists() else None):
            if not folders and not names:
                (target / Path(parent).relative_to(source)).mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self, owner: Mapping[str, str]) -> Iterator[None]:
        """Hold the place for one run. The lock is the operating system's, and ends with the process."""
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = json.loads(self.read(OWNER) or b"{}")
                who = "run {run} on {host} since {since}".format(**other) if other else "a run that has just begun"
                raise Stop(f"{self}: held by {who}; try again when it has ended", code=4) from None
            try:
                self.write(OWNER, json.dumps(owner).encode())
                yield
            finally:
                with uninterrupted(), contextlib.suppress(OSError):
                    self.delete([SCRATCH, OWNER])
        finally:
            os.close(handle)


def raise_error(error: OSError) -> NoReturn:
    raise error


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where this system or file system has no such step."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def open_place(text: str) -> Folder:
    """The storage behind a place."""
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Folder(text)
    if scheme.lower() in ("s3", "s3a"):
        raise Stop(f"{scheme}://…: this version reads and writes folders only, not S3 yet")
    raise Stop(f"{scheme}://…: a place is a folder, or an s3:// or s3a:// URL")


def check_places(source: Folder, target: Folder) -> None:
    """Refuse an output that the run could damage, or that could damage the run."""
    one, other = Path(os.path.realpath(source.root)), Path(os.path.realpath(target.root))
    if one == other or one in other.parents or other in one.parents:
        raise Stop(f"{target}: the output must be neither the input, nor inside it, nor around it ({source})")
    if target.root.exists() and not target.root.is_dir():
        raise Stop(f"{target}: the output is a file, not a folder")
    for path in (target.root / name for name in (*TABLES, RUNS, REJECTS, STAGING)):
        if path.is_symlink():
            raise Stop(f"{path}: a link; the output's own folders may not lead elsewhere")


# =====================================================================================================================
# Session: the one place that knows which engine this is
# =====================================================================================================================


class Engine(NamedTuple):
    """An open engine. `reading` and `writing` turn a path on disk into what the engine takes for that path."""

    name: str
    version: str
    spark: SparkSession
    stop: Callable[[], None]

    def writing(self, path: Path) -> str:
        return "file://" + (urllib.parse.quote(str(path)) if self.name == "sail" else str(path))

    def reading(self, path: Path) -> str:
        """Spark takes every path for a pattern, Sail only what is no URL."""
        return self.writing(path) if self.name == "sail" else re.sub(r"([\\*?{}\[\]])", r"\\\1", self.writing(path))

    def read(self, path: Path, ddl: str | None = None) -> DataFrame:
        reader = self.spark.read.schema(ddl) if ddl else self.spark.read
        return reader.parquet(self.reading(path))

    def write(self, rows: DataFrame, path: Path, folders: Sequence[str] = ()) -> None:
        writer = rows.write.option("compression", "zstd")
        (writer.partitionBy(*folders) if folders else writer).parquet(self.writing(path))


def choose_engine(asked: str) -> str:
    given = "PYSPARK_GATEWAY_PORT" in os.environ or os.environ.get("SPARK_REMOTE")
    return asked if asked != "auto" else "spark" if given else "sail"


# What a Spark on this machine starts with; a cluster's settings belong to its submit command.
LOCAL_SPARK = {
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.driver.host": "127.0.0.1",  # a laptop's own name often leads nowhere
    "spark.sql.shuffle.partitions": str(os.cpu_count() or 1),
}


def check_engine(name: str) -> None:
    """Say in one line what the engine lacks; its own words come late and are a page long."""
    if "pyspark" not in globals():
        raise Stop("PySpark is not installed for this Python: use 'make run', or pip install -r requirements.txt")
    if name == "sail":
        if importlib.util.find_spec("pysail") is None or version_of("pysail") < (0, 7):
            raise Stop("pysail 0.7 is not installed: pip install -r requirements.txt, or use --engine spark")
        if not (3, 5) <= version_of("pyspark") <= (4, 2):
            raise Stop(f"Sail takes PySpark 3.5 to 4.2, not {pyspark.__version__}: install one, or use --engine spark")
    elif os.environ.get("SPARK_REMOTE"):
        remote = urllib.parse.urlsplit(os.environ["SPARK_REMOTE"])  # never told: it may hold a token
        try:
            socket.create_connection((remote.hostname or "", remote.port or 15002), timeout=10).close()
        except (OSError, ValueError):
            raise Stop("SPARK_REMOTE: nobody answers there; it is of the form sc://HOST:PORT") from None
    elif "PYSPARK_GATEWAY_PORT" not in os.environ:
        wanted = ("17", "21") if version_of("pyspark") >= (4, 0) else ("8", "11", "17")
        java = os.path.join(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
        try:
            words = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
        except (OSError, subprocess.CalledProcessError):
            words = ""
        found = re.search(r'version "(?:1\.)?(\d+)', words)
        if not found or found[1] not in wanted:
            needs = f"Spark {pyspark.__version__} needs Java {' or '.join(wanted)}"
            has = f"{java} is Java {found[1]}" if found else f"{java} does not run"
            raise Stop(f"{needs}, and {has}: set JAVA_HOME to one, or use --engine sail, which needs none")


def version_of(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def open_engine(name: str) -> Engine:
    """Start the engine, or join the one that spark-submit or SPARK_REMOTE gives. Sets only what changes results."""
    engine = open_sail() if name == "sail" else open_spark()
    engine.spark.conf.set("spark.sql.session.timeZone", "UTC")  # rules hour(), year() and the rest
    engine.spark.conf.set("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS")  # INT96 has no zone
    return engine


def open_sail() -> Engine:
    os.environ.setdefault("RUST_LOG", "error")  # else it logs every start to the console
    os.environ.update(no_grpc_proxy="127.0.0.1")  # the server is in this process, whatever proxy there is
    os.environ.pop("MASTER", None)  # PySpark takes it for a second engine
    try:
        import pysail
        from pysail.spark import SparkConnectServer
    except ImportError as error:
        raise Stop(f"pysail is broken: {error}; pip install -r requirements.txt, or use --engine spark") from None
    server = SparkConnectServer(port=0)
    server.start(background=True)
    host, port = server.listening_address
    spark = SparkSession.builder.remote(f"sc://{host}:{port}").create()
    # Else binaryFile reads a file twice where the plan cuts it into byte ranges.
    spark.sql("SET datafusion.optimizer.repartition_file_scans=false")

    def stop() -> None:
        spark.stop()
        server.stop()

    return Engine("sail", pysail.__version__, spark, stop)


def open_spark() -> Engine:
    builder = SparkSession.builder.appName("etl.py")
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        spark = builder.config("spark.log.level", "WARN").getOrCreate()
    elif os.environ.get("SPARK_REMOTE"):
        spark = builder.remote(os.environ["SPARK_REMOTE"]).create()
    else:
        for key, value in LOCAL_SPARK.items():
            builder = builder.config(key, value)
        with quiet_stderr():
            spark = builder.getOrCreate()
    return Engine("spark", spark.version, spark, spark.stop)


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep what a starting Java writes to stderr, then and later, off the console; show it if the start fails."""
    sys.stderr.flush()
    console = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except Exception:
            log.seek(0)
            os.write(console, log.read())
            raise
        finally:
            os.dup2(console, 2)
            os.close(console)


# =====================================================================================================================
# Read: every line of the input once, and proof of it
# =====================================================================================================================

BROKEN_ARCHIVE = (EOFError, zlib.error, gzip.BadGzipFile)
UNKNOWN = -1  # bytes of a packed file that the engine unpacks
PART = 32 * 1024 * 1024  # bytes; Sail holds a file in memory several times over


def read_lines(engine: Engine, place: Folder, folder: str, files: Files, parts: Folder) -> tuple[DataFrame, Files]:
    r"""Rows (source_file, line, bytes) of a folder of the input, and the bytes to find in each of its files.

    A line ends at \n; its trailing \r and the file's BOM are dropped, bytes that are not UTF-8 become U+FFFD. Over
    a file, `bytes` adds up to its size, give or take a BOM and a last \n: that is the proof of the read. Packed and
    big files, which Sail cannot read or would hold in memory whole, are first cut into parts below `parts`.
    """
    if engine.name == "spark":
        sizes = {path: UNKNOWN if path.endswith(".gz") else size for path, size in files.items()}
        return read_text(engine, place, folder), sizes
    for path in (path for path in files if re.search(r"/(path|length|content|modificationTime)=", path)):
        raise Stop(f"{place.root / path}: Sail takes this folder's name for a column of its own; use --engine spark")
    cut = [path for path, size in files.items() if path.endswith(".gz") or size > 2 * PART]
    sizes = {path: size for path, size in files.items() if path not in set(cut)}
    all_packed = all(path.endswith(".gz") for path in cut)  # then the pattern tells them from the others
    frames = [read_binary(engine, place, [folder] if all_packed else list(sizes))] if sizes else []
    if cut:
        sizes.update((path, cut_up(place, path, parts)) for path in cut)
        pieces = read_binary(engine, parts, [folder])
        frames.append(pieces.withColumn("source_file", F.regexp_replace("source_file", r"/[0-9]+\.json$", "")))
    return functools.reduce(lambda one, other: one.unionByName(other), frames), sizes


def read_text(engine: Engine, place: Folder, folder: str) -> DataFrame:
    reader = engine.spark.read.option("recursiveFileLookup", "true").option("pathGlobFilter", "*.{json,json.gz}")
    raw = reader.option("lineSep", "\n").text(engine.reading(place.root / folder))
    # A path comes as a URL, but for its + signs. PySpark 3.5 has no make_valid_utf8, and there decode mends.
    path = "regexp_replace(url_decode(replace(_metadata.file_path, '+', '%2B')), '^file:/+', '/')"
    valid = "make_valid_utf8(value)" if hasattr(F, "make_valid_utf8") else "decode(CAST(value AS binary), 'UTF-8')"
    return raw.select(
        F.expr(f"substring({path}, {len(str(place)) + 2})").alias("source_file"),
        without_carriage_return(F.expr(valid)).alias("line"),
        (F.octet_length("value") + 1).cast("bigint").alias("bytes"),
    )


def read_binary(engine: Engine, place: Folder, paths: Sequence[str]) -> DataFrame:
    reader = engine.spark.read.format("binaryFile").option("recursiveFileLookup", "true")
    raw = reader.option("pathGlobFilter", "*.json").load([engine.reading(place.root / path) for path in paths])
    text = raw.select("path", "length", F.expr("make_valid_utf8(content)").alias("text"))
    text = text.withColumn("text", F.expr(r"if(endswith(text, '\n'), substr(text, 1, length(text) - 1), text)"))
    lines = text.select("path", "length", F.posexplode(F.split("text", "\n")).alias("i", "line"))
    # An empty file has no line, nor has one of a BOM alone. Each half of the filter needs the line: one that does
    # not would run before the split, and gather thousands of files in memory there.
    lines = lines.where("NOT (line = '' AND length = 0 OR line = '\ufeff' AND length = 3)")
    first, line = F.col("i") == 0, F.col("line")
    without_bom = F.when(first & line.startswith("\ufeff"), F.expr("substring(line, 2)")).otherwise(line)
    return lines.select(  # a path comes without scheme and leading slash
        F.substring("path", len(str(place)) + 1, 2**31 - 1).alias("source_file"),
        without_carriage_return(without_bom).alias("line"),
        F.when(first, F.col("length")).otherwise(0).alias("bytes"),
    )


def without_carriage_return(line: Column) -> Column:
    return F.when(line.endswith("\r"), F.regexp_replace(line, "\r$", "")).otherwise(line)


def cut_up(place: Folder, path: str, parts: Folder) -> int:
    """Copy a file, unpacked, into parts that end where a line ends; return their bytes."""
    size, rest, target = 0, b"", parts.root / path
    target.mkdir(parents=True)

    def put(part: bytes) -> int:
        if size and part.startswith(codecs.BOM_UTF8):  # not at the file's start, so it stays: the reader drops one
            part = codecs.BOM_UTF8 + part
        return size + (target / f"{size}.json").write_bytes(part)

    try:
        with place.open(path) as file:
            while block := file.read(PART):
                head, end, rest = (rest + block).rpartition(b"\n")
                size = put(head + end)
    except BROKEN_ARCHIVE as error:
        raise Stop(f"{place.root / path}: a broken archive: {error}") from None
    return put(rest)


def prove_read(place: Folder, found: Mapping[str, int], expected: Files) -> None:
    """Every file was read, and each once: bytes as listed, but for a BOM and a last line end."""
    for path in sorted({*expected, *found}):
        read, listed = found.get(path, 0), expected.get(path, 0)
        if listed == UNKNOWN:
            with place.open(path) as archive:
                proven = path in found or not archive.read(1)
        else:
            proven = read - listed in (-3, -2, 0, 1) and (path in found or listed in (0, 3))
        if not proven:
            raise Stop(f"{path}: {listed} bytes were listed and {read} were read; this run cannot be trusted", code=1)


# =====================================================================================================================
# Stage: one row a line, with its fate
# =====================================================================================================================

# What from_json must not take: Spark would, Sail would not.
STRICT_JSON = {
    "allowSingleQuotes": "false",
    "allowNonNumericNumbers": "false",
    "maxNestingDepth": "127",  # Sail's own limit
    "maxStringLen": str(2**31 - 1),
    "columnNameOfCorruptRecord": "_fault",  # Spark reads on behind a value that it could not read, and tells so here
}
INFINITY = float("inf")
HEX = "[0-9a-fA-F]"
GOOD_ESCAPE = (
    rf"\\(\\|u[dD][89abAB]{HEX}{HEX}\\u[dD][c-fC-F]{HEX}{HEX}|u[0-9abcefABCEF]{HEX}{HEX}{HEX}|u[dD][0-7]{HEX}{HEX})"
)


def stage_lines(lines: DataFrame, source: Source) -> DataFrame:
    """One row per input line: source_file, bytes, its fate, and the contract's fields as typed columns.

    `reason` is null where the line is accepted, else 'blank' or why it is rejected, with the JSON `field` at
    fault; only a rejected line keeps its text. The engines' from_json differ on odd lines: a line that either
    may have taken too kindly, or not at all, gets a closer and slower look that both agree on.
    """
    typed = ", ".join([*(f"{field.name} {field.type}" for field in source.fields), "_fault string"])
    lines = lines.withColumn("_text", F.btrim("line", F.lit(" \t\r")))
    rows = lines.withColumn("_json", F.from_json("_text", typed, STRICT_JSON)).select(
        "source_file", "bytes", "line", "_text", "_json._fault", *(typed_column(field) for field in source.fields)
    )
    signs, closer = [~looks_whole(source), F.col("_text").contains(r"\u")], []
    signs += [F.col(field.column).isNull() for field in source.fields if field.type == "bigint"]
    signs += [F.abs(field.column) == INFINITY for field in source.fields if field.type == "double"]
    for field in source.fields:
        if field.required:
            applies, value = F.expr(field.when), F.col(field.column)
            closer.append((applies & value.isNull(), missing_or_wrong_type(field)))
            if field.type == "string" and not field.may_be_empty:
                closer.append((applies & (value == ""), fault("missing", field)))
            closer.append((applies & ~F.expr(field.domain), fault("out_of_domain", field)))
    signs += [sign for sign, _ in closer]
    fate = F.when(F.col("_text") == "", fault("blank")).when(is_no_object(source), fault("not_an_object"))
    for sign, found in closer:
        fate = fate.when(sign, found)
    suspect = functools.reduce(operator.or_, (F.coalesce(sign, F.lit(False)) for sign in signs))
    fate = F.when(suspect, fate)  # spares nearly all lines the closer looks
    rejected = F.col("_fate.reason") != "blank"
    return rows.withColumn("_fate", fate).select(
        "source_file",
        "bytes",
        "_fate.reason",
        "_fate.field",
        F.when(rejected, F.substring("line", 1, MAX_REJECTED_LINE)).alias("line"),
        *(field.column for field in source.fields),
    )


def typed_column(field: Field) -> Column:
    value = F.col(f"_json.{field.name}")
    if field.type == "double":
        # Sail's from_json is one unit off in the last place of long numbers; a cast is not.
        is_long = F.col("_text").rlike("[-.0-9]{17}|[0-9][eE][-+]?[0-9]")
        written = F.expr(f"try_cast(get_json_object(_text, '$.{field.name}') AS double)")
        exact = F.when(F.abs(written - value) <= F.abs(value) * 1e-12, written).otherwise(value)
        value = F.when(value.isNotNull() & is_long, exact).otherwise(value) + 0.0  # -0.0 becomes 0.0
    return value.alias(field.column)


def fault(reason: str, field: Field | None = None) -> Column:
    name = F.lit(field.name if field else None).cast("string")
    return F.struct(F.lit(reason).alias("reason"), name.alias("field"))


def missing_or_wrong_type(field: Field) -> Column:
    """Typed parsing gives null for both; read as text, only what is absent or null still is."""
    text = F.from_json("_text", f"{field.name} string", STRICT_JSON)[field.name]
    return F.when(F.coalesce(text, F.lit("")) == "", fault("missing", field)).otherwise(fault("wrong_type", field))


def looks_whole(source: Source) -> Column:
    """True where from_json found the first field and lost none, and the one closing brace is the last character."""
    text = F.col("_text")
    first = F.col(source.fields[0].column)
    return first.isNotNull() & F.col("_fault").isNull() & (F.locate("}", text) == F.length(text))


def is_no_object(source: Source) -> Column:
    """True where the text is not exactly one JSON object, or holds a number or an escape that no engine can keep."""
    text = F.col("_text")
    # A text that follows the object is found by the array that the line makes with its own digest.
    pair = F.from_json(F.concat(F.lit("["), text, F.lit(',"'), F.md5(text), F.lit('"]')), "array<string>", STRICT_JSON)
    is_whole = text.startswith("{") & (F.size(pair) == 2) & (F.element_at(pair, -1) == F.md5(text))
    broken = F.when(looks_whole(source), F.lit(False)).otherwise(~F.coalesce(is_whole, F.lit(False)))
    # A lone half of a surrogate pair, or an escape cut short.
    bad_escape = F.when(text.contains(r"\u"), F.regexp_replace(text, GOOD_ESCAPE, "").contains(r"\u"))
    integers = [field for field in source.fields if field.type == "bigint"]
    as_doubles = F.from_json(text, ", ".join(f"{field.name} double" for field in integers), STRICT_JSON)
    past_64_bits = [
        F.when(F.col(field.column).isNull(), F.abs(as_doubles[field.name]) >= 2.0**63) for field in integers
    ]
    past_double = [F.abs(field.column) == INFINITY for field in source.fields if field.type == "double"]
    odd = [F.coalesce(condition, F.lit(False)) for condition in (bad_escape, *past_64_bits, *past_double)]
    return functools.reduce(operator.or_, odd, broken)


# =====================================================================================================================
# Build: DataFrame -> DataFrame, nothing else
# =====================================================================================================================

PLAY_KEY = ("user_id", "session_id", "item_in_session", "ts")
# Of a play's copies the smallest wins; the source file only makes the choice complete.
PLAY_ORDER = (
    *("level", "song", "artist", "length", "location", "user_agent", "first_name", "last_name", "gender"),
    "source_file",
)


def first_of(rows: DataFrame, key: Sequence[str], *order: str) -> DataFrame:
    """One row per key: the first in the order; unknown sorts last, text by code point. "-name" is descending."""
    columns = [
        F.col(name[1:]).desc_nulls_last() if name.startswith("-") else F.col(name).asc_nulls_last() for name in order
    ]
    rank = F.row_number().over(Window.partitionBy(*key).orderBy(*columns))
    return rows.withColumn("_rank", rank).where("_rank = 1").drop("_rank")


def stage_songs(song_lines: DataFrame) -> DataFrame:
    """One row per accepted song line; year 0 where it is missing or unusable."""
    songs = song_lines.where("reason IS NULL").drop("bytes", "reason", "field", "line")
    return songs.withColumn("year", F.expr("coalesce(try_cast(year AS int), 0)"))


def stage_plays(log_lines: DataFrame) -> DataFrame:
    """One row per play: of the lines with page NextSong, one for each identity, however often it was delivered."""
    plays, key = plays_of(log_lines), list(PLAY_KEY)
    # Few plays repeat: finding them first takes a third of the time that ordering all of them does.
    repeated = plays.groupBy(*key).agg(F.count("*").alias("_copies")).where("_copies > 1").drop("_copies")
    once = plays.join(repeated, key, how="left_anti")
    return once.unionByName(first_of(plays.join(repeated, key, how="left_semi"), key, *PLAY_ORDER))


def plays_of(log_lines: DataFrame) -> DataFrame:
    """One row per accepted line with page NextSong."""
    plays = log_lines.where("reason IS NULL").where(PLAY).drop("bytes", "reason", "field", "line", "page")
    return plays.withColumn("user_id", F.expr("try_cast(user_id AS bigint)"))


def build_tables(songs: DataFrame, plays: DataFrame) -> dict[str, DataFrame]:
    """The whole transformation: the five tables, from staged songs and plays."""
    tables = {
        "songplays": build_songplays(plays, songs),
        "users": build_users(plays),
        "songs": build_songs(songs),
        "artists": build_artists(songs),
        "time": build_time(plays),
    }
    return {
        name: frame.select(*(F.col(column).cast(kind).alias(column) for column, kind in TABLES[name].types.items()))
        for name, frame in tables.items()
    }


def build_songplays(plays: DataFrame, songs: DataFrame) -> DataFrame:
    """One row per play, with its song where title, artist name and duration are exactly a catalogue line's.

    Where several songs are described alike, the lowest song_id, then artist_id, is meant: a play never multiplies.
    """
    identity = " || '|' || ".join(f"CAST({name} AS string)" for name in PLAY_KEY)
    description = ("title", "artist_name", "duration")
    catalogue = first_of(songs.select(*description, "song_id", "artist_id"), description, "song_id", "artist_id")
    is_song = (F.col("song") == F.col("title")) & (F.col("artist") == F.col("artist_name"))
    matched = plays.join(catalogue, is_song & (F.col("length") == F.col("duration")), how="left")
    return with_calendar(matched).withColumn("songplay_id", F.expr(f"md5({identity})"))


def build_users(plays: DataFrame) -> DataFrame:
    """One row per user who played, whole from their latest play: greatest ts, then session, then item."""
    return first_of(plays, ("user_id",), "-ts", "-session_id", "-item_in_session")


def build_songs(songs: DataFrame) -> DataFrame:
    """One row per song_id: the line with the greatest year, then the smallest title, artist_id and duration."""
    return first_of(songs, ("song_id",), "-year", "title", "artist_id", "duration")


def build_artists(songs: DataFrame) -> DataFrame:
    """One row per artist_id: the description that most of its songs carry, taken whole.

    Ties: fewest unknown fields, then smallest name, location, latitude, longitude. An empty location is unknown.
    """
    description = ("name", "location", "lattitude", "longitude")
    described = songs.selectExpr(
        "artist_id",
        "song_id",
        "artist_name AS name",
        "nullif(artist_location, '') AS location",
        "artist_latitude AS lattitude",
        "artist_longitude AS longitude",
    )
    counted = described.groupBy("artist_id", *description).agg(F.countDistinct("song_id").alias("_songs"))
    unknown = " + ".join(f"CAST({name} IS NULL AS int)" for name in description)
    return first_of(
        counted.withColumn("_unknown", F.expr(unknown)), ("artist_id",), "-_songs", "_unknown", *description
    )


def build_time(plays: DataFrame) -> DataFrame:
    """One row per instant at which anybody played, in UTC: ISO week, weekday 1 = Sunday to 7 = Saturday."""
    return with_calendar(plays.select("ts").distinct())


def with_calendar(rows: DataFrame) -> DataFrame:
    """Add start_time from ts, and its parts; the session's zone is UTC."""
    rows = rows.withColumn("start_time", F.timestamp_millis("ts"))
    parts = {"year": F.year, "month": F.month, "day": F.dayofmonth, "hour": F.hour}
    parts.update(week=F.weekofyear, weekday=F.dayofweek)
    return rows.select("*", *(part("start_time").alias(name) for name, part in parts.items()))


def write_table(engine: Engine, rows: DataFrame, table: Table, path: Path, at_most: int) -> None:
    """Write a table, one file a partition up to about a million rows and more beyond."""
    folders = list(table.partitions)
    if at_most <= ROWS_PER_FILE:
        rows = rows.repartition(*folders) if folders else rows.repartition(1, table.key)
    else:
        files, total = F.when(F.lit(False), 1), 0
        for row in rows.groupBy(*folders).count().collect():
            here = functools.reduce(operator.and_, (F.col(name) == row[name] for name in folders), F.lit(True))
            wanted = -(-row["count"] // ROWS_PER_FILE)
            files, total = files.when(here, wanted), total + wanted
        # Four times the room, so that few files meet in one task and become one. Sail makes one of them in any case.
        rows = rows.withColumn("_file", F.pmod(F.xxhash64(table.key), files))
        rows = rows.repartition(4 * total if total > 1 else 1, *folders, "_file").drop("_file")
    engine.write(rows, path, folders)


# =====================================================================================================================
# Audit: what is about to be published keeps the contract; it only queries
# =====================================================================================================================


class Check(NamedTuple):
    """A rule of the contract, how many rows of the staged table break it, and up to three of them."""

    table: str
    rule: str
    failed: int
    examples: list[str]


ACCOUNTS = (
    ("song", "lines", ("blank", "accepted", "rejected")),
    ("song", "accepted", ("songs", "repeats")),  # a repeat may be an older version
    ("log", "lines", ("blank", "accepted", "rejected")),
    ("log", "accepted", ("plays", "other_pages")),
    ("log", "plays", ("songplays", "repeats")),
)


def audit_tables(engine: Engine, folder: Path, counted: Mapping[str, int]) -> list[Check]:
    """Every rule, asked of the tables as staged. They follow from the rules above: a failure is the job's fault."""
    checks = [audit_types(engine.read(folder / name), name) for name in TABLES]
    sound = [check.table for check in checks if not check.failed]
    frames = read_tables(engine, folder, sound)
    for name, frame in frames.items():
        checks += audit_rows(frame, name, counted[name])
        checks += audit_references(frame, name, frames)
    if "users" in frames and "songplays" in frames:
        checks.append(audit_levels(frames["users"], frames["songplays"]))
    return checks


def read_tables(engine: Engine, folder: Path, names: Iterable[str] = TABLES) -> dict[str, DataFrame]:
    """Tables as a reader sees them. The types of the folders' columns have to be told."""
    ddl = {name: ", ".join(f"{column} {kind}" for column, kind in TABLES[name].types.items()) for name in names}
    return {name: engine.read(folder / name, ddl[name]) for name in ddl}


def audit_accounts(inputs: Mapping[str, Mapping[str, int]]) -> list[Check]:
    """Every line of the input has one fate."""
    checks = []
    for kind, total, parts in ACCOUNTS:
        off = abs(inputs[kind][total] - sum(inputs[kind][part] for part in parts))
        lost = min(inputs[kind][part] for part in parts) < 0
        checks.append(Check(f"{kind} lines", f"{total} = {' + '.join(parts)}", off or int(lost), []))
    return checks


def audit_types(frame: DataFrame, name: str) -> Check:
    found = {field.name: field.dataType.simpleString() for field in frame.schema}
    stored = {column: kind for column, kind in found.items() if column not in TABLES[name].partitions}
    wrong = sorted(dict(TABLES[name].stored.items() ^ stored.items()))
    return Check(
        name, "columns and types", len(wrong), [f"{column} {found.get(column, 'missing')}" for column in wrong]
    )


def row_rules(table: Table) -> dict[str, str]:
    """Rule -> the SQL of the rows that break it."""
    rules = {f"{column} is set": f"{column} IS NULL" for column in (table.key, *table.required)}
    rules.update((f"{column}: {accepted}", f"NOT ({accepted})") for column, accepted in table.accepted.items())
    for column, value in table.partitions.items():
        rules[f"folder {column} agrees"] = f"{column} IS NULL OR {column} <> {value}"
    return rules


def audit_rows(frame: DataFrame, name: str, counted: int) -> list[Check]:
    """One pass over the table; what fails is looked at again, for examples."""
    key, rules = TABLES[name].key, row_rules(TABLES[name])
    sums = [F.count_if(F.expr(f"coalesce({sql}, false)")) for sql in rules.values()]
    rows, keys, distinct, *failed = frame.agg(F.count("*"), F.count(key), F.countDistinct(key), *sums).collect()[0]
    checks = [found(name, rule, count, frame.where(sql)) for (rule, sql), count in zip(rules.items(), failed)]
    repeated = frame.where(f"{key} IS NOT NULL").groupBy(key).count().where("count > 1")
    checks.append(found(name, f"{key} is unique", keys - distinct, repeated))
    return [*checks, Check(name, f"{counted} rows, as accounted for", abs(rows - counted), [f"{rows} rows"])]


def audit_references(frame: DataFrame, name: str, frames: Mapping[str, DataFrame]) -> list[Check]:
    references = {column: to for column, to in TABLES[name].references.items() if to in frames}
    rows = frame.select(*{TABLES[name].key: None, **references})
    for column, to in references.items():
        keys = frames[to].select(F.col(TABLES[to].key).alias(f"_{to}")).distinct()
        rows = rows.join(keys, F.col(column) == F.col(f"_{to}"), how="left")
    orphans = {column: f"{column} IS NOT NULL AND _{to} IS NULL" for column, to in references.items()}
    counts = rows.agg(F.count("*"), *(F.count_if(F.expr(sql)) for sql in orphans.values())).collect()[0][1:]
    rules = [f"{column} is in {to}" for column, to in references.items()]
    return [found(name, rule, count, rows.where(sql)) for rule, sql, count in zip(rules, orphans.values(), counts)]


def audit_levels(users: DataFrame, songplays: DataFrame) -> Check:
    """A user's level is one that they had at the instant of their latest play."""
    latest = songplays.groupBy("user_id").agg(F.max("start_time").alias("start_time"))
    levels = songplays.join(latest, ["user_id", "start_time"], how="inner").select("user_id", "level").distinct()
    stale = users.join(levels, ["user_id", "level"], how="left_anti")
    return found("users", "level is the latest play's", int(stale.count()), stale)  # PySpark 3.5 gives numpy's


def found(table: str, rule: str, failed: int, rows: DataFrame) -> Check:
    return Check(table, rule, failed, [str(row)[:200] for row in rows.limit(3).collect()] if failed else [])


# =====================================================================================================================
# Publish: the journal is the commit point; all that follows it can be done again
# =====================================================================================================================

KEPT_RUNS = 30


def read_record(target: Folder, path: str) -> dict[str, Any]:
    """A run's record, or a journal; an empty one where there is none."""
    with contextlib.suppress(ValueError):
        record: Any = json.loads(target.read(path) or "{}")
        if isinstance(record, dict):
            return record
    raise Stop(f"{target.root / path}: damaged, or not written by this job; move it away")


def latest_tables(target: Folder) -> dict[str, Any]:
    """The tables of the last published run."""
    return dict(read_record(target, LATEST).get("tables", {}))


def write_record(target: Folder, path: str, record: Mapping[str, Any]) -> None:
    target.write(path, json.dumps(record, indent=1, ensure_ascii=False).encode())


def check_origin(target: Folder) -> None:
    """Refuse an output whose tables no run of this job accounts for."""
    published = {*latest_tables(target), *read_record(target, JOURNAL).get("record", {}).get("tables", {})}
    for name in TABLES:
        if target.exists(name) and (name not in published or not (target.root / name).is_dir()):
            raise Stop(f"{target.root / name}: not written by this job; move it away, or choose another output")


def recover(target: Folder) -> None:
    """Finish what a killed run had committed, remove what it had not."""
    if target.exists(JOURNAL):
        publish(target)
    clean(target)


def clean(target: Folder) -> None:
    """Remove the staging and rejects of runs that left no record, and records beyond the newest."""
    runs = [name for name in target.list_names(RUNS) if re.fullmatch(RUN_NAME.pattern + r"\.json", name)]
    kept = {name[: -len(".json")] for name in runs[-KEPT_RUNS:]} | {read_record(target, LATEST).get("run")}
    dead = [f"{RUNS}/{name}" for name in runs if name[: -len(".json")] not in kept]
    for folder, keep in ((REJECTS, kept), (STAGING, set())):
        names = (name for name in target.list_names(folder) if RUN_NAME.fullmatch(name))
        dead += [f"{folder}/{name}" for name in names if name not in keep]
    target.delete([*dead, SCRATCH])


def commit(target: Folder, record: Mapping[str, Any]) -> None:
    """Write the journal: what comes and what goes, for every table. From here on the new lake is the lake."""
    old = {name: list(table["files"]) for name, table in latest_tables(target).items()}
    for table in record["tables"].values():
        target.settle(f"{STAGING}/{record['run']}/tables/{path}" for path in table["files"])
    write_record(target, JOURNAL, {"record": record, "old": old})


def publish(target: Folder) -> None:
    """Bring the new in, tell of it, take the old out. Every step can be repeated."""
    journal = read_record(target, JOURNAL)
    record, old = journal["record"], journal["old"]
    for name, table in record["tables"].items():
        target.bring_in(f"{STAGING}/{record['run']}/tables/{name}", name, table["files"], old.get(name, []))
    keep_record(target, record)
    write_record(target, LATEST, record)
    target.delete(path for paths in old.values() for path in paths)
    clean(target)
    target.delete([JOURNAL])


def keep_record(target: Folder, record: Mapping[str, Any]) -> None:
    """Keep what a run rejected, and its record, whether it was published or not."""
    staged, place = f"{STAGING}/{record['run']}/rejects", f"{REJECTS}/{record['run']}"
    files = list(target.list_files(staged))
    target.delete(path for path in files if not is_data(path))
    if any(is_data(path) for path in files):
        target.bring_in(staged, place, [place + path[len(staged) :] for path in files if is_data(path)], [])
    write_record(target, f"{RUNS}/{record['run']}.json", record)


def is_data(path: str) -> bool:
    """Not one of the markers and checksums that Spark leaves beside its files."""
    return re.search(r"/[^/_.][^/]*\.parquet$", path) is not None


# =====================================================================================================================
# Report: the same for a person and, as _runs/<run>.json, for a program
# =====================================================================================================================


class Clock:
    """Tells the steps of a run on stderr: live on a terminal, else a line a step; remembers their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        begin, ended, live = time.monotonic(), threading.Event(), sys.stderr.isatty()

        def tick() -> None:
            while not ended.wait(0.1):
                print(f"\r{name:<20}{time.monotonic() - begin:7.1f} s", end="", file=sys.stderr, flush=True)

        ticker = threading.Thread(target=tick, daemon=True)
        if live:
            ticker.start()
        try:
            yield
        finally:
            ended.set()
            if live:
                ticker.join()
                print(end="\r\x1b[K", file=sys.stderr, flush=True)
        self.seconds[name] = round(time.monotonic() - begin, 3)
        if not live:
            with contextlib.suppress(OSError):  # nobody reads it
                sys.stderr.write(f"{name:<20}{self.seconds[name]:7.1f} s\n")


FATES = {
    "lines": "true",
    "blank": "reason = 'blank'",
    "accepted": "reason IS NULL",
    "rejected": "reason <> 'blank'",
}
LOG_FATES = {
    "plays": f"reason IS NULL AND {PLAY}",
    "other_pages": f"reason IS NULL AND NOT ({PLAY})",
    "logged_out": f"reason IS NULL AND NOT ({PLAY}) AND coalesce(user_id, '') = ''",
}


def account(kind: str, staged: DataFrame) -> tuple[dict[str, int], dict[str, int]]:
    """The bytes read of each file, and the lines of a kind of input by their fate."""
    fates = {**FATES, **(LOG_FATES if kind == "log" else {})}
    counts = (F.count_if(F.expr(sql)).alias(name) for name, sql in fates.items())
    rows = staged.groupBy("source_file").agg(F.sum("bytes").alias("bytes"), *counts).collect()
    return {row["source_file"]: row["bytes"] for row in rows}, {name: sum(row[name] for row in rows) for name in fates}


def summarize_rejects(rejects: DataFrame) -> list[dict[str, Any]]:
    """Rejected lines by kind, reason and field, most frequent first, with an example each."""
    example = F.min(F.struct("source_file", F.substring("line", 1, 80)))
    rows = rejects.groupBy("kind", "reason", "field").agg(F.count("*"), example).collect()
    names = ("kind", "reason", "field", "lines", "source_file", "example")
    groups = [dict(zip(names, (*row[:4], *row[4]))) for row in rows]
    return sorted(groups, key=lambda group: (-group["lines"], group["kind"], group["reason"], group["field"] or ""))


def tell(record: Mapping[str, Any]) -> str:
    """The report of a run as text."""
    lines = [f"run {record['run']}: {record['status']}", f"{record['input']} -> {record['output']}"]
    for kind, n in record["inputs"].items():
        lines += ["", f"{kind + ' lines':<12}{n['lines']:>12,}  in {n['files']:,} files of {n['bytes']:,} bytes"]
        lines += [f"{name:<12}{n[name]:>12,}" for name in ("blank", "accepted", "rejected")]
        for group in (group for group in record["rejects"] if group["kind"] == kind):
            what = " ".join(filter(None, (group["reason"], group["field"])))
            lines.append(f"  {what}: {group['lines']:,}, such as {group['example']!r} in {group['source_file']}")
        if kind == "song" and "songs" in n:
            lines.append(f"accepted = {n['songs']:,} songs + {n['repeats']:,} repeats and older versions")
        if kind == "log":
            logged_out = f"({n['logged_out']:,} of them logged out)"
            lines.append(f"accepted = {n['plays']:,} plays + {n['other_pages']:,} other pages {logged_out}")
        if kind == "log" and "songplays" in n:
            lines.append(f"plays = {n['songplays']:,} songplays + {n['repeats']:,} repeats")
    if record["tables"]:
        lines += ["", f"{'table':<12}{'rows':>12}{'files':>8}{'bytes':>14}{'change':>12}"]
    for name, table in record["tables"].items():
        rows, before, files = table["rows"], table["before"], table["files"]
        change = ("new" if before is None else f"{rows - before:+,}") + (" SHRANK" if rows < (before or 0) else "")
        lines.append(f"{name:<12}{rows:>12,}{len(files):>8,}{sum(files.values()):>14,}{change:>12}")
    if "matched" in record:
        levels = ", ".join(f"{users:,} {level}" for level, users in record["levels"].items())
        lines += ["", f"{record['matched']:,} of {record['inputs']['log']['songplays']:,} songplays have a song"]
        lines.append(f"users by level: {levels}")
    for check in (check for check in record["audit"] if check["failed"]):
        lines.append(f"AUDIT {check['table']}: {check['rule']}: {check['failed']:,}, such as {check['examples']}")
    lines += [f"not this job's, left as it is: {path}" for path in record["foreign"][:5]]
    lines.append("seconds: " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in record["seconds"].items()))
    if record["status"] == "published":
        place = re.sub(r"([*?\[])", r"[\1]", record["output"]).replace("'", "''")
        glob = f"{place}/songplays/**/*.parquet"
        lines += [
            "",
            "in DuckDB:",
            f"  SELECT level, count(*) FROM read_parquet('{glob}') GROUP BY level ORDER BY level;",
        ]
    return "\n".join(lines)


# =====================================================================================================================
# Run: all of the above, in order
# =====================================================================================================================


class Run(NamedTuple):
    """One run: what it was asked, where it works, and the record that it fills in on the way."""

    settings: Settings
    source: Folder
    target: Folder
    clock: Clock
    record: dict[str, Any]

    @property
    def staging(self) -> Path:
        return self.target.root / STAGING / str(self.record["run"])


def run_job(settings: Settings) -> dict[str, Any]:
    """From listing the input to publishing the tables. The record is kept in any case, and returned of a success."""
    run = Run(settings, open_place(settings.input), open_place(settings.output), Clock(), {})
    check_places(run.source, run.target)
    name = choose_engine(settings.engine)
    check_engine(name)
    with run.clock.step("list input"):
        files, ignored = list_sources(run.source)
    begun = datetime.now(timezone.utc)
    run.record.update(format=1, run=f"{begun:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}", status="failed", error=None)
    run.record.update(started=begun.isoformat(timespec="seconds"), version=VERSION, engine=name)
    run.record.update(input=str(run.source), output=str(run.target), settings=settings._asdict(), inputs={}, rejects=[])
    run.record.update(tables={}, audit=[], ignored=ignored, foreign=[], seconds=run.clock.seconds)
    owner = {"run": run.record["run"], "host": socket.gethostname(), "since": run.record["started"]}
    with run.target.locked(owner):
        try:
            check_origin(run.target)
            recover(run.target)
            with run.clock.step("start engine"):
                engine = open_engine(name)
            catch_signals()  # Spark has put a handler of its own in place
            try:
                run.record["engine"] = f"{engine.name} {engine.version}"
                stage_tables(run, engine, files)
            finally:
                stop(engine)
            with run.clock.step("publish"), uninterrupted():
                run.record["status"] = "published"
                commit(run.target, run.record)
                publish(run.target)
        except BaseException as error:
            with uninterrupted():
                give_up(run, error)
            raise
    return run.record


def stop(engine: Engine) -> None:
    """Stop the engine; one that a signal has left unable to stop is not waited for."""

    def try_to() -> None:
        with contextlib.suppress(Exception):  # it may have been killed with the run
            engine.stop()

    thread = threading.Thread(target=try_to, daemon=True)
    thread.start()
    thread.join(3 if SIGNALS else None)


def list_sources(source: Folder) -> tuple[dict[str, Files], list[str]]:
    """The files of each kind of input, and those that are neither."""
    listed = {kind: source.list_input(spec.folder) for kind, spec in SOURCES.items()}
    ignored = sorted(path for _, others in listed.values() for path in others)
    if ignored:
        warn(f"{len(ignored)} files are neither .json nor .json.gz and ignored: {', '.join(ignored[:3])}")
    return {kind: files for kind, (files, _) in listed.items()}, ignored


def stage_tables(run: Run, engine: Engine, files: Mapping[str, Files]) -> None:
    """Stage, build and audit the tables."""
    staged = {}
    for kind, source in SOURCES.items():
        with run.clock.step(f"read {kind} lines"):
            staged[kind] = stage_input(run, engine, source, files[kind])
    set_aside(run, engine, staged)
    check_accepted(run)
    with run.clock.step("stage plays"):
        songs = stage_songs(staged["song"])
        engine.write(stage_plays(staged["log"]), run.staging / "plays")
        plays = engine.read(run.staging / "plays")
    at_most = max(run.record["inputs"]["log"]["plays"], run.record["inputs"]["song"]["accepted"])
    for name, frame in build_tables(songs, plays).items():
        with run.clock.step(f"build {name}"):
            write_table(engine, frame, TABLES[name], run.staging / "tables" / name, at_most)
    with run.clock.step("audit"):
        counted = count_staged(run, songs, plays, staged["log"])
        list_tables(run, counted)
        checks = audit_accounts(run.record["inputs"]) + audit_tables(engine, run.staging / "tables", counted)
        run.record["audit"] = [check._asdict() for check in checks]
        check_audit(run)
        tables = read_tables(engine, run.staging / "tables")
        run.record["matched"] = int(tables["songplays"].where("song_id IS NOT NULL").count())
        levels = tables["users"].groupBy("level").count().orderBy("level").collect()
        run.record["levels"] = {row["level"]: row["count"] for row in levels}


def stage_input(run: Run, engine: Engine, spec: Source, files: Files) -> DataFrame:
    """Read and stage a kind of input, prove the read, account for every line and set the rejects aside."""
    lines, sizes = read_lines(engine, run.source, spec.folder, files, Folder(str(run.staging / "parts")))
    try:
        engine.write(stage_lines(lines, spec), run.staging / spec.kind)
    except Exception:
        name_broken_archive(run.source, files)
        raise
    staged = engine.read(run.staging / spec.kind)
    read, counts = account(spec.kind, staged)
    run.record["inputs"][spec.kind] = {"files": len(files), "bytes": sum(files.values()), **counts}
    prove_read(run.source, read, sizes)
    return staged


def set_aside(run: Run, engine: Engine, staged: Mapping[str, DataFrame]) -> None:
    """Stage the rejected lines of all kinds together."""
    if any(counts["rejected"] for counts in run.record["inputs"].values()):
        kinds = (frame.withColumn("kind", F.lit(kind)).select(*REJECT_COLUMNS) for kind, frame in staged.items())
        rejects = functools.reduce(lambda one, other: one.unionByName(other), kinds).where(FATES["rejected"])
        engine.write(rejects.repartition(1, "source_file"), run.staging / "rejects")
        run.record["rejects"] = summarize_rejects(rejects)


def name_broken_archive(source: Folder, files: Files) -> None:
    """An engine's own words for a broken archive are a page long."""
    for path in (path for path in files if path.endswith(".gz")):
        try:
            with source.open(path) as archive:
                while archive.read(PART):
                    pass
        except BROKEN_ARCHIVE as error:
            raise Stop(f"{source.root / path}: a broken archive: {error}") from None


def check_accepted(run: Run) -> None:
    """Refuse an input of which too much was rejected, or nothing is left."""
    for kind, n in run.record["inputs"].items():
        rejected, seen = n["rejected"], n["accepted"] + n["rejected"]
        if rejected > run.settings.max_rejects * seen:
            told = f"{rejected:,} of {seen:,} {kind} lines were rejected, a share of {rejected / seen:.4f}"
            raise Stop(f"{told}; --max-rejects allows {run.settings.max_rejects}", code=3)
        if not n["plays" if kind == "log" else "accepted"]:
            raise Stop(f"the input holds not one usable {'play' if kind == 'log' else 'song line'}", code=3)


def count_staged(run: Run, songs: DataFrame, plays: DataFrame, log_lines: DataFrame) -> dict[str, int]:
    """The rows that each table must have, counted on what is staged; completes the accounting."""
    identities = plays_of(log_lines).select(*PLAY_KEY).distinct().agg(F.count("*")).collect()[0]
    of_plays = plays.agg(F.countDistinct("user_id"), F.countDistinct("ts")).collect()[0]
    of_songs = songs.agg(F.countDistinct("song_id"), F.countDistinct("artist_id")).collect()[0]
    counted = dict(zip(("songplays", "users", "time", "songs", "artists"), (*identities, *of_plays, *of_songs)))
    log, song = run.record["inputs"]["log"], run.record["inputs"]["song"]
    log.update(songplays=counted["songplays"], repeats=log["plays"] - counted["songplays"])
    song.update(songs=counted["songs"], repeats=song["accepted"] - counted["songs"])
    return counted


def list_tables(run: Run, counted: Mapping[str, int]) -> None:
    """Record each table's files, its rows before and now, and the files in its folder that are not the job's."""
    before = latest_tables(run.target)
    tables = f"{STAGING}/{run.record['run']}/tables/"
    for name in TABLES:
        files = run.target.list_files(tables + name)
        run.target.delete(path for path in files if not is_data(path))
        data = {path[len(tables) :]: size for path, size in files.items() if is_data(path)}
        old = before.get(name, {"rows": None, "files": {}})
        run.record["tables"][name] = {"rows": counted[name], "before": old["rows"], "files": data}
        foreign = sorted(run.target.list_files(name).keys() - old["files"].keys())
        folders = {str(parent) for path in data for parent in PurePosixPath(path).parents}
        for path in folders.intersection(foreign):
            raise Stop(f"{run.target.root / path}: stands where {name} needs a folder; move it away")
        run.record["foreign"] += foreign


def check_audit(run: Run) -> None:
    """Refuse tables that break the contract, or that lost more rows than the settings allow."""
    failed = [check for check in run.record["audit"] if check["failed"]]
    if failed:
        rules = "; ".join(f"{check['table']}: {check['rule']}: {check['failed']:,}" for check in failed)
        raise Stop(f"the audit found {rules}; the tables stay in {run.staging / 'tables'} until the next run", code=3)
    limit = run.settings.max_shrink
    for name, table in run.record["tables"].items():
        rows, before = table["rows"], table["before"] or 0
        if limit is not None and before - rows > limit * before:
            raise Stop(f"{name} would shrink from {before:,} to {rows:,} rows; --max-shrink allows {limit}", code=3)


def give_up(run: Run, error: BaseException) -> None:
    """Keep a failed run's record and rejects, and nothing else of it but tables that the audit refused."""
    if run.target.exists(JOURNAL):  # committed, by this run or an earlier one: the next run finishes it
        return
    try:
        check_origin(run.target)
    except Stop:  # not an output of this job: it stays as it is
        return
    run.record.update(
        status="failed", error=" ".join(str(explain(error) or error).split())[:500] or type(error).__name__
    )
    staging = f"{STAGING}/{run.record['run']}"
    kept = {"rejects", "tables"} if any(check["failed"] for check in run.record["audit"]) else {"rejects"}
    with contextlib.suppress(OSError):  # on a full disk, makes room for the record
        run.target.delete(f"{staging}/{name}" for name in run.target.list_names(staging) if name not in kept)
    with contextlib.suppress(OSError):
        keep_record(run.target, run.record)
        run.target.delete([] if "tables" in kept else [staging])
    if run.record["inputs"]:
        print(tell(run.record))


# =====================================================================================================================
# Command: settings, run, report, exit code
# =====================================================================================================================

# What engines say, amid words of their own, of faults that the user can mend.
MENDABLE = ("No space left on device", "Permission denied", "Read-only file system", "No such file or directory")


def explain(error: BaseException) -> Stop | None:
    """What happened, in one line, if it is a fault that the user can mend."""
    if SIGNALS:
        name = signal.Signals(SIGNALS[0]).name
        return Stop(f"interrupted by {name}; every table is whole, old or new", code=128 + SIGNALS[0])
    if isinstance(error, Stop):
        return error
    cause = next((words for words in MENDABLE if words in str(error)), getattr(error, "strerror", None))
    place = getattr(error, "filename", None) or "the input or the output"
    return Stop(f"{place}: {cause}; every table is whole, old or new") if cause else None


def main(argv: Sequence[str] | None = None) -> int:
    catch_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        report = tell(run_job(read_settings(argv)))
        try:
            print(report, flush=True)
        except BrokenPipeError:  # nobody reads it; the tables are published all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except SystemExit:  # --help and --version
        raise
    except BaseException as error:
        stop = explain(error)
        if stop:
            print(f"etl.py: {stop}", file=sys.stderr)
            return stop.code
        traceback.print_exc()
        print(
            "etl.py: an unexpected fault; please report it, with the lines above, where you got etl.py", file=sys.stderr
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
