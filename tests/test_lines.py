"""Every line's fate: odd files, odd lines, odd fields, odd names, the proof of the read, and seeded damage."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import pytest
from conftest import HOME

import etl

Row = tuple[Any, ...]
KINDS = ("song", "log")


class Case(NamedTuple):
    """The bytes of a file below the input, and what its lines come to: accepted, blank, or reason and field."""

    content: bytes
    fates: list[str]


# ----------------------------------------------------------------------------------------------------- files, for lines

HOME_PAGE = b'{"page":"Home"}'
FILES = {
    "empty.json": Case(b"", []),
    "only a BOM.json": Case(b"\xef\xbb\xbf", []),
    "only a line end.json": Case(b"\n", ["blank"]),
    "BOM and line end.json": Case(b"\xef\xbb\xbf\n", ["blank"]),
    "only blanks.json": Case(b" \t\n\r\n  \t\r", ["blank", "blank", "blank"]),
    "other blanks.json": Case(b"\x0c\n\xc2\xa0\n\x0b", ["not_an_object"] * 3),
    "BOM.json": Case(b"\xef\xbb\xbf" + HOME_PAGE + b"\n" + HOME_PAGE, ["accepted", "accepted"]),
    "BOM twice.json": Case(b"\xef\xbb\xbf\xef\xbb\xbf" + HOME_PAGE, ["not_an_object"]),
    "BOM on line 2.json": Case(HOME_PAGE + b"\n\xef\xbb\xbf" + HOME_PAGE, ["accepted", "not_an_object"]),
    "UTF-16.json": Case(b"\xff\xfe{\0}\0", ["not_an_object"]),
    "CRLF.json": Case(HOME_PAGE + b"\r\n" + HOME_PAGE + b"\r\n", ["accepted", "accepted"]),
    "bare CR.json": Case(HOME_PAGE + b"\r" + HOME_PAGE, ["not_an_object"]),
    "CR within.json": Case(b'{"page":\r"Home"}\r', ["accepted"]),
    "two CR at the end.json": Case(HOME_PAGE + b"\r\r\n", ["accepted"]),
    "no final newline.json": Case(HOME_PAGE + b"\n" + HOME_PAGE, ["accepted", "accepted"]),
    "one final newline.json": Case(HOME_PAGE + b"\n" + HOME_PAGE + b"\n", ["accepted", "accepted"]),
    "two final newlines.json": Case(HOME_PAGE + b"\n" + HOME_PAGE + b"\n\n", ["accepted", "accepted", "blank"]),
    "blanks around.json": Case(b" \t" + HOME_PAGE + b"\t \r\n", ["accepted"]),
    "line separators.json": Case('{"page":"\u2028\u2029\x85"}'.encode(), ["accepted"]),
    "invalid UTF-8.json": Case(b'{"page":"Caf\xe9 \xf0\x9f\x98 \xed\xa0\xbd \xc0\x80"}', ["accepted"]),
    "invalid UTF-8 outside.json": Case(b'\xff{"page":"Home"}', ["not_an_object"]),
    "NUL in a text.json": Case(b'{"page":"Ho\0me"}', ["not_an_object"]),
    "NUL outside.json": Case(b'{"page":\0"Home"}', ["not_an_object"]),
    "NUL behind.json": Case(HOME_PAGE + b"\0", ["not_an_object"]),
    "NUL only.json": Case(b"\0\0\0", ["not_an_object"]),
    "pretty-printed.json": Case(
        b'{\n  "page": "Home",\n  "level": "free"\n}\n', ["not_an_object"] * 3 + ["not_an_object"]
    ),
    "20 MB.json": Case(b'{"page":"Home","location":"' + b"x" * 20_000_000 + b'"}', ["accepted"]),
    "20 MB of damage.json": Case(b'{"page":"Home","location":"' + b"x" * 20_000_000, ["not_an_object"]),
    "packed.json.gz": Case(gzip.compress(HOME_PAGE + b"\r\n\n{", mtime=0), ["accepted", "blank", "not_an_object"]),
    "packed twice over.json.gz": Case(gzip.compress(b"\xef\xbb\xbf" + HOME_PAGE) * 2, ["not_an_object"]),
    "packed nothing.json.gz": Case(gzip.compress(b""), []),
}

# --------------------------------------------------------------------------------------------- log lines, object or not

LINES = {
    "empty object": ("{}", "missing page"),
    "empty array": ("[]", "not_an_object"),
    "array": ('[{"page":"Home"}]', "not_an_object"),
    "array of an object and a text": ('[{"page":"Home"},"x"]', "not_an_object"),
    "number": ("5", "not_an_object"),
    "text": ('"page"', "not_an_object"),
    "null": ("null", "not_an_object"),
    "true": ("true", "not_an_object"),
    "no JSON": ("page=Home", "not_an_object"),
    "truncated after a value": ('{"page":"Home"', "not_an_object"),
    "truncated in a text": ('{"page":"Ho', "not_an_object"),
    "truncated in a name": ('{"page":"Home","lev', "not_an_object"),
    "truncated within": ('{"page":"Home","x":{"a":1}', "not_an_object"),
    "text after": ('{"page":"Home"} x', "not_an_object"),
    "brace after": ('{"page":"Home"}}', "not_an_object"),
    "comma after": ('{"page":"Home"},', "not_an_object"),
    "text before": ('x {"page":"Home"}', "not_an_object"),
    "two objects": ('{"page":"Home"}{"page":"Home"}', "not_an_object"),
    "two objects, comma": ('{"page":"Home"},{"page":"Home"}', "not_an_object"),
    "two objects, blank": ('{"page":"Home"} {"page":"Home"}', "not_an_object"),
    "trailing comma": ('{"page":"Home",}', "not_an_object"),
    "no comma": ('{"page":"Home" "level":"free"}', "not_an_object"),
    "no value": ('{"page":"Home","level":}', "not_an_object"),
    "no colon": ('{"page" "Home"}', "not_an_object"),
    "comment": ('{"page":"Home"/**/}', "not_an_object"),
    "comment behind": ('{"page":"Home"}//', "not_an_object"),
    "single quotes": ("{'page':'Home'}", "not_an_object"),
    "single quotes in part": ('{"page":"Home","x":\'1\'}', "not_an_object"),
    "name without quotes": ('{page:"Home"}', "not_an_object"),
    "name of other case": ('{"Page":"Home"}', "missing page"),
    "name escaped": (r'{"p\u0061ge":"Home"}', "accepted"),
    "unknown fields": ('{"page":"Home","x":[{"y":{"z":[]}},null,true,-1.5e3]}', "accepted"),
    "NaN": ('{"page":"Home","length":NaN}', "not_an_object"),
    "Infinity": ('{"page":"Home","length":-Infinity}', "not_an_object"),
    "NaN in an unknown field": ('{"page":"Home","x":NaN}', "not_an_object"),
    "1e400": ('{"page":"Home","length":1e400}', "not_an_object"),
    "1e400 for an integer": ('{"page":"Home","ts":1e400}', "not_an_object"),
    "1e30 for an integer": ('{"page":"Home","ts":1e30}', "not_an_object"),
    "integer past 64 bits": ('{"page":"Home","ts":9223372036854775808}', "not_an_object"),
    "integer far past 64 bits": ('{"page":"Home","ts":-123456789012345678901234567890}', "not_an_object"),
    "integer past 64 bits, unknown field": ('{"page":"Home","x":9223372036854775808}', "accepted"),
    "integer past 64 bits for a double": ('{"page":"Home","length":9223372036854775808}', "accepted"),
    "leading zero": ('{"page":"Home","ts":01}', "not_an_object"),
    "leading plus": ('{"page":"Home","ts":+1}', "not_an_object"),
    "no digit after the point": ('{"page":"Home","length":1.}', "not_an_object"),
    "no digit before the point": ('{"page":"Home","length":.5}', "not_an_object"),
    "hexadecimal": ('{"page":"Home","ts":0x10}', "not_an_object"),
    "half a pair in a text": (r'{"page":"Home","song":"\ud83d"}', "not_an_object"),
    "second half in a text": (r'{"page":"Home","song":"\uDE00"}', "not_an_object"),
    "pair reversed": (r'{"page":"Home","song":"\ude00\ud83d"}', "not_an_object"),
    "half a pair in an unknown field": (r'{"page":"Home","x":["\ud83d"]}', "not_an_object"),
    "half a pair in a name": (r'{"page":"Home","\ud83d":1}', "not_an_object"),
    "pair": (r'{"page":"Home","song":"\uD83D\ude00"}', "accepted"),
    "escaped backslash before ud83d": (r'{"page":"Home","song":"\\ud83d"}', "accepted"),
    "escape cut short": (r'{"page":"Home","song":"\u12"}', "not_an_object"),
    "escape cut short, unknown field": (r'{"page":"Home","x":"\u00g0"}', "not_an_object"),
    "unknown escape": (r'{"page":"Home","x":"\x41"}', "not_an_object"),
    "escaped NUL": (r'{"page":"Home","song":"\u0000"}', "accepted"),
    "control character in a text": ('{"page":"Home","song":"\x01"}', "not_an_object"),
    "tab in a text": ('{"page":"Home","song":"a\tb"}', "not_an_object"),
    "tabs outside": ('{\t"page"\t:\t"Home"\t}', "accepted"),
    # Spark passes over a value that it cannot read, and finds that what follows looks well.
    "text that opens only": ('{"page":"Home","song":"\t,"level":"free"}', "not_an_object"),
    "text that opens only, bad escape": (r'{"page":"Home","song":"\q,"level":"free"}', "not_an_object"),
    "text that opens only, required": ('{"page":"\x02,"level":"free"}', "not_an_object"),
    "text that opens only, last": ('{"page":"Home","userAgent":"\t}', "not_an_object"),
    "array without JSON": ('{"page":"Home","song":[x],"level":"free"}', "not_an_object"),
    "object without value": ('{"page":"Home","song":{"a","level":"free"}', "not_an_object"),
    "DEL in a text": ('{"page":"Home","song":"\x7f"}', "accepted"),
    "nested 100 deep": ('{"page":"Home","x":' + "[" * 100 + "]" * 100 + "}", "accepted"),
    "nested 200 deep": ('{"page":"Home","x":' + "[" * 200 + "]" * 200 + "}", "not_an_object"),
    "objects nested 200 deep": ('{"page":"Home","x":' + '{"a":' * 200 + "1" + "}" * 201, "not_an_object"),
    "nested 200,000 deep": ("[" * 200_000, "not_an_object"),
    "duplicate": ('{"page":"About","page":"Home"}', "accepted"),
    "duplicate, last is null": ('{"page":"Home","page":null}', "missing page"),
    "duplicate, last is unfit": ('{"page":"Home","page":""}', "missing page"),
    "empty name": ('{"":1,"page":"Home"}', "accepted"),
    "name with a point": ('{"page.x":1,"page":"Home"}', "accepted"),
    "page inside another object": ('{"x":{"page":"Home"}}', "missing page"),
    "other page, all else unfit": ('{"page":"Home","ts":"x","userId":-1,"level":"gold","sessionId":[]}', "accepted"),
    "page of other case": ('{"page":"nextsong"}', "accepted"),
}

# ------------------------------------------------------------------- fields of a song, or of a play: field, value, fate

DEFAULTS = {
    "song": {
        "song_id": '"SO1"',
        "title": '"Slow Tide"',
        "artist_id": '"AR1"',
        "artist_name": '"The Harbour"',
        "duration": "218.93179",
        "year": "2004",
        "artist_location": '"Oslo"',
        "artist_latitude": "59.91",
        "artist_longitude": "10.75",
    },
    "log": {
        "page": '"NextSong"',
        "ts": "1542241826796",
        "userId": '"26"',
        "level": '"free"',
        "sessionId": "583",
        "itemInSession": "0",
        "song": '"Slow Tide"',
        "artist": '"The Harbour"',
        "length": "218.93179",
        "location": '"Oslo"',
        "userAgent": r'"\"Mozilla\/5.0\""',
        "firstName": '"Ryan"',
        "lastName": '"Smith"',
        "gender": '"M"',
    },
}
ABSENT = "(absent)"
SONG_FIELDS = r"""
song_id          (absent)        missing song_id
song_id          null            missing song_id
song_id          ""              missing song_id
song_id          5               accepted
song_id          " "             accepted
title            (absent)        missing title
title            null            missing title
title            ""              accepted
title            true            accepted
artist_id        (absent)        missing artist_id
artist_id        null            missing artist_id
artist_id        ""              missing artist_id
artist_name      (absent)        missing artist_name
artist_name      null            missing artist_name
artist_name      ""              missing artist_name
artist_name      {"a":[1,"b"]}   accepted
duration         (absent)        missing duration
duration         null            missing duration
duration         ""              missing duration
duration         "218.9"         wrong_type duration
duration         "NaN"           wrong_type duration
duration         "Infinity"      wrong_type duration
duration         true            wrong_type duration
duration         [218.9]         wrong_type duration
duration         {}              wrong_type duration
duration         -0.1            out_of_domain duration
duration         -1              out_of_domain duration
duration         0               accepted
duration         -0.0            accepted
duration         218             accepted
duration         2.1893179e2     accepted
duration         1e308           accepted
duration         116.24753947672019 accepted
duration         4.14304e-22     accepted
duration         126.33090000000001 accepted
duration         1e309           not_an_object
duration         18446744073709551616  accepted
duration         -18446744073709551616 out_of_domain duration
year             (absent)        accepted
year             null            accepted
year             ""              accepted
year             "2004"          accepted
year             2004.0          accepted
year             true            accepted
year             2147483648      accepted
year             9223372036854775808   not_an_object
artist_location  (absent)        accepted
artist_location  5               accepted
artist_latitude  (absent)        accepted
artist_latitude  "59.91"         accepted
artist_latitude  ""              accepted
artist_longitude true            accepted
artist_longitude 1e309           not_an_object
"""
PLAY_FIELDS = r"""
page          (absent)             missing page
page          null                 missing page
page          ""                   missing page
page          5                    accepted
page          "NextSong "          accepted
ts            (absent)             missing ts
ts            null                 missing ts
ts            ""                   missing ts
ts            "1542241826796"      wrong_type ts
ts            1542241826796.0      wrong_type ts
ts            1.542241826796e12    wrong_type ts
ts            true                 wrong_type ts
ts            [1542241826796]      wrong_type ts
ts            {"a":1}              wrong_type ts
ts            946684799999         out_of_domain ts
ts            946684800000         accepted
ts            4102444799999        accepted
ts            4102444800000        out_of_domain ts
ts            0                    out_of_domain ts
ts            -1542241826796       out_of_domain ts
ts            9223372036854775807  out_of_domain ts
ts            -9223372036854775808 out_of_domain ts
ts            9223372036854775808  not_an_object
userId        (absent)             missing userId
userId        null                 missing userId
userId        ""                   missing userId
userId        26                   accepted
userId        "026"                accepted
userId        "0"                  accepted
userId        "999999999999999999" accepted
userId        999999999999999999   accepted
userId        "1000000000000000000" out_of_domain userId
userId        1000000000000000000  out_of_domain userId
userId        " 26"                out_of_domain userId
userId        "26\n"               out_of_domain userId
userId        "-26"                out_of_domain userId
userId        -26                  out_of_domain userId
userId        26.0                 out_of_domain userId
userId        2.6e1                out_of_domain userId
userId        "٢٦"                 out_of_domain userId
userId        "x"                  out_of_domain userId
userId        true                 out_of_domain userId
userId        ["26"]               out_of_domain userId
level         (absent)             missing level
level         null                 missing level
level         ""                   missing level
level         "paid"               accepted
level         "Paid"               out_of_domain level
level         "paid "              out_of_domain level
level         1                    out_of_domain level
sessionId     (absent)             missing sessionId
sessionId     null                 missing sessionId
sessionId     ""                   missing sessionId
sessionId     "583"                wrong_type sessionId
sessionId     583.0                wrong_type sessionId
sessionId     false                wrong_type sessionId
sessionId     -1                   out_of_domain sessionId
sessionId     0                    accepted
sessionId     9223372036854775807  accepted
itemInSession (absent)             missing itemInSession
itemInSession null                 missing itemInSession
itemInSession ""                   missing itemInSession
itemInSession "0"                  wrong_type itemInSession
itemInSession 0.5                  wrong_type itemInSession
itemInSession -1                   out_of_domain itemInSession
song          (absent)             missing song
song          null                 missing song
song          ""                   accepted
song          1999                 accepted
artist        (absent)             missing artist
artist        null                 missing artist
artist        ""                   accepted
artist        311                  accepted
length        (absent)             missing length
length        null                 missing length
length        ""                   missing length
length        "218.9"              wrong_type length
length        "NaN"                wrong_type length
length        -0.001               out_of_domain length
length        0                    accepted
length        1e400                not_an_object
location      (absent)             accepted
location      ["x"]                accepted
userAgent     null                 accepted
userAgent     5                    accepted
firstName     true                 accepted
lastName      {}                   accepted
gender        ""                   accepted
"""

# -------------------------------------------------------------------------------------------------- names, read as such

NAMES = (
    "A B/a+b=c.json",
    "100%/a%20b.json",
    "#/a#b?c.json",
    "[x]/{y}/*z.json",
    "é/Café 😀.json",
    r"back\slash/a\b.json",
    "a&b/c;d,e.json",
    "'quoted'/\"quoted\".json",
    "x.json/inner.json",  # a folder named like a file
    "gz/a b+%.json.gz",
    "linked/file.json",  # in a folder that is a link
    "link.json",  # a link to a file
)
SKIPPED = ("_hidden/a.json", ".hidden/a.json", "deep/_temporary/0/a.json", "_a.json", ".a.json", "_SUCCESS")
IGNORED = ("a.JSON", "a.txt", "a.json.bak", "a.json.GZ", "a.gz", "json")

# -------------------------------------------------------------- what the engines read differently: at most five of them

NAME = "n" * 50_001
EXOTIC = {
    "a number past a double, in a text field or an unknown one": {
        '{"page":"Home","x":1e400}': {"sail": "not_an_object", "spark": "accepted"},
        '{"page":"Home","song":1e400}': {"sail": "not_an_object", "spark": "accepted"},
    },
    "a field given twice, the last time with the wrong type": {
        '{"page":"Home","ts":1,"ts":"x"}': {"sail": "accepted ts=None", "spark": "accepted ts=1"},
    },
    "a number where text is expected, with fraction, exponent or past 64 bits": {
        '{"page":"Home","song":1e20}': {"sail": "accepted song=1e+20", "spark": "accepted song=1.0E20"},
        '{"page":"Home","song":12345678.5}': {
            "sail": "accepted song=12345678.5",
            "spark": "accepted song=1.23456785E7",
        },
        '{"page":"Home","song":99999999999999999999}': {
            "sail": "accepted song=1e+20",
            "spark": "accepted song=99999999999999999999",
        },
    },
    "-0 for an integer": {
        '{"page":"Home","ts":-0}': {"sail": "accepted ts=None", "spark": "accepted ts=0"},
        '{"page":"Home","userId":-0}': {"sail": "accepted user_id=-0.0", "spark": "accepted user_id=0"},
    },
    "a field name of more than 50,000 characters": {
        '{"page":"Home","' + NAME + '":1}': {"sail": "accepted", "spark": "not_an_object"},
    },
}


def write_line(kind: str, field: str, value: str) -> str:
    given = {**DEFAULTS[kind], field: value}
    return "{" + ",".join(f'"{name}":{value}' for name, value in given.items() if value != ABSENT) + "}"


def read_cases() -> dict[str, Case]:
    """Every case by its path below the input."""
    cases = {f"log_data/files/{name}": case for name, case in FILES.items()}
    cases.update((f"log_data/lines/{name}.json", Case(line.encode(), [fate])) for name, (line, fate) in LINES.items())
    for kind, table in (("song", SONG_FIELDS), ("log", PLAY_FIELDS)):
        for row in table.strip().split("\n"):
            found = re.fullmatch(r"(\w+) +(.+?) +([a-z_]+( \w+)?)", row)
            assert found, row
            field, value, fate = found.group(1, 2, 3)
            name = f"{kind}_data/fields/{field} {value.replace(':', '=')}.json"
            assert name not in cases, row
            cases[name] = Case(write_line(kind, field, value).encode(), [fate])
    for name in NAMES:
        line = write_line("log", "location", json.dumps(name)).encode()
        cases[f"log_data/names/{name}"] = Case(gzip.compress(line) if name.endswith(".gz") else line, ["accepted"])
    return cases


CASES = read_cases()


@pytest.fixture(scope="session")
def odd_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case, what is to be skipped, and what is to be ignored."""
    folder = tmp_path_factory.mktemp("odd [input] é+%20")
    names = folder / "log_data" / "names"
    for made in (names, folder / "elsewhere"):
        made.mkdir(parents=True)
    (names / "linked").symlink_to(folder / "elsewhere", target_is_directory=True)
    (names / "link.json").symlink_to(folder / "linked to.json")
    files = {path: case.content for path, case in CASES.items()}
    files.update((f"log_data/names/{name}", b"not read") for name in (*SKIPPED, *IGNORED))
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


