"""A job's report: one page of HTML that needs nothing else, made from its journal; also served while the job runs."""
