"""Validates what components return: the contract of each kind, and errors that name who broke it."""

from trl_rlaif.validation.blame import ComponentError, ContractViolation, Origin, RewardError, origin_of, tagged
from trl_rlaif.validation.guard import validated
from trl_rlaif.validation.labels import checked_labels
from trl_rlaif.validation.pairs import checked_pairs
from trl_rlaif.validation.scores import check_loss, check_scores
from trl_rlaif.validation.selections import check_num_responses, check_selection

__all__ = [
    "ComponentError",
    "ContractViolation",
    "Origin",
    "RewardError",
    "check_loss",
    "check_num_responses",
    "check_scores",
    "check_selection",
    "checked_labels",
    "checked_pairs",
    "origin_of",
    "tagged",
    "validated",
]
