"""jobq: typed producers and consumers on multiprocessing queues; nothing lost, nothing hangs."""
