import re
from html.parser import HTMLParser

import pytest

from edgeattn.devices import check as check_module
from edgeattn.devices import latency
from edgeattn.devices.check import bench, check, evaluate_bundle
from edgeattn.devices.report import render_report, summary_rows, write_report
from edgeattn.devices.results import ResultsFile, read_results
from edgeattn.devices.strip_plot import strip_plot
from edgeattn.errors import UsageError


@pytest.fixture
def checked(rig, labelled_images, monkeypatch, clock):
    """A bundle after a check, a bench and an eval, with its results."""

    def measure(*args, **options):
        return latency.measure_latency(*args, **options, clock=clock)

    monkeypatch.setattr(check_module, "measure_latency", measure)
    result = check(rig.bundle, labelled_images(40), seconds=1)
    bench(rig.bundle, targets=["fake"], seconds=1)
    evaluate_bundle(rig.bundle, labelled_images(8), targets=["fake"])
    return rig.bundle, result


class _Tags(HTMLParser):
    """Checks that tags nest and collects every attribute."""

    VOID = {"meta", "link", "img", "br", "hr", "input", "circle", "line", "rect"}

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_loads_nothing_and_is_well_formed(checked):
    html = (checked[0].path / "report.html").read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(html)
    assert tags.open == [] and not {"script", "link", "img", "iframe"} & set(tags.tags)
    assert not {"src", "href", "onclick"} & {name for name, _ in tags.attributes}
    assert not re.search(r"https?://|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html and 'scope="col"' in html and 'role="img"' in html


def test_names_from_the_bundle_are_escaped(checked):
    html = (checked[0].path / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;dark&lt;/b&gt;" in html and "<b>dark" not in html
    assert "softmax stays in &lt;float&gt;" in html


def test_report_shows_the_check_and_lists_what_came_after(checked):
    html = (checked[0].path / "report.html").read_text(encoding="utf-8")
    assert "INCONCLUSIVE" in html and "edgeattn check" in html and "images would decide" in html
    assert html.count("<svg") == 2
    assert [kind for kind in ("<td>eval</td>", "<td>bench</td>", "<td>check</td>") if kind in html] == [
        "<td>eval</td>",
        "<td>bench</td>",
        "<td>check</td>",
    ]


@pytest.mark.parametrize("kind", ["bench", "eval"])
def test_report_without_a_check_shows_what_there_is(checked, kind):
    records = read_results(checked[0].path / "results.jsonl").records
    only = ResultsFile(tuple(r for r in records if r["kind"] == kind), ("line 9 is damaged <here>",))
    html = render_report(checked[0], only)
    assert "line 9 is damaged &lt;here&gt;" in html and f"edgeattn {kind}" in html


def test_report_of_nothing_says_what_to_run(rig):
    with pytest.raises(UsageError, match="run `edgeattn check"):
        write_report(rig.bundle, ResultsFile(()))


def test_summary_rows_are_the_same_from_result_and_record(checked):
    bundle, result = checked
    rows = summary_rows(result)
    assert rows == summary_rows(read_results(bundle.path / "results.jsonl").records[0])
    assert [(row["target"], row["variant"]) for row in rows] == [
        ("fake", "float32"), ("fake", "quantized"), ("other", "float32"), ("other", "quantized"),
    ]  # fmt: skip
    first, second = rows[:2]
    assert (first["speedup"], second["speedup"]) == (None, 2) and first["size_bytes"] > second["size_bytes"]
    assert (first["top1"], second["agreement"], second["p50_ms"], second["p90_ms"]) == (100, 100, 1, 1)


def test_a_bundle_with_nothing_quantized_has_a_report(checked):
    record = next(r for r in read_results(checked[0].path / "results.jsonl").records if r["kind"] == "eval")
    for target in record["targets"]:
        for part in ("accuracy", "placement", "settings", "size_bytes"):
            target.get(part, {}).pop("quantized", None)
    assert "float32" in render_report(checked[0], ResultsFile((record,)))


def test_many_classes_are_cut_to_the_most_changed(checked):
    bundle, _ = checked
    record = read_results(bundle.path / "results.jsonl").records[0]
    for accuracy in record["targets"][0]["accuracy"].values():
        accuracy["per_class"] = [dict(name=f"class {i}", images=4, correct=2) for i in range(100)]
    record["targets"][0]["accuracy"]["quantized"]["per_class"][70]["correct"] = 0
    html = render_report(bundle, ResultsFile((record,)))
    assert "40 of 100 classes" in html and html.index("class 70<") < html.index("class 0<")


@pytest.mark.parametrize(
    "series",
    [{"a": [1.0] * 50}, {"a": [0.001, 0.002], "<b>": [0.0015]}, {"a": [5.0] * 99 + [900.0], "b": [7.0] * 100}],
    ids=["constant", "short", "outlier"],
)
def test_plot_stays_inside_its_frame(series):
    svg = strip_plot(series)
    tags = _Tags()
    tags.feed(svg)
    positions = [float(value) for name, value in tags.attributes if name in ("cx", "x", "x1", "x2")]
    assert tags.open == [] and all(0 <= x <= 760 for x in positions) and "<b>" not in svg
