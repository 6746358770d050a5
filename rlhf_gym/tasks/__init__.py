"""The tasks behind the registered environment ids, one file each."""
