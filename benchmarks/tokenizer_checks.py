"""Checks of what is read from a tokenizer and its chat template, against transformers' rendering and tokenization."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_rlaif.encoding import encode_prompt, encode_response, reasoning_marks
from trl_rlaif.judging.local import LocalJudge
from trl_rlaif.judging.prompt import JudgePrompt
from trl_rlaif.recipe import prompt_folder
from trl_rlaif.responses import ResponseReader
from trl_rlaif.stopping import end_of_turn, stop_ids

ASKED = [{"role": "user", "content": "What is 2+2?"}]
RATINGS = tuple(map(str, range(1, 11)))
# Typical policy outputs: tags, code, markup, reasoning, other scripts, emoji.
WRITTEN = (
    "<b>bold</b> and <table><tr><td>1</td></tr></table>",
    "def f(a, b):\n    return a<b and b>a  # `x`\n\n\tprint(1)",
    '<tool_call>\n{"name": "f"}\n</tool_call>',
    "狐狸跳过了懒狗。これは？ 여우",
    "🦊🐶 naïve café — “quoted”",
    "one\n\ntwo  three",
)


def same(found: Any, expected: Any) -> str:
    """Empty if they are equal, else a mark of the failure."""
    return "" if found == expected else f" **wrong: {expected!r}**"


def _rendered(tokenizer: Any, *more: dict[str, str], **options: Any) -> str:
    return tokenizer.apply_chat_template([*ASKED, *more], tokenize=False, **options)


def end(tokenizer: Any) -> str:
    """The end of a turn, which follows an assistant's content in the rendered template, and the other stop tokens."""
    own = end_of_turn(tokenizer)
    shown = f"`{tokenizer.convert_ids_to_tokens(own)}`"
    if tokenizer.chat_template:
        said = _rendered(tokenizer, {"role": "assistant", "content": "Four."})
        answered, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (said[: said.rindex("Four.") + 5], said)
        )
        after = [id for id in whole[len(answered) :] if tokenizer.decode([id]).strip()]
        shown += same([own], after[:1])
    others = [tokenizer.convert_ids_to_tokens(id) for id in stop_ids(tokenizer) if id != own]
    return shown + "".join(f", also `{token}`" for token in others)


def ending(tokenizer: Any) -> str:
    """The text before a judge's ending, which must be followed by an answer, not by reasoning."""
    found = tokenizer.decode(
        encode_prompt(tokenizer, ASKED if tokenizer.chat_template else "What?", opening="The score is")
    )
    before = found.removesuffix("The score is")
    thinks = any(before.rfind(mark) > before.rfind(mark.replace("<", "</")) for mark in ("<think>", "<thought>"))
    return f"`{before[-30:]!r}`" + same(found.endswith("The score is"), True) + same(thinks, False)


def ten(tokenizer: Any) -> str:
    """Probabilities of the ratings 1 to 10 by LocalJudge, against a float64 computation over all their spellings."""
    size = max(len(tokenizer), *tokenizer.get_vocab().values()) + 1
    model = _model(size, [i for text, i in tokenizer.get_vocab().items() if text.strip("▁Ġ ") in (*RATINGS, "0")])
    question = JudgePrompt.load(prompt_folder("general")).rate("What is 2+2?", "It is 4.")
    judge = LocalJudge(model, tokenizer, JudgePrompt.load(prompt_folder("general")), "judge")
    [answer] = dict(judge.ask([[question]], RATINGS))[0]
    found = [math.exp(logprob) for logprob in answer.logprobs[0]]

    def encoded(text: str) -> list[int]:
        if tokenizer.chat_template:
            return encode_prompt(tokenizer, list(question.messages), opening=question.ending + text)
        return tokenizer("".join(m["content"] + "\n\n" for m in question.messages) + question.ending + text)[
            "input_ids"
        ]

    expected = _spelled(model.double(), {text: encoded(text) for text in RATINGS}, encoded(""), tokenizer.get_vocab())
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    spelled = len(encoded("10")) - len(encoded("1")) + 1
    return f"{spelled} token{'s' if spelled > 1 else ''}, {worst:.0e}" + same(worst < 1e-5, True)


