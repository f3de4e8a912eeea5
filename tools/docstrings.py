"""Docstrings as the site's parser wants them: a blank line before each of their sections."""

import re

import griffe

SECTION = re.compile(r"\n( *(?:Returns|Raises):\n)")


class Sections(griffe.Extension):
    """Parts the sections of every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Part those of one object."""
        if obj.docstring:
            obj.docstring.value = SECTION.sub(r"\n\n\1", obj.docstring.value)
