"""A report as text and as HTML: its numbers are those that were given, and names cannot break it."""

import re
import xml.etree.ElementTree as ET

from lightning_gcfreeze.reporting import Report

REPORT = Report(
    "Callback(t0=4)",
    ["After 8 steps 3 of 8 are frozen.", "Half <b>."],
    [("Optimizer state", "2 KiB -> 1 KiB"), ("Not saved", "passes & more")],
    [("first<1>.weight", 1234567, 0.25), ("b", 3, 1.0), ("c", 1, 0.0)],
)


def test_text_has_a_line_for_each_sentence_total_and_layer():
    """A bar of twenty characters shows the fraction."""
    lines = str(REPORT).splitlines()
    assert lines[0] == "Callback(t0=4)"
    assert lines[2:4] == list(REPORT.sentences)
    assert lines[5:7] == ["Optimizer state  2 KiB -> 1 KiB", "Not saved        passes & more"]
    assert lines[8].split() == ["layer", "elements", "frozen"]
    assert [line.split()[:3] for line in lines[9:]] == [
        ["first<1>.weight", "1,234,567", "25.0%"],
        ["b", "3", "100.0%"],
        ["c", "1", "0.0%"],
    ]
    assert [line.count("█") for line in lines[9:]] == [5, 20, 0]
    assert len({len(line) for line in lines[9:]}) == 1
    assert repr(REPORT) == str(REPORT)


def test_report_without_anything_frozen_is_its_sentences():
    assert str(Report("C()", ["Nothing is frozen yet."])) == "C()\n\nNothing is frozen yet."
    assert "<table" not in Report("C()", ["Nothing."])._repr_html_()


def test_html_is_well_formed_loads_nothing_and_has_all_numbers():
    """An XML parser reads it, and finds what the text has."""
    html = REPORT._repr_html_()
    root = ET.fromstring(html)
    assert [p.text for p in root.findall("p")][1:] == list(REPORT.sentences)
    cells = ["".join(td.itertext()) for td in root.iter("td")]
    assert cells == [
        "2 KiB -> 1 KiB",
        "passes & more",
        "first<1>.weight",
        "1,234,567",
        "25.0%",
        "b",
        "3",
        "100.0%",
        "c",
        "1",
        "0.0%",
    ]
    widths = re.findall(r"#6baed680 ([\d.]+)%", html)
    assert widths == ["25.0", "100.0", "0.0"]
    assert "http" not in html
    assert "src=" not in html
