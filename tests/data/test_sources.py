"""Every form of text is read, and every way in which it can be wrong is one line that names the place."""

import gzip
import json
import lzma
import subprocess
import sys
import types
import zlib
from pathlib import Path

import pytest

from sparsae.data import readers
from sparsae.data.entry import cache_root
from sparsae.data.sources import documents, expected_documents, fingerprint
from sparsae.data.tokenizer import load_tokenizer
from sparsae.errors import InputError
from tests.support.faults import open_files

BOOKS = Path("/work/shared/data/books/train-0.jsonl.xz")
TEXTS = ["first\n", "zweite Zeile, größer", "三"]


def lines(texts, field="text"):
    return "".join(json.dumps({"title": "t", field: text}) + "\n" for text in texts).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refusal(source, *args):
    before = open_files()
    with pytest.raises(InputError) as caught:
        list(documents(source, *args))
    # While whoever asked has the error, with all frames that it went through.
    assert open_files() == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_standard_library_is_found_without_its_tests():
    texts = list(documents("stdlib", max_documents=40))
    assert len(texts) == 40
    assert texts == list(documents("stdlib", max_documents=40))
    known = fingerprint("stdlib")
    assert 5e6 < known["bytes"] < 3e7
    assert 300 < known["files"] == expected_documents("stdlib")
    assert known == fingerprint("stdlib")


@pytest.mark.parametrize("suffix", [".txt", ".py", ".md"])
def test_a_file_is_a_document(tmp_path, suffix):
    assert list(documents(write(tmp_path / f"a{suffix}", "\ufeffHä"))) == ["Hä"]


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_json_lines_compressed_or_not(tmp_path, suffix, pack):
    source = write(
        tmp_path / f"a.jsonl{suffix}", pack(b"\xef\xbb\xbf" + lines(TEXTS) + b"\n" + lines([None, " ", "last"]))
    )
    assert list(documents(source)) == [*TEXTS, "last"]
    assert list(documents(source, max_documents=2)) == TEXTS[:2]


def test_zstandard_of_several_frames(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress(lines(TEXTS)) + zstandard.compress(lines(["x" * 700_000, "end"]))
    source = tmp_path / "a.jsonl.zst"
    assert list(documents(write(source, packed))) == [*TEXTS, "x" * 700_000, "end"]
    for cut in (len(packed) - 3, 10):
        assert "damaged" in refusal(write(source, packed[:cut]))
    assert "damaged" in refusal(write(source, b"not zstandard"))


def test_zstandard_of_a_window_that_is_too_large_is_told(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    wide = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    source = write(tmp_path / "a.jsonl.zst", packer.compress(lines(TEXTS)) + packer.flush())
    assert "its window is larger than 128 MiB: pack it again with at most zstd --long=27" in refusal(source)


def test_parquet_is_read_by_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [*TEXTS, None], "n": range(4)})
    parquet.write_table(table, source, row_group_size=2)
    assert list(documents(str(source))) == TEXTS
    assert "no field 'body' (there are: text, n)" in refusal(str(source), "body")
    assert "row 1: field 'n' is of type int" in refusal(str(source), "n")
    assert "not a readable parquet file" in refusal(write(source, source.read_bytes()[:-20]))


def test_a_long_plain_file_is_read_in_sections(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "SECTION", 100)
    text = "".join(f"größer {i}\n" for i in range(200)) + "x" * 350 + "\nend"
    sections = list(documents(write(tmp_path / "a.txt", "\ufeff" + text)))
    assert "".join(sections) == text
    assert max(map(len, sections)) < 300
    assert sections[0].endswith("\n")
    wrong = text.encode() + b"\xff" + b"more" * 100
    assert f"not UTF-8 (byte {len(text.encode())})" in refusal(write(tmp_path / "a.txt", wrong))
    wrong = b"\xef\xbb\xbf" + b"a" * 98 + b"\xe3\x81"  # cut inside of a character
    assert "not UTF-8 (byte 101)" in refusal(write(tmp_path / "a.txt", wrong))


