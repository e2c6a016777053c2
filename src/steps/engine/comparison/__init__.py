"""Training runs that differ in one thing, and what they come to: pure, and free of torch.

`variants` makes runs of a common configuration, `running` has them done, each once, `results` reads what they left,
`table`, `plots` and `page` show it. Who starts a run is the caller's business.
"""
