"""The directive `gallery`: for each page named in it, a card with its first picture and title, which links to it.

Pictures of notebooks exist once the notebooks have been executed, so the cards are filled in when all pages are read.
"""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)


class cards(nodes.General, nodes.Element):
    """A place for cards of `pages`."""


class Gallery(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        return [cards(pages=[line.strip() for line in self.content if line.strip()])]


def card(app: Sphinx, page: str, here: str) -> nodes.Element | None:
    picture = next(iter(app.env.get_doctree(page).findall(nodes.image)), None)
    if picture is None:
        logger.warning("the gallery names %s, which has no picture", page, location=here)
        return None
    link = nodes.reference("", "", internal=True, refuri=app.builder.get_relative_uri(here, page))
    link += nodes.image(
        uri=picture["uri"],
        candidates=picture["candidates"],
        alt=picture["alt"],
        loading="lazy",
        classes=["no-scaled-link"],
    )
    link += nodes.inline("", app.env.titles[page].astext())
    item = nodes.list_item("", nodes.paragraph("", "", link))
    return item


def filled(app: Sphinx, doctree: nodes.document, here: str) -> None:
    for place in list(doctree.findall(cards)):
        found = [card(app, page, here) for page in place["pages"]]
        place.replace_self(nodes.bullet_list("", *filter(None, found), classes=["gallery"]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_node(cards)
    app.add_directive("gallery", Gallery)
    app.connect("doctree-resolved", filled)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
