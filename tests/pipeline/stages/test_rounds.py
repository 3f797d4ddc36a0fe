"""Runs in rounds on tiny models: how a round continues the previous one, redone stages, reports and errors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from helpers.recipes import fingerprints, run_cli, tiny_recipe, write_recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_rlaif import UserError
from trl_rlaif.data.overlap import prompt_key
from trl_rlaif.experiments import run_comparison
from trl_rlaif.files import read_lines
from trl_rlaif.memory import plan_memory
from trl_rlaif.models.shared_model import active_adapter
from trl_rlaif.pipeline.context import Context
from trl_rlaif.pipeline.label_tasks import label_key, label_tasks
from trl_rlaif.pipeline.lineage import previous_runs
from trl_rlaif.pipeline.rounds import changes, round_recipe
from trl_rlaif.pipeline.run_folder import RunFolder
from trl_rlaif.pipeline.runner import run_recipe
from trl_rlaif.pipeline.work import dpo, grpo_rloo, ppo
from trl_rlaif.plugins import installed_plugins
from trl_rlaif.recipe import parse_recipe
from trl_rlaif.report.round_figures import rounds_part
from trl_rlaif.report.run_data import read_run
from trl_rlaif.reward.loading import load_reward_model
from trl_rlaif.status import describe, read_status

pytestmark = [pytest.mark.trl, pytest.mark.slow]

WEIGHTS = "adapter_model.safetensors"
SFT = {"data": "sft.jsonl", "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
RL = {"total_episodes": 8, "learning_rate": 1e-2}


def recipe_in(folder, model, **sections):
    """The tiny recipe with two rounds, and a pair of responses to each of 10 prompts."""
    said = [{"prompt": f"what is {i}?", "completion": "the fox " * (i % 3 + 1)} for i in range(6)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    known = {"sft": SFT, "rounds": {"number": 2, "earlier": 0.5}, "rl": RL}
    return tiny_recipe(folder, model, **{**known, **sections})


def run(recipe, folder, **how):
    return run_recipe(recipe, installed_plugins(), folder, **how)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A PPO recipe with two rounds, and its run."""
    base = tmp_path_factory.mktemp("rounds")
    recipe = recipe_in(base, tiny_model)
    return recipe, run(recipe, base / "out")


def context_of(recipe, folder, number):
    return Context(round_recipe(recipe, number, folder), folder.round(number), installed_plugins())


def policy_in(model_path, adapter=None):
    """The base model, with an adapter loaded by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


def logprobs(model, rollout, temperature):
    """(B, T) float64 log-probabilities of a rollout's response tokens, row by row and without padding."""
    rows = []
    for prompt, mask, response in zip(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, strict=True):
        logits = model.double()(torch.cat((prompt[mask], response))[None]).logits[0, -len(response) - 1 : -1]
        rows.append((logits / temperature).log_softmax(-1).gather(-1, response[:, None])[:, 0])
    return torch.stack(rows)


def test_the_first_round_is_the_recipe_without_rounds(finished, tiny_model, tmp_path):
    recipe, folder = finished
    plain = recipe_in(tmp_path, tiny_model, rounds=None, evaluate=None, report=None)
    found = fingerprints(plain)
    first = folder.round(1)
    assert {name: first.marker(name)["fingerprint"] for name in found} == found
    alone = run(plain, tmp_path / "out")
    assert (alone / "pairs.jsonl").read_bytes() == (first / "pairs.jsonl").read_bytes()
    one, other = (load_file(each / "policy" / WEIGHTS) for each in (alone, first))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    once = recipe_in(tmp_path, tiny_model, rounds={"number": 1}, evaluate=None, report=None)
    assert once.rounds is None and once.to_dict() == plain.to_dict() and fingerprints(once) == found


