"""`python scripts/convert_preferences.py --help` says what it does.

After an installation it is `rlhf-gym convert`. Its code is in
agents/cli/convert_preferences.py.
"""

from agents.cli.convert_preferences import cli

if __name__ == "__main__":
    cli()
