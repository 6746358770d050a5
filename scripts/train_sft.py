"""`python scripts/train_sft.py` is `rlhf-gym sft` in a checkout.

--help shows its options. The code is in agents/cli/train_sft.py.
"""

from agents.cli.train_sft import cli

if __name__ == "__main__":
    cli()
