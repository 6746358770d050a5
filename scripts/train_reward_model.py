"""`python scripts/train_reward_model.py` is `rlhf-gym reward-model` in a checkout.

--help shows its options. The code is in agents/cli/train_reward_model.py.
"""

from agents.cli.train_reward_model import cli

if __name__ == "__main__":
    cli()
