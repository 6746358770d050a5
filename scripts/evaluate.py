"""`python scripts/evaluate.py` is `rlhf-gym evaluate` in a checkout.

--help shows its options. The code is in agents/cli/evaluate.py.
"""

from agents.cli.evaluate import cli

if __name__ == "__main__":
    cli()
