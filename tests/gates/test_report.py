"""Figures and page show the numbers that were collected, and nothing from the data can run in the page."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from tests.gates.models import batch_of, with_gate
from tests.gates.test_statistics import Words
from vlpet_lightning.gates import figures
from vlpet_lightning.gates.collecting import ALL, Collector
from vlpet_lightning.gates.report import Writer
from vlpet_lightning.gates.results import Result, differences
from vlpet_lightning.pages import Picture, Section, Table, Text, page

HOSTILE = """</script><script>alert("1")</script><img src=x onerror='alert(2)'> $x^$ & "quoted" """


def result_of(models: Any, gate: str, kind: str = "bart", name: str = "run") -> Result:
    collector = Collector(with_gate(models, kind, gate), Words(), examples=2)
    for task in ("vqa", "nlvr2"):
        batch = batch_of(kind, task)
        images = 2 if task == "nlvr2" else 1
        batch.images = [tuple(f"{row}-{image}" for image in range(images)) for row in range(3)]
        batch.texts = [HOSTILE] * 3
        collector.add(batch)
    return Result.of(collector, name, {"checkpoint": f"{name}.ckpt"})


def drawn(folder: Path, result: Result) -> dict[str, dict[str, list[Path]]]:
    """Draw images of the examples, a different grey for each."""
    found: dict[str, dict[str, list[Path]]] = {}
    for task, examples in result.examples.items():
        for example in examples:
            paths = [folder / f"{name}.png" for name in example.images]
            for shade, path in enumerate(paths):
                Image.new("RGB", (30, 20), (100 + 50 * shade, 0, 0)).save(path)
            found.setdefault(task, {})[example.id] = paths
    return found


class Reader(HTMLParser):
    """Collects the elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("gate", "kind"),
    [
        ("large", "bart"),
        ("small", "bart"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("middleX", "bart"), ("middleY", "bart"), ("large", "t5"))
        ),
    ],
)
def test_every_gate_has_its_files(models: Any, tmp_path: Path, gate: str, kind: str) -> None:
    result = result_of(models, gate, kind)
    writer = Writer(tmp_path, "test")
    writer.report([result], {})
    names = {path.name for path in writer.written}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert all(path.stat().st_size for path in writer.written)
    by_token = gate in ("large", "middleX")
    assert ("positions_nlvr2_encoder.ffn.svg" in names) == by_token
    assert {"kinds_vqa.png", "kinds_vqa.svg", "distribution_vqa.png", "variation.png", "gates.csv"} <= names
    said = Reader((tmp_path / "index.html").read_text()).text
    assert ("so there is no map of the image" in said) == (not by_token)
    expected = {"small": "the same at every position", "middleY": "the same for every input"}
    assert expected.get(gate, "") in said
    rows = list(csv.DictReader((tmp_path / "gates.csv").open()))
    assert {row["kind"] for row in rows} == ({"text", "image", "padding", ALL} if by_token else {ALL})
    content = json.loads((tmp_path / "gates.json").read_text())
    (own,) = content["runs"]
    assert len(own["cells"]) == len(rows)
    assert all(sum(cell["histogram"]) == cell["count"] for cell in own["cells"])
    parts = {"small": "samples", "middleY": "channels"}
    if gate in parts:
        assert all(layer["variation"][parts[gate]] == 1 for layer in own["layers"])
    assert [round(sum(layer["variation"].values()), 6) for layer in own["layers"]] == [1] * 8


def shown(axis: Any) -> np.ndarray:
    return np.asarray(axis.images[-1].get_array().filled(np.nan))


