"""`python scripts/compare.py` is `rlhf-gym compare` in a checkout.

--help shows its options. The code is in agents/cli/compare.py.
"""

from agents.cli.compare import cli

if __name__ == "__main__":
    cli()
