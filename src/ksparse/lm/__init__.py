"""A causal language model, read and changed at a site.

| module | provides |
|---|---|
| model | `LM`: the model with its tokenizer and site |
| sites | `resolve`: where `resid_post.8` is, on every architecture |
| patterns | `sites_of`: the sites that a list or `resid_post.*` names |
| hooks | reading and changing activations in a forward pass |
| loading | models and tokenizers, checked for completeness |
| continuations | running the end of a context many times, with one activation changed |
| agreement | checks that an LM's passes agree before numbers are believed |
| provenance | checks that an SAE is used on what it was trained on |
| tokens | token ids, their texts, batches of contexts |
"""