def test_heat_maps_show_the_means_with_labelled_axes(models: Any) -> None:
    result = result_of(models, "large")
    figure = figures.kinds(result, "nlvr2")
    for axis, site in zip(figure.axes, ("encoder.attn", "encoder.ffn"), strict=False):
        assert [label.get_text() for label in axis.get_xticklabels()] == ["text", "image", ALL, "padding"]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1"]
        assert axis.get_xlabel() == "kind of token"
        for row in (0, 1):
            for column, kind in enumerate(("text", "image", ALL, "padding")):
                assert shown(axis)[row, column] == result.cells["nlvr2", site, row, kind].running.mean
        written = [text.get_text() for text in axis.texts]
        assert written == [f"{value:.3f}" for value in shown(axis).ravel()]
    assert figure.axes[0].get_ylabel() == "layer"
    assert figure.axes[-1].get_ylabel() == "mean of G"
    pyplot.close(figure)


def test_positions_of_both_images_stand_side_by_side(models: Any) -> None:
    result = result_of(models, "middleX")
    figure = figures.positions(result, "nlvr2", "encoder.attn")
    grids = result.positions["nlvr2", "encoder.attn", 1]
    table = shown(figure.axes[1])
    assert np.array_equal(table[:, :2], grids[0])
    assert np.isnan(table[:, 2]).all()
    assert np.array_equal(table[:, 3:], grids[1])
    pyplot.close(figure)


def test_a_clip_has_a_row_of_frames(models: Any) -> None:
    result = result_of(models, "middleX")
    result.positions["vqa", "encoder.attn", 0] = np.arange(5.0).reshape(1, 1, 5)
    result.positions["vqa", "encoder.attn", 1] = np.arange(5.0).reshape(1, 1, 5)
    figure = figures.positions(result, "vqa", "encoder.attn")
    assert shown(figure.axes[0]).shape == (1, 5)
    assert figure.get_supxlabel() == "position on the frames of the clip"
    pyplot.close(figure)


def test_an_overlay_lies_on_its_own_image(models: Any, tmp_path: Path) -> None:
    result = result_of(models, "large")
    figure = figures.overlays(result, "nlvr2", "encoder.ffn", drawn(tmp_path, result)["nlvr2"])
    assert figure is not None
    columns = 3  # picture and two layers
    for row, example in enumerate(result.examples["nlvr2"]):
        picture, *layers = figure.axes[row * columns : (row + 1) * columns]
        left, right = np.asarray(picture.images[0].get_array())[0, [0, -1]]
        assert left.tolist() == [100, 0, 0]
        assert right.tolist() == [150, 0, 0]
        assert picture.get_title(loc="left").startswith("</script>")
        for layer, axis in enumerate(layers):
            _, first, second = axis.images
            grids = example.maps["encoder.ffn", layer].reshape(2, 2, 2)
            assert np.array_equal(first.get_array(), grids[0])
            assert np.array_equal(second.get_array(), grids[1])
            assert first.get_extent() == [-0.5, 223.5, 223.5, -0.5]
            assert second.get_extent() == [229.5, 453.5, 223.5, -0.5]
            assert first.norm.vmin <= grids.min() < grids.max() <= first.norm.vmax
    assert len({axis.images[1].norm.vmin for axis in figure.axes[1::columns]}) == 1  # a scale per layer
    pyplot.close(figure)
    assert figures.overlays(result, "nlvr2", "encoder.ffn", {}) is None


def test_curves_of_a_distribution_have_the_area_of_its_share_below_2(models: Any) -> None:
    result = result_of(models, "large")
    figure = figures.distributions(result, "vqa")
    assert len(figure.axes) == 4
    for axis in figure.axes:
        curves = [patch.get_data() for patch in axis.patches]
        assert len(curves) == 3
        assert [float((values * np.diff(edges)).sum()) for values, edges, _ in curves] == pytest.approx([1, 1, 1])
        assert axis.get_title().startswith("layer ")
    pyplot.close(figure)


