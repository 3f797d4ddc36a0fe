"""Reward models from soft labels."""
