"""Check that a built site is whole in itself: no page loads anything from another host.

    python .ci/check_site.py site

Links that a reader may follow (`<a href>`) are free; scripts, styles, fonts, icons, images and
frames must be files of the site, and must exist in it. Ends with 1 and a list where they are not.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Elements whose attribute makes a browser load something by itself.
LOADING_ATTRIBUTES = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src",),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
# A <link> of these kinds states a relation between pages and loads nothing.
RELATIONS = {"alternate", "author", "canonical", "help", "license", "next", "prev", "search"}
CSS_REFERENCE = re.compile(r"""url\(\s*['"]?([^'")\s]+)|@import\s+['"]([^'"]+)""")
# With fewer the build broke off, and a check of nothing would pass.
LEAST_PAGES = 5


class Resources(HTMLParser):
    """Collects the addresses that a page makes a browser load."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.addresses: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what this element loads."""
        values = dict(attrs)
        self._in_style = tag == "style"
        if values.get("style"):
            self.addresses += css_addresses(values["style"] or "")
        if tag == "link" and set((values.get("rel") or "").split()) <= RELATIONS:
            return
        for attribute in LOADING_ATTRIBUTES.get(tag, ()):
            value = values.get(attribute)
            if value:
                self.addresses.append(value)

    def handle_data(self, data: str) -> None:
        """Note what an embedded style sheet loads."""
        if self._in_style:
            self.addresses += css_addresses(data)

    def handle_endtag(self, tag: str) -> None:
        """Leave an embedded style sheet."""
        self._in_style = False


def css_addresses(text: str) -> list[str]:
    """Return the addresses that a style sheet loads."""
    return [imported or loaded for loaded, imported in CSS_REFERENCE.findall(text)]


def fault(address: str, page: Path, site: Path) -> str | None:
    """Return why `address`, as `page` loads it, is no file of `site`, or None if it is one."""
    parts = urlsplit(address)
    if parts.scheme == "data" or (not parts.scheme and not parts.netloc and not parts.path):
        return None
    if parts.scheme or parts.netloc:
        return "is on another host"
    start = site if parts.path.startswith("/") else page.parent
    target = (start / unquote(parts.path).lstrip("/")).resolve()
    if not target.is_relative_to(site):
        return "is outside the site"
    return None if target.exists() else "is not in the site"


def faults(site: Path) -> list[str]:
    """Return one line for each thing that a page or style sheet of `site` loads and must not."""
    found = []
    for page in sorted(site.rglob("*.html")):
        parser = Resources()
        parser.feed(page.read_text(encoding="utf-8"))
        # The page for missing addresses is shown at any depth: what it loads is found from there.
        local = page.name != "404.html"
        for address in dict.fromkeys(parser.addresses):
            reason = fault(address, page, site)
            if reason and (local or reason == "is on another host"):
                found.append(f"{page.relative_to(site)}: {address} {reason}")
    for sheet in sorted(site.rglob("*.css")):
        for address in dict.fromkeys(css_addresses(sheet.read_text(encoding="utf-8"))):
            reason = fault(address, sheet, site)
            if reason:
                found.append(f"{sheet.relative_to(site)}: {address} {reason}")
    return found


def main() -> int:
    """Check the site named on the command line; return the exit status."""
    if len(sys.argv) != 2:
        print("usage: python .ci/check_site.py SITE", file=sys.stderr)
        return 2
    site = Path(sys.argv[1]).resolve()
    pages = len(list(site.rglob("*.html")))
    if pages < LEAST_PAGES:
        print(
            f"{site} has {pages} pages, expected at least {LEAST_PAGES}: build it first",
            file=sys.stderr,
        )
        return 1
    found = faults(site)
    for line in found:
        print(line, file=sys.stderr)
    print(f"{site.name}: {pages} pages, {len(found)} resources from elsewhere or missing")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
