"""`python scripts/train_reward_model.py --help` says what it does.

After an installation it is `rlhf-gym reward-model`. Its code is in
agents/cli/train_reward_model.py.
"""

from agents.cli.train_reward_model import cli

if __name__ == "__main__":
    cli()
