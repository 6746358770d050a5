"""From any file, folder or dataset name to rows and prompts."""