class Staged(NamedTuple):
    """A folder of lines as an engine staged them: its rows, and the accounting."""

    rows: list[dict[str, Any]]
    read: dict[str, int]
    counts: dict[str, int]

    def values(self, path: str, *columns: str) -> list[Row]:
        """These columns of a file's lines."""
        return [tuple(row[name] for name in columns) for row in self.rows if row["source_file"] == path]

    @property
    def fates(self) -> dict[str, list[str]]:
        """The fates of each file's lines, sorted: their order in a file is nobody's promise."""
        fates = defaultdict(list)
        for row in self.rows:
            fates[row["source_file"]].append(name_fate(row["reason"], row["field"]))
        return {path: sorted(found) for path, found in fates.items()}


def name_fate(reason: str | None = None, field: str | None = None) -> str:
    return " ".join(filter(None, (reason or "accepted", field)))


def stage(engine: etl.Engine, kind: str, folder: Path, scratch: Path) -> Staged:
    """What etl.stage_input does, and its proof."""
    source, place = etl.SOURCES[kind], etl.Folder(str(folder))
    files, _ = place.list_input(source.folder)
    lines, sizes = etl.read_lines(engine, place, source.folder, files, etl.Folder(str(scratch / "parts")))
    engine.write(etl.stage_lines(lines, source), scratch / kind)
    staged = engine.read(scratch / kind)
    read, counts = etl.account(kind, staged)
    etl.prove_read(place, read, sizes)
    return Staged([row.asDict(recursive=True) for row in staged.collect()], read, counts)