def test_two_checkpoints_are_compared_kind_by_kind(models: Any, tmp_path: Path) -> None:
    first, second = result_of(models, "large", name="a"), result_of(models, "small", name="$b^$")
    figure = figures.compared(first, second, "vqa")
    assert figure is not None
    above, below, apart = (shown(figure.axes[2 * row + 1]) for row in range(3))
    assert np.array_equal(apart, below - above)
    assert above[1, 0] == first.cells["vqa", "encoder.ffn", 1, "text"].running.mean
    assert (below[1] == second.cells["vqa", "encoder.ffn", 1, ALL].running.mean).all()  # the same at every position
    pyplot.close(figure)
    rows = list(differences(first, second))
    assert len(rows) == 2 * 2 * 2 * 4
    assert rows[0][:4] == ("vqa", "encoder.attn", 0, "text")
    Writer(tmp_path, "test").report([first, second], {})
    reader = Reader((tmp_path / "index.html").read_text())
    assert "Comparison" in reader.text
    assert (tmp_path / "compared_nlvr2.png").is_file()
    assert (tmp_path / "kinds_vqa_second.png").is_file()
    assert {row["run"] for row in csv.DictReader((tmp_path / "gates.csv").open())} == {"a", "$b^$"}
    table = reader.text[reader.text.index("All differences, largest first") :]
    found = [float(x) for x in re.findall(r"-?\d\.\d{4}", table)[: 3 * len(rows)]][2::3]
    assert sorted(found, key=lambda value: -abs(value)) == found
    assert max(map(abs, found)) > 0.01


def test_checkpoints_without_a_common_site_are_said_to_have_none(models: Any, tmp_path: Path) -> None:
    first, second = result_of(models, "large", name="a"), result_of(models, "large", name="b")
    second.gates = {"decoder.ffn": "LargeGate"}
    second.axes = {(task, "decoder.ffn", layer): axes for (task, _, layer), axes in second.axes.items()}
    second.cells = {(task, "decoder.ffn", *rest): cell for (task, _, *rest), cell in second.cells.items()}
    second.positions, second.shares = {}, {}
    assert figures.compared(first, second, "vqa") is None
    Writer(tmp_path, "test").report([first, second], {})
    assert "no task and site with a gate in common" in (tmp_path / "index.html").read_text()


def test_figures_are_the_same_each_time_and_their_svg_is_well_formed(models: Any, tmp_path: Path) -> None:
    result = result_of(models, "large")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        written = figures.save(figures.distributions(result, "vqa"), tmp_path / folder / "x.y")
        assert [path.name for path in written] == ["x.y.png", "x.y.svg"]
    for name in ("x.y.png", "x.y.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert ElementTree.parse(tmp_path / "a" / "x.y.svg").getroot().tag.endswith("svg")
    with Image.open(tmp_path / "a" / "x.y.png") as picture:
        assert len(picture.convert("L").getcolors(1 << 20) or ()) > 20


def test_the_page_escapes_all_text_and_loads_nothing(models: Any, tmp_path: Path) -> None:
    result = result_of(models, "large", name=HOSTILE)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    writer = Writer(out, "test")
    writer.report([result], drawn(pictures, result), notes=[HOSTILE])
    assert out / "overlay_vqa_encoder.attn.png" in writer.written
    reader = Reader((out / "index.html").read_text())
    assert reader.open == []
    tags = {tag for tag, _ in reader.tags}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "form", "base", "svg"})
    assert HOSTILE in reader.text
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/png;base64,")
            assert attributes["alt"]
        if tag == "a":
            assert str(attributes["href"]).startswith("#")
    policy = next(a["content"] for t, a in reader.tags if t == "meta" and "http-equiv" in a)
    assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_every_heading_is_linked_and_cells_are_formatted() -> None:
    reader = Reader(page("a", [Text("n", note=True)], [Section("b<", [Table("c", ["x"], [[1234], [0.25], [None]])])]))
    assert ("a", {"href": "#s0"}) in reader.tags
    assert ("h2", {"id": "s0"}) in reader.tags
    assert ("p", {"class": "note"}) in reader.tags
    assert "1,234" in reader.text
    assert "0.2500" in reader.text


def test_a_picture_carries_its_own_bytes(tmp_path: Path) -> None:
    Image.new("RGB", (3, 3), "red").save(tmp_path / "x.png")
    html = Picture(tmp_path / "x.png", "a <b>").html()
    assert 'alt="a &lt;b&gt;"' in html
    assert "base64,iVBOR" in html
