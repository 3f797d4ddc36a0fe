"""RLOO and GRPO: TRL's own trainers with PPO's rewards, transforms, selectors, rehearsal and checkpoints."""

from trl_rlaif.compat.trl_version import check_trl

check_trl()  # here, since this comes before any import of TRL in this package
