"""`python scripts/convert_preferences.py --help` says what it does.

Its options and its code are in agents/cli/convert_preferences.py.
"""

from agents.cli.convert_preferences import cli

if __name__ == "__main__":
    cli()
