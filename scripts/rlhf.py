"""`python scripts/rlhf.py --help` says what it does.

Its options and its code are in agents/cli/rlhf.py.
"""

from agents.cli.rlhf import cli

if __name__ == "__main__":
    cli()
