"""`python scripts/convert_preferences.py` is `rlhf-gym convert` in a checkout.

--help shows its options. The code is in agents/cli/convert_preferences.py.
"""

from agents.cli.convert_preferences import cli

if __name__ == "__main__":
    cli()
