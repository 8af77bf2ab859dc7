"""The pages of `--html`: what they say and draw, in a real browser, and what they never do."""

from __future__ import annotations

import dataclasses
import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from qmoe_rules import Recipe, Report, SaveError, VerificationReport, plan, quantize, verify
from qmoe_rules.cli import main
from qmoe_rules.pages import check_page, report_page, verification_page, write_page
from qmoe_rules.pages._figures import SHADES, Shades, of_report
from qmoe_rules.report import CONVERTED, ProjectionRow, Row
from qmoe_rules.verification import Failure, NodeResult
from tests.browser import Browser

HOSTILE = "</title></style><script>nope()</script><img src=//x onerror=nope()>\"'&amp;{{ 7 * 7 }}"
FIELDS: dict[str, Any] = {
    "block_size": 32,
    "nodes_to_exclude": ["layers.1.*"],
    "overrides": ["*nothing*:bits=8"],
}


class Reading(HTMLParser):
    """Text and elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    """A browser; skips the test where there is none."""
    found = Browser.find(tmp_path_factory.mktemp("browser"))
    return found or pytest.skip("needs Chromium")


@pytest.fixture
def report(tiny_fp16: Path, tmp_path: Path) -> Report:
    return quantize(tiny_fp16, tmp_path / "out", **FIELDS, measured=True)


def test_the_page_of_a_quantization(report: Report, tmp_path: Path, browser: Browser) -> None:
    made = datetime(2026, 2, 3, 4, 5, tzinfo=UTC)
    page = report_page(report, Recipe(**FIELDS), source="before", destination="after", made=made)
    write_page(page, tmp_path / "page.html")
    opened = browser.open(tmp_path / "page.html")
    assert opened.console == ()
    shown = Reading(opened.dom)
    for text in (
        "before to after",
        f"{report.ratio:.2f}\N{MULTIPLICATION SIGN}",
        "layers.0.moe int4 block 32, raw",
        "layers.1.moe excluded by the recipe",  # skipped, with the reason
        "stored as int4 block 32, raw",  # the recipe
        "*nothing*: bits=8",
        "2026-02-03 04:05 UTC",
        f"onnx-ir {ir.__version__}",
    ):
        assert text in shown.text
    first, second = report.rows[0].projections
    assert re.findall(r"<title>expert (\d+): (.*?)</title>", opened.dom) == [
        (str(expert), f"{error:.3g}")
        for projection in (first, second)
        for expert, error in enumerate(projection.errors)
    ]
    labels = {str(svg["aria-label"]) for svg in shown.all("svg")}
    assert "fc1: 4.5 bits per weight, int4 block 32" in labels
    assert "fc1: 16 bits per weight, float16" in labels  # of the node that stays
    spread = f"{min(first.errors):.3g} to {max(first.errors):.3g}"
    assert any(label.startswith(f"fc1: {spread}, mean") for label in labels)
    assert any(label.startswith("before: 1.57 MB of experts") for label in labels)


def test_the_page_fits_a_phone_and_draws_everything(
    report: Report, tmp_path: Path, browser: Browser
) -> None:
    long = "/model/" + "layers.12345/" * 20 + "moe"
    rows = [dataclasses.replace(row, node=long, reason=row.reason and long) for row in report.rows]
    write_page(report_page(_report(*rows, like=report), Recipe()), tmp_path / "page.html")
    for layout in browser.layouts(tmp_path / "page.html", 320, 700, 1280):
        assert layout.reach <= layout.width
        assert layout.drawn == layout.marks
        assert layout.marks > 2 * 8  # the experts of two projections, and the bars


def test_the_page_of_a_plan_computes_nothing(
    tiny_fp16: Path, tmp_path: Path, browser: Browser
) -> None:
    status = main(["plan", str(tiny_fp16), "--budget", "5", "--html", str(tmp_path / "p.html")])
    assert status == 0
    opened = browser.open(tmp_path / "p.html")
    assert opened.console == ()
    shown = Reading(opened.dom)
    assert "Quantization plan" in shown.text
    assert "budget 5 bits per weight" in shown.text
    assert "Experts" not in shown.words
    assert plan(tiny_fp16, budget=5).rows[0].stored in shown.text


def test_the_page_of_a_verification(tiny_fp16: Path, tmp_path: Path, browser: Browser) -> None:
    quantize(tiny_fp16, tmp_path / "out", block_size=32)
    page = tmp_path / "deep" / "folder" / "page.html"
    assert main(["verify", str(tiny_fp16), str(tmp_path / "out"), "--html", str(page)]) == 0
    found = verify(tiny_fp16, tmp_path / "out")
    opened = browser.open(page)
    assert opened.console == ()
    shown = Reading(opened.dom)
    assert "passed all checks" in shown.text
    assert found.nodes[0].output_error is not None
    assert f"{found.nodes[0].output_error:.3g}" in shown.text
    assert opened.dom.count("<title>expert ") == 2 * 2 * 8
    assert all(each.reach <= each.width for each in browser.layouts(page, 320, 1280))


def test_a_failed_verification_says_what_failed() -> None:
    failed = NodeResult("a.moe", "converted").failing(Failure("weights", "fc1 is far off"))
    page = Reading(verification_page(VerificationReport("CPUExecutionProvider", (failed,))))
    assert "1 check failed" in page.text
    assert "weights: a.moe fc1 is far off" in page.text
    assert "all checks" not in page.text


def test_hostile_names_are_text(
    tiny_fp16: Path, tmp_path: Path, browser: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.load(tiny_fp16)
    for node in proto.graph.node:
        if node.op_type == "MoE":
            node.name = f"{HOSTILE}{node.name}"
    onnx.save(proto, tmp_path / "model.onnx")
    options = ["--exclude", "*layers.1*", "--override", f"{HOSTILE}:bits=8"]
    pages = tmp_path / "quantized.html", tmp_path / "verified.html"
    source, out = str(tmp_path / "model.onnx"), str(tmp_path / "out")
    assert main(["quantize", source, out, *options, "--html", str(pages[0])]) == 0
    assert main(["verify", source, out, "--html", str(pages[1])]) == 0
    for page in pages:
        opened = browser.open(page)
        assert opened.console == ()
        shown = Reading(opened.dom)
        assert not shown.all("script")
        assert not shown.all("img")
        assert f"{HOSTILE}layers.0.moe" in "".join(shown.words)
    capsys.readouterr()


def test_the_browser_sees_what_it_looks_for(tmp_path: Path, browser: Browser) -> None:
    """Guards the tests above: an error of a script is seen, and the policy stops one."""
    broken = tmp_path / "broken.html"
    broken.write_text("<body><script>nope()</script></body>")
    assert "nope is not defined" in browser.open(broken).console[0]
    page = report_page(Report(), Recipe())
    broken.write_text(page.replace("</main>", "<script>nope()</script><img src=//x></main>"))
    console = browser.open(broken).console
    assert len(console) == 2
    assert all("Content Security Policy" in message for message in console)
    broken.write_text("<body><svg width=400 height=9><rect width=0 height=9></svg></body>")
    (layout,) = browser.layouts(broken, 300)
    assert layout.reach > 300
    assert (layout.marks, layout.drawn) == (1, 0)


def test_a_page_is_self_contained() -> None:
    page = report_page(_report(Row("a", CONVERTED)), Recipe(), source="model")
    assert re.findall(r"(?:src|href)\s*=\s*(\S*)>", page) == ['"data:,"']
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_notes_are_the_warnings_of_the_model_and_of_its_nodes() -> None:
    rows = [Row(name, CONVERTED, warnings=("it is slow there",)) for name in "ab"]
    report = _report(*rows)
    report.warnings.append("a pattern matches no node")
    page = report_page(report, Recipe())
    notes = ["a pattern matches no node", "it is slow there"]
    assert re.findall("<li>(.*)</li>", page) == notes


def test_a_report_of_nothing_and_one_of_odd_numbers() -> None:
    assert "nothing to quantize" in Reading(report_page(Report(), Recipe())).text
    odd = ProjectionRow("fc1", "int4 row", 0, 0.0, (0.0, math.nan, math.inf, 1.0))
    page = report_page(_report(Row("a", CONVERTED, projections=(odd,))), Recipe())
    assert "expert 1: nan" in page
    none = ProjectionRow("fc1", "int4 row", 8, 4.0, (0.0, 0.0))
    report_page(_report(Row("a", CONVERTED, projections=(none,))), Recipe())


def test_bits_of_a_report_are_an_average_over_weights() -> None:
    rows = [
        Row("a", CONVERTED, bytes_after=3, projections=(ProjectionRow("fc1", "", 8, 3.0),)),
        Row("b", CONVERTED, bytes_after=24, projections=(ProjectionRow("fc1", "", 24, 8.0),)),
        Row("c", "skipped", bytes_after=99, projections=(ProjectionRow("fc1", "", 9, 16.0),)),
    ]
    assert of_report(_report(*rows)).bits_per_weight == pytest.approx(27 * 8 / 32)


def test_shades_reach_over_all_numbers_and_keep_their_order() -> None:
    numbers = [0.0, 0.25, 0.7, 1.0, 1.5, 3.0, math.inf, math.nan]
    shades = Shades.over(numbers)
    steps = [shades.shade(number) for number in numbers]
    assert steps == sorted(steps)
    assert (steps[0], steps[1], steps[-1]) == (0, 0, SHADES - 1)
    assert shades.shade(1.0) == SHADES // 2
    low, high = zip(*shades.ends, strict=True)
    assert low[0] == pytest.approx(0.25)
    assert high[-1] == pytest.approx(4.0)
    assert {Shades.over([1.0, 1.01]).shade(n) for n in (1.0, 1.01)} == {SHADES // 2}


def test_only_a_page_is_written_over(tmp_path: Path, tiny_fp16: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "link.html").symlink_to(tmp_path / "model.onnx")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name in ("model.onnx", "link.html", "folder.html", "file/page.html"):
        with pytest.raises(SaveError, match="cannot write"):
            write_page("page", tmp_path / name)
    assert (tmp_path / "model.onnx").read_bytes() == b"model"
    write_page("page", tmp_path / "new" / "page.html")
    write_page("other", tmp_path / "new" / "page.html")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["page.html"]
    assert (tmp_path / "new" / "page.html").read_text() == "other"


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("report.onnx", "its name has to end in .html"),
        ("file/page.html", "Not a directory"),
        ("file/deep/page.html", "Not a directory"),
        (".", "its name has to end in .html"),
    ],
)
def test_a_page_that_cannot_be_is_refused_before_any_work(
    page: str, reason: str, tiny_fp16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for command in (["plan"], ["quantize", str(tmp_path / "out")]):
        arguments = [command[0], str(tiny_fp16), *command[1:], "--html", str(tmp_path / page)]
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert reason in err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_page_that_can_be_leaves_nothing_before(tmp_path: Path) -> None:
    for name in ("page.HTML", "new/page.html"):
        check_page(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder without new files")
def test_a_folder_that_takes_no_file_is_told_before_any_work() -> None:
    with pytest.raises(SaveError, match=r"cannot write to /proc/page\.html: "):
        check_page("/proc/page.html")


def _report(*rows: Row, like: Report | None = None) -> Report:
    sizes = (like.file_bytes_before, like.file_bytes_after) if like else (0, 0)
    report = Report(*sizes)
    for row in rows:
        report.record(ir.Node("", "MoE", []), row)
    return report
