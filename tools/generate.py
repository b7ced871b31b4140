"""Write song and log files that look like the real ones: same layout, keys, escaping, habits and flaws.

    python tools/generate.py --out data                                   makes data/, byte for byte
    python tools/generate.py --out lake --events 2000000 --users 5000 --songs 10000
    python tools/generate.py --out dirty --bad 0.05 --repeated 0.1        damaged and twice delivered lines

Same arguments, same bytes, on every Python from 3.9: all chance comes from random.random(), and no result depends on
hash order, locale or the clock. Every name is invented here; only places and browsers are real.
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from fractions import Fraction
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any, Callable, NamedTuple, NoReturn, TypeVar

T = TypeVar("T")
Record = dict[str, Any]

# ------------------------------------------------------------------------------------------------- what real data holds

MILLISECOND = 796  # of every instant: real events lie whole seconds apart, so users come to share instants
HOUR = 3600
LONGEST_WAIT = 8 * HOUR  # a user who is still listening starts his next session later, but not later than this
SHELF = 10_000  # lines kept for a second delivery

PLAYS_OF_CATALOGUE = 0.53  # less those that are mis-encoded in the log: half of the plays find their song
TOP_LISTENER = Fraction(1, 10)  # of all sessions
SHARED_STARTS = 0.06  # sessions that start in the very second of another line, if a session is under way
LOGGED_OUT_STARTS = 0.084
ACCENTED, PADDED = 0.027, 0.004  # of names; of titles
CONTROL = 0.06  # of titles outside the catalogue, if they have an apostrophe
NO_YEAR, NO_PLACE, NO_COORDINATES = 0.53, 0.43, 0.35  # the last of those with a place
NEW_ARTIST, OTHERWISE, TWIN = 0.39, 0.065, 0.005  # of songs: first of an artist, artist described anew, title repeated

# Numbers of songs, low so that small catalogues have them: the title and artist of song 0 with another duration; its
# whole (title, artist, duration) under another song_id; an empty title.
SAME_TITLE, SAME_TRIPLE, NO_TITLE = 10, 11, 12

# Equally likely slices, from the smallest value to the greatest.
SESSION_EVENTS = (*[1] * 8, *[2] * 5, 3, 3, 4, 5, 6, 6, 10, 16, 26, 42, 129)
PAUSES = (0, 2, 6, 12, 20, 30, 40, 50, 64, 80, 110, 150, 210, 290, 420, 3000)  # seconds between two pages
DURATIONS = (16, 125, 163, 188, 206, 223, 235, 252, 275, 300, 350, 650)  # seconds; one in 250 is longer

WEEKDAYS = (31, 32, 38, 30, 33, 15, 11)  # Monday to Sunday
HOURS = (18, 16, 11, 13, 17, 20, 22, 23, 26, 33, 38, 39, 40, 52, 58, 68, 62, 55, 52, 36, 32, 26, 22, 20)  # UTC

# Which page follows which, "" being the start of a session. Who has logged out sees only the second table.
AFTER_LOGGED_IN = {
    "": {"NextSong": 577, "Home": 281, "About": 2, "Help": 1, "Error": 1},
    "NextSong": {"NextSong": 5800, "Home": 121, "Logout": 78, "Settings": 33, "Help": 32, "About": 14, "Error": 8}
    | {"Downgrade": 61, "Upgrade": 75},
    "Home": {"NextSong": 431, "Home": 20, "Settings": 19, "About": 6, "Help": 4, "Logout": 9}
    | {"Downgrade": 10, "Upgrade": 7},
    "Upgrade": {"Submit Upgrade": 8, "Home": 5, "NextSong": 3, "Upgrade": 2},
    "Downgrade": {"NextSong": 35, "Home": 10, "Downgrade": 3, "Submit Downgrade": 6},
    "Settings": {"NextSong": 30, "Save Settings": 10, "Settings": 4, "Home": 4, "Help": 4, "Logout": 3},
    "Help": {"NextSong": 30, "Help": 2, "Home": 2},
    "About": {"NextSong": 4, "Home": 6, "About": 2},
    "Error": {"NextSong": 2, "Home": 1},
    **{form: {"Home": 1} for form in ("Login", "Save Settings", "Submit Upgrade", "Submit Downgrade")},
}
AFTER_LOGGED_OUT = {
    "": {"Home": 54, "Login": 25},
    "Home": {"Login": 61, "Home": 10, "About": 9, "Help": 4},
    "About": {"Login": 4, "About": 3, "Home": 1},
    "Help": {"Login": 2, "Help": 2},
    "Logout": {"Home": 1},
}
LOGGED_OUT_STARTS = 0.084
FORMS = {"Login", "Logout", "Save Settings", "Submit Upgrade", "Submit Downgrade"}  # PUT 307, one second after
ONLY_WHEN = {"Upgrade": "free", "Downgrade": "paid"}
LEVEL_AFTER = {"Submit Upgrade": "paid", "Submit Downgrade": "free"}

METRO_LINES = """\
Akron, OH|Albuquerque, NM|Anchorage, AK|Ann Arbor, MI|Asheville, NC|Atlanta-Sandy Springs-Roswell, GA|Bangor, ME
Austin-Round Rock, TX|Baltimore-Columbia-Towson, MD|Bellingham, WA|Bend-Redmond, OR|Billings, MT|Boise City, ID
Boston-Cambridge-Newton, MA-NH|Boulder, CO|Buffalo-Cheektowaga-Niagara Falls, NY|Burlington-South Burlington, VT
Charleston-North Charleston, SC|Charlotte-Concord-Gastonia, NC-SC|Chattanooga, TN-GA|Cheyenne, WY|Colorado Springs, CO
Chicago-Naperville-Elgin, IL-IN-WI|Cincinnati, OH-KY-IN|Cleveland-Elyria, OH|Columbus, OH|Corpus Christi, TX
Denver-Aurora-Lakewood, CO|Des Moines-West Des Moines, IA|Duluth, MN-WI|El Paso, TX|Erie, PA|Fargo, ND-MN|Flagstaff, AZ
Fresno, CA|Grand Rapids-Wyoming, MI|Green Bay, WI|Hartford-West Hartford-East Hartford, CT|Ithaca, NY|Jackson, MS
Jacksonville, FL|Kansas City, MO-KS|Knoxville, TN|Las Vegas-Henderson-Paradise, NV|Lexington-Fayette, KY|Lincoln, NE
Little Rock-North Little Rock-Conway, AR|Louisville/Jefferson County, KY-IN|Madison, WI|Memphis, TN-MS-AR|Missoula, MT
New York-Newark-Jersey City, NY-NJ-PA|Omaha-Council Bluffs, NE-IA|Orlando-Kissimmee-Sanford, FL|Pittsburgh, PA
Providence-Warwick, RI-MA|Reno, NV|Rochester, NY|San Francisco-Oakland-Hayward, CA|Spokane-Spokane Valley, WA
Sacramento--Roseville--Arden-Arcade, CA|Tucson, AZ|Wichita, KS"""
METROS = METRO_LINES.replace("\n", "|").split("|")

WINDOWS = ["Windows NT 5.1", "Windows NT 6.1; WOW64", "Windows NT 6.3; WOW64"]
SYSTEMS = ["Macintosh; Intel Mac OS X 10_9_4", "X11; Linux x86_64", *WINDOWS, "Macintosh; Intel Mac OS X 10_10_0"]
APPLES = [*SYSTEMS[::5], "iPhone; CPU iPhone OS 7_1_2 like Mac OS X", "iPad; CPU OS 7_1_2 like Mac OS X"]
KIT = "(KHTML, like Gecko)"
# Chrome and Safari arrive in literal double quotes, the others bare.
AGENTS = [
    f'"Mozilla/5.0 ({system}) AppleWebKit/537.36 {KIT} Chrome/{version} Safari/537.36"'
    for version in ("36.0.1985.143", "36.0.1985.125", "37.0.2062.94", "35.0.1916.153")
    for system in SYSTEMS
]
AGENTS += [f'"Mozilla/5.0 ({system}) AppleWebKit/537.78.2 {KIT} Version/7.0.6 Safari/537.78.2"' for system in APPLES]
AGENTS += [f"Mozilla/5.0 ({system}; rv:31.0) Gecko/20100101 Firefox/31.0" for system in SYSTEMS]
AGENTS += [f"Mozilla/5.0 ({system}; rv:32.0) Gecko/20100101 Firefox/32.0" for system in WINDOWS]
AGENTS += [f"Mozilla/5.0 ({system}; Trident/7.0; rv:11.0) like Gecko" for system in WINDOWS[1:]]

# ------------------------------------------------------------------------------------------------- words to invent from

SYLLABLES = "ba bel bri cor da del dor el fa fen gal gri hol il jas ka kel lo lun mar mi nor quo ra ren sa sol tam u zi"
WORDS = """\
Amber Ashes Avenue Balcony Bridge Canyon Carousel Cinder Comet Copper Dancer Distance Echo Ember Engine Feather Ferry
Garden Glass Harbor Hollow Island Ivory Kite Lantern Letter Meadow Mirror Neon Orchard Paper Parade Quarry Rain River
Rooftop Sailor Shadow Signal Silver Station Thunder Tides Tunnel Umbrella Velvet Violet Waltz Window Wonder Zephyr"""
ARTIST_FORMS = (
    "{0} {1}|{0} {1}|{0} {1}|{0}|The {0} {2}s|{0} & {1}|{0}/{1}|DJ {0}|{0} {2} Trio|{0} feat. {1}|{0} 'n {1}|{0};{1}"
)
TITLE_FORMS = """\
{2} {3}|{2} {3}|{2} {3}|{2}|The {2}|The {0} {2}|{2} Of The {3}|{0}'s {2}|Don't {2} The {3}|{2} {3} (Album Version)
{2} (Live)|{2} / {3}|{2} "{3}" [{0} Remix]|No. 2 In G: II. {2}"""
ACCENTS = dict(zip("aeionuy", "\u00e3\u00e9\u00ed\u00f6\u00f1\u00fc\u00fd"))
PLACES = (
    ("London, England", 51.50632, -0.12714),
    ("Chicago, IL", 41.88415, -87.63241),
    ("Nashville, TN.", 36.16778, -86.77836),
    ("S\u00e3o Paulo, Brazil", -23.5629, -46.65461),
    ("Malm\u00f6, Sweden", 55.60587, 13.00073),
    ("Texas", 31.16893, -100.07715),
    ("Oslo", 59.9138, 10.7387),
    ("Lagos", 6.4541, 3.39467),
)

# ----------------------------------------------------------------------------------------------------- what damage does

LINE_FAULTS: list[Callable[[str, float], str]] = [
    *[lambda line, share: line[: 1 + int(share * (len(line) - 1))]] * 4,  # cut off somewhere
    lambda line, share: line + " x",
    lambda line, share: line + "}",
    lambda line, share: line + line,
    lambda line, share: f"[{line}]",
    lambda line, share: json.dumps(line),
    lambda line, share: line.replace('"', "'"),
    lambda line, share: ("42", "true", "null", "[]", '"text"', "{")[int(share * 6)],
]
# Per required field the JSON that must not stand there; absent and null come on top, for each of them.
OTHER_PAGE_FAULTS: dict[str, list[str]] = {"page": ['""']}
PLAY_FAULTS: dict[str, list[str]] = {
    "page": ['""'],
    "ts": ["0", "946684799999", "4102444800000", "-1", "true", '"1541121934796"', "1541121934796.5", "9" * 20],
    "userId": ['""', '"abc"', '"-3"', '" 8"', '"1234567890123456789"', "true"],
    "level": ['""', '"gold"', '"Paid"', "1"],
    "sessionId": ["-1", '"818"', "1.5"],
    "itemInSession": ["-1", '"5"', "{}"],
    "song": [],
    "artist": [],
    "length": ["-0.5", '"long"', "NaN", "Infinity", "true", "[200.5]"],
}
SONG_FAULTS: dict[str, list[str]] = {
    "song_id": ['""'],
    "title": [],
    "artist_id": ['""'],
    "artist_name": ['""'],
    "duration": ["-1.0", '"long"', "NaN", "-Infinity", "true", "[200.5]"],
}

# --------------------------------------------------------------------------------------------------------------- chance


class Draw:
    """Every choice from random() alone: choice, shuffle and their like have changed between versions of Python."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed).random

    def below(self, limit: int) -> int:
        return int(self.random() * limit)

    def chance(self, share: float) -> bool:
        return self.random() < share

    def one(self, values: Sequence[T]) -> T:
        return values[int(self.random() * len(values))]

    def popular(self, values: Sequence[T]) -> T:
        """The first values most often: half of all draws are from the first quarter."""
        share = self.random()
        return values[int(share * share * len(values))]

    def weighted(self, values: Sequence[T], bounds: Sequence[float]) -> T:
        """By `bounds`, the running sum of the weights."""
        return values[bisect_right(bounds, self.random() * bounds[-1])]

    def sliced(self, slices: Sequence[int]) -> int:
        place = self.random() * (len(slices) - 1)
        low, high = slices[int(place)], slices[int(place) + 1]
        return low + int((place - int(place)) * (high - low))

    def new(self, form: str, taken: set[str]) -> str:
        """An identifier not in `taken`: in the form, ? stands for a letter and # for a hexadecimal digit."""
        signs = {"?": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "#": "0123456789ABCDEF"}
        while True:
            name = "".join(self.one(signs.get(sign, sign)) for sign in form)
            if name not in taken:
                taken.add(name)
                return name


