"""The tasks of the registered environment ids, one file each."""
