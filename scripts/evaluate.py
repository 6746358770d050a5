"""`python scripts/evaluate.py --help` says what it does.

After an installation it is `rlhf-gym evaluate`. Its code is in
agents/cli/evaluate.py.
"""

from agents.cli.evaluate import cli

if __name__ == "__main__":
    cli()