@pytest.fixture(scope="session")
def staged(engine: etl.Engine, odd_input: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Staged]:
    """Every case, staged once an engine."""
    return {kind: stage(engine, kind, odd_input, tmp_path_factory.mktemp("staged")) for kind in KINDS}


def test_every_odd_line_has_its_fate(staged: Mapping[str, Staged]) -> None:
    assert len(CASES) >= 40
    found = {**staged["song"].fates, **staged["log"].fates}
    assert found == {path: sorted(case.fates) for path, case in CASES.items() if case.fates}


def test_every_odd_line_is_accounted_for(staged: Mapping[str, Staged]) -> None:
    for kind in KINDS:
        fates = Counter(
            fate if fate in ("accepted", "blank") else "rejected"
            for path, case in CASES.items()
            for fate in case.fates
            if path.startswith(kind)
        )
        counts = staged[kind].counts
        assert {fate: counts[fate] for fate in ("lines", *fates)} == {"lines": fates.total(), **fates}


def test_what_is_kept_of_odd_lines(staged: Mapping[str, Staged]) -> None:
    """Literal values; that all other values are the oracle's is tested below."""
    song, log = staged["song"], staged["log"]
    files, lines, fields = "log_data/files/", "log_data/lines/", "log_data/fields/"
    (long,) = log.values(files + "20 MB.json", "location")
    assert (len(long[0]), set(long[0])) == (20_000_000, {"x"})
    (long,) = log.values(files + "20 MB of damage.json", "line")
    assert long == ('{"page":"Home","location":"' + "x" * 3973,)
    kept = {
        files + "invalid UTF-8.json": ("page", "Caf\ufffd \ufffd \ufffd\ufffd\ufffd \ufffd\ufffd"),
        files + "line separators.json": ("page", "\u2028\u2029\x85"),
        files + "bare CR.json": ("line", '{"page":"Home"}\r{"page":"Home"}'),
        files + "BOM twice.json": ("line", '\ufeff{"page":"Home"}'),
        files + "NUL behind.json": ("line", '{"page":"Home"}\0'),
        files + "only a line end.json": ("line", None),
        lines + "duplicate.json": ("page", "Home"),
        lines + "pair.json": ("song", "\U0001f600"),
        lines + "escaped backslash before ud83d.json": ("song", r"\ud83d"),
        lines + "escaped NUL.json": ("song", "\0"),
        lines + "truncated in a text.json": ("line", '{"page":"Ho'),
        lines + "integer past 64 bits for a double.json": ("length", 9223372036854775808.0),
        lines + "other page, all else unfit.json": ("ts", None),
        fields + "userId 26.json": ("user_id", "26"),
        fields + 'userId "026".json': ("user_id", "026"),
        fields + "song 1999.json": ("song", "1999"),
        fields + "firstName true.json": ("first_name", "true"),
        fields + "lastName {}.json": ("last_name", "{}"),
        fields + 'location ["x"].json': ("location", '["x"]'),
        fields + "userAgent null.json": ("user_agent", None),
        fields + "userAgent 5.json": ("user_agent", "5"),
        fields + "ts true.json": ("line", write_line("log", "ts", "true")),
        fields + 'song "".json': ("song", ""),
    }
    assert {path: log.values(path, column) for path, (column, _) in kept.items()} == {
        path: [(value,)] for path, (_, value) in kept.items()
    }
    kept_of_songs = {
        'artist_name {"a"=[1,"b"]}': ("artist_name", '{"a":[1,"b"]}'),
        "artist_location 5": ("artist_location", "5"),
        'artist_latitude "59.91"': ("artist_latitude", None),
        "artist_longitude true": ("artist_longitude", None),
        'year "2004"': ("year", None),
        "year 2004.0": ("year", None),
        "duration 2.1893179e2": ("duration", 218.93179),
        "duration 116.24753947672019": ("duration", 116.24753947672019),
        "duration 4.14304e-22": ("duration", 4.14304e-22),
        "duration 126.33090000000001": ("duration", 126.33090000000001),  # one unit above 126.3309
        "title true": ("title", "true"),
    }
    assert {name: song.values(f"song_data/fields/{name}.json", of[0]) for name, of in kept_of_songs.items()} == {
        name: [(value,)] for name, (_, value) in kept_of_songs.items()
    }


