"""What happened to the requests: latency summaries, SLO attainment, tables. Pure."""
