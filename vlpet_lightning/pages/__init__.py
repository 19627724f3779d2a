"""Self-contained HTML pages of text, figures and tables: they load nothing and run nothing."""

from vlpet_lightning.pages.page import Block, Cell, Picture, Section, Table, Text, page

__all__ = ["Block", "Cell", "Picture", "Section", "Table", "Text", "page"]
