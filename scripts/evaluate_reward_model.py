"""`python scripts/evaluate_reward_model.py` is `rlhf-gym evaluate-reward-model` in a checkout.

--help shows its options. The code is in agents/cli/evaluate_reward_model.py.
"""

from agents.cli.evaluate_reward_model import cli

if __name__ == "__main__":
    cli()
