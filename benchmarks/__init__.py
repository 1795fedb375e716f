"""How fast jobq is, beside raw queues, its peers, and what is possible: `python -m benchmarks`."""
