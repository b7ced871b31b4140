"""dl.cfg in every form that its users have, what beats what, and that no secret in it is ever told."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import etl

KEY = "XKIDQ3EGZYVN5TKWM2XH"
SECRET = "qVxKdTfzLmRbWcHs/JgNpYtQu3+Zo8EvXaBiDeFkwO"
TOKEN = "FwoGZXIvYXdzEJrLkPmQsTuVwXyZaBcDeFgH=="
TRIO = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "eu-north-1"}

Read = Callable[[str], dict[str, str]]
Tell = Callable[[str], str]


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    return tmp_path / "dl.cfg"


@pytest.fixture
def read(cfg: Path) -> Read:
    """The settings that a dl.cfg of this text gives."""

    def read_text(text: str) -> dict[str, str]:
        cfg.write_bytes(text.encode())
        return etl.read_config(cfg)

    return read_text


@pytest.fixture
def refusal(read: Read) -> Tell:
    """The one line with which a dl.cfg of this text is refused."""

    def refuse(text: str) -> str:
        with pytest.raises(etl.Stop) as stop:
            read(text)
        assert stop.value.code == 2
        assert "\n" not in str(stop.value)
        return str(stop.value)

    return refuse


# ---------------------------------------------------------------------------------------------------------------------
# Forms
# ---------------------------------------------------------------------------------------------------------------------

PLAIN = "\n".join(f"{key}={value}" for key, value in TRIO.items())
SINGLE = "\n".join(f"{key}='{value}'" for key, value in TRIO.items())
DOUBLE = "\n".join(f'{key}="{value}"' for key, value in TRIO.items())
FIRST, *REST = SINGLE.splitlines(keepends=True)
FORMS = {
    "single quotes, no header": SINGLE,
    "double quotes": DOUBLE,
    "no quotes": PLAIN,
    "a header": "[AWS]\n" + SINGLE,
    "a header that configparser knows": "[DEFAULT]\n" + SINGLE,
    "a header that etl.py uses": "[dl]\n" + SINGLE,
    "a header of blanks and signs": "[ my keys: a=b ]\n" + SINGLE,
    "an empty header": "[]\n" + SINGLE,
    "a header with a comment": "[AWS] ; mine\n" + SINGLE,
    "a header with a comment of the other kind": "[dl]\t# mine\n" + SINGLE,
    "a header with a comment that ends like one": "[AWS] # [mine]\n" + SINGLE,
    "several headers": "[A]\n" + FIRST + "[B]\n" + REST[0] + "[A]\n" + REST[1],
    "several headers with comments": "[A] # 1\n" + FIRST + "[B] # 2\n" + REST[0] + "[A] # 3\n" + REST[1],
    "an indented header": "  [AWS]  \n" + SINGLE,
    "blanks around =": SINGLE.replace("=", "  =\t"),
    "blanks at the ends": SINGLE.replace("\n", "  \t\n") + "  ",
    "indented": "    " + SINGLE.replace("\n", "\n    "),
    "indented more and more": FIRST + " " + REST[0] + "    " + REST[1],
    "unquoted and indented": "\t" + PLAIN.replace("\n", "\n\t"),
    "blank lines": "\n\n \t\n" + SINGLE.replace("\n", "\n\n") + "\n\n",
    "comment lines": "# AWS_REGION='us'\n; AWS_REGION='us'\n   # x\n" + SINGLE.replace("\n", "\n\t; AWS_REGION=us\n"),
    "comments after quotes": SINGLE.replace("\n", " # it's mine\n") + ' ; it\'s "mine"',
    "comments right after quotes": SINGLE.replace("\n", "#mine\n") + ";mine",
    "comments after plain values": PLAIN.replace("\n", " # mine = yours\n") + "\t; mine",
    "CRLF": SINGLE.replace("\n", "\r\n") + "\r\n",
    "CRLF and a header": "[AWS]\r\n" + PLAIN.replace("\n", "\r\n"),
    "a BOM": "\ufeff" + SINGLE,
    "a BOM and a header": "\ufeff[AWS]\n" + SINGLE,
    "a BOM, a comment and CRLF": "\ufeff# mine\r\n" + DOUBLE.replace("\n", "\r\n"),
    "lower case": "\n".join(f"{key.lower()}='{value}'" for key, value in TRIO.items()),
    "colons": "\n".join(f"{key}: '{value}'" for key, value in TRIO.items()),
    "colons, no quotes": "\n".join(f"{key} : {value}" for key, value in TRIO.items()),
    "a last line end": SINGLE + "\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_file_reads_alike(read: Read, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(FORMS[form]) == TRIO
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        # Inside quotes every sign is itself.
        ("'a#b ;c % d=e:f'", "a#b ;c % d=e:f"),
        ('"# ; % ="', "# ; % ="),
        ("'it\"s'", 'it"s'),
        ('"it\'s"', "it's"),
        ("'[x]'", "[x]"),
        # No interpolation.
        ("'%(AWS_REGION)s %% %x'", "%(AWS_REGION)s %% %x"),
        ("%(home)s", "%(home)s"),
        ("'${HOME} $HOME'", "${HOME} $HOME"),
        # Without quotes a comment needs a blank before it.
        ("a#b;c", "a#b;c"),
        ("a#b ;c", "a#b"),
        ("a=b:c == d", "a=b:c == d"),
        ("https://host:9000/x?y=z", "https://host:9000/x?y=z"),
    ],
)
def test_a_value_is_what_stands_there(read: Read, line: str, value: str) -> None:
    assert read(f"AWS_ENDPOINT_URL={line}") == {"AWS_ENDPOINT_URL": value}
    assert read(f"aws_endpoint_url : {line} # comment") == {"AWS_ENDPOINT_URL": value}


@pytest.mark.parametrize("value", ["", "''", '""', "' '", "  # x", "'<>'", "<key>", "'s3a://<>/'", "s3a://<bucket>/x"])
def test_what_is_blank_or_a_placeholder_is_not_set(read: Read, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert read("\n".join(f"{key}={value}" for key in etl.CONFIG_KEYS)) == {}
    assert capsys.readouterr() == ("", "")


def test_the_file_of_the_repository_sets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert etl.read_config(Path(etl.__file__).parent / "dl.cfg") == {}
    assert capsys.readouterr() == ("", "")


def test_every_documented_key_is_known(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL"]
    values = {**dict.fromkeys(keys, "x"), "INPUT_DATA_S3": "s3a://in/", "OUTPUT_DATA_S3": "s3://out/lake"}
    assert read("\n".join(f"{key}='{value}'" for key, value in values.items())) == values
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("AWS_REGON='eu'", "AWS_REGION"),
        ("OUTPUT_DATA='s3a://b/'", "OUTPUT_DATA_S3"),
        ("aws_secret_key=x", "AWS_SECRET_ACCESS_KEY"),
        ("AWS_ENDPOINT_URL_S3=x", "AWS_ENDPOINT_URL"),
        ("REGION=''", "AWS_REGION"),  # even where it sets nothing
    ],
)
def test_an_unknown_key_is_a_warning_that_names_it_and_the_nearest(
    read: Read, cfg: Path, capsys: pytest.CaptureFixture[str], line: str, nearest: str
) -> None:
    assert read(f"{line}\n{PLAIN}").items() >= TRIO.items()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"etl.py: warning: {cfg}: unknown key")
    assert re.search(rf"\b{line.partition('=')[0]}\b.*\b{nearest}$", err, re.IGNORECASE)


@pytest.mark.parametrize(
    "text",
    [
        "AWS_REGION='a'\n\nAWS_REGION='b'",
        "AWS_REGION=a\n\naws_region=a",
        "[A]\nAWS_REGION=a\nAWS_REGION:b",
        "AWS_REGION=''\n# unset, and set\nAWS_REGION=a",
        "AWS_REGION=a\n[B]\nAWS_REGION=b",
    ],
)
def test_a_key_given_twice_is_an_error_that_names_the_line(refusal: Tell, cfg: Path, text: str) -> None:
    assert refusal(text) == f"{cfg}: line 3 gives a key for the second time"


@pytest.mark.parametrize(
    ("text", "given", "lacking"),
    [
        (f"AWS_ACCESS_KEY_ID='{KEY}'", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        (f"AWS_SECRET_ACCESS_KEY='{SECRET}'", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
        (f"AWS_ACCESS_KEY_ID='{KEY}'\nAWS_SECRET_ACCESS_KEY='<>'", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        (f"AWS_ACCESS_KEY_ID=\nAWS_SECRET_ACCESS_KEY='{SECRET}'", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
        (f"AWS_SESSION_TOKEN='{TOKEN}'", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_one_of_a_pair_without_the_other_is_an_error(refusal: Tell, text: str, given: str, lacking: str) -> None:
    told = refusal(text)
    assert f"{given} is set and {lacking} is not" in told


@pytest.mark.parametrize(
    "line",
    [
        "AWS_REGION",
        f"AWS_SECRET_ACCESS_KEY {SECRET.replace('=', '')}",
        "='x'",
        ": x",
        "[AWS",
        "AWS]",
        "'AWS_REGION'",
        "rem a remark",
        "\0\0",
    ],
)
def test_a_line_that_cannot_be_parsed_is_named_by_its_number(refusal: Tell, cfg: Path, line: str) -> None:
    assert refusal(f"# first\nAWS_REGION='eu'\n\n{line}\n") == f"{cfg}: line 4 is not of the form KEY='value'"
    assert refusal(f"\ufeff[x]\r\n{line}\r\nMAX_SHRINK=1") == f"{cfg}: line 2 is not of the form KEY='value'"


@pytest.mark.parametrize("value", ["'a", '"a', "'a\"", "'a'b'", "'a' b", '"a""', "'", "'a # b", "'a''b'"])
def test_quotes_that_do_not_match_are_an_error_that_names_the_line(refusal: Tell, cfg: Path, value: str) -> None:
    assert refusal(f"# it's\nAWS_REGION={value}") == f"{cfg}: the quotes on line 2 do not match"


@pytest.mark.parametrize("name", ["missing.cfg", "folder", "binary", "packed.gz", "missing/dl.cfg"])
def test_a_config_that_is_no_text_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "packed.gz").write_bytes(b"\x1f\x8b\x08\x08\x9e\xff\xfe\x00")
    with pytest.raises(etl.Stop, match="cannot be read") as stop:
        etl.read_settings(["--config", str(tmp_path / name)])
    assert str(stop.value).startswith(f"{tmp_path / name}: ")
    assert stop.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# What beats what
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of etl.py, as it sees it; the tests stand in another one."""
    monkeypatch.setattr(etl, "__file__", str(tmp_path / "etl.py"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_without_flags_and_file_the_defaults_stand_beside_the_script(home: Path) -> None:
    settings = etl.read_settings([])
    assert settings == etl.Settings(str(home / "data"), str(home / "output"), "auto", 0.01, None)


def test_the_file_beside_the_script_beats_the_defaults(home: Path) -> None:
    text = "INPUT_DATA_S3='s3://in/a'\nOUTPUT_DATA_S3='s3a://out/'\nMAX_REJECTS='0.2'\nMAX_SHRINK=0.5\n"
    (home / "dl.cfg").write_text(text)
    assert etl.read_settings([]) == etl.Settings("s3://in/a", "s3a://out/", "auto", 0.2, 0.5)


def test_placeholders_in_the_file_leave_the_defaults(home: Path) -> None:
    (home / "dl.cfg").write_text("INPUT_DATA_S3=''\nOUTPUT_DATA_S3='s3a://<>/'\nMAX_REJECTS=''\nMAX_SHRINK='<off>'\n")
    assert etl.read_settings([]) == etl.Settings(str(home / "data"), str(home / "output"), "auto", 0.01, None)


def test_flags_beat_the_file(home: Path) -> None:
    text = "INPUT_DATA_S3='s3://in/a'\nOUTPUT_DATA_S3='s3a://out/'\nMAX_REJECTS='0.2'\nMAX_SHRINK=0.5\n"
    (home / "dl.cfg").write_text(text)
    flags = ["--input", "here", "--output=there", "--engine", "spark", "--max-rejects", "0", "--max-shrink=0"]
    assert etl.read_settings(flags) == etl.Settings("here", "there", "spark", 0.0, 0.0)


def test_a_file_that_config_names_takes_the_place_of_the_one_beside_the_script(home: Path) -> None:
    (home / "dl.cfg").write_text("INPUT_DATA_S3=s3://in/\nMAX_SHRINK=0.5\n")
    (home / "elsewhere" / "mine.cfg").write_text("OUTPUT_DATA_S3=s3://out/\n")
    settings = etl.read_settings(["--config", "mine.cfg"])
    assert settings == etl.Settings(str(home / "data"), "s3://out/", "auto", 0.01, None)


def test_a_relative_folder_in_the_file_is_meant_from_the_file(home: Path) -> None:
    (home / "deep").mkdir()
    (home / "deep" / "dl.cfg").write_text("INPUT_DATA_S3='in'\nOUTPUT_DATA_S3='../lake of mine'\n")
    settings = etl.read_settings(["--config", "../deep/dl.cfg"])
    places = [str(etl.open_place(place)) for place in settings[:2]]
    assert places == [str(home / "deep" / "in"), str(home / "lake of mine")]


def test_an_absolute_folder_in_the_file_is_itself(home: Path) -> None:
    (home / "dl.cfg").write_text("INPUT_DATA_S3=/in\nOUTPUT_DATA_S3='/a b/out'\n")
    assert etl.read_settings([])[:2] == ("/in", "/a b/out")


@pytest.mark.parametrize(("text", "number"), [("0", 0.0), ("1", 1.0), ("0.25", 0.25), ("1e-3", 0.001), (" .5 ", 0.5)])
def test_a_share_is_a_number_from_0_to_1(home: Path, text: str, number: float) -> None:
    (home / "dl.cfg").write_text(f"MAX_REJECTS='{text}'\nMAX_SHRINK='{text}'")
    assert etl.read_settings([])[3:] == (number, number)
    assert etl.read_settings(["--max-rejects", text, "--max-shrink", text])[3:] == (number, number)


@pytest.mark.parametrize("text", ["-0.01", "1.01", "nan", "inf", "-inf", "1%", "5", "a lot", "0,1", "0x1"])
@pytest.mark.parametrize("name", ["max-rejects", "max-shrink"])
def test_what_is_no_share_is_refused_by_name(home: Path, name: str, text: str) -> None:
    key = name.upper().replace("-", "_")
    (home / "dl.cfg").write_text(f"{key}='{text}'")
    for argv in ([], [f"--{name}={text}", "--config", "/dev/null"]):
        with pytest.raises(etl.Stop, match="not a share from 0 to 1") as stop:
            etl.read_settings(argv)
        assert name in str(stop.value).lower().replace("_", "-")
        assert stop.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------------------------------

PAIR = f"AWS_ACCESS_KEY_ID='{KEY}'\nAWS_SECRET_ACCESS_KEY='{SECRET}'\n"
HALF, OTHER_HALF = SECRET[:17], SECRET[17:]  # cut after the slash
LETTERS = SECRET[:16]  # nothing but letters: might pass for a word
URLS = [
    f"https://{KEY}:{SECRET}@host/x",
    f"s3a://{KEY}:{SECRET.replace('/', '%2F')}@bucket/x",
    f"S3://{SECRET}@bucket",
    f"x://{OTHER_HALF}/{HALF}@bucket",
]
ODD_POSITIONS = {
    "in their places": PAIR,
    "with a token": PAIR + f"AWS_SESSION_TOKEN={TOKEN}",
    "a token alone": f"AWS_SESSION_TOKEN='{TOKEN}'",
    "the id alone": f"AWS_ACCESS_KEY_ID='{KEY}'",
    "the secret alone": f"AWS_SECRET_ACCESS_KEY={SECRET}",
    "the line": SECRET,
    "the line, quoted": f"'{SECRET}'",
    "the line, a token": TOKEN,
    "the line, letters": LETTERS,
    "no =": f"AWS_SECRET_ACCESS_KEY {SECRET}",
    "no =, quoted": f"AWS_SECRET_ACCESS_KEY '{SECRET}'",
    "no = but in the secret": f"AWS_SESSION_TOKEN {TOKEN}",
    "no key": f"={SECRET}",
    "no key, colon": f": '{SECRET}'",
    "as a key": f"{SECRET}=AWS_SECRET_ACCESS_KEY",
    "as a key of letters": f"{LETTERS}=x",
    "as a quoted key": f"'{SECRET}'='x'",
    "as a key, an id": f"{KEY}:{SECRET}",
    "as a key, with underscores": f"AWS_{LETTERS}_{KEY}=x",
    "as a key of two words": f"AWS_SECRET_ACCESS_KEY {LETTERS} = x",
    "over two lines": f"AWS_SECRET_ACCESS_KEY={HALF}\n{OTHER_HALF}",
    "over two lines, indented": f"AWS_SECRET_ACCESS_KEY={HALF}\n    {OTHER_HALF}",
    "over two lines, in quotes": f"AWS_SECRET_ACCESS_KEY='{HALF}\n{OTHER_HALF}'",
    "over two lines, with a backslash": f"AWS_SECRET_ACCESS_KEY={HALF}\\\n  {OTHER_HALF}",
    "a padded token over two lines": f"AWS_SESSION_TOKEN={TOKEN[:20]}\n  {TOKEN[20:]}",
    "a padded token of letters over two lines": f"AWS_SESSION_TOKEN={TOKEN[:30]}\n  {TOKEN[20:]}",
    "no closing quote": f"AWS_SECRET_ACCESS_KEY='{SECRET}",
    "no opening quote": f"AWS_SECRET_ACCESS_KEY={SECRET}'",
    "one quote of each kind": f"AWS_SECRET_ACCESS_KEY='{SECRET}\"",
    "text after the quotes": f"AWS_SECRET_ACCESS_KEY='{HALF}' {OTHER_HALF}",
    "blanks": f"AWS_SECRET_ACCESS_KEY={HALF} {OTHER_HALF}",
    "a comment": f"AWS_REGION=eu # {SECRET}\n# {SECRET}\n",
    "a header": f"[{SECRET}]\nAWS_REGION=eu\n",
    "a header, open": f"[{SECRET}\n",
    "a header, with text": f"[{SECRET}] x\n",
    "a header, twice": f"[{SECRET}]\n[{SECRET}]\n",
    "a header, twice, with text": f"[{SECRET}] x\n[{SECRET}] x\n",
    "a header, twice, with a comment": f"[{SECRET}] # x\n[{SECRET}] # x\n",
    "a header before =": f"[{SECRET}]={SECRET}\n[{SECRET}]={SECRET}\n",
    "a key twice": PAIR + f"AWS_SECRET_ACCESS_KEY='{SECRET}'",
    "an unknown key twice": f"{LETTERS}=1\n{LETTERS}=2",
    "an unknown key": f"AWS_SECRET='{SECRET}'",
    "export": f"export AWS_SECRET_ACCESS_KEY='{SECRET}'",
    "JSON": f'{{"AWS_SECRET_ACCESS_KEY": "{SECRET}"}}',
    "YAML": f"- aws_secret_access_key: {SECRET}\n  - {SECRET}",
    "CSV": f"Access key ID,Secret access key\n{KEY},{SECRET}",
    "a share": f"MAX_REJECTS='{SECRET}'",
    "another share": f"MAX_SHRINK={SECRET}",
    "a line end of old": f"AWS_REGION=eu\r{SECRET}",
    "NUL": f"AWS_SECRET_ACCESS_KEY\0={SECRET}",
    **{f"an input {i}": f"INPUT_DATA_S3='{url}'" for i, url in enumerate(URLS)},
    **{f"an output {i}": f"OUTPUT_DATA_S3='{url}'" for i, url in enumerate(URLS)},
    "an endpoint": f"AWS_ENDPOINT_URL='{URLS[0]}'",
}


@pytest.fixture
def handlers() -> Iterator[None]:
    """etl.main takes the signals of its process; here it gives them back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def pieces(*values: str) -> set[str]:
    """Every seven characters in a row, as they are and as a key is told."""
    return {part for value in values for text in (value, value.upper(), value.lower()) for part in sevens(text)}


def sevens(text: str) -> set[str]:
    return {text[i : i + 7] for i in range(len(text) - 6)}


def test_the_search_for_secrets_finds_them() -> None:
    assert pieces(SECRET) & sevens(f"unknown key {OTHER_HALF.upper()}")
    assert pieces(TOKEN) & sevens(f"no such place: https://{TOKEN[5:15]}@host")
    assert not pieces(SECRET, KEY, TOKEN) & sevens("".join(etl.CONFIG_KEYS))


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("position", ODD_POSITIONS)
def test_a_secret_in_an_odd_place_is_not_told(
    home: Path, position: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_further(*_: object) -> None:
        raise etl.Stop("far enough")

    monkeypatch.setattr(etl, "list_sources", not_further)
    config = home / "elsewhere" / "mine.cfg"
    config.write_bytes(ODD_POSITIONS[position].encode())
    code = etl.main(["--config", "mine.cfg"])
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err, err
    assert code == 2
    assert err.splitlines()[-1].startswith("etl.py: ")
    assert not pieces(SECRET, KEY, TOKEN) & sevens(out + err), out + err
    assert [path for path in home.rglob("*") if path.is_file()] == [config]


@pytest.mark.parametrize("position", ODD_POSITIONS)
def test_an_exception_holds_no_secret(home: Path, position: str) -> None:
    (home / "dl.cfg").write_bytes(ODD_POSITIONS[position].encode())
    told = ""
    try:
        settings = etl.read_settings([])
        etl.open_place(settings.input)
        etl.open_place(settings.output)
    except Exception as error:
        told = repr(error) + "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert not pieces(SECRET, KEY, TOKEN) & sevens(told), told


def test_settings_hold_no_secret(home: Path) -> None:
    (home / "dl.cfg").write_text(PAIR + f"AWS_SESSION_TOKEN={TOKEN}\nAWS_ENDPOINT_URL='https://{KEY}:{SECRET}@host'\n")
    assert not pieces(SECRET, KEY, TOKEN) & sevens(repr(etl.read_settings([])))
