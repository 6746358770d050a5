"""`python scripts/doctor.py --help` says what it does.

Its options and its code are in agents/cli/doctor.py.
"""

from agents.cli.doctor import cli

if __name__ == "__main__":
    cli()
