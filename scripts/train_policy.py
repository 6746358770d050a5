"""`python scripts/train_policy.py --help` says what it does.

After an installation it is `rlhf-gym policy`. Its code is in
agents/cli/train_policy.py.
"""

from agents.cli.train_policy import cli

if __name__ == "__main__":
    cli()
