"""GRPO in TRL's own trainer, rewarded by a judge's rating of each response.

python examples/grpo_judge.py --model Qwen/Qwen2.5-0.5B-Instruct --judge Qwen/Qwen2.5-7B-Instruct
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl_rlaif_direct import DirectLabeler

from trl_rlaif import JudgePrompt, LocalJudge

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="The policy.")
parser.add_argument("--judge", default="Qwen/Qwen2.5-7B-Instruct", help="Rates its responses.")
parser.add_argument("--output", default="grpo-judge")
parser.add_argument("--max-steps", type=int, default=100)
args = parser.parse_args()

# The reward is the mean of the judge's distribution over the ratings 1 to 10, scaled to [-1, 1]; it generates no text.
judge_model = AutoModelForCausalLM.from_pretrained(args.judge, dtype="auto", device_map="auto").eval()
prompt = JudgePrompt.load(RECIPES / "prompts" / "general")
judge = LocalJudge(judge_model, AutoTokenizer.from_pretrained(args.judge), prompt, args.judge)

lines = (RECIPES / "data" / "quickstart_prompts.jsonl").read_text(encoding="utf-8").splitlines()
questions = [json.loads(line)["prompt"] for line in lines]

trainer = GRPOTrainer(
    args.model,
    reward_funcs=DirectLabeler(judge),
    args=GRPOConfig(
        args.output,
        max_steps=args.max_steps,
        num_generations=4,
        max_completion_length=64,
        beta=0.02,
        learning_rate=1e-4,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
    ),
    train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in questions]}),
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()
trainer.save_model(args.output)
