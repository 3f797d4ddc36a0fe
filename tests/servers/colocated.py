"""Training with vLLM's engine in the same process: python colocated.py ALGORITHM FOLDER prints its samples as JSON.

ALGORITHM is ppo, grpo, rloo, or ppo-adapter (vllm_sync: adapter). For every sampled batch, it prints the largest
difference between the engine's log-probabilities of the tokens and the policy's own, and the first response. If FOLDER
contains the checkpoint of the first step, training resumes from it.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from helpers.rewards import length_penalty
from helpers.tiny import make_llama, make_tokenizer
from peft import LoraConfig
from trl import GRPOConfig, RLOOConfig
from trl.generation.vllm_generation import VLLMGeneration

from trl_rlaif import PPOConfig, PPOTrainer
from trl_rlaif.models.loading import ModelSpec, load_model
from trl_rlaif.rl.grpo_rloo.trainer import TRAINERS

# The settings that all trainers share.
COMMON = {
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "temperature": 1.0, "bf16": False, "report_to": "none",
    "save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": False, "disable_tqdm": True,
    "vllm_max_model_length": 64,
}  # fmt: skip
CONFIGS = {"grpo": GRPOConfig, "rloo": RLOOConfig}


def make_trainer(algorithm, folder):
    tokenizer = make_tokenizer()
    # On a CPU, the engine needs a head size of 32.
    if not (folder / "base").exists():
        make_llama(len(tokenizer), hidden_size=128).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    model = load_model(ModelSpec(str(folder / "base"), "float32"))
    dataset = Dataset.from_dict({"prompt": [f"what is the {'quick ' * i}fox?" for i in range(8)]})
    lora = LoraConfig(r=4, target_modules="all-linear")
    if algorithm.startswith("ppo"):
        sync = {"vllm_sync": "adapter"} if algorithm == "ppo-adapter" else {}
        options = sync | {"total_episodes": 12, "response_length": 8, "stop_token": "eos", "num_sample_generations": 0}
        config = PPOConfig(str(folder / "run"), generation="vllm", **COMMON, **options)
        return PPOTrainer(
            config, tokenizer, model, train_dataset=dataset, reward_funcs=[length_penalty], peft_config=lora
        )
    config = CONFIGS[algorithm](
        str(folder / "run"), use_vllm=True, vllm_mode="colocate", num_generations=4, max_steps=3,
        max_completion_length=8, use_cpu=True, **COMMON,
    )  # fmt: skip
    return TRAINERS[type(config)](
        model=model,
        args=config,
        reward_funcs=[lambda completions, **_: [-float(len(text)) for text in completions]],
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )


@torch.no_grad()
def furthest(policy, prompts, responses, logprobs):
    """The largest difference between the engine's log-probabilities and the policy's, in nats."""
    worst, training = 0.0, policy.training
    policy.eval()
    for prompt, response, given in zip(prompts, responses, logprobs, strict=True):
        logits = policy(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(list(response))]
        worst = max(worst, (own - torch.tensor([one[0] for one in given])).abs().max().item())
    policy.train(training)
    return worst


def compare_draws(trainer, draws):
    """Make the engine return the log-probabilities of its samples, and record their difference from the policy's."""
    sampler = trainer.generator._vllm
    make_params, start = sampler._params, sampler._start_with

    def params(*arguments):
        found = make_params(*arguments)
        found.logprobs = 0
        return found

    def started(*arguments):
        llm = start(*arguments)
        generate = llm.generate

        def compared(prompts, *rest, **named):
            outputs = generate(prompts, *rest, **named)
            responses = [list(output.outputs[0].token_ids) for output in outputs]
            rows = [
                [[step[token].logprob] for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
                for output, tokens in zip(outputs, responses, strict=True)
            ]
            with trainer.shared.role("policy"):
                asked = [prompt["prompt_token_ids"] for prompt in prompts]
                far = furthest(trainer.shared.model, asked, responses, rows)
            draws.append([far, responses[0]])
            return outputs

        llm.generate = compared
        return llm

    sampler._params, sampler._start_with = params, started


def main():
    algorithm, folder = sys.argv[1], Path(sys.argv[2])
    trainer = make_trainer(algorithm, folder)
    policy = trainer.shared.model if algorithm.startswith("ppo") else trainer.model
    draws, generate = [], VLLMGeneration.generate
    if algorithm == "ppo-adapter":
        compare_draws(trainer, draws)

    def compared(self, *arguments, **named):
        self.logprobs = 0
        prompts, responses, logprobs, *rest = generate(self, *arguments, **named)
        draws.append([furthest(policy, prompts, responses, logprobs), [int(token) for token in responses[0]]])
        return prompts, responses, logprobs, *rest

    VLLMGeneration.generate = compared
    checkpoint = folder / "run" / "checkpoint-1"
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint.exists() else None)
    print("drew", json.dumps(draws), flush=True)


if __name__ == "__main__":
    main()
