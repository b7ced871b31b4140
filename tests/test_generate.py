"""The generator: the same bytes for the same arguments, exact counts, and the habits of real data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any, Callable

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "generate.py"
FORMS = {"Login", "Logout", "Save Settings", "Submit Upgrade", "Submit Downgrade"}
KEYS = (
    "artist auth firstName gender itemInSession lastName length level location method page registration sessionId song"
)
SONG_KEYS = (
    "num_songs artist_id artist_latitude artist_longitude artist_location artist_name song_id title duration year"
)

Record = dict[str, Any]


def generate(out: Path, *flags: object, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [python, str(SCRIPT), "--out", str(out), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def read_bytes(lake: Path) -> dict[str, bytes]:
    return {path.relative_to(lake).as_posix(): path.read_bytes() for path in lake.rglob("*.json")}


def read_texts(lake: Path, kind: str) -> list[str]:
    """Every line of a kind, in the order of the files."""
    return [text for path in sorted((lake / kind).rglob("*.json")) for text in path.read_bytes().decode().split("\n")]


def read_records(lake: Path, kind: str) -> list[Record]:
    return [json.loads(text) for text in read_texts(lake, kind)]


def plays_of(lines: list[Record]) -> list[Record]:
    return [line for line in lines if line["page"] == "NextSong"]


def sessions_of(lines: list[Record]) -> list[list[Record]]:
    sessions = defaultdict(list)
    for line in sorted(lines, key=lambda line: line["itemInSession"]):
        sessions[line["sessionId"]].append(line)
    return list(sessions.values())


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten times the events of data/, so that shares mean something."""
    lake = tmp_path_factory.mktemp("month")
    assert generate(lake, "--events", 40_000, "--users", 500, "--songs", 2000).returncode == 0
    return lake


@pytest.fixture(scope="module")
def lines(month: Path) -> list[Record]:
    return read_records(month, "log_data")


@pytest.fixture(scope="module")
def songs(month: Path) -> list[Record]:
    return read_records(month, "song_data")


# ---------------------------------------------------------------------------------------------------------- the bytes


def test_the_defaults_make_the_data_of_this_repository(tmp_path: Path) -> None:
    assert generate(tmp_path).returncode == 0
    made = read_bytes(tmp_path)
    assert made == read_bytes(ROOT / "data")
    assert len([name for name in made if name.startswith("log_data/2018/11/2018-11-")]) == 30
    assert 900_000 < sum(map(len, made.values())) < 1_200_000


def test_every_other_python_here_makes_the_same_bytes(tmp_path: Path) -> None:
    flags = ("--events", 1500, "--songs", 60, "--days", 3, "--bad", "0.1", "--repeated", "0.1")
    generate(tmp_path / "own", *flags)
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    versions = {f"{sys.version_info.major}.{sys.version_info.minor}"}
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for minor in range(9, 14):
        found = [shutil.which(f"python3.{minor}"), *map(str, root.glob(f"versions/3.{minor}.*/bin/python"))]
        for python in filter(None, found):
            version = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False).stdout.strip()
            if version == f"3.{minor}" and version not in versions:
                versions.add(version)
                assert generate(tmp_path / version, *flags, python=python).stderr == ""
                assert read_bytes(tmp_path / version) == read_bytes(tmp_path / "own"), f"Python {version} differs"
    if len(versions) == 1:
        pytest.skip("no other Python from 3.9 to 3.13 on PATH or under pyenv")


def test_another_seed_makes_another_lake(tmp_path: Path) -> None:
    generate(tmp_path / "a", "--seed", 1, "--events", 300)
    generate(tmp_path / "b", "--seed", 2, "--events", 300)
    assert not set(read_texts(tmp_path / "a", "log_data")) & set(read_texts(tmp_path / "b", "log_data"))


def test_files_have_the_layout_keys_and_escaping_of_real_ones(month: Path) -> None:
    for name, content in read_bytes(month).items():
        assert content.isascii()
        assert not content.endswith(b"\n")
        if name.startswith("song_data"):
            song = json.loads(content)
            assert json.dumps(song).encode() == content
            assert " ".join(song) == SONG_KEYS
            letters = name.split("/")[-1][2:5]
            assert name == f"song_data/{'/'.join(letters)}/{Path(name).name}"
            continue
        for text in content.decode().split("\n"):
            line = json.loads(text)
            day = datetime.fromtimestamp(line["ts"] / 1000, timezone.utc)
            assert f"log_data/{day:%Y/%m/%Y-%m-%d}-events.json" == name
            assert " ".join(line) == f"{KEYS} status ts userAgent userId"
            assert json.dumps(line, separators=(",", ":")).replace("/", "\\/") == text


# ------------------------------------------------------------------------------------------- exact and damaged lines


