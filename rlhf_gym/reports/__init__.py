"""Reports: self-contained HTML pages and terminal tables."""
