"""The pictures in the README."""

import re
import struct
from pathlib import Path

import pytest

from tests.browser.pictures import OF_DEMO, PICTURES, SHOTS, take

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.browser


def _size(file: Path) -> tuple[int, int]:
    """Pixels of a PNG."""
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


async def test_the_command_still_makes_each_picture(tmp_path: Path) -> None:
    """Of the size that it has, and no others; what they show is for people to look at."""
    await take(tmp_path)
    assert {file.stem: _size(file) for file in tmp_path.iterdir()} == {
        shot.name: (shot.width, shot.height) for shot in SHOTS
    }


def test_the_readme_shows_pictures_that_are_there() -> None:
    """Each picture of the README is made by the command, and each that is committed too."""
    shown = set(re.findall(r"examples/pictures/([\w-]+)\.png", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert shown
    assert shown <= {shot.name for shot in (*SHOTS, *OF_DEMO)} == {file.stem for file in PICTURES.iterdir()}
