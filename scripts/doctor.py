"""`python scripts/doctor.py --help` says what it does.

After an installation it is `rlhf-gym doctor`. Its code is in
agents/cli/doctor.py.
"""

from agents.cli.doctor import cli

if __name__ == "__main__":
    cli()
