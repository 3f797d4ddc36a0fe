"""The rating page in a real browser: its keys and content, and that text from a run is never active."""

from __future__ import annotations

import json

import pytest

HOSTILE = (
    "<script>alert(1)</script></script><img src=x onerror=alert(2)>\" ' ` {{7*7}} ${7*7} --> ]]> & &lt; "
    "\u202eright to left\u202c \u200f\u05d0\u05d1 \x00\x1b[31m \u2028"
)


def votes(folder):
    return [json.loads(line)["choice"] for line in (folder / "votes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("key", ["1", "ArrowLeft", "2", "ArrowRight", "0", "ArrowDown"])
def test_each_key_is_a_vote_for_what_it_says(chromium, serve, make_run, key):
    folder = make_run(1)
    server, _ = serve(folder)
    chromium.open(server.address)
    trained = "left" if chromium.text("left").startswith("trained") else "right"
    chromium.press(key)
    chosen = {"1": "left", "ArrowLeft": "left", "2": "right", "ArrowRight": "right"}.get(key)
    assert votes(folder) == [0.5 if chosen is None else float(chosen == trained)]
    assert chromium.evaluate("!document.getElementById('done').hidden")
    assert not chromium.complaints


def test_a_whole_session_by_keyboard(chromium, serve, make_run):
    folder = make_run(3)
    server, client = serve(folder)
    chromium.open(server.opening)  # as the command opens it
    assert chromium.evaluate("location.href") == server.address
    first = chromium.text("left")
    assert chromium.text("progress") == "1 of 3" and chromium.text("rater") == "Rated by ann"
    chromium.press("s")
    assert chromium.text("left") != first and chromium.text("progress") == "1 of 3"
    chromium.press("u")
    assert chromium.text("left") == first
    chromium.press("1")
    chromium.press("u")
    assert chromium.text("left") == first and votes(folder)[1] is None
    chromium.press("s")
    for done in (2, 3):
        chromium.press("2", modifiers=2)  # with Ctrl, the key is the browser's
        chromium.press("2", autoRepeat=True)  # holding a key down does not vote
        chromium.press("2")
        assert chromium.text("progress") == f"{done} of 3"
    assert chromium.text("left") == first and "skipped before" in chromium.text("kind")
    chromium.press("0")
    assert "All 3 pairs are rated." in chromium.text("done")
    chromium.press("1")  # nothing to vote on
    assert len(votes(folder)) == 5 and client.state()["done"] == 3
    chromium.press("u")
    assert chromium.text("left") == first and client.state()["done"] == 2
    assert not chromium.complaints


def test_a_key_hit_twice_votes_once(chromium, serve, make_run):
    folder = make_run(3)
    server, client = serve(folder)
    chromium.open(server.address)
    chromium.wait("performance.now() - shownAt > UNSEEN")
    hit = "dispatchEvent(new KeyboardEvent('keydown', {key: '1', bubbles: true}))"
    # In one script: while the first vote is being sent, and as soon as the next pair is there.
    chromium.evaluate(
        f"(async () => {{ document.{hit}; document.{hit};"
        f" while (busy) await new Promise(resolve => setTimeout(resolve, 1)); document.{hit}; }})()"
    )
    chromium.wait("!busy")
    assert len(votes(folder)) == 1 and client.state()["done"] == 1


def test_hostile_text_stays_text(chromium, serve, make_run):
    row = {"prompt": [{"role": "<b>x</b>", "content": HOSTILE}, {"role": "user", "content": HOSTILE}]}
    row |= {"category": HOSTILE, "set": HOSTILE, "start": HOSTILE + "1", "trained": HOSTILE + "2"}
    folder = make_run([make_run.sample(0, **row), make_run.sample(1)])
    server, client = serve(folder, rater=HOSTILE[:100])
    chromium.open(server.address)
    if client.state()["pair"]["category"] != HOSTILE:
        chromium.press("s")
    shown = {chromium.text("left"), chromium.text("right")}
    assert shown == {HOSTILE + "1", HOSTILE + "2"}
    assert chromium.text("prompt").count(HOSTILE) == 2 and HOSTILE in chromium.text("kind")
    assert chromium.evaluate("document.querySelectorAll('script, img, b, style').length") == 2  # the page's own
    assert not chromium.complaints


def test_the_policy_keeps_anything_but_the_pages_own_from_acting(chromium, serve, make_run):
    server, _ = serve(make_run(1))
    chromium.open(server.address)
    chromium.evaluate(
        'const html = \'<img src=x onerror="window.acted = 1"><i style="color:red">\';'
        "document.body.insertAdjacentHTML('beforeend', html);"
        "const s = document.createElement('script'); s.textContent = 'window.acted = 1'; document.body.append(s);"
        "fetch('http://localhost:9/').then(() => { window.acted = 1 }, () => {})"
    )
    chromium.wait("true")
    assert chromium.evaluate("window.acted") is None
    refused = [c["params"]["entry"]["text"] for c in chromium.complaints if c["method"] == "Log.entryAdded"]
    assert sum("Content Security Policy" in text for text in refused) >= 4


def test_an_empty_response_says_so(chromium, serve, make_run):
    server, _ = serve(make_run([make_run.sample(0, start="", trained=" (empty) ")]))
    chromium.open(server.address)
    empty = "[...document.querySelectorAll('.answer .text')].map(n => n.classList.contains('empty')).sort()"
    assert chromium.evaluate(empty) == [False, True]


def test_what_could_not_be_kept_is_said_and_the_pair_stays(chromium, serve, make_run):
    folder = make_run(2)
    server, client = serve(folder)
    chromium.open(server.address)
    first = chromium.text("left")
    (folder / "votes.jsonl").mkdir()
    chromium.press("1")
    assert "could not be kept: Is a directory" in chromium.text("problem")
    assert chromium.text("left") == first and client.state()["done"] == 0
    (folder / "votes.jsonl").rmdir()
    chromium.press("1")
    assert chromium.evaluate("document.getElementById('problem').hidden") and len(votes(folder)) == 1
    server.shutdown()
    server.server_close()
    chromium.press("1")
    assert "server has ended" in chromium.text("problem")


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (375, False), (1100, True), (375, True)])
def test_every_width_and_scheme(chromium, serve, make_run, tmp_path, width, dark):
    long = {"start": "word " * 400 + "x" * 500, "trained": "short", "prompt": "What is this? " * 200}
    server, _ = serve(make_run([make_run.sample(0, **long), make_run.sample(1)]))
    chromium.open(server.address, width=width, dark=dark)
    if "short" not in (chromium.text("left"), chromium.text("right")):
        chromium.press("s")
    chromium.screenshot(tmp_path / "page.png")
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 22, 26)" if dark else "rgb(250, 250, 248)"
    )
    tops = chromium.evaluate("['left', 'right'].map(id => document.getElementById(id).getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) == (width > 640)
    # The choices stay visible, however long the texts are.
    box = chromium.evaluate("document.getElementById('choices').getBoundingClientRect().toJSON()")
    assert box["top"] > 0 and box["bottom"] <= 900
