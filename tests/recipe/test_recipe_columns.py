"""`data.columns`: the names of the columns in a recipe's files."""

import pytest

from trl_rlaif.recipe.sections import DataSection

HEAD = "model: {path: gpt2}\ndata:\n  prompts: prompts.jsonl\n  columns: "


def test_columns_of_all_files_and_of_one():
    data = DataSection(columns={"prompt": "question", "id": "nr", "eval_prompts": {"prompt": "text"}})
    assert data.columns_of("prompts") == {"prompt": "question", "id": "nr"}
    assert data.columns_of("eval_prompts") == {"prompt": "text", "id": "nr"}
    assert DataSection().columns_of("pairs") == {}


def test_they_are_written_and_read_again(parse):
    columns = {"prompt": "question", "pairs": {"response_1": "a"}}
    recipe = parse(HEAD + "{prompt: question, pairs: {response_1: a}}\nsample:\n")
    assert recipe.to_dict()["data"]["columns"] == columns


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ("{promt: question}", "Nothing is read as 'promt'. Did you mean 'prompt'?"),
        ("{prompts: question}", "'prompts' is \"question\". Did you mean 'prompt'?"),
        ("{prompt: {a: b}}", "'prompt' is a mapping."),
        ("{pairs: {respons_1: a}}", "Did you mean 'response_1'?"),
        ("{prompt: 3}", "'columns.prompt' in section 'data' is 3."),
        ("{prompt: ''}", "columns.prompt"),
        ("question", "'columns' in section 'data' is \"question\"."),
    ],
)
def test_wrong_columns(problems, columns, part):
    found = problems(f"{HEAD}{columns}\nsample:\n")
    assert len(found) == 1 and found[0].where == "recipe.yaml:4" and part in str(found[0])


def test_two_categories(problems):
    data = "{prompts: prompts.jsonl, category: a, columns: {category: b}}"
    found = problems(f"model: {{path: gpt2}}\ndata: {data}\nsample:\n")
    assert "Set category or columns.category, not both." in str(found[0])


def test_formats_and_pairs_of_scored_responses(parse, problems):
    data = "model: {path: gpt2}\ndata: {pairs: pairs.jsonl, format: scored, scored_pairs: best_worst}\nlabel:\n"
    assert (parse(data).data.format, parse(data).data.scored_pairs) == ("scored", "best_worst")
    found = problems(data.replace("best_worst", "best"))
    assert "best_worst" in str(found[0])
