"""How a frozen model's tokenizer reads a data set: pieces a word, words it does not know, texts it cuts."""

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from caravan.config import BackboneConfig
from caravan.training.diagnosis import Finding

if TYPE_CHECKING:
    from caravan.data.dataset import Dataset
    from caravan.model.backbone import Backbone

_FIRST_WORDS = 8  # of a text: few enough to fit in what is read even where every letter is a token
_MOST_TEXTS = 2_000  # evenly spaced: enough for shares to a few hundredths, and a tenth of a second
# English has 1.1 to 1.3 pieces a word by a vocabulary made for it, and languages that multilingual models know badly
# about 2 (arXiv:2012.15613, figure 2); beyond that a word is spelt more than read.
_SHREDDED = 2.5
_UNKNOWN = 0.02  # one token in fifty: about one a query
_LONG_WORD = 12.0  # longer on average: a script that does not part words, of which this says nothing
_MOST_CUT = {"queries": 0.05, "documents": 0.25}  # a document's beginning often says what it is about, a query is short
_WORD = re.compile(r"\w+|[^\w\s]")  # as tokenizers part words: runs of letters and digits, and single marks


def describe_wording(backbone: "Backbone", dataset: "Dataset", *, private: bool) -> dict[str, Any]:
    """Say how the tokenizer reads the documents and, unless these are private, the training queries.

    Returns:
        `documents` and `queries`, each as `read_texts` gives it; what there is none of is left out.
    """
    texts = {"documents": [document.content for document in dataset.catalogue]}
    if not private:
        texts["queries"] = [example.text for example in dataset.train]
    return {name: read_texts(backbone, own) for name, own in texts.items() if own}


def read_texts(backbone: "Backbone", texts: Sequence[str]) -> dict[str, Any]:
    """Tokenize one or more texts, at most 2,000 of them, and count.

    Returns:
        texts: how many were looked at.
        max_tokens: the longest that the model reads.
        letters_per_word: of these words, single marks among them.
        pieces_per_word: tokens a word, of the first words of each text; None where there are no words.
        unknown: share of these tokens that stand for something the tokenizer does not know.
        cut: share of texts as long as the model reads, so that what came after is lost.
    """
    chosen = [texts[number] for number in range(0, len(texts), -(-len(texts) // _MOST_TEXTS))]
    cut = sum(len(ids) >= backbone.max_tokens for ids in backbone.tokenize(chosen))
    # Of whole texts only those could be counted that are not cut, and where words are shredded that may be none.
    parted = [own for text in chosen if (own := list(islice(_WORD.finditer(text), _FIRST_WORDS)))]
    heads = [own[-1].string[: own[-1].end()] for own in parted]
    added, unknown = backbone.tokenizer.num_special_tokens_to_add(), backbone.tokenizer.unk_token_id
    read = backbone.tokenize(heads)
    pieces = sum(max(len(ids) - added, 0) for ids in read)
    strange = sum(ids.count(unknown) for ids in read)
    words, letters = sum(map(len, parted)), sum(len(word.group()) for own in parted for word in own)
    return {
        "texts": len(chosen),
        "max_tokens": backbone.max_tokens,
        "letters_per_word": letters / words if words else None,
        "pieces_per_word": pieces / words if words else None,
        "unknown": strange / pieces if pieces else 0.0,
        "cut": cut / len(chosen),
    }


def shredded(wording: Mapping[str, Mapping[str, Any]], backbone: BackboneConfig) -> Finding | None:
    """The tokenizer spells the data's words out, or does not know them."""
    for name, found in wording.items():
        pieces, letters, unknown = (found.get(key) for key in ("pieces_per_word", "letters_per_word", "unknown"))
        if pieces is None or letters is None or unknown is None or letters > _LONG_WORD:
            continue
        if pieces < _SHREDDED and unknown < _UNKNOWN:
            continue
        return Finding(
            "the tokenizer shreds the words",
            f"{pieces:.2f} pieces a word in the {name} ({letters:.1f} letters a word), {unknown:.1%} of them unknown",
            f"the vocabulary of {backbone.name} was made for other texts: the frozen blocks see letters, not words",
            "take a backbone whose tokenizer was trained on such texts (backbone.name), for example a multilingual one "
            "or one of the domain; an adapter cannot mend it",
            ("backbone.name=minilm",) if backbone.name != "minilm" else (),
            3,
        )
    return None


def cut_off(wording: Mapping[str, Mapping[str, Any]], backbone: BackboneConfig) -> Finding | None:
    """Many texts are longer than what is read of them."""
    for name, most in _MOST_CUT.items():
        found = wording.get(name, {})
        cut, limit = found.get("cut", 0.0), found.get("max_tokens", backbone.max_tokens)
        if cut < most:
            continue
        free = limit >= backbone.max_tokens  # else the model's own positions end there
        remedy = "raise backbone.max_tokens, first to twice as many (a text's time grows with it), or " if free else ""
        return Finding(
            "texts are cut",
            f"{cut:.0%} of the {name} are longer than the {limit} tokens that are read",
            f"backbone.max_tokens = {backbone.max_tokens}" + ("" if free else f", and {backbone.name} reads no more"),
            f"{remedy}put what matters first, or split long documents",
            (f"backbone.max_tokens={2 * limit}",) if free else (),
            2,
        )
    return None
