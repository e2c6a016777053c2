"""A log is divided into what people see and what the job tells us, however its bytes are cut."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from steps.dispatch.executors.lepton.trailer import Splitter, Trailer, mark

ID = "20260102-030405-a-b-0a1b2c"
MARK = mark(ID)
TOLD = (
    f'{MARK} summary {{"rows": 3}}\n{MARK} metrics {{"loss": 1}}\n{MARK} metrics {{"loss": 0}}\n{MARK} exit 3 1 b e\n'
)


def split(data: bytes, cuts: list[int]) -> tuple[bytes, Trailer]:
    splitter, places = Splitter(ID), sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    shown = b"".join(splitter.feed(data[a:b]) for a, b in itertools.pairwise(places))
    return shown + splitter.rest(), splitter.trailer


@given(log=st.binary(max_size=80), cuts=st.lists(st.integers(0, 400), max_size=20))
@example(log=b"[steps [steps 2026" + MARK[:-1].encode(), cuts=[9, 20, 21])
@example(log=b"no end of line", cuts=list(range(400)))
def test_every_cut_gives_the_same(log, cuts):
    shown, trailer = split(log + TOLD.encode(), cuts)
    assert shown == log
    assert trailer == Trailer(3, 1, "b", "e", '{"rows": 3}\n', '{"loss": 1}\n{"loss": 0}\n')


@given(log=st.binary(max_size=80), cuts=st.lists(st.integers(0, 80), max_size=20))
@example(log=b"text" + MARK[:-1].encode(), cuts=[])
def test_a_log_without_a_word_to_us_is_shown_whole(log, cuts):
    assert split(log, cuts) == (log, Trailer())


def test_nothing_is_held_back_that_cannot_be_the_mark():
    splitter = Splitter(ID)
    assert splitter.feed(b"a line\n") == b"a line\n"
    assert splitter.feed(b"[st") == b""
    assert splitter.feed(b"eam]") == b"[steam]"


def test_a_worker_that_was_stopped_has_no_exit_code_of_its_own():
    _, trailer = split(f"{MARK} stopped 143 1 b e\n".encode(), [])
    assert trailer == Trailer(None, 1, "b", "e")


def test_what_makes_no_sense_is_left_out():
    _, trailer = split(f"{MARK} exit three 0 b e\n{MARK} exit 3\n{MARK} news x\n{MARK}\n".encode(), [])
    assert trailer == Trailer()
