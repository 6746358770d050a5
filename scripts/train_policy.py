"""`python scripts/train_policy.py` is `rlhf-gym policy` in a checkout.

--help shows its options. The code is in agents/cli/train_policy.py.
"""

from agents.cli.train_policy import cli

if __name__ == "__main__":
    cli()
