"""The rules of the tables, row by row: rows in, one function, literal rows out."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from conftest import PLAY, SONG, STAGED_TYPES, Frames
from pyspark.sql import DataFrame

import etl

Row = tuple[Any, ...]
LINE = {**PLAY, "user_id": "26", "bytes": 0, "reason": None, "field": None, "line": None, "page": "NextSong"}
LINE_TYPES = {**STAGED_TYPES, **dict.fromkeys(("user_id", "reason", "field", "line", "page"), "string")}
TS = 1542241826796  # of the default play: 2018-11-15 00:30:26.796 UTC


def rows(frame: DataFrame, *columns: str) -> list[Row]:
    """These columns, or SQL, of a frame, sorted with nothing first; the whole frame where none is named."""
    found = (tuple(row) for row in frame.selectExpr(*columns or ["*"]).collect())
    return sorted(found, key=lambda row: [(value is not None, value) for value in row])


def log_lines(frames: Frames, *changes: Mapping[str, Any]) -> DataFrame:
    """Staged log lines: each dict a change to the line of the default play."""
    ddl = ", ".join(f"{name} {LINE_TYPES.get(name, 'bigint')}" for name in LINE)
    return frames.engine.spark.createDataFrame([tuple({**LINE, **change}.values()) for change in changes], ddl)


# --------------------------------------------------------------------------------------------------------------- plays


def test_a_play_is_a_user_a_session_an_item_and_an_instant(frames: Frames) -> None:
    lines = log_lines(
        frames,
        {},
        {"source_file": "log_data/other.json"},
        {"user_id": "27"},
        {"session_id": 584},
        {"item_in_session": 1},
        {"ts": TS + 1},
        {"user_id": "0026"},  # the same number as 26
    )
    assert rows(etl.stage_plays(lines), "user_id", "session_id", "item_in_session", "ts") == [
        (26, 583, 0, TS),
        (26, 583, 0, TS + 1),
        (26, 583, 1, TS),
        (26, 584, 0, TS),
        (27, 583, 0, TS),
    ]


def test_only_accepted_lines_of_next_song_are_plays(frames: Frames) -> None:
    lines = log_lines(
        frames,
        {"session_id": 1},
        {"session_id": 2, "page": "Home"},
        {"session_id": 3, "page": "nextsong"},
        {"session_id": 4, "reason": "missing", "field": "song"},
        {"session_id": 5, "reason": "blank", "page": None},
    )
    plays = etl.stage_plays(lines)
    assert sorted(plays.columns) == sorted(PLAY)
    assert rows(plays, *PLAY) == [(*{**PLAY, "session_id": 1}.values(),)]


def test_of_copies_that_differ_the_smallest_wins_field_by_field(frames: Frames) -> None:
    """Each session holds two copies: the winner is smaller in one field, and greater in the next."""
    smaller = {"level": "free", "song": "A", "artist": "A", "length": 1.0, "location": "A"}
    smaller |= {"user_agent": "A", "first_name": "A", "last_name": "A", "gender": "F"}
    greater = {"level": "paid", "song": "B", "artist": "B", "length": 2.0, "location": "B"}
    greater |= {"user_agent": "B", "first_name": "B", "last_name": "B", "gender": "M"}
    names, changes = list(smaller), []
    for session, (name, following) in enumerate(zip(names, [*names[1:], None])):
        winner, loser = {name: smaller[name]}, {name: greater[name]}
        if following:
            winner[following], loser[following] = greater[following], smaller[following]
        changes += [
            {"session_id": session, "source_file": "winner", **winner},
            {"session_id": session, "source_file": "loser", **loser},
        ]
    plays = etl.stage_plays(log_lines(frames, *changes))
    assert rows(plays, "session_id", "source_file") == [(session, "winner") for session in range(9)]


def test_of_copies_unknown_comes_last_and_text_goes_by_code_point(frames: Frames) -> None:
    lines = log_lines(
        frames,
        {"session_id": 1, "location": None},
        {"session_id": 1, "location": "Å"},
        {"session_id": 2, "gender": None},
        {"session_id": 2, "gender": ""},
        {"session_id": 3, "song": "a"},
        {"session_id": 3, "song": "Z"},
        {"session_id": 3, "song": "é"},
        {"session_id": 4, "song": "😀"},  # U+1F600, but D83D DE00 in UTF-16
        {"session_id": 4, "song": "\uffee"},
        {"session_id": 5, "song": "a b"},
        {"session_id": 5, "song": "a"},
        {"session_id": 6, "artist": "e\u0301"},
        {"session_id": 6, "artist": "\u00e9"},
        {"session_id": 7, "length": 10.0},
        {"session_id": 7, "length": 9.0},  # a number, not a text
    )
    assert rows(etl.stage_plays(lines), "session_id", "location", "gender", "song", "artist", "length") == [
        (1, "Å", "M", "Slow Tide", "The Harbour", 218.93179),
        (2, PLAY["location"], "", "Slow Tide", "The Harbour", 218.93179),
        (3, PLAY["location"], "M", "Z", "The Harbour", 218.93179),
        (4, PLAY["location"], "M", "\uffee", "The Harbour", 218.93179),
        (5, PLAY["location"], "M", "a", "The Harbour", 218.93179),
        (6, PLAY["location"], "M", "Slow Tide", "e\u0301", 218.93179),
        (7, PLAY["location"], "M", "Slow Tide", "The Harbour", 9.0),
    ]


def test_a_copy_is_taken_whole(frames: Frames) -> None:
    one = {"song": "A", "location": None, "first_name": None, "last_name": "Z"}
    other = {"song": "B", "location": "A", "first_name": "A", "last_name": "A"}
    plays = etl.stage_plays(log_lines(frames, other, one, other))
    assert rows(plays, "song", "location", "first_name", "last_name") == [("A", None, None, "Z")]


def test_the_default_play_and_song_make_one_row_of_each_table(frames: Frames) -> None:
    tables = etl.build_tables(frames.songs({}), frames.plays({}))
    for name, frame in tables.items():
        types = {field.name: field.dataType.simpleString() for field in frame.schema}
        assert types == etl.TABLES[name].types, name
    found = {name: rows(frame.drop("start_time"))[0] for name, frame in tables.items()}
    assert found == {
        "songplays": (
            "832aa282cd6e93b47225ac9cd9a7ba43",
            *(26, "free", "SO1", "AR1", 583, "San Jose-Sunnyvale-Santa Clara, CA", '"Mozilla/5.0"', 2018, 11),
        ),
        "users": (26, "Ryan", "Smith", "M", "free"),
        "songs": ("SO1", "Slow Tide", "AR1", 218.93179, 2004),
        "artists": ("AR1", "The Harbour", "Oslo", 59.91, 10.75),
        "time": (0, 15, 46, 5, 2018, 11),
    }
    for name in ("songplays", "time"):
        assert rows(tables[name], "unix_millis(start_time)") == [(TS,)]


def test_a_songplay_is_named_by_the_digest_of_its_identity(frames: Frames) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"user_id": 999999999999999999, "session_id": 2**63 - 1, "item_in_session": 128},
    ]
    songplays = etl.build_songplays(frames.plays(*changes), frames.songs({}))
    assert rows(songplays, "user_id", "songplay_id") == [
        (26, "832aa282cd6e93b47225ac9cd9a7ba43"),  # 26|583|0|1542241826796
        (999999999999999999, "91c46a949a6bedee316b87259c7c41c0"),
    ]


# --------------------------------------------------------------------------------------------------------------- match


def test_a_play_finds_its_song_by_exact_title_artist_and_duration(frames: Frames) -> None:
    plays = frames.plays(
        {"session_id": 1},
        {"session_id": 2, "length": 218.9318},  # as the display rounds it
        {"session_id": 3, "length": 218.93179000000004},  # the next double
        {"session_id": 4, "song": "Slow tide"},
        {"session_id": 5, "song": "Slow Tide "},
        {"session_id": 6, "artist": "Harbour"},
        {"session_id": 7, "song": "Café", "length": 5.0},
        {"session_id": 8, "song": "Cafe\u0301", "length": 5.0},
        {"session_id": 9, "song": "", "length": 0.0},
        {"session_id": 10, "song": "The Harbour", "artist": "Slow Tide"},
    )
    songs = frames.songs(
        {},
        {"song_id": "SO2", "title": "Café", "duration": 5.0},
        {"song_id": "SO3", "title": "", "duration": 0.0},
    )
    assert rows(etl.build_songplays(plays, songs), "session_id", "song_id", "artist_id") == [
        (1, "SO1", "AR1"),
        (2, None, None),
        (3, None, None),
        (4, None, None),
        (5, None, None),
        (6, None, None),
        (7, "SO2", "AR1"),
        (8, None, None),
        (9, "SO3", "AR1"),
        (10, None, None),
    ]


def test_of_songs_alike_the_lowest_is_meant_and_a_play_never_multiplies(frames: Frames) -> None:
    songs = frames.songs(
        {"song_id": "SOb", "artist_id": "AR1"},
        {"song_id": "SOa", "artist_id": "AR9"},
        {"song_id": "SOa", "artist_id": "AR8"},
        {"song_id": "SOa", "artist_id": "AR8", "year": 1999, "artist_location": None},
        {"song_id": "SOB", "artist_id": "AR9"},  # capitals come first
    )
    plays = frames.plays({"session_id": 1}, {"session_id": 2}, {"session_id": 3, "song": "Other"})
    assert rows(etl.build_songplays(plays, songs), "session_id", "song_id", "artist_id") == [
        (1, "SOB", "AR9"),
        (2, "SOB", "AR9"),
        (3, None, None),
    ]
    assert rows(etl.build_songplays(plays, songs.where("song_id <> 'SOB'")), "session_id", "song_id", "artist_id") == [
        (1, "SOa", "AR8"),
        (2, "SOa", "AR8"),
        (3, None, None),
    ]


def test_a_play_may_match_any_line_of_the_catalogue(frames: Frames) -> None:
    """Also one whose song and artist go by another title and name in the tables."""
    songs = frames.songs(
        {"title": "Old Title", "artist_name": "Old Name", "year": 1990},
        {"year": 2004},
        {"song_id": "SO2", "title": "Another"},
    )
    plays = frames.plays({"session_id": 1, "song": "Old Title", "artist": "Old Name"}, {"session_id": 2})
    tables = etl.build_tables(songs, plays)
    assert rows(tables["songplays"], "session_id", "song_id") == [(1, "SO1"), (2, "SO1")]
    assert rows(tables["songs"], "song_id", "title") == [("SO1", "Slow Tide"), ("SO2", "Another")]
    assert rows(tables["artists"], "name") == [("The Harbour",)]


def test_without_any_song_every_play_stays(frames: Frames) -> None:
    none = frames.songs({}).where("false")
    assert rows(etl.build_songplays(frames.plays({}, {"user_id": 27}), none), "user_id", "song_id") == [
        (26, None),
        (27, None),
    ]


# --------------------------------------------------------------------------------------------------------------- users


def test_a_user_is_as_of_their_latest_play(frames: Frames) -> None:
    """By instant, then session, then item: each is the greater one where the next is the smaller."""
    plays = frames.plays(
        {"user_id": 1, "ts": TS + 1, "session_id": 1, "item_in_session": 1, "level": "paid"},
        {"user_id": 1, "ts": TS, "session_id": 2, "item_in_session": 2, "level": "free"},
        {"user_id": 2, "session_id": 10, "item_in_session": 1, "level": "free"},
        {"user_id": 2, "session_id": 9, "item_in_session": 2, "level": "paid"},
        {"user_id": 3, "item_in_session": 9, "level": "free"},
        {"user_id": 3, "item_in_session": 10, "level": "paid"},
    )
    assert rows(etl.build_users(plays), "user_id", "level") == [(1, "paid"), (2, "free"), (3, "paid")]


def test_a_users_columns_all_come_from_one_play(frames: Frames) -> None:
    plays = frames.plays(
        {"ts": TS, "first_name": "Ryan", "last_name": "Smith", "gender": "M", "level": "paid"},
        {"ts": TS + 1, "first_name": None, "last_name": "", "gender": None, "level": "free"},
    )
    columns = ("user_id", "first_name", "last_name", "gender", "level")
    assert rows(etl.build_users(plays), *columns) == [(26, None, "", None, "free")]


def test_users_who_played_at_the_same_instant_are_both_kept(frames: Frames) -> None:
    tables = etl.build_tables(frames.songs({}), frames.plays({"user_id": 1}, {"user_id": 2}))
    assert rows(tables["songplays"], "user_id", "unix_millis(start_time)") == [(1, TS), (2, TS)]
    assert rows(tables["users"], "user_id") == [(1,), (2,)]
    assert rows(tables["time"], "unix_millis(start_time)") == [(TS,)]


# --------------------------------------------------------------------------------------------------------------- songs


def test_of_a_songs_lines_the_greatest_year_wins_then_the_smallest_text(frames: Frames) -> None:
    songs = frames.songs(
        {"song_id": "by year", "year": 2004, "title": "Z"},
        {"song_id": "by year", "year": 1999, "title": "A"},
        {"song_id": "unknown year", "year": 0, "title": "A"},
        {"song_id": "unknown year", "year": 1960, "title": "Z"},
        {"song_id": "by title", "title": "a", "artist_id": "AR0"},
        {"song_id": "by title", "title": "Z", "artist_id": "AR9"},
        {"song_id": "by artist", "artist_id": "AR1", "duration": 2.0},
        {"song_id": "by artist", "artist_id": "AR2", "duration": 1.0},
        {"song_id": "by duration", "duration": 9.0},
        {"song_id": "by duration", "duration": 10.0},
        {"song_id": "alike"},
        {"song_id": "alike", "artist_name": "Other"},
    )
    assert rows(etl.build_songs(songs), "song_id", "title", "artist_id", "year", "duration") == [
        ("alike", "Slow Tide", "AR1", 2004, 218.93179),
        ("by artist", "Slow Tide", "AR1", 2004, 2.0),
        ("by duration", "Slow Tide", "AR1", 2004, 9.0),
        ("by title", "Z", "AR9", 2004, 218.93179),
        ("by year", "Z", "AR1", 2004, 218.93179),
        ("unknown year", "Z", "AR1", 1960, 218.93179),
    ]


def test_a_year_that_is_missing_or_unusable_is_0(frames: Frames) -> None:
    years = {"SO1": 2004, "SO2": 0, "SO3": None, "SO4": 2**31, "SO5": 2**31 - 1, "SO6": -(2**63)}
    line = {**SONG, "bytes": 0, "reason": None, "field": None, "line": None}
    lines = [{**line, "song_id": song_id, "year": year} for song_id, year in years.items()]
    lines.append({**line, "song_id": None, "reason": "missing", "field": "song_id"})
    types = {**LINE_TYPES, "year": "bigint"}
    ddl = ", ".join(f"{name} {types.get(name, 'bigint')}" for name in line)
    songs = etl.stage_songs(frames.engine.spark.createDataFrame([tuple(line.values()) for line in lines], ddl))
    assert sorted(songs.columns) == sorted(SONG)
    assert rows(songs, "song_id", "year", "typeof(year)") == [
        ("SO1", 2004, "int"),
        ("SO2", 0, "int"),
        ("SO3", 0, "int"),
        ("SO4", 0, "int"),
        ("SO5", 2**31 - 1, "int"),
        ("SO6", 0, "int"),
    ]


def test_songs_of_unknown_year_stay(frames: Frames) -> None:
    assert rows(etl.build_tables(frames.songs({"year": 0}), frames.plays({}))["songs"]) == [
        ("SO1", "Slow Tide", "AR1", 218.93179, 0)
    ]


# ------------------------------------------------------------------------------------------------------------- artists

PLACE = {"artist_location": "Oslo", "artist_latitude": 59.91, "artist_longitude": 10.75}
NOWHERE: dict[str, Any] = dict.fromkeys(PLACE)


def test_an_artist_is_described_as_most_of_its_songs_do(frames: Frames) -> None:
    """Of its songs, not of its lines; an older version of a song counts as well."""
    songs = frames.songs(
        {"song_id": "SO1", "artist_name": "Z"},
        {"song_id": "SO2", "artist_name": "Z"},
        {"song_id": "SO3", "artist_name": "A"},
        {"song_id": "SO3", "artist_name": "A", "year": 1999},
        {"song_id": "SO3", "artist_name": "A", "title": "B"},
        {"song_id": "SO4", "artist_id": "AR2", "artist_name": "Z", "year": 1980},
        {"song_id": "SO4", "artist_id": "AR2", "artist_name": "A", "year": 1990},
        {"song_id": "SO5", "artist_id": "AR2", "artist_name": "Z", "year": 1980},
        {"song_id": "SO6", "artist_id": "AR3", "artist_name": "A"},
        {"song_id": "SO6", "artist_id": "AR4", "artist_name": "B"},
    )
    assert rows(etl.build_artists(songs), "artist_id", "name") == [
        ("AR1", "Z"),
        ("AR2", "Z"),
        ("AR3", "A"),
        ("AR4", "B"),
    ]


def test_of_descriptions_of_as_many_songs_the_fullest_wins_then_the_smallest(frames: Frames) -> None:
    songs = frames.songs(
        {"artist_id": "by unknown fields", "song_id": "SO1", "artist_name": "A", **NOWHERE},
        {"artist_id": "by unknown fields", "song_id": "SO2", "artist_name": "B", **PLACE},
        {"artist_id": "by unknown fields", "song_id": "SO3", "artist_name": "A", **PLACE, "artist_location": ""},
        {"artist_id": "by name", "song_id": "SO1", "artist_name": "a", **PLACE, "artist_location": "A"},
        {"artist_id": "by name", "song_id": "SO2", "artist_name": "Z", **PLACE, "artist_location": "Z"},
        {"artist_id": "by location", "song_id": "SO1", **PLACE, "artist_location": "B", "artist_latitude": -2.0},
        {"artist_id": "by location", "song_id": "SO2", **PLACE, "artist_location": "A", "artist_latitude": -1.0},
        {"artist_id": "by latitude", "song_id": "SO1", **PLACE, "artist_latitude": -1.0, "artist_longitude": 0.0},
        {"artist_id": "by latitude", "song_id": "SO2", **PLACE, "artist_latitude": -2.0, "artist_longitude": 1.0},
        {"artist_id": "by longitude", "song_id": "SO1", **PLACE, "artist_longitude": 9.0},
        {"artist_id": "by longitude", "song_id": "SO2", **PLACE, "artist_longitude": 10.0},
        {"artist_id": "by unknown last", "song_id": "SO1", **PLACE, "artist_location": None},
        {"artist_id": "by unknown last", "song_id": "SO2", **PLACE, "artist_latitude": None, "artist_location": "Z"},
    )
    assert rows(etl.build_artists(songs), "artist_id", "name", "location", "lattitude", "longitude") == [
        ("by latitude", "The Harbour", "Oslo", -2.0, 1.0),
        ("by location", "The Harbour", "A", -1.0, 10.75),
        ("by longitude", "The Harbour", "Oslo", 59.91, 9.0),
        ("by name", "Z", "Z", 59.91, 10.75),
        ("by unknown fields", "B", "Oslo", 59.91, 10.75),
        ("by unknown last", "The Harbour", "Z", None, 10.75),
    ]


def test_a_description_is_taken_whole_and_an_empty_location_is_unknown(frames: Frames) -> None:
    songs = frames.songs(
        {"artist_id": "AR1", "song_id": "SO1", "artist_name": "B", **NOWHERE},
        {"artist_id": "AR1", "song_id": "SO2", "artist_name": "B", **NOWHERE, "artist_location": ""},
        {"artist_id": "AR1", "song_id": "SO3", "artist_name": "A", **PLACE},
        {"artist_id": "AR2", "song_id": "SO4", "artist_name": "A", **NOWHERE, "artist_location": " "},
    )
    assert rows(etl.build_artists(songs), "artist_id", "name", "location", "lattitude", "longitude") == [
        ("AR1", "B", None, None, None),
        ("AR2", "A", " ", None, None),
    ]


# ---------------------------------------------------------------------------------------------------------------- time


def test_instants_are_taken_apart_in_utc(frames: Frames) -> None:
    """ISO weeks at the ends of years, Sunday as 1, milliseconds kept."""
    instants = {
        946684800000: (0, 1, 52, 1, 2000, 7),  # Saturday 2000-01-01 00:00:00.000
        951868799999: (23, 29, 9, 2, 2000, 3),  # Tuesday 2000-02-29 23:59:59.999
        1104537600001: (0, 1, 53, 1, 2005, 7),  # Saturday 2005-01-01 00:00:00.001
        1230768000000: (0, 1, 1, 1, 2009, 5),  # Thursday 2009-01-01
        1230595200000: (0, 30, 1, 12, 2008, 3),  # Tuesday 2008-12-30, of 2009's first week
        1451865599999: (23, 3, 53, 1, 2016, 1),  # Sunday 2016-01-03, of 2015's last week
        1541030400000: (0, 1, 44, 11, 2018, 5),  # Thursday 2018-11-01
        1542838607796: (22, 21, 47, 11, 2018, 4),  # Wednesday 2018-11-21 22:16:47.796
        1546300799999: (23, 31, 1, 12, 2018, 2),  # Monday 2018-12-31, of 2019's first week
        1609459199999: (23, 31, 53, 12, 2020, 5),  # Thursday 2020-12-31
        1609459200000: (0, 1, 53, 1, 2021, 6),  # Friday 2021-01-01
        4102444799999: (23, 31, 53, 12, 2099, 5),  # Thursday 2099-12-31 23:59:59.999
    }
    found = etl.build_time(frames.plays(*({"ts": ts} for ts in instants)))
    columns = ("hour", "day", "week", "month", "year", "weekday")
    assert rows(found, "unix_millis(start_time)", *columns) == sorted((ts, *parts) for ts, parts in instants.items())


def test_time_has_one_row_for_each_instant(frames: Frames) -> None:
    plays = frames.plays({}, {"user_id": 27}, {"session_id": 584}, {"ts": TS + 1}, {"ts": TS - 1, "user_id": 28})
    assert rows(etl.build_time(plays), "unix_millis(start_time)") == [(TS - 1,), (TS,), (TS + 1,)]


def test_songplays_lie_in_the_year_and_month_of_their_start(frames: Frames) -> None:
    plays = frames.plays({"ts": 1546300799999}, {"ts": 1546300800000})
    assert rows(etl.build_songplays(plays, frames.songs({})), "unix_millis(start_time)", "year", "month") == [
        (1546300799999, 2018, 12),
        (1546300800000, 2019, 1),
    ]


# ---------------------------------------------------------------------------------------------------------- all tables


def test_neither_order_nor_partitions_nor_repeats_change_a_table(frames: Frames) -> None:
    """Rows that tie in many ways, shuffled and spread."""
    chance = random.Random(7)
    lines = [
        {
            "user_id": str(user),
            "session_id": session,
            "item_in_session": 0,
            "ts": TS + ts,
            "level": level,
            "location": at,
        }
        for user in (1, 2)
        for session in (1, 2)
        for ts in (0, 1)
        for level in ("free", "paid")
        for at in ("Oslo", None)
    ]
    songs = [
        {"song_id": f"SO{song}", "title": title, "year": year, "artist_name": name, "artist_location": at}
        for song in (1, 2)
        for title in ("Slow Tide", "Other")
        for year in (0, 1999)
        for name in ("The Harbour", "Harbour")
        for at in ("", "Oslo", None)
    ]
    tables = []
    for parts in (1, 5):
        plays = etl.stage_plays(log_lines(frames, *lines).repartition(parts))
        built = etl.build_tables(frames.songs(*songs).repartition(parts), plays)
        tables.append({name: rows(frame.drop("start_time")) for name, frame in built.items()})
        lines, songs = lines + chance.sample(lines, 8), songs + chance.sample(songs, 8)
        chance.shuffle(lines)
        chance.shuffle(songs)
    assert tables[0] == tables[1]
    assert [len(found) for found in tables[0].values()] == [8, 2, 2, 1, 2]
