"""The browsable API reference: Swagger UI from its wheel, over /openapi.json.

Nothing is loaded from another host, and the content security policy says so.
"""

import html
from dataclasses import dataclass
from types import MappingProxyType

from swagger_ui_bundle import swagger_ui_path

DOCS_PATH = "/docs"
OPENAPI_PATH = "/openapi.json"

_CONTENT_TYPES = {".css": "text/css", ".js": "text/javascript", ".png": "image/png"}
_BUNDLED = ("swagger-ui.css", "swagger-ui-bundle.js", "index.css", "favicon-32x32.png")

# Swagger UI draws its icons as data: images; everything else comes from this host.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)

_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(title)s: API reference</title>
<link rel="stylesheet" href="%(docs)s/swagger-ui.css">
<link rel="stylesheet" href="%(docs)s/index.css">
<link rel="icon" type="image/png" href="%(docs)s/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript; the document itself is at %(openapi)s.</noscript>
<script src="%(docs)s/swagger-ui-bundle.js"></script>
<script src="%(docs)s/start.js"></script>
</body>
</html>
"""

# The bundled Swagger UI 4 refuses any version but 3.0. Our document keeps to what 3.0 and 3.1
# share (edge/schemas.py), so it is shown under the older number.
_START = f"""fetch("{OPENAPI_PATH}")
  .then((response) => response.json())
  .then((spec) => {{
    spec.openapi = "3.0.3";
    window.ui = SwaggerUIBundle({{
      spec: spec,
      dom_id: "#swagger-ui",
      deepLinking: true,
      validatorUrl: null,
      presets: [SwaggerUIBundle.presets.apis],
      layout: "BaseLayout",
    }});
  }});
"""


@dataclass(frozen=True)
class StaticFile:
    """A file and the headers it is served with, in lower case."""

    body: bytes
    headers: MappingProxyType[str, str]


def docs_files(title: str) -> MappingProxyType[str, StaticFile]:
    """Every file of the reference by its URL path: "/docs", "/docs/start.js" and so on.

    Args:
        title: of the API, for the page's own.
    """
    names = {"title": html.escape(title), "docs": DOCS_PATH, "openapi": OPENAPI_PATH}
    files = {
        DOCS_PATH: _static((_INDEX % names).encode(), "text/html; charset=utf-8"),
        f"{DOCS_PATH}/start.js": _static(_START.encode(), "text/javascript; charset=utf-8"),
    }
    for name in _BUNDLED:
        path = swagger_ui_path / name
        content_type = _CONTENT_TYPES[path.suffix]
        files[f"{DOCS_PATH}/{name}"] = _static(path.read_bytes(), content_type)
    return MappingProxyType(files)


def _static(body: bytes, content_type: str) -> StaticFile:
    headers = {
        "content-type": content_type,
        "content-security-policy": CONTENT_SECURITY_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "public, max-age=3600",
    }
    return StaticFile(body, MappingProxyType(headers))
