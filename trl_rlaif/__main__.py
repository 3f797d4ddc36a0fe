"""Entry point of ``python -m trl_rlaif`` and ``accelerate launch -m trl_rlaif``."""

from trl_rlaif.cli import main

if __name__ == "__main__":
    main()