def test_the_second_round_samples_and_learns_with_the_policy_of_the_first(finished, tiny_model):
    recipe, folder = finished
    context = context_of(recipe, folder, 2)
    trainer, _ = ppo.build_trainer(context)
    wanted = policy_in(tiny_model, folder.round(1) / "policy")
    ids = torch.tensor([context.tokenizer("what is the quick fox?").input_ids])
    with torch.no_grad(), trainer.shared.role("policy"):
        assert torch.equal(trainer.shared.model(ids).logits, wanted(ids).logits)
        assert not torch.equal(policy_in(tiny_model)(ids).logits, wanted(ids).logits)
    assert context.start == folder.round(1) / "policy"
    rounds = [read_lines(folder.round(number) / "pairs.jsonl") for number in (1, 2)]
    assert [[row["id"] for row in rows] for rows in rounds] == [[f"p{i}" for i in range(10)]] * 2
    same = [one["response_1"] == other["response_1"] for one, other in zip(*rounds, strict=True)]
    assert sum(same) < 10
    own = [row for row in read_lines(folder.round(2) / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["step"] for row in own] == [1, 2] and own[0]["objective/kl"] > 1e-3


def test_every_round_draws_with_a_seed_of_its_own_that_follows_from_the_runs(tiny_model, tmp_path):
    folder = RunFolder(tmp_path / "out")

    def seeds(**sections):
        recipe = recipe_in(tmp_path, tiny_model, rounds={"number": 3}, **sections)
        rounds = [round_recipe(recipe, number, folder) for number in (1, 2, 3)]
        return [(each.run.seed, each.sample.seed) for each in rounds]

    found = seeds()
    assert found[0] == (7, None) and len(set(found)) == 3 and [sample for _, sample in found] == [None] * 3
    assert seeds() == found and not {run for run, _ in seeds(run={"seed": 8})} & {run for run, _ in found}
    own = [sample for _, sample in seeds(sample={"seed": 5})]
    assert own[0] == 5 and len(set(own)) == 3


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_kl_is_to_the_reference_that_the_recipe_names(finished, tiny_model, tmp_path, reference):
    """At the start of a round: 0 if the reference moves along, otherwise as in float64 passes of PEFT models."""
    _, folder = finished
    rounds = {"number": 2, "reference": reference}
    trainer, _ = ppo.build_trainer(context_of(recipe_in(tmp_path, tiny_model, rounds=rounds), folder, 2))
    rollout, _ = trainer.collect()
    sft, policy = folder.round(1) / "sft", folder.round(1) / "policy"
    with torch.no_grad():
        theirs = [
            logprobs(policy_in(tiny_model, of), rollout, trainer.args.temperature)
            for of in (policy, {"initial": sft, "previous": policy}[reference])
        ]
    mask = rollout.masks()[0]
    kl = ((theirs[0] - theirs[1]) * mask).sum(1)
    torch.testing.assert_close(rollout.kl().double(), kl, rtol=1e-5, atol=1e-5)
    assert kl.abs().max() > 1e-3 if reference == "initial" else kl.abs().max() == 0


@pytest.mark.parametrize("with_sft", [True, False])
@pytest.mark.parametrize("reference", ["initial", "previous"])
@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_trainers_of_trl_compare_with_it_too(finished, tiny_model, tmp_path, algorithm, reference, with_sft):
    _, folder = finished
    shutil.copytree(folder.path, tmp_path / "out")
    folder = RunFolder(tmp_path / "out")
    if not with_sft:
        shutil.rmtree(folder.round(1) / "sft")
    rl = {"algorithm": algorithm, "kl_coef": 0.1, **({} if algorithm == "dpo" else {"num_generations": 2})}
    sections = {} if with_sft else {"sft": None}
    recipe = recipe_in(tmp_path, tiny_model, rl=rl, rounds={"number": 2, "reference": reference}, **sections)
    context = context_of(recipe, folder, 2)
    trainer = {"dpo": dpo, "grpo": grpo_rloo}[algorithm].build_trainer(context)[0]
    ids = torch.tensor([context.tokenizer("what is the quick fox?").input_ids])
    policy = folder.round(1) / "policy"
    initial = folder.round(1) / "sft" if with_sft else None
    compared = {"initial": initial, "previous": policy}[reference]
    wanted = [policy_in(tiny_model, adapter)(ids).logits for adapter in (policy, compared)]
    assert torch.equal(*wanted) == (reference == "previous")
    name = "ref" if "ref" in trainer.model.peft_config else None
    assert (name is None) == (compared is None)
    with torch.no_grad():
        assert torch.equal(trainer.model(ids).logits, wanted[0])
        with active_adapter(trainer.model, name):
            assert torch.equal(trainer.model(ids).logits, wanted[1])
        if algorithm == "grpo":
            with trainer.scorer.shared.role(trainer.scorer.shared.reference):
                assert torch.equal(trainer.model(ids).logits, wanted[1])
    assert not any(p.requires_grad for n, p in trainer.model.named_parameters() if ".ref." in n or ".reference." in n)


def values(trainer):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), trainer.role_models.role("value"):
        return trainer.role_models.value_head(trainer.role_models.value_hidden({"input_ids": ids}))


