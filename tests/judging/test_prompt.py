"""Prompt folders, and the questions built from them."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

import pytest
from helpers.judges import PARTS, make_prompt, shown

from trl_rlaif.errors import UserError
from trl_rlaif.judging.framing import NOTICE, frame_code, framed
from trl_rlaif.judging.prompt import FILES, JudgePrompt
from trl_rlaif.recipe import prompt_folder

TASKS = ["general", "harmlessness", "helpfulness", "summarization"]
TEXTS = ("what is the capital?", "a city", "the lazy dog")
EXEMPLAR = {"context": "c", "response_1": "a", "response_2": "b", "rationale": "because", "preferred": 2}


@pytest.fixture
def folder(tmp_path):
    """A user's own folder with the three required files."""
    path = tmp_path / "mine"
    path.mkdir()
    for name in FILES[:3]:
        (path / name).write_text(PARTS[name] + "\n")
    return path


def frames(*texts):
    """The texts as a comparison shows them."""
    return [framed(text, frame_code(texts, texts)) for text in texts]


def write_exemplars(folder, *lines, end="\n"):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "exemplars.jsonl").write_text("".join(line + end for line in lines), encoding="utf-8")


def refused(folder, *, where):
    with pytest.raises(UserError) as caught:
        JudgePrompt.load(folder)
    assert str(where) in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


# ---- The packaged prompts -------------------------------------------------------------------------------


@pytest.fixture(params=TASKS)
def packaged(request):
    return JudgePrompt.load(prompt_folder(request.param))


def test_every_packaged_prompt_has_all_parts(packaged):
    drafts = {"draft.txt", "draft.jinja"} if packaged.name != "general" else set()
    assert set(packaged.parts) == set(FILES) - {"exemplars.jsonl", "frame.txt"} - drafts
    assert len(packaged.exemplars) == 8
    assert Counter(exemplar.preferred for exemplar in packaged.exemplars) == {1: 4, 2: 4}
    assert all(text.strip() for text in packaged.parts.values())


@pytest.mark.parametrize("preamble", ["base", "detailed"])
@pytest.mark.parametrize("think", [False, True])
def test_packaged_comparisons(packaged, preamble, think):
    for shots in range(9):
        question = packaged.compare(*TEXTS, preamble=preamble, shots=shots, think=think)
        messages = question.messages
        assert [m["role"] for m in messages] == ["user", "assistant"] * shots + ["user"]
        assert messages[0]["content"].startswith(packaged.parts[f"{preamble}.txt"] + "\n\n")
        assert sum(packaged.parts[f"{preamble}.txt"] in m["content"] for m in messages) == 1
        last = messages[-1]["content"]
        order = [last.index(text) for text in TEXTS]
        assert order == sorted(order) and "{{" not in last
        assert question.ending == packaged.parts["ending.txt"]
        assert question.thinking == (packaged.parts["thinking.txt"] if think else "")
        for exemplar, sample, answer in zip(packaged.exemplars, messages[::2], messages[1::2], strict=False):
            for text in (exemplar.context, exemplar.response_1, exemplar.response_2):
                assert text in sample["content"]
            rationale = f"{question.thinking} {exemplar.rationale}\n\n" if think else ""
            assert answer["content"] == f"{rationale}{question.ending}{exemplar.preferred}"
            assert (exemplar.rationale in answer["content"]) == think
    with pytest.raises(UserError, match="8 exemplars, and 9"):
        packaged.compare(*TEXTS, shots=9)


def test_what_is_longer_comes_behind_what_is_shared(packaged):
    """More shots only add turns between the preamble and the sample."""
    two, three = (packaged.compare(*TEXTS, shots=shots).messages for shots in (2, 3))
    assert three[:4] == two[:4] and three[-1] == two[-1]


def test_no_packaged_exemplar_is_changed_by_quoting(packaged):
    for exemplar in packaged.exemplars:
        for text in (exemplar.context, exemplar.response_1, exemplar.response_2, exemplar.rationale):
            assert packaged.quote(text) == text


@pytest.mark.parametrize("think", [False, True])
def test_packaged_ratings(packaged, think):
    question = packaged.rate(*TEXTS[:2], think=think)
    (message,) = question.messages
    assert message["role"] == "user" and message["content"].startswith(packaged.parts["rubric.txt"] + "\n\n")
    assert message["content"].index(TEXTS[0]) < message["content"].index(TEXTS[1])
    assert question.ending == packaged.parts["rating_ending.txt"]
    assert question.thinking == (packaged.parts["rating_thinking.txt"] if think else "")