# ---------------------------------------------------------------------------------------------------------------- songs


def make_text(draw: Draw, forms: str) -> str:
    """A form filled with two invented words and two of the list."""
    made = ["".join(draw.one(SYLLABLES.split()) for _ in range(2 + draw.below(2))).capitalize() for _ in range(2)]
    text = draw.one(forms.replace("\n", "|").split("|")).format(*made, draw.one(WORDS.split()), draw.one(WORDS.split()))
    if draw.chance(ACCENTED):
        letter = draw.one([sign for sign in text if sign in ACCENTS] or ["a"])
        text = text.replace(letter, ACCENTS[letter], 1)
    return text


def make_title(draw: Draw) -> str:
    title = make_text(draw, TITLE_FORMS)
    return draw.one([title + " ", " " + title]) if draw.chance(PADDED) else title


def make_duration(draw: Draw) -> float:
    seconds = draw.sliced((650, 2595) if draw.chance(0.004) else DURATIONS)
    return (seconds * 100_000 + draw.below(100_000)) / 100_000


def make_place(draw: Draw) -> Record:
    location, latitude, longitude = draw.one(PLACES)
    location = "" if draw.chance(NO_PLACE) else location
    known = location and not draw.chance(NO_COORDINATES)
    return {
        "artist_latitude": latitude if known else None,
        "artist_longitude": longitude if known else None,
        "artist_location": location,
    }


