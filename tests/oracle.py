"""What the job must make of a folder, worked out a second time: plain Python, line by line, sharing no code with it."""

import glob
import gzip
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Row = tuple[Any, ...]

# Required fields in the order in which faults are named.
SONG = ["song_id", "title", "artist_id", "artist_name", "duration"]
PLAY = ["page", "ts", "userId", "level", "sessionId", "itemInSession", "song", "artist", "length"]
FIELDS = {"song": [*SONG, "artist_location", "artist_latitude", "artist_longitude", "year"]}
FIELDS["log"] = [*PLAY, "location", "userAgent", "firstName", "lastName", "gender"]
INTEGERS = ["ts", "sessionId", "itemInSession", "year"]
DOUBLES = ["duration", "length", "artist_latitude", "artist_longitude"]
DOMAINS: dict[str, Any] = {
    **dict.fromkeys(["duration", "length", "sessionId", "itemInSession"], lambda value: value >= 0),
    "ts": lambda ts: 946684800000 <= ts < 4102444800000,
    "userId": lambda user: user.isascii() and user.isdigit() and len(user) <= 18,
    "level": lambda level: level in ("free", "paid"),
}


def read_lines(folder: Path, kind: str) -> Iterator[tuple[str, str]]:
    """Source file and text of each line, blank ones too."""
    for path in map(Path, glob.glob(f"{glob.escape(str(folder))}/{kind}_data/**", recursive=True)):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name.endswith((".json", ".json.gz")) and "/_" not in name:  # glob itself passes over "/."
            content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
            lines = content.decode("utf-8", errors="replace").removeprefix("\ufeff").split("\n")
            for line in lines if lines[-1] else lines[:-1]:
                yield name, line.removesuffix("\r")


def write_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_value(field: str, value: Any) -> Any:
    """The value in its field's type, None if it is of another; ValueError for a number that does not fit in."""
    if field not in INTEGERS + DOUBLES:
        return value if value is None or isinstance(value, str) else write_json(value)
    if type(value) not in (int, float):  # true is neither
        return None
    if not (-(2**63) <= value < 2**63 if field in INTEGERS else abs(value) <= sys.float_info.max):
        raise ValueError("past 64 bits or past a double")
    return float(value) if field in DOUBLES else value if isinstance(value, int) else None


def read_record(kind: str, line: str) -> tuple[dict[str, Any], Row]:
    """The fields of the schema, and the first fault (reason, field), empty if there is none."""
    try:
        # NaN and Infinity: int() of the name is a ValueError. A lone surrogate has no UTF-8: another ValueError.
        write_json(json.loads(line, parse_constant=int, object_pairs_hook=list)).encode()
        given: Any = json.loads(line)
        record = {field: read_value(field, given.get(field)) for field in FIELDS[kind]}
    except (ValueError, AttributeError, RecursionError):  # AttributeError: an array or a scalar
        return {}, ("not_an_object", None)
    for field in SONG if kind == "song" else PLAY if record["page"] == "NextSong" else ["page"]:
        if given.get(field) is None or (given[field] == "" and field not in ("title", "song", "artist")):
            return {}, ("missing", field)
        if record[field] is None or (field in DOMAINS and not DOMAINS[field](record[field])):
            return {}, ("wrong_type" if record[field] is None else "out_of_domain", field)
    return record, ()


def unknown_last(values: Row) -> Row:
    return tuple((value is None, value) for value in values)


def describe(descriptions: dict[Row, set[str]]) -> Row:
    return min(descriptions, key=lambda it: (-len(descriptions[it]), it.count(None), unknown_last(it)))


def instant(ts: int) -> Row:
    at = datetime.fromtimestamp(ts // 1000, timezone.utc)
    return ts, at.hour, at.day, at.isocalendar()[1], at.month, at.year, at.isoweekday() % 7 + 1


def expect(folder: Path) -> tuple[dict[str, list[Row]], list[Row], dict[str, Counter[str]]]:
    """Tables, rejects and counts of the lines below `song_data` and `log_data`.

    Rows are sorted, columns in the contract's order (songplays without year and month), instants in epoch milliseconds.
    A reject is (kind, source_file, line, reason, field). The counts are kept by kind: `repeats` of songs include their
    older versions, `logged_out` is the part of `other_pages` without a user.
    """
    rejects: list[Row] = []
    counts: dict[str, Counter[str]] = {"song": Counter(), "log": Counter()}
    songs: dict[str, set[Row]] = defaultdict(set)  # song_id: its versions, ranked
    catalogue: dict[Row, set[Row]] = defaultdict(set)  # title, artist_name, duration: song_id, artist_id
    artists: dict[str, dict[Row, set[str]]] = defaultdict(lambda: defaultdict(set))  # artist_id: description: song_ids
    copies: dict[Row, set[Row]] = defaultdict(set)  # ts, sessionId, itemInSession, userId: the rest of the play
    for kind, count in counts.items():
        for source_file, line in read_lines(folder, kind):
            record, fault = read_record(kind, line)
            fate = "blank" if not line.strip(" \t\r") else "rejected" if fault else "accepted"
            count.update(["lines", fate])
            if fate == "rejected":
                rejects.append((kind, source_file, line[:4000], *fault))
            elif fate == "accepted" and kind == "song":
                song_id, title, artist_id, name, duration, location, latitude, longitude, year = record.values()
                year = year if year and -(2**31) <= year < 2**31 else 0
                count.update(repeats=song_id in songs)
                songs[song_id].add((-year, (song_id, title, artist_id, year, duration)))
                catalogue[title, name, duration].add((song_id, artist_id))
                artists[artist_id][name, location or None, latitude, longitude].add(song_id)
            elif fate == "accepted" and record["page"] == "NextSong":
                _, ts, user, level, session, item, *rest = record.values()
                count.update(plays=1, repeats=(ts, session, item, int(user)) in copies)
                copies[ts, session, item, int(user)].add((level, *rest))
            elif fate == "accepted":
                count.update(other_pages=1, logged_out=not record["userId"])

    songplays, users = [], {}
    for (ts, session, item, user), told in sorted(copies.items()):  # in time, so that a user's latest play stays
        level, song, artist, length, location, agent, first, last, gender = min(told, key=unknown_last)
        songplay_id = hashlib.md5(f"{user}|{session}|{item}|{ts}".encode()).hexdigest()
        match = min(catalogue.get((song, artist, length), {(None, None)}))
        songplays.append((songplay_id, ts, user, level, *match, session, location, agent))
        users[user] = (user, first, last, gender, level)
    tables = {
        "songplays": sorted(songplays),
        "users": sorted(users.values()),
        "songs": sorted(min(versions)[1] for versions in songs.values()),
        "artists": sorted((artist_id, *describe(told)) for artist_id, told in artists.items()),
        "time": sorted(instant(ts) for ts in {ts for ts, *_ in copies}),
    }
    return tables, sorted(rejects), counts
