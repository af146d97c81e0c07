"""The block-migration engine: pure, everything from outside comes through `ports`."""
