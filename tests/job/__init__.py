"""Tests of the job: record, watchdog, options, settling."""
