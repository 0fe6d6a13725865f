"""The table of all parsers under test."""

from kvstore_bench.hostile import chunks, kept, models, stores
from kvstore_bench.hostile.parser import Parser

PARSERS: dict[str, Parser] = {
    parser.name: parser
    for parser in (*chunks.parsers(), *models.parsers(), *stores.parsers(), *kept.parsers())
}
