"""`python scripts/rlhf.py --help` says what it does.

After an installation it is `rlhf-gym run`. Its code is in
agents/cli/rlhf.py.
"""

from agents.cli.rlhf import cli

if __name__ == "__main__":
    cli()
