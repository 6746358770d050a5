"""`python scripts/rlhf.py` is `rlhf-gym run` in a checkout.

--help shows its options. The code is in agents/cli/rlhf.py.
"""

from agents.cli.rlhf import cli

if __name__ == "__main__":
    cli()
