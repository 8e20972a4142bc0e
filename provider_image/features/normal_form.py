"""Normal forms of Unicode, in time that does not grow with the square of the length.

Used wherever texts of strangers are compared: inputs, columns, categories, classes.
"""

from __future__ import annotations

import itertools
import unicodedata
from typing import Literal

#: Most marks in a row on one letter; Unicode's Stream-Safe Text Format (UAX #15) allows as many. Sorting more of them
#: takes the square of their number: two seconds for a text of 32 kB.
_MAX_MARKS = 30


def normalise(text: str, form: Literal["NFC", "NFKC"] = "NFC") -> str:
    """Return the normal form of a text, or the text itself if a letter in it has more marks than any language uses."""
    # A mark is also what decomposes into marks, such as some vowel signs of Tibetan.
    marks = {each for each in set(text) if unicodedata.combining(unicodedata.normalize("NFKD", each)[0])}
    runs = (sum(1 for _ in run) for is_mark, run in itertools.groupby(text, marks.__contains__) if is_mark)
    if marks and max(runs, default=0) > _MAX_MARKS:
        return text
    return unicodedata.normalize(form, text)
