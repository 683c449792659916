"""Whatever is given, a user gets one line that names the culprit and the right exit code; nothing half-done is left."""

import gzip
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub.constants
import pytest

from command_line import Workshop, check_refused, listing, run

USAGE = 2
ROWS = b"text,label\na b c,d0\nf g h,d1\nb c d,d0\n"
DOCUMENTS = b"doc_id,text\nd0,a b c d e\nd1,f g h i j\n"


@dataclass(frozen=True)
class Bad:
    """A command that cannot be carried out.

    Attributes:
        name: what is wrong.
        command: `{model}` stands for the workshop's.
        says: what the message must name.
        files: what lies in the folder it runs in.
        code: 1, or 2 for wrong usage.
    """

    name: str
    command: str
    says: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    code: int = 1


def data(name: str, path: str, *says: str, more: str = "", **files: bytes) -> Bad:
    """Train on bad data; `q` and `d` are what `path` and `more` name q.* and d.*, other files are named in full."""
    named = [word for word in f"{path} {more}".split() if word[:2] in ("q.", "d.", "t.")]
    return Bad(name, f"train {path} {more}", says, {file: files[file[0]] for file in named if file[0] in files})


def option(options: str, *says: str, code: int = 1, toml: bytes | None = None) -> Bad:
    """Train on good data with a bad option, or with `-c my.toml` of this content."""
    name = options[:60] if toml is None else f"my.toml: {toml[:40]!r}"
    return Bad(name, f"train {options}", says, {} if toml is None else {"my.toml": toml}, code)