def describe_otherwise(draw: Draw, song: Record) -> Record:
    """The same song and artist_id under another place or name, as the catalogue has for one artist in eight."""
    if draw.chance(0.5):
        return {**song, **make_place(draw)}
    name = song["artist_name"]
    return {**song, "artist_name": make_text(draw, f"{name} feat. {{0}}|{name} & {{0}}")}


def make_songs(draw: Draw, number: int) -> list[Record]:
    """One record per song_id."""
    taken: set[str] = set()
    artists: list[Record] = []
    songs: list[Record] = []
    for place in range(number):
        if place < SAME_TITLE or draw.chance(NEW_ARTIST):
            artist = {"artist_id": draw.new("AR?????1187F######", taken), **make_place(draw)}
            artists.append({**artist, "artist_name": make_text(draw, ARTIST_FORMS)})
            artist = artists[-1]
        else:
            artist = draw.one(artists)
        song = {"num_songs": 1, **artist, "song_id": draw.new("SO?????12A########", taken)}
        song.update(title=make_title(draw), duration=make_duration(draw), year=0)
        if not draw.chance(NO_YEAR):
            song["year"] = 2010 - draw.popular(range(88))
        if draw.chance(OTHERWISE):
            song = describe_otherwise(draw, song)
        if place in (SAME_TITLE, SAME_TRIPLE) or (place > NO_TITLE and draw.chance(TWIN)):
            twin = songs[0] if place < NO_TITLE else draw.one(songs)
            own = {"song_id", "year"} if place == SAME_TRIPLE else {"song_id", "year", "duration"}
            song = {**twin, **{key: song[key] for key in own}}
        songs.append(song)
    if number > NO_TITLE:
        songs[NO_TITLE]["title"] = ""
    return songs


