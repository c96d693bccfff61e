"""What docs/hooks do to a page; the formulas need the docs' own packages, and are looked at by docs/screenshots.py."""

from docs.hooks.tables import MIN_PROSE, on_page_content


def test_an_interval_breaks_before_its_bracket_in_tables_only():
    page = "<p>0.69 [0.61, 0.78]</p><td>0.69 [0.61, 0.78]</td><td>-0.1 [-0.2, +1,200]</td><td>[a, b]</td>"
    expected = "<p>0.69 [0.61, 0.78]</p><td>0.69 [0.61,_0.78]</td><td>-0.1 [-0.2,_+1,200]</td><td>[a, b]</td>"
    assert on_page_content(page).replace("\N{NO-BREAK SPACE}", "_") == expected


def test_long_cells_are_marked_as_prose_by_their_text_and_keep_their_attributes():
    long, link = "x" * MIN_PROSE, '<a href="https://example.org/a-long-address-that-nobody-sees">x</a>'
    page = f'<td align="right">{long}</td><td>{link}</td><td class="doc">{long}</td><td>{long[1:]}</td>'
    expected = f'<td class="prose" align="right">{long}</td>' + page.split("</td>", 1)[1]
    assert on_page_content(page) == expected
