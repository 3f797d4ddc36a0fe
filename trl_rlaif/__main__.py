"""``python -m trl_rlaif``, which is how ``accelerate launch -m`` starts it."""

from trl_rlaif.cli import main

if __name__ == "__main__":
    main()
