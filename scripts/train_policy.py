"""`python scripts/train_policy.py --help` says what it does.

Its options and its code are in agents/cli/train_policy.py.
"""

from agents.cli.train_policy import cli

if __name__ == "__main__":
    cli()