def test_names_are_kept_as_they_are_and_what_is_not_input_is_not_read(
    staged: Mapping[str, Staged], odd_input: Path
) -> None:
    rows = [row for row in staged["log"].rows if row["source_file"].startswith("log_data/names/")]
    assert sorted((row["source_file"], row["location"]) for row in rows) == sorted(
        (f"log_data/names/{name}", name) for name in NAMES
    )
    files, others = etl.Folder(str(odd_input)).list_input("log_data")
    assert sorted(files) == sorted(path for path in CASES if path.startswith("log_data/"))
    assert sorted(others) == sorted(f"log_data/names/{name}" for name in IGNORED)


def expect_rows(kind: str, lines: Iterator[tuple[str, str]]) -> list[Row]:
    """The staged rows, by the oracle: source_file, reason, field, line, and the values of accepted lines."""
    rows: list[Row] = []
    for source_file, line in lines:
        record, fault = oracle.read_record(kind, line)
        if not line.strip(" \t\r"):
            rows.append((source_file, "blank", None, None))
        elif fault:
            rows.append((source_file, *fault, line[:4000]))
        else:
            rows.append((source_file, None, None, None, *(record[field.name] for field in etl.SOURCES[kind].fields)))
    return rows


def found_rows(kind: str, rows: list[dict[str, Any]]) -> list[Row]:
    """The staged rows as the oracle's; those of a line that is set aside hold no values that count."""
    columns = [field.column for field in etl.SOURCES[kind].fields]
    names = {
        True: ["source_file", "reason", "field", "line", *columns],
        False: ["source_file", "reason", "field", "line"],
    }
    return [tuple(row[name] for name in names[row["reason"] is None]) for row in rows]