def repeat_song(draw: Draw, song: Record) -> Record:
    """A further file of a song: the same, an older or newer version, or with the artist described otherwise."""
    return draw.one([song, {**song, "year": 1960 + draw.below(51)}, describe_otherwise(draw, song)])


def write_songs(draw: Draw, songs: list[Record], repeated: int, bad: int, place: Path) -> None:
    """One file a song, about two dozen a folder, as in the real catalogue."""
    texts = [json.dumps(song) for song in songs]
    texts += [json.dumps(repeat_song(draw, draw.one(songs))) for _ in range(repeated)]
    texts += [damage(draw, json.dumps(draw.one(songs)), SONG_FAULTS, json.dumps) for _ in range(bad)]
    folders = 1 + len(texts) // 24
    taken: set[str] = set()
    for number, text in enumerate(texts):
        letters = "".join(chr(ord("A") + number % folders // power % 26) for power in (676, 26, 1))
        path = place.joinpath(*letters, draw.new(f"TR{letters}??128F#######", taken) + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("ascii"))


# ------------------------------------------------------------------------------------------------------ plays and users


class Play(NamedTuple):
    """A song as the log writes it: JSON fragments, and the whole seconds until the next one."""

    artist: str
    length: str
    song: str
    seconds: int


def write_log_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":")).replace("/", "\\/")