def test_the_value_model_goes_on_from_that_of_the_round_before(finished, tiny_model, tmp_path):
    recipe, folder = finished
    first, _ = ppo.build_trainer(context_of(recipe, folder, 1))
    assert values(first).abs().max() == 0
    first.checkpoints.resume(folder.round(1) / "checkpoints" / "rl" / "checkpoint-2")  # after its last update
    second, _ = ppo.build_trainer(context_of(recipe, folder, 2))
    assert torch.equal(values(second), values(first)) and values(first).abs().max() > 1e-3
    # A value model of another kind starts new.
    other = recipe_in(tmp_path, tiny_model, rl=RL | {"value": "trunk"})
    assert values(ppo.build_trainer(context_of(other, folder, 2))[0]).abs().max() == 0


def keys_of(folder, name="preferences"):
    from datasets import load_from_disk

    return [prompt_key(row["prompt"]) for row in load_from_disk(str(folder / name))]


def test_what_was_held_out_stays_held_out_and_the_share_of_earlier_pairs_is_exact(finished):
    _, folder = finished
    one, two = (folder.round(number) for number in (1, 2))
    held_out = [[row["prompt_key"] for row in read_lines(run / "reward_scores.jsonl")] for run in (one, two)]
    assert set(held_out[0]) == set(held_out[1]) and len(held_out[1]) == 3
    numbers = [run.results_of("reward") for run in (one, two)]
    fresh = [sum(key not in held_out[0] for key in keys_of(run)) for run in (one, two)]
    assert "earlier_pairs" not in numbers[0] and numbers[0]["train_pairs"] == fresh[0] == 7
    assert numbers[1]["earlier_pairs"] == round(0.5 * fresh[0]) == 4  # 3.5 rounds to even
    assert numbers[1]["train_pairs"] == fresh[1] + 4


def test_the_accuracy_before_is_that_of_the_reward_model_of_the_round_before(finished, tiny_model):
    """Scored with transformers, one response at a time, without the stage's code."""
    from datasets import load_from_disk

    _, folder = finished
    model, tokenizer = load_reward_model(folder.round(1) / "reward"), AutoTokenizer.from_pretrained(tiny_model)
    held_out = {row["prompt_key"] for row in read_lines(folder.round(2) / "reward_scores.jsonl")}

    def score(prompt, response):
        text = tokenizer.apply_chat_template([*prompt, *response], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, 0].item()

    rows = list(load_from_disk(str(folder.round(2) / "preferences")))
    right = [score(row["prompt"], row["chosen"]) > score(row["prompt"], row["rejected"]) for row in rows]
    known = [of for of, row in zip(right, rows, strict=True) if prompt_key(row["prompt"]) in held_out]
    before = folder.round(2).results_of("reward")["before"]
    assert before["all"]["rate"] == sum(right) / 10 and before["all"]["n"] == 10
    assert before["held_out"]["rate"] == pytest.approx(sum(known) / 3) and before["held_out"]["n"] == 3
    assert "before" not in folder.round(1).results_of("reward")


def test_the_reward_model_goes_on_from_its_own_adapter_and_head(finished, tiny_model, tmp_path):
    from trl_rlaif.pipeline.work import reward

    _, folder = finished
    context = context_of(recipe_in(tmp_path, tiny_model), folder, 2)
    config = reward.trainer_config(context)
    train = reward._datasets(context, 0.3, config.max_length)[0]
    model = reward._trainer(context, config, train).model
    from peft import get_peft_model_state_dict

    saved = load_file(folder.round(1) / "reward" / WEIGHTS)
    state = get_peft_model_state_dict(model)
    assert state.keys() == saved.keys() and any("score" in name for name in saved)
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= {
        n for n, _ in model.named_parameters() if "lora_" in n or "modules_to_save" in n
    }