DATA = [
    data("missing file", "nowhere.csv", "nowhere.csv: no such"),
    data("missing folder", "no/where.csv", "no/where.csv: no such"),
    data("empty file", "q.csv", "q.csv: an empty file", q=b""),
    data("empty JSON Lines", "q.jsonl", "q.jsonl: an empty file", q=b"\n\n"),
    data("header only", "q.csv", "q.csv: a header line but no rows", q=b"text,label\n"),
    data("binary file", "q.csv", "q.csv, line 1", "not UTF-8", q=bytes(range(256)) * 40),
    data("other kind of file", "q.txt", "q.txt: unknown kind of file", q=ROWS),
    data("wrong columns", "q.csv", "q.csv, line 1: no column", "'query'", q=b"query,answer\na,d0\n"),
    data(
        "column named twice", "q.csv", "q.csv, line 1", "'text' occurs more than once", q=b"text,text,label\na,b,d0\n"
    ),
    data("empty text", "q.csv", "q.csv, line 3: 'text' is empty", q=b"text,label\na,d0\n  ,d0\n"),
    data("empty label", "q.csv", "q.csv, line 2: 'label' is empty", q=b"text,label\na,\n"),
    data(
        "text of a megabyte", "q.csv", "q.csv, line 2: 'text' is longer", q=b"text,label\n" + b"ab " * 350_000 + b",d\n"
    ),
    data(
        "endless line", "q.csv", "q.csv, line 2: longer than 16,777,216 bytes", q=b"text,label\n" + b"a" * (2**24 + 1)
    ),
    data("NUL", "q.csv", "q.csv, line 2: 'text' holds a NUL character", q=b"text,label\na\0b,d0\n"),
    data("Latin-1", "q.csv", "q.csv, line 2: 'text' holds bytes that are not UTF-8", q=b"text,label\ncaf\xe9,d0\n"),
    data("lone surrogate", "q.jsonl", "q.jsonl, line 1: 'text'", "lone", q=b'{"text": "\\ud800", "label": "d0"}\n'),
    data("no JSON", "q.jsonl", "q.jsonl, line 1: not JSON", q=b"a b c\n"),
    data("JSON nested too deep", "q.jsonl", "q.jsonl, line 1: not JSON", q=b"[" * 100_000 + b"\n"),
    data("JSON but no object", "q.jsonl", "q.jsonl, line 1: JSON, but no object", q=b'["a", "d0"]\n'),
    data("number for a text", "q.jsonl", "q.jsonl, line 1: 'text' is 7", q=b'{"text": 7, "label": "d0"}\n'),
    data("too many cells", "q.csv", "q.csv, line 2: 3 cells, but the header has 2", q=b"text,label\na, b,d0\n"),
    data("unclosed quote", "q.csv", "q.csv, line 3", "never closed", q=b'text,label\na,d0\n"b,d0\nc,d1\n'),
    data("truncated gzip", "q.csv.gz", "q.csv.gz, line 4", "ends too early", q=gzip.compress(ROWS)[:-12]),
    data("no gzip", "q.csv.gz", "q.csv.gz, line 1: not a sound gzip file", q=ROWS),
    data("documents missing", "q.csv", "d.csv: no such file", more="--documents d.csv", q=ROWS),
    data("documents are a folder", "q.csv", "..: unknown kind of file", more="--documents ..", q=ROWS),
    data(
        "duplicate document id",
        *("q.csv", "d.csv, line 4: duplicate document id 'd0', first in line 2"),
        more="--documents d.csv",
        q=ROWS,
        d=DOCUMENTS + b"d0,again\n",
    ),
    data(
        "label without document",
        *("q.csv", "q.csv, line 3: unknown label 'd1'"),
        more="--documents d.csv",
        q=ROWS,
        d=b"doc_id,text\nd0,a\n",
    ),
    data("test missing", "q.csv", "t.csv: no such file", more="--test t.csv", q=ROWS),
    data("test of other columns", "q.csv", "t.csv, line 1: no column", more="--test t.csv", q=ROWS, t=b"query\na\n"),
    data(
        "unknown label in test",
        *("q.csv", "t.csv, line 2: unknown label 'd9'"),
        more="--test t.csv",
        q=ROWS,
        t=b"text,label\na,d9\n",
    ),
    data(
        "nothing left",
        "q.csv",
        "2 rows skipped",
        "q.csv, line 2",
        more="--on-bad-row skip",
        q=b"text,label\n,d0\n,d1\n",
    ),
    data("NUL in a path", "q.csv", "'a\\x00.csv'", "null byte", more="--set 'data.documents=\"a\\u0000.csv\"'", q=ROWS),
    data("NUL in the path of the data", "--set 'data.path=\"a\\u0000.csv\"'", "a\\x00.csv: no such"),
    Bad("folder without train", "train folder", ("folder: a folder without training queries",), {"folder/a.txt": b""}),
    Bad(
        "two train files", "train two", ("'train.csv', 'train.jsonl'",), {"two/train.csv": ROWS, "two/train.jsonl": b""}
    ),
]
SETTINGS = [
    option("--epochs -1", "training.head.epochs = -1"),
    option("--mode adapter --epochs -1", "training.adapter.epochs = -1"),
    option("--batch-size 0", "training.head.batch_size = 0"),
    option("--batch-size 1.5", "--batch-size", "'1.5'", code=USAGE),
    option("--learning-rate nan", "training.head.learning_rate = nan"),
    option("--learning-rate inf", "training.head.learning_rate = inf"),
    option("--learning-rate -1", "training.head.learning_rate = -1"),
    option("--learning-rate 0", "training.head.learning_rate = 0"),
    option("--learning-rate 1e37", "of the head stage", "training.head.learning_rate (now 1e+37)"),
    option("--seed -1", "seed = -1"),
    option("--seed 9223372036854775808", "seed = 9223372036854775808"),
    option("--mode nonsense --epochs 1", "options: training.mode = 'nonsense'", "'head' or 'adapter'"),
    option("--adapter nonsense", "adapter.kind = 'nonsense'"),
    option("--pooling nonsense", "backbone.pooling = 'nonsense'"),
    option("--on-bad-row nonsense", "data.on_bad_row = 'nonsense'"),
    option("--device cuda:99", 'device "cuda:99"'),
    option("--device nonsense", 'device "nonsense"'),
    option("--set seed", "--set 'seed'", "KEY=VALUE"),
    option("--set =3", "--set '=3'", "KEY=VALUE"),
    option("--set seed.value=3", "seed = {'value': 3}"),
    option("--set training=5", "training = 5"),
    option("--set training.epochs=3", "unknown setting training.epochs"),
    option("--set training..epochs=3", "unknown setting training."),
    option("--set head.scale=inf", "head.scale = inf"),
    option("--set backbone.max_tokens=1", "backbone.max_tokens = 1"),
    option(f"--set head.hidden={10**14}", "not enough memory"),
    option(f"--set seed={'[' * 5000}", "seed = '[[["),
    option("-c no.toml", "no.toml: cannot read the settings", "No such file"),
    option("-c .", "cannot read the settings", "Is a directory"),
    option("-c my.toml", "my.toml: not valid TOML", "line 2", toml=b"[training]\nmode = adapter\n"),
    option("-c my.toml", "my.toml: not UTF-8", toml=b"seed = 3 # caf\xe9\n"),
    option("-c my.toml", "my.toml: not valid TOML", toml=b"seed = " + b"[" * 5000),
    option("-c my.toml", "my.toml: not valid TOML", toml=b"seed = " + b"9" * 5000),
    option("-c my.toml", "my.toml: unknown setting training.epoch;", toml=b"[training]\nepoch = 3\n"),
    option("-c my.toml", "my.toml: unknown setting optimizer;", toml=b'[optimizer]\nname = "sgd"\n'),
    option("-c my.toml", "my.toml: training.head.epochs = 'many'", toml=b'[training.head]\nepochs = "many"\n'),
    option("-c my.toml", "my.toml: training = 'head'", toml=b'training = "head"\n'),
    option("-c my.toml", "my.toml: training.mode = ['head']", toml=b'[training]\nmode = ["head"]\n'),
    option("-c my.toml", "my.toml: ", "federation.column", toml=b'[federation]\npartition = "column"\n'),
    option("--clients -1", "federation.clients = -1"),
    option("--clients 0 --dirichlet 1", "--dirichlet", "--clients"),
    option("--dirichlet 1", "--dirichlet", "--clients"),
    option("--clients 3 --dirichlet 0", "federation.alpha = 0"),
    option("--clients 30 --dirichlet 1e-300", "alpha 1e-300", "30 clients"),
    option("--clients 37", "36 training examples", "37 clients"),
    option("--clients 2 --rounds 0", "federation.rounds = 0"),
    option("--rounds 3", "--rounds", "--clients", code=USAGE),
    option("--strategy krum", "--strategy", "--clients", code=USAGE),
    option("--clients-per-round 2", "--clients-per-round", "--clients", code=USAGE),
    option("--clients 2 --clients-per-round 3", "federation.clients_per_round is 3", "2 clients"),
    option("--clients 2 --strategy average", "federation.strategy = 'average'", "'fedavg'"),
    option("--clients 6 --strategy bulyan", 'strategy = "bulyan"', "needs 7 usable updates"),
    option("--partition-by nowhere", "'nowhere'", "'site'"),
    option("--partition-by ''", "federation.column"),
    option("--partition-by site --clients 2", "federation.clients = 2", "--partition-by"),
    option("--partition-by site --dirichlet 1", "--partition-by", "--dirichlet", code=USAGE),
    option("--clients 2 --set federation.min_clients=3", "federation.min_clients is 3", "2 clients"),
    option("--clients 2 --set head.start=centroids", 'head.start = "centroids"', "clients"),
    option("--nonsense", "--nonsense", code=USAGE),
    option("--backbone nowhere", 'backbone "nowhere" is neither'),
    option("--backbone ./no/where", 'backbone "./no/where" is neither'),
    option("--backbone {model}/config.json", "config.json: a file"),
    option("--backbone {model}", "cannot be loaded as a transformers model"),
    option("--backbone owner/nothing-of-this-name", "owner/nothing-of-this-name: neither in the local cache"),
    option("--backbone " + "x" * 300, "x" * 80, "no usable path"),
]
PLACES = [
    Bad("no place", "train -o ''", ("not a saved retriever",), {"notes.txt": b"mine"}),
    Bad("here", "train -o .", ("not a saved retriever",), {"notes.txt": b"mine"}),
    Bad("the root", "train -o /", ("not a saved retriever",)),
    Bad("a file", "train -o notes.txt", ("notes.txt: is a file",), {"notes.txt": b"mine"}),
    Bad(
        "a folder of something else", "train -o work", ("work: is a folder of something else",), {"work/notes.txt": b""}
    ),
    Bad(
        "below a file", "train -o notes.txt/a", ("notes.txt/a: cannot be written: Not a directory",), {"notes.txt": b""}
    ),
    Bad("a name that is no text", "train -o 'a\udcff'", ("a\\udcff: the name is not UTF-8",)),
    Bad("a name too long", "train -o " + "x" * 300, ("File name too long",)),
    Bad("checkpoints in the way", "train -o out", ("out.checkpoint",), {"out.checkpoint": b"mine"}),
    Bad("report is a file", "train --report notes.txt", ("notes.txt: cannot be written",), {"notes.txt": b"mine"}),
    Bad(
        "report below a file", "train --report notes.txt/a", ("notes.txt/a: cannot be written",), {"notes.txt": b"mine"}
    ),
    Bad(
        "report of an evaluation", "evaluate {model} --report a.txt", ("a.txt: cannot be written",), {"a.txt": b"mine"}
    ),
]
OTHERS = [
    Bad("no command of this name", "trian", ("trian",), code=USAGE),
    Bad("no such option", "--nonsense", ("--nonsense",), code=USAGE),
    Bad("no model to search", "search", ("MODEL",), code=USAGE),
    Bad("search in a missing folder", "search nowhere 'a b'", ("nowhere: no such folder",)),
    Bad("search in a file", "search notes.txt 'a b'", ("notes.txt: a file",), {"notes.txt": b""}),
    Bad("search in another folder", "search work 'a b'", ("work: no config.json",), {"work/notes.txt": b""}),
    Bad(
        "search in a model folder",
        "search work 'a b'",
        ("work/config.json: not of a saved",),
        {"work/config.json": b"{}"},
    ),
    Bad("empty query", "search {model} ''", ("text 1 of 1 is empty",)),
    Bad("query of spaces", "search {model} 'a b' ' \t '", ("text 2 of 2 is empty",)),
    Bad("query of lone surrogates", "search {model} 'a \udcff'", ("text 1 of 1 holds a lone surrogate",)),
    Bad("no query", "search {model}", ("QUERIES", "at least one query"), code=USAGE),
    Bad("k = 0", "search {model} a -k 0", ("-k", "0"), code=USAGE),
    Bad("k = -1", "search {model} a -k -1", ("-k", "-1"), code=USAGE),
    Bad("k is no number", "search {model} a -k many", ("-k", "many"), code=USAGE),
    Bad("search on another device", "search {model} a --device cuda:99", ('device "cuda:99"',)),
    Bad("evaluate a missing model", "evaluate nowhere", ("nowhere: no such folder",)),
    Bad("evaluate on missing data", "evaluate {model} q.csv", ("q.csv: no such",)),
    Bad(
        "evaluate on other data",
        "evaluate {model} q.csv --set data.test=q.csv",
        ("model was trained on other documents than those of q",),
        {"q.csv": ROWS},
    ),
    Bad("evaluate without --set's value", "evaluate {model} --set seed", ("--set 'seed'",)),
    Bad("evaluate with an unknown setting", "evaluate {model} --set sead=1", ("unknown setting sead",)),
    Bad("compare nothing", "compare", ("MODELS",), code=USAGE),
    Bad("communication of missing data", "compare communication nowhere.csv", ("nowhere.csv: no such",)),
    Bad("communication on a missing backbone", "compare communication --backbone nowhere", ('"nowhere" is neither',)),
    Bad("communication with rank 0", "compare communication --rank 0", ("adapter.rank = 0",)),
    Bad("rounds without training", "compare communication --rounds 3", ("--rounds", "add --train"), code=USAGE),
    Bad("two data sets", "compare communication a b", ("unexpected extra argument",), code=USAGE),
    Bad(
        "rivals in bfloat16",
        "compare communication helpdesk --train --set backbone.dtype=bfloat16",
        ("backbone.dtype = bfloat16", '"float32"'),
    ),
    Bad("compare with a missing model", "compare {model} nowhere", ("nowhere: no such folder",)),
    Bad("describe a missing model", "info nowhere", ("nowhere: no such folder",)),
    Bad("demo with a bad setting", "demo --set training.mode=nonsense", ("training.mode = 'nonsense'",)),
]


@pytest.mark.parametrize("bad", DATA + SETTINGS + PLACES + OTHERS, ids=lambda bad: bad.name)
def test_bad_input_ends_in_one_line_and_leaves_all_as_it_was(
    bad: Bad, workshop: Workshop, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, content in bad.files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(content)
    command, *rest = shlex.split(bad.command.format(model=workshop.model))
    if command == "train":
        # The place of a retriever that was saved before: it must stay as it was, too.
        shutil.copytree(workshop.model, here / "saved")
        rest = [*("-c", str(workshop.quick), "-o", "saved"), *rest]
    before, saved = listing(here), listing(workshop.model)
    check_refused(run(command, *rest), *bad.says, code=bad.code)
    assert listing(here) == before
    assert listing(workshop.model) == saved