@pytest.mark.parametrize(("events", "days", "users"), [(1, 1, 1), (7, 30, 1), (999, 1, 3), (2500, 400, 20)])
def test_events_is_the_number_of_log_lines(tmp_path: Path, events: int, days: int, users: int) -> None:
    run = generate(tmp_path, "--events", events, "--days", days, "--users", users, "--bad", "0.25", "--songs", 8)
    assert (run.returncode, run.stderr) == (0, "")
    assert len(read_texts(tmp_path, "log_data")) == events
    assert len(read_texts(tmp_path, "song_data")) == 8


def usable(text: str, kind: str) -> bool:
    """Whether every required field of the line is there, of its type and inside its domain."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    def number(value: object, kinds: tuple[type, ...] = (int,), least: float = 0) -> bool:
        return type(value) in kinds and isinstance(value, (int, float)) and least <= value < 2**63

    try:
        record = json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    if not isinstance(record, dict):
        return False
    if kind == "song_data":
        named = all(isinstance(record.get(key), str) for key in ("song_id", "title", "artist_id", "artist_name"))
        filled = all(record.get(key) for key in ("song_id", "artist_id", "artist_name"))
        return named and filled and number(record.get("duration"), (int, float))
    if record.get("page") != "NextSong":
        return bool(record.get("page"))
    user, instant = record.get("userId"), record.get("ts", -1)
    return (
        number(instant, least=946_684_800_000)
        and instant < 4_102_444_800_000
        and (isinstance(user, str) and user.isascii() and user.isdigit() and len(user) <= 18)
        and record.get("level") in ("free", "paid")
        and number(record.get("sessionId"))
        and number(record.get("itemInSession"))
        and isinstance(record.get("song"), str)
        and isinstance(record.get("artist"), str)
        and number(record.get("length"), (int, float))
    )


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lake = tmp_path_factory.mktemp("dirty")
    flags = ("--events", 20_000, "--songs", 1000, "--bad", "0.07", "--repeated", "0.15", "--users", 300)
    assert generate(lake, *flags).returncode == 0
    return lake


@pytest.mark.parametrize(("kind", "bad"), [("log_data", 1400), ("song_data", 70)])
def test_the_asked_share_of_lines_is_damaged_in_many_ways(dirty: Path, kind: str, bad: int) -> None:
    damaged = [text for text in read_texts(dirty, kind) if not usable(text, kind)]
    assert len(damaged) == bad
    start = '{"artist":' if kind == "log_data" else '{"num_songs":'
    ways: dict[str, Callable[[str], bool]] = {
        "cut off": lambda text: text.startswith(start) and not text.endswith(("}", "x", ",")),
        "text after the object": lambda text: text.endswith(("} x", "}}")),
        "array": lambda text: text.startswith("["),
        "scalar": lambda text: text in ("42", "true", "null") or text.startswith('"'),
        "single quotes": lambda text: text.startswith("{'"),
        "null": lambda text: '"artist_name": null' in text or '"level":null' in text,
        "negative": lambda text: '"length":-0.5' in text or '"duration": -1.0' in text,
        "wrong type": lambda text: '"long"' in text,
    }
    assert {way for way, sign in ways.items() if not any(map(sign, damaged))} == set()
    if kind == "log_data":
        for sign in ('"level":"gold"', '"userId":"abc"', '"userId":""', '"ts":946684799999', '"sessionId":-1'):
            assert any(sign in text and '"page":"NextSong"' in text for text in damaged), sign


def test_the_asked_share_of_log_lines_is_delivered_again_later(dirty: Path) -> None:
    first: dict[tuple[object, ...], tuple[str, str]] = {}
    repeats, other_file, changed, latest = 0, 0, Counter[str](), 0
    for path in sorted((dirty / "log_data").rglob("*.json")):
        for text in path.read_text("ascii").split("\n"):
            if not usable(text, "log_data"):
                continue
            line = json.loads(text)
            identity = tuple(line[key] for key in ("userId", "sessionId", "itemInSession", "ts"))
            if identity not in first:
                first[identity] = path.name, text
                assert line["ts"] >= latest, "a first delivery out of order: its repeat came before it"
                latest = line["ts"]
                assert f"{datetime.fromtimestamp(line['ts'] / 1000, timezone.utc):%Y-%m-%d}-events.json" == path.name
                continue
            repeats += 1
            file, original = first[identity]
            other_file += file != path.name
            changed.update(key for key, value in json.loads(original).items() if line[key] != value)
    assert repeats == 3000
    assert 0 < other_file < repeats
    assert set(changed) == {"level", "location", "userAgent"}
    assert 0.2 < sum(changed.values()) / repeats < 0.4


def test_the_asked_share_of_song_files_repeats_a_song(dirty: Path) -> None:
    records = [json.loads(text) for text in read_texts(dirty, "song_data") if usable(text, "song_data")]
    versions = defaultdict(list)
    for record in records:
        versions[record["song_id"]].append(record)
    assert (len(records), len(versions)) == (930, 780)
    differing = {key for songs in versions.values() for song in songs for key in song if song[key] != songs[0][key]}
    assert differing == {"artist_latitude", "artist_longitude", "artist_location", "artist_name", "year"}
    assert any(songs[0] == songs[1] for songs in versions.values() if len(songs) > 1)


# --------------------------------------------------------------------------------------------------------- the habits


def test_sessions_are_many_short_ones_and_a_few_long_ones(lines: list[Record]) -> None:
    sizes = sorted(len(session) for session in sessions_of(lines))
    assert 7.6 < sum(sizes) / len(sizes) < 9.6
    assert sizes[len(sizes) // 2] in (2, 3)
    assert 110 < sizes[-1] <= 130


def test_events_of_a_session_follow_at_the_times_of_real_ones(lines: list[Record]) -> None:
    after_song, after_page = [], []
    for session in sessions_of(lines):
        assert [line["itemInSession"] for line in session] == list(range(len(session)))
        assert len({line["userId"] for line in session if line["userId"]}) <= 1
        for before, line in zip(session, session[1:]):
            gap = line["ts"] - before["ts"]
            assert gap >= 0
            if line["page"] in FORMS:
                assert gap == 1000
            elif line["page"] == before["page"] == "NextSong":
                after_song.append(gap - int(before["length"]) * 1000)
            else:
                after_page.append(gap)
    assert set(after_song) == {0}
    assert 0 in after_page
    assert {line["ts"] % 1000 for line in lines} == {796}


def test_a_line_says_of_its_page_what_real_ones_say(lines: list[Record]) -> None:
    for line in lines:
        form, play = line["page"] in FORMS, line["page"] == "NextSong"
        assert line["status"] == (307 if form else 404 if line["page"] == "Error" else 200)
        assert line["method"] == ("PUT" if form or play else "GET")
        assert [line[key] is None for key in ("song", "artist", "length")] == [not play] * 3
        assert line["auth"] == ("Logged In" if line["userId"] else "Logged Out")
        guest = [
            line[key] is None for key in ("firstName", "lastName", "gender", "location", "registration", "userAgent")
        ]
        assert guest == [line["userId"] == ""] * 6
        assert line["registration"] is None or isinstance(line["registration"], float)
        assert line["registration"] is None or line["registration"] <= line["ts"]


def test_pages_have_their_share(lines: list[Record]) -> None:
    pages = Counter(line["page"] for line in lines)
    assert 0.81 < pages["NextSong"] / len(lines) < 0.88
    assert 0.07 < pages["Home"] / len(lines) < 0.13
    assert set(pages) == {"NextSong", "Home", "Downgrade", "Settings", "Help", "About", "Upgrade", "Error", *FORMS}
    assert 0.02 < sum(line["userId"] == "" for line in lines) / len(lines) < 0.06


def test_a_level_changes_only_by_a_submitted_form_and_shows_on_the_next_home_line() -> None:
    """On data/, where nobody listens twice at a time. Logged-out lines carry the level of the session's user."""
    lines = read_records(ROOT / "data", "log_data")
    users = {line["sessionId"]: line["userId"] for line in lines if line["userId"]}
    level: dict[str, str] = {}
    last_page: dict[str, str] = {}
    changes = []
    for line in sorted(lines, key=lambda line: (line["ts"], line["sessionId"], line["itemInSession"])):
        user = users.get(line["sessionId"])
        if user is None:
            continue
        if line["level"] != level.setdefault(user, line["level"]):
            changes.append((last_page[user], level[user], line["page"], line["level"]))
        level[user], last_page[user] = line["level"], line["page"]
    submitted = Counter(line["page"] for line in lines if line["page"].startswith("Submit"))
    assert Counter(changes) == {
        ("Submit Upgrade", "free", "Home", "paid"): submitted["Submit Upgrade"],
        ("Submit Downgrade", "paid", "Home", "free"): submitted["Submit Downgrade"],
    }
    assert min(submitted.values()) >= 1


