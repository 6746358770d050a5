"""`python scripts/compare.py --help` says what it does.

After an installation it is `rlhf-gym compare`. Its code is in
agents/cli/compare.py.
"""

from agents.cli.compare import cli

if __name__ == "__main__":
    cli()