def assert_same(found: list[Row], expected: list[Row]) -> None:
    """Equal as bags; what is on one side only is shown, shortened."""
    only_found, only_expected = Counter(found), Counter(expected)
    only_found, only_expected = only_found - only_expected, only_expected - only_found
    assert [str(row)[:1000] for row in only_found][:5] == [str(row)[:1000] for row in only_expected][:5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_agrees_on_every_odd_line(kind: str, staged: Mapping[str, Staged], odd_input: Path) -> None:
    """Only nesting that both engines refuse is no fault to it."""
    deep = ("nested 200 deep.json", "nested 200,000 deep.json")
    rows = [row for row in staged[kind].rows if not row["source_file"].endswith(deep)]
    lines = ((path, line) for path, line in oracle.read_lines(odd_input, kind) if not path.endswith(deep))
    assert_same(found_rows(kind, rows), expect_rows(kind, lines))


# --------------------------------------------------------------------------------------------- the engines' differences


def stage_texts(engine: etl.Engine, lines: list[str]) -> list[dict[str, Any]]:
    """Log lines as staged, in the order given."""
    rows = [(f"{number:06}", line, 0) for number, line in enumerate(lines)]
    frame = engine.spark.createDataFrame(rows, "source_file string, line string, bytes bigint")
    staged = etl.stage_lines(frame, etl.SOURCES["log"]).orderBy("source_file").collect()
    return [row.asDict(recursive=True) for row in staged]


def test_the_engines_differ_on_at_most_five_kinds_of_line() -> None:
    assert len(EXOTIC) <= 5
    assert all(fates["sail"] != fates["spark"] for lines in EXOTIC.values() for fates in lines.values())


def test_the_exotic_lines_are_read_as_the_list_says(engine: etl.Engine) -> None:
    expected = {line: fates[engine.name] for lines in EXOTIC.values() for line, fates in lines.items()}
    found = {}
    for line, row in zip(expected, stage_texts(engine, list(expected))):
        told = (f"{name}={row[name]}" for name in ("ts", "user_id", "song") if f" {name}=" in expected[line])
        found[line] = " ".join([name_fate(row["reason"], row["field"]), *told])
    assert found == expected


class Number(str):
    """A number of a line, as written."""

    __slots__ = ()


def numbers_in(value: Any) -> Iterator[Number]:
    if isinstance(value, Number):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value if isinstance(value, list) else value.values():
            yield from numbers_in(inner)


def is_exotic(kind: str, line: str) -> bool:
    """Whether a line may be of a kind in EXOTIC."""
    repeated = []

    def keep_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    try:
        given = json.loads(line, object_pairs_hook=keep_pairs, parse_int=Number, parse_float=Number)
    except (ValueError, RecursionError):
        return False
    fields = etl.SOURCES[kind].fields if isinstance(given, dict) else ()
    texts = [given.get(field.name) for field in fields if field.type == "string"]
    integers = [given.get(field.name) for field in fields if field.type == "bigint"]
    return (
        any(repeated)
        or any(abs(float(number)) == float("inf") for number in numbers_in(given))
        or any(number == "-0" for number in numbers_in([integers, texts]))
        or any(not re.fullmatch("-?[0-9]{1,18}", number) for number in numbers_in(texts))
    )


# -------------------------------------------------------------------------------------------------------- seeded damage

ODD_VALUES = r"""
null true false "" "_" "x" 0 -0 -0.0 1 -1 1.0 1.5 1e2 1E+2 1e-400 1e400 0e999 1e19 1e30 1e308 -1e400
9223372036854775807 9223372036854775808 -9223372036854775808 -9223372036854775809 123456789012345678901234567890
1542241826796 1542241826796.0 116.24753947672019 -73.98765432109876 4.14304e-22 "1542241826796" "39" "0"
"1000000000000000000" "٣" 126.33090000000001 946684799999 946684800000 4102444800000 2147483648 2004 "2004" [] {} [1]
{"a":1} [[[]]] [x] [1,] {"a" "free" "paid" "Paid" "NextSong" "nextsong" "Home" "\u00e9" "\ud83d\ude00" "\ud83d"
"\ude00" "\ude00\ud83d" "\u12" "\x41" "\q "\\" "\\ud83d" "\\\ud83d" "\n\t" "\u0000" "é" "😀" NaN Infinity -Infinity
"NaN" "Infinity" nan None True 01 - +1 .5 1. 1e 0x10 'x' undefined
"""
VALUES = ODD_VALUES.split()
SNIPPETS = (
    *"{}[]\",:\\ \t\r0123456789eE+-.'nulltrfasNI/uUdD_$#\0\x01\x1f\x7f\ufeffé\u00a0\u2028\x85😀",
    *(r"\u", r"\ud83d", r"\u00e9", r"\"", r"\\", '":', '",', "},", "} {", "//", "/**/"),
)
BAD_BYTES = (b"\xff", b"\xc3", b"\xe2\x82", b"\xed\xa0\xbd", b"\xf0\x9f\x98", b"\xc0\x80", b"\xf5\x80\x80\x80", b"\x80")
TAILS = (b"}", b" ", b"\r", b",", b"{}", b"x", b"\0", b'{"a":1}', b"\xef\xbb\xbf", b"//", b'"', b"]")
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[A-Za-z]+|[^\s]')


def damage_values(chance: random.Random, line: str) -> bytes:
    """Other values in one or two fields."""
    tokens = TOKEN.findall(line)
    for _ in range(chance.choice((1, 1, 1, 2))):
        before = [number for number, token in enumerate(tokens[:-1]) if token == ":"]
        tokens[chance.choice(before or [0]) + 1] = chance.choice(VALUES)
    return chance.choice(("", " ")).join(tokens).encode()


def damage_tokens(chance: random.Random, line: str) -> bytes:
    """Tokens taken out, put in, doubled, swapped, cut off."""
    tokens = TOKEN.findall(line)
    for _ in range(chance.choice((1, 1, 2, 3))):
        one, other = sorted(chance.randrange(len(tokens)) for _ in range(2))
        new = chance.choice(chance.choice((VALUES, SNIPPETS)))
        ways = (
            [*tokens[:one], *tokens[one + 1 :]],
            [*tokens[:one], tokens[other], *tokens[one:]],
            [*tokens[:one], tokens[other], *tokens[one + 1 : other], tokens[one], *tokens[other + 1 :]],
            [*tokens[:one], new, *tokens[one:]],
            [*tokens[:one], new, *tokens[one + 1 :]],
            [*tokens[:other], *tokens[one : one + 8], *tokens[other:]],
            [*tokens[:other], *chance.choice(([], ["}"], ['"', "}"]))],
        )
        tokens = chance.choice(ways) or ["{"]
    return chance.choice(("", " ", "\t")).join(tokens).encode()


def damage_bytes(chance: random.Random, line: str) -> bytes:
    """Bits flipped, bytes taken out, put in, doubled, swapped, cut off."""
    raw = line.encode()
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        one, other = sorted(chance.randrange(len(raw)) for _ in range(2))
        ways = (
            raw[:one] + bytes([raw[one] ^ 1 << chance.randrange(8)]) + raw[one + 1 :],
            raw[:one] + raw[min(other, one + chance.choice((1, 2, 5, 50))) :],
            raw[:one] + chance.choice(SNIPPETS).encode() + raw[one:],
            raw[:one] + chance.choice(SNIPPETS).encode() + raw[one + 1 :],
            raw[:one] + chance.choice(BAD_BYTES) + raw[one:],
            raw[:one] + raw[other : other + 1] + raw[one + 1 : other] + raw[one : one + 1] + raw[other + 1 :],
            raw[:other] + raw[one : one + 20] + raw[other:],
            raw[:other],
            raw + chance.choice(TAILS),
        )
        raw = chance.choice(ways) or b"{"
    return raw.replace(b"\n", b" ")


def write_damage(seed: int, lines: Mapping[str, list[str]], number: int, folder: Path) -> None:
    """That many damaged lines of each kind, in one file each; exotic ones left out."""
    for kind in KINDS:
        chance, made = random.Random(f"{seed} {kind}"), [b"{}"]  # a file's first line may lose its BOM
        while len(made) < number:
            line = chance.choice((damage_values, damage_tokens, damage_bytes))(chance, chance.choice(lines[kind]))
            if not is_exotic(kind, line.decode(errors="replace").strip(" \t\r")):
                made.append(line)
        (folder / f"{kind}_data").mkdir(parents=True)
        (folder / f"{kind}_data" / "damaged.json").write_bytes(b"\n".join(made))


def test_engines_and_oracle_agree_on_every_damaged_line(engine: etl.Engine, tmp_path: Path) -> None:
    """Each line's fate, and the values of those that are accepted: every engine against the oracle."""
    lines = {kind: [line for _, line in oracle.read_lines(HOME / "data", kind)] for kind in KINDS}
    write_damage(20181101, lines, 3000, tmp_path / "input")
    for kind in KINDS:
        rows = stage(engine, kind, tmp_path / "input", tmp_path).rows
        expected = expect_rows(kind, oracle.read_lines(tmp_path / "input", kind))
        assert len(expected) == 3000
        assert_same(found_rows(kind, rows), expected)


# ------------------------------------------------------------------------------------------------ the proof of the read


def prove(folder: Path, found: Mapping[str, int], listed: Mapping[str, int]) -> str | None:
    """The fault that the proof finds, with its exit code."""
    try:
        etl.prove_read(etl.Folder(str(folder)), found, dict(listed))
    except etl.Stop as stop:
        return f"{stop.code} {stop}"
    return None


@pytest.mark.parametrize(
    ("listed", "read"),
    [
        (100, None),  # not read
        (100, 200),  # read twice
        (100, 0),
        (100, 50),  # cut
        (100, 96),  # more is gone than a BOM
        (100, 99),  # less is gone than a BOM and more is there than no last line end accounts for
        (100, 102),
        (None, 100),  # never listed
        (None, 2),
        (2, None),
        (1, None),
    ],
)
def test_a_read_that_loses_or_doubles_is_caught(tmp_path: Path, listed: int | None, read: int | None) -> None:
    found, expected = {"log_data/good.json": 100}, {"log_data/good.json": 100}
    found.update({} if read is None else {"log_data/a.json": read})
    expected.update({} if listed is None else {"log_data/a.json": listed})
    told = f"1 log_data/a.json: {listed or 0} bytes were listed and {read or 0} were read; this run cannot be trusted"
    assert prove(tmp_path, found, expected) == told


@pytest.mark.parametrize(
    ("listed", "read"),
    [
        (100, 100),
        (100, 101),  # no final line end
        (100, 97),  # a BOM
        (100, 98),  # a BOM, and no final line end
        (0, None),
        (3, None),  # only a BOM
        (3, 3),
    ],
)
def test_a_whole_read_is_believed(tmp_path: Path, listed: int, read: int | None) -> None:
    assert prove(tmp_path, {} if read is None else {"log_data/a.json": read}, {"log_data/a.json": listed}) is None


def test_a_packed_file_that_the_engine_unpacks_must_be_read_unless_it_is_empty(tmp_path: Path) -> None:
    for name, content in {"full": b"{}\n", "blank": b"\n", "empty": b""}.items():
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(content))
    listed = {f"{name}.json.gz": etl.UNKNOWN for name in ("full", "blank", "empty")}
    assert prove(tmp_path, {"full.json.gz": 3, "blank.json.gz": 1}, listed) is None
    for name in ("full", "blank"):
        found = {path: 3 for path in ("full.json.gz", "blank.json.gz") if name not in path}
        assert str(prove(tmp_path, found, listed)).startswith(f"1 {name}.json.gz: ")


