"""The page: complete, self-contained, accessible, and safe against what rows hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from pipelines.inspect import cache as inspect_cache
from pipelines.inspect.find_sample import Asked
from pipelines.report.lead import Lead
from pipelines.report.page import write_report
from pipelines.terminal.tables import human_bytes
from teacher_cache.errors import KdcliError
from teacher_cache.reading.cache import TeacherCache

VOID = {"meta", "br", "img", "input", "link", "hr"}
LOADS = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "formaction", "background"}


class Page(HTMLParser):
    """Tags with their attributes, the text outside them, and whether tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def result(value: float) -> dict:
    families = {"charts": {"n": 10, "exact_match": value}, "<b>bold</b>": {"n": 10, "exact_match": value}}
    return {"n": 20, "exact_match": value, "family_mean": value, "families": families}


@pytest.fixture
def full_page(make_run, tiny_cache, tmp_path) -> Page:
    plan = TeacherCache(str(tiny_cache)).plan_hash
    runs = [make_run("sft", plan_hash=plan), make_run("llava-kd", ("reg", "res"), plan_hash="another")]
    scores = {"teacher": result(0.9), "sft": result(0.4), "llava-kd": [result(0.5), result(0.7)]}
    out = write_report(runs, str(tiny_cache), tmp_path / "deep" / "report.html", scores, title="A <title>")
    return Page(out.read_text(encoding="utf-8"))


def check_self_contained(page: Page) -> None:
    """Nothing is loaded from anywhere: links go inside the page, images are data."""
    assert not page.open, f"not closed: {page.open}"
    assert not page.all("script") and not page.all("iframe") and not page.all("link")
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in LOADS:
                assert (value or "").startswith(("#", "data:image/")), f"<{tag} {name}={value!r}>"
            if name == "style":
                assert "url(" not in (value or "")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids


def test_the_page_is_complete_and_self_contained(full_page):
    check_self_contained(full_page)
    ids = {attributes["id"] for attributes in full_page.all("section")}
    assert ids == {"results", "runs", "losses", "efficiency", "cache", "images", "labels", "settings"}
    for expected in ("A <title>", "60.0 ± 14.1", "<b>bold</b>", "trained from another cache plan", "torch 2.9"):
        assert expected in full_page.text


def test_loss_terms_are_explained_above_their_charts(full_page):
    losses = full_page.text[full_page.text.index("One chart for each loss term") :]
    assert "cross-entropy of the labels on response tokens" in losses
    assert "vlad" not in losses, "terms of these runs alone"


def test_a_lead_is_said_before_anything_else(make_run, tmp_path):
    lead = Lead("It <gained>.", [("+11 points", "exact match")], [("Cost", "60 s & 18 MB")])
    out = write_report([make_run("kd")], None, tmp_path / "page.html", title="A title", lead=lead)
    page = Page(out.read_text(encoding="utf-8"))
    check_self_contained(page)
    said = [words.strip() for words in page.words if words.strip()]
    told = [*(said[said.index("A title", 1) :])][1:6]
    assert told == ["It <gained>.", "+11 points", "exact match", "Cost", "60 s & 18 MB"]


def test_style_sheet_asks_for_nothing(full_page):
    sheet = next(words for words in full_page.words if "color-scheme" in words)
    assert "url(" not in sheet and "@import" not in sheet and "prefers-color-scheme:dark" in sheet


def test_pictures_have_descriptions_and_tables_have_headers(full_page):
    pictures = [attributes for attributes in full_page.all("svg") if attributes.get("aria-hidden") != "true"]
    assert pictures
    for attributes in pictures:
        assert attributes.get("role") == "img" and attributes.get("aria-label")
    headers = full_page.all("th")
    assert headers and all(attributes.get("scope") in ("col", "row") for attributes in headers)
    assert full_page.all("html")[0]["lang"] == "en"


def test_cache_numbers_are_those_of_status(full_page, tiny_cache):
    body = inspect_cache.status(TeacherCache(str(tiny_cache)))
    vision = body["columns"]["fields/vision_topk"]
    a_token = human_bytes(vision["bytes"] / vision["counts"]["vision_rows"])
    assert f"{a_token} a vision token" in full_page.text
    assert body["plan_hash"] in full_page.text
    response = body["columns"]["fields/response_topk"]
    assert f"{human_bytes(response['bytes'] / response['counts']['response_rows'])} a response token" in full_page.text


