"""Makes what documents the commands from their argparse parsers: man pages, reference, completion. Not installed."""