def test_a_file_that_the_engine_reads_twice_ends_the_run(engine: etl.Engine, tmp_path: Path) -> None:
    """As Sail does where it cuts files into ranges."""
    (tmp_path / "log_data").mkdir()
    for name in "ab":
        (tmp_path / "log_data" / f"{name}.json").write_bytes(HOME_PAGE)
    place, source = etl.Folder(str(tmp_path)), etl.SOURCES["log"]
    lines, sizes = etl.read_lines(engine, place, "log_data", place.list_input("log_data")[0], etl.Folder("parts"))
    twice = lines.unionByName(lines.where("source_file LIKE '%b.json'"))
    told = prove(tmp_path, etl.account("log", etl.stage_lines(twice, source))[0], sizes)
    assert str(told).startswith("1 log_data/b.json: 15 bytes were listed and 3")


# -------------------------------------------------------------------------------------------- packed files and big ones


def read_rows(engine: etl.Engine, folder: Path, parts: Path) -> list[Row]:
    place = etl.Folder(str(folder))
    lines, sizes = etl.read_lines(engine, place, "log_data", place.list_input("log_data")[0], etl.Folder(str(parts)))
    rows, found = lines.collect(), Counter[str]()
    for row in rows:
        found[row["source_file"]] += row["bytes"]
    etl.prove_read(place, found, sizes)
    return sorted((row["source_file"], row["line"]) for row in rows)


