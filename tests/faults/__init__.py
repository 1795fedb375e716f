"""
The faults that break multiprocessing pipelines, each with the test that shows what jobq does about it.

`docs/faults.md` is made from the rows here: ``python -m tests.faults`` writes it.
"""