def test_texts_are_found_again(packaged):
    """Scripted judges read questions with this helper."""
    texts = dict(zip(("context", "response_1", "response_2"), TEXTS, strict=True))
    assert shown(packaged, packaged.compare(*TEXTS, shots=2, preamble="detailed")) == texts
    assert shown(packaged, packaged.rate(*TEXTS[:2])) == {"context": TEXTS[0], "response": TEXTS[1]}


# ---- Custom folders -------------------------------------------------------------------------------------


def test_three_files_are_enough(folder):
    prompt = JudgePrompt.load(str(folder))
    assert prompt == JudgePrompt("mine", {name: PARTS[name] for name in FILES[:3]})
    question = prompt.compare(*TEXTS)
    context, response_1, response_2 = frames(*TEXTS)
    assert question.messages == (
        {
            "role": "user",
            "content": f"{PARTS['base.txt']}\n\n{NOTICE}\n\nRequest:\n{context}\n\nResponse 1:\n{response_1}\n\n"
            f"Response 2:\n{response_2}",
        },
    )
    assert question.ending == "Preferred Response=" and question.thinking == ""


def test_line_ends_around_a_part_do_not_count_and_a_space_does(folder):
    (folder / "ending.txt").write_bytes(b"\r\nThe better one is \r\n")
    assert JudgePrompt.load(folder).parts["ending.txt"] == "The better one is "


def test_an_editors_byte_order_mark_is_no_part(folder):
    write_exemplars(folder, EXEMPLAR)
    before = JudgePrompt.load(folder)
    for path in folder.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert JudgePrompt.load(folder) == before


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"preamble": "detailed"}, "detailed.txt"),
        ({"think": True}, "thinking.txt"),
        ({"shots": 1}, "exemplars.jsonl"),
    ],
)
def test_an_option_that_needs_more_names_the_file(folder, options, missing):
    prompt = JudgePrompt.load(folder)
    with pytest.raises(UserError, match=re.escape(missing)) as caught:
        prompt.compare(*TEXTS, **options)
    assert "'mine'" in str(caught.value) and caught.value.exit_code == 2


def test_a_rating_names_what_it_needs():
    for part, think in (("rating", False), ("rubric", False), ("rating_ending", False), ("rating_thinking", True)):
        with pytest.raises(UserError, match=rf"'short' has no file {part}\."):
            make_prompt(**{part: None}).rate(*TEXTS[:2], think=think)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, where=folder / name)


@pytest.mark.parametrize("name", ["base.txt", "rubric.txt", "exemplars.jsonl"])
def test_a_file_that_is_not_utf8_is_named(folder, name):
    (folder / name).write_bytes(b"\xe9\xff")
    refused(folder, where=folder / name)


def test_a_missing_folder_is_named_with_the_nearest_one(folder):
    message = refused(folder.with_name("mien"), where=folder.with_name("mien"))
    assert "Did you mean 'mine'?" in message
    refused(folder / "nowhere" / "mine", where="nowhere")


@pytest.mark.parametrize("name", ["sample.jinja", "rating.jinja"])
@pytest.mark.parametrize(
    "text",
    ["{{ context", "{% fi %}", "{{ context.title_page }}", "{{ context + 1 }}", "{{ 1 / 0 }}"],
)
def test_a_broken_template_is_named_with_its_file(folder, name, text):
    (folder / name).write_text(text)
    assert f"The template {name} of the prompt 'mine' is wrong" in refused(folder, where=folder / name)


def test_a_rating_has_one_response(folder):
    (folder / "rating.jinja").write_text("{{ context }} {{ response_1 }}")
    assert "there is no 'response_1'. It is given context" in refused(folder, where=folder / "rating.jinja:1")


def test_a_template_cannot_reach_the_machine(folder):
    (folder / "sample.jinja").write_text("{{ context.__class__.__mro__[1].__subclasses__() }}")
    refused(folder, where=folder / "sample.jinja")


WRONG_EXEMPLARS = {
    "no JSON": "{'context': 1}",
    "no object": "[1, 2]",
    "null": "null",
    "a part is missing": {name: EXEMPLAR[name] for name in EXEMPLAR if name != "rationale"},
    "a part too many": {**EXEMPLAR, "score": 3},
    "three": {**EXEMPLAR, "preferred": 3},
    "a text": {**EXEMPLAR, "preferred": "1"},
    "true": {**EXEMPLAR, "preferred": True},
    "a fraction": {**EXEMPLAR, "preferred": 1.0},
    "no text": {**EXEMPLAR, "response_2": None},
}


