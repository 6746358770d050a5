"""`python scripts/doctor.py` is `rlhf-gym doctor` in a checkout.

--help shows its options. The code is in agents/cli/doctor.py.
"""

from agents.cli.doctor import cli

if __name__ == "__main__":
    cli()
