"""The rules of the tables, row by row."""

from __future__ import annotations

from conftest import Frames

import etl


def test_users_who_played_at_the_same_instant_are_both_kept(frames: Frames) -> None:
    plays = frames.plays({"user_id": 1}, {"user_id": 2})
    assert sorted(row.user_id for row in etl.build_users(plays).collect()) == [1, 2]
    assert etl.build_time(plays).count() == 1
