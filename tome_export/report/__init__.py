"""One self-contained HTML page on an artifact."""
