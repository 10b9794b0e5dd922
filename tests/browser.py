"""A headless Chromium for tests that look at pages as a reader would."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from tracking import free_port
from waiting import PATIENCE_S, until

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium(profile: Path, *, height: int = 1000) -> Iterator[Chrome]:
    """A browser with a fresh profile in the folder `profile`, `height` pixels high; skips the test without Chromium."""
    paths = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in paths:
        pytest.skip("needs chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = str(paths[0])
    for flag in (*FLAGS, f"--window-size=1400,{height}", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    browser = Chrome(options=options, service=Service(executable_path=str(paths[1])))
    try:
        browser.set_page_load_timeout(120)
        yield browser
    finally:
        browser.quit()


def text_of(browser: Chrome) -> str:
    """What a reader of the page can read, scrolling where needed."""
    return browser.execute_script("return document.body ? document.body.innerText : ''")


def wait_for_texts(browser: Chrome, texts: list[str]) -> str:
    """Wait until the page shows every one of the texts, and return all it shows."""

    deadline = time.monotonic() + PATIENCE_S
    while missing := [text for text in texts if text not in (page := text_of(browser))]:
        assert time.monotonic() < deadline, f"{missing} not on the page:\n{page}"
        time.sleep(0.3)
    return page


def keep(browser: Chrome, folder: Path, name: str) -> None:
    """Save what the browser shows to `folder`, or to ARAE_TEST_ARTIFACTS where that is set."""
    place = Path(os.environ.get("ARAE_TEST_ARTIFACTS") or folder)
    place.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(place / name))


def find_by_scrolling(browser: Chrome, texts: list[str]) -> None:
    """Wait until each text has been on the page, scrolling all that scrolls: of a long table only a part is there."""
    seen, deadline = "", time.monotonic() + PATIENCE_S
    while missing := [text for text in texts if text not in seen]:
        assert time.monotonic() < deadline, f"not on the page: {missing}"
        seen += text_of(browser)
        browser.execute_script(
            """for (const e of document.querySelectorAll('*')) {
                 if (e.scrollHeight <= e.clientHeight + 4 || getComputedStyle(e).overflowY === 'visible') continue;
                 const end = e.scrollTop + e.clientHeight >= e.scrollHeight - 4;
                 e.scrollTop = end ? 0 : e.scrollTop + e.clientHeight / 2;
               }"""
        )
        time.sleep(0.3)


SERVE = """
import sys
from pathlib import Path
from arae.tracking import ui
sys.exit(ui(Path(sys.argv[1]), port=int(sys.argv[2])))
"""


@contextmanager
def served(root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """MLflow's UI on a folder of runs, by the command `arae ui`: its process, and where it answers."""
    port = free_port()
    command = [sys.executable, "-c", SERVE, str(root), str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            wait_until_up(server, f"http://127.0.0.1:{port}/health")
            yield server, f"http://127.0.0.1:{port}"
        finally:
            if server.poll() is None:
                server.terminate()
                server.wait(30)


def wait_until_up(server: subprocess.Popen[str], url: str) -> None:
    def answers() -> bool:
        try:
            with urlopen(url, timeout=5):
                return True
        except (URLError, OSError):
            return False

    until(answers, f"answer of {url}", server, pause=0.3)


def wait_until_down(uri: str) -> None:
    """Nothing of the server may stay behind."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with urlopen(f"{uri}/health", timeout=5):
                time.sleep(0.3)
        except (URLError, OSError):
            return
    pytest.fail("the server outlived the command")
