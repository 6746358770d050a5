"""`python scripts/report.py` is `rlhf-gym report` in a checkout.

--help shows its options. The code is in agents/cli/report.py.
"""

from agents.cli.report import cli

if __name__ == "__main__":
    cli()
