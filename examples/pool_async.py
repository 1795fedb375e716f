"""
Submit many, collect in order: python pool_async.py [BACKEND]

In the textbook `apply_async(...).get()` waits for ever if the worker was killed or the error can't be
unpickled, and whoever never calls `get()` never hears of an error at all. An `AsyncResult` can't be
cancelled or awaited. Here it is a `concurrent.futures.Future`, and the report counts what nobody asked for.

    ready()       future.done()                  close(), join()   the end of the `with`
    get(timeout)  future.result(timeout)         terminate()       run.stop()
    wait(timeout) future.exception(timeout)      callback=         future.add_done_callback(...)
    successful()  future.exception() is None     initializer=      a resource
"""

import os
import sys
import time

from jobq import Pipeline

pipeline = Pipeline("pool_async")


@pipeline.consumer(workers=3)
def invert(number: int) -> tuple[float, int]:
    time.sleep(0.01)
    return 1 / number, os.getpid()


def main(backend: str = "joinable") -> None:
    with pipeline.open(backend=backend) as run:
        futures = [run.submit(number) for number in range(-2, 7)]
        run.join(timeout=30)  # wait for all; JoinTimeout if they take longer
        print("ready:", all(future.done() for future in futures))
        pids = set()
        for number, future in enumerate(futures, start=-2):
            if error := future.exception():  # the job's own, with the worker's traceback as its cause
                print(f"1 / {number}: {error!r}")
            else:
                result, pid = future.result(timeout=5)
                pids.add(pid)
                print(f"1 / {number}: {result:.2f}")
        print("pids:", *sorted(pids))
    assert run.report is not None
    print("dead letters:", run.report.stages["invert"].dead)


if __name__ == "__main__":
    main(*sys.argv[1:])
