"""The parts of docs/screenshots.py that need no browser."""

import urllib.request

import pytest

from docs import screenshots


@pytest.fixture
def site(tmp_path):
    for page in ("", "usage", "decisions", "decisions/core"):
        (tmp_path / page).mkdir(exist_ok=True)
        (tmp_path / page / "index.html").write_text(f"<article>{page}</article>", encoding="utf-8")
    (tmp_path / "404.html").touch()
    return tmp_path


def test_pages_are_the_folders_with_an_index(site):
    assert screenshots.pages(site) == ["", "decisions/", "decisions/core/", "usage/"]


def test_chosen_pages_keep_their_order_and_an_unknown_name_is_refused(site):
    assert screenshots.chosen(site, []) == screenshots.pages(site)
    assert screenshots.chosen(site, ["usage/", "index", "decisions/core"]) == ["usage/", "", "decisions/core/"]
    with pytest.raises(ValueError, match=r"No such page: usge/\. The site has .*usage/"):
        screenshots.chosen(site, ["usge"])


def test_every_picture_has_a_name_of_its_own(site):
    names = {
        screenshots.picture_name(page, width, scheme)
        for page in screenshots.pages(site)
        for width in screenshots.WIDTHS
        for scheme in screenshots.SCHEMES
    }
    assert len(names) == 16
    assert {"index-1400-light.png", "decisions_core-390-dark.png"} <= names


@pytest.mark.parametrize("width", screenshots.WIDTHS)
@pytest.mark.parametrize("kind", ["page", "spills", "hidden", "scrolls", "host"])
def test_what_is_out_of_sight_is_a_fault_unless_a_box_scrolls_on_a_narrow_screen(kind, width):
    found = {("usage/", width): [{"kind": kind, "by": 12, "text": "a table"}], ("", width): []}
    lines, faults = screenshots.report(found)
    assert faults == (0 if (kind, width) == ("scrolls", 390) else 1)
    assert (f"/usage/ at {width} px: {kind} 12 px  a table" in lines) == bool(faults)
    assert lines[-1] == f"2 pages: {faults} faults, {1 - faults} boxes scroll where narrow"


def test_without_a_browser_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"None of chromium, .* on PATH: install Chromium"):
        screenshots.find_chromium()


def test_a_site_is_served_on_this_machine_alone(site):
    with screenshots.serve(site) as address:
        assert address.startswith("http://127.0.0.1:")
        assert urllib.request.urlopen(address + "usage/").read() == b"<article>usage</article>"
