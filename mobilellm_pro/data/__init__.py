"""Data room: text in, an ordered and weighted stream of packed token rows out.

Reading order, from text to shards: `offline_text` (where free text comes from) -> `dataset_config` -> `documents` (and
`hub_records`: readers) -> `tokenizer` -> `prepare`, which makes corpora in parts (`corpus_parts`, `part_workers`,
`text_parts`; `megatron` for shards of others) with `shard_writer`, `shard_index` and `manifest`; `inspection` looks at
them, and `clustering` sorts their documents (`cluster_config`, `cluster_features`, `cluster_assignment`,
`cluster_report`; `clusters` is what it leaves). From shards to rows: `shards` -> `shuffle` (an order in bounded memory)
-> `packing` (one corpus as an endless stream; `best_fit` and `row_assignment` are the alternative; `document_limits`
choose documents) -> `mixture` (many corpora, one order).

This file imports nothing, so that the tokenization workers start without loading torch.
"""
