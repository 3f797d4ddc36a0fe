"""Reading prompts and response pairs from files, folders and the Hub into checked records."""

from trl_rlaif.data.finetuning import load_finetuning
from trl_rlaif.data.formats import COLUMNS
from trl_rlaif.data.loading import PairFormat, ScoredPairs, Stream, load_pairs, load_prompts, stream_pairs
from trl_rlaif.types import Loaded, Message, Pair, Prompt, Skip

__all__ = [
    "COLUMNS",
    "Loaded",
    "Message",
    "Pair",
    "PairFormat",
    "Prompt",
    "ScoredPairs",
    "Skip",
    "Stream",
    "load_finetuning",
    "load_pairs",
    "load_prompts",
    "stream_pairs",
]