def test_the_runs_own_folder_holds_what_the_last_round_made(finished):
    recipe, folder = finished
    last = folder.round(2)
    for name in ("pairs.jsonl", "labels.jsonl", "reward_scores.jsonl", f"policy/{WEIGHTS}", f"reward/{WEIGHTS}"):
        assert (folder / name).read_bytes() == (last / name).read_bytes(), name
    results, rounds = folder.results(), [folder.round(number).results() for number in (1, 2)]
    assert results["rl"] == rounds[1]["rl"] and "sft" not in results and "sft" in rounds[0]
    assert [row["kl_last"] for row in results["rounds"]["rows"]] == [of["rl"]["kl_last"] for of in rounds]
    assert results["rounds"]["rows"][1]["accuracy_before"] == rounds[1]["reward"]["before"]["all"]
    assert results["rounds"]["seconds"] == pytest.approx(sum(of["seconds"] for of in rounds[0].values()))
    # Compared with the policy before the first round.
    assert Context(round_recipe(recipe, 2, folder), folder, installed_plugins()).initial == folder.round(1) / "sft"
    assert results["evaluate"]["sets"]["test"]["prompts"] == 4 and "evaluate" not in rounds[1]


def test_the_report_and_the_status_show_every_round(finished):
    recipe, folder = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    part = page[page.index('id="rounds"') : page.index('id="labels"')]
    assert part.count('<th scope="row">') == 2 and "50.0% of the earlier rounds" in part
    assert "KL is to the initial policy" in part and "on the responses of each round" in part
    status = read_status(folder.path)
    assert [stage.name for stage in status.stages] == ["round 1", "round 2", "evaluate", "report"]
    assert status.state == "done" and all(stage.state == "done" for stage in status.stages)
    assert "KL" in status.stages[1].summary and "round 2" in describe(status)
    assert [stage.name for stage in read_status(folder.round(2).path).stages] == ["sample", "label", "reward", "rl"]
    assert plan_memory(recipe).predict("update") > 0


def test_more_rounds_keep_those_that_there_are(finished, tiny_model, tmp_path, capsys):
    _, folder = finished
    shutil.copytree(folder.path, tmp_path / "out")
    recipe = recipe_in(tmp_path, tiny_model, rounds={"number": 3, "earlier": 0.5})
    messages = []
    more = run(recipe, tmp_path / "out", resume=True, confirm=lambda message: messages.append(message) or True)
    assert len(messages) == 1 and "evaluate: " in messages[0] and "sample" not in messages[0]
    for number in (1, 2):
        names = [f"policy/{WEIGHTS}", "results.json"]
        assert all((more.round(number) / n).read_bytes() == (folder.round(number) / n).read_bytes() for n in names)
    assert len(more.results()["rounds"]["rows"]) == 3
    assert more.results_of("reward")["earlier_pairs"] == 7  # half of two rounds' 7 each
    assert (more / f"policy/{WEIGHTS}").read_bytes() == (more.round(3) / f"policy/{WEIGHTS}").read_bytes()
    assert [run.path.name for run in previous_runs(round_recipe(recipe, 3, more))] == ["2", "1"]
    labels = [(each / "labels.jsonl").read_text().splitlines() for each in (more, more.round(2), more.round(3))]
    assert sorted(labels[0]) == sorted({*labels[1], *labels[2]})
    assert read_run(more.path).labels.total == 10
    said = capsys.readouterr()
    assert "Round 3 of 3" in said.out + said.err


def test_a_changed_setting_redoes_what_depends_on_it_in_every_round(finished, tiny_model, tmp_path):
    _, folder = finished
    shutil.copytree(folder.path, tmp_path / "out")
    before = [folder.round(number).marker("label") for number in (1, 2)]
    recipe = recipe_in(tmp_path, tiny_model, rl=RL | {"kl_coef": 0.5})
    with pytest.raises(UserError, match="Nothing was changed") as refused:
        run(recipe, tmp_path / "out", resume=True, confirm=lambda _: False)
    said = str(refused.value)
    assert "rl: rl.kl_coef was" in said and "rounds/2: " in said
    assert "sample: the previous run's rl is redone" in said and "evaluate: rl is redone" in said
    again = run(recipe, tmp_path / "out", resume=True)
    assert again.round(1).marker("label") == before[0] and again.round(2).marker("label") != before[1]
    assert run(recipe, tmp_path / "out", resume=True).results() == again.results()