def write_log_text(text: str) -> str:
    """On its way into the log, text went through UTF-8 twice: beyond ASCII it equals its catalogue entry no more."""
    return write_log_json(text.encode().decode("latin-1").encode().decode("latin-1"))


def make_play(song: Record) -> Play:
    artist, title, duration = song["artist_name"], song["title"], song["duration"]
    return Play(write_log_text(artist), json.dumps(duration), write_log_text(title), int(duration))


def make_foreign_plays(draw: Draw, songs: list[Record]) -> list[Play]:
    """Songs outside the catalogue; every twentieth misses it by its duration alone."""
    plays = []
    names = [make_text(draw, ARTIST_FORMS) for _ in range(1000 + len(songs))]
    for place in range(3000 + 2 * len(songs)):
        twin: Record = draw.one(songs) if place % 20 == 0 else {"artist_name": draw.popular(names)}
        song = {"title": make_title(draw), **twin, "duration": make_duration(draw)}
        if draw.chance(CONTROL):
            song["title"] = song["title"].replace("'", "\x19")
        plays.append(make_play(song))
    return plays


@dataclass
class User:
    """The fragments that each line of a user has, in the order of the keys, and where the user stands."""

    names: str
    last_name: str
    location: str
    registration: str
    agent: str
    level: str = "free"
    busy_until: int = 0


def write_user(user_id: str, first: str | None, last: str | None, gender: str | None, *others: object) -> User:
    location, registration, agent = map(write_log_json, others)
    return User(
        f'"firstName":{write_log_json(first)},"gender":{write_log_json(gender)},"itemInSession":',
        f',"lastName":{write_log_json(last)},"length":',
        f'"location":{location},',
        f'"registration":{registration},"sessionId":',
        f'"userAgent":{agent},"userId":"{user_id}"}}',
    )