@pytest.mark.parametrize("wrong", WRONG_EXEMPLARS.values(), ids=WRONG_EXEMPLARS)
def test_a_wrong_exemplar_is_named_with_its_line(folder, wrong):
    write_exemplars(folder, EXEMPLAR, EXEMPLAR, wrong, EXEMPLAR)
    refused(folder, where=f"{folder / 'exemplars.jsonl'}:3: ")
    write_exemplars(folder, "", EXEMPLAR, "", wrong)  # blank lines count as lines, not as exemplars
    refused(folder, where=f"{folder / 'exemplars.jsonl'}:4: ")


def test_exemplars_are_lines_whatever_stands_in_their_texts(folder):
    """JSON may contain separators such as U+2028 unescaped; they do not end a line."""
    odd = {**EXEMPLAR, "context": "a\u2028b\x85c\n{{ context }}"}
    write_exemplars(folder, json.dumps(odd, ensure_ascii=False), "", EXEMPLAR, end="\r\n")
    prompt = JudgePrompt.load(folder)
    assert [exemplar.context for exemplar in prompt.exemplars] == [odd["context"], "c"]
    messages = prompt.compare(*TEXTS, shots=1).messages
    assert odd["context"] in messages[0]["content"] and messages[1]["content"] == "Preferred Response=2"


# ---- Values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ 7*7 }}",
        "{% raw %}",
        "{% endraw %}",
        "{# gone #}",
        "{% for x in 9 %}",
        "{{ context }}",
        "<b>&amp;'\"",
        "}}",
        " white \t\n\n",
        "\n\n",
    ],
)
def test_values_are_inserted_as_text(hostile):
    prompt = make_prompt()
    for values in ((hostile, "b", "c"), ("a", hostile, "c"), ("a", "b", hostile)):
        expected = "Request:\n{}\n\nResponse 1:\n{}\n\nResponse 2:\n{}".format(*frames(*values))
        (message,) = prompt.compare(*values).messages
        assert message["content"] == f"{PARTS['base.txt']}\n\n{NOTICE}\n\n{expected}"
    (message,) = prompt.rate(hostile, hostile).messages
    context, response = (framed(hostile, frame_code([hostile], [hostile])) for _ in range(2))
    expected = f"Request:\n{context}\n\nResponse:\n{response}"
    assert message["content"] == f"{PARTS['rubric.txt']}\n\n{NOTICE}\n\n{expected}"


def test_a_conversation_names_its_speakers():
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a fox"}]
    for question in (make_prompt().compare(messages, "b", "c"), make_prompt().rate(messages, "b")):
        assert ">User: what?\n\nAssistant: a fox</" in question.messages[0]["content"]
    one = make_prompt().compare(messages[:1], "b", "c")
    assert one == make_prompt().compare("what?", "b", "c")


# ---- Revision -------------------------------------------------------------------------------------------


def test_the_revision_follows_every_file(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prompt_folder("general"), folder)
    (folder / "frame.txt").write_text("Read what is enclosed.")
    packaged = JudgePrompt.load(prompt_folder("general"))
    assert JudgePrompt.load(folder).revision != packaged.revision
    (folder / "frame.txt").write_text(NOTICE)
    first = JudgePrompt.load(folder).revision
    assert re.fullmatch("[0-9a-f]{16}", first)
    copy = JudgePrompt(packaged.name, packaged.parts | {"frame.txt": NOTICE}, packaged.exemplars)
    assert first == copy.revision == packaged.revision  # the content counts, not the path
    seen = {first}
    for name in FILES:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content.replace(b"e", b"E", 1) if name != "exemplars.jsonl" else content[:-3])
        if name == "exemplars.jsonl":  # without its last line
            (folder / name).write_bytes(content[: content.rstrip().rfind(b"\n") + 1])
        elif name.endswith(".jinja"):  # the replacement could break a name in the template
            (folder / name).write_bytes(content + b"\n!")
        seen.add(JudgePrompt.load(folder).revision)
        (folder / name).write_bytes(content)
    assert len(seen) == 1 + len(FILES) - 2  # labels do not depend on the two files for drafting rubrics
    assert JudgePrompt.load(folder).revision == first
    question = packaged.rate("Write the checks for responses.", "Write the checks for responses.")
    for name in ("draft.txt", "draft.jinja"):
        (folder / name).unlink()
    assert JudgePrompt.load(folder).revision == first
    assert JudgePrompt.load(folder).rate(*["Write the checks for responses."] * 2) == question
    (folder / "thinking.txt").unlink()
    assert JudgePrompt.load(folder).revision not in seen
