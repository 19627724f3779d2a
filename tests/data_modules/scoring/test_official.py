"""Scores and breakdowns against numbers that the official evaluation code computed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_modules.scoring.scores import Options, score_task
from data_modules.scoring.truths import read_truths
from vlpet_lightning.__main__ import run
from vlpet_lightning.metrics.groups import GroupScore

OFFICIAL = json.loads((Path(__file__).parents[2] / "testdata" / "scoring" / "official.json").read_text())
SHARED = Path(__file__).parents[4] / "shared"
with_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' files are not at ../shared")


def percent(groups: dict[str, GroupScore]) -> dict[str, tuple[Any, int]]:
    return {name.strip(): (pytest.approx(100 * group.score), group.questions) for name, group in groups.items()}


def test_gqa_scores_and_groups_are_those_of_the_official_code() -> None:
    case = OFFICIAL["gqa"]
    found = score_task("gqa", case["predictions"], case["questions"], Options(choices=case["choices"]))
    ours = {name: 100 * score for name, score in found.scores.items() if name != "distribution"}
    assert ours == pytest.approx(case["scores"])
    assert found.scores["distribution"] == pytest.approx(case["distribution"])
    for kind, groups in case["groups"].items():
        assert {name: tuple(values) for name, values in groups.items()} == percent(found.groups[kind])


def test_gqa_consistency_is_left_out_with_a_reason_if_entailed_questions_have_no_answer() -> None:
    case = OFFICIAL["gqa"]
    balanced = {id: question for id, question in case["questions"].items() if question["isBalanced"]}
    said = {id: case["predictions"][id] for id in balanced}
    found = score_task("gqa", said, balanced)
    assert "consistency" not in found.scores
    assert any("consistency left out" in note for note in found.notes)
    assert any("--choices" in note for note in found.notes)


def test_a_question_does_not_entail_itself() -> None:
    questions = {
        id: {"answer": "yes", "entailed": entailed, "isBalanced": id != "3"}
        for id, entailed in (("1", ["1", "3"]), ("2", ["2"]), ("3", []))
    }
    found = score_task("gqa", {"1": "yes", "2": "yes", "3": "no"}, questions)
    assert found.scores == {"accuracy": 1.0, "consistency": 0.0}


@with_shared
def test_vqa_by_type_is_that_of_the_official_code() -> None:
    cases = json.loads((SHARED / "scoring" / "vqa_cases.json").read_text())["cases"]
    kinds = ("what color", "how many", "is the")
    truths = {
        str(case["question_id"]): {
            "answers": case["answers"],
            "answer_type": case["answer_type"],
            "question_type": kinds[case["question_id"] % 3],
        }
        for case in cases
    }
    found = score_task("vqa", {str(case["question_id"]): case["prediction"] for case in cases}, truths)
    assert 100 * found.scores["accuracy"] == pytest.approx(OFFICIAL["vqa"]["overall"], abs=1e-7)
    for kind in ("answer type", "question type"):
        ours = {name: 100 * group.score for name, group in found.groups[kind].items()}
        assert ours == pytest.approx(OFFICIAL["vqa"][kind], abs=1e-7)


@with_shared
def test_nlvr2_on_the_official_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = SHARED / "nlvr2" / "dev.json"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [f"{record['identifier']},{7 * i % 10 < 6}\n" for i, record in enumerate(records)]
    (tmp_path / "said.csv.gz").write_bytes(gzip.compress("".join(lines).encode()))
    command = ["score", "--task", "nlvr2", "--annotations", str(path), "--json"]
    assert run([*command, "--predictions", str(tmp_path / "said.csv.gz")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["questions"] == 6982
    assert result["scores"] == {
        "accuracy": pytest.approx(100 * OFFICIAL["nlvr2"]["accuracy"]),
        "consistency": pytest.approx(100 * OFFICIAL["nlvr2"]["consistency"]),
    }


@with_shared
def test_how2qas_sample_submission(capsys: pytest.CaptureFixture[str]) -> None:
    value = SHARED / "value"
    files = [str(value / name) for name in ("how2qa_val_predictions.json", "how2qa_val_release.jsonl")]
    run(["score", "--task", "how2qa", "--predictions", files[0], "--annotations", files[1], "--json"])
    result = json.loads(capsys.readouterr().out)
    assert round(result["scores"]["accuracy"], 2) == 73.13
    positions = result["groups"]["position of the right answer"]
    assert sum(group["questions"] for group in positions.values()) == 3115
    assert set(positions) == {"a0", "a1", "a2", "a3"}


@with_shared
def test_yc2cs_sample_submission_has_the_published_cider(capsys: pytest.CaptureFixture[str]) -> None:
    value = SHARED / "value"
    files = [str(value / name) for name in ("yc2c_val_predictions.jsonl", "yc2c_val_release.jsonl")]
    command = ["score", "--task", "yc2c", "--predictions", files[0], "--annotations", files[1], "--metrics", "cider"]
    run([*command, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["scores"]["cider"] == pytest.approx(115.8752, abs=5e-5)
    assert result["protocol"]["caption_items"] == "clip"


def test_characters_outside_ascii_do_not_count_as_in_values_scorer() -> None:
    plain, accented = ({str(i): f"a man in {name} {i}" for i in range(2)} for name in ("caf", "caf\u00e9"))
    for said, true in ((plain, accented), (accented, plain)):
        truths = {id: {"captions": [text], "descriptions": {}} for id, text in true.items()}
        assert score_task("tvc", said, truths, Options(["rouge_l"])).scores["rouge_l"] == 1.0


def test_descriptions_of_a_clip_are_items_of_their_own_on_request(tmp_path: Path) -> None:
    path = tmp_path / "tvc_val_release.jsonl"
    clips = {1: ["a man walks in", "he sits down"], 2: ["she opens the red door", "a door opens"]}
    entries = [
        {"clip_id": clip, "descs": [{"desc": text, "desc_id": 10 * clip + i} for i, text in enumerate(texts)]}
        for clip, texts in clips.items()
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    truths = read_truths("tvc", [path]).references
    said = {"1": "a man walks in", "2": "a door opens"}
    by_clip = score_task("tvc", said, truths, Options(["rouge_l"])).scores["rouge_l"]
    each = score_task("tvc", said, truths, Options(["rouge_l"], "description")).scores["rouge_l"]
    assert by_clip == 1.0
    assert 0.5 < each < 0.9  # two of four items match exactly
