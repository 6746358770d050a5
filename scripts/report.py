"""`python scripts/report.py --help` says what it does.

Its options and its code are in agents/cli/report.py.
"""

from agents.cli.report import cli

if __name__ == "__main__":
    cli()
