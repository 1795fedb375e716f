"""
A batch job in a script of your own: python embed_in_script.py [FOLDER [BACKEND]]

By hand such a script ends with code 0 although files failed, or stops at the first, or hangs at the end.
Here the report says what became of each file; nothing is written, drawn or configured that the script
doesn't ask for.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from jobq import JobsFailed, Pipeline

pipeline = Pipeline("embed_in_script")


@pipeline.producer
def files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.rglob("*.md"))


@pipeline.consumer(workers=2)
def count(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").split())


def main(folder: str = ".", backend: str = "joinable") -> None:
    try:
        report = pipeline.run(folder=folder, backend=backend, collect=True)
    except JobsFailed as failed:
        for letter in failed.report.dead:
            print(f"{letter.item}: {letter.error}: {letter.message}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{len(report.results)} files, {sum(report.results)} words, {report.seconds:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
