"""DPO in TRL's own trainer, on pairs that a judge labels in both orders.

python examples/dpo_ai_labels.py --model Qwen/Qwen2.5-0.5B-Instruct --judge Qwen/Qwen2.5-7B-Instruct
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl_rlaif_distilled import DistilledLabeler

from trl_rlaif import JudgePrompt, LocalJudge, Pair

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="The policy.")
parser.add_argument("--judge", default="Qwen/Qwen2.5-7B-Instruct", help="Says which of two responses is better.")
parser.add_argument("--output", default="dpo-ai-labels")
parser.add_argument("--max-steps", type=int, default=100)
parser.add_argument("--min-confidence", type=float, default=0.6, help="Leave out pairs whose label is less sure.")
args = parser.parse_args()

judge_model = AutoModelForCausalLM.from_pretrained(args.judge, dtype="auto", device_map="auto").eval()
prompt = JudgePrompt.load(RECIPES / "prompts" / "general")
judge = LocalJudge(judge_model, AutoTokenizer.from_pretrained(args.judge), prompt, args.judge)

lines = (RECIPES / "data" / "judged_pairs.jsonl").read_text(encoding="utf-8").splitlines()
pairs = {row["id"]: Pair(**row) for row in map(json.loads, lines)}

rows = []
for label in DistilledLabeler(debias="mean_logit").label([*pairs.values()], judge):
    if label.skipped or max(label.p, 1 - label.p) < args.min_confidence:
        continue
    pair = pairs[label.id]
    better, worse = pair.responses if label.p > 0.5 else pair.responses[::-1]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (better, worse))
    rows.append({"prompt": [{"role": "user", "content": pair.prompt}], "chosen": chosen, "rejected": rejected})
print(f"{len(rows)} of {len(pairs)} pairs are sure enough.")

trainer = DPOTrainer(
    args.model,
    args=DPOConfig(
        args.output,
        max_steps=args.max_steps,
        learning_rate=1e-4,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
    ),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()
trainer.save_model(args.output)
