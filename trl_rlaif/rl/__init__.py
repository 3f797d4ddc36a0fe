"""Reinforcement learning: PPO, GRPO, RLOO and rejection sampling on one set of rewards, selectors and rehearsal."""
