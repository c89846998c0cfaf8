"""Rows that step together, and the columns that count for them, against plain lists."""

import numpy as np
import pytest

from apex_jax.decode_rows import DecodeRows, RowSet
from apex_jax.flight import Flight
from apex_jax.modifiers import Modifiers
from apex_jax.request import FinishReason, Request, SamplingParams
from apex_jax.sequence import Sequence
from apex_jax.slot_table import MAX_STOPS, SlotTable

PROMPT = (7, 8, 9)


@pytest.fixture
def table():
    return SlotTable(num_slots=6, max_model_len=32)


def make(table, slot, index=0, stops=(), max_tokens=4, **sampling):
    """Return a sequence that decodes in a slot, its prompt computed."""
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    sequence = Sequence(
        index=index,
        request=Request(str(index), PROMPT, params),
        stop_token_ids=frozenset(stops),
        arrival_sec=0.0,
        modifiers=Modifiers.of(params, PROMPT, frozenset(stops)),
    )
    sequence.enter_slot(table, slot)
    sequence.num_computed, sequence.is_decoding = len(PROMPT), True
    return sequence


def sample(table, sequences):
    """Return the rows of a head that samples them all."""
    flight = Flight(table)
    rows = RowSet.of(table, sequences)
    flight.add_head(np.arange(len(rows), dtype=np.int32), rows)
    [sampled] = flight.sampled
    return sampled


def read(table, sampled, tokens, now_sec=1.0):
    return sampled.read(table, np.array(tokens, np.int32), (), now_sec)


def test_tokens_are_unread_until_they_are_read(table):
    sequence = make(table, 3)
    first, second = sample(table, [sequence]), sample(table, [sequence])
    assert (sequence.num_tokens, sequence.num_unread, sequence.token_ids) == (5, 2, [*PROMPT])
    assert read(table, first, [20]) == (1, [])
    assert (sequence.num_unread, sequence.token_ids) == (1, [*PROMPT, 20])
    read(table, second, [21])
    assert (sequence.num_unread, sequence.token_ids) == (0, [*PROMPT, 20, 21])
    assert sequence.first_token_sec == 1.0


@pytest.mark.parametrize("num_stops", [1, MAX_STOPS, MAX_STOPS + 1])
def test_any_number_of_stop_tokens_ends_an_output(table, num_stops):
    stops = range(40, 40 + num_stops)
    sequences = [make(table, slot, slot, stops) for slot in (0, 1)]
    read(table, sample(table, sequences), [10, 10])
    num_read, ended = read(table, sample(table, sequences), [11, stops[-1]], now_sec=2.0)
    assert (num_read, ended) == (2, sequences[1:])
    assert ended[0].output().token_ids == (10, stops[-1])
    assert (ended[0].finish_reason, ended[0].finish_sec) == (FinishReason.STOP, 2.0)


def test_the_last_token_by_length_ends_an_output(table):
    sequence = make(table, 0, max_tokens=2)
    first, last = sample(table, [sequence]), sample(table, [sequence])
    assert sequence.is_fully_planned
    assert read(table, first, [1]) == (1, [])
    assert read(table, last, [2]) == (1, [sequence])
    assert sequence.finish_reason is FinishReason.LENGTH


def test_a_surplus_token_is_nobodys_though_its_slot_is_anothers(table):
    ended = make(table, 2, 0)
    surplus = sample(table, [ended])
    ended.finish(FinishReason.CANCELLED)
    ended.leave_slot()
    heir = make(table, 2, 1)
    heirs = sample(table, [heir])
    assert read(table, surplus, [30]) == (0, [])
    read(table, heirs, [31])
    assert (ended.token_ids, heir.token_ids) == ([*PROMPT], [*PROMPT, 31])


def test_who_gave_the_slot_back_still_gets_the_token(table):
    preempted, stays = make(table, 2, 0), make(table, 0, 1)
    sampled = sample(table, [preempted, stays])
    preempted.leave_slot()
    heir = make(table, 2, 2)
    assert (preempted.num_tokens, preempted.num_unread) == (4, 1)
    assert read(table, sampled, [30, 31]) == (2, [])
    assert (preempted.token_ids, preempted.num_unread) == ([*PROMPT, 30], 0)
    assert (stays.token_ids, heir.token_ids) == ([*PROMPT, 31], [*PROMPT])
    preempted.enter_slot(table, 5)
    assert (preempted.num_tokens, preempted.num_computed) == (4, 0)
    read(table, sample(table, [preempted]), [32])
    assert preempted.token_ids == [*PROMPT, 30, 32]


def test_rows_are_those_between_two_tokens_and_the_oldest_comes_first(table):
    decoding = DecodeRows(table)
    by_index = {index: make(table, slot, index) for slot, index in ((0, 9), (4, 2), (5, 4))}
    for sequence in by_index.values():
        decoding.update(sequence)
    assert decoding.rows.sequences == [by_index[2], by_index[4], by_index[9]]
    assert decoding.rows is decoding.rows, "gathered once"
    by_index[4].is_moving = True
    decoding.update(by_index[4])
    assert decoding.rows.sequences == [by_index[2], by_index[9]]
    decoding.discard(np.array([0, 5], np.int32))
    assert decoding.rows.slots_b.tolist() == [4]


def test_a_head_is_the_one_that_its_parameters_make(table):
    fields = [
        {"temperature": 0.5, "top_k": 3, "seed": 2**40 + 5},
        {"top_p": 0.5, "min_p": 0.1, "logit_bias": {5: -2.0}},
        {"temperature": 0.0, "logprobs": 2},
    ]
    sequences = [make(table, slot, slot, **one) for slot, one in enumerate(fields)]
    rows_b = np.array([2, 0, 1], np.int32)
    head = RowSet.of(table, sequences).head(table, rows_b)
    sampling = [one.request.sampling for one in sequences]
    changes = [one.modifiers and one.modifiers.changes(0) for one in sequences]
    expected = type(head).of([2, 0, 1], [0, 1, 2], [3] * 3, sampling, changes)
    np.testing.assert_equal(vars(head) | {"modifiers": None}, vars(expected) | {"modifiers": None})
    np.testing.assert_equal(vars(head.modifiers), vars(expected.modifiers))
