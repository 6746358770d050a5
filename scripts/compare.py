"""`python scripts/compare.py --help` says what it does.

Its options and its code are in agents/cli/compare.py.
"""

from agents.cli.compare import cli

if __name__ == "__main__":
    cli()
