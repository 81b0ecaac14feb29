"""Data room: text in, an ordered and weighted stream of packed token rows out.

Reading order: `offline_text` (where free text comes from) -> `documents` (readers) -> `tokenizer` -> `prepare` (text to
shards) -> `shards` (the file format) -> `packing` (one corpus as an endless stream) -> `mixture` (many corpora, one
order).

This file imports nothing, so that the tokenization workers start without loading torch.
"""
