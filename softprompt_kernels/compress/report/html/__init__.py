"""report.html: one page about a run that needs no network."""