def test_images_carry_the_words_that_the_cache_tells(full_page, tiny_cache):
    pictures = [attributes for attributes in full_page.all("svg") if attributes.get("class") == "patches"]
    of_gallery = [one for one in full_page.all("image") if not one["id"].startswith("image-label-")]
    assert 4 <= len(of_gallery) <= 6 < len(pictures)
    cells = [attributes for attributes in full_page.all("rect") if attributes.get("class") == "cell"]
    assert len(cells) == len(pictures) * 36
    decoded = inspect_cache.inspect(
        TeacherCache(str(tiny_cache)), Asked(key=re.search(r"\d{9}-[0-9a-f]{8}", full_page.text)[0])
    )
    word, probability = decoded.vision[0][0]
    assert f"{word.strip()} {100 * probability:.0f} %" in full_page.text


def test_markup_in_rows_is_text(make_run, hostile_cache, tmp_path):
    name = "<script>alert(1)</script>"
    folder = make_run("run", versions={"torch": name}, git=name)
    (folder / "scores.json").write_text(json.dumps({name: result(0.5)}))
    out = write_report([folder], str(hostile_cache), tmp_path / "page.html")
    page = Page(out.read_text(encoding="utf-8"))
    check_self_contained(page)
    assert "<script" not in out.read_text(encoding="utf-8")
    for shown in (
        '<script>alert("turn")</script>',
        '</style></svg><img src=x onerror="alert(1)"> & "quoted"',
        "rows<i>.json",
    ):
        assert shown in page.text
    assert page.text.count(name) >= 2


def test_a_page_without_cache_and_scores_says_what_it_has(make_run, tmp_path):
    page = Page(write_report([make_run("kd")], None, tmp_path / "page.html").read_text(encoding="utf-8"))
    check_self_contained(page)
    assert {attributes["id"] for attributes in page.all("section")} == {"runs", "losses", "efficiency", "settings"}


def test_a_page_of_everything(whole_page):
    page = Page(whole_page.read_text(encoding="utf-8"))
    check_self_contained(page)
    ids = [attributes["id"] for attributes in page.all("section")]
    assert ids == [
        "results",
        "runs",
        "losses",
        "gradients",
        "efficiency",
        "cache",
        "fidelity",
        "images",
        "labels",
        "matching",
        "settings",
    ]
    told = [
        attributes["aria-label"]
        for attributes in page.all("svg")
        if "matched with" in (attributes.get("aria-label") or "")
    ]
    assert len(told) == 4 and all(
        "9 vision tokens of the student matched with 36 of the teacher" in one for one in told
    )
    tinted = [one for one in page.all("rect") if one.get("class") == "tinted"]
    free = [one for one in page.all("rect") if one.get("class") == "free"]
    assert (len(tinted), len(free)) == (2 * (9 + 9), 2 * 27)
    assert "<b>teacher</b>" in page.text and "vision rows, reverse KL" in page.text
    for attributes in page.all("svg"):
        if attributes.get("aria-hidden") != "true":
            assert attributes.get("role") == "img" and attributes.get("aria-label")


def test_the_command_leaves_the_matching_out(em_kd_run, tiny_cache, fidelity_file, tmp_path, monkeypatch):
    from click.testing import CliRunner

    import cli

    monkeypatch.chdir(tmp_path)
    command = ["report", str(em_kd_run), "--cache", str(tiny_cache), "--fidelity", str(fidelity_file), "--no-matching"]
    done = CliRunner().invoke(cli.main, [*command, "--out", "page.html"], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout == "wrote page.html\n"
    ids = {attributes["id"] for attributes in Page((tmp_path / "page.html").read_text(encoding="utf-8")).all("section")}
    assert "fidelity" in ids and "matching" not in ids


def test_a_field_less_cache_shows_images_without_words(make_run, make_request, tmp_path):
    from pipelines.capture.cache_teacher import capture

    capture(make_request(tmp_path / "bare", fields=("response_topk",)))
    page = Page(
        write_report([make_run("kd")], str(tmp_path / "bare"), tmp_path / "page.html").read_text(encoding="utf-8")
    )
    assert "No field of this cache tells the words of vision tokens" in page.text
    assert page.all("image")


def test_an_unreadable_row_is_named_not_hidden(make_run, tiny_cache, copy_of, tmp_path):
    damaged = copy_of(tiny_cache)
    for tar in (damaged / "fields" / "vision_topk" / "data").iterdir():
        tar.write_bytes(b"\0" * tar.stat().st_size)
    page = Page(write_report([make_run("kd")], str(damaged), tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Not shown: part" in page.text and "No row with an image could be read" in page.text


def test_a_cache_that_is_not_there_is_refused(make_run, tmp_path):
    with pytest.raises(KdcliError):
        write_report([make_run("kd")], str(tmp_path / "none"), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
