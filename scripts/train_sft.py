"""`python scripts/train_sft.py --help` says what it does.

Its options and its code are in agents/cli/train_sft.py.
"""

from agents.cli.train_sft import cli

if __name__ == "__main__":
    cli()
