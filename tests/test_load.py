"""A target names a pipeline; what it names is loaded under one name, and what it lacks is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jobq
from jobq import Pipeline
from jobq.backend import Preload
from jobq.errors import PipelineError
from jobq.load import is_loading, load_preload, load_target

ONE = 'from jobq import Pipeline\npipeline = Pipeline("zoo")\n'


@pytest.fixture(autouse=True)
def interpreter_left_as_it_was() -> Iterator[None]:
    modules, path = set(sys.modules), sys.path[:]
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith("jobq."):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problem(target: str) -> str:
    with pytest.raises(PipelineError) as caught:
        load_target(target)
    return str(caught.value)


def test_a_file_is_loaded_under_its_stem_and_its_folder_comes_first(here: Path) -> None:
    (here / "zoo_one.py").write_text(ONE)

    loaded = load_target("zoo_one.py")

    assert isinstance(loaded.pipeline, Pipeline)
    assert loaded.pipeline.name == "zoo"
    assert loaded.preload == Preload(str(here / "zoo_one.py"), "zoo_one", str(here))
    assert loaded.target == "zoo_one.py"
    assert sys.path[0] == str(here)
    assert sys.modules["zoo_one"].pipeline is loaded.pipeline


@pytest.mark.parametrize("file", ["json.py", "pytest.py", "my-zoo.py", "class.py", "2nd.py", "jobq.py"])
def test_a_stem_that_is_taken_or_is_no_name_gets_a_prefix(here: Path, file: str) -> None:
    (here / file).write_text(ONE)

    loaded = load_target(file)

    stem = file.removesuffix(".py").replace("-", "_")
    assert loaded.preload is not None
    assert loaded.preload.module == f"jobq_pipeline_{stem}"
    assert loaded.pipeline.name == "zoo"


def test_a_file_that_is_loaded_twice_is_one_module(here: Path) -> None:
    (here / "zoo_twice.py").write_text(ONE)

    assert load_target("zoo_twice.py").pipeline is load_target(f"{here}/zoo_twice.py").pipeline


def test_two_files_of_one_stem_are_two_modules(here: Path) -> None:
    for folder in "ab":
        (here / folder).mkdir()
        (here / folder / "zoo_same.py").write_text(ONE.replace("zoo", folder))

    loaded = [load_target(f"{folder}/zoo_same.py") for folder in "ab"]

    assert [one.pipeline.name for one in loaded] == ["a", "b"]
    assert len({one.preload.module for one in loaded if one.preload}) == 2


def test_a_file_that_changes_within_a_second_is_never_stale(here: Path) -> None:
    for name in "zoo", "bar":
        (here / "zoo_new.py").write_text(ONE.replace("zoo", name))
        sys.modules.pop("zoo_new", None)

        assert load_target("zoo_new.py").pipeline.name == name


def test_a_neighbour_can_be_imported_and_can_import_the_file_by_its_name(here: Path) -> None:
    (here / "zoo_main.py").write_text("from zoo_side import back\n" + ONE)
    (here / "zoo_side.py").write_text("import zoo_main\nback = zoo_main\n")

    load_target("zoo_main.py")

    assert sys.modules["zoo_main"].back is sys.modules["zoo_main"]


def test_a_variable_is_chosen_by_name(here: Path) -> None:
    (here / "zoo_two.py").write_text(ONE + 'other = Pipeline("other")\n')

    assert load_target("zoo_two.py:other").pipeline.name == "other"


def test_a_module_is_found_from_the_current_folder(here: Path) -> None:
    (here / "zoo_package").mkdir()
    (here / "zoo_package" / "__init__.py").touch()
    (here / "zoo_package" / "names.py").write_text("name = 'relative'\n")
    (here / "zoo_package" / "lines.py").write_text(
        "from .names import name\nfrom jobq import Pipeline\npipeline = Pipeline(name)\n"
    )

    assert load_target("zoo_package.lines:pipeline").pipeline.name == "relative"


def test_one_pipeline_under_two_names_is_one(here: Path) -> None:
    (here / "zoo_alias.py").write_text(ONE + "app = pipeline\n")

    assert load_target("zoo_alias.py").pipeline.name == "zoo"


def test_two_pipelines_are_named_and_none_is_said(here: Path) -> None:
    (here / "zoo_two.py").write_text(ONE + 'other = Pipeline("other")\n')
    (here / "zoo_none.py").write_text("pipeline = 'crawl'\n")

    assert "2 pipelines: pipeline, other" in problem("zoo_two.py")
    assert "zoo_two.py:pipeline" in problem("zoo_two.py")
    assert "no Pipeline among its variables" in problem("zoo_none.py")
    assert "pipeline in zoo_none.py is a str, not a Pipeline" in problem("zoo_none.py:pipeline")
    assert "zoo_two.py has no variable third" in problem("zoo_two.py:third")
    assert "Its pipelines: other, pipeline." in problem("zoo_two.py:third")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere.py", "nowhere.py does not exist"),
        ("no/where.py:pipeline", "no/where.py does not exist"),
        ("folder.py", "folder.py is a folder"),
        ("zoo_nowhere:pipeline", "No module named 'zoo_nowhere'"),
        ("a b.py:no name", "not understood"),
        (":pipeline", "not understood"),
        ("", "not understood"),
        ("no module", "not understood"),
        ("zoo..lines:pipeline", "not understood"),
        (".", "is a folder"),
        ("..:pipeline", "is a folder"),
        ("no.such.mod:pipeline", "No module named 'no'"),
        ("email.nothing:pipeline", "No module named 'email.nothing'"),
        ("json.decoder.nothing:pipeline", "'json.decoder' is not a package"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_a_target_that_is_not_there_is_named(here: Path, target: str, said: str) -> None:
    (here / "folder.py").mkdir()

    told = problem(target)

    assert said in told
    assert "Traceback" not in told


def test_a_module_that_imports_what_is_missing_is_told_with_the_place(here: Path) -> None:
    (here / "zoo_lacks.py").write_text("import zoo_nowhere\n")

    told = problem("zoo_lacks:pipeline")

    assert 'zoo_lacks.py", line 1' in told
    assert "No module named 'zoo_nowhere'" in told


@pytest.mark.parametrize("file", ["json.py", "json/__init__.py"])
def test_a_folder_that_would_hide_what_we_need_comes_behind_the_standard_library(
    here: Path, file: str
) -> None:
    (here / file).parent.mkdir(exist_ok=True)
    (here / file).write_text("raise RuntimeError\n")
    (here / "zoo_hides.py").write_text(ONE)

    load_target("zoo_hides.py")

    library = str(Path(os.__file__).parent)
    assert sys.path.index(library) < sys.path.index(str(here))
    assert sys.path.count(library) == sys.path.count(str(here)) == 1
    others = [entry for entry in sys.path if "site-packages" in entry]
    assert all(sys.path.index(str(here)) < sys.path.index(other) for other in others)


def test_a_folder_that_hides_what_nobody_needs_comes_first(here: Path) -> None:
    assert "sndhdr" not in sys.modules
    (here / "sndhdr.py").write_text("colour = 'green'\n")
    (here / "zoo_owns.py").write_text("from sndhdr import colour\n" + ONE)

    load_target("zoo_owns.py")

    assert sys.path[0] == str(here)
    assert sys.modules["sndhdr"].colour == "green"


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("neighbour", ["json", "queue", "types"])
def test_a_pipeline_named_like_the_standard_library_runs_on_every_start_method(
    here: Path, start_method: str, neighbour: str
) -> None:
    (here / "json.py").write_text(
        "from collections.abc import Iterator\n"
        "from jobq import Pipeline\n"
        "import helping\n"
        "pipeline = Pipeline('json')\n"
        "@pipeline.producer\n"
        "def numbers() -> Iterator[int]:\n"
        "    yield from range(3)\n"
        "@pipeline.consumer\n"
        "def twice(number: int) -> int:\n"
        "    return helping.TWO * number\n"
    )
    if neighbour != "json":
        (here / f"{neighbour}.py").write_text("raise RuntimeError('not the one you think')\n")
    (here / "helping.py").write_text("TWO = 2\n")
    command = "from jobq.cli.__main__ import command; command()"  # what the installed script does

    done = subprocess.run(
        [sys.executable, "-P", "-c", command, "run", "json.py", "--start-method", start_method, "-o", "-"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "2", "4"]


def test_the_package_is_light_until_a_name_is_used() -> None:
    code = (
        "import sys, jobq\n"
        "assert not {'pydantic', 'jobq.pipeline', 'multiprocessing'} & set(sys.modules)\n"
        "from jobq import *\n"
        "assert [name for name in jobq.__all__ if name not in globals()] == []\n"
        "assert Pipeline is jobq.Pipeline and 'pydantic' in sys.modules\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_lists_its_public_names_and_has_no_others() -> None:
    assert dir(jobq) == sorted(jobq.__all__)
    with pytest.raises(AttributeError, match="module 'jobq' has no attribute 'Pipelin'"):
        jobq.Pipelin  # type: ignore[attr-defined]  # noqa: B018


def test_an_error_in_the_file_is_told_with_the_users_frames_alone(here: Path) -> None:
    (here / "zoo_broken.py").write_text("import zoo_deeper\n")
    (here / "zoo_deeper.py").write_text("def fail():\n    return {}['no key']\nfail()\n")

    told = problem("zoo_broken.py")

    assert "zoo_broken.py can't be loaded" in told
    assert "zoo_deeper.py" in told
    assert "KeyError: 'no key'" in told
    assert "importlib" not in told
    assert "load.py" not in told
    assert "zoo_broken" not in sys.modules


def test_a_syntax_error_is_told_with_its_line(here: Path) -> None:
    (here / "zoo_syntax.py").write_text("x = 1\ndef f(:\n")

    assert 'zoo_syntax.py", line 2' in problem("zoo_syntax.py")


def test_a_file_that_exits_does_not_exit_us(here: Path) -> None:
    (here / "zoo_exit.py").write_text("raise SystemExit(0)\n")

    assert "SystemExit: 0" in problem("zoo_exit.py")


def test_running_while_the_file_is_loaded_asks_for_a_main_guard(here: Path) -> None:
    (here / "zoo_runs.py").write_text(ONE + "pipeline.run()\n")

    told = problem("zoo_runs.py")

    assert "main guard" in told
    assert "zoo_runs.py:3" in told
    assert not is_loading()


def test_a_child_loads_by_path_under_the_same_name(here: Path) -> None:
    (here / "json.py").write_text(ONE + "class Cat: ...\n")
    loaded = load_target("json.py")
    code = f"""
import sys
from jobq.backend import Preload
from jobq.load import load_preload
load_preload({loaded.preload!r})
module = sys.modules[{loaded.preload and loaded.preload.module!r}]
load_preload({loaded.preload!r})
assert sys.modules[module.__name__] is module, "loaded twice"
print(module.Cat.__module__, module.Cat.__qualname__)
"""

    output = subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True, timeout=60)

    assert output.split() == ["jobq_pipeline_json", "Cat"]


def test_what_is_loaded_already_is_not_loaded_again(here: Path) -> None:
    (here / "zoo_once.py").write_text(ONE)
    loaded = load_target("zoo_once.py")
    (here / "zoo_once.py").write_text("raise RuntimeError('loaded again')\n")

    assert loaded.preload is not None
    load_preload(loaded.preload)

    assert sys.modules["zoo_once"].pipeline is loaded.pipeline
