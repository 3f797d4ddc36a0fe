"""RLOO and GRPO: TRL's own trainers, with rewards, transforms, selectors, rehearsal and checkpoints as PPO has them."""