def test_the_options_of_rounds_concern_later_rounds_alone(finished, tiny_model, tmp_path):
    _, folder = finished
    for option, stage in ({"earlier": 1.0}, "reward"), ({"reference": "previous"}, "rl"):
        recipe = recipe_in(tmp_path, tiny_model, rounds={"number": 2, "earlier": 0.5, **option})
        second, end = changes(recipe, folder)
        assert second.startswith(str(folder.round(2).path)) and end.startswith(f"{folder.path}:")
        assert f"  {stage}: rounds.{next(iter(option))} was" in second and "sample" not in second
    recipe = recipe_in(tmp_path, tiny_model, rounds={"number": 2, "earlier": 0.5, "reference": "initial"})
    assert changes(recipe, folder) == []


def test_rounds_may_begin_in_the_folder_of_a_run_without(tiny_model, tmp_path, capsys):
    plain = recipe_in(tmp_path, tiny_model, rounds=None, report=None)
    folder = run(plain, tmp_path / "out")
    policy = (folder / f"policy/{WEIGHTS}").read_bytes()
    capsys.readouterr()
    run(recipe_in(tmp_path, tiny_model, report=None), tmp_path / "out", resume=True)
    said = "".join(capsys.readouterr())
    assert "rl: the same as that of out" in said and said.count("Training the policy") <= 1
    assert (folder.round(1) / f"policy/{WEIGHTS}").read_bytes() == policy
    assert (folder / f"policy/{WEIGHTS}").read_bytes() == (folder.round(2) / f"policy/{WEIGHTS}").read_bytes() != policy
    assert not (folder / "sft").exists() and (folder.round(1) / "sft").exists()
    assert rounds_part(read_run(folder.path))["rows"]
    run(plain, tmp_path / "out", resume=True)
    assert (folder / f"policy/{WEIGHTS}").read_bytes() == policy and rounds_part(read_run(folder.path)) is None


def test_a_stage_of_one_round_runs_alone(finished, tiny_model, tmp_path, monkeypatch, capsys):
    _, folder = finished
    shutil.copytree(folder.path, tmp_path / "out")
    recipe_in(tmp_path, tiny_model)
    command = ("run", tmp_path / "recipe.yaml", "--output", tmp_path / "out", "--only")
    code, said = run_cli(monkeypatch, capsys, *command, "1/evaluate")
    assert code == 0, said
    assert RunFolder(tmp_path / "out").round(1).results_of("evaluate")["sets"]["test"]["prompts"] == 4
    code, said = run_cli(monkeypatch, capsys, *command, "2/rl")
    assert code == 0 and "rl: done in" in said and "Round 1" not in said
    last, own = (RunFolder(path) for path in (tmp_path / "out" / "rounds" / "2", tmp_path / "out"))
    assert last.results_of("rl")["seconds"] != own.results_of("rl")["seconds"]
    code, said = run_cli(monkeypatch, capsys, *command[:-1], "--resume")
    assert code == 0 and last.results_of("rl") == own.results_of("rl")
    code, said = run_cli(monkeypatch, capsys, *command, "label")
    assert code == 2 and "2 rounds" in said and "--only 2/label" in said
    shutil.rmtree(tmp_path / "out" / "rounds" / "2")
    code, said = run_cli(monkeypatch, capsys, *command, "evaluate")
    assert code == 2 and "'evaluate' depends on 'sample'" in said


def test_another_run_goes_on_from_the_last_round(finished, tiny_model, tmp_path):
    """``rounds.previous`` may be a run with rounds: the chain then starts at its first round."""
    _, folder = finished
    rounds = {"previous": str(folder.path), "earlier": 1.0}
    recipe = recipe_in(tmp_path, tiny_model, rounds=rounds, sft=None, evaluate=None, report=None)
    context = Context(recipe, RunFolder(tmp_path / "next"), installed_plugins())
    assert [run.path for run in context.previous] == [folder.round(2).path, folder.round(1).path]
    assert context.start == folder.round(2) / "policy" and context.initial == folder.round(1) / "sft"
    after = run(recipe, tmp_path / "next")
    assert after.results_of("reward")["earlier_pairs"] == 14
    (tmp_path / "other").mkdir()
    other = recipe_in(tmp_path, tiny_model, rounds=rounds, judge={}, label={"judge": "taught"})
    with pytest.raises(UserError, match="'judge' continues from the previous run"):
        run(other, tmp_path / "other")


