"""`python scripts/evaluate.py --help` says what it does.

Its options and its code are in agents/cli/evaluate.py.
"""

from agents.cli.evaluate import cli

if __name__ == "__main__":
    cli()
