"""From any file, folder or dataset name to rows, prompts and token ids."""