def test_hours_and_weekdays_have_their_shape(lines: list[Record]) -> None:
    instants = [datetime.fromtimestamp(line["ts"] / 1000, timezone.utc) for line in lines]
    hours = Counter(instant.hour for instant in instants)
    assert 14 <= max(hours, key=lambda hour: hours[hour]) <= 18
    assert 1 <= min(hours, key=lambda hour: hours[hour]) <= 6
    assert 2.5 < max(hours.values()) / min(hours.values()) < 7
    weekend = sum(instant.weekday() >= 5 for instant in instants)
    assert 2 < (len(instants) - weekend) / 22 / (weekend / 8) < 3.4  # November 2018: 22 weekdays, 8 weekend days


def test_one_user_makes_a_tenth_of_the_plays_and_users_share_instants(lines: list[Record]) -> None:
    plays = plays_of(lines)
    listeners = Counter(line["userId"] for line in plays).most_common(2)
    assert 0.07 < listeners[0][1] / len(plays) < 0.13
    assert listeners[1][1] < listeners[0][1]
    at_instant = defaultdict(set)
    for line in plays:
        at_instant[line["ts"]].add(line["userId"])
    assert sum(len(users) > 1 for users in at_instant.values()) > 5
    assert len({line["userAgent"] for line in lines}) > 30
    assert len({line["location"] for line in lines}) > 55
    assert sum('\\"Mozilla' in json.dumps(line["userAgent"]) for line in plays) > len(plays) / 2


