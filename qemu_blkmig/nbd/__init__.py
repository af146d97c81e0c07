"""Reading NBD exports with libnbd."""
