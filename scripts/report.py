"""`python scripts/report.py --help` says what it does.

After an installation it is `rlhf-gym report`. Its code is in
agents/cli/report.py.
"""

from agents.cli.report import cli

if __name__ == "__main__":
    cli()