@pytest.mark.parametrize("lake", ["data", "month"])
def test_about_half_of_the_plays_find_their_song(lake: str, month: Path) -> None:
    place = ROOT / "data" if lake == "data" else month
    catalogue = {(song["title"], song["artist_name"], song["duration"]) for song in read_records(place, "song_data")}
    plays = plays_of(read_records(place, "log_data"))
    found = sum((play["song"], play["artist"], play["length"]) in catalogue for play in plays)
    assert 0.4 < found / len(plays) < 0.6
    near = {(title, artist) for title, artist, _ in catalogue}
    assert sum((play["song"], play["artist"]) in near for play in plays) > found


@pytest.mark.parametrize("lake", ["data", "month"])
def test_play_texts_carry_the_flaws_of_real_ones(lake: str, month: Path) -> None:
    place = ROOT / "data" if lake == "data" else month
    texts = list(
        chain.from_iterable((play["song"], play["artist"]) for play in plays_of(read_records(place, "log_data")))
    )
    beyond_ascii = [text for text in texts if not text.isascii()]
    assert 0.01 < len(beyond_ascii) / (len(texts) / 2) < 0.1
    for text in beyond_ascii:
        assert text.encode("latin-1").decode().encode("latin-1").decode() != text
    assert any("\x19" in text for text in texts)
    assert any(text != text.strip() for text in texts)
    assert any("/" in text for text in texts)


def test_the_catalogue_has_the_gaps_and_ambiguities_of_the_real_one(songs: list[Record]) -> None:
    assert len({song["song_id"] for song in songs}) == len(songs) == 2000
    names = defaultdict(set)
    for song in songs:
        names[song["artist_id"]].add((song["artist_name"], song["artist_location"], song["artist_latitude"]))
    shares = {
        "artists with several names or places": (sum(len(found) > 1 for found in names.values()) / len(names), 0.12),
        "year 0": (sum(song["year"] == 0 for song in songs) / len(songs), 0.53),
        "no coordinates": (sum(song["artist_latitude"] is None for song in songs) / len(songs), 0.63),
        "empty location": (sum(song["artist_location"] == "" for song in songs) / len(songs), 0.43),
    }
    assert {name: share for name, share in shares.items() if abs(share[0] - share[1]) > 0.05} == {}
    pairs = Counter((song["title"], song["artist_name"]) for song in songs)
    triples = Counter((song["title"], song["artist_name"], song["duration"]) for song in songs)
    assert sum(count > 1 for count in pairs.values()) > 3
    assert [count for count in triples.values() if count > 1] == [2]
    assert sum(song["title"] == "" for song in songs) == 1
    assert any(not song["title"].isascii() for song in songs)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--events", "0"], "--events"),
        (["--songs", "many"], "--songs"),
        (["--seed", "-1"], "--seed"),
        (["--bad", "1"], "--bad"),
        (["--repeated", "-0.1"], "--repeated"),
        (["--bad", "1/0"], "--bad"),
        (["--bad", "0.5", "--repeated", "0.5"], "--repeated"),
        (["--start", "30.11.2018"], "--start"),
        (["--start", "1999-12-31"], "--start"),
        (["--start", "2099-12-31", "--days", "2"], "--days"),
        (["--days", "99999999999"], "--days"),
        (["--event", "5"], "--event"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(tmp_path: Path, flags: list[str], said: str) -> None:
    run = generate(tmp_path / "lake", *flags)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert said in run.stderr
    assert not (tmp_path / "lake").exists()


@pytest.mark.parametrize("there", ["song_data", "log_data"])
def test_a_folder_that_holds_data_is_refused_and_left_alone(tmp_path: Path, there: str) -> None:
    (tmp_path / there).mkdir()
    run = generate(tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert there in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_an_out_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "lake"
    out.write_text("")
    run = generate(out)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "lake" in run.stderr
