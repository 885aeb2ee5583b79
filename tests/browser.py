"""The system's Chromium, without a window, and what a page in it said and asked for."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import BrowserContext, Page, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing that the browser would do on its own account, and nothing that a container lacks.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 15_000.0


@dataclass
class Visit:
    """A page, and what was seen of it.

    Attributes:
        complaints: errors of its console and its scripts, and requests that failed.
        hosts: "127.0.0.1:8080", of every request that left it.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    async def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the page, and wait for what it returns."""
        return await self.page.evaluate(f"(all) => {function}(...all)", list(arguments))


@asynccontextmanager
async def open_browser(profile: Path) -> AsyncIterator[BrowserContext]:
    """A browser with a profile of its own; skips the test where there is none."""
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        pytest.skip("not run: no browser")
    async with async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            profile,
            executable_path=chromium,
            args=ARGUMENTS,
            viewport={"width": 1280, "height": 1600},
        )
        context.set_default_timeout(TIMEOUT_MS)
        try:
            yield context
        finally:
            await context.close()


@asynccontextmanager
async def visit(context: BrowserContext, url: str) -> AsyncIterator[Visit]:
    """A page that has loaded."""
    page = await context.new_page()
    seen = Visit(page)

    def on_console(message: Any) -> None:
        if message.type in {"error", "warning"}:
            seen.complaints.append(f"{message.type}: {message.text} ({message.location})")

    page.on("console", on_console)
    page.on("pageerror", lambda error: seen.complaints.append(f"script: {error}"))
    page.on("request", lambda request: seen.hosts.add(urlsplit(request.url).netloc))
    try:
        await page.goto(url)
        yield seen
    finally:
        await page.close()
