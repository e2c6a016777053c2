"""Pieces tokenized together get the ids they get one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat import small_tokenizer

from steps.engine.data.encoding import Encoder, Row
from steps.engine.data.segments import CUT, Encoded, TokenizersSegments, merged, same_ids, take_cuts

SEGMENTS = TokenizersSegments(small_tokenizer().backend)
#: Words, blanks, control tokens and what may be torn at a cut.
WORDS = ("the", "fox", " ", "\n", "é", "🙂", "<|im_end|>", "<s>", "<|im", "_end|>", "7", "'s")
TEXTS = st.lists(st.sampled_from(WORDS)).map("".join)


@given(st.lists(st.lists(TEXTS, max_size=5), max_size=4))
@settings(max_examples=200, deadline=None)
def test_joined_pieces_are_tokenized_as_if_alone(rows):
    every = [piece for row in rows for piece in row]
    assert same_ids(SEGMENTS.encode(rows), SEGMENTS.encode_apart(every))
    backend = small_tokenizer().backend
    expected = [backend.encode(piece, add_special_tokens=False).ids for piece in every]
    ids, lengths = SEGMENTS.encode(rows)
    assert ids.tolist() == [id for part in expected for id in part]
    assert lengths.tolist() == [len(part) for part in expected]


def test_a_text_with_the_code_point_that_cuts_is_tokenized_piece_by_piece():
    rows = [["the fox", f"a{CUT}b"], [CUT, "hello"]]
    ids, lengths = SEGMENTS.encode(rows)
    assert len(lengths) == 4
    assert same_ids(Encoded(ids, lengths), SEGMENTS.encode_apart(["the fox", f"a{CUT}b", CUT, "hello"]))
    assert small_tokenizer().decode(ids.tolist()) == f"the foxa{CUT}b{CUT}hello"


def test_cuts_come_out_of_the_ids():
    found = take_cuts(np.asarray([5, 9, 9, 6, 7, 9], np.int32), 9, 3)
    assert found.ids.tolist() == [5, 6, 7]
    assert found.lengths.tolist() == [1, 0, 2]
    assert take_cuts(np.asarray([5, 9, 9], np.int32), 9, 1) is None


def test_two_encodings_are_merged_piece_by_piece():
    first = Encoded(np.asarray([1, 2, 3], np.int32), np.asarray([2, 0, 1]))
    other = Encoded(np.asarray([8, 9], np.int32), np.asarray([1, 1]))
    ids, lengths = merged(np.asarray([False, True, False, True, False]), first, other)
    assert ids.tolist() == [1, 2, 8, 9, 3]
    assert lengths.tolist() == [2, 1, 0, 1, 1]


def cut_at_every_bound(row: Row, at_spans: bool) -> list[tuple[str, bool, bool]]:
    """What `pieces` says, character by character."""
    bounds = {0, len(row.text)}.union(*row.literals, *(row.spans if at_spans else ()))
    spans = row.spans if at_spans else []
    return [
        (
            row.text[start:end],
            any(first <= start < last for first, last in spans),
            any(first <= start < last for first, last in row.literals),
        )
        for start, end in pairwise(sorted(bounds))
    ]


@pytest.mark.parametrize("at_spans", [True, False])
@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.randoms())
@settings(max_examples=200, deadline=None)
def test_pieces_are_cut_at_every_bound(at_spans, sizes, random):
    bounds = np.cumsum([0, *sizes]).tolist()
    stretches = list(pairwise(bounds))
    spans = [stretch for stretch in stretches if random.random() < 0.4]
    # A literal is shorter than the stretch it stands in: the template says something around it.
    literals = [(start, start + random.randint(1, end - start)) for start, end in stretches if random.random() < 0.3]
    row = Row("".join(chr(97 + at % 26) for at in range(bounds[-1])), spans, literals)
    assert [tuple(piece) for piece in row.pieces(at_spans=at_spans)] == cut_at_every_bound(row, at_spans)


def test_literals_stand_between_the_pieces_they_were_cut_from():
    tokenizer = small_tokenizer()
    text = "fox <s> and <|im_end|> the<|im_end|>"
    row = Row(text, [(4, 25)], [(4, 7), (12, 22)])
    plain = Row("the fox", [(0, 7)])
    (ids, trained), (others, _) = Encoder(tokenizer, "assistant").encode([row, plain])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode(ids[trained].tolist()) == text[4:25]
    assert (ids == tokenizer.eos_token_id).sum() == 1  # the last, which is no literal
    assert tokenizer.bos_token_id not in ids
    assert others.tolist() == tokenizer.encode("the fox")
