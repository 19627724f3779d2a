"""Columns of strings: equal to lists of the same strings."""

from __future__ import annotations

import numpy as np
import pytest

from data_modules.annotations.columns import Coded, CodedTuples, Strings, column_of, values_at

WORDS = ["", "red", "ä \N{SNOWMAN}", "\ud800", "red", "line\nbreak", ""]
PAIRS = [("a", "b"), ("b", "a"), ("a", "a")]
COLUMNS = [(Strings.of(WORDS), WORDS), (Coded.of(WORDS), WORDS), (CodedTuples.of(PAIRS), PAIRS)]


@pytest.mark.parametrize(("column", "values"), COLUMNS)
def test_a_column_behaves_like_a_list(column, values):
    assert len(column) == len(values)
    assert list(column) == values
    assert column == values
    assert column != values[:-1]
    assert column != [*values[:-1], "other"]
    assert [column[index] for index in range(-len(values), len(values))] == values + values
    assert column[1:3] == values[1:3]
    assert column[::-2] == values[::-2]
    assert values_at(column, np.array([2, 0])) == values_at(values, np.array([2, 0])) == [values[2], values[0]]
    with pytest.raises(IndexError):
        column[len(values)]


@pytest.mark.parametrize(("column", "values"), COLUMNS)
def test_a_column_is_restored_from_its_arrays(column, values):
    assert column_of(column.arrays()) == values


def test_a_column_longer_than_a_chunk_is_iterated_in_order():
    numbers = [str(number) for number in range(25_000)]
    assert list(Strings.of(numbers)) == numbers


def test_equal_strings_are_stored_once():
    column = Coded.of(WORDS)
    assert column.values == list(dict.fromkeys(WORDS))
    assert column.extended("end") == [*WORDS, "end"]
    assert Coded.of([]).extended("") == [""]


def test_parts_differ_where_the_columns_differ():
    columns = [Coded.of(words) for words in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", "c"])]
    assert len({tuple(column.parts()) for column in columns}) == len(columns)