def _model(size: int, likely: list[int]) -> LlamaForCausalLM:
    """A tiny model that makes digits likely, so that differences are visible."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=4096, **shape)).eval()
    model.lm_head = torch.nn.Linear(16, size)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.5)
        model.lm_head.weight.normal_(std=0.3)
        model.lm_head.bias.zero_()
        model.lm_head.bias[likely] = 9.0
    return model


def _spelled(model: Any, full: dict[str, list[int]], bare: list[int], vocabulary: dict[str, int]) -> list[float]:
    context = os.path.commonprefix([bare, *full.values()])
    paths = {text: [ids[len(context) :]] for text, ids in full.items()}
    one = paths["1"][0]
    if paths["10"][0][: len(one)] != one and "0" in vocabulary:  # "10" is a token, and "1" and "0" spell it as well
        paths["10"].append([*one, vocabulary["0"]])

    @torch.no_grad()
    def probability(path: list[int]) -> float:
        logits = model(input_ids=torch.tensor([[*context, *path]])).logits[0].double().log_softmax(-1)
        return math.exp(sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(path)))

    found = {text: sum(map(probability, of_text)) for text, of_text in paths.items()}
    found["1"] -= sum(probability(path) for path in paths["10"] if path[: len(one)] == one)
    return [found[text] for text in RATINGS]


def padding(tokenizer: Any) -> str:
    """The padding token, which must not end responses."""
    return f"`{tokenizer.pad_token}`" + same(tokenizer.pad_token_id in stop_ids(tokenizer), False)


def tags(tokenizer: Any) -> str:
    """Whether the reward trainer sees a policy's output in the same tokens that PPO scores."""
    reader, wrong = ResponseReader(tokenizer, stop_ids(tokenizer)), []
    _, close, _ = reasoning_marks(tokenizer) or ("", "", "")
    # If the prompt opens the reasoning, a response without its end would be reasoning only.
    before = tokenizer(f"hm{close}\n\n", add_special_tokens=False)["input_ids"] if reader.prompted else []
    for text in WRITTEN:
        answer = [*_sampled(tokenizer, text), end_of_turn(tokenizer)]
        sampled = before + answer
        if not reader.row(sampled) == answer == encode_response(tokenizer, reader.read(sampled).answer):
            wrong.append(text)
    return f"{len(WRITTEN)} texts the same" + same(wrong, [])


def _sampled(tokenizer: Any, text: str) -> list[int]:
    """A response's tokens in training: those in the tokenization of the whole conversation."""
    if not tokenizer.chat_template:
        return tokenizer(tokenizer.eos_token + text, add_special_tokens=False)["input_ids"][1:]
    start = encode_prompt(tokenizer, ASKED, opening="")
    whole = tokenizer(tokenizer.decode(start) + text, add_special_tokens=False)["input_ids"]
    return whole[len(start) :]


def reasoning(tokenizer: Any) -> str:
    """The end of the reasoning, and whether the answer after it is read without the reasoning."""
    marks = reasoning_marks(tokenizer)
    if marks is None:
        return "none"
    opening, close, _ = marks
    text = f"{opening}\nTwo and two.\n{close}\n\nFour."
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], end_of_turn(tokenizer)]
    reader = ResponseReader(tokenizer, stop_ids(tokenizer))
    found, unfinished = reader.read(ids), reader.read(ids[: ids.index(ids[-1]) // 2])
    shown = f"`{close}`" + same((found.answer, found.reasoning, found.ended), ("Four.", "Two and two.", True))
    return shown + same((unfinished.answer, unfinished.ended), ("", False))


CELLS = {
    ("end of turn",): end,
    ("before a judge's ending",): ending,
    ("ratings, difference",): ten,
    ("pad",): padding,
    ("tags and scripts",): tags,
    ("end of reasoning",): reasoning,
}
