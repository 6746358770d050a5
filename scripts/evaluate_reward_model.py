"""`python scripts/evaluate_reward_model.py --help` says what it does.

After an installation it is `rlhf-gym evaluate-reward-model`. Its code is in
agents/cli/evaluate_reward_model.py.
"""

from agents.cli.evaluate_reward_model import cli

if __name__ == "__main__":
    cli()
