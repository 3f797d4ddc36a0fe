"""PPO rewarded by a rubric: the weighted fraction of its prompt's criteria that a response meets.

python examples/ppo_rubric.py --model Qwen/Qwen2.5-0.5B-Instruct --judge Qwen/Qwen2.5-7B-Instruct
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_rlaif_rubric import RubricLabeler

from trl_rlaif import JudgePrompt, LocalJudge, PPOConfig, PPOTrainer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="Policy, reference and value.")
parser.add_argument("--judge", default="Qwen/Qwen2.5-7B-Instruct", help="Says which criteria a response meets.")
parser.add_argument("--output", default="ppo-rubric")
parser.add_argument("--episodes", type=int, default=1024)
args = parser.parse_args()

judge_model = AutoModelForCausalLM.from_pretrained(args.judge, dtype="auto", device_map="auto").eval()
prompt = JudgePrompt.load(RECIPES / "prompts" / "general")
judge = LocalJudge(judge_model, AutoTokenizer.from_pretrained(args.judge), prompt, args.judge)

lines = (RECIPES / "data" / "rubric_prompts.jsonl").read_text(encoding="utf-8").splitlines()
rows = [{key: row[key] for key in ("prompt", "rubric")} for row in map(json.loads, lines)]

trainer = PPOTrainer(
    PPOConfig(
        args.output,
        total_episodes=args.episodes,
        per_device_train_batch_size=8,
        response_length=64,
        stop_token="eos",
        missing_eos_penalty=0.2,
        learning_rate=1e-4,
        kl_coef=0.05,
        value="trunk",
        logging_steps=1,
    ),
    None,  # the tokenizer comes with the model
    args.model,
    train_dataset=Dataset.from_list(rows),  # the labeler reads the column rubric
    reward_funcs=RubricLabeler(judge, shared=[{"criterion": "repeats itself", "weight": -1}]),
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()
trainer.save_model(args.output)
