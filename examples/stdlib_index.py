"""Index Python's own standard library in SQLite: jobq run examples/stdlib_index.py -p database=index.db"""

import ast
import sqlite3
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

from jobq import Pipeline, Skip

DATABASE = "stdlib_index.db"
KINDS: dict[type[ast.AST], str] = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "function",
}
pipeline = Pipeline("stdlib_index")


@dataclass(frozen=True)
class Definition:
    path: str
    line: int
    kind: str
    name: str


@pipeline.producer
def walk(root: Path | None = None, limit: int | None = None, database: str = DATABASE) -> Iterator[Path]:
    """Empty the index, then give the Python files below *root* (the standard library), *limit* at most."""
    root = root or Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise NotADirectoryError(f"root={root} is no folder; give one that holds Python files")
    with closing(sqlite3.connect(database)) as index:
        index.execute("DROP TABLE IF EXISTS definition")
        index.execute("CREATE TABLE definition (path, line, kind, name, UNIQUE (path, line, kind, name))")
    installed = {"site-packages", "dist-packages"}
    files = (path for path in root.rglob("*.py") if installed.isdisjoint(path.relative_to(root).parts))
    yield from islice(files, limit)


@pipeline.consumer(workers=4)
def parse(file: Path) -> Iterator[Definition]:
    """Give the file's definitions; filter what is no Python (the library's own tests hold such files)."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Skip(f"{file}: {error}") from error
    path, module = (str(text).encode(errors="backslashreplace").decode() for text in (file, file.stem))
    for node in ast.walk(tree):
        if kind := KINDS.get(type(node)):
            yield Definition(path, getattr(node, "lineno", 1), kind, getattr(node, "name", module))


@pipeline.consumer(batch=500)
def store(definitions: list[Definition], db: sqlite3.Connection) -> None:
    """Add the definitions to the index; those of a job that ran again are there already."""
    with db:
        db.executemany("INSERT OR IGNORE INTO definition VALUES (?, ?, ?, ?)", map(astuple, definitions))


@pipeline.resource
def db(database: str = DATABASE) -> Iterator[sqlite3.Connection]:
    """Open the index for the one worker that writes; print its totals when all is stored."""
    with closing(sqlite3.connect(database)) as connection:
        yield connection
        for kind, count in connection.execute("SELECT kind, count(*) FROM definition GROUP BY kind"):
            print(f"{count:>8} {kind}")


if __name__ == "__main__":
    pipeline.run()
