"""`python scripts/train_reward_model.py --help` says what it does.

Its options and its code are in agents/cli/train_reward_model.py.
"""

from agents.cli.train_reward_model import cli

if __name__ == "__main__":
    cli()
