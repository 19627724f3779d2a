"""Records decoded one at a time: the same as ``json.loads`` gives, however the file is divided into reads."""

from __future__ import annotations

import codecs
import json

import pytest

from data_modules.annotations import json_records
from data_modules.annotations.json_records import read_records
from data_modules.annotations.records import AnnotationError

RECORDS = [
    {"text": 'quotes " and \\ and \u2028 and ä', "numbers": [12, -3.5e10, float("inf")]},
    {},
    {"nested": {"images": [1, {"a": None}], "b": [True, False]}, "lone": "\ud83d"},
]


@pytest.fixture(params=[1, 2, 7, 1 << 20])
def chunk(request, monkeypatch):
    """Number of bytes per read."""
    monkeypatch.setattr(json_records, "CHUNK", request.param)


@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_records_are_those_of_json(chunk, tmp_path, indent, ascii_only, encoding):
    path = tmp_path / "file.json"
    documents = {
        None: RECORDS,
        "images": {"info": {"images": [3]}, "n": 12, "images": RECORDS, "after": [[]], "s": ""},
    }
    for key, content in documents.items():
        text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
        path.write_bytes(text.encode(encoding, "surrogatepass"))
        assert list(read_records(path, key)) == RECORDS


@pytest.mark.parametrize(("content", "key"), [("[]", None), ('{"images": []}', "images"), (" [ ] \n", None)])
def test_an_empty_list_has_no_records(chunk, tmp_path, content, key):
    (tmp_path / "file.json").write_text(content)
    assert list(read_records(tmp_path / "file.json", key)) == []


@pytest.mark.parametrize(
    "content",
    ["", "[", "[{}", "[{},]", "[{} {}]", '[{"a": 1}', '[{"a": tru}]', "[{}] 1", "[{}]]", '{"images": [{}]', "{1: 2}"],
)
@pytest.mark.parametrize("key", [None, "images"])
def test_invalid_json_is_refused(chunk, tmp_path, content, key):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(AnnotationError, match=r"file\.json is not valid JSON \(.*: character \d+\): it may be cut"):
        list(read_records(tmp_path / "file.json", key))


def test_the_place_of_an_error_is_that_in_the_file(chunk, tmp_path):
    content = '[{"a": 1}, {"b": 2}, {"c": x}]'
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(AnnotationError, match=f"Expecting value: character {content.index('x')}"):
        list(read_records(tmp_path / "file.json"))


@pytest.mark.parametrize("content", [b'[{"a": "\xff"}]', b'[{"a": "\xc3'])
def test_bytes_that_are_no_text_are_refused(chunk, tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(AnnotationError, match="is not valid JSON"):
        list(read_records(tmp_path / "file.json"))


@pytest.mark.parametrize(
    ("content", "key"), [("{}", None), ("3", None), ('{"images": 3}', "images"), ("[{}]", "images")]
)
def test_a_file_without_a_list_is_refused(chunk, tmp_path, content, key):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(AnnotationError, match="has no list of records"):
        list(read_records(tmp_path / "file.json", key))


def test_a_file_is_not_read_beyond_the_records_that_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "CHUNK", 64)
    (tmp_path / "file.json").write_text(json.dumps([{"number": number} for number in range(1000)])[:-1])
    records = read_records(tmp_path / "file.json")
    assert [next(records)["number"] for _ in range(3)] == [0, 1, 2]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "file.json").write_bytes(codecs.BOM_UTF8 + b'[{"a": 1}]')
    assert list(read_records(tmp_path / "file.json")) == [{"a": 1}]
