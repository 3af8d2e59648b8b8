"""What counts as a word of a text, for everything that compares texts: near-duplicates (`clusters`)
and what experiments tell of each other (`wording`).

Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces between words, so their
signs are counted: each letter with the marks that belong to it. Three of them in a row, the
shingle of every comparison, are then character 3-grams. All other scripts (Korean too) have spaces.
"""

from __future__ import annotations

import re

_LETTERS = (
    r"\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana and signs of repetition
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Chinese characters
    r"\u0e00-\u0e7f\u0e80-\u0eff"  # Thai, Lao
    r"\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    r"\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
)
_MARKS = (
    r"\u3099\u309a\uff9e\uff9f"
    r"\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    r"\u17b4-\u17d3\u17dd"
    r"\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d"
)
WORD = re.compile(rf"[{_LETTERS}][{_MARKS}]*|[^\W{_LETTERS}]+")
