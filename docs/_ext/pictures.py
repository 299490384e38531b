"""A warning, hence an error of the strict build, for a picture without a description of it."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def described(app: Sphinx, doctree: nodes.document) -> None:
    for image in doctree.findall(nodes.image):
        if len(image.get("alt", "")) < 10:
            logger.warning("picture %s has no description (alt)", image.get("uri"), location=image)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", described)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
