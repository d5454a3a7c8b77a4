"""The page in a real browser: no console message, no request besides the page itself, nothing wider than the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
]


def browse(page: Path, profile: Path, *flags: str) -> tuple[list[str], list[str], str]:
    """(console messages, addresses that the page asked for, the document as the browser built it)."""
    # The browser asks its maker for updates by itself: no name resolves here, and such requests have no page as initiator.
    own = [f"--user-data-dir={profile}", f"--log-net-log={profile}.json", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, *own, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads(Path(f"{profile}.json").read_text())
    started = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [event.get("params", {}) for event in log["events"] if event["type"] == started]
    asked = [job["url"] for job in jobs if "url" in job and job.get("initiator") != "not an origin"]
    return re.findall(r"CONSOLE.*", done.stderr), asked, done.stdout


def test_the_watch_sees_what_it_is_for(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text('<!doctype html><img src="http://outside.invalid/x.png"><script>console.error("oh no")</script>')
    console, asked, _ = browse(bad, tmp_path / "profile")
    assert any("oh no" in line for line in console) and asked == ["http://outside.invalid/x.png"]


@pytest.mark.parametrize("cache", ["tiny_cache", "hostile_cache"])
def test_the_page_opens_quietly_and_alone(cache, make_run, tmp_path, request):
    runs = [make_run("sft"), make_run("kd", ("reg", "res"), steps=400)]
    page = write_report(runs, str(request.getfixturevalue(cache)), tmp_path / "report.html")
    console, asked, document = browse(page, tmp_path / "profile")
    assert (console, asked) == ([], [])
    assert "<article" in document and "<script" not in document
    assert document.count("<svg") == page.read_text(encoding="utf-8").count("<svg")


def test_a_page_with_every_section_opens_quietly_too(whole_page, tmp_path):
    console, asked, document = browse(whole_page, tmp_path / "profile")
    assert (console, asked) == ([], [])
    names = "results runs losses gradients efficiency cache fidelity images labels matching settings"
    assert re.findall(r'<section id="(\w+)"', document) == names.split()
    assert document.count("<rect") == whole_page.read_text(encoding="utf-8").count("<rect")


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(width, whole_page, tmp_path):
    """Measured by the page itself in a copy with a script in it: the page's own policy forbids scripts."""
    page = whole_page
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    script = "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script></body>"
    text, found = policy.subn("", page.read_text(encoding="utf-8"))
    assert found == 1
    frame = f"<iframe id=f style='width:{width}px;height:900px;border:0' srcdoc='{{}}'></iframe>"
    inner = text.replace("</body>", script.replace("document.title", "parent.document.title"))
    measured = tmp_path / "measured.html"
    measured.write_text("<!doctype html><body>" + frame.format(inner.replace("&", "&amp;").replace("'", "&#39;")))
    _, _, document = browse(measured, tmp_path / "profile")
    title = re.search(r"<title>(\d+)/(\d+)</title>", document)
    assert title, "the copy did not report its size"
    assert int(title[2]) == width and int(title[1]) <= width
