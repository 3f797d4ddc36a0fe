"""A reward model that learns from a judge's probabilities instead of its decisions.

python examples/reward_soft_labels.py --model Qwen/Qwen2.5-0.5B-Instruct --judge Qwen/Qwen2.5-7B-Instruct
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rlaif_distilled import DistilledLabeler

from trl_rlaif import JudgePrompt, LocalJudge, Pair, RewardConfig, RewardTrainer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="What the reward model is trained from.")
parser.add_argument("--judge", default="Qwen/Qwen2.5-7B-Instruct", help="Says which of two responses is better.")
parser.add_argument("--output", default="reward-soft-labels")
parser.add_argument("--max-steps", type=int, default=100)
args = parser.parse_args()

judge_model = AutoModelForCausalLM.from_pretrained(args.judge, dtype="auto", device_map="auto").eval()
prompt = JudgePrompt.load(RECIPES / "prompts" / "general")
judge = LocalJudge(judge_model, AutoTokenizer.from_pretrained(args.judge), prompt, args.judge)

lines = (RECIPES / "data" / "judged_pairs.jsonl").read_text(encoding="utf-8").splitlines()
pairs = {row["id"]: Pair(**row) for row in map(json.loads, lines)}

rows = []
for label in DistilledLabeler(debias="mean_logit").label([*pairs.values()], judge):
    if not label.skipped:
        pair = pairs[label.id]
        question = [{"role": "user", "content": pair.prompt}]
        first, second = ([{"role": "assistant", "content": text}] for text in pair.responses)
        # Soft labels need no order: the loss is -[p log s + (1 - p) log(1 - s)], s = sigmoid(r(chosen) - r(rejected)).
        rows.append({"prompt": question, "chosen": first, "rejected": second, "p": label.p})

trainer = RewardTrainer(
    args.model,
    args=RewardConfig(args.output, max_steps=args.max_steps, learning_rate=1e-4, logging_steps=1),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()
trainer.save_model(args.output)  # load_reward_model(args.output) loads adapter, head and base as one
