"""The command that makes the pictures of the page still makes each of them."""

import struct
from pathlib import Path

import pytest

from tests.browser import pictures
from tests.browser.chromium import Browser

pytestmark = pytest.mark.browser


async def test_each_picture_is_made(chromium: Browser, tmp_path: Path) -> None:
    """Of each screen, in each size and theme; light and dark ones differ."""
    screens = tuple(screen for screen in pictures.SCREENS if screen != "fleet")
    async with pictures.afternoon(tmp_path / "daemon") as running:
        files = await pictures.take(chromium, running, tmp_path, screens)
    assert len(files) == len(set(files)) == len(screens) * len(pictures.SIZES) * len(pictures.THEMES)
    for file in files:
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert struct.unpack(">II", data[16:24]) in pictures.SIZES
    contents = {file.read_bytes() for file in files}
    assert len(contents) == len(files)
