"""Activations for training: documents → contexts → activations → shuffled batches.

| module | provides |
|---|---|
| documents | `documents`: one split of a text source as named documents |
| contexts | `Corpus`: a text as contexts of tokens, from any position on |
| shards | `write`, `Shards`: activations written to disk once and read many times |
| tensors | `write_index`, `Tensors`: activations that anybody made, indexed where they are |
| tensor_files | `open_table`: one file of tensors of any kind that is read |
| live | `LiveStream`: batches of activations computed by an LM as they are needed |
| sharded | `open_shards`, `ShardStream`: batches of activations read back from disk |
| prefetch | `Prefetcher`: either stream, computed ahead by a thread |
| base | `ActivationStream`: what the streams have in common |
| permutation | `permutation`: shuffling as a function of a key |
"""