@pytest.mark.parametrize("part", [1, 7, 16, 48])
def test_big_files_are_cut_where_a_line_ends(
    engine: etl.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """On Sail; Spark, which cuts by itself, reads the same."""
    text = b"\xef\xbb\xbf" + HOME_PAGE + b"\r\n\n" + "é😀".encode() * 9 + b"\n\n\xef\xbb\xbfkept BOM\n" + HOME_PAGE
    contents = {
        "big.json": text,
        "big, newline.json": text + b"\n",
        "small.json": b"{}",
        "7.json": text * 2,  # a name such as the parts have
        "packed.json.gz": gzip.compress(text),
        "empty.json.gz": gzip.compress(b""),
    }
    folder = tmp_path / "log_data" / "a b+%"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(etl, "PART", part)
    assert read_rows(engine, tmp_path, tmp_path / "cut") == sorted(oracle.read_lines(tmp_path, "log"))
    cut = {path.parent.name for path in (tmp_path / "cut").rglob("*.json") if path.is_file()}
    assert cut == (set() if engine.name == "spark" else set(contents) - {"small.json"})


def test_a_broken_archive_is_named(engine: etl.Engine, tmp_path: Path) -> None:
    """On Sail before the engine reads it, on Spark after it has failed to."""
    whole = gzip.compress(HOME_PAGE * 1000)
    broken = {"cut": whole[:-9], "damaged": whole[:20] + b"\0\0" + whole[22:], "plain": HOME_PAGE, "tail": whole + b"x"}
    for name, content in broken.items():
        path = tmp_path / name / "log_data" / f"{name}.json.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        (path.parent / "good.json.gz").write_bytes(whole)
        place = etl.Folder(str(tmp_path / name))
        files, _ = place.list_input("log_data")
        named = f"{re.escape(str(path))}: a broken archive: "
        if engine.name == "sail":
            with pytest.raises(etl.Stop, match=named) as stop:
                etl.read_lines(engine, place, "log_data", files, etl.Folder(str(tmp_path / name / "parts")))
        else:
            with pytest.raises(etl.Stop, match=named) as stop:
                etl.name_broken_archive(place, files)
        assert stop.value.code == 2
