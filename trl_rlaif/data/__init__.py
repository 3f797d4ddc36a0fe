"""Reading prompts and response pairs from files, folders and the Hub into checked records."""

from trl_rlaif.data.loading import PairFormat, load_pairs, load_prompts, load_rows
from trl_rlaif.data.records import Loaded, Message, Pair, Prompt, Skip

__all__ = ["Loaded", "Message", "Pair", "PairFormat", "Prompt", "Skip", "load_pairs", "load_prompts", "load_rows"]
