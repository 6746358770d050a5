"""`python scripts/train_sft.py --help` says what it does.

After an installation it is `rlhf-gym sft`. Its code is in
agents/cli/train_sft.py.
"""

from agents.cli.train_sft import cli

if __name__ == "__main__":
    cli()
