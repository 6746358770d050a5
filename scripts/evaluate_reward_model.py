"""`python scripts/evaluate_reward_model.py --help` says what it does.

Its options and its code are in agents/cli/evaluate_reward_model.py.
"""

from agents.cli.evaluate_reward_model import cli

if __name__ == "__main__":
    cli()