def make_users(draw: Draw, number: int, start: int) -> tuple[list[User], list[int]]:
    """The users, and the bounds to draw them by: the first has a tenth of the sessions, the others ever fewer."""
    users = []
    for rank, user_id in enumerate(sorted(range(2, number + 2), key=lambda _: draw.random())):
        first, last, gender = make_text(draw, "{0}"), make_text(draw, "{0}"), draw.one("FFFMM")
        registration = float((start - draw.below(14 * 24 * HOUR)) * 1000 + MILLISECOND)
        user = write_user(str(user_id), first, last, gender, draw.one(METROS), registration, draw.popular(AGENTS))
        user.level = "paid" if draw.chance(0.8 if rank <= number // 5 else 0.04) else "free"
        users.append(user)
    offset = max(4, number // 12)
    weights = [10**15 // (rank + offset) ** 2 for rank in range(1, number)]
    first_weight = 1 + int(sum(weights) * TOP_LISTENER / (1 - TOP_LISTENER))
    return users, list(accumulate([first_weight, *weights]))


# ------------------------------------------------------------------------------------------------------------- sessions

GUEST = write_user("", None, None, None, None, None, None)
NO_SONG = Play("null", "null", "null", 0)
Repertoire = tuple[list[Play], list[Play]]  # outside the catalogue, inside it


def write_page(page: str) -> tuple[str, str]:
    method = "PUT" if page in FORMS or page == "NextSong" else "GET"
    status = 307 if page in FORMS else 404 if page == "Error" else 200
    return f'"method":"{method}","page":"{page}",', f'"status":{status},"ts":'


def weigh_pages(after: dict[str, int], level: str) -> tuple[list[str], list[int]]:
    """The pages of this level, with the bounds to draw them by."""
    weights = {page: weight for page, weight in after.items() if ONLY_WHEN.get(page, level) == level}
    return list(weights), list(accumulate(weights.values()))


PAGES = {page: write_page(page) for page in (*AFTER_LOGGED_IN, *AFTER_LOGGED_OUT)}
MOVES = {
    (logged_in, level, page): weigh_pages(after, level)
    for logged_in, table in ((True, AFTER_LOGGED_IN), (False, AFTER_LOGGED_OUT))
    for page, after in table.items()
    for level in ("free", "paid")
}


def make_session(draw: Draw, user: User, session_id: int, second: int, repertoire: Repertoire) -> list[tuple[int, str]]:
    """The session as (second, line). It never stops at a form."""
    lines: list[tuple[int, str]] = []
    wanted = draw.sliced(SESSION_EVENTS)
    logged_in = not draw.chance(LOGGED_OUT_STARTS)
    page, play = "", NO_SONG
    while len(lines) < wanted or page in FORMS:
        before, page = page, draw.weighted(*MOVES[logged_in, user.level, page])
        if page in FORMS:
            second += 1 if before else 0
        elif before:
            second += play.seconds if page == before == "NextSong" else draw.sliced(PAUSES)
        play = draw.popular(repertoire[draw.chance(PLAYS_OF_CATALOGUE)]) if page == "NextSong" else NO_SONG
        who, auth = (user, "Logged In") if logged_in else (GUEST, "Logged Out")
        request, status = PAGES[page]
        line = (
            f'{{"artist":{play.artist},"auth":"{auth}",{who.names}{len(lines)}{who.last_name}{play.length},'
            f'"level":"{user.level}",{who.location}{request}{who.registration}{session_id},"song":{play.song},'
            f"{status}{second}{MILLISECOND},{who.agent}"
        )
        lines.append((second, line))
        user.level = LEVEL_AFTER.get(page, user.level)
        if page in ("Login", "Logout"):
            logged_in = page == "Login"
    user.busy_until = max(user.busy_until, second + play.seconds + 1)
    return lines


# ----------------------------------------------------------------------------------------------------------------- days


def weigh_hours(draw: Draw, start: date, days: int) -> list[int]:
    moods = [WEEKDAYS[(start + timedelta(day)).weekday()] * (70 + draw.below(61)) for day in range(days)]
    return [mood * weight for mood in moods for weight in HOURS]


def make_lines(draw: Draw, args: argparse.Namespace, songs: list[Record], number: int) -> Iterator[list[str]]:
    """Exactly `number` lines in order of time, one list an hour: memory holds that hour and the sessions under way."""
    first = (args.start - date(1970, 1, 1)).days * 24 * HOUR
    end = first + args.days * 24 * HOUR
    users, bounds = make_users(draw, args.users, first)
    repertoire = make_foreign_plays(draw, songs), [make_play(song) for song in songs if song["title"]]
    running = list(accumulate(weigh_hours(draw, args.start, args.days)))
    under_way: list[tuple[int, str]] = []
    made = session_id = opened = 0
    for opens, weight in zip(range(first, end, HOUR), running):
        noon = opens % (24 * HOUR) == 12 * HOUR  # no day stays empty, however small the lake
        while made < number * weight // running[-1] or (noon and opened == session_id and made < number):
            shares = draw.chance(SHARED_STARTS) and under_way
            begins = draw.one(under_way)[0] if shares else opens + draw.below(HOUR)
            user = draw.weighted(users, bounds)
            waits = begins < user.busy_until < min(end, begins + LONGEST_WAIT)
            session_id += 1
            session = make_session(draw, user, session_id, user.busy_until if waits else begins, repertoire)
            session = [line for line in session[: number - made] if line[0] < end]
            made += len(session)
            under_way += session
        under_way.sort(key=itemgetter(0))
        past = bisect_left(under_way, (opens + HOUR, ""))
        yield [line for _, line in under_way[:past]]
        opened = session_id if noon else opened
        del under_way[:past]


# --------------------------------------------------------------------------------------------------------------- faults


def damage(draw: Draw, line: str, faults: dict[str, list[str]], write: Callable[[object], str]) -> str:
    """The line made unusable: as a whole, or in one of the fields that `faults` names."""
    if draw.chance(0.4):
        return draw.one(LINE_FAULTS)(line, draw.random())
    record = json.loads(line)
    field = draw.one(list(faults))
    wrong = draw.one(["", "null", *faults[field]])
    if not wrong:
        del record[field]
        return write(record)
    record[field] = "<wrong>"
    return write(record).replace('"<wrong>"', wrong)


def damage_event(draw: Draw, line: str) -> str:
    return damage(draw, line, PLAY_FAULTS if '"page":"NextSong"' in line else OTHER_PAGE_FAULTS, write_log_json)


def repeat_event(draw: Draw, line: str) -> str:
    """The line once more, every third time with another value in a field that is no part of a play's identity."""
    if draw.chance(2 / 3):
        return line
    record = json.loads(line)
    changes = [{"level": "paid" if record["level"] == "free" else "free"}]
    if record["userId"]:
        changes += [{"location": draw.one(METROS)}, {"userAgent": draw.one(AGENTS)}]
    return write_log_json({**record, **draw.one(changes)})


def add_faults(draw: Draw, hours: Iterator[list[str]], number: int, bad: int, repeated: int) -> Iterator[list[str]]:
    """The `number` lines of these hours with exactly `bad` damaged and `repeated` repeated ones among them.

    Repeats stand at the end of an hour, as a shipper sends a batch again: in the first delivery's file or a later one.
    """
    shelf: list[str] = []
    seen = added_bad = added_repeated = 0
    for lines in hours:
        good = list(lines)
        seen += len(good)
        for line in good[: SHELF // 20] if repeated else ():
            shelf.append(line)
            if len(shelf) > SHELF:
                shelf[draw.below(SHELF)] = shelf.pop()
        for _ in range(bad * seen // number - added_bad):
            lines.insert(draw.below(len(lines) + 1), damage_event(draw, draw.one(good)))
            added_bad += 1
        for _ in range(repeated * seen // number - added_repeated):
            lines.append(repeat_event(draw, draw.one(shelf)))
            added_repeated += 1
        yield lines


def write_logs(hours: Iterator[list[str]], start: date, place: Path) -> None:
    """One file a UTC day with lines, and no newline at its end."""
    for number, lines in enumerate(hours):
        day = start + timedelta(number // 24)
        path = place / f"{day:%Y}" / f"{day:%m}" / f"{day:%Y-%m-%d}-events.json"
        if lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(b"\n" * (file.tell() > 0) + "\n".join(lines).encode("ascii"))


# -------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def share(text: str) -> Fraction:
    """Exact, so that the number of lines it stands for is what one works out by hand."""
    value = Fraction(text) if text.replace(".", "", 1).isdigit() else Fraction(-1)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more and below 1, not {text}")
    return value


def day(text: str) -> date:
    return datetime.strptime(text, "%Y-%m-%d").date()


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "generate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--songs", type=count, default=200, help="song files (200)")
    add("--users", type=count, default=96, help="people who may listen (96)")
    add("--events", type=count, default=2100, help="log lines in all (2100)")
    add("--start", type=day, default=date(2018, 11, 1), help="first UTC day (2018-11-01)")
    add("--days", type=count, default=30, help="days from then on (30)")
    add("--seed", type=count, default=112, help="another number, another lake (112)")
    add("--bad", type=share, default=Fraction(0), help="share of song files and log lines that are damaged (0)")
    add("--repeated", type=share, default=Fraction(0), help="share that repeats an earlier one (0)")
    add("--out", type=Path, required=True, help="folder that gets song_data/ and log_data/")
    args = parser.parse_args(argv)
    if args.bad + args.repeated >= 1:
        parser.error("--bad and --repeated must be below 1 together")
    if not date(2000, 1, 1) <= args.start <= date(2100, 1, 1) - timedelta(min(args.days, 36525)):
        parser.error("--start and --days must stay between 2000-01-01 and 2099-12-31")
    for name in ("song_data", "log_data"):
        if (args.out / name).exists():
            parser.error(f"{args.out / name} is there already: remove it or choose another --out")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = read_arguments(argv)
    bad_songs, repeated_songs = int(args.songs * args.bad), int(args.songs * args.repeated)
    bad, repeated = int(args.events * args.bad), int(args.events * args.repeated)
    good = args.events - bad - repeated
    for_songs, for_events, for_faults = (Draw(3 * args.seed + stream) for stream in range(3))
    try:
        songs = make_songs(for_songs, args.songs - bad_songs - repeated_songs)
        write_songs(for_songs, songs, repeated_songs, bad_songs, args.out / "song_data")
        hours = add_faults(for_faults, make_lines(for_events, args, songs, good), good, bad, repeated)
        write_logs(hours, args.start, args.out / "log_data")
    except OSError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
