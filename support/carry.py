"""A corpus and GPT-2's BPE in a folder that can be carried, with the tree, to a machine without a network."""

import itertools
import os
import re
import shutil

from support.configurator import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MOST = 64 * 2**20  # bytes of the tree and the folder together


def pack(source, domain_field, folder):
    """
    Write <folder>/corpus.parquet, the text and the domain of every document of `source` (as prepare_owt.py's), and
    <folder>/tiktoken/, the files of GPT-2's BPE: from TIKTOKEN_CACHE_DIR, or fetched. Returns the bytes of the tree and
    of the folder. Raises UserError where they are more than MOST, or where the BPE cannot be fetched.
    """
    import pyarrow as pa
    from pyarrow import parquet

    import prepare_owt

    knobs = prepare_owt.Knobs(source, domain_field="" if source == "python" else domain_field)
    os.makedirs(folder, exist_ok=True)
    schema, path = pa.schema(dict(text=pa.string(), domain=pa.string())), f"{folder}/corpus.parquet"
    documents = whole(prepare_owt.documents_of(knobs))
    # pages as large as a row group, since each is compressed by itself
    options = dict(compression="zstd", compression_level=12, use_dictionary=["domain"], data_page_size=2**28)
    with parquet.ParquetWriter(f"{path}.tmp", schema, **options) as file:
        while batch := list(itertools.islice(documents, 2**12)):
            texts = [text.encode("utf-8", "replace").decode() for text, _ in batch]  # lone surrogates
            file.write_table(pa.table([texts, [domain for _, domain in batch]], schema=schema))
    os.replace(f"{path}.tmp", path)
    cache, ours = os.environ.get("TIKTOKEN_CACHE_DIR", ""), f"{folder}/tiktoken"
    os.makedirs(ours, exist_ok=True)
    for name in os.listdir(cache) if os.path.isdir(cache) else ():
        if re.fullmatch("[0-9a-f]{40}", name) and not os.path.samefile(cache, ours):  # tiktoken's names
            shutil.copy(f"{cache}/{name}", ours)
    os.environ["TIKTOKEN_CACHE_DIR"] = ours
    prepare_owt.get_tokenizer("gpt2")  # fetches what is not there
    tree, carried = bytes_of(ROOT, ignored()), bytes_of(folder, ())
    if tree + carried > MOST:
        sizes = f"{carried / 2**20:.1f} MiB there and {tree / 2**20:.1f} MiB of the tree"
        raise UserError(f"{folder}: {sizes} are more than {MOST // 2**20} MiB together; take a smaller SOURCE")
    return tree, carried


def whole(documents):
    """The documents, of which long ones come in pieces, put together."""
    pieces, of = [], None
    for text, domain in documents:
        if domain is not None and pieces:
            yield "".join(pieces), of
            pieces = []
        pieces.append(text)
        of = of if domain is None else domain
    if pieces:
        yield "".join(pieces), of


def bytes_of(folder, without):
    """Of the files below `folder`, without the folders of these names."""
    total = 0
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in without]
        total += sum(os.lstat(f"{at}/{name}").st_size for name in names)
    return total


def ignored():
    with open(f"{ROOT}/.gitignore", encoding="utf-8") as file:
        return {".git", *(line.strip().strip("/") for line in file)}