def zstandard_compress(content):
    return pytest.importorskip("zstandard").compress(content)


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard_compress)]
)
def test_a_line_that_is_too_long_is_named(tmp_path, monkeypatch, suffix, pack):
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 1000)
    source = tmp_path / f"a.jsonl{suffix}"
    fits = lines(["x" * 900])
    assert list(documents(write(source, pack(fits)))) == ["x" * 900]
    for content in (fits + lines(["x" * 1000]) + fits, fits + b"\0" * 5000):
        message = refusal(write(source, pack(content)))
        assert message == f"{source}:2: a line of more than 1,000 bytes; divide it into documents"


def test_a_text_that_is_too_long_is_named(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 1000)
    parquet.write_table(pyarrow.table({"text": ["short", "x" * 1001]}), tmp_path / "a.parquet")
    assert "row 2: a text of more than 1,000 characters" in refusal(str(tmp_path / "a.parquet"))


PEAK = """
import resource, sys
from sparsae.data import readers
from sparsae.data.entry import cache_root
from sparsae.data.sources import documents
from sparsae.data.tokenizer import load_tokenizer
from sparsae.errors import InputError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    list(documents("{path}"))
except InputError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_what_unpacks_to_gigabytes_takes_little_memory(tmp_path, suffix):
    path, block = tmp_path / f"a.jsonl{suffix}", bytes(2**24)
    if suffix == ".zst":
        packed = zstandard_compress(bytes(2**29))
    else:
        compress = gzip.compress(block, 1, mtime=0) if suffix == ".gz" else lzma.compress(block, preset=0)
        packed = compress * 32
    path.write_bytes(packed)
    found = subprocess.run([sys.executable, "-c", PEAK.format(path=path)], capture_output=True, text=True, check=True)
    message, grown = found.stdout.splitlines()
    assert message == f"{path}:1: a line of more than 67,108,864 bytes; divide it into documents"
    assert int(grown) < 250


def test_directories_and_globs_are_sorted_and_take_what_is_readable(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.md", "table.csv", ".hidden/d.txt", ".e.txt"):
        write(tmp_path / name, name)
    write(tmp_path / "z.jsonl", lines(["z"]))
    assert list(documents(str(tmp_path))) == ["a.txt", "b.txt", "deep/c.md", "z"]
    assert list(documents(str(tmp_path / "*.txt"))) == ["a.txt", "b.txt"]
    assert list(documents(str(tmp_path / "**/*.md"))) == ["deep/c.md"]
    assert expected_documents(str(tmp_path / "*.txt"), 1) == 1
    assert expected_documents(str(tmp_path)) is None


def test_a_glob_alone_follows_links_and_no_file_is_read_twice(tmp_path):
    for name in ("text/a.txt", "real/b.txt", "text/deep/c.txt"):
        write(tmp_path / name, name)
    (tmp_path / "text/more").symlink_to(tmp_path / "real")
    assert sorted(documents(str(tmp_path / "text"))) == ["text/a.txt", "text/deep/c.txt"]
    assert sorted(documents(str(tmp_path / "text/**/*.txt"))) == ["real/b.txt", "text/a.txt", "text/deep/c.txt"]
    assert list(documents(str(tmp_path / "text/deep/**/**/*.txt"))) == ["text/deep/c.txt"]


def test_the_fingerprint_follows_the_content(tmp_path):
    source = write(tmp_path / "a.txt", "one")
    before = fingerprint(source)
    assert fingerprint(source) == before
    write(tmp_path / "a.txt", "other")
    assert fingerprint(source) != before


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "x", "unknown suffix; readable are .txt"),
        ("a.txt", b"\xff\xfe", "a.txt: not UTF-8 (byte 0)"),
        ("a.jsonl", lines(["x"]) + b'{"text": ', "a.jsonl:2: not a JSON object"),
        ("a.jsonl", lines(["x"]) + b'\n{"title": "x"}', "a.jsonl:3: no field 'text' (there are: title); name"),
        ("a.jsonl", b'["text"]', "a.jsonl:1: a list, not a JSON object"),
        ("a.jsonl", b"null", "a.jsonl:1: a NoneType, not"),
        ("a.jsonl", b'{"text": 3}', "field 'text' is of type int, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: field 'text' holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not a JSON object"),
        ("a.jsonl.xz", b"not xz", "damaged compressed file"),
        ("a.jsonl.xz", lzma.compress(lines(TEXTS))[:-15], "damaged compressed file"),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS), mtime=0)[:-9], "damaged compressed file"),
        ("a.jsonl.gz", b"not gzip", "damaged compressed file"),
        ("a.parquet", b"not parquet", "not a readable parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, expected):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    assert expected in refusal(write(tmp_path / name, content))


def test_what_does_not_exist_is_refused_before_anything_is_read(tmp_path):
    for source in (
        str(tmp_path / "absent.txt"),
        str(tmp_path / "*.txt"),
        "",
        "hf:",
        "hf:a:b:c:d",
        "hf:a@",
        "hf:@b",
        str(tmp_path),
    ):
        with pytest.raises(InputError):
            documents(source)
    write(tmp_path / "a.csv", "x")
    assert "none of its 1 matches" in refusal(str(tmp_path / "*"))


@pytest.mark.parametrize(
    ("name", "module"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard"), ("hf:a/b", "datasets")]
)
def test_a_missing_library_says_how_to_get_it(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    source = name if name.startswith("hf:") else write(tmp_path / name, "x")
    assert "pip install 'sparsae[data]'" in refusal(source)


def fake_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_remote_dataset_is_streamed(monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return ({"text": text} for text in TEXTS)

    fake_datasets(monkeypatch, load)
    assert list(documents("hf:org/name", max_documents=2)) == TEXTS[:2]
    assert list(documents("hf:org/name@v1.2:config:test")) == TEXTS
    assert asked == [
        (("org/name", None), {"revision": None, "split": "train", "streaming": True}),
        (("org/name", "config"), {"revision": "v1.2", "split": "test", "streaming": True}),
    ]
    assert fingerprint("hf:org/name@v1.2") != fingerprint("hf:org/name")
    assert "hf:org/name: row 1: no field 'body'" in refusal("hf:org/name", "body")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("many\nlines"), "hf:org/name: the Hugging Face Hub cannot be reached"),
        (FileNotFoundError("no such dataset\nmore"), "hf:org/name: cannot be read: no such dataset"),
        (ValueError("unknown split"), "hf:org/name: cannot be read: unknown split"),
    ],
)
def test_a_remote_dataset_that_cannot_be_had_is_one_line(monkeypatch, error, expected):
    def load(*args, **options):
        raise error

    fake_datasets(monkeypatch, load)
    assert expected in refusal("hf:org/name")


@pytest.mark.skipif(not BOOKS.exists(), reason="the shared books are not on this machine")
def test_books():
    first, second = documents(str(BOOKS), max_documents=2)
    assert first != second
    assert min(len(first), len(second)) > 10_000


def test_the_home_of_nobody_is_a_place_that_does_not_exist():
    assert "~nobody-here/a.txt: no such file or directory" in refusal("~nobody-here/a.txt")
    with pytest.raises(InputError, match="no such tokenizer"):
        load_tokenizer("~nobody-here/tokenizer.json")
    assert str(cache_root("~nobody-here/x")) == "~nobody-here/x"
    with pytest.raises(InputError, match=r"data\.cache: 'a\\x00b' is no path"):
        cache_root("a\0b")


@pytest.mark.parametrize(
    "error", [EOFError("ended before the marker"), lzma.LZMAError("corrupt"), zlib.error("corrupt"), gzip.BadGzipFile()]
)
def test_a_damaged_file_of_a_remote_dataset_is_one_line(monkeypatch, error):
    def rows():
        yield {"text": TEXTS[0]}
        raise error

    fake_datasets(monkeypatch, lambda *_, **__: rows())
    assert "hf:org/name: cannot be read: " in refusal("hf:org/name", "text")
