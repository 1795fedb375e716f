"""
Thumbnails of a folder of images, on four workers: jobq run examples/thumbnails.py -p folder=photos

The textbook's `pool.map(shrink, paths)` raises for the first file that is no image, and all other results are
gone; one image that brings its worker down (out of memory, a crash in a decoder) hangs it for ever. Here each
becomes a dead letter with its path and error, and the rest is done. Needs Pillow; makes its own images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from jobq import Pipeline

pipeline = Pipeline("thumbnails")


@dataclass(frozen=True)
class Thumbnail:
    file: Path
    width: int
    height: int


@pipeline.producer
def images(folder: Path = Path("thumbnails"), count: int = 20) -> Iterator[Path]:
    """Make images, and a file that is none, in *folder*; give each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = folder / f"image{number:03}.jpg"
        Image.linear_gradient("L").resize((800 + 10 * number, 600)).save(file)
        yield file
    broken = folder / "broken.jpg"
    broken.write_text("no image")
    yield broken


@pipeline.consumer(workers=4)
def shrink(file: Path, size: int = 128) -> Thumbnail:
    """Save the image, at most *size* wide and high, beside the original."""
    with Image.open(file) as image:
        image.thumbnail((size, size))
        small = file.with_suffix(".thumbnail.jpg")
        image.save(small)
        return Thumbnail(small, *image.size)


if __name__ == "__main__":
    report = pipeline.run(check=False, collect=True)
    for thumbnail in sorted(report.results, key=lambda result: result.file):
        print(thumbnail.file, f"{thumbnail.width} x {thumbnail.height}")
    for letter in report.dead:
        print(f"not {letter.item}: {letter.error}")
