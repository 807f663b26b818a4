"""The report of a real, tiny run: complete, well-formed, alone; and how a browser shows it."""

import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_end_to_end import SMALL, ferjax

from ferjax.engine import starts
from ferjax.report_facts import _flop
from ferjax.report_sections import _png

SECTIONS = ["score", "curves", "confusion", "classes", "calibration"]
SECTIONS += ["predictions", "views", "gradcam", "features", "labels", "audit", "run"]
VOID = {"meta", "link", "img", "br"}


def test_pictures_keep_their_colours():
    red = np.zeros((3, 4, 3), np.uint8)
    red[..., 0] = 255
    for image in (red, red[..., :1], red[..., 0]):
        shown = np.asarray(Image.open(io.BytesIO(_png(image))))
        np.testing.assert_array_equal(shown.reshape(image.shape), image)


def test_operations_are_written_with_three_digits():
    counts = (0, 2.345e6, 999.4e6, 999.6e6, 1.8171e12, 3.2e17)
    shown = ["0 MFLOP", "2.35 MFLOP", "999 MFLOP", "1 GFLOP", "1.82 TFLOP", "320 PFLOP"]
    assert [_flop(count) for count in counts] == shown


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reported") / "run"
    done = ferjax("main", *SMALL, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def report(trained):
    audited = ferjax("data.audit", "--dataset=synthetic_faces/tiny", f"--workdir={trained}")
    assert audited.returncode == 0, audited.stderr
    done = ferjax("report", f"--workdir={trained}")
    assert done.returncode == 0, done.stderr
    assert f"written to {trained}/report.html" in done.stdout
    return (trained / "report.html").read_text()


class Page(HTMLParser):
    """Checks that tags nest; collects ids, addresses and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "pre"} & set(self.open):  # the config may say "none"
            self.text += data


def test_every_section_is_there_and_nothing_is_asked_of_the_network(report):
    page = Page(report)
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids)), "an id twice"
    assert page.addresses
    assert all(a.startswith(("#", "data:")) for a in page.addresses)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert not re.search(r"<script|@import|url\((?!#)", report)
    assert not re.search(r"\b(nan|NaN|None|inf)\b", page.text)
    for part in re.split(r"<section ", report)[1:]:
        assert re.search(r"<svg|<img|<table|card", part), part[:40]


def test_the_figures_are_xml_that_takes_the_pages_colours(report, trained):
    drawn = re.findall(r"<svg.*?</svg>", report, re.DOTALL)
    names = {p.stem for p in (trained / "figures").glob("*.png")}
    wanted = {"accuracy", "loss", "pseudo_labels", "learning_rate", "speed", "confusion_counts"}
    assert wanted | {"confusion_shares", "classes", "reliability", "features"} <= names
    sheets = {"faces_drawn_at_random", "faces_most_confident_errors", "faces_least_confident_hits"}
    assert sheets | {"gradcam"} <= names
    assert len(drawn) == len(names - sheets - {"gradcam"})  # these are pictures in the page
    defined = set(re.findall(r"--([\w-]+):", report))
    for svg in drawn:
        ET.fromstring(svg)
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that dark mode can't change"
        assert set(re.findall(r"var\(--([\w-]+)\)", svg)) <= defined
        assert "aria-label" in svg


def test_the_report_says_what_evaluate_says(report, trained):
    done = ferjax("evaluate", f"--workdir={trained}")
    assert done.returncode == 0, done.stderr
    scores = json.loads((trained / "eval" / "public_test.json").read_text())
    low, high = (f"{100 * x:.2f}" for x in scores["accuracy_interval"])
    assert f"<b>{100 * scores['accuracy']:.2f} %</b>" in report
    assert f"95 % interval {low} to {high} %" in report
    card = (trained / "MODEL_CARD.md").read_text()
    assert f"{100 * scores['accuracy']:.2f} % ({low} to {high})" in card
    assert "28 labelled images of `synthetic_faces/tiny`" in card
    counts = re.search(
        r"<svg[^>]*aria-label=\"Images of public_test\.\".*?</svg>", report, re.DOTALL
    )[0]
    texts = [e.text for e in ET.fromstring(counts).iter("{http://www.w3.org/2000/svg}text")]
    numbers = [int(t) for t in texts if t and t.isdigit()]
    assert numbers == np.array(scores["confusion"]).ravel().tolist()
    assert report.count("data:image/png;base64,") >= 18
    assert "28 labelled and" in report


def test_the_run_is_told_of_as_it_was_and_not_as_the_report_is(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    start = starts.last(workdir)
    then = {
        **start,
        "device": "TPU v9",
        "devices": 16,
        "flax": "0.1.2",
        "code": "ferjax f00, jax 9",
    }
    rows = [{**then, "step": 0}, {**then, "step": 32, "devices": 8}]
    (workdir / starts.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    audit = json.loads((trained / "audit" / "audit.json").read_text())
    (workdir / "audit" / "audit.json").write_text(json.dumps({**audit, "digest": "another"}))
    done = ferjax("report", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    page = Page((workdir / "report.html").read_text())
    assert "8 x TPU v9, 1 process(es)" in page.text
    assert "flax 0.1.2" in page.text
    assert "codeferjax f00" in page.text
    assert "2 starts" in page.text
    assert "16 x TPU v9, 1 process(es)" in page.text
    assert "audit" not in page.ids  # of other data


def test_operations_and_the_audit_are_in_the_report(report, trained):
    text = Page(report).text
    shown = re.search(r"operations([\d.]+) ([MG])FLOP a step, ([\d.]+) ([GT])FLOP in all", text)
    each, total = (float(shown[i]) * 1000 ** "MGT".index(shown[i + 1]) for i in (1, 3))
    assert total / each == pytest.approx(64, rel=0.01)
    audit = json.loads((trained / "audit" / "audit.json").read_text())
    assert f"images of train{audit['splits']['train']['images']:,}" in text
    assert f"blank{len(audit['blank'])}" in text


def test_a_run_that_has_only_begun(trained, tmp_path):
    workdir = tmp_path / "begun"
    workdir.mkdir()
    shutil.copy(trained / "config.json", workdir)
    done = ferjax("report", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    text = Page((workdir / "report.html").read_text()).text
    assert "There is no checkpoint yet" in text
    assert "The run has done 0.0 of 2 epochs" in text


def test_private_test_is_shown_but_never_scored(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "eval" / "private_test_readings.jsonl").unlink(missing_ok=True)
    record = {"accuracy": 0.4321, "accuracy_interval": [0.4, 0.5], "images": 70}
    content = json.dumps({**record, "step": 64, "weights": "ema"})
    (workdir / "eval" / "private_test.json").write_text(content)
    done = ferjax("report", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    report = (workdir / "report.html").read_text()
    assert "<b>43.21 %</b><span>private_test, 70 images" in report
    assert "read 1 time;" in report
    assert "public_test, 70 images" in report  # of the checkpoint that is there
    assert (workdir / "eval" / "private_test.json").read_text() == content
    assert not (workdir / "eval" / "private_test_readings.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=nowhere"], "is nowhere a ferjax workdir?"),
        (["--workdir={run}", "--checkpoint=99"], "use best, latest or one of"),
        (["--workdir={run}", "--weights=sma"], "use ema or raw"),
    ],
)
def test_what_is_wrong_gets_one_line(args, message, trained):
    done = ferjax("report", *(a.format(run=trained) for a in args))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_other_data_than_the_run_was_trained_on_is_refused(trained, tmp_path):
    """It may hold images of this run's train as public_test."""
    other = shutil.copytree(trained, tmp_path / "run")
    (other / "report.html").unlink(missing_ok=True)
    split = json.loads((other / "split.json").read_text())
    (other / "split.json").write_text(json.dumps({**split, "data_digest": "0" * 64}))
    done = ferjax("report", f"--workdir={other}")
    assert done.returncode == 2
    assert "is not what the run was trained on (000000000000)" in done.stderr
    assert not (other / "report.html").exists()


def test_in_a_browser_nothing_overflows(report, trained):
    """At both widths, light and dark; no error, no request but for the page."""
    api = pytest.importorskip("playwright.sync_api")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if not binary:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        backgrounds = set()
        for width, scheme in ((400, "light"), (1400, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            said, asked = [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(f"file://{trained}/report.html")
            assert not said
            outside = [url for url in asked if not url.startswith(("data:", "file:"))]
            assert not outside
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            for section in SECTIONS:
                drawn = f"#{section} svg, #{section} img, #{section} table, #{section} .card"
                box = page.locator(drawn).first.bounding_box()
                assert box["width"] > 50, section
                assert box["height"] > 15, section
        browser.close()
    assert len(backgrounds) == 2