def test_online_dpo_labels_what_each_round_samples(tiny_model, tmp_path):
    """Guo et al. 2024, with rounds instead of steps."""
    rl = {"algorithm": "dpo", "kl_coef": 0.1, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    recipe = recipe_in(tmp_path, tiny_model, sft=None, reward=None, rl=rl, rounds={"number": 3}, report=None)
    folder = run(recipe, tmp_path / "out")
    policies = [load_file(folder.round(number) / "policy" / WEIGHTS) for number in (1, 2, 3)]
    assert len({torch.cat([v.flatten() for v in each.values()]).norm().item() for each in policies}) == 3
    rows = folder.results()["rounds"]["rows"]
    assert [row["implicit_last"] is not None for row in rows] == [True] * 3
    first = [row for row in read_lines(folder.round(2) / "metrics.jsonl") if row["stage"] == "rl"][0]
    assert first["rewards/margins"] != 0  # relative to the base, from which the policy has moved
    moved = recipe_in(tmp_path, tiny_model, sft=None, reward=None, rl=rl, report=None, evaluate=None,
                      rounds={"number": 2, "reference": "previous"})  # fmt: skip
    again = run(moved, tmp_path / "moved")
    first = [row for row in read_lines(again.round(2) / "metrics.jsonl") if row["stage"] == "rl"][0]
    assert first["rewards/margins"] == 0


def test_variants_may_differ_in_rounds(tiny_model, tmp_path, capsys):
    """Work shared by a variant and the first round of another is done once."""
    path = write_recipe(tmp_path, tiny_model, rl=RL)
    written = yaml.safe_load(path.read_text()) | {"compare": ["once", {"twice": {"rounds": 2}}]}
    path.write_text(yaml.safe_dump(written))
    recipe = parse_recipe(path, registry=installed_plugins().registry)
    folder = run_comparison(recipe, installed_plugins(), tmp_path / "out")
    said = "".join(capsys.readouterr())
    assert all(f"{stage}: the same as that of once" in said for stage in ("sample", "label", "reward", "rl"))
    once, twice = (RunFolder(folder / "variants" / name) for name in ("once", "twice"))
    assert (once / f"policy/{WEIGHTS}").read_bytes() == (twice.round(1) / f"policy/{WEIGHTS}").read_bytes()
    found = folder.results()["compare"]["variants"]
    assert found["twice"]["kl"] == twice.round(2).results_of("rl")["kl_last"] != found["once"]["kl"]
    assert found["twice"]["seconds"] > found["once"]["seconds"]
    run_comparison(recipe, installed_plugins(), tmp_path / "out", resume=True, confirm=lambda _: False)


def test_later_rounds_ask_the_judge_that_the_first_one_taught(tiny_model, tmp_path):
    judge = {"evaluations": 1, "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    sections = {"sft": None, "judge": judge, "label": {"judge": "taught"}, "evaluate": {"judge": "taught"}}
    recipe = recipe_in(tmp_path, tiny_model, **sections, report=None)
    folder = run(recipe, tmp_path / "out")
    first, second = folder.round(1), folder.round(2)
    assert first.results_of("judge") and not second.results_of("judge") and not folder.results_of("judge")
    contexts = [context_of(recipe, folder, number) for number in (1, 2)]
    untaught = {label_key(context, label_tasks(context.recipe)[0]).key for context in contexts}
    assert [context.judges.taught_adapter for context in contexts] == [None, None] and len(untaught) == 1
    first.add_results("judge", first.results_of("judge") | {"used": True})  # as if it had learned something
    shutil.copytree(first / "policy", first / "judge")
    assert [context.judges.taught_adapter for context in contexts] == [first / "judge"] * 2
    taught = {label_key(context, label_tasks(context.recipe)[0]).key for context in contexts}
    assert len(taught) == 1 and not taught & untaught
    first.add_results("judge", first.results_of("judge") | {"used": False})
    changed = recipe_in(tmp_path, tiny_model, **sections | {"judge": judge | {"max_contrasts": 8}}, report=None)
    with pytest.raises(UserError, match="label: sample is redone; the previous run's judge is redone"):
        run(changed, tmp_path / "out", resume=True, confirm=lambda _: False)
