import re

from edge.docs import docs_files

PAGE = "/docs"


def test_the_page_loads_only_files_that_are_served_here():
    files = docs_files("Tenfold")
    page = files[PAGE].body.decode()
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) == 5
    assert all(path in files for path in loaded)
    assert "://" not in page + files["/docs/start.js"].body.decode()


def test_no_page_may_run_inline_code_or_reach_another_host():
    for file in docs_files("Tenfold").values():
        policy = file.headers["content-security-policy"]
        assert "unsafe" not in policy
        assert "*" not in policy
        assert "default-src 'none'" in policy
        assert file.headers["x-content-type-options"] == "nosniff"
    page = docs_files("Tenfold")[PAGE].body.decode()
    assert "<style" not in page
    assert not re.search(r"<script(?![^>]*src)", page)


def test_the_page_has_the_name_of_the_api_and_nothing_that_its_name_brings():
    page = docs_files("<b>&acme")[PAGE].body.decode()
    assert "<title>&lt;b&gt;&amp;acme: API reference</title>" in page
